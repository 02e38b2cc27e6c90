"""The two workers and root inside this process, on trio's clock: for tests that live thousands of lives.

What they do to files and what they say is the same as of the programs and the socket beside them; a death of the broker
ends them as a kill would: what they have not published is gone, what root has done stays.
"""

import hashlib
import math
import os
import random
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from broker import protocol as wire
from broker import worker
from broker.errors import ImgpullError
from broker.helper import Helper, hung_up, translate
from privhelper import protocol
from tests.broker.fake_helper import FakeHelper, HangUpError
from tests.broker.programs.fake_check import verdict

Point = Callable[[str], None]


class Root(FakeHelper):
    """Root, with another device for each activation."""

    def on_activate(self, request: dict[str, Any], descriptors: list[int]) -> list[dict[str, Any]]:
        self.device = f"/dev/fake{len(self.requests)}"
        return super().on_activate(request, descriptors)


class Surroundings:
    """What lies outside of the broker: a bucket, the workers, root. ``point`` is told of each thing that is done."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.bucket: dict[str, bytes] = {}
        self.contents: dict[str, bytes] = {}  # by ETag: all that ever was in the bucket
        self.helper = Root(folder)
        self.rng = rng
        self.point: Point = lambda _: None
        self.pauses_s: tuple[float, ...] = (0, 0, 0.1, 1)
        self.helper_dies = 0.0  # chance of each request
        self.fetch_fails = 0.0

    def put(self, key: str, data: bytes) -> None:
        self.bucket[key] = data
        self.contents[etag(data)] = data

    async def pause(self) -> None:
        await trio.sleep(self.rng.choice(self.pauses_s))

    # -- the checker

    async def check(
        self,
        job: wire.CheckJob,
        blob_fd: int,
        descriptors: Sequence[int] = (),
        progress: Callable[[int], None] | None = None,
        deadline_s: float = math.inf,
    ) -> wire.Accepted | wire.Rejected:
        """Stand in for `worker.check`."""
        assert set(descriptors) >= {*job.lower, job.manifest_fd}
        await self.pause()
        data = os.pread(blob_fd, 1 << 20, 0)
        if data.startswith(b"die"):
            raise worker.CheckError("worker-failed", "the checker gave no verdict")
        lower = os.pread(job.lower[-1], 1 << 20, 0) if job.lower else None
        report, manifest = verdict(data, job.layer_number, lower)
        assert job.manifest_fd is not None
        os.write(job.manifest_fd, manifest)
        if job.payload_fd is not None and manifest:
            os.write(job.payload_fd, data)
        if progress:
            progress(len(data))
        return wire.Accepted(**report) if manifest else wire.Rejected(**report)

    # -- the fetcher

    @asynccontextmanager
    async def fetcher(self, hello: wire.Hello) -> AsyncGenerator["Bucket", None]:
        """Stand in for `worker.fetcher`."""
        yield Bucket(self, Path(hello.blob_dir))

    # -- root

    @asynccontextmanager
    async def connect(self, path: str) -> AsyncGenerator["Direct", None]:
        """Stand in for `helper.connect`."""
        root = Direct(self)
        root.greeting = await root._ask({"op": "hello", "version": protocol.VERSION})
        yield root


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class Bucket:
    """The fetcher's session."""

    is_dead = False

    def __init__(self, around: Surroundings, blobs: Path) -> None:
        self._around = around
        self._blobs = blobs
        self.ready = wire.Ready(type="ready", sandbox={"fake": "yes"}, credentials="none", endpoint="aws")

    async def greeting(self) -> wire.Ready:
        return self.ready

    def _pin(self, bucket: str, key: str) -> wire.Pin:
        data = self._around.bucket[key]
        return wire.Pin(bucket=bucket, key=key, size=len(data), etag=etag(data), version=None)

    async def objects(self, bucket: str, prefix: str) -> list[wire.Pin]:
        await self._around.pause()
        return [self._pin(bucket, key) for key in sorted(self._around.bucket) if key.startswith(prefix)]

    async def head(self, bucket: str, key: str) -> wire.Pin:
        await self._around.pause()
        if key not in self._around.bucket:
            raise ImgpullError("no-such-object", f"there is no {key}")
        return self._pin(bucket, key)

    async def fetch(
        self, pin: wire.Pin, expect: str | None = None, progress: Any = None, notice: Any = None
    ) -> wire.Fetched:
        await self._around.pause()
        if self._around.rng.random() < self._around.fetch_fails:
            raise ImgpullError("s3-unavailable", "the network is down", retry=True)
        if self._around.bucket.get(pin.key) != self._around.contents[pin.etag]:
            raise ImgpullError("busy", f"{pin.key} changed", fetch_code="changed", retry=False)
        data = self._around.contents[pin.etag]
        digest = hashlib.sha256(data).hexdigest()
        (self._blobs / "sha256").mkdir(parents=True, exist_ok=True)
        (self._blobs / "sha256" / digest).write_bytes(data)
        self._around.point("fetch:after")
        return wire.Fetched(
            type="fetched", id=1, digest=f"sha256:{digest}", size=len(data), transferred_bytes=len(data)
        )


class Direct(Helper):
    """A connection to root without a socket; the requests and answers are the real ones."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._answers: deque[dict[str, Any]] = deque()

    def is_quiet(self) -> bool:
        return True

    async def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        around = self._around
        await around.pause()
        dies = around.rng.random() < around.helper_dies
        around.point(f"root:{request['op']}:before")
        try:
            if dies and around.rng.random() < 0.5:
                raise HangUpError
            around.helper.requests.append(request)
            self._answers = deque(around.helper.answer(request, descriptors))
            if dies:
                raise HangUpError
        except HangUpError as error:
            raise hung_up("it died") from error
        around.point(f"root:{request['op']}:after")

    async def _receive(self, received: list[int]) -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        answer = self._answers.popleft()
        if "descriptor" in answer:
            received.append(answer.pop("descriptor"))
        if answer["type"] == "error":
            raise translate(answer)
        return answer
