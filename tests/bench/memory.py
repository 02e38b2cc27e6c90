"""The peak memory of each of our programs while something runs, as the kernel counts it (proc(5), VmHWM).

Rule 1: a process is known by its command line; what is no program of ours is not looked at.
Rule 2: it costs a look at /proc every PERIOD_S, so a process that lives shorter may be missed; the peaks come late.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Final

PERIOD_S: Final = 0.05
PROGRAMS: Final = {b"broker.cli": "broker", b"unpriv.fetch": "fetch", b"unpriv.check": "check", b"serve": "helper"}


class Watch:
    """Notes the highest peak of each program in ``peaks`` for as long as the block lasts."""

    def __init__(self, peaks: dict[str, int]) -> None:
        self._peaks = peaks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._others: set[str] = set()  # processes that are none of ours

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            for process in Path("/proc").iterdir():
                if process.name.isdigit() and process.name not in self._others:
                    with contextlib.suppress(OSError):  # it may have ended
                        self._look(process)

    def _look(self, process: Path) -> None:
        words = (process / "cmdline").read_bytes().split(b"\0")
        program = next((name for word, name in PROGRAMS.items() if word in words), None)
        if program is None or not words[0].endswith((b"python", b"python3")):
            self._others.add(process.name)
            return
        for line in (process / "status").read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                self._peaks[program] = max(self._peaks.get(program, 0), int(line.split()[1]) << 10)
