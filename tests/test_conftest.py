"""The policy on skips and leftovers, and the users that the fixtures give."""

from __future__ import annotations

import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.accounts import TEST_PREFIX, Account, remove_abandoned, run_name, temporary_account

ROOT = Path(__file__).resolve().parents[1]


def run_pytest(folder: Path, body: str, ci: str) -> subprocess.CompletedProcess[str]:
    """Run one test module under the policy, as CI does or as a developer does."""
    (folder / "test_inner.py").write_text(f"import os, subprocess, pytest\n\ndef test_inner(tmp_path):\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", os.devnull, "--rootdir", str(folder),
               "-p", "no:cacheprovider", "--basetemp", str(folder / "base"), str(folder)]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "CI": ci}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("body", "ci", "code"),
    [
        ("pass", "true", 0),
        ("pytest.skip('no time')", "true", 1),
        ("pytest.skip('no time')", "", 0),
        ("pytest.skip('this kernel has no device-mapper')", "true", 0),
        ("assert False", "true", 1),
    ],
)
def test_an_unexpected_skip_fails_ci(tmp_path: Path, body: str, ci: str, code: int) -> None:
    finished = run_pytest(tmp_path, body, ci)
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert ("ALLOWED_SKIPS does not list" in finished.stdout) == (code == 1 and "skip" in body)


@pytest.mark.root
def test_a_mount_left_behind_fails_ci(tmp_path: Path) -> None:
    body = "subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', str(tmp_path)], check=True)"
    try:
        finished = run_pytest(tmp_path, body, "true")
    finally:
        subprocess.run(["umount", *map(str, (tmp_path / "base").glob("test_inner*0"))], check=True)
    assert finished.returncode == 1
    assert "left behind" in finished.stdout


@pytest.mark.root
def test_accounts_are_ordinary_and_differ(member: Account, outsider: Account, group: str) -> None:
    assert group in member.run("id", "--name", "--groups").stdout.split()
    assert group not in outsider.run("id", "--name", "--groups").stdout.split()
    assert member.run("cat", "/etc/shadow", check=False).returncode == 1
    assert set(member.run("env").stdout.split("\n")) >= {f"HOME={member.home}", f"USER={member.name}"}


@pytest.mark.root
def test_an_account_goes_with_its_processes() -> None:
    with temporary_account(run_name("gone")) as account:
        process = subprocess.Popen(["sleep", "1000"], **account.options())
    assert process.wait(timeout=10) == -9
    assert not account.home.exists()
    with pytest.raises(KeyError):
        pwd.getpwnam(account.name)


def test_an_account_that_is_not_ours_is_never_made_or_removed() -> None:
    with pytest.raises(ValueError, match="begins with"), temporary_account("nobody"):
        pass
    assert pwd.getpwnam("nobody")


@pytest.mark.root
def test_the_account_of_a_killed_run_is_removed() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    name = f"{TEST_PREFIX}{process.pid}-killed"
    subprocess.run(["useradd", "--system", "--no-create-home", name], check=True)
    subprocess.run(["groupadd", "--system", f"{name}2"], check=True)
    remove_abandoned()
    with pytest.raises(KeyError):
        pwd.getpwnam(name)
    with pytest.raises(KeyError):
        grp.getgrnam(f"{name}2")


@pytest.mark.root
def test_the_installed_copy_is_readable_by_all_and_isolated(installed: Path, outsider: Account) -> None:
    script = "import sys, broker.protocol, unpriv; print(broker.__file__)"
    finished = outsider.run(installed / "bin/python", "-I", "-c", script)
    assert finished.stdout.startswith(str(installed))
    assert outsider.run("touch", installed / "x", check=False).returncode != 0
