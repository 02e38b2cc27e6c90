"""How a run comes into being, or is found to be there already.

Rule 1: one active run for each machine and key; whoever asks again joins it.
Rule 2: a run never waits for itself: no run is a part of what it is made of, no predecessor is unknown.
"""

import secrets
from dataclasses import dataclass
from typing import Any, Final, Literal

from broker.machine import ledger
from broker.machine.definition import Machine
from broker.machine.ledger import Entry, NewRun
from broker.machine.records import Lookup, RunRecord
from broker.machine.signals import StoppedError, UsageError

_ULID_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # https://github.com/ulid/spec, "Encoding"


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that somebody asked for, checked as far as that needs no state file."""

    machine: Machine[Any]
    key: str
    request: str
    queue: str | None
    parent: str | None
    after: tuple[After | str, ...]
    not_before: float | None
    trace: str | None


def insert_or_join(entry: Entry, plan: Plan) -> tuple[RunRecord, bool]:
    """Give the run of a plan, and whether it is new. Raises: UnknownRunError, UsageError, StoppedError."""
    lookup = Lookup(entry.db)
    parent = None if plan.parent is None else _check_parent(lookup.run(plan.parent))
    predecessors = [(lookup.run(a.run_id).seq, str(a.policy)) for a in map(as_after, plan.after)]
    found = lookup.active(plan.machine.name, plan.key)
    if found is None and parent is not None:
        found = ledger.done_child(entry, parent.seq, plan.machine.name, plan.key, plan.request)
    if found is not None:
        return _join(entry, found, parent), False
    run = ledger.insert(entry, _new_run(entry, plan, predecessors))
    if parent is not None:
        ledger.link(entry, parent.seq, run.seq)
    return run, True


def _check_parent(parent: RunRecord) -> RunRecord:
    if not parent.active:
        raise UsageError(f"run {parent.id} has ended and starts no children")
    if parent.cancel_cause is not None:
        raise StoppedError(f"run {parent.id} is being cancelled and starts no children")
    return parent


def as_after(after: After | str) -> After:
    """Read a plain id as: with success."""
    return After(after) if isinstance(after, str) else after


def _join(entry: Entry, run: RunRecord, parent: RunRecord | None) -> RunRecord:
    if parent is None:
        return ledger.want(entry, run) if run.active else run
    if ledger.is_ancestor(entry, run.seq, parent.seq):
        raise UsageError(f"run {parent.id} cannot start {run.machine} {run.key}: it is itself a part of it")
    ledger.link(entry, parent.seq, run.seq)
    return run


def _new_run(entry: Entry, plan: Plan, predecessors: list[tuple[int, str]]) -> NewRun:
    machine = plan.machine
    assert machine.end_name is not None
    return NewRun(
        id=new_ulid(entry.now_ms),
        machine=machine.name,
        version=machine.version,
        definition=machine.digest,
        steps=(*machine.step_names, machine.end_name),
        key=plan.key,
        request=plan.request,
        queue=plan.queue,
        trace=plan.trace,
        wanted=plan.parent is None,
        not_before_ms=None if plan.not_before is None else int(plan.not_before * 1000),
        after=predecessors,
    )


def new_ulid(now_ms: int) -> str:
    """Make a run's id: 48 bits of time, for people, and 80 of chance. It says nothing about order."""
    number = (now_ms & (1 << 48) - 1) << 80 | secrets.randbits(80)
    return "".join(_ULID_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))
