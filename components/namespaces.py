"""The namespaces of a stack, and what holds in each."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.network.policy import admit

# Of what the stack makes for a namespace there is one each.
_NAME = "homelab"
_DNS_PORTS = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]


@dataclass(frozen=True)
class NamespacesArgs:
    """``owners`` says of each namespace who makes it: `pulumi`, or `argocd`, then it is only known
    by name. ``declared`` are those of which more is said, ``security`` is the Pod Security of those
    of which it is not. In ``own`` ones only the stack itself has pods.
    """

    owners: Mapping[str, str]
    cluster: Cluster
    declared: Mapping[str, settings.Namespace] = field(default_factory=dict)
    security: Mapping[str, settings.PodSecurity] = field(default_factory=dict)
    own: Collection[str] = ()


class Namespaces(pulumi.ComponentResource):
    """The namespaces that the stack owns, with quota, limits and network policy. One taken out of
    the settings stays, with all that others run in it, and is free of limits.

    What runs in them comes after their limits: a LimitRange changes pods only as they are made.
    """

    namespaces: dict[str, kubernetes.core.v1.Namespace]
    """Those of the stack, by name."""
    names: pulumi.Output[list[str]]
    """All that the settings name, ArgoCD's too."""

    def __init__(
        self, name: str, args: NamespacesArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Namespaces", name, None, opts)
        options = pulumi.ResourceOptions(
            parent=self, provider=args.cluster.provider, deleted_with=args.cluster.identity
        )
        kept = pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(retain_on_delete=True))
        self.namespaces = {}
        for namespace, owner in args.owners.items():
            if owner != "pulumi":
                continue
            declared = args.declared.get(namespace, settings.Namespace())
            security = (
                declared.pod_security or args.security.get(namespace) or settings.PodSecurity()
            )
            self.namespaces[namespace] = made = kubernetes.core.v1.Namespace(
                namespace, metadata={"name": namespace, "labels": security.labels}, opts=kept
            )
            within = pulumi.ResourceOptions.merge(
                options, pulumi.ResourceOptions(depends_on=[made])
            )
            _limit(namespace, declared, within)
            if namespace in args.own:
                admit(_NAME, namespace, None, within)
        self.names = pulumi.Output.from_input(sorted(args.owners))
        self.register_outputs({"names": self.names})


def _limit(namespace: str, declared: settings.Namespace, options: pulumi.ResourceOptions) -> None:
    metadata: kubernetes.meta.v1.ObjectMetaArgsDict = {
        "name": _NAME,
        "namespace": namespace,
        "labels": {"app.kubernetes.io/managed-by": "pulumi"},
    }
    if declared.quota:
        kubernetes.core.v1.ResourceQuota(
            namespace, metadata=metadata, spec={"hard": dict(declared.quota)}, opts=options
        )
    if declared.limits and (items := declared.limits.items()):
        limits: list[Any] = items
        kubernetes.core.v1.LimitRange(
            namespace, metadata=metadata, spec={"limits": limits}, opts=options
        )
    if declared.network_policy:
        kubernetes.networking.v1.NetworkPolicy(
            namespace, metadata=metadata, spec=_rules(declared.network_policy), opts=options
        )


def _rules(
    policy: settings.NetworkPolicy,
) -> "kubernetes.networking.v1.NetworkPolicySpecArgsDict":
    """One policy for all pods: an edit of it leaves no moment in which too much is denied."""
    within: list[Any] = [{"pod_selector": {}}]
    dns: Any = {
        "to": [
            {
                "namespace_selector": {
                    "match_labels": {"kubernetes.io/metadata.name": "kube-system"}
                },
                "pod_selector": {"match_labels": {"k8s-app": "kube-dns"}},
            }
        ],
        "ports": _DNS_PORTS,
    }
    return {
        "pod_selector": {},
        "policy_types": ["Ingress", "Egress"],
        "ingress": [
            *([{"from_": within}] if policy.within else []),
            *(peers.rule("from_") for peers in policy.ingress),
        ],
        "egress": [
            dns,
            *([{"to": within}] if policy.within else []),
            *(peers.rule("to") for peers in policy.egress),
        ],
    }
