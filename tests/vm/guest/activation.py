"""Measure what an activation costs the helper on the thin store, for a small image and large ones: runs in the guest.

  activation.py ROUNDS    print JSON: for each image a list of [seconds from request to answer, seconds of CPU time]

Rule 1: the helper's own time is what the scheduler counted for its process; the client's is not in it.
Rule 2: the images take turns; the first round is not counted: it loads what all later ones find loaded.
"""

import json
import sys
import time
from typing import Any, Final

from tests.vm.guest import helper_cases as helper
from tests.vm.guest.forked import ForkedHelper

MIB: Final = 1 << 20


def images() -> dict[str, str]:
    """Commit images that differ a million times in size, and fifteen times in layers; return their top layers."""
    small = helper.base_layer(files=1, size=10)
    large = helper.base_layer(files=100, size=MIB)
    for layer in (small, large):
        helper.assert_ok(helper.commit(layer))
    top = small.id()
    for number in range(2, 16):
        layer = helper.upper_layer(top, f"n{number}", removes="link" if number == 2 else f"new-n{number - 1}")
        helper.assert_ok(helper.commit(layer))
        top = layer.id()
    return {"one layer of 10 bytes": small.id(), "one layer of 100 MiB": large.id(), "15 layers": top}


def measure(process: ForkedHelper, layer: str) -> tuple[float, float]:
    """Activate and take back; return the seconds that the activation took and those that the helper worked."""
    before, began = worked_s(process.pid), time.monotonic()
    answer = process.ask("activate", layer=layer, name="measured", mode="rw", size=0)
    took = (time.monotonic() - began, worked_s(process.pid) - before)
    helper.assert_ok(answer)
    helper.assert_ok(process.ask("deactivate", name="measured"))
    return took


def worked_s(pid: int) -> float:
    """Return the CPU time of a process (kernel, Documentation/scheduler/sched-stats.rst, /proc/PID/schedstat)."""
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def main() -> None:
    """Do what the command line says."""
    found: dict[str, list[Any]] = {}
    with helper.pool(data_bytes=512 * MIB):
        layers = images()
        with ForkedHelper(helper.CONFIG) as process:
            process.hello()
            for turn in range(int(sys.argv[1]) + 1):
                for name, layer in layers.items():
                    took = measure(process, layer)
                    if turn:
                        found.setdefault(name, []).append(took)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
