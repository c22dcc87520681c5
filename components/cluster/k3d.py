"""A k3d cluster: its network by the docker provider, the cluster itself by hostctl on the host."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import Any

import pulumi
import pulumi_docker as docker
from pulumi_command import local

import homelab
from components import settings
from components.host import Host, HostError, Reading, ask, result
from components.ownership import NOT_SEEN
from components.settings import Network

# Pulling an image or opening an 11 GB datastore (incident 4) may take this much longer than the
# wait for the API.
_SLACK_SECONDS = 900
# The ceiling of the backup before a recreate or a node swap; it reports its progress.
_BACKUP_SECONDS = 24 * 3600

ADOPTING = "HOMELAB_ADOPTING"
"""The environment variable that lets a preview ask for the kubeconfig of a cluster that runs and
that the state does not know yet: without it `make adopt` could look for nothing that lives there.
"""


@dataclass(frozen=True)
class LiveCluster:
    """What `hostctl k3d inspect` saw: facts of this moment, read before anything is registered.

    ``state`` is absent, running, stopped, or imported: moved here and not up yet. The generations
    and ``incarnation`` stand still while the host agrees with the settings, so that
    healing once leaves nothing to do (design rule 3); that of the acceptance moves on until one is
    passed. ``identity`` is what the cluster's CA says. ``acceptance`` is the last one: its state,
    detail and remedy. ``warnings`` have what and remedy.
    """

    state: str
    identity: str | None
    generation: int
    incarnation: str
    certificate_generation: int
    image_files: list[dict[str, str]] = field(default_factory=list)
    """Path and digest of each of ``homelab:cluster.imageFiles``."""
    acceptance_generation: int = 1
    acceptance: dict[str, str] | None = None
    differences: list[dict[str, Any]] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)
    kubeconfig: str | None = field(default=None, repr=False)
    """What up will write, in the preview that finds another certificate in a running cluster."""

    @classmethod
    def read(
        cls,
        cluster: settings.K3dCluster,
        *,
        network: settings.Network | None = None,
        installs_k3d: bool = False,
    ) -> "Reading[LiveCluster]":
        """Asks the host. Raises HostError when it cannot tell (Docker not answering, half a
        cluster, another maker's cluster), or when a difference cannot be applied to the live
        cluster and no recreate is confirmed (incident 6). ``installs_k3d``: up installs it before
        it is needed.
        """
        spec = {**cluster_spec(cluster, network), "installs_k3d": installs_k3d}
        seen = (yield from ask(["k3d", "inspect"], spec))["cluster"]
        live = cls(
            state=seen["state"],
            identity=seen["identity"],
            generation=seen["generation"],
            incarnation=seen["incarnation"],
            certificate_generation=seen["certificate_generation"],
            acceptance_generation=seen["acceptance_generation"],
            acceptance=seen["acceptance"],
            differences=seen["differences"],
            unseen=seen["unseen"],
            warnings=seen["warnings"],
            kubeconfig=(yield from _rotated_kubeconfig(cluster, seen)),
        )
        live.refuse_fixed_differences(cluster)
        if cluster.image_files:
            seen = yield from ask(["images", "digest"], {"files": list(cluster.image_files)})
            live = replace(live, image_files=seen["files"])
        return live

    @property
    def anew(self) -> bool:
        """Whether up makes the cluster: it is absent, or a confirmed recreate is left to do."""
        return self.state == "absent" or any(one["fixed"] for one in self.differences)

    @property
    def swaps(self) -> bool:
        """Whether up swaps the node for one of another image, or finishes that."""
        return any(one["key"] in ("image", "swap") for one in self.differences)

    def refuse_fixed_differences(self, cluster: settings.K3dCluster) -> None:
        fixed = [difference for difference in self.differences if difference["fixed"]]
        # The network is a resource of its own, with the live nodes in it: no recreate changes it.
        rooted = [one for one in fixed if one["key"].startswith(("network.", "servers"))]
        if not fixed or (cluster.recreate == cluster.name and not rooted):
            return
        anew = (
            "delete the cluster first (homelab:cluster.delete, `pulumi up`, `pulumi destroy`) and"
            " bring it up anew"
            if rooted
            else f"confirm a recreate with homelab:cluster.recreate: {cluster.name} (it makes and"
            " verifies a backup first)"
        )
        lines = [
            f"  homelab:cluster.{difference['key']}: declared {difference['declared']},"
            f" live {difference['live']}"
            + (f"; {difference['why']}" if "why" in difference else "")
            for difference in fixed
        ]
        raise HostError(
            f"cluster {cluster.name}: {len(fixed)} setting(s) differ from the live cluster"
            " and are fixed when it is created:\n"
            + "\n".join(lines)
            + "\n  Remedy: write the live value into the stack file to keep the cluster as it is,"
            f" or {anew}."
        )

    def announce(self, cluster: settings.K3dCluster, host: str) -> None:
        """Says in the preview what up will do to the cluster, and what could not be seen."""
        for warning in self.warnings:
            pulumi.log.warn(f"{warning['what']}. Remedy: {warning['remedy']}")
        if self.state == "absent":
            pulumi.log.info(f"cluster {cluster.name} does not exist on {host}: up creates it")
            return
        if self.state == "imported":
            pulumi.log.warn(
                f"cluster {cluster.name} was imported on {host} and is not up yet: up brings it up"
                f" as {self.identity}. Until then {NOT_SEEN}. Its connectors wait for `hostctl move"
                f" cutover {cluster.name}`"
            )
        elif self.state == "stopped":
            pulumi.log.warn(
                f"cluster {cluster.name} on {host} is stopped: up starts it. Until then {NOT_SEEN}."
                " After `up --refresh` run up once more: edits of objects wait for a run that"
                " begins with the cluster up"
            )
        for difference in self.differences:
            # One that is fixed and was not refused is to be recreated.
            anew = "up backs the cluster up, deletes it and makes it anew"
            remedy = anew if difference["fixed"] else difference["remedy"]
            pulumi.log.warn(
                f"cluster {cluster.name}: {difference['key']} is {difference['live']}, declared"
                f" {difference['declared']}: {remedy}"
            )
        if self.acceptance and self.acceptance["state"] != "passed":
            pulumi.log.warn(
                f"cluster {cluster.name}: not accepted when it was last changed:"
                f" {self.acceptance['detail']}: up tries again"
            )
        for unseen in self.unseen:
            pulumi.log.warn(f"cluster {cluster.name}: not seen: {unseen}")


def cluster_spec(
    cluster: settings.K3dCluster, network: settings.Network | None = None
) -> dict[str, Any]:
    """The settings as `hostctl k3d inspect` and `ensure` take them."""
    multus = network and network.multus
    moved = {"moved_from": cluster.moved_from} if cluster.moved_from else {}
    return {
        **moved,
        "name": cluster.name,
        "image": cluster.image,
        "servers": cluster.servers,
        "agents": cluster.agents,
        "disable": list(cluster.disable),
        "api": {
            "bind": cluster.api.bind,
            "port": cluster.api.port,
            "server_name": cluster.api.server_name,
        },
        "resolvers": list(cluster.resolvers),
        "storage_dir": cluster.storage_dir,
        "datastore_dir": cluster.datastore_dir,
        "network": {"name": cluster.network.name, "subnet": cluster.network.subnet},
        "lan_network": _lan_name(cluster) if multus else None,
        "lan_interface": multus.interface if multus else None,
        "secrets_encryption": cluster.secrets_encryption,
        "k3s_args": cluster.k3s_arguments,
        "cni_plugins": cluster.cni_plugins,
        "audit": cluster.audit
        and {
            "policy": cluster.audit.policy(),
            "arguments": [
                f"--kube-apiserver-arg={name}={value}"
                for name, value in cluster.audit.arguments().items()
            ],
        },
        "ports": [port.model_dump(mode="json") for port in cluster.ports],
        "api_wait_seconds": cluster.api_wait_seconds,
        "recreate": cluster.recreate,
    }


def _rotated_kubeconfig(
    cluster: settings.K3dCluster, seen: Mapping[str, Any]
) -> Reading[str | None]:
    """Only where a preview needs it: the key of the cluster's administrator travels no more often
    than it must. Up takes it from the command that writes the file.
    """
    if not (pulumi.runtime.is_dry_run() and seen["state"] == "running"):
        return None
    if seen["differences"] or not (seen["kubeconfig_behind"] or os.environ.get(ADOPTING)):
        return None
    spec = {"name": cluster.name, "server": server_url(cluster)}
    return (yield from ask(["k3d", "kubeconfig"], spec))["kubeconfig"]


@dataclass(frozen=True)
class K3dClusterArgs:
    """``live`` is what the host holds now; ``docker`` reaches the host's Docker engine; of
    ``network`` the nodes get their second interface.
    """

    settings: settings.K3dCluster
    live: LiveCluster
    host: Host
    docker: docker.Provider
    network: Network = field(default_factory=Network)


class K3dCluster(pulumi.ComponentResource):
    """A k3d cluster on a host's Docker engine.

    The cluster itself is one Command around `hostctl k3d ensure`, which creates, starts or heals
    and never deletes (incident 2). It is protected unless ``homelab:cluster.delete`` holds its
    name. A recreate happens only when ``recreate`` holds it.
    """

    identity: local.Command
    """What lives in the cluster is `deleted_with` this: it is replaced exactly when the cluster is
    another one (design rule 4).
    """
    fingerprint: pulumi.Output[str]
    """Derived from the cluster's own CA certificate: another cluster, another fingerprint."""
    output: pulumi.Output[homelab.Cluster]
    """As consumers of the stack read it."""

    def __init__(
        self, name: str, args: K3dClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:K3dCluster", name, None, opts)
        cluster = args.settings
        spec = cluster_spec(cluster, args.network)
        deletable = cluster.delete == cluster.name
        docker_options = pulumi.ResourceOptions(parent=self, provider=args.docker)

        # No RemoteImage: it is replaced with each image, and hostctl pulls before it stops a node.
        needs: list[pulumi.Resource] = [*args.host.tools]
        if cluster.servers == 1:
            # k3d gives nodes fixed addresses only on a network of its own making, which etcd needs:
            # with more servers it makes it.
            needs.append(
                docker.Network(
                    "network",
                    name=cluster.network.name,
                    driver="bridge",
                    ipam_configs=[_ipam(cluster.network.subnet)],
                    opts=pulumi.ResourceOptions.merge(
                        docker_options,
                        pulumi.ResourceOptions(
                            protect=not deletable,
                            delete_before_replace=True,
                            # One that k3d made has k3d's label, and another label replaces it.
                            ignore_changes=["labels"],
                        ),
                    ),
                )
            )

        if args.network.multus and args.network.lan:
            needs.append(_lan(cluster, args.network.multus, args.network.lan, docker_options))

        seconds = 2 * cluster.api_wait_seconds + _SLACK_SECONDS
        if cluster.recreate or args.live.swaps:
            seconds += _BACKUP_SECONDS
        wait = f"{seconds}s"
        ensure = args.host.command(
            "cluster",
            ["k3d", "ensure"],
            {
                **spec,
                "generation": args.live.generation,
                "incarnation": args.live.incarnation,
                "confirm": cluster.delete,
            },
            delete=["k3d", "delete"],
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=needs,
                protect=not deletable,
                custom_timeouts=pulumi.CustomTimeouts(create=wait, update=wait, delete="10m"),
            ),
        )
        self.identity = args.host.command(
            "identity",
            ["k3d", "identity"],
            {"name": cluster.name},
            triggers=[args.live.incarnation],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[ensure]),
        )

        if args.live.image_files:
            args.host.command(
                "images",
                ["images", "import"],
                {
                    "cluster": cluster.name,
                    "files": args.live.image_files,
                    "incarnation": args.live.incarnation,
                    "image": cluster.image,
                },
                opts=pulumi.ResourceOptions(parent=self, depends_on=[ensure]),
            )
        # Of a cluster that stays it is known: no edit of how the host is reached, which changes the
        # command above, makes it unknown and a preview threaten to replace what lives in it.
        self.fingerprint = (
            pulumi.Output.from_input(args.live.identity)
            if args.live.identity and not args.live.anew
            else result(self.identity).apply(lambda seen: seen["identity"])
        )
        self.output = pulumi.Output.all(
            name=cluster.name,
            identity=self.fingerprint,
            endpoint=server_url(cluster),
            context=f"k3d-{cluster.name}",
            kubeconfigPath=cluster.kubeconfig.path,
            storageClass=cluster.storage_class.name,
            k3sVersion=result(ensure).apply(lambda seen: seen["cluster"]["k3s_version"]),
        ).apply(lambda seen: homelab.Cluster(**seen))
        self._args, self._ensure = args, ensure
        self.register_outputs({"output": self.output})

    def accept(self, after: Sequence[pulumi.Resource] = ()) -> pulumi.Output[homelab.Acceptance]:
        """Has the cluster accepted after its last change, and says how that went. ``after`` is
        what its pods need besides the cluster: a pod network that k3s does not bring.
        """
        args, cluster = self._args, self._args.settings
        accept = args.host.command(
            "acceptance",
            ["k3d", "accept"],
            {
                "name": cluster.name,
                "acceptance": cluster.acceptance.model_dump(),
                "generation": args.live.acceptance_generation,
                # Whatever makes `ensure` change the cluster makes it accepted again.
                "of": {
                    **cluster_spec(cluster, args.network),
                    "generation": args.live.generation,
                    "incarnation": args.live.incarnation,
                },
            },
            opts=pulumi.ResourceOptions(parent=self, depends_on=[self._ensure, *after]),
        )
        return result(accept).apply(lambda seen: _announced(seen["acceptance"]))


def _announced(answer: dict[str, str]) -> homelab.Acceptance:
    # A preview says it of the live cluster.
    if answer["state"] != "passed" and not pulumi.runtime.is_dry_run():
        pulumi.log.warn(f"{answer['detail']}. Remedy: {answer['remedy']}")
    return homelab.Acceptance(state=answer["state"], detail=answer["detail"])


def server_url(cluster: settings.K3dCluster) -> str:
    """The API server as clients reach it: `api.serverName` where given, else the bind address,
    never 0.0.0.0 (incident 14).
    """
    name = cluster.api.server_name or cluster.api.bind
    return f"https://{f'[{name}]' if ':' in name else name}:{cluster.api.port}"


def _lan_name(cluster: settings.K3dCluster) -> str:
    # In the order of names after the first: Docker takes eth0 and the default route from that.
    return f"{cluster.network.name}-lan"


def _lan(
    cluster: settings.K3dCluster,
    multus: settings.Multus,
    lan: settings.Lan,
    options: pulumi.ResourceOptions,
) -> docker.Network:
    """The nodes' way into the LAN: without it a macvlan in them ends at Docker's own bridge."""
    return docker.Network(
        "lan",
        name=_lan_name(cluster),
        driver="macvlan",
        options={"parent": multus.interface},
        ipam_configs=[
            docker.NetworkIpamConfigArgs(
                subnet=lan.subnet, gateway=lan.gateway, ip_range=multus.nodes
            )
        ],
        opts=pulumi.ResourceOptions.merge(
            options, pulumi.ResourceOptions(delete_before_replace=True)
        ),
    )


def _ipam(subnet: str) -> docker.NetworkIpamConfigArgs:
    # One entry with both, or the provider shows a difference for ever.
    return docker.NetworkIpamConfigArgs(subnet=subnet, gateway=str(ip_network(subnet)[1]))
