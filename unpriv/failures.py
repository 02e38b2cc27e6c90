"""How the fetcher says that something did not work.

Rule 1: a failure carries one of the wire's codes and says whether the same request may work later.
Rule 2: its text is ours; what a server said is quoted through ``quote``, which bounds it and leaves plain ASCII.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from broker.protocol import FetchCode

QUOTE_LIMIT: Final = 200  # characters of a server's own words in a message


@dataclass(slots=True)
class FetchError(Exception):
    """One object, listing or pin could not be had."""

    code: FetchCode
    message: str
    retryable: bool = False
    retry_after_s: float | None = None  # what the server asked for
    throttled: bool = False  # the server wants fewer requests, from all streams

    def __str__(self) -> str:
        return self.message


def quote(untrusted_text: object) -> str:
    """Return what a server said as bounded, printable ASCII."""
    text = str(untrusted_text)[: QUOTE_LIMIT + 1]
    shown = "".join(c if " " <= c <= "~" else "?" for c in text[:QUOTE_LIMIT])
    return shown + "..." if len(text) > QUOTE_LIMIT else shown


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise, instead of a nursery's group, the one exception that says most.

    That is a bug or a cancellation before all, then `changed`, then the first.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        leaves = list(leaves_of(group))
        others = [leaf for leaf in leaves if not isinstance(leaf, FetchError)]
        changed = [leaf for leaf in leaves if isinstance(leaf, FetchError) and leaf.code == "changed"]
        raise (others + changed + leaves)[0] from None


def leaves_of(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    """Yield the exceptions of a group and of the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves_of(error)
        else:
            yield error
