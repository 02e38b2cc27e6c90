"""What `--json` prints is published and kept: policy/schema/output.json; and every exit code can be met."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from jsonschema import Draft202012Validator, ValidationError

from broker import outputs
from broker.cli import imgpull
from tests.support.output import SCHEMA, STREAMS, check_output
from tests.support.world import World

ROOT: Final = Path(__file__).resolve().parents[2]
REF: Final = "s3://bucket/images/one"
# In an order in which each finds what it needs.
COMMANDS: Final = (
    f"plan {REF}",
    f"pull {REF} --timing",
    f"pull {REF}",
    "ls",
    "ls --activations",
    "ls -o id,size",
    "show one",
    "df",
    "pins",
    "pool",
    "runs",
    "log one",
    "activate one --name b",
    "verify",
    "verify one",
    "gc --dry-run",
    "resume",
    "config show",
    "policy show quota",
    "policy show quota -o key",
    "explain",
    "explain busy",
    "explain parent_is_symlink",
    "version",
    "deactivate b",
    "deactivate one",
    "rm one",
    "show one",
)


def commands() -> set[str]:
    """Return every command that takes --json."""
    names = set()
    for name, command in imgpull.commands.items():
        for path, leaf in [(name, command)] + [(f"{name} {n}", c) for n, c in getattr(command, "commands", {}).items()]:
            if any("--json" in p.opts for p in leaf.params):
                names.add(path)
    return names


def test_schema_is_what_the_models_say() -> None:
    """`make manual` writes it."""
    Draft202012Validator.check_schema(SCHEMA)
    assert (ROOT / "policy/schema/output.json").read_text(encoding="utf-8") == outputs.schema_text()
    assert set(SCHEMA["properties"]) == commands() | {"error"}
    assert set(STREAMS) == set(outputs.STREAMS)


def test_every_command_prints_what_the_schema_says(world: World) -> None:
    world.put("one", b"a", b"b")
    for line in COMMANDS:
        code, out, _ = world.run(*line.split(), "--json")  # World holds each against the schema
        assert out and code in (0, 66), line
    assert code == 66


def test_run_in_detail_is_in_the_schema(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF)
    run = json.loads(world.run("runs", "--json")[1])[0]["run"]
    assert json.loads(world.run("runs", run, "--json")[1])["events"][0]["type"] == "start"
    assert json.loads(world.run("cancel", run, "--json")[1])["state"] == "done"


def test_output_that_the_schema_does_not_know_is_noticed() -> None:
    with pytest.raises(ValidationError):
        check_output(["deactivate", "x", "--json"], '{"v": 1, "type": "result", "result": "deactivate", "time": 1}')
    with pytest.raises(ValidationError):
        check_output(["ls", "--json"], '[{"image": "x"}]')
    with pytest.raises(ValidationError):
        check_output(["pull", "x", "--json"], '{"v": 1, "type": "news", "time": 1}')


def test_doctor_audit_and_check_print_what_the_schema_says(tmp_path: Path) -> None:
    """With the real workers; `doctor` finds no helper here and ends with 1."""
    subprocess.run(["tar", "-cf", str(tmp_path / "1.tar"), "-C", "/", "etc/hostname"], check=True)
    helper = f"IMGPULL_HELPER_SOCKET={tmp_path}/none"
    for words, expected in ((["doctor"], 1), (["policy", "audit"], 0), (["check", str(tmp_path / "1.tar")], 0)):
        command = ["env", f"HOME={tmp_path}", helper, sys.executable, "-m", "broker.cli", *words, "--json"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
        check_output([*words, "--json"], done.stdout)
        assert done.stdout


def test_findings_end_with_1(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF)
    world.helper.script["verify"] = lambda _: world.helper.error("fault", "content differs: usr/bin/su")
    code, out, _ = world.run("verify", "one")
    assert (code, "BAD" in out and "usr/bin/su" in out) == (1, True)
    assert world.run("verify", "one", "--json")[0] == 1


def test_reader_that_goes_away_ends_with_the_signals_code(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "broker.cli", "policy", "show"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
