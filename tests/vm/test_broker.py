"""kill -9 of imgpull and of the helper at the steps of each machine, on the thin store: guest/broker_cases.py.

IMGPULL_VM_POINTS bounds how many points are tried (CI: 12, of which 6 are those of a pull); 0 tries every one.
"""

import os

import pytest

from tests.vm.conftest import run_case
from tests.vm.machine import Machine

pytestmark = pytest.mark.vm


def test_killed_at_the_commits_of_every_machine(machine: Machine) -> None:
    points = os.environ.get("IMGPULL_VM_POINTS", "12")
    case = "broker_cases:case_killed_at_the_commits_of_every_machine"
    timeout_s = 1800 if points == "12" else 7200
    print(run_case(machine, case, {"IMGPULL_VM_POINTS": points}, timeout_s))
