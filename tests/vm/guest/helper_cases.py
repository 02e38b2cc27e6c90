"""The root helper on the thin store of a real kernel: runs inside the guest, as root, one case a process.

Rule 1: a case has a pool and a ledger of its own below /scratch/helper, and leaves nothing.
Rule 2: after every crash the same list of promises is checked: check_promises().
"""

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from privhelper import policy
from privhelper.dm import DeviceMapper, Target
from privhelper.stores import thin
from tests.privhelper.client import Layer, helper_command
from tests.vm.guest.forked import ForkedHelper

MIB: Final = 1 << 20
FOLDER: Final = Path("/scratch/helper")
CONFIG: Final = FOLDER / "helper.toml"
STATE: Final = FOLDER / "state"
SETTINGS: Final = """
store = "thin"
state_dir = "/scratch/helper/state"
[thin]
metadata_bytes = {metadata_bytes}
data_bytes = {data_bytes}
block_bytes = 65536
base_bytes = 268435456
base_inodes = 16384
journal_mib = 4
[admission]
layer_bytes = 8388608
"""


def run(*argv: str) -> str:
    """Run a program and return its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def administer(*words: str, check: bool = True) -> str:
    """Run ``imgpull-helper WORDS`` as root."""
    done = subprocess.run(helper_command(CONFIG, *words), capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def store() -> thin.ThinStore:
    settings = policy.load(str(CONFIG)).settings
    return thin.ThinStore(settings["thin"], settings["state_dir"])


@contextlib.contextmanager
def pool(data_bytes: int = 256 * MIB, metadata_bytes: int = 4 * MIB, data: str = "") -> Iterator[None]:
    """Make a pool and a ledger, of files unless ``data`` is a device; take both away."""
    FOLDER.mkdir()
    try:
        CONFIG.write_text(SETTINGS.format(data_bytes=data_bytes, metadata_bytes=metadata_bytes))
        administer("pool", "create", *(["--data", data] if data else []))
        try:
            yield
        finally:
            kept = store()
            for dev in kept.active():
                kept.deactivate(dev)
            administer("pool", "detach")
    finally:
        shutil.rmtree(FOLDER)
    assert [name for name in DeviceMapper().names() if name.startswith("imgpull-")] == []


def base_layer(files: int = 8, size: int = 20_000) -> Layer:
    """Return a small first layer: directories, files, a link."""
    layer = Layer()
    layer.directory(0, "", op="meta")
    etc = layer.directory(0, "etc")
    for number in range(files):
        layer.file(etc, f"file{number}", bytes([number % 256]) * size)
    layer.symlink(etc, "link", "file0")
    return layer


def upper_layer(parent: str, tag: str, removes: str = "link") -> Layer:
    """Return a layer that removes, adds and enters."""
    layer = Layer(parent)
    etc = layer.add(op="enter", into=0, name="etc")
    layer.add(op="remove", into=etc, name=removes, dir=False)
    layer.file(etc, f"new-{tag}", tag.encode() * 1000)
    return layer


def commit(layer: Layer) -> dict[str, Any]:
    """Commit a layer over a connection of its own."""
    with ForkedHelper(CONFIG) as helper:
        helper.hello()
        return helper.commit(layer.manifest(), layer.write_payload(FOLDER))


def ask(op: str, **fields: Any) -> dict[str, Any]:
    """Ask one thing over a connection of its own; descriptors of the answer are closed."""
    with ForkedHelper(CONFIG) as helper:
        helper.hello()
        answer = helper.ask(op, **fields)
        for fd in answer["fds"]:
            os.close(fd)
        return answer


def ledger_rows() -> list[dict[str, Any]]:
    with contextlib.closing(sqlite3.connect(f"file:{STATE}/ledger.db?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        return [dict(row) for row in database.execute("SELECT * FROM device")]


def ledger_transaction() -> int:
    with contextlib.closing(sqlite3.connect(f"file:{STATE}/ledger.db?mode=ro", uri=True)) as database:
        return int(database.execute("SELECT trans FROM pool").fetchone()[0])


def check_promises() -> None:
    """Check what must hold when no request is under way, however the one before ended."""
    kept = store()
    rows = ledger_rows()
    assert {row["state"] for row in rows} <= {"sealed", "granted"}, rows
    assert kept.devices() == {row["dev"] for row in rows}, (kept.devices(), rows)
    granted = {row["dev"] for row in rows if row["state"] == "granted"}
    assert set(kept.active()) <= granted, (kept.active(), granted)
    status = kept.status()
    assert (status.state, status.transaction) == ("ready", ledger_transaction()), (status, ledger_transaction())
    manifests = {int(name) for name in os.listdir(STATE / "manifests")}
    assert manifests == {row["dev"] for row in rows if row["kind"] == "layer"}, manifests
    with open("/proc/mounts") as file:
        assert not [line for line in file if "/dev/dm-" in line and " /scratch " not in line]


# ---------------------------------------------------------------- well


def case_layers_are_committed_once_activated_and_removed() -> None:
    with pool():
        first, begin_s = base_layer(), time.monotonic()
        answer = commit(first)
        assert answer["type"] == "ok" and not answer["existed"], answer
        print(f"commit of a small layer: {time.monotonic() - begin_s:.2f} s")
        assert commit(first)["existed"] is True
        second = upper_layer(first.id(), "b")
        assert commit(second)["type"] == "ok"
        assert ask("verify", layer=second.id())["type"] == "ok"
        answer = ask("activate", layer=second.id(), name="one", mode="rw", size=0)
        assert answer["type"] == "ok", answer
        shown = subprocess.run(
            ["debugfs", "-R", "ls -p /etc", answer["device"]], capture_output=True, text=True, check=True
        )
        assert "new-b" in shown.stdout and "/link/" not in shown.stdout, shown.stdout
        again = ask("activate", layer=second.id(), name="one", mode="rw", size=0)
        assert again["device"] == answer["device"]
        assert ask("remove", layer=second.id())["code"] == "in_use"
        assert ask("deactivate", name="one")["type"] == "ok"
        assert ask("remove", layer=first.id())["code"] == "in_use"
        for layer in (second, first):
            assert ask("remove", layer=layer.id())["removed"] is True
        check_promises()
        assert ledger_rows() == []


def case_an_activation_is_the_same_work_whatever_the_image() -> None:
    """Every call that changes something is counted: their times would be those of the machine below."""
    with pool():
        small, large = base_layer(files=1, size=10), base_layer(files=400, size=100_000)
        calls = {}
        for name, layer in (("small", small), ("large", large)):
            assert_ok(commit(layer))
            calls[name] = stopping(activating(layer.id(), name), 0)
            assert_ok(ask("deactivate", name=name))
        print(f"activation of a layer of 10 bytes, and one of 40 MB: {len(calls['small'])} calls that change something")
        assert calls["small"] == calls["large"], calls


def activating(layer: str, name: str) -> "Requests":
    return lambda helper: assert_ok(helper.ask("activate", layer=layer, name=name, mode="rw", size=0))


# ---------------------------------------------------------------- trouble


def case_a_layer_too_large_for_the_pool_is_refused_before_anything_is_made() -> None:
    with pool(data_bytes=64 * MIB):
        layer = base_layer(files=80, size=MIB)
        before = store().status().transaction
        answer = commit(layer)
        assert answer["code"] == "no_room" and answer["figures"], answer
        assert store().status().transaction == before and ledger_rows() == []
        assert commit(base_layer())["type"] == "ok"


def eat(device: str, start: int, length: int) -> None:
    """Write to a device, a MiB at a time, each on disk before the next; until the pool is full if there is no end."""
    with contextlib.suppress(OSError), open(device, "r+b", buffering=0) as eater:
        for offset in range(start, start + length, MIB):
            os.pwrite(eater.fileno(), b"\xa5" * min(MIB, length), offset)
            os.fdatasync(eater.fileno())


@contextlib.contextmanager
def eating_when_a_commit_begins(device: str, helper: int) -> Iterator[None]:
    """Fork a process that stops the helper at its next row in the ledger, fills the pool and lets the helper go on."""
    before = len(ledger_rows())
    pid = os.fork()
    if pid == 0:
        try:
            while len(ledger_rows()) == before:
                time.sleep(0.001)
            os.killpg(helper, signal.SIGSTOP)
            eat(device, 140 * MIB, 100 * MIB)
        finally:
            os.killpg(helper, signal.SIGCONT)
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def case_a_pool_that_fills_up_under_a_commit_dooms_only_that_layer() -> None:
    """An activation eats what the commit was promised."""
    with pool(data_bytes=128 * MIB):
        kept, layer = base_layer(), base_layer(files=40, size=MIB)
        commit(kept)
        device = ask("activate", layer=kept.id(), name="eater", mode="rw", size=0)["device"]
        eat(device, 70 * MIB, 50 * MIB)
        with ForkedHelper(CONFIG) as helper:
            helper.hello()
            with eating_when_a_commit_begins(device, helper.pid):
                answer = helper.commit(layer.manifest(), layer.write_payload(FOLDER))
        assert answer["type"] == "error" and answer["code"] == "no_room", answer
        assert "data_free" not in answer["figures"], f"refused before it began: {answer}"
        print(f"refused as {answer['code']}: {answer['message']} {answer['figures']}")
        assert ask("deactivate", name="eater")["type"] == "ok"
        assert ask("verify", layer=kept.id())["type"] == "ok"
        assert commit(layer)["type"] == "ok"
        check_promises()


def case_a_write_error_under_a_commit_dooms_only_that_layer() -> None:
    with pool():
        kept = base_layer()
        commit(kept)
        run("modprobe", "dm-flakey")
        mapper = DeviceMapper()
        name = f"{policy.load(str(CONFIG)).settings['thin']['name']}-meta"
        linear = mapper.table(name)
        mapper.load(name, Target(linear.length_bytes, "flakey", f"{linear.parameters} 0 3600 1 error_writes"))
        answer = commit(upper_layer(kept.id(), "lost"))
        mapper.load(name, linear)
        assert answer["type"] == "error" and answer["code"] in ("pool", "fault"), answer
        refused = ask("activate", layer=kept.id(), name="no", mode="rw", size=0)
        assert refused["code"] == "pool" and "pool detach" in refused["message"], refused
        clear_needs_check()
        ask("list")
        check_promises()
        assert ask("verify", layer=kept.id())["type"] == "ok"
        assert commit(upper_layer(kept.id(), "kept"))["type"] == "ok"
        check_promises()


def clear_needs_check() -> None:
    """Do what the refusal tells root to do."""
    administer("pool", "detach")
    run("thin_check", "--clear-needs-check-flag", str(STATE / "thin/metadata"))
    administer("pool", "attach")


def case_a_data_error_under_a_commit_dooms_only_that_layer() -> None:
    """The pool's data lies on a disk that refuses writes for a while."""
    disk = "/dev/disk/by-id/virtio-data"
    good = Target(256 * MIB, "linear", f"{os.path.realpath(disk)} 0")
    run("dd", "if=/dev/zero", f"of={disk}", "bs=1M", "count=2", "conv=fsync", "status=none")
    run("modprobe", "dm-flakey")
    mapper = DeviceMapper()
    path = mapper.create("faulty", "FAULTY-data", good)
    try:
        with pool(data=path):
            kept = base_layer()
            commit(kept)
            flakey = Target(good.length_bytes, "flakey", f"{good.parameters} 0 3600 1 error_writes")
            mapper.load("faulty", flakey)
            answer = commit(upper_layer(kept.id(), "lost"))
            mapper.load("faulty", good)
            assert answer["type"] == "error" and answer["code"] in ("pool", "fault"), answer
            print(f"refused as {answer['code']}: {answer['message']}")
            if store().status().state != "ready":
                clear_needs_check()
            assert_ok(ask("reconcile"))
            check_promises()
            assert_ok(ask("verify", layer=kept.id()))
            assert_ok(commit(upper_layer(kept.id(), "kept")))
            check_promises()
    finally:
        mapper.remove("faulty", 10)
        run("dd", "if=/dev/zero", f"of={disk}", "bs=1M", "count=2", "conv=fsync", "status=none")


def case_metadata_that_runs_out_refuses_before_the_pool_breaks() -> None:
    """Each device that differs from its origin takes a block of metadata, however little it holds."""
    with pool(metadata_bytes=512 << 10):
        kept = base_layer()
        commit(kept)
        names: list[str] = []
        with ForkedHelper(CONFIG) as helper:
            helper.hello()
            while True:
                answer = helper.ask("activate", layer=kept.id(), name=f"n{len(names)}", mode="rw", size=0)
                if answer["type"] == "error":
                    break
                names.append(f"n{len(names)}")
                eat(answer["device"], 200 * MIB, 1)
            assert answer["code"] == "no_room" and answer["figures"]["free_metadata_bytes"] < 4096, answer
            refused = commit_by(helper, upper_layer(kept.id(), "more"))
            assert refused["code"] == "no_room", refused
            assert store().status().state == "ready"
            assert_ok(helper.ask("verify", layer=kept.id()))
            for name in names:
                assert_ok(helper.ask("deactivate", name=name))
            assert_ok(commit_by(helper, upper_layer(kept.id(), "more")))
        check_promises()
        print(f"{len(names)} activations until 512 KiB of metadata had no more room")


# ---------------------------------------------------------------- killed


Requests = Callable[[ForkedHelper], object]


def chosen(count: int) -> list[int]:
    """Return every one of so many points, or an even choice of as many as IMGPULL_VM_POINTS allows."""
    allowed = int(os.environ.get("IMGPULL_VM_POINTS", "0")) or count
    step = max(1, -(-count // allowed))
    return list(range(1 + step // 2, count + 1, step))  # the same ones each time: a test that fails must fail again


def stopping(requests: Requests, kill_at: int) -> list[str]:
    """Make requests of a helper that stops at its mutating calls; return the calls that it got to."""
    with ForkedHelper(CONFIG, kill_at=kill_at) as helper:
        with contextlib.suppress(EOFError, ConnectionError):
            helper.hello()
            requests(helper)
    assert helper.stops
    return helper.stops.calls


def killed_at_every_point(begin: Requests, requests: Requests, end: Requests) -> None:
    """Kill helper or child at each point of ``requests``; then a fresh connection converges, and ``end`` goes well."""

    def one(kill_at: int) -> list[str]:
        with ForkedHelper(CONFIG) as helper:
            helper.hello()
            begin(helper)
        calls = stopping(requests, kill_at)
        with ForkedHelper(CONFIG) as helper:
            helper.hello()
            assert_ok(helper.ask("reconcile"))
            check_promises()
            end(helper)
        check_promises()
        return calls

    points = one(0)
    killed = Counter[str]()
    for number in chosen(len(points)):
        try:
            killed[one(number)[-1]] += 1
        except BaseException:
            print(f"killed at call {number} of {len(points)}, {points[number - 1]}", file=sys.stderr)
            raise
    print(f"killed at {sum(killed.values())} of {len(points)} mutating calls: {dict(killed)}")


def commit_by(helper: ForkedHelper, layer: Layer) -> dict[str, Any]:
    return helper.commit(layer.manifest(), layer.write_payload(FOLDER))


def case_killed_at_every_system_call_of_a_commit() -> None:
    with pool():
        first = base_layer(files=3, size=5000)
        second = upper_layer(first.id(), "b")
        commit(first)

        def finish(helper: ForkedHelper) -> None:
            assert_ok(commit_by(helper, second))
            assert_ok(helper.ask("verify", layer=second.id()))
            assert helper.ask("remove", layer=second.id())["removed"] is True

        killed_at_every_point(lambda helper: None, lambda helper: commit_by(helper, second), finish)
        assert ask("verify", layer=first.id())["type"] == "ok"


def case_killed_at_every_system_call_of_activate_deactivate_and_remove() -> None:
    with pool():
        first = base_layer(files=3, size=5000)
        second = upper_layer(first.id(), "b")
        commit(first)

        def requests(helper: ForkedHelper) -> None:
            helper.ask("activate", layer=second.id(), name="one", mode="rw", size=300 * MIB)
            helper.ask("deactivate", name="one")
            helper.ask("remove", layer=second.id())

        def finish(helper: ForkedHelper) -> None:
            helper.ask("deactivate", name="one")
            helper.ask("remove", layer=second.id())
            assert {row["layer"] for row in ledger_rows()} == {first.id()}

        killed_at_every_point(lambda helper: assert_ok(commit_by(helper, second)), requests, finish)
        assert ask("verify", layer=first.id())["type"] == "ok"


def assert_ok(answer: dict[str, Any]) -> None:
    assert answer["type"] == "ok", answer
