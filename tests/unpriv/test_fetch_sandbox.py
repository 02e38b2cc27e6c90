"""The fetcher's sandbox, against the checker's list of ways out: what it may do is a table here, all else is stopped.

One process imports the fetcher; each probe runs in a child of it, which locks itself in as the fetcher does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PROBE = Path(__file__).with_name("probe.py")
# Metadata by path is no secret that Landlock guards (landlock(7)), and a client needs sockets and threads.
MAY = {
    "stat": "Python's imports and the AWS configuration ask for it",
    "statx": "the same, by another libc",
    "access": "the same",
    "readlink": "real paths of configuration",
    "udp_send": "DNS",
    "tcp_connect": "S3",
    "clone_thread": "a thread a stream",
    "memory_of_a_file": "of a file that it may open",
    "read_report_pipe": "its descriptors 0 and 1 are its own; here 1 is a file",
    "write_blob": "the same",
    "write_lower_manifest": "a descriptor that is not there",
    "duplicate_descriptor": "of its own",
    "socketpair": "the wake-up of the event loop",
}
SCRIPT = """
import json, os, sys
sys.argv = ["probe", "", sys.argv[1], sys.argv[2]]
exec(open(sys.argv[3]).read().replace('if __name__ == "__main__":', "if False:"))
import unpriv.fetch as fetch
from broker.protocol import Endpoint, Hello
from unpriv import s3
client = s3.connect(Endpoint(no_sign_request=True), 2, connect_timeout_s=1, read_timeout_s=1)
hello = Hello(endpoint=Endpoint(), blob_dir=SCRATCH + "/blobs")
fetch.BlobDir.open(hello.blob_dir)
said = {}
for name in NAMES or PROBES:
    words, ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(ends, 2)
        if LOCKED:
            fetch.confine(hello, client.readable, client.writable)
        _try(PROBES[name])
    os.close(ends)
    word = os.read(words, 200).decode().partition(" ")[0].strip()
    os.close(words)
    _, status = os.waitpid(pid, 0)
    said[name] = "killed" if os.WIFSIGNALED(status) else word or "REACHED"  # execve says nothing
print(json.dumps(said))
"""


# Without the lock only these are tried, for root would get through with worse.
HARMLESS = [
    "open_file", "list_directory", "create_file", "chmod", "fork", "execve", "anonymous_file", "socketpair",
    "tcp_listen", "signal_parent", "memory_writable_and_executable", "duplicate_descriptor", "statx", "openat2",
]  # fmt: skip


def outcomes(folder: Path, *, locked: bool) -> dict[str, str]:
    """Return what became of each probe: killed, DENIED or REACHED."""
    (folder / "victim").write_bytes(b"untouched")
    settings = f"LOCKED, NAMES = {locked}, {[] if locked else HARMLESS}"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{settings}\n{SCRIPT}", str(folder), str(PROBE)],
        capture_output=True, text=True, timeout=120, check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_no_way_out_of_the_locked_fetcher(tmp_path: Path) -> None:
    found = outcomes(tmp_path, locked=True)
    assert len(found) > 28
    reached = {name for name, word in found.items() if word == "REACHED"}
    assert reached - set(MAY) == set(), found
    assert (tmp_path / "victim").read_bytes() == b"untouched"
    assert sorted(os.listdir(tmp_path)) == ["blobs", "victim"]


def test_probes_of_the_fetcher_notice_an_open_way(tmp_path: Path) -> None:
    assert outcomes(tmp_path, locked=False) == dict.fromkeys(HARMLESS, "REACHED")
