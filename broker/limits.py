"""The limits in force: policy/limits.toml, tightened by /etc/imgpull/limits.toml.

Rule 1: strict and frozen; an unknown key, a wrong type or a value above the protocol's ceiling stops the program.
Rule 2: the operator's file may only tighten; what it may add is named by the packaged file itself.
Rule 3: a message names file and line.

The supervisor reads and judges them, and hands the numbers to each checker as its second argument (unpriv/limits.py):
a checker that need not load pydantic starts in half the time.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from privhelper import protocol

PACKAGED: Final = Path(__file__).resolve().parent.parent / "policy" / "limits.toml"
OPERATOR: Final = Path("/etc/imgpull/limits.toml")

MAX_ID: Final = (1 << 32) - 2  # chown(2): 2^32-1 means "leave unchanged"

Filter = Literal["none", "gzip", "zstd", "bzip2", "xz"]
Special = Literal["refuse", "omit"]


def _upto(ceiling: int) -> Any:
    return Field(ge=0, le=ceiling)


class LimitsError(Exception):
    """A limits file cannot be used; the message names the file, the line and what is wrong."""


class Section(BaseModel):
    """One frozen table of the file, with exactly its declared keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Stream(Section):
    """What a blob and its compression may cost."""

    blob_bytes: Annotated[int, _upto(protocol.MAX_PAYLOAD_BYTES)]
    payload_bytes: Annotated[int, _upto(protocol.MAX_PAYLOAD_BYTES)]
    ratio: Annotated[int, _upto(1 << 16)]
    ratio_floor_bytes: Annotated[int, _upto(1 << 40)]
    window_bytes: Annotated[int, _upto(1 << 27)]
    compressed_members: Annotated[int, _upto(1 << 30)]
    compressed_header_bytes: Annotated[int, _upto(1 << 20)]
    filters: list[Filter]
    filters_operator_may_add: list[Filter]


class Archive(Section):
    """How many members, how large, and what their extension headers may hold."""

    entries: Annotated[int, _upto(protocol.MAX_ENTRIES)]
    file_bytes: Annotated[int, _upto(protocol.MAX_FILE_BYTES)]
    extension_bytes: Annotated[int, _upto(1 << 20)]
    extensions: Annotated[int, _upto(16)]
    pax_record_bytes: Annotated[int, _upto(1 << 20)]
    pax_records: Annotated[int, _upto(1 << 16)]
    sparse_map_entries: Annotated[int, _upto(0)]
    names_bytes: Annotated[int, _upto(1 << 30)]
    max_id: Annotated[int, _upto(MAX_ID)]


class Names(Section):
    """How long names may be."""

    component_bytes: Annotated[int, _upto(protocol.MAX_NAME_BYTES)]
    path_bytes: Annotated[int, _upto(protocol.MAX_PATH_BYTES - 1)]
    depth: Annotated[int, _upto(min(protocol.MAX_DEPTH, 256))]  # the tree is walked by recursion
    link_target_bytes: Annotated[int, _upto(protocol.MAX_TARGET_BYTES)]


class Xattrs(Section):
    """How many extended attributes, how large."""

    count: Annotated[int, _upto(protocol.MAX_XATTRS)]
    name_bytes: Annotated[int, _upto(protocol.MAX_XATTR_NAME_BYTES)]
    value_bytes: Annotated[int, _upto(protocol.MAX_XATTR_VALUE_BYTES)]
    entry_bytes: Annotated[int, _upto(protocol.MAX_XATTR_VALUE_BYTES)]


class Specials(Section):
    """What happens to device nodes and named pipes."""

    char: Special
    block: Special
    fifo: Special


class Run(Section):
    """What one check may cost this host."""

    wall_clock_s: Annotated[int, _upto(86_400)]
    cpu_s: Annotated[int, _upto(86_400)]
    address_space_bytes: Annotated[int, _upto(1 << 36)]


class Report(Section):
    """How much a report may list."""

    violations: Annotated[int, Field(ge=1, le=1_000)]
    warnings: Annotated[int, _upto(1_000)]
    omitted: Annotated[int, _upto(10_000)]


class Limits(Section):
    """Every limit of a check."""

    stream: Stream
    archive: Archive
    names: Names
    xattrs: Xattrs
    special: Specials
    run: Run
    report: Report


def load(packaged: Path = PACKAGED, operator: Path = OPERATOR) -> Limits:
    """Return the limits in force.

    Raises:
        LimitsError: one of the two files cannot be used, or the operator's file loosens something.
    """
    text = _read(packaged)
    limits = _validate(_parse(text, packaged), text, packaged)
    if not os.path.lexists(operator):
        return limits
    text = _read(operator)
    tighter = _parse(text, operator)
    for table, values in tighter.items():
        _expect_table(table, values, text, operator)
        for key, value in values.items():
            _expect_tighter(limits, table, key, value, f"{operator}:{_line(text, table, key)}")
    # Compare first, then validate the merged whole: types and ceilings are judged by the same models.
    merged = limits.model_dump()
    for table, values in tighter.items():
        merged[table].update(values)
    return _validate(merged, text, operator)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LimitsError(f"{path}: {error}") from error


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # the message ends with "(at line N, column M)"
        raise LimitsError(f"{path}: {error}") from error


def _validate(values: dict[str, Any], text: str, path: Path) -> Limits:
    try:
        return Limits.model_validate(values)
    except ValidationError as error:
        # A misspelt key is also a missing one: name the line that is there.
        first = min(error.errors(), key=lambda one: one["type"] == "missing")
        where = [str(part) for part in first["loc"]]
        line = _line(text, where[0], where[1] if len(where) > 1 else None)
        raise LimitsError(f"{path}:{line}: {'.'.join(where)}: {first['msg']}") from error


def _line(text: str, table: str, key: str | None) -> int:
    """Return the number of the line that sets a key, or that opens its table; 1 when neither is written plainly."""
    current, opened = "", 1
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            current = header[1]
            opened = number if current == table else opened
        assignment = re.match(r"\s*[\"']?([\w-]+)[\"']?\s*=", line)
        if assignment and ((current, assignment[1]) == (table, key) or (not current and assignment[1] == table)):
            return number
    return opened


def _expect_table(table: str, values: object, text: str, path: Path) -> None:
    if table not in Limits.model_fields or not isinstance(values, dict):
        raise LimitsError(f"{path}:{_line(text, table, None)}: unknown table or key {table!r}")


def _expect_tighter(limits: Limits, table: str, key: str, value: object, where: str) -> None:
    section = getattr(limits, table)
    if key not in type(section).model_fields:
        raise LimitsError(f"{where}: unknown key {key!r} in [{table}]")
    present = getattr(section, key)
    if table == "special":
        return  # both words are within the packaged policy: neither lets a device node through
    if key == "filters_operator_may_add":
        raise LimitsError(f"{where}: {key} is the packaged policy's to say")
    if key == "filters":
        allowed = {*present, *limits.stream.filters_operator_may_add}
        if not isinstance(value, list) or not set(map(str, value)) <= allowed:
            raise LimitsError(f"{where}: filters may be any of {sorted(allowed)}, found {value!r}")
    elif type(value) is not int or value > present:
        raise LimitsError(f"{where}: {key} may be an integer up to {present}, found {value!r}")
