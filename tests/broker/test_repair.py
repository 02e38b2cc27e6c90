"""A state file that is flipped, cut, lost, put back or foreign: told by name, and rebuilt without losing an image.

Invariant tested: whatever was done to the file, no command says anything that is not so: it answers as before the
damage, or refuses with exit code 74. After `doctor --repair` it answers as before.
"""

import json
import os
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from broker import imagefile, repair
from broker.machine.ownership import Ownership
from tests.broker.test_crash import die_at, in_child, points_of
from tests.support.world import World

ONE, TWO = "s3://bucket/images/one", "s3://bucket/images/two"
FLIPS = int(os.environ.get("IMGPULL_DAMAGE_CASES", "25"))
DAMAGED = 74


@pytest.fixture
def pulled(world: World) -> World:
    """Two images with a layer in common, one of them given out."""
    world.put("one", b"a", b"b")
    world.put("two", b"a", b"c", suffix=".tar.gz")
    assert world.run("pull", ONE)[0] == 0
    assert world.run("pull", TWO, "--no-activate")[0] == 0
    return world


def answers(world: World) -> dict[str, Any]:
    """Say what a user sees, without what a rebuild may change."""
    listed = json.loads(world.run("ls", "--json")[1])
    shown = [json.loads(world.run("show", image["image"], "--json")[1]) for image in listed]
    for image in shown:
        for layer in image["layers"]:
            layer.pop("fetched_ms", None)
            layer.pop("fetched", None)
    given = json.loads(world.run("ls", "--activations", "--json")[1])
    return {"images": listed, "layers": [image["layers"] for image in shown], "devices": [g["name"] for g in given]}


def mend(world: World) -> list[str]:
    """Repair; return what was done. The other findings of `doctor` depend on this machine."""
    found = json.loads(world.run("doctor", "--repair", "--json")[1])
    return [finding["text"] for finding in found if finding["subject"] == "repair"]


def kept(world: World) -> list[Path]:
    return sorted(world.paths.state.glob("imgpull.db.damaged-*"))


def refused(world: World, *words: str) -> str:
    code, out, err = world.run(*words)
    assert (code, out) == (DAMAGED, ""), (words, code, out, err)
    assert "doctor --repair" in err
    return err


def test_lost_file_is_told_and_rebuilt_with_every_image(pulled: World) -> None:
    before = answers(pulled)
    pulled.paths.database.unlink()
    for words in (("ls",), ("pull", ONE), ("show", "one"), ("rm", "two"), ("gc",)):
        assert "is gone, and images were pulled here" in refused(pulled, *words)
    assert any("2 images, 3 layers, 1 devices" in text for text in mend(pulled))
    assert answers(pulled) == before
    requests = len(pulled.helper.requests)
    assert pulled.run("pull", ONE)[:2] == (0, "/dev/null\n")
    assert len(pulled.helper.requests) == requests, "an image that is ready was worked at"
    assert mend(pulled) == ["the state database is sound, nothing was done"]


def test_rebuilt_state_works_on(pulled: World) -> None:
    pulled.paths.database.unlink()
    mend(pulled)
    assert pulled.run("deactivate", "one")[0] == 0
    assert pulled.run("activate", "two", "--name", "x")[0] == 0
    assert pulled.run("pull", ONE, "--no-activate", "--refresh")[0] == 0
    assert pulled.run("rm", "one")[0] == 0
    assert pulled.run("deactivate", "x")[0] == 0
    assert pulled.run("rm", "two")[0] == 0
    assert pulled.helper.layers == {} and pulled.helper.activations == {}
    assert list((pulled.paths.state / "manifests").iterdir()) == []


def test_older_copy_that_is_put_back_is_told(pulled: World) -> None:
    copy = pulled.folder / "copy"
    shutil.copy(pulled.paths.database, copy)
    pulled.put("three", b"z")
    assert pulled.run("pull", "s3://bucket/images/three", "--no-activate")[0] == 0
    before = answers(pulled)
    shutil.copy(copy, pulled.paths.database)
    assert "older copy" in refused(pulled, "ls")
    mend(pulled)
    assert answers(pulled) == before
    assert len(kept(pulled)) == 1


def test_older_copy_from_before_a_removal_is_told(pulled: World) -> None:
    copy = pulled.folder / "copy"
    shutil.copy(pulled.paths.database, copy)
    assert pulled.run("rm", "two")[0] == 0
    before = answers(pulled)
    shutil.copy(copy, pulled.paths.database)
    refused(pulled, "activate", "two")
    mend(pulled)
    assert answers(pulled) == before


@pytest.mark.parametrize("version", [0, 99])
def test_foreign_file_is_refused_and_never_touched(pulled: World, version: int) -> None:
    pulled.paths.database.unlink()
    with closing(sqlite3.connect(pulled.paths.database)) as db:
        db.execute("CREATE TABLE theirs (x)")
        db.execute(f"PRAGMA user_version = {version}")
    content = pulled.paths.database.read_bytes()
    for words in (("pull", ONE), ("doctor", "--repair"), ("rm", "one")):
        assert pulled.run(*words)[0] == DAMAGED, words
    assert pulled.paths.database.read_bytes() == content


@pytest.mark.parametrize("kind", ["flip", "cut", "zero"])
def test_damage_is_told_or_harmless(pulled: World, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = answers(pulled)
    whole = pulled.paths.database.read_bytes()
    rng = random.Random(kind)
    told = 0
    for _ in range(FLIPS):
        pulled.paths.database.write_bytes(damaged(whole, kind, rng))
        told += check_told_or_right(pulled, before)
        pulled.paths.database.write_bytes(damaged(whole, kind, rng))
        if repair.complaint(pulled.paths) is not None:
            mend(pulled)
            assert answers(pulled) == before
        for path in (*kept(pulled), Path(f"{pulled.paths.database}-journal")):
            path.unlink(missing_ok=True)
        pulled.paths.database.write_bytes(whole)
    with capsys.disabled():
        print(f"\n{kind}: {FLIPS} damaged state files, {told} of them told by an ordinary command, none believed")


def damaged(whole: bytes, kind: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(whole))
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
    if kind == "zero":
        at -= at % 512
        return whole[:at] + bytes(512) + whole[at + 512 :]
    return whole[:at]


def check_told_or_right(world: World, before: dict[str, Any]) -> bool:
    """Look and pull. Returns: whether the damage was told."""
    code, out, err = world.run("ls", "--json")
    assert code in (0, DAMAGED), err
    if code == 0:
        assert json.loads(out) == before["images"]
    told = code == DAMAGED
    code, out, err = world.run("pull", ONE)
    assert code in (0, DAMAGED), err
    assert out == ("/dev/null\n" if code == 0 else "")
    return told or code == DAMAGED


def test_image_that_root_has_lost_is_left_out_and_named(pulled: World) -> None:
    top = json.loads(pulled.run("show", "two", "--json")[1])["layers"][-1]["layer"]
    del pulled.helper.layers[top]
    pulled.paths.database.unlink()
    told = mend(pulled)
    assert any(f"left out: {TWO}: root does not hold its layer {top}" in text for text in told)
    assert [image["image"] for image in json.loads(pulled.run("ls", "--json")[1])] == [ONE]
    assert pulled.run("pull", TWO, "--no-activate")[0] == 0


def test_forged_record_is_left_out_and_named(pulled: World) -> None:
    path = imagefile.path_of(pulled.paths.image_dir, TWO, "")
    path.write_bytes(path.read_bytes().replace(b"images/two", b"images/own"))
    assert "two" in refused(pulled, "ls")
    assert any("does not match its own digest" in text for text in mend(pulled))
    assert [image["image"] for image in json.loads(pulled.run("ls", "--json")[1])] == [ONE]


def test_manifest_that_is_changed_is_asked_of_root(pulled: World) -> None:
    manifest = next(iter((pulled.paths.state / "manifests").iterdir()))
    content = manifest.read_bytes()
    manifest.write_bytes(content.replace(b'"uid":0', b'"uid":9'))
    pulled.paths.database.unlink()
    mend(pulled)
    assert manifest.read_bytes() == content


def test_layers_of_no_image_are_found_again_and_collected(world: World) -> None:
    world.put("one", b"a", b"evil")
    assert world.run("pull", ONE)[0] == 65
    world.put("two", b"b")
    assert world.run("pull", TWO, "--no-activate")[0] == 0
    world.paths.database.unlink()
    mend(world)
    assert len(world.helper.layers) == 2
    assert world.run("gc")[0] == 0
    assert len(world.helper.layers) == 1


def test_nothing_is_repaired_while_a_run_is_at_work(pulled: World) -> None:
    pulled.paths.database.unlink()
    with Ownership(f"{pulled.paths.database}-owners") as owners:
        assert owners.take(7)
        code, _, err = pulled.run("doctor", "--repair")
        assert (code, "at work" in err) == (75, True)


def test_kill_at_every_commit_of_a_pull_is_no_damage(world: World) -> None:
    """The files and the rows may differ only as long as the run that makes them is at work."""
    world.put("one", b"a", b"b")
    for number, point in enumerate(points_of(world, ["pull", ONE, "--no-activate"])):
        shutil.rmtree(world.paths.state)
        world.helper.layers.clear()
        in_child(world, ["pull", ONE, "--no-activate"], die_at(number))
        assert world.run("ls")[0] == 0, point
        assert repair.complaint(world.paths) is None, point


def test_kill_in_the_middle_of_a_repair_leaves_it_to_the_next(pulled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answers(pulled)
    for name in ("_set_aside", "_put_devices", "_manifests"):
        pulled.paths.database.write_bytes(b"nothing of ours")
        with monkeypatch.context() as patch:
            patch.setattr(repair, name, lambda *_: os._exit(9))
            assert in_child(pulled, ["doctor", "--repair"]) == 9
        refused(pulled, "ls")
        mend(pulled)
        assert answers(pulled) == before
        assert list(pulled.paths.state.glob("rebuilt-*")) == []


def test_failed_sync_of_a_record_leaves_record_and_rows_alike(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put("one", b"a")

    def broken(folder: Path) -> None:
        raise OSError(5, "Input/output error", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(imagefile, "_sync", broken)
        assert world.run("pull", ONE, "--no-activate")[0] == DAMAGED
    assert answers(world)["images"] == []
    assert world.run("pull", ONE, "--no-activate")[0] == 0
    world.put("one", b"b")
    before = answers(world)
    with monkeypatch.context() as patch:
        patch.setattr(imagefile, "_sync", broken)
        assert world.run("pull", ONE, "--no-activate", "--refresh")[0] == DAMAGED
    assert answers(world) == before
    with monkeypatch.context() as patch:
        patch.setattr(imagefile, "_sync", broken)
        assert world.run("rm", "one")[0] == 0
    assert answers(world)["images"] == []


def test_verify_and_doctor_tell_what_the_state_machine_finds(pulled: World) -> None:
    with closing(sqlite3.connect(pulled.paths.database)) as db:
        db.execute("DROP TRIGGER run_finished_is_final")
        db.execute("UPDATE run SET queue = 'other' WHERE machine = 'pull'")
        db.commit()
    assert pulled.run("verify")[0] == DAMAGED
    found = {f["subject"]: f for f in json.loads(pulled.run("doctor", "--json")[1])}
    assert found["database"]["verdict"] == "fail"
    assert "doctor --repair" in found["database"]["remedy"]


def test_run_of_another_definition_is_named_with_the_way_out(world: World) -> None:
    world.put("one", b"a")
    assert in_child(world, ["pull", ONE, "--no-activate"], die_at(6)) == -9
    with closing(sqlite3.connect(world.paths.database)) as db:
        (trigger,) = db.execute("SELECT sql FROM sqlite_schema WHERE name = 'run_request_is_frozen'").fetchone()
        db.execute("DROP TRIGGER run_request_is_frozen")
        db.execute("UPDATE run SET definition = 'of another version' WHERE machine = 'pull'")
        db.execute(trigger)
        db.commit()
    world.run("resume")
    found = [f for f in json.loads(world.run("doctor", "--json")[1]) if f["subject"] == "quarantined"]
    assert [f["verdict"] for f in found] == ["warn"]
    assert "same command again" in found[0]["remedy"]
    assert world.run("pull", ONE, "--no-activate")[0] == 0
    assert "quarantined" not in world.run("doctor")[1]
