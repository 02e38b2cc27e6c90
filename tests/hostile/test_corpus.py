"""The public corpus: 150 archives, hostile and honest, each run through the real program in its sandbox.

``expected.json`` says what a strict validator must do (README.md explains the words); ``decisions.toml`` says what ours
does wherever that leaves a choice. The attacks try to touch /tmp/imgpull-pwned: it must not exist afterwards.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest

from tests.unpriv.checking import MEASURED, Ran, differences, run_program

HERE: Final = Path(__file__).resolve().parent
CASES: Final[dict[str, dict[str, Any]]] = json.loads((HERE / "expected.json").read_text("utf-8"))
DECISIONS: Final[dict[str, dict[str, str]]] = tomllib.loads((HERE / "decisions.toml").read_text("utf-8"))
VICTIM: Final = Path("/tmp/imgpull-pwned")


def run(case: dict[str, Any]) -> Ran:
    lowers: list[bytes] = []
    result = None
    for name in case.get("layers") or [case["file"]]:
        command = MEASURED if case["verdict"] == "bounded" else None
        result = run_program(HERE / "corpus" / name, case["media"], lowers, want_tree=True, command=command)
        if result.code:
            break
        lowers.append(result.manifest)
    assert result is not None
    return result


@pytest.mark.parametrize("name", CASES)
def test_corpus(name: str) -> None:
    case = CASES[name]
    result = run(case)
    assert not VICTIM.exists()
    assert result.code in (0, 65), result.last_words
    assert result.last_words == ""
    found = "accept" if result.code == 0 else "reject"
    expected = DECISIONS[name]["verdict"] if name in DECISIONS else case["verdict"]
    if case["verdict"] == "bounded":
        bounds = case["limits"]
        assert 0 < result.peak_bytes <= bounds["rss_mb"] << 20
        assert result.cpu_s <= bounds["cpu_s"]
        assert result.payload_bytes <= bounds["out_mb"] << 20
        expected = bounds["then"]
    assert found == expected, result.report
    if found == "accept":
        trees = [case["tree"]] if case["verdict"] == "accept" else [t for t in case["alts"] if t != "reject"]
        assert [] in [differences(tree, result.tree) for tree in trees], differences(trees[0], result.tree)
    else:
        assert result.report["violations"][-1]["reason"]
        if name in DECISIONS:
            assert result.rule == DECISIONS[name]["rule"]


def test_every_choice_is_decided() -> None:
    """Each case that leaves a choice has a decision, the decision is one of the allowed ones, and no other has one."""
    open_cases = {name for name, case in CASES.items() if case["level"] != "must"}
    assert set(DECISIONS) == open_cases
    for name, decision in DECISIONS.items():
        case = CASES[name]
        allowed = {case["verdict"]} | {"reject" if alt == "reject" else "accept" for alt in case.get("alts", ())}
        assert decision["verdict"] in allowed, name
        assert decision["why"]
