"""Shows what is granted and limited: every value of policy/ with the place where it is written.

Rule 1: this file decides nothing and repeats nothing; the programs that are bound by policy/ load it themselves.
Rule 2: an administrator's file below /etc/imgpull goes before ours, key by key, and is named where it does.
Rule 3: the installed helper carries policy/ in itself; whether it is this one is asked of it, by digest.
"""

import hashlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from broker.errors import ImgpullError
from broker.settings import POLICY_DIR, SYSTEM_DIR

OVERRIDABLE = ("helper", "limits")  # files that an administrator may override: privhelper/policy.py, unpriv/limits.py


@dataclass(frozen=True, slots=True)
class Grant:
    """One value in force."""

    key: str
    value: str
    origin: str  # file:line

    def to_json(self) -> dict[str, Any]:
        """Return it as `--json` prints it."""
        return asdict(self)


def grants(policy_dir: Path = POLICY_DIR, system_dir: Path = SYSTEM_DIR) -> list[Grant]:
    """Return every limit, grant and system call in force, in the order of the files."""
    found: list[Grant] = []
    for path in sorted(policy_dir.glob("*.toml")):
        if path.stem == "rules":
            continue  # texts for people: `imgpull explain`
        values = {g.key: g for g in _flatten(path.stem, _load(path), path)}
        override = system_dir / path.name
        if path.stem in OVERRIDABLE and override.exists():
            values |= {g.key: g for g in _flatten(path.stem, _load(override), override)}
        found += values.values()
    for path in sorted((policy_dir / "syscalls").glob("*.seccomp")):
        found += _system_calls(path)
    for path in sorted((policy_dir / "systemd").rglob("imgpull-*")):
        found += _directives(path)
    return found


def helpers_digest(policy_dir: Path = POLICY_DIR, system_dir: Path = SYSTEM_DIR) -> str:
    """Return what the root helper answers to `hello` if it is bound by these very files (privhelper/policy.py)."""
    syscalls = ("numbers.txt", "populate.seccomp", "verify.seccomp")
    names = ["helper.toml", "protocol.toml", "authority.toml", *(f"syscalls/{name}" for name in syscalls)]
    texts = {name: (policy_dir / name).read_bytes() for name in names}
    override = system_dir / "helper.toml"
    if override.exists():
        texts["override"] = override.read_bytes()
    whole = hashlib.sha256()
    for name, text in sorted(texts.items()):
        whole.update(f"{name} {len(text)}\n".encode() + text)
    return "sha256:" + whole.hexdigest()


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ImgpullError("configuration", f"{path} cannot be read", str(error)) from error


def _flatten(prefix: str, value: Any, path: Path) -> Iterator[Grant]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}", inner, path)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            name = inner.get("name", number) if isinstance(inner, dict) else number
            yield from _flatten(f"{prefix}.{name}", inner, path)
    else:
        yield Grant(prefix, _shown(value), f"{path}:{_line(path, prefix)}")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}"
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


def _line(path: Path, key: str) -> int:
    """Return the line that sets a key; the tables above it narrow the search down."""
    words = key.split(".")
    lines = path.read_text(encoding="utf-8").splitlines()
    start = 0
    for word in words[1:-1]:
        for number in range(start, len(lines)):
            if re.match(rf"\s*(\[+.*\b{re.escape(word)}\b.*\]+|name\s*=\s*\"{re.escape(word)}\")", lines[number]):
                start = number
                break
    for number in range(start, len(lines)):
        if re.match(rf"\s*\"?{re.escape(words[-1])}\"?\s*=", lines[number]):
            return number + 1
    return start + 1


def _system_calls(path: Path) -> Iterator[Grant]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        rule, separator, reason = line.partition(" -- ")
        if separator and not line.lstrip().startswith("#"):
            action, name, *conditions = rule.split()
            shown = f"{action} {' '.join(conditions)}".strip()
            yield Grant(f"syscalls.{path.stem}.{name}", f"{shown} ({reason.strip()})", f"{path}:{number}")


def _directives(path: Path) -> Iterator[Grant]:
    """Yield what a unit asks of systemd; a directive that is set more than once is shown as often."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        name, separator, value = line.partition("=")
        if separator and name.isalpha():
            yield Grant(f"systemd.{path.name}.{name}", value, f"{path}:{number}")
