"""One machine for all tests of this folder: it boots once, with the source tree's helper and three scratch disks.

A test that crashes or reboots the machine boots one of its own from the same root filesystem.
"""

import contextlib
import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.vm import rootfs as rootfs_builder
from tests.vm.machine import Disk, Machine, MachineError, blank, choose_accelerator, overlay, temporary_directory
from tests.vm.rootfs import Rootfs

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def rootfs() -> Rootfs:
    return rootfs_builder.build()


@pytest.fixture(scope="session")
def accelerator(rootfs: Rootfs) -> str:
    return choose_accelerator(rootfs)


@pytest.fixture(scope="session")
def machine(rootfs: Rootfs, accelerator: str) -> Iterator[Machine]:
    """Boot the machine that most tests share."""
    with booted_machine(rootfs, accelerator) as booted:
        yield booted


@contextlib.contextmanager
def booted_machine(rootfs: Rootfs, accelerator: str) -> Iterator[Machine]:
    """Boot a machine; /scratch is an empty ext4, the disks ``meta`` and ``data`` are blank."""
    with temporary_directory() as directory:
        disks = [
            Disk(blank(directory / "scratch", 6 << 30), "scratch"),
            Disk(blank(directory / "meta", 64 << 20), "meta"),
            Disk(blank(directory / "data", 2 << 30), "data"),
        ]
        root = overlay(rootfs.image, directory / "root.qcow2")
        with Machine(rootfs.kernel, root, disks, accelerator) as booted:
            prepare(booted)
            yield booted


def prepare(machine: Machine) -> None:
    """Make a booted machine what tests expect; the disks may have been used."""
    machine.wait_until_up()
    bring_source(machine)
    disks = "for disk in meta data; do dd if=/dev/zero of=/dev/disk/by-id/virtio-$disk bs=1M count=8 status=none; done"
    mount = "mkfs.ext4 -q -F -E nodiscard $disk; mkdir -p /scratch; mount $disk /scratch"
    machine.sh(f"{disks}; disk=/dev/disk/by-id/virtio-scratch; {mount}")


def run_case(machine: Machine, program: str, case: str, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run one case of a program in guest/; after a failure boot anew, so that its mess fails no other case."""
    path, environment = f"/src/tests/vm/guest/{program}", {"PYTHONPATH": "/src", **environment}
    try:
        result = machine.run("python3", path, case, environment=environment, timeout_s=timeout_s)
        assert "blocked for more than" not in machine.sh("dmesg").out, "a process hung in the kernel"
    except (MachineError, AssertionError):
        machine.kill()
        machine.boot()
        prepare(machine)
        raise
    return result.out


def bring_source(machine: Machine) -> None:
    """Copy what runs inside the guest to /src: the helper, its policy, and this folder's own programs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("privhelper", "policy", "tests/vm", "tests/privhelper"):
            archive.add(REPOSITORY / name, arcname=name, filter=_without_bytecode)
    machine.put("/src.tar", buffer.getvalue())
    machine.sh("mkdir -p /src; tar -C /src -xf /src.tar; rm /src.tar; python3 -m compileall -q /src/privhelper")


def _without_bytecode(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if os.path.basename(member.name) == "__pycache__" else member
