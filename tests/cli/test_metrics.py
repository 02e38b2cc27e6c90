"""The Prometheus textfile: read by Prometheus' own parser, and true."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker import metrics
from tests.support.world import World

ROOT: Final = Path(__file__).resolve().parents[2]
REF: Final = "s3://bucket/images/one"


@pytest.fixture
def measured(world: World) -> World:
    world.environ["IMGPULL_METRICS_FILE"] = str(world.folder / "imgpull.prom")
    return world


def figures(world: World) -> dict[str, float]:
    """Return each sample by its name and labels, as Prometheus understands them."""
    text = (world.folder / "imgpull.prom").read_text(encoding="utf-8")
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[" ".join([sample.name, *(f"{k}={v}" for k, v in sample.labels.items())])] = float(sample.value)
    assert set(re.findall(r"(?m)^# TYPE (\S+)", text)) == {metric.name for metric in metrics.METRICS}
    return found


def test_figures_of_pulls_refusals_and_the_pool(measured: World) -> None:
    measured.put("one", b"aa", b"b")
    measured.put("two", b"aa", b"ccc")
    measured.put("evil", b"evil")
    for image in ("one", "two", "evil"):
        measured.run("pull", f"s3://bucket/images/{image}")
    measured.run("pull", "s3://bucket/images/absent")
    found = figures(measured)
    assert found["imgpull_pulls_total outcome=done"] == 2
    assert found["imgpull_pulls_total outcome=aborted"] == 2
    assert found["imgpull_failures_total code=archive-rejected"] == 1
    assert found["imgpull_failures_total code=no-such-object"] == 1
    assert found["imgpull_refusals_total rule=path_escapes_root"] == 1
    assert found["imgpull_layers_total how=new"] == 3
    assert found["imgpull_fetched_bytes_total"] == 2 + 1 + 3 + 4
    assert found["imgpull_step_seconds_total machine=layer step=check"] > 0
    assert (found["imgpull_images"], found["imgpull_activations"], found["imgpull_runs_active"]) == (2, 2, 0)
    assert (found["imgpull_helper_up"], found["imgpull_pool_ready"]) == (1, 1)
    assert found["imgpull_pool_bytes kind=data"] == 1 << 31
    assert found["imgpull_last_success_timestamp_seconds"] > 1.7e9


def test_file_is_readable_by_the_exporter_and_whole(measured: World) -> None:
    measured.put("one", b"a")
    measured.run("pull", REF)
    path = measured.folder / "imgpull.prom"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [name for name in os.listdir(measured.folder) if ".prom." in name] == []


def test_pull_with_nothing_to_do_writes_no_figures(measured: World) -> None:
    measured.put("one", b"a")
    measured.run("pull", REF)
    path = measured.folder / "imgpull.prom"
    path.unlink()
    assert measured.run("pull", REF)[0] == 0
    assert not path.exists()


def test_figures_are_there_without_a_helper(measured: World) -> None:
    measured.put("one", b"a")
    measured.run("pull", REF)
    measured.environ["IMGPULL_HELPER_SOCKET"] = str(measured.folder / "none")
    assert measured.run("pull", REF, "--refresh")[0] == 69
    found = figures(measured)
    assert (found["imgpull_helper_up"], found["imgpull_images"]) == (0, 1)
    assert "imgpull_pool_ready" not in found


def test_figures_that_cannot_be_written_stop_nothing(measured: World) -> None:
    measured.put("one", b"a")
    measured.environ["IMGPULL_METRICS_FILE"] = str(measured.folder / "nowhere/imgpull.prom")
    code, out, err = measured.run("pull", REF)
    assert (code, out, "metrics were not written" in err) == (0, "/dev/null\n", True)


def test_dashboard_has_a_panel_for_every_figure() -> None:
    """`make manual` writes it."""
    shipped = json.loads((ROOT / "policy/grafana/imgpull.json").read_text(encoding="utf-8"))
    assert shipped == metrics.dashboard()
    assert [panel["title"] for panel in shipped["panels"]] == [metric.name for metric in metrics.METRICS]
