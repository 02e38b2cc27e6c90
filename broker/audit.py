"""Proves on this very machine that what policy/ does not grant is denied: `imgpull policy audit`.

Rule 1: each attempt is made for real, from inside the real sandbox or at the real door of the root helper.
Rule 2: what is expected comes from policy/audit.toml; whatever is not granted there must be denied or killed.
Rule 3: no attempt changes anything, also where it should succeed against our expectation.

The sandboxes of populate and verify need root to start them: `imgpull-helper audit` does the same for these.
"""

import array
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final

from broker.checker import ENVIRONMENT
from broker.policy import helpers_digest
from broker.settings import POLICY_DIR, Settings
from privhelper import protocol

ROLES: Final = ("check", "fetch")
TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way out that was tried."""

    place: str
    attempt: str
    expected: str
    got: str

    @property
    def ok(self) -> bool:
        """Tell whether what happened is what policy/ says."""
        return self.got.split(" ")[0] == self.expected

    def to_json(self) -> dict[str, Any]:
        """Return it as `--json` prints it."""
        return {**asdict(self), "ok": self.ok}


def audit(settings: Settings) -> list[Attempt]:
    """Make every attempt. Returns: one row each; the helper's are left out where there is no helper."""
    with (POLICY_DIR / "audit.toml").open("rb") as file:
        expectations = tomllib.load(file)
    rows = []
    with tempfile.TemporaryDirectory(prefix="imgpull-audit-") as folder:
        for role in ROLES:
            for name in _attempts():
                expected = "granted" if name in expectations[role]["granted"] else "denied"
                rows.append(Attempt(role, name, expected, _try(role, name, folder)))
    if os.path.exists(settings.helper_socket):
        rows.append(Attempt("helper", "policy_is_the_one_shown", "same", _compare(settings.helper_socket)))
        rows += [Attempt("helper", n, "denied", _knock(settings.helper_socket, f)) for n, f in KNOCKS.items()]
    return rows


def _attempts() -> list[str]:
    done = subprocess.run(_program("list"), check=True, capture_output=True, text=True, env=ENVIRONMENT)
    return done.stdout.split()


def _program(*words: str) -> list[str]:
    return [sys.executable, "-I", "-m", "unpriv.audit", *words]


def _try(role: str, name: str, folder: str) -> str:
    """Return ``granted``, ``denied`` and how, or ``unclear`` and why."""
    done = subprocess.run(
        _program(role, name, folder),
        check=False,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=TIMEOUT_S,
        cwd="/",
    )
    said = done.stdout.decode("ascii", "replace").strip()
    if done.returncode == -signal.SIGSYS and not said:
        return "denied (killed by seccomp)"
    if done.returncode == 0 and said.startswith("DENIED errno "):
        return f"denied ({os.strerror(int(said.split()[-1])).lower()})"
    if done.returncode == 0 and said == "REACHED":
        return "granted"
    return f"unclear (ended with {done.returncode}: {done.stderr[-200:].decode('ascii', 'replace').strip()})"


# ---------------------------------------------------------------- the door of the root helper

HELLO: Final = {"op": "hello", "version": protocol.VERSION}
COMMIT: Final = {"op": "commit", "manifest_bytes": 1, "payload_bytes": 1}


def _send(sock: socket.socket, message: dict[str, Any] | bytes, descriptors: list[int] | None = None) -> None:
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([data], rights)


def _before_hello(sock: socket.socket) -> None:
    _send(sock, {"op": "list"})


def _unknown_request(sock: socket.socket) -> None:
    _send(sock, HELLO)
    sock.recv(protocol.MAX_MESSAGE)
    _send(sock, {"op": "mount", "path": "/"})


def _not_json(sock: socket.socket) -> None:
    _send(sock, b"\x00" * 64)


def _open_manifest(sock: socket.socket) -> None:
    """A manifest that could still be changed after root has read it."""
    _commit_with(sock, os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))


def _path_only(sock: socket.socket) -> None:
    """A descriptor of a file that its sender may not read."""
    _commit_with(sock, os.open("/etc/shadow", os.O_PATH | os.O_CLOEXEC))


def _commit_with(sock: socket.socket, first: int) -> None:
    _send(sock, HELLO)
    sock.recv(protocol.MAX_MESSAGE)
    second = os.open("/etc/hostname", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _send(sock, COMMIT, [first, second])
    finally:
        os.close(first)
        os.close(second)


def _many_descriptors(sock: socket.socket) -> None:
    _send(sock, HELLO)
    sock.recv(protocol.MAX_MESSAGE)
    _send(sock, COMMIT, [0] * 200)


KNOCKS: Final[dict[str, Callable[[socket.socket], None]]] = {
    "request_before_hello": _before_hello,
    "unknown_request": _unknown_request,
    "no_json": _not_json,
    "manifest_not_sealed": _open_manifest,
    "descriptor_without_access": _path_only,
    "200_descriptors": _many_descriptors,
}


def _compare(path: str) -> str:
    """Return ``same`` where the helper is bound by the files that `imgpull policy show` prints."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(path)
            _send(sock, HELLO)
            found, expected = protocol.decode(sock.recv(protocol.MAX_MESSAGE)).get("policy"), helpers_digest()
        except (OSError, protocol.ProtocolError) as error:
            return f"unclear ({error})"
    return "same" if found == expected else f"other ({found}, shown is {expected})"


def _knock(path: str, attempt: Callable[[socket.socket], None]) -> str:
    """Return ``denied`` where the helper hangs up without an answer, as it must."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(path)
            attempt(sock)
            answer = sock.recv(protocol.MAX_MESSAGE)
        except (ConnectionResetError, BrokenPipeError):
            answer = b""
        except OSError as error:
            return f"unclear ({error})"
    return "denied (hung up)" if not answer else f"granted ({answer[:80]!r})"
