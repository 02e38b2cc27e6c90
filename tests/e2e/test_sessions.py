"""What a user sees on the days that matter: sessions kept as text in sessions/, typed again and compared by this test.

``IMGPULL_RECORD=1 pytest tests/e2e/test_sessions.py`` writes them anew. The order in which stages of different layers
come is chance, and so are numbers; that each line is there, and no other, is not.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.demo.hostile import write_escape
from tests.e2e.conftest import BUCKET, Bucket, User
from tests.e2e.test_readme_session import masked
from tests.support.accounts import Account, run_name
from tests.support.helper import running_helper

pytestmark = pytest.mark.root
FOLDER: Final = Path(__file__).with_name("sessions")
LEFT: Final = f"s3://{BUCKET}/images/left"
# What a network does on its own: where a fetch was cut, and that it was tried again.
CHANCE: Final = re.compile(r"resumes with|retry|trying again| \d+ %$")


class Session:
    """Commands of a user and what they print, as one text."""

    def __init__(self, user: User) -> None:
        self.user = user
        self.text = ""

    def environment(self, **environment: str) -> dict[str, str]:
        return {"PATH": f"{self.user.program.parent}:/usr/bin:/bin", **environment}

    def type(self, line: str, code: int = 0, **environment: str) -> None:
        """Type a command and wait for its end."""
        process = self._start(line, **environment)
        self._end(line, process, process.communicate(timeout=120)[0], code)

    def interrupt(self, line: str, code: int, **environment: str) -> None:
        """Type a command, and Ctrl-C twice when a layer is being fetched."""
        process = self._start(line, **environment)
        assert process.stdout is not None
        said = ""
        for sign, until in ((signal.SIGINT, ": fetching"), (signal.SIGINT, "stopping after")):
            while until not in said:
                said += process.stdout.readline()
            process.send_signal(sign)
            said += "^C\n"
        self._end(line, process, said + process.communicate(timeout=120)[0], code)

    def _start(self, line: str, **environment: str) -> subprocess.Popen[str]:
        account: Account = self.user.account
        options = account.options(**self.environment(**environment))
        return subprocess.Popen(
            shlex.split(line), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            **options,
        )  # fmt: skip

    def _end(self, line: str, process: subprocess.Popen[str], said: str, code: int) -> None:
        said = re.sub(r"/run/[^/]+/helper\.sock", "/run/imgpull/helper.sock", said)
        self.text += f"$ {line}\n{said}"
        if code:
            self.text += f"[exit code {code}]\n"
        assert process.returncode == code, said

    def compare(self, name: str) -> None:
        """Hold the session against the recorded one."""
        path = FOLDER / f"{name}.txt"
        if "IMGPULL_RECORD" in os.environ:
            path.write_text(self.text, encoding="utf-8")
        recorded, said = (
            {masked(line) for line in text.splitlines() if not CHANCE.search(line)}
            for text in (path.read_text(encoding="utf-8"), self.text)
        )
        assert said == recorded


@pytest.fixture
def full(user: User, group: str) -> Iterator[User]:
    """Return the user before a helper whose pool keeps all but one hundredth of itself free."""
    settings = {"admission": {"data_reserve_percent": 99}}
    with running_helper(Path(f"/var/tmp/{run_name('full')}"), group, settings=settings) as helper:
        environment = {**user.account.environment, "IMGPULL_HELPER_SOCKET": str(helper.socket)}
        yield replace(user, account=replace(user.account, environment=environment), helper=helper)


def test_first_and_second_pull(user: User, small: dict[str, str]) -> None:
    assert small["left"] == LEFT
    session = Session(user)
    session.type(f"imgpull plan {LEFT}")
    session.type(f"imgpull pull {LEFT}")
    session.compare("first-pull")
    session = Session(user)
    session.type(f"imgpull pull {LEFT}")
    session.type("imgpull ls")
    session.type(f"imgpull pull s3://{BUCKET}/images/right")
    session.compare("second-pull")


def test_refused_archive(user: User, bucket: Bucket, tmp_path: Path) -> None:
    victim = Path("/var/tmp/imgpull-session-victim")
    victim.write_text("precious\n")
    try:
        write_escape(tmp_path / "evil.tar", victim)
        bucket.client.upload_file(str(tmp_path / "evil.tar"), BUCKET, "images/evil.tar")
        session = Session(user)
        session.type(f"imgpull pull s3://{BUCKET}/images/evil.tar", 65)
        session.type("imgpull explain parent_is_symlink")
        session.type("imgpull ls -H")
        session.compare("refused-archive")
        assert victim.read_text() == "precious\n"
    finally:
        victim.unlink()


def test_full_pool(full: User, small: dict[str, str]) -> None:
    session = Session(full)
    session.type(f"imgpull pull {small['left']}/1.tar", 73)
    session.compare("full-pool")


def test_missing_helper_and_no_permission(user: User, stranger: User, small: dict[str, str]) -> None:
    session = Session(user)
    session.type(f"imgpull pull {small['right']}", 69, IMGPULL_HELPER_SOCKET="/run/imgpull-none/helper.sock")
    session.compare("missing-helper")
    session = Session(stranger)
    session.type(f"imgpull pull {small['right']}", 77)
    session.compare("no-permission")


def test_interrupted_and_resumed(user: User, small: dict[str, str]) -> None:
    session = Session(user)
    session.interrupt(f"imgpull pull {small['left']}/2.tar --limit-rate 4M", 128 + signal.SIGINT)
    session.type(f"imgpull pull {small['left']}/2.tar")
    session.compare("interrupted-and-resumed")
