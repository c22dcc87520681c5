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
