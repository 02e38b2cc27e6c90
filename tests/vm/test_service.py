"""The helper as an administrator installs it, under real systemd, used by ordinary users; reboots and crashes.

The machine is this file's own. The tests share its pool and run in order; each leaves it in service.
"""

import json
import time
from typing import Any

import pytest

from tests.vm.machine import Machine
from tests.vm.warm import call

pytestmark = pytest.mark.vm

MIB = 1 << 20


def client(machine: Machine, *words: str, user: str = "alice", expect: int | None = 0) -> dict[str, Any]:
    result = call(machine, "tests.vm.guest.client:main", *words, user=user)
    assert expect is None or result.code == expect, f"{words}: {result.code}: {result.out}{result.err}"
    return dict(json.loads(result.out))


def commit(machine: Machine, tag: str, parent: str | None = None, **more: Any) -> str:
    spec = {"tag": tag, "parent": parent, "files": 3, "bytes": 10_000, **more}
    return str(client(machine, "commit", json.dumps(spec))["layer"])


def ask(machine: Machine, op: str, user: str = "alice", expect: int = 0, **fields: Any) -> dict[str, Any]:
    return client(machine, "ask", op, json.dumps(fields), user=user, expect=expect)


def layers(machine: Machine) -> set[str]:
    return {item["layer"] for item in ask(machine, "list")["items"] if item["kind"] == "layer"}


def pool_agrees(machine: Machine) -> None:
    """Hold the ledger against the pool by the helper's own audit and by thin_ls on a copy of the metadata."""
    machine.sh("systemctl stop imgpull-helper.socket; imgpull-helper reconcile")
    again = machine.sh("imgpull-helper reconcile").out
    assert again == "", f"a second reconcile still had something to do: {again}"
    rows = machine.run("python3", "-ISc", "import sqlite3; print(sorted(row[0] for row in sqlite3.connect("
                       "'/var/lib/imgpull-helper/ledger.db').execute('SELECT dev FROM device')))").out  # fmt: skip
    machine.sh("dmsetup ls --noheadings | awk '/imgpull-[0-9]/ {print $1}' | xargs -r -n1 dmsetup remove;"
               "systemctl stop imgpull-pool")  # fmt: skip
    held = machine.sh(
        "cd /var/lib/imgpull-helper/thin; thin_check -q metadata; thin_ls --no-headers -o DEV metadata"
    ).out
    machine.sh("systemctl start imgpull-pool imgpull-helper.socket")
    assert sorted(int(word) for word in held.split())[1:] == json.loads(rows)


def test_a_member_of_the_group_commits_activates_and_deactivates(host: Machine) -> None:
    first = commit(host, "a")
    second = commit(host, "b", first)
    assert layers(host) >= {first, second}
    answer = ask(host, "activate", layer=second, name="one", mode="rw", size=0)
    device = answer["device"]
    host.run("dd", f"of={device}", "if=/dev/zero", "bs=4096", "count=1", "seek=100000", "conv=fsync", user="alice")
    refused = host.run("dd", f"if={device}", "of=/dev/null", "count=1", user="mallory", check=False)
    assert refused.code != 0 and "Permission denied" in refused.err
    listing = host.run("debugfs", "-R", "ls -p /", device, user="alice").out
    assert "/layer-a/" in listing and "/layer-b/" in listing
    ask(host, "deactivate", name="one")
    assert host.run("test", "-e", device, check=False).code != 0
    mounted = ask(host, "activate", layer=second, name="two", mode="ro", size=0)["mounted"]
    assert mounted == [["layer-a", "layer-b"]]
    assert "dm-" not in host.sh("cat /proc/mounts").out, "the mount is in no mount table"
    ask(host, "deactivate", name="two")


def test_attack_a_user_outside_the_group_gets_no_word_through_the_door(host: Machine) -> None:
    before = layers(host)
    answer = client(host, "ask", "list", "{}", user="mallory", expect=2)
    assert answer["type"] == "closed" and "Permission denied" in answer["message"]
    assert layers(host) == before


def test_attack_another_member_reaches_no_activation_of_alice(host: Machine) -> None:
    layer = commit(host, "a")
    device = ask(host, "activate", layer=layer, name="hers", mode="rw", size=0)["device"]
    host.sh("usermod -aG imgpull mallory")
    try:
        assert ask(host, "deactivate", user="mallory", expect=1, name="hers")["code"] == "not_found"
        assert ask(host, "list", user="mallory")["items"] == [] or all(
            item["kind"] == "layer" for item in ask(host, "list", user="mallory")["items"]
        )
        assert host.run("test", "-b", device).code == 0
        assert host.run("head", "-c1", device, user="mallory", check=False).code != 0
    finally:
        host.sh("gpasswd --delete mallory imgpull")
    ask(host, "deactivate", name="hers")


def test_the_helper_is_gone_when_nobody_asks_and_the_journal_tells_what_it_did(host: Machine) -> None:
    layer = commit(host, "told")
    deadline_s = time.monotonic() + 120
    while host.sh("systemctl list-units --no-legend 'imgpull-helper@*'").out.strip():
        assert time.monotonic() < deadline_s, "an instance stays"
    journal = host.sh("journalctl -o cat -u 'imgpull-helper@*'").out
    line = next(line for line in journal.splitlines() if "op=commit" in line and layer in line)
    assert "uid=1500" in line and "outcome=ok" in line
    assert host.sh("systemctl is-active imgpull-helper.socket").out.strip() == "active"


def test_a_commit_under_systemd_is_killed_and_leaves_nothing(host: Machine) -> None:
    before = layers(host)
    spec = json.dumps({"tag": "killed", "parent": None, "files": 40, "bytes": MIB})
    number = host.begin(["python3", "/src/tests/vm/guest/client.py", "commit", spec], user="alice",
                        environment={"PYTHONPATH": "/src"})  # fmt: skip
    host.sh(f"{WHEN_A_COMMIT_WRITES}; systemctl kill --signal=KILL 'imgpull-helper@*'")
    assert host.finish(number, check=False).code != 0
    assert layers(host) == before
    pool_agrees(host)


#: Until root writes a layer: dm-0 and dm-1 are the pool's own.
WHEN_A_COMMIT_WRITES = "until compgen -G '/sys/block/dm-[2-9]' > /dev/null; do sleep 0.01; done"


def reboot(machine: Machine) -> None:
    """Reboot; the units bring everything into service by themselves, and what a reconcile finds to do it has done."""
    machine.reboot()
    machine.wait_until_up()
    assert machine.sh("systemctl is-active imgpull-pool imgpull-helper.socket").out.split() == ["active", "active"]
    assert "ordering cycle" not in machine.sh("journalctl -b -o cat _PID=1").out.lower()


def test_after_a_reboot_in_the_middle_of_a_commit_only_that_layer_is_missing(host: Machine) -> None:
    kept = commit(host, "kept")
    known = layers(host)
    words = ("commit", json.dumps({"tag": "cut off", "parent": kept, "files": 40, "bytes": MIB}))
    host.begin(["python3", "/src/tests/vm/guest/client.py", *words], user="alice", environment={"PYTHONPATH": "/src"})
    host.sh(WHEN_A_COMMIT_WRITES)
    reboot(host)
    assert layers(host) == known
    pool_agrees(host)
    ask(host, "verify", layer=kept)
    assert client(host, *words)["layer"] not in known
    assert layers(host) > known


def test_after_a_reboot_the_pool_is_back_and_everything_in_it(host: Machine) -> None:
    layer = commit(host, "kept")
    ask(host, "activate", layer=layer, name="kept", mode="rw", size=0)
    known = layers(host)
    reboot(host)
    assert layers(host) == known
    ask(host, "verify", layer=layer)
    device = ask(host, "activate", layer=layer, name="kept", mode="rw", size=0)["device"]
    assert "layer-kept" in host.run("debugfs", "-R", "ls -p /", device, user="alice").out
    pool_agrees(host)
    ask(host, "deactivate", name="kept")


def test_a_pool_that_is_missing_is_reported_never_remade_and_attached_when_it_comes(host: Machine) -> None:
    known = layers(host)
    folder = "/var/lib/imgpull-helper/thin"
    host.sh(f"systemctl stop imgpull-helper.socket imgpull-pool; mv {folder}/data /root/data; "
            "systemctl start imgpull-helper.socket || true")  # fmt: skip
    assert host.sh("systemctl is-active imgpull-pool || true").out.strip() != "active"
    spec = json.dumps({"tag": "new", "parent": None, "files": 1, "bytes": 10})
    answer = client(host, "commit", spec, expect=1)
    assert answer["code"] == "pool" and "pool attach" in answer["message"]
    assert host.sh(f"ls {folder}/data 2>/dev/null || true").out == ""
    host.sh(f"mv /root/data {folder}/data; until systemctl is-active --quiet imgpull-pool; do sleep 0.2; done")
    assert layers(host) == known


def test_nothing_is_left_when_all_is_removed(host: Machine) -> None:
    """Children first: whoever is refused as in use is asked again."""
    left = layers(host)
    while left:
        for layer in left:
            answer = client(host, "ask", "remove", json.dumps({"layer": layer}), expect=None)
            assert answer["type"] == "ok" or answer["code"] == "in_use", answer
        assert len(layers(host)) < len(left)
        left = layers(host)
    pool_agrees(host)
    assert host.sh("dmsetup ls --noheadings | sort").out.split()[::2] == ["imgpull-meta", "imgpull-pool"]
