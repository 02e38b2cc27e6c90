"""The whole program on the machine it is for: an ordinary user pulls from S3 onto device-mapper, under real systemd.

The tests share one installed machine with test_service.py and run in order; the last one removes all.
"""

import json
import re

import pytest

from tests.support.output import check_output
from tests.vm.families import FAMILIES, flattened_bytes, stored_once_bytes
from tests.vm.installed import ENVIRONMENT, PYTHON, SITE
from tests.vm.machine import Machine, Result
from tests.vm.warm import call

pytestmark = pytest.mark.vm

MIB = 1 << 20
IMGPULL = f"{SITE}/copy/bin/imgpull"
BUCKET = "s3://bucket/images"
KERNEL_COUNTER = "/sys/kernel/tracing/events/kprobes/imgpull_dm/enable"


def imgpull(machine: Machine, *words: str, user: str = "alice", code: int = 0) -> Result:
    """Run the installed imgpull as a user; the exit code must be the one expected."""
    done = machine.run(IMGPULL, *words, user=user, environment=ENVIRONMENT, check=False, timeout_s=7200)
    return expect(code, machine, words, done)


def asked(machine: Machine, *words: str) -> Result:
    """Have a process that has loaded imgpull already do the same as alice, for what a test only needs or looks at."""
    done = call(machine, "broker.cli:main", *words, user="alice", environment=ENVIRONMENT)
    return expect(0, machine, words, done)


def expect(code: int, machine: Machine, words: tuple[str, ...], done: Result) -> Result:
    journal = machine.sh("journalctl -o cat -n 30 -u 'imgpull-helper@*'", check=False).out if done.code != code else ""
    assert done.code == code, f"imgpull {' '.join(words)}: {done.code}\n{done.out}\n{done.err}\n{journal}"
    if code == 0:
        check_output(words, done.out)
    return done


def ref(family: str) -> str:
    return f"{BUCKET}/{family}"


def journal(machine: Machine) -> list[str]:
    """Return what the helper wrote about requests."""
    return [line for line in machine.sh("journalctl -o cat -u 'imgpull-helper@*'").out.splitlines() if "op=" in line]


def commits(machine: Machine) -> int:
    """Return how many layers the helper has made since the machine booted."""
    return sum("op=commit" in line and "existed=False" in line for line in journal(machine))


def count_device_mapper_calls(machine: Machine, *words: str) -> int:
    """Run imgpull and return how often meanwhile any process entered the kernel's device-mapper ioctl."""
    tracing = "/sys/kernel/tracing"
    machine.sh(
        f"mountpoint -q {tracing} || mount -t tracefs tracefs {tracing}; cd {tracing};"
        f"test -e {KERNEL_COUNTER} || echo 'p:imgpull_dm dm_ctl_ioctl' > kprobe_events;"
        f"echo > trace; echo 1 > {KERNEL_COUNTER}"
    )
    try:
        imgpull(machine, *words)
        return machine.sh(f"cat {tracing}/trace").out.count("imgpull_dm: ")
    finally:
        machine.sh(f"echo 0 > {KERNEL_COUNTER}")


def pool(machine: Machine) -> dict[str, int]:
    figures: dict[str, int] = json.loads(asked(machine, "pool", "--json").out)["pool"]
    return figures


def test_three_families_of_five_layers_fit_because_they_share(host: Machine, scale: int) -> None:
    devices = {family: imgpull(host, "pull", ref(family)).out.strip() for family in FAMILIES}
    assert len(set(devices.values())) == 3
    assert commits(host) == 8, "15 keys are 8 layers"
    figures, flat, once = pool(host), flattened_bytes(scale), stored_once_bytes(scale)
    print(
        f"three families of five layers: flattened {flat >> 20} MiB, stored once {once >> 20} MiB; the pool of "
        f"{figures['data_bytes'] >> 20} MiB holds {figures['data_used_bytes'] >> 20} MiB, metadata "
        f"{figures['metadata_used_bytes'] >> 10} of {figures['metadata_bytes'] >> 10} KiB"
    )
    assert flat > figures["data_bytes"], "flattened they would have fitted as well: no proof"
    assert figures["data_used_bytes"] < once + 11 * 4 * MIB, "what file systems of 8 layers and 3 snapshots cost"
    for family, device in devices.items():
        own = f"opt/part-5-{family}-0"
        listing = host.run("debugfs", "-R", "ls -p /opt", device, user="alice").out
        names = {line.split("/")[5] for line in listing.splitlines() if line.count("/") > 5}
        assert own.removeprefix("opt/") in names and "gone-in-6" in names, listing
        assert not names & {"gone-in-2", "gone-in-3", "gone-in-4", "gone-in-5"}, "whiteouts did not take"
        program = host.run("debugfs", "-R", "stat /usr/bin/su1", device, user="alice").out
        assert "Mode:  04755" in program and "Links: 2" in program, program
    assert json.loads(asked(host, "verify", "golang", "--json").out)[0]["ok"]


def test_a_second_pull_issues_no_device_mapper_ioctl_at_all(host: Machine) -> None:
    assert count_device_mapper_calls(host, "activate", "node", "--name", "counted") > 0, "the counter counts nothing"
    before = journal(host)
    assert count_device_mapper_calls(host, "pull", ref("golang")) == 0
    assert journal(host) == before, "the helper was asked"
    asked(host, "deactivate", "counted")


def test_a_user_outside_the_group_is_refused(host: Machine) -> None:
    before = journal(host)
    said = imgpull(host, "pull", ref("golang"), user="mallory", code=77).err
    assert "permission denied" in said and "usermod -aG imgpull" in said
    assert journal(host) == before


def test_the_journal_tells_who_did_what(host: Machine) -> None:
    lines = journal(host)
    assert all("uid=1500 " in line for line in lines if "op=commit" in line)
    for op in ("commit", "activate", "deactivate"):
        assert any(f"op={op} " in line and "outcome=ok" in line for line in lines), op
    digest = json.loads(asked(host, "show", "golang", "--json").out)["layers"][-1]["layer"]
    assert any("op=commit" in line and digest in line for line in lines)


def test_a_look_inside_read_only_is_a_mount_of_nobody_else(host: Machine) -> None:
    before = host.sh("dmsetup ls --noheadings | sort").out
    shown = imgpull(host, "activate", "python", "--name", "look", "--ro", "--", "ls", "-l", "usr/bin/su1").out
    assert shown.startswith("-rwsr-xr-x 2 root root")
    assert "dm-" not in host.sh("cat /proc/mounts").out
    assert host.sh("dmsetup ls --noheadings | sort").out == before


def test_the_file_system_of_an_activation_has_the_size_that_was_asked_for(host: Machine) -> None:
    device = imgpull(host, "activate", "python", "--name", "big", "--size", "3G").out.strip()
    assert host.run("blockdev", "--getsize64", device).out.strip() == str(3 << 30)
    shown = host.run("dumpe2fs", "-h", device, user="alice").out
    assert f"Block count:              {(3 << 30) // 4096}\n" in shown, shown
    host.run("e2fsck", "-fn", device, user="alice")
    asked(host, "deactivate", "big")


#: Runs imgpull and kills it at one commit point of its state machine: `before` or `after` the effect is written down.
DIE_AT = """
import os, signal, sys
from broker import work
from broker.cli import imgpull
from broker.machine import Hooks
point = sys.argv.pop(1)
work.HOOKS = Hooks(point=lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None)
imgpull()
"""


def die_at(machine: Machine, point: str, *words: str) -> None:
    done = machine.run(
        PYTHON, "-I", "-c", DIE_AT, point, *words, user="alice", environment=ENVIRONMENT, check=False, timeout_s=600
    )
    assert done.code == -9, f"{point}: {done.code}\n{done.out}\n{done.err}"


def test_a_commit_whose_answer_was_lost_is_found_sealed(host: Machine) -> None:
    """The broker dies between root's answer and its own note of it."""
    before = commits(host)
    die_at(host, "layer:commit:complete:before", "pull", ref("single.tar"), "--no-activate")
    assert commits(host) == before + 1
    seen = len(journal(host))
    imgpull(host, "pull", ref("single.tar"), "--no-activate")
    assert any("op=stat" in line and "state=sealed" in line for line in journal(host)[seen:]), "it was not found sealed"
    assert commits(host) == before + 1


DEVICES = "ls -d /sys/block/dm-* | wc -l"  # one more than before: root writes a layer


def test_a_crash_of_the_machine_in_the_middle_of_a_commit_is_taken_up_after_the_boot(host: Machine) -> None:
    asked(host, "deactivate", "python")
    asked(host, "rm", "python")
    asked(host, "gc")
    host.sh("sync")
    known = json.loads(asked(host, "pool", "--json").out)["layers"]
    devices = int(host.sh(DEVICES).out)
    host.begin([IMGPULL, "pull", ref("python")], user="alice", environment=ENVIRONMENT)
    host.sh(f"until [[ $({DEVICES}) -gt {devices} ]]; do sleep 0.01; done")
    host.kill()
    host.boot()
    host.wait_until_up()
    device = imgpull(host, "pull", ref("python")).out.strip()
    assert re.fullmatch(r"/dev/dm-\d+", device)
    assert json.loads(asked(host, "pool", "--json").out)["layers"] == known + 2
    assert all(row["ok"] for row in json.loads(asked(host, "verify", "python", "--json").out))
    assert host.sh("imgpull-helper reconcile").out == "", "the boot left something to do"


def test_removing_all_images_leaves_an_empty_pool(host: Machine) -> None:
    for row in json.loads(asked(host, "ls", "--activations", "--json").out):
        asked(host, "deactivate", row["name"])
    for image in (*FAMILIES, "single.tar"):
        asked(host, "rm", image)
    asked(host, "gc")
    figures = json.loads(asked(host, "pool", "--json").out)
    assert figures["layers"] == 0 and figures["pool"]["reserved_bytes"] == 0
    assert host.sh("dmsetup ls --noheadings | sort").out.split()[::2] == ["imgpull-meta", "imgpull-pool"]
