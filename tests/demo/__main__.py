"""The main job of imgpull on real input, end to end, as an ordinary user: ``make demo``.

Rule: what is told is checked; a demo that ends with 0 has shown what the README promises.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from tests.demo.hostile import write_escape
from tests.demo.processes import Watcher
from tests.demo.stage import (
    BUCKET,
    FOLDER,
    HELPER,
    StageError,
    empty_stage,
    ignore_signals,
    ordinary_user,
    s3_server,
    unwind_on_signals,
    upload,
)  # fmt: skip
from tests.demo.tell import BOLD, PLAIN, DemoError, Teller, check, type_as
from tests.layers.families import Family, families
from tests.servers.swift import Swift
from tests.setup.installed import installed_copy
from tests.support.accounts import Account, client_group
from tests.support.helper import Helper, device_mapper_is_there, loops_below, mounts_below, running_helper
from tests.support.reference import differences, read_device, read_tree, unpack

TOOLS, PYTHON = f"s3://{BUCKET}/images/base-tools", f"s3://{BUCKET}/images/base-python"
EVIL = f"s3://{BUCKET}/images/evil.tar"
REFUSED = 65  # EX_DATAERR of sysexits.h


def main() -> int:
    """Run the demo; return its exit code."""
    if os.geteuid() != 0:
        print("the demo makes a pool and mounts devices: make demo asks sudo for that", file=sys.stderr)
        return 77
    unwind_on_signals()
    teller = Teller()
    try:
        with ExitStack() as stack:
            stack.enter_context(empty_stage())
            try:
                play(teller, stack)
            finally:
                ignore_signals()
        teller.say("stopped and removed: S3 server, root helper, pool, user, files")
        check(not (loops_below(FOLDER) or mounts_below(FOLDER) or FOLDER.exists()), "nothing left behind")
        teller.summary()
    except KeyboardInterrupt:
        print("\ninterrupted; everything is cleaned up", file=sys.stderr)
        return 130
    except (DemoError, StageError) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    return 0


def play(teller: Teller, stack: ExitStack) -> None:
    """Set up, and show one thing after the other."""
    with teller.act("What is set up"):
        copy = installed_copy()
        built = families("demo")
        teller.say(f"program   {copy}/bin/imgpull, installed from a wheel of this tree")
        store = "thin" if device_mapper_is_there() else "reflink"
        why = "has" if store == "thin" else "has no"
        teller.say(f"store     {store}: this kernel ({platform.release()}) {why} device-mapper thin provisioning")
        s3 = stack.enter_context(s3_server())
        teller.say(f"S3        OpenStack Swift with s3api, {s3.endpoint}, signatures checked")
        victim = FOLDER / "victim/precious.txt"
        put_images(teller, s3, built, victim)
        group = stack.enter_context(client_group())
        helper = stack.enter_context(running_helper(HELPER, group, store))
        digest = hashlib.sha256(helper.zipapp.read_bytes()).hexdigest()
        teller.say(
            f"helper    {helper.zipapp.stat().st_size:,} bytes, sha256 {digest[:16]}…, listens on {helper.socket}"
        )
        user = stack.enter_context(ordinary_user(group, environment(copy, s3, helper)))
    show_user(teller, user, s3, helper)
    show_pulls(teller, user, helper)
    device = show_devices(teller, user, {family.name: family for family in built})
    show_refusal(teller, user, victim)
    show_removal(teller, user, device)


def environment(copy: Path, s3: Swift, helper: Helper) -> dict[str, str]:
    """Return what the user's shell has exported."""
    path = f"{copy}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return {"PATH": path, "IMGPULL_HELPER_SOCKET": str(helper.socket), **s3.environment()}


def put_images(teller: Teller, s3: Swift, built: tuple[Family, ...], victim: Path) -> None:
    victim.parent.mkdir(mode=0o777)
    victim.parent.chmod(0o777)  # the attack shall fail by our rules, not for want of permission
    victim.write_text("precious\n")
    victim.chmod(0o666)
    evil = FOLDER / "evil.tar"
    write_escape(evil, victim)
    for key, size_bytes in upload(s3, built, evil):
        teller.say(f"{size_bytes:>13,} bytes  s3://{BUCKET}/{key}")


def show_user(teller: Teller, user: Account, s3: Swift, helper: Helper) -> None:
    with teller.act("Who runs it: an ordinary user, in the group that may ask the helper"):
        type_as(user, ["id"])
        exported = {"AWS_ENDPOINT_URL": s3.endpoint, "IMGPULL_HELPER_SOCKET": str(helper.socket)}
        for name, value in exported.items():
            print(f"{BOLD}{user.name}$ export {name}={value}{PLAIN}")
        type_as(user, ["imgpull", "doctor"])


def show_pulls(teller: Teller, user: Account, helper: Helper) -> None:
    watcher = Watcher(user.uid, helper.listener_pid)
    with teller.act("A pull: fetched, checked, committed, activated"):
        type_as(user, ["imgpull", "pull", TOOLS], meanwhile=watcher.look)
    with teller.act("Who did what: the processes of that pull"):
        table = watcher.table()
        teller.say(*table)
        for program in ("unpriv.fetch", "unpriv.check", "imgpull-helper serve"):
            check(any(program in line for line in table), f"{program} was seen at work")
    with teller.act("The same pull again: nothing to do"):
        before = json.loads(user.run("imgpull", "runs", "--json").stdout)
        type_as(user, ["imgpull", "pull", TOOLS])
        check(json.loads(user.run("imgpull", "runs", "--json").stdout) == before, "no new run was recorded")
    with teller.act("A second image: its shared layers are here already"):
        type_as(user, ["imgpull", "pull", PYTHON])
        type_as(user, ["imgpull", "ls"])
        type_as(user, ["imgpull", "show", PYTHON])
        type_as(user, ["imgpull", "pool"])


def show_devices(teller: Teller, user: Account, built: dict[str, Family]) -> str:
    with teller.act("Activation: a device of one's own, and a command run in its root filesystem"):
        device = type_as(user, ["imgpull", "activate", TOOLS, "--name", "mine"]).strip()
        check(Path(device).is_block_device() and may_write(user, device), f"{user.name} may write to {device}")
        check(not may_write(nobody(), device), f"nobody else may write to {device}")
        type_as(user, ["ls", "-l", device])
        type_as(user, ["imgpull", "ls", "--activations"])
        in_image(device, "cat /etc/os-release | head -2; dpkg -l | wc -l; ls -l /usr/bin/su; getcap /usr/bin/ping")
        second = user.run("imgpull", "activate", PYTHON, "--name", "py").stdout.strip()
        in_image(second, "python3 /home/app/hello.py")
    with teller.act("Not one difference from what GNU tar makes of the same layers"):
        for name, path in (("base-tools", device), ("base-python", second)):
            count = compare(built[name], path)
            teller.say(f"{name}: {count:,} entries equal: type, mode, owner, size, sha256, links, mtime, capabilities")
    return device


def may_write(account: Account, device: str) -> bool:
    """Tell whether a user can open a device for writing, by doing so."""
    script = "import os, sys; os.open(sys.argv[1], os.O_RDWR)"
    return account.run("/usr/bin/python3", "-c", script, device, check=False).returncode == 0


def nobody() -> Account:
    """Return the user that owns nothing."""
    return Account("nobody", 65534, 65534, Path("/"))


def in_image(device: str, script: str) -> None:
    """Run a command in the root filesystem on ``device``, mounted where only that command sees it."""
    print(
        f"{BOLD}root# mount -o nosuid,nodev {device} /mnt && chroot /mnt sh -c {shlex.quote(script)}{PLAIN}", flush=True
    )
    _mounted(device, ["chroot", "/mnt", "/bin/sh", "-euc", script])


def _mounted(device: str, command: list[str]) -> None:
    """Run a command with ``device`` on /mnt in a mount namespace of its own; nothing stays mounted."""
    mount = f"mount -o nosuid,nodev {shlex.quote(device)} /mnt && {shlex.join(command)}"
    finished = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", mount],
        check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    check(finished.returncode == 0, f"exit code 0 of {command}, got {finished.returncode}")


def compare(family: Family, device: str) -> int:
    """Return how many entries of the device equal the reference; one difference ends the demo."""
    reference = FOLDER / "reference"
    unpack(family.layers, reference)
    expected = read_tree(reference)
    shutil.rmtree(reference)
    found = differences(expected, read_device(device))
    check(not found, f"no difference, got {len(found)}: {found[:5]}")
    return len(expected)


def show_refusal(teller: Teller, user: Account, victim: Path) -> None:
    with teller.act("A hostile tarball: refused by name, its victim untouched"):
        before = victim.read_bytes(), victim.stat().st_mtime_ns
        type_as(user, ["tar", "--list", "--verbose", "--file", str(FOLDER / "evil.tar")])
        type_as(user, ["imgpull", "pull", EVIL], expected=REFUSED)
        type_as(user, ["cat", str(victim)])
        check((victim.read_bytes(), victim.stat().st_mtime_ns) == before, f"{victim} is untouched")
        check(EVIL not in user.run("imgpull", "ls").stdout, "the refused image is not listed")


def show_removal(teller: Teller, user: Account, device: str) -> None:
    with teller.act("Everything is given back"):
        for name in ("mine", "py", "base-tools", "base-python"):
            type_as(user, ["imgpull", "deactivate", name])
        check(not may_write(user, device), f"{user.name} may not open {device} any more")
        for image in (TOOLS, PYTHON):
            type_as(user, ["imgpull", "rm", image])
        type_as(user, ["imgpull", "pool"])


if __name__ == "__main__":
    sys.exit(main())
