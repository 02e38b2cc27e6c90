"""Looks at everything that imgpull needs, one finding a line, and says how to mend what is wrong.

Rule 1: looking changes nothing; what needs root is asked of the helper or only said.
Rule 2: `fail` is what stops a pull; `warn` is what makes it slower or less safe.
"""

import ctypes
import ctypes.util
import errno
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from broker import console, store
from broker.errors import ImgpullError
from broker.settings import Settings
from broker.store import Paths

Verdict = Literal["ok", "warn", "fail"]
LANDLOCK_CREATE_RULESET: Final = 444  # the same number on every architecture; landlock_create_ruleset(2)
LANDLOCK_VERSION: Final = 1  # its flag that asks for the ABI only
MIN_KERNEL: Final = (5, 12)  # idmapped mounts, mount_setattr(2)
TARGET_VERSIONS: Final = Path("/sys/module")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    verdict: Verdict
    subject: str
    text: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as `--json` prints it."""
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    """Look at everything. Returns: findings in the order in which one would mend them."""
    examinations: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _kernel,
        _sandbox,
        _libraries,
        _state,
        _helper,
        _s3,
    )
    findings: list[Finding] = []
    for look in examinations:
        findings += look(settings)
    return findings


def _kernel(_: Settings) -> Iterator[Finding]:
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    good = numbers >= MIN_KERNEL
    wanted = ".".join(map(str, MIN_KERNEL))
    yield Finding("ok" if good else "fail", "kernel", release, "" if good else f"{wanted} or later is needed")
    has_thin = (TARGET_VERSIONS / "dm_thin_pool").exists()
    text = "device-mapper thin provisioning is loaded" if has_thin else "no device-mapper thin target is loaded"
    remedy = "" if has_thin else "`modprobe dm-thin-pool` for the thin store; the reflink store does not need it"
    yield Finding("ok" if has_thin else "warn", "device-mapper", text, remedy)


def _sandbox(_: Settings) -> Iterator[Finding]:
    libc = ctypes.CDLL(None, use_errno=True)
    abi = libc.syscall(
        ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(LANDLOCK_VERSION)
    )
    if abi > 0:
        level: Verdict = "ok" if abi >= 4 else "warn"
        lacking = "" if abi >= 4 else "; it does not cover the network before ABI 4, seccomp does"
        yield Finding(level, "landlock", f"ABI {abi}{lacking}", "a kernel from 6.7 on covers the network too")
    else:
        why = os.strerror(ctypes.get_errno() or errno.ENOSYS).lower()
        yield Finding(
            "warn", "landlock", f"not there ({why}); seccomp alone holds the workers", "boot with lsm=landlock,…"
        )
    with open("/proc/self/status", encoding="ascii") as file:
        has_seccomp = "Seccomp:" in file.read()
    yield Finding("ok" if has_seccomp else "fail", "seccomp", "there" if has_seccomp else "the kernel has none")


def _libraries(_: Settings) -> Iterator[Finding]:
    name = ctypes.util.find_library("archive")
    if name is None:
        yield Finding("fail", "libarchive", "not found", "`apt install libarchive13`")
    else:
        library = ctypes.CDLL(name)
        library.archive_version_string.restype = ctypes.c_char_p
        yield Finding("ok", "libarchive", library.archive_version_string().decode("ascii", "replace"))
    yield Finding("ok", "sqlite", f"{sqlite3.sqlite_version}, rollback journal")


def _state(settings: Settings) -> Iterator[Finding]:
    paths = Paths.of(settings)
    for subject, folder in (("state", paths.state), ("cache", paths.cache)):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        if not os.access(existing, os.W_OK):
            yield Finding("fail", subject, f"{existing} cannot be written", f"set IMGPULL_{subject.upper()}_DIR")
            continue
        free = shutil.disk_usage(existing).free
        level: Verdict = "ok" if free > 4 << 30 else "warn"
        yield Finding(level, subject, f"{folder}, {console.size(free)} free", "a large image needs several GB")
    if paths.database.exists():
        yield _integrity(paths)


def _integrity(paths: Paths) -> Finding:
    try:
        connection = store.open_readonly(paths.database)
        assert connection is not None
        with connection:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            count = len(store.images(connection))
        connection.close()
    except sqlite3.DatabaseError as error:
        verdict, count = str(error), 0
    if verdict != "ok":
        return Finding(
            "fail", "database", f"damaged: {verdict}", f"move {paths.database} away; no image is lost with it"
        )
    return Finding("ok", "database", f"sound, {count} images")


def _helper(settings: Settings) -> Iterator[Finding]:
    from broker import work

    try:
        greeting, layers, _ = work.inventory(settings)
    except ImgpullError as error:
        yield Finding("fail", "root helper", error.problem.what, error.problem.lines()[-1])
        return
    yield Finding("ok", "root helper", f"answers on {settings.helper_socket}, {len(layers)} layers")
    figures = greeting["pool"]
    if figures["state"] != "ready":
        yield Finding(
            "fail", "pool", f"{greeting['store']}: {figures['state']}", "as root: `imgpull-helper pool status`"
        )
        return
    for kind in ("data", "metadata"):
        total, used = figures.get(f"{kind}_bytes") or 0, figures.get(f"{kind}_used_bytes") or 0
        if total:
            share = used * 100 // total
            level: Verdict = "ok" if share < 75 else "warn" if share < 95 else "fail"
            text = f"{greeting['store']}: {share} % of {console.size(total)} used"
            yield Finding(level, f"pool {kind}", text, "`imgpull gc`, `imgpull rm`, or `imgpull-helper pool grow`")


def _s3(settings: Settings) -> Iterator[Finding]:
    """Start the fetcher: it tells whether its sandbox holds and where credentials come from; S3 is not asked."""
    from broker import work

    try:
        ready = work.fetcher_ready(settings)
    except ImgpullError as error:
        yield Finding("fail", "fetcher", error.problem.what, error.problem.lines()[-1])
        return
    yield Finding(
        "ok", "fetcher", "its sandbox holds: " + ", ".join(f"{k} {v}" for k, v in sorted(ready.sandbox.items()))
    )
    none = ready.credentials in ("none", "")
    text = "none found; only public buckets can be read" if none else f"from {ready.credentials}"
    yield Finding("warn" if none else "ok", "credentials", text, "set AWS_PROFILE, or use --no-sign-request")
    yield Finding("ok", "endpoint", ready.endpoint)
