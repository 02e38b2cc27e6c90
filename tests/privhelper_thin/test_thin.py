"""What thin.py and thin_pool.py decide without a kernel: states, sizes, tables, metadata; the rest is in tests/vm."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from privhelper.stores import thin, thin_pool
from privhelper.stores.base import StoreError

MIB = 1 << 20
SETTINGS: Mapping[str, Any] = {"name": "imgpull", "base_bytes": 10 << 30, "wait_s": 1}


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("7 40/256 9/2048 - rw discard_passdown error_if_no_space - 64 ", "ready"),
        ("7 40/256 9/2048 - out_of_data_space discard_passdown error_if_no_space - 64 ", "out_of_data"),
        ("7 256/256 9/2048 - ro discard_passdown error_if_no_space - 64 ", "read_only"),
        ("7 40/256 9/2048 - ro discard_passdown error_if_no_space needs_check 64 ", "needs_check"),
        ("7 40/256 9/2048 - rw discard_passdown error_if_no_space needs_check 64 ", "needs_check"),
        ("7 40/256 9/2048 - something_new discard_passdown error_if_no_space - 64 ", "failed"),
        ("Fail", "failed"),
        ("Error", "failed"),
        ("", "failed"),
    ],
)
def test_states_are_told_apart_and_each_that_is_not_ready_has_a_way_out(text: str, state: str) -> None:
    status = thin._parse_status(text, MIB, "id")
    assert status.state == state
    assert bool(status.advice) == (state != "ready")


def test_figures_are_bytes() -> None:
    status = thin._parse_status("7 40/256 9/2048 123 rw discard_passdown error_if_no_space - 64", MIB, "id")
    assert (status.data_used_bytes, status.data_bytes) == (9 * MIB, 2048 * MIB)
    assert (status.metadata_used_bytes, status.metadata_bytes) == (40 * 4096, MIB)
    assert (status.transaction, status.identity, status.block_bytes) == (7, "id", MIB)


def test_the_table_of_the_brief() -> None:
    linear, pool = thin_pool._targets(MIB, ("7:0", MIB), ("7:1", 2 << 30))
    assert linear == (MIB, "linear", "7:0 0")
    assert pool == (2 << 30, "thin-pool", "7:1 2048 0 1 error_if_no_space")


def test_a_table_never_asks_the_kernel_to_skip_zeroing() -> None:
    _, pool = thin_pool._targets(1 << 16, ("7:0", 64 * MIB), ("7:1", 2 << 30))
    assert "skip_block_zeroing" not in pool.parameters
    assert "error_if_no_space" in pool.parameters


def test_metadata_beyond_what_the_kernel_uses_is_left_out() -> None:
    linear, _ = thin_pool._targets(MIB, ("7:0", 64 << 30), ("7:1", 2 << 30))
    assert linear.length_bytes == 255 * 16320 * 4096


@pytest.mark.parametrize(
    ("block_bytes", "metadata_bytes", "data_bytes", "message"),
    [
        (1 << 16, MIB, 2 << 30, "at least 1331200"),
        (MIB, 331775, 2 << 30, "at least 331776"),
        (MIB, 64 * MIB, MIB - 1, "one block"),
        (4096, 64 * MIB, 2 << 30, "multiple of 65536"),
        (96 << 10, 64 * MIB, 2 << 30, "multiple of 65536"),
        (2 << 30, 64 * MIB, 8 << 30, "multiple of 65536"),
    ],
)
def test_sizes_that_the_kernel_would_take_and_not_get_along_with_are_refused(
    block_bytes: int, metadata_bytes: int, data_bytes: int, message: str
) -> None:
    with pytest.raises(StoreError, match=message) as caught:
        thin_pool._targets(block_bytes, ("7:0", metadata_bytes), ("7:1", data_bytes))
    assert caught.value.code == "refused"


def test_a_size_is_kept_and_never_shrinks(tmp_path: Path) -> None:
    (tmp_path / "thin").mkdir()
    store = thin.ThinStore(SETTINGS, str(tmp_path))
    assert store.size_bytes(1) == 10 << 30
    for size in (20 << 30, 15 << 30):
        store.resize(1, size)
        assert thin.ThinStore(SETTINGS, str(tmp_path)).size_bytes(1) == 20 << 30
    store.resize(1, 30 << 30)
    assert (store.size_bytes(1), store.size_bytes(11)) == (30 << 30, 10 << 30)


def node(block: int, flags: int, keys: list[int], values: list[int]) -> bytes:
    """Return a node of a block tree, as drivers/md/persistent-data/dm-btree-internal.h lays it out."""
    header = struct.pack("<IIQIIII", 0, flags, block, len(keys), 252, 8, 0)
    data = struct.pack(f"<{len(keys)}Q", *keys).ljust(252 * 8, b"\0")
    return (header + data + struct.pack(f"<{len(values)}Q", *values)).ljust(4096, b"\0")


def superblock(root: int, magic: int = 27022010) -> bytes:
    return struct.pack("<32xQ288xQ", magic, root).ljust(4096, b"\0")


INTERNAL, LEAF = 1, 2


def test_device_numbers_are_the_keys_of_all_leaves(tmp_path: Path) -> None:
    path = tmp_path / "metadata"
    leaves = [node(3, LEAF, [0, 1, 5], [0] * 3), node(4, LEAF, [9, 300], [0] * 2)]
    path.write_bytes(bytes(4096) + superblock(2) + node(2, INTERNAL, [0, 9], [3, 4]) + b"".join(leaves))
    assert thin._read_devices(str(path), 1) == {0, 1, 5, 9, 300}


@pytest.mark.parametrize(
    "blocks",
    [
        [superblock(2, magic=1), node(2, LEAF, [1], [0])],
        [superblock(2), node(7, LEAF, [1], [0])],
        [superblock(2), node(2, LEAF, [1], [0]).replace(struct.pack("<II", 1, 252), struct.pack("<II", 253, 252))],
    ],
    ids=["magic", "another block's number", "more entries than fit"],
)
def test_metadata_that_is_not_what_it_should_be_is_refused(tmp_path: Path, blocks: list[bytes]) -> None:
    path = tmp_path / "metadata"
    path.write_bytes(bytes(4096) + b"".join(blocks))
    with pytest.raises(StoreError, match="is not what it should be"):
        thin._read_devices(str(path), 1)


def test_a_host_without_device_mapper_has_an_absent_pool_and_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("privhelper.dm.CONTROL", str(tmp_path / "no-control"))
    status = thin.ThinStore(SETTINGS, str(tmp_path)).status()
    assert status.state == "absent"
    assert "modprobe dm_thin_pool" in status.advice
