"""Build, or reuse, what a virtual machine boots: Debian's kernel and a small Debian root filesystem.

Rule 1: everything comes from Debian's packages of the release that this host runs, by the mirrors that its apt uses.
Rule 2: the host is left as it was: packages are unpacked into a cache directory, never installed; no mount, no loop.
Rule 3: the cache is keyed by a digest of the recipe (this file and the agent), and appears by one rename.

Debian's *cloud* kernel has ext4 and NVMe built in, so that it boots from an NVMe disk without an initramfs; its modules
include dm-thin-pool, dm-flakey and dm-snapshot.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent

#: What the host needs, beyond python3: the one list that set-up scripts read.
HOST_PACKAGES: Final = ("qemu-system-x86", "qemu-utils", "mmdebstrap", "e2fsprogs", "thin-provisioning-tools")

GUEST_PACKAGES: Final = (
    "python3", "python3-venv", "systemd", "systemd-sysv", "udev", "dmsetup", "thin-provisioning-tools", "e2fsprogs",
    "xfsprogs", "kmod", "util-linux", "fdisk", "procps", "iproute2", "strace", "attr", "libcap2-bin", "libarchive13",
)  # fmt: skip

#: Units that no test looks at. Under TCG each process costs 5 to 40 ms, so a boot is as long as its list of units.
MASKED_UNITS: Final = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
    "fstrim.timer", "motd-news.timer", "systemd-tmpfiles-clean.timer", "getty.target", "getty@tty1.service",
    "getty-static.service", "console-getty.service", "serial-getty@ttyS0.service", "systemd-logind.service",
    "systemd-binfmt.service", "systemd-boot-system-token.service", "systemd-firstboot.service",
    "systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-journal-flush.service",
    "systemd-machine-id-commit.service", "systemd-pstore.service", "systemd-random-seed.service",
    "systemd-remount-fs.service", "systemd-update-done.service", "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service", "systemd-user-sessions.service", "ldconfig.service",
    "systemd-ask-password-console.path", "systemd-ask-password-wall.path", "dev-hugepages.mount", "dev-mqueue.mount",
    "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "proc-sys-fs-binfmt_misc.automount", "modprobe@configfs.service", "modprobe@drm.service",
    "modprobe@efi_pstore.service", "modprobe@fuse.service", "modprobe@loop.service",
)  # fmt: skip

FILES: Final = {
    "etc/hostname": "imgpull-vm\n",
    "etc/hosts": "127.0.0.1 localhost imgpull-vm\n",
    "etc/fstab": "",
    # A fixed id: without one systemd takes every boot for the first and applies all presets.
    "etc/machine-id": hashlib.sha256(b"imgpull-vm").hexdigest()[:32] + "\n",
    "etc/systemd/journald.conf.d/vm.conf": "[Journal]\nStorage=volatile\nRateLimitBurst=0\n",
    # An emulated machine on a busy host is slow: a unit that starts late is no failure.
    "etc/systemd/system.conf.d/vm.conf": "[Manager]\nDefaultTimeoutStartSec=300s\nDefaultDeviceTimeoutSec=300s\n",
    "etc/modules-load.d/vm.conf": "virtio_pci\nvirtio_blk\nvirtio_console\n",
    # Announce again only the devices that tests look at; a trigger of all of /sys takes seconds.
    "etc/systemd/system/systemd-udev-trigger.service.d/vm.conf": (
        "[Service]\nExecStart=\nExecStart=-udevadm trigger --type=devices --action=add --subsystem-match=block "
        "--subsystem-match=virtio-ports --subsystem-match=misc\n"
    ),
    "etc/systemd/system/vm-agent.service": (
        "[Unit]\nDescription=Command agent of the test host\nDefaultDependencies=no\nAfter=systemd-udevd.service\n"
        "[Service]\nExecStart=/usr/bin/python3 -I -S /usr/local/sbin/vm-agent\nKillMode=process\nTasksMax=infinity\n"
        "LimitNOFILE=65536\n[Install]\nWantedBy=sysinit.target\n"
    ),
}

#: Ordinary users of the guest: the installation puts alice into the client group, mallory stays outside.
USERS: Final = {"alice": 1500, "mallory": 1501}

IMAGE_BYTES: Final = 6 << 30  # sparse: the full-size families, their blobs and a pool of 2 GiB have room
INODES: Final = 1 << 16
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"


class RootfsError(Exception):
    """The root filesystem cannot be built on this host; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Rootfs:
    """A bootable pair: ``kernel`` is a bzImage, ``image`` a raw ext4 filesystem that nobody may write to."""

    kernel: Path
    image: Path
    build_s: float


def cache_directory() -> Path:
    """Return where builds are kept: below XDG_CACHE_HOME if it is set, else below /var/tmp."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home) / "imgpull-vm" if home else Path("/var/tmp/imgpull-vm")


def recipe_digest() -> str:
    """Return the name of this recipe's build: a change of this file, of the agent or of the release gives another."""
    digest = hashlib.sha256(platform.freedesktop_os_release()["VERSION_CODENAME"].encode())
    for path in [HERE / "rootfs.py", HERE / "guest/agent.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> Rootfs:
    """Return the root filesystem, building it first (1 to 3 minutes, as root) unless the cache has it.

    Raises: RootfsError.
    """
    cache = cache_directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    if cache.stat().st_uid != os.geteuid():
        raise RootfsError(f"{cache} belongs to uid {cache.stat().st_uid}, expected {os.geteuid()}: remove it")
    final = cache / recipe_digest()
    begin_s = time.monotonic()
    with _locked(cache / "lock"):
        if not final.exists():
            _build_into(final)
    return Rootfs(final / "vmlinuz", final / "root.ext4", time.monotonic() - begin_s)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_into(final: Path) -> None:
    missing = [tool for tool in ("mmdebstrap", "mke2fs", "apt-get") if not shutil.which(tool)]
    if missing or os.geteuid() != 0:
        raise RootfsError(f"expected root and {', '.join(HOST_PACKAGES)}; missing: {missing or 'root'}")
    work = Path(tempfile.mkdtemp(prefix="build-", dir=final.parent))
    try:
        root = work / "root"
        _bootstrap(root)
        kernel = _unpack_kernel(work, root)
        _configure(root)
        (work / "out").mkdir()
        shutil.copyfile(kernel, work / "out" / "vmlinuz")
        # The image's writes go to overlays, so it needs no journal of its own; the overlay of an installed machine is
        # only ever cut off after a clean power-off.
        _run("mke2fs", "-q", "-t", "ext4", "-F", "-m", "0", "-N", str(INODES), "-d", root,
             "-E", "nodiscard,root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0",
             work / "out" / "root.ext4", f"{IMAGE_BYTES >> 10}k")  # fmt: skip
        (work / "out").rename(final)
    finally:
        shutil.rmtree(work)


def _bootstrap(root: Path) -> None:
    """Unpack Debian; ``essential`` leaves out apt, and documentation is not unpacked."""
    excluded = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
    _run("mmdebstrap", "--quiet", "--mode=root", "--variant=essential", "--format=directory",
         f"--include={','.join(GUEST_PACKAGES)}", "--dpkgopt=force-unsafe-io", *excluded,
         '--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"',
         platform.freedesktop_os_release()["VERSION_CODENAME"], root, *_sources())  # fmt: skip


def _sources() -> list[str]:
    """Return the one-line entries of Debian's own archives that this host's apt is configured with."""
    text = _run("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)",
                "Created-By: Packages")  # fmt: skip
    rows = [line.split() for line in text.splitlines()]
    found = sorted({(row[0], row[1]) for row in rows if row[2:] == ["main", "Debian"] and "backports" not in row[1]})
    if not found:
        raise RootfsError("apt knows no archive of Debian: run apt-get update")
    return [f"deb [signed-by={KEYRING}] {uri} {release} main" for uri, release in found]


def _unpack_kernel(work: Path, root: Path) -> Path:
    """Put the cloud kernel's modules into ``root`` and return the path of its bzImage."""
    depends = _run("apt-cache", "depends", "linux-image-cloud-amd64")
    names = [line.split()[-1] for line in depends.splitlines() if line.strip().startswith("Depends: linux-image-")]
    if not names:
        raise RootfsError("apt does not know linux-image-cloud-amd64: run apt-get update")
    _run("apt-get", "-q", "download", names[0], cwd=work)
    _run("dpkg-deb", "-x", next(work.glob("linux-image-*.deb")), work / "kernel")
    version = next((work / "kernel/lib/modules").iterdir()).name
    shutil.copytree(work / "kernel/lib/modules", root / "usr/lib/modules")
    _run("chroot", root, "depmod", version)
    return work / "kernel/boot" / f"vmlinuz-{version}"


def _configure(root: Path) -> None:
    """Make the boot small and quiet, add the users and the agent."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for unit in MASKED_UNITS:
        link = root / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    shutil.copyfile(HERE / "guest/agent.py", root / "usr/local/sbin/vm-agent")
    _run("chroot", root, "systemctl", "--quiet", "enable", "vm-agent.service")
    _run("chroot", root, "systemctl", "--quiet", "set-default", "multi-user.target")
    for name, uid in USERS.items():
        _run("chroot", root, "useradd", "--uid", str(uid), "--create-home", "--shell", "/bin/bash", name)


def _run(*argv: str | Path, cwd: Path | None = None) -> str:
    """Run a command and return its output; mke2fs and chroot live in sbin, which a service's PATH may lack."""
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    environment["DEBIAN_FRONTEND"] = "noninteractive"
    done = subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RootfsError(f"{argv[0]} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
