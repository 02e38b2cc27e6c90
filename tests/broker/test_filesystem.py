"""What ``--size`` does to the file system, and to a device whose file system did not grow."""

from pathlib import Path

import pytest

from broker import filesystem
from tests.support.world import World

REF = "s3://bucket/images/one"


@pytest.fixture
def tool(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a stand-in for resize2fs that notes how it is called."""
    path = tmp_path / "resize2fs"
    path.write_text(f'#!/bin/sh\necho "$@" >>{world.folder}/resized\nenv >>{world.folder}/environment\n')
    path.chmod(0o755)
    monkeypatch.setattr(filesystem, "RESIZE2FS", ("/nonexistent", str(path)))
    world.put("one", b"a")
    return path


def test_size_lets_the_file_system_fill_its_device_once(world: World, tool: Path) -> None:
    assert world.run("pull", REF, "--size", "20G")[0] == 0
    assert world.lines("resized") == ["-f /dev/null"]
    assert not [line for line in world.lines("environment") if line.startswith("HOME")]
    # The device is the user's by now: whoever runs on it keeps his file system to himself.
    assert world.run("activate", REF, "--name", "one", "--size", "20G")[0] == 0
    assert len(world.lines("resized")) == 1
    assert world.run("activate", REF, "--name", "other")[0] == 0
    assert len(world.lines("resized")) == 1


def test_device_whose_file_system_does_not_grow_is_given_back(world: World, tool: Path) -> None:
    tool.write_text("#!/bin/sh\necho 'resize2fs: no space' >&2\nexit 1\n")
    code, _, err = world.run("pull", REF, "--size", "20G")
    assert code == 74 and "resize2fs: no space" in err
    assert world.helper.activations == {}
    assert world.run("ls", "--activations", "-H")[1] == ""
    tool.write_text("#!/bin/sh\n")
    assert world.run("pull", REF, "--size", "20G")[0] == 0
    assert list(world.helper.activations) == ["one"]


def test_device_that_does_not_grow_is_given_back_where_another_had_its_name(world: World, tool: Path) -> None:
    world.put("two", b"b")
    assert world.run("pull", "s3://bucket/images/two", "--name", "x")[0] == 0
    world.helper.activations.clear()
    world.helper.reboot()
    tool.write_text("#!/bin/sh\nexit 1\n")
    assert world.run("pull", REF, "--name", "x", "--size", "20G")[0] == 74
    assert world.helper.activations == {}
    assert world.run("ls", "--activations", "-H")[1] == ""


def test_device_with_a_size_is_the_same_after_a_reboot(world: World, tool: Path) -> None:
    assert world.run("pull", REF, "--size", "20G")[0] == 0
    before = dict(world.helper.activations)
    world.helper.reboot()
    assert world.run("activate", REF, "--name", "one", "--size", "20G")[0] == 0
    assert world.helper.activations.keys() == before.keys()
    assert "deactivate" not in [request["op"] for request in world.helper.requests]
    assert len(world.lines("resized")) == 1


def test_size_takes_no_device_of_another_image_away(world: World, tool: Path) -> None:
    world.put("two", b"b")
    assert world.run("pull", "s3://bucket/images/two", "--name", "x")[0] == 0
    (layer,) = {row["layer"] for row in world.helper.activations.values()}
    world.helper.reboot()
    code, _, err = world.run("pull", REF, "--name", "x", "--size", "20G")
    assert code == 75, err
    assert {row["layer"] for row in world.helper.activations.values()} == {layer}
    assert world.run("activate", "s3://bucket/images/two", "--name", "x")[0] == 0


def test_missing_tool_is_named(world: World, tool: Path) -> None:
    tool.unlink()
    code, _, err = world.run("pull", REF, "--size", "20G")
    assert code == 78 and "install e2fsprogs" in err
    assert world.helper.activations == {}
    assert world.run("pull", REF)[0] == 0
