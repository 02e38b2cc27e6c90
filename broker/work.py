"""The commands that do something: each opens the state, starts or joins runs, waits, and says how they ended.

Rule 1: one way in: `opened` opens the app and the engine, and turns the library's errors into Problems.
Rule 2: the first Ctrl-C or SIGTERM lets the step at work finish and keeps everything; the second stops now.
Rule 3: only runs that the command is about are resumed here; `imgpull resume` takes up all.
"""

import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeVar

import trio

from broker import helper, protocol, store, temporary
from broker import pull as machines
from broker.app import App, endpoint_of, running
from broker.console import Reporter, size
from broker.errors import ImgpullError
from broker.helper import LayerAbsentError
from broker.machine import (
    BusyStateError,
    DamagedStateError,
    Engine,
    ForeignStateError,
    Hooks,
    Lookup,
    Machine,
    Outcome,
    RunRecord,
    StateError,
    StoppedError,
    UnknownRunError,
    open_engine,
    open_lookup,
    problems,
)
from broker.machine.signals import leaves
from broker.reference import Reference
from broker.settings import Settings
from broker.store import Image, Paths

T = TypeVar("T")
GRACE_S: Final = 3600.0  # a step at work is waited for; the second signal cuts it
HOOKS = Hooks()  # a test puts its crash points here
WATCH_S: Final = 0.25  # how often the work of other processes is looked at
CHANGED_RETRIES: Final = 3  # pulls of an object that changes while it is fetched


@contextmanager
def _translated() -> Generator[None, None, None]:
    """Turn the state machine's errors into the user's."""
    try:
        yield
    except (DamagedStateError, ForeignStateError) as error:
        raise ImgpullError("state-damaged", "the state database cannot be used", str(error)) from error
    except BusyStateError as error:
        raise ImgpullError("busy", "the state database is locked", str(error)) from error
    except StoppedError as error:
        raise ImgpullError("interrupted", "stopped on request", "what is done is kept") from error
    except UnknownRunError as error:
        raise ImgpullError("no-such-run", str(error)) from error
    except StateError as error:
        raise ImgpullError("io-error", "the state database failed", str(error)) from error


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run the asynchronous part of a command."""
    with _translated():
        try:
            return trio.run(work)
        except BaseExceptionGroup as group:
            # Nurseries wrap what their tasks raise; the user's error is inside, a bug goes before all others.
            found = list(leaves(group))
            bugs = [e for e in found if not isinstance(e, ImgpullError | trio.Cancelled)]
            raise (bugs or found)[0] from group


@asynccontextmanager
async def opened(
    settings: Settings, report: Reporter, resume: Literal["all", "related"] = "related"
) -> AsyncGenerator[tuple[App, Engine], None]:
    """Open the app and the engine, and heed signals, for as long as the block lasts."""
    if (state := store.open_readonly(Paths.of(settings).database)) is not None:  # it refuses what is not to be trusted
        state.close()
    try:
        async with (
            running(settings, report) as app,
            open_engine(
                str(app.paths.database),
                machines=machines.MACHINES,
                migrations=store.MIGRATIONS,
                app=app,
                resume=resume,
                grace_s=GRACE_S,
                hooks=HOOKS,
            ) as engine,
        ):
            app.engine = engine
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_heed_signals, engine, report)
                yield app, engine
                nursery.cancel_scope.cancel()
    finally:
        report.close()


async def _heed_signals(engine: Engine, report: Reporter) -> None:
    """Stop gently at the first signal, at once at the second."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            async for number in signals:
                if engine.draining:
                    report.close()
                    os._exit(128 + number)  # every lock, mount and device in work dies or is taken up with the process
                report.notice("stopping after the step at work; once more to stop now. Run the same command to go on.")
                nursery.start_soon(partial(engine.shutdown, grace_s=GRACE_S))


async def _do(
    engine: Engine,
    machine: Machine[Any],
    key: str,
    request: Any,
    watch: Callable[[str], Awaitable[None]] | None = None,
) -> Outcome:
    """Start a run, or join the one at work, and wait for its end; ``watch`` looks at it meanwhile.

    Raises: ImgpullError with what the run ended with.
    """
    while True:
        started = await engine.start(machine, key, request)
        async with trio.open_nursery() as nursery:
            if watch is not None:
                nursery.start_soon(watch, started.id)
            outcome = await engine.wait(started.id)
            nursery.cancel_scope.cancel()
        if started.same_request:
            break
        # Somebody else's run of the same key asked for something else, such as another name: ours comes after it.
    if not outcome.ok:
        raise ImgpullError.of(machines.problem_of(outcome))
    return outcome


async def _show_others(app: App, report: Reporter, title: str, run_id: str) -> None:
    """Show how far the layers of a pull are that another process works at."""
    lookup, owned_elsewhere = app.engine.lookup, app.engine.owned_elsewhere
    told: set[str] = set()
    while True:
        pull = await app.read(lambda _: lookup.run(run_id))
        layers = await app.read(lambda _, pull=pull: lookup.children(pull))  # type: ignore[misc]
        is_theirs = owned_elsewhere(pull)
        shown = layers if is_theirs else [layer for layer in layers if owned_elsewhere(layer)]
        if (shown or is_theirs) and run_id not in told:
            report.notice("another imgpull works at this: its progress is shown, and it is taken over if it dies")
            told.add(run_id)
        if is_theirs and {layer.key for layer in layers} - told:
            known = [(layer.key, machines.LayerRequest.model_validate_json(layer.request).pin) for layer in layers]
            report.begin(title, [(key, machines.label(pin.key), pin.size) for key, pin in known])
        for layer in shown:
            told.add(layer.key)
            report.stage(layer.key, *_whereabouts(app, layer))
        await trio.sleep(WATCH_S)


def _whereabouts(app: App, layer: RunRecord) -> tuple[str, int, int]:
    """Return stage, bytes done and bytes in all of a layer, as its process tells; by its step where that says else."""
    if not layer.active:
        return ("ready" if layer.outcome == "done" else "failed"), 0, 0
    stage = machines.STAGES.get(layer.step, "waiting")
    told = app.board.read(layer.key)
    return told if told and told[0] in (stage, "waiting") else (stage, 0, 0)


@dataclass(frozen=True, slots=True)
class Pulled:
    """How a pull ended."""

    top: str
    device: str | None
    summary: dict[str, Any]


def pull(
    settings: Settings,
    report: Reporter,
    reference: Reference,
    name: str | None,
    size_bytes: int,
    expect: list[str],
    pins: dict[str, str] | None,
    refresh: bool,
) -> Pulled:
    """Pull one image; an object that changes while it is fetched is resolved anew."""
    helper.require_door(settings.helper_socket)
    request = machines.PullRequest(
        ref=str(reference),
        source=settings.source,
        endpoint=endpoint_of(settings),
        name=name,
        size=size_bytes,
        expect=expect,
        pins=pins,
    )
    for attempt in range(1, CHANGED_RETRIES + 1):
        try:
            return run(partial(_pull, settings, report, request, refresh))
        except ImgpullError as error:
            if error.problem.details.get("fetch_code") != "changed" or attempt == CHANGED_RETRIES:
                raise
            report.notice(f"{error.problem.what}: resolving {reference} again")
    raise AssertionError("unreachable")


async def _pull(settings: Settings, report: Reporter, request: machines.PullRequest, refresh: bool) -> Pulled:
    async with opened(settings, report) as (app, engine):
        before = await app.read(store.image_by_ref, request.ref, request.source)
        old = await app.read(store.image_layers, before.id) if before else []
        key = store.pull_key(request.ref, request.source)
        await _take_back(app, engine)
        await _tell_of_the_interrupted(engine, report, key)
        outcome = await _do(engine, machines.PULL, key, request, partial(_show_others, app, report, request.ref))
        device = outcome.result("activate", machines.Activated).device if request.name is not None else None
        layers = outcome.result("layers", machines.Layers)
        resolved = outcome.result("resolve", machines.Resolved)
        await machines.trim_cache(app)
        changed = [s.number for s, o in zip(resolved.layers, old, strict=False) if s.pin.etag != o["etag"]]
        if refresh and before is not None:
            changed += range(min(len(old), len(resolved.layers)) + 1, max(len(old), len(resolved.layers)) + 1)
            report.notice(f"changed upstream: layers {', '.join(map(str, changed))}" if changed else "nothing changed")
        summary = {
            "layers": len(layers.layers),
            "reused": layers.reused,
            "transferred_bytes": layers.transferred,
            "changed_layers": changed,
            "steps": await _step_seconds(engine, outcome),
            "text": f"{len(layers.layers)} layer{'s' * (len(layers.layers) != 1)}, {layers.reused} of them there"
            f" already, {size(layers.transferred)} fetched",
        }
        return Pulled(layers.layers[-1], device, summary)


async def _tell_of_the_interrupted(engine: Engine, report: Reporter, key: str) -> None:
    """Say that this pull was begun before, if it was, and how far it had come."""
    for record in await engine.read(lambda _: engine.lookup.runs("pull", active_only=True)):
        if record.key == key:
            children = await engine.read(lambda _, run=record: engine.lookup.children(run))  # type: ignore[misc]
            done = sum(child.outcome == "done" for child in children)
            report.notice(f"going on where it was interrupted: {done} of {len(children)} layers done", run=record.id)


async def _step_seconds(engine: Engine, outcome: Outcome) -> dict[str, float]:
    """Return how long each step of a pull took; `layers` is the time in which all its layers worked side by side."""
    events = await engine.read(lambda _: engine.events(outcome.run_id))
    return {str(e.step): int(str(e.payload["duration_ms"])) / 1000 for e in events if e.type == "complete"}


async def _activate(engine: Engine, image: Image, name: str, mode: Any, size_bytes: int) -> machines.Activated:
    request = machines.ActivateRequest(
        ref=image.ref, endpoint=image.endpoint, layer=image.top, name=name, mode=mode, size=size_bytes
    )
    outcome = await _do(engine, machines.ACTIVATE, name, request)
    return outcome.result("activate", machines.Activated)


def activate(settings: Settings, image: Image, name: str, mode: str, size_bytes: int) -> machines.Activated:
    """Give out one more device of an image."""

    async def work() -> machines.Activated:
        async with opened(settings, Reporter()) as (app, engine):
            await _take_back(app, engine)
            return await _activate(engine, image, name, mode, size_bytes)

    return run(work)


def deactivate(settings: Settings, name: str) -> None:
    """Take a device back."""

    async def work() -> None:
        async with opened(settings, Reporter()) as (app, engine):
            await _do(engine, machines.DEACTIVATE, name, machines.NameRequest(name=name))
            temporary.forget(app.paths.mark_dir, name)

    run(work)


async def _take_back(app: App, engine: Engine) -> None:
    """Take back the devices that were there for a command alone, and whose command died without giving them back.

    They are read-only: nothing is lost with them. One that cannot be taken now is left for the next time.
    """
    marks = app.paths.mark_dir
    for name in temporary.abandoned(marks):
        for record in await engine.read(lambda _: engine.lookup.runs("activate", active_only=True)):
            if record.key == name:
                await engine.cancel(record.id, cause="the command that it was for is dead")
                await engine.wait(record.id)
        known = await app.read(store.activation, name)
        if known is not None and known.mode == "ro":
            try:
                await _do(engine, machines.DEACTIVATE, name, machines.NameRequest(name=name))
            except ImgpullError:
                continue
        temporary.forget(marks, name)


def remove(settings: Settings, image: Image) -> list[str]:
    """Remove an image. Returns: the layers that root has removed."""

    async def work() -> list[str]:
        async with opened(settings, Reporter()) as (app, engine):
            await _take_back(app, engine)
            request = machines.RemoveRequest(ref=image.ref, endpoint=image.endpoint)
            outcome = await _do(engine, machines.REMOVE, store.pull_key(image.ref, image.endpoint), request)
            return list(outcome.result("layers", machines.Removed).layers)

    return run(work)


def finish_removal(settings: Settings, word: str) -> list[str] | None:
    """Go on with the interrupted removal of an image. Returns: its layers, None if there is no such removal."""
    with looking(settings) as lookup:
        found = lookup.runs("remove", active_only=True) if lookup else []
    wanted = word.rstrip("/")
    for record in found:
        ref = machines.RemoveRequest.model_validate_json(record.request).ref.rstrip("/")
        if wanted in (ref, ref.rsplit("/", 1)[-1]):
            return run(partial(_resume_removal, settings, record.id))
    return None


async def _resume_removal(settings: Settings, run_id: str) -> list[str]:
    async with opened(settings, Reporter()) as (_, engine):
        outcome = await engine.wait(run_id)
        if not outcome.ok:
            raise ImgpullError.of(machines.problem_of(outcome))
        return list(outcome.result("layers", machines.Removed).layers)


def collect(settings: Settings, dry_run: bool) -> dict[str, Any]:
    """Remove layers and cached blobs that nothing needs. Returns: their names, and the bytes of the blobs."""

    async def work() -> dict[str, Any]:
        async with opened(settings, Reporter()) as (app, engine):
            if dry_run:
                layers = await machines.removable(app)
            else:
                await _take_back(app, engine)
                outcome = await _do(engine, machines.COLLECT, "layers", machines.CollectRequest())
                layers = list(outcome.result("layers", machines.Removed).layers)
            blobs = await machines.trim_cache(app, dry_run=dry_run)
            partials = machines.drop_partials(app, dry_run=dry_run)
            return {
                "layers": layers,
                "blobs": [b for b, _ in blobs],
                "bytes": sum(n for _, n in blobs),
                "partials": partials,
            }

    return run(work)


def verify(settings: Settings, images: list[Image]) -> list[dict[str, Any]]:
    """Have root compare the layers of images with their manifests. Returns: one finding a layer."""

    async def work() -> list[dict[str, Any]]:
        findings: list[dict[str, Any]] = []
        with looking(settings) as lookup:
            if lookup is not None and (found := problems(lookup)):
                raise store.damaged("; ".join(found[:3]))
        connection = store.open_readonly(Paths.of(settings).database)
        if connection is None:
            return findings
        try:
            layers = {layer: None for i in images for layer in store.chain_of(connection, i.top)}
        finally:
            connection.close()
        for layer in layers:
            async with helper.connect(settings.helper_socket) as root:
                try:
                    files, count = await root.verify(layer)
                    findings.append({"layer": layer, "ok": True, "files": files, "bytes": count})
                except LayerAbsentError:
                    findings.append({"layer": layer, "ok": False, "reason": "root does not hold this layer"})
                except ImgpullError as error:
                    if error.problem.code not in ("digest-mismatch", "io-error"):
                        raise
                    findings.append({"layer": layer, "ok": False, "reason": error.problem.what})
        return findings

    return run(work)


def inventory(settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the helper's greeting, its layers and the caller's activations."""

    async def work() -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        async with helper.connect(settings.helper_socket) as root:
            return root.greeting, *await root.inventory()

    return run(work)


def fetcher_ready(settings: Settings) -> protocol.Ready:
    """Start a fetcher and return its greeting: which sandbox holds and whose credentials it found."""

    async def work() -> protocol.Ready:
        async with running(settings, Reporter()) as app:
            session = await app.fetcher(endpoint_of(settings))
            return await session.greeting()

    return run(work)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What S3 answers when it is asked for an image, and what it says the time is."""

    layers: list[machines.LayerSpec]
    error: ImgpullError | None
    clock_ahead_s: int | None


def ask_bucket(settings: Settings, reference: Reference) -> Bucket:
    """Ask S3 which layers an image has."""
    endpoint = endpoint_of(settings)
    request = machines.PullRequest(ref=str(reference), source=settings.source, endpoint=endpoint, name=None)

    async def work() -> Bucket:
        async with running(settings, Reporter()) as app:
            session = await app.fetcher(endpoint)
            try:
                layers = (await machines.pin_layers(app, request)).layers
            except ImgpullError as error:
                return Bucket([], error, session.clock_ahead_s)
            return Bucket(layers, None, session.clock_ahead_s)

    return run(work)


# ---------------------------------------------------------------- runs


@contextmanager
def looking(settings: Settings) -> Generator[Lookup | None, None, None]:
    """Give the runs for reading, None where there are none yet."""
    with _translated(), open_lookup(str(Paths.of(settings).database), migrations=store.MIGRATIONS) as lookup:
        yield lookup


def run_record(lookup: Lookup, word: str) -> RunRecord:
    """Return the run with this id, or the only one that begins so."""
    found = lookup.begins(word.upper(), 2)
    if len(found) != 1:
        raise ImgpullError("no-such-run", f"{word}: {'more than one run begins so' if found else 'no such run here'}")
    return found[0]


def resume(settings: Settings, report: Reporter, run_id: str | None) -> list[dict[str, Any]]:
    """Go on with interrupted runs. Returns: how each ended."""

    async def work() -> list[dict[str, Any]]:
        async with opened(settings, report) as (_, engine):
            one = await engine.read(lambda _: run_record(engine.lookup, run_id)) if run_id else None
            taken = [one.id] if one and not one.active else await engine.resume(one.id if one else None)
            if one and not taken and (await engine.read(lambda _: engine.lookup.run(one.id))).active:
                raise ImgpullError(
                    "busy", f"run {one.id} is at work in another process", advice=f"`imgpull runs {one.id}` shows it"
                )
            outcomes = [await engine.wait(run_id) for run_id in taken]
            return [{"run": o.run_id, "state": o.kind, "reason": o.reason} for o in outcomes]

    return run(work)


def cancel(settings: Settings, run_id: str) -> tuple[str, str, bool]:
    """Cancel a run. Returns: its id, how it ended, and whether it had ended before."""

    async def work() -> tuple[str, str, bool]:
        async with opened(settings, Reporter()) as (_, engine):
            record = await engine.read(lambda _: run_record(engine.lookup, run_id))
            await engine.cancel(record.id, cause="cancelled by the user")
            return record.id, (await engine.wait(record.id)).kind, not record.active

    return run(work)
