"""Archives written byte by byte, right or wrong as wished: every field of every header can be said.

Rule 1: the defaults are an honest POSIX ustar header; what is passed replaces the field's bytes as they are.
"""

from __future__ import annotations

from typing import Final

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
MTIME: Final = 1_700_000_000


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    return (b"\x80" if value >= 0 else b"\xff") + (value % (1 << 8 * (width - 1))).to_bytes(width - 1, "big")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def head(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = MTIME,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    uname: bytes = b"",
    gname: bytes = b"",
    major: int | bytes = 0,
    minor: int | bytes = 0,
    prefix: bytes = b"",
    pad: bytes = b"",
    checksum: bytes | None = None,
) -> bytes:
    """Return one header block."""

    def number(value: int | bytes, width: int) -> bytes:
        return value.ljust(width, b"\0") if isinstance(value, bytes) else octal(value, width)

    fields = [
        name.ljust(100, b"\0"), number(mode, 8), number(uid, 8), number(gid, 8), number(size, 12), number(mtime, 12),
        b" " * 8, kind, link.ljust(100, b"\0"), magic, uname.ljust(32, b"\0"), gname.ljust(32, b"\0"),
        number(major, 8), number(minor, 8), prefix.ljust(155, b"\0"), pad.ljust(12, b"\0"),
    ]  # fmt: skip
    block = b"".join(fields)
    assert len(block) == BLOCK, len(block)
    if checksum is None:
        checksum = b"%06o\0 " % sum(block)
    return block[:148] + checksum + block[156:]


def member(name: bytes, data: bytes = b"", kind: bytes = b"0", **fields: object) -> bytes:
    """Return a header with its data."""
    fields.setdefault("size", len(data))
    return head(name, kind, **fields) + padded(data)  # type: ignore[arg-type]  # checked by head()


def directory(name: bytes, **fields: object) -> bytes:
    fields.setdefault("mode", 0o755)
    return member(name, b"", b"5", **fields)


def symlink(name: bytes, target: bytes, **fields: object) -> bytes:
    return member(name, b"", b"2", link=target, mode=0o777, **fields)


def hardlink(name: bytes, target: bytes, **fields: object) -> bytes:
    return member(name, b"", b"1", link=target, **fields)


def record(key: bytes, value: bytes) -> bytes:
    """Return one PAX record with its length."""
    for digits in range(1, 9):
        total = len(key) + len(value) + 3 + digits
        if len(str(total)) == digits:
            return b"%d %s=%s\n" % (total, key, value)
    raise AssertionError("no length fits")


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x", **fields: object) -> bytes:
    return member(b"PaxHeaders/x", b"".join(record(k, v) for k, v in records), kind, **fields)


def raw_pax(body: bytes, kind: bytes = b"x") -> bytes:
    return member(b"PaxHeaders/x", body, kind)


def long_name(name: bytes, kind: bytes = b"L") -> bytes:
    return member(b"././@LongLink", name + b"\0", kind, magic=b"ustar  \0")


def tar(*members: bytes) -> bytes:
    """Return an archive of members, with its end."""
    return b"".join(members) + END
