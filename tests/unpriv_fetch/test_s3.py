"""boto3's whole configuration surface, its errors, and what the wire shows of both."""

import inspect
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import boto3
import botocore.exceptions
import pytest
import trio
import urllib3.exceptions
from botocore.config import Config

from broker.protocol import Endpoint, FetchFailed, Head, Hello, List, Pin, Pins
from tests.servers import moto
from tests.servers.faults import Object, Server, in_thread, serving
from tests.unpriv_fetch.harness import QUICK, SECRET, connect, fetching, outcome
from unpriv import s3
from unpriv.failures import FetchError

DATA: Final = os.urandom(40_000)
EXCEPTIONS: Final = [
    made
    for module in (botocore.exceptions, urllib3.exceptions)
    for made in vars(module).values()
    if inspect.isclass(made) and issubclass(made, Exception) and not issubclass(made, Warning)
]


def make(kind: type[Exception]) -> Exception:
    """Return an exception of a class, however it wants to be made."""
    response = {"Error": {"Code": SECRET}, "ResponseMetadata": {"HTTPStatusCode": 418}}
    for arguments in ((), (response, "GetObject"), ("x",), (None, "x"), (None, "x", "y"), ("x", "y", "z"), (None,) * 4):
        try:
            return kind(*arguments)
        except Exception:  # the next guess
            continue
    return kind.__new__(kind)


@pytest.mark.parametrize("kind", [*EXCEPTIONS, AttributeError, MemoryError, RecursionError, ValueError, KeyError])
def test_every_exception_has_a_code(kind: type[Exception]) -> None:
    error = make(kind)
    with pytest.raises(FetchError) as caught, s3.translated("read s3://b/k"):
        raise error
    assert caught.value.message.startswith("cannot read s3://b/k: ")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (botocore.exceptions.NoCredentialsError, "credentials_missing"),
        (botocore.exceptions.UnauthorizedSSOTokenError, "credentials_missing"),
        (botocore.exceptions.ConnectTimeoutError, "timed_out"),
        (botocore.exceptions.ReadTimeoutError, "timed_out"),
        (urllib3.exceptions.ReadTimeoutError, "timed_out"),
        (botocore.exceptions.EndpointConnectionError, "unavailable"),
        (botocore.exceptions.ProxyConnectionError, "unavailable"),
        (botocore.exceptions.ConnectionClosedError, "unavailable"),
        (urllib3.exceptions.IncompleteRead, "unavailable"),
        (botocore.exceptions.NoRegionError, "configuration"),
        (botocore.parsers.ResponseParserError, "bad_response"),
        (AttributeError, "bad_response"),
        (MemoryError, "bad_response"),
    ],
)
def test_exceptions_have_the_right_code(kind: type[Exception], code: str) -> None:
    assert s3.translate(make(kind), "x").code == code


# ---------------------------------------------------------------- configuration


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with two profiles and nothing in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home" / ".aws"
    folder.mkdir(parents=True)
    (folder / "credentials").write_text(
        f"[default]\naws_access_key_id = AKIDDEFAULT\naws_secret_access_key = {SECRET}\n"
        f"[work]\naws_access_key_id = AKIDWORK\naws_secret_access_key = {SECRET}\n"
    )
    (folder / "config").write_text(
        "[profile work]\nregion = eu-north-1\nendpoint_url = http://work.example\nmax_attempts = 9\n"
        "s3 =\n  addressing_style = virtual\n"
        f"[profile process]\ncredential_process = {folder}/process\n"
    )
    process = folder / "process"
    process.write_text(f'#!/bin/sh\necho \'{{"Version":1,"AccessKeyId":"AKIDPROC","SecretAccessKey":"{SECRET}"}}\'\n')
    process.chmod(0o700)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path / "home"


def start(**endpoint: Any) -> s3.Client:
    return s3.connect(Endpoint(**endpoint), 4, connect_timeout_s=1, read_timeout_s=1)


def test_profile_brings_region_endpoint_attempts_and_addressing(home: Path) -> None:
    client = start(profile="work")
    assert client.url == "http://work.example"
    assert client._s3.meta.region_name == "eu-north-1"
    assert client.attempts == 9
    assert client._s3.meta.config.s3["addressing_style"] == "virtual"
    assert client.credentials == "shared-credentials-file"
    assert client.secrets() == (SECRET,)


def test_environment_goes_before_the_profile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_PROFILE": "work",
        "AWS_ENDPOINT_URL_S3": "http://env.example",
        "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "ap-south-1",
        "AWS_MAX_ATTEMPTS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    client = start()
    assert (client.url, client.attempts) == ("http://env.example", 2)


def test_command_line_goes_before_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env.example")
    client = start(profile="work", endpoint_url="http://flag.example", region="eu-west-3", addressing="path")
    assert (client.url, client._s3.meta.region_name) == ("http://flag.example", "eu-west-3")
    assert client._s3.meta.config.s3["addressing_style"] == "path"


def test_credential_process_runs_before_the_sandbox(home: Path) -> None:
    client = start(profile="process")
    assert client.credentials == "custom-process"
    assert SECRET in client.secrets()


def test_unsigned_needs_no_credentials(home: Path) -> None:
    (home / ".aws" / "credentials").unlink()
    client = start(no_sign_request=True)
    assert client.credentials == "anonymous"


def test_unreadable_configuration_has_a_reason(home: Path) -> None:
    (home / ".aws" / "config").write_text("this is no [configuration\n")
    with pytest.raises(FetchError) as caught:
        start()
    assert caught.value.code == "configuration"


def test_files_that_the_sandbox_must_leave_readable(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "token").write_text("x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(home / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    client = start()
    wanted = {
        str(home / ".aws" / "config"),
        str(home / ".aws" / "credentials"),
        str(home / "token"),
        "/etc/resolv.conf",
    }
    assert wanted <= set(client.readable)
    assert not {"/", "/etc", "/home", "/root", str(home)} & set(client.readable)


@pytest.mark.parametrize("quirks", s3.QUIRKS)
def test_quirk_profiles_start(quirks: str, home: Path) -> None:
    assert set(s3.QUIRKS) == set(
        Hello.model_fields and Endpoint.model_json_schema()["properties"]["quirks"]["anyOf"][0]["enum"]
    )
    start(quirks=quirks, endpoint_url="http://127.0.0.1:1")


# ---------------------------------------------------------------- on the wire


async def test_request_payer_and_conditions_are_sent(tmp_path: Path) -> None:
    server = Server()
    server.objects["b/k"] = Object(DATA)
    async with serving(server), fetching(connect(server.url, request_payer=True), tmp_path) as bench:
        headed = await bench.ask(Head(id=1, bucket="b", key="k"))
        assert isinstance(headed, Pins)
        assert outcome(await bench.fetch(headed.pins[0], 2)) == "ok"
        await bench.ask(List(id=3, bucket="b", prefix=""))
    assert all(headers.get("x-amz-request-payer") == "requester" for headers in server.seen)
    ranged = [headers for headers in server.seen if "range" in headers]
    assert ranged and all(headers["if-match"] == headed.pins[0].etag for headers in ranged)
    assert all(headers["authorization"].startswith("AWS4-HMAC-SHA256") for headers in server.seen)
    assert SECRET not in str(server.seen)


async def test_unsigned_requests_carry_no_credential(tmp_path: Path) -> None:
    server = Server()
    server.objects["b/k"] = Object(DATA)
    async with serving(server), fetching(connect(server.url, no_sign_request=True), tmp_path) as bench:
        assert isinstance(await bench.ask(Head(id=1, bucket="b", key="k")), Pins)
    assert all("authorization" not in headers for headers in server.seen)


async def test_proxy_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    async with serving(server):
        monkeypatch.setenv("http_proxy", server.url)
        async with fetching(connect("http://s3.example.invalid"), tmp_path) as bench:
            await bench.ask(Head(id=1, bucket="b", key="k"))
    assert server.seen and all(headers["host"] == "s3.example.invalid" for headers in server.seen)


async def test_proxy_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://user:{SECRET}@127.0.0.1:{taken.getsockname()[1]}")
        async with fetching(connect("http://s3.example.invalid"), tmp_path) as bench:
            report = await bench.ask(Head(id=1, bucket="b", key="k"))
    assert isinstance(report, FetchFailed)
    assert report.code == "unavailable" and SECRET not in report.message


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost that signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost "
        "-addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout key.pem -out cert.pem"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


async def tls_server(server: Server, certificate: Path, task_status: trio.TaskStatus[int]) -> None:
    """Serve the same objects over TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    plain = await trio.open_tcp_listeners(0, host="127.0.0.1")
    task_status.started(plain[0].socket.getsockname()[1])
    handler: Any = server.handle  # a TLS stream does as well
    await trio.serve_listeners(handler, [trio.SSLListener(one, context, https_compatible=True) for one in plain])


async def test_tls_with_its_own_authority(certificate: Path, tmp_path: Path) -> None:
    server = Server()
    server.objects["b/k"] = Object(DATA)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(tls_server, server, certificate)
        bundle = str(certificate / "cert.pem")
        async with fetching(connect(f"https://127.0.0.1:{port}", ca_bundle=bundle), tmp_path / "a") as bench:
            headed = await bench.ask(Head(id=1, bucket="b", key="k"))
            assert isinstance(headed, Pins)
            assert outcome(await bench.fetch(headed.pins[0], 2)) == "ok"
        async with fetching(connect(f"https://127.0.0.1:{port}"), tmp_path / "b") as bench:
            report = await bench.ask(Head(id=1, bucket="b", key="k"))
            assert isinstance(report, FetchFailed)
            assert report.code == "configuration" and "--ca-bundle" in report.message
        nursery.cancel_scope.cancel()


async def test_tls_to_a_server_without_it_is_unavailable(tmp_path: Path) -> None:
    async def answer_in_plain(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        plain = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, answer_in_plain, plain)
        url = f"https://127.0.0.1:{plain[0].socket.getsockname()[1]}"
        async with fetching(connect(url), tmp_path) as bench:
            assert outcome(await bench.ask(Head(id=1, bucket="b", key="k"))) == "unavailable"
        nursery.cancel_scope.cancel()


def test_request_that_hangs_can_be_cut() -> None:
    server = Server()
    server.objects["b/k"] = Object(DATA, "silence_before_the_status", 0, 9)
    with in_thread(server):
        client = connect(server.url, tuning=replace(QUICK, read_timeout_s=60))
        line = s3.Line()
        pin = Pin(bucket="b", key="k", size=len(DATA), etag=server.objects["b/k"].etag)
        with pytest.raises(FetchError) as caught:
            trio.run(cut_after_a_while, line, lambda: client.open(pin, 0, 10))
        assert caught.value.code == "unavailable"


async def cut_after_a_while(line: s3.Line, ask: Any) -> None:
    """Cut a line once its thread waits for an answer."""
    failed: list[FetchError] = []

    def speak() -> None:
        try:
            line.run(ask)
        except FetchError as error:
            failed.append(error)

    with trio.fail_after(20):  # before its own timeout
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, speak)
            while line._sock is None:  # noqa: ASYNC110  # another thread sets it
                await trio.sleep(0.01)
            await trio.sleep(0.05)
            line.cut()
    raise failed[0]


# ---------------------------------------------------------------- moto: versions and checksums


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    with moto.running() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
        )
        client.create_bucket(Bucket="bucket")
        yield client
        client.close()


@pytest.mark.parametrize("algorithm", ["SHA256", "CRC64NVME", "CRC32C", "CRC32"])
async def test_stored_checksum_is_compared(algorithm: str, store: Any, tmp_path: Path) -> None:
    store.put_object(Bucket="bucket", Key=algorithm, Body=DATA, ChecksumAlgorithm=algorithm)
    client = connect(store.meta.endpoint_url)
    async with fetching(client, tmp_path) as bench:
        headed = await bench.ask(Head(id=1, bucket="bucket", key=algorithm))
        assert isinstance(headed, Pins)
        found = client.checksum(headed.pins[0])
        assert found is not None and found.algorithm == algorithm.lower()
        assert outcome(await bench.fetch(headed.pins[0], 2)) == "ok"


async def test_pinned_version_stays_though_the_object_was_replaced(store: Any, tmp_path: Path) -> None:
    store.create_bucket(Bucket="versions")
    store.put_bucket_versioning(Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    store.put_object(Bucket="versions", Key="k", Body=DATA)
    async with fetching(connect(store.meta.endpoint_url), tmp_path) as bench:
        headed = await bench.ask(Head(id=1, bucket="versions", key="k"))
        assert isinstance(headed, Pins) and headed.pins[0].version
        store.put_object(Bucket="versions", Key="k", Body=b"replaced")
        assert outcome(await bench.fetch(headed.pins[0], 2)) == "ok"
        store.delete_object(Bucket="versions", Key="k")
        assert outcome(await bench.ask(Head(id=3, bucket="versions", key="k"))) == "no_such_object"


async def test_listing_of_a_bucket_that_keeps_versions_pins_them(store: Any, tmp_path: Path) -> None:
    store.create_bucket(Bucket="kept")
    store.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Enabled"})
    written = [store.put_object(Bucket="kept", Key=f"i/{n}.tar", Body=DATA)["VersionId"] for n in (1, 2, 3)]
    async with fetching(connect(store.meta.endpoint_url), tmp_path) as bench:
        listed = await bench.ask(List(id=1, bucket="kept", prefix="i/"))
        assert isinstance(listed, Pins)
        assert [(pin.key, pin.version) for pin in listed.pins] == [
            (f"i/{n}.tar", version) for n, version in enumerate(written, 1)
        ]
        for n in (1, 2, 3):
            store.put_object(Bucket="kept", Key=f"i/{n}.tar", Body=b"replaced")
        assert [outcome(await bench.fetch(pin, n)) for n, pin in enumerate(listed.pins, 2)] == ["ok"] * 3


async def test_listing_too_long(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unpriv.s3.client.MAX_LAYERS", 3)
    for number in range(5):
        store.put_object(Bucket="bucket", Key=f"many/{number}.tar", Body=b"x")
    async with fetching(connect(store.meta.endpoint_url), tmp_path) as bench:
        assert outcome(await bench.ask(List(id=1, bucket="bucket", prefix="many/"))) == "listing_too_long"


async def test_keys_that_need_quoting(tmp_path: Path) -> None:
    names = ["odd/a b+c%20&<>.tar", "odd/ünï.tar", "odd/new\nline.tar", "odd/..%2fup.tar", "odd/?x=y#z"]
    server = Server()
    for name in names:
        server.objects[f"bucket/{name}"] = Object(name.encode())
    async with serving(server), fetching(connect(server.url), tmp_path) as bench:
        listed = await bench.ask(List(id=1, bucket="bucket", prefix="odd/"))
        assert isinstance(listed, Pins)
        assert sorted(pin.key for pin in listed.pins) == sorted(names)
        for number, pin in enumerate(listed.pins, 2):
            assert outcome(await bench.fetch(pin, number)) == "ok"
        assert sorted(bench.blobs().values()) == sorted(name.encode() for name in names)
