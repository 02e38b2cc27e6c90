"""How a program looks into its runs: metrics, traces, and the tests' crash points.

Rule 1: a hook is told after the fact is durable; it decides nothing.
Rule 2: an error of `event` is logged and goes no further: a broken metric must not stop work.
"""

from collections.abc import Callable
from dataclasses import dataclass

from broker.machine.records import EventRecord, RunRecord


def no_point(name: str) -> None:
    """Do nothing at a crash point."""


def no_event(run: RunRecord, event: EventRecord) -> None:
    """Do nothing about an event."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the engine calls. Both are synchronous and must be quick.

    point: called with ``NAME:before`` when all writes of a transaction are made and its COMMIT comes next, and with
        ``NAME:after`` when it is durable. For tests that kill the process there. An error it raises undoes (before) or
        stops (after) the work. The names of a machine are `Machine.points`.
    event: called after the commit with the run and each event that was appended.
    """

    point: Callable[[str], None] = no_point
    event: Callable[[RunRecord, EventRecord], None] = no_event
