"""Calico as the pod network, in place of k3s's flannel and network policy controller."""

from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.versions import CALICO

NAMESPACE = "tigera-operator"
_INSTALL_SECONDS = 600


@dataclass(frozen=True)
class CalicoArgs:
    pod_subnet: str
    """The range that k3s was told, `homelab:cluster.podSubnet`."""
    cluster: Cluster


class Calico(pulumi.ComponentResource):
    """Calico by its operator's Helm chart. The cluster must be made without flannel, as
    `homelab:cluster.cni: calico` does.

    The operator runs in the nodes' own network and tolerates nodes that are not ready, so it
    comes up where nothing else does; the nodes are ready once it has brought up calico-node.
    """

    def __init__(
        self, name: str, args: CalicoArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Calico", name, None, opts)
        cluster = args.cluster
        options = pulumi.ResourceOptions(
            parent=self, provider=cluster.provider, deleted_with=cluster.identity
        )
        namespace = kubernetes.core.v1.Namespace(
            NAMESPACE,
            # The operator is in the nodes' network, which only `privileged` allows. It labels what
            # it makes, calico-system and others, itself.
            metadata={
                "name": NAMESPACE,
                "labels": settings.PodSecurity(enforce="privileged").labels,
            },
            opts=options,
        )
        kubernetes.helm.v3.Release(
            "calico",
            name="calico",
            namespace=NAMESPACE,
            chart=CALICO.name,
            version=CALICO.version,
            repository_opts={"repo": CALICO.repository},
            values=_values(args.pod_subnet),
            timeout=_INSTALL_SECONDS,
            opts=pulumi.ResourceOptions.merge(
                options, pulumi.ResourceOptions(depends_on=[namespace])
            ),
        )
        self.register_outputs({})


def _values(pod_subnet: str) -> dict[str, Any]:
    return {
        "installation": {
            "enabled": True,
            "cni": {"type": "Calico"},
            "calicoNetwork": {
                # One Docker network: nothing to announce routes to.
                "bgp": "Disabled",
                "ipPools": [
                    {
                        # Calico's own default, 192.168.0.0/16, swallows most home LANs.
                        "cidr": pod_subnet,
                        "encapsulation": "VXLAN",
                        "natOutgoing": "Enabled",
                        "nodeSelector": "all()",
                    }
                ],
                # Pods that forward, such as ServiceLB's, stand still without it: k3s and k3d ask
                # for it (docs.k3s.io/networking/basic-network-options).
                "containerIPForwarding": "Enabled",
            },
            # Volumes of FlexVolume and CSI need mounts shared with the host, which k3d's nodes
            # have not; nothing uses them.
            "flexVolumePath": "None",
        },
        "kubeletVolumePluginPath": "None",
        # Calico's own API and the observability parts: kubectl and NetworkPolicies need neither.
        "apiServer": {"enabled": False},
        "goldmane": {"enabled": False},
        "whisker": {"enabled": False},
    }
