"""What an activation costs the root helper on the thin store, where a kernel has device-mapper: in the virtual machine.

Rule 1: both clocks are the guest's, and the CPU time is that of the helper's process alone.
Rule 2: an emulated processor is ten to thirty times slower than this machine's: the ratios are what counts, whatever
the size of the image; the time is what it is at worst.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from tests.bench.harness import Case, Group, just
from tests.vm import rootfs
from tests.vm.conftest import booted_machine
from tests.vm.machine import choose_accelerator

PROGRAM: Final = "/src/tests/vm/guest/activation.py"
ACTIVATIONS: Final = 5  # of each image, a round


@dataclass(slots=True)
class Activations(Group):
    """A group that is measured by a program in the guest, in one boot; its cases are the images that this tells of."""

    def run(self, rounds: int) -> None:
        """Boot, have everything measured, take over the figures."""
        built = rootfs.build()
        accelerator = choose_accelerator(built)
        self.title += ", emulated" if accelerator == "tcg" else f", by {accelerator}"
        with booted_machine(built, accelerator) as machine:
            words = ("python3", PROGRAM, str(rounds * ACTIVATIONS))
            told = machine.run(*words, environment={"PYTHONPATH": "/src"}, timeout_s=3600).out
        for name, figures in json.loads(told).items():
            walls, works = zip(*figures, strict=True)
            self.cases.append(Case(name, lambda: just(int), units=1, wall_s=list(walls), cpu_s=list(works)))


def group() -> Group:
    """Return the group; it finds its cases when it is run."""
    goal = "well under 100 ms of the helper's time, whatever the image's size"
    return Activations("activate on the thin store, in the virtual machine", [], goal=goal, per="activation")
