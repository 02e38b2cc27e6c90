"""An image that is ready: the answer writes nothing, and ten thousand finished runs cost it nothing."""

import resource
import subprocess
from pathlib import Path

import pytest

from tests.bench import ready

MUTATING = (
    "pwrite64,fsync,fdatasync,ftruncate,unlink,unlinkat,rename,link,linkat,mkdir,mkdirat,chmod,fchmodat,utimensat"
)


def test_ready_answer_writes_nothing_after_ten_thousand_runs(scratch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environment = ready.prepare(scratch, ready.RUNS)
    log = scratch / "strace"
    traced = ["strace", "-f", "-qq", "-o", str(log), "-e", f"trace={MUTATING},connect,execve", *ready.COMMAND]
    done = subprocess.run(traced, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ready.LAYER}\n"
    calls = [line.split(" ", 1)[1] for line in log.read_text().splitlines() if "+++" not in line]
    assert [call for call in calls if not call.lstrip().startswith("execve")] == []
    assert len(calls) == 1, "nothing is started but the command itself"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(ready.COMMAND, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    with capsys.disabled():
        print(f"\na ready image after {ready.RUNS} finished runs: no write, {spent_s * 1000:.0f} ms of CPU")
