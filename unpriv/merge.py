"""One layer against the tree of the lower ones: first the rules that need both, then the operations.

Rule 1: the same layer and the same lower layers give the same operations, whatever the order of the archive.
Rule 2: whiteouts hide lower layers only. What a layer replaces is removed first, each descendant by its own operation.
Rule 3: no operation follows a link: a parent that is a symbolic link of a lower layer is refused, see
policy/decisions/check-symlinked-parents.md.
"""

from typing import Final, Protocol

from unpriv.findings import Findings
from unpriv.lower import Tree, is_file, is_symlink, names
from unpriv.rulebook import RejectedError, rule
from unpriv.rules import DIRECTORY, FILE, HARDLINK, SYMLINK
from unpriv.tree import IMPLICIT, Directory, Layer, Link

PARENT_IS_SYMLINK: Final = rule("parent_is_symlink")
PARENT_NOT_DIRECTORY: Final = rule("parent_not_directory")
HARDLINK_TARGET_MISSING: Final = rule("hardlink_target_missing")
HARDLINK_TARGET_NOT_FILE: Final = rule("hardlink_target_not_file")
HARDLINK_TARGET_REMOVED: Final = rule("hardlink_target_removed")
HARDLINK_ESCAPES_ROOT: Final = rule("hardlink_escapes_root")
WHITEOUT_WITHOUT_TARGET: Final = rule("whiteout_without_target", "drop")


class Sink(Protocol):
    """Where operations go, numbered from 1 in this order. ``into`` is the number of the directory's own operation."""

    def enter(self, into: int, name: bytes) -> None:
        """Open a directory of a lower layer."""

    def remove(self, into: int, name: bytes, is_directory: bool) -> None:
        """Remove a file or an empty directory of a lower layer."""

    def directory(self, op: str, into: int, name: bytes, record: int) -> None:
        """Make a directory, or give one new metadata; ``record`` is IMPLICIT where no member declares it."""

    def file(self, into: int, name: bytes, record: int) -> None:
        """Make a regular file."""

    def symlink(self, into: int, name: bytes, record: int) -> None:
        """Make a symbolic link."""

    def link(self, into: int, name: bytes, target: bytes) -> None:
        """Make a hard link to the file or symbolic link at a path."""


def _hidden(directory: Directory, name: bytes) -> bool:
    """Tell if a directory of this layer hides a name of the lower one."""
    return directory.opaque or (directory.whiteouts is not None and name in directory.whiteouts)


def _below(directory: Directory, lower: Tree | None, name: bytes) -> "int | Tree | None":
    """Return what the lower layers have under a name, unless this layer hides it."""
    return None if lower is None or _hidden(directory, name) else lower.get(name)


# ---------------------------------------------------------------- rules


def check(layer: Layer, lower: Tree, findings: Findings) -> None:
    """Apply the rules that need both trees, and forget directories that exist only in the path of a whiteout.

    Raises:
        RejectedError: parent_*, hardlink_*.
    """
    _check_directory(layer.root, lower, b"", findings)
    for link in layer.links.values():
        if link.record == IMPLICIT:
            try:
                _check_link(layer.root, lower, link, layer)
            except RejectedError as error:
                findings.refuse(error.at(link.target, link.member, link.offset))


def _check_directory(directory: Directory, lower: Tree | None, path: bytes, findings: Findings) -> None:
    if directory.opaque and not lower:
        findings.dropped[WHITEOUT_WITHOUT_TARGET] += 1
    for name in directory.whiteouts or ():
        if lower is None or name not in lower:
            findings.dropped[WHITEOUT_WITHOUT_TARGET] += 1
    unneeded = []
    for name, node in directory.entries.items():
        if not isinstance(node, Directory):
            continue
        below = _below(directory, lower, name)
        here = path + b"/" + name if path else name
        if node.record == IMPLICIT and below is not None and not isinstance(below, dict):
            which = PARENT_IS_SYMLINK if is_symlink(below) else PARENT_NOT_DIRECTORY
            what = "a symbolic link" if is_symlink(below) else "no directory"
            findings.refuse(RejectedError(which, f"it is {what} in a lower layer", here, node.member, node.offset))
        _check_directory(node, below if isinstance(below, dict) else None, here, findings)
        if node.record == IMPLICIT and not node.entries and not isinstance(below, dict):
            unneeded.append(name)
    for name in unneeded:
        del directory.entries[name]


def _check_link(root: Directory, lower: Tree, link: Link, layer: Layer) -> None:
    """Expect the target to be a file or symbolic link of a lower layer that this one neither hides nor replaces."""
    upper: int | Directory | None = root
    node: int | Tree | None = lower
    removed = False
    components = link.target.split(b"/") if link.target else []
    for position, name in enumerate(components):
        if not isinstance(node, dict):
            if node is not None and is_symlink(node):
                raise RejectedError(HARDLINK_ESCAPES_ROOT, "the target is behind a symbolic link of a lower layer")
            raise RejectedError(HARDLINK_TARGET_MISSING, "no such file in this layer before it, nor in a lower one")
        node = node.get(name)
        if isinstance(upper, Directory):
            removed = removed or _hidden(upper, name)
            upper = upper.entries.get(name)
            last = position == len(components) - 1
            if upper is not None:
                removed = removed or last or layer.kind(upper) != DIRECTORY
    if node is None:
        raise RejectedError(HARDLINK_TARGET_MISSING, "no such file in this layer before it, nor in a lower one")
    if not is_file(node) and not is_symlink(node):
        raise RejectedError(
            HARDLINK_TARGET_NOT_FILE, "the target is neither file nor symbolic link in the lower layers"
        )
    if removed:
        raise RejectedError(HARDLINK_TARGET_REMOVED, "this layer removes or replaces the target")


# ---------------------------------------------------------------- operations


class _Place:
    """A directory on the way down; it is entered only when something is to be done in it."""

    __slots__ = ("name", "number", "parent")

    def __init__(self, parent: "_Place | None", name: bytes, number: int | None):
        self.parent = parent
        self.name = name
        self.number = number


class Merge:
    """The operations of a checked layer."""

    def __init__(self, layer: Layer, lower: Tree, sink: Sink):
        """Take what check() has found good."""
        self.count = 0
        self._layer = layer
        self._lower = lower
        self._sink = sink
        self._links: list[tuple[bytes, bytes]] = []  # path, path of the file

    def run(self) -> None:
        """Hand all operations to the sink, depth first; every run of the same merge hands over the same ones."""
        root = self._layer.root
        if root.record != IMPLICIT:
            self.count += 1
            self._sink.directory("meta", 0, b"", root.record)
        self._directory(root, self._lower, _Place(None, b"", 0), b"")
        self._hard_links()

    def _enter(self, place: _Place) -> int:
        """Return the number of a directory, after entering those on its way that have not been."""
        if place.number is None:
            assert place.parent is not None
            into = self._enter(place.parent)
            self.count += 1
            place.number = self.count
            self._sink.enter(into, place.name)
        return place.number

    def _directory(self, upper: Directory, lower: Tree | None, place: _Place, path: bytes) -> None:
        """Do what is to be done in one directory: removals, then everything else in the order of names."""
        if lower:
            for name in self._gone(upper, lower):
                self._remove(lower, name, place)
        layer, sink, entries = self._layer, self._sink, upper.entries
        for name in sorted(entries):
            node = entries[name]
            kind = layer.kind(node)
            if kind == DIRECTORY:
                self._subdirectory(upper, lower, name, place, path)
                continue
            assert isinstance(node, int)
            if kind == HARDLINK:
                self._links.append((path + name, layer.links[node].target))
            elif kind in (FILE, SYMLINK):
                into = self._enter(place)
                self.count += 1
                (sink.file if kind == FILE else sink.symlink)(into, name, node)

    def _subdirectory(self, upper: Directory, lower: Tree | None, name: bytes, place: _Place, path: bytes) -> None:
        node = upper.entries[name]
        record = node.record if isinstance(node, Directory) else node
        below = _below(upper, lower, name)
        tree = below if isinstance(below, dict) else None
        inside = _Place(place, name, None)
        if tree is None or record != IMPLICIT:
            into = self._enter(place)
            self.count += 1
            inside.number = self.count
            self._sink.directory("dir" if tree is None else "meta", into, name, record)
        if isinstance(node, Directory):
            self._directory(node, tree, inside, path + name + b"/")

    def _gone(self, upper: Directory, lower: Tree) -> list[bytes]:
        """Return the names of the lower directory that this layer removes or replaces, in order."""
        if upper.opaque:
            return names(lower)
        gone = {name for name in upper.whiteouts or () if name in lower}
        for name in upper.entries.keys() & lower.keys():
            both = isinstance(lower[name], dict) and self._layer.kind(upper.entries[name]) == DIRECTORY
            if not both:
                gone.add(name)
        return sorted(gone)

    def _remove(self, lower: Tree, name: bytes, place: _Place) -> None:
        """Remove an entry; a directory with all that is in it, deepest first."""
        node = lower[name]
        if isinstance(node, dict):
            inside = _Place(place, name, None)
            for child in names(node):
                self._remove(node, child, inside)
        into = self._enter(place)
        self.count += 1
        self._sink.remove(into, name, isinstance(node, dict))

    def _hard_links(self) -> None:
        """Make all hard links in a walk of their own, so that every file that one names is there already."""
        stack = [_Place(None, b"", 0)]
        for path, target in self._links:
            *parents, name = path.split(b"/")
            keep = 1
            while keep < len(stack) and keep <= len(parents) and stack[keep].name == parents[keep - 1]:
                keep += 1
            del stack[keep:]
            for parent in parents[keep - 1 :]:
                stack.append(_Place(stack[-1], parent, None))
            into = self._enter(stack[-1])
            self.count += 1
            self._sink.link(into, name, target)
