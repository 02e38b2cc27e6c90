"""How fast a fetch is, beside other tools, from the same server in the same run. Ratios only: the machine is noisy.

``python -m tests.bench.fetch [--rounds N] [--mib N] [--round-trip MS]``. Rule: every tool gives the same verified blob;
those that do not hash are followed by sha256 over the file, as a caller would have to, and once without for the record.

Rows: our program (a process of its own, sandbox included); `aws s3 cp` if there is an ``aws``; boto3's own transfer
manager; curl. Each in a process of its own, in turn, N rounds; the best wall clock counts, since noise only adds.
With ``--round-trip`` a slow link is simulated: 64 KiB a round trip and connection.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import boto3
from botocore.config import Config

from tests.servers import swift
from tests.servers.faults import Object, Server, in_thread

BUCKET: Final = "bench"
KEY: Final = "blob.tar"
HASH: Final = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
TRANSFER: Final = (
    "import boto3, sys; from botocore.config import Config; "
    "boto3.client('s3', endpoint_url=sys.argv[1], config=Config(s3={'addressing_style': 'path'}))"
    f".download_file('{BUCKET}', '{KEY}', sys.argv[2])"
)
Tool = Callable[[Path], None]


def digest_of(path: Path) -> str:
    """Return a file's sha256, computed by another process as all else here."""
    done = subprocess.run([sys.executable, "-I", "-c", HASH, str(path)], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def ours(url: str, pin: dict[str, Any], environment: dict[str, str]) -> Tool:
    """Return a run of our program."""

    def run(folder: Path) -> None:
        hello = {"type": "hello", "endpoint": {"endpoint_url": url, "addressing": "path"}, "blob_dir": str(folder)}
        requests = "".join(json.dumps(one) + "\n" for one in (hello, {"type": "fetch", "id": 1, "pin": pin}))
        command = [sys.executable, "-I", "-m", "unpriv.fetch"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(requests.encode())
            process.stdin.flush()
            last = next(line for line in process.stdout if b'"fetched"' in line or b'"failed"' in line)
            process.stdin.close()
        if b'"fetched"' not in last:
            raise RuntimeError(last.decode())
        shutil.move(str(folder / "sha256" / json.loads(last)["digest"][7:]), folder / "out")

    return run


def command(arguments: list[str], environment: dict[str, str]) -> Tool:
    """Return a run of another tool; `OUT` stands for the file."""

    def run(folder: Path) -> None:
        words = [str(folder / "out") if word == "OUT" else word for word in arguments]
        subprocess.run(words, check=True, env=environment, capture_output=True)

    return run


def then_hash(tool: Tool) -> Tool:
    """Return a tool followed by sha256 over its file."""

    def run(folder: Path) -> None:
        tool(folder)
        digest_of(folder / "out")

    return run


def measure(tool: Tool, digest: str) -> tuple[float, float]:
    """Return the wall clock and processor seconds of one run, whose result is checked."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="imgpull-bench-") as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start_s = time.monotonic()
        tool(Path(folder))
        wall_s = time.monotonic() - start_s
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if hashlib.file_digest((Path(folder) / "out").open("rb"), "sha256").hexdigest() != digest:
            raise RuntimeError("a tool brought a wrong blob")
    return wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fetch", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--round-trip", type=float, default=0.0, metavar="MS")
    options = parser.parse_args()
    data = os.urandom(options.mib << 20)
    digest = hashlib.sha256(data).hexdigest()
    with ExitStack() as stack:
        if options.round_trip:
            server = stack.enter_context(in_thread(Server()))
            server.round_trip_s = options.round_trip / 1000
            server.objects[f"{BUCKET}/{KEY}"] = Object(data)
            url, keys = server.url, {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
        else:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp", prefix="imgpull-bench-swift-"))
            )
            running = stack.enter_context(swift.running(folder))
            url, keys = running.endpoint, running.environment()
            del keys["AWS_ENDPOINT_URL"]
        report(url, keys, data, digest, options.rounds, upload=not options.round_trip)


def report(url: str, keys: dict[str, str], data: bytes, digest: str, rounds: int, *, upload: bool) -> None:
    """Run each tool in turn and print a row for each."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    os.environ.update(environment)
    client = boto3.client(
        "s3",
        endpoint_url=url,
        config=Config(request_checksum_calculation="when_required", s3={"addressing_style": "path"}),
    )
    if upload:
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key=KEY, Body=data)
    etag = client.head_object(Bucket=BUCKET, Key=KEY)["ETag"]
    pin = {"bucket": BUCKET, "key": KEY, "size": len(data), "etag": etag}
    signed = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": KEY})
    tools = {
        "imgpull fetch, hash and fsync": ours(url, pin, environment),
        "s3transfer, then sha256": then_hash(command([sys.executable, "-c", TRANSFER, url, "OUT"], environment)),
        "curl, then sha256": then_hash(command(["curl", "-sf", "-o", "OUT", signed], environment)),
        "curl, no sha256": command(["curl", "-sf", "-o", "OUT", signed], environment),
    }
    aws = shutil.which("aws")
    if aws and subprocess.run([aws, "--version"], capture_output=True).returncode == 0:
        copy = command([aws, "--endpoint-url", url, "s3", "cp", f"s3://{BUCKET}/{KEY}", "OUT"], environment)
        tools["aws s3 cp, then sha256"] = then_hash(copy)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
    for _ in range(rounds):
        for name, tool in tools.items():
            times[name].append(measure(tool, digest))
    best = {name: min(rows) for name, rows in times.items()}
    own_s = best["imgpull fetch, hash and fsync"][0]
    print(
        f"{len(data) >> 20} MiB from {url}, best of {rounds}; ratio: their wall clock / ours (above 1: we are faster)"
    )
    for name, (wall_s, cpu_s) in best.items():
        rate = len(data) / wall_s / 1e6
        print(f"{name:32} {wall_s:7.3f} s  {rate:6.0f} MB/s  cpu {cpu_s:6.3f} s  ratio {wall_s / own_s:5.2f}")


if __name__ == "__main__":
    main()
