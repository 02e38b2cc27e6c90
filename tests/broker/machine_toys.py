"""Toy machines and a toy program, for the tests of the state machine library."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
from pydantic import BaseModel, ConfigDict

from broker.machine import Engine, Hooks, Machine, Outcome, Policy, Run, open_engine

EPOCH_S = 1_700_000_000.0
TABLES = (
    """
CREATE TABLE effect (run TEXT NOT NULL, step TEXT NOT NULL, PRIMARY KEY (run, step)) STRICT;
""",
)


class Model(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Ask(Model):
    number: int = 0


class Gave(Model):
    number: int


@dataclass
class Wall:
    """A wall clock that goes with trio's and can be set."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        return EPOCH_S + trio.current_time() + self.offset_s


@dataclass
class Toy:
    """What the steps of a test write down outside of the database: what was called, in order."""

    calls: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)
    gates: dict[str, trio.Event] = field(default_factory=dict)
    at_once: int = 0
    most_at_once: int = 0

    def gate(self, name: str) -> trio.Event:
        return self.gates.setdefault(name, trio.Event())


Body = Callable[[Run[Ask]], Awaitable[Any]]


async def nothing(run: Run[Ask]) -> None:
    """Do nothing but note the call."""
    note(run)


async def number(run: Run[Ask]) -> Gave:
    """Give the request's number plus one."""
    note(run)
    return Gave(number=run.request.number + 1)


async def effect(run: Run[Ask]) -> None:
    """Write one row in the transaction of the step; a second one would be an error."""
    note(run)
    name = run.step
    run.on_commit(lambda db: db.execute("INSERT INTO effect VALUES (?, ?)", (run.id, name)))


async def gated(run: Run[Ask]) -> None:
    """Wait at the gate named as the key."""
    note(run)
    await run.app.gate(run.key).wait()


def note(run: Run[Any]) -> None:
    if isinstance(run.app, Toy):
        run.app.calls.append(f"{run.key}.{run.step}")


def raising(*errors: BaseException | None) -> Body:
    """Make a step that raises these errors in turn, the last one for ever; None is success."""
    left = list(errors)

    async def body(run: Run[Ask]) -> None:
        note(run)
        error = left.pop(0) if len(left) > 1 else left[0]
        if error is not None:
            raise error

    return body


def one_step(body: Body, *, name: str = "toy", retry: Policy | None = None, queue: str | None = None) -> Machine[Ask]:
    return Machine(name, Ask).start("only", body, retry=retry, queue=queue).end("end")


def three_steps(a: Body = nothing, b: Body = nothing, c: Body = nothing, *, name: str = "toy") -> Machine[Ask]:
    return Machine(name, Ask).start("one", a).to("two", b).to("three", c).end("end")


@asynccontextmanager
async def engine_of(path: Any, *machines: Machine[Any], **options: Any) -> AsyncIterator[Engine]:
    """Open an engine with a clock that follows trio's, a fixed chance, and the toy program's tables."""
    options.setdefault("clock", Wall())
    options.setdefault("rng", random.Random(1))
    options.setdefault("migrations", TABLES)
    options.setdefault("app", Toy())
    async with open_engine(str(path), machines=machines, **options) as engine:
        yield engine


async def run_one(path: Any, machine: Machine[Any], key: str = "k", **options: Any) -> Outcome:
    """Open an engine, do one run, close."""
    async with engine_of(path, machine, **options) as engine:
        started = await engine.start(machine, key, Ask())
        return await engine.wait(started.id)


class Killed(BaseException):
    """The process dies here; nothing it has not committed by now is ever written."""


class Killer:
    """Crash points that kill: at the first that `match`es, and from then on nothing is committed any more."""

    def __init__(self, match: Callable[[str], bool] = lambda _: False) -> None:
        self.match = match
        self.dead = False
        self.passed: list[str] = []

    def __call__(self, name: str) -> None:
        self.passed.append(name)
        if self.dead and name.endswith(":before"):
            raise Killed(name)
        if not self.dead and self.match(name):
            self.dead = True
            raise Killed(name)


async def killed_at(
    path: Any, point: str, machines: Sequence[Machine[Any]], work: Callable[[Engine], Awaitable[object]], **options: Any
) -> Killer:
    """Do `work` in an engine that dies at a point; assert that it did."""
    killer = Killer(lambda name: name == point)
    try:
        async with engine_of(path, *machines, hooks=Hooks(point=killer), **options) as engine:
            await work(engine)
    except BaseException as error:  # it comes alone or in groups
        if not killer.dead:
            raise
        del error
    assert killer.dead, f"{point} was not passed, only {killer.passed}"
    return killer


async def killed_in_step(path: Any, machines: Sequence[Machine[Any]], *keys: str, **options: Any) -> None:
    """Start runs of the first machine, let them reach where they wait, then die."""
    killer = Killer()
    try:
        async with engine_of(path, *machines, hooks=Hooks(point=killer), **options) as engine:
            for key in keys:
                await engine.start(machines[0], key, Ask())
            await trio.testing.wait_all_tasks_blocked()
            killer.dead = True
            raise Killed
    except BaseException as error:
        if not killer.dead:
            raise
        del error
