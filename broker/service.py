"""How imgpull speaks where it runs as a service: fields for the journal, and its status for `systemctl status`.

Rule 1: the environment decides, nothing is switched on by hand: JOURNAL_STREAM names the journal that standard error
        goes to, NOTIFY_SOCKET the service manager that wants to hear. Without them nothing here is used.
Rule 2: what cannot be told is not told: neither the journal nor the manager can stop the work.

Sources: systemd.exec(5), $JOURNAL_STREAM; sd_notify(3); "Native Journal Protocol" of systemd.
"""

import os
import socket
from contextlib import suppress
from typing import Any, Final

from broker.console import Line, Reporter, escape, size
from broker.errors import Problem

JOURNAL: Final = "/run/systemd/journal/socket"
# What `journalctl MESSAGE_ID=…` finds: made once by systemd-id128(1), never changed.
MESSAGE_IDS: Final = {
    "stage": "3bc75136e3004e1d8a256a314d749a97",
    "notice": "b9d1e43920fc4757a19cbe8edcdbc99a",
    "error": "bdf776ce3ef64edda9a3ccb7691a8ef4",
}
PRIORITIES: Final = {"stage": 6, "notice": 5, "error": 3}


def is_journal(descriptor: int) -> bool:
    """Tell whether a descriptor goes to the journal: JOURNAL_STREAM is `DEVICE:INODE` of it."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _encode(fields: dict[str, object]) -> bytes:
    """Return fields in the journal's own form; a value with a newline has its length in front."""
    out = bytearray()
    for name, value in fields.items():
        data = str(value).encode("utf-8", "backslashreplace")
        out += name.encode("ascii")
        out += b"\n" + len(data).to_bytes(8, "little") + data if b"\n" in data else b"=" + data
        out += b"\n"
    return bytes(out)


def _send(path: str, data: bytes) -> None:
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(data, socket.MSG_DONTWAIT, "\0" + path[1:] if path.startswith("@") else path)


def tell_journal(kind: str, message: str, **fields: object) -> None:
    """Write one entry with fields IMGPULL_*."""
    own = {"MESSAGE": message, "MESSAGE_ID": MESSAGE_IDS[kind], "PRIORITY": PRIORITIES[kind]}
    own["SYSLOG_IDENTIFIER"] = "imgpull"
    _send(JOURNAL, _encode(own | {f"IMGPULL_{k.upper()}": v for k, v in fields.items() if v not in (None, "")}))


def tell_problem(problem: Problem) -> None:
    """Write an error with its code, so that `journalctl IMGPULL_CODE=no-room` finds it."""
    violations = problem.details.get("violations") or [{}]
    fields = {"code": problem.code, "exit": problem.exit_code, "rule": violations[0].get("rule")}
    tell_journal("error", "\n".join(map(escape, problem.lines())), **fields)


def tell_manager(text: str) -> None:
    """Give the service manager one line for `systemctl status`."""
    if path := os.environ.get("NOTIFY_SOCKET"):
        _send(path, f"STATUS={escape(text)}".encode())


class JournalReporter(Reporter):
    """One entry for each stage of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self._image = ""

    def on_begin(self, title: str) -> None:
        """Note what is pulled."""
        self._image = title

    def on_stage(self, line: Line, changed: bool) -> None:
        """Write an entry for a new stage."""
        if changed and line.stage != "waiting":
            fields: dict[str, Any] = {
                "image": self._image,
                "layer": line.label,
                "stage": line.stage,
                "bytes": line.total,
            }
            tell_journal("stage", f"{escape(line.label)}: {line.stage}", **fields)

    def notice(self, message: str, **data: Any) -> None:
        """Write an entry for what is worth knowing."""
        tell_journal("notice", escape(message), image=self._image, **data)


class StatusReporter(Reporter):
    """Another reporter, and beside it the status of the service: how many layers are done, what is at work."""

    def __init__(self, inner: Reporter) -> None:
        super().__init__()
        self._inner = inner
        self.lines = inner.lines
        self._title = ""

    def on_begin(self, title: str) -> None:
        """Hand on."""
        self._title = title
        self._inner.on_begin(title)

    def on_stage(self, line: Line, changed: bool) -> None:
        """Hand on, and tell the manager of a new stage."""
        self._inner.on_stage(line, changed)
        if changed:
            done = sum(one.stage in ("ready", "shared") for one in self.lines.values())
            amount = f" {size(line.total)}" if line.total else ""
            at_work = (
                f", {line.stage} {line.label}{amount}" if line.stage in ("fetching", "checking", "committing") else ""
            )
            tell_manager(f"{self._title}: {done} of {len(self.lines)} layers{at_work}")

    def notice(self, message: str, **data: Any) -> None:
        """Hand on."""
        self._inner.notice(message, **data)

    def close(self) -> None:
        """Hand on."""
        self._inner.close()
