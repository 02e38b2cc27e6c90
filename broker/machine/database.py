"""One SQLite file, shared by the library and its program, and by several processes.

Rule 1: rollback journal and synchronous=EXTRA. Write-ahead logging is not used: up to SQLite 3.51.2 a reset of the log
    in one process can lose committed pages of another (https://sqlite.org/wal.html, "the WAL-reset bug"), and Debian 12
    ships 3.40.1. EXTRA also syncs the folder after the journal is deleted; with FULL a power cut may bring the journal
    back and undo the last commit (https://sqlite.org/pragma.html#pragma_synchronous). A commit takes 0.9 ms this way
    and 0.2 ms with a log (median of 150; SQLite 3.40.1, Linux 6.18, ext4 on a virtual disk): not worth a lost page.
Rule 2: these settings belong to a connection, so every connection sets them and reads them back.
Rule 3: a call into SQLite is synchronous and short. A lock of another process is waited for in trio, not in SQLite.
Rule 4: one connection writes, one transaction at a time; another only reads, so that no task sees half a transaction.
Rule 5: nothing is repaired here. What is damaged or foreign is refused by name.
"""

import hashlib
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final, Self, TypeVar
from urllib.parse import quote

import trio

from broker.machine.schema import SCHEMA
from broker.machine.signals import BusyStateError, DamagedStateError, ForeignStateError, StateError

T = TypeVar("T")

APPLICATION_ID: Final = 0x666D7472  # "fmtr"; a program may choose its own
# Each migration's digest, and the digest of all tables after it: so that a damaged or altered schema is noticed.
_MIGRATION: Final = (
    "CREATE TABLE migration (number INTEGER PRIMARY KEY, script TEXT NOT NULL, result TEXT NOT NULL) STRICT"
)
_BUSY_TIMEOUT_MS: Final = 5  # in SQLite, blocking the event loop; the rest of the wait is trio's
PATIENCE_S: Final = 120.0  # with another process; a disk at its limit takes tens of seconds for a sync
_FIRST_PAUSE_S: Final = 0.001
_LONGEST_PAUSE_S: Final = 0.05
_BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
_BROKEN: Final = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOLFS,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOMEM,
    }
)


def _code(error: sqlite3.Error) -> int:
    # Errors of the module itself (a closed connection) have no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


@contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn what SQLite says about the file into a StateError; leave the errors of wrong statements as they are."""
    try:
        yield
    except sqlite3.Error as error:
        code = _code(error)
        if code in _DAMAGED:
            raise DamagedStateError(f"{path} is damaged: {error}") from error
        if code in _BUSY:
            raise BusyStateError(f"{path} is locked by another process: {error}") from error
        if code in _BROKEN:
            raise StateError(f"{path} cannot be used: {error}") from error
        raise


def connect(path: str, *, query_only: bool, busy_timeout_ms: int = _BUSY_TIMEOUT_MS) -> sqlite3.Connection:
    """Open an existing file with the settings of Rule 1 and check that they hold.

    A reading connection is not opened read-only: it must be able to roll back the journal that a crash left.

    Raises: FileNotFoundError, StateError and its kinds.
    """
    os.stat(path)
    with translated(path):
        db = sqlite3.connect(_uri(path), uri=True, isolation_level=None, timeout=busy_timeout_ms / 1000)
        try:
            _configure(db, path, query_only=query_only)
        except BaseException:
            db.close()
            raise
    return db


def _uri(path: str) -> str:
    # https://sqlite.org/uri.html; mode=rw never makes a file
    return f"file:{quote(os.fsencode(os.path.abspath(path)))}?mode=rw"


def _to_text(stored: bytes) -> str:
    # A damaged byte in one row must not stop the reading of all: the row's digest will tell.
    return stored.decode("utf-8", "surrogateescape")


def _configure(db: sqlite3.Connection, path: str, *, query_only: bool) -> None:
    db.text_factory = _to_text
    settings = {
        "synchronous": 3,  # EXTRA
        "foreign_keys": 1,
        "trusted_schema": 0,
        "cell_size_check": 1,
        "temp_store": 2,  # memory: no temporary files to clean up after a crash
    }
    mode = db.execute("PRAGMA journal_mode=DELETE").fetchone()[0]
    if mode != "delete":
        raise StateError(f"{path}: expected a rollback journal, SQLite says {mode}")
    if query_only:
        settings["query_only"] = 1
    for name, value in settings.items():
        db.execute(f"PRAGMA {name}={value}")
        found = db.execute(f"PRAGMA {name}").fetchone()[0]
        if found != value:
            raise StateError(f"{path}: PRAGMA {name} should be {value}, SQLite says {found}")


def create(path: str) -> None:
    """Make an empty state file that only its owner may read; leave one that exists alone.

    The file is only opened when it is new: closing a descriptor of a file in use would drop the process's locks on it
    (fcntl(2), "Record locks").
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    except FileExistsError:
        return
    except OSError as error:
        raise StateError(f"{path} cannot be made: {error.strerror}") from error


def quick_check(db: sqlite3.Connection, path: str) -> None:
    """Have SQLite check the structure of the file. Raises: DamagedStateError."""
    with translated(path):
        found = [str(row[0]) for row in db.execute("PRAGMA quick_check(10)").fetchall()]
    if found != ["ok"]:
        raise DamagedStateError(f"{path} is damaged: {'; '.join(found)}")


async def patiently(call: Callable[[], T], patience_s: float) -> T:
    """Make a call again and again while another process keeps the file locked. Raises: BusyStateError in the end."""
    pause_s = _FIRST_PAUSE_S
    give_up = trio.current_time() + patience_s
    while True:
        try:
            return call()
        except BusyStateError:
            if trio.current_time() >= give_up:
                raise
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class Database:
    """The two connections of a process and its transactions."""

    def __init__(
        self,
        path: str,
        reader: sqlite3.Connection,
        writer: sqlite3.Connection,
        point: Callable[[str], None],
        patience_s: float,
    ) -> None:
        self.path = path
        self.reader = reader
        self._writer = writer
        self._turn = trio.Lock()
        self._point = point
        self._patience_s = patience_s
        self.moved = trio.Event()  # until the next change; take it before looking, so that nothing is missed

    @classmethod
    async def open(
        cls,
        path: str,
        migrations: Sequence[str],
        application_id: int,
        *,
        point: Callable[[str], None],
        patience_s: float = PATIENCE_S,
    ) -> Self:
        """Open a state file, making it if there is none, and bring it to this version's schema.

        `point` is told of each commit, see `Hooks`; `patience_s` bounds each wait for another process's lock.

        Raises: ForeignStateError, DamagedStateError, BusyStateError, StateError.
        """
        create(path)
        reader = await patiently(lambda: connect(path, query_only=True), patience_s)
        writer = reader
        try:
            writer = await patiently(lambda: connect(path, query_only=False), patience_s)
            database = cls(path, reader, writer, point, patience_s)
            await database.read(lambda db: quick_check(db, path))
            await database.migrate(migrations, application_id)
        except BaseException:
            writer.close()
            reader.close()
            raise
        return database

    def close(self) -> None:
        """Close both connections."""
        self._writer.close()
        self.reader.close()

    async def read(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Run a reading function, again and again while another process holds the lock."""
        return await self._patiently(lambda: query(self.reader))

    @asynccontextmanager
    async def transaction(self, name: str) -> AsyncIterator[sqlite3.Connection]:
        """Begin IMMEDIATE, give the writing connection, commit; or roll back if the block raises.

        The block must not await: everybody else's transaction waits for it. `name` names its two crash points.
        """
        async with self._turn:
            await self._patiently(lambda: self._writer.execute("BEGIN IMMEDIATE"))
            try:
                with translated(self.path):
                    yield self._writer
                self._point(f"{name}:before")
                # A reader elsewhere can make COMMIT busy; the transaction then stays open and COMMIT may be repeated
                # (https://sqlite.org/lang_transaction.html).
                await self._patiently(lambda: self._writer.execute("COMMIT"))
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        self.tell_moved()
        self._point(f"{name}:after")

    def tell_moved(self) -> None:
        """Wake those who wait for any change of the file."""
        self.moved.set()
        self.moved = trio.Event()

    async def transact(self, name: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` in one transaction that no cancellation can cut; the wait for locks is bounded."""
        with trio.CancelScope(shield=True):
            async with self.transaction(name) as db:
                value = work(db)
        return value

    async def _patiently(self, call: Callable[[], T]) -> T:
        return await patiently(lambda: self._translated(call), self._patience_s)

    def _translated(self, call: Callable[[], T]) -> T:
        with translated(self.path):
            value = call()
        return value

    # -- schema

    async def migrate(self, migrations: Sequence[str], application_id: int) -> None:
        """Bring the file to version ``1 + len(migrations)``; write nothing when it is there already.

        Version 1 is the library's SCHEMA. Each migration is one transaction and is remembered by its digest, so that a
        file that grew by other statements is refused and not guessed at.

        Raises: ForeignStateError, DamagedStateError, StateError.
        """
        scripts = [SCHEMA, *migrations]
        version = await self.read(lambda db: check_schema(db, self.path, scripts, application_id))
        while version < len(scripts):
            version = await self._migrate_one(scripts, version, application_id)

    async def _migrate_one(self, scripts: Sequence[str], version: int, application_id: int) -> int:
        async with self.transaction("migrate") as db:
            found = check_schema(db, self.path, scripts, application_id)  # another process may have been faster
            if found != version:
                return found
            if version == 0:
                db.execute(f"PRAGMA application_id={application_id}")
                db.execute(_MIGRATION)
            for statement in _statements(scripts[version]):
                db.execute(statement)
            result = (version + 1, _digest(scripts[version]), _schema_digest(db))
            db.execute("INSERT INTO migration VALUES (?, ?, ?)", result)
            db.execute(f"PRAGMA user_version={version + 1}")
        return version + 1


def check_schema(db: sqlite3.Connection, path: str, scripts: Sequence[str], application_id: int) -> int:
    """Give the version of a file that these scripts made, 0 for an empty one.

    All is read from one state of the file: another process may be making its tables just now.

    Raises: ForeignStateError, DamagedStateError.
    """
    if db.in_transaction:
        return _check_schema(db, path, scripts, application_id)
    db.execute("BEGIN")
    try:
        return _check_schema(db, path, scripts, application_id)
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _check_schema(db: sqlite3.Connection, path: str, scripts: Sequence[str], application_id: int) -> int:
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    owner = int(db.execute("PRAGMA application_id").fetchone()[0])
    tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if version == 0 and owner == 0 and tables == 0:
        return 0
    if owner != application_id:
        raise ForeignStateError(
            f"{path} belongs to another program: application id {owner:#x}, not {application_id:#x}"
        )
    if version > len(scripts):
        raise ForeignStateError(f"{path} was written by a newer version: schema {version}, known up to {len(scripts)}")
    known = [(number, _digest(script)) for number, script in enumerate(scripts[:version], start=1)]
    found = db.execute("SELECT number, script, result FROM migration ORDER BY number").fetchall() if version else []
    if not found or [row[:2] for row in found] != known:
        raise ForeignStateError(f"{path} has a schema {version} that this version did not make")
    if found[-1][2] != _schema_digest(db):
        raise DamagedStateError(f"{path} has other tables than it was made with")
    return version


def _schema_digest(db: sqlite3.Connection) -> str:
    # Not of sqlite's own tables, such as the statistics that ANALYZE keeps.
    rows = db.execute(
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~' ORDER BY name"
    )
    return _digest(repr(rows.fetchall()))


def _digest(script: str) -> str:
    return hashlib.sha256(script.encode()).hexdigest()


def _statements(script: str) -> Iterator[str]:
    # Not executescript(): it commits first (https://docs.python.org/3.11/library/sqlite3.html).
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        raise ValueError(f"a migration ends in the middle of a statement: {statement.strip()[:80]}")
