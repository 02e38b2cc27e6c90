"""Whole pulls with everything real but the two workers and root: the command, the machines, the state, the wire."""

import fcntl
import json
import os
import shutil
import sqlite3
import sys
import time
from contextlib import closing
from typing import Any

import pytest

from broker import commands, settings, worker
from broker.errors import ImgpullError
from tests.broker.fake_helper import OTHER_UID, UID
from tests.support.world import World

REF = "s3://bucket/images/one"


def test_pull_brings_layers_in_and_prints_the_device_alone(world: World) -> None:
    world.put("one", b"a", b"b")
    code, out, err = world.run("pull", REF)
    assert (code, out) == (0, "/dev/null\n")
    assert "2 layers, 0 of them there already, 2 B fetched" in err
    assert [row["parent"] is None for row in world.helper.layers.values()] == [True, False]
    assert list(world.helper.activations) == ["one"]
    assert world.leftovers() == []


def test_second_pull_starts_nothing_and_writes_nothing(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF)
    before = (
        world.paths.database.read_bytes(),
        world.helper.connections,
        world.lines("checks"),
        world.lines("transfers"),
    )
    world.bucket.rename(world.folder / "gone")
    code, out, err = world.run("pull", REF)
    assert (code, out) == (0, "/dev/null\n")
    assert "nothing to do" in err
    assert before == (
        world.paths.database.read_bytes(),
        world.helper.connections,
        world.lines("checks"),
        world.lines("transfers"),
    )


def test_same_reference_at_another_endpoint_is_another_image(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF, "--no-activate")
    world.environ["AWS_ENDPOINT_URL"] = "http://elsewhere"
    world.put("one", b"b")
    assert world.run("pull", REF, "--no-activate")[0] == 0
    endpoints = [row["endpoint"] for row in json.loads(world.run("ls", "--json")[1])]
    assert endpoints == ["", "http://elsewhere"]


def test_second_image_shares_lower_layers(world: World) -> None:
    world.put("one", b"a", b"b", b"c")
    world.put("two", b"a", b"b", b"d")
    world.run("pull", REF)
    code, _, err = world.run("pull", "s3://bucket/images/two")
    assert code == 0
    assert "3 layers, 2 of them there already, 1 B fetched" in err
    assert world.lines("transfers") == ["images/one/1.tar", "images/one/2.tar", "images/one/3.tar", "images/two/3.tar"]
    assert len(world.lines("checks")) == 4
    assert world.helper.count("commit") == 4


def test_same_bytes_twice_in_one_image_are_two_layers(world: World) -> None:
    world.put("one", b"a", b"a")
    assert world.run("pull", REF)[0] == 0
    assert len(world.helper.layers) == 2


def test_single_tarball_is_an_image_of_one_layer(world: World) -> None:
    world.put("one", b"a", b"b")
    code, _, _ = world.run("pull", REF + "/2.tar")
    assert code == 0
    assert list(world.helper.activations) == ["one-2"]
    assert len(world.helper.layers) == 1


def test_compressed_layer_leaves_no_payload_behind(world: World) -> None:
    world.put("one", b"a", suffix=".tar.gz")
    assert world.run("pull", REF)[0] == 0
    assert world.leftovers() == []


def test_attack_in_the_second_layer_is_named_and_nothing_becomes_visible(world: World) -> None:
    world.put("one", b"a", b"evil")
    code, out, err = world.run("pull", REF)
    assert (code, out) == (65, "")
    assert "images/one/2.tar: refused by rule path_escapes_root" in err
    assert "layer 2, entry 1, byte 0 ../x\\n: the name leaves the root" in err
    assert "imgpull explain path_escapes_root" in err
    assert world.run("ls", "-H")[1] == ""
    assert world.helper.activations == {}
    assert world.leftovers() == []


def test_refusal_as_json_is_the_last_line_and_complete(world: World) -> None:
    world.put("one", b"evil")
    code, out, _ = world.run("pull", REF, "--json")
    last = json.loads(out.splitlines()[-1])
    assert (code, last["type"], last["code"], last["exit"]) == (65, "error", "archive-rejected", 65)
    assert last["details"]["violations"][0]["rule"] == "path_escapes_root"


@pytest.mark.parametrize(
    ("blob", "word"),
    [(b"die", "killed by its sandbox"), (b"silent", "ended with code 0"), (b"chatty", "sent what it must not")],
)
def test_checker_that_gives_no_verdict_refuses_its_archive(world: World, blob: bytes, word: str) -> None:
    world.put("one", blob)
    code, _, err = world.run("pull", REF)
    assert code == 65
    assert word in err
    assert world.helper.layers == {}


def test_gap_in_the_family_is_refused_before_anything_is_fetched(world: World) -> None:
    world.put("one", b"a", b"b", b"c")
    (world.bucket / "images/one/2.tar").unlink()
    code, _, err = world.run("pull", REF)
    assert code == 65
    assert "layer 2 is missing" in err
    assert world.lines("transfers") == []


def test_expected_digests_are_demanded(world: World) -> None:
    world.put("one", b"a")
    wrong = "sha256:" + "0" * 64
    assert world.run("pull", REF, "--expect", wrong)[0] == 65
    right = "sha256:ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert world.run("pull", REF, "--expect", right)[0] == 0
    # Now the object is known; a demand that it breaks is still refused.
    assert world.run("pull", REF, "--expect", wrong)[0] == 65
    assert world.run("pull", REF, "--expect", right, "--expect", right)[0] == 65


def test_helper_without_room_ends_with_73_and_keeps_what_was_fetched(world: World) -> None:
    world.put("one", b"a")
    world.helper.script["commit"] = lambda _: world.helper.error("no_room", "needs 5 GB, 1 GB is free")
    code, _, err = world.run("pull", REF)
    assert code == 73
    assert "needs 5 GB" in err
    del world.helper.script["commit"]
    assert world.run("pull", REF)[0] == 0
    assert len(world.lines("transfers")) == 1


def test_missing_helper_ends_with_69(world: World) -> None:
    world.put("one", b"a")
    world.environ["IMGPULL_HELPER_SOCKET"] = str(world.folder / "none")
    code, _, err = world.run("pull", REF)
    assert code == 69
    assert "systemctl enable" in err


def test_pool_made_anew_is_filled_again(world: World) -> None:
    world.put("one", b"a", b"b", suffix=".tar.gz")
    world.run("pull", REF)
    world.helper.layers.clear()
    world.helper.activations.clear()
    code, _, _ = world.run("pull", REF)
    assert code == 0
    assert len(world.helper.layers) == 2
    assert world.leftovers() == []


def test_refresh_tells_what_changed_upstream(world: World) -> None:
    world.environ["IMGPULL_PROGRESS"] = "plain"
    world.put("one", b"a", b"b")
    world.run("pull", REF, "--no-activate")
    assert "nothing changed" in world.run("pull", REF, "--no-activate", "--refresh")[2]
    world.put("one", b"a", b"B")
    code, _, err = world.run("pull", REF, "--no-activate", "--refresh")
    assert code == 0
    assert "changed upstream: layers 2" in err
    assert len(world.helper.layers) == 3


def test_name_of_another_image_is_not_taken_over(world: World) -> None:
    world.put("one", b"a")
    world.put("two", b"b")
    world.run("pull", REF)
    code, _, err = world.run("pull", "s3://bucket/images/two", "--name", "one")
    assert code == 75
    assert "it is a rw activation of s3://bucket/images/one" in err
    code, _, err = world.run("activate", "one", "--ro")
    assert (code, "choose another with --name" in err) == (75, True)


def test_life_of_an_image(world: World) -> None:
    world.put("one", b"a", b"b")
    world.put("two", b"a")
    world.run("pull", REF)
    world.run("pull", "s3://bucket/images/two", "--no-activate")
    assert (
        world.run("ls", "-H", "-p", "-o", "image,layers")[1] == "s3://bucket/images/one\t2\ns3://bucket/images/two\t1\n"
    )
    shown = json.loads(world.run("show", "one", "--json")[1])
    assert [layer["images"] for layer in shown["layers"]] == [2, 1]
    assert shown["layers"][0]["notes"]["dropped"] == {"xattr_dropped": 1}
    assert world.run("activate", "two", "--name", "b", "--ro")[1] == "/dev/null\n"
    assert json.loads(world.run("activate", "two", "--name", "c", "--firecracker")[1])["path_on_host"] == "/dev/null"
    names = [row["name"] for row in json.loads(world.run("ls", "--activations", "--json")[1])]
    assert names == ["b", "c", "one"]
    code, _, err = world.run("rm", "one")
    assert (code, "activated as one" in err) == (75, True)
    assert world.run("deactivate", "one")[0] == 0
    assert world.run("deactivate", "one")[0] == 66
    code, out, _ = world.run("rm", "one")
    assert (code, "1 layer removed, 1 kept" in out) == (0, True)
    assert len(world.helper.layers) == 1
    assert world.run("show", "one")[0] == 66


def test_plan_tells_what_a_pull_would_do_and_does_nothing(world: World) -> None:
    world.put("one", b"aa", b"b")
    world.put("two", b"aa", b"ccc")
    found = json.loads(world.run("plan", REF, "--json")[1])
    assert ([row["state"] for row in found["layers"]], found["fetch_bytes"], found["fits"]) == (["new", "new"], 3, True)
    assert world.lines("transfers") == [] and world.helper.layers == {}
    world.run("pull", REF)
    found = json.loads(world.run("plan", "s3://bucket/images/two", "--json")[1])
    assert [(row["state"], row["fetch_bytes"]) for row in found["layers"]] == [("here", 0), ("new", 3)]
    assert "asked of root  1 commit, 1 activation" in world.run("plan", "s3://bucket/images/two")[1]


def test_df_tells_shared_from_exclusive(world: World) -> None:
    world.put("one", b"aa", b"b")
    world.put("two", b"aa", b"ccc")
    world.run("pull", REF)
    world.run("pull", "s3://bucket/images/two")
    found = json.loads(world.run("df", "--json")[1])["images"]
    assert [(row["exclusive"], row["shared"]) for row in found] == [(1, 2), (3, 2)]
    assert "MORE WOULD FIT" in world.run("df")[1]


def test_runs_and_log_tell_each_step(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF)
    listed = json.loads(world.run("runs", "--json")[1])
    assert {(row["machine"], row["state"]) for row in listed} == {("pull", "done"), ("layer", "done")}
    text = world.run("log", "one")[1]
    assert all(step in text for step in ("resolve", "layers", "activate", "fetch", "check", "commit"))
    shown = json.loads(world.run("runs", listed[0]["run"], "--json")[1])
    assert shown["events"][0]["type"] == "start"
    assert world.run("runs", "01ZZ")[0] == 66


def test_gc_keeps_what_images_need_and_trims_the_cache(world: World) -> None:
    world.put("one", b"a", b"b")
    world.run("pull", REF)
    world.environ["IMGPULL_CACHE_SIZE"] = "1"
    planned = json.loads(world.run("gc", "--dry-run", "--json")[1])
    assert (len(planned["blobs"]), planned["layers"]) == (1, [])
    assert world.run("gc")[0] == 0
    assert len(os.listdir(world.paths.blob_dir / "sha256")) == 1
    assert len(world.helper.layers) == 2
    assert world.run("pull", REF)[0] == 0


def test_gc_drops_partial_blobs_that_nobody_took_up(world: World) -> None:
    folder = world.paths.blob_dir / "partial"
    folder.mkdir(parents=True)
    for name, age_s in (("old", 30 * 86400), ("young", 0), ("held", 30 * 86400)):
        for suffix in (".map", ".data"):
            (folder / (name + suffix)).write_bytes(b"x")
            os.utime(folder / (name + suffix), times=(time.time() - age_s,) * 2)
    with (folder / "held.map").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert json.loads(world.run("gc", "--json")[1])["partials"] == ["old"]
    assert sorted(p.name for p in folder.iterdir()) == ["held.data", "held.map", "young.data", "young.map"]


def test_fetcher_that_cannot_start_says_why(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = {"type": "failed", "id": 0, "code": "configuration", "message": "no such profile", "retryable": False}
    script = f"import sys; sys.stdin.readline(); print({json.dumps(json.dumps(refusal))}); sys.exit(78)"
    monkeypatch.setattr(worker, "FETCH", (sys.executable, "-c", script))
    code, _, err = world.run("pull", REF)
    assert (code, "no such profile" in err) == (78, True)


def test_lost_manifest_is_asked_of_root(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF)
    manifest = next(iter((world.paths.state / "manifests").iterdir()))
    manifest.unlink()
    world.put("two", b"a", b"b")
    world.helper.script["manifest"] = lambda _: world.helper.error("fault", "asked")
    code, _, err = world.run("pull", "s3://bucket/images/two", "--no-activate")
    assert (code, "asked" in err) == (74, True)


def test_version_that_differs_ends_with_76(world: World) -> None:
    world.put("one", b"a")
    world.helper.script["hello"] = lambda _: world.helper.error("version", "helper speaks 2")
    assert world.run("pull", REF)[0] == 76


def test_unknown_state_database_is_refused_not_guessed_at(world: World) -> None:
    world.put("one", b"a")
    world.paths.state.mkdir(parents=True)
    world.paths.database.write_bytes(b"not a database, " * 100)
    code, _, err = world.run("pull", REF)
    assert code == 74
    assert "no" in err


def test_find_image_that_means_several_is_a_usage_error(world: World) -> None:
    world.put("one", b"a")
    (world.bucket / "other").mkdir()
    (world.bucket / "images/one").joinpath("../../other/one").resolve().mkdir()
    (world.bucket / "other/one/1.tar").write_bytes(b"z")
    world.run("pull", REF, "--no-activate")
    world.run("pull", "s3://bucket/other/one", "--no-activate")
    with pytest.raises(ImgpullError, match="means 2 images"):
        commands.find_image(settings.load({}, world.environ), "one")


def test_payload_that_could_not_be_removed_goes_with_the_next_pull(world: World) -> None:
    world.put("one", b"a", suffix=".tar.gz")
    world.run("pull", REF, "--no-activate")
    left = world.paths.payload("sha256:" + "a" * 64)
    left.write_bytes(b"left")
    world.put("two", b"b")
    assert world.run("pull", "s3://bucket/images/two", "--no-activate")[0] == 0
    assert not left.exists()


def test_layer_of_somebody_else_is_claimed_before_it_is_built_upon(world: World) -> None:
    world.put("one", b"a")
    world.run("pull", REF, "--no-activate")
    (layer,) = world.helper.layers
    world.helper.claims[layer] = {OTHER_UID}
    world.paths.database.unlink()
    shutil.rmtree(world.paths.image_dir)
    assert world.run("pull", REF, "--no-activate")[0] == 0
    assert world.helper.claims[layer] == {OTHER_UID, UID}
    world.helper.on_remove({"layer": layer}, [], OTHER_UID)
    assert layer in world.helper.layers


@pytest.fixture
def crossed(world: World) -> World:
    """Image `one` is recorded under a name under which root holds a device of `two`.

    So it is when one run took the device of `one` back, another gave the name to `two`, and both died at that moment.
    """
    world.put("one", b"a")
    world.put("two", b"b")
    world.run("pull", "s3://bucket/images/two", "--name", "x")
    given = world.helper.activations.pop("x")
    world.run("deactivate", "x")
    world.helper.activations.clear()
    assert world.run("pull", REF, "--name", "x")[0] == 0
    world.helper.activations["x"] = given
    return world


def test_record_of_a_name_follows_the_device_that_root_holds_under_it(crossed: World) -> None:
    assert crossed.run("gc")[0] == 0
    (given,) = json.loads(crossed.run("ls", "--activations", "--json")[1])
    assert (given["name"], given["image"], given["live"]) == ("x", "s3://bucket/images/two", True)


def test_removals_go_by_the_device_that_root_holds_under_a_name(crossed: World) -> None:
    code, _, err = crossed.run("rm", "two")
    assert (code, "activated as x" in err) == (75, True)
    assert crossed.run("rm", "one")[0] == 0
    assert list(crossed.helper.activations) == ["x"]


@pytest.mark.parametrize("words", [("gc",), ("rm", "one")])
def test_device_that_is_recorded_while_root_is_asked_stays(
    words: tuple[str, ...], crossed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = crossed.helper.on_list

    def meanwhile(request: dict[str, Any], descriptors: list[int]) -> list[dict[str, Any]]:
        with closing(sqlite3.connect(crossed.paths.database)) as db, db:
            db.execute(
                "UPDATE activation SET device = 'newer', (image, layer) = (SELECT id, top FROM image WHERE ref LIKE ?)",
                ("%/two",),
            )
        return listed(request, descriptors)

    monkeypatch.setattr(crossed.helper, "on_list", meanwhile)
    assert crossed.run(*words)[0] == 0
    assert crossed.query("SELECT name, device FROM activation") == [("x", "newer")]
