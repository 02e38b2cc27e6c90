import hashlib
import time
from pathlib import Path

import pytest

from broker import board
from broker.board import Board, BoardReporter
from broker.console import Reporter


def key(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


ONE = key("one")
NEIGHBOUR = ONE[:8] + key("two")[8:]  # it shares the place


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_another_process_reads_what_was_noted(tmp_path: Path) -> None:
    ours, theirs = Board(tmp_path / "board"), Board(tmp_path / "board")
    assert theirs.read(ONE) is None
    ours.note(ONE, "fetching", 5, 2**40)
    assert theirs.read(ONE) == ("fetching", 5, 2**40)
    assert theirs.read(key("two")) is None
    assert (tmp_path / "board").stat().st_mode & 0o777 == 0o600
    ours.close()
    theirs.close()


def test_at_most_five_notes_a_second_and_each_new_stage_at_once(tmp_path: Path, clock: list[float]) -> None:
    ours = Board(tmp_path / "board")
    ours.note(ONE, "fetching", 1, 9)
    ours.note(ONE, "fetching", 2, 9)
    assert ours.read(ONE) == ("fetching", 1, 9)
    ours.note(ONE, "checking", 3, 9)
    assert ours.read(ONE) == ("checking", 3, 9)
    clock[0] += board.INTERVAL_S
    ours.note(ONE, "checking", 4, 9)
    assert ours.read(ONE) == ("checking", 4, 9)
    ours.close()


def test_a_layer_in_the_same_place_is_not_taken_for_another(tmp_path: Path) -> None:
    ours = Board(tmp_path / "board")
    ours.note(ONE, "fetching", 1, 9)
    ours.note(NEIGHBOUR, "fetching", 2, 9)
    assert ours.read(ONE) is None
    assert ours.read(NEIGHBOUR) == ("fetching", 2, 9)
    ours.close()


def test_a_damaged_record_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "board"
    ours = Board(path)
    ours.note(ONE, "fetching", 1, 9)
    whole = path.read_bytes()
    for place in (i for i, byte in enumerate(whole) if byte):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert ours.read(ONE) is None
    path.write_bytes(whole[:-1])
    assert ours.read(ONE) is None
    ours.close()


def test_a_full_disk_stops_no_work() -> None:
    ours = Board(Path("/dev/full"))
    ours.note(ONE, "fetching", 1, 9)
    assert ours.read(ONE) is None
    ours.close()


def test_no_board_is_made_where_nothing_is_told(tmp_path: Path) -> None:
    Board(tmp_path / "board").close()
    assert list(tmp_path.iterdir()) == []


def test_attack_by_a_link_in_the_place_of_the_board_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "board").symlink_to("victim")
    ours = Board(tmp_path / "board")
    ours.note(ONE, "fetching", 1, 9)
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_what_is_reported_is_shown_and_noted(tmp_path: Path) -> None:
    inner, ours = Reporter(), Board(tmp_path / "board")
    report = BoardReporter(inner, ours)
    report.begin("image", [(ONE, "one/1.tar", 9)])
    report.stage(ONE, "fetching", 4, 9)
    assert (inner.lines[ONE].label, inner.lines[ONE].done) == ("one/1.tar", 4)
    assert ours.read(ONE) == ("fetching", 4, 9)
    ours.close()
