"""imgpull's own work as cases: checking, committing, pulling, activating; each by the real programs.

Rule 1: the root helper is one for the whole run, on a pool of its own; a case takes its layers out of it afterwards.
Rule 2: each pull has a home of its own, so that it is cold unless ``first`` was pulled in it before.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from broker import helper as client
from broker import limits
from broker.app import sealed_copy
from broker.protocol import CheckJob
from broker.reference import media_of
from tests.bench.harness import run
from tests.support.helper import Helper

CLI: Final = (sys.executable, "-m", "broker.cli")
HELPER_ENDS_S: Final = 5.0


def check(layers: list[Path], keep: Path | None = None) -> list[Path]:
    """Check layers on top of one another by the real program; return their manifests, which lie in ``keep``."""
    manifests: list[Path] = []
    in_force = limits.load().model_dump_json()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        for number, layer in enumerate(layers, 1):
            path = (keep or Path(scratch)) / f"{number}.jsonl"
            with contextlib.ExitStack() as stack:
                out = stack.enter_context(path.open("w+b"))
                lower = [stack.enter_context(m.open("rb")).fileno() for m in manifests]
                blob = stack.enter_context(layer.open("rb"))
                payload = stack.enter_context(tempfile.TemporaryFile(dir=scratch))
                media = media_of(layer.name)
                assert media is not None
                job = CheckJob(
                    media=media,
                    layer_number=number,
                    lower=lower,
                    manifest_fd=out.fileno(),
                    payload_fd=None if media == "tar" else payload.fileno(),
                )
                command = [sys.executable, "-I", "-m", "unpriv.check", job.model_dump_json(), in_force]
                descriptors = (*lower, out.fileno(), payload.fileno())
                run(command, stdin=blob, pass_fds=descriptors, env={"LC_ALL": "C.UTF-8"})
            manifests.append(path)
    return manifests


@contextlib.contextmanager
def commits(tars: list[Path], manifests: list[Path], running: Helper) -> Iterator[Callable[[], None]]:
    """Yield what commits all layers; they are removed afterwards."""

    async def commit_all() -> None:
        for manifest, tar in zip(manifests, tars, strict=True):
            with manifest.open("rb") as plain, tar.open("rb") as payload, sealed_copy(plain.fileno()) as sealed:
                async with client.connect(str(running.socket)) as root:
                    await root.commit(sealed, payload.fileno())

    yield lambda: trio.run(commit_all)
    release(running)


def helper_cpu_s(running: Helper) -> float:
    """Return the CPU time so far of all helper processes, once the last of them has ended.

    proc(5), stat: cutime and cstime of the listener, which has waited for them.
    """
    until = time.monotonic() + HELPER_ENDS_S
    while running.processes() and time.monotonic() < until:
        time.sleep(0.005)
    words = Path(f"/proc/{running.listener_pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")


def release(running: Helper) -> None:
    """Give back every device and every layer of the pool."""

    async def work() -> None:
        async with client.connect(str(running.socket)) as root:
            layers, activations = await root.inventory()
            for row in activations:
                await root.deactivate(row["name"])
            left = {row["layer"]: row["parent"] for row in layers}
            while left:
                for layer in [layer for layer in left if layer not in left.values()]:
                    await root.remove(layer)
                    del left[layer]

    trio.run(work)


@contextlib.contextmanager
def home(environment: dict[str, str], running: Helper) -> Iterator[dict[str, str]]:
    """Yield the environment of a user who has never pulled; all that was made with it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="imgpull-bench-home-", dir="/var/tmp") as folder:
        chosen = {**os.environ, **environment, "HOME": folder, "IMGPULL_HELPER_SOCKET": str(running.socket)}
        for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            chosen.pop(name, None)
        try:
            yield chosen
        finally:
            release(running)


@contextlib.contextmanager
def pull(
    ref: str, environment: dict[str, str], running: Helper, *, first: str | None = None
) -> Iterator[Callable[[], None]]:
    """Yield a pull by a new user; ``first`` was pulled before, untimed."""
    with home(environment, running) as chosen:
        if first is not None:
            run([*CLI, "pull", "-q", first], env=chosen)
        yield lambda: _ignore(run([*CLI, "pull", "-q", ref], env=chosen))


@contextlib.contextmanager
def pulls(
    refs: list[str], environment: dict[str, str], running: Helper, *, at_once: bool
) -> Iterator[Callable[[], None]]:
    """Yield pulls of many images, one after the other or all at once."""
    with home(environment, running) as chosen:

        def work() -> None:
            if not at_once:
                for ref in refs:
                    run([*CLI, "pull", "-q", ref], env=chosen)
                return
            running_pulls = [
                subprocess.Popen([*CLI, "pull", "-q", ref], env=chosen, stdout=subprocess.DEVNULL) for ref in refs
            ]
            codes = [one.wait() for one in running_pulls]
            if any(codes):
                raise RuntimeError(f"of {len(refs)} pulls at once some failed: exit codes {codes}")

        yield work


@contextlib.contextmanager
def activations(
    ref: str, environment: dict[str, str], running: Helper, doing: tuple[str, ...]
) -> Iterator[Callable[[], None]]:
    """Yield twenty helper connections, each of which is greeted and does nothing, ``activate``, or also ``deactivate``.

    Devices that are to be taken back only are there before; those that are left go afterwards.
    """
    with home(environment, running) as chosen:
        done = json.loads(run([*CLI, "pull", "--json", "--no-activate", ref], env=chosen).splitlines()[-1])
        layer = done["layers"][-1] if isinstance(done.get("layers"), list) else done["top"]

        async def twenty(doing: tuple[str, ...]) -> None:
            for number in range(20):
                async with client.connect(str(running.socket)) as root:
                    if "activate" in doing:
                        await root.activate(layer, f"bench-{number}", "rw", 0)
                    if "deactivate" in doing:
                        await root.deactivate(f"bench-{number}")

        if doing == ("deactivate",):
            trio.run(twenty, ("activate",))
        yield lambda: trio.run(twenty, doing)


def _ignore(_: object) -> None:
    return None
