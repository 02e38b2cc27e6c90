"""Replaying the manifests of lower layers: exactly the form that we write, and every operation must fit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from privhelper import protocol
from tests.unpriv.checking import check
from tests.unpriv.tarbytes import directory, hardlink, member, pax, symlink, tar
from unpriv import listing
from unpriv.blob import MemoryBlob
from unpriv.lower import Lower
from unpriv.rulebook import RejectedError

BASE = tar(
    directory(b"./", mode=0o711),
    directory(b"d"),
    member(b"d/f", b"1"),
    symlink(b"d/l", 'fő\n"\\'.encode()),
    hardlink(b"h", b"d/f"),
    pax((b"SCHILY.xattr.user.b", b"2"), (b"SCHILY.xattr.user.a", b"1"), (b"path", b"caf\xe9\t\x7f")),
    member(b"x", b"22"),
)
UPPER = tar(directory(b"d", mode=0o700), member(b"d/.wh.f"), member(b"n/o", b"3"), member(b"./.wh.h"))


def manifests() -> list[bytes]:
    return [check(BASE).manifest, check(BASE, UPPER).manifest]


def replay(*layers: bytes) -> Lower:
    lower = Lower(with_places=True, tick=lambda: None)
    for layer in layers:
        lower.add(MemoryBlob(layer))
    return lower


def test_what_is_written_can_be_replayed() -> None:
    lower = replay(*manifests())
    assert lower.digest == check(BASE, UPPER).report["layer"]
    assert {name for name in lower.root if name} == {b"caf\xe9\t\x7f", b"d", b"n"}


def test_lines_are_canonical() -> None:
    """The bytes are those of json.dumps with sorted keys, whatever the names; and every line is within its ceiling."""
    for manifest in manifests():
        for line in manifest.splitlines(keepends=True):
            value = json.loads(line)
            assert (json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n").encode() == line
            assert len(line) <= protocol.MAX_LINE_BYTES


def test_the_longest_line_is_within_its_ceiling() -> None:
    name, target = b"\xff" * 255, b"\xfe" * 4095
    deep = b"/".join([b"\xfd" * 200] * 20)
    xattrs = [(b"SCHILY.xattr.user." + b"\xfc" * 240, b"v" * 3_600)]
    data = tar(
        pax((b"path", name), (b"linkpath", target)),
        symlink(b"s", b"t"),
        pax((b"path", deep), *xattrs),
        member(b"f", b"1"),
        pax((b"path", deep + b"2"), (b"linkpath", deep)),
        hardlink(b"h", b"f"),
    )
    result = check(data)
    assert result.accepted, result.report
    assert max(map(len, result.manifest.splitlines())) < protocol.MAX_LINE_BYTES


def test_the_first_line() -> None:
    first = json.loads(manifests()[1].splitlines()[0])
    assert first == {
        "bytes": 1,
        "entries": len(manifests()[1].splitlines()) - 1,
        "format": "imgpull.layer/1",
        "parent": check(BASE).report["layer"],
    }


def line(**fields: Any) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def made(*operations: bytes, count: int | None = None, parent: str | None = None) -> bytes:
    total = len(operations) if count is None else count
    return line(bytes=0, entries=total, format="imgpull.layer/1", parent=parent) + b"".join(operations)


META = {"gid": 0, "mode": 493, "mtime": 0, "uid": 0, "xattrs": {}}
DIR = line(op="dir", name="d", **{"in": 0}, **META)
SYMLINK = line(op="symlink", name="s", target="t", gid=0, mtime=0, uid=0, xattrs={}, **{"in": 0})
FILE = line(op="file", name="f", at=0, size=0, sha256="0" * 64, **{"in": 0}, **META)


def nested(depth: int) -> bytes:
    return made(*(line(op="dir", name="d", **{"in": level}, **META) for level in range(depth)))


BAD = {
    "too_deep": nested(257),
    "empty": b"",
    "no_first_line": DIR,
    "another_format": made().replace(b"layer/1", b"layer/2"),
    "a_parent_that_is_not_there": made(parent="sha256:" + "0" * 64),
    "too_few_operations": made(DIR, count=2),
    "too_many_operations": made(DIR, DIR, count=1),
    "no_newline_at_the_end": made(DIR)[:-1],
    "spaces": made(DIR.replace(b":", b": ")),
    "keys_in_another_order": made(b'{"op":"enter","in":0,"name":"d"}\n'),
    "an_unknown_key": made(DIR.replace(b'"in"', b'"an":0,"in"')),
    "an_unknown_operation": made(DIR.replace(b'"dir"', b'"dyr"')),
    "bytes_beyond_ascii": made(DIR.replace(b'"d"', '"é"'.encode())),
    "a_slash": made(DIR.replace(b'"d"', b'"a/b"')),
    "dotdot": made(DIR.replace(b'"d"', b'".."')),
    "dot": made(DIR.replace(b'"d"', b'"."')),
    "an_empty_name": made(DIR.replace(b'"d"', b'""')),
    "a_nul": made(DIR.replace(b'"d"', b'"\\u0000"')),
    "a_lone_surrogate": made(DIR.replace(b'"d"', b'"\\ud800"')),
    "half_a_pair_in_a_target": made(SYMLINK.replace(b'"t"', b'"\\ud83d"')),
    "a_byte_of_ascii_as_a_surrogate": made(SYMLINK.replace(b'"t"', b'"\\udc41"')),
    "it_exists": made(DIR, DIR),
    "into_nowhere": made(line(op="enter", name="d", **{"in": 7})),
    "into_a_file": made(FILE, FILE.replace(b'"in":0', b'"in":1')),
    "into_what_was_left": made(DIR, DIR.replace(b'"d"', b'"e"'), FILE.replace(b'"in":0', b'"in":1')),
    "enter_nothing": made(line(op="enter", name="d", **{"in": 0})),
    "enter_a_file": made(FILE, line(op="enter", name="f", **{"in": 0})),
    "meta_on_nothing": made(line(op="meta", name="d", **{"in": 0}, **META)),
    "meta_of_the_root_second": made(DIR, line(op="meta", name="", **{"in": 0}, **META)),
    "remove_nothing": made(line(op="remove", name="d", dir=True, **{"in": 0})),
    "remove_a_file_as_a_directory": made(FILE, line(op="remove", name="f", dir=True, **{"in": 0})),
    "remove_a_full_directory": made(
        DIR, FILE.replace(b'"in":0', b'"in":1'), line(op="remove", name="d", dir=True, **{"in": 0})
    ),
    "link_to_nothing": made(line(op="link", name="h", to=["f"], **{"in": 0})),
    "link_to_a_directory": made(DIR, line(op="link", name="h", to=["d"], **{"in": 0})),
    "link_through_a_file": made(FILE, line(op="link", name="h", to=["f", "x"], **{"in": 0})),
    "link_to_the_root": made(line(op="link", name="h", to=[], **{"in": 0})),
    "a_line_beyond_its_ceiling": made(DIR.replace(b'"d"', b'"' + b"d" * 100_000 + b'"')),
}


@pytest.mark.parametrize("name", BAD)
def test_refused_manifest(name: str) -> None:
    with pytest.raises(RejectedError) as caught:
        replay(BAD[name])
    assert caught.value.rule == "lower_manifest_invalid"


def test_good_operations_of_the_same_kinds() -> None:
    """What the table above breaks is otherwise right."""
    good = made(
        line(op="meta", name="", **{"in": 0}, **META),
        DIR,
        FILE.replace(b'"in":0', b'"in":2'),
        line(op="link", name="h", to=["d", "f"], **{"in": 0}),
        line(op="enter", name="d", **{"in": 0}),
        line(op="remove", name="f", dir=False, **{"in": 5}),
        line(op="remove", name="d", dir=True, **{"in": 0}),
    )
    assert {name for name in replay(good).root if name} == {b"h"}


VALUES = {
    "mode": (0, 999, 1000, 3999, 4000, 0o7777, 0o10000, -1),
    "uid": (0, 9, 999_999_999, (1 << 32) - 2, (1 << 32) - 1),
    "gid": (0, 4_000_000_000, (1 << 32) - 1),
    "mtime": (0, protocol.MAX_MTIME_NS, protocol.MAX_MTIME_NS + 1, 10**19),
    "name": ("a", ".a", ".", "..", "...", "..a", "a.", "n" * 251, "n" * 252, "n" * 255, "n" * 256, "a b", "é", "a\x7f"),
    "size": (0, 1, 9_999_999_999, 10**10, protocol.MAX_FILE_BYTES, protocol.MAX_FILE_BYTES + 1),
    "at": (0, 512, protocol.MAX_PAYLOAD_BYTES, protocol.MAX_PAYLOAD_BYTES + 1),
}
TAKEN: dict[str, set[Any]] = {
    "mode": {0, 999, 1000, 3999, 4000, 0o7777},
    "uid": {0, 9, 999_999_999, (1 << 32) - 2},
    "gid": {0, 4_000_000_000},
    "mtime": {0, protocol.MAX_MTIME_NS, 10**19},
    "name": {*VALUES["name"]} - {".", "..", "n" * 256},
    "size": {0, 1, 9_999_999_999, 10**10, protocol.MAX_FILE_BYTES},
    "at": {0, 512, protocol.MAX_PAYLOAD_BYTES},
}


@pytest.mark.parametrize("op", ["file", "dir", "symlink"])
@pytest.mark.parametrize("key", VALUES)
def test_values_up_to_their_bounds(op: str, key: str) -> None:
    """The plain lines, which are taken by one expression, and all others have the same bounds."""
    plain = json.loads({"file": FILE, "dir": DIR, "symlink": SYMLINK}[op])
    if op == "file":
        plain |= {"size": 1, "at": 1}
    for value in VALUES[key] if key in plain else ():
        changed = plain | {key: value} | ({"at": 0} if value == 0 and key == "size" else {})
        head = line(bytes=changed.get("size", 0), entries=1, format="imgpull.layer/1", parent=None)
        if value in TAKEN[key]:
            assert len(replay(head + line(**changed)).root) == 1
        else:
            with pytest.raises(RejectedError):
                replay(head + line(**changed))


def test_the_deepest_tree_can_be_listed_and_removed() -> None:
    lower = replay(nested(256))
    assert len(list(listing.rows(lower))) == 256


def test_order_of_layers_matters() -> None:
    first, second = manifests()
    with pytest.raises(RejectedError):
        replay(second)
    with pytest.raises(RejectedError):
        replay(first, first)
    with pytest.raises(RejectedError):
        replay(second, first)


def test_a_hostile_manifest_is_refused_by_the_check_itself() -> None:
    from tests.unpriv import checking
    from unpriv import pipeline
    from unpriv.findings import Findings

    findings = Findings(checking.LIMITS, 2, all_violations=False)
    report = pipeline.verdict(
        "tar", MemoryBlob(BASE), [MemoryBlob(b"{}\n")], checking.LIMITS, findings, checking.hasher(), pipeline.Outputs()
    )
    assert report["violations"][0]["rule"] == "lower_manifest_invalid"


TEXTS = ["t", "é", "\ud7ff", "\ue000", "\U0001f40d", "\udc80\udcff", '\\"\n\x7f', "\U0010ffff\udc80"]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_that_a_manifest_can_hold_is_read(text: str) -> None:
    lower = replay(made(line(op="symlink", name="s", target=text, gid=0, mtime=0, uid=0, xattrs={}, **{"in": 0})))
    (row,) = (json.loads(found) for found in listing.rows(lower))
    shown = row["target"].encode() if "target" in row else bytes.fromhex(row["target_hex"])
    assert shown == text.encode("utf-8", "surrogateescape")
