"""The README is true: its commands exist, its codes are the catalogue's, its files are there."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.cli import imgpull
from broker.errors import CATALOGUE

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    c.strip() for block in BLOCKS for line in block.splitlines() for c in line.split("#")[0].split(";") if c.strip()
]


def test_there_are_commands_to_test() -> None:
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("imgpull ")])
def test_every_imgpull_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are accepted by the very parser; what would be done is left out."""
    called: list[str] = []

    def note(command: str, /, **_: object) -> None:
        called.append(command)

    monkeypatch.setattr("broker.cli._run", note)
    words = shlex.split(command)[1:]
    words = [str(ROOT / "README.md") if w == "layer.tar" else w for w in words]  # click asks whether the file exists
    result = CliRunner().invoke(imgpull, words)
    assert result.exit_code == 0, result.output
    assert called


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_every_make_target_exists(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in command.split()[1:]:
        assert re.search(rf"(?m)^{re.escape(target)}:", makefile), target


def test_every_helper_command_is_in_its_usage() -> None:
    usage = "".join((ROOT / f"privhelper/{name}.py").read_text("utf-8") for name in ("__main__", "administer"))
    for command in COMMANDS:
        if command.startswith("imgpull-helper "):
            assert command.split()[1] in usage and command.split()[2] in usage


def test_table_of_exit_codes_is_the_catalogues() -> None:
    table = {int(code) for code in re.findall(r"(?m)^\| (\d+) \|", README)}
    assert table - {0, 1} == {kind.exit_code for kind in CATALOGUE.values()}


def test_files_that_are_named_are_there() -> None:
    for name in re.findall(r"`((?:policy|privhelper|broker|unpriv|tests)/[A-Za-z0-9_./-]*)`", README):
        assert (ROOT / name).exists(), name


def test_every_command_is_shown() -> None:
    shown = {c.split()[1] for c in COMMANDS if c.startswith("imgpull ")} | set(re.findall(r"`imgpull ([a-z]+)", README))
    assert shown >= set(imgpull.commands) - {
        "completion",
        "version",
        "resume",
        "runs",
        "cancel",
        "pool",
        "verify",
        "deactivate",
    }
