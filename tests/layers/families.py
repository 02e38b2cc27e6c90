"""The built families, kept between runs: the only thing of this folder that a test needs to know."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.layers.build import build_in_namespaces
from tests.layers.recipes import RECIPES, Recipe
from tests.support.caching import cache_home, locked, made, remove_old


@dataclass(frozen=True, slots=True)
class Family:
    """An image as it lies in a bucket: its name, and its layers from the lowest."""

    name: str
    layers: tuple[Path, ...]


def families(recipe_name: str = "demo") -> tuple[Family, ...]:
    """Return the families of a recipe, built on the first call (a minute) and kept; needs root.

    Raises:
        RuntimeError: this is not root, or the build failed; the message ends with the end of its log.
    """
    recipe = RECIPES[recipe_name]
    if os.geteuid() != 0:
        raise RuntimeError("building root filesystems needs root: owners, setuid files and mounts")
    home = cache_home()
    with locked(home):
        folder = made(home / f"layers-{recipe.name}-{_digest(recipe)}", lambda new: build_in_namespaces(recipe, new))
        remove_old(home)
    return tuple(Family(name, _layers(folder / "images" / name)) for name in recipe.families)


def _layers(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.iterdir(), key=lambda path: int(path.name.split(".")[0])))


def _digest(recipe: Recipe) -> str:
    sources: Sequence[str] = ("build.py", "pack.py")
    total = hashlib.sha256(repr(recipe).encode())
    for name in sources:
        total.update((Path(__file__).parent / name).read_bytes())
    return total.hexdigest()[:16]
