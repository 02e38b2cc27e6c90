"""How root reads and writes its own files: whole, in bounded memory, durable before it is believed."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from privhelper.errors import AnswerError

_CHUNK_BYTES: Final = 1 << 17


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    """Close a descriptor at the end, come what may."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def digest(file: int) -> str:
    """Return the name by content of an open file."""
    whole, offset = hashlib.sha256(), 0
    while chunk := os.pread(file, _CHUNK_BYTES, offset):
        whole.update(chunk)
        offset += len(chunk)
    return "sha256:" + whole.hexdigest()


def copy_durably(file: int, path: str) -> None:
    """Copy an open file to a new name, both on disk at the return."""
    offset = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with closing(os.open(path, flags, 0o600)) as copy:
        while chunk := os.pread(file, _CHUNK_BYTES, offset):
            offset += os.write(copy, chunk)
        os.fsync(copy)
    sync_folder(os.path.dirname(path))


def claim(file: int, path: str, size_bytes: int) -> None:
    """Give an open new file all its space. Raises AnswerError("no_room") before anything is taken."""
    figures = os.fstatvfs(file)
    free = figures.f_bavail * figures.f_frsize
    if size_bytes > free:  # asked first: posix_fallocate would fill the disk before it says so
        half = max(1, free >> 31)
        text = f"{path}: {size_bytes} bytes asked for, {free} free; choose another size, such as --size {half}G"
        raise AnswerError("no_room", text)
    os.posix_fallocate(file, 0, size_bytes)


def delete(path: str) -> None:
    """Delete a file and free its bytes, also those that somebody who was given it keeps open."""
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC))
    os.unlink(path)


def sync_folder(path: str) -> None:
    """Make the names in a folder durable."""
    with closing(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
        os.fsync(folder)
