"""The engine of one process: it starts runs, resumes those of dead processes, waits, cancels and stops.

Rule 1: a run is worked at only while its lock is held; its row is read again after the lock is taken.
Rule 2: what is to happen is in the state file before anybody is told: a start, a cancellation, an outcome.
Rule 3: one bad row is quarantined and stops no other.
Rule 4: a stop is not an outcome.
"""

import logging
import random
import secrets
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import trio
from pydantic import BaseModel

from broker.machine import ledger
from broker.machine.database import APPLICATION_ID, Database, create
from broker.machine.definition import Machine
from broker.machine.hooks import Hooks, no_event
from broker.machine.ledger import Entry, NewRun
from broker.machine.ownership import Ownership
from broker.machine.queues import Queue
from broker.machine.records import EventRecord, Lookup, Outcome, RunRecord
from broker.machine.runner import Active, encode
from broker.machine.signals import (
    DamagedStateError,
    DefinitionError,
    StateError,
    StoppedError,
    UsageError,
)

T = TypeVar("T")

log: Final = logging.getLogger("machine")

Resume = Literal["all", "related", "none"]
_ULID_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # https://github.com/ulid/spec, "Encoding"
_LONGEST_SLEEP_S: Final = 60.0  # then the clock is read again, so that a clock that is set is noticed


@dataclass(frozen=True, slots=True)
class After:
    """Start only when this run has ended: with success, or however it ended."""

    run_id: str
    policy: Literal["success", "any"] = "success"


@dataclass(frozen=True, slots=True)
class Started:
    """What `start` gives. `new` is False when the run was there; its request may then differ from the one given."""

    id: str
    new: bool
    same_request: bool


class Engine:
    """Runs of the given machines in one process. Made by `open_engine`."""

    def __init__(
        self,
        database: Database,
        ownership: Ownership,
        nursery: trio.Nursery,
        machines: Sequence[Machine[Any]],
        queues: Mapping[str, int],
        app: Any,
        hooks: Hooks,
        clock: Callable[[], float],
        rng: random.Random,
        resume: Resume,
        poll_s: float,
    ) -> None:
        self.database, self.app, self.hooks, self.rng = database, app, hooks, rng
        self.lookup = Lookup(database.reader, database.path)
        self.machines = _by_name(machines, queues)
        self.queues = {name: Queue(limit) for name, limit in queues.items()}
        self.draining = False
        self._ownership, self._nursery, self._clock = ownership, nursery, clock
        self._mode: Resume = resume
        self._poll_s = poll_s
        self._active: dict[int, Active] = {}
        self._mine: set[int] = set()  # runs this process was asked for, and what they need
        self._stopped: set[int] = set()  # runs that stopped here and are left for a later start
        self._idle = trio.Event()

    @property
    def db(self) -> sqlite3.Connection:
        """Give the connection for reading; fetch all rows at once, an open statement keeps writers out."""
        return self.database.reader

    def now_ms(self) -> int:
        """Give the time by the wall clock, for people and for persisted dates."""
        return int(self._clock() * 1000)

    # -- starting

    async def start(
        self,
        machine: Machine[Any],
        key: str,
        request: BaseModel,
        *,
        queue: str | None = None,
        parent: str | None = None,
        after: Sequence[After | str] | None = None,
        not_before: float | None = None,
        trace: str | None = None,
    ) -> Started:
        """Start a run, or give the active run of this machine and key, whoever started it.

        It is durable when this returns. `after` names runs that must have ended first (a plain id: with success);
        `not_before` is in seconds since the epoch.

        Raises: UsageError, UnknownRunError (parent or `after`), StoppedError, StateError, ValueError for a request that
            does not survive being stored.
        """
        if self.machines.get(machine.name) is not machine:
            raise UsageError(f"machine {machine.name} is not one of this engine's")
        if type(request) is not machine.request:
            raise UsageError(f"{machine.name} takes {machine.request.__name__}, got {type(request).__name__}")
        if queue is not None and queue not in self.queues:
            raise UsageError(f"there is no queue {queue!r}, only {sorted(self.queues)}")
        if queue is not None and any(step.queue == queue for step in machine.steps):
            raise UsageError(f"a step of {machine.name} uses the queue {queue!r}: it would wait for its own run")
        plan = _Plan(machine, key, encode(request), queue, parent, tuple(after or ()), not_before, trace)
        while True:
            if self.draining:
                raise StoppedError("the engine is stopping and starts nothing")
            run, new = await self._start_once(plan)
            if run.cancel_cause is None or not run.active:
                break
            await self.await_run(run.id, mine=True)  # one that is being cancelled is waited out and started anew
        self._mine.add(run.seq)
        if not new and run.active:
            await self._adopt(run.seq)
        return Started(run.id, new, run.request == plan.request)

    async def _start_once(self, plan: "_Plan") -> tuple[RunRecord, bool]:
        taken: list[int] = []

        def write(entry: Entry) -> tuple[RunRecord, bool]:
            return self._insert(entry, plan, taken)

        try:
            run, new = await self.commit(f"{plan.machine.name}:start", write)
        except BaseException:
            for seq in taken:
                self._ownership.give(seq)
            raise
        if new:
            self._spawn(plan.machine, run)
        return run, new

    def _insert(self, entry: Entry, plan: "_Plan", taken: list[int]) -> tuple[RunRecord, bool]:
        lookup = Lookup(entry.db, self.database.path)
        machine = plan.machine
        parent = None if plan.parent is None else lookup.run(plan.parent)
        after = [(lookup.run(a.run_id).seq, a.policy) for a in map(_after, plan.after)]
        found = lookup.active(machine.name, plan.key)
        if found is None and parent is not None:
            found = ledger.done_child(entry, parent.seq, machine.name, plan.key, plan.request)
        if found is not None:
            return _join(entry, found, parent), False
        new = NewRun(
            id=new_ulid(entry.now_ms),
            machine=machine.name,
            version=machine.version,
            definition=machine.digest,
            steps=(*machine.step_names, machine.end_name or ""),
            key=plan.key,
            request=plan.request,
            queue=plan.queue,
            trace=plan.trace,
            wanted=parent is None,
            not_before_ms=None if plan.not_before is None else int(plan.not_before * 1000),
            after=after,
        )
        seq = ledger.insert(entry, new)
        if parent is not None:
            ledger.link(entry, parent.seq, seq)
        # Before the commit, so that no other process can find the run without an owner.
        if not self._ownership.take(seq):
            raise StateError(f"the lock of run {seq}, which is new, is held: was the state file put back?")
        taken.append(seq)
        run = entry.get(seq)
        assert run is not None
        return run, True

    def _spawn(self, machine: Machine[Any], run: RunRecord) -> Active:
        active = Active(self, machine, run)
        self._active[run.seq] = active
        self._mine.add(run.seq)
        self._nursery.start_soon(active.work, name=f"{run.machine} {run.key}")
        return active

    def forget(self, active: Active) -> None:
        """Take leave of a run that ended or stopped."""
        seq = active.row.seq
        if active.row.outcome is None:
            self._stopped.add(seq)
        del self._active[seq]
        self._mine.discard(seq)
        self._ownership.give(seq)
        if not self._active:
            self._idle.set()

    # -- resuming

    async def resume(self, run_id: str | None = None) -> list[str]:
        """Take over every active run that no living process owns, oldest first, or only this one; give their ids."""
        if run_id is None:
            seqs = await self.database.read(lambda _: self.lookup.active_seqs())
        else:
            seqs = [(await self.database.read(lambda _: self.lookup.run(run_id))).seq]
            self._stopped.difference_update(seqs)
        taken = [active.row.id for seq in seqs if (active := await self._adopt(seq)) is not None]
        return taken

    async def _adopt(self, seq: int) -> Active | None:
        """Become the owner of a run if nobody is; None if somebody is, or it has ended or is quarantined."""
        if self.draining or seq in self._stopped or not self._ownership.take(seq):
            return self._active.get(seq)
        active = None
        try:
            machine = await self._recognise(seq)
            if machine is not None:
                run = await self.commit(f"{machine.name}:resume", lambda entry: _resumed(entry, seq, machine))
                active = self._spawn(machine, run)
        finally:
            if active is None:
                self._ownership.give(seq)
        await self._adopt_children(seq)
        return active

    async def _adopt_children(self, seq: int) -> None:
        children = await self.database.read(lambda _: self.lookup.active_children(seq))
        for child in children:
            self._mine.add(child)
            await self._adopt(child)

    async def _recognise(self, seq: int) -> Machine[Any] | None:
        """Give the machine of an active run, checked; None if the run has ended or has just been quarantined."""
        try:
            run = await self.database.read(lambda _: self.lookup.row(seq))
            if not run.active:
                return None
            return self._check_definition(run)
        except (UsageError, ValueError, DamagedStateError) as error:
            await self._quarantine(seq, str(error))
        return None

    def _check_definition(self, run: RunRecord) -> Machine[Any]:
        machine = self.machines.get(run.machine)
        if machine is None:
            raise UsageError(f"this program has no machine {run.machine!r}, only {sorted(self.machines)}")
        if (run.version, run.definition) != (machine.version, machine.digest):
            raise UsageError(
                f"{run.machine} is defined otherwise than when this run was started:"
                f" version {run.version} with {', '.join(run.steps)};"
                f" now version {machine.version} with {', '.join(machine.step_names)}, {machine.end_name}"
            )
        if run.queue is not None and run.queue not in self.queues:
            raise UsageError(f"there is no queue {run.queue!r}, only {sorted(self.queues)}")
        machine.request.model_validate_json(run.request)
        for step in machine.steps[: run.cursor]:
            if step.result is not None:
                step.result.model_validate_json(self.lookup.results(run)[step.name])
        return machine

    async def _quarantine(self, seq: int, reason: str) -> None:
        log.error("run %d is quarantined: %s", seq, reason)
        try:
            await self.commit("quarantine", lambda entry: ledger.quarantine(entry, seq, reason))
        except sqlite3.IntegrityError as error:
            log.error("run %d is damaged so that it cannot even be quarantined: %s", seq, error)

    # -- waiting

    async def wait(self, run_id: str, *, follow: bool = False) -> Outcome:
        """Wait until a run has ended, here or in another process, and give its outcome; at once if it has.

        If its owner dies it is taken over, unless this engine was opened with ``resume="none"`` and does not need it.
        `follow` waits for the successor of a run that was handed over.

        Raises: UnknownRunError; StoppedError when this engine stops first; StateError when the run stopped on the state
            file.
        """
        outcome = await self.await_run(run_id, mine=self._mode != "none")
        while follow and outcome.successor is not None:
            outcome = await self.await_run(outcome.successor, mine=self._mode != "none")
        return outcome

    async def await_run(self, run_id: str, *, mine: bool, waiter: Active | None = None) -> Outcome:
        """Wait for a run; `waiter` is a run at work that waits and must stop with the engine."""
        while True:
            outcome = await self.database.read(lambda _: self.lookup.ended(run_id))
            if outcome is not None:
                await trio.lowlevel.checkpoint()
                return outcome
            seq = (await self.database.read(lambda _: self.lookup.run(run_id))).seq
            active = self._active.get(seq)
            if active is None and (mine or seq in self._mine):
                active = await self._adopt(seq)
            if active is not None:
                await active.finished.wait()
                if active.failure is not None:
                    raise StateError(f"run {run_id} stopped: {active.failure}") from active.failure
                if active.row.outcome is not None:
                    continue
            if self.draining or seq in self._stopped:
                if waiter is None:
                    raise StoppedError(f"run {run_id} is left for a later start")
                waiter.scope.cancel()
            await trio.sleep(self._poll_s)

    async def sleep_until(self, when_ms: int) -> None:
        """Sleep until the wall clock shows this time."""
        while (left_ms := when_ms - self.now_ms()) > 0:  # noqa: ASYNC110  the wall clock has no event
            await trio.sleep(min(left_ms / 1000, _LONGEST_SLEEP_S))

    # -- ending

    async def cancel(self, run_id: str, *, cause: str) -> bool:
        """Ask for the end of a run and of the children that only it wants; False if it has ended already.

        The wish and its cause are durable when this returns; `wait` gives the outcome. A run whose last step completes
        first is done all the same.

        Raises: UnknownRunError, StateError.
        """
        run = await self.database.read(lambda _: self.lookup.run(run_id))

        def write(entry: Entry) -> list[int]:
            now = entry.get(run.seq)
            assert now is not None
            return ledger.request_cancel(entry, now, cause)

        if not run.active:
            return False
        asked = await self.commit(f"{run.machine}:cancel", write)
        for seq in asked:
            self._tell_cancelled(seq)
            await self._adopt(seq)  # without an owner nobody else would end it
        return bool(asked) or run.cancel_cause is not None

    def _tell_cancelled(self, seq: int) -> None:
        active = self._active.get(seq)
        if active is not None:
            active.scope.cancel()

    async def watch(self) -> None:
        """Notice, for as long as the engine runs, what other processes cancel."""
        version = -1
        while True:
            await trio.sleep(self._poll_s)
            if not self._active:
                continue
            now = await self.database.read(lambda db: int(db.execute("PRAGMA data_version").fetchone()[0]))
            if now == version:
                continue
            version = now
            for seq in await self.database.read(lambda _: self.lookup.cancelled_seqs()):
                self._tell_cancelled(seq)

    async def shutdown(self, *, grace_s: float = 10.0) -> None:
        """Stop: finish the steps that are at work within `grace_s`, then cut them; leave the runs to be resumed."""
        self.draining = True
        for active in list(self._active.values()):
            if active.idle:
                active.scope.cancel()
        with trio.move_on_after(grace_s):
            await self._all_left()
        for active in list(self._active.values()):
            active.scope.cancel()
        with trio.CancelScope(shield=True):
            await self._all_left()

    async def _all_left(self) -> None:
        while self._active:
            self._idle = trio.Event()
            await self._idle.wait()

    # -- the state file

    def transaction(self, name: str = "program") -> AbstractAsyncContextManager[sqlite3.Connection]:
        """Give a transaction for the program's own writes outside of runs; the block must not await."""
        return self.database.transaction(name)

    async def commit(self, name: str, work: Callable[[Entry], T]) -> T:
        """Run `work` in one transaction named for its crash points, then tell the hooks what was appended."""
        entries: list[Entry] = []

        def write(db: sqlite3.Connection) -> T:
            entries.append(Entry(db, self.now_ms()))
            return work(entries[-1])

        value = await self.database.transact(name, write)
        if self.hooks.event is not no_event:
            for run, event in entries[-1].events:
                self._tell_hook(run, event)
        return value

    def _tell_hook(self, run: int, event: int) -> None:
        try:
            record = self.lookup.row(run)
            for found in self.lookup.events(record, after=event - 1):
                if found.seq == event:
                    self.hooks.event(record, found)
        except Exception:
            log.exception("a hook failed")

    def runs(self, machine: str | None = None, key: str | None = None, **options: Any) -> list[RunRecord]:
        """Give runs, newest first. See `Lookup.runs`."""
        return self.lookup.runs(machine, key, **options)

    def events(self, run_id: str) -> list[EventRecord]:
        """Give a run's log, oldest first. Raises: UnknownRunError."""
        return self.lookup.events(self.lookup.run(run_id))

    async def prune(self, *, older_than_s: float, limit: int = 1000) -> int:
        """Forget finished runs that were last touched this long ago, at most `limit`; give how many."""
        before_ms = self.now_ms() - int(older_than_s * 1000)
        return await self.commit("prune", lambda entry: ledger.prune(entry, before_ms, limit))


@dataclass(frozen=True, slots=True)
class _Plan:
    machine: Machine[Any]
    key: str
    request: str
    queue: str | None
    parent: str | None
    after: tuple[After | str, ...]
    not_before: float | None
    trace: str | None


def _after(after: After | str) -> After:
    return After(after) if isinstance(after, str) else after


def _join(entry: Entry, run: RunRecord, parent: RunRecord | None) -> RunRecord:
    if parent is None:
        ledger.want(entry, run)
    elif ledger.is_ancestor(entry, run.seq, parent.seq):
        raise UsageError(f"run {parent.id} cannot start {run.machine} {run.key}: it is itself a part of it")
    else:
        ledger.link(entry, parent.seq, run.seq)
    now = entry.get(run.seq)
    assert now is not None
    return now


def _resumed(entry: Entry, seq: int, machine: Machine[Any]) -> RunRecord:
    run = entry.get(seq)
    assert run is not None
    return run if not run.active else ledger.resume(entry, run)


def _by_name(machines: Sequence[Machine[Any]], queues: Mapping[str, int]) -> dict[str, Machine[Any]]:
    named: dict[str, Machine[Any]] = {}
    for machine in machines:
        if machine.end_name is None:
            raise DefinitionError(f"{machine.name} has no end")
        if machine.name in named:
            raise DefinitionError(f"two machines are named {machine.name}")
        for step in machine.steps:
            if step.queue is not None and step.queue not in queues:
                raise DefinitionError(f"{machine.name}.{step.name}: there is no queue {step.queue!r}")
        named[machine.name] = machine
    return named


def new_ulid(now_ms: int) -> str:
    """Make a run's id: 48 bits of time, for people, and 80 of chance. It says nothing about order."""
    number = (now_ms & (1 << 48) - 1) << 80 | secrets.randbits(80)
    return "".join(_ULID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


@asynccontextmanager
async def open_engine(
    path: str,
    *,
    machines: Sequence[Machine[Any]],
    app: Any = None,
    queues: Mapping[str, int] | None = None,
    migrations: Sequence[str] = (),
    hooks: Hooks | None = None,
    resume: Resume = "all",
    grace_s: float = 10.0,
    clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
    poll_s: float = 0.1,
    patience_s: float = 30.0,
    application_id: int = APPLICATION_ID,
) -> AsyncIterator[Engine]:
    """Open the state file, resume what dead processes left, and give the engine; stop it at the end of the block.

    `resume`: "all" takes over every run without an owner, in order, before this returns; "related" only what this
    process starts or waits for; "none" only what it starts. The children and predecessors of a run go with it.

    When the block ends, steps at work are given `grace_s` to finish; when it raises, they are cut at once. An error of
    the block comes out as it is, not in a group.

    Raises: DefinitionError, StateError and its kinds.
    """
    hooks = hooks or Hooks()
    create(path)
    database = Database(path, point=hooks.point, patience_s=patience_s)
    failure: BaseException | None = None
    try:
        await database.migrate(migrations, application_id)
        with Ownership(f"{path}-owners") as ownership:
            async with trio.open_nursery() as nursery:
                engine = Engine(
                    database, ownership, nursery, machines, queues or {}, app, hooks, clock,
                    rng or random.Random(), resume, poll_s,  # noqa: S311  jitter needs no secrecy
                )  # fmt: skip
                nursery.start_soon(engine.watch)
                try:
                    if resume == "all":
                        await engine.resume()
                    yield engine
                except BaseException as error:
                    failure = error
                with trio.CancelScope(shield=True):
                    await engine.shutdown(grace_s=grace_s if failure is None else 0)
                nursery.cancel_scope.cancel()
    finally:
        database.close()
    if failure is not None:
        raise failure
