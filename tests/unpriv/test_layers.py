"""Layers on top of layers: whiteouts, links, parents, replacements; a test a row of what unpackers do differently.

Each test states the merged tree; where it matters, the operations that root is asked for.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.unpriv.checking import Result, check
from tests.unpriv.tarbytes import directory, hardlink, member, pax, symlink, tar

BASE = tar(
    directory(b"etc"),
    member(b"etc/a", b"1"),
    member(b"etc/b", b"2"),
    directory(b"d", mode=0o711, uid=7),
    member(b"d/x", b"x"),
    directory(b"d/sub"),
    member(b"d/sub/y", b"y"),
    symlink(b"l", b"etc"),
    symlink(b"out", b"/tmp/imgpull-pwned"),
    member(b"f", b"shared"),
    hardlink(b"h", b"f"),
)
OPAQUE = b".wh..wh..opq"


def names(*layers: bytes) -> set[str]:
    result = check(*layers)
    assert result.accepted, result.report
    return set(result.paths())


def gone(*names_gone: str) -> set[str]:
    return names(BASE) - set(names_gone)


def removals(result: Result) -> list[tuple[str, bool]]:
    return [(op["name"], op["dir"]) for op in result.operations if op["op"] == "remove"]


def opened(result: Result) -> list[str]:
    return [op["op"] for op in result.operations]


# ---------------------------------------------------------------- whiteouts


def test_whiteout_of_a_file() -> None:
    result = check(BASE, tar(member(b"etc/.wh.b")))
    assert set(result.paths()) == gone("etc/b")
    assert opened(result) == ["enter", "remove"]


def test_whiteout_of_a_tree_removes_each_descendant_deepest_first() -> None:
    result = check(BASE, tar(member(b".wh.d")))
    assert set(result.paths()) == gone("d", "d/x", "d/sub", "d/sub/y")
    assert removals(result) == [("y", False), ("sub", True), ("x", False), ("d", True)]


def test_whiteout_of_a_symbolic_link_spares_its_target() -> None:
    assert names(BASE, tar(member(b".wh.l"))) == gone("l")


def test_whiteout_then_the_same_name_again() -> None:
    result = check(BASE, tar(member(b"etc/.wh.a"), member(b"etc/a", b"new")))
    assert result.paths()["etc/a"]["size"] == 3


def test_the_same_name_and_then_its_whiteout() -> None:
    """containerd deletes the new file; whiteouts hide lower layers only."""
    result = check(BASE, tar(member(b"etc/a", b"new"), member(b"etc/.wh.a")))
    assert result.paths()["etc/a"]["size"] == 3


def test_whiteout_of_a_directory_then_that_directory_starts_afresh() -> None:
    for order in itertools.permutations([member(b".wh.d"), directory(b"d"), member(b"d/new", b"n")]):
        result = check(BASE, tar(*order))
        assert set(result.paths()) == gone("d/x", "d/sub", "d/sub/y") | {"d/new"}
        assert result.paths()["d"]["mode"] == 0o755


def test_directory_and_then_its_whiteout_keeps_the_directory() -> None:
    """containerd fails at its last step."""
    assert names(BASE, tar(directory(b"d"), member(b".wh.d"))) == gone("d/x", "d/sub", "d/sub/y")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_opaque_directory_in_any_order(order: tuple[int, ...]) -> None:
    """containerd loses a child that comes before the marker below an undeclared directory."""
    members = [member(b"d/" + OPAQUE), member(b"d/new", b"n"), member(b"d/sub2/z", b"z")]
    result = check(BASE, tar(*(members[n] for n in order)))
    assert set(result.paths()) == gone("d/x", "d/sub", "d/sub/y") | {"d/new", "d/sub2", "d/sub2/z"}
    assert result.paths()["d"] == check(BASE).paths()["d"]  # not declared here: it keeps its metadata


def test_opaque_directory_that_is_declared() -> None:
    result = check(BASE, tar(directory(b"d", mode=0o700), member(b"d/" + OPAQUE)))
    assert set(result.paths()) == gone("d/x", "d/sub", "d/sub/y")
    assert opened(result)[0] == "meta"


def test_opaque_directory_does_not_merge_what_is_below() -> None:
    result = check(BASE, tar(member(b"d/" + OPAQUE), directory(b"d/sub"), member(b"d/sub/z", b"z")))
    assert set(result.paths()) == gone("d/x", "d/sub/y") | {"d/sub/z"}


def test_opaque_root() -> None:
    assert names(BASE, tar(member(OPAQUE), member(b"only", b"o"))) == {"only"}


@pytest.mark.parametrize(
    "members",
    [
        (member(b"etc/.wh.nothing"),),
        (member(b"nowhere/.wh.x"),),
        (member(b"nowhere/deep/" + OPAQUE),),
        (member(b".wh.d"), member(b"d/.wh.x")),
        (member(b"d/.wh.x"), member(b".wh.d"), member(b"d/sub/" + OPAQUE)),
    ],
)
def test_whiteout_of_nothing_makes_nothing(members: tuple[bytes, ...]) -> None:
    """containerd makes the parent directories; here it is counted and changes nothing."""
    result = check(BASE, tar(*members))
    assert result.accepted, result.report
    assert result.report["dropped"]["whiteout_without_target"] >= 1
    assert not {"nowhere", "nowhere/deep"} & set(result.paths())
    assert set(opened(result)) <= {"enter", "remove"}


def test_whiteout_in_the_first_layer() -> None:
    result = check(tar(member(b".wh.x"), member(b"f", b"1")))
    assert set(result.paths()) == {"f"}
    assert result.report["dropped"] == {"whiteout_without_target": 1}


@pytest.mark.parametrize("name", [b".wh.", b".wh..", b".wh...", b"etc/.wh.", b"etc/.wh..", b"etc/.wh..."])
def test_whiteout_of_the_directory_itself_or_its_parent(name: bytes) -> None:
    result = check(BASE, tar(member(name)))
    assert result.rule == "whiteout_name_invalid"
    assert result.manifest == b""


@pytest.mark.parametrize("name", [b".wh..wh.plnk", b".wh..wh.aufs", b".wh..wh.orph", b".wh..wh..opq2", b".wh..wh."])
def test_reserved_whiteout_names(name: bytes) -> None:
    assert check(BASE, tar(member(name))).rule == "whiteout_name_invalid"


@pytest.mark.parametrize(
    "whiteout",
    [
        member(b"etc/.wh.a", b"content"),
        directory(b"etc/.wh.a"),
        symlink(b"etc/.wh.a", b"b"),
        member(b"etc/.wh.a", kind=b"6"),
        hardlink(b"etc/.wh.a", b"etc/b"),
        member(b"d/" + OPAQUE, b"content"),
        directory(b"d/" + OPAQUE),
    ],
)
def test_whiteout_that_is_no_empty_file(whiteout: bytes) -> None:
    assert check(BASE, tar(whiteout)).rule in ("whiteout_not_empty_file", "fifo_refused")


@pytest.mark.parametrize("name", [b".wh.etc/somefile", b"a/.wh.b/c", b".wh..wh..opq/x", b".wh.x/.wh.y"])
def test_whiteout_prefix_on_a_directory_of_the_path(name: bytes) -> None:
    assert check(BASE, tar(member(name))).rule == "whiteout_in_path"


@pytest.mark.parametrize("name", [b"l/.wh.a", b"out/.wh.canary", b"l/" + OPAQUE, b"out/" + OPAQUE, b"l/sub/.wh.x"])
def test_whiteout_through_a_symbolic_link(name: bytes) -> None:
    assert check(BASE, tar(member(name))).rule == "parent_is_symlink"


def test_whiteout_below_a_file() -> None:
    assert check(BASE, tar(member(b"f/.wh.x"))).rule == "parent_not_directory"


def test_whiteout_of_one_name_of_a_file_spares_the_other() -> None:
    result = check(BASE, tar(member(b".wh.f")))
    assert set(result.paths()) == gone("f")
    assert (result.paths()["h"]["type"], result.paths()["h"]["size"]) == ("file", 6)


# ---------------------------------------------------------------- parents


@pytest.mark.parametrize(
    "members",
    [
        (symlink(b"a", b"/tmp/imgpull-pwned"), member(b"a/f", b"!")),
        (symlink(b"a", b"etc"), directory(b"etc"), member(b"a/f", b"!")),
        (directory(b"x"), symlink(b"x/a", b"../../.."), member(b"x/a/f", b"!")),
        (symlink(b"a", b"."), member(b"a/a/a/f", b"!")),
        (symlink(b"a", b"b"), symlink(b"b", b"a"), member(b"a/f", b"!")),
        (symlink(b"a", b"missing"), directory(b"a/d")),
        (symlink(b"a", b"etc"), symlink(b"a/b", b"c")),
        (symlink(b"a", b"etc"), member(b"a/.wh.x")),
    ],
)
def test_write_through_a_symbolic_link_of_the_same_layer(members: tuple[bytes, ...]) -> None:
    """CVE-2018-20834, CVE-2021-32803 and their like."""
    assert check(tar(*members)).rule == "parent_is_symlink"


@pytest.mark.parametrize("name", [b"l/new", b"out/new", b"l/sub/new", b"out/a/b/c"])
def test_write_through_a_symbolic_link_of_a_lower_layer(name: bytes) -> None:
    """CVE-2025-45582, CVE-2014-6407: refused, see policy/decisions/check-symlinked-parents.md."""
    result = check(BASE, tar(member(name, b"!")))
    assert result.rule == "parent_is_symlink"
    assert result.report["violations"][0]["name"] == name.split(b"/")[0].decode()


@pytest.mark.parametrize("replace", [directory(b"l"), member(b".wh.l")])
def test_a_symbolic_link_that_this_layer_replaces_is_no_parent_any_more(replace: bytes) -> None:
    for order in ((replace, member(b"l/new", b"n")), (member(b"l/new", b"n"), replace)):
        result = check(BASE, tar(*order))
        assert result.paths()["l"]["type"] == "dir"
        assert set(result.paths()) == gone() | {"l/new"}
        assert removals(result) == [("l", False)]


@pytest.mark.parametrize("name", [b"f/x", b"f/x/y", b"h/x"])
def test_parent_that_is_a_file_of_a_lower_layer(name: bytes) -> None:
    assert check(BASE, tar(member(name, b"!"))).rule == "parent_not_directory"


def test_parent_that_is_a_file_of_this_layer() -> None:
    assert check(tar(member(b"a", b"1"), member(b"a/b", b"!"))).rule == "parent_not_directory"
    assert check(tar(member(b"a/b", b"!"), member(b"a", b"1"))).rule == "duplicate_entry"


def test_parents_that_nobody_declares() -> None:
    result = check(tar(member(b"x/y/z/f", b"1")))
    assert result.paths()["x/y"] == {
        "gid": 0,
        "implicit": True,
        "mode": 0o755,
        "mtime": 0,
        "path": "x/y",
        "type": "dir",
        "uid": 0,
    }


def test_parent_that_is_declared_later() -> None:
    result = check(tar(member(b"a/f", b"1"), directory(b"a", mode=0o700, uid=5)))
    assert (result.paths()["a"]["mode"], result.paths()["a"]["uid"]) == (0o700, 5)


def test_a_touched_directory_of_a_lower_layer_keeps_its_metadata() -> None:
    """containerd leaves the time of the day."""
    result = check(BASE, tar(member(b"d/new", b"n")))
    assert result.paths()["d"] == check(BASE).paths()["d"]
    assert opened(result) == ["enter", "file"]


# ---------------------------------------------------------------- replacements

REPLACEMENTS: dict[str, tuple[bytes, str, list[tuple[str, bool]]]] = {
    "file_over_file": (member(b"f", b"new"), "file", [("f", False)]),
    "file_over_symbolic_link": (member(b"out", b"new"), "file", [("out", False)]),
    "file_over_tree": (member(b"d", b"new"), "file", [("y", False), ("sub", True), ("x", False), ("d", True)]),
    "link_over_tree": (symlink(b"d", b"etc"), "symlink", [("y", False), ("sub", True), ("x", False), ("d", True)]),
    "link_over_file": (symlink(b"f", b"etc"), "symlink", [("f", False)]),
    "directory_over_file": (directory(b"f"), "dir", [("f", False)]),
    "directory_over_symbolic_link": (directory(b"l"), "dir", [("l", False)]),
    "directory_over_link_to_the_outside": (directory(b"out"), "dir", [("out", False)]),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replacement(name: str) -> None:
    data, kind, expected = REPLACEMENTS[name]
    result = check(BASE, tar(data))
    path = data[:100].rstrip(b"\0").decode()
    assert result.paths()[path]["type"] == kind
    assert removals(result) == expected
    assert {other for other in result.paths() if other.startswith(path + "/")} == set()


def test_directory_over_directory_changes_its_metadata_only() -> None:
    result = check(BASE, tar(directory(b"d", mode=0o700, uid=9)))
    assert set(result.paths()) == gone()
    assert (result.paths()["d"]["mode"], result.paths()["d"]["uid"]) == (0o700, 9)
    assert opened(result) == ["meta"]


def test_attributes_do_not_shine_through() -> None:
    lower = tar(pax((b"SCHILY.xattr.user.a", b"1")), directory(b"d"), pax((b"SCHILY.xattr.user.a", b"1")), member(b"f"))
    result = check(lower, tar(directory(b"d"), member(b"f")))
    assert "xattrs" not in result.paths()["d"] and "xattrs" not in result.paths()["f"]
    assert [op["xattrs"] for op in result.operations if op["op"] == "meta"] == [{}]


def test_replacing_one_name_of_a_file_spares_the_other() -> None:
    result = check(BASE, tar(member(b"f", b"new")))
    assert (result.paths()["f"]["size"], result.paths()["h"]["size"]) == (3, 6)
    assert result.paths()["h"]["type"] == "file"


# ---------------------------------------------------------------- duplicates


def test_directory_twice_last_wins() -> None:
    assert check(tar(directory(b"a", mode=0o700), directory(b"a/", mode=0o711))).paths()["a"]["mode"] == 0o711


KINDS = {
    "file": member(b"a", b"1"),
    "symlink": symlink(b"a", b"t"),
    "directory": directory(b"a"),
    "link": hardlink(b"a", b"t"),
    "with_a_child": member(b"a/b", b"1"),
    "spelled_otherwise": member(b"./a", b"1"),
}


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_duplicate(first: str, second: str) -> None:
    """Everything twice but directories: dir then symlink then file is how caches of checked directories are fooled."""
    data = tar(member(b"t", b"t"), KINDS[first], KINDS[second])
    allowed = {("directory", "directory"), ("directory", "with_a_child"), ("with_a_child", "directory")}
    result = check(data)
    if (first, second) in allowed:
        assert result.accepted
    else:
        assert result.rule in ("duplicate_entry", "parent_is_symlink", "parent_not_directory"), result.report


# ---------------------------------------------------------------- hard links


def links(result: Result) -> dict[str, str]:
    return {row["path"]: row["link"] for row in result.tree if row["type"] == "hardlink"}


def test_hard_link() -> None:
    result = check(tar(member(b"f", b"1"), directory(b"d"), hardlink(b"d/h", b"f")))
    assert links(result) == {"d/h": "f"}
    assert result.operations[-1] == {"in": 3, "name": "h", "op": "link", "to": ["f"]}


def test_hard_link_to_a_hard_link_names_the_file_itself() -> None:
    result = check(tar(member(b"m", b"1"), hardlink(b"a", b"m"), hardlink(b"z", b"a"), hardlink(b"b", b"z")))
    assert links(result) == {"a": "m", "b": "m", "z": "m"}
    assert [op["to"] for op in result.operations if op["op"] == "link"] == [["m"]] * 3


def test_hard_links_come_after_all_files() -> None:
    result = check(tar(member(b"z/f", b"1"), hardlink(b"a/h", b"z/f"), hardlink(b"b", b"./z/f")))
    assert opened(result) == ["dir", "dir", "file", "enter", "link", "link"]
    assert [op["in"] for op in result.operations] == [0, 0, 2, 0, 4, 0]


@pytest.mark.parametrize("target", [b"f", b"/f", b"./f", b"//f"])
def test_hard_link_to_a_file_of_a_lower_layer(target: bytes) -> None:
    result = check(BASE, tar(hardlink(b"new", target)))
    assert links(result) == {"h": "f", "new": "f"}
    assert result.operations == [{"in": 0, "name": "new", "op": "link", "to": ["f"]}]


def test_hard_link_to_the_other_name_of_a_lower_file() -> None:
    assert links(check(BASE, tar(hardlink(b"new", b"h")))) == {"h": "f", "new": "f"}


def test_a_links_own_header_never_changes_the_file() -> None:
    """containerd gives the shared file the link's mode and owner."""
    before = check(BASE).paths()["f"]
    after = check(BASE, tar(hardlink(b"new", b"f", mode=0o4777, uid=1000, mtime=5))).paths()["f"]
    assert after == before


REFUSED_LINKS: dict[str, tuple[tuple[bytes, ...], str]] = {
    "missing": ((hardlink(b"h2", b"missing"),), "hardlink_target_missing"),
    "itself": ((hardlink(b"h2", b"h2"),), "hardlink_target_missing"),
    "forward": ((hardlink(b"h2", b"later"), member(b"later", b"1")), "hardlink_target_missing"),
    "absolute_to_the_host": ((hardlink(b"h2", b"/tmp/imgpull-pwned/canary"),), "hardlink_target_missing"),
    "dotdot": ((hardlink(b"h2", b"../../tmp/imgpull-pwned/canary"),), "hardlink_escapes_root"),
    "dotdot_inside": ((hardlink(b"h2", b"etc/../f"),), "hardlink_escapes_root"),
    "empty": ((hardlink(b"h2", b""),), "hardlink_target_missing"),
    "directory_of_a_lower_layer": ((hardlink(b"h2", b"etc"),), "hardlink_target_not_file"),
    "directory_of_this_layer": ((directory(b"n"), hardlink(b"h2", b"n")), "hardlink_target_not_file"),
    "undeclared_directory": ((member(b"n/f", b"1"), hardlink(b"h2", b"n")), "hardlink_target_not_file"),
    "root": ((hardlink(b"h2", b"/"),), "hardlink_target_not_file"),
    "link_that_this_layer_removes": ((hardlink(b"h2", b"l"), member(b".wh.l")), "hardlink_target_removed"),
    "through_a_link_of_a_lower_layer": ((hardlink(b"h2", b"l/a"),), "hardlink_escapes_root"),
    "through_a_link_to_the_outside": ((hardlink(b"h2", b"out/canary"),), "hardlink_escapes_root"),
    "through_a_link_of_this_layer": ((symlink(b"s", b"etc"), hardlink(b"h2", b"s/a")), "hardlink_escapes_root"),
    "below_a_file": ((hardlink(b"h2", b"f/x"),), "hardlink_target_missing"),
    "whited_out_before": ((member(b".wh.f"), hardlink(b"h2", b"f")), "hardlink_target_removed"),
    "whited_out_after": ((hardlink(b"h2", b"f"), member(b".wh.f")), "hardlink_target_removed"),
    "replaced_after": ((hardlink(b"h2", b"f"), member(b"f", b"new")), "hardlink_target_removed"),
    "in_an_opaque_directory": ((hardlink(b"h2", b"d/x"), member(b"d/" + OPAQUE)), "hardlink_target_removed"),
    "in_a_replaced_directory": ((hardlink(b"h2", b"d/sub/y"), member(b"d", b"new")), "hardlink_target_removed"),
    "in_a_whited_out_directory": ((hardlink(b"h2", b"d/sub/y"), member(b"d/.wh.sub")), "hardlink_target_removed"),
    "replacing_its_own_target": ((hardlink(b"f", b"f"),), "hardlink_target_removed"),
}


@pytest.mark.parametrize("name", REFUSED_LINKS)
def test_refused_hard_link(name: str) -> None:
    members, rule = REFUSED_LINKS[name]
    assert check(BASE, tar(*members)).rule == rule


def test_hard_link_in_a_directory_that_is_only_entered_for_it() -> None:
    result = check(BASE, tar(hardlink(b"d/sub/h2", b"etc/a"), hardlink(b"d/h3", b"etc/a")))
    assert opened(result) == ["enter", "link", "enter", "link"]
    assert [op["in"] for op in result.operations] == [0, 1, 1, 3]


def test_hard_link_over_what_a_lower_layer_has() -> None:
    result = check(BASE, tar(hardlink(b"d", b"f")))
    assert opened(result)[-1] == "link" and removals(result)[-1] == ("d", True)
    assert links(result) == {"d": "f", "h": "f"}


@pytest.mark.parametrize("layers", [(symlink(b"s", b"/etc/shadow"), b""), (b"", symlink(b"s", b"/etc/shadow"))])
def test_hard_link_to_a_symbolic_link_is_of_the_link_itself(layers: tuple[bytes, bytes]) -> None:
    """Of this layer or of a lower one: its inode has two names, and its target is never looked at."""
    lower, upper = layers
    result = check(tar(lower), tar(upper, hardlink(b"s2", b"s", mode=0o777)), tar(hardlink(b"s3", b"s2")))
    assert result.accepted, result.report
    assert links(result) == {"s2": "s", "s3": "s"}
    assert result.paths()["s"]["target"] == "/etc/shadow"


# ---------------------------------------------------------------- the order does not matter

ANY_ORDER = [
    directory(b"d", mode=0o750),
    member(b"d/new", b"n"),
    member(b"d/.wh.x"),
    symlink(b"s", b"/etc"),
    member(b"etc/.wh.a"),
    member(b"etc/c/deep", b"c"),
]


def test_the_manifest_does_not_depend_on_the_order_of_the_archive() -> None:
    """Same entries, same operations; only the offsets of the data differ."""

    def shape(layer: bytes) -> list[dict[str, Any]]:
        return [{k: v for k, v in op.items() if k != "at"} for op in check(BASE, layer, want_tree=False).operations]

    shapes = [shape(tar(*order)) for order in itertools.permutations(ANY_ORDER)]
    assert all(other == shapes[0] for other in shapes)


def test_the_same_archive_gives_the_same_bytes() -> None:
    layers = (BASE, tar(*ANY_ORDER))
    assert check(*layers).manifest == check(*layers).manifest
    assert check(*layers).report == check(*layers).report


def test_the_digest_names_the_lower_layers() -> None:
    first = check(BASE)
    second = check(BASE, tar(member(b"n", b"1")))
    other = check(tar(member(b"n", b"2")), tar(member(b"n2", b"1")))
    assert first.report["parent"] is None
    assert second.report["parent"] == first.report["layer"]
    assert other.report["parent"] not in (None, first.report["layer"])
