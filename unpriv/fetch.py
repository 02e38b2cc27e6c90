"""Turn S3 objects into local blobs: the program ``unpriv.fetch``. One process a pull.

Rule 1: the sandbox holds before the first byte from S3; Ready says so.
Rule 2: a blob is published only if every byte came from the pinned object and, where a digest is expected, has it.
Rule 3: nothing waits for ever: each stream has a watchdog, each request an end, each object a deadline.
Rule 4: no credential leaves this process: every report passes ``Reports``, which cuts them out.

Descriptor 0 brings requests, 1 takes reports, one JSON object a line (broker/protocol.py). The end of 0 cancels
everything at once; what is on disk then serves the next run. Exit code 0 after the end of the requests, 70 for a bug or
a request that makes no sense, 78 when the AWS configuration or the sandbox does not allow a start: a ``failed`` report
with id 0 comes first, with code `configuration`, `credentials_missing` or `sandbox`.

When a request fails, its code is
| code                 | when                                                                          | again later? |
|----------------------|-------------------------------------------------------------------------------|--------------|
| no_such_object       | 404 for the key or version, a delete marker, a key that S3 does not allow     | no           |
| no_such_bucket       | 404 for the bucket, a bucket name that S3 does not allow                      | no           |
| access_denied        | 403 to known credentials or to none; the object is archived                   | no           |
| credentials_missing  | no credentials found, or their provider (SSO, IMDS, STS, a process) fails     | no           |
| credentials_rejected | unknown key, wrong signature, expired or invalid token                        | no           |
| wrong_region         | a redirect to, or a signature scope of, another region                        | no           |
| unavailable          | no connection, name not resolved, connection broken, body cut, 5xx, 429       | yes          |
| timed_out            | no connection, no answer or no next byte in time; the object's deadline       | yes          |
| too_slow             | fewer bytes than the minimum rate over the watchdog's window                  | yes          |
| changed              | 412, 416, another ETag or size than the pin's: resolve anew                   | yes          |
| digest_mismatch      | not the expected sha256 (no), not the checksum stored by the server (yes)     | see left     |
| too_large            | more bytes than pinned, or than this filesystem takes in a file               | no           |
| no_space             | the pinned size does not fit, or the disk or quota filled up                  | no           |
| bad_response         | no 206, a wrong Content-Range or length, an answer that makes no sense        | some         |
| listing_too_long     | more than MAX_LAYERS + 1 objects under a prefix                               | no           |
| io_error             | the blob directory cannot be read or written                                  | no           |
| configuration        | the AWS configuration, endpoint URL, CA bundle or this machine's clock        | no           |
| sandbox              | the sandbox did not take                                                      | no           |
"Yes" failures were tried Tuning.attempts times in a row (or AWS_MAX_ATTEMPTS) with backoff before they are reported.
"""

import base64
import json
import logging
import os
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial as bind
from hashlib import sha256
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

import trio
from pydantic import TypeAdapter, ValidationError

from broker.protocol import (
    MAX_LINE,
    Fetch,
    Fetched,
    FetchFailed,
    FetchProgress,
    FetchReport,
    FetchRequest,
    Head,
    Hello,
    List,
    Notice,
    Pins,
    Ready,
)
from unpriv import blobfile, sandbox
from unpriv.blobfile import BlobDir, Partial
from unpriv.failures import FetchError
from unpriv.ranges import Bucket, Retries, Tuning, Watchdog, Width

if TYPE_CHECKING:
    from unpriv import s3
    from unpriv.streams import Attempt, Slot

T = TypeVar("T")
MEMORY_BYTES: Final = 512 << 20  # a reply without end fails before it harms the host
THREAD_STACK_BYTES: Final = 1 << 20
THREADS_A_STREAM: Final = 4  # one that works, and those that hang and were left behind
OPEN_FILES: Final = 1024
EXIT_BUG: Final = 70  # EX_SOFTWARE
EXIT_CONFIGURATION: Final = 78  # EX_CONFIG
LOCK_POLL_S: Final = 0.1
NOTICE_EVERY_S: Final = 5.0  # of one object and one kind
SECRET_MIN: Final = 4  # a shorter one would cut holes into every text
REQUESTS: Final[TypeAdapter[FetchRequest]] = TypeAdapter(FetchRequest)


class Reporter(Protocol):
    """Where reports go."""

    async def send(self, report: FetchReport) -> None:
        """Pass one report on."""


class Reports:
    """Writes reports to the broker, without a credential in them."""

    def __init__(self, fd: int, secrets: Callable[[], tuple[str, ...]]) -> None:
        self._stream = trio.lowlevel.FdStream(fd)
        self._lock = trio.Lock()
        self._secrets = secrets

    async def send(self, report: FetchReport) -> None:
        """Write one report. A reader that is slow makes us wait; one that is gone ends us."""
        async with self._lock:
            await self._stream.send_all(line_of(report, self._secrets()))


def line_of(report: FetchReport, secrets: tuple[str, ...]) -> bytes:
    """Return a report as a line, with `***` for each secret.

    A server sees a session token and may send it back as an error text or as a name.
    """
    fields = report.model_dump()
    words = [word for word in secrets if len(word) >= SECRET_MIN]
    if "message" in fields:
        for word in words:
            fields["message"] = fields["message"].replace(word, "***")
    line = json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
    if isinstance(report, Pins) and any(json.dumps(word)[1:-1] in line for word in words):
        text = "the server names an object by a secret of ours"
        return line_of(FetchFailed(id=report.id, code="bad_response", message=text, retryable=False), ())
    return line.encode() + b"\n"


@dataclass(slots=True)
class Job:
    """One object on its way."""

    id: int
    order: int
    partial: Partial
    ends_at_s: float
    missing_bytes: int = 0
    transferred: int = 0
    done: set[int] = field(default_factory=set)  # cells that are all there
    done_bytes: int = 0  # of these
    running: set["Attempt"] = field(default_factory=set)
    cell_done: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    noticed: dict[str, float] = field(default_factory=dict)

    def finish(self, cell: int) -> None:
        """Note that a cell is all there."""
        start, end = self.partial.grid.bounds(cell)
        self.done.add(cell)
        self.done_bytes += end - start
        self.cell_done.unpark_all()

    def progress_bytes(self) -> int:
        """Return how many bytes are there, those of running streams included."""
        return self.done_bytes + sum(attempt.offset - attempt.start for attempt in self.running)


class Fetcher:
    """Answers the requests of one broker."""

    def __init__(self, client: "s3.Client", hello: Hello, blobs: BlobDir, reports: Reporter, tuning: Tuning) -> None:
        from unpriv.streams import Slots

        self.client = client
        self.hello = hello
        self.blobs = blobs
        self.reports = reports
        self.tuning = tuning
        self.attempts = client.attempts or tuning.attempts
        self.width = Width(hello.max_streams, min(tuning.first_width, hello.max_streams))
        self.slots: Slots = Slots(self.width.now)
        self.bucket = Bucket(hello.rate_limit)
        self.threads = trio.CapacityLimiter(hello.max_streams * THREADS_A_STREAM)  # abandoned ones hold theirs
        self.control_threads = trio.CapacityLimiter(8)
        self.hash_threads = trio.CapacityLimiter(os.cpu_count() or 1)
        self.received = 0  # bytes of finished attempts, all objects
        self.jobs: dict[int, Job] = {}
        self._orders = count()

    # ------------------------------------------------------------ requests

    async def answer(self, request: List | Head | Fetch) -> None:
        """Answer one request with exactly one Pins, Fetched or FetchFailed."""
        report: FetchReport
        try:
            with ungrouped():
                report = await self._answer(request)
        except FetchError as error:
            report = FetchFailed(
                id=request.id, code=error.code, message=error.message[:8000], retryable=error.retryable
            )
        await self.reports.send(report)

    async def _answer(self, request: List | Head | Fetch) -> FetchReport:
        """Return the report that a request asks for. Raises: FetchError."""
        if isinstance(request, Fetch):
            return await self._fetch(request)
        if isinstance(request, Head):
            pin = await self._control(request.id, bind(self.client.head, request.bucket, request.key))
            return Pins(id=request.id, pins=[pin])
        pins = await self._control(request.id, bind(self.client.list, request.bucket, request.prefix))
        return Pins(id=request.id, pins=pins)

    async def _control(self, request_id: int, ask: Callable[[], T]) -> T:
        """Ask S3 something small in a thread, again after a passing failure. Raises: FetchError."""
        from unpriv.s3 import Line

        retries = Retries(self.tuning, self.attempts)
        last: FetchError | None = None
        with trio.move_on_after(self.tuning.control_s) as scope:
            while True:
                line = Line()
                try:
                    return await trio.to_thread.run_sync(
                        line.run, ask, abandon_on_cancel=True, limiter=self.control_threads
                    )
                except FetchError as error:
                    last = error
                finally:
                    line.cut()  # a thread that was left behind must end
                pause_s = retries.delay_s(last, 0)
                if trio.current_time() + pause_s > scope.deadline:
                    raise last
                await trio.sleep(pause_s)
        raise last or FetchError("timed_out", f"no answer within {self.tuning.control_s:g} s", retryable=True)

    # ------------------------------------------------------------ one object

    async def _fetch(self, request: Fetch) -> Fetched:
        """Bring one object into the blob directory. Raises: FetchError."""
        pin = request.pin
        if request.expect and self.blobs.published(request.expect, pin.size):
            return Fetched(id=request.id, digest=request.expect, size=pin.size, transferred_bytes=0)
        ends_at_s = trio.current_time() + self.hello.deadline_s
        with trio.move_on_at(ends_at_s):
            name = blobfile.identity(pin, self.client.url)
            held = await self._lock(request, name)
            if isinstance(held, str):
                digest = must_be(held, request)
                return Fetched(id=request.id, digest=digest, size=pin.size, transferred_bytes=0)
            job = Job(request.id, next(self._orders), held, ends_at_s)
            self.jobs[request.id] = job
            try:
                return await self._fill(job, request)
            finally:
                del self.jobs[request.id]
                held.close()
        raise FetchError("timed_out", f"not finished within {self.hello.deadline_s:g} s: {at(request)}", retryable=True)

    async def _lock(self, request: Fetch, name: str) -> Partial | str:
        """Return the partial blob, locked; or the digest of the blob that another process made of it meanwhile."""
        busy_fd: int | None = None
        try:
            while isinstance(held := self.blobs.try_lock(request.pin, name, self.tuning.cell_bytes), int):
                if busy_fd is None:
                    busy_fd = held
                    await self.reports.send(Notice(id=request.id, message="another pull fetches this object; waiting"))
                else:
                    os.close(held)
                await trio.sleep(LOCK_POLL_S)
            digest = blobfile.outcome(held.map_fd) or (None if busy_fd is None else blobfile.outcome(busy_fd))
        finally:
            if busy_fd is not None:
                os.close(busy_fd)
        if digest is None or not self.blobs.published(digest, request.pin.size):
            return held
        held.drop()
        held.close()
        return digest

    async def _fill(self, job: Job, request: Fetch) -> Fetched:
        """Fetch what is missing, check the whole, publish it."""
        try:
            with ungrouped():
                await self._resume(job)
                digest = await self._stream(job, request)
        except FetchError as error:
            if error.code in ("changed", "digest_mismatch", "too_large"):
                job.partial.drop()  # none of its bytes is of use
                await self._notice(job, error.code, f"{error.message}; what was fetched of it is dropped")
            raise
        await trio.to_thread.run_sync(job.partial.publish, digest)
        return Fetched(id=job.id, digest=digest, size=request.pin.size, transferred_bytes=job.transferred)

    async def _resume(self, job: Job) -> None:
        """Take over what an earlier run left, cell by cell as far as its checksum agrees. Raises: FetchError."""
        claimed = job.partial.resume()
        others_bytes = sum(other.missing_bytes for other in self.jobs.values() if other is not job)
        job.missing_bytes = job.partial.check_room(others_bytes)
        for cell, crc in claimed.items():
            found = await trio.to_thread.run_sync(job.partial.crc_of, cell, limiter=self.hash_threads)
            if found == crc:
                job.finish(cell)
            else:
                job.partial.forget(cell)
        if claimed:
            await self._notice(job, "resume", f"resumes with {job.done_bytes} bytes that are already here")

    async def _stream(self, job: Job, request: Fetch) -> str:
        """Fetch the missing cells, hash all in order, return the digest. Raises: FetchError in groups."""
        grid = job.partial.grid
        digest = ""

        async def hash_all() -> None:
            nonlocal digest
            digest = await self._hash(job, request)
            nursery.cancel_scope.cancel()  # ends the progress reports

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report_progress, job)
            nursery.start_soon(hash_all)
            for cell in range(grid.cells):
                if cell not in job.done:
                    slot = await self.slots.acquire(job.order)
                    nursery.start_soon(self._cell, job, cell, slot)
        return digest

    async def _hash(self, job: Job, request: Fetch) -> str:
        """Hash the cells in order as they come; return the digest. Raises: FetchError on a mismatch."""
        stored = await self._control(job.id, bind(self.client.checksum, request.pin))
        check = Sums(stored)
        for cell in range(job.partial.grid.cells):
            while cell not in job.done:
                await job.cell_done.park()
            await trio.to_thread.run_sync(check.add, job.partial, cell, limiter=self.hash_threads)
        digest = must_be(check.digest(), request)
        check.compare(at(request))
        return digest

    # ------------------------------------------------------------ one range

    async def _cell(self, job: Job, cell: int, slot: "Slot") -> None:
        """Fetch one cell, however many requests it takes; give its stream back. Raises: FetchError."""
        try:
            crc = await self._ranges(job, cell, slot)
            job.partial.complete(cell, crc)
            job.finish(cell)
        finally:
            slot.release()

    async def _ranges(self, job: Job, cell: int, slot: "Slot") -> int:
        """Fetch one cell; return its CRC-32. A request that broke off is continued where it ended."""
        from unpriv.streams import Attempt

        start, end = job.partial.grid.bounds(cell)
        retries = Retries(self.tuning, self.attempts)
        offset, crc = start, 0
        while True:
            attempt = Attempt(self.client, job.partial, self.bucket, start, offset, end, crc)
            await self._attempt(job, attempt)
            if attempt.error is None:
                return attempt.crc
            brought_bytes = attempt.received
            offset, crc = attempt.offset, attempt.crc
            if offset == end:  # all came, and more: none of it is to be believed, and none counts as progress
                brought_bytes, offset, crc = 0, start, 0
            await self._pause(job, attempt.error, retries.delay_s(attempt.error, brought_bytes), slot)

    async def _attempt(self, job: Job, attempt: "Attempt") -> None:
        """Run one request in a thread under a watchdog."""
        job.running.add(attempt)
        try:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, attempt, scope)
                    await trio.to_thread.run_sync(attempt.run, abandon_on_cancel=True, limiter=self.threads)
                    nursery.cancel_scope.cancel()
        finally:
            attempt.stop(None)
            job.running.discard(attempt)
            job.transferred += attempt.received
            self.received += attempt.received

    async def _watch(self, attempt: "Attempt", scope: trio.CancelScope) -> None:
        """Stop a stream that brings too little; leave its thread behind if even that does not wake it."""
        window_s = self.tuning.watch_window_s
        dog = Watchdog(self._min_rate(), window_s)
        while not dog.too_slow(trio.current_time(), attempt.received):  # noqa: ASYNC110  # time itself is the event
            await trio.sleep(window_s / 8)
        if not attempt.answered:
            why = FetchError("timed_out", f"no answer within {window_s:g} s", retryable=True)
        else:
            why = FetchError("too_slow", f"less than {dog.min_rate} bytes a second for {window_s:g} s", retryable=True)
        attempt.stop(why)
        await trio.sleep(self.tuning.abandon_s)
        scope.cancel()

    def _min_rate(self) -> int:
        """Return the bytes a second that a stream owes; the bandwidth limit may leave it less."""
        if not self.hello.rate_limit:
            return self.hello.min_rate
        return min(self.hello.min_rate, self.hello.rate_limit // (4 * max(1, self.slots.used)))

    async def _pause(self, job: Job, error: FetchError, pause_s: float, slot: "Slot") -> None:
        """Wait before the next attempt, if the deadline allows it. Raises: the error."""
        if error.throttled:
            self.slots.resize(self.width.throttled())
        if trio.current_time() + pause_s > job.ends_at_s:
            raise error
        await self._notice(job, error.code, f"{error.message}; tries again in {pause_s:.1f} s")
        await slot.lend(pause_s)

    # ------------------------------------------------------------ around

    async def _notice(self, job: Job, kind: str, message: str) -> None:
        """Tell a person something, but not the same thing all the time."""
        now_s = trio.current_time()
        if now_s >= job.noticed.get(kind, now_s):
            job.noticed[kind] = now_s + NOTICE_EVERY_S
            await self.reports.send(Notice(id=job.id, message=message[:8000]))

    async def _report_progress(self, job: Job) -> None:
        """Tell how far an object is, whenever that changed."""
        told_bytes = -1
        while True:
            done_bytes = job.progress_bytes()
            if done_bytes != told_bytes:
                told_bytes = done_bytes
                await self.reports.send(FetchProgress(id=job.id, done_bytes=done_bytes))
            await trio.sleep(self.tuning.report_every_s)

    async def measure(self) -> None:
        """Use as many streams as pay."""
        before_bytes = self._moved()
        while True:
            await trio.sleep(self.tuning.measure_every_s)
            moved_bytes = self._moved()
            rate = (moved_bytes - before_bytes) / self.tuning.measure_every_s
            before_bytes = moved_bytes
            self.slots.resize(self.width.measured(rate, self.slots.used))

    def _moved(self) -> int:
        """Return all bytes received so far."""
        return self.received + sum(a.received for job in self.jobs.values() for a in job.running)


class Sums:
    """The digest of a blob, and the checksum that the server stored with it."""

    def __init__(self, stored: "s3.Checksum | None") -> None:
        self._sha256 = sha256()
        self._stored = stored
        self._crc32 = 0

    def add(self, partial: Partial, cell: int) -> None:
        """Take in the next cell from the file. Runs in a thread."""
        for piece in partial.pieces(cell):
            self._sha256.update(piece)
            if self._stored and self._stored.algorithm == "crc32":
                self._crc32 = zlib.crc32(piece, self._crc32)

    def digest(self) -> str:
        """Return the digest of all that was taken in."""
        return f"sha256:{self._sha256.hexdigest()}"

    def compare(self, name: str) -> None:
        """Check the server's checksum. Raises: FetchError."""
        if self._stored is None:
            return
        found = self._sha256.digest() if self._stored.algorithm == "sha256" else self._crc32.to_bytes(4, "big")
        if base64.b64encode(found).decode() != self._stored.base64:
            message = f"what arrived does not have the {self._stored.algorithm} that the server stored: {name}"
            raise FetchError("digest_mismatch", message, retryable=True)


def must_be(digest: str, request: Fetch) -> str:
    """Return a digest that is the expected one, if one is. Raises: FetchError."""
    if request.expect not in (None, digest):
        raise FetchError("digest_mismatch", f"expected {request.expect}, found {digest}: {at(request)}")
    return digest


def at(request: Fetch) -> str:
    """Return an object's name for messages."""
    return f"s3://{request.pin.bucket}/{request.pin.key}"


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise, instead of a nursery's group, the one exception that says most.

    That is a bug or a cancellation before all, then `changed`, then the first.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(leaves_of(group))
        others = [leaf for leaf in leaves if not isinstance(leaf, FetchError)]
        changed = [leaf for leaf in leaves if isinstance(leaf, FetchError) and leaf.code == "changed"]
        raise (others + changed + leaves)[0] from None


# ---------------------------------------------------------------- the program


class Requests:
    """Reads requests from a descriptor, first one without trio, then the rest with it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = b""

    def first(self) -> bytes | None:
        """Return the first line, or None at the end."""
        while b"\n" not in self._pending:
            data = os.read(self._fd, 1 << 16)
            if not data or len(self._pending) > MAX_LINE:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield the other lines as they come."""
        stream = trio.lowlevel.FdStream(self._fd)
        while True:
            *lines, self._pending = self._pending.split(b"\n")
            for line in lines:
                yield line
            if len(self._pending) > MAX_LINE:
                raise ProtocolError("a request is too long")
            data = await stream.receive_some()
            if not data:
                return
            self._pending += data


class ProtocolError(Exception):
    """The broker said something that makes no sense."""


async def serve(fetcher: Fetcher, requests: Requests) -> None:
    """Answer requests, many at once, until their end; then cancel what still runs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.measure)
        async for line in requests.rest():
            try:
                request = REQUESTS.validate_json(line)
            except ValidationError as error:
                raise ProtocolError(f"not a request: {error.error_count()} errors") from None
            nursery.start_soon(fetcher.answer, request)
        nursery.cancel_scope.cancel()


def main(tuning: Tuning | None = None) -> NoReturn:
    """Run the program on descriptors 0 and 1. Never returns: threads that hang in the network are left behind."""
    logging.disable()  # boto3 and urllib3 warn on stderr, with requests in the text
    report_fd = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no report
    requests = Requests(0)
    line = requests.first()
    if line is None:
        os._exit(0)
    code = EXIT_BUG
    try:
        code = run(Hello.model_validate_json(line), requests, report_fd, tuning or Tuning())
    except BaseException as error:
        leaf = next(leaves_of(error)) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(leaf, BrokenPipeError | trio.BrokenResourceError):
            os._exit(0)  # nobody is left to report to
        # The class and the place are enough to find it; its text may hold a request with its signature.
        os.write(2, f"imgpull-fetch: {type(leaf).__name__} at {place_of(leaf)}\n".encode())
    os._exit(code)


def run(hello: Hello, requests: Requests, report_fd: int, tuning: Tuning) -> int:
    """Connect, lock in, serve; return the exit code."""
    from unpriv import s3, streams  # noqa: F401  # before the sandbox: later nothing can be loaded

    timeouts = {"connect_timeout_s": tuning.connect_timeout_s, "read_timeout_s": tuning.read_timeout_s}
    try:
        blobs = BlobDir.open(hello.blob_dir)
        client = s3.connect(hello.endpoint, hello.max_streams, **timeouts)
        layers = confine(hello, client.readable, client.writable)
    except FetchError as error:
        failed = FetchFailed(id=0, code=error.code, message=error.message, retryable=error.retryable)
        os.write(report_fd, line_of(failed, ()))
        return EXIT_CONFIGURATION

    async def start() -> None:
        reports = Reports(report_fd, client.secrets)
        await reports.send(Ready(sandbox=layers, credentials=client.credentials, endpoint=client.url))
        await serve(Fetcher(client, hello, blobs, reports, tuning), requests)

    trio.run(start)
    return 0


def confine(hello: Hello, readable: Sequence[str], writable: Sequence[str]) -> dict[str, str]:
    """Enter the sandbox; return what took. Raises: FetchError."""
    threading.stack_size(THREAD_STACK_BYTES)
    memory_bytes = MEMORY_BYTES + hello.max_streams * THREADS_A_STREAM * THREAD_STACK_BYTES
    rules = sandbox.Rules(read_beneath=readable, write_beneath=[hello.blob_dir, *writable], tcp=True)
    try:
        took = sandbox.lock("fetch", rules, {"data": memory_bytes, "nofile": OPEN_FILES})
    except sandbox.SandboxError as error:
        raise FetchError("sandbox", f"the sandbox does not hold: {error}") from error
    return {layer[:32]: text[:128] for layer, text in took.items()}


def place_of(error: BaseException) -> str:
    """Return the file and line that raised an exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "?"


def leaves_of(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    """Yield the exceptions of a group and of the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves_of(error)
        else:
            yield error


if __name__ == "__main__":
    main()
