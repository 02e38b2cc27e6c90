"""The fetcher's two pipes: requests come in, reports go out, one JSON object a line.

Rule 1: no credential leaves this process; ``line_of`` cuts them out of every report.
Rule 2: a request that makes no sense ends the program: there is nothing to recover with a broker that breaks protocol.
"""

import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

import trio
from pydantic import TypeAdapter

from broker.protocol import MAX_LINE, FetchFailed, FetchReport, FetchRequest, Pins

SECRET_MIN: Final = 4  # a shorter one would cut holes into every text
REQUESTS: Final[TypeAdapter[FetchRequest]] = TypeAdapter(FetchRequest)


class Reporter(Protocol):
    """Where reports go."""

    async def send(self, report: FetchReport) -> None:
        """Pass one report on."""


class Reports:
    """Writes reports to the broker, without a credential in them."""

    def __init__(self, fd: int, secrets: Callable[[], tuple[str, ...]]) -> None:
        self._stream = trio.lowlevel.FdStream(fd)
        self._lock = trio.Lock()
        self._secrets = secrets

    async def send(self, report: FetchReport) -> None:
        """Write one report. A reader that is slow makes us wait; one that is gone ends us."""
        async with self._lock:
            await self._stream.send_all(line_of(report, self._secrets()))


def line_of(report: FetchReport, secrets: tuple[str, ...]) -> bytes:
    """Return a report as a line, with `***` for each secret.

    A server sees a session token and may send it back as an error text or as a name.
    """
    fields = report.model_dump()
    words = [word for word in secrets if len(word) >= SECRET_MIN]
    if "message" in fields:
        for word in words:
            fields["message"] = fields["message"].replace(word, "***")
    line = json.dumps(fields, ensure_ascii=True, separators=(",", ":"))
    if isinstance(report, Pins) and any(json.dumps(word)[1:-1] in line for word in words):
        text = "the server names an object by a secret of ours"
        return line_of(FetchFailed(id=report.id, code="bad_response", message=text, retryable=False), ())
    return line.encode() + b"\n"


class Requests:
    """Reads requests from a descriptor, first one without trio, then the rest with it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = b""

    def first(self) -> bytes | None:
        """Return the first line, or None at the end."""
        while b"\n" not in self._pending:
            data = os.read(self._fd, 1 << 16)
            if not data or len(self._pending) > MAX_LINE:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    async def rest(self) -> AsyncIterator[bytes]:
        """Yield the other lines as they come."""
        stream = trio.lowlevel.FdStream(self._fd)
        while True:
            *lines, self._pending = self._pending.split(b"\n")
            for line in lines:
                yield line
            if len(self._pending) > MAX_LINE:
                raise ProtocolError("a request is too long")
            data = await stream.receive_some()
            if not data:
                return
            self._pending += data


class ProtocolError(Exception):
    """The broker said something that makes no sense."""
