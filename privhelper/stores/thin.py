"""The thin store: every device is a thin device of one device-mapper pool, a copy is a snapshot.

Rule 1: after every message the pool's status is read again: the kernel throws the result of a metadata commit away, so
        a message can succeed while nothing of it reached the disk (measured on Linux 6.1; the pool is read-only then).
Rule 2: a pool is made once, by root's explicit act, and never formatted, repaired or remade by itself. The UUID of the
        file system in its base device is its identity; a pool whose base has another one is refused.
Rule 3: blocks are zeroed before use (no skip_block_zeroing): a deleted device's bytes never show in a new one, and the
        base's unwritten parts read as zeros, which its formatting relies on.
Rule 4: error_if_no_space: a full pool is an error at once, not a writer that nobody can kill for a minute.

Device-mapper names are NAME-pool, NAME-meta (a linear device over the metadata, so that a helper confined to
device-mapper's own devices can read it) and NAME-<number>; uuids carry the identity. Numbers are thin device ids.
"""

import errno
import fcntl
import json
import mmap
import os
import stat
import struct
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from privhelper import loops
from privhelper.dm import SECTOR_BYTES, DeviceMapper, Target, node
from privhelper.stores import ext4
from privhelper.stores.base import BASE, READY, PoolStatus, StoreError

_METADATA_BLOCK_BYTES: Final = 4096
_MAX_METADATA_BYTES: Final = 255 * ((1 << 14) - 64) * _METADATA_BLOCK_BYTES  # THIN_METADATA_MAX_SECTORS
_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES = 1 << 16, 1 << 30
_BLANK_BYTES: Final = 1 << 20  # what must be zero at the start of a device that a pool is made on
_LOOP_SET_CAPACITY: Final = 0x4C07
_UUID: Final = "IMGPULL-"
_THIN_MAGIC: Final = 27022010  # THIN_SUPERBLOCK_MAGIC
_EXT4_UUID_AT: Final = 1024 + 0x68  # s_uuid of the first superblock

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

    def status(self) -> PoolStatus:
        """Return how the pool is. Asking makes the kernel write the metadata out first."""
        try:
            pool = self.mapper.find(self.pool)
        except OSError as error:
            return PoolStatus("absent", advice=f"no device-mapper ({error.strerror}); as root: modprobe dm_thin_pool")
        if pool is None:
            return PoolStatus("absent", advice=_ADVICE["absent"])
        if not pool.uuid.startswith(_UUID):
            return PoolStatus("failed", advice=f"{self.pool} is not imgpull's: its uuid is {pool.uuid!r}")
        try:
            block_bytes = int(self.mapper.table(self.pool).parameters.split()[2]) * SECTOR_BYTES
            text = self.mapper.status(self.pool).parameters
        except OSError:  # a crash left it without a table
            return PoolStatus("failed", advice=_ADVICE["failed"])
        return _parse_status(text, block_bytes, pool.uuid.removeprefix(_UUID))

    def create(self, dev: int, origin: int) -> None:
        """Snapshot an inactive origin. A number that the pool holds already is an error, never taken for ours."""
        if self.mapper.find(self._device(origin)):
            raise StoreError("busy", f"device {origin} is active and cannot be copied")
        self.message(f"create_snap {dev} {origin}", READY)

    def delete(self, dev: int) -> None:
        """Free a device, deactivating what a crash left of it; absent is fine."""
        self.deactivate(dev)
        self.message(f"delete {dev}", *_WRITABLE, fine=errno.ENODATA)
        if os.path.exists(self._size_file(dev)):
            os.unlink(self._size_file(dev))

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

    def message(self, text: str, *good: str, fine: int = 0) -> None:
        """Send the pool a message and see whether it still is in one of the good states (rule 1)."""
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

    def resize(self, dev: int, size_bytes: int) -> None:
        """Write a larger size down: device-mapper keeps none, it is a word of the table at activation."""
        if size_bytes > self.size_bytes(dev):
            _write_durably(self._size_file(dev), str(size_bytes))

    def size_bytes(self, dev: int) -> int:
        """Return the size that was written down for this device, else the one that all have."""
        try:
            with open(self._size_file(dev), encoding="ascii") as file:
                return int(file.read())
        except FileNotFoundError:
            return int(self._settings["base_bytes"])

    def activate(self, dev: int, read_only: bool) -> str:
        """Make the block device. Its name being taken is an error, also if a crash left it without a table."""
        pool = self.mapper.info(self.pool)
        target = Target(self.size_bytes(dev), "thin", f"{_numbers(pool.device)} {dev}")
        try:
            return self.mapper.create(self._device(dev), f"{pool.uuid}-{dev}", target, read_only=read_only)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise StoreError("busy", f"device {dev} is active already") from error

    def grant(self, path: str, uid: int) -> None:
        """Hand the node of an active device to a user."""
        loops.grant(path, uid)

    def deactivate(self, dev: int) -> None:
        """Take the block device away; absent is fine."""
        self.remove(self._device(dev))

    def remove(self, name: str) -> None:
        """Remove a device of ours, waiting a little for whoever has it open; absent is fine."""
        found = self.mapper.find(name)
        if found and not found.uuid.startswith(_UUID):
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
            if info and int(number) != BASE and info.uuid.startswith(_UUID):
                found[int(number)] = f"/dev/dm-{os.minor(info.device)}"
        return found

    def settle(self, dev: int) -> None:
        """Make the pool write data and metadata out, and see whether it could."""
        status = self.status()
        if status.state != READY:
            raise StoreError("fault", f"device {dev} may not be on disk, the pool is {status.state}: {status.advice}")

    def advance(self, expected: int) -> int:
        """Compare and swap the transaction id: the mark that ties the change before it to the ledger's intent."""
        self.message(f"set_transaction_id {expected} {expected + 1}", *_WRITABLE, fine=errno.EINVAL)
        found = self.status().transaction
        if found != expected + 1:
            raise StoreError("pool", f"the pool has transaction {found}, expected {expected}: who else writes to it?")
        return found

    def _device(self, dev: int) -> str:
        return f"{self._name}-{dev}"

    def _size_file(self, dev: int) -> str:
        return os.path.join(self._folder, f"size.{dev}")


class ThinPool:
    """What root alone does to the pool by command.

    ``thin/pool.json`` says what the pool stands on: two block devices, or two files behind loop devices.
    """

    def __init__(self, settings: Mapping[str, Any], state_dir: str) -> None:
        self._settings = settings
        self._folder = os.path.join(state_dir, "thin")
        self._record = os.path.join(self._folder, "pool.json")
        self._store = ThinStore(settings, state_dir)

    def create(self, options: Mapping[str, Any]) -> None:
        """Make a pool on two blank devices or two new files, with one formatted base device in it.

        The pool's transaction id stays 0 until all is done, and a pool that has 0 is never attached.
        """
        status = self._store.status()
        if os.path.exists(self._record) or status.state != "absent":
            raise StoreError("pool", f"there is a pool already ({self._record}, {status.state}): {status.advice}")
        os.makedirs(self._folder, 0o700, exist_ok=True)
        record: dict[str, Any] = {"identity": str(uuid.uuid4()), "block_bytes": self._option(options, "block_bytes")}
        with ExitStack() as undo:
            for part in ("metadata", "data"):
                record[part] = options.get(part) or os.path.join(self._folder, part)
                _make_blank(record[part], self._option(options, f"{part}_bytes"), undo)
            self._assemble(record)
            undo.callback(self.detach)
            self._store.message(f"create_thin {BASE}", READY)
            path = self._store.activate(BASE, read_only=False)
            ext4.format_device(path, record["identity"], self._settings)
            ext4.empty(path)
            self._store.deactivate(BASE)
            _write_durably(self._record, json.dumps(record))
            undo.callback(os.unlink, self._record)
            self._store.advance(0)
            undo.pop_all()

    def attach(self) -> None:
        """Bring the pool into service after its metadata passed thin_check(8); attached already is fine.

        The check also keeps the kernel from formatting metadata that somebody has blanked.
        """
        record, status = self._load(), self._store.status()
        if status.state != "absent":
            if status.identity != record["identity"]:
                raise StoreError(
                    "pool", f"another pool is in service: {status.identity}, expected {record['identity']}"
                )
            return
        ext4.run([self._settings["thin_check"], record["metadata"]])
        self._assemble(record)
        with ExitStack() as undo:
            undo.callback(self.detach)
            if self._store.status().transaction == 0 or self._base_uuid() != record["identity"]:
                raise StoreError("pool", f"{record['data']} is not the pool that was created here: its base differs")
            undo.pop_all()

    def detach(self) -> None:
        """Take the pool out of service."""
        active = self._store.active()
        if active:
            raise StoreError("busy", f"active devices: {sorted(active.values())}")
        self._store.deactivate(BASE)
        for name in (self._store.pool, self._store.metadata):
            self._store.remove(name)

    def grow(self, options: Mapping[str, Any]) -> None:
        """Make files larger as asked; the pool takes what its devices have, now or when it is attached."""
        record, mapper = self._load(), self._store.mapper
        for part in ("metadata", "data"):
            if options.get(f"{part}_bytes"):
                _extend(record[part], options[f"{part}_bytes"])
        if self._store.status().state == "absent":
            return
        metadata = mapper.table(self._store.metadata).parameters.split()[0]
        data = mapper.table(self._store.pool).parameters.split()[1]
        sizes = [_size_in_service(record["metadata"], metadata), _size_in_service(record["data"], data)]
        linear, pool = _targets(record["block_bytes"], (metadata, sizes[0]), (data, sizes[1]))
        mapper.load(self._store.metadata, linear)
        through = _numbers(mapper.info(self._store.metadata).device)
        mapper.load(self._store.pool, pool._replace(parameters=f"{through} {pool.parameters}"))

    def check(self) -> list[str]:
        """Return what is wrong: in service what the kernel tells, out of service what thin_check(8) finds."""
        status = self._store.status()
        if status.state != "absent":
            return [] if status.state == READY else [f"the pool is {status.state}: {status.advice}"]
        try:
            ext4.run([self._settings["thin_check"], self._load()["metadata"]])
        except StoreError as error:
            return [str(error)]
        return []

    def _option(self, options: Mapping[str, Any], name: str) -> int:
        return int(options.get(name) or self._settings[name])

    def _load(self) -> dict[str, Any]:
        try:
            with open(self._record, encoding="utf-8") as file:
                return dict(json.load(file))
        except FileNotFoundError:
            raise StoreError("pool", f"there is no pool: {self._record} is missing") from None

    def _assemble(self, record: Mapping[str, Any]) -> None:
        """Make the metadata and the pool device; loop devices live as long as those hold them."""
        mapper, prefix = self._store.mapper, _UUID + record["identity"]
        with ExitStack() as held, ExitStack() as undo:
            backings = []
            for part in ("metadata", "data"):
                device = _open_backing(record[part])
                held.callback(os.close, device)
                backings.append((_numbers(os.fstat(device).st_rdev), os.lseek(device, 0, os.SEEK_END)))
            linear, pool = _targets(record["block_bytes"], *backings)
            self._store.remove(self._store.metadata)  # a crash between the two leaves the first
            mapper.create(self._store.metadata, f"{prefix}-meta", linear)
            undo.callback(self._store.remove, self._store.metadata)
            through = _numbers(mapper.info(self._store.metadata).device)
            mapper.create(self._store.pool, prefix, pool._replace(parameters=f"{through} {pool.parameters}"))
            undo.pop_all()

    def _base_uuid(self) -> str:
        path = self._store.activate(BASE, read_only=True)
        try:
            with open(path, "rb") as device:
                return str(uuid.UUID(bytes=os.pread(device.fileno(), 16, _EXT4_UUID_AT)))
        finally:
            self._store.deactivate(BASE)


def _targets(block_bytes: int, metadata: tuple[str, int], data: tuple[str, int]) -> tuple[Target, Target]:
    """Return the tables of the metadata's linear device and, without its first word, of the pool.

    Raises StoreError("refused") for sizes that the kernel would take and then not get along with.
    """
    if block_bytes % _MIN_BLOCK_BYTES or not _MIN_BLOCK_BYTES <= block_bytes <= _MAX_BLOCK_BYTES:
        raise StoreError(
            "refused", f"blocks of {block_bytes} bytes: expected a multiple of {_MIN_BLOCK_BYTES} to 1 GiB"
        )
    blocks = data[1] // block_bytes
    # A leaf of the mapping tree holds 126 blocks (thin_metadata_size(8)); 64 more hold the rest of an empty pool.
    floor = (64 + -(-blocks // 126)) * _METADATA_BLOCK_BYTES
    if metadata[1] < floor or not blocks:
        found = f"{metadata[1]} bytes of metadata for {blocks} blocks of {block_bytes} bytes"
        raise StoreError("refused", f"{found}: expected at least {floor} and one block; larger blocks need less")
    linear = Target(min(metadata[1], _MAX_METADATA_BYTES), "linear", f"{metadata[0]} 0")
    sectors = block_bytes // SECTOR_BYTES
    return linear, Target(blocks * block_bytes, "thin-pool", f"{data[0]} {sectors} 0 1 error_if_no_space")


def _parse_status(text: str, block_bytes: int, identity: str) -> PoolStatus:
    """Tell the states apart (kernel, Documentation/admin-guide/device-mapper/thin-provisioning.rst, "Status")."""
    fields = text.split()
    if len(fields) < 8:  # "Fail" or "Error"
        return PoolStatus("failed", block_bytes=block_bytes, identity=identity, advice=_ADVICE["failed"])
    transaction, metadata, data, _, mode, _, _, needs_check = fields[:8]
    state = {"rw": READY, "ro": "read_only", "out_of_data_space": "out_of_data"}.get(mode, "failed")
    state = "needs_check" if needs_check == "needs_check" else state
    metadata_used, metadata_total = (int(part) * _METADATA_BLOCK_BYTES for part in metadata.split("/"))
    data_used, data_total = (int(part) * block_bytes for part in data.split("/"))
    return PoolStatus(state, data_total, data_used, metadata_total, metadata_used, block_bytes, identity,
                      int(transaction), _ADVICE.get(state, ""))  # fmt: skip


def _read_devices(path: str, superblock: int) -> set[int]:
    """Return the keys of the device tree below a snapshot of the metadata (kernel, drivers/md/dm-thin-metadata.c).

    Read past the page cache, which the kernel's own writes do not go through.
    """
    device = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    page = mmap.mmap(-1, _METADATA_BLOCK_BYTES)
    try:
        found, waiting = set(), [superblock]
        while waiting:
            block = waiting.pop()
            os.preadv(device, [page], block * _METADATA_BLOCK_BYTES)
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


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _make_blank(path: str, size_bytes: int, undo: ExitStack) -> None:
    """Make a file with all its space, or see that a block device is unused and blank."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        # open(2): O_EXCL on a block device is EBUSY while somebody uses it.
        with open(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC), "rb") as device:
            if not stat.S_ISBLK(os.fstat(device.fileno()).st_mode) or any(device.read(_BLANK_BYTES)):
                raise StoreError("refused", f"{path} is no blank block device, and nothing is overwritten") from None
        return
    with open(file, "rb"):
        undo.callback(os.unlink, path)
        os.posix_fallocate(file, 0, size_bytes)


def _open_backing(path: str) -> int:
    """Open a block device, or a new loop device over a file."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if stat.S_ISBLK(os.fstat(file).st_mode):
        return file
    try:
        return loops.attach(file, read_only=False)[0]
    finally:
        os.close(file)


def _extend(path: str, size_bytes: int) -> None:
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode) or os.fstat(file).st_size > size_bytes:
            raise StoreError(
                "refused", f"{path} is no file of at most {size_bytes} bytes: enlarge a device by its own tool"
            )
        os.posix_fallocate(file, 0, size_bytes)
    finally:
        os.close(file)


def _size_in_service(path: str, numbers: str) -> int:
    """Return the size of a part of the pool, after its loop device, if it has one, looked at its file again."""
    is_file = stat.S_ISREG(os.stat(path).st_mode)
    device = os.open(f"/dev/loop{numbers.partition(':')[2]}" if is_file else path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if is_file:
            fcntl.ioctl(device, _LOOP_SET_CAPACITY)
        return os.lseek(device, 0, os.SEEK_END)
    finally:
        os.close(device)


def _write_durably(path: str, text: str) -> None:
    """Put a small file in place so that after a crash it is the old one or the new one, whole."""
    with open(path + ".new", "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def open_store(settings: Mapping[str, Any], state_dir: str) -> ThinStore:
    """Return the store; nothing is opened yet."""
    return ThinStore(settings, state_dir)


def open_pool(settings: Mapping[str, Any], state_dir: str) -> ThinPool:
    """Return the pool; nothing is opened yet."""
    return ThinPool(settings, state_dir)
