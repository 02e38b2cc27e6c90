"""What a check has found: refusals, what was left out, what was changed.

Rule 1: without ``all_violations`` the first refusal ends the check; with it, those that leave the framing intact are
collected until the report is full.
Rule 2: every list is bounded by policy/limits.toml, [report].
"""

import json
from collections import Counter
from typing import Any, Final

from unpriv.limits import Limits
from unpriv.rulebook import RejectedError, escape, rule

OMITTED_TOO_MANY: Final = rule("omitted_too_many")


# A report is one line of at most broker.protocol.MAX_LINE bytes (1 MiB): each list gets its share.
_SHARE_BYTES: Final = 300_000


class Findings:
    """The growing result of one check."""

    def __init__(self, limits: Limits, layer: int, all_violations: bool):
        """Begin with nothing found in layer ``layer``."""
        self.violations: list[dict[str, Any]] = []
        self.warnings: list[dict[str, Any]] = []
        self.dropped: Counter[str] = Counter()
        self.omitted: list[str] = []
        self._limits = limits.report
        self._layer = layer
        self._all = all_violations
        self._violations_bytes = self._warnings_bytes = self._omitted_bytes = 0

    def refuse(self, error: RejectedError) -> None:
        """Record a refusal after which reading can go on; raise it where one is enough or the report is full."""
        if not self._all or len(self.violations) + 1 >= self._limits.violations:
            raise error
        described = self.describe(error)
        self._violations_bytes += len(json.dumps(described))
        if self._violations_bytes > _SHARE_BYTES:
            raise error
        self.violations.append(described)

    def warn(self, warning: RejectedError) -> None:
        """Record something that was changed; what does not fit the list is still counted."""
        self.dropped[warning.rule] += 1
        described = self.describe(warning)
        self._warnings_bytes += len(json.dumps(described))
        if len(self.warnings) < self._limits.warnings and self._warnings_bytes <= _SHARE_BYTES:
            self.warnings.append(described)

    def omit(self, name: bytes, what: str) -> None:
        """Record an entry that the operator wants left out."""
        shown = f"{what} {escape(name)}"
        self._omitted_bytes += len(json.dumps(shown))
        if len(self.omitted) >= self._limits.omitted or self._omitted_bytes > _SHARE_BYTES:
            raise RejectedError(OMITTED_TOO_MANY, f"after {len(self.omitted)} omitted entries no more can be listed")
        self.omitted.append(shown)

    def describe(self, error: RejectedError) -> dict[str, Any]:
        """Return one violation or warning in the form of the report."""
        name = None if error.name is None else escape(error.name)
        place = {"layer": self._layer, "entry": error.entry, "offset": error.offset}
        return {"rule": error.rule, **place, "name": name, "reason": error.reason[:1024]}
