"""One run at work: wait for its turn, attempt its steps, end it.

Rule 1: the state file is the truth. After each commit the row is read back, and nothing else is remembered.
Rule 2: a step's result, the program's own writes and the move of the cursor are one transaction.
Rule 3: trio's Cancelled is never caught. Whether it meant a cancelled run or a shutdown is asked afterwards, of the
    state file.
Rule 4: a commit that fails stops the run where it is; nothing is guessed about it.
"""

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import trio
from pydantic import BaseModel

from broker.machine import ledger
from broker.machine.definition import Call, Interceptor, Machine, Step
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
    StoppedError,
    UnknownRunError,
    UsageError,
    judge,
    leaves,
)
from broker.machine.view import Run

if TYPE_CHECKING:
    from broker.machine.engine import Engine

log: Final = logging.getLogger("machine")
_TRACEBACK_CHARS: Final = 8000  # of a programming error, kept in the log of the run


class Active:
    """An active run that this process owns."""

    def __init__(self, engine: "Engine", machine: Machine[Any], row: RunRecord, after: list[tuple[str, str]]) -> None:
        self.engine = engine
        self.machine = machine
        self.row = row
        # Shielded: when the program is cancelled, the engine hears of it first and stops its runs in order.
        self.scope = trio.CancelScope(shield=True)
        self.finished = trio.Event()
        self.failure: BaseException | None = None
        self.resources: list[object] = []
        self.resting = 0
        self._after = after
        self._places: list[tuple[str, Ticket]] = []
        self._lent = 0
        if row.queue is not None and row.not_before_ms is None and not after and not self._ends:
            self._enlist(row.queue)  # at once, so that the order in the queue is the order of the runs

    @property
    def _ends(self) -> bool:
        return self.row.ending is not None or self.row.cancel_cause is not None

    async def work(self) -> None:
        """Bring the run to its end, or leave it in good order when the engine stops."""
        try:
            with self.scope:
                with self.rest():
                    await self.engine.opened.wait()
                if not self._ends:
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

    # -- before the first step

    async def _admit(self) -> None:
        with self.rest():
            for run_id, policy in self._after:
                outcome = await self.engine.await_run(run_id, needed=True, waiter=self, follow=True)
                if policy == "success" and not outcome.ok:
                    reason = f"run {run_id}, which had to succeed first, was {outcome.sentence}"
                    return await self._decide(Ending("aborted", "predecessor", reason, step=self.row.step), 0)
            if self.row.not_before_ms is not None:
                await self.engine.sleep_until(self.row.not_before_ms)
            if self.row.queue is not None:
                if not self._places:
                    self._enlist(self.row.queue)
                await self._places[0][1].granted.wait()

    # -- the steps

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
                await self._bear(error, began)
            finally:
                self.resources.clear()

    async def _initialise(self, stack: AsyncExitStack) -> None:
        await self._boundary()
        for initialiser in self.machine.initialisers:
            self.resources.append(await stack.enter_async_context(initialiser(await self._view())))

    async def _bear(self, error: BaseException, began: float) -> None:
        if self.row.ending is None:
            return await self._failed(error, await self._view(), began)
        # The steps are over and only a teardown failed: the end that was decided stands.
        log.error("leaving run %s failed", self.row.id, exc_info=error)

    async def _steps(self) -> None:
        while self.row.ending is None:
            await self._boundary()
            step = self.machine.steps[self.row.cursor]
            if self.row.crashes > step.retry.crashes:
                reason = f"the process died {self.row.crashes} times in this step"
                await self._decide(Ending("aborted", "crashed", reason, step=step.name), 0)
            else:
                await self._attempt(step)

    async def _boundary(self) -> None:
        if self.engine.draining:
            self.scope.cancel()
        await trio.lowlevel.checkpoint()
        if self.row.due_ms is not None and self.row.delay_ms is not None:
            # A clock that was set back must not make the pause longer than it was meant to be.
            left_ms = min(self.row.due_ms - self.engine.now_ms(), self.row.delay_ms)
            with self.rest():
                await trio.sleep(max(0, left_ms) / 1000)

    async def _attempt(self, step: Step[Any]) -> None:
        async with AsyncExitStack() as stack:
            if step.queue is not None:
                with self.rest():
                    self._enlist(step.queue)
                    stack.callback(self._drop_place)
                    await self._places[-1][1].granted.wait()
            run = await self._view()
            began = trio.current_time()
            try:
                value = await self._call(step, run)
                await self._complete(run, _encode(step, value), began)
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
        with trio.move_on_after(timeout_s):
            return await call(run)
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

    # -- when an attempt fails

    async def _failed(self, error: BaseException, run: Run[Any], began: float) -> None:
        # A cancelled run or a shutdown comes first: this raises Cancelled, and the error it caused is not recorded.
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._heed_state(error)
        signal = judge(error, self.machine.steps[self.row.cursor].retry.retry_on)
        if isinstance(signal, Retry):
            return await self._retry(signal, run, began)
        if isinstance(signal, Abort) and signal.kind == "bug":
            run.log("traceback", {"text": "".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]})
        await self._decide(self._ending(signal), _ms_since(began), run, with_writes=isinstance(signal, Done | Handoff))

    async def _heed_state(self, error: BaseException) -> None:
        """Let the state file's errors through, also from inside a nursery; a stop ends this life, not the run."""
        for leaf in leaves(error):
            if isinstance(leaf, StateError):
                raise leaf
            if isinstance(leaf, StoppedError):
                self.scope.cancel()
                await trio.lowlevel.checkpoint()

    async def _retry(self, signal: Retry, run: Run[Any], began: float) -> None:
        step = self.machine.steps[self.row.cursor]
        spent_ms = _ms_since(began)
        delay_s = signal.delay_s
        if delay_s is None:
            delay_s = step.retry.delay_s(self.row.attempt, self.engine.rng)
        limit = None
        if self.row.attempt >= step.retry.attempts:
            limit = f"gave up after attempt {self.row.attempt}"
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
            value = encode(signal.result) if signal.result is not None else None
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
            log.exception("run %s cannot end as %s", self.row.id, ending.kind)
            await self._decide(Ending("aborted", "bug", _text(error), step=self.row.step), duration_ms)

    def _write(self, entry: Entry, run: Run[Any], *, with_writes: bool) -> None:
        for type_, payload in run.events:
            entry.append(self.row.seq, type_, payload, step=self.row.step, attempt=self.row.attempt)
        if with_writes:
            for write in run.writes:
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
            if ending is None or not self.engine.opened.is_set():
                await self._commit("park", lambda entry: ledger.park(entry, self.row))
            else:
                await self._finish(ending)

    async def _finish(self, ending: Ending) -> None:
        runs, errors = await self._finalise(ending)

        def write(entry: Entry) -> RunRecord:
            for text in errors:
                entry.append(self.row.seq, "finaliser_error", {"reason": text})
            for run in runs:
                self._write(entry, run, with_writes=True)
            return ledger.finish(entry, self.row, ending)

        try:
            await self._commit("finish", write)
        except StateError:
            raise
        except Exception as error:
            log.exception("what the finalisers of run %s write is wrong", self.row.id)
            errors, runs = [*errors, _text(error)], []
            await self._commit("finish", write)

    async def _finalise(self, ending: Ending) -> tuple[list[Run[Any]], list[str]]:
        """Call the finalisers; give those whose writes count, and the errors of the others."""
        if self.row.crashes > self.machine.default_retry.crashes:
            return [], [f"not called again: the process died {self.row.crashes} times"]
        runs: list[Run[Any]] = []
        errors: list[str] = []
        for finaliser in self.machine.finalisers:
            run = await self._view()
            try:
                with trio.fail_after(self.machine.finalise_timeout_s):
                    await finaliser(run, to_outcome(self.row, run.results, ending))
                runs.append(run)
            except Exception as error:
                log.exception("a finaliser of run %s failed", self.row.id)
                errors.append(_text(error))
        return runs, errors

    # -- waiting

    async def wait_for(self, run_id: str) -> Outcome:
        """Wait for another run on behalf of a step of this one. Raises: UsageError, UnknownRunError."""
        if run_id == self.row.id:
            raise UsageError(f"run {run_id} would wait for itself")
        self._lend()
        try:
            outcome = await self.engine.await_run(run_id, needed=True, waiter=self)
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
    def rest(self) -> Iterator[None]:
        """Mark a wait that a shutdown may cut at once, because no work is in it."""
        if self.engine.draining:
            self.scope.cancel()
        self.resting += 1
        try:
            yield
        finally:
            self.resting -= 1

    async def _view(self) -> Run[Any]:
        results = await self.engine.database.read(lambda _: self.engine.lookup.results(self.row))
        return Run(self, self.machine.request.model_validate_json(self.row.request), results)


def _wrapped(interceptor: Interceptor, call: Call) -> Call:
    async def wrapped(run: Run[Any]) -> BaseModel | None:
        return await interceptor(run, call)

    return wrapped


def _encode(step: Step[Any], value: BaseModel | None) -> str | None:
    if step.result is None and value is None:
        return None
    if step.result is None or type(value) is not step.result:
        expected = step.result.__name__ if step.result else "None"
        raise TypeError(f"step {step.name} should return {expected}, returned {type(value).__name__}")
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


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
