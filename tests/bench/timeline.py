"""A picture of one pull: a line a layer, a bar a stage, from the events of `imgpull pull --json`.

Rule 1: only what the events say is drawn; what a layer waits is the gap between its bars.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

COLOURS: Final = {"fetching": "#4878a8", "checking": "#c08030", "committing": "#58924c"}
WIDTH, LEFT, ROW, TOP = 900, 150, 26, 46
Bar = tuple[str, str, float, float]  # layer, stage, begin and end in seconds


def bars(events: Sequence[dict[str, Any]]) -> list[Bar]:
    """Return the bars of a run, in the order in which they begin."""
    opened: dict[str, tuple[str, float]] = {}
    found: list[Bar] = []
    begin = float(events[0]["time"])
    for event in events:
        if event["type"] != "stage":
            continue
        layer, now = str(event["layer"]), float(event["time"]) - begin
        if layer in opened:
            stage, since = opened.pop(layer)
            found.append((layer, stage, since, now))
        if event["stage"] in COLOURS:
            opened[layer] = (str(event["stage"]), now)
    end = float(events[-1]["time"]) - begin
    found += [(layer, stage, since, end) for layer, (stage, since) in opened.items()]
    return sorted(found, key=lambda bar: bar[2])


def svg(events: Sequence[dict[str, Any]], title: str) -> str:
    """Return the picture."""
    drawn = bars(events)
    told = [str(one["layer"]) for event in events if event["type"] == "begin" for one in event["layers"]]
    layers = list(dict.fromkeys([*told, *(bar[0] for bar in drawn)]))  # lowest first
    end = max((bar[3] for bar in drawn), default=1.0)
    height = TOP + ROW * len(layers) + 30
    scale = (WIDTH - LEFT - 20) / end
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, (stage, colour) in enumerate(COLOURS.items()):
        left = LEFT + number * 110
        lines.append(f'<rect x="{left}" y="26" width="10" height="10" fill="{colour}"/>')
        lines.append(f'<text x="{left + 15}" y="35">{stage}</text>')
    for number, layer in enumerate(layers):
        lines.append(f'<text x="10" y="{TOP + number * ROW + 16}">{escape(layer)}</text>')
    for layer, stage, since, until in drawn:
        y = TOP + layers.index(layer) * ROW + 3
        width = max((until - since) * scale, 1)
        tip = f"<title>{escape(layer)} {stage}: {since:.2f} to {until:.2f} s</title>"
        lines.append(
            f'<rect x="{LEFT + since * scale:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 6}" '
            f'fill="{COLOURS[stage]}">{tip}</rect>'
        )
    for tick in range(11):
        x = LEFT + tick * (WIDTH - LEFT - 20) / 10
        lines.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{height - 22}" stroke="#ccc" stroke-width="0.5"/>'
        )
        lines.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick * end / 10:.2f}</text>')
    return "\n".join([*lines, "</svg>", ""])
