"""How far a layer is, told to the other processes of the same user: a file of records that all of them write and read.

Rule 1: what stands there is shown and never decided from; it may be old, missing or nonsense. So it is never synced and
    no error of it stops the work: a record costs one write into the page cache, where a row in the state database would
    cost a commit with its syncs. The kernel brings the few pages to the disk when it likes.
Rule 2: a record has its place by its layer's key. Two layers at work that share a place overwrite each other's record;
    a reader takes only a whole record of its own layer, and without one it shows the step alone.
Rule 3: whoever is at work writes at most five times a second and layer, however fast the bytes come.
"""

import os
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

from broker.console import STAGES, Reporter

RECORD: Final = struct.Struct("<32sIQQ")  # key, stage, bytes done, bytes in all; the CRC-32 of these follows
SUM: Final = struct.Struct("<I")
SIZE: Final = 64
PLACES: Final = 4096  # in a file with holes: 256 KiB long, a page on the disk for each layer at work
INTERVAL_S: Final = 0.2


class Board:
    """The records beside one state database. The file is opened when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._written: dict[str, tuple[str, float]] = {}  # by key: the stage, and when

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def note(self, key: str, stage: str, done: int, total: int) -> None:
        """Tell where a layer is, unless the same was told just now. The key is a SHA-256 in hex."""
        now_s = time.monotonic()
        before, at_s = self._written.get(key, ("", 0.0))
        if stage == before and now_s - at_s < INTERVAL_S:
            return
        self._written[key] = (stage, now_s)
        body = RECORD.pack(bytes.fromhex(key), STAGES.index(stage), done, total)
        with suppress(OSError):  # Rule 1
            os.pwrite(self._file(), body + SUM.pack(zlib.crc32(body)), _place(key))

    def read(self, key: str) -> tuple[str, int, int] | None:
        """Return stage, bytes done and bytes in all of a layer, None where nobody told."""
        with suppress(OSError):
            found = os.pread(self._file(), RECORD.size + SUM.size, _place(key))
            if len(found) < RECORD.size + SUM.size or SUM.unpack_from(found, RECORD.size)[0] != zlib.crc32(
                found[: RECORD.size]
            ):
                return None
            name, stage, done, total = RECORD.unpack_from(found)
            if name.hex() == key and stage < len(STAGES):
                return STAGES[stage], done, total
        return None

    def _file(self) -> int:
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        return self._fd


def _place(key: str) -> int:
    return int(key[:8], 16) % PLACES * SIZE


class BoardReporter(Reporter):
    """Another reporter, which is told everything; what this process works at is told on the board as well."""

    def __init__(self, inner: Reporter, board: Board) -> None:
        super().__init__()
        self._inner, self._board = inner, board

    def begin(self, title: str, layers: list[tuple[str, str, int]]) -> None:
        """Hand on."""
        self._inner.begin(title, layers)

    def stage(self, key: str, stage: str, done: int = 0, total: int = 0) -> None:
        """Hand on, and tell the others."""
        self._board.note(key, stage, done, total)
        self._inner.stage(key, stage, done, total)

    def notice(self, message: str, **data: object) -> None:
        """Hand on."""
        self._inner.notice(message, **data)

    def close(self) -> None:
        """Hand on."""
        self._inner.close()
