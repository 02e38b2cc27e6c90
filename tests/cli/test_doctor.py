"""`imgpull doctor`: what is wrong is found, and told with its remedy."""

import grp
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from broker import doctor
from broker.settings import POLICY_DIR
from tests.support.world import World

ROOT: Final = Path(__file__).resolve().parents[2]
REF: Final = "s3://bucket/images/one"
SOCKET: Final = "imgpull-helper.socket"


def findings(world: World, *words: str) -> dict[str, Any]:
    """Return what was found, by subject."""
    return {row["subject"]: row for row in json.loads(world.run("doctor", *words, "--json")[1])}


@pytest.fixture
def units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which this machine's units lie: those that are shipped."""
    folder = tmp_path / "units"
    shutil.copytree(POLICY_DIR / "systemd", folder)
    monkeypatch.setattr(doctor, "UNIT_FOLDERS", (tmp_path / "etc", folder))
    return folder


def test_sound_machine_has_no_failure(world: World, units: Path) -> None:
    world.put("one", b"a", b"b")
    assert world.run("doctor", REF)[0] == 0
    found = findings(world, REF)
    assert "fail" not in {row["verdict"] for row in found.values()}
    assert found["bucket"]["text"] == f"{REF}: 2 layers, 2 B"
    assert found["root helper"]["verdict"] == found["group"]["verdict"] == found[SOCKET]["verdict"] == "ok"


def test_missing_image_and_helper_are_failures_with_their_remedies(world: World, units: Path) -> None:
    world.environ["IMGPULL_HELPER_SOCKET"] = str(world.folder / "none")
    code, out, _ = world.run("doctor", "s3://bucket/images/absent")
    assert code == 1
    assert "-> as root: `systemctl enable --now imgpull-helper.socket`" in out
    assert "-> check the bucket and the key" in out


@pytest.mark.parametrize(
    ("ahead_s", "verdict", "text"),
    [
        (1, "ok", "agrees with the server's"),
        (-5, "ok", "5 s behind the server's"),
        (6, "warn", "6 s ahead of the server's; S3 refuses from 900 s on"),
        (-899, "warn", "899 s behind the server's; S3 refuses from 900 s on"),
        (900, "fail", "900 s ahead of the server's; S3 refuses from 900 s on"),
    ],
)
def test_clock_is_held_against_the_servers(ahead_s: int, verdict: str, text: str, world: World, units: Path) -> None:
    world.put("one", b"a")
    (world.folder / "clock").write_text(str(ahead_s))
    found = findings(world, REF)["clock"]
    assert (found["verdict"], found["text"]) == (verdict, text)
    assert "timedatectl set-ntp true" in found["remedy"]


def test_clock_is_told_also_where_the_server_refuses(world: World, units: Path) -> None:
    (world.folder / "clock").write_text("5000")
    found = findings(world, "s3://bucket/images/absent")
    assert (found["bucket"]["verdict"], found["clock"]["verdict"]) == ("fail", "fail")


def test_server_that_does_not_tell_the_time_is_not_judged(world: World, units: Path) -> None:
    world.put("one", b"a")
    assert "clock" not in findings(world, REF)


def test_unit_that_was_changed_or_is_missing_is_noticed(world: World, units: Path) -> None:
    (units / SOCKET).write_text("[Socket]\nSocketMode=0666\n")
    assert "differs" in findings(world)[SOCKET]["text"]
    (units / SOCKET).unlink()
    assert SOCKET in findings(world)["units"]["text"]


def test_thin_target_is_missed_only_where_the_store_may_need_it(
    world: World, units: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "KERNEL_MODULES", tmp_path)
    assert findings(world)["device-mapper"]["verdict"] == "ok", "the store is reflink"
    world.environ["IMGPULL_HELPER_SOCKET"] = str(world.folder / "none")
    found = findings(world)["device-mapper"]
    assert (found["verdict"], "modprobe dm-thin-pool" in found["remedy"]) == ("warn", True)
    (tmp_path / "dm_thin_pool").mkdir()
    assert findings(world)["device-mapper"]["verdict"] == "ok"


def test_drop_in_that_changes_a_unit_is_named(world: World, units: Path, tmp_path: Path) -> None:
    folder = tmp_path / "etc" / f"{SOCKET}.d"
    folder.mkdir(parents=True)
    (folder / "open.conf").write_text("[Socket]\nSocketMode=0666\n")
    assert str(folder / "open.conf") in findings(world)[SOCKET]["text"]


@pytest.mark.parametrize(("members", "remedy"), [(["somebody"], "usermod -aG"), (["me", "somebody"], "log in again")])
def test_group_that_this_session_lacks_is_told(
    members: list[str], remedy: str, world: World, units: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.doctor.os.geteuid", lambda: 12345)
    monkeypatch.setattr("broker.doctor.os.getgroups", lambda: [12345])
    monkeypatch.setattr("broker.doctor.os.getegid", lambda: 12345)
    monkeypatch.setattr("broker.doctor.pwd.getpwuid", lambda _: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr("broker.doctor.grp.getgrgid", lambda gid: grp.struct_group(("imgpull", "x", gid, members)))
    found = findings(world)["group"]
    assert (found["verdict"], remedy in found["remedy"]) == ("fail", True)


@pytest.mark.parametrize("words", [["--help"], ["ls"], ["explain", "busy"]])
def test_what_looks_only_loads_no_heavy_library(words: list[str], tmp_path: Path) -> None:
    """Each would cost 50 to 190 ms: the interpreter itself takes about 20."""
    script = (
        "import sys, broker.cli\n"
        f"try: broker.cli.imgpull({words!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'trio', 'pydantic', 'rich', 'boto3', 'broker.work', 'subprocess'} & sys.modules.keys()))"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
