"""Manifests that both sides of the privilege boundary judge: what one accepts and the other refuses is a bug.

Each vector is a whole manifest, for a layer without a parent that is written into an empty file system, with PAYLOAD as
its payload. ``accepted`` is the verdict of both. Order among siblings is not judged here: it makes the name of a layer
unique and is the checker's to produce; root needs it for nothing.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

PAYLOAD = bytes(range(256)) * 16
SHA256 = hashlib.sha256(PAYLOAD[512:1024]).hexdigest()
EMPTY = hashlib.sha256(b"").hexdigest()


class Vector(NamedTuple):
    """One manifest and the verdict on it."""

    name: str
    accepted: bool
    manifest: bytes


def encode(fields: dict[str, Any]) -> bytes:
    """Return the one spelling of a line."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii") + b"\n"


def manifest(*operations: dict[str, Any] | bytes, **header: Any) -> bytes:
    """Return a manifest whose first line is right unless ``header`` says otherwise."""
    content = sum(op.get("size", 0) for op in operations if isinstance(op, dict) and op.get("op") == "file")
    first = {"bytes": content, "entries": len(operations), "format": "imgpull.layer/1", "parent": None} | header
    return encode(first) + b"".join(op if isinstance(op, bytes) else encode(op) for op in operations)


ROOT = {"op": "meta", "in": 0, "name": "", "mode": 0o755, "uid": 0, "gid": 0, "mtime": 0, "xattrs": {}}
DIR = ROOT | {"op": "dir", "name": "d"}
FILE = {"op": "file", "in": 0, "name": "f", "mode": 0o644, "uid": 0, "gid": 0, "mtime": 1, "xattrs": {}, "at": 512,
        "size": 512, "sha256": SHA256}  # fmt: skip
HOLLOW = FILE | {"at": 0, "size": 0, "sha256": EMPTY}
SYMLINK = {"op": "symlink", "in": 0, "name": "s", "target": "/etc", "uid": 0, "gid": 0, "mtime": 2, "xattrs": {}}
LINK = {"op": "link", "in": 0, "name": "l", "to": ["f"]}
ENTER = {"op": "enter", "in": 0, "name": "d"}
REMOVE = {"op": "remove", "in": 0, "name": "f", "dir": False}
CAPABILITY = "0100000200200000000000000000000000000000"
LAST_ID = 2_147_483_645
FIRST_MTIME = -(1 << 31) * 10**9
LAST_MTIME = 15_032_385_535 * 10**9


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _accepted() -> Iterator[tuple[str, bytes]]:
    yield "nothing", manifest()
    yield "root", manifest(ROOT)
    yield "one_of_each", manifest(ROOT, DIR, FILE, SYMLINK, LINK)
    yield "link_to_a_symlink", manifest(SYMLINK, LINK | {"to": ["s"]})
    yield "nested", manifest(ROOT, DIR, DIR | {"in": 2}, FILE | {"in": 3}, FILE | {"in": 2}, SYMLINK)
    yield "link_in_a_second_walk", manifest(DIR, FILE | {"in": 1}, ENTER, LINK | {"in": 3, "to": ["d", "f"]})
    yield "enter_made_directory", manifest(DIR, ENTER | {"name": "d"}, HOLLOW | {"in": 2})
    yield "remove_then_make", manifest(FILE, REMOVE, SYMLINK | {"name": "f"})
    yield "remove_directory", manifest(DIR, REMOVE | {"name": "d", "dir": True})
    yield "empty_file", manifest(HOLLOW)
    yield "mode_7777", manifest(FILE | {"mode": 0o7777}, DIR | {"mode": 0o7777})
    yield "mode_0", manifest(FILE | {"mode": 0}, DIR | {"mode": 0}, HOLLOW | {"in": 2})
    yield "last_id", manifest(FILE | {"uid": LAST_ID, "gid": LAST_ID}, SYMLINK | {"uid": LAST_ID})
    yield "first_mtime", manifest(ROOT | {"mtime": FIRST_MTIME}, SYMLINK | {"mtime": FIRST_MTIME}, FILE | {"mtime": -1})
    yield "last_mtime", manifest(ROOT | {"mtime": LAST_MTIME}, FILE | {"mtime": LAST_MTIME})
    yield "name_255_bytes", manifest(FILE | {"name": "n" * 255})
    yield "name_of_any_byte", manifest(FILE | {"name": "".join(chr(n) for n in range(1, 47)) + '\\"\x7f'})
    yield "name_utf8", manifest(FILE | {"name": "é☃\U0001f600"})
    yield "name_not_utf8", manifest(FILE | {"name": "a\udcff\udc80b"})
    yield "name_three_dots", manifest(FILE | {"name": "..."}, DIR | {"name": ".. "})
    yield "target_4095_bytes", manifest(SYMLINK | {"target": "t" * 4095})
    yield "target_dotdot", manifest(SYMLINK | {"target": "../../.."})
    yield "xattr_capability", manifest(FILE | {"xattrs": {"security.capability": CAPABILITY}})
    yield (
        "xattr_user",
        manifest(FILE | {"xattrs": {"user.a": "", "user.b": "00ff"}}, DIR | {"xattrs": {"user.a": "aa"}}),
    )
    yield "depth_64", manifest(*(DIR | {"in": n} for n in range(64)))


def _refused() -> Iterator[tuple[str, bytes]]:
    # the first line
    yield "no_bytes_at_all", b""
    yield "first_line_alone_without_end", manifest()[:-1]
    yield "format_2", manifest(format="imgpull.layer/2")
    yield "parent_short", manifest(parent="sha256:00")
    yield "parent_upper_case", manifest(parent="sha256:" + "A" * 64)
    yield "header_extra_field", manifest(extra=1)
    yield "header_bytes_float", manifest().replace(b'"bytes":0', b'"bytes":0.0')
    yield "header_bytes_negative", manifest(bytes=-1)
    yield "header_bytes_leading_zero", manifest().replace(b'"bytes":0', b'"bytes":00')
    yield "header_spaces", manifest().replace(b",", b", ")
    yield "header_twice", manifest(manifest())
    yield "fewer_entries", manifest(ROOT, entries=2)
    yield "more_entries", manifest(ROOT, DIR, entries=1)
    yield "fewer_bytes", manifest(FILE, bytes=513)
    yield "more_bytes", manifest(FILE, bytes=511)
    # the spelling of a line
    yield "line_without_end", manifest(ROOT)[:-1]
    yield "blank_line", manifest(b"\n")
    yield "carriage_return", manifest(encode(ROOT)[:-1] + b"\r\n")
    yield "byte_order_mark", manifest(b"\xef\xbb\xbf" + encode(ROOT))
    yield "nul_byte", manifest(encode(FILE).replace(b'"f"', b'"f\0"'))
    yield "raw_utf8", manifest(encode(FILE).replace(b'"f"', '"é"'.encode()))
    yield "escape_not_needed", manifest(encode(FILE).replace(b'"f"', b'"\\u0066"'))
    yield "escape_upper_case", manifest(encode(FILE).replace(b'"f"', b'"\\u00E9"'))
    yield "escape_slash", manifest(encode(SYMLINK).replace(b"/etc", b"\\/etc"))
    yield "escape_unknown", manifest(encode(FILE).replace(b'"f"', b'"\\x66"'))
    yield "escape_newline_by_number", manifest(encode(FILE).replace(b'"f"', b'"\\u000a"'))
    yield "keys_not_sorted", manifest(b'{"op":"enter","in":0,"name":"d"}\n')
    yield "key_twice", manifest(DIR, encode(ENTER).replace(b'"in":0', b'"in":0,"in":0'))
    yield "spaces", manifest(DIR, json.dumps(ENTER, sort_keys=True).encode() + b"\n")
    yield "array", manifest(b"[]\n")
    yield "number", manifest(b"1\n")
    yield "unknown_op", manifest(ENTER | {"op": "mount"})
    yield "op_missing", manifest(DIR, _without(ENTER, "op"))
    yield "field_missing", manifest(_without(FILE, "gid"))
    yield "xattrs_missing", manifest(_without(DIR, "xattrs"))
    yield "field_extra", manifest(DIR, ENTER | {"extra": 1})
    yield "number_as_text", manifest(FILE | {"mode": "420"})
    yield "number_as_float", manifest(FILE | {"mode": 420.0})
    yield "number_with_exponent", manifest(encode(FILE).replace(b'"mode":420', b'"mode":42e1'))
    yield "number_as_bool", manifest(FILE | {"mode": True})
    yield "number_null", manifest(FILE | {"mode": None})
    yield "bool_as_number", manifest(FILE, REMOVE | {"dir": 0})
    yield "line_too_long", manifest(FILE | {"xattrs": {f"user.{n}": "00" * 4096 for n in range(10)}})
    # names
    for name, text in {
        "empty": "", "dot": ".", "dotdot": "..", "slash": "a/b", "absolute": "/a", "only_slash": "/", "nul": "a\0b",
        "256_bytes": "n" * 256, "256_bytes_utf8": "é" * 128, "surrogate_for_no_byte": "\ud800",
        "surrogate_below_80": "\udc7f", "surrogates_that_are_utf8": "\udcc3\udca9",
    }.items():  # fmt: skip
        yield f"name_{name}", manifest(FILE | {"name": text})
        yield f"link_component_{name}", manifest(FILE, LINK | {"to": [text]})
        yield f"link_through_{name}", manifest(FILE, LINK | {"to": [text, "f"]})
        yield f"enter_{name}", manifest(ENTER | {"name": text})
        yield f"directory_{name}", manifest(DIR | {"name": text})
        yield f"remove_{name}", manifest(REMOVE | {"name": text})
        yield f"symlink_{name}", manifest(SYMLINK | {"name": text})
    yield "enter_dotdot_below", manifest(DIR, ENTER | {"in": 1, "name": ".."}, HOLLOW | {"in": 2})
    yield "meta_dotdot_below", manifest(DIR, ROOT | {"in": 1, "name": ".."})
    yield "name_of_meta_empty_below_root", manifest(DIR, ROOT | {"in": 1})
    yield "name_of_dir_empty", manifest(DIR | {"name": ""})
    yield "link_to_nothing", manifest(FILE, LINK | {"to": []})
    yield "link_to_text", manifest(FILE, LINK | {"to": "f"})
    yield "target_empty", manifest(SYMLINK | {"target": ""})
    yield "target_4096_bytes", manifest(SYMLINK | {"target": "t" * 4096})
    yield "target_nul", manifest(SYMLINK | {"target": "a\0b"})
    # numbers
    yield "mode_above", manifest(FILE | {"mode": 0o10000})
    yield "mode_negative", manifest(FILE | {"mode": -1})
    for key in ("uid", "gid"):
        yield f"{key}_above_the_map", manifest(FILE | {key: LAST_ID + 1})
        yield f"{key}_minus_one", manifest(FILE | {key: 2**32 - 1})
        yield f"{key}_2_to_64", manifest(DIR | {key: 2**64})
    yield "mtime_above", manifest(FILE | {"mtime": LAST_MTIME + 1})
    yield "mtime_below", manifest(FILE | {"mtime": FIRST_MTIME - 1})
    yield "size_above", manifest(FILE | {"size": (1 << 44) + 1})
    yield "size_4301_digits", manifest(encode(FILE).replace(b'"size":512', b'"size":' + b"1" * 4301), bytes=0)
    yield "empty_file_somewhere", manifest(HOLLOW | {"at": 1})
    yield "sha256_upper_case", manifest(FILE | {"sha256": SHA256.upper()})
    yield "sha256_short", manifest(FILE | {"sha256": SHA256[:-1]})
    # extended attributes
    for name, key in {
        "trusted": "trusted.overlay.opaque", "system_acl": "system.posix_acl_access", "selinux": "security.selinux",
        "ima": "security.ima", "user_alone": "user.", "empty": "", "nul": "user.a\0b", "256_bytes": "user." + "n" * 251,
    }.items():  # fmt: skip
        yield f"xattr_{name}", manifest(FILE | {"xattrs": {key: "00"}})
    yield "xattr_odd_digits", manifest(FILE | {"xattrs": {"user.a": "0"}})
    yield "xattr_upper_case", manifest(FILE | {"xattrs": {"user.a": "FF"}})
    yield "xattr_not_text", manifest(FILE | {"xattrs": {"user.a": 1}})
    yield "xattr_4097_bytes", manifest(FILE | {"xattrs": {"user.a": "00" * 4097}})
    yield "xattr_twice", manifest(encode(FILE).replace(b'"xattrs":{}', b'"xattrs":{"user.a":"","user.a":""}'))
    yield "xattr_not_sorted", manifest(encode(FILE).replace(b'"xattrs":{}', b'"xattrs":{"user.b":"","user.a":""}'))
    yield "xattr_of_symlink", manifest(SYMLINK | {"xattrs": {"user.a": ""}})
    yield (
        "xattr_capability_revision_3",
        manifest(FILE | {"xattrs": {"security.capability": "01000003" + "00" * 16 + "e8030000"}}),
    )
    yield "xattr_capability_revision_1", manifest(FILE | {"xattrs": {"security.capability": "01000001" + "00" * 8}})
    yield "xattr_capability_short", manifest(FILE | {"xattrs": {"security.capability": CAPABILITY[:-2]}})
    # the walk
    yield "in_later_operation", manifest(FILE | {"in": 1})
    yield "in_a_file", manifest(FILE, FILE | {"in": 1, "name": "g"})
    yield "in_a_directory_that_was_left", manifest(DIR, DIR | {"name": "e"}, FILE | {"in": 1})
    yield "in_the_root_by_its_number", manifest(ROOT, FILE | {"in": 1})
    yield "in_above", manifest(FILE | {"in": 10**30})
    yield "root_described_late", manifest(DIR, ROOT)
    yield "root_described_twice", manifest(ROOT, ROOT)
    yield "depth_65", manifest(*(DIR | {"in": n} for n in range(65)))
    yield "path_above_4096", manifest(*(DIR | {"in": n, "name": "n" * 255} for n in range(17)))
    # what does not fit what is there
    yield "name_twice", manifest(FILE, FILE)
    yield "directory_twice", manifest(DIR, DIR)
    yield "enter_a_file", manifest(FILE, ENTER | {"name": "f"})
    yield "enter_a_symlink", manifest(SYMLINK, ENTER | {"name": "s"})
    yield "enter_nothing", manifest(ENTER)
    yield "meta_of_nothing", manifest(DIR | {"op": "meta"})
    yield "meta_of_a_file", manifest(FILE, ROOT | {"name": "f"})
    yield "remove_nothing", manifest(REMOVE)
    yield "remove_a_full_directory", manifest(DIR, FILE | {"in": 1}, REMOVE | {"name": "d", "dir": True})
    yield "remove_a_directory_as_a_file", manifest(DIR, REMOVE | {"name": "d"})
    yield "remove_a_file_as_a_directory", manifest(FILE, REMOVE | {"dir": True})
    yield "link_to_what_is_not_there", manifest(LINK)
    yield "link_to_a_directory", manifest(DIR, LINK | {"to": ["d"]})
    yield (
        "link_through_a_symlink",
        manifest(DIR, FILE | {"in": 1}, SYMLINK | {"target": "d"}, LINK | {"to": ["s", "f"]}),
    )
    yield "link_onto_what_is_there", manifest(FILE, FILE | {"name": "l"}, LINK)
    # nodes
    node = _without(HOLLOW, "xattrs", "at", "size", "sha256") | {"mode": 0o666}
    yield "fifo", manifest(node | {"op": "fifo"})
    yield "char", manifest(node | {"op": "char", "major": 1, "minor": 3})
    yield "block", manifest(node | {"op": "block", "major": 8, "minor": 0})
    yield "socket", manifest(node | {"op": "socket"})


VECTORS = [
    *(Vector(name, True, data) for name, data in _accepted()),
    *(Vector(name, False, data) for name, data in _refused()),
]
# Content is root's alone to judge: the checker made these lines from the same payload.
PAYLOAD_VECTORS = [
    Vector("content_differs", False, manifest(FILE | {"sha256": EMPTY})),
    Vector("content_behind_the_end", False, manifest(FILE | {"at": len(PAYLOAD) - 511})),
    Vector("content_far_behind_the_end", False, manifest(FILE | {"at": 1 << 49})),
]
