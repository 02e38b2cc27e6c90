"""Compare a sealed layer with its manifest: the walk of populate, reading where that one writes.

Rule 1: everything the manifest says about an entry is compared: kind, mode, owner, times, attributes, content.
Rule 2: nothing is mended. The first difference ends the walk.

Limit: each operation is compared with how things stand in the end. A manifest that undoes an operation of its own is
applied as it says and never verifies; the checker makes none.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from typing import Any, Final

from privhelper import protocol
from privhelper.manifest import Operation, RejectedError
from privhelper.populate import Tell, Walk

_CHUNK_BYTES: Final = 1 << 17
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS: Final = {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "meta": stat.S_IFDIR, "fifo": stat.S_IFIFO}


class Reader(Walk):
    """Finds each operation true, or raises RejectedError("verify_differs")."""

    def __init__(self, root: int, settings: Mapping[str, Any], tell: Tell) -> None:
        super().__init__(root, settings["limits"], tell)
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self.handlers = {
            "enter": self._enter, "remove": self._pass, "dir": self._dir, "meta": self._dir, "file": self._file,
            "symlink": self._symlink, "link": self._link, "fifo": self._fifo,
        }  # fmt: skip

    def _pass(self, operation: Operation, entry: int) -> None:
        """Do nothing: what was removed may have been made anew by a later operation, which is compared itself."""
        self.into(operation)

    def _enter(self, operation: Operation, entry: int) -> None:
        self.enter(self.into(operation), operation, entry)

    def _dir(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        directory = self.enter(parent, operation, entry) if operation.name else self.root
        _compare(operation, os.fstat(directory))
        _compare_xattrs(operation, directory)

    def _file(self, operation: Operation, entry: int) -> None:
        file = os.open(operation.name, _FILE, dir_fd=self.into(operation))
        try:
            status = os.fstat(file)
            _compare(operation, status)
            _must(status.st_size == operation.size, f"has {status.st_size} bytes, not {operation.size}")
            digest = hashlib.sha256()
            while count := os.readv(file, [self._buffer]):
                digest.update(self._buffer[:count])
                self.progress.add(count)
            _must(digest.hexdigest() == operation.sha256, f"is sha256 {digest.hexdigest()}, not {operation.sha256}")
            _compare_xattrs(operation, file)
        finally:
            os.close(file)

    def _symlink(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        status = os.stat(operation.name, dir_fd=parent, follow_symlinks=False)
        _must(stat.S_ISLNK(status.st_mode), "is no symbolic link")
        _must((status.st_uid, status.st_gid) == (operation.uid, operation.gid), "has another owner")
        _must(status.st_mtime_ns == operation.mtime_ns, "has another time")
        _must(os.readlink(operation.name, dir_fd=parent) == operation.target, "has another target")

    def _link(self, operation: Operation, entry: int) -> None:
        mine = os.stat(operation.name, dir_fd=self.into(operation), follow_symlinks=False)
        *folders, name = operation.to
        holder = self.descend(folders)
        theirs = os.stat(name, dir_fd=holder, follow_symlinks=False)
        if holder != self.root:
            os.close(holder)
        _must(mine.st_ino == theirs.st_ino, "is no hard link of its target")

    def _fifo(self, operation: Operation, entry: int) -> None:
        _compare(operation, os.stat(operation.name, dir_fd=self.into(operation), follow_symlinks=False))


def _must(holds: bool, difference: str) -> None:
    if not holds:
        raise RejectedError("verify_differs", 0, difference)


def _compare(operation: Operation, status: os.stat_result) -> None:
    _must(stat.S_IFMT(status.st_mode) == _KINDS[operation.kind], f"is no {operation.kind}")
    _must(stat.S_IMODE(status.st_mode) == operation.mode, f"has mode {stat.S_IMODE(status.st_mode):o}")
    _must((status.st_uid, status.st_gid) == (operation.uid, operation.gid), "has another owner")
    _must(status.st_mtime_ns == operation.mtime_ns, "has another time")


def _compare_xattrs(operation: Operation, descriptor: int) -> None:
    found = {
        os.fsencode(name): os.getxattr(descriptor, name)
        for name in os.listxattr(descriptor)
        if name == protocol.XATTR_CAPABILITY or name.startswith(protocol.XATTR_PREFIX)
    }
    _must(found == dict(operation.xattrs), "has other extended attributes")
