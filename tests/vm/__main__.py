"""``python -m tests.vm``: a virtual machine by hand.

  python -m tests.vm build            build the root filesystem if the cache has none, say where it is
  python -m tests.vm run COMMAND...   boot, run one command as root, end with its exit code
  python -m tests.vm shell            boot; each line typed is run as root, until the end of the input

The machine has the source tree's helper at /src, an empty ext4 at /scratch and the disks ``meta`` and ``data``, both
blank, below /dev/disk/by-id/virtio-*. Everything is thrown away when it ends.
"""

import sys

from tests.vm import rootfs
from tests.vm.conftest import booted_machine
from tests.vm.machine import Machine, MachineError, choose_accelerator


def main(words: list[str]) -> int:
    """Do what the command line says."""
    if words not in (["build"], ["shell"]) and not (words[:1] == ["run"] and len(words) > 1):
        sys.stderr.write(__doc__ or "")
        return 2
    built = rootfs.build()
    if words == ["build"]:
        print(f"{built.image}\n{built.kernel}")
        return 0
    with booted_machine(built, choose_accelerator(built)) as machine:
        print(f"tests/vm: booted in {machine.boot_s:.1f} s", file=sys.stderr)
        if words[0] == "run":
            return show(machine, words[1:])
        for line in sys.stdin:
            show(machine, ["/bin/bash", "-c", line])
    return 0


def show(machine: Machine, argv: list[str]) -> int:
    """Run a command and show what it wrote."""
    try:
        result = machine.run(*argv, check=False, timeout_s=3600)
    except MachineError as error:
        print(error, file=sys.stderr)
        return 125
    sys.stdout.write(result.out)
    sys.stderr.write(result.err)
    sys.stdout.flush()
    return result.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
