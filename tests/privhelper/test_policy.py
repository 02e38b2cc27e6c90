"""What is granted is what policy/ says: the loader, the units, and the living processes."""

import itertools
import os
import re
import resource
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from privhelper import administer, audit, build, kernel, policy, seccomp
from privhelper.policy import PolicyError
from tests.privhelper.client import ROOT, SYSTEM_PYTHON, Layer, memfd
from tests.privhelper.conftest import Installation
from tests.privhelper.session import everything

POLICY = ROOT / "policy"
UNIT = POLICY / "systemd/imgpull-helper@.service"
AUTHORITY = tomllib.loads((POLICY / "authority.toml").read_text())
NUMBERS = seccomp.numbers((POLICY / "syscalls/numbers.txt").read_text())
SOURCES = [path for path in sorted((ROOT / "privhelper").rglob("*.py")) if path.name not in ("build.py", "__init__.py")]
root = pytest.mark.root

# ---------------------------------------------------------------- the loader


def write(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "helper.toml"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


@root
def test_administrator_changes_values(tmp_path: Path) -> None:
    grants = policy.load(write(tmp_path, "store = 'thin'\n[quota]\nactivations = 3\n"))
    assert (grants.settings["store"], grants.settings["quota"]["activations"]) == ("thin", 3)
    assert grants.settings["quota"]["layer_bytes"] > 3
    assert grants.digest != policy.load(write(tmp_path, "")).digest


@root
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stores = 1", "stores"), ("[quotas]\na = 1", "quotas"), ("[quota]\nactivation = 1", "activation"),
        ("[quota]\nactivations = '1'", "activations"), ("quota = 1", "quota"), ("[quota]\nactivations = true", "activ"),
        ("nonsense", "helper.toml"), ("a = '\udcff'", "helper.toml"),
        ("[limits]\nmanifest_bytes = 17179869185", "manifest_bytes"), ("[limits]\nentries = -1", "entries"),
        ("store = 'quota'", "neither"),
        ("[populate]\nfirst_host_id = 0", "ids 0"), ("[populate]\nid_count = 4294967295", "ids 2147483648"),
    ],
)  # fmt: skip
def test_administrators_mistake_stops_the_helper(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, "")
    Path(path).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(PolicyError, match=told):
        policy.load(path)


@root
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_can_write_does_not_count(tmp_path: Path, mode: int) -> None:
    with pytest.raises(PolicyError, match="root alone"):
        policy.load(write(tmp_path, "", mode))


@root
def test_file_of_another_user_does_not_count(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    os.chown(path, 61001, 0)
    with pytest.raises(PolicyError, match="root alone"):
        policy.load(path)


@pytest.mark.parametrize(
    "line",
    [
        "allow openat", "allow openat -- ", "allow openat --why", "deny openat -- why", "allow mounted -- why",
        "allow mmap arg2 !& -- why", "allow mmap arg2 >= 4 -- why", "allow mmap arg2 == EVERYTHING -- why",
    ],
)  # fmt: skip
def test_system_call_without_a_reason_is_no_rule(line: str) -> None:
    with pytest.raises(ValueError, match="line 2"):
        seccomp.program(f"# comment\n{line}\n", NUMBERS)


def interpret(program: bytes, number: int, arguments: tuple[int, ...], arch: int = 0xC000003E) -> int:
    """Run a seccomp program on one call, as the kernel would."""
    import struct

    data = struct.pack("=IIQ6Q", number, arch, 0, *(arguments + (0,) * 6)[:6])
    steps = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    accumulator = at = 0
    while True:
        code, when_true, when_false, value = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x06:
            return int(value)
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += when_true if taken else when_false


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of another architecture")
def test_seccomp_program_allows_the_listed_calls_and_kills_on_the_rest() -> None:
    program = policy.load(None).filters["populate"]
    text = (POLICY / "syscalls/populate.seccomp").read_text()
    listed = {line.split()[1] for line in text.splitlines() if line.startswith("allow")}
    numbers = {NUMBERS[name] for name in listed}
    conditional = {NUMBERS[name] for name in ("mmap", "madvise", "mknodat")}
    allowed = {number for number in range(1024) if interpret(program, number, ()) == 0x7FFF0000}
    assert allowed == numbers - conditional | {NUMBERS["mknodat"]}
    memory, node, every = NUMBERS["mmap"], NUMBERS["mknodat"], 2**64 - 1
    assert interpret(program, memory, (0, 1, 3, 0, every)) == 0x7FFF0000
    assert interpret(program, memory, (0, 1, 7, 0, every)) == 0x80000000  # PROT_EXEC
    assert interpret(program, memory, (0, 1, 3, 0, 5)) == 0x80000000  # a file
    assert interpret(program, node, (3, 0, 0o010644)) == 0x7FFF0000  # a fifo
    assert interpret(program, node, (3, 0, 0o020644)) == 0x80000000  # a character device
    assert interpret(program, node, (3, 0, 0o060644)) == 0x80000000  # a block device
    assert interpret(program, 257, (), arch=0x40000003) == 0x80000000  # i386
    assert interpret(program, 257 | 0x40000000, ()) == 0x80000000  # x32


# ---------------------------------------------------------------- the units


def unit_values(key: str) -> list[str]:
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")]


def test_unit_has_the_capabilities_of_authority_toml() -> None:
    (value,) = unit_values("CapabilityBoundingSet")
    assert value.split() == [f"CAP_{name}" for name in AUTHORITY["helper"]["capabilities"]]


def test_every_directive_of_the_units_is_one_that_systemd_knows() -> None:
    assert shutil.which("systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, sorted((POLICY / "systemd").glob("*.s*et"))), str(UNIT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    unknown = [line for line in done.stderr.splitlines() if "Unknown" in line or "Failed to parse" in line]
    assert unknown == []


def test_exposure_of_the_unit() -> None:
    """The gate: 2.1 or less."""
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=21", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout


def unit_system_calls() -> set[str]:
    names = {name for value in unit_values("SystemCallFilter") for name in value.split()}
    default = subprocess.run(
        ["systemd-analyze", "syscall-filter", "@default"], capture_output=True, text=True, check=True
    )
    return names - {"@default"} | {
        line.strip() for line in default.stdout.splitlines()[1:] if not line.startswith("    #")
    }


def test_unit_cannot_attach_a_mount() -> None:
    attaching = {"mount", "umount", "umount2", "move_mount", "open_tree", "pivot_root", "fspick"}
    assert not attaching & unit_system_calls()
    assert not [name for name in unit_system_calls() if name.startswith("@")]


@root
def test_unit_allows_what_the_helper_calls(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    with installation.connect(prefix=("strace", "-f", "-o", str(trace))) as helper:
        everything(helper, layer, tmp_path)
    called = set(re.findall(r"^\d+ +([a-z_0-9]+)\(", trace.read_text(), re.MULTILINE))
    assert {"fsmount", "mount_setattr", "preadv2", "openat"} <= called
    assert called <= unit_system_calls() | {"execve"}, called - unit_system_calls()


@root
def test_populate_calls_nothing_that_is_not_listed(installation: Installation, layer: Layer, tmp_path: Path) -> None:
    """And each listed call is needed, or is one of the few that another libc or a larger layer needs."""
    trace = tmp_path / "trace"
    with installation.connect(prefix=("strace", "-f", "-o", str(trace))) as helper:
        everything(helper, layer, tmp_path)
    for role, spare in {
        "populate": {"preadv", "fstat", "mremap", "madvise", "munmap", "mmap", "brk", "mknodat"},
        "verify": {"fstat", "mremap", "madvise", "munmap", "mmap", "brk"},
    }.items():
        text = (POLICY / f"syscalls/{role}.seccomp").read_text()
        listed = {line.split()[1] for line in text.splitlines() if line.startswith("allow")}
        needed = "mkdirat" if role == "populate" else "readlinkat"
        called: set[str] = set()
        for calls in locked_calls(trace.read_text()):
            if needed in calls:
                called |= calls
        assert called - listed == set()
        assert listed - called <= spare


def locked_calls(trace: str) -> list[set[str]]:
    """Return what each child called after its seccomp program was in force."""
    children: dict[str, set[str]] = {}
    for pid, name, rest in re.findall(r"^(\d+) +([a-z_0-9]+)\((.*)$", trace, re.MULTILINE):
        if pid in children:
            children[pid].add(name)
        elif name == "prctl" and rest.startswith("PR_SET_SECCOMP"):
            children[pid] = set()
    return list(children.values())


# ---------------------------------------------------------------- the living processes


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def capability_mask(names: list[str]) -> int:
    return sum(1 << kernel.CAPABILITIES[name] for name in names)


def descriptors(pid: int, payload: Path) -> list[str]:
    """Return what a process holds, in the words of authority.toml; a file below its own root as its path."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        name, flags = os.readlink(path), int(Path(f"/proc/{pid}/fdinfo/{path.name}").read_text().split()[3], 8)
        if int(path.name) < 3 and not name.startswith("/big"):
            name = "log"
        elif name.startswith(("pipe:", "socket:")):
            name = {"pipe": "result pipe", "socket": "connection"}[name.partition(":")[0]]
        elif name == "/":
            name = "mount" if flags & os.O_PATH else "sync"
        words = {"/memfd:manifest (deleted)": "manifest", str(payload): "payload"}
        found.append(words.get(name, name))
    return found


def capabilities(found: dict[str, str], names: list[str]) -> bool:
    """Tell whether a process has these and can get no other."""
    mask = capability_mask(names)
    sets = [int(found[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
    return sets == [0, mask, mask, mask, 0]


@root
def test_living_helper_and_populate_hold_what_authority_toml_says(installation: Installation, tmp_path: Path) -> None:
    big = Layer()
    big.directory(0, "", op="meta")
    for number in range(8):
        big.file(0, f"big{number}", os.urandom(1 << 20) * 32)
    payload = big.write_payload(tmp_path)
    file, data = memfd(big.manifest()), os.open(payload, os.O_RDONLY)
    with installation.connect() as helper:
        sizes = {"manifest_bytes": len(big.manifest()), "payload_bytes": len(big.payload)}
        for message, fds, role in (
            ({"op": "commit", **sizes}, [file, data], "populate"),
            ({"op": "verify", "layer": big.id()}, [], "verify"),
        ):
            helper.send(message, fds)
            assert helper.receive()[0]["type"] == "progress"
            with helper.stopped_child() as child:
                check_helper(helper.process.pid, installation, payload, str(message["op"]))
                check_child(role, child, helper.process.pid, payload)
            while (reply := helper.receive()[0])["type"] == "progress":
                pass
            assert reply["type"] == "ok"
    os.close(file)
    os.close(data)


def check_helper(pid: int, installation: Installation, payload: Path, op: str) -> None:
    grant, found = AUTHORITY["helper"], status(pid)
    assert capabilities(found, grant["capabilities"])
    assert set(found["Uid"].split()) == {str(grant["user"])}
    assert (found["NoNewPrivs"], found["Threads"]) == ("1", "1")
    kept = str(installation.state / "manifests")
    words = {f"{installation.state}/ledger.db": "ledger", f"{installation.state}/locks": "locks"}
    held = [words.get(name, name) for name in descriptors(pid, payload)]
    held = ["manifest" if name.startswith(kept) else name for name in held]  # verify reads the one that is kept
    assert sorted(held) == sorted(grant["descriptors"] + grant[f"descriptors_of_a_{op}"])


def check_child(role: str, pid: int, parent: int, payload: Path) -> None:
    grant, found = AUTHORITY[role], status(pid)
    assert capabilities(found, grant["capabilities_in_namespace"])
    assert set(found["Uid"].split()) == set(found["Gid"].split()) == {str(grant["user"])}
    assert found["Groups"] == ""
    assert (found["NoNewPrivs"], found["Seccomp"], found["Threads"]) == ("1", "2", "1")
    assert os.readlink(f"/proc/{pid}/ns/user") != os.readlink(f"/proc/{parent}/ns/user")
    mapped = Path(f"/proc/{pid}/uid_map").read_text().split()
    settings = tomllib.loads((POLICY / "helper.toml").read_text())["populate"]
    assert mapped == ["0", str(settings["first_host_id"]), str(settings["id_count"])]
    assert int(found["VmHWM"].split()[0]) < 64 << 10  # KiB
    held = ["root directory" if name == "sync" else name for name in descriptors(pid, payload)]
    held = ["manifest" if "/manifests/" in name else name for name in held]
    own = [name for name in held if re.fullmatch("/big[0-7]", name)]  # the file that it writes, or reads
    assert len(own) <= 1
    assert sorted(set(held) - set(own)) == sorted(grant["descriptors"])
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max processes +0 +0", limits) and re.search(r"Max core file size +0 +0", limits)


def test_authority_and_audit_agree_about_the_network() -> None:
    expectations = tomllib.loads((POLICY / "audit.toml").read_text())
    assert expectations.keys() == AUTHORITY.keys() - {"helper"}
    for role, attempts in expectations.items():
        assert AUTHORITY[role]["network"] == bool({"connect", "connect_tcp"} & set(attempts["granted"]))
        assert (POLICY / f"syscalls/{AUTHORITY[role]['syscalls']}.seccomp").exists()


@root
def test_audit_finds_what_the_policy_says(installation: Installation) -> None:
    done = installation.run("audit", check=False)
    print(done.stdout)
    rows = [line.split(None, 4) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row[0] for row in rows} == {"ok"}
    assert len(rows) == 2 * len(audit.ATTEMPTS)
    assert [(row[1], row[2]) for row in rows if row[4] == "granted"] == [
        ("populate", "open_its_root"), ("populate", "create_a_file"), ("verify", "open_its_root"),
    ]  # fmt: skip


@root
def test_audit_tells_a_way_that_is_open(
    installation: Installation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without seccomp and without Landlock some attempts succeed, and the audit does not say ok."""
    monkeypatch.setattr(kernel, "install_seccomp", lambda program: None)
    monkeypatch.setattr(kernel, "restrict_beneath", lambda root, rights: None)
    assert administer.run(policy.load(str(installation.config)), ["audit"]) == 1
    wrong = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert ["verify", "connect"] in wrong and ["populate", "connect"] in wrong


# ---------------------------------------------------------------- figures


def code_lines(path: Path) -> int:
    """Count lines that are neither blank nor comment nor docstring."""
    import ast
    import io
    import tokenize

    source = path.read_text()
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


PARTS = {
    "holds root's authority, answers requests": (
        "__main__", "protocol", "connection", "monitor", "answers", "admission", "devices", "ledger", "errors", "files",
        "policy", "seccomp", "sandbox", "kernel",
    ),
    "the reflink store": ("stores/base", "stores/reflink", "loops"),
    "the thin store": ("stores/thin", "dm"),
    "runs in the child, without authority": ("manifest", "populate", "verify"),
    "root's own commands, never loaded to serve": (
        "administer", "audit", "stores/ext4", "stores/reflink_pool", "stores/thin_pool",
    ),
}  # fmt: skip


def test_figures_of_the_code() -> None:
    """Print how much there is to read, without blank lines, comments and docstrings; every file belongs to a part."""
    files = {path.relative_to(ROOT / "privhelper").with_suffix("").as_posix(): path for path in SOURCES}
    assert sorted(name for names in PARTS.values() for name in names) == sorted(files)
    lines = {part: sum(code_lines(files[name]) for name in names) for part, names in PARTS.items()}
    for part, count in lines.items():
        print(f"{count:5} lines: {part}")
    print(f"{sum(lines.values()):5} lines of root's code in all")
    assert max(len(path.read_text().splitlines()) for path in SOURCES) <= 330, "a file is read in one go"


def test_start_up(tmp_path: Path) -> None:
    """Print how long the helper takes until it would read its first message: interpreter, imports, policy, ledger."""
    zipapp = tmp_path / "imgpull-helper.pyz"
    build.build(zipapp)
    steps = {
        "the interpreter": "pass",
        "and its imports": "import privhelper.__main__",
        "and policy/": "import privhelper.__main__ as m; m.policy.load(None)",
        "and the ledger": "import privhelper.__main__ as m; g = m.policy.load(None);"
        f" g.settings['state_dir'] = {str(tmp_path / 'state')!r}; m.Devices(g)",
    }
    start_ms = 0.0
    for step, code in steps.items():
        command = [SYSTEM_PYTHON, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(zipapp)!r}); {code}"]
        start_ms = min(cpu_ms(command) for _ in range(7))
        print(f"start-up: {start_ms:.0f} ms of CPU for {step}")
    assert start_ms < 60


def cpu_ms(command: list[str]) -> float:
    """Return the processor time that a command takes: what else the machine does is not in it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def test_zipapp_is_reproducible_and_complete(tmp_path: Path) -> None:
    first, second = tmp_path / "a.pyz", tmp_path / "b.pyz"
    build.build(first)
    build.build(second)
    assert first.read_bytes() == second.read_bytes()
    done: Any = subprocess.run([SYSTEM_PYTHON, "-I", "-S", str(first)], capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr.startswith("usage: imgpull-helper")) == (2, True)


# ---------------------------------------------------------------- the pages


def table(page: str, first: str) -> list[list[str]]:
    """Return the cells of the rows below the table head that begins with ``first``."""
    lines = iter((POLICY / page).read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            next(lines)
            break
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.mark.parametrize(("page", "first"), [("README.md", "grant"), ("THREATS.md", "asset")])
def test_every_row_names_the_tests_that_prove_it(page: str, first: str) -> None:
    """A grant or a threat without its proof is a wish."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"def (test_\w+)\(", tests))
    rows = table(page, first)
    assert len(rows) > 10
    assert [" | ".join(row) for row in rows if "`test_" not in row[-1]] == []
    assert set(re.findall(r"`(test_\w+)", (POLICY / page).read_text())) <= names


def test_reading_takes_an_hour_and_misses_no_code() -> None:
    assert sum(int(row[0]) for row in table("README.md", "minutes")) == 60
    text = (POLICY / "README.md").read_text()
    assert [path.name for path in SOURCES if path.name not in text and path.name not in SMALL] == []


SMALL = ("__main__.py", "errors.py", "files.py", "policy.py", "base.py")  # met on the way by every other file


def test_every_file_that_the_pages_name_is_there() -> None:
    missing = []
    for page in [POLICY / "README.md", POLICY / "THREATS.md"]:
        for word in re.findall(r"`([a-z_/-]+\.(?:py|toml|md|seccomp))`", page.read_text()):
            places = [ROOT / word, POLICY / word, ROOT / "privhelper" / word, ROOT / "privhelper/stores" / word]
            places += [ROOT / "tests/privhelper" / word]
            if not any(place.exists() for place in places):
                missing.append(f"{page.name}: {word}")
    assert missing == []
