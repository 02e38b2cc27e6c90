"""The names of the rules, and the error that a broken one raises.

Rule 1: a rule has one stable name, described in policy/rules.toml; a module that uses a name which is not described
there does not load, and so the checker does not start.
"""

import tomllib
from pathlib import Path
from typing import Final

BOOK: Final = Path(__file__).resolve().parent.parent / "policy" / "rules.toml"

_KINDS: Final = ("refuse", "drop", "warn")
_FIELDS: Final = {"kind", "forbids", "why", "source"}


class RulebookError(Exception):
    """policy/rules.toml lacks a rule that the program uses, or describes one badly."""


def load(path: Path = BOOK) -> dict[str, dict[str, str]]:
    """Return every described rule. Raises RulebookError when a description is not whole."""
    try:
        book = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RulebookError(f"{path}: {error}") from error
    for name, row in book.items():
        if not isinstance(row, dict) or row.keys() != _FIELDS or row["kind"] not in _KINDS:
            raise RulebookError(f"{path}: [{name}] needs exactly {sorted(_FIELDS)}, and a kind of {_KINDS}")
    return book


_BOOK: Final = load()
DECLARED: Final[set[str]] = set()  # what the loaded modules use


def rule(name: str, kind: str = "refuse") -> str:
    """Return the name of a described rule, so that a module can raise it."""
    if _BOOK.get(name, {}).get("kind") != kind:
        raise RulebookError(f"{BOOK}: the program uses [{name}] of kind {kind!r}, which is not described")
    DECLARED.add(name)
    return name


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
