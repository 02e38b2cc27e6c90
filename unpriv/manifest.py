"""The layer manifest, version 1: operations to canonical bytes.

Rule 1: JSON Lines; keys sorted, no spaces, ASCII; one operation a line. Same layer and lower layers, same bytes.
Rule 2: the layer's id is the SHA-256 of exactly the bytes that were written.
Rule 3: every line is within the protocol's ceilings, which the limits cannot exceed; root checks them all again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii
from typing import Final

from privhelper import protocol
from unpriv.tree import IMPLICIT, Layer

_FLUSH_BYTES: Final = 256 << 10
# A directory that no member declares: chmod 0755, root's, from 1970. Its time must not depend on the day of the check.
_IMPLICIT_DIRECTORY: Final = '"mode":493,"mtime":0'


class Lines:
    """Where lines go: to descriptors, and always into the digest."""

    def __init__(self, descriptors: Sequence[int], tick: Callable[[], None]):
        """Begin with nothing written; ``tick`` is called with every flush."""
        self.bytes = 0
        self._descriptors = descriptors
        self._tick = tick
        self._hasher = hashlib.sha256()
        self._held: list[str] = []
        self._held_chars = 0

    def write(self, line: str) -> None:
        """Append one line of ASCII."""
        self._held.append(line)
        self._held_chars += len(line)
        if self._held_chars >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        self._tick()
        data = "".join(self._held).encode("ascii")
        self._held, self._held_chars = [], 0
        self.bytes += len(data)
        self._hasher.update(data)
        for descriptor in self._descriptors:
            write_all(descriptor, data)

    def digest(self) -> str:
        """Return the digest of all that was written."""
        return f"sha256:{self._hasher.hexdigest()}"


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all bytes to a descriptor."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def first_line(content_bytes: int, operations: int, parent: str | None) -> str:
    """Return the first line of a manifest."""
    head = {"bytes": content_bytes, "entries": operations, "format": protocol.FORMAT, "parent": parent}
    return json.dumps(head, sort_keys=True, separators=(",", ":"), ensure_ascii=True) + "\n"


class Tally:
    """A sink of merge.py that only lets its operations be counted, for the first line."""

    def __init__(self, tick: Callable[[], None]):
        """``tick`` is called in each bounded amount of work."""
        self._tick = tick

    def enter(self, into: int, name: bytes) -> None:
        """Count."""

    def remove(self, into: int, name: bytes, is_directory: bool) -> None:
        """Count."""

    def directory(self, op: str, into: int, name: bytes, record: int) -> None:
        """Count."""
        self._tick()

    def file(self, into: int, name: bytes, record: int) -> None:
        """Count."""

    def symlink(self, into: int, name: bytes, record: int) -> None:
        """Count."""

    def link(self, into: int, name: bytes, target: bytes) -> None:
        """Count."""


class Writer:
    """A sink of merge.py that writes one line an operation.

    Written out key by key, for there may be a million: a test compares every form with json.dumps(sort_keys=True).
    """

    def __init__(self, out: Lines, layer: Layer):
        """Write to ``out`` what ``layer`` says."""
        self._write = out.write
        self._layer = layer

    def enter(self, into: int, name: bytes) -> None:
        """Write an `enter`."""
        self._write(f'{{"in":{into},"name":{_quoted(name)},"op":"enter"}}\n')

    def remove(self, into: int, name: bytes, is_directory: bool) -> None:
        """Write a `remove`."""
        word = "true" if is_directory else "false"
        self._write(f'{{"dir":{word},"in":{into},"name":{_quoted(name)},"op":"remove"}}\n')

    def directory(self, op: str, into: int, name: bytes, record: int) -> None:
        """Write a `dir` or `meta`."""
        if record == IMPLICIT:
            rest = f'"name":{_quoted(name)},"op":"{op}","uid":0,"xattrs":{{}}}}\n'
            self._write(f'{{"gid":0,"in":{into},{_IMPLICIT_DIRECTORY},{rest}')
            return
        _, mode, uid, gid, mtime, _, _ = self._layer.record(record)
        self._write(
            f'{{"gid":{gid},"in":{into},"mode":{mode},"mtime":{mtime},"name":{_quoted(name)},"op":"{op}","uid":{uid},'
            f'"xattrs":{_xattrs(self._layer, record)}}}\n'
        )

    def file(self, into: int, name: bytes, record: int) -> None:
        """Write a `file`."""
        layer = self._layer
        _, mode, uid, gid, mtime, size, at = layer.record(record)
        self._write(
            f'{{"at":{at if size else 0},"gid":{gid},"in":{into},"mode":{mode},"mtime":{mtime},'
            f'"name":{_quoted(name)},"op":"file","sha256":"{layer.digest(record)}","size":{size},"uid":{uid},'
            f'"xattrs":{_xattrs(layer, record) if record in layer.xattrs else "{}"}}}\n'
        )

    def symlink(self, into: int, name: bytes, record: int) -> None:
        """Write a `symlink`."""
        _, _, uid, gid, mtime, _, _ = self._layer.record(record)
        self._write(
            f'{{"gid":{gid},"in":{into},"mtime":{mtime},"name":{_quoted(name)},"op":"symlink",'
            f'"target":{_quoted(self._layer.targets[record])},"uid":{uid},"xattrs":{{}}}}\n'
        )

    def link(self, into: int, name: bytes, target: bytes) -> None:
        """Write a `link`."""
        path = ",".join(_quoted(part) for part in target.split(b"/"))
        self._write(f'{{"in":{into},"name":{_quoted(name)},"op":"link","to":[{path}]}}\n')


def _quoted(text: bytes) -> str:
    """Return a JSON string; bytes that are not UTF-8 become surrogate escapes."""
    return encode_basestring_ascii(text.decode("utf-8", "surrogateescape"))


def _xattrs(layer: Layer, number: int) -> str:
    xattrs = layer.xattrs.get(number)
    if not xattrs:
        return "{}"
    # By the order of the strings, as json.dumps(sort_keys=True) has it.
    texts = sorted((name.decode("utf-8", "surrogateescape"), value.hex()) for name, value in xattrs.items())
    return "{" + ",".join(f'{encode_basestring_ascii(name)}:"{value}"' for name, value in texts) + "}"
