"""What every test can ask for, and which skips and leftovers are not accepted.

Rule 1: in CI (CI=true) each skip must be listed in ALLOWED_SKIPS with its reason, else the run fails: a test that does
not run proves nothing.
Rule 2: in CI the whole run leaves no loop device, mount, device-mapper device or account behind, else it fails. A run
that goes on beside another (tests/run.sh) makes none of these, and cannot tell the other's from its own: it does not
look.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.layers.families import Family, families
from tests.setup.installed import installed_copy
from tests.support.accounts import (
    TEST_PREFIX,
    Account,
    client_group,
    is_abandoned,
    remove_abandoned,
    run_name,
    temporary_account,
)  # fmt: skip
from tests.support.helper import Helper, mend, running_helper

ALLOWED_SKIPS: Final = {  # reason, as a regular expression: why it may be absent in CI
    r"this kernel has no device-mapper": "tests/vm runs the same on a kernel that has it",
}
BESIDE: Final = os.environ.get("IMGPULL_TESTS_BESIDE") == "1"
STRICT: Final = os.environ.get("CI") == "true"
SKIPPED: Final = pytest.StashKey[list[str]]()
BEFORE: Final = pytest.StashKey[set[str]]()


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="session")
def group() -> Iterator[str]:
    """Return the name of a group that may ask the root helper; it exists."""
    remove_abandoned()
    for folder in Path("/var/tmp").glob(f"{TEST_PREFIX}*-helper"):
        if is_abandoned(folder.name):
            mend(folder)
    with client_group(run_name("clients")) as name:  # of this process: parallel runs do not take it from each other
        yield name


@pytest.fixture(scope="session")
def member(group: str) -> Iterator[Account]:
    """Return an ordinary user who may ask the root helper."""
    with temporary_account(run_name("member"), groups=[group]) as account:
        yield account


@pytest.fixture(scope="session")
def second_member(group: str) -> Iterator[Account]:
    """Return another ordinary user who may ask the root helper."""
    with temporary_account(run_name("second"), groups=[group]) as account:
        yield account


@pytest.fixture(scope="session")
def outsider() -> Iterator[Account]:
    """Return an ordinary user who may not ask the root helper."""
    with temporary_account(run_name("outsider")) as account:
        yield account


@pytest.fixture(scope="session")
def installed() -> Path:
    """Return the environment with this tree as a wheel, readable by all: ``installed / "bin/imgpull"``."""
    return installed_copy()


@pytest.fixture(scope="module")
def helper(group: str) -> Iterator[Helper]:
    """Return the real root helper on a reflink pool of 4 GiB; one a module."""
    folder = Path(f"/var/tmp/{run_name('helper')}")
    with running_helper(folder, group) as running:
        yield running


@pytest.fixture(scope="session")
def demo_families() -> dict[str, Family]:
    """Return the small real image families by name; built once a machine, half a minute."""
    return {family.name: family for family in families("demo")}


# ---------------------------------------------------------------- skips and leftovers


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPPED] = []
    config.stash[BEFORE] = _machine_state()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


class _Policy:
    """Counts skips where they are reported: also in the controller of a parallel run."""

    def __init__(self, config: pytest.Config) -> None:
        self.skipped = config.stash[SKIPPED]

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reason = reason.removeprefix("Skipped: ")
            if not any(re.search(allowed, reason) for allowed in ALLOWED_SKIPS):
                self.skipped.append(f"{report.nodeid}: {reason}")

    pytest_runtest_logreport = note
    pytest_collectreport = note


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Policy(session.config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if STRICT and (session.config.stash[SKIPPED] or _left_over(session.config)):
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if STRICT:
        for title, lines in (
            ("skips that ALLOWED_SKIPS does not list", config.stash[SKIPPED]),
            ("left behind", sorted(_left_over(config))),
        ):
            if lines:
                terminalreporter.section(title, red=True)
                for line in lines:
                    terminalreporter.write_line(line)


def _left_over(config: pytest.Config) -> set[str]:
    if hasattr(config, "workerinput") or BESIDE:  # the others are still at work
        return set()
    before = config.stash[BEFORE]
    return _machine_state() - before


def _machine_state() -> set[str]:
    """Return what a test could leave on this machine: one word each."""
    mounts = {f"mount {line.split()[1]}" for line in Path("/proc/self/mounts").read_text().splitlines()}
    blocks = Path("/sys/block")
    loops = {f"loop device {path.parent.parent.name}" for path in blocks.glob("loop*/loop/backing_file")}
    mapped = {f"device-mapper device {path.name}" for path in blocks.glob("dm-*")}
    accounts = {f"account {entry.pw_name}" for entry in pwd.getpwall() if entry.pw_name.startswith("imgpull-")}
    return mounts | loops | mapped | accounts
