"""Running totals of one check, compared with the limits before anything is spent.

Rule 1: whoever is about to take more asks first; an exceeded limit is a refusal by name, never a crash.
Rule 2: the kernel's limits (sandbox.py) lie a little above these and end the process if these are not reached.
"""

import time
from typing import Final

from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, rule

BLOB_TOO_LARGE: Final = rule("blob_too_large")
PAYLOAD_TOO_LARGE: Final = rule("payload_too_large")
RATIO_TOO_HIGH: Final = rule("ratio_too_high")
WALL_CLOCK_EXCEEDED: Final = rule("wall_clock_exceeded")
CPU_TIME_EXCEEDED: Final = rule("cpu_time_exceeded")


class Quota:
    """What one check has taken so far."""

    def __init__(self, limits: Limits, blob_bytes: int, compressed: bool):
        """Begin the check of a blob whose size is known. Raises RejectedError when that alone is too much."""
        self.payload_bytes = 0
        self._run = limits.run
        self._payload_limit = limits.stream.payload_bytes
        self._ratio_limit = self._payload_limit
        self._wall_end_s = time.monotonic() + limits.run.wall_clock_s
        if compressed:
            # The blob's size is known, so the ratio says how large the tar may become before a byte of it comes out.
            self._ratio_limit = max(limits.stream.ratio_floor_bytes, limits.stream.ratio * blob_bytes)
        if blob_bytes > limits.stream.blob_bytes:
            raise RejectedError(BLOB_TOO_LARGE, f"{blob_bytes} bytes, limit {limits.stream.blob_bytes}")

    def take_payload(self, size: int) -> None:
        """Count bytes of the uncompressed tar before they are handed on."""
        self.payload_bytes += size
        if self.payload_bytes > self._payload_limit:
            raise RejectedError(PAYLOAD_TOO_LARGE, f"more than {self._payload_limit} bytes of tar")
        if self.payload_bytes > self._ratio_limit:
            raise RejectedError(RATIO_TOO_HIGH, f"more than {self._ratio_limit} bytes of tar in so small a blob")

    def tick(self) -> None:
        """Compare the clocks. Call it at least once in each bounded amount of work."""
        if time.monotonic() > self._wall_end_s:
            raise RejectedError(WALL_CLOCK_EXCEEDED, f"more than {self._run.wall_clock_s} s")
        if time.process_time() > self._run.cpu_s:
            raise RejectedError(CPU_TIME_EXCEEDED, f"more than {self._run.cpu_s} s of CPU time")
