"""What a checker's refusal says to the user: one violation in words, all of them as data or as lines.

Rule: this is imported before a check has begun, so it needs nothing that takes time to load.
"""

from typing import TYPE_CHECKING

from broker.errors import ImgpullError

if TYPE_CHECKING:
    from broker.protocol import Rejected, Violation


def rejected(name: str, verdict: "Rejected") -> ImgpullError:
    """Return the error for a refused archive: its first violation in words, all of them as data."""
    first = verdict.violations[0]
    more = len(verdict.violations) - 1
    return ImgpullError(
        "archive-rejected",
        f"{name}: refused by rule {first.rule}",
        f"{_place(first)}: {first.reason}" + (f" (and {more} more)" if more else ""),
        f"run `imgpull explain {first.rule}`; the archive has to be made anew",
        violations=[v.model_dump() for v in verdict.violations],
    )


def listed(verdict: "Rejected") -> str:
    """Return every violation on a line of its own."""
    lines = [f"{_place(one)}: {one.rule}: {one.reason}" for one in verdict.violations]
    if not verdict.complete:
        lines.append("and perhaps more: reading could not go on, or the list is full")
    return "\n".join(lines)


def _place(one: "Violation") -> str:
    place = [f"layer {one.layer}"]
    place += [f"entry {one.entry}"] if one.entry is not None else []
    place += [f"byte {one.offset}"] if one.offset is not None else []
    return ", ".join(place) + (f" {one.name}" if one.name is not None else "")
