"""Answer the broker's requests: many objects at once, many ranges of each.

Rule 1: a blob is published only if every byte came from the pinned object and, where a digest is expected, has it.
Rule 2: nothing waits for ever: each stream has a watchdog, each request an end, each object a deadline.
Rule 3: the object that was asked for first gets the streams first, so that its blob is checked while others download.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial as bind
from itertools import count
from typing import Final, TypeVar

import trio

from broker.protocol import (
    Fetch,
    Fetched,
    FetchFailed,
    FetchProgress,
    FetchReport,
    Head,
    Hello,
    List,
    Notice,
    Pin,
    Pins,
)
from unpriv import blobfile, s3
from unpriv.blobfile import BlobDir, Partial
from unpriv.failures import FetchError, ungrouped
from unpriv.lines import Reporter
from unpriv.ranges import THREADS_A_STREAM, Bucket, Retries, Tuning, Watchdog, Width
from unpriv.streams import Attempt, Slot, Slots
from unpriv.sums import Sums, at, must_be

T = TypeVar("T")
LOCK_POLL_S: Final = 0.1
FLUSH_BYTES: Final = 64 << 20
NOTICE_EVERY_S: Final = 5.0  # of one object and one kind


@dataclass(slots=True)
class Job:
    """One object on its way."""

    id: int
    order: int
    partial: Partial
    ends_at_s: float
    transferred: int = 0
    done: set[int] = field(default_factory=set)  # cells that are all there
    done_bytes: int = 0  # of these
    running: set[Attempt] = field(default_factory=set)
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

    def __init__(self, client: s3.Client, hello: Hello, blobs: BlobDir, reports: Reporter, tuning: Tuning) -> None:
        self.client = client
        self.hello = hello
        self.blobs = blobs
        self.reports = reports
        self.tuning = tuning
        self.attempts = client.attempts or tuning.attempts
        self.width = Width(hello.max_streams, min(tuning.first_width, hello.max_streams))
        self.slots = Slots(self.width.now)
        self.bucket = Bucket(hello.rate_limit)
        self.threads = trio.CapacityLimiter(hello.max_streams * THREADS_A_STREAM)  # abandoned ones hold theirs
        self.control_threads = trio.CapacityLimiter(8)
        self.hash_threads = trio.CapacityLimiter(os.cpu_count() or 1)
        self.flush_threads = trio.CapacityLimiter(1)
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
                id=request.id,
                code=error.code,
                message=error.message[:8000],
                retryable=error.retryable,
                clock_ahead_s=self.client.clock.ahead_s,
            )
        await self.reports.send(report)

    async def _answer(self, request: List | Head | Fetch) -> FetchReport:
        """Return the report that a request asks for. Raises: FetchError."""
        if isinstance(request, Fetch):
            return await self._fetch(request)
        if isinstance(request, Head):
            pin = await self._control(request.id, bind(self.client.head, request.bucket, request.key))
            return Pins(id=request.id, pins=[pin], clock_ahead_s=self.client.clock.ahead_s)
        pins = await self._control(request.id, bind(self.client.list, request.bucket, request.prefix))
        pins = await self._with_versions(request.id, pins)
        return Pins(id=request.id, pins=pins, clock_ahead_s=self.client.clock.ahead_s)

    async def _with_versions(self, request_id: int, pins: list[Pin]) -> list[Pin]:
        """Return the pins of a listing with their versions, which a listing does not tell. Raises: FetchError.

        The first object tells whether its bucket keeps versions at all.
        """
        if not pins:
            return pins
        found = dict(enumerate(pins))

        async def head(number: int) -> None:
            ask = bind(self.client.head, pins[number].bucket, pins[number].key)
            found[number] = await self._control(request_id, ask)

        await head(0)
        if found[0].version:
            async with trio.open_nursery() as nursery:
                for number in range(1, len(pins)):
                    nursery.start_soon(head, number)
        return list(found.values())

    async def _control(self, request_id: int, ask: Callable[[], T]) -> T:
        """Ask S3 something small in a thread, again after a passing failure. Raises: FetchError."""
        retries = Retries(self.tuning, self.attempts)
        last: FetchError | None = None
        with trio.move_on_after(self.tuning.control_s) as scope:
            while True:
                line = s3.Line()
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
            nursery.start_soon(self._flush, job)
            nursery.start_soon(hash_all)
            for cell in range(grid.cells):
                if cell not in job.done:
                    slot = await self.slots.acquire(job.order)
                    nursery.start_soon(self._cell, job, cell, slot)
        return digest

    async def _flush(self, job: Job) -> None:
        """Have the disk begin while bytes still arrive: the last sync, before the blob is published, is short then."""
        flushed_bytes = 0
        while True:
            await job.cell_done.park()
            if job.done_bytes - flushed_bytes >= FLUSH_BYTES:
                flushed_bytes = job.done_bytes
                await trio.to_thread.run_sync(job.partial.flush, limiter=self.flush_threads)

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

    async def _cell(self, job: Job, cell: int, slot: Slot) -> None:
        """Fetch one cell, however many requests it takes; give its stream back. Raises: FetchError."""
        try:
            crc = await self._ranges(job, cell, slot)
            job.partial.complete(cell, crc)
            job.finish(cell)
        finally:
            slot.release()

    async def _ranges(self, job: Job, cell: int, slot: Slot) -> int:
        """Fetch one cell; return its CRC-32C. A request that broke off is continued where it ended."""
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

    async def _attempt(self, job: Job, attempt: Attempt) -> None:
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

    async def _watch(self, attempt: Attempt, scope: trio.CancelScope) -> None:
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

    async def _pause(self, job: Job, error: FetchError, pause_s: float, slot: Slot) -> None:
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
