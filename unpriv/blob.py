"""The bytes of a blob, before anything is known of them.

Rule 1: a blob is read by offset; its descriptor's position is nobody's business.
"""

import os
from typing import Final, Protocol

from unpriv.rulebook import RejectedError, rule

COMPRESSION_TRUNCATED: Final = rule("compression_truncated")

_PIECE_BYTES: Final = 16 << 10  # read at once; a member's end costs a copy of what is held


class Blob(Protocol):
    """Random access to the bytes of a blob."""

    size: int

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes at ``offset``; fewer only at the end."""

    def readinto_at(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset``; return how much, less only at the end."""


class FileBlob:
    """A blob that is an open regular file."""

    def __init__(self, descriptor: int, size: int):
        """Read from ``descriptor``, whose file has ``size`` bytes."""
        self.size = size
        self._descriptor = descriptor

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes at ``offset``."""
        return os.pread(self._descriptor, length, offset)

    def readinto_at(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset``."""
        done = 0
        while done < len(view) and (count := os.preadv(self._descriptor, [view[done:]], offset + done)):
            done += count
        return done


class MemoryBlob:
    """A blob that is a byte string: for the warm-up and for tests."""

    def __init__(self, data: bytes):
        """Read from ``data``."""
        self.size = len(data)
        self._data = data

    def read_at(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes at ``offset``."""
        return self._data[offset : offset + length]

    def readinto_at(self, offset: int, view: memoryview) -> int:
        """Fill ``view`` from ``offset``."""
        piece = self._data[offset : offset + len(view)]
        view[: len(piece)] = piece
        return len(piece)


class Input:
    """A blob read in order, with some bytes in hand."""

    def __init__(self, blob: Blob):
        """Begin at the first byte."""
        self._blob = blob
        self._offset = 0
        self.held = b""

    def more(self) -> bool:
        """Hold another piece; False at the end."""
        piece = self._blob.read_at(self._offset, _PIECE_BYTES)
        self._offset += len(piece)
        self.held += piece
        return bool(piece)

    def take(self, count: int) -> bytes:
        """Take exactly ``count`` bytes. Raises RejectedError at the end of the blob."""
        while len(self.held) < count:
            if not self.more():
                raise RejectedError(COMPRESSION_TRUNCATED, "the blob ends inside a compressed member")
        taken, self.held = self.held[:count], self.held[count:]
        return taken

    @property
    def offset(self) -> int:
        """How much of the blob has been taken."""
        return self._offset - len(self.held)
