"""What a machine is: its frozen steps, their types, and how each is tried again.

Rule 1: a machine is declared once, as a value; every method returns a new one, `end` closes it.
Rule 2: names are part of the state file; changing one is a new version.
Rule 3: what a step takes and gives is a frozen, strict pydantic model, so that the text in the state file is the truth.
"""

import hashlib
import json
import random
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, overload

from pydantic import BaseModel

from broker.machine.signals import TRANSIENT, DefinitionError, RetryOn

if TYPE_CHECKING:
    from broker.machine.records import Outcome
    from broker.machine.view import Run

Request = TypeVar("Request", bound=BaseModel)
Result = TypeVar("Result", bound=BaseModel)

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
# Names that the points of a machine itself use; a step so named would make two points one.
_RESERVED: Final = frozenset({"start", "resume", "cancel", "finish", "park"})


@dataclass(frozen=True, slots=True)
class Policy:
    """How often and how long a step is tried. Delays are 100 ms x 1.5 each time, +/- 50 %, at most 5 s.

    attempts: at most this many, counted in the state file, also over restarts.
    deadline_s: of all attempts and pauses together, without the time in which the program did not run.
    timeout_s: of one attempt; running over it counts as an error that may be tried again.
    retry_on: the errors to try again: types, or a function that says True, False, or the Abort or Retry to put in the
        error's place. Programming errors (see signals.PROGRAMMING) abort in any case and are not shown to it.
    crashes: so often may the process die in this step; then the run is aborted instead of killing it for ever.
    """

    attempts: int = 10
    deadline_s: float | None = None
    timeout_s: float | None = None
    retry_on: RetryOn = TRANSIENT
    first_delay_s: float = 0.1
    factor: float = 1.5
    jitter: float = 0.5
    max_delay_s: float = 5.0
    crashes: int = 25

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.crashes < 1:
            raise DefinitionError("a policy needs at least one attempt and one crash")
        if self.factor < 1 or not 0 <= self.jitter <= 1 or not 0 <= self.first_delay_s <= self.max_delay_s:
            raise DefinitionError("a policy's delays must grow and its jitter lie between 0 and 1")
        for limit_s in (self.deadline_s, self.timeout_s):
            if limit_s is not None and limit_s <= 0:
                raise DefinitionError("a policy's deadline and timeout must be positive")

    def delay_s(self, attempt: int, rng: random.Random) -> float:
        """Give the pause after attempt number `attempt` (from 1) has failed."""
        steady = self.first_delay_s * self.factor ** min(attempt - 1, 64)  # 64: no overflow; the cap is long reached
        steady = min(steady, self.max_delay_s)
        return min(self.max_delay_s, steady * rng.uniform(1 - self.jitter, 1 + self.jitter))


@dataclass(frozen=True, slots=True)
class Step(Generic[Request]):
    """One step: a name for the state file, the function, the type of its result, its policy and queue."""

    name: str
    body: Callable[["Run[Request]"], Awaitable[BaseModel | None]]
    result: type[BaseModel] | None
    retry: Policy
    queue: str | None


Initialiser = Callable[["Run[Any]"], AbstractAsyncContextManager[object]]
Call = Callable[["Run[Any]"], Awaitable[BaseModel | None]]
Interceptor = Callable[["Run[Any]", Call], Awaitable[BaseModel | None]]
Finaliser = Callable[["Run[Any]", "Outcome"], Awaitable[None]]


@dataclass(frozen=True)
class Machine(Generic[Request]):
    """A linear machine: ``Machine(name, RequestModel).start(…).to(…)….end(name)``."""

    name: str
    request: type[Request]
    version: int = 1
    steps: tuple[Step[Request], ...] = ()
    end_name: str | None = None
    initialisers: tuple[Initialiser, ...] = ()
    interceptors: tuple[Interceptor, ...] = ()
    finalisers: tuple[Finaliser, ...] = ()
    finalise_timeout_s: float = 30.0
    default_retry: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_model(self.request)
        if self.version < 1:
            raise DefinitionError(f"{self.name}: versions count from 1, got {self.version}")

    # -- declaring

    @overload
    def start(
        self,
        name: str,
        body: Callable[["Run[Request]"], Awaitable[Result]],
        *,
        result: type[Result],
        retry: Policy | None = None,
        queue: str | None = None,
    ) -> "Machine[Request]": ...

    @overload
    def start(
        self,
        name: str,
        body: Callable[["Run[Request]"], Awaitable[None]],
        *,
        result: None = None,
        retry: Policy | None = None,
        queue: str | None = None,
    ) -> "Machine[Request]": ...

    def start(
        self,
        name: str,
        body: Callable[["Run[Request]"], Awaitable[Any]],
        *,
        result: type[BaseModel] | None = None,
        retry: Policy | None = None,
        queue: str | None = None,
    ) -> "Machine[Request]":
        """Declare the first step."""
        if self.steps:
            raise DefinitionError(f"{self.name}: {name} cannot be the start, {self.steps[0].name} is")
        return self._with_step(Step(name, body, result, retry or self.default_retry, queue))

    @overload
    def to(
        self,
        name: str,
        body: Callable[["Run[Request]"], Awaitable[Result]],
        *,
        result: type[Result],
        retry: Policy | None = None,
        queue: str | None = None,
    ) -> "Machine[Request]": ...

    @overload
    def to(
        self,
        name: str,
        body: Callable[["Run[Request]"], Awaitable[None]],
        *,
        result: None = None,
        retry: Policy | None = None,
        queue: str | None = None,
    ) -> "Machine[Request]": ...

    def to(
        self,
        name: str,
        body: Callable[["Run[Request]"], Awaitable[Any]],
        *,
        result: type[BaseModel] | None = None,
        retry: Policy | None = None,
        queue: str | None = None,
    ) -> "Machine[Request]":
        """Declare the next step. `queue` is held during each attempt of it."""
        if not self.steps:
            raise DefinitionError(f"{self.name}: declare the start before {name}")
        return self._with_step(Step(name, body, result, retry or self.default_retry, queue))

    def initialise(self, initialiser: Initialiser) -> "Machine[Request]":
        """Enter this async context manager before the first step of each life of a run, and leave it after the last."""
        return replace(self._open(), initialisers=(*self.initialisers, initialiser))

    def intercept(self, interceptor: Interceptor) -> "Machine[Request]":
        """Wrap each attempt of each step: ``await interceptor(run, call_next)``. The first declared is outermost."""
        return replace(self._open(), interceptors=(*self.interceptors, interceptor))

    def finalise(self, finaliser: Finaliser, *, timeout_s: float | None = None) -> "Machine[Request]":
        """Call this when the run ends, however it ends: shielded, at least once, before the outcome is written.

        Its error is written to the log of the run and changes nothing. A quarantined run has no finalisers: what it
        was is not known.
        """
        longer_s = max(self.finalise_timeout_s, timeout_s or 0)
        return replace(self._open(), finalisers=(*self.finalisers, finaliser), finalise_timeout_s=longer_s)

    def end(self, name: str) -> "Machine[Request]":
        """Name the state of success and close the definition."""
        if not self.steps:
            raise DefinitionError(f"{self.name}: a machine needs a start")
        self._check_new(name)
        return replace(self._open(), end_name=name)

    def _open(self) -> "Machine[Request]":
        if self.end_name is not None:
            raise DefinitionError(f"{self.name}: nothing can follow the end {self.end_name}")
        return self

    def _with_step(self, step: Step[Request]) -> "Machine[Request]":
        self._check_new(step.name)
        if step.result is not None:
            _check_model(step.result)
        return replace(self._open(), steps=(*self.steps, step))

    def _check_new(self, name: str) -> None:
        _check_name(name)
        if name in _RESERVED or name in self.step_names:
            raise DefinitionError(f"{self.name}: the name {name} is taken")

    # -- asking

    @property
    def step_names(self) -> tuple[str, ...]:
        """The names of the steps in order, without the end."""
        return tuple(step.name for step in self.steps)

    @property
    def digest(self) -> str:
        """Name this definition; a run is only resumed by the one that started it.

        The models' fields are not in it, since pydantic may word a schema differently in a later release: their
        change is found when the stored text no longer fits them, and is what `version` is for.
        """
        text = json.dumps([self.name, self.version, *self.step_names, self.end_name])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def points(self) -> tuple[str, ...]:
        """Name every point at which a crash test should kill the process, from the definition alone.

        Each commit that a run of this machine can make, before and after it.
        """
        commits = [f"{self.name}:{word}" for word in ("start", "resume", "cancel", "park", "finish")]
        commits += [f"{self.name}:{step}:{word}" for step in self.step_names for word in ("complete", "retry", "stop")]
        return tuple(f"{commit}:{side}" for commit in commits for side in ("before", "after"))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise DefinitionError(f"names are {_NAME.pattern}, got {name!r}")


def _check_model(model: type[BaseModel]) -> None:
    config = model.model_config
    if not (config.get("frozen") and config.get("strict") and config.get("extra") == "forbid"):
        raise DefinitionError(f"{model.__name__} must be strict, frozen and forbid extra fields")
