"""Loop devices by ioctl (loop(4)): a file becomes a block device, without a program in between.

Rule 1: direct I/O always, so that bytes are cached once and errors of the disk below arrive.
Rule 2: which file a device stands on is read from the kernel by device and inode number, never believed from a name.
Rule 3: who may open a node, even only for reading, may put another file behind its device (LOOP_CHANGE_FD, LOOP_CLR_FD;
measured, kernel 6.18). So root mounts by devices of its own, which bear a label that only who configures a device sets.
Rule 4: every device is a fresh one (LOOP_CTL_ADD) and is removed after its use. A user who was given a node can unbind
the device and keep it open; were the number used again, that descriptor would reach what is put behind it next.
"""

import contextlib
import errno
import fcntl
import os
import struct
import time
from typing import Final, NamedTuple

from privhelper.files import closing

_ADD, _REMOVE, _CLEAR, _GET_STATUS, _CONFIGURE = 0x4C80, 0x4C81, 0x4C01, 0x4C05, 0x4C0A
_FRESH: Final = -1  # the lowest number that no device has; kernels before 5.14 give a free old one instead (EEXIST)
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_CONTROL: Final = "/dev/loop-control"
_ACL: Final = "system.posix_acl_access"  # linux/posix_acl_xattr.h: version 2, then tag, permission, id
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER, _NOBODY = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF
_CONFIG_BYTES: Final = 304  # struct loop_config: fd, block size, struct loop_info64 (232 bytes), 64 bytes reserved
_INFO_AT, _INFO_BYTES = 8, 232  # struct loop_info64 in it
_FLAGS_AT, _LABEL_AT, _LABEL_BYTES = 52, 56, 64  # lo_flags and lo_file_name in that
_DISCARD_S: Final = 0.2
_VANISHED: Final = (errno.ENXIO, errno.ENODEV, errno.ENOENT)  # not bound; being removed; removed


def attach(backing: int, *, read_only: bool, autoclear: bool = True, label: bytes = b"") -> tuple[int, str]:
    """Put an open file behind a fresh loop device; return the device's descriptor and path.

    With ``autoclear`` the device goes with its last opener or mount.
    """
    config = bytearray(_CONFIG_BYTES)
    struct.pack_into("=I", config, 0, backing)
    flags = _DIRECT_IO | (_READ_ONLY if read_only else 0) | (_AUTOCLEAR if autoclear else 0)
    struct.pack_into(f"=I{_LABEL_BYTES}s", config, _INFO_AT + _FLAGS_AT, flags, label)
    for _ in range(16):
        path = f"/dev/loop{_control(_ADD, _FRESH)}"
        try:
            device = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.ioctl(device, _CONFIGURE, bytes(config))
            except BaseException:
                os.close(device)
                raise
            return device, path
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: another program looked for a free device and was faster
                discard(path)
                raise
    raise OSError(errno.EBUSY, "no free loop device")


def backing_names() -> dict[str, str]:
    """Return each bound loop device and what sysfs calls its file: a hint, to be confirmed by ``backing``."""
    found = {}
    for name in os.listdir("/sys/block"):
        if name.startswith("loop"):
            try:
                with open(f"/sys/block/{name}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as file:
                    found[f"/dev/{name}"] = file.read().rstrip("\n")
            except OSError as error:
                if error.errno not in (*_VANISHED, errno.ENOTDIR):
                    raise
                continue  # not bound, or gone while we looked
    return found


class Backing(NamedTuple):
    """What a loop device stands on, as the kernel tells."""

    device: int  # st_dev and st_ino of the file
    inode: int
    label: bytes


def backing(path: str) -> Backing | None:
    """Return what a loop device stands on; None when there is nothing, or no such device any more.

    Other programs take their devices away while we look at all of them.
    """
    try:
        with closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)) as device:
            info = fcntl.ioctl(device, _GET_STATUS, bytes(_INFO_BYTES))
    except OSError as error:
        if error.errno in _VANISHED:
            return None
        raise
    encoded, inode = struct.unpack_from("=QQ", info)
    # huge_encode_dev: minor in bits 0-7 and 20-31, major in 8-19
    number = os.makedev(encoded >> 8 & 0xFFF, encoded & 0xFF | encoded >> 12 & 0xFFF00)
    return Backing(number, inode, info[_LABEL_AT : _LABEL_AT + _LABEL_BYTES].rstrip(b"\0"))


def grant(path: str, uid: int, writable: bool) -> None:
    """Let one user open a device node of root's, by an access control list (acl(5)).

    The node stays root's: its user cannot hand it on, cannot lock root out, and root needs no CAP_CHOWN. What udev does
    to owner, group and mode of block devices (root:disk 0660) leaves the entry in force.
    """
    entries = ((_USER_OBJ, 6, _NOBODY), (_USER, 6 if writable else 4, uid), (_GROUP_OBJ, 6, _NOBODY),
               (_MASK, 6, _NOBODY), (_OTHER, 0, _NOBODY))  # fmt: skip
    os.setxattr(path, _ACL, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))


def _take_back(path: str) -> None:
    with contextlib.suppress(OSError):  # ENODATA: it was granted to nobody
        os.removexattr(path, _ACL)


def detach(path: str, wait_s: float) -> None:
    """Take the node back, unbind the device and remove it.

    Raises:
        OSError: EBUSY, somebody kept it open for ``wait_s``; the kernel unbinds it when the last of them lets go.
    """
    _take_back(path)
    try:
        with closing(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)) as device:
            fcntl.ioctl(device, _CLEAR)
    except OSError as error:
        if error.errno not in _VANISHED:  # else its user unbound it
            raise
    deadline = time.monotonic() + wait_s
    while os.path.exists(f"/sys/block/{os.path.basename(path)}/loop/backing_file"):
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, f"{path} is held open")
        time.sleep(0.005)  # the kernel has no way to wait for the last closer
    discard(path)


def discard(path: str) -> None:
    """Remove an unbound device. One that somebody keeps open (its former owner) stays and is not used again."""
    deadline = time.monotonic() + _DISCARD_S
    while True:
        try:
            _control(_REMOVE, int(path.removeprefix("/dev/loop")))
        except OSError as error:
            if error.errno == errno.EBUSY and time.monotonic() < deadline:
                time.sleep(0.005)  # another helper looks at all devices, or udev does
                continue
            if error.errno not in (errno.EBUSY, errno.ENODEV):
                raise
        return


def _control(command: int, number: int) -> int:
    with closing(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)) as control:
        return fcntl.ioctl(control, command, number)
