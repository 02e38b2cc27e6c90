"""What the set-up installs is all that the tests' own parts name."""

from pathlib import Path

from tests.servers.swift import PACKAGES
from tests.vm.rootfs import HOST_PACKAGES

LISTED = {
    line.split("#")[0].strip() for line in Path(__file__).with_name("packages.txt").read_text("utf-8").splitlines()
}


def test_packages_of_the_s3_server_are_installed() -> None:
    assert set(PACKAGES) <= LISTED


def test_packages_of_the_virtual_machine_are_installed() -> None:
    assert set(HOST_PACKAGES) <= LISTED
