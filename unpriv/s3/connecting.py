"""Make a client as the user's AWS configuration, the command line and the kind of server say.

Rule 1: what needs a process or loads code happens here: the sandbox that follows permits neither.
"""

import os
import re
import socket
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import boto3
import botocore
from botocore import UNSIGNED
from botocore.config import Config

from broker.protocol import Endpoint
from unpriv.failures import FetchError, quote
from unpriv.s3.client import Client
from unpriv.s3.clock import Clock
from unpriv.s3.errors import translated
from unpriv.s3.line import make_cuttable

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
        client.meta.events.register("after-call.s3", (clock := Clock()).hear)
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
            clock,
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
