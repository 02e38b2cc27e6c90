"""A fault at each system call of a commit: killed, EIO, ENOSPC, EINTR. Afterwards nothing is leaked and all goes on.

The points are not written down: one run under strace counts the calls, then each is made to fail in a run of its own.
IMGPULL_FAULTS=all runs every point (about 2,000, a quarter of an hour); otherwise IMGPULL_FAULTS_S seconds of them,
spread evenly over all.
"""

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.privhelper.client import Helper, Layer
from tests.privhelper.conftest import Installation

pytestmark = [pytest.mark.root, pytest.mark.slow]
ALL = os.environ.get("IMGPULL_FAULTS") == "all"
BUDGET_S = float(os.environ.get("IMGPULL_FAULTS_S", "40"))
# What changes something, or asks for something that is given only once. ioctl is the loop devices, the clone of a file
# and closing on exec; the opens of the start-up are counted and left out by their number.
MUTATING = (
    "openat", "mkdir", "mkdirat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "unlink", "unlinkat", "ioctl",
    "fcntl", "fsopen", "fsconfig", "fsmount", "mount_setattr", "clone", "unshare", "setresuid", "chroot", "capset",
    "prctl", "pipe2", "syncfs", "fchown", "fchownat", "fchmod", "fsetxattr", "setxattr", "removexattr", "utimensat",
    "symlinkat", "linkat", "sendmsg", "landlock_restrict_self", "close", "landlock_create_ruleset", "landlock_add_rule",
    "setgroups", "setresgid", "fchdir", "close_range", "preadv2", "pread64", "pidfd_open", "wait4",
)  # fmt: skip
EARLY = 3  # so many calls of the start-up stand for all: until the first request nothing is open and nothing written
# EINTR where the kernel can give it (signal(7)); Python retries those by itself (PEP 475).
INTERRUPTIBLE = {"openat", "write", "ioctl", "fcntl", "fsync", "sendmsg", "pwrite64", "close"}


class Point(NamedTuple):
    """One call, by its number among the calls of that name in one process, and what happens to it."""

    call: str
    number: int
    fault: str

    def inject(self) -> tuple[str, ...]:
        what = "signal=KILL" if self.fault == "KILL" else f"error={self.fault}"
        rule = f"inject={self.call}:{what}:when={self.number}"
        return ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={self.call}", "-e", rule)


def numbers(trace: str) -> dict[str, list[int]]:
    """Return, for each call, which of its numbers are worth a fault: in one process or the other, past the start-up.

    Left out are the looks at all loop devices of the machine, of which there may be hundreds.
    """
    made: dict[str, Counter[str]] = {}
    chosen: dict[str, set[int]] = {call: set() for call in MUTATING}
    first, answering = "", False
    for pid, call, rest in re.findall(r"^(\d+) +([a-z_0-9]+)\((.*)$", trace, re.MULTILINE):
        first = first or pid
        answering = answering or call == "recvmsg"
        counts = made.setdefault(pid, Counter())
        counts[call] += 1
        if call in chosen and '"/sys/block/' not in rest:
            if not answering:
                chosen[call] -= {number for number in chosen[call] if number <= counts[call] - EARLY}
            chosen[call].add(counts[call])
    return {call: sorted(found) for call, found in chosen.items()}


def commit(helper: Helper, layer: Layer, payload: Path) -> str:
    """Say hello and commit; return how that went."""
    try:
        if helper.hello()["type"] != "ok":
            return "refused"
        reply = helper.commit(layer.manifest(), payload)
        return "ok" if reply["type"] == "ok" else str(reply["code"])
    except (EOFError, ConnectionResetError, BrokenPipeError, TimeoutError):
        return "gone"


def points(chosen: dict[str, list[int]]) -> Iterator[Point]:
    for call, found in chosen.items():
        for number in found:
            yield Point(call, number, "KILL")
            yield Point(call, number, "EIO")
            yield Point(call, number, "ENOSPC")
            if call in INTERRUPTIBLE:
                yield Point(call, number, "EINTR")


def test_fault_at_every_call_of_a_commit(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    payload, trace = layer.write_payload(tmp_path), tmp_path / "trace"
    command = ("strace", "-f", "-qq", "-o", str(trace), "-e", f"trace=recvmsg,{','.join(MUTATING)}")
    with Helper(installation.config, prefix=command) as helper:
        assert commit(helper, layer, payload) == "ok"
    installation.wipe()
    every = list(points(numbers(trace.read_text())))
    chosen = every if ALL else spread(every)
    outcomes: Counter[str] = Counter()
    unharmed: Counter[str] = Counter()
    deadline = time.monotonic() + (1 << 30 if ALL else BUDGET_S)
    done = 0
    for point in chosen:
        if time.monotonic() > deadline and done >= 10:
            break
        with Helper(installation.config, prefix=point.inject()) as helper:
            outcome = commit(helper, layer, payload)
        outcomes[f"{point.fault} {outcome}"] += 1
        if outcome == "ok" and point.fault in ("EIO", "ENOSPC"):
            unharmed[point.call] += 1
        done += 1
        check_recovery(installation, layer, payload, point, outcome)
    print(f"{done} of {len(every)} fault points: {dict(outcomes)}; errors that did no harm: {dict(unharmed)}")
    assert done >= min(len(every), 10)
    assert outcomes["KILL gone"] > outcomes["KILL ok"], "strace did not kill"


@pytest.mark.parametrize("rule", ["syncfs:error=EIO", "fsync:error=EIO", "syncfs:error=ENOSPC", "fdatasync:error=EIO"])
def test_failed_sync_dooms_the_layer(installation: Installation, layer: Layer, tmp_path: Path, rule: str) -> None:
    """A lost write is told once, by the sync. Each kind of it that a commit makes must be asked and believed."""
    payload = layer.write_payload(tmp_path)
    prefix = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={rule}:when=1+")
    with Helper(installation.config, prefix=prefix) as helper:
        assert commit(helper, layer, payload) not in ("ok", "refused")
    with installation.connect() as helper:
        installation.assert_agrees()
        assert helper.ask("stat", layer=layer.id())["state"] == "absent"


@pytest.mark.parametrize("call", ["mount_setattr", "clone", "write", "fsmount", "syncfs", "wait4"])
def test_helper_killed_beside_its_child_leaves_no_child(
    installation: Installation, layer: Layer, tmp_path: Path, call: str
) -> None:
    """A child that waits for a helper that is gone would hold the mount, and so the device, for ever."""
    payload = layer.write_payload(tmp_path)
    prefix = (
        "strace",
        "-f",
        "-qq",
        "-o",
        "/dev/null",
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:signal=KILL:when=1",
    )
    with Helper(installation.config, prefix=prefix) as helper:
        assert commit(helper, layer, payload) in ("gone", "fault")  # fault: the call was the child's
        helper.sock.close()
        helper.process.wait(10)  # strace ends with the last process that it follows
    with installation.connect():
        installation.assert_agrees()


def test_everything_that_a_layer_consists_of_is_synced(
    installation: Installation, layer: Layer, tmp_path: Path
) -> None:
    """The file system, the image, its name, the manifest, its name; and an error of each ends the commit."""
    payload, trace = layer.write_payload(tmp_path), tmp_path / "trace"
    prefix = ("strace", "-f", "-qq", "-y", "-o", str(trace), "-e", "trace=fsync,syncfs")
    with Helper(installation.config, prefix=prefix) as helper:
        assert commit(helper, layer, payload) == "ok"
        assert helper.ask("remove", layer=layer.id())["removed"] is True
    synced = [re.sub(r"\d+", "N", path) for path in re.findall(r"fsync\(\d+<([^>]*)>", trace.read_text())]
    state = re.sub(r"\d+", "N", str(installation.state))
    expected = [f"{state}/pool/N.img", f"{state}/pool", f"{state}/manifests/N", f"{state}/manifests"]
    ours = [path for path in synced if path in expected]
    assert ours[: len(expected)] == expected
    for number in range(1, 1 + max(index for index, path in enumerate(synced, 1) if path == expected[-1])):
        fault = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject=fsync:error=EIO:when={number}")
        with Helper(installation.config, prefix=fault) as helper:
            assert commit(helper, layer, payload) not in ("ok", "refused"), f"fsync {number} failed"
        with installation.connect():
            assert installation.rows() == []


def spread(every: list[Point]) -> list[Point]:
    """Order the points so that any beginning of the list is spread over the whole: by a stride prime to its length."""
    stride = next(number for number in range(int(len(every) * 0.382) | 1, 2 * len(every), 2) if len(every) % number)
    found, seen = [], set()
    at = 0
    for _ in every:
        while at in seen:
            at = (at + 1) % len(every)
        seen.add(at)
        found.append(every[at])
        at = (at + stride) % len(every)
    return found


def check_recovery(installation: Installation, layer: Layer, payload: Path, point: Point, outcome: str) -> None:
    """The next connection finds or makes the layer, whole; nothing else is left of what went before."""
    with installation.connect() as helper:
        installation.assert_agrees()
        present = [row["layer"] for row in installation.rows()]
        assert present in ([], [layer.id()]), (point, outcome)
        assert outcome != "ok" or present, (point, outcome)
        assert helper.ask("reconcile")["actions"] == [], (point, outcome)
        again = helper.commit(layer.manifest(), payload)
        assert again == again | {"type": "ok", "existed": bool(present)}, (point, outcome, again)
        assert helper.ask("verify", layer=layer.id())["type"] == "ok", (point, outcome)
        assert helper.ask("remove", layer=layer.id())["removed"] is True, (point, outcome)
    assert (installation.rows(), installation.images(), installation.loops()) == ([], set(), {}), (point, outcome)
