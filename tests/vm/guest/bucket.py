"""An S3 server in the guest: ``bucket.py FOLDER`` serves FOLDER/BUCKET/KEY on PORT until it is stopped."""

import hashlib
import mmap
import sys
from pathlib import Path
from typing import Final, cast

import trio

from tests.servers.faults import Object, Server

PORT: Final = 8333


def mapped(path: Path) -> Object:
    """Return a file as an object; its bytes stay on the disk."""
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    status = path.stat()
    # As opaque as that of an upload in parts: an emulated processor needs minutes for the MD5 of gigabytes.
    etag = hashlib.sha256(f"{status.st_ino} {status.st_size}".encode()).hexdigest()[:32] + "-2"
    return Object(cast(bytes, data), etag=f'"{etag}"')  # a map is sliced and measured like bytes


async def serve(server: Server) -> None:
    listeners = await trio.open_tcp_listeners(PORT, host="127.0.0.1", backlog=64)
    await trio.serve_listeners(server.handle, listeners)


def main() -> None:
    """Serve."""
    server, folder = Server(), Path(sys.argv[1])
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        server.objects[str(path.relative_to(folder))] = mapped(path)
    trio.run(serve, server)


if __name__ == "__main__":
    main()
