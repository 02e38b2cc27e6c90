"""The table of the state machine library's capabilities against its tests, printed at the end of the session.

A test says what it shows by ``@pytest.mark.capability("name")``, or, for a mistake that a library of this kind has made
before (https://github.com/superfly/fsm at eb33c5d), by ``@pytest.mark.mistake("what it was")``.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.world import world as world

MEMORY = Path("/dev/shm")  # a death by signal loses nothing that was written, wherever it lies
ROWS: pytest.StashKey[dict[tuple[str, str], list[tuple[str, str]]]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """Make the two markers known."""
    config.addinivalue_line("markers", "capability(name): what the library can do, shown by this test")
    config.addinivalue_line("markers", "mistake(name): what such libraries got wrong, and this test would notice")
    config.stash[ROWS] = {}


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Give a folder in memory, for tests that commit thousands of times; an ordinary one where there is none."""
    if not MEMORY.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="imgpull-test-", dir=MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note how each marked test went."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # pluggy gives a result to an old-style wrapper
    if report.when != "call" and report.passed:
        return
    for kind in ("capability", "mistake"):
        for marker in item.iter_markers(kind):
            row = item.config.stash[ROWS].setdefault((kind, str(marker.args[0])), [])
            row.append((item.name, report.outcome))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table: capability or mistake, verdict, tests."""
    rows = config.stash[ROWS]
    for kind, title in (("capability", "capabilities of the state machine"), ("mistake", "mistakes it does not make")):
        chosen = sorted((name, tests) for (k, name), tests in rows.items() if k == kind)
        if not chosen:
            continue
        terminalreporter.section(f"{title}: {len(chosen)}")
        for name, tests in chosen:
            verdict = "shown" if all(outcome == "passed" for _, outcome in tests) else "NOT SHOWN"
            names = sorted({test.split("[")[0].removeprefix("test_") for test, _ in tests})
            shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            terminalreporter.line(f"{verdict:9}  {name:<88.88}  {shown}")
