"""How an engine is opened and closed.

Rule 1: nothing is written to a state file that needs no migration and has nothing to resume.
Rule 2: whatever ends the block, the runs are left in an order from which the next start goes on.
"""

import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from broker.machine.database import APPLICATION_ID, PATIENCE_S, Database
from broker.machine.definition import Machine
from broker.machine.engine import Engine, Resume, check_setting
from broker.machine.hooks import Hooks
from broker.machine.ownership import Ownership


@asynccontextmanager
async def open_engine(
    path: str,
    *,
    machines: Sequence[Machine[Any]],
    app: Any = None,
    queues: Mapping[str, int] | None = None,
    migrations: Sequence[str] = (),
    hooks: Hooks | None = None,
    resume: Resume = "all",
    grace_s: float = 10.0,
    clock: Callable[[], float] = time.time,
    rng: random.Random | None = None,
    poll_s: float = 0.1,
    patience_s: float = PATIENCE_S,
    application_id: int = APPLICATION_ID,
) -> AsyncIterator[Engine]:
    """Open the state file, resume what dead processes left, and give the engine; stop it at the end of the block.

    `resume`: "all" takes over every run without an owner, in order, before this returns; "related" only what this
    process starts or waits for; "none" only what it starts. The children and predecessors of a run go with it.

    When the block ends, steps at work are given `grace_s` to finish; when it raises, they are cut at once. An error of
    the block comes out as it is, not in a group. `poll_s` is how often other processes' runs are looked at,
    `patience_s` how long their lock on the file is waited for.

    Raises: DefinitionError, StateError and its kinds.
    """
    hooks = hooks or Hooks()
    check_setting(machines, queues or {})
    rng = rng or random.Random()  # noqa: S311  jitter needs no secrecy
    database = await Database.open(path, migrations, application_id, point=hooks.point, patience_s=patience_s)
    failure: BaseException | None = None
    try:
        with Ownership(f"{path}-owners") as ownership:
            async with trio.open_nursery() as nursery:
                engine = Engine(
                    database, ownership, nursery, machines, queues or {}, app, hooks, clock, rng, resume, poll_s
                )
                nursery.start_soon(engine.watch)
                try:
                    if resume == "all":
                        await engine.resume()
                    engine.opened.set()
                    yield engine
                except BaseException as error:
                    failure = error
                with trio.CancelScope(shield=True):
                    await engine.shutdown(grace_s=grace_s if failure is None else 0)
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
    except BaseException as crash:
        if failure is not None and crash is not failure:
            crash.add_note(f"the program's own block had ended with {failure!r}")
        raise
    finally:
        del failure  # an exception that its own frame refers to is a cycle
        database.close()
