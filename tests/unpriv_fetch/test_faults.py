"""Every fault, at four places, once and for ever: a right blob or the right code, in time, and never a wrong blob."""

import socket
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest
import trio

from broker.protocol import Fetched, FetchFailed, Head, List, Pin
from tests.servers.faults import ALWAYS, FAULTS, Object, Server, serving
from tests.unpriv_fetch.harness import CELL, Bench, connect, fetching, notices, outcome
from unpriv import s3
from unpriv.blobfile import Partial
from unpriv.failures import FetchError

DATA: Final = b"".join(sha256(number.to_bytes(4, "big")).digest() for number in range(3 * CELL // 32 - 5))
DIGEST: Final = f"sha256:{sha256(DATA).hexdigest()}"
PLACES: Final = {"first byte": 0, "inside": CELL + CELL // 2, "border": CELL, "last byte": len(DATA) - 1}

# What becomes of a fetch: when the fault strikes once, when it strikes always.
EXPECTED: Final = {
    "bytes_after_the_body": ("ok", "ok"),
    "chunks": ("ok", "ok"),
    "chunks_too_many": ("ok", "bad_response"),
    "clock_skew": ("configuration", "configuration"),
    "deleted": ("no_such_object", "no_such_object"),
    "denied": ("access_denied", "access_denied"),
    "empty_body": ("ok", "bad_response"),
    "endless_continue": ("ok", "timed_out"),
    "endless_error": ("ok", "timed_out"),
    "error_not_xml": ("bad_response", "bad_response"),
    "error_with_status_200": ("ok", "bad_response"),
    "flipped_byte": ("digest_mismatch", "digest_mismatch"),
    "garbled_content_range": ("ok", "bad_response"),
    "gzip_label": ("ok", "ok"),
    "gzip_on_the_way": ("ok", "bad_response"),
    "header_too_long": ("ok", "unavailable"),
    "headers_drip": ("ok", "timed_out"),
    "huge_headers": ("ok", "ok"),
    "long_length": ("ok", "bad_response"),
    "negative_length": ("ok", "bad_response"),
    "no_content_range": ("ok", "bad_response"),
    "not_http": ("ok", "unavailable"),
    "range_ignored": ("ok", "bad_response"),
    "range_with_status_200": ("ok", "bad_response"),
    "redirect_to_another_region": ("ok or bad_response", "bad_response"),
    "redirect_to_link_local": ("bad_response", "bad_response"),
    "refused": ("ok", "unavailable"),
    "replaced": ("changed", "changed"),
    "replaced_unnoticed": ("changed", "changed"),
    "reset": ("ok", "unavailable"),
    "short_length": ("ok", "bad_response"),
    "shrunk": ("changed", "changed"),
    "silence_before_the_status": ("ok", "timed_out"),
    "silence_in_the_body": ("ok", "timed_out"),
    "slow_drip": ("ok", "ok"),  # a new request starts behind the place
    "status_429": ("ok", "unavailable"),
    "status_500": ("ok", "unavailable"),
    "status_502_html": ("ok", "unavailable"),
    "status_503": ("ok", "unavailable"),
    "status_503_retry_after": ("ok", "unavailable"),
    "status_503_retry_next_year": ("unavailable", "unavailable"),
    "status_503_with_checksum": ("ok", "unavailable"),
    "status_999": ("ok", "unavailable"),
    "token_expired": ("credentials_rejected", "credentials_rejected"),
    "too_many_headers": ("ok", "unavailable"),
    "truncated": ("ok", "unavailable"),
    "truncated_in_chunks": ("ok", "unavailable"),
    "truncated_without_length": ("ok", "unavailable"),
    "wrong_range": ("ok", "bad_response"),
    "wrong_signature": ("credentials_rejected", "credentials_rejected"),
    "wrong_total": ("changed", "changed"),
}


def test_every_fault_has_an_expected_outcome() -> None:
    assert set(EXPECTED) == set(FAULTS)
    assert len(EXPECTED) >= 24


def bucket_of(kind: str) -> str:
    """Return a bucket for each kind: botocore remembers what it was told of a bucket's region."""
    return "faults-" + kind.replace("_", "-")


def pin_of(key: str, bucket: str = "faults") -> Pin:
    return Pin(bucket=bucket, key=key, size=len(DATA), etag=Object(DATA).etag)


async def strike(bench: Bench, number: int, key: str, expected: str, wrong: list[str]) -> None:
    """Fetch one object and note what is not as it should be."""
    report = await bench.fetch(pin_of(key, bucket_of(key.split("/")[0])), number, DIGEST)
    if outcome(report) not in expected.split(" or "):
        wrong.append(f"{key}: expected {expected}, found {report}")
    if isinstance(report, Fetched) and (report.digest, report.size) != (DIGEST, len(DATA)):
        wrong.append(f"{key}: published {report}")
    if isinstance(report, FetchFailed) and ("hush" in report.message or len(report.message) > 1000):
        wrong.append(f"{key}: said {report.message}")


async def test_no_fault_gives_a_wrong_blob_or_code(tmp_path: Path) -> None:
    server = Server()
    for kind in EXPECTED:
        for place, offset in PLACES.items():
            for times in (1, ALWAYS):
                server.objects[f"{bucket_of(kind)}/{kind}/{place}/{times}"] = Object(DATA, kind, offset, times)
    wrong: list[str] = []
    async with serving(server), trio.open_nursery() as nursery:
        client = connect(server.url, streams=64)
        some = trio.CapacityLimiter(8)  # all at once would time out for want of a processor
        for kind in EXPECTED:
            nursery.start_soon(strike_kind, client, tmp_path / kind, kind, wrong, some)
    assert not wrong, "\n".join(wrong)
    assert server.requests["GET /latest/"] == 0
    sent = max(found.sent for found in server.objects.values())
    assert sent < 12 * len(DATA), "a fault made us fetch without end"


async def strike_kind(client: s3.Client, folder: Path, kind: str, wrong: list[str], some: trio.CapacityLimiter) -> None:
    """Let one kind of fault strike everywhere; then look at the disk."""
    async with some, fetching(client, folder, max_streams=8) as bench:
        async with trio.open_nursery() as nursery:
            for number, (place, times) in enumerate((p, t) for p in PLACES for t in (1, ALWAYS)):
                expected = EXPECTED[kind][times == ALWAYS]
                nursery.start_soon(strike, bench, number, f"{kind}/{place}/{times}", expected, wrong)
        for name, blob in bench.blobs().items():
            if sha256(blob).hexdigest() != name:
                wrong.append(f"{kind}: published a wrong blob {name}")
        for path in (folder / "partial").iterdir():
            if path.stat().st_size > len(DATA):
                wrong.append(f"{kind}: {path.stat().st_size} bytes in {path.name}")


async def test_slow_drip_without_end_is_too_slow(tmp_path: Path) -> None:
    server = Server()
    server.round_trip_s, server.window_bytes = 0.1, 1
    server.objects["faults/drip"] = Object(DATA)
    async with serving(server), fetching(connect(server.url), tmp_path) as bench:
        assert outcome(await bench.fetch(pin_of("drip"))) == "too_slow"
        assert bench.blobs() == {}


async def test_deadline_ends_a_server_that_is_only_just_fast_enough(tmp_path: Path) -> None:
    server = Server()
    server.round_trip_s, server.window_bytes = 0.05, 200
    server.objects["faults/slow"] = Object(DATA)
    async with serving(server), fetching(connect(server.url), tmp_path, min_rate=10, deadline_s=2.0) as bench:
        with trio.fail_after(10):
            assert outcome(await bench.fetch(pin_of("slow"))) == "timed_out"


async def test_object_that_changed_leaves_nothing_behind(tmp_path: Path) -> None:
    server = Server()
    server.objects["faults/x"] = Object(DATA, "replaced", 2 * CELL)
    async with serving(server), fetching(connect(server.url), tmp_path, max_streams=1) as bench:
        report = await bench.fetch(pin_of("x"))
        assert outcome(report) == "changed"
        assert bench.partial() == []
        assert "dropped" in notices(bench)


async def test_digest_mismatch_with_the_servers_own_checksum(tmp_path: Path) -> None:
    server = Server()
    server.objects["faults/x"] = Object(DATA, "flipped_byte", CELL + 7, ALWAYS, checksum=True)
    async with serving(server), fetching(connect(server.url), tmp_path) as bench:
        report = await bench.fetch(pin_of("x"))
        assert outcome(report) == "digest_mismatch"
        assert isinstance(report, FetchFailed) and report.retryable  # it may be the network's fault
        assert bench.partial() == [] and bench.blobs() == {}


async def test_wrong_expectation_is_not_retryable(tmp_path: Path) -> None:
    server = Server()
    server.objects["faults/x"] = Object(DATA)
    async with serving(server), fetching(connect(server.url), tmp_path) as bench:
        report = await bench.fetch(pin_of("x"), expect="sha256:" + "0" * 64)
        assert isinstance(report, FetchFailed) and (report.code, report.retryable) == ("digest_mismatch", False)
        assert DIGEST in report.message


async def test_throttling_narrows_the_streams(tmp_path: Path) -> None:
    server = Server()
    server.objects["faults/x"] = Object(DATA, "status_503", CELL)
    async with serving(server), fetching(connect(server.url), tmp_path, max_streams=4) as bench:
        assert outcome(await bench.fetch(pin_of("x"))) == "ok"
        assert bench.fetcher.slots.width == 2
        assert "busy" in notices(bench)


async def test_name_that_does_not_resolve_is_unavailable(tmp_path: Path) -> None:
    client = connect("http://s3.imgpull.invalid")
    async with fetching(client, tmp_path) as bench:
        report = await bench.ask(Head(id=1, bucket="faults", key="x"))
        assert outcome(report) == "unavailable"
        assert isinstance(report, FetchFailed) and "cannot be resolved" in report.message


async def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with fetching(connect(f"http://127.0.0.1:{taken.getsockname()[1]}"), tmp_path) as bench:
            report = await bench.ask(List(id=1, bucket="faults", prefix=""))
            assert outcome(report) == "unavailable"
            assert isinstance(report, FetchFailed) and "refuses the connection" in report.message


async def test_resume_fetches_only_what_is_missing_or_harmed(tmp_path: Path) -> None:
    server = Server()
    server.objects["faults/x"] = found = Object(DATA, "silence_in_the_body", 2 * CELL, ALWAYS)
    async with serving(server), fetching(connect(server.url), tmp_path, max_streams=1) as bench:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.fetch, pin_of("x"))
            while (2 * CELL, len(DATA)) not in found.gets:  # noqa: ASYNC110  # then the cells before it are complete
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        (data,) = (tmp_path / "partial").glob("*.data")
        with data.open("r+b") as file:
            file.seek(CELL + 5)
            file.write(bytes([DATA[CELL + 5] ^ 1]))
        found.fault = None
        found.gets.clear()
        report = await bench.fetch(pin_of("x"), 2)
    assert isinstance(report, Fetched)
    assert report.digest == DIGEST
    assert sorted(found.gets) == [(CELL, 2 * CELL), (2 * CELL, len(DATA))]
    assert report.transferred_bytes == len(DATA) - CELL


@pytest.mark.parametrize("fails", [False, True])
async def test_disk_works_while_bytes_arrive(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []

    def flush(partial: Partial) -> None:
        flushed.append(partial.data_fd)
        if fails:
            raise FetchError("io_error", "cannot write a partial blob to the disk: Input/output error")

    monkeypatch.setattr("unpriv.fetcher.FLUSH_BYTES", 1)
    monkeypatch.setattr(Partial, "flush", flush)
    server = Server()
    server.objects["faults/k"] = Object(DATA)
    async with serving(server), fetching(connect(server.url), tmp_path) as bench:
        report = await bench.fetch(pin_of("k"))
        assert outcome(report) == ("io_error" if fails else "ok")
        assert flushed
        assert bool(bench.blobs()) is not fails
