"""Imports point toward privilege, and only at a module named ``protocol``; root's code needs the standard library."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("broker", "unpriv", "privhelper")
ALLOWED = {
    "unpriv": {"broker.protocol", "privhelper.protocol"},
    "broker": {"privhelper.protocol"},
    "privhelper": set(),
}
OWNERS = {"ctypes": {"privhelper/kernel.py", "privhelper/dm.py"}, "subprocess": {"privhelper/stores/ext4.py"}}


def imported(path: Path) -> Iterator[str]:
    """Yield each module that a file names in an import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            # `from privhelper import protocol` names a module of the package
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize("package", OURS)
def test_imports_point_toward_privilege(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for name in imported(path):
            top = name.partition(".")[0]
            if top in OURS and top != package and is_module(name) and name != top and name not in ALLOWED[package]:
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


def test_no_package_is_imported_whole() -> None:
    """``import privhelper`` gives a name from which every module of it could be reached."""
    wrong = []
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    wrong += [str(path) for alias in node.names if alias.name in OURS and alias.name != package]
    assert wrong == []


def test_root_imports_the_standard_library_only() -> None:
    wrong = []
    for path in sorted((ROOT / "privhelper").rglob("*.py")):
        for name in imported(path):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "privhelper":
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


@pytest.mark.parametrize("library", OWNERS)
def test_dangerous_library_has_its_owner_in_root(library: str) -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "privhelper").rglob("*.py")
        if library in {name.partition(".")[0] for name in imported(path)}
    }
    assert users <= OWNERS[library]


@pytest.mark.parametrize("store", ["reflink", "thin"])
def test_serving_process_cannot_run_a_program(store: str) -> None:
    """What a request reaches loads neither subprocess nor a module that would; site-packages are switched off."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import privhelper.__main__\n"
        "from privhelper import devices, policy\n"
        "grants = policy.load(None)\n"
        f"grants.settings['store'] = {store!r}\n"
        "devices.open_store(grants)\n"
        "print(sorted({'subprocess', '_posixsubprocess', 'pty', 'multiprocessing'} & sys.modules.keys()))\n"
        "by_hand = ('_pool', '.ext4', '.administer', '.audit', '.build')\n"
        "print(sorted(name for name in sys.modules if name.endswith(by_hand)))\n"
        "print(any('site-packages' in path or 'dist-packages' in path for path in sys.path))\n"
    )
    done = subprocess.run(["/usr/bin/python3", "-I", "-S", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[]\nFalse\n"


def test_root_serialises_nothing_that_runs() -> None:
    """No pickle, marshal, shelve, eval or exec where root reads."""
    wrong = []
    for path in sorted((ROOT / "privhelper").rglob("*.py")):
        names = {name.partition(".")[0] for name in imported(path)}
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        wrong += [f"{path.name}: {bad}" for bad in names & {"pickle", "marshal", "shelve"} | calls & {"eval", "exec"}]
    assert wrong == []
