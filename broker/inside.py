"""Runs a command inside an image: its working directory is a read-only mount that no path reaches.

Rule 1: the device that was made for the command goes with it; one that stood before stays.
Rule 2: whatever this process dies of, the mark (broker/temporary.py) lets the next imgpull take the device back.
Rule 3: the terminal's signals are the command's; what is sent to imgpull alone is passed on. Source: unshare(1).
"""

import os
import signal
import subprocess
import sys
from contextlib import closing
from typing import Final

from broker import console, helper, store, temporary, work
from broker.errors import ImgpullError
from broker.pull import Activated
from broker.settings import Settings
from broker.store import Image, Paths

OF_THE_TERMINAL: Final = (signal.SIGINT, signal.SIGQUIT)  # it sends them to the command as well
PASSED_ON: Final = (signal.SIGTERM, signal.SIGHUP)


def run_inside(settings: Settings, image: Image, name: str, command: list[str]) -> int:
    """Run a command inside an image, by a device of this name. Returns: its exit code.

    Raises: ImgpullError.
    """
    marks = Paths.of(settings).mark_dir
    if _stands(settings, name) and not temporary.is_marked(marks, name):
        return _run(settings, work.activate(settings, image, name, "ro", 0), command)
    with temporary.held(marks, name) as lock:
        try:
            given = work.activate(settings, image, name, "ro", 0)
        except ImgpullError as error:
            if error.problem.code != "interrupted":
                temporary.forget(marks, name)  # there is no device of this name, or it is not the command's
            raise
        try:
            return _run(settings, given, command, lock)
        finally:
            _give_back(settings, name)


def _stands(settings: Settings, name: str) -> bool:
    connection = store.open_readonly(Paths.of(settings).database)
    if connection is None:
        return False
    with closing(connection) as db:
        return store.activation(db, name) is not None


def _give_back(settings: Settings, name: str) -> None:
    """Take the command's device back; where that cannot be done now, the mark stays and says that it has to be."""
    try:
        work.deactivate(settings, name)
    except ImgpullError as error:
        if error.problem.code != "no-such-activation":
            why = console.escape(error.problem.what)
            print(f"imgpull: the device {name} is taken back by a later command: {why}", file=sys.stderr)


def _run(settings: Settings, given: Activated, command: list[str], *locks: int) -> int:
    async def ask() -> int:
        async with helper.connect(settings.helper_socket) as root:
            again = await root.activate(given.layer, given.name, given.mode, 0)
        if again.mount_fd is None:
            raise ImgpullError("bug", "the helper gave no mount for a read-only activation")
        return again.mount_fd

    mount = work.run(ask)
    try:
        return _wait_for(command, mount, locks)
    finally:
        os.close(mount)


def _wait_for(command: list[str], mount: int, locks: tuple[int, ...]) -> int:
    """Run the command in the mount until it ends, whatever signals come. Returns: its exit code, 128+N for signal N."""
    place = f"/proc/self/fd/{mount}"
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _: object) -> None:
        for process in started:
            process.send_signal(number)
        if not started:
            early.append(number)

    # Handlers, unlike ignored signals, are not inherited: the command starts with the defaults.
    handlers = {number: lambda *_: None for number in OF_THE_TERMINAL} | dict.fromkeys(PASSED_ON, pass_on)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        environment = {**os.environ, "IMGPULL_MOUNT": place}
        started.append(subprocess.Popen(command, cwd=place, pass_fds=(mount, *locks), env=environment))
        for number in early:
            started[0].send_signal(number)
        code = started[0].wait()
    except OSError as error:
        raise ImgpullError("usage", f"{command[0]}: {os.strerror(error.errno or 0).lower()}") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
