"""The blob cache: bounded, least recently used out; nothing that a layer at work needs, or that root has refused."""

import os
from typing import Any

import pytest

from broker import work
from broker.machine import Hooks
from tests.support.world import World

ONE, TWO = "s3://bucket/images/one", "s3://bucket/images/two"


def blobs(world: World) -> set[bytes]:
    """Return what the blobs of the cache hold."""
    return {path.read_bytes() for path in (world.paths.blob_dir / "sha256").iterdir()}


def test_a_pull_leaves_the_cache_within_its_bound(world: World) -> None:
    world.environ["IMGPULL_CACHE_SIZE"] = "2"
    world.put("one", b"a", b"b")
    world.put("two", b"c")
    assert world.run("pull", ONE)[0] == 0
    assert world.run("pull", TWO)[0] == 0
    assert blobs(world) in ({b"a", b"c"}, {b"b", b"c"})
    assert world.run("pull", ONE, "--refresh")[0] == 0


def test_what_was_used_last_stays_longest(world: World) -> None:
    world.put("one", b"a", b"b")
    assert world.run("pull", ONE, "--no-activate")[0] == 0
    world.put("two", b"a", b"c")
    assert world.run("pull", TWO, "--no-activate")[0] == 0  # takes `a` from the cache: it is younger than `b` now
    world.environ["IMGPULL_CACHE_SIZE"] = "2"
    assert world.run("gc")[0] == 0
    assert blobs(world) == {b"a", b"c"}


class PowerError(Exception):
    """It is gone."""


def test_a_blob_that_an_interrupted_layer_needs_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(point: str) -> None:
        if point == "layer:fetch:complete:after":
            raise PowerError

    world.environ["IMGPULL_CACHE_SIZE"] = "0"
    world.put("one", b"a")
    monkeypatch.setattr(work, "HOOKS", Hooks(point=fail))
    assert world.run("pull", ONE)[0] != 0
    monkeypatch.setattr(work, "HOOKS", Hooks())
    assert blobs(world) == {b"a"}
    assert world.run("gc")[0] == 0
    assert blobs(world) == {b"a"}
    assert world.run("pull", ONE)[0] == 0
    assert blobs(world) == set()


def test_a_blob_that_vanishes_between_two_steps_is_fetched_again(world: World) -> None:
    def lose(request: dict[str, Any]) -> dict[str, Any]:
        for name in os.listdir(world.paths.blob_dir / "sha256"):
            os.unlink(world.paths.blob_dir / "sha256" / name)
        return world.helper.on_stat(request, [])[0]

    world.put("one", b"a")
    world.helper.script["stat"] = lose
    assert world.run("pull", ONE)[0] == 0
    assert len(world.lines("transfers")) == 2


def test_a_blob_that_root_refuses_is_not_kept(world: World) -> None:
    world.put("one", b"a")
    world.helper.script["commit"] = lambda _: world.helper.error("rejected", "file 1 has another sha256")
    assert world.run("pull", ONE)[0] == 65
    assert blobs(world) == set()
    del world.helper.script["commit"]
    assert world.run("pull", ONE)[0] == 0


def test_manifests_of_no_layer_are_removed_but_not_while_a_layer_is_at_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(point: str) -> None:
        if point == "layer:fetch:complete:after":
            raise PowerError

    world.put("one", b"a")
    monkeypatch.setattr(work, "HOOKS", Hooks(point=fail))
    assert world.run("pull", ONE)[0] != 0
    monkeypatch.setattr(work, "HOOKS", Hooks())
    orphan = world.paths.manifest(f"sha256:{'0' * 64}")
    orphan.touch()
    assert world.run("gc")[0] == 0
    assert orphan.exists()  # it may be the one that the layer at work has just written
    assert world.run("pull", ONE)[0] == 0
    assert world.run("gc")[0] == 0
    assert not orphan.exists()
    assert len(list(orphan.parent.iterdir())) == 1
