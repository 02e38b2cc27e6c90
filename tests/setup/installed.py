"""A copy of this tree that is installed as an administrator would, for users who may not read the clone.

A clone often lies where an ordinary user can read nothing (below /root). The demo, and each test that acts as
an ordinary user, run ``installed_copy() / "bin/imgpull"`` instead.

Rule 1: what is run is what would be shipped: the wheel, in an environment of its own, writable by its maker only.
Rule 2: a copy is named by the digest of what it is made of, so it is never stale, and made once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.support.caching import locked, made, owned_folder, remove_old

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("broker", "unpriv", "privhelper", "policy")
METADATA: Final = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
PYTHON: Final = "/usr/bin/python3"  # Debian's: one that a user built for himself is not readable by all


def installed_copy() -> Path:
    """Return the environment that holds this tree as a wheel; make it if it is not there."""
    home = kept_home()
    with locked(home):
        found = wheels(home)
        libraries = made(home / f"libraries-{_recipe()}", lambda new: _install_libraries(found, new))
        copy = made(home / f"copy-{digest(*METADATA, *PACKAGES)}", lambda new: _install_wheel(libraries, new))
        remove_old(home)
    return copy


def kept_home() -> Path:
    """Return the folder in which copies, and what they are made of, are kept."""
    return owned_folder(Path(f"/var/tmp/imgpull-installed-{os.geteuid()}"))


def wheels(home: Path) -> Path:
    """Return the folder with the libraries as wheels, which are fetched once; hold the lock of ``home``."""
    return made(home / f"wheels-{_recipe()}", _fetch_libraries)


def _recipe() -> str:
    return digest("constraints.txt", "pyproject.toml")


def _fetch_libraries(new: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _pip("download", "--constraint", str(ROOT / "constraints.txt"), "--dest", str(new), *project["dependencies"])


def _install_libraries(found: Path, new: Path) -> None:
    files = map(str, found.glob("*.whl"))
    _pip("install", "--no-index", "--no-deps", "--target", str(new), *files)


def _install_wheel(libraries: Path, new: Path) -> None:
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(new)], check=True)
    (site,) = new.glob("lib/python3*/site-packages")
    ignored = shutil.ignore_patterns("complete", "bin")
    shutil.copytree(libraries, site, ignore=ignored, dirs_exist_ok=True, symlinks=True)
    with tempfile.TemporaryDirectory() as scratch:
        _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", scratch, str(ROOT))
        (wheel,) = Path(scratch).glob("*.whl")
        _pip("--python", str(new / "bin/python"), "install", "--no-deps", "--no-index", str(wheel))


def _pip(*words: str) -> None:
    """Run the pip of the environment that runs this; it has the pinned build tools."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)


def digest(*names: str) -> str:
    """Return a name for the bytes of these files and folders of the tree, and of the recipe that is this file."""
    total = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for name in names for path in _files(ROOT / name)):
        content = path.read_bytes()
        total.update(f"{path.relative_to(ROOT)}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        if not folder.endswith("__pycache__"):
            yield from (Path(folder, name) for name in names)


if __name__ == "__main__":
    print(installed_copy())
