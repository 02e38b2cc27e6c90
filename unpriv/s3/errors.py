"""What boto3, urllib3 and S3 say when something fails, in the wire's codes.

Rule 1: an exception of any class becomes a FetchError; one that nobody foresaw is `bad_response`.
Rule 2: no text of an exception passes unless we know that it holds no request: a request holds its signature.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, Final

import botocore.exceptions as aws
import urllib3.exceptions as http

from broker.protocol import FetchCode
from unpriv.failures import FetchError, quote

MAX_RETRY_AFTER_S: Final = 3600.0

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
    "changed": "the object changed after it was listed",
}


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
    if meaning is None and status in (302, 303, 307, 308):
        return FetchError("bad_response", f"cannot {doing}: the server redirects, which is not followed")
    if meaning is None:
        return FetchError("bad_response", f"cannot {doing}: {code}, status {status}")
    said = quote(untrusted.get("Error", {}).get("Message", ""))
    hint = HINTS.get(meaning, "")
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        hint = "this machine's clock differs from the server's"
    told = "; ".join(dict.fromkeys(text for text in (hint, said, code) if text))
    return FetchError(meaning, f"cannot {doing}: {told}", retryable=meaning == "changed")


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
