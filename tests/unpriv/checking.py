"""Two ways to check an archive in a test: inside this process, and by the real program in its sandbox.

Rule 1: what is tested about rules and trees runs inside; what is tested about processes, limits and locks runs the
program as the broker does: an empty environment but for the locale, and only the descriptors of its job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from broker import limits as judged
from broker.protocol import Accepted, CheckReport, Rejected
from unpriv import limits as limits_module
from unpriv import pipeline
from unpriv.blob import Blob, MemoryBlob
from unpriv.findings import Findings
from unpriv.hashing import Hasher
from unpriv.limits import Limits

DEADLINE_S = 120.0  # of one run of the program; a test that meets it fails by the code of its end
IN_FORCE = judged.load()
LIMITS = limits_module.parse(IN_FORCE.model_dump_json())
_REPORT: TypeAdapter[Accepted | Rejected | Any] = TypeAdapter(CheckReport)


@dataclass(frozen=True)
class Result:
    """What one check said and wrote."""

    report: dict[str, Any]
    manifest: bytes = b""
    tree: list[dict[str, Any]] = field(default_factory=list)
    payload: bytes = b""

    @property
    def accepted(self) -> bool:
        return bool(self.report["type"] == "accepted")

    @property
    def rules(self) -> list[str]:
        return [violation["rule"] for violation in self.report.get("violations", ())]

    @property
    def rule(self) -> str | None:
        return self.rules[-1] if self.rules else None

    @property
    def operations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.manifest.splitlines()[1:]]

    def paths(self) -> dict[str, dict[str, Any]]:
        return {row.get("path") or row["path_hex"]: row for row in self.tree}


def tightened(**tables: dict[str, Any]) -> Limits:
    """Return the limits with some values replaced: ``tightened(names={"depth": 3})``."""
    values = IN_FORCE.model_dump()
    for table, changes in tables.items():
        values[table] |= changes
    return limits_module.parse(judged.Limits.model_validate(values).model_dump_json())


_hasher: list[Hasher] = []


def hasher() -> Hasher:
    """Return the one hasher of this process, its thread running."""
    if not _hasher:
        _hasher.append(Hasher())
        _hasher[0].start()
    return _hasher[0]


def check(
    *layers: bytes | tuple[str, bytes],
    limits: Limits = LIMITS,
    all_violations: bool = False,
    want_tree: bool = True,
    want_payload: bool = False,
) -> Result:
    """Check layers in order, inside this process; return the result of the last one, or of the first refused."""
    lowers: list[Blob] = []
    result = Result({"type": "none"})
    for number, layer in enumerate(layers, 1):
        media, data = layer if isinstance(layer, tuple) else ("tar", layer)
        findings = Findings(limits, number, all_violations)
        with _files(4) as (manifest, tree, scratch, payload):
            outputs = pipeline.Outputs(
                payload=payload if want_payload else None,
                manifest=manifest,
                tree=tree if want_tree else None,
                scratch=scratch if want_tree else None,
            )
            report = pipeline.verdict(media, MemoryBlob(data), lowers, limits, findings, hasher(), outputs)
            _REPORT.validate_json(json.dumps(report))
            result = Result(
                report,
                _contents(manifest),
                [json.loads(line) for line in _contents(tree).splitlines()],
                _contents(payload),
            )
        if not result.accepted:
            return result
        lowers.append(MemoryBlob(result.manifest))
    return result


@contextmanager
def _files(count: int) -> Iterator[list[int]]:
    descriptors = [os.memfd_create("test") for _ in range(count)]
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _contents(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


@dataclass(frozen=True)
class Ran:
    """How the program ended and what it said."""

    code: int
    lines: list[dict[str, Any]]
    last_words: str
    manifest: bytes
    tree: list[dict[str, Any]]
    payload_bytes: int
    cpu_s: float
    peak_bytes: int = 0  # of memory, where it was asked for

    @property
    def report(self) -> dict[str, Any]:
        return self.lines[-1] if self.lines else {}

    @property
    def rule(self) -> str | None:
        violations = self.report.get("violations")
        return str(violations[-1]["rule"]) if violations else None


# wait4(2) counts the memory of the process that it was forked from; so the checker tells its own peak at its end.
MEASURED = (
    sys.executable,
    "-I",
    "-c",
    """
import os, unpriv.check as c
warm_up, end = c._warm_up, os._exit
def open_status(*arguments):
    global status
    warm_up(*arguments)
    status = os.open("/proc/self/status", os.O_RDONLY)
def tell(code):
    text = os.pread(status, 8192, 0)
    os.write(2, text[text.index(b"VmHWM:"):][:40])
    end(code)
c._warm_up, c.os._exit = open_status, tell
c.main()
""",
)


def run_program(
    blob: Path,
    media: str = "tar",
    lowers: Sequence[bytes] = (),
    *,
    want_tree: bool = False,
    all_violations: bool = False,
    command: Sequence[str] | None = None,
    extra_descriptors: Sequence[int] = (),
    **options: Any,
) -> Ran:
    """Run unpriv.check on one blob as the broker does."""
    command = command or (sys.executable, "-I", "-m", "unpriv.check")
    with _files(3 + len(lowers)) as descriptors, blob.open("rb") as source, tempfile.TemporaryFile() as said:
        manifest, tree, payload, *lower = descriptors
        for descriptor, data in zip(lower, lowers, strict=True):
            os.write(descriptor, data)
        job = {"media": media, "manifest_fd": manifest, "lower": lower, "all_violations": all_violations}
        job |= {"tree_fd": tree} if want_tree else {}
        job |= {"payload_fd": payload} if media != "tar" else {}
        process = subprocess.Popen(
            [*command, json.dumps(job), IN_FORCE.model_dump_json()],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=said,
            env={"LC_ALL": "C.UTF-8"},
            pass_fds=[*descriptors, *extra_descriptors],
            **options,
        )
        assert process.stdout is not None
        too_late = threading.Timer(DEADLINE_S, process.kill)
        too_late.start()
        with process.stdout as stdout:
            lines = [json.loads(line) for line in stdout.read().splitlines()]
        _, status, usage = os.wait4(process.pid, 0)
        too_late.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        last_words, peak_bytes = said.read().decode("ascii"), 0
        if "VmHWM:" in last_words:
            last_words, _, peak = last_words.partition("VmHWM:")
            peak_bytes = int(peak.split()[0]) << 10
        return Ran(
            process.returncode,
            lines,
            last_words,
            _contents(manifest),
            [json.loads(line) for line in _contents(tree).splitlines()],
            os.fstat(payload).st_size,
            usage.ru_utime + usage.ru_stime,
            peak_bytes,
        )


def differences(expected: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[str]:
    """Compare two listings; of an implicit directory only its place counts."""

    def key(row: dict[str, Any]) -> str:
        return str(row.get("path") or row.get("path_hex"))

    left, right = {key(row): row for row in expected}, {key(row): row for row in found}
    wrong = [f"only expected: {name}" for name in left.keys() - right.keys()]
    wrong += [f"only found: {name}" for name in right.keys() - left.keys()]
    for name in left.keys() & right.keys():
        if left[name].get("implicit"):
            wrong += [] if right[name]["type"] == "dir" else [f"{name}: expected a directory"]
        elif left[name] != {k: v for k, v in right[name].items() if k != "implicit"}:
            wrong.append(f"{name}: expected {left[name]}, found {right[name]}")
    return wrong
