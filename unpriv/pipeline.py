"""One check, from the blob to the manifest: who is fed by whom, in which order, and what ends it.

Rule 1: libarchive drives: whenever it wants bytes, the next chunk is decompressed, counted, written to the payload,
read by the strict reader and handed to the hashing thread; only then does libarchive see it.
Rule 2: a word of the strict reader is better than a disagreement, so it always reads to the end.
Rule 3: nothing here opens, seeks or locks anything; check.py has done that.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from unpriv import archive, listing, manifest, merge
from unpriv.blob import Blob, FileBlob
from unpriv.decompress import Source, open_source
from unpriv.findings import Findings
from unpriv.hashing import Hasher
from unpriv.limits import Limits
from unpriv.lower import Lower
from unpriv.quota import Quota
from unpriv.reader import Reader
from unpriv.rulebook import RejectedError, rule
from unpriv.tree import Layer

MEMORY_EXCEEDED: Final = rule("memory_exceeded")

_PROGRESS_BYTES: Final = 16 << 20


class Outputs(NamedTuple):
    """Where the results go; None means nowhere."""

    payload: int | None = None
    manifest: int | None = None
    tree: int | None = None
    scratch: int | None = None  # an empty file for a second copy of the manifest; needed with ``tree``
    progress: Callable[[int], None] = lambda done_bytes: None


class _Feed:
    """The chunks of the tar, each seen by quota, payload, strict reader and hasher before it is handed out."""

    def __init__(self, source: Source, quota: Quota, reader: Reader, hasher: Hasher, outputs: Outputs):
        self._source = source
        self._quota = quota
        self._reader = reader
        self._hasher = hasher
        self._outputs = outputs
        self._told_bytes = 0
        self._ended = False

    def pull(self) -> tuple[memoryview, int] | None:
        """Return the next chunk and its offset, None behind the last one. Raises RejectedError."""
        if self._ended:
            return None
        self._quota.tick()
        buffer = self._hasher.buffer()
        jobs = []
        try:
            count = self._source.readinto(buffer)
            offset = self._quota.payload_bytes
            self._quota.take_payload(count)
            chunk = buffer[:count]
            if self._outputs.payload is not None:
                manifest.write_all(self._outputs.payload, chunk)
            jobs = self._reader.feed(chunk, offset)
        finally:
            self._hasher.submit(buffer, jobs)
        if self._source.done_bytes - self._told_bytes >= _PROGRESS_BYTES:
            self._told_bytes = self._source.done_bytes
            self._outputs.progress(self._told_bytes)
        self._ended = count < len(buffer)
        return (chunk, offset) if count else None


def run(
    media: str,
    blob: Blob,
    lowers: Iterable[Blob],
    limits: Limits,
    findings: Findings,
    hasher: Hasher,
    outputs: Outputs,
) -> dict[str, Any]:
    """Check one blob on top of lower layers, which are asked for when it has been read; return that it is accepted.

    Raises:
        RejectedError: it is refused; ``findings`` may hold more refusals that came before.
    """
    quota = Quota(limits, blob.size, media != "tar")
    layer, reader = _read(media, blob, limits, findings, hasher, outputs, quota)
    lower = Lower(outputs.tree is not None, quota.tick)
    for lower_manifest in lowers:
        lower.add(lower_manifest)
    merge.check(layer, lower.root, findings)
    if findings.violations:
        raise _AlreadyListedError
    written, operations = _write(layer, lower, outputs, quota)
    parent = lower.digest
    if outputs.tree is not None:
        _list(lower, outputs, written.bytes, quota)
    return {
        "type": "accepted",
        "layer": written.digest(),
        "parent": parent,
        "manifest_bytes": written.bytes,
        "payload_bytes": quota.payload_bytes,
        "entries": reader.entries,
        "operations": operations,
        "content_bytes": layer.content_bytes,
        "dropped": dict(sorted(findings.dropped.items())),
        "omitted": findings.omitted,
        "warnings": findings.warnings,
    }


class _AlreadyListedError(Exception):
    """The findings hold all there is to say."""


def _read(
    media: str, blob: Blob, limits: Limits, findings: Findings, hasher: Hasher, outputs: Outputs, quota: Quota
) -> tuple[Layer, Reader]:
    """Read the whole archive with both readers; return the tree of the layer, its digests complete."""
    source = open_source(media, blob, limits, quota.tick)
    layer = Layer(limits)
    reader = Reader(limits, findings, layer.add, media != "tar")
    hasher.begin(layer.set_digest)
    feed = _Feed(source, quota, reader, hasher, outputs)
    cross = archive.CrossReader(feed.pull, reader.claims)
    disagreement = None
    try:
        try:
            cross.run()
        except archive.DisagreementError as error:
            disagreement = archive.refusal(error, reader.entries)
        finally:
            cross.close()
        while feed.pull() is not None:
            reader.claims.clear()  # libarchive is through
        reader.finish(quota.payload_bytes)
        if disagreement is not None and not findings.violations:
            raise disagreement
    finally:
        hasher.finish()
    return layer, reader


def _write(layer: Layer, lower: Lower, outputs: Outputs, quota: Quota) -> tuple[manifest.Lines, int]:
    """Write the manifest; return it and the number of its operations, which its first line has to say."""
    tally = merge.Merge(layer, lower.root, manifest.Tally(quota.tick))
    tally.run()
    written = manifest.Lines([fd for fd in (outputs.manifest, outputs.scratch) if fd is not None], quota.tick)
    written.write(manifest.first_line(layer.content_bytes, tally.count, lower.digest))
    merge.Merge(layer, lower.root, manifest.Writer(written, layer)).run()
    written.flush()
    return written, tally.count


def _list(lower: Lower, outputs: Outputs, manifest_bytes: int, quota: Quota) -> None:
    """Print the merged tree from the manifests, this layer's included."""
    assert outputs.scratch is not None and outputs.tree is not None
    lower.add(FileBlob(outputs.scratch, manifest_bytes))
    printed = manifest.Lines([outputs.tree], quota.tick)
    for row in listing.rows(lower):
        printed.write(row)
    printed.flush()


def verdict(
    media: str,
    blob: Blob,
    lowers: Iterable[Blob],
    limits: Limits,
    findings: Findings,
    hasher: Hasher,
    outputs: Outputs,
) -> dict[str, Any]:
    """Check one blob; return the last line of the report, accepted or rejected."""
    try:
        return run(media, blob, lowers, limits, findings, hasher, outputs)
    except _AlreadyListedError:
        return {"type": "rejected", "violations": findings.violations, "complete": True}
    except RejectedError as error:
        last = findings.describe(error)
    except MemoryError:
        reason = f"more than {limits.run.address_space_bytes} bytes of address space"
        last = findings.describe(RejectedError(MEMORY_EXCEEDED, reason))
    return {"type": "rejected", "violations": [*findings.violations, last], "complete": False}
