"""The stand on which tests run the real helper: it listens, it ends, and a killed run is mended."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.accounts import Account, run_name
from tests.support.helper import ROOT, Helper, Settings, children, loops_below, mend, mounts_below, to_toml

pytestmark = pytest.mark.root
HELLO = json.dumps({"op": "hello", "version": 1})
ASK = f"""
import socket, sys
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect(sys.argv[1])
connection.send({HELLO!r}.encode())
print(connection.recv(65536).decode())
"""


def has_ended(process: int, timeout_s: float = 10) -> bool:
    """Tell whether the process behind a descriptor ends in time; pidfd_open(2): it can be read then."""
    try:
        return bool(select.select([process], [], [], timeout_s)[0])
    finally:
        os.close(process)


def test_a_member_is_answered_and_an_outsider_is_not(helper: Helper, member: Account, outsider: Account) -> None:
    answer = json.loads(member.run("/usr/bin/python3", "-c", ASK, helper.socket).stdout)
    assert (answer["type"], answer["store"], answer["pool"]["state"]) == ("ok", "reflink", "ready")
    refused = outsider.run("/usr/bin/python3", "-c", ASK, helper.socket, check=False)
    assert "PermissionError" in refused.stderr


def test_each_connection_has_a_process_that_ends_with_it(helper: Helper) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(str(helper.socket))
        connection.send(HELLO.encode())
        connection.recv(65536)
        (serving,) = helper.processes()
        process = os.pidfd_open(serving)
    assert has_ended(process)


def test_a_killed_run_is_mended() -> None:
    folder = Path(f"/var/tmp/{run_name('killed')}")
    script = (
        "import pathlib, signal, sys; from tests.support.helper import running_helper\n"
        f"with running_helper(pathlib.Path({str(folder)!r}), 'root') as helper:\n"
        "    print(helper.listener_pid, flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        listener = int(process.stdout.readline())
        process.kill()
    assert Path(f"/proc/{listener}").exists() and loops_below(folder) and mounts_below(folder)
    listening = os.pidfd_open(listener)
    mend(folder)
    assert has_ended(listening)
    assert not (loops_below(folder) or mounts_below(folder) or folder.exists() or Path("/run", folder.name).exists())


def test_settings_become_toml() -> None:
    settings: Settings = {"store": "thin", "a": {"b": False, "n": 3}, "state_dir": 'odd "name"'}
    assert tomllib.loads(to_toml(settings)) == settings


def test_children_are_found() -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        assert process.pid in children(os.getpid())
        process.kill()
