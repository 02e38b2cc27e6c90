"""What this process holds open, for tests that nothing is leaked.

Rule: garbage is collected first. What an earlier test left in a cycle is closed by the collector at any moment, also
between two looks of a later test, which would then see a change that nobody made there.
"""

import contextlib
import gc
import os


def held() -> dict[int, tuple[int, int]]:
    """Return each open descriptor of this process with the device and the inode of what it leads to.

    Not the path, as proc(5) gives it: one that is longer than a page has none (ENAMETOOLONG).
    """
    gc.collect()
    found: dict[int, tuple[int, int]] = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # EBADF: the one by which the folder itself was read
            status = os.fstat(int(name))
            found[int(name)] = (status.st_dev, status.st_ino)
    return found
