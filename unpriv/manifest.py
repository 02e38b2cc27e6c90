"""The layer manifest, version 1: operations to canonical bytes.

Rule 1: JSON Lines; keys sorted, no spaces, ASCII; one operation a line. Same layer and lower layers, same bytes.
Rule 2: the layer's id is the SHA-256 of exactly the bytes that were written.
Rule 3: every line is within the protocol's ceilings, which the limits cannot exceed; root checks them all again.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii as quote
from typing import Final

from privhelper import protocol
from unpriv.merge import Operation
from unpriv.tree import IMPLICIT, Layer

_FLUSH_BYTES: Final = 256 << 10
# A directory that no member declares: chmod 0755, root's, from 1970. Its time must not depend on the day of the check.
_IMPLICIT_DIRECTORY: Final = '"mode":493,"mtime":0'


class Counted:
    """Where lines go: to descriptors, and always into the digest."""

    def __init__(self, descriptors: Sequence[int]):
        """Begin with nothing written."""
        self.bytes = 0
        self._descriptors = descriptors
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


def lines(operations: Iterable[Operation], layer: Layer) -> Iterable[str]:
    """Yield one line an operation.

    Written out key by key, for there may be a million: a test compares every form with json.dumps(sort_keys=True).
    """
    for op, into, untrusted_name, number, is_directory, to in operations:
        name = quote(untrusted_name.decode("utf-8", "surrogateescape"))
        if op == "file":
            _, mode, uid, gid, mtime, size, at = layer.record(number)
            yield (
                f'{{"at":{at if size else 0},"gid":{gid},"in":{into},"mode":{mode},"mtime":{mtime},"name":{name},'
                f'"op":"file","sha256":"{layer.digest(number)}","size":{size},"uid":{uid},'
                f'"xattrs":{_xattrs(layer, number)}}}\n'
            )
        elif op == "enter":
            yield f'{{"in":{into},"name":{name},"op":"enter"}}\n'
        elif op == "remove":
            yield f'{{"dir":{"true" if is_directory else "false"},"in":{into},"name":{name},"op":"remove"}}\n'
        elif op == "symlink":
            _, _, uid, gid, mtime, _, _ = layer.record(number)
            target = quote(layer.targets[number].decode("utf-8", "surrogateescape"))
            yield (
                f'{{"gid":{gid},"in":{into},"mtime":{mtime},"name":{name},"op":"symlink",'
                f'"target":{target},"uid":{uid},"xattrs":{{}}}}\n'
            )
        elif op == "link":
            path = ",".join(quote(part.decode("utf-8", "surrogateescape")) for part in to.split(b"/"))
            yield f'{{"in":{into},"name":{name},"op":"link","to":[{path}]}}\n'
        elif number == IMPLICIT:
            yield f'{{"gid":0,"in":{into},{_IMPLICIT_DIRECTORY},"name":{name},"op":"{op}","uid":0,"xattrs":{{}}}}\n'
        else:
            _, mode, uid, gid, mtime, _, _ = layer.record(number)
            yield (
                f'{{"gid":{gid},"in":{into},"mode":{mode},"mtime":{mtime},"name":{name},"op":"{op}","uid":{uid},'
                f'"xattrs":{_xattrs(layer, number)}}}\n'
            )


def _xattrs(layer: Layer, number: int) -> str:
    xattrs = layer.xattrs.get(number)
    if not xattrs:
        return "{}"
    # By the order of the strings, as json.dumps(sort_keys=True) has it.
    texts = sorted((name.decode("utf-8", "surrogateescape"), value.hex()) for name, value in xattrs.items())
    return "{" + ",".join(f'{quote(name)}:"{value}"' for name, value in texts) + "}"
