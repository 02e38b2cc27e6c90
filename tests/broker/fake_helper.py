"""A root helper without root: the real wire over a real socket, a dictionary for a pool.

It is strict where the real one is (first message, exact fields, descriptors), its ledger follows the same rules
(claims, names, what stands on what, devices that a reboot takes away), and it has switches for the bad days:
``script`` maps a request's name to a function that answers in place of the normal one.
"""

import array
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from privhelper import protocol

POOL = {
    "state": "ready",
    "data_bytes": 1 << 31,
    "data_used_bytes": 1 << 20,
    "metadata_bytes": 0,
    "metadata_used_bytes": 0,
    "block_bytes": 4096,
    "reserved_bytes": 0,
}
ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
UID = 1000
OTHER_UID = 1001  # somebody else on this machine


class HangUpError(Exception):
    """Close the connection without an answer."""


class FakeHelper:
    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "helper.sock")
        self.mount = folder  # what a read-only activation's mount shows
        self.layers: dict[str, dict[str, Any]] = {}
        self.claims: dict[str, set[int]] = {}
        self.manifests: dict[str, bytes] = {}  # also of layers that are gone
        self.activations: dict[str, dict[str, Any]] = {}  # of the one user
        self.others: dict[str, str] = {}  # somebody else's activations: name and layer
        self.requests: list[dict[str, Any]] = []
        self.connections = 0
        self.script: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}
        self.device = "/dev/null"

    def count(self, op: str) -> int:
        return sum(r["op"] == op for r in self.requests)

    def error(self, code: str, message: str = "no", **more: Any) -> dict[str, Any]:
        return {"type": "error", "code": code, "message": message, "rule": None, "entry": None, "figures": {}, **more}

    def answer(self, request: dict[str, Any], descriptors: list[int]) -> list[dict[str, Any]]:
        op = request["op"]
        if op in self.script:
            return [self.script[op](request)]
        handler: Callable[..., list[dict[str, Any]]] = getattr(self, f"on_{op}")
        return handler(request, descriptors)

    def reboot(self) -> None:
        """Take every device away; what is granted stays on the books."""
        for row in self.activations.values():
            row |= {"live": False, "device": ""}

    def is_live(self, name: str, layer: str, device: str) -> bool:
        """Tell what the kernel would: this device is there, and still the one that was given out."""
        row = self.activations.get(name)
        return row is not None and row["live"] and (row["layer"], row["device"]) == (layer, device)

    def on_hello(self, request: dict[str, Any], _: list[int]) -> list[dict[str, Any]]:
        if request["version"] != protocol.VERSION:
            return [self.error("version")]
        return [
            {
                "type": "ok",
                "version": protocol.VERSION,
                "policy": "sha256:" + "0" * 64,
                "store": "reflink",
                "pool": POOL,
            }
        ]

    def on_stat(self, request: dict[str, Any], _: list[int]) -> list[dict[str, Any]]:
        return [{"type": "ok", "state": "sealed" if request["layer"] in self.layers else "absent"}]

    def on_commit(self, request: dict[str, Any], descriptors: list[int], uid: int = UID) -> list[dict[str, Any]]:
        manifest, payload = descriptors
        assert fcntl.fcntl(manifest, fcntl.F_GET_SEALS) == ALL_SEALS
        assert fcntl.fcntl(payload, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        data = os.pread(manifest, request["manifest_bytes"] + 1, 0)
        layer = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if layer in self.layers:
            self.claims[layer].add(uid)
            return [{"type": "ok", "layer": layer, "existed": True}]
        head, *lines = [json.loads(line) for line in data.splitlines()]
        if head["parent"] is not None and head["parent"] not in self.layers:
            return [self.error("not_found", "the parent is absent", rule="layer_absent")]
        for line in lines:
            if line["op"] == "file":
                content = os.pread(payload, line["size"], line["at"])
                if hashlib.sha256(content).hexdigest() != line["sha256"]:
                    return [self.error("rejected", "content differs from the manifest", entry=1)]
        self.seal(layer, data, uid)
        progress = {"type": "progress", "entries": head["entries"], "bytes": head["bytes"]}
        return [progress, {"type": "ok", "layer": layer, "existed": False}]

    def seal(self, layer: str, manifest: bytes, uid: int) -> None:
        """Put a layer on the books."""
        head = json.loads(manifest.splitlines()[0])
        self.manifests[layer] = manifest
        row = {"layer": layer, "parent": head["parent"], "entries": head["entries"], "bytes": head["bytes"]}
        self.layers[layer] = row | {"state": "sealed", "created": 1_767_225_600}
        self.claims[layer] = {uid}

    def on_manifest(self, request: dict[str, Any], _: list[int]) -> list[dict[str, Any]]:
        if request["layer"] not in self.layers:
            return [self.error("not_found", rule="layer_absent")]
        descriptor = os.memfd_create("manifest")
        os.write(descriptor, self.manifests[request["layer"]])
        return [{"type": "ok", "descriptor": descriptor}]

    def on_activate(self, request: dict[str, Any], _: list[int]) -> list[dict[str, Any]]:
        name = request["name"]
        given = {k: request[k] for k in ("layer", "name", "mode", "size")}
        if name not in self.activations:
            if request["layer"] not in self.layers:
                return [self.error("not_found", "no such layer", rule="layer_absent")]
            self.activations[name] = given | {"live": False, "device": ""}
        row = self.activations[name]
        if any(row[k] != given[k] for k in given):
            return [self.error("busy", "the name is in use")]
        if not row["live"]:
            row |= {"live": True, "device": self.device}
        mount = {"descriptor": os.open(self.mount, os.O_PATH | os.O_DIRECTORY)} if row["mode"] == "ro" else {}
        return [{"type": "ok", **given, "device": row["device"], "size": request["size"] or 1 << 30, **mount}]

    def on_deactivate(self, request: dict[str, Any], _: list[int]) -> list[dict[str, Any]]:
        if self.activations.pop(request["name"], None) is None:
            return [self.error("not_found")]
        return [{"type": "ok"}]

    def on_remove(self, request: dict[str, Any], _: list[int], uid: int = UID) -> list[dict[str, Any]]:
        layer = request["layer"]
        if layer not in self.layers:
            return [{"type": "ok", "removed": False}]
        if uid not in self.claims[layer]:
            return [self.error("refused", "only a user who has committed this layer, or root, may remove it")]
        if self.claims[layer] != {uid}:
            self.claims[layer].discard(uid)
            return [{"type": "ok", "removed": False}]
        stands = [row["parent"] for row in self.layers.values()] + list(self.others.values())
        if layer in stands or any(a["layer"] == layer for a in self.activations.values()):
            return [self.error("in_use")]
        del self.layers[layer], self.claims[layer]
        return [{"type": "ok", "removed": True}]

    def on_list(self, _: dict[str, Any], __: list[int]) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = [{"type": "item", "kind": "layer", **row} for row in self.layers.values()]
        for row in self.activations.values():
            items.append({"type": "item", "kind": "activation", **row, "size": row["size"] or 1 << 30})
        return [*items, {"type": "ok"}]

    def on_verify(self, request: dict[str, Any], _: list[int]) -> list[dict[str, Any]]:
        if request["layer"] not in self.layers:
            return [self.error("not_found", rule="layer_absent")]
        return [{"type": "ok", "files": 1, "bytes": 1}]

    def on_reconcile(self, _: dict[str, Any], __: list[int]) -> list[dict[str, Any]]:
        return [{"type": "ok", "actions": []}]

    async def _serve_one(self, sock: trio.socket.SocketType) -> None:
        self.connections += 1
        greeted = False
        with sock:
            while True:
                try:
                    data, ancillary, _, _ = await sock.recvmsg(protocol.MAX_MESSAGE, socket.CMSG_SPACE(8))
                except OSError:
                    return  # the client was killed with an answer unread
                descriptors = [fd for _, _, raw in ancillary for fd in array.array("i", raw)]
                try:
                    if not data:
                        return
                    request = json.loads(data)
                    assert greeted or request["op"] == "hello"
                    greeted = True
                    self.requests.append(request)
                    for reply in self.answer(request, descriptors):
                        await _send(sock, reply)
                except (HangUpError, OSError):
                    return
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with listener:
            await listener.bind(self.path)
            listener.listen(64)
            task_status.started()
            async with trio.open_nursery() as nursery:
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self._serve_one, sock)


async def _send(sock: trio.socket.SocketType, reply: dict[str, Any]) -> None:
    """Send one reply; a ``descriptor`` in it goes along by SCM_RIGHTS and is closed here."""
    descriptor = reply.pop("descriptor", None)
    data = json.dumps(reply).encode()
    if descriptor is None:
        await sock.send(data)
        return
    try:
        await sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))])
    finally:
        os.close(descriptor)


@asynccontextmanager
async def fake_helper(folder: Path) -> AsyncGenerator[FakeHelper, None]:
    fake = FakeHelper(folder)
    async with trio.open_nursery() as nursery:
        await nursery.start(fake.serve)
        yield fake
        nursery.cancel_scope.cancel()
