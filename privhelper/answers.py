"""What each request does. All decisions of root are on this page.

Rule 1: a layer is named by the sha256 of the manifest that was applied, and only a sealed one is ever used.
Rule 2: a layer's own device is active only while its commit runs. Activations and verify work on copies, so no origin
is ever live and no user's device is ever mounted by root, but for the read-only copies that nobody can write.
Rule 3: an activation is looked up by uid and name together; there is no way to reach another user's.
Rule 4: room is reserved, and quotas are checked, in the transaction that writes the intent.
Rule 5: whatever fails on the way to ``sealed`` or ``granted`` is taken apart at once, or by the next start.
"""

import contextlib
import hashlib
import os
import select
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

from privhelper import kernel, manifest, populate, protocol, sandbox, verify
from privhelper.ledger import SETTLED, Ledger
from privhelper.policy import Policy
from privhelper.protocol import Message
from privhelper.stores.base import BASE, READY, PoolStatus, Store, StoreError

_USABLE: Final = (READY, "out_of_data")  # states in which devices can still be deleted
_CHUNK_BYTES: Final = 1 << 17


class AnswerError(Exception):
    """A request that is not done, and why. ``code`` is one of protocol.EXIT_CODES."""

    def __init__(
        self, code: str, message: str, rule: str | None = None, entry: int | None = None, **figures: int
    ) -> None:
        super().__init__(message)
        self.code, self.rule, self.entry, self.figures = code, rule, entry, figures


class GoneError(Exception):
    """The client hung up; there is nobody to answer."""


class Client(Protocol):
    """The other end of the connection, as far as an answer needs it."""

    uid: int

    def fileno(self) -> int:
        """Return the socket, to be polled for a hang-up."""

    def tell(self, message: Message) -> None:
        """Send something on the way to the answer; lost when the client does not read."""


def open_store(policy: Policy) -> Store:
    """Return the store that the policy names, importing no other."""
    kind, state_dir = policy.settings["store"], policy.settings["state_dir"]
    if kind == "thin":
        from privhelper.stores import thin

        store: Store = thin.open_store(policy.settings["thin"], state_dir)
        return store
    from privhelper.stores import reflink

    return reflink.open_store(policy.settings["reflink"], state_dir)


def log(level: int, text: str) -> None:
    """Write one line for the journal; the level is that of syslog(3)."""
    print(f"<{level}>{text}", file=sys.stderr, flush=True)


class Answers:
    """One method a request of the table; each returns the body of its ``ok`` and the descriptors that go with it."""

    def __init__(self, policy: Policy, ledger: Ledger, store: Store, client: Client) -> None:
        self._policy, self._settings = policy, policy.settings
        self._ledger, self._store, self._client = ledger, store, client
        self._manifests = os.path.join(policy.settings["state_dir"], "manifests")

    # ------------------------------------------------------------ asking

    def answer_hello(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Say who answers and how the pool is."""
        if fields["version"] != protocol.VERSION:
            raise AnswerError("version", f"the helper speaks version {protocol.VERSION}, not {fields['version']}")
        status = self._store.status()
        pool = {name: getattr(status, name) for name in _FIGURES} | {"reserved_bytes": self._reserved_bytes()}
        return {
            "version": protocol.VERSION, "policy": self._policy.digest, "store": self._store.kind, "pool": pool,
        }, []  # fmt: skip

    def answer_stat(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Say whether a layer is there."""
        row = self._ledger.layer(fields["layer"])
        return {"state": "absent" if row is None else "sealed" if row["state"] == "sealed" else "committing"}, []

    def answer_manifest(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Hand out the manifest of a sealed layer, read-only."""
        return {}, [self._open_manifest(self._sealed(fields["layer"])["dev"])]

    def answer_list(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Send an item for each layer, and for each activation of the caller's."""
        for row in self._ledger.all("SELECT * FROM device WHERE kind = 'layer' AND state <> 'removing' ORDER BY dev"):
            state = "sealed" if row["state"] == "sealed" else "committing"
            columns = {name: row[name] for name in ("layer", "parent", "entries", "bytes", "created")}
            self._client.tell({"type": "item", "kind": "layer", "state": state, **columns})
        active = self._store.active() if self._store.status().state in _USABLE else {}
        query = "SELECT * FROM device WHERE kind = 'activation' AND uid = ? AND state = 'granted' ORDER BY dev"
        for row in self._ledger.all(query, self._client.uid):
            columns = {name: row[name] for name in ("name", "layer", "mode", "size")}
            device = active.get(row["dev"], "")
            self._client.tell({"type": "item", "kind": "activation", "device": device, "live": bool(device), **columns})
        return {}, []

    # ------------------------------------------------------------ commit

    def answer_commit(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Turn a manifest and a payload into a sealed layer, or find it there."""
        file, payload = fds
        for what, fd in (("manifest_bytes", file), ("payload_bytes", payload)):
            if os.fstat(fd).st_size != fields[what]:
                raise AnswerError("rejected", f"{what} is not the size of the descriptor", "size_mismatch")
            if fields[what] > self._settings["limits"][what]:
                raise AnswerError("refused", f"{what} above the limit of {self._settings['limits'][what]}", "limit")
        layer = _digest(file)
        while (dev := self._begin_commit(layer, file)) is None:
            row = self._ledger.layer(layer)
            if row is not None and row["state"] == "sealed":
                self._ledger.claim(layer, self._client.uid)
                return {"layer": layer, "existed": True}, []
            if row is not None:
                self._await_other(row["dev"])
        self._guarded(dev, lambda: self._populate(dev, layer, file, payload))
        return {"layer": layer, "existed": False}, []

    def _begin_commit(self, layer: str, file: int) -> int | None:
        """Reserve room and create the device; None when somebody else is at it or has done it."""
        if self._ledger.layer(layer) is not None:
            return None
        try:
            header = manifest.parse_header(next(manifest.lines(file), b""), self._settings["limits"])
        except manifest.RejectedError as error:
            raise AnswerError("rejected", str(error), error.rule, error.entry) from error
        admission = self._settings["admission"]
        reserved = header.content_bytes + header.entries * admission["entry_bytes"] + admission["layer_bytes"]
        charge = reserved + os.fstat(file).st_size  # the manifest is kept, and a layer of nothing costs as well
        self._check_state_dir(os.fstat(file).st_size)
        parent = self._sealed(header.parent) if header.parent else None
        depth = parent["depth"] + 1 if parent else 1
        if depth > self._settings["limits"]["chain"]:
            raise AnswerError("refused", f"{depth} layers on one another, {self._settings['limits']['chain']} at most")

        def admit(status: PoolStatus) -> bool:
            if header.parent:
                self._sealed(header.parent)
            if self._ledger.layer(layer) is not None:
                return False
            self._check_quota("layer_bytes", _LAYER_BYTES, charge)
            self._check_room(status, reserved)
            return True

        columns = {"parent": header.parent, "depth": depth, "reserved": reserved, "charge": charge}
        columns |= {"entries": header.entries, "bytes": header.content_bytes}
        return self._create("layer", layer, parent["dev"] if parent else BASE, admit, columns)

    def _populate(self, dev: int, layer: str, file: int, payload: int) -> None:
        """Write the layer and seal it. An error of the one sync dooms it: a second sync would not tell again."""
        path = self._store.activate(dev, False)
        mount = kernel.mount_detached("ext4", path, self._settings["populate"]["mount_options"], kernel.MOUNT_ATTR_SAFE)
        try:
            synced = kernel.open_root(mount)  # before the fork: fsync(2), errors go to descriptors open at the time
            try:
                self._check_inside(synced, self._ledger.device(dev))
                payload_bytes = os.fstat(payload).st_size

                def work(root: int, tell: populate.Tell) -> tuple[int, int]:
                    writer = populate.Writer(root, payload, payload_bytes, self._settings, tell)
                    return populate.run(writer, file, self._settings)

                self._watch(sandbox.start(self._policy, "populate", mount, (file, payload), work))
                kernel.syncfs(synced)
            finally:
                os.close(synced)
        finally:
            os.close(mount)
        self._store.deactivate(dev)
        self._ledger.record(dev, "populated")
        self._store.settle(dev)
        self._keep_manifest(dev, file, layer)
        self._ready()  # a pool that failed meanwhile may have failed silently
        self._ledger.record(dev, "sealed", reserved=0)
        self._ledger.claim(layer, self._client.uid)

    def _check_inside(self, root: int, row: Any) -> None:
        """Refuse, before the first write, what does not fit the file system of the image."""
        figures = os.fstatvfs(root)
        needed = row["bytes"] + row["entries"] * self._settings["admission"]["entry_bytes"]
        free = figures.f_bavail * figures.f_frsize
        if needed > free or row["entries"] > figures.f_ffree:
            raise AnswerError(
                "no_room", "the layer does not fit the file system of an image", needed_bytes=needed,
                free_bytes=free, needed_inodes=row["entries"], free_inodes=figures.f_ffree,
            )  # fmt: skip

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

    def _keep_manifest(self, dev: int, file: int, layer: str) -> None:
        """Keep the manifest for verify and for users who lost their database; durable before the layer is sealed."""
        digest, offset = hashlib.sha256(), 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        copy = os.open(self._manifest_path(dev), flags, 0o600)
        try:
            while chunk := os.pread(file, _CHUNK_BYTES, offset):
                offset += len(chunk)
                digest.update(chunk)
                while chunk:
                    chunk = chunk[os.write(copy, chunk) :]
            os.fsync(copy)
        finally:
            os.close(copy)
        _sync_folder(self._manifests)
        if "sha256:" + digest.hexdigest() != layer:
            raise AnswerError("fault", "the sealed manifest changed")

    # ------------------------------------------------------------ activations

    def answer_activate(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Give the caller a device of its own: a copy of a layer, writable, or read-only and mounted."""
        layer, name, mode, size = (fields[key] for key in ("layer", "name", "mode", "size"))
        row = self._ledger.activation(self._client.uid, name)
        if row is not None and row["state"] != "granted":
            self._await_other(row["dev"])
            row = self._ledger.activation(self._client.uid, name)
        dev = self._create_activation(layer, name, mode, size) if row is None else row["dev"]
        with self._locked(dev):
            if row is not None and (row["layer"], row["mode"], row["asked_size"]) != (layer, mode, size):
                raise AnswerError("busy", f"activation {name} stands already: {row['mode']} on {row['layer']}")
            self._ready()
            path = self._store.active().get(dev) or self._store.activate(dev, mode == "ro")
            size = self._ledger.device(dev)["size"]
            body = {"device": path, "mode": mode, "name": name, "layer": layer, "size": size}
            if mode == "ro":
                return body, [self._mount_read_only(path)]
            self._store.grant(path, self._client.uid)
            return body, []

    def _mount_read_only(self, path: str) -> int:
        return kernel.mount_detached("ext4", path, ["ro"], kernel.MOUNT_ATTR_SAFE | kernel.MOUNT_ATTR_RDONLY)

    def _create_activation(self, layer: str, name: str, mode: str, asked_size: int) -> int:
        origin = self._sealed(layer)["dev"]
        least = self._store.size_bytes(origin)
        if asked_size and not least <= asked_size <= self._settings["limits"]["device_bytes"]:
            most = self._settings["limits"]["device_bytes"]
            raise AnswerError("refused", f"size {asked_size} is not between {least} and {most}", "size")
        size = asked_size or least

        def admit(status: PoolStatus) -> bool:
            self._sealed(layer)
            if self._ledger.activation(self._client.uid, name) is not None:
                return False
            self._check_quota("activations", _ACTIVATIONS, 1)
            self._check_quota("activation_bytes", _ACTIVATION_BYTES, size if mode == "rw" else 0)
            self._check_room(status, 0)
            return True

        columns = {"name": name, "mode": mode, "size": size, "asked_size": asked_size}
        dev = self._create("activation", layer, origin, admit, columns)
        if dev is None:
            raise AnswerError("busy", f"activation {name} is being made by another process")

        def finish() -> None:
            self._store.resize(dev, size)
            self._store.settle(dev)
            self._ledger.record(dev, "granted")

        self._guarded(dev, finish)
        return dev

    def answer_deactivate(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Take one of the caller's devices away, with what was written to it."""
        row = self._ledger.activation(self._client.uid, fields["name"])
        if row is None:
            raise AnswerError("not_found", f"no activation {fields['name']} of yours")
        with self._locked(row["dev"]):
            self._ready(_USABLE)
            self._destroy(row["dev"])
        return {}, []

    # ------------------------------------------------------------ layers

    def answer_remove(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Drop the caller's claim on a layer, and the layer with the last claim when nothing stands on it."""
        self._ready(_USABLE)
        row = self._ledger.layer(fields["layer"])
        if row is None:
            return {"removed": False}, []
        with self._locked(row["dev"]):
            removed = self._give_up(fields["layer"], row["dev"])
            if removed:
                self._destroy(row["dev"])
        return {"removed": removed}, []

    def _give_up(self, layer: str, dev: int) -> bool:
        """Drop the claim; return whether it was the last and the layer is now marked to go."""
        uid, ledger = self._client.uid, self._ledger
        with ledger.transaction():
            if (row := ledger.layer(layer)) is None or row["dev"] != dev or row["state"] != "sealed":
                return False
            claims = {claim["uid"] for claim in ledger.all("SELECT uid FROM claim WHERE layer = ?", layer)}
            if uid not in claims and uid != 0:
                raise AnswerError("refused", "only a user who has committed this layer, or root, may remove it")
            others = claims - {uid}
            if others and uid != 0:
                ledger.one("DELETE FROM claim WHERE layer = ? AND uid = ?", layer, uid)
                ledger.one("UPDATE device SET uid = ? WHERE dev = ? AND uid = ?", min(others), dev, uid)  # its quota
                return False
            users = ledger.one(_USERS, layer, layer)[0]
            if users:
                raise AnswerError("in_use", f"{users} layers or activations stand on it", users=users)
            ledger.one("DELETE FROM claim WHERE layer = ?", layer)
            ledger.one("UPDATE device SET state = 'removing' WHERE dev = ?", dev)
            return True

    def answer_verify(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Compare a sealed layer, by a read-only copy, with its manifest."""
        layer = fields["layer"]
        row = self._sealed(layer)
        file = self._open_manifest(row["dev"])
        try:
            if _digest(file) != layer:
                raise AnswerError("fault", "the kept manifest is not that of this layer")
            dev = self._create("scratch", layer, row["dev"], lambda status: True, {})
            if dev is None:
                raise AnswerError("busy", "the layer goes away")
            try:
                self._compare(dev, file)
            finally:
                self._destroy(dev)
        finally:
            os.close(file)
        return {"files": row["entries"], "bytes": row["bytes"]}, []

    def _compare(self, dev: int, file: int) -> None:
        mount = self._mount_read_only(self._store.activate(dev, True))

        def work(root: int, tell: populate.Tell) -> tuple[int, int]:
            return populate.run(verify.Reader(root, self._settings, tell), file, self._settings)

        try:
            self._watch(sandbox.start(self._policy, "verify", mount, (file,), work))
        finally:
            os.close(mount)

    # ------------------------------------------------------------ after a crash

    def answer_reconcile(self, fields: Message, fds: list[int]) -> tuple[Message, list[int]]:
        """Make ledger and store agree in both directions and say what was done."""
        return {"actions": self.reconcile(thorough=True)}, []

    def reconcile(self, *, thorough: bool) -> list[str]:
        """Undo whatever no living process is at; ``thorough`` also looks for what neither side knows of.

        Nothing half-written is resumed. A pool that is not there, or not ready, is left alone.
        """
        status = self._store.status()
        if status.state not in _USABLE:
            return []
        actions = []
        with self._ledger.pool_lock():
            self._check_identity(status)
            _, expected = self._ledger.pool()
            if self._store.status().transaction == expected + 1 and self._ledger.unsettled():
                # The pool moved on and the crash came before the ledger did; what was going on is undone below.
                self._ledger.one("UPDATE pool SET trans = ?", expected + 1)
        for dev in self._ledger.unsettled():
            if not self._ledger.try_lock(dev):
                continue  # its process lives
            row = self._ledger.device(dev)
            if row is not None and row["state"] not in SETTLED:
                self._destroy(dev)
                actions.append(
                    f"freed device {dev}, {row['kind']} of {row['layer']}, which a crash left {row['state']}"
                )
            self._ledger.unlock(dev)
        if thorough:
            actions += self._audit()
        for action in actions:
            log(5, f"reconcile: {action}")
        return actions

    def _audit(self) -> list[str]:
        actions = []
        # The store first: a device made after this look has a row by the time of the next.
        with self._ledger.pool_lock():
            devices, active = self._store.devices(), self._store.active()
        rows = {row["dev"]: row for row in self._ledger.all("SELECT * FROM device")}
        for dev in sorted(active):
            row = rows.get(dev)
            if (row is None or (row["kind"], row["state"]) == ("layer", "sealed")) and self._ledger.try_lock(dev):
                self._store.deactivate(dev)
                self._ledger.unlock(dev)
                actions.append(f"deactivated device {dev}, which nobody was given")
        for dev in sorted(devices - rows.keys()):
            with self._ledger.pool_lock():
                trans = self._transaction()
                self._store.delete(dev)
                self._ledger.forget(dev, self._store.advance(trans))
            actions.append(f"deleted device {dev}, which the ledger does not know")
        for dev, row in rows.items():
            if row["state"] in SETTLED and dev not in devices and self._ledger.try_lock(dev):
                self._destroy(dev)
                self._ledger.unlock(dev)
                actions.append(f"forgot device {dev}, {row['kind']} of {row['layer']}: the store has lost it")
        for name in os.listdir(self._manifests):
            if int(name) not in rows:
                os.unlink(os.path.join(self._manifests, name))
                actions.append(f"deleted the manifest of device {name}, which is gone")
        return actions

    # ------------------------------------------------------------ devices

    def _create(
        self, kind: str, layer: str, origin: int, admit: Callable[[PoolStatus], bool], columns: Mapping[str, Any]
    ) -> int | None:
        """Write the intent, make the copy, write the fact; None when ``admit`` says that it is not wanted."""
        with self._ledger.pool_lock():
            status = self._ready()
            trans = self._transaction()
            with self._ledger.transaction():
                if not admit(status):
                    return None
                dev = self._ledger.intend(kind, layer, self._client.uid, **columns)

            def make() -> None:
                self._store.create(dev, origin)
                self._ledger.record(dev, "created", self._store.advance(trans))

            self._guarded(dev, make, keep_lock=True, in_pool_lock=True)
        return dev

    def _guarded(
        self, dev: int, step: Callable[[], None], *, keep_lock: bool = False, in_pool_lock: bool = False
    ) -> None:
        """Do a step of making a device; when it fails, take the device apart and let the failure through."""
        try:
            step()
        except BaseException:
            try:
                self._destroy(dev, in_pool_lock=in_pool_lock)
            except (StoreError, OSError, AnswerError, sqlite3.Error) as error:
                log(4, f"device {dev} is left for the next start: {error}")
            raise
        if not keep_lock:
            self._ledger.unlock(dev)

    def _destroy(self, dev: int, *, in_pool_lock: bool = False) -> None:
        """Delete a device whose lock is ours: intent, device, manifest, row."""
        if not in_pool_lock:
            self._store.deactivate(dev)  # may have to wait for the kernel: not under the pool's lock
            with self._ledger.pool_lock():
                self._destroy(dev, in_pool_lock=True)
            self._ledger.unlock(dev)
            return
        self._ready(_USABLE)  # an absent pool looks like an empty one, and the row would be forgotten
        trans = self._transaction()
        self._ledger.record(dev, "removing")
        self._store.delete(dev)
        with contextlib.suppress(FileNotFoundError):  # only layers that came far have one
            os.unlink(self._manifest_path(dev))
        self._ledger.forget(dev, self._store.advance(trans))

    @contextmanager
    def _locked(self, dev: int) -> Iterator[None]:
        if not self._ledger.try_lock(dev):
            raise AnswerError("busy", "another process is at it")
        try:
            yield
        finally:
            self._ledger.unlock(dev)

    def _await_other(self, dev: int) -> None:
        """Wait until the process that works on a device is done or dead; take apart what a dead one left."""

        def still_wanted(pause_s: float) -> None:
            poll = select.poll()
            poll.register(self._client.fileno(), select.POLLRDHUP)
            if poll.poll(pause_s * 1000):
                raise GoneError

        self._ledger.wait_lock(dev, still_wanted)
        row = self._ledger.device(dev)
        if row is not None and row["state"] not in SETTLED:
            self._destroy(dev)
        self._ledger.unlock(dev)

    def _sealed(self, layer: str) -> Any:
        row = self._ledger.layer(layer)
        if row is None or row["state"] != "sealed":
            raise AnswerError("not_found", f"layer {layer} is not here")
        return row

    # ------------------------------------------------------------ pool, quota, room

    def _ready(self, states: tuple[str, ...] = (READY,)) -> PoolStatus:
        status = self._store.status()
        if status.state not in states:
            raise AnswerError("pool", f"the pool is {status.state.replace('_', ' ')}; {status.advice}".rstrip("; "))
        self._check_identity(status)
        return status

    def _check_identity(self, status: PoolStatus) -> None:
        identity, _ = self._ledger.pool()
        if status.identity != identity:
            raise AnswerError("pool", f"this is pool {status.identity}, the ledger belongs to {identity or 'none'}")

    def _transaction(self) -> int:
        """Return the pool's transaction id after making sure that nobody else moved it. Under the pool's lock."""
        found, (_, expected) = self._store.status().transaction, self._ledger.pool()
        if found != expected:
            raise AnswerError("pool", f"the pool is at transaction {found}, the ledger at {expected}: a foreign writer")
        return expected

    def _reserved_bytes(self) -> int:
        return int(self._ledger.one("SELECT coalesce(sum(reserved), 0) FROM device WHERE kind = 'layer'")[0])

    def _check_quota(self, name: str, query: str, more: int) -> None:
        limit, uid = self._settings["quota"][name], self._client.uid
        used = int(self._ledger.one(query, uid)[0])
        if uid != 0 and used + more > limit:
            raise AnswerError(
                "refused", f"quota {name}: {used} used, {more} asked, {limit} allowed", "quota", used=used,
                asked=more, limit=limit,
            )  # fmt: skip

    def _check_state_dir(self, needed: int) -> None:
        figures = os.statvfs(self._manifests)
        free = figures.f_bavail * figures.f_frsize
        if needed + self._settings["admission"]["state_reserve_bytes"] > free:
            raise AnswerError("no_room", "not enough free for the manifest", needed_bytes=needed, free_bytes=free)

    def _check_room(self, status: PoolStatus, needed: int) -> None:
        """Refuse what would bring the pool into its reserve, for data and for metadata."""
        admission = self._settings["admission"]
        reserved = self._reserved_bytes()
        free = status.data_bytes - status.data_used_bytes - reserved
        free -= status.data_bytes * admission["data_reserve_percent"] // 100
        blocks = (needed + reserved) // status.block_bytes + 1
        metadata_free = status.metadata_bytes - status.metadata_used_bytes
        metadata_free -= status.metadata_bytes * admission["metadata_reserve_percent"] // 100
        metadata_needed = blocks * admission["metadata_bytes_per_block"] if status.metadata_bytes else 0
        if needed > free or free <= 0 or metadata_needed > metadata_free:
            raise AnswerError(
                "no_room", "not enough free in the pool; nothing was written", needed_bytes=needed,
                free_bytes=max(free, 0), reserved_bytes=reserved, needed_metadata_bytes=metadata_needed,
                free_metadata_bytes=max(metadata_free, 0),
            )  # fmt: skip

    # ------------------------------------------------------------ files

    def _manifest_path(self, dev: int) -> str:
        return os.path.join(self._manifests, str(dev))

    def _open_manifest(self, dev: int) -> int:
        return os.open(self._manifest_path(dev), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


_FIGURES: Final = ("state", "data_bytes", "data_used_bytes", "metadata_bytes", "metadata_used_bytes", "block_bytes")
_LAYER_BYTES: Final = "SELECT coalesce(sum(charge), 0) FROM device WHERE kind = 'layer' AND uid = ?"
_ACTIVATIONS: Final = "SELECT count(*) FROM device WHERE kind = 'activation' AND uid = ?"
_ACTIVATION_BYTES: Final = (
    "SELECT coalesce(sum(size), 0) FROM device WHERE kind = 'activation' AND mode = 'rw' AND uid = ?"
)
_USERS: Final = """SELECT count(*) FROM device WHERE state <> 'removing' AND
  (kind = 'layer' AND parent = ? OR kind <> 'layer' AND layer = ?)"""


def _digest(file: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while chunk := os.pread(file, _CHUNK_BYTES, offset):
        digest.update(chunk)
        offset += len(chunk)
    return "sha256:" + digest.hexdigest()


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
