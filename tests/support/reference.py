"""The tree that an image must become, made and read by tools that share no code with us.

GNU tar unpacks the layers in order; find, getfattr and sha256sum read a tree, ours or that one.

Rule 1: a whiteout removes what lower layers left, before the layer that holds it is unpacked, whatever its place in
the tarball (OCI image specification, layer.md, "Whiteouts").
Rule 2: only tarballs that the tests made come here: GNU tar as root follows a symbolic link that a lower layer left.
Rule 3: nothing is left out of a comparison in silence; what is not compared is named in NOT_COMPARED.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any, Final

NOT_COMPARED: Final = (
    "the size of a directory: its file system's own affair",
    "the mtime of a directory, unless asked for: GNU tar dates one that a whiteout emptied by the clock",
    "extended attributes other than security.capability and user.*: no image keeps them",
)
ROOT: Final = Path(__file__).resolve().parents[2]
NAME: Final = "tests.support.reference"
WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"
KINDS: Final = {"f": "file", "d": "dir", "l": "symlink", "p": "fifo", "c": "char", "b": "block", "s": "socket"}
TOOLS: Final = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a tree; ``links`` are all its names when it has more than one."""

    kind: str
    mode: str
    uid: int
    gid: int
    size: int | None
    sha256: str | None
    target: str | None
    links: tuple[str, ...]
    mtime: str | None
    xattrs: tuple[tuple[str, str], ...]


Tree = Mapping[str, Record]


def unpack(layers: Sequence[Path], folder: Path) -> None:
    """Unpack ``layers``, lowest first, into ``folder``, which must not exist; needs root."""
    folder.mkdir(mode=0o755)
    for layer in layers:
        members = _members(layer)
        _apply_whiteouts([name for _, name in members], folder)
        _clear_the_way([name for kind, name in members if kind != "d"], folder)
        _tar(
            "--extract", f"--file={layer}", f"--directory={folder}", "--preserve-permissions", "--same-owner",
            "--numeric-owner", "--xattrs", "--xattrs-include=*", "--delay-directory-restore", f"--exclude={WHITEOUT}*",
        )  # fmt: skip


def read_tree(folder: Path, *, directory_times: bool = False) -> Tree:
    """Return each entry below ``folder`` by its path, ``folder`` itself as "."; other file systems are not entered."""
    listed = _fields(_run(folder, "find", ".", "-xdev", "-printf", r"%P\0%y\0%m\0%U\0%G\0%s\0%T@\0%l\0%D:%i\0%n\0"), 10)
    digests, xattrs = _digests(folder), _xattrs(folder)
    names: dict[str, list[str]] = defaultdict(list)
    for path, kind, *_, inode, _ in listed:
        if kind != "d":
            names[inode].append(path)
    tree = {}
    for path, kind, mode, uid, gid, size, mtime, target, inode, links in listed:
        together = tuple(sorted(names[inode])) if kind != "d" else ()
        if kind != "d" and len(together) != int(links):
            raise AssertionError(f"{path} has {links} names, {len(together)} of them below {folder}: {together}")
        tree[path or "."] = Record(
            kind=KINDS[kind],
            mode=mode,
            uid=int(uid),
            gid=int(gid),
            size=int(size) if kind == "f" else None,
            sha256=digests[path] if kind == "f" else None,
            target=target if kind == "l" else None,
            links=together if len(together) > 1 else (),
            mtime=mtime if kind != "d" or directory_times else None,
            xattrs=xattrs.get(path or ".", ()),
        )
    return tree


def read_device(device: str) -> Tree:
    """Return the tree of the file system on a block device, mounted where nobody else sees it; needs root."""
    script = f"mount -o ro,nosuid,nodev {shlex.quote(device)} /mnt && exec {shlex.quote(sys.executable)} -m {NAME} /mnt"
    command = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", script]
    printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=True).stdout
    return {path: Record(**_tuples(fields)) for path, fields in json.loads(printed).items()}


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Undo what JSON makes of tuples."""
    return fields | {"links": tuple(fields["links"]), "xattrs": tuple(tuple(pair) for pair in fields["xattrs"])}


def differences(expected: Tree, found: Tree) -> list[str]:
    """Return one line for each thing that differs; none when the trees are equal."""
    lines = [f"{path}: missing" for path in sorted(expected.keys() - found.keys())]
    lines += [f"{path}: unexpected {found[path].kind}" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(expected.keys() & found.keys()):
        for field in fields(Record):
            wanted, got = getattr(expected[path], field.name), getattr(found[path], field.name)
            if wanted != got:
                lines.append(f"{path}: {field.name}: expected {wanted!r}, found {got!r}")
    return lines


def _members(layer: Path) -> list[tuple[str, str]]:
    """Return the kind (``d`` for a directory) and name of each member; names with a newline are not for this reader."""
    options = (f"--file={layer}", "--quoting-style=literal", "--show-stored-names")
    names = os.fsdecode(_tar("--list", *options)).splitlines()
    kinds = [line[0] for line in os.fsdecode(_tar("--list", "--verbose", *options)).splitlines()]
    return [(kind, str(PurePosixPath(name))) for kind, name in zip(kinds, names, strict=True)]


def _apply_whiteouts(names: Sequence[str], folder: Path) -> None:
    for name in names:
        parent, last = folder / PurePosixPath(name).parent, PurePosixPath(name).name
        if last == OPAQUE and parent.is_dir():
            for child in list(parent.iterdir()):
                _remove(child)
        elif last.startswith(WHITEOUT) and last != OPAQUE:
            _remove(parent / last.removeprefix(WHITEOUT))


def _clear_the_way(names: Sequence[str], folder: Path) -> None:
    """Remove each directory that the layer replaces by something else; GNU tar would only do it if it is empty."""
    for path in (folder / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of each regular file, by the path that find gives it."""
    names = _run(folder, "find", ".", "-xdev", "-type", "f", "-printf", r"%P\0")
    printed = subprocess.run(
        ["xargs", "--null", "--no-run-if-empty", "sha256sum", "--zero", "--binary", "--"],
        cwd=folder, env=TOOLS, input=names, stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    lines = (os.fsdecode(line) for line in printed.split(b"\0") if line)
    return {line[66:]: line[:64] for line in lines}  # sha256sum(1): 64 digits, a space, "*", the name


def _xattrs(folder: Path) -> dict[str, tuple[tuple[str, str], ...]]:
    """Return the attributes that an image keeps, by path, values in hexadecimal."""
    printed = _run(
        folder, "getfattr", "--recursive", "--physical", "--no-dereference", "--dump", "--encoding=hex",
        r"--match=^(security\.capability|user\..*)$", ".",
    )  # fmt: skip
    found = {}
    for paragraph in printed.split(b"\n\n"):
        head, *pairs = paragraph.splitlines() or [b""]
        if head:
            path = _unescape(head.removeprefix(b"# file: "))
            split = (os.fsdecode(pair).partition("=") for pair in pairs)
            found[path] = tuple(sorted((name, value.removeprefix("0x")) for name, _, value in split))
    return found


def _unescape(name: bytes) -> str:
    r"""Undo getfattr's \ooo for a backslash and for bytes that do not print."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), name))


def _fields(printed: bytes, count: int) -> list[list[str]]:
    words = [os.fsdecode(word) for word in printed.split(b"\0")[:-1]]
    return [words[start : start + count] for start in range(0, len(words), count)]


def _tar(*options: str) -> bytes:
    return subprocess.run(["/usr/bin/tar", *options], env=TOOLS, stdout=subprocess.PIPE, check=True).stdout


def _run(folder: Path, *command: str) -> bytes:
    return subprocess.run(command, cwd=folder, env=TOOLS, stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    json.dump({path: asdict(record) for path, record in read_tree(Path(sys.argv[1])).items()}, sys.stdout)
