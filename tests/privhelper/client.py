"""A plain client of the helper for tests: one socket, one request at a time, nothing hidden."""

import array
import fcntl
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from privhelper import protocol

ROOT = Path(__file__).resolve().parent.parent.parent
MAIN = (
    "import sys; sys.path.insert(0, sys.argv.pop(1));from privhelper.__main__ import main; sys.exit(main(sys.argv[1:]))"
)
SYSTEM_PYTHON = "/usr/bin/python3"


def helper_command(config: Path, *words: str) -> list[str]:
    """Return the command line of the helper from the source tree, as isolated as the zipapp is."""
    return [SYSTEM_PYTHON, "-I", "-S", "-B", "-c", MAIN, str(ROOT), "--config", str(config), *words]


class Helper:
    """One connection to a helper of its own."""

    def __init__(self, config: Path, *, uid: int = 0, prefix: tuple[str, ...] = ()) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed with the connection; a pipe would fill up
        self.sock, theirs = connected_pair(uid)
        command = [*prefix, *helper_command(config, "serve")]
        self.process = subprocess.Popen(
            command,
            preexec_fn=lambda: _place(theirs.fileno()),
            pass_fds=(3,),
            stderr=self._log,
            env={"LISTEN_FDS": "1"},
        )
        theirs.close()
        self.sock.settimeout(60)

    def __enter__(self) -> "Helper":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> int:
        """Hang up and wait for the helper to go; return its exit code."""
        self.sock.close()
        code = self.process.wait(60)
        self._log.close()
        return code

    def log(self) -> str:
        """Return what the helper has written to its log."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.close()

    @contextmanager
    def stopped_child(self) -> Iterator[int]:
        """Hold the one child of a running commit still."""
        pid = self.process.pid
        (child,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        os.kill(child, signal.SIGSTOP)
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGCONT)

    def send(self, message: dict[str, Any] | bytes, fds: list[int] | None = None) -> None:
        data = message if isinstance(message, bytes) else protocol.encode(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        data, fds, _, _ = socket.recv_fds(self.sock, protocol.MAX_MESSAGE, 4)
        if not data:
            raise EOFError("the helper hung up")
        return json.loads(data), fds

    def ask(self, op: str, fds: list[int] | None = None, **fields: Any) -> dict[str, Any]:
        """Send a request; return its answer with ``items`` and ``fds``."""
        self.send({"op": op, **fields}, fds)
        items: list[dict[str, Any]] = []
        while True:
            reply, received = self.receive()
            if reply["type"] in ("ok", "error"):
                return {**reply, "items": items, "fds": received}
            items.append(reply)

    def hello(self) -> dict[str, Any]:
        return self.ask("hello", version=protocol.VERSION)

    def commit(self, manifest: bytes, payload: Path) -> dict[str, Any]:
        file = memfd(manifest)
        data = os.open(payload, os.O_RDONLY)
        try:
            size = os.fstat(data).st_size
            return self.ask("commit", [file, data], manifest_bytes=len(manifest), payload_bytes=size)
        finally:
            os.close(file)
            os.close(data)


def connected_pair(uid: int) -> tuple[socket.socket, socket.socket]:
    """Return a connected pair whose helper side sees ``uid`` as its peer (SO_PEERCRED of socketpair is its maker)."""
    if uid == 0:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The credentials are those of the process that makes the pair; a child makes it and hands both ends over.
    ours, childs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = (
        f"import socket,os,sys; os.setgroups([]); os.setgid({uid}); os.setuid({uid});"
        "a,b=socket.socketpair(socket.AF_UNIX,socket.SOCK_SEQPACKET);"
        "socket.send_fds(socket.socket(fileno=int(sys.argv[1])),[b'x'],[a.fileno(),b.fileno()])"
    )
    subprocess.run([sys.executable, "-I", "-c", script, str(childs.fileno())], pass_fds=[childs.fileno()], check=True)
    _, fds, _, _ = socket.recv_fds(ours, 16, 2)
    ours.close()
    childs.close()
    return socket.socket(fileno=fds[0]), socket.socket(fileno=fds[1])


def _place(fd: int) -> None:
    if fd != 3:
        os.dup2(fd, 3)
    os.set_inheritable(3, True)


def memfd(data: bytes, seals: int | None = None) -> int:
    fd = os.memfd_create("manifest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data) if data else None
    if seals is None:
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def line(**fields: Any) -> bytes:
    renamed = {("in" if key == "into" else key): value for key, value in fields.items()}
    return json.dumps(renamed, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


class Layer:
    """Builds a manifest and its payload, operation by operation."""

    def __init__(self, parent: str | None = None) -> None:
        self.parent = parent
        self.lines: list[bytes] = []
        self.payload = b""
        self.content = 0

    def add(self, **fields: Any) -> int:
        self.lines.append(line(**fields))
        return len(self.lines)

    def directory(self, into: int, name: str, mode: int = 0o755, op: str = "dir", **more: Any) -> int:
        fields = {"uid": 0, "gid": 0, "mtime": 10**18, "xattrs": {}} | more
        return self.add(op=op, into=into, name=name, mode=mode, **fields)

    def file(self, into: int, name: str, data: bytes, mode: int = 0o644, **more: Any) -> int:
        at = len(self.payload) if data else 0
        self.payload += data
        self.content += len(data)
        fields = {"uid": 0, "gid": 0, "mtime": 10**18 + 1, "xattrs": {}, "at": at, "size": len(data)}
        fields |= {"sha256": hashlib.sha256(data).hexdigest()} | more
        return self.add(op="file", into=into, name=name, mode=mode, **fields)

    def symlink(self, into: int, name: str, target: str, **more: Any) -> int:
        fields = {"uid": 0, "gid": 0, "mtime": 10**18 + 2, "xattrs": {}} | more
        return self.add(op="symlink", into=into, name=name, target=target, **fields)

    def manifest(self) -> bytes:
        header = line(bytes=self.content, entries=len(self.lines), format=protocol.FORMAT, parent=self.parent)
        return header + b"".join(self.lines)

    def id(self) -> str:
        return "sha256:" + hashlib.sha256(self.manifest()).hexdigest()

    def write_payload(self, folder: Path) -> Path:
        path = folder / (self.id()[7:23] + ".tar")
        path.write_bytes(self.payload)
        return path
