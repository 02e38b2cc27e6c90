"""Which request is permitted when, and who answers it: the one door.

Rule 1: every permission is a row of policy/protocol.toml; table, wire and handlers name the same requests or nothing
starts.
Rule 2: descriptors arrive close-on-exec, in the number and of the kinds of the row. More, fewer or cut off: hang up.
Rule 3: what breaks the protocol gets no answer. It is logged, and the process ends; with it goes all that it held.
"""

import array
import errno
import fcntl
import os
import select
import socket
import sqlite3
import stat
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from privhelper import kernel, protocol
from privhelper.answers import Answers
from privhelper.devices import log
from privhelper.errors import AnswerError, GoneError
from privhelper.policy import Policy
from privhelper.protocol import Message, ProtocolError

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Connection:
    """One connected peer, whose uid the kernel vouches for (SO_PEERCRED: who connected, unix(7))."""

    def __init__(self, sock: socket.socket, send_timeout_s: float) -> None:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise ProtocolError("not a SOCK_SEQPACKET unix socket")
        self._sock = sock
        self._send_timeout_s = send_timeout_s
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        self.pid, self.uid, _ = struct.unpack("iII", credentials)

    def fileno(self) -> int:
        """Return the socket's number."""
        return self._sock.fileno()

    def receive(self, most_descriptors: int, timeout_s: float) -> tuple[bytes, list[int]]:
        """Return one message and its descriptors; empty at the end.

        Raises:
            ProtocolError: nothing came in time, or something was cut off.
        """
        self._sock.settimeout(timeout_s)
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(
                protocol.MAX_MESSAGE, socket.CMSG_SPACE(most_descriptors * 4), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise ProtocolError(f"silent for {timeout_s} s") from None
        except ConnectionResetError:  # it went away with answers unread
            return b"", []
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close(descriptors)
            raise ProtocolError("a message or its descriptors were cut off")
        return data, list(descriptors)

    def send(self, message: Message, descriptors: list[int]) -> None:
        """Send an answer.

        Raises:
            GoneError: the peer is gone, or does not read.
        """
        self._sock.settimeout(self._send_timeout_s)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._sock.sendmsg([protocol.encode(message)], rights)
        except OSError as error:
            raise GoneError(str(error)) from error

    def tell(self, message: Message) -> None:
        """Send progress if the peer has room for it; send an item in any case."""
        if message["type"] != "progress" or select.select([], [self._sock], [], 0)[1]:
            self.send(message, [])


def serve(connection: Connection, policy: Policy, answers: Answers) -> None:
    """Answer requests until the peer hangs up or breaks the protocol.

    Raises:
        ProtocolError: it broke the protocol.
    """
    limits = policy.settings["connection"]
    handlers = _handlers(policy, answers)
    most = max(len(row["brings"]) for row in policy.requests.values())
    state = "new"
    for _ in range(limits["requests"]):
        timeout_s = limits["hello_timeout_s"] if state == "new" else limits["idle_timeout_s"]
        data, descriptors = connection.receive(most, timeout_s)
        if not data:
            _close(descriptors)
            return
        try:
            op, fields = protocol.parse_request(data)
            row = policy.requests[op]
            if row["state"] != state:
                raise ProtocolError(f"{op} is not permitted in state {state}")
            _check_descriptors(op, row["brings"], descriptors, policy.settings["payload"]["filesystems"])
            if _answer(connection, op, fields, descriptors, handlers[op], row["returns"]):
                state = row["next"]
        finally:
            _close(descriptors)


Handler = Callable[[Message, list[int]], tuple[Message, list[int]]]


def _handlers(policy: Policy, answers: Answers) -> dict[str, Handler]:
    """Return who answers what, after making sure that policy, wire and code know the same requests."""
    written = {name.removeprefix("answer_") for name in dir(Answers) if name.startswith("answer_")}
    if not written == policy.requests.keys() == protocol.REQUESTS.keys():
        raise RuntimeError("policy/protocol.toml, protocol.REQUESTS and the answers differ")
    return {name: getattr(answers, f"answer_{name}") for name in written}


def _answer(
    connection: Connection, op: str, fields: Message, brought: list[int], handler: Handler, most_returned: int
) -> bool:
    """Run one handler, send its answer, log one line; return whether it was an ``ok``."""
    who = f"uid={connection.uid} pid={connection.pid} op={op} " + " ".join(f"{k}={v}" for k, v in fields.items())
    body, returned = Message(), list[int]()
    try:
        body, returned = handler(fields, brought)
        reply = {"type": "ok", **body}
    except AnswerError as error:
        reply = _refusal(error)
    except (OSError, sqlite3.Error) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reply = _refusal(AnswerError("no_room" if full else "fault", str(error)))
    except GoneError:
        log(5, f"{who} outcome=gone")
        raise
    if len(returned) > most_returned:
        raise RuntimeError(f"{op} returns {len(returned)} descriptors, policy allows {most_returned}")
    result = " ".join(f"{k}={v}" for k, v in body.items() if isinstance(v, str | int))
    log(5, f"{who} outcome={reply.get('code', 'ok')} {reply.get('message', result)}".rstrip())
    try:
        connection.send(reply, returned)
    finally:
        _close(returned)
    return bool(reply["type"] == "ok")


def _refusal(error: AnswerError) -> Message:
    text = str(error).encode("ascii", "backslashreplace").decode("ascii")[:2000]
    told = {"code": error.code, "message": text, "rule": error.rule, "entry": error.entry, "figures": error.figures}
    return {"type": "error", **told}


# ---------------------------------------------------------------- descriptors


def _check_descriptors(op: str, kinds: list[str], descriptors: list[int], filesystems: Mapping[str, int]) -> None:
    if len(descriptors) != len(kinds):
        raise ProtocolError(f"{op} came with {len(descriptors)} descriptors, not {len(kinds)}")
    for kind, descriptor in zip(kinds, descriptors, strict=True):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
            raise ProtocolError(f"{op}: a descriptor that was not opened for reading (O_PATH)")
        _KINDS[kind](op, descriptor, filesystems)


def _is_sealed(op: str, descriptor: int, filesystems: Mapping[str, int]) -> None:
    """Demand every seal. F_SEAL_FUTURE_WRITE is not enough: an older writable mapping could still change it."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ProtocolError(f"{op}: the manifest is not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise ProtocolError(f"{op}: the manifest is not sealed")


def _is_payload(op: str, descriptor: int, filesystems: Mapping[str, int]) -> None:
    """Demand a regular file, open for reading, where no other process of its owner's can hold us in a read."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ProtocolError(f"{op}: the payload is not a regular file")
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        raise ProtocolError(f"{op}: the payload is not open for reading only")
    if kernel.filesystem_magic(descriptor) not in filesystems.values():
        raise ProtocolError(f"{op}: the payload lies on a file system that policy/helper.toml does not list")


_KINDS: Final[dict[str, Callable[[str, int, Mapping[str, Any]], None]]] = {
    "sealed memfd": _is_sealed,
    "regular file open for reading": _is_payload,
}


def _close(descriptors: Any) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
