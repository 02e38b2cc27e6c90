"""The host's side of guest/warm.py: programs run in a guest without the seconds that their imports take there."""

import json
from collections.abc import Mapping
from typing import Final

from tests.vm.installed import PYTHON
from tests.vm.machine import Machine, MachineError, Result

_PROGRAM: Final = "/src/tests/vm/guest/warm.py"
_MODULES: Final = (
    "broker.cli", "broker.commands", "broker.app", "tests.vm.guest.client", "tests.vm.guest.store_cases",
    "tests.vm.guest.helper_cases", "tests.vm.guest.broker_cases",
)  # fmt: skip


def call(
    machine: Machine, function: str, *words: str, user: str = "", environment: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Result:  # fmt: skip
    """Call ``module:function`` as the program of these words, as root or a user, on a machine with the site's disk.

    Raises: MachineError if it does not end in time or something hangs in the kernel.
    """
    if machine.warm[0] != machine.boots:
        number = machine.start(PYTHON, _PROGRAM, *_MODULES, environment={"PYTHONPATH": "/src"})
        machine.warm = (machine.boots, number)
    request = {"call": function, "words": words, "user": user, "environment": dict(environment or {})}
    line = json.dumps({**request, "timeout_s": timeout_s})
    answer = json.loads(machine.tell(machine.warm[1], line, timeout_s + 120))
    if answer["code"] is None:
        raise MachineError(f"{function} did not end in {timeout_s} s\n{answer['out']}\n{answer['err']}")
    if "blocked for more than" in answer["kernel"]:
        raise MachineError(f"{function}: a process hung in the kernel\n{answer['kernel'][-3000:]}")
    return Result(answer["code"], answer["out"], answer["err"], 0)
