"""Stacks under the real engine, on the stand-ins: what the tests of their lives share."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.recovery import Engine, adopt
from rehearsal.machine import RehearsalMachine
from rehearsal.run import CHECKOUT, UNCHANGED, Rehearsal, Run, with_made_up_secrets


class StackRehearsal(Rehearsal):
    """A rehearsal of one of the stack files, whose settings, world and host can be changed."""

    name: str
    """The stack's, and that of its file."""

    def __init__(self, directory: Path) -> None:
        stack_file = yaml.safe_load((CHECKOUT / f"Pulumi.{self.name}.yaml").read_text())
        config, _ = with_made_up_secrets(stack_file["config"])
        self.settings = {key.removeprefix("homelab:"): value for key, value in config.items()}
        super().__init__(directory, self.name, self.settings)

    @contextlib.contextmanager
    def edited(self) -> Iterator[dict[str, Any]]:
        """The settings, to be changed within."""
        settings = copy.deepcopy(self.settings)
        yield settings
        self.set_config(settings)
        self.settings = settings

    def confirm_destroy(self) -> None:
        """Types the names of what is protected, and applies that."""
        with StackRehearsal.edited(self) as settings:
            if settings["cluster"].get("kind") != "existing":
                settings["cluster"]["delete"] = settings["cluster"]["name"]
            for name, tunnel in settings.get("tunnels", {}).items():
                tunnel["delete"] = name
        self.up()

    @property
    def world(self) -> Path:
        """What the stand-ins made, a file an object."""
        return self.directory / "world"

    def engine(self, said: list[str]) -> Engine:
        """How `make recover` and `make adopt` reach it; what they say comes into the list."""
        project = self.directory / "project"
        return Engine(project, self.stack, self.process_environment(), say=said.append)

    @property
    def host(self) -> RehearsalMachine:
        """The make-believe host, as hostctl sees it."""
        return RehearsalMachine(self.world / "machine")

    def host_file(self, path: str) -> Path:
        """A file of the host."""
        return self.world / "machine" / "files" / path.lstrip("/")

    def write_file(self, path: str, content: str) -> None:
        """Puts a file on the host, as agenix does when it decrypts a Secret."""
        file = self.host_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def on_host(self, *argv: str) -> None:
        """Runs a command in a shell of the host, behind Pulumi's back."""
        ran = self.host.run(argv)
        assert ran.code == 0, ran.complaint


class K3dRehearsal(StackRehearsal):
    """Of a stack that makes its cluster with k3d."""

    @property
    def cluster(self) -> str:
        """The cluster's name."""
        return self.settings["cluster"]["name"]

    @property
    def cluster_file(self) -> Path:
        """The k3d cluster as Docker would show it."""
        return self.world / "machine" / "clusters" / f"{self.cluster}.json"

    @property
    def objects(self) -> Path:
        """What lives in the cluster that was last brought up: <namespace>/<Kind.group>/<name>."""
        record = json.loads(
            self.host_file(f"/var/lib/homelab/clusters/{self.cluster}.json").read_text()
        )
        return self.world / "kubernetes" / record["identity"].removeprefix(f"{self.cluster}-")


class P510(K3dRehearsal):
    """A rehearsal of p510."""

    name = "p510"

    def decrypted_files(self) -> dict[str, bytes]:
        """By path, what agenix decrypts: what a rehearsal makes up on this host without them."""
        requests = [
            {"namespace": namespace, "name": name, "as": "manifest", "path": secret["manifest"]}
            | {"type": secret.get("type", "Opaque")}
            for namespace, secrets in self.settings["secrets"].items()
            for name, secret in secrets.items()
        ]
        key = {"namespace": "", "name": "", "as": "value", "type": "Opaque"}
        file = self.settings["tailscale"]["authKey"]["file"]
        requests.append({**key, "path": file, "keys": ["TS_AUTHKEY"]})
        decrypted = {}
        for request in requests:
            content = self.host.missing_file({"keys": [], "optional": False, **request})
            assert content is not None
            decrypted[request["path"]] = content
        return decrypted


def assert_state_is_rebuilt(stack: StackRehearsal) -> None:
    """Once its state is lost, `make adopt` finds all by its ids again and writes to nothing."""

    def held() -> dict[str, str]:
        made = ("kubernetes:", "docker:", "cloudflare:")
        return {one["urn"]: one["id"] for one in stack.resources() if one["type"].startswith(made)}

    def objects() -> dict[Path, bytes]:
        return {
            file: file.read_bytes()
            for name in ("kubernetes", "docker", "cloudflare", "k3s", "machine/clusters")
            for file in (stack.world / name).rglob("*.json")
        }

    ids, there = held(), objects()
    shutil.rmtree(stack.directory / "state" / ".pulumi")
    said: list[str] = []
    adopt(stack.engine(said), take=True)
    assert any(f"{len(ids)} exist, 0 of them differ, 0 do not exist" in line for line in said)
    assert held() == ids
    assert objects() == there


def urns(stack: Rehearsal) -> list[str]:
    """All in the state, without providers that the engine makes itself, named by version."""
    resources = stack.export()["deployment"]["resources"]
    return sorted(r["urn"] for r in resources if "::default_" not in r["urn"])


@pytest.fixture(scope="session")
def brought_up(tmp_path_factory) -> P510:
    """p510 after its first up; not to be changed."""
    p510 = P510(tmp_path_factory.mktemp("brought-up"))
    p510.up()
    return p510


@pytest.fixture
def p510(brought_up, tmp_path) -> P510:
    """p510 after its first up, to do anything with."""
    return brought_up.copy(tmp_path / "p510")


@contextlib.contextmanager
def edited_file(path: Path) -> Iterator[Any]:
    """A JSON file, to be changed within: how someone edits an object of the world by hand."""
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def planned(run: Run) -> set[str]:
    """All that a run changes or would change, as `operation Type name`."""
    return {
        f"{step.op.value} {step.type.rpartition(':')[2]} {step.urn.rpartition('::')[2]}"
        for step in run.steps
        if step.op.value not in UNCHANGED
    }


def errors(run: Run) -> list[str]:
    """The errors of a run, without the engine's closing remark that the program has failed."""
    return [
        text
        for text in run.diagnostics
        if text.startswith("error: ") and "program exited with non-zero exit code" not in text
    ]
