"""`python3 -m hostctl VERB...` in a checkout is `hostctl VERB...` on a host."""

import sys

from hostctl.cli import main

sys.exit(main())
