"""The four questions that we ask of S3, and what counts as their answer.

Rule 1: a reply to a ranged GET is that range of the pinned object, by status, Content-Range, ETag and length, or it is
        an error.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import botocore.exceptions as aws

from broker.protocol import MAX_LAYERS, Pin
from unpriv.failures import FetchError, quote
from unpriv.s3.clock import Clock
from unpriv.s3.errors import NOT_S3, translated

Algorithm = Literal["sha256", "crc64nvme", "crc32c", "crc32"]
ALGORITHMS: Final[tuple[Algorithm, ...]] = get_args(Algorithm)  # the first one that the server has is taken
CHUNK_BYTES: Final = 64 << 10  # of one read: larger ones go through mmap in glibc and are slower (Debian 12)


@dataclass(frozen=True, slots=True)
class Body:
    """The bytes of one range, not yet read."""

    read: Callable[[int], bytes]  # up to so many bytes, as they come; b"" at the end
    close: Callable[[], None]
    length_known: bool  # if not, only another read tells that there is no more


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum of the whole object that the server stored with it."""

    algorithm: Algorithm
    base64: str


@dataclass(frozen=True, slots=True)
class Client:
    """One endpoint with one set of credentials. Safe to use from many threads."""

    _s3: Any
    request_payer: bool
    url: str  # in force; without user name and password
    credentials: str  # the name of their source
    secrets: Callable[[], tuple[str, ...]]  # words that must never leave this process
    attempts: int | None  # as the AWS configuration of the user says
    readable: tuple[str, ...]  # files and folders that this module reads later
    writable: tuple[str, ...]  # folders in which refreshed tokens are kept
    clock: Clock

    def list(self, bucket: str, prefix: str) -> list[Pin]:
        """Return the objects under a prefix, no deeper level, in the server's order.

        Raises: FetchError, with `listing_too_long` for more than MAX_LAYERS + 1 objects.
        """
        pins: list[Pin] = []
        with self._translated(f"list s3://{bucket}/{prefix}", NOT_S3 | {"412"}):
            for page in self._pages(bucket, prefix):
                pins += [self._pin(bucket, item["Key"], item["Size"], item) for item in page.get("Contents", [])]
                if len(pins) > MAX_LAYERS + 1:
                    raise FetchError("listing_too_long", f"more than {MAX_LAYERS} objects: s3://{bucket}/{prefix}")
        return pins

    def _pages(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Yield the pages of a listing; a server that never advances is cut off."""
        token: dict[str, str] = {}
        for _ in range(MAX_LAYERS + 2):  # a page may hold only folders, but not for ever
            page = self._s3.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/", **token, **self._payer())
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}
        raise FetchError("listing_too_long", f"the listing does not end: s3://{bucket}/{prefix}")

    def head(self, bucket: str, key: str) -> Pin:
        """Return one object's pin. Raises: FetchError."""
        return self._head({"Bucket": bucket, "Key": key, **self._payer()})[0]

    def checksum(self, pin: Pin) -> Checksum | None:
        """Check that the pinned object is still there; return the server's checksum of all of it, if it has one."""
        found, reply = self._head({**self._pinned(pin), "ChecksumMode": "ENABLED"})
        if (found.size, found.etag) != (pin.size, pin.etag):
            raise changed(pin, f"expected {pin.etag}, {pin.size} bytes, found {found.etag}, {found.size} bytes")
        if reply.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
            return None  # a checksum of the checksums of parts whose borders we do not know
        for algorithm in ALGORITHMS:
            value = reply.get(f"Checksum{algorithm.upper()}")
            if isinstance(value, str) and "-" not in value:
                return Checksum(algorithm, value)
        return None

    def _head(self, arguments: dict[str, str]) -> tuple[Pin, dict[str, Any]]:
        """Return the pin in a HeadObject's reply, and the reply. Raises: FetchError.

        The errors of a HEAD have no body and say little; a GET of one byte says more, and botocore learns the bucket's
        region from it. If that works, so will another HEAD.
        """
        bucket, key = arguments["Bucket"], arguments["Key"]
        for attempt in range(2):
            with self._translated(f"read s3://{bucket}/{key}"):
                try:
                    reply = self._s3.head_object(**arguments)
                except aws.ClientError as error:
                    if attempt or error.response["ResponseMetadata"]["HTTPStatusCode"] not in (400, 401, 403, 404):
                        raise
                    asked = {name: value for name, value in arguments.items() if name != "ChecksumMode"}
                    self._s3.get_object(**asked, Range="bytes=0-0")["Body"].close()
                    continue
                return self._pin(bucket, key, reply["ContentLength"], reply), reply
        raise AssertionError("the second HEAD either answers or raises")

    def _translated(self, doing: str, not_s3: frozenset[str] = NOT_S3) -> AbstractContextManager[None]:
        """Turn exceptions into FetchErrors, as ``translated`` does."""
        return translated(doing, not_s3=not_s3 if self.credentials == "anonymous" else frozenset())

    def open(self, pin: Pin, start: int, end: int) -> Body:
        """Ask for the bytes [start, end) of a pinned object and check that the answer is exactly that.

        Raises: FetchError; `changed` when the object is no longer the pinned one.
        """
        with self._translated(f"read s3://{pin.bucket}/{pin.key}"):
            reply = self._s3.get_object(**self._pinned(pin), Range=f"bytes={start}-{end - 1}")
            raw = reply["Body"]._raw_stream
            try:
                check_range(pin, start, end, reply)
            except BaseException:
                raw.close()
                raise
            return Body(raw.read1, raw.close, reply.get("ContentLength") is not None)

    def _pinned(self, pin: Pin) -> dict[str, str]:
        """Return the arguments that make a server refuse anything but the pinned object."""
        version = {"VersionId": pin.version} if pin.version else {}
        return {"Bucket": pin.bucket, "Key": pin.key, "IfMatch": pin.etag, **version, **self._payer()}

    def _payer(self) -> dict[str, str]:
        """Return the argument that accepts the charges, if the user said so."""
        return {"RequestPayer": "requester"} if self.request_payer else {}

    def _pin(self, bucket: str, untrusted_key: str, untrusted_size: int, untrusted: dict[str, Any]) -> Pin:
        """Return a pin from a reply. The model checks it; a reply that does not fit is `bad_response`."""
        version = untrusted.get("VersionId")
        etag = untrusted["ETag"]
        if not etag.startswith(('"', "W/")):
            etag = f'"{etag}"'  # some servers leave the quotes out in listings
        return Pin(
            bucket=bucket,
            key=untrusted_key,
            size=untrusted_size,
            etag=etag,
            version=None if version in (None, "null") else version,
        )


def check_range(pin: Pin, start: int, end: int, untrusted: dict[str, Any]) -> None:
    """Check that a reply to a range request is that range of the pinned object. Raises: FetchError."""
    name = f"s3://{pin.bucket}/{pin.key}"
    status = untrusted["ResponseMetadata"]["HTTPStatusCode"]
    etag = untrusted.get("ETag")
    if etag is not None and etag.strip('"') != pin.etag.strip('"'):
        raise changed(pin, f"expected ETag {pin.etag}, found {quote(etag)}")
    if status != 206:
        message = f"expected status 206, got {status}: does the server know ranges? {name}"
        raise FetchError("bad_response", message, retryable=True)
    said = quote(untrusted.get("ContentRange"))
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", said)
    if not match:
        raise FetchError("bad_response", f"expected a Content-Range, got {said}: {name}", retryable=True)
    first, last, size = (int(number) for number in match.groups())
    if size != pin.size:
        raise changed(pin, f"expected {pin.size} bytes, found {size}")
    if (first, last) != (start, end - 1):
        raise FetchError("bad_response", f"expected bytes {start}-{end - 1}, got {said}: {name}", retryable=True)
    length = untrusted.get("ContentLength")
    if length is not None and length != end - start:
        raise FetchError("bad_response", f"expected {end - start} bytes, got {length}: {name}", retryable=True)


def changed(pin: Pin, how: str) -> FetchError:
    """Return the error for an object that is no longer the pinned one."""
    return FetchError("changed", f"the object changed, {how}: s3://{pin.bucket}/{pin.key}", retryable=True)
