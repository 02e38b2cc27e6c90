"""The thin store on a real kernel: each case of guest/store_cases.py is a test."""

import ast
from pathlib import Path

import pytest

from tests.vm.conftest import run_case
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
    print(run_case(machine, f"{SOURCE.stem}:{case}", {}, timeout_s=900))
