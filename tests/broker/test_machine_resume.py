"""What the next life of the program does with the runs of the last one."""

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker.machine import Abort, Engine, Hooks, Machine, Outcome, Policy, Run, UsageError, problems
from broker.machine.records import seal
from tests.broker.machine_toys import (
    EPOCH_S,
    Ask,
    Gave,
    Killed,
    Killer,
    Model,
    Toy,
    Wall,
    effect,
    engine_of,
    gated,
    killed_at,
    killed_in_step,
    nothing,
    number,
    one_step,
    raising,
    run_one,
    three_steps,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def starting(machine: Machine[Any], *keys: str) -> Any:
    async def work(engine: Engine) -> None:
        runs = [await engine.start(machine, key, Ask()) for key in keys]
        for run in runs:
            await engine.wait(run.id)

    return work


def sql(path: Path, statement: str, *values: object) -> list[Any]:
    """Do by hand to the state file what damage or another version would have done."""
    with closing(sqlite3.connect(path)) as db, db:
        return db.execute(statement, values).fetchall()


def tamper(path: Path, who: str, /, *, sealed: bool, **columns: object) -> None:
    """Change a run's columns, as damage would, or `sealed` as if the library had written them."""
    with closing(sqlite3.connect(path)) as db, db:
        triggers = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for name, value in columns.items():
            db.execute(f"UPDATE run SET {name} = ? WHERE key = ?", (value, who))
        if sealed:
            row = db.execute("SELECT * FROM run WHERE key = ?", (who,)).fetchone()
            db.execute("UPDATE run SET seal = ? WHERE key = ?", (seal(row[:-1]), who))
        for _, statement in triggers:
            db.execute(statement)


# ---------------------------------------------------------------- going on


@pytest.mark.capability("a crash repeats at most the attempt at work")
async def test_completed_steps_are_not_repeated_after_a_crash(path: Path) -> None:
    machine = three_steps(effect, effect, effect)
    toy = Toy()
    await killed_at(path, "toy:two:complete:before", [machine], starting(machine, "k"), app=toy)
    async with engine_of(path, machine, app=toy) as engine:
        (run,) = engine.runs()
        assert (await engine.wait(run.id)).ok
        assert problems(engine.lookup) == []
    assert toy.calls == ["k.one", "k.two", "k.two", "k.three"]
    assert sql(path, "SELECT step FROM effect ORDER BY rowid") == [("one",), ("two",), ("three",)]


@pytest.mark.capability("resume is automatic and before new work")
async def test_resume_needs_no_call_and_comes_before_new_work(path: Path) -> None:
    machine = one_step(gated)
    await killed_in_step(path, [machine], "old")
    toy = Toy()
    toy.gate("old").set()
    toy.gate("new").set()
    async with engine_of(path, machine, app=toy) as engine:
        started = await engine.start(machine, "new", Ask())
        await engine.wait(started.id)
    assert toy.calls == ["old.only", "new.only"]


@pytest.mark.mistake("steps that one resumed run had completed were skipped in the next")
async def test_each_resumed_run_has_its_own_cursor(path: Path) -> None:
    machine = three_steps(nothing, gated, nothing)
    early = Toy()
    early.gate("a").set()
    await killed_at(path, "toy:two:complete:after", [machine], starting(machine, "a"), app=early)
    await killed_at(path, "toy:start:after", [machine], starting(machine, "b"), resume="none")
    toy = Toy()
    toy.gate("a").set()
    toy.gate("b").set()
    async with engine_of(path, machine, app=toy) as engine:
        for run in engine.runs():
            assert (await engine.wait(run.id)).ok
    assert sorted(toy.calls) == ["a.three", "b.one", "b.three", "b.two"]


@pytest.mark.mistake("resuming one machine adopted the runs of another with the same request type")
async def test_runs_of_two_machines_with_one_request_type_are_resumed_as_what_they_are(path: Path) -> None:
    create = one_step(gated, name="create")
    delete = one_step(gated, name="delete")
    for machine in (create, delete):
        await killed_in_step(
            path, [machine, create, delete][:1] + [m for m in (create, delete) if m is not machine], "k"
        )
    toy = Toy()
    toy.gate("k").set()
    seen: list[str] = []

    @asynccontextmanager
    async def look(run: Run[Any]) -> AsyncIterator[None]:
        seen.append(run.engine.lookup.run(run.id).machine)
        yield

    async with engine_of(path, create.__class__("create", Ask).initialise(look).start("only", gated).end("end"),
                         delete.__class__("delete", Ask).initialise(look).start("only", gated).end("end"),
                         app=toy) as engine:  # fmt: skip
        outcomes = [await engine.wait(run.id) for run in engine.runs()]
    assert [o.kind for o in outcomes] == ["done", "done"]
    assert sorted(seen) == ["create", "delete"]


@pytest.mark.mistake("a resumed queued run was finished under another run's queue and stayed active for ever")
@pytest.mark.mistake("resumed runs went past their queue")
@pytest.mark.capability("queues have limits, also after a resume, oldest first")
async def test_resumed_runs_go_through_their_queues_in_order(path: Path, autojump_clock: Any) -> None:
    toy = Toy()

    async def busy(run: Run[Ask]) -> None:
        toy.calls.append(run.key)
        toy.at_once += 1
        toy.most_at_once = max(toy.most_at_once, toy.at_once)
        try:
            await trio.sleep(1)
        finally:
            toy.at_once -= 1

    machine = one_step(busy)
    other = one_step(nothing, name="other")
    killer = Killer()
    with pytest.raises(BaseException) as died:
        async with engine_of(
            path, machine, other, queues={"narrow": 2, "wide": 9}, hooks=Hooks(point=killer)
        ) as engine:
            for number_ in range(8):
                await engine.start(machine, f"k{number_}", Ask(), queue="narrow")
                await engine.start(other, f"o{number_}", Ask(), queue="wide" if number_ % 2 else None, not_before=2e9)
            killer.dead = True
            raise Killed
    assert killer.dead and died
    toy.calls.clear()
    async with engine_of(path, machine, other, queues={"narrow": 2, "wide": 9}) as engine:
        for run in engine.runs("toy"):
            assert (await engine.wait(run.id)).ok
        assert len(engine.runs("other", active_only=True)) == 8
    assert toy.most_at_once == 2
    pairs = [sorted(toy.calls[at : at + 2]) for at in range(0, 8, 2)]  # the two that are let in together have no order
    assert pairs == [[f"k{at}", f"k{at + 1}"] for at in range(0, 8, 2)]


@pytest.mark.mistake("the number of attempts of one step was given to all that followed after a resume")
async def test_attempts_of_a_step_are_its_own_after_a_resume(path: Path, autojump_clock: Any) -> None:
    machine = three_steps(nothing, raising(OSError("a"), OSError("b"), OSError("c")), nothing)
    await killed_at(path, "toy:two:retry:after", [machine], starting(machine, "k"))
    attempts: list[tuple[str, int]] = []

    async def look(run: Run[Ask]) -> None:
        attempts.append((run.step, run.attempt))

    async with engine_of(path, three_steps(look, look, look)) as engine:
        (run,) = engine.runs()
        assert (await engine.wait(run.id)).ok
    assert attempts == [("two", 2), ("three", 1)]


@pytest.mark.capability("attempts and the next due time are kept over a restart")
@pytest.mark.mistake("the backoff began anew after a restart")
@pytest.mark.mistake("a run that slept between two attempts could not be told from one at work")
async def test_a_pause_goes_on_after_a_restart(path: Path, autojump_clock: Any) -> None:
    policy = Policy(attempts=3, first_delay_s=100, max_delay_s=100, jitter=0)
    machine = one_step(raising(OSError("down")), retry=policy)
    clock = Wall()
    await killed_at(path, "toy:only:retry:after", [machine], starting(machine, "k"), clock=clock)
    clock.offset_s += 30  # the time in which the program did not run
    began = trio.current_time()
    toy = Toy()
    async with engine_of(path, machine, clock=clock, app=toy) as engine:
        (run,) = engine.runs()
        assert (run.attempt, run.due_ms, run.last_error) == (2, int((EPOCH_S + 100) * 1000), "OSError: down")
        outcome = await engine.wait(run.id)
    assert (outcome.kind, len(toy.calls)) == ("aborted", 2)  # the third attempt of three
    assert trio.current_time() - began == pytest.approx(70 + 100, abs=1)


@pytest.mark.mistake("a clock set back between two lives hid events or prolonged pauses")
@pytest.mark.parametrize("step_s", [-10 * 365 * 86400.0, 10 * 365 * 86400.0])
async def test_a_clock_step_between_two_lives_changes_no_order_and_no_pause(
    path: Path, autojump_clock: Any, step_s: float
) -> None:
    machine = three_steps(effect, raising(OSError("down"), None), effect)
    clock = Wall()
    await killed_at(path, "toy:two:retry:after", [machine], starting(machine, "k"), clock=clock)
    clock.offset_s += step_s
    began = trio.current_time()
    toy = Toy()
    async with engine_of(path, three_steps(effect, nothing, effect), clock=clock, app=toy) as engine:
        (run,) = engine.runs()
        assert (await engine.wait(run.id)).ok
        types = [event.type for event in engine.events(run.id)]
    assert toy.calls == ["k.two", "k.three"]
    assert trio.current_time() - began < 1
    assert types == ["start", "complete", "retry", "resume", "complete", "complete", "finish"]


@pytest.mark.mistake("an abort was no abort any more after a resume: only its text was kept")
async def test_an_ending_decided_before_a_crash_is_the_outcome(path: Path) -> None:
    seen: list[str] = []

    async def finaliser(run: Run[Any], outcome: Outcome) -> None:
        seen.append(outcome.kind)

    def machine(body: Any) -> Machine[Ask]:
        return Machine("toy", Ask).start("one", body).finalise(finaliser).end("end")

    first = machine(raising(Abort("no", kind="why", detail={"n": 1})))
    await killed_at(path, "toy:finish:before", [first], starting(first, "k"))
    toy = Toy()
    async with engine_of(path, machine(nothing), app=toy) as engine:
        (run,) = engine.runs()
        outcome = await engine.wait(run.id)
    assert (outcome.kind, outcome.error_kind, outcome.reason, outcome.detail) == ("aborted", "why", "no", {"n": 1})
    assert toy.calls == []
    assert seen == ["aborted", "aborted"]  # at least once


@pytest.mark.capability("a step that kills its process is given up in the end")
async def test_a_step_that_keeps_killing_the_process_is_aborted(path: Path) -> None:
    machine = one_step(gated, retry=Policy(crashes=3))
    await killed_in_step(path, [machine], "k")
    for _ in range(3):
        await killed_in_step(path, [machine])
    outcome = None
    async with engine_of(path, machine) as engine:
        (run,) = engine.runs()
        outcome = await engine.wait(run.id)
    assert (outcome.kind, outcome.error_kind) == ("aborted", "crashed")


async def test_stops_in_good_order_are_not_counted_as_crashes(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated, retry=Policy(crashes=1))
    for _ in range(5):
        async with engine_of(path, machine, grace_s=1) as engine:
            if not engine.runs():
                await engine.start(machine, "k", Ask())
            await trio.sleep(1)
    async with engine_of(path, machine, resume="none") as engine:
        (run,) = engine.runs()
        assert (run.crashes, run.active) == (0, True)


@pytest.mark.capability("a short command need not resume everything: all, related, none")
@pytest.mark.parametrize(("mode", "resumed"), [("all", ["a", "b"]), ("related", ["a"]), ("none", [])])
async def test_what_is_resumed_can_be_chosen(path: Path, autojump_clock: Any, mode: Any, resumed: list[str]) -> None:
    machine = one_step(gated)
    await killed_in_step(path, [machine], "a", "b")
    toy = Toy()
    async with engine_of(path, machine, app=toy, resume=mode, grace_s=0) as engine:
        a = engine.lookup.latest("toy", "a")
        assert a is not None
        with trio.move_on_after(5):
            await engine.wait(a.id)
    assert toy.calls == [f"{key}.only" for key in resumed]


async def test_starting_a_run_that_a_dead_process_left_goes_on_with_it_in_every_mode(path: Path) -> None:
    machine = one_step(gated)
    await killed_in_step(path, [machine], "a", "b")
    toy = Toy()
    toy.gate("a").set()
    async with engine_of(path, machine, app=toy, resume="none") as engine:
        started = await engine.start(machine, "a", Ask())
        assert not started.new
        assert (await engine.wait(started.id)).ok
    assert toy.calls == ["a.only"]


async def test_the_children_of_a_resumed_run_go_with_it(path: Path, autojump_clock: Any) -> None:
    child = one_step(gated, name="child")

    async def parent_body(run: Run[Ask]) -> None:
        await run.wait(await run.start_child(child, "c", Ask()))

    parent = one_step(parent_body, name="parent")
    await killed_in_step(path, [parent, child], "p")
    toy = Toy()
    toy.gate("c").set()
    async with engine_of(path, parent, child, app=toy, resume="none") as engine:
        started = await engine.start(parent, "p", Ask())
        assert (await engine.wait(started.id)).ok
    assert toy.calls == ["c.only"]


async def test_a_child_that_nobody_waits_for_goes_with_its_resumed_parent(path: Path, autojump_clock: Any) -> None:
    child = one_step(gated, name="child")

    async def begin(run: Run[Ask]) -> None:
        await run.start_child(child, "c", Ask())

    parent = Machine("parent", Ask).start("begin", begin).to("wait", gated).end("end")
    await killed_in_step(path, [parent, child], "p")
    toy = Toy()
    async with engine_of(path, parent, child, app=toy, resume="none", grace_s=0) as engine:
        await engine.start(parent, "p", Ask())
        await trio.sleep(1)
    assert sorted(toy.calls) == ["c.only", "p.wait"]


async def test_no_step_runs_before_the_engine_is_handed_out(path: Path) -> None:
    machine = one_step(gated)
    await killed_in_step(path, [machine], *"abcdefghij")
    handed_out: list[Engine] = []

    async def look(run: Run[Ask]) -> None:
        assert handed_out

    async with engine_of(path, one_step(look)) as engine:
        handed_out.append(engine)
        assert [(await engine.wait(run.id)).kind for run in engine.runs()] == ["done"] * 10


# ---------------------------------------------------------------- quarantine


@pytest.mark.capability("bad rows are quarantined with a reason and stop no other")
@pytest.mark.mistake("one row that could not be decoded stopped the resume of every later one, at every start")
@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"request": "{"}, "Invalid JSON"),
        ({"request": '{"number":"one"}'}, "valid integer"),
        ({"request": '{"number":1,"more":2}'}, "Extra inputs"),
        ({"machine": "gone"}, "no machine 'gone'"),
        ({"version": 7}, "defined otherwise"),
        ({"definition": "0" * 64}, "defined otherwise"),
        ({"cursor": 4}, "cursor 4 is outside"),
        ({"cursor": 3}, "no end is decided"),
        ({"steps": "no json"}, "cannot be read"),
        ({"ending": "no json"}, "cannot be read"),
        ({"queue": "closed"}, "no queue 'closed'"),
    ],
)
async def test_a_bad_row_is_quarantined_and_the_others_go_on(
    path: Path, columns: dict[str, object], reason: str
) -> None:
    machine = three_steps(number_first := nothing, gated, nothing)
    del number_first
    await killed_in_step(path, [machine], "a", "bad", "c")
    tamper(path, "bad", sealed=True, **columns)
    toy = Toy()
    toy.gate("a").set()
    toy.gate("c").set()
    async with engine_of(path, machine, app=toy) as engine:
        kinds = {}
        for run_id, key in sql(path, "SELECT id, key FROM run"):
            if key != "bad":
                kinds[key] = (await engine.wait(run_id)).kind
        (outcome,) = sql(path, "SELECT outcome FROM run WHERE key = 'bad'")
        (payload,) = sql(
            path, "SELECT payload FROM event e JOIN run r ON r.seq = e.run WHERE r.key = 'bad' AND type = 'finish'"
        )
    assert kinds == {"a": "done", "c": "done"}
    assert outcome == ("quarantined",)
    assert reason in json.loads(payload[0])["reason"]


@pytest.mark.mistake("a step missing from today's definition was skipped, a new one was not run")
@pytest.mark.parametrize(
    "today",
    [
        Machine("toy", Ask).start("one", nothing).to("three", nothing).end("end"),
        Machine("toy", Ask).start("one", nothing).to("two", nothing).to("new", nothing).to("three", nothing).end("end"),
        Machine("toy", Ask).start("one", nothing).to("three", nothing).to("two", nothing).end("end"),
        Machine("toy", Ask, version=2).start("one", nothing).to("two", nothing).to("three", nothing).end("end"),
    ],
    ids=["step gone", "step new", "order changed", "version changed"],
)
async def test_a_changed_definition_is_quarantined_and_its_key_is_free_again(path: Path, today: Machine[Ask]) -> None:
    yesterday = three_steps(nothing, gated, nothing)
    await killed_in_step(path, [yesterday], "k")
    toy = Toy()
    async with engine_of(path, today, app=toy) as engine:
        (run,) = engine.runs()
        outcome = await engine.wait(run.id)
        assert outcome.kind == "quarantined" and "defined otherwise" in str(outcome.reason)
        assert toy.calls == []
        started = await engine.start(today, "k", Ask())
        assert started.new and (await engine.wait(started.id)).ok


async def test_a_result_that_no_longer_fits_is_quarantined(path: Path) -> None:
    class Other(Model):
        text: str

    yesterday = Machine("toy", Ask).start("one", number, result=Gave).to("two", gated).end("end")

    async def other(run: Run[Ask]) -> Other:
        return Other(text="")

    today = Machine("toy", Ask).start("one", other, result=Other).to("two", nothing).end("end")
    await killed_in_step(path, [yesterday], "k")
    async with engine_of(path, today) as engine:
        (run,) = engine.runs()
        assert (await engine.wait(run.id)).kind == "quarantined"


@pytest.mark.capability("a flipped byte in a row is found by the row's digest")
@pytest.mark.parametrize("column", ["request", "key", "cursor", "attempt", "queue", "cancel_cause", "due_ms"])
async def test_a_damaged_row_is_quarantined_and_not_worked_from(path: Path, column: str) -> None:
    machine = three_steps(nothing, gated, nothing)
    await killed_in_step(path, [machine], "a", "b")
    changes: dict[str, object] = {"request": '{"number":1}', "key": "z", "cursor": 2, "attempt": 2, "queue": "q"}
    changes |= {"cancel_cause": "x", "due_ms": 5}
    tamper(path, "a", sealed=False, **{column: changes[column]})
    toy = Toy()
    toy.gate("a").set()
    toy.gate("b").set()
    async with engine_of(path, machine, app=toy) as engine:
        (good,) = sql(path, "SELECT id FROM run WHERE key = 'b'")
        assert (await engine.wait(good[0])).ok
    assert sql(path, "SELECT outcome FROM run ORDER BY seq") == [("quarantined",), ("done",)]
    assert toy.calls == ["b.two", "b.three"]


async def test_a_damaged_result_is_quarantined(path: Path) -> None:
    machine = Machine("toy", Ask).start("one", number, result=Gave).to("two", gated).end("end")
    await killed_in_step(path, [machine], "k")
    sql(path, "UPDATE run_result SET value = '{\"number\":9}'")
    async with engine_of(path, machine) as engine:
        (run,) = engine.runs()
        outcome = await engine.wait(run.id)
    assert outcome.kind == "quarantined" and "digest" in str(outcome.reason)


# ---------------------------------------------------------------- asking after a restart


@pytest.mark.capability("an outcome is kept, also after a restart")
@pytest.mark.mistake("waiting for a run that had failed gave success after a restart")
@pytest.mark.mistake("the history of a run could not be found any more a minute after its end")
async def test_a_finished_run_gives_the_same_outcome_after_a_restart(path: Path) -> None:
    machine = one_step(raising(Abort("no", kind="why")))
    clock = Wall()
    outcome = await run_one(path, machine, clock=clock)
    clock.offset_s += 86400
    async with engine_of(path, machine, clock=clock) as engine:
        assert await engine.wait(outcome.run_id) == outcome
        assert outcome.kind == "aborted"
        assert [event.type for event in engine.events(outcome.run_id)] == ["start", "stop", "finish"]


@pytest.mark.mistake("a crash before the first resume left a key blocked for ever")
async def test_a_key_is_free_again_after_its_run_has_ended(path: Path) -> None:
    machine = one_step(nothing)
    first = await run_one(path, machine)
    second = await run_one(path, machine)
    assert first.run_id != second.run_id and second.ok


async def test_a_machine_that_is_not_the_engines_is_refused(path: Path) -> None:
    async with engine_of(path, one_step(nothing)) as engine:
        with pytest.raises(UsageError, match="not one of this engine's"):
            await engine.start(one_step(nothing), "k", Ask())
