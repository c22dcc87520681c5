"""The settings: how long they take to check, and what a stack does not import.

`python -m bench.settings ROUTES` prints the seconds of CPU for that many routes in this process.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.figure import Figure, say
from bench.larger import larger, p510
from bench.seed import PROGRAM
from components.settings import Settings
from rehearsal.run import CHECKOUT, Rehearsal

TARGET_SECONDS = 0.3


def figures(directory: Path, routes: int, rounds: int) -> list[Figure]:
    """The median over fresh processes, and the packages of a preview. Works in `directory`."""
    say(f"settings: {routes} routes, {rounds} times; a stack without tunnels")
    command = [sys.executable, "-m", "bench.settings", str(routes)]
    seconds = [
        float(subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True).stdout)
        for _ in range(rounds)
    ]
    return [
        Figure(
            f"settings of {routes} routes, CPU time [s]",
            statistics.median(seconds),
            TARGET_SECONDS,
            f"{rounds} processes, {min(seconds):.3f} to {max(seconds):.3f}",
        ),
        Figure(
            "pulumi_cloudflare imported by a stack without tunnels [0 or 1]",
            float("pulumi_cloudflare" in imported(directory, tunnels=False)),
            0,
        ),
        Figure(
            "pulumi_cloudflare imported by p510 [0 or 1]",
            float("pulumi_cloudflare" in imported(directory, tunnels=True)),
        ),
    ]


def imported(directory: Path, tunnels: bool) -> list[str]:
    """The top-level packages that a preview of p510, with or without its tunnels, imports."""
    config = p510()
    if not tunnels:
        del config["homelab:tunnels"]
    preview = Rehearsal(directory / f"tunnels-{tunnels}", "many", config, program=PROGRAM).preview()
    lines = [line.partition("imported: ") for line in preview.stdout.splitlines()]
    return next(packages.split() for _, found, packages in lines if found)


def validation_seconds(routes: int) -> float:
    """The CPU time that this process needs to check p510's settings with so many routes added."""
    sections = larger(p510(), routes=routes)
    config = {key.removeprefix("homelab:"): section for key, section in sections.items()}
    started = time.process_time()
    Settings.model_validate(config)
    return time.process_time() - started


if __name__ == "__main__":
    print(validation_seconds(int(sys.argv[1])))
