"""The few Linux calls that Python does not have, by ctypes: prctl, seccomp, Landlock, mallopt.

Rule 1: the only other user of ctypes in this folder is archive.py (libarchive).
Rule 2: a failing call raises OSError with the call's name; nothing here decides whether that matters.
"""

import ctypes
import os
import struct
import sys
from typing import Final

PR_SET_NO_NEW_PRIVS: Final = 38  # prctl(2)
PR_GET_NO_NEW_PRIVS: Final = 39
PR_SET_DUMPABLE: Final = 4
PR_GET_SECCOMP: Final = 21

_SECCOMP_SET_MODE_FILTER: Final = 1  # seccomp(2)
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1

_LANDLOCK_CREATE_RULESET_VERSION: Final = 1  # landlock_create_ruleset(2)
_LANDLOCK_RULE_PATH_BENEATH: Final = 1
# Since 424 a new call has the same number on every architecture.
_NR_LANDLOCK_CREATE_RULESET: Final = 444
_NR_LANDLOCK_ADD_RULE: Final = 445
_NR_LANDLOCK_RESTRICT_SELF: Final = 446
_NR_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}

_M_ARENA_MAX: Final = -8  # mallopt(3)

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def machine() -> str:
    """Return the architecture as uname(2) names it."""
    return os.uname().machine


def _check(result: int, call: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")
    return result


def _syscall(call: str, number: int, *arguments: int | ctypes.c_void_p) -> int:
    # Variable arguments default to 32 bits in ctypes: widen every one of them.
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *words), call)


def prctl(operation: int, argument: int = 0) -> int:
    """Call prctl(2) with one argument and three zeros."""
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(ctypes.c_int(operation), ctypes.c_ulong(argument), zero, zero, zero)
    return _check(result, f"prctl({operation})")


def single_arena() -> None:
    """Let all threads allocate from one heap, which grows by brk and never by mprotect (mallopt(3), M_ARENA_MAX)."""
    if not _libc.mallopt(ctypes.c_int(_M_ARENA_MAX), ctypes.c_int(1)):
        raise OSError("mallopt(M_ARENA_MAX) refused")


class _Program(ctypes.Structure):
    """struct sock_fprog of linux/filter.h."""

    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def seccomp_filter(program: bytes) -> None:
    """Install a classic BPF program on every thread of this process.

    Raises:
        OSError: refused, or a thread could not be brought under it.
    """
    buffer = ctypes.create_string_buffer(program, len(program))
    head = _Program(len(program) // 8, ctypes.addressof(buffer))
    pointer = ctypes.c_void_p(ctypes.addressof(head))
    flags = _SECCOMP_FILTER_FLAG_TSYNC
    thread = _syscall("seccomp", _NR_SECCOMP[machine()], _SECCOMP_SET_MODE_FILTER, flags, pointer)
    if thread:
        raise OSError(f"seccomp: thread {thread} could not be synchronised")


def landlock_abi() -> int:
    """Return the version of Landlock that this kernel has; 0 where it is absent or switched off at boot."""
    null = ctypes.c_void_p(None)
    try:
        return _syscall(
            "landlock_create_ruleset", _NR_LANDLOCK_CREATE_RULESET, null, 0, _LANDLOCK_CREATE_RULESET_VERSION
        )
    except OSError:
        return 0


def landlock_ruleset(attributes: bytes) -> int:
    """Make a ruleset from the bytes of struct landlock_ruleset_attr; return its descriptor."""
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    pointer = ctypes.c_void_p(ctypes.addressof(buffer))
    return _syscall("landlock_create_ruleset", _NR_LANDLOCK_CREATE_RULESET, pointer, len(attributes), 0)


def landlock_allow_beneath(ruleset: int, parent: int, access: int) -> None:
    """Add the rule that ``access`` is allowed beneath the open descriptor ``parent``."""
    data = struct.pack("=Qi", access, parent)  # struct landlock_path_beneath_attr is packed
    buffer = ctypes.create_string_buffer(data, len(data))
    pointer = ctypes.c_void_p(ctypes.addressof(buffer))
    _syscall("landlock_add_rule", _NR_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, pointer, 0)


def landlock_restrict(ruleset: int) -> None:
    """Put the calling thread, and all that it starts from now on, under the ruleset."""
    _syscall("landlock_restrict_self", _NR_LANDLOCK_RESTRICT_SELF, ruleset, 0)


assert sys.byteorder == "little", "the filter reads 64-bit arguments as two little-endian words"
