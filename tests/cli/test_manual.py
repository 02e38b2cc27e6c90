"""The man pages, the help and the completion: made from the code, current, whole."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import click
import pytest

from broker.cli import SECTIONS, imgpull
from broker.errors import CATALOGUE
from broker.settings import SETTINGS
from tests.setup.manual import texts
from tests.support.world import World

ROOT: Final = Path(__file__).resolve().parents[2]


def plain(name: str) -> str:
    """Return a page as it is read, without the marks of roff."""
    page = (ROOT / "broker/man" / name).read_text(encoding="utf-8")
    return re.sub(r"\\f[BRI]|\\&", "", page).replace("\\-", "-").replace("\\e", "\\")


@pytest.mark.parametrize("name", texts())
def test_what_is_made_is_current(name: str) -> None:
    """`make manual` writes it."""
    assert (ROOT / name).read_text(encoding="utf-8") == texts()[name]


def test_every_command_has_its_section_its_line_and_its_options() -> None:
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(imgpull.commands)
    page = plain("imgpull.1")
    for name, command in imgpull.commands.items():
        assert command.short_help and len(command.short_help) <= 60 and command.short_help.endswith(".")
        assert f"\nimgpull {name} " in page
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert option.opts[-1] in page and option.help, (name, option.name)


def test_every_setting_and_exit_code_is_described() -> None:
    page = plain("imgpull.toml.5")
    assert all(f"\n{row.name} (" in page and row.variables[0] in page for row in SETTINGS)
    codes = set(re.findall(r"(?m)^\.TP\n\.B (\d+)$", plain("imgpull.1")))
    assert codes == {str(kind.exit_code) for kind in CATALOGUE.values()}


def test_security_page_says_what_security_md_says() -> None:
    page = plain("imgpull-security.7")
    for title in re.findall(r"(?m)^## (.+)$", (ROOT / "SECURITY.md").read_text(encoding="utf-8")):
        assert f".SH {title.upper()}" in page
    assert ".B populate" in page


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_help_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word that is wider than the room it has, such as a list of choices, is the only thing that may stick out."""
    monkeypatch.setenv("COLUMNS", str(columns))
    inner = [
        c for group in imgpull.commands.values() if isinstance(group, click.Group) for c in group.commands.values()
    ]
    for command in (imgpull, *imgpull.commands.values(), *inner):
        with command.context_class(command, info_name="imgpull", max_content_width=100) as context:
            for line in command.get_help(context).splitlines():
                assert len(line) <= columns or len(line.split()) <= 2, line


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_what_is_there(shell: str, world: World) -> None:
    world.put("one", b"a")
    world.run("pull", "s3://bucket/images/one")
    script = world.run("completion", shell)[1]
    assert f"_IMGPULL_COMPLETE={shell}_complete" in script

    def complete(words: str, incomplete: str) -> str:
        asked = {"_IMGPULL_COMPLETE": f"{shell}_complete", "COMP_WORDS": f"imgpull {words} {incomplete}"}
        asked["COMP_CWORD"] = incomplete if shell == "fish" else str(len(words.split()) + 1)
        command = [sys.executable, "-m", "broker.cli"]
        environment = {**os.environ, **world.environ, **asked}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert "pull" in complete("", "pu") and "rm" not in complete("", "pu")
    assert "one" in complete("show", "o")
    assert "no-room" in complete("explain", "no-")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [("show o", ["one"]), ("pu", ["pull"]), ("policy au", ["audit"]), ("pull --progress pl", ["plain"])],
)
def test_completion_in_a_real_bash(typed: str, expected: list[str], world: World) -> None:
    """As bash does it when Tab is pressed: words, which of them, and the answer in COMPREPLY; see bash(1)."""
    world.put("one", b"a")
    world.run("pull", "s3://bucket/images/one")
    program = world.folder / "imgpull"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m broker.cli "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    words = ["imgpull", *typed.split()]
    script = (
        f"{world.run('completion', 'bash')[1]}\n"
        f"complete -p imgpull >/dev/null; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}\n"
        "_imgpull_completion imgpull; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    environment = {"PATH": f"{world.folder}:/usr/bin:/bin", **world.environ}
    command = ["bash", "--norc", "-euc", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_that_its_shell_reads(shell: str, world: World) -> None:
    """bash is always there; the others are asked where they are installed, else only their own words are looked for."""
    script = world.run("completion", shell)[1]
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
    words = {
        "bash": "complete -o nosort -F",
        "zsh": "#compdef imgpull",
        "fish": "complete --no-files --command imgpull",
    }
    assert words[shell] in script
