"""Invariant tested: any bytes as a lower layer's manifest are replayed or refused by `lower_manifest_invalid`; what is
replayed can be listed, and root's own parser takes it.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from tests.fuzz.fuzz_archives import BASE, UPPER, checked, expect_root_to_agree
from unpriv import listing
from unpriv.blob import MemoryBlob
from unpriv.lower import Lower
from unpriv.rulebook import RejectedError

PIECES = (
    b'"',
    b"\\",
    b"\\u0000",
    b"\\udcff",
    b"\\ud800",
    b'"in":0',
    b'"in":1',
    b'"in":99999',
    b'"name":""',
    b'"name":"d"',
    b'"op":"dir"',
    b'"op":"link"',
    b'"op":"remove"',
    b"{}",
    b"[]",
    b"null",
    b"-1",
    b"1e9",
    b"0",
    b"\n",
    b"{",
    b"}",
    b",",
    b":",
    b"true",
)


@cache
def _manifests() -> tuple[bytes, bytes]:
    base = checked("tar", BASE, [], 1 << 20, False)[1]
    return base, checked("tar", UPPER, [base], 1 << 20, False)[1]


def one_round(chance: random.Random) -> tuple[str, bytes]:
    """Replay two manifests, one of them mutated, and list the tree."""
    layers = list(_manifests())
    which = chance.randrange(2)
    lines = layers[which].splitlines(keepends=True)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(lines))
        action = chance.randrange(4)
        if action == 0:
            lines[at] = lines[chance.randrange(len(lines))]
        elif action == 1:
            del lines[at]
            lines = lines or [b"\n"]
        elif action == 2:
            lines.insert(at, lines[chance.randrange(1, len(lines)) if len(lines) > 1 else 0])
        else:
            cut = chance.randrange(len(lines[at]) + 1)
            end = min(len(lines[at]), cut + chance.randrange(12))
            lines[at] = lines[at][:cut] + chance.choice(PIECES) + lines[at][end:]
    layers[which] = b"".join(lines)
    lower = Lower(with_places=True, tick=lambda: None)
    try:
        for layer in layers:
            lower.add(MemoryBlob(layer))
        for row in listing.rows(lower):
            assert row.endswith("\n")
        for layer in layers:
            expect_root_to_agree(layer)
    except RejectedError as error:
        assert error.rule == "lower_manifest_invalid"
        return error.rule, layers[which]
    except BaseException:
        Path("fuzz-failure.bin").write_bytes(layers[which])
        raise
    return "replayed", layers[which]
