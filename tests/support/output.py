"""Holds what a command printed with ``--json`` against the published schema: policy/schema/output.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator

SCHEMA: Final[dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[2] / "policy/schema/output.json").read_text(encoding="utf-8")
)
STREAMS: Final = ("pull", "resume", "activate", "deactivate", "rm", "gc", "check", "cancel")
GROUPS: Final = ("config", "policy")


@cache
def _validator(name: str, partial: bool) -> Draft202012Validator:
    chosen = {**SCHEMA["properties"][name], "$defs": SCHEMA["$defs"]}
    if partial:  # `-o COLUMNS` left fields out
        chosen = json.loads(json.dumps(chosen), object_hook=lambda o: {k: v for k, v in o.items() if k != "required"})
    return Draft202012Validator(chosen)


def check_output(words: Sequence[str], output: str) -> None:
    """Fail unless the output of ``imgpull WORDS`` is what the schema says; without ``--json`` all is well."""
    if "--json" not in words or "--manifest" in words or not output:
        return
    name = " ".join(words[:2]) if words[0] in GROUPS else words[0]
    lines = output.splitlines()
    if _is_error(lines[-1]):
        _validator("error", False).validate(json.loads(lines.pop()))
        if not lines:
            return
    if name in STREAMS and "--firecracker" not in words:
        for line in lines:
            _validator(name, False).validate(json.loads(line))
    else:
        _validator(name, "-o" in words).validate(json.loads("\n".join(lines)))


def _is_error(line: str) -> bool:
    return line.startswith("{") and line.endswith("}") and json.loads(line).get("type") == "error"
