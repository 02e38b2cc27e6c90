"""`imgpull check`: files as the layers of one image, read at the same time, without S3, root or store.

Rule 1: a process a layer; they read at once, more of them than there are processors, for each waits with what it has
read until the layers below it are accepted, one by one: only then are their manifests whole.
Rule 2: the lowest layer that is refused is told, whichever was met first; what stands on it is not waited for.
Rule 3: the first checkers are started before anything is loaded that only waits for them (broker/filewait.py, trio).
"""

import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from broker import checker, protocol
from broker.errors import ImgpullError
from broker.reference import media_of
from broker.refusal import listed, rejected

_WHOLE = b"\1"


@dataclass(slots=True)
class Layer:
    """One file: what its checker is given, and how it ended."""

    name: str
    number: int
    lower: Sequence[int]  # manifests
    manifest: int
    gate: tuple[int, int] | None  # a pipe, read by the checker; None for the lowest layer
    tree: int | None
    all_violations: bool
    started: checker.Started | None = None
    accepted: protocol.Accepted | None = None
    error: ImgpullError | None = None

    def start(self) -> None:
        """Start its checker, or keep why that cannot be."""
        try:
            with ExitStack() as stack:  # what the checker has inherited is its own
                self.started = self._started(stack)
        except ImgpullError as error:
            self.error = error

    def _started(self, stack: ExitStack) -> checker.Started:
        media = media_of(self.name)
        assert media is not None
        try:
            blob = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImgpullError("io-error", f"{self.name}: {error.strerror}") from error
        stack.callback(os.close, blob)
        payload = None
        if media != "tar":
            # The checker reads the uncompressed tar twice, so it needs a place; without a name it leaves no trace.
            payload = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, payload)
        gate = None if self.gate is None else self.gate[0]
        job = protocol.CheckJob(
            media=media,
            layer_number=self.number,
            lower=list(self.lower),
            gate_fd=gate,
            manifest_fd=self.manifest,
            payload_fd=payload,
            tree_fd=self.tree,
            all_violations=self.all_violations,
        )
        inherited = [*self.lower, self.manifest, *(fd for fd in (gate, payload, self.tree) if fd is not None)]
        return checker.start(job, blob, inherited)

    def take(self, verdict: protocol.Accepted | protocol.Rejected) -> None:
        """Keep a verdict. Raises: ImgpullError `archive-rejected`."""
        if isinstance(verdict, protocol.Accepted):
            self.accepted = verdict
            return
        refusal = rejected(self.name, verdict)
        if self.all_violations:
            refusal = ImgpullError.of(replace(refusal.problem, why=listed(verdict)))
        raise refusal

    def let_go(self) -> None:
        """Tell its checker that one more of the manifests below it is whole."""
        assert self.gate is not None
        os.write(self.gate[1], _WHOLE)

    def stop(self) -> None:
        """End its checker, if it lives."""
        if self.started is not None:
            self.started.kill()


def check(files: list[str], *, with_tree: bool, all_violations: bool) -> list[protocol.Accepted]:
    """Check files as the layers of one image; the merged tree goes to standard output if it is asked for.

    Raises: ImgpullError `archive-rejected` for the lowest layer that is refused.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a few descriptors a layer, of which there may be many
    at_once = 1 + 2 * (os.cpu_count() or 1)
    with ExitStack() as stack:
        layers = _layers(stack, files, with_tree, all_violations)
        for layer in layers[:at_once]:
            stack.callback(layer.stop)
            layer.start()
        from broker import filewait

        filewait.run(layers, at_once)
        for layer in layers:
            if layer.error is not None:
                raise layer.error
        if layers and layers[-1].tree is not None:
            _print_file(layers[-1].tree)
    return [layer.accepted for layer in layers if layer.accepted is not None]


def _layers(stack: ExitStack, files: list[str], with_tree: bool, all_violations: bool) -> list[Layer]:
    """Make the descriptors of all layers; they are closed with the stack."""

    def kept(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        return descriptor

    layers: list[Layer] = []
    for number, name in enumerate(files, 1):
        manifest = kept(os.memfd_create("imgpull-manifest", os.MFD_CLOEXEC))
        tree = None
        if with_tree and number == len(files):
            tree = kept(os.memfd_create("imgpull-tree", os.MFD_CLOEXEC))
        gate = None
        if number > 1:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            gate = (kept(reading), kept(writing))
        lower = [below.manifest for below in layers]
        layers.append(Layer(name, number, lower, manifest, gate, tree, all_violations))
    return layers


def _print_file(descriptor: int) -> None:
    done = 0
    sys.stdout.flush()
    while chunk := os.pread(descriptor, 1 << 20, done):
        sys.stdout.buffer.write(chunk)
        done += len(chunk)
    sys.stdout.flush()
