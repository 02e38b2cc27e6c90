"""The files of the blob directory: partial blobs, their maps, and how a blob is published.

Rule 1: a name below ``sha256/`` is complete, synced and has that digest; nothing else ever lies there.
Rule 2: what a crash left is believed only as far as its map's checksums agree with the bytes on disk.
Rule 3: one writer a pin: flock(2) on the map, which dies with its process.
Rule 4: no write goes beyond the pinned size.

``partial/<identity>.data`` holds the bytes in place; ``partial/<identity>.map`` has a header and eight bytes a cell:
whether the cell is complete, and its CRC-32C. No sync is needed while bytes arrive: after a power cut, a cell whose
bytes were lost has the wrong CRC-32C and is fetched again.
"""

import errno
import fcntl
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from awscrt.checksums import crc32c

from broker.protocol import FetchCode, Pin
from unpriv.failures import FetchError
from unpriv.ranges import Grid

HEADER: Final = struct.Struct("<16s32sQQ32s")  # magic, identity, size, cell, digest once published
MAGIC: Final = b"imgpull map v2\n\0"
CELL: Final = struct.Struct("<II")  # 1 when complete, CRC-32C
READ_BYTES: Final = 1 << 20
OPEN_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC
NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)


def identity(pin: Pin, endpoint_url: str) -> str:
    """Return the name of a pin's partial files: sha256 over its canonical JSON and the endpoint."""
    text = json.dumps(pin.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return sha256(f"{text}\n{endpoint_url}\n".encode()).hexdigest()


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn an OSError of the blob directory into a FetchError."""
    try:
        yield
    except OSError as error:
        code: FetchCode = "io_error"
        if error.errno in NO_ROOM:
            code = "no_space"
        elif error.errno == errno.EFBIG:
            code = "too_large"
        raise FetchError(code, f"cannot {doing}: {error.strerror}") from error


@contextmanager
def closing_fd(fd: int) -> Iterator[None]:
    """Close a descriptor at the end of the block."""
    try:
        yield
    finally:
        os.close(fd)


def _missing_bytes(data_fd: int) -> int:
    """Return how many bytes of a partial blob are not allocated yet; it has its full length from the start."""
    found = os.fstat(data_fd)
    return max(0, found.st_size - found.st_blocks * 512)


@dataclass(slots=True)
class BlobDir:
    """The blob directory, by descriptors: no path is resolved after it is opened."""

    partial_fd: int
    sha256_fd: int

    @classmethod
    def open(cls, path: str) -> "BlobDir":
        """Open the blob directory, making what is missing. Raises: FetchError."""
        with translated("open the blob directory"):
            os.makedirs(path, mode=0o700, exist_ok=True)
            for name in ("partial", "sha256"):
                with suppress(FileExistsError):
                    os.mkdir(f"{path}/{name}", 0o700)
            flags = os.O_RDONLY | os.O_DIRECTORY | OPEN_FLAGS
            return cls(os.open(f"{path}/partial", flags), os.open(f"{path}/sha256", flags))

    def published(self, digest: str, size_bytes: int) -> bool:
        """Tell whether a blob is there, with the size that it should have."""
        try:
            found = os.stat(digest.removeprefix("sha256:"), dir_fd=self.sha256_fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return found.st_size == size_bytes

    def try_lock(self, pin: Pin, name: str, cell_bytes: int) -> "Partial | int":
        """Return the partial blob of a pin with its lock held.

        While another process has it: a descriptor of the map, which tells by `outcome` what became of it.
        """
        with translated("open a partial blob"):
            while True:
                map_fd = self._open(f"{name}.map")
                try:
                    fcntl.flock(map_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_linked(map_fd, f"{name}.map", self.partial_fd):
                        return Partial(self, pin, name, map_fd, self._open(f"{name}.data"), Grid(pin.size, cell_bytes))
                except BlockingIOError:
                    return map_fd
                except OSError:
                    os.close(map_fd)
                    raise
                os.close(map_fd)  # its last owner published or dropped it meanwhile

    def promised_bytes(self) -> int:
        """Return the bytes that all blobs on their way, of any process, are still going to allocate."""
        promised_bytes = 0
        for name in os.listdir(self.partial_fd):
            if name.endswith(".map") and self._is_locked(name):
                with suppress(FileNotFoundError):  # published or dropped this instant
                    data_fd = os.open(f"{name[:-4]}.data", os.O_RDONLY | OPEN_FLAGS, dir_fd=self.partial_fd)
                    with closing_fd(data_fd):
                        promised_bytes += _missing_bytes(data_fd)
        return promised_bytes

    def _is_locked(self, name: str) -> bool:
        """Tell whether a process, this one included, works on the blob of a map."""
        try:
            map_fd = os.open(name, os.O_RDONLY | OPEN_FLAGS, dir_fd=self.partial_fd)
        except FileNotFoundError:
            return False
        with closing_fd(map_fd):
            try:
                fcntl.flock(map_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def _open(self, name: str) -> int:
        """Open a file of the partial folder, making it if missing."""
        return os.open(name, os.O_RDWR | os.O_CREAT | OPEN_FLAGS, 0o600, dir_fd=self.partial_fd)


def _is_linked(fd: int, name: str, dir_fd: int) -> bool:
    """Tell whether a name still leads to an open file."""
    try:
        named = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def outcome(map_fd: int) -> str | None:
    """Return the digest that a map's owner published its blob under, if it did."""
    raw = os.pread(map_fd, HEADER.size, 0)
    if len(raw) != HEADER.size:
        return None
    digest: bytes = HEADER.unpack(raw)[4]
    return f"sha256:{digest.hex()}" if any(digest) else None


@dataclass(slots=True)
class Partial:
    """A blob on its way, locked by us."""

    blobs: BlobDir
    pin: Pin
    name: str
    map_fd: int
    data_fd: int
    grid: Grid

    def resume(self) -> dict[int, int]:
        """Make the files fit the pin; return the cells that the map calls complete, with their CRC-32C.

        They are to be believed only after ``crc_of`` agrees. Raises: FetchError, `no_space` if the rest does not fit.
        """
        with translated("read a partial blob"):
            want = HEADER.pack(MAGIC, bytes.fromhex(self.name), self.pin.size, self.grid.cell_bytes, bytes(32))
            table_bytes = self.grid.cells * CELL.size
            if os.pread(self.map_fd, HEADER.size, 0)[:-32] != want[:-32]:
                os.ftruncate(self.map_fd, 0)
                os.ftruncate(self.data_fd, 0)
                os.pwrite(self.map_fd, want, 0)
            os.pwrite(self.map_fd, bytes(32), HEADER.size - 32)
            os.ftruncate(self.map_fd, HEADER.size + table_bytes)
            os.ftruncate(self.data_fd, self.pin.size)
            self._check_room()
            table = os.pread(self.map_fd, table_bytes, HEADER.size)
            return {cell: crc for cell, (done, crc) in enumerate(CELL.iter_unpack(table)) if done == 1}

    def _check_room(self) -> None:
        """Check that the bytes still to come fit beside those of all other blobs on their way, of any process.

        Raises: FetchError `no_space`.
        """
        missing_bytes = _missing_bytes(self.data_fd)
        others_bytes = self.blobs.promised_bytes() - missing_bytes
        space = os.fstatvfs(self.data_fd)
        free_bytes = space.f_bavail * space.f_frsize
        if missing_bytes + others_bytes > free_bytes:
            raise FetchError(
                "no_space",
                f"the blob needs {missing_bytes} more bytes (and others {others_bytes}), {free_bytes} are free",
            )

    def write(self, data: bytes, offset: int) -> None:
        """Write bytes in place. Raises: FetchError."""
        view = memoryview(data)
        if offset + len(view) > self.pin.size:
            raise FetchError("too_large", f"the server sent more than {self.pin.size} bytes")
        with translated("write a partial blob"):
            while view:
                written = os.pwrite(self.data_fd, view, offset)
                view, offset = view[written:], offset + written

    def complete(self, cell: int, crc: int) -> None:
        """Record that a cell is all there."""
        with translated("write a partial blob's map"):
            os.pwrite(self.map_fd, CELL.pack(1, crc), HEADER.size + cell * CELL.size)

    def forget(self, cell: int) -> None:
        """Record that a cell has to be fetched again."""
        with translated("write a partial blob's map"):
            os.pwrite(self.map_fd, CELL.pack(0, 0), HEADER.size + cell * CELL.size)

    def pieces(self, cell: int) -> Iterator[memoryview]:
        """Yield a cell's bytes from the file, in a buffer that the next step overwrites."""
        offset, end = self.grid.bounds(cell)
        buffer = memoryview(bytearray(min(READ_BYTES, end - offset)))
        with translated("read a partial blob"):
            while offset < end:
                got = os.preadv(self.data_fd, [buffer[: end - offset]], offset)
                if not got:
                    raise FetchError("io_error", "the partial blob was truncated by someone else")
                yield buffer[:got]
                offset += got

    def crc_of(self, cell: int) -> int:
        """Return the CRC-32C of a cell as it lies on disk."""
        crc = 0
        for piece in self.pieces(cell):
            crc = crc32c(piece, crc)
        return crc

    def flush(self) -> None:
        """Bring to the disk what was written so far. Raises: FetchError."""
        with translated("write a partial blob to the disk"):
            os.fsync(self.data_fd)

    def publish(self, digest: str) -> None:
        """Make the blob durable, then give it its name, then make the name durable."""
        hex_digest = digest.removeprefix("sha256:")
        with translated("publish a blob"):
            os.fsync(self.data_fd)
            # For those who wait for the lock, and for a crash between the next steps.
            os.pwrite(self.map_fd, bytes.fromhex(hex_digest), HEADER.size - 32)
            os.rename(
                f"{self.name}.data", hex_digest, src_dir_fd=self.blobs.partial_fd, dst_dir_fd=self.blobs.sha256_fd
            )
            os.fsync(self.blobs.sha256_fd)
            os.unlink(f"{self.name}.map", dir_fd=self.blobs.partial_fd)
            os.fsync(self.blobs.partial_fd)

    def drop(self) -> None:
        """Remove the partial blob and its map."""
        with translated("remove a partial blob"):
            for name in (f"{self.name}.data", f"{self.name}.map"):
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self.blobs.partial_fd)

    def close(self) -> None:
        """Give up the lock; what is on disk stays."""
        os.close(self.data_fd)
        os.close(self.map_fd)
