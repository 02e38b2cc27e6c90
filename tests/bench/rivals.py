"""What a user would do instead, and the floors of the machine: none of it verifies anything.

Rule 1: it ends where ours ends: on an ext4 of its own, on a loop device over XFS, synced.
Rule 2: a tool that is not installed is left out, and the report says so by its absence.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from tests.bench.harness import run

HASH: Final = (
    "import hashlib, sys; [print(hashlib.file_digest(open(p, 'rb'), 'sha256').hexdigest()) for p in sys.argv[1:]]"
)
_FLAGS: Final = {".gz": "-z", ".zst": "--zstd", ".tar": ""}


@contextlib.contextmanager
def fresh_filesystem(folder: Path) -> Iterator[Path]:
    """Mount an empty ext4 on a loop device over XFS, as a layer of the reflink store lies."""
    pool, image, mount = folder / "plain.xfs", folder / "plain", folder / "mount"
    for path in (image, mount):
        path.mkdir(exist_ok=True)
    with pool.open("wb") as file:
        file.truncate(12 << 30)
    run(["mkfs.xfs", "-q", "-f", pool])
    run(["mount", "-o", "loop", pool, image])
    try:
        with (image / "image").open("wb") as file:
            file.truncate(10 << 30)
        run(["mkfs.ext4", "-q", "-m", "0", image / "image"])
        loop = run(["losetup", "--find", "--show", "--direct-io=on", image / "image"]).strip()
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
def untar(tars: list[Path], folder: Path, tool: str = "tar") -> Iterator[Callable[[], None]]:
    """Yield the unpacking of local layers, then one sync."""
    with fresh_filesystem(folder) as mount:

        def work() -> None:
            for tar in tars:
                run([tool, "-xpf", tar, "--numeric-owner", "-C", mount])
            run(["sync", "-f", mount])

        yield work


@contextlib.contextmanager
def piped(
    downloads: Callable[[], list[str]], layers: list[Path], folder: Path, tool: str = "tar"
) -> Iterator[Callable[[], None]]:
    """Yield downloads piped into a tar, layer by layer, then one sync."""
    with fresh_filesystem(folder) as mount:

        def work() -> None:
            for download, layer in zip(downloads(), layers, strict=True):
                flag = _FLAGS[layer.suffix]
                script = f"{download} | {tool} -xp {flag} --numeric-owner -f - -C '{mount}'"
                run(["bash", "-c", f"set -o pipefail; {script}"])
            run(["sync", "-f", mount])

        yield work


@contextlib.contextmanager
def copied(layers: list[Path], folder: Path) -> Iterator[Callable[[], None]]:
    """Yield the writing of the same bytes as plain files, synced: the disk's floor."""
    with fresh_filesystem(folder) as mount:

        def work() -> None:
            for layer in layers:
                shutil.copyfile(layer, mount / layer.name)
            run(["sync", "-f", mount])

        yield work


def hashed(layers: list[Path]) -> Callable[[], object]:
    """Return one bare pass of hashlib's SHA-256 in a process of its own."""
    return lambda: run([sys.executable, "-c", HASH, *layers])


# ---------------------------------------------------------------- unpackers of images


@contextlib.contextmanager
def umoci(layers: list[Path], folder: Path) -> Iterator[Callable[[], None]]:
    """Yield `umoci unpack` of the same layers from a local OCI layout, synced; nothing is downloaded."""
    layout = folder / "oci"
    _write_layout(layers, layout)
    try:
        with fresh_filesystem(folder) as mount:

            def work() -> None:
                run(["umoci", "unpack", "--image", f"{layout}:bench", mount / "bundle"])
                run(["sync", "-f", mount])

            yield work
    finally:
        shutil.rmtree(layout)


def _write_layout(layers: list[Path], layout: Path) -> None:
    """Write an OCI image layout (image-spec, image-layout.md) of layers that umoci reads: plain or gzip."""
    (layout / "blobs/sha256").mkdir(parents=True)

    def blob(data: bytes, media: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": f"application/vnd.oci.image.{media}", "digest": f"sha256:{digest}", "size": len(data)}

    described, plain = [], []
    for layer in layers:
        data = layer.read_bytes()
        compressed = layer.suffix == ".gz"
        described.append(blob(data, "layer.v1.tar+gzip" if compressed else "layer.v1.tar"))
        plain.append(f"sha256:{hashlib.sha256(gzip.decompress(data) if compressed else data).hexdigest()}")
    root = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": plain}, "config": {}}
    config = blob(json.dumps(root).encode(), "config.v1+json")
    manifest = blob(
        json.dumps({"schemaVersion": 2, "config": config, "layers": described}).encode(), "manifest.v1+json"
    )
    manifest["annotations"] = {"org.opencontainers.image.ref.name": "bench"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [manifest]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


# ---------------------------------------------------------------- podman, from a registry of the machine's own

REGISTRY: Final = """version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: {address}}}
log: {{level: error, accesslog: {{disabled: true}}}}
"""
REGISTRY_STARTS_S: Final = 20.0


@contextlib.contextmanager
def registry(layers: list[Path], folder: Path) -> Iterator[str]:
    """Serve an image of the layers, compressed by gzip, from docker-registry; yield its name."""
    layout, stored, config = folder / "oci-pushed", folder / "registry", folder / "registry.yml"
    _write_layout(layers, layout)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config.write_text(REGISTRY.format(folder=stored, address=address))
    server = subprocess.Popen(
        ["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _await_port(address)
        name = f"{address}/bench:latest"
        push = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        run([*push, f"oci:{layout}:bench", f"docker://{name}"])
        yield name
    finally:
        server.terminate()
        server.wait()
        for path in (layout, stored):
            shutil.rmtree(path, ignore_errors=True)


def _await_port(address: str) -> None:
    host, _, port = address.partition(":")
    until = time.monotonic() + REGISTRY_STARTS_S
    while True:
        try:
            socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


@contextlib.contextmanager
def podman(name: str, folder: Path) -> Iterator[Callable[[], None]]:
    """Yield `podman pull` of an image of that registry into an empty store (overlay), synced."""
    with fresh_filesystem(folder) as mount:
        store: list[str | Path] = ["--root", mount / "root", "--runroot", mount / "run", "--storage-driver", "overlay"]

        def work() -> None:
            run(["podman", *store, "pull", "--quiet", "--tls-verify=false", name])
            run(["sync", "-f", mount])

        try:
            yield work
        finally:  # it mounts its own folder on itself
            subprocess.run(["umount", mount / "root/overlay"], capture_output=True, check=False)


def there_is(tool: str) -> bool:
    """Tell whether a tool is installed and starts."""
    return shutil.which(tool) is not None and subprocess.run([tool, "--version"], capture_output=True).returncode == 0
