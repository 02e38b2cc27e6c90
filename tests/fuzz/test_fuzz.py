"""Each harness for a bounded number of rounds from a fixed seed; `make fuzz` runs them for hours from random ones."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.harnesses import HARNESSES, fuzz

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", "800"))


@pytest.mark.parametrize("name", HARNESSES)
def test_fuzz(name: str) -> None:
    summary = fuzz(name, 0, seed=1, rounds=ROUNDS)
    assert summary.startswith(f"{ROUNDS} rounds")
    assert "accepted" in summary or "replayed" in summary  # not only nonsense is tried
