"""`make bench`: the figures of the project, each with its target, as one table.

Exits with 1 when a target is missed. Nothing of this machine is touched: runs are rehearsals, or
have a Docker engine of their own (tests/cluster); what they leave is removed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench import cluster, growth, preview, settings
from bench.figure import Figure, say, table
from rehearsal.run import RehearsalError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--only", choices=["preview", "growth", "settings", "cluster"], help="these alone"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small stacks, few rounds; no verdict, exits with 0"
    )
    parser.add_argument(
        "--full", action="store_true", help="the first up of the largest stack too: hours"
    )
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="homelab-bench-") as directory:
        work = Path(directory)
        benchmarks = _quick(work) if options.quick else _whole(work, options.full)
        if options.only:
            benchmarks = {options.only: benchmarks[options.only]}
        try:
            figures = [figure for benchmark in benchmarks.values() for figure in benchmark()]
        except RehearsalError as error:
            say(f"bench: {error}")
            return 2
    if options.quick:
        figures = [replace(figure, target=None) for figure in figures]
    print(table(figures))
    missed = [figure.what for figure in figures if not figure.met]
    summary = f"{len(missed)} of {sum(f.target is not None for f in figures)} targets missed"
    if options.quick:
        summary = "quick: too few and too small to judge by"
    print(f"bench: {summary}, {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


Benchmarks = dict[str, Callable[[], list[Figure]]]


def _whole(directory: Path, full: bool) -> Benchmarks:
    sizes = {50: 9, 500: 5, 5000: 3}
    first_ups = [50, 500, 5000] if full else [50, 500]
    return {
        "preview": lambda: preview.figures(directory / "preview", rounds=7),
        "growth": lambda: growth.figures(directory / "growth", sizes, first_ups),
        "settings": lambda: settings.figures(directory / "settings", routes=1000, rounds=5),
        "cluster": lambda: cluster.figures(directory / "cluster", rounds=5),
    }


def _quick(directory: Path) -> Benchmarks:
    sizes = {5: 1, 50: 1, 200: 1}
    return {
        "preview": lambda: preview.figures(directory / "preview", rounds=2),
        "growth": lambda: growth.figures(directory / "growth", sizes, [5, 50]),
        "settings": lambda: settings.figures(directory / "settings", routes=1000, rounds=2),
        "cluster": lambda: cluster.figures(directory / "cluster", rounds=1),
    }


if __name__ == "__main__":
    sys.exit(main())
