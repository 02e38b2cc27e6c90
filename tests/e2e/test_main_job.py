"""The main job through all real processes: an ordinary user, a real S3 server, the real root helper, real images."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.demo.hostile import write_escape
from tests.e2e.conftest import BUCKET, Bucket, User, kill, processes_of, wait_until
from tests.layers.families import Family
from tests.layers.synthetic import write_large_files, write_small_files
from tests.support.helper import children, loops_below
from tests.support.reference import differences, read_device, read_tree, unpack

pytestmark = pytest.mark.root
KILLS = 30
KINDS = ("unpriv.fetch", "unpriv.check", "helper", "broker")


def commits(user: User) -> int:
    """Return how many layers the helper has made, as its log tells."""
    lines = user.helper.log.read_text().splitlines()
    return sum("op=commit" in line and "outcome=ok" in line and "existed=False" in line for line in lines)


def assert_nothing_left(user: User, active: int) -> None:
    """No loop device, partial blob, payload or half-made layer is there that no activation or image accounts for."""
    folder = user.helper.config.parent
    wait_until(lambda: not user.helper.processes())
    wait_until(lambda: len(loops_below(folder)) == 1 + active)  # the pool's own, and one an activation
    assert user.helper.administer("reconcile").stdout == ""
    cache = [p for p in user.files(".cache/imgpull") if p.parent.name != "sha256"]
    assert cache == []
    pool = user.json("pool")
    assert pool["pool"]["reserved_bytes"] == 0


def test_trees_equal_what_gnu_tar_makes(
    user: User, debian: dict[str, str], demo_families: dict[str, Family], tmp_path: Path
) -> None:
    for name, ref in debian.items():
        device = user.run("pull", ref).strip()
        assert user.may_write(device)
        unpack(demo_families[name].layers, tmp_path / name)
        assert differences(read_tree(tmp_path / name), read_device(device)) == []
    shared = [layer["images"] for layer in user.json("show", "base-python")["layers"]]
    assert shared[:2] == [2, 2]
    assert all(row["ok"] for row in user.json("verify"))
    assert_nothing_left(user, active=2)


def test_second_pull_costs_no_network_no_root_and_no_write(user: User, small: dict[str, str]) -> None:
    user.run("pull", small["left"])
    log = user.helper.log.read_bytes()
    database = (user.account.home / ".local/state/imgpull/imgpull.db").read_bytes()
    user.run("pull", small["left"], AWS_SECRET_ACCESS_KEY="wrong")
    assert user.helper.log.read_bytes() == log
    assert (user.account.home / ".local/state/imgpull/imgpull.db").read_bytes() == database


def test_attack_through_a_symlink_is_refused_and_its_victim_untouched(
    user: User, bucket: Bucket, tmp_path: Path
) -> None:
    victim = Path("/var/tmp") / f"imgpull-victim-{os.getpid()}"
    victim.write_text("precious\n")
    victim.chmod(0o666)
    try:
        write_escape(tmp_path / "evil.tar", victim)
        bucket.client.upload_file(str(tmp_path / "evil.tar"), BUCKET, "images/evil.tar")
        said = user.run("pull", f"s3://{BUCKET}/images/evil.tar", code=65)
        assert "refused by rule parent_is_symlink" in said or "refused by rule path_escapes_root" in said
        assert victim.read_text() == "precious\n"
    finally:
        victim.unlink()
    assert user.json("ls") == []
    assert_nothing_left(user, active=0)


def test_second_user_shares_layers_but_not_activations(user: User, second: User, small: dict[str, str]) -> None:
    user.run("pull", small["left"], "--name", "mine")
    before = commits(user)
    second.run("pull", small["left"], "--name", "mine")
    assert commits(user) == before, "the layers were there already"
    devices = {user.json("ls", "--activations")[0]["device"], second.json("ls", "--activations")[0]["device"]}
    assert len(devices) == 2
    user.run("deactivate", "mine")
    assert second.json("ls", "--activations")[0]["live"]
    user.run("rm", "left")
    assert all(row["ok"] for row in second.json("verify")), "another user's image lost its layers"


def test_stranger_outside_the_group_is_refused(stranger: User, small: dict[str, str]) -> None:
    said = stranger.run("pull", small["left"], code=77)
    assert "permission denied" in said
    assert "usermod -aG imgpull" in said


def test_pins_of_the_first_use_hold_against_a_later_upload(
    user: User, bucket: Bucket, small: dict[str, str], tmp_path: Path
) -> None:
    layers = [tmp_path / "1.tar", tmp_path / "2.tar"]
    for number, layer in enumerate(layers):
        write_small_files(layer, files=3 + number)
    ref = bucket.put("pinned", layers)
    user.run("pull", ref, "--no-activate")
    pins = user.account.home / "pins"
    pins.write_text(user.run("pins", ref))
    pins.chmod(0o644)
    assert [line.split()[1] for line in pins.read_text().splitlines()] == [f"{ref}/1.tar", f"{ref}/2.tar"]
    user.run("pull", ref, "--no-activate", "--refresh", "--pin-file", str(pins))
    write_small_files(layers[1], files=9)
    bucket.put("pinned", layers)
    refused = user.run("pull", ref, "--no-activate", "--refresh", "--pin-file", str(pins), code=65)
    assert "expected sha256:" in refused and "/2.tar" in refused
    assert user.json("show", ref)["layers"][1]["entries"] < 9, "the image is still what was pinned"


def test_size_grows_the_file_system_of_one_device_only(user: User, small: dict[str, str]) -> None:
    user.run("pull", small["left"], "--no-activate")
    plain = user.run("activate", small["left"], "--name", "plain").strip()
    large = user.run("activate", small["left"], "--name", "large", "--size", "20G").strip()
    assert blocks_of(large) == 20 << 18
    assert blocks_of(plain) < blocks_of(large)
    checked = subprocess.run(["/usr/sbin/e2fsck", "-fn", large], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert user.run("activate", small["left"], "--name", "large", "--size", "20G").strip() == large


def blocks_of(device: str) -> int:
    """Return how many blocks of 4 KiB the ext4 on a device has."""
    told = subprocess.run(["/usr/sbin/dumpe2fs", "-h", device], capture_output=True, text=True, check=True).stdout
    return int(next(line.split()[-1] for line in told.splitlines() if line.startswith("Block count:")))


@pytest.mark.parametrize("count", [2, 10])
def test_concurrent_pulls_commit_each_layer_once(count: int, user: User, small: dict[str, str]) -> None:
    before = commits(user)
    refs = [small["left"], small["right"]]
    with ThreadPoolExecutor(count) as pool:
        words = [("pull", refs[n % 2], "--name", f"n{n}") for n in range(count)]
        devices = list(pool.map(lambda w: user.run(*w).strip(), words))
    assert len(set(devices)) == count
    assert commits(user) - before == 4, "three layers of left, one more of right"
    assert all(row["ok"] for row in user.json("verify"))
    assert_nothing_left(user, active=count)


def test_concurrent_pulls_of_two_users_commit_each_layer_once(user: User, second: User, small: dict[str, str]) -> None:
    before = commits(user)
    with ThreadPoolExecutor(4) as pool:
        jobs = [(u, "pull", small[n], "--name", n) for u in (user, second) for n in ("left", "right")]
        list(pool.map(lambda j: j[0].run(*j[1:]), jobs))
    sealed = {row["layer"] for row in user.json("show", "left")["layers"]}
    sealed |= {row["layer"] for row in user.json("show", "right")["layers"]}
    assert len(sealed) == 4
    assert commits(user) - before == 4
    assert user.json("pool")["layers"] == 4


def kinds_of_processes(user: User) -> dict[int, str]:
    """Return the processes that work for a user, with what each is."""
    found = dict.fromkeys((pid for top in user.helper.processes() for pid in (top, *children(top))), "helper")
    for pid, command in processes_of(user.account.uid).items():
        found[pid] = next((kind for kind in KINDS if kind in command), "broker")
    return found


def test_kill_any_process_at_any_moment(user: User, small: dict[str, str]) -> None:
    """kill -9 of one process, 30 times over a pull; then the same pull ends well and nothing is left over.

    Each kind of process has its turn, at some moment of its life: a kill at a moment of the clock finds, on a slow
    machine, nothing but processes that start.
    """
    chance = random.Random(int(os.environ.get("IMGPULL_SEED", "20261")))
    names: dict[str, int] = {}
    for number in range(KILLS):
        process = user.start("pull", small["left"])
        wanted = KINDS[number % len(KINDS)]
        while wanted not in kinds_of_processes(user).values() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.5))
        found = kinds_of_processes(user)
        victims = sorted(pid for pid in found if found[pid] == wanted) or sorted(found)
        if victims:
            pid = chance.choice(victims)
            if kill(pid):
                names[found[pid]] = names.get(found[pid], 0) + 1
        process.communicate(timeout=120)
        device = user.run("pull", small["left"]).strip()
        assert user.may_write(device)
        assert all(row["ok"] for row in user.json("verify"))
        assert_nothing_left(user, active=1)
        user.forget()
    print(f"\nkilled {sum(names.values())} of {KILLS} times: {names}")
    assert sum(names.values()) >= KILLS // 2 and len(names) >= 3


@pytest.mark.slow
def test_memory_of_every_process_stays_small(user: User, bucket: Bucket, tmp_path: Path) -> None:
    """Peak resident memory below 150 MiB while 1 GiB of large files and 200,000 small ones pass."""
    write_small_files(tmp_path / "1.tar")
    write_large_files(tmp_path / "2.tar")
    ref = bucket.put("huge", [tmp_path / "1.tar", tmp_path / "2.tar"])
    peaks: dict[str, int] = {}
    process = user.start("pull", ref, "--no-activate")
    while process.poll() is None:
        for pid, kind in kinds_of_processes(user).items():
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            for line in status.splitlines():
                if line.startswith("VmHWM:"):
                    peaks[kind] = max(peaks.get(kind, 0), int(line.split()[1]))
        time.sleep(0.02)
    said = process.communicate()[1]
    assert process.returncode == 0, said
    print("\npeak memory in MiB: " + json.dumps({name: peak >> 10 for name, peak in sorted(peaks.items())}))
    assert set(peaks) == set(KINDS)
    assert max(peaks.values()) < 150 << 10
    for key in ("1.tar", "2.tar"):
        bucket.client.delete_object(Bucket=BUCKET, Key=f"images/huge/{key}")
