"""Tries, from inside a real sandbox, what must be denied: the proof behind `imgpull policy audit`.

Rule 1: the sandbox is entered by the very call, the very system calls and the very limits of the program it stands for.
Rule 2: an attempt harms nothing where it succeeds: it looks, it does not write.
Rule 3: `REACHED` on descriptor 1 means that the way is open; `DENIED` that the kernel refused; death by SIGSYS that
        seccomp killed the process. Which of them is expected is the caller's to say.

Started as ``python -I -m unpriv.audit check|fetch ATTEMPT FOLDER``, one process an attempt; FOLDER is an empty folder,
the fetcher's blob directory. ``python -I -m unpriv.audit list`` prints the attempts.
"""

import ctypes
import mmap
import os
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from broker.protocol import Endpoint, Hello
from unpriv import kernel, limits, sandbox

_PTRACE_ATTACH_NUMBER: Final = {"x86_64": 101, "aarch64": 117}
_IO_URING_SETUP: Final = 425  # the same number on every architecture
_MEMORY_BYTES: Final = 3 << 30
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_PARENT: Final = os.getppid()
_LIMITS: Final = Path(__file__).resolve().parent.parent / "policy" / "limits.toml"


def _call(number: int, *arguments: int) -> None:
    if _LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments)) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def _read_a_file() -> None:
    os.close(os.open("/etc/hostname", os.O_RDONLY))


def _list_a_folder() -> None:
    os.listdir("/home")


def _write_a_file() -> None:
    os.close(os.open("/var/tmp", os.O_TMPFILE | os.O_WRONLY, 0o600))  # noqa: S108  has no name and is gone at once


def _execute() -> None:
    os.execv("/bin/true", ["true"])  # noqa: S606  no shell is the point


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def _connect_tcp() -> None:
    with socket.socket() as sock:
        try:
            sock.connect(("127.0.0.1", 9))
        except ConnectionRefusedError:
            return  # nobody listens on the discard port; the attempt was let through


def _listen_tcp() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()


def _connect_unix() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect("\0imgpull-audit")
        except ConnectionRefusedError:
            return


def _trace_parent() -> None:
    _call(_PTRACE_ATTACH_NUMBER[os.uname().machine], 0x4206, _PARENT, 0, 0)  # PTRACE_SEIZE stops nothing
    raise AssertionError  # REACHED without detaching would keep hold of the parent: die instead


def _signal_parent() -> None:
    os.kill(_PARENT, 0)


def _executable_memory() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()


def _io_uring() -> None:
    buffer = ctypes.create_string_buffer(120)
    _call(_IO_URING_SETUP, 1, ctypes.addressof(buffer))


def _user_namespace() -> None:
    _LIBC.unshare.restype = ctypes.c_int
    if _LIBC.unshare(0x10000000) < 0:  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "refused")


def _memory() -> None:
    mmap.mmap(-1, _MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


ATTEMPTS: Final[dict[str, Callable[[], None]]] = {
    "read_a_file": _read_a_file,
    "list_a_folder": _list_a_folder,
    "write_a_file": _write_a_file,
    "execute": _execute,
    "fork": _fork,
    "connect_tcp": _connect_tcp,
    "listen_tcp": _listen_tcp,
    "connect_unix": _connect_unix,
    "trace_parent": _trace_parent,
    "signal_parent": _signal_parent,
    "executable_memory": _executable_memory,
    "io_uring": _io_uring,
    "user_namespace": _user_namespace,
    "memory_of_three_gib": _memory,
}


def _lock(role: str, folder: str) -> None:
    if role == "check":
        from unpriv.check import rlimits

        sandbox.lock("check", sandbox.Rules(), rlimits(limits.of(tomllib.loads(_LIMITS.read_text("utf-8"))), 0))
    else:
        from unpriv.fetch import confine

        confine(Hello(endpoint=Endpoint(), blob_dir=folder), (), ())


def main() -> None:
    """Lock this process in and try one thing."""
    if sys.argv[1:] == ["list"]:
        print("\n".join(ATTEMPTS))
        return
    role, name, folder = sys.argv[1:]
    attempt = ATTEMPTS[name]
    kernel.machine()  # whatever is looked up lazily is looked up before the lock
    _lock(role, folder)
    try:
        attempt()
    except OSError as error:
        word = f"DENIED errno {error.errno}\n"
    else:
        word = "REACHED\n"
    os.write(1, word.encode())
    os._exit(0)


if __name__ == "__main__":
    main()
