"""k3s' binary and its service on a machine: put in place verified, started, waited for."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from hostctl.k3s_node import (
    K3S_BINARY,
    K3S_KUBECONFIG,
    K3S_UNIT_DIRECTORY,
    k3s_installed_version,
    k3s_kubectl,
    k3s_member,
    k3s_properties,
    k3s_ready,
    k3s_runs,
)
from hostctl.machine import PROGRESS_SECONDS, Machine, TookTooLong, ToolMissing
from hostctl.protocol import Failure, say
from hostctl.tools import run_tool
from hostctl.waiting import size_text

K3S_RESTARTS = 10
"""So often systemd restarts a k3s that ends before a run gives up: joins wait for each other."""
_KUBECTL_LINK = "/usr/local/bin/kubectl"


def install_k3s_binary(machine: Machine, wanted: Mapping[str, Any]) -> bool:
    """Puts the release's binary in place, whole and verified, if another one is there. Returns
    whether it did. What runs goes on with the file that it has until it is restarted."""
    version, step = wanted["version"], f"installing k3s {wanted['version']}"
    given = wanted["install"]
    if k3s_installed_version(machine, K3S_BINARY) == version and given["sha256"] in (
        None,
        machine.checksum(K3S_BINARY),
    ):
        return False
    sha256 = given["sha256"] or _released_sha256(machine, given["url"], step)
    say(f"downloading {given['url']}")
    try:
        content = machine.download(
            given["url"], sha256, lambda size: say(f"{step}: {size_text(size)}")
        )
    except ValueError as found:
        raise Failure(
            "refused",
            step,
            f"{given['url']} has the sha256 {found}, wanted is {sha256}; nothing was installed",
            "is it the binary of that release and architecture? See its sha256sum file",
        ) from None
    except OSError as error:
        raise _not_had(step, given["url"], error) from None
    aside = f"{K3S_BINARY}.new"
    machine.make_directory("/usr/local/bin", 0o755)
    machine.write_atomic(aside, content, 0o755)
    found = k3s_installed_version(machine, aside)
    if found != version:
        machine.remove(aside)
        raise Failure(
            "refused",
            step,
            f"{given['url']} says that it is {found or 'no k3s that runs here'}; not installed",
            f"correct install.url for {version} and this machine's architecture "
            f"({machine.kernel()[1]}), or the version",
        )
    machine.publish(aside, K3S_BINARY)
    return True


def _released_sha256(machine: Machine, url: str, step: str) -> str:
    """The sha256 that the release itself lists, which guards against a broken download alone."""
    directory, _, name = url.rpartition("/")
    architecture = {"k3s": "amd64"}.get(name, name.partition("-")[2])
    listed = f"{directory}/sha256sum-{architecture}.txt"
    try:
        text = machine.read_url(listed).decode("ascii", "replace")
    except OSError as error:
        raise _not_had(step, listed, error) from None
    found = re.search(rf"^([0-9a-f]{{64}})\s+\*?{re.escape(name)}$", text, re.MULTILINE)
    if not found:
        raise Failure(
            "refused", step, f"{listed} does not name {name}", "give install.sha256, or another url"
        )
    return found.group(1)


def _not_had(step: str, url: str, error: OSError) -> Failure:
    return Failure(
        "failed",
        step,
        f"{url}: {error}; nothing was installed",
        "run it again; behind a proxy set https_proxy (sudo keeps it by `env_keep`), or name a "
        "mirror by install.url",
    )


def link_kubectl(machine: Machine) -> bool:
    """Makes kubectl of k3s' own where the machine has none, as get.k3s.io does."""
    if machine.has_program("kubectl") or machine.exists(_KUBECTL_LINK):
        return False
    argv = ["ln", "--symbolic", "--force", K3S_BINARY, _KUBECTL_LINK]
    run_tool(machine, argv, "linking kubectl to k3s", "failed")
    return True


def unlink_kubectl(machine: Machine) -> None:
    """Takes that kubectl away where k3s is gone: a link that leads to nothing."""
    directory, _, name = _KUBECTL_LINK.rpartition("/")
    if name in machine.names(directory) and not machine.exists(_KUBECTL_LINK):
        machine.remove(_KUBECTL_LINK)


def k3s_start_unit(machine: Machine, unit: str) -> None:
    """Starts the service anew, at the next boots too, and does not wait for it."""
    step = f"starting {unit}"
    run_tool(machine, ["systemctl", "daemon-reload"], step, "failed", timeout=120.0)
    run_tool(machine, ["systemctl", "enable", unit], step, "failed", timeout=120.0)
    run_tool(machine, ["systemctl", "reset-failed", unit], step, "failed")
    run_tool(machine, ["systemctl", "restart", "--no-block", unit], step, "failed")


def k3s_stop_unit(machine: Machine, unit: str) -> None:
    """Stops the service and waits for it; the pods' processes go on (KillMode=process)."""
    if machine.exists(f"{K3S_UNIT_DIRECTORY}/{unit}"):
        run_tool(machine, ["systemctl", "stop", unit], f"stopping {unit}", "failed", timeout=300.0)


def k3s_wait(machine: Machine, wanted: Mapping[str, Any], unit: str, *, fresh: bool = True) -> None:
    """Waits until the node is Ready in the version declared, and says how far it is. A service that
    ends again and again is given up before the ceiling of `readySeconds`. ``fresh``: it was started
    just now, since when systemd counts."""
    seconds = wanted["timeouts"]["readySeconds"]
    step = f"waiting for {wanted['node']}"
    started = machine.now()
    first = 0 if fresh else _restarts(k3s_properties(machine, unit))
    while True:
        properties = k3s_properties(machine, unit)
        why = _not_ready(machine, wanted, properties)
        if why is None:
            return
        waited = machine.now() - started
        failing = _restarts(properties) - first >= K3S_RESTARTS
        if waited >= seconds or failing or properties.get("ActiveState") == "failed":
            raise Failure(
                "timed-out" if waited >= seconds else "failed",
                step,
                f"{why}, after {waited:.0f} s; its log: {_journal(machine, unit)}",
                f"journalctl --unit {unit}; correct what it names, then run up again: "
                + (
                    f"{wanted['server']} must be reached from here (6443/tcp; servers among "
                    "themselves 2379-2380/tcp; 8472/udp for pods)"
                    if wanted["server"]
                    else "with etcd a majority of the servers must run (systemctl start k3s on "
                    "the others); a large datastore needs a larger readySeconds"
                ),
            )
        say(f"{step}: {waited:.0f} s; {why}")
        machine.sleep(PROGRESS_SECONDS)


def _restarts(properties: Mapping[str, str]) -> int:
    text = properties.get("NRestarts", "")
    return int(text) if text.isdigit() else 0


def _not_ready(
    machine: Machine, wanted: Mapping[str, Any], properties: Mapping[str, str]
) -> str | None:
    """Why the node is not what was declared yet; None when it is."""
    step = f"waiting for {wanted['node']}"
    if properties.get("ActiveState") != "active":
        return f"systemd says {properties.get('ActiveState') or 'nothing'} of it"
    try:
        if wanted["role"] == "server" and not machine.exists(K3S_KUBECONFIG):
            return "k3s has written no kubeconfig yet"
        k3s_kubectl(machine, ["get", "--raw=/readyz"], step)
        if wanted["config"].get("disable-agent"):
            return None
        member = k3s_member(machine, wanted["node"], step)
    except Failure as failure:
        return failure.cause
    if member is None:
        return "the cluster has no node of this name yet"
    if k3s_runs(member) != wanted["version"]:
        return f"its kubelet is {k3s_runs(member) or 'silent'}"
    # Without flannel a node is not Ready before the network plugin that the stack installs later.
    if not k3s_ready(member) and wanted["config"].get("flannel-backend") != "none":
        return "it is not Ready"
    return None


def _journal(machine: Machine, unit: str) -> str:
    """The last lines of a unit, for a person."""
    argv = ["journalctl", f"--unit={unit}", "--lines=5", "--output=cat", "--no-pager"]
    with contextlib.suppress(ToolMissing, TookTooLong):
        said = machine.run(argv).text.strip().splitlines()
        if said:
            return " / ".join(line.strip() for line in said[-5:])[-600:]
    return f"journalctl --unit {unit} shows it"


def k3s_release_url(version: str, architecture: str = "amd64") -> str:
    """Where the release's binary is."""
    name = "k3s" if architecture == "amd64" else f"k3s-{architecture}"
    return f"https://github.com/k3s-io/k3s/releases/download/{quote(version)}/{name}"


def k3s_host_port(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 6443
