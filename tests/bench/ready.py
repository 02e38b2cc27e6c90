"""A ready image among many finished runs: the answer must cost the same after ten thousand of them.

The image is written down as a pull would have done it; its answer asks neither S3 nor root, so that neither is here.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from broker import imagefile, store
from broker.machine import ledger, open_engine
from broker.machine.records import Ending
from broker.pull import PULL
from tests.bench.harness import Case, Group, just, run

REF: Final = "s3://bucket/images/one"
LAYER: Final = "sha256:" + "a" * 64
RUNS: Final = 10_000
COMMAND: Final = (sys.executable, "-c", "from broker.cli import main; main()", "pull", REF, "--no-activate")


def group() -> Group:
    """Compare the answer after one run with the answer after ten thousand."""
    return Group(
        "ready image among finished runs",
        [
            Case("python -c pass", lambda: just(lambda: run([sys.executable, "-c", "pass"]))),
            Case("imgpull pull after 1 run", lambda: answering(1)),
            Case(f"imgpull pull after {RUNS:,} runs", lambda: answering(RUNS)),
        ],
        goal="0.15 s of CPU",
    )


@contextlib.contextmanager
def answering(runs: int) -> Iterator[Callable[[], None]]:
    """Prepare a user's state."""
    with tempfile.TemporaryDirectory(prefix="imgpull-bench-ready-") as folder:
        environment = prepare(Path(folder), runs)
        with just(lambda: run(COMMAND, env=environment)) as work:
            yield work


def prepare(home: Path, runs: int) -> dict[str, str]:
    """Write down one image and so many finished runs. Returns: the environment of the user who has them."""
    source = str(Path(__file__).resolve().parents[2])
    environment = {"PYTHONPATH": source, "PATH": os.environ["PATH"], "HOME": str(home), "LC_ALL": "C.UTF-8"}
    state = home / ".local/state/imgpull"
    state.mkdir(parents=True)
    trio.run(_fill, state, runs)
    return environment


async def _fill(state: Path, runs: int) -> None:
    async with open_engine(str(state / "imgpull.db"), machines=[PULL], migrations=store.MIGRATIONS) as engine:
        await engine.commit("bench", lambda entry: _finished(entry, runs))
        async with engine.transaction() as db:
            db.execute("INSERT INTO layer VALUES (?, NULL, 1, 1, 1, 1, 1, '{}', 1, 0)", (LAYER,))
            row = (1, "images/one/1.tar", '"e"', "", 1, "tar", LAYER, LAYER)
            store.record_image(db, REF, "", [row], LAYER)
            imagefile.publish(state / "images", db, REF, "")


def _finished(entry: ledger.Entry, runs: int) -> None:
    for number in range(runs):
        new = ledger.NewRun(
            id=f"{number:026d}", machine="pull", version=1, definition=PULL.digest, steps=("resolve", "ready"),
            key=store.pull_key(REF, ""), request="{}", queue=None, trace=None, wanted=True, not_before_ms=None,
            after=(),
        )  # fmt: skip
        ledger.finish(entry, ledger.insert(entry, new), Ending("done"))
