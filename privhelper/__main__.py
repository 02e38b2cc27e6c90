"""The program ``imgpull-helper``: ``serve`` answers one connection; everything else is root's own, in administer.py.

Rule 1: ``serve`` takes nothing from its environment but LISTEN_FDS; whoever starts it passes one connected socket.
Rule 2: it gives up every capability that policy/authority.toml does not list before it reads the first message.
Rule 3: no module that runs a program, or that makes or changes a pool, is loaded for ``serve``.
"""

import os
import resource
import socket
import sqlite3
import sys

from privhelper import kernel, policy
from privhelper.answers import Answers
from privhelper.connection import Connection
from privhelper.devices import Devices, log
from privhelper.errors import AnswerError, GoneError, code_of
from privhelper.monitor import serve
from privhelper.policy import Policy, PolicyError
from privhelper.protocol import EXIT_CODES, ProtocolError

_EX_USAGE, _EX_PROTOCOL, _EX_CONFIG = 2, 76, 78


def main(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    os.umask(0o077)
    try:
        grants, words = _load(arguments)
        if words == ["serve"]:
            return _serve(grants)
        from privhelper import administer

        return administer.run(grants, words)
    except PolicyError as error:
        return _fail(_EX_CONFIG, str(error))
    except AnswerError as error:
        return _fail(EXIT_CODES[error.code], str(error))
    except (OSError, sqlite3.Error) as error:
        return _fail(EXIT_CODES[code_of(error)], str(error))


def _load(arguments: list[str]) -> tuple[Policy, list[str]]:
    """Return the grants in force and the command: ``--config FILE`` may stand before it or after it."""
    at = arguments.index("--config") if "--config" in arguments[:-1] else len(arguments)
    config = arguments[at + 1] if at < len(arguments) else None
    return policy.load(config), arguments[:at] + arguments[at + 2 :]


def _fail(code: int, message: str) -> int:
    log(3, message)
    return code


def _serve(grants: Policy) -> int:
    if os.environ.get("LISTEN_FDS") != "1":
        return _fail(_EX_USAGE, "serve wants one connected socket on descriptor 3: LISTEN_FDS=1, Accept=yes")
    _confine(grants)
    try:
        connection = Connection(socket.socket(fileno=3), grants.settings["connection"]["send_timeout_s"])
        devices = Devices(grants)
        try:
            devices.reconcile(thorough=False)
        except (AnswerError, OSError, sqlite3.Error) as error:
            log(4, f"reconcile: {error}")  # hello says how the pool is, every change is refused with the reason
        serve(connection, grants, Answers(grants, devices, connection))
    except ProtocolError as error:
        return _fail(_EX_PROTOCOL, f"hung up: {error}")
    except GoneError:
        return _fail(0, "the client is gone")
    return 0


def _confine(grants: Policy) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.set_no_new_privs()
    kernel.keep_capabilities(grants.authority["helper"]["capabilities"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
