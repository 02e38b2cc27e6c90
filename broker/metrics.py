"""The figures of one user's pulls for Prometheus, as a textfile of its node exporter: the setting `metrics_file`.

Rule 1: each figure is counted anew from the state database, so that nothing has to be kept between processes and no
        concurrent pull is lost; the pool's come from the root helper.
Rule 2: the file appears by one rename, so that a scrape never sees half of it. Figures that cannot be written are told
        of and stop nothing.
Rule 3: one table, METRICS, names every figure; the dashboard (policy/grafana/imgpull.json) is made from it.

Source of the format: Prometheus, "Exposition formats", text format 0.0.4.
"""

import os
import sqlite3
import sys
import tempfile
from collections.abc import Generator, Iterable
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from broker import store
from broker.errors import ImgpullError
from broker.settings import Settings
from broker.store import Paths

Sample = tuple[tuple[str, ...], float]  # the labels' values, and the figure


class Metric(NamedTuple):
    """One figure. ``sql`` gives a row a sample: first its labels, then its value; without, the helper is asked."""

    name: str
    type: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()
    sql: str = ""
    unit: str = "short"  # of Grafana


# A Problem is kept as text inside of the ending's JSON.
RULE: Final = "json_extract(json_extract(ending, '$.detail.problem'), '$.details.violations[0].rule')"
METRICS: Final = (
    Metric(
        "imgpull_pulls_total",
        "counter",
        "Pulls that have ended, by outcome.",
        ("outcome",),
        "SELECT outcome, count(*) FROM run WHERE machine = 'pull' AND outcome IS NOT NULL GROUP BY outcome",
    ),
    Metric(
        "imgpull_failures_total",
        "counter",
        "Pulls that have failed, by error code (`imgpull explain CODE`).",
        ("code",),
        "SELECT json_extract(ending, '$.error_kind'), count(*) FROM run"
        " WHERE machine = 'pull' AND outcome = 'aborted' GROUP BY 1",
    ),
    Metric(
        "imgpull_refusals_total",
        "counter",
        "Layers refused by the checker, by rule (`imgpull explain RULE`).",
        ("rule",),
        f"SELECT {RULE}, count(*) FROM run WHERE machine = 'layer' AND outcome = 'aborted'"  # noqa: S608 (our constant)
        " AND json_extract(ending, '$.error_kind') = 'archive-rejected' GROUP BY 1",
    ),
    Metric(
        "imgpull_retries_total",
        "counter",
        "Attempts that failed and were made again, by step.",
        ("step",),
        "SELECT step, count(*) FROM event WHERE type = 'fail' GROUP BY step",
    ),
    Metric(
        "imgpull_pull_seconds_total",
        "counter",
        "Time from start to end of all pulls that succeeded.",
        (),
        "SELECT coalesce(sum(updated_ms - created_ms), 0) / 1000.0 FROM run"
        " WHERE machine = 'pull' AND outcome = 'done'",
        "s",
    ),
    Metric(
        "imgpull_step_seconds_total",
        "counter",
        "Time in steps that were completed, waiting included.",
        ("machine", "step"),
        "SELECT run.machine, event.step, sum(json_extract(event.payload, '$.duration_ms')) / 1000.0"
        " FROM event JOIN run ON run.seq = event.run WHERE event.type = 'complete' GROUP BY 1, 2",
        "s",
    ),
    Metric(
        "imgpull_fetched_bytes_total",
        "counter",
        "Bytes that came over the network for layers.",
        (),
        "SELECT coalesce(sum(json_extract(value, '$.transferred')), 0) FROM run_result WHERE step = 'fetch'",
        "bytes",
    ),
    Metric(
        "imgpull_layers_total",
        "counter",
        "Layers brought in: new, or there already.",
        ("how",),
        "SELECT CASE json_extract(value, '$.reused') WHEN 1 THEN 'shared' ELSE 'new' END, count(*)"
        " FROM run_result WHERE step = 'commit' GROUP BY 1",
    ),
    Metric(
        "imgpull_last_success_timestamp_seconds",
        "gauge",
        "When the last pull succeeded; absent if none did.",
        (),
        "SELECT max(updated_ms) / 1000.0 FROM run WHERE machine = 'pull' AND outcome = 'done' HAVING count(*) > 0",
        "dateTimeAsIso",
    ),
    Metric(
        "imgpull_runs_active",
        "gauge",
        "Runs at work or interrupted.",
        (),
        "SELECT count(*) FROM run WHERE outcome IS NULL",
    ),
    Metric("imgpull_images", "gauge", "Images that are ready.", (), "SELECT count(*) FROM image"),
    Metric("imgpull_activations", "gauge", "Devices given out.", (), "SELECT count(*) FROM activation"),
    Metric(
        "imgpull_cache_bytes",
        "gauge",
        "Size of the cached blobs.",
        (),
        "SELECT coalesce(sum(size), 0) FROM blob",
        "bytes",
    ),
    Metric("imgpull_helper_up", "gauge", "Whether the root helper answered."),
    Metric("imgpull_pool_ready", "gauge", "Whether the pool is in service."),
    Metric("imgpull_pool_bytes", "gauge", "Size of the pool.", ("kind",), unit="bytes"),
    Metric("imgpull_pool_used_bytes", "gauge", "Bytes in use of the pool.", ("kind",), unit="bytes"),
    Metric("imgpull_pool_reserved_bytes", "gauge", "Bytes reserved for commits at work.", unit="bytes"),
)


@contextmanager
def kept(settings: Settings) -> Generator[None, None, None]:
    """Write the figures when the block ends, however it does, if the setting `metrics_file` is set."""
    try:
        yield
    finally:
        if settings.metrics_file:
            try:
                write(settings, Path(settings.metrics_file).expanduser())
            except (OSError, sqlite3.Error, ImgpullError) as error:
                print(f"imgpull: the metrics were not written: {error}", file=sys.stderr)


def write(settings: Settings, path: Path) -> None:
    """Write all figures to a file that others may read, by one rename."""
    text = render(settings)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        os.replace(scratch, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(scratch)
        raise


def render(settings: Settings) -> str:
    """Return all figures in Prometheus' text format."""
    connection = store.open_readonly(Paths.of(settings).database)
    found: dict[str, list[Sample]] = _pool(settings)
    if connection is not None:
        with closing(connection) as db:
            for metric in METRICS:
                if metric.sql:
                    found[metric.name] = [(tuple(map(str, row[:-1])), row[-1]) for row in db.execute(metric.sql)]
    return "".join(_text(metric, found.get(metric.name, [])) for metric in METRICS)


def _pool(settings: Settings) -> dict[str, list[Sample]]:
    from broker import work

    try:
        figures: dict[str, Any] = work.inventory(settings)[0]["pool"]
    except ImgpullError:
        return {"imgpull_helper_up": [((), 0)]}
    kinds = [kind for kind in ("data", "metadata") if figures[f"{kind}_bytes"]]
    return {
        "imgpull_helper_up": [((), 1)],
        "imgpull_pool_ready": [((), int(figures["state"] == "ready"))],
        "imgpull_pool_bytes": [((kind,), figures[f"{kind}_bytes"]) for kind in kinds],
        "imgpull_pool_used_bytes": [((kind,), figures[f"{kind}_used_bytes"]) for kind in kinds],
        "imgpull_pool_reserved_bytes": [((), figures["reserved_bytes"])],
    }


def _text(metric: Metric, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.type}"]
    for values, number in samples:
        labels = ",".join(f'{k}="{_escaped(v)}"' for k, v in zip(metric.labels, values, strict=True))
        shown = int(number) if float(number).is_integer() else number
        lines.append(f"{metric.name}{f'{{{labels}}}' if labels else ''} {shown}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def dashboard() -> dict[str, Any]:
    """Return a Grafana dashboard with a panel a figure: policy/grafana/imgpull.json."""
    panels = []
    for number, metric in enumerate(METRICS):
        expression = f"rate({metric.name}[$__rate_interval])" if metric.type == "counter" else metric.name
        legend = " ".join(f"{{{{{label}}}}}" for label in ("instance", *metric.labels))
        panels.append(
            {
                "id": number + 1,
                "type": "timeseries",
                "title": metric.name,
                "description": metric.help,
                "datasource": {"type": "prometheus", "uid": "${datasource}"},
                "gridPos": {"h": 7, "w": 8, "x": number % 3 * 8, "y": number // 3 * 7},
                "fieldConfig": {"defaults": {"unit": metric.unit, "min": 0}, "overrides": []},
                "targets": [{"refId": "A", "expr": expression, "legendFormat": legend}],
            }
        )
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "title": "imgpull",
        "uid": "imgpull",
        "schemaVersion": 39,
        "time": {"from": "now-24h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }
