"""A user of the whole command with everything real but the two workers and root: a folder is S3, a dictionary the pool.

Rule: whatever a test prints with ``--json`` is held against the published schema.
"""

import sqlite3
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from broker import checker, settings, store, worker
from broker.cli import imgpull
from tests.broker.fake_helper import FakeHelper
from tests.support.output import check_output

MEMORY = Path("/dev/shm")
PROGRAMS = Path(__file__).resolve().parents[1] / "broker/programs"


class World:
    """A bucket in a folder, a fake root helper in a thread, and a user."""

    def __init__(self, folder: Path) -> None:
        self.bucket = folder / "bucket"
        self.folder = folder
        self.helper = FakeHelper(folder)
        self.environ = {"HOME": str(folder), "IMGPULL_HELPER_SOCKET": self.helper.path, "IMGPULL_PROGRESS": "none"}

    def put(self, image: str, *layers: bytes, suffix: str = ".tar") -> None:
        path = self.bucket / "images" / image
        path.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(layers, 1):
            (path / f"{number}{suffix}").write_bytes(data)

    def run(self, *words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(imgpull, list(words), env=self.environ, prog_name="imgpull")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        check_output(words, result.stdout)
        return result.exit_code, result.stdout, result.stderr

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def paths(self) -> store.Paths:
        return store.Paths.of(settings.load({}, self.environ))

    def leftovers(self) -> list[Path]:
        """Files that no finished pull should leave: partial blobs, payloads, files without a meaning."""
        cache = [p for p in self.paths.cache.rglob("*") if p.is_file() and p.parent.name != "sha256"]
        return cache + [
            p
            for p in self.paths.state.rglob("*")
            if p.is_file() and p.suffix not in (".jsonl", ".json", ".db", ".db-owners", "")
        ]

    def query(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(self.paths.database)) as db:
            return db.execute(sql).fetchall()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    # In memory: a death by signal loses nothing that was written, wherever it lies, and syncs cost nothing.
    with tempfile.TemporaryDirectory(prefix="imgpull-world-", dir=MEMORY if MEMORY.is_dir() else tmp_path) as folder:
        yield from _serving(World(Path(folder)), monkeypatch)


def _serving(made: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for owner, program, name in ((checker, "COMMAND", "fake_check.py"), (worker, "FETCH", "fake_fetch.py")):
        monkeypatch.setattr(owner, program, (sys.executable, str(PROGRAMS / name), str(made.folder)))
    monkeypatch.setattr(
        store.ActivationRow, "is_live", lambda row: made.helper.is_live(row.name, row.layer, row.device)
    )
    started, stop = threading.Event(), []

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            stop.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            await nursery.start(made.helper.serve)
            started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    started.wait()
    yield made
    token, scope = stop[0]
    token.run_sync_soon(scope.cancel)
    thread.join()
