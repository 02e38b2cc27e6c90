"""The program ``imgpull-helper``: ``serve`` for one connection, the rest for root at a terminal.

Rule 1: ``serve`` takes nothing from its environment but LISTEN_FDS; whoever starts it passes one connected socket.
Rule 2: it gives up every capability that policy/authority.toml does not list before it reads the first message.
"""

import os
import resource
import socket
import sys
from typing import Any, Final

from privhelper import kernel, policy
from privhelper.answers import AnswerError, Answers, GoneError, log, open_store
from privhelper.ledger import Ledger
from privhelper.monitor import Connection, serve
from privhelper.policy import Policy, PolicyError
from privhelper.protocol import EXIT_CODES, Message, ProtocolError
from privhelper.stores.base import READY, Pool, StoreError

_USAGE: Final = """usage: imgpull-helper [--config FILE] COMMAND
  serve                       answer one connection on descriptor 3 (LISTEN_FDS=1)
  reconcile                   make ledger and store agree
  pool create [--size BYTES] [--metadata PATH] [--data PATH] [--metadata-bytes N] [--data-bytes N] [--block-bytes N]
  pool attach | detach | status | check
  pool grow [--metadata-bytes N] [--data-bytes N]
"""
_EX_USAGE, _EX_CONFIG, _EX_PROTOCOL, _EX_SOFTWARE = 2, 78, 76, 70
_TEXT_OPTIONS: Final = ("metadata", "data")
_NUMBER_OPTIONS: Final = ("size", "metadata-bytes", "data-bytes", "block-bytes")


class _Root:
    """The client that root's own commands are: no socket, nothing to tell."""

    uid = 0

    def fileno(self) -> int:
        """Return a descriptor that never hangs up."""
        return 0

    def tell(self, message: Message) -> None:
        """Do nothing."""


def main(arguments: list[str]) -> int:
    """Run one command; return its exit code."""
    os.umask(0o077)
    config = None
    if arguments[:1] == ["--config"] and len(arguments) > 1:
        config, arguments = arguments[1], arguments[2:]
    elif arguments[1:2] == ["--config"] and len(arguments) == 3:  # after `serve`, as units write it
        config, arguments = arguments[2], arguments[:1]
    try:
        grants = policy.load(config)
        if arguments == ["serve"]:
            return _serve(grants)
        if arguments == ["reconcile"]:
            return _reconcile(grants)
        if arguments[:1] == ["pool"] and len(arguments) > 1:
            return _pool(grants, arguments[1], _options(arguments[2:]))
    except PolicyError as error:
        return _fail(_EX_CONFIG, str(error))
    except StoreError as error:
        return _fail(EXIT_CODES[error.code], str(error))
    except AnswerError as error:
        return _fail(EXIT_CODES[error.code], str(error))
    except OSError as error:
        return _fail(EXIT_CODES["fault"], str(error))
    except ValueError:
        pass
    sys.stderr.write(_USAGE)
    return _EX_USAGE


def _fail(code: int, message: str) -> int:
    log(3, message)
    return code


def _serve(grants: Policy) -> int:
    if os.environ.get("LISTEN_FDS") != "1":
        return _fail(_EX_USAGE, "serve wants one connected socket on descriptor 3: LISTEN_FDS=1, Accept=yes")
    _confine(grants)
    try:
        connection = Connection(socket.socket(fileno=3), grants.settings["connection"]["send_timeout_s"])
        answers = _answers(grants, connection)
        try:
            answers.reconcile(thorough=False)
        except (AnswerError, StoreError, OSError) as error:
            log(4, f"reconcile: {error}")  # hello says how the pool is, every change is refused with the reason
        serve(connection, grants, answers)
    except ProtocolError as error:
        return _fail(_EX_PROTOCOL, f"hung up: {error}")
    except GoneError:
        return _fail(0, "the client is gone")
    return 0


def _confine(grants: Policy) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.set_no_new_privs()
    kernel.keep_capabilities(grants.authority["helper"]["capabilities"])


def _answers(grants: Policy, client: Any) -> Answers:
    state_dir = grants.settings["state_dir"]
    os.makedirs(os.path.join(state_dir, "manifests"), 0o700, exist_ok=True)
    return Answers(grants, Ledger(state_dir), open_store(grants), client)


def _reconcile(grants: Policy) -> int:
    for action in _answers(grants, _Root()).reconcile(thorough=True):
        sys.stdout.write(action + "\n")
    return 0


def _options(words: list[str]) -> dict[str, Any]:
    """Read ``--name value`` pairs; numbers are bytes. Raises ValueError for anything else."""
    found: dict[str, Any] = dict.fromkeys(_TEXT_OPTIONS, "") | {name.replace("-", "_"): 0 for name in _NUMBER_OPTIONS}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in _TEXT_OPTIONS + _NUMBER_OPTIONS:
            raise ValueError(flag)
        found[name.replace("-", "_")] = value if name in _TEXT_OPTIONS else int(value)
    found["data_bytes"] = found["data_bytes"] or found.pop("size")
    return found


def _pool(grants: Policy, command: str, options: dict[str, Any]) -> int:
    kind, state_dir = grants.settings["store"], grants.settings["state_dir"]
    os.makedirs(state_dir, 0o700, exist_ok=True)
    pool: Pool = _open_pool(kind, grants.settings[kind], state_dir)
    if command == "create":
        pool.create(options)
    elif command == "attach":
        pool.attach()
    elif command == "detach":
        pool.detach()
    elif command == "grow":
        pool.grow(options)
    elif command == "check":
        findings = pool.check()
        sys.stdout.write("".join(f"{line}\n" for line in findings))
        return 1 if findings else 0
    elif command != "status":
        raise ValueError(command)
    status = open_store(grants).status()
    if command in ("create", "attach"):
        _adopt(Ledger(state_dir), status.identity, status.transaction)
    sys.stdout.write("".join(f"{name}: {value}\n" for name, value in status._asdict().items()))
    return 0 if status.state == READY or command in ("status", "detach") else EXIT_CODES["pool"]


def _adopt(ledger: Ledger, identity: str, transaction: int) -> None:
    """Let a fresh ledger remember its pool; a ledger never changes its pool."""
    known, _ = ledger.pool()
    if identity and not known:
        ledger.adopt_pool(identity, transaction)
    elif identity != known:
        raise StoreError("pool", f"this ledger belongs to pool {known}, not to {identity}")


def _open_pool(kind: str, settings: dict[str, Any], state_dir: str) -> Pool:
    if kind == "thin":
        from privhelper.stores import thin

        pool: Pool = thin.open_pool(settings, state_dir)
        return pool
    from privhelper.stores import reflink

    return reflink.open_pool(settings, state_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
