"""Names, owners, modes, times, attributes and types of single members."""

from __future__ import annotations

import os
import struct
from typing import Any

import pytest

from privhelper.protocol import MAX_ID, MAX_MTIME_NS, MIN_MTIME_NS
from tests.unpriv.checking import check, tightened
from tests.unpriv.tarbytes import base256, directory, hardlink, member, octal, pax, symlink, tar

OK = member(b"ok", b"ok\n")
CAPABILITY = struct.pack("<IIIII", 0x02000001, 0x2000, 0, 0, 0)


def one(*members: bytes, **options: Any) -> dict[str, Any]:
    """Return the row of a layer's only entry."""
    result = check(tar(*members), **options)
    assert result.accepted, result.report
    assert len(result.tree) == 1, result.tree
    return result.tree[0]


# ---------------------------------------------------------------- names

NAMES = {
    b"plain": "plain",
    b"./dotted": "dotted",
    b"/absolute": "absolute",
    b"//absolute": "absolute",
    b"././twice": "twice",
    b"...": "...",
    b"..a": "..a",
    b"a..": "a..",
    b".hidden": ".hidden",
    b" ": " ",
    b"a b": "a b",
    b"-rf": "-rf",
    b"a\nb": "a\nb",
    b"\x1b[31m": "\x1b[31m",
    b"back\\slash": "back\\slash",
    b"C:": "C:",
    b'quote"': 'quote"',
    "fő".encode(): "fő",
    "e\u0301".encode(): "e\u0301",
    "\U0001f40d".encode(): "\U0001f40d",
    b"\x7f": "\x7f",
    b"wh.x": "wh.x",
    b"x.wh.y": "x.wh.y",
    b"n" * 100: "n" * 100,
}


@pytest.mark.parametrize("name", NAMES)
def test_name(name: bytes) -> None:
    assert one(member(name))["path"] == NAMES[name]
    assert one(pax((b"path", name)), member(b"other"))["path"] == NAMES[name]


@pytest.mark.parametrize("name", [b"a//b", b"a/./b", b"./a/b", b"/a/b", b"a///b", b"a/.//./b"])
def test_name_with_components_that_mean_nothing(name: bytes) -> None:
    assert set(check(tar(member(name))).paths()) == {"a", "a/b"}


ODD_BYTES = [
    b"caf\xe9",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"a\xc0\xafb",
    b"\xed\xa0\xbd\xed\xb0\x8d",
    b"\xf8\x88\x80\x80\x80",
]


@pytest.mark.parametrize("name", ODD_BYTES)
def test_name_that_is_not_utf8_stays_as_it_is(name: bytes) -> None:
    """From ustar, from PAX with hdrcharset=BINARY (libarchive, Python) and without (Go)."""
    for members in (
        (member(name),),
        (pax((b"hdrcharset", b"BINARY"), (b"path", name)), member(b"x")),
        (pax((b"path", name)), member(b"x")),
    ):
        result = check(tar(*members))
        assert result.accepted, result.report
        assert result.tree[0]["path_hex"] == name.hex()
        (operation,) = result.operations
        assert os.fsencode(operation["name"]) == name


def test_names_that_unicode_takes_for_equal_stay_two() -> None:
    """libarchive composes names of PAX headers; ours stay the bytes that they are."""
    composed, decomposed = "é".encode(), "e\u0301".encode()
    result = check(tar(pax((b"path", composed)), member(b"a"), pax((b"path", decomposed)), member(b"b")))
    assert set(result.paths()) == {"é", "e\u0301"}


def test_names_that_differ_in_case_stay_two() -> None:
    assert set(check(tar(member(b"README"), member(b"readme"))).paths()) == {"README", "readme"}


REFUSED_NAMES = {
    b"": "path_empty",
    b"..": "path_escapes_root",
    b"../x": "path_escapes_root",
    b"a/../b": "path_escapes_root",
    b"a/..": "path_escapes_root",
    b"/..": "path_escapes_root",
    b"./../x": "path_escapes_root",
    b"a/b/../../../x": "path_escapes_root",
    b".": "root_not_directory",
    b"./": "root_not_directory",
    b"/": "root_not_directory",
    b"f/": "trailing_slash",
    b"f//": "trailing_slash",
    b"/".join([b"a"] * 49): None,
    b"a/" * 49: "trailing_slash",
}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_refused_name(name: bytes) -> None:
    assert check(tar(OK, member(name))).rule == REFUSED_NAMES[name]


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        (b"n" * 255, None),
        (b"n" * 256, "component_too_long"),
        (b"/".join([b"d"] * 64), None),
        (b"/".join([b"d"] * 65), "path_too_deep"),
        (b"/".join([b"d" * 254] * 16), None),
        (b"/".join([b"d" * 255] * 16), None),
        (b"/".join([b"d" * 255] * 16 + [b"e"]), "path_too_long"),
        (b"a/" * 10_000 + b"a", "path_too_deep"),
    ],
)
def test_lengths_of_names(path: bytes, rule: str | None) -> None:
    assert check(tar(pax((b"path", path)), OK)).rule == rule


@pytest.mark.parametrize("kind", [b"1", b"3", b"6"])
def test_slash_at_the_end_of_what_is_no_directory(kind: bytes) -> None:
    other = member(b"x/", kind=kind, link=b"ok" if kind == b"1" else b"", major=1, minor=3)
    assert check(tar(OK, other)).rule == "trailing_slash"


def test_slash_at_the_end_of_a_symbolic_link_is_stripped() -> None:
    assert one(symlink(b"l/", b"t"))["path"] == "l"


# ---------------------------------------------------------------- the root


@pytest.mark.parametrize("name", [b".", b"./", b"/", b"//", b"./."])
def test_root_entry(name: bytes) -> None:
    result = check(tar(directory(name, mode=0o711, uid=3, gid=4), OK))
    assert result.operations[0] == {
        "gid": 4,
        "in": 0,
        "mode": 0o711,
        "mtime": 1_700_000_000 * 10**9,
        "name": "",
        "op": "meta",
        "uid": 3,
        "xattrs": {},
    }
    assert result.paths()["."]["mode"] == 0o711


def test_root_entry_that_comes_last_is_still_the_first_operation() -> None:
    result = check(tar(OK, directory(b"./", mode=0o700)))
    assert [operation["op"] for operation in result.operations] == ["meta", "file"]


def test_root_twice_last_wins() -> None:
    assert check(tar(directory(b"./", mode=0o700), directory(b"./", mode=0o755))).operations[0]["mode"] == 0o755


@pytest.mark.parametrize("kind", [b"0", b"2", b"6"])
def test_root_as_something_else(kind: bytes) -> None:
    assert check(tar(member(b"./", kind=kind, link=b"t" if kind == b"2" else b""))).rule == "root_not_directory"


# ---------------------------------------------------------------- owners, modes, times


@pytest.mark.parametrize("owner", [0, 1, 65_534, 1 << 31, (1 << 32) - 2])
def test_owner(owner: int) -> None:
    row = one(member(b"f", uid=base256(owner, 8), gid=base256(owner, 8)))
    assert (row["uid"], row["gid"]) == (owner, owner)


@pytest.mark.parametrize(("owner", "said"), [(MAX_ID, 0), (MAX_ID + 1, 2), ((1 << 32) - 2, 2)])
def test_owner_that_the_helper_cannot_keep_is_said(owner: int, said: int) -> None:
    """The archive is sound, but a commit of its layer will be refused: nobody should learn that only then."""
    report = check(tar(member(b"f", uid=base256(owner, 8), gid=base256(owner, 8)))).report
    assert [warning["rule"] for warning in report["warnings"]] == ["id_above_helper"] * said


@pytest.mark.parametrize("owner", [(1 << 32) - 1, 1 << 32, (1 << 32) + 5, 1 << 40])
def test_owner_that_would_become_another(owner: int) -> None:
    """2^32-1 means `leave unchanged` to chown(2), so the file would stay root's; 2^32 is cut to root."""
    assert check(tar(member(b"f", uid=base256(owner, 8), mode=0o4755))).rule == "id_out_of_range"
    assert check(tar(member(b"f", gid=base256(owner, 8)))).rule == "id_out_of_range"
    assert check(tar(pax((b"uid", b"%d" % owner)), member(b"f"))).rule == "id_out_of_range"


@pytest.mark.parametrize("mode", [0, 0o644, 0o755, 0o777, 0o1777, 0o2755, 0o4755, 0o7777])
def test_mode(mode: int) -> None:
    assert one(member(b"f", mode=mode))["mode"] == mode


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (member(b"f", mode=0o100644), None),
        (directory(b"d", mode=0o040755), None),
        (member(b"f", mode=0o040755), "mode_type_conflict"),
        (directory(b"d", mode=0o100755), "mode_type_conflict"),
        (member(b"f", mode=0o060666), "mode_type_conflict"),
        (OK + hardlink(b"h", b"ok", mode=0o100644), None),
        (OK + hardlink(b"h", b"ok", mode=0o060644), "mode_type_conflict"),
        (member(b"f", mode=0o7707777), None),
        (member(b"f", mode=0o200644), None),
        (member(b"f", mode=0o250644), "mode_type_conflict"),
        (member(b"f", mode=base256(0o10000644, 8)), "mode_invalid"),
    ],
)
def test_type_bits_of_a_mode(data: bytes, rule: str | None) -> None:
    assert check(tar(data)).rule == rule


def test_bits_above_type_and_permissions_are_left_out_and_counted() -> None:
    result = check(tar(member(b"f", mode=0o7707777)))
    assert (result.operations[0]["mode"], result.report["dropped"]) == (0o7777, {"mode_bits_dropped": 1})


TIMES = {
    b"-1.25": -1_250_000_000,
    b"-2147483648": -(1 << 31) * 10**9,
    b"0": 0,
    b"1700000000.123456789": 1_700_000_000_123_456_789,
    b"1700000000.5": 1_700_000_000_500_000_000,
    b"1700000000.": 1_700_000_000_000_000_000,
    b"1700000000.1234567899999": 1_700_000_000_123_456_789,
    b"15032385535": 15_032_385_535 * 10**9,
}


@pytest.mark.parametrize("time", TIMES)
def test_time_to_the_nanosecond(time: bytes) -> None:
    result = check(tar(pax((b"mtime", time)), OK))
    assert result.operations[0]["mtime"] == TIMES[time]
    assert not result.report["warnings"]


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        ([pax((b"mtime", b"-2147483648.000000001")), OK], MIN_MTIME_NS),
        ([member(b"f", mtime=base256(-(1 << 31) - 1, 12))], MIN_MTIME_NS),
        ([member(b"f", mtime=base256(1 << 40, 12))], MAX_MTIME_NS),
        ([pax((b"mtime", b"99999999999999999999")), OK], MAX_MTIME_NS),
    ],
)
def test_time_that_ext4_cannot_hold_is_clamped_and_said(members: list[bytes], kept: int) -> None:
    result = check(tar(*members))
    assert result.operations[0]["mtime"] == kept
    assert [warning["rule"] for warning in result.report["warnings"]] == ["mtime_clamped"]
    assert result.report["dropped"]["mtime_clamped"] == 1


# ---------------------------------------------------------------- attributes


def with_xattr(name: bytes, value: bytes, *members: bytes) -> bytes:
    return tar(pax((b"SCHILY.xattr." + name, value)), *(members or (OK,)))


def test_capability_is_kept_byte_for_byte() -> None:
    result = check(with_xattr(b"security.capability", CAPABILITY))
    assert result.tree[0]["xattrs"] == {"security.capability": CAPABILITY.hex()}
    assert result.operations[0]["xattrs"] == {"security.capability": CAPABILITY.hex()}


@pytest.mark.parametrize(
    ("value", "members", "rule"),
    [
        (CAPABILITY, (directory(b"d"),), "capability_invalid"),
        (CAPABILITY, (symlink(b"l", b"/bin/ping"),), "xattr_on_link"),
        (CAPABILITY[:12], (OK,), "capability_invalid"),
        (CAPABILITY + b"\0", (OK,), "capability_invalid"),
        (b"", (OK,), "capability_invalid"),
        (b"\0\0\0\3" + bytes(16), (OK,), "capability_invalid"),
        (struct.pack("<IIIIII", 0x03000001, 1, 0, 0, 0, 1000), (OK,), None),
    ],
)
def test_capability_in_the_wrong_place_or_form(value: bytes, members: tuple[bytes, ...], rule: str | None) -> None:
    assert check(with_xattr(b"security.capability", value, *members)).rule == rule


def test_capability_that_the_helper_cannot_keep_is_said() -> None:
    third = struct.pack("<IIIIII", 0x03000001, 1, 0, 0, 0, 1000)
    for value, said in ((CAPABILITY, []), (third, ["capability_above_helper"])):
        report = check(with_xattr(b"security.capability", value)).report
        assert [warning["rule"] for warning in report["warnings"]] == said


def test_user_attributes_are_kept() -> None:
    assert check(with_xattr(b"user.mime", b"text\0\n")).tree[0]["xattrs"] == {"user.mime": b"text\0\n".hex()}
    assert check(with_xattr(b"user.mime", b"")).tree[0]["xattrs"] == {"user.mime": ""}
    assert check(with_xattr(b"user.mime", b"x", directory(b"d"))).tree[0]["xattrs"] == {"user.mime": b"x".hex()}


@pytest.mark.parametrize(
    "name",
    [
        b"trusted.overlay.opaque",
        b"trusted.md5sum",
        b"user.",
        b"user",
        b"user.overlay.redirect",
        b"security.other",
        b"odd",
    ],
)
def test_attribute_outside_the_allow_list(name: bytes) -> None:
    assert check(with_xattr(name, b"y", directory(b"d"))).rule == "xattr_not_allowed"


@pytest.mark.parametrize(
    ("key", "dropped"),
    [
        (b"SCHILY.xattr.security.selinux", "xattr_dropped"),
        (b"SCHILY.xattr.security.ima", "xattr_dropped"),
        (b"SCHILY.xattr.com.apple.provenance", "xattr_dropped"),
        (b"SCHILY.xattr.system.posix_acl_access", "acl_dropped"),
        (b"SCHILY.acl.access", "acl_dropped"),
        (b"RHT.security.selinux", "xattr_dropped"),
        (b"comment", "comment_dropped"),
        (b"atime", "time_dropped"),
        (b"LIBARCHIVE.creationtime", "time_dropped"),
        (b"uname", "owner_name_dropped"),
        (b"SCHILY.ino", "vendor_record_dropped"),
    ],
)
def test_what_honest_images_carry_is_counted(key: bytes, dropped: str) -> None:
    value = b"user::rw-,group::r--,other::r--" if key == b"SCHILY.acl.access" else b"1"
    result = check(tar(pax((key, value)), OK))
    assert result.accepted, result.report
    assert result.report["dropped"] == {dropped: 1}
    assert "xattrs" not in result.tree[0]


def test_an_access_list_does_not_change_the_mode() -> None:
    """libarchive computes a mode from it; ours is the header's."""
    result = check(tar(pax((b"SCHILY.acl.access", b"user::rw-,group::---,other::---")), member(b"f", mode=0o644)))
    assert result.tree[0]["mode"] == 0o644


def test_attribute_that_only_libarchive_sees() -> None:
    """bsdtar writes both forms; one alone, or two that differ, smuggle a capability past other readers."""
    private = b"LIBARCHIVE.xattr.user.a%20b"
    good = tar(pax((b"SCHILY.xattr.user.a b", b"value"), (private, b"dmFsdWU")), OK)
    assert check(good).tree[0]["xattrs"] == {"user.a b": b"value".hex()}
    assert check(tar(pax((private, b"dmFsdWU")), OK)).rule == "xattr_conflict"
    assert check(tar(pax((b"SCHILY.xattr.user.a b", b"other"), (private, b"dmFsdWU")), OK)).rule == "xattr_conflict"
    assert check(tar(pax((b"SCHILY.xattr.user.a b", b"value"), (private, b"!!!")), OK)).rule == "xattr_conflict"


def test_attributes_of_a_hard_link_do_not_touch_the_file() -> None:
    result = check(tar(OK, pax((b"SCHILY.xattr.user.a", b"1")), hardlink(b"h", b"ok", mode=0o4777, uid=9)))
    assert result.report["dropped"] == {"hardlink_metadata_dropped": 1}
    assert result.paths()["ok"] == one(OK)


# ---------------------------------------------------------------- devices and pipes

SPECIALS = {b"3": ("char", "device_refused"), b"4": ("block", "device_refused"), b"6": ("fifo", "fifo_refused")}


@pytest.mark.parametrize("kind", SPECIALS)
def test_device_or_pipe(kind: bytes) -> None:
    word, rule = SPECIALS[kind]
    data = tar(OK, member(b"dev/x", kind=kind, major=1, minor=3))
    assert check(data).rule == rule
    result = check(data, limits=tightened(special={word: "omit"}))
    assert result.report["omitted"] == [f"{word} dev/x"]
    assert set(result.paths()) == {"ok", "dev"}


def test_overlay_whiteout_device_is_never_let_through() -> None:
    limits = tightened(special={"char": "omit"})
    assert check(tar(member(b"x", kind=b"3", major=0, minor=0)), limits=limits).rule == "whiteout_device"


def test_an_omitted_device_still_replaces_what_a_lower_layer_has() -> None:
    result = check(
        tar(member(b"null", b"a file")),
        tar(member(b"null", kind=b"3", major=1, minor=3)),
        limits=tightened(special={"char": "omit"}),
    )
    assert result.tree == []
    assert [operation["op"] for operation in result.operations] == ["remove"]


def test_more_omitted_entries_than_a_report_holds() -> None:
    limits = tightened(special={"fifo": "omit"}, report={"omitted": 2})
    assert check(tar(*(member(b"%d" % n, kind=b"6") for n in range(2))), limits=limits).accepted
    assert check(tar(*(member(b"%d" % n, kind=b"6") for n in range(3))), limits=limits).rule == "omitted_too_many"


def test_a_report_with_the_longest_names_still_fits_its_line() -> None:
    long = b"\x01" * 200
    limits = tightened(special={"fifo": "omit"})
    result = check(tar(*(member(b"d/" + b"%05d" % n + long[:90], kind=b"6") for n in range(9_000))), limits=limits)
    assert result.rule == "omitted_too_many"
    bad = tar(*(pax((b"path", b"../" + b"\x01" * 3_000)) + OK for _ in range(200)))
    assert len(repr(check(bad, all_violations=True).report)) < 1 << 20
    assert octal(8, 4) == b"010\0"
