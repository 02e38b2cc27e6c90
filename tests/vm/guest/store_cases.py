"""What the thin store must do on a real kernel: runs inside the guest, as root, one case a process.

Rule 1: a case makes a pool of its own, below /scratch and with a device-mapper name of its own, and leaves nothing.
Rule 2: what the store says is held against other programs: thin_ls, thin_check, blockdev, losetup, e2fsck.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from privhelper.dm import DeviceMapper, Target
from privhelper.stores import base, thin, thin_pool

MIB = 1 << 20
NAME = "imgpull"
ALICE, MALLORY = 1500, 1501
META_DISK, DATA_DISK = "/dev/disk/by-id/virtio-meta", "/dev/disk/by-id/virtio-data"


def sh(script: str) -> str:
    """Run a shell script that stops at its first failure and return its output."""
    done = subprocess.run(["/bin/bash", "-euc", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{script}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def blank(disk: str) -> str:
    """Overwrite the start of a scratch disk, where every signature is."""
    sh(f"dd if=/dev/zero of={disk} bs=1M count=8 conv=fsync status=none")
    return disk


class Rig:
    """One pool with its directory; small numbers so that it is made in half a second."""

    def __init__(self, folder: str, **changes: Any) -> None:
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        self.settings: dict[str, Any] = {
            "name": NAME, "metadata_bytes": 2 * MIB, "data_bytes": 128 * MIB, "block_bytes": 64 << 10,
            "base_bytes": 256 * MIB, "base_inodes": 4096, "journal_mib": 4, "wait_s": 2,
            "thin_check": "/usr/sbin/thin_check", **changes,
        }  # fmt: skip
        self.store = thin.ThinStore(self.settings, folder)
        self.pool = thin_pool.ThinPool(self.settings, folder)

    def file(self, name: str) -> str:
        return os.path.join(self.folder, "thin", name)

    def snapshot(self, dev: int, origin: int) -> None:
        """Do what the ledger's caller does: the change, then the mark."""
        self.store.create(dev, origin)
        self.store.advance(self.store.status().transaction)

    @contextlib.contextmanager
    def active(self, dev: int, read_only: bool = False) -> Iterator[str]:
        path = self.store.activate(dev, read_only)
        try:
            yield path
        finally:
            self.store.deactivate(dev)

    @contextlib.contextmanager
    def mounted(self, dev: int) -> Iterator[str]:
        with self.active(dev) as path:
            folder = f"/run/mounted-{dev}"
            sh(f"mkdir -p {folder}; mount {path} {folder}")
            try:
                yield folder
            finally:
                sh(f"umount {folder}")


@contextlib.contextmanager
def rig(**changes: Any) -> Iterator[Rig]:
    """Make a pool, hand it out, and see that nothing is left when it is gone."""
    before = traces()
    made = Rig("/scratch/pool", **changes)
    options: dict[str, Any] = {part: made.settings.pop(part) for part in ("metadata", "data") if part in changes}
    made.pool.create(options)
    try:
        yield made
    finally:
        for dev in made.store.active():
            made.store.deactivate(dev)
        made.pool.detach()
        sh("rm -rf /scratch/pool")
    assert_nothing_left(before)


def traces() -> list[str]:
    """Return what a leak would show in: device-mapper devices, bound loop devices, mounts of ours."""
    bound = [name for name in os.listdir("/sys/block") if os.path.exists(f"/sys/block/{name}/loop/backing_file")]
    with open("/proc/mounts") as file:
        mounts = [line for line in file if "/run/mounted" in line]
    return sorted(DeviceMapper().names() + bound + mounts)


def assert_nothing_left(before: list[str]) -> None:
    """Give the kernel time: it unbinds a loop device after its last user is gone."""
    deadline_s = time.monotonic() + 60
    while traces() != before and time.monotonic() < deadline_s:
        time.sleep(0.02)
    found = traces()
    assert found == before, f"left behind: {found}, before: {before}"


@contextlib.contextmanager
def refused(code: str, text: str) -> Iterator[None]:
    """Expect a StoreError of this code whose message says this."""
    try:
        yield
    except base.StoreError as error:
        assert error.code == code and re.search(text, str(error)), f"{error.code}: {error}"
    else:
        raise AssertionError(f"expected StoreError {code} {text!r}, and it went through")


def digest(path: str, length: int = -1) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(length)).hexdigest()


def thin_ls(made: Rig) -> set[int]:
    """Ask the independent tool; the pool must be out of service."""
    made.pool.detach()
    found = {int(word) for word in sh(f"thin_ls --no-headers -o DEV {made.file('metadata')}").split()}
    made.pool.attach()
    return found - {base.BASE}


# ---------------------------------------------------------------- making and attaching


def case_the_sizes_of_the_brief_make_a_pool() -> None:
    """1 MiB of metadata and 2 GiB of data in blocks of 1 MiB."""
    with rig(metadata_bytes=MIB, data_bytes=2 << 30, block_bytes=MIB, base_bytes=10 << 30) as made:
        status = made.store.status()
        assert status.state == base.READY, status
        assert (status.metadata_bytes, status.data_bytes, status.block_bytes) == (MIB, 2 << 30, MIB), status
        assert os.stat(made.file("data")).st_blocks * 512 >= 2 << 30, "the file's bytes are claimed"
        for dev in range(1, 16):
            made.snapshot(dev, dev - 1)
        assert made.store.devices() == set(range(1, 16))
        used = [figures.metadata_used_bytes >> 10 for figures in (status, made.store.status())]
        print(
            f"empty base: {status.data_used_bytes >> 20} MiB of data; metadata {used[0]} KiB, with 15 copies {used[1]}"
        )


def case_metadata_too_small_for_the_data_is_refused_with_the_right_number() -> None:
    made = Rig("/scratch/pool", metadata_bytes=MIB, data_bytes=2 << 30)
    before = traces()
    with refused("refused", "expected at least 1331200"):
        made.pool.create({})
    assert os.listdir("/scratch/pool/thin") == []
    assert_nothing_left(before)
    made.settings["metadata_bytes"] = 1331200
    made.pool.create({})
    assert made.store.status().state == base.READY
    made.pool.detach()
    sh("rm -rf /scratch/pool")


def case_an_illegal_block_size_is_refused() -> None:
    made = Rig("/scratch/pool")
    for block_bytes in (4096, 96 << 10, 2 << 30):
        with refused("refused", "multiple of 65536"):
            made.pool.create({"block_bytes": block_bytes})
    sh("rm -rf /scratch/pool")


def case_a_second_pool_is_refused() -> None:
    with rig() as made:
        identity = made.store.status().identity
        with refused("pool", "there is a pool already"):
            made.pool.create({})
        made.pool.detach()
        with refused("pool", "there is a pool already"):
            made.pool.create({})
        made.pool.attach()
        assert made.store.status().identity == identity


def case_devices_with_content_are_refused_and_untouched() -> None:
    """Attack: have root make its pool on a disk in use by somebody else."""
    victim, metadata = DATA_DISK, blank(META_DISK)
    sh(f"mkfs.ext4 -q {victim}")
    before = digest(victim, 64 * MIB)
    made = Rig("/scratch/pool")
    with refused("refused", "nothing is overwritten"):
        made.pool.create({"metadata": metadata, "data": victim})
    assert digest(victim, 64 * MIB) == before
    sh(f"mkdir -p /run/victim; mount {victim} /run/victim")
    try:
        made.pool.create({"metadata": metadata, "data": victim})
    except OSError as error:
        assert error.errno == errno.EBUSY, error
    else:
        raise AssertionError("a mounted device was taken")
    finally:
        sh("umount /run/victim")
    sh(f"e2fsck -fn {victim}")
    blank(victim)
    sh("rm -rf /scratch/pool")


def case_a_file_that_exists_is_refused_and_untouched() -> None:
    os.makedirs("/scratch/pool", exist_ok=True)
    with open("/scratch/pool/mine", "w") as file:
        file.write("mine")
    with refused("refused", "nothing is overwritten"):
        Rig("/scratch/pool").pool.create({"metadata": "/scratch/pool/mine"})
    assert sh("cat /scratch/pool/mine") == "mine"
    sh("rm -rf /scratch/pool")


def case_two_block_devices_make_a_pool_that_survives_a_detach() -> None:
    with rig(metadata=blank(META_DISK), data=blank(DATA_DISK)) as made:
        made.snapshot(1, 0)
        with made.mounted(1) as folder:
            sh(f"echo kept > {folder}/file")
        made.pool.detach()
        assert made.store.status().state == "absent"
        made.pool.attach()
        with made.mounted(1) as folder:
            assert sh(f"cat {folder}/file") == "kept"
    blank(META_DISK)
    blank(DATA_DISK)


def case_plain_logical_volumes_make_a_pool_and_lvms_own_pools_are_refused() -> None:
    """As LVM names them: LVM-<VG><LV>, with a suffix for the hidden volumes of a pool (lvm2, lib/misc/lvm-string.c)."""
    disks = {"meta": blank(META_DISK), "data": blank(DATA_DISK)}
    try:
        for part, disk in disks.items():
            for suffix in ("", f"-t{part}"):
                table = f"0 {64 * MIB // 512 if part == 'meta' else 256 * MIB // 512} linear {disk} 0"
                sh(f"dmsetup create vg-{part}{suffix} -u LVM-{'x' * 32}{part}{suffix} --table '{table}'")
        made = Rig("/scratch/pool")
        for parts in (("meta-tmeta", "data"), ("meta", "data-tdata")):
            paths = [f"/dev/mapper/vg-{part}" for part in parts]
            with refused("refused", "give two plain logical volumes"):
                made.pool.create(dict(zip(("metadata", "data"), paths, strict=True)))
        with rig(metadata="/dev/mapper/vg-meta", data="/dev/mapper/vg-data") as made:
            made.snapshot(1, 0)
            made.pool.detach()
            made.pool.attach()
            assert made.store.devices() == {1}
    finally:
        sh("udevadm settle; for name in $(dmsetup ls | awk '/^vg-/ {print $1}'); do dmsetup remove --retry $name; done")
        for disk in disks.values():
            blank(disk)


def case_blanked_metadata_is_refused_and_not_formatted() -> None:
    """The kernel would make a new, empty pool of it; all images would be gone without a word."""
    with rig() as made:
        made.snapshot(1, 0)
        made.pool.detach()
        path = made.file("metadata")
        sh(f"cp {path} /scratch/kept; dd if=/dev/zero of={path} bs=4k count=1 conv=notrunc status=none")
        with refused("pool", "thin_check"):
            made.pool.attach()
        assert set(sh(f"head -c 4096 {path} | od -An -v -tx1").split()) == {"00"}
        assert made.pool.check() != []
        sh(f"mv /scratch/kept {path}")
        made.pool.attach()
        assert made.store.devices() == {1}


def case_a_pool_that_is_not_ours_is_refused() -> None:
    """Another pool's files under our record: its base has another identity."""
    with rig() as made:
        made.pool.detach()
        sh("mv /scratch/pool/thin /scratch/other; mkdir /scratch/pool/thin")
        os.makedirs("/scratch/pool/thin", exist_ok=True)
        made.pool.create({})
        made.pool.detach()
        sh("cp /scratch/other/metadata /scratch/other/data /scratch/pool/thin/")
        with refused("pool", "not the pool that was created here"):
            made.pool.attach()
        assert made.store.status().state == "absent", "nothing of it stays in service"
        sh("rm -r /scratch/pool/thin; mv /scratch/other /scratch/pool/thin")
        made.pool.attach()


def case_a_pool_whose_making_was_cut_short_is_refused() -> None:
    with rig() as made:
        record = json.loads(sh(f"cat {made.file('pool.json')}"))
        # As a crash before the last step of `create` leaves it.
        made.pool.detach()
        path, change = made.file("metadata"), "s/transaction=.1./transaction='0'/"
        sh(f'thin_dump {path} | sed "{change}" > /scratch/dump; cp {path} /scratch/kept; '
           f"thin_restore -q -i /scratch/dump -o {path}")  # fmt: skip
        with refused("pool", "not the pool that was created here"):
            made.pool.attach()
        sh(f"mv /scratch/kept {path}; rm /scratch/dump")
        made.pool.attach()
        assert made.store.status().identity == record["identity"]


def case_foreign_devices_with_our_names_are_left_alone() -> None:
    sh(f"dmsetup create {NAME}-pool --table '0 8 zero'; dmsetup create {NAME}-7 --table '0 8 zero'")
    try:
        made = Rig("/scratch/pool")
        assert made.store.status().state == "failed"
        assert made.store.active() == {}
        with refused("pool", "is not imgpull's"):
            made.store.deactivate(7)
        with refused("pool", "is not imgpull's"):
            made.pool.detach()
        with refused("pool", "there is a pool already"):
            made.pool.create({})
        assert len(sh("dmsetup ls --noheadings").splitlines()) == 2
    finally:
        sh(f"dmsetup remove {NAME}-pool; dmsetup remove {NAME}-7; rm -rf /scratch/pool")


def case_what_a_crash_left_of_an_attach_does_not_hinder_the_next() -> None:
    with rig() as made:
        identity = made.store.status().identity
        made.pool.detach()
        sh(f"dmsetup create {NAME}-meta -u IMGPULL-{identity}-meta --table '0 4096 zero'")
        made.pool.attach()
        made.pool.detach()
        sh(f"dmsetup create {NAME}-pool -u IMGPULL-{identity} --notable")
        assert made.store.status().state == "failed", made.store.status()
        made.pool.detach()
        made.pool.attach()
        assert made.store.status().state == base.READY


# ---------------------------------------------------------------- devices


def case_a_copy_and_its_origin_go_their_own_ways() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        with made.mounted(1) as folder:
            sh(f"echo first > {folder}/shared")
        made.store.settle(1)
        made.snapshot(2, 1)
        with made.mounted(2) as folder:
            assert sh(f"cat {folder}/shared") == "first"
            sh(f"echo second > {folder}/shared")
        with made.mounted(1) as folder:
            assert sh(f"cat {folder}/shared") == "first"
        made.store.delete(1)
        with made.active(2) as path:
            sh(f"e2fsck -fn {path}")
        assert made.store.devices() == {2}


def case_a_number_that_exists_is_never_taken_for_ours() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        with refused("fault", "File exists"):
            made.store.create(1, 0)
        with refused("fault", "No data available"):
            made.store.create(2, 99)
        assert made.store.devices() == {1}


def case_an_active_device_is_no_origin() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        with made.active(1), refused("busy", "cannot be copied"):
            made.store.create(2, 1)
        with made.active(1), refused("busy", "active already"):
            made.store.activate(1, False)
        assert made.store.devices() == {1}


def case_a_read_only_device_cannot_be_written() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        with made.active(1, read_only=True) as path:
            assert sh(f"blockdev --getro {path}") == "1"
            before = digest(path, MIB)
            sh(f"! dd if=/dev/urandom of={path} bs=4k count=1 conv=fsync 2>/dev/null")
            assert digest(path, MIB) == before


def case_a_device_that_somebody_has_open_is_busy_and_goes_later() -> None:
    with rig(wait_s=0.2) as made:
        made.snapshot(1, 0)
        path = made.store.activate(1, False)
        with open(path, "rb"), refused("busy", "keeps imgpull-1 open"):
            made.store.deactivate(1)
        made.store.deactivate(1)
        made.store.deactivate(1)
        assert made.store.active() == {}


def case_a_larger_device_keeps_its_size_and_its_content() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        made.store.resize(1, 512 * MIB)
        made.store.resize(1, 300 * MIB)
        assert made.store.size_bytes(1) == 512 * MIB
        made.pool.detach()
        made.pool.attach()
        with made.active(1) as path:
            assert sh(f"blockdev --getsize64 {path}") == str(512 * MIB)
            sh(f"e2fsck -fn {path}")
        made.store.delete(1)
        assert made.store.size_bytes(1) == 256 * MIB


def case_a_half_made_device_of_a_crash_is_seen_and_freed() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        identity = made.store.status().identity
        sh(f"dmsetup create {NAME}-1 -u IMGPULL-{identity}-1 --notable")
        assert list(made.store.active()) == [1]
        made.store.delete(1)
        assert made.store.active() == {} and made.store.devices() == set()
        made.store.delete(1)


def case_the_list_of_devices_is_that_of_thin_ls_also_past_one_leaf() -> None:
    with rig(metadata_bytes=8 * MIB) as made:
        mapper = DeviceMapper()
        for dev in range(1, 301):
            mapper.message(f"{NAME}-pool", f"create_snap {dev} 0")
        assert made.store.devices() == set(range(1, 301))
        for dev in range(3, 301, 3):
            mapper.message(f"{NAME}-pool", f"delete {dev}")
        mapper.message(f"{NAME}-pool", "reserve_metadata_snap")  # as a crash may leave it: stale
        mapper.message(f"{NAME}-pool", "delete 1")
        found = made.store.devices()
        assert found == thin_ls(made) == set(range(1, 301)) - set(range(3, 301, 3)) - {1}
        assert made.store.status().state == base.READY


def case_a_deleted_devices_bytes_never_show_again() -> None:
    """Attack: write one sector to a fresh device and read what else is in its block."""
    with rig(data_bytes=64 * MIB) as made:
        made.snapshot(1, 0)
        with made.active(1) as path, open(path, "r+b") as device:
            device.seek(100 * MIB)
            for _ in range(30):
                device.write(b"SECRET!!" * (MIB // 8))
            device.flush()
            os.fsync(device.fileno())
        made.store.delete(1)
        made.snapshot(2, 0)
        with made.active(2) as path:
            with open(path, "r+b") as device:
                for block in range(0, 40 * MIB, 64 << 10):
                    os.pwrite(device.fileno(), b"x" * 512, 100 * MIB + block)
                os.fsync(device.fileno())
            sh("echo 3 > /proc/sys/vm/drop_caches")
            with open(path, "rb") as device:
                device.seek(100 * MIB)
                assert b"SECRET" not in device.read(45 * MIB)


def case_another_writers_transaction_id_is_noticed() -> None:
    with rig() as made:
        assert made.store.advance(1) == 2
        DeviceMapper().message(f"{NAME}-pool", "set_transaction_id 2 7")
        with refused("pool", "transaction 7, expected 2"):
            made.store.advance(2)


def case_udev_neither_links_nor_probes_and_leaves_the_grant() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        sh("udevadm settle")
        with made.active(1) as path:
            made.store.grant(path, ALICE, True)
            assert may_write(path, ALICE), "before udev has looked"
            sh("udevadm settle; udevadm trigger --action=change --settle " + path)
            assert may_write(path, ALICE) and not may_write(path, MALLORY), sh(f"getfacl {path} || ls -l {path}")
            assert not os.path.exists(f"/dev/mapper/{NAME}-1")
            by_uuid = "/dev/disk/by-uuid"
            links = os.listdir(by_uuid) if os.path.isdir(by_uuid) else []
            assert path not in {os.path.realpath(f"{by_uuid}/{name}") for name in links}
            assert "ID_FS" not in sh(f"udevadm info {path}")


def may_write(path: str, uid: int) -> bool:
    """Try as this user, who is in no group."""
    program = f"import os; os.close(os.open({path!r}, os.O_RDWR))"
    argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "python3", "-ISc", program]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def case_activation_costs_the_same_at_the_end_of_a_long_chain() -> None:
    """What is written to the pool's metadata is counted: a copy of the 128th layer is no more than one of the first."""
    with rig(metadata_bytes=16 * MIB, data_bytes=512 * MIB) as made:
        for dev in range(1, 129):
            made.snapshot(dev, dev - 1)
        written = {}
        for dev in (1, 64, 128):
            before = sectors_written(f"{NAME}-meta")
            made.snapshot(1000 + dev, dev)
            with made.active(1000 + dev) as path:
                written[dev] = sectors_written(f"{NAME}-meta") - before
                sh(f"e2fsck -fn {path}")
        assert 0 < max(written.values()) <= min(written.values()) + 64, written
        print(f"sectors of metadata written to copy and activate layer 1, 64, 128 of a chain: {written}")


def sectors_written(name: str) -> int:
    """Return how much was ever written to a device-mapper device (kernel, Documentation/block/stat.rst)."""
    minor = os.minor(DeviceMapper().info(name).device)
    with open(f"/sys/block/dm-{minor}/stat") as file:
        return int(file.read().split()[6])


# ---------------------------------------------------------------- trouble


def fill(path: str, offset: int, length: int) -> None:
    """Write until the pool refuses; raises OSError."""
    with open(path, "r+b", buffering=0) as device:
        device.seek(offset)
        for _ in range(length // MIB):
            device.write(b"\xa5" * MIB)
        os.fsync(device.fileno())


def case_a_full_pool_errors_at_once_refuses_copies_and_recovers_by_a_delete() -> None:
    with rig(data_bytes=64 * MIB) as made:
        made.snapshot(1, 0)
        made.snapshot(2, 0)
        with made.mounted(2) as folder:
            sh(f"head -c 1M /dev/urandom > {folder}/kept; sync -f {folder}; sha256sum {folder}/kept > /run/kept")
        with made.active(1) as path:
            try:
                fill(path, 100 * MIB, 100 * MIB)
            except OSError as error:
                assert error.errno in (errno.EIO, errno.ENOSPC), error
            else:
                raise AssertionError("100 MiB went into 64 MiB")
        modes = [line for line in sh("dmesg").splitlines() if "switching pool to out-of-data-space" in line]
        assert "(error IO)" in modes[-1], f"a writer waited for space: {modes[-1]}"
        status = made.store.status()
        assert status.state == "out_of_data" and "remove images" in status.advice, status
        with refused("no_room", "out_of_data"):
            made.store.settle(1)
        with refused("no_room", "out_of_data"):
            made.store.create(3, 2)
        made.store.delete(3)
        made.store.delete(1)
        assert made.store.status().state == base.READY
        made.snapshot(4, 2)
        with made.mounted(4) as folder:
            assert sh(f"sha256sum < {folder}/kept").split()[0] == sh("cat /run/kept").split()[0]


def case_a_full_pool_recovers_by_growing_in_service() -> None:
    with rig(data_bytes=64 * MIB) as made:
        made.snapshot(1, 0)
        with made.active(1) as path:
            with contextlib.suppress(OSError):
                fill(path, 100 * MIB, 100 * MIB)
            assert made.store.status().state == "out_of_data"
            made.pool.grow({"data_bytes": 192 * MIB})
            assert made.store.status().state == base.READY, made.store.status()
            assert made.store.status().data_bytes == 192 * MIB
            fill(path, 100 * MIB, 100 * MIB)


def case_full_metadata_is_told_apart_and_recovers_by_growing() -> None:
    with rig(metadata_bytes=512 << 10) as made:
        made.snapshot(1, 0)
        mapper, dev = DeviceMapper(), 1
        with contextlib.suppress(OSError):
            for dev in range(100, 1000):
                mapper.message(f"{NAME}-pool", f"create_thin {dev}")  # one block each; a snapshot shares its origin's
        status = made.store.status()
        assert status.state in ("read_only", "needs_check"), status
        with refused("pool", "grow --metadata-bytes|clear-needs-check"):
            made.store.delete(1)
        print(f"{dev - 100} devices filled 512 KiB of metadata: {status.state}")
        if status.state == "needs_check":
            made.pool.detach()
            sh(f"thin_check --clear-needs-check-flag {made.file('metadata')}")
            made.pool.attach()
        made.pool.grow({"metadata_bytes": 4 * MIB})
        assert made.store.status().state == base.READY, made.store.status()
        made.store.create(2000, 1)
        made.store.delete(2000)
        assert 1 in made.store.devices()


@contextlib.contextmanager
def flaky(made: Rig) -> Iterator[None]:
    """Make every write to the pool's metadata fail, underneath the linear device that the store made."""
    mapper = DeviceMapper()
    linear = mapper.table(f"{NAME}-meta")
    flakey = Target(linear.length_bytes, "flakey", f"{linear.parameters} 0 3600 1 error_writes")
    sh("modprobe dm-flakey")
    mapper.load(f"{NAME}-meta", flakey)
    try:
        yield
    finally:
        mapper.load(f"{NAME}-meta", linear)


def case_a_commit_that_did_not_reach_the_disk_is_noticed_though_the_kernel_reports_success() -> None:
    with rig() as made:
        made.snapshot(1, 0)
        made.snapshot(2, 1)
        with flaky(made):
            with refused("pool", "needs_check|read_only|failed"):
                made.store.create(3, 1)
            status = made.store.status()
            assert status.state in ("needs_check", "failed"), status
            with refused("fault", status.state):
                made.store.settle(2)
            with refused("pool", status.state):
                made.store.delete(1)
        # The way out that the status names.
        assert "pool detach" in status.advice
        made.pool.detach()
        sh(f"thin_check --clear-needs-check-flag {made.file('metadata')}")
        made.pool.attach()
        assert made.store.status().state == base.READY
        assert made.store.devices() == {1, 2}, "the failed copy is not there, what was there is"
        made.snapshot(4, 2)
        with made.active(4) as path:
            sh(f"e2fsck -fn {path}")


def case_a_data_error_dooms_only_the_device_that_is_written() -> None:
    disk = blank(DATA_DISK)
    sectors = 256 * MIB // 512
    good, bad = f"0 {sectors} linear {disk} 0", f"0 {sectors} flakey {disk} 0 0 3600 1 error_writes"
    sh(f"modprobe dm-flakey; dmsetup create faulty --table '{good}'")
    with rig(data="/dev/mapper/faulty") as made:
        made.snapshot(1, 0)
        with made.mounted(1) as folder:
            sh(f"head -c 1M /dev/urandom > {folder}/file; sha256sum {folder}/file > /run/sum")
        made.snapshot(2, 1)
        path = made.store.activate(2, False)
        sh(f"dmsetup suspend faulty; dmsetup load faulty --table '{bad}'; dmsetup resume faulty")
        try:
            fill(path, 100 * MIB, 4 * MIB)
        except OSError as error:
            assert error.errno == errno.EIO, error
        else:
            raise AssertionError("the error did not arrive")
        sh(f"dmsetup suspend faulty; dmsetup load faulty --table '{good}'; dmsetup resume faulty")
        made.store.deactivate(2)
        if made.store.status().state != base.READY:
            made.pool.detach()
            sh(f"thin_check --clear-needs-check-flag {made.file('metadata')}")
            made.pool.attach()
        made.store.delete(2)
        assert made.store.devices() == {1}
        made.snapshot(3, 1)
        with made.mounted(3) as folder:
            sh(f"sed 's#/run/mounted-1#{folder}#' /run/sum | sha256sum --check --quiet")
    sh("dmsetup remove faulty")
    blank(disk)
