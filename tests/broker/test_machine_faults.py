"""Death and errors at every mutating system call that SQLite makes on the state file, by strace's injection.

Invariant tested: whichever call fails, and however, the next life brings every run to its right end, and the state file
holds together (see test_machine_crash.py for what that means).

A sample by default; ``IMGPULL_FAULTS=all`` tries every call.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.broker.machine_crash import lived
from tests.broker.test_machine_crash import assert_right, life

CALLS: Final = ("openat", "pwrite64", "fsync", "fdatasync", "ftruncate", "unlink")
HOWS: Final = ("signal=KILL", "error=EIO", "error=ENOSPC")
SAMPLE: Final = 24
PROGRAM: Final = (
    "import sys; from pathlib import Path; from tests.broker.test_machine_crash import life;"
    " life(sys.argv[1], Path(sys.argv[2]))(lambda _: None)"
)


def strace(place: tuple[str, Path], *options: str) -> subprocess.CompletedProcess[bytes]:
    path, folder = place
    watched = [word for name in (path, f"{path}-journal", os.path.dirname(path)) for word in ("-P", name)]
    command = ["strace", "-f", "-qq", *watched, "-o", f"{path}.strace", *options]
    return subprocess.run(
        [*command, sys.executable, "-c", PROGRAM, path, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=120,
        check=False,
    )


def fresh(scratch: Path, name: str) -> tuple[str, Path]:
    folder = scratch / name / "folder"
    folder.mkdir(parents=True)
    return str(scratch / name / "state.db"), folder


def counted(scratch: Path) -> dict[str, int]:
    """Count the calls of a life that nothing disturbs."""
    place = fresh(scratch, "counted")
    run = strace(place, "-e", "trace=" + ",".join(CALLS))
    assert run.returncode == 0, run.stderr.decode()
    lines = Path(f"{place[0]}.strace").read_text()
    return {call: len(re.findall(rf"\b{call}\(", lines)) for call in CALLS}


@pytest.mark.capability("kill, EIO and ENOSPC at any system call on the state file")
def test_faults_at_system_calls(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = counted(scratch)
    everything = [(call, how, nth) for call, n in numbers.items() for how in HOWS for nth in range(1, n + 1)]
    chosen = everything
    if os.environ.get("IMGPULL_FAULTS") != "all":
        chosen = random.Random(5).sample(everything, SAMPLE)
    failed_lives = 0
    for number, (call, how, nth) in enumerate(chosen):
        place = fresh(scratch, f"fault{number}")
        run = strace(place, "-e", f"inject={call}:{how}:when={nth}")
        failed_lives += run.returncode != 0
        os.unlink(f"{place[0]}.strace")
        try:
            lived(life(*place))
            assert_right(*place)
        except AssertionError as error:
            raise AssertionError(
                f"after {how} at {call} number {nth}: {error}\n{run.stderr.decode()[-2000:]}"
            ) from error
    with capsys.disabled():
        print(f"\n{len(chosen)} of {len(everything)} faults at system calls; {failed_lives} lives failed of them")
    assert failed_lives > len(chosen) / 2
