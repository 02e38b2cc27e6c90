"""Turn an honest tarball into a manifest, so that the helper can be measured without the checker."""

import hashlib
import os
import tarfile
from pathlib import Path
from typing import Any

from privhelper import protocol
from tests.privhelper.client import line

Node = dict[str, Any]


def convert(path: Path) -> bytes:
    """Return the manifest of a base layer made of one uncompressed tar without whiteouts."""
    root: Node = {"entry": None, "children": {}}
    links = []
    with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
        for member in tar:
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if member.islnk():
                links.append((parts, [part for part in member.linkname.split("/") if part not in ("", ".")]))
                continue
            node = root
            for part in parts:
                node = node["children"].setdefault(part, {"entry": None, "children": {}})
            node["entry"] = _entry(member, raw.fileno())
    lines: list[bytes] = []
    content = _emit(root, 0, lines, top=True)
    _emit_links(links, lines)
    header = line(bytes=content, entries=len(lines), format=protocol.FORMAT, parent=None)
    return header + b"".join(lines)


def _entry(member: tarfile.TarInfo, raw: int) -> Node:
    common: Node = {"uid": member.uid, "gid": member.gid, "mtime": int(member.mtime) * 10**9}
    if member.isdir():
        return common | {"op": "dir", "mode": member.mode, "xattrs": {}}
    if member.issym():
        return common | {"op": "symlink", "target": member.linkname, "xattrs": {}}
    if not member.isreg():
        raise ValueError(f"{member.name}: not made here")
    digest, offset, end = hashlib.sha256(), member.offset_data, member.offset_data + member.size
    while offset < end:
        data = os.pread(raw, min(1 << 20, end - offset), offset)
        digest.update(data)
        offset += len(data)
    at = member.offset_data if member.size else 0
    what = {"op": "file", "mode": member.mode, "at": at, "size": member.size, "sha256": digest.hexdigest()}
    return common | what | {"xattrs": {}}


_IMPLIED: Node = {"op": "dir", "mode": 0o755, "uid": 0, "gid": 0, "mtime": 0, "xattrs": {}}


def _emit(node: Node, number: int, lines: list[bytes], *, top: bool = False) -> int:
    content = 0
    if top:
        lines.append(line(**(node["entry"] or _IMPLIED) | {"op": "meta", "into": 0, "name": ""}))
    for name, child in sorted(node["children"].items(), key=lambda item: os.fsencode(item[0])):
        entry = child["entry"] or _IMPLIED
        lines.append(line(into=number, name=name, **entry))
        content += int(entry.get("size", 0))
        if entry["op"] == "dir":
            content += _emit(child, len(lines), lines)
    return content


def _emit_links(links: list[tuple[list[str], list[str]]], lines: list[bytes]) -> None:
    entered: list[tuple[str, int]] = []
    for parts, to in sorted(links, key=lambda link: [os.fsencode(part) for part in link[0]]):
        depth = 0
        while depth < min(len(entered), len(parts) - 1) and entered[depth][0] == parts[depth]:
            depth += 1
        del entered[depth:]
        for part in parts[depth:-1]:
            lines.append(line(into=entered[-1][1] if entered else 0, name=part, op="enter"))
            entered.append((part, len(lines)))
        lines.append(line(into=entered[-1][1] if entered else 0, name=parts[-1], op="link", to=to))
