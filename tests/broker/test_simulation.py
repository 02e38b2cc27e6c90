"""The whole program against a model: lives that pull, activate, remove, collect and cancel, and die at any moment.

Invariants tested, after each life, however it ended: SQLite is sound; an image that is listed stands on layers that
root holds, and they hold what its objects held; what root holds of ours, SQLite knows, and the other way round, or a
run at work will see to it; files lie there for rows only. After a last life that nobody disturbs, and a `gc`, nothing
is at work any more and the three agree.

One life is one or two processes on one state folder. A death is an exception from which nothing is committed, asked of
root, or published any more; real deaths are in test_crash.py. ``make soak`` runs IMGPULL_SOAK_STEPS operations.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from broker import helper, imagefile, protocol, pull, store, work, worker
from broker import settings as user_settings
from broker.app import App, running
from broker.console import Reporter
from broker.errors import ImgpullError
from broker.machine import Engine, Hooks, open_engine, open_lookup, problems
from tests.broker.conftest import MEMORY
from tests.broker.fake_helper import OTHER_UID, UID
from tests.broker.inprocess import Surroundings
from tests.broker.machine_toys import EPOCH_S, Killer

STEPS: Final = int(os.environ.get("IMGPULL_SOAK_STEPS", "5000"))
SEED: Final = int(os.environ.get("IMGPULL_SOAK_SEED", "1"))
LONGEST_S: Final = 5000.0  # of a life, by its own clock: longer than any backoff and grace together
HANGS_S: Final = 600  # of a life, by the real clock, which usually shows less than a tenth of a second
SOAK_LOG: Final = os.environ.get("IMGPULL_SOAK_LOG", "")
WORLDS: Final = 25  # of one round
IMAGES: Final = ("one", "two", "three")
NAMES: Final = ("one", "x", "y")
BLOBS: Final = (b"a", b"b", b"c", b"evil", b"die")
OPERATIONS: Final = (
    *("pull", "activate", "deactivate", "remove", "collect", "cancel", "upstream", "set_clock", "other", "reboot"),
    "deaths",
)
REMOVING: Final = ("remove", "collect")
# What may go wrong without anybody's fault here. A bug, a damaged state or a failed file are not among them.
EXCUSED: Final = {
    "archive-rejected", "worker-failed", "busy", "interrupted", "no-such-image", "no-such-activation", "no-such-object",
    "not-an-image", "s3-unavailable", "pool-unavailable", "helper-unavailable", "digest-mismatch",
}  # fmt: skip
done: Counter[str] = Counter()
alive: ContextVar[Killer] = ContextVar("alive")  # of the process that a task belongs to


@dataclass
class Wall:
    """The wall clock, in this life and between lives."""

    base_s: float = EPOCH_S

    def __call__(self) -> float:
        try:
            return self.base_s + trio.current_time()
        except RuntimeError:
            return self.base_s


image = st.sampled_from(IMAGES)
name = st.sampled_from(NAMES)
pulls = st.tuples(st.just("pull"), image, st.none() | name)
operations = st.one_of(
    pulls,
    pulls,
    st.tuples(st.just("activate"), image, name, st.sampled_from(["ro", "rw"])),
    st.tuples(st.just("deactivate"), name),
    st.tuples(st.just("remove"), image),
    st.tuples(st.just("collect")),
    st.tuples(st.just("cancel"), st.sampled_from([m.name for m in pull.MACHINES])),
    st.tuples(st.just("upstream"), image, st.lists(st.sampled_from(BLOBS), min_size=1, max_size=3)),
    st.tuples(st.just("set_clock"), st.sampled_from([-1e6, -10.0, 10.0, 1e6])),
    st.tuples(st.just("other"), st.sampled_from(["commit", "remove", "activate", "deactivate"])),
)
todo = st.lists(st.tuples(st.sampled_from([0, 0, 0.1, 1, 5]), operations), min_size=1, max_size=6)


@dataclass
class Process:
    """One process of a life: what it does, and at which thing done it dies."""

    todo: list[tuple[float, tuple[Any, ...]]]
    killer: Killer
    resume: Any


class Lives(RuleBasedStateMachine):
    @initialize(number=st.integers(0, 1 << 32))
    def begin(self, number: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="imgpull-sim-", dir=MEMORY if MEMORY.is_dir() else None))
        self.rng = random.Random(number)
        trio._core._run._r = random.Random(number)  # the order in which tasks go on: the same each time
        self.around = Surroundings(self.folder, self.rng)
        self.around.point = lambda name: alive.get()(name)
        self.beside = self.was_active = True
        self.answers: list[tuple[tuple[Any, ...], Any]] = []  # of what was done to its end in the last life
        self.settings = user_settings.load({}, {"HOME": str(self.folder)})
        self.paths = store.Paths.of(self.settings)
        self.wall = Wall()
        self.boot = 0
        self.devices = 0
        self.upstream("one", [b"a", b"b"])
        self.upstream("two", [b"a", b"c"])
        self.patches = pytest.MonkeyPatch()
        self.patch()

    def patch(self) -> None:
        around = self.around
        self.patches.setattr(worker, "check", around.check)
        self.patches.setattr(worker, "fetcher", around.fetcher)
        self.patches.setattr(helper, "connect", around.connect)
        self.patches.setattr(store, "now_ms", lambda: int(self.wall() * 1000))
        self.patches.setattr(store, "boot_id", lambda: f"boot {self.boot}")
        self.patches.setattr(
            store.ActivationRow, "is_live", lambda row: around.helper.is_live(row.name, row.layer, row.device)
        )

    def teardown(self) -> None:
        if not hasattr(self, "patches"):
            return
        try:
            self.around.helper_dies = self.around.fetch_fails = 0
            self.run([Process([], Killer(), "all")])
            self.check(settled=False)
            self.run([Process([(0, ("collect",))], Killer(), "all")])
            self.check(settled=True)
        finally:
            self.patches.undo()
            shutil.rmtree(self.folder)

    # -- a life

    @rule(
        first=todo,
        second=st.none() | todo,
        deaths=st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)),
        resume=st.sampled_from(["all", "related", "related"]),
        faults=st.sampled_from([(0, 0), (0, 0), (0.1, 0.1), (0.5, 0)]),
        reboot=st.sampled_from([False, False, False, True]),
    )
    def live(
        self, first: Any, second: Any, deaths: Any, resume: Any, faults: tuple[float, float], reboot: bool
    ) -> None:
        if reboot:
            self.boot += 1
            self.around.helper.reboot()
            done["reboot"] += 1
        self.around.helper_dies, self.around.fetch_fails = faults
        chosen = [(first, deaths[0], resume)] + ([(second, deaths[1], "related")] if second is not None else [])
        self.run([Process(ops, dying_after(left), mode) for ops, left, mode in chosen])
        for process in chosen:
            done.update(words[0] for _, words in process[0])
        done["deaths"] += sum(left is not None for _, left, _ in chosen)
        self.beside = second is not None or len(first) > 1 or deaths != (None, None)
        self.check(settled=False)

    def run(self, processes: list[Process]) -> None:
        async def life() -> None:
            async with trio.open_nursery() as watched:
                watched.start_soon(hang_after, LONGEST_S)
                async with trio.open_nursery() as nursery:
                    for process in processes:
                        nursery.start_soon(self.process, process)
                watched.cancel_scope.cancel()

        with watchdog(HANGS_S):
            trio.run(life, clock=trio.testing.MockClock(autojump_threshold=0))

    async def process(self, process: Process) -> None:
        try:
            async with self.opened(process) as (app, engine):
                async with trio.open_nursery() as nursery:
                    for delay_s, operation in process.todo:
                        nursery.start_soon(self.operate, app, engine, delay_s, operation, process.killer)
                if not process.todo:
                    for record in engine.lookup.runs(active_only=True, limit=1000):
                        await engine.wait(record.id)
        except BaseException as error:
            if not process.killer.dead:
                raise
            del error

    @asynccontextmanager
    async def opened(self, process: Process) -> AsyncIterator[tuple[App, Engine]]:
        token = alive.set(process.killer)
        try:
            async with (
                running(self.settings, Reporter()) as app,
                open_engine(
                    str(self.paths.database),
                    machines=pull.MACHINES,
                    migrations=store.MIGRATIONS,
                    app=app,
                    resume=process.resume,
                    grace_s=1000,
                    hooks=Hooks(point=process.killer),
                    clock=self.wall,
                    rng=self.rng,
                    poll_s=0.5,  # by the life's own clock; each look costs real time
                ) as engine,
            ):
                app.engine = engine
                yield app, engine
        finally:
            alive.reset(token)

    # -- what is done

    async def operate(
        self, app: App, engine: Engine, delay_s: float, operation: tuple[Any, ...], killer: Killer
    ) -> None:
        await trio.sleep(delay_s)
        try:
            answer = await self.perform(app, engine, operation)
            self.answers.append((operation, answer))
        except ImgpullError as error:
            assert error.problem.code in EXCUSED, error.problem.dump()
            done[f"excused: {error.problem.code}"] += 1

    async def perform(self, app: App, engine: Engine, operation: tuple[Any, ...]) -> Any:
        match operation:
            case ("pull", image, name):
                request = pull.PullRequest(
                    ref=ref(image), source=self.settings.source, endpoint=protocol.Endpoint(), name=name
                )
                outcome = await work._do(engine, pull.PULL, store.pull_key(ref(image), self.settings.source), request)
                self.check_content(outcome.result("resolve", pull.Resolved), outcome.result("layers", pull.Layers))
                return outcome.result("layers", pull.Layers).layers[-1]
            case ("activate", image, name, mode):
                found = await app.read(store.image_by_ref, ref(image), self.settings.source)
                return found and (await work._activate(engine, found, name, mode, 0)).device
            case ("deactivate", name):
                return await work._do(engine, pull.DEACTIVATE, name, pull.NameRequest(name=name))
            case ("remove", image):
                asked = pull.RemoveRequest(ref=ref(image), endpoint=self.settings.source)
                return await work._do(engine, pull.REMOVE, store.pull_key(asked.ref, asked.endpoint), asked)
            case ("collect",):
                await work._do(engine, pull.COLLECT, "layers", pull.CollectRequest())
                return await pull.trim_cache(app)
            case ("cancel", machine):
                for record in engine.runs(machine, active_only=True):
                    await engine.cancel(record.id, cause="the model said so")
            case ("upstream", image, blobs):
                self.upstream(image, blobs)
            case ("set_clock", seconds):
                self.wall.base_s += seconds
            case ("other", what):
                self.somebody_else(what)
        return None

    def upstream(self, image: str, blobs: list[bytes]) -> None:
        prefix = f"images/{image}/"
        for key in [key for key in self.around.bucket if key.startswith(prefix)]:
            del self.around.bucket[key]
        for number, data in enumerate(blobs, 1):
            self.around.put(f"{prefix}{number}.tar" + (".gz" if len(blobs) == 2 else ""), data)

    def somebody_else(self, what: str) -> None:
        root = self.around.helper
        known = [m for m in root.manifests if m in root.layers or parent_of(root.manifests[m]) in (None, *root.layers)]
        match what:
            case "commit" if known:
                layer = self.rng.choice(known)
                if layer in root.layers:
                    root.claims[layer].add(OTHER_UID)
                else:
                    root.seal(layer, root.manifests[layer], OTHER_UID)
            case "remove" if root.layers:
                root.on_remove({"layer": self.rng.choice(list(root.layers))}, [], OTHER_UID)
            case "activate" if root.layers:
                root.others[str(len(root.others))] = self.rng.choice(list(root.layers))
            case "deactivate" if root.others:
                root.others.popitem()

    # -- what must hold

    def check_content(self, resolved: pull.Resolved, layers: pull.Layers) -> None:
        """A pull gives the layers that its pinned objects make, one on the other."""
        below = None
        for spec, layer in zip(resolved.layers, layers.layers, strict=True):
            manifest = self.around.helper.manifests[layer]
            assert parent_of(manifest) == below
            wanted = hashlib.sha256(self.around.contents[spec.pin.etag]).hexdigest()
            assert json.loads(manifest.splitlines()[1])["sha256"] == wanted
            below = layer

    def check(self, *, settled: bool) -> None:
        if not self.paths.database.exists():
            assert not self.around.helper.layers.keys() - self.of_others() and not self.around.helper.activations
            return
        with open_lookup(str(self.paths.database), migrations=store.MIGRATIONS) as lookup:
            if lookup is None:
                return
            # What is wrong in a finished run or in the log stays so, since triggers keep both from being changed: one
            # look at a world's end finds it all. SQLite's own check is made by each life that opens the file.
            assert not settled or problems(lookup) == []
            active = {record.machine for record in lookup.runs(active_only=True, limit=10_000)}
            ended = Counter((r.machine, r.outcome) for r in lookup.runs(limit=10_000) if not r.active)
            assert not settled or not active
            # Where root did not answer when a run was ended, it says so, and `imgpull gc` brings them together again.
            apart = lookup.db.execute("SELECT count(*) FROM event WHERE type = 'user.disagreement'").fetchone()[0]
            self.check_images(lookup.db)
            if settled or not apart:
                self.check_layers(lookup.db, active)
            if settled:  # until then a device may be on its way from or to a run that was cut off
                self.check_activations(lookup.db, active, settled)
            self.check_files(lookup.db, active, ended, settled)
            self.check_answers(lookup.db)
            self.was_active = bool(active)
        if settled:
            done.update({f"{machine} {outcome}": count for (machine, outcome), count in ended.items()})

    def of_others(self) -> set[str]:
        return {layer for layer, claims in self.around.helper.claims.items() if OTHER_UID in claims}

    def check_images(self, db: sqlite3.Connection) -> None:
        for image in store.images(db):
            chain = store.chain_of(db, image.top)
            rows = store.image_layers(db, image.id)
            assert [row["layer"] for row in rows] == chain
            assert set(chain) <= self.around.helper.layers.keys(), "an image stands on layers that root has not"
            for row, layer in zip(rows, chain, strict=True):
                wanted = hashlib.sha256(self.around.contents[row["etag"]]).hexdigest()
                assert json.loads(self.around.helper.manifests[layer].splitlines()[1])["sha256"] == wanted

    def check_layers(self, db: sqlite3.Connection, active: set[str]) -> None:
        rows = dict(db.execute("SELECT id, committed FROM layer").fetchall())
        ours = {layer for layer, claims in self.around.helper.claims.items() if UID in claims}
        assert ours <= rows.keys(), "root holds layers of ours that nobody here knows"
        if not active & set(REMOVING):
            assert {layer for layer, committed in rows.items() if committed} <= ours, "layers that root has not"

    def check_activations(self, db: sqlite3.Connection, active: set[str], settled: bool) -> None:
        # A device that is taken back while it is given out is known again after the next pull or `gc`.
        contended = {key for (key,) in db.execute("SELECT key FROM run WHERE machine = 'deactivate'") if not settled}
        rows = {row.name: (row.layer, row.mode) for row in store.activations(db) if row.name not in contended}
        devices = self.around.helper.activations
        given = {name: (row["layer"], row["mode"]) for name, row in devices.items() if name not in contended}
        if settled:  # a device of an image that is not here any more is told by `gc`, and its user takes it back
            tops = {image.top for image in store.images(db)}
            given = {name: what for name, what in given.items() if name in rows or what[0] in tops}
        if not active & {"deactivate", "remove"}:
            assert rows.items() <= given.items(), "devices that root has not given out"
        if not active & {"pull", "activate"}:
            assert given.items() <= rows.items(), "devices that nobody here knows"

    def check_files(self, db: sqlite3.Connection, active: set[str], ended: Counter[Any], settled: bool) -> None:
        rows = {row[0] for row in db.execute("SELECT id FROM layer")}
        files = {f"sha256:{path.stem}" for path in (self.paths.state / "manifests").iterdir()}
        assert rows <= files, "a layer's manifest is gone"
        if not active and not ended["layer", "cancelled"]:
            assert files <= rows, "manifests of nothing"
        if settled:  # `gc` removes what a run could not remove at its own end
            assert list((self.paths.cache / "payloads").iterdir()) == []
        names = {path.name for path in self.paths.state.iterdir()}
        assert names <= {"imgpull.db", "imgpull.db-owners", "imgpull.db-journal", "manifests", "images", "progress"}
        assert imagefile.disagreement(self.paths.image_dir, db) is None

    def check_answers(self, db: sqlite3.Connection) -> None:
        """What a command said holds, if nothing else was done beside it or after it."""
        answers, self.answers = self.answers, []
        if len(answers) != 1 or self.beside or self.was_active:
            return
        (operation, answer), root = answers[0], self.around.helper
        match operation:
            case ("pull", image, name):
                found = store.image_by_ref(db, ref(image), self.settings.source)
                assert found is not None and found.top == answer
                given = store.activation(db, name) if name else None
                assert name is None or (given is not None and given.is_live() and given.layer == answer)
            case ("activate", _, name, _) if answer:
                assert root.activations[name]["device"] == answer
            case ("deactivate", name):
                assert name not in root.activations
            case ("remove", image):
                assert store.image_by_ref(db, ref(image), self.settings.source) is None


class HangError(Exception):
    """A life does not end."""


def tasks() -> str:
    """Show every task of this run and where it waits."""
    waiting, text = [(0, trio.lowlevel.current_root_task())], []
    while waiting:
        depth, task = waiting.pop()
        if task is not None:
            text.append(f"{'  ' * depth}{task.name}")
            text.extend(f"{'  ' * depth}    {f.f_code.co_qualname}:{line}" for f, line in task.iter_await_frames())
            waiting.extend((depth + 1, child) for nursery in task.child_nurseries for child in nursery.child_tasks)
    return "\n".join(text)


async def hang_after(seconds: float) -> None:
    """Name the tasks of a life that goes on for too long by its own clock."""
    await trio.sleep(seconds)
    raise HangError(f"a life does not end within {seconds:g} s of its own clock:\n{tasks()}")


@contextmanager
def watchdog(seconds: int) -> Iterator[None]:
    """Name the tasks of a life that turns on the spot, or waits for nothing: the real clock goes on."""

    def bark(number: int, frame: object) -> None:
        raise HangError(f"a life does not end within {seconds} s:\n{tasks()}")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ref(image: str) -> str:
    return f"s3://bucket/images/{image}"


def parent_of(manifest: bytes) -> str | None:
    parent: str | None = json.loads(manifest.splitlines()[0])["parent"]
    return parent


def dying_after(left: int | None) -> Killer:
    """Make a process that dies at so-manieth thing it does."""

    def match(_: str) -> bool:
        nonlocal left
        if left is None:
            return False
        left -= 1
        return left < 0

    return Killer(match)


def test_program_agrees_with_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Run rounds of worlds until there were enough operations; a round is named by its seed, and can be run alone."""
    log = Path(SOAK_LOG) if SOAK_LOG else None
    rounds, before = finished_rounds(log)
    while before + steps() < STEPS:
        run_state_machine_as_test(
            seed(SEED + rounds)(type(f"Lives{SEED + rounds}", (Lives,), {})),
            settings=settings(
                max_examples=WORLDS,
                stateful_step_count=15,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                print_blob=True,
            ),
        )
        rounds += 1
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(json.dumps({"seed": SEED, "rounds": rounds, "operations": before + steps()}) + "\n")
            with capsys.disabled():
                print(f"{before + steps()} of {STEPS} operations", flush=True)
    with capsys.disabled():
        print(f"\n{before + steps()} operations in {rounds * WORLDS} worlds agree with the model; last:")
        print(", ".join(f"{word} {count}" for word, count in sorted(done.items())))


def finished_rounds(log: Path | None) -> tuple[int, int]:
    """Give how many rounds and operations an earlier run with this seed has noted."""
    if log is None or not log.exists():
        return 0, 0
    noted = json.loads(log.read_text())
    return (noted["rounds"], noted["operations"]) if noted["seed"] == SEED else (0, 0)


def steps() -> int:
    return sum(count for word, count in done.items() if word in OPERATIONS)


async def never_comes_back() -> None:
    await trio.Event().wait()


def test_a_life_that_does_not_end_is_named_by_its_own_clock() -> None:
    async def life() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hang_after, LONGEST_S)
            nursery.start_soon(never_comes_back)

    with pytest.raises(ExceptionGroup) as caught:
        trio.run(life, clock=trio.testing.MockClock(autojump_threshold=0))
    assert "never_comes_back" in str(caught.value.exceptions[0])


def test_a_life_that_does_not_end_is_named_by_the_real_clock() -> None:
    async def life() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(never_comes_back)
            await trio.testing.wait_all_tasks_blocked()
            signal.raise_signal(signal.SIGALRM)  # as the kernel does in the end

    with watchdog(HANGS_S), pytest.raises(ExceptionGroup) as caught:
        trio.run(life)
    assert "never_comes_back" in str(caught.value.exceptions[0])
