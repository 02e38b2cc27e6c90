"""Images of shapes that hurt, built once and kept; and the real Debian layers, plain and compressed.

Rule 1: the bytes depend on the shape only, so two runs measure the same.
Rule 2: a shape is a folder with 1.tar, 2.tar, ...
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.layers.families import families
from tests.layers.synthetic import MTIME_S, write_large_files, write_small_files
from tests.support.caching import cache_home, locked, made

VERSION: Final = 1  # of the bytes below: a change makes all anew
LINKS_A_FILE: Final = 100  # ext4 takes 65,000
DEEP: Final = 60  # components, below the limit of 64
TOOLS: Final = {".gz": ("gzip", "-dc"), ".zst": ("zstd", "-dcq")}


def small_files(folder: Path, files: int) -> None:
    """Many files of 0 to 2 KiB in one layer."""
    write_small_files(folder / "1.tar", files)


def large_file(folder: Path, total_bytes: int) -> None:
    """One file in one layer."""
    write_large_files(folder / "1.tar", total_bytes, files=1)


def small_layers(layers: int, folder: Path, files: int) -> None:
    """Layers of as many small files each, every one of other bytes."""
    for number in range(1, layers + 1):
        write_small_files(folder / f"{number}.tar", files, seed=number)


def large_layers(layers: int, folder: Path, total_bytes: int) -> None:
    """Layers of one file each, every one of other bytes."""
    for number in range(1, layers + 1):
        write_large_files(folder / f"{number}.tar", total_bytes, files=1, seed=number)


def next_to_nothing(folder: Path, layers: int) -> None:
    """Layers of one directory each: what a layer costs before it has anything in it."""
    for number in range(1, layers + 1):
        with tarfile.open(folder / f"{number}.tar", "w", format=tarfile.USTAR_FORMAT) as out:
            _add(out, f"{number:05d}", tarfile.DIRTYPE)


def many_layers(folder: Path, layers: int) -> None:
    """Layers of fifty small files each."""
    for number in range(1, layers + 1):
        write_small_files(folder / f"{number}.tar", 50, seed=number)


def deep_tree(folder: Path, chains: int) -> None:
    """Directories in directories, a file at each end."""
    with tarfile.open(folder / "1.tar", "w", format=tarfile.USTAR_FORMAT) as out:
        for chain in range(chains):
            path = f"{chain:05d}"
            for level in range(DEEP - 2):
                _add(out, path, tarfile.DIRTYPE)
                path += f"/{level % 10}"
            _add(out, path, tarfile.REGTYPE)


def hard_links(folder: Path, links: int) -> None:
    """Files with a hundred names each."""
    with tarfile.open(folder / "1.tar", "w", format=tarfile.USTAR_FORMAT) as out:
        for number in range(links // LINKS_A_FILE):
            name = f"files/{number:06d}"
            _add(out, name, tarfile.REGTYPE)
            for link in range(1, LINKS_A_FILE):
                _add(out, f"links/{number:06d}-{link:02d}", tarfile.LNKTYPE, name)


def _add(out: tarfile.TarFile, name: str, kind: bytes, target: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mtime = kind, target, MTIME_S
    entry.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    out.addfile(entry)


def one_of_many(folder: Path, seed: int) -> None:
    """One of many small images, each of other bytes: two layers of 2,000 files."""
    for number in (1, 2):
        write_small_files(folder / f"{number}.tar", 2_000, seed=1_000 * number + seed)


def shape(name: str, make: Callable[[Path, int], None], amount: int) -> Path:
    """Return the folder of a shape, made on the first call."""
    home = cache_home()

    def build(folder: Path) -> None:
        folder.mkdir(parents=True)
        make(folder, amount)

    with locked(home):
        return made(home / f"bench-{VERSION}-{name}-{amount}", build)


def layers_of(folder: Path) -> list[Path]:
    """Return the layers of a shape, lowest first."""
    return sorted(
        (path for path in folder.iterdir() if path.name[0].isdigit()), key=lambda path: int(path.name.split(".")[0])
    )


def debian(recipe: str, suffix: str) -> list[Path]:
    """Return the layers of the real image, plain (``.tar``) or all compressed alike (``.tar.gz``, ``.tar.zst``)."""
    family = families(recipe)[0]
    home = cache_home()

    def build(folder: Path) -> None:
        folder.mkdir(parents=True)
        for number, layer in enumerate(family.layers, 1):
            _recompress(layer, folder / f"{number}{suffix}")

    with locked(home):
        return layers_of(made(home / f"bench-{VERSION}-debian-{recipe}{suffix}", build))


def _recompress(layer: Path, target: Path) -> None:
    opening = TOOLS.get(layer.suffix, ("cat",))
    closing = {".gz": ("gzip", "-6nc"), ".zst": ("zstd", "-3qc"), ".tar": ("cat",)}[target.suffix]
    with target.open("wb") as out, layer.open("rb") as source:
        first = subprocess.Popen(opening, stdin=source, stdout=subprocess.PIPE)
        second = subprocess.run(closing, stdin=first.stdout, stdout=out, check=True)
        assert first.wait() == second.returncode == 0


def copy_with_new_top(layers: list[Path], folder: Path) -> list[Path]:
    """Return an image that shares all layers but the highest, which differs in one file."""
    top = folder / layers[-1].name
    shutil.copyfile(layers[-1], top)
    with tarfile.open(top, "a") as out:
        _add(out, "another", tarfile.REGTYPE)
    return [*layers[:-1], top]
