"""Ways out of the locked checker, tried one at a time from inside it. Run as: python -I probe.py NAME SCRATCH.

Rule 1: the real program locks itself; the probe runs in the place of the check, on the main thread or the hashing one.
Rule 2: `REACHED` on descriptor 2 means that the way is open; `DENIED` that it was refused; silence and death by SIGSYS
that the sandbox killed the process.
"""

import ctypes
import mmap
import os
import socket
import struct
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

from unpriv import check, kernel, pipeline, seccomp

NUMBERS = seccomp._numbers(kernel.machine())
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
PARENT = os.getppid()
SCRATCH = sys.argv[2] if len(sys.argv) > 2 else "/nonexistent"
BUFFER = ctypes.create_string_buffer(4096)
ADDRESS = ctypes.addressof(BUFFER)


def call(name: str, *arguments: int) -> int:
    """Make a raw system call; a number that this architecture lacks counts as refused."""
    number = NUMBERS[name]
    if number is None:
        raise OSError(38, f"no {name} here")
    result = int(LIBC.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def text(value: str) -> int:
    """Return the address of a C string that stays alive."""
    kept = ctypes.create_string_buffer(value.encode())
    _KEPT.append(kept)
    return ctypes.addressof(kept)


_KEPT: list[Any] = []


def tcp_connect() -> None:
    socket.socket().connect(("127.0.0.1", 9))


def tcp_listen() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()


def udp_send() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 53))


def unix_path() -> None:
    socket.socket(socket.AF_UNIX).connect("/run/systemd/journal/socket")


def unix_abstract() -> None:
    socket.socket(socket.AF_UNIX).connect("\0imgpull-probe")


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def mprotect_exec() -> None:
    page = mmap.mmap(-1, 4096)
    call("mprotect", ctypes.addressof(ctypes.c_char.from_buffer(page)), 4096, 5)


def read_parent() -> None:
    local, remote = struct.pack("QQ", ADDRESS, 8), struct.pack("QQ", 0x400000, 8)
    left, right = ctypes.create_string_buffer(local), ctypes.create_string_buffer(remote)
    call("process_vm_readv", PARENT, ctypes.addressof(left), 1, ctypes.addressof(right), 1, 0)


PROBES: dict[str, Callable[[], object]] = {
    "open_file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "openat2": lambda: call("openat2", -100, text("/etc/passwd"), ADDRESS, 24),
    "list_directory": lambda: os.listdir("/"),
    "stat": lambda: os.stat("/etc/shadow"),
    "statx": lambda: call("statx", -100, text("/etc/shadow"), 0, 0xFFF, ADDRESS),
    "access": lambda: os.access("/etc/shadow", os.R_OK),
    "readlink": lambda: os.readlink("/proc/self/exe"),
    "create_file": lambda: os.open(f"{SCRATCH}/made", os.O_CREAT | os.O_WRONLY, 0o600),
    "unlink": lambda: os.unlink(f"{SCRATCH}/victim"),
    "rename": lambda: os.rename(f"{SCRATCH}/victim", f"{SCRATCH}/other"),
    "hard_link": lambda: os.link(f"{SCRATCH}/victim", f"{SCRATCH}/other"),
    "symbolic_link": lambda: os.symlink("/etc", f"{SCRATCH}/other"),
    "make_directory": lambda: os.mkdir(f"{SCRATCH}/other"),
    "chmod": lambda: os.chmod(f"{SCRATCH}/victim", 0o777),
    "chown": lambda: os.chown(f"{SCRATCH}/victim", 1, 1),
    "utimes": lambda: os.utime(f"{SCRATCH}/victim", (1, 1)),
    "set_attribute": lambda: os.setxattr(f"{SCRATCH}/victim", "user.x", b"x"),
    "tcp_connect": tcp_connect,
    "tcp_listen": tcp_listen,
    "udp_send": udp_send,
    "unix_path": unix_path,
    "unix_abstract": unix_abstract,
    "socketpair": socket.socketpair,
    "netlink": lambda: call("socket", 16, 3, 0),
    "signal_parent": lambda: os.kill(PARENT, 0),
    "signal_by_descriptor": lambda: call("pidfd_open", PARENT, 0),
    "ptrace": lambda: call("ptrace", 0x4206, PARENT, 0, 0),  # PTRACE_SEIZE
    "read_parent_memory": read_parent,
    "open_parent_memory": lambda: os.open(f"/proc/{PARENT}/mem", os.O_RDWR),
    "steal_descriptor": lambda: call("pidfd_getfd", 0, 0, 0),
    "fork": fork,
    "clone_thread": lambda: threading.Thread(target=lambda: None).start(),
    "execve": lambda: os.execv("/bin/true", ["true"]),
    "memory_writable_and_executable": lambda: mmap.mmap(-1, 4096, prot=7),
    "memory_made_executable": mprotect_exec,
    "memory_of_a_file": lambda: mmap.mmap(0, 512, prot=1),
    "memory_of_three_gib": lambda: bytearray(3 << 30),
    "anonymous_file": lambda: os.memfd_create("x"),
    "io_uring": lambda: call("io_uring_setup", 8, ADDRESS),
    "user_namespace": lambda: call("unshare", 0x10000000),
    "mount": lambda: call("mount", text("none"), text(SCRATCH), text("tmpfs"), 0, 0),
    "new_mount_api": lambda: call("fsopen", text("tmpfs"), 0),
    "chroot": lambda: call("chroot", text(SCRATCH)),
    "keyring": lambda: call("keyctl", 0, -3, 1),
    "bpf": lambda: call("bpf", 0, ADDRESS, 48),
    "perf_event": lambda: call("perf_event_open", ADDRESS, 0, -1, -1, 0),
    "userfaultfd": lambda: call("userfaultfd", 0),
    "setuid": lambda: os.setuid(0),
    "undo_dumpable": lambda: kernel.prctl(kernel.PR_SET_DUMPABLE, 1),
    "raise_limit": lambda: call("prlimit64", 0, 7, ADDRESS, 0),
    "second_filter": lambda: call("seccomp", 1, 0, ADDRESS),
    "duplicate_descriptor": lambda: os.dup(0),
    "read_report_pipe": lambda: os.read(1, 1),
    "write_blob": lambda: os.write(0, b"x"),
    "write_lower_manifest": lambda: os.write(8, b"x"),
    "write_other_descriptor": lambda: os.write(40, b"x"),
    "truncate_manifest": lambda: os.ftruncate(4, 0),
    "ioctl": lambda: call("ioctl", 1, 0x5412, ADDRESS),  # TIOCSTI
    "sendfile": lambda: os.sendfile(1, 0, 0, 1),
    "copy_file_range": lambda: os.copy_file_range(0, 4, 1),
    "shared_memory": lambda: call("shmget", 0, 4096, 0o1600),
    "reboot": lambda: call("reboot", 0, 0, 0, 0),
    "foreign_call_number": lambda: LIBC.syscall(ctypes.c_long(0x40000000 + 39)),  # getpid of x32
}


def _say(word: str) -> None:
    os.write(2, word.encode("ascii", "backslashreplace") + b"\n")
    os._exit(0)


def _try(probe: Callable[[], object]) -> None:
    try:
        probe()
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        _say(f"DENIED {type(error).__name__} {error}")
    _say("REACHED")


def main() -> None:
    """Run the checker, with the probe in the place of the check."""
    name = sys.argv[1]
    thread = name.startswith("thread:")
    probe = PROBES[name.removeprefix("thread:")]
    warm_up = check._warm_up
    handed_over: SimpleQueue[Callable[[], object]] = SimpleQueue()

    def warm_up_and_arm(media: Any, hasher: Any, in_force: Any) -> None:
        warm_up(media, hasher, in_force)
        start = hasher.start

        def start_both() -> None:
            start()
            threading.Thread(target=lambda: _try(handed_over.get()), daemon=True).start()

        hasher.start = start_both
        pipeline.verdict = run_probe  # type: ignore[assignment]  # in its place

    def run_probe(*_: object) -> None:
        if thread:
            handed_over.put(probe)
            threading.Event().wait()
        _try(probe)

    check._warm_up = warm_up_and_arm
    sys.argv = ["check", *sys.argv[3:]]
    check.main()


if __name__ == "__main__":
    main()
