"""Each image's rows once more, in a file of its own beside the manifests: what the database is checked against.

Rule 1: the file is written, and removed, in the transaction that makes or forgets the image, and made to agree again
        when a run of that image fails; so the two can differ only while one is at work, or when the database was
        damaged, lost, or put back from an older copy.
Rule 2: nothing is answered from these files. They find damage, and `imgpull doctor --repair` rebuilds from them.
Rule 3: a file carries its own digest; one that does not match it counts as absent, and is named.

Files: ``<state>/images/<digest of endpoint and reference>.json``.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

FORMAT: Final = "imgpull.image/1"
LAYER_COLUMNS: Final = (
    *("number", "key", "etag", "version", "size", "media", "digest", "layer"),
    *("parent", "manifest_bytes", "payload_bytes", "entries", "operations", "content_bytes", "notes"),
)
_LAYERS: Final = (
    f"SELECT {', '.join(LAYER_COLUMNS)} FROM image_layer JOIN layer ON layer.id = image_layer.layer"  # noqa: S608
    " WHERE image = ? ORDER BY number"
)
# While one of these is at work its image's row and file may differ: it died between the two, and will be resumed.
_AT_WORK: Final = "SELECT key FROM run WHERE outcome IS NULL AND machine IN ('pull', 'remove')"


class DamagedRecordError(Exception):
    """A file does not match its own digest."""


def path_of(folder: Path, ref: str, endpoint: str) -> Path:
    """Return where the file of an image lies."""
    return folder / f"{hashlib.sha256(f'{endpoint} {ref}'.encode()).hexdigest()}.json"


def encode(db: sqlite3.Connection, image: int, ref: str, endpoint: str, top: str, pulled_ms: int) -> bytes:
    """Return what the file of an image has to hold."""
    layers = [dict(zip(LAYER_COLUMNS, row, strict=True)) for row in db.execute(_LAYERS, (image,)).fetchall()]
    record = {"format": FORMAT, "ref": ref, "endpoint": endpoint, "top": top, "pulled_ms": pulled_ms, "layers": layers}
    return _sealed(record)


def _sealed(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True)
    return json.dumps(record | {"seal": hashlib.sha256(text.encode()).hexdigest()}, sort_keys=True).encode() + b"\n"


def decode(data: bytes) -> dict[str, Any]:
    """Read a file. Raises: DamagedRecordError."""
    try:
        record = json.loads(data)
        seal = record.pop("seal")
        good = record["format"] == FORMAT and hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedRecordError(str(error)) from error
    if good != seal:
        raise DamagedRecordError("it does not match its own digest")
    return dict(record)


def publish(folder: Path, db: sqlite3.Connection, ref: str, endpoint: str) -> None:
    """Write the file of an image as its rows are now; the last thing of their transaction."""
    row = db.execute(
        "SELECT id, ref, endpoint, top, pulled_ms FROM image WHERE ref = ? AND endpoint = ?", (ref, endpoint)
    )
    data = encode(db, *row.fetchone())
    folder.mkdir(mode=0o700, exist_ok=True)
    path = path_of(folder, ref, endpoint)
    before = path.read_bytes() if path.exists() else None
    _write(path.with_suffix(".new"), data)
    path.with_suffix(".new").rename(path)
    try:
        _sync(folder)
    except OSError:
        # The transaction fails with this, and the file must be as its rows will be again.
        path.unlink() if before is None else _write(path, before)
        raise


def settle(folder: Path, db: sqlite3.Connection, ref: str, endpoint: str) -> None:
    """Let the file of an image be as its rows are, after a run that may have died between the two."""
    if db.execute("SELECT 1 FROM image WHERE ref = ? AND endpoint = ?", (ref, endpoint)).fetchone():
        publish(folder, db, ref, endpoint)
    else:
        withdraw(folder, ref, endpoint)


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def withdraw(folder: Path, ref: str, endpoint: str) -> None:
    """Remove the file of an image; the last thing of the transaction that forgets it."""
    path = path_of(folder, ref, endpoint)
    with suppress(FileNotFoundError):
        path.with_suffix(".new").unlink()
    with suppress(FileNotFoundError):
        path.unlink()
    # A failure here does not bring the file back, so it must not bring back the rows either. After a power cut the file
    # may be there again; that is told, and mended, as an older copy is.
    with suppress(OSError):
        _sync(folder)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def files(folder: Path) -> list[Path]:
    """Return the files of all images."""
    return sorted(folder.glob("*.json"))


def disagreement(folder: Path, db: sqlite3.Connection) -> str | None:
    """Say where the database and the files differ although no run is at work that explains it; None if nowhere.

    Looked at twice: a run that began and ended while we looked is no disagreement.
    """
    return next(_differences(folder, db), None) and next(_differences(folder, db), None)


def _differences(folder: Path, db: sqlite3.Connection) -> Iterator[str]:
    at_work = {path_of(folder, *reversed(key.split(" ", 1))) for (key,) in db.execute(_AT_WORK).fetchall()}
    expected: dict[Path, tuple[str, bytes]] = {}
    for row in db.execute("SELECT id, ref, endpoint, top, pulled_ms FROM image").fetchall():
        expected[path_of(folder, row[1], row[2])] = (row[1], encode(db, *row))
    for path in files(folder):
        if path not in expected and path not in at_work:
            yield f"it does not know an image whose record is {path.name}: it is an older copy, or damaged"
    for path, (ref, data) in expected.items():
        found = path.read_bytes() if path.exists() else b""
        if found != data and path not in at_work:
            yield f"its image {ref} differs from the record {path.name}: one of the two is older, or damaged"
