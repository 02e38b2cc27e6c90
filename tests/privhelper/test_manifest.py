"""Root's own reading of a manifest: the vectors that both sides judge, and arbitrary bytes."""

import json
import os
import shutil
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privhelper import manifest, populate, protocol, verify
from privhelper.manifest import RejectedError
from tests.contract.manifests import (
    DIR,
    ENTER,
    FILE,
    LINK,
    PAYLOAD,
    PAYLOAD_VECTORS,
    REMOVE,
    ROOT,
    SYMLINK,
    VECTORS,
    Vector,
    encode,
)  # fmt: skip
from tests.contract.manifests import manifest as whole
from tests.privhelper.client import ROOT as ROOT_FOLDER
from tests.privhelper.client import memfd

SETTINGS = tomllib.loads((ROOT_FOLDER / "policy/helper.toml").read_text())
EXAMPLES = int(os.environ.get("IMGPULL_FUZZ_EXAMPLES", "2000"))


class Ground:
    """A folder that stands for the file system, beside a victim that must not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = folder / "tree"
        self.victim = folder / "victim"
        self.victim.mkdir()
        (self.victim / "canary").write_text("untouched")
        self.payload = os.open(folder / "payload", os.O_RDWR | os.O_CREAT)
        os.write(self.payload, PAYLOAD)

    def judge(self, data: bytes) -> RejectedError | None:
        """Apply a manifest; return why it was refused. Any other exception is a bug and passes through."""
        self.tree.mkdir()
        root = os.open(self.tree, os.O_RDONLY | os.O_DIRECTORY)
        file = memfd(data)
        umask = os.umask(0)
        writer = populate.Writer(root, self.payload, len(PAYLOAD), SETTINGS, lambda *_: None)
        reader = verify.Reader(root, SETTINGS, lambda *_: None)
        try:
            populate.run(writer, file)
            if b'"op":"remove"' not in data:  # one that undoes itself does not verify
                populate.run(reader, file)
        except RejectedError as error:
            return error
        finally:
            os.umask(umask)
            for level in (*writer.levels[1:], *reader.levels[1:]):  # a child's end closes what a refusal leaves open
                os.close(level.descriptor)
            os.close(root)
            os.close(file)
            assert {path.name for path in self.folder.iterdir()} == {"tree", "victim", "payload"}
            assert {path.name: path.read_text() for path in self.victim.iterdir()} == {"canary": "untouched"}
            shutil.rmtree(self.tree)
        return None


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    found = Ground(tmp_path)
    yield found
    os.close(found.payload)


pytestmark = pytest.mark.root  # owners and file capabilities are set for real


@pytest.mark.parametrize("vector", [*VECTORS, *PAYLOAD_VECTORS], ids=lambda vector: vector.name)
def test_vector(ground: Ground, vector: Vector) -> None:
    refused = ground.judge(vector.manifest)
    assert (refused is None) == vector.accepted, refused and (refused.rule, str(refused))


@pytest.mark.parametrize("field", ["uid", "gid"])
def test_id_that_cannot_be_kept_has_the_name_that_the_checker_warns_with(field: str) -> None:
    rules = tomllib.loads((ROOT_FOLDER / "policy/rules.toml").read_text())
    with pytest.raises(RejectedError, match=f"{protocol.MAX_ID + 1} above {protocol.MAX_ID}") as refused:
        manifest.parse(encode(FILE | {field: protocol.MAX_ID + 1})[:-1], 7)
    assert (refused.value.rule, refused.value.entry) == ("id_above_helper", 7)
    assert "id_above_helper" in rules


def test_memory_does_not_grow_with_a_line() -> None:
    """Invariant tested: an endless line is refused after one chunk, however long it is."""
    file = memfd(b"x" * (64 << 20))
    with pytest.raises(RejectedError, match="65536 bytes or more"):
        list(manifest.lines(file))
    os.close(file)


def test_expression_takes_no_more_than_linear_time() -> None:
    """Invariant tested: no line of the greatest length takes more than a tenth of a second to refuse."""
    for evil in (b'"' + b"\\n" * 30_000, b'"' + b'a\\"' * 20_000, b'"' + b"\\u0000" * 10_000, b"{" * 65_000):
        for start in (
            encode(FILE)[:60],
            encode(DIR)[:60],
            b'{"in":0,"name":',
            b'{"in":0,"name":"l","op":"link","to":[',
        ):
            before = time.process_time()
            with pytest.raises(RejectedError):
                manifest.parse(start + evil, 1)
            assert time.process_time() - before < 0.1


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=400))
def test_fuzz_any_bytes_are_a_line_or_refused(data: bytes) -> None:
    """Invariant tested: any bytes give an Operation or RejectedError, never another error."""
    for start in (b"", b'{"at":', b'{"gid":', b'{"in":0,"name":"'):
        try:
            manifest.parse(start + data, 1)
        except RejectedError:
            continue


VALUES = st.one_of(
    st.integers(-2, 2**66), st.text(max_size=20), st.none(), st.booleans(), st.lists(st.text(max_size=5), max_size=5),
    st.dictionaries(st.text(max_size=12), st.text("0123456789abcdef", max_size=8), max_size=3),
    st.sampled_from(["..", "/", "victim", "../victim", "canary", "d", "f", "s", ""]), st.integers(0, 6),
)  # fmt: skip


@st.composite
def operations(draw: st.DrawFn) -> Any:
    """Draw an operation of the schema, with a few of its values replaced by anything."""
    fields = dict(draw(st.sampled_from([ROOT, DIR, FILE, SYMLINK, LINK, ENTER, REMOVE])))
    fields["in"] = draw(st.integers(0, 5))
    if fields["name"]:
        fields["name"] = draw(st.sampled_from(["a", "d", "f", "s", "l"]))
    if draw(st.integers(0, 5)) == 0:
        fields[draw(st.sampled_from(sorted(fields)))] = draw(VALUES)
    return fields


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(operations(), max_size=8), flip=st.none() | st.tuples(st.integers(0, 900), st.integers(0, 255)))
def test_fuzz_any_manifest_is_a_sealed_layer_or_a_refusal(drawn: list[Any], flip: tuple[int, int] | None) -> None:
    """Invariant tested: a manifest applies and then verifies, or is refused; nothing outside the tree changes."""
    try:
        data = bytearray(whole(*drawn))
    except (TypeError, ValueError):
        return  # `size` was replaced by something that cannot be summed
    if flip is not None:
        data[flip[0] % len(data)] = flip[1]
    folder = Path(f"/dev/shm/imgpull-test-fuzz-{os.getpid()}")
    folder.mkdir()
    ground = Ground(folder)
    try:
        refused = ground.judge(bytes(data))
        assert refused is None or refused.rule != "verify_differs", str(refused)
        if refused is None:
            for text in bytes(data).splitlines()[1:]:
                assert encode(json.loads(text)) == text + b"\n"
    finally:
        os.close(ground.payload)
        shutil.rmtree(folder)
