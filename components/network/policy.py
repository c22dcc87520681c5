"""NetworkPolicies of the pods that the stack itself runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

_LABELS = {"app.kubernetes.io/managed-by": "pulumi"}


def admit(
    name: str,
    namespace: str,
    pods: Mapping[str, str] | None,
    opts: pulumi.ResourceOptions,
    *,
    anyone: Sequence[int | str] = (),
    cluster: Sequence[int | str] = (),
) -> kubernetes.networking.v1.NetworkPolicy:
    """Lets in to the pods with these labels, or all of the namespace, only what is listed: to TCP
    ports, by number or name, from ``anyone``, or from pods of the ``cluster``. The kubelet's probes
    come in besides: no policy keeps a node from its own pods.

    What goes out is not limited. An origin's Service, an API server and a Git repository have
    addresses that no setting tells, and a wrong guess cuts a service off.
    """
    rules: list[Any] = []
    if anyone:
        rules.append({"ports": _ports(anyone)})
    if cluster:
        rules.append({"from_": [{"namespace_selector": {}}], "ports": _ports(cluster)})
    return kubernetes.networking.v1.NetworkPolicy(
        f"{namespace}/{name}",
        metadata={"name": name, "namespace": namespace, "labels": _LABELS},
        spec={
            "pod_selector": {"match_labels": dict(pods)} if pods else {},
            "policy_types": ["Ingress"],
            "ingress": rules,
        },
        opts=opts,
    )


def _ports(ports: Sequence[int | str]) -> list[Any]:
    return [{"port": port, "protocol": "TCP"} for port in ports]
