"""What a server's Date says of this machine's clock reaches whoever asked, with errors too; nonsense says nothing."""

import time
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Final

import pytest

from broker.protocol import FetchFailed, List, Pins
from tests.servers.faults import Object, Server, Wire, serving
from tests.unpriv_fetch.harness import connect, fetching
from unpriv.s3.clock import Clock

NOW: Final = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("date", "ahead_s"),
    [
        ("Sat, 21 Nov 2026 12:00:00 GMT", 0),
        ("Sat, 21 Nov 2026 11:43:20 GMT", 1000),
        ("Sat, 21 Nov 2026 12:00:07 GMT", -7),
        ("Sat, 21 Nov 2026 13:00:00 +0100", 0),
        ("", None),
        ("tomorrow", None),
        ("Sat, 99 Nov 2026 12:00:00 GMT", None),
        ("Sat, 21 Nov 2026 12:00:00 -99999999", None),
    ],
)
def test_date_of_an_answer(date: str, ahead_s: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", NOW.timestamp)
    clock = Clock()
    clock.hear({"ResponseMetadata": {"HTTPHeaders": {"date": date}}})
    assert clock.ahead_s == ahead_s


def test_answer_without_headers_says_nothing() -> None:
    clock = Clock()
    clock.hear({})
    assert clock.ahead_s is None


async def test_server_is_heard_with_pins_and_with_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = Wire.status

    async def dated(wire: Wire, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        await normal(wire, code, {"Date": formatdate(time.time() + 3600, usegmt=True), **headers}, body)

    async with serving(Server()) as server:
        server.objects["bucket/1.tar"] = Object(b"x")
        async with fetching(connect(server.url), tmp_path) as bench:
            silent = await bench.ask(List(id=1, bucket="bucket", prefix=""))
            monkeypatch.setattr(Wire, "status", dated)
            pins = await bench.ask(List(id=2, bucket="bucket", prefix=""))
            failed = await bench.ask(List(id=3, bucket="absent", prefix=""))
    assert isinstance(silent, Pins) and silent.clock_ahead_s is None
    assert isinstance(pins, Pins) and isinstance(failed, FetchFailed)
    for report in (pins, failed):
        assert report.clock_ahead_s is not None and -3600 <= report.clock_ahead_s < -3000
