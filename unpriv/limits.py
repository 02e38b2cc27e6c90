"""The limits in force, as the broker hands them over: judged there (broker/limits.py), plain numbers here.

Rule 1: exactly these tables and keys; anything else is a mistake of the caller.
Rule 2: no value stands here, and none is compared with a ceiling again: who hands them over made them from policy/.
"""

import json
from typing import Any, NamedTuple


class Stream(NamedTuple):
    """What a blob and its compression may cost."""

    blob_bytes: int
    payload_bytes: int
    ratio: int
    ratio_floor_bytes: int
    window_bytes: int
    compressed_members: int
    compressed_header_bytes: int
    filters: list[str]
    filters_operator_may_add: list[str]


class Archive(NamedTuple):
    """How many members, how large, and what their extension headers may hold."""

    entries: int
    file_bytes: int
    extension_bytes: int
    extensions: int
    pax_record_bytes: int
    pax_records: int
    sparse_map_entries: int
    names_bytes: int
    max_id: int


class Names(NamedTuple):
    """How long names may be."""

    component_bytes: int
    path_bytes: int
    depth: int
    link_target_bytes: int


class Xattrs(NamedTuple):
    """How many extended attributes, how large."""

    count: int  # type: ignore[assignment]  # in the place of tuple.count, which nobody asks for
    name_bytes: int
    value_bytes: int
    entry_bytes: int


class Specials(NamedTuple):
    """What happens to device nodes and named pipes: `refuse` or `omit`."""

    char: str
    block: str
    fifo: str


class Run(NamedTuple):
    """What one check may cost this host."""

    wall_clock_s: int
    cpu_s: int
    address_space_bytes: int


class Report(NamedTuple):
    """How much a report may list."""

    violations: int
    warnings: int
    omitted: int


class Limits(NamedTuple):
    """Every limit of a check."""

    stream: Stream
    archive: Archive
    names: Names
    xattrs: Xattrs
    special: Specials
    run: Run
    report: Report


def of(values: dict[str, Any]) -> Limits:
    """Return the limits that a table of tables says. Raises TypeError or KeyError for any other form."""
    tables = {name: table(**values[name]) for name, table in Limits.__annotations__.items()}
    if unknown := values.keys() - tables.keys():
        raise TypeError(f"unknown tables: {', '.join(sorted(unknown))}")
    return Limits(**tables)


def parse(text: str) -> Limits:
    """Return the limits that the broker hands over. Raises ValueError, TypeError or KeyError for any other text."""
    return of(json.loads(text))
