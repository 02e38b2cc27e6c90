"""The harnesses, and the loop that runs one."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.fuzz import fuzz_archives, fuzz_manifests

# A harness takes its source of chance and returns what it did, and the input for the record.
Harness = Callable[[random.Random], tuple[str, bytes]]
HARNESSES: Final[dict[str, Harness]] = {
    "archives": fuzz_archives.one_round,
    "layers": fuzz_archives.one_stacked_round,
    "compressed": fuzz_archives.one_compressed_round,
    "manifests": fuzz_manifests.one_round,
}
FAILURE: Final = Path("fuzz-failure.bin")


def fuzz(name: str, seconds: float, seed: int, rounds: int | None = None) -> str:
    """Run a harness for some time, or for a number of rounds; return what came out, counted.

    Raises:
        Exception: an invariant of the harness does not hold; a note tells the seed of the round.
    """
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end if rounds is None else number < rounds:
        chance = random.Random(seed + number)
        try:
            outcome, _ = HARNESSES[name](chance)
        except BaseException as error:
            error.add_note(f"harness {name}, SEED={seed + number}; the input is in {FAILURE}")
            raise
        outcomes[outcome] += 1
        number += 1
    summary = ", ".join(f"{outcome} {count}" for outcome, count in outcomes.most_common())
    return f"{number} rounds: {summary}"
