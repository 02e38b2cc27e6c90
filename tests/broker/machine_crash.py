"""Kill -9 at every commit point: forked processes that really die, and what to do with them.

The points come from the definitions (`Machine.points`), and how often each is passed from a run that is not killed.
Each case: a child process is killed at one passing of one point; then as many further lives as it takes do the same
work to its end. What must hold then is the caller's business.

The process must have a single thread when it forks.
"""

import os
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from broker.machine import Machine
from broker.machine.engine import POINTS

Work = Callable[[Callable[[str], None]], None]  # one life of the program; it is given the `point` for its Hooks

EXIT_BROKEN: Final = 99


@dataclass(frozen=True)
class Case:
    """Die when `point` is passed for the `nth` time (from 1)."""

    point: str
    nth: int

    def __str__(self) -> str:
        return f"{self.point}#{self.nth}"


def enumerated(machines: Iterable[Machine[Any]]) -> set[str]:
    """Give every point that these machines and the library itself have."""
    return {point for machine in machines for point in machine.points} | set(POINTS)


def passed(work: Work) -> Counter[str]:
    """Do the work in a child that is not killed, and give how often each point was passed."""
    read, write = os.pipe()

    def record(name: str) -> None:
        os.write(write, name.encode() + b"\n")

    if in_child(lambda: work(record)) != 0:
        raise AssertionError("the work fails without being killed")
    os.close(write)
    with os.fdopen(read, "rb") as lines:
        return Counter(line.decode().strip() for line in lines)


def cases(work: Work) -> list[Case]:
    """Give every case of this work."""
    return [Case(point, nth) for point, times in sorted(passed(work).items()) for nth in range(1, times + 1)]


def killed(work: Work, case: Case) -> bool:
    """Do the work in a child that dies as the case says; False if it came to its end without passing the point."""
    left = case.nth

    def point(name: str) -> None:
        nonlocal left
        if name == case.point:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    status = in_child(lambda: work(point))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise AssertionError(f"{case}: the life that should be killed failed, status {status}")
    return False


def lived(work: Work) -> None:
    """Do the work in a child to its end."""
    status = in_child(lambda: work(lambda _: None))
    if status != 0:
        raise AssertionError(f"a life after a crash failed, status {status}")


def in_child(work: Callable[[], None]) -> int:
    """Fork, do the work, exit; give the wait status."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _child(work)
    return os.waitpid(pid, 0)[1]


def _child(work: Callable[[], None]) -> NoReturn:
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(EXIT_BROKEN)
    os._exit(0)
