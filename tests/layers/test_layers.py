"""The families are what the tests that use them take for granted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.layers.families import Family, families
from tests.layers.pack import pack
from tests.layers.synthetic import write_large_files, write_small_files

LATEST_MTIME_S = 2_000_000_000


def members(layer: Path) -> dict[str, tarfile.TarInfo]:
    """Return the members of a layer by name; zstd is not tarfile's before Python 3.14."""
    if layer.suffix != ".zst":
        with tarfile.open(layer) as tar:
            return {member.name: member for member in tar}
    with (
        subprocess.Popen(["zstd", "-dc", str(layer)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        return {member.name: member for member in tar}


@pytest.fixture(scope="module")
def demo() -> dict[str, Family]:
    return {family.name: family for family in families("demo")}


@pytest.mark.root
@pytest.mark.slow
def test_families_share_their_two_lowest_layers(demo: dict[str, Family]) -> None:
    digests = [[hashlib.sha256(layer.read_bytes()).digest() for layer in family.layers] for family in demo.values()]
    assert all(len(layers) >= 3 for layers in digests)
    assert {tuple(layers[:2]) for layers in digests} == {tuple(digests[0][:2])}
    assert len({layers[2] for layers in digests}) == len(digests)


@pytest.mark.root
@pytest.mark.slow
def test_families_hold_what_makes_images_hard(demo: dict[str, Family]) -> None:
    base, common, tools = map(members, demo["base-tools"].layers)
    python = members(demo["base-python"].layers[2])
    assert all(base[f"usr/bin/{name}"].mode == 0o4755 for name in ("su", "passwd", "mount"))
    assert base["usr/bin/perl5.36.0"].islnk()
    assert base["tmp"].mode == 0o1777
    assert any(entry.issym() and entry.linkname.startswith("/") for entry in base.values())
    assert {entry.gid for entry in base.values()} > {0}
    assert "SCHILY.xattr.security.capability" in common["usr/bin/ping"].pax_headers
    assert {"etc/.wh.issue.net", "etc/skel/.wh..wh..opq"} <= common.keys()
    assert common["srv/shared"].mode == 0o2775
    assert tools["usr/local/bin/perl"].islnk()
    assert (python["home/app/run"].mode, python["home/app/run"].uid) == (0o4750, 1000)
    assert python["etc/motd"].isdir() and base["etc/motd"].isreg()
    assert python["etc/update-motd.d"].issym() and base["etc/update-motd.d"].isdir()


@pytest.mark.root
@pytest.mark.slow
def test_layers_tell_nothing_of_the_build(demo: dict[str, Family]) -> None:
    for family in demo.values():
        for layer in family.layers:
            found = members(layer)
            assert all(not (entry.uname or entry.gname) for entry in found.values())
            assert not [name for name in found if name.startswith(("dev/", "proc/", "sys/", "run/", "tmp/"))]
            assert not found.keys() & {"etc/hostname", "etc/machine-id", "etc/resolv.conf"}


@pytest.mark.root
def test_packing_twice_gives_the_same_bytes_and_says_what_the_overlay_says(tmp_path: Path) -> None:
    upper, lower = tmp_path / "upper", tmp_path / "lower"
    for folder in ("opaque", "new"):
        (upper / folder).mkdir(parents=True)
        os.setxattr(upper / folder, "trusted.overlay.opaque", b"y")
    (lower / "opaque").mkdir(parents=True)
    os.mknod(upper / "gone", 0o020000, 0)
    (upper / "b").write_bytes(b"content")
    (upper / "a").hardlink_to(upper / "b")
    pack(upper, [lower], tmp_path / "1.tar", LATEST_MTIME_S)
    pack(upper, [lower], tmp_path / "2.tar", LATEST_MTIME_S)
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        assert tar.getnames() == ["a", "b", ".wh.gone", "new", "opaque", "opaque/.wh..wh..opq"]
        assert tar.getmember("b").linkname == "a"
        assert "SCHILY.xattr.trusted.overlay.opaque" not in tar.getmember("opaque").pax_headers


@pytest.mark.root
def test_a_socket_is_not_left_out_in_silence(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    os.mknod(tmp_path / "upper/socket", 0o140644)
    with pytest.raises(ValueError, match="socket"):
        pack(tmp_path / "upper", [], tmp_path / "1.tar", LATEST_MTIME_S)


def test_synthetic_layers_are_valid_and_always_the_same(tmp_path: Path) -> None:
    for number in (1, 2):
        write_small_files(tmp_path / f"small-{number}.tar", files=600)
        write_large_files(tmp_path / f"large-{number}.tar", total_bytes=3_000_000, files=3)
    for name, files in (("small", 600), ("large", 3)):
        assert (tmp_path / f"{name}-1.tar").read_bytes() == (tmp_path / f"{name}-2.tar").read_bytes()
        assert sum(entry.isreg() for entry in members(tmp_path / f"{name}-1.tar").values()) == files
