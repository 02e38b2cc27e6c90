"""What each command does. Every function takes the settings in force and returns its exit code.

Rule 1: what can be answered from the state is answered by looking, without the engine, a transaction, trio or root.
Rule 2: work is a run of a machine (broker/pull.py), so that it survives whatever happens to this process.
Rule 3: the result alone goes to standard output.
"""

import json
import os
import platform
import sys
import time
import tomllib
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from broker import console, store
from broker import pins as pin_files
from broker.console import Column
from broker.errors import CATALOGUE, ImgpullError, UsageError
from broker.reference import NAME, Reference, clean_name, media_of
from broker.settings import POLICY_DIR, SETTINGS, Settings, parse_size
from broker.store import ActivationRow, Image, Paths

if TYPE_CHECKING:
    from broker.machine import RunRecord


def _print_json(value: Any) -> None:
    print(json.dumps(value, sort_keys=True, indent=2))


def _result(kind: str, as_json: bool, text: str, **fields: Any) -> None:
    """Print what a command that changes something has achieved."""
    if as_json:
        print(
            json.dumps(
                {"v": 1, "type": "result", "result": kind, "time": round(time.time(), 3), **fields}, sort_keys=True
            )
        )
    elif text:
        print(text)


# ---------------------------------------------------------------- looking


def _images(settings: Settings) -> list[Image]:
    found = store.open_readonly(Paths.of(settings).database)
    if found is None:
        return []
    with closing(found) as db:
        return store.images(db)


def find_image(settings: Settings, word: str) -> Image:
    """Return the one image that a word means.

    Raises: ImgpullError `no-such-image`, UsageError where it means several.
    """
    found: list[Image] = []
    connection = store.open_readonly(Paths.of(settings).database)
    if connection is not None:
        with closing(connection) as db:
            found = store.find_images(db, word)
    if not found:
        raise ImgpullError(
            "no-such-image",
            f"{word}: no such image here",
            advice="`imgpull ls` lists them; `imgpull pull REF` brings one",
        )
    if len(found) > 1:
        raise UsageError(
            f"{word} means {len(found)} images", ", ".join(i.ref for i in found), "write the whole reference"
        )
    return found[0]


IMAGE_COLUMNS = [
    Column("image", lambda i: i.ref),
    Column("id", lambda i: i.short),
    Column("layers", lambda i: i.layers, str, right=True),
    Column("size", lambda i: i.bytes, console.size, right=True),
    Column("content", lambda i: i.content_bytes, console.size, right=True),
    Column("pulled", lambda i: i.pulled_ms, lambda ms: ago(ms)),
    Column("endpoint", lambda i: i.endpoint, lambda e: console.escape(e or "aws")),
]
ACTIVATION_COLUMNS = [
    Column("name", lambda a: a.name),
    Column("device", lambda a: a.device),
    Column("mode", lambda a: a.mode),
    Column("size", lambda a: a.size, console.size, right=True),
    Column("live", lambda a: a.is_live(), lambda live: "yes" if live else "no (re-activate)"),
    Column("image", lambda a: a.ref),
]


def ago(then_ms: int) -> str:
    """Return how long ago something was: `3 minutes ago`."""
    seconds = max(0, store.now_ms() - then_ms) // 1000
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' * (count != 1)} ago"
    return "just now"


def _table(rows: list[Any], columns: list[Column], **options: Any) -> None:
    try:
        text = console.table(rows, columns, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if text:
        print(text)


def ls(settings: Settings, *, activations: bool, **options: Any) -> int:
    """List images or activations."""
    if not activations:
        if options["chosen"] is None and not options["as_json"]:
            options["chosen"] = "image,id,layers,size,pulled"  # what fits into 80 columns
        _table(_images(settings), IMAGE_COLUMNS, **options)
        return 0
    rows: list[ActivationRow] = []
    found = store.open_readonly(Paths.of(settings).database)
    if found is not None:
        with closing(found) as db:
            rows = store.activations(db)
    _table(rows, ACTIVATION_COLUMNS, **options)
    return 0


def show(settings: Settings, *, image: str, as_json: bool) -> int:
    """Show one image."""
    chosen = find_image(settings, image)
    connection = store.open_readonly(Paths.of(settings).database)
    assert connection is not None
    with closing(connection) as db:
        layers = store.image_layers(db, chosen.id)
        given = store.activations(db, chosen.id)
    if as_json:
        _print_json(
            {
                "image": chosen.ref,
                "endpoint": chosen.endpoint,
                "top": chosen.top,
                "pulled_ms": chosen.pulled_ms,
                "layers": layers,
                "activations": [
                    {"name": a.name, "device": a.device, "mode": a.mode, "size": a.size, "live": a.is_live()}
                    for a in given
                ],
            }
        )
        return 0
    print(f"image    {console.escape(chosen.ref)}")
    print(f"from     {console.escape(chosen.endpoint or 'aws')}")
    print(f"top      {chosen.top}")
    print(f"pulled   {ago(chosen.pulled_ms)}")
    for layer in layers:
        shared = f", shared by {layer['images']} images" if layer["images"] > 1 else ""
        print(f"\nlayer {layer['number']:<3}{layer['layer']}")
        print(
            f"  object   {console.escape(layer['key'])}  {console.size(layer['size'])}"
            f"  etag {console.escape(layer['etag'])}"
            + (f"  version {console.escape(layer['version'])}" if layer["version"] else "")
        )
        print(f"  sha256   {layer['digest'].removeprefix('sha256:')}")
        print(f"  fetched  {ago(layer['fetched_ms'])} for the first time")
        print(f"  entries  {layer['entries']}, {console.size(layer['content_bytes'])} of files{shared}")
        for rule, count in layer["notes"]["dropped"].items():
            print(f"  dropped  {count} x {rule}")
        for name in layer["notes"]["omitted"]:
            print(f"  omitted  {console.escape(name)}")
        for warning in layer["notes"]["warnings"]:
            print(f"  note     {warning['rule']}: {console.escape(warning['reason'])}")
    for row in given:
        print(f"\nactivation {row.name}  {row.device}  {row.mode}  {'live' if row.is_live() else 'not live'}")
    return 0


def pins(settings: Settings, *, images: tuple[str, ...], as_json: bool) -> int:
    """Print what the objects of images held when they were first fetched, as a pin file."""
    chosen = [find_image(settings, image) for image in images]
    rows: dict[str, str] = {}
    connection = store.open_readonly(Paths.of(settings).database)
    if connection is not None:
        with closing(connection) as db:
            for image in chosen if images else store.images(db):
                rows |= pin_files.listed(image.ref, store.image_layers(db, image.id))
    if as_json:
        _print_json([{"object": name, "digest": digest} for name, digest in rows.items()])
        return 0
    for name, digest in rows.items():
        print(f"{digest}  {console.escape(name)}")
    return 0


def known_words(settings: Settings, kind: str) -> list[str]:
    """Return the words that a shell can complete: images by their short names, devices, runs, or codes and rules."""
    if kind == "words":
        return [*CATALOGUE, *_rules()]
    connection = store.open_readonly(Paths.of(settings).database)
    if connection is None:
        return []
    with closing(connection) as db:
        if kind == "runs":
            return [row["id"] for row in store.query(db, "SELECT id FROM run ORDER BY seq DESC LIMIT 100")]
        if kind == "activations":
            return [row.name for row in store.activations(db)]
        return [image.ref.rstrip("/").rsplit("/", 1)[-1] for image in store.images(db)]


# ---------------------------------------------------------------- pulling


def pull(
    settings: Settings,
    *,
    ref: str,
    name: str | None,
    refresh: bool,
    no_activate: bool,
    size: str | None,
    expect: tuple[str, ...],
    quiet: bool,
    timing: bool,
    as_json: bool,
) -> int:
    """Pull an image and activate it."""
    reference = Reference.parse(ref)
    size_bytes = _size(size)
    wanted = None if no_activate else _name(name, reference.default_name)
    demands = pin_files.demanded(settings.pin_file, reference)
    if not refresh and not expect:
        ready = store.quick_lookup(Paths.of(settings), str(reference), settings.source, wanted, demands)
        if ready is not None:
            _pulled(as_json, quiet, str(reference), ready[0].top, ready[1].device if ready[1] else None, None)
            return 0
    from broker import metrics, work

    report = console.reporter(settings.progress, as_json, quiet)
    with metrics.kept(settings):
        done = work.pull(settings, report, reference, wanted, size_bytes, list(expect), demands, refresh)
    if timing:
        done.summary["timing"] = report.timing()
        if not as_json:
            _print_timing(done.summary)
    _pulled(as_json, quiet, str(reference), done.top, done.device, done.summary)
    return 0


def _took(word: str) -> Column:
    def show(row: tuple[float, int]) -> str:
        return f"{row[0]:.1f} s {console.size(row[1]):>9}" if row[1] else "-"

    return Column(word, lambda r: (r[f"{word}_s"], r[f"{word}_bytes"]), show, right=True)


TIMING_COLUMNS = [
    Column("layer", lambda r: r["layer"]),
    *map(_took, console.WORK.values()),
    Column("waited", lambda r: r["waited_s"], lambda s: f"{s:.1f} s", right=True),
]


def _print_timing(summary: dict[str, Any]) -> None:
    """Tell where the time of a pull went: by layer and stage, waiting apart; then its steps one after the other."""
    print(console.table(summary["timing"], TIMING_COLUMNS), file=sys.stderr)
    print(", ".join(f"{step} {seconds:.1f} s" for step, seconds in summary["steps"].items()), file=sys.stderr)


def _pulled(as_json: bool, quiet: bool, ref: str, top: str, device: str | None, summary: dict[str, Any] | None) -> None:
    if not as_json and not quiet:
        text = "is ready, nothing to do" if summary is None else summary["text"]
        print(f"{console.escape(ref)}: {text}", file=sys.stderr)
    numbers = {k: v for k, v in (summary or {}).items() if k != "text"}
    _result("pull", as_json, device or top, image=ref, top=top, device=device, changed=summary is not None, **numbers)


PLAN_COLUMNS = [
    Column("layer", lambda r: r["layer"], str, right=True),
    Column("state", lambda r: r["state"]),
    Column("fetch", lambda r: r["fetch_bytes"], console.size, right=True),
    Column("store", lambda r: 0 if r["state"] == "here" else r["bytes"], console.size, right=True),
    Column("object", lambda r: r["object"]),
]


def plan(settings: Settings, *, ref: str, name: str | None, no_activate: bool, as_json: bool) -> int:
    """Show what a pull would do."""
    from broker.plan import plan as make_plan

    reference = Reference.parse(ref)
    found = make_plan(settings, reference, None if no_activate else _name(name, reference.default_name))
    if as_json:
        _print_json(found)
    else:
        _print_plan(found)
    return 73 if found["fits"] is False else 0


def _print_plan(found: dict[str, Any]) -> None:
    _table(found["layers"], PLAN_COLUMNS)
    about = "" if found["exact"] else "at least "
    print(f"\nto fetch       {console.size(found['fetch_bytes'])}")
    print(f"to store       {about}{console.size(found['store_bytes'])}")
    pool = found["pool"]
    if pool is not None:
        blocks = f"{found['data_blocks']} blocks of {pool['block_bytes'] // 1024} KiB"
        metadata = f", {console.size(found['metadata_bytes'])} of metadata" if pool["metadata_bytes"] else ""
        print(f"to reserve     {about}{blocks}{metadata}")
    print(f"asked of root  {_count(found['commits'], 'commit')}, {_count(found['activations'], 'activation')}")
    if pool is None:
        print(f"pool           unknown: {console.escape(found['pool_error'])}")
    else:
        print(f"pool           {'has room' if found['fits'] else 'HAS NO ROOM'}: {_pool_share(pool)}")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _pool_share(figures: dict[str, Any]) -> str:
    return _share(figures["data_used_bytes"], figures["data_bytes"])


def df(settings: Settings, **options: Any) -> int:
    """Show what each image takes, alone and shared, and how many more of its size would fit."""
    from broker import work

    connection = store.open_readonly(Paths.of(settings).database)
    rows: list[dict[str, Any]] = []
    if connection is not None:
        with closing(connection) as db:
            rows = [dict(row) for row in store.usage(db)]
    greeting, _, _ = work.inventory(settings)
    figures = greeting["pool"]
    free = figures["data_bytes"] - figures["data_used_bytes"] - figures.get("reserved_bytes", 0)
    for row in rows:
        row["fit"] = max(0, free) // max(1, row["exclusive"] + row["shared"])
    as_json = options.pop("as_json")
    if as_json:
        _print_json({"images": rows, "pool": figures, "store": greeting["store"]})
        return 0
    _table(rows, DF_COLUMNS, **options)
    if not options["no_header"]:
        print(f"\ndata      {_pool_share(figures)}")
        if figures.get("metadata_bytes"):
            print(f"metadata  {_share(figures['metadata_used_bytes'], figures['metadata_bytes'])}")
    return 0


DF_COLUMNS = [
    Column("image", lambda r: r["ref"]),
    Column("exclusive", lambda r: r["exclusive"], console.size, right=True),
    Column("shared", lambda r: r["shared"], console.size, right=True),
    Column("more_would_fit", lambda r: r["fit"], str, right=True),
]


def _name(name: str | None, default: str) -> str:
    if name is not None and not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name",
            "a name has letters, digits, `.`, `_` and `-`, at most 64, and starts with a letter or digit",
        )
    return name or default


def _size(text: str | None) -> int:
    try:
        return parse_size(text) if text else 0
    except ValueError as error:
        raise UsageError(f"--size: {error}") from error


def activate(
    settings: Settings,
    *,
    image: str,
    command: tuple[str, ...],
    name: str | None,
    mode: str,
    size: str | None,
    firecracker: bool,
    as_json: bool,
) -> int:
    """Give out one more device of an image."""
    if command and mode != "ro":
        raise UsageError("a command runs inside a read-only activation only", advice="add --ro")
    chosen = find_image(settings, image)
    from broker import work

    default = Reference.parse(chosen.ref).default_name
    if command:
        from broker.inside import run_inside

        return run_inside(settings, chosen, _name(name, clean_name(f"{default}-{os.getpid()}")), list(command))
    given = work.activate(settings, chosen, _name(name, default), mode, _size(size))
    if firecracker:
        # Firecracker API, PUT /drives/{drive_id}: https://github.com/firecracker-microvm/firecracker, firecracker.yaml
        drive = {
            "drive_id": clean_name(given.name).replace(".", "_").replace("-", "_"),
            "path_on_host": given.device,
            "is_root_device": True,
            "is_read_only": given.mode == "ro",
        }
        _print_json(drive)
        return 0
    fields = {"name": given.name, "device": given.device, "mode": given.mode, "size": given.size, "layer": given.layer}
    _result("activate", as_json, given.device, image=chosen.ref, **fields)
    return 0


def deactivate(settings: Settings, *, name: str, as_json: bool) -> int:
    """Take a device back."""
    from broker import work

    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of an activation")
    work.deactivate(settings, name)
    _result("deactivate", as_json, "", name=name)
    return 0


def rm(settings: Settings, *, image: str, as_json: bool) -> int:
    """Remove an image; also one whose removal was interrupted after it became invisible."""
    from broker import work

    try:
        chosen = find_image(settings, image)
    except ImgpullError:
        removed = work.finish_removal(settings, image)
        if removed is None:
            raise
        text = f"removed {console.escape(image)}, which was interrupted: {_count(len(removed), 'layer')} removed"
        _result("rm", as_json, text, image=image, layers=removed)
        return 0
    removed = work.remove(settings, chosen)
    kept = chosen.layers - len(removed)
    text = f"removed {console.escape(chosen.ref)}: {_count(len(removed), 'layer')} removed"
    if kept > 0:
        text += f", {kept} kept for other images"
    _result("rm", as_json, text, image=chosen.ref, layers=removed)
    return 0


def gc(settings: Settings, *, dry_run: bool, as_json: bool) -> int:
    """Remove what nothing needs."""
    from broker import metrics, work

    with metrics.kept(settings):
        found = work.collect(settings, dry_run)
    word = "would remove" if dry_run else "removed"
    blobs = f"{len(found['blobs'])} cached blobs ({console.size(found['bytes'])})"
    text = f"{word} {_count(len(found['layers']), 'layer')}, {blobs}"
    _result("gc", as_json, text, dry_run=dry_run, **found)
    return 0


def verify(settings: Settings, *, image: str | None, as_json: bool) -> int:
    """Have root compare layers with their manifests."""
    from broker import metrics, work

    chosen = [find_image(settings, image)] if image else _images(settings)
    with metrics.kept(settings):
        findings = work.verify(settings, chosen)
    for row in findings:
        if not as_json:
            verdict = (
                f"{row['files']} files, {console.size(row['bytes'])}: good" if row["ok"] else f"BAD: {row['reason']}"
            )
            print(f"{row['layer']}  {console.escape(verdict)}")
    if as_json:
        _print_json(findings)
    return 0 if all(row["ok"] for row in findings) else 1


# ---------------------------------------------------------------- checking


def check(settings: Settings, *, files: tuple[str, ...], manifest: bool, all_violations: bool, as_json: bool) -> int:
    """Check tarballs by the archive rules alone."""
    for name in files:
        if media_of(name) is None:
            raise ImgpullError(
                "archive-rejected",
                f"{name}: refused by rule media_unknown",
                "the name declares no format that a layer can have: .tar, .tar.gz, .tgz, .tar.zst",
                violations=[],
            )
    from broker import filecheck

    accepted = filecheck.check(list(files), with_tree=manifest, all_violations=all_violations)
    if manifest:
        return 0
    if as_json:
        _result("check", True, "", accepted=True, layers=[a.model_dump() for a in accepted])
        return 0
    for name, verdict in zip(files, accepted, strict=True):
        print(
            f"{console.escape(name)}: accepted,"
            f" {verdict.entries} entries, {console.size(verdict.content_bytes)} of files"
        )
        print(f"  layer {verdict.layer}")
        for rule, count in verdict.dropped.items():
            print(f"  dropped {count} x {rule}")
        for warning in verdict.warnings[:20]:
            print(f"  note {warning.rule}: {console.escape(warning.name or '')}: {console.escape(warning.reason)}")
    return 0


def explain(settings: Settings, *, word: str | None, as_json: bool) -> int:
    """Tell what a rule or an error code means; without a word, which there are."""
    rules = _rules()
    if word is None:
        _print_codes(rules, as_json)
        return 0
    if word in CATALOGUE:
        kind = CATALOGUE[word]
        fields = _code(word)
        lines = [f"error code {word}, exit code {kind.exit_code}", "", kind.title, f"What to do: {kind.advice}."]
    elif word in rules:
        rule = rules[word]
        fields = {"rule": word, **rule}
        lines = [f"rule {word} of the checker", "", *[f"{key.capitalize()}: {text}" for key, text in rule.items()]]
    else:
        import difflib

        near = difflib.get_close_matches(word, [*CATALOGUE, *rules], 3)
        hint = f"did you mean {', '.join(near)}?" if near else "rules are named in each refusal, codes with --json"
        raise UsageError(f"{word!r} is neither a rule nor an error code", advice=hint)
    if as_json:
        _print_json(fields)
    else:
        print("\n".join(console.folded("", line) for line in lines))
    return 0


def _rules() -> dict[str, dict[str, str]]:
    with (POLICY_DIR / "rules.toml").open("rb") as file:
        return tomllib.load(file)


def _code(word: str) -> dict[str, Any]:
    kind = CATALOGUE[word]
    fields = {"code": word, "exit": kind.exit_code, "what": kind.title, "advice": kind.advice}
    return {**fields, "retryable": kind.retryable}


def _print_codes(rules: dict[str, dict[str, str]], as_json: bool) -> None:
    """List the error codes, with --json alone, else with the names of the rules below them."""
    if as_json:
        _print_json([_code(word) for word in CATALOGUE])
        return
    for word, kind in CATALOGUE.items():
        print(console.folded(f"{word:<20}{kind.exit_code:>3}  ", kind.title))
    print("\n" + console.folded("rules of the checker: ", ", ".join(rules)))


# ---------------------------------------------------------------- runs

LOGGED: Final = 1000  # pulls of an image that are shown at most
IDLE: Final = "no run was interrupted; what is at work in another process is left to it"

RUN_COLUMNS = [  # of a run and its state
    Column("run", lambda r: r[0].id),
    Column("machine", lambda r: r[0].machine),
    Column("state", lambda r: r[1]),
    Column("step", lambda r: r[0].step),
    Column("attempt", lambda r: r[0].attempt, str, right=True),
    Column("started", lambda r: r[0].created_ms, ago),
    Column("subject", lambda r: subject(r[0])),
]


def subject(run: "RunRecord") -> str:
    """Return what a run is about, for people."""
    try:
        request = json.loads(run.request)
    except ValueError:
        return ""
    pin = request.get("pin") or {}
    return str(request.get("ref") or request.get("name") or pin.get("key") or "")


def runs(settings: Settings, *, run_id: str | None, active: bool, as_json: bool, **options: Any) -> int:
    """List runs or show one."""
    from broker import work

    with work.looking(settings) as lookup:
        if run_id is not None:
            if lookup is None:
                raise ImgpullError("no-such-run", f"{run_id}: no such run here")
            record = work.run_record(lookup, run_id)
            _print_run(lookup.events(record), record, lookup.state(record), as_json)
            return 0
        rows = [(r, lookup.state(r)) for r in lookup.runs(active_only=active, limit=200)] if lookup else []
    _table(rows, RUN_COLUMNS, as_json=as_json, **options)
    return 0


def _print_run(events: list[Any], record: Any, state: str, as_json: bool) -> None:
    if as_json:
        shown = [
            {"type": e.type, "step": e.step, "attempt": e.attempt, "time_ms": e.at_ms, **e.payload} for e in events
        ]
        _print_json(
            {
                "run": record.id,
                "machine": record.machine,
                "state": state,
                "step": record.step,
                "events": shown,
            }
        )
        return
    started = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(record.created_ms / 1000))
    print(f"run {record.id}: {record.machine} of {console.escape(subject(record))}, {state}, started {started}")
    first = events[0].at_ms if events else 0
    for event in events:
        words = [f"{(event.at_ms - first) / 1000:10.3f} s", f"{event.type:<10}"]
        words.append(f"{event.step or '':<10}" + (f" #{event.attempt}" if event.attempt and event.attempt > 1 else ""))
        if "duration_ms" in event.payload:
            words.append(f"{event.payload['duration_ms']} ms")
        if why := event.payload.get("reason") or event.payload.get("cause"):
            words.append(console.escape(why)[:500])
        print("  ".join(words).rstrip())
    if record.active:
        print(f"{(time.time() * 1000 - first) / 1000:10.3f} s  now         {_now(record, state)}")


def _now(record: Any, state: str) -> str:
    """Return what an active run does, or waits for."""
    where = f"{record.step}, attempt {record.attempt}"
    if state == "interrupted":
        return f"interrupted in {where}: `imgpull resume {record.id}` goes on, and so does the command that began it"
    if record.due_ms is not None and (left_s := record.due_ms / 1000 - time.time()) > 0:
        return f"waits {left_s:.1f} s for {where}"
    return f"at work: {where}"


def log(settings: Settings, *, image: str, as_json: bool) -> int:
    """Show every step of the pulls of an image and of the layers that they started."""
    from broker import work

    with work.looking(settings) as lookup:
        found = _pulls_of(lookup, settings, image) if lookup else []
        if not found or lookup is None:
            raise ImgpullError("no-such-image", f"{image}: never pulled here")
        whole = [(r, lookup.events(r), lookup.state(r)) for p in reversed(found) for r in (p, *lookup.children(p))]
    if as_json:
        _print_json(
            [
                {"run": r.id, "machine": r.machine, "subject": subject(r), "state": state}
                | {
                    "events": [
                        {"type": e.type, "step": e.step, "attempt": e.attempt, "time_ms": e.at_ms, **e.payload}
                        for e in events
                    ]
                }
                for r, events, state in whole
            ]
        )
        return 0
    for record, events, state in whole:
        _print_run(events, record, state, False)
    return 0


def _pulls_of(lookup: Any, settings: Settings, image: str) -> list[Any]:
    """Return the pulls of an image, newest first: of one that is here, of a reference, or of a name that was tried."""
    try:
        found = find_image(settings, image)
        return list(lookup.runs("pull", store.pull_key(found.ref, found.endpoint), limit=LOGGED))
    except ImgpullError:
        if image.startswith("s3://"):
            return list(lookup.runs("pull", store.pull_key(str(Reference.parse(image)), settings.source), limit=LOGGED))
    newest = lookup.runs("pull", limit=LOGGED)
    return [r for r in newest if subject(r).rstrip("/").rsplit("/", 1)[-1] == image]


def resume(settings: Settings, *, run_id: str | None, quiet: bool, as_json: bool) -> int:
    """Go on with interrupted runs."""
    from broker import metrics, work

    with metrics.kept(settings):
        ended = work.resume(settings, console.reporter(settings.progress, as_json, quiet), run_id)
    bad = [row for row in ended if row["state"] != "done"]
    told = [f"{row['run']}: {row['state']}: {console.escape(row['reason'] or '')}" for row in bad]
    told.append(f"{len(ended)} interrupted runs have ended, {len(ended) - len(bad)} of them well" if ended else IDLE)
    _result("resume", as_json, "" if quiet else "\n".join(told), runs=ended)
    return 1 if bad else 0


def cancel(settings: Settings, *, run_id: str, as_json: bool) -> int:
    """Cancel a run."""
    from broker import work

    whole_id, state, before = work.cancel(settings, run_id)
    _result("cancel", as_json, f"{whole_id}: {'had ended before, ' * before}{state}", run=whole_id, state=state)
    return 0


# ---------------------------------------------------------------- the host


def pool(settings: Settings, *, as_json: bool) -> int:
    """Show the pool."""
    from broker import work

    greeting, layers, activations = work.inventory(settings)
    figures = greeting["pool"]
    if as_json:
        _print_json(
            {
                "store": greeting["store"],
                "policy": greeting["policy"],
                "pool": figures,
                "layers": len(layers),
                "activations": len(activations),
            }
        )
        return 0
    print(f"store    {greeting['store']}, {figures['state']}")
    print(f"data     {_share(figures['data_used_bytes'], figures['data_bytes'])}")
    if figures.get("metadata_bytes"):
        print(f"metadata {_share(figures['metadata_used_bytes'], figures['metadata_bytes'])}")
    if figures.get("reserved_bytes"):
        print(f"reserved {console.size(figures['reserved_bytes'])} for commits in flight")
    print(f"block    {figures['block_bytes'] // 1024} KiB")
    print(f"layers   {len(layers)}")
    print(f"devices  {len(activations)} of yours")
    print(f"policy   {greeting['policy']}")
    return 0


def _share(used: int, total: int) -> str:
    percent = f" ({used * 100 // total} %)" if total else ""
    return f"{console.size(used)} of {console.size(total)} used{percent}, {console.size(max(0, total - used))} free"


def doctor(settings: Settings, *, ref: str | None, repair: bool, as_json: bool) -> int:
    """Look at everything that imgpull needs; before that, rebuild the state if that is asked for."""
    from broker import doctor as examination

    findings = examination.rebuild(settings) if repair else []
    findings += examination.examine(settings, Reference.parse(ref) if ref else None)
    if as_json:
        _print_json([f.to_json() for f in findings])
    else:
        width = max(len(f.subject) for f in findings)
        for finding in findings:
            print(console.folded(f"{finding.verdict:<4}  {finding.subject:<{width}}  ", console.escape(finding.text)))
            if finding.remedy and finding.verdict != "ok":
                print(console.folded(f"      {'':<{width}}  -> ", finding.remedy))
    return 1 if any(f.verdict == "fail" for f in findings) else 0


CONFIG_COLUMNS = [
    Column("name", lambda r: r["name"]),
    Column("value", lambda r: r["value"], console.exactly),
    Column("unit", lambda r: r["unit"]),
    Column("origin", lambda r: r["origin"]),
]


def config_show(settings: Settings, *, origin: bool, **options: Any) -> int:
    """Show the settings in force."""
    rows = [{"name": row.name, "unit": row.unit, **asdict(settings.values[row.name])} for row in SETTINGS]
    if options["chosen"] is None and not options["as_json"] and not origin:
        options["chosen"] = "name,value,unit"
    _table(rows, CONFIG_COLUMNS, **options)
    return 0


POLICY_COLUMNS = [
    Column("key", lambda g: g.key),
    Column("value", lambda g: g.value, console.exactly),
    Column("origin", lambda g: g.origin),
]


def policy_show(settings: Settings, *, word: str | None, as_json: bool, **options: Any) -> int:
    """Show what is granted and limited."""
    from broker import policy

    rows = [g for g in policy.grants() if word is None or word in g.key]
    if not rows:
        raise UsageError(f"nothing in policy/ has {word!r} in its name", advice="`imgpull policy show` lists all")
    _table(rows, POLICY_COLUMNS, as_json=as_json, **options)
    return 0


AUDIT_COLUMNS = [
    Column("place", lambda a: a.place),
    Column("attempt", lambda a: a.attempt),
    Column("expected", lambda a: a.expected),
    Column("got", lambda a: a.got),
    Column("verdict", lambda a: "ok" if a.ok else "NOT OK"),
]


def policy_audit(settings: Settings, *, as_json: bool, **options: Any) -> int:
    """Try what must be denied, for real."""
    from broker import audit

    rows = audit.audit(settings)
    if as_json:
        _print_json([row.to_json() for row in rows])
    else:
        _table(rows, AUDIT_COLUMNS, **options)
        bad = sum(not row.ok for row in rows)
        print(f"\n{len(rows)} attempts, {bad} of them not as policy/ says", file=sys.stderr)
    return 0 if all(row.ok for row in rows) else 1


def version(settings: Settings, *, as_json: bool) -> int:
    """Print versions."""
    import sqlite3

    found = {"imgpull": _version("imgpull"), "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
    found |= {package: _version(package) for package in ("boto3", "libarchive-c", "pydantic", "trio", "zstandard")}
    found["kernel"] = os.uname().release
    if as_json:
        _print_json(found)
    else:
        for name, number in found.items():
            print(f"{name:<14}{number}")
    return 0


def _version(package: str) -> str:
    from importlib import metadata  # it loads the whole of `email`

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
