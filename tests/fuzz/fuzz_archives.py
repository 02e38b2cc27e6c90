"""Invariants tested, for any bytes:

1. the check ends with a manifest or with a refusal by a described rule, never with another error;
2. the same bytes give the same answer, whatever the size of the chunks in which they are read;
3. a manifest that comes out is one that the root side's own parser takes, and its tree can be printed;
4. a third reader, Python's tarfile, sees the members of an accepted archive as we do;
5. no more comes out of a compressed blob than its limit says.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import tarfile
from functools import cache
from pathlib import Path
from typing import Any, Final

import zstandard

from privhelper import manifest as root_manifest
from tests.fuzz.mutate import mutate
from tests.unpriv.checking import LIMITS, tightened
from tests.unpriv.tarbytes import directory, hardlink, long_name, member, pax, symlink, tar
from unpriv import pipeline, rulebook
from unpriv.blob import Blob, MemoryBlob
from unpriv.findings import Findings
from unpriv.hashing import Hasher

CORPUS: Final = Path(__file__).resolve().parent.parent / "hostile" / "corpus"
BASE: Final = tar(
    directory(b"d"),
    member(b"d/f", b"1"),
    directory(b"d/s"),
    member(b"d/s/x", b"2"),
    symlink(b"l", b"d"),
    member(b"f", b"3" * 600),
    hardlink(b"h", b"f"),
)
UPPER: Final = tar(
    member(b"d/.wh.f"),
    directory(b"d", mode=0o700),
    member(b"d/s/.wh..wh..opq"),
    member(b"d/s/y", b"4"),
    hardlink(b"n", b"f"),
    pax((b"path", "d/é".encode()), (b"mtime", b"1700000000.5"), (b"SCHILY.xattr.user.a", b"1")),
    member(b"x", b"5"),
    long_name(b"d/" + b"n" * 120),
    member(b"n" * 100, b"6"),
    symlink(b"h", b"/etc"),
    symlink(b"new", b"../.."),
)
SMALL_CHUNKS: Final = (512, 1024, 4096, 512 * 7)
TIGHT: Final = tightened(stream={"ratio": 20, "ratio_floor_bytes": 1 << 16}, report={"violations": 20})
# Differences that are tarfile's own: it does not check what we refuse, so only what we accept is compared.
NAMES_IT_CHANGES: Final = (b"\\",)


@cache
def seeds() -> list[bytes]:
    """Return the archives to begin with: the corpus's small plain ones, and two honest layers."""
    found = [path.read_bytes() for path in sorted(CORPUS.rglob("*.tar")) if path.stat().st_size <= 40_000]
    return [BASE, UPPER, *found]


@cache
def hasher(chunk_bytes: int) -> Hasher:
    made = Hasher(chunk_bytes)
    made.start()
    return made


def checked(
    media: str, data: bytes, lowers: list[bytes], chunk_bytes: int, all_violations: bool
) -> tuple[dict[str, Any], bytes, bytes]:
    """Check one blob; return report, manifest and payload."""
    files = [os.memfd_create("fuzz") for _ in range(4)]
    try:
        manifest, tree, scratch, payload = files
        findings = Findings(TIGHT, 1, all_violations)
        blobs: list[Blob] = [MemoryBlob(lower) for lower in lowers]
        outputs = pipeline.Outputs(payload, manifest, tree, scratch)
        report = pipeline.verdict(media, MemoryBlob(data), blobs, TIGHT, findings, hasher(chunk_bytes), outputs)
        return report, os.pread(manifest, 1 << 24, 0), os.pread(payload, 1 << 24, 0)
    finally:
        for descriptor in files:
            os.close(descriptor)


def judge(chance: random.Random, media: str, data: bytes, lowers: list[bytes]) -> tuple[str, bytes]:
    """Check one blob twice and hold all invariants against it."""
    try:
        first = checked(media, data, lowers, 1 << 20, False)
        second = checked(media, data, lowers, chance.choice(SMALL_CHUNKS), False)
        if media == "tar":
            assert first[:2] == second[:2], "the answer depends on the chunks"
        # Where both the compression and the tar are broken, the size of the chunks says which is met first.
        assert (first[0]["type"], first[1]) == (second[0]["type"], second[1]), "the verdict depends on the chunks"
        report, manifest, payload = first
        thorough = checked(media, data, lowers, 1 << 20, True)[0]
        assert thorough["type"] == report["type"], "listing all violations changes the verdict"
        if report["type"] == "rejected":
            assert not manifest
            for violation in (*report["violations"], *thorough["violations"]):
                assert rulebook.load()[violation["rule"]].words["kind"] == "refuse"
            return str(report["violations"][0]["rule"]), data
        assert len(payload) <= max(TIGHT.stream.ratio_floor_bytes, TIGHT.stream.ratio * len(data))
        expect_root_to_agree(manifest)
        _expect_tarfile_to_agree(payload, report)
    except BaseException:
        Path("fuzz-failure.bin").write_bytes(data)
        raise
    return "accepted", data


def expect_root_to_agree(manifest: bytes) -> None:
    head, *lines = manifest.splitlines(keepends=True)
    assert b'"format":"imgpull.layer/1"' in head
    for number, line in enumerate(lines, 1):
        try:
            root_manifest.parse(line.rstrip(b"\n"), number)
        except root_manifest.RejectedError as error:
            # Root maps ids into a user namespace and so holds fewer of them than the format.
            assert b'"uid":' in line and "id" in str(error), (line, error)


def _expect_tarfile_to_agree(payload: bytes, report: dict[str, Any]) -> None:
    try:
        with tarfile.open(fileobj=io.BytesIO(payload), mode="r:", errors="surrogateescape") as third:
            members = third.getmembers()
    except tarfile.ReadError as error:
        # It does not read what `git archive` writes of an empty tree: a global comment, and then the end.
        assert (str(error), "comment_dropped" in report["dropped"]) == ("end of file header", True), error
        return
    assert len(members) == report["entries"], "tarfile sees other members"
    files = [m for m in members if m.isreg()]
    assert sum(m.size for m in files) >= report["content_bytes"]
    for one in members:
        assert ".." not in one.name.split("/"), one.name


def one_round(chance: random.Random) -> tuple[str, bytes]:
    """Check one mutated archive as the first layer."""
    return judge(chance, "tar", mutate(chance, chance.choice(seeds()), seeds()), [])


@cache
def _base_manifest() -> bytes:
    report, manifest, _ = checked("tar", BASE, [], 1 << 20, False)
    assert report["type"] == "accepted"
    return manifest


def one_stacked_round(chance: random.Random) -> tuple[str, bytes]:
    """Check one mutated archive on top of an honest layer."""
    seed = UPPER if chance.random() < 0.7 else chance.choice(seeds())
    return judge(chance, "tar", mutate(chance, seed, seeds()), [_base_manifest()])


def one_compressed_round(chance: random.Random) -> tuple[str, bytes]:
    """Check one mutated compressed blob: its bytes, or what is in it."""
    media = chance.choice(("tar+gzip", "tar+zstd"))
    data = chance.choice(seeds())
    if chance.random() < 0.3:
        data = mutate(chance, data, seeds())
    if chance.random() < 0.2:
        data += bytes(chance.randrange(1 << 21))
    cut = chance.randrange(len(data) + 1) if chance.random() < 0.3 else 0
    blob = bytearray(b"".join(_compress(media, piece) for piece in (data[:cut], data[cut:])))
    for _ in range(chance.choice((0, 0, 1, 2, 5))):
        position = chance.randrange(min(len(blob), 40) if chance.random() < 0.5 else len(blob))
        blob[position] = chance.randrange(256)
    if chance.random() < 0.1:
        del blob[chance.randrange(len(blob)) :]
    return judge(chance, media, bytes(blob), [])


def _compress(media: str, data: bytes) -> bytes:
    if media == "tar+gzip":
        return gzip.compress(data, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


assert LIMITS.stream.ratio > TIGHT.stream.ratio
