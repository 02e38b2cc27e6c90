"""Layers of extreme shapes, for memory and speed: many small files, and a few large ones.

Rule 1: the bytes depend on the arguments only, so a digest of one can be written down.
Rule 2: contents neither repeat nor compress, so that nothing on the way can be clever with them.
"""

from __future__ import annotations

import random
import tarfile
from pathlib import Path
from typing import BinaryIO, Final

MTIME_S: Final = 1_700_000_000
FILES_A_FOLDER: Final = 500
LARGEST_SMALL_BYTES: Final = 2048
CHUNK_BYTES: Final = 1 << 20


def write_small_files(tarball: Path, files: int = 200_000, seed: int = 1) -> None:
    """Write a layer of ``files`` files of 0 to LARGEST_SMALL_BYTES bytes, 358 MB; their parents are not declared."""
    source = random.Random(seed)
    with tarball.open("wb", buffering=CHUNK_BYTES) as out:
        for number in range(files):
            folder = f"srv/small/{number // FILES_A_FOLDER:04d}"
            if number % FILES_A_FOLDER == 0:
                out.write(_header(f"{folder}/", tarfile.DIRTYPE, 0))
            content = source.randbytes(source.randrange(LARGEST_SMALL_BYTES + 1))
            out.write(_header(f"{folder}/file-{number:06d}", tarfile.REGTYPE, len(content)))
            out.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        _end(out)


def write_large_files(tarball: Path, total_bytes: int = 1 << 30, files: int = 4, seed: int = 2) -> None:
    """Write a layer of ``files`` files of equal size, ``total_bytes`` together."""
    source = random.Random(seed)
    with tarball.open("wb") as out:
        for number in range(files):
            left_bytes = total_bytes // files
            out.write(_header(f"srv/large/file-{number}", tarfile.REGTYPE, left_bytes))
            padding = bytes(-left_bytes % tarfile.BLOCKSIZE)
            while left_bytes:
                chunk = source.randbytes(min(CHUNK_BYTES, left_bytes))
                out.write(chunk)
                left_bytes -= len(chunk)
            out.write(padding)
        _end(out)


def _header(name: str, kind: bytes, size_bytes: int) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size, entry.mtime = kind, size_bytes, MTIME_S
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return entry.tobuf(tarfile.USTAR_FORMAT)


def _end(out: BinaryIO) -> None:
    out.write(bytes(2 * tarfile.BLOCKSIZE))  # tar(5): two blocks of zeros
    out.write(bytes(-out.tell() % tarfile.RECORDSIZE))
