"""The real root helper, started by its socket as systemd would, on a pool of its own.

Rule 1: it is the zipapp that an administrator installs, run by Debian's Python with ``-I -S -B``, root-owned.
Rule 2: everything lies below one folder; when it ends, no process, loop device or mount of it is left, or it says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from privhelper.dm import DeviceMapper

ROOT: Final = Path(__file__).resolve().parents[2]
PYTHON: Final = "/usr/bin/python3"
LISTENER: Final = "listener.pid"
SOCKETS: Final = Path("/run")
START_S: Final = 10.0
STOP_S: Final = 10.0
POOL_BYTES: Final = 4 << 30

Settings = Mapping[str, "str | Mapping[str, object]"]


@dataclass(frozen=True, slots=True)
class Helper:
    """A helper that listens: its socket, and the administrator's side of it."""

    socket: Path
    zipapp: Path
    config: Path
    log: Path
    listener_pid: int

    def administer(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``imgpull-helper WORDS`` as root."""
        return administer(self.zipapp, self.config, *words, check=check)

    def processes(self) -> list[int]:
        """Return the processes that serve a connection now."""
        return children(self.listener_pid)


def device_mapper_is_there() -> bool:
    """Tell whether this kernel offers thin provisioning, after asking for its module."""
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "--quiet", "dm-thin-pool"], check=False, stderr=subprocess.DEVNULL)
    return Path("/sys/module/dm_thin_pool").exists()


@contextlib.contextmanager
def running_helper(
    folder: Path, group: str, store: str = "reflink", settings: Settings | None = None, pool_bytes: int = POOL_BYTES
) -> Iterator[Helper]:
    """Make a pool below ``folder``, which must not exist, listen on a socket for ``group``, and undo both.

    ``settings`` are an administrator's, over those that keep the pool small and below ``folder``.
    """
    folder.mkdir(mode=0o755)
    zipapp, config, log = folder / "imgpull-helper.pyz", folder / "helper.toml", folder / "helper.log"
    build_zipapp(zipapp)
    own: Settings = {"reflink": {"preallocate": False}, "thin": {"name": folder.name}}
    config.write_text(to_toml({"store": store, "state_dir": str(folder / "state"), **own, **(settings or {})}))
    config.chmod(0o644)
    size = {
        "reflink": ("--size", str(pool_bytes)),
        "thin": ("--data-bytes", str(pool_bytes), "--metadata-bytes", str(64 << 20)),
    }
    administer(zipapp, config, "pool", "create", *size[store])
    try:
        with listening(folder.name, group, zipapp, config, log) as (socket, pid):
            yield Helper(socket, zipapp, config, log, pid)
    finally:
        release_devices(folder)
        detached = administer(zipapp, config, "pool", "detach", check=False)
        left = [*loops_below(folder), *mounts_below(folder)]
        mend(folder)
        if detached.returncode or left:
            raise RuntimeError(f"pool detach ended with {detached.returncode}, {detached.stderr.strip()}; left: {left}")


def release_devices(folder: Path) -> None:
    """Take back the devices that users were given and did not give back; the pool's own stay."""
    for loop in loops_below(folder / "state/pool"):
        subprocess.run(["losetup", "--detach", loop], check=True)
        with contextlib.suppress(OSError):  # its node outlives it, and shall not stay open to the user
            os.removexattr(loop, "system.posix_acl_access")
        os.chown(loop, 0, 0)
    for mapped in Path("/sys/block").glob("dm-*/dm/name"):
        name = mapped.read_text().strip()
        if re.fullmatch(rf"{re.escape(folder.name)}-\d+", name):
            DeviceMapper().remove(name, STOP_S)


def mend(folder: Path) -> None:
    """Undo what a ``running_helper`` that was killed left in ``folder``; its processes end with their listener."""
    zipapp, config, listener = folder / "imgpull-helper.pyz", folder / "helper.toml", folder / LISTENER
    if listener.exists():
        _kill_listener(int(listener.read_text()), zipapp)
    release_devices(folder)
    if config.exists():
        administer(zipapp, config, "pool", "detach", check=False)
    for point in mounts_below(folder):
        subprocess.run(["umount", point], check=False)
    for loop in loops_below(folder):
        subprocess.run(["losetup", "--detach", loop], check=False)
    shutil.rmtree(SOCKETS / folder.name, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _kill_listener(pid: int, zipapp: Path) -> None:
    """End the listener that an earlier run started, if that process id is still it."""
    with contextlib.suppress(OSError):
        if os.fsencode(zipapp) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def listening(name: str, group: str, zipapp: Path, config: Path, log: Path) -> Iterator[tuple[Path, int]]:
    """Start a helper process for each connection to /run/NAME/helper.sock; end all of them."""
    directory = SOCKETS / name
    directory.mkdir(mode=0o750)
    try:
        # Closed to others before the socket is there: systemd-socket-activate cannot be told a mode.
        shutil.chown(directory, "root", group)
        socket = directory / "helper.sock"
        command = ["systemd-socket-activate", "--accept", "--seqpacket", f"--listen={socket}",
                   PYTHON, "-I", "-S", "-B", str(zipapp), "--config", str(config), "serve"]  # fmt: skip
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/",
                                       start_new_session=True)  # fmt: skip
        (config.parent / LISTENER).write_text(str(process.pid))
        try:
            _wait_for(socket, process, log)
            shutil.chown(socket, "root", group)
            socket.chmod(0o660)
            yield socket, process.pid
        finally:
            _end(process)
    finally:
        shutil.rmtree(directory)


def build_zipapp(target: Path) -> None:
    """Build the helper as ``make helper`` does."""
    subprocess.run([sys.executable, "-m", "privhelper.build", str(target)], cwd=ROOT, check=True, capture_output=True)


def administer(zipapp: Path, config: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``imgpull-helper --config CONFIG WORDS`` as root; what it prints is in an error's text."""
    command = [PYTHON, "-I", "-S", "-B", str(zipapp), "--config", str(config), *words]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd="/")
    if check and finished.returncode:
        raise RuntimeError(f"imgpull-helper {' '.join(words)}: exit code {finished.returncode}: {finished.stderr}")
    return finished


def to_toml(settings: Settings) -> str:
    """Write settings as TOML: plain keys first, then tables; JSON's strings, numbers and booleans are TOML's too."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, Mapping)]
    for name, table in settings.items():
        if isinstance(table, Mapping):
            plain += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def children(pid: int) -> list[int]:
    """Return the processes that a process started and that still run; proc_pid_stat(5), field 4."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def mounts_below(folder: Path) -> list[str]:
    """Return the mount points below ``folder``, the last mounted first."""
    points = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    return [point for point in points if point.startswith(f"{folder}/")][::-1]


def loops_below(folder: Path) -> list[str]:
    """Return the loop devices whose file lies below ``folder``, also if it was removed meanwhile."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().startswith(f"{folder}/"):
                found.append(f"/dev/{backing.parent.parent.name}")
    return sorted(found)


def _wait_for(socket: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + START_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > end_s:
            raise RuntimeError(f"the helper does not listen: {log.read_text()}")
        time.sleep(0.01)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the listener and what serves a connection; a helper ends by itself when its client has gone."""
    serving = children(process.pid)
    process.terminate()
    process.wait(STOP_S)
    end_s = time.monotonic() + STOP_S
    while any(Path(f"/proc/{pid}").exists() for pid in serving):
        if time.monotonic() > end_s:
            for pid in serving:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"a helper outlived its client by {STOP_S} s: {serving}")
        time.sleep(0.02)
