"""What a step may raise, whose fault an error is, and what happens next.

Rule 1: a step ends by returning its result or by raising; Done, Abort, Retry and Handoff are its four words.
Rule 2: any other error is judged by the step's policy; a programming error aborts whatever the policy says.
Rule 3: trio's exception groups are taken apart here and nowhere else; the worst of several errors decides.
Rule 4: cancellation and shutdown are not errors of a step and never pass through here.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import trio
from pydantic import BaseModel, JsonValue


class MachineError(Exception):
    """Base of every error that the library itself raises to the program."""


class DefinitionError(MachineError):
    """A machine is declared wrongly; the program has to be mended."""


class UsageError(MachineError):
    """A call that cannot be meant: unknown queue, a run that would wait for itself, an unknown predecessor."""


class UnknownRunError(MachineError):
    """No run has this id."""


class StoppedError(MachineError):
    """The engine is shutting down; the run is not finished and will be resumed by a later start."""


class StateError(MachineError):
    """The state file could not be read or written; the run that needed it stops where it is."""


class BusyStateError(StateError):
    """Another process kept the state file locked for too long."""


class DamagedStateError(StateError):
    """The state file is not what this library wrote."""


class ForeignStateError(StateError):
    """The state file belongs to another program or to a newer version of this one."""


class Signal(Exception):  # noqa: N818  the four words of a step are not errors
    """Base of the four words that a step may raise."""


class Done(Signal):
    """End the run with success now; the steps that are left are not run."""

    def __init__(self, result: BaseModel | None = None) -> None:
        super().__init__("done")
        self.result = result


class Abort(Signal):
    """End the run with failure now. ``kind`` is for programs, ``reason`` for people, ``detail`` for both."""

    def __init__(self, reason: str, *, kind: str = "error", detail: Mapping[str, JsonValue] | None = None) -> None:
        super().__init__(reason)
        self.reason, self.kind, self.detail = reason, kind, dict(detail or {})


class Retry(Signal):
    """Try this step again, after ``delay_s`` or the policy's backoff; it counts as an attempt."""

    def __init__(
        self,
        reason: str,
        *,
        delay_s: float | None = None,
        kind: str = "error",
        detail: Mapping[str, JsonValue] | None = None,
    ) -> None:
        super().__init__(reason)
        if delay_s is not None and not 0 <= delay_s < float("inf"):
            raise ValueError(f"delay_s must be finite and not negative, got {delay_s}")
        self.reason, self.delay_s, self.kind, self.detail = reason, delay_s, kind, dict(detail or {})


class Handoff(Signal):
    """End this run because another run, which must exist, does its work."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.run_id = run_id


# Errors that repeat themselves for ever: no retry helps, a person must read them.
PROGRAMMING: Final[tuple[type[Exception], ...]] = (
    TypeError,
    ValueError,  # pydantic's ValidationError is one
    AssertionError,
    AttributeError,
    NameError,
    LookupError,
    ArithmeticError,
    NotImplementedError,
    RecursionError,
    ImportError,
    SyntaxError,
    sqlite3.ProgrammingError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    MachineError,
)
# Errors of the world outside, which may be over at the next attempt.
TRANSIENT: Final[tuple[type[Exception], ...]] = (
    OSError,
    trio.TooSlowError,
    trio.BrokenResourceError,
    trio.BusyResourceError,
)

RetryOn = tuple[type[Exception], ...] | Callable[[Exception], "bool | Abort | Retry"]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors in a tree of exception groups, in order; an error that is no group is its own leaf."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def judge(error: BaseException, retry_on: RetryOn) -> Signal:
    """Say what an attempt's error means, in one Signal.

    Of several errors in a group the worst decides: a bug, then what ends the run, then what may be tried again, then
    Handoff and Done (success counts only if nothing failed beside it).

    Raises: whatever is not an Exception (KeyboardInterrupt, SystemExit), as it is.
    """
    found: list[Signal] = []
    for leaf in leaves(error):
        if isinstance(leaf, trio.Cancelled):
            continue  # the echo of a sibling's error inside a nursery; the error itself is another leaf
        if not isinstance(leaf, Exception):
            raise leaf
        found.append(_judge_leaf(leaf, retry_on))
    if not found:
        return Abort("the step was cancelled by a scope of its own", kind="bug")
    return max(found, key=_severity)  # the first of equals


def _judge_leaf(error: Exception, retry_on: RetryOn) -> Signal:
    if isinstance(error, Signal):
        return error
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, PROGRAMMING):
        return Abort(text, kind="bug")
    try:
        verdict = isinstance(error, retry_on) if isinstance(retry_on, tuple) else retry_on(error)
    except Exception as bug:
        return Abort(f"{text}; and judging it failed: {type(bug).__name__}: {bug}", kind="bug")
    if isinstance(verdict, Abort | Retry):
        return verdict
    return Retry(text) if verdict else Abort(text)


def _severity(signal: Signal) -> int:
    if isinstance(signal, Abort):
        return 5 if signal.kind == "bug" else 4
    return 3 if isinstance(signal, Retry) else 2 if isinstance(signal, Handoff) else 1
