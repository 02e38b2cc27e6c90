"""What a user sees of S3: the whole command with the real fetcher, against servers that say no in every way."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import Any, Final

import pytest

from broker import worker
from tests.servers import moto, swift
from tests.servers.faults import ALWAYS, Object, Request, Server, Wire, in_thread
from tests.support.world import World
from tests.support.world import world as world

REAL_FETCHER: Final = worker.FETCH
REF: Final = "s3://layers/images/one"
DATA: Final = os.urandom(100_000)


@pytest.fixture
def user(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a user whose fetcher is the real one; checker and root are stand-ins."""
    monkeypatch.setattr(worker, "FETCH", REAL_FETCHER)
    world.environ.update(
        AWS_ACCESS_KEY_ID="AKIDEXAMPLE", AWS_SECRET_ACCESS_KEY="secret", AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )  # fmt: skip
    return world


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[swift.Swift]:
    with swift.running(tmp_path_factory.mktemp("swift")) as running:
        client = running.client()
        client.create_bucket(Bucket="layers")
        for number in (1, 2):
            client.put_object(Bucket="layers", Key=f"images/one/{number}.tar", Body=DATA + bytes([number]))
        yield running
        client.close()


@dataclass(frozen=True, slots=True)
class Case:
    """A way to ask, and what comes of it."""

    exit_code: int
    says: str
    environment: dict[str, str]
    options: tuple[str, ...] = ()
    ref: str = REF


CASES: Final = {
    "signed": Case(0, "2 layers", {}),
    "wrong region": Case(0, "2 layers", {"AWS_DEFAULT_REGION": "eu-north-1"}),
    "anonymous": Case(77, "takes no unsigned requests", {}, ("--no-sign-request",)),
    "wrong secret": Case(77, "does not accept these credentials", {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}),
    "unknown key": Case(77, "does not accept these credentials", {"AWS_ACCESS_KEY_ID": "test:nobody"}),
    "no credentials": Case(77, "set AWS_PROFILE", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}),
    "no such profile": Case(78, "nobody", {}, ("--profile", "nobody")),
    "no such image": Case(66, "images/none", {}, ref="s3://layers/images/none"),
    "no such key": Case(66, "NoSuchKey", {}, ref=f"{REF}/3.tar"),
    "no such bucket": Case(66, "NoSuchBucket", {}, ref="s3://nowhere/images/one"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_answer_of_swift_has_its_exit_code_and_one_line(name: str, store: swift.Swift, user: World) -> None:
    case = CASES[name]
    user.environ.update({**store.environment(), **case.environment})
    code, _, err = user.run("pull", case.ref, *case.options)
    assert (code, case.says in err) == (case.exit_code, True), err
    if code:
        assert re.fullmatch(r"imgpull: .+\n(  why:  .+\n)?  next: .+\n", err), err
        assert "secret" not in err.lower() and "Traceback" not in err
        assert user.helper.layers == {}


MOTO: Final = {  # which asks for a signature and looks at none
    "signed": Case(0, "2 layers", {}),
    "anonymous": Case(77, "s3://layers/images/one/1.tar", {}, ("--no-sign-request",)),
    "no such image": Case(66, "images/none", {}, ref="s3://layers/images/none"),
    "no such key": Case(66, "NoSuchKey", {}, ref=f"{REF}/3.tar"),
    "no such bucket": Case(66, "NoSuchBucket", {}, ref="s3://nowhere/images/one"),
}


@pytest.mark.parametrize("name", MOTO)
def test_each_answer_of_moto_has_its_exit_code_and_one_line(name: str, user: World) -> None:
    case = MOTO[name]
    with moto.running() as url:
        found = swift.Swift(url)  # its client serves any server
        client = found.client()
        client.create_bucket(Bucket="layers")
        for number in (1, 2):
            client.put_object(Bucket="layers", Key=f"images/one/{number}.tar", Body=DATA + bytes([number]))
        client.close()
        user.environ.update(AWS_ENDPOINT_URL=url)
        code, _, err = user.run("pull", case.ref, *case.options)
    assert (code, case.says in err) == (case.exit_code, True), err
    if code:
        assert re.fullmatch(r"imgpull: .+\n(  why:  .+\n)?  next: .+\n", err), err
        assert user.helper.layers == {}


FAULTS: Final = {
    "token_expired": (77, "credentials"),
    "denied": (77, ""),
    "clock_skew": (78, "clock"),
    "not_http": (69, ""),
    "status_503": (69, "busy"),
    "deleted": (66, "NoSuchKey"),
    "redirect_to_link_local": (69, "redirects, which is not followed"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_bad_day_has_its_exit_code_and_one_line(name: str, user: World) -> None:
    expected, word = FAULTS[name]
    with in_thread(Server()) as server:
        server.objects["layers/images/one/1.tar"] = Object(DATA, name, times=ALWAYS)
        user.environ.update(AWS_ENDPOINT_URL=server.url, AWS_MAX_ATTEMPTS="1")
        code, _, err = user.run("pull", REF)
    assert (code, word in err) == (expected, True), err
    assert re.fullmatch(r"imgpull: .+\n(  why:  .+\n)?  next: .+\n", err), err


class Replacing(Server):
    """Somebody uploads another second layer while the first request for its bytes is answered."""

    NAME: Final = "layers/images/one/2.tar"

    def __init__(self) -> None:
        super().__init__()
        self.replaced = False

    async def get(self, wire: Wire, request: Request, found: Object) -> None:
        if found is self.objects[self.NAME] and not self.replaced:
            self.replaced = True
            self.objects[self.NAME] = Object(DATA[::-1])
            found = self.objects[self.NAME]
        await super().get(wire, request, found)


def test_object_that_is_replaced_during_the_pull_is_pulled_as_it_is_now(user: World) -> None:
    with in_thread(Replacing()) as server:
        server.objects["layers/images/one/1.tar"] = Object(b"first")
        server.objects[Replacing.NAME] = Object(DATA)
        user.environ.update(AWS_ENDPOINT_URL=server.url, IMGPULL_PROGRESS="plain")
        code, _, err = user.run("pull", REF)
    assert code == 0, err
    assert "the object changed" in err and f"resolving {REF} again" in err
    assert blobs(user) == {b"first", DATA[::-1]}
    (etag,) = user.query("SELECT etag FROM image_layer WHERE number = 2")
    assert etag == (f'"{md5(DATA[::-1]).hexdigest()}"',)


def test_object_that_changes_all_the_time_ends_with_75(user: World) -> None:
    with in_thread(Server()) as server:
        server.objects["layers/images/one/1.tar"] = Object(DATA, "replaced", times=ALWAYS)
        user.environ.update(AWS_ENDPOINT_URL=server.url)
        code, _, err = user.run("pull", REF)
    assert code == 75 and "the object changed" in err, err
    assert user.query("SELECT count(*) FROM image") == [(0,)]


def blobs(user: World) -> set[bytes]:
    found: Any = (user.paths.blob_dir / "sha256").iterdir()
    return {Path(path).read_bytes() for path in found}
