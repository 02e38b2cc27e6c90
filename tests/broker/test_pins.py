"""Pin files: written from what was fetched, and holding against everything else."""

import shutil
from hashlib import sha256

import pytest

from tests.support.world import World

REF = "s3://bucket/images/one"


def test_a_pin_file_refuses_every_other_content(world: World) -> None:
    world.put("one", b"a", b"b")
    assert world.run("pull", REF)[0] == 0
    code, listed, err = world.run("pins")
    assert (code, err) == (0, "")
    file = world.folder / "pins"
    file.write_text(f"# our images\n\n{listed}")
    assert listed.splitlines() == [
        f"sha256:{sha256(content).hexdigest()}  {REF}/{n}.tar" for n, content in ((1, b"a"), (2, b"b"))
    ]
    transfers = world.lines("transfers")
    assert world.run("pull", REF, "--pin-file", str(file))[0] == 0
    world.environ["IMGPULL_PIN_FILE"] = str(file)
    assert world.run("pull", REF, "--refresh")[0] == 0
    assert world.lines("transfers") == transfers

    world.put("one", b"a", b"another")
    assert world.run("pull", REF)[0] == 0  # what is here is what is pinned
    code, _, err = world.run("pull", REF, "--refresh")
    assert code == 65 and "another content" in err  # the words of the fetcher, here a stand-in
    world.put("one", b"a", b"b", b"c")
    code, _, err = world.run("pull", REF, "--refresh")
    assert code == 65 and "not in the pin file: images/one/3.tar" in err
    shutil.rmtree(world.bucket / "images/one")
    world.put("one", b"a")
    code, _, err = world.run("pull", REF, "--refresh")
    assert code == 65 and "not in the image: images/one/2.tar" in err


def test_an_image_that_is_here_is_not_ready_where_other_content_is_pinned(world: World) -> None:
    world.put("one", b"a")
    assert world.run("pull", REF)[0] == 0
    file = world.folder / "pins"
    file.write_text(f"sha256:{sha256(b'b').hexdigest()}  {REF}/1.tar\n")
    code, _, err = world.run("pull", REF, "--pin-file", str(file))
    assert code == 65 and "the content is not what is expected" in err
    world.put("one", b"b")
    assert world.run("pull", REF, "--pin-file", str(file), "--name", "new")[0] == 0
    file.write_text("")
    assert world.run("pull", REF, "--pin-file", str(file), "--name", "new")[0] == 65


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("sha256:12  s3://b/k\n", "line 1"),
        (f"# fine\nsha256:{'0' * 64} k\n", "line 2"),
        (f"sha256:{'0' * 64}  s3://b/k\nsha256:{'1' * 64}  s3://b/k\n", "line 2: another digest"),
        ("\udcff", "byte 0 is not UTF-8"),
    ],
)
def test_a_pin_file_that_cannot_be_read_stops_the_pull(world: World, text: str, why: str) -> None:
    world.put("one", b"a")
    file = world.folder / "pins"
    file.write_text(text, errors="surrogateescape")
    code, _, err = world.run("pull", REF, "--pin-file", str(file))
    assert code == 78 and why in err
    file.unlink()
    assert world.run("pull", REF, "--pin-file", str(file))[0] == 78
