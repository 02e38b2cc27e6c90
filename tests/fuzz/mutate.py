"""Mutations of archives: of bytes, of blocks, and of header fields with the checksum made right again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from tests.unpriv.tarbytes import BLOCK, base256, pax

# Offset and length of each field of a header (tar(5)).
FIELDS: Final = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "gid": (116, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "typeflag": (156, 1),
    "linkname": (157, 100),
    "magic": (257, 8),
    "uname": (265, 32),
    "devmajor": (329, 8),
    "devminor": (337, 8),
    "prefix": (345, 155),
    "pad": (500, 12),
}
TEXTS: Final = (
    b"",
    b".",
    b"..",
    b"/",
    b"./",
    b"../x",
    b"a/../b",
    b"a//b",
    b"a/./b",
    b"d/f/",
    b".wh.x",
    b".wh.",
    b".wh..",
    b".wh...",
    b"d/.wh..wh..opq",
    b".wh..wh.plnk",
    b"l/x",
    b"f",
    b"d",
    b"l",
    b"h",
    b"\xff\xfe",
    b"e\xcc\x81",
    b"a\0b",
    b"n" * 100,
    b"\n",
)
NUMBERS: Final = (0, 1, 511, 512, 513, 1024, 0o777, 0o7777, 0o100644, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 33, 1 << 62)
TYPES: Final = b"0\x001234567xgLKSMVNXDAIZ\n\x80"
KEYS: Final = (
    b"path",
    b"linkpath",
    b"size",
    b"uid",
    b"gid",
    b"mtime",
    b"atime",
    b"comment",
    b"hdrcharset",
    b"uname",
    b"charset",
    b"SCHILY.xattr.user.a",
    b"SCHILY.xattr.security.capability",
    b"SCHILY.xattr.trusted.x",
    b"LIBARCHIVE.xattr.user.a",
    b"SCHILY.devmajor",
    b"GNU.sparse.major",
    b"GNU.sparse.name",
    b"SCHILY.realsize",
    b"SCHILY.acl.access",
    b"V.x",
)


def with_checksum(block: bytes) -> bytes:
    return block[:148] + b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256) + block[156:]


def _number(chance: random.Random, width: int) -> bytes:
    value = chance.choice(NUMBERS) + chance.choice((-1, 0, 0, 1))
    forms: list[Callable[[], bytes]] = [
        lambda: b"%0*o" % (width - 1, max(value, 0)) + b"\0",
        lambda: base256(value, width),
        lambda: base256(-value, width),
        lambda: (b"%*o " % (width - 1, max(value, 0)))[:width],
        lambda: (b"-%o" % max(value, 0)).rjust(width - 1, b"0"),
        lambda: bytes(width),
        lambda: chance.randbytes(width),
    ]
    return chance.choice(forms)()[:width].ljust(width, b"\0")


def _field(chance: random.Random, block: bytes) -> bytes:
    name = chance.choice(list(FIELDS))
    offset, length = FIELDS[name]
    if name == "typeflag":
        value = bytes([chance.choice(TYPES)])
    elif name == "magic":
        value = chance.choice((b"ustar\x0000", b"ustar  \0", bytes(8), b"ustar\0  ", chance.randbytes(8)))
    elif name in ("name", "linkname", "prefix", "uname"):
        value = chance.choice(TEXTS)
    elif name == "pad":
        value = chance.choice((bytes(12), b"\0" * 8 + b"tar\0"))
    else:
        value = _number(chance, length)
    return with_checksum(block[:offset] + value[:length].ljust(length, b"\0") + block[offset + length :])


def _value(chance: random.Random) -> bytes:
    return chance.choice(
        (*TEXTS, b"%d" % chance.choice(NUMBERS), b"-1", b"1.5", b"1e3", b"x" * 300, chance.randbytes(20))
    )


def _records(chance: random.Random) -> bytes:
    return pax(
        *((chance.choice(KEYS), _value(chance)) for _ in range(chance.randrange(1, 4))),
        kind=chance.choice((b"x", b"x", b"g")),
    )


def mutate(chance: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Return an archive with one to six things changed."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)] or [bytes(BLOCK)]
    for _ in range(chance.randrange(1, 7)):
        at = chance.randrange(len(blocks))
        headers = [n for n, block in enumerate(blocks) if block[257:262] == b"ustar"]
        action = chance.randrange(12)
        if action <= 4 and headers:
            at = chance.choice(headers)
            blocks[at] = _field(chance, blocks[at])
        elif action == 5:
            bad = bytearray(blocks[at])
            bad[chance.randrange(len(bad))] ^= 1 << chance.randrange(8)
            blocks[at] = bytes(bad)
        elif action == 6:
            del blocks[at : at + chance.randrange(1, 4)]
            blocks = blocks or [bytes(BLOCK)]
        elif action == 7:
            blocks.insert(at, blocks[chance.randrange(len(blocks))])
        elif action == 8:
            blocks.insert(at, chance.choice((bytes(BLOCK), chance.randbytes(BLOCK))))
        elif action == 9 and headers:
            records = _records(chance)
            blocks[chance.choice(headers) : 0] = []
            place = chance.choice(headers)
            blocks[place:place] = [records[n : n + BLOCK] for n in range(0, len(records), BLOCK)]
        elif action == 10:
            other = chance.choice(others)
            blocks[at:at] = [other[n : n + BLOCK] for n in range(0, min(len(other), 8 * BLOCK), BLOCK)]
        else:
            length = chance.randrange(len(blocks) * BLOCK)
            joined = b"".join(blocks)[:length]
            blocks = [joined[n : n + BLOCK] for n in range(0, len(joined), BLOCK)] or [bytes(BLOCK)]
    return b"".join(blocks)
