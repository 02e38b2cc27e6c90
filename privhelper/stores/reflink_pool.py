"""What root does to a reflink pool by command: make, attach, detach and check the file that it lies in.

Rule 1: a pool is made whole under another name, through a mount that nobody sees, and named last.
Rule 2: no request of a client reaches this module; it is the only one of this store that runs programs.
"""

import errno
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from privhelper import files, kernel, loops
from privhelper.stores import ext4
from privhelper.stores.base import StoreError
from privhelper.stores.reflink import ATTACH, CREATE, ReflinkStore

_MKFS: Final = "/usr/sbin/mkfs.xfs"


class ReflinkPool:
    """What root does to the pool by command."""

    def __init__(self, settings: Mapping[str, Any], state_dir: str) -> None:
        self._settings = settings
        self._file = os.path.join(state_dir, "pool.xfs")
        self._mount_point = os.path.join(state_dir, "pool")
        self._store = ReflinkStore(settings, state_dir)

    def create(self, options: Mapping[str, Any]) -> None:
        """Make the pool's file under another name, fill it through a detached mount, name it, attach it."""
        if os.path.exists(self._file):
            raise StoreError("pool", f"{self._file} exists already; {ATTACH}")
        fresh = self._file + ".new"
        with _discarding(fresh):
            file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                self._claim(file, int(options.get("data_bytes") or self._settings["pool_bytes"]))
                ext4.run([_MKFS, "-q", "-f", "-m", "reflink=1", fresh])
                self._with_mount(file, self._fill)
                os.fsync(file)
            finally:
                os.close(file)
            os.rename(fresh, self._file)
        self.attach()

    def attach(self) -> None:
        """Mount the pool's file; mounted already is fine."""
        if self._store.status().state != "absent":
            return
        if not os.path.exists(self._file):
            raise StoreError("pool", f"there is no pool: {self._file} is missing")
        os.makedirs(self._mount_point, 0o700, exist_ok=True)
        file = os.open(self._file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._with_mount(file, lambda mount: kernel.attach_mount(mount, self._mount_point))
        finally:
            os.close(file)

    def detach(self) -> None:
        """Unmount the pool; its loop device goes with it."""
        if self._store.status().state == "absent":
            return
        if active := sorted(filter(None, self._store.active().values())):
            raise StoreError("busy", f"active devices: {active}")
        below = [node.path for node in loops.nodes() if node.mark == f"pool {self._file}"]
        try:
            kernel.unmount(self._mount_point)
        except OSError as error:
            raise StoreError("busy" if error.errno == errno.EBUSY else "fault", str(error)) from error
        for path in below:
            with suppress(OSError):  # EBUSY: it goes with its last opener, and the next to detach finds its mark
                loops.detach(path, self._settings["wait_s"])

    def grow(self, options: Mapping[str, Any]) -> None:
        """Growing the file system in service takes xfs_growfs; detach, lengthen, attach does the same."""
        raise StoreError("pool", "a reflink pool does not grow in service: make a larger one and pull again")

    def check(self) -> list[str]:
        """Return what xfs_repair finds wrong in the pool's file; it must be detached."""
        if self._store.status().state != "absent":
            raise StoreError("busy", "detach the pool first: imgpull-helper pool detach")
        try:
            ext4.run(["/usr/sbin/xfs_repair", "-n", self._file])
        except StoreError as error:
            return [str(error)]
        return []

    def _claim(self, file: int, size_bytes: int) -> None:
        """Give the file its size, with or without the disk's promise to have it."""
        if not self._settings["preallocate"]:
            os.ftruncate(file, size_bytes)
            return
        files.claim(file, self._file, size_bytes)

    def _with_mount(self, file: int, use: Callable[[int], None]) -> None:
        loop, path = loops.attach(file, f"pool {self._file}", read_only=False)
        try:
            mount = kernel.mount_detached("xfs", path, [], kernel.MOUNT_ATTR_SAFE)
        finally:
            os.close(loop)
        try:
            use(mount)
        finally:
            os.close(mount)

    def _fill(self, mount: int) -> None:
        """Write the formatted base and, last, the identity that makes it a pool."""
        identity = str(uuid.uuid4())
        root = kernel.open_root(mount)
        base = os.open("0.img", CREATE, 0o600, dir_fd=root)
        os.fchmod(root, 0o700)
        try:
            os.ftruncate(base, self._settings["base_bytes"])
            ext4.format_device(f"/proc/{os.getpid()}/fd/{base}", identity, self._settings)
            loop, path = loops.attach(base, f"base {self._file}", read_only=False)
            try:
                ext4.empty(path)
            finally:
                os.close(loop)
                loops.discard(path)
            os.fsync(base)
            with open(os.open("identity", CREATE, 0o600, dir_fd=root), "w", encoding="ascii") as file:
                file.write(identity + "\n")
            kernel.syncfs(root)
        finally:
            os.close(base)
            os.close(root)


@contextmanager
def _discarding(path: str) -> Iterator[None]:
    """Remove a half-made file when what makes it fails."""
    try:
        yield
    except BaseException:
        if os.path.exists(path):
            os.unlink(path)
        raise
