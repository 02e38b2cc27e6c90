"""What this process holds open, for tests that nothing is leaked.

Rule: garbage is collected first. What an earlier test left in a cycle is closed by the collector at any moment, also
between two looks of a later test, which would then see a change that nobody made there.
"""

import contextlib
import gc
import os


def held() -> dict[int, str]:
    """Return each open descriptor of this process with what it leads to, as proc(5) tells."""
    gc.collect()
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one by which the folder itself is read
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found
