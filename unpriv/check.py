"""The archive checker: a blob and the manifests of its lower layers in, a manifest or a named refusal out.

Rule 1: everything that needs files, imports or threads happens before the lock; the first hostile byte after it.
Rule 2: one line of JSON a report on descriptor 1, the last one a verdict; one last line on 2 if all else fails.
Rule 3: it ends by os._exit: 0 accepted, 65 rejected, 70 a mistake of this program, 73 no room for what it writes, 74
reading or writing failed, 78 rules or sandbox unusable.

Started as ``python -I -m unpriv.check JOB LIMITS`` with LC_ALL=C.UTF-8 and no other variable; JOB is a CheckJob of
broker/protocol.py, LIMITS what broker/limits.py has judged, both in JSON and made by our own supervisor: they are taken
apart without pydantic, whose import alone would take as long as all the rest of the start.
"""

import errno
import fcntl
import gc
import json
import locale
import os
import resource
import stat
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, NoReturn

from unpriv import kernel, limits, pipeline, rulebook, sandbox
from unpriv.blob import Blob, FileBlob, MemoryBlob
from unpriv.decompress import FILTER_OF_MEDIA
from unpriv.findings import Findings
from unpriv.hashing import Hasher
from unpriv.manifest import write_all

# The descriptors as policy/syscalls/check.seccomp knows them.
_BLOB, _REPORT, _LAST_LINE, _PAYLOAD, _MANIFEST, _TREE, _SCRATCH, _GATE, _LOWER = range(9)

_UNREADABLE: Final = b"neither bzip2 nor xz"
_CPU_GRACE_S: Final = 10  # by which the kernel's limit lies above our own
# The hashing thread asks for the interpreter only to begin its next file: with Python's 5 ms it would wait most of the
# time (measured with CPython 3.11: 3.4 s instead of 1.7 s for 860 MB).
_SWITCH_S: Final = 0.00002
_ACCEPTED, _REJECTED, _SOFTWARE, _NO_ROOM, _IO_ERROR, _CONFIG = 0, 65, 70, 73, 74, 78  # sysexits.h
_CODES: Final = {errno.ENOSPC: _NO_ROOM, errno.EDQUOT: _NO_ROOM, errno.EFBIG: _NO_ROOM, errno.EIO: _IO_ERROR}


class Job(NamedTuple):
    """A CheckJob of broker/protocol.py: the same fields."""

    media: str
    layer_number: int = 1
    gate_fd: int | None = None
    lower: Sequence[int] = ()
    manifest_fd: int | None = None
    payload_fd: int | None = None
    tree_fd: int | None = None
    all_violations: bool = False


def main() -> NoReturn:
    """Run one check and end the process."""
    try:
        code = _check(sys.argv[1:])
    except (rulebook.RulebookError, sandbox.SandboxError) as error:
        code = _last_words(_CONFIG, error)
    except OSError as error:
        code = _last_words(_CODES.get(error.errno or 0, _SOFTWARE), error)
    except BaseException as error:  # the traceback printer would open source files, which the sandbox answers by death
        code = _last_words(_SOFTWARE, error)
    os._exit(code)


def _last_words(code: int, error: BaseException) -> int:
    words = f"unpriv.check: {type(error).__name__}: {error}".encode("ascii", "backslashreplace")[:2000]
    try:
        os.write(_LAST_LINE, words.replace(b"\n", b" ") + b"\n")
    except OSError:
        return code  # nobody listens any more
    return code


def _check(arguments: list[str]) -> int:
    job, in_force = _told(arguments)
    rulebook.verify()
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    kernel.single_arena()
    sys.setswitchinterval(_SWITCH_S)
    lower_count = len(job.lower)
    present = _arrange(job)
    blob = _open(_BLOB)
    lowers = [_open(_LOWER + number) for number in range(lower_count)]  # their sizes may grow until the gate opens
    hasher = Hasher()
    _warm_up(job.media, hasher, in_force)
    sandbox.lock("check", sandbox.Rules(), rlimits(in_force, lower_count), start_threads=hasher.start)
    findings = Findings(in_force, job.layer_number, job.all_violations)
    outputs = pipeline.Outputs(
        payload=_PAYLOAD if _PAYLOAD in present and job.media != "tar" else None,
        manifest=_MANIFEST if _MANIFEST in present else None,
        tree=_TREE if _TREE in present else None,
        scratch=_SCRATCH if _TREE in present else None,
        progress=lambda done_bytes: _report({"type": "progress", "done_bytes": done_bytes}),
    )
    verdict = pipeline.verdict(
        job.media, blob, _behind_gate(lowers, _GATE in present), in_force, findings, hasher, outputs
    )
    _report(verdict)
    return _ACCEPTED if verdict["type"] == "accepted" else _REJECTED


def _behind_gate(lowers: list[Blob], gated: bool) -> Iterator[Blob]:
    """Yield each of the lower layers' manifests once it is whole: the broker says so by a byte, from below."""
    for lower in lowers:
        if gated and not os.read(_GATE, 1):
            raise RuntimeError("a layer below was not accepted")
        yield lower


def _told(arguments: list[str]) -> tuple[Job, limits.Limits]:
    if len(arguments) != 2:
        raise ValueError("expected two arguments, a job and the limits in JSON")
    try:
        return Job(**json.loads(arguments[0])), limits.parse(arguments[1])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a job and its limits: {error}") from error


def _report(line: dict[str, Any]) -> None:
    write_all(_REPORT, json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n")


def _open(descriptor: int) -> Blob:
    """Return a regular file as a blob; its size is what it is now."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"descriptor {descriptor} is no regular file")
    return FileBlob(descriptor, status.st_size)


def _arrange(job: Job) -> set[int]:
    """Move the job's descriptors to the numbers of the policy and close all others; return those in use."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted: dict[int, int | None] = {
        _PAYLOAD: job.payload_fd, _MANIFEST: job.manifest_fd, _TREE: job.tree_fd, _GATE: job.gate_fd,
    }  # fmt: skip
    wanted |= {_LOWER + number: descriptor for number, descriptor in enumerate(job.lower)}
    if job.tree_fd is not None:
        wanted[_SCRATCH] = os.memfd_create("manifest", os.MFD_CLOEXEC)
    # First out of the way, all of them, so that none is overwritten before it is moved.
    above = max(_LOWER + len(job.lower), *(fd or 0 for fd in wanted.values())) + 1
    moved = {to: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for to, fd in wanted.items() if fd is not None}
    os.closerange(_PAYLOAD, above)
    for to, descriptor in moved.items():
        os.dup2(descriptor, to, inheritable=False)
    os.closerange(_LOWER + len(job.lower), hard if hard > 0 else 1 << 30)  # close_range(2), one call
    return set(moved)


def rlimits(in_force: limits.Limits, lower_count: int) -> dict[str, int]:
    """Return the kernel's limits: a little above our own, which give a better word."""
    return {
        "as": in_force.run.address_space_bytes,
        "cpu": in_force.run.cpu_s + _CPU_GRACE_S,
        "fsize": in_force.stream.payload_bytes + (1 << 30),
        "nofile": _LOWER + lower_count,
        "nproc": 0,
    }


def _warm_up(media: str, hasher: Hasher, in_force: limits.Limits) -> None:
    """Check a small archive in the compression of the job, with a hashing thread that ends again.

    After this, every module that the job can need is imported, every codec and table loaded, every callback made.
    """
    hasher.start()
    if FILTER_OF_MEDIA[media] in in_force.stream.filters:
        _rehearse(media, _compressed(media, _small_tar()), hasher, in_force)
    else:  # it will be refused by its name; the words for that are made ready
        _rehearse("tar", _small_tar(), hasher, in_force)
    hasher.stop()
    gc.freeze()
    gc.disable()  # no cycles are made from here on, and a million entries would be walked again and again


def _rehearse(media: str, data: bytes, hasher: Hasher, in_force: limits.Limits) -> None:
    findings = Findings(in_force, 1, all_violations=False)
    report = pipeline.verdict(media, MemoryBlob(data), [], in_force, findings, hasher, pipeline.Outputs())
    if data != _UNREADABLE and report["type"] != "accepted":
        raise RuntimeError(f"the rehearsal was refused: {report['violations']}")


def _compressed(media: str, data: bytes) -> bytes:
    if media == "tar":
        return data
    if media == "tar+gzip":
        return zlib.compress(data, 1, 31)
    if media == "tar+zstd":
        import zstandard

        return zstandard.compress(data)
    return _UNREADABLE


def _small_tar() -> bytes:
    """Return an archive with a PAX header, a name that is not ASCII, and a file large enough for the hashing thread."""
    large = 70_000
    record = "17 path=d/l\u00e4rge\n".encode()
    members = ((b"x", b"x", record), (b"large", b"0", bytes(large)))
    tar = b""
    for name, kind, data in members:
        head = struct.pack(
            "100s8s8s8s12s12s8sc100s8s247x", name, b"0000644", b"0000000", b"0000000", b"%011o" % len(data),
            b"00000000000", b" " * 8, kind, b"", b"ustar\x0000",
        )  # fmt: skip
        tar += head[:148] + b"%06o\0 " % sum(head) + head[156:] + data + bytes(-len(data) % 512)
    return tar + bytes(1024)


if __name__ == "__main__":
    main()
