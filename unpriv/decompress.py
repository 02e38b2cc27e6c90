"""From a blob to the bytes of its tar: exactly the declared compression, one level, to the last byte.

Rule 1: a compression that the policy does not name is not tried, whatever the blob begins with.
Rule 2: no decoder is ever asked for more than the room that is left in the caller's buffer.
"""

from collections.abc import Callable
from typing import Any, Final, Protocol

from unpriv.blob import Blob, Input
from unpriv.gzip_source import GzipSource
from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, rule

COMPRESSION_WRONG: Final = rule("compression_wrong")
COMPRESSION_NOT_ALLOWED: Final = rule("compression_not_allowed")
COMPRESSION_CORRUPT: Final = rule("compression_corrupt")
COMPRESSION_TRUNCATED: Final = rule("compression_truncated")
COMPRESSION_TRAILING_DATA: Final = rule("compression_trailing_data")
COMPRESSION_WINDOW: Final = rule("compression_window")
COMPRESSION_MEMBERS_TOO_MANY: Final = rule("compression_members_too_many")

FILTER_OF_MEDIA: Final = {
    "tar": "none", "tar+gzip": "gzip", "tar+zstd": "zstd", "tar+bzip2": "bzip2", "tar+xz": "xz",
}  # fmt: skip


class Source(Protocol):
    """The bytes of a tar, in order."""

    done_bytes: int  # of the blob

    def readinto(self, view: memoryview) -> int:
        """Fill the view; return how much, less only at the end of the stream, 0 behind it."""


def open_source(media: str, blob: Blob, limits: Limits, tick: Callable[[], None]) -> Source:
    """Return the source for a media type. ``tick`` is called in each bounded amount of work.

    Raises:
        RejectedError: the policy does not name the compression, or the blob begins otherwise.
    """
    name = FILTER_OF_MEDIA[media]
    if name not in limits.stream.filters:
        raise RejectedError(COMPRESSION_NOT_ALLOWED, f"{name}; the policy names {', '.join(limits.stream.filters)}")
    if name == "none":
        return PlainSource(blob)
    if name == "gzip":
        return GzipSource(blob, limits, tick)
    if name == "zstd":
        from unpriv.zstd_source import ZstdSource  # only where it is needed: loading libzstd takes a tenth of the start

        return ZstdSource(blob, limits, tick)
    return LibrarySource(blob, limits, tick, name)


class PlainSource:
    """A blob that is a tar itself."""

    def __init__(self, blob: Blob):
        """Read the blob from its beginning."""
        self.done_bytes = 0
        self._blob = blob

    def readinto(self, view: memoryview) -> int:
        """Fill the view."""
        count = self._blob.readinto_at(self.done_bytes, view)
        self.done_bytes += count
        return count


class LibrarySource:
    """bzip2 and xz by Python's modules, for operators whose policy names them."""

    def __init__(self, blob: Blob, limits: Limits, tick: Callable[[], None], name: str):
        """Read the blob from its beginning."""
        self.done_bytes = 0
        self._limits = limits.stream
        self._tick = tick
        self._name = name
        self._new, self._error = _library(name, limits.stream.window_bytes)
        self._input = Input(blob)
        self._members = 0
        self._decoder: Any = None  # of bz2 or lzma
        self._begin_member()

    def readinto(self, view: memoryview) -> int:
        """Fill the view."""
        done = 0
        while done < len(view) and self._decoder is not None:
            piece = self._decode(len(view) - done)
            view[done : done + len(piece)] = piece
            done += len(piece)
        self.done_bytes = self._input.offset
        return done

    def _decode(self, room: int) -> bytes:
        if self._decoder.needs_input and not self._input.held and not self._input.more():
            raise RejectedError(COMPRESSION_TRUNCATED, f"the blob ends inside a {self._name} stream")
        held, self._input.held = self._input.held, b""
        try:
            piece: bytes = self._decoder.decompress(held, room)
        except self._error as error:
            which = COMPRESSION_WINDOW if "limit" in str(error) else COMPRESSION_CORRUPT
            raise RejectedError(which, f"{self._name}: {error}") from None
        if self._decoder.eof:
            self._input.held = self._decoder.unused_data
            self._end_member()
        return piece

    def _begin_member(self) -> None:
        self._members += 1
        self._tick()
        if self._members > self._limits.compressed_members:
            raise RejectedError(COMPRESSION_MEMBERS_TOO_MANY, f"more than {self._limits.compressed_members} streams")
        magic = b"BZh" if self._name == "bzip2" else b"\xfd7zXZ\0"
        while len(self._input.held) < len(magic) and self._input.more():
            pass
        if not self._input.held.startswith(magic):
            which = COMPRESSION_WRONG if self._members == 1 else COMPRESSION_TRAILING_DATA
            raise RejectedError(which, f"expected a {self._name} stream, found {self._input.held[:6]!r}")
        self._decoder = self._new()

    def _end_member(self) -> None:
        """Go on to the next stream; between and behind those of xz, zeros in groups of four are part of the format."""
        self._decoder = None
        zeros = 0
        while self._input.held or self._input.more():
            rest = self._input.held.lstrip(b"\0") if self._name == "xz" else self._input.held
            zeros += len(self._input.held) - len(rest)
            self._input.held = rest
            self._tick()
            if rest:
                break
        if zeros % 4:
            raise RejectedError(COMPRESSION_TRAILING_DATA, f"xz: {zeros} bytes of padding, not in groups of four")
        if self._input.held:
            self._begin_member()


def _library(name: str, window_bytes: int) -> tuple[Callable[[], Any], type[Exception]]:
    """Return how to make a decoder of the standard library and what it raises; imported only where it is allowed."""
    if name == "bzip2":
        import bz2

        return bz2.BZ2Decompressor, OSError
    import lzma

    # liblzma counts its own tables too; they are below one MiB.
    limit = window_bytes + (1 << 20)
    return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=limit), lzma.LZMAError
