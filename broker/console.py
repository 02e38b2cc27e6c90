"""How a person or a program sees the work: bars on a terminal, lines elsewhere, JSON Lines, or nothing.

Rule 1: standard output carries the result alone; progress goes to standard error (with `--json`, events go to stdout).
Rule 2: the work reports stages and bytes; only this module knows how they look.
Rule 3: text from an archive or a bucket is escaped before it meets a terminal.

Stages of a layer: waiting, fetching, checking, committing, ready; `shared` where the layer was there already.
"""

import codecs
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

from broker.errors import Problem

STAGES: Final = ("waiting", "fetching", "checking", "committing", "ready", "shared", "failed")
WORK: Final = {"fetching": "fetch", "checking": "check", "committing": "commit"}
SETTLED: Final = ("ready", "shared", "failed")
HEARTBEAT_S: Final = 10.0
LEAST: Final = 12  # columns that a text which is cut still has


@dataclass(slots=True)
class Line:
    """One layer as it is shown."""

    label: str
    stage: str = "waiting"
    done: int = 0
    total: int = 0
    size: int = 0  # of its object in S3
    started_s: float = field(default_factory=lambda: time.monotonic())
    found: int = 0  # bytes that were done already when it was first seen in this stage
    spent_s: dict[str, float] = field(default_factory=dict)  # by stage, those that are over
    amount: dict[str, int] = field(default_factory=dict)  # bytes by stage

    def enter(self, stage: str) -> None:
        """Leave the stage for another."""
        now_s = time.monotonic()
        self.spent_s[self.stage] = self.spent_s.get(self.stage, 0.0) + now_s - self.started_s
        self.stage, self.started_s = stage, now_s


IN_ASCII: Final = "imgpull-in-ascii"
ASCII: Final = {"…": "...", "×": "x", "→": "->"}


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Write what a locale has no character for in others, or escaped. A handler of encoding errors, codecs(3)."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lost), error.end


codecs.register_error(IN_ASCII, _in_ascii)


def escape(text: object) -> str:
    """Return text without anything that a terminal would obey: control characters and lone surrogates are escaped."""
    out = []
    for c in str(text):
        if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF:
            out.append(c)
        elif 0xDC80 <= ord(c) <= 0xDCFF:
            out.append(f"\\x{ord(c) - 0xDC00:02x}")
        else:
            out.append(c.encode("unicode_escape", "surrogatepass").decode("ascii"))
    return "".join(out)


def size(count: float) -> str:
    """Return a number of bytes for people: `0 B`, `143.6 MB` (powers of 1000, as S3 bills them)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


class Reporter:
    """Takes what the work reports. This base class shows nothing: `--progress=none`."""

    def __init__(self) -> None:
        self.lines: dict[str, Line] = {}

    def begin(self, title: str, layers: list[tuple[str, str, int]]) -> None:
        """Announce the layers of an image: key, label and bytes to fetch of each, lowest first."""
        for key, label, total in layers:
            known = self.lines.setdefault(key, Line(label))
            known.label, known.size, known.total = label, total, known.total or total
        self.on_begin(title)

    def stage(self, key: str, stage: str, done: int = 0, total: int = 0) -> None:
        """Tell where a layer is."""
        line = self.lines.setdefault(key, Line(key))
        changed = line.stage != stage
        if changed:
            line.enter(stage)
            line.found = done
        line.done, line.total = done, total or line.total
        line.amount[stage] = max(line.amount.get(stage, 0), done)
        self.on_stage(line, changed)

    def timing(self) -> list[dict[str, Any]]:
        """Return for each layer how long its stages worked, with how many bytes, and how long it waited in between."""
        rows = []
        for line in self.lines.values():
            row: dict[str, Any] = {"layer": line.label, "waited_s": round(line.spent_s.get("waiting", 0.0), 3)}
            for stage, word in WORK.items():
                row[f"{word}_s"] = round(line.spent_s.get(stage, 0.0), 3)
                row[f"{word}_bytes"] = line.amount.get(stage, 0)
            rows.append(row)
        return rows

    def notice(self, message: str, **data: Any) -> None:
        """Tell something worth knowing: a retry and its reason, a snapshot taken."""

    def on_begin(self, title: str) -> None:
        """Show that an image's layers are known."""

    def on_stage(self, line: Line, changed: bool) -> None:
        """Show where a layer is."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class PlainReporter(Reporter):
    """One line for each change, and a heartbeat for what takes long. Source of the habit: BuildKit's `plain`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._last_s = time.monotonic()

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
        self._last_s = time.monotonic()

    def on_begin(self, title: str) -> None:
        self._print(f"{escape(title)}: {len(self.lines)} layer{'s' * (len(self.lines) != 1)}")

    def on_stage(self, line: Line, changed: bool) -> None:
        if changed and line.stage != "waiting":
            amount = f", {size(line.total)}" if line.stage == "fetching" and line.total else ""
            self._print(f"{escape(line.label)}: {line.stage}{amount}")
        elif time.monotonic() - self._last_s > HEARTBEAT_S and line.total:
            self._print(f"{escape(line.label)}: {line.stage} {line.done * 100 // line.total} %")

    def notice(self, message: str, **data: Any) -> None:
        self._print(escape(message))


class JsonReporter(Reporter):
    """JSON Lines events. The schema is policy/schema/output.json; readers ignore types that they do not know."""

    def __init__(self, stream: TextIO, interval_s: float = 0.5) -> None:
        super().__init__()
        self._stream = stream
        self._interval_s = interval_s
        self._told: dict[int, float] = {}

    def emit(self, kind: str, **fields: Any) -> None:
        """Print one event."""
        event = {"v": 1, "type": kind, "time": round(time.time(), 3), **fields}
        print(json.dumps(event, sort_keys=True), file=self._stream, flush=True)

    def on_begin(self, title: str) -> None:
        layers = [{"layer": line.label, "bytes": line.total} for line in self.lines.values()]
        self.emit("begin", image=title, layers=layers)

    def on_stage(self, line: Line, changed: bool) -> None:
        if changed:
            self.emit("stage", layer=line.label, stage=line.stage, total=line.total)
        elif time.monotonic() - self._told.get(id(line), 0.0) > self._interval_s:
            self._told[id(line)] = time.monotonic()
            self.emit("progress", layer=line.label, stage=line.stage, done=line.done, total=line.total)

    def notice(self, message: str, **data: Any) -> None:
        self.emit("notice", message=message, **data)


class TtyReporter(Reporter):
    """One bar a layer and a total, redrawn in place. rich is imported here and nowhere else."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text
        self._console = Console(file=stream, highlight=False, soft_wrap=False)
        self._title = ""
        self._started = False
        self._live = Live(console=self._console, refresh_per_second=8, transient=False, get_renderable=self._render)

    def on_begin(self, title: str) -> None:
        self._title = escape(title)
        if not self._started:
            self._started = True
            self._live.start()

    def notice(self, message: str, **data: Any) -> None:
        self._console.print(escape(message), markup=False)

    def close(self) -> None:
        if self._started:
            self._started = False
            self._live.stop()

    def _render(self) -> Any:
        from rich.console import Group

        width = self._console.width
        labels = max((len(escape(line.label)) for line in self.lines.values()), default=0)
        room = max(8, min(labels, width // 3))
        rows = [self._row(line, width, room) for line in self.lines.values()]
        rows.append(self._text(self._total()[: width - 1], style="bold"))
        return Group(*rows)

    def _total(self) -> str:
        """Return the last line: layers settled, and bytes fetched of all that have to be."""
        lines = self.lines.values()
        settled = sum(line.stage in SETTLED for line in lines)
        text = f"{settled}/{len(self.lines)} layers"
        fetched = [line for line in lines if "fetching" in line.amount]
        if any(line.stage == "fetching" for line in fetched):
            done = sum(line.amount["fetching"] for line in fetched)
            text += f"  {size(done)} of {size(sum(line.size for line in fetched))}"
        return f"{text}  {self._title}"

    def _row(self, line: Line, width: int, room: int) -> Any:
        """Draw one layer in the columns there are: 40 keep label, stage and percent, 60 and more have a bar."""
        styles = {"ready": "green", "shared": "cyan", "failed": "red", "waiting": "dim"}
        name = escape(line.label)
        utf = "utf" in (self._console.encoding or "").lower()
        name = name if len(name) <= room else ("…" if utf else "~") + name[len(name) - room + 1 :]
        head = f"{name:<{room}} {line.stage:<10}"
        if line.stage in SETTLED or not line.total or line.stage == "waiting":
            tail = size(line.total) if line.total and line.stage in ("ready", "waiting") else ""
            return self._text(f"{head} {tail}"[: width - 1], style=styles.get(line.stage, ""))
        share = min(1.0, line.done / line.total)
        tail = f"{share * 100:3.0f} %"
        if width >= 80:
            tail += f" {size(line.done):>9}/{size(line.total)}"
        if width >= 80 and line.done > line.found:
            tail += f" {size((line.done - line.found) / max(0.001, time.monotonic() - line.started_s))}/s"
        space = min(30, width - len(head) - len(tail) - 4)
        if space < 8:
            return self._text(f"{head} {tail}"[: width - 1])
        full = int(space * share)
        bar = ("━" * full + " " * (space - full)) if utf else ("#" * full + "-" * (space - full))
        return self._text(f"{head} {bar} {tail}"[: width - 1])


def is_terminal(stream: TextIO) -> bool:
    """Tell whether bars can be drawn there."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def reporter(mode: str, json_events: bool, quiet: bool) -> Reporter:
    """Return the reporter for `--progress`, `--json` and `--quiet`; a service's also tells its manager."""
    chosen = _reporter(mode, json_events, quiet)
    if "NOTIFY_SOCKET" not in os.environ:
        return chosen
    from broker.service import StatusReporter

    return StatusReporter(chosen)


def _reporter(mode: str, json_events: bool, quiet: bool) -> Reporter:
    if json_events or mode == "json":
        return JsonReporter(sys.stdout if json_events else sys.stderr)
    if quiet or mode == "none":
        return Reporter()
    if mode == "tty" or (mode == "auto" and is_terminal(sys.stderr)):
        return TtyReporter(sys.stderr)
    if mode == "auto" and "JOURNAL_STREAM" in os.environ:
        from broker import service

        if service.is_journal(sys.stderr.fileno()):
            return service.JournalReporter()
    return PlainReporter(sys.stderr)


def print_problem(problem: Problem, as_json: bool) -> None:
    """Show an error: three lines on standard error, or one object on standard output as the last line."""
    if as_json:
        print(json.dumps({"v": 1, "type": "error", "time": round(time.time(), 3), **problem.to_json()}, sort_keys=True))
        return
    if "JOURNAL_STREAM" in os.environ:
        from broker import service

        if service.is_journal(sys.stderr.fileno()):
            service.tell_problem(problem)
            return
    what, why, advice = problem.lines()
    reasons = "\n        ".join(map(escape, why.split("\n")))
    print(f"imgpull: {escape(what)}\n  why:  {reasons}\n  next: {escape(advice)}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a list: how a row's value is found and shown."""

    name: str
    value: Callable[[Any], Any]
    show: Callable[[Any], str] = escape
    right: bool = False


def exactly(value: object) -> str:
    """Return a value as settings and policy files spell it."""
    return str(value).lower() if isinstance(value, bool) else escape(value)


def table(
    rows: list[Any],
    columns: list[Column],
    *,
    chosen: str | None = None,
    sort: str | None = None,
    no_header: bool = False,
    exact: bool = False,
    as_json: bool = False,
) -> str:
    """Return a list as a table for people, as tab-separated exact values, or as JSON.

    Args: ``chosen`` and ``sort`` name columns (`-o`, `--sort`; a leading `-` sorts downwards), ``exact`` is `-p`.
    Raises: ValueError that names the unknown column and those there are.
    """
    by_name = {c.name: c for c in columns}

    def pick(name: str) -> Column:
        if name not in by_name:
            raise ValueError(f"no column {name!r}: there are {', '.join(by_name)}")
        return by_name[name]

    shown = [pick(n.strip()) for n in chosen.split(",")] if chosen else columns
    if sort:
        key = pick(sort.lstrip("-")).value
        rows = sorted(rows, key=lambda r: (key(r) is None, key(r)), reverse=sort.startswith("-"))
    if as_json:
        return json.dumps([{c.name: c.value(r) for c in shown} for r in rows], sort_keys=True, indent=2)
    cells = [[exactly(c.value(r)) if exact else c.show(c.value(r)) for c in shown] for r in rows]
    if exact:
        head = [] if no_header else [[c.name for c in shown]]
        return "\n".join("\t".join(row) for row in head + cells)
    head = [] if no_header else [[c.name.upper().replace("_", " ") for c in shown]]
    return "\n".join(_fitted(head, cells, shown, terminal_width()))


def _fitted(head: list[list[str]], cells: list[list[str]], shown: list[Column], room: int | None) -> list[str]:
    """Return the lines of a table. Where the terminal is too narrow, the widest text loses its beginning; if even that
    does not help, each row becomes a paragraph.
    """
    widths = [max((len(row[i]) for row in head + cells), default=0) for i in range(len(shown))]
    total = sum(widths) + 2 * (len(widths) - 1)
    if room is not None and total > room and cells:
        at = max(range(len(widths)), key=lambda i: (not shown[i].right, widths[i]))
        least = max(LEAST, *(len(row[at]) for row in head)) if head else LEAST
        if widths[at] - (total - room) < least:
            return _paragraphs(cells, shown)
        widths[at] -= total - room
        cells = [[*row[:at], _tail(row[at], widths[at]), *row[at + 1 :]] for row in cells]
    return [
        "  ".join(
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, shown, strict=True)
        ).rstrip()
        for row in head + cells
    ]


def _tail(text: str, room: int) -> str:
    """Return the end of a text that is too long: references and keys differ there."""
    return text if len(text) <= room else "…" + text[len(text) - room + 1 :]


def _paragraphs(cells: list[list[str]], shown: list[Column]) -> list[str]:
    names = [c.name.replace("_", " ") for c in shown]
    width = max(map(len, names))
    lines = []
    for row in cells:
        lines += [f"{name.ljust(width)}  {text}".rstrip() for name, text in zip(names, row, strict=True) if text]
        lines.append("")
    return lines[:-1]


def terminal_width() -> int | None:
    """Return the columns of the terminal that results go to; None where they go elsewhere, whole."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(head: str, text: str) -> str:
    """Return a text after its head, on a terminal in lines of its width that stand below each other."""
    room = terminal_width()
    if room is None or room - len(head) < LEAST:
        return head + text
    return textwrap.fill(
        text, room, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
