"""ArgoCD, bootstrapped from a Git repository: `kubectl apply -k repository//path?ref=commit`,
server-side, on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pulumi

import homelab
from components import settings
from components.cluster import Cluster
from components.host import Reading, ask


@dataclass(frozen=True)
class Revision:
    """The commit to apply: None when none was ever applied and none can be had now."""

    commit: str | None

    @classmethod
    def read(cls, argocd: settings.ArgoCD | None, cluster: str) -> "Reading[Revision | None]":
        """Asks the repository, from the host, for the commit that ``ref`` points to now, and says
        from what to what a run would move. None without ArgoCD.

        A repository that cannot be reached, or has no such ref, is a warning: what is applied stays
        and the cluster stays up. Raises HostError when git or kubectl is missing on the host or too
        old.
        """
        if argocd is None:
            return None
        answer = yield from ask(
            ["argocd", "resolve"],
            {
                "cluster": cluster,
                "repository": argocd.repository,
                "ref": argocd.ref,
                "path": argocd.path,
                "commit": argocd.commit,
            },
        )
        applied = (answer["applied"] or {}).get("commit")
        if answer["state"] != "resolved":
            kept = f"commit {applied} stays applied" if applied else "nothing is applied"
            pulumi.log.warn(
                f"ArgoCD bootstrap: {argocd.repository} at {argocd.ref}: {answer['detail']};"
                f" {kept}. Remedy: create or reach the repository and run up again."
            )
            return cls(applied)
        if applied != answer["commit"]:
            source = "homelab:argocd.commit" if argocd.commit else argocd.ref
            pulumi.log.info(
                f"ArgoCD bootstrap: {source} moves from {applied or 'nothing'}"
                f" to {answer['commit']}"
            )
        return cls(answer["commit"])


@dataclass(frozen=True)
class ArgoCDArgs:
    settings: settings.ArgoCD
    revision: Revision
    cluster: Cluster
    after: Sequence[pulumi.Resource]
    """What the bootstrapped workloads need: namespaces and Secrets."""


class ArgoCD(pulumi.ComponentResource):
    """Applies the bootstrap kustomization and leaves the rest to ArgoCD.

    It never deletes what an earlier commit applied, on no edit and on no destroy: those objects are
    ArgoCD's (design rule 5). The commit is an input, so a preview shows the move, and a saved plan
    refuses any other commit than the one previewed. After the ref has moved on, `up --plan` applies
    that one when ``homelab:argocd.commit`` names it; no plan tells the program what it holds.
    """

    output: pulumi.Output[homelab.ArgoCD]
    """As consumers of the stack read it."""

    def __init__(
        self, name: str, args: ArgoCDArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:ArgoCD", name, None, opts)
        argocd = args.settings
        if args.revision.commit:
            args.cluster.host.command(
                "bootstrap",
                ["argocd", "apply"],
                {
                    "cluster": args.cluster.name,
                    "kubeconfig": args.cluster.kubeconfig,
                    "repository": argocd.repository,
                    "path": argocd.path,
                    "commit": args.revision.commit,
                    "namespace": argocd.namespace,
                },
                triggers=[args.cluster.incarnation],
                opts=pulumi.ResourceOptions(
                    parent=self, depends_on=[args.cluster.provider, *args.after]
                ),
            )
        self.output = pulumi.Output.from_input(
            {
                "repository": argocd.repository,
                "ref": argocd.ref,
                "commit": args.revision.commit,
                "url": argocd.url,
            }
        )
        self.register_outputs({"output": self.output})
