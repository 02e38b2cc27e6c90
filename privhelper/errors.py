"""Why a request is not done. Whoever finds out raises; monitor.py turns it into the one answer.

Rule: the class says whose fault it is. RejectedError (manifest.py) is the layer's, StoreError (stores/base.py) the
pool's, a plain AnswerError policy's or the moment's. What breaks the protocol is protocol.ProtocolError, unanswered.
"""

import errno
import os
import sqlite3


class AnswerError(Exception):
    """A request that is not done. ``code`` is one of protocol.EXIT_CODES; ``figures`` say what is, and was asked."""

    def __init__(
        self, code: str, message: str, rule: str | None = None, entry: int | None = None, **figures: int
    ) -> None:
        super().__init__(message)
        self.code, self.rule, self.entry, self.figures = code, rule, entry, figures


class TakenError(AnswerError):
    """Somebody else is making the same thing at this moment."""

    def __init__(self, message: str) -> None:
        super().__init__("busy", message)


def code_of(error: OSError | sqlite3.Error) -> str:
    """Return the code of what failed on this host: where a disk is full, room can be made."""
    if isinstance(error, OSError):
        return "no_room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "fault"
    return "no_room" if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL else "fault"


def told(error: Exception) -> str:
    """Return what a client may read of an error: an OSError's text names paths of the host, its reason does not."""
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


class GoneError(Exception):
    """The client hung up; there is nobody to answer."""
