"""Turn S3 objects into local blobs: the program ``unpriv.fetch``. One process a pull.

Rule 1: the sandbox holds before the first byte from S3; Ready says so.
Rule 2: a blob is published only if every byte came from the pinned object and, where a digest is expected, has it.
Rule 3: nothing waits for ever: each stream has a watchdog, each request an end, each object a deadline.
Rule 4: no credential leaves this process: every report passes ``Reports``, which cuts them out.

Descriptor 0 brings requests, 1 takes reports, one JSON object a line (broker/protocol.py). The end of 0 cancels
everything at once; what is on disk then serves the next run. Exit code 0 after the end of the requests, 70 for a bug or
a request that makes no sense, 78 when the AWS configuration or the sandbox does not allow a start: a ``failed`` report
with id 0 comes first, with code `configuration`, `credentials_missing` or `sandbox`.

When a request fails, its code is
| code                 | when                                                                          | again later? |
|----------------------|-------------------------------------------------------------------------------|--------------|
| no_such_object       | 404 for the key or version, a delete marker, a key that S3 does not allow     | no           |
| no_such_bucket       | 404 for the bucket, a bucket name that S3 does not allow                      | no           |
| access_denied        | 403 to known credentials or to none; the object is archived                   | no           |
| credentials_missing  | no credentials found, or their provider (SSO, IMDS, STS, a process) fails     | no           |
| credentials_rejected | unknown key, wrong signature, expired or invalid token                        | no           |
| wrong_region         | a redirect to, or a signature scope of, another region                        | no           |
| unavailable          | no connection, name not resolved, connection broken, body cut, 5xx, 429       | yes          |
| timed_out            | no connection, no answer or no next byte in time; the object's deadline       | yes          |
| too_slow             | fewer bytes than the minimum rate over the watchdog's window                  | yes          |
| changed              | 412, 416, another ETag or size than the pin's: resolve anew                   | yes          |
| digest_mismatch      | not the expected sha256 (no), not the checksum stored by the server (yes)     | see left     |
| too_large            | more bytes than pinned, or than this filesystem takes in a file               | no           |
| no_space             | the pinned size does not fit, or the disk or quota filled up                  | no           |
| bad_response         | no 206, a wrong Content-Range or length, an answer that makes no sense        | some         |
| listing_too_long     | more than MAX_LAYERS + 1 objects under a prefix                               | no           |
| io_error             | the blob directory cannot be read or written                                  | no           |
| configuration        | the AWS configuration, endpoint URL, CA bundle or this machine's clock        | no           |
| sandbox              | the sandbox did not take                                                      | no           |
"Yes" failures were tried Tuning.attempts times in a row (or AWS_MAX_ATTEMPTS) with backoff before they are reported.
"""

import logging
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

import trio
from pydantic import ValidationError

from broker.protocol import FetchFailed, Hello, Ready
from unpriv import sandbox
from unpriv.blobfile import BlobDir
from unpriv.failures import FetchError, leaves_of
from unpriv.lines import REQUESTS, ProtocolError, Reports, Requests, line_of
from unpriv.ranges import THREADS_A_STREAM, Tuning

if TYPE_CHECKING:
    from unpriv.fetcher import Fetcher

MEMORY_BYTES: Final = 512 << 20  # a reply without end fails before it harms the host
THREAD_STACK_BYTES: Final = 1 << 20
OPEN_FILES: Final = 1024
EXIT_BUG: Final = 70  # EX_SOFTWARE
EXIT_CONFIGURATION: Final = 78  # EX_CONFIG


async def serve(fetcher: "Fetcher", requests: Requests) -> None:
    """Answer requests, many at once, until their end; then cancel what still runs."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetcher.measure)
        async for line in requests.rest():
            try:
                request = REQUESTS.validate_json(line)
            except ValidationError as error:
                raise ProtocolError(f"not a request: {error.error_count()} errors") from None
            nursery.start_soon(fetcher.answer, request)
        nursery.cancel_scope.cancel()


def main(tuning: Tuning | None = None) -> NoReturn:
    """Run the program on descriptors 0 and 1. Never returns: threads that hang in the network are left behind."""
    logging.disable()  # boto3 and urllib3 warn on stderr, with requests in the text
    report_fd = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no report
    requests = Requests(0)
    line = requests.first()
    if line is None:
        os._exit(0)
    code = EXIT_BUG
    try:
        code = run(Hello.model_validate_json(line), requests, report_fd, tuning or Tuning())
    except BaseException as error:
        leaf = next(leaves_of(error)) if isinstance(error, BaseExceptionGroup) else error
        if isinstance(leaf, BrokenPipeError | trio.BrokenResourceError):
            os._exit(0)  # nobody is left to report to
        # The class and the place are enough to find it; its text may hold a request with its signature.
        os.write(2, f"imgpull-fetch: {type(leaf).__name__} at {place_of(leaf)}\n".encode())
    os._exit(code)


def run(hello: Hello, requests: Requests, report_fd: int, tuning: Tuning) -> int:
    """Connect, lock in, serve; return the exit code."""
    from unpriv import s3  # late: a start that fails earlier does not pay for boto3
    from unpriv.fetcher import Fetcher

    timeouts = {"connect_timeout_s": tuning.connect_timeout_s, "read_timeout_s": tuning.read_timeout_s}
    try:
        blobs = BlobDir.open(hello.blob_dir)
        client = s3.connect(hello.endpoint, hello.max_streams, **timeouts)
        layers = confine(hello, client.readable, client.writable)
    except FetchError as error:
        failed = FetchFailed(id=0, code=error.code, message=error.message, retryable=error.retryable)
        os.write(report_fd, line_of(failed, ()))
        return EXIT_CONFIGURATION

    async def start() -> None:
        reports = Reports(report_fd, client.secrets)
        await reports.send(Ready(sandbox=layers, credentials=client.credentials, endpoint=client.url))
        await serve(Fetcher(client, hello, blobs, reports, tuning), requests)

    trio.run(start)
    return 0


def confine(hello: Hello, readable: Sequence[str], writable: Sequence[str]) -> dict[str, str]:
    """Enter the sandbox; return what took. Raises: FetchError."""
    threading.stack_size(THREAD_STACK_BYTES)
    memory_bytes = MEMORY_BYTES + hello.max_streams * THREADS_A_STREAM * THREAD_STACK_BYTES
    rules = sandbox.Rules(read_beneath=readable, write_beneath=[hello.blob_dir, *writable], tcp=True)
    try:
        took = sandbox.lock("fetch", rules, {"data": memory_bytes, "nofile": OPEN_FILES})
    except sandbox.SandboxError as error:
        raise FetchError("sandbox", f"the sandbox does not hold: {error}") from error
    return {layer[:32]: text[:128] for layer, text in took.items()}


def place_of(error: BaseException) -> str:
    """Return the file and line that raised an exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else "?"


if __name__ == "__main__":
    main()
