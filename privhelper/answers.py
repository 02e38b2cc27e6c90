"""What each request does. Who may have what is decided here.

Rule 1: a layer is named by the sha256 of the manifest that was applied, and only a sealed one is ever used.
Rule 2: a layer's own device is active only while its commit runs. Activations and verify work on copies, so no origin
is ever live; and root mounts a copy only where nobody can write to it or put something else in its place.
Rule 3: an activation is looked up by uid and name together; there is no way to reach another user's.
"""

import os
import select
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from privhelper import files, kernel, manifest, populate, protocol, sandbox, verify
from privhelper.admission import Admission
from privhelper.connection import Connection
from privhelper.devices import USABLE, Devices
from privhelper.errors import AnswerError, GoneError, TakenError, told
from privhelper.policy import Policy
from privhelper.protocol import Message
from privhelper.stores.base import BASE, PoolStatus

_ACTIONS_TOLD: Final = 100  # by a reconcile; many more would not fit a message
_POOL_FIGURES: Final = (
    "state", "data_bytes", "data_used_bytes", "metadata_bytes", "metadata_used_bytes", "block_bytes",
)  # fmt: skip
Answer = tuple[Message, list[int]]


class Answers:
    """One method a request of the table; each returns the body of its ``ok`` and the descriptors that go with it."""

    def __init__(self, policy: Policy, devices: Devices, client: Connection) -> None:
        self._policy, self._settings, self._limits = policy, policy.settings, policy.settings["limits"]
        self._devices, self._ledger, self._store = devices, devices.ledger, devices.store
        self._client, self._uid = client, client.uid
        self._admission = Admission(policy.settings, devices.ledger, client.uid)

    # ------------------------------------------------------------ asking

    def answer_hello(self, fields: Message, fds: list[int]) -> Answer:
        """Say who answers and how the pool is."""
        if fields["version"] != protocol.VERSION:
            raise AnswerError("version", f"the helper speaks version {protocol.VERSION}, not {fields['version']}")
        status = self._store.status()
        pool = {name: getattr(status, name) for name in _POOL_FIGURES}
        pool["reserved_bytes"] = self._admission.reserved_bytes()
        body = {"version": protocol.VERSION, "policy": self._policy.digest, "store": self._store.kind, "pool": pool}
        return body, []

    def answer_stat(self, fields: Message, fds: list[int]) -> Answer:
        """Say whether a layer is there."""
        row = self._ledger.layer(fields["layer"])
        return {"state": _shown_state(row) if row else "absent"}, []

    def answer_manifest(self, fields: Message, fds: list[int]) -> Answer:
        """Hand out the manifest of a sealed layer, read-only."""
        return {}, [self._open_manifest(self._sealed(fields["layer"])["dev"])]

    def answer_list(self, fields: Message, fds: list[int]) -> Answer:
        """Send an item for each layer, and for each activation of the caller's."""
        for row in self._ledger.layers():
            columns = {name: row[name] for name in ("layer", "parent", "entries", "bytes", "created")}
            self._client.tell({"type": "item", "kind": "layer", "state": _shown_state(row), **columns})
        active = self._store.active() if self._store.status().state in USABLE else {}
        for row in self._ledger.activations(self._uid):
            columns = {name: row[name] for name in ("name", "layer", "mode", "size")}
            device = active.get(row["dev"], "")
            self._client.tell({"type": "item", "kind": "activation", "device": device, "live": bool(device), **columns})
        return {}, []

    # ------------------------------------------------------------ commit

    def answer_commit(self, fields: Message, fds: list[int]) -> Answer:
        """Turn a manifest and a payload into a sealed layer, or find it there."""
        for what, fd in zip(("manifest_bytes", "payload_bytes"), fds, strict=True):
            if os.fstat(fd).st_size != fields[what]:
                raise AnswerError("rejected", f"{what} is not the size of the descriptor", "size_mismatch")
            if fields[what] > self._limits[what]:
                raise AnswerError("refused", f"{what} above the limit of {self._limits[what]}", "limit")
        layer = files.digest(fds[0])
        while not self._ledger.claim(layer, self._uid):
            row = self._ledger.layer(layer)
            if row is not None:
                self._devices.await_other(row["dev"], self._pause)
                continue
            with suppress(TakenError):  # somebody else was faster
                self._commit_anew(layer, *fds)
                return {"layer": layer, "existed": False}, []
        return {"layer": layer, "existed": True}, []

    def _commit_anew(self, layer: str, file: int, payload: int) -> None:
        header = manifest.read_header(file, self._limits)
        parent = self._sealed(header.parent) if header.parent else None
        depth = parent["depth"] + 1 if parent else 1
        if depth > self._limits["chain"]:
            raise AnswerError("refused", f"{depth} layers on one another, {self._limits['chain']} at most", "limit")
        reserved = self._admission.cost(header)
        kept = os.fstat(file).st_size  # the manifest

        def admit(status: PoolStatus) -> None:
            if header.parent:
                self._sealed(header.parent)
            if self._ledger.layer(layer) is not None:
                raise TakenError("the layer is being made by another process")
            self._admission.check_layer(status, reserved, kept, self._devices.manifests)

        columns: Message = {"parent": header.parent, "depth": depth, "reserved": reserved, "charge": reserved + kept}
        columns |= {"entries": header.entries, "bytes": header.content_bytes}
        origin = parent["dev"] if parent else BASE
        dev = self._devices.create("layer", layer, self._uid, origin, admit, **columns)
        with self._devices.making(dev), self._telling_no_room():
            self._populate(dev, header, file, payload)
            self._seal(dev, layer, file)

    @contextmanager
    def _telling_no_room(self) -> Iterator[None]:
        """Say so when a failure comes from a pool that has filled up, which a disk's error looks like."""
        try:
            yield
        except (AnswerError, OSError) as error:
            if getattr(error, "code", "fault") == "fault" and self._store.status().state == "out_of_data":
                raise AnswerError(
                    "no_room", f"the pool has filled up, nothing of the layer is left: {told(error)}"
                ) from error
            raise

    def _populate(self, dev: int, header: manifest.Header, file: int, payload: int) -> None:
        """Write the layer. An error of the one sync dooms it: a second sync would not tell again."""
        path = self._store.activate(dev, False)
        options, payload_bytes = self._settings["populate"]["mount_options"], os.fstat(payload).st_size

        def work(root: int, tell: populate.Tell) -> tuple[int, int]:
            return populate.run(populate.Writer(root, payload, payload_bytes, self._settings, tell), file)

        with files.closing(kernel.mount_detached("ext4", path, options, kernel.MOUNT_ATTR_SAFE)) as mount:
            # Opened before the fork: fsync(2), an error goes to the descriptors that were open at the time.
            with files.closing(kernel.open_root(mount)) as synced:
                self._admission.check_inside(synced, header)
                self._watch(sandbox.start(self._policy, "populate", mount, (file, payload), work))
                kernel.syncfs(synced)

    def _seal(self, dev: int, layer: str, file: int) -> None:
        self._store.deactivate(dev)
        self._ledger.record(dev, "populated")
        self._store.settle(dev)
        files.copy_durably(file, self._devices.manifest_path(dev))
        self._devices.ready()  # a pool that failed meanwhile may have failed silently
        self._ledger.seal(dev, layer, self._uid)

    def _watch(self, child: sandbox.Child) -> None:
        """Pass on the child's progress until it is done; kill it when the client hangs up."""
        poll = select.poll()
        poll.register(child.results, select.POLLIN)
        poll.register(self._client.fileno(), select.POLLRDHUP)
        final, finished = sandbox.Report("fault", message="it told nothing"), False
        try:
            while not finished:
                if self._client.fileno() in [fd for fd, _ in poll.poll()]:
                    raise GoneError
                reports = child.read()
                finished = reports is None
                for report in reports or ():
                    if report.kind == "progress":
                        progress = {"entries": report.entries, "bytes": report.content_bytes}
                        self._client.tell({"type": "progress", **progress})
                    else:
                        final = report
        finally:
            failure = child.end(kill=not finished)
        if failure:
            raise AnswerError("fault", f"the child was {failure}: {final.message}")
        if final.kind != "done":
            raise AnswerError(final.kind, final.message, final.rule, final.entry)

    def _pause(self, pause_s: float) -> None:
        """Wait a little for another process; notice when nobody wants the answer any more."""
        if self._client.is_gone(pause_s):
            raise GoneError

    # ------------------------------------------------------------ activations

    def answer_activate(self, fields: Message, fds: list[int]) -> Answer:
        """Give the caller a device of its own: a copy of a layer, writable, or read-only and mounted as well."""
        layer, name, mode, size = (fields[key] for key in ("layer", "name", "mode", "size"))
        row = self._ledger.activation(self._uid, name)
        if row is not None and row["state"] != "granted":
            self._devices.await_other(row["dev"], self._pause)
            row = self._ledger.activation(self._uid, name)
        dev = row["dev"] if row is not None else self._create_activation(layer, name, mode, size)
        with self._devices.locked(dev):
            row = self._ledger.device(dev)  # it may have gone while nobody held its lock
            if row is None or row["state"] != "granted":
                raise AnswerError("busy", f"activation {name} goes away")
            if (row["layer"], row["mode"], row["asked_size"]) != (layer, mode, size):
                raise AnswerError("busy", f"activation {name} stands already: {row['mode']} on {row['layer']}")
            self._devices.ready()
            path = self._store.active().get(dev) or self._store.activate(dev, mode == "ro")
            self._store.grant(path, self._uid, mode == "rw")
            body = {"device": path, "mode": mode, "name": name, "layer": layer, "size": row["size"]}
            return body, [self._store.mount_read_only(dev)] if mode == "ro" else []

    def _create_activation(self, layer: str, name: str, mode: str, asked_size: int) -> int:
        origin = self._sealed(layer)["dev"]
        least, most = self._store.size_bytes(origin), self._limits["device_bytes"]
        if asked_size and not least <= asked_size <= most:
            raise AnswerError("refused", f"size {asked_size} is not between {least} and {most}", "size")
        size = asked_size or least

        def admit(status: PoolStatus) -> None:
            self._sealed(layer)
            if self._ledger.activation(self._uid, name) is not None:
                raise TakenError(f"activation {name} is being made by another process")
            self._admission.check_activation(status, size if mode == "rw" else 0)

        def finish(dev: int) -> None:
            self._store.resize(dev, size)
            self._store.settle(dev)

        columns = {"name": name, "mode": mode, "size": size, "asked_size": asked_size}
        dev = self._devices.create("activation", layer, self._uid, origin, admit, finish, **columns)
        self._ledger.unlock(dev)
        return dev

    def answer_deactivate(self, fields: Message, fds: list[int]) -> Answer:
        """Take one of the caller's devices away, with what was written to it."""
        row = self._ledger.activation(self._uid, fields["name"])
        if row is None:
            raise AnswerError("not_found", f"no activation {fields['name']} of yours")
        with self._devices.locked(row["dev"]):
            self._devices.ready(*USABLE)
            self._devices.destroy(row["dev"])
        return {}, []

    # ------------------------------------------------------------ layers

    def answer_remove(self, fields: Message, fds: list[int]) -> Answer:
        """Drop the caller's claim on a layer, and the layer with the last claim when nothing stands on it."""
        self._devices.ready(*USABLE)
        row = self._ledger.layer(fields["layer"])
        if row is None:
            return {"removed": False}, []
        with self._devices.locked(row["dev"]):
            removed = self._give_up(fields["layer"], row["dev"])
            if removed:
                self._devices.destroy(row["dev"])
        return {"removed": removed}, []

    def _give_up(self, layer: str, dev: int) -> bool:
        """Drop the claim; return whether it was the last and the layer is now marked to go."""
        ledger, uid = self._ledger, self._uid
        with ledger.transaction():
            row = ledger.device(dev)
            if row is None or row["state"] != "sealed":
                return False
            claims = ledger.claims(layer)
            if uid not in claims and uid != 0:
                raise AnswerError("refused", "only a user who has committed this layer, or root, may remove it")
            others = claims - {uid}
            if others and uid != 0:
                ledger.hand_over(dev, uid, min(others))
                return False
            if users := ledger.users(layer):
                raise AnswerError("in_use", f"{users} layers or activations stand on it", users=users)
            ledger.retire(dev)
            return True

    def answer_verify(self, fields: Message, fds: list[int]) -> Answer:
        """Compare a sealed layer, by a read-only copy, with its manifest."""
        layer = fields["layer"]
        row = self._sealed(layer)
        with files.closing(self._open_manifest(row["dev"])) as file:
            if files.digest(file) != layer:
                raise AnswerError("fault", "the kept manifest is not that of this layer")

            def work(root: int, tell: populate.Tell) -> tuple[int, int]:
                return populate.run(verify.Reader(root, self._settings, tell), file)

            dev = self._devices.create("scratch", layer, self._uid, row["dev"], lambda status: self._sealed(layer))
            with self._devices.making(dev):
                with files.closing(self._store.mount_read_only(dev)) as mount:
                    self._watch(sandbox.start(self._policy, "verify", mount, (file,), work))
                self._devices.destroy(dev)
        return {"files": row["entries"], "bytes": row["bytes"]}, []

    def answer_reconcile(self, fields: Message, fds: list[int]) -> Answer:
        """Make ledger and store agree in both directions and say what was done."""
        actions = self._devices.reconcile(thorough=True)
        more = [f"and {len(actions) - _ACTIONS_TOLD} more, see the log"] if len(actions) > _ACTIONS_TOLD else []
        return {"actions": actions[:_ACTIONS_TOLD] + more}, []

    def _sealed(self, layer: str) -> Any:
        row = self._ledger.layer(layer)
        if row is None or row["state"] != "sealed":
            raise AnswerError("not_found", f"layer {layer} is not here")
        return row

    def _open_manifest(self, dev: int) -> int:
        return os.open(self._devices.manifest_path(dev), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _shown_state(row: Any) -> str:
    return "sealed" if row["state"] == "sealed" else "committing"
