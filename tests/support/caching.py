"""Folders that are made once and kept between runs: virtual environments, root filesystems, layers.

Rule 1: a kept folder belongs to us; one that another user put there first (/var/tmp is everybody's) is refused.
Rule 2: a folder is complete when its last file, ``complete``, is there; an interrupted one is made anew.
Rule 3: one process makes, the others wait; the lock ends with its process.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

KEPT_S: Final = 7 * 24 * 3600  # what nobody asked for so long is removed


def cache_home() -> Path:
    """Return the folder of test data: below $XDG_CACHE_HOME, else below /var/tmp, which outlives a reboot."""
    base = os.environ.get("XDG_CACHE_HOME")
    return owned_folder(Path(base) / "imgpull-tests" if base else Path(f"/var/tmp/imgpull-cache-{os.geteuid()}"))


def owned_folder(path: Path) -> Path:
    """Return ``path``, a directory of ours that all may read; refuse one that belongs to another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o755, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise RuntimeError(f"{path} belongs to user {found.st_uid}, expected a directory of user {os.geteuid()}")
    path.chmod(0o755)
    return path


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the lock of the kept folders in ``home``; what is made meanwhile can be read by all."""
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        umask = os.umask(0o022)
        try:
            yield
        finally:
            os.umask(umask)


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``make`` unless it is complete, and note that it was asked for."""
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
    complete.touch()
    return folder


def remove_old(home: Path) -> None:
    """Remove the folders of ``home`` that were interrupted, or that nobody asked for in KEPT_S; hold its lock."""
    for folder in [path for path in home.iterdir() if path.is_dir()]:
        complete = folder / "complete"
        if not complete.exists() or complete.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(folder)
