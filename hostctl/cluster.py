"""What is there of a cluster: its nodes, network and volumes, in three answers."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import ipaddress
import json
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from hostctl.machine import Machine
from hostctl.protocol import Failure
from hostctl.record import read_record
from hostctl.tools import attempt, run_tool, tool_remedy

KUBECONFIG_IN_NODE = "/output/kubeconfig.yaml"
SWAP_LABEL = "homelab.swap"


class Node(NamedTuple):
    """A container of a cluster, as `docker inspect` shows it."""

    name: str
    role: str
    status: str
    facts: dict[str, Any]

    @property
    def running(self) -> bool:
        return self.status in ("running", "restarting", "paused")

    @property
    def labels(self) -> dict[str, str]:
        return self.facts["Config"].get("Labels") or {}

    @property
    def bindings(self) -> dict[str, list[dict[str, str]]]:
        """Ports that it was created to publish, as NUMBER/PROTOCOL. k3d names the API's without a
        protocol, and Docker keeps what it was given; that one comes first."""
        given = self.facts["HostConfig"].get("PortBindings") or {}
        found: dict[str, list[dict[str, str]]] = {}
        for port in sorted(given, key=lambda port: "/" in port):
            full = port if "/" in port else f"{port}/tcp"
            found.setdefault(full, []).extend(given[port] or [])
        return found

    @property
    def published(self) -> dict[str, Any]:
        """Ports that Docker publishes for it now."""
        return self.facts["NetworkSettings"].get("Ports") or {}

    def mount(self, destination: str) -> str | None:
        """What of the host is mounted there."""
        for mount in self.facts.get("Mounts") or []:
            if mount.get("Destination") == destination:
                return mount.get("Source")
        return None


class Cluster(NamedTuple):
    """A cluster as Docker shows it. ``state`` is absent, running or stopped. Of one whose node is
    this machine itself (``on_machine``), that node alone is known.
    """

    name: str
    state: str
    detail: str
    nodes: list[Node]
    network: dict[str, Any] | None
    on_machine: bool = False

    def of(self, *roles: str) -> list[Node]:
        return [node for node in self.nodes if node.role in roles]

    @property
    def first(self) -> Node:
        """server-0, which the others join and which holds the kubeconfig."""
        return self.of("server")[0]

    @property
    def api(self) -> Node:
        """The node that publishes the API: the load balancer where there is one."""
        return next(iter(self.of("loadbalancer")), self.first)


def look(machine: Machine, name: str, network: str | None = None) -> Cluster:
    """What there is of a cluster, read from Docker; a failed listing is no absence (incident 3).

    ``network`` is the declared one. Raises Failure "cannot-tell" when Docker does not answer or
    when the cluster is partial, "refused" when someone else made what bears its name.
    """
    found = node_containers(machine, name)
    refuse_foreign(name, found)
    nodes = sorted((_node(facts) for facts in found), key=_start_order)
    swap = read_record(machine, name).get("swap") or {}
    nodes = _without_swapped([node for node in nodes if node.role != "helper"], swap)
    attached = network_of(nodes) or network or f"k3d-{name}"
    cluster = Cluster(name, "absent", "", nodes, find_network(machine, attached))
    if not nodes:
        _refuse_remains(machine, cluster, found)
        return cluster
    _refuse_partial(cluster, attached, swap.get("old"))
    down = [node.name for node in nodes if not node.running]
    if down:
        return cluster._replace(state="stopped", detail=f"not running: {', '.join(down)}")
    return cluster._replace(state="running", detail=f"{len(nodes)} node(s) running")


def node_containers(machine: Machine, name: str) -> list[dict[str, Any]]:
    """All containers, running or not, that bear the cluster's label or the names of its nodes."""
    listed = machine.ask_docker("/containers/json?all=true")
    if listed is not None:
        ids = []
        for one in listed:
            names = [path.lstrip("/") for path in one["Names"] or ()]
            if _is_of(name, (one["Labels"] or {}).get("k3d.cluster"), names):
                ids.append(one["Id"])
        found = [machine.ask_docker(f"/containers/{one}/json") for one in ids]
        if None not in found:
            return found
    row = '{{.ID}}\t{{.Names}}\t{{.Label "k3d.cluster"}}'
    step = f"looking for cluster {name} in Docker"
    for again in range(3):
        argv = ["docker", "ps", "--all", "--no-trunc", "--format", row]
        ids = []
        for line in run_tool(machine, argv, step, "cannot-tell").text.splitlines():
            identifier, names, label = (*line.split("\t"), "", "")[:3]
            if _is_of(name, label, names.split(",")):
                ids.append(identifier)
        if not ids:
            return []
        seen = attempt(machine, ["docker", "inspect", "--type", "container", *ids], step)
        if seen.code == 0:
            return parse_json(seen.out, step)
        if "No such" not in seen.complaint or again == 2:
            raise Failure("cannot-tell", step, seen.complaint, tool_remedy("docker", seen))
    raise AssertionError("unreachable")


def _is_of(cluster: str, label: str | None, names: Iterable[str]) -> bool:
    return label == cluster or any(_is_node_name(cluster, one) for one in names)


def _is_node_name(cluster: str, container: str) -> bool:
    return bool(
        re.fullmatch(rf"k3d-{re.escape(cluster)}-(server-\d+|agent-\d+|serverlb|tools)", container)
    )


def container_facts(machine: Machine, container: str, step: str) -> dict[str, Any] | None:
    """A container as `docker inspect` shows it; None when there is none of that name or id."""
    seen = attempt(machine, ["docker", "inspect", "--type", "container", container], step)
    if seen.code == 0:
        return parse_json(seen.out, step)[0]
    if "No such" in seen.complaint:
        return None
    raise Failure("cannot-tell", step, seen.complaint, tool_remedy("docker", seen))


def parse_json(content: bytes, step: str, *, or_scalar: bool = False) -> Any:
    """The object or list that a tool printed; with ``or_scalar`` any JSON: a list that is empty is
    `null` to some programs in Go."""
    try:
        found = json.loads(content)
        if not or_scalar and not isinstance(found, (dict, list)):
            raise ValueError
        return found
    except (ValueError, RecursionError):
        shown = content[:80].decode("utf-8", "replace")
        raise Failure("cannot-tell", step, f"not JSON: {shown!r}", "run it by hand") from None


def _node(facts: dict[str, Any]) -> Node:
    labels = facts["Config"].get("Labels") or {}
    role = labels.get("k3d.role", "")
    if role not in ("server", "agent", "loadbalancer"):
        role = "helper"
    return Node(facts["Name"].lstrip("/"), role, facts["State"]["Status"], facts)


def _start_order(node: Node) -> tuple[int, int, str]:
    role = ("server", "agent", "loadbalancer", "helper").index(node.role)
    number = re.search(r"-(\d+)$", node.name)
    return role, int(number.group(1)) if number else 0, node.name


def network_of(nodes: Sequence[Node]) -> str | None:
    return next((node.labels.get("k3d.cluster.network") for node in nodes), None)


def find_network(machine: Machine, name: str) -> dict[str, Any] | None:
    found = machine.ask_docker(f"/networks/{quote(name)}")
    if found is not None:
        return found
    step = f"looking for Docker network {name}"
    seen = attempt(machine, ["docker", "network", "inspect", name], step)
    if seen.code == 0:
        return parse_json(seen.out, step)[0]
    if "not found" in seen.complaint or "No such" in seen.complaint:
        return None
    raise Failure("cannot-tell", step, seen.complaint, tool_remedy("docker", seen))


def _networks(machine: Machine) -> list[dict[str, Any]]:
    """All Docker networks of the host."""
    step = "looking at the host's Docker networks"
    for again in range(3):
        listed = run_tool(
            machine, ["docker", "network", "ls", "--quiet", "--no-trunc"], step, "cannot-tell"
        )
        seen = attempt(machine, ["docker", "network", "inspect", *listed.text.split()], step)
        if seen.code == 0:
            return parse_json(seen.out, step)
        # One that went away since it was listed.
        if not ("not found" in seen.complaint or "No such" in seen.complaint) or again == 2:
            raise Failure("cannot-tell", step, seen.complaint, tool_remedy("docker", seen))
    raise AssertionError("unreachable")


def refuse_docker_resolvers(machine: Machine, spec: Mapping[str, Any]) -> None:
    """Refuses a DNS server inside a Docker network: its address moves when Docker makes its
    networks anew, and the pods are without DNS (incident 5). The subnet of a macvlan or ipvlan
    network is the LAN's own, where the router answers."""
    for network in _networks(machine):
        if network.get("Driver") in ("macvlan", "ipvlan"):
            continue
        for config in (network.get("IPAM") or {}).get("Config") or []:
            subnet = config.get("Subnet")
            for resolver in spec["resolvers"] if subnet else ():
                if ipaddress.ip_address(resolver) in ipaddress.ip_network(subnet, strict=False):
                    raise Failure(
                        "refused",
                        f"checking the resolvers of cluster {spec['name']}",
                        f"resolver {resolver} lies in Docker network {network['Name']}, {subnet}",
                        "name a public or LAN DNS server in cluster.resolvers, outside every "
                        "Docker network (incident 5)",
                    )


def refuse_foreign(name: str, found: Iterable[Mapping[str, Any]]) -> None:
    for facts in found:
        labels = facts["Config"].get("Labels") or {}
        if labels.get("app") == "k3d" and labels.get("k3d.cluster") == name:
            continue
        other = labels.get("k3d.cluster")
        maker = f"belongs to cluster {other}" if other else "was not made by k3d"
        container = facts["Name"].lstrip("/")
        raise Failure(
            "refused",
            f"looking for cluster {name} in Docker",
            f"foreign: container {container} bears the name of a node of it but {maker}",
            f"rename or remove that container (docker rename {container} ...), or choose another "
            "cluster name",
        )


def _refuse_remains(machine: Machine, cluster: Cluster, found: Sequence[Any]) -> None:
    """Half a cluster without nodes: what is left may be data, so nothing is made on it."""
    name = cluster.name
    left = [f"container {facts['Name'].lstrip('/')}" for facts in found]
    remove = [f"docker rm --force {facts['Name'].lstrip('/')}" for facts in found]
    volume = f"k3d-{name}-images"
    step = f"looking for volumes of cluster {name}"
    argv = ["docker", "volume", "ls", "--quiet", "--filter", f"name=^{volume}$"]
    if run_tool(machine, argv, step, "cannot-tell").text.strip():
        left.append(f"volume {volume}")
        remove.append(f"docker volume rm {volume}")
    labels = (cluster.network or {}).get("Labels") or {}
    if labels.get("app") == "k3d" and cluster.network:
        left.append(f"network {cluster.network['Name']}")
        remove.append(f"docker network rm {cluster.network['Name']}")
    if left and not _begun(machine, name):
        raise partial_failure(
            name, f"it has no nodes, but left is {', '.join(left)}", "; ".join(remove)
        )


def _begun(machine: Machine, name: str) -> bool:
    """Whether a create of ours began and no cluster has been seen ready since."""
    return bool(read_record(machine, name).get("creating"))


def _without_swapped(nodes: list[Node], swap: Mapping[str, Any]) -> list[Node]:
    """The nodes of a cluster without the other one of a swap: the old node, which is kept, renamed,
    until the new one is verified; or the new one, as long as it was never started."""
    new = [
        node for node in nodes if node.name == swap.get("node") and node.facts["Id"] != swap["old"]
    ]
    if new and swap["started"]:
        return [node for node in nodes if node.facts["Id"] != swap["old"]]
    return [node for node in nodes if node not in new]


def _refuse_partial(cluster: Cluster, network: str, swapped: str | None) -> None:
    name = cluster.name
    servers = cluster.of("server")
    first = servers[0] if servers else None
    if not first or (first.name != f"k3d-{name}-server-0" and first.facts["Id"] != swapped):
        there = ", ".join(node.name for node in cluster.nodes)
        raise partial_failure(
            name,
            f"k3d-{name}-server-0 is missing; there is {there}",
            f"restore it from a backup, or give the cluster up: k3d cluster delete {name}",
        )
    if cluster.network is None and network != "host":
        raise partial_failure(
            name,
            f"its Docker network {network} is gone",
            "pulumi up --refresh makes it again; then connect each node: docker network connect "
            f"{network} {servers[0].name}",
        )
    for node in cluster.nodes:
        endpoints = node.facts["NetworkSettings"].get("Networks") or {}
        endpoint = endpoints.get(network)
        lost = endpoint is None or (node.status == "running" and not endpoint.get("IPAddress"))
        if lost and network != "host":
            # This is what made `k3d cluster list` fail in incident 3.
            raise partial_failure(
                name,
                f"node {node.name} has lost its endpoint on network {network}",
                f"docker network disconnect --force {network} {node.name}; "
                f"docker network connect {network} {node.name}; docker restart {node.name}",
            )


def partial_failure(name: str, cause: str, remedy: str) -> Failure:
    return Failure(
        "cannot-tell",
        f"looking at cluster {name}",
        f"partial: {cause}",
        f"nothing was created, started or deleted. By hand: {remedy}",
    )


def node_kubeconfig(machine: Machine, cluster: Cluster) -> dict[str, str] | None:
    """The credentials that server-0 holds, base64 as k3s writes them: ca, certificate, key.

    None before its first start. `docker cp`, which reads of a stopped node too, takes the daemon a
    tenth of a second, so who may looks into the running one.
    """
    pid = cluster.first.facts["State"].get("Pid")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if pid:
            file = machine.read(f"/proc/{pid}/root{KUBECONFIG_IN_NODE}")
            return kubeconfig_credentials(file.decode("utf-8"))
    step = f"reading the kubeconfig of {cluster.first.name}"
    argv = ["docker", "cp", f"{cluster.first.name}:{KUBECONFIG_IN_NODE}", "-"]
    ran = attempt(machine, argv, step)
    if ran.code:
        if "Could not find the file" in ran.complaint or "No such" in ran.complaint:
            return None
        raise Failure("cannot-tell", step, ran.complaint, tool_remedy("docker", ran))
    return kubeconfig_credentials(read_tar(ran.out))


def kubeconfig_credentials(text: str) -> dict[str, str] | None:
    """``ca``, ``certificate`` and ``key``, base64, of a kubeconfig that k3s wrote; None while it is
    being written, or of a server that died in its first start."""
    fields = {
        "ca": "certificate-authority-data",
        "certificate": "client-certificate-data",
        "key": "client-key-data",
    }
    found = {
        key: re.search(rf"^\s*{name}:\s*([A-Za-z0-9+/=]+)\s*$", text, re.MULTILINE)
        for key, name in fields.items()
    }
    if not all(found.values()):
        return None
    return {key: match.group(1) for key, match in found.items() if match}


def read_tar(content: bytes) -> str:
    """The text of an archive's first file, as `docker cp CONTAINER:FILE -` gives one; empty where
    there is none."""
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member else None
            return file.read().decode("utf-8") if file else ""
    except (tarfile.TarError, UnicodeDecodeError):
        return ""


def identity_of(name: str, credentials: Mapping[str, str]) -> str:
    """Another CA certificate is another cluster, whatever its name (design rule 4)."""
    return f"{name}-{hashlib.sha256(base64.b64decode(credentials['ca'])).hexdigest()[:16]}"
