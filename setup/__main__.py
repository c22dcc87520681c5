"""`python3 -m setup`: see `python3 -m setup --help`."""

import sys

# This file is the one that an older Python must be able to read.
if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(
        f"homelab needs Python 3.10 or newer; {sys.executable} is {sys.version.split()[0]}. "
        "Name a newer one: make PYTHON=python3.12 ..."
    )

from setup.command import main

sys.exit(main(sys.argv[1:]))
