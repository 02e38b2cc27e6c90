"""The bench's own arithmetic: ratios, drift, the picture and the page. What it measures is never asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import page, timeline
from tests.bench.harness import Case, Group, just, result


def group(per: str = "") -> Group:
    """Return a group of two cases that have been run three times."""
    slow, fast = Case("tar", lambda: just(int), units=100), Case("ours", lambda: just(int), units=50)
    slow.wall_s, slow.cpu_s = [2.0, 4.0, 8.0], [1.0, 1.0, 1.0]
    fast.wall_s, fast.cpu_s = [1.0, 4.0, 2.0], [0.5, 0.5, 0.5]
    return Group("work", [slow, fast], goal="at most 1.0 x", per=per)


def test_a_ratio_is_the_median_of_the_rounds_and_not_of_the_medians() -> None:
    first, second = group().rows()
    assert (first["ratio"], second["ratio"]) == (1.0, 0.5)
    assert (second["ratio_min"], second["ratio_max"]) == (0.25, 1.0)
    assert "cost_us" not in second


def test_costs_of_one_unit_are_compared_where_the_cases_differ_in_size() -> None:
    first, second = group(per="entry").rows()
    assert (second["ratio"], second["ratio_max"]) == (1.0, 2.0)
    assert (first["cost_us"], second["cost_us"]) == (40_000.0, 40_000.0)


def test_what_an_empty_layer_takes_is_no_part_of_the_cost() -> None:
    grown = group(per="entry")
    grown.idle = Case("nothing", lambda: just(int))
    grown.idle.wall_s, grown.idle.cpu_s = [0.5, 2.0, 1.0], [0.1, 0.1, 0.1]
    first, second = grown.rows()
    assert (second["ratio"], first["ratio"]) == (1.0, 1.5)  # the median of 1.5, 0.5 and 3.5
    assert second["cost_us"] == 20_000.0


def test_small_amounts_are_done_often_and_pay_for_each_start() -> None:
    grown = group(per="entry")
    grown.idle = Case("nothing", lambda: just(int), starts=10)
    grown.idle.wall_s, grown.idle.cpu_s = [5.0, 5.0, 5.0], [1.0, 1.0, 1.0]
    grown.cases[0].starts = 4
    assert [row["ratio"] for row in grown.rows()] == [0.286, 1.0]  # the median of 0, 0.29 and 2
    grown.by_cpu = True
    first, second = grown.rows()
    assert (first["ratio"], second["ratio"]) == (0.75, 1.0)  # 0.6 s for a hundred beside 0.4 s for fifty
    assert (first["cost_us"], second["cost_us"]) == (6_000.0, 8_000.0)


def test_every_case_runs_once_a_round_in_turn() -> None:
    order: list[str] = []
    cases = [Case(name, lambda name=name: just(lambda: order.append(name))) for name in "ab"]  # type: ignore[misc]
    Group("work", cases, rounds=2).run(5)
    assert order == ["a", "b", "a", "b"]
    assert [len(case.wall_s) for case in cases] == [2, 2]


EVENTS: list[dict[str, Any]] = [
    {"type": "begin", "time": 100.0, "layers": [{"layer": "<2>"}, {"layer": "1"}]},
    {"type": "stage", "time": 100.0, "layer": "1", "stage": "fetching"},
    {"type": "stage", "time": 101.0, "layer": "1", "stage": "checking"},
    {"type": "stage", "time": 101.5, "layer": "<2>", "stage": "fetching"},
    {"type": "stage", "time": 102.0, "layer": "1", "stage": "waiting"},
    {"type": "stage", "time": 103.0, "layer": "1", "stage": "committing"},
    {"type": "result", "time": 104.0},
]


def test_bars_of_a_timeline() -> None:
    assert timeline.bars(EVENTS) == [
        ("1", "fetching", 0.0, 1.0),
        ("1", "checking", 1.0, 2.0),
        ("<2>", "fetching", 1.5, 4.0),
        ("1", "committing", 3.0, 4.0),
    ]
    picture = timeline.svg(EVENTS, "a & b")
    assert picture.count("<rect") == 1 + len(timeline.COLOURS) + 4
    assert picture.index(">&lt;2&gt;<") < picture.index(">1<"), "lowest first, whichever began first"
    assert "a &amp; b" in picture


def test_drift_is_told_against_the_median_of_the_kept_runs(tmp_path: Path) -> None:
    figures = result([group()])
    for number, ratio in enumerate((0.2, 0.3, 9.0)):
        (tmp_path / f"{number}.json").write_text(json.dumps({"ratios": {"work: ours": ratio, "work: tar": 1.0}}))
    assert page.drift(figures, tmp_path) == ["work: ours: 0.50 x, usually 0.30 x"]
    assert page.drift(figures, tmp_path / "none") == []


def test_a_group_that_is_measured_again_takes_the_place_of_the_earlier_one() -> None:
    earlier, now = result([group(), Group("other work", group().cases, goal="none")]), result([group(per="entry")])
    both = page.beside(now, earlier)
    assert [row["group"] for row in both["rows"]] == ["other work", "other work", "work", "work"]
    assert both["rows"][2:] == now["rows"]
    assert both["goals"] == {"work": "at most 1.0 x", "other work": "none"}


def test_the_page_keeps_what_people_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "HERE", tmp_path)
    monkeypatch.setattr(page, "PAGE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(page, "HISTORY", tmp_path / "history")
    page.PAGE.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.keep(result([group()]), "one", "<svg/>")
    text = page.PAGE.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ours | 0.50 (0.25 to 1.00) | 2.00 s | 0.50 s |" in text
    assert json.loads((tmp_path / "history/one.json").read_text())["ratios"] == {"work: ours": 0.5, "work: tar": 1.0}
    assert "work" in page.table(result([group()]))
