from pathlib import Path

from broker import policy
from broker.settings import POLICY_DIR


def test_every_value_of_the_policy_is_shown_with_its_line() -> None:
    found = {g.key: g for g in policy.grants()}
    limit = found["limits.run.wall_clock_s"]
    path, _, line = limit.origin.rpartition(":")
    assert "wall_clock_s" in Path(path).read_text().splitlines()[int(line) - 1]
    assert found["helper.quota.activations"].value == "64"
    path, _, line = found["helper.quota.activations"].origin.rpartition(":")
    assert Path(path).read_text().splitlines()[int(line) - 1].startswith("activations")
    assert "protocol.request.commit.brings" in found
    assert any(key.startswith("syscalls.check.") for key in found)
    assert found["systemd.imgpull-helper@.service.NoNewPrivileges"].value == "yes"
    assert found["authority.populate.capabilities_in_namespace"].value.startswith("CHOWN, ")


def test_every_file_of_the_policy_is_shown() -> None:
    """Data that binds a program and is not shown would be a grant that nobody sees."""
    shown = {Path(g.origin.rpartition(":")[0]).name for g in policy.grants()}
    kinds = (".toml", ".seccomp", ".service", ".socket", ".timer")
    there = {path.name for path in POLICY_DIR.rglob("*") if path.suffix in kinds}
    assert shown == there - {"rules.toml"}  # these are texts: `imgpull explain`


def test_administrators_file_goes_before_ours(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text("\n[run]\nwall_clock_s = 60\n")
    found = {g.key: g for g in policy.grants(system_dir=tmp_path)}
    assert found["limits.run.wall_clock_s"].value == "60"
    assert found["limits.run.wall_clock_s"].origin == f"{tmp_path}/limits.toml:3"


def test_every_origin_names_a_line_that_exists() -> None:
    for grant in policy.grants():
        path, _, line = grant.origin.rpartition(":")
        assert 1 <= int(line) <= len(Path(path).read_text().splitlines()), grant
