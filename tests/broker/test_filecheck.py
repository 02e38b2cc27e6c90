"""`imgpull check` of several files: read at the same time, judged as if one after the other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from broker import filecheck
from broker.errors import ImgpullError
from tests.support import descriptors
from tests.unpriv.checking import check
from tests.unpriv.tarbytes import directory, member, tar

BASE = tar(directory(b"d"), member(b"d/f", b"1"))
UPPER = tar(member(b"d/.wh.f"), member(b"d/g", b"2"))
BAD = tar(member(b"../x"))
LARGE_AND_BAD = tar(member(b"large", bytes(64 << 20)), member(b"../x"))


def files(tmp_path: Path, *layers: bytes) -> list[str]:
    paths = [tmp_path / f"{number}.tar" for number in range(1, len(layers) + 1)]
    for path, layer in zip(paths, layers, strict=True):
        path.write_bytes(layer)
    return [str(path) for path in paths]


def run(names: list[str]) -> list[str]:
    """Check files; return the ids of their layers, and see that nothing is left of the work."""
    before = descriptors.held()

    try:
        return [one.layer for one in filecheck.check(names, with_tree=False, all_violations=False)]
    finally:
        assert descriptors.held() == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_layers_read_at_once_come_out_as_one_after_the_other(tmp_path: Path) -> None:
    layers = [BASE, UPPER, BASE, UPPER, tar(member(b"top", b"3"))]
    expected = [check(*layers[: number + 1]).report["layer"] for number in range(len(layers))]
    assert run(files(tmp_path, *layers)) == expected


def test_the_lowest_refused_layer_is_told_whichever_is_met_first(tmp_path: Path) -> None:
    with pytest.raises(ImgpullError) as caught:
        run(files(tmp_path, LARGE_AND_BAD, BAD))
    assert "1.tar" in caught.value.problem.what


def test_what_stands_on_a_refused_layer_does_not_wait_for_ever(tmp_path: Path) -> None:
    with pytest.raises(ImgpullError) as caught:
        run(files(tmp_path, BASE, BAD, UPPER, BASE))
    assert "2.tar" in caught.value.problem.what


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImgpullError) as caught:
        run([*files(tmp_path, BASE), str(tmp_path / "none.tar"), *files(tmp_path, BASE)])
    assert caught.value.problem.code == "io-error"


def test_all_violations_are_listed_for_people(tmp_path: Path) -> None:
    bad = tar(member(b"../a"), member(b"ok"), member(b"ok"), member(b"z", kind=b"Z"))
    with pytest.raises(ImgpullError) as caught:
        filecheck.check(files(tmp_path, bad), with_tree=False, all_violations=True)
    assert [line.split(": ")[1] for line in caught.value.problem.why.splitlines()[:3]] == [
        "path_escapes_root",
        "duplicate_entry",
        "type_unknown",
    ]
    assert caught.value.problem.why.splitlines()[0].startswith("layer 1, entry 1, byte 0 ../a: ")
    assert caught.value.problem.why.endswith("the list is full")
