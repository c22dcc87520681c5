"""The whole program of a stack in this process, as in its first preview.

It runs under Pulumi's mocks, which keep what it registers; what it asks of hosts is answered by the
make-believe ones of a rehearsal. No engine, so that a stack costs a tenth of a second and not ten.
"""

import json
import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pulumi
from pulumi.runtime import mocks

from rehearsal import api
from rehearsal.providers import command
from rehearsal.run import CHECKOUT, Rehearsal
from tests.unit.conftest import Registered, _Mocks, _Monitor

STACKS = sorted(file.name.split(".")[1] for file in CHECKOUT.glob("Pulumi.*.yaml"))


class Program(Rehearsal):
    """The program of a stack, and the hosts that it finds. Without a config it is that of the stack
    file, with made-up secrets.
    """

    def __init__(
        self, directory: Path, stack: str, config: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(directory, stack, config)
        self.given: Mapping[str, Any] = self._stack_file_config() if config is None else config
        """The config, with `homelab:` before each key."""
        self.seen = Registered({})
        """What the last run registered, one that was refused too."""

    def pulumi(self, *arguments: Any, **options: Any) -> Any:
        """Nothing runs Pulumi, nor has to."""

    def registered(self, config: Mapping[str, Any] | None = None) -> Registered:
        """All that a preview registers, with another config if one is given.

        Raises what the program raises.
        """
        monitor = _Monitor(_Mocks({}, {"command:local:run": self._answer}))
        given = self.given if config is None else config
        # The stand-in of Cloudflare's API reads in it what the token needs.
        file = self.directory / "project" / f"Pulumi.{self.stack}.yaml"
        file.write_text(json.dumps({"config": given}))
        texts = {key: v if type(v) is str else json.dumps(v) for key, v in given.items()}
        pulumi.runtime.set_all_config(texts)
        os.environ["CLOUDFLARE_BASE_URL"] = api.address(self.directory, self.stack)
        try:
            monitor.run(self._main, stack=self.stack, preview=True)
        finally:
            del os.environ["CLOUDFLARE_BASE_URL"]
            pulumi.runtime.set_all_config({})
            self.seen = monitor.registered()
        return self.seen

    def _main(self) -> None:
        # Where the stack's own file would be: those of the other stacks are there.
        root = str(self.directory / "project")
        pulumi.runtime.settings.SETTINGS.root_directory = root  # pyright: ignore[reportAttributeAccessIssue]
        runpy.run_path(str(CHECKOUT / "__main__.py"))

    def _answer(self, call: mocks.MockCallArgs) -> Mapping[str, Any]:
        line = call.args["command"].removesuffix(" || true")
        result = command._rehearse(line, call.args["stdin"], self.directory)
        return {"stdout": result.stdout, "stderr": result.stderr}
