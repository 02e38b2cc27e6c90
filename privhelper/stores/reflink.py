"""Layers as ext4 images that share their blocks: reflinked files of one XFS, on loop devices.

For hosts and test machines whose kernel has no device-mapper. The pool is one file, <state_dir>/pool.xfs, mounted by
``pool attach`` at <state_dir>/pool; device N is N.img in it, a copy is FICLONE of its origin's file (ioctl_ficlone(2)).

Limit: who was given a loop device's node may put a file of his own behind it (loop(4) asks for no capability). So root
never mounts a device that was given out, and every look at a device asks which inode it stands on.
"""

import errno
import fcntl
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, Final

from privhelper import kernel, loops
from privhelper.files import closing, sync_folder
from privhelper.stores.base import BASE, READY, PoolStatus, StoreError

_XFS_MAGIC: Final = 0x58465342
_FICLONE: Final = 0x40049409
_IMAGE: Final = re.compile(r"(0|[1-9][0-9]{0,17})\.img", re.ASCII)
_FOR_MOUNTS: Final = b"imgpull: root mounts this"
_FULL_BYTES: Final = 1 << 20  # XFS never gives its last few blocks away
CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
ATTACH: Final = "attach it as root: imgpull-helper pool attach"


class ReflinkStore:
    """The devices of the pool that is mounted at ``mount_point``."""

    kind: Final = "reflink"

    def __init__(self, settings: Mapping[str, Any], state_dir: str) -> None:
        self._settings = settings
        self._mount_point = os.path.join(state_dir, "pool")
        self._file = os.path.join(state_dir, "pool.xfs")

    def status(self) -> PoolStatus:
        """Return how the pool is; raises nothing for a pool that is absent or broken."""
        try:
            if not self._is_mounted():
                made = os.path.exists(self._file)
                return PoolStatus("absent", advice=ATTACH if made else "make one as root: imgpull-helper pool create")
            figures = os.statvfs(self._mount_point)
            with open(os.path.join(self._mount_point, "identity"), encoding="ascii") as file:
                identity = file.read().strip()
        except OSError as error:  # EIO: XFS shut itself down
            return PoolStatus("failed", advice=f"{error}; as root: imgpull-helper pool detach, pool check, pool attach")
        total, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
        state = "read_only" if figures.f_flag & os.ST_RDONLY else READY if free > _FULL_BYTES else "out_of_data"
        return PoolStatus(state, total, total - free, block_bytes=figures.f_frsize, identity=identity)

    def create(self, dev: int, origin: int) -> None:
        """Make ``dev`` a copy of ``origin``; both stand on the same blocks until one of them is written."""
        with self._open(origin, os.O_RDONLY) as source:
            with closing(os.open(self._image(dev), CREATE, 0o600)) as copy:
                fcntl.ioctl(copy, _FICLONE, source)

    def delete(self, dev: int) -> None:
        """Free a device; absent is fine."""
        self.deactivate(dev)
        try:
            os.unlink(self._image(dev))
        except FileNotFoundError:
            return
        sync_folder(self._mount_point)

    def devices(self) -> set[int]:
        """Return the numbers that the pool really holds."""
        return {int(name[:-4]) for name in os.listdir(self._mount_point) if _IMAGE.fullmatch(name)} - {BASE}

    def resize(self, dev: int, size_bytes: int) -> None:
        """Make an inactive device larger."""
        with self._open(dev, os.O_RDWR) as image:
            if os.fstat(image).st_size < size_bytes:
                os.ftruncate(image, size_bytes)

    def size_bytes(self, dev: int) -> int:
        """Return how large the block device is."""
        return os.stat(self._image(dev)).st_size

    def activate(self, dev: int, read_only: bool) -> str:
        """Put the image behind a loop device and return its path."""
        if dev in self.active():
            raise StoreError("busy", f"device {dev} is active already")
        return self._attach(dev, read_only, b"")

    def grant(self, path: str, uid: int, writable: bool) -> None:
        """Let one user open the node of an active device."""
        loops.grant(path, uid, writable)

    def mount_read_only(self, dev: int) -> int:
        """Mount a device by a loop device of root's own, which nobody was given."""
        paths = [path for path, label in self._loops().get(dev, ()) if label == _FOR_MOUNTS]
        path = paths[0] if paths else self._attach(dev, True, _FOR_MOUNTS)
        return kernel.mount_detached("ext4", path, ["ro"], kernel.MOUNT_ATTR_SAFE | kernel.MOUNT_ATTR_RDONLY)

    def deactivate(self, dev: int) -> None:
        """Take its loop devices away; absent is fine."""
        for path, _ in self._loops().get(dev, ()):
            try:
                loops.detach(path, self._settings["wait_s"])
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise StoreError("busy", str(error)) from error
                raise

    def active(self) -> dict[int, str]:
        """Return each active device and its path."""
        found = self._loops()
        return {dev: path for dev, pairs in found.items() for path, label in pairs if label != _FOR_MOUNTS}

    def _attach(self, dev: int, read_only: bool, label: bytes) -> str:
        with self._open(dev, os.O_RDONLY if read_only else os.O_RDWR) as image:
            loop, path = loops.attach(image, read_only=read_only, autoclear=False, label=label)
            os.close(loop)
        return path

    def _loops(self) -> dict[int, list[tuple[str, bytes]]]:
        """Return path and label of the loop devices of each image. The name only proposes; the inode decides."""
        found: dict[int, list[tuple[str, bytes]]] = {}
        for path, name in loops.backing_names().items():
            folder, image = os.path.split(name)
            match = _IMAGE.fullmatch(image)
            if folder != self._mount_point or not match:
                continue
            backing = loops.backing(path)
            with suppress(FileNotFoundError):
                status = os.stat(name)
                if backing and (backing.device, backing.inode) == (status.st_dev, status.st_ino):
                    found.setdefault(int(match[1]), []).append((path, backing.label))
        return found

    def settle(self, dev: int) -> None:
        """Make the image's blocks and its name durable. The loop device wrote past the page cache."""
        with self._open(dev, os.O_RDWR) as image:
            os.fsync(image)
        sync_folder(self._mount_point)

    def advance(self, expected: int) -> int:
        """Return 0: a rename or an unlink of a journalling file system is atomic by itself."""
        return expected

    def _image(self, dev: int) -> str:
        return os.path.join(self._mount_point, f"{dev}.img")

    def _open(self, dev: int, flags: int) -> AbstractContextManager[int]:
        return closing(os.open(self._image(dev), flags | os.O_CLOEXEC | os.O_NOFOLLOW))

    def _is_mounted(self) -> bool:
        try:
            folder = os.open(self._mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        with closing(folder):
            above = os.stat(os.path.dirname(self._mount_point))
            return os.fstat(folder).st_dev != above.st_dev and kernel.filesystem_magic(folder) == _XFS_MAGIC


def open_store(settings: Mapping[str, Any], state_dir: str) -> ReflinkStore:
    """Return the store; nothing is opened yet."""
    return ReflinkStore(settings, state_dir)
