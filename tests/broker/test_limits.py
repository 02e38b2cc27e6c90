"""policy/limits.toml and the operator's file: what is refused, with its line; what a checker is handed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from broker import limits
from broker.limits import LimitsError
from broker.protocol import CheckJob
from privhelper import protocol
from unpriv import limits as handed
from unpriv.check import Job


def edited(tmp_path: Path, pattern: str, replacement: str) -> Path:
    text, count = re.subn(pattern, replacement, limits.PACKAGED.read_text("utf-8"), count=1, flags=re.M)
    assert count == 1
    path = tmp_path / "limits.toml"
    path.write_text(text, "utf-8")
    return path


def line_of(path: Path, word: str) -> int:
    return next(n for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.startswith(word))


@pytest.mark.parametrize(
    ("pattern", "replacement", "word"),
    [
        (r"^entries = ", "entires = ", "entires"),
        (r"^depth = \d+", "depth = 100_000", "depth"),
        (r"^depth = \d+", 'depth = "64"', "depth"),
        (r"^depth = \d+", "depth = 64.0", "depth"),
        (r"^depth = \d+", "depth = true", "depth"),
        (r"^depth = \d+", "depth = -1", "depth"),
        (r"^component_bytes = \d+", "component_bytes = 256", "component_bytes"),
        (r'^fifo = "refuse"', 'fifo = "keep"', "fifo"),
        (r"^filters = .*", 'filters = ["none", "lzip"]', "filters"),
        (r"^sparse_map_entries = 0", "sparse_map_entries = 1", "sparse_map_entries"),
        (r"^\[names\]", "[nmaes]", "[nmaes]"),
    ],
)
def test_a_wrong_value_names_its_line(tmp_path: Path, pattern: str, replacement: str, word: str) -> None:
    path = edited(tmp_path, pattern, replacement)
    with pytest.raises(LimitsError) as caught:
        limits.load(path, tmp_path / "none")
    if not word.startswith("["):
        assert str(caught.value).startswith(f"{path}:{line_of(path, word)}: "), caught.value


def test_a_missing_key_and_bad_toml_stop_the_program(tmp_path: Path) -> None:
    with pytest.raises(LimitsError, match="depth"):
        limits.load(edited(tmp_path, r"^depth = .*$", ""), tmp_path / "none")
    with pytest.raises(LimitsError, match="line"):
        limits.load(edited(tmp_path, r"^depth = .*$", "depth = = 3"), tmp_path / "none")
    with pytest.raises(LimitsError):
        limits.load(tmp_path / "missing", tmp_path / "none")


def operator(tmp_path: Path, text: str) -> limits.Limits:
    path = tmp_path / "operator.toml"
    path.write_text(text, "utf-8")
    return limits.load(operator=path)


def test_the_operator_may_tighten(tmp_path: Path) -> None:
    found = operator(tmp_path, '[names]\ndepth = 10\n\n[special]\nfifo = "omit"\n[stream]\nfilters = ["none", "xz"]\n')
    assert (found.names.depth, found.special.fifo, found.stream.filters) == (10, "omit", ["none", "xz"])
    assert found.archive == limits.load(operator=tmp_path / "none").archive


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[names]\n\ndepth = 65\n", 3),
        ("[names]\ndepht = 3\n", 2),
        ("[nmaes]\ndepth = 3\n", 1),
        ('[special]\nchar = "keep"\n', 2),
        ('[stream]\n# none\nfilters = ["none", "lzma"]\n', 3),
        ('[stream]\nfilters_operator_may_add = ["bzip2"]\n', 2),
        ('[names]\ndepth = "3"\n', 2),
        ("[names]\ndepth = true\n", 2),
        ("[names]\ndepth = -1\n", 2),
        ("depth = 3\n", 1),
    ],
)
def test_the_operator_may_not_loosen_or_misspell(tmp_path: Path, text: str, line: int) -> None:
    with pytest.raises(LimitsError, match=rf"operator\.toml:{line}: "):
        operator(tmp_path, text)


def test_an_unreadable_operator_file_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "operator.toml").symlink_to(tmp_path / "missing")
    with pytest.raises(LimitsError):
        limits.load(operator=tmp_path / "operator.toml")
    with pytest.raises(LimitsError):
        limits.load(operator=tmp_path)


def test_limits_cannot_be_changed_afterwards() -> None:
    found = limits.load()
    with pytest.raises(ValueError, match="frozen"):
        found.names.depth = 1  # type: ignore[misc]  # that is the point


def test_packaged_limits_lie_within_the_protocol() -> None:
    found = limits.load()
    assert found.names.path_bytes < protocol.MAX_PATH_BYTES
    assert found.xattrs.value_bytes <= protocol.MAX_XATTR_VALUE_BYTES
    assert found.archive.file_bytes <= protocol.MAX_FILE_BYTES


# ---------------------------------------------------------------- what a checker is handed


def test_a_checker_gets_every_limit_and_every_field_of_its_job() -> None:
    """It takes both apart without pydantic, by forms of its own: they must be the same ones."""
    found = limits.load()
    taken = handed.parse(found.model_dump_json())
    assert {name: table._asdict() for name, table in taken._asdict().items()} == found.model_dump()
    defaults = {name: field.default for name, field in CheckJob.model_fields.items() if not field.is_required()}
    assert defaults == Job._field_defaults | {"lower": []}
    assert set(CheckJob.model_fields) == set(Job._fields)


@pytest.mark.parametrize("change", ["a_table_less", "a_table_more", "a_key_less", "a_key_more"])
def test_limits_of_another_form_are_a_mistake_of_the_caller(change: str) -> None:
    values = limits.load().model_dump()
    if change == "a_table_less":
        del values["names"]
    elif change == "a_table_more":
        values["other"] = {}
    elif change == "a_key_less":
        del values["names"]["depth"]
    else:
        values["names"]["other"] = 1
    with pytest.raises((KeyError, TypeError)):
        handed.parse(json.dumps(values))
