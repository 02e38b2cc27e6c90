"""Ordinary users of this machine, for what must be shown to work, or to be refused, without root.

Rule 1: an account is made for one run and removed with it; those of tests bear the run's process id in their names.
Rule 2: a run that was killed leaves an account; the next run knows it by its name and removes it.
Rule 3: a command run as another user gets a clean environment: nothing of root's leaks into it.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PREFIX: Final = "imgpull-"  # no account without it is ever removed
TEST_PREFIX: Final = f"{PREFIX}t"
PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
GONE_S: Final = 30.0  # a killed process is gone within this, whatever the machine has to do
USER_BUSY: Final = 8  # userdel(8), exit values
TERMINAL: Final = ("TERM", "COLORTERM", "COLUMNS", "LINES", "NO_COLOR", "TZ")


@dataclass(frozen=True, slots=True)
class Account:
    """A user, and the groups that a command of his is started with besides his own."""

    name: str
    uid: int
    gid: int
    home: Path
    groups: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def options(self, **environment: str) -> dict[str, Any]:
        """Return what subprocess (and trio) need to start a command as this user, in his home."""
        kept = {name: os.environ[name] for name in TERMINAL if name in os.environ}
        own = {"HOME": str(self.home), "PATH": PATH, "LC_ALL": "C.UTF-8", "USER": self.name, "LOGNAME": self.name}
        chosen: dict[str, Any] = {"cwd": self.home, "env": {**kept, **own, **self.environment, **environment}}
        if os.geteuid() == 0:
            chosen |= {"user": self.uid, "group": self.gid, "extra_groups": list(self.groups), "umask": 0o022}
        return chosen

    def run(
        self, *command: str | Path, check: bool = True, timeout_s: float = 120, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as this user and return what it printed."""
        return subprocess.run(
            [str(word) for word in command],
            check=check, timeout=timeout_s, text=True, capture_output=True, stdin=subprocess.DEVNULL,
            **self.options(**environment),
        )  # fmt: skip


@contextlib.contextmanager
def temporary_account(name: str, groups: Sequence[str] = ()) -> Iterator[Account]:
    """Make a user with a home of his own, in ``groups`` besides his own; remove him, his home and his processes."""
    home = _home(name)
    _remove(name)
    _run("useradd", "--system", "--no-create-home", "--home-dir", str(home), "--shell", "/usr/sbin/nologin",
         "--user-group", *(["--groups", ",".join(groups)] if groups else []), name)  # fmt: skip
    try:
        entry = pwd.getpwnam(name)
        home.mkdir(mode=0o700)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        gids = tuple(grp.getgrnam(group).gr_gid for group in groups)
        yield Account(name, entry.pw_uid, entry.pw_gid, home, gids)
    finally:
        _remove(name)


def run_name(suffix: str) -> str:
    """Return a name for what this run of the tests makes outside of its own folders."""
    return f"{TEST_PREFIX}{os.getpid()}-{suffix}"


@contextlib.contextmanager
def client_group(name: str = "imgpull") -> Iterator[str]:
    """Make sure that the group whose members may ask the root helper exists; remove it if it did not."""
    try:
        grp.getgrnam(name)
    except KeyError:
        _run("groupadd", "--system", name)
        try:
            yield name
        finally:
            _run("groupdel", name)
    else:
        yield name


def remove_abandoned() -> None:
    """Remove the accounts and groups of runs that are no more."""
    for entry in pwd.getpwall():
        if is_abandoned(entry.pw_name):
            _remove(entry.pw_name)
    for group in grp.getgrall():
        if is_abandoned(group.gr_name):
            _run("groupdel", group.gr_name)


def is_abandoned(name: str) -> bool:
    """Tell whether ``name`` comes from ``run_name`` in a process that is no more."""
    match = re.fullmatch(rf"{TEST_PREFIX}(\d+)-\w+", name)
    return match is not None and not Path(f"/proc/{match[1]}").exists()


def _remove(name: str) -> None:
    """Remove an account of ours with its processes and its home, if it is there."""
    if not name.startswith(PREFIX):
        raise ValueError(f"{name}: the name of an account of ours begins with {PREFIX}")
    with contextlib.suppress(KeyError):
        _delete_user(name, pwd.getpwnam(name).pw_uid)
    shutil.rmtree(_home(name), ignore_errors=True)


def _home(name: str) -> Path:
    return Path(f"/var/tmp/home-of-{name}")  # a name that nothing else is called by: it is removed as a whole


def _delete_user(name: str, uid: int) -> None:
    """Kill a user's processes and delete him, which userdel refuses while one is dying.

    One may still be root's when it is looked for: started an instant ago, and about to become the user's.
    """
    give_up_s = time.monotonic() + GONE_S
    while True:
        for process in _processes_of(uid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            return _run("userdel", name)
        except subprocess.CalledProcessError as error:
            if error.returncode != USER_BUSY or time.monotonic() > give_up_s:
                raise
        time.sleep(0.02)


def _processes_of(uid: int) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and folder.stat().st_uid == uid:
                found.append(int(folder.name))
    return found


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)
