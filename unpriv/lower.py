"""The merged tree of the lower layers, replayed from their manifests.

Rule 1: the manifests come from earlier runs of this program, which had met hostile bytes: every line must have exactly
the form that manifest.py writes, every value lie within the protocol's ceilings, and every operation fit the tree that
it works on. What root refuses is refused here, but for what is policy on its side (tests/contract compares them).
Rule 2: manifest k must name the digest of manifest k-1 as its parent.
Rule 3: compact: a directory is a dictionary, anything else a number. Where metadata is wanted for a listing, the number
says in which manifest and at which byte its operation stands.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from json.encoder import encode_basestring_ascii
from typing import Any, Final, Union

from privhelper import protocol
from unpriv import rules
from unpriv.blob import Blob
from unpriv.rulebook import RejectedError, rule

LOWER_MANIFEST_INVALID: Final = rule("lower_manifest_invalid")

# A leaf is `place << 3 | flag | kind`; the place is `layer << 40 | offset`, or 0 where no listing is wanted.
LEAF_FILE, LEAF_SYMLINK = 0, 1
LEAF_LINK: Final = 4  # made by a `link` operation; its place is that of the file
_KIND_MASK: Final = 1
_SHIFT: Final = 3
_LAYER_SHIFT: Final = 40
MAX_DEPTH: Final = min(protocol.MAX_DEPTH, 256)  # as in limits.py: trees are walked by recursion
PLACE: Final = b""  # the key under which a directory keeps its own place; no name is empty

Tree = dict[bytes, Union[int, "Tree"]]
_PLAIN_NAME: Final = re.compile(rb"[A-Za-z0-9_+-][A-Za-z0-9_.+-]{0,100}")  # no dots first, no escapes, not too long

_PIECE_BYTES: Final = 1 << 20


def _to(limit: int) -> bytes:
    """Return the expression of a number from 0 to ``limit`` without leading zeros; short ones are tried first."""
    digits = str(limit)
    shorter = ["0", f"[1-9][0-9]{{0,{len(digits) - 2}}}"]
    smaller = [
        f"{digits[:at]}[{1 if at == 0 else 0}-{int(digit) - 1}][0-9]{{{len(digits) - at - 1}}}"
        for at, digit in enumerate(digits)
        if int(digit) > (at == 0)
    ]
    return f"(?:{'|'.join([*shorter, *smaller, digits])})".encode("ascii")


_HEAD: Final = re.compile(
    rb'\{"bytes":(' + _to(protocol.MAX_CONTENT_BYTES) + rb'),"entries":(' + _to(protocol.MAX_ENTRIES) + rb"),"
    rb'"format":"imgpull\.layer/1","parent":(null|"sha256:[0-9a-f]{64}")\}\n'
)
_PLAIN: Final = rb'[^"\\\x00-\x1f\x7f-\xff]*'
# What JSON writes for text, and one lone surrogate for each byte that is not UTF-8 (PEP 383); no other.
_UNICODE: Final = (
    rb"u(?:[0-9a-ce-f][0-9a-f]{3}|d[0-7][0-9a-f]{2}|d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|dc[89a-f][0-9a-f])"
)
_STRING: Final = rb'"' + _PLAIN + rb'(?:\\(?:["\\bfnrt]|' + _UNICODE + rb")" + _PLAIN + rb')*"'
_ID: Final = _to((1 << 32) - 2)
_XATTR: Final = _STRING + rb':"(?:[0-9a-f]{2})*"'


def _form(*fields: tuple[str, bytes]) -> re.Pattern[bytes]:
    """Return the expression of an operation: group 1 is `in`, 2 the name without its quotes, 3 what is its own.

    The keys come in the canonical order, so one expression accepts exactly the lines that manifest.py writes.
    """
    pairs = (b'"%s":%s' % (key.encode("ascii"), pattern) for key, pattern in fields)
    return re.compile(rb"\{" + b",".join(pairs) + rb"\}\n")


_IN: Final = ("in", b"(" + _to(protocol.MAX_ENTRIES) + b")")
_NAME: Final = ("name", b'"(' + _STRING[1:-1] + b')"')
_GID, _UID, _MODE = ("gid", _ID), ("uid", _ID), ("mode", _to(protocol.MAX_MODE))
_MTIME: Final = ("mtime", _to(protocol.MAX_MTIME_NS))
_XATTRS: Final = ("xattrs", rb"(\{(?:" + _XATTR + b"(?:," + _XATTR + rb")*)?\})")
_SIZE: Final = b"(" + _to(protocol.MAX_FILE_BYTES) + b")"
_FORMS: Final = {
    b"enter": _form(_IN, _NAME, ("op", b'"enter"()')),
    b"remove": _form(("dir", b"(true|false)"), _IN, _NAME, ("op", b'"remove"')),
    b"dir": _form(_GID, _IN, _MODE, _MTIME, _NAME, ("op", b'"dir"'), _UID, _XATTRS),
    b"meta": _form(_GID, _IN, _MODE, _MTIME, _NAME, ("op", b'"meta"'), _UID, _XATTRS),
    b"file": _form(
        ("at", _to(protocol.MAX_PAYLOAD_BYTES)), _GID, _IN, _MODE, _MTIME, _NAME, ("op", b'"file"'),
        ("sha256", b'"[0-9a-f]{64}"'), ("size", _SIZE), _UID, _XATTRS,
    ),
    b"symlink": _form(
        _GID, _IN, _MTIME, _NAME, ("op", b'"symlink"'), ("target", b"(" + _STRING + b")"), _UID, ("xattrs", rb"\{\}")
    ),
    b"link": _form(_IN, _NAME, ("op", b'"link"'), ("to", rb"(\[" + _STRING + b"(?:," + _STRING + rb")*\])")),
}  # fmt: skip
_OP: Final = b'"op":"'  # within a string its quotes would be escaped, so the first one found is the key


def _invalid(layer: int, line: int, reason: str) -> RejectedError:
    return RejectedError(LOWER_MANIFEST_INVALID, f"manifest {layer}, line {line}: {reason}")


def unquote(text: bytes) -> bytes:
    """Return the bytes of a JSON string, without its quotes, written as a manifest writes them. Raises ValueError."""
    if b"\\" not in text:
        return text
    decoded: str = json.loads(b'"' + text + b'"')
    found = decoded.encode("utf-8", "surrogateescape")
    written = encode_basestring_ascii(found.decode("utf-8", "surrogateescape"))
    if written[1:-1].encode("ascii") != text:
        raise ValueError("a text that is not written as it should be")
    return found


def _parse(line: bytes) -> tuple[bytes, tuple[bytes, bytes, bytes]]:
    """Return the name of an operation and its groups. Raises KeyError or ValueError for any other line."""
    begin = line.index(_OP) + len(_OP)
    op = line[begin : line.index(b'"', begin)]
    match = _FORMS[op].fullmatch(line)
    if match is None or len(line) >= protocol.MAX_LINE_BYTES:
        raise ValueError("not the form of an operation")
    if op == b"remove":  # its keys begin with `dir`
        extra, into, name = match.groups()
        return op, (into, name, extra)
    into, name, extra = match.groups()
    if op in (b"dir", b"meta"):
        _check_xattrs(extra)
    elif op == b"symlink":
        target = unquote(extra[1:-1])
        if not 1 <= len(target) <= protocol.MAX_TARGET_BYTES or b"\0" in target:
            raise ValueError("a target that symlink(2) does not take")
    return op, (into, name, extra)


def _check_file(line: bytes, size: bytes, xattrs: bytes) -> int:
    """Return the size of a file, whose line has the right form. Raises ValueError."""
    if len(line) >= protocol.MAX_LINE_BYTES or (size == b"0" and not line.startswith(b'{"at":0,')):
        raise ValueError("too long, or a place for no content")
    _check_xattrs(xattrs)
    return int(size)


def _check_xattrs(text: bytes) -> None:
    """Expect attributes that the protocol allows, in the order of their names. Raises ValueError."""
    if text == b"{}":
        return
    pairs: list[tuple[str, str]] = json.loads(text, object_pairs_hook=list)
    written = ",".join(f'{encode_basestring_ascii(name)}:"{value}"' for name, value in pairs)
    names_only = [name for name, _ in pairs]
    if "{" + written + "}" != text.decode("ascii") or names_only != sorted(set(names_only)):
        raise ValueError("attributes that are not written as they should be")
    if len(pairs) > protocol.MAX_XATTRS:
        raise ValueError("too many attributes")
    for name, value in pairs:
        raw = unquote(encode_basestring_ascii(name)[1:-1].encode("ascii"))
        plain = protocol.XATTR_PREFIX.encode("ascii")
        allowed = name == protocol.XATTR_CAPABILITY or (raw.startswith(plain) and raw != plain)
        if not allowed or len(raw) > protocol.MAX_XATTR_NAME_BYTES or b"\0" in raw:
            raise ValueError("an attribute that is not allowed")
        content = bytes.fromhex(value)
        if len(content) > protocol.MAX_XATTR_VALUE_BYTES:
            raise ValueError("an attribute that is too large")
        if name == protocol.XATTR_CAPABILITY:
            rules.capability_invalid(content, rules.FILE)


class Lower:
    """The lower layers, merged."""

    def __init__(self, with_places: bool, tick: Callable[[], None]):
        """Begin with nothing. ``with_places``: remember where each entry's metadata stands."""
        self.root: Tree = {}
        self.digest: str | None = None  # of the topmost manifest
        self._manifests: list[Blob] = []
        self._with_places = with_places
        self._tick = tick

    def add(self, manifest: Blob) -> None:
        """Replay one more manifest on top.

        Raises:
            RejectedError: lower_manifest_invalid.
        """
        self._manifests.append(manifest)
        hasher = hashlib.sha256()
        lines = self._lines(manifest, hasher)
        layer = len(self._manifests)
        head = _HEAD.fullmatch(next(lines, (0, b""))[1])
        parent = b"null" if self.digest is None else f'"{self.digest}"'.encode("ascii")
        if head is None or head[3] != parent:
            raise _invalid(layer, 1, "a wrong first line, or not the child of the layer below")
        replay = _Replay(self.root)
        plain_file = _FORMS[b"file"].fullmatch  # most lines
        count = content_bytes = 0
        for count, (offset, line) in enumerate(lines, 1):
            place = (layer - 1) << _LAYER_SHIFT | offset if self._with_places else 0
            try:
                if match := plain_file(line):
                    into, name, size, xattrs = match.groups()
                    content_bytes += _check_file(line, size, xattrs)
                    replay.leaf(into, name, place << _SHIFT | LEAF_FILE)
                else:
                    op, groups = _parse(line)
                    replay.apply(count, op, *groups, place)
            except (RejectedError, KeyError, TypeError, ValueError) as error:
                raise _invalid(layer, count + 1, f"does not fit: {error}") from error
        if (content_bytes, count) != (int(head[1]), int(head[2])):
            raise _invalid(layer, count + 1, f"{count} operations, {content_bytes} bytes; the first line differs")
        self.digest = f"sha256:{hasher.hexdigest()}"

    def _lines(self, manifest: Blob, hasher: Any) -> Iterator[tuple[int, bytes]]:
        """Yield each line with its offset."""
        offset, held = 0, b""
        while piece := manifest.read_at(offset + len(held), _PIECE_BYTES):
            self._tick()
            hasher.update(piece)
            lines = (held + piece).splitlines(keepends=True)
            held = lines.pop() if not lines[-1].endswith(b"\n") else b""
            for line in lines:
                yield offset, line
                offset += len(line)
            if len(held) > protocol.MAX_LINE_BYTES:
                break
        if held:
            yield offset, held

    def metadata(self, place: int) -> dict[str, Any]:
        """Return the operation that stands at a place."""
        layer, offset = place >> _LAYER_SHIFT, place & (1 << _LAYER_SHIFT) - 1
        line = self._manifests[layer].read_at(offset, protocol.MAX_LINE_BYTES)
        operation: dict[str, Any] = json.loads(line[: line.index(b"\n")])
        return operation


class _Replay:
    """The operations of one manifest, depth first over one tree."""

    def __init__(self, root: Tree):
        self._root = root
        # Number, tree and length of the path, with its slash, of each directory on the way.
        self._stack: list[tuple[bytes, Tree, int]] = [(b"0", root, 0)]

    def apply(self, number: int, op: bytes, into: bytes, quoted: bytes, extra: bytes, place: int) -> None:
        """Apply one operation. Raises KeyError, TypeError or ValueError where it does not fit."""
        if op == b"meta" and not quoted:
            if number != 1 or into != b"0":
                raise ValueError("the root's own operation is not the first")
            self._keep_place(self._root, place)
        elif op in (b"enter", b"meta"):
            parent, name = self._parent(into), _component(quoted)
            self._enter(number, name, parent[name], place if op == b"meta" else None)
        elif op == b"remove":
            _remove(self._parent(into), _component(quoted), extra == b"true")
        elif op == b"dir":
            parent, name, made = self._parent(into), _component(quoted), Tree()
            if name in parent:
                raise ValueError("it exists")
            parent[name] = made
            self._enter(number, name, made, place)
        elif op == b"link":
            self.leaf(into, quoted, self._file(extra) | LEAF_LINK)
        else:
            self.leaf(into, quoted, place << _SHIFT | LEAF_SYMLINK)

    def leaf(self, into: bytes, quoted: bytes, node: int) -> None:
        """Put something that is no directory into one."""
        if into != self._stack[-1][0]:
            self._parent(into)
        _, parent, length = self._stack[-1]
        name = quoted if _PLAIN_NAME.fullmatch(quoted) else _component(quoted)
        if name in parent or length + len(name) > protocol.MAX_PATH_BYTES:
            raise ValueError("it exists, or its path is too long")
        parent[name] = node

    def _parent(self, into: bytes) -> Tree:
        """Return the directory of an operation, which must be on the way to the last one entered."""
        while self._stack[-1][0] != into:
            self._stack.pop()
            if not self._stack:
                raise ValueError("its directory is not on the way from the root")
        return self._stack[-1][1]

    def _enter(self, number: int, name: bytes, node: "int | Tree", place: int | None) -> None:
        if isinstance(node, int):
            raise TypeError("it is no directory")
        length = self._stack[-1][2] + len(name)
        if len(self._stack) > MAX_DEPTH or length > protocol.MAX_PATH_BYTES:
            raise ValueError("too deep, or its path is too long")
        self._stack.append((b"%d" % number, node, length + 1))
        if place is not None:
            self._keep_place(node, place)

    @staticmethod
    def _keep_place(directory: Tree, place: int) -> None:
        if place:
            directory[PLACE] = place << _SHIFT

    def _file(self, untrusted_to: bytes) -> int:
        """Return the leaf that a link names."""
        node: int | Tree = self._root
        for name in json.loads(untrusted_to):
            if isinstance(node, int):
                raise TypeError("the target's parent is no directory")
            node = node[_component(encode_basestring_ascii(name)[1:-1].encode("ascii"))]
        if not isinstance(node, int):
            raise TypeError("the target is neither file nor symbolic link")
        return node


def _component(quoted: bytes) -> bytes:
    """Return a name that is one component. Raises ValueError for anything else."""
    name = unquote(quoted)
    if not 1 <= len(name) <= protocol.MAX_NAME_BYTES or b"/" in name or b"\0" in name or name in (b".", b".."):
        raise ValueError("a name that is no component")
    return name


def _remove(parent: Tree, name: bytes, is_directory: bool) -> None:
    node = parent[name]
    if isinstance(node, dict) != is_directory:
        raise TypeError("a wrong kind of removal")
    if isinstance(node, dict) and any(key != PLACE for key in node):
        raise ValueError("the directory is not empty")
    del parent[name]


def is_file(node: "int | Tree") -> bool:
    """Tell if a node is a regular file."""
    return isinstance(node, int) and node & _KIND_MASK == LEAF_FILE


def is_symlink(node: "int | Tree") -> bool:
    """Tell if a node is a symbolic link."""
    return isinstance(node, int) and node & _KIND_MASK == LEAF_SYMLINK


def place_of(leaf: int) -> int:
    """Return the place of a leaf: the same for all names of one file."""
    return leaf >> _SHIFT


def names(tree: Tree) -> list[bytes]:
    """Return the names in a directory, in the order of their bytes."""
    return sorted(name for name in tree if name)
