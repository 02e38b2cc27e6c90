"""The Debian package is of this version and carries what there is; `make deb` builds it, which takes a minute."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
DEBIAN: Final = Path(__file__).resolve().parent / "debian"
RULES: Final = (DEBIAN / "rules").read_text(encoding="utf-8")
CONTROL: Final = (DEBIAN / "control").read_text(encoding="utf-8")
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_version_is_the_projects() -> None:
    head = (DEBIAN / "changelog").read_text(encoding="utf-8").splitlines()[0]
    assert f"imgpull ({PROJECT['project']['version']}) " in head


def test_every_unit_is_installed() -> None:
    folder = ROOT / "policy/systemd"
    for path in (*folder.iterdir(), *(folder / "user").iterdir()):
        named = f"{path.parent.relative_to(ROOT)}/{path.name}" in RULES
        wild = f"{path.parent.relative_to(ROOT)}/*{path.suffix}" in RULES or "policy/systemd/user/*" in RULES
        assert path.is_dir() or named or wild, path


def test_every_man_page_is_in_the_wheel_and_the_package() -> None:
    shared = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    pages = {path.name for path in (ROOT / "broker/man").iterdir()}
    assert {Path(name).name for name in shared} == pages
    assert all(target == f"share/man/man{name[-1]}/{Path(name).name}" for name, target in shared.items())
    assert "broker/man/*" in RULES


def test_helper_is_where_the_units_start_it() -> None:
    for unit in (ROOT / "policy/systemd").glob("*.service"):
        for program in re.findall(r"(?m)^ExecSt.*?(/usr/lib/\S+\.pyz)", unit.read_text(encoding="utf-8")):
            assert f"ROOT)/{program.removeprefix('/')}".replace("ROOT)/usr/lib/imgpull", "LIB)") in RULES


def test_nothing_is_enabled_or_started_by_being_installed() -> None:
    assert re.search(r"(?m)^override_dh_installsystemd:\n$", RULES), "its scripts would start them"
    assert "dh_installsystemduser --no-enable" in RULES
    script = (DEBIAN / "imgpull.postinst").read_text(encoding="utf-8")
    assert not re.search(r"(?m)^[^#]*\b(enable|start|restart|create)\b", script)


@pytest.mark.parametrize("name", ["postinst", "prerm", "postrm"])
def test_scripts_are_read_by_dash_and_take_what_debhelper_adds(name: str) -> None:
    path = DEBIAN / f"imgpull.{name}"
    subprocess.run(["dash", "-n", str(path)], check=True)
    assert path.read_text(encoding="utf-8").startswith("#!/bin/sh\n")
    assert "\nset -e\n" in path.read_text(encoding="utf-8") and "\n#DEBHELPER#\n" in path.read_text(encoding="utf-8")


def test_units_that_are_shipped_are_those_that_the_scripts_stop() -> None:
    script = (DEBIAN / "imgpull.prerm").read_text(encoding="utf-8")
    for unit in (ROOT / "policy/systemd").glob("imgpull-*.s*"):
        assert unit.name.replace("@.", "@*.") in script


def test_packages_that_the_program_needs_are_dependencies() -> None:
    listed = (ROOT / "tests/setup/packages.txt").read_text(encoding="utf-8").split("# the demo")[0]
    wanted = set(re.findall(r"(?m)^([a-z0-9-]+)", listed)) - {"python3-venv"}
    named = {
        word.split()[0]
        for word in re.findall(r"(?m)^(?:Depends|Recommends): (.+)$", CONTROL)
        for word in word.split(", ")
    }
    assert wanted <= named
