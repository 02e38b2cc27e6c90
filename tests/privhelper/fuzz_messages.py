"""A flood of messages, most of them wrong, at the helper's own door: ``python3 -m tests.privhelper.fuzz_messages N``.

Invariant tested: any bytes give a request of the table with each field in its bounds, or ProtocolError; no handler is
reached but after hello, with the descriptors of its row; nothing stays open, and the process stays small.

Run as the helper runs, by Debian's Python without site-packages, so that the memory is the helper's and not a test's.
"""

import array
import contextlib
import json
import os
import random
import socket
import sys
from typing import Any

from privhelper import monitor, policy, protocol
from privhelper.connection import Connection
from privhelper.errors import GoneError
from privhelper.protocol import Message, ProtocolError
from tests.support import descriptors

LAYER = "sha256:" + "0" * 64
GOOD: list[dict[str, Any]] = [
    {"op": "hello", "version": 1},
    {"op": "stat", "layer": LAYER},
    {"op": "manifest", "layer": LAYER},
    {"op": "commit", "manifest_bytes": 1, "payload_bytes": 1},
    {"op": "activate", "layer": LAYER, "name": "a", "mode": "rw", "size": 0},
    {"op": "deactivate", "name": "a"},
    {"op": "remove", "layer": LAYER},
    {"op": "list"},
    {"op": "verify", "layer": LAYER},
    {"op": "reconcile"},
]
ENCODED = [protocol.encode(message) for message in GOOD]
ODD: list[Any] = [None, True, -1, 2**63, 2**70, 0.5, "", "..", "a" * 300, [], {}, [[]], LAYER, "rw"]
AT_THE_DOOR = 25  # one message of so many goes through a socket; the others to the parser alone


def mutated(rng: random.Random) -> bytes:
    """Return a request of the table with a few bytes, or a few values, changed."""
    kind = int(rng.random() * len(GOOD))
    data = bytearray(ENCODED[kind])
    if rng.random() < 0.5:
        message = dict(GOOD[kind])
        message[rng.choice([*message, "x"])] = rng.choice(ODD)
        data = bytearray(protocol.encode(message))
    for _ in range((0, 0, 1, 1, 2, 8)[int(rng.random() * 6)]):
        at, action = int(rng.random() * len(data)), rng.random()
        if action < 0.33:
            data[at] = int(rng.random() * 256)
        elif action < 0.66:
            del data[at : at + 1 + int(rng.random() * 8)]
            data = data or bytearray(b"{")
        else:
            data[at:at] = bytes(data[at : at + 1 + int(rng.random() * 39)])
    return bytes(data)


class Recorder:
    """Stands where Answers stands and keeps who was reached, with what."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, Message, int]] = []

    def __getattr__(self, name: str) -> Any:
        op = name.removeprefix("answer_")

        def answer(fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
            self.reached.append((op, fields, len(fds)))
            return {}, []

        return answer


def knock(grants: policy.Policy, data: bytes, fds: list[int], greeted: bool) -> list[tuple[str, Message, int]]:
    """Send a message through a real socket; return which handlers it reached."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    recorder: Any = Recorder()
    with ours, theirs:
        if greeted:
            ours.send(ENCODED[0])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        ours.sendmsg([data], rights)
        ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ProtocolError, GoneError):
            monitor.serve(Connection(theirs, 1), grants, recorder)
    return list(recorder.reached)


def flood(count: int) -> dict[str, int]:
    """Send so many messages; return what there is to say about them."""
    rng, grants = random.Random(20260101), policy.load(None)
    null = os.open("/dev/null", os.O_RDONLY)
    accepted = reached = 0
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  the log, a line a request
    before = descriptors.held()
    for number in range(count):
        data = mutated(rng)
        try:
            op, fields = protocol.parse_request(data)
        except ProtocolError:
            op = ""
        else:
            accepted += 1
            assert fields.keys() == protocol.REQUESTS[op].keys()
            assert all(check(fields[name]) for name, check in protocol.REQUESTS[op].items())
        if number % AT_THE_DOOR == 0:
            fds, greeted = [null] * rng.choice((0, 0, 1, 2, 3)), rng.random() < 0.8
            found = knock(grants, data, fds, greeted)[greeted:]
            reached += len(found)
            # No descriptor of these is of a kind that a row asks for, and commit asks for two.
            permitted = op not in ("", "commit") and not fds and greeted == (op != "hello")
            assert [who for who, _, _ in found] == ([op] if permitted else []), (data, greeted, fds, found)
    assert descriptors.held() == before
    os.close(null)
    with open("/proc/self/status") as status:  # not getrusage(2): it counts what was there before execve(2) as well
        peak_bytes = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return {"messages": count, "requests": accepted, "reached": reached, "peak_bytes": peak_bytes}


if __name__ == "__main__":
    print(json.dumps(flood(int(sys.argv[1]))))
