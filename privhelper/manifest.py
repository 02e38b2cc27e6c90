"""The grammar of a layer manifest, checked again from the bytes up. Shares no code with the unprivileged checker.

Rule 1: a line is one of the expressions below or it is refused. They match the canonical form only (sorted keys, no
spaces, ASCII), so no general JSON parser meets hostile bytes with root's authority behind it, and one operation has one
spelling.
Rule 2: every number is within the ceilings of protocol.py and the limits of policy/helper.toml, every name is a single
component: a path cannot be expressed.
Rule 3: memory does not grow with the manifest: lines are read by pread, from a descriptor that cannot change.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from privhelper import protocol
from privhelper.errors import AnswerError

_CHUNK_BYTES: Final = 1 << 18
_NUMBER: Final = rb"(0|[1-9][0-9]{0,19})"
_SIGNED: Final = rb"(0|-?[1-9][0-9]{0,19})"  # times before 1970
# One JSON string as ensure_ascii writes it. Possessive (++, *+): the expression never goes back, whatever it is given.
_PLAIN: Final = rb'(?:[ !#-\[\]-~]++|\\(?:["\\bfnrt]|u[0-9a-f]{4}))*+'
_STRING: Final = b'"(' + _PLAIN + b')"'
_PAIR: Final = b'"' + _PLAIN + rb'":"[0-9a-f]*+"'
_XATTRS: Final = rb"\{(|" + _PAIR + b"(?:," + _PAIR + rb")*+)\}"
_STRINGS: Final = rb'\[("' + _PLAIN + b'"(?:,"' + _PLAIN + rb'")*+)\]'


def _form(*fields: tuple[str, bytes]) -> re.Pattern[bytes]:
    return re.compile(rb"\{" + b",".join(b'"%b":%b' % (name.encode(), form) for name, form in fields) + rb"\}")


_COMMON: Final = (("in", _NUMBER), ("mode", _NUMBER), ("mtime", _SIGNED), ("name", _STRING))
_GID, _UID = ("gid", _NUMBER), ("uid", _NUMBER)
_DIRECTORY: Final = _form(_GID, *_COMMON, ("op", b'"(dir|meta)"'), _UID, ("xattrs", _XATTRS))
_FILE: Final = _form(
    ("at", _NUMBER), _GID, *_COMMON, ("op", b'"file"'), ("sha256", b'"([0-9a-f]{64})"'), ("size", _NUMBER), _UID,
    ("xattrs", _XATTRS),
)  # fmt: skip
_SYMLINK: Final = _form(
    _GID, ("in", _NUMBER), ("mtime", _SIGNED), ("name", _STRING), ("op", b'"symlink"'), ("target", _STRING), _UID,
    ("xattrs", rb"\{\}"),
)  # fmt: skip
_LINK: Final = _form(("in", _NUMBER), ("name", _STRING), ("op", b'"link"'), ("to", _STRINGS))
_ENTER: Final = _form(("in", _NUMBER), ("name", _STRING), ("op", b'"enter"'))
_REMOVE: Final = _form(("dir", b"(true|false)"), ("in", _NUMBER), ("name", _STRING), ("op", b'"remove"'))
_FIFO: Final = _form(_GID, *_COMMON, ("op", b'"fifo"'), _UID)
_DEVICE: Final = _form(
    _GID, ("in", _NUMBER), ("major", _NUMBER), ("minor", _NUMBER), *_COMMON[1:], ("op", b'"(char|block)"'), _UID
)
_HEADER: Final = _form(
    ("bytes", _NUMBER), ("entries", _NUMBER), ("format", b'"' + re.escape(protocol.FORMAT.encode()) + b'"'),
    ("parent", b'(?:null|"(sha256:[0-9a-f]{64})")'),
)  # fmt: skip


class RejectedError(AnswerError):
    """The manifest or the payload is wrong. ``entry`` is the number of the operation, 0 for the first line."""

    rule: str
    entry: int

    def __init__(self, rule: str, entry: int, message: str) -> None:
        super().__init__("rejected", message, rule, entry)


class Header(NamedTuple):
    """What the first line says."""

    content_bytes: int
    entries: int
    parent: str | None


class Operation(NamedTuple):
    """One checked line. Fields that its kind does not have keep their default."""

    kind: str
    into: int  # number of the operation that made or entered the directory; 0 is the root
    name: bytes
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    at: int = 0
    size: int = 0
    sha256: str = ""
    target: bytes = b""  # of a symlink
    to: tuple[bytes, ...] = ()  # of a hard link
    is_directory: bool = False  # of a remove


def lines(manifest: int) -> Iterator[bytes]:
    """Yield each line without its newline; the last one ends in one too.

    Raises:
        RejectedError: a line above the ceiling, or bytes after the last newline.
    """
    offset, rest, number = 0, b"", 0
    while chunk := os.pread(manifest, _CHUNK_BYTES, offset):
        offset += len(chunk)
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if len(line) >= protocol.MAX_LINE_BYTES:
                raise _too_long(number)
            yield line
            number += 1
        if len(rest) >= protocol.MAX_LINE_BYTES:
            raise _too_long(number)
    if rest:
        raise RejectedError("manifest_form", number, "the last line does not end")


def _too_long(number: int) -> RejectedError:
    return RejectedError("manifest_form", number, f"a line of {protocol.MAX_LINE_BYTES} bytes or more")


def read_header(manifest: int, limits: Mapping[str, int]) -> Header:
    """Check the first line of an open manifest; raises as the other two do."""
    return parse_header(next(lines(manifest), b""), limits)


def parse_header(line: bytes, limits: Mapping[str, int]) -> Header:
    """Check the first line.

    Raises:
        RejectedError: not the one spelling of a header, or above a limit.
    """
    match = _HEADER.fullmatch(line)
    if match is None:
        raise RejectedError("manifest_header", 0, f"not the first line of {protocol.FORMAT}")
    content_bytes, entries = int(match[1]), int(match[2])
    for what, value in (("content_bytes", content_bytes), ("entries", entries)):
        if value > limits[what]:
            raise RejectedError("manifest_limit", 0, f"{what} {value} above the limit of {limits[what]}")
    return Header(content_bytes, entries, match[3].decode() if match[3] else None)


def parse(line: bytes, entry: int) -> Operation:
    """Check one operation.

    Raises:
        RejectedError: not the one spelling of an operation, or a value above its ceiling.
    """
    try:
        if line.startswith(b'{"at"'):
            return _file(line)
        if line.startswith(b'{"gid"'):
            return _owned(line)
        return _plain(line)
    except _BadError as error:
        raise RejectedError(error.rule, entry, f"operation {entry}: {error}") from None


class _BadError(Exception):
    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


def _file(line: bytes) -> Operation:
    match = _FILE.fullmatch(line) or _no_form()
    at, gid, into, mode, mtime, name, sha256, size, uid, xattrs = match.groups()
    at_, size_ = _within("at", at, protocol.MAX_PAYLOAD_BYTES), _within("size", size, protocol.MAX_FILE_BYTES)
    if size_ == 0 and at_ != 0:
        raise _BadError("manifest_form", "an empty file has `at` 0")
    return Operation(
        "file", _into(into), _component(name), _mode(mode), _id(uid), _id(gid), _mtime(mtime), _xattrs(xattrs), at_,
        size_, sha256.decode(),
    )  # fmt: skip


def _owned(line: bytes) -> Operation:
    if match := _DIRECTORY.fullmatch(line):
        gid, into, mode, mtime, name, kind, uid, xattrs = match.groups()
        is_root = kind == b"meta" and name == b"" and into == b"0"
        return Operation(
            kind.decode(), _into(into), b"" if is_root else _component(name), _mode(mode), _id(uid), _id(gid),
            _mtime(mtime), _xattrs(xattrs),
        )  # fmt: skip
    if match := _SYMLINK.fullmatch(line):
        gid, into, mtime, name, target, uid = match.groups()
        into_, name_ = _into(into), _component(name)
        target_ = _bytes(target, protocol.MAX_TARGET_BYTES)
        return Operation("symlink", into_, name_, 0, _id(uid), _id(gid), _mtime(mtime), target=target_)
    if match := _FIFO.fullmatch(line):
        gid, into, mode, mtime, name, uid = match.groups()
        return Operation("fifo", _into(into), _component(name), _mode(mode), _id(uid), _id(gid), _mtime(mtime))
    match = _DEVICE.fullmatch(line) or _no_form()
    gid, into, major, minor, mode, mtime, name, kind, uid = match.groups()
    for what, number in (("major", major), ("minor", minor)):
        _within(what, number, protocol.MAX_DEVICE_NUMBER)
    return Operation(kind.decode(), _into(into), _component(name), _mode(mode), _id(uid), _id(gid), _mtime(mtime))


def _plain(line: bytes) -> Operation:
    if match := _ENTER.fullmatch(line):
        return Operation("enter", _into(match[1]), _component(match[2]))
    if match := _LINK.fullmatch(line):
        to = tuple(_component(part[1:-1]) for part in re.findall(b'"' + _PLAIN + b'"', match[3]))
        if sum(map(len, to)) + len(to) - 1 > protocol.MAX_PATH_BYTES or len(to) > protocol.MAX_DEPTH:
            raise _BadError("manifest_name", "the path of a link's target is too long")
        return Operation("link", _into(match[1]), _component(match[2]), to=to)
    match = _REMOVE.fullmatch(line) or _no_form()
    return Operation("remove", _into(match[2]), _component(match[3]), is_directory=match[1] == b"true")


def _no_form() -> NoReturn:
    raise _BadError("manifest_form", "not the canonical spelling of any operation")


def _within(what: str, digits: bytes, ceiling: int, rule: str = "manifest_limit") -> int:
    value = int(digits)
    if value > ceiling:
        raise _BadError(rule, f"{what} {value} above {ceiling}")
    return value


def _into(digits: bytes) -> int:
    return _within("in", digits, protocol.MAX_ENTRIES)


def _mode(digits: bytes) -> int:
    return _within("mode", digits, protocol.MAX_MODE)


def _id(digits: bytes) -> int:
    return _within("uid or gid", digits, protocol.MAX_ID, "id_above_helper")


def _mtime(digits: bytes) -> int:
    value = _within("mtime", digits, protocol.MAX_MTIME_NS)
    if value < protocol.MIN_MTIME_NS:
        raise _BadError("manifest_limit", f"mtime {value} below {protocol.MIN_MTIME_NS}")
    return value


def _text(spelling: bytes) -> str:
    """Undo the escapes of a JSON string, refusing an escape that was not needed."""
    text: Any = json.loads(b'"' + spelling + b'"')
    if json.dumps(text).encode("ascii") != b'"' + spelling + b'"':
        raise _BadError("manifest_form", "a string has two spellings, and this is the other one")
    return str(text)


def _bytes(spelling: bytes, ceiling: int) -> bytes:
    """Return the bytes that a JSON string stands for: UTF-8, other bytes as surrogate escapes."""
    value = spelling
    if b"\\" in spelling:
        text = _text(spelling)
        try:
            value = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise _BadError("manifest_name", "a surrogate that stands for no byte") from None
        if value.decode("utf-8", "surrogateescape") != text:
            raise _BadError("manifest_name", "surrogate escapes that are UTF-8 together: a second spelling")
    if not 1 <= len(value) <= ceiling or b"\0" in value:
        raise _BadError("manifest_name", f"a name or target of {len(value)} bytes, ceiling {ceiling}, or with a NUL")
    return value


def _component(spelling: bytes) -> bytes:
    value = _bytes(spelling, protocol.MAX_NAME_BYTES)
    if b"/" in value or value in (b".", b".."):
        raise _BadError("manifest_name", f"not a single component: {value[:64]!r}")
    return value


def _xattrs(spelling: bytes) -> tuple[tuple[bytes, bytes], ...]:
    if not spelling:
        return ()
    found: list[tuple[bytes, bytes]] = []
    last = ""
    for pair in re.findall(_PAIR, spelling):
        raw_name, _, raw_value = pair[1:-1].rpartition(b'":"')
        name = _text(raw_name)
        if name <= last:
            raise _BadError("manifest_form", "extended attributes out of order or twice")
        last = name
        found.append((_xattr_name(name, raw_name), _xattr_value(name, raw_value)))
    if len(found) > protocol.MAX_XATTRS:
        raise _BadError("manifest_limit", f"{len(found)} extended attributes, ceiling {protocol.MAX_XATTRS}")
    return tuple(found)


def _xattr_name(name: str, spelling: bytes) -> bytes:
    value = _bytes(spelling, protocol.MAX_XATTR_NAME_BYTES)
    is_user = name.startswith(protocol.XATTR_PREFIX) and name != protocol.XATTR_PREFIX
    if not is_user and name != protocol.XATTR_CAPABILITY:
        raise _BadError("manifest_xattr", f"extended attribute {name[:64]!r} is not allowed")
    return value


def _xattr_value(name: str, digits: bytes) -> bytes:
    if len(digits) % 2 or len(digits) > 2 * protocol.MAX_XATTR_VALUE_BYTES:
        raise _BadError("manifest_xattr", f"the value of {name[:64]!r} has {len(digits)} digits")
    value = bytes.fromhex(digits.decode("ascii"))
    # struct vfs_cap_data (linux/capability.h): revision 3 names a user of this host, revision 1 is obsolete.
    if name == protocol.XATTR_CAPABILITY and (len(value) != 20 or value[3] != 2):
        raise _BadError("manifest_xattr", "security.capability is not in revision 2")
    return value
