"""Ledger and store agree again, in both directions, whatever one of them lost; what lives is left alone."""

import errno
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from privhelper import administer, devices, loops, policy, protocol
from privhelper.answers import Answers
from privhelper.errors import AnswerError, code_of
from privhelper.ledger import Ledger
from privhelper.stores.base import PoolStatus, Store, StoreError
from privhelper.stores.reflink import ReflinkStore
from tests.privhelper.client import Layer, helper_command, memfd
from tests.privhelper.conftest import MEMBER, OTHER, Installation

pytestmark = pytest.mark.root


@pytest.fixture
def sealed(installation: Installation, layer: Layer, tmp_path: Path) -> str:
    with installation.connect(MEMBER) as helper:
        assert helper.commit(layer.manifest(), layer.write_payload(tmp_path))["type"] == "ok"
    return layer.id()


def reconcile(installation: Installation) -> list[str]:
    with installation.connect(MEMBER) as helper:
        reply = helper.ask("reconcile")
        assert reply["type"] == "ok", reply
        actions: list[str] = reply["actions"]
        return actions


def unknown(installation: Installation) -> int:
    """Return a number that the ledger has never used, and will not use while a test runs."""
    with closing(sqlite3.connect(installation.state / "ledger.db")) as database:
        return 1000 + sum(int(row[0]) for row in database.execute("SELECT seq FROM sqlite_sequence"))


def clone_base(installation: Installation, number: int) -> str:
    pool = installation.state / "pool"
    subprocess.run(["cp", "--reflink=always", str(pool / "0.img"), str(pool / f"{number}.img")], check=True)
    return str(pool / f"{number}.img")


def bind(image: str, use: str = "given") -> None:
    """Put an image behind a loop device, as a helper does that is killed right after."""
    with open(image, "r+b") as file:
        os.close(loops.attach(file.fileno(), f"{use} {image}", read_only=False, autoclear=False)[0])


def test_nothing_to_do(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        helper.ask("activate", layer=sealed, name="a", mode="rw", size=0)
    assert reconcile(installation) == []
    assert installation.run("reconcile").stdout == ""


def test_image_without_a_row(installation: Installation, sealed: str) -> None:
    stray = unknown(installation)
    clone_base(installation, stray)
    assert reconcile(installation) == [f"deleted device {stray} or its manifest, which the ledger does not know"]
    assert stray not in installation.images()


@pytest.mark.parametrize("use", ["given", "mounted"])
def test_loop_device_without_a_row(installation: Installation, sealed: str, use: str) -> None:
    stray = unknown(installation)
    bind(clone_base(installation, stray), use)
    assert reconcile(installation) == [
        f"deactivated device {stray}, which nobody was given",
        f"deleted device {stray} or its manifest, which the ledger does not know",
    ]


def test_sealed_layer_that_is_active(installation: Installation, sealed: str) -> None:
    (row,) = installation.rows()
    bind(str(installation.state / f"pool/{row['dev']}.img"))
    assert reconcile(installation) == [f"deactivated device {row['dev']}, which nobody was given"]
    assert installation.loops() == {}


def test_row_without_an_image(installation: Installation, sealed: str, layer: Layer, tmp_path: Path) -> None:
    (row,) = installation.rows()
    (installation.state / f"pool/{row['dev']}.img").unlink()
    assert reconcile(installation) == [f"forgot device {row['dev']}, layer of {sealed}: the store has lost it"]
    with installation.connect(MEMBER) as helper:
        assert helper.commit(layer.manifest(), layer.write_payload(tmp_path))["existed"] is False


def test_manifest_without_a_row(installation: Installation, sealed: str) -> None:
    stray = unknown(installation)
    (installation.state / f"manifests/{stray}").write_bytes(b"")
    assert reconcile(installation) == [f"deleted device {stray} or its manifest, which the ledger does not know"]


@pytest.mark.parametrize("state", ["absent", "read_only", "needs_check", "out_of_data", "failed"])
def test_pool_that_is_not_ready_refuses_with_its_own_code(
    installation: Installation, sealed: str, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """A full pool is `no_room`: the way out is to remove images. Any other state needs root."""
    known = devices.Devices(policy.load(str(installation.config)))
    before = installation.rows()
    status = known.store.status()._replace(state=state, advice="do this")
    monkeypatch.setattr(type(known.store), "status", lambda store: status)
    with pytest.raises(AnswerError, match="do this") as refused:
        known.create("activation", sealed, MEMBER, before[0]["dev"], lambda status: None, name="a", mode="rw")
    assert refused.value.code == ("no_room" if state == "out_of_data" else "pool")
    assert [tuple(row) for row in installation.rows()] == [tuple(row) for row in before]


def test_absent_pool_is_left_alone(installation: Installation, sealed: str) -> None:
    """An empty mount point looks like a pool that lost everything; believing it would forget every layer."""
    installation.run("pool", "detach")
    assert [node for node in loops.nodes() if node.mark == f"pool {installation.state}/pool.xfs"] == []
    assert reconcile(installation) == []
    installation.run("pool", "attach")
    assert reconcile(installation) == []
    assert [row["layer"] for row in installation.rows()] == [sealed]


def test_pool_of_another_ledger_is_left_alone(installation: Installation, sealed: str) -> None:
    identity = installation.state / "pool/identity"
    kept = identity.read_text()
    identity.write_text("11111111-1111-1111-1111-111111111111\n")
    try:
        with installation.connect(MEMBER) as helper:
            assert helper.ask("reconcile")["code"] == "pool"
            assert helper.ask("activate", layer=sealed, name="a", mode="rw", size=0)["code"] == "pool"
            assert helper.ask("remove", layer=sealed)["code"] == "pool"
        assert installation.run("pool", "attach", check=False).returncode == 69
    finally:
        identity.write_text(kept)
    assert [row["layer"] for row in installation.rows()] == [sealed]


def test_commit_that_runs_is_left_alone(installation: Installation, tmp_path: Path) -> None:
    big = Layer()
    big.directory(0, "", op="meta")
    for number in range(4):
        big.file(0, f"f{number}", os.urandom(1 << 20) * 32)
    file, data = memfd(big.manifest()), os.open(big.write_payload(tmp_path), os.O_RDONLY)
    with installation.connect(MEMBER) as helper:
        sizes = {"manifest_bytes": len(big.manifest()), "payload_bytes": len(big.payload)}
        helper.send({"op": "commit", **sizes}, [file, data])
        assert helper.receive()[0]["type"] == "progress"
        with helper.stopped_child():
            assert reconcile(installation) == []
        while (reply := helper.receive()[0])["type"] == "progress":
            pass
        assert reply["existed"] is False
    os.close(file)
    os.close(data)


def test_layer_that_is_sealed_while_reconcile_looks_is_left_alone(
    installation: Installation, sealed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The race: between two looks another process makes a layer, which must not seem lost, nor its manifest stray.

    The other process is played at each moment at which the pool's lock is given back.
    """
    made: list[int] = []
    give_back = Ledger.unlock

    def make_a_layer(ledger: Ledger, byte: int) -> None:
        give_back(ledger, byte)
        if byte == 0 and len(made) < 5:
            with ledger.transaction():
                dev = ledger.intend("layer", f"sha256:{len(made):064}", MEMBER)
                ledger.one("UPDATE device SET state = 'sealed' WHERE dev = ?", dev)
            give_back(ledger, dev)
            clone_base(installation, dev)
            (installation.state / f"manifests/{dev}").touch()
            made.append(dev)

    everything = policy.load(str(installation.config))
    known = devices.Devices(everything)
    monkeypatch.setattr(Ledger, "unlock", make_a_layer)
    assert known.reconcile(thorough=True) == []
    assert made
    monkeypatch.undo()
    assert {int(path.name) for path in (installation.state / "manifests").iterdir()} >= set(made)
    assert installation.images() >= set(made)
    assert {row["dev"] for row in installation.rows()} >= set(made)


def test_device_that_cannot_be_freed_keeps_no_other_from_it(
    installation: Installation, sealed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = unknown(installation)
    clone_base(installation, first)
    clone_base(installation, first + 1)
    known = devices.Devices(policy.load(str(installation.config)))
    unlink = type(known.store).delete

    def refuse(store: Store, dev: int) -> None:
        if dev == first:
            raise OSError(errno.EIO, "Input/output error", f"{installation.state}/pool/{first}.img")
        unlink(store, dev)

    monkeypatch.setattr(type(known.store), "delete", refuse)
    assert known.reconcile(thorough=True) == [
        f"left device {first} as it is: Input/output error",
        f"deleted device {first + 1} or its manifest, which the ledger does not know",
    ]
    monkeypatch.undo()
    assert reconcile(installation) == []  # the start has done it: the intent was written down
    assert installation.images() == {row["dev"] for row in installation.rows()}


def test_crash_while_an_unknown_device_is_deleted_leaves_a_pool_that_works(
    installation: Installation, sealed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's transaction moves on before the ledger can: without an intent it would look like a foreign writer."""
    stray = unknown(installation)
    clone_base(installation, stray)
    known = devices.Devices(policy.load(str(installation.config)))
    store, at = known.store, [known.ledger.pool()[1]]
    status = type(store).status

    def now(store: Store) -> PoolStatus:
        return status(store)._replace(transaction=at[0])

    def advance(store: Store, expected: int) -> int:
        at[0] = expected + 1
        return at[0]

    def crash(ledger: Ledger, dev: int, trans: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(store), "status", now)
    monkeypatch.setattr(type(store), "advance", advance)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as meanwhile:
        meanwhile.setattr(Ledger, "forget", crash)
        known.reconcile(thorough=True)
    assert known.reconcile(thorough=False) == [f"freed device {stray}, scratch of , which a crash left removing"]
    with known.ledger.transaction():
        after = known.ledger.intend("layer", "a", 1)
        assert after > stray, "a number is used once, also by others"
        known.ledger.one("DELETE FROM device WHERE layer = 'a'")
        known.ledger.one("UPDATE pool SET trans = 0")
    known.ledger.unlock(after)
    assert stray not in installation.images()


def test_folder_that_is_no_pool_is_not_an_empty_one(tmp_path: Path) -> None:
    """A pool that is detached at the moment of a look would seem to have lost every layer."""
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/7.img").touch()
    with pytest.raises(StoreError, match="absent"):
        ReflinkStore({}, str(tmp_path)).devices()


def test_detaching_waits_until_nobody_looks(installation: Installation, sealed: str) -> None:
    known = devices.Devices(policy.load(str(installation.config)))
    command = helper_command(installation.config, "pool", "detach")
    with known.ledger.pool_lock(), subprocess.Popen(command, stdout=subprocess.DEVNULL) as detaching:
        waiting = re.compile(rf"-> OFDLCK .*:{(installation.state / 'locks').stat().st_ino} ")
        while detaching.poll() is None and not waiting.search(Path("/proc/locks").read_text()):
            os.sched_yield()
        assert known.store.devices() == installation.images()
        known.ledger.unlock(0)
        assert detaching.wait(60) == 0
    installation.run("pool", "attach")


def test_answer_with_thousands_of_actions_fits_a_message(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    grants = policy.load(str(installation.config))
    known = devices.Devices(grants)
    monkeypatch.setattr(known, "reconcile", lambda thorough: ["left device 1 as it is: " + "0" * 500] * 5000)
    client: Any = SimpleNamespace(uid=0)
    answer, _ = Answers(grants, known, client).answer_reconcile({}, [])
    assert answer["actions"][-1] == "and 4900 more, see the log"
    protocol.encode({"type": "ok", **answer})


def test_claim_does_not_outlive_its_layer(installation: Installation, sealed: str) -> None:
    """A claim that stayed behind would keep the layer, made anew by others, from ever being removed."""
    (row,) = installation.rows()
    ledger = Ledger(str(installation.state))
    assert ledger.claim(sealed, OTHER)
    (installation.state / f"pool/{row['dev']}.img").unlink()
    reconcile(installation)
    assert ledger.claims(sealed) == set()
    assert not ledger.claim(sealed, OTHER), "what is not there cannot be claimed"
    assert ledger.claims(sealed) == set()


def test_pool_that_the_disk_has_no_room_for_is_not_made(tmp_path: Path) -> None:
    """What was asked, what there is, and how to ask for less; nothing is left behind."""
    command = helper_command(config_of(tmp_path), "pool", "create", "--size", "1024T")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 73, done.stderr
    assert f"{1 << 50} bytes asked for, " in done.stderr and "--size" in done.stderr
    assert list((tmp_path / "state").iterdir()) == []


@pytest.mark.parametrize(("text", "number"), [("1048576", 1 << 20), ("512M", 1 << 29), ("20g", 20 << 30)])
def test_sizes_are_written_as_people_do(text: str, number: int) -> None:
    assert administer._options(["--metadata-bytes", text, "--size", text])["metadata_bytes"] == number


@pytest.mark.parametrize("text", ["", "G", "20GiB", "a lot", "1.5G"])
def test_what_is_no_size_is_refused(text: str, tmp_path: Path) -> None:
    command = helper_command(config_of(tmp_path), "pool", "create", "--size", text)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split()[0]) == (2, "usage:")


def test_level_is_for_the_journal_alone(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    command = helper_command(config_of(tmp_path), "serve")
    assert subprocess.run(command, stderr=theirs, check=False).returncode == 2
    assert os.read(ours, 99).startswith(b"serve wants")
    assert subprocess.run(command, capture_output=True, check=False).stderr.startswith(b"<3>serve wants")
    os.close(ours)
    os.close(theirs)


def config_of(folder: Path) -> Path:
    config = folder / "helper.toml"
    config.write_text(f'state_dir = "{folder}/state"\n')
    config.chmod(0o600)
    return config


def test_second_pool_is_not_made(installation: Installation, sealed: str) -> None:
    done = installation.run("pool", "create", check=False)
    assert (done.returncode, "exists already" in done.stderr) == (69, True)
    assert [row["layer"] for row in installation.rows()] == [sealed]


def test_pool_with_an_activation_is_not_detached(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        device = helper.ask("activate", layer=sealed, name="a", mode="rw", size=0)["device"]
    done = installation.run("pool", "detach", check=False)
    assert (done.returncode, device in done.stderr) == (75, True)


def test_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from privhelper.ledger import Ledger\n"
        "ledger = Ledger(sys.argv[2]); assert ledger.try_lock(7); print('held', flush=True); sys.stdin.read()\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", script, root, str(tmp_path)]
    ledger = Ledger(str(tmp_path))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert not ledger.try_lock(7)
        assert ledger.try_lock(8)
        holder.kill()
    assert ledger.try_lock(7)


def test_ledger_is_as_durable_as_it_says(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    assert ledger.one("PRAGMA journal_mode")[0] == "persist"
    assert ledger.one("PRAGMA synchronous")[0] == 3  # EXTRA
    with ledger.transaction():
        first = ledger.intend("layer", "a", 1)
    ledger.forget(first, 0)
    with ledger.transaction():
        assert ledger.intend("layer", "b", 1) > first  # a number is used once


def test_number_whose_lock_is_taken_is_not_used(tmp_path: Path) -> None:
    """After an intent that could not be committed its number comes again, while the first is still being undone."""
    other, ledger = Ledger(str(tmp_path)), Ledger(str(tmp_path))
    assert other.try_lock(1)
    with pytest.raises(AnswerError) as refused, ledger.transaction():
        ledger.intend("layer", "a", 1)
    assert refused.value.code == "busy"
    assert ledger.all("SELECT * FROM device") == []


def test_full_disk_is_no_room_whoever_finds_it(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.one(f"PRAGMA max_page_count = {ledger.one('PRAGMA page_count')[0]}")
    with pytest.raises(sqlite3.OperationalError) as full, ledger.transaction():
        for number in range(1000):
            ledger.one("INSERT INTO claim VALUES(?, ?)", "x" * 1000, number)
    assert code_of(full.value) == "no_room"
    assert {code_of(OSError(number, "")) for number in (errno.ENOSPC, errno.EDQUOT)} == {"no_room"}
    assert {code_of(OSError(number, "")) for number in (errno.EIO, errno.EACCES)} == {"fault"}


def test_change_that_fails_leaves_the_row_as_it_was(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    with pytest.raises(RuntimeError), ledger.transaction():
        ledger.intend("layer", "a", 1)
        raise RuntimeError
    assert ledger.all("SELECT * FROM device") == []
