"""A reviewed text file becomes a seccomp program.

Rule 1: one line, one permission, one reason: ``allow NAME [argN OP VALUE]... -- why``. No reason, no program.
Rule 2: what no line allows kills the process; so does another architecture and the x32 numbering (seccomp(2)).
"""

import os
import struct
from collections.abc import Mapping
from typing import Final

_MACHINE: Final = os.uname().machine
_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_VALUES: Final = {
    "PROT_EXEC": 4, "MADV_DONTNEED": 4, "MADV_FREE": 8, "NO_FILE": 0xFFFFFFFFFFFFFFFF, "NO_FILE_32": 0xFFFFFFFF,
    "S_IFMT_NOT_FIFO": 0o160000,
}  # fmt: skip
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _JUMP_FROM, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # linux/bpf_common.h
_AT_NUMBER, _AT_ARCH, _AT_ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data


def numbers(table: str) -> dict[str, int]:
    """Return this architecture's number of each system call: policy/syscalls/numbers.txt."""
    column = {"x86_64": 1, "aarch64": 2}[_MACHINE]
    rows = (line.split() for line in table.splitlines() if not line.startswith("#"))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def program(text: str, known: Mapping[str, int]) -> bytes:
    """Return the BPF program of a policy text; ``known`` has the numbers of the calls.

    Raises:
        ValueError: a line that is not a rule with a reason; the message names it.
    """
    code = _op(_LOAD, _AT_ARCH) + _op(_JUMP_EQUAL, _AUDIT_ARCH[_MACHINE], 1, 0) + _op(_RETURN, _KILL_PROCESS)
    if _MACHINE == "x86_64":
        code += _op(_LOAD, _AT_NUMBER) + _op(_JUMP_FROM, 0x40000000, 0, 1) + _op(_RETURN, _KILL_PROCESS)
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                code += _rule(line, known)
            except (KeyError, ValueError) as error:
                raise ValueError(f"line {number}: not a rule with a reason: {line.strip()!r}") from error
    return code + _op(_RETURN, _KILL_PROCESS)


def _rule(line: str, known: Mapping[str, int]) -> bytes:
    rule, dashes, reason = line.partition(" -- ")
    verb, name, *conditions = rule.split()
    if verb != "allow" or not dashes or not reason.strip() or len(conditions) % 3:
        raise ValueError
    checks: list[tuple[int, int, int]] = [(_AT_NUMBER, _JUMP_EQUAL, known[name])]
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
