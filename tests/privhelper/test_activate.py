"""Activations: a device of one's own, and nobody else's."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.privhelper.client import Layer
from tests.privhelper.conftest import MEMBER, OTHER, Installation

pytestmark = pytest.mark.root
LOOP_CLR_FD, LOOP_SET_FD, LOOP_CHANGE_FD = 0x4C01, 0x4C00, 0x4C06


@pytest.fixture
def sealed(installation: Installation, layer: Layer, tmp_path: Path) -> str:
    with installation.connect(MEMBER) as helper:
        assert helper.commit(layer.manifest(), layer.write_payload(tmp_path))["type"] == "ok"
    return layer.id()


def as_user(uid: int, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-I", "-c", script]
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False)


READ = "import os,sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 512, 1024); print('read')"
UNBIND = "import fcntl,os,sys; fcntl.ioctl(os.open(sys.argv[1], os.O_RDWR), 0x4C01); print('unbound')"
RELABEL = """
import fcntl, os, sys
device = os.open(sys.argv[1], os.O_RDWR)
told = bytearray(fcntl.ioctl(device, 0x4C05, bytes(232)))
told[56:120] = b"imgpull: root mounts this".ljust(64, b"\\0")
fcntl.ioctl(device, 0x4C04, bytes(told))
print("relabelled")
"""
OPEN = "import os,sys; os.write(os.open(sys.argv[1], os.O_RDWR), b'mine'); print('opened')"


def activate(helper: Any, layer: str, name: str = "a", mode: str = "rw", size: int = 0) -> dict[str, Any]:
    reply: dict[str, Any] = helper.ask("activate", layer=layer, name=name, mode=mode, size=size)
    return reply


def magic(device: str) -> bytes:
    """Return where ext4 has its magic number."""
    with open(device, "rb") as file:
        return os.pread(file.fileno(), 2, 1080)


def unbind(device: str) -> None:
    """Have its user unbind a loop device; the kernel does so when the last who has it open lets go."""
    assert as_user(MEMBER, UNBIND, device).stdout == "unbound\n"
    while Path(f"/sys/block/{Path(device).name}/loop/backing_file").exists():
        os.sched_yield()


def test_device_is_its_users_and_nobody_elses(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        assert as_user(MEMBER, OPEN, device).stdout == "opened\n"
        assert "PermissionError" in as_user(OTHER, OPEN, device).stderr
        assert helper.ask("deactivate", name="a")["type"] == "ok"
        assert "PermissionError" in as_user(MEMBER, OPEN, device).stderr or not Path(device).exists()


def test_same_activation_again_is_the_same_device(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        first = activate(helper, sealed)
        assert activate(helper, sealed) == first
        assert activate(helper, sealed, mode="ro")["code"] == "busy"
        assert activate(helper, sealed, size=20 << 30)["code"] == "busy"
    with installation.connect(MEMBER) as later:
        assert activate(later, sealed) == first
        (item,) = [item for item in later.ask("list")["items"] if item["kind"] == "activation"]
        assert (item["device"], item["live"], item["name"]) == (first["device"], True, "a")


def test_other_users_activation_cannot_be_seen_used_or_removed(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as victim, installation.connect(OTHER) as attacker:
        device = activate(victim, sealed)["device"]
        assert [item for item in attacker.ask("list")["items"] if item["kind"] == "activation"] == []
        assert attacker.ask("deactivate", name="a")["code"] == "not_found"
        own = activate(attacker, sealed)
        assert own["device"] != device
        assert "PermissionError" in as_user(OTHER, OPEN, device).stderr
        assert attacker.ask("deactivate", name="a")["type"] == "ok"
        assert as_user(MEMBER, OPEN, device).stdout == "opened\n"
        assert attacker.ask("remove", layer=sealed)["code"] == "refused"
        assert victim.ask("stat", layer=sealed)["state"] == "sealed"


def test_what_is_written_stays_in_the_activation(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        with open(device, "r+b") as file:
            file.seek(4 << 20)
            file.write(b"X" * (8 << 20))
        fresh = activate(helper, sealed, "b")["device"]
        with open(fresh, "rb") as file:
            file.seek(4 << 20)
            assert file.read(8 << 20) != b"X" * (8 << 20)
        assert helper.ask("verify", layer=sealed)["type"] == "ok"


def test_read_only_activation_is_a_mount_in_nobodys_table(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        reply = activate(helper, sealed, mode="ro")
        (mount,) = reply["fds"]
        flags = os.fstatvfs(mount).f_flag
        assert flags & os.ST_RDONLY and flags & os.ST_NOSUID and flags & os.ST_NODEV and flags & os.ST_NOEXEC
        passwd = os.open("etc/passwd", os.O_RDONLY, dir_fd=mount)
        assert os.read(passwd, 99) == b"root:x:0:0\n"
        with pytest.raises(OSError, match="Read-only"):
            os.open("etc/new", os.O_CREAT | os.O_WRONLY, dir_fd=mount)
        assert reply["device"] not in Path("/proc/self/mountinfo").read_text()
        assert "PermissionError" in as_user(MEMBER, OPEN, reply["device"]).stderr
        assert as_user(MEMBER, READ, reply["device"]).stdout == "read\n"
        assert "PermissionError" in as_user(OTHER, READ, reply["device"]).stderr
        os.close(passwd)
        again = activate(helper, sealed, mode="ro")
        assert again["device"] == reply["device"]
        os.close(again["fds"][0])
        os.close(mount)
        assert helper.ask("deactivate", name="a")["type"] == "ok"


def test_device_in_use_is_busy_then_goes(installation: Installation, sealed: str) -> None:
    installation.configure("[reflink]\nwait_s = 0\n")
    with installation.connect(MEMBER) as helper:
        mount = activate(helper, sealed, mode="ro")["fds"][0]
        assert helper.ask("deactivate", name="a")["code"] == "busy"
        os.close(mount)
        assert helper.ask("deactivate", name="a")["type"] == "ok"


def test_larger_device(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        reply = activate(helper, sealed, size=20 << 30)
        assert reply["size"] == 20 << 30
        size = subprocess.run(["blockdev", "--getsize64", reply["device"]], capture_output=True, text=True, check=True)
        assert int(size.stdout) == 20 << 30
        assert activate(helper, sealed, "small", size=1 << 20)["code"] == "refused"
        assert activate(helper, sealed, "large", size=2 << 40)["code"] == "refused"


def test_quota_of_activations(installation: Installation, sealed: str) -> None:
    installation.configure("[quota]\nactivations = 2\nactivation_bytes = 25000000000\n")
    with installation.connect(MEMBER) as helper, installation.connect(OTHER) as other:
        assert activate(helper, sealed, "a")["type"] == "ok"
        reply = activate(helper, sealed, "b", size=20 << 30)
        assert (reply["code"], reply["rule"]) == ("refused", "quota")
        assert reply["figures"] == {"used": 10 << 30, "asked": 20 << 30, "limit": 25_000_000_000}
        assert activate(helper, sealed, "b")["type"] == "ok"
        assert activate(helper, sealed, "c")["figures"] == {"used": 2, "asked": 1, "limit": 2}
        assert activate(other, sealed, "a")["type"] == "ok"


def test_quota_of_layers(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    installation.configure("[quota]\nlayer_bytes = 1000\n")
    with installation.connect(MEMBER) as helper:
        reply = helper.commit(layer.manifest(), layer.write_payload(tmp_path))
        assert (reply["code"], reply["rule"]) == ("refused", "quota")
        nothing = Layer()
        nothing.directory(0, "", op="meta")
        reply = helper.commit(nothing.manifest(), nothing.write_payload(tmp_path))
        assert reply["rule"] == "quota", "a layer without content is not free: any number of them could be made"
    assert installation.rows() == []


def test_layer_goes_with_the_last_claim(installation: Installation, sealed: str, layer: Layer, tmp_path: Path) -> None:
    with installation.connect(MEMBER) as first, installation.connect(OTHER) as second:
        assert second.commit(layer.manifest(), layer.write_payload(tmp_path))["existed"] is True
        assert first.ask("remove", layer=sealed)["removed"] is False
        assert installation.rows()[0]["uid"] == OTHER  # its quota carries it now
        assert first.ask("remove", layer=sealed)["code"] == "refused"
        assert second.ask("remove", layer=sealed)["removed"] is True
        assert second.ask("remove", layer=sealed)["removed"] is False


def test_manifest_comes_back_read_only(installation: Installation, sealed: str, layer: Layer) -> None:
    with installation.connect(OTHER) as helper:
        (file,) = helper.ask("manifest", layer=sealed)["fds"]
        assert os.pread(file, 1 << 20, 0) == layer.manifest()
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        reopen = "import os,sys; os.open('/proc/self/fd/'+sys.argv[1], os.O_RDWR)"
        command = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", sys.executable, "-c", reopen]
        done = subprocess.run([*command, str(file)], pass_fds=[file], capture_output=True, text=True, check=False)
        assert "PermissionError" in done.stderr
        os.close(file)


def test_manifest_that_somebody_keeps_open_keeps_no_bytes(installation: Installation, sealed: str) -> None:
    """Else a member could fill the disk under the ledger with manifests of layers that are gone."""
    with installation.connect(MEMBER) as helper:
        (file,) = helper.ask("manifest", layer=sealed)["fds"]
        assert os.fstat(file).st_size > 0
        assert helper.ask("remove", layer=sealed)["removed"] is True
        assert os.fstat(file).st_size == 0
        os.close(file)


def test_error_of_the_host_names_no_path_of_it(installation: Installation, sealed: str) -> None:
    (row,) = installation.rows()
    (installation.state / f"pool/{row['dev']}.img").unlink()
    with installation.connect(MEMBER) as helper:
        reply = activate(helper, sealed)
        assert (reply["code"], "No such file" in reply["message"]) == ("fault", True)
        assert "/" not in reply["message"]
        assert str(installation.state) in helper.log()
        assert helper.ask("reconcile")["type"] == "ok"


def test_owner_who_swaps_the_file_behind_his_loop_device_gains_nothing(
    installation: Installation, sealed: str, tmp_path: Path
) -> None:
    """loop(4) lets who may write a node unbind it and bind a file of his own: the helper must not take it for ours."""
    mine = tmp_path / "mine.img"
    mine.write_bytes(b"\0" * (1 << 20))
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        with open(device, "r+b") as loop:
            fcntl.ioctl(loop, LOOP_CLR_FD)
        with open(device, "r+b") as loop, mine.open("r+b") as file:
            fcntl.ioctl(loop, LOOP_SET_FD, file.fileno())
        (item,) = [item for item in helper.ask("list")["items"] if item["kind"] == "activation"]
        assert item["live"] is False
        again = activate(helper, sealed)["device"]
        assert as_user(MEMBER, OPEN, again).stdout == "opened\n"
        assert list(installation.loops().values()) == [again]
    assert mine.read_bytes() == b"\0" * (1 << 20)


def test_loop_device_that_its_user_unbinds_is_taken_back(installation: Installation, sealed: str) -> None:
    """The node would stay open to him when the next program gets that number, and devices would pile up without end."""
    with installation.connect(MEMBER) as helper:
        for _ in range(3):
            device = activate(helper, sealed)["device"]
            unbind(device)
        activate(helper, sealed)
        assert len(installation.marks()) == 1
        (device,) = installation.loops().values()
        unbind(device)
        with open(device, "rb"):  # whoever keeps it open holds a node that nothing will ever stand behind
            assert helper.ask("deactivate", name="a")["type"] == "ok"
            assert "PermissionError" in as_user(MEMBER, READ, device).stderr
        assert helper.ask("reconcile")["type"] == "ok"
    assert installation.marks() == []


def test_label_that_its_user_gives_his_device_means_nothing(installation: Installation, sealed: str) -> None:
    """LOOP_SET_STATUS64 asks for no capability of who may write: name, offset and size are his to say."""
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        assert as_user(MEMBER, RELABEL, device).stdout == "relabelled\n"
        (item,) = [item for item in helper.ask("list")["items"] if item["kind"] == "activation"]
        assert (item["device"], item["live"]) == (device, True)
        assert activate(helper, sealed)["device"] == device
        assert len(installation.loops()) == 1


def test_nobody_asks_what_stands_behind_the_device_of_another(
    installation: Installation, sealed: str, tmp_path: Path
) -> None:
    """It can be a file of a file system that never answers (FUSE): whoever asks waits for ever, with his locks."""
    trace = tmp_path / "trace"
    with installation.connect(MEMBER) as victim:
        device = activate(victim, sealed)["device"]
        with installation.connect(OTHER, prefix=("strace", "-o", str(trace), "-e", "trace=openat,ioctl")) as helper:
            assert activate(helper, sealed)["type"] == "ok"
            assert helper.ask("list")["type"] == "ok"
            assert helper.ask("reconcile")["actions"] == []
            assert helper.ask("deactivate", name="a")["type"] == "ok"
    text = trace.read_text()
    assert "LOOP_CONFIGURE" in text and "LOOP_CLR_FD" in text
    assert "LOOP_GET_STATUS" not in text and f'"{device}"' not in text


CHANGE = """
import fcntl, os, sys
fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), int(sys.argv[3]), int(sys.argv[2]))
print("changed")
"""


def test_reader_who_changes_the_file_behind_his_device_does_not_reach_roots_mount(
    installation: Installation, sealed: str, tmp_path: Path
) -> None:
    """LOOP_CHANGE_FD asks for no write access: a hostile file system must not come under a mount that root made."""
    mine = tmp_path / "mine.img"
    mine.touch()
    os.truncate(mine, 10 << 30)
    with installation.connect(MEMBER) as helper:
        reply = activate(helper, sealed, mode="ro")
        file = os.open(mine, os.O_RDONLY)
        command = ["setpriv", f"--reuid={MEMBER}", f"--regid={MEMBER}", "--clear-groups", sys.executable, "-I", "-c"]
        done = subprocess.run(
            [*command, CHANGE, reply["device"], str(file), str(LOOP_CHANGE_FD)],
            pass_fds=[file], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == "changed\n", done.stderr  # the kernel lets him
        os.close(file)
        (mount,) = reply["fds"]
        Path("/proc/sys/vm/drop_caches").write_text("3")  # so that the next look goes to the device
        passwd = os.open("etc/passwd", os.O_RDONLY, dir_fd=mount)
        assert os.read(passwd, 99) == b"root:x:0:0\n"
        os.close(passwd)
        again = activate(helper, sealed, mode="ro")
        assert magic(again["device"]) == b"\x53\xef", "his own file is taken for ours"
        for fd in (mount, *again["fds"]):
            os.close(fd)
        assert helper.ask("deactivate", name="a")["type"] == "ok"
    assert (installation.loops(), installation.marks()) == ({}, [])


def test_file_of_the_same_name_in_a_namespace_of_ones_own_is_not_taken_for_ours(
    installation: Installation, sealed: str
) -> None:
    """sysfs tells the name of a loop device's file as its binder saw it: a private mount can make it any name."""
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        with open(device, "r+b") as loop:
            fcntl.ioctl(loop, LOOP_CLR_FD)
        (image,) = {f"{installation.state}/pool/{row['dev']}.img" for row in installation.rows() if row["name"] == "a"}
        script = f"mount -t tmpfs none {installation.state}/pool && truncate -s 1M {image} && losetup {device} {image}"
        command = ["unshare", "--mount", "sh", "-c", f"{script} && echo bound && read end"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as namespace:
            assert namespace.stdout is not None
            assert namespace.stdout.readline() == "bound\n"
            assert Path(f"/sys/block/{Path(device).name}/loop/backing_file").read_text() == image + "\n"
            (item,) = [item for item in helper.ask("list")["items"] if item["kind"] == "activation"]
            assert item["live"] is False
            assert magic(activate(helper, sealed)["device"]) == b"\x53\xef"  # not the empty file
            namespace.communicate("end\n")


def test_no_device_number_is_used_while_somebody_holds_it_open(installation: Installation, sealed: str) -> None:
    """The attack: unbind one's own device, keep the number open, wait until root puts a layer behind it, write."""
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        number = int(device.removeprefix("/dev/loop"))
        with open(device, "r+b") as loop:
            fcntl.ioctl(loop, LOOP_CLR_FD)
        held = os.open(device, os.O_RDWR)  # unbound now, still the attacker's node
        assert helper.ask("deactivate", name="a")["type"] == "ok"
        upper = Layer(sealed)
        upper.file(0, "new", b"n" * 100_000)
        seen = []
        payload = upper.write_payload(installation.folder)
        for _ in range(5):
            assert helper.commit(upper.manifest(), payload)["type"] == "ok"
            seen.append(activate(helper, upper.id(), "b")["device"])
            assert helper.ask("deactivate", name="b")["type"] == "ok"
            assert helper.ask("remove", layer=upper.id())["removed"] is True
        assert f"/dev/loop{number}" not in seen
        assert os.pread(held, 512, 0) == b""
        os.close(held)
        assert len(helper.ask("reconcile")["actions"]) == 1  # only now can the number go
        payload.unlink()


def test_user_can_neither_hand_his_node_on_nor_lock_root_out(installation: Installation, sealed: str) -> None:
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        assert (os.stat(device).st_uid, os.stat(device).st_mode & 0o007) == (0, 0)
        assert "PermissionError" in as_user(MEMBER, "import os,sys; os.chmod(sys.argv[1], 0o666)", device).stderr
        as_user(MEMBER, "import os,sys; os.removexattr(sys.argv[1], 'system.posix_acl_access')", device)
        assert as_user(MEMBER, OPEN, device).stdout == "opened\n"
        assert helper.ask("deactivate", name="a")["type"] == "ok"


def test_activation_after_a_reboot_finds_what_was_written(installation: Installation, sealed: str) -> None:
    """After a reboot the loop devices are gone and the rows are there: the same call brings the same content back."""
    with installation.connect(MEMBER) as helper:
        device = activate(helper, sealed)["device"]
        with open(device, "r+b") as file:
            file.write(b"kept")
    subprocess.run(["losetup", "-d", device], check=True)
    installation.run("pool", "detach")
    with installation.connect(MEMBER) as helper:
        reply = activate(helper, sealed)
        assert (reply["code"], "pool attach" in reply["message"]) == ("pool", True)
        assert helper.ask("deactivate", name="a")["code"] == "pool"
    installation.run("pool", "attach")
    with installation.connect(MEMBER) as helper:
        with open(activate(helper, sealed)["device"], "rb") as file:
            assert file.read(4) == b"kept"
