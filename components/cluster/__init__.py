"""The cluster of a stack and the way into it."""

from dataclasses import dataclass

import pulumi
import pulumi_kubernetes as kubernetes

from components.host import Host


@dataclass(frozen=True)
class Cluster:
    """A cluster as the components in it see it, however it was made."""

    name: str
    provider: kubernetes.Provider
    identity: pulumi.CustomResource | None
    """What lives in the cluster is `deleted_with` this; it is replaced exactly when the cluster is
    another one. None for a cluster that outlives the stack.
    """
    kubeconfig: pulumi.Input[str]
    """Path of the kubeconfig on the host, for what hostctl does in the cluster."""
    host: Host
    incarnation: str
    """Trigger of the Commands that must run anew in another cluster. Known in every preview, as the
    id of ``identity`` is not: the provider foretells a random one, which no saved plan survives.
    """
    anew: bool = False
    """Whether this run makes the cluster, for the first time or once more."""


def kubernetes_provider(
    kubeconfig: pulumi.Input[str],
    identity: pulumi.Input[str] | None,
    *,
    sleeping: bool,
    opts: pulumi.ResourceOptions,
) -> kubernetes.Provider:
    """The Provider of a cluster's objects.

    identity: what its objects are replaced with when it is another.
    sleeping: the cluster is there, and this run cannot reach it before it is started.
    """
    return kubernetes.Provider(
        "kubernetes",
        kubeconfig=kubeconfig,
        cluster_identifier=identity,
        enable_server_side_apply=True,
        # What another owner has never comes to an apply (components/ownership.py). Left are fields
        # that a person edited, or a former owner: they would refuse it as a conflict.
        enable_patch_force=True,
        # Without these every changed Secret or ConfigMap is replaced.
        enable_secret_mutable=True,
        enable_config_map_mutable=True,
        # Objects out of reach are never forgotten. A refresh, which reads with the provider in the
        # state, keeps what is known of a sleeping cluster. The provider of a preview must not skip:
        # its Check would hide every edit (pulumi-kubernetes, provider.go).
        delete_unreachable=False,
        skip_update_unreachable=not (sleeping and pulumi.runtime.is_dry_run()),
        opts=opts,
    )
