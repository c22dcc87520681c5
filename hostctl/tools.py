"""The tools of the host: which versions hostctl needs, and what to do where they are missing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from hostctl.machine import QUERY_SECONDS, Machine, Ran, TookTooLong, ToolMissing
from hostctl.protocol import Failure


class Tool(NamedTuple):
    """A program that the host must have: the least version, how to ask for it, how to get it."""

    least: tuple[int, int]
    ask: tuple[str, ...]
    nixos: str
    truenas: str
    debian: str

    def remedy(self, name: str, machine: Machine) -> str:
        how = for_system(machine, self.nixos, self.truenas, self.debian)
        return f"install {name} {'.'.join(map(str, self.least))} or newer. {how}"


TOOLS = {
    "docker": Tool(
        (20, 10),
        ("docker", "version", "--format", "{{.Server.Version}}"),
        "virtualisation.docker.enable = true;",
        "Docker comes with 24.10 and newer: Apps > Settings > Choose Pool.",
        "https://docs.docker.com/engine/install/",
    ),
    "k3d": Tool(
        (5, 6),
        ("k3d", "version"),
        "environment.systemPackages = [ pkgs.k3d ];",
        "`hostctl install k3d`, or homelab:host.k3d.install: true.",
        "`hostctl install k3d`, or homelab:host.k3d.install: true.",
    ),
    # By 1.29 `apply --server-side` migrates a client-side apply to any field manager.
    "kubectl": Tool(
        (1, 29),
        ("kubectl", "version", "--client", "--output=json"),
        "environment.systemPackages = [ pkgs.kubectl ];",
        "put the binary of dl.k8s.io on a dataset and its directory on PATH.",
        "https://kubernetes.io/docs/tasks/tools/install-kubectl-linux/",
    ),
    "git": Tool(
        (2, 20),
        ("git", "--version"),
        "environment.systemPackages = [ pkgs.git ];",
        "git comes with the system.",
        "apt install git",
    ),
    # Since 0.17 its exit status tells that there is no repository.
    "restic": Tool(
        (0, 17),
        ("restic", "version"),
        "environment.systemPackages = [ pkgs.restic ];",
        "put the binary of github.com/restic/restic/releases into /var/lib/homelab/bin.",
        "apt install restic; where that is older, the binary of github.com/restic/restic/releases "
        "in /var/lib/homelab/bin.",
    ),
}


def for_system(machine: Machine, nixos: str, truenas: str, debian: str) -> str:
    """The remedy for the system that this host runs; all of them for another one."""
    ways = {"NixOS": nixos, "TrueNAS SCALE": truenas, "Debian/Ubuntu": debian}
    system = host_system(machine)
    known = {system: ways[system]} if system in ways else ways
    return " ".join(f"{name}: {way}" for name, way in known.items())


def host_system(machine: Machine) -> str:
    """NixOS, TrueNAS SCALE, Debian/Ubuntu, or the name in os-release(5)."""
    if machine.exists("/usr/bin/midclt"):
        # Its os-release is Debian's.
        return "TrueNAS SCALE"
    fields: dict[str, str] = {}
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        with contextlib.suppress(OSError):
            text = machine.read(path).decode("utf-8", "replace")
            fields = dict(re.findall(r"""^([A-Z_]+)=["']?(.*?)["']?\s*$""", text, re.MULTILINE))
            break
    kinds = {fields.get("ID", ""), *fields.get("ID_LIKE", "").split()}
    if "nixos" in kinds:
        return "NixOS"
    return "Debian/Ubuntu" if kinds & {"debian", "ubuntu"} else fields.get("NAME", "unknown")


def tool_version(machine: Machine, name: str) -> tuple[int, int]:
    """The version of a tool. Raises Failure when it is missing, does not run or is too old."""
    tool = TOOLS[name]
    ran = run_tool(machine, tool.ask, f"{name} version", "cannot-tell")
    found = re.search(r"(\d+)\.(\d+)", ran.text)
    if not found:
        raise Failure(
            "tool", f"{name} version", f"printed {ran.text[:80]!r}", tool.remedy(name, machine)
        )
    version = (int(found.group(1)), int(found.group(2)))
    if version < tool.least:
        cause = f"{found.group(0)} is too old"
        raise Failure("tool", f"{name} version", cause, tool.remedy(name, machine))
    return version


def run_tool(machine: Machine, argv: Sequence[str], step: str, code: str, **options: Any) -> Ran:
    """Runs a tool and insists on exit status 0. ``code`` is that of the Failure otherwise."""
    ran = attempt(machine, argv, step, **options)
    if ran.code:
        query = code == "cannot-tell"
        cause = f"{argv[0]} does not answer: {ran.complaint}" if query else ran.complaint
        raise Failure(code, step, cause, tool_remedy(argv[0], ran))
    return ran


def attempt(machine: Machine, argv: Sequence[str], step: str, **options: Any) -> Ran:
    """Runs a tool whatever its exit status."""
    name = argv[0]
    try:
        return machine.run(argv, **options)
    except ToolMissing:
        remedy = TOOLS[name].remedy(name, machine) if name in TOOLS else f"install {name}"
        raise Failure("tool", step, f"{name} is not on PATH", remedy) from None
    except TookTooLong:
        seconds = options.get("timeout", QUERY_SECONDS)
        query = seconds == QUERY_SECONDS
        raise Failure(
            "cannot-tell" if query else "timed-out",
            step,
            f"{name} did not answer in {seconds:.0f} s",
            _DOCKER_REMEDY
            if name in ("docker", "k3d")
            else "run it by hand and see what it waits for",
        ) from None


_DOCKER_REMEDY = "systemctl status docker; `docker info` must answer for this user (or with sudo)"


def tool_remedy(name: str, ran: Ran) -> str:
    said = ran.err.decode("utf-8", "replace")
    if name in ("docker", "k3d") and ("daemon" in said or "docker.sock" in said):
        return _DOCKER_REMEDY
    return "see the cause; `hostctl k3d doctor NAME` lists what is wrong with the host"
