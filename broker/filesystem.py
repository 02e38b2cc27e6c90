"""Let the file system of an activation fill its device: what ``--size`` is for.

Rule 1: it is done by the user, on a device that is his own, with the tool of the file system's authors (resize2fs(8) of
        e2fsprogs); root has no part in it.
Rule 2: it is done before anybody is told of the device. If it does not work out, the device is given back.
"""

import os
import subprocess
from typing import Final

import trio

from broker.errors import ImgpullError

RESIZE2FS: Final = ("/usr/sbin/resize2fs", "/sbin/resize2fs")  # distributions differ; PATH of a user rarely has either
DEADLINE_S: Final = 600.0  # a terabyte takes seconds


async def grow(device: str) -> None:
    """Let the ext4 on a device fill it. Raises: ImgpullError."""
    tool = next((path for path in RESIZE2FS if os.access(path, os.X_OK)), None)
    if tool is None:
        raise ImgpullError(
            "configuration",
            "resize2fs is not installed",
            "--size lets the file system fill its device",
            "install e2fsprogs, or do without --size",
        )
    # -f: a file system that was never mounted counts as unchecked; nobody but root has written to this one.
    with trio.move_on_after(DEADLINE_S):
        done = await trio.run_process(
            [tool, "-f", device],
            stdin=subprocess.DEVNULL,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={},
        )
        if done.returncode == 0:
            return
        said = done.stderr.decode("ascii", "replace").strip().splitlines()
        why = f"resize2fs ended with {done.returncode}: {said[-1] if said else 'without a word'}"
        raise ImgpullError("io-error", f"the file system on {device} does not grow", why)
    raise ImgpullError("io-error", f"the file system on {device} does not grow", f"not done after {DEADLINE_S:.0f} s")
