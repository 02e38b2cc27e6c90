"""How the demo speaks: headings, commands with the prompt of who types them, and a summary."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from tests.support.accounts import Account

BOLD: Final = "\033[1m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ""
PLAIN: Final = "\033[0m" if BOLD else ""


class DemoError(Exception):
    """Something did not go as the README promises."""


@dataclass
class Teller:
    """Tells the story and keeps what the summary needs."""

    started_s: float = field(default_factory=time.monotonic)
    shown: list[str] = field(default_factory=list)

    @contextmanager
    def act(self, title: str) -> Iterator[None]:
        """Head a part of the story; what it shows is noted when it ends well."""
        start_s = time.monotonic()
        print(f"\n{BOLD}== {title}{PLAIN}", flush=True)
        yield
        self.shown.append(f"{time.monotonic() - start_s:6.1f} s  {title}")

    def say(self, *lines: str) -> None:
        """Print lines of the story."""
        for line in lines:
            print(f"   {line}", flush=True)

    def summary(self) -> None:
        """Print what was shown."""
        print(f"\n{BOLD}== Summary{PLAIN}")
        self.say(*self.shown, f"{time.monotonic() - self.started_s:6.1f} s  in all")


def check(condition: object, expected: str) -> None:
    """End the demo unless something is as expected."""
    if not condition:
        raise DemoError(f"expected: {expected}")


def type_as(
    account: Account,
    command: Sequence[str],
    *,
    shown: str | None = None,
    expected: int = 0,
    meanwhile: Callable[[], None] | None = None,
) -> str:
    """Run a command of an ordinary user in front of the audience and return its standard output.

    Standard error, where progress is shown, goes straight to the terminal. ``meanwhile`` is called again and again
    while the command runs. Raises: DemoError if it ends with another exit code than ``expected``.
    """
    print(f"{BOLD}{account.name}$ {shown or shlex.join(command)}{PLAIN}", flush=True)
    start_s = time.monotonic()
    process: subprocess.Popen[str] = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, **account.options()
    )
    try:
        while meanwhile is not None and process.poll() is None:
            meanwhile()
            time.sleep(0.02)
        output, _ = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    print(output, end="", flush=True)
    print(f"   [exit code {process.returncode}, {time.monotonic() - start_s:.2f} s]", flush=True)
    check(process.returncode == expected, f"exit code {expected}, got {process.returncode}")
    return output
