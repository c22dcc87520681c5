"""Tailscale in the cluster: the operator, and a word on the sidecars that it replaces.

The Secrets with the auth key are declared like any other (see components/secrets.py).
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.network.policy import admit
from components.settings.tailscale import NAMESPACE
from components.versions import TAILSCALE_OPERATOR

# The chart reads this name when it is given no credentials; given some, they would lie in the
# release's values.
_CREDENTIALS = "operator-oauth"
# Of the operator's own pod, as the chart has it.
_LABELS = {"app": "operator"}


def warn_of_sidecars(tailscale: settings.Tailscale) -> None:
    """Says that copies of the auth key serve sidecars, which are deprecated (incident 13)."""
    if tailscale.auth_key and tailscale.copies:
        pulumi.log.warn(
            f"homelab:tailscale.copies: {', '.join(tailscale.copies)}: Tailscale sidecars are"
            " deprecated: a restarted pod comes back under another name, and the auth key expires"
            " after at most 90 days. Remedy: expose the service by a tunnel (homelab:tunnels) or by"
            " the operator (homelab:tailscale.operator), then set copies: []."
        )


@dataclass(frozen=True)
class TailscaleOperatorArgs:
    settings: settings.Operator
    cluster: Cluster
    after: Sequence[pulumi.Resource] = ()
    """What it needs first: namespace `tailscale`."""


class TailscaleOperator(pulumi.ComponentResource):
    """The Tailscale operator by its Helm chart, with an OAuth client: it takes no auth key.

    A helm.v3.Release, which fetches its chart in every preview. It is deleted with the cluster:
    once that is gone, it cannot be deleted on its own (pulumi-kubernetes 2675).
    """

    def __init__(
        self, name: str, args: TailscaleOperatorArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:TailscaleOperator", name, None, opts)
        operator = args.settings
        client = {
            "client_id": operator.client_id.get_secret_value(),
            "client_secret": operator.client_secret.get_secret_value(),
        }
        options = pulumi.ResourceOptions(
            parent=self,
            provider=args.cluster.provider,
            deleted_with=args.cluster.identity,
            depends_on=list(args.after),
        )
        credentials = kubernetes.core.v1.Secret(
            f"{NAMESPACE}/{_CREDENTIALS}",
            metadata={
                "name": _CREDENTIALS,
                "namespace": NAMESPACE,
                "labels": {"app.kubernetes.io/managed-by": "pulumi"},
            },
            data=pulumi.Output.secret(
                {key: base64.b64encode(value.encode()).decode() for key, value in client.items()}
            ),
            opts=options,
        )
        values: dict[str, Any] = {
            # The operator reads its credentials once, so new ones must roll it.
            "podAnnotations": {"checksum/oauth": _digest(client)}
        }
        if operator.hostname:
            values["hostname"] = operator.hostname
        # Its proxies take what the tailnet and the cluster send them; nobody calls the operator.
        policy = admit("operator", NAMESPACE, _LABELS, options)
        kubernetes.helm.v3.Release(
            "tailscale-operator",
            name="tailscale-operator",
            namespace=NAMESPACE,
            chart=TAILSCALE_OPERATOR.name,
            version=operator.version,
            repository_opts={"repo": TAILSCALE_OPERATOR.repository},
            values={"operatorConfig": values},
            opts=pulumi.ResourceOptions.merge(
                options, pulumi.ResourceOptions(depends_on=[credentials, policy])
            ),
        )
        self.register_outputs({})


def _digest(client: dict[str, str]) -> str:
    """Tells one OAuth client from another.

    Not secret: 64 bits of a hash over a generated secret lead back to nothing.
    """
    return hashlib.sha256(json.dumps(client, sort_keys=True).encode()).hexdigest()[:16]
