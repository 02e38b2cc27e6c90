"""Run every harness for FUZZ_SECONDS (60 if unset), or those that are named as arguments, from SEED or a random one.

A failure prints the seed of its round, which repeats it, and leaves the input in fuzz-failure.bin.
"""

from __future__ import annotations

import os
import sys

from tests.fuzz.harnesses import HARNESSES, fuzz


def main() -> None:
    seconds = float(os.environ.get("FUZZ_SECONDS", "60"))
    seed = int(os.environ["SEED"]) if "SEED" in os.environ else int.from_bytes(os.urandom(4), "big")
    for name in sys.argv[1:] or HARNESSES:
        print(f"{name}: seed {seed}, {seconds:.0f} s", flush=True)
        print(f"{name}: {fuzz(name, seconds, seed)}", flush=True)


if __name__ == "__main__":
    main()
