"""The second reader: libarchive must agree, and whatever it does otherwise is a refusal.

That it disagrees is shown in two ways: with a strict reader that is made to be wrong, and with archives that the strict
reader would take if a rule were missing, of which libarchive sees something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unpriv.checking import Result, check
from tests.unpriv.tarbytes import directory, hardlink, head, member, pax, symlink, tar
from unpriv import archive, reader
from unpriv import pax as pax_module
from unpriv.reader import Claim
from unpriv.rules import DIRECTORY, FILE, SYMLINK

OK = member(b"ok", b"ok\n")
HONEST = tar(directory(b"d"), member(b"d/f", b"x" * 5000), hardlink(b"h", b"d/f"), symlink(b"l", b"/t"), OK)


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Let the strict reader claim something else about its second member: the fields that the test sets."""
    wrong: dict[str, Any] = {}
    seen: list[int] = []

    def patched(kind: type[tuple[Any, ...]], values: tuple[Any, ...]) -> Any:
        claim = Claim(*values)
        seen.append(1)
        return claim._replace(**wrong) if len(seen) == 2 else claim

    monkeypatch.setattr(reader, "_new", patched)
    yield wrong


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", 0),
        ("kind", DIRECTORY),
        ("kind", SYMLINK),
        ("path", b"d/g"),
        ("size", 4999),
        ("size", 5001),
        ("size", 0),
        ("at", 1024 + 512),
    ],
)
def test_any_difference_is_a_refusal(claims: dict[str, Any], field: str, value: Any) -> None:
    claims[field] = value
    result = check(HONEST)
    assert result.rule == "readers_disagree", result.report
    assert result.manifest == b""


def test_the_same_claims_are_accepted(claims: dict[str, Any]) -> None:
    claims["path"] = b"d/f"
    assert check(HONEST).accepted


@pytest.mark.parametrize("number", range(5))
def test_a_member_that_libarchive_does_not_see(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = reader.Reader._begin_member

    def twice(self: reader.Reader, fields: Any, offset: int) -> None:
        original(self, fields, offset)
        if self.entries == number + 1:
            self.claims.append(self.claims[-1]._replace(start=offset + 512))

    monkeypatch.setattr(reader.Reader, "_begin_member", twice)
    assert check(HONEST).rule == "readers_disagree"


def test_a_member_that_only_libarchive_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reader.Reader._begin_member

    def forgetful(self: reader.Reader, fields: Any, offset: int) -> None:
        original(self, fields, offset)
        if self.entries == 5:
            self.claims.pop()

    monkeypatch.setattr(reader.Reader, "_begin_member", forgetful)
    assert check(HONEST).rule == "readers_disagree"


def blind(monkeypatch: pytest.MonkeyPatch, *, links_with_bodies: bool = False, types: bool = False) -> None:
    """Take rules away from the strict reader."""
    if links_with_bodies:
        monkeypatch.setattr(reader.Reader, "_size", lambda self, fields, kind: fields.size)
    if types:
        monkeypatch.setattr(reader, "_KINDS", {**reader._KINDS, b"Z": DIRECTORY, b"M": FILE, b"V": FILE})


INNER = member(b"smuggled", b"!")


@pytest.mark.parametrize(
    "data",
    [
        member(b"l", INNER, b"2", link=b"t"),
        member(b"d", INNER, b"5"),
        member(b"t") + member(b"h", INNER, b"1", link=b"t"),
        member(b"p", INNER, b"5", magic=bytes(8)),
    ],
)
def test_bodies_that_libarchive_reads_as_members(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """CVE-2025-62518's class: without our own rule, the disagreement alone still refuses it."""
    blind(monkeypatch, links_with_bodies=True)
    assert check(tar(data, OK)).rule == "readers_disagree"


@pytest.mark.parametrize(
    "data",
    [
        member(b"z", b"", b"Z"),  # a file to libarchive
        member(b"m", b"", b"M", mode=0o060666),  # a block device
    ],
)
def test_types_that_libarchive_takes_otherwise(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    blind(monkeypatch, types=True)
    assert check(tar(OK, data)).rule in ("readers_disagree", "mode_type_conflict")


def test_a_warning_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """libarchive only warns of a malformed PAX record and goes on with the other name."""
    monkeypatch.setattr(pax_module, "_records", lambda body, limits: iter([]))
    result = check(tar(member(b"PaxHeaders/x", b"5 path=abc\n", b"x"), OK))
    assert result.rule == "readers_disagree"
    assert "(-20)" in result.report["violations"][0]["reason"]


def test_a_warning_about_names_is_refused_where_none_was_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tar(pax((b"path", b"caf\xe9")), OK)
    assert check(data).accepted
    monkeypatch.setattr(pax_module, "_is_utf8", lambda value: True)
    assert check(data).rule == "readers_disagree"


def test_a_fatal_error_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unpriv.header._expect_checksum", lambda block, field: None)
    assert check(tar(OK, head(b"bad", checksum=b"000001\0 "))).rule == "readers_disagree"


def test_our_own_word_is_better_than_a_disagreement() -> None:
    """libarchive fails first here, for it reads a whole header; the strict reader says what is wrong."""
    assert check(tar(OK, member(b"f", size=b"garbage"))).rule == "number_malformed"
    assert check(member(b"f", b"x" * 5000)[:3000]).rule == "archive_truncated"


def test_members_that_libarchive_renames() -> None:
    """It composes names of PAX headers; canonical equivalence is no disagreement, any other difference is."""
    for ours, theirs, same in (
        ("e\u0301", "é", True),
        ("\u1100\u1161", "\uac00", True),
        ("a//b", "a/b", True),
        ("a/", "a", True),
        ("a", "b", False),
        ("A", "a", False),
        ("ﬁ", "fi", False),
        ("a/b", "a\\b", False),
    ):
        assert archive._same_name(theirs.encode(), ours.encode()) is same, ours
    assert archive._same_name(b"caf\xe9", b"caf\xe9") is True
    assert archive._same_name(b"caf\xe9", b"caf\xe8") is False
    assert archive._same_name(None, b"x") is False


def test_only_one_format_and_no_filter_can_be_reached() -> None:
    """The only functions of libarchive that this program names."""
    text = Path(archive.__file__).read_text("utf-8")
    assert [line for line in text.splitlines() if "read_support" in line and "def " not in line] == [
        '_read_support_format_tar = _function("read_support_format_tar", ctypes.c_int, _Pointer)',
        '        self._expect(_read_support_format_tar(archive), "format tar")',
    ]


def test_data_that_libarchive_copies_for_itself_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = archive.CrossReader._compare_data

    def shifted(self: archive.CrossReader, start: int, size: int, at: int) -> None:
        self._base += 512  # as if every pointer were into another buffer
        try:
            original(self, start, size, at)
            seen.append(True)
        finally:
            self._base -= 512

    monkeypatch.setattr(archive.CrossReader, "_compare_data", shifted)
    result: Result = check(HONEST)
    assert result.accepted and seen == [True, True]


def test_one_member_only() -> None:
    assert check(tar(OK)).accepted
    assert FILE == 0
