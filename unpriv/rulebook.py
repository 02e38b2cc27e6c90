"""The names of the rules, and the error that a broken one raises.

Rule 1: a rule has one stable name, described in policy/rules.toml; where a module uses a name that is not described
there, verify() says so and the checker does not start.
Rule 2: the book is TOML of the plainest kind, a `[rule]` and then `key = "words"` a line, so that each start of a
checker reads it in half a millisecond; whatever else stands there is refused with its line.
"""

import os
import re
from typing import Final, NamedTuple

BOOK: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "policy", "rules.toml")

_KINDS: Final = ("refuse", "drop", "warn")
_FIELDS: Final = {"kind", "forbids", "why", "source"}
_LINE: Final = re.compile(r'\[([a-z0-9_]+)\]|(\w+) = "([^"\\]*)"|#.*|')


class RulebookError(Exception):
    """policy/rules.toml cannot be used: the message names the file, the line and what is wrong."""


class Entry(NamedTuple):
    """One rule as the book describes it."""

    line: int  # where it begins
    words: dict[str, str]  # kind, forbids, why, source


def load(path: str = BOOK) -> dict[str, Entry]:
    """Return every described rule. Raises RulebookError when a description is not whole."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, ValueError) as error:
        raise RulebookError(f"{path}: {error}") from error
    book: dict[str, Entry] = {}
    words: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or match[1] in book or (match[2] and (not book or match[2] in words)):
            raise RulebookError(f'{path}:{number}: expected a new `[rule]` or a new `key = "words"`, found {line!r}')
        if match[1]:
            words = {}
            book[match[1]] = Entry(number, words)
        elif match[2]:
            words[match[2]] = match[3]
    for name, (number, words) in book.items():
        if words.keys() != _FIELDS:
            raise RulebookError(f"{path}:{number}: [{name}] needs exactly {', '.join(sorted(_FIELDS))}")
        if words["kind"] not in _KINDS:
            needs = f"is of kind {words['kind']!r}, expected one of {', '.join(_KINDS)}"
            raise RulebookError(f"{path}:{number}: [{name}] {needs}")
    return book


DECLARED: Final[dict[str, str]] = {}  # the rules that the loaded modules use, and their kinds


def rule(name: str, kind: str = "refuse") -> str:
    """Return the name of a rule, so that a module can raise it; verify() looks whether it is described."""
    DECLARED[name] = kind
    return name


def verify(path: str = BOOK) -> None:
    """Compare the rules of the loaded modules with the book. Raises RulebookError where one is not described."""
    book = load(path)
    for name, kind in DECLARED.items():
        if name not in book:
            raise RulebookError(f"{path}: the program uses [{name}], which is not described")
        line, words = book[name]
        if words["kind"] != kind:
            raise RulebookError(f"{path}:{line}: [{name}] is of kind {words['kind']!r}, expected {kind!r}")


class RejectedError(Exception):
    """The archive breaks a rule. Where it was found is filled in by whoever knows it, layer by layer."""

    def __init__(
        self,
        name_of_rule: str,
        reason: str,
        name: bytes | None = None,
        entry: int | None = None,
        offset: int | None = None,
    ):
        """Take the rule, the reason for people, and as much of the place as is known."""
        super().__init__(name_of_rule, reason)
        self.rule = name_of_rule
        self.reason = reason
        self.name = name
        self.entry = entry  # number of the tar member, from 1
        self.offset = offset  # of its header, in bytes of the uncompressed tar

    def at(self, name: bytes | None, entry: int, offset: int) -> "RejectedError":
        """Fill in what is not known yet of the place; return the error itself."""
        self.name = name if self.name is None else self.name
        self.entry = entry if self.entry is None else self.entry
        self.offset = offset if self.offset is None else self.offset
        return self


def escape(name: bytes, limit: int = 1024) -> str:
    """Return a name for people: printable, without control characters, at most about ``limit`` characters."""
    text = name[: limit + 1].decode("utf-8", "surrogateescape")
    shown = "".join(c if c.isprintable() and c != "\\" else _escape_one(c) for c in text[:limit])
    return shown if len(name) <= limit else f"{shown}… ({len(name)} bytes)"


def _escape_one(character: str) -> str:
    # By hand: the codec "unicode_escape" would be imported at its first use, from a file.
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if character == "\\":
        return "\\\\"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
