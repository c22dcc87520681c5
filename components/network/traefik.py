"""Traefik as the LAN's ingress, on a fixed address that MetalLB announces."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.network.policy import admit
from components.settings.network import TRAEFIK_NAMESPACE
from components.versions import BUSYBOX, TRAEFIK

_USER = 65532
_INSTALL_SECONDS = 600
_DATA = "/data"
_ACME = f"{_DATA}/acme.json"
_LABELS = {"app.kubernetes.io/name": "traefik", "app.kubernetes.io/instance": "traefik"}
_OWN_DATA = f"chown -R {_USER}:{_USER} {_DATA} && if [ -e {_ACME} ]; then chmod 600 {_ACME}; fi"


@dataclass(frozen=True)
class TraefikArgs:
    settings: settings.Traefik
    cluster: Cluster
    after: Sequence[pulumi.Resource]
    """What gives it its address: MetalLB with its pools."""


class Traefik(pulumi.ComponentResource):
    """Traefik by its Helm chart: one pod of user 65532, on any node, in the pods' own network.

    Its volume is mounted by one node at a time, so the old pod goes before the new one comes
    (Recreate): the chart's own RollingUpdate starts the new one first, which waits for ever for the
    volume (Multi-Attach error). The volume's claim outlives the release: the chart keeps it.

    The Service is the stack's and not the chart's. Helm would wait for its address without a word;
    this way the wait, and what it waits for, are shown, and the address is an output.
    """

    address: pulumi.Output[str]
    """Where the ingress is reached, as MetalLB assigned it."""

    def __init__(
        self, name: str, args: TraefikArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Traefik", name, None, opts)
        cluster = args.cluster
        options = pulumi.ResourceOptions(
            parent=self, provider=cluster.provider, deleted_with=cluster.identity
        )
        namespace = kubernetes.core.v1.Namespace(
            TRAEFIK_NAMESPACE,
            metadata={
                "name": TRAEFIK_NAMESPACE,
                # `restricted` would refuse the init container, which must be root to give files
                # away.
                "labels": settings.PodSecurity(enforce="baseline").labels,
            },
            opts=options,
        )
        policy = admit(
            "traefik",
            TRAEFIK_NAMESPACE,
            None,
            pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(depends_on=[namespace])),
            anyone=["web", "websecure"],
            cluster=["metrics"],
        )
        release = kubernetes.helm.v3.Release(
            "traefik",
            name="traefik",
            namespace=TRAEFIK_NAMESPACE,
            chart=TRAEFIK.name,
            version=TRAEFIK.version,
            repository_opts={"repo": TRAEFIK.repository},
            values=_values(args.settings),
            timeout=_INSTALL_SECONDS,
            opts=pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(depends_on=[policy])),
        )
        service = kubernetes.core.v1.Service(
            "traefik",
            metadata={
                "name": "traefik",
                "namespace": TRAEFIK_NAMESPACE,
                "labels": _LABELS,
                "annotations": {"metallb.io/loadBalancerIPs": args.settings.address},
            },
            spec={
                "type": "LoadBalancer",
                "selector": _LABELS,
                "ports": [
                    {"name": "web", "port": 80, "target_port": "web"},
                    {"name": "websecure", "port": 443, "target_port": "websecure"},
                ],
            },
            opts=pulumi.ResourceOptions.merge(
                options, pulumi.ResourceOptions(depends_on=[release, *args.after])
            ),
        )
        self.address = service.status.apply(_assigned)
        self.register_outputs({"address": self.address})


def _assigned(status: Any) -> str:
    """The address in a Service's status. There is one, or the Service is not ready."""
    return status.load_balancer.ingress[0].ip


def _values(traefik: settings.Traefik) -> dict[str, Any]:
    """The chart's values; its schema refuses a key that it does not know."""
    values: dict[str, Any] = {
        "hostNetwork": False,
        "instanceLabelOverride": _LABELS["app.kubernetes.io/instance"],
        "updateStrategy": {"type": "Recreate"},
        "service": {"enabled": False},
        "providers": {
            # Ingresses then show the address of the Service below.
            "kubernetesIngress": {
                "publishedService": {
                    "enabled": True,
                    "pathOverride": f"{TRAEFIK_NAMESPACE}/traefik",
                }
            }
        },
        "podSecurityContext": {
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "runAsNonRoot": True,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "deployment": {"replicas": 1, "initContainers": [_volume_permissions()]},
        "persistence": {
            "enabled": True,
            "name": "data",
            "accessMode": "ReadWriteOnce",
            "size": traefik.volume_size,
            "path": _DATA,
        },
    }
    if traefik.storage_class:
        values["persistence"]["storageClass"] = traefik.storage_class
    if traefik.acme:
        challenge = {
            "tls": {"tlsChallenge": True},
            "http": {"httpChallenge": {"entryPoint": "web"}},
        }[traefik.acme.challenge]
        acme = {"email": traefik.acme.email, "storage": _ACME, **challenge}
        values["certificatesResolvers"] = {"letsencrypt": {"acme": acme}}
    return values


def _volume_permissions() -> dict[str, Any]:
    """Gives the volume to Traefik's user. fsGroup often leaves files alone that are there already,
    such as an acme.json that a former Traefik wrote as root. A chown that fails fails the pod.
    """
    return {
        "name": "volume-permissions",
        "image": BUSYBOX,
        "command": ["sh", "-c", _OWN_DATA],
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "runAsNonRoot": False,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], "add": ["CHOWN", "DAC_OVERRIDE", "FOWNER"]},
        },
        "volumeMounts": [{"name": "data", "mountPath": _DATA}],
    }
