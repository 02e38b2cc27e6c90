"""`imgpull policy audit` proves what it says, and would say so if a way were open."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker import audit, policy
from broker.cli import imgpull
from broker.settings import load
from tests.support.helper import Helper
from tests.support.output import check_output


def test_every_attempt_ends_as_the_policy_says() -> None:
    environ = {"HOME": "/nonexistent", "IMGPULL_HELPER_SOCKET": "/nonexistent"}
    rows = audit.audit(load({}, environ))
    assert {row.place for row in rows} == {"check", "fetch"}
    assert [row for row in rows if not row.ok] == []
    assert [(row.place, row.attempt) for row in rows if row.got == "granted"] == [("fetch", "connect_tcp")]


def test_way_that_is_open_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same attempts from a process that is not locked in: what it tells then is not `ok`."""
    script = "import unpriv.audit as a; a._lock = lambda *_: None; a.main()"
    monkeypatch.setattr(audit, "_program", lambda *words: [sys.executable, "-c", script, *words])
    monkeypatch.setattr(audit, "ENVIRONMENT", {"PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    for name in ("read_a_file", "fork", "connect_tcp", "executable_memory"):
        assert audit._try("check", name, str(tmp_path)) == "granted"
    assert not audit.Attempt("check", "fork", "denied", "granted").ok


@pytest.mark.root
def test_door_of_the_real_helper(helper: Helper) -> None:
    result = CliRunner().invoke(
        imgpull,
        ["policy", "audit", "--json"],
        env={"IMGPULL_HELPER_SOCKET": str(helper.socket), "HOME": "/nonexistent"},
    )
    check_output(["policy", "audit", "--json"], result.stdout)
    first, *rows = [row for row in json.loads(result.stdout) if row["place"] == "helper"]
    # The helper of the tests has settings of its own, for a small pool: it must be told from the one that is shown.
    assert (first["attempt"], first["got"].split(" ")[0], first["ok"]) == ("policy_is_the_one_shown", "other", False)
    assert result.exit_code == 1
    assert [row["got"] for row in rows] == ["denied (hung up)"] * len(audit.KNOCKS)


@pytest.mark.root
def test_helper_that_is_bound_by_what_is_shown(helper: Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "helpers_digest", lambda: policy.helpers_digest(system_dir=helper.config.parent))
    assert audit._compare(str(helper.socket)) == "same"
