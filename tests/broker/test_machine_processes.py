"""Several engines on one state file: two in one process, which exclude each other like two processes, and real ones."""

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker.machine import Abort, Engine, Hooks, Machine, Outcome, Run, open_engine, problems
from tests.broker.machine_crash import in_child
from tests.broker.machine_toys import TABLES, Ask, Toy, effect, engine_of, gated, nothing, one_step, three_steps

blocked = trio.testing.wait_all_tasks_blocked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.mark.capability("a second process joins a run, waits for it and gets its outcome")
@pytest.mark.mistake("the step of a run at work could not be seen from outside")
async def test_another_engine_joins_and_waits(path: Path, autojump_clock: Any) -> None:
    machine = three_steps(nothing, gated, nothing)
    first, second = Toy(), Toy()
    async with engine_of(path, machine, app=first) as one, engine_of(path, machine, app=second) as two:
        started = await one.start(machine, "k", Ask())
        await blocked()
        joined = await two.start(machine, "k", Ask())
        assert joined.id == started.id and not joined.new
        assert two.lookup.run(joined.id).step == "two"  # its progress is to be seen
        outcomes: list[Outcome] = []

        async def waits() -> None:
            outcomes.append(await two.wait(joined.id))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waits)
            await trio.sleep(5)
            first.gate("k").set()
        assert outcomes[0].ok
    assert second.calls == []


@pytest.mark.capability("whether another process works at a run can be asked")
async def test_a_run_is_told_from_another_engines(path: Path, autojump_clock: Any) -> None:
    machine, toy = one_step(gated), Toy()
    heard: list[tuple[str, bool]] = []

    def point(name: str) -> None:  # also between a commit and all that the engine does about it
        heard.extend((name, two.owned_elsewhere(run)) for run in two.runs())

    async with engine_of(path, machine, grace_s=0) as one, AsyncExitStack() as stack:
        options: dict[str, Any] = {"queues": {"q": 1}, "app": toy, "hooks": Hooks(point=point), "resume": "none"}
        two = await stack.enter_async_context(engine_of(path, machine, **options))
        first = await two.start(machine, "first", Ask(), queue="q")
        queued = await two.start(machine, "queued", Ask(), queue="q")
        before = two.lookup.run(queued.id)
        toy.gate("first").set()
        toy.gate("queued").set()
        assert (await two.wait(first.id)).ok and (await two.wait(queued.id)).ok
        assert before.active and not two.owned_elsewhere(before)  # it ended between the look and the question
        assert len(heard) > 6 and not any(elsewhere for _, elsewhere in heard)
        heard.clear()
        theirs = two.lookup.run((await one.start(machine, "theirs", Ask())).id)
        assert two.owned_elsewhere(theirs) and not one.owned_elsewhere(theirs)
        await one.shutdown(grace_s=0)
        assert not two.owned_elsewhere(theirs)  # nobody's now


@pytest.mark.capability("who waits takes a run over when its owner stops or dies")
async def test_a_waiting_engine_takes_over_when_the_owner_stops(path: Path, autojump_clock: Any) -> None:
    machine = three_steps(effect, gated, effect)
    second = Toy()
    second.gate("k").set()
    async with engine_of(path, machine, app=second) as two:
        async with engine_of(path, machine, grace_s=0) as one:
            started = await one.start(machine, "k", Ask())
            await blocked()
            assert await two.resume() == []  # it is owned
            async with trio.open_nursery() as nursery:
                nursery.start_soon(two.wait, started.id)
                await trio.sleep(1)
                assert second.calls == []
                await one.shutdown(grace_s=0)
        assert (await two.wait(started.id)).ok
        assert problems(two.lookup) == []
        assert two.db.execute("SELECT step FROM effect ORDER BY rowid").fetchall() == [("one",), ("three",)]
    assert second.calls == ["k.two", "k.three"]


@pytest.mark.capability("a run can be cancelled from another process")
@pytest.mark.mistake("only a run at work in this process could be cancelled")
async def test_another_engine_cancels(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated)
    async with engine_of(path, machine) as one, engine_of(path, machine, resume="none") as two:
        started = await one.start(machine, "k", Ask())
        await blocked()
        assert await two.cancel(started.id, cause="from elsewhere")
        for engine in (one, two):
            outcome = await engine.wait(started.id)
            assert (outcome.kind, outcome.reason) == ("cancelled", "from elsewhere")


async def test_a_run_without_an_owner_is_cancelled_with_its_finalisers(path: Path, autojump_clock: Any) -> None:
    seen: list[str] = []

    async def finaliser(run: Run[Any], outcome: Outcome) -> None:
        seen.append(outcome.kind)

    machine = Machine("toy", Ask).start("only", gated).finalise(finaliser).end("end")
    async with engine_of(path, machine, grace_s=0) as one:
        started = await one.start(machine, "k", Ask())
    async with engine_of(path, machine, resume="none") as two:
        assert await two.cancel(started.id, cause="left behind")
        assert (await two.wait(started.id)).kind == "cancelled"
    assert seen == ["cancelled"]


async def test_an_engine_that_resumes_nothing_only_watches(path: Path, autojump_clock: Any) -> None:
    machine = one_step(gated)
    async with engine_of(path, machine, grace_s=0) as one:
        started = await one.start(machine, "k", Ask())
    second = Toy()
    async with engine_of(path, machine, resume="none", app=second, grace_s=0) as two:
        with trio.move_on_after(60) as scope:
            await two.wait(started.id)
        assert scope.cancelled_caught
    assert second.calls == []


async def test_an_abort_in_one_process_does_not_take_a_child_that_another_wants(
    path: Path, autojump_clock: Any
) -> None:
    child = one_step(gated, name="child")

    async def body(run: Run[Ask]) -> None:
        shared = await run.start_child(child, "shared", Ask())
        await run.app.gate(f"{run.key} goes on").wait()
        if run.key == "bad":
            raise Abort("no")
        (await run.wait(shared)).require()

    parent = one_step(body, name="parent")
    one_toy, two_toy = Toy(), Toy()
    async with (
        engine_of(path, parent, child, app=one_toy) as one,
        engine_of(path, parent, child, app=two_toy) as two,
    ):
        bad = await one.start(parent, "bad", Ask())
        await blocked()
        good = await two.start(parent, "good", Ask())
        await blocked()
        one_toy.gate("bad goes on").set()
        assert (await one.wait(bad.id)).kind == "aborted"
        one_toy.gate("shared").set()
        two_toy.gate("good goes on").set()
        assert (await two.wait(good.id)).ok
    assert one_toy.calls == ["shared.only"] and two_toy.calls == []


@pytest.mark.capability("a step can wait for what another run commits, of this process or another")
@pytest.mark.parametrize("here", [True, False])
async def test_a_step_wakes_when_another_run_commits(path: Path, here: bool, autojump_clock: Any) -> None:
    async def waits(run: Run[Ask]) -> None:
        moved = run.moved
        while run.engine.db.execute("SELECT count(*) FROM effect").fetchone() == (0,):
            await moved.wait()
            moved = run.moved

    waiting = one_step(waits, name="waiting")
    writing = three_steps(gated, effect, nothing, name="writing")
    toy = Toy()
    async with (
        engine_of(path, waiting, writing, app=toy) as one,
        engine_of(path, waiting, writing, app=toy, poll_s=1) as two,
    ):
        waiter = await two.start(waiting, "w", Ask())
        writer = await (two if here else one).start(writing, "k", Ask())
        await blocked()
        toy.gate("k").set()
        began = trio.current_time()
        with trio.fail_after(60):
            assert (await two.wait(waiter.id)).ok
        assert trio.current_time() - began <= (0 if here else 1)
        assert (await two.wait(writer.id)).ok


@pytest.mark.mistake("a second process failed after a fixed wait for the file")
async def test_a_lock_of_another_process_is_waited_for_without_blocking_the_loop(
    path: Path, autojump_clock: Any
) -> None:
    machine = one_step(effect)
    async with engine_of(path, machine) as engine:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")

        async def lets_go() -> None:
            for _ in range(100):  # turns of a loop that goes on; one that is blocked never comes to the end
                await trio.sleep(0.001)
            other.execute("ROLLBACK")
            other.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lets_go)
            started = await engine.start(machine, "k", Ask())
            assert (await engine.wait(started.id)).ok


async def test_a_reader_elsewhere_only_delays_a_commit(path: Path, autojump_clock: Any) -> None:
    machine = one_step(effect)
    async with engine_of(path, machine) as engine:
        await engine.wait((await engine.start(machine, "first", Ask())).id)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            cursor = other.execute("SELECT * FROM event")
            cursor.fetchone()  # not read to its end: keeps a shared lock
            async with trio.open_nursery() as nursery:

                async def lets_go() -> None:
                    await trio.sleep(0.2)
                    cursor.close()

                nursery.start_soon(lets_go)
                assert (await engine.wait((await engine.start(machine, "k", Ask())).id)).ok


# ---------------------------------------------------------------- real processes


def count(path: Path, query: str) -> int:
    with closing(sqlite3.connect(path, timeout=10)) as db:
        return int(db.execute(query).fetchone()[0])


async def slowly(run: Run[Ask]) -> None:
    await trio.sleep(0.002)
    await effect(run)


LAYER = three_steps(slowly, slowly, slowly, name="layer")


async def image_body(run: Run[Ask]) -> None:
    for layer in range(4):
        (await run.wait(await run.start_child(LAYER, f"layer{layer}", Ask()))).require()
    await effect(run)


IMAGE = one_step(image_body, name="image")


async def pull(path: str, key: str) -> None:
    async with open_engine(path, machines=[LAYER, IMAGE], migrations=TABLES, poll_s=0.005, resume="related") as engine:
        (await engine.wait((await engine.start(IMAGE, key, Ask())).id)).require()


@pytest.mark.capability("several processes at once: one active run of a key, work is shared")
def test_processes_that_start_at_once_share_the_work(scratch: Path) -> None:
    path = scratch / "state.db"
    children = [os.fork() or _child(partial(trio.run, pull, str(path), key)) for key in "aabbc"]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
    # Those that came when all was done did it again, as asked; at the same time nobody did.
    assert count(path, "SELECT count(*) FROM run WHERE outcome IS NOT 'done'") == 0
    effects = "(SELECT count(*) FROM effect e WHERE e.run = r.id)"
    assert count(path, f"SELECT count(*) FROM run r WHERE r.machine = 'layer' AND {effects} <> 3") == 0
    overlapping = (
        "SELECT count(*) FROM run a JOIN run b ON a.machine = b.machine AND a.key = b.key AND a.seq < b.seq"
        " WHERE (SELECT seq FROM event WHERE run = a.seq AND type = 'finish')"
        " > (SELECT seq FROM event WHERE run = b.seq AND type = 'start')"
    )
    assert count(path, overlapping) == 0


def _child(work: Callable[[], object]) -> int:
    code = 99
    try:
        work()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.parametrize("kill_after_ms", [1, 5, 10, 20, 40, 80])
def test_a_process_takes_over_from_one_that_is_killed(scratch: Path, kill_after_ms: int) -> None:
    path = scratch / "state.db"
    trio.run(pull, str(path), "warm")
    layers = count(path, "SELECT count(*) FROM run WHERE machine = 'layer'")
    victim = os.fork() or _child(partial(trio.run, pull, str(path), "a"))
    survivor = os.fork() or _child(partial(trio.run, pull, str(path), "a"))
    time.sleep(kill_after_ms / 1000)  # the moment of a kill from outside is chance; what follows is not
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    assert os.waitpid(survivor, 0)[1] == 0
    assert count(path, "SELECT count(*) FROM run WHERE outcome IS NOT 'done'") == 0
    assert count(path, "SELECT count(*) FROM run WHERE machine = 'layer'") >= layers + 4
    assert count(path, "SELECT count(*) FROM run WHERE crashes > 1") == 0
    assert count(path, "SELECT count(*) FROM effect") == 3 * count(
        path, "SELECT count(*) FROM run WHERE machine = 'layer'"
    ) + count(path, "SELECT count(*) FROM run WHERE machine = 'image'")


def test_an_exec_does_not_keep_the_locks(scratch: Path) -> None:
    path = scratch / "state.db"

    async def life() -> None:
        async with open_engine(str(path), machines=[one_step(gated)], app=Toy()) as engine:
            await engine.start(engine.machines["toy"], "k", Ask())
            process = await trio.lowlevel.open_process(["/bin/sleep", "300"])
            (scratch / "pid").write_text(str(process.pid))
            os.kill(os.getpid(), signal.SIGKILL)

    in_child(lambda: trio.run(life))
    sleeper = int((scratch / "pid").read_text())
    try:
        toy = Toy()
        toy.gate("k").set()

        async def next_life(engine: Engine) -> None:
            (run,) = engine.runs()
            assert (await engine.wait(run.id)).ok

        async def main() -> None:
            async with open_engine(str(path), machines=[one_step(gated)], app=toy) as engine:
                with trio.fail_after(60):
                    await next_life(engine)

        trio.run(main)
    finally:
        os.kill(sleeper, signal.SIGKILL)
