"""MetalLB in layer 2 mode, with the address pools of the settings."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.network.policy import admit
from components.settings.network import METALLB_NAMESPACE
from components.versions import METALLB

# Longer than a slow node pulls three images.
_INSTALL_SECONDS = 600
_WEBHOOK_SECONDS = 300
# As the chart has them.
_CONTROLLER_LABELS = {
    "app.kubernetes.io/name": "metallb",
    "app.kubernetes.io/component": "controller",
}
_WEBHOOK_PORT = 9443
_METRICS_PORT = 9120
_CONTROL_PLANE = [
    {"key": f"node-role.kubernetes.io/{role}", "operator": "Exists", "effect": "NoSchedule"}
    for role in ("control-plane", "master")
]
_VALUES: dict[str, Any] = {
    # Without these a cluster of control planes alone has nobody who assigns addresses.
    "controller": {"tolerations": _CONTROL_PLANE},
    "speaker": {
        # The chart's name for the same two tolerations: listed once more they would be there twice.
        "tolerateMaster": True,
        # kubeadm labels its control planes exclude-from-external-load-balancers, and the speaker
        # there would run and announce nothing.
        "ignoreExcludeLB": True,
    },
    # BGP alone needs it, and it is on by default.
    "frrk8s": {"enabled": False},
}


@dataclass(frozen=True)
class MetalLBArgs:
    settings: settings.MetalLB
    cluster: Cluster


class MetalLB(pulumi.ComponentResource):
    """MetalLB by its Helm chart, and its pools, which are made only once its webhook answers.

    Until then the API server refuses every pool (metallb issues 1597 and 1669), although all pods
    are ready; the provider tries again only for a kind that is not there yet. So hostctl asks for a
    pool by a dry run until the webhook has answered. It runs again with another chart or other
    values, which restart the webhook.
    """

    def __init__(
        self, name: str, args: MetalLBArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:MetalLB", name, None, opts)
        cluster = args.cluster
        options = pulumi.ResourceOptions(
            parent=self, provider=cluster.provider, deleted_with=cluster.identity
        )
        namespace = kubernetes.core.v1.Namespace(
            METALLB_NAMESPACE,
            metadata={
                "name": METALLB_NAMESPACE,
                # The speaker needs the host's network and NET_RAW, which only `privileged` allows.
                "labels": settings.PodSecurity(enforce="privileged").labels,
            },
            opts=options,
        )
        # Not the speaker, which is in the nodes' network. Its callers are the API servers.
        policy = admit(
            "controller",
            METALLB_NAMESPACE,
            _CONTROLLER_LABELS,
            pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(depends_on=[namespace])),
            anyone=[_WEBHOOK_PORT],
            cluster=[_METRICS_PORT],
        )
        release = kubernetes.helm.v3.Release(
            "metallb",
            name="metallb",
            namespace=METALLB_NAMESPACE,
            chart=METALLB.name,
            version=METALLB.version,
            repository_opts={"repo": METALLB.repository},
            values=_VALUES,
            timeout=_INSTALL_SECONDS,
            opts=pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(depends_on=[policy])),
        )
        answers = cluster.host.command(
            "webhook",
            ["metallb", "wait"],
            {
                "kubeconfig": cluster.kubeconfig,
                "namespace": METALLB_NAMESPACE,
                "seconds": _WEBHOOK_SECONDS,
                "chart": f"{METALLB.version}-{_digest(_VALUES)}",
            },
            triggers=[cluster.incarnation],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[release]),
        )
        after = pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(depends_on=[answers]))
        pools = [
            kubernetes.apiextensions.CustomResource(
                pool.name,
                api_version="metallb.io/v1beta1",
                kind="IPAddressPool",
                metadata={"name": pool.name, "namespace": METALLB_NAMESPACE},
                spec={"addresses": [pool.addresses], "autoAssign": pool.auto_assign},
                opts=after,
            )
            for pool in args.settings.pools
        ]
        spec: dict[str, Any] = {"ipAddressPools": [pool.name for pool in args.settings.pools]}
        if args.settings.interfaces:
            spec["interfaces"] = list(args.settings.interfaces)
        kubernetes.apiextensions.CustomResource(
            "l2-adv",
            api_version="metallb.io/v1beta1",
            kind="L2Advertisement",
            metadata={"name": "l2-adv", "namespace": METALLB_NAMESPACE},
            spec=spec,
            opts=pulumi.ResourceOptions.merge(after, pulumi.ResourceOptions(depends_on=pools)),
        )
        self.register_outputs({})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:8]
