"""`imgpull check`: files as the layers of one image, read at the same time, without S3, root or store.

Rule 1: a process a layer; they read at once, one more than there are processors, for each waits with what it has read
until the layers below it are accepted: only then are their manifests whole.
Rule 2: the lowest layer that is refused is told, whichever was met first; what stands on it is not waited for.
"""

import os
import resource
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import trio

from broker import protocol, worker
from broker.errors import ImgpullError
from broker.reference import media_of
from broker.refusal import listed, rejected

GO = b"\1"


@dataclass(slots=True)
class _Layer:
    """One file: what its checker is given, and how it ended."""

    name: str
    number: int
    manifest: int
    gate: tuple[int, int] | None  # a pipe, read by the checker; None for the lowest layer
    tree: int | None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    accepted: protocol.Accepted | None = None
    error: ImgpullError | None = None


def check(files: list[str], *, with_tree: bool, all_violations: bool) -> list[protocol.Accepted]:
    """Check files as the layers of one image; the merged tree goes to standard output if it is asked for.

    Raises: ImgpullError `archive-rejected` for the lowest layer that is refused.
    """
    try:
        return trio.run(_check, files, with_tree, all_violations)
    except BaseExceptionGroup as group:
        from broker.machine.signals import leaves  # only now: loading it takes as long as checking a small layer

        raise next(leaves(group)) from group


async def _check(files: list[str], with_tree: bool, all_violations: bool) -> list[protocol.Accepted]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # three descriptors a layer, of which there may be many
    slots = trio.CapacityLimiter(1 + (os.cpu_count() or 1))
    with ExitStack() as stack:
        layers = [_layer(stack, name, number, files, with_tree) for number, name in enumerate(files, 1)]
        async with trio.open_nursery() as nursery:
            for layer in layers:  # in order: whoever waits for a lower layer knows that it has a processor already
                await slots.acquire_on_behalf_of(layer.number)
                nursery.start_soon(_work, layer, layers, slots, all_violations)
        for layer in layers:
            if layer.error is not None:
                raise layer.error
        if layers and layers[-1].tree is not None:
            _print_file(layers[-1].tree)
    return [layer.accepted for layer in layers if layer.accepted is not None]


def _layer(stack: ExitStack, name: str, number: int, files: list[str], with_tree: bool) -> _Layer:
    """Make the descriptors of one layer; they are closed with the stack."""

    def kept(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    manifest = kept(os.memfd_create("imgpull-manifest", os.MFD_CLOEXEC))
    tree = None
    if with_tree and number == len(files):
        tree = kept(os.memfd_create("imgpull-tree", os.MFD_CLOEXEC))
    gate = None
    if number > 1:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        gate = (kept(reading), kept(writing))
    return _Layer(name, number, manifest, gate, tree)


async def _work(layer: _Layer, layers: list[_Layer], slots: trio.CapacityLimiter, all_violations: bool) -> None:
    """Check one layer, then let the next one go on, or stop all that stand on it."""
    try:
        with layer.scope:
            lower = [below.manifest for below in layers[: layer.number - 1]]
            layer.accepted = await _check_file(layer, lower, all_violations)
    except ImgpullError as error:
        layer.error = error
    finally:
        slots.release_on_behalf_of(layer.number)
    above = layers[layer.number :]
    if layer.accepted is None:
        for one in above:
            one.scope.cancel()
    elif above:
        gate = above[0].gate
        assert gate is not None
        os.write(gate[1], GO)


async def _check_file(layer: _Layer, lower: list[int], all_violations: bool) -> protocol.Accepted:
    media = media_of(layer.name)
    assert media is not None
    with ExitStack() as stack:
        try:
            blob = os.open(layer.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImgpullError("io-error", f"{layer.name}: {error.strerror}") from error
        stack.callback(os.close, blob)
        payload = None
        if media != "tar":
            # The checker reads the uncompressed tar twice, so it needs a place; without a name it leaves no trace.
            payload = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, payload)
        gate = None if layer.gate is None else layer.gate[0]
        job = protocol.CheckJob(
            media=media,
            layer_number=layer.number,
            lower=lower,
            gate_fd=gate,
            manifest_fd=layer.manifest,
            payload_fd=payload,
            tree_fd=layer.tree,
            all_violations=all_violations,
        )
        inherited = [*lower, layer.manifest, *(fd for fd in (gate, payload, layer.tree) if fd is not None)]
        verdict = await worker.check(job, blob, inherited)
    if isinstance(verdict, protocol.Rejected):
        refusal = rejected(layer.name, verdict)
        if all_violations:
            refusal = ImgpullError.of(replace(refusal.problem, why=listed(verdict)))
        raise refusal
    return verdict


def _print_file(descriptor: int) -> None:
    done = 0
    sys.stdout.flush()
    while chunk := os.pread(descriptor, 1 << 20, done):
        sys.stdout.buffer.write(chunk)
        done += len(chunk)
    sys.stdout.flush()
