"""The client of the root helper: one async function a request.

Rule 1: one connection is one helper process; it is opened late, used for a few requests and closed soon after.
Rule 2: the helper's answers come from root, but are parsed as strictly as a stranger's.
Rule 3: no path, device name or table is ever sent; a layer is named by its content, an activation by a short name.

Wire: policy/protocol.toml; unix(7) SOCK_SEQPACKET, descriptors by SCM_RIGHTS.
"""

import array
import errno
import json
import os
import select
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from broker.console import size
from broker.errors import ImgpullError
from privhelper import protocol

CONNECT_TIMEOUT_S: Final = 15.0  # a socket-activated helper starts an interpreter first
SILENCE_S: Final = 300.0  # the longest time without any word from the helper; it reports progress while it works
# What the helper's error codes mean to a user.
CODES: Final = {
    "rejected": "digest-mismatch",
    "refused": "not-permitted",
    "not_found": "no-such-activation",
    "no_room": "no-room",
    "busy": "busy",
    "in_use": "busy",
    "pool": "pool-unavailable",
    "fault": "io-error",
    "version": "version-mismatch",
}
Progress = Callable[[int, int], None]


class LayerAbsentError(ImgpullError):
    """The helper does not hold a layer that it was asked to use."""


@dataclass(frozen=True, slots=True)
class Activation:
    """A device given out to this user; mode ``ro`` comes with a detached read-only mount of it, owned by the caller."""

    name: str
    layer: str
    mode: str
    device: str
    size: int
    mount_fd: int | None = None


class Helper:
    """One connection to the root helper."""

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._sock = sock
        self.greeting: dict[str, Any] = {}

    def is_quiet(self) -> bool:
        """Tell whether the connection can be used again: nothing has come that nobody asked for, not even its end."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    async def stat(self, layer: str) -> str:
        """Return ``sealed``, ``committing`` or ``absent``."""
        return str((await self._ask({"op": "stat", "layer": layer}))["state"])

    async def commit(self, manifest_fd: int, payload_fd: int, progress: Progress | None = None) -> tuple[str, bool]:
        """Make a layer out of a sealed manifest and a payload.

        Returns: the layer's id as root computed it, and whether it existed already.
        """
        request = {
            "op": "commit",
            "manifest_bytes": os.fstat(manifest_fd).st_size,
            "payload_bytes": os.fstat(payload_fd).st_size,
        }
        answer = await self._ask(request, [manifest_fd, payload_fd], progress)
        return str(answer["layer"]), bool(answer["existed"])

    async def activate(self, layer: str, name: str, mode: str, size_bytes: int = 0) -> Activation:
        """Take a snapshot of a layer; the same request again gives the same device."""
        descriptors: list[int] = []
        request = {"op": "activate", "layer": layer, "name": name, "mode": mode, "size": size_bytes}
        answer = await self._ask(request, received=descriptors)
        return Activation(
            name, layer, mode, str(answer["device"]), int(answer["size"]), descriptors[0] if descriptors else None
        )

    async def deactivate(self, name: str) -> None:
        """Take a device back and forget what was written to it."""
        await self._ask({"op": "deactivate", "name": name})

    async def remove(self, layer: str) -> bool:
        """Remove a layer that nothing uses. Returns: whether it was there."""
        return bool((await self._ask({"op": "remove", "layer": layer}))["removed"])

    async def inventory(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return all layers and the caller's activations."""
        layers: list[dict[str, Any]] = []
        activations: list[dict[str, Any]] = []
        async for item in self._stream({"op": "list"}):
            (layers if item["kind"] == "layer" else activations).append(item)
        return layers, activations

    async def verify(self, layer: str, progress: Progress | None = None) -> tuple[int, int]:
        """Read a layer again and compare it with its manifest. Returns: files and bytes read."""
        answer = await self._ask({"op": "verify", "layer": layer}, progress=progress)
        return int(answer["files"]), int(answer["bytes"])

    async def manifest(self, layer: str) -> int:
        """Return a descriptor of a sealed layer's manifest, owned by the caller."""
        descriptors: list[int] = []
        await self._ask({"op": "manifest", "layer": layer}, received=descriptors)
        return descriptors[0]

    async def reconcile(self) -> list[str]:
        """Make the helper compare its ledger with the pool. Returns: what it did."""
        return [str(a) for a in (await self._ask({"op": "reconcile"}))["actions"]]

    async def _stream(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        await self._send(request, [])
        while True:
            answer = await self._receive([])
            if answer["type"] == "item":
                yield answer
            elif answer["type"] == "ok":
                return

    async def _ask(
        self,
        request: dict[str, Any],
        descriptors: list[int] | None = None,
        progress: Progress | None = None,
        received: list[int] | None = None,
    ) -> dict[str, Any]:
        """Send one request and return its answer; descriptors that come with it are put into ``received``."""
        got: list[int] = [] if received is None else received
        await self._send(request, descriptors or [])
        while True:
            answer = await self._receive(got)
            if answer["type"] == "ok":
                return answer
            if answer["type"] == "progress" and progress:
                progress(int(answer["entries"]), int(answer["bytes"]))

    async def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        data = json.dumps(request, sort_keys=True, separators=(",", ":")).encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            await self._sock.sendmsg([data], ancillary)
        except OSError as error:
            raise hung_up(str(error)) from error

    async def _receive(self, received: list[int]) -> dict[str, Any]:
        """Return one answer of the helper; an error answer is raised."""
        space = socket.CMSG_SPACE(array.array("i").itemsize)
        with trio.move_on_after(SILENCE_S) as scope:
            try:
                data, ancillary, flags, _ = await self._sock.recvmsg(
                    protocol.MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise hung_up(str(error)) from error
        if scope.cancelled_caught:
            raise ImgpullError("io-error", f"the root helper has been silent for {SILENCE_S:.0f} s", "its store hangs")
        for level, kind, payload in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received.extend(array.array("i", payload[: len(payload) - len(payload) % 4]))
        if not data:
            raise hung_up("the connection ended without an answer")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise hung_up("an answer was longer than the protocol allows")
        answer = json.loads(data)
        if not isinstance(answer, dict) or answer.get("type") not in ("ok", "error", "progress", "item"):
            raise hung_up(f"an answer of no known form: {data[:100]!r}")
        if answer["type"] == "error":
            raise translate(answer)
        return answer


def hung_up(why: str) -> ImgpullError:
    """Return the error for a helper that ended in the middle: killed, or it refused to talk on."""
    return ImgpullError("helper-unavailable", "the root helper hung up", why, "its journal says why; then try again")


def translate(answer: dict[str, Any]) -> ImgpullError:
    """Return the helper's error answer as the user's."""
    code = CODES.get(str(answer.get("code")), "bug")
    details = {k: answer[k] for k in ("rule", "entry", "figures") if answer.get(k) is not None}
    what = f"root helper: {answer.get('message', 'no message')}"
    if answer.get("code") == "not_found" and answer.get("rule") == "layer_absent":
        return LayerAbsentError("busy", what, **details)
    return ImgpullError(code, what, _lacking(details.get("figures", {})), **details)


def _lacking(figures: dict[str, Any]) -> str:
    """Return in words what a pool lacks, nothing where the answer is about something else."""
    lacks = []
    for word in ("", "metadata_"):
        needed, free = figures.get(f"needed_{word}bytes"), figures.get(f"free_{word}bytes")
        if isinstance(needed, int) and isinstance(free, int) and needed > free:
            lacks.append(f"{size(needed)} of {word.rstrip('_') or 'data'} needed, {size(free)} free")
    return "; ".join(lacks)


def require_door(path: str) -> None:
    """Raise at once what `connect` would for a socket that is missing or closed to this user: before a long fetch."""
    try:
        os.stat(path)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unreachable(path, error) from error


def _unreachable(path: str, error: OSError) -> ImgpullError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return ImgpullError(
            "not-permitted",
            f"{path}: permission denied",
            "the root helper serves the members of its group only",
            "as root: `usermod -aG imgpull $USER`, then log in again",
        )
    what = f"{path}: {os.strerror(error.errno or 0).lower()}"
    return ImgpullError("helper-unavailable", what, "the root helper is not running")


@asynccontextmanager
async def connect(path: str) -> AsyncGenerator[Helper, None]:
    """Open one connection to the root helper and greet it.

    Raises: ImgpullError `helper-unavailable`, `not-permitted` (you are not in its group), `version-mismatch`.
    """
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with sock:
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await sock.connect(path)
        except trio.TooSlowError:
            raise ImgpullError("helper-unavailable", f"{path}: the root helper does not answer") from None
        except OSError as error:
            raise _unreachable(path, error) from error
        helper = Helper(sock)
        helper.greeting = await helper._ask({"op": "hello", "version": protocol.VERSION})
        yield helper
