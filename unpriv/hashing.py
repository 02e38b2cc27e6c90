"""The SHA-256 of every file's content, in a thread of its own, and the buffers that both threads share.

Rule 1: a buffer is filled again only when all its pieces have been hashed; and the reading thread may look at the last
two that it filled, for there are more buffers than that and they come back in order.
Rule 2: the thread is started before the sandbox closes, for none can be started after.

hashlib gives up the interpreter's lock for pieces above 2 KiB, so both threads work at once. Files below SMALL_BYTES
are hashed by the reading thread itself, for handing over would cost more.
"""

import hashlib
import threading
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from typing import Any, Final

from unpriv.reader import Job

CHUNK_BYTES: Final = 256 << 10  # larger ones fall out of the processor's cache before they are hashed
_BUFFERS: Final = 6
SMALL_BYTES: Final = 64 << 10
_STACK_BYTES: Final = 256 << 10

Keep = Callable[[int, bytes], None]


class _Order(Enum):
    """What the thread is told between buffers."""

    TELL = 1  # that all so far is hashed
    STOP = 2


class Hasher:
    """A pool of buffers and a thread that hashes what lies in them."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Make the buffers, each of whole blocks; the thread comes with start()."""
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._work: SimpleQueue[tuple[memoryview, list[Job]] | _Order] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self._keep: Keep = lambda record, digest: None
        self._open: Any = None  # the hash of a file that goes on in the next buffer
        self._thread: threading.Thread | None = None
        for _ in range(_BUFFERS):
            self._free.put(memoryview(bytearray(chunk_bytes)))

    def start(self) -> None:
        """Start the thread."""
        threading.stack_size(_STACK_BYTES)
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread again."""
        assert self._thread is not None
        self._work.put(_Order.STOP)
        self._thread.join()

    def begin(self, keep: Keep) -> None:
        """Begin an archive: digests go to ``keep`` with the number of their record."""
        self._keep = keep
        self._open = None

    def buffer(self) -> memoryview:
        """Return a buffer that may be filled; wait for one if all are being hashed."""
        return self._free.get()

    def submit(self, buffer: memoryview, jobs: list[Job]) -> None:
        """Hash the pieces of a buffer and then let it be filled again."""
        sha256, keep, large = hashlib.sha256, self._keep, []
        for job in jobs:
            record, begin, end, first, last = job
            if first and last and end - begin < SMALL_BYTES:
                keep(record, sha256(buffer[begin:end]).digest())
            else:
                large.append(job)
        self._work.put((buffer, large))

    def finish(self) -> None:
        """Wait until everything is hashed. Raises what the thread met."""
        self._work.put(_Order.TELL)
        error = self._done.get()
        if error is not None:
            raise error

    def _run(self) -> None:
        error: BaseException | None = None
        while True:
            item = self._work.get()
            if item is _Order.STOP:
                return
            if item is _Order.TELL:
                self._done.put(error)
                error = None
                continue
            buffer, jobs = item
            try:
                self._hash(buffer, jobs)
            except BaseException as caught:  # handed to the reading thread; this one must go on giving back buffers
                error = caught
            self._free.put(buffer)

    def _hash(self, buffer: memoryview, jobs: list[Job]) -> None:
        for record, begin, end, first, last in jobs:
            if first:
                self._open = hashlib.sha256()
            self._open.update(buffer[begin:end])
            if last:
                self._keep(record, self._open.digest())
