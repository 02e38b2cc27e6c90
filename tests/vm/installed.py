"""A machine that an administrator has set up and that users work on: helper, units, imgpull, an S3 server.

Rule 1: the helper is laid down by the project's own script, and what it tells an administrator to do is done.
Rule 2: imgpull is the wheel in an environment of its own, on a read-only disk that also holds the server's bucket.
"""

import contextlib
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.vm.families import write_bucket
from tests.vm.guest.bucket import PORT
from tests.vm.machine import Disk, Machine, overlay, temporary_directory
from tests.vm.rootfs import Rootfs
from tests.vm.source import REPOSITORY, bring_source

MIB: Final = 1 << 20
SITE: Final = "/site"
PYTHON: Final = f"{SITE}/copy/bin/python"

#: What a user of the guest has in the environment.
ENVIRONMENT: Final = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}",
    "AWS_ACCESS_KEY_ID": "guest",
    "AWS_SECRET_ACCESS_KEY": "guest",
    "AWS_REGION": "us-east-1",
    "IMGPULL_ADDRESSING": "path",
    "IMGPULL_PROGRESS": "plain",
}

_CONFIG: Final = """
store = "thin"
[thin]
metadata_bytes = 4194304
data_bytes = {data_bytes}
base_bytes = {base_bytes}
base_inodes = 16384
journal_mib = 4
[admission]
layer_bytes = 8388608
"""

_SERVER: Final = f"""
[Unit]
RequiresMountsFor={SITE}
[Service]
Environment=PYTHONPATH=/src
ExecStart={PYTHON} /src/tests/vm/guest/bucket.py {SITE}/bucket
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Site:
    """The disk with imgpull and the bucket; ``installed`` is the path under which imgpull was installed on the host."""

    disk: Disk
    installed: Path


def make_site(installed: Path, folder: Path, scale: int) -> Site:
    """Make the disk; several machines may use it."""
    tree, image = folder / "site", folder / "site.ext4"
    write_bucket(tree / "bucket", scale)
    subprocess.run(["cp", "--archive", "--link", str(installed), str(tree / "copy")], check=True)
    size_mib = sum(path.lstat().st_size for path in tree.rglob("*") if path.is_file()) // MIB
    words = ["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-E", "nodiscard", "-d", str(tree), str(image)]
    subprocess.run(["/usr/sbin/mke2fs", *words, f"{size_mib * 5 // 4 + 64}m"], check=True, stdout=subprocess.DEVNULL)
    return Site(Disk(image, "site", read_only=True), installed)


def mount_site(machine: Machine, site: Site) -> None:
    """Mount the disk, now and at every boot."""
    machine.put("/etc/fstab", f"/dev/disk/by-id/virtio-site {SITE} ext4 ro 0 0\n".encode())
    machine.sh(f"mkdir -p {SITE} {site.installed.parent}; ln -sfn {SITE}/copy {site.installed}; mount {SITE}")


@contextlib.contextmanager
def installed_machine(rootfs: Rootfs, accelerator: str, site: Site, scale: int) -> Iterator[Machine]:
    """Boot a machine and set it up; the pool is of the brief's 2 GiB, or ``scale`` times smaller, as the images are."""
    with temporary_directory() as directory:
        root = overlay(rootfs.image, directory / "root.qcow2")
        with Machine(rootfs.kernel, root, [site.disk], accelerator) as machine:
            machine.wait_until_up()
            bring_source(machine)
            mount_site(machine, site)
            config = _CONFIG.format(data_bytes=(2 << 30) // scale, base_bytes=max(512 * MIB, (2 << 30) // scale))
            _install_helper(machine, directory, config)
            machine.put("/etc/systemd/system/s3.service", _SERVER.encode())
            machine.sh("systemctl daemon-reload; systemctl enable --quiet --now s3.service; usermod -aG imgpull alice")
            yield machine


def _install_helper(machine: Machine, directory: Path, config: str) -> None:
    zipapp, tree = directory / "imgpull-helper.pyz", directory / "tree"
    subprocess.run([sys.executable, "-m", "privhelper.build", str(zipapp)], cwd=REPOSITORY, check=True)
    script = REPOSITORY / "tests/setup/install-helper.sh"
    subprocess.run(["bash", str(script), str(zipapp), str(tree)], check=True, stdout=subprocess.DEVNULL)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(tree, arcname=".")
    machine.put("/tree.tar", buffer.getvalue())
    machine.put("/etc/imgpull/helper.toml", config.encode())
    machine.sh(
        "tar -C / --no-overwrite-dir -xf /tree.tar; rm /tree.tar; systemd-sysusers;"
        "systemd-tmpfiles --create imgpull.conf; systemctl daemon-reload; imgpull-helper pool create;"
        "systemctl enable --quiet --now imgpull-pool.service imgpull-helper.socket"
    )
