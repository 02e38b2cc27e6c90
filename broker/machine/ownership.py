"""Which process works at a run: a lock that dies with it.

Rule 1: the owner of run N holds the byte N of a file beside the state file, as an open file description lock
    (fcntl(2), F_OFD_SETLK): the kernel frees it when the process ends, however it ends. No row, no pid, no lease, no
    clock says who owns a run.
Rule 2: the file is never deleted and never read; two processes that opened two files would both own everything.
"""

import errno
import fcntl
import os
import struct
from types import TracebackType
from typing import Final, Self

from broker.machine.signals import StateError

_FLOCK: Final = "hhqqi4x"  # struct flock of Linux on 64-bit machines: type, whence, start, length, pid (0 for OFD)


class Ownership:
    """The runs that this process owns. One instance for each engine; two in one process exclude each other too."""

    def __init__(self, path: str) -> None:
        """Open or make the lock file."""
        self._path = path
        self._held: set[int] = set()
        try:
            # Close-on-exec: a child program must not keep our locks alive.
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StateError(f"{path} cannot be opened: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give up every run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._held.clear()

    def holds(self, seq: int) -> bool:
        """Say whether this engine owns the run."""
        return seq in self._held

    def is_held_elsewhere(self, seq: int) -> bool:
        """Say whether another engine owns the run: what this one holds is no conflict to the kernel."""
        return _is_locked(self._fd, seq)

    def take(self, seq: int) -> bool:
        """Try to become the owner; False if anybody is, this engine included."""
        if seq in self._held or not self._lock(fcntl.F_WRLCK, seq):
            return False
        self._held.add(seq)
        return True

    def take_all(self) -> bool:
        """Try to become the owner of every run there is and will be; False if any process works at one."""
        return self._lock(fcntl.F_WRLCK, 0, 0)

    def give(self, seq: int) -> None:
        """Stop being the owner."""
        if seq in self._held:
            self._held.discard(seq)
            self._lock(fcntl.F_UNLCK, seq)

    def _lock(self, kind: int, start: int, length: int = 1) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise StateError(f"{self._path} cannot be locked: {error.strerror}") from error
        return True


def is_owned(path: str, seq: int) -> bool:
    """Say whether any process works at a run; nothing is taken and nothing written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StateError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        return _is_locked(descriptor, seq)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, seq: int) -> bool:
    """Say whether another open file description holds the lock of a run. Source: fcntl(2), F_OFD_GETLK."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, seq, 1, 0)
    return bool(struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))[0] != fcntl.F_UNLCK)
