"""The demo takes down what it set up, also when it is interrupted. That it succeeds is shown by running it."""

from __future__ import annotations

import fcntl
import os
import pwd
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.demo.hostile import write_escape
from tests.demo.processes import Watcher
from tests.demo.stage import FOLDER, HELPER, LOCK, USER
from tests.support.helper import ROOT, SOCKETS, loops_below, mounts_below

# A shell starts what runs in its background with SIGINT ignored, and children inherit that (bash(1), "SIGNALS").
DEMO = ("env", "--default-signal=INT,TERM", sys.executable, "-m", "tests.demo")


@contextmanager
def demo() -> Iterator[subprocess.Popen[str]]:
    """Start the demo as a terminal would: leader of its own group."""
    with subprocess.Popen(DEMO, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, start_new_session=True) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals, code: int) -> None:
    with demo() as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("== A pull"):
                os.killpg(process.pid, number)
        assert process.wait(60) == code, "".join(lines)
    assert not (FOLDER.exists() or (SOCKETS / HELPER.name).exists())
    assert not (loops_below(FOLDER) or mounts_below(FOLDER))
    assert USER not in {entry.pw_name for entry in pwd.getpwall()}


@pytest.mark.root
def test_two_demos_at_once_are_refused() -> None:
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finished = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode != 0
    assert "another demo is running" in finished.stderr


def test_the_hostile_tarball_would_reach_its_victim(tmp_path: Path) -> None:
    victim, tarball = tmp_path / "victim/file", tmp_path / "evil.tar"
    victim.parent.mkdir()
    write_escape(tarball, victim)
    with tarfile.open(tarball) as tar:
        link, through, climb = tar.getmembers()
    assert Path(link.linkname, Path(through.name).relative_to(link.name)) == victim
    assert os.path.normpath(f"/any/folder/of/a/few/levels/{climb.name}") == str(victim)
    subprocess.run(["/usr/bin/python3", "-c", CARELESS, str(tarball), str(tmp_path)], check=True)
    assert victim.read_text() == "the attacker was here\n"


CARELESS = """
import os, sys, tarfile
tarball, folder = sys.argv[1:]
for member in (tar := tarfile.open(tarball)):
    path = os.path.join(folder, member.name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if member.issym():
        os.symlink(member.linkname, path)
    elif ".." not in path:
        open(path, "wb").write(tar.extractfile(member).read())
"""


def test_processes_are_seen_with_what_they_may_do() -> None:
    watcher = Watcher(os.getuid(), listener_pid=-1)
    end_s = time.monotonic() + 10
    with subprocess.Popen(["sleep", "100"]) as process:
        # execve(2) closes descriptors, which is what Popen waits for, before the new command line can be read.
        while not any("sleep 100" in line for line in watcher.table()) and time.monotonic() < end_s:
            watcher.look()
        process.kill()
    row = next(line for line in watcher.table() if "sleep 100" in line)
    user, *_, capabilities = row.split()
    assert (user, capabilities) == (pwd.getpwuid(os.getuid()).pw_name, "all" if os.getuid() == 0 else "none")
