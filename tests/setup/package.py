"""The Debian package of this tree, built once for each state of the tree: the tests install what `make deb` builds.

Rule: the network is asked for the libraries only, and only when those of constraints.txt are not here yet.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.setup.installed import METADATA, PACKAGES, ROOT, digest, kept_home, wheels
from tests.support.caching import locked, made, remove_old

RECIPE: Final = ("tests/setup/debian", "tests/setup/deb.sh", "SECURITY.md", "CHANGELOG.md")


def package() -> Path:
    """Return the path of the package; build it if it is not there."""
    home = kept_home()
    with locked(home):
        libraries = wheels(home)
        folder = made(home / f"package-{digest(*METADATA, *PACKAGES, *RECIPE)}", lambda new: _build(new, libraries))
        remove_old(home)
    (found,) = folder.glob("*.deb")
    return found


def _build(folder: Path, libraries: Path) -> None:
    """Run what `make deb` runs; pip(1) takes the libraries from a folder."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(libraries)}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | offline
    command = [str(ROOT / "tests/setup/deb.sh"), sys.executable, str(folder)]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the package was not built:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(package())
