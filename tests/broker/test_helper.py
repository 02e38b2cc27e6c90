import hashlib
import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from broker import app, helper, settings
from broker.app import sealed_copy
from broker.console import Reporter
from broker.errors import ImgpullError
from tests.broker.fake_helper import FakeHelper, HangUpError, fake_helper
from tests.support import descriptors

LAYER = "sha256:" + "1" * 64


def manifest(content: bytes = b"hello", claimed: bytes | None = None) -> bytes:
    digest = hashlib.sha256(claimed if claimed is not None else content).hexdigest()
    head = {"bytes": len(content), "entries": 1, "format": "imgpull.layer/1", "parent": None}
    file = {"at": 0, "gid": 0, "in": 0, "mode": 420, "mtime": 0, "name": "f", "op": "file", "sha256": digest}
    file |= {"size": len(content), "uid": 0, "xattrs": {}}
    return b"".join(json.dumps(o, sort_keys=True, separators=(",", ":")).encode() + b"\n" for o in (head, file))


async def commit(root: helper.Helper, data: bytes, content: bytes, folder: Path) -> tuple[str, bool]:
    (folder / "manifest").write_bytes(data)
    (folder / "payload").write_bytes(content)
    with (folder / "manifest").open("rb") as plain, (folder / "payload").open("rb") as payload:
        with sealed_copy(plain.fileno()) as sealed:
            return await root.commit(sealed, payload.fileno())


async def test_every_request_gets_its_answer(tmp_path: Path) -> None:
    async with fake_helper(tmp_path) as fake, helper.connect(fake.path) as root:
        assert root.greeting["store"] == "reflink"
        layer, existed = await commit(root, manifest(), b"hello", tmp_path)
        assert layer == f"sha256:{hashlib.sha256(manifest()).hexdigest()}" and not existed
        assert await commit(root, manifest(), b"hello", tmp_path) == (layer, True)
        assert await root.stat(layer) == "sealed"
        assert await root.stat(LAYER) == "absent"
        given = await root.activate(layer, "web", "rw")
        assert (given.device, given.mount_fd) == ("/dev/null", None)
        layers, activations = await root.inventory()
        assert [row["layer"] for row in layers] == [layer]
        assert [row["name"] for row in activations] == ["web"]
        with pytest.raises(ImgpullError) as caught:
            await root.remove(layer)
        assert caught.value.problem.code == "busy"
        await root.deactivate("web")
        assert await root.verify(layer) == (1, 1)
        assert await root.reconcile() == []
        assert await root.remove(layer)
        assert not await root.remove(layer)


async def test_payload_that_changed_after_the_check_is_a_digest_mismatch(tmp_path: Path) -> None:
    async with fake_helper(tmp_path) as fake, helper.connect(fake.path) as root:
        with pytest.raises(ImgpullError) as caught:
            await commit(root, manifest(b"evil!", claimed=b"hello"), b"evil!", tmp_path)
        assert caught.value.problem.exit_code == 65
        assert fake.layers == {}


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("rejected", 65), ("refused", 77), ("not_found", 66), ("no_room", 73), ("busy", 75), ("in_use", 75), ("pool", 69)]
    + [("fault", 74), ("version", 76), ("nonsense", 70)],
)
async def test_every_error_code_has_its_exit_code(code: str, exit_code: int, tmp_path: Path) -> None:
    async with fake_helper(tmp_path) as fake:
        fake.script["deactivate"] = lambda _: fake.error(code, "because", figures={"need_bytes": 7})
        async with helper.connect(fake.path) as root:
            with pytest.raises(ImgpullError) as caught:
                await root.deactivate("web")
    assert caught.value.problem.exit_code == exit_code
    assert "because" in caught.value.problem.what
    assert caught.value.problem.details["figures"] == {"need_bytes": 7}


def _hang_up(_: dict[str, Any]) -> dict[str, Any]:
    raise HangUpError


async def test_helper_that_dies_in_the_middle_is_worth_another_try(tmp_path: Path) -> None:
    async with fake_helper(tmp_path) as fake:
        fake.script["stat"] = _hang_up
        async with helper.connect(fake.path) as root:
            with pytest.raises(ImgpullError) as caught:
                await root.stat(LAYER)
    assert caught.value.problem.code == "helper-unavailable"
    assert caught.value.problem.kind.retryable


async def test_answer_of_no_known_form_is_refused(tmp_path: Path) -> None:
    async with fake_helper(tmp_path) as fake:
        fake.script["stat"] = lambda _: {"type": "surprise"}
        async with helper.connect(fake.path) as root:
            with pytest.raises(ImgpullError, match="hung up"):
                await root.stat(LAYER)


async def test_connection_that_came_back_is_lent_again(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    """The clock stands still but for the jump, so that nothing here depends on how fast this machine is."""
    chosen = settings.load({"helper_socket": ""}, {"HOME": str(tmp_path)}, tmp_path)
    async with fake_helper(tmp_path) as fake:
        chosen.values["helper_socket"] = settings.Value(fake.path, "flag")
        async with app.running(chosen, Reporter()) as ours:
            async with ours.helper() as first, ours.helper() as second:
                assert first is not second, "one connection speaks with one at a time"
            async with ours.helper() as third:
                assert third in (first, second)
            assert fake.connections == 2

            with pytest.raises(ImgpullError):
                async with ours.helper() as failed:
                    await failed.activate(LAYER, "web", "rw")
            async with ours.helper() as fourth:
                assert fourth is not failed and fake.connections == 3

            fake.script["stat"] = _hang_up
            with suppress(ImgpullError):
                await fourth.stat(LAYER)  # the spare one's helper dies
            async with ours.helper() as fifth:
                assert fifth is not fourth and fake.connections == 4

            await trio.testing.wait_all_tasks_blocked()  # whoever is to close it looks at the clock now
            mock_clock.jump(app.SPARE_S)
            await trio.testing.wait_all_tasks_blocked()
            assert fifth._sock.fileno() < 0, "a spare connection is given up"
            async with ours.helper() as sixth:
                assert sixth is not fifth
        assert sixth._sock.fileno() < 0, "nothing is left open at the end"


async def test_missing_socket_says_how_to_start_the_helper(tmp_path: Path) -> None:
    with pytest.raises(ImgpullError) as caught:
        async with helper.connect(str(tmp_path / "none.sock")):
            raise AssertionError("connected to nothing")
    assert caught.value.problem.exit_code == 69
    assert "systemctl enable" in caught.value.problem.lines()[-1]


async def test_silent_helper_is_given_up(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with pytest.raises(ImgpullError) as caught:
            async with helper.connect(str(tmp_path / "s")):
                raise AssertionError("greeted by silence")
    assert caught.value.problem.code == "io-error"


async def test_descriptors_are_not_leaked(tmp_path: Path) -> None:
    async with fake_helper(tmp_path) as fake:
        async with helper.connect(fake.path) as root:
            await commit(root, manifest(), b"hello", tmp_path)
        await trio.testing.wait_all_tasks_blocked(0.05)
        before = descriptors.held()
        for _ in range(3):
            async with helper.connect(fake.path) as root:
                await commit(root, manifest(), b"hello", tmp_path)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert descriptors.held() == before


def test_fake_knows_every_request_of_the_protocol() -> None:
    from privhelper import protocol

    assert {name for name in protocol.REQUESTS if hasattr(FakeHelper, f"on_{name}")} >= set(protocol.REQUESTS) - {
        "manifest"
    }
