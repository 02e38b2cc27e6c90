"""Runs cases in turn, round after round, and tells them as ratios: these machines are noisy, a second means nothing.

Rule 1: all cases of a group run in one round on the same data; the median of the rounds counts.
Rule 2: what a case needs is made before its clock starts and taken away after it stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Prepare = Callable[[], contextlib.AbstractContextManager[Callable[[], None]]]


@dataclass(slots=True)
class Case:
    """One way of doing the work. ``prepare`` yields the function that is timed."""

    name: str
    prepare: Prepare
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Group:
    """Cases that do the same work; the first is what the others are compared with."""

    title: str
    cases: list[Case]
    goal: str = ""

    def run(self, rounds: int) -> None:
        """Run every case once a round."""
        for _ in range(rounds):
            for case in self.cases:
                with case.prepare() as work:
                    os.sync()
                    before, began = _cpu_s(), time.monotonic()
                    work()
                    case.wall_s.append(time.monotonic() - began)
                    case.cpu_s.append(_cpu_s() - before)

    def rows(self) -> list[dict[str, object]]:
        """Return a row a case: medians, and the ratio to the first case of the same round."""
        base = self.cases[0]
        rows = []
        for case in self.cases:
            ratios = [mine / theirs for mine, theirs in zip(case.wall_s, base.wall_s, strict=True)]
            rows.append(
                {
                    "group": self.title,
                    "case": case.name,
                    "ratio": round(statistics.median(ratios), 3),
                    "wall_s": round(statistics.median(case.wall_s), 3),
                    "cpu_s": round(statistics.median(case.cpu_s), 3),
                }
            )
        return rows


def _cpu_s() -> float:
    """Return the CPU time of our children so far: everything that is measured runs in a process of its own."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextlib.contextmanager
def just(work: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Need nothing."""
    yield work


def run(command: Sequence[str | Path], **options: object) -> None:
    """Run a command to its end; its output is shown only when it fails."""
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr[-2000:]}")


def report(groups: Sequence[Group], rounds: int, out: Path) -> str:
    """Write the figures as JSON and return them as a table for people."""
    machine = f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}"
    rows = [row for group in groups for row in group.rows()]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "rounds": rounds, "rows": rows}, indent=2) + "\n")
    lines = [f"{machine}; medians of {rounds} rounds; a ratio is to the first case of its group", ""]
    for group in groups:
        lines.append(group.title + (f"  (goal: {group.goal})" if group.goal else ""))
        for row in group.rows():
            lines.append(
                f"  {row['ratio']:>7.2f} x  {row['wall_s']:>8.2f} s  cpu {row['cpu_s']:>7.2f} s  {row['case']}"
            )
        lines.append("")
    return "\n".join(lines)
