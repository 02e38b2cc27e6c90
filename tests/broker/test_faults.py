"""Death, EIO and ENOSPC at every call by which the broker changes a file, by strace's injection.

Invariant tested: whichever call fails, and however, the next command ends right: nothing is left over, nothing is at
work, and SQLite, the files and root agree.

The calls are counted in a run that nothing disturbs. A sample by default; ``IMGPULL_FAULTS=all`` tries every call.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from tests.broker.test_crash import SCENARIOS, assert_sound, child, in_child, reset
from tests.support.world import World

ALL: Final = os.environ.get("IMGPULL_FAULTS") == "all"
SAMPLE: Final = 14  # faults of each command
CALLS: Final = (
    *("pwrite64", "write", "fsync", "fdatasync", "ftruncate", "unlink", "unlinkat", "rename", "link", "linkat"),
    *("openat", "mkdir", "mkdirat", "chmod", "fchmodat"),
)
HOWS: Final = ("signal=KILL", "error=EIO", "error=ENOSPC")
WRITING: Final = ("O_WRONLY", "O_RDWR", "O_CREAT")  # an openat(2) that only reads changes nothing


def traced(world: World, words: list[str], *options: str) -> tuple[int, str]:
    """Run a command in a forked process under strace, from its first own call on. Returns: its status, the trace."""
    ready, go = os.pipe()

    def wait() -> None:
        os.close(go)
        os.read(ready, 1)

    pid = child(world, words, before=wait)
    log = world.folder / "strace"
    strace = subprocess.Popen(["strace", "-qq", "-p", str(pid), "-o", str(log), *options], stderr=subprocess.PIPE)
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        assert strace.poll() is None, strace.communicate()[1].decode()
        time.sleep(0.001)
    os.close(go)
    os.close(ready)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    strace.communicate(timeout=30)
    return status, log.read_text(errors="replace")


def points(trace: str) -> list[tuple[str, int]]:
    """Return the calls that change something, each with its number among the calls of that name."""
    seen: Counter[str] = Counter()
    found = []
    for call, rest in re.findall(r"^([a-z_0-9]+)\((.*)$", trace, re.MULTILINE):
        seen[call] += 1
        if call in CALLS and (call != "openat" or any(flag in rest for flag in WRITING)):
            found.append((call, seen[call]))
    return found


@pytest.mark.parametrize("name", ["pull", "activate", "remove"])
def test_fault_at_every_call_that_changes_a_file(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    words, prepare, check, codes = SCENARIOS[name]
    prepare(world)
    status, trace = traced(world, words, "-e", f"trace={','.join(CALLS)}")
    assert status == 0
    every = [(call, number, how) for call, number in points(trace) for how in HOWS]
    chosen = every if ALL else random.Random(name).sample(every, min(SAMPLE, len(every)))
    ends: Counter[str] = Counter()
    for call, number, how in chosen:
        reset(world)
        prepare(world)
        rule = f"inject={call}:{how}:when={number}"
        status, _ = traced(world, words, "-e", f"trace={call}", "-e", rule)
        assert status != -signal.SIGALRM, f"{rule}: it hangs"
        ends["killed" if status == -signal.SIGKILL else "went on" if status == 0 else "told"] += 1
        assert in_child(world, words) in codes, (rule, (world.folder / "last").read_text())
        check(world)
        assert in_child(world, ["gc"]) == 0  # what a finished removal could not take away is left to it
        assert_sound(world)
    with capsys.disabled():
        print(f"\n{name}: {len(chosen)} of {len(every)} faults at calls that change a file, no violation: {dict(ends)}")
    assert ends["killed"] and ends["told"]
