"""The one formatted base that every layer of a pool descends from.

Rule 1: mkfs.ext4 runs once a pool, by absolute path and with an empty environment, at root's explicit command.
Rule 2: the device reads as zeros (a sparse file, or a thin device with zeroing on); so nothing is initialised lazily
later, and no copy grows by being mounted.
"""

import os
import subprocess
from collections.abc import Mapping
from typing import Any, Final

from privhelper import kernel
from privhelper.stores.base import StoreError

_MKFS: Final = "/usr/sbin/mkfs.ext4"


def format_device(path: str, uuid: str, settings: Mapping[str, Any]) -> None:
    """Make the file system on a file or block device; ``settings`` has base_inodes and journal_mib.

    No blocks are kept back for root, no feature folds names (casefold), lost+found goes in ``empty``.
    """
    options = ["-q", "-F", "-m", "0", "-U", uuid, "-b", "4096", "-I", "256", "-N", str(settings["base_inodes"])]
    options += ["-J", f"size={settings['journal_mib']}", "-E", "nodiscard,assume_storage_prezeroed=1"]
    run([_MKFS, *options, path])


def empty(device: str) -> None:
    """Remove lost+found from a fresh file system on a block device: an image does not have it."""
    mount = kernel.mount_detached("ext4", device, [], kernel.MOUNT_ATTR_SAFE)
    root = kernel.open_root(mount)
    try:
        os.rmdir("lost+found", dir_fd=root)
        kernel.syncfs(root)
    finally:
        os.close(root)
        os.close(mount)


def run(command: list[str]) -> None:
    """Run one of root's own programs to its end.

    Raises:
        StoreError: it failed; the message is the last line it wrote.
    """
    done = subprocess.run(command, env={}, stdin=subprocess.DEVNULL, capture_output=True, check=False, close_fds=True)
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise StoreError("pool", f"{command[0]} exited with {done.returncode}: {last}")
