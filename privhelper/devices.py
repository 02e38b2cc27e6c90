"""How a device comes and goes, and what a crash leaves of it.

Rule 1: intent, kernel, fact: each change of the pool lies between two entries of the ledger, under the pool's lock.
Rule 2: whatever fails on the way to ``sealed`` or ``granted`` is taken apart at once, or by the next start.
Rule 3: nothing half-written is resumed, and what a living process works on is left alone: its lock tells.
Rule 4: a pool that is not there, not ready or not ours is not touched; an absent pool looks like an empty one.
"""

import contextlib
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from privhelper import files
from privhelper.errors import AnswerError, told
from privhelper.ledger import SETTLED, Ledger
from privhelper.policy import Policy
from privhelper.stores.base import READY, PoolStatus, Store

USABLE: Final = (READY, "out_of_data")  # states in which devices can still be deleted


def open_store(policy: Policy) -> Store:
    """Return the store that the policy names, importing no other."""
    state_dir = policy.settings["state_dir"]
    if policy.settings["store"] == "thin":
        from privhelper.stores.thin import ThinStore

        store: Store = ThinStore(policy.settings["thin"], state_dir)
        return store
    from privhelper.stores.reflink import ReflinkStore

    return ReflinkStore(policy.settings["reflink"], state_dir)


def log(level: int, text: str) -> None:
    """Write one line for the journal, with the level of syslog(3), or for a terminal, without."""
    print(text if sys.stderr.isatty() else f"<{level}>{text}", file=sys.stderr, flush=True)


class Devices:
    """Every device of the pool, as ledger and store know it together."""

    def __init__(self, policy: Policy) -> None:
        state_dir = policy.settings["state_dir"]
        self.manifests = os.path.join(state_dir, "manifests")
        os.makedirs(self.manifests, 0o700, exist_ok=True)
        self.ledger, self.store = Ledger(state_dir), open_store(policy)

    def create(
        self, kind: str, layer: str, uid: int, origin: int, admit: Callable[[PoolStatus], None],
        finish: Callable[[int], None] | None = None, **columns: Any,
    ) -> int:  # fmt: skip
        """Make a copy of ``origin`` and keep its lock.

        ``admit`` runs in the transaction that writes the intent, and raises AnswerError to refuse. A copy that needs
        nothing but a short ``finish`` is granted at once: it has one step less in the ledger, which costs syncs.
        """
        dev = None
        try:
            with self.ledger.pool_lock():
                status = self._unmoved(READY)
                with self.ledger.transaction():
                    admit(status)
                    dev = self.ledger.intend(kind, layer, uid, **columns)
                self.store.create(dev, origin)
                if finish:
                    finish(dev)
                self.ledger.record(dev, "granted" if finish else "created", self.store.advance(status.transaction))
        except BaseException:
            if dev is not None:
                self._abandon(dev)
            raise
        return dev

    def destroy(self, dev: int) -> None:
        """Delete a device whose lock is ours: intent, device, manifest, row."""
        self.store.deactivate(dev)  # may have to wait for the kernel: not under the pool's lock
        with self.ledger.pool_lock():
            trans = self._unmoved(*USABLE).transaction
            self.ledger.doom(dev)
            self.store.delete(dev)
            with contextlib.suppress(FileNotFoundError):  # only layers that came far have one
                files.delete(self.manifest_path(dev))
            self.ledger.forget(dev, self.store.advance(trans))

    @contextmanager
    def making(self, dev: int) -> Iterator[None]:
        """Do the rest of making a device whose lock is ours; when it fails, take the device apart."""
        try:
            yield
        except BaseException:
            self._abandon(dev)
            raise
        self.ledger.unlock(dev)

    @contextmanager
    def locked(self, dev: int) -> Iterator[None]:
        """Hold the lock of a device, or refuse: somebody else is at it."""
        if not self.ledger.try_lock(dev):
            raise AnswerError("busy", "another process is at it")
        try:
            yield
        finally:
            self.ledger.unlock(dev)

    def await_other(self, dev: int, still_wanted: Callable[[float], None]) -> None:
        """Wait until the process that works on a device is done or dead; take apart what a dead one left."""
        self.ledger.wait_lock(dev, still_wanted)
        try:
            self._undo(dev)
        finally:
            self.ledger.unlock(dev)

    def ready(self, *states: str) -> PoolStatus:
        """Return how the pool is, if it is ours and in one of these states; READY when none is named."""
        status = self.store.status()
        if status.state not in (states or (READY,)):
            code = "no_room" if status.state == "out_of_data" else "pool"
            raise AnswerError(code, f"the pool is {status.state.replace('_', ' ')}; {status.advice}".rstrip("; "))
        identity, _ = self.ledger.pool()
        if status.identity != identity:
            raise AnswerError("pool", f"this is pool {status.identity}, the ledger belongs to {identity or 'none'}")
        return status

    def manifest_path(self, dev: int) -> str:
        """Return where the manifest of a sealed layer is kept."""
        return os.path.join(self.manifests, str(dev))

    # ------------------------------------------------------------ after a crash

    def reconcile(self, *, thorough: bool) -> list[str]:
        """Undo whatever no living process is at; ``thorough`` also looks for what only one of the two sides knows."""
        if self.store.status().state not in USABLE:
            return []
        with self.ledger.pool_lock():
            status, (_, expected) = self.ready(*USABLE), self.ledger.pool()
            if status.transaction == expected + 1 and self.ledger.unsettled():
                # The pool moved on and the crash came before the ledger did; what was going on is undone below.
                self.ledger.one("UPDATE pool SET trans = ?", expected + 1)
        actions = [said for dev in self.ledger.unsettled() for said in self._attempt(dev, self._undo)]
        if thorough:
            actions += self._audit()
        for action in actions:
            log(5, f"reconcile: {action}")
        return actions

    def _audit(self) -> list[str]:
        with self.ledger.pool_lock():  # nothing comes or goes between these looks; a manifest's row is the older
            self.ready(*USABLE)  # an absent pool would look like an empty one
            manifests = {int(name) for name in os.listdir(self.manifests)}
            devices, active = self.store.devices(), self.store.active()
            rows = {row["dev"]: row for row in self.ledger.all("SELECT * FROM device")}
        sealed = {dev for dev, row in rows.items() if row["state"] == "sealed"}
        lost = {dev for dev, row in rows.items() if row["state"] in SETTLED} - devices
        actions = []
        for dev in sorted(active.keys() - (rows.keys() - sealed)):
            actions += self._attempt(dev, self._put_away)
        for dev in sorted((devices | manifests) - rows.keys() | lost):
            actions += self._attempt(dev, self._clear)
        return actions

    def _attempt(self, dev: int, step: Callable[[int], str]) -> list[str]:
        """Do a step if nobody is at the device; one that fails keeps the others from nothing."""
        if not self.ledger.try_lock(dev):
            return []
        try:
            said = step(dev)
        except (AnswerError, OSError) as error:
            log(4, f"device {dev}: {error}")
            said = f"left device {dev} as it is: {told(error)}"
        finally:
            self.ledger.unlock(dev)
        return [said] if said else []

    def _undo(self, dev: int) -> str:
        row = self.ledger.device(dev)
        if row is None or row["state"] in SETTLED:
            return ""
        self.destroy(dev)
        return f"freed device {dev}, {row['kind']} of {row['layer']}, which a crash left {row['state']}"

    def _put_away(self, dev: int) -> str:
        self.store.deactivate(dev)
        return f"deactivated device {dev}, which nobody was given"

    def _clear(self, dev: int) -> str:
        row = self.ledger.device(dev)
        self.destroy(dev)
        if row is None:
            return f"deleted device {dev} or its manifest, which the ledger does not know"
        return f"forgot device {dev}, {row['kind']} of {row['layer']}: the store has lost it"

    def _abandon(self, dev: int) -> None:
        try:
            self.destroy(dev)
        except (AnswerError, OSError, sqlite3.Error) as error:
            log(4, f"device {dev} is left for the next start: {error}")
        self.ledger.unlock(dev)

    def _unmoved(self, *states: str) -> PoolStatus:
        """Return how the pool is after making sure that nobody else moved its transaction id. Under the pool's lock."""
        status, (_, expected) = self.ready(*states), self.ledger.pool()
        if status.transaction != expected:
            told = f"the pool is at transaction {status.transaction}, the ledger at {expected}: a foreign writer"
            raise AnswerError("pool", told)
        return status
