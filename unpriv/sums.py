"""Whether what arrived is what was asked for: the expected digest, and the checksum that the server stored.

Rule 1: the sha256 is computed from the file, in order, after a cell was written: what is published is what was hashed.
"""

import base64
import zlib
from collections.abc import Callable
from hashlib import sha256
from typing import Final

from awscrt import checksums

from broker.protocol import Fetch
from unpriv.blobfile import Partial
from unpriv.failures import FetchError
from unpriv.s3 import Checksum

Crc = Callable[[memoryview, int], int]  # of more bytes, and the result so far
CRCS: Final[dict[str, tuple[Crc, int]]] = {  # and how many bytes its result has
    "crc32": (zlib.crc32, 4),
    "crc32c": (checksums.crc32c, 4),
    "crc64nvme": (checksums.crc64nvme, 8),
}


class Sums:
    """The digest of a blob, and the checksum that the server stored with it."""

    def __init__(self, stored: Checksum | None) -> None:
        self._sha256 = sha256()
        self._stored = stored
        self._crc = CRCS.get(stored.algorithm) if stored else None
        self._so_far = 0

    def add(self, partial: Partial, cell: int) -> None:
        """Take in the next cell from the file. Runs in a thread."""
        for piece in partial.pieces(cell):
            self._sha256.update(piece)
            if self._crc:
                self._so_far = self._crc[0](piece, self._so_far)

    def digest(self) -> str:
        """Return the digest of all that was taken in."""
        return f"sha256:{self._sha256.hexdigest()}"

    def compare(self, name: str) -> None:
        """Check the server's checksum. Raises: FetchError."""
        if self._stored is None:
            return
        found = self._so_far.to_bytes(self._crc[1], "big") if self._crc else self._sha256.digest()
        if base64.b64encode(found).decode() != self._stored.base64:
            message = f"what arrived does not have the {self._stored.algorithm} that the server stored: {name}"
            raise FetchError("digest_mismatch", message, retryable=True)


def must_be(digest: str, request: Fetch) -> str:
    """Return a digest that is the expected one, if one is. Raises: FetchError."""
    if request.expect not in (None, digest):
        raise FetchError("digest_mismatch", f"expected {request.expect}, found {digest}: {at(request)}")
    return digest


def at(request: Fetch) -> str:
    """Return an object's name for messages."""
    return f"s3://{request.pin.bucket}/{request.pin.key}"
