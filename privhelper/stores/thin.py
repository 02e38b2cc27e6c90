"""The thin store: every device is a thin device of one device-mapper pool, a copy is a snapshot.

Rule 1: after every message the pool's status is read again: the kernel throws the result of a metadata commit away, so
        a message can succeed while nothing of it reached the disk (measured on Linux 6.1; the pool is read-only then).
Rule 2: a pool is made and attached by root's own commands only (thin_pool.py). Its identity is the UUID of the file
        system in its base device, and is part of the uuid of every device-mapper device of ours.
Rule 3: blocks are zeroed before use (no skip_block_zeroing): a deleted device's bytes never show in a new one, and the
        base's unwritten parts read as zeros, which its formatting relies on.
Rule 4: error_if_no_space: a full pool is an error at once, not a writer that nobody can kill for a minute.

Device-mapper names are NAME-pool, NAME-meta (a linear device over the metadata, so that a helper confined to
device-mapper's own devices can read it) and NAME-<number>; uuids carry the identity. Numbers are thin device ids.
"""

import errno
import mmap
import os
import struct
from collections.abc import Mapping
from typing import Any, Final

from privhelper import kernel, loops
from privhelper.dm import SECTOR_BYTES, DeviceMapper, Target, node
from privhelper.files import sync_folder
from privhelper.stores.base import BASE, READY, PoolStatus, StoreError

METADATA_BLOCK_BYTES: Final = 4096
UUID_PREFIX: Final = "IMGPULL-"
_THIN_MAGIC: Final = 27022010  # THIN_SUPERBLOCK_MAGIC

_WRITABLE: Final = (READY, "out_of_data")  # states in which the pool takes messages

_ADVICE: Final = {
    "absent": "as root: imgpull-helper pool attach; or, once and for all, imgpull-helper pool create",
    "read_only": "its metadata is full or could not be written; as root: imgpull-helper pool grow --metadata-bytes N",
    "needs_check": "as root: imgpull-helper pool detach, thin_check --clear-needs-check-flag METADATA, pool attach",
    "out_of_data": "remove images that are not needed, or as root: imgpull-helper pool grow --data-bytes N",
    "failed": "the kernel's log says why; as root: imgpull-helper pool detach, pool check, pool attach",
}


class ThinStore:
    """The pool in service: what the helper asks of it for its clients."""

    kind: Final = "thin"

    def __init__(self, settings: Mapping[str, Any], state_dir: str) -> None:
        self._settings = settings
        self._folder = os.path.join(state_dir, "thin")
        self._name: str = settings["name"]
        self.pool, self.metadata = f"{self._name}-pool", f"{self._name}-meta"
        self._mapper: DeviceMapper | None = None

    @property
    def mapper(self) -> DeviceMapper:
        """Return the control device, opened at first use."""
        self._mapper = self._mapper or DeviceMapper()
        return self._mapper

    def status(self, *, flush: bool = False) -> PoolStatus:
        """Return how the pool is; with ``flush``, after it has written data and metadata out."""
        try:
            pool = self.mapper.find(self.pool)
        except OSError as error:
            return PoolStatus("absent", advice=f"no device-mapper ({error.strerror}); as root: modprobe dm_thin_pool")
        if pool is None:
            return PoolStatus("absent", advice=_ADVICE["absent"])
        if not pool.uuid.startswith(UUID_PREFIX):
            return PoolStatus("failed", advice=f"{self.pool} is not imgpull's: its uuid is {pool.uuid!r}")
        try:
            block_bytes = int(self.mapper.table(self.pool).parameters.split()[2]) * SECTOR_BYTES
            text = self.mapper.status(self.pool, flush=flush).parameters
        except OSError:  # a crash left it without a table
            return PoolStatus("failed", advice=_ADVICE["failed"])
        return _parse_status(text, block_bytes, pool.uuid.removeprefix(UUID_PREFIX))

    def create(self, dev: int, origin: int) -> None:
        """Snapshot an inactive origin. A number that the pool holds already is an error, never taken for ours."""
        if self.mapper.find(self._device(origin)):
            raise StoreError("busy", f"device {origin} is active and cannot be copied")
        self.message(f"create_snap {dev} {origin}", READY)

    def delete(self, dev: int) -> None:
        """Free a device, deactivating what a crash left of it; absent is fine."""
        self.deactivate(dev)
        self.message(f"delete {dev}", *_WRITABLE, fine=errno.ENODATA)
        for path in self._sizes(dev).values():
            os.unlink(path)

    def devices(self) -> set[int]:
        """Return what the pool holds: device-mapper has no question for it, so a snapshot of the metadata is read."""
        release = "release_metadata_snap"
        self.message(release, *_WRITABLE, fine=errno.EINVAL)  # none is held, unless a crash left one
        self.message("reserve_metadata_snap", *_WRITABLE)
        try:
            held = int(self.mapper.status(self.pool).parameters.split()[3])
            return _read_devices(node(self.mapper.info(self.metadata).device), held) - {BASE}
        finally:
            self.message(release, *_WRITABLE)

    def message(self, text: str, *good: str, fine: int = 0) -> PoolStatus:
        """Send the pool a message; return how it is afterwards, if that is one of the good states (rule 1)."""
        failure = None
        try:
            self.mapper.message(self.pool, text)
        except OSError as error:
            failure = error
        status = self.status()
        if status.state not in good:
            code = "no_room" if status.state == "out_of_data" else "pool"
            raise StoreError(code, f"the pool is {status.state} after {text!r}: {status.advice}")
        if failure and failure.errno != fine:
            raise StoreError("fault", f"the pool refused {text!r}: {failure.strerror}") from failure
        return status

    def resize(self, dev: int, size_bytes: int) -> None:
        """Write a larger size down, in the name of an empty file: to make a name is atomic, with no rename to allow.

        Device-mapper keeps none: it is a word of the table at activation.
        """
        if size_bytes > self.size_bytes(dev):
            path = os.path.join(self._folder, f"size.{dev}.{size_bytes}")
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            sync_folder(self._folder)

    def size_bytes(self, dev: int) -> int:
        """Return the size that was written down for this device, else the one that all have."""
        return max(self._sizes(dev), default=int(self._settings["base_bytes"]))

    def _sizes(self, dev: int) -> dict[int, str]:
        head = f"size.{dev}."
        names = [name for name in os.listdir(self._folder) if name.startswith(head)]
        return {int(name.removeprefix(head)): os.path.join(self._folder, name) for name in names}

    def activate(self, dev: int, read_only: bool) -> str:
        """Make the block device. Its name being taken is an error, also if a crash left it without a table."""
        pool = self.mapper.info(self.pool)
        target = Target(self.size_bytes(dev), "thin", f"{numbers(pool.device)} {dev}")
        try:
            return self.mapper.create(self._device(dev), f"{pool.uuid}-{dev}", target, read_only=read_only)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise StoreError("busy", f"device {dev} is active already") from error

    def grant(self, path: str, uid: int, writable: bool) -> None:
        """Let one user open the node of an active device."""
        loops.grant(path, uid, writable)

    def mount_read_only(self, dev: int) -> int:
        """Mount a device that is active read-only, activating it first; whoever can read its node cannot change it."""
        path = self.active().get(dev) or self.activate(dev, True)
        return kernel.mount_detached("ext4", path, ["ro"], kernel.MOUNT_ATTR_SAFE | kernel.MOUNT_ATTR_RDONLY)

    def deactivate(self, dev: int) -> None:
        """Take the block device away; absent is fine."""
        self.remove(self._device(dev))

    def remove(self, name: str) -> None:
        """Remove a device of ours, waiting a little for whoever has it open; absent is fine."""
        found = self.mapper.find(name)
        if found and not found.uuid.startswith(UUID_PREFIX):
            raise StoreError("pool", f"{name} is not imgpull's: its uuid is {found.uuid!r}")
        try:
            self.mapper.remove(name, self._settings["wait_s"])
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise StoreError("busy", f"somebody keeps {name} open") from error

    def active(self) -> dict[int, str]:
        """Return every active device and its path, also those that a crash left without a table."""
        found = {}
        for name in self.mapper.names():
            head, _, number = name.rpartition("-")
            info = self.mapper.find(name) if head == self._name and number.isdecimal() else None
            if info and int(number) != BASE and info.uuid.startswith(UUID_PREFIX):
                found[int(number)] = f"/dev/dm-{os.minor(info.device)}"
        return found

    def settle(self, dev: int) -> None:
        """Make the pool write data and metadata out, and see whether it could."""
        status = self.status(flush=True)
        if status.state != READY:
            code = "no_room" if status.state == "out_of_data" else "fault"
            raise StoreError(code, f"device {dev} may not be on disk, the pool is {status.state}: {status.advice}")

    def advance(self, expected: int) -> int:
        """Compare and swap the transaction id: the mark that ties the change before it to the ledger's intent."""
        found = self.message(f"set_transaction_id {expected} {expected + 1}", *_WRITABLE, fine=errno.EINVAL).transaction
        if found != expected + 1:
            raise StoreError("pool", f"the pool has transaction {found}, expected {expected}: who else writes to it?")
        return found

    def _device(self, dev: int) -> str:
        return f"{self._name}-{dev}"


def _parse_status(text: str, block_bytes: int, identity: str) -> PoolStatus:
    """Tell the states apart (kernel, Documentation/admin-guide/device-mapper/thin-provisioning.rst, "Status")."""
    fields = text.split()
    if len(fields) < 8:  # "Fail" or "Error"
        return PoolStatus("failed", block_bytes=block_bytes, identity=identity, advice=_ADVICE["failed"])
    transaction, metadata, data, _, mode, _, _, needs_check = fields[:8]
    state = {"rw": READY, "ro": "read_only", "out_of_data_space": "out_of_data"}.get(mode, "failed")
    state = "needs_check" if needs_check == "needs_check" else state
    metadata_used, metadata_total = (int(part) * METADATA_BLOCK_BYTES for part in metadata.split("/"))
    data_used, data_total = (int(part) * block_bytes for part in data.split("/"))
    return PoolStatus(state, data_total, data_used, metadata_total, metadata_used, block_bytes, identity,
                      int(transaction), _ADVICE.get(state, ""))  # fmt: skip


def _read_devices(path: str, superblock: int) -> set[int]:
    """Return the keys of the device tree below a snapshot of the metadata (kernel, drivers/md/dm-thin-metadata.c).

    Read past the page cache, which the kernel's own writes do not go through.
    """
    device = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    page = mmap.mmap(-1, METADATA_BLOCK_BYTES)
    try:
        found, waiting = set(), [superblock]
        while waiting:
            block = waiting.pop()
            os.preadv(device, [page], block * METADATA_BLOCK_BYTES)
            if block == superblock:
                magic, root = struct.unpack_from("<32xQ288xQ", page)  # device_details_root
                waiting.append(root)
                continue
            flags, number, count, most = struct.unpack_from("<4xIQII", page)  # struct node_header
            if magic != _THIN_MAGIC or number != block or not count <= most <= 252:
                raise StoreError("pool", f"metadata block {block} is not what it should be: {_ADVICE['failed']}")
            keys = struct.unpack_from(f"<{count}Q", page, 32)
            if flags & 1:  # INTERNAL_NODE: its values are blocks
                waiting += struct.unpack_from(f"<{count}Q", page, 32 + 8 * most)
            else:
                found |= set(keys)
        return found
    finally:
        page.close()
        os.close(device)


def numbers(device: int) -> str:
    """Return a device as tables name it."""
    return f"{os.major(device)}:{os.minor(device)}"
