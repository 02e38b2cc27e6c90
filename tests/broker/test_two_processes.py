"""Two commands on one state folder: the second waits, shows the first one's steps, and goes on when the first dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.world import World

REF = "s3://bucket/images/one"
# A second process of the same user, whose fetcher and checker are the programs of the tests.
COMMAND = """
import sys
from broker import worker, store
from broker.cli import main
folder, programs = sys.argv.pop(1), sys.argv.pop(1)
worker.CHECK = (sys.executable, f"{programs}/fake_check.py", folder)
worker.FETCH = (sys.executable, f"{programs}/fake_fetch.py", folder)
main()
"""


def start(world: World, *words: str) -> subprocess.Popen[str]:
    programs = Path(__file__).parent / "programs"
    environment = {
        **os.environ,
        **world.environ,
        "IMGPULL_PROGRESS": "plain",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(world.folder), str(programs), *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until_stuck(world: World, op: str) -> None:
    """Wait until root was asked for this, which it does not answer."""
    while not world.helper.count(op):
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
    until_stuck(world, "commit")
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
