"""Two commands on one state folder: the second waits, shows the first one's progress, goes on when the first dies."""

import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.output import check_output
from tests.support.world import World

REF = "s3://bucket/images/one"
# A second process of the same user, whose fetcher and checker are the programs of the tests.
COMMAND = """
import sys
from broker import checker, worker, store
from broker.cli import main
folder, programs = sys.argv.pop(1), sys.argv.pop(1)
checker.COMMAND = (sys.executable, f"{programs}/fake_check.py", folder)
worker.FETCH = (sys.executable, f"{programs}/fake_fetch.py", folder)
main()
"""


def start(world: World, *words: str, progress: str = "plain", stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    programs = Path(__file__).parent / "programs"
    environment = {
        **os.environ,
        **world.environ,
        "IMGPULL_PROGRESS": progress,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(world.folder), str(programs), *words],
        env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip


def until_stuck(world: World, op: str, first: subprocess.Popen[str]) -> None:
    """Wait until root was asked for this, which it does not answer."""
    while not world.helper.count(op):
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("dies", [False, True])
def test_second_pull_shows_the_first_and_takes_over_when_it_dies(world: World, dies: bool) -> None:
    world.put("one", b"a", b"b")
    normal, held = world.helper.answer, world.folder / "held"
    held.touch()

    def slow(request: dict[str, object], descriptors: list[int]) -> list[dict[str, object]]:
        while request["op"] == "commit" and held.exists():
            time.sleep(0.01)  # root is busy; it serves one connection at a time here
        return normal(request, descriptors)

    world.helper.answer = slow  # type: ignore[method-assign]
    first = start(world, "pull", REF)
    until_stuck(world, "commit", first)
    second = start(world, "pull", REF)
    assert second.stderr is not None
    said = ""
    while "committing" not in said:
        line = second.stderr.readline()
        assert line, said
        said += line
    assert "another imgpull works at this" in said
    if dies:
        first.send_signal(signal.SIGKILL)
    held.unlink()
    out, err = second.communicate(timeout=120)
    assert (second.returncode, out) == (0, "/dev/null\n"), err
    assert first.wait(120) == (-signal.SIGKILL if dies else 0)
    first.communicate()
    assert len(world.helper.layers) == 2
    assert world.query("SELECT count(*) FROM run WHERE machine = 'pull' AND outcome = 'done'") == [(1,)]
    assert world.leftovers() == []


@pytest.fixture
def fetching(world: World) -> Iterator[World]:
    """A world in which a first process has fetched half of a layer, and no more until `slow-network` is gone."""
    world.put("one", bytes(1000))
    slow = world.folder / "slow-network"
    slow.touch()
    first = start(world, "pull", REF)
    yield world
    slow.unlink(missing_ok=True)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0, err


def test_second_pull_tells_the_bytes_of_the_first_as_json(fetching: World) -> None:
    until_fetching(fetching)
    second = start(fetching, "pull", REF, "--json")
    assert second.stdout is not None
    events: list[dict[str, Any]] = []
    while not (events and events[-1]["type"] == "progress"):
        line = second.stdout.readline()
        check_output(["pull", REF, "--json"], line)
        events.append(json.loads(line))
    told = {name: events[-1][name] for name in ("layer", "stage", "done", "total")}
    assert told == {"layer": "one/1.tar", "stage": "fetching", "done": 500, "total": 1000}
    (fetching.folder / "slow-network").unlink()
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, err
    check_output(["pull", REF, "--json"], out)
    assert json.loads(out.splitlines()[-1])["type"] == "result"


def test_second_pull_draws_the_bytes_of_the_first_on_a_terminal(fetching: World) -> None:
    until_fetching(fetching)
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    second = start(fetching, "pull", REF, progress="tty", stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"500 B/1.0 kB" not in shown:
        shown += os.read(ours, 4096)
        assert len(shown) < 1 << 20, shown[-400:]
    (fetching.folder / "slow-network").unlink()
    with suppress(OSError):  # EIO: the other end is closed
        while os.read(ours, 4096):
            pass
    os.close(ours)
    assert second.communicate(timeout=120)[0] == "/dev/null\n"
    assert second.returncode == 0


def test_runs_of_another_process_are_shown_cancelled_and_gone_on_with(world: World) -> None:
    world.put("one", bytes(1000))
    (world.folder / "slow-network").touch()
    first = start(world, "pull", REF)
    until_fetching(world)
    rows = json.loads(world.run("runs", "--active", "--json")[1])
    assert [(row["machine"], row["state"]) for row in rows] == [("layer", "active"), ("pull", "active")]
    run = rows[1]["run"]
    assert "at work: layers, attempt 1" in world.run("runs", "show", run)[1]
    code, _, err = world.run("resume", run)
    assert code == 75 and f"run {run} is at work in another process" in err
    assert world.run("cancel", run.lower())[:2] == (0, f"{run}: cancelled\n")
    assert first.wait(120) == 75
    assert "cancelled by the user" in first.communicate()[1]
    assert world.run("cancel", run)[:2] == (0, f"{run}: had ended before, cancelled\n")
    code, out, _ = world.run("resume", run)
    assert code == 1 and out.startswith(f"{run}: cancelled: cancelled by the user\n")


def test_runs_of_a_dead_process_are_told_as_interrupted(world: World) -> None:
    world.put("one", bytes(1000))
    (world.folder / "slow-network").touch()
    first = start(world, "pull", REF)
    until_fetching(world)
    first.kill()
    first.communicate()
    rows = json.loads(world.run("runs", "--active", "--json")[1])
    assert [(row["machine"], row["state"]) for row in rows] == [("layer", "interrupted"), ("pull", "interrupted")]
    run = rows[1]["run"]
    assert f"interrupted in layers, attempt 1: `imgpull resume {run}` goes on" in world.run("runs", run)[1]
    (world.folder / "slow-network").unlink()
    assert world.run("resume")[:2] == (0, "2 interrupted runs have ended, 2 of them well\n")
    assert world.run("resume")[1].startswith("no run was interrupted")
    assert json.loads(world.run("runs", "--active", "--json")[1]) == []


def test_log_of_an_image_that_never_became_ready(world: World) -> None:
    world.put("two", b"evil")
    assert world.run("pull", "s3://bucket/images/two")[0] == 65
    for word in ("two", "s3://bucket/images/two", "s3://bucket/images/two/"):
        code, out, err = world.run("log", word)
        assert code == 0, err
        assert "refused by rule path_escapes_root" in out
    assert world.run("log", "never")[0] == 66


def until_fetching(world: World) -> None:
    """Wait until the first process has told of half a layer."""
    while not (world.paths.board.exists() and (500).to_bytes(8, "little") in world.paths.board.read_bytes()):
        time.sleep(0.01)
