"""Read a log of a disk's writes and flushes, and make the disk as a power cut could have left it.

Rule 1: what was written before the last completed flush is there; of what came after, any part may be, in any order.
Rule 2: a sector of 512 bytes is whole or not written; a longer write may be torn between sectors.
Rule 3: a discard after the last flush may have happened or not; before it, it did.

QEMU's ``blklogwrites`` driver writes the format of Linux's dm-log-writes (Documentation/admin-guide/device-mapper/
log-writes.rst): a superblock, then for each request one sector that describes it and its data. Its count of entries is
stale when QEMU is killed, so entries are followed until one does not fit. Standard library only: it runs in guests too.
"""

import os
import random
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

MAGIC: Final = 0x6A736677736872  # WRITE_LOG_MAGIC
FLUSH, FUA, DISCARD = 1, 2, 4
SECTOR_BYTES: Final = 512
_SUPER: Final = struct.Struct("<QQQI")
_ENTRY: Final = struct.Struct("<QQQQ")


class LogError(Exception):
    """The file is no write log."""


class Entry(NamedTuple):
    """One request: ``sectors`` of data for ``sector`` lie at ``at`` in the log."""

    sector: int
    sectors: int
    flags: int
    at: int


class BlockLog:
    """A log, opened for reading."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.entries = list(self._walk(os.lseek(self._file, 0, os.SEEK_END)))

    def _walk(self, end: int) -> Iterable[Entry]:
        magic, version, _, sector_bytes = _SUPER.unpack(os.pread(self._file, _SUPER.size, 0))
        if (magic, version, sector_bytes) != (MAGIC, 1, SECTOR_BYTES):
            raise LogError(f"expected a log of version 1 with sectors of {SECTOR_BYTES} bytes, found {magic:#x}")
        at = SECTOR_BYTES
        while at + SECTOR_BYTES <= end:
            sector, sectors, flags, _ = _ENTRY.unpack(os.pread(self._file, _ENTRY.size, at))
            after = at + SECTOR_BYTES + (0 if flags & DISCARD else sectors * SECTOR_BYTES)
            if after > end or flags > 15 or (sector, sectors, flags) == (0, 0, 0):
                return
            yield Entry(sector, sectors, flags, at + SECTOR_BYTES)
            at = after

    def barriers(self) -> list[int]:
        """Return the positions just after each flush or forced write: between two of them little can differ."""
        return [index + 1 for index, entry in enumerate(self.entries) if entry.flags & (FLUSH | FUA)]

    def settled(self, position: int) -> int:
        """Return how many of the first ``position`` entries are certainly on disk: all up to the last flush."""
        flushes = (index for index in range(position - 1, -1, -1) if self.entries[index].flags & FLUSH)
        return next(flushes, -1) + 1

    def apply_lying(self, disk: int, position: int, seed: int) -> None:
        """Write what a disk that ignores flushes may leave: a random half of the last 60 entries, all before them."""
        choice = random.Random(seed)
        begin = max(0, position - 60)
        self.apply(disk, self.entries[:begin])
        self.apply(disk, [entry for entry in self.entries[begin:position] if choice.random() < 0.5])

    def apply(self, disk: int, entries: Iterable[Entry]) -> None:
        """Write entries to a disk, whole."""
        for entry in entries:
            self._write(disk, entry, entry.sectors)

    def apply_tail(self, disk: int, position: int, seed: int) -> None:
        """Write what a cut at ``position`` may leave of the entries after the last flush.

        Seed 0 leaves nothing, seed 1 everything; any other leaves a random half, one of them torn, all forced writes.
        """
        choice = random.Random(seed)
        tail = self.entries[self.settled(position) : position]
        for entry in tail:
            if seed == 1 or entry.flags & FUA:
                self._write(disk, entry, entry.sectors)
            elif seed > 1 and choice.random() < 0.5:
                self._write(disk, entry, choice.randint(1, entry.sectors) if entry.sectors else 0)

    def _write(self, disk: int, entry: Entry, sectors: int) -> None:
        length, offset = sectors * SECTOR_BYTES, entry.sector * SECTOR_BYTES
        if entry.flags & DISCARD:
            # Unmapped blocks of QEMU's raw files read as zeros.
            for start in range(offset, offset + length, 1 << 20):
                os.pwrite(disk, bytes(min(1 << 20, offset + length - start)), start)
        elif length:
            os.pwrite(disk, os.pread(self._file, length, entry.at), offset)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
