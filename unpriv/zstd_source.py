"""Zstandard (RFC 8878): one or more frames, also skippable ones, decoded by libzstd.

Rule 1: our own code walks the structure of all frames to the last byte before the decoder sees the first: windows,
dictionaries, block lengths, and that the blob ends where a frame ends. libzstd's stream reader would not notice a cut.
Rule 2: a table of contents in a skippable frame (zstd:chunked) is never read; the frames are the truth.
"""

import struct
from collections.abc import Callable
from typing import Final

import zstandard

from unpriv.blob import Blob
from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, rule

COMPRESSION_WRONG: Final = rule("compression_wrong")
COMPRESSION_CORRUPT: Final = rule("compression_corrupt")
COMPRESSION_CHECKSUM: Final = rule("compression_checksum")
COMPRESSION_TRUNCATED: Final = rule("compression_truncated")
COMPRESSION_TRAILING_DATA: Final = rule("compression_trailing_data")
COMPRESSION_HEADER: Final = rule("compression_header")
COMPRESSION_WINDOW: Final = rule("compression_window")
COMPRESSION_MEMBERS_TOO_MANY: Final = rule("compression_members_too_many")

_PIECE_BYTES: Final = 128 << 10


class ZstdSource:
    """One or more Zstandard frames (RFC 8878), whose structure our own code has walked to the end before decoding."""

    def __init__(self, blob: Blob, limits: Limits, tick: Callable[[], None]):
        """Walk all frames of the blob, then read it from its beginning."""
        self.done_bytes = 0
        self._blob = blob
        _ZstdWalk(blob, limits, tick).walk()
        decoder = zstandard.ZstdDecompressor(max_window_size=limits.stream.window_bytes)
        self._stream = decoder.stream_reader(self, read_size=_PIECE_BYTES, read_across_frames=True)  # type: ignore[arg-type]  # asks for read() only

    def read(self, size: int) -> bytes:
        """Return the next bytes of the blob; called by the decoder."""
        piece = self._blob.read_at(self.done_bytes, size)
        self.done_bytes += len(piece)
        return piece

    def readinto(self, view: memoryview) -> int:
        """Fill the view."""
        done = 0
        try:
            while done < len(view) and (count := self._stream.readinto(view[done:])):
                done += count
        except zstandard.ZstdError as error:
            which = COMPRESSION_CHECKSUM if "checksum" in str(error) else COMPRESSION_CORRUPT
            raise RejectedError(which, f"zstd: {error}") from None
        return done


class _ZstdWalk:
    """The structure of a blob of frames: windows, dictionaries, block lengths, and that it ends where a frame ends."""

    _FRAME: Final = 0xFD2FB528
    _SKIPPABLE: Final = 0x184D2A50  # the lowest four bits are free
    _MAX_BLOCK_BYTES: Final = 128 << 10

    def __init__(self, blob: Blob, limits: Limits, tick: Callable[[], None]):
        self._blob = blob
        self._limits = limits.stream
        self._tick = tick
        self._blocks = 0

    def walk(self) -> None:
        """Walk to the end of the blob. Raises RejectedError."""
        offset = frames = 0
        while offset < self._blob.size or frames == 0:
            frames += 1
            self._tick()
            if frames > self._limits.compressed_members:
                raise RejectedError(COMPRESSION_MEMBERS_TOO_MANY, f"more than {frames - 1} frames")
            offset = self._frame(offset, frames == 1)

    def _at(self, offset: int, count: int) -> bytes:
        found = self._blob.read_at(offset, count)
        if len(found) < count:
            raise RejectedError(COMPRESSION_TRUNCATED, "the blob ends inside a zstd frame")
        return found

    def _frame(self, offset: int, first: bool) -> int:
        """Walk one frame; return the offset behind it."""
        if self._blob.size - offset < 4 and not first:
            raise RejectedError(COMPRESSION_TRAILING_DATA, "data behind the last zstd frame")
        (magic,) = struct.unpack("<I", self._at(offset, 4))
        if magic & ~0xF == self._SKIPPABLE:
            end = offset + 8 + int(struct.unpack("<I", self._at(offset + 4, 4))[0])
            if end > self._blob.size:
                raise RejectedError(COMPRESSION_TRUNCATED, "the blob ends inside a skippable frame")
            return end
        if magic != self._FRAME:
            which = COMPRESSION_WRONG if first else COMPRESSION_TRAILING_DATA
            raise RejectedError(which, f"expected a zstd frame, found {magic:#010x}")
        offset, has_checksum = self._header(offset + 4)
        last = False
        while not last:
            offset, last = self._block(offset)
        if has_checksum:
            self._at(offset, 4)
            offset += 4
        return offset

    def _header(self, offset: int) -> tuple[int, bool]:
        """Check the header behind the magic (RFC 8878, 3.1.1.1); return where it ends and if a checksum follows."""
        descriptor = self._at(offset, 1)[0]
        single_segment = bool(descriptor & 0x20)
        size_bytes = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
        dictionary_bytes = (0, 1, 2, 4)[descriptor & 3]
        fields = self._at(offset + 1, (0 if single_segment else 1) + dictionary_bytes + size_bytes)
        if descriptor & 0x08:
            raise RejectedError(COMPRESSION_HEADER, "zstd: the reserved bit is set")
        if any(fields[len(fields) - size_bytes - dictionary_bytes : len(fields) - size_bytes]):
            raise RejectedError(COMPRESSION_HEADER, "zstd: a frame that needs a dictionary")
        if single_segment:
            window = int.from_bytes(fields[len(fields) - size_bytes :], "little") + (256 if size_bytes == 2 else 0)
        else:
            base = 1 << 10 + (fields[0] >> 3)
            window = base + (base >> 3) * (fields[0] & 7)
        if window > self._limits.window_bytes:
            raise RejectedError(COMPRESSION_WINDOW, f"a window of {window} bytes, limit {self._limits.window_bytes}")
        return offset + 1 + len(fields), bool(descriptor & 0x04)

    def _block(self, offset: int) -> tuple[int, bool]:
        """Step over one block (RFC 8878, 3.1.1.2); return the offset behind it and whether it was the last."""
        self._blocks += 1
        if self._blocks % 1024 == 0:
            self._tick()
        head = int.from_bytes(self._at(offset, 3), "little")
        kind, size = head >> 1 & 3, head >> 3
        if kind == 3 or size > self._MAX_BLOCK_BYTES:
            raise RejectedError(COMPRESSION_CORRUPT, f"zstd: a block of type {kind} with {size} bytes")
        end = offset + 3 + (1 if kind == 1 else size)
        if end > self._blob.size:
            raise RejectedError(COMPRESSION_TRUNCATED, "the blob ends inside a zstd block")
        return end, bool(head & 1)
