"""Which request is permitted when, and who answers it: the one door.

Rule 1: every permission is a row of policy/protocol.toml; table, wire and handlers name the same requests or nothing
starts.
Rule 2: descriptors arrive close-on-exec, in the number and of the kinds of the row. More, fewer or cut off: hang up.
Rule 3: what breaks the protocol gets no answer. It is logged, and the process ends; with it goes all that it held.
"""

import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Mapping
from typing import Any, Final

from privhelper import kernel, protocol
from privhelper.answers import Answers
from privhelper.connection import Connection, close_all
from privhelper.devices import log
from privhelper.errors import AnswerError, GoneError, code_of, told
from privhelper.policy import Policy
from privhelper.protocol import Message, ProtocolError

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


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
            close_all(descriptors)
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
            close_all(descriptors)


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
        log(3, f"{who} error={error}")
        reply = _refusal(AnswerError(code_of(error), f"{told(error)}; the journal of the helper says where"))
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
        close_all(returned)
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
