"""Loop devices by ioctl (loop(4)): a file becomes a block device, without a program in between.

Rule 1: direct I/O always, so that bytes are cached once and errors of the disk below arrive.
Rule 2: what a device is for stands in a mark on its node, an attribute that only root can read or set (trusted.*,
xattr(7)), with the number of the binding that root made (diskseq, Linux 5.15). Nothing else is believed, and what is
behind is never asked: names and labels are the word of whoever bound it last, and a file system of his (FUSE) may never
answer.
Rule 3: who may open a node, even only for reading, may put another file behind its device (LOOP_CHANGE_FD, LOOP_CLR_FD;
measured, kernel 6.18). So root mounts by devices of its own.
Rule 4: every device is a fresh one (LOOP_CTL_ADD), marked before it is bound, and removed after its use. A user who was
given a node can unbind the device and keep it open; were the number used again, that descriptor would reach what is put
behind it next.
"""

import contextlib
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

from privhelper.files import closing

_ADD, _REMOVE, _CLEAR, _CONFIGURE = 0x4C80, 0x4C81, 0x4C01, 0x4C0A
_FRESH: Final = -1  # the lowest number that no device has; kernels before 5.14 give a free old one instead (EEXIST)
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_CONTROL: Final = "/dev/loop-control"
_MARK: Final = "trusted.imgpull"
_ACL: Final = "system.posix_acl_access"  # linux/posix_acl_xattr.h: version 2, then tag, permission, id
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NOBODY = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
_CONFIG_BYTES: Final = 304  # struct loop_config: fd, block size, struct loop_info64, 64 bytes reserved
_FLAGS_AT: Final = 60  # lo_flags, 52 bytes into struct loop_info64
_DISCARD_S: Final = 1.0
_VANISHED: Final = (errno.ENXIO, errno.ENODEV, errno.ENOENT)  # not bound; being removed; removed


class Node(NamedTuple):
    """A loop device that root made, whoever has it now."""

    path: str
    mark: str
    is_ours: bool  # still bound as root bound it


def attach(backing: int, mark: str, *, read_only: bool, autoclear: bool = True) -> tuple[int, str]:
    """Put an open file behind a fresh loop device that bears a mark; return the device's descriptor and path.

    With ``autoclear`` the device goes with its last opener or mount.
    """
    config = bytearray(_CONFIG_BYTES)
    struct.pack_into("=I", config, 0, backing)
    flags = _DIRECT_IO | (_READ_ONLY if read_only else 0) | (_AUTOCLEAR if autoclear else 0)
    struct.pack_into("=I", config, _FLAGS_AT, flags)
    for _ in range(16):
        path = f"/dev/loop{_control(_ADD, _FRESH)}"
        try:
            os.setxattr(path, _MARK, f"unbound {mark}".encode())
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.ioctl(device, _CONFIGURE, bytes(config))
                os.setxattr(path, _MARK, f"{_binding(path)} {mark}".encode())
            except BaseException:
                os.close(device)
                raise
            return device, path
        except OSError as error:
            if error.errno != errno.EBUSY:
                discard(path)
                raise
            os.removexattr(path, _MARK)  # another program looked for a free device and was faster: it is that one's
    raise OSError(errno.EBUSY, "no free loop device")


def nodes() -> Iterator[Node]:
    """Yield every loop device of the host that root marked, those of other pools too."""
    for name in os.listdir("/sys/block"):
        if name.startswith("loop"):
            path = f"/dev/{name}"
            try:
                binding, _, mark = os.getxattr(path, _MARK).decode().partition(" ")
                found = Node(path, mark, _is_bound(path) and binding == _binding(path))
            except OSError as error:
                if error.errno not in (*_VANISHED, errno.ENODATA):
                    raise
                continue  # not marked, or gone while we looked
            yield found


def _binding(path: str) -> str:
    """Return the number that the kernel gave the latest binding of a device; no two have the same until a reboot."""
    with open(f"/sys/block/{os.path.basename(path)}/diskseq", encoding="ascii") as file:
        return file.read().strip()


def _is_bound(path: str) -> bool:
    return os.path.exists(f"/sys/block/{os.path.basename(path)}/loop/backing_file")


def grant(path: str, uid: int, writable: bool) -> None:
    """Let one user open a device node of root's, by an access control list (acl(5)).

    The node stays root's: its user cannot hand it on, cannot lock root out, and root needs no CAP_CHOWN. What udev does
    to owner, group and mode of block devices (root:disk 0660) leaves the entry in force.
    """
    entries = ((_USER_OBJ, 6, _NOBODY), (_USER, 6 if writable else 4, uid), (_GROUP_OBJ, 6, _NOBODY),
               (_MASK, 6, _NOBODY), (_OTHER, 0, _NOBODY))  # fmt: skip
    os.setxattr(path, _ACL, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))


def detach(path: str, wait_s: float) -> None:
    """Take the node back, unbind the device and remove it.

    Raises:
        OSError: EBUSY, somebody kept it open for ``wait_s``; the kernel unbinds it when the last of them lets go.
    """
    with contextlib.suppress(OSError):  # ENODATA: it was granted to nobody
        os.removexattr(path, _ACL)
    try:
        with closing(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)) as device:
            fcntl.ioctl(device, _CLEAR)
    except OSError as error:
        if error.errno not in _VANISHED:  # else its user unbound it
            raise
    deadline = time.monotonic() + wait_s
    while _is_bound(path):
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "the device is held open")
        time.sleep(0.005)  # the kernel has no way to wait for the last closer
    discard(path)


def discard(path: str, wait_s: float = _DISCARD_S) -> None:
    """Remove an unbound device. One that its former owner keeps open stays, marked, and is not used again."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            _control(_REMOVE, int(path.removeprefix("/dev/loop")))
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(0.005)  # the last closer is not done yet, or udev looks at it
                continue
            if error.errno not in (errno.EBUSY, errno.ENODEV):
                raise
        return


def _control(command: int, number: int) -> int:
    with closing(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)) as control:
        return fcntl.ioctl(control, command, number)
