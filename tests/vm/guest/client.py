"""An ordinary user's client of the installed helper: runs in the guest as that user, talks to the real socket.

  client.py commit SPEC     commit the layer of SPEC: {"parent": id or null, "files": n, "bytes": n of each, "tag": s}
  client.py ask OP JSON     ask one thing
Prints the answer as JSON; exit code 0 for ok, 1 for an error, 2 if the door is closed.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.privhelper.client import Helper, Layer

SOCKET = "/run/imgpull/helper.sock"


class Connection(Helper):
    """The plain client of the helper's tests, over a socket that somebody listens on."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(300)
        self.sock.connect(SOCKET)

    def close(self) -> int:
        self.sock.close()
        return 0


def layer_of(spec: dict[str, Any]) -> Layer:
    """Return a layer: one folder with files of their own content, so that no two layers are alike."""
    layer = Layer(spec["parent"])
    folder = layer.directory(0, f"layer-{spec['tag']}")
    for number in range(spec["files"]):
        seed = f"{spec['tag']}/{number}/".encode()
        layer.file(folder, f"file{number}", (seed * (spec["bytes"] // len(seed) + 1))[: spec["bytes"]])
    return layer


def main() -> int:
    """Do what the command line says."""
    try:
        helper = Connection()
    except PermissionError as error:
        print(json.dumps({"type": "closed", "message": str(error)}))
        return 2
    with helper, tempfile.TemporaryDirectory() as folder:
        helper.hello()
        if sys.argv[1] == "commit":
            layer = layer_of(json.loads(sys.argv[2]))
            answer = helper.commit(layer.manifest(), layer.write_payload(Path(folder)))
        else:
            answer = helper.ask(sys.argv[2], **json.loads(sys.argv[3]))
        answer["mounted"] = [sorted(os.listdir(f"/proc/self/fd/{fd}")) for fd in answer.pop("fds")]
        answer["items"] = [item for item in answer["items"] if item["type"] == "item"]
        print(json.dumps(answer))
        return 0 if answer["type"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
