"""The cluster that runs here, in Docker or as this machine's k3s, and the kubectl that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hostctl.cluster import Cluster, Node, look
from hostctl.k3s_datastore import k3s_record
from hostctl.k3s_node import K3S_BINARY, K3S_KUBECONFIG, k3s_look
from hostctl.live import DATASTORE_IN_NODE, STORAGE_IN_NODE
from hostctl.machine import Machine, Ran
from hostctl.protocol import Failure
from hostctl.tools import run_tool


def running_cluster(machine: Machine, name: str, doing: str) -> Cluster:
    """The cluster, which runs: in Docker, or as k3s whose server is this machine."""
    if k3s_record(machine, name):
        return _own_server(machine, name, doing)
    cluster = look(machine, name)
    if cluster.state != "running":
        remedy = "hostctl k3d ensure" if cluster.state == "absent" else "hostctl k3d start"
        raise Failure(
            "refused", f"{doing} cluster {name}", f"it is {cluster.state}", f"{remedy} {name}"
        )
    return cluster


def _own_server(machine: Machine, name: str, doing: str) -> Cluster:
    node = k3s_look(machine, name)
    if node is None or node.role != "server" or node.state != "running":
        state = "there is no k3s here" if node is None else f"this {node.role} is {node.state}"
        raise Failure(
            "refused",
            f"{doing} cluster {name}",
            state,
            "run it on the server that is the stack's host (homelab:host); systemctl start k3s",
        )
    # What k3s has at a path is there for the machine, too.
    places = ("/", STORAGE_IN_NODE, DATASTORE_IN_NODE)
    facts = {"Mounts": [{"Destination": one, "Source": one} for one in places]}
    own = Node(node.node or "", "server", "running", facts)
    return Cluster(name, "running", "", [own], None, on_machine=True)


def kubectl_in_node(
    machine: Machine, cluster: Cluster, arguments: Sequence[str], step: str, **options: Any
) -> Ran:
    """Runs kubectl in the first server: it needs nothing of the host, and asks this cluster."""
    argv = [*kubectl_line(cluster, attached="from_file" in options), *arguments]
    return run_tool(machine, argv, step, "failed", **options)


def kubectl_line(cluster: Cluster, attached: bool = False) -> list[str]:
    """How kubectl is called there, with its stdin where it is attached."""
    if cluster.on_machine:
        return [K3S_BINARY, "kubectl", f"--kubeconfig={K3S_KUBECONFIG}"]
    interactive = ["--interactive"] if attached else []
    return ["docker", "exec", *interactive, cluster.first.name, "kubectl"]
