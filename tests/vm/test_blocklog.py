"""The reader of write logs, on logs made by hand: no machine is booted."""

import os
import struct
from pathlib import Path

import pytest

from tests.vm.blocklog import DISCARD, FLUSH, FUA, MAGIC, BlockLog, LogError

SECTORS = 64


def log_of(path: Path, *requests: tuple[int, bytes, int]) -> BlockLog:
    """Write a log of (sector, data, flags); the count in the superblock is as stale as a killed QEMU leaves it."""
    data = struct.pack("<QQQI", MAGIC, 1, 0, 512).ljust(512, b"\0")
    for sector, content, flags in requests:
        data += struct.pack("<QQQQ", sector, len(content) // 512, flags, 0).ljust(512, b"\0")
        data += b"" if flags & DISCARD else content
    path.write_bytes(data)
    return BlockLog(str(path))


def disk_after(log: BlockLog, path: Path, position: int, seed: int) -> bytes:
    path.write_bytes(bytes(SECTORS * 512))
    disk = os.open(path, os.O_RDWR)
    log.apply(disk, log.entries[: log.settled(position)])
    log.apply_tail(disk, position, seed)
    os.close(disk)
    return path.read_bytes()


A, B, C = (letter * 512 for letter in (b"a", b"b", b"c"))


def test_what_was_flushed_is_there_whatever_the_seed(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A, 0), (0, b"", FLUSH), (1, B, 0))
    for seed in range(20):
        assert disk_after(log, tmp_path / "disk", 3, seed)[:512] == A


def test_what_was_not_flushed_is_there_or_not(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A, 0), (0, b"", FLUSH), (1, B, 0), (2, C, 0))
    seen = {disk_after(log, tmp_path / "disk", 4, seed)[512:1536] for seed in range(40)}
    assert seen == {bytes(1024), B + C, B + bytes(512), bytes(512) + C}


def test_a_write_after_the_cut_is_never_there(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A, 0), (0, B, 0))
    assert {disk_after(log, tmp_path / "disk", 1, seed)[:512] for seed in range(20)} == {A, bytes(512)}


def test_a_forced_write_is_there_without_a_flush(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A, FUA), (1, B, 0))
    assert disk_after(log, tmp_path / "disk", 2, 0)[:1024] == A + bytes(512)


def test_a_long_write_is_torn_between_sectors_only(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A * 8, 0))
    seen = {disk_after(log, tmp_path / "disk", 1, seed)[:4096] for seed in range(200)}
    assert seen == {A * count + bytes(512 * (8 - count)) for count in range(9)}


def test_a_flushed_discard_reads_as_zeros(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A * 4, 0), (1, B * 2, DISCARD), (0, b"", FLUSH))
    assert disk_after(log, tmp_path / "disk", 3, 0)[:2048] == A + bytes(1024) + A


def test_a_log_that_ends_in_the_middle_of_a_write_ends_before_it(tmp_path: Path) -> None:
    log_of(tmp_path / "log", (0, A, 0), (1, B * 4, 0)).close()
    whole = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(whole[:-1])
    assert len(BlockLog(str(tmp_path / "log")).entries) == 1


def test_barriers_are_the_places_after_flushes_and_forced_writes(tmp_path: Path) -> None:
    log = log_of(tmp_path / "log", (0, A, 0), (0, b"", FLUSH), (1, B, FUA), (2, C, 0))
    assert log.barriers() == [2, 3]


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes(1024))
    with pytest.raises(LogError):
        BlockLog(str(tmp_path / "log"))
