"""A program that a test runs leaves nothing behind in the process of the tests."""

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pulumi
import pytest
from pulumi_command import local


class Refused(pulumi.ComponentResource):
    """Refuses what a command prints, which another resource and its own outputs need."""

    def __init__(self) -> None:
        super().__init__("homelab:index:Refused", "refused")
        asked = local.Command("asked", create="true")
        content = asked.stdout.apply(self._refuse)
        local.Command("needs-it", create=content)
        self.register_outputs({"content": content})

    def _refuse(self, printed: str) -> str:
        raise ValueError("refused")


def test_a_program_leaves_no_event_loop_open_and_nothing_to_be_logged_later(
    run_program: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match="refused"):
        run_program(Refused, outputs={"Command": {"stdout": ""}})
    run_program(lambda: None)  # until then the SDK holds what was raised last
    gc.collect()
    loops = [one for one in gc.get_objects() if issubclass(type(one), asyncio.BaseEventLoop)]
    assert [loop for loop in loops if not loop.is_closed()] == []
    assert caplog.text == ""
