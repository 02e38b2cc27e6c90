"""End a request from outside: boto3 knows no way.

Rule 1: a thread that was left behind ends soon; it neither loads the network nor keeps memory.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from botocore.awsrequest import AWSHTTPConnection, AWSHTTPConnectionPool, AWSHTTPSConnection, AWSHTTPSConnectionPool

T = TypeVar("T")


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
