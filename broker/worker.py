"""Spawns the two unprivileged programs and supervises them.

Rule 1: a worker is exec'd, never forked only: a forked child still holds the broker's memory. It inherits the
        descriptors that its job names and nothing else.
Rule 2: each line of a worker passes a pydantic model of broker/protocol.py before anything is done with it.
Rule 3: a worker that ends without a verdict has given one: its archive is refused.
"""

import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import IO, Final, TypeVar

import trio
from pydantic import TypeAdapter, ValidationError

from broker import checker
from broker import protocol as wire
from broker.checker import CheckError as CheckError  # part of this module too
from broker.errors import ImgpullError

FETCH: Final = (sys.executable, "-I", "-m", "unpriv.fetch")
# The fetcher is boto3's home: the user's whole S3 world is in these, and nothing else passes.
FETCH_VARIABLES: Final = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "REQUESTS_CA_BUNDLE",  # botocore takes it where AWS_CA_BUNDLE is not set
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "XDG_CONFIG_HOME",
)
FETCH_PREFIXES: Final = ("AWS_", "BOTO_")
FETCH_SUFFIXES: Final = ("_proxy", "_PROXY")
GRACE_S: Final = 5.0  # between closing a worker's input and killing it
_CHECK: TypeAdapter[wire.CheckReport] = TypeAdapter(wire.CheckReport)
_FETCH: TypeAdapter[wire.FetchReport] = TypeAdapter(wire.FetchReport)
T = TypeVar("T")


async def _each_line(stream: trio.abc.ReceiveStream, take: Callable[[bytes], None]) -> None:
    """Hand over a worker's lines one by one. Raises: ImgpullError `worker-failed` for one that is too long."""
    buffer = bytearray()
    async for chunk in stream:
        buffer += chunk
        while (end := buffer.find(b"\n")) >= 0:
            take(bytes(buffer[:end]))
            del buffer[: end + 1]
        if len(buffer) > wire.MAX_LINE:
            raise ImgpullError("worker-failed", "an unprivileged worker sent a line that is too long")


def _parse(adapter: TypeAdapter[T], line: bytes) -> T:
    try:
        return adapter.validate_json(line)
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)[:3])
        raise ImgpullError("worker-failed", "an unprivileged worker sent what it must not", why) from error


def _ending(returncode: int, last_words: bytes) -> str:
    """Return how a process ended, for people."""
    said = last_words.decode("ascii", "replace").strip().splitlines()
    words = f": {said[-1][:300]}" if said else ""
    if returncode >= 0:
        return f"it ended with code {returncode}{words}"
    names = {
        signal.SIGSYS: "it was killed by its sandbox for a forbidden system call",
        signal.SIGXCPU: "it used more CPU time than the limit",
        signal.SIGXFSZ: "it wrote more than the limit",
        signal.SIGKILL: "it was killed (out of memory, or by somebody)",
    }
    number = -returncode
    return names.get(signal.Signals(number), f"it was killed by signal {number}") + words


CHECK_ENDS: Final[dict[int, tuple[str, str]]] = {  # the exit codes of unpriv.check that are no fault of the archive
    73: ("no-room", "the checker has no room for what it writes"),
    74: ("io-error", "the checker could not read or write"),
    78: ("configuration", "the checker refuses to start"),
}


async def check(
    job: wire.CheckJob,
    blob_fd: int,
    descriptors: Sequence[int] = (),
    progress: Callable[[int], None] | None = None,
    deadline_s: float | None = None,
) -> wire.Accepted | wire.Rejected:
    """Have one blob checked by a sandboxed process.

    Args: ``descriptors`` are those that the job names beside 0 to 2; ``deadline_s`` is that of the limits, or less.
    Raises: CheckError where the checker ends without a verdict, is too slow, or speaks out of turn.
    """
    return await supervise(checker.start(job, blob_fd, descriptors), progress, deadline_s)


async def supervise(
    started: checker.Started, progress: Callable[[int], None] | None = None, deadline_s: float | None = None
) -> wire.Accepted | wire.Rejected:
    """Wait for a checker's verdict; it has ended when this returns, however it does.

    Raises: CheckError where it ends without a verdict, is too slow, or speaks out of turn.
    """
    verdict: wire.Accepted | wire.Rejected | None = None
    last_words = bytearray()

    def take_report(line: bytes) -> None:
        nonlocal verdict
        report = _parse(_CHECK, line)
        if isinstance(report, wire.CheckProgress):
            if progress:
                progress(report.done_bytes)
        elif verdict is not None:
            raise ImgpullError("worker-failed", "the checker gave two verdicts")
        else:
            verdict = report

    process = started.process
    deadline_s = started.deadline_s if deadline_s is None else deadline_s
    try:
        with trio.move_on_after(deadline_s) as scope:
            async with (
                _stream(process.stdout) as reports,
                _stream(process.stderr) as words,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(_each_line, reports, take_report)
                nursery.start_soon(_collect, words, last_words)
                await _ended(process)
    finally:
        started.kill()
    if scope.cancelled_caught:
        raise CheckError("worker-failed", f"the checker did not end within {deadline_s:.0f} s", "it was killed")
    if process.returncode in CHECK_ENDS:
        code, what = CHECK_ENDS[process.returncode]
        raise CheckError(code, what, _ending(process.returncode, bytes(last_words)))
    if verdict is None or process.returncode not in (0, 65):
        raise CheckError("worker-failed", "the checker gave no verdict", _ending(process.returncode, bytes(last_words)))
    return verdict


def _stream(pipe: IO[bytes] | None) -> trio.lowlevel.FdStream:
    """Return a pipe of a process as a stream of trio, with a descriptor of its own."""
    assert pipe is not None
    return trio.lowlevel.FdStream(os.dup(pipe.fileno()))


async def _ended(process: "subprocess.Popen[bytes]") -> None:
    """Wait until a process has ended, and reap it. Source: pidfd_open(2)."""
    handle = os.pidfd_open(process.pid)
    try:
        await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)
    process.wait()


async def _collect(stream: trio.abc.ReceiveStream, into: bytearray) -> None:
    async for chunk in stream:
        if len(into) < 65536:
            into += chunk


async def _end(process: trio.Process) -> None:
    """Kill a process if it lives and reap it; never leaves one behind, cancelled or not."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.kill()
        await process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                await stream.aclose()


class Fetcher:
    """One running fetcher process: many requests at once, each answered by its id."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._waiting: dict[int, trio.MemorySendChannel[wire.FetchReport]] = {}
        self._next_id = 0
        self._send_lock = trio.Lock()
        self._ended: ImgpullError | None = None
        self._refusal: ImgpullError | None = None
        self.ready: wire.Ready | None = None
        self.clock_ahead_s: int | None = None  # this machine's, against the server's; once S3 was asked
        self._is_ready = trio.Event()
        self.last_words = bytearray()

    @property
    def is_dead(self) -> bool:
        """Tell whether it can answer nothing any more."""
        return self._ended is not None or self._process.returncode is not None

    async def greeting(self) -> wire.Ready:
        """Wait until the fetcher's sandbox holds and return what it said of it."""
        await self._is_ready.wait()
        if self.ready is None:
            raise self._ended or ImgpullError("worker-failed", "the fetcher ended before its sandbox held")
        return self.ready

    async def objects(self, bucket: str, prefix: str) -> list[wire.Pin]:
        """Return the objects directly below a prefix."""
        report = await self._ask(lambda number: wire.List(id=number, bucket=bucket, prefix=prefix))
        assert isinstance(report, wire.Pins)
        return report.pins

    async def head(self, bucket: str, key: str) -> wire.Pin:
        """Return one object's pin."""
        report = await self._ask(lambda number: wire.Head(id=number, bucket=bucket, key=key))
        if not isinstance(report, wire.Pins) or len(report.pins) != 1:
            raise ImgpullError("worker-failed", "the fetcher answered a question that was not asked")
        return report.pins[0]

    async def fetch(
        self,
        pin: wire.Pin,
        expect: str | None = None,
        progress: Callable[[int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> wire.Fetched:
        """Bring one object into the blob directory."""
        report = await self._ask(lambda number: wire.Fetch(id=number, pin=pin, expect=expect), progress, notice)
        assert isinstance(report, wire.Fetched)
        if report.size != pin.size or (expect and report.digest != expect):
            raise ImgpullError("worker-failed", "the fetcher claims a blob of another size or digest than asked for")
        return report

    async def _ask(
        self,
        make: Callable[[int], wire.FetchRequest],
        progress: Callable[[int], None] | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> wire.FetchReport:
        await self.greeting()
        self._next_id += 1
        number = self._next_id
        send, receive = trio.open_memory_channel[wire.FetchReport](math.inf)
        self._waiting[number] = send
        try:
            await self._write(make(number))
            async for report in receive:
                if isinstance(report, wire.FetchProgress):
                    if progress:
                        progress(report.done_bytes)
                elif isinstance(report, wire.Notice):
                    if notice:
                        notice(report.message)
                elif isinstance(report, wire.FetchFailed):
                    raise fetch_error(report)
                else:
                    return report
            raise self._ended or ImgpullError("s3-unavailable", "the fetcher ended early")
        finally:
            self._waiting.pop(number, None)

    async def _write(self, message: wire.Message) -> None:
        assert self._process.stdin is not None
        if self._ended:
            raise self._ended
        async with self._send_lock:
            try:
                await self._process.stdin.send_all(message.model_dump_json().encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._ended or ImgpullError("s3-unavailable", "the fetcher ended early") from error

    def _take(self, line: bytes) -> None:
        report = _parse(_FETCH, line)
        if isinstance(report, wire.Ready):
            self.ready = report
            self._is_ready.set()
            return
        if isinstance(report, wire.Pins | wire.FetchFailed):
            self.clock_ahead_s = report.clock_ahead_s
        if report.id == 0 and isinstance(report, wire.FetchFailed):
            self._refusal = fetch_error(report)  # it could not even start; the end of its output tells everybody
        elif report.id in self._waiting:
            self._waiting[report.id].send_nowait(report)

    async def _read(self) -> None:
        """Deal out the fetcher's reports until it ends; then tell everybody who still waits."""
        assert self._process.stdout is not None
        try:
            await _each_line(self._process.stdout, self._take)
            code = await self._process.wait()
            kind = "configuration" if code == 78 else "s3-unavailable"
            early = ImgpullError(kind, "the fetcher ended early", _ending(code, bytes(self.last_words)))
            self._ended = self._refusal or early
        except ImgpullError as error:
            self._ended = error
        finally:
            self._is_ready.set()
            for channel in self._waiting.values():
                channel.close()


@asynccontextmanager
async def fetcher(hello: wire.Hello) -> AsyncGenerator[Fetcher, None]:
    """Run one fetcher process for as long as the block lasts."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in FETCH_VARIABLES or name.startswith(FETCH_PREFIXES) or name.endswith(FETCH_SUFFIXES)
    }
    process = await trio.lowlevel.open_process(
        FETCH,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        process_group=0,
    )
    assert process.stderr is not None
    session = Fetcher(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session._read)
            nursery.start_soon(_collect, process.stderr, session.last_words)
            nursery.start_soon(partial(_greet, session, hello))
            yield session
            assert process.stdin is not None
            with trio.move_on_after(GRACE_S):
                await process.stdin.aclose()
                await process.wait()
            nursery.cancel_scope.cancel()
    finally:
        await _end(process)


async def _greet(session: Fetcher, hello: wire.Hello) -> None:
    try:
        await session._write(hello)
    except ImgpullError:
        return  # the reader tells everybody why


FETCH_CODES: Final[dict[str, str]] = {
    "no_such_object": "no-such-object",
    "no_such_bucket": "no-such-object",
    "access_denied": "access-denied",
    "credentials_missing": "access-denied",
    "credentials_rejected": "access-denied",
    "wrong_region": "configuration",
    "unavailable": "s3-unavailable",
    "timed_out": "s3-unavailable",
    "too_slow": "s3-unavailable",
    "changed": "object-changed",
    "digest_mismatch": "digest-mismatch",
    "too_large": "digest-mismatch",
    "no_space": "no-room",
    "bad_response": "s3-unavailable",
    "listing_too_long": "not-an-image",
    "io_error": "io-error",
    "configuration": "configuration",
    "sandbox": "configuration",
}


def fetch_error(report: wire.FetchFailed) -> ImgpullError:
    """Return the fetcher's failure as the user's."""
    return ImgpullError(FETCH_CODES[report.code], report.message, fetch_code=report.code, retry=report.retryable)
