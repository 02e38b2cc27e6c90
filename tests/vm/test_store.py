"""The thin store on a real kernel: each case of guest/store_cases.py is a test."""

import ast
from pathlib import Path

import pytest

from tests.vm.machine import Machine

pytestmark = pytest.mark.vm

SOURCE = Path(__file__).parent / "guest/store_cases.py"
CASES = [
    node.name
    for node in ast.parse(SOURCE.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("case_")
]


@pytest.mark.parametrize("case", CASES, ids=[name.removeprefix("case_") for name in CASES])
def test_store(machine: Machine, case: str) -> None:
    result = machine.run(
        "python3", "/src/tests/vm/guest/store_cases.py", case, environment={"PYTHONPATH": "/src"}, timeout_s=120
    )
    print(result.out)
    assert "blocked for more than" not in machine.sh("dmesg").out, "a process hung in the kernel"
