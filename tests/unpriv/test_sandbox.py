"""The checker's sandbox: every way out is tried from inside the real, locked program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from broker import limits
from tests.support.accounts import Account
from tests.unpriv.probe import PROBES
from unpriv import sandbox
from unpriv.sandbox import Rules

PROBE = Path(__file__).with_name("probe.py")
# Refused by a resource limit instead of a death: the only ones.
LIMITS = limits.load().model_dump_json()
ONLY_DENIED = {"memory_of_three_gib"}


def attempt(name: str, scratch: Path, python: str = sys.executable, **options: Any) -> subprocess.CompletedProcess[str]:
    descriptors = [os.memfd_create("lower"), os.memfd_create("manifest")]
    try:
        with PROBE.open("rb") as blob:
            return subprocess.run(
                [python, "-I", "-c", PROBE.read_text("utf-8"), name, str(scratch), _job(descriptors), LIMITS],
                stdin=blob,
                capture_output=True,
                text=True,
                env={"LC_ALL": "C.UTF-8"},
                pass_fds=descriptors,
                timeout=60,
                **options,
            )
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _job(descriptors: list[int]) -> str:
    return json.dumps({"media": "tar", "lower": descriptors[:1], "manifest_fd": descriptors[1]})


def expect_stopped(name: str, result: subprocess.CompletedProcess[str]) -> None:
    assert "REACHED" not in result.stderr
    if name.removeprefix("thread:") in ONLY_DENIED:
        assert result.stderr.startswith("DENIED")
    else:
        assert result.returncode == -signal.SIGSYS, (result.returncode, result.stderr)


@pytest.mark.parametrize("name", PROBES)
def test_no_way_out_of_the_locked_checker(name: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"untouched")
    expect_stopped(name, attempt(name, tmp_path))
    assert (tmp_path / "victim").read_bytes() == b"untouched"
    assert sorted(os.listdir(tmp_path)) == ["victim"]


@pytest.mark.parametrize("name", ["open_file", "execve", "tcp_connect", "fork", "duplicate_descriptor"])
def test_the_other_thread_is_locked_too(name: str, tmp_path: Path) -> None:
    expect_stopped(name, attempt(f"thread:{name}", tmp_path))


@pytest.mark.root
@pytest.mark.parametrize("name", ["open_file", "signal_parent", "ptrace", "user_namespace", "execve", "unix_abstract"])
def test_no_way_out_for_an_ordinary_user(name: str, tmp_path: Path, installed: Path, member: Account) -> None:
    result = attempt(name, tmp_path, str(installed / "bin/python"), user=member.uid, group=member.gid, extra_groups=[])
    expect_stopped(name, result)


def test_probes_notice_an_open_way(tmp_path: Path) -> None:
    """Without the lock the very same probe gets through: the test can fail."""
    code = PROBE.read_text("utf-8").replace("check.main()", "_try(probe)")
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, "open_file", str(tmp_path), "{}"], capture_output=True, text=True, timeout=60
    )
    assert result.stderr.strip() == "REACHED"


# ---------------------------------------------------------------- lock() in general


def locked(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a fresh interpreter that has the module at hand."""
    lines = f"import os, sys\nfrom unpriv import kernel, sandbox\nfrom unpriv.sandbox import Rules, lock\n{code}"
    return subprocess.run([sys.executable, "-I", "-c", lines], capture_output=True, text=True, timeout=60, **options)


def test_landlock_alone_stops_files_and_tcp(tmp_path: Path) -> None:
    """The second wall stands by itself: seccomp is left out here."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").write_text("secret")
    result = locked(
        f"kernel.seccomp_filter = lambda program: None\n"
        f"sandbox._prove_seccomp = lambda: None\n"
        f"import socket\n"
        f"took = lock('check', Rules(write_beneath=[{str(tmp_path / 'in')!r}]), {{}})\n"
        f"open({str(tmp_path / 'in' / 'made')!r}, 'w').write('x')\n"
        f"for attempt in (lambda: open({str(tmp_path / 'out')!r}), lambda: os.listdir('/'),\n"
        f"                lambda: socket.socket().connect(('127.0.0.1', 9)),\n"
        f"                lambda: os.execv('/bin/true', ['true'])):\n"
        f"    try: attempt(); print('REACHED')\n"
        f"    except PermissionError: print('denied')\n"
        f"print(took['landlock'])\n"
    )
    words = result.stdout.split()
    assert words[:4] == ["denied"] * 4, result
    assert words[4] == "version"
    assert (tmp_path / "in" / "made").read_text() == "x"


def test_lock_refuses_a_process_with_threads() -> None:
    result = locked(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "try: lock('check', Rules(), {})\n"
        "except sandbox.SandboxError as error: print(error)\n"
    )
    assert "2 threads run already" in result.stdout


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("kernel.landlock_restrict = lambda ruleset: None", "Landlock did not take"),
        ("kernel.seccomp_filter = lambda program: None", "seccomp did not take"),
        ("sandbox.resource.setrlimit = lambda *a: None", "the resource limit core did not take"),
    ],
)
def test_lock_notices_what_did_not_take(broken: str, said: str) -> None:
    result = locked(
        f"import resource\nresource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1]))\n"
        f"{broken}\n"
        "try: lock('check', Rules(), {})\n"
        "except sandbox.SandboxError as error: print(error)\n"
        "else: os.write(1, b'locked')\n"
        "os._exit(0) if False else None\n"
    )
    assert said in result.stdout, result


def test_kernels_without_landlock_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unpriv.kernel.landlock_abi", lambda: 0)
    assert sandbox._restrict(Rules()).startswith("absent")


@pytest.mark.parametrize("version", range(1, 8))
def test_landlock_attributes_fit_each_version(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel refuses bits and bytes that it does not know: nothing newer than its version may be asked for."""
    seen: list[bytes] = []

    def ruleset(data: bytes) -> int:
        seen.append(data)
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr("unpriv.kernel.landlock_abi", lambda: version)
    monkeypatch.setattr("unpriv.kernel.landlock_ruleset", ruleset)
    monkeypatch.setattr("unpriv.kernel.landlock_restrict", lambda ruleset: None)
    with pytest.raises(sandbox.SandboxError, match="did not take"):
        sandbox._restrict(Rules())
    known_bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    assert int.from_bytes(seen[0][:8], "little") == (1 << known_bits) - 1
    assert len(seen[0]) == (8 if version < 4 else 16 if version < 6 else 24)
