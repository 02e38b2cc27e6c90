"""A fetcher without a network: its bucket is a folder, its words are the real ones. argv: FOLDER [FAILURES_JSON]."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fake_check import mortal  # type: ignore[import-not-found]  # beside this file

FOLDER = Path(sys.argv[1])


def say(**report: object) -> None:
    mortal(FOLDER, "fetch")
    if report["type"] in ("pins", "failed") and (FOLDER / "clock").exists():
        report["clock_ahead_s"] = int((FOLDER / "clock").read_text())
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    mortal(FOLDER, "fetch")


def pin(bucket: str, path: Path) -> dict[str, object]:
    data = path.read_bytes()
    key = str(path.relative_to(FOLDER / bucket))
    return {
        "bucket": bucket,
        "key": key,
        "size": len(data),
        "etag": f'"{hashlib.md5(data).hexdigest()}"',
        "version": None,
    }


def fetch(request: dict[str, Any], blobs: Path) -> None:
    wanted = request["pin"]
    with (FOLDER / "transfers").open("a") as log:
        log.write(wanted["key"] + "\n")
    path = FOLDER / wanted["bucket"] / wanted["key"]
    if pin(wanted["bucket"], path) != wanted:
        say(type="failed", id=request["id"], code="changed", message=f"{wanted['key']} changed", retryable=False)
        return
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if request["expect"] not in (None, f"sha256:{digest}"):
        say(type="failed", id=request["id"], code="digest_mismatch", message="another content", retryable=False)
        return
    say(type="progress", id=request["id"], done_bytes=len(data) // 2)
    while (FOLDER / "slow-network").exists():
        say(type="progress", id=request["id"], done_bytes=len(data) // 2)
        time.sleep(0.02)
    (blobs / "sha256").mkdir(parents=True, exist_ok=True)
    partial = blobs / f"partial-{os.getpid()}"
    partial.write_bytes(data)
    partial.rename(blobs / "sha256" / digest)
    say(type="fetched", id=request["id"], digest=f"sha256:{digest}", size=len(data), transferred_bytes=len(data))


def main() -> None:
    hello = json.loads(sys.stdin.readline())
    say(type="ready", sandbox={"fake": "yes"}, credentials="none", endpoint=hello["endpoint"]["endpoint_url"] or "aws")
    for line in sys.stdin:
        request = json.loads(line)
        if request["type"] == "list":
            folder = FOLDER / request["bucket"] / request["prefix"]
            found = sorted(folder.iterdir()) if folder.is_dir() else []
            say(type="pins", id=request["id"], pins=[pin(request["bucket"], p) for p in found])
        elif request["type"] == "head":
            path = FOLDER / request["bucket"] / request["key"]
            if not path.exists():
                say(type="failed", id=request["id"], code="no_such_object", message="no such key", retryable=False)
                continue
            say(type="pins", id=request["id"], pins=[pin(request["bucket"], path)])
        else:
            fetch(request, Path(hello["blob_dir"]))


main()
