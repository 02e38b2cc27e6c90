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

What a step must know. It is done *at least* once, so it must be able to find its own half-done work; its transaction is
committed *exactly* once: write domain facts by `Run.on_commit`. What it is given is decoded from the state file anew
for each attempt. It ends by returning its declared result, or by raising

    Done(result)     success now, the steps that are left are not run
    Abort(reason)    failure now
    Retry(reason)    again, after the policy's backoff
    Handoff(run_id)  another run does this work

Any other error is judged by the step's `Policy`; a programming error aborts in any case. An error inside a nursery
counts as if it had been raised without one. Cancellation and shutdown are none of these: a cancelled run ends as
"cancelled" with its cause, a run that is shut down goes on at the next start.

How a run can end (`Outcome.kind`): done, aborted, cancelled, handed_off, and quarantined, which is a run that this
version of the program cannot understand: an unknown machine, another definition, a damaged row.

Several processes may open one state file. A run belongs to the process that holds its lock, and the kernel frees the
lock when that process dies; whoever waits for the run then takes it over. Limits of queues are of a process. A step
that waits for what another run writes looks again whenever `Run.moved` is set.

What is read without an engine: `open_lookup(path)`, which writes nothing at all.

The parts: signals (what may be raised, and the judging of errors), definition (machines and policies), schema, database
(SQLite's settings, transactions, migrations), records (reading), checking, ledger (writing), ownership (locks), queues,
starting, view (what a step sees), runner (one run), engine (all runs of a process), opening, hooks.
"""

from broker.machine.checking import problems
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
    "problems",
]
