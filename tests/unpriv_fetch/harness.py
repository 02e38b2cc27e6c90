"""A fetcher inside the test's own process, and the program as a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from broker.protocol import Endpoint, Fetch, Fetched, FetchFailed, FetchReport, Head, Hello, List, Message, Notice, Pin
from unpriv import s3
from unpriv.blobfile import BlobDir
from unpriv.fetcher import Fetcher
from unpriv.ranges import Tuning

SECRET: Final = "hush-this-is-the-secret-access-key"
TOKEN: Final = "hush-this-is-the-session-token"
CELL: Final = 16 << 10
# As the real one, only everything sooner.
QUICK: Final = Tuning(
    cell_bytes=CELL, connect_timeout_s=3.0, read_timeout_s=3.0, watch_window_s=4.0, attempts=2, backoff_base_s=0.02,
    backoff_cap_s=0.1, progress_bytes=CELL // 2, report_every_s=0.02, control_s=20.0, abandon_s=0.2,
)  # fmt: skip
M = TypeVar("M", bound=Message)


@dataclass(slots=True)
class Collected:
    """Reports, kept."""

    all: list[FetchReport] = field(default_factory=list)

    async def send(self, report: FetchReport) -> None:
        self.all.append(report)

    def of(self, kind: type[M]) -> list[M]:
        return [report for report in self.all if isinstance(report, kind)]


@dataclass(slots=True)
class Bench:
    """A fetcher and what it said."""

    fetcher: Fetcher
    reports: Collected
    blob_dir: Path

    async def ask(self, request: List | Head | Fetch) -> FetchReport:
        """Return the answer to one request."""
        await self.fetcher.answer(request)
        return [r for r in self.reports.all if getattr(r, "id", None) == request.id and r.type not in PASSING][-1]

    async def fetch(self, pin: Pin, number: int = 1, expect: str | None = None) -> FetchReport:
        """Return the answer to a Fetch."""
        return await self.ask(Fetch(id=number, pin=pin, expect=expect))

    def blobs(self) -> dict[str, bytes]:
        """Return the published blobs."""
        return {path.name: path.read_bytes() for path in (self.blob_dir / "sha256").iterdir()}

    def partial(self) -> list[str]:
        """Return the names of the partial files."""
        return sorted(path.name for path in (self.blob_dir / "partial").iterdir())


PASSING: Final = ("progress", "notice")


def connect(url: str, *, streams: int = 8, tuning: Tuning = QUICK, **endpoint: Any) -> s3.Client:
    """Return a client of a server on loopback."""
    return s3.connect(
        Endpoint(endpoint_url=url, addressing="path", **endpoint),
        streams,
        connect_timeout_s=tuning.connect_timeout_s,
        read_timeout_s=tuning.read_timeout_s,
    )


@asynccontextmanager
async def fetching(client: s3.Client, blob_dir: Path, tuning: Tuning = QUICK, **hello: Any) -> AsyncIterator[Bench]:
    """Run a fetcher."""
    greeting = Hello(endpoint=Endpoint(), blob_dir=str(blob_dir), **{"deadline_s": 40.0, "min_rate": 1000, **hello})
    reports = Collected()
    blobs = BlobDir.open(str(blob_dir))
    async with trio.open_nursery() as nursery:
        fetcher = Fetcher(client, greeting, blobs, reports, tuning)
        nursery.start_soon(fetcher.measure)
        yield Bench(fetcher, reports, blob_dir)
        nursery.cancel_scope.cancel()
    os.close(blobs.partial_fd)
    os.close(blobs.sha256_fd)


def outcome(report: FetchReport) -> str:
    """Return "ok" or the failure's code."""
    return "ok" if isinstance(report, Fetched) else report.code if isinstance(report, FetchFailed) else report.type


def notices(bench: Bench) -> str:
    """Return all that a person was told."""
    return "\n".join(notice.message for notice in bench.reports.of(Notice))


# ---------------------------------------------------------------- as a process


@dataclass(slots=True)
class Program:
    """The fetcher as a process."""

    process: "subprocess.Popen[bytes]"
    heard: bytes = b""  # all that it wrote

    def say(self, message: Message | dict[str, Any]) -> None:
        """Send one request."""
        assert self.process.stdin is not None
        fields = message if isinstance(message, dict) else message.model_dump()
        self.process.stdin.write(json.dumps(fields).encode() + b"\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Return the next report; {} at the end."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.heard += line
        return dict(json.loads(line)) if line else {}

    def answer(self, number: int) -> dict[str, Any]:
        """Return the answer to a request, passing over what others say."""
        while report := self.hear():
            if report.get("id") == number and report["type"] not in PASSING:
                return report
        return {}

    def finish(self) -> tuple[int, bytes]:
        """End the requests; return the exit code and what came on stderr."""
        out, err = self.process.communicate(timeout=20)
        self.heard += out
        return self.process.returncode, err


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return the environment that a broker would give."""
    return {
        "PATH": "/usr/bin:/bin", "HOME": str(home), "LC_ALL": "C.UTF-8", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": TOKEN,
        "AWS_DEFAULT_REGION": "us-east-1", **more,
    }  # fmt: skip


@contextmanager
def program(home: Path, *, code: str | None = None, **more: str) -> Iterator[Program]:
    """Run the fetcher as a process; `code` runs instead of the module, to change its tuning."""
    command = [sys.executable, "-I", "-c", code] if code else [sys.executable, "-I", "-m", "unpriv.fetch"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/",
        env=environment(home, **more),
    )  # fmt: skip
    try:
        yield Program(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
