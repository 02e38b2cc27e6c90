"""How many requests at once, how fast, and when to give up: arithmetic without I/O.

Rule 1: the grid of cells is fixed and aligned, so that a cache in front of S3 sees the same ranges from many hosts.
Rule 2: streams cost the server something; there are only as many as made the last step faster.
Rule 3: a retry that brought nothing counts; one that brought bytes starts the count again.
"""

import random
import threading
from dataclasses import dataclass, field
from typing import Final

from unpriv.failures import FetchError

THREADS_A_STREAM: Final = 4  # one that works, and those that hang and were left behind
GAIN: Final = 1.15  # a wider step has to be this much faster to be kept
REST: Final = 40  # measurements between two tries


@dataclass(frozen=True, slots=True)
class Tuning:
    """Figures that only tests change."""

    cell_bytes: int = 8 << 20
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    watch_window_s: float = 30.0  # over which Hello.min_rate counts
    attempts: int = 6  # in a row that bring nothing
    backoff_base_s: float = 0.2
    backoff_cap_s: float = 15.0
    progress_bytes: int = 64 << 10  # an attempt that brought this much was not in vain
    report_every_s: float = 0.25
    measure_every_s: float = 0.5
    first_width: int = 4
    control_s: float = 90.0  # one HEAD or LIST, all its retries together
    abandon_s: float = 3.0  # from stopping a connection to leaving its thread behind


@dataclass(frozen=True, slots=True)
class Grid:
    """An object cut into cells of one size, the last one shorter."""

    size_bytes: int
    cell_bytes: int

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return -(-self.size_bytes // self.cell_bytes)

    def bounds(self, cell: int) -> tuple[int, int]:
        """Return the offsets [start, end) of a cell."""
        return cell * self.cell_bytes, min((cell + 1) * self.cell_bytes, self.size_bytes)


@dataclass(slots=True)
class Retries:
    """The failures of one range in a row."""

    tuning: Tuning
    allowed: int
    failures: int = 0

    def delay_s(self, error: FetchError, brought_bytes: int) -> float:
        """Return how long to wait before the next attempt. Raises: the error, if there is to be none."""
        if brought_bytes >= self.tuning.progress_bytes:
            self.failures = 0
        self.failures += 1
        if not error.retryable or error.code == "changed" or self.failures >= self.allowed:
            raise error
        backoff_s = min(self.tuning.backoff_base_s * (1 << self.failures - 1), self.tuning.backoff_cap_s)
        jittered_s = backoff_s * random.uniform(0.5, 1.5)  # noqa: S311  # spreads load, guards nothing
        return max(jittered_s, error.retry_after_s or 0.0)


@dataclass(slots=True)
class Watchdog:
    """Tells whether a stream still brings its minimum rate over the last window."""

    min_rate: int  # bytes a second
    window_s: float
    marks: list[tuple[float, int]] = field(default_factory=list)  # (when, bytes so far), oldest first

    def too_slow(self, now_s: float, done_bytes: int) -> bool:
        """Note how far the stream is; return whether a whole window brought less than its share."""
        self.marks.append((now_s, done_bytes))
        while len(self.marks) > 1 and self.marks[1][0] <= now_s - self.window_s:
            self.marks.pop(0)
        since_s, before_bytes = self.marks[0]
        return now_s - since_s >= self.window_s and done_bytes - before_bytes < self.min_rate * self.window_s


@dataclass(slots=True)
class Width:
    """How many streams pay: doubles while that makes it faster, steps back once when it does not."""

    most: int
    now: int
    best_rate: float = 0.0
    rest: int = 0  # measurements until the next try

    def measured(self, rate: float, in_use: int) -> int:
        """Note the bytes a second of the last step, with so many streams in use; return the streams to use next."""
        if self.rest:
            self.rest -= 1
            self.best_rate = rate  # conditions change; the next try starts from what is now
            return self.now
        if rate <= 0 or in_use < self.now:
            return self.now
        if rate < self.best_rate * GAIN and self.best_rate > 0:
            self.now = max(1, self.now // 2)
            self.rest = REST
        else:
            self.now = min(self.most, self.now * 2)
        self.best_rate = max(self.best_rate, rate)
        return self.now

    def throttled(self) -> int:
        """Return the streams to use after the server asked for fewer."""
        self.now = max(1, self.now // 2)
        self.rest = REST
        return self.now


@dataclass(slots=True)
class Bucket:
    """A bandwidth limit for all streams together; 0 is none."""

    rate: int  # bytes a second
    free_at_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def wait_s(self, now_s: float, taken_bytes: int) -> float:
        """Note bytes that were received; return how long their receiver must rest. Any thread may call."""
        if not self.rate:
            return 0.0
        with self.lock:
            return self._wait_s(now_s, taken_bytes)

    def _wait_s(self, now_s: float, taken_bytes: int) -> float:
        """Do the sum of ``wait_s``."""
        self.free_at_s = (
            max(self.free_at_s, now_s - 0.1) + taken_bytes / self.rate
        )  # a tenth of a second may be saved up
        return max(0.0, self.free_at_s - now_s)
