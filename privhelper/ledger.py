"""What root intends and what root did: the helper's own memory.

Rule 1: intent is on disk before the kernel is asked, the fact after it answered; between the two lies a crash.
Rule 2: whether a device is live is never written here; it is asked of the kernel.
Rule 3: a lock is an open-file-description lock (fcntl(2)): it dies with its process, no row and no pid stands for one.
Rule 4: a device number is used once, for ever (AUTOINCREMENT); whoever holds the lock of a number owns what it does.

A device goes creating -> created -> populated -> sealed (a layer) or creating -> granted (an activation), and removing
-> no row. Only ``sealed`` and ``granted`` survive their process: whatever else is found with its lock free
was left by a crash. The journal is a rollback journal with synchronous=EXTRA: SQLite before 3.51.3 can corrupt a
database in WAL mode (the WAL-reset bug), and a commit costs a handful of syncs either way. It is kept and its header
overwritten (PERSIST), which is as durable as to make and to delete it each time, without two changes of the folder that
a file system has to write out (https://www.sqlite.org/pragma.html#pragma_journal_mode).
"""

import fcntl
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from privhelper.errors import AnswerError

SETTLED: Final = ("sealed", "granted")
_POOL_LOCK: Final = 0  # the byte that serialises changes of the pool; devices are 1 and up
_SCHEMA: Final = """
CREATE TABLE device(
  dev INTEGER PRIMARY KEY AUTOINCREMENT,
  kind TEXT NOT NULL CHECK(kind IN ('layer', 'activation', 'scratch')),
  state TEXT NOT NULL CHECK(state IN ('creating', 'created', 'populated', 'sealed', 'granted', 'removing')),
  layer TEXT NOT NULL,
  uid INTEGER NOT NULL,
  parent TEXT,
  depth INTEGER NOT NULL DEFAULT 0,
  entries INTEGER NOT NULL DEFAULT 0,
  bytes INTEGER NOT NULL DEFAULT 0,
  reserved INTEGER NOT NULL DEFAULT 0,
  charge INTEGER NOT NULL DEFAULT 0,
  name TEXT,
  mode TEXT,
  size INTEGER NOT NULL DEFAULT 0,
  asked_size INTEGER NOT NULL DEFAULT 0,
  created INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX one_layer ON device(layer) WHERE kind = 'layer' AND state <> 'removing';
CREATE UNIQUE INDEX one_name ON device(uid, name) WHERE kind = 'activation' AND state <> 'removing';
CREATE INDEX unsettled ON device(state) WHERE state NOT IN ('sealed', 'granted');
CREATE INDEX children ON device(parent);
CREATE TABLE claim(layer TEXT NOT NULL, uid INTEGER NOT NULL, PRIMARY KEY(layer, uid)) STRICT;
CREATE TABLE pool(one INTEGER PRIMARY KEY CHECK(one = 1), identity TEXT NOT NULL, trans INTEGER NOT NULL) STRICT;
PRAGMA user_version = 1;
"""
Row = sqlite3.Row


class Ledger:
    """The database and the locks, both in the helper's own directory."""

    def __init__(self, state_dir: str) -> None:
        self._database = sqlite3.connect(os.path.join(state_dir, "ledger.db"), timeout=30, isolation_level=None)
        self._database.row_factory = Row
        for pragma in ("journal_mode = PERSIST", "synchronous = EXTRA", "foreign_keys = ON", "trusted_schema = OFF"):
            self._database.execute(f"PRAGMA {pragma}")
        if not self.one("PRAGMA user_version")[0]:
            self._lay_out()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._locks = os.open(os.path.join(state_dir, "locks"), flags, 0o600)

    def _lay_out(self) -> None:
        with self.transaction():
            if not self.one("PRAGMA user_version")[0]:
                for statement in _SCHEMA.split(";\n"):
                    self._database.execute(statement)

    # ------------------------------------------------------------ reading

    def one(self, query: str, *values: Any) -> Any:
        """Return the first row of a query, or None."""
        return self._database.execute(query, values).fetchone()

    def all(self, query: str, *values: Any) -> list[Row]:
        """Return all rows of a query."""
        return self._database.execute(query, values).fetchall()

    def layer(self, layer: str) -> Any:
        """Return the row of a layer that is sealed or on its way there, or None."""
        return self.one("SELECT * FROM device WHERE kind = 'layer' AND layer = ? AND state <> 'removing'", layer)

    def activation(self, uid: int, name: str) -> Any:
        """Return the row of a user's activation, or None. There is no way to ask without a uid."""
        query = "SELECT * FROM device WHERE kind = 'activation' AND uid = ? AND name = ? AND state <> 'removing'"
        return self.one(query, uid, name)

    def layers(self) -> list[Row]:
        """Return every layer that is sealed or on its way there."""
        return self.all("SELECT * FROM device WHERE kind = 'layer' AND state <> 'removing' ORDER BY dev")

    def activations(self, uid: int) -> list[Row]:
        """Return a user's activations, and no one else's."""
        query = "SELECT * FROM device WHERE kind = 'activation' AND uid = ? AND state = 'granted' ORDER BY dev"
        return self.all(query, uid)

    def claims(self, layer: str) -> set[int]:
        """Return the users who have shown the whole of a layer."""
        return {row["uid"] for row in self.all("SELECT uid FROM claim WHERE layer = ?", layer)}

    def users(self, layer: str) -> int:
        """Return how many layers, activations and copies stand on a layer."""
        query = """SELECT count(*) FROM device WHERE state <> 'removing' AND
          (kind = 'layer' AND parent = ?1 OR kind <> 'layer' AND layer = ?1)"""
        return int(self.one(query, layer)[0])

    def device(self, dev: int) -> Any:
        """Return the row of a device, or None."""
        return self.one("SELECT * FROM device WHERE dev = ?", dev)

    def unsettled(self) -> list[int]:
        """Return the devices that some process works on or that a crash left."""
        query = "SELECT dev FROM device WHERE state NOT IN ('sealed', 'granted') ORDER BY dev DESC"
        return [row["dev"] for row in self.all(query)]

    def pool(self) -> tuple[str, int]:
        """Return the pool's identity and transaction id as they should be; empty before the first pool."""
        row = self.one("SELECT identity, trans FROM pool")
        return (row["identity"], row["trans"]) if row else ("", 0)

    # ------------------------------------------------------------ writing

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Hold the database for one atomic change."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # not after an error that made SQLite roll back by itself
                self._database.execute("ROLLBACK")
            raise

    def intend(self, kind: str, layer: str, uid: int, **columns: Any) -> int:
        """Write down a device that is about to be created, lock its number, return the number.

        Inside a transaction of the caller's: nobody sees the number before it is locked.
        """
        columns |= {"kind": kind, "layer": layer, "uid": uid, "state": "creating", "created": int(time.time())}
        names = ", ".join(columns)
        marks = ", ".join("?" * len(columns))
        row = self.one(f"INSERT INTO device({names}) VALUES({marks}) RETURNING dev", *columns.values())
        if not self.try_lock(row["dev"]):
            raise AnswerError("busy", "another process takes apart what it could not write down")
        return int(row["dev"])

    def record(self, dev: int, state: str, trans: int | None = None) -> None:
        """Write down that a device reached a state, and with it the pool's transaction id when that moved."""
        with self.transaction():
            self.one("UPDATE device SET state = ? WHERE dev = ?", state, dev)
            if trans is not None:
                self.one("UPDATE pool SET trans = ?", trans)

    def doom(self, dev: int) -> None:
        """Write down that a device is about to be deleted. One that only the store knew gets a row first."""
        query = """INSERT INTO device(dev, kind, state, layer, uid, created) VALUES(?, 'scratch', 'removing', '', 0, 0)
          ON CONFLICT(dev) DO UPDATE SET state = 'removing'"""
        self.one(query, dev)

    def forget(self, dev: int, trans: int) -> None:
        """Write down that a device is gone, and the claims with it if it was a layer that stands nowhere else."""
        with self.transaction():
            self.one("DELETE FROM device WHERE dev = ?", dev)
            self.one("DELETE FROM claim WHERE layer NOT IN (SELECT layer FROM device WHERE kind = 'layer')")
            self.one("UPDATE pool SET trans = ?", trans)

    def claim(self, layer: str, uid: int) -> bool:
        """Write down that a user has shown the whole of a layer; return whether it is there, and sealed."""
        with self.transaction():
            row = self.layer(layer)
            if row is None or row["state"] != "sealed":
                return False
            self.one("INSERT OR IGNORE INTO claim VALUES(?, ?)", layer, uid)
            return True

    def seal(self, dev: int, layer: str, uid: int) -> None:
        """Write down that a layer is whole and on disk, and whose it is: no layer is without a claim."""
        with self.transaction():
            self.one("UPDATE device SET state = 'sealed', reserved = 0 WHERE dev = ?", dev)
            self.one("INSERT OR IGNORE INTO claim VALUES(?, ?)", layer, uid)

    def retire(self, dev: int) -> None:
        """Mark a layer to go, and drop every claim on it. In a transaction of the caller's."""
        self.one("DELETE FROM claim WHERE layer = (SELECT layer FROM device WHERE dev = ?)", dev)
        self.one("UPDATE device SET state = 'removing' WHERE dev = ?", dev)

    def hand_over(self, dev: int, uid: int, heir: int) -> None:
        """Drop a user's claim on a layer; if its quota carried the layer, the heir's does now. In a transaction too."""
        self.one("DELETE FROM claim WHERE uid = ? AND layer = (SELECT layer FROM device WHERE dev = ?)", uid, dev)
        self.one("UPDATE device SET uid = ? WHERE dev = ? AND uid = ?", heir, dev, uid)

    # ------------------------------------------------------------ locks

    def try_lock(self, byte: int) -> bool:
        """Take a lock if it is free. Taking one's own again is fine."""
        try:
            fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, byte))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self, byte: int) -> None:
        """Give a lock back."""
        fcntl.fcntl(self._locks, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))

    def wait_lock(self, byte: int, still_wanted: Callable[[float], None]) -> None:
        """Take a lock, calling ``still_wanted`` with growing pauses in seconds; it waits that long, or raises."""
        pause_s = 0.002
        while not self.try_lock(byte):
            still_wanted(pause_s)
            pause_s = min(pause_s * 2, 0.1)

    @contextmanager
    def pool_lock(self) -> Iterator[None]:
        """Be the only one that changes the pool. Short: nothing is copied under it."""
        fcntl.fcntl(self._locks, fcntl.F_OFD_SETLKW, _flock(fcntl.F_WRLCK, _POOL_LOCK))
        try:
            yield
        finally:
            self.unlock(_POOL_LOCK)


def _flock(kind: int, byte: int) -> bytes:
    # struct flock of fcntl(2): type, whence, start, length, pid (0 for the OFD kinds)
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)
