"""Talk to S3. The sole importer of boto3.

Rule 1: boto3 and what it calls may raise anything on a hostile reply (boto3 1.44: AttributeError on a 503 answer that
        carries a checksum); every exception leaves this module as a FetchError.
Rule 2: one call is one request. boto3 does not retry here: it cannot retry inside a body, and it ignores Retry-After.
Rule 3: what a server answers is untrusted until it matches the pin: status 206, the exact Content-Range, the ETag.
Rule 4: the user's AWS configuration is boto3's business; nothing here reads it, except to name files for the sandbox.

Imported late: boto3 costs 0.3 s (Debian 12, boto3 1.44).
"""

import os
import re
import socket
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from time import time
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import boto3
import botocore
import botocore.exceptions as aws
import urllib3.exceptions as http
from botocore import UNSIGNED
from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool, AWSHTTPSConnection, AWSHTTPSConnectionPool
from botocore.config import Config

from broker.protocol import MAX_LAYERS, Endpoint, FetchCode, Pin
from unpriv.failures import FetchError, quote

T = TypeVar("T")
CHUNK_BYTES: Final = 64 << 10  # of one read: larger ones go through mmap in glibc and are slower (Debian 12)
MAX_RETRY_AFTER_S: Final = 3600.0
AHEAD: Final = 4  # connections above the streams, for HEAD and LIST

# How servers differ from AWS. Each row: addressing, region when the user names none.
QUIRKS: Final[dict[str, tuple[str, str | None]]] = {
    "aws": ("auto", None),
    "ceph": ("path", None),
    "garage": ("path", "garage"),
    "r2": ("path", "auto"),
    "seaweedfs": ("path", None),
    "swift": ("path", None),
    "tigris": ("virtual", "auto"),
}

# The error codes of the S3 API reference ("List of error codes") and what they mean for us.
CODES: Final[dict[str, FetchCode]] = {
    "NoSuchBucket": "no_such_bucket",
    "InvalidBucketName": "no_such_bucket",
    "NoSuchKey": "no_such_object",
    "NoSuchVersion": "no_such_object",
    "MethodNotAllowed": "no_such_object",  # a delete marker
    "NotFound": "no_such_object",
    "404": "no_such_object",
    "405": "no_such_object",
    "KeyTooLongError": "no_such_object",
    "AccessDenied": "access_denied",
    "AccountProblem": "access_denied",
    "AllAccessDisabled": "access_denied",
    "Forbidden": "access_denied",
    "InvalidObjectState": "access_denied",  # archived: it has to be restored first
    "401": "access_denied",
    "403": "access_denied",
    "ExpiredToken": "credentials_rejected",
    "ExpiredTokenException": "credentials_rejected",
    "InvalidAccessKeyId": "credentials_rejected",
    "InvalidClientTokenId": "credentials_rejected",
    "InvalidSecurity": "credentials_rejected",
    "InvalidToken": "credentials_rejected",
    "NotSignedUp": "credentials_rejected",
    "SignatureDoesNotMatch": "credentials_rejected",
    "TokenRefreshRequired": "credentials_rejected",
    "UnrecognizedClientException": "credentials_rejected",
    "RequestExpired": "configuration",
    "RequestTimeTooSkewed": "configuration",
    "301": "wrong_region",
    "AuthorizationHeaderMalformed": "wrong_region",
    "IllegalLocationConstraintException": "wrong_region",
    "PermanentRedirect": "wrong_region",
    "412": "changed",
    "416": "changed",
    "InvalidRange": "changed",
    "PreconditionFailed": "changed",
}
NOT_S3: Final = frozenset({"", "400", "401", "403"})  # the codes of a reply without an S3 error in it
THROTTLES: Final = frozenset({
    "429", "503", "RequestLimitExceeded", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequestsException",
})  # fmt: skip
HINTS: Final[dict[FetchCode, str]] = {
    "credentials_missing": "no AWS credentials found; set AWS_PROFILE, or use --no-sign-request for a public bucket",
    "credentials_rejected": "the server does not accept these credentials",
    "wrong_region": "the bucket is in another region; set --region",
}


@dataclass(frozen=True, slots=True)
class Body:
    """The bytes of one range, not yet read."""

    read: Callable[[int], bytes]  # up to so many bytes, as they come; b"" at the end
    close: Callable[[], None]
    length_known: bool  # if not, only another read tells that there is no more


@dataclass(frozen=True, slots=True)
class Checksum:
    """A checksum of the whole object that the server stored with it."""

    algorithm: str  # "sha256", "crc32", …
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
        for algorithm in ("SHA256", "CRC32"):
            value = reply.get(f"Checksum{algorithm}")
            if isinstance(value, str) and "-" not in value:
                return Checksum(algorithm.lower(), value)
        return None  # CRC64NVME and CRC32C have no fast implementation in the standard library

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


# ---------------------------------------------------------------- connect


def connect(endpoint: Endpoint, streams: int, *, connect_timeout_s: float, read_timeout_s: float) -> Client:
    """Return a client as the user's AWS configuration and the command line say. Sends nothing to S3.

    A `credential_process` runs here, once: the sandbox that follows permits no exec.
    Raises: FetchError (`configuration`, `credentials_missing`).
    """
    with translated("use the AWS configuration", "configuration"):
        check_url(endpoint.endpoint_url)
        session = boto3.Session(profile_name=endpoint.profile)
        check_bundle(endpoint.ca_bundle or session._session.get_config_variable("ca_bundle"))
        addressing, region = QUIRKS[endpoint.quirks] if endpoint.quirks else ("auto", None)
        client = session.client(
            "s3",
            endpoint_url=endpoint.endpoint_url,
            region_name=endpoint.region or session.region_name or region,
            verify=endpoint.ca_bundle,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": 1},
                connect_timeout=connect_timeout_s,
                read_timeout=read_timeout_s,
                max_pool_connections=streams + AHEAD,
                tcp_keepalive=True,
                user_agent_extra="imgpull",
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",  # we hash the whole object ourselves
                s3=_style(session, endpoint.addressing, addressing),
                **({"signature_version": UNSIGNED} if endpoint.no_sign_request else {}),
            ),
        )
        check_url(client.meta.endpoint_url)
        make_cuttable(client)
        source, secrets = _credentials(session, endpoint)
        attempts = session._session.get_config_variable("max_attempts")
        warm_up()
        return Client(
            client,
            endpoint.request_payer,
            client.meta.endpoint_url,
            source,
            secrets,
            int(attempts) if attempts else None,
            readable_files(session, endpoint),
            tuple(path for path in map(os.path.expanduser, TOKEN_CACHES) if os.path.isdir(path)),
        )


# What name resolution, TLS and time zones read (nsswitch.conf(5), resolv.conf(5), gai.conf(5), openssl(1)).
SYSTEM_FILES: Final = (
    "/etc/ca-certificates", "/etc/gai.conf", "/etc/host.conf", "/etc/hosts", "/etc/localtime", "/etc/nsswitch.conf",
    "/etc/pki", "/etc/protocols", "/etc/resolv.conf", "/etc/services", "/etc/ssl", "/run/systemd/resolve",
    "/usr/lib/ssl", "/usr/local/share/ca-certificates", "/usr/share/ca-certificates", "/usr/share/zoneinfo",
)  # fmt: skip
TOKEN_CACHES: Final = ("~/.aws/login/cache", "~/.aws/sso/cache")


def readable_files(session: Any, endpoint: Endpoint) -> tuple[str, ...]:
    """Return the files that boto3, TLS and the resolver read when they are in use; only those that exist."""
    core = session._session
    profile = {} if endpoint.no_sign_request else core.get_scoped_config()
    named = [core.get_config_variable(name) for name in ("config_file", "credentials_file", "ca_bundle")]
    named += [endpoint.ca_bundle, os.environ.get("REQUESTS_CA_BUNDLE"), os.environ.get("SSL_CERT_FILE")]
    named += [os.environ.get("SSL_CERT_DIR"), os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")]
    named += [os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"), profile.get("web_identity_token_file")]
    code = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    code += [os.path.dirname(module.__file__ or "") for module in (boto3, botocore)]
    paths = [os.path.expanduser(path) for path in (*named, *code, *TOKEN_CACHES, *SYSTEM_FILES) if path]
    return tuple(path for path in dict.fromkeys(paths) if path != "/" and os.path.exists(path))


def warm_up() -> None:
    """Load what is loaded on first use, since the sandbox permits no loading of code."""
    for name in (
        "encodings.idna",
        "xml.etree.ElementTree",
        "ssl",
        "email.utils",
        "stringprep",
    ):
        with suppress(ImportError):
            import_module(name)
    hosts = [line.split()[1:] for line in _lines("/etc/nsswitch.conf") if line.startswith("hosts:")]
    if any(word not in ("files", "dns") and not word.startswith("[") for words in hosts for word in words):
        with suppress(OSError):
            socket.getaddrinfo("imgpull.invalid", 443)  # the modules that glibc loads for it; RFC 6761, 6.4


def _lines(path: str) -> list[str]:
    """Return the lines of a small file, none if it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 16).splitlines()
    except OSError:
        return []


def _style(session: Any, asked: str | None, usual: str) -> Any:
    """Return the addressing: as asked, else as the AWS configuration says, else as this kind of server needs it."""
    configured = session._session.get_config_variable("s3") or {}
    style = asked or (None if "addressing_style" in configured else usual)
    return None if style in (None, "auto") and not asked else {"addressing_style": style}


def _credentials(session: Any, endpoint: Endpoint) -> tuple[str, Callable[[], tuple[str, ...]]]:
    """Return the name of the credentials' source and a function that returns their secret words."""
    if endpoint.no_sign_request:
        return "anonymous", tuple
    found = session.get_credentials()
    if found is None:
        return "none", tuple

    def secrets() -> tuple[str, ...]:
        # The attributes of a refreshable one would go to the network; the last ones known are enough.
        held = (getattr(found, name, None) for name in ("_secret_key", "_token"))
        plain = () if hasattr(found, "_secret_key") else (found.secret_key, found.token)
        return tuple(str(word) for word in (*held, *plain) if word)

    return re.sub(r"[^a-z0-9-]", "-", str(found.method).lower())[:64], secrets


def check_bundle(path: str | None) -> None:
    """Refuse a CA bundle that is not there, now and not with the first connection. Raises: FetchError."""
    if path and not os.path.exists(os.path.expanduser(path)):
        raise FetchError("configuration", f"no such CA bundle: {quote(path)}")


def check_url(url: str | None) -> None:
    """Refuse an endpoint that is not plain http(s), or that carries a password. Raises: FetchError."""
    if url is None:
        return
    parts = urlsplit(url)
    if "@" in parts.netloc:
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        raise FetchError("configuration", f"an endpoint URL holds no user name or password: {quote(bare)}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("configuration", f"not an http or https URL: {quote(url)}")


# ---------------------------------------------------------------- cut


class Line:
    """What one thread says over the network, so that another thread can cut it.

    boto3 has no way to end a request: it waits as long as a server sends a byte, or a `100 Continue`, now and then.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._cut = False

    def run(self, speak: Callable[[], T]) -> T:
        """Return what a function of this thread returns; its requests can be cut."""
        _line.current = self
        try:
            return speak()
        finally:
            _line.current = None
            self.use(None)

    def use(self, sock: socket.socket | None) -> None:
        """Note the socket in use. Raises: ConnectionAbortedError, once the line is cut."""
        with self._lock:
            self._sock = sock
            if self._cut and sock is not None:
                raise ConnectionAbortedError

    def cut(self) -> None:
        """End whatever the thread waits for in the network, now and later. Any thread may call."""
        with self._lock:
            self._cut = True
            if self._sock is not None:
                with suppress(OSError):  # it may have ended this instant
                    socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # not TLS's own, which would wait its turn


_line = threading.local()


class _Cuttable:
    """A connection that tells its thread's line which socket it uses."""

    sock: Any

    def _new_conn(self) -> Any:
        sock = super()._new_conn()  # type: ignore[misc]  # urllib3's, in the classes below
        try:
            _note(sock)
        except ConnectionAbortedError:
            sock.close()
            raise
        return sock

    def putrequest(self, *args: Any, **kwargs: Any) -> Any:
        if self.sock is not None:
            _note(self.sock)  # one that is used again, or that speaks TLS by now
        return super().putrequest(*args, **kwargs)  # type: ignore[misc]  # http.client's


def _note(sock: socket.socket) -> None:
    """Tell this thread's line its socket."""
    line = getattr(_line, "current", None)
    if line is not None:
        line.use(sock)


class _HTTPConnection(_Cuttable, AWSHTTPConnection):  # type: ignore[misc]  # two ways to type `sock`
    pass


class _HTTPSConnection(_Cuttable, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _HTTPPool(AWSHTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(AWSHTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


def make_cuttable(client: Any) -> None:
    """Let a client use connections that can be cut."""
    client._endpoint.http_session._pool_classes_by_scheme.update(http=_HTTPPool, https=_HTTPSPool)


# ---------------------------------------------------------------- translate


@contextmanager
def translated(
    doing: str, otherwise: FetchCode = "bad_response", *, not_s3: frozenset[str] = frozenset()
) -> Iterator[None]:
    """Turn whatever boto3, urllib3 or a hostile reply raises into a FetchError; `otherwise`: what nobody foresaw."""
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        if isinstance(error, aws.ClientError) and error.response.get("Error", {}).get("Code", "") in not_s3:
            # Swift does not even take an unsigned request for one of S3.
            raise FetchError("access_denied", f"cannot {doing}: the server takes no unsigned requests") from None
        raise translate(error, doing, otherwise) from None  # the cause may show a signed request


def translate(error: Exception, doing: str, otherwise: FetchCode = "bad_response") -> FetchError:
    """Return the FetchError for an exception of boto3 or urllib3."""
    if isinstance(error, aws.ClientError):
        return _translate_reply(error, doing)
    name = type(error).__name__
    if isinstance(error, aws.NoCredentialsError):
        return FetchError("credentials_missing", f"cannot {doing}: {HINTS['credentials_missing']}")
    if isinstance(error, _CREDENTIALS):
        return FetchError("credentials_missing", f"cannot {doing}: the AWS credentials cannot be loaded ({name})")
    if isinstance(error, _TIMEOUTS):
        return FetchError("timed_out", f"cannot {doing}: the server does not answer in time", retryable=True)
    if isinstance(error, aws.SSLError | http.SSLError):
        return _translate_tls(error, doing)
    if isinstance(error, _NETWORK):
        return FetchError("unavailable", f"cannot {doing}: {_network_reason(error)}", retryable=True)
    if isinstance(error, aws.InvalidRegionError) and otherwise == "bad_response":
        return FetchError("bad_response", f"cannot {doing}: the server names a region that cannot be")
    if isinstance(error, _CONFIGURATION):
        return FetchError("configuration", f"cannot {doing}: {quote(error)}")
    if isinstance(error, OSError) and not isinstance(error, http.HTTPError):
        return FetchError("configuration", f"cannot {doing}: {quote(error.strerror or name)}: {quote(error.filename)}")
    if otherwise != "bad_response":
        return FetchError(otherwise, f"cannot {doing}: {name}: {quote(error)}")
    return FetchError("bad_response", f"cannot {doing}: the server's answer makes no sense ({name})", retryable=True)


_CREDENTIALS = (
    aws.PartialCredentialsError, aws.CredentialRetrievalError, aws.TokenRetrievalError, aws.SSOError,
    aws.MetadataRetrievalError,
)  # fmt: skip
_TIMEOUTS = (aws.ConnectTimeoutError, aws.ReadTimeoutError, http.TimeoutError, TimeoutError)
_NETWORK = (
    aws.ConnectionError, aws.HTTPClientError, aws.ResponseStreamingError, aws.IncompleteReadError,
    http.ProtocolError, http.HTTPError, ConnectionError,
)  # fmt: skip
_CONFIGURATION = (
    aws.InvalidConfigError, aws.ProfileNotFound, aws.ConfigParseError, aws.ConfigNotFound, aws.NoRegionError,
    aws.ParamValidationError,
    aws.InvalidRegionError, aws.EndpointProviderError, aws.UnknownSignatureVersionError,
    aws.InvalidS3AddressingStyleError, aws.InvalidRetryConfigurationError, aws.InvalidMaxRetryAttemptsError,
    aws.InvalidProxiesConfigError, aws.UnknownEndpointError, aws.InvalidEndpointConfigurationError,
)  # fmt: skip


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what lies under it, as botocore and urllib3 nest them."""
    for _ in range(8):
        if not isinstance(error, BaseException):
            return
        yield error
        inner = getattr(error, "kwargs", {}).get("error") or getattr(error, "reason", None)
        error = inner if isinstance(inner, BaseException) else error.__cause__ or error.__context__


def _network_reason(error: Exception) -> str:
    """Return in plain words why there was no answer, without the request."""
    for cause in _causes(error):
        if isinstance(cause, socket.gaierror | http.NameResolutionError):
            return "the server's name cannot be resolved"
        if isinstance(cause, aws.ProxyConnectionError | http.ProxyError):
            return "the proxy does not answer"
        if isinstance(cause, ConnectionRefusedError):
            return "the server refuses the connection"
    return f"the connection broke ({type(error).__name__})"


def _translate_tls(error: Exception, doing: str) -> FetchError:
    """Return the FetchError for a TLS failure: a certificate that does not verify will not verify later."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        why = "the server's certificate does not verify; set --ca-bundle if the server has its own authority"
        return FetchError("configuration", f"cannot {doing}: {why}")
    return FetchError("unavailable", f"cannot {doing}: the TLS connection broke", retryable=True)


def _translate_reply(error: Any, doing: str) -> FetchError:
    """Return the FetchError for an error that the server itself sent."""
    untrusted = error.response
    code = quote(untrusted.get("Error", {}).get("Code", ""))
    status = untrusted.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    meaning = CODES.get(code) or CODES.get(str(status))
    if code in THROTTLES or status >= 500 or status in (408, 429) or code in ("RequestTimeout", "InternalError"):
        return FetchError(
            "unavailable",
            f"cannot {doing}: the server is busy or broken: {code}, status {status}",
            retryable=True,
            retry_after_s=_retry_after_s(untrusted),
            throttled=code in THROTTLES or status in (429, 503),
        )
    if meaning is None:
        return FetchError("bad_response", f"cannot {doing}: {code}, status {status}")
    said = quote(untrusted.get("Error", {}).get("Message", ""))
    hint = HINTS.get(meaning, "")
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        hint = "this machine's clock differs from the server's"
    return FetchError(
        meaning, f"cannot {doing}: {'; '.join(t for t in (hint, said, code) if t)}", retryable=meaning == "changed"
    )


def _retry_after_s(untrusted: dict[str, Any]) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3), or None."""
    value = untrusted.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after")
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - time()), MAX_RETRY_AFTER_S)
    except ValueError:
        return None
