import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import console
from broker.console import Column, JsonReporter, PlainReporter, TtyReporter, escape, size, table
from broker.errors import CATALOGUE, ImgpullError, Problem


@given(st.text(st.characters(codec=None, categories=None)))
def test_no_escaped_text_can_command_a_terminal(text: str) -> None:
    shown = escape(text)
    assert shown.isprintable()
    shown.encode("utf-8")


def test_attack_by_terminal_escape_in_a_file_name_is_shown_not_obeyed() -> None:
    assert escape("\x1b]0;pwned\x07\x1b[2J\n") == "\\x1b]0;pwned\\x07\\x1b[2J\\n"
    assert escape(b"\xff".decode("utf-8", "surrogateescape")) == "\\xff"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (143_595_520, "143.6 MB"), (10**13, "10.0 TB")]
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


ROWS = [{"name": "b", "bytes": 5}, {"name": "a", "bytes": 1_000_000}]
COLUMNS = [Column("name", lambda r: r["name"]), Column("bytes", lambda r: r["bytes"], size, right=True)]


def test_table_for_people() -> None:
    assert table(ROWS, COLUMNS) == "NAME   BYTES\nb        5 B\na     1.0 MB"


def test_table_for_scripts() -> None:
    assert table(ROWS, COLUMNS, exact=True, no_header=True, sort="-bytes") == "a\t1000000\nb\t5"
    assert table(ROWS, COLUMNS, chosen="bytes", exact=True) == "bytes\n5\n1000000"
    assert json.loads(table(ROWS, COLUMNS, sort="name", as_json=True))[0] == {"name": "a", "bytes": 1_000_000}


def test_unknown_column_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="no column 'x': there are name, bytes"):
        table(ROWS, COLUMNS, chosen="x")


def play(reporter: console.Reporter) -> None:
    reporter.begin("s3://bucket/img", [("k1", "img/1.tar", 1000), ("k2", "img/2.tar", 2000)])
    reporter.stage("k1", "shared")
    reporter.stage("k2", "fetching", 0, 2000)
    reporter.stage("k2", "fetching", 500, 2000)
    reporter.stage("k2", "checking", 0)
    reporter.stage("k2", "ready")
    reporter.notice("a \x1b notice")
    reporter.close()


def test_plain_progress_has_one_line_a_change() -> None:
    out = io.StringIO()
    play(PlainReporter(out))
    assert out.getvalue().splitlines() == [
        "s3://bucket/img: 2 layers",
        "img/1.tar: shared",
        "img/2.tar: fetching, 2.0 kB",
        "img/2.tar: checking",
        "img/2.tar: ready",
        "a \\x1b notice",
    ]


def test_json_progress_is_one_object_a_line() -> None:
    out = io.StringIO()
    play(JsonReporter(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["type"] for e in events[:3]] == ["begin", "stage", "stage"]
    assert all(e["v"] == 1 for e in events)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_bars_fit_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    reporter = TtyReporter(out)
    reporter._console._force_terminal = True
    reporter.begin("s3://bucket/" + "x" * 300, [("k", "a-very-long-folder-name/1.tar", 10**9)])
    reporter.stage("k", "fetching", 5 * 10**8, 10**9)
    for row in reporter._render().renderables:
        assert len(row.plain) < columns
    reporter.close()


def test_problem_is_three_lines_or_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    problem = ImgpullError("no-room", "pool full", "needs 5 GB, has 1 GB", figures={"need": 5}).problem
    console.print_problem(problem, as_json=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "imgpull: pool full"
    assert lines[1].startswith("  why:  needs 5 GB")
    assert lines[2].startswith("  next: remove images")
    console.print_problem(problem, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["type"], found["code"], found["exit"], found["details"]) == (
        "error",
        "no-room",
        73,
        {"figures": {"need": 5}},
    )


def test_every_code_has_a_sysexits_code_and_advice() -> None:
    for code, kind in CATALOGUE.items():
        assert kind.exit_code in {2, 65, 66, 69, 70, 73, 74, 75, 76, 77, 78}, code
        assert kind.title.endswith(".") and kind.advice


def test_problem_survives_the_database() -> None:
    problem = Problem("archive-rejected", "x", "y", "z", {"violations": [{"rule": "r"}]})
    assert Problem.load(problem.dump()) == problem
    assert Problem.load("garbage").code == "bug"
    assert Problem.load('{"code": "nonsense", "what": "x"}').code == "bug"


def test_total_counts_layers_that_are_fetched_already(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = TtyReporter(io.StringIO())
    reporter.begin("s3://bucket/img", [("a", "img/1.tar", 100), ("b", "img/2.tar", 300), ("c", "img/3.tar", 50)])
    reporter.stage("a", "fetching", 100, 100)
    reporter.stage("b", "fetching", 150, 300)
    reporter.stage("a", "committing", 0, 70)
    reporter.stage("c", "shared")
    assert reporter._total() == "1/3 layers  250 B of 400 B  s3://bucket/img"
    reporter.close()


def test_waiting_is_told_apart_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("broker.console.time.monotonic", lambda: now_s[0])
    reporter = console.Reporter()
    reporter.begin("s3://bucket/img", [("a", "img/1.tar", 100)])
    told = (("fetching", 0), ("fetching", 100), ("waiting", 0), ("checking", 100), ("committing", 70), ("ready", 0))
    for (stage, done), passed_s in zip(told, (1, 1, 1, 4, 8, 16), strict=True):
        now_s[0] += passed_s
        reporter.stage("a", stage, done)
    (row,) = reporter.timing()
    assert row == {
        "layer": "img/1.tar", "waited_s": 5.0, "fetch_s": 2.0, "fetch_bytes": 100, "check_s": 8.0, "check_bytes": 100,
        "commit_s": 16.0, "commit_bytes": 70,
    }  # fmt: skip


def test_locale_that_cannot_write_a_name_gets_it_escaped() -> None:
    command = "from broker.cli import imgpull; imgpull(['show', 'g\\u00f6\\u4e2d'])"
    environment = {"PYTHONIOENCODING": "latin-1", "HOME": "/nonexistent", "PATH": "/usr/bin"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", command], cwd=root, env=environment, capture_output=True, check=False)
    assert done.stderr.startswith(b"imgpull: g\xf6\\u4e2d: no such image here")


def test_rate_is_of_the_bytes_that_were_seen_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who joins another process's work late does not count what was there before."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    reporter = TtyReporter(stream)
    reporter._console.width = 120
    reporter.begin("image", [("k", "one/1.tar", 10_000)])
    reporter.stage("k", "fetching", 5_000, 10_000)
    assert "/s" not in str(reporter._row(reporter.lines["k"], 120, 20))
    now[0] += 2
    reporter.stage("k", "fetching", 6_000, 10_000)
    assert " 500 B/s" in str(reporter._row(reporter.lines["k"], 120, 20))
    reporter.close()


WIDE = [{"name": "s3://bucket/images/golang", "bytes": 5}, {"name": "s3://bucket/images/node", "bytes": 6}]


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            None,
            [
                "NAME                       BYTES",
                "s3://bucket/images/golang    5 B",
                "s3://bucket/images/node      6 B",
            ],
        ),
        (
            32,
            [
                "NAME                       BYTES",
                "s3://bucket/images/golang    5 B",
                "s3://bucket/images/node      6 B",
            ],
        ),
        (24, ["NAME               BYTES", "…et/images/golang    5 B", "…cket/images/node    6 B"]),
        (19, ["NAME          BYTES", "…ages/golang    5 B", "…images/node    6 B"]),
        (18, ["name   s3://bucket/images/golang", "bytes  5 B", "", "name   s3://bucket/images/node", "bytes  6 B"]),
    ],
)
def test_table_fits_the_terminal(columns: int | None, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest text loses its beginning; where even that does not help, each row becomes a paragraph."""
    monkeypatch.setattr(console, "terminal_width", lambda: columns)
    assert table(WIDE, COLUMNS).splitlines() == lines


def test_only_a_terminal_has_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert console.terminal_width() is None
    assert table(WIDE, COLUMNS).splitlines()[1] == "s3://bucket/images/golang    5 B"


def test_text_hangs_below_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert console.folded("busy  ", "Somebody else holds it.") == "busy  Somebody else holds it."
    monkeypatch.setattr(console, "terminal_width", lambda: 20)
    assert console.folded("busy  ", "Somebody else holds it.") == "busy  Somebody else\n      holds it."
    assert console.folded(" " * 12, "Somebody else") == " " * 12 + "Somebody else", "no room to hang in"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", b"1.tar, ... -> x \\xe9\\u672c"), ("latin-1", b"1.tar, ... -> \xd7 \xe9\\u672c")],
)
def test_what_a_locale_cannot_write_is_written_otherwise(encoding: str, expected: bytes) -> None:
    assert "1.tar, … → × é本".encode(encoding, console.IN_ASCII) == expected


def test_switches_are_spelled_as_in_the_settings_file() -> None:
    assert (console.exactly(True), console.exactly("a\n"), console.exactly(5)) == ("true", "a\\n", "5")
