"""One 512-byte header: bytes in, checked fields out.

Rule 1: every field is parsed to its last byte; what is not wholly understood is refused.
Rule 2: three formats: POSIX ustar, old GNU, version 7. All others are refused by their magic or their leftovers.

Layout (tar(5)): name 100, mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8, typeflag 1, linkname 100, magic and
version 8, uname 32, gname 32, devmajor 8, devminor 8, prefix 155, padding 12.
"""

import re
import struct
import zlib
from typing import Final, NamedTuple

from unpriv.rulebook import RejectedError, rule

HEADER_CHECKSUM: Final = rule("header_checksum")
HEADER_MAGIC: Final = rule("header_magic")
HEADER_RESERVED: Final = rule("header_reserved")
HEADER_TEXT: Final = rule("header_text")
NUMBER_MALFORMED: Final = rule("number_malformed")
NUMBER_NEGATIVE: Final = rule("number_negative")
NUMBER_TOO_LARGE: Final = rule("number_too_large")
SPARSE_FILE: Final = rule("sparse_file")

BLOCK_BYTES: Final = 512
ZERO_BLOCK: Final = bytes(BLOCK_BYTES)
MAX_NUMBER: Final = (1 << 63) - 1

_LAYOUT: Final = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
# The version is 00; NULs and spaces in its place mean nothing else to any reader.
_POSIX: Final = (b"ustar\x0000", b"ustar\0\0\0", b"ustar\0  ")
_GNU: Final = b"ustar  \0"
_V7: Final = bytes(8)
_PAD: Final = bytes(12)
_NO_NUMBER: Final = bytes(8)
_NO_NAME: Final = bytes(100)
_NO_PREFIX: Final = bytes(155)
_OCTAL: Final = re.compile(rb" *([0-7]+)[ \0]*")
_BLANK: Final = re.compile(rb" *\0*|\0* *")
_CHECKSUM_AS_SPACES: Final = sum(b"        ")

# Modes, owners and device numbers repeat from header to header: remember what a field of eight bytes said.
_new: Final = tuple.__new__  # a NamedTuple's own constructor takes three times as long, and there are a million headers
_SMALL: Final[dict[bytes, int]] = {}
_SMALL_MAX: Final = 4_096


class Header(NamedTuple):
    """A header whose fields are well formed; whether they make sense is for others to say."""

    name: bytes  # with the prefix of a POSIX header
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    typeflag: bytes
    linkname: bytes
    major: int
    minor: int
    size_blank: bool  # GNU tar leaves the size blank where a PAX record has it


def parse(block: bytes) -> Header:
    """Return the fields of one header block.

    Raises:
        RejectedError: header_*, number_*.
    """
    (
        name, mode, uid, gid, size, mtime, checksum, typeflag, linkname, magic,
        uname, gname, major, minor, prefix, pad,
    ) = _LAYOUT.unpack(block)  # fmt: skip
    _expect_checksum(block, checksum)
    name = text(name, "name")
    if magic in _POSIX:
        if pad != _PAD:
            raise RejectedError(HEADER_RESERVED, "data behind the prefix; a star archive has it there")
        if prefix != _NO_PREFIX:
            name = text(prefix, "prefix") + b"/" + name
    elif magic == _GNU:
        _expect_plain_gnu(prefix, pad, typeflag)
    elif magic != _V7:
        raise RejectedError(HEADER_MAGIC, f"unknown magic {magic!r}")
    elif any(uname) or any(gname) or prefix != _NO_PREFIX or pad != _PAD:  # GNU tar writes device numbers even here
        raise RejectedError(HEADER_RESERVED, "a version 7 header with data behind its link name")
    length = number_or_blank(size, "size") if size[0] == 0x20 else number(size, "size")
    known = _SMALL
    return _new(
        Header,
        (
            name,
            known[mode] if mode in known else number(mode, "mode"),
            known[uid] if uid in known else number(uid, "uid"),
            known[gid] if gid in known else number(gid, "gid"),
            length or 0,
            signed(mtime, "mtime"),
            typeflag,
            b"" if linkname == _NO_NAME else text(linkname, "linkname"),
            0 if major == _NO_NUMBER else number_or_blank(major, "devmajor") or 0,
            0 if minor == _NO_NUMBER else number_or_blank(minor, "devminor") or 0,
            length is None,
        ),
    )


def adds_up(block: bytes) -> bool:
    """Tell if a block has the checksum of a header."""
    try:
        _expect_checksum(block, block[148:156])
    except RejectedError:
        return False
    return True


def _expect_checksum(block: bytes, field: bytes) -> None:
    """Compare the sum of all bytes, the checksum's own taken as spaces (tar(5)), with the field.

    The lower half of Adler-32 is one plus the sum of the bytes modulo 65,521 (RFC 1950); 512 bytes of ASCII add up to
    at most 65,024, so there it is the sum itself, ten times faster.
    """
    plain = field[6:] == b"\0 " and field[:6].isdigit() and b"8" not in field and b"9" not in field
    expected = int(field[:6], 8) if plain else _octal(field, "checksum")  # never base-256: Go's reader knows octal only
    found = (zlib.adler32(block) & 0xFFFF) - 1 if block.isascii() else sum(block)
    found += _CHECKSUM_AS_SPACES - sum(field)
    if found != expected:
        raise RejectedError(HEADER_CHECKSUM, f"expected {expected}, found {found}")


def _expect_plain_gnu(prefix: bytes, pad: bytes, typeflag: bytes) -> None:
    """Accept access and change time at the place of POSIX's prefix; refuse what marks volumes and sparse files.

    tar(5): atime 12, ctime 12, offset 12, longnames 4, unused 1, sparse 96, isextended 1, realsize 12, pad 17.
    """
    if prefix == _NO_PREFIX and pad == _PAD:
        return
    if typeflag == b"S":
        raise RejectedError(SPARSE_FILE, "an old GNU sparse file")
    if any(prefix[24:]) or pad != _PAD:
        raise RejectedError(HEADER_RESERVED, "an old GNU header with a sparse map or a volume's offset")
    for field, what in ((prefix[:12], "atime"), (prefix[12:24], "ctime")):
        if not _BLANK.fullmatch(field):
            signed(field, what)


def text(field: bytes, what: str) -> bytes:
    """Return the text before the first NUL; nothing but NULs may follow it."""
    found = field.rstrip(b"\0")
    if b"\0" in found:
        raise RejectedError(HEADER_TEXT, f"{what}: data behind the terminating NUL")
    return found


def number(field: bytes, what: str) -> int:
    """Return a number that is neither blank nor negative."""
    value = _SMALL.get(field)
    if value is not None:
        return value
    if not field.strip(b"\0"):  # what Rust's tar leaves for 0, and every reader takes for it
        return 0
    value = _number(field, what)
    if value is None:
        raise RejectedError(NUMBER_MALFORMED, f"{what} is blank")
    if value < 0:
        raise RejectedError(NUMBER_NEGATIVE, f"{what}: {value}")
    if len(field) == 8:
        if len(_SMALL) >= _SMALL_MAX:
            _SMALL.clear()
        _SMALL[field] = value
    return value


def number_or_blank(field: bytes, what: str) -> int | None:
    """Return a number that is not negative, or None for a field of spaces."""
    return None if b" " in field and _BLANK.fullmatch(field) else number(field, what)


def signed(field: bytes, what: str) -> int:
    """Return a number that may be negative (times before 1970, in base-256)."""
    value = _number(field, what) if field.strip(b"\0") else 0
    if value is None:
        raise RejectedError(NUMBER_MALFORMED, f"{what} is blank")
    return value


def _number(field: bytes, what: str) -> int | None:
    digits = field[:-1]
    if digits.isdigit() and field[-1] in b"\0 ":
        try:
            return int(digits, 8)
        except ValueError:
            raise RejectedError(NUMBER_MALFORMED, f"{what}: {field!r}") from None
    if field[0] in (0x80, 0xFF):
        return _base256(field, what)
    return _octal(field, what)


def _octal(field: bytes, what: str) -> int | None:
    if match := _OCTAL.fullmatch(field):
        return int(match[1], 8)
    if _BLANK.fullmatch(field):
        return None
    raise RejectedError(NUMBER_NEGATIVE if b"-" in field else NUMBER_MALFORMED, f"{what}: {field!r}")


def _base256(field: bytes, what: str) -> int:
    """Return a GNU base-256 number: two's complement, its first byte 0x80 or 0xff (tar(5), numeric fields)."""
    value = int.from_bytes(field[1:], "big")
    value -= 1 << 8 * (len(field) - 1) if field[0] == 0xFF else 0
    if not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise RejectedError(NUMBER_TOO_LARGE, f"{what}: {value}")
    return value
