"""The program: its descriptors, its words, its ends; as root and as an ordinary user."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.layers.synthetic import write_small_files
from tests.support.accounts import Account
from tests.unpriv.checking import IN_FORCE, LIMITS, MEASURED, check, run_program
from tests.unpriv.tarbytes import directory, member, symlink, tar
from unpriv import check as program
from unpriv import rulebook

HONEST = tar(directory(b"d"), member(b"d/f", b"x" * 100_000), symlink(b"l", b"d"), member("é".encode(), b"1"))
LIMITS_JSON = IN_FORCE.model_dump_json()
OTHER = tar(member(b"other", b"1"))
COMMAND = [sys.executable, "-I", "-m", "unpriv.check"]


def patched(lines: str) -> list[str]:
    """Return the command of a checker that runs some lines before it begins."""
    return [sys.executable, "-I", "-c", f"import unpriv.check as c\n{lines}\nc.main()"]


def blob(tmp_path: Path, data: bytes, name: str = "blob") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    path.chmod(0o644)
    return path


def test_accepted(tmp_path: Path) -> None:
    ran = run_program(blob(tmp_path, HONEST), want_tree=True)
    assert (ran.code, ran.last_words) == (0, "")
    inside = check(HONEST)
    assert (ran.report, ran.manifest, ran.tree) == (inside.report, inside.manifest, inside.tree)


def test_rejected(tmp_path: Path) -> None:
    ran = run_program(blob(tmp_path, tar(member(b"../x"))))
    assert (ran.code, ran.last_words, ran.rule, ran.manifest) == (65, "", "path_escapes_root", b"")


@pytest.mark.root
def test_an_ordinary_user_gets_the_same(tmp_path: Path, installed: Path, member: Account) -> None:
    command = [str(installed / "bin/python"), "-I", "-m", "unpriv.check"]
    as_member: dict[str, Any] = {"user": member.uid, "group": member.gid, "extra_groups": []}
    ran = run_program(blob(tmp_path, HONEST), want_tree=True, command=command, **as_member)
    assert (ran.code, ran.last_words) == (0, "")
    assert ran.manifest == check(HONEST).manifest


@pytest.mark.parametrize(("media", "compress"), [("tar+gzip", gzip.compress), ("tar+zstd", zstandard.compress)])
def test_payload_of_a_compressed_blob(tmp_path: Path, media: str, compress: Any) -> None:
    ran = run_program(blob(tmp_path, compress(HONEST)), media)
    assert (ran.code, ran.payload_bytes) == (0, len(HONEST))
    assert ran.manifest == check(HONEST).manifest


def test_lower_layers(tmp_path: Path) -> None:
    lower = check(HONEST).manifest
    ran = run_program(blob(tmp_path, tar(member(b"d/.wh.f"))), lowers=[lower], want_tree=True)
    assert ran.code == 0, ran
    assert [row["path"] for row in ran.tree] == ["d", "l", "é"]
    assert ran.report["parent"] == check(HONEST).report["layer"]


def test_many_lower_layers(tmp_path: Path) -> None:
    """More descriptors than the usual soft limit leaves once each has been moved."""
    soft, layers = 256, []
    manifest = check(tar()).manifest
    parent = check(tar()).report["layer"]
    layers.append(manifest)
    for _ in range(199):
        layers.append(manifest.replace(b"null", f'"{parent}"'.encode()))
        parent = digest(layers[-1])
    command = ["prlimit", f"--nofile={soft}:4096", *COMMAND]
    assert run_program(blob(tmp_path, HONEST), lowers=layers, command=command).code == 0


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@pytest.mark.parametrize("order", [(3, 4, 5), (5, 4, 3), (6, 3, 9), (40, 3, 7), (200, 100, 7)])
def test_descriptors_in_any_order(tmp_path: Path, order: tuple[int, int, int]) -> None:
    """The job's numbers may collide with those that the policy of system calls fixes."""
    path = blob(tmp_path, gzip.compress(HONEST))
    with path.open("rb") as source:
        files = [os.memfd_create("f") for _ in range(3)]
        moves = dict(zip(order, files, strict=True))
        script = (
            "import os, sys; pairs = eval(sys.argv[1])\n"
            "high = {to: os.dup2(fd, fd + 300) for to, fd in pairs.items()}\n"
            "[os.close(fd) for fd in pairs.values() if fd not in high.values()]\n"
            "[os.dup2(fd, to) for to, fd in high.items()]\n"
            "os.execv(sys.executable, sys.argv[2:])"
        )
        job = {"media": "tar+gzip", "payload_fd": order[0], "manifest_fd": order[1], "tree_fd": order[2]}
        ended = subprocess.run(
            [sys.executable, "-I", "-c", script, repr(moves), *COMMAND, json.dumps(job), LIMITS_JSON],
            stdin=source, capture_output=True, env={"LC_ALL": "C.UTF-8"}, pass_fds=files, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended
        payload, manifest, tree = (os.pread(fd, 1 << 20, 0) for fd in files)
        for fd in files:
            os.close(fd)
    assert (payload, manifest) == (HONEST, check(HONEST).manifest)
    assert len(tree.splitlines()) == 4


def test_inherited_descriptors_are_closed(tmp_path: Path) -> None:
    """What the broker did not mean to pass on is gone before the first byte is read."""
    listing = "os.write(2, ' '.join(sorted(os.listdir('/proc/self/fd'), key=int)).encode())"
    secrets = [os.memfd_create("secret") for _ in range(3)]
    ran = run_program(
        blob(tmp_path, HONEST),
        command=patched(f"import os\nc.sandbox.lock = lambda *a, start_threads: ({listing}, start_threads())"),
        extra_descriptors=secrets,
    )
    for secret in secrets:
        os.close(secret)
    assert ran.last_words.split() == ["0", "1", "2", "3", "4"]  # 3 is the listing's own, 4 the manifest


WRONG_JOBS = [
    [],
    ["{}", LIMITS_JSON],
    ["not json", LIMITS_JSON],
    ['{"media":"tar","paths":[]}', LIMITS_JSON],
    ['{"media":"tar"}'],
    ['{"media":"tar"}', "{}"],
    ['{"media":"tar"}', LIMITS_JSON, "x"],
]


@pytest.mark.parametrize("arguments", WRONG_JOBS)
def test_a_wrong_job_is_a_mistake_of_the_caller(arguments: list[str]) -> None:
    ended = subprocess.run([*COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert ended.returncode == 70
    assert ended.stdout == b""
    assert ended.stderr.count(b"\n") == 1


def test_a_blob_that_is_no_regular_file() -> None:
    ended = subprocess.run([*COMMAND, '{"media":"tar"}', LIMITS_JSON], input=HONEST, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (70, b"")
    assert b"no regular file" in ended.stderr


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        ("def bad(*a, **k): raise c.sandbox.SandboxError('seccomp did not take')\nc.sandbox.lock = bad", 78, "seccomp"),
        ("def bad(*a): raise RuntimeError('a\\nb')\nc._warm_up = bad", 70, "unpriv.check: RuntimeError: a b\n"),
    ],
)
def test_ends(tmp_path: Path, lines: str, code: int, said: str) -> None:
    ran = run_program(blob(tmp_path, HONEST), command=patched(lines))
    assert ran.code == code
    assert said in ran.last_words
    assert ran.lines == []


def test_a_broken_rulebook_is_a_matter_of_configuration(tmp_path: Path) -> None:
    book = blob(tmp_path, Path(rulebook.BOOK).read_bytes().replace(b"\nkind = ", b"\nkinds = ", 1), "rules.toml")
    lines = f"verify = c.rulebook.verify\nc.rulebook.verify = lambda: verify({str(book)!r})"
    ran = run_program(blob(tmp_path, HONEST), command=patched(lines))
    assert (ran.code, ran.lines) == (78, [])
    line = next(n for n, text in enumerate(book.read_text("utf-8").splitlines(), 1) if text.startswith("["))
    assert f"{book}:{line}: [" in ran.last_words


@pytest.mark.parametrize("output", ["manifest_fd", "payload_fd"])
def test_no_room_for_what_it_writes(tmp_path: Path, output: str) -> None:
    """/dev/full answers every write as a full disk does (full(4))."""
    media = "tar+gzip" if output == "payload_fd" else "tar"
    data = gzip.compress(HONEST) if output == "payload_fd" else HONEST
    with blob(tmp_path, data).open("rb") as source, open("/dev/full", "wb", buffering=0) as full:
        ended = subprocess.run(
            [*COMMAND, json.dumps({"media": media, output: full.fileno()}), LIMITS_JSON],
            stdin=source, capture_output=True, env={"LC_ALL": "C.UTF-8"}, pass_fds=[full.fileno()], check=False,
        )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (73, b"")
    assert b"No space left on device" in ended.stderr


def armed(lines: str) -> list[str]:
    """Return the command of a checker that runs some lines after its warm-up, when nothing hostile has been read."""
    indented = "".join(f" {line}\n" for line in lines.splitlines())
    return patched(f"w = c._warm_up\ndef warm(*a):\n w(*a)\n{indented}c._warm_up = warm")


@pytest.mark.parametrize(("words", "code"), [(b"\1\1", 0), (b"\1", 70), (b"", 70)])
def test_each_lower_manifest_is_read_behind_the_gate(tmp_path: Path, words: bytes, code: int) -> None:
    """They are written while the layer is read; without a word from the broker for each there is no verdict."""
    below = [check(HONEST), check(HONEST, OTHER)]
    lower = [os.memfd_create("lower") for _ in below]
    reading, writing = os.pipe()
    job = json.dumps({"media": "tar", "lower": lower, "gate_fd": reading})
    with blob(tmp_path, tar(member(b"d/.wh.f"))).open("rb") as source:
        process = subprocess.Popen(
            [*COMMAND, job, LIMITS_JSON],
            stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"LC_ALL": "C.UTF-8"},
            pass_fds=[*lower, reading],
        )  # fmt: skip
    os.close(reading)
    for descriptor, layer, word in zip(lower, below, words.ljust(2), strict=True):
        os.write(descriptor, layer.manifest)
        if word == 1:
            os.write(writing, b"\1")
    os.close(writing)
    said, _ = process.communicate(timeout=60)
    for descriptor in lower:
        os.close(descriptor)
    assert process.returncode == code
    if code == 0:
        assert json.loads(said)["parent"] == below[-1].report["layer"]


def test_a_mistake_inside_the_sandbox_is_one_line_and_no_death(tmp_path: Path) -> None:
    """The traceback printer would open source files: killed, and nobody would know why."""
    command = armed("import unpriv.merge as m\nm.check = lambda *b: 1 // 0")
    ran = run_program(blob(tmp_path, HONEST), command=command)
    assert (ran.code, ran.last_words) == (70, "unpriv.check: ZeroDivisionError: integer division or modulo by zero\n")


def test_a_mistake_of_the_hashing_thread_is_not_lost(tmp_path: Path) -> None:
    ran = run_program(blob(tmp_path, HONEST), command=armed("c.Hasher._hash = lambda *b: 1 // 0"))
    assert (ran.code, ran.lines) == (70, [])
    assert "ZeroDivisionError" in ran.last_words


def test_progress_comes_before_the_verdict(tmp_path: Path) -> None:
    ran = run_program(blob(tmp_path, tar(member(b"f", bytes(40 << 20)))))
    assert [line["type"] for line in ran.lines] == ["progress", "progress", "accepted"]
    assert ran.lines[0]["done_bytes"] == 16 << 20


def test_a_broker_that_went_away_ends_the_check(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with blob(tmp_path, tar(member(b"f", bytes(40 << 20)))).open("rb") as source:
        ended = subprocess.run(
            [*COMMAND, '{"media":"tar"}', LIMITS_JSON],
            stdin=source, stdout=writing, stderr=subprocess.PIPE, env={"LC_ALL": "C.UTF-8"}, check=False,
        )  # fmt: skip
    os.close(writing)
    assert ended.returncode == 70
    assert b"BrokenPipe" in ended.stderr


def test_memory_is_bounded_by_a_refusal(tmp_path: Path) -> None:
    """A hundred thousand members in eight MiB more than the program takes: a named refusal, not a death."""
    tight = (
        "import os\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGESIZE')\n"
        "rlimits = c.rlimits\n"
        "c.rlimits = lambda *b: rlimits(*b) | {'as': size + (8 << 20)}"
    )
    path = blob(tmp_path, tar(*(member(b"%050d" % n) for n in range(100_000))))
    assert run_program(path).code == 0
    ran = run_program(path, command=armed(tight))
    assert (ran.code, ran.rule) == (65, "memory_exceeded"), ran.last_words


def test_two_hundred_thousand_files_fit_into_a_hundred_mib(tmp_path: Path) -> None:
    path = tmp_path / "small.tar"
    write_small_files(path)
    ran = run_program(path, command=MEASURED)
    assert ran.code == 0
    assert ran.report["entries"] > 200_000
    assert 0 < ran.peak_bytes < 100 << 20, ran.peak_bytes
    path.unlink()


def test_cpu_time_has_a_second_limit_in_the_kernel(tmp_path: Path) -> None:
    """Even a checker that never looks at a clock ends."""
    forever = (
        "import collections, itertools\n"
        "c.pipeline.verdict = lambda *b: collections.deque(itertools.count(), 0)\n"
        "rlimits = c.rlimits\n"
        "c.rlimits = lambda *b: rlimits(*b) | {'cpu': 1}"
    )
    ran = run_program(blob(tmp_path, HONEST), command=armed(forever))
    assert ran.code in (-signal.SIGXCPU, -signal.SIGKILL)
    assert ran.lines == []


def test_output_has_a_limit_in_the_kernel() -> None:
    in_force = LIMITS
    assert program.rlimits(in_force, 3) == {
        "as": in_force.run.address_space_bytes,
        "cpu": in_force.run.cpu_s + 10,
        "fsize": in_force.stream.payload_bytes + (1 << 30),
        "nofile": 11,
        "nproc": 0,
    }


def test_the_environment_decides_nothing(tmp_path: Path) -> None:
    """Another locale, a library or a path in the environment: the program is isolated and sets its own."""
    for variables in ({}, {"LC_ALL": "C"}, {"LC_ALL": "tr_TR.UTF-8"}, {"LIBARCHIVE": "/nonexistent"}):
        with blob(tmp_path, HONEST).open("rb") as source:
            manifest = os.memfd_create("m")
            ended = subprocess.run(
                [*COMMAND, json.dumps({"media": "tar", "manifest_fd": manifest}), LIMITS_JSON],
                stdin=source, capture_output=True, env=variables, pass_fds=[manifest], check=False,
            )  # fmt: skip
            assert ended.returncode == 0, (variables, ended)
            assert os.pread(manifest, 1 << 20, 0) == check(HONEST).manifest
            os.close(manifest)


def test_every_way_to_refuse_works_inside_the_sandbox(tmp_path: Path) -> None:
    """Messages, escapes and codecs must not need a file at their first use: all refusals, for real."""
    from tests.unpriv.test_framing import REFUSED

    names = sorted({rule: name for name, (_, rule) in REFUSED.items()}.items())
    odd = b"\x1b\xff\xed\xa0\x80\\\xe2\x80\xae"
    for rule, name in names:
        ran = run_program(blob(tmp_path, tar(member(odd), REFUSED[name][0])))
        assert (ran.code, ran.rule, ran.last_words) == (65, rule, ""), name
