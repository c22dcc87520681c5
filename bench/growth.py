"""What one more resource costs a preview that changes nothing, in small stacks and in large ones.

A stack of N is p510 with N Secrets and N routes added: 2 N resources more, each route also an
ingress rule of its tunnel. The cost of one added resource is the difference between two sizes,
divided by what was added; it shall not depend on the size.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.figure import Figure, say
from bench.larger import p510
from bench.seed import first_up, seeded
from bench.usage import Usage, measure
from rehearsal.run import Rehearsal

# The step between the larger sizes may cost 20 % more a resource than that between the smaller.
TARGET = 1.2


def figures(directory: Path, rounds: Mapping[int, int], first_ups: Sequence[int]) -> list[Figure]:
    """Medians of so many previews by size, and the first `up` of some. Works in `directory`.

    Three sizes. The small ones need more previews: their differences are small as well.
    """
    config = p510()
    say("growth: up of one Secret and route, from which the larger stacks are made")
    one = first_up(directory / "one", config, 1)
    one.up()
    stacks: dict[int, Rehearsal] = {}
    for size in rounds:
        say(f"growth: import of {size} Secrets and routes")
        stacks[size] = seeded(directory / str(size), one, size)
    usages: dict[int, list[Usage]] = {size: [] for size in rounds}
    for number in range(1, max(rounds.values()) + 1):
        for size in [size for size in rounds if number <= rounds[size]]:
            usage = _preview(stacks[size])
            usages[size].append(usage)
            say(
                f"growth {number}/{rounds[size]}: {size}:"
                f" {usage.wall:.1f} s, {usage.cpu:.1f} s CPU,"
                f" {usage.memory / 1e6:.0f} MB"
            )
    return [
        *_each_size(usages),
        *_an_added_resource(usages, "CPU time", "ms", lambda usage: usage.cpu * 1e3, TARGET),
        *_an_added_resource(usages, "peak memory", "kB", lambda usage: usage.memory / 1e3, TARGET),
        # Told only: on a machine that does other things the wall clock of a minute says little.
        *_an_added_resource(usages, "time", "ms", lambda usage: usage.wall * 1e3, None),
        *_by_process(usages, "CPU", "ms", lambda usage: usage.cpu_by_process, 1e3),
        *_by_process(usages, "memory", "kB", lambda usage: usage.memory_by_process, 1e-3),
        *(_first_up(directory / f"first-{size}", config, size) for size in first_ups),
    ]


def _preview(rehearsal: Rehearsal) -> Usage:
    # It fails when the seeded state is not what an `up` would have left.
    return measure(lambda: rehearsal.pulumi("preview", "--expect-no-changes"), memory=True)


def _each_size(usages: Mapping[int, Sequence[Usage]]) -> list[Figure]:
    return [
        Figure(
            f"no-op preview of {size} Secrets and routes, CPU time [s]",
            _median(usages[size], lambda usage: usage.cpu),
            note=f"{_median(usages[size], lambda usage: usage.wall):.1f} s,"
            f" {_median(usages[size], lambda usage: usage.memory) / 1e6:.0f} MB at most",
        )
        for size in usages
    ]


def _an_added_resource(
    usages: Mapping[int, Sequence[Usage]],
    what: str,
    unit: str,
    of: Callable[[Usage], float],
    target: float | None,
) -> list[Figure]:
    slopes = _slopes(usages, of)
    costs = [
        Figure(f"{what} of an added resource, {_step(step)} [{unit}]", slope)
        for step, slope in slopes.items()
    ]
    small, large = slopes.values()
    steps = " against ".join(_step(step) for step in reversed(slopes))
    return [*costs, Figure(f"{what} of an added resource, {steps}", large / small, target)]


def _by_process(
    usages: Mapping[int, Sequence[Usage]],
    what: str,
    unit: str,
    of: Callable[[Usage], Mapping[str, float]],
    scale: float,
) -> list[Figure]:
    """Where it goes: the processes that grow at all, the greatest first."""
    roles = {role for runs in usages.values() for usage in runs for role in of(usage)}
    told = []
    for role in roles:
        slopes = _slopes(usages, lambda usage, role=role: of(usage).get(role, 0) * scale)
        (first, small), (last, large) = slopes.items()
        told.append(
            Figure(
                f"  of it {role}, {what}, {_step(last)} [{unit}]",
                large,
                note=f"{small:.3g} at {_step(first)}",
            )
        )
    ordered = sorted(told, key=lambda figure: -figure.value)
    return [figure for figure in ordered if figure.value > ordered[0].value / 100]


def _slopes(
    usages: Mapping[int, Sequence[Usage]], of: Callable[[Usage], float]
) -> dict[tuple[int, int], float]:
    """The cost of one added resource by step between sizes."""
    return {
        (small, large): (_median(usages[large], of) - _median(usages[small], of))
        / (2 * (large - small))
        for small, large in itertools.pairwise(sorted(usages))
    }


def _first_up(directory: Path, config: Mapping[str, object], size: int) -> Figure:
    say(f"growth: first up of {size} Secrets and routes")
    rehearsal = first_up(directory, config, size)
    usage = measure(rehearsal.up)
    return Figure(
        f"first up of {size} Secrets and routes [s]",
        usage.wall,
        note=f"{usage.cpu:.1f} s CPU; not flat: a checkpoint is written at each step",
    )


def _median(runs: Sequence[Usage], of: Callable[[Usage], float]) -> float:
    return statistics.median(map(of, runs))


def _step(step: tuple[int, int]) -> str:
    return f"{step[0]} to {step[1]}"
