"""Multus, which gives pods more interfaces, and the networks that it attaches them to."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.settings import Lan
from components.versions import BUSYBOX, MULTUS

_NAMESPACE = "kube-system"
_GROUP = "k8s.cni.cncf.io"
_KIND = "NetworkAttachmentDefinition"
_PLUGINS = "/opt/cni/plugins"
# eth0 is Docker's bridge. The second network of a node is always its eth1.
_LAN_IN_NODE = "eth1"
# Of the specification, which all plugins speak; not of a program.
CNI_VERSION = "0.3.1"
# Where containerd looks, by pod network. k3s's own place is the same in all releases since
# v1.31.2+k3s1 (docs.k3s.io/networking/multus-ipams); without flannel it is containerd's default.
_K3S = "/var/lib/rancher/k3s"
_DIRECTORIES = {
    "flannel": (f"{_K3S}/data/cni", f"{_K3S}/agent/etc/cni/net.d"),
    "calico": ("/opt/cni/bin", "/etc/cni/net.d"),
}
# On a node that is not ready yet, too: its pods wait for it.
_TOLERATIONS = [{"operator": "Exists", "effect": effect} for effect in ("NoSchedule", "NoExecute")]
_DHCP = "mkdir -p /run/cni && rm -f /run/cni/dhcp.sock && exec /opt/cni/plugins/dhcp daemon"


@dataclass(frozen=True)
class MultusArgs:
    settings: settings.Multus
    lan: Lan
    cni: str
    """The pod network that Multus adds to: flannel or calico."""
    cluster: Cluster
    after: Sequence[pulumi.Resource] = ()
    """The namespaces of the networks."""


class Multus(pulumi.ComponentResource):
    """The thin Multus on every node of a k3d cluster, and a NetworkAttachmentDefinition a network.

    It is the project's own deployment (multus-cni, deployments/multus-daemonset.yml) with k3s's
    directories. The plugins for more interfaces are those of the host, which every node has
    mounted (`homelab:cluster.cniPlugins`). A pod gets its further interfaces when it starts: one
    that started before Multus must be started again.
    """

    def __init__(
        self, name: str, args: MultusArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Multus", name, None, opts)
        cluster = args.cluster
        options = pulumi.ResourceOptions(
            parent=self, provider=cluster.provider, deleted_with=cluster.identity
        )

        def after(*resources: pulumi.Resource) -> pulumi.ResourceOptions:
            needs = pulumi.ResourceOptions(depends_on=list(resources))
            return pulumi.ResourceOptions.merge(options, needs)

        definition = kubernetes.apiextensions.v1.CustomResourceDefinition(
            "network-attachment-definitions",
            metadata={"name": f"network-attachment-definitions.{_GROUP}"},
            spec=_DEFINITION,
            opts=options,
        )
        access = _access(options)
        daemon = kubernetes.apps.v1.DaemonSet(
            "multus",
            metadata={"name": "multus", "namespace": _NAMESPACE},
            spec=_daemon("multus", _pod(args.cni)),
            opts=after(definition, *access),
        )
        needs: list[pulumi.Resource] = [daemon, *args.after]
        if any(network.ipam.type == "dhcp" for network in args.settings.networks):
            needs.append(
                kubernetes.apps.v1.DaemonSet(
                    "cni-dhcp",
                    metadata={"name": "cni-dhcp", "namespace": _NAMESPACE},
                    spec=_daemon("cni-dhcp", _dhcp_pod()),
                    opts=options,
                )
            )
        for network in args.settings.networks:
            kubernetes.apiextensions.CustomResource(
                f"{network.namespace}/{network.name}",
                api_version=f"{_GROUP}/v1",
                kind=_KIND,
                metadata={"name": network.name, "namespace": network.namespace},
                spec={"config": json.dumps(_config(network, args.lan), indent=2)},
                opts=after(*needs),
            )
        self.register_outputs({})


def _config(network: settings.Attachment, lan: settings.Lan) -> dict[str, Any]:
    """The CNI configuration, without routes: a pod's default route stays the cluster's."""
    config: dict[str, Any] = {"cniVersion": CNI_VERSION, "name": network.name}
    subnet = network.subnet or lan.subnet
    if network.type == "macvlan":
        config |= {"type": "macvlan", "master": _LAN_IN_NODE, "mode": "bridge"}
    else:
        # A bridge's name has 15 characters at most, and two namespaces may have the same network.
        config |= {"type": "bridge", "bridge": f"mul{_short(network)}"}
    ipam: dict[str, Any] = {"type": network.ipam.type}
    if network.ipam.type == "host-local":
        span: dict[str, Any] = {"subnet": subnet}
        assert network.ipam.range is not None
        first, _, last = network.ipam.range.partition("-")
        if last:
            span |= {"rangeStart": first, "rangeEnd": last}
        else:
            ends = ip_network(first)
            span |= {"rangeStart": str(ends[0]), "rangeEnd": str(ends[-1])}
        ipam["ranges"] = [[span]]
    elif network.ipam.type == "static":
        # The address comes with the pod: annotation k8s.v1.cni.cncf.io/networks, key `ips`.
        config["capabilities"] = {"ips": True}
    return {**config, "ipam": ipam}


def _short(network: settings.Attachment) -> str:
    name = f"{network.namespace}/{network.name}"
    return hashlib.sha256(name.encode()).hexdigest()[:12]


def _access(options: pulumi.ResourceOptions) -> list[pulumi.Resource]:
    """What Multus may do: read pods and networks, and write into a pod what it got."""
    account = kubernetes.core.v1.ServiceAccount(
        "multus", metadata={"name": "multus", "namespace": _NAMESPACE}, opts=options
    )
    role = kubernetes.rbac.v1.ClusterRole(
        "multus",
        metadata={"name": "multus"},
        rules=[
            {"api_groups": [_GROUP], "resources": ["*"], "verbs": ["get", "list", "watch"]},
            {
                "api_groups": [""],
                "resources": ["pods", "pods/status"],
                "verbs": ["get", "list", "update", "watch"],
            },
            {
                "api_groups": ["", "events.k8s.io"],
                "resources": ["events"],
                "verbs": ["create", "patch", "update"],
            },
        ],
        opts=options,
    )
    binding = kubernetes.rbac.v1.ClusterRoleBinding(
        "multus",
        metadata={"name": "multus"},
        role_ref={
            "api_group": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": "multus",
        },
        subjects=[{"kind": "ServiceAccount", "name": "multus", "namespace": _NAMESPACE}],
        opts=pulumi.ResourceOptions.merge(
            options, pulumi.ResourceOptions(depends_on=[account, role])
        ),
    )
    return [account, role, binding]


def _daemon(name: str, pod: dict[str, Any]) -> Any:
    labels = {"app.kubernetes.io/name": name}
    return {
        "selector": {"match_labels": labels},
        "template": {"metadata": {"labels": labels}, "spec": {"tolerations": _TOLERATIONS, **pod}},
    }


def _pod(cni: str) -> dict[str, Any]:
    programs, configs = _DIRECTORIES[cni]
    mounts = [
        {"name": "programs", "mount_path": "/host/opt/cni/bin"},
        {"name": "configs", "mount_path": "/host/etc/cni/net.d"},
    ]
    return {
        "host_network": True,
        "service_account_name": "multus",
        "init_containers": [
            {
                "name": "install",
                "image": MULTUS,
                "command": ["/install_multus", "--type=thin"],
                "resources": {"requests": {"cpu": "10m", "memory": "15Mi"}},
                "security_context": {"privileged": True},
                "volume_mounts": mounts[:1],
            }
        ],
        "containers": [
            {
                "name": "multus",
                "image": MULTUS,
                "command": ["/thin_entrypoint"],
                "args": [
                    "--multus-conf-file=auto",
                    f"--multus-kubeconfig-file-host={configs}/multus.d/multus.kubeconfig",
                    f"--additional-bin-dir={_PLUGINS}",
                ],
                "resources": {
                    "requests": {"cpu": "10m", "memory": "50Mi"},
                    "limits": {"memory": "100Mi"},
                },
                "security_context": {"privileged": True},
                "volume_mounts": mounts,
            }
        ],
        "volumes": [
            {"name": "programs", "host_path": {"path": programs}},
            {"name": "configs", "host_path": {"path": configs, "type": "DirectoryOrCreate"}},
        ],
    }


def _dhcp_pod() -> dict[str, Any]:
    """The daemon that keeps leases. It runs in the node's own namespaces, since a pod sees network
    namespaces that come later only through mounts that k3d's nodes do not share.
    """
    return {
        "host_network": True,
        "host_pid": True,
        "automount_service_account_token": False,
        "containers": [
            {
                "name": "dhcp",
                "image": BUSYBOX,
                "command": ["nsenter", "--target=1", "--mount", "--net", "--", "sh", "-c", _DHCP],
                "resources": {
                    "requests": {"cpu": "10m", "memory": "20Mi"},
                    "limits": {"memory": "50Mi"},
                },
                "security_context": {"privileged": True},
            }
        ],
    }


# As the Network Plumbing Working Group defines it (multi-net-spec).
_DEFINITION: Any = {
    "group": _GROUP,
    "scope": "Namespaced",
    "names": {
        "plural": "network-attachment-definitions",
        "singular": "network-attachment-definition",
        "kind": _KIND,
        "short_names": ["nad", "net-attach-def"],
    },
    "versions": [
        {
            "name": "v1",
            "served": True,
            "storage": True,
            "schema": {
                "open_apiv3_schema": {
                    "type": "object",
                    "properties": {
                        "apiVersion": {"type": "string"},
                        "kind": {"type": "string"},
                        "metadata": {"type": "object"},
                        "spec": {
                            "type": "object",
                            "properties": {"config": {"type": "string"}},
                        },
                    },
                }
            },
        }
    ],
}
