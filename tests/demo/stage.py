"""What the demo stands on: an S3 server, images in it, a pool, the root helper, an ordinary user.

Rule 1: one folder, /var/tmp/imgpull-demo, and one lock: a second demo at the same time is refused.
Rule 2: whatever ends the demo, what was set up is taken down in reverse order; a kill -9 is mended by the next demo.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.layers.families import Family
from tests.servers.swift import Swift
from tests.support.accounts import Account, temporary_account
from tests.support.caching import owned_folder
from tests.support.helper import ROOT, mend

FOLDER: Final = Path("/var/tmp/imgpull-demo")
HELPER: Final = FOLDER / "imgpull-demo-helper"
LOCK: Final = Path("/run/lock/imgpull-demo")
USER: Final = "imgpull-demo"
BUCKET: Final = "demo"
START_S: Final = 90.0


class StageError(Exception):
    """The demo cannot begin, or its server does not start."""


@contextlib.contextmanager
def empty_stage() -> Iterator[None]:
    """Hold the demo's lock and folder; mend what a killed demo left."""
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError("another demo is running on this machine") from None
        mend(HELPER)
        shutil.rmtree(FOLDER, ignore_errors=True)
        owned_folder(FOLDER)
        try:
            yield
        finally:
            shutil.rmtree(FOLDER)


@contextlib.contextmanager
def s3_server() -> Iterator[Swift]:
    """Start OpenStack Swift with its S3 API on loopback; it ends with this process, whatever ends that."""
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "tests.servers.swift", "run", str(FOLDER / "s3")]
    with (FOLDER / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                                   text=True, start_new_session=True)  # fmt: skip
    try:
        assert process.stdout is not None
        words = dict(re.findall(r"(\w+)=(\S+)", process.stdout.readline()))
        if not words:
            raise StageError(f"no S3 server: {(FOLDER / 's3.log').read_text()}")
        yield Swift(**words)
    finally:
        process.terminate()
        process.wait(START_S)


@contextlib.contextmanager
def ordinary_user(group: str, environment: dict[str, str]) -> Iterator[Account]:
    """Yield who runs the demo through sudo, or a user made for it; his commands run with ``group`` besides his own."""
    sudo_user = os.environ.get("SUDO_USER", "root")
    if sudo_user == "root":
        with temporary_account(USER, groups=[group]) as account:
            yield replace(account, environment=environment)
    else:
        entry = pwd.getpwnam(sudo_user)
        home = FOLDER / "home"
        home.mkdir(mode=0o700)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        groups = (grp.getgrnam(group).gr_gid,)
        yield Account(sudo_user, entry.pw_uid, entry.pw_gid, home, groups, environment)


def upload(s3: Swift, families: tuple[Family, ...], *others: Path) -> list[tuple[str, int]]:
    """Put each family under images/NAME/, and the other tarballs under images/; return keys and sizes."""
    objects = {f"images/{family.name}/{layer.name}": layer for family in families for layer in family.layers}
    objects |= {f"images/{path.name}": path for path in others}
    client = s3.client()
    client.create_bucket(Bucket=BUCKET)
    for key, path in objects.items():
        client.upload_file(str(path), BUCKET, key)
    return [(key, path.stat().st_size) for key, path in objects.items()]


def unwind_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind like Ctrl-C, so that what was set up is taken down."""

    def unwind(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, unwind)


def ignore_signals() -> None:
    """Let nothing interrupt what takes down the stage."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
