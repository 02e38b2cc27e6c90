"""Proves on this machine that populate and verify can do their work and nothing else: ``imgpull-helper audit``.

Rule 1: each attempt is made in a child of its own, locked in by the very call that locks the real one in.
Rule 2: it is made on a copy of the pool's empty base, which goes again; no attempt harms anything where it succeeds.
Rule 3: what is expected is policy/audit.toml; whatever is not granted there must be denied, or kill the child.
"""

import mmap
import os
import socket
import stat
import tomllib
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from privhelper import files, kernel, policy, sandbox
from privhelper.devices import Devices
from privhelper.policy import Policy
from privhelper.stores.base import BASE

_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
ATTEMPTS: Final[dict[str, Callable[[int], object]]] = {
    "open_its_root": lambda root: os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root),
    "create_a_file": lambda root: os.open("probe", _NEW, 0o600, dir_fd=root),
    "read_a_host_file": lambda root: os.open("/etc/hostname", os.O_RDONLY),
    "climb_out_of_its_root": lambda root: os.open("../../../../etc/hostname", os.O_RDONLY, dir_fd=root),
    "read_its_own_proc": lambda root: os.open("/proc/self/status", os.O_RDONLY),
    "make_a_device_node": lambda root: os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=root),
    "connect": lambda root: socket.socket(socket.AF_INET),
    "talk_to_a_unix_socket": lambda root: socket.socket(socket.AF_UNIX),
    "execute": lambda root: os.execv("/bin/true", ["true"]),  # noqa: S606  no shell is the point
    "fork": lambda root: os.fork(),
    "signal_the_helper": lambda root: os.kill(os.getppid(), 0),
    "become_another_user": lambda root: os.setuid(1),
    "mount": lambda root: kernel.mount_detached("tmpfs", "none", [], 0),
    "leave_its_namespace": lambda root: kernel.enter_user_namespace(),
    "memory_that_runs": lambda root: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC).close(),
}


class Row(NamedTuple):
    """One attempt and how it went."""

    place: str
    attempt: str
    expected: str
    got: str


def audit(grants: Policy, devices: Devices) -> Iterator[Row]:
    """Make every attempt in both sandboxes."""
    expectations = tomllib.loads(policy.builtin("audit.toml").decode("utf-8"))
    for role in ("populate", "verify"):
        dev = devices.create("scratch", "audit", 0, BASE, lambda status: None)
        with devices.making(dev):
            for attempt in ATTEMPTS:
                expected = "granted" if attempt in expectations[role]["granted"] else "denied"
                yield Row(role, attempt, expected, _try(grants, devices, role, dev, attempt))
            devices.destroy(dev)


def _try(grants: Policy, devices: Devices, role: str, dev: int, attempt: str) -> str:
    """Return ``granted``, ``denied`` and how, or ``unclear`` and why."""

    def work(root: int, tell: Callable[[int, int], None]) -> tuple[int, int]:
        ATTEMPTS[attempt](root)
        return 0, 0

    with files.closing(_mount(devices, role, dev)) as mount:  # a fresh one: its ids can be mapped once only
        child = sandbox.start(grants, role, mount, (), work)
        reports = [report for batch in iter(child.read, None) for report in batch]
        ended = child.end(kill=False)
    if ended:
        return "denied (killed by seccomp)" if ended == "killed by SIGSYS" else f"unclear ({ended})"
    if [report.kind for report in reports] == ["done"]:
        return "granted"
    return f"denied ({reports[-1].message})" if reports and reports[-1].rule == "system_error" else "unclear"


def _mount(devices: Devices, role: str, dev: int) -> int:
    if role == "verify":
        return devices.store.mount_read_only(dev)
    path = devices.store.active().get(dev) or devices.store.activate(dev, False)
    return kernel.mount_detached("ext4", path, [], kernel.MOUNT_ATTR_SAFE)
