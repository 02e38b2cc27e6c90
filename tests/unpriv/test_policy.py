"""The files of policy/ that the checker loads: limits, rules, system calls. What is wrong in them stops the program."""

from __future__ import annotations

import errno
import pkgutil
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import unpriv
from tests.unpriv import test_decompress, test_framing, test_layers, test_members
from tests.unpriv.bpf import verdict
from unpriv import rulebook, seccomp
from unpriv.rulebook import RulebookError
from unpriv.seccomp import PolicyError

MACHINES = ["x86_64", "aarch64"]
KILL, ALLOW = 0x80000000, 0x7FFF0000

# ---------------------------------------------------------------- rules


def declared() -> dict[str, str]:
    for module in pkgutil.iter_modules(unpriv.__path__):
        import_module(f"unpriv.{module.name}")
    return rulebook.DECLARED


def test_every_rule_is_described_and_every_description_is_used() -> None:
    assert declared() == {name: row.words["kind"] for name, row in rulebook.load().items()}


def test_the_book_is_the_same_to_a_reader_of_toml() -> None:
    told = tomllib.loads(Path(rulebook.BOOK).read_text("utf-8"))
    assert {name: row.words for name, row in rulebook.load().items()} == told


def test_every_refusal_has_a_test_that_meets_it() -> None:
    sources = [Path(str(m.__file__)) for m in (test_framing, test_members, test_layers, test_decompress)]
    sources += [Path(__file__).with_name(n) for n in ("test_archive.py", "test_lower.py", "test_check.py")]
    text = "".join(path.read_text("utf-8") for path in sources)
    assert [name for name in rulebook.load() if f'"{name}"' not in text] == []


WHOLE = 'forbids = "x"\nwhy = "y"\nsource = "z"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[other]\nkind = "refuse"\n' + WHOLE, ": the program uses [some_rule], which is not described"),
        ('\n[some_rule]\nkind = "drop"\n' + WHOLE, ":2: [some_rule] is of kind 'drop', expected 'refuse'"),
        ('\n\n[some_rule]\nkind = "refuses"\n' + WHOLE, ":3: [some_rule] is of kind 'refuses', expected one of"),
        ('[a]\nkind = "drop"\n' + WHOLE + '[some_rule]\nkind = "refuse"\n', ":6: [some_rule] needs exactly forbids,"),
        (
            '[some_rule]\nkind = "refuse"\nforbids = 1\nwhy = "y"\nsource = "z"\n',
            ":3: expected a new `[rule]` or a new",
        ),
        ("some_rule = 3\n", ":1: expected a new"),
        ('kind = "drop"\n', ":1: expected a new"),
        ("[some_rule]\nkind = \n", ":2: expected a new"),
        ("[some_rule]\n[some_rule]\n", ":2: expected a new"),
        ('[some_rule]\nkind = "drop"\nkind = "refuse"\n', ":3: expected a new"),
    ],
)
def test_a_rule_that_is_not_described_stops_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(text, "utf-8")
    monkeypatch.setattr(rulebook, "DECLARED", {"some_rule": "refuse"})
    with pytest.raises(RulebookError) as caught:
        rulebook.verify(str(path))
    assert f"{path}" in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain", "plain"),
        (b"a\\b", "a\\\\b"),
        (b"\x1b[31m\n", "\\x1b[31m\\x0a"),
        ("fő".encode(), "fő"),
        (b"caf\xe9", "caf\\xe9"),
        ("a\u202eb".encode(), "a\\u202eb"),
        ("\U000e0001".encode(), "\\U000e0001"),
        (b"\xed\xa0\x80", "\\xed\\xa0\\x80"),
    ],
)
def test_names_are_escaped_for_people(name: bytes, shown: str) -> None:
    assert rulebook.escape(name) == shown


def test_long_names_are_cut() -> None:
    assert rulebook.escape(b"n" * 5000, 10) == "n" * 10 + "… (5000 bytes)"


# ---------------------------------------------------------------- system calls


@pytest.mark.parametrize("machine", MACHINES)
def test_the_checkers_policy_means_what_it_says(machine: str) -> None:
    rules = seccomp.load("check", machine)
    program = seccomp.assemble(rules, machine)
    numbers = seccomp._numbers(machine)

    def decide(call: str, *arguments: int) -> int:
        number = numbers[call]
        assert number is not None
        return verdict(program, machine, number, arguments)

    named = {rule.call for rule in rules}
    for call, number in numbers.items():
        if number is not None and call not in named:
            assert verdict(program, machine, number, ()) == KILL, call
    for descriptor in range(64):
        assert decide("write", descriptor) == (ALLOW if 1 <= descriptor <= 6 else KILL)
    assert decide("write", 1 << 32 | 1) == KILL
    for fd in (-1, 0xFFFFFFFF):
        assert decide("mmap", 0, 4096, 3, 0x22, fd) == ALLOW
        assert decide("mmap", 0, 4096, 7, 0x22, fd) == KILL  # executable
    assert decide("mmap", 0, 4096, 1, 2, 0) == KILL  # of a file
    assert decide("mmap", 0, 4096, 3, 0x22, 0x1_FFFFFFFF) == KILL
    assert decide("madvise", 0, 4096, 4) == ALLOW
    assert decide("madvise", 0, 4096, 21) == KILL
    assert decide("prctl", 21) == ALLOW
    assert decide("prctl", 4, 1) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_foreign_calls_die(machine: str) -> None:
    program = seccomp.assemble(seccomp.parse("allow read -- a reason", "x", machine), machine)
    other = MACHINES[1 - MACHINES.index(machine)]
    assert verdict(program, machine, seccomp._numbers(machine)["read"] or 0, ()) == ALLOW
    assert verdict(program, other, seccomp._numbers(machine)["read"] or 0, ()) == KILL
    assert verdict(program, "x86_64", 0x40000000, ()) == KILL


CONDITIONS: dict[str, Callable[[int, int], bool]] = {
    "arg0 == 5": lambda a, b: a == 5,
    "arg0 == 0x100000005": lambda a, b: a == 0x100000005,
    "arg0 == -1": lambda a, b: a in (0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF),
    "arg0 != 5": lambda a, b: a != 5,
    "arg0 != 0x100000005": lambda a, b: a != 0x100000005,
    "arg0 !& 0x4": lambda a, b: a & 4 == 0,
    "arg0 !& 0x100000004": lambda a, b: a & 0x100000004 == 0,
    "arg0 >= 5": lambda a, b: a >= 5,
    "arg0 >= 0x200000001": lambda a, b: a >= 0x200000001,
    "arg0 < 5": lambda a, b: a < 5,
    "arg0 < 0x200000001": lambda a, b: a < 0x200000001,
    "arg0 == 5 arg1 == 7": lambda a, b: a == 5 and b == 7,
    "arg0 !& 4 arg1 < 9 arg0 != 1": lambda a, b: a & 4 == 0 and b < 9 and a != 1,
}
VALUES = [0, 1, 4, 5, 6, 7, 0xFFFFFFFF, 0x100000000, 0x100000004, 0x100000005, 0x200000000, 0x200000001, (1 << 64) - 1]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions(condition: str) -> None:
    text = f"errno(EPERM) read {condition} -- first\nallow read -- then\nallow write -- and another call"
    program = seccomp.assemble(seccomp.parse(text, "x", "x86_64"), "x86_64")
    for first in VALUES:
        for second in (0, 7, 9):
            expected = 0x00050000 | errno.EPERM if CONDITIONS[condition](first, second) else ALLOW
            assert verdict(program, "x86_64", 0, (first, second)) == expected, (first, second)
            assert verdict(program, "x86_64", 1, (first, second)) == ALLOW
            assert verdict(program, "x86_64", 2, (first, second)) == KILL


@pytest.mark.parametrize(
    "line",
    [
        "allow read",
        "allow read --",
        "allow read --   ",
        "allow reed -- why",
        "permit read -- why",
        "errno(ENOSUCH) read -- why",
        "errno read -- why",
        "allow read arg6 == 1 -- why",
        "allow read arg0 = 1 -- why",
        "allow read arg0 == one -- why",
        "allow read arg0 == -- why",
        "allow read arg0 != -1 -- why",
        "allow read arg0 == 0x10000000000000000 -- why",
        "allow read arg0 == 1 arg1 -- why",
    ],
)
def test_a_line_that_is_not_understood_names_itself(line: str) -> None:
    with pytest.raises(PolicyError, match=r"x:3: "):
        seccomp.parse(f"# a comment\n\n{line}\n", "x", "x86_64")


def test_unknown_architectures_and_policies() -> None:
    with pytest.raises(PolicyError, match="riscv64"):
        seccomp.parse("", "x", "riscv64")
    with pytest.raises(OSError, match="nothing"):
        seccomp.load("nothing", "x86_64")


def test_a_call_that_one_architecture_lacks_is_left_out_there() -> None:
    rules = seccomp.parse("allow open -- old", "x", "aarch64")
    assert rules[0].number is None
    assert len(seccomp.assemble(rules, "aarch64")) == len(seccomp.assemble([], "aarch64"))
