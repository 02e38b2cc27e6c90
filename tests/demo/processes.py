"""Which processes a pull consists of, and what each may do, read from /proc while it runs."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SECCOMP: Final = {"0": "none", "1": "strict", "2": "filter"}  # proc_pid_status(5)
COLUMNS: Final = "{:<12}  {:<33}  {:<7}  {:<12}  {}"
HIDDEN: Final = ("python", "python3", "-I", "-S", "-B", "-m")


@dataclass
class Watcher:
    """Notes the processes of one user and those below the helper's listener; the most locked-up sight of each wins."""

    uid: int
    listener_pid: int
    seen: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)

    def look(self) -> None:
        """Read /proc once."""
        processes = {int(path.name): status for path in Path("/proc").glob("[0-9]*") if (status := _status(path))}
        for pid, status in processes.items():
            if status["Uid"].split()[0] == str(self.uid) or self._is_helper(pid, processes):
                key = (status["command"], status["Uid"].split()[0])
                if status["Seccomp"] >= self.seen.get(key, status)["Seccomp"]:
                    self.seen[key] = status

    def _is_helper(self, pid: int, processes: dict[int, dict[str, str]]) -> bool:
        """Tell whether a process descends from the listener."""
        while pid in processes:
            pid = int(processes[pid]["PPid"])
            if pid == self.listener_pid:
                return True
        return False

    def table(self) -> list[str]:
        """Return one line a process."""
        rows = [COLUMNS.format("USER", "COMMAND", "SECCOMP", "NO_NEW_PRIVS", "CAPABILITIES")]
        for (command, uid), status in sorted(self.seen.items(), key=lambda item: (int(item[0][1]), item[0][0])):
            capabilities = _capabilities(status["CapEff"]) + status["namespace"]
            new = "yes" if status["NoNewPrivs"] == "1" else "no"
            rows.append(COLUMNS.format(_user(int(uid)), command, SECCOMP[status["Seccomp"]], new, capabilities))
        return rows


def _status(folder: Path) -> dict[str, str] | None:
    """Return what the kernel says of a process, or None if it is gone or has no command line."""
    try:
        fields = dict(re.findall(r"^(\w+):\s*(.*)$", (folder / "status").read_text(), re.MULTILINE))
        words = (folder / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        own = os.readlink(folder / "ns/user") == os.readlink("/proc/self/ns/user")
    except OSError:
        return None
    namespace = "" if own else ", in a user namespace of its own"
    if not words[0] or "CapEff" not in fields:
        return None
    return fields | {"command": _shown([os.fsdecode(word) for word in words]), "namespace": namespace}


def _shown(words: list[str]) -> str:
    """Return a command without interpreter, options, configuration and the job that it was given as JSON."""
    names = [os.path.basename(word).removesuffix(".pyz") for word in words if not word.startswith(("{", "--"))]
    return " ".join(name for name in names if name not in HIDDEN and not name.endswith(".toml"))


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _capabilities(mask: str) -> str:
    if int(mask, 16) == 0:
        return "none"
    printed = subprocess.run(["capsh", f"--decode={mask}"], capture_output=True, text=True, check=True).stdout
    names = printed.strip().partition("=")[2].split(",")
    return "all" if len(names) > 30 else ",".join(name.removeprefix("cap_") for name in names)
