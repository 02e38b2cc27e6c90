"""The program as a process: its sandbox, its end, its secrets, and what kill -9 leaves."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest

from broker.protocol import Pin
from tests.servers import moto
from tests.servers.faults import ALWAYS, Object, Server, in_thread
from tests.unpriv_fetch.harness import SECRET, TOKEN, Program, environment, program

SIZE: Final = 3 << 20
CELL: Final = 64 << 10
DATA: Final = random.Random(7).randbytes(SIZE)
DIGEST: Final = f"sha256:{sha256(DATA).hexdigest()}"
# The program with smaller cells, so that a kill finds it in the middle of many.
SMALL: Final = (
    "from unpriv.fetch import main; from unpriv.ranges import Tuning; "
    f"main(Tuning(cell_bytes={CELL}, report_every_s=0.01, attempts=2))"
)


@pytest.fixture
def server() -> Iterator[Server]:
    with in_thread(Server()) as running:
        running.objects["b/k"] = Object(DATA)
        yield running


def pin_of(server: Server, key: str = "k") -> Pin:
    found = server.objects[f"b/{key}"]
    return Pin(bucket="b", key=key, size=len(found.data), etag=found.etag)


def greet(fetcher: Program, server: Server, folder: Path, **more: Any) -> dict[str, Any]:
    """Say hello; return what came back."""
    endpoint = {"endpoint_url": server.url, "addressing": "path"}
    fetcher.say({"type": "hello", "endpoint": endpoint, "blob_dir": str(folder), **more})
    return fetcher.hear()


def fetch(fetcher: Program, server: Server, number: int = 1, key: str = "k") -> None:
    fetcher.say({"type": "fetch", "id": number, "pin": pin_of(server, key).model_dump()})


def test_whole_conversation_holds_no_secret(server: Server, tmp_path: Path) -> None:
    """The greatest leak there could be: a server that sends back every header that it was sent."""
    server.objects["b/echo"] = Object(DATA, "denied", 0, ALWAYS, etag=f'"{TOKEN}"')
    with program(tmp_path) as fetcher:
        ready = greet(fetcher, server, tmp_path / "blobs")
        assert ready["credentials"] == "env"
        assert ready["sandbox"]["seccomp"].startswith("fetch")
        fetcher.say({"type": "list", "id": 1, "bucket": "b", "prefix": ""})
        assert fetcher.answer(1)["code"] == "bad_response"  # an ETag that is our token
        fetcher.say({"type": "head", "id": 2, "bucket": "b", "key": TOKEN})
        assert fetcher.answer(2)["code"] == "no_such_object"
        fetch(fetcher, server, 3, "echo")
        assert fetcher.answer(3)["code"] == "access_denied"
        fetch(fetcher, server, 4)
        assert fetcher.answer(4)["digest"] == DIGEST
        code, err = fetcher.finish()
        assert (code, err) == (0, b"")
        sent = str(server.seen)
        assert TOKEN in sent and SECRET not in sent  # the test reaches as far as the network
        for secret in (SECRET.encode(), TOKEN.encode()):
            assert secret not in fetcher.heard
            assert all(secret not in path.read_bytes() for path in (tmp_path / "blobs").rglob("*") if path.is_file())


def test_end_of_requests_cancels_at_once(server: Server, tmp_path: Path) -> None:
    server.objects["b/k"] = Object(DATA, "silence_in_the_body", SIZE // 2, ALWAYS)
    with program(tmp_path) as fetcher:
        greet(fetcher, server, tmp_path / "blobs")
        fetch(fetcher, server)
        assert fetcher.hear()["type"] == "progress"
        assert fetcher.finish() == (0, b"")  # or TimeoutExpired, before the server's silence is too long


def test_request_that_makes_no_sense_ends_the_program(server: Server, tmp_path: Path) -> None:
    with program(tmp_path) as fetcher:
        greet(fetcher, server, tmp_path / "blobs")
        fetcher.say({"type": "fetch", "id": 1, "path": "/etc/passwd"})
        code, err = fetcher.finish()
        assert code == 70
        assert err.startswith(b"imgpull-fetch: ProtocolError") and err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("endpoint", "environment", "code"),
    [
        ({"endpoint_url": "ftp://127.0.0.1"}, {}, "configuration"),
        ({"endpoint_url": f"http://user:{SECRET}@127.0.0.1"}, {}, "configuration"),
        ({"profile": "nobody"}, {}, "configuration"),
        ({"endpoint_url": "http://127.0.0.1:1", "ca_bundle": "/nowhere/ca.pem"}, {}, "configuration"),
        ({}, {"AWS_CONFIG_FILE": __file__}, "configuration"),
    ],
)
def test_no_start_has_a_reason(
    endpoint: dict[str, Any], environment: dict[str, str], code: str, tmp_path: Path
) -> None:
    with program(tmp_path, **environment) as fetcher:
        fetcher.say({"type": "hello", "endpoint": endpoint, "blob_dir": str(tmp_path / "blobs")})
        report = fetcher.hear()
        assert (report.get("type"), report.get("id"), report.get("code")) == ("failed", 0, code), report
        exit_code, err = fetcher.finish()
        assert (exit_code, err) == (78, b"")
        assert SECRET.encode() not in fetcher.heard


def test_two_processes_one_fetches_the_other_waits(server: Server, tmp_path: Path) -> None:
    server.round_trip_s, server.window_bytes = 0.02, 32 << 10
    with program(tmp_path, code=SMALL) as first, program(tmp_path, code=SMALL) as second:
        for fetcher in (first, second):
            greet(fetcher, server, tmp_path / "blobs")
        fetch(first, server)
        assert first.hear()["type"] == "progress"  # it has the lock
        fetch(second, server)
        answers = [first.answer(1), second.answer(1)]
        assert [answer["digest"] for answer in answers] == [DIGEST, DIGEST]
        assert sorted(answer["transferred_bytes"] for answer in answers) == [0, SIZE]
        assert b"another pull fetches this object" in second.heard
    assert list((tmp_path / "blobs" / "partial").iterdir()) == []


# Forks a fetcher, kills it after a while, again and again: the start of a whole interpreter would cost a second each.
KILLER: Final = """
import json, os, random, shutil, signal, sys, time
from unpriv import fetch, fetcher, lines, s3
from broker.protocol import Hello
from unpriv.ranges import Tuning
hello = Hello.model_validate_json(sys.argv[1])
chance = random.Random(11)
client = s3.connect(hello.endpoint, hello.max_streams, connect_timeout_s=5, read_timeout_s=5)
s3.connect = lambda *a, **k: client
fetch.confine = lambda *a: {}
finished = 0
for kill in range(int(sys.argv[3])):
    asks, tells = os.pipe()
    os.write(tells, sys.argv[2].encode() + b"\\n")
    pid = os.fork()
    if pid == 0:
        os._exit(fetch.run(hello, lines.Requests(asks), os.open("/dev/null", os.O_WRONLY), Tuning(cell_bytes=CELL)))
    time.sleep(chance.uniform(0, 0.25))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(asks), os.close(tells)
    if os.path.isdir(hello.blob_dir + "/sha256") and os.listdir(hello.blob_dir + "/sha256"):
        finished += 1
        shutil.move(hello.blob_dir, f"{hello.blob_dir}.{finished}")
print(finished)
"""


def test_kill_9_costs_at_most_a_cell_a_stream(server: Server, tmp_path: Path) -> None:
    """Fifty kills at random: what is fetched again is bounded, and every blob is right."""
    max_streams, kills = 4, 50
    server.round_trip_s, server.window_bytes = 0.004, 16 << 10
    folder = tmp_path / "blobs"
    endpoint = {"endpoint_url": server.url, "addressing": "path"}
    hello = {"type": "hello", "endpoint": endpoint, "blob_dir": str(folder), "max_streams": max_streams}
    request = {"type": "fetch", "id": 1, "pin": pin_of(server).model_dump()}
    code = KILLER.replace("CELL", str(CELL))
    command = [sys.executable, "-I", "-c", code, json.dumps(hello), json.dumps(request), str(kills)]
    done = subprocess.run(command, capture_output=True, env=environment(tmp_path), timeout=120)
    assert done.returncode == 0, done.stderr
    with program(tmp_path, code=SMALL) as fetcher:
        greet(fetcher, server, folder, max_streams=max_streams)
        fetch(fetcher, server)
        assert fetcher.answer(1)["digest"] == DIGEST
    blobs = list(tmp_path.glob("blobs*/sha256/*"))
    assert {blob.name for blob in blobs} == {DIGEST[7:]}
    assert all(blob.read_bytes() == DATA for blob in blobs)
    asked_bytes = sum(n * (end - start) for (start, end), n in server.objects["b/k"].gets.items())
    assert asked_bytes - len(blobs) * SIZE <= kills * max_streams * CELL
    assert len(blobs) < kills / 2, "the kills came too late to prove anything"


PROBES: Final = {
    "exec": "import os; os.execv('/bin/true', ['true'])",
    "fork": "import os; os.fork()",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX).connect('/run/imgpull/helper.sock')",
    "abstract unix socket": "import socket; socket.socket(socket.AF_UNIX).connect(chr(0) + 'x')",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0))",
    "ptrace": "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)",
    "read passwd": "open('/etc/passwd').read()",
    "write home": "open('{home}/.bashrc', 'w')",
    "read a neighbour": "open('{home}/secret').read()",
    "chmod": "import os; os.chmod('{home}/secret', 0o777)",
    "link out of the blob directory": "import os; os.symlink('/etc/passwd', '{home}/blobs/x')",
    "executable memory": "import mmap; mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "another process's memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "kill": "import os; os.kill({pid}, 0)",
    "raw socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "mount": "import ctypes; ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, None)",
    "user namespace": "import ctypes; ctypes.CDLL(None).unshare(0x10000000)",
    "keyring": "import ctypes; ctypes.CDLL(None).syscall(250, 0, -3, 0)",
}
INSIDE: Final = """
import ctypes, mmap, os, socket, sys, unpriv.fetch as fetch
from broker.protocol import Endpoint, Hello
from unpriv import s3
client = s3.connect(Endpoint(no_sign_request=True), 2, connect_timeout_s=1, read_timeout_s=1)
hello = Hello(endpoint=Endpoint(), blob_dir=sys.argv[1])
fetch.BlobDir.open(hello.blob_dir)
fetch.confine(hello, client.readable, client.writable)
os.write(1, b"in")
try:
    {probe}
except (OSError, PermissionError):
    os._exit(13)
os.write(1, b"done")
os._exit(0)
"""


@pytest.mark.parametrize("probe", PROBES)
def test_sandbox_stops(probe: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("victim")
    (tmp_path / "secret").chmod(0o600)
    code = INSIDE.replace("{probe}", PROBES[probe]).replace("{home}", str(tmp_path)).replace("{pid}", str(os.getpid()))
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "blobs")],
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"},
    )
    assert done.stdout == b"in", (done.stdout, done.stderr)
    assert done.returncode in (13, -signal.SIGSYS), done.stderr
    assert (tmp_path / "secret").read_text() == "victim"
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / ".bashrc").exists()
    assert not (tmp_path / "blobs" / "x").is_symlink()


def test_credentials_of_a_web_identity_are_fetched_inside_the_sandbox(server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token-of-the-cluster")
    identity = {
        "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_SESSION_TOKEN": "",
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(tmp_path / "token"), "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/pull",
    }  # fmt: skip
    with moto.running() as url, program(tmp_path, **identity, AWS_ENDPOINT_URL_STS=url) as fetcher:
        assert greet(fetcher, server, tmp_path / "blobs")["credentials"] == "assume-role-with-web-identity"
        fetch(fetcher, server)
        assert fetcher.answer(1)["digest"] == DIGEST
        assert fetcher.finish() == (0, b"")
        token = next(headers["x-amz-security-token"] for headers in server.seen)
        assert token.encode() not in fetcher.heard


def test_credential_process_runs_though_the_sandbox_forbids_it(server: Server, tmp_path: Path) -> None:
    process = tmp_path / "process"
    process.write_text(f'#!/bin/sh\necho \'{{"Version":1,"AccessKeyId":"AKIDPROC","SecretAccessKey":"{SECRET}"}}\'\n')
    process.chmod(0o700)
    (tmp_path / "config").write_text(f"[profile process]\ncredential_process = {process}\n")
    found = {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "process", "AWS_ACCESS_KEY_ID": ""}
    with program(tmp_path, **found, AWS_SECRET_ACCESS_KEY="", AWS_SESSION_TOKEN="") as fetcher:
        assert greet(fetcher, server, tmp_path / "blobs")["credentials"] == "custom-process"
        fetch(fetcher, server)
        assert fetcher.answer(1)["digest"] == DIGEST
        assert "AKIDPROC" in server.seen[0]["authorization"]


def test_memory_stays_below_100_mib(server: Server, tmp_path: Path) -> None:
    server.objects["b/large"] = Object(random.Random(1).randbytes(96 << 20))
    with program(tmp_path) as fetcher:
        greet(fetcher, server, tmp_path / "blobs", max_streams=16)
        fetch(fetcher, server, 1, "large")
        assert fetcher.answer(1)["size"] == 96 << 20
        status = Path(f"/proc/{fetcher.process.pid}/status").read_text()
        peak_kib = int(status.split("VmHWM:")[1].split()[0])
        assert peak_kib < 100 << 10


def test_names_resolve_inside_the_sandbox(server: Server, tmp_path: Path) -> None:
    with program(tmp_path) as fetcher:
        endpoint = {"endpoint_url": server.url.replace("127.0.0.1", "localhost"), "addressing": "path"}
        fetcher.say({"type": "hello", "endpoint": endpoint, "blob_dir": str(tmp_path / "blobs")})
        assert fetcher.hear()["type"] == "ready"
        fetch(fetcher, server)
        assert fetcher.answer(1)["digest"] == DIGEST
