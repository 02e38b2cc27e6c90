"""Against a server that checks signatures: each wrong thing gets its own code and one helpful line."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from broker.protocol import Fetched, FetchFailed, Head, List, Pin, Pins
from tests.servers import swift
from tests.unpriv_fetch.harness import CELL, connect, fetching, outcome, program
from unpriv.failures import FetchError

DATA: Final = os.urandom(5 * CELL + 123)
NAMES: Final = [f"images/golang/{number}.tar" for number in (1, 2, 10)]


@dataclass(frozen=True, slots=True)
class Store:
    """A running Swift with a few objects."""

    swift: swift.Swift
    client: Any

    def use(self, monkeypatch: pytest.MonkeyPatch, **more: str) -> None:
        """Let boto3 find its credentials in the environment."""
        for name, value in {**self.swift.environment(), **more}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ENDPOINT_URL")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with swift.running(tmp_path_factory.mktemp("swift")) as running:
        client = running.client()
        client.create_bucket(Bucket="layers")
        for name in NAMES:
            client.put_object(Bucket="layers", Key=name, Body=DATA)
        client.put_object(Bucket="layers", Key="images/golang/deeper/1.tar", Body=b"x")
        yield Store(running, client)
        client.close()


async def test_list_head_fetch_and_fetch_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.use(monkeypatch)
    async with fetching(connect(store.swift.endpoint), tmp_path) as bench:
        listed = await bench.ask(List(id=1, bucket="layers", prefix="images/golang/"))
        assert isinstance(listed, Pins)
        assert sorted(pin.key for pin in listed.pins) == sorted(NAMES)
        headed = await bench.ask(Head(id=2, bucket="layers", key=NAMES[0]))
        assert isinstance(headed, Pins)
        assert headed.pins[0] in listed.pins
        report = await bench.fetch(headed.pins[0], 3)
        assert isinstance(report, Fetched)
        assert report.digest == f"sha256:{sha256(DATA).hexdigest()}"
        assert report.transferred_bytes == len(DATA)
        assert bench.blobs() == {sha256(DATA).hexdigest(): DATA}
        again = await bench.fetch(headed.pins[0], 4, report.digest)
        assert isinstance(again, Fetched) and again.transferred_bytes == 0
        assert bench.partial() == []


async def test_object_replaced_after_its_pin_is_changed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.use(monkeypatch)
    store.client.put_object(Bucket="layers", Key="replaced", Body=DATA)
    async with fetching(connect(store.swift.endpoint), tmp_path) as bench:
        headed = await bench.ask(Head(id=1, bucket="layers", key="replaced"))
        assert isinstance(headed, Pins)
        store.client.put_object(Bucket="layers", Key="replaced", Body=DATA[::-1])
        assert outcome(await bench.fetch(headed.pins[0], 2)) == "changed"
        assert bench.blobs() == {}


async def test_object_of_many_parts(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.use(monkeypatch)
    upload = store.client.create_multipart_upload(Bucket="layers", Key="parts")["UploadId"]
    bodies = [os.urandom(5 << 20), os.urandom(100)]
    parts = [
        {"PartNumber": n, "ETag": store.client.upload_part(
            Bucket="layers", Key="parts", UploadId=upload, PartNumber=n, Body=body)["ETag"]}
        for n, body in enumerate(bodies, 1)
    ]  # fmt: skip
    store.client.complete_multipart_upload(
        Bucket="layers", Key="parts", UploadId=upload, MultipartUpload={"Parts": parts}
    )
    async with fetching(connect(store.swift.endpoint), tmp_path, deadline_s=60.0) as bench:
        listed = await bench.ask(List(id=1, bucket="layers", prefix="parts"))
        assert isinstance(listed, Pins)
        report = await bench.fetch(listed.pins[0], 2)
        assert isinstance(report, Fetched), report
        assert report.digest == f"sha256:{sha256(b''.join(bodies)).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Case:
    """A wrong thing and what the fetcher says to it."""

    code: str
    says: str
    environment: dict[str, str]
    endpoint: dict[str, Any]
    bucket: str = "layers"
    key: str = NAMES[0]


CASES: Final = {
    "wrong secret": Case(
        "credentials_rejected", "does not accept these credentials", {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, {}
    ),
    "unknown key": Case("credentials_rejected", "does not accept", {"AWS_ACCESS_KEY_ID": "test:nobody"}, {}),
    "anonymous": Case("access_denied", "takes no unsigned requests", {}, {"no_sign_request": True}),
    "no such key": Case("no_such_object", "NoSuchKey", {}, {}, key="images/golang/3.tar"),
    "no such bucket": Case("no_such_bucket", "NoSuchBucket", {}, {}, bucket="nowhere"),
    "impossible bucket": Case("configuration", "nvalid bucket name", {}, {}, bucket="NOT/A/BUCKET"),
}


@pytest.mark.parametrize("name", CASES)
async def test_wrong_things_have_their_code(
    name: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    store.use(monkeypatch, **case.environment)
    pin = Pin(bucket=case.bucket, key=case.key, size=len(DATA), etag='"0"')
    async with fetching(connect(store.swift.endpoint, **case.endpoint), tmp_path) as bench:
        head = await bench.ask(Head(id=1, bucket=case.bucket, key=case.key))
        assert_says(head, case)
        assert outcome(await bench.fetch(pin, 2)) == case.code
        if name != "no such key":
            assert_says(await bench.ask(List(id=3, bucket=case.bucket, prefix="images/golang/")), case)
        assert bench.blobs() == {}


def assert_says(report: object, case: Case) -> None:
    """One line, the right code, the hint, no secret."""
    assert isinstance(report, FetchFailed)
    assert report.code == case.code, report
    assert case.says in report.message
    assert "\n" not in report.message and len(report.message) < 500
    assert swift.SECRET_KEY not in report.message


async def test_wrong_region_is_mended(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.use(monkeypatch)
    async with fetching(connect(store.swift.endpoint, region="eu-central-1"), tmp_path) as bench:
        report = await bench.ask(Head(id=1, bucket="layers", key=NAMES[0]))
        assert isinstance(report, Pins), report
        assert outcome(await bench.fetch(report.pins[0], 2)) == "ok"


def test_no_credentials_at_all(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    client = connect(store.swift.endpoint)
    assert client.credentials == "none"
    with pytest.raises(FetchError) as caught:
        client.head("layers", NAMES[0])
    assert caught.value.code == "credentials_missing"
    assert "--no-sign-request" in str(caught.value)


def test_program_against_swift(store: Store, tmp_path: Path) -> None:
    environment = store.swift.environment()
    del environment["AWS_ENDPOINT_URL"]
    with program(tmp_path, **environment, AWS_SESSION_TOKEN="") as fetcher:
        endpoint = {"endpoint_url": store.swift.endpoint, "quirks": "swift"}
        fetcher.say({"type": "hello", "endpoint": endpoint, "blob_dir": str(tmp_path / "blobs")})
        ready = fetcher.hear()
        assert ready["type"] == "ready" and ready["credentials"] == "env"
        fetcher.say(Head(id=1, bucket="layers", key=NAMES[0]))
        pin = fetcher.answer(1)["pins"][0]
        fetcher.say({"type": "fetch", "id": 2, "pin": pin})
        assert fetcher.answer(2)["digest"] == f"sha256:{sha256(DATA).hexdigest()}"
        code, err = fetcher.finish()
        assert (code, err) == (0, b"")
        assert swift.SECRET_KEY.encode() not in fetcher.heard
