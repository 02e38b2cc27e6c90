"""What one layer says, as a tree: members go in one by one, in the order of the archive.

Rule 1: what comes out does not depend on that order; what would depend on it is refused.
Rule 2: nothing is resolved through a link, and nothing is known here of the lower layers (merge.py compares).
Rule 3: compact, for there may be a million members: a leaf is a number into packed records; a directory without
children too.
"""

import hashlib
import struct
from typing import Final, NamedTuple

from privhelper.protocol import MIN_MTIME_NS
from unpriv.limits import Limits
from unpriv.member import Member
from unpriv.rulebook import RejectedError, rule
from unpriv.rules import BLOCK, CHAR, DIRECTORY, FIFO, FILE, HARDLINK, SYMLINK, TYPE_NAMES

DUPLICATE_ENTRY: Final = rule("duplicate_entry")
PARENT_NOT_DIRECTORY: Final = rule("parent_not_directory")
PARENT_IS_SYMLINK: Final = rule("parent_is_symlink")
HARDLINK_TARGET_NOT_FILE: Final = rule("hardlink_target_not_file")
HARDLINK_ESCAPES_ROOT: Final = rule("hardlink_escapes_root")
WHITEOUT_NAME_INVALID: Final = rule("whiteout_name_invalid")
WHITEOUT_NOT_EMPTY_FILE: Final = rule("whiteout_not_empty_file")
WHITEOUT_IN_PATH: Final = rule("whiteout_in_path")
NAMES_TOO_LARGE: Final = rule("names_too_large")

# OCI image-spec layer.md, "Whiteouts"
_PREFIX: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"

_RECORD: Final = struct.Struct("<HHIIQQQ")  # kind, mode, uid, gid, mtime since MIN_MTIME_NS (past 2^63), size, at
_DIGEST_BYTES: Final = 32
IMPLICIT: Final = -1  # the record of a directory that no member declares


class Directory:
    """A directory with children, or with a mark on lower layers."""

    __slots__ = ("entries", "member", "offset", "opaque", "record", "whiteouts")

    def __init__(self, record: int, member: int, offset: int):
        """Begin empty; ``member`` and ``offset`` are those of the first member that names it or something below it."""
        self.entries: dict[bytes, int | Directory] = {}
        self.record = record
        self.member = member
        self.offset = offset
        self.opaque = False
        self.whiteouts: set[bytes] | None = None


class Record(NamedTuple):
    """What a leaf or a directory says about itself."""

    kind: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    at: int


class Link(NamedTuple):
    """A hard link: the path of a file or symbolic link, and the record of what is there if this layer has it."""

    target: bytes  # of this layer: the path of the file itself, never of another link
    record: int  # of the file in this layer, or IMPLICIT: it must be in a lower one
    member: int
    offset: int


class Layer:
    """All members of one layer."""

    def __init__(self, limits: Limits):
        """Begin with an empty layer."""
        self.root = Directory(IMPLICIT, 0, 0)
        self.digests = bytearray()  # of files, filled in later, by record
        self.xattrs: dict[int, dict[bytes, bytes]] = {}
        self.targets: dict[int, bytes] = {}  # of symbolic links
        self.links: dict[int, Link] = {}
        self.content_bytes = 0
        self._records = bytearray()
        self._count = 0
        self._max_names_bytes = limits.archive.names_bytes
        self._names_bytes = 0
        self._last_path = b""
        self._last = self.root

    def record(self, number: int) -> Record:
        """Return a record by its number."""
        kind, mode, uid, gid, since_ns, size, at = _RECORD.unpack_from(self._records, number * _RECORD.size)
        return Record(kind, mode, uid, gid, since_ns + MIN_MTIME_NS, size, at)

    def kind(self, node: int | Directory) -> int:
        """Return the type of a node."""
        if isinstance(node, Directory):
            return DIRECTORY
        return self._records[node * _RECORD.size]

    def digest(self, number: int) -> str:
        """Return the SHA-256 of a file's content in hexadecimal."""
        return self.digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES].hex()

    def set_digest(self, number: int, digest: bytes) -> None:
        """Keep the SHA-256 of a file's content."""
        self.digests[number * _DIGEST_BYTES : (number + 1) * _DIGEST_BYTES] = digest

    def add(self, member: Member) -> int:
        """Put a member into the tree; return the number under which its digest belongs, or -1 if it has no content.

        Raises:
            RejectedError: duplicate_entry, parent_*, hardlink_*, whiteout_*, names_too_large.
        """
        path = member.path
        self._names_bytes += len(path) + len(member.target)
        if self._names_bytes > self._max_names_bytes:
            raise RejectedError(NAMES_TOO_LARGE, f"more than {self._max_names_bytes} bytes of names")
        if not path:
            self.root.record = self._keep(member)
            return -1
        parent_path, _, name = path.rpartition(b"/")
        if b".wh." in path and self._is_whiteout(member, parent_path, name):
            self._whiteout(member, parent_path, name)
            return -1
        parent = self._last if parent_path == self._last_path else self._directory(parent_path, member)
        present = parent.entries.get(name)
        if present is not None:
            self._again(member, parent, name, present)
            return -1
        if member.kind == HARDLINK:
            link = self._link(member)
            parent.entries[name] = number = self._keep(member)
            self.links[number] = link
            return -1
        parent.entries[name] = number = self._keep(member)
        if member.kind == FILE:
            self.content_bytes += member.size
            return number
        if member.kind == SYMLINK:
            self.targets[number] = member.target
        return -1

    def _keep(self, member: Member) -> int:
        """Append a record; return its number."""
        number = self._count
        self._count += 1
        self._records += _RECORD.pack(
            member.kind, member.mode, member.uid, member.gid, member.mtime_ns - MIN_MTIME_NS, member.size, member.at
        )
        self.digests += _EMPTY_DIGEST
        if member.xattrs:
            self.xattrs[number] = member.xattrs
        return number

    def _directory(self, path: bytes, member: Member) -> Directory:
        """Return the directory of a path, made implicitly where no member has declared it (yet)."""
        directory = self.root
        for name in path.split(b"/") if path else ():
            node = directory.entries.get(name)
            if not isinstance(node, Directory):
                node = self._open(node, member)
                directory.entries[name] = node
            directory = node
        self._last_path, self._last = path, directory
        return directory

    def _open(self, node: int | None, member: Member) -> Directory:
        """Turn nothing, or a directory without children, into one that can have them."""
        if node is None:
            return Directory(IMPLICIT, member.number, member.offset)
        kind = self.kind(node)
        if kind == SYMLINK:
            raise RejectedError(PARENT_IS_SYMLINK, "a directory of its path is a symbolic link of this layer")
        if kind != DIRECTORY:
            raise RejectedError(PARENT_NOT_DIRECTORY, f"a directory of its path is a {TYPE_NAMES[kind]} of this layer")
        return Directory(node, member.number, member.offset)

    def _again(self, member: Member, parent: Directory, name: bytes, present: "int | Directory") -> None:
        """Accept a second member of one name only where both are directories: the last one's metadata counts."""
        if member.kind != DIRECTORY or self.kind(present) != DIRECTORY:
            first, second = TYPE_NAMES[self.kind(present)], TYPE_NAMES[member.kind]
            raise RejectedError(DUPLICATE_ENTRY, f"the name is taken by an earlier {first}, now a {second}")
        number = self._keep(member)
        if isinstance(present, Directory):
            present.record = number
        else:
            parent.entries[name] = number

    # ---------------------------------------------------------------- hard links

    def _link(self, member: Member) -> Link:
        """Find what a hard link names: an earlier member of this layer, or else one that must be in a lower one."""
        node = self._find(member.target)
        if node is None:
            return Link(member.target, IMPLICIT, member.number, member.offset)
        kind = self.kind(node)
        if isinstance(node, Directory) or kind not in (FILE, HARDLINK, SYMLINK):
            raise RejectedError(HARDLINK_TARGET_NOT_FILE, f"the target of a hard link is a {TYPE_NAMES[kind]}")
        if kind == HARDLINK:
            first = self.links[node]
            return Link(first.target, first.record, member.number, member.offset)
        return Link(member.target, node, member.number, member.offset)

    def _find(self, path: bytes) -> "int | Directory | None":
        """Return the node of a path of this layer, never through a link; None where this layer does not have it."""
        node: int | Directory | None = self.root
        for name in path.split(b"/") if path else ():
            if not isinstance(node, Directory):
                if node is not None and self.kind(node) == SYMLINK:
                    raise RejectedError(HARDLINK_ESCAPES_ROOT, "the target of a hard link is behind a symbolic link")
                return None
            node = node.entries.get(name)
        return node

    # ---------------------------------------------------------------- whiteouts

    def _is_whiteout(self, member: Member, parent_path: bytes, name: bytes) -> bool:
        """Tell if a member is a whiteout; refuse everything that merely looks like one."""
        if any(component.startswith(_PREFIX) for component in parent_path.split(b"/")):
            raise RejectedError(WHITEOUT_IN_PATH, "a directory of its path begins with `.wh.`")
        if not name.startswith(_PREFIX):
            return False
        removed = name[len(_PREFIX) :]
        if name != _OPAQUE and (removed in (b"", b".", b"..") or removed.startswith(_PREFIX)):
            raise RejectedError(
                WHITEOUT_NAME_INVALID, "a whiteout of the directory itself, its parent, or a reserved name"
            )
        if member.kind != FILE or member.size:
            what = TYPE_NAMES[member.kind]
            raise RejectedError(WHITEOUT_NOT_EMPTY_FILE, f"a whiteout that is a {what} of {member.size} bytes")
        return True

    def _whiteout(self, member: Member, parent_path: bytes, name: bytes) -> None:
        """Mark what a whiteout hides of the lower layers. A whiteout alone makes no directory: see merge.py."""
        directory = self._directory(parent_path, member)
        if name == _OPAQUE:
            directory.opaque = True
            return
        if directory.whiteouts is None:
            directory.whiteouts = set()
        directory.whiteouts.add(name[len(_PREFIX) :])


_EMPTY_DIGEST: Final = hashlib.sha256().digest()  # of a file without content, until another is set
SPECIALS: Final = (CHAR, BLOCK, FIFO)  # kept in the tree only to say what was omitted there
