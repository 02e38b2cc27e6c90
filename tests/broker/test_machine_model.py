"""The library against a model, with lives that start, cancel, wait, stop, die and share the file with another engine.

Invariant tested, after each life, however it ended: the state file holds together; what was once durable stays; cursors
never go back; a step's effect is there exactly as often as its completion, once; a key has one active run at most. And
after a last life that nobody disturbs, every run has the end that its machine and its cancellation say.
"""

import os
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from broker.machine import (
    Abort,
    Done,
    Engine,
    Hooks,
    Machine,
    Outcome,
    Policy,
    Run,
    RunRecord,
    StoppedError,
    open_lookup,
    problems,
)
from tests.broker.conftest import MEMORY
from tests.broker.machine_toys import TABLES, Ask, Killer, Wall, engine_of

EXAMPLES: Final = int(os.environ.get("IMGPULL_MODEL_EXAMPLES", "60"))
QUICK: Final = Policy(attempts=10**6, crashes=10**6)
QUEUES: Final = {"one": 1, "two": 2, "steps": 1}
KEYS: Final = "abc"


def leave(run: Run[Any], name: str) -> None:
    run.on_commit(lambda db: db.execute("INSERT INTO effect VALUES (?, ?)", (run.id, name)))


async def work(run: Run[Ask]) -> None:
    """Take a while, fail in each third attempt, leave an effect."""
    chance = random.Random(f"{run.id} {run.step} {run.attempt}")
    await trio.sleep(chance.uniform(0, 3))
    if chance.random() < 0.3:
        raise OSError("this attempt fails")
    leave(run, run.step)


async def join(run: Run[Ask]) -> None:
    """Need two leaves, which other parents need as well."""
    for key in ("a", "shared"):
        outcome = await run.wait(await run.start_child(LEAF, key, Ask(), queue="two"))
        if outcome.kind == "cancelled":
            raise Abort(f"{key} was cancelled", kind="child")
    leave(run, run.step)


async def doom(run: Run[Ask]) -> None:
    leave(run, "never")
    raise Abort("doomed", kind="doomed")


async def end_early(run: Run[Ask]) -> None:
    leave(run, run.step)
    raise Done


async def final(run: Run[Any], outcome: Outcome) -> None:
    await trio.sleep(1)
    leave(run, f"final {outcome.kind}")


LEAF = Machine("leaf", Ask, default_retry=QUICK).start("one", work).to("two", work, queue="steps").end("end")
PARENT = Machine("parent", Ask, default_retry=QUICK).start("one", work).to("two", join).finalise(final).end("end")
DOOMED = Machine("doomed", Ask, default_retry=QUICK).start("one", work).to("two", doom).finalise(final).end("end")
EARLY = Machine("early", Ask, default_retry=QUICK).start("one", end_early).to("two", doom).end("end")
MACHINES = {machine.name: machine for machine in (LEAF, PARENT, DOOMED, EARLY)}
ENDS: Final = {
    "leaf": {"done", "cancelled"},
    "parent": {"done", "cancelled", "aborted"},
    "doomed": {"aborted", "cancelled"},
    "early": {"done", "cancelled"},
}

starts = st.tuples(
    st.just("start"), st.sampled_from(sorted(MACHINES)), st.sampled_from(KEYS), st.sampled_from(["one", "two", None])
)
ops = st.lists(
    st.one_of(
        starts,
        starts,
        st.tuples(st.just("cancel"), st.sampled_from(sorted(MACHINES)), st.sampled_from([*KEYS, "shared"])),
        st.tuples(st.just("wait"), st.sampled_from(sorted(MACHINES)), st.sampled_from(KEYS)),
        st.tuples(st.just("sleep"), st.floats(0, 20)),
        st.tuples(st.just("peer"), st.sampled_from(["all", "related", "none"]), starts, st.floats(0, 20)),
        st.tuples(st.just("prune")),
    ),
    min_size=1,
    max_size=10,
)


@dataclass
class Book:
    """What the model knows."""

    promised: set[str] = field(default_factory=set)  # ids that a start gave
    cancelled: set[str] = field(default_factory=set)  # ids that a cancel accepted
    outcomes: dict[str, str] = field(default_factory=dict)
    cursors: dict[str, int] = field(default_factory=dict)
    steps: int = 0


class Lives(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="imgpull-model-", dir=MEMORY if MEMORY.is_dir() else None))
        self.path = self.folder / "state.db"
        self.book = Book()
        self.clock_s = 0.0

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        try:
            trio.run(self._last_life, clock=trio.testing.MockClock(autojump_threshold=0))
            self._check()
            self._check_ends()
            STEPS["steps"] += self.book.steps
        finally:
            shutil.rmtree(self.folder)

    @rule(
        todo=ops,
        kill_after=st.none() | st.integers(0, 60),
        mode=st.sampled_from(["all", "all", "related", "none"]),
        clock_step_s=st.sampled_from([0.0, 0.0, 0.0, -1e6, 1e6]),
        grace_s=st.sampled_from([0.0, 2.0, 1000.0]),
    )
    def live(self, todo: list[Any], kill_after: int | None, mode: Any, clock_step_s: float, grace_s: float) -> None:
        self.clock_s += clock_step_s
        left = kill_after

        def match(_: str) -> bool:
            nonlocal left
            if left is None:
                return False
            left -= 1
            return left < 0

        killer = Killer(match)

        async def life() -> None:
            try:
                async with self._engine(killer, mode, grace_s) as engine:
                    for op in todo:
                        await self._do(engine, op, killer)
            except BaseException:
                if not killer.dead:
                    raise

        trio.run(life, clock=trio.testing.MockClock(autojump_threshold=0))
        self.book.steps += len(todo)
        self._check()

    def _engine(self, killer: Killer, mode: Any, grace_s: float) -> Any:
        clock = Wall(self.clock_s)
        return engine_of(
            self.path, *MACHINES.values(), queues=QUEUES, hooks=Hooks(point=killer), resume=mode, grace_s=grace_s,
            clock=clock, patience_s=5,
        )  # fmt: skip

    async def _do(self, engine: Engine, op: tuple[Any, ...], killer: Killer) -> None:
        match op:
            case ("start", machine, key, queue):
                started = await engine.start(MACHINES[machine], key, Ask(), queue=queue)
                self.book.promised.add(started.id)
            case ("cancel", machine, key):
                run = engine.lookup.active(machine, key)
                if run is not None and await engine.cancel(run.id, cause="the model said so"):
                    self.book.cancelled.add(run.id)
            case ("wait", machine, key):
                run = engine.lookup.latest(machine, key)
                if run is not None:
                    with trio.move_on_after(30):
                        self._saw(await engine.wait(run.id))
            case ("sleep", seconds):
                await trio.sleep(seconds)
            case ("prune",):
                await engine.prune(older_than_s=1e12)
            case ("peer", mode, start, seconds):
                async with self._engine(killer, mode, 0) as other:
                    await self._do(other, start, killer)
                    with trio.move_on_after(seconds):
                        run = other.lookup.latest(start[1], start[2])
                        assert run is not None
                        self._saw(await other.wait(run.id))

    def _saw(self, outcome: Outcome) -> None:
        assert self.book.outcomes.setdefault(outcome.run_id, outcome.kind) == outcome.kind

    async def _last_life(self) -> None:
        async with self._engine(Killer(), "all", 0) as engine:
            for run in engine.runs(limit=10_000):
                with trio.fail_after(1e6):
                    try:
                        self._saw(await engine.wait(run.id))
                    except StoppedError as error:
                        raise AssertionError(f"nobody goes on with {run}") from error
            assert all(queue.held == 0 for queue in engine.queues.values())

    # -- what must hold

    def _check(self) -> None:
        with open_lookup(str(self.path), migrations=TABLES) as lookup:
            if lookup is None:
                assert not self.book.promised
                return
            assert problems(lookup) == []
            runs = lookup.runs(limit=10_000)
            effects = Counter(lookup.db.execute("SELECT run, step FROM effect").fetchall())
            completed = {run.id: [e.step for e in lookup.events(run) if e.type == "complete"] for run in runs}
        assert self.book.promised | self.book.cancelled <= {run.id for run in runs}, "something durable is lost"
        active = Counter((run.machine, run.key) for run in runs if run.active)
        assert all(number == 1 for number in active.values())
        wanted: Counter[tuple[str, str]] = Counter()
        for run in runs:
            self._check_history(run)
            wanted.update((run.id, str(step)) for step in completed[run.id])
            wanted.update(_of_ending(run))
        assert effects == wanted

    def _check_history(self, run: RunRecord) -> None:
        assert run.cursor >= self.book.cursors.get(run.id, 0)
        self.book.cursors[run.id] = run.cursor
        if run.outcome is not None:
            assert self.book.outcomes.setdefault(run.id, run.outcome) == run.outcome
        else:
            assert run.id not in self.book.outcomes, "a finished run came back"

    def _check_ends(self) -> None:
        if not self.path.exists():
            return
        with open_lookup(str(self.path), migrations=TABLES) as lookup:
            assert lookup is not None
            for run in lookup.runs(limit=10_000):
                assert run.outcome in ENDS[run.machine], run
                events = [event.type for event in lookup.events(run)]
                assert events.count("finish") == 1 and events[-1] == "finish"
                assert (run.outcome == "cancelled") <= (run.cancel_cause is not None)
                assert (run.id in self.book.cancelled) <= ("cancel" in events)


def _of_ending(run: RunRecord) -> list[tuple[str, str]]:
    """Give the effects that a run has beside those of its completed steps."""
    found = []
    if run.machine in ("parent", "doomed") and run.outcome is not None:
        found.append((run.id, f"final {run.outcome}"))
    if run.machine == "early" and run.outcome == "done":
        found.append((run.id, "one"))  # written with Done, which completes no step
    return found


STEPS: Counter[str] = Counter()


@pytest.mark.capability("a model agrees after every life of thousands of random operations, deaths and clock steps")
def test_lives_agree_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    Lives.TestCase.settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=20,
        deadline=None,
        database=None,
        derandomize=EXAMPLES <= 100,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    STEPS.clear()
    Lives.TestCase("runTest").runTest()
    with capsys.disabled():
        print(f"\n{STEPS['steps']} operations in {EXAMPLES} worlds agree with the model")
