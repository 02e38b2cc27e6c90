"""imgpull killed at the commits of its state machine, on the thin store: runs in the guest as root.

Rule 1: the helper is the real one; a listening process forks one for each connection, as systemd would start it.
Rule 2: the workers are those of tests/broker/programs: nothing here is about them, and an emulated processor needs
        seconds to start the real ones.
Rule 3: the points are not listed here: a run without a kill names those that it passes.
"""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from broker import checker, work, worker
from broker.cli import imgpull
from broker.machine import Hooks
from privhelper import __main__ as helper_program
from tests.privhelper.client import Helper
from tests.vm.guest import helper_cases as helper

ALICE: Final = 1500
SOCKET: Final = "/run/imgpull-sweep.sock"
HOME: Final = Path("/scratch/alice")
BUCKET: Final = HOME / "bucket/images"
REF: Final = "s3://bucket/images/one"
PROGRAMS: Final = "/src/tests/broker/programs"

Point = Callable[[str], None]


@contextlib.contextmanager
def world() -> Iterator[int]:
    """Make a pool, a helper's door, and an ordinary user with a bucket; return the process behind the door."""
    with helper.pool():
        for image, layers in {"one": [b"a"], "bad": [b"b", b"evil"]}.items():
            (BUCKET / image).mkdir(parents=True)
            for number, data in enumerate(layers, 1):
                (BUCKET / image / f"{number}.tar").write_bytes(data)
        os.chown(HOME, ALICE, ALICE)
        door = open_door()
        try:
            yield door
        finally:
            os.kill(door, signal.SIGKILL)
            os.waitpid(door, 0)
            os.unlink(SOCKET)
            shutil.rmtree(HOME)


def open_door() -> int:
    """Fork the process that listens; return its id."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(SOCKET)
    os.chmod(SOCKET, 0o666)
    listener.listen(16)
    pid = os.fork()
    if pid:
        listener.close()
        return pid
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    log = os.open(helper.FOLDER / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            serve(connection.detach(), log)
        connection.close()


def serve(connection: int, log: int) -> None:
    """Become the helper of one connection; never returns."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(log, 2)
        os.dup2(connection, 3)
        os.closerange(4, 64)
        os.environ["LISTEN_FDS"] = "1"
        code = helper_program.main(["--config", str(helper.CONFIG), "serve"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def as_alice(task: Callable[[], int]) -> int:
    """Do something in a process of the user's; return its exit status, negative for a signal."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        signal.alarm(120)  # what hangs dies by SIGALRM
        os.setgroups([])
        os.setresgid(ALICE, ALICE, ALICE)
        os.setresuid(ALICE, ALICE, ALICE)
        code = task()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(*words: str, point: Point | None = None) -> int:
    """Run imgpull as the user; return its exit status."""

    def task() -> int:
        os.environ.update(HOME=str(HOME), IMGPULL_HELPER_SOCKET=SOCKET, IMGPULL_PROGRESS="none")
        for owner, constant, name in ((checker, "COMMAND", "fake_check.py"), (worker, "FETCH", "fake_fetch.py")):
            vars(owner)[constant] = (sys.executable, f"{PROGRAMS}/{name}", str(HOME))
        if point:
            work.HOOKS = Hooks(point=point)
        said = os.open(HOME / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        try:
            imgpull(list(words), prog_name="imgpull")
        except SystemExit as end:
            sys.stdout.flush()
            return int(end.code or 0)
        return 0

    return as_alice(task)


def said() -> str:
    return (HOME / "said").read_text()


def points_of(*words: str) -> list[str]:
    """Run a command to its end and return the commit points that it passed, in order."""
    path = HOME / "points"

    def note(name: str) -> None:
        with path.open("a") as file:
            file.write(name + "\n")

    assert run(*words, point=note) == 0, said()
    passed = path.read_text().splitlines()
    path.unlink()
    return passed


def die_at(number: int) -> Point:
    """Return a hook that kills the process at its ``number``-th point, counted from 0."""
    seen = [0]

    def point(name: str) -> None:
        if seen[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen[0] += 1

    return point


def kill_helpers(door: int) -> None:
    """Kill the helpers that serve somebody now, with their children."""
    for pid in map(int, Path(f"/proc/{door}/task/{door}/children").read_text().split()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


class Client(Helper):
    """A plain client at the same door."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(60)
        self.sock.connect(SOCKET)

    def close(self) -> int:
        self.sock.close()
        return 0


def give_everything_back() -> int:
    """Deactivate and remove all that the user has; never by way of the broker's own state."""
    with Client() as client:
        client.hello()
        items = [item for item in client.ask("list")["items"] if item["type"] == "item"]
        for item in items:
            if item["kind"] == "activation":
                helper.assert_ok(client.ask("deactivate", name=item["name"]))
        for item in reversed(items):
            if item["kind"] == "layer":
                helper.assert_ok(client.ask("remove", layer=item["layer"]))
    return 0


def reset() -> None:
    assert as_alice(give_everything_back) == 0
    for folder in (".local", ".cache"):
        shutil.rmtree(HOME / folder, ignore_errors=True)


def kinds() -> dict[str, int]:
    """Return how many layers and activations root has."""
    rows = [row["kind"] for row in helper.ledger_rows()]
    return {kind: rows.count(kind) for kind in ("layer", "activation")}


def check_state(expected: dict[str, int]) -> None:
    """Root, pool and the user's database agree, and nothing is at work or left over."""
    helper.check_promises()
    assert kinds() == expected, (kinds(), expected)
    path = HOME / ".local/state/imgpull/imgpull.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT id FROM run WHERE outcome IS NULL").fetchall() == []
        for table, kind in (("layer WHERE committed = 1", "layer"), ("activation", "activation")):
            count = database.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            assert count == expected[kind], (table, count, expected)


Scenario = tuple[list[str], list[str], int, dict[str, int], tuple[int, ...]]
#: command; what was run before and how that ended; what root has in the end; exit codes of the second run
SCENARIOS: Final[dict[str, Scenario]] = {
    "pull": (["pull", REF], [], 0, {"layer": 1, "activation": 1}, (0,)),
    "activate": (["activate", "one"], ["pull", REF, "--no-activate"], 0, {"layer": 1, "activation": 1}, (0,)),
    "deactivate": (["deactivate", "one"], ["pull", REF], 0, {"layer": 1, "activation": 0}, (0, 66)),
    "remove": (["rm", "one"], ["pull", REF, "--no-activate"], 0, {"layer": 0, "activation": 0}, (0, 66)),
    "collect": (["gc"], ["pull", "s3://bucket/images/bad"], 65, {"layer": 0, "activation": 0}, (0,)),
}


def sweep(door: int, name: str) -> None:
    """Kill imgpull at every point of a command, every other time with its helpers; then the command ends well."""
    words, before, before_code, expected, codes = SCENARIOS[name]

    def prepare() -> None:
        assert not before or run(*before) == before_code, said()

    prepare()
    points = points_of(*words)
    check_state(expected)
    chosen = helper.chosen(len(points))
    for turn, number in enumerate(chosen):
        reset()
        prepare()
        point = points[number - 1]
        assert run(*words, point=die_at(number - 1)) == -signal.SIGKILL, f"{point}: {said()}"
        if turn % 2:
            kill_helpers(door)
        assert run(*words) in codes, f"{point}: {said()}"
        check_state(expected)
    reset()
    print(f"{name}: imgpull killed at {len(chosen)} of {len(points)} commit points, {len(chosen) // 2} times with its "
          "helpers", flush=True)  # fmt: skip


def case_killed_at_the_commits_of_every_machine() -> None:
    points = int(os.environ["IMGPULL_VM_POINTS"])
    with world() as door:
        for name in SCENARIOS:
            # A pull has five times the points of the others.
            os.environ["IMGPULL_VM_POINTS"] = str(points // 2 if name == "pull" else points // 6)
            sweep(door, name)
