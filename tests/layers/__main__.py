"""Build the image families that the tests use and print where they lie: python -m tests.layers [demo|full]."""

from __future__ import annotations

import sys

from tests.layers.families import families

for family in families(*sys.argv[1:2]):
    for layer in family.layers:
        print(f"{layer.stat().st_size:>12,}  {layer}")
