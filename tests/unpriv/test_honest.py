"""Honest archives, as the tools of this world write them, are accepted, and come out as they went in."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path
from typing import Any, Final

import pytest

from tests.layers.families import Family
from tests.support.reference import Record, differences, read_tree, unpack
from tests.unpriv.checking import check, run_program
from tests.unpriv.tarbytes import base256, directory, hardlink, member, pax, record, symlink, tar

LONG: Final = "/".join(("p" * 90, "q" * 90, "r" * 90))
OLD_NS: Final = 1_577_836_800_500_000_000


def make_tree(root: Path, *, short: bool = False) -> None:
    """Make a tree with what layers contain; ``short``: only what version 7 and ustar headers can say."""
    (root / "d/sub").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a").write_bytes(b"hello\n")
    (root / "d/big").write_bytes(os.urandom(1_300_000))
    (root / "d/none").touch()
    (root / "s").symlink_to("/absolute/target")
    (root / "d/s2").symlink_to("../../up")
    os.link(root / "a", root / "d/hard")
    (root / "a").chmod(0o4755)
    (root / "empty").chmod(0o1777)
    (root / ".hidden").write_bytes(b".")
    (root / "with space").write_bytes(b" ")
    if not short:
        (root / LONG).mkdir(parents=True)
        (root / LONG / "file").write_bytes(b"deep")
        (root / "long link").symlink_to("t" * 150)
        (root / "d" / ("n" * 180)).touch()
        (root / "fő").write_bytes(b"u")
        (root / "e\u0301").write_bytes(b"decomposed")
        (root / os.fsdecode(b"caf\xe9")).write_bytes(b"latin")
        (root / "back\\slash").touch()
        (root / "new\nline").touch()
        os.utime(root / "d/big", ns=(OLD_NS, OLD_NS))
        if os.geteuid() == 0:
            os.chown(root / "d/none", 3_000_000, 4_000_000)


def on_disk(root: Path, *, whole_seconds: bool) -> dict[str, dict[str, Any]]:
    """Return what a listing must say of a directory."""
    rows: dict[str, dict[str, Any]] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            row: dict[str, Any] = {
                "mode": stat.S_IMODE(status.st_mode),
                "uid": status.st_uid,
                "gid": status.st_gid,
                "mtime": status.st_mtime_ns // 10**9,
            }
            if not whole_seconds and status.st_mtime_ns % 10**9:
                row["mtime_ns"] = status.st_mtime_ns % 10**9
            if kind == stat.S_IFREG:
                row |= {"type": "file", "size": status.st_size}
                row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
            elif kind == stat.S_IFLNK:
                row |= {"type": "symlink", "target": os.readlink(path)}
            else:
                row["type"] = "dir"
            rows[os.fsencode(path.relative_to(root)).hex()] = row
    return rows


def expect_same(archive: Path, root: Path, *, whole_seconds: bool, ignore: tuple[str, ...] = ()) -> None:
    """Check an archive of a directory and compare the listing with the directory."""
    ran = run_program(archive, want_tree=True, all_violations=True)
    assert ran.code == 0, ran.report
    found, first = {}, {}
    for row in ran.tree:
        path = bytes.fromhex(row.pop("path_hex")) if "path_hex" in row else row.pop("path").encode()
        row.pop("implicit", None)
        if path != b".":
            found[path.hex()] = row
    for path_hex, row in found.items():
        if row["type"] == "hardlink":
            first[path_hex] = found[row["link"].encode().hex()]
    found |= first
    expected = on_disk(root, whole_seconds=whole_seconds)
    for row in (*expected.values(), *found.values()):
        for key in ignore:
            row.pop(key, None)
    assert found.keys() == expected.keys()
    for path_hex, row in expected.items():
        assert found[path_hex] == row, bytes.fromhex(path_hex)
    assert len(first) == 1  # one pair of hard links


def run(*command: str | Path, cwd: Path) -> None:
    subprocess.run([str(word) for word in command], cwd=cwd, check=True, capture_output=True, env={"LC_ALL": "C.UTF-8"})


GNU_TAR = {
    "gnu": (["--format=gnu"], True, False),
    "oldgnu": (["--format=oldgnu"], True, False),
    "posix": (["--format=posix"], False, False),
    "posix_xattrs": (["--format=posix", "--xattrs", "--xattrs-include=*", "--acls", "--selinux"], False, False),
    "posix_reproducible": (
        ["--format=posix", "--sort=name", "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"],
        False,
        False,
    ),
    "ustar": (["--format=ustar"], True, True),
    "v7": (["--format=v7"], True, True),
    "from_the_root": (["--format=gnu", "--transform=s,^\\./,/,", "-P"], True, False),
}


@pytest.mark.parametrize("name", GNU_TAR)
def test_gnu_tar(name: str, tmp_path: Path) -> None:
    options, whole_seconds, short = GNU_TAR[name]
    make_tree(tmp_path / "tree", short=short)
    run("tar", *options, "--numeric-owner", "-C", tmp_path / "tree", "-cf", tmp_path / "x.tar", ".", cwd=tmp_path)
    expect_same(tmp_path / "x.tar", tmp_path / "tree", whole_seconds=whole_seconds)


def test_gnu_tar_by_name(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    names = sorted(os.listdir(tmp_path / "tree"))
    run("tar", "-cf", tmp_path / "x.tar", "--", *names, cwd=tmp_path / "tree")
    expect_same(tmp_path / "x.tar", tmp_path / "tree", whole_seconds=True)


BSDTAR = {
    "pax": (["--format=pax"], False, False),
    "pax_restricted": (["--format=restricted-pax"], False, False),
    "gnutar": (["--format=gnutar"], True, False),
    "ustar": (["--format=ustar"], True, True),
    "v7": (["--format=v7"], True, True),
    "everything": (["--format=pax", "--xattrs", "--acls", "--fflags"], False, False),
}


@pytest.mark.parametrize("name", BSDTAR)
def test_bsdtar(name: str, tmp_path: Path) -> None:
    options, whole_seconds, short = BSDTAR[name]
    make_tree(tmp_path / "tree", short=short)
    command = ["bsdtar", *options, "-C", tmp_path / "tree", "-cf", tmp_path / "x.tar", "."]
    if name == "pax_restricted":
        command[1] = "--format=pax"
        command[1:1] = ["--options", "pax:xattrheader=SCHILY"]
    ended = subprocess.run([str(w) for w in command], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=False)
    assert ended.returncode == 0 or b"Can't translate pathname" in ended.stderr, ended  # it warns, and keeps the bytes
    expect_same(tmp_path / "x.tar", tmp_path / "tree", whole_seconds=whole_seconds)


def test_busybox_tar(tmp_path: Path) -> None:
    make_tree(tmp_path / "tree")
    run("busybox", "tar", "-cf", tmp_path / "x.tar", ".", cwd=tmp_path / "tree")
    expect_same(tmp_path / "x.tar", tmp_path / "tree", whole_seconds=True, ignore=("uid", "gid"))


@pytest.mark.parametrize(
    ("tar_format", "whole_seconds", "short"),
    [(tarfile.PAX_FORMAT, False, False), (tarfile.GNU_FORMAT, True, False), (tarfile.USTAR_FORMAT, True, True)],
)
def test_python_tarfile(tar_format: int, whole_seconds: bool, short: bool, tmp_path: Path) -> None:
    make_tree(tmp_path / "tree", short=short)
    with tarfile.open(tmp_path / "x.tar", "w", format=tar_format) as out:
        for path in sorted((tmp_path / "tree").rglob("*")):
            out.add(path, str(path.relative_to(tmp_path / "tree")), recursive=False)
    # Its times are floating point: they lose nanoseconds, and the header's are rounded.
    ignore = () if whole_seconds and short else ("mtime", "mtime_ns")
    expect_same(tmp_path / "x.tar", tmp_path / "tree", whole_seconds=whole_seconds, ignore=ignore)


# ---------------------------------------------------------------- written as Go's archive/tar does


def go_pax(name: bytes, *records: tuple[bytes, bytes], **fields: Any) -> bytes:
    """Return a PAX header and its member: records sorted, the ustar name cut to ASCII."""
    body = b"".join(record(key, value) for key, value in sorted(records))
    plain = bytes(b for b in name if b < 128)[:100]
    head = member(b"PaxHeaders.0/" + plain[:80], body, b"x", mode=0, uid=0, gid=0, mtime=0)
    return head + member(plain, **fields)


def test_docker_save_style_layer() -> None:
    """Directories first, PAX only where a value needs it, times to the nanosecond in it, capabilities, whiteouts."""
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    layer = tar(
        directory(b"bin/"),
        go_pax("bin/fő".encode(), (b"path", "bin/fő".encode()), data=b"1"),
        go_pax(b"bin/caf\xe9", (b"path", b"bin/caf\xe9"), data=b"2"),  # Go does not say hdrcharset=BINARY
        go_pax(b"bin/ping", (b"SCHILY.xattr.security.capability", capability), data=b"ELF", mode=0o755),
        go_pax(
            b"bin/t",
            (b"mtime", b"1700000000.123456789"),
            (b"atime", b"1700000001.5"),
            (b"ctime", b"1700000002.25"),
            data=b"",
            mtime=1_700_000_000,
        ),
        go_pax(b"bin/big-owner", (b"uid", b"3000000000"), (b"gid", b"3000000000"), data=b"", uid=0, gid=0),
        symlink(b"bin/sh", b"/bin/dash"),
        hardlink(b"bin/ping6", b"bin/ping"),
        member(b"bin/.wh.old", mode=0, mtime=0),
    )
    result = check(layer)
    assert result.accepted, result.report
    assert result.report["dropped"] == {"id_above_helper": 2, "time_dropped": 2, "whiteout_without_target": 1}
    rows = result.paths()
    assert rows["bin/ping"]["xattrs"] == {"security.capability": capability.hex()}
    assert rows["bin/t"]["mtime_ns"] == 123_456_789
    assert rows["bin/big-owner"]["uid"] == 3_000_000_000


def test_old_docker_layer_with_type_bits_in_its_modes() -> None:
    """Go before 1.9 wrote them, and Docker keeps writing them."""
    layer = tar(
        directory(b"d/", mode=0o40755),
        member(b"d/f", b"1", mode=0o100644),
        symlink(b"d/l", b"f").replace(b"0000777\0", b"0120777\0"),
        hardlink(b"d/h", b"d/f", mode=0o100644),
    )
    fixed = b"".join(_with_checksum(layer[at : at + 512]) for at in range(0, len(layer), 512))
    result = check(fixed)
    assert result.accepted, result.report
    assert result.paths()["d"]["mode"] == 0o755


def _with_checksum(block: bytes) -> bytes:
    if block[257:262] != b"ustar":
        return block
    blank = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(blank) + block[156:]


def test_buildah_and_umoci_style_opaque_layers() -> None:
    """The marker before the children, after them, and on a directory that is declared afterwards."""
    base = tar(directory(b"etc/"), member(b"etc/old", b"1"), directory(b"etc/keep/"), member(b"etc/keep/x", b"2"))
    marker, child, parent = (
        member(b"etc/.wh..wh..opq", mode=0),
        member(b"etc/new", b"3"),
        directory(b"etc/", mode=0o711),
    )
    for order in ([parent, marker, child], [parent, child, marker], [marker, child, parent]):
        result = check(base, tar(*order))
        assert set(result.paths()) == {"etc", "etc/new"}
        assert result.paths()["etc"]["mode"] == 0o711


def test_git_archive(tmp_path: Path) -> None:
    """Its PAX global header holds the commit's name."""
    run("git", "init", "-q", ".", cwd=tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    run("git", "add", "file", cwd=tmp_path)
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    run("git", *identity, "commit", "-q", "-m", "m", cwd=tmp_path)
    run("git", "archive", "-o", "x.tar", "HEAD", cwd=tmp_path)
    result = check((tmp_path / "x.tar").read_bytes())
    assert result.accepted, result.report
    assert result.report["dropped"] == {"comment_dropped": 1}


def test_bazel_style_layer() -> None:
    """No directories declared, epoch 0 or 1980, base-256 nowhere, names with `./`."""
    result = check(
        tar(member(b"./usr/bin/app", b"ELF", mtime=0), member(b"./usr/share/doc/x", b"1", mtime=315_532_800))
    )
    assert set(result.paths()) == {"usr", "usr/bin", "usr/bin/app", "usr/share", "usr/share/doc", "usr/share/doc/x"}


def test_estargz_style_layer() -> None:
    """Per-file gzip members, a table of contents as the last file, and a footer member with an extra field."""
    members = [member(b"ok", b"ok\n"), member(b"stargz.index.json", b"{}"), bytes(1024)]
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % 0
    footer = b"\x1f\x8b\x08\x04" + bytes(5) + b"\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\x00\x00\xff\xff" + bytes(8)
    data = b"".join(gzip.compress(m) for m in members) + footer
    result = check(("tar+gzip", data))
    assert result.accepted, result.report
    assert set(result.paths()) == {"ok", "stargz.index.json"}


def test_large_owner_in_base256() -> None:
    assert check(tar(member(b"f", uid=base256(3_000_000_000, 8)))).tree[0]["uid"] == 3_000_000_000


def test_apk_style_records() -> None:
    result = check(tar(pax((b"APK-TOOLS.checksum.SHA1", b"0" * 40)), member(b"f", b"1")))
    assert result.report["dropped"] == {"vendor_record_dropped": 1}


# ---------------------------------------------------------------- real images


@pytest.mark.root
def test_debian_images_come_out_as_gnu_tar_unpacks_them(demo_families: dict[str, Family], tmp_path: Path) -> None:
    for family in demo_families.values():
        lowers: list[bytes] = []
        for layer in family.layers:
            ran = run_program(layer, _media(layer), lowers, want_tree=layer == family.layers[-1])
            assert ran.code == 0, ran.report
            assert ran.report["warnings"] == []
            lowers.append(ran.manifest)
        plain = [_uncompressed(layer, tmp_path / f"{family.name}-{layer.stem}") for layer in family.layers]
        unpack(plain, tmp_path / family.name)
        expected = dict(read_tree(tmp_path / family.name))
        found = _records(ran.tree)
        root = found.pop(".", None) or expected["."]  # no layer need declare it
        expected.pop(".")
        assert root.kind == "dir"
        assert differences(expected, found) == []


def _media(layer: Path) -> str:
    return {".gz": "tar+gzip", ".zst": "tar+zstd"}.get(layer.suffix, "tar")


def _uncompressed(layer: Path, to: Path) -> Path:
    if layer.suffix == ".tar":
        return layer
    command = {".gz": "gzip", ".zst": "zstd"}[layer.suffix]
    with to.open("wb") as out:
        subprocess.run([command, "-dc", str(layer)], stdout=out, check=True)
    return to


def _records(rows: list[dict[str, Any]]) -> dict[str, Record]:
    """Return a listing in the form of the reference."""
    names: dict[str, list[str]] = {}
    by_path = {row["path"]: row for row in rows}
    for row in rows:
        if row["type"] == "hardlink":
            names.setdefault(row["link"], [row["link"]]).append(row["path"])
    found = {}
    for path, row in by_path.items():
        first = row["link"] if row["type"] == "hardlink" else path
        source = by_path[first]
        found[path] = Record(
            kind=source["type"],
            mode=f"{source['mode']:o}",
            uid=source["uid"],
            gid=source["gid"],
            size=source.get("size"),
            sha256=source.get("sha256"),
            target=source.get("target"),
            links=tuple(sorted(names.get(first, ()))),
            mtime=None if source["type"] == "dir" else f"{source['mtime']}.{source.get('mtime_ns', 0):09d}0",
            xattrs=tuple(sorted(source.get("xattrs", {}).items())),
        )
    return found
