"""The part of the source tree that runs inside a guest: the helper, its policy, and these tests' own programs."""

import importlib.util
import io
import py_compile
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from tests.vm.machine import Machine

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_PARTS: Final = ("privhelper", "policy", "tests/vm", "tests/privhelper", "tests/servers", "tests/broker/programs")


def bring_source(machine: Machine) -> None:
    """Copy it to /src, compiled: to compile is what an emulated processor is slowest at."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive, tempfile.NamedTemporaryFile() as compiled:
        for part in _PARTS:
            for path in sorted((REPOSITORY / part).rglob("*")):
                name = path.relative_to(REPOSITORY)
                if not path.is_file() or path.suffix == ".pyc":
                    continue
                archive.add(path, arcname=name)
                if path.suffix == ".py":
                    py_compile.compile(str(path), compiled.name, str(Path("/src") / name), doraise=True)
                    archive.add(compiled.name, arcname=importlib.util.cache_from_source(str(name)))
    machine.put("/src.tar", buffer.getvalue())
    machine.sh("mkdir -p /src; tar -C /src -xf /src.tar; rm /src.tar")
