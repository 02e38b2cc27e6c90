"""Starts a checker; broker/worker.py supervises it.

Rule 1: nothing here waits, and nothing is imported that takes long: `imgpull check` starts its first checkers by this
        and loads the supervisor, trio with it, while they read.
Rule 2: a checker is exec'd, with an empty environment but for the locale, without which libarchive(3) cannot convert
        names; it inherits the descriptors that its job names and nothing else.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from broker import limits, protocol
from broker.errors import ImgpullError

COMMAND: Final = (sys.executable, "-I", "-m", "unpriv.check")
ENVIRONMENT: Final = {"LC_ALL": "C.UTF-8"}


class CheckError(ImgpullError):
    """The checker gave no verdict."""


@dataclass(frozen=True, slots=True)
class Started:
    """A checker at work: whoever started it supervises it or kills it."""

    process: "subprocess.Popen[bytes]"
    deadline_s: float  # of the limits that it was given

    def kill(self) -> None:
        """End it at once, if it lives, and reap it."""
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.kill()
        self.process.wait()


def start(job: protocol.CheckJob, blob_fd: int, descriptors: Sequence[int] = ()) -> Started:
    """Start the check of one blob; ``descriptors`` are those that the job names beside 0 to 2.

    Raises: CheckError where the limits cannot be used.
    """
    try:
        in_force = limits.load()
    except limits.LimitsError as error:
        raise CheckError("configuration", "the limits of a check cannot be used", str(error)) from error
    process = subprocess.Popen(
        [*COMMAND, job.model_dump_json(), in_force.model_dump_json()],
        bufsize=0,
        stdin=blob_fd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd="/",
        pass_fds=tuple(descriptors),
        process_group=0,  # a Ctrl-C of the terminal is the broker's to handle
    )
    return Started(process, in_force.run.wall_clock_s)
