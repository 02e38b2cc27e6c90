"""A command inside an image: it is in the mount, signals and exit code are its own, and its device goes with it."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from broker import temporary
from tests.support.world import World

ROOT: Final = Path(__file__).resolve().parents[2]
REF: Final = "s3://bucket/images/one"
LOOK: Final = ("activate", "one", "--ro", "--name", "look")


@pytest.fixture
def image(world: World) -> World:
    world.put("one", b"a")
    world.run("pull", REF, "--no-activate")
    return world


def given(world: World) -> set[str]:
    """Return the names of the devices on root's books."""
    return set(world.helper.activations)


def marks(world: World) -> set[str]:
    return {path.name for path in world.paths.mark_dir.iterdir()} if world.paths.mark_dir.exists() else set()


def dead(world: World) -> None:
    """Leave what a command that died together with its imgpull leaves: the device, and a mark that nobody holds."""
    world.run(*LOOK)
    with temporary.held(world.paths.mark_dir, "look"):
        pass


@contextmanager
def waiting(world: World) -> Iterator[subprocess.Popen[str]]:
    """Run a shell inside the image that lives until it is given a line; imgpull is a process of its own."""
    words = [*LOOK, "--", "sh", "-c", "echo there; read line"]
    process = subprocess.Popen(
        [sys.executable, "-m", "broker.cli", *words], cwd=ROOT, env={"PATH": "/usr/bin:/bin", **world.environ},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield process
        process.communicate()  # ends the shell's input, and waits until both are gone, who share the output


@pytest.mark.parametrize("words", [LOOK, LOOK[:3]])
def test_device_goes_with_its_command(words: tuple[str, ...], image: World) -> None:
    image.helper.mount = image.folder / "image"
    image.helper.mount.mkdir()
    assert image.run(*words, "--", "sh", "-c", 'pwd -P >here; echo "$IMGPULL_MOUNT" >>here; exit 7')[0] == 7
    place, mount = (image.helper.mount / "here").read_text().splitlines()
    assert (place, mount.startswith("/proc/self/fd/")) == (str(image.helper.mount), True)
    assert image.helper.count("deactivate") == 1
    assert (given(image), marks(image)) == (set(), set())


def test_device_that_stood_before_stays(image: World) -> None:
    image.run(*LOOK)
    assert image.run(*LOOK, "--", "false")[0] == 1
    image.run("gc")
    assert (given(image), marks(image)) == ({"look"}, set())


def test_device_of_another_kind_is_left_alone(image: World) -> None:
    image.run("activate", "one", "--name", "look")
    assert image.run(*LOOK, "--", "true")[0] == 75
    row = image.query("SELECT * FROM activation")
    image.query("DELETE FROM activation")  # on root's books only: only root can tell that the name is taken
    assert image.run(*LOOK, "--", "true")[0] == 75
    assert image.query("SELECT * FROM activation") == row, "found again"
    with temporary.held(image.paths.mark_dir, "look"):
        pass
    image.run("gc")  # not by a stale mark either: what was written to it would be lost
    assert (given(image), marks(image)) == ({"look"}, set())


def test_command_that_is_not_there_leaves_nothing(image: World) -> None:
    code, _, err = image.run(*LOOK, "--", "no-such-program")
    assert (code, "no-such-program: no such file or directory" in err) == (2, True)
    assert (given(image), marks(image)) == (set(), set())


@pytest.mark.parametrize("later", [["gc"], ["activate", "one"], ["pull", REF, "--refresh"], ["rm", "one"]])
def test_device_of_a_dead_command_is_taken_back(later: list[str], image: World) -> None:
    dead(image)
    assert image.run(*later)[0] == 0
    assert ("look" in given(image), marks(image)) == (False, set())


def test_looking_takes_nothing_back(image: World) -> None:
    dead(image)
    for words in (["ls"], ["gc", "--dry-run"], ["df"]):
        image.run(*words)
    assert (given(image), marks(image)) == ({"look"}, {"look"})


def test_name_that_a_dead_command_left_can_be_given_at_once(image: World) -> None:
    dead(image)
    assert image.run("activate", "one", "--name", "look")[0] == 0
    image.run("gc")
    assert [row["mode"] for row in image.helper.activations.values()] == ["rw"]
    image.run("deactivate", "look")
    dead(image)
    assert image.run(*LOOK, "--", "true")[0] == 0
    assert (given(image), marks(image)) == (set(), set())


def test_device_that_its_user_took_back_is_not_taken_again(image: World) -> None:
    dead(image)
    assert image.run("deactivate", "look")[0] == 0
    image.run(*LOOK)
    image.run("gc")
    assert given(image) == {"look"}


def test_second_command_of_a_name_is_refused_while_the_first_runs(image: World) -> None:
    image.run(*LOOK)
    with temporary.held(image.paths.mark_dir, "look"):
        assert image.run(*LOOK, "--", "true")[0] == 75
        image.run("gc")
        assert given(image) == {"look"}


def test_device_that_root_cannot_take_now_is_taken_later(image: World) -> None:
    image.helper.script["deactivate"] = lambda _: image.helper.error("fault", "the device is busy")
    code, _, err = image.run(*LOOK, "--", "false")
    assert (code, "the device look is taken back by a later command: " in err) == (1, True)
    assert (given(image), marks(image)) == ({"look"}, {"look"})
    assert image.run("gc")[0] == 0
    assert given(image) == {"look"}
    del image.helper.script["deactivate"]
    image.run("gc")
    assert (given(image), marks(image)) == (set(), set())


def test_kill_9_lets_the_device_go_with_whoever_holds_it_last(image: World) -> None:
    with waiting(image) as process:
        process.kill()
        process.wait()
        image.run("gc")
        assert given(image) == {"look"}, "the shell is still in it"
    image.run("gc")
    assert (given(image), marks(image)) == (set(), set())


def test_death_before_the_device_is_on_our_books(image: World) -> None:
    """Root has given it, and the run that asked for it would be resumed."""
    words = [sys.executable, "-m", "broker.cli", *LOOK, "--", "true"]
    normal, started = image.helper.on_activate, threading.Event()
    process: list[subprocess.Popen[bytes]] = []

    def give_and_kill(request: dict[str, Any]) -> dict[str, Any]:
        answer = normal(request, [])[0]
        started.wait()
        process[0].kill()
        return answer

    image.helper.script["activate"] = give_and_kill
    process.append(subprocess.Popen(words, cwd=ROOT, env={"PATH": "/usr/bin:/bin", **image.environ}))
    started.set()
    assert process[0].wait() == -signal.SIGKILL
    del image.helper.script["activate"]
    assert (given(image), marks(image)) == ({"look"}, {"look"})
    image.run("gc")
    assert (given(image), marks(image)) == (set(), set())
    image.run("resume")
    assert given(image) == set()


def test_signals_are_the_commands(image: World) -> None:
    """A terminal sends its own to both, and a shell inside goes on; what is sent to imgpull alone is passed on."""
    with waiting(image) as process:
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    assert (given(image), marks(image)) == (set(), set())
