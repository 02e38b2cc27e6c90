"""A checker without a sandbox: a blob is one file's content, its manifest is real. argv: FOLDER JOB.

A blob that begins with `evil` is refused, `die` kills the checker, `silent` ends without a verdict.
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def verdict(data: bytes, number: int, lower: bytes | None) -> tuple[dict[str, Any], bytes]:
    """Give the last report on a blob that lies on a lower manifest, and its own manifest."""
    if data.startswith(b"evil"):
        violation: dict[str, Any] = {"rule": "path_escapes_root", "layer": number, "entry": 1, "offset": 0}
        violation |= {"name": "../x\\n", "reason": "the name leaves the root"}
        return {"type": "rejected", "violations": [violation], "complete": True}, b""
    parent = None if lower is None else f"sha256:{hashlib.sha256(lower).hexdigest()}"
    head: dict[str, Any] = {"bytes": len(data), "entries": 1, "format": "imgpull.layer/1", "parent": parent}
    file: dict[str, Any] = {"at": 0, "gid": 0, "in": 0, "mode": 420, "mtime": 0, "name": "f", "op": "file"}
    file |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "uid": 0, "xattrs": {}}
    manifest = line(head) + line(file)
    layer = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    report: dict[str, Any] = {"type": "accepted", "layer": layer, "parent": parent}
    report |= {"manifest_bytes": len(manifest), "payload_bytes": len(data), "entries": 1, "operations": 1}
    return report | {"content_bytes": len(data), "dropped": {"xattr_dropped": 1}}, manifest


def mortal(folder: Path, kind: str) -> None:
    """Count the moments at which a worker of this kind can die; die at the one whose number lies in ``<kind>-dies``."""
    with (folder / f"{kind}-moments").open("ab") as moments:
        moments.write(b".")
        number = moments.tell()
    dies = folder / f"{kind}-dies"
    if dies.exists() and int(dies.read_text()) == number:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
    mortal(folder, "check")
    data = os.pread(0, 1 << 20, 0)
    with (folder / "checks").open("a") as log:
        log.write(hashlib.sha256(data).hexdigest() + "\n")
    if data.startswith(b"die"):
        os.kill(os.getpid(), signal.SIGSYS)
    if data.startswith(b"silent"):
        return 0
    if data.startswith(b"chatty"):
        print(json.dumps({"type": "accepted", "layer": "../../etc/passwd"}))
        return 0
    print(json.dumps({"type": "progress", "done_bytes": len(data)}), flush=True)
    mortal(folder, "check")
    lower = os.pread(job["lower"][-1], 1 << 20, 0) if job["lower"] else None
    report, manifest = verdict(data, job["layer_number"], lower)
    os.write(job["manifest_fd"], manifest)
    if job["payload_fd"] is not None and manifest:
        os.write(job["payload_fd"], data)
    mortal(folder, "check")
    print(json.dumps(report), flush=True)
    mortal(folder, "check")
    return 0 if manifest else 65


if __name__ == "__main__":
    sys.exit(main())
