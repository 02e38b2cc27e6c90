"""What a step sees of its run.

Rule 1: what a step is given is decoded from the state file anew for each attempt; a change made in place is lost at
    once, and not only after a crash.
Rule 2: what a step writes through here is committed with the record of its attempt, or not at all.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import trio
from pydantic import BaseModel, JsonValue

from broker.machine.definition import Machine, Request
from broker.machine.records import Outcome
from broker.machine.starting import After

if TYPE_CHECKING:
    from broker.machine.engine import Engine
    from broker.machine.runner import Active

M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")


class Run(Generic[Request]):
    """A run, for one attempt of one step."""

    def __init__(self, active: "Active", request: Request, results: Mapping[str, str]) -> None:
        self._active = active
        self.writes: list[Callable[[sqlite3.Connection], object]] = []
        self.events: list[tuple[str, Mapping[str, JsonValue]]] = []
        self.request = request
        self.results = results  # JSON of each completed step's result
        self.id = active.row.id
        self.key = active.row.key
        self.step = active.row.step
        self.attempt = active.row.attempt
        self.trace = active.row.trace
        self.engine: Engine = active.engine
        self.app: Any = active.engine.app

    def result(self, step: str, model: type[M]) -> M:
        """Give the result of a completed step. Raises: LookupError."""
        return model.model_validate_json(self.results[step])

    def resource(self, model: type[R]) -> R:
        """Give what an initialiser of the machine yielded, by its type. Raises: LookupError."""
        for value in self._active.resources:
            if isinstance(value, model):
                return value
        raise LookupError(f"no initialiser yielded a {model.__name__}")

    def on_commit(self, write: Callable[[sqlite3.Connection], object]) -> None:
        """Make this write in the transaction that records the end of the step, if it ends with success.

        Done and Handoff count as success; after Abort, Retry or an error the writes are forgotten. A finaliser's writes
        are made in the transaction that records the outcome.
        """
        self.writes.append(write)

    def log(self, type: str, payload: Mapping[str, JsonValue] | None = None) -> None:
        """Append the event ``user.TYPE`` to the run's log, in the transaction that records this attempt."""
        self.events.append((f"user.{type}", dict(payload or {})))

    async def start_child(
        self,
        machine: Machine[Any],
        key: str,
        request: BaseModel,
        *,
        queue: str | None = None,
        after: Sequence[After | str] | None = None,
        not_before: float | None = None,
    ) -> str:
        """Start a run below this one and give its id.

        The active run of the same machine and key is joined, whoever started it and whatever its request; a child of
        this run that has already done the same request is given again, so that a repeated step does not repeat its
        children. When this run is aborted or cancelled, its children are cancelled too, unless another run or the user
        wants them.
        """
        started = await self._active.engine.start(
            machine, key, request, queue=queue, after=after, not_before=not_before, parent=self.id
        )
        return started.id

    @property
    def moved(self) -> trio.Event:
        """Give the event of the next commit to the state file: by this process at once, by another when it is noticed.

        Take it before looking whether what you wait for is there.
        """
        return self.engine.database.moved

    def rest(self) -> AbstractContextManager[None]:
        """Mark a wait in which no work is done, such as for a lock: a shutdown cuts the step there at once."""
        return self._active.rest()

    async def wait(self, run_id: str) -> Outcome:
        """Wait for another run. The places in queues that this run holds are lent out until no task of it waits."""
        return await self._active.wait_for(run_id)
