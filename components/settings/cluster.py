"""The k3d cluster of a host: nodes, network, API server, kubeconfig."""

import re
from collections import defaultdict
from collections.abc import Iterator
from ipaddress import IPv4Network, ip_address, ip_network
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from components import versions
from components.settings.audit import Audit, argument_problems
from components.settings.model import (
    AbsolutePath,
    Account,
    Hostname,
    Image,
    Model,
    Name,
    Number,
    Port,
    Text,
    is_address,
    is_clean_path,
    is_host,
)
from components.settings.problem import Path, Problem, key_path

# Docker's own bridge, and what k3s gives to Services.
_BRIDGE = ip_network("172.17.0.0/16")
_SERVICES = ip_network("10.43.0.0/16")
_PODS = "10.42.0.0/16"
_WITHOUT_FLANNEL = ["--flannel-backend=none", "--disable-network-policy"]
_SYSTEM = frozenset(
    {"bin", "boot", "dev", "etc", "lib", "lib64", "nix", "proc", "run", "sbin", "sys", "tmp", "usr"}
)
_SHARED = frozenset(
    {
        "/home",
        "/media",
        "/mnt",
        "/opt",
        "/root",
        "/srv",
        "/var",
        "/var/lib",
        "/var/lib/docker",
        "/var/run",
    }
)
_OWN_SETTING = {
    "--cluster-cidr": "homelab:cluster.podSubnet",
    "--disable": "homelab:cluster.disable",
    "--secrets-encryption": "homelab:cluster.secretsEncryption",
    "--resolv-conf": "homelab:cluster.resolvers",
    "--https-listen-port": "homelab:cluster.api.port",
    "--bind-address": "homelab:cluster.api.bind",
}
# k3d gives these itself, and hostctl finds the datastore where k3s has it by default.
_K3D_GIVES = frozenset({"--cluster-init", "--data-dir", "--server"})
# A value would be readable in the host's process list. --secrets-encryption has none.
_CARRIES_SECRET = re.compile(
    r"--(?!.*-file$)(?:.*(?:token|secret(?!s-encryption)|password|access-key)"
    r"|datastore-endpoint|vpn-auth).*"
)


def _k3s_takes(argument: str) -> bool:
    name = argument.partition("=")[0]
    return name not in _OWN_SETTING.keys() | _K3D_GIVES and not _CARRIES_SECRET.fullmatch(name)


def _is_private_network(text: str) -> bool:
    try:
        network = IPv4Network(text)
    except ValueError:
        return False
    return (
        network.is_private
        and 16 <= network.prefixlen <= 28
        and not network.is_loopback
        and not network.is_link_local
    )


def _usable_for_storage(path: str) -> bool:
    return (
        is_clean_path(path)
        and path.split("/")[1] not in _SYSTEM
        and path not in _SHARED
        and not path.startswith("/var/lib/docker/")
    )


BindAddress = Annotated[
    str,
    Text(
        "an IPv4 address, the only kind that k3d publishes ports on",
        "write the IPv4 address of one of the host's interfaces, not a name",
        "127.0.0.1",
        r"[0-9.]+",
        is_address,
    ),
]
IpAddress = Annotated[
    str,
    Text(
        "an IP address",
        "write the address of a DNS server, not its name",
        "1.1.1.1",
        r"[0-9a-fA-F:.]+",
        is_address,
    ),
]
ServerName = Annotated[
    str,
    Text(
        "a host name or IP address that clients can reach, without scheme or port",
        "write the name or address that belongs into the kubeconfig (incident 14)",
        "p510.example.org",
        r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|[0-9a-fA-F]*:[0-9a-fA-F:.]+",
        is_host,
    ),
]
Subnet = Annotated[
    str,
    Text(
        "a private IPv4 network such as 172.30.0.0/16, its host bits zero, from /16 to /28",
        "choose a private range that nothing else on the host uses",
        "172.30.0.0/16",
        r"[0-9.]+/[0-9]{1,2}",
        _is_private_network,
    ),
]
NetworkName = Annotated[
    str,
    Text(
        "a Docker network of this cluster's own: letters, digits, `_`, `.` and `-`, and not "
        "bridge, host, none or container:...",
        "leave it out for k3d-<cluster's name>: nodes in the host's network lose their isolation "
        "and their port mappings, k3s takes ports of the host's own services (6443, 10250, "
        "30000-32767), MetalLB and Multus still do not work, and k3d allows one server. "
        "For addresses in the LAN: homelab:network.multus (docs/truenas.md)",
        "k3d-example",
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}",
        lambda name: name.lower() not in {"bridge", "default", "host", "none"},
    ),
]
StorageDir = Annotated[
    str,
    Text(
        "an absolute path of a directory for volumes alone, not one of the system's such as /, "
        "/etc or /var/lib",
        "name a directory on the disk that shall hold the volumes",
        "/mnt/img_pool/k3d/storage",
        r"(?:/[A-Za-z0-9_@+=,.-]+)+",
        _usable_for_storage,
    ),
]
DatastoreDir = Annotated[
    str,
    Text(
        "an absolute path of a directory for the datastore alone, beside storageDir, not one of "
        "the system's such as /, /etc or /var/lib",
        "leave it out, or name a directory on a disk that is neither slow nor shared",
        "/mnt/img_pool/k3d/storage-server",
        r"<storageDir>-server|(?:/[A-Za-z0-9_@+=,.-]+)+",
        lambda path: path.startswith("<") or _usable_for_storage(path),
    ),
]
StorageClassName = Annotated[
    str,
    Text(
        "the name of a StorageClass other than local-path, which k3s writes itself",
        "choose a name of lower-case letters, digits and hyphens",
        "local-retain",
        r"(?!local-path$)[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?",
    ),
]
K3sArgument = Annotated[
    str,
    Text(
        "--name or --name=value of the k3s server, none that has a setting of its own, carries a "
        f"secret, or is k3d's ({', '.join(sorted(_K3D_GIVES))})",
        f"use the setting ({', '.join(sorted(_OWN_SETTING.values()))}); a secret in an argument "
        "is readable by every process: name its file, by the argument that ends in -file",
        "--kubelet-arg=max-pods=200",
        r"--[a-z][a-z0-9-]*(?:=[A-Za-z0-9_.:/,=+<%-]*)?",
        _k3s_takes,
        shown=False,
    ),
]
ClusterName = Annotated[
    str,
    Text(
        "lower-case letters, digits and hyphens, at most 32 (k3d's limit), beginning with a letter",
        "choose a name of that form",
        "factory",
        r"[a-z](?:[a-z0-9-]{0,30}[a-z0-9])?",
    ),
]
FileMode = Annotated[
    str,
    Text(
        'an octal mode in quotes that lets the owner read and others nothing, such as "0640"',
        "the kubeconfig gives full control of the cluster: let the owner and the group read it, "
        "and no one else",
        "0640",
        r"0?[4-7][0-7]0",
    ),
]
DirectoryMode = Annotated[
    str,
    Text(
        'an octal mode in quotes that lets the owner do all and others nothing, such as "0750"',
        "let the owner and the group enter the directory, and no one else",
        "0750",
        r"0?7[0-7]0",
    ),
]


class Api(Model):
    """The address of the Kubernetes API."""

    bind: BindAddress = Field(
        default="127.0.0.1",
        description="Address of the host on which the API is published. May be one that comes up "
        "after Docker (tailscale0).",
    )
    port: Port = Field(default=6443, description="Port of the host on which the API is published.")
    server_name: ServerName | None = Field(
        default=None,
        description="Name or address in the kubeconfig, also put into the server's certificate. "
        "Default: the bind address;"
        " required where that is 0.0.0.0.",
    )


class DockerNetwork(Model):
    """The Docker network of the nodes."""

    name: NetworkName = Field(
        default="k3d-<name>", description="Name of the network; <name> is the cluster's."
    )
    subnet: Subnet = Field(
        default="172.30.0.0/16",
        description="Its fixed range, so that address pools can be cut from it.",
    )


class PublishedPort(Model):
    """A port of the nodes published on the host; fixed when the cluster is created."""

    host_port: Port = Field(description="Port of the host.")
    container_port: Port = Field(description="Port of the node.")
    bind: BindAddress = Field(default="127.0.0.1", description="Address of the host to publish on.")
    protocol: Literal["tcp", "udp"] = Field(default="tcp", description="Transport protocol.")


class StorageClass(Model):
    """The class of volumes in storageDir that a cluster made anew finds again."""

    name: StorageClassName = Field(
        default="local-retain",
        description="Name of the StorageClass. Each volume is the directory"
        " <storageDir>/<namespace>/<claim>, and stays when its claim is deleted.",
    )
    default: bool = Field(
        default=True,
        description="Whether claims that name no class get this one. k3s marks its own, local-path,"
        " as default at each start; of several defaults Kubernetes takes the newest.",
    )


class KubeconfigFile(Model):
    """The kubeconfig on the host: a secret, written atomically."""

    path: AbsolutePath = Field(default="/etc/k3d/kubeconfig", description="Where it is written.")
    owner: Account = Field(default="root", description="Owner of the file and its directory.")
    group: Account = Field(default="wheel", description="Group that may read it.")
    mode: FileMode = Field(default="0640", description="Mode of the file, in quotes.")
    directory_mode: DirectoryMode = Field(
        default="0750", description="Mode of its directory, in quotes."
    )


class Acceptance(Model):
    """What a cluster must show after every change of it."""

    name: Hostname = Field(
        default="registry-1.docker.io",
        description="External name that a pod must resolve; not the node (incident 5).",
    )
    image: Image = Field(
        default=versions.LOOKUP,
        description="Image of that pod, with sh and busybox's nslookup. Default: what k3s uses for "
        "volumes.",
    )
    required: bool = Field(
        default=False,
        strict=True,
        description="Whether `up` fails, rather than warns, when it is not passed.",
    )


class K3dCluster(Model):
    """A Kubernetes cluster. A change of what is fixed at creation is refused until confirmed."""

    kind: Literal["k3d"] = Field(
        default="k3d", description="How the cluster is made: k3s nodes in the host's Docker."
    )
    name: ClusterName = Field(
        default="factory",
        description="Name of the cluster and prefix of its node containers. Fixed at creation.",
    )
    image: Image = Field(
        description="Node image, pinned. Of a cluster of one node a newer release of k3s, one minor"
        " version at a time, is swapped in (docs/upgrade.md); otherwise fixed at creation."
    )
    image_files: list[AbsolutePath] = Field(
        default=[],
        description="Archives of images on the host (docker save), imported into every node; for"
        " hosts without a registry.",
    )
    servers: Annotated[
        int,
        Number(
            "1, 3, 5 or 7: etcd needs an odd number of servers to keep a majority",
            "add or remove a server",
            1, 1, 7, odd=True,
        ),
    ] = Field(default=1, description="Number of servers. Fixed at creation.")  # fmt: skip
    agents: Annotated[
        int, Number("0 to 32", "write a number in that range, without quotes", 0, 0, 32)
    ] = Field(default=0, description="Number of agents. Fixed at creation.")
    disable: list[
        Literal["coredns", "local-storage", "metrics-server", "runtimes", "servicelb", "traefik"]
    ] = Field(
        default=["traefik", "servicelb"],
        description="Parts of k3s to leave out. Fixed at creation.",
    )
    api: Api = Field(
        default=Api(), description="The address of the Kubernetes API. Fixed at creation."
    )
    resolvers: list[IpAddress] = Field(
        default=["1.1.1.1", "9.9.9.9"],
        description="DNS servers of the nodes, up to three, outside every Docker network, mounted "
        "as their resolv.conf (incident 5). Fixed at creation.",
    )
    storage_dir: StorageDir = Field(
        default="/mnt/img_pool/k3d/storage",
        description="Directory of the host that holds the volumes of storage class local-path. "
        "Fixed at creation.",
    )
    datastore_dir: DatastoreDir = Field(
        default="<storageDir>-server",
        validate_default=True,
        description="Directory of the host, of root alone, that holds each server's datastore and "
        "certificates; <storageDir> is the directory of the volumes. Fixed at creation; a cluster "
        "that was made without it gets it with the next node image.",
    )
    storage_class: StorageClass = Field(
        default=StorageClass(), description="The StorageClass that the stack declares."
    )
    secrets_encryption: bool = Field(
        default=False,
        description="Whether k3s encrypts Secrets in its datastore. Fixed at creation.",
    )
    network: DockerNetwork = Field(
        default=DockerNetwork(),
        validate_default=True,
        description="The Docker network of the nodes. Fixed at creation.",
    )
    cni: Literal["flannel", "calico"] = Field(
        default="flannel",
        description="The pod network: k3s's own `flannel` with its network policy controller, or "
        "`calico`, which takes the place of both. Fixed at creation.",
    )
    pod_subnet: Subnet = Field(
        default=_PODS,
        description="The range of the pods, for k3s and for Calico alike. Fixed at creation.",
    )
    cni_plugins: AbsolutePath | None = Field(
        default=None,
        description="Directory of the host with the CNI reference plugins (bridge, dhcp, "
        "host-local, macvlan, static), mounted read-only into every node as /opt/cni/plugins: k3s "
        "brings no macvlan. Required with homelab:network.multus. Fixed at creation.",
    )
    k3s_args: list[K3sArgument] = Field(
        default=[],
        description="More arguments for the k3s servers, one an entry. Fixed at creation.",
    )
    audit: Audit | None = Field(
        default=None,
        description="The audit log of the API server; none where left out. Whether there is one, "
        "and how long it is kept, is fixed at creation; changed rules restart the servers.",
    )
    ports: list[PublishedPort] = Field(
        default=[], description="Ports of the nodes published on the host. Fixed at creation."
    )
    kubeconfig: KubeconfigFile = Field(
        default=KubeconfigFile(), description="The kubeconfig file on the host."
    )
    api_wait_seconds: Annotated[
        int,
        Number("10 to 86400", "write seconds in that range, without quotes", 1800, 10, 86400),
    ] = Field(
        default=1800,
        description="Ceiling for the wait on the API, in seconds; it ends early when the server "
        "stops reading its datastore (incident 4).",
    )
    acceptance: Acceptance = Field(
        default=Acceptance(),
        description="The check after every change of the cluster: its API answers through its "
        "published port, and a pod resolves an external name.",
    )
    enabled: bool = Field(
        default=True,
        strict=True,
        description="Whether the host has the cluster. Without it nothing that would live in it is "
        "declared, nor a tunnel whose connector is not the host's.",
    )
    moved_from: Name | None = Field(
        default=None,
        description="The stack that the cluster is moved from: until it was imported on this host, "
        "none is made (incident 16, docs/move.md).",
    )
    recreate: ClusterName | None = Field(
        default=None,
        description="The cluster's name, typed: confirms that it is deleted and made anew, after "
        "a backup (incident 10); not with another network or number of servers. Remove it "
        "afterwards.",
    )
    delete: ClusterName | None = Field(
        default=None,
        description="The cluster's name, typed: lets `pulumi destroy` delete the cluster.",
    )

    @field_validator("network")
    @classmethod
    def _name_network(cls, network: DockerNetwork, info: ValidationInfo) -> DockerNetwork:
        name = network.name.replace("<name>", info.data.get("name", "example"))
        return network.model_copy(update={"name": name})

    @field_validator("datastore_dir")
    @classmethod
    def _name_datastore(cls, path: str, info: ValidationInfo) -> str:
        return path.replace("<storageDir>", info.data.get("storage_dir", "/example"))

    @property
    def k3s_arguments(self) -> list[str]:
        """All arguments of the servers that follow from the settings of the network, and
        ``k3s_args``.
        """
        found = list(_WITHOUT_FLANNEL) if self.cni == "calico" else []
        if self.pod_subnet != _PODS:
            found.append(f"--cluster-cidr={self.pod_subnet}")
        return [*found, *self.k3s_args]

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        storage, datastore = f"{self.storage_dir}/", f"{self.datastore_dir}/"
        if storage.startswith(datastore) or datastore.startswith(storage):
            yield Problem(
                ("cluster", "datastoreDir"),
                self.datastore_dir,
                "a directory that is neither inside storageDir nor around it",
                f"leave it out, then it is {self.storage_dir}-server",
                involves=[("cluster", "storageDir")],
            )
        yield from self._api_problems()
        yield from self._resolver_problems()
        yield from self._port_problems()
        yield from self._subnet_problems()
        yield from self._cni_problems()
        if self.audit is not None:
            yield from self.audit.problems(("cluster", "audit"))
        yield from argument_problems(("cluster", "k3sArgs"), self.k3s_args)
        for key in ("recreate", "delete"):
            typed = getattr(self, key)
            if typed is not None and typed != self.name:
                yield Problem(
                    ("cluster", key),
                    typed,
                    f"the cluster's name, {self.name}, or nothing",
                    f"type {self.name} to confirm, or remove the key",
                    involves=[("cluster", "name")],
                )
        if self.servers > 1 and self.network.name != f"k3d-{self.name}":
            yield Problem(
                ("cluster", "network", "name"),
                self.network.name,
                f"k3d-{self.name} for several servers, whose network k3d makes and names itself",
                "leave the name out",
                involves=[("cluster", "servers"), ("cluster", "name")],
            )
        nodes = 1 + self.servers + self.agents + 2
        if ip_network(self.network.subnet).num_addresses - 2 < nodes:
            yield Problem(
                ("cluster", "network", "subnet"),
                self.network.subnet,
                f"a network with room for {nodes} addresses",
                "choose a larger range",
                involves=[("cluster", "servers"), ("cluster", "agents")],
            )

    def _subnet_problems(self) -> Iterator[Problem]:
        pods: Path = ("cluster", "podSubnet")
        taken = {
            "Docker's default bridge": (_BRIDGE, []),
            "the pods of k3s": (ip_network(self.pod_subnet), [pods]),
            "the Services of k3s": (_SERVICES, []),
        }
        for owner, (network, involves) in taken.items():
            if ip_network(self.network.subnet).overlaps(network):
                yield Problem(
                    ("cluster", "network", "subnet"),
                    self.network.subnet,
                    f"a network outside {network}, which belongs to {owner}",
                    "choose another private range, for example 172.30.0.0/16",
                    involves=involves,
                )
        for owner in ("Docker's default bridge", "the Services of k3s"):
            network, _ = taken[owner]
            if ip_network(self.pod_subnet).overlaps(network):
                yield Problem(
                    pods,
                    self.pod_subnet,
                    f"a network outside {network}, which belongs to {owner}",
                    f"choose another private range, or leave it out for {_PODS}",
                )

    def _cni_problems(self) -> Iterator[Problem]:
        for index, argument in enumerate(self.k3s_args):
            path: Path = ("cluster", "k3sArgs", index)
            if argument in _WITHOUT_FLANNEL:
                yield Problem(
                    path,
                    argument,
                    "arguments that leave the cluster a pod network and its network policies: "
                    "Multus is none, it only adds interfaces to the one that there is",
                    "remove it; for another pod network set homelab:cluster.cni: calico",
                    "leaves the nodes NotReady, or network policies without effect",
                    [("cluster", "cni")],
                )
            elif self.cni == "calico" and argument.startswith("--flannel-"):
                yield Problem(
                    path,
                    argument,
                    "arguments other than flannel's with homelab:cluster.cni calico",
                    "remove it, or go back to homelab:cluster.cni: flannel",
                    "has no effect",
                    [("cluster", "cni")],
                )

    def _api_problems(self) -> Iterator[Problem]:
        bind = ip_address(self.api.bind)
        server = self.api.server_name
        if bind.is_unspecified and server is None:
            yield Problem(
                ("cluster", "api", "bind"),
                self.api.bind,
                "an address of the host, or 0.0.0.0 together with serverName",
                "set homelab:cluster.api.serverName to the name or address that clients reach "
                "(incident 14)",
                involves=[("cluster", "api", "serverName")],
            )

    def _resolver_problems(self) -> Iterator[Problem]:
        if not 1 <= len(self.resolvers) <= 3:
            yield Problem(
                ("cluster", "resolvers"),
                len(self.resolvers),
                "one to three DNS servers, the limit of resolv.conf",
                "name two public or LAN resolvers, for example 1.1.1.1 and 9.9.9.9",
            )
        subnet = ip_network(self.network.subnet)
        for index, resolver in enumerate(self.resolvers):
            path: Path = ("cluster", "resolvers", index)
            address = ip_address(resolver)
            reason, involves = None, []
            if address.is_loopback:
                reason = "loopback is each container's own"
            elif address.is_link_local or address.is_unspecified or address.is_multicast:
                reason = "it cannot be routed to"
            elif address in subnet:
                reason, involves = (
                    f"it is inside the cluster's own network {subnet}",
                    [("cluster", "network", "subnet")],
                )
            elif address in _BRIDGE:
                reason = "it is on Docker's bridge, where the resolver moves with Docker's version"
            if reason:
                yield Problem(
                    path,
                    resolver,
                    "a DNS server outside the host and outside every Docker network",
                    f"name a public or LAN resolver: {reason} (incident 5)",
                    involves=involves,
                )
            if resolver in self.resolvers[:index]:
                yield Problem(path, resolver, "each DNS server once", "remove it", "is named twice")

    def _port_problems(self) -> Iterator[Problem]:
        taken: dict[tuple[str, int], list[tuple[str, Path]]] = defaultdict(list)
        taken["tcp", self.api.port].append((self.api.bind, ("cluster", "api")))
        for index, port in enumerate(self.ports):
            path: Path = ("cluster", "ports", index)
            for bind, other in taken[port.protocol, port.host_port]:
                if bind == port.bind or any(
                    ip_address(b).is_unspecified for b in (bind, port.bind)
                ):
                    yield Problem(
                        (*path, "hostPort"),
                        port.host_port,
                        "each port of an address once",
                        "choose another hostPort",
                        f"is used twice: {key_path(other)} has it too",
                        involves=[
                            (*path, "bind"),
                            (*path, "protocol"),
                            (*other, "bind"),
                            (*other, "port"),
                            (*other, "hostPort"),
                            (*other, "protocol"),
                        ],
                    )
                    break
            taken[port.protocol, port.host_port].append((port.bind, path))
