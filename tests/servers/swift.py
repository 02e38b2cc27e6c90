"""A real S3 server on loopback: OpenStack Swift with its s3api, which checks signatures.

Rule 1: everything lies below one folder; /etc/swift is neither read nor written.
Rule 2: any user may run it; ports are free ones unless one is asked for.
Rule 3: when it stops, its processes are gone; when the run was started by command, so is the folder.
Rule 4: nothing is installed here. The Debian packages that it needs are in PACKAGES.

As a command, until SIGTERM or SIGINT: ``python -m tests.servers.swift run DIR [--port P]``. It prints one line,
``endpoint=URL access_key=K secret_key=S region=R``, once it answers.
"""

import argparse
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("swift-proxy", "swift-account", "swift-container", "swift-object", "python3-swift")
PYTHON: Final = "/usr/bin/python3"  # Debian's: Swift's modules belong to it
ACCESS_KEY: Final = "test:tester"
SECRET_KEY: Final = "swift-testing-secret"
REGION: Final = "us-east-1"
START_S: Final = 60.0
STOP_S: Final = 10.0

SWIFT_CONF: Final = """
[swift-hash]
swift_hash_path_prefix = imgpull
swift_hash_path_suffix = tests

[storage-policy:0]
name = only
default = yes
"""
# tempauth insists on a cache. Its port is bound and never answers, so that Swift goes on without.
# The storage servers. One device, no mount; a request comes from the proxy alone.
STORE_CONF: Final = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}/etc
devices = {folder}/srv
mount_check = false
user = {user}
workers = 0
log_level = WARNING
log_address = {folder}/no-log
fallocate_reserve = 0

[pipeline:main]
pipeline = {kind}-server

[app:{kind}-server]
use = egg:swift#{kind}
network_chunk_size = 1048576
disk_chunk_size = 1048576
"""
PROXY_CONF: Final = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {folder}/etc
user = {user}
workers = 0
log_level = WARNING
log_address = {folder}/no-log

[pipeline:main]
pipeline = catch_errors gatekeeper cache s3api tempauth slo versioned_writes symlink proxy-server

[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
object_chunk_size = 1048576
client_chunk_size = 1048576

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache}
memcache_max_connections = 1

[filter:s3api]
use = egg:swift#s3api
location = {region}
s3_acl = false
check_bucket_owner = false

[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = {secret} .admin

[filter:slo]
use = egg:swift#slo

[filter:symlink]
use = egg:swift#symlink

[filter:versioned_writes]
use = egg:swift#versioned_writes
allow_object_versioning = true
"""


class SwiftError(Exception):
    """Swift is not installed, or does not start."""


@dataclass(frozen=True, slots=True)
class Swift:
    """A running server."""

    endpoint: str
    access_key: str = ACCESS_KEY
    secret_key: str = SECRET_KEY
    region: str = REGION

    def environment(self) -> dict[str, str]:
        """Return the AWS variables that reach it."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def client(self) -> Any:
        """Return boto3's client of it, with real signatures."""
        import boto3  # late: whoever only starts the server does not pay for it
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )


def missing() -> list[str]:
    """Return the packages that are not installed."""
    programs = [f"/usr/bin/swift-{kind}-server" for kind in ("account", "container", "object", "proxy")]
    return [] if all(os.access(program, os.X_OK) for program in programs) else list(PACKAGES)


@contextmanager
def running(folder: Path, port: int = 0) -> Iterator[Swift]:
    """Run Swift below a folder, which is made if missing and left in place. Raises: SwiftError."""
    if missing():
        raise SwiftError(f"apt-get install --no-install-recommends {' '.join(PACKAGES)}")
    ports = free_ports(4)
    ports["proxy"] = port or ports["proxy"]
    with ExitStack() as stack:
        cache = stack.enter_context(socket.socket())
        cache.bind(("127.0.0.1", 0))
        configure(folder.absolute(), ports, cache.getsockname()[1])
        processes = [stack.enter_context(server(folder.absolute(), kind)) for kind in ports]
        wait_for(ports, folder.absolute(), processes)
        yield Swift(f"http://127.0.0.1:{ports['proxy']}")


def free_ports(number: int) -> dict[str, int]:
    """Return a free port for each server. Another process may take one before we do; then the start fails."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        names = ("account", "container", "object", "proxy")
        return {name: one.getsockname()[1] for name, one in zip(names, sockets, strict=True)}


def configure(folder: Path, ports: dict[str, int], cache: int) -> None:
    """Write the configuration and the rings below a folder."""
    etc = folder / "etc"
    etc.mkdir(parents=True, exist_ok=True)
    (folder / "srv" / "d1").mkdir(parents=True, exist_ok=True)
    (etc / "swift.conf").write_text(SWIFT_CONF)
    user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
    common = {"folder": folder, "user": user}
    proxy = PROXY_CONF.format(port=ports["proxy"], cache=cache, region=REGION, secret=SECRET_KEY, **common)
    (etc / "proxy.conf").write_text(proxy)
    for kind in ("account", "container", "object"):
        text = STORE_CONF.format(port=ports[kind], kind=kind, **common)
        (etc / f"{kind}.conf").write_text(text)
        make_ring(etc, kind, ports[kind])


def make_ring(etc: Path, kind: str, port: int) -> None:
    """Write the ring of one kind of server: two partitions bits, one replica, one device."""
    builder = etc / f"{kind}.builder"
    builder.unlink(missing_ok=True)
    steps = (["create", "2", "1", "0"], ["add", f"r1z1-127.0.0.1:{port}/d1", "1"], ["rebalance"])
    for step in steps:
        command = ["/usr/bin/swift-ring-builder", str(builder), *step]
        done = subprocess.run(command, capture_output=True, text=True, env=quiet())
        if done.returncode:
            raise SwiftError(f"swift-ring-builder {step[0]}: {done.stdout}{done.stderr}")


def quiet() -> dict[str, str]:
    """Return an environment for Swift: no proxy, no warning about its own dependencies, no pyenv."""
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "PYTHONWARNINGS": "ignore"}


@contextmanager
def server(folder: Path, kind: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Run one of the four servers; end it and its children."""
    with (folder / f"{kind}.log").open("ab") as log:
        command = [PYTHON, f"/usr/bin/swift-{kind}-server", str(folder / "etc" / f"{kind}.conf")]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=quiet(), start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server, at once if it does not end by itself."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # it leads its own session, so this is only its own
        process.wait()


def wait_for(ports: dict[str, int], folder: Path, processes: "list[subprocess.Popen[bytes]]") -> None:
    """Wait until all four servers answer HTTP. Raises: SwiftError, with what they printed."""
    end_s = time.monotonic() + START_S
    waiting = set(ports.values())
    while waiting:
        waiting = {port for port in waiting if not answers(port)}
        if time.monotonic() > end_s or any(process.poll() is not None for process in processes):
            logs = "".join(f"{path.name}: {path.read_text()[-500:]}\n" for path in sorted(folder.glob("*.log")))
            raise SwiftError(f"Swift does not start\n{logs}")
        if waiting:
            time.sleep(0.1)


def answers(port: int) -> bool:
    """Tell whether a server answers a request, whatever it says."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers.swift", description=__doc__)
    parser.add_argument("action", choices=["run", "packages"])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    if options.action == "packages":
        print(*PACKAGES)
        return
    if options.folder is None or (options.folder.exists() and any(options.folder.iterdir())):
        parser.error("run needs a folder that is new or empty: it is removed at the end")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # unwinds: what was started is stopped
    try:
        with running(options.folder, options.port) as swift:
            print(
                f"endpoint={swift.endpoint} access_key={swift.access_key} "
                f"secret_key={swift.secret_key} region={swift.region}",
                flush=True,
            )
            while True:
                signal.pause()
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
