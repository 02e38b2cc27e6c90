"""How far this machine's clock is from the server's: S3 refuses a request whose time is off by 15 minutes.

Source: RFC 9110, 6.6.1 "Date": whole seconds; so what is told is right but for a second and the answer's way here.
"""

import time
from email.utils import parsedate_to_datetime
from typing import Any


class Clock:
    """What the last answer of the server said; None until one has told its time."""

    def __init__(self) -> None:
        self.ahead_s: int | None = None

    def hear(self, parsed: dict[str, Any], **_: object) -> None:
        """Take an answer as botocore has parsed it, of an error too. A handler of its event `after-call`."""
        untrusted_date = parsed.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
        try:
            self.ahead_s = round(time.time() - parsedate_to_datetime(untrusted_date).timestamp())
        except (ValueError, OverflowError):  # no date, or none that can be one: nothing is learnt
            return
