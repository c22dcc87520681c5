"""Waiting for a cluster: it follows progress, is bounded, and restarts only what is stalled."""

from __future__ import annotations

import base64
import contextlib
import re
from collections.abc import Mapping
from typing import Any

from hostctl.cluster import Cluster, look, node_kubeconfig
from hostctl.live import api_address, live_api
from hostctl.machine import PROGRESS_SECONDS, QUERY_SECONDS, Machine, TookTooLong, ToolMissing
from hostctl.protocol import Failure, say
from hostctl.tools import attempt, run_tool

BIND_WAIT_SECONDS = 300.0
STALL_SECONDS = 180.0
STALL_BYTES = 1024 * 1024
"""A server that reads less than this in STALL_SECONDS does not open its datastore any more (4)."""
STALL_RESTARTS = 2


def wait_ready(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster
) -> tuple[Cluster, dict[str, str]]:
    """Waits until the API answers in the node and through its published port (incident 1). Returns
    the cluster as it then is, and its credentials.

    Follows what the servers read (incident 4): while they read it waits, up to api_wait_seconds; a
    server that reads nothing for STALL_SECONDS is restarted, STALL_RESTARTS times, and never
    deleted (incident 2).
    """
    name = spec["name"]
    started = moved = machine.now()
    read, restarts = 0, 0
    while True:
        credentials, why = ready(machine, cluster)
        if credentials:
            return cluster, credentials
        now = machine.now()
        waited = now - started
        if waited >= spec["api_wait_seconds"]:
            raise Failure(
                "timed-out",
                f"waiting for the API of cluster {name}",
                f"not ready after {waited:.0f} s: {why}",
                f"docker logs --tail 50 {cluster.first.name}; a datastore that is still being read "
                "needs a larger cluster.apiWaitSeconds",
            )
        total = _bytes_read(machine, cluster)
        if total is None or total - read >= STALL_BYTES or total < read:
            read, moved = total or 0, now
        elif now - moved >= STALL_SECONDS:
            if restarts == STALL_RESTARTS:
                raise Failure(
                    "failed",
                    f"waiting for the API of cluster {name}",
                    f"stalled again after {restarts} restarts: {why}",
                    f"docker logs --tail 50 {cluster.first.name}",
                )
            restarts += 1
            say(f"{cluster.first.name} reads nothing since {now - moved:.0f} s: restart {restarts}")
            restart_container(machine, cluster.first.name)
            read, moved = 0, machine.now()
        say(f"waiting for the API of {name}: {waited:.0f} s, {size_text(total)} read; {why}")
        machine.sleep(PROGRESS_SECONDS)
        cluster = look(machine, name, spec["network"]["name"])
        if cluster.state == "absent":
            raise Failure(
                "failed",
                f"waiting for cluster {name}",
                "it was deleted while it was waited for",
                "run up again",
            )


def ready(machine: Machine, cluster: Cluster) -> tuple[dict[str, str] | None, str]:
    """The credentials of a cluster whose API can be used, or None and why it cannot."""
    server = cluster.first.name
    down = [node.name for node in cluster.nodes if node.status != "running"]
    if down:
        return None, f"{', '.join(down)} is not running"
    credentials = node_kubeconfig(machine, cluster)
    address, port = api_address(cluster), live_api(cluster)["port"]
    if credentials and _answers(machine, f"https://{address}:{port}/readyz", credentials):
        return credentials, ""
    # What follows finds out why.
    argv = ["docker", "exec", server, "kubectl", "get", "--raw=/readyz"]
    try:
        ran = machine.run(argv, timeout=QUERY_SECONDS)
    except TookTooLong:
        return None, "the API does not answer"
    except ToolMissing:
        return None, "docker is not on PATH"
    if ran.code or ran.text.strip() != "ok":
        said = ran.complaint if ran.code else ran.text[:100]
        return None, f"the API in the node is not ready: {said}"
    if credentials is None:
        return None, "the node has written no kubeconfig yet"
    ca = base64.b64decode(credentials["ca"]).decode("ascii", "replace")
    refused = machine.connect(address, port, ca)
    if refused:
        return None, f"{address}:{port} does not reach it: {refused}"
    return credentials, ""


def _answers(machine: Machine, url: str, credentials: Mapping[str, str]) -> bool:
    try:
        ca, certificate, key = (
            base64.b64decode(credentials[part]) for part in ("ca", "certificate", "key")
        )
        return machine.get(url, certificate + key, ca.decode("ascii")) == (200, "ok")
    except (OSError, ValueError):
        return False


def _bytes_read(machine: Machine, cluster: Cluster) -> int | None:
    """What all processes of the servers have read; None when it cannot be seen."""
    pids: list[int] = []
    for node in cluster.of("server"):
        with contextlib.suppress(ToolMissing, TookTooLong):
            ran = machine.run(["docker", "top", node.name, "-eo", "pid"])
            pids += [int(word) for word in ran.text.split() if word.isdigit()]
    return machine.bytes_read(pids)


def size_text(count: int | None) -> str:
    if count is None:
        return "an unknown number of bytes"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def wait_for_address(machine: Machine, address: str) -> None:
    """Waits for the bind address: an interface such as tailscale0 comes up after Docker, and a
    container started before it never publishes its port (incident 1)."""
    waited = 0.0
    while not machine.has_address(address):
        if waited >= BIND_WAIT_SECONDS:
            raise Failure(
                "timed-out",
                f"waiting for the bind address {address}",
                f"no interface of this host has it after {waited:.0f} s",
                "bring the interface up (ip address show), or correct cluster.api.bind",
            )
        say(f"waiting for an interface with {address}: {waited:.0f} s")
        machine.sleep(PROGRESS_SECONDS)
        waited += PROGRESS_SECONDS


def restart_container(machine: Machine, container: str) -> None:
    argv = ["docker", "restart", "-t", "60", container]
    run_tool(machine, argv, f"restarting {container}", "failed", timeout=300.0)


def stop(machine: Machine, cluster: Cluster) -> None:
    """Stops all nodes, those that others need last."""
    for node in reversed(cluster.nodes):
        if node.running:
            say(f"stopping {node.name}")
            argv = ["docker", "stop", "-t", "60", node.name]
            run_tool(machine, argv, f"stopping {node.name}", "failed", timeout=300.0)


def asked_version(machine: Machine, cluster: Cluster) -> str | None:
    argv = ["docker", "exec", cluster.first.name, "k3s", "--version"]
    ran = attempt(machine, argv, "asking k3s for its version")
    found = re.search(r"v\d+\.\d+\.\d+\S*", ran.text)
    return found.group(0) if found else None


def present_cluster(machine: Machine, name: str, doing: str) -> Cluster:
    cluster = look(machine, name)
    if cluster.state == "absent":
        raise Failure(
            "refused",
            f"{doing} cluster {name}",
            "it does not exist",
            f"hostctl k3d ensure {name}, or pulumi up, creates it",
        )
    return cluster
