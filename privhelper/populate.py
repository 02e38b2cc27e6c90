"""Write one layer, operation by operation, into a file system that holds the layer below and nothing else.

Rule 1: no path is ever resolved. The walk keeps one open directory a level; every name is one component, opened below
its parent and never through a link.
Rule 2: every creation is exclusive; what is there already, or is not there, or is something else refuses the layer.
Rule 3: data, owner, extended attributes, mode, times: in this order, since a write and a chown clear setuid bits and
file capabilities (chown(2), capabilities(7)).
Rule 4: the bytes that are written are the bytes that are hashed: one buffer, whoever changes the payload meanwhile.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from privhelper import manifest, protocol
from privhelper.files import closing
from privhelper.manifest import Operation, RejectedError

_CHUNK_BYTES: Final = 1 << 17  # larger ones are slower: they fall out of the cache between hash and write
_TELL_EVERY_BYTES: Final = 1 << 24
_TELL_EVERY_ENTRIES: Final = 2_000
DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# What the tree below can answer to an operation that does not fit it. Everything else is this host's fault.
_SURPRISES: Final = (
    errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENOTEMPTY, errno.EMLINK, errno.EINVAL,
    errno.ENAMETOOLONG, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EOVERFLOW, errno.EBUSY,
)  # fmt: skip


Tell = Callable[[int, int], None]


class Progress:
    """Counts entries and bytes and tells now and then; no clock is asked, so none has to be allowed."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._entries = self._bytes = self._untold = 0

    def add(self, content_bytes: int, entries: int = 0) -> None:
        """Count work done."""
        self._entries += entries
        self._bytes += content_bytes
        self._untold += content_bytes + entries * (_TELL_EVERY_BYTES // _TELL_EVERY_ENTRIES)
        if self._untold >= _TELL_EVERY_BYTES:
            self._untold = 0
            self._tell(self._entries, self._bytes)


class Level:
    """A directory on the way from the root to where the walk stands."""

    __slots__ = ("descriptor", "gives_group", "number", "path_bytes", "times")

    def __init__(self, descriptor: int, number: int, path_bytes: int) -> None:
        self.descriptor, self.number, self.path_bytes = descriptor, number, path_bytes
        status = os.fstat(descriptor)
        self.times = (status.st_atime_ns, status.st_mtime_ns)  # access and modification, set when it is left
        self.gives_group = bool(status.st_mode & stat.S_ISGID)  # to what is created in it (inode(7))


class Walk:
    """The way from the root to the directory where the walk stands: one open descriptor a level."""

    handlers: dict[str, Callable[[Operation, int], None]]

    def __init__(self, root: int, limits: Mapping[str, int], tell: Tell) -> None:
        self.limits, self.progress, self.root = limits, Progress(tell), root
        self.levels = [Level(root, 0, 0)]

    def into(self, operation: Operation) -> int:
        """Leave directories until the one that the operation names; return its descriptor.

        Raises:
            RejectedError: it is not on the way from the root to here, or the path gets too long.
        """
        levels = self.levels
        while levels[-1].number != operation.into:
            if levels[-1].number < operation.into or len(levels) == 1:
                raise RejectedError("manifest_parent", 0, f"`in` {operation.into} is no directory on the way here")
            self.leave()
        if levels[-1].path_bytes + len(operation.name) > protocol.MAX_PATH_BYTES:
            raise RejectedError("manifest_name", 0, f"a path above {protocol.MAX_PATH_BYTES} bytes")
        if len(levels) > self.limits["depth"]:
            raise RejectedError("manifest_limit", 0, f"a path of more than {self.limits['depth']} components")
        return levels[-1].descriptor

    def enter(self, operation: Operation, entry: int) -> int:
        """Step into a directory that is really one; return its descriptor."""
        return self.step_into(os.open(operation.name, DIRECTORY, dir_fd=self.into(operation)), operation, entry)

    def step_into(self, directory: int, operation: Operation, entry: int) -> int:
        """Let an open directory be the innermost one."""
        self.levels.append(Level(directory, entry, self.levels[-1].path_bytes + len(operation.name) + 1))
        return directory

    def leave(self) -> None:
        """Step out of the innermost directory."""
        os.close(self.levels.pop().descriptor)

    @contextmanager
    def holder_of(self, components: Sequence[bytes]) -> Iterator[int]:
        """Hold the directory of a path from the root open, coming there by one real directory at a time."""
        holder = os.open(".", DIRECTORY, dir_fd=self.root)
        try:
            for folder in components[:-1]:
                below = os.open(folder, DIRECTORY, dir_fd=holder)
                os.close(holder)
                holder = below
            yield holder
        finally:
            os.close(holder)

    def finish(self) -> None:
        """Step out of everything."""
        while len(self.levels) > 1:
            self.leave()


class Writer(Walk):
    """Makes each operation true."""

    def __init__(self, root: int, payload: int, payload_bytes: int, settings: Mapping[str, Any], tell: Tell) -> None:
        super().__init__(root, settings["limits"], tell)
        self._payload = payload
        self._payload_bytes = payload_bytes
        self._fifo = settings["populate"]["fifo"]
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self.handlers = {
            "enter": self._enter, "remove": self._remove, "dir": self._dir, "meta": self._meta, "file": self._file,
            "symlink": self._symlink, "link": self._link, "fifo": self._make_fifo, "char": self._device,
            "block": self._device,
        }  # fmt: skip

    def leave(self) -> None:
        """Step out, giving the directory its own times: a dir or meta what it says, any other what it had."""
        os.utime(self.levels[-1].descriptor, ns=self.levels[-1].times)
        super().leave()

    def finish(self) -> None:
        """Step out of everything, the root included."""
        super().finish()
        os.utime(self.root, ns=self.levels[0].times)

    def _enter(self, operation: Operation, entry: int) -> None:
        self.enter(operation, entry)

    def _remove(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        if operation.is_directory:
            os.rmdir(operation.name, dir_fd=parent)
        else:
            os.unlink(operation.name, dir_fd=parent)

    def _dir(self, operation: Operation, entry: int) -> None:
        os.mkdir(operation.name, 0o700, dir_fd=self.into(operation))
        self._describe(self.enter(operation, entry), operation)

    def _meta(self, operation: Operation, entry: int) -> None:
        if operation.name:
            self._describe(self.enter(operation, entry), operation)
        elif entry != 1:
            raise RejectedError("manifest_parent", 0, "only the first operation may describe the root")
        else:
            self._describe(self.root, operation)

    def _describe(self, directory: int, operation: Operation) -> None:
        os.fchown(directory, operation.uid, operation.gid)
        named = {os.fsdecode(name) for name, _ in operation.xattrs}
        for name in os.listxattr(directory):
            if name not in named and (name == protocol.XATTR_CAPABILITY or name.startswith(protocol.XATTR_PREFIX)):
                os.removexattr(directory, name)
        for raw_name, value in operation.xattrs:
            os.setxattr(directory, raw_name, value)
        os.fchmod(directory, operation.mode)
        self.levels[-1].times = (operation.mtime_ns, operation.mtime_ns)
        self.levels[-1].gives_group = bool(operation.mode & stat.S_ISGID)

    def _file(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        if operation.at + operation.size > self._payload_bytes:
            raise RejectedError("payload_range", 0, f"content ends behind the payload's {self._payload_bytes} bytes")
        with closing(os.open(operation.name, _CREATE, operation.mode & 0o777, dir_fd=parent)) as file:
            self._copy(file, operation)
            if operation.uid or operation.gid or self.levels[-1].gives_group:  # else it was created as root's
                os.fchown(file, operation.uid, operation.gid)
            for name, value in operation.xattrs:
                os.setxattr(file, name, value)
            if operation.mode & 0o7000:
                os.fchmod(file, operation.mode)
            os.utime(file, ns=(operation.mtime_ns, operation.mtime_ns))

    def _copy(self, file: int, operation: Operation) -> None:
        digest = hashlib.sha256()
        at, rest = operation.at, operation.size
        while rest:
            chunk = self._buffer[:rest]
            count = os.preadv(self._payload, [chunk], at)
            if not count:
                raise RejectedError("payload_range", 0, "the payload ends early: it was cut while root read it")
            chunk = chunk[:count]
            digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(file, chunk) :]
            at += count
            rest -= count
            self.progress.add(count)
        if digest.hexdigest() != operation.sha256:
            raise RejectedError("payload_digest", 0, f"content is sha256 {digest.hexdigest()}, not {operation.sha256}")

    def _symlink(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        os.symlink(operation.target, operation.name, dir_fd=parent)
        self._describe_name(operation, parent)

    def _make_fifo(self, operation: Operation, entry: int) -> None:
        if not self._fifo or operation.mode & 0o7000:
            raise RejectedError("fifo", 0, "named pipes are not allowed here: [populate] fifo in helper.toml")
        parent = self.into(operation)
        os.mknod(operation.name, stat.S_IFIFO | operation.mode, dir_fd=parent)
        self._describe_name(operation, parent)

    def _describe_name(self, operation: Operation, parent: int) -> None:
        os.chown(operation.name, operation.uid, operation.gid, dir_fd=parent, follow_symlinks=False)
        times = (operation.mtime_ns, operation.mtime_ns)
        os.utime(operation.name, ns=times, dir_fd=parent, follow_symlinks=False)

    def _link(self, operation: Operation, entry: int) -> None:
        parent = self.into(operation)
        with self.holder_of(operation.to) as holder:
            mode = os.stat(operation.to[-1], dir_fd=holder, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):  # the link itself, as link(2) has it: never followed
                raise RejectedError("tree_conflict", 0, "a hard link to neither a regular file nor a symbolic link")
            os.link(operation.to[-1], operation.name, src_dir_fd=holder, dst_dir_fd=parent, follow_symlinks=False)

    def _device(self, operation: Operation, entry: int) -> None:
        raise RejectedError("device_node", 0, "device nodes are never made: populate holds no capability of the host")


def run(walk: Walk, manifest_file: int) -> tuple[int, int]:
    """Apply a whole manifest; return how many operations and how many bytes of content it had.

    Raises:
        RejectedError: the manifest, the payload, or their meeting with the layers below is wrong.
        OSError: this host's fault.
    """
    lines = manifest.lines(manifest_file)
    header = manifest.parse_header(next(lines, b""), walk.limits)
    entry = content_bytes = 0
    for entry, line in enumerate(lines, 1):
        operation = manifest.parse(line, entry)
        content_bytes += operation.size
        if entry > header.entries or content_bytes > header.content_bytes:
            break
        try:
            walk.handlers[operation.kind](operation, entry)
        except RejectedError as error:
            raise RejectedError(error.rule, entry, f"operation {entry}: {error}") from None
        except OSError as error:
            if error.errno in _SURPRISES:
                where = f"operation {entry}, {operation.kind}: {os.strerror(error.errno)}"
                raise RejectedError("tree_conflict", entry, where) from error
            raise
        walk.progress.add(0, 1)
    if (entry, content_bytes) != (header.entries, header.content_bytes):
        said = f"{header.entries} operations with {header.content_bytes} bytes, found {entry} with {content_bytes}"
        raise RejectedError("manifest_totals", entry, f"the first line says {said}, or more")
    walk.finish()
    return entry, content_bytes
