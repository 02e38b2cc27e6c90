"""Makes the state database anew, from what root holds, the images' records and the manifests.

Rule 1: nothing is guessed. An image comes back with the rows that it had, if root holds every layer of it and each
        manifest has its layer's digest; what cannot be shown to be so is left out and named.
Rule 2: nothing is destroyed. The old file is set aside under another name, and root is only asked, never told.
Rule 3: a file of another program, or of a newer version of this one, is not touched.

What is not brought back is the memory of runs and of verdicts: a `pull --refresh` fetches and checks once more.
"""

import hashlib
import os
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import trio

from broker import helper, imagefile, store
from broker.errors import ImgpullError
from broker.helper import Activation, LayerAbsentError
from broker.machine import DamagedStateError, ForeignStateError, StateError, open_lookup, problems
from broker.machine.database import APPLICATION_ID, Database
from broker.machine.ownership import Ownership
from broker.settings import Settings
from broker.store import Paths

_LAYER: Final = """
    INSERT INTO layer (id, parent, manifest_bytes, payload_bytes, entries, operations, content_bytes, notes, committed,
                       created_ms)
    VALUES (:layer, :parent, :manifest_bytes, :payload_bytes, :entries, :operations, :content_bytes, :notes, 1,
            :created_ms)"""


def complaint(paths: Paths) -> str | None:
    """Say what is wrong with the state; None if nothing is.

    Raises: ImgpullError `state-damaged` for a file that is none of ours, which is not for us to mend.
    """
    try:
        with open_lookup(str(paths.database), migrations=store.MIGRATIONS) as lookup:
            found = problems(lookup) if lookup is not None else []
        if (opened := store.open_readonly(paths.database)) is not None:
            opened.close()
        return next(iter(found), None)
    except ForeignStateError as error:
        raise store.damaged(f"{error}; it is left as it is") from error
    except (DamagedStateError, ImgpullError) as error:
        if isinstance(error, ImgpullError) and error.problem.code != "state-damaged":
            raise
        return error.problem.why if isinstance(error, ImgpullError) else str(error)


async def repair(settings: Settings) -> list[str]:
    """Rebuild a state that is damaged, lost, or an older copy. Returns: what was done, in sentences.

    Raises: ImgpullError, also while another process works at a run.
    """
    paths = Paths.of(settings)
    paths.make()
    why = complaint(paths)
    if why is None:
        return ["the state database is sound, nothing was done"]
    with Ownership(f"{paths.database}-owners") as owners:
        if not owners.take_all():
            raise ImgpullError("busy", "a run is at work in another process", "stop it, then repair")
        for left in paths.state.glob("rebuilt-*"):  # by a repair that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=paths.state, prefix="rebuilt-") as folder:
            fresh = Path(folder) / "imgpull.db"
            left_out: dict[Path, str] = {}
            told = await _build(settings, paths, fresh, left_out)
            kept = _set_aside(paths)
            fresh.rename(paths.database)
        for record in left_out:  # last: as long as it is there, the database does not agree with it
            record.rename(record.with_suffix(".left-out"))
    told += [f"left out: {reason}" for reason in left_out.values()]
    return [f"it was: {why}", *told, *([f"the old database is kept as {kept}"] if kept else [])]


def _set_aside(paths: Paths) -> Path | None:
    """Give the old file another name; its journal goes first, for it must never meet the new one."""
    old = paths.database
    kept = old.with_name(f"{old.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}")
    journal = Path(f"{old}-journal")
    if journal.exists():
        journal.rename(f"{kept}-journal")
    if not old.exists():
        return None
    old.rename(kept)
    return kept


async def _build(settings: Settings, paths: Paths, fresh: Path, left_out: dict[Path, str]) -> list[str]:
    """Make the new database; note the records that it cannot hold. Returns: what is in it."""
    async with helper.connect(settings.helper_socket) as root:
        layers, devices = await root.inventory()
        sealed = {item["layer"]: item for item in layers if item["state"] == "sealed"}
        records = _records(paths.image_dir, left_out)
        known = await _manifests(root, paths, sealed, records)
    told: list[str] = []
    database = await Database.open(str(fresh), store.MIGRATIONS, APPLICATION_ID, point=lambda _: None)
    try:
        async with database.transaction("repair") as db:
            images = _put_images(db, paths.image_dir, records, known, left_out)
            _put_strays(db, known, sealed)
            given = _put_devices(db, devices, told)
            blobs = _put_blobs(db, paths.blob_dir / "sha256")
    except StateError as error:
        raise ImgpullError("io-error", "the new state database cannot be written", str(error)) from error
    finally:
        database.close()
    return [f"{images} images, {len(known)} layers, {given} devices and {blobs} cached blobs are known again", *told]


def _records(folder: Path, left_out: dict[Path, str]) -> list[dict[str, Any]]:
    found = []
    for path in imagefile.files(folder):
        try:
            found.append(imagefile.decode(path.read_bytes()))
        except imagefile.DamagedRecordError as error:
            left_out[path] = f"{path}: {error}"
    return found


async def _manifests(
    root: helper.Helper, paths: Paths, sealed: dict[str, Any], records: list[dict[str, Any]]
) -> dict[str, int]:
    """Return the size of the manifest of each layer that root holds and that is ours: by its file, or by a record."""
    ours = {f"sha256:{path.stem}" for path in (paths.state / "manifests").glob("*.jsonl")}
    ours |= {row["layer"] for record in records for row in record["layers"]}
    found = {}
    for layer in sorted(ours & sealed.keys()):
        path = paths.manifest(layer)
        if not path.exists() or _digest(path) != layer:
            try:
                theirs = await root.manifest(layer)
            except LayerAbsentError:
                continue
            with os.fdopen(theirs, "rb") as file:
                _replace(path, os.pread(theirs, os.fstat(file.fileno()).st_size, 0))
        if _digest(path) == layer:
            found[layer] = path.stat().st_size
        await trio.lowlevel.checkpoint()
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def _put_images(
    db: sqlite3.Connection,
    folder: Path,
    records: list[dict[str, Any]],
    known: dict[str, int],
    left_out: dict[Path, str],
) -> int:
    count = 0
    for record in sorted(records, key=lambda r: (r["pulled_ms"], r["ref"])):
        ref, endpoint = record["ref"], record["endpoint"]
        missing = [row["layer"] for row in record["layers"] if row["layer"] not in known]
        if missing:
            reason = f"{ref}: root does not hold its layer {missing[0]}; pull it again"
            left_out[imagefile.path_of(folder, ref, endpoint)] = reason
            continue
        count += 1
        for row in record["layers"]:
            if not store.has_layer(db, row["layer"]):
                db.execute(_LAYER, {**row, "created_ms": record["pulled_ms"]})
        rows = [tuple(row[name] for name in imagefile.LAYER_COLUMNS[:8]) for row in record["layers"]]
        store.record_image(db, ref, endpoint, rows, record["top"])
        db.execute(
            "UPDATE image SET pulled_ms = ? WHERE ref = ? AND endpoint = ?", (record["pulled_ms"], ref, endpoint)
        )
    return count


def _put_strays(db: sqlite3.Connection, known: dict[str, int], sealed: dict[str, Any]) -> None:
    """Note the layers that no image stands on, so that `imgpull gc` finds them, each after its parent."""
    waiting = [layer for layer in known if not store.has_layer(db, layer)]
    while ready := [x for x in waiting if sealed[x]["parent"] is None or store.has_layer(db, sealed[x]["parent"])]:
        for layer in ready:
            item, now = sealed[layer], store.now_ms()
            sizes = {"manifest_bytes": known[layer], "payload_bytes": 0, "content_bytes": item["bytes"]}
            counts = {"entries": item["entries"], "operations": item["entries"], "notes": "{}", "created_ms": now}
            db.execute(_LAYER, {"layer": layer, "parent": item["parent"], **sizes, **counts})
        waiting = [layer for layer in waiting if layer not in ready]


def _put_devices(db: sqlite3.Connection, devices: list[dict[str, Any]], told: list[str]) -> int:
    count = 0
    for item in devices:
        images = [image for image in store.images(db) if image.top == item["layer"]]
        if not images:
            told.append(
                f"left out: the device {item['name']}: no image here has its layer; `imgpull deactivate` ends it"
            )
            continue
        if len(images) > 1:
            told.append(f"the device {item['name']} counts to {images[0].ref}, one of {len(images)} with its layers")
        given = Activation(item["name"], item["layer"], item["mode"], item["device"], item["size"])
        store.record_activation(db, images[0].id, given)
        count += 1
    return count


def _put_blobs(db: sqlite3.Connection, folder: Path) -> int:
    if not folder.is_dir():
        return 0
    with closing(os.scandir(folder)) as entries:
        found = [(f"sha256:{entry.name}", entry.stat()) for entry in entries if len(entry.name) == 64]
    for digest, facts in found:
        db.execute("INSERT INTO blob VALUES (?, ?, ?)", (digest, facts.st_size, facts.st_mtime_ns // 1_000_000))
    return len(found)
