"""What is there: blobs, layers, images, activations, in one SQLite file, with the manifests and blobs beside it.

Rule 1: an image has a row only when all its layers are sealed; nothing half-done is ever listed.
Rule 2: this is the user's own record. The truth about devices is the helper's answer; a row that root contradicts is
        mended, and losing this file loses no image.
Rule 3: a row is written in the transaction that completes the step which earned it (broker/machine.py).

Files: ``<state>/imgpull.db``, ``<state>/manifests/<hex>.jsonl``, ``<state>/images/`` (broker/imagefile.py),
``<state>/temporary/`` (broker/temporary.py), ``<state>/progress`` (broker/board.py),
``<cache>/blobs/sha256/<hex>`` (published by the fetcher), ``<cache>/payloads/<hex>.tar`` (the uncompressed tar of a
compressed blob, between check and commit).
"""

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from broker import imagefile
from broker.errors import ImgpullError
from broker.settings import Settings

MIGRATIONS: Final = (
    """
    CREATE TABLE blob (
        digest TEXT PRIMARY KEY,
        size INTEGER NOT NULL CHECK (size >= 0),
        used_ms INTEGER NOT NULL
    ) STRICT;
    -- What an object held when it was first fetched: the record behind "trust on first use".
    CREATE TABLE pin (
        endpoint TEXT NOT NULL, bucket TEXT NOT NULL, key TEXT NOT NULL, version TEXT NOT NULL,
        etag TEXT NOT NULL, size INTEGER NOT NULL, digest TEXT NOT NULL, fetched_ms INTEGER NOT NULL,
        PRIMARY KEY (endpoint, bucket, etag, size, key, version)
    ) STRICT;
    CREATE TABLE layer (
        id TEXT PRIMARY KEY,
        parent TEXT REFERENCES layer (id),
        manifest_bytes INTEGER NOT NULL, payload_bytes INTEGER NOT NULL, entries INTEGER NOT NULL,
        operations INTEGER NOT NULL, content_bytes INTEGER NOT NULL,
        notes TEXT NOT NULL,
        committed INTEGER NOT NULL DEFAULT 0 CHECK (committed IN (0, 1)),
        created_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX layer_parent ON layer (parent);
    -- Verdicts already given: the same bytes on the same lower layers under the same limits make the same layer.
    CREATE TABLE verdict (
        blob TEXT NOT NULL, media TEXT NOT NULL, parent TEXT NOT NULL, limits TEXT NOT NULL,
        layer TEXT NOT NULL REFERENCES layer (id) ON DELETE CASCADE,
        PRIMARY KEY (blob, media, parent, limits)
    ) STRICT;
    CREATE INDEX verdict_layer ON verdict (layer);
    -- Which layer a pinned object became on top of the pinned objects below it: how one layer's work finds another's.
    CREATE TABLE chain (
        key TEXT PRIMARY KEY,
        layer TEXT NOT NULL REFERENCES layer (id) ON DELETE CASCADE,
        digest TEXT NOT NULL
    ) STRICT;
    CREATE INDEX chain_layer ON chain (layer);
    CREATE TABLE image (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        ref TEXT NOT NULL, endpoint TEXT NOT NULL,
        top TEXT NOT NULL REFERENCES layer (id),
        pulled_ms INTEGER NOT NULL, used_ms INTEGER NOT NULL,
        UNIQUE (ref, endpoint)
    ) STRICT;
    CREATE INDEX image_top ON image (top);
    CREATE TABLE image_layer (
        image INTEGER NOT NULL REFERENCES image (id) ON DELETE CASCADE,
        number INTEGER NOT NULL CHECK (number >= 1),
        key TEXT NOT NULL, etag TEXT NOT NULL, version TEXT NOT NULL, size INTEGER NOT NULL,
        media TEXT NOT NULL, digest TEXT NOT NULL,
        layer TEXT NOT NULL REFERENCES layer (id),
        PRIMARY KEY (image, number)
    ) STRICT;
    CREATE INDEX image_layer_layer ON image_layer (layer);
    CREATE TABLE activation (
        name TEXT PRIMARY KEY,
        image INTEGER NOT NULL REFERENCES image (id),
        layer TEXT NOT NULL, mode TEXT NOT NULL CHECK (mode IN ('ro', 'rw')), size INTEGER NOT NULL,
        device TEXT NOT NULL, behind TEXT NOT NULL, boot_id TEXT NOT NULL, created_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX activation_image ON activation (image);
    """,
)


def now_ms() -> int:
    """Return the wall clock in milliseconds since the epoch; for people, never for order."""
    return time.time_ns() // 1_000_000


def boot_id() -> str:
    """Return the kernel's id of this boot: devices given out before it are gone. Source: random(4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def behind(device: str) -> str:
    """Return what stands behind a block device: the uuid of a mapped one, the file of a loop device, else nothing.

    A device's name is given to others once it is free; this is not. Source: the kernel's Documentation/ABI/testing,
    sysfs-block-dm and sysfs-block-loop.
    """
    folder = Path("/sys/block") / os.path.basename(device)
    for name in ("dm/uuid", "loop/backing_file"):
        with suppress(OSError):
            return (folder / name).read_text(encoding="utf-8", errors="surrogateescape").strip()
    return ""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the files of one user's state lie. Folders are made 0700 when they are first needed."""

    state: Path
    cache: Path

    @classmethod
    def of(cls, settings: Settings) -> "Paths":
        """Return the paths that the settings name."""
        return cls(settings.state, settings.cache)

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.state / "imgpull.db"

    @property
    def board(self) -> Path:
        """How far the layers at work are, for other processes (broker/board.py)."""
        return self.state / "progress"

    @property
    def blob_dir(self) -> Path:
        """The fetcher's folder."""
        return self.cache / "blobs"

    def blob(self, digest: str) -> Path:
        """A published blob."""
        return self.blob_dir / "sha256" / digest.removeprefix("sha256:")

    @property
    def image_dir(self) -> Path:
        """The images' records."""
        return self.state / "images"

    @property
    def mark_dir(self) -> Path:
        """The marks of devices that are there for one command only (broker/temporary.py)."""
        return self.state / "temporary"

    def manifest(self, layer: str) -> Path:
        """A layer's manifest."""
        return self.state / "manifests" / f"{layer.removeprefix('sha256:')}.jsonl"

    def payload(self, digest: str) -> Path:
        """The uncompressed tar of a compressed blob."""
        return self.cache / "payloads" / f"{digest.removeprefix('sha256:')}.tar"

    def make(self) -> None:
        """Make the folders that are missing, readable by their owner only."""
        for folder in (self.state / "manifests", self.blob_dir, self.cache / "payloads"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.state, self.cache):
            folder.chmod(0o700)


def limits_digest(policy_dir: Path, system_dir: Path) -> str:
    """Return the digest of all that a verdict depends on besides the bytes: the limits and the rules in force."""
    digest = hashlib.sha256()
    for path in (policy_dir / "limits.toml", policy_dir / "rules.toml", system_dir / "limits.toml"):
        with suppress(FileNotFoundError):
            digest.update(b"%d " % len(content := path.read_bytes()) + content)
    return digest.hexdigest()


# ---------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class Image:
    """One image that is ready."""

    id: int
    ref: str
    endpoint: str
    top: str
    pulled_ms: int
    layers: int
    bytes: int  # as fetched
    content_bytes: int  # of the files of all its layers

    @property
    def short(self) -> str:
        """Its top layer's id, short enough to type."""
        return self.top.removeprefix("sha256:")[:12]


@dataclass(frozen=True, slots=True)
class ActivationRow:
    """One device given out, as it was recorded."""

    name: str
    image: int
    ref: str
    layer: str
    mode: str
    size: int
    device: str
    behind: str
    boot_id: str
    created_ms: int

    def is_live(self) -> bool:
        """Tell whether the device is still the one given out, by asking the kernel, without privilege or helper."""
        return self.boot_id == boot_id() and behind(self.device) == self.behind and os.access(self.device, os.R_OK)


def open_readonly(database: Path) -> sqlite3.Connection | None:
    """Open the state for looking only, checked against the images' records; None where there is none yet.

    The file is opened for writing all the same: only so can SQLite roll back the journal that a crash left behind.

    Raises: ImgpullError `state-damaged`.
    """
    folder = database.parent / "images"
    if not database.exists():
        if imagefile.files(folder):
            raise damaged(f"{database} is gone, and images were pulled here")
        return None
    connection = None
    try:
        connection = sqlite3.connect(
            f"file:{quote(str(database))}?mode=rw", uri=True, timeout=5.0, isolation_level=None
        )
        connection.execute("PRAGMA query_only=1")
        ours = connection.execute("PRAGMA user_version").fetchone()[0] >= 1 + len(MIGRATIONS)
        found = imagefile.disagreement(folder, connection) if ours else None
    except sqlite3.DatabaseError as error:
        if connection is not None:
            connection.close()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise ImgpullError("busy", "the state database is locked", str(error)) from error
        raise damaged(f"{database}: {error}") from error
    if found is not None or not ours:
        connection.close()
    if found is not None:
        raise damaged(f"{database}: {found}")
    return connection if ours else None


def damaged(why: str) -> ImgpullError:
    """Return the error for a state that cannot be trusted."""
    return ImgpullError("state-damaged", "the state database cannot be used", why)


def query(db: sqlite3.Connection, sql: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
    """Return the rows of a query, by name."""
    cursor = db.cursor()
    cursor.row_factory = sqlite3.Row
    return cursor.execute(sql, values).fetchall()


def query_one(db: sqlite3.Connection, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Row | None:
    """Return the first row of a query."""
    return next(iter(query(db, sql, values)), None)


IMAGES: Final = """
    SELECT image.id, image.ref, image.endpoint, image.top, image.pulled_ms,
           (SELECT count(*) FROM image_layer WHERE image_layer.image = image.id) AS layers,
           (SELECT coalesce(sum(size), 0) FROM image_layer WHERE image_layer.image = image.id) AS bytes,
           (SELECT coalesce(sum(layer.content_bytes), 0) FROM image_layer JOIN layer ON layer.id = image_layer.layer
             WHERE image_layer.image = image.id) AS content_bytes
      FROM image"""


def images(db: sqlite3.Connection) -> list[Image]:
    """Return all images, in the order of their first pull."""
    return [Image(**row) for row in query(db, f"{IMAGES} ORDER BY image.id")]


def image_by_ref(db: sqlite3.Connection, ref: str, endpoint: str) -> Image | None:
    """Return one image by its reference."""
    row = query_one(db, f"{IMAGES} WHERE ref = ? AND endpoint = ?", (ref, endpoint))
    return Image(**row) if row else None


def find_images(db: sqlite3.Connection, word: str) -> list[Image]:
    """Return the images that a word means: a reference, the last word of one, or the start of a top layer's id."""
    wanted = word.rstrip("/")
    every = images(db)
    return (
        [i for i in every if i.ref.rstrip("/") == wanted]
        or [i for i in every if i.ref.rstrip("/").rsplit("/", 1)[-1] == wanted]
        or [
            i
            for i in every
            if len(wanted) >= 6 and i.top.removeprefix("sha256:").startswith(wanted.removeprefix("sha256:"))
        ]
    )


def image_layers(db: sqlite3.Connection, image: int) -> list[dict[str, Any]]:
    """Return the layers of an image, lowest first, as they are shown."""
    rows = query(
        db,
        "SELECT number, key, etag, version, size, media, digest, layer, entries, content_bytes, payload_bytes, notes,"
        " (SELECT count(DISTINCT image) FROM image_layer other WHERE other.layer = image_layer.layer) AS images,"
        " (SELECT min(fetched_ms) FROM pin WHERE pin.digest = image_layer.digest) AS fetched_ms"
        " FROM image_layer JOIN layer ON layer.id = image_layer.layer WHERE image = ? ORDER BY number",
        (image,),
    )
    return [{**dict(row), "notes": json.loads(row["notes"])} for row in rows]


def activations(db: sqlite3.Connection, image: int | None = None) -> list[ActivationRow]:
    """Return the recorded activations, of one image or all."""
    rows = query(
        db,
        "SELECT name, image, image.ref AS ref, layer, mode, size, device, behind, boot_id, created_ms FROM activation"
        " JOIN image ON image.id = activation.image WHERE ? IS NULL OR image = ? ORDER BY name",
        (image, image),
    )
    return [ActivationRow(**row) for row in rows]


def activation(db: sqlite3.Connection, name: str) -> ActivationRow | None:
    """Return one recorded activation."""
    return next((a for a in activations(db) if a.name == name), None)


def known_digest(db: sqlite3.Connection, endpoint: str, bucket: str, etag: str, size: int) -> str | None:
    """Return the content of an object with this ETag and size, from an earlier fetch out of the same bucket.

    An ETag names an object's bytes (RFC 9110, 8.8.3: a strong validator), whatever its key; so layers that stand under
    several keys are fetched once. Weak ETags are never trusted for this.
    """
    if etag.startswith("W/"):
        return None
    row = query_one(
        db,
        "SELECT digest FROM pin WHERE endpoint = ? AND bucket = ? AND etag = ? AND size = ?"
        " ORDER BY fetched_ms LIMIT 1",
        (endpoint, bucket, etag, size),
    )
    return str(row["digest"]) if row else None


def verdict(db: sqlite3.Connection, blob: str, media: str, parent: str | None, limits: str) -> str | None:
    """Return the layer that these bytes make on this parent, if they were checked before."""
    row = query_one(
        db,
        "SELECT layer FROM verdict WHERE blob = ? AND media = ? AND parent = ? AND limits = ?",
        (blob, media, parent or "", limits),
    )
    return str(row["layer"]) if row else None


def chained(db: sqlite3.Connection, key: str) -> tuple[str, str] | None:
    """Return the layer and the blob digest that a chain key stands for, once its check has accepted it."""
    row = query_one(db, "SELECT layer, digest FROM chain WHERE key = ?", (key,))
    return (str(row["layer"]), str(row["digest"])) if row else None


def chain_of(db: sqlite3.Connection, layer: str | None) -> list[str]:
    """Return a layer and all below it, lowest first."""
    found: list[str] = []
    while layer is not None:
        found.append(layer)
        row = query_one(db, "SELECT parent FROM layer WHERE id = ?", (layer,))
        layer = row["parent"] if row else None
    return found[::-1]


def is_committed(db: sqlite3.Connection, layer: str) -> bool:
    """Tell whether the helper has sealed this layer, as far as we were told."""
    row = query_one(db, "SELECT committed FROM layer WHERE id = ?", (layer,))
    return bool(row and row["committed"])


def has_layer(db: sqlite3.Connection, layer: str) -> bool:
    """Tell whether we know this layer, sealed or not."""
    return query_one(db, "SELECT 1 FROM layer WHERE id = ?", (layer,)) is not None


def committed_layers(db: sqlite3.Connection) -> list[str]:
    """Return the layers that the helper has sealed, as far as we were told."""
    return [str(row["id"]) for row in query(db, "SELECT id FROM layer WHERE committed = 1")]


def content_bytes(db: sqlite3.Connection, layer: str) -> int:
    """Return the bytes of a layer's files."""
    row = query_one(db, "SELECT content_bytes FROM layer WHERE id = ?", (layer,))
    return int(row["content_bytes"]) if row else 0


def entries(db: sqlite3.Connection, layer: str) -> int:
    """Return how many operations make a layer: root reserves room for each."""
    row = query_one(db, "SELECT operations FROM layer WHERE id = ?", (layer,))
    return int(row["operations"]) if row else 0


def usage(db: sqlite3.Connection) -> list[sqlite3.Row]:
    """Return for each image the bytes of files in its own layers (`exclusive`) and in those that others have too."""
    return query(
        db,
        """
        SELECT image.ref,
               coalesce(sum(layer.content_bytes) FILTER (WHERE used.images = 1), 0) AS exclusive,
               coalesce(sum(layer.content_bytes) FILTER (WHERE used.images > 1), 0) AS shared
          FROM image JOIN image_layer ON image_layer.image = image.id JOIN layer ON layer.id = image_layer.layer
          JOIN (SELECT layer, count(DISTINCT image) AS images FROM image_layer GROUP BY layer) AS used
            ON used.layer = layer.id
         GROUP BY image.id ORDER BY image.id""",
    )


def unused_layers(db: sqlite3.Connection) -> list[str]:
    """Return the layers that no image stands on, each before its parent."""
    rows = query(
        db,
        """
        WITH RECURSIVE used (id) AS (
            SELECT top FROM image UNION SELECT layer.parent FROM layer JOIN used ON layer.id = used.id
        ), depth (id, level) AS (
            SELECT id, 0 FROM layer WHERE parent IS NULL
            UNION ALL SELECT layer.id, depth.level + 1 FROM layer JOIN depth ON layer.parent = depth.id
        )
        SELECT depth.id FROM depth WHERE depth.id NOT IN (SELECT id FROM used WHERE id IS NOT NULL)
         ORDER BY level DESC, depth.id""",
    )
    return [str(row["id"]) for row in rows]


def blobs_by_age(db: sqlite3.Connection) -> dict[str, int]:
    """Return for each blob when it was last used, in milliseconds since the epoch."""
    return {str(row["digest"]): int(row["used_ms"]) for row in query(db, "SELECT digest, used_ms FROM blob")}


# ---------------------------------------------------------------- writing, inside a step's transaction


def record_blob(db: sqlite3.Connection, digest: str, size: int) -> None:
    """Note that a blob is in the cache and was used just now."""
    db.execute(
        "INSERT INTO blob (digest, size, used_ms) VALUES (?, ?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET used_ms = excluded.used_ms",
        (digest, size, now_ms()),
    )


def forget_blob(db: sqlite3.Connection, digest: str) -> None:
    """Forget a blob that was removed from the cache; what its object held stays on record."""
    db.execute("DELETE FROM blob WHERE digest = ?", (digest,))


def touch_blob(db: sqlite3.Connection, digest: str) -> None:
    """Note that a blob, if it is in the cache, was used just now."""
    db.execute("UPDATE blob SET used_ms = ? WHERE digest = ?", (now_ms(), digest))


def record_pin(db: sqlite3.Connection, endpoint: str, pin: Any, digest: str) -> None:
    """Note what an object held."""
    db.execute(
        "INSERT OR IGNORE INTO pin VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (endpoint, pin.bucket, pin.key, pin.version or "", pin.etag, pin.size, digest, now_ms()),
    )


def record_layer(db: sqlite3.Connection, accepted: Any, blob: str, media: str, limits: str) -> None:
    """Note a checked layer and the verdict that made it. ``accepted`` is the checker's report."""
    notes = {
        "dropped": accepted.dropped,
        "omitted": accepted.omitted,
        "warnings": [w.model_dump() for w in accepted.warnings],
    }
    db.execute(
        "INSERT OR IGNORE INTO layer"
        " (id, parent, manifest_bytes, payload_bytes, entries, operations, content_bytes, notes, created_ms)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            accepted.layer,
            accepted.parent,
            accepted.manifest_bytes,
            accepted.payload_bytes,
            accepted.entries,
            accepted.operations,
            accepted.content_bytes,
            json.dumps(notes, sort_keys=True),
            now_ms(),
        ),
    )
    db.execute(
        "INSERT OR REPLACE INTO verdict VALUES (?, ?, ?, ?, ?)",
        (blob, media, accepted.parent or "", limits, accepted.layer),
    )


def record_chain(db: sqlite3.Connection, key: str, layer: str, digest: str) -> None:
    """Note which layer a chain key stands for."""
    db.execute("INSERT OR REPLACE INTO chain VALUES (?, ?, ?)", (key, layer, digest))


def set_committed(db: sqlite3.Connection, layer: str, committed: bool = True) -> None:
    """Note that the helper has, or no longer has, this layer."""
    db.execute("UPDATE layer SET committed = ? WHERE id = ?", (int(committed), layer))


def forget_layer(db: sqlite3.Connection, layer: str) -> None:
    """Forget a layer and its verdicts."""
    db.execute("DELETE FROM verdict WHERE layer = ?", (layer,))
    db.execute("DELETE FROM layer WHERE id = ?", (layer,))


def record_image(db: sqlite3.Connection, ref: str, endpoint: str, layers: Iterable[tuple[Any, ...]], top: str) -> None:
    """Make an image visible. ``layers`` gives number, key, etag, version, size, media, digest, layer of each."""
    db.execute(
        "INSERT INTO image (ref, endpoint, top, pulled_ms, used_ms) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (ref, endpoint) DO UPDATE SET top = excluded.top, pulled_ms = excluded.pulled_ms",
        (ref, endpoint, top, now_ms(), now_ms()),
    )
    (image,) = db.execute("SELECT id FROM image WHERE ref = ? AND endpoint = ?", (ref, endpoint)).fetchone()
    db.execute("DELETE FROM image_layer WHERE image = ?", (image,))
    db.executemany("INSERT INTO image_layer VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [(image, *row) for row in layers])


def record_activation(db: sqlite3.Connection, image: int, given: Any) -> None:
    """Note a device that the helper gave out."""
    db.execute(
        "INSERT OR REPLACE INTO activation VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            given.name,
            image,
            given.layer,
            given.mode,
            given.size,
            given.device,
            behind(given.device),
            boot_id(),
            now_ms(),
        ),
    )


def forget_activation(db: sqlite3.Connection, name: str) -> None:
    """Forget a device that was taken back."""
    db.execute("DELETE FROM activation WHERE name = ?", (name,))


def forget_image(db: sqlite3.Connection, image: int) -> None:
    """Make an image invisible; its layers stay until nothing uses them and they are removed."""
    db.execute("DELETE FROM image WHERE id = ?", (image,))


def pull_key(ref: str, endpoint: str) -> str:
    """Return the key of an image's pull: one is at work at a time."""
    return f"{endpoint} {ref}"


def quick_lookup(
    paths: Paths, ref: str, endpoint: str, name: str | None, pins: Mapping[str, str] | None = None
) -> tuple[Image, ActivationRow | None] | None:
    """Return a ready image and its live activation: all that a pull with nothing to do needs. It writes nothing.

    ``pins``: the digests that the image's objects must have, by key; another image is not the one that is asked for.
    None where there is something to do: also a pull that was killed in its last moment and has not been ended yet.
    """
    connection = open_readonly(paths.database)
    if connection is None:
        return None
    with closing(connection) as db:
        try:
            image = image_by_ref(db, ref, endpoint)
            given = activation(db, name) if name is not None else None
            unfinished = query_one(
                db,
                "SELECT 1 FROM run WHERE machine = 'pull' AND key = ? AND outcome IS NULL",
                (pull_key(ref, endpoint),),
            )
            found = {row["key"]: row["digest"] for row in image_layers(db, image.id)} if image else {}
        except sqlite3.DatabaseError:
            return None  # the pull itself opens the state and says what is wrong with it
    if image is None or unfinished or pins not in (None, found):
        return None
    if name is None:
        return image, None
    live = given and given.image == image.id and given.layer == image.top and given.is_live()
    return (image, given) if live else None
