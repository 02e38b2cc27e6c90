"""The state file: settings, migrations, plans, damage, full disks, reading without writing, forgetting."""

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from broker.machine import (
    BusyStateError,
    DamagedStateError,
    ForeignStateError,
    Hooks,
    Machine,
    StateError,
    StoppedError,
    UnknownRunError,
    open_engine,
    open_lookup,
    problems,
)
from broker.machine.database import APPLICATION_ID, check_schema, connect, create
from broker.machine.records import QUERIES
from broker.machine.schema import SCHEMA
from tests.broker.machine_toys import (
    EPOCH_S,
    TABLES,
    Ask,
    Gave,
    Toy,
    Wall,
    effect,
    engine_of,
    gated,
    nothing,
    number,
    one_step,
    run_one,
    three_steps,
)

MACHINE = Machine("toy", Ask).start("one", number, result=Gave).to("two", effect).end("end")


@pytest.fixture
def path(scratch: Path) -> Path:
    return scratch / "state.db"


def content(path: Path) -> bytes:
    return path.read_bytes()


def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def modes(folder: Path) -> dict[str, int]:
    return {f.name: f.stat().st_mode & 0o777 for f in folder.iterdir()}


def fingerprint(folder: Path) -> list[tuple[str, int, int, bytes]]:
    files = sorted(folder.iterdir())
    return [(f.name, f.stat().st_mtime_ns, f.stat().st_ino, f.read_bytes()) for f in files] + [
        (".", folder.stat().st_mtime_ns, 0, b"")
    ]


# ---------------------------------------------------------------- settings


@pytest.mark.capability("rollback journal, synchronous=EXTRA, foreign keys: checked on each connection")
@pytest.mark.mistake("settings of a connection were made on one and not in force on others")
async def test_each_connection_has_the_settings(path: Path) -> None:
    async with engine_of(path, MACHINE) as engine:
        async with engine.transaction() as writer:
            for db in (writer, engine.db):
                wanted = {"journal_mode": "delete", "synchronous": 3, "foreign_keys": 1, "trusted_schema": 0}
                assert {name: db.execute(f"PRAGMA {name}").fetchone()[0] for name in wanted} == wanted
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            engine.db.execute("DELETE FROM event")


@pytest.mark.mistake("a state folder was made so that only root could enter it")
async def test_the_state_file_is_private_and_usable(path: Path) -> None:
    await run_one(path, MACHINE)
    assert modes(path.parent) == {"state.db": 0o600, "state.db-owners": 0o600}


async def test_a_write_ahead_log_is_turned_back(path: Path) -> None:
    await run_one(path, MACHINE)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal"
    await run_one(path, MACHINE)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


async def test_a_path_with_odd_characters_is_taken_as_it_is(scratch: Path) -> None:
    path = scratch / "a ?mode=memory#%41é.db"
    await run_one(path, MACHINE)
    assert len(content(path)) > 0


# ---------------------------------------------------------------- what the database itself refuses


@pytest.mark.capability("the database refuses what the code must never do")
@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE run SET attempt = 2 WHERE key = 'done'", "never changes"),
        ("UPDATE run SET outcome = NULL WHERE key = 'done'", "never changes"),
        ("UPDATE run SET cursor = 0 WHERE key = 'live'", "moves by one step"),
        ("UPDATE run SET cursor = 3 WHERE key = 'live'", "moves by one step"),
        ("UPDATE run SET request = '{}' WHERE key = 'live'", "what a run is"),
        ("UPDATE run SET outcome = 'done' WHERE key = 'live'", "CHECK"),
        ("UPDATE run SET attempt = 0 WHERE key = 'live'", "CHECK"),
        ("UPDATE run SET attempt = 'x' WHERE key = 'live'", "cannot store TEXT"),
        ("UPDATE event SET payload = '{}'", "append-only"),
        ("DELETE FROM event", "append-only"),
        ("INSERT INTO event (run, type, payload, at_ms) VALUES (99, 'x', '{}', 0)", "FOREIGN KEY"),
        ("INSERT INTO event (run, type, step, payload, at_ms) VALUES (1, 'complete', 'one', '{}', 0)", "UNIQUE"),
        ("INSERT INTO run_child VALUES (1, 1)", "CHECK"),
        ("UPDATE run SET cancel_cause = 'other' WHERE key = 'cancelled'", "cancelled once"),
    ],
)
async def test_the_database_refuses(path: Path, statement: str, message: str) -> None:
    machine = three_steps(nothing, gated, nothing)
    toy = Toy()
    toy.gate("done").set()
    async with engine_of(path, machine, grace_s=0, app=toy) as engine:
        await engine.wait((await engine.start(machine, "done", Ask())).id)
        await engine.start(machine, "live", Ask())
        other = await engine.start(machine, "cancelled", Ask(), not_before=EPOCH_S + 1e6)
        await trio.testing.wait_all_tasks_blocked()
        async with engine.transaction() as db:
            db.execute("UPDATE run SET cancel_cause = 'first' WHERE id = ?", (other.id,))
            with pytest.raises(sqlite3.IntegrityError, match=message):
                db.execute(statement)
                db.execute("COMMIT")
            db.execute("UPDATE run SET cancel_cause = NULL WHERE 0")
            if db.in_transaction:
                db.execute("ROLLBACK")
            db.execute("BEGIN")


# ---------------------------------------------------------------- migrations


async def test_migrations_are_made_once_and_remembered(path: Path) -> None:
    points: list[str] = []
    more = (*TABLES, "CREATE TABLE more (a INTEGER) STRICT;\nINSERT INTO more VALUES (';');\n".replace("';'", "1"))
    async with engine_of(path, MACHINE, migrations=TABLES):
        pass
    before = fingerprint(path.parent)
    async with engine_of(path, MACHINE, migrations=TABLES, hooks=Hooks(point=points.append)):
        assert points == []
    assert fingerprint(path.parent) == before
    async with engine_of(path, MACHINE, migrations=more, hooks=Hooks(point=points.append)) as engine:
        assert points == ["migrate:before", "migrate:after"]
        assert engine.db.execute("SELECT a FROM more").fetchall() == [(1,)]
        assert engine.db.execute("PRAGMA user_version").fetchone() == (3,)


async def test_a_migration_that_fails_leaves_the_file_as_it_was(path: Path) -> None:
    async with engine_of(path, MACHINE, migrations=TABLES):
        pass
    before = content(path)
    with pytest.raises(sqlite3.OperationalError):
        async with engine_of(path, MACHINE, migrations=(*TABLES, "CREATE TABLE a (b);\nCREATE TABLE a (b);")):
            pass
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT name FROM sqlite_schema WHERE name = 'a'").fetchall() == []
    async with engine_of(path, MACHINE, migrations=TABLES) as engine:
        assert problems(engine.lookup) == []
    assert len(before) == len(content(path))


@pytest.mark.capability("a foreign or newer state file is refused by name")
@pytest.mark.mistake("there was no version of the stored format")
@pytest.mark.parametrize(
    "case", ["other program", "newer", "other migration", "tables of nobody", "no tables, a version"]
)
async def test_foreign_files_are_refused_and_untouched(path: Path, case: str) -> None:
    migrations: tuple[str, ...] = TABLES
    if case in ("other program", "newer", "other migration"):
        async with engine_of(path, MACHINE, migrations=(*TABLES, "CREATE TABLE later (a);")):
            pass
    with closing(sqlite3.connect(path)) as db, db:
        if case == "other program":
            db.execute("PRAGMA application_id=7")
        elif case == "other migration":
            migrations = (*TABLES, "CREATE TABLE elsewhere (a);")
        elif case == "tables of nobody":
            db.execute("CREATE TABLE theirs (a)")
        elif case == "no tables, a version":
            db.execute("PRAGMA user_version=1")
    before = content(path)
    says = {"newer": "newer version", "other program": "another program"}.get(case, "")
    with pytest.raises(ForeignStateError, match=f"{path}.*{says}"):
        async with engine_of(path, MACHINE, migrations=migrations):
            pass
    with pytest.raises(ForeignStateError), open_lookup(str(path), migrations=migrations):
        pass
    assert content(path) == before


# ---------------------------------------------------------------- damage


async def _several(path: Path) -> None:
    async with engine_of(path, MACHINE, one_step(gated, name="live"), grace_s=0) as engine:
        for key in "abcdef":
            await engine.wait((await engine.start(MACHINE, key, Ask())).id)
        await engine.start(engine.machines["live"], "l", Ask())


def _damaged(whole: bytes, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    for _ in range(150):
        at = rng.randrange(len(whole))
        yield f"byte {at}", whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
    for _ in range(25):
        size = rng.randrange(1, len(whole))
        yield f"cut to {size}", whole[:size]
    yield "garbage", rng.randbytes(8192)
    yield "text", b"this is not a database\n" * 500


@pytest.mark.capability("a damaged state file is detected, or the damage is harmless; nothing is guessed")
async def test_damage_is_detected_or_harmless(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await _several(path)
    whole = content(path)
    with open_lookup(str(path), migrations=TABLES) as lookup:
        assert lookup is not None
        wanted = {run.id: (run.key, run.request, run.cursor, run.outcome) for run in lookup.runs()}
        results = {run.id: lookup.results(run) for run in lookup.runs()}
    verdicts = {"refused": 0, "found by the check": 0, "quarantined or left out": 0, "harmless": 0}
    for name, damaged in _damaged(whole, random.Random(3)):
        replace(path, damaged)
        verdicts[_verdict(path, name, wanted, results)] += 1
    with capsys.disabled():
        print(f"\n{sum(verdicts.values())} damaged state files: {verdicts}")
    assert verdicts["refused"] > 20


def _verdict(path: Path, name: str, wanted: dict[str, Any], results: dict[str, Any]) -> str:
    try:
        with open_lookup(str(path), migrations=TABLES) as lookup:
            assert lookup is not None, name
            found = {run.id: (run.key, run.request, run.cursor, run.outcome) for run in lookup.runs()}
            for run in lookup.runs():
                assert lookup.results(run) == results[run.id], f"{name}: a result was believed"
            for run_id, facts in found.items():
                assert facts == wanted[run_id], f"{name}: a run was believed"
            if len(found) < len(wanted):
                return "quarantined or left out"
            return "found by the check" if problems(lookup) else "harmless"
    except (StateError, UnknownRunError):
        return "refused"


async def test_a_schema_that_another_process_makes_just_now_is_not_foreign(path: Path, tmp_path: Path) -> None:
    async with engine_of(tmp_path / "made.db", MACHINE):
        pass

    class Late(sqlite3.Connection):
        """Another process makes the tables after the first thing that is read of the file."""

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            cursor = super().execute(sql, *values)
            if sql == "PRAGMA user_version":
                rows = cursor.fetchall()
                with (
                    closing(sqlite3.connect(tmp_path / "made.db")) as made,
                    closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other,
                    suppress(sqlite3.OperationalError),  # it has to wait
                ):
                    other.execute("BEGIN EXCLUSIVE")
                    other.execute("ROLLBACK")
                    made.backup(other)
                cursor = super().execute(f"SELECT {rows[0][0]}")
            return cursor

    create(str(path))
    with closing(sqlite3.connect(path, factory=Late, isolation_level=None)) as db:
        assert check_schema(db, str(path), [SCHEMA, *TABLES], APPLICATION_ID) == 0


async def test_an_engine_refuses_a_file_whose_structure_is_damaged(path: Path) -> None:
    await _several(path)
    whole = bytearray(content(path))
    page = 4096
    whole[3 * page : 4 * page] = random.Random(1).randbytes(page)
    replace(path, bytes(whole))
    with pytest.raises(DamagedStateError, match="damaged"):
        async with engine_of(path, MACHINE, one_step(gated, name="live")):
            pass
    assert content(path) == bytes(whole)


@pytest.mark.parametrize(("old", "new"), [(b"delay_ms", b"delay_mz"), (b"outcome IS NOT NULL", b"outcome IS NOW NULL")])
async def test_a_flipped_byte_in_the_schema_is_refused(path: Path, old: bytes, new: bytes) -> None:
    await _several(path)
    replace(path, content(path).replace(old, new))
    with pytest.raises(DamagedStateError):
        async with engine_of(path, MACHINE):
            pass
    with pytest.raises(DamagedStateError), open_lookup(str(path), migrations=TABLES):
        pass


async def test_an_old_copy_put_back_only_repeats_work(path: Path) -> None:
    await run_one(path, MACHINE, "a")
    old = content(path)
    await run_one(path, MACHINE, "b")
    replace(path, old)
    outcome = await run_one(path, MACHINE, "c")
    assert outcome.ok
    with open_lookup(str(path), migrations=TABLES) as lookup:
        assert lookup is not None and problems(lookup) == []
        assert [run.key for run in lookup.runs()] == ["c", "a"]


# ---------------------------------------------------------------- a disk that fails


@pytest.mark.capability("a commit that fails stops the run; the next start goes on")
@pytest.mark.mistake("a completion that could not be written was logged, and the next step ran")
async def test_a_full_disk_stops_the_run_where_it_is(path: Path) -> None:
    async def fill(run: Any) -> None:
        await effect(run)
        run.log("much", {"text": "x" * 2_000_000})

    machine = three_steps(effect, fill, effect)
    toy = Toy()
    async with engine_of(path, machine, app=toy) as engine:
        async with engine.transaction() as db:
            pages = db.execute("PRAGMA page_count").fetchone()[0]
            db.execute(f"PRAGMA max_page_count={pages + 50}")
        started = await engine.start(machine, "k", Ask())
        with pytest.raises(StateError, match="full"):
            await engine.wait(started.id)
        with pytest.raises(StoppedError):
            await engine.wait(started.id)
        assert engine.lookup.run(started.id).step == "two"
    assert toy.calls == ["k.one", "k.two"]
    async with engine_of(path, three_steps(effect, effect, effect)) as engine:
        assert (await engine.wait(started.id)).ok
        assert problems(engine.lookup) == []


async def test_a_file_that_stays_locked_is_given_up_in_the_end(path: Path, autojump_clock: Any) -> None:
    async with engine_of(path, MACHINE, patience_s=5) as engine:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BusyStateError):
                await engine.start(MACHINE, "k", Ask())
        assert engine.runs() == []
        assert (await engine.wait((await engine.start(MACHINE, "k", Ask())).id)).ok


async def test_a_folder_that_is_not_there_is_named(scratch: Path) -> None:
    with pytest.raises(StateError, match=r"missing/state\.db cannot be made: No such file"):
        async with open_engine(str(scratch / "missing" / "state.db"), machines=[MACHINE]):
            pass


# ---------------------------------------------------------------- reading


@pytest.mark.capability("looking needs no engine and writes nothing at all")
async def test_a_lookup_writes_nothing(path: Path) -> None:
    outcome = await run_one(path, MACHINE)
    before = fingerprint(path.parent)
    with open_lookup(str(path), migrations=TABLES) as lookup:
        assert lookup is not None
        run = lookup.latest("toy", "k")
        assert run is not None and lookup.outcome(run) == outcome
        assert lookup.db.execute("SELECT step FROM effect").fetchall() == [("two",)]
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            lookup.db.execute("DELETE FROM effect")
    assert fingerprint(path.parent) == before


def test_a_lookup_of_nothing_makes_nothing(scratch: Path) -> None:
    with open_lookup(str(scratch / "state.db")) as lookup:
        assert lookup is None
    assert list(scratch.iterdir()) == []
    (scratch / "state.db").touch()
    with open_lookup(str(scratch / "state.db")) as lookup:
        assert lookup is None


async def test_an_engine_with_nothing_to_do_writes_nothing(path: Path) -> None:
    await run_one(path, MACHINE)
    before = fingerprint(path.parent)
    async with engine_of(path, MACHINE) as engine:
        assert len(engine.runs()) == 1
    assert fingerprint(path.parent) == before


async def test_runs_are_listed_newest_first_and_page_by_page(path: Path) -> None:
    other = one_step(nothing, name="other")
    async with engine_of(path, MACHINE, other) as engine:
        for key in "abab":
            await engine.wait((await engine.start(MACHINE, key, Ask())).id)
        await engine.wait((await engine.start(other, "a", Ask())).id)
        assert [(r.machine, r.key) for r in engine.runs()][:2] == [("other", "a"), ("toy", "b")]
        assert [r.seq for r in engine.runs("toy", "a")] == [3, 1]
        assert [r.seq for r in engine.runs("toy", limit=2)] == [4, 3]
        assert [r.seq for r in engine.lookup.runs("toy", before=3)] == [2, 1]
        assert engine.runs(active_only=True) == []
        with pytest.raises(ValueError, match="belongs to a machine"):
            engine.runs(key="a")


# ---------------------------------------------------------------- many finished runs


def _many(path: Path, count: int) -> None:
    """Multiply the one finished run of a file; their digests are wrong, which no plan cares about."""
    with closing(sqlite3.connect(path)) as db, db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(run)") if row[1] not in ("seq", "id")]
        names = ", ".join(columns)
        db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            f" INSERT INTO run (id, {names}) SELECT printf('%026d', i), {names} FROM n, (SELECT * FROM run LIMIT 1)",
            (count,),
        )
        db.execute("INSERT INTO event (run, type, payload, at_ms) SELECT seq, 'start', '{}', 0 FROM run WHERE seq > 1")
        db.execute("ANALYZE")


@pytest.mark.capability("10,000 finished runs slow nothing down: every query goes by an index")
@pytest.mark.parametrize("analysed", [False, True])
async def test_every_query_uses_an_index(path: Path, analysed: bool) -> None:
    statements: list[str] = []
    async with engine_of(path, MACHINE) as engine:
        await engine.wait((await engine.start(MACHINE, "k", Ask())).id)
    if analysed:
        _many(path, 10_000)
    with closing(connect(str(path), query_only=True)) as db:
        db.set_trace_callback(statements.append)
        for name, query in QUERIES.items():
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", ["1"] * query.count("?"))]
            bad = [line for line in plan if _walks(line) and not (name == "all_runs" and "rowid<?" in line)]
            assert bad == [], f"{name}: {plan}"


async def test_a_run_is_found_by_the_beginning_of_its_id_however_old(path: Path) -> None:
    async with engine_of(path, MACHINE) as engine:
        started = await engine.start(MACHINE, "k", Ask())
        await engine.wait(started.id)
    _many(path, 10_000)
    async with engine_of(path, MACHINE) as engine:
        assert [run.id for run in engine.lookup.begins(started.id[:9], 2)] == [started.id]
        assert engine.lookup.begins(f"{started.id}0", 2) == []


def _walks(line: str) -> bool:
    """Say whether a line of a plan reads a table from end to end, or sorts one."""
    if line.startswith("SCAN"):
        return "INDEX run_active" not in line and "INDEX run_cancelled" not in line
    return "TEMP B-TREE" in line


async def test_the_writes_of_a_life_use_indexes(path: Path, autojump_clock: Any) -> None:
    """Every statement that a start, a life, a cancel and a resume make is explained, not only those of a list."""
    child = one_step(gated, name="child")

    async def body(run: Any) -> None:
        await run.wait(await run.start_child(child, "c", Ask()))

    parent = one_step(body, name="parent")
    seen: set[str] = set()
    async with engine_of(path, parent, child, MACHINE, grace_s=0) as engine:
        async with engine.transaction() as db:
            db.set_trace_callback(seen.add)
        engine.db.set_trace_callback(seen.add)
        first = await engine.start(MACHINE, "k", Ask())
        await engine.wait(first.id)
        p = await engine.start(parent, "p", Ask(), after=[first.id])
        await trio.sleep(1)
        await engine.cancel(p.id, cause="enough")
        await engine.wait(p.id)
        await engine.prune(older_than_s=100)
        async with engine.transaction() as db:
            db.set_trace_callback(None)
        engine.db.set_trace_callback(None)
        statements = [s for s in seen if s.split()[0] in ("SELECT", "UPDATE", "DELETE", "WITH")]
        assert len(statements) > 20
        for statement in statements:
            for row in engine.db.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall():
                walks = (
                    row[3].startswith("SCAN")
                    and "INDEX" not in row[3]
                    and row[3] not in ("SCAN up", "SCAN CONSTANT ROW")
                )
                assert not walks, f"{statement}: {row[3]}"


@pytest.mark.capability("finished runs can be forgotten by age, with their logs")
@pytest.mark.mistake("history was never pruned")
async def test_prune_forgets_old_finished_runs_only(path: Path, autojump_clock: Any) -> None:
    clock = Wall()
    live = one_step(gated, name="live")
    toy = Toy()
    async with engine_of(path, MACHINE, live, clock=clock, app=toy, poll_s=1000) as engine:
        for key in "abc":
            await engine.wait((await engine.start(MACHINE, key, Ask())).id)
        started = await engine.start(live, "l", Ask())
        await trio.sleep(1000)
        await engine.wait((await engine.start(MACHINE, "new", Ask())).id)
        assert await engine.prune(older_than_s=500, limit=2) == 2
        assert await engine.prune(older_than_s=500) == 1
        assert await engine.prune(older_than_s=500) == 0
        assert {run.key for run in engine.runs()} == {"new", "l"}
        assert engine.db.execute("SELECT count(*) FROM event WHERE run NOT IN (SELECT seq FROM run)").fetchone() == (0,)
        assert problems(engine.lookup) == []
        toy.gate("l").set()
        assert (await engine.wait(started.id)).ok


def test_a_hot_journal_is_rolled_back_by_whoever_comes_first(path: Path) -> None:
    trio.run(run_one, path, MACHINE)
    whole = content(path)
    pid = os.fork()
    if pid == 0:
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA cache_size=1")
        db.execute("BEGIN IMMEDIATE")
        for _ in range(2000):
            db.execute("INSERT INTO event (run, type, payload, at_ms) VALUES (1, 'x', hex(randomblob(500)), 0)")
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert content(Path(f"{path}-journal")) and content(path) != whole
    with open_lookup(str(path), migrations=TABLES) as lookup:
        assert lookup is not None and problems(lookup) == []
    assert content(path) == whole
