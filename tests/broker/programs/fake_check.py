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


def main() -> int:
    folder, job = Path(sys.argv[1]), json.loads(sys.argv[2])
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
    if data.startswith(b"evil"):
        violation: dict[str, Any] = {"rule": "path_escapes_root", "layer": job["layer_number"], "entry": 1, "offset": 0}
        violation |= {"name": "../x\\n", "reason": "the name leaves the root"}
        print(json.dumps({"type": "rejected", "violations": [violation], "complete": True}))
        return 65
    parent = None
    if job["lower"]:
        lower = os.pread(job["lower"][-1], 1 << 20, 0)
        parent = f"sha256:{hashlib.sha256(lower).hexdigest()}"
    head: dict[str, Any] = {"bytes": len(data), "entries": 1, "format": "imgpull.layer/1", "parent": parent}
    file: dict[str, Any] = {"at": 0, "gid": 0, "in": 0, "mode": 420, "mtime": 0, "name": "f", "op": "file"}
    file |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "uid": 0, "xattrs": {}}
    manifest = line(head) + line(file)
    os.write(job["manifest_fd"], manifest)
    if job["payload_fd"] is not None:
        os.write(job["payload_fd"], data)
    report: dict[str, Any] = {
        "type": "accepted",
        "layer": f"sha256:{hashlib.sha256(manifest).hexdigest()}",
        "parent": parent,
    }
    report |= {"manifest_bytes": len(manifest), "payload_bytes": len(data), "entries": 1, "operations": 1}
    print(json.dumps(report | {"content_bytes": len(data), "dropped": {"xattr_dropped": 1}}))
    return 0


sys.exit(main())
