"""A helper without its start-up: forked from a process that has loaded it, for tests that start hundreds.

Everything after the imports and the reading of policy/ is the helper's own: confinement, reconciling, serving. An
emulated processor needs a second for those imports.
"""

import contextlib
import functools
import os
import time
import traceback
from pathlib import Path
from typing import Self

from privhelper import __main__ as program
from privhelper import policy
from tests.privhelper.client import Helper, connected_pair
from tests.vm.guest.stopping import Stops, be_stopped

LISTENER = 63  # where a helper that stops at its calls has the descriptor that tells of them
policy.load = functools.cache(policy.load)


class ForkedHelper(Helper):
    """One connection. With ``kill_at`` it stops at its mutating calls, and dies at that one of them (0: at none)."""

    def __init__(self, config: Path, *, kill_at: int | None = None) -> None:
        policy.load(str(config))
        self.log_read, log = os.pipe()
        self.sock, theirs = connected_pair(0)
        go, going = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(going)
            self._run(config, theirs.fileno(), log, go, kill_at is not None)
        for fd in (log, go):
            os.close(fd)
        theirs.close()
        self.sock.settimeout(30)
        self.stops = None if kill_at is None else Stops(self.pid, LISTENER, kill_at)
        os.close(going)

    def __enter__(self) -> Self:
        return self

    def _run(self, config: Path, connection: int, log: int, go: int, stops: bool) -> None:
        """Become the helper: in the child, never returns."""
        code = 70
        try:
            os.setsid()
            self.sock.close()
            if stops:
                os.dup2(be_stopped(), LISTENER)
            os.read(go, 1)
            os.dup2(log, 2)
            os.dup2(connection, 3)
            os.environ["LISTEN_FDS"] = "1"
            os.closerange(4, LISTENER)
            code = program.main(["--config", str(config), "serve"])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def close(self) -> int:
        """Hang up, wait for the helper and for every process that it started; return its exit code."""
        self.sock.close()
        _, status = os.waitpid(self.pid, 0)
        os.close(self.log_read)
        if self.stops:
            self.stops.close()
        deadline_s = time.monotonic() + 60
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(self.pid, 0)  # its children die with it, but not in the same instant
                assert time.monotonic() < deadline_s, "a child of the helper stays"
                time.sleep(0.005)
        return os.waitstatus_to_exitcode(status)
