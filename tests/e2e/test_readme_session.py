"""The README's sessions, typed again: each command is run, each line of its output is there, numbers aside."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.demo.hostile import write_escape
from tests.e2e.conftest import BUCKET, Bucket, User

pytestmark = pytest.mark.root
README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
# What differs from machine to machine and from day to day.
VARYING = (
    (r"/dev/[a-z]+-?[0-9]+", "DEVICE"),
    (r"\b[0-9a-f]{12}\b", "ID"),
    (r"[0-9]+(\.[0-9]+)? (B|kB|MB|GB)\b", "SIZE"),
    (r"\b(just now|[0-9]+ (minute|hour|day)s? ago)", "WHEN"),
    (r"[0-9]+ %", "SHARE"),
    (r"root [0-9]+ +[A-Z][a-z]{2} +[0-9]+ +[0-9:]+", "root N DATE"),
    (r"\b[0-9]+$", "N"),
    (r"var/lib/app/\S+:", "VICTIM:"),
    (r" +", " "),
)


def sessions() -> list[tuple[str, list[str]]]:
    """Return each command of the README's console blocks with the lines that it prints."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def masked(line: str) -> str:
    for pattern, word in VARYING:
        line = re.sub(pattern, word, line)
    return line.strip()


def test_sessions_of_the_readme(user: User, bucket: Bucket, debian: dict[str, str], tmp_path: Path) -> None:
    assert debian.keys() == {"base-tools", "base-python"}
    victim = Path("/var/tmp") / f"imgpull-victim-{os.getpid()}"
    victim.write_text("precious\n")
    write_escape(tmp_path / "evil.tar", victim)
    bucket.client.upload_file(str(tmp_path / "evil.tar"), BUCKET, "images/evil.tar")
    typed = sessions()
    assert len(typed) >= 7
    for command, lines in typed:
        words = shlex.split(command)
        assert words[0] == "imgpull"
        done = user.account.run(user.program, *words[1:], check=False, timeout_s=300)
        said = [masked(line) for line in (done.stderr + done.stdout).splitlines()]
        # The order of stages of different layers is chance; that each line is there is not.
        missing = [line for line in map(masked, lines) if line not in said]
        assert missing == [], (command, said)
    assert victim.read_text() == "precious\n"
    victim.unlink()
