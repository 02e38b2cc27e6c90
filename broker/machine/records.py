"""What the state file says, for reading: runs, events, outcomes.

Rule 1: nothing here writes. `open_lookup` answers without an engine, a lock file or a transaction.
Rule 2: a row is turned into a frozen record in one place; what cannot be turned is damaged, and says which run it is.
Rule 3: every query is served by an index (a test asks SQLite for the plan of each).
"""

import hashlib
import json
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, cast

from pydantic import BaseModel, JsonValue

from broker.machine.database import APPLICATION_ID, check_schema, connect, translated
from broker.machine.ownership import is_owned
from broker.machine.schema import SCHEMA
from broker.machine.signals import Abort, DamagedStateError, MachineError, UnknownRunError

M = TypeVar("M", bound=BaseModel)

log: Final = logging.getLogger("machine")

Kind = Literal["done", "aborted", "cancelled", "handed_off", "quarantined"]
KINDS: Final[tuple[Kind, ...]] = ("done", "aborted", "cancelled", "handed_off", "quarantined")


class RunFailedError(Abort, MachineError):
    """A run that was needed did not end with success; `outcome` tells how.

    Raised by a step, it aborts the step's own run for the same reason.
    """

    def __init__(self, outcome: "Outcome") -> None:
        reason = f"run {outcome.run_id}, which was needed, was {outcome.sentence}"
        super().__init__(reason, kind=outcome.error_kind or "error", detail=outcome.detail)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends: the text form of it is kept in the state file."""

    kind: Kind
    error_kind: str | None = None
    reason: str | None = None
    detail: Mapping[str, JsonValue] | None = None
    step: str | None = None
    value: str | None = None  # JSON of what Done carried
    successor: str | None = None

    def encode(self) -> str:
        """Give the text for the state file."""
        return json.dumps({name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def decode(cls, text: str) -> "Ending":
        """Read what `encode` gave. Raises: ValueError."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or set(fields) != set(cls.__slots__) or fields["kind"] not in KINDS:
            raise ValueError(f"no ending: {text[:80]}")
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, with what its steps gave."""

    run_id: str
    kind: Kind
    error_kind: str | None
    reason: str | None  # why it was aborted, cancelled or quarantined
    detail: Mapping[str, JsonValue]
    step: str | None  # where it ended before its time
    successor: str | None  # the run it was handed to
    value: str | None  # JSON of what Done carried
    results: Mapping[str, str]  # JSON of each completed step's result

    @property
    def ok(self) -> bool:
        """Say whether the run reached its end."""
        return self.kind == "done"

    @property
    def sentence(self) -> str:
        """Say in one line how the run ended."""
        text = self.kind.replace("_", " ")
        if self.step:
            text += f" at {self.step}"
        if self.successor:
            text += f" to {self.successor}"
        return f"{text}: {self.reason}" if self.reason else text

    def require(self) -> "Outcome":
        """Give the outcome if it is success. Raises: RunFailedError."""
        if not self.ok:
            raise RunFailedError(self)
        return self

    def result(self, step: str, model: type[M]) -> M:
        """Give a step's result. Raises: LookupError when the step was not completed."""
        return model.model_validate_json(self.results[step])

    def done_with(self, model: type[M]) -> M | None:
        """Give what ``Done(result)`` carried, None if it carried nothing or the run went to its end."""
        return None if self.value is None else model.model_validate_json(self.value)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as the state file has it."""

    seq: int
    id: str
    machine: str
    version: int
    definition: str
    steps: tuple[str, ...]  # of the definition that started it, the end's name last
    key: str
    request: str
    queue: str | None
    trace: str | None
    wanted: bool  # started for its own sake, not only as a child
    not_before_ms: int | None
    cursor: int
    attempt: int
    spent_ms: int
    due_ms: int | None
    delay_ms: int | None
    crashes: int
    parked: bool
    last_error: str | None
    cancel_cause: str | None
    ending: Ending | None
    outcome: Kind | None
    created_ms: int
    updated_ms: int
    seal: str

    @property
    def active(self) -> bool:
        """Say whether the run has no outcome yet."""
        return self.outcome is None

    @property
    def step(self) -> str:
        """Name the step the run is at; the end's name when all are completed."""
        return self.steps[self.cursor]


@dataclass(frozen=True, slots=True)
class EventRecord:
    """One line of a run's log."""

    seq: int
    type: str
    step: str | None
    attempt: int | None
    payload: Mapping[str, JsonValue]
    at_ms: int


COLUMNS: Final = ", ".join(RunRecord.__slots__)
SEALED: Final = RunRecord.__slots__[:-1]


def seal(values: Iterable[object]) -> str:
    """Give the digest that a row carries of itself. It finds damage, not malice: whoever can write can seal."""
    return hashlib.blake2b(json.dumps(list(values)).encode(), digest_size=16).hexdigest()


def to_record(row: Sequence[Any]) -> RunRecord:
    """Turn a row of COLUMNS into a record. Raises: DamagedStateError."""
    fields = dict(zip(RunRecord.__slots__, row, strict=True))
    if fields["seal"] != seal(row[:-1]):
        raise DamagedStateError(f"run {fields['id']} does not match its own digest")
    try:
        steps = json.loads(fields["steps"])
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise ValueError("steps is no list of names")
        fields["steps"] = tuple(steps)
        fields["ending"] = None if fields["ending"] is None else Ending.decode(fields["ending"])
        fields["wanted"], fields["parked"] = bool(fields["wanted"]), bool(fields["parked"])
        record = RunRecord(**fields)
        _check_cursor(record)
    except (ValueError, TypeError) as error:
        raise DamagedStateError(f"run {fields['id']} cannot be read: {error}") from error
    return record


def _check_cursor(run: RunRecord) -> None:
    if not 0 <= run.cursor < len(run.steps):
        raise ValueError(f"cursor {run.cursor} is outside of {len(run.steps)} steps")
    if run.cursor == len(run.steps) - 1 and run.ending is None:
        raise ValueError("all steps are completed, yet no end is decided")


# The f-strings below hold nothing but COLUMNS.
# ruff: noqa: S608
QUERIES: Final[dict[str, str]] = {
    "run": f"SELECT {COLUMNS} FROM run WHERE id = ?",
    "begins": f"SELECT {COLUMNS} FROM run WHERE id >= ? AND id < ? ORDER BY id LIMIT ?",
    "row": f"SELECT {COLUMNS} FROM run WHERE seq = ?",
    "active": f"SELECT {COLUMNS} FROM run WHERE machine = ? AND key = ? AND outcome IS NULL",
    "latest": f"SELECT {COLUMNS} FROM run WHERE machine = ? AND key = ? ORDER BY seq DESC LIMIT 1",
    "active_seqs": "SELECT seq FROM run WHERE outcome IS NULL ORDER BY seq",
    "cancelled_seqs": "SELECT seq FROM run WHERE outcome IS NULL AND cancel_cause IS NOT NULL ORDER BY seq",
    "all_runs": f"SELECT {COLUMNS} FROM run WHERE seq < ? ORDER BY seq DESC LIMIT ?",
    "active_runs": f"SELECT {COLUMNS} FROM run WHERE seq < ? AND outcome IS NULL ORDER BY seq DESC LIMIT ?",
    "key_runs": f"SELECT {COLUMNS} FROM run WHERE machine = ? AND key = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
    "machine_runs": f"SELECT {COLUMNS} FROM run WHERE machine = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
    "results": "SELECT step, value, seal FROM run_result WHERE run = ?",
    "events": "SELECT seq, type, step, attempt, payload, at_ms FROM event WHERE run = ? AND seq > ? ORDER BY seq",
    "children": f"SELECT {COLUMNS} FROM run WHERE seq IN (SELECT child FROM run_child WHERE parent = ?) ORDER BY seq",
    "active_children": "SELECT c.child FROM run_child c JOIN run r ON r.seq = c.child"
    " WHERE c.parent = ? AND r.outcome IS NULL ORDER BY c.child",
    "parents": f"SELECT {COLUMNS} FROM run WHERE seq IN (SELECT parent FROM run_child WHERE child = ?) ORDER BY seq",
    "quarantined": "SELECT ending FROM run WHERE id = ? AND outcome = 'quarantined'",
    "predecessors": "SELECT r.id, a.policy FROM run_after a JOIN run r ON r.seq = a.predecessor WHERE a.run = ?",
}


class Lookup:
    """Reading queries on one connection. Each is finished when it returns: no statement stays open and holds a lock."""

    def __init__(self, db: sqlite3.Connection, path: str = "state") -> None:
        self.db = db
        self._path = path

    def _all(self, query: str, *values: object) -> list[Any]:
        with translated(self._path):
            return self.db.execute(QUERIES[query], values).fetchall()

    def run(self, run_id: str) -> RunRecord:
        """Give a run. Raises: UnknownRunError."""
        rows = self._all("run", run_id)
        if not rows:
            raise UnknownRunError(f"no run has the id {run_id!r}")
        return to_record(rows[0])

    def begins(self, prefix: str, limit: int) -> list[RunRecord]:
        """Give runs whose id begins so. Damaged ones are left out, logged."""
        return list(_readable(self._all("begins", prefix, f"{prefix}~", limit)))  # no letter of an id is after "~"

    def row(self, seq: int) -> RunRecord:
        """Give the run with a sequence number. Raises: UnknownRunError."""
        rows = self._all("row", seq)
        if not rows:
            raise UnknownRunError(f"no run has the number {seq}")
        return to_record(rows[0])

    def active(self, machine: str, key: str) -> RunRecord | None:
        """Give the active run of a key, exactly this key."""
        rows = self._all("active", machine, key)
        return to_record(rows[0]) if rows else None

    def latest(self, machine: str, key: str) -> RunRecord | None:
        """Give the newest run of a key, active or finished."""
        rows = self._all("latest", machine, key)
        return to_record(rows[0]) if rows else None

    def runs(
        self,
        machine: str | None = None,
        key: str | None = None,
        *,
        active_only: bool = False,
        limit: int = 100,
        before: int = 1 << 62,
    ) -> list[RunRecord]:
        """Give runs, newest first; `before` is the sequence number to go on from. Damaged ones are left out, logged.

        `limit` cuts off the history; active runs are given whole, since somebody may depend on each.
        """
        if key is not None and machine is None:
            raise ValueError("a key belongs to a machine")
        if active_only:
            found = _readable(self._all("active_runs", before, -1))
            return [r for r in found if machine in (None, r.machine) and key in (None, r.key)]
        if machine is None:
            return list(_readable(self._all("all_runs", before, limit)))
        if key is None:
            return list(_readable(self._all("machine_runs", machine, before, limit)))
        return list(_readable(self._all("key_runs", machine, key, before, limit)))

    def state(self, run: RunRecord) -> str:
        """Give a run's outcome; of an active run "active" while a process works at it, else "interrupted"."""
        return run.outcome or ("active" if is_owned(f"{self._path}-owners", run.seq) else "interrupted")

    def active_seqs(self) -> list[int]:
        """Give the sequence numbers of all active runs, oldest first."""
        return [row[0] for row in self._all("active_seqs")]

    def cancelled_seqs(self) -> list[int]:
        """Give those of active runs that shall be cancelled."""
        return [row[0] for row in self._all("cancelled_seqs")]

    def children(self, run: RunRecord) -> list[RunRecord]:
        """Give the runs that this run started or joined."""
        return [to_record(row) for row in self._all("children", run.seq)]

    def active_children(self, seq: int) -> list[int]:
        """Give the sequence numbers of a run's active children."""
        return [row[0] for row in self._all("active_children", seq)]

    def parents(self, run: RunRecord) -> list[RunRecord]:
        """Give the runs that started or joined this one."""
        return [to_record(row) for row in self._all("parents", run.seq)]

    def predecessors(self, run: RunRecord) -> list[tuple[str, str]]:
        """Give the ids of the runs that this one starts after, with the policy of each."""
        return cast(list[tuple[str, str]], self._all("predecessors", run.seq))

    def results(self, run: RunRecord) -> dict[str, str]:
        """Give the JSON of each completed step that has a result."""
        found = {}
        for step, value, digest in self._all("results", run.seq):
            if digest != seal((run.seq, step, value)):
                raise DamagedStateError(f"the result of {step} of run {run.id} does not match its own digest")
            found[step] = value
        return found

    def events(self, run: RunRecord, after: int = 0) -> list[EventRecord]:
        """Give the log of a run, oldest first; `after` is the event's number to go on from.

        Raises: DamagedStateError.
        """
        try:
            return [
                EventRecord(seq, type_, step, attempt, json.loads(payload), at_ms)
                for seq, type_, step, attempt, payload, at_ms in self._all("events", run.seq, after)
            ]
        except ValueError as error:
            raise DamagedStateError(f"the log of run {run.id} cannot be read: {error}") from error

    def outcome(self, run: RunRecord) -> Outcome | None:
        """Give how a run ended, None while it is active."""
        if run.outcome is None:
            return None
        # Of a run that was not understood no result is given out.
        return to_outcome(run, {} if run.outcome == "quarantined" else self.results(run))

    def ended(self, run_id: str) -> Outcome | None:
        """Give how the run with this id ended, None while it is active. Raises: UnknownRunError."""
        try:
            return self.outcome(self.run(run_id))
        except DamagedStateError:
            # A damaged row that was quarantined has at least an ending of our own writing.
            for ending in self._all("quarantined", run_id):
                return _quarantined(run_id, Ending.decode(ending[0]))
            raise


def _readable(rows: Iterable[Sequence[Any]]) -> Iterator[RunRecord]:
    for row in rows:
        try:
            yield to_record(row)
        except DamagedStateError as error:
            log.error("%s", error)


def _quarantined(run_id: str, end: Ending) -> Outcome:
    return Outcome(run_id, "quarantined", end.error_kind, end.reason, {}, None, None, None, {})


def to_outcome(run: RunRecord, results: Mapping[str, str], ending: Ending | None = None) -> Outcome:
    """Give the outcome of a run whose ending is decided: the one given, or that of its row."""
    end = ending or run.ending
    if end is None or run.outcome not in (None, end.kind):
        raise DamagedStateError(f"run {run.id} ended as {run.outcome}, its ending says {end}")
    return Outcome(
        run_id=run.id,
        kind=end.kind,
        error_kind=end.error_kind,
        reason=end.reason,
        detail=end.detail or {},
        step=end.step,
        successor=end.successor,
        value=end.value,
        results=results,
    )


@contextmanager
def open_lookup(
    path: str, *, migrations: Sequence[str] = (), application_id: int = APPLICATION_ID, patience_ms: int = 2000
) -> Iterator[Lookup | None]:
    """Read a state file without an engine and without writing; None when there is no file or nothing in it yet.

    Its `db` reads the program's own tables as well.

    None as well when migrations are still to be made: `open_engine` makes them. Raises: StateError and its kinds.
    """
    try:
        db = connect(path, query_only=True, busy_timeout_ms=patience_ms)
    except FileNotFoundError:
        yield None
        return
    try:
        scripts = [SCHEMA, *migrations]
        with translated(path):
            version = check_schema(db, path, scripts, application_id)
        yield Lookup(db, path) if version == len(scripts) else None
    finally:
        db.close()
