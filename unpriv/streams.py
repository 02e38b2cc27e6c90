"""One range on its way: a thread that reads and writes, and the right to run it.

Rule 1: a stream that was stopped writes no further byte, even if its thread still hangs in the network.
Rule 2: streams go to the object that was asked for first, so that its blob is ready first.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count

import trio
from awscrt.checksums import crc32c

from unpriv import s3
from unpriv.blobfile import Partial
from unpriv.failures import FetchError
from unpriv.ranges import Bucket


@dataclass(slots=True, eq=False)
class Attempt:
    """One request for one range, and how far it came."""

    client: s3.Client
    partial: Partial
    bucket: Bucket
    start: int  # of the cell
    offset: int  # of the next byte
    end: int
    crc: int  # of the cell's bytes before `offset`
    received: int = 0
    error: FetchError | None = None
    answered: bool = False  # whether the headers came
    stopped: bool = False
    line: s3.Line = field(default_factory=s3.Line)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Bring the range into the partial blob; note the error if it does not work. Runs in a thread."""
        try:
            self.line.run(self._run)
        except FetchError as error:
            with self.lock:
                self.error = self.error or error

    def _run(self) -> None:
        """Bring the range. Raises: FetchError."""
        body = self.client.open(self.partial.pin, self.offset, self.end)
        try:
            self.answered = True
            while self.offset < self.end:
                self._take(self._read(body, self.end - self.offset))
            if not body.length_known and self._read(body, 1):
                raise FetchError("bad_response", f"the server sent more than asked: {self._name()}", retryable=True)
        finally:
            body.close()

    def _read(self, body: s3.Body, most: int) -> bytes:
        """Return the next bytes as they come."""
        limit = max(1024, self.bucket.rate // 8) if self.bucket.rate else s3.CHUNK_BYTES
        with s3.translated(f"read {self._name()}"):
            return body.read(min(most, limit, s3.CHUNK_BYTES))

    def _take(self, data: bytes) -> None:
        """Write the next bytes in place, then rest as the bandwidth limit says."""
        if not data:
            raise FetchError("unavailable", f"the server stopped in the middle: {self._name()}", retryable=True)
        with self._unless_stopped():
            self.partial.write(data, self.offset)
            self.crc = crc32c(data, self.crc)
            self.offset += len(data)
            self.received += len(data)
        rest_s = self.bucket.wait_s(time.monotonic(), len(data))
        if rest_s:
            time.sleep(rest_s)

    @contextmanager
    def _unless_stopped(self) -> Iterator[None]:
        """Hold the lock, if the stream was not stopped."""
        with self.lock:
            if self.stopped:
                raise FetchError("unavailable", f"the stream was stopped: {self._name()}", retryable=True)
            yield

    def _name(self) -> str:
        """Return what is fetched, for messages."""
        return f"s3://{self.partial.pin.bucket}/{self.partial.pin.key}"

    def stop(self, why: FetchError | None) -> None:
        """Let the thread write nothing more, and wake it if it waits for the network."""
        with self.lock:
            self.stopped = True
            self.error = self.error or why
        self.line.cut()


class Slots:
    """The streams that may run at once, given out in the order of the requests."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.used = 0
        self._numbers = count()
        self._waiting: list[tuple[int, int, trio.Event]] = []

    async def acquire(self, order: int) -> "Slot":
        """Wait for a stream; the lowest order is served first."""
        await self._acquire(order)
        return Slot(self, order)

    async def _acquire(self, order: int) -> None:
        granted = trio.Event()
        entry = (order, next(self._numbers), granted)
        heappush(self._waiting, entry)
        self._grant()
        try:
            await granted.wait()
        except trio.Cancelled:
            if granted.is_set():
                self.release()
            else:
                self._waiting.remove(entry)
                heapify(self._waiting)
            raise

    def release(self) -> None:
        """Give a stream back."""
        self.used -= 1
        self._grant()

    def resize(self, width: int) -> None:
        """Allow more or fewer streams; those that run are not stopped."""
        self.width = width
        self._grant()

    def _grant(self) -> None:
        """Hand out what is free."""
        while self._waiting and self.used < self.width:
            self.used += 1
            heappop(self._waiting)[2].set()


@dataclass(slots=True)
class Slot:
    """The right to run one stream."""

    _slots: Slots
    _order: int
    _held: bool = True

    def release(self) -> None:
        """Give it back; again does nothing."""
        if self._held:
            self._held = False
            self._slots.release()

    async def lend(self, pause_s: float) -> None:
        """Let others have it for a while."""
        self.release()
        await trio.sleep(pause_s)
        await self._slots._acquire(self._order)
        self._held = True
