"""The README's words from nothing to an image, typed in a fresh machine: the package, its pool, a user; and away again.

The machine is this file's own, and the tests run in order. Its S3 server runs in the package's own environment.
"""

import io
import json
import re
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.setup.package import package
from tests.vm.guest.bucket import PORT
from tests.vm.machine import Disk, Machine, Result, overlay, temporary_directory
from tests.vm.rootfs import Rootfs
from tests.vm.source import REPOSITORY, bring_source

pytestmark = pytest.mark.vm

README: Final = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DISK: Final = "/mnt"
PYTHON: Final = "/usr/lib/imgpull/venv/bin/python"
USER: Final = "alice"
#: What her shell has; the README leaves it to the AWS SDK's own ways.
ENVIRONMENT: Final = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "guest",
    "AWS_SECRET_ACCESS_KEY": "guest",
    "AWS_REGION": "us-east-1",
    "IMGPULL_ADDRESSING": "path",
}
#: A file system of 10 GiB is the default, and emulated its making takes half a minute.
SMALLER: Final = "\n[thin]\nbase_bytes = 536870912\nbase_inodes = 16384\njournal_mib = 4\nmetadata_bytes = 4194304\n"
#: Where a package may leave something, but for the books of those who manage packages, units and devices.
BOOKS: Final = ("/run/log", "/run/systemd", "/run/udev", "/var/lib/dpkg", "/var/log/dpkg.log")
KEPT: Final = (
    f"find /etc /opt /root /run /srv /usr /var {' '.join(f'-path {name} -prune -o' for name in BOOKS)} -print | sort;"
    "getent group"
)


def commands(title: str) -> list[str]:
    """Return the lines that a section of the README says to type."""
    section = README.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = "".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).splitlines()
    return [line.split(" #")[0].strip() for line in lines]


def layer(names: dict[str, bytes]) -> bytes:
    """Return a tarball with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in ("usr", "usr/bin"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, data in names.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def make_disk(folder: Path) -> Disk:
    """Make the disk that brings the package, and the bucket that the README speaks of."""
    tree = folder / "tree"
    image = tree / "bucket/bucket/images/golang"
    image.mkdir(parents=True)
    (image / "1.tar").write_bytes(layer({"usr/bin/sh": b"a shell\n" * 1000}))
    (image / "2.tar").write_bytes(layer({"usr/bin/go": b"a compiler\n" * 1000}))
    built = package()
    (tree / built.name).write_bytes(built.read_bytes())
    words = ["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(folder / "disk"), "64m"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return Disk(folder / "disk", "package", read_only=True)


@pytest.fixture(scope="module")
def fresh(rootfs: Rootfs, accelerator: str) -> Iterator[Machine]:
    """Boot a machine that has never heard of imgpull."""
    with temporary_directory() as folder:
        disk, root = make_disk(folder), overlay(rootfs.image, folder / "root.qcow2")
        with Machine(rootfs.kernel, root, [disk], accelerator) as machine:
            machine.wait_until_up()
            bring_source(machine)
            machine.sh(f"mount -o ro /dev/disk/by-id/virtio-package {DISK}")
            yield machine


@pytest.fixture(scope="module")
def before(fresh: Machine) -> list[str]:
    """Return what there was before the package."""
    return fresh.sh(KEPT).out.splitlines()


def typed(machine: Machine, line: str, *, code: int = 0) -> Result:
    """Type a line as alice; she logs in for each, so that her groups are those that she has."""
    done = machine.run(*shlex.split(line), user=USER, environment=ENVIRONMENT, check=False)
    assert done.code == code, f"{line}: {done.code}\n{done.out}\n{done.err}"
    return done


def test_administrator_installs_it(fresh: Machine, before: list[str]) -> None:
    for line in commands("Install"):
        if line.startswith("apt install ./dist/"):  # this machine has dpkg alone, and what the package needs
            line = line.replace("apt install ./dist/", f"dpkg --install {DISK}/")
        elif line.startswith("imgpull-helper pool create"):
            fresh.sh(f"echo {shlex.quote(SMALLER)} >>/etc/imgpull/helper.toml")
            refused = fresh.sh(line, check=False)
            assert refused.code == 73 and "68719476736 bytes asked for" in refused.err, refused.err
            line += f" {refused.err.partition('such as ')[2]}"
        elif line.startswith("make "):
            continue  # the package on the disk is made by it
        fresh.sh(line)
    server = f"{PYTHON} /src/tests/vm/guest/bucket.py {DISK}/bucket"
    fresh.sh(
        f"systemd-run --quiet --unit=s3 --setenv=PYTHONPATH=/src {server};"
        f"until (: </dev/tcp/127.0.0.1/{PORT}) 2>/dev/null; do sleep 0.05; done"
    )


def test_user_gets_from_nothing_to_a_device(fresh: Machine) -> None:
    doctor, plan, pull, look, drive = [typed(fresh, line).out for line in commands("From nothing to an image")]
    assert "fail" not in doctor and "imgpull-helper.socket, as shipped" in doctor
    assert "asked of root  2 commits, 1 activation" in plan
    assert re.fullmatch(r"/dev/dm-\d+\n", pull)
    assert {line.split()[-1] for line in look.splitlines()[1:]} == {"go", "sh"}
    assert json.loads(drive)["drive_id"] == "vm1"
    assert typed(fresh, "imgpull pull -q s3://bucket/images/golang").out == pull


def test_package_in_use_is_not_removed(fresh: Machine) -> None:
    refused = fresh.sh("dpkg --remove imgpull", check=False)
    assert refused.code != 0 and "devices are given out" in refused.err
    assert fresh.sh("systemctl is-active imgpull-helper.socket").out.strip() == "active"
    for name in ("golang", "vm1"):
        typed(fresh, f"imgpull deactivate {name}")
    typed(fresh, "imgpull rm golang")


def test_purged_package_leaves_nothing(fresh: Machine, before: list[str]) -> None:
    fresh.sh("systemctl stop s3; dpkg --purge imgpull")
    after = fresh.sh(KEPT).out.splitlines()
    assert [line for line in after if line not in before] == []
    assert fresh.sh("dmsetup ls; losetup --list --noheadings").out.replace("No devices found", "").strip() == ""
