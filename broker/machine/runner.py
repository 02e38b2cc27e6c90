"""One run at work: wait for its turn, attempt its steps, end it.

Rule 1: the state file is the truth. What a step is given is decoded from it anew at each attempt, and after each commit
    the row is read back.
Rule 2: a step's result, the program's own writes and the move of the cursor are one transaction.
Rule 3: trio's Cancelled is never caught. Whether it meant a cancelled run or a shutdown is asked afterwards, of the
    state file first.
Rule 4: a commit that fails stops the run where it is; nothing is guessed about it.
"""

import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio
from pydantic import BaseModel, JsonValue

from broker.machine import ledger
from broker.machine.definition import Call, Machine, Request, Step
from broker.machine.ledger import Entry
from broker.machine.queues import Ticket
from broker.machine.records import Ending, Outcome, RunRecord, to_outcome
from broker.machine.signals import (
    Abort,
    Done,
    Handoff,
    Retry,
    Signal,
    StateError,
    UnknownRunError,
    UsageError,
    judge,
)

if TYPE_CHECKING:
    from broker.machine.engine import After, Engine

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")

log: Final = logging.getLogger("machine")


class Run(Generic[Request]):
    """What a step sees of its run, for one attempt."""

    def __init__(self, active: "Active", request: Request, results: Mapping[str, str]) -> None:
        self._active = active
        self._results = results
        self._writes: list[Callable[[sqlite3.Connection], object]] = []
        self._events: list[tuple[str, Mapping[str, JsonValue]]] = []
        self.request = request
        self.id = active.row.id
        self.key = active.row.key
        self.step = active.row.step
        self.attempt = active.row.attempt
        self.trace = active.row.trace
        self.app: Any = active.engine.app

    def result(self, step: str, model: type[M]) -> M:
        """Give the result of a completed step. Raises: LookupError."""
        return model.model_validate_json(self._results[step])

    @property
    def results(self) -> Mapping[str, str]:
        """Give the JSON of each completed step's result."""
        return self._results

    def resource(self, model: type[R]) -> R:
        """Give what an initialiser of the machine yielded, by its type. Raises: LookupError."""
        for value in self._active.resources:
            if isinstance(value, model):
                return value
        raise LookupError(f"no initialiser yielded a {model.__name__}")

    def on_commit(self, write: Callable[[sqlite3.Connection], object]) -> None:
        """Make this write in the transaction that records the end of the step, if it ends with success.

        Done and Handoff count as success; after Abort, Retry or an error the writes are forgotten.
        """
        self._writes.append(write)

    def log(self, type: str, payload: Mapping[str, JsonValue] | None = None) -> None:
        """Append an event to the run's log, with the commit that records this attempt, however it goes."""
        self._events.append((f"user.{type}", dict(payload or {})))

    async def start_child(
        self,
        machine: Machine[Any],
        key: str,
        request: BaseModel,
        *,
        queue: str | None = None,
        after: "list[After | str] | None" = None,
        not_before: float | None = None,
    ) -> str:
        """Start a run below this one and give its id.

        The active run of the same machine and key is joined, whoever started it; a child of this run that has already
        done the same request is given again, so that a repeated step does not repeat its children.
        """
        started = await self._active.engine.start(
            machine, key, request, queue=queue, after=after, not_before=not_before, parent=self.id
        )
        return started.id

    async def wait(self, run_id: str) -> Outcome:
        """Wait for another run. The places in queues that this run holds are lent out meanwhile."""
        return await self._active.wait_for(run_id)


class Active:
    """An active run that this process owns."""

    def __init__(self, engine: "Engine", machine: Machine[Any], row: RunRecord) -> None:
        self.engine = engine
        self.machine = machine
        self.row = row
        self.scope = trio.CancelScope()
        self.finished = trio.Event()
        self.failure: BaseException | None = None
        self.resources: list[object] = []
        self.idle = 0
        self._places: list[tuple[str, Ticket]] = []
        self._lent = 0
        if self._ready() and row.queue is not None:
            self._enlist(row.queue)  # at once, so that the order in the queue is the order of the runs

    # -- life

    async def work(self) -> None:
        """Bring the run to its end, or leave it in good order when the engine stops."""
        try:
            with self.scope:
                if self.row.ending is None and self.row.cancel_cause is None:
                    await self._admit()
                    await self._live()
            await self._close()
        except (StateError, UnknownRunError) as error:
            # The disk or another process is in the way; the run stays as it is for the next start.
            log.exception("run %s stops at %s", self.row.id, self.row.step)
            self.failure = error
        finally:
            self._drop_places()
            self.engine.forget(self)
            self.finished.set()

    def _ready(self) -> bool:
        row = self.row
        return row.not_before_ms is None and not self.engine.lookup.predecessors(row)

    async def _admit(self) -> None:
        with self._resting():
            for run_id, policy in await self.engine.database.read(lambda _: self.engine.lookup.predecessors(self.row)):
                outcome = await self.engine.await_run(run_id, mine=True)
                if policy == "success" and not outcome.ok:
                    reason = f"run {run_id}, which had to succeed first, was {outcome.sentence}"
                    return await self._decide(Ending("aborted", "predecessor", reason, step=self.row.step), 0)
            if self.row.not_before_ms is not None:
                await self.engine.sleep_until(self.row.not_before_ms)
            if self.row.queue is not None:
                if not self._places:
                    self._enlist(self.row.queue)
                await self._places[0][1].granted.wait()

    async def _live(self) -> None:
        while self.row.ending is None:
            began = trio.current_time()
            try:
                async with AsyncExitStack() as stack:
                    await self._initialise(stack)
                    await self._steps()
            except StateError:
                raise
            except (Exception, BaseExceptionGroup) as error:
                # An initialiser failed, or what it watches over; the step the run is at bears it.
                await self._failed(error, self._make_run(), began)
            finally:
                self.resources.clear()

    async def _initialise(self, stack: AsyncExitStack) -> None:
        for initialiser in self.machine.initialisers:
            self.resources.append(await stack.enter_async_context(initialiser(self._make_run())))

    async def _steps(self) -> None:
        while self.row.ending is None:
            await self._boundary()
            await self._pause()
            step = self.machine.steps[self.row.cursor]
            await self._attempt(step)

    async def _boundary(self) -> None:
        if self.engine.draining:
            self.scope.cancel()
        await trio.lowlevel.checkpoint()

    async def _pause(self) -> None:
        if self.row.due_ms is None or self.row.delay_ms is None:
            return
        # A clock that was set back must not make the pause longer than it was meant to be.
        left_ms = min(self.row.due_ms - self.engine.now_ms(), self.row.delay_ms)
        with self._resting():
            await trio.sleep(max(0, left_ms) / 1000)

    # -- one attempt

    async def _attempt(self, step: Step[Any]) -> None:
        async with AsyncExitStack() as stack:
            if step.queue is not None:
                with self._resting():
                    self._enlist(step.queue)
                    stack.callback(self._drop_place)
                    await self._places[-1][1].granted.wait()
            run = self._make_run()
            began = trio.current_time()
            try:
                value = await self._call(step, run)
                text = _encode(step, value)
                await self._complete(run, text, began)
            except StateError:
                raise
            except (Exception, BaseExceptionGroup) as error:
                await self._failed(error, run, began)

    async def _call(self, step: Step[Any], run: Run[Any]) -> BaseModel | None:
        call: Call = step.body
        for interceptor in reversed(self.machine.interceptors):
            call = _wrapped(interceptor, call)
        left_s = self._left_s(step)
        timeout_s = min(step.retry.timeout_s or left_s, left_s)
        with trio.move_on_after(timeout_s) as scope:
            return await call(run)
        assert scope.cancelled_caught
        raise Retry(f"no result after {timeout_s:g} s", kind="timeout")

    def _left_s(self, step: Step[Any]) -> float:
        if step.retry.deadline_s is None:
            return float("inf")
        return max(0.0, step.retry.deadline_s - self.row.spent_ms / 1000)

    async def _complete(self, run: Run[Any], text: str | None, began: float) -> None:
        last = self.row.cursor == len(self.machine.steps) - 1
        ending = Ending("done") if last else None
        final = last and not self.machine.finalisers

        def write(entry: Entry) -> RunRecord:
            self._write(entry, run, with_writes=True)
            return ledger.complete(entry, self.row, text, _ms_since(began), ending, final=final)

        await self._commit(f"{self.row.step}:complete", write)

    async def _failed(self, error: BaseException, run: Run[Any], began: float) -> None:
        # A cancelled run or a shutdown comes first: this raises Cancelled, and the error it caused is not recorded.
        await trio.lowlevel.checkpoint_if_cancelled()
        policy = self.machine.steps[self.row.cursor].retry
        signal = judge(error, policy.retry_on)
        if isinstance(signal, Retry):
            return await self._retry(signal, run, began)
        if isinstance(signal, Abort) and signal.kind == "bug":
            run.log("traceback", {"text": "".join(traceback.format_exception(error))[-8000:]})
        await self._decide(self._ending(signal), _ms_since(began), run, with_writes=isinstance(signal, Done | Handoff))

    async def _retry(self, signal: Retry, run: Run[Any], began: float) -> None:
        step = self.machine.steps[self.row.cursor]
        spent_ms = _ms_since(began)
        delay_s = signal.delay_s
        if delay_s is None:
            delay_s = step.retry.delay_s(self.row.attempt, self.engine.rng)
        limit = None
        if self.row.attempt >= step.retry.attempts:
            limit = f"gave up after {self.row.attempt} attempts"
        elif self._left_s(step) <= spent_ms / 1000 + delay_s:
            limit = f"gave up at the deadline of {step.retry.deadline_s:g} s, attempt {self.row.attempt}"
        if limit is not None:
            ending = Ending("aborted", signal.kind, f"{limit}: {signal.reason}", signal.detail, self.row.step)
            return await self._decide(ending, spent_ms, run)

        def write(entry: Entry) -> RunRecord:
            self._write(entry, run, with_writes=False)
            return ledger.fail(entry, self.row, signal.reason, signal.kind, spent_ms, round(delay_s * 1000))

        await self._commit(f"{self.row.step}:retry", write)

    def _ending(self, signal: Signal) -> Ending:
        step = self.row.step
        if isinstance(signal, Done):
            value = signal.result.model_dump_json() if signal.result is not None else None
            return Ending("done", step=step, value=value)
        if isinstance(signal, Abort):
            return Ending("aborted", signal.kind, signal.reason, signal.detail, step)
        assert isinstance(signal, Handoff)
        if signal.run_id == self.row.id:
            return Ending("aborted", "bug", "a run cannot be handed to itself", step=step)
        return Ending("handed_off", step=step, successor=signal.run_id)

    async def _decide(
        self, ending: Ending, duration_ms: int, run: Run[Any] | None = None, *, with_writes: bool = False
    ) -> None:
        def write(entry: Entry) -> RunRecord:
            if run is not None:
                self._write(entry, run, with_writes=with_writes)
            if ending.successor is not None:
                _check_successor(entry, ending.successor)
            return ledger.decide(entry, self.row, ending, duration_ms, final=not self.machine.finalisers)

        try:
            await self._commit(f"{self.row.step}:stop", write)
        except StateError:
            raise
        except Exception as error:
            # The program's own writes or the successor were wrong. Nothing was committed; say so instead.
            bug = judge(error, ())
            assert isinstance(bug, Abort)
            await self._decide(Ending("aborted", "bug", bug.reason, step=self.row.step), duration_ms)

    def _write(self, entry: Entry, run: Run[Any], *, with_writes: bool) -> None:
        for type_, payload in run._events:
            entry.append(self.row.seq, type_, payload, step=self.row.step, attempt=self.row.attempt)
        if with_writes:
            for write in run._writes:
                write(entry.db)

    async def _commit(self, name: str, write: Callable[[Entry], RunRecord]) -> None:
        self.row = await self.engine.commit(f"{self.machine.name}:{name}", write)

    # -- the end

    async def _close(self) -> None:
        if self.row.outcome is not None:
            return
        with trio.CancelScope(shield=True):
            self.row = await self.engine.database.read(lambda _: self.engine.lookup.row(self.row.seq))
            ending = self.row.ending
            if ending is None and self.row.cancel_cause is not None:
                ending = Ending("cancelled", "cancelled", self.row.cancel_cause, step=self.row.step)
            if ending is None:
                await self._commit("park", lambda entry: ledger.park(entry, self.row))
                return
            errors = await self._finalise(ending)

            def write(entry: Entry) -> RunRecord:
                for text in errors:
                    entry.append(self.row.seq, "finaliser_error", {"reason": text})
                return ledger.finish(entry, self.row, ending)

            await self._commit("finish", write)

    async def _finalise(self, ending: Ending) -> list[str]:
        errors: list[str] = []
        results = await self.engine.database.read(lambda _: self.engine.lookup.results(self.row))
        for finaliser in self.machine.finalisers:
            run = self._make_run()
            outcome = to_outcome(self.row, results, ending)
            try:
                with trio.fail_after(self.machine.finalise_timeout_s):
                    await finaliser(run, outcome)
            except (Exception, ExceptionGroup) as error:
                log.exception("a finaliser of run %s failed", self.row.id)
                errors.append(f"{type(error).__name__}: {error}")
        return errors

    # -- waiting

    async def wait_for(self, run_id: str) -> Outcome:
        """Wait for another run on behalf of a step of this one."""
        if run_id == self.row.id:
            raise UsageError(f"run {run_id} would wait for itself")
        self._lend()
        try:
            outcome = await self.engine.await_run(run_id, mine=True, waiter=self)
        finally:
            self._unlend()
        for _, ticket in self._places:
            await ticket.granted.wait()
        return outcome

    def _lend(self) -> None:
        self._lent += 1
        if self._lent == 1:
            for name, ticket in self._places:
                self.engine.queues[name].drop(ticket)

    def _unlend(self) -> None:
        self._lent -= 1
        if self._lent == 0:
            names = [name for name, _ in self._places]
            self._places.clear()
            for name in names:
                self._enlist(name)

    def _enlist(self, name: str) -> None:
        self._places.append((name, self.engine.queues[name].enlist(self.row.seq)))

    def _drop_place(self) -> None:
        name, ticket = self._places.pop()
        self.engine.queues[name].drop(ticket)

    def _drop_places(self) -> None:
        while self._places:
            self._drop_place()

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Mark a wait that a shutdown may cut at once, because no work is in it."""
        if self.engine.draining:
            self.scope.cancel()
        self.idle += 1
        try:
            yield
        finally:
            self.idle -= 1

    def _make_run(self) -> Run[Any]:
        request = self.machine.request.model_validate_json(self.row.request)
        return Run(self, request, self.engine.lookup.results(self.row))


def _wrapped(interceptor: Callable[[Run[Any], Call], Any], call: Call) -> Call:
    async def wrapped(run: Run[Any]) -> BaseModel | None:
        value: BaseModel | None = await interceptor(run, call)
        return value

    return wrapped


def _encode(step: Step[Any], value: object) -> str | None:
    if step.result is None:
        if value is not None:
            raise TypeError(f"step {step.name} declares no result and returned {type(value).__name__}")
        return None
    if type(value) is not step.result:
        raise TypeError(f"step {step.name} should return {step.result.__name__}, returned {type(value).__name__}")
    return encode(value)


def encode(value: BaseModel) -> str:
    """Give the JSON of a model that reads back as the same. Raises: ValueError, at once instead of at the resume."""
    text = value.model_dump_json()
    if type(value).model_validate_json(text) != value:
        raise ValueError(f"{type(value).__name__} does not survive JSON: {text[:200]}")
    return text


def _check_successor(entry: Entry, run_id: str) -> None:
    if entry.db.execute("SELECT 1 FROM run WHERE id = ?", (run_id,)).fetchone() is None:
        raise UsageError(f"no run has the id {run_id!r} to hand over to")


def _ms_since(began: float) -> int:
    return round((trio.current_time() - began) * 1000)
