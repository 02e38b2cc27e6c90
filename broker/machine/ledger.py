"""Every write of the library: plain functions on a connection that is inside a transaction.

Rule 1: a run moves only from where its writer believed it to be: each update names cursor and attempt, and changes one
    row or raises. Whoever works with an old picture is stopped and not obeyed.
Rule 2: each movement appends its event in the same transaction.
Rule 3: each row of a run carries a digest of itself, so that a damaged one is noticed and not worked from.
"""

# ruff: noqa: S608  statements are put together from COLUMNS and this module's own column names only

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import JsonValue

from broker.machine.records import COLUMNS, SEALED, Ending, EventRecord, RunRecord, seal, to_record
from broker.machine.signals import StateError


@dataclass(slots=True)
class Entry:
    """A transaction's own view: the connection, the time, and what has to be told when it is committed."""

    db: sqlite3.Connection
    now_ms: int
    events: list[tuple[int, EventRecord]] = field(default_factory=list)  # with the run's number
    cancelled: list[int] = field(default_factory=list)  # runs that are asked to end

    def append(
        self,
        run: int,
        type_: str,
        payload: Mapping[str, JsonValue] | None = None,
        *,
        step: str | None = None,
        attempt: int | None = None,
    ) -> None:
        """Append an event to a run's log."""
        cursor = self.db.execute(
            "INSERT INTO event (run, type, step, attempt, payload, at_ms) VALUES (?, ?, ?, ?, ?, ?)",
            (run, type_, step, attempt, json.dumps(payload or {}), self.now_ms),
        )
        assert cursor.lastrowid is not None
        self.events.append((run, EventRecord(cursor.lastrowid, type_, step, attempt, payload or {}, self.now_ms)))

    def raw(self, seq: int) -> dict[str, Any] | None:
        """Read a run's columns, unchecked."""
        row = self.db.execute(f"SELECT {COLUMNS} FROM run WHERE seq = ?", (seq,)).fetchone()
        return None if row is None else dict(zip(RunRecord.__slots__, row, strict=True))

    def get(self, seq: int) -> RunRecord:
        """Read a run as this transaction sees it. Raises: StateError, DamagedStateError."""
        row = self.db.execute(f"SELECT {COLUMNS} FROM run WHERE seq = ?", (seq,)).fetchone()
        if row is None:
            raise StateError(f"run number {seq} is gone")
        return to_record(row)

    def move(self, run: RunRecord, **values: str | int | None) -> RunRecord:
        """Change a run that is still where `run` says. Raises: StateError when it is not."""
        now = self.get(run.seq)
        if (now.cursor, now.attempt, now.outcome) != (run.cursor, run.attempt, None):
            raise StateError(f"run {run.id} is not at {run.step}, attempt {run.attempt}: someone else moved it")
        self.put(run.seq, values)
        return self.get(run.seq)

    def put(self, seq: int, values: Mapping[str, str | int | None]) -> None:
        """Change columns of an active run and seal it anew."""
        raw = self.raw(seq)
        assert raw is not None
        raw |= {**values, "updated_ms": self.now_ms}
        raw["seal"] = seal(raw[name] for name in SEALED)
        changes = {name: raw[name] for name in (*values, "updated_ms", "seal")}
        assignments = ", ".join(f"{name} = ?" for name in changes)
        self.db.execute(f"UPDATE run SET {assignments} WHERE seq = ?", (*changes.values(), seq))


@dataclass(frozen=True, slots=True)
class NewRun:
    """What is known of a run before it exists."""

    id: str
    machine: str
    version: int
    definition: str
    steps: Sequence[str]
    key: str
    request: str
    queue: str | None
    trace: str | None
    wanted: bool
    not_before_ms: int | None
    after: Sequence[tuple[int, str]]


def insert(entry: Entry, new: NewRun) -> RunRecord:
    """Make a run."""
    cursor = entry.db.execute(
        "INSERT INTO run (id, machine, version, definition, steps, key, request, queue, trace, wanted, not_before_ms,"
        " created_ms, updated_ms, seal) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '')",
        (
            *(new.id, new.machine, new.version, new.definition, json.dumps(list(new.steps)), new.key, new.request),
            *(new.queue, new.trace, int(new.wanted), new.not_before_ms, entry.now_ms, entry.now_ms),
        ),
    )
    seq = cursor.lastrowid
    assert seq is not None
    entry.put(seq, {})
    entry.db.executemany(
        "INSERT INTO run_after (run, predecessor, policy) VALUES (?, ?, ?)", [(seq, *pair) for pair in new.after]
    )
    entry.append(seq, "start", {"key": new.key, "version": new.version})
    return entry.get(seq)


def link(entry: Entry, parent: int, child: int) -> None:
    """Make `child` a child of `parent`; twice is once."""
    entry.db.execute("INSERT OR IGNORE INTO run_child (parent, child) VALUES (?, ?)", (parent, child))


def want(entry: Entry, run: RunRecord) -> RunRecord:
    """Note that a run is wanted for its own sake, so that no parent's end takes it along."""
    return run if run.wanted else entry.move(run, wanted=1)


def is_ancestor(entry: Entry, run: int, of: int) -> bool:
    """Say whether `run` is `of` or above it."""
    found = entry.db.execute(
        "WITH RECURSIVE up(seq) AS (SELECT ? UNION SELECT c.parent FROM run_child c JOIN up ON c.child = up.seq)"
        " SELECT 1 FROM up WHERE seq = ?",
        (of, run),
    ).fetchone()
    return found is not None


def done_child(entry: Entry, parent: int, machine: str, key: str, request: str) -> RunRecord | None:
    """Give the child that has already done this request for this parent."""
    row = entry.db.execute(
        f"SELECT {COLUMNS} FROM run WHERE seq IN (SELECT child FROM run_child WHERE parent = ?)"
        " AND machine = ? AND key = ? AND request = ? AND outcome = 'done' ORDER BY seq DESC LIMIT 1",
        (parent, machine, key, request),
    ).fetchone()
    return None if row is None else to_record(row)


def resume(entry: Entry, run: RunRecord) -> RunRecord:
    """Note that a process took the run over; a death that was no orderly stop counts."""
    crashes = run.crashes + (0 if run.parked else 1)
    entry.append(run.seq, "resume", {"crashes": crashes}, step=run.step, attempt=run.attempt)
    return entry.move(run, crashes=crashes, parked=0)


def park(entry: Entry, run: RunRecord) -> RunRecord:
    """Note that a run was left in good order, to be resumed."""
    entry.append(run.seq, "park", step=run.step, attempt=run.attempt)
    return entry.move(run, parked=1)


def complete(
    entry: Entry, run: RunRecord, result: str | None, duration_ms: int, ending: Ending | None, *, final: bool
) -> RunRecord:
    """Move a run over the step it is at; the last step brings the ending, `final` the outcome as well."""
    if result is not None:
        entry.db.execute(
            "INSERT INTO run_result (run, step, value, seal) VALUES (?, ?, ?, ?)",
            (run.seq, run.step, result, seal((run.seq, run.step, result))),
        )
    entry.append(run.seq, "complete", {"duration_ms": duration_ms}, step=run.step, attempt=run.attempt)
    moved = entry.move(
        run,
        cursor=run.cursor + 1,
        attempt=1,
        spent_ms=0,
        due_ms=None,
        delay_ms=None,
        crashes=0,
        last_error=None,
        ending=ending.encode() if ending else None,
    )
    return finish(entry, moved) if final else moved


def fail(entry: Entry, run: RunRecord, error: str, kind: str, duration_ms: int, delay_ms: int) -> RunRecord:
    """Note a failed attempt and when the next is due."""
    payload: dict[str, JsonValue] = {"reason": error, "kind": kind, "duration_ms": duration_ms, "delay_ms": delay_ms}
    entry.append(run.seq, "retry", payload, step=run.step, attempt=run.attempt)
    return entry.move(
        run,
        attempt=run.attempt + 1,
        spent_ms=run.spent_ms + duration_ms + delay_ms,
        due_ms=entry.now_ms + delay_ms,
        delay_ms=delay_ms,
        last_error=error,
    )


def decide(entry: Entry, run: RunRecord, ending: Ending, duration_ms: int, *, final: bool) -> RunRecord:
    """Note how a run ends, in the middle of a step; `final` writes the outcome as well."""
    payload: dict[str, JsonValue] = {"kind": ending.kind, "reason": ending.reason, "duration_ms": duration_ms}
    entry.append(run.seq, "stop", payload, step=run.step, attempt=run.attempt)
    moved = entry.move(run, ending=ending.encode())
    return finish(entry, moved) if final else moved


def finish(entry: Entry, run: RunRecord, ending: Ending | None = None) -> RunRecord:
    """Write the outcome: the ending given, or the one that was decided before.

    A run that is aborted takes the children along that nobody else wants.
    """
    ending = ending or run.ending
    assert ending is not None
    payload: dict[str, JsonValue] = {"outcome": ending.kind, "error_kind": ending.error_kind, "reason": ending.reason}
    entry.append(run.seq, "finish", payload, step=ending.step)
    ended = entry.move(run, ending=ending.encode(), outcome=ending.kind)
    if ending.kind in ("aborted", "cancelled"):
        for child in _unwanted_children(entry, run.seq):
            request_cancel(entry, child, f"{run.machine} {run.key}, which needed it, was {ending.kind}")
    return ended


def quarantine(entry: Entry, seq: int, reason: str) -> None:
    """End a run that cannot be understood; nothing of its row is trusted but its number."""
    ending = Ending("quarantined", error_kind="quarantined", reason=reason)
    entry.append(seq, "finish", {"outcome": "quarantined", "error_kind": "quarantined", "reason": reason})
    entry.put(seq, {"ending": ending.encode(), "outcome": "quarantined"})


def request_cancel(entry: Entry, run: RunRecord, cause: str) -> list[int]:
    """Ask for the end of a run and of the children that nobody else wants; give the numbers of all of them.

    A child is taken along when it was started only as a child and no parent of it stays.
    """
    asked: list[int] = []
    waiting = [run]
    while waiting:
        next_run = waiting.pop(0)
        if not next_run.active or next_run.cancel_cause is not None or next_run.ending is not None:
            continue
        entry.move(next_run, cancel_cause=cause)
        entry.append(next_run.seq, "cancel", {"cause": cause}, step=next_run.step, attempt=next_run.attempt)
        asked.append(next_run.seq)
        waiting += _unwanted_children(entry, next_run.seq)
    entry.cancelled += asked
    return asked


def _unwanted_children(entry: Entry, seq: int) -> list[RunRecord]:
    rows = entry.db.execute(
        f"SELECT {COLUMNS} FROM run WHERE seq IN (SELECT child FROM run_child WHERE parent = ?)"
        " AND outcome IS NULL AND cancel_cause IS NULL AND wanted = 0"
        " AND NOT EXISTS (SELECT 1 FROM run_child c JOIN run p ON p.seq = c.parent"
        " WHERE c.child = run.seq AND p.outcome IS NULL AND p.cancel_cause IS NULL) ORDER BY seq",
        (seq,),
    ).fetchall()
    return [to_record(row) for row in rows]


def prune(entry: Entry, before_ms: int, limit: int) -> int:
    """Delete finished runs that were last touched before a time, and their logs; give how many.

    One that an active run still refers to stays.
    """
    seqs = entry.db.execute(
        "SELECT seq FROM run WHERE outcome IS NOT NULL AND updated_ms < ?"
        " AND NOT EXISTS (SELECT 1 FROM run_after a JOIN run r ON r.seq = a.run"
        " WHERE a.predecessor = run.seq AND r.outcome IS NULL)"
        " AND NOT EXISTS (SELECT 1 FROM run_child c JOIN run p ON p.seq = c.parent"
        " WHERE c.child = run.seq AND p.outcome IS NULL) ORDER BY updated_ms LIMIT ?",
        (before_ms, limit),
    ).fetchall()
    entry.db.executemany("DELETE FROM run WHERE seq = ?", seqs)
    entry.db.executemany("DELETE FROM event WHERE run = ?", seqs)  # after the run: see the trigger
    return len(seqs)
