"""The root helper on the thin store of a real kernel: each case of guest/helper_cases.py is a test.

IMGPULL_VM_POINTS bounds how many points of a sweep are tried (CI: 12); 0 tries every one.
"""

import ast
import os
from pathlib import Path

import pytest

from tests.vm.conftest import run_case
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
    points = os.environ.get("IMGPULL_VM_POINTS", "12")
    timeout_s = 900 if points == "12" else 7200
    print(run_case(machine, f"{SOURCE.stem}:{case}", {"IMGPULL_VM_POINTS": points}, timeout_s))
