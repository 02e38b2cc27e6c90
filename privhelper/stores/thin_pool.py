"""Make, attach, grow and check a thin pool: root's own commands, never a request's.

Rule 1: a pool is made on blank devices or new files only; nothing that has content is ever formatted or overwritten.
Rule 2: metadata passes thin_check(8) before the kernel sees it, which also keeps the kernel from formatting metadata
        that somebody blanked: of a superblock of zeros it makes a new, empty pool.
Rule 3: a pool is ours if the file system in its base has the UUID that pool.json has, and its making was finished.
"""

import contextlib
import fcntl
import json
import os
import stat
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Final

from privhelper import files, loops
from privhelper.dm import SECTOR_BYTES, Target
from privhelper.stores import ext4
from privhelper.stores.base import BASE, READY, StoreError
from privhelper.stores.thin import METADATA_BLOCK_BYTES, UUID_PREFIX, ThinStore, numbers

_MAX_METADATA_BYTES: Final = 255 * ((1 << 14) - 64) * METADATA_BLOCK_BYTES  # THIN_METADATA_MAX_SECTORS
_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES = 1 << 16, 1 << 30
_BLANK_BYTES: Final = 1 << 20  # what must be zero at the start of a device that a pool is made on
_LOOP_SET_CAPACITY: Final = 0x4C07
_EXT4_UUID_AT: Final = 1024 + 0x68  # s_uuid of the first superblock


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
        """Bring the pool into service after its metadata passed thin_check(8); attached already is fine."""
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
        through = numbers(mapper.info(self._store.metadata).device)
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
        mapper, prefix = self._store.mapper, UUID_PREFIX + record["identity"]
        with ExitStack() as held, ExitStack() as undo:
            backings = []
            for part in ("metadata", "data"):
                device = _open_backing(record[part])
                held.callback(os.close, device)
                backings.append((numbers(os.fstat(device).st_rdev), os.lseek(device, 0, os.SEEK_END)))
            linear, pool = _targets(record["block_bytes"], *backings)
            self._store.remove(self._store.metadata)  # a crash between the two leaves the first
            mapper.create(self._store.metadata, f"{prefix}-meta", linear)
            undo.callback(self._store.remove, self._store.metadata)
            through = numbers(mapper.info(self._store.metadata).device)
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
    floor = (64 + -(-blocks // 126)) * METADATA_BLOCK_BYTES
    if metadata[1] < floor or not blocks:
        found = f"{metadata[1]} bytes of metadata for {blocks} blocks of {block_bytes} bytes"
        raise StoreError("refused", f"{found}: expected at least {floor} and one block; larger blocks need less")
    linear = Target(min(metadata[1], _MAX_METADATA_BYTES), "linear", f"{metadata[0]} 0")
    sectors = block_bytes // SECTOR_BYTES
    return linear, Target(blocks * block_bytes, "thin-pool", f"{data[0]} {sectors} 0 1 error_if_no_space")


def _make_blank(path: str, size_bytes: int, undo: ExitStack) -> None:
    """Make a file with all its space, or see that a block device is unused and blank."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        _refuse_lvm_pool(path)
        # open(2): O_EXCL on a block device is EBUSY while somebody uses it.
        with open(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC), "rb") as device:
            if not stat.S_ISBLK(os.fstat(device.fileno()).st_mode) or any(device.read(_BLANK_BYTES)):
                raise StoreError("refused", f"{path} is no blank block device, and nothing is overwritten") from None
        return
    with open(file, "rb"):
        undo.callback(os.unlink, path)
        files.claim(file, path, size_bytes)


def _refuse_lvm_pool(path: str) -> None:
    """Refuse what LVM's own thin pools consist of (lvmthin(7)); plain logical volumes are as good as other devices.

    LVM activates them by itself and gives a pool up whose transaction id is not the one that it has counted to.
    """
    with contextlib.suppress(FileNotFoundError):  # no device-mapper device
        with open(f"/sys/dev/block/{numbers(os.stat(path).st_rdev)}/dm/uuid", encoding="ascii") as file:
            uuid = file.read().strip()
        if uuid.startswith("LVM-") and uuid.endswith(("-tdata", "-tmeta", "-tpool", "-pool")):
            reason = "is LVM's thin pool or part of it, and LVM counts its transactions: give two plain logical volumes"
            raise StoreError("refused", f"{path} {reason}")


def _open_backing(path: str) -> int:
    """Open a block device, or a new loop device over a file."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if stat.S_ISBLK(os.fstat(file).st_mode):
        return file
    try:
        return loops.attach(file, f"pool {path}", read_only=False)[0]
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
    files.sync_folder(os.path.dirname(path))
