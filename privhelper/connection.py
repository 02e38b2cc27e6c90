"""One connected client: messages in, messages out, and the descriptors that travel with them.

Rule 1: who asks is told by the kernel (SO_PEERCRED, unix(7)), never by the client.
Rule 2: descriptors arrive close-on-exec. More than expected, or a message that was cut off: hang up.
Rule 3: nobody is waited for longer than policy/helper.toml says.
"""

import array
import os
import select
import socket
import struct
from collections.abc import Iterable

from privhelper import protocol
from privhelper.errors import GoneError
from privhelper.protocol import Message, ProtocolError


class Connection:
    """A SOCK_SEQPACKET socket and the uid of who connected it."""

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
            close_all(descriptors)
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

    def is_gone(self, within_s: float) -> bool:
        """Tell whether the peer hangs up within so many seconds."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        return bool(poll.poll(within_s * 1000))


def close_all(descriptors: Iterable[int]) -> None:
    """Close what arrived."""
    for descriptor in descriptors:
        os.close(descriptor)
