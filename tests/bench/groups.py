"""The groups of the bench: which cases stand beside one another, and what is aimed at.

Rule 1: the first case of a group is what the goal compares with: the floor, or what a user would do instead.
Rule 2: all groups share one root helper and one S3 server; an image is uploaded once.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from boto3.s3.transfer import TransferConfig

from tests.bench import harness, ours, rivals, shapes, thin
from tests.bench import ready as among_runs
from tests.bench.harness import Case, Group, just, run
from tests.servers import swift
from tests.support.helper import Helper, running_helper

BUCKET: Final = "bench"
POOL_BYTES: Final = 48 << 30  # sparse; what is in use is removed after each case
COPIES: Final = 20  # of a layer so small that its start would hide what it costs
PARTS: Final = TransferConfig(multipart_chunksize=64 << 20, multipart_threshold=1 << 30)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large the shapes are."""

    recipe: str
    files: int
    large_bytes: int
    layers: int
    deep: int
    links: int
    images: int
    entries: tuple[int, ...]  # of the growth by entries
    sizes: tuple[int, ...]  # of the growth by bytes


SIZES: Final = {
    "small": Sizes("demo", 10_000, 256 << 20, 10, 50, 10_000, 4, (1_000, 10_000), (10 << 20, 256 << 20)),
    "full": Sizes(
        "full", 200_000, 4 << 30, 100, 1_000, 100_000, 20,
        (1_000, 10_000, 50_000, 200_000), (10 << 20, 100 << 20, 1 << 30, 4 << 30),
    ),
}  # fmt: skip


@dataclass(slots=True)
class Bench:
    """What all groups share: sizes, a scratch folder, the root helper, and the S3 server with its uploads."""

    sizes: Sizes
    folder: Path
    running: Helper
    environment: dict[str, str]
    s3: Any
    stack: contextlib.ExitStack  # what a group keeps running until the end
    uploaded: dict[str, list[str]] = field(default_factory=dict)

    def image(self, name: str, layers: list[Path]) -> str:
        """Upload an image once; return its reference."""
        if name not in self.uploaded:
            keys = [f"images/{name}/{layer.name}" for layer in layers]
            for key, layer in zip(keys, layers, strict=True):
                self.s3.upload_file(str(layer), BUCKET, key, Config=PARTS)
            self.uploaded[name] = keys
        return f"s3://{BUCKET}/images/{name}"

    def curl(self, name: str) -> list[str]:
        """Return the commands that print an image's layers by curl."""
        return [
            f"curl -sf '{self.s3.generate_presigned_url('get_object', Params={'Bucket': BUCKET, 'Key': key})}'"
            for key in self.uploaded[name]
        ]

    def aws(self, name: str) -> list[str]:
        """Return the commands that print an image's layers by the AWS command line."""
        given = " ".join(f"{key}='{value}'" for key, value in self.environment.items())
        return [f"{given} aws s3 cp --quiet s3://{BUCKET}/{key} -" for key in self.uploaded[name]]

    def beside(self, name: str, layers: list[Path], tools: tuple[str, ...] = ("tar",)) -> list[Case]:
        """Return the cases of a cold pull: what a user would do instead, then ours."""
        ref = self.image(name, layers)
        cases = []
        if rivals.there_is("aws"):
            cases.append(
                Case("aws s3 cp | tar -x, sync", partial(rivals.piped, partial(self.aws, name), layers, self.folder))
            )
        for tool in tools:
            piped = partial(rivals.piped, partial(self.curl, name), layers, self.folder, tool)
            cases.append(Case(f"curl | {tool} -x, sync", piped))
        return [*cases, Case("imgpull pull", partial(ours.pull, ref, self.environment, self.running))]


@contextlib.contextmanager
def prepared(sizes: Sizes, folder: Path) -> Iterator[Bench]:
    """Start the root helper and the S3 server for the whole run."""
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(
            running_helper(folder / f"bench-helper-{os.getpid()}", "root", pool_bytes=POOL_BYTES)
        )
        server = stack.enter_context(swift.running(folder / "swift"))
        s3 = server.client()
        s3.create_bucket(Bucket=BUCKET)
        harness.ELSEWHERE.append(partial(ours.helper_cpu_s, running))
        stack.callback(harness.ELSEWHERE.clear)
        yield Bench(sizes, folder, running, server.environment(), s3, stack)
        ours.release(running)


# ---------------------------------------------------------------- the groups


def checking(bench: Bench) -> list[Group]:
    tars = shapes.debian(bench.sizes.recipe, ".tar")
    cases = [
        Case("one bare sha256 pass by hashlib", lambda: just(rivals.hashed(tars))),
        Case(
            "imgpull check: two readers, rules, digests, manifests",
            partial(just, partial(run, [*ours.CLI, "check", *tars])),
        ),
        Case("the same, one layer after the other", lambda: just(lambda: ours.check(tars))),
        Case("GNU tar -t", lambda: just(lambda: [run(["tar", "-tf", tar]) for tar in tars])),
    ]
    return [Group("check the Debian layers", cases, goal="at most 1.4 x of the pass")]


def committing(bench: Bench) -> list[Group]:
    tars = shapes.debian(bench.sizes.recipe, ".tar")
    manifests = _manifests(bench, "debian", tars)
    cases = [
        Case("GNU tar -xpf, sync", lambda: rivals.untar(tars, bench.folder)),
        Case("root helper: hashed while copied, synced, sealed", lambda: ours.commits(tars, manifests, bench.running)),
        Case("bsdtar -xpf, sync", lambda: rivals.untar(tars, bench.folder, "bsdtar")),
        Case("the same bytes as plain files, sync", lambda: rivals.copied(tars, bench.folder)),
    ]
    return [Group("commit the Debian layers", cases, goal="at most 1.15 x of tar")]


def pulling(bench: Bench) -> list[Group]:
    plain = shapes.debian(bench.sizes.recipe, ".tar")
    groups = [
        Group("pull the Debian layers, plain", bench.beside("plain", plain, ("tar", "bsdtar")), goal="at most 1.0 x")
    ]
    for suffix in (".tar.zst", ".tar.gz"):
        layers = shapes.debian(bench.sizes.recipe, suffix)
        goal = "at most 1.0 x" if suffix == ".tar.zst" else ""
        group = Group(f"pull the Debian layers, {suffix[5:]}", bench.beside(f"debian-{suffix[5:]}", layers), goal=goal)
        if suffix == ".tar.gz" and rivals.there_is("umoci"):
            umoci = partial(rivals.umoci, layers, bench.folder)
            group.cases.append(Case("umoci unpack, sync (nothing downloaded)", umoci))
        if suffix == ".tar.gz" and all(map(rivals.there_is, ("podman", "skopeo", "docker-registry"))):
            name = bench.stack.enter_context(rivals.registry(layers, bench.folder))
            group.cases.append(Case("podman pull from a registry, sync", partial(rivals.podman, name, bench.folder)))
        groups.append(group)
    return groups


def sharing(bench: Bench) -> list[Group]:
    layers = shapes.debian(bench.sizes.recipe, ".tar")
    (bench.folder / "second").mkdir()
    second = shapes.copy_with_new_top(layers, bench.folder / "second")
    first_ref, second_ref = bench.image("plain", layers), bench.image("second", second)
    new, total = second[-1].stat().st_size, sum(path.stat().st_size for path in second)
    cases = [
        Case("the whole image, cold", lambda: ours.pull(second_ref, bench.environment, bench.running), total),
        Case(
            "all but one layer are there",
            lambda: ours.pull(second_ref, bench.environment, bench.running, first=first_ref),
            new,
        ),
    ]
    return [Group("pull a second image", cases, goal="1.0 x for a byte of the new layer", per="byte")]


def ready(bench: Bench) -> list[Group]:
    ref = bench.image("plain", shapes.debian(bench.sizes.recipe, ".tar"))
    again = [
        Case("python -c pass", lambda: just(lambda: run([sys.executable, "-c", "pass"]))),
        Case("imgpull pull", lambda: ours.pull(ref, bench.environment, bench.running, first=ref)),
    ]
    devices = [
        Case(title, partial(ours.activations, ref, bench.environment, bench.running, doing))
        for title, doing in (
            ("twenty greetings", ()),
            ("and an activation each", ("activate",)),
            ("and its end each, of twenty devices that are given out", ("deactivate",)),
        )
    ]
    return [
        Group("ready image", again, goal="0.15 s of CPU"),
        among_runs.group(),
        Group("helper connections", devices, goal="20 activations in 1 s more than the greetings"),
    ]


def hurting(bench: Bench) -> list[Group]:
    sizes = bench.sizes
    folders = {
        f"{sizes.files:,} tiny files": shapes.shape("small-files", shapes.small_files, sizes.files),
        f"one file of {sizes.large_bytes >> 20} MiB": shapes.shape("large-file", shapes.large_file, sizes.large_bytes),
        f"{sizes.layers} layers": shapes.shape("many-layers", shapes.many_layers, sizes.layers),
        f"{sizes.deep:,} trees {shapes.DEEP} deep": shapes.shape("deep", shapes.deep_tree, sizes.deep),
        f"{sizes.links:,} hard links": shapes.shape("links", shapes.hard_links, sizes.links),
    }
    return [
        Group(f"pull {title}", bench.beside(folder.name, shapes.layers_of(folder)), rounds=3)
        for title, folder in folders.items()
    ]


def growing(bench: Bench) -> list[Group]:
    """Small amounts are done again and again, on layers of other bytes, so that what is measured outweighs a start."""
    groups = []
    nothing = shapes.layers_of(shapes.shape("next-to-nothing", shapes.next_to_nothing, COPIES))
    empty = [_manifests(bench, f"nothing-{n}", [tar])[0] for n, tar in enumerate(nothing)]
    for what, make, amounts, enough in (
        ("entry", shapes.small_layers, bench.sizes.entries, 20_000),
        ("byte", shapes.large_layers, bench.sizes.sizes, 200 << 20),
    ):
        checks, commits, floors = [], [], []
        for amount in amounts:
            copies = min(COPIES, -(-enough // amount))
            tars = shapes.layers_of(shapes.shape(f"{copies}-of-{make.__name__}", partial(make, copies), amount))
            manifests = [_manifests(bench, f"{what}-{amount}-{n}", [tar])[0] for n, tar in enumerate(tars)]
            shown = f"{amount:,} entries" if what == "entry" else f"{amount >> 20:,} MiB"
            shown += f", {copies} times" if copies > 1 else ""
            units, each = amount * copies, partial(_check_each, tars)
            checks.append(Case(shown, partial(just, each), units, copies))
            commits.append(Case(shown, partial(ours.commits, tars, manifests, bench.running), units, copies))
            floors.append(Case(shown, partial(rivals.untar, tars, bench.folder), units))
        goal = "each 0.9 to 1.1 x of the largest, of processor time; the cost of an empty layer apart"
        none = Case("nothing", partial(just, partial(_check_each, nothing)), starts=COPIES)
        idle = Case("nothing", partial(ours.commits, nothing, empty, bench.running), starts=COPIES)
        groups += [
            Group(f"check, cost of one {what}", checks, goal, what, none, 3, by_cpu=True),
            Group(f"commit, cost of one {what}", commits, goal, what, idle, 3, by_cpu=True),
            Group(f"GNU tar -xpf, sync, cost of one {what}, by the clock", floors, "", what, rounds=3),
        ]
    return groups


def _check_each(tars: list[Path]) -> None:
    for tar in tars:
        ours.check([tar])


def crowding(bench: Bench) -> list[Group]:
    refs = []
    for number in range(bench.sizes.images):
        folder = shapes.shape(f"image-{number}", shapes.one_of_many, number)
        refs.append(bench.image(f"image-{number}", shapes.layers_of(folder)))
    cases = [
        Case("one after the other", lambda: ours.pulls(refs, bench.environment, bench.running, at_once=False)),
        Case("all at once", lambda: ours.pulls(refs, bench.environment, bench.running, at_once=True)),
    ]
    return [Group(f"pull {len(refs)} images", cases, goal="at most 1.1 x", rounds=3)]


def starting(bench: Bench) -> list[Group]:
    empty = bench.folder / "empty.tar"
    empty.write_bytes(bytes(1024))
    cases = [
        Case("python -c pass", lambda: just(lambda: run([sys.executable, "-c", "pass"]))),
        Case("unpriv.check of an empty layer", lambda: just(lambda: ours.check([empty]))),
        Case("imgpull version", lambda: just(lambda: run([*ours.CLI, "version"]))),
        Case("imgpull pull --help", lambda: just(lambda: run([*ours.CLI, "pull", "--help"]))),
    ]
    return [Group("start of a process", cases)]


def activating(bench: Bench) -> list[Group]:
    return [thin.group()]


GROUPS: Final = {
    "start": starting, "check": checking, "commit": committing, "pull": pulling, "share": sharing, "ready": ready,
    "shapes": hurting, "growth": growing, "crowd": crowding, "thin": activating,
}  # fmt: skip


def _manifests(bench: Bench, name: str, tars: list[Path]) -> list[Path]:
    folder = bench.folder / f"manifests-{name}"
    folder.mkdir()
    return ours.check(tars, folder)


# ---------------------------------------------------------------- one pull, looked at closely

COUNTED: Final = ("execve", "clone", "clone3", "fork", "vfork", "fsync", "fdatasync", "sendmsg", "recvmsg")


def events(bench: Bench) -> list[dict[str, Any]]:
    """Return the events of one cold pull of the Debian layers."""
    ref = bench.image("plain", shapes.debian(bench.sizes.recipe, ".tar"))
    with ours.home(bench.environment, bench.running) as chosen:
        return [
            json.loads(line) for line in run([*ours.CLI, "pull", "--json", "--timing", ref], env=chosen).splitlines()
        ]


def counts(bench: Bench) -> dict[str, int]:
    """Return how often a cold pull of the Debian layers makes some system calls; the helper's are not in."""
    ref = bench.image("plain", shapes.debian(bench.sizes.recipe, ".tar"))
    out = bench.folder / "strace"
    with ours.home(bench.environment, bench.running) as chosen:
        command = ["strace", "-f", "-qq", "-c", "-e", f"trace={','.join(COUNTED)}", "-o", str(out)]
        subprocess.run([*command, *ours.CLI, "pull", "-q", ref], env=chosen, check=True, capture_output=True)
    rows = [line.split() for line in out.read_text("ascii").splitlines()]
    return {row[-1]: int(row[3]) for row in rows if row and row[-1] in COUNTED}
