"""The move of p510's cluster to p620 (incident 16) under the real engine: two stacks of one
project, two make-believe hosts, one Cloudflare.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rehearsal.machine import RehearsalMachine
from rehearsal.run import CHECKOUT, Rehearsal, with_made_up_secrets
from tests.engine.conftest import P510, errors, planned
from tests.engine.test_status import status
from tests.unit.test_hostctl import Host

pytestmark = pytest.mark.engine

CONNECTOR = {"namespace": "factory", "deployment": "cloudflared-factory"}


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
        self._copy_secret_files(p510)
        (directory / "project").symlink_to(p510.directory / "project")
        backend = {"PULUMI_BACKEND_URL": f"file://{p510.directory / 'state'}"}
        super().__init__(directory, "p620", self.settings, environment=backend)

    def _copy_secret_files(self, p510: P510) -> None:
        """agenix decrypts the same files on both hosts."""
        new = RehearsalMachine(self.world / "machine")
        for path, content in p510.decrypted_files().items():
            new.make_directory("/run/agenix", 0o755)
            new.write_atomic(path, content, 0o400)

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
        assert {source.stack, target.stack} == {"p510", "p620"}
        run_the_line("xargs pulumi state move", source)

    def switch(self, enabled: bool) -> None:
        """The edit of both stack files: whose the cluster is."""
        with self.p510.edited() as settings:
            settings["cluster"]["enabled"] = not enabled
        self.p620.enable(enabled)

    def unprotect(self, stack: Rehearsal) -> None:
        """Of the stack whose cluster is off: what a file of it can no longer free."""
        run_the_line("xargs pulumi state unprotect", stack)

    def connectors(self) -> int:
        """How many connectors the cluster is to have."""
        (file,) = (self.p510.world / "kubernetes").rglob("Deployment.apps/cloudflared-factory.json")
        return json.loads(file.read_text())["spec"]["replicas"]

    def objects(self) -> set[str]:
        """Name and uid of all that lives in the cluster."""
        files = (self.p510.world / "kubernetes").rglob("*.json")
        return {f"{one}: {json.loads(one.read_text())['metadata']['uid']}" for one in files}

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


def run_the_line(command: str, stack: Rehearsal) -> None:
    """Runs the command line of docs/move.md that ends with this, from p510 to p620, or the other
    way where the stack is p620."""
    page = (CHECKOUT / "docs/move.md").read_text()
    (line,) = (one for one in re.findall(r"^ *\$ ((?:.*\|\n)*.*)$", page, re.M) if command in one)
    if stack.stack == "p620":
        line = re.sub("p510|p620", lambda name: "p510p620".replace(name[0], ""), line)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=stack.directory / "project",
        env=stack.process_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def hosts(p510: P510, tmp_path: Path) -> Hosts:
    return Hosts(p510, tmp_path / "p620")


def test_incident_16_the_whole_move_recreates_nothing_of_the_cluster_or_at_cloudflare(hosts):
    p510, p620 = hosts.p510, hosts.p620
    identity = p510.outputs()["cluster"]["identity"]
    assert {"create Host p620", "create Command hostctl"} <= planned(p620.up())
    before, objects = hosts.cloudflare(), hosts.objects()
    hosts.bring()
    # Frozen: neither of its verbs by which a stack begins does anything there.
    assert "frozen on this host" in p510.preview(check=False).stdout
    hosts.move_state(p510, p620)
    hosts.switch(True)

    preview = p620.preview()
    assert f"up brings it up as {identity}" in preview.stdout
    # A preview cannot know that the namespace is the same one, since p620's provider is not there
    # yet; so it lists the seed, which up then leaves alone.
    replaced = {
        step.split(" ", 1)[1]
        for step in planned(preview)
        if step.startswith(("replace", "create-repl"))
    }
    assert replaced == {"Command seed factory/factory-cli-creds"}
    up = p620.up()
    assert errors(up) == []
    assert planned(up) == {
        *(f"create Command {name}" for name in ("cluster", "identity", "kubeconfig", "units")),
        *("create Command acceptance", "create Network network", "create docker docker"),
        *("create K3dCluster factory", "create Kubeconfig factory", "create Units factory"),
        # The same provider below a component that now is p620's.
        *("create kubernetes kubernetes", "delete kubernetes kubernetes"),
    }
    assert p620.outputs()["cluster"]["identity"] == identity
    assert p620.up("--expect-no-changes").changes == {}
    assert hosts.connectors() == 0
    hosts.new("move cutover", {"name": "factory"})
    assert hosts.connectors() == 2
    assert hosts.cloudflare() == before
    assert hosts.objects() == objects
    assert p620.up("--expect-no-changes").changes == {}
    assert planned(p620.preview("--refresh")) == set()

    # The old host is released: of its stack stays what never moved, its own tunnel.
    hosts.old("move release", {"name": "factory", "confirm": "factory"})
    hosts.unprotect(p510)
    p510.up()
    assert {one["type"].rpartition(":")[2] for one in p510.resources()} >= {"Container"}
    assert not any("k3d" in one["urn"].lower() for one in p510.resources())
    assert p510.up("--expect-no-changes").changes == {}
    assert hosts.cloudflare() == before


def test_the_way_back_gives_routes_and_state_back_and_recreates_nothing(hosts):
    p510, p620 = hosts.p510, hosts.p620
    identity = p510.outputs()["cluster"]["identity"]
    p620.up()
    before = hosts.cloudflare()
    hosts.bring()
    hosts.move_state(p510, p620)
    hosts.switch(True)
    p620.up()
    hosts.new("move cutover", {"name": "factory"})

    hosts.new("move withdraw", {"name": "factory"})
    hosts.old("move back", {"name": "factory", "confirm": "factory"})
    hosts.move_state(p620, p510)
    hosts.switch(False)
    assert errors(p510.up()) == []
    assert p510.up("--expect-no-changes").changes == {}
    assert p510.outputs()["cluster"]["identity"] == identity
    assert hosts.connectors() == 2
    hosts.unprotect(p620)
    p620.up()
    assert hosts.cloudflare() == before
    assert {one["type"].rpartition(":")[2] for one in p620.resources()} == {"Host", "Command"}


def test_a_stack_whose_cluster_is_off_keeps_hostctl_there_and_nothing_else(hosts):
    before = hosts.cloudflare()
    up = hosts.p620.up()
    assert "cluster factory is off (homelab:cluster.enabled)" in up.stdout
    assert {one["type"].rpartition(":")[2] for one in hosts.p620.resources()} == {"Host", "Command"}
    assert hosts.p620.up("--expect-no-changes").changes == {}
    outputs = hosts.p620.outputs()
    assert (outputs["namespaces"], outputs["tunnels"], outputs["urls"]) == ([], {}, {})
    assert hosts.cloudflare() == before
    assert hosts.new.machine.clusters() == []
    for arguments in ([], ["--doctor"]):
        assert status(hosts.p620, *arguments).code == 0
    assert status(hosts.p620)["cluster", "factory"]["now"] == "absent"
    (hosts.p620.world / "machine" / "down").touch()
    assert status(hosts.p620).of("unknown") == {("host", "this machine")}


def test_no_empty_cluster_takes_the_place_of_one_that_was_not_moved(hosts):
    hosts.switch(True)
    refused = hosts.p620.preview(check=False)
    assert refused.code != 0
    assert "it is to come from p510, and nothing was imported here" in refused.stdout


def test_a_hostname_is_never_declared_by_both_stacks(hosts):
    hosts.p620.enable(True)
    refused = hosts.p620.preview(check=False)
    assert refused.code != 0
    assert "is also the hostname in Pulumi.p510.yaml" in refused.stdout
