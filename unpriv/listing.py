"""The merged tree of all layers, one JSON object an entry: for people, tests and other tools, never for root.

Rule 1: it is printed from the manifests alone, so it shows what root will make, not what we think of the archive.
Rule 2: in the order of a depth-first walk by the bytes of the names; the root, `.`, comes first where it was declared.

An object has path and type; then mode, uid, gid, mtime (and mtime_ns, the rest of a second), xattrs, and what the type
adds: size and sha256, or target. Bytes that are not UTF-8 go into path_hex, target_hex or link_hex. The further names
of a file are of type `hardlink` with `link`, the path of the first. `implicit` marks a directory with the metadata of
those that no archive declares.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

from unpriv.lower import LEAF_LINK, PLACE, Lower, Tree, names, place_of

_NS: Final = 1_000_000_000
_SYMLINK_MODE: Final = 0o777  # what lstat(2) says of every symbolic link
_IMPLICIT: Final = {"mode": 0o755, "uid": 0, "gid": 0, "mtime": 0, "type": "dir"}
Row = dict[str, Any]


def rows(merged: Lower) -> Iterator[str]:
    """Yield the lines of the listing of a tree that was built with places."""
    firsts = _first_names(merged.root)
    own = merged.root.get(PLACE)
    if isinstance(own, int):
        yield _line(b".", _row(merged, own))
    for path, node in _walk(merged.root, b""):
        leaf = node if isinstance(node, int) else node.get(PLACE)
        if not isinstance(leaf, int):
            continue
        first = firsts.get(place_of(leaf), path)
        yield _line(path, _row(merged, leaf) if first == path else _text("link", first) | {"type": "hardlink"})


def _walk(tree: Tree, prefix: bytes) -> Iterator[tuple[bytes, "int | Tree"]]:
    for name in names(tree):
        node = tree[name]
        yield prefix + name, node
        if isinstance(node, dict):
            yield from _walk(node, prefix + name + b"/")


def _first_names(root: Tree) -> dict[int, bytes]:
    """Return, for each file with several names, the one under which it is listed: its own, else the first."""
    linked: dict[int, bytes] = {}
    for path, node in _walk(root, b""):
        if isinstance(node, int) and node & LEAF_LINK:
            linked.setdefault(place_of(node), path)
    if linked:
        for path, node in _walk(root, b""):
            if isinstance(node, int) and not node & LEAF_LINK and place_of(node) in linked:
                linked[place_of(node)] = path
    return linked


def _row(merged: Lower, leaf: int) -> Row:
    """Return the metadata of an entry from the operation that made it."""
    operation = merged.metadata(place_of(leaf))
    kind = {"meta": "dir"}.get(operation["op"], operation["op"])
    seconds, nanoseconds = divmod(operation["mtime"], _NS)
    row: Row = {"gid": operation["gid"], "mtime": seconds, "type": kind, "uid": operation["uid"]}
    row["mode"] = operation.get("mode", _SYMLINK_MODE)
    if row == _IMPLICIT and not nanoseconds:
        row["implicit"] = True
    if nanoseconds:
        row["mtime_ns"] = nanoseconds
    if operation.get("xattrs"):
        row["xattrs"] = operation["xattrs"]
    if kind == "file":
        row |= {"size": operation["size"], "sha256": operation["sha256"]}
    elif kind == "symlink":
        row |= _text("target", operation["target"].encode("utf-8", "surrogateescape"))
    return row


def _text(key: str, value: bytes) -> Row:
    try:
        return {key: value.decode("utf-8")}
    except UnicodeDecodeError:
        return {f"{key}_hex": value.hex()}


def _line(path: bytes, row: Row) -> str:
    return json.dumps(_text("path", path) | row, sort_keys=True, ensure_ascii=True) + "\n"
