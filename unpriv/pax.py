"""The body of a PAX extended header: bytes in, checked overrides out.

Rule 1: the grammar is exact (POSIX pax, "pax Header Block"); one bad record refuses the archive.
Rule 2: every key is obeyed, counted and left out, or refused. Those that nobody knows change nothing anywhere.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Final

from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, rule

PAX_RECORD_MALFORMED: Final = rule("pax_record_malformed")
PAX_RECORD_TOO_LARGE: Final = rule("pax_record_too_large")
PAX_KEY_REPEATED: Final = rule("pax_key_repeated")
PAX_KEY_FORBIDDEN: Final = rule("pax_key_forbidden")
PAX_GLOBAL: Final = rule("pax_global")
PAX_VALUE_MALFORMED: Final = rule("pax_value_malformed")
PAX_NUMBER_MALFORMED: Final = rule("number_malformed")
PAX_NUMBER_NEGATIVE: Final = rule("number_negative")
PAX_NUMBER_TOO_LARGE: Final = rule("number_too_large")
PATH_EMPTY: Final = rule("path_empty")
PATH_HAS_NUL: Final = rule("path_has_nul")
SPARSE_FILE: Final = rule("sparse_file")
XATTR_CONFLICT: Final = rule("xattr_conflict")
ACL_DROPPED: Final = rule("acl_dropped", "drop")
COMMENT_DROPPED: Final = rule("comment_dropped", "drop")
OWNER_NAME_DROPPED: Final = rule("owner_name_dropped", "drop")
TIME_DROPPED: Final = rule("time_dropped", "drop")
VENDOR_RECORD_DROPPED: Final = rule("vendor_record_dropped", "drop")
XATTR_DROPPED: Final = rule("xattr_dropped", "drop")

_RECORD_HEAD: Final = re.compile(rb"([1-9][0-9]{0,7}) ([^=\0\n\t ][^=\0\n]*)=")  # one blank, then the key
_DECIMAL: Final = re.compile(rb"[0-9]{1,30}")
_ESCAPED: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,30})(?:\.([0-9]*))?")
_MAX_NUMBER: Final = (1 << 63) - 1
_NS: Final = 1_000_000_000

_XATTR: Final = b"SCHILY.xattr."
_PRIVATE_XATTR: Final = b"LIBARCHIVE.xattr."  # libarchive: base64 under a percent-encoded name
_SPARSE: Final = (b"GNU.sparse.", b"SCHILY.realsize", b"SUN.holesdata")
# What one reader obeys and another has never heard of: star(5); GNU tar manual, PAX keywords; POSIX's reserved words.
_FORBIDDEN: Final = (
    b"SCHILY.devmajor", b"SCHILY.devminor", b"SCHILY.fflags", b"SCHILY.filetype", b"SCHILY.tarfiletype",
    b"SCHILY.offset", b"SCHILY.volhdr", b"SCHILY.volno", b"SCHILY.dir", b"SCHILY.archtype",
    b"SUN.devmajor", b"SUN.devminor", b"SUN.fflags",
    b"GNU.volume.", b"GNU.dumpdir", b"GNU.", b"realtime.", b"security.",
)  # fmt: skip
_KEYWORDS: Final = (b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime", b"hdrcharset")
_CHARSETS: Final = (b"BINARY", b"ISO-IR 10646 2000 UTF-8")


class Overrides:
    """What one PAX header says about the member behind it; None where it says nothing."""

    __slots__ = ("binary", "dropped", "gid", "linkpath", "mtime_ns", "names_are_text", "path", "size", "uid", "xattrs")

    def __init__(self) -> None:
        """Begin with a header that says nothing."""
        self.path: bytes | None = None
        self.linkpath: bytes | None = None
        self.size: int | None = None
        self.uid: int | None = None
        self.gid: int | None = None
        self.mtime_ns: int | None = None
        self.xattrs: dict[bytes, bytes] = {}
        self.dropped: list[str] = []  # names of rules, one a record
        self.binary = False  # hdrcharset=BINARY: names are bytes
        self.names_are_text = True  # every name and owner of this header is UTF-8


def parse(body: bytes, limits: Limits) -> Overrides:
    """Return what a local header (typeflag x) says.

    Raises:
        RejectedError: pax_*, number_*, path_*, sparse_file, xattr_conflict.
    """
    overrides = Overrides()
    private_xattrs: dict[bytes, bytes] = {}
    for key, value in _records(body, limits):
        _take(overrides, private_xattrs, key, value)
    _expect_private_xattrs(overrides.xattrs, private_xattrs)
    return overrides


def parse_global(body: bytes, limits: Limits) -> None:
    """Accept a global header (typeflag g) that holds nothing but a comment, as `git archive` writes it."""
    for key, _ in _records(body, limits):
        if key != b"comment":
            raise RejectedError(PAX_GLOBAL, f"a global header sets {_shown(key)}")


def _shown(key: bytes) -> str:
    return repr(key[:80].decode("utf-8", "backslashreplace"))


def _records(body: bytes, limits: Limits) -> Iterator[tuple[bytes, bytes]]:
    seen = set()
    position = 0
    while position < len(body):
        head = _RECORD_HEAD.match(body, position, position + limits.archive.pax_record_bytes)
        if head is None:
            raise RejectedError(PAX_RECORD_MALFORMED, f"no record at byte {position} of the header")
        end = position + int(head[1])
        if int(head[1]) > limits.archive.pax_record_bytes:
            raise RejectedError(PAX_RECORD_TOO_LARGE, f"a record of {int(head[1])} bytes")
        if end > len(body) or end <= head.end() or body[end - 1] != 0x0A:
            raise RejectedError(PAX_RECORD_MALFORMED, f"the record at byte {position} does not end where it says")
        if head[2] in seen:
            raise RejectedError(PAX_KEY_REPEATED, f"{_shown(head[2])} twice")
        seen.add(head[2])
        if len(seen) > limits.archive.pax_records:
            raise RejectedError(PAX_RECORD_TOO_LARGE, f"more than {limits.archive.pax_records} records")
        yield head[2], body[head.end() : end - 1]
        position = end


def _take(overrides: Overrides, private_xattrs: dict[bytes, bytes], key: bytes, value: bytes) -> None:
    """Put one record where it belongs."""
    if key == b"path":
        overrides.path = _name(overrides, value)
    elif key == b"linkpath":
        overrides.linkpath = _name(overrides, value)
    elif key == b"size":
        overrides.size = _decimal(value, "size")
    elif key == b"uid":
        overrides.uid = _decimal(value, "uid")
    elif key == b"gid":
        overrides.gid = _decimal(value, "gid")
    elif key == b"mtime":
        overrides.mtime_ns = _time(value, "mtime")
    elif key.startswith(_XATTR):
        overrides.xattrs[key[len(_XATTR) :]] = value
    elif key.startswith(_PRIVATE_XATTR):
        private_xattrs[key] = value
    elif key == b"hdrcharset":
        overrides.binary = _charset(value) == b"BINARY"
    else:
        overrides.dropped.append(_dropped(overrides, key, value))


def _dropped(overrides: Overrides, key: bytes, value: bytes) -> str:
    """Return the rule by which a record is left out; refuse those that cannot be."""
    if key.startswith(_SPARSE):
        raise RejectedError(SPARSE_FILE, f"the PAX record {_shown(key)} describes a sparse file")
    if key in (b"atime", b"ctime", b"LIBARCHIVE.creationtime"):
        _time(value, key.decode("ascii"))
        return TIME_DROPPED
    if key in (b"uname", b"gname"):
        if b"\0" in value:
            raise RejectedError(PAX_VALUE_MALFORMED, f"{_shown(key)} has a NUL")
        overrides.names_are_text = overrides.names_are_text and _is_utf8(value)
        return OWNER_NAME_DROPPED
    if key == b"comment":
        return COMMENT_DROPPED
    if key.startswith(b"SCHILY.acl."):
        return ACL_DROPPED
    if key == b"RHT.security.selinux":
        return XATTR_DROPPED
    if key.startswith(_FORBIDDEN):
        raise RejectedError(PAX_KEY_FORBIDDEN, f"the PAX record {_shown(key)}")
    if key.strip().lower() in _KEYWORDS:  # it only looks like one, so a lenient reader may take it for it
        raise RejectedError(PAX_KEY_FORBIDDEN, f"the PAX record {_shown(key)}, nearly a keyword")
    return VENDOR_RECORD_DROPPED


def _name(overrides: Overrides, value: bytes) -> bytes:
    if not value:
        raise RejectedError(PATH_EMPTY, "an empty name in a PAX record")
    if b"\0" in value:
        raise RejectedError(PATH_HAS_NUL, "NUL in a PAX name", value)
    overrides.names_are_text = overrides.names_are_text and _is_utf8(value)
    return value


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _charset(value: bytes) -> bytes:
    if value not in _CHARSETS:
        raise RejectedError(PAX_VALUE_MALFORMED, f"the character set {_shown(value)}")
    return value


def _decimal(value: bytes, what: str) -> int:
    if _DECIMAL.fullmatch(value):
        if (found := int(value)) <= _MAX_NUMBER:
            return found
        raise RejectedError(PAX_NUMBER_TOO_LARGE, f"PAX {what} {found}")
    negative = value[:1] == b"-" and _DECIMAL.fullmatch(value[1:])
    raise RejectedError(PAX_NUMBER_NEGATIVE if negative else PAX_NUMBER_MALFORMED, f"PAX {what} {value[:40]!r}")


def _time(value: bytes, what: str) -> int:
    """Return nanoseconds, rounded down; no floating point ever."""
    match = _TIME.fullmatch(value)
    if match is None or not value:
        raise RejectedError(PAX_NUMBER_MALFORMED, f"PAX {what} {value[:40]!r}")
    fraction = (match[3] or b"")[:9]
    nanoseconds = int(match[2]) * _NS + int(fraction.ljust(9, b"0"))
    return -nanoseconds if match[1] else nanoseconds


def _expect_private_xattrs(xattrs: dict[bytes, bytes], private: dict[bytes, bytes]) -> None:
    """Let bsdtar's second copy of an attribute pass only where it says the same as the one that all readers know."""
    for key, value in private.items():
        name = _ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode("ascii")), key[len(_PRIVATE_XATTR) :])
        try:
            decoded = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
        except binascii.Error as error:
            raise RejectedError(XATTR_CONFLICT, f"{_shown(key)} is not base64") from error
        if xattrs.get(name) != decoded:
            raise RejectedError(XATTR_CONFLICT, f"{_shown(key)} and its SCHILY.xattr record differ")
