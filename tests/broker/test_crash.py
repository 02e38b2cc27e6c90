"""kill -9 at every commit of every machine; the next run ends right, with each effect there exactly once.

The points are not listed here: a run without a kill names those that it passes, then each is the last one of a run of
its own. So are the moments at which a worker or root can die: what a worker says, and what root is asked. The processes
are forked from this one, so that a run costs no imports; where no worker is to die, the workers are inside them.

A second death while the first is mended is sampled; ``IMGPULL_FAULTS=all`` tries every pair.
"""

import itertools
import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker import work, worker
from broker.machine import Hooks
from broker.pull import MACHINES
from tests.broker.fake_helper import HangUpError
from tests.broker.inprocess import Surroundings
from tests.broker.test_pull import REF
from tests.support.world import World

OTHER = "s3://bucket/images/two"
FIRST, SECOND = (1, 1) if os.environ.get("IMGPULL_FAULTS") == "all" else (4, 3)  # steps through pairs of deaths
killed: list[str] = []


def in_child(
    world: World, words: list[str], point: Callable[[str], None] | None = None, *, programs: bool = False
) -> int:
    """Run one command in a forked process; return its exit status, negative for a signal.

    The workers are inside the process, or `programs`.
    """
    pid = child(world, words, point, programs=programs)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def child(
    world: World,
    words: list[str],
    point: Callable[[str], None] | None = None,
    *,
    programs: bool = False,
    before: Callable[[], None] = lambda: None,
) -> int:
    """Start one command in a forked process, after `before` in it; return its number."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(300)  # a run that hangs dies as SIGALRM and fails its test
        if point is not None:
            work.HOOKS = Hooks(point=point)
        if not programs:
            around = Surroundings(world.folder, random.Random(0))
            around.pauses_s = (0,)
            for path in (world.bucket / "images").rglob("*.*"):
                around.put(str(path.relative_to(world.bucket)), path.read_bytes())
            worker.check, worker.fetcher = around.check, around.fetcher  # type: ignore[assignment]
        before()
        code, out, err = world.run(*words)
        (world.folder / "last").write_text(out + err)
        os._exit(code)
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
        os._exit(99)


def points_of(world: World, words: list[str]) -> list[str]:
    """Run a command to its end and return the commit points that it passed, in order."""
    path = world.folder / "points"
    path.write_text("")

    def note(name: str) -> None:
        with path.open("a") as file:
            file.write(name + "\n")

    assert in_child(world, words, note) == 0, (world.folder / "last").read_text()
    return path.read_text().splitlines()


def die_at(number: int) -> Callable[[str], None]:
    """Return a hook that kills the process at its `number`-th point, counted from 0."""
    seen = [0]

    def point(name: str) -> None:
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    return point


def reset(world: World) -> None:
    for path in (world.paths.state, world.paths.cache):
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
    for counted in ("check-moments", "fetch-moments", "check-dies", "fetch-dies"):
        (world.folder / counted).unlink(missing_ok=True)
    world.helper.layers.clear()
    world.helper.claims.clear()
    world.helper.activations.clear()
    world.helper.requests.clear()


def assert_sound(world: World) -> None:
    """Nothing is left over, nothing is at work, and the state agrees with root."""
    assert world.leftovers() == []
    assert world.query("PRAGMA integrity_check") == [("ok",)]
    assert world.query("PRAGMA foreign_key_check") == []
    assert world.query("SELECT id, machine FROM run WHERE outcome IS NULL") == []
    committed = {row[0] for row in world.query("SELECT id FROM layer WHERE committed = 1")}
    assert committed == set(world.helper.layers)
    assert {row[0] for row in world.query("SELECT name FROM activation")} == set(world.helper.activations)
    manifests = {f"sha256:{p.stem}" for p in (world.paths.state / "manifests").iterdir()}
    assert manifests == {row[0] for row in world.query("SELECT id FROM layer")}


def pulled(world: World) -> None:
    assert json.loads(world.run("ls", "--json")[1])[0]["image"] == REF
    assert len(world.helper.layers) == 2
    assert list(world.helper.activations) == ["one"]


def prepare_nothing(world: World) -> None:
    world.put("one", b"a", b"b", suffix=".tar.gz")


def prepare_pulled(world: World) -> None:
    prepare_nothing(world)
    assert in_child(world, ["pull", REF], None) == 0


def prepare_inactive(world: World) -> None:
    prepare_nothing(world)
    assert in_child(world, ["pull", REF, "--no-activate"], None) == 0


def prepare_garbage(world: World) -> None:
    """Leave a layer that no image stands on: a pull whose second layer is refused."""
    world.put("one", b"a", b"evil")
    assert in_child(world, ["pull", REF], None) == 65


SCENARIOS: dict[str, tuple[list[str], Callable[[World], None], Callable[[World], None], tuple[int, ...]]] = {
    "pull": (["pull", REF], prepare_nothing, pulled, (0,)),
    "activate": (["activate", "one"], prepare_inactive, pulled, (0,)),
    "deactivate": (["deactivate", "one"], prepare_pulled, lambda w: _is(w.helper.activations, {}), (0, 66)),
    "remove": (["rm", "one"], prepare_inactive, lambda w: _is(w.helper.layers, {}), (0, 66)),
    "collect": (["gc"], prepare_garbage, lambda w: _is(w.helper.layers, {}), (0,)),
}


def _is(found: object, wanted: object) -> None:
    assert found == wanted


@pytest.fixture(scope="module", autouse=True)
def print_count(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    counts = Counter(name.split(" ")[0] for name in killed)
    told = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nkilled at {len(killed)} points: {told}")
    chosen = {item.name.split("[")[0] for item in request.session.items if item.path == request.path}
    if {name for name in globals() if name.startswith("test_")} <= chosen:  # the whole module was asked for
        assert len(killed) >= 200


@pytest.mark.parametrize("name", SCENARIOS)
def test_kill_at_every_commit(name: str, world: World) -> None:
    words, prepare, check, codes = SCENARIOS[name]
    prepare(world)
    points = points_of(world, words)
    assert points, "a run that commits nothing is no run"
    check(world)
    for number, point in enumerate(points):
        reset(world)
        prepare(world)
        assert in_child(world, words, die_at(number)) == -signal.SIGKILL, point
        assert in_child(world, words, None) in codes, (point, (world.folder / "last").read_text())
        check(world)
        assert_sound(world)
        killed.append(f"broker {point}")


def test_kill_twice_also_while_resuming(world: World) -> None:
    prepare_nothing(world)
    first = points_of(world, ["pull", REF])
    for number in range(0, len(first), FIRST):
        second = 0
        while True:
            reset(world)
            assert in_child(world, ["pull", REF], die_at(number)) == -signal.SIGKILL
            if in_child(world, ["pull", REF], die_at(second)) != -signal.SIGKILL:
                break
            assert in_child(world, ["pull", REF], None) == 0, (world.folder / "last").read_text()
            pulled(world)
            assert_sound(world)
            killed.append(f"broker-again {number}:{second}")
            second += SECOND


@pytest.mark.parametrize("nth", [0, 1], ids=["lower", "upper"])
def test_layer_that_outlives_its_pull_is_there_for_the_next(nth: int, world: World) -> None:
    """Killed when a layer is committed, and again while the pull is cancelled: then what the next pull joins is a run
    that has done its work, and `gc` must not have undone it."""
    world.put("one", b"a", b"b")
    words, outlived = ["pull", REF, "--no-activate"], 0
    committed = [n for n, point in enumerate(points_of(world, words)) if point == "layer:commit:complete:after"]
    for number in itertools.count():
        reset(world)
        assert in_child(world, words, die_at(committed[nth])) == -signal.SIGKILL
        ((pull,),) = world.query("SELECT id FROM run WHERE machine = 'pull'")
        if in_child(world, ["cancel", pull], die_at(number)) != -signal.SIGKILL:
            break
        active = {machine for (machine,) in world.query("SELECT machine FROM run WHERE outcome IS NULL")}
        outlived += active == {"layer"}
        assert in_child(world, ["gc"]) == 0
        assert in_child(world, words) == 0, (world.folder / "last").read_text()
        assert_sound(world)
    assert outlived


def test_interrupted_pull_under_another_name_does_not_answer_for_this_one(world: World) -> None:
    prepare_nothing(world)
    assert in_child(world, ["pull", REF, "--name", "first"], die_at(8)) == -signal.SIGKILL
    assert in_child(world, ["pull", REF, "--name", "other"], None) == 0
    assert set(world.helper.activations) == {"first", "other"}
    assert_sound(world)


def test_two_interrupted_runs_of_two_machines_are_both_resumed(world: World) -> None:
    prepare_inactive(world)
    world.put("two", b"a", b"c", suffix=".tar.gz")
    for number in (2, 7, 13, 19):
        assert in_child(world, ["pull", OTHER], die_at(number)) == -signal.SIGKILL
        assert in_child(world, ["activate", "one", "--name", f"n{number}"], die_at(1)) == -signal.SIGKILL
        killed.extend([f"two-at-once pull:{number}", f"two-at-once activate:{number}"])
    assert in_child(world, ["resume"], None) == 0
    assert set(world.helper.activations) == {"two", "n2", "n7", "n13", "n19"}
    assert len(world.helper.layers) == 3
    assert_sound(world)


@pytest.mark.parametrize("name", SCENARIOS)
def test_helper_that_dies_is_asked_again(name: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request that a command makes of root is the last one of a helper, before it is done and after."""
    words, prepare, check, codes = SCENARIOS[name]
    prepare(world)
    world.helper.requests.clear()
    assert in_child(world, words) == 0
    asked = [str(request["op"]) for request in world.helper.requests]
    normal = world.helper.answer
    for number, op in enumerate(asked):
        for side in ("before", "after"):
            reset(world)
            prepare(world)
            world.helper.requests.clear()

            def dying(request: dict[str, Any], descriptors: list[int], last: int = number, when: str = side) -> Any:
                if len(world.helper.requests) - 1 != last:
                    return normal(request, descriptors)
                if when == "after":
                    normal(request, descriptors)
                raise HangUpError

            monkeypatch.setattr(world.helper, "answer", dying)
            assert in_child(world, words) in codes, (op, side, (world.folder / "last").read_text())
            monkeypatch.setattr(world.helper, "answer", normal)
            check(world)
            assert_sound(world)
            killed.append(f"helper {name}:{op}:{number}:{side}")


@pytest.mark.parametrize(("kind", "codes"), [("check", (0, 65)), ("fetch", (0, 69))])
def test_worker_that_is_killed_leaves_nothing(kind: str, codes: tuple[int, ...], world: World) -> None:
    prepare_nothing(world)
    assert in_child(world, ["pull", REF], programs=True) == 0
    moments = len((world.folder / f"{kind}-moments").read_bytes())
    for number in range(1, moments + 1):
        reset(world)
        (world.folder / f"{kind}-dies").write_text(str(number))
        assert in_child(world, ["pull", REF], programs=True) in codes, (world.folder / "last").read_text()
        assert world.leftovers() == []
        assert in_child(world, ["pull", REF], programs=True) == 0, (world.folder / "last").read_text()
        pulled(world)
        assert_sound(world)
        killed.append(f"{kind}er {number}")
    assert moments >= 6


def test_every_machine_has_a_scenario() -> None:
    assert {m.name for m in MACHINES} - set(SCENARIOS) == {"layer"}  # every pull has some


def test_points_of_the_scenarios_are_points_of_the_definitions(world: World) -> None:
    defined = {point for machine in MACHINES for point in machine.points}
    for words, prepare, _, _ in SCENARIOS.values():
        reset(world)
        prepare(world)
        passed = points_of(world, words)
        assert {p for p in passed if not p.startswith(("migrate", "program"))} <= defined


def test_refused_image_leaves_no_payload_of_its_good_layers(world: World) -> None:
    world.put("one", b"a", b"evil", suffix=".tar.zst")
    assert in_child(world, ["pull", REF], None) == 65
    assert world.leftovers() == []


def test_partial_file_is_never_published(world: World, tmp_path: Path) -> None:
    """A manifest has no name until it is whole: kill the checker's side at any moment and the folder stays empty."""
    world.put("one", b"die")
    assert in_child(world, ["pull", REF], None) == 65
    assert list((world.paths.state / "manifests").iterdir()) == []
