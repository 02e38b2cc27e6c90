"""Answer the test host: run commands in the guest, and move files, over a virtio-serial port.

Rule 1: one JSON object a line in both directions; an answer carries the number of its request, in any order.
Rule 2: every request runs in its own thread, and every request gets an answer.
Rule 3: few imports: an emulated machine pays about 10 ms for each.
"""

import base64
import json
import os
import subprocess
import threading
import time
from typing import Any

talking: dict[int, "subprocess.Popen[bytes]"] = {}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
lock = threading.Lock()


def find_port(name: str) -> str:
    """Wait for the port: udev may not have made its link yet, the kernel's own list is enough."""
    while True:
        for entry in os.scandir("/sys/class/virtio-ports"):
            with open(f"{entry.path}/name") as file:
                if file.read().strip() == name:
                    return f"/dev/{entry.name}"
        time.sleep(0.02)


def send(port: int, message: dict[str, Any]) -> None:
    """Write one whole line; answers of several threads do not mix."""
    data = json.dumps(message).encode() + b"\n"
    with lock:
        while data:
            data = data[os.write(port, data) :]


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a session of its own; past its time the whole session is killed."""
    user = request.get("user")
    who: dict[str, Any] = {"user": user, "group": user, "extra_groups": groups_of(str(user))} if user else {}
    home = f"/home/{user}" if user else "/root"
    child = subprocess.Popen(
        request["argv"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env={"PATH": PATH, "HOME": home, "LC_ALL": "C.UTF-8", **request["env"]},
        start_new_session=True,
        **who,
    )
    try:
        out, err = child.communicate(base64.b64decode(request["stdin"]), timeout=request["timeout_s"])
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, 9)
        # Do not wait for a process that the kernel does not let go: the host shall hear of it.
        return {"code": None, "out": "", "err": ""}
    return {"code": child.returncode, "out": encode(out), "err": encode(err)}


def start(request: dict[str, Any]) -> dict[str, Any]:
    """Start a program that answers each line with a line, as root; it lasts until the machine ends."""
    env = {"PATH": PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", **request["env"]}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    talking[request["id"]] = subprocess.Popen(request["start"], cwd="/", env=env, start_new_session=True, **pipes)
    return {}


def tell(request: dict[str, Any]) -> dict[str, Any]:
    """Give such a program a line and return its answer; the host sends it the next when this is there."""
    child = talking[request["tell"]]
    assert child.stdin and child.stdout
    child.stdin.write(request["line"].encode() + b"\n")
    child.stdin.flush()
    return {"line": child.stdout.readline().decode()}


def groups_of(user: str) -> list[int]:
    """Return the supplementary groups that a login of this user has."""
    with open("/etc/group") as file:
        rows = [line.rstrip("\n").split(":") for line in file]
    return [int(row[2]) for row in rows if user in row[3].split(",")]


def encode(data: bytes) -> str:
    """Return bytes as the text that travels."""
    return base64.b64encode(data).decode()


def put(request: dict[str, Any]) -> dict[str, Any]:
    """Write or append to a file."""
    path = str(request["put"])
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab" if request["append"] else "wb") as file:
        file.write(base64.b64decode(request["data"]))
    os.chmod(path, request["mode"])
    return {}


def get(request: dict[str, Any]) -> dict[str, Any]:
    """Read a piece of a file."""
    fd = os.open(str(request["get"]), os.O_RDONLY)
    try:
        return {"data": encode(os.pread(fd, request["length"], request["offset"]))}
    finally:
        os.close(fd)


def answer(port: int, request: dict[str, Any]) -> None:
    """Answer one request, whatever happens."""
    kinds = {"put": put, "get": get, "start": start, "tell": tell}
    work = next((kinds[kind] for kind in kinds if kind in request), run)
    try:
        reply = work(request)
    except Exception as error:  # the host is told, and decides
        reply = {"error": f"{type(error).__name__}: {error}"}
    send(port, {"id": request["id"], **reply})


def main() -> None:
    """Serve until the machine ends."""
    port = os.open(find_port("agent"), os.O_RDWR)
    with open("/proc/uptime") as file:
        send(port, {"id": 0, "uptime_s": float(file.read().split()[0])})
    buffer = b""
    while True:
        data = os.read(port, 1 << 16)
        if not data:  # the host has not connected yet
            time.sleep(0.02)
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            threading.Thread(target=answer, args=(port, json.loads(line)), daemon=True).start()


if __name__ == "__main__":
    main()
