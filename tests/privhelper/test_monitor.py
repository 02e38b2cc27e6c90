"""The door: only the table gets in, and everything else ends the connection with nothing changed."""

import fcntl
import json
import os
import random
import resource
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from privhelper import protocol
from privhelper.protocol import ProtocolError
from tests.privhelper.client import ROOT, SYSTEM_PYTHON, Helper, Layer, memfd
from tests.privhelper.conftest import MEMBER, Installation
from tests.privhelper.fuzz_messages import GOOD, LAYER, mutated

MESSAGES = int(os.environ.get("IMGPULL_FUZZ_MESSAGES", "1000000" if os.environ.get("CI") == "true" else "100000"))
FUZZER = "tests.privhelper.fuzz_messages"
BEST_OF = 3  # tries of a message that took too long: a machine at work stalls now and then, a message does not
SOCKET_MESSAGES = int(os.environ.get("IMGPULL_FUZZ_SOCKET_MESSAGES", "100"))

# ---------------------------------------------------------------- in process


def test_every_request_is_read_as_it_was_written() -> None:
    assert {message["op"] for message in GOOD} == protocol.REQUESTS.keys()
    for message in GOOD:
        op, fields = protocol.parse_request(protocol.encode(message))
        assert {"op": op, **fields} == message


BAD = [
    b"", b"null", b"[]", b"1", b'"hello"', b"{}", b'{"op":null}', b'{"op":"hello"}', b'{"op":"hello","version":1.0}',
    b'{"op":"hello","version":true}', b'{"op":"hello","version":"1"}', b'{"op":"hello","version":-1}',
    b'{"op":"hello","version":1,"version":1}', b'{"op":"hello","version":1,"x":1}', b'{"op":"hello","version":1e0}',
    b'{"op":"hello","version":NaN}', b'{"op":"hello","version":' + b"1" * 5000 + b"}", b'{"op":["hello"],"version":1}',
    b'{"op":"answer_hello","version":1}', b'{"op":"__init__"}', b'{"op":"list"} {"op":"list"}', b'\xff{"op":"list"}',
    b'{"op":"list","\\u0000":1}', b"[" * 60_000, b'{"a":' * 10_000,
    b'{"op":"stat","layer":"sha256:' + b"0" * 63 + b'"}',
    b'{"op":"stat","layer":"sha256:' + b"0" * 64 + b'\\n"}', b'{"op":"stat","layer":"' + b"0" * 64 + b'"}',
    b'{"op":"deactivate","name":"../a"}', b'{"op":"deactivate","name":""}', b'{"op":"deactivate","name":".a"}',
    b'{"op":"deactivate","name":"a\\u0000"}', b'{"op":"deactivate","name":"' + b"a" * 65 + b'"}',
    b'{"op":"commit","manifest_bytes":9223372036854775808,"payload_bytes":0}',
    b'{"op":"activate","layer":"' + LAYER.encode() + b'","mode":"rwx","name":"a","size":0}',
    b"x" * (protocol.MAX_MESSAGE + 1),
]  # fmt: skip


@pytest.mark.parametrize("data", BAD, ids=range(len(BAD)))
def test_bad_message_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        protocol.parse_request(data)


def test_fuzz_messages() -> None:
    """The claim stands in fuzz_messages.py; it runs there as the helper runs."""
    script = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); runpy.run_module('{FUZZER}', run_name='__main__')"
    command = [SYSTEM_PYTHON, "-I", "-S", "-B", "-c", script, str(MESSAGES)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(f"{found} in {time.monotonic() - started:.0f} s")
    assert found["messages"] == MESSAGES
    assert 0 < found["reached"] < found["requests"] < MESSAGES
    assert found["peak_bytes"] < 64 << 20


# ---------------------------------------------------------------- over the socket


def hung_up(helper: Helper) -> bool:
    """Tell whether the helper ends the connection within a second, without an answer."""
    helper.sock.settimeout(1)
    return helper.sock.recv(1 << 16) == b""


@pytest.fixture
def unchanged(installation: Installation) -> Iterator[Installation]:
    """Return an installation whose ledger and pool are the same afterwards, byte for byte and name for name."""

    def state() -> Any:
        return [tuple(row) for row in installation.rows()], installation.images(), installation.loops()

    before = state()
    yield installation
    assert state() == before


root = pytest.mark.root


@root
@pytest.mark.parametrize("op", sorted(protocol.REQUESTS.keys() - {"hello"}))
def test_nothing_is_permitted_before_hello(unchanged: Installation, op: str) -> None:
    message = next(message for message in GOOD if message["op"] == op)
    with Helper(unchanged.config, uid=MEMBER) as helper:
        helper.send(message)
        assert hung_up(helper)


@root
def test_hello_twice(unchanged: Installation) -> None:
    with unchanged.connect(MEMBER) as helper:
        helper.send(GOOD[0])
        assert hung_up(helper)


@root
def test_other_version_is_told_and_stays_outside(unchanged: Installation) -> None:
    with Helper(unchanged.config, uid=MEMBER) as helper:
        assert helper.ask("hello", version=2)["code"] == "version"
        helper.send({"op": "list"})
        assert hung_up(helper)


@root
@pytest.mark.parametrize("data", [BAD[2], BAD[23], BAD[28], b"x" * 100_000], ids=["list", "deep", "path", "long"])
def test_malformed_message_is_hung_up_on(unchanged: Installation, data: bytes) -> None:
    with unchanged.connect(MEMBER) as helper:
        helper.send(data)
        assert hung_up(helper)


def sealed(*missing: int) -> Callable[[Path], int]:
    every = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    return lambda folder: memfd(b"x", every & ~sum(missing))


def opened(flags: int) -> Callable[[Path], int]:
    def make(folder: Path) -> int:
        path = folder / "file"
        path.write_bytes(b"x")
        return os.open(path, flags)

    return make


def fifo(folder: Path) -> int:
    os.mkfifo(folder / "fifo")
    return os.open(folder / "fifo", os.O_RDONLY | os.O_NONBLOCK)


GOOD_MANIFEST, GOOD_PAYLOAD = sealed(), opened(os.O_RDONLY)
WRONG: dict[str, list[Callable[[Path], int]]] = {
    "none": [],
    "one": [GOOD_MANIFEST],
    "three": [GOOD_MANIFEST, GOOD_PAYLOAD, GOOD_PAYLOAD],
    "253": [GOOD_MANIFEST, *[GOOD_PAYLOAD] * 252],
    "swapped": [GOOD_PAYLOAD, GOOD_MANIFEST],
    "manifest_regular_file": [opened(os.O_RDONLY), GOOD_PAYLOAD],
    "manifest_without_seal_write": [sealed(fcntl.F_SEAL_WRITE), GOOD_PAYLOAD],
    "manifest_without_seal_grow": [sealed(fcntl.F_SEAL_GROW), GOOD_PAYLOAD],
    "manifest_without_seal_shrink": [sealed(fcntl.F_SEAL_SHRINK), GOOD_PAYLOAD],
    "manifest_without_seal_seal": [sealed(fcntl.F_SEAL_SEAL), GOOD_PAYLOAD],
    "manifest_future_write_only": [lambda folder: memfd(b"x", 0x10 | 0x1 | 0x2 | 0x4), GOOD_PAYLOAD],
    "payload_read_write": [GOOD_MANIFEST, opened(os.O_RDWR)],
    "payload_write_only": [GOOD_MANIFEST, opened(os.O_WRONLY)],
    "payload_path_only": [GOOD_MANIFEST, lambda folder: os.open("/etc/shadow", os.O_PATH)],
    "payload_directory": [GOOD_MANIFEST, lambda folder: os.open(folder, os.O_RDONLY)],
    "payload_fifo": [GOOD_MANIFEST, fifo],
    "payload_device": [GOOD_MANIFEST, lambda folder: os.open("/dev/zero", os.O_RDONLY)],
    "payload_socket": [GOOD_MANIFEST, lambda folder: socket.socket(socket.AF_UNIX).detach()],
    "payload_proc": [GOOD_MANIFEST, lambda folder: os.open("/proc/self/maps", os.O_RDONLY)],
}


@root
@pytest.mark.parametrize("case", WRONG)
def test_wrong_descriptors_are_hung_up_on(unchanged: Installation, tmp_path: Path, case: str) -> None:
    fds = []
    for number, make in enumerate(WRONG[case]):
        folder = tmp_path / str(number)
        folder.mkdir()
        fds.append(make(folder))
    with unchanged.connect(MEMBER) as helper:
        helper.send({"op": "commit", "manifest_bytes": 1, "payload_bytes": 1}, fds)
        assert hung_up(helper)
    for fd in fds:
        os.close(fd)


@root
@pytest.mark.parametrize("message", [m for m in GOOD[1:] if m["op"] != "commit"], ids=lambda m: m["op"])
def test_descriptor_that_nobody_asked_for(unchanged: Installation, message: dict[str, Any]) -> None:
    with unchanged.connect(MEMBER) as helper, open("/etc/hostname", "rb") as file:
        helper.send(message, [file.fileno()])
        assert hung_up(helper)


@root
def test_slow_reader_is_hung_up_on(unchanged: Installation) -> None:
    with unchanged.connect(MEMBER) as helper:
        helper.sock.setblocking(False)
        try:
            for _ in range(100_000):
                helper.send({"op": "stat", "layer": LAYER})  # and never reads
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass
        assert helper.process.wait(10) == 0


@root
def test_silent_peer_is_hung_up_on(installation: Installation) -> None:
    installation.configure("[connection]\nhello_timeout_s = 0\n")
    with Helper(installation.config, uid=MEMBER) as helper:
        assert hung_up(helper)


@root
def test_flood_of_messages_leaves_memory_and_descriptors(unchanged: Installation) -> None:
    with unchanged.connect(MEMBER) as helper:
        start = set(os.listdir(f"/proc/{helper.process.pid}/fd"))
        for _ in range(5000):
            assert helper.ask("stat", layer=LAYER)["state"] == "absent"
        assert set(os.listdir(f"/proc/{helper.process.pid}/fd")) == start
        assert _peak_bytes(helper) < 64 << 20


@root
def test_fuzz_socket(unchanged: Installation) -> None:
    """Invariant tested: whatever is sent, the store is the same, an answer or a hang-up comes within a second, and the
    helper stays below 64 MiB. Requests that would change something are left out: their layer does not exist anyway."""
    rng = random.Random(20260102)
    helper, slowest, peak = unchanged.connect(MEMBER), 0.0, 0
    null = os.open("/dev/null", os.O_RDONLY)
    for _ in range(SOCKET_MESSAGES):
        data = mutated(rng)
        fds = [null] * rng.choice((0, 0, 0, 1, 2, 3))
        for _ in range(BEST_OF):
            before = time.monotonic()
            reply = _ask(helper, data or b"{", fds)
            seconds = time.monotonic() - before
            peak = max(peak, _peak_bytes(helper))
            if not reply:
                helper.close()
                helper = unchanged.connect(MEMBER)
            if seconds < 1:
                break
        slowest = max(slowest, seconds)
    helper.close()
    os.close(null)
    print(f"{SOCKET_MESSAGES} messages, slowest {slowest * 1000:.0f} ms, peak {peak >> 20} MiB")
    assert slowest < 1
    assert peak < 64 << 20


def _ask(helper: Helper, data: bytes, fds: list[int]) -> bytes:
    """Return the last line of the answer, nothing for a hang-up."""
    helper.sock.settimeout(60)
    try:
        helper.send(data, fds)
        while (reply := helper.sock.recv(1 << 16)) and b'"type":"item"' in reply:
            pass
    except (BrokenPipeError, ConnectionResetError):
        return b""
    return reply


def _peak_bytes(helper: Helper) -> int:
    try:
        text = Path(f"/proc/{helper.process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    peaks = [int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")]
    return peaks[0] * 1024 if peaks else 0


@root
def test_descriptors_do_not_leak_over_commits(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    payload = layer.write_payload(tmp_path)
    with installation.connect(MEMBER) as helper:
        start = set(os.listdir(f"/proc/{helper.process.pid}/fd"))
        for _ in range(3):
            assert helper.commit(layer.manifest(), payload)["existed"] is False
            assert helper.ask("remove", layer=layer.id())["removed"] is True
        broken = Layer()
        broken.file(0, "f", b"x", sha256="0" * 64)
        for _ in range(3):
            assert helper.commit(broken.manifest(), broken.write_payload(tmp_path))["rule"] == "payload_digest"
        assert helper.ask("list")["items"] == []  # what the last request brought is closed by now
        assert set(os.listdir(f"/proc/{helper.process.pid}/fd")) == start


@root
def test_helper_wants_one_connected_socket(installation: Installation) -> None:
    done = installation.run("serve", check=False)
    assert (done.returncode, "LISTEN_FDS=1" in done.stderr) == (2, True)


def test_limits_of_this_test() -> None:
    """The machine must allow 253 descriptors in flight, else the flood above proves nothing."""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 512
    assert stat.S_ISREG(0o100000)
