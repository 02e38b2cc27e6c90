"""``make bench``: imgpull beside what a user would do instead, and beside the floors of this machine; needs root.

``make bench BENCH_ARGS="--rounds 5 --sizes full --only pull,check --keep NAME"``. Figures go to build/bench.json, a
picture of one pull to build/bench-timeline.svg. ``--keep`` writes RESULTS.md, timeline.svg and history/NAME.json here.
``--beside build/bench.json`` adds what an earlier run measured of the groups that this one leaves out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.bench import groups, page, timeline
from tests.bench.harness import Group, Row, measure, result, write

BUILD: Final = Path(__file__).resolve().parents[2] / "build"


def main() -> None:
    """Run the groups that are asked for, and tell."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", choices=list(groups.SIZES), default="full")
    parser.add_argument("--only", default="", help=f"some of {', '.join(groups.GROUPS)}")
    parser.add_argument("--keep", default="", metavar="NAME", help="a name for the history")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="figures of an earlier run, for the other groups")
    options = parser.parse_args()
    earlier = json.loads(options.beside.read_text("utf-8")) if options.beside else {"rows": [], "goals": {}}
    wanted = options.only.split(",") if options.only else list(groups.GROUPS)
    if unknown := set(wanted) - set(groups.GROUPS):
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(groups.GROUPS)}")
    if os.geteuid() != 0:
        sys.exit("the bench makes pools, mounts and file systems: make bench asks sudo for that")
    with tempfile.TemporaryDirectory(prefix="imgpull-bench-", dir="/var/tmp") as folder:
        with groups.prepared(groups.SIZES[options.sizes], Path(folder)) as bench:
            run(bench, wanted, options.rounds, options.keep, earlier)


def run(bench: groups.Bench, wanted: list[str], rounds: int, kept_as: str, earlier: Row) -> None:
    """Measure group by group, so that what was measured is there when a later one fails."""
    done: list[Group] = []
    for name in wanted:
        made = groups.GROUPS[name](bench)
        measure(made, rounds)
        done += made
        write(page.beside(result(done), earlier), BUILD / "bench.json")
    figures = page.beside(result(done), earlier)
    picture = timeline.svg(groups.events(bench), "imgpull pull of the Debian layers from a local S3 server")
    (BUILD / "bench-timeline.svg").write_text(picture, "utf-8")
    figures["counts"] = groups.counts(bench)
    write(figures, BUILD / "bench.json")
    print(page.table(figures))
    print("\n".join(["drifted since the kept runs:", *drifted] if (drifted := page.drift(figures)) else []))
    if kept_as:
        page.keep(figures, kept_as, picture)


if __name__ == "__main__":
    main()
