"""Power cuts: a workload whose disk is recorded, and a check of the disk as a cut could have left it. Runs in guests.

  record DISK                 make a file system and a pool on DISK, commit, activate and remove; print what was done
  check LOG DISK STATES       for each state of the file STATES, put it on DISK and see that every promise holds
  control LOG DISK STATES     the same for a disk that ignores flushes: print how many states are found damaged

Rule 1: what the helper acknowledged is written to the disk's last sector, outside the file system, and flushed. So each
        state of the disk tells itself what must be there.
Rule 2: a check changes only a snapshot over DISK; DISK itself goes forward through the log.
Rule 3: content is compared by reading the device itself, not by asking the helper; for some states also by ``verify``.
"""

import contextlib
import hashlib
import json
import mmap
import os
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from privhelper import kernel, policy
from privhelper.dm import DeviceMapper, Target
from privhelper.stores import thin_pool
from privhelper.stores.base import StoreError
from tests.vm.blocklog import BlockLog
from tests.vm.guest import helper_cases as helper

SLOT_BYTES: Final = 32 << 10
NOTE_BYTES: Final = 2 * SLOT_BYTES  # at the end of the disk: two notes, the older is overwritten
COW_BYTES: Final = 256 << 20
NAME: Final = "cut"


def note_offset(disk: int) -> int:
    return os.lseek(disk, 0, os.SEEK_END) - NOTE_BYTES


class Notes:
    """What was acknowledged, on the disk itself."""

    def __init__(self, path: str) -> None:
        self._disk = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC | os.O_CLOEXEC)
        self._page = mmap.mmap(-1, SLOT_BYTES)
        self.facts: dict[str, Any] = {"number": 0, "pool": False, "layers": {}, "gone": [], "names": {}}

    def write(self) -> None:
        """Put the facts on the disk; returns when they are there."""
        self.facts["number"] += 1
        text = json.dumps(self.facts).encode()
        text = hashlib.sha256(text).hexdigest().encode() + text
        assert len(text) < SLOT_BYTES
        self._page[:] = text.ljust(SLOT_BYTES, b"\0")
        os.pwritev(self._disk, [self._page], note_offset(self._disk) + self.facts["number"] % 2 * SLOT_BYTES)


def read_notes(path: str) -> dict[str, Any] | None:
    """Return the newer of the two notes that are whole: a torn one was being written and acknowledges nothing."""
    found: list[dict[str, Any]] = []
    with open(path, "rb") as disk:
        disk.seek(note_offset(disk.fileno()))
        for _ in range(2):
            text = disk.read(SLOT_BYTES).rstrip(b"\0")
            if text and hashlib.sha256(text[64:]).hexdigest().encode() == text[:64]:
                found.append(json.loads(text[64:]))
    return max(found, key=lambda facts: int(facts["number"]), default=None)


# ---------------------------------------------------------------- the workload


def contents(layer: Any, below: dict[str, str]) -> dict[str, str]:
    """Return path and digest of every file that a layer's tree holds."""
    files, folders = dict(below), {0: ""}
    for number, text in enumerate(layer.lines, 1):
        line = json.loads(text)
        path = f"{folders[line['in']]}/{line['name']}".rstrip("/")
        if line["op"] in ("dir", "enter", "meta"):
            folders[number] = path
        elif line["op"] == "file":
            files[path] = line["sha256"]
        elif line["op"] == "remove":
            files.pop(path, None)
    return files


def record(disk: str) -> None:
    """Run the workload."""
    size = os.open(disk, os.O_RDONLY)
    blocks = note_offset(size) // 4096
    helper.run(
        "mkfs.ext4", "-q", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", disk, str(blocks)
    )
    os.makedirs("/scratch", exist_ok=True)
    helper.run("mount", disk, "/scratch")
    notes = Notes(disk)
    helper.FOLDER.mkdir()
    helper.CONFIG.write_text(helper.SETTINGS.format(data_bytes=96 << 20, metadata_bytes=4 << 20))
    os.sync()
    helper.administer("pool", "create")
    notes.facts["pool"] = True
    notes.write()
    trees: dict[str | None, dict[str, str]] = {None: {}}

    def commit(layer: Any) -> str:
        helper.assert_ok(helper.commit(layer))
        trees[layer.id()] = contents(layer, trees[layer.parent])
        notes.facts["layers"][layer.id()] = trees[layer.id()]
        notes.write()
        return str(layer.id())

    def remove(layer: str) -> None:
        del notes.facts["layers"][layer]  # from here on it may be there or not
        notes.write()
        helper.assert_ok(helper.ask("remove", layer=layer))
        notes.facts["gone"].append(layer)
        notes.write()

    def activate(layer: str, name: str) -> None:
        helper.assert_ok(helper.ask("activate", layer=layer, name=name, mode="rw", size=0))
        notes.facts["names"][name] = layer
        notes.write()

    def deactivate(name: str) -> None:
        del notes.facts["names"][name]
        notes.write()
        helper.assert_ok(helper.ask("deactivate", name=name))

    first = commit(helper.base_layer(files=4, size=30_000))
    second = commit(helper.upper_layer(first, "two"))
    activate(second, "one")
    third = commit(helper.upper_layer(first, "three"))
    deactivate("one")
    remove(second)
    fourth = commit(helper.upper_layer(third, "four", removes="new-three"))
    activate(fourth, "two")
    print(json.dumps({"layers": len(notes.facts["layers"])}))


# ---------------------------------------------------------------- the check


@contextlib.contextmanager
def snapshot_of(disk: str, cow: str) -> Iterator[str]:
    """Give a device that reads as ``disk`` and takes writes without changing it."""
    with open(cow, "r+b") as file:
        file.write(bytes(4096))  # a snapshot's store begins with a header: none is an empty one
    with open(disk, "rb") as file:
        size = file.seek(0, os.SEEK_END)
    mapper = DeviceMapper()
    path = mapper.create(NAME, "CUT-snapshot", Target(size, "snapshot", f"{disk} {cow} P 8"))
    try:
        yield path
    finally:
        mapper.remove(NAME, 10)


def check_state(path: str, facts: dict[str, Any] | None, thorough: bool) -> str:
    """Mount what the cut left, bring the pool up, converge, compare; return what kind of state it was."""
    if facts is None:
        return "before the pool"
    mount = kernel.mount_detached("ext4", path, [], 0)  # in this process: a program costs 50 ms here
    kernel.attach_mount(mount, "/scratch")
    os.close(mount)
    try:
        pool = thin_pool.ThinPool(policy.load(str(helper.CONFIG)).settings["thin"], str(helper.STATE))
        try:
            pool.attach()
        except StoreError as error:
            assert not facts["pool"], f"an acknowledged pool does not come up: {error}"
            return "pool unfinished"
        try:
            check_pool(facts, thorough)
        finally:
            kept = helper.store()
            for dev in kept.active():
                kept.deactivate(dev)
            pool.detach()
    finally:
        kernel.unmount("/scratch")
    return "ok"


def check_pool(facts: dict[str, Any], thorough: bool) -> None:
    helper.assert_ok(helper.ask("reconcile"))
    helper.check_promises()
    rows = helper.ledger_rows()
    sealed = {row["layer"]: row["dev"] for row in rows if row["state"] == "sealed"}
    assert facts["layers"].keys() <= sealed.keys(), "an acknowledged layer is lost"
    assert not set(facts["gone"]) & sealed.keys(), "a removed layer is back"
    granted = {row["name"]: row["layer"] for row in rows if row["kind"] == "activation"}
    assert facts["names"].items() <= granted.items(), "an acknowledged activation is lost"
    for layer, files in facts["layers"].items():
        compare(sealed[layer], files)
    if thorough:
        for layer in sealed:
            helper.assert_ok(helper.ask("verify", layer=layer))


def compare(dev: int, files: dict[str, str]) -> None:
    """Hold a sealed device's files against what was committed."""
    kept = helper.store()
    mount = kernel.mount_detached("ext4", kept.activate(dev, True), ["ro"], kernel.MOUNT_ATTR_RDONLY)
    try:
        root, found = kernel.open_root(mount), {}
        for top, _, names, folder in os.fwalk(".", dir_fd=root):
            for name in names:
                if stat.S_ISREG(os.lstat(name, dir_fd=folder).st_mode):
                    with open(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
                        found[os.path.join(top, name).removeprefix(".")] = hashlib.sha256(file.read()).hexdigest()
        os.close(root)
        assert found == files, f"device {dev} differs: {found.keys() ^ files.keys()}"
    finally:
        os.close(mount)
        kept.deactivate(dev)


def prepare(log_path: str, disk: str, states_path: str) -> tuple[BlockLog, list[tuple[int, int]], str]:
    """Blank the disk; return the log, the states (``[position, seed]``, ascending), a block device for a snapshot."""
    helper.run("blkdiscard", disk)
    # Nothing here needs udev, and its rules start programs for each device that comes and goes.
    units = ("systemd-udevd.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket")
    helper.run("systemctl", "stop", *units)
    with open(states_path) as file:
        states = [tuple(json.loads(line)) for line in file]
    os.makedirs("/scratch", exist_ok=True)
    if not os.path.ismount("/media"):
        helper.run("mount", "-t", "tmpfs", "-o", f"size={COW_BYTES + (1 << 20)}", "tmpfs", "/media")
    with open("/media/cow", "wb") as file:
        file.truncate(COW_BYTES)
    return BlockLog(log_path), states, helper.run("losetup", "--find", "--show", "/media/cow").strip()


def check(log_path: str, disk: str, states_path: str) -> None:
    """Try every state; print how many there were of each kind."""
    log, states, cow = prepare(log_path, disk, states_path)
    base, done, kinds = os.open(disk, os.O_RDWR), 0, Counter[str]()
    for number, (position, seed) in enumerate(states):
        settled = log.settled(position)
        log.apply(base, log.entries[done:settled])
        os.fsync(base)
        done = settled
        with snapshot_of(disk, cow) as path:
            over = os.open(path, os.O_RDWR)
            log.apply_tail(over, position, seed)
            os.fsync(over)
            os.close(over)
            try:
                kinds[check_state(path, read_notes(path), number % 10 == 0)] += 1
            except BaseException as error:
                print(f"FAILED at {position} seed {seed} of {len(log.entries)}: {error!r}", flush=True)
                raise
    print(json.dumps(kinds))


def control(log_path: str, disk: str, states_path: str) -> None:
    """See that the check can fail: a disk that ignores flushes loses what was acknowledged."""
    log, states, cow = prepare(log_path, disk, states_path)
    kinds = Counter[str]()
    for position, seed in states:
        base = os.open(disk, os.O_RDWR)
        log.apply_lying(base, position, seed)
        os.fsync(base)
        os.close(base)
        with snapshot_of(disk, cow) as path:
            try:
                kinds[check_state(path, read_notes(path), True)] += 1
            except Exception as error:  # whatever it is, it was noticed
                kinds["damaged"] += 1
                print(f"noticed: {error!r}"[:300])
    print(json.dumps(kinds))


def main() -> None:
    """Do what the command line says."""
    subprocess.run(["modprobe", "-a", "loop", "dm-snapshot", "dm-thin-pool"], check=True)
    if sys.argv[1] == "record":
        record(sys.argv[2])
    else:
        {"check": check, "control": control}[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
