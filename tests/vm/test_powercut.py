"""Power cuts: the disk as it could be at any moment, by QEMU's write log; see guest/powercut.py for what is checked.

A machine records a workload on one disk. A second machine, also crashed and started afresh, then sees the disk as a cut
at each of IMGPULL_VM_CUTS places (CI: 200) could have left it: nothing, everything or a part of what was not flushed.
"""

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.blocklog import BlockLog
from tests.vm.machine import Disk, Machine, blank, overlay, temporary_directory
from tests.vm.rootfs import Rootfs
from tests.vm.source import bring_source

pytestmark = [pytest.mark.vm, pytest.mark.slow]

DISK_BYTES = 640 << 20
PROGRAM = "/src/tests/vm/guest/powercut.py"
CUTS = int(os.environ.get("IMGPULL_VM_CUTS", "200"))


@pytest.fixture(scope="module")
def recorded(rootfs: Rootfs, accelerator: str) -> Iterator[Path]:
    """Record the workload; the guest is killed at its end."""
    with temporary_directory() as directory:
        disk = Disk(blank(directory / "disk", DISK_BYTES), "recorded", log=directory / "log")
        root = overlay(rootfs.image, directory / "root.qcow2")
        with Machine(rootfs.kernel, root, [disk], accelerator) as machine:
            bring_source(machine)
            result = machine.run("python3", PROGRAM, "record", "/dev/disk/by-id/virtio-recorded",
                                 environment={"PYTHONPATH": "/src"})  # fmt: skip
            print(result.out)
        size = (directory / "log").stat().st_size
        os.truncate(directory / "log", -(-size // 512) * 512)
        yield directory


def choose(log: BlockLog, count: int) -> list[tuple[int, int]]:
    """Return places and seeds: every barrier as evenly as the count allows, each time another part of the tail."""
    choice = random.Random(count)
    barriers = log.barriers()
    step = max(1.0, len(barriers) / (count * 0.6))
    places = [barriers[int(index * step)] for index in range(int(len(barriers) / step))]
    places += [choice.randrange(barriers[0], len(log.entries) + 1) for _ in range(count - len(places))]
    return sorted((place, choice.choice([0, 1, choice.randrange(2, 1 << 30)])) for place in places)


@pytest.fixture(scope="module")
def replayer(rootfs: Rootfs, accelerator: str, recorded: Path) -> Iterator[Machine]:
    """Boot a machine that has the log, and a disk to put states on."""
    with temporary_directory() as directory:
        disks = [
            Disk(recorded / "log", "log", read_only=True),
            Disk(blank(directory / "disk", DISK_BYTES), "state"),
        ]
        root = overlay(rootfs.image, directory / "root.qcow2")
        with Machine(rootfs.kernel, root, disks, accelerator) as machine:
            bring_source(machine)
            yield machine


def replay(machine: Machine, what: str, states: list[tuple[int, int]]) -> Counter[str]:
    """Have these states tried; return how many of each kind there were."""
    machine.put("/states", "".join(json.dumps(state) + "\n" for state in states).encode())
    by_id = "/dev/disk/by-id/virtio-"
    result = machine.run(
        "python3", PROGRAM, what, f"{by_id}log", f"{by_id}state", "/states",
        environment={"PYTHONPATH": "/src"}, timeout_s=30 * len(states) + 60, check=False,
    )  # fmt: skip
    assert result.code == 0, f"{result.out[-2000:]}\n{result.err[-4000:]}"
    return Counter(json.loads(result.out.splitlines()[-1]))


def test_a_power_cut_at_any_block_barrier_loses_nothing_that_was_acknowledged(
    recorded: Path, replayer: Machine
) -> None:
    log = BlockLog(str(recorded / "log"))
    states = choose(log, CUTS)
    figures = f"{len(log.entries)} requests, {len(log.barriers())} barriers"
    log.close()
    begin_s = time.monotonic()
    kinds = replay(replayer, "check", states)
    print(f"power cuts: {len(states)} states of {figures}, in {time.monotonic() - begin_s:.0f} s: {dict(kinds)}")
    assert kinds["ok"] > len(states) / 2


def test_a_disk_that_ignores_flushes_is_found_out(recorded: Path, replayer: Machine) -> None:
    """The control: the check above can fail."""
    log = BlockLog(str(recorded / "log"))
    choice = random.Random(1)
    half = len(log.entries) // 2
    states = sorted((choice.randrange(half, len(log.entries)), choice.randrange(1 << 30)) for _ in range(6))
    log.close()
    kinds = replay(replayer, "control", states)
    print(f"control: {dict(kinds)}")
    assert kinds["damaged"] > 0
