"""Why a request is not done. Whoever finds out raises; monitor.py turns it into the one answer.

Rule: the class says whose fault it is. RejectedError (manifest.py) is the layer's, StoreError (stores/base.py) the
pool's, a plain AnswerError policy's or the moment's. What breaks the protocol is protocol.ProtocolError, unanswered.
"""


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


class GoneError(Exception):
    """The client hung up; there is nobody to answer."""
