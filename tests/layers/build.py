"""Build the families of a recipe as root: mmdebstrap for the base, a chroot on an overlay for each layer above it.

Rule 1: it runs in mount and process namespaces of its own, so nothing stays mounted or running whatever happens.
Rule 2: packages come by the package sources and the apt settings of this machine; the chroot has no network.
Rule 3: equal layers on equal layers are built once, and are equal bytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.layers.pack import MOUNT_POINTS, pack
from tests.layers.recipes import LATEST_MTIME_S, RECIPES, SUITE, Layer, Recipe

NAMESPACES: Final = (
    "unshare",
    "--mount",
    "--propagation",
    "private",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
OVERLAY: Final = "index=off,metacopy=off,redirect_dir=off,xino=off"  # plain differences: overlayfs.rst, "Changes to..."
LEFTOVERS: Final = (  # what the tools write down about the build, and no image needs
    "var/cache/apt/*.bin", "var/cache/debconf/*-old", "var/cache/ldconfig/aux-cache", "var/lib/dpkg/*-old",
    "var/log/*.log", "var/log/apt/*", "etc/*-", "etc/.pwd.lock", "etc/apt/apt.conf.d/99mmdebstrap", "etc/machine-id",
    "etc/hostname", "etc/resolv.conf", "var/lib/apt/lists/*", "var/cache/apt/archives/*.deb",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Built:
    """A layer that is there: its directory of changes, and its tarball without compression."""

    upper: Path
    tarball: Path


def build(recipe: Recipe, folder: Path) -> None:
    """Write ``folder``/images/FAMILY/N.tar[.gz|.zst] for each family of ``recipe``; run by ``build_in_namespaces``."""
    work = folder / "work"
    work.mkdir(parents=True)
    stacks: dict[tuple[Layer, ...], list[Built]] = {(): [_base(recipe, work)]}
    for name, layers in recipe.families.items():
        for count in range(1, len(layers) + 1):
            if layers[:count] not in stacks:
                stacks[layers[:count]] = _stack(stacks[layers[: count - 1]], layers[count - 1], work)
        family = folder / "images" / name
        family.mkdir(parents=True)
        for number, (built, layer) in enumerate(zip(stacks[layers], (Layer(), *layers), strict=True), start=1):
            _publish(built.tarball, family / f"{number}{layer.suffix}")
    shutil.rmtree(work)


def build_in_namespaces(recipe: Recipe, folder: Path) -> None:
    """Run ``build`` in namespaces that take every mount and process with them when they end."""
    folder.mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        command = [*NAMESPACES, sys.executable, "-m", "tests.layers.build", recipe.name, str(folder)]
        finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
    if finished.returncode:
        end = (folder / "log").read_text(errors="replace")[-4000:]
        raise RuntimeError(f"building the layers of {recipe.name} ended with {finished.returncode}:\n{end}")


def _base(recipe: Recipe, work: Path) -> Built:
    """Make layer 1, and lay the package lists aside for the layers above."""
    root = work / "base"
    sources = "\n".join(_sources(recipe.suites))
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.excluded]
    options += [f"--aptopt={line}" for line in _apt_proxy_settings()]
    options += ["--skip=cleanup/apt", "--mode=root", "--variant=minbase"]
    _run(["mmdebstrap", *options, SUITE, str(root), "-"], stdin=sources)
    (root / "var/lib/apt/lists").rename(work / "lists")
    (root / "var/lib/apt/lists/partial").mkdir(parents=True)
    _remove_leftovers(root)
    for name in MOUNT_POINTS:
        for child in (root / name).iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    return _packed(root, [], work / "base.tar")


def _stack(below: list[Built], layer: Layer, work: Path) -> list[Built]:
    """Return ``below`` and ``layer`` on top of it."""
    number = len(list(work.glob("upper-*")))
    upper = work / f"upper-{number}"
    lowers = [built.upper for built in reversed(below)]
    with _mounted(upper, lowers, work) as root:
        _download(layer.packages, root, work)
        if layer.packages:
            _chroot(root, f"apt-get install --yes --no-install-recommends --no-download {' '.join(layer.packages)}")
        if layer.unpacked:
            _unpack(layer.unpacked, root, work)
        _chroot(root, layer.script)
    _remove_leftovers(upper)
    return [*below, _packed(upper, lowers, work / f"upper-{number}.tar")]


def _packed(upper: Path, lowers: Sequence[Path], tarball: Path) -> Built:
    pack(upper, lowers, tarball, LATEST_MTIME_S)
    return Built(upper, tarball)


@contextmanager
def _mounted(upper: Path, lowers: Sequence[Path], work: Path) -> Iterator[Path]:
    """Mount the overlay and what a package's scripts expect of a running system; yield its root."""
    root, scratch = work / "root", work / "overlay"
    for folder in (upper, root, scratch):
        folder.mkdir(exist_ok=True)
    layers = f"lowerdir={':'.join(map(str, lowers))},upperdir={upper},workdir={scratch}"
    _run(["mount", "-t", "overlay", "overlay", "-o", f"{layers},{OVERLAY}", str(root)])
    for name in ("tmp", "run", "var/cache/apt"):
        _run(["mount", "-t", "tmpfs", "tmpfs", str(root / name)])
    _run(["mount", "-t", "proc", "proc", str(root / "proc")])
    _run(["mount", "--bind", "/dev", str(root / "dev")])
    _run(["mount", "--bind", str(work / "lists"), str(root / "var/lib/apt/lists")])
    (root / "var/cache/apt/archives/partial").mkdir(parents=True)
    yield root
    _run(["umount", "--recursive", str(root)])
    shutil.rmtree(scratch)


def _download(packages: Sequence[str], root: Path, work: Path) -> None:
    """Let the apt of this machine fetch what the chroot's own package database lacks."""
    if packages:
        _apt(root, work, "install", "--yes", "--no-install-recommends", "--download-only", *packages)


def _unpack(packages: Sequence[str], root: Path, work: Path) -> None:
    """Lay the files of ``packages`` below /tmp/unpacked of the chroot, without installing them."""
    _apt(root, work, "download", *packages, cwd=root / "tmp")
    _chroot(root, 'mkdir /tmp/unpacked; for deb in /tmp/*.deb; do dpkg-deb --extract "$deb" /tmp/unpacked; done')


def _apt(root: Path, work: Path, *words: str, cwd: Path | None = None) -> None:
    settings = {
        "Dir::State::Status": root / "var/lib/dpkg/status",
        "Dir::State::Extended_States": root / "var/lib/apt/extended_states",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": root / "var/cache/apt",
        "Dir::Etc::SourceList": root / "etc/apt/sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Log": root / "tmp",
        "APT::Sandbox::User": "root",  # the cache of the chroot is root's alone
        "APT::Get::List-Cleanup": "false",
    }
    options = [f"--option={key}={value}" for key, value in settings.items()]
    _run(["apt-get", "--quiet", *options, *words], cwd=cwd)


def _chroot(root: Path, script: str) -> None:
    """Run ``script`` in the chroot, without network; the first command that fails ends it."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root",
                   "DEBIAN_FRONTEND": "noninteractive", "SOURCE_DATE_EPOCH": str(LATEST_MTIME_S),
                   "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}  # fmt: skip
    _run(["unshare", "--net", "chroot", str(root), "/bin/sh", "-euxc", script], environment=environment)


def _sources(suites: Sequence[str]) -> list[str]:
    """Return the one-line sources of ``suites`` from where this machine has its own Debian 12 packages."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    known = [line.split() for line in listed.splitlines()]
    main = {(uri, release) for uri, release, component in known if component == "main" and release.startswith(SUITE)}
    uris = sorted(uri for uri, release in main if release == SUITE)
    if not uris:
        raise RuntimeError(f"apt of this machine has no source of {SUITE} main: the layers are built from it")
    wanted = main | {(uris[0], suite) for suite in suites}
    return [f"deb {uri} {release} main" for uri, release in sorted(wanted)]


def _apt_proxy_settings() -> list[str]:
    """Return the apt settings of this machine that say how its mirror is reached; mmdebstrap does not read them."""
    dumped = subprocess.run(["apt-config", "dump"], check=True, capture_output=True, text=True).stdout
    return [line for line in dumped.splitlines() if line.startswith(("Acquire::http", "Acquire::https"))]


def _remove_leftovers(root: Path) -> None:
    for pattern in LEFTOVERS:
        for path in root.glob(pattern):
            if path.is_file() or path.is_symlink():  # never a whiteout: a removal below it stays one
                path.unlink()


def _publish(tarball: Path, target: Path) -> None:
    """Put ``tarball`` under its name in the bucket; what is not compressed shares its bytes with equal layers."""
    if target.suffix == ".tar":
        os.link(tarball, target)
        return
    command = {".gz": ["gzip", "-n", "-6", "-c"], ".zst": ["zstd", "-q", "-3", "-T1", "-c"]}[target.suffix]
    with target.open("wb") as compressed:
        subprocess.run([*command, str(tarball)], check=True, stdout=compressed)


def _run(
    command: Sequence[str], *, stdin: str = "", cwd: Path | None = None, environment: dict[str, str] | None = None
) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, check=True, input=stdin, text=True, cwd=cwd, env=environment)


if __name__ == "__main__":
    build(RECIPES[sys.argv[1]], Path(sys.argv[2]))
