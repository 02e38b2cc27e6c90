"""What lies on disk: resumption, publication, locks, room."""

import errno
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest
from awscrt.checksums import crc32c

from broker.protocol import Pin
from unpriv import blobfile
from unpriv.blobfile import BlobDir, Partial
from unpriv.failures import FetchError

CELL: Final = 1000
DATA: Final = bytes(range(250)) * 10
DIGEST: Final = f"sha256:{sha256(DATA).hexdigest()}"
PIN: Final = Pin(bucket="b", key="k", size=len(DATA), etag='"1"')
NAME: Final = blobfile.identity(PIN, "http://x")


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[BlobDir]:
    opened = BlobDir.open(str(tmp_path / "blobs"))
    yield opened
    os.close(opened.partial_fd)
    os.close(opened.sha256_fd)


def lock(blobs: BlobDir, pin: Pin = PIN) -> Partial:
    cell_bytes = CELL if pin is PIN else 8 << 20
    held = blobs.try_lock(pin, blobfile.identity(pin, "http://x"), cell_bytes)
    assert isinstance(held, Partial)
    return held


def fill(partial: Partial, *cells: int) -> None:
    for cell in cells:
        start, end = partial.grid.bounds(cell)
        partial.write(DATA[start:end], start)
        partial.complete(cell, crc32c(DATA[start:end]))


def test_resume_knows_what_was_complete(blobs: BlobDir) -> None:
    first = lock(blobs)
    assert first.resume() == {}
    fill(first, 0, 2)
    first.write(b"half", 1000)
    first.close()
    second = lock(blobs)
    claimed = second.resume()
    assert set(claimed) == {0, 2}
    assert all(second.crc_of(cell) == crc for cell, crc in claimed.items())
    second.close()


@pytest.mark.parametrize("harm", ["flip", "shorten", "lengthen", "no data", "map of another cell size", "torn map"])
def test_harm_to_the_files_is_noticed(harm: str, blobs: BlobDir, tmp_path: Path) -> None:
    first = lock(blobs)
    first.resume()
    fill(first, 0, 1, 2)
    first.close()
    data, table = tmp_path / f"blobs/partial/{NAME}.data", tmp_path / f"blobs/partial/{NAME}.map"
    if harm == "flip":
        data.write_bytes(bytes([DATA[0] ^ 1]) + DATA[1:])
    elif harm == "shorten":
        os.truncate(data, 1500)
    elif harm == "lengthen":
        data.write_bytes(DATA + b"more")
    elif harm == "no data":
        data.unlink()
    elif harm == "torn map":
        os.truncate(table, blobfile.HEADER.size + 11)
    cell_bytes = 500 if harm == "map of another cell size" else CELL
    second = blobs.try_lock(PIN, NAME, cell_bytes)
    assert isinstance(second, Partial)
    believed = {cell for cell, crc in second.resume().items() if second.crc_of(cell) == crc}
    expected: set[int] = {"flip": {1, 2}, "shorten": {0}, "lengthen": {0, 1, 2}, "torn map": {0}}.get(harm, set())
    assert believed == expected
    assert data.stat().st_size == len(DATA)
    second.close()


def test_publish_gives_the_name_last(blobs: BlobDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = lock(blobs)
    partial.resume()
    fill(partial, 0, 1, 2)
    calls: list[str] = []
    for name in ("fsync", "rename", "unlink"):
        real = getattr(os, name)

        def record(*args: object, name: str = name, real: object = real, **kwargs: object) -> None:
            which = {partial.data_fd: "data", blobs.sha256_fd: "sha256", blobs.partial_fd: "partial"}
            calls.append(f"fsync {which[args[0]]}" if name == "fsync" else name)  # type: ignore[index]
            real(*args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(os, name, record)
    partial.publish(DIGEST)
    partial.close()
    assert calls == ["fsync data", "rename", "fsync sha256", "unlink", "fsync partial"]
    blob = tmp_path / "blobs/sha256" / DIGEST[7:]
    assert blob.read_bytes() == DATA
    assert blob.stat().st_mode & 0o777 == 0o600
    assert blobs.published(DIGEST, len(DATA)) and not blobs.published(DIGEST, 1)


def test_lock_is_one_owners_and_tells_the_other_the_end(blobs: BlobDir) -> None:
    first = lock(blobs)
    first.resume()
    busy_fd = blobs.try_lock(PIN, NAME, CELL)
    assert isinstance(busy_fd, int)
    assert blobfile.outcome(busy_fd) is None
    fill(first, 0, 1, 2)
    first.publish(DIGEST)
    first.close()
    assert blobfile.outcome(busy_fd) == DIGEST
    os.close(busy_fd)
    second = lock(blobs)  # a new file under the old name
    assert blobfile.outcome(second.map_fd) is None
    second.drop()
    second.close()


def test_crash_between_the_steps_of_publish(blobs: BlobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blob has its name, its map is still there: the next one finds it by the map."""
    first = lock(blobs)
    first.resume()
    fill(first, 0, 1, 2)
    monkeypatch.setattr(os, "unlink", lambda *_, **__: None)
    first.publish(DIGEST)
    first.close()
    second = lock(blobs)
    assert blobfile.outcome(second.map_fd) == DIGEST
    assert blobs.published(DIGEST, len(DATA))
    second.close()


@pytest.mark.parametrize("size_bytes", [1 << 43, 1 << 50])  # as large as a file can be, and larger
def test_no_room_is_known_before_the_first_byte(size_bytes: int, blobs: BlobDir) -> None:
    partial = lock(blobs, Pin(bucket="b", key="huge", size=size_bytes, etag='"1"'))
    with pytest.raises(FetchError) as caught:
        partial.resume()
    assert caught.value.code in ("no_space", "too_large")
    partial.drop()
    partial.close()


def test_room_counts_what_others_will_write(blobs: BlobDir, tmp_path: Path) -> None:
    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    one, other = (Pin(bucket="b", key=key, size=free_bytes * 2 // 3, etag='"1"') for key in ("one", "other"))
    held = lock(blobs, other)
    held.resume()
    partial = lock(blobs, one)
    with pytest.raises(FetchError, match=f"and others {other.size}"):
        partial.resume()
    held.close()  # as if its process had died: it will write nothing more
    partial.resume()
    partial.close()


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "no_space"), (errno.EDQUOT, "no_space"), (errno.EFBIG, "too_large"), (errno.EIO, "io_error")],
)
def test_errors_of_the_disk(number: int, code: str, blobs: BlobDir, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = lock(blobs)

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(FetchError) as caught:
        partial.write(b"x", 0)
    assert caught.value.code == code
    monkeypatch.undo()
    partial.close()


def test_no_write_beyond_the_pinned_size(blobs: BlobDir) -> None:
    partial = lock(blobs)
    with pytest.raises(FetchError) as caught:
        partial.write(b"xx", len(DATA) - 1)
    assert caught.value.code == "too_large"
    partial.close()


def test_symlink_in_the_partial_folder_is_not_followed(blobs: BlobDir, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("victim")
    for ending in ("map", "data"):
        (tmp_path / f"blobs/partial/{NAME}.{ending}").symlink_to(victim)
        with pytest.raises(FetchError) as caught:
            blobs.try_lock(PIN, NAME, CELL)
        assert caught.value.code == "io_error"
        (tmp_path / f"blobs/partial/{NAME}.{ending}").unlink()
    assert victim.read_text() == "victim"


def test_identity_depends_on_all_of_the_pin_and_the_endpoint() -> None:
    pins = [PIN, *(PIN.model_copy(update=change) for change in (
        {"bucket": "c"}, {"key": "j"}, {"size": 1}, {"etag": '"2"'}, {"version": "v"},
    ))]  # fmt: skip
    names = {blobfile.identity(pin, url) for pin in pins for url in ("http://x", "http://y")}
    assert len(names) == 12
