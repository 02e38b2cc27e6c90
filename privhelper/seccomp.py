"""A reviewed text file becomes a seccomp program.

Rule 1: one line, one permission, one reason: ``allow NAME [argN OP VALUE]... -- why``. No reason, no program.
Rule 2: what no line allows kills the process; so does another architecture and the x32 numbering (seccomp(2)).
"""

import os
import struct
from typing import Final

_MACHINE: Final = os.uname().machine
_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# name: (x86_64, aarch64); asm/unistd_64.h and asm-generic/unistd.h
_NUMBERS: Final = {
    "readv": (19, 65), "write": (1, 64), "close": (3, 57), "fstat": (5, 80), "mmap": (9, 222), "munmap": (11, 215),
    "brk": (12, 214), "pread64": (17, 67), "mremap": (25, 216), "madvise": (28, 233), "fchmod": (91, 52),
    "fchown": (93, 55), "fsetxattr": (190, 5), "fgetxattr": (193, 10), "flistxattr": (196, 13),
    "fremovexattr": (199, 16), "exit_group": (231, 94), "openat": (257, 56), "mkdirat": (258, 34),
    "mknodat": (259, 33), "fchownat": (260, 54), "newfstatat": (262, 79), "unlinkat": (263, 35), "linkat": (265, 37),
    "symlinkat": (266, 36), "readlinkat": (267, 78), "utimensat": (280, 88), "preadv": (295, 69), "preadv2": (327, 286),
    "clock_gettime": (228, 113), "getrandom": (318, 278),
}  # fmt: skip
_VALUES: Final = {
    "PROT_EXEC": 4, "MADV_DONTNEED": 4, "MADV_FREE": 8, "NO_FILE": 0xFFFFFFFFFFFFFFFF, "NO_FILE_32": 0xFFFFFFFF,
    "S_IFMT_NOT_FIFO": 0o160000,
}  # fmt: skip
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _JUMP_FROM, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # linux/bpf_common.h
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def program(text: str) -> bytes:
    """Return the BPF program of a policy text.

    Raises:
        ValueError: a line that is not a rule with a reason; the message names it.
    """
    code = _op(_LOAD, _AT_ARCH) + _op(_JUMP_EQUAL, _AUDIT_ARCH[_MACHINE], 1, 0) + _op(_RETURN, _KILL_PROCESS)
    if _MACHINE == "x86_64":
        code += _op(_LOAD, _AT_NUMBER) + _op(_JUMP_FROM, 0x40000000, 0, 1) + _op(_RETURN, _KILL_PROCESS)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                code += _rule(line)
            except (KeyError, ValueError) as error:
                raise ValueError(f"line {number}: not a rule with a reason: {line.strip()!r}") from error
    return code + _op(_RETURN, _KILL_PROCESS)


def _rule(line: str) -> bytes:
    rule, dashes, reason = line.partition(" -- ")
    verb, name, *conditions = rule.split()
    if verb != "allow" or not dashes or not reason.strip() or len(conditions) % 3:
        raise ValueError
    checks: list[tuple[int, int, int]] = [(_AT_NUMBER, _JUMP_EQUAL, _NUMBERS[name][_MACHINE != "x86_64"])]
    for argument, operator, value_name in zip(conditions[::3], conditions[1::3], conditions[2::3], strict=True):
        jump = {"==": _JUMP_EQUAL, "!&": _JUMP_ANY_BIT}[operator]
        value = _VALUES[value_name] if value_name in _VALUES else int(value_name, 0)
        offset = _AT_ARGUMENTS + 8 * int(argument.removeprefix("arg"))
        checks += [(offset, jump, value & 0xFFFFFFFF), (offset + 4, jump, value >> 32)]
    # Each check loads one word and, when it fails, jumps over what is left of this rule.
    code = b""
    for index, (offset, jump, value) in enumerate(checks):
        rest = 2 * (len(checks) - index - 1) + 1
        when_true, when_false = (0, rest) if jump == _JUMP_EQUAL else (rest, 0)
        code += _op(_LOAD, offset) + _op(jump, value, when_true, when_false)
    return code + _op(_RETURN, _ALLOW)


def _op(code: int, value: int, when_true: int = 0, when_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, when_true, when_false, value)
