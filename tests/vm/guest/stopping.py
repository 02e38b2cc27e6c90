"""Stop a process and its children at chosen system calls: count them, kill whoever makes the one chosen to be the last.

Rule 1: a call that nobody is interested in costs nothing; strace(1) attached to a process stops at every call.
Rule 2: who is killed at a call has not made it.

seccomp_unotify(2); x86-64 only, as the virtual machine is.
"""

import ctypes
import errno
import fcntl
import os
import select
import signal
import struct
import threading
import time
from typing import Final

#: What changes something outside the process: files, devices, mounts, other processes.
MUTATING: Final = {
    "ioctl": 16, "pwrite64": 18, "write": 1, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "unlink": 87,
    "unlinkat": 263, "rename": 82, "mkdir": 83, "mkdirat": 258, "openat": 257, "symlinkat": 266, "linkat": 265,
    "mknodat": 259, "fchown": 93, "fchownat": 260, "fchmod": 91, "chmod": 90, "utimensat": 280, "setxattr": 188,
    "fsetxattr": 190, "syncfs": 306, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "mount_setattr": 442, "clone": 56,
    "clone3": 435, "unshare": 272, "sendmsg": 46, "kill": 62,
}  # fmt: skip
NAMES: Final = {number: name for name, number in MUTATING.items()}

_SECCOMP, _PIDFD_OPEN, _PIDFD_GETFD = 317, 434, 438
_SET_MODE_FILTER, _NEW_LISTENER, _CONTINUE = 1, 8, 1
_USER_NOTIF, _ALLOW = 0x7FC00000, 0x7FFF0000
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")  # id, pid, flags, call, architecture, instruction, arguments
_LOAD_NUMBER, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def be_stopped() -> int:
    """Make this process and its children stop at MUTATING calls; return the descriptor that tells of them."""
    calls = list(NAMES)
    program = struct.pack("=HBBI", _LOAD_NUMBER, 0, 0, 0)
    for index, number in enumerate(calls):
        program += struct.pack("=HBBI", _JUMP_IF_EQUAL, len(calls) - index, 0, number)
    program += struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW) + struct.pack("=HBBI", _RETURN, 0, 0, _USER_NOTIF)
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(code))
    return _checked(_libc.syscall(_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, head))


def _take_descriptor(pid: int, descriptor: int) -> int:
    """Return a copy of another process's descriptor, as soon as it has it; it cannot say so: it would stop at that."""
    handle = _checked(_libc.syscall(_PIDFD_OPEN, pid, 0))
    deadline_s = time.monotonic() + 30
    try:
        while True:
            try:
                return _checked(_libc.syscall(_PIDFD_GETFD, handle, descriptor, 0))
            except OSError as error:
                if error.errno != errno.EBADF or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.002)
    finally:
        os.close(handle)


class Stops:
    """What a process that called ``be_stopped`` does, told to this one; ``kill_at`` counts calls from 1, 0 is never."""

    def __init__(self, pid: int, descriptor: int, kill_at: int) -> None:
        self._listener = _take_descriptor(pid, descriptor)
        self._kill_at = kill_at
        self.calls: list[str] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until the last process that stops is gone."""
        self._thread.join(30)
        assert not self._thread.is_alive(), "a process that was stopped at its calls stays"
        os.close(self._listener)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not poll.poll()[0][1] & select.POLLHUP:
            notification = bytearray(_NOTIFICATION.size)
            try:
                fcntl.ioctl(self._listener, _RECEIVE, notification, True)
                number, pid, _, call, _, _, *arguments = _NOTIFICATION.unpack(notification)
                if self._counts(NAMES[call], arguments) and len(self.calls) == self._kill_at:
                    os.kill(pid, signal.SIGKILL)
                else:
                    fcntl.ioctl(self._listener, _SEND, struct.pack("=QqiI", number, 0, 0, _CONTINUE))
            except FileNotFoundError:  # ENOENT: whoever made the call was killed meanwhile
                continue

    def _counts(self, name: str, arguments: list[int]) -> bool:
        """Count a call unless it only reads, or only writes to the log."""
        if (name == "openat" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (
            name == "write" and arguments[0] == 2
        ):
            return False
        self.calls.append(name)
        return True
