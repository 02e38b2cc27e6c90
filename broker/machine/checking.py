"""Whether a state file holds together, for a doctor: everything that can be wrong, and nothing repaired."""

import sqlite3
from typing import Final

from broker.machine.records import COLUMNS, Lookup, RunRecord, to_record
from broker.machine.signals import DamagedStateError

_LIMIT: Final = 100  # problems that are listed; who has that many needs no more


def problems(lookup: Lookup) -> list[str]:
    """Say what is wrong with the state file, in sentences; an empty list if nothing is.

    SQLite's own check of every page and index, foreign keys, the digest of each run and result, and that each active
    run has the results of the steps before its cursor.
    """
    db = lookup.db
    try:
        found = [row[0] for row in db.execute(f"PRAGMA integrity_check({_LIMIT})").fetchall()]
        if found != ["ok"]:
            return [f"SQLite: {text}" for text in found]
        found = [
            f"{row[0]} row {row[1]} refers to a missing {row[2]}" for row in db.execute("PRAGMA foreign_key_check")
        ]
        for row in db.execute(f"SELECT {COLUMNS} FROM run ORDER BY seq").fetchall():  # noqa: S608  constant
            found += _of_run(lookup, row)
    except (sqlite3.DatabaseError, DamagedStateError) as error:
        return [str(error)]
    return found[:_LIMIT]


def _of_run(lookup: Lookup, row: tuple[object, ...]) -> list[str]:
    try:
        run = to_record(row)
        results = lookup.results(run)
        completed = {event.step for event in lookup.events(run) if event.type == "complete"}
    except DamagedStateError as error:
        return [str(error)]
    return _against_log(run, set(results), completed)


def _against_log(run: RunRecord, results: set[str], completed: set[str | None]) -> list[str]:
    before = set(run.steps[: run.cursor])
    found = []
    if completed != before:
        found.append(f"run {run.id} is at {run.step}, its log completed {sorted(map(str, completed))}")
    if not results <= before:
        found.append(f"run {run.id} is at {run.step} and has results of {sorted(results - before)}")
    return found
