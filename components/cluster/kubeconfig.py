"""The kubeconfig of a cluster: the file on its host, the secret output, and the kubernetes Provider
made from it.
"""

from dataclasses import dataclass

import pulumi
import pulumi_kubernetes as kubernetes
import yaml

from components import settings
from components.cluster import kubernetes_provider
from components.cluster.k3d import K3dCluster, LiveCluster, server_url
from components.host import Host, result


@dataclass(frozen=True)
class KubeconfigArgs:
    settings: settings.K3dCluster
    live: LiveCluster
    host: Host
    cluster: K3dCluster


class Kubeconfig(pulumi.ComponentResource):
    """Reads the kubeconfig out of the cluster, writes it on the host (0640 root:wheel in a 0750
    directory, atomically), and makes the Provider for what lives in the cluster.

    A Command of its own, since its result must stay known while the cluster's is not: no edit of
    the cluster touches it. The Provider is tied to the cluster's identity: a rotated certificate
    updates it in place, another cluster replaces it and all it holds.
    """

    content: pulumi.Output[str]
    """The kubeconfig as YAML text; secret."""
    path: pulumi.Output[str]
    """Of the file on the host."""
    provider: kubernetes.Provider

    def __init__(
        self, name: str, args: KubeconfigArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Kubeconfig", name, None, opts)
        file = args.settings.kubeconfig
        command = args.host.command(
            "kubeconfig",
            ["kubeconfig"],
            {
                "cluster": args.settings.name,
                "path": file.path,
                "owner": file.owner,
                "group": file.group,
                "mode": file.mode,
                "directory_mode": file.directory_mode,
                "server": server_url(args.settings),
                "generation": args.live.certificate_generation,
            },
            secret=True,
            triggers=[args.live.incarnation],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[args.cluster.identity]),
        )
        # A preview does not know what a changed command will print. Of a rotated certificate it is
        # told beforehand, or the engine could not ask about anything that lives in the cluster.
        content = args.live.kubeconfig or result(command).apply(lambda seen: seen["kubeconfig"])
        self.content = pulumi.Output.secret(content).apply(_checked)
        self.path = pulumi.Output.from_input(file.path)
        self.provider = kubernetes_provider(
            self.content,
            args.cluster.fingerprint,
            sleeping=args.live.state in ("stopped", "imported"),
            opts=pulumi.ResourceOptions(parent=self, depends_on=[command]),
        )
        self.register_outputs({"path": self.path, "content": self.content})


def _checked(kubeconfig: str) -> str:
    """Refuses a kubeconfig without a cluster: the provider would silently take the ambient
    ~/.kube/config, another cluster.
    """
    clusters = (yaml.safe_load(kubeconfig) or {}).get("clusters")
    if not clusters:
        raise pulumi.RunError(
            "hostctl returned a kubeconfig without a cluster. Remedy: run `hostctl kubeconfig"
            " CLUSTER` on the host and read what it prints."
        )
    return kubeconfig
