"""Where the time of a check goes: ``python -m tests.bench.check LAYER.tar...``, plain tars, lowest first.

Prints the best of three rounds, in seconds of processor time of the reading thread (the hashing thread's apart), beside
one bare pass of hashlib's sha256 over the same bytes in the same run; then the wall clock of both.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from broker import limits as judged
from unpriv import archive, kernel, limits, manifest, merge, pipeline
from unpriv.blob import FileBlob
from unpriv.decompress import open_source
from unpriv.findings import Findings
from unpriv.hashing import CHUNK_BYTES, Hasher
from unpriv.lower import Lower
from unpriv.quota import Quota
from unpriv.reader import Job, Reader
from unpriv.tree import Layer

LIMITS = limits.parse(judged.load().model_dump_json())
ROUNDS = 3


class _NoHasher(Hasher):
    """Gives its buffers back without hashing anything."""

    def submit(self, buffer: memoryview, jobs: list[Job]) -> None:
        self._free.put(buffer)


def _blob(path: Path) -> FileBlob:
    descriptor = os.open(path, os.O_RDONLY)
    return FileBlob(descriptor, os.fstat(descriptor).st_size)


def _nothing() -> None:
    """Take the place of the clocks."""


def bare(paths: list[Path]) -> None:
    """Hash all bytes once."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for path in paths:
        hasher = hashlib.sha256()
        with path.open("rb", buffering=0) as source:
            while count := source.readinto(buffer):
                hasher.update(buffer[:count])


def read(paths: list[Path], *, strict: bool = False, tree: bool = False, second: bool = False) -> list[Layer]:
    """Read all bytes, with as many of the readers as asked for."""
    layers = []
    for path in paths:
        blob, layer, findings = _blob(path), Layer(LIMITS), Findings(LIMITS, 1, all_violations=False)
        quota, hasher = Quota(LIMITS, blob.size, compressed=False), _NoHasher()
        source = open_source("tar", blob, LIMITS, quota.tick)
        reader = Reader(LIMITS, findings, layer.add if tree else lambda member: 0, compressed=False)
        feed = pipeline._Feed(source, quota, reader, hasher, pipeline.Outputs())
        if second:
            cross = archive.CrossReader(feed.pull, reader.claims)
            cross.run()
            cross.close()
        if strict or second:
            while feed.pull():
                reader.claims.clear()
        else:
            buffer = hasher.buffer()
            while source.readinto(buffer):
                quota.tick()
        layers.append(layer)
    return layers


def stack(layers: list[Layer]) -> dict[str, float]:
    """Merge the layers and write their manifests; return the seconds of each part."""
    seconds = {"lower manifests": 0.0, "rules and count": 0.0, "writing": 0.0}
    manifests: list[FileBlob] = []
    for layer in layers:
        start = time.thread_time()
        lower = Lower(with_places=False, tick=_nothing)
        for blob in manifests:
            lower.add(blob)
        replayed = time.thread_time()
        merge.check(layer, lower.root, Findings(LIMITS, 1, all_violations=False))
        tally = merge.Merge(layer, lower.root, manifest.Tally(_nothing))
        tally.run()
        counted = time.thread_time()
        descriptor = os.memfd_create("manifest")
        written = manifest.Lines([descriptor], _nothing)
        written.write(manifest.first_line(layer.content_bytes, tally.count, lower.digest))
        merge.Merge(layer, lower.root, manifest.Writer(written, layer)).run()
        written.flush()
        seconds["lower manifests"] += replayed - start
        seconds["rules and count"] += counted - replayed
        seconds["writing"] += time.thread_time() - counted
        manifests.append(FileBlob(descriptor, written.bytes))
    return seconds


def whole(paths: list[Path], hasher: Hasher) -> None:
    """Check all layers as the program does, but for its start."""
    manifests: list[FileBlob] = []
    for number, path in enumerate(paths, 1):
        descriptor = os.memfd_create("manifest")
        findings = Findings(LIMITS, number, all_violations=False)
        outputs = pipeline.Outputs(manifest=descriptor)
        report = pipeline.verdict("tar", _blob(path), manifests, LIMITS, findings, hasher, outputs)
        if report["type"] != "accepted":
            raise SystemExit(f"{path}: {report}")
        manifests.append(FileBlob(descriptor, report["manifest_bytes"]))


def best(clock: Callable[[], float], work: Callable[[], object]) -> float:
    """Return the least time of a few rounds; noise only adds."""
    times = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        times.append(clock() - start)
    return min(times)


def main() -> None:
    """Measure and print."""
    paths = [Path(argument) for argument in sys.argv[1:]]
    kernel.single_arena()
    sys.setswitchinterval(0.00002)
    cpu = time.thread_time
    reading = best(cpu, lambda: read(paths))
    strict = best(cpu, lambda: read(paths, strict=True))
    tree = best(cpu, lambda: read(paths, strict=True, tree=True))
    second = best(cpu, lambda: read(paths, tree=True, second=True))
    hasher = Hasher()
    hasher.start()
    rows = {
        "bare sha256 pass": best(cpu, lambda: bare(paths)),
        "reading": reading,
        "strict reader": strict - reading,
        "tree of the layer": tree - strict,
        "libarchive": second - tree,
        **stack(read(paths, tree=True, second=True)),
    }
    for name, seconds in rows.items():
        print(f"{seconds:8.3f} s  {name}")
    floor, wall = best(time.perf_counter, lambda: bare(paths)), best(time.perf_counter, lambda: whole(paths, hasher))
    print(f"{wall:8.3f} s  wall clock of a check, {wall / floor:.2f} times a bare pass of {floor:.3f} s")


if __name__ == "__main__":
    main()
