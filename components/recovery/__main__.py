"""`make recover STACK=p510`, `make adopt STACK=p510`: what exists and is not in the state.

Run in the project's directory, with the backend and the passphrase of `pulumi up`.
"""

import argparse
import sys
from pathlib import Path

from components.recovery import Engine, RecoveryError, adopt, recover, run_again


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m components.recovery", description=__doc__)
    parser.add_argument("--cwd", type=Path, default=Path(), help="the project's directory")
    parser.add_argument(
        "--unlock", action="store_true", help="clear another host's lock, too: its run is dead"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    on_stack = argparse.ArgumentParser(add_help=False)
    on_stack.add_argument("stack", help="the stack's name")
    again = verbs.add_parser("recover", parents=[on_stack], help="go on after a run that died")
    again.add_argument("--destroy", action="store_true", help="the run was a destroy: finish it")
    again.add_argument(
        "--lost",
        metavar="ADDRESS",
        help="a machine has a new one in its place: what was done on "
        "it is to be done again by the next up",
    )
    over = verbs.add_parser("adopt", parents=[on_stack], help="take over what exists")
    over.add_argument("--take", action="store_true", help="do it; without, show what it would do")
    options = parser.parse_args()
    engine = Engine(options.cwd.absolute(), options.stack, unlock=options.unlock)
    try:
        if options.verb == "recover" and options.lost:
            run_again(engine, options.lost)
        elif options.verb == "recover":
            recover(engine, "destroy" if options.destroy else "up")
        else:
            adopt(engine, take=options.take)
    except RecoveryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
