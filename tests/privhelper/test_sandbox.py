"""The child is read as if it were hostile: whatever it writes or does, the helper says fault and goes on."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from privhelper import kernel, policy, sandbox
from privhelper.sandbox import Child, Report
from tests.support import descriptors


def child(act: Callable[[int], None]) -> Child:
    """Fork a child that does ``act`` with its end of the pipe, without any sandbox."""
    results, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(results)
            act(tell)
        finally:
            os._exit(0)
    os.close(tell)
    return Child(pid, results)


def all_reports(found: Child) -> list[Report]:
    reports: list[Report] = []
    while (more := found.read()) is not None:
        reports += more
    return reports


GOOD = b"progress 1 2\nprogress 3 4\ndone 5 6\n"
BAD = [
    b"done -1 0\n", b"done 1\n", b"done 1 2 3\n", b"Done 1 2\n", b"done 1 2\r\n", b"\xff\n", b"\n",
    b"done 1 \xc2\xb2\n",
    b"rejected rule\n", b"rejected Rule 1 text\n", b"refused rule 1 text\n", b"fault rule 1 " + b"x" * 401 + b"\n",
    b"done " + b"1" * 21 + b" 1\n", b"rejected rule 1 te\x1bxt\n", b"x" * 5000,
]  # fmt: skip


def test_reports_of_an_honest_child() -> None:
    found = child(lambda tell: (os.write(tell, GOOD), None)[1])
    assert [(report.kind, report.entries, report.content_bytes) for report in all_reports(found)] == [
        ("progress", 1, 2), ("progress", 3, 4), ("done", 5, 6),
    ]  # fmt: skip
    assert found.end(kill=False) == ""


def test_report_in_pieces() -> None:
    def dribble(tell: int) -> None:
        for byte in GOOD:
            os.write(tell, bytes([byte]))

    found = child(dribble)
    assert [report.kind for report in all_reports(found)] == ["progress", "progress", "done"]
    assert found.end(kill=False) == ""


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_report_of_another_form_is_a_fault(data: bytes) -> None:
    found = child(lambda tell: (os.write(tell, data), None)[1])
    assert [report.kind for report in all_reports(found)] == ["fault"]
    found.end(kill=False)


def test_child_that_closes_its_pipe_and_lives_on_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_END_S", 0.05)

    def linger(tell: int) -> None:
        os.write(tell, GOOD)
        os.close(tell)
        signal.pause()

    found = child(linger)
    assert [report.kind for report in all_reports(found)][-1] == "done"
    assert found.end(kill=False) == "killed by SIGKILL"


def test_child_does_not_outlive_a_wait_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the mount of a layer that is about to be taken apart."""

    def fail(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    before = descriptors.held()
    found = child(lambda tell: signal.pause())
    monkeypatch.setattr(os, "pidfd_open", fail)
    with pytest.raises(OSError, match="Too many open files"):
        found.end(kill=False)
    with pytest.raises(ProcessLookupError):
        os.kill(found.pid, 0)
    assert descriptors.held() == before


def test_landlock_leaves_nothing_but_what_is_beneath(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    root = os.open(tmp_path / "mine", os.O_RDONLY | os.O_DIRECTORY)

    def act(tell: int) -> None:
        kernel.set_no_new_privs()
        kernel.restrict_beneath(root, policy.load(None).authority["populate"]["landlock"])
        for name in ("mine", "theirs"):
            try:
                os.close(os.open(tmp_path / name / "file", os.O_RDONLY))
                os.write(tell, b"progress 1 0\n")
            except PermissionError:
                os.write(tell, b"progress 0 1\n")

    found = child(act)
    assert [report[:3] for report in all_reports(found)] == [("progress", 1, 0), ("progress", 0, 1)]
    assert found.end(kill=False) == ""
    os.close(root)


def test_child_that_dies_tells_how() -> None:
    found = child(lambda tell: os.kill(os.getpid(), signal.SIGSYS))
    assert all_reports(found) == []
    assert found.end(kill=False) == "killed by SIGSYS"


def test_fork_that_fails_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """TasksMax of the unit makes it fail; a client could repeat that until none is left."""

    def fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = descriptors.held()
    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(BlockingIOError):
        sandbox.start(policy.load(None), "populate", 0, (), lambda root, tell: (0, 0))
    assert descriptors.held() == before


@pytest.mark.parametrize("kind", ["rejected", "no_room", "fault"])
def test_line_of_the_child_is_one_that_the_helper_reads(kind: str) -> None:
    line = sandbox._line(kind, "tree_conflict", 7, "na\u00efve\n\x1b[31m" + "x" * 1000)
    report = sandbox._report(line.removesuffix(b"\n"))
    assert (report.kind, report.rule, report.entry) == (kind, "tree_conflict", 7)
    assert report.message.startswith("na\\xefve[31mx")
