"""Starting, joining, waiting, cancelling, stopping; queues, delays, predecessors, children."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker.machine import (
    Abort,
    After,
    DefinitionError,
    Machine,
    Outcome,
    Policy,
    Run,
    StoppedError,
    UnknownRunError,
    UsageError,
    problems,
)
from broker.machine.queues import Queue
from tests.broker.machine_toys import (
    EPOCH_S,
    Ask,
    Toy,
    Wall,
    effect,
    engine_of,
    gated,
    nothing,
    one_step,
    raising,
    three_steps,
)

blocked = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


# ---------------------------------------------------------------- one active run of a key


@pytest.mark.capability("one active run of each machine and key; who asks again joins it")
async def test_a_second_start_joins_the_run(path: Path) -> None:
    machine = one_step(gated)
    toy = Toy()
    async with engine_of(path, machine, app=toy) as engine:
        first = await engine.start(machine, "k", Ask(number=1))
        same = await engine.start(machine, "k", Ask(number=1))
        other = await engine.start(machine, "k", Ask(number=2))
        assert first.new and not same.new and not other.new
        assert same.id == other.id == first.id
        assert same.same_request and not other.same_request
        toy.gate("k").set()
        assert (await engine.wait(first.id)).ok
    assert toy.calls == ["k.only"]


@pytest.mark.mistake("two queued runs of one key could be at work at once")
async def test_queued_and_delayed_runs_are_unique_too(path: Path) -> None:
    machine = one_step(gated)
    async with engine_of(path, machine, queues={"q": 1}, grace_s=0) as engine:
        runs = [
            await engine.start(machine, "a", Ask(), queue="q"),
            await engine.start(machine, "b", Ask(), queue="q"),
            await engine.start(machine, "c", Ask(), not_before=EPOCH_S + 1e6),
        ]
        for run, key in zip(runs, "abc", strict=True):
            assert (await engine.start(machine, key, Ask())).id == run.id
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            async with engine.transaction() as db:
                db.execute(
                    "INSERT INTO run (id, machine, version, definition, steps, key, request, wanted, created_ms,"
                    " updated_ms, seal) SELECT replace(id, '0', '1'), machine, version, definition, steps, key,"
                    " request, wanted, created_ms, updated_ms, seal FROM run WHERE key = 'b'"
                )


@pytest.mark.mistake("asking for the active runs of img1 reported img10")
@pytest.mark.mistake("keys with a separator in them ran into each other")
async def test_keys_are_compared_whole(path: Path) -> None:
    machine = one_step(gated)
    async with engine_of(path, machine, grace_s=0) as engine:
        await engine.start(machine, "img10", Ask())
        await engine.start(machine, "a#b", Ask())
        await engine.start(machine, "%", Ask())
        assert engine.lookup.active("toy", "img1") is None
        assert engine.lookup.active("toy", "a") is None
        assert (await engine.start(machine, "a", Ask())).new
        assert [run.key for run in engine.runs("toy", "%")] == ["%"]


@pytest.mark.mistake("starting one action of a resource made waiting for another action return at once")
async def test_machines_with_the_same_key_do_not_disturb_each_other(path: Path) -> None:
    first, second = one_step(gated, name="first"), one_step(nothing, name="second")
    toy = Toy()
    async with engine_of(path, first, second, app=toy) as engine:
        slow = await engine.start(first, "k", Ask())
        quick = await engine.start(second, "k", Ask())
        assert (await engine.wait(quick.id)).ok
        with trio.move_on_after(0.05) as scope:
            await engine.wait(slow.id)
        assert scope.cancelled_caught
        toy.gate("k").set()
        assert (await engine.wait(slow.id)).ok


# ---------------------------------------------------------------- waiting


@pytest.mark.capability("wait on an unknown run raises")
@pytest.mark.mistake("waiting for an unknown run returned success")
async def test_an_unknown_run_cannot_be_waited_for(path: Path) -> None:
    machine = one_step(nothing)
    async with engine_of(path, machine) as engine:
        await engine.wait((await engine.start(machine, "k", Ask())).id)
        with pytest.raises(UnknownRunError):
            await engine.wait("nobody")
        with pytest.raises(UnknownRunError):
            await engine.cancel("nobody", cause="x")
        with pytest.raises(UnknownRunError):
            engine.events("nobody")


async def test_many_wait_for_one_run(path: Path) -> None:
    machine = one_step(gated)
    toy = Toy()
    outcomes: list[Outcome] = []
    async with engine_of(path, machine, app=toy) as engine:
        started = await engine.start(machine, "k", Ask())

        async def waiter() -> None:
            outcomes.append(await engine.wait(started.id))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(waiter)
            await blocked()
            toy.gate("k").set()
    assert [o.run_id for o in outcomes] == [started.id] * 5


# ---------------------------------------------------------------- queues


@pytest.mark.capability("an unknown queue is an error at the start")
@pytest.mark.mistake("an unknown queue was a warning and no limit")
async def test_an_unknown_queue_is_refused(path: Path) -> None:
    machine = one_step(nothing)
    async with engine_of(path, machine) as engine:
        with pytest.raises(UsageError, match="no queue 'q'"):
            await engine.start(machine, "k", Ask(), queue="q")
        assert engine.runs() == []
    with pytest.raises(DefinitionError, match="no queue 'q'"):
        async with engine_of(path, one_step(nothing, queue="q")):
            pass


@pytest.mark.mistake("a queue of no places took runs and never let one in")
async def test_a_queue_without_places_is_refused(path: Path) -> None:
    with pytest.raises(DefinitionError, match="at least one place"):
        async with engine_of(path, one_step(nothing), queues={"q": 0}):
            pass


@pytest.mark.capability("queues for single steps")
async def test_a_step_holds_its_queue_only_for_its_attempt(path: Path, autojump_clock: Any) -> None:
    inside: list[str] = []
    most = 0

    async def narrow(run: Run[Ask]) -> None:
        nonlocal most
        inside.append(run.key)
        most = max(most, len(inside))
        await trio.sleep(1)
        inside.remove(run.key)
        if run.attempt == 1:
            raise OSError("x")

    machine = Machine("toy", Ask).start("one", nothing).to("narrow", narrow, queue="q").to("three", gated).end("end")
    async with engine_of(path, machine, queues={"q": 1}, grace_s=0) as engine:
        for key in "abcd":
            await engine.start(machine, key, Ask())
        await trio.sleep(20)
        assert [run.step for run in engine.runs()] == ["three"] * 4
    assert most == 1


@pytest.mark.mistake("durations counted the wait in a queue and the time in which nothing ran")
async def test_a_duration_is_of_the_attempt_alone(path: Path, autojump_clock: Any) -> None:
    async def slow(run: Run[Ask]) -> None:
        await trio.sleep(10)

    machine = one_step(slow, queue="q")
    async with engine_of(path, machine, queues={"q": 1}) as engine:
        runs = [await engine.start(machine, key, Ask()) for key in "abc"]
        for run in runs:
            await engine.wait(run.id)
        completed = [event for run in runs for event in engine.events(run.id) if event.type == "complete"]
        assert [event.payload["duration_ms"] for event in completed] == [10_000] * 3
        assert completed[2].at_ms - completed[0].at_ms == 20_000


@pytest.mark.mistake("finished runs stayed in memory until the same key ran again")
async def test_an_engine_keeps_nothing_of_a_run_that_has_ended(path: Path) -> None:
    machine = one_step(effect)
    async with engine_of(path, machine, queues={"q": 1}) as engine:
        run = await engine.start(machine, "k", Ask(), queue="q")
        await engine.wait(run.id)
        held = engine._active, engine._needed, engine._stopped, engine._ownership._held, engine.queues["q"]._waiting
        assert not any(held) and engine.queues["q"].held == 0


@pytest.mark.capability("a caller's trace context is kept with the run and given to its steps, also after a restart")
@pytest.mark.mistake("the link to the caller's trace was lost in a queue")
async def test_a_trace_goes_with_its_run(path: Path) -> None:
    seen: list[str | None] = []

    async def looks(run: Run[Ask]) -> None:
        seen.append(run.trace)
        await run.app.gate(run.key).wait()

    machine, toy = one_step(looks), Toy()
    async with engine_of(path, machine, queues={"q": 1}, grace_s=0, app=toy) as engine:
        await engine.start(machine, "k", Ask(), queue="q", trace="00-4bf92f3577b34da6-00f067aa0ba902b7-01")
        await blocked()
    toy.gate("k").set()
    async with engine_of(path, machine, queues={"q": 1}, app=toy) as engine:
        await engine.wait(engine.runs()[0].id)
    assert seen == ["00-4bf92f3577b34da6-00f067aa0ba902b7-01"] * 2


async def test_a_queue_is_for_steps_or_for_runs(path: Path) -> None:
    machine = one_step(nothing, queue="q")
    async with engine_of(path, machine, queues={"q": 1}) as engine:
        with pytest.raises(UsageError, match="for steps"):
            await engine.start(machine, "k", Ask(), queue="q")


@pytest.mark.capability("places in queues are lent out while a run waits for another")
async def test_a_parent_in_a_queue_does_not_block_its_children(path: Path, autojump_clock: Any) -> None:
    child = one_step(nothing, name="child")

    async def body(run: Run[Ask]) -> None:
        for key in ("x", "y"):
            assert (await run.wait(await run.start_child(child, f"{run.key}{key}", Ask(), queue="q"))).ok

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child, queues={"q": 1}) as engine:
        runs = [await engine.start(parent, key, Ask(), queue="q") for key in "abc"]
        with trio.fail_after(100):
            for run in runs:
                assert (await engine.wait(run.id)).ok
        assert engine.queues["q"].held == 0


async def test_a_cancelled_run_leaves_its_queue(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated)
    toy = Toy()
    async with engine_of(path, machine, app=toy, queues={"q": 1}) as engine:
        a, b, c = [await engine.start(machine, key, Ask(), queue="q") for key in "abc"]
        await blocked()
        assert await engine.cancel(b.id, cause="not needed")
        assert (await engine.wait(b.id)).kind == "cancelled"
        toy.gate("a").set()
        toy.gate("c").set()
        assert (await engine.wait(a.id)).ok and (await engine.wait(c.id)).ok
        assert engine.queues["q"].held == 0
    assert toy.calls == ["a.only", "c.only"]


# ---------------------------------------------------------------- later


@pytest.mark.capability("delayed start")
@pytest.mark.mistake("a delayed start ignored its queue")
async def test_a_delayed_run_starts_on_time_and_through_its_queue(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated)
    toy = Toy()
    async with engine_of(path, machine, app=toy, queues={"q": 1}, poll_s=10) as engine:
        first = await engine.start(machine, "first", Ask(), queue="q")
        late = await engine.start(machine, "late", Ask(), queue="q", not_before=EPOCH_S + 3600)
        await trio.sleep(3599)
        assert toy.calls == ["first.only"]
        await trio.sleep(100)
        assert toy.calls == ["first.only"]  # on time, but its queue is full
        toy.gate("first").set()
        toy.gate("late").set()
        assert (await engine.wait(first.id)).ok and (await engine.wait(late.id)).ok


async def test_a_clock_that_is_set_moves_a_delayed_start(path: Path, autojump_clock: Any) -> None:
    machine = one_step(nothing)
    clock = Wall()
    async with engine_of(path, machine, clock=clock, poll_s=10) as engine:
        late = await engine.start(machine, "late", Ask(), not_before=EPOCH_S + 86400)
        await trio.sleep(10)
        clock.offset_s += 86400
        with trio.fail_after(61):
            assert (await engine.wait(late.id)).ok


@pytest.mark.mistake("a delayed run could not be cancelled and held up the shutdown")
async def test_a_delayed_run_can_be_cancelled_and_does_not_hold_up_the_stop(path: Path, autojump_clock: Any) -> None:
    machine = one_step(nothing)
    async with engine_of(path, machine, grace_s=1000) as engine:
        a = await engine.start(machine, "a", Ask(), not_before=EPOCH_S + 1e6)
        b = await engine.start(machine, "b", Ask(), not_before=EPOCH_S + 1e6)
        assert await engine.cancel(a.id, cause="changed my mind")
        outcome = await engine.wait(a.id)
        assert (outcome.kind, outcome.reason) == ("cancelled", "changed my mind")
        before = trio.current_time()
    assert trio.current_time() - before < 1
    async with engine_of(path, machine, resume="none") as engine:
        assert engine.lookup.run(b.id).active


@pytest.mark.capability("run-after, with success or any outcome")
@pytest.mark.mistake("what should run after a success ran after a failure as well")
@pytest.mark.parametrize(
    ("policy", "body", "kind"),
    [
        ("success", nothing, "done"),
        ("any", nothing, "done"),
        ("success", raising(Abort("no")), "aborted"),
        ("any", raising(Abort("no")), "done"),
    ],
)
async def test_a_run_starts_after_another(path: Path, autojump_clock: Any, policy: Any, body: Any, kind: str) -> None:
    toy = Toy()

    async def gated_body(run: Run[Ask]) -> None:
        await gated(run)
        await body(run)

    first, second = one_step(gated_body, name="first"), one_step(nothing, name="second")
    async with engine_of(path, first, second, app=toy) as engine:
        a = await engine.start(first, "a", Ask())
        b = await engine.start(second, "b", Ask(), after=[After(a.id, policy)])
        await trio.sleep(10)
        assert toy.calls == ["a.only"]
        toy.gate("a").set()
        outcome = await engine.wait(b.id)
        assert outcome.kind == kind
        if kind == "aborted":
            assert outcome.error_kind == "predecessor" and "was aborted" in str(outcome.reason)


@pytest.mark.mistake("what should run after an unknown run started at once")
async def test_an_unknown_predecessor_is_an_error(path: Path) -> None:
    machine = one_step(nothing)
    async with engine_of(path, machine) as engine:
        with pytest.raises(UnknownRunError):
            await engine.start(machine, "k", Ask(), after=["0" * 26])
        assert engine.runs() == []


@pytest.mark.mistake("after a restart a run did not wait for a predecessor that was not resumed yet")
async def test_a_run_waits_for_its_predecessor_after_a_restart(path: Path, autojump_clock: Any) -> None:
    first, second = one_step(gated, name="first"), one_step(nothing, name="second")
    async with engine_of(path, first, second, grace_s=0) as engine:
        a = await engine.start(first, "a", Ask())
        b = await engine.start(second, "b", Ask(), after=[a.id])
    toy = Toy()
    async with engine_of(path, second, first, app=toy, resume="none") as engine:
        await engine.resume(b.id)
        await trio.sleep(10)
        assert toy.calls == ["a.only"]
        toy.gate("a").set()
        assert (await engine.wait(b.id)).ok
    assert toy.calls == ["a.only", "b.only"]


# ---------------------------------------------------------------- parents and children


@pytest.mark.capability("children: joined, shared, not repeated with a repeated step")
async def test_two_parents_share_a_child(path: Path, autojump_clock: Any) -> None:
    child = one_step(gated, name="child")

    async def body(run: Run[Ask]) -> None:
        assert (await run.wait(await run.start_child(child, "shared", Ask()))).ok
        if run.attempt == 1:
            raise OSError("again")

    parent = one_step(body, name="parent")
    toy = Toy()
    async with engine_of(path, parent, child, app=toy) as engine:
        runs = [await engine.start(parent, key, Ask()) for key in "ab"]
        await blocked()
        toy.gate("shared").set()
        for run in runs:
            assert (await engine.wait(run.id)).ok
        (only,) = engine.runs("child")
        assert {p.key for p in engine.lookup.parents(only)} == {"a", "b"}
    assert toy.calls == ["shared.only"]


async def test_a_done_child_is_done_again_for_another_request_or_parent(path: Path, autojump_clock: Any) -> None:
    child = one_step(nothing, name="child")
    ids: list[str] = []

    async def body(run: Run[Ask]) -> None:
        for number in (1, 1, 2):
            ids.append(await run.start_child(child, "c", Ask(number=number)))
            await run.wait(ids[-1])

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child) as engine:
        for key in "ab":
            assert (await engine.wait((await engine.start(parent, key, Ask())).id)).ok
    assert ids[0] == ids[1] and len(set(ids)) == 4


@pytest.mark.capability("cancelling a parent cancels its children, but none that others want")
async def test_cancel_cascades_to_children_that_nobody_else_wants(path: Path, autojump_clock: Any) -> None:
    leaf = one_step(gated, name="leaf")

    async def middle_body(run: Run[Ask]) -> None:
        await run.wait(await run.start_child(leaf, f"{run.key}-leaf", Ask()))

    middle = one_step(middle_body, name="middle")

    async def top_body(run: Run[Ask]) -> None:
        shared = await run.start_child(leaf, "shared", Ask())
        wanted = await run.start_child(leaf, "wanted", Ask())
        own = await run.start_child(middle, f"{run.key}-own", Ask())
        for child in (shared, wanted, own):
            await run.wait(child)

    top = one_step(top_body, name="top")
    async with engine_of(path, top, middle, leaf, grace_s=0) as engine:
        a = await engine.start(top, "a", Ask())
        b = await engine.start(top, "b", Ask())
        await engine.start(leaf, "wanted", Ask())
        await blocked()
        assert await engine.cancel(a.id, cause="enough")
        assert (await engine.wait(a.id)).kind == "cancelled"
        state = {}
        for run in engine.runs():
            if run.key.startswith("a-"):
                outcome = await engine.wait(run.id)
                state[run.key] = (outcome.kind, outcome.reason)
        assert state == {"a-own": ("cancelled", "enough"), "a-own-leaf": ("cancelled", "enough")}
        assert {run.key for run in engine.runs(active_only=True)} == {"b", "shared", "wanted", "b-own", "b-own-leaf"}
        await engine.cancel(b.id, cause="enough too")
        await engine.wait(b.id)
        await trio.sleep(1)
        assert {run.key for run in engine.runs(active_only=True)} == {"wanted"}
        assert problems(engine.lookup) == []


async def test_active_runs_are_given_whole_and_the_history_in_pages(path: Path) -> None:
    gate = trio.Event()

    async def wait(run: Run[Ask]) -> None:
        await gate.wait()

    machine = one_step(wait)
    async with engine_of(path, machine) as engine:
        for number in range(101):
            await engine.start(machine, str(number), Ask())
        assert len(engine.runs(active_only=True)) == len(engine.runs("toy", active_only=True)) == 101
        gate.set()
        for run in engine.runs(active_only=True):
            await engine.wait(run.id)
        assert (len(engine.runs(active_only=True)), len(engine.runs())) == (0, 100)


async def test_a_run_that_is_aborted_takes_its_children_along(path: Path, autojump_clock: Any) -> None:
    child = one_step(gated, name="child")

    async def body(run: Run[Ask]) -> None:
        await run.start_child(child, "c", Ask())
        raise Abort("no more")

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child) as engine:
        started = await engine.start(parent, "p", Ask())
        await engine.wait(started.id)
        (orphan,) = engine.runs("child")
        outcome = await engine.wait(orphan.id)
        assert outcome.kind == "cancelled" and "parent p" in str(outcome.reason)


@pytest.mark.mistake("the active children of a run included finished ones; links were lost with time")
async def test_children_are_listed_and_stay_listed(path: Path, autojump_clock: Any) -> None:
    child = one_step(gated, name="child")

    async def body(run: Run[Ask]) -> None:
        for key in ("x", "y"):
            await run.start_child(child, key, Ask())
        await run.app.gate("parent").wait()

    parent = one_step(body, name="parent")
    toy = Toy()
    async with engine_of(path, parent, child, app=toy) as engine:
        started = await engine.start(parent, "p", Ask())
        await blocked()
        toy.gate("x").set()
        await blocked()
        record = engine.lookup.run(started.id)
        assert [c.key for c in engine.lookup.children(record)] == ["x", "y"]
        assert [engine.lookup.row(seq).key for seq in engine.lookup.active_children(record.seq)] == ["y"]
        toy.gate("y").set()
        toy.gate("parent").set()
        await engine.wait(started.id)
        assert [c.key for c in engine.lookup.children(record)] == ["x", "y"]


@pytest.mark.mistake("a parent, once set, was inherited by later runs that had none")
async def test_a_run_without_a_parent_has_none(path: Path, autojump_clock: Any) -> None:
    child = one_step(nothing, name="child")

    async def body(run: Run[Ask]) -> None:
        await run.wait(await run.start_child(child, "c", Ask()))

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child) as engine:
        await engine.wait((await engine.start(parent, "p", Ask())).id)
        alone = await engine.start(child, "alone", Ask())
        await engine.wait(alone.id)
        assert engine.lookup.parents(engine.lookup.run(alone.id)) == []


async def test_a_run_cannot_wait_for_itself_or_be_a_part_of_itself(path: Path) -> None:
    seen: list[str] = []

    async def inner(run: Run[Ask]) -> None:
        try:
            await run.start_child(outer_machine, "o", Ask())
        except UsageError as error:
            seen.append(str(error))

    async def outer(run: Run[Ask]) -> None:
        with pytest.raises(UsageError, match="wait for itself"):
            await run.wait(run.id)
        with pytest.raises(UsageError, match="itself a part"):
            await run.start_child(outer_machine, "o", Ask())
        assert (await run.wait(await run.start_child(inner_machine, "i", Ask()))).ok

    outer_machine, inner_machine = one_step(outer, name="outer"), one_step(inner, name="inner")
    async with engine_of(path, outer_machine, inner_machine) as engine:
        started = await engine.start(outer_machine, "o", Ask())
        assert (await engine.wait(started.id)).ok
    assert len(seen) == 1 and "itself a part" in seen[0]


async def test_children_start_only_under_an_active_parent(path: Path) -> None:
    machine = one_step(nothing)
    async with engine_of(path, machine) as engine:
        done = await engine.start(machine, "p", Ask())
        await engine.wait(done.id)
        with pytest.raises(UsageError, match="has ended"):
            await engine.start(machine, "c", Ask(), parent=done.id)
        with pytest.raises(UnknownRunError):
            await engine.start(machine, "c", Ask(), parent="nobody")


# ---------------------------------------------------------------- cancelling


@pytest.mark.capability("cancellation and its cause are durable before anyone is told")
@pytest.mark.mistake("a cancellation was not kept: after a crash the run went on")
async def test_cancellation_is_durable_before_the_run_hears_of_it(path: Path) -> None:
    seen: list[Any] = []

    async def look(run: Run[Ask]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with sqlite3.connect(path) as db:
                seen.extend(db.execute("SELECT cancel_cause FROM run").fetchall())
            db.close()

    machine = one_step(look)
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        await blocked()
        assert await engine.cancel(started.id, cause="the user said so")
        outcome = await engine.wait(started.id)
    assert seen == [("the user said so",)]
    assert (outcome.kind, outcome.error_kind, outcome.reason, outcome.step) == (
        *("cancelled", "cancelled", "the user said so", "only"),
    )


@pytest.mark.mistake("a cancellation during a pause was not recorded and its cause was lost")
async def test_cancel_during_a_pause(path: Path, autojump_clock: Any) -> None:
    machine = one_step(raising(OSError("down")), retry=Policy(first_delay_s=100, max_delay_s=100))
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        await trio.sleep(10)
        await engine.cancel(started.id, cause="enough")
        outcome = await engine.wait(started.id)
        types = [event.type for event in engine.events(started.id)]
    assert (outcome.kind, outcome.reason) == ("cancelled", "enough")
    assert types == ["start", "retry", "cancel", "finish"]
    assert trio.current_time() < 20


@pytest.mark.mistake("finalisers of a cancelled run were given a cancelled context, so their work failed")
async def test_finalisers_of_a_cancelled_run_can_work(path: Path, autojump_clock: Any) -> None:
    seen: list[str] = []

    async def finaliser(run: Run[Any], outcome: Outcome) -> None:
        await trio.sleep(5)
        await effect(run)
        seen.append(outcome.kind)

    machine = Machine("toy", Ask).start("only", gated).finalise(finaliser).end("end")
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        await blocked()
        await engine.cancel(started.id, cause="enough")
        assert (await engine.wait(started.id)).kind == "cancelled"
        assert engine.db.execute("SELECT step FROM effect").fetchall() == [("only",)]
    assert seen == ["cancelled"]


async def test_an_error_caused_by_the_cancellation_does_not_replace_it(path: Path) -> None:
    async def turns(run: Run[Ask]) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise Abort("extract: cancelled") from None

    machine = one_step(turns)
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        await blocked()
        await engine.cancel(started.id, cause="enough")
        outcome = await engine.wait(started.id)
    assert (outcome.kind, outcome.reason) == ("cancelled", "enough")


async def test_cancelling_twice_or_too_late_changes_nothing(path: Path) -> None:
    machine = one_step(gated)
    toy = Toy()
    async with engine_of(path, machine, app=toy) as engine:
        started = await engine.start(machine, "k", Ask())
        await blocked()
        assert await engine.cancel(started.id, cause="first")
        await engine.cancel(started.id, cause="second")
        assert (await engine.wait(started.id)).reason == "first"
        assert not await engine.cancel(started.id, cause="third")
        assert (await engine.wait(started.id)).reason == "first"


@pytest.mark.capability("a run that is being cancelled is not joined but started anew")
async def test_a_start_while_the_old_run_is_being_cancelled_makes_a_new_one(path: Path, autojump_clock: Any) -> None:
    async def slow(run: Run[Any], outcome: Outcome) -> None:
        await trio.sleep(5)

    machine = Machine("toy", Ask).start("only", gated).finalise(slow).end("end")
    toy = Toy()
    async with engine_of(path, machine, app=toy) as engine:
        old = await engine.start(machine, "k", Ask())
        await blocked()
        await engine.cancel(old.id, cause="enough")
        new = await engine.start(machine, "k", Ask())
        assert new.new and new.id != old.id
        toy.gate("k").set()
        assert (await engine.wait(new.id)).ok
        assert (await engine.wait(old.id)).kind == "cancelled"


# ---------------------------------------------------------------- stopping


@pytest.mark.capability("a stop finishes the steps at work, and is no outcome")
@pytest.mark.mistake("a stop closed the store under a running step, whose completion was lost")
async def test_a_stop_lets_the_step_at_work_finish_and_goes_no_further(path: Path, autojump_clock: Any) -> None:
    async def slow(run: Run[Ask]) -> None:
        await effect(run)
        await trio.sleep(5)

    machine = three_steps(slow, slow, slow)
    async with engine_of(path, machine, grace_s=10, queues={"q": 1}) as engine:
        run = await engine.start(machine, "k", Ask(), queue="q")
        queued = await engine.start(machine, "queued", Ask(), queue="q")
        await trio.sleep(7)
    assert trio.current_time() == pytest.approx(10)
    async with engine_of(path, machine, resume="none", queues={"q": 1}) as engine:
        record = engine.lookup.run(run.id)
        assert (record.step, record.active, record.parked) == ("three", True, True)
        assert engine.lookup.run(queued.id).step == "one"
        assert engine.db.execute("SELECT step FROM effect").fetchall() == [("one",), ("two",)]
    async with engine_of(path, machine, queues={"q": 1}) as engine:
        assert (await engine.wait(run.id)).ok and (await engine.wait(queued.id)).ok


@pytest.mark.mistake("an abort caused by the shutdown ended the run for good")
async def test_what_a_stop_breaks_is_not_an_outcome(path: Path, autojump_clock: Any) -> None:
    async def turns(run: Run[Ask]) -> None:
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            raise Abort("extract: cancelled") from None

    machine = one_step(turns)
    async with engine_of(path, machine, grace_s=2) as engine:
        started = await engine.start(machine, "k", Ask())
        await blocked()
    assert trio.current_time() == pytest.approx(2)
    async with engine_of(path, one_step(nothing)) as engine:
        assert (await engine.wait(started.id)).ok


@pytest.mark.mistake("a start after the shutdown waited for ever")
async def test_who_waits_is_told_that_the_engine_stops(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated)
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        async with trio.open_nursery() as nursery:

            async def waits() -> None:
                with pytest.raises(StoppedError):
                    await engine.wait(started.id)

            nursery.start_soon(waits)
            await blocked()
            await engine.shutdown(grace_s=1)
        with pytest.raises(StoppedError):
            await engine.start(machine, "more", Ask())


async def test_a_parent_that_waits_for_a_child_stops_with_it(path: Path, autojump_clock: Any) -> None:
    async def slow(run: Run[Ask]) -> None:
        await trio.sleep(5)

    child = three_steps(slow, slow, slow, name="child")

    async def body(run: Run[Ask]) -> None:
        await run.wait(await run.start_child(child, "c", Ask()))

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child, grace_s=1000) as engine:
        started = await engine.start(parent, "p", Ask())
        await trio.sleep(7)
    assert trio.current_time() < 11
    async with engine_of(path, parent, child) as engine:
        assert (await engine.wait(started.id)).ok
        (only,) = engine.runs("child")
        assert [e.type for e in engine.events(only.id)].count("complete") == 3


@pytest.mark.parametrize("grouped", [False, True])
async def test_a_step_that_starts_a_child_while_the_engine_stops_goes_on_later(
    path: Path, autojump_clock: Any, grouped: bool
) -> None:
    child = one_step(nothing, name="child")

    async def body(run: Run[Ask]) -> None:
        await trio.sleep(5)
        if not grouped:
            await run.start_child(child, "c", Ask())
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run.start_child, child, "c", Ask())

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child, grace_s=1000) as engine:
        started = await engine.start(parent, "p", Ask())
        await trio.sleep(1)
    async with engine_of(path, parent, child) as engine:
        assert engine.lookup.run(started.id).crashes == 0
        assert (await engine.wait(started.id)).ok


async def test_a_child_that_was_required_and_failed_gives_its_reason_to_its_parent(path: Path) -> None:
    child = one_step(raising(Abort("no such object", kind="absent", detail={"key": "x"})), name="child")

    async def body(run: Run[Ask]) -> None:
        (await run.wait(await run.start_child(child, "c", Ask()))).require()

    parent = one_step(body, name="parent")
    async with engine_of(path, parent, child) as engine:
        outcome = await engine.wait((await engine.start(parent, "p", Ask())).id)
    assert (outcome.kind, outcome.error_kind, outcome.detail) == ("aborted", "absent", {"key": "x"})
    assert "no such object" in str(outcome.reason)


async def test_a_marked_rest_is_cut_at_once_by_a_stop(path: Path, autojump_clock: Any) -> None:
    async def rests(run: Run[Ask]) -> None:
        with run.rest():
            await trio.sleep_forever()

    machine = one_step(rests)
    async with engine_of(path, machine, grace_s=1000) as engine:
        started = await engine.start(machine, "k", Ask())
        await blocked()
    assert trio.current_time() < 1
    async with engine_of(path, machine, resume="none") as engine:
        assert engine.lookup.run(started.id).active


@pytest.mark.capability("a cancelled program stops at once and leaves its runs in order")
async def test_a_cancelled_program_parks_its_runs(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated)
    with trio.move_on_after(3) as scope:
        async with engine_of(path, machine, grace_s=1000) as engine:
            started = await engine.start(machine, "k", Ask())
            await engine.wait(started.id)
    assert scope.cancelled_caught and trio.current_time() == pytest.approx(3)
    async with engine_of(path, machine, resume="none") as engine:
        record = engine.lookup.run(started.id)
        assert (record.active, record.parked, record.crashes) == (True, True, 0)


async def test_an_error_of_the_program_comes_out_as_it_is(path: Path) -> None:
    class OwnError(Exception):
        pass

    with pytest.raises(OwnError):
        async with engine_of(path, one_step(gated)) as engine:
            await engine.start(engine.machines["toy"], "k", Ask())
            raise OwnError


# ---------------------------------------------------------------- definitions


@pytest.mark.capability("definitions are frozen values, checked when they are declared")
def test_wrong_definitions_are_refused_at_once() -> None:
    class Loose(Ask):
        model_config = {"extra": "ignore"}  # noqa: RUF012  what is refused here

    start = Machine("toy", Ask).start("one", nothing)
    wrong: list[Any] = [
        lambda: Machine("Toy", Ask),
        lambda: Machine("toy#1", Ask),
        lambda: Machine("toy", Loose),
        lambda: Machine("toy", Ask, version=0),
        lambda: Machine("toy", Ask).to("one", nothing),
        lambda: Machine("toy", Ask).end("end"),
        lambda: start.start("two", nothing),
        lambda: start.to("one", nothing),
        lambda: start.to("finish", nothing),
        lambda: start.end("one"),
        lambda: start.end("end").to("two", nothing),
        lambda: start.end("end").end("end2"),
        lambda: start.to("two", nothing, result=Loose),  # type: ignore[arg-type]
        lambda: Policy(attempts=0),
        lambda: Policy(jitter=2),
        lambda: Policy(deadline_s=0),
    ]
    for attempt in wrong:
        with pytest.raises(DefinitionError):
            attempt()
    assert start.step_names == ("one",)  # none of that changed it


async def test_two_machines_of_one_name_or_one_without_an_end_are_refused(path: Path) -> None:
    for machines in ([one_step(nothing), one_step(effect)], [Machine("toy", Ask).start("one", nothing)]):
        with pytest.raises(DefinitionError, match=r"two machines|no end"):
            async with engine_of(path, *machines):
                pass


@pytest.mark.capability("older runs come first in a queue, also when they come back to it")
def test_a_queue_lets_older_runs_in_first() -> None:
    queue = Queue(1)
    first = queue.enlist(7)
    young, old, middle = queue.enlist(6), queue.enlist(2), queue.enlist(4)
    assert first.granted.is_set()
    queue.drop(middle)
    queue.drop(first)
    queue.drop(first)
    assert (old.granted.is_set(), young.granted.is_set(), queue.held) == (True, False, 1)
    queue.drop(old)
    assert young.granted.is_set() and not middle.granted.is_set()
