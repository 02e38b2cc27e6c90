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
MAX_PATH_BYTES: Final = protocol.MAX_PATH_BYTES
PLACE: Final = b""  # the key under which a directory keeps its own place; no name is empty

Tree = dict[bytes, Union[int, "Tree"]]

_PIECE_BYTES: Final = 1 << 20
_HEAD: Final = re.compile(
    rb'\{"bytes":(0|[1-9][0-9]{0,15}),"entries":(0|[1-9][0-9]{0,9}),'
    rb'"format":"imgpull\.layer/1","parent":(null|"sha256:[0-9a-f]{64}")\}\n'
)
_META: Final = {"gid", "in", "mode", "mtime", "name", "op", "uid", "xattrs"}
_KEYS: Final = {
    "enter": {"in", "name", "op"},
    "remove": {"dir", "in", "name", "op"},
    "dir": _META,
    "meta": _META,
    "file": _META | {"at", "sha256", "size"},
    "symlink": _META - {"mode"} | {"target"},
    "link": {"in", "name", "op", "to"},
}
_MOST: Final = {
    "at": protocol.MAX_PAYLOAD_BYTES, "gid": (1 << 32) - 2, "in": protocol.MAX_ENTRIES, "mode": protocol.MAX_MODE,
    "mtime": protocol.MAX_MTIME_NS, "size": protocol.MAX_FILE_BYTES, "uid": (1 << 32) - 2,
}  # fmt: skip
_DIGEST: Final = re.compile("[0-9a-f]{64}")


def _short(key: str) -> bytes:
    """Return the expression of a number that has fewer digits than the largest one, so that it needs no comparison."""
    return b"(?:0|[1-9][0-9]{0,%d})" % (len(str(_MOST[key])) - 2)


# Nearly every line is one of these two, with plain names, small numbers and no attributes. All others are taken apart
# by _operation, which says of any line whether it is one, these included.
_ASCII: Final = rb'"\\/\x00-\x1f\x7f-\xff'  # all but what ends a name, what is escaped in one, and what it cannot hold
_PLAIN_MODE: Final = b"(?:%b|[1-3][0-9]{3})" % _short("mode")  # of 4095: setuid programs too
_PLAIN_NAME: Final = rb'"(\.?[^.%b][^%b]{0,250})"' % (_ASCII, _ASCII)
_PLAIN_FILE: Final = re.compile(
    rb'\{"at":(%b),"gid":%b,"in":(%b),"mode":%b,"mtime":%b,"name":%b,"op":"file","sha256":"[0-9a-f]{64}",'
    rb'"size":(0|[1-9][0-9]{0,9}),"uid":%b,"xattrs":\{\}\}\n'
    % (_short("at"), _short("gid"), _short("in"), _PLAIN_MODE, _short("mtime"), _PLAIN_NAME, _short("uid"))
)
_PLAIN_OTHER: Final = re.compile(
    rb'\{"gid":%b,"in":(%b),(?:"mode":%b,"mtime":%b,"name":%b,"op":"(dir|meta)"|'
    rb'"mtime":%b,"name":%b,"op":"symlink","target":"[A-Za-z0-9/_.+-]{1,200}"),"uid":%b,"xattrs":\{\}\}\n'
    % (
        *(_short("gid"), _short("in"), _PLAIN_MODE, _short("mtime"), _PLAIN_NAME),
        *(_short("mtime"), _PLAIN_NAME, _short("uid")),
    )
)


def _invalid(layer: int, line: int, reason: str) -> RejectedError:
    return RejectedError(LOWER_MANIFEST_INVALID, f"manifest {layer}, line {line}: {reason}")


def _operation(line: bytes) -> dict[str, Any]:
    """Return the operation of a line, if it is written exactly as manifest.py writes.

    That is: as json.dumps writes what json.loads reads in it, with exactly the keys of its kind and values in range.
    Raises KeyError, TypeError, ValueError, AttributeError or RejectedError for any other line.
    """
    if len(line) >= protocol.MAX_LINE_BYTES:
        raise ValueError("a line that is too long")
    try:
        found: dict[str, Any] = json.loads(line)
        written = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    except RecursionError as error:
        raise ValueError("no operation is nested") from error
    if written.encode("ascii") + b"\n" != line or found.keys() != _KEYS[found["op"]]:
        raise ValueError("not the form of an operation")
    for key, most in _MOST.items():
        least = protocol.MIN_MTIME_NS if key == "mtime" else 0
        if key in found and not (type(found[key]) is int and least <= found[key] <= most):
            raise ValueError(f"{key} is out of range")
    if "dir" in found and type(found["dir"]) is not bool:
        raise TypeError("neither a directory nor none")
    if "sha256" in found and not _DIGEST.fullmatch(found["sha256"]):
        raise ValueError("not a digest")
    if found.get("size") == 0 and found["at"] != 0:
        raise ValueError("a place for no content")
    if "target" in found and not 1 <= len(raw(found["target"])) <= protocol.MAX_TARGET_BYTES:
        raise ValueError("a target that symlink(2) does not take")
    if "xattrs" in found:
        _check_xattrs(found["xattrs"], found["op"])
    return found


def raw(text: str) -> bytes:
    """Return the bytes that a text stands for. Raises ValueError or TypeError where there are none."""
    if not isinstance(text, str):
        raise TypeError("no text")
    found = text.encode("utf-8", "surrogateescape")
    if b"\0" in found or found.decode("utf-8", "surrogateescape") != text:
        raise ValueError("a NUL, or a text that is not written as it should be")
    return found


def _check_xattrs(xattrs: dict[str, str], op: str) -> None:
    """Expect attributes that the protocol allows. Raises ValueError, TypeError or AttributeError."""
    if len(xattrs) > (0 if op == "symlink" else protocol.MAX_XATTRS):
        raise ValueError("too many attributes")
    for name, value in xattrs.items():
        if len(raw(name)) > protocol.MAX_XATTR_NAME_BYTES:
            raise ValueError("an attribute whose name is too long")
        content = bytes.fromhex(value)
        if content.hex() != value or len(content) > protocol.MAX_XATTR_VALUE_BYTES:
            raise ValueError("an attribute that is too large, or not in hexadecimal")
        if name == protocol.XATTR_CAPABILITY:
            rules.capability_invalid(content, rules.FILE)
        elif not name.startswith(protocol.XATTR_PREFIX) or name == protocol.XATTR_PREFIX:
            raise ValueError("an attribute that is not allowed")


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
        layer = len(self._manifests)
        pieces = self._pieces(manifest, hasher)
        offset, piece = next(pieces, (0, b""))
        head = _HEAD.match(piece)
        parent = b"null" if self.digest is None else f'"{self.digest}"'.encode("ascii")
        if head is None or head[3] != parent:
            raise _invalid(layer, 1, "a wrong first line, or not the child of the layer below")
        replay = _Replay(self.root, self._with_places)
        place = (layer - 1) << _LAYER_SHIFT
        try:
            replay.apply(piece, head.end(), place)
            for offset, piece in pieces:
                replay.apply(piece, 0, place | offset)
        except (AttributeError, KeyError, RejectedError, TypeError, ValueError) as error:
            raise _invalid(layer, replay.count + 1, f"does not fit: {error}") from error
        if (replay.content_bytes, replay.count) != (int(head[1]), int(head[2])):
            found = f"{replay.count} operations, {replay.content_bytes} bytes"
            raise _invalid(layer, replay.count + 1, f"{found}; the first line differs")
        self.digest = f"sha256:{hasher.hexdigest()}"

    def _pieces(self, manifest: Blob, hasher: Any) -> Iterator[tuple[int, bytes]]:
        """Yield whole lines, many at once, with their offset; what is behind the last newline comes alone, last."""
        offset, held = 0, b""
        while read := manifest.read_at(offset + len(held), _PIECE_BYTES):
            self._tick()
            hasher.update(read)
            end = read.rfind(b"\n") + 1
            if end:
                piece = held + read[:end]
                yield offset, piece
                offset, held = offset + len(piece), read[end:]
            elif len(held := held + read) > protocol.MAX_LINE_BYTES:
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

    def __init__(self, root: Tree, with_places: bool):
        self.count = 0
        self.content_bytes = 0
        self._root = root
        self._with_places = with_places
        # Number, tree and length of the path, with its slash, of each directory on the way.
        self._stack: list[tuple[bytes, Tree, int]] = [(b"0", root, 0)]

    def apply(self, piece: bytes, position: int, place: int) -> None:
        """Apply all operations behind a position; ``place`` is that of the piece's first byte.

        Raises: KeyError, RejectedError, TypeError or ValueError where one does not fit.
        """
        plain_file, stack, with_places, longest = _PLAIN_FILE.match, self._stack, self._with_places, MAX_PATH_BYTES
        end = len(piece)
        while position < end:
            self.count += 1
            leaf = (place + position) << _SHIFT if with_places else 0
            match = plain_file(piece, position)
            if match is None:
                position = self._apply_other(piece, position, leaf)
                continue
            at, into, name, size = match.groups()
            if into != stack[-1][0]:
                self._parent(into)
            _, parent, length = stack[-1]
            if name in parent or length + len(name) > longest or (size == b"0" != at):
                raise ValueError("it exists, or its path is too long, or it has a place for no content")
            parent[name] = leaf
            self.content_bytes += int(size)
            position = match.end()

    def _apply_other(self, piece: bytes, position: int, leaf: int) -> int:
        """Apply the operation at a position; return where the next one begins."""
        match = _PLAIN_OTHER.match(piece, position)
        if match is None:
            end = piece.find(b"\n", position) + 1 or len(piece)
            self._apply_any(_operation(piece[position:end]), leaf)
            return end
        into, directory, op, symlink = match.groups()
        self._parent(into)
        if op is None:
            self._leaf(symlink, leaf | LEAF_SYMLINK)
        else:
            self._directory(op == b"dir", directory, leaf)
        return match.end()

    def _apply_any(self, operation: dict[str, Any], leaf: int) -> None:
        """Apply any operation."""
        op, name = operation["op"], raw(operation["name"])
        if op == "meta" and not name:
            if (self.count, operation["in"]) != (1, 0):
                raise ValueError("the root's own operation is not the first")
            self._keep_place(self._root, leaf)
            return
        parent = self._parent(b"%d" % operation["in"])
        _expect_component(name)
        if op == "enter":
            self._enter(name, parent[name])
        elif op == "remove":
            _remove(parent, name, operation["dir"])
        elif op in ("dir", "meta"):
            self._directory(op == "dir", name, leaf)
        elif op == "link":
            self._leaf(name, self._file(operation["to"]) | LEAF_LINK)
        elif op == "symlink":
            self._leaf(name, leaf | LEAF_SYMLINK)
        else:
            self._leaf(name, leaf)
            self.content_bytes += operation["size"]

    def _parent(self, into: bytes) -> Tree:
        """Return the directory of an operation, which must be on the way to the last one entered, and stand in it."""
        while self._stack[-1][0] != into:
            self._stack.pop()
            if not self._stack:
                raise ValueError("its directory is not on the way from the root")
        return self._stack[-1][1]

    def _leaf(self, name: bytes, node: int) -> None:
        """Put something that is no directory where we stand."""
        _, parent, length = self._stack[-1]
        if name in parent or length + len(name) > MAX_PATH_BYTES:
            raise ValueError("it exists, or its path is too long")
        parent[name] = node

    def _directory(self, is_new: bool, name: bytes, leaf: int) -> None:
        """Make a directory where we stand, or meet one again, and enter it."""
        parent = self._stack[-1][1]
        if is_new:
            if name in parent:
                raise ValueError("it exists")
            parent[name] = Tree()
        directory = self._enter(name, parent[name])
        self._keep_place(directory, leaf)

    def _enter(self, name: bytes, node: "int | Tree") -> Tree:
        if isinstance(node, int):
            raise TypeError("it is no directory")
        length = self._stack[-1][2] + len(name)
        if len(self._stack) > MAX_DEPTH or length > MAX_PATH_BYTES:
            raise ValueError("too deep, or its path is too long")
        self._stack.append((b"%d" % self.count, node, length + 1))
        return node

    def _keep_place(self, directory: Tree, leaf: int) -> None:
        if self._with_places:
            directory[PLACE] = leaf

    def _file(self, untrusted_to: list[str]) -> int:
        """Return the leaf that a link names."""
        node: int | Tree = self._root
        for name in untrusted_to:
            if isinstance(node, int):
                raise TypeError("the target's parent is no directory")
            component = raw(name)
            _expect_component(component)
            node = node[component]
        if not isinstance(untrusted_to, list) or not isinstance(node, int):
            raise TypeError("the target is neither file nor symbolic link")
        return node


def _expect_component(name: bytes) -> None:
    """Expect a name that is one component. Raises ValueError for anything else."""
    if not 1 <= len(name) <= protocol.MAX_NAME_BYTES or b"/" in name or name in (b".", b".."):
        raise ValueError("a name that is no component")


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
