"""The machines of this program, as tables: pull and its layers, activate, deactivate, remove.

Rule 1: a step first looks whether its result is there already, by content; only then does it work.
Rule 2: every effect outside the database is idempotent, so that a step that is run again after a crash ends the same.
Rule 3: a pull is a parent; each distinct layer is a child run of its own, so that images, and programs run at the same
        time, share the work of a shared layer. Layer k is checked while k+1 is fetched and k-1 is committed.

The key of a layer run is the digest of all that decides what comes out: the pinned objects from the lowest layer up to
this one, where they lie, and the limits in force.
"""

import fcntl
import hashlib
import json
import os
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import trio
from pydantic import BaseModel, ConfigDict, Field

from broker import filesystem, imagefile, pins, protocol, reference, store, worker
from broker.app import App, nameless_file, publish, sealed_copy
from broker.console import escape
from broker.console import size as size_text
from broker.errors import ImgpullError, Problem
from broker.helper import Activation, Helper, LayerAbsentError
from broker.machine import Abort, Done, Lookup, Machine, Outcome, Policy, Retry, Run
from broker.reference import Reference
from broker.refusal import rejected

PARTIAL_AGE_S = 7 * 86400.0  # a pull that is not taken up again within a week
REMOVERS = ("remove", "collect")  # the machines that take layers away


class Model(BaseModel):
    """What a run keeps in the database: strict and frozen."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def classify(error: Exception) -> bool | Abort | Retry:
    """Say whether a step's error is worth another attempt, and keep the whole Problem in the run."""
    if isinstance(error, ImgpullError):
        problem = error.problem
        retry = problem.details.get("retry", problem.kind.retryable)
        make = Retry if retry else Abort
        return make(problem.what, kind=problem.code, detail={"problem": problem.dump()})
    if isinstance(error, OSError):
        code = "no-room" if error.errno in (28, 122) else "io-error"  # ENOSPC, EDQUOT
        problem = Problem(code, f"{error.filename or 'a file'}: {error.strerror}")
        return Abort(problem.what, kind=code, detail={"problem": problem.dump()})
    return isinstance(error, trio.TooSlowError)


def abort(problem: Problem) -> Abort:
    """Return the signal that ends a run with this problem."""
    return Abort(problem.what, kind=problem.code, detail={"problem": problem.dump()})


def problem_of(outcome: Outcome) -> Problem:
    """Return what a run that did not end well has to say to the user."""
    if "problem" in outcome.detail:
        return Problem.load(str(outcome.detail["problem"]))
    if outcome.kind == "cancelled":
        return Problem("interrupted", f"cancelled: {outcome.reason or 'no cause given'}")
    if outcome.kind == "quarantined":
        return Problem(
            "state-damaged",
            "the run is of another version of this program, or its row is damaged",
            outcome.reason or "",
            "give the same command again: it starts anew and finds what is done already",
        )
    return Problem("bug", outcome.sentence, outcome.error_kind or "")


NETWORK = Policy(attempts=5, retry_on=classify)
LOCAL = Policy(attempts=6, retry_on=classify)
ROOT = Policy(attempts=6, retry_on=classify)

# ---------------------------------------------------------------- one layer


class LayerRequest(Model):
    """One layer to bring into the store. ``chain`` is its own key, ``lower`` the key of the layer below it."""

    number: Annotated[int, Field(ge=1, le=protocol.MAX_LAYERS)]
    media: Literal["tar", "tar+gzip", "tar+zstd", "tar+bzip2", "tar+xz"]
    pin: protocol.Pin
    endpoint: protocol.Endpoint
    origin: str  # the endpoint's URL in force
    chain: str
    lower: str | None
    lower_run: str | None
    expect: protocol.Digest | None = None


class Blob(Model):
    """The bytes of a layer are known by digest; ``transferred`` of them came over the network just now."""

    digest: protocol.Digest
    transferred: int


class Checked(Model):
    """The layer is known by content."""

    layer: protocol.Digest
    parent: protocol.Digest | None
    reused: bool


class Committed(Model):
    """The helper has sealed the layer."""

    layer: protocol.Digest
    reused: bool


STAGES = {"fetch": "fetching", "check": "checking", "commit": "committing"}  # what a layer's step is on the screen


def label(key: str) -> str:
    """Return a layer's name on the screen: the last two words of its key."""
    return "/".join(key.split("/")[-2:])


async def fetch_layer(run: Run[LayerRequest]) -> Blob:
    """Bring the blob into the cache, unless nothing further needs its bytes."""
    app, asked = _app(run), run.request
    app.report.stage(asked.chain, "waiting", 0, asked.pin.size)
    digest = await app.read(store.known_digest, asked.origin, asked.pin.bucket, asked.pin.etag, asked.pin.size)
    if digest is not None:
        _expect(asked, digest)
        known = await app.read(store.chained, asked.chain)
        if app.paths.blob(digest).exists() or (known and await app.read(store.is_committed, known[0])):

            def reuse(db: Any) -> None:
                store.touch_blob(db, digest)
                store.record_pin(db, asked.origin, asked.pin, digest)

            run.on_commit(reuse)
            return Blob(digest=digest, transferred=0)
    app.report.stage(asked.chain, "fetching", 0, asked.pin.size)
    session = await app.fetcher(asked.endpoint)
    fetched = await session.fetch(
        asked.pin,
        asked.expect,
        lambda done: app.report.stage(asked.chain, "fetching", done, asked.pin.size),
        lambda message: app.report.notice(f"{label(asked.pin.key)}: {message}", layer=label(asked.pin.key)),
    )
    app.report.stage(asked.chain, "fetching", asked.pin.size, asked.pin.size)
    app.report.stage(asked.chain, "waiting", 0, asked.pin.size)

    def record(db: Any) -> None:
        store.record_blob(db, fetched.digest, fetched.size)
        store.record_pin(db, asked.origin, asked.pin, fetched.digest)

    run.on_commit(record)
    return Blob(digest=fetched.digest, transferred=fetched.transferred_bytes)


def _expect(asked: LayerRequest, digest: str) -> None:
    if asked.expect and asked.expect != digest:
        raise ImgpullError(
            "digest-mismatch",
            f"{asked.pin.key}: the content is not what is expected",
            f"it is {digest}, not {asked.expect}",
        )


async def check_layer(run: Run[LayerRequest]) -> Checked:
    """Turn the blob into a manifest on top of the lower layers, unless these very bytes were checked before."""
    app, asked = _app(run), run.request
    digest = run.result("fetch", Blob).digest
    await _after_removals(run)
    parent = await _lower_layer(run)
    known = await app.read(store.verdict, digest, asked.media, parent, app.limits)
    if known is not None and await _has_manifest(app, known):

        def reuse(db: Any) -> None:
            _refuse_doomed(db, known)
            store.record_chain(db, asked.chain, known, digest)

        run.on_commit(reuse)
        return Checked(layer=known, parent=parent, reused=True)
    accepted = await _check(run, digest, parent)
    app.report.stage(asked.chain, "checking", asked.pin.size, asked.pin.size)
    app.report.stage(asked.chain, "waiting", 0, accepted.content_bytes)

    def record(db: Any) -> None:
        _refuse_doomed(db, accepted.layer)
        store.record_layer(db, accepted, digest, asked.media, app.limits)
        store.record_chain(db, asked.chain, accepted.layer, digest)

    run.on_commit(record)
    return Checked(layer=accepted.layer, parent=parent, reused=False)


async def _has_manifest(app: App, layer: str) -> bool:
    """Tell whether a layer's manifest is here, or root could give it back."""
    try:
        os.close(await app.manifest_fd(layer))
    except LayerAbsentError:
        return False
    return True


async def _after_removals(run: Run[Any]) -> None:
    """Wait for the removals at work, and take up those whose process died: they may have chosen what this run needs.

    A removal that begins later sees the pull and spares its layers.
    """
    app = _app(run)
    for machine in REMOVERS:
        for removal in await app.read(lambda _, name=machine: app.engine.lookup.runs(name, active_only=True)):  # type: ignore[misc]
            await run.wait(removal.id)


def _refuse_doomed(db: Any, layer: str) -> None:
    """In the transaction that builds on a layer: refuse one that a removal may have chosen before it saw this run."""
    if store.has_layer(db, layer) and any(Lookup(db).runs(machine, active_only=True) for machine in REMOVERS):
        raise Retry("layers are being removed just now")


async def _lower_layer(run: Run[LayerRequest]) -> str | None:
    """Wait until the layer below is checked. Returns: its id, None for the lowest layer."""
    app, asked = _app(run), run.request
    if asked.lower is None:
        return None
    while True:
        moved = run.moved
        known = await app.read(store.chained, asked.lower)
        if known:
            return known[0]
        outcome = await app.peek(asked.lower_run) if asked.lower_run else None
        if outcome is not None and not outcome.ok:
            raise abort(problem_of(outcome))
        with run.rest():
            await moved.wait()


async def _blob_fd(run: Run[LayerRequest], digest: str) -> int:
    """Open a blob of the cache for reading; one that somebody has removed is fetched again."""
    app, asked = _app(run), run.request
    path = app.paths.blob(digest)
    while True:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            session = await app.fetcher(asked.endpoint)
            await session.fetch(asked.pin, digest)


async def _check(run: Run[LayerRequest], digest: str, parent: str | None) -> protocol.Accepted:
    """Run the checker on a blob; publish its manifest and, for a compressed blob, its payload."""
    app, asked = _app(run), run.request
    async with app.checkers:
        app.report.stage(asked.chain, "checking", 0, asked.pin.size)
        with ExitStack() as stack:
            lower = []
            for layer in await app.read(store.chain_of, parent):
                lower.append(await app.manifest_fd(layer))
                stack.callback(os.close, lower[-1])
            blob = await _blob_fd(run, digest)
            stack.callback(os.close, blob)
            manifest = stack.enter_context(nameless_file(app.paths.manifest("x").parent))
            payload = (
                None if asked.media == "tar" else stack.enter_context(nameless_file(app.paths.payload("x").parent))
            )
            job = protocol.CheckJob(
                media=asked.media, layer_number=asked.number, lower=lower, manifest_fd=manifest, payload_fd=payload
            )
            inherited = [*lower, manifest, *([payload] if payload is not None else [])]
            verdict = await worker.check(
                job,
                blob,
                inherited,
                lambda done: app.report.stage(asked.chain, "checking", done, asked.pin.size),
            )
            if isinstance(verdict, protocol.Rejected):
                raise rejected(asked.pin.key, verdict)
            if verdict.parent != parent:
                raise ImgpullError("worker-failed", "the checker speaks of another parent than it was given")
            if payload is not None:
                publish(payload, app.paths.payload(digest))
            publish(manifest, app.paths.manifest(verdict.layer))
            return verdict


async def commit_layer(run: Run[LayerRequest]) -> Committed:
    """Have root make the layer, unless it holds it already."""
    app, asked = _app(run), run.request
    checked = run.result("check", Checked)
    if await app.read(store.is_committed, checked.layer):
        app.report.stage(asked.chain, "shared")
        return Committed(layer=checked.layer, reused=True)
    if asked.lower_run is not None:
        outcome = await run.wait(asked.lower_run)
        if not outcome.ok:
            raise abort(problem_of(outcome))
    async with app.helper() as root:
        existed = await root.stat(checked.layer) == "sealed"
        if existed:
            await _claim(app, root, checked.layer)
        else:
            existed = await _commit(run, root, checked)
    app.report.stage(asked.chain, "shared" if existed else "ready")
    run.on_commit(lambda db: store.set_committed(db, checked.layer))
    return Committed(layer=checked.layer, reused=existed)


async def _claim(app: App, root: Helper, layer: str) -> None:
    """Tell root that a layer which somebody else has made is ours as well, so that his removal leaves it to us.

    Of a layer that it holds root reads the manifest only; any file will do for a payload.
    """
    with ExitStack() as stack:
        plain = await app.manifest_fd(layer)
        stack.callback(os.close, plain)
        try:
            await root.commit(stack.enter_context(sealed_copy(plain)), plain)
        except ImgpullError as error:
            if error.problem.code == "digest-mismatch" or isinstance(error, LayerAbsentError):
                raise Retry("root's layer went away just now") from error
            raise


async def _commit(run: Run[LayerRequest], root: Helper, checked: Checked) -> bool:
    """Hand manifest and payload to root. Returns: whether somebody else had made the layer meanwhile."""
    app, asked = _app(run), run.request
    app.report.stage(asked.chain, "committing")
    total = await app.read(store.content_bytes, checked.layer)
    with ExitStack() as stack:
        plain = await app.manifest_fd(checked.layer)
        stack.callback(os.close, plain)
        manifest = stack.enter_context(sealed_copy(plain))
        payload = await _payload_fd(run, checked)
        stack.callback(os.close, payload)
        try:
            layer, existed = await root.commit(
                manifest, payload, lambda _, done: app.report.stage(asked.chain, "committing", done, total)
            )
        except ImgpullError as error:
            if error.problem.code == "digest-mismatch":  # the cache is not what was checked: the next pull fetches anew
                app.paths.blob(run.result("fetch", Blob).digest).unlink(missing_ok=True)
            raise
    app.report.stage(asked.chain, "committing", total, total)
    if layer != checked.layer:
        raise ImgpullError("bug", "root computed another id for the layer", f"{layer}, not {checked.layer}")
    return existed


async def _payload_fd(run: Run[LayerRequest], checked: Checked) -> int:
    """Open the uncompressed tar of a layer for reading; what is not there is made again from the blob."""
    app, asked = _app(run), run.request
    digest = run.result("fetch", Blob).digest
    if asked.media == "tar":
        return await _blob_fd(run, digest)
    path = app.paths.payload(digest)
    if not path.exists():  # the verdict was known, so nothing was checked now; but root lacks the layer
        again = await _check(run, digest, checked.parent)
        if again.layer != checked.layer:
            raise ImgpullError("bug", "the same bytes made two different layers", f"{again.layer}, {checked.layer}")
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


async def drop_payload(run: Run[LayerRequest], outcome: Outcome) -> None:
    """Remove the uncompressed tar of a compressed layer, however its run ends."""
    if run.request.media != "tar" and "fetch" in outcome.results:
        _app(run).paths.payload(outcome.result("fetch", Blob).digest).unlink(missing_ok=True)


LAYER: Machine[LayerRequest] = (
    Machine("layer", LayerRequest, version=1)
    .start("fetch", fetch_layer, result=Blob, retry=NETWORK)
    .to("check", check_layer, result=Checked, retry=LOCAL)
    .to("commit", commit_layer, result=Committed, retry=ROOT)
    .finalise(drop_payload)
    .end("sealed")
)

# ---------------------------------------------------------------- one image


class PullRequest(Model):
    """One image to pull. ``expect`` gives a digest a layer, or none at all."""

    ref: str
    source: str  # the S3 world that the reference belongs to
    endpoint: protocol.Endpoint
    name: str | None  # of the activation; None makes none
    mode: Literal["ro", "rw"] = "rw"
    size: int = 0
    expect: list[protocol.Digest] = []
    pins: dict[str, protocol.Digest] | None = None  # what a pin file demands, by key; None: there is none


class LayerSpec(Model):
    """One layer of a resolved image."""

    number: int
    media: Literal["tar", "tar+gzip", "tar+zstd", "tar+bzip2", "tar+xz"]
    pin: protocol.Pin
    expect: protocol.Digest | None = None


class Resolved(Model):
    """The image's layers as they lie in S3 now."""

    origin: str
    layers: list[LayerSpec]


class Layers(Model):
    """All layers are sealed."""

    layers: list[protocol.Digest]
    transferred: int
    reused: int


class Activated(Model):
    """A device was given out."""

    name: str
    layer: protocol.Digest
    mode: Literal["ro", "rw"]
    device: str
    size: int


async def resolve(run: Run[PullRequest]) -> Resolved:
    """Ask S3 which layers the image has and pin them."""
    return await pin_layers(_app(run), run.request)


async def pin_layers(app: App, asked: PullRequest) -> Resolved:
    """Return the layers of an image as they lie in S3 now."""
    ref = Reference.parse(asked.ref)
    session = await app.fetcher(asked.endpoint)
    if ref.family:
        numbered = reference.order_layers(ref, await session.objects(ref.bucket, ref.prefix))
    else:
        numbered = reference.single_layer(ref, await session.head(ref.bucket, ref.path))
    demands = _demands(asked, ref, [n.object.key for n in numbered])
    assert session.ready is not None
    specs = [
        LayerSpec(number=n.number, media=n.media, pin=n.object, expect=expect)
        for n, expect in zip(numbered, demands, strict=True)
    ]
    return Resolved(origin=session.ready.endpoint, layers=specs)


def _demands(asked: PullRequest, ref: Reference, keys: list[str]) -> list[str | None]:
    """Return the digest that --expect or the pin file demands of each layer. Raises: ImgpullError."""
    if asked.expect and len(asked.expect) != len(keys):
        what = f"{ref}: {len(asked.expect)} digests are expected"
        raise ImgpullError("digest-mismatch", what, f"the image has {len(keys)} layers")
    if asked.pins is None:
        return list(asked.expect) or [None] * len(keys)
    pins.check_complete(ref, asked.pins, keys)
    pinned = [asked.pins[key] for key in keys]
    if asked.expect and list(asked.expect) != pinned:
        raise ImgpullError("digest-mismatch", f"{ref}: --expect and the pin file demand different digests")
    return list(pinned)


def chain_keys(resolved: Resolved, limits: str) -> list[str]:
    """Return the key of each layer's run, lowest first.

    Two objects of one bucket with the same strong ETag and size hold the same bytes, so the object's name is no part of
    the key: layers that lie under several names are one. The digest demanded is, so that no demand is skipped.
    """
    keys, lower = [], ""
    for spec in resolved.layers:
        pin = spec.pin
        name = "" if not pin.etag.startswith("W/") else f"{pin.key}@{pin.version}"
        facts = [limits, resolved.origin, pin.bucket, pin.etag, pin.size, name, spec.media, spec.expect or "", lower]
        lower = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        keys.append(lower)
    return keys


async def pull_layers(run: Run[PullRequest]) -> Layers:
    """Bring in all layers, each by a run of its own, and make the image visible when the last one is sealed."""
    app, asked = _app(run), run.request
    resolved = run.result("resolve", Resolved)
    keys = chain_keys(resolved, app.limits)
    app.report.begin(asked.ref, [(k, label(s.pin.key), s.pin.size) for k, s in zip(keys, resolved.layers, strict=True)])
    await _forget_what_root_lost(run, keys)
    results: dict[int, tuple[Blob, Committed]] = {}
    runs: list[str] = []
    for index, spec in enumerate(resolved.layers):
        request = LayerRequest(
            number=spec.number,
            media=spec.media,
            pin=spec.pin,
            endpoint=asked.endpoint,
            origin=resolved.origin,
            chain=keys[index],
            lower=keys[index - 1] if index else None,
            lower_run=runs[index - 1] if index else None,
            expect=spec.expect,
        )
        runs.append(await run.start_child(LAYER, keys[index], request))
    async with trio.open_nursery() as nursery:
        for index, child in enumerate(runs):
            nursery.start_soon(partial(_finish_layer, run, child, keys[index], index, results))
    ordered = [results[i] for i in range(len(runs))]
    layers = [committed.layer for _, committed in ordered]
    rows = [
        (s.number, s.pin.key, s.pin.etag, s.pin.version or "", s.pin.size, s.media, blob.digest, committed.layer)
        for s, (blob, committed) in zip(resolved.layers, ordered, strict=True)
    ]

    def record(db: Any) -> None:
        store.record_image(db, asked.ref, asked.source, rows, layers[-1])
        imagefile.publish(app.paths.image_dir, db, asked.ref, asked.source)

    run.on_commit(record)
    return Layers(
        layers=layers,
        transferred=sum(blob.transferred for blob, _ in ordered),
        reused=sum(committed.reused for _, committed in ordered),
    )


async def _finish_layer(
    run: Run[PullRequest], child: str, key: str, index: int, results: dict[int, tuple[Blob, Committed]]
) -> None:
    """Wait for one layer's run, whoever works on it."""
    app = _app(run)
    outcome = await run.wait(child)
    if not outcome.ok:
        app.report.stage(key, "failed")
        raise abort(problem_of(outcome))
    committed = outcome.result("commit", Committed)
    app.report.stage(key, "shared" if committed.reused else "ready")
    results[index] = (outcome.result("fetch", Blob), committed)


async def _forget_what_root_lost(run: Run[PullRequest], keys: list[str]) -> None:
    """Where we think that the whole image is there, ask root about its top layer: a pool may have been made anew."""
    app = _app(run)
    known = [await app.read(store.chained, key) for key in keys]
    layers = [k[0] for k in known if k]
    committed = [await app.read(store.is_committed, layer) for layer in layers]
    if len(layers) < len(keys) or not all(committed):
        return
    async with app.helper() as root:
        if await root.stat(layers[-1]) == "sealed":
            return
        held, _ = await root.inventory()
    sealed = {item["layer"] for item in held if item["state"] == "sealed"}
    async with app.engine.transaction() as db:
        for layer in layers:
            if layer not in sealed:
                store.set_committed(db, layer, False)


async def activate_pulled(run: Run[PullRequest]) -> Activated:
    """Give out a device with the image on it, if one was asked for."""
    asked = run.request
    if asked.name is None:
        raise Done
    top = run.result("layers", Layers).layers[-1]
    return await _activate(run, asked.ref, asked.source, top, asked.name, asked.mode, asked.size)


async def _activate(
    run: Run[Any], ref: str, endpoint: str, layer: str, name: str, mode: Literal["ro", "rw"], size: int
) -> Activated:
    app = _app(run)
    taken = await app.read(store.activation, name)
    wanted = (ref, layer, mode, size or (taken.size if taken else 0))
    if taken is not None and (taken.ref, taken.layer, taken.mode, taken.size) != wanted and taken.is_live():
        what = f"a {taken.mode} activation of {taken.ref}" + (
            ", of an older pull" if taken.ref == ref and taken.layer != layer else ""
        )
        raise ImgpullError(
            "busy",
            f"the name {name} is in use",
            f"it is {what}, {size_text(taken.size)}",
            f"choose another with --name, or `imgpull deactivate {name}` first",
            retry=False,
        )
    is_recorded = taken is not None and (taken.layer, taken.mode, taken.size) == (layer, mode, size)
    grows = bool(size) and mode == "rw" and not is_recorded
    async with app.helper() as root:
        try:
            if grows:
                await _make_way(app, root, name, taken)
            given = await root.activate(layer, name, mode, size)
        except LayerAbsentError as error:
            raise ImgpullError(
                "pool-unavailable", f"root has lost layer {layer}", str(error), "pull the image again"
            ) from error
    if grows:
        await filesystem.grow(given.device)
    if given.mount_fd is not None:
        os.close(given.mount_fd)  # a mount that lives as long as a descriptor is of no use to a finished run

    def record(db: Any) -> None:
        image = store.image_by_ref(db, ref, endpoint)
        if image is None:
            raise abort(Problem("no-such-image", f"{ref} was removed meanwhile"))
        store.record_activation(db, image.id, given)

    run.on_commit(record)
    return Activated(name=name, layer=layer, mode=mode, device=given.device, size=given.size)


async def _make_way(app: App, root: Helper, name: str, taken: store.ActivationRow | None) -> None:
    """Take away what a run has left under a name that died while it let the file system grow.

    What we have on record and root holds is its user's, with all that he wrote to it: it stays, and root will say that
    the name is in use. A record that root contradicts goes first: what is there without one is given back by a run that
    fails.
    """
    _, devices = await root.inventory()
    held = next((item for item in devices if item["name"] == name), None)
    if taken is not None:
        if _agree_on(taken, held):
            return
        async with app.engine.transaction() as db:
            store.forget_activation(db, name)
    if held is not None:
        await _deactivate_stale(root, name)


async def settle_record(run: Run[Any], outcome: Outcome) -> None:
    """Where a run fails that may have died between the image's record and its rows, let the record follow them."""
    app, asked = _app(run), run.request
    source = asked.source if isinstance(asked, PullRequest) else asked.endpoint
    if not outcome.ok:
        run.on_commit(lambda db: imagefile.settle(app.paths.image_dir, db, asked.ref, source))


async def agree_with_root(run: Run[Any], outcome: Outcome) -> None:
    """Where a run was ended between something that root did and our record of it, take over what root says."""
    if outcome.ok or (isinstance(run.request, PullRequest) and outcome.step != "activate"):
        return
    app, asked = _app(run), run.request
    try:
        async with app.helper() as root:
            grew = isinstance(asked, PullRequest | ActivateRequest) and asked.name and asked.size
            if grew and await app.read(store.activation, asked.name) is None:
                await _deactivate_stale(root, asked.name)  # its file system may be half grown
            for name in await _follow_root(run, root, await _concerned(run)):
                await root.deactivate(name)  # nobody was told of it, and no image is left that it could belong to
    except ImgpullError as error:
        run.log("disagreement", {"reason": error.problem.what})  # `imgpull gc` compares again


async def _concerned(run: Run[Any]) -> set[str] | None:
    """Return the names of the devices that a run is about; None for all."""
    asked = run.request
    if isinstance(asked, CollectRequest):
        return None
    if isinstance(asked, RemoveRequest):
        return {row.name for row in await _app(run).read(store.activations) if row.ref == asked.ref}
    return {asked.name} if asked.name is not None else set()


async def _follow_root(run: Run[Any], root: Helper, names: set[str] | None) -> list[str]:
    """Have our record of layers, and of the devices of these names, follow root's. Returns: devices of no image here.

    Ours is read first: what appears in it later is newer than root's answer and stays.
    """
    app = _app(run)
    committed = await app.read(store.committed_layers)
    known = {row.name: row for row in await app.read(store.activations)}
    images = {image.top: image.id for image in reversed(await app.read(store.images))}
    layers, devices = await root.inventory()
    lost = set(committed) - {item["layer"] for item in layers if item["state"] == "sealed"}
    held = {item["name"]: item for item in devices}
    wrong = [name for name in sorted(known.keys() | held.keys()) if not _agree_on(known.get(name), held.get(name))]
    wrong = [name for name in wrong if names is None or name in names]

    def write(db: Any) -> None:
        for layer in lost:
            store.set_committed(db, layer, False)
        still = {image.top: image.id for image in reversed(store.images(db))}  # one may have been removed meanwhile
        for name in wrong:
            if store.activation(db, name) != known.get(name):
                continue
            store.forget_activation(db, name)
            if (item := held.get(name)) is not None and item["layer"] in still:
                given = Activation(name, item["layer"], item["mode"], item["device"], item["size"])
                store.record_activation(db, still[item["layer"]], given)

    run.on_commit(write)
    return [name for name in wrong if name in held and held[name]["layer"] not in images]


def _agree_on(row: store.ActivationRow | None, item: dict[str, Any] | None) -> bool:
    """Tell whether what is recorded under a name is what root holds under it.

    It need not be: a device is taken back, the name given out anew, and both runs die before they record it.
    """
    if row is None or item is None:
        return row is None and item is None
    return (row.layer, row.mode, row.size) == (item["layer"], item["mode"], item["size"])


PULL: Machine[PullRequest] = (
    Machine("pull", PullRequest, version=1)
    .start("resolve", resolve, result=Resolved, retry=NETWORK)
    .to("layers", pull_layers, result=Layers, retry=Policy(attempts=1, retry_on=classify))
    .to("activate", activate_pulled, result=Activated, retry=ROOT)
    .finalise(settle_record)
    .finalise(agree_with_root)
    .end("ready")
)

# ---------------------------------------------------------------- activations and removal


class ActivateRequest(Model):
    """One more device of an image that is here."""

    ref: str
    endpoint: str
    layer: protocol.Digest
    name: str
    mode: Literal["ro", "rw"]
    size: int = 0


class NameRequest(Model):
    """An activation to end."""

    name: str


class RemoveRequest(Model):
    """An image to forget, and its layers that nothing else needs."""

    ref: str
    endpoint: str


class CollectRequest(Model):
    """Remove whatever nothing needs."""


class Removed(Model):
    """Layers that root has removed."""

    layers: list[protocol.Digest]


async def activate_image(run: Run[ActivateRequest]) -> Activated:
    """Give out a device."""
    asked = run.request
    return await _activate(run, asked.ref, asked.endpoint, asked.layer, asked.name, asked.mode, asked.size)


async def deactivate_name(run: Run[NameRequest]) -> None:
    """Take a device back; one that root does not know is forgotten all the same."""
    app, name = _app(run), run.request.name
    known = await app.read(store.activation, name) is not None
    async with app.helper() as root:
        try:
            await root.deactivate(name)
        except ImgpullError as error:
            if error.problem.code != "no-such-activation" or not known:
                raise
    run.on_commit(lambda db: store.forget_activation(db, name))


async def forget(run: Run[RemoveRequest]) -> None:
    """Make the image invisible; refused while a device of it is given out."""
    app, asked = _app(run), run.request
    image = await app.read(store.image_by_ref, asked.ref, asked.endpoint)
    if image is None:
        return
    known = {row.name: row for row in await app.read(store.activations)}
    ours = [row for row in known.values() if row.image == image.id]
    async with app.helper() as root:
        _, devices = await root.inventory()
        held = {item["name"]: item for item in devices}
        unknown = [item for item in devices if not _agree_on(known.get(item["name"]), item)]
        stray = [item for item in unknown if item["layer"] == image.top]
        live = [row.name for row in ours if row.is_live()] + [item["name"] for item in stray if item["live"]]
        if live:
            raise ImgpullError(
                "busy",
                f"{asked.ref} is in use",
                f"activated as {', '.join(live)}",
                f"`imgpull deactivate {live[0]}` first",
                retry=False,
            )
        stale = [row.name for row in ours if _agree_on(row, held.get(row.name))] + [item["name"] for item in stray]
        for name in stale:
            await _deactivate_stale(root, name)

    def write(db: Any) -> None:
        for name in {*stale, *(row.name for row in ours)}:
            if store.activation(db, name) == known.get(name):
                store.forget_activation(db, name)
        if store.activations(db, image.id):
            raise Retry("a device of it was given out just now")
        store.forget_image(db, image.id)
        imagefile.withdraw(app.paths.image_dir, asked.ref, asked.endpoint)

    run.on_commit(write)


async def _deactivate_stale(root: Helper, name: str) -> None:
    """End an activation that is on root's books only; none is fine."""
    try:
        await root.deactivate(name)
    except ImgpullError as error:
        if error.problem.code != "no-such-activation":
            raise


async def agree(run: Run[CollectRequest]) -> None:
    """Have our record of layers and devices follow root's."""
    async with _app(run).helper() as root:
        for name in await _follow_root(run, root, None):
            _app(run).report.notice(f"root holds a device {name} of yours that belongs to no image here")


async def remove_layers(run: Run[Any]) -> Removed:
    """Have root remove every layer that no image stands on, the highest first; what others use stays."""
    app = _app(run)
    removed: list[str] = []
    unused = await removable(app)
    if unused:
        async with app.engine.transaction() as db:  # the intent first: whoever needs one of them from now on asks root
            for layer in unused:
                store.set_committed(db, layer, False)
        kept: set[str] = set()
        async with app.helper() as root:
            for layer in unused:
                if layer in kept:
                    continue
                if await _remove_unused(root, layer):
                    removed.append(layer)
                else:
                    kept.update(await app.read(store.chain_of, layer))
    for layer in removed:
        app.report.notice(f"removed layer {escape(layer)[:19]}", layer=layer)

    def write(db: Any) -> None:
        for layer in removed:
            store.forget_layer(db, layer)

    run.on_commit(write)
    return Removed(layers=removed)


async def drop_manifests(run: Run[Any], outcome: Outcome) -> None:
    """Remove the manifests of layers that are forgotten; not before, since whoever has the row needs the manifest."""
    app = _app(run)
    for layer in outcome.result("layers", Removed).layers if "layers" in outcome.results else ():
        if not await app.read(store.has_layer, layer):
            app.paths.manifest(layer).unlink(missing_ok=True)


async def removable(app: App) -> list[str]:
    """Return the layers that neither an image nor a pull or a layer at work stands on, each before its parent.

    First the pulls, then the images: a pull that ends in between has its image by then. A layer's run may outlive the
    pull that began it, and the next pull joins it: what it has checked must be there still.
    """
    needed: set[str] = set()
    for active in await app.read(lambda _: app.engine.lookup.runs("pull", active_only=True)):
        results = await app.read(lambda _, run=active: app.engine.lookup.results(run))  # type: ignore[misc]
        if "resolve" not in results:
            continue  # it has built on nothing yet, and will wait for us when it does
        keys = chain_keys(Resolved.model_validate_json(results["resolve"]), app.limits)
        for found in [await app.read(store.chained, key) for key in keys]:
            needed.update(await app.read(store.chain_of, found[0]) if found else [])
    for active in await app.read(lambda _: app.engine.lookup.runs("layer", active_only=True)):
        results = await app.read(lambda _, run=active: app.engine.lookup.results(run))  # type: ignore[misc]
        if "check" in results:
            needed.update(await app.read(store.chain_of, Checked.model_validate_json(results["check"]).layer))
    return [layer for layer in await app.read(store.unused_layers) if layer not in needed]


async def trim_cache(app: App, *, dry_run: bool = False) -> list[tuple[str, int]]:
    """Remove blobs beyond the cache's size, least recently used first. Returns: digest and bytes of each.

    What a layer at work has fetched stays, however large it is. The folder tells what is there, our record only when it
    was used: a process that dies between the two leaves the one without the other.
    """
    used_ms = await app.read(store.blobs_by_age)
    files = {f"sha256:{entry.name}": entry.stat() for entry in _entries(app.paths.blob_dir / "sha256")}
    total = sum(found.st_size for found in files.values())
    at_work = await _blobs_in_use(app) if total > app.settings.cache_size else set()
    chosen: list[tuple[str, int]] = []
    for digest in sorted(files.keys() - at_work, key=lambda d: max(used_ms.get(d, 0), files[d].st_mtime_ns // 10**6)):
        if total <= app.settings.cache_size:
            break
        total -= files[digest].st_size
        chosen.append((digest, files[digest].st_size))
    if dry_run:
        return chosen
    await _drop_payloads(app)
    await _drop_manifests(app)
    for digest, _ in chosen:
        app.paths.blob(digest).unlink(missing_ok=True)
    gone = used_ms.keys() - files.keys() | {digest for digest, _ in chosen}
    if gone:
        async with app.engine.transaction() as db:
            for digest in gone:
                store.forget_blob(db, digest)
    return chosen


async def _drop_payloads(app: App) -> None:
    """Remove the uncompressed tars of layers that are not at work any more; their own end could not."""
    left = _entries(app.paths.cache / "payloads")
    at_work = await _blobs_in_use(app) if left else set()
    for entry in left:
        if f"sha256:{entry.name.removesuffix('.tar')}" not in at_work:
            with suppress(FileNotFoundError):
                os.unlink(entry.path)


async def _drop_manifests(app: App) -> None:
    """Remove the manifests of layers that are forgotten; a disk's error may have kept the removal itself from it."""

    def orphans(db: Any) -> list[str]:
        return [entry.path for entry in found if not store.has_layer(db, f"sha256:{entry.name.removesuffix('.jsonl')}")]

    found = [entry for entry in _entries(app.paths.manifest("x").parent) if entry.name.endswith(".jsonl")]
    if await app.read(orphans):
        async with (
            app.engine.transaction() as db
        ):  # no layer begins meanwhile; one at work may be about to write its row
            if not Lookup(db).runs("layer", active_only=True):
                for path in orphans(db):
                    with suppress(FileNotFoundError):
                        os.unlink(path)


async def _blobs_in_use(app: App) -> set[str]:
    """Return the digests of the blobs that layers at work, of any process, have fetched."""
    used = set()
    for active in await app.read(lambda _: app.engine.lookup.runs("layer", active_only=True)):
        results = await app.read(lambda _, run=active: app.engine.lookup.results(run))  # type: ignore[misc]
        if "fetch" in results:
            used.add(Blob.model_validate_json(results["fetch"]).digest)
    return used


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return list(entries)
    return []


def drop_partials(app: App, *, dry_run: bool = False) -> list[str]:
    """Remove blobs that were begun and given up long ago; what a fetcher works on is locked by it and stays."""
    dropped = []
    oldest_s = time.time() - PARTIAL_AGE_S
    for path in sorted((app.paths.blob_dir / "partial").glob("*.map")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if path.stat().st_mtime < oldest_s:
                dropped.append(path.stem)
                if not dry_run:
                    path.with_suffix(".data").unlink(missing_ok=True)
                    path.unlink(missing_ok=True)
    return dropped


async def _remove_unused(root: Helper, layer: str) -> bool:
    """Remove one layer. Returns: whether it is gone for us; False where a device or a layer needs it."""
    try:
        await root.remove(layer)
    except ImgpullError as error:
        if error.problem.code == "busy":
            return False
        if error.problem.code != "not-permitted":  # it is not ours, or not any more
            raise
    return True


ACTIVATE: Machine[ActivateRequest] = (
    Machine("activate", ActivateRequest, version=1)
    .start("activate", activate_image, result=Activated, retry=ROOT)
    .finalise(agree_with_root)
    .end("active")
)
DEACTIVATE: Machine[NameRequest] = (
    Machine("deactivate", NameRequest, version=1)
    .start("deactivate", deactivate_name, retry=ROOT)
    .finalise(agree_with_root)
    .end("inactive")
)
REMOVE: Machine[RemoveRequest] = (
    Machine("remove", RemoveRequest, version=1)
    .start("forget", forget, retry=ROOT)
    .to("layers", remove_layers, result=Removed, retry=ROOT)
    .finalise(drop_manifests)
    .finalise(settle_record)
    .finalise(agree_with_root)
    .end("removed")
)
COLLECT: Machine[CollectRequest] = (
    Machine("collect", CollectRequest, version=2)
    .start("agree", agree, retry=ROOT)
    .to("layers", remove_layers, result=Removed, retry=ROOT)
    .finalise(drop_manifests)
    .finalise(agree_with_root)
    .end("clean")
)
MACHINES = (PULL, LAYER, ACTIVATE, DEACTIVATE, REMOVE, COLLECT)


def _app(run: Run[Any]) -> App:
    app = run.app
    assert isinstance(app, App)
    return app
