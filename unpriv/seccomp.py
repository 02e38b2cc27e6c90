"""From policy/syscalls/NAME.seccomp to the BPF program that the kernel runs on every system call.

Rule 1: the reviewed text is the only source; a line without a reason, an unknown call or an unknown word is refused.
Rule 2: what no line allows kills the process; so do a foreign architecture and the x32 calls.

Grammar, one rule a line, ``#`` starts a comment line::

    allow | errno(NAME) | kill   CALL   [argN OP VALUE]...   -- reason

All conditions of a line must hold, lines of one call are tried in order, the first that holds decides. OP is ``==`` or
``!=`` (the whole 64-bit word), ``!&`` (none of the bits set) or ``>=``/``<`` (unsigned). VALUE is a number or a name of
CONSTANTS. A negative value means a C int: it holds for both of its 64-bit forms.
"""

import errno
import os
import re
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

POLICY: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "policy", "syscalls")

# The names that a policy may use for a value; from linux/*.h of the same name.
CONSTANTS: Final = {
    "PROT_EXEC": 4, "MAP_ANONYMOUS": 0x20,
    "MADV_DONTNEED": 4, "MADV_FREE": 8,
    "AT_EMPTY_PATH": 0x1000, "AT_FDCWD": -100,
    "AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10, "AF_NETLINK": 16,
    "SOCK_STREAM": 1, "SOCK_DGRAM": 2,
    "F_DUPFD": 0, "F_GETFD": 1, "F_SETFD": 2, "F_GETFL": 3, "F_SETFL": 4, "F_DUPFD_CLOEXEC": 1030,
    "FIOCLEX": 0x5451, "FIONBIO": 0x5421, "FIONREAD": 0x541B, "TCGETS": 0x5401,
    "CLONE_THREAD": 0x10000, "CLONE_VM": 0x100,
    "PR_GET_SECCOMP": 21, "PR_SET_NAME": 15, "PR_GET_NO_NEW_PRIVS": 39,
    "SIGKILL": 9, "SIGTERM": 15,
    "O_WRONLY": 1, "O_RDWR": 2, "O_CREAT": 0o100, "O_TRUNC": 0o1000,
}  # fmt: skip

_AUDIT_ARCH: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_X32_BIT: Final = 0x40000000

_ALLOW: Final = 0x7FFF0000  # SECCOMP_RET_*, seccomp(2)
_KILL: Final = 0x80000000
_ERRNO: Final = 0x00050000

_LD: Final = 0x20  # BPF_LD|BPF_W|BPF_ABS
_JEQ: Final = 0x15
_JGT: Final = 0x25
_JGE: Final = 0x35
_JSET: Final = 0x45
_RET: Final = 0x06
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16  # struct seccomp_data

_RULE: Final = re.compile(r"(allow|kill|errno\((\w+)\))\s+(\w+)((?:\s+arg[0-5]\s+\S+\s+\S+)*)\s+--\s+(\S.*)")
_CONDITION: Final = re.compile(r"arg([0-5])\s+(\S+)\s+(\S+)")


class PolicyError(Exception):
    """A policy file says something that this program does not understand; the message names the line."""


class Condition(NamedTuple):
    """One argument of a call compared with one value."""

    argument: int
    operator: str
    value: int


class Rule(NamedTuple):
    """One line of a policy; ``number`` is None on an architecture that lacks the call."""

    call: str
    number: int | None
    conditions: tuple[Condition, ...]
    action: int
    reason: str


def load(name: str, machine: str) -> list[Rule]:
    """Return the rules of policy/syscalls/NAME.seccomp for one architecture.

    Raises:
        PolicyError: a line is not understood, or the architecture is not supported.
        OSError: there is no such policy.
    """
    return parse(_read(f"{name}.seccomp"), f"{name}.seccomp", machine)


def _read(name: str) -> str:
    with open(os.path.join(POLICY, name), encoding="utf-8") as file:
        return file.read()


def parse(text: str, source: str, machine: str) -> list[Rule]:
    """Return the rules that a policy text states. Raises PolicyError with the line's number."""
    if machine not in _AUDIT_ARCH:
        raise PolicyError(f"{source}: no system call numbers for the architecture {machine}")
    numbers = _numbers(machine)
    rules = []
    for count, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            rules.append(_rule(line.strip(), f"{source}:{count}", numbers))
    return rules


def _numbers(machine: str) -> dict[str, int | None]:
    column = {"x86_64": 1, "aarch64": 2}[machine]
    rows = (line.split() for line in _read("numbers.txt").splitlines() if line[0] != "#")
    return {row[0]: None if row[column] == "-" else int(row[column]) for row in rows}


def _rule(line: str, where: str, numbers: dict[str, int | None]) -> Rule:
    match = _RULE.fullmatch(line)
    if match is None:
        raise PolicyError(
            f"{where}: expected `allow|errno(NAME)|kill CALL [argN OP VALUE]... -- reason`, found {line!r}"
        )
    verb, error_name, call, tail, reason = match.groups()
    if call not in numbers:
        raise PolicyError(f"{where}: unknown system call {call!r}")
    conditions = tuple(_condition(m, where) for m in _CONDITION.finditer(tail))
    return Rule(call, numbers[call], conditions, _action(verb, error_name, where), reason)


def _action(verb: str, error_name: str | None, where: str) -> int:
    if error_name is None:
        return _ALLOW if verb == "allow" else _KILL
    code = getattr(errno, error_name, None)
    if not isinstance(code, int):
        raise PolicyError(f"{where}: unknown error {error_name!r}")
    return _ERRNO | code


def _condition(match: re.Match[str], where: str) -> Condition:
    argument, operator, word = match.groups()
    if operator not in ("==", "!=", "!&", ">=", "<"):
        raise PolicyError(f"{where}: unknown operator {operator!r}")
    try:
        value = CONSTANTS[word] if word in CONSTANTS else int(word, 0)
    except ValueError:
        raise PolicyError(f"{where}: unknown value {word!r}") from None
    if not -(1 << 31) <= value < 1 << 64 or (value < 0 and operator != "=="):
        raise PolicyError(f"{where}: the value {word} does not fit {operator}")
    return Condition(int(argument), operator, value)


def assemble(rules: Iterable[Rule], machine: str) -> bytes:
    """Return the BPF program for the rules: first that holds decides, none kills the process."""
    code = [_op(_LD, _ARCH_OFFSET), _op(_JEQ, _AUDIT_ARCH[machine], 1, 0), _op(_RET, _KILL), _op(_LD, _NR_OFFSET)]
    if machine == "x86_64":
        code += [_op(_JGE, _X32_BIT, 0, 1), _op(_RET, _KILL)]
    for rule in rules:
        if rule.number is not None:
            code += _assemble_rule(rule.number, rule)
    code.append(_op(_RET, _KILL))
    return b"".join(code)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _assemble_rule(number: int, rule: Rule) -> list[bytes]:
    """Return the instructions of one rule; on entry and on falling through, the accumulator holds the call's number."""
    tests: list[bytes] = []
    for condition in reversed(rule.conditions):
        tests = _assemble_condition(condition, len(tests)) + tests
    body = [*tests, _op(_RET, rule.action)]
    if tests:
        body.append(_op(_LD, _NR_OFFSET))  # a failed condition lands here and goes on to the next rule
    return [_op(_JEQ, number, 0, len(body)), *body]


def _assemble_condition(condition: Condition, following: int) -> list[bytes]:
    """Return the test of one argument: it falls through where it holds, else jumps past ``following`` and the RET."""
    low_at = _ARGS_OFFSET + 8 * condition.argument
    load_low, load_high = _op(_LD, low_at), _op(_LD, low_at + 4)
    low, high = condition.value & 0xFFFFFFFF, (condition.value >> 32) & 0xFFFFFFFF
    fail = following + 1  # over what follows and the RET, counted from behind the last instruction of this test
    if condition.operator == "==" and condition.value < 0:
        # A C int is passed with its upper half zero or with its sign spread over it.
        upper = [_op(_JEQ, 0, 1, 0), _op(_JEQ, 0xFFFFFFFF, 0, fail)]
        return [load_low, _op(_JEQ, low, 0, fail + 3), load_high, *upper]
    if condition.operator == "==":
        return [load_low, _op(_JEQ, low, 0, fail + 2), load_high, _op(_JEQ, high, 0, fail)]
    if condition.operator == "!=":
        return [load_low, _op(_JEQ, low, 0, 2), load_high, _op(_JEQ, high, fail, 0)]
    if condition.operator == "!&":
        return [load_low, _op(_JSET, low, fail + 2, 0), load_high, _op(_JSET, high, fail, 0)]
    if condition.operator == ">=":
        return [load_high, _op(_JGT, high, 3, 0), _op(_JEQ, high, 0, fail + 2), load_low, _op(_JGE, low, 0, fail)]
    return [load_high, _op(_JGT, high, fail + 3, 0), _op(_JEQ, high, 0, 2), load_low, _op(_JGE, low, fail, 0)]
