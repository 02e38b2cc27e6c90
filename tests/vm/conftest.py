"""One machine for all tests of this folder: it boots once, with the source tree's helper and three scratch disks.

A test that crashes or reboots the machine boots one of its own from the same root filesystem.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.vm import rootfs as rootfs_builder
from tests.vm.installed import Site, installed_machine, make_site, mount_site
from tests.vm.machine import Disk, Machine, MachineError, blank, choose_accelerator, overlay, temporary_directory
from tests.vm.rootfs import Rootfs
from tests.vm.source import bring_source


@pytest.fixture(scope="session")
def rootfs() -> Rootfs:
    return rootfs_builder.build()


@pytest.fixture(scope="session")
def accelerator(rootfs: Rootfs) -> str:
    return choose_accelerator(rootfs)


@pytest.fixture(scope="session")
def site(installed: Path, scale: int) -> Iterator[Site]:
    """Make the disk with imgpull and the bucket of images."""
    with temporary_directory() as directory:
        yield make_site(installed, directory, scale)


@pytest.fixture(scope="session")
def machine(rootfs: Rootfs, accelerator: str, site: Site) -> Iterator[Machine]:
    """Boot the machine that most tests share."""
    with booted_machine(rootfs, accelerator, site) as booted:
        yield booted


@pytest.fixture(scope="session")
def scale() -> int:
    """Return how many times smaller than real ones pool and images are: 1 is the full size."""
    return int(os.environ.get("IMGPULL_VM_SCALE", "16"))


@pytest.fixture(scope="session")
def host(rootfs: Rootfs, accelerator: str, site: Site, scale: int) -> Iterator[Machine]:
    """Boot the machine that an administrator has set up."""
    with installed_machine(rootfs, accelerator, site, scale) as machine:
        yield machine


@contextlib.contextmanager
def booted_machine(rootfs: Rootfs, accelerator: str, site: Site | None = None) -> Iterator[Machine]:
    """Boot a machine; /scratch is an empty ext4, the disks ``meta`` and ``data`` are blank; imgpull may be there."""
    with temporary_directory() as directory:
        disks = [
            Disk(blank(directory / "scratch", 6 << 30), "scratch"),
            Disk(blank(directory / "meta", 64 << 20), "meta"),
            Disk(blank(directory / "data", 2 << 30), "data"),
            *([site.disk] if site else []),
        ]
        root = overlay(rootfs.image, directory / "root.qcow2")
        with Machine(rootfs.kernel, root, disks, accelerator) as booted:
            prepare(booted)
            if site:
                mount_site(booted, site)
            yield booted


def prepare(machine: Machine) -> None:
    """Make a booted machine what tests expect; the disks may have been used."""
    machine.wait_until_up()
    bring_source(machine)
    disks = "for disk in meta data; do dd if=/dev/zero of=/dev/disk/by-id/virtio-$disk bs=1M count=8 status=none; done"
    mount = "mkfs.ext4 -q -F -E nodiscard $disk; mkdir -p /scratch; mount $disk /scratch"
    machine.sh(f"{disks}; disk=/dev/disk/by-id/virtio-scratch; {mount}")


def run_case(
    machine: Machine, program: str, case: str, environment: Mapping[str, str], timeout_s: float, python: str = "python3"
) -> str:
    """Run one case of a program in guest/; after a failure boot anew, so that its mess fails no other case."""
    path, environment = f"/src/tests/vm/guest/{program}", {"PYTHONPATH": "/src", **environment}
    try:
        result = machine.run(python, path, case, environment=environment, timeout_s=timeout_s)
        assert "blocked for more than" not in machine.sh("dmesg").out, "a process hung in the kernel"
    except (MachineError, AssertionError):
        machine.kill()
        machine.boot()
        prepare(machine)
        raise
    return result.out
