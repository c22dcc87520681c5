"""What a benchmark finds, and how it is shown."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One figure.

    what: what was measured, with its unit.
    value: as measured.
    target: the most that it may be; None where it is only told.
    note: what helps to read it.
    """

    what: str
    value: float
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the value keeps to the target; true where there is none."""
        return self.target is None or self.value <= self.target

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "met" if self.met else "MISSED"


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines of text in columns."""
    rows = [("figure", "value", "target", "", "")]
    for figure in figures:
        target = "" if figure.target is None else f"<= {figure.target:g}"
        rows.append((figure.what, f"{figure.value:.4g}", target, figure.verdict, figure.note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{what:<{widths[0]}}  {value:>{widths[1]}}  {target:<{widths[2]}}"
        f"  {verdict:<{widths[3]}}  {note}".rstrip()
        for what, value, target, verdict, note in rows
    )


def say(line: str) -> None:
    """A line for the person who waits; the table alone goes to stdout."""
    print(line, file=sys.stderr, flush=True)
