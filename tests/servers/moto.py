"""moto's S3 on loopback: no signatures are checked, but checksums, versions and listings are there.

As a fixture's body: ``with running() as url``. One process; moto keeps everything in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer


@contextmanager
def running() -> Iterator[str]:
    """Run moto in a thread; return the endpoint URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
