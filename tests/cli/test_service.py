"""What a service tells: fields for the journal, a status for its manager; and the timers that are shipped."""

import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from broker import console, service
from broker.errors import ImgpullError
from tests.support.world import World

UNITS: Final = Path(__file__).resolve().parents[2] / "policy/systemd/user"
Listen = Callable[[], list[bytes]]


def listener(path: Path) -> tuple[socket.socket, Listen]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.setblocking(False)

    def hear() -> list[bytes]:
        heard = []
        while True:
            try:
                heard.append(sock.recv(65536))
            except BlockingIOError:
                return heard

    return sock, hear


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    sock, hear = listener(tmp_path / "journal")
    monkeypatch.setattr(service, "JOURNAL", str(tmp_path / "journal"))
    with sock:
        yield hear


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    sock, hear = listener(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with sock:
        yield hear


def fields(entry: bytes) -> dict[str, str]:
    """Read an entry as journald does: `NAME=value`, or a name, a length and that many bytes."""
    found = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, separator, value = line.partition(b"=")
        if not separator:
            (length,) = struct.unpack_from("<Q", rest)
            value, rest = rest[8 : 8 + length], rest[8 + length + 1 :]
        found[name.decode()] = value.decode()
        entry = rest
    return found


def test_stages_are_entries_with_fields(journal: Listen) -> None:
    reporter = service.JournalReporter()
    reporter.begin("s3://b/img", [("k", "img/1.tar", 10)])
    reporter.stage("k", "fetching", 0, 10)
    reporter.stage("k", "fetching", 5, 10)
    reporter.stage("k", "ready")
    entries = [fields(entry) for entry in journal()]
    assert [entry["MESSAGE"] for entry in entries] == ["img/1.tar: fetching", "img/1.tar: ready"]
    assert entries[0]["IMGPULL_IMAGE"] == "s3://b/img"
    assert (entries[0]["IMGPULL_LAYER"], entries[0]["IMGPULL_STAGE"], entries[0]["PRIORITY"]) == (
        "img/1.tar",
        "fetching",
        "6",
    )
    assert entries[0]["MESSAGE_ID"] == service.MESSAGE_IDS["stage"]


def test_error_is_one_entry_with_its_code_and_rule(journal: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    violation = {"rule": "path_escapes_root"}
    error = ImgpullError("archive-rejected", "refused", "layer 1\nPRIORITY=0", violations=[violation])
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    monkeypatch.setattr(service, "is_journal", lambda descriptor: True)
    console.print_problem(error.problem, as_json=False)
    (entry,) = map(fields, journal())
    assert (entry["IMGPULL_CODE"], entry["IMGPULL_EXIT"], entry["IMGPULL_RULE"], entry["PRIORITY"]) == (
        "archive-rejected",
        "65",
        "path_escapes_root",
        "3",
    )
    assert entry["MESSAGE"].splitlines()[:2] == ["refused", "layer 1\\nPRIORITY=0"]


def test_attack_by_a_newline_in_a_name_adds_no_field(journal: Listen) -> None:
    service.tell_journal("notice", "a\nPRIORITY=0\nMESSAGE=b", layer="x\nIMGPULL_CODE=y")
    (entry,) = map(fields, journal())
    assert (entry["PRIORITY"], entry["MESSAGE"]) == ("5", "a\nPRIORITY=0\nMESSAGE=b")
    assert "IMGPULL_CODE" not in entry


def test_manager_hears_how_far_a_pull_is(world: World, manager: Listen) -> None:
    world.put("one", b"a")
    assert world.run("pull", "s3://bucket/images/one")[0] == 0
    heard = [entry.decode() for entry in manager()]
    assert all(entry.startswith("STATUS=s3://bucket/images/one: ") for entry in heard)
    assert heard[-1].endswith("1 of 1 layers")
    assert any("committing one/1.tar" in entry for entry in heard)


def test_manager_that_does_not_listen_stops_nothing(manager: Listen) -> None:
    for number in range(1000):  # far more than a socket's queue holds: net.unix.max_dgram_qlen
        service.tell_manager(f"{number}")
    assert 0 < len(manager()) < 1000


def test_journal_is_known_by_its_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "a").open("w") as ours, (tmp_path / "b").open("w") as other:
        found = os.fstat(ours.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert service.is_journal(ours.fileno()) and not service.is_journal(other.fileno())
    assert not service.is_journal(9999)


def test_without_journal_and_manager_nothing_is_told(journal: Listen, tmp_path: Path) -> None:
    (tmp_path / "journal").unlink()
    service.tell_journal("notice", "nobody hears this")
    service.tell_manager("nor this")
    assert journal() == []


@pytest.mark.parametrize("job", ["gc", "verify"])
def test_timer_starts_a_command_that_there_is(job: str, world: World) -> None:
    unit = (UNITS / f"imgpull-{job}.service").read_text(encoding="utf-8")
    (command,) = re.findall(r"(?m)^ExecStart=/usr/bin/imgpull (.+)$", unit)
    assert world.run(*command.split(), "--help")[0] == 0
    timer = (UNITS / f"imgpull-{job}.timer").read_text(encoding="utf-8")
    assert "RandomizedDelaySec=" in timer and "WantedBy=timers.target" in timer
