"""A manifest and a payload become exactly the layer they describe, or nothing."""

import hashlib
import os
import select
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.privhelper.client import Layer, connected_pair, line, memfd
from tests.privhelper.conftest import MEMBER, OTHER, Installation

pytestmark = pytest.mark.root


def read_tree(device: str, folder: Path) -> list[str]:
    """List what is on a device by tools that share nothing with the helper, on a mount of the test's own."""
    point = folder / "mount"
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "ro,noload", device, str(point)], check=True)
    try:
        form = "%P|%y|%#m|%U|%G|%s|%T@|%l|%n\\n"
        found = subprocess.run(["find", ".", "-printf", form], cwd=point, capture_output=True, text=True, check=True)
        sums = subprocess.run(
            "find . -type f -print0 | sort -z | xargs -0r sha256sum; getfattr -R -h -m - -d -e hex . ",
            shell=True, cwd=point, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return sorted(found.stdout.splitlines()) + sums.stdout.splitlines()
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_layer_is_what_the_manifest_says(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    payload = layer.write_payload(tmp_path)
    with installation.connect() as helper:
        reply = helper.commit(layer.manifest(), payload)
        assert reply == reply | {"type": "ok", "layer": layer.id(), "existed": False}
        device = helper.ask("activate", layer=layer.id(), name="a", mode="rw", size=0)["device"]
        tree = read_tree(device, tmp_path)
        assert helper.ask("verify", layer=layer.id())["type"] == "ok"
    second = "1000000000.000000000"
    expected = [
        f"|d|0755|0|0|4096|{second}0||4",
        f"etc|d|0755|0|0|4096|{second}0||2",
        "etc/passwd|f|0644|0|0|11|1000000000.0000000010||1",
        f"usr|d|02755|3|50|4096|{second}0||2",
        "usr/ping|f|0755|0|0|200000|1000000000.0000000010||1",
        "usr/su|f|04755|0|0|70000|1000000000.0000000010||2",
        "usr/theirs|f|0640|1000|1000|0|1000000000.0000000010||1",
        "tmp-link|l|0777|0|0|4|1000000000.0000000020|/tmp|1",
        "zz-su|f|04755|0|0|70000|1000000000.0000000010||2",
    ]
    assert tree[: len(expected)] == sorted(expected)
    assert f"{hashlib.sha256(b's' * 70_000).hexdigest()}  ./zz-su" in tree
    assert "security.capability=0x0100000200200000000000000000000000000000" in tree
    assert "user.note=0x68656c6c6f" in tree


def test_upper_layer_changes_only_what_it_says(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    upper = Layer(layer.id())
    etc = upper.add(op="enter", into=0, name="etc")
    upper.add(op="remove", into=etc, name="passwd", dir=False)
    upper.file(etc, "shadow", b"secret", 0o600)
    usr = upper.directory(0, "usr", 0o700, op="meta", mtime=5)
    upper.add(op="remove", into=usr, name="su", dir=False)
    again = upper.add(op="enter", into=0, name="etc")
    upper.add(op="link", into=again, name="x-su", to=["zz-su"])
    with installation.connect() as helper:
        assert helper.commit(layer.manifest(), layer.write_payload(tmp_path))["type"] == "ok"
        assert helper.commit(upper.manifest(), upper.write_payload(tmp_path))["type"] == "ok"
        assert helper.ask("verify", layer=upper.id())["type"] == "ok"
        device = helper.ask("activate", layer=upper.id(), name="a", mode="rw", size=0)["device"]
        tree = read_tree(device, tmp_path)
        assert helper.ask("remove", layer=layer.id())["code"] == "in_use"
        assert helper.ask("verify", layer=layer.id())["type"] == "ok"
    entries = {text.split("|")[0]: text for text in tree if text.count("|") == 8}
    assert set(entries) == {"", "etc", "etc/shadow", "etc/x-su", "usr", "usr/ping", "usr/theirs", "tmp-link", "zz-su"}
    assert entries["etc"].split("|")[6] == "1000000000.0000000000"  # entered, changed, its own time kept
    assert entries["usr"] == "usr|d|0700|0|0|4096|0.0000000050||2"
    assert entries["etc/x-su"].endswith("||2")
    assert not any("user.note" in text for text in tree)  # meta says all there is


def test_owner_of_a_file_is_never_that_of_its_directory(installation: Installation, tmp_path: Path) -> None:
    base = Layer()
    for name in ("entered", "opened", "closed"):  # a setgid directory gives its group to what is created in it
        base.directory(0, name, 0o2755 if name != "opened" else 0o755, uid=3, gid=50)
    upper = Layer(base.id())
    entered = upper.add(op="enter", into=0, name="entered")
    upper.file(entered, "file", b"a")
    for name, mode in (("opened", 0o2755), ("closed", 0o755)):
        directory = upper.directory(0, name, mode, op="meta", uid=3, gid=50)
        upper.file(directory, "file", b"a")
        below = upper.directory(directory, "below")
        upper.file(below, "file", b"a")
    with installation.connect() as helper:
        for one in (base, upper):
            assert helper.commit(one.manifest(), one.write_payload(tmp_path))["type"] == "ok"
        device = helper.ask("activate", layer=upper.id(), name="a", mode="rw", size=0)["device"]
        tree = [text.split("|") for text in read_tree(device, tmp_path) if text.count("|") == 8]
    owners = {words[0]: (words[2], words[3], words[4]) for words in tree}
    assert {name: owner for name, owner in owners.items() if name.endswith("file")} == dict.fromkeys(
        ("entered/file", "opened/file", "opened/below/file", "closed/file", "closed/below/file"), ("0644", "0", "0")
    )
    assert owners["opened/below"] == owners["closed/below"] == ("0755", "0", "0")


def test_second_commit_writes_nothing(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    payload = layer.write_payload(tmp_path)
    with installation.connect(MEMBER) as first:
        assert first.commit(layer.manifest(), payload)["existed"] is False
    before = [tuple(row) for row in installation.rows()]
    with installation.connect(OTHER) as second:
        assert second.commit(layer.manifest(), payload)["existed"] is True
    assert [tuple(row) for row in installation.rows()] == before


def test_ten_clients_commit_one_layer_once(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    payload = layer.write_payload(tmp_path)
    helpers = [installation.connect(MEMBER) for _ in range(10)]
    replies = []
    threads = [
        threading.Thread(target=lambda each=each: replies.append(each.commit(layer.manifest(), payload)))
        for each in helpers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for helper in helpers:
        helper.close()
    assert sorted(reply["existed"] for reply in replies) == [False] + [True] * 9
    assert len(installation.rows()) == 1


@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_payload_changed_after_the_check_never_becomes_a_layer(
    installation: Installation, layer: Layer, tmp_path: Path, how: str
) -> None:
    payload = layer.write_payload(tmp_path)
    data, file = os.open(payload, os.O_RDONLY), memfd(layer.manifest())
    size = len(layer.payload)
    if how == "flipped":
        with payload.open("r+b") as changed:
            changed.seek(100_000)
            changed.write(b"EVIL")
    with installation.connect() as helper:
        helper.send({"op": "commit", "manifest_bytes": len(layer.manifest()), "payload_bytes": size}, [file, data])
        if how == "cut":
            # The helper looks at the size before it reads; cutting now races it, and either answer refuses.
            os.truncate(payload, 1000)
        reply, _ = helper.receive()
        assert reply["type"] == "error"
        assert reply["rule"] in ("payload_digest", "payload_range", "size_mismatch")
    assert installation.rows() == []
    os.close(data)
    os.close(file)


def test_payload_flipping_all_the_time_never_becomes_a_layer(installation: Installation, tmp_path: Path) -> None:
    big = Layer()
    big.directory(0, "", op="meta")
    big.file(0, "big", os.urandom(1 << 20) * 32)
    payload = big.write_payload(tmp_path)
    stop = threading.Event()

    def flip() -> None:
        with payload.open("r+b", buffering=0) as file:
            while not stop.is_set():
                for at in range(0, len(big.payload), 1 << 20):
                    os.pwrite(file.fileno(), b"X", at)
                for at in range(0, len(big.payload), 1 << 20):
                    os.pwrite(file.fileno(), big.payload[at : at + 1], at)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        with installation.connect() as helper:
            for _ in range(5):
                reply = helper.commit(big.manifest(), payload)
                # Whatever it read: a layer exists only if root wrote exactly what the manifest names.
                if reply["type"] == "ok":
                    assert helper.ask("verify", layer=big.id())["type"] == "ok"
                else:
                    assert reply["rule"] == "payload_digest"
    finally:
        stop.set()
        thread.join()


def test_layer_cannot_be_planted_under_another_name(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    """The id is computed over what root verified; there is no field in which a client could claim another."""
    evil = Layer()
    evil.directory(0, "", op="meta")
    evil.file(0, "backdoor", b"evil")
    with installation.connect(OTHER) as attacker:
        assert attacker.commit(evil.manifest(), evil.write_payload(tmp_path))["layer"] == evil.id()
        assert attacker.ask("stat", layer=layer.id())["state"] == "absent"
    with installation.connect(MEMBER) as victim:
        assert victim.commit(layer.manifest(), layer.write_payload(tmp_path))["existed"] is False


def test_parent_that_is_not_sealed_is_no_parent(installation: Installation, tmp_path: Path) -> None:
    orphan = Layer("sha256:" + "0" * 64)
    orphan.directory(0, "", op="meta")
    with installation.connect() as helper:
        assert helper.commit(orphan.manifest(), orphan.write_payload(tmp_path))["code"] == "not_found"
    assert installation.rows() == []


HOSTILE: dict[str, tuple[str, Callable[[str], list[bytes] | None]]] = {
    "symlink_then_write_through_it": ("tree_conflict", lambda victim: [
        line(op="symlink", into=0, name="a", target=victim, uid=0, gid=0, mtime=0, xattrs={}),
        line(op="enter", into=0, name="a"),
        line(op="remove", into=2, name="canary", dir=False),
    ]),
    "symlink_replaced_by_directory_without_remove": ("tree_conflict", lambda victim: [
        line(op="symlink", into=0, name="a", target=victim, uid=0, gid=0, mtime=0, xattrs={}),
        line(op="dir", into=0, name="a", mode=0o755, uid=0, gid=0, mtime=0, xattrs={}),
    ]),
    "hard_link_through_a_symlink": ("tree_conflict", lambda victim: [
        line(op="symlink", into=0, name="a", target=victim, uid=0, gid=0, mtime=0, xattrs={}),
        line(op="link", into=0, name="b", to=["a", "canary"]),
    ]),
    "hard_link_to_a_directory": ("tree_conflict", lambda victim: [
        line(op="dir", into=0, name="a", mode=0o755, uid=0, gid=0, mtime=0, xattrs={}),
        line(op="link", into=0, name="b", to=["a"]),
    ]),
    "remove_what_is_not_there": ("tree_conflict", lambda victim: [line(op="remove", into=0, name="a", dir=False)]),
    "remove_a_directory_that_is_not_empty": ("tree_conflict", lambda victim: [
        line(op="dir", into=0, name="a", mode=0o755, uid=0, gid=0, mtime=0, xattrs={}),
        line(op="dir", into=1, name="b", mode=0o755, uid=0, gid=0, mtime=0, xattrs={}),
        line(op="remove", into=0, name="a", dir=True),
    ]),
    "device_node": ("device_node", lambda victim: [
        line(op="block", into=0, name="sda", mode=0o666, uid=0, gid=0, mtime=0, major=8, minor=0),
    ]),
    "fifo": ("fifo", lambda victim: [line(op="fifo", into=0, name="p", mode=0o666, uid=0, gid=0, mtime=0)]),
    "entries_more_than_announced": ("manifest_totals", lambda victim: None),
}  # fmt: skip


def test_hard_link_to_a_symlink_is_never_followed(installation: Installation, tmp_path: Path) -> None:
    """The name is a second one of the symbolic link itself; what it points to gains no name."""
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    before = canary.stat()
    layer = Layer()
    layer.lines = [
        line(op="symlink", into=0, name="a", target=str(canary), uid=0, gid=0, mtime=0, xattrs={}),
        line(op="link", into=0, name="b", to=["a"]),
    ]
    with installation.connect(MEMBER) as helper:
        reply = helper.commit(layer.manifest(), layer.write_payload(tmp_path))
        assert reply["type"] == "ok", reply
        assert helper.ask(op="verify", layer=reply["layer"])["type"] == "ok"
    assert (canary.stat(), canary.read_text()) == (before, "untouched")


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_manifest(installation: Installation, tmp_path: Path, attack: str) -> None:
    """The victim is a folder of the host: it is the same afterwards, and no layer is there."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "canary").write_text("untouched")
    before = (victim.stat(), (victim / "canary").stat())
    rule, make = HOSTILE[attack]
    hostile = Layer()
    hostile.lines = make(str(victim)) or []
    manifest = hostile.manifest()
    if attack == "entries_more_than_announced":
        manifest += line(op="dir", into=0, name="a", mode=0o755, uid=0, gid=0, mtime=0, xattrs={})
    with installation.connect(MEMBER) as helper:
        reply = helper.commit(manifest, hostile.write_payload(tmp_path))
        assert (reply["code"], reply["rule"]) == ("rejected", rule)
        assert helper.ask("list")["items"] == []
    assert (victim.stat(), (victim / "canary").stat()) == before
    assert (victim / "canary").read_text() == "untouched"
    assert installation.rows() == []


def test_no_room_is_told_before_anything_is_written(installation: Installation, tmp_path: Path) -> None:
    big = Layer()
    big.directory(0, "", op="meta")
    big.content = 10 << 30
    before = os.statvfs(installation.state / "pool").f_bfree
    with installation.connect(MEMBER) as helper:
        reply = helper.commit(big.manifest(), big.write_payload(tmp_path))
    assert reply["code"] == "no_room"
    assert reply["figures"]["needed_bytes"] > 10 << 30 > reply["figures"]["free_bytes"] > 1 << 30
    assert os.statvfs(installation.state / "pool").f_bfree == before
    assert installation.rows() == []


def test_room_that_a_running_commit_reserved_is_not_given_twice(installation: Installation, tmp_path: Path) -> None:
    """Two commits that fit alone but not together: the second is refused while the first still writes."""
    first, second = Layer(), Layer()
    for layer, name in ((first, "one"), (second, "two")):
        layer.directory(0, "", op="meta")
        layer.file(0, name, os.urandom(1 << 20) * 256)
        layer.content += 2 << 30  # announced, so reserved; the totals are found wrong only at the end
    with installation.connect() as one, installation.connect() as two:
        file = memfd(first.manifest())
        data = os.open(first.write_payload(tmp_path), os.O_RDONLY)
        size = len(first.payload)
        one.send({"op": "commit", "manifest_bytes": len(first.manifest()), "payload_bytes": size}, [file, data])
        assert one.receive()[0]["type"] == "progress"  # its child writes
        with one.stopped_child():
            reply = two.commit(second.manifest(), second.write_payload(tmp_path))
        assert reply["code"] == "no_room"
        assert reply["figures"]["reserved_bytes"] > 2 << 30
        while (last := one.receive()[0])["type"] == "progress":
            pass
        assert last["rule"] == "manifest_totals"
        os.close(file)
        os.close(data)


def test_room_for_manifests_is_not_given_twice(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    """The manifest of a commit that runs is not on the disk yet."""
    database = sqlite3.connect(installation.state / "ledger.db")
    pending = "INSERT INTO device(kind, state, layer, uid, charge, created) VALUES('layer', 'created', 'x', 1, ?, 0)"
    with installation.connect() as helper:  # connected first: the start undoes what nobody is at
        with database:
            database.execute(pending, [1 << 50])
        reply = helper.commit(layer.manifest(), layer.write_payload(tmp_path))
        with database:
            database.execute("DELETE FROM device")
        assert (reply["code"], reply["figures"]["needed_bytes"]) == ("no_room", (1 << 50) + len(layer.manifest()))
        assert helper.commit(layer.manifest(), layer.write_payload(tmp_path))["existed"] is False
    database.close()


def test_pool_that_fills_up_meanwhile_is_told_as_such(installation: Installation, tmp_path: Path) -> None:
    """To the writer a full pool looks like a broken disk; the user shall make room, not call for a new one."""
    big = Layer()
    big.directory(0, "", op="meta")
    big.file(0, "big", os.urandom(1 << 20) * 256)
    file, data = memfd(big.manifest()), os.open(big.write_payload(tmp_path), os.O_RDONLY)
    filler = installation.state / "pool/filler"
    with installation.connect() as helper:
        sizes = {"manifest_bytes": len(big.manifest()), "payload_bytes": len(big.payload)}
        helper.send({"op": "commit", **sizes}, [file, data])
        assert helper.receive()[0]["type"] == "progress"
        with helper.stopped_child(), filler.open("wb") as full:
            for step in (1 << 27, 1 << 20, 1 << 12):
                with suppress(OSError):
                    while True:
                        os.posix_fallocate(full.fileno(), full.seek(0, os.SEEK_END), step)
            assert os.statvfs(installation.state / "pool").f_bavail < 100  # the last few blocks are nobody's
        while (reply := helper.receive()[0])["type"] == "progress":
            pass
        filler.unlink()
        assert reply["code"] == "no_room", reply
        assert "filled up" in reply["message"]
        assert helper.ask("stat", layer=big.id())["state"] == "absent"
    assert installation.rows() == []
    os.close(file)
    os.close(data)


def test_client_that_hangs_up_leaves_nothing(installation: Installation, tmp_path: Path) -> None:
    big = Layer()
    big.directory(0, "", op="meta")
    big.file(0, "big", os.urandom(1 << 20) * 256)
    payload = big.write_payload(tmp_path)
    file, data = memfd(big.manifest()), os.open(payload, os.O_RDONLY)
    helper = installation.connect()
    sizes = {"manifest_bytes": len(big.manifest()), "payload_bytes": len(big.payload)}
    helper.send({"op": "commit", **sizes}, [file, data])
    assert helper.receive()[0]["type"] == "progress"
    assert helper.close() == 0
    assert installation.rows() == []
    os.close(file)
    os.close(data)


def test_killed_helper_leaves_nothing_after_the_next_start(installation: Installation, tmp_path: Path) -> None:
    big = Layer()
    big.directory(0, "", op="meta")
    big.file(0, "big", os.urandom(1 << 20) * 256)
    payload = big.write_payload(tmp_path)
    file, data = memfd(big.manifest()), os.open(payload, os.O_RDONLY)
    helper = installation.connect()
    sizes = {"manifest_bytes": len(big.manifest()), "payload_bytes": len(big.payload)}
    helper.send({"op": "commit", **sizes}, [file, data])
    assert helper.receive()[0]["type"] == "progress"
    with helper.stopped_child() as child:
        handle = os.pidfd_open(child)
        helper.kill()
        assert select.select([handle], [], [], 10)[0], "populate outlived the helper"
        os.close(handle)
    assert [row["state"] for row in installation.rows()] == ["created"]
    with installation.connect() as again:
        installation.assert_agrees()
        assert again.commit(big.manifest(), payload)["existed"] is False
    os.close(file)
    os.close(data)


def test_kernel_without_landlock_gets_no_layer(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    prefix = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=landlock_create_ruleset:error=EOPNOTSUPP")
    with installation.connect(prefix=prefix) as helper:
        reply = helper.commit(layer.manifest(), layer.write_payload(tmp_path))
        assert (reply["code"], "landlock_create_ruleset" in reply["message"]) == ("fault", True)
        assert helper.ask("stat", layer=layer.id())["state"] == "absent"


def test_what_a_crash_left_waits_for_the_pool(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    """An absent pool looks like one in which the device is deleted already; forgetting its row would leak it."""
    payload = layer.write_payload(tmp_path)
    # killed by the first write of the ledger's fact: the copy is made, nothing is mounted
    prefix = ("strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=fsopen:signal=KILL")
    with installation.connect(prefix=prefix) as helper, pytest.raises((EOFError, ConnectionError)):
        helper.commit(layer.manifest(), payload)
    (row,) = installation.rows()
    subprocess.run(["losetup", "-d", installation.loops()[row["dev"]]], check=True)
    installation.run("pool", "detach")
    with installation.connect() as helper:
        assert helper.commit(layer.manifest(), payload)["code"] == "pool"
        assert len(installation.rows()) == 1
    installation.run("pool", "attach")
    with installation.connect() as helper:
        installation.assert_agrees()
        assert helper.commit(layer.manifest(), payload)["existed"] is False


def test_peer_is_who_connected(installation: Installation) -> None:
    """SO_PEERCRED names the process that made the connection, whoever holds it later."""
    ours, theirs = connected_pair(MEMBER)
    ours.close()
    theirs.close()
    with installation.connect(MEMBER) as helper:
        helper.ask("stat", layer="sha256:" + "0" * 64)
        assert f"uid={MEMBER} " in helper.log()
