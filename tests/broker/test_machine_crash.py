"""Kill -9 before and after every commit of several machines at work at once.

Invariant tested: whatever commit a process dies at, the next lives bring every run to its right end, each step's effect
is in the database exactly once, what lies outside of it is right, and nothing is left active, locked or open.
"""

import os
import random
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker.machine import (
    Abort,
    Done,
    Engine,
    Handoff,
    Hooks,
    Machine,
    Outcome,
    Policy,
    Run,
    open_engine,
    open_lookup,
    problems,
)
from broker.machine.ownership import Ownership
from tests.broker.machine_crash import Case, cases, enumerated, killed, lived
from tests.broker.machine_toys import TABLES, Ask, Gave, nothing, one_step

QUICK = Policy(attempts=50, first_delay_s=0.01, max_delay_s=0.01, crashes=50)

# ---------------------------------------------------------------- a program of five machines


def effect_of(run: Run[Any], name: str) -> None:
    """Leave one effect in the database and one outside, each found if it happens twice."""
    folder = Path(os.environ["TOY_FOLDER"])
    (folder / f"{run.key}.{name}").write_text(run.id)  # idempotent, as every effect outside must be
    run.on_commit(lambda db: db.execute("INSERT INTO effect VALUES (?, ?)", (run.id, name)))


async def fetch(run: Run[Ask]) -> Gave:
    if run.attempt == 1:
        raise OSError("the first attempt fails")
    effect_of(run, "fetch")
    return Gave(number=run.request.number)


async def commit(run: Run[Ask]) -> None:
    await trio.sleep(0.01)
    effect_of(run, "commit")


async def layers(run: Run[Ask]) -> None:
    children = [await run.start_child(LAYER, key, Ask(number=1)) for key in ("base", run.key + "-top")]
    for child in children:
        (await run.wait(child)).require()
    effect_of(run, "layers")


async def release(run: Run[Any], outcome: Outcome) -> None:
    effect_of(run, f"final-{outcome.kind}")


async def refuse(run: Run[Ask]) -> None:
    raise Abort("rejected", kind="rejected")


async def early(run: Run[Ask]) -> None:
    effect_of(run, "early")
    raise Done


async def moved(run: Run[Ask]) -> None:
    raise Handoff(await ensure(run.engine, IMAGE, "one"))


async def forever(run: Run[Ask]) -> None:
    await trio.sleep_forever()


LAYER = (
    Machine("layer", Ask)
    .start("fetch", fetch, result=Gave, retry=QUICK)
    .to("commit", commit, retry=QUICK)
    .end("sealed")
)
IMAGE = Machine("image", Ask).start("resolve", nothing).to("layers", layers).finalise(release).end("ready")
REFUSED = Machine("refused", Ask).start("check", refuse).finalise(release).end("never")
EARLY = Machine("early", Ask).start("first", early).to("second", nothing).end("late")
MOVED = Machine("moved", Ask).start("first", moved).end("never")
STUCK = Machine("stuck", Ask).start("first", forever).finalise(release).end("never")
MACHINES: list[Machine[Any]] = [LAYER, IMAGE, REFUSED, EARLY, MOVED, STUCK]
EXPECTED = {
    ("image", "one"): "done",
    ("image", "two"): "done",
    ("refused", "bad"): "aborted",
    ("early", "e"): "done",
    ("moved", "m"): "handed_off",
    ("stuck", "s"): "cancelled",
    ("layer", "base"): "done",
    ("layer", "one-top"): "done",
    ("layer", "two-top"): "done",
}
EFFECTS = {
    "layer": {"fetch", "commit"},
    "image": {"layers", "final-done"},
    "refused": {"final-aborted"},
    "early": {"early"},
    "moved": set(),
    "stuck": {"final-cancelled"},
}


async def program(point: Callable[[str], None], path: str) -> None:
    """Bring everything that is wanted about, starting what neither is at work nor has ended."""
    async with open_engine(
        path, machines=MACHINES, migrations=TABLES, queues={"narrow": 1}, hooks=Hooks(point=point), rng=random.Random(1)
    ) as engine:
        runs = {}
        for machine, key in (
            (IMAGE, "one"),
            (IMAGE, "two"),
            (REFUSED, "bad"),
            (EARLY, "e"),
            (MOVED, "m"),
            (STUCK, "s"),
        ):
            runs[key] = await ensure(engine, machine, key)
        await trio.sleep(0.001)
        await engine.cancel(runs["s"], cause="enough")
        for run_id in runs.values():
            await engine.wait(run_id, follow=True)
        await engine.prune(older_than_s=1e9)


async def ensure(engine: Engine, machine: Machine[Any], key: str) -> str:
    latest = engine.lookup.latest(machine.name, key)
    if latest is not None:
        return latest.id
    return (await engine.start(machine, key, Ask(), queue="narrow" if machine is IMAGE else None)).id


def life(path: str, folder: Path) -> Callable[[Callable[[str], None]], None]:
    def work(point: Callable[[str], None]) -> None:
        os.environ["TOY_FOLDER"] = str(folder)
        trio._core._run._r = random.Random(7)  # the same order in each life
        trio.run(program, point, path, clock=trio.testing.MockClock(autojump_threshold=0))

    return work


def assert_right(path: str, folder: Path) -> None:
    with open_lookup(path, migrations=TABLES) as lookup:
        assert lookup is not None
        assert problems(lookup) == []
        runs = lookup.runs()
        effects = Counter(lookup.db.execute("SELECT run, step FROM effect").fetchall())
    assert {(run.machine, run.key): run.outcome for run in runs} == EXPECTED
    # A shared layer that was done under one parent is asked for again by the other, if it comes later.
    assert len(runs) - sum(run.key == "base" for run in runs) == len(EXPECTED) - 1, sorted(run.key for run in runs)
    assert effects == Counter({(run.id, name): 1 for run in runs for name in EFFECTS[run.machine]})
    outside = {file.name: file.read_text() for file in folder.iterdir()}
    assert outside.keys() == {f"{run.key}.{name}" for run in runs for name in EFFECTS[run.machine]}
    assert set(outside.values()) <= {run.id for run in runs}
    with Ownership(f"{path}-owners") as owners:
        assert all(owners.take(run.seq) for run in runs), "a lock outlived its process"
    assert sorted(file.name for file in Path(path).parent.iterdir()) == ["folder", "state.db", "state.db-owners"]


@pytest.mark.capability("kill -9 before and after every commit: every run ends right, every effect is there once")
@pytest.mark.mistake("a failed write of a completed step was only logged: steps ran again out of order")
def test_kill_at_every_commit_point(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fresh(name: str) -> tuple[str, Path]:
        folder = scratch / name / "folder"
        folder.mkdir(parents=True)
        return str(scratch / name / "state.db"), folder

    all_cases = cases(life(*fresh("whole")))
    assert_right(str(scratch / "whole" / "state.db"), scratch / "whole" / "folder")
    missed = []
    for number, case in enumerate(all_cases):
        place = fresh(f"case{number}")
        if not killed(life(*place), case):
            missed.append(case)
        lived(life(*place))
        assert_right(*place)
    again = twice_killed(all_cases, fresh)
    never = enumerated(MACHINES) - {case.point for case in all_cases}
    with capsys.disabled():
        print(f"\nkilled at {len(all_cases) - len(missed)} passings of {len({c.point for c in all_cases})} points, and")
        print(f"{again} times twice in a row; enumerated but not passed: {len(never)}")
    assert missed == []
    assert not {point for point in never if point.split(":")[1] in ("start", "complete", "finish")} - UNREACHED


# What no run of this program does: machines whose last step ends them have no commit of their own for the end, and some
# never complete a step. Resumes, parks and retries are passed in the second lives.
UNREACHED = {
    f"{name}:{side}"
    for name in (
        *("layer:finish", "early:finish", "moved:finish"),
        *("refused:check:complete", "early:first:complete", "early:second:complete"),
        *("moved:first:complete", "stuck:first:complete"),
    )
    for side in ("before", "after")
}


def twice_killed(all_cases: list[Case], fresh: Callable[[str], tuple[str, Path]]) -> int:
    """Kill one life in its middle and the next at each resume and each second commit of it; give how many."""
    middle = Case("layer:fetch:complete:after", 1)
    place = fresh("twice-probe")
    assert killed(life(*place), middle)
    second = [case for case in cases(life(*place)) if case.nth == 1]
    for number, case in enumerate(second):
        place = fresh(f"twice{number}")
        assert killed(life(*place), middle)
        killed(life(*place), case)
        lived(life(*place))
        assert_right(*place)
    return len(second)


@pytest.mark.mistake("a process that died left its run owned for ever, or until a time ran out")
def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = str(tmp_path / "state.db")
    machine = one_step(forever)

    def first(point: Callable[[str], None]) -> None:
        trio.run(_start_and_die, path, machine)

    assert killed(first, Case("never", 1)) is True
    with closing(sqlite3.connect(path)) as db:
        (seq,) = db.execute("SELECT seq FROM run").fetchone()
    with Ownership(f"{path}-owners") as owners:
        assert owners.take(seq)


async def _start_and_die(path: str, machine: Machine[Ask]) -> None:
    async with open_engine(path, machines=[machine]) as engine:
        await engine.start(machine, "k", Ask())
        os.kill(os.getpid(), 9)
