"""``make bench``: imgpull beside what a user would do instead, and beside the floors of this machine.

``python -m tests.bench [--rounds N] [--layers demo|full] [--only WORD]``; needs root. Figures go to build/bench.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import boto3
import trio
from botocore.config import Config

from broker import helper as client
from broker.app import sealed_copy
from broker.protocol import CheckJob
from broker.reference import media_of
from tests.bench.harness import Case, Group, just, report, run
from tests.layers.families import Family, families
from tests.servers import swift
from tests.support.helper import Helper, running_helper

ROOT: Final = Path(__file__).resolve().parents[2]
BUCKET: Final = "bench"
HASH: Final = (
    "import hashlib, sys; [print(hashlib.file_digest(open(p, 'rb'), 'sha256').hexdigest()) for p in sys.argv[1:]]"
)


def main() -> None:
    """Run the groups that are asked for and print the table."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", choices=["demo", "full"], default="full")
    parser.add_argument("--only", default="", help="a word of the titles of the groups to run")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("the bench makes pools, mounts and file systems: make bench asks sudo for that")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="imgpull-bench-", dir="/var/tmp")))
        family = families(options.layers)[0]
        tars = plain_layers(family, folder)
        running = stack.enter_context(running_helper(folder / "bench-helper", "root"))
        made = [check_group(tars), commit_group(tars, folder, running), *pull_groups(stack, family, folder, running)]
        chosen = [group for group in made if options.only in group.title]
        for group in chosen:
            print(f"measuring: {group.title}", file=sys.stderr)
            group.run(options.rounds)
        print(report(chosen, options.rounds, ROOT / "build/bench.json"))
        release(running)


def plain_layers(family: Family, folder: Path) -> list[Path]:
    """Return the layers as uncompressed tars."""
    found = []
    for number, layer in enumerate(family.layers, 1):
        target = folder / f"{number}.tar"
        tool = {".gz": "gzip", ".zst": "zstd"}.get(layer.suffix)
        if tool is None:
            shutil.copyfile(layer, target)
        else:
            with target.open("wb") as out:
                subprocess.run([tool, "-dc", str(layer)], stdout=out, check=True)
        found.append(target)
    return found


# ---------------------------------------------------------------- the checker


def check(layers: list[Path], keep: Path | None = None) -> list[Path]:
    """Check layers on top of one another by the real program; return their manifests, which lie in ``keep``."""
    manifests: list[Path] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, layer in enumerate(layers, 1):
            path = (keep or Path(scratch)) / f"{number}.jsonl"
            with contextlib.ExitStack() as stack:
                out = stack.enter_context(path.open("w+b"))
                lower = [stack.enter_context(m.open("rb")).fileno() for m in manifests]
                blob = stack.enter_context(layer.open("rb"))
                media = media_of(layer.name)
                assert media is not None
                job = CheckJob(media=media, layer_number=number, lower=lower, manifest_fd=out.fileno())
                command = [sys.executable, "-I", "-m", "unpriv.check", job.model_dump_json()]
                environment = {"LC_ALL": "C.UTF-8"}
                run(command, stdin=blob, pass_fds=(*lower, out.fileno()), env=environment)
            manifests.append(path)
    return manifests


def check_group(tars: list[Path]) -> Group:
    return Group(
        "check all layers",
        [
            Case("one bare sha256 pass by hashlib", lambda: just(lambda: run([sys.executable, "-c", HASH, *tars]))),
            Case("unpriv.check: two readers, rules, digests, manifest", lambda: just(lambda: _ignore(check(tars)))),
            Case("GNU tar -t (verifies nothing)", lambda: just(lambda: list_all(tars))),
        ],
        goal="at most 1.4 x of the pass",
    )


def list_all(tars: list[Path]) -> None:
    for tar in tars:
        run(["tar", "-tf", tar])


def _ignore(_: object) -> None:
    return None


# ---------------------------------------------------------------- the root helper


@contextlib.contextmanager
def fresh_filesystem(folder: Path) -> Iterator[Path]:
    """Mount an empty ext4 on a loop device over XFS, as a layer of the reflink store lies."""
    pool, image, mount = folder / "plain.xfs", folder / "plain", folder / "mount"
    for path in (image, mount):
        path.mkdir(exist_ok=True)
    with pool.open("wb") as file:
        file.truncate(6 << 30)
    run(["mkfs.xfs", "-q", "-f", pool])
    run(["mount", "-o", "loop", pool, image])
    try:
        with (image / "image").open("wb") as file:
            file.truncate(4 << 30)
        run(["mkfs.ext4", "-q", "-m", "0", image / "image"])
        loop = subprocess.run(
            ["losetup", "--find", "--show", "--direct-io=on", str(image / "image")],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
        try:
            run(["mount", loop, mount])
            try:
                yield mount
            finally:
                run(["umount", mount])
        finally:
            run(["losetup", "--detach", loop])
    finally:
        run(["umount", image])
        pool.unlink()


@contextlib.contextmanager
def untar(tars: list[Path], folder: Path) -> Iterator[Callable[[], None]]:
    with fresh_filesystem(folder) as mount:

        def work() -> None:
            for tar in tars:
                run(["tar", "-xpf", tar, "--numeric-owner", "-C", mount])
            run(["sync", "-f", mount])

        yield work


@contextlib.contextmanager
def commits(tars: list[Path], manifests: list[Path], running: Helper) -> Iterator[Callable[[], None]]:
    """Yield what commits all layers; they are removed afterwards."""
    made: list[str] = []

    async def commit_all() -> None:
        for manifest, tar in zip(manifests, tars, strict=True):
            with manifest.open("rb") as plain, tar.open("rb") as payload, sealed_copy(plain.fileno()) as sealed:
                async with client.connect(str(running.socket)) as root:
                    made.append((await root.commit(sealed, payload.fileno()))[0])

    yield lambda: trio.run(commit_all)
    remove(running, made)


def remove(running: Helper, layers: list[str]) -> None:
    """Remove layers, the highest first."""

    async def work() -> None:
        async with client.connect(str(running.socket)) as root:
            for layer in reversed(layers):
                await root.remove(layer)

    trio.run(work)


def release(running: Helper) -> None:
    """Give back every device and every layer of the pool."""

    async def work() -> None:
        async with client.connect(str(running.socket)) as root:
            layers, activations = await root.inventory()
            for row in activations:
                await root.deactivate(row["name"])
            left = {row["layer"]: row["parent"] for row in layers}
            while left:
                tops = [layer for layer in left if layer not in left.values()]
                for layer in tops:
                    await root.remove(layer)
                    del left[layer]

    trio.run(work)


def commit_group(tars: list[Path], folder: Path, running: Helper) -> Group:
    (folder / "manifests").mkdir()
    manifests = check(tars, folder / "manifests")
    return Group(
        "commit all layers",
        [
            Case("GNU tar -xpf and sync (verifies nothing)", lambda: untar(tars, folder)),
            Case("root helper: hashed while copied, synced, sealed", lambda: commits(tars, manifests, running)),
        ],
        goal="at most 1.15 x of tar",
    )


# ---------------------------------------------------------------- the whole pull


@contextlib.contextmanager
def pull(ref: str, environment: dict[str, str], running: Helper, warm: bool = False) -> Iterator[Callable[[], None]]:
    """Yield a pull with a state of its own; cold, or of an image that is ready."""
    with tempfile.TemporaryDirectory(prefix="imgpull-bench-home-", dir="/var/tmp") as home:
        chosen = {**os.environ, **environment, "HOME": home, "IMGPULL_HELPER_SOCKET": str(running.socket)}
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            chosen.pop(name, None)
        command = [sys.executable, "-m", "broker.cli", "pull", "-q", ref]
        if warm:
            run(command, env=chosen)
        yield lambda: run(command, env=chosen)
    release(running)


@contextlib.contextmanager
def by_hand(s3: Any, keys: list[str], folder: Path) -> Iterator[Callable[[], None]]:
    with fresh_filesystem(folder) as mount:

        def work() -> None:
            for key in keys:
                url = s3.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
                flag = {".gz": "-z", ".zst": "--zstd"}.get(Path(key).suffix, "-p")
                script = f"curl -sf '{url}' | tar -xp {flag} --numeric-owner -C '{mount}'"
                run(["bash", "-c", f"set -o pipefail; {script}"])
            run(["sync", "-f", mount])

        yield work


def pull_groups(stack: contextlib.ExitStack, family: Family, folder: Path, running: Helper) -> list[Group]:
    server = stack.enter_context(swift.running(folder / "swift"))
    s3 = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name=server.region,
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )
    s3.create_bucket(Bucket=BUCKET)
    environment = server.environment()
    keys = []
    for number, layer in enumerate(family.layers, 1):
        keys.append(f"images/{family.name}/{number}{''.join(layer.suffixes)}")
        s3.upload_file(str(layer), BUCKET, keys[-1])
    ref = f"s3://{BUCKET}/images/{family.name}"
    cold = [
        Case("curl | tar -x, layer by layer, and sync (verifies nothing)", lambda: by_hand(s3, keys, folder)),
        Case("imgpull pull", lambda: pull(ref, environment, running)),
    ]
    ready = [
        Case("python -c pass", lambda: just(lambda: run([sys.executable, "-c", "pass"]))),
        Case("imgpull pull of an image that is ready", lambda: pull(ref, environment, running, warm=True)),
    ]
    return [Group("pull a whole image", cold, goal="at most 1.0 x"), Group("ready image", ready, goal="0.15 s of CPU")]


if __name__ == "__main__":
    main()
