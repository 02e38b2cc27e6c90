"""One Swift and one bucket of images for all end-to-end tests; users and helper are those of tests/conftest.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest

from tests.layers.families import Family
from tests.layers.synthetic import write_large_files, write_small_files
from tests.servers.swift import Swift, running
from tests.support.accounts import Account
from tests.support.helper import Helper
from tests.support.output import check_output

BUCKET: Final = "demo"  # as the README's session has it


@dataclass(frozen=True, slots=True)
class Bucket:
    """The server, and a client that signs."""

    swift: Swift
    client: Any

    def put(self, name: str, layers: list[Path]) -> str:
        """Upload a family; return its reference."""
        for number, layer in enumerate(layers, 1):
            suffix = layer.name[layer.name.index(".") :]
            self.client.upload_file(str(layer), BUCKET, f"images/{name}/{number}{suffix}")
        return f"s3://{BUCKET}/images/{name}"


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    with running(tmp_path_factory.mktemp("swift") / "s3") as swift:
        client = swift.client()
        client.create_bucket(Bucket=BUCKET)
        yield Bucket(swift, client)


@pytest.fixture(scope="session")
def debian(bucket: Bucket, demo_families: dict[str, Family]) -> dict[str, str]:
    """Return the references of the real Debian families, uploaded."""
    return {name: bucket.put(name, list(family.layers)) for name, family in demo_families.items()}


@pytest.fixture(scope="session")
def small(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the references of two synthetic families that share a layer: a pull of one takes about a second."""
    folder = tmp_path_factory.mktemp("small")
    write_small_files(folder / "base.tar", files=1500)
    write_large_files(folder / "left.tar", total_bytes=24 << 20, files=3)
    write_large_files(folder / "right.tar", total_bytes=12 << 20, files=2, seed=5)
    with tarfile.open(folder / "top.tar", "w") as tar:  # a whiteout and a hard link to the layer below
        tar.addfile(tarfile.TarInfo("srv/small/0000/.wh.file-000000"))
        link = tarfile.TarInfo("srv/again")
        link.type, link.linkname = tarfile.LNKTYPE, "srv/small/0000/file-000001"
        tar.addfile(link)
    base, top = folder / "base.tar", folder / "top.tar"
    return {
        "left": bucket.put("left", [base, folder / "left.tar", top]),
        "right": bucket.put("right", [base, folder / "right.tar"]),
    }


@dataclass(frozen=True, slots=True)
class User:
    """An ordinary user with imgpull installed and S3 credentials in the environment."""

    account: Account
    program: Path
    helper: Helper

    def run(self, *words: str, code: int | tuple[int, ...] = 0, **environment: str) -> str:
        """Run imgpull; return what it printed on standard output. The exit code must be the one expected."""
        done = self.account.run(self.program, *words, check=False, timeout_s=300, **environment)
        expected = code if isinstance(code, tuple) else (code,)
        log = self.helper.log.read_text()[-1500:]
        assert done.returncode in expected, f"imgpull {' '.join(words)}: {done.returncode}\n{done.stderr}\n{log}"
        check_output(words, done.stdout)
        return done.stdout if code == 0 else done.stdout + done.stderr

    def json(self, *words: str) -> Any:
        return json.loads(self.run(*words, "--json"))

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start imgpull in the background."""
        return subprocess.Popen(
            [str(self.program), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **self.account.options(),
        )

    def may_write(self, device: str) -> bool:
        """Tell whether this user can open a device for reading and writing."""
        return (
            self.account.run("dd", f"if={device}", f"of={device}", "count=1", "conv=notrunc", check=False).returncode
            == 0
        )

    def files(self, folder: str) -> list[Path]:
        return [p for p in (self.account.home / folder).rglob("*") if p.is_file()]

    def forget(self) -> None:
        """Give everything back and lose all state, as if this user had never pulled."""
        for row in self.json("ls", "--activations"):
            self.run("deactivate", row["name"], code=(0, 66))
        for row in self.json("ls"):
            self.run("rm", row["image"])
        self.run("gc")
        for folder in (".local", ".cache"):
            subprocess.run(["rm", "-rf", str(self.account.home / folder)], check=True)


def _user(account: Account, installed: Path, helper: Helper, bucket: Bucket) -> User:
    environment = {"IMGPULL_HELPER_SOCKET": str(helper.socket), "IMGPULL_PROGRESS": "plain"}
    environment |= bucket.swift.environment()
    return User(replace(account, environment=environment), installed / "bin/imgpull", helper)


@pytest.fixture
def user(member: Account, installed: Path, helper: Helper, bucket: Bucket) -> Iterator[User]:
    made = _user(member, installed, helper, bucket)
    yield made
    made.forget()


@pytest.fixture
def second(second_member: Account, installed: Path, helper: Helper, bucket: Bucket) -> Iterator[User]:
    made = _user(second_member, installed, helper, bucket)
    yield made
    made.forget()


@pytest.fixture
def stranger(outsider: Account, installed: Path, helper: Helper, bucket: Bucket) -> User:
    return _user(outsider, installed, helper, bucket)


def processes_of(uid: int) -> dict[int, str]:
    """Return the processes of a user with their command lines."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.stat().st_uid == uid:
                found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def kill(pid: int) -> bool:
    """Kill a process; tell whether it was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    """Wait for what the kernel does on its own time after a kill: a process to be reaped, a loop to clear itself."""
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came about"
        time.sleep(0.02)
