"""The whole stack p510 on a real Docker engine and a real API server.

    with engine(rig) as host:
        stack = RealP510(host, directory)
        stack.prepare()
        stack.up()

Everything that the stack declares is made for real, at the paths that its stack file names: the
host around the engine has its own /etc, /mnt, /run and /var/lib. Only Cloudflare is make-believe.
"""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components import versions
from rehearsal.kubectl import kustomization
from rehearsal.machine import RehearsalMachine
from rehearsal.run import CHECKOUT, PLUGINS, Rehearsal, with_made_up_secrets
from tests.cluster.engine import Engine

# An address of the host's own, of a network for documentation (RFC 5737).
_RESOLVER = "192.0.2.53"

# How git reaches a repository of this machine through the transport that hostctl allows.
_SSH = """#!/bin/sh
for word; do last=$word; done
exec sh -c "$last"
"""

# An image that is built here has no digest by which a registry knows it.
_CLOUDFLARED = versions.CLOUDFLARED.partition("@")[0]
# Runs as any user without a capability, until it is told to stop.
_CLOUDFLARED_FILE = """FROM node
ENTRYPOINT ["/bin/sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1; done", "cloudflared"]
"""


class RealP510(Rehearsal):
    """The stack p510 whose stand-ins act for real on one host."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        stack_file = yaml.safe_load((CHECKOUT / "Pulumi.p510.yaml").read_text())
        config, _ = with_made_up_secrets(stack_file["config"])
        self.settings = {key.removeprefix("homelab:"): value for key, value in config.items()}
        self.settings["cluster"]["resolvers"] = [_RESOLVER]
        self.settings["tunnels"]["p510"]["connector"]["image"] = _CLOUDFLARED
        self.settings["host"]["init"] = "none"  # the host has neither systemd nor NixOS
        self.commit, self.settings["argocd"]["repository"] = _repository(directory / "repository")
        programs = directory / "bin"
        programs.mkdir()
        (programs / "ssh").write_text(_SSH)
        (programs / "ssh").chmod(0o755)
        path = [PLUGINS, programs, engine.environment["PATH"]]
        super().__init__(
            directory / "rehearsal",
            "p510",
            self.settings,
            environment={**engine.environment, "PATH": os.pathsep.join(map(str, path))},
            really=True,
            within=engine.enter(),
        )

    def prepare(self) -> None:
        """Gives the host what p510 has before its first up: group, Secret files, images."""
        # The name that the acceptance resolves by default.
        self.engine.resolver([_RESOLVER], {"registry-1.docker.io": "192.0.2.77"})
        self.engine.run(["groupadd", "--force", "wheel"])
        for path, content in self._secret_files().items():
            self.write_file(path, content)
        self.engine.build(_CLOUDFLARED, _CLOUDFLARED_FILE)

    def write_file(self, path: str, content: str) -> None:
        """Puts a file on the host, as agenix does when it decrypts a Secret."""
        script = 'umask 077 && mkdir -p "${1%/*}" && cat > "$1"'
        self.engine.run(["sh", "-c", script, "sh", path], input=content)

    def kubectl(self, *arguments: str, input: str = "") -> str:
        """What kubectl prints, with the kubeconfig that the stack wrote."""
        path = self.settings["cluster"]["kubeconfig"]["path"]
        return self.engine.run(["kubectl", f"--kubeconfig={path}", *arguments], input=input).stdout

    def wait_until_available(self) -> None:
        """Waits for the pods of a cluster that was started again: a refresh before reports those
        Deployments as failed to initialize, and a preview then shows them as updates.
        """
        self.kubectl("wait", "node", "--all", "--for=condition=Ready", "--timeout=300s")
        everywhere = ("--all", "--all-namespaces", "--for=condition=Available", "--timeout=300s")
        self.kubectl("wait", "deployment", *everywhere)

    def _secret_files(self) -> Mapping[str, str]:
        made_up = RehearsalMachine(self.directory / "made-up")
        requests: list[dict[str, Any]] = [
            {"namespace": namespace, "name": name, "as": "manifest", "path": secret["manifest"]}
            | {"type": secret.get("type", "Opaque")}
            for namespace, secrets in self.settings["secrets"].items()
            for name, secret in secrets.items()
        ]
        key = {"namespace": "", "name": "", "as": "value", "type": "Opaque"}
        requests.append({**key, "path": self.settings["tailscale"]["authKey"]["file"]})
        files = {}
        for request in requests:
            content = made_up.missing_file({"keys": [], "optional": False, **request})
            assert content is not None
            files[request["path"]] = content.decode()
        return files


def _repository(directory: Path) -> tuple[str, str]:
    """Makes what ArgoCD starts from: the commit of main, and the URL."""
    bootstrap = directory / "bootstrap"
    bootstrap.mkdir(parents=True)
    (bootstrap / "objects.yaml").write_text(yaml.safe_dump_all(kustomization("", "", "")))
    (bootstrap / "kustomization.yaml").write_text("resources: [objects.yaml]\n")
    who = ["-c", "user.name=p510", "-c", "user.email=p510@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-qm", "All"]):
        subprocess.run(["git", "-C", directory, *command], check=True)
    asked = ["git", "-C", directory, "rev-parse", "HEAD"]
    commit = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return commit, f"ssh://git@localhost{directory}"
