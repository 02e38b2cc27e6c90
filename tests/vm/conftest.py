"""One machine for all tests of this folder: it boots once, with the source tree's helper and three scratch disks.

A test that crashes or reboots the machine boots one of its own from the same root filesystem.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.vm import rootfs as rootfs_builder
from tests.vm.installed import Site, installed_machine, make_site, mount_site
from tests.vm.machine import (
    Disk,
    Machine,
    MachineError,
    blank,
    choose_accelerator,
    make_file_system,
    overlay,
    temporary_directory,
)
from tests.vm.rootfs import Rootfs
from tests.vm.source import bring_source
from tests.vm.warm import call

SCRATCH_DISKS: Final = {"scratch": 6 << 30, "meta": 64 << 20, "data": 2 << 30}


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
        disks = [Disk(directory / name, name) for name in SCRATCH_DISKS] + ([site.disk] if site else [])
        wipe(disks)
        root = overlay(rootfs.image, directory / "root.qcow2")
        with Machine(rootfs.kernel, root, disks, accelerator) as booted:
            prepare(booted)
            if site:
                mount_site(booted, site)
            yield booted


def wipe(disks: Sequence[Disk]) -> None:
    """Make the scratch disks of a machine that is off what tests expect: a file system and two that are blank."""
    for disk in disks:
        if disk.serial in SCRATCH_DISKS:
            disk.path.unlink(missing_ok=True)
            blank(disk.path, SCRATCH_DISKS[disk.serial])
            if disk.serial == "scratch":
                make_file_system(disk.path)


def prepare(machine: Machine) -> None:
    """Make a booted machine what tests expect."""
    machine.wait_until_up()
    bring_source(machine)
    machine.sh("mkdir -p /scratch; mount /dev/disk/by-id/virtio-scratch /scratch")


def run_case(machine: Machine, case: str, environment: Mapping[str, str], timeout_s: float) -> str:
    """Run one case, ``module:function`` below guest/; after a failure boot anew: its mess fails no other case."""
    try:
        result = call(machine, f"tests.vm.guest.{case}", environment=environment, timeout_s=timeout_s)
        assert result.code == 0, f"{case}: {result.code}\n{result.out[-4000:]}\n{result.err[-4000:]}"
    except (MachineError, AssertionError):
        machine.kill()
        wipe(machine.disks)
        machine.boot()
        prepare(machine)
        raise
    return result.out
