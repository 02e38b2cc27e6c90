"""What root does by hand: make, attach, grow and check the pool, and reconcile at a terminal. No request gets here.

Rule: ``serve`` never loads this module, nor the pool modules and programs (mkfs, xfs_repair, thin_check) behind it.
"""

import os
import sys
from collections.abc import Mapping
from typing import Any, Final, Protocol

from privhelper.devices import Devices, open_store
from privhelper.ledger import Ledger
from privhelper.policy import Policy
from privhelper.protocol import EXIT_CODES
from privhelper.stores.base import READY, StoreError

_USAGE: Final = """usage: imgpull-helper [--config FILE] COMMAND
  serve                       answer one connection on descriptor 3 (LISTEN_FDS=1)
  reconcile                   make ledger and store agree
  audit                       try, inside the sandboxes of populate and verify, what must be denied
  pool create [--size N] [--metadata PATH] [--data PATH] [--metadata-bytes N] [--data-bytes N] [--block-bytes N]
  pool attach | detach | status | check
  pool grow [--metadata-bytes N] [--data-bytes N]
N is a number of bytes: 1048576, 512M, 20G
"""
_EX_USAGE: Final = 2
_UNITS: Final = "KMGT"
_TEXT_OPTIONS: Final = ("metadata", "data")
_NUMBER_OPTIONS: Final = ("size", "metadata-bytes", "data-bytes", "block-bytes")


class Pool(Protocol):
    """What root alone does to the pool by command: ``imgpull-helper pool create|attach|detach|grow|check``."""

    def create(self, options: Mapping[str, Any]) -> None:
        """Make and attach a new pool with one formatted base device in it; an existing pool is an error."""

    def attach(self) -> None:
        """Bring an existing pool into service after a boot; attached already is fine."""

    def detach(self) -> None:
        """Take the pool out of service; raises StoreError("busy") when a device of it is active."""

    def grow(self, options: Mapping[str, Any]) -> None:
        """Make the pool larger, in service."""

    def check(self) -> list[str]:
        """Return what is wrong with the pool, one line a finding; empty is well."""


def run(grants: Policy, words: list[str]) -> int:
    """Run one of root's commands; return its exit code.

    Raises:
        AnswerError, OSError: it failed.
    """
    try:
        if words == ["reconcile"]:
            sys.stdout.writelines(f"{action}\n" for action in Devices(grants).reconcile(thorough=True))
            return 0
        if words == ["audit"]:
            return _audit(grants)
        if words[:1] == ["pool"] and len(words) > 1:
            return _pool(grants, words[1], _options(words[2:]))
    except ValueError:
        pass
    sys.stderr.write(_USAGE)
    return _EX_USAGE


def _audit(grants: Policy) -> int:
    from privhelper import audit

    failed = 0
    for row in audit.audit(grants, Devices(grants)):
        is_right = row.got.split(" ")[0] == row.expected
        failed += not is_right
        mark = "ok" if is_right else "WRONG"
        sys.stdout.write(f"{mark:<6}{row.place:<10}{row.attempt:<23}{row.expected:<9}{row.got}\n")
    return 1 if failed else 0


def _options(words: list[str]) -> dict[str, Any]:
    """Read ``--name value`` pairs. Raises ValueError for anything else."""
    found: dict[str, Any] = dict.fromkeys(_TEXT_OPTIONS, "") | {name.replace("-", "_"): 0 for name in _NUMBER_OPTIONS}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name = flag.removeprefix("--")
        if not flag.startswith("--") or name not in _TEXT_OPTIONS + _NUMBER_OPTIONS:
            raise ValueError(flag)
        found[name.replace("-", "_")] = value if name in _TEXT_OPTIONS else _number(value)
    found["data_bytes"] = found["data_bytes"] or found.pop("size")
    return found


def _number(text: str) -> int:
    """Read a number of bytes: `1048576`, `512M`, `20G`; the units are powers of 1024. Raises ValueError."""
    unit = _UNITS.find(text[-1:].upper()) + 1
    return int(text[: len(text) - bool(unit)]) << 10 * unit


def _pool(grants: Policy, command: str, options: dict[str, Any]) -> int:
    state_dir = grants.settings["state_dir"]
    os.makedirs(state_dir, 0o700, exist_ok=True)
    pool = _open_pool(grants)
    if command == "create":
        pool.create(options)
    elif command == "attach":
        pool.attach()
    elif command == "detach":
        with Ledger(state_dir).pool_lock():  # while devices vanish nobody may look for lost ones
            pool.detach()
    elif command == "grow":
        pool.grow(options)
    elif command == "check":
        findings = pool.check()
        sys.stdout.writelines(f"{line}\n" for line in findings)
        return 1 if findings else 0
    elif command != "status":
        raise ValueError(command)
    status = open_store(grants).status()
    if command in ("create", "attach"):
        _adopt(Ledger(state_dir), status.identity, status.transaction)
    sys.stdout.writelines(f"{name}: {value}\n" for name, value in status._asdict().items())
    return 0 if status.state == READY or command in ("status", "detach") else EXIT_CODES["pool"]


def _adopt(ledger: Ledger, identity: str, transaction: int) -> None:
    """Let a fresh ledger remember its pool; a ledger never changes its pool."""
    known, _ = ledger.pool()
    if identity and not known:
        ledger.one("INSERT INTO pool VALUES(1, ?, ?)", identity, transaction)
    elif identity != known:
        raise StoreError("pool", f"this ledger belongs to pool {known}, not to {identity}")


def _open_pool(grants: Policy) -> Pool:
    kind, state_dir = grants.settings["store"], grants.settings["state_dir"]
    if kind == "thin":
        from privhelper.stores import thin_pool

        pool: Pool = thin_pool.ThinPool(grants.settings["thin"], state_dir)
        return pool
    from privhelper.stores import reflink_pool

    return reflink_pool.ReflinkPool(grants.settings["reflink"], state_dir)
