"""gzip (RFC 1952): one or more members, inflated by zlib, without its own lenient reader of headers and trailers.

Rule 1: a header is read by our own code and is no longer than the policy allows.
Rule 2: CRC-32 and length of every member are compared; bytes behind the last one are refused.
"""

import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

from unpriv.blob import Blob, Input
from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, rule

COMPRESSION_WRONG: Final = rule("compression_wrong")
COMPRESSION_CORRUPT: Final = rule("compression_corrupt")
COMPRESSION_CHECKSUM: Final = rule("compression_checksum")
COMPRESSION_TRUNCATED: Final = rule("compression_truncated")
COMPRESSION_TRAILING_DATA: Final = rule("compression_trailing_data")
COMPRESSION_HEADER: Final = rule("compression_header")
COMPRESSION_MEMBERS_TOO_MANY: Final = rule("compression_members_too_many")


class GzipSource:
    """One or more gzip members (RFC 1952), inflated by zlib without its own lenient header reader."""

    def __init__(self, blob: Blob, limits: Limits, tick: Callable[[], None]):
        """Read the blob from its beginning."""
        self.done_bytes = 0
        self._limits = limits.stream
        self._tick = tick
        self._input = Input(blob)
        self._members = 0
        self._crc = 0
        self._length = 0
        self._inflater: Any = None  # zlib's type has no public name
        self._begin_member()

    def readinto(self, view: memoryview) -> int:
        """Fill the view."""
        done = 0
        while done < len(view) and self._inflater is not None:
            piece = self._inflate(len(view) - done)
            view[done : done + len(piece)] = piece
            done += len(piece)
        self.done_bytes = self._input.offset
        return done

    def _inflate(self, room: int) -> bytes:
        if not self._input.held and not self._input.more():
            raise RejectedError(COMPRESSION_TRUNCATED, "the blob ends inside a gzip member")
        try:
            piece: bytes = self._inflater.decompress(self._input.held, room)
        except zlib.error as error:
            raise RejectedError(COMPRESSION_CORRUPT, f"gzip: {error}") from None
        self._crc = zlib.crc32(piece, self._crc)
        self._length += len(piece)
        self._input.held = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
        if self._inflater.eof:
            self._end_member()
        return piece

    def _begin_member(self) -> None:
        """Read a member's header (RFC 1952, 2.3), at most the bytes that the policy allows."""
        self._members += 1
        self._tick()
        if self._members > self._limits.compressed_members:
            raise RejectedError(COMPRESSION_MEMBERS_TOO_MANY, f"more than {self._limits.compressed_members} members")
        while len(self._input.held) < 2 and self._input.more():
            pass
        if not self._input.held.startswith(b"\x1f\x8b"):
            which = COMPRESSION_WRONG if self._members == 1 else COMPRESSION_TRAILING_DATA
            raise RejectedError(which, f"expected a gzip member, found {self._input.held[:4]!r}")
        fixed = self._input.take(10)
        method, flags = fixed[2], fixed[3]
        if method != 8 or flags & 0xE0:
            raise RejectedError(COMPRESSION_HEADER, f"gzip method {method}, flags {flags:#x}")
        header = fixed
        if flags & 4:  # FEXTRA
            size = self._input.take(2)
            header += size + self._input.take(struct.unpack("<H", size)[0])
        for flag in (8, 16):  # FNAME, FCOMMENT
            header += self._zero_terminated(len(header)) if flags & flag else b""
        if flags & 2 and struct.unpack("<H", self._input.take(2))[0] != zlib.crc32(header) & 0xFFFF:  # FHCRC
            raise RejectedError(COMPRESSION_HEADER, "the checksum of a gzip header is wrong")
        self._crc, self._length = 0, 0
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS)

    def _zero_terminated(self, before: int) -> bytes:
        limit = self._limits.compressed_header_bytes - before
        while (end := self._input.held.find(b"\0", 0, limit)) < 0:
            if len(self._input.held) >= limit:
                raise RejectedError(COMPRESSION_HEADER, f"a gzip header of more than {limit + before} bytes")
            if not self._input.more():
                raise RejectedError(COMPRESSION_TRUNCATED, "the blob ends inside a gzip header")
        return self._input.take(end + 1)

    def _end_member(self) -> None:
        crc, length = struct.unpack("<II", self._input.take(8))
        if crc != self._crc or length != self._length & 0xFFFFFFFF:
            raise RejectedError(COMPRESSION_CHECKSUM, f"gzip: expected CRC {crc:08x}, found {self._crc:08x}")
        self._inflater = None
        if self._input.held or self._input.more():
            self._begin_member()
