"""Writes what is made from the code and kept in the tree: man pages, the schema, the dashboard: ``make manual``.

Rule 1: no text is repeated here: commands and options come from broker/cli.py, settings from their table, errors from
        the catalogue, the security model from SECURITY.md and policy/authority.toml.
Rule 2: a test compares what is in the tree with what this makes.

Source of the macros: man(7).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click

from broker import metrics, outputs
from broker.cli import SECTIONS, imgpull
from broker.errors import CATALOGUE
from broker.settings import SETTINGS, Row

COMMON: Final = ("as_json", "debug")
S3_OPTIONS: Final = tuple(
    str(p.name) for p in imgpull.commands["plan"].params if p.name not in ("ref", "name", "no_activate", *COMMON)
)
ROOT: Final = Path(__file__).resolve().parents[2]
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def texts() -> dict[str, str]:
    """Return every file that is made, by its path in the tree."""
    return {
        "broker/man/imgpull.1": "\n".join(commands_page()) + "\n",
        "broker/man/imgpull.toml.5": "\n".join(settings_page()) + "\n",
        "broker/man/imgpull-security.7": "\n".join(security_page()) + "\n",
        "broker/man/imgpull-helper.8": "\n".join(helper_page()) + "\n",
        "policy/schema/output.json": outputs.schema_text(),
        "policy/grafana/imgpull.json": json.dumps(metrics.dashboard(), indent=1) + "\n",
    }


def roff(text: str) -> str:
    """Return text as it is set: nothing in it is a request, hyphens are those of a command line."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    text = re.sub(r"`([^`]+)`", r"\\fB\1\\fR", re.sub(r"\*\*([^*]+)\*\*", r"\\fB\1\\fR", text))
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)  # groff_char(7)
    return f"\\&{text}" if text.startswith((".", "'")) else text


def head(title: str, section: int, name: str, line: str) -> Iterator[str]:
    yield '.\\" Made by tests/setup/manual.py: do not edit.'
    yield f'.TH {title.upper()} {section} "" "imgpull {PROJECT["version"]}" "imgpull"'
    yield ".SH NAME"
    yield f"{roff(name)} \\- {roff(line)}"


def also(*pages: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    yield ",\n".join(f".BR {name} ({section})" for name, section in (p.split("/") for p in pages)).replace(
        ",\n", " ,\n"
    )


# ---------------------------------------------------------------- imgpull(1)


def commands_page() -> Iterator[str]:
    yield from head("imgpull", 1, "imgpull", imgpull.help or "")
    yield from (".SH SYNOPSIS", ".B imgpull", ".I COMMAND", "[\\fIOPTION\\fR]... [\\fIARGUMENT\\fR]...")
    yield ".SH COMMANDS"
    for title, names in SECTIONS.items():
        yield f".SS {title}"
        for name in names:
            yield from command(name, imgpull.commands[name])
    whole = click.Context(imgpull.commands["pull"])
    yield ".SH OPTIONS OF EVERY COMMAND"
    yield from options(whole, COMMON.__contains__)
    yield ".SH S3 OPTIONS"
    yield from options(whole, S3_OPTIONS.__contains__)
    yield from (".SH EXIT STATUS", "Numbers are those of sysexits.h; 128+N is the end by signal N.")
    for code in sorted({kind.exit_code for kind in CATALOGUE.values()}):
        yield from (".TP", f".B {code}")
        meanings = [f"{name}: {kind.title}" for name, kind in CATALOGUE.items() if kind.exit_code == code]
        yield "\n.br\n".join(map(roff, meanings))
    yield from (".SH ENVIRONMENT", "Every setting has a variable: see")
    yield ".BR imgpull.toml (5)."
    yield "NO_COLOR and TERM=dumb are heeded; NOTIFY_SOCKET and JOURNAL_STREAM make imgpull speak as a service."
    yield ".SH FILES"
    for path, text in FILES.items():
        yield from (".TP", f".I {roff(path)}", roff(text))
    yield from also("imgpull.toml/5", "imgpull-security/7", "imgpull-helper/8")


FILES: Final = {
    "~/.local/state/imgpull/imgpull.db": "What is known of images, layers and runs. Losing it loses no image.",
    "~/.cache/imgpull/blobs": "Fetched tarballs; may be removed at any time.",
    "/run/imgpull/helper.sock": "The root helper's socket; members of the group imgpull may connect.",
    "/etc/imgpull/helper.toml": "An administrator's changes to what root may do; see `imgpull policy show helper`.",
    "/etc/imgpull/limits.toml": "An administrator's tighter limits on archives; see `imgpull policy show limits`.",
}


def command(path: str, found: click.Command) -> Iterator[str]:
    """Describe one command, or those of a group."""
    if isinstance(found, click.Group):
        for name, inner in found.commands.items():
            yield from command(f"{path} {name}", inner)
        return
    context = click.Context(found, info_name=f"imgpull {path}")
    usage = " ".join(found.collect_usage_pieces(context))
    yield from (".TP", f"\\fBimgpull {path}\\fR {roff(usage)}")
    for number, paragraph in enumerate((found.help or "").split("\n\n")):
        yield from [".IP"] if number else []
        yield roff(" ".join(paragraph.split()))
    yield ".RS"
    yield from options(context, lambda name: name not in COMMON and name not in S3_OPTIONS)
    if any(parameter.name in S3_OPTIONS for parameter in found.params):
        yield from (".TP", "S3 options", "Where and how S3 is spoken to: see below.")
    yield ".RE"


def options(context: click.Context, wanted: Callable[[str], bool]) -> Iterator[str]:
    """Describe those options of a command whose names are wanted."""
    for parameter in context.command.params:
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record and wanted(str(parameter.name)):
            yield from (".TP", f".B {roff(record[0])}", roff(record[1]))


# ---------------------------------------------------------------- imgpull.toml(5)


def settings_page() -> Iterator[str]:
    yield from head("imgpull.toml", 5, "imgpull.toml", "settings of imgpull(1)")
    yield from (".SH SYNOPSIS", ".I /etc/imgpull/config.toml", ".br", ".I /etc/imgpull/conf.d/*.toml", ".br")
    yield ".I ~/.config/imgpull/config.toml"
    yield from (".SH DESCRIPTION", "Each file is TOML: one KEY = VALUE a line. A setting is taken from the first of:")
    yield "the command line, the environment, your file, the system's files (later ones first), the default."
    yield "An unknown key or a wrong value is an error that names the file, the line and the nearest key."
    yield roff("`imgpull config show --origin` tells what is in force and where it comes from.")
    yield ".SH SETTINGS"
    for row in SETTINGS:
        yield from setting(row)
    yield from (
        ".SH EXAMPLE",
        ".nf",
        roff('endpoint_url = "https://s3.example.net"'),
        roff('cache_size = "50G"'),
        ".fi",
    )
    yield from also("imgpull/1", "imgpull-security/7")


def setting(row: Row) -> Iterator[str]:
    kind = {bool: "true or false", int: "number", str: "text"}[row.type]
    default = json.dumps(row.default) if row.default != "" else "none"
    yield from (".TP", f"\\fB{row.name}\\fR ({kind}{', ' + row.unit if row.unit else ''})")
    yield roff(row.help[0].upper() + row.help[1:] + ".")
    if row.choices:
        yield roff(f"One of {', '.join(choice for choice in row.choices if choice)}.")
    yield f"Default: {roff(default)}. Variables: {', '.join(row.variables)}."


# ---------------------------------------------------------------- imgpull-helper(8)


def helper_page() -> Iterator[str]:
    """Describe root's program by what it says of itself."""
    words = [sys.executable, "-m", "privhelper", "--help"]
    usage = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stderr
    yield from head("imgpull-helper", 8, "imgpull-helper", "what root does for imgpull(1)")
    yield from (".SH SYNOPSIS", ".B imgpull\\-helper", "[\\fB\\-\\-config\\fR \\fIFILE\\fR] \\fICOMMAND\\fR")
    yield from (".SH DESCRIPTION", "Requests of users are answered by instances that systemd(1) starts; the other")
    yield "commands are root's own. The pool is never made by itself."
    yield from (".SH COMMANDS", ".nf", *map(roff, usage.splitlines()[1:]), ".fi")
    yield from (".SH FILES", ".TP", ".I /etc/imgpull/helper.toml", roff(FILES["/etc/imgpull/helper.toml"]))
    yield from also("imgpull/1", "imgpull-security/7", "systemd.socket/5")


# ---------------------------------------------------------------- imgpull-security(7)


def security_page() -> Iterator[str]:
    yield from head("imgpull-security", 7, "imgpull-security", "what imgpull protects, and by what")
    yield from markdown((ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    authority = tomllib.loads((ROOT / "policy/authority.toml").read_text(encoding="utf-8"))
    yield ".SH PROCESSES"
    for name, grants in authority.items():
        if isinstance(grants, dict):
            yield from (".TP", f".B {roff(name)}")
            yield "\n.br\n".join(roff(f"{key}: {shown(value)}") for key, value in grants.items())
    yield from also("imgpull/1", "imgpull.toml/5", "capabilities/7", "landlock/7", "seccomp/2")


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    return json.dumps(value) if isinstance(value, bool) else str(value)


def markdown(text: str) -> Iterator[str]:
    """Set the little of Markdown that SECURITY.md uses: headings, paragraphs, lists."""
    for block in re.split(r"\n\n+", text.strip()):
        if block.startswith("# "):
            continue
        if block.startswith("## "):
            yield f".SH {block[3:].upper()}"
            continue
        for item in re.split(r"(?m)^- ", block):
            if item.strip():
                yield ".IP \\(bu 2" if block.startswith("- ") else ".PP"
                yield roff(" ".join(item.split()))


if __name__ == "__main__":
    for name, content in texts().items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        print(name)
