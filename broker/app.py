"""What the steps of a run work with: paths, limits, the reporter, one fetcher, and the few things done with files.

Rule 1: a file appears under its name only when it is whole and synced; until then it has no name at all (O_TMPFILE), so
        that a crash leaves nothing behind.
Rule 2: the checker and the fetcher are started when they are first needed; an image that is ready starts nothing.
"""

import fcntl
import hashlib
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

import trio

from broker import helper, protocol, store, worker
from broker.board import Board, BoardReporter
from broker.console import Reporter
from broker.errors import ImgpullError
from broker.helper import Helper
from broker.machine import Engine, Outcome
from broker.settings import POLICY_DIR, SYSTEM_DIR, Settings

CHECKERS: Final = 2  # at once; each uses one core fully
COPY_CHUNK: Final = 1 << 20
SPARE_S: Final = 1.0  # a connection that nobody takes again is closed: root serves a limited number
P = ParamSpec("P")
T = TypeVar("T")
ALL_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def endpoint_of(settings: Settings) -> protocol.Endpoint:
    """Return the S3 settings in force as the fetcher takes them."""
    return protocol.Endpoint(
        endpoint_url=settings.endpoint_url or None,
        region=settings.region or None,
        profile=settings.profile or None,
        no_sign_request=settings.no_sign_request,
        request_payer=settings.request_payer,
        quirks=settings.quirks or None,
        addressing=settings.addressing or None,
        ca_bundle=settings.ca_bundle or None,
    )


class App:
    """One program run: what is shared by all its steps."""

    def __init__(self, settings: Settings, report: Reporter, nursery: trio.Nursery) -> None:
        self.settings = settings
        self.paths = store.Paths.of(settings)
        self.board = Board(self.paths.board)
        self.report = BoardReporter(report, self.board)
        self.limits = store.limits_digest(POLICY_DIR, SYSTEM_DIR)
        self.checkers = trio.CapacityLimiter(CHECKERS)
        self.engine: Engine  # set when the state is open; the engine needs this object first
        self._nursery = nursery
        self._fetchers: dict[protocol.Endpoint, worker.Fetcher] = {}
        self._starting = trio.Lock()
        self._stop = trio.Event()
        self._spare: tuple[Helper, AsyncExitStack] | None = None

    async def read(
        self, query: Callable[Concatenate[sqlite3.Connection, P], T], *values: P.args, **names: P.kwargs
    ) -> T:
        """Ask the state database, also while another process holds its lock."""
        return await self.engine.read(lambda db: query(db, *values, **names))

    async def peek(self, run_id: str) -> Outcome | None:
        """Return how a run ended, None while it is active."""
        lookup = self.engine.lookup
        return await self.engine.read(lambda _: lookup.outcome(lookup.run(run_id)))

    async def fetcher(self, endpoint: protocol.Endpoint) -> worker.Fetcher:
        """Return the running fetcher for an endpoint, starting it the first time and after its death."""
        async with self._starting:
            if endpoint not in self._fetchers or self._fetchers[endpoint].is_dead:
                self._fetchers[endpoint] = await self._nursery.start(self._run_fetcher, endpoint)
            return self._fetchers[endpoint]

    async def _run_fetcher(
        self, endpoint: protocol.Endpoint, task_status: trio.TaskStatus[worker.Fetcher] = trio.TASK_STATUS_IGNORED
    ) -> None:
        hello = protocol.Hello(
            endpoint=endpoint,
            blob_dir=str(self.paths.blob_dir),
            max_streams=self.settings.max_streams,
            rate_limit=self.settings.rate_limit,
            min_rate=self.settings.min_rate,
            deadline_s=float(self.settings.fetch_deadline),
        )
        async with worker.fetcher(hello) as session:
            task_status.started(session)
            await self._stop.wait()

    def stop(self) -> None:
        """Let the fetchers end, and the spare connection."""
        self._stop.set()

    @asynccontextmanager
    async def helper(self) -> AsyncGenerator[Helper, None]:
        """Lend a connection to the root helper: the last one, if it came back whole just now, for each costs a process.

        What ends in an error may still be going on there; hanging up ends it.
        """
        held, self._spare = self._spare, None
        if held is not None and not held[0].is_quiet():
            await held[1].aclose()
            held = None
        if held is None:
            stack = AsyncExitStack()
            held = await stack.enter_async_context(helper.connect(self.settings.helper_socket)), stack
        try:
            yield held[0]
        except BaseException:
            await held[1].aclose()
            raise
        if self._spare is not None or self._stop.is_set():
            await held[1].aclose()
        else:
            self._spare = held
            self._nursery.start_soon(self._close_spare, held)

    async def _close_spare(self, held: tuple[Helper, AsyncExitStack]) -> None:
        try:
            with trio.move_on_after(SPARE_S):
                await self._stop.wait()
        finally:
            if self._spare is held:
                self._spare = None
                await held[1].aclose()

    async def manifest_fd(self, layer: str) -> int:
        """Return a descriptor of a manifest, owned by the caller; root's copy is asked for where ours is lost."""
        path = self.paths.manifest(layer)
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        async with self.helper() as root:
            theirs = await root.manifest(layer)
        try:
            with nameless_file(path.parent) as ours:
                digest = copy(theirs, ours, os.fstat(theirs).st_size)
                if digest != layer:
                    raise ImgpullError("io-error", f"root's manifest of {layer} has another digest", f"it is {digest}")
                publish(ours, path)
        finally:
            os.close(theirs)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


@asynccontextmanager
async def running(settings: Settings, report: Reporter) -> AsyncGenerator[App, None]:
    """Run the program's shared parts for as long as the block lasts."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        app = App(settings, report, nursery)
        app.paths.make()
        try:
            yield app
        finally:
            app.stop()
            app.board.close()


@contextmanager
def nameless_file(folder: Path) -> Generator[int, None, None]:
    """Give a new file without a name in a folder: it is gone with its last descriptor. Source: open(2), O_TMPFILE."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def publish(descriptor: int, path: Path) -> None:
    """Sync a nameless file and give it its name, durably; a file of that name is the same content and stays."""
    os.fsync(descriptor)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(FileExistsError):
            # Only with a dir_fd does Python call linkat(2), which can follow the link in /proc to the file.
            os.link(
                f"/proc/self/fd/{descriptor}", path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True
            )
        os.fsync(folder)
    finally:
        os.close(folder)


def copy(source: int, target: int, length: int) -> str:
    """Copy `length` bytes from the start of one file to the end of another. Returns: their digest, ``sha256:…``."""
    digest = hashlib.sha256()
    done = 0
    while done < length:
        chunk = os.pread(source, min(COPY_CHUNK, length - done), done)
        if not chunk:
            raise ImgpullError("io-error", f"a file ended after {done} of {length} bytes while it was copied")
        digest.update(chunk)
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
        done += len(chunk)
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def sealed_copy(source: int) -> Generator[int, None, None]:
    """Give a memory file with the same bytes that nobody can change any more. Source: memfd_create(2), fcntl(2)."""
    descriptor = os.memfd_create("imgpull-manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        copy(source, descriptor, os.fstat(source).st_size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, ALL_SEALS)
        yield descriptor
    finally:
        os.close(descriptor)
