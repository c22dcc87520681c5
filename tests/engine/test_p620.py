"""The move of p510's cluster to p620 (incident 16) under the real engine: two stacks of one
project, two make-believe hosts, one Cloudflare.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rehearsal.machine import RehearsalMachine
from rehearsal.run import CHECKOUT, Rehearsal, with_made_up_secrets
from tests.engine.conftest import P510, errors, planned
from tests.unit.test_hostctl import Host

pytestmark = pytest.mark.engine

CONNECTOR = {"namespace": "factory", "deployment": "cloudflared-factory"}
MOVED = ("ArgoCD", "CloudflareTunnel", "LocalStorage", "Namespaces", "Secrets")
"""Components of what lives in the cluster and at Cloudflare."""


class P620(Rehearsal):
    """p620 in the project of a p510, with a host of its own."""

    def __init__(self, directory: Path, p510: P510) -> None:
        config, _ = with_made_up_secrets(
            yaml.safe_load((CHECKOUT / "Pulumi.p620.yaml").read_text())["config"]
        )
        self.settings = {key.removeprefix("homelab:"): value for key, value in config.items()}
        for path in ("cloudflare", "tunnels"):
            # The same as p510's: its account's token and its tunnel's secret.
            for key in self.settings[path].keys() & p510.settings[path].keys():
                self.settings[path][key] = p510.settings[path][key]
        self.world = directory / "world"
        (self.world / "machine").mkdir(parents=True)
        for shared in ("cloudflare", "kubernetes"):
            (self.world / shared).symlink_to(p510.world / shared)
        (self.world / "machine" / "seed").write_text('"p620"')
        (directory / "project").symlink_to(p510.directory / "project")
        backend = {"PULUMI_BACKEND_URL": f"file://{p510.directory / 'state'}"}
        super().__init__(directory, "p620", self.settings, environment=backend)

    def enable(self, enabled: bool) -> None:
        self.settings["cluster"]["enabled"] = enabled
        self.set_config(self.settings)


class Hosts:
    """Both stacks and hostctl on both hosts."""

    def __init__(self, p510: P510, directory: Path) -> None:
        self.p510, self.p620 = p510, P620(directory, p510)
        self.old, self.new = hostctl(p510.world), hostctl(self.p620.world)

    def bring(self) -> None:
        """Freezes, copies and imports."""
        packed = self.old("move freeze", {"name": "factory", "connectors": [CONNECTOR]})
        cluster = self.p620.settings["cluster"]
        request = {
            "name": "factory",
            "nonce": packed["nonce"],
            "storage_dir": cluster["storageDir"],
            "files": packed["files"],
        }
        directory = self.new("move receive", request)["directory"]
        for file in packed["files"]:
            source = self.old.machine._file(f"{packed['directory']}/{file['name']}")
            shutil.copy(source, self.new.machine._file(directory))
        self.new("move import", request)

    def move_state(self, source: Rehearsal, target: Rehearsal) -> None:
        urns = [
            one["urn"]
            for one in source.resources()
            if one["type"].rpartition(":")[2] in MOVED and not one["urn"].endswith("::p510")
        ]
        pulumi(source, "state", "move", f"--dest={target.stack}", f"--source={source.stack}", *urns)

    def switch(self, enabled: bool) -> None:
        """The edit of both stack files: whose the cluster is."""
        with self.p510.edited() as settings:
            settings["cluster"]["enabled"] = not enabled
        self.p620.enable(enabled)

    def cloudflare(self) -> dict[str, Any]:
        """All that is at Cloudflare, with its ids."""
        files = (self.p510.world / "cloudflare").rglob("*.json")
        return {str(file): json.loads(file.read_text()) for file in files}


def hostctl(world: Path) -> Host:
    class There(Host):
        def __init__(self) -> None:
            self.calls, self.said = [], ""
            self.machine = RehearsalMachine(world / "machine")
            self._run = self.machine.run

    return There()


def pulumi(stack: Rehearsal, *words: str) -> str:
    done = subprocess.run(
        ["pulumi", *words, "--yes", "--non-interactive"],
        cwd=stack.directory / "project",
        env=stack.process_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def hosts(p510: P510, tmp_path: Path) -> Hosts:
    return Hosts(p510, tmp_path / "p620")


def test_incident_16_the_whole_move_recreates_nothing_of_the_cluster_or_at_cloudflare(hosts):
    p510, p620 = hosts.p510, hosts.p620
    identity = p510.outputs()["cluster"]["identity"]
    assert {"create Host p620", "create Command hostctl"} <= planned(p620.up())
    before = hosts.cloudflare()
    hosts.bring()
    hosts.move_state(p510, p620)
    hosts.switch(True)
    preview = p620.preview()
    print("\n".join(sorted(planned(preview))))
    print(preview.stdout[-6000:])
    up = p620.up()
    print("\n".join(sorted(planned(up))))
    assert p620.outputs()["cluster"]["identity"] == identity
    assert hosts.cloudflare() == before
    assert p620.up("--expect-no-changes").changes == {}
    hosts.new("move cutover", {"name": "factory"})
    assert p620.up("--expect-no-changes").changes == {}
    assert errors(up) == []
