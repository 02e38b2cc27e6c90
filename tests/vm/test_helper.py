"""The root helper on the thin store of a real kernel: each case of guest/helper_cases.py is a test.

IMGPULL_VM_POINTS bounds how many points of a sweep are tried (CI: 20); 0 tries every one.
"""

import ast
import os
from pathlib import Path

import pytest

from tests.vm.machine import Machine

pytestmark = pytest.mark.vm

SOURCE = Path(__file__).parent / "guest/helper_cases.py"
CASES = [
    node.name
    for node in ast.parse(SOURCE.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]


@pytest.mark.parametrize("case", CASES, ids=[name.removeprefix("case_") for name in CASES])
def test_helper(machine: Machine, case: str) -> None:
    points = os.environ.get("IMGPULL_VM_POINTS", "20")
    result = machine.run(
        "python3", "/src/tests/vm/guest/helper_cases.py", case,
        environment={"PYTHONPATH": "/src", "IMGPULL_VM_POINTS": points},
        timeout_s=300 if points == "20" else 3600,
    )  # fmt: skip
    print(result.out)
    assert "blocked for more than" not in machine.sh("dmesg").out, "a process hung in the kernel"
