"""What the live cluster was created with, and how that differs from the spec."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hostctl.cluster import Cluster, Node, network_of
from hostctl.machine import Machine
from hostctl.moved import arriving
from hostctl.record import read_record
from hostctl.spec import AUDIT_ARGUMENT, SECRET_ARGUMENT
from hostctl.tools import attempt

STORAGE_IN_NODE = "/var/lib/rancher/k3s/storage"
DATASTORE_IN_NODE = "/var/lib/rancher/k3s/server"
CNI_PLUGINS_IN_NODE = "/opt/cni/plugins"
RESOLVERS_IN_NODE = "/etc/rancher/k3s/resolv.conf"
AUDIT_IN_NODE = "/etc/rancher/k3s/audit.yaml"
API_PORT_IN_NODE = "6443/tcp"
_OF_SETTINGS = ("--disable", "--resolv-conf", "--cluster-init", "--secrets-encryption")


def live_facts(machine: Machine, cluster: Cluster, unseen: list[str]) -> dict[str, Any]:
    """What the cluster was created with, in the words of a ClusterSpec, and what it is now."""
    server = cluster.first
    labels = server.labels
    arguments = _arguments(server)
    storage = server.mount(STORAGE_IN_NODE)
    datastore = server.mount(DATASTORE_IN_NODE)
    return {
        "image": server.facts["Config"]["Image"],
        "image_id": server.facts.get("Image", ""),
        "servers": len(cluster.of("server")),
        "agents": len(cluster.of("agent")),
        "disable": sorted(
            part
            for argument in arguments
            if argument.startswith("--disable=")
            for part in argument.split("=", 1)[1].split(",")
        ),
        "k3s_args": [
            _without_secret(argument)
            for argument in arguments
            if argument.split("=")[0] not in _OF_SETTINGS
            and not argument.startswith(AUDIT_ARGUMENT)
        ],
        "audit": [argument for argument in arguments if argument.startswith(AUDIT_ARGUMENT)],
        "secrets_encryption": any(
            argument.split("=")[0] == "--secrets-encryption" and not argument.endswith("=false")
            for argument in arguments
        ),
        "api": live_api(cluster),
        "resolvers": _live_resolvers(machine, server, unseen),
        "storage_dir": storage,
        "datastore_dir": os.path.dirname(datastore) if datastore else None,
        "cni_plugins": server.mount(CNI_PLUGINS_IN_NODE),
        "lan": sorted(lan_of(cluster)),
        "network": {
            "name": labels.get("k3d.cluster.network"),
            "subnet": subnet_of(cluster.network),
        },
        "ports": _live_ports(cluster),
        "load_balancer": bool(cluster.of("loadbalancer")),
        "created_at": server.facts.get("Created"),
        "k3s_version": k3s_version(server.facts["Config"]["Image"]),
        "nodes": {node.name: node.status for node in cluster.nodes},
    }


def k3s_version(image: str) -> str | None:
    """The version that a k3s image's tag names: v1.31.5-k3s1 is v1.31.5+k3s1."""
    found = re.search(r":(v\d+\.\d+\.\d+)[-+](k3s\d+)", image)
    return f"{found.group(1)}+{found.group(2)}" if found else None


def _arguments(node: Node) -> list[str]:
    """Arguments of k3s as --flag=value, without what k3d adds on its own."""
    words = list(node.facts["Config"].get("Cmd") or [])[1:]
    joined: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and words and not words[0].startswith("-"):
            word = f"{word}={words.pop(0)}"
        joined.append(word)
    for label in ("k3d.server.api.host", "k3d.server.loadbalancer"):
        own = f"--tls-san={node.labels.get(label)}"
        if own in joined:
            # k3d puts its own last; an equal one of the user's stays.
            del joined[len(joined) - 1 - joined[::-1].index(own)]
    return joined


def _without_secret(argument: str) -> str:
    name = SECRET_ARGUMENT.match(argument)
    return f"{name.group(0)}=(not shown)" if name else argument


def live_api(cluster: Cluster) -> dict[str, Any]:
    node = cluster.api
    bound = node.bindings.get(API_PORT_IN_NODE) or [{}]
    name = cluster.first.labels.get("k3d.server.api.host")
    bind = bound[0].get("HostIp") or "0.0.0.0"
    return {
        "bind": bind,
        "port": int(bound[0].get("HostPort") or 0),
        "server_name": name if name != bind else None,
        "published": bool(node.published.get(API_PORT_IN_NODE)),
    }


def api_address(cluster: Cluster) -> str:
    """Where this host reaches the published API."""
    bind = live_api(cluster)["bind"]
    return "127.0.0.1" if bind == "0.0.0.0" else bind


def _live_resolvers(machine: Machine, server: Node, unseen: list[str]) -> list[str] | None:
    source = server.mount(RESOLVERS_IN_NODE)
    if source is None:
        return []
    try:
        text = machine.read(source).decode("utf-8", "replace")
    except OSError as error:
        unseen.append(f"resolvers: {source} cannot be read ({error.strerror or error})")
        return None
    return re.findall(r"^\s*nameserver\s+(\S+)", text, re.MULTILINE)


def lan_of(cluster: Cluster) -> dict[str, list[str]]:
    """The nodes on each network that a cluster's nodes have besides their own."""
    own = network_of(cluster.nodes)
    found: dict[str, list[str]] = {}
    for node in cluster.of("server", "agent"):
        for name in node.facts["NetworkSettings"].get("Networks") or {}:
            if name != own:
                found.setdefault(name, []).append(node.name)
    return found


def lan_changes(
    spec: Mapping[str, Any], cluster: Cluster
) -> tuple[list[str], list[tuple[str, str]]]:
    """Nodes that lack the declared second network; network and node of each that has one too many.
    Only networks of that name are ours."""
    attached = lan_of(cluster)
    wanted = spec["lan_network"]
    there = attached.get(wanted, []) if wanted else []
    lacking = [node.name for node in cluster.of("server", "agent") if wanted]
    ours = f"{spec['network']['name']}-lan"
    spare = [] if wanted else [(ours, node) for node in attached.get(ours, [])]
    return [node for node in lacking if node not in there], spare


def subnet_of(network: Mapping[str, Any] | None) -> str | None:
    config = ((network or {}).get("IPAM") or {}).get("Config") or [{}]
    return config[0].get("Subnet")


def _live_ports(cluster: Cluster) -> list[dict[str, Any]]:
    ports = []
    for node in cluster.nodes:
        for port, bound in node.bindings.items():
            number, _, protocol = port.partition("/")
            if port == API_PORT_IN_NODE and node is cluster.api:
                bound = bound[1:]
            for binding in bound:
                ports.append(
                    {
                        "host_port": int(binding.get("HostPort") or 0),
                        "container_port": int(number),
                        "bind": binding.get("HostIp") or "0.0.0.0",
                        "protocol": protocol or "tcp",
                    }
                )
    return ports


def differences(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster, live: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every difference of the live cluster from the spec: key (that of the setting), declared,
    live, fixed (at creation, incident 6), remedy."""
    name = spec["name"]
    found: list[dict[str, Any]] = []

    def compare(key: str, declared: Any, actual: Any) -> None:
        if declared != actual:
            one = {"key": key, "declared": declared, "live": actual, "fixed": True}
            one["remedy"] = (
                f"keep the cluster: declare {plain(actual)}; or {how_to_recreate(name, [one])}"
            )
            found.append(one)

    record = read_record(machine, name)
    if record.get("swap"):
        step = f"cut off at step {record['swap']['step']}"
        found.append(_adjustable("swap", "done", step, "up continues it, or goes back"))
    if not _same_image(machine, spec["image"], live):
        why = _no_swap(spec, cluster, live, record)
        if why:
            compare("image", spec["image"], live["image"])
            found[-1].update(why=why, remedy=f"{why}; {found[-1]['remedy']}")
        else:
            found.append(_adjustable("image", spec["image"], live["image"], _SWAP_REMEDY))
    for key in ("servers", "agents"):
        compare(key, spec[key], live[key])
    compare("disable", sorted(set(spec["disable"])), sorted(set(live["disable"])))
    compare("k3sArgs", _joined(spec["k3s_args"]), live["k3s_args"])
    audit = spec["audit"] or {"policy": "", "arguments": []}
    compare("audit", _log_options(audit["arguments"]), _log_options(live["audit"]))
    applied = record.get("audit")
    if audit["arguments"] == live["audit"] != [] and audit_digest(audit["policy"]) != applied:
        remedy = "up restarts the servers, one after another: the API is away for minutes"
        found.append(
            _adjustable("audit.rules", audit_digest(audit["policy"]), applied or "unknown", remedy)
        )
    compare("api.bind", spec["api"]["bind"], live["api"]["bind"])
    compare("api.port", spec["api"]["port"], live["api"]["port"])
    if spec["api"]["server_name"]:
        # It is in the API server's certificate.
        compare("api.serverName", spec["api"]["server_name"], live["api"]["server_name"])
    if live["resolvers"] is not None:
        compare("resolvers", spec["resolvers"], live["resolvers"])
    compare("storageDir", spec["storage_dir"], live["storage_dir"])
    if live["datastore_dir"] is not None:
        # A cluster made without that mount gets it with the next swap of its node.
        compare("datastoreDir", spec["datastore_dir"], live["datastore_dir"])
    compare("cniPlugins", spec["cni_plugins"], live["cni_plugins"])
    lacking, spare = lan_changes(spec, cluster)
    if lacking or spare:
        declared = spec["lan_network"] or "none"
        found.append(_adjustable("lan", declared, live["lan"], "up connects or disconnects nodes"))
    compare("secretsEncryption", spec["secrets_encryption"], live["secrets_encryption"])
    compare("network.name", spec["network"]["name"], live["network"]["name"])
    compare("network.subnet", spec["network"]["subnet"], live["network"]["subnet"])
    compare("ports", _sorted_ports(spec["ports"]), _sorted_ports(live["ports"]))
    if cluster.state == "stopped":
        found.append(_adjustable("state", "running", cluster.detail, "up starts it"))
    elif not live["api"]["published"]:
        remedy = f"up restarts {cluster.api.name}, which publishes it"
        found.append(_adjustable("api.published", True, False, remedy))
    return found


def audit_digest(policy: str) -> str:
    """Tells one audit policy from another."""
    return hashlib.sha256(policy.encode()).hexdigest()[:16]


def _log_options(arguments: Sequence[str]) -> str:
    """The audit log's arguments in short; `off` without any."""
    return " ".join(argument[len(AUDIT_ARGUMENT) :] for argument in arguments) or "off"


_SWAP_REMEDY = (
    "up swaps the node: the datastore is backed up and the backup verified, the API is away for "
    "minutes, and the old node comes back by itself when the new one does not come up"
)


def _no_swap(
    spec: Mapping[str, Any],
    cluster: Cluster,
    live: Mapping[str, Any],
    record: Mapping[str, Any],
) -> str | None:
    """Why the live node cannot be swapped for one of the declared image; None when it can.

    k3s goes up one minor version at a time, and never down: its datastore may have been migrated
    (docs.k3s.io/upgrades/manual, kubernetes.io/releases/version-skew-policy).
    """
    if len(cluster.of("server", "agent")) > 1:
        return "only the node of a cluster that has one can be swapped"
    failed = record.get("swap_failed") or {}
    if failed.get("image") == spec["image"]:
        return (
            f"the swap to it at {failed['at']} failed: {failed['cause']}; to try it again: "
            f"hostctl k3d retry {spec['name']}"
        )
    old, new = (_k3s_release(image) for image in (live["image"], spec["image"]))
    if not old or not new:
        return "the tags of both images must name a release of k3s, such as v1.31.5-k3s1"
    major, minor, patch, _ = old
    allowed = (
        f"allowed is v{major}.{minor}.{patch} or newer of v{major}.{minor}, or any "
        f"v{major}.{minor + 1}"
    )
    if new < old:
        return f"k3s does not go back to an older version; {allowed}"
    if (new[0], new[1]) > (major, minor + 1):
        return f"k3s goes up one minor version at a time; {allowed}"
    return None


def _k3s_release(image: str) -> tuple[int, ...] | None:
    found = re.search(r":v(\d+)\.(\d+)\.(\d+)[-+]k3s(\d+)", image)
    return tuple(map(int, found.groups())) if found else None


_BEYOND_RECREATE = ("network.name", "network.subnet", "servers")


def may_recreate(spec: Mapping[str, Any], fixed: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a recreate is confirmed and brings what is declared."""
    return spec["recreate"] == spec["name"] and not _beyond_recreate(fixed)


def _beyond_recreate(fixed: Iterable[Mapping[str, Any]]) -> bool:
    return any(one["key"] in _BEYOND_RECREATE for one in fixed)


def how_to_recreate(name: str, fixed: Iterable[Mapping[str, Any]]) -> str:
    """The way to a new cluster without these differences."""
    if _beyond_recreate(fixed):
        return (
            f"delete the cluster first (cluster.delete set to {name}, up, destroy) and bring it up "
            f"anew, since a recreate changes none of {', '.join(_BEYOND_RECREATE)}"
        )
    return f"make it anew: set cluster.recreate to {name} (it is backed up first)"


def _adjustable(key: str, declared: Any, live: Any, remedy: str) -> dict[str, Any]:
    return {"key": key, "declared": declared, "live": live, "fixed": False, "remedy": remedy}


def plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _joined(arguments: Sequence[str]) -> list[str]:
    return [
        argument.replace(" ", "=", 1) if " " in argument else argument for argument in arguments
    ]


def _sorted_ports(ports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return sorted((dict(port) for port in ports), key=lambda port: json.dumps(port, sort_keys=True))


def _same_image(machine: Machine, declared: str, live: Mapping[str, Any]) -> bool:
    def familiar(reference: str) -> str:
        for prefix in ("docker.io/library/", "docker.io/"):
            if reference.startswith(prefix):
                return reference[len(prefix) :]
        return reference

    if familiar(declared) == familiar(live["image"]):
        return True
    tagged, _, digest = familiar(declared).partition("@")
    live_tagged, _, live_digest = familiar(live["image"]).partition("@")
    (name, tag), (live_name, live_tag) = map(_split_tag, (tagged, live_tagged))
    if name != live_name or (tag and live_tag and tag != live_tag):
        return False
    if digest and live_digest:
        return digest == live_digest
    if not digest:
        return tag == live_tag
    # Created by tag, declared by digest: the same if the image that it runs has that digest.
    argv = ["docker", "image", "inspect", "--format", "{{json .RepoDigests}}", live["image_id"]]
    ran = attempt(machine, argv, "reading the node image's digest")
    return ran.code == 0 and digest in ran.text


def _split_tag(reference: str) -> tuple[str, str]:
    """Name and tag; a colon before a slash is that of a registry's port."""
    name, colon, tag = reference.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (reference, "")


def next_incarnation(
    machine: Machine, record: Mapping[str, Any], state: str, identity: str | None, renew: bool
) -> str:
    """The incarnation: which making of the cluster this is. It moves on when the recorded cluster
    is gone, has another CA, or is about to be made anew (design rule 4)."""
    here = hashlib.sha256(machine.machine_id().encode()).hexdigest()[:8]
    recorded = record.get("incarnation")
    if not recorded:
        return f"{here}-1"
    known = record.get("identity")
    gone = state == "absent" and known is not None and not arriving(record)
    other = identity is not None and known is not None and identity != known
    if gone or other or renew:
        return f"{here}-{int(recorded.split('-')[1]) + 1}"
    return recorded


"""What a recreate cannot change: the network is a resource of its own, not made by hostctl, and
whether k3d makes it instead goes by the number of servers."""
