"""Marks of devices that are there for one command only: they go with it, also after kill -9.

Rule 1: a mark is a locked file. The lock is the kernel's: it dies with the last process that holds it, that is imgpull,
        the command that it runs, and whatever that command leaves running.
Rule 2: a mark that nobody holds is what a death left: whoever opens the state next takes that device back.

Source: flock(2).
"""

import fcntl
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from broker.errors import ImgpullError


def is_marked(folder: Path, name: str) -> bool:
    """Tell whether a device is, or was, one command's own."""
    return (folder / name).exists()


@contextmanager
def held(folder: Path, name: str) -> Generator[int, None, None]:
    """Mark a device as one command's own, and hold the mark for the block. Gives: the lock, for the command to inherit.

    Raises: ImgpullError `busy`.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = _lock(folder / name, os.O_CREAT)
    if lock is None:
        raise ImgpullError("busy", f"the name {name} is in use", "another command runs in a device of that name")
    try:
        yield lock
    finally:
        os.close(lock)


def abandoned(folder: Path) -> Iterator[str]:
    """Give the names of devices whose command is dead, each with its mark held until the next is asked for."""
    with suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            with suppress(FileNotFoundError):
                lock = _lock(path)
                if lock is not None:
                    try:
                        yield path.name
                    finally:
                        os.close(lock)


def forget(folder: Path, name: str) -> None:
    """Remove the mark of a device that is given back; none is fine."""
    (folder / name).unlink(missing_ok=True)


def _lock(path: Path, more: int = 0) -> int | None:
    """Open and lock a file. Returns: its descriptor, None where another process holds it or has just removed it."""
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | more, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink == 1:
            return file
    os.close(file)
    return None
