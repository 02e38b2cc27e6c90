"""One run in one life: steps, results, what a step may raise, retries, deadlines, the log."""

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from pydantic import BaseModel

from broker.machine import (
    Abort,
    Done,
    EventRecord,
    Handoff,
    Hooks,
    Machine,
    Outcome,
    Policy,
    Retry,
    Run,
    RunFailedError,
    RunRecord,
)
from broker.machine.definition import Call
from tests.broker.machine_toys import (
    Ask,
    Gave,
    Model,
    Toy,
    effect,
    engine_of,
    gated,
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


def effects(path: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(path) as db:
        found = db.execute("SELECT run, step FROM effect ORDER BY rowid").fetchall()
    db.close()
    return found


# ---------------------------------------------------------------- results


@pytest.mark.capability("linear steps with typed requests and results")
async def test_results_of_earlier_steps_are_read_by_type(path: Path) -> None:
    async def double(run: Run[Ask]) -> Gave:
        return Gave(number=2 * run.result("one", Gave).number)

    machine = Machine("toy", Ask).start("one", number, result=Gave).to("two", double, result=Gave).end("end")
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask(number=20))
        outcome = await engine.wait(started.id)
    assert outcome.kind == "done"
    assert outcome.result("two", Gave) == Gave(number=42)


@pytest.mark.capability("program's own writes commit with the step")
async def test_writes_of_a_step_are_in_the_commit_of_its_completion(path: Path) -> None:
    seen: list[tuple[str, int]] = []
    await run_one(path, one_step(effect), key="first")

    def point(name: str) -> None:
        if "only" not in name:
            return
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as other:
            seen.append((name, other.execute("SELECT count(*) FROM effect").fetchone()[0]))
        other.close()

    # The other connection reads while ours holds RESERVED, which rollback journals allow; it sees what is committed.
    await run_one(path, one_step(effect), hooks=Hooks(point=point))
    assert seen == [("toy:only:complete:before", 1), ("toy:only:complete:after", 2)]


async def test_writes_of_a_failed_attempt_are_forgotten(path: Path) -> None:
    async def fails_once(run: Run[Ask]) -> None:
        await effect(run)
        if run.attempt == 1:
            raise OSError("first")

    outcome = await run_one(path, one_step(fails_once))
    assert outcome.ok
    assert effects(path) == [(outcome.run_id, "only")]


@pytest.mark.mistake("changes made in place to a request or result were kept until a restart lost them")
async def test_a_change_in_place_is_lost_at_once(path: Path) -> None:
    class Bag(Model):
        names: list[str]

    seen: list[list[str]] = []

    async def spoil(run: Run[Bag]) -> None:
        run.request.names.append("spoiled")

    async def look(run: Run[Bag]) -> None:
        seen.append(list(run.request.names))

    machine = Machine("toy", Bag).start("spoil", spoil).to("look", look).end("end")
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Bag(names=["a"]))
        assert (await engine.wait(started.id)).ok
    assert seen == [["a"]]


@pytest.mark.parametrize("value", [None, Ask(), 3])
async def test_a_result_of_another_type_is_a_bug(path: Path, value: Any) -> None:
    async def wrong(run: Run[Ask]) -> Any:
        return value

    machine = Machine("toy", Ask).start("one", wrong, result=Gave).end("end")
    outcome = await run_one(path, machine)
    assert (outcome.kind, outcome.error_kind, outcome.step) == ("aborted", "bug", "one")


async def test_a_result_that_nobody_declared_is_a_bug(path: Path) -> None:
    async def wrong(run: Run[Ask]) -> Any:
        return Gave(number=1)

    outcome = await run_one(path, one_step(wrong))
    assert (outcome.kind, outcome.error_kind) == ("aborted", "bug")


@pytest.mark.mistake("a request that cannot be read back was stored and stopped every later resume")
async def test_a_request_that_does_not_survive_json_is_refused_at_the_start(path: Path) -> None:
    class Odd(Model):
        value: float

    async def never(run: Run[Odd]) -> None:
        raise AssertionError

    machine = Machine("toy", Odd).start("one", never).end("end")
    async with engine_of(path, machine) as engine:
        with pytest.raises(ValueError, match=r"float|JSON"):
            await engine.start(machine, "k", Odd(value=float("nan")))
        assert engine.runs() == []


# ---------------------------------------------------------------- the four words


@pytest.mark.capability("Done: success now, the rest is not run")
@pytest.mark.mistake("the only early way out was reported as a failure")
async def test_done_ends_the_run_with_success_and_its_writes(path: Path) -> None:
    async def done(run: Run[Ask]) -> None:
        await effect(run)
        raise Done(Gave(number=7))

    toy = Toy()
    outcome = await run_one(path, three_steps(nothing, done, nothing), app=toy)
    assert (outcome.kind, outcome.step) == ("done", "two")
    assert outcome.done_with(Gave) == Gave(number=7)
    assert toy.calls == ["k.one", "k.two"]
    assert effects(path) == [(outcome.run_id, "two")]


@pytest.mark.capability("Abort: failure now, with kind, reason and detail kept")
@pytest.mark.mistake("a failed run's history looked successful: the end carried no error")
async def test_abort_keeps_its_error_and_runs_no_further_step(path: Path) -> None:
    toy = Toy()
    machine = three_steps(nothing, raising(Abort("no such thing", kind="absent", detail={"name": "x"})), nothing)
    outcome = await run_one(path, machine, app=toy)
    assert (outcome.kind, outcome.error_kind, outcome.reason) == ("aborted", "absent", "no such thing")
    assert (outcome.detail, outcome.step) == ({"name": "x"}, "two")
    assert toy.calls == ["k.one", "k.two"]
    async with engine_of(path, machine) as engine:
        finish = engine.events(outcome.run_id)[-1]
        assert (finish.type, finish.payload["reason"]) == ("finish", "no such thing")
        assert await engine.wait(outcome.run_id) == outcome
    with pytest.raises(RunFailedError, match="was aborted at two: no such thing"):
        outcome.require()


@pytest.mark.capability("Handoff: another run does the work")
async def test_handoff_names_the_run_that_goes_on(path: Path, autojump_clock: Any) -> None:
    other = one_step(gated, name="other")

    async def hand_over(run: Run[Ask]) -> None:
        raise Handoff((await run.engine.start(other, "x", Ask())).id)

    machine = one_step(hand_over)
    toy = Toy()
    async with engine_of(path, machine, other, app=toy) as engine:
        started = await engine.start(machine, "k", Ask())
        outcome = await engine.wait(started.id)
        assert outcome.kind == "handed_off" and outcome.successor is not None
        toy.gate("x").set()
        followed = await engine.wait(started.id, follow=True)
        assert (followed.kind, followed.run_id) == ("done", outcome.successor)


@pytest.mark.mistake("a run was handed to itself")
@pytest.mark.parametrize("target", ["itself", "nobody"])
async def test_handoff_to_itself_or_to_nobody_is_a_bug(path: Path, target: str) -> None:
    async def hand_over(run: Run[Ask]) -> None:
        raise Handoff(run.id if target == "itself" else "0" * 26)

    outcome = await run_one(path, one_step(hand_over))
    assert (outcome.kind, outcome.error_kind, outcome.successor) == ("aborted", "bug", None)


async def test_two_runs_that_hand_over_to_each_other_do_not_hang_who_follows(path: Path) -> None:
    async def to_other(run: Run[Ask]) -> None:
        other = run.engine.lookup.latest("toy", "b" if run.key == "a" else "a")
        assert other is not None
        raise Handoff(other.id)

    machine = one_step(to_other)
    async with engine_of(path, machine) as engine:
        a = await engine.start(machine, "a", Ask())
        b = await engine.start(machine, "b", Ask())
        assert (await engine.wait(a.id, follow=True)).kind == "handed_off"
        assert (await engine.wait(b.id, follow=True)).kind == "handed_off"


# ---------------------------------------------------------------- retries


@pytest.mark.capability("backoff 100 ms x 1.5 +/- 50 %, at most 5 s")
async def test_pauses_between_attempts_grow_to_the_limit(path: Path, autojump_clock: Any) -> None:
    times: list[float] = []

    async def fails(run: Run[Ask]) -> None:
        times.append(trio.current_time())
        if run.attempt < 16:
            raise OSError("again")

    assert (await run_one(path, one_step(fails, retry=Policy(attempts=16)))).ok
    pauses = [b - a for a, b in pairwise(times)]
    for number_, pause_s in enumerate(pauses):
        steady_s = min(5.0, 0.1 * 1.5**number_)
        assert 0.49 * steady_s <= pause_s <= min(5.001, 1.51 * steady_s)
    assert len({round(pause_s, 2) for pause_s in pauses}) > 10  # there is chance in it


@pytest.mark.capability("attempts are limited")
@pytest.mark.mistake("retries had no limit in time or number")
async def test_attempts_end_with_the_last_error(path: Path, autojump_clock: Any) -> None:
    toy = Toy()
    machine = one_step(raising(Retry("store is down", kind="unavailable", detail={"n": 1})), retry=Policy(attempts=4))
    outcome = await run_one(path, machine, app=toy)
    assert (outcome.kind, outcome.error_kind, outcome.detail) == ("aborted", "unavailable", {"n": 1})
    assert outcome.reason == "gave up after attempt 4: store is down"
    assert len(toy.calls) == 4


@pytest.mark.capability("a step has a deadline over all its attempts")
async def test_deadline_ends_the_retries(path: Path, autojump_clock: Any) -> None:
    policy = Policy(attempts=1000, deadline_s=20)
    outcome = await run_one(path, one_step(raising(OSError("down")), retry=policy))
    assert outcome.kind == "aborted" and "deadline of 20 s" in str(outcome.reason)
    assert 10 < trio.current_time() <= 20


async def test_deadline_cuts_an_attempt_that_hangs(path: Path, autojump_clock: Any) -> None:
    outcome = await run_one(path, one_step(gated, retry=Policy(deadline_s=20)))
    assert (outcome.kind, outcome.error_kind) == ("aborted", "timeout")
    assert trio.current_time() == pytest.approx(20)


@pytest.mark.capability("an attempt has a timeout")
async def test_timeout_cuts_an_attempt_and_the_next_is_made(path: Path, autojump_clock: Any) -> None:
    async def hangs_once(run: Run[Ask]) -> None:
        if run.attempt == 1:
            await trio.sleep_forever()

    assert (await run_one(path, one_step(hangs_once, retry=Policy(timeout_s=3)))).ok
    assert 3 < trio.current_time() < 4


@pytest.mark.capability("the step says itself when to try again")
async def test_retry_waits_as_long_as_it_says(path: Path, autojump_clock: Any) -> None:
    machine = one_step(raising(Retry("come back", delay_s=77), None))
    assert (await run_one(path, machine)).ok
    assert trio.current_time() == pytest.approx(77)


@pytest.mark.mistake("a programming error or panic was retried for ever")
@pytest.mark.parametrize(
    "error", [TypeError("t"), KeyError("k"), AssertionError("a"), ValueError("v"), ZeroDivisionError()]
)
async def test_a_programming_error_aborts_at_once(path: Path, error: Exception) -> None:
    toy = Toy()
    machine = one_step(raising(error), retry=Policy(retry_on=lambda _: True))
    outcome = await run_one(path, machine, app=toy)
    assert (outcome.kind, outcome.error_kind) == ("aborted", "bug")
    assert len(toy.calls) == 1
    async with engine_of(path, machine) as engine:
        (trace,) = [e for e in engine.events(outcome.run_id) if e.type == "user.traceback"]
        assert "machine_toys.py" in str(trace.payload["text"])


@pytest.mark.capability("the policy says what is tried again")
@pytest.mark.parametrize(
    ("verdict", "kind", "calls"),
    [(True, "error", 3), (False, "error", 1), (Abort("no", kind="gone"), "gone", 1), (Retry("later"), "error", 3)],
)
async def test_the_policy_judges_errors(path: Path, autojump_clock: Any, verdict: Any, kind: str, calls: int) -> None:
    toy = Toy()
    policy = Policy(attempts=3, retry_on=lambda error: verdict)
    outcome = await run_one(path, one_step(raising(RuntimeError("r")), retry=policy), app=toy)
    assert (outcome.kind, outcome.error_kind, len(toy.calls)) == ("aborted", kind, calls)


async def test_a_policy_that_fails_itself_aborts_as_a_bug(path: Path) -> None:
    def broken(error: Exception) -> bool:
        raise RuntimeError("broken judge")

    outcome = await run_one(path, one_step(raising(OSError("x")), retry=Policy(retry_on=broken)))
    assert (outcome.kind, outcome.error_kind) == ("aborted", "bug")
    assert "broken judge" in str(outcome.reason)


async def test_a_wrong_write_aborts_as_a_bug_and_leaves_nothing(path: Path) -> None:
    async def twice(run: Run[Ask]) -> None:
        await effect(run)
        await effect(run)

    outcome = await run_one(path, one_step(twice))
    assert (outcome.kind, outcome.error_kind) == ("aborted", "bug")
    assert effects(path) == []


async def test_a_wrong_write_of_done_aborts_as_a_bug(path: Path) -> None:
    async def twice(run: Run[Ask]) -> None:
        await effect(run)
        await effect(run)
        raise Done

    outcome = await run_one(path, one_step(twice))
    assert (outcome.kind, outcome.error_kind) == ("aborted", "bug")


# ---------------------------------------------------------------- groups and cancellation inside a step


@pytest.mark.capability("errors inside nurseries count as if there were none")
async def test_an_abort_inside_two_nurseries_is_found(path: Path) -> None:
    async def deep(run: Run[Ask]) -> None:
        async with trio.open_nursery() as outer:

            async def inner() -> None:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(trio.sleep_forever)
                    nursery.start_soon(_raise, Abort("found", kind="deep"))

            outer.start_soon(inner)
            outer.start_soon(trio.sleep_forever)

    outcome = await run_one(path, one_step(deep))
    assert (outcome.kind, outcome.error_kind) == ("aborted", "deep")


async def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("errors", "kind", "error_kind"),
    [
        ((OSError("o"), Abort("a", kind="x")), "aborted", "x"),
        ((Abort("a", kind="x"), TypeError("t")), "aborted", "bug"),
        ((Done(), Abort("a", kind="x")), "aborted", "x"),
        ((Done(), OSError("o")), "aborted", "error"),  # retried, once allowed
        ((Done(), Done()), "done", None),
    ],
)
async def test_of_several_errors_the_worst_decides(
    path: Path, autojump_clock: Any, errors: tuple[Exception, ...], kind: str, error_kind: str | None
) -> None:
    async def group(run: Run[Ask]) -> None:
        raise ExceptionGroup("several", list(errors))

    outcome = await run_one(path, one_step(group, retry=Policy(attempts=2)))
    assert (outcome.kind, outcome.error_kind) == (kind, error_kind)


@pytest.mark.mistake("an error that wrapped a foreign cancellation was recorded as success")
async def test_a_foreign_cancellation_is_no_success(path: Path, autojump_clock: Any) -> None:
    async def cut(run: Run[Ask]) -> Gave:
        with trio.move_on_after(1):
            await trio.sleep_forever()
            return Gave(number=1)
        raise OSError("the client was cancelled")

    machine = Machine("toy", Ask).start("one", cut, result=Gave, retry=Policy(attempts=2)).to("two", nothing).end("end")
    toy = Toy()
    outcome = await run_one(path, machine, app=toy)
    assert outcome.kind == "aborted" and outcome.results == {} and toy.calls == []


# ---------------------------------------------------------------- around steps


@pytest.mark.capability("interceptors wrap each attempt")
async def test_interceptors_wrap_each_attempt_outermost_first(path: Path, autojump_clock: Any) -> None:
    seen: list[str] = []

    def named(name: str) -> Callable[[Run[Any], Call], Any]:
        async def interceptor(run: Run[Any], call_next: Call) -> BaseModel | None:
            seen.append(f"{name} {run.step} {run.attempt}")
            return await call_next(run)

        return interceptor

    machine = (
        Machine("toy", Ask)
        .intercept(named("outer"))
        .intercept(named("inner"))
        .start("one", raising(OSError("x"), None))
        .end("end")
    )
    assert (await run_one(path, machine)).ok
    assert seen == ["outer one 1", "inner one 1", "outer one 2", "inner one 2"]


@pytest.mark.capability("initialisers surround the steps of a life")
async def test_an_initialiser_is_entered_once_and_left_after_the_last_step(path: Path, autojump_clock: Any) -> None:
    seen: list[str] = []

    @asynccontextmanager
    async def session(run: Run[Any]) -> AsyncIterator[str]:
        seen.append("enter")
        yield "the session"
        seen.append("leave")

    async def use(run: Run[Ask]) -> None:
        seen.append(f"{run.step} with {run.resource(str)}")
        if run.step == "one" and run.attempt == 1:
            raise OSError("x")

    machine = Machine("toy", Ask).initialise(session).start("one", use).to("two", use).end("end")
    assert (await run_one(path, machine)).ok
    use_one, use_two = "one with the session", "two with the session"
    assert seen == ["enter", use_one, use_one, use_two, "leave"]


@pytest.mark.mistake("an error of an initialiser crashed the whole process")
async def test_an_initialiser_that_fails_is_tried_again_as_a_part_of_the_step(path: Path, autojump_clock: Any) -> None:
    tries: list[int] = []

    @asynccontextmanager
    async def session(run: Run[Any]) -> AsyncIterator[None]:
        tries.append(run.attempt)
        if len(tries) < 3:
            raise OSError("no session")
        yield

    machine = Machine("toy", Ask).initialise(session).start("one", nothing).end("end")
    assert (await run_one(path, machine)).ok
    assert tries == [1, 2, 3]


async def test_what_fails_in_the_background_of_an_initialiser_counts_against_the_step(
    path: Path, autojump_clock: Any
) -> None:
    lives: list[int] = []

    @asynccontextmanager
    async def supervised(run: Run[Any]) -> AsyncIterator[None]:
        lives.append(run.attempt)
        async with trio.open_nursery() as nursery:
            if len(lives) == 1:
                nursery.start_soon(_fail_later)
            yield
            nursery.cancel_scope.cancel()

    async def slow(run: Run[Ask]) -> None:
        await trio.sleep(10)

    machine = Machine("toy", Ask).initialise(supervised).start("one", slow).end("end")
    assert (await run_one(path, machine)).ok
    assert lives == [1, 2]


async def _fail_later() -> None:
    await trio.sleep(1)
    raise OSError("the connection broke")


@pytest.mark.capability("finalisers see how the run ends, whatever way")
@pytest.mark.parametrize(
    ("body", "kind"), [(nothing, "done"), (raising(Abort("no")), "aborted"), (raising(Done()), "done")]
)
async def test_finalisers_are_called_before_the_outcome_is_written(path: Path, body: Any, kind: str) -> None:
    seen: list[tuple[str, bool]] = []

    async def finaliser(run: Run[Any], outcome: Outcome) -> None:
        record = run.engine.lookup.run(run.id)
        seen.append((outcome.kind, record.active))
        await effect(run)

    machine = Machine("toy", Ask).start("one", body).finalise(finaliser).end("end")
    outcome = await run_one(path, machine)
    assert outcome.kind == kind
    assert seen == [(kind, True)]
    assert len(effects(path)) == 1


async def test_a_finaliser_that_fails_or_hangs_changes_no_outcome(path: Path, autojump_clock: Any) -> None:
    async def fails(run: Run[Any], outcome: Outcome) -> None:
        await effect(run)
        raise RuntimeError("bad finaliser")

    async def hangs(run: Run[Any], outcome: Outcome) -> None:
        await trio.sleep_forever()

    machine = Machine("toy", Ask).start("one", nothing).finalise(fails).finalise(hangs).end("end")
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        assert (await engine.wait(started.id)).ok
        errors = [e.payload["reason"] for e in engine.events(started.id) if e.type == "finaliser_error"]
    assert len(errors) == 2 and "bad finaliser" in str(errors[0]) and "TooSlow" in str(errors[1])
    assert effects(path) == []


async def test_a_wrong_write_of_a_finaliser_changes_no_outcome(path: Path) -> None:
    async def twice(run: Run[Any], outcome: Outcome) -> None:
        await effect(run)
        await effect(run)

    machine = Machine("toy", Ask).start("one", nothing).finalise(twice).end("end")
    assert (await run_one(path, machine)).ok
    assert effects(path) == []


# ---------------------------------------------------------------- the log and the hooks


@pytest.mark.capability("append-only event log: every attempt, duration and reason")
@pytest.mark.mistake("an error was logged only when its text changed, so retries were undercounted")
async def test_the_log_has_every_attempt_with_duration_and_reason(path: Path, autojump_clock: Any) -> None:
    async def slow(run: Run[Ask]) -> None:
        await trio.sleep(2)
        run.log("half", {"way": True})
        if run.attempt < 3:
            raise OSError("same text")

    machine = one_step(slow)
    async with engine_of(path, machine) as engine:
        started = await engine.start(machine, "k", Ask())
        await engine.wait(started.id)
        log = [
            (e.type, e.attempt, e.payload.get("duration_ms"), e.payload.get("reason"))
            for e in engine.events(started.id)
        ]
    half = [("user.half", attempt, None, None) for attempt in (1, 2, 3)]
    assert log == [
        ("start", None, None, None),
        half[0],
        ("retry", 1, 2000, "OSError: same text"),
        half[1],
        ("retry", 2, 2000, "OSError: same text"),
        half[2],
        ("complete", 3, 2000, None),
        ("finish", None, None, None),
    ]


@pytest.mark.capability("hooks for metrics and traces")
@pytest.mark.mistake("an aborted run was counted both as aborted and as ok")
async def test_hooks_hear_of_each_event_once_after_its_commit(path: Path) -> None:
    heard: list[tuple[str, str | None]] = []

    def event(run: RunRecord, found: EventRecord) -> None:
        with sqlite3.connect(path) as other:
            stored = other.execute("SELECT count(*) FROM event WHERE seq = ?", (found.seq,)).fetchone()[0]
        other.close()
        assert stored == 1 and run.trace == "00-trace"
        heard.append((found.type, run.outcome))

    machine = one_step(raising(Abort("no")))
    async with engine_of(path, machine, hooks=Hooks(event=event)) as engine:
        started = await engine.start(machine, "k", Ask(), trace="00-trace")
        await engine.wait(started.id)
    assert heard == [("start", None), ("stop", "aborted"), ("finish", "aborted")]


async def test_a_hook_that_fails_stops_nothing(path: Path) -> None:
    def event(run: RunRecord, found: EventRecord) -> None:
        raise RuntimeError("broken metric")

    assert (await run_one(path, one_step(nothing), hooks=Hooks(event=event))).ok
