"""The protocol of every verb: one JSON result, a failure that names step, cause and remedy."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

HOSTCTL_VERSION = "1.0.0"
EXIT_CODES = {
    "bad-spec": 2,
    "refused": 3,
    "cannot-tell": 4,
    "failed": 5,
    "tool": 6,
    "timed-out": 7,
}


class Failure(Exception):
    """A verb that did not do what it should. ``code`` is a key of EXIT_CODES."""

    def __init__(self, code: str, step: str, cause: str, remedy: str) -> None:
        super().__init__(f"{step}: {cause}")
        self.code, self.step, self.cause, self.remedy = code, step, cause, remedy


def say(line: str) -> None:
    """Reports progress, for a person who waits. When the connection has dropped nobody does, and
    the work goes on to its end all the same."""
    with contextlib.suppress(BrokenPipeError):
        print(f"hostctl: {line}", file=sys.stderr, flush=True)


Result = dict[str, Any]
