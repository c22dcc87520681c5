"""How hypothesis chooses its examples.

`make test` says the same of a commit each time: its examples are derived from the tests alone. What
they do not reach is looked for by `make fuzz`, at random, and a find becomes a test of its own.
"""

import os

from hypothesis import settings

# How long an example takes says more of the machine than of the code.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("searching", deadline=None, print_blob=True)
settings.load_profile("searching" if "HOMELAB_FUZZ" in os.environ else "repeatable")
