"""A copy of this tree that is installed as an administrator would, for users who may not read the clone.

A clone often lies where an ordinary user can read nothing (below /root). The demo, and each test that acts as
an ordinary user, run ``installed_copy() / "bin/imgpull"`` instead.

Rule 1: what is run is what would be shipped: the wheel, in an environment of its own, writable by its maker only.
Rule 2: a copy is named by the digest of what it is made of, so it is never stale, and made once.
Rule 3: a copy that lacks its last file, ``complete``, was interrupted and is made anew; a lock keeps others waiting.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("broker", "unpriv", "privhelper", "policy")
METADATA: Final = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
PYTHON: Final = "/usr/bin/python3"  # Debian's: an environment of any user's own Python is not readable by all
KEPT_S: Final = 24 * 3600  # what nobody asked for so long is removed


def installed_copy() -> Path:
    """Return the environment that holds this tree as a wheel; make it if it is not there."""
    home = _home()
    with _locked(home):
        libraries = _made(home / f"libraries-{_digest(['constraints.txt', 'pyproject.toml'])}", _install_libraries)
        copy = _made(home / f"copy-{_digest([*METADATA, *PACKAGES])}", lambda new: _install_wheel(libraries, new))
        _remove_old(home)
    return copy


def _home() -> Path:
    """Return this user's folder of copies, readable by all; refuse one that another user put there."""
    home = Path(f"/var/tmp/imgpull-installed-{os.geteuid()}")
    home.mkdir(mode=0o755, exist_ok=True)
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise RuntimeError(f"{home} belongs to user {found.st_uid}, expected a directory of {os.geteuid()}")
    home.chmod(0o755)
    return home


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the lock of all copies; it ends with this process."""
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        umask = os.umask(0o022)
        try:
            yield
        finally:
            os.umask(umask)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return ``folder``, made by ``make`` unless it is complete, and note that it was asked for."""
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
    complete.touch()
    return folder


def _install_libraries(new: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _pip("install", "--constraint", str(ROOT / "constraints.txt"), "--target", str(new), *project["dependencies"])


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


def _digest(names: list[str]) -> str:
    """Return a name for the bytes of these files and folders of the tree, and for where they are installed from."""
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


def _remove_old(home: Path) -> None:
    for complete in home.glob("*/complete"):
        if complete.stat().st_mtime < time.time() - KEPT_S:
            shutil.rmtree(complete.parent)


if __name__ == "__main__":
    print(installed_copy())
