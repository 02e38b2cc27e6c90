"""Where credentials come from: each source of the AWS SDK, live, through the locked program.

A small server on loopback stands for the services of AWS that give them out: the instance's metadata (IMDSv2), the
container agent, and the portal of IAM Identity Center (SSO). The protocols are those of the AWS SDKs' reference guide.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from broker.protocol import Pin
from tests.servers.faults import Object, Server, in_thread
from tests.unpriv_fetch.harness import SECRET, TOKEN, program

DATA: Final = b"a layer" * 1000
NO_KEYS: Final = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SESSION_TOKEN": ""}
SESSION: Final = "hush-this-is-the-sso-session"
LATER: Final = datetime.now(UTC) + timedelta(hours=1)
IMDS: Final = "/latest/meta-data/iam/security-credentials/"


class Services(BaseHTTPRequestHandler):
    """The services, as far as the SDK asks them; whoever does not know their passwords gets nothing."""

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self.answer(b"imds-token")

    def do_GET(self) -> None:
        keys = {"AccessKeyId": "AKIDLIVE", "SecretAccessKey": SECRET, "Token": TOKEN, "Expiration": stamp(LATER)}
        path = self.path.partition("?")[0]
        if path == IMDS and self.headers["x-aws-ec2-metadata-token"] == "imds-token":
            self.answer(b"role")
        elif path == f"{IMDS}role" and self.headers["x-aws-ec2-metadata-token"] == "imds-token":
            self.answer(json.dumps({"Code": "Success", **keys}).encode())
        elif path == "/container" and self.headers["authorization"] == "let-me-in":
            self.answer(json.dumps(keys).encode())
        elif path == "/federation/credentials" and self.headers["x-amz-sso_bearer_token"] == SESSION:
            role = {"accessKeyId": "AKIDLIVE", "secretAccessKey": SECRET, "sessionToken": TOKEN}
            self.answer(json.dumps({"roleCredentials": role | {"expiration": int(LATER.timestamp() * 1000)}}).encode())
        else:
            self.send_error(403)

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def stamp(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def services() -> Iterator[str]:
    """Run the services; yield their URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Services) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def instance(url: str, home: Path) -> dict[str, str]:
    return {"AWS_EC2_METADATA_DISABLED": "false", "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}


def container(url: str, home: Path) -> dict[str, str]:
    (home / "password").write_text("let-me-in")
    return {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/container",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(home / "password"),
    }


def single_sign_on(url: str, home: Path) -> dict[str, str]:
    """Leave what ``aws sso login`` leaves: a profile, and the session in the cache that the SDKs share."""
    start = "https://example.awsapps.com/start"
    (home / "config").write_text(
        "[profile work]\nsso_session = office\nsso_account_id = 123456789012\nsso_role_name = puller\n"
        f"[sso-session office]\nsso_region = eu-central-1\nsso_start_url = {start}\nsso_registration_scopes = x\n"
    )
    cache = home / ".aws/sso/cache"
    cache.mkdir(parents=True)
    session = {"startUrl": start, "region": "eu-central-1", "accessToken": SESSION, "expiresAt": stamp(LATER)}
    (cache / f"{sha1(b'office', usedforsecurity=False).hexdigest()}.json").write_text(json.dumps(session))
    return {"AWS_CONFIG_FILE": str(home / "config"), "AWS_PROFILE": "work", "AWS_ENDPOINT_URL_SSO": url}


@pytest.mark.parametrize(
    ("source", "name"), [(instance, "iam-role"), (container, "container-role"), (single_sign_on, "sso")]
)
def test_live_source_gives_keys_inside_the_sandbox(source: Any, name: str, tmp_path: Path) -> None:
    with in_thread(Server()) as s3, services() as url:
        s3.objects["b/k"] = Object(DATA)
        found = source(url, tmp_path) | NO_KEYS
        with program(tmp_path, **found) as fetcher:
            hello = {
                "type": "hello",
                "endpoint": {"endpoint_url": s3.url, "addressing": "path", "region": "eu-central-1"},
            }
            fetcher.say({**hello, "blob_dir": str(tmp_path / "blobs")})
            ready = fetcher.hear()
            assert ready["type"] == "ready", ready
            assert ready["credentials"] == name
            pin = Pin(bucket="b", key="k", size=len(DATA), etag=s3.objects["b/k"].etag)
            fetcher.say({"type": "fetch", "id": 1, "pin": pin.model_dump()})
            assert fetcher.answer(1)["digest"] == f"sha256:{sha256(DATA).hexdigest()}"
            assert fetcher.finish() == (0, b"")
            assert all("AKIDLIVE" in headers["authorization"] for headers in s3.seen)
            assert all(headers["x-amz-security-token"] == TOKEN for headers in s3.seen)
            assert all(secret.encode() not in fetcher.heard for secret in (SECRET, TOKEN, SESSION))


def test_source_that_gives_nothing_is_named(tmp_path: Path) -> None:
    with in_thread(Server()) as s3, services() as url:
        s3.objects["b/k"] = Object(DATA)
        found = single_sign_on(url, tmp_path) | NO_KEYS
        for cached in (tmp_path / ".aws/sso/cache").iterdir():
            cached.write_text(json.dumps(json.loads(cached.read_text()) | {"expiresAt": "2020-01-01T00:00:00Z"}))
        with program(tmp_path, **found) as fetcher:
            endpoint = {"endpoint_url": s3.url, "addressing": "path", "region": "eu-central-1"}
            fetcher.say({"type": "hello", "endpoint": endpoint, "blob_dir": str(tmp_path / "blobs")})
            ready = fetcher.hear()
            if ready["type"] == "ready":
                fetcher.say({"type": "list", "id": 1, "bucket": "b", "prefix": ""})
                ready = fetcher.answer(1)
            assert ready["code"] == "credentials_missing", ready
            assert SESSION not in ready["message"]
