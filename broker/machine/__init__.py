"""A durable state machine for trio and SQLite: a crash at any instruction, and the next start goes on.

A machine is a line of named steps. A run of it takes a typed request through all of them; every step's result, together
with the program's own writes, is committed before the next begins. Whoever kills the process loses at most the attempt
at work, which is made again.

    pull = (
        Machine("pull", PullRequest, version=1)
        .start("resolve", resolve, result=Resolved, retry=Policy(attempts=5, deadline_s=60, retry_on=classify))
        .to("layers", layers, result=Layers)
        .end("ready")
    )

    async def resolve(run: Run[PullRequest]) -> Resolved:
        run.on_commit(lambda db: db.execute("INSERT …"))
        return Resolved(…)

    async with open_engine(path, machines=[pull], queues={"commit": 1}, migrations=[MY_TABLES], app=context) as engine:
        run = await engine.start(pull, "s3://bucket/images/golang", PullRequest(…))
        outcome = await engine.wait(run.id)

What a step must know: it is done *at least* once, so it must be able to find its own half-done work; its transaction is
committed *exactly* once.
"""

from broker.machine.definition import Machine, Policy
from broker.machine.engine import Engine
from broker.machine.hooks import Hooks
from broker.machine.opening import open_engine
from broker.machine.records import EventRecord, Lookup, Outcome, RunFailedError, RunRecord, open_lookup
from broker.machine.signals import (
    Abort,
    BusyStateError,
    DamagedStateError,
    DefinitionError,
    Done,
    ForeignStateError,
    Handoff,
    MachineError,
    Retry,
    StateError,
    StoppedError,
    UnknownRunError,
    UsageError,
)
from broker.machine.starting import After, Started
from broker.machine.view import Run

__all__ = [
    "Abort",
    "After",
    "BusyStateError",
    "DamagedStateError",
    "DefinitionError",
    "Done",
    "Engine",
    "EventRecord",
    "ForeignStateError",
    "Handoff",
    "Hooks",
    "Lookup",
    "Machine",
    "MachineError",
    "Outcome",
    "Policy",
    "Retry",
    "Run",
    "RunFailedError",
    "RunRecord",
    "Started",
    "StateError",
    "StoppedError",
    "UnknownRunError",
    "UsageError",
    "open_engine",
    "open_lookup",
]
