"""Every error as a user meets it: its three lines, its exit code, its object; each code is reached by a real command.

The lines are in errors.txt beside this file; ``IMGPULL_RECORD=1 pytest tests/cli/test_errors.py`` writes it anew.
"""

import json
import os
import re
import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from broker import work, worker
from broker.errors import CATALOGUE
from broker.settings import POLICY_DIR
from tests.support.world import World

GOLDEN: Final = Path(__file__).with_name("errors.txt")
REF: Final = "s3://bucket/images/one"
RULES: Final = tomllib.loads((POLICY_DIR / "rules.toml").read_text(encoding="utf-8"))
Scene = Callable[[World, pytest.MonkeyPatch], str]
RECORDED: Final[dict[str, str]] = {}


def helper_says(op: str, code: str, message: str, **more: Any) -> Scene:
    def scene(world: World, _: pytest.MonkeyPatch) -> str:
        world.helper.script[op] = lambda _: world.helper.error(code, message, **more)
        return f"pull {REF}"

    return scene


def fetcher_says(code: str, message: str) -> Scene:
    def scene(_: World, patch: pytest.MonkeyPatch) -> str:
        refusal = {"type": "failed", "id": 0, "code": code, "message": message, "retryable": False}
        script = f"import sys; sys.stdin.readline(); print({json.dumps(json.dumps(refusal))}); sys.exit(78)"
        patch.setattr(worker, "FETCH", (sys.executable, "-c", script))
        return f"pull {REF}"

    return scene


def layer(content: bytes) -> Scene:
    def scene(world: World, _: pytest.MonkeyPatch) -> str:
        world.put("one", b"a", content)
        return f"pull {REF}"

    return scene


def words(text: str) -> Scene:
    return lambda world, patch: text


def no_helper(world: World, _: pytest.MonkeyPatch) -> str:
    world.environ["IMGPULL_HELPER_SOCKET"] = str(world.folder / "none")
    return f"pull {REF}"


def gap(world: World, _: pytest.MonkeyPatch) -> str:
    world.put("one", b"a", b"b", b"c")
    (world.bucket / "images/one/2.tar").unlink()
    return f"pull {REF}"


def name_in_use(world: World, _: pytest.MonkeyPatch) -> str:
    world.put("two", b"z")
    world.run("pull", "s3://bucket/images/two")
    return f"pull {REF} --name two"


def interrupted(world: World, _: pytest.MonkeyPatch) -> str:
    def interrupt(_: dict[str, Any]) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGINT)
        return {"type": "ok", "state": "absent"}

    world.helper.script["stat"] = interrupt
    return f"pull {REF}"


def foreign_database(world: World, _: pytest.MonkeyPatch) -> str:
    world.paths.state.mkdir(parents=True)
    world.paths.database.write_bytes(b"not a database, " * 100)
    return f"pull {REF}"


def broken_program(_: World, patch: pytest.MonkeyPatch) -> str:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    patch.setattr(work, "inventory", fail)
    return "pool"


def wrong_variable(world: World, _: pytest.MonkeyPatch) -> str:
    world.environ["IMGPULL_MAX_STREAMS"] = "many"
    return "ls"


ROOM: Final = {"needed_bytes": 5_000_000_000, "free_bytes": 1_000_000_000}
SCENES: Final[dict[str, Scene]] = {
    "archive-rejected": layer(b"evil"),
    "digest-mismatch": words(f"pull {REF} --expect sha256:{'0' * 64}"),
    "not-an-image": gap,
    "worker-failed": layer(b"die"),
    "no-such-object": words(f"pull {REF}/9.tar"),
    "no-such-image": words("show golang"),
    "no-such-activation": words("deactivate golang"),
    "no-such-run": words("runs 01ZZ"),
    "helper-unavailable": no_helper,
    "pool-unavailable": helper_says("commit", "pool", "the pool is read-only; as root: imgpull-helper pool check"),
    "s3-unavailable": fetcher_says("unavailable", "cannot list s3://bucket/images/one/: connection refused"),
    "bug": broken_program,
    "no-room": helper_says("commit", "no_room", "not enough free in the pool; nothing was written", figures=ROOM),
    "io-error": helper_says("commit", "fault", "fsync: Input/output error"),
    "state-damaged": foreign_database,
    "busy": name_in_use,
    "object-changed": fetcher_says("changed", "images/one/1.tar changed while it was fetched"),
    "interrupted": interrupted,
    "version-mismatch": helper_says("hello", "version", "this helper speaks version 2"),
    "access-denied": fetcher_says("access_denied", "cannot list s3://bucket/images/one/: AccessDenied"),
    "not-permitted": helper_says("commit", "refused", "more than 256 GiB of layers of user 1000", rule="quota"),
    "configuration": wrong_variable,
    "usage": words("pull golang"),
}


def golden() -> dict[str, str]:
    if not GOLDEN.exists():
        return {}
    parts = re.split(r"(?m)^== (\S+)\n", GOLDEN.read_text(encoding="utf-8"))[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def play(world: World, patch: pytest.MonkeyPatch, code: str, *more: str) -> tuple[str, int, str, str]:
    world.put("one", b"a")
    line = SCENES[code](world, patch)
    return line, *world.run(*line.split(), *more)


@pytest.mark.parametrize("code", CATALOGUE)
def test_three_lines_of_every_error(code: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    line, status, out, err = play(world, monkeypatch, code)
    assert (status, out) == (CATALOGUE[code].exit_code, "")
    said = err.replace(str(world.folder), "~")
    told = [text for text in said.splitlines() if text.startswith(("imgpull: ", "  why:  ", "  next: "))]
    assert [text.split()[0] for text in told] == ["imgpull:", "why:", "next:"], err
    assert said.splitlines()[-3:] == told and "Traceback" not in err
    shown = f"$ imgpull {line}\n" + "".join(f"{text}\n" for text in told) + f"[exit code {status}]\n"
    if "IMGPULL_RECORD" in os.environ:
        RECORDED[code] = shown
        GOLDEN.write_text("\n".join(f"== {c}\n{text}" for c, text in RECORDED.items()), encoding="utf-8")
    assert shown.strip() == golden()[code].strip()


def test_no_scene_is_left_over() -> None:
    assert set(golden()) == set(SCENES) == set(CATALOGUE)


@pytest.mark.parametrize("code", CATALOGUE)
def test_the_same_error_as_one_object(code: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, status, out, _ = play(world, monkeypatch, code, "--json")
    last = json.loads(out.splitlines()[-1])
    assert (last["type"], last["code"], last["exit"]) == ("error", code, status)
    assert all(last[part] for part in ("what", "why", "advice"))
    assert last["retryable"] is CATALOGUE[code].retryable


@pytest.mark.parametrize("word", [*CATALOGUE, *RULES])
def test_explain_knows_every_code_and_rule_offline(word: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise AssertionError("the network or another process was asked")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    monkeypatch.setattr("subprocess.Popen.__init__", unreachable)
    code, out, _ = world.run("explain", word)
    assert code == 0
    assert word in out.splitlines()[0] and len(out.splitlines()) >= 3


def test_explain_without_a_word_lists_them_all(world: World) -> None:
    out = world.run("explain")[1]
    assert all(word in out for word in (*CATALOGUE, *RULES))


def test_traceback_is_shown_with_debug_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_program(world, monkeypatch)
    assert "Traceback" not in "".join(world.run("pool")[1:])
    code, _, err = world.run("pool", "--debug")
    assert (code, "Traceback" in err, "ZeroDivisionError" in err) == (70, True, True)


@pytest.mark.parametrize("line", ["pulll", "pull", "ls --jsno", "pull x --progress=maybe", "config shwo"])
def test_wrong_command_line_is_told_like_every_error(line: str, world: World) -> None:
    code, out, err = world.run(*line.split())
    assert (code, out) == (2, "")
    assert [text.split()[0] for text in err.splitlines()] == ["imgpull:", "why:", "next:"]
    assert "--help" in err.splitlines()[2]
    code, out, err = world.run(*line.split(), "--json")
    assert (code, json.loads(out)["code"], err) == (2, "usage", "")


def test_missing_helper_is_told_before_anything_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    _, status, _, _ = play(world, monkeypatch, "helper-unavailable")
    assert (status, world.lines("transfers"), world.paths.database.exists()) == (69, [], False)
