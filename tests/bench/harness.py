"""Runs cases in turn, round after round, and tells them as ratios: these machines are noisy, a second means nothing.

Rule 1: all cases of a group run in one round on the same data; the median of the rounds counts.
Rule 2: what a case needs is made before its clock starts and taken away after it stops.
Rule 3: every figure of a group stands beside the figure that its goal names; a goal is told, never asserted.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.memory import Watch

Prepare = Callable[[], contextlib.AbstractContextManager[Callable[[], None]]]
Row = dict[str, Any]


@dataclass(slots=True)
class Case:
    """One way of doing the work. ``prepare`` yields the function that is timed; ``units`` is how much work it is."""

    name: str
    prepare: Prepare
    units: float = 0
    starts: int = 1  # how often it does what ``idle`` of its group does once
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peaks: dict[str, int] = field(default_factory=dict)  # bytes of memory of each of our programs


@dataclass(slots=True)
class Group:
    """Cases that do the same work; the first is what the others are compared with.

    ``per`` names the units of the cases where they differ: then the ratio is of the costs of one unit, and ``idle``, if
    there is one, does the same work on nothing: what it takes is not part of the costs. ``by_cpu``: the ratios are of
    processor time, where a disk that slows down under gigabytes would hide how the program grows.
    """

    title: str
    cases: list[Case]
    goal: str = ""
    per: str = ""
    idle: Case | None = None
    rounds: int = 0  # at most; 0 for as many as asked for
    by_cpu: bool = False

    def run(self, rounds: int) -> None:
        """Run every case once a round."""
        for _ in range(min(rounds, self.rounds) if self.rounds else rounds):
            for case in [self.idle, *self.cases] if self.idle else self.cases:
                with case.prepare() as work, Watch(case.peaks):
                    os.sync()
                    before, began = _cpu_s(), time.monotonic()
                    work()
                    case.wall_s.append(time.monotonic() - began)
                    case.cpu_s.append(_cpu_s() - before)

    def rows(self) -> list[Row]:
        """Return a row a case: medians, and the ratio to the first case of the same round."""
        base = self.cases[-1] if self.idle else self.cases[0]  # the largest one says most surely what a unit costs
        theirs = self._work_s(base)
        rows = []
        for case in self.cases:
            share = base.units / case.units if self.per else 1.0
            work = self._work_s(case)
            ratios = [mine / other * share for mine, other in zip(work, theirs, strict=True)]
            row: Row = {
                "group": self.title,
                "case": case.name,
                "ratio": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "wall_s": round(statistics.median(case.wall_s), 3),
                "cpu_s": round(statistics.median(case.cpu_s), 3),
                "rounds": len(ratios),
            }
            if self.per:
                row["cost_us"] = round(statistics.median(work) / case.units * 1e6, 6)
            if case.peaks:
                row["peak_mib"] = {name: round(peak / (1 << 20), 1) for name, peak in sorted(case.peaks.items())}
            rows.append(row)
        return rows

    def _work_s(self, case: Case) -> list[float]:
        """Return what each round of a case took, without what it takes on nothing."""
        taken = case.cpu_s if self.by_cpu else case.wall_s
        if self.idle is None:
            return taken
        idle = self.idle.cpu_s if self.by_cpu else self.idle.wall_s
        share = case.starts / self.idle.starts
        return [mine - share * nothing for mine, nothing in zip(taken, idle, strict=True)]


ELSEWHERE: list[
    Callable[[], float]
] = []  # each tells the CPU time so far of programs that are not below us: the helper


def _cpu_s() -> float:
    """Return the CPU time of our children so far, and of the helper: what is measured runs in processes of its own."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + sum(tell() for tell in ELSEWHERE)


@contextlib.contextmanager
def just(work: Callable[[], object]) -> Iterator[Callable[[], None]]:
    """Need nothing."""

    def do() -> None:
        work()

    yield do


def run(command: Sequence[str | Path], **options: Any) -> str:
    """Run a command to its end and return its output, which is shown only when it fails."""
    done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{command}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return str(done.stdout)


def machine() -> str:
    """Return what the figures depend on."""
    model = next((line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory_kib = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    python = platform.python_version()
    return f"{os.cpu_count()} cores ({model}), {memory_kib >> 20} GiB, Linux {platform.release()}, Python {python}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8").splitlines()


def measure(groups: Sequence[Group], rounds: int) -> None:
    """Run the groups in turn, and tell on the way."""
    for group in groups:
        began = time.monotonic()
        print(f"measuring: {group.title}", file=sys.stderr, flush=True)
        group.run(rounds)
        print(f"           {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def result(groups: Sequence[Group]) -> Row:
    """Return all figures."""
    goals = {group.title: group.goal for group in groups}
    load = round(os.getloadavg()[2], 2)
    return {
        "machine": machine(),
        "load_15": load,
        "goals": goals,
        "rows": [row for group in groups for row in group.rows()],
    }


def write(figures: Row, path: Path) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", "utf-8")
