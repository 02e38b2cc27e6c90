"""Layers as ext4 images that share their blocks: reflinked files of one XFS, on loop devices.

For hosts and test machines whose kernel has no device-mapper. The pool is one file, <state_dir>/pool.xfs, mounted by
``pool attach`` at <state_dir>/pool; device N is N.img in it, a copy is FICLONE of its origin's file (ioctl_ficlone(2)).

Limit: who was given a loop device's node may put a file of his own behind it (loop(4) asks for no capability). So root
never mounts a device that was given out, and takes none for its own that was bound anew: loops.py.
"""

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final

from privhelper import kernel, loops
from privhelper.files import closing, sync_folder
from privhelper.stores.base import BASE, READY, PoolStatus, StoreError

_XFS_MAGIC: Final = 0x58465342
_FICLONE: Final = 0x40049409
_IMAGE: Final = re.compile(r"(0|[1-9][0-9]{0,17})\.img", re.ASCII)
_GIVEN, _MOUNTED = "given", "mounted"  # what a loop device is for: to be opened by a user, to be mounted by root
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
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
            return PoolStatus(
                "failed", advice=f"{error.strerror}; as root: imgpull-helper pool detach, pool check, pool attach"
            )
        total, free = figures.f_blocks * figures.f_frsize, figures.f_bavail * figures.f_frsize
        state = "read_only" if figures.f_flag & os.ST_RDONLY else READY if free > _FULL_BYTES else "out_of_data"
        return PoolStatus(state, total, total - free, block_bytes=figures.f_frsize, identity=identity)

    def create(self, dev: int, origin: int) -> None:
        """Make ``dev`` a copy of ``origin``; both stand on the same blocks until one of them is written."""
        with self._open(origin, os.O_RDONLY) as source:
            with closing(os.open(self._image(dev), CREATE, 0o600)) as copy:
                fcntl.ioctl(copy, _FICLONE, source)

    def delete(self, dev: int) -> None:
        """Free an inactive device; absent is fine."""
        try:
            os.unlink(self._image(dev))
        except FileNotFoundError:
            return
        sync_folder(self._mount_point)

    def devices(self) -> set[int]:
        """Return the numbers that the pool really holds; a folder that is no pool is not taken for an empty one."""
        with closing(os.open(self._mount_point, _FOLDER)) as folder:
            if not self._is_pool(folder):
                raise StoreError("pool", f"the pool is absent; {ATTACH}")
            return {int(name[:-4]) for name in os.listdir(folder) if _IMAGE.fullmatch(name)} - {BASE}

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
        for node in self._nodes(dev, _GIVEN):
            if node.is_ours:
                raise StoreError("busy", f"device {dev} is active already")
            self._detach(node.path)  # its user unbound it, or a crash came before it was bound
        return self._attach(dev, read_only, _GIVEN)

    def grant(self, path: str, uid: int, writable: bool) -> None:
        """Let one user open the node of an active device."""
        loops.grant(path, uid, writable)

    def mount_read_only(self, dev: int) -> int:
        """Mount a device by a loop device of root's own, which nobody was given."""
        paths = [node.path for node in self._nodes(dev, _MOUNTED) if node.is_ours]
        path = paths[0] if paths else self._attach(dev, True, _MOUNTED)
        return kernel.mount_detached("ext4", path, ["ro"], kernel.MOUNT_ATTR_SAFE | kernel.MOUNT_ATTR_RDONLY)

    def deactivate(self, dev: int) -> None:
        """Take its loop devices away, and what its user made of them; absent is fine."""
        for use in (_GIVEN, _MOUNTED):
            for node in self._nodes(dev, use):
                self._detach(node.path)

    def active(self) -> dict[int, str]:
        """Return each device that has loop devices, and the path of the one to give; empty where that is not bound."""
        found: dict[int, str] = {}
        for node in loops.nodes():
            use, _, name = node.mark.partition(" ")
            folder, image = os.path.split(name)
            if folder == self._mount_point and _IMAGE.fullmatch(image):
                path = node.path if node.is_ours and use == _GIVEN else ""
                found[int(image[:-4])] = path or found.get(int(image[:-4]), "")
        return found

    def _nodes(self, dev: int, use: str) -> Iterator[loops.Node]:
        return (node for node in loops.nodes() if node.mark == f"{use} {self._image(dev)}")

    def _attach(self, dev: int, read_only: bool, use: str) -> str:
        with self._open(dev, os.O_RDONLY if read_only else os.O_RDWR) as image:
            loop, path = loops.attach(image, f"{use} {self._image(dev)}", read_only=read_only, autoclear=False)
            os.close(loop)
        return path

    def _detach(self, path: str) -> None:
        try:
            loops.detach(path, self._settings["wait_s"])
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise StoreError("busy", str(error)) from error
            raise

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
            folder = os.open(self._mount_point, _FOLDER)
        except FileNotFoundError:
            return False
        with closing(folder):
            return self._is_pool(folder)

    def _is_pool(self, folder: int) -> bool:
        above = os.stat(os.path.dirname(self._mount_point))
        return os.fstat(folder).st_dev != above.st_dev and kernel.filesystem_magic(folder) == _XFS_MAGIC
