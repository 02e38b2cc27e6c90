"""Compressed blobs: the declared compression, one level, to the last byte, within its limits."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import zstandard

from tests.unpriv.checking import LIMITS, Result, check, tightened
from tests.unpriv.tarbytes import member, tar
from unpriv.blob import MemoryBlob
from unpriv.decompress import open_source
from unpriv.rulebook import RejectedError

NOISE = os.urandom(200_000)
TAR = tar(member(b"ok", b"ok\n"), member(b"noise", NOISE), member(b"zeros", bytes(3_000_000)))
ALL_FILTERS = tightened(stream={"filters": ["none", "gzip", "zstd", "bzip2", "xz"]})


def zstd(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(data)


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A5A, len(data)) + data


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar+gzip": gzip.compress,
    "tar+zstd": zstd,
    "tar+bzip2": bz2.compress,
    "tar+xz": lzma.compress,
}


def checked(media: str, data: bytes, **options: Any) -> Result:
    return check((media, data), limits=options.pop("limits", ALL_FILTERS), **options)


@pytest.mark.parametrize("media", COMPRESS)
def test_the_payload_is_the_tar(media: str) -> None:
    result = checked(media, COMPRESS[media](TAR), want_payload=True)
    assert result.accepted, result.report
    assert result.payload == TAR
    assert result.report["payload_bytes"] == len(TAR)
    assert result.manifest == check(TAR).manifest  # the layer's id does not depend on the compression


@pytest.mark.parametrize("media", COMPRESS)
@pytest.mark.parametrize("cuts", [(1,), (700,), (512, 513, 514), (0,), (len(TAR),)])
def test_many_members_are_one_stream(media: str, cuts: tuple[int, ...]) -> None:
    """pigz, eStargz, pzstd, zstd:chunked and pbzip2 write them; members may be empty and end anywhere."""
    edges = [0, *cuts, len(TAR)]
    pieces = [TAR[a:b] for a, b in pairwise(edges)]
    result = checked(media, b"".join(COMPRESS[media](piece) for piece in pieces), want_payload=True)
    assert result.accepted, result.report
    assert result.payload == TAR


@pytest.mark.parametrize("media", COMPRESS)
def test_bytes_behind_the_last_member(media: str) -> None:
    good = COMPRESS[media](TAR)
    for tail in (b"GARBAGE", b"x", bytes(512), TAR, b"PK\x03\x04" + bytes(30)):
        if media == "tar+xz" and not any(tail):
            continue  # zeros in groups of four belong to the format
        result = checked(media, good + tail)
        assert result.rule == "compression_trailing_data", (tail[:8], result.report)


@pytest.mark.parametrize("media", COMPRESS)
def test_cut_anywhere(media: str) -> None:
    good = COMPRESS[media](TAR)
    for keep in (*range(1, 30), len(good) // 2, *range(len(good) - 12, len(good))):
        result = checked(media, good[:keep])
        assert result.rule in ("compression_truncated", "compression_wrong"), (keep, result.report)
    assert checked(media, b"").rule in ("compression_truncated", "compression_wrong")


@pytest.mark.parametrize("media", COMPRESS)
def test_any_flipped_bit_is_noticed(media: str) -> None:
    """In the data by the checksum; in a header it may be harmless (a time, a name), and then the tar is the same."""
    good = COMPRESS[media](tar(member(b"ok", NOISE[:2000])))
    for position in range(0, len(good), 7):
        bad = bytearray(good)
        bad[position] ^= 0x10
        result = checked(media, bytes(bad), want_payload=True)
        if result.accepted:
            assert result.payload == tar(member(b"ok", NOISE[:2000])), position


def test_gzip_checksum_and_length() -> None:
    good = gzip.compress(TAR)
    for position, name in ((-8, "CRC"), (-4, "length")):
        bad = bytearray(good)
        bad[position] ^= 1
        assert checked("tar+gzip", bytes(bad)).rule == "compression_checksum", name


def gzip_member(flags: int, extra: bytes, data: bytes = TAR) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    body = deflate.compress(data) + deflate.flush()
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(6)
    return head + extra + body + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)


def header_checksum(flags: int, extra: bytes) -> bytes:
    return struct.pack("<H", zlib.crc32(b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + extra) & 0xFFFF)


def test_gzip_header_fields() -> None:
    extra = struct.pack("<H", 5) + b"SG\1\0x"
    assert checked("tar+gzip", gzip_member(4, extra)).accepted
    assert checked("tar+gzip", gzip_member(8, b"layer.tar\0")).accepted
    assert checked("tar+gzip", gzip_member(24, b"layer.tar\0a comment\0")).accepted
    everything = extra + b"name\0comment\0"
    assert checked("tar+gzip", gzip_member(30, everything + header_checksum(30, everything))).accepted
    assert checked("tar+gzip", gzip_member(30, everything + b"\0\0")).rule == "compression_header"
    assert checked("tar+gzip", gzip_member(0x20, b"")).rule == "compression_header"
    assert checked("tar+gzip", b"\x1f\x8b\x07" + gzip_member(0, b"")[3:]).rule == "compression_header"


def test_gzip_name_without_end() -> None:
    """2.5 kB of nested gzip make libarchive 3.6.2 buffer such a name: 1 GiB before the first entry."""
    assert checked("tar+gzip", gzip_member(8, b"n" * 200_000)).rule == "compression_header"
    assert checked("tar+gzip", gzip_member(8, b"n" * 200_000)[:100_000]).rule == "compression_truncated"
    assert checked("tar+gzip", gzip_member(8, b"n" * 100_000 + b"\0")).accepted


@pytest.mark.parametrize("outer", COMPRESS)
@pytest.mark.parametrize("inner", COMPRESS)
def test_compressed_twice(outer: str, inner: str) -> None:
    assert checked(outer, COMPRESS[outer](COMPRESS[inner](TAR))).rule == "compression_nested"


@pytest.mark.parametrize("declared", ["tar", *COMPRESS])
@pytest.mark.parametrize("actual", ["tar", *COMPRESS])
def test_declared_otherwise(declared: str, actual: str) -> None:
    if declared == actual:
        return
    data = TAR if actual == "tar" else COMPRESS[actual](TAR)
    expected = "compression_undeclared" if declared == "tar" else "compression_wrong"
    assert checked(declared, data).rule == expected


@pytest.mark.parametrize("media", ["tar+bzip2", "tar+xz"])
def test_bzip2_and_xz_only_where_the_policy_names_them(media: str) -> None:
    assert check((media, COMPRESS[media](TAR)), limits=LIMITS).rule == "compression_not_allowed"


def test_compressions_may_be_taken_away() -> None:
    limits = tightened(stream={"filters": ["none"]})
    assert checked("tar+gzip", gzip.compress(TAR), limits=limits).rule == "compression_not_allowed"


def test_zstd_skippable_frames_anywhere() -> None:
    """zstd:chunked puts its table of contents into them; it is never read."""
    frame = zstd(TAR)
    for data in (skippable(b"toc") + frame, frame + skippable(b""), frame + skippable(os.urandom(100_000))):
        assert checked("tar+zstd", data).accepted
    assert checked("tar+zstd", skippable(b"only")).rule == "archive_empty"
    assert checked("tar+zstd", frame + skippable(b"toc")[:-1]).rule == "compression_truncated"


def test_zstd_forms() -> None:
    for options in ({"level": 1}, {"level": 19}, {"write_content_size": False}, {"threads": 2}):
        assert checked("tar+zstd", zstd(TAR, **options)).accepted, options
    streamed = zstandard.ZstdCompressor(level=3).compressobj()
    assert checked("tar+zstd", streamed.compress(TAR) + streamed.flush()).accepted


def test_zstd_header() -> None:
    frame = zstd(TAR)
    assert checked("tar+zstd", frame[:4] + bytes([frame[4] | 8]) + frame[5:]).rule == "compression_header"
    dictionary = zstandard.train_dictionary(8192, [os.urandom(64) + b"common" * 40 for _ in range(400)])
    needs_one = zstandard.ZstdCompressor(dict_data=dictionary).compress(TAR)
    assert checked("tar+zstd", needs_one).rule == "compression_header"
    reserved_block = zstd(b"x" * 10)[:4] + bytes([0x00, 0x58]) + struct.pack("<I", 7 | 10 << 3)[:3] + bytes(10)
    assert checked("tar+zstd", reserved_block).rule == "compression_corrupt"


@pytest.mark.parametrize(("window_log", "accepted"), [(20, True), (25, True), (26, False), (31, False)])
def test_zstd_window(window_log: int, accepted: bool) -> None:
    stream = zstandard.ZstdCompressor(level=3).compressobj()  # of unknown size: the header has a window
    frame = bytearray(stream.compress(TAR) + stream.flush())
    frame[5] = window_log - 10 << 3  # the window descriptor; what is claimed counts, not what is used
    result = checked("tar+zstd", bytes(frame))
    assert result.accepted if accepted else result.rule == "compression_window", result.report


def test_xz_dictionary() -> None:
    """A claim of 4 GiB is refused before it is allocated."""
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 64 << 20}]
    assert checked("tar+xz", lzma.compress(TAR, filters=filters)).rule == "compression_window"


def test_xz_padding() -> None:
    assert checked("tar+xz", lzma.compress(TAR) + bytes(8)).accepted
    assert checked("tar+xz", lzma.compress(TAR) + bytes(6)).rule == "compression_trailing_data"


@pytest.mark.parametrize("media", COMPRESS)
def test_bomb_is_stopped_before_it_is_written(media: str) -> None:
    """The blob's size is known, so the ratio says how large the tar may become before a byte of it comes out."""
    limits = tightened(stream={"filters": [*ALL_FILTERS.stream.filters], "ratio": 10, "ratio_floor_bytes": 1 << 20})
    bomb = COMPRESS[media](tar(member(b"zeros", bytes(40 << 20))))
    result = checked(media, bomb, limits=limits, want_payload=True)
    assert result.rule == "ratio_too_high"
    assert len(result.payload) <= max(1 << 20, 10 * len(bomb))
    assert checked(
        media, bomb, limits=tightened(stream={"filters": ALL_FILTERS.stream.filters, "ratio": 65_536})
    ).accepted


@pytest.mark.parametrize("media", COMPRESS)
def test_many_empty_members(media: str) -> None:
    limits = tightened(stream={"filters": ALL_FILTERS.stream.filters, "compressed_members": 50})
    data = COMPRESS[media](b"") * 60 + COMPRESS[media](TAR)
    assert checked(media, data, limits=limits).rule == "compression_members_too_many"


@pytest.mark.parametrize("media", COMPRESS)
def test_no_more_than_the_buffer_holds_is_ever_asked_for(media: str) -> None:
    """A source fills what it is given, whatever its size, and nothing more."""
    source = open_source(media, MemoryBlob(COMPRESS[media](TAR)), ALL_FILTERS, lambda: None)
    out = b""
    for size in (1, 511, 65_537, 1 << 20, 1 << 22, 1 << 22):
        buffer = bytearray(size)
        count = source.readinto(memoryview(buffer))
        assert count == size or len(out) + count == len(TAR)
        out += buffer[:count]
    assert out == TAR
    assert source.readinto(memoryview(bytearray(10))) == 0


def test_clocks_are_compared_while_empty_members_are_skipped() -> None:
    ticks = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) > 20:
            raise RejectedError("wall_clock_exceeded", "too slow")

    with pytest.raises(RejectedError):
        open_source("tar+gzip", MemoryBlob(gzip.compress(b"") * 100), LIMITS, tick).readinto(memoryview(bytearray(9)))
