"""A helper without its start-up: forked from a process that has loaded it, for tests that start hundreds.

Everything after the imports and the reading of policy/ is the helper's own: confinement, reconciling, serving. An
emulated processor needs a second for those imports.
"""

import contextlib
import functools
import os
import subprocess
import time
from pathlib import Path
from typing import Self

from privhelper import __main__ as program
from privhelper import policy
from tests.privhelper.client import Helper, connected_pair

policy.load = functools.cache(policy.load)


class ForkedHelper(Helper):
    """One connection; ``strace`` are further words for strace(1), which is attached before the first instruction."""

    def __init__(self, config: Path, *, strace: tuple[str, ...] = ()) -> None:
        policy.load(str(config))
        self.log_read, log = os.pipe()
        self.sock, theirs = connected_pair(0)
        go, going = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(going)
            self._run(config, theirs.fileno(), log, go)
        for fd in (log, go):
            os.close(fd)
        theirs.close()
        self.sock.settimeout(30)
        self.tracer = self._attach(strace) if strace else None
        os.close(going)

    def __enter__(self) -> Self:
        return self

    def _run(self, config: Path, connection: int, log: int, go: int) -> None:
        """Become the helper: in the child, never returns."""
        code = 70
        try:
            os.setsid()
            os.read(go, 1)
            self.sock.close()
            os.dup2(log, 2)
            os.dup2(connection, 3)
            os.environ["LISTEN_FDS"] = "1"
            os.closerange(4, 64)
            code = program.main(["--config", str(config), "serve"])
        finally:
            os._exit(code)

    def _attach(self, words: tuple[str, ...]) -> "subprocess.Popen[bytes]":
        tracer = subprocess.Popen(["strace", "-f", "-qq", *words, "-p", str(self.pid)], stderr=subprocess.DEVNULL)
        while "TracerPid:\t0\n" in Path(f"/proc/{self.pid}/status").read_text():
            assert tracer.poll() is None, "strace ended before it attached"
            time.sleep(0.002)
        return tracer

    def close(self) -> int:
        """Hang up, wait for the helper and for every process that it started; return its exit code."""
        self.sock.close()
        _, status = os.waitpid(self.pid, 0)
        os.close(self.log_read)
        self._end_tracer()
        deadline_s = time.monotonic() + 10
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.killpg(self.pid, 0)  # its children die with it, but not in the same instant
                assert time.monotonic() < deadline_s, "a child of the helper stays"
                time.sleep(0.005)
        return os.waitstatus_to_exitcode(status)

    def _end_tracer(self) -> None:
        """Wait for strace; while it stays, a process that it traces lives on, and the check after this one says so."""
        if self.tracer:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.tracer.wait(10)
            self.tracer.kill()
            self.tracer.wait()
