"""One real pool for the tests of this folder, and the oracle that nothing is left in it."""

import fcntl
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from privhelper import loops
from tests.privhelper.client import Helper, Layer, helper_command

POOL_BYTES = 4 << 30
MEMBER, OTHER = 61_001, 61_002  # uids that need no account: the helper knows numbers only


class Installation:
    """A helper's state directory and the command line that goes with it."""

    def __init__(self, folder: Path, settings: str = "") -> None:
        self.folder = folder
        self.state = folder / "state"
        self.config = folder / "helper.toml"
        self.settings = settings
        folder.mkdir(mode=0o700)
        self.configure()

    def configure(self, extra: str = "") -> None:
        """Write the administrator's file; ``extra`` is TOML with tables of its own."""
        reflink = "" if "[reflink]" in extra else f"[reflink]\npool_bytes = {POOL_BYTES}\npreallocate = false\n"
        self.config.write_text(f'state_dir = "{self.state}"\n{extra}\n{reflink}')

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(helper_command(self.config, *words), capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done

    def connect(self, uid: int = 0, prefix: tuple[str, ...] = ()) -> Helper:
        helper = Helper(self.config, uid=uid, prefix=prefix)
        assert helper.hello()["type"] == "ok"
        return helper

    def rows(self) -> list[sqlite3.Row]:
        database = sqlite3.connect(f"file:{self.state}/ledger.db?mode=ro", uri=True)
        database.row_factory = sqlite3.Row
        try:
            return database.execute("SELECT * FROM device ORDER BY dev").fetchall()
        finally:
            database.close()

    def images(self) -> set[int]:
        return {int(path.stem) for path in (self.state / "pool").glob("*.img")} - {0}

    def loops(self) -> dict[int, str]:
        """Return image number and loop device, by the kernel's own listing."""
        done = subprocess.run(["losetup", "-nlO", "NAME,BACK-FILE"], capture_output=True, text=True, check=True)
        pairs = [text.split(None, 1) for text in done.stdout.splitlines()]
        pool = f"{self.state}/pool/"
        return {int(name.removeprefix(pool).split(".")[0]): loop for loop, name in pairs if name.startswith(pool)}

    def marks(self) -> list[str]:
        """Return the marks of the loop devices that the helper made for this pool's images, bound or not."""
        pool = f"{self.state}/pool/"
        return [node.mark for node in loops.nodes() if node.mark.partition(" ")[2].startswith(pool)]

    def assert_agrees(self) -> None:
        """Ledger, pool, loop devices, manifests and locks tell the same; nothing is on its way."""
        rows = self.rows()
        assert [row["state"] for row in rows if row["state"] not in ("sealed", "granted")] == []
        assert {row["dev"] for row in rows} == self.images()
        active = {row["dev"] for row in rows if row["kind"] == "activation"}
        assert set(self.loops()) <= active
        assert {int(Path(mark).stem) for mark in self.marks()} <= active
        manifests = {int(path.name) for path in (self.state / "manifests").iterdir()}
        assert manifests == {row["dev"] for row in rows if row["kind"] == "layer"}
        with (self.state / "locks").open("rb+") as locks:
            fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def wipe(self) -> None:
        """Remove every activation and layer, as root may."""
        users = {row["uid"] for row in self.rows() if row["kind"] == "activation"}
        for uid in users:
            with self.connect(uid) as helper:
                for item in helper.ask("list")["items"]:
                    if item["kind"] == "activation":
                        assert helper.ask("deactivate", name=item["name"])["type"] == "ok"
        with self.connect() as helper:
            for item in reversed(helper.ask("list")["items"]):
                assert helper.ask("remove", layer=item["layer"])["type"] == "ok"
        assert self.rows() == []

    def close(self) -> None:
        self.configure()
        self.run("reconcile")
        self.wipe()
        self.run("pool", "detach")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def session_installation() -> Iterator[Installation]:
    found = Installation(Path(f"/var/tmp/imgpull-test-privhelper-{os.getpid()}"))
    found.run("pool", "create")
    yield found
    found.close()


@pytest.fixture
def installation(session_installation: Installation) -> Iterator[Installation]:
    """Return an empty pool; afterwards everything still agrees, and the pool is emptied."""
    session_installation.configure()
    yield session_installation
    session_installation.configure()
    session_installation.assert_agrees()
    session_installation.wipe()


@pytest.fixture
def layer() -> Layer:
    """Return a small honest layer with one of everything that is allowed."""
    made = Layer()
    made.directory(0, "", op="meta")
    etc = made.directory(0, "etc")
    made.file(etc, "passwd", b"root:x:0:0\n")
    usr = made.directory(0, "usr", 0o2755, uid=3, gid=50, xattrs={"user.note": b"hello".hex()})
    ping = {"security.capability": "0100000200200000000000000000000000000000"}
    made.file(usr, "ping", b"p" * 200_000, 0o755, xattrs=ping)
    made.file(usr, "su", b"s" * 70_000, 0o4755, uid=0, gid=0)
    made.file(usr, "theirs", b"", 0o640, uid=1000, gid=1000)
    made.symlink(0, "tmp-link", "/tmp")
    made.add(op="link", into=0, name="zz-su", to=["usr", "su"])
    return made
