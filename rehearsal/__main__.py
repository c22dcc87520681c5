"""`make rehearse STACK=p510`: preview, up, up again and outputs of a stack, on stand-ins."""

import argparse
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from rehearsal.run import CHECKOUT, Rehearsal, RehearsalError
from setup import cache


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rehearsal", description=__doc__)
    parser.add_argument("stack", help="the stack's name; its file is Pulumi.<stack>.yaml")
    parser.add_argument(
        "--keep", action="store_true", help="go on from what the last rehearsal left"
    )
    parser.add_argument(
        "--directory", type=Path, help="default: in the cache, one a checkout and stack"
    )
    parser.add_argument(
        "--environment",
        action="store_true",
        help="run nothing: prepare DIRECTORY/project and print what pulumi needs in its environment"
        " to run there, NAME=value a line",
    )
    options = parser.parse_args()
    stack = options.stack
    checkout = hashlib.sha256(str(CHECKOUT).encode()).hexdigest()[:12]
    directory = options.directory or cache.root() / "rehearsal" / checkout / stack
    directory = directory.absolute()
    if not options.environment:
        say(f"REHEARSAL of {stack}: stand-in providers, nothing real is touched")
    with cache.lock(directory.with_name(f".{directory.name}.lock"), f"a rehearsal of {stack}"):
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
        try:
            return (environment if options.environment else rehearse)(directory, stack)
        except RehearsalError as error:
            failed = f"{error.run.command}` exited with code {error.run.code}"
            return fail(f"rehearsal of {stack}: `{failed}; what it left: {directory}")
        except FileNotFoundError as error:
            return fail(f"rehearsal of {stack}: {error}")
        except KeyboardInterrupt:
            return fail(f"rehearsal of {stack} interrupted; what it left: {directory}")


def rehearse(directory: Path, stack: str) -> int:
    """Runs the whole rehearsal; raises RehearsalError at the first step that fails."""
    started = time.monotonic()
    rehearsal = Rehearsal(directory, stack)
    for path in rehearsal.made_up:
        say(f"made up, as secrets are the user's own: {path}")
    rehearsal.on_line = say
    rehearsal.preview()
    rehearsal.up()
    again = rehearsal.up("--expect-no-changes")
    rehearsal.pulumi("stack", "output")
    rehearsal.on_line = None
    count, seconds = len(rehearsal.resources()), time.monotonic() - started
    changes = sum(again.changes.values())
    say(f"rehearsed {stack}: {count} resources, second run {changes} changes, {seconds:.0f} s")
    return 1 if changes else 0


def environment(directory: Path, stack: str) -> int:
    """Prints the variables of a run that differ from this process's own."""
    for name, value in Rehearsal(directory, stack).process_environment().items():
        if os.environ.get(name) != value:
            say(f"{name}={value}")
    return 0


def say(line: str) -> None:
    print(line, flush=True)


def fail(line: str) -> int:
    print(line, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
