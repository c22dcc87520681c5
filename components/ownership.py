"""One owner (design rule 5): what ArgoCD runs, this stack does not."""

from collections.abc import Mapping

import pulumi

from components import settings
from components.host import Reading


def deployment_name(tunnel: str) -> str:
    """The Deployment of an in-cluster connector.

    The incumbent's is called `cloudflared` and belongs to ArgoCD; with another name both can run
    while one hands over to the other.
    """
    return f"cloudflared-{tunnel}"


def refuse_two_owners(
    tunnels: Mapping[str, settings.Tunnel], cluster: str, kubeconfig: str | None = None
) -> Reading[None]:
    """Refuses an in-cluster connector beside one that ArgoCD owns (design rule 5).

    Looks at the Deployment that the connector would have, and at the incumbent's `cloudflared`.
    ``cluster`` is the name of the cluster, which runs; ``kubeconfig`` the text of the way in, where
    it is none of k3d's.
    """
    candidates = [
        (name, tunnel.connector.namespace, deployment)
        for name, tunnel in tunnels.items()
        if tunnel.connector.kind == "cluster"
        for deployment in ("cloudflared", deployment_name(name))
    ]
    common = {"cluster": cluster, "kind": "Deployment", "kubeconfig": kubeconfig}
    owners = yield [
        (["cluster", "owner"], {**common, "namespace": namespace, "name": deployment})
        for _, namespace, deployment in candidates
    ]
    for (name, namespace, deployment), owner in zip(candidates, owners, strict=True):
        if owner["exists"] is None:
            raise pulumi.RunError(
                f"homelab:tunnels.{name}.connector: cannot tell whether ArgoCD owns Deployment"
                f" {namespace}/{deployment}: {owner['detail']}.\n  Remedy: run"
                f" `hostctl k3d ensure {cluster}` on the host until the API answers, or leave"
                " the connector to ArgoCD with connector.kind: external."
            )
        if owner["argocd"]:
            raise pulumi.RunError(
                f"homelab:tunnels.{name}.connector: kind cluster, but Deployment"
                f" {namespace}/{deployment} belongs to ArgoCD application"
                f" {owner['argocd']}.\n  Remedy: hand it over (annotate it"
                " argocd.argoproj.io/sync-options: Prune=false, take it out of the GitOps"
                " repository, sync, remove its argocd.argoproj.io/tracking-id annotation and"
                " app.kubernetes.io/instance label, and delete it after up), or leave it to"
                " ArgoCD with connector.kind: external."
            )
