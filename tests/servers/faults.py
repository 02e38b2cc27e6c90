"""A small S3 that breaks on purpose: each fault has a name, a place in the object, and a number of times.

Rule 1: an object's own bytes never change unless a fault says so, so that what a client ends up with can be judged.
Rule 2: a fault hits the ranged GET that holds its offset; faults in a body strike exactly at that offset.
Rule 3: it speaks just enough of S3 for boto3: GET and HEAD of an object, ListObjectsV2. It checks no signature.

Inside a trio program: ``async with serving(server)``. Elsewhere: ``with in_thread(server)``.
"""

import base64
import gzip
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from hashlib import md5, sha256
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import trio

ALWAYS: Final = 1 << 30
FOREVER_S: Final = 3600.0
DATE: Final = "Wed, 01 Jan 2025 00:00:00 GMT"
HEAD_LIMIT: Final = 64 << 10  # bytes of one request's head


@dataclass(slots=True)
class Object:
    """One object, how it breaks and how often that still happens."""

    data: bytes
    fault: str | None = None
    offset: int = 0  # where in the object
    times: int = 1
    checksum: bool = False  # whether its sha256 is known to the server
    etag: str = ""
    gets: Counter[tuple[int, int]] = field(default_factory=Counter)  # ranges asked for
    sent: int = 0  # bytes of bodies

    def __post_init__(self) -> None:
        self.etag = self.etag or f'"{md5(self.data).hexdigest()}"'


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]

    def range(self, size: int) -> tuple[int, int] | None:
        """Return the bytes [start, end) asked for, or None for all."""
        text = self.headers.get("range", "")
        if not text.startswith("bytes="):
            return None
        first, _, last = text[6:].partition("-")
        return int(first), min(int(last) + 1, size) if last else size


class Wire:
    """A connection, and how fast it is."""

    def __init__(self, stream: trio.SocketStream, server: "Server") -> None:
        self.stream = stream
        self.server = server
        self._pending = b""

    async def head(self) -> Request | None:
        """Read the head of the next request, None at the end."""
        while b"\r\n\r\n" not in self._pending:
            data = await self.stream.receive_some(65536)
            if not data or len(self._pending) > HEAD_LIMIT:
                return None
            self._pending += data
        head, _, self._pending = self._pending.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        parts = urlsplit(target)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Request(method, unquote(parts.path), parse_qs(parts.query, keep_blank_values=True), headers)

    async def send(self, data: bytes) -> None:
        """Send as fast as the link allows: so many bytes a round trip."""
        if not self.server.round_trip_s:
            await self.stream.send_all(data)
            return
        window_bytes = self.server.window_bytes
        for start in range(0, len(data), window_bytes):
            await trio.sleep(self.server.round_trip_s)
            await self.stream.send_all(data[start : start + window_bytes])

    async def status(self, code: int, headers: dict[str, str], body: bytes = b"") -> None:
        """Send a whole answer."""
        if self.server.round_trip_s:
            await trio.sleep(self.server.round_trip_s)
        lines = [f"HTTP/1.1 {code} {code}", *(f"{name}: {value}" for name, value in headers.items())]
        await self.stream.send_all("\r\n".join([*lines, "", ""]).encode("latin-1"))
        await self.send(body)

    async def error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        """Send an S3 error."""
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
        await self.status(status, {"Content-Length": str(len(body)), **(headers or {})}, body)

    async def hang_up(self) -> None:
        """Close the connection."""
        await self.stream.aclose()

    async def reset(self) -> None:
        """Close the connection by RST."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()


class Server:
    """Objects by "bucket/key"."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self.requests: Counter[str] = Counter()  # by method and path
        self.round_trip_s = 0.0  # of a simulated link
        self.window_bytes = 64 << 10  # sent in one round trip
        self.running = 0  # requests being answered
        self.most_running = 0
        self.drip_s = 0.1  # between two bytes
        self.seen: list[dict[str, str]] = []  # headers of all requests
        self.port = 0

    @property
    def url(self) -> str:
        """The endpoint URL."""
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, stream: trio.SocketStream) -> None:
        """Answer the requests of one connection."""
        wire = Wire(stream, self)
        try:
            while (request := await wire.head()) is not None:
                self.running += 1
                self.most_running = max(self.most_running, self.running)
                try:
                    await self.answer(wire, request)
                finally:
                    self.running -= 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client, or a fault, closed it
        finally:
            await trio.aclose_forcefully(stream)

    async def answer(self, wire: Wire, request: Request) -> None:
        """Answer one request."""
        self.requests[f"{request.method} {request.path}"] += 1
        self.seen.append(request.headers)
        bucket, _, key = request.path.lstrip("/").partition("/")
        if not any(name.startswith(f"{bucket}/") for name in self.objects):
            await wire.error(404, "NoSuchBucket")
        elif not key and request.method == "HEAD":
            await wire.status(200, {"Content-Length": "0"})
        elif not key:
            await self.list(wire, request, bucket)
        elif (found := self.objects.get(f"{bucket}/{key}")) is None:
            await wire.error(404, "NoSuchKey")
        elif request.method == "HEAD":
            await self.head(wire, found)
        else:
            await self.get(wire, request, found)

    async def list(self, wire: Wire, request: Request, bucket: str) -> None:
        """Answer ListObjectsV2, in one page."""
        prefix = f"{bucket}/" + request.query.get("prefix", [""])[0]
        names = [n for n in sorted(self.objects) if n.startswith(prefix) and "/" not in n[len(prefix) :]]
        rows = "".join(
            f"<Contents><Key>{escape(n[len(bucket) + 1 :])}</Key><ETag>{escape(self.objects[n].etag)}</ETag>"
            f"<Size>{len(self.objects[n].data)}</Size></Contents>"
            for n in names
        )
        body = f"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        await wire.status(200, {"Content-Length": str(len(body.encode()))}, body.encode())

    async def head(self, wire: Wire, found: Object) -> None:
        """Answer HeadObject."""
        headers = {"Content-Length": str(len(found.data)), "ETag": found.etag, "Last-Modified": DATE}
        if found.checksum:
            headers["x-amz-checksum-sha256"] = base64.b64encode(sha256(found.data).digest()).decode()
            headers["x-amz-checksum-type"] = "FULL_OBJECT"
        await wire.status(200, headers)

    async def get(self, wire: Wire, request: Request, found: Object) -> None:
        """Answer GetObject, broken if this request holds the fault's offset."""
        asked = request.range(len(found.data))
        start, end = asked or (0, len(found.data))
        found.gets[start, end] += 1
        if found.fault and found.times > 0 and start <= found.offset < max(end, start + 1):
            found.times -= 1
            await FAULTS[found.fault](wire, found, start, end)
            return
        if request.headers.get("if-match") not in (None, found.etag):
            await wire.error(412, "PreconditionFailed")
            return
        await send_range(wire, found, start, end, ranged=asked is not None)


async def send_range(wire: Wire, found: Object, start: int, end: int, *, ranged: bool = True) -> None:
    """Send a range as it should be."""
    found.sent += end - start
    await wire.status(206 if ranged else 200, good_headers(found, start, end), found.data[start:end])


def good_headers(found: Object, start: int, end: int) -> dict[str, str]:
    """Return the headers of a right answer."""
    return {
        "Content-Length": str(end - start),
        "Content-Range": f"bytes {start}-{end - 1}/{len(found.data)}",
        "ETag": found.etag,
        "Last-Modified": DATE,
    }


# ---------------------------------------------------------------- faults

Breaker = Callable[[Wire, Object, int, int], Awaitable[None]]
FAULTS: Final[dict[str, Breaker]] = {}


def fault(breaker: Breaker) -> Breaker:
    """Register a fault by its function's name."""
    FAULTS[breaker.__name__] = breaker
    return breaker


async def send_until_fault(wire: Wire, found: Object, start: int, end: int, **more: str) -> None:
    """Send right headers, `more` over them, and the body up to the fault's offset."""
    headers = {name: value for name, value in {**good_headers(found, start, end), **more}.items() if value}
    found.sent += found.offset - start
    await wire.status(206, headers, found.data[start : found.offset])


@fault
async def reset(wire: Wire, found: Object, start: int, end: int) -> None:
    await send_until_fault(wire, found, start, end)
    await wire.reset()


@fault
async def refused(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.reset()


@fault
async def truncated(wire: Wire, found: Object, start: int, end: int) -> None:
    await send_until_fault(wire, found, start, end)
    await wire.hang_up()


@fault
async def truncated_without_length(wire: Wire, found: Object, start: int, end: int) -> None:
    await send_until_fault(wire, found, start, end, **{"Content-Length": "", "Connection": "close"})
    await wire.hang_up()


@fault
async def truncated_in_chunks(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "Transfer-Encoding": "chunked"}
    del headers["Content-Length"]
    part = found.data[start : found.offset]
    await wire.status(206, headers, b"%x\r\n%s\r\n" % (len(part), part) if part else b"")
    await wire.hang_up()


@fault
async def chunks(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "Transfer-Encoding": "chunked"}
    del headers["Content-Length"]
    await wire.status(206, headers, b"%x\r\n%s\r\n0\r\n\r\n" % (end - start, found.data[start:end]))


@fault
async def chunks_too_many(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "Transfer-Encoding": "chunked"}
    del headers["Content-Length"]
    await wire.status(206, headers, b"%x\r\n%sXX\r\n0\r\n\r\n" % (end - start + 2, found.data[start:end]))


@fault
async def slow_drip(wire: Wire, found: Object, start: int, end: int) -> None:
    await send_until_fault(wire, found, start, end)
    for offset in range(found.offset, end):
        await trio.sleep(wire.server.drip_s)
        await wire.send(found.data[offset : offset + 1])


@fault
async def silence_in_the_body(wire: Wire, found: Object, start: int, end: int) -> None:
    await send_until_fault(wire, found, start, end)
    await trio.sleep(FOREVER_S)


@fault
async def silence_before_the_status(wire: Wire, found: Object, start: int, end: int) -> None:
    await trio.sleep(FOREVER_S)


@fault
async def headers_drip(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.stream.send_all(b"HTTP/1.1 206 X\r\nX-Slow: ")
    while True:
        await trio.sleep(wire.server.drip_s)
        await wire.stream.send_all(b"x")


@fault
async def endless_continue(wire: Wire, found: Object, start: int, end: int) -> None:
    while True:
        await wire.stream.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        await trio.sleep(wire.server.drip_s)


@fault
async def range_ignored(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = good_headers(found, 0, len(found.data))
    del headers["Content-Range"]
    await wire.status(200, headers, found.data)


@fault
async def range_with_status_200(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(200, good_headers(found, start, end), found.data[start:end])


@fault
async def error_with_status_200(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(200, "InternalError")


@fault
async def wrong_range(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = good_headers(found, start, end)
    headers["Content-Range"] = f"bytes {start + 1}-{end}/{len(found.data)}"
    await wire.status(206, headers, found.data[start:end])


@fault
async def wrong_total(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = good_headers(found, start, end)
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(found.data) + 1}"
    await wire.status(206, headers, found.data[start:end])


@fault
async def no_content_range(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = good_headers(found, start, end)
    del headers["Content-Range"]
    await wire.status(206, headers, found.data[start:end])


@fault
async def garbled_content_range(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = good_headers(found, start, end)
    headers["Content-Range"] = "bytes " + "9" * 5000 + "-*/x"
    await wire.status(206, headers, found.data[start:end])


@fault
async def short_length(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "Content-Length": str((end - start) // 2)}
    await wire.status(206, headers, found.data[start : start + (end - start) // 2])


@fault
async def empty_body(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(206, {**good_headers(found, start, end), "Content-Length": "0"})


@fault
async def long_length(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "Content-Length": "999999999999"}
    await wire.status(206, headers, found.data[start:end] + b"X" * 100_000)


@fault
async def negative_length(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(206, {**good_headers(found, start, end), "Content-Length": "-1"}, found.data[start:end])
    await wire.hang_up()


@fault
async def bytes_after_the_body(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(206, good_headers(found, start, end), found.data[start:end] + b"X" * 1000)


@fault
async def flipped_byte(wire: Wire, found: Object, start: int, end: int) -> None:
    body = bytearray(found.data[start:end])
    body[found.offset - start] ^= 1
    await wire.status(206, good_headers(found, start, end), bytes(body))


@fault
async def status_500(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(500, "InternalError")


@fault
async def status_502_html(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(502, {"Content-Length": "22", "Content-Type": "text/html"}, b"<html>Bad Gateway</ht>")


@fault
async def status_503(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(503, "SlowDown")


@fault
async def status_503_retry_after(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(503, "SlowDown", {"Retry-After": "1"})


@fault
async def status_503_retry_next_year(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(503, "SlowDown", {"Retry-After": "99999999"})


@fault
async def status_503_with_checksum(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(503, "SlowDown", {"x-amz-checksum-crc32": "AAAAAA=="})


@fault
async def status_429(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(429, "TooManyRequests")


@fault
async def status_999(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(999, "Odd")


@fault
async def error_not_xml(wire: Wire, found: Object, start: int, end: int) -> None:
    body = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><Error><Code>&b;</Co'
    await wire.status(400, {"Content-Length": str(len(body))}, body)


@fault
async def endless_error(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(500, {"Connection": "close"})
    while True:
        await wire.stream.send_all(b"<x>" * 1000)
        await trio.sleep(wire.server.drip_s / 100)


@fault
async def replaced(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(412, "PreconditionFailed")


@fault
async def replaced_unnoticed(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "ETag": '"00000000000000000000000000000000"'}
    await wire.status(206, headers, bytes(end - start))


@fault
async def shrunk(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(416, "InvalidRange")


@fault
async def deleted(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(404, "NoSuchKey")


@fault
async def redirect_to_link_local(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(307, {"Location": "http://169.254.169.254/latest/", "Content-Length": "0"})


@fault
async def redirect_to_another_region(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(301, "PermanentRedirect", {"x-amz-bucket-region": "evil.example.com/#"})


@fault
async def huge_headers(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {f"X-Pad-{number}": "a" * 60_000 for number in range(90)}
    await wire.status(206, {**headers, **good_headers(found, start, end)}, found.data[start:end])


@fault
async def header_too_long(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.status(206, {"X-Pad": "a" * 70_000, **good_headers(found, start, end)}, found.data[start:end])


@fault
async def too_many_headers(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {f"X-Pad-{number}": "a" for number in range(200)}
    await wire.status(206, {**headers, **good_headers(found, start, end)}, found.data[start:end])


@fault
async def gzip_on_the_way(wire: Wire, found: Object, start: int, end: int) -> None:
    body = gzip.compress(bytes(10 << 20))
    headers = {**good_headers(found, start, end), "Content-Encoding": "gzip", "Content-Length": str(len(body))}
    await wire.status(206, headers, body)


@fault
async def gzip_label(wire: Wire, found: Object, start: int, end: int) -> None:
    headers = {**good_headers(found, start, end), "Content-Encoding": "gzip"}
    await wire.status(206, headers, found.data[start:end])


@fault
async def not_http(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.stream.send_all(b"220 ftp.example.com ready\r\n\x00\xff\xfe" * 3)
    await wire.hang_up()


@fault
async def clock_skew(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(403, "RequestTimeTooSkewed")


@fault
async def denied(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(403, "AccessDenied")


@fault
async def token_expired(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(400, "ExpiredToken")


@fault
async def wrong_signature(wire: Wire, found: Object, start: int, end: int) -> None:
    await wire.error(403, "SignatureDoesNotMatch")


# ---------------------------------------------------------------- running


@asynccontextmanager
async def serving(server: Server) -> AsyncIterator[Server]:
    """Run a server inside a trio program."""
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=512)
        server.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, server.handle, listeners)
        yield server
        nursery.cancel_scope.cancel()


@contextmanager
def in_thread(server: Server) -> Iterator[Server]:
    """Run a server in a thread of a program that does not use trio."""
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def run() -> None:
        async with serving(server):
            token, gone = trio.lowlevel.current_trio_token(), trio.Event()
            stop.append(lambda: token.run_sync_soon(gone.set))
            ready.set()
            await gone.wait()

    thread = threading.Thread(target=trio.run, args=(run,), daemon=True)
    thread.start()
    if not ready.wait(10):
        raise RuntimeError("the fault server did not start")
    try:
        yield server
    finally:
        stop[0]()
        thread.join(10)


def main() -> None:
    """Serve a folder's files as bucket `faults`, one key a fault: ``python -m tests.servers.faults FILE``."""
    import sys

    with open(sys.argv[1], "rb") as file:
        data = file.read()
    server = Server()
    for name in FAULTS:
        server.objects[f"faults/{name}"] = Object(data, name, len(data) // 2, ALWAYS)
    with in_thread(server):
        print(server.url, *sorted(FAULTS), sep="\n", flush=True)
        while True:
            time.sleep(FOREVER_S)


if __name__ == "__main__":
    main()
