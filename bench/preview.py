"""A preview of p510 that changes nothing, against the floor: what any such program costs.

The floor (bench/floor) registers one resource of each package that p510 uses, under the same engine
and the same stand-ins. Both are previewed in turn, so that what else the machine does falls on
both; the ratio is taken pair by pair.
"""

import statistics
from pathlib import Path

from bench.figure import Figure, say
from bench.larger import p510
from bench.usage import Usage, measure
from rehearsal.run import Rehearsal

TARGET = 1.3
FLOOR = Path(__file__).parent / "floor"


def figures(directory: Path, rounds: int) -> list[Figure]:
    """Medians of that many rounds, after one that does not count. Works in `directory`."""
    # Any kubeconfig reaches a cluster: the floor makes none.
    anywhere = {"HOMELAB_REHEARSAL_CLUSTER": "any"}
    floor = Rehearsal(directory / "floor", "floor", {}, program=FLOOR, environment=anywhere)
    ours = Rehearsal(directory / "p510", "p510", p510())
    for rehearsal in (floor, ours):
        say(f"preview: up of {rehearsal.stack}")
        rehearsal.up()
        _preview(rehearsal)
    pairs = []
    for number in range(1, rounds + 1):
        pair = _preview(floor), _preview(ours)
        pairs.append(pair)
        say(
            f"preview {number}/{rounds}: floor {pair[0].wall:.2f} s, {pair[0].cpu:.2f} s CPU;"
            f" p510 {pair[1].wall:.2f} s, {pair[1].cpu:.2f} s CPU"
        )
    return [*_compared(pairs, "wall", "time"), *_compared(pairs, "cpu", "CPU time")]


def _preview(rehearsal: Rehearsal) -> Usage:
    return measure(lambda: rehearsal.pulumi("preview", "--expect-no-changes"))


def _compared(pairs: list[tuple[Usage, Usage]], measured: str, what: str) -> list[Figure]:
    floors, ours = zip(
        *((getattr(floor, measured), getattr(p510, measured)) for floor, p510 in pairs), strict=True
    )
    ratios = [p510 / floor for floor, p510 in zip(floors, ours, strict=True)]
    return [
        Figure(f"no-op preview of the floor, {what} [s]", statistics.median(floors)),
        Figure(f"no-op preview of p510, {what} [s]", statistics.median(ours)),
        Figure(
            f"p510 / floor, {what}",
            statistics.median(ratios),
            TARGET,
            f"{len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f}",
        ),
    ]
