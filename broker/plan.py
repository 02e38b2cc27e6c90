"""What a pull would do, in bytes, blocks and requests: `imgpull plan`.

Rule 1: nothing is done. S3 is asked what there is, the helper how its pool is; no run is started.
Rule 2: room is counted as root counts it, by the same numbers of policy/helper.toml; root's own count decides.
Rule 3: what cannot be known yet is a lower bound and says so: a compressed layer tells its size when it is unpacked.
"""

import tomllib
from functools import partial
from typing import Any

from broker import pull, store, work
from broker.app import App, endpoint_of
from broker.console import Reporter
from broker.errors import ImgpullError
from broker.reference import Reference
from broker.settings import POLICY_DIR, SYSTEM_DIR, Settings


def plan(settings: Settings, reference: Reference, name: str | None) -> dict[str, Any]:
    """Return what a pull with an activation called ``name`` would do now: a row a layer, and sums."""
    return work.run(partial(_plan, settings, reference, name))


async def _plan(settings: Settings, reference: Reference, name: str | None) -> dict[str, Any]:
    request = pull.PullRequest(ref=str(reference), source=settings.source, endpoint=endpoint_of(settings), name=name)
    async with work.opened(settings, Reporter()) as (app, _):
        resolved = await pull.pin_layers(app, request)
        keys = pull.chain_keys(resolved, app.limits)
        rows = [await _layer(app, resolved.origin, s, k) for s, k in zip(resolved.layers, keys, strict=True)]
        given = await app.read(store.activation, name) if name else None
        pool, why_no_pool = await _pool(app)
    new = [row for row in rows if row["state"] != "here"]
    live = given is not None and given.ref == str(reference) and not new and given.is_live()
    found: dict[str, Any] = {
        "image": str(reference),
        "layers": rows,
        "fetch_bytes": sum(row["fetch_bytes"] for row in rows),
        "store_bytes": sum(row["bytes"] for row in new),
        "exact": all(row["exact"] for row in new),
        "commits": len(new),
        "activations": int(name is not None and not live),
        "pool": pool,
        "pool_error": why_no_pool,
    }
    return found | (_room(new, pool) if pool else {"data_blocks": None, "metadata_bytes": None, "fits": None})


async def _pool(app: App) -> tuple[dict[str, Any] | None, str]:
    try:
        async with app.helper() as root:
            return dict(root.greeting["pool"]), ""
    except ImgpullError as error:
        return None, error.problem.what


async def _layer(app: App, origin: str, spec: pull.LayerSpec, key: str) -> dict[str, Any]:
    known = await app.read(store.chained, key)
    committed = known is not None and await app.read(store.is_committed, known[0])
    digest = await app.read(store.known_digest, origin, spec.pin.bucket, spec.pin.etag, spec.pin.size)
    cached = digest is not None and app.paths.blob(digest).exists()
    state = "here" if committed else "checked" if known else "fetched" if cached else "new"
    content, entries = spec.pin.size, None
    if known:
        content, entries = await app.read(store.content_bytes, known[0]), await app.read(store.entries, known[0])
    return {
        "layer": spec.number,
        "object": spec.pin.key,
        "state": state,
        "bytes": content,
        "entries": entries,
        "exact": known is not None,
        "fetch_bytes": 0 if committed or cached else spec.pin.size,
    }


def _room(new: list[dict[str, Any]], pool: dict[str, Any]) -> dict[str, Any]:
    """Return what the new layers reserve of the pool, and whether it has as much; privhelper counts the same way."""
    grants = admission()
    reserve = grants["layer_bytes"] * len(new) + sum(
        row["bytes"] + (row["entries"] or 0) * grants["entry_bytes"] for row in new
    )
    free = pool["data_bytes"] - pool["data_used_bytes"] - pool["reserved_bytes"]
    free -= pool["data_bytes"] * grants["data_reserve_percent"] // 100
    blocks = -(-reserve // max(1, pool["block_bytes"]))
    metadata = blocks * grants["metadata_bytes_per_block"] if pool["metadata_bytes"] else 0
    metadata_free = pool["metadata_bytes"] - pool["metadata_used_bytes"]
    metadata_free -= pool["metadata_bytes"] * grants["metadata_reserve_percent"] // 100
    fits = pool["state"] == "ready" and (not new or (reserve <= free and metadata <= metadata_free))
    return {"data_blocks": blocks, "metadata_bytes": metadata, "fits": fits}


def admission() -> dict[str, int]:
    """Return what root's policy reserves for a commit, an administrator's file before ours."""
    found: dict[str, int] = {}
    for folder in (POLICY_DIR, SYSTEM_DIR):
        try:
            found |= tomllib.loads((folder / "helper.toml").read_text(encoding="utf-8")).get("admission", {})
        except FileNotFoundError:
            continue
    return found
