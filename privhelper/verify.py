"""Compare a sealed layer with its manifest: the walk of populate, reading where that one writes.

Rule 1: everything the manifest says about an entry is compared: kind, mode, owner, times, attributes, content.
Rule 2: nothing is mended. The first difference ends the walk.

Each operation is compared with how things stand in the end. A directory that was entered only to be emptied and removed
is not there any more: that is right if, and only if, the manifest goes on to remove it.

Limit: a manifest that makes something and removes it again is applied as it says and never verifies; the checker makes
none.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from typing import Any, Final

from privhelper import protocol
from privhelper.files import closing
from privhelper.manifest import Operation, RejectedError
from privhelper.populate import DIRECTORY, Tell, Walk

_CHUNK_BYTES: Final = 1 << 17
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS: Final = {
    "file": stat.S_IFREG, "dir": stat.S_IFDIR, "meta": stat.S_IFDIR, "fifo": stat.S_IFIFO, "symlink": stat.S_IFLNK,
}  # fmt: skip


class Reader(Walk):
    """Finds each operation true, or raises RejectedError("verify_differs")."""

    def __init__(self, root: int, settings: Mapping[str, Any], tell: Tell) -> None:
        super().__init__(root, settings["limits"], tell)
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._gone: set[int] = set()  # numbers of operations that entered what is not there
        self._to_be_removed: set[tuple[int, bytes]] = set()
        self.handlers = {
            "enter": self._enter, "remove": self._remove, "dir": self._dir, "meta": self._dir, "file": self._file,
            "symlink": self._symlink, "link": self._link, "fifo": self._fifo,
        }  # fmt: skip

    def into(self, operation: Operation) -> int:
        """Leave directories until the one that the operation names; in one that is gone, things can only go."""
        parent = super().into(operation)
        _must(not self._is_gone() or operation.kind in ("enter", "remove"), "lies in a directory that is not there")
        return parent

    def finish(self) -> None:
        """Step out of everything; whatever was to be removed must have been."""
        super().finish()
        _must(not self._to_be_removed, "enters a directory that is not there and that it does not remove")

    def _is_gone(self) -> bool:
        return self.levels[-1].number in self._gone

    def _enter(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        if not self._is_gone() and _is_directory(parent, operation.name):
            self.enter(operation, entry)
            return
        self._to_be_removed.add((operation.into, operation.name))
        self._gone.add(entry)
        self.step_into(
            os.open(".", DIRECTORY, dir_fd=parent), operation, entry
        )  # only stands there; nothing opens by it

    def _remove(self, operation: Operation, entry: int) -> None:
        """Compare nothing: what was removed may have been made anew by a later operation, which is compared itself."""
        self.into(operation)
        self._to_be_removed.discard((operation.into, operation.name))

    def _dir(self, operation: Operation, entry: int) -> None:
        directory = self.enter(operation, entry) if operation.name else self.root
        _compare(operation, os.fstat(directory))
        _compare_xattrs(operation, directory)

    def _file(self, operation: Operation, entry: int) -> None:
        with closing(os.open(operation.name, _FILE, dir_fd=self.into(operation))) as file:
            status, digest = os.fstat(file), hashlib.sha256()
            _compare(operation, status)
            _must(status.st_size == operation.size, f"has {status.st_size} bytes, not {operation.size}")
            while count := os.readv(file, [self._buffer]):
                digest.update(self._buffer[:count])
                self.progress.add(count)
            _must(digest.hexdigest() == operation.sha256, f"is sha256 {digest.hexdigest()}, not {operation.sha256}")
            _compare_xattrs(operation, file)

    def _symlink(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        _compare(operation, os.stat(operation.name, dir_fd=parent, follow_symlinks=False))
        _must(os.readlink(operation.name, dir_fd=parent) == operation.target, "has another target")

    def _link(self, operation: Operation, entry: int) -> None:
        mine = os.stat(operation.name, dir_fd=self.into(operation), follow_symlinks=False)
        with self.holder_of(operation.to) as holder:
            theirs = os.stat(operation.to[-1], dir_fd=holder, follow_symlinks=False)
        _must(mine.st_ino == theirs.st_ino, "is no hard link of its target")

    def _fifo(self, operation: Operation, entry: int) -> None:
        _compare(operation, os.stat(operation.name, dir_fd=self.into(operation), follow_symlinks=False))


def _is_directory(parent: int, name: bytes) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _must(holds: bool, difference: str) -> None:
    if not holds:
        raise RejectedError("verify_differs", 0, difference)


def _compare(operation: Operation, status: os.stat_result) -> None:
    _must(stat.S_IFMT(status.st_mode) == _KINDS[operation.kind], f"is no {operation.kind}")
    mode = stat.S_IMODE(status.st_mode)
    _must(mode == operation.mode or operation.kind == "symlink", f"has mode {mode:o}")  # symlink(7): it has none
    _must((status.st_uid, status.st_gid) == (operation.uid, operation.gid), "has another owner")
    _must(status.st_mtime_ns == operation.mtime_ns, "has another time")


def _compare_xattrs(operation: Operation, descriptor: int) -> None:
    found = {
        os.fsencode(name): os.getxattr(descriptor, name)
        for name in os.listxattr(descriptor)
        if name == protocol.XATTR_CAPABILITY or name.startswith(protocol.XATTR_PREFIX)
    }
    _must(found == dict(operation.xattrs), "has other extended attributes")
