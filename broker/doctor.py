"""Looks at everything that imgpull needs, one finding a line, and says how to mend what is wrong.

Rule 1: looking changes nothing; what needs root is asked of the helper or only said.
Rule 2: `fail` is what stops a pull; `warn` is what makes it slower or less safe.
"""

import ctypes
import ctypes.util
import errno
import grp
import json
import os
import pwd
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

from broker import console, store
from broker.errors import ImgpullError
from broker.reference import Reference
from broker.settings import POLICY_DIR, Settings
from broker.store import Paths

Verdict = Literal["ok", "warn", "fail"]
LANDLOCK_CREATE_RULESET: Final = 444  # the same number on every architecture; landlock_create_ruleset(2)
LANDLOCK_VERSION: Final = 1  # its flag that asks for the ABI only
CLOCK_WARN_S: Final = 5  # a clock that anybody keeps right is nearer
CLOCK_FAIL_S: Final = 900  # AWS Signature Version 4: from here on requests are answered with RequestTimeTooSkewed
MIN_KERNEL: Final = (5, 12)  # idmapped mounts, mount_setattr(2)
KERNEL_MODULES: Final = Path("/sys/module")
# systemd.unit(5), in the order in which systemd prefers them.
UNIT_FOLDERS: Final = tuple(
    Path(name) for name in ("/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system",
                            "/usr/lib/systemd/system", "/lib/systemd/system")
)  # fmt: skip


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


def examine(settings: Settings, reference: Reference | None = None) -> list[Finding]:
    """Look at everything; S3 itself is asked only for a reference. Findings come in the order of mending them."""
    examinations: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
        _kernel,
        _sandbox,
        _libraries,
        _state,
        _quarantined,
        _units,
        _door,
        _helper,
        partial(_s3, reference=reference),
    )
    findings: list[Finding] = []
    for look in examinations:
        findings += look(settings)
    return findings


def rebuild(settings: Settings) -> list[Finding]:
    """Rebuild a state that cannot be trusted. Returns: what was done. Raises: ImgpullError where it cannot be done."""
    from broker import repair, work

    told = work.run(partial(repair.repair, settings))
    return [Finding("ok", "repair", sentence) for sentence in told]


def _kernel(_: Settings) -> Iterator[Finding]:
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    good = numbers >= MIN_KERNEL
    wanted = ".".join(map(str, MIN_KERNEL))
    yield Finding("ok" if good else "fail", "kernel", release, "" if good else f"{wanted} or later is needed")


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
            "warn",
            "landlock",
            f"not there ({why}); seccomp alone holds the workers",
            "boot with `lsm=landlock,yama,apparmor`",
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
        yield Finding(
            level,
            subject,
            f"{folder}, {console.size(free)} free",
            f"`imgpull gc`, or set IMGPULL_{subject.upper()}_DIR",
        )
    yield _integrity(paths)


def _integrity(paths: Paths) -> Finding:
    from broker.repair import complaint

    try:
        why = complaint(paths)
    except ImgpullError as error:
        return Finding("fail", "database", error.problem.why, "see what made it; move it away if nothing needs it")
    if why is not None:
        return Finding("fail", "database", f"not to be trusted: {why}", "`imgpull doctor --repair`; no image is lost")
    connection = store.open_readonly(paths.database)
    if connection is None:
        return Finding("ok", "database", "none yet")
    with closing(connection):
        return Finding("ok", "database", f"sound, {len(store.images(connection))} images")


QUARANTINED: Final = """
    SELECT id, machine, key, ending FROM run WHERE outcome = 'quarantined' AND NOT EXISTS (
        SELECT 1 FROM run AS later WHERE later.machine = run.machine AND later.key = run.key AND later.seq > run.seq)
     ORDER BY seq"""


def _quarantined(settings: Settings) -> Iterator[Finding]:
    """Name the runs that this program cannot go on with and that nothing has replaced, and what to do instead."""
    from broker import work

    try:
        with work.looking(settings) as lookup:
            runs = store.query(lookup.db, QUARANTINED) if lookup is not None else []
    except ImgpullError:
        return  # the state's own finding tells it
    for run in runs:
        text = f"run {run['id']}, {run['machine']} of {run['key'].strip()}: {json.loads(run['ending'])['reason']}"
        remedy = "give the same command again: it starts anew and finds what is done already"
        yield Finding("warn", "quarantined", text, remedy)


def _units(_: Settings) -> Iterator[Finding]:
    """Compare the units that systemd reads with those that this program was shipped with."""
    shipped = sorted((POLICY_DIR / "systemd").glob("imgpull-*.s*"))
    places = {path: next((f / path.name for f in UNIT_FOLDERS if (f / path.name).exists()), None) for path in shipped}
    missing = [path.name for path, found in places.items() if found is None]
    if missing:
        yield Finding(
            "warn",
            "units",
            f"not installed: {', '.join(missing)}",
            "`make deb`, then as root: `apt install ./dist/imgpull_*.deb`",
        )
    for path, found in places.items():
        more = [str(p) for folder in UNIT_FOLDERS for p in sorted((folder / f"{path.name}.d").glob("*.conf"))]
        if found is None:
            continue
        if found.read_bytes() != path.read_bytes():
            yield Finding("warn", path.name, f"{found} differs from what is shipped", f"`diff {found} {path}`")
        elif more:
            yield Finding(
                "warn", path.name, f"changed by {', '.join(more)}", f"`systemctl cat {path.name}` shows it whole"
            )
        else:
            yield Finding("ok", path.name, f"{found}, as shipped, hardening included")


def _door(settings: Settings) -> Iterator[Finding]:
    """Look whether this user, in this session, belongs to the group that owns the helper's socket."""
    try:
        owner = os.stat(settings.helper_socket).st_gid
    except OSError:
        return  # what is missing is told with the helper
    with suppress(KeyError):
        entry, user = grp.getgrgid(owner), pwd.getpwuid(os.geteuid())
        if os.geteuid() == 0 or owner in (os.getegid(), *os.getgroups()):
            yield Finding("ok", "group", f"this session is in {entry.gr_name}")
        elif user.pw_name in entry.gr_mem:
            yield Finding(
                "fail",
                "group",
                f"{user.pw_name} is in {entry.gr_name}, but not in this session",
                f"log in again, or `newgrp {entry.gr_name}`",
            )
        else:
            remedy = f"as root: `usermod -aG {entry.gr_name} {user.pw_name}`, then log in again"
            yield Finding("fail", "group", f"{user.pw_name} is not in {entry.gr_name}", remedy)


def _device_mapper(store_kind: str) -> Finding:
    """Look for the kernel's thin target; only root may ask for its version. ``store_kind`` is empty if unknown."""
    if (KERNEL_MODULES / "dm_thin_pool").exists():
        return Finding("ok", "device-mapper", "its thin target is loaded")
    if store_kind == "reflink":
        return Finding("ok", "device-mapper", "no thin target is loaded; the reflink store needs none")
    remedy = "as root: `modprobe dm-thin-pool`; a kernel without it has the store `reflink`"
    return Finding("warn", "device-mapper", "no thin target is loaded", remedy)


def _helper(settings: Settings) -> Iterator[Finding]:
    from broker import work

    try:
        greeting, layers, _ = work.inventory(settings)
    except ImgpullError as error:
        yield _device_mapper("")
        yield Finding("fail", "root helper", error.problem.what, error.problem.lines()[-1])
        return
    yield _device_mapper(greeting["store"])
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


def _s3(settings: Settings, reference: Reference | None) -> Iterator[Finding]:
    """Start the fetcher: it tells whether its sandbox holds and where credentials come from, and asks S3."""
    from broker import work

    try:
        ready = work.fetcher_ready(settings)
    except ImgpullError as error:
        yield Finding("fail", "fetcher", error.problem.what, error.problem.lines()[-1])
        return
    held = [f"{name} {value}" for name, value in sorted(ready.sandbox.items()) if name != "rlimits"]
    yield Finding("ok", "fetcher", f"its sandbox holds: {', '.join(held)}")
    none = ready.credentials in ("none", "")
    text = "none found; only public buckets can be read" if none else f"from {ready.credentials}"
    yield Finding("warn" if none else "ok", "credentials", text, "set AWS_PROFILE, or use --no-sign-request")
    yield Finding("ok", "endpoint", ready.endpoint)
    if reference is None:
        yield Finding("ok", "bucket", "not asked: `imgpull doctor REF` tries one")
        return
    bucket = work.ask_bucket(settings, reference)
    if bucket.error is not None:
        what, why, advice = bucket.error.problem.lines()
        yield Finding("fail", "bucket", f"{what}: {why}", advice)
    else:
        total = sum(layer.pin.size for layer in bucket.layers)
        yield Finding("ok", "bucket", f"{reference}: {len(bucket.layers)} layers, {console.size(total)}")
    if bucket.clock_ahead_s is not None:
        yield _clock(bucket.clock_ahead_s)


def _clock(ahead_s: int) -> Finding:
    """Judge how far this machine's clock is from the server's, which tells whole seconds only."""
    off_s = abs(ahead_s)
    told = (
        f"{off_s} s {'ahead of' if ahead_s > 0 else 'behind'} the server's" if off_s > 1 else "agrees with the server's"
    )
    level: Verdict = "ok" if off_s <= CLOCK_WARN_S else "warn" if off_s < CLOCK_FAIL_S else "fail"
    limit = f"; S3 refuses from {CLOCK_FAIL_S} s on" if level != "ok" else ""
    return Finding(level, "clock", f"{told}{limit}", "as root: `timedatectl set-ntp true`; see `timedatectl status`")
