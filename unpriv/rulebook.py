"""The names of the rules, and the error that a broken one raises.

Rule 1: a rule has one stable name, described in policy/rules.toml; where a module uses a name that is not described
there, verify() says so and the checker does not start.
"""

import re
import tomllib
from pathlib import Path
from typing import Final

BOOK: Final = Path(__file__).resolve().parent.parent / "policy" / "rules.toml"

_KINDS: Final = ("refuse", "drop", "warn")
_FIELDS: Final = {"kind", "forbids", "why", "source"}


class RulebookError(Exception):
    """policy/rules.toml cannot be used: the message names the file, the line and what is wrong."""


def load(path: Path = BOOK) -> dict[str, dict[str, str]]:
    """Return every described rule. Raises RulebookError when a description is not whole."""
    try:
        text = path.read_text("utf-8")
        book = tomllib.loads(text)
    except (OSError, ValueError) as error:  # of TOML, the message ends with "(at line N, column M)"
        raise RulebookError(f"{path}: {error}") from error
    for name, row in book.items():
        if not isinstance(row, dict) or row.keys() != _FIELDS or not all(isinstance(v, str) for v in row.values()):
            needs = f"needs exactly {', '.join(sorted(_FIELDS))}, each a string"
        elif row["kind"] not in _KINDS:
            needs = f"is of kind {row['kind']!r}, expected one of {', '.join(_KINDS)}"
        else:
            continue
        raise RulebookError(f"{path}:{_line(text, name)}: [{name}] {needs}")
    return book


def _line(text: str, name: str) -> int:
    """Return the number of the line that opens a table or sets a key; 1 when it is not written plainly."""
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*(\[\s*)?[\"']?{re.escape(name)}[\"']?\s*(?(1)\]|=)", line):
            return number
    return 1


DECLARED: Final[dict[str, str]] = {}  # the rules that the loaded modules use, and their kinds


def rule(name: str, kind: str = "refuse") -> str:
    """Return the name of a rule, so that a module can raise it; verify() looks whether it is described."""
    DECLARED[name] = kind
    return name


def verify(path: Path = BOOK) -> None:
    """Compare the rules of the loaded modules with the book. Raises RulebookError where one is not described."""
    book = load(path)
    for name, kind in DECLARED.items():
        if name not in book:
            raise RulebookError(f"{path}: the program uses [{name}], which is not described")
        if book[name]["kind"] != kind:
            line = _line(path.read_text("utf-8"), name)
            raise RulebookError(f"{path}:{line}: [{name}] is of kind {book[name]['kind']!r}, expected {kind!r}")


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
