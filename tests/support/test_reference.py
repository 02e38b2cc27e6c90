"""The judge is judged: it knows the layer rules, and sees each kind of difference."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.support.reference import differences, read_device, read_tree, unpack

pytestmark = pytest.mark.root


def write_layer(path: Path, *entries: tarfile.TarInfo | tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
            else:
                file = tarfile.TarInfo(entry[0])
                file.size = len(entry[1])
                tar.addfile(file, io.BytesIO(entry[1]))
    return path


def member(name: str, kind: bytes, **more: object) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = kind
    for key, value in more.items():
        setattr(entry, key, value)
    return entry


def folder(name: str, mode: int = 0o755) -> tarfile.TarInfo:
    return member(name, tarfile.DIRTYPE, mode=mode)


def symlink(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.SYMTYPE, linkname=target)


@pytest.mark.parametrize(
    ("upper", "left"),
    [
        ([("a/.wh.one", b"")], {"a/two"}),
        ([("a/.wh..wh..opq", b"")], set()),
        ([("a/three", b""), ("a/.wh..wh..opq", b"")], {"a/three"}),
        ([(".wh.a", b"")], None),
        ([("a/one", b"new"), ("a/.wh.two", b"")], {"a/one"}),
        ([("a/.wh.absent", b"")], {"a/one", "a/two"}),
    ],
    ids=["file", "opaque", "opaque-after-its-files", "folder", "and-replace", "of-nothing"],
)
def test_whiteouts_remove_what_lower_layers_left(
    tmp_path: Path, upper: list[tuple[str, bytes]], left: set[str] | None
) -> None:
    lower = write_layer(tmp_path / "1.tar", folder("a"), ("a/one", b"1"), ("a/two", b"2"))
    unpack([lower, write_layer(tmp_path / "2.tar", *upper)], tmp_path / "tree")
    tree = read_tree(tmp_path / "tree")
    assert set(tree) - {".", "a"} == (left or set())
    assert ("a" in tree) == (left is not None)


def test_replacement_across_kinds(tmp_path: Path) -> None:
    lower = write_layer(tmp_path / "1.tar", folder("d"), ("d/child", b""), ("f", b""), symlink("s", "/etc"))
    upper = write_layer(tmp_path / "2.tar", ("d", b"file"), folder("f"), ("f/child", b""), folder("s"))
    unpack([lower, upper], tmp_path / "tree")
    kinds = {path: record.kind for path, record in read_tree(tmp_path / "tree").items()}
    assert kinds == {".": "dir", "d": "file", "f": "dir", "f/child": "file", "s": "dir"}


def test_a_directory_that_is_declared_again_keeps_what_it_holds(tmp_path: Path) -> None:
    lower = write_layer(tmp_path / "1.tar", folder("a"), ("a/one", b"1"))
    upper = write_layer(tmp_path / "2.tar", folder("a", 0o700), ("a/two", b"2"))
    unpack([lower, upper], tmp_path / "tree")
    tree = read_tree(tmp_path / "tree")
    assert set(tree) == {".", "a", "a/one", "a/two"}
    assert tree["a"].mode == "700"


def test_compressed_layers_are_read(tmp_path: Path) -> None:
    layer = write_layer(tmp_path / "1.tar", ("x", b"content"))
    subprocess.run(["zstd", "-q", str(layer)], check=True)
    unpack([tmp_path / "1.tar.zst"], tmp_path / "tree")
    assert read_tree(tmp_path / "tree")["x"].size == 7


CHANGES = {  # name: field that must be named, shell command in the copy
    "gone": ("missing", "rm plain"),
    "odd name": ("missing", "rm odd*"),
    "more": ("unexpected", "touch more"),
    "kind": ("kind", "rm plain; mkdir plain"),
    "setuid": ("mode", "chmod u+s plain"),
    "uid": ("uid", "chown 1 plain"),
    "gid of a link": ("gid", "chown -h :7 link"),
    "content of the same size": ("sha256", "printf PLAIN >plain"),
    "size": ("size", "printf longer >plain"),
    "target": ("target", "ln -sfn /elsewhere link"),
    "a link that became a copy": ("links", "cp -p first x; mv x second"),
    "a nanosecond": ("mtime", "touch -d '2000-01-01 00:00:00.000000001Z' plain"),
    "capability": ("xattrs", "setcap cap_net_raw+ep plain"),
    "attribute of a folder": ("xattrs", "setfattr -n user.x -v 1 folder"),
    "value of an attribute": ("xattrs", "setfattr -n user.odd -v 1 odd*"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_difference_is_seen(tmp_path: Path, change: str) -> None:
    top = tmp_path / "one"
    (top / "folder").mkdir(parents=True)
    (top / "plain").write_bytes(b"plain")
    os.utime(top / "plain", (946684800, 946684800))
    (top / "first").write_bytes(b"1")
    (top / "second").hardlink_to(top / "first")
    (top / "link").symlink_to("/etc/passwd")
    (top / "odd\n\\ \udcff").write_bytes(b"")
    os.setxattr(top / "odd\n\\ \udcff", "user.odd", b"\0")
    copy = tmp_path / "two"
    subprocess.run(["cp", "-a", str(top), str(copy)], check=True)
    assert differences(read_tree(top), read_tree(copy)) == []
    field, command = CHANGES[change]
    subprocess.run(["/bin/sh", "-euc", command], cwd=copy, check=True)
    found = differences(read_tree(top), read_tree(copy))
    assert any(f": {field}" in line for line in found), found


def test_a_name_outside_the_tree_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/x").touch()
    (tmp_path / "outside").hardlink_to(tmp_path / "tree/x")
    with pytest.raises(AssertionError, match="2 names"):
        read_tree(tmp_path / "tree")


def test_a_device_reads_like_the_folder_that_it_was_made_from(tmp_path: Path) -> None:
    layer = write_layer(tmp_path / "1.tar", folder("a", 0o2755), ("a/one", b"1"), symlink("a/link", "/etc"))
    unpack([layer], tmp_path / "tree")
    os.link(tmp_path / "tree/a/one", tmp_path / "tree/a/two")
    os.setxattr(tmp_path / "tree/a/one", "user.x", b"1")
    image = tmp_path / "image"
    command = ["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(tmp_path / "tree"), str(image), "16M"]
    subprocess.run(command, check=True)
    loop = subprocess.run(["losetup", "--find", "--show", "--read-only", str(image)], check=True, capture_output=True)
    device = loop.stdout.decode().strip()
    try:
        found = dict(read_device(device))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert found.pop("lost+found").mode == "700"
    assert differences(read_tree(tmp_path / "tree"), found) == []
