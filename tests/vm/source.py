"""The part of the source tree that runs inside a guest: the helper, its policy, and these tests' own programs."""

import io
import os
import tarfile
from pathlib import Path
from typing import Final

from tests.vm.machine import Machine

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_PARTS: Final = ("privhelper", "policy", "tests/vm", "tests/privhelper", "tests/servers", "tests/broker/programs")


def bring_source(machine: Machine) -> None:
    """Copy it to /src."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in _PARTS:
            archive.add(REPOSITORY / name, arcname=name, filter=_without_bytecode)
    machine.put("/src.tar", buffer.getvalue())
    machine.sh("mkdir -p /src; tar -C /src -xf /src.tar; rm /src.tar; python3 -m compileall -q /src/privhelper")


def _without_bytecode(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if os.path.basename(member.name) == "__pycache__" else member
