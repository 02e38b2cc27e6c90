"""Make the helper one file: ``python3 -m privhelper.build OUT``. Not root's code; it runs where the project is built.

Rule 1: the same sources and the same Python give the same bytes: fixed times, modes and order, no compression.
Rule 2: only privhelper/ (without this file) and the policy it loads go in. Each source has its compiled form beside it,
which halves the time to start and is used only while it carries the hash of that source (PEP 552, checked).
"""

import os
import py_compile
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path(__file__).resolve().parent.parent
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip file can name
_MAIN: Final = b"import sys\nfrom privhelper.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
_POLICY: Final = (
    "helper.toml",
    "protocol.toml",
    "authority.toml",
    "audit.toml",
    "syscalls/numbers.txt",
    "syscalls/populate.seccomp",
    "syscalls/verify.seccomp",
)


def contents() -> Iterator[tuple[str, bytes]]:
    """Yield each member's name and bytes, in order."""
    sources = [path for path in _ROOT.glob("privhelper/**/*.py") if path.name != "build.py"]
    for path in sorted([*sources, *(_ROOT / "policy" / name for name in _POLICY)]):
        name = str(path.relative_to(_ROOT))
        yield name, path.read_bytes()
        if name.endswith(".py"):
            yield name + "c", _compiled(path, name)
    yield "__main__.py", _MAIN


def _compiled(path: Path, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/compiled"
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        py_compile.compile(str(path), target, name, doraise=True, optimize=0, invalidation_mode=mode)
        return Path(target).read_bytes()


def build(target: Path) -> None:
    """Write the zipapp, complete or not at all."""
    fresh = target.with_name(target.name + ".new")
    with fresh.open("wb") as file:
        file.write(b"#!/usr/bin/python3 -IS\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, data in contents():
                member = zipfile.ZipInfo(name, _EPOCH)
                member.external_attr = 0o644 << 16
                archive.writestr(member, data)
    fresh.chmod(0o755)
    os.replace(fresh, target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 -m privhelper.build OUT")
    build(Path(sys.argv[1]))
