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
metadata_bytes = 4194304
data_bytes = {data_bytes}
block_bytes = 65536
base_bytes = 268435456
base_inodes = 16384
journal_mib = 4
[admission]
layer_bytes = 8388608
"""

#: What changes something outside the process: files, devices, mounts, other processes.
MUTATING: Final = (
    "ioctl", "pwrite64", "write", "fsync", "fdatasync", "ftruncate", "unlink", "rename", "mkdir", "mkdirat", "openat",
    "symlinkat", "linkat", "mknodat", "fchown", "fchownat", "fchmod", "chmod", "utimensat", "fsetxattr", "syncfs",
    "fsopen", "fsconfig", "fsmount", "mount_setattr", "clone", "clone3", "unshare", "sendmsg", "kill",
)  # fmt: skip


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
    return thin.open_store(settings["thin"], settings["state_dir"])


@contextlib.contextmanager
def pool(data_bytes: int = 256 * MIB) -> Iterator[None]:
    """Make a pool and a ledger; take both away."""
    FOLDER.mkdir()
    try:
        CONFIG.write_text(SETTINGS.format(data_bytes=data_bytes))
        administer("pool", "create")
        try:
            yield
        finally:
            kept = store()
            for dev in kept.active():
                kept.deactivate(dev)
            administer("pool", "detach")
    finally:
        shutil.rmtree(FOLDER)
    assert DeviceMapper().names() == []


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


def commit(layer: Layer, strace: tuple[str, ...] = ()) -> dict[str, Any]:
    """Commit a layer over a connection of its own."""
    with ForkedHelper(CONFIG, strace=strace) as helper:
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


def case_a_layer_that_is_there_costs_no_device_mapper_change() -> None:
    with pool():
        layer = base_layer()
        commit(layer)
        trace = FOLDER / "trace"
        prefix = ("strace", "-f", "-qq", "-y", "-e", "trace=ioctl", "-o", str(trace))
        assert commit(layer, prefix)["existed"] is True
        calls = [line for line in trace.read_text().splitlines() if "/dev/mapper/control" in line]
        changes = [
            line
            for line in calls
            if any(
                word in line
                for word in ("DM_DEV_CREATE", "DM_TABLE_LOAD", "DM_DEV_SUSPEND", "DM_TARGET_MSG", "DM_DEV_REMOVE")
            )
        ]
        assert changes == [], changes
        print(f"device-mapper questions of a commit that found its layer there: {len(calls)}, changes: {len(changes)}")


def case_activation_takes_the_same_time_whatever_the_image() -> None:
    with pool():
        small = base_layer(files=1, size=10)
        large = base_layer(files=400, size=100_000)
        times = {}
        for name, layer in (("small", small), ("large", large)):
            assert commit(layer)["type"] == "ok"
            with ForkedHelper(CONFIG) as helper:
                helper.hello()
                begin_s = time.monotonic()
                answer = helper.ask("activate", layer=layer.id(), name=name, mode="rw", size=0)
                times[name] = round((time.monotonic() - begin_s) * 1000)
                assert answer["type"] == "ok", answer
            ask("deactivate", name=name)
        print(f"activation of a layer of 10 bytes and one of 40 MB: {times} ms")
        assert times["large"] < times["small"] * 3 + 200, times


FAMILIES: Final = ("golang", "node", "python")


def case_three_families_of_five_layers_fit_because_they_share() -> None:
    """Layers 1 to 3 are the same in all families, layer 4 in two; flattened they would not fit the pool."""
    scale = int(os.environ.get("IMGPULL_VM_SCALE", "16"))  # 1 is the full size
    # MiB, as a bucket of such families has them: 2.8 GB flattened, 1.47 GB stored once
    sizes = {"1": 110, "2": 70, "3": 300, "4 golang-node": 370, "4 python": 260, "5": 120}
    with pool(data_bytes=(2 << 30) // scale):
        flat, committed = 0, dict[str, Layer]()
        for family in FAMILIES:
            parent = None
            for number in range(1, 6):
                who = "all" if number < 4 else "golang-node" if number == 4 and family != "python" else family
                size = (sizes.get(str(number)) or sizes[f"{number} {who}"]) // scale
                layer = Layer(parent)
                folder = layer.directory(0, f"layer{number}")
                for part in range(4):
                    seed = f"{who} {number} {part} ".encode()
                    layer.file(folder, f"part{part}", (seed * (size * MIB // 4 // len(seed) + 1))[: size * MIB // 4])
                if layer.id() not in committed:
                    assert_ok(commit(layer))
                committed[layer.id()] = layer
                parent = layer.id()
                flat += size
        status = store().status()
        chain = sum(len(layer.payload) for layer in committed.values())
        for layer in committed.values():
            assert_ok(ask("verify", layer=layer.id()))
        check_promises()
        print(f"15 keys, {len(committed)} layers: flattened {flat} MiB, as a chain {chain >> 20} MiB; the pool of "
              f"{status.data_bytes >> 20} MiB holds {status.data_used_bytes >> 20} MiB, metadata "
              f"{status.metadata_used_bytes >> 10} of {status.metadata_bytes >> 10} KiB")  # fmt: skip
        assert flat * MIB > status.data_bytes, "flattened they would have fitted as well: no proof"
        # What a chain costs over its content: journal and tables of each layer's file system.
        assert status.data_used_bytes < chain + len(committed) * 8 * MIB


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
            os.pwrite(eater.fileno(), b"\xa5" * MIB, offset)
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
        assert answer["type"] == "error" and answer["code"] in ("no_room", "fault", "pool"), answer
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
        administer("pool", "detach")
        subprocess.run(
            ["thin_check", "--clear-needs-check-flag", str(STATE / "thin/metadata")], check=True, capture_output=True
        )
        administer("pool", "attach")
        ask("list")
        check_promises()
        assert ask("verify", layer=kept.id())["type"] == "ok"
        assert commit(upper_layer(kept.id(), "kept"))["type"] == "ok"
        check_promises()


# ---------------------------------------------------------------- killed


Traced = Callable[[tuple[str, ...]], object]


def trace_points(traced: Traced) -> list[tuple[str, int]]:
    """Run once under strace and return every (system call, its how-manieth) of any one process."""
    trace = FOLDER / "trace"
    traced(("-e", f"trace={','.join(MUTATING)}", "-e", "signal=none", "-o", str(trace)))
    counts: dict[str, Counter[str]] = {}
    for line in trace.read_text().splitlines():
        pid, _, rest = line.partition(" ")
        name = rest.lstrip().partition("(")[0]
        if name in MUTATING:
            counts.setdefault(pid, Counter())[name] += 1
    most: Counter[str] = Counter()
    for counter in counts.values():
        most |= counter
    return [(name, number) for name in MUTATING for number in range(1, most[name] + 1)]


def sample(points: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return every point, or an even choice of as many as IMGPULL_VM_POINTS allows."""
    allowed = int(os.environ.get("IMGPULL_VM_POINTS", "0")) or max(1, len(points))
    step = max(1, -(-len(points) // allowed))
    return points[step // 2 :: step]  # the same ones each time: a test that fails must fail again


def killed_at_every_point(begin: Callable[[], None], traced: Traced, end: Callable[[], None]) -> None:
    """Kill the helper at each point; after each, a fresh connection converges, and ``end`` finishes."""
    begin()
    points = trace_points(traced)
    end()
    chosen, killed = sample(points), 0
    for name, number in chosen:
        begin()
        inject = ("-e", f"trace={name}", "-e", "signal=none", "-e", f"inject={name}:signal=KILL:when={number}")
        try:
            try:
                traced((*inject, "-o", "/dev/null"))
            except (EOFError, ConnectionError):
                killed += 1
            assert ask("reconcile")["type"] == "ok"
            check_promises()
            end()
            check_promises()
        except BaseException:
            print(f"killed at {name} number {number}", file=sys.stderr)
            raise
    print(f"injected at {len(chosen)} of {len(points)} points; {killed} times the connection broke")


def case_killed_at_every_system_call_of_a_commit() -> None:
    with pool():
        first = base_layer(files=3, size=5000)
        second = upper_layer(first.id(), "b")
        commit(first)

        def finish() -> None:
            assert commit(second)["type"] == "ok"
            assert ask("verify", layer=second.id())["type"] == "ok"
            assert ask("remove", layer=second.id())["removed"] is True

        killed_at_every_point(lambda: None, lambda strace: commit(second, strace), finish)
        assert ask("verify", layer=first.id())["type"] == "ok"


def case_killed_at_every_system_call_of_activate_deactivate_and_remove() -> None:
    with pool():
        first = base_layer(files=3, size=5000)
        second = upper_layer(first.id(), "b")
        commit(first)

        def traced(strace: tuple[str, ...]) -> None:
            with ForkedHelper(CONFIG, strace=strace) as helper:
                helper.hello()
                helper.ask("activate", layer=second.id(), name="one", mode="rw", size=300 * MIB)
                helper.ask("deactivate", name="one")
                helper.ask("remove", layer=second.id())

        def finish() -> None:
            ask("deactivate", name="one")
            ask("remove", layer=second.id())
            assert {row["layer"] for row in ledger_rows()} == {first.id()}

        killed_at_every_point(lambda: assert_ok(commit(second)), traced, finish)
        assert ask("verify", layer=first.id())["type"] == "ok"


def assert_ok(answer: dict[str, Any]) -> None:
    assert answer["type"] == "ok", answer


def main() -> None:
    """Run the case that is named."""
    case: Callable[[], None] = globals()[sys.argv[1]]
    case()


if __name__ == "__main__":
    main()
