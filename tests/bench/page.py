"""The figures for people: a table in text, the page RESULTS.md, and what has drifted since the last kept run.

Rule 1: what stands in RESULTS.md between the two marks comes from here, all else is written by hand.
Rule 2: history/ keeps one small file a kept run; only ratios are compared, seconds are the machine's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tests.bench.harness import Row

HERE: Final = Path(__file__).resolve().parent
PAGE: Final = HERE / "RESULTS.md"
HISTORY: Final = HERE / "history"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
DRIFT: Final = 0.15  # of a ratio, against the median of the kept runs


def table(figures: Row) -> str:
    """Return all groups as text."""
    lines = [figures["machine"], f"load {figures['load_15']}; medians; a ratio is to the first case of its group", ""]
    for title, rows in _grouped(figures):
        goal = figures["goals"].get(title, "")
        lines.append(title + (f"  (goal: {goal})" if goal else ""))
        lines += [
            f"  {_ratio(row):>20}  {row['wall_s']:>9.2f} s  cpu {row['cpu_s']:>8.2f} s  {_note(row)}" for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def markdown(figures: Row) -> str:
    """Return all groups as a part of RESULTS.md."""
    lines = [f"Machine: {figures['machine']}. Load over 15 minutes: {figures['load_15']}.", ""]
    for title, rows in _grouped(figures):
        goal = figures["goals"].get(title, "")
        lines += [f"### {title[0].upper()}{title[1:]}", ""] + ([f"Goal: {goal}.", ""] if goal else [])
        lines += ["| | ratio (least to most) | wall | CPU |", "|---|---|---|---|"]
        lines += [f"| {_note(row)} | {_ratio(row)} | {row['wall_s']:.2f} s | {row['cpu_s']:.2f} s |" for row in rows]
        lines.append("")
    if counts := figures.get("counts"):
        shown = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
        lines += [
            f"System calls of one pull of the Debian layers, broker and workers, without the helper: {shown}.",
            "",
        ]
    return "\n".join(lines)


def _grouped(figures: Row) -> Iterable[tuple[str, list[Row]]]:
    titles = dict.fromkeys(row["group"] for row in figures["rows"])
    return [(title, [row for row in figures["rows"] if row["group"] == title]) for title in titles]


def _ratio(row: Row) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def _note(row: Row) -> str:
    note = str(row["case"])
    if "cost_us" in row:
        note += f", {row['cost_us']:g} µs each"
    if "peak_mib" in row:
        note += "; peak " + ", ".join(f"{name} {peak:.0f} MiB" for name, peak in row["peak_mib"].items())
    return note


def keep(figures: Row, name: str, picture: str) -> None:
    """Write the page, its picture and this run's file of the history."""
    text = PAGE.read_text("utf-8")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n\n{markdown(figures)}\n{after}", "utf-8")
    (HERE / "timeline.svg").write_text(picture, "utf-8")
    HISTORY.mkdir(exist_ok=True)
    kept = {"machine": figures["machine"], "ratios": ratios(figures)}
    (HISTORY / f"{name}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


def beside(figures: Row, earlier: Row) -> Row:
    """Return the figures with those of an earlier run's groups that this run has not measured."""
    measured = {row["group"] for row in figures["rows"]}
    rows = [row for row in earlier["rows"] if row["group"] not in measured] + figures["rows"]
    return {**figures, "rows": rows, "goals": {**earlier["goals"], **figures["goals"]}}


def ratios(figures: Row) -> dict[str, float]:
    """Return every ratio by its group and case."""
    return {f"{row['group']}: {row['case']}": row["ratio"] for row in figures["rows"]}


def drift(figures: Row, history: Path = HISTORY) -> list[str]:
    """Return the ratios that are further than DRIFT from the median of the kept runs."""
    kept: list[dict[str, Any]] = [json.loads(path.read_text("utf-8")) for path in sorted(history.glob("*.json"))]
    told = []
    for name, ratio in ratios(figures).items():
        earlier = [run["ratios"][name] for run in kept if name in run["ratios"]]
        if earlier and abs(ratio / (usual := statistics.median(earlier)) - 1) > DRIFT:
            told.append(f"{name}: {ratio:.2f} x, usually {usual:.2f} x")
    return told
