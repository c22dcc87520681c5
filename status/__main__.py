"""`python -m status STACK`: what is there now, against what is declared.

Exit status: 0 all is as declared, 1 something differs or has failed, 2 nothing has, as far as could
be seen, and something could not be.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pulumi import automation

from components import settings
from status.look import Row, doctor, owners, state_of, status, through_engine

_MARKS = {"fine": " ", "bad": "!", "unknown": "?"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m status",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stack", help="the stack's name; its file is Pulumi.<stack>.yaml")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--doctor", action="store_true", help="what is wrong with the host instead"
    )
    instead.add_argument(
        "--owners", action="store_true", help="who owns each object of the cluster instead"
    )
    parser.add_argument(
        "--project", type=Path, default=Path.cwd(), help="default: the current directory"
    )
    options = parser.parse_args()
    file = options.project / f"Pulumi.{options.stack}.yaml"
    try:
        stack, refused = settings.read_file(file)
        if refused:
            raise settings.SettingsError(file.name, refused)
    except (settings.SettingsError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    stack, rows = stack.in_force, list[Row]()
    try:
        if options.owners:
            rows += through_engine(lambda: owners(stack, options.stack, options.project))
        elif options.doctor:
            rows += through_engine(lambda: doctor(stack))
        else:
            rows += state_of(options.stack, options.project)
            rows += through_engine(lambda: status(stack))
    except FileNotFoundError:
        print("pulumi is not on PATH: `make setup` says where it is", file=sys.stderr)
        return 2
    except automation.CommandError as error:
        remedy = "make setup; a plugin that is missing comes with a preview, which downloads it"
        rows.append(Row("host", "Pulumi", "runs", _cause(str(error)), "unknown", remedy))
    print(json.dumps([asdict(row) for row in rows], indent=1) if options.json else table(rows))
    verdicts = {row.verdict for row in rows}
    return 1 if "bad" in verdicts else 2 if "unknown" in verdicts else 0


def table(rows: Sequence[Row]) -> str:
    """For a person: a line each, what differs marked `!` and what could not be seen `?`, with its
    remedy below.
    """
    widths = [
        max((len(cell) for row in rows if len(cell := getattr(row, name)) <= 40), default=0)
        for name in ("part", "what", "declared")
    ]
    lines = []
    for row in rows:
        cells = zip((row.part, row.what, row.declared), widths, strict=True)
        text = "  ".join(cell.ljust(width) for cell, width in cells)
        lines.append(f"{_MARKS[row.verdict]} {text}  {row.now}".rstrip())
        if row.verdict != "fine" and row.remedy:
            lines.append(f"    remedy: {row.remedy}")
    bad, unknown = (sum(row.verdict == verdict for row in rows) for verdict in ("bad", "unknown"))
    lines.append(f"{len(rows)} looked at, {bad} not as they should be, {unknown} could not be seen")
    return "\n".join(lines)


def _cause(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if "error: " in line]
    return (lines or [text.strip().splitlines()[-1]])[-1]


if __name__ == "__main__":
    sys.exit(main())
