"""The engine of one process: it starts runs, resumes those of dead processes, waits, cancels and stops.

Rule 1: a run is worked at only while its lock is held; its row is read again after the lock is taken.
Rule 2: what is to happen is in the state file before anybody is told: a start, a cancellation, an outcome.
Rule 3: one bad row is quarantined and stops no other.
Rule 4: a stop is not an outcome.
"""

import logging
import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, Literal, TypeVar

import trio
from pydantic import BaseModel

from broker.machine import ledger
from broker.machine.database import Database
from broker.machine.definition import Machine
from broker.machine.hooks import Hooks, no_event
from broker.machine.ledger import Entry
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
from broker.machine.starting import After, Plan, Started, as_after, insert_or_join

T = TypeVar("T")

log: Final = logging.getLogger("machine")

Resume = Literal["all", "related", "none"]
POINTS: Final = tuple(f"{name}:{side}" for name in ("migrate", "quarantine", "prune") for side in ("before", "after"))
_LONGEST_SLEEP_S: Final = 60.0  # then the clock is read again, so that a clock that is set is noticed


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
        self.machines = {machine.name: machine for machine in machines}
        self.queues = {name: Queue(limit) for name, limit in queues.items()}
        self.draining = False
        self._ownership, self._nursery, self._clock = ownership, nursery, clock
        self._mode: Resume = resume
        self._poll_s = poll_s
        self._active: dict[int, Active] = {}
        self._needed: set[int] = set()  # runs this process was asked for, and what they need
        self._stopped: set[int] = set()  # runs that stopped here and are left for a later start
        self._left = trio.Event()
        self.opened = trio.Event()  # no step runs before the program holds the engine

    @property
    def db(self) -> sqlite3.Connection:
        """Give the connection for reading; fetch all rows at once, an open statement keeps writers out."""
        return self.database.reader

    def now_ms(self) -> int:
        """Give the time by the wall clock, for people and for persisted dates."""
        return int(self._clock() * 1000)

    def owned_elsewhere(self, run: RunRecord) -> bool:
        """Say whether another engine, of this process or another, works at a run.

        The lock is asked, which is held from before a run is to be seen until after its end is: so a run of this engine
        is never taken for another's, be it not yet begun or just ended. Nobody owns the run of a process that died.
        """
        return run.active and self._ownership.is_held_elsewhere(run.seq)

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
        `not_before` is in seconds since the epoch; `queue` is held from the first step to the last.

        Raises: UsageError, UnknownRunError (parent or `after`), StoppedError, StateError, ValueError for a request that
            does not survive being stored.
        """
        self._check_start(machine, key, request, queue)
        plan = Plan(machine, key, encode(request), queue, parent, tuple(after or ()), not_before, trace)
        while True:
            if self.draining:
                raise StoppedError("the engine is stopping and starts nothing")
            run, new = await self._start_once(plan)
            if new or run.cancel_cause is None or not run.active:
                break
            await self.await_run(run.id, needed=True)  # one that is being cancelled is waited out, then started anew
        if not new and run.active:
            self._needed.add(run.seq)
            await self._adopt(run.seq)
        return Started(run.id, new, run.request == plan.request)

    def _check_start(self, machine: Machine[Any], key: str, request: BaseModel, queue: str | None) -> None:
        if self.machines.get(machine.name) is not machine:
            raise UsageError(f"machine {machine.name} is not one of this engine's")
        if type(request) is not machine.request:
            raise UsageError(f"{machine.name} takes {machine.request.__name__}, got {type(request).__name__}")
        if not key:
            raise UsageError(f"a run of {machine.name} needs a key")
        if queue is None:
            return
        if queue not in self.queues:
            raise UsageError(f"there is no queue {queue!r}, only {sorted(self.queues)}")
        # A run that holds one queue and waits for another could wait in a circle: so a queue is for steps or for runs.
        if any(step.queue == queue for other in self.machines.values() for step in other.steps):
            raise UsageError(f"the queue {queue!r} is for steps, not for whole runs")

    async def _start_once(self, plan: Plan) -> tuple[RunRecord, bool]:
        taken: list[int] = []

        def write(entry: Entry) -> tuple[RunRecord, bool]:
            run, new = insert_or_join(entry, plan)
            # Before the commit, so that no other process can find the run without an owner.
            if new and not self._ownership.take(run.seq):
                raise StateError(f"the lock of the new run number {run.seq} is held: was the state file put back?")
            taken.extend([run.seq] if new else [])
            return run, new

        try:
            run, new = await self.commit(f"{plan.machine.name}:start", write)
        except BaseException:
            for seq in taken:
                self._ownership.give(seq)
            raise
        if new:
            self._spawn(plan.machine, run, [(a.run_id, a.policy) for a in map(as_after, plan.after)])
        return run, new

    def _spawn(self, machine: Machine[Any], run: RunRecord, after: list[tuple[str, str]]) -> Active:
        active = Active(self, machine, run, after)
        self._active[run.seq] = active
        self._needed.add(run.seq)
        self._nursery.start_soon(active.work, name=f"{run.machine} {run.key}")
        return active

    def forget(self, active: Active) -> None:
        """Take leave of a run that ended or stopped."""
        seq = active.row.seq
        if active.row.outcome is None:
            self._stopped.add(seq)
        del self._active[seq]
        self._needed.discard(seq)
        self._ownership.give(seq)
        self._left.set()
        self._left = trio.Event()

    # -- resuming

    async def resume(self, run_id: str | None = None) -> list[str]:
        """Take over every active run that no living process owns, oldest first, or only this one; give their ids.

        Raises: UnknownRunError, StateError.
        """
        if run_id is None:
            seqs = await self.database.read(lambda _: self.lookup.active_seqs())
        else:
            seqs = [(await self.database.read(lambda _: self.lookup.run(run_id))).seq]
            self._stopped.difference_update(seqs)
        taken = [active for seq in seqs if (active := await self._adopt(seq)) is not None]
        return [active.row.id for active in taken]

    async def _adopt(self, seq: int) -> Active | None:
        """Give the run at work here, becoming its owner if nobody is; None if another is, or it has ended."""
        if self.draining or seq in self._stopped or not self._ownership.take(seq):
            return self._active.get(seq)
        active = None
        try:
            found = await self._recognise(seq)
            if found is not None:
                machine, after = found
                run = await self.commit(f"{machine.name}:resume", lambda entry: _resumed(entry, seq))
                active = self._spawn(machine, run, after)
        finally:
            if active is None:
                self._ownership.give(seq)
        if active is not None:
            for child in await self.database.read(lambda _: self.lookup.active_children(seq)):
                self._needed.add(child)
                await self._adopt(child)
        return active

    async def _recognise(self, seq: int) -> tuple[Machine[Any], list[tuple[str, str]]] | None:
        """Give machine and predecessors of an active run; None if it has ended or has just been quarantined."""

        def read(_: sqlite3.Connection) -> tuple[Machine[Any], list[tuple[str, str]]] | None:
            run = self.lookup.row(seq)
            return (self._check_run(run), self.lookup.predecessors(run)) if run.active else None

        try:
            return await self.database.read(read)
        except (UsageError, ValueError, LookupError, DamagedStateError) as error:
            reason = str(error)
        log.error("run number %d is quarantined: %s", seq, reason)
        try:
            await self.commit("quarantine", lambda entry: ledger.quarantine(entry, seq, reason))
        except sqlite3.IntegrityError as error:
            log.error("run number %d is damaged so that it cannot even be quarantined: %s", seq, error)
            self._stopped.add(seq)
        return None

    def _check_run(self, run: RunRecord) -> Machine[Any]:
        """Give the machine of a run. Raises: UsageError, ValueError, LookupError, DamagedStateError."""
        machine = self.machines.get(run.machine)
        if machine is None:
            raise UsageError(f"this program has no machine {run.machine!r}, only {sorted(self.machines)}")
        if (run.version, run.definition) != (machine.version, machine.digest):
            raise UsageError(
                f"{run.machine} is defined otherwise than when this run was started:"
                f" then version {run.version} with {', '.join(run.steps)};"
                f" now version {machine.version} with {', '.join(machine.step_names)}, {machine.end_name}"
            )
        if run.queue is not None and run.queue not in self.queues:
            raise UsageError(f"there is no queue {run.queue!r}, only {sorted(self.queues)}")
        machine.request.model_validate_json(run.request)
        results = self.lookup.results(run)
        for step in machine.steps[: run.cursor]:
            if step.result is not None:
                step.result.model_validate_json(results[step.name])
        return machine

    # -- waiting

    async def wait(self, run_id: str, *, follow: bool = False) -> Outcome:
        """Wait until a run has ended, here or in another process, and give its outcome; at once if it has.

        If its owner dies it is taken over, unless this engine was opened with ``resume="none"`` and does not need it.
        `follow` waits for the successor of a run that was handed over.

        Raises: UnknownRunError; StoppedError when this engine stops first; StateError when the run stopped on the state
            file.
        """
        return await self.await_run(run_id, needed=self._mode != "none", follow=follow)

    async def await_run(
        self, run_id: str, *, needed: bool, waiter: Active | None = None, follow: bool = False
    ) -> Outcome:
        """Wait for a run; `waiter` is a run at work that waits and must stop with the engine."""
        outcome = await self._await_one(run_id, needed, waiter)
        seen = {run_id}
        while follow and outcome.successor is not None and outcome.successor not in seen:
            seen.add(outcome.successor)
            outcome = await self._await_one(outcome.successor, needed, waiter)
        return outcome

    async def _await_one(self, run_id: str, needed: bool, waiter: Active | None) -> Outcome:
        seq = None
        while True:
            outcome = await self.database.read(lambda _: self.lookup.ended(run_id))
            if outcome is not None:
                await trio.lowlevel.checkpoint()
                return outcome
            if seq is None:
                seq = (await self.database.read(lambda _: self.lookup.run(run_id))).seq
            active = self._active.get(seq)
            if active is None and (needed or seq in self._needed):
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
            await trio.sleep(self._poll_s)  # the kernel frees the lock of an owner that died and tells nobody

    async def sleep_until(self, when_ms: int) -> None:
        """Sleep until the wall clock shows this time."""
        while (left_ms := when_ms - self.now_ms()) > 0:  # noqa: ASYNC110  the wall clock has no event
            await trio.sleep(min(left_ms / 1000, _LONGEST_SLEEP_S))

    # -- ending

    async def cancel(self, run_id: str, *, cause: str) -> bool:
        """Ask for the end of a run and of the children that only it wants; False if its end is decided already.

        The wish and its cause are durable when this returns; `wait` gives the outcome. A run whose last step completes
        first is done all the same.

        Raises: UnknownRunError, StateError.
        """
        run = await self.database.read(lambda _: self.lookup.run(run_id))
        if not run.active or run.ending is not None:
            return False
        if run.cancel_cause is None:
            asked = await self.commit(
                f"{run.machine}:cancel", lambda entry: ledger.request_cancel(entry, entry.get(run.seq), cause)
            )
            for seq in asked:
                await self._adopt(seq)  # without an owner nobody else would end it
        else:
            await self._adopt(run.seq)
        return (await self.database.read(lambda _: self.lookup.run(run_id))).cancel_cause is not None

    def _tell_cancelled(self, seq: int) -> None:
        active = self._active.get(seq)
        if active is not None:
            active.scope.cancel()

    async def watch(self) -> None:
        """Notice, for as long as the engine runs, what other processes commit, and what they cancel."""
        version = -1
        while True:
            await trio.sleep(self._poll_s)
            if not self._active:
                continue
            try:
                now = await self.database.read(lambda db: int(db.execute("PRAGMA data_version").fetchone()[0]))
                if now != version:
                    self.database.tell_moved()
                    for seq in await self.database.read(lambda _: self.lookup.cancelled_seqs()):
                        self._tell_cancelled(seq)
                    version = now
            except StateError as error:
                log.warning("cannot look for cancellations: %s", error)  # the runs will meet the same and stop

    async def shutdown(self, *, grace_s: float = 10.0) -> None:
        """Stop: finish the steps that are at work within `grace_s`, then cut them; leave the runs to be resumed."""
        self.draining = True
        for active in list(self._active.values()):
            if active.resting:
                active.scope.cancel()
        with trio.move_on_after(grace_s):
            await self._all_left()
        for active in list(self._active.values()):
            active.scope.cancel()
        with trio.CancelScope(shield=True):
            await self._all_left()

    async def _all_left(self) -> None:
        while self._active:
            await self._left.wait()

    # -- the state file

    async def commit(self, name: str, work: Callable[[Entry], T]) -> T:
        """Run `work` in one transaction named for its crash points; then tell who has to know."""
        entries: list[Entry] = []
        told: list[tuple[RunRecord, EventRecord]] = []

        def write(db: sqlite3.Connection) -> T:
            entry = Entry(db, self.now_ms())
            entries.append(entry)
            value = work(entry)
            if self.hooks.event is not no_event:
                told.extend(_told(entry))
            return value

        value = await self.database.transact(name, write)
        for seq in entries[-1].cancelled:
            self._tell_cancelled(seq)
        for run, event in told:
            try:
                self.hooks.event(run, event)
            except Exception:
                log.exception("a hook failed")
        return value

    def transaction(self, name: str = "program") -> AbstractAsyncContextManager[sqlite3.Connection]:
        """Give a transaction for the program's own writes outside of runs; the block must not await.

        `name` names its two crash points.
        """
        return self.database.transaction(name)

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a reading function on `db`, and again while another process keeps the file locked."""
        return await self.database.read(query)

    def runs(
        self, machine: str | None = None, key: str | None = None, *, active_only: bool = False, limit: int = 100
    ) -> list[RunRecord]:
        """Give runs, newest first. More is in `lookup`."""
        return self.lookup.runs(machine, key, active_only=active_only, limit=limit)

    def events(self, run_id: str) -> list[EventRecord]:
        """Give a run's log, oldest first. Raises: UnknownRunError."""
        return self.lookup.events(self.lookup.run(run_id))

    async def prune(self, *, older_than_s: float, limit: int = 1000) -> int:
        """Forget finished runs that were last touched this long ago, at most `limit`; give how many."""
        before_ms = self.now_ms() - int(older_than_s * 1000)
        return await self.commit("prune", lambda entry: ledger.prune(entry, before_ms, limit))


def _told(entry: Entry) -> Iterator[tuple[RunRecord, EventRecord]]:
    for seq, event in entry.events:
        try:
            yield entry.get(seq), event
        except DamagedStateError as error:
            log.error("no hook hears of %s: %s", event.type, error)


def _resumed(entry: Entry, seq: int) -> RunRecord:
    run = entry.get(seq)
    return ledger.resume(entry, run) if run.active else run


def check_setting(machines: Sequence[Machine[Any]], queues: Mapping[str, int]) -> None:
    """Refuse machines and queues that no engine can run. Raises: DefinitionError."""
    names: set[str] = set()
    for name, limit in queues.items():
        if limit < 1:
            raise DefinitionError(f"the queue {name} needs at least one place, got {limit}")
    for machine in machines:
        if machine.end_name is None:
            raise DefinitionError(f"{machine.name} has no end")
        if machine.name in names:
            raise DefinitionError(f"two machines are named {machine.name}")
        names.add(machine.name)
        for step in machine.steps:
            if step.queue is not None and step.queue not in queues:
                raise DefinitionError(f"{machine.name}.{step.name}: there is no queue {step.queue!r}")
