"""The system calls that Python has no name for. Sole importer of ctypes.

Rule 1: each function is one system call or one fixed sequence of them, and raises OSError with the kernel's own errno.
Rule 2: nothing here decides; which call, which flags and which names is the business of the caller and of policy/.
"""

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_X86_64: Final = os.uname().machine == "x86_64"
# The numbers above 423 are the same on every architecture (Linux, scripts/syscall.tbl).
_NUMBERS: Final = {
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442,
    "landlock_create_ruleset": 444, "landlock_add_rule": 445, "landlock_restrict_self": 446,
}  # fmt: skip


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _call(name: str, *arguments: Any) -> int:
    # ctypes passes a bare int as 32 bits; every integer is widened, pointers go as they are.
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return _checked(_libc.syscall(ctypes.c_long(_NUMBERS[name]), *words), name)


# ---------------------------------------------------------------- file systems and detached mounts

MOUNT_ATTR_RDONLY: Final = 0x1
MOUNT_ATTR_SAFE: Final = 0x2 | 0x4 | 0x8 | 0x10  # nosuid, nodev, noexec, noatime (mount_setattr(2))
_MOUNT_ATTR_IDMAP: Final = 0x100000
_AT_EMPTY_PATH: Final = 0x1000
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_UMOUNT_NOFOLLOW: Final = 0x8


def mount_detached(filesystem: str, device: str, options: Sequence[str], attributes: int) -> int:
    """Mount a device nowhere and return the mount as a descriptor (O_PATH, close-on-exec).

    The mount is in no mount table and the kernel takes it down when the last descriptor below it closes.
    """
    context = _call("fsopen", filesystem.encode() + b"\0", 1)
    try:
        _call("fsconfig", context, _FSCONFIG_SET_STRING, b"source\0", device.encode() + b"\0", 0)
        for option in options:
            key, _, value = option.partition("=")
            command = _FSCONFIG_SET_STRING if value else _FSCONFIG_SET_FLAG
            _call("fsconfig", context, command, key.encode() + b"\0", value.encode() + b"\0" if value else None, 0)
        _call("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call("fsmount", context, 1, attributes)
    finally:
        os.close(context)


def attach_mount(mount: int, path: str) -> None:
    """Attach a detached mount at a path: only ``pool attach`` does this."""
    _call("move_mount", mount, b"\0", -100, path.encode() + b"\0", 0x4)  # MOVE_MOUNT_F_EMPTY_PATH


def unmount(path: str) -> None:
    """Take an attached mount down; EBUSY while somebody uses it."""
    _checked(_libc.umount2(path.encode(), _UMOUNT_NOFOLLOW), "umount2")


def map_mount_ids(mount: int, user_namespace: int) -> None:
    """Let a detached mount show its owners through the id map of a user namespace (an idmapped mount)."""
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP, 0, 0, user_namespace)
    _call("mount_setattr", mount, b"\0", _AT_EMPTY_PATH, attributes, len(attributes))


def open_root(mount: int) -> int:
    """Open the directory at the root of a mount: an O_PATH descriptor can neither be listed nor synced."""
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)


def syncfs(descriptor: int) -> None:
    """Write a file system out. An error is told once to each descriptor that was open when it happened."""
    _checked(_libc.syncfs(descriptor), "syncfs")


def filesystem_magic(descriptor: int) -> int:
    """Return the type of the file system that a file lies on (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    _checked(_libc.fstatfs(descriptor, buffer), "fstatfs")
    return int(struct.unpack_from("=q" if struct.calcsize("l") == 8 else "=i", buffer.raw)[0]) & 0xFFFFFFFF


# ---------------------------------------------------------------- giving up authority

_CLONE_NEWUSER: Final = 0x10000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 1, 4, 22, 23, 24
_PR_SET_SECUREBITS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 28, 38, 47, 4
_SECUREBITS_ALL_LOCKED: Final = (
    0b11101111  # capabilities(7): noroot, no_setuid_fixup, keep_caps off, no ambient: locked
)
CAPABILITIES: Final = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "FOWNER": 3, "FSETID": 4, "SETGID": 6, "SETUID": 7,
    "SETPCAP": 8, "SYS_CHROOT": 18, "SYS_ADMIN": 21, "SETFCAP": 31,
}  # fmt: skip


def _prctl(option: int, *arguments: int) -> int:
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(ctypes.c_int(option), *words), f"prctl({option})")


def enter_user_namespace() -> None:
    """Become the only process of a new user namespace; the parent has yet to write its id maps."""
    _checked(_libc.unshare(_CLONE_NEWUSER), "unshare")


def set_no_new_privs() -> None:
    """Make it impossible to gain anything by executing a program."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def die_with_parent() -> None:
    """Be killed when the thread that forked this process ends. Any change of credentials undoes it: call it last."""
    _prctl(_PR_SET_PDEATHSIG, 9)


def forbid_dumping() -> None:
    """Leave no core and let nobody of the same uid attach."""
    _prctl(_PR_SET_DUMPABLE, 0)


def keep_capabilities(names: Iterable[str]) -> None:
    """Drop every capability but these: from the bounding set first, which needs SETPCAP, and lock the securebits."""
    mask = sum(1 << CAPABILITIES[name] for name in names)
    for number in range(64):
        try:
            held = _prctl(_PR_CAPBSET_READ, number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # past the last capability of this kernel
        if held and not mask >> number & 1:
            _prctl(_PR_CAPBSET_DROP, number)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(_PR_SET_SECUREBITS, _SECUREBITS_ALL_LOCKED)
    header = struct.pack("=II", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread
    low, high = mask & 0xFFFFFFFF, mask >> 32
    _checked(_libc.capset(header, struct.pack("=IIIIII", low, low, 0, high, high, 0)), "capset")


# Landlock rights of landlock(7), by the bit they have: all of version 2, the first under which a hard link is possible.
# What later versions add (truncate, ioctl, TCP, signals) has no system call left that asks for it: policy/syscalls/.
_LANDLOCK_BITS: Final = {
    "execute": 0, "write_file": 1, "read_file": 2, "read_dir": 3, "remove_dir": 4, "remove_file": 5, "make_char": 6,
    "make_dir": 7, "make_reg": 8, "make_sock": 9, "make_fifo": 10, "make_block": 11, "make_sym": 12, "refer": 13,
}  # fmt: skip


def restrict_beneath(root: int, rights: Iterable[str]) -> None:
    """Allow these rights below one directory and none anywhere else (Linux 5.19; an error where Landlock is not on)."""
    every, allowed = (sum(1 << _LANDLOCK_BITS[name] for name in names) for names in (_LANDLOCK_BITS, rights))
    ruleset = _call("landlock_create_ruleset", struct.pack("=Q", every), 8, 0)
    try:
        _call("landlock_add_rule", ruleset, 1, struct.pack("=Qi", allowed, root), 0)
        _call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)


def install_seccomp(program: bytes) -> None:
    """Put a seccomp program in force for this thread, for ever."""
    code = ctypes.create_string_buffer(program, len(program))
    sock_fprog = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    head = ctypes.create_string_buffer(sock_fprog, len(sock_fprog))
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(head))
