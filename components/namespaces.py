"""The namespaces of a stack."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pulumi
import pulumi_kubernetes as kubernetes

from components.cluster import Cluster

_PRIVILEGED = {
    f"pod-security.kubernetes.io/{mode}": "privileged" for mode in ("enforce", "audit", "warn")
}


@dataclass(frozen=True)
class NamespacesArgs:
    """``owners`` says of each namespace who makes it: `pulumi`, or `argocd`, then it is only known
    by name. Pods of ``privileged`` ones may do what Pod Security keeps from others.
    """

    owners: Mapping[str, str]
    cluster: Cluster
    privileged: Collection[str] = ()


class Namespaces(pulumi.ComponentResource):
    """The namespaces that the stack owns. One taken out of the settings stays, with all that others
    run in it.
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
            parent=self,
            provider=args.cluster.provider,
            deleted_with=args.cluster.identity,
            retain_on_delete=True,
        )
        self.namespaces = {
            namespace: kubernetes.core.v1.Namespace(
                namespace,
                metadata={"name": namespace, "labels": _PRIVILEGED}
                if namespace in args.privileged
                else {"name": namespace},
                opts=options,
            )
            for namespace, owner in args.owners.items()
            if owner == "pulumi"
        }
        self.names = pulumi.Output.from_input(sorted(args.owners))
        self.register_outputs({"names": self.names})
