"""What stacks must not share: addresses, names, and what two of them would take on one host.

A preview compares its stack with the others of the project, so that it refuses while it collides
and stacks not involved go on; ``python -m components.settings`` compares each with each. Only the
plain values of a file are read: no passphrase is needed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path as FilePath

import yaml

from components.settings.cluster import K3dCluster
from components.settings.existing import ExistingCluster
from components.settings.host import Host
from components.settings.k3s import K3sCluster
from components.settings.network import Network
from components.settings.problem import Path, Problem, SettingsError, key_path, shown
from components.settings.stack import Settings
from components.settings.storage import IscsiClass, NfsClass, Storage
from components.settings.tunnel import HostConnector

NAMESPACE = "homelab:"

_ON_HOST, _IN_ACCOUNT = "on host ", "in Cloudflare account "
_IN_ARGOCD = "or shares no namespace in it, for two ArgoCDs would undo each other's work"

# Much faster, where PyYAML was built with libyaml.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What k3s takes without an argument, by the argument.
_K3S_NETWORKS = {"--service-cidr": ("Service network", "10.43.0.0/16")}

# What may lie in the same addresses, each pair under one of the two. Stacks in one LAN have its
# router, its DHCP range and its reserved addresses in common; a machine may be the host of one, a
# node of another and a resolver of both. Pods and Services are inside the nodes alone, so clusters
# may have the same networks; but what else has such an address is out of reach for them.
_BESIDE = {
    "LAN": {
        *("LAN", "router", "DHCP range", "reserved address", "address pool"),
        *("host address", "node address", "virtual IP", "DNS server"),
        *("nodes' addresses in the LAN", "pods' addresses in the LAN"),
    },
    "router": {"router"},
    "DHCP range": {"DHCP range", "reserved address"},
    "reserved address": {"reserved address", "host address", "node address"},
    "host address": {"host address", "node address"},
    "DNS server": {
        *("DNS server", "router", "DHCP range", "reserved address", "host address"),
        *("node address", "pod network", "Service network"),
    },
    "pod network": {"pod network", "Service network"},
    "Service network": {"Service network"},
}

# Name of the operator's device where chart tailscale-operator is given none (operatorConfig).
_OPERATOR = "tailscale-operator"


@dataclass(frozen=True)
class Addresses:
    """A range of IP addresses, first and last included."""

    first: IPv4Address | IPv6Address
    last: IPv4Address | IPv6Address

    @classmethod
    def of(cls, text: str) -> "Addresses":
        """From an address, a network in CIDR notation, or `first-last`. Raises ValueError."""
        if "/" in text:
            network = ip_network(text, strict=False)
            return cls(network[0], network[-1])
        first, _, last = text.partition("-")
        return cls(ip_address(first.strip()), ip_address((last or first).strip()))

    def meets(self, other: "Addresses") -> bool:
        """Whether any address is in both."""
        return self.first.version == other.first.version and (
            int(self.first) <= int(other.last) and int(other.first) <= int(self.last)
        )


@dataclass(frozen=True)
class HostPort:
    """A port of an address of a host."""

    protocol: str
    port: int
    bind: str

    def meets(self, other: "HostPort") -> bool:
        """Whether both cannot listen at once: an unspecified address is all of them."""
        everywhere = any(ip_address(bind).is_unspecified for bind in (self.bind, other.bind))
        return (self.protocol, self.port) == (other.protocol, other.port) and (
            everywhere or self.bind == other.bind
        )


@dataclass(frozen=True)
class Directory:
    """A directory and all that is in it."""

    path: str

    def meets(self, other: "Directory") -> bool:
        """Whether one is, or holds, the other."""
        mine, theirs = FilePath(self.path), FilePath(other.path)
        return mine.is_relative_to(theirs) or theirs.is_relative_to(mine)


Extent = Addresses | HostPort | Directory | str
"""What is compared, with its like alone; text with text of the same ``what``."""


@dataclass(frozen=True)
class Claim:
    """Something that a stack wants for itself.

    ``place`` is where no other may have it: on a host, in a Cloudflare account; None is everywhere.
    """

    what: str
    value: str | int
    path: Path
    extent: Extent
    place: str | None = None

    def collides(self, other: "Claim") -> bool:
        """Whether both stacks cannot have what they want."""
        if self.place is not None and other.place is not None and self.place != other.place:
            return False
        if other.what in _BESIDE.get(self.what, ()) or self.what in _BESIDE.get(other.what, ()):
            return False
        match self.extent, other.extent:
            case Addresses() as mine, Addresses() as theirs:
                return mine.meets(theirs)
            case HostPort() as mine, HostPort() as theirs:
                return mine.meets(theirs)
            case Directory() as mine, Directory() as theirs:
                return mine.meets(theirs)
            case str() as mine, str() as theirs:
                return (self.what, mine) == (other.what, theirs)
        return False


def read_file(file: FilePath) -> tuple[Settings, list[Problem]]:
    """The settings in a stack file without what is encrypted, for a reader who has no passphrase,
    and what of the rest is refused. Raises SettingsError where that is too much, OSError or
    ValueError where the file cannot be understood.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _LOADER)
        config = (content or {}).get("config") or {}
        ours = {
            key.removeprefix(NAMESPACE): value
            for key, value in config.items()
            if key.startswith(NAMESPACE)
        }
    except (AttributeError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from None
    left_out: list[Problem] = []
    context = {"source": file.name, "left_out": left_out}
    settings = Settings.model_validate(ours, by_alias=True, by_name=False, context=context)
    return settings, left_out


@dataclass(frozen=True)
class Stack:
    """A stack by the name of its file and by what it claims.

    ``problems`` are its settings that cannot be understood; of those it claims nothing.
    ``moved_from`` is the stack whose cluster it awaits.
    """

    file: str
    claims: Sequence[Claim]
    problems: Sequence[str] = ()
    moved_from: str | None = None

    @classmethod
    def of(cls, name: str, settings: Settings, problems: Sequence[Problem] = ()) -> "Stack":
        """A stack from its settings, without what of them is refused."""
        refused = {problem.path for problem in problems}

        def stands(path: Path) -> bool:
            return not any(path[:length] in refused for length in range(len(path) + 1))

        # Where it is not known which host or account this is, nothing there can be compared.
        unknown = [
            place
            for place, paths in {
                _ON_HOST: [("host", "name"), ("host", "address"), ("host", "connection")],
                _IN_ACCOUNT: [("cloudflare", "accountId")],
            }.items()
            if not all(map(stands, paths))
        ]
        claims = tuple(
            claim
            for claim in _claims(name, settings)
            if stands(claim.path) and not (claim.place or "").startswith(tuple(unknown))
        )
        cluster = settings.cluster
        awaits = cluster.moved_from if isinstance(cluster, K3dCluster) else None
        return cls(f"Pulumi.{name}.yaml", claims, tuple(map(str, problems)), awaits)

    @classmethod
    def read(cls, file: FilePath) -> "Stack":
        """A stack from its file. What cannot be understood is among ``problems``; never raises."""
        name = file.name.removeprefix("Pulumi.").removesuffix(".yaml")
        try:
            settings, left_out = read_file(file)
        except SettingsError as error:
            return cls(file.name, (), tuple(map(str, error.problems)))
        except (OSError, ValueError) as error:
            return cls(file.name, (), [f"cannot be read: {error}"])
        return cls.of(name, settings, left_out)


def stack_files(directory: FilePath) -> list[FilePath]:
    """The stack files of a project, in order."""
    return sorted(directory.glob("Pulumi.*.yaml"))


def collisions(stack: Stack, other: Stack) -> Iterator[Problem]:
    """What two stacks cannot both have, as problems of the first that name the second."""
    by_text: dict[Extent, list[Claim]] = defaultdict(list)
    by_range: list[Claim] = []
    for theirs in other.claims:
        if isinstance(theirs.extent, str):
            by_text[theirs.extent].append(theirs)
        else:
            by_range.append(theirs)
    for claim in stack.claims:
        candidates = by_text[claim.extent] if isinstance(claim.extent, str) else by_range
        for theirs in candidates:
            if claim.collides(theirs):
                yield _problem(claim, theirs, other.file)


def strays(stack: Stack, others: Iterable[Stack]) -> Iterator[Problem]:
    """What a stack names that is no other stack of the project: movedFrom."""
    files = sorted(other.file for other in others if other.file != stack.file)
    if stack.moved_from and f"Pulumi.{stack.moved_from}.yaml" not in files:
        yield Problem(
            ("cluster", "movedFrom"),
            stack.moved_from,
            f"a stack that has one of the files {', '.join(files)}" if files else "another stack",
            "correct the name; once the cluster lives here and the old stack is gone, remove the"
            " key (docs/move.md)",
            "is no other stack of this project",
        )


def _problem(mine: Claim, theirs: Claim, file: str) -> Problem:
    place = mine.place or theirs.place or "in all stacks"
    overlap = isinstance(mine.extent, Addresses | Directory)
    allowed = f"a {mine.what} that overlaps no other" if overlap else f"each {mine.what} once"
    remedy = f"change it in one of the two files ({file} has {shown(theirs.value)})"
    if place.startswith(_ON_HOST):
        remedy += ", or, if these are two hosts, give each a name in homelab:host.name"
    verdict = "overlaps" if overlap else "is also"
    verdict += f" the {theirs.what} in {file}, {key_path(theirs.path)}"
    return Problem(mine.path, mine.value, f"{allowed} {place}", remedy, verdict)


def _machine(stack: str, host: Host) -> str:
    """What tells hosts apart: their name, else the address that one logs in to, else, where Pulumi
    runs on the host itself, the stack's name.
    """
    if host.name or not host.address:
        return host.name or stack
    return host.address.lower() + (f":{host.port}" if host.port != 22 else "")


def _claims(stack: str, settings: Settings) -> Iterator[Claim]:
    """All that must be a stack's own. What a new setting takes is to be added here. A cluster that
    is off takes nothing: while one moves, both its stacks declare it."""
    settings = settings.in_force
    host, cluster = settings.host, settings.cluster
    here = _ON_HOST + _machine(stack, host)

    if host.address:
        try:
            extent = Addresses.of(host.address)
            yield Claim("host address", host.address, ("host", "address"), extent)
        except ValueError:
            pass  # a name

    if settings.has_cluster:
        yield Claim("cluster name", cluster.name, ("cluster", "name"), cluster.name, here)
    if isinstance(cluster, K3dCluster):
        if cluster.enabled:
            yield from _claims_of_k3d(cluster, here)
    else:
        yield from _claims_of_nodes(cluster)
    # In front of k3d nodes a pool lies in their Docker network, which no other host sees.
    yield from _claims_of_lan(settings.network, here if isinstance(cluster, K3dCluster) else None)

    yield from _claims_of_storage(settings.storage)

    hostnames: set[str] = set()
    for name, tunnel in settings.tunnels.items():
        if settings.cloudflare:
            account = _IN_ACCOUNT + settings.cloudflare.account_id
            yield Claim("tunnel name", name, ("tunnels", name), name, account)
        if tunnel.adopt:
            path = ("tunnels", name, "adopt", "id")
            yield Claim("tunnel", tunnel.adopt.id, path, tunnel.adopt.id)
        if isinstance(connector := tunnel.connector, HostConnector):
            path = ("tunnels", name, "connector", "container")
            yield Claim("container name", connector.container, path, connector.container, here)
            path = ("tunnels", name, "connector", "tokenFile")
            yield Claim("token file", connector.token_file, path, connector.token_file, here)
        for index, route in enumerate(tunnel.routes):
            if route.hostname not in hostnames:
                hostnames.add(route.hostname)
                path = ("tunnels", name, "routes", index, "hostname")
                yield Claim("hostname", route.hostname, path, route.hostname)

    for name, member in (settings.argocd.clusters if settings.argocd else {}).items():
        if member.stack:
            # Two ArgoCDs may share a cluster, each in namespaces of its own.
            key = f"/{member.stack}"
            for namespace in member.namespaces or [""]:
                path = ("argocd", "clusters", name)
                extent = Directory(f"{key}/{namespace}".rstrip("/"))
                yield Claim("cluster of an ArgoCD", member.stack, path, extent, _IN_ARGOCD)

    if settings.tailscale and (operator := settings.tailscale.operator):
        path, name = ("tailscale", "operator", "hostname"), operator.hostname or _OPERATOR
        yield Claim("name in the tailnet", name, path, name)


def _claims_of_storage(storage: Storage) -> Iterator[Claim]:
    """LUNs, whose file system two clusters would destroy, and directories in which both would take
    volumes of the same claims for their own.
    """
    for name, one in storage.classes.items():
        path: Path = ("storage", "classes", name)
        if isinstance(one, IscsiClass):
            for volume, declared in one.volumes.items():
                lun = f"{declared.iqn} LUN {declared.lun}"
                yield Claim("iSCSI LUN", lun, (*path, "volumes", volume), lun)
        elif isinstance(one, NfsClass) and "${pv." not in one.sub_directory:
            # Names of claims may be the same in two clusters, those of volumes are not.
            where = f"{one.server}:{one.share}/{one.sub_directory}"
            yield Claim("NFS directory", where, (*path, "share"), where)


def _claims_of_k3d(cluster: K3dCluster, here: str) -> Iterator[Claim]:
    network = cluster.network
    path: Path = ("cluster", "network", "subnet")
    yield Claim("Docker network", network.subnet, path, Addresses.of(network.subnet), here)
    path = ("cluster", "network", "name")
    yield Claim("name of a Docker network", network.name, path, network.name, here)
    for index, resolver in enumerate(cluster.resolvers):
        path = ("cluster", "resolvers", index)
        yield Claim("DNS server", resolver, path, Addresses.of(resolver), here)
    path = ("cluster", "podSubnet")
    yield Claim("pod network", cluster.pod_subnet, path, Addresses.of(cluster.pod_subnet), here)
    given = {
        argument.partition("=")[0]: (index, argument.partition("=")[2])
        for index, argument in enumerate(cluster.k3s_args)
    }
    for argument, (what, default) in _K3S_NETWORKS.items():
        index, value = given.get(argument, (None, default))
        path = ("cluster", "k3sArgs") if index is None else ("cluster", "k3sArgs", index)
        for text in value.split(","):
            try:
                yield Claim(what, text, path, Addresses.of(text), here)
            except ValueError:
                continue

    api = cluster.api
    path = ("cluster", "api", "port")
    yield Claim("port", api.port, path, HostPort("tcp", api.port, api.bind), here)
    for index, port in enumerate(cluster.ports):
        path = ("cluster", "ports", index, "hostPort")
        extent = HostPort(port.protocol, port.host_port, port.bind)
        yield Claim("port", port.host_port, path, extent, here)
    path, directory = ("cluster", "storageDir"), cluster.storage_dir
    yield Claim("directory of volumes", directory, path, Directory(directory), here)
    path, file = ("cluster", "kubeconfig", "path"), cluster.kubeconfig.path
    yield Claim("kubeconfig file", file, path, file, here)


def _claims_of_nodes(cluster: K3sCluster | ExistingCluster) -> Iterator[Claim]:
    for name, node in cluster.nodes.items():
        path: Path = ("cluster", "nodes", name, "address")
        yield Claim("node address", node.address, path, Addresses.of(node.address))
    if isinstance(cluster, K3sCluster) and cluster.virtual_ip:
        path = ("cluster", "virtualIp", "address")
        address = cluster.virtual_ip.address
        yield Claim("virtual IP", address, path, Addresses.of(address))
    for what, key, text in (
        ("pod network", "podSubnet", cluster.pod_subnet),
        ("Service network", "serviceSubnet", cluster.service_subnet),
    ):
        yield Claim(what, text, ("cluster", key), Addresses.of(text))


def _claims_of_lan(network: Network, place: str | None) -> Iterator[Claim]:
    if (lan := network.lan) is not None:
        path: Path = ("network", "lan", "subnet")
        yield Claim("LAN", lan.subnet, path, Addresses.of(lan.subnet))
        path = ("network", "lan", "gateway")
        yield Claim("router", lan.gateway, path, Addresses.of(lan.gateway))
        for name, address in lan.reserved.items():
            path = ("network", "lan", "reserved", name)
            yield Claim("reserved address", address, path, Addresses.of(address))
        if lan.dhcp is not None:
            # Without what the router reserves: the machines that have that are known.
            for part in _without(Addresses.of(lan.dhcp), map(ip_address, lan.reserved.values())):
                yield Claim("DHCP range", lan.dhcp, ("network", "lan", "dhcp"), part)
    if (multus := network.multus) is not None:
        if lan is not None:
            # Docker makes two networks with the same addresses on no host.
            path = ("network", "multus")
            yield Claim("Docker network in the LAN", lan.subnet, path, lan.subnet, place)
        path = ("network", "multus", "nodes")
        what = "nodes' addresses in the LAN"
        yield Claim(what, multus.nodes, path, Addresses.of(multus.nodes))
        for index, attached in enumerate(multus.networks):
            if attached.type == "macvlan" and (span := attached.ipam.range) is not None:
                path = ("network", "multus", "networks", index, "ipam", "range")
                yield Claim("pods' addresses in the LAN", span, path, Addresses.of(span))
    for index, pool in enumerate(network.metallb.pools if network.metallb else ()):
        path = ("network", "metallb", "pools", index, "addresses")
        yield Claim("address pool", pool.addresses, path, Addresses.of(pool.addresses), place)


def _without(
    addresses: Addresses, taken: Iterable[IPv4Address | IPv6Address]
) -> Iterator[Addresses]:
    first = addresses.first
    for address in sorted(taken, key=int):
        if int(first) <= int(address) <= int(addresses.last):
            if int(first) < int(address):
                yield Addresses(first, address - 1)
            first = address + 1
    if int(first) <= int(addresses.last):
        yield Addresses(first, addresses.last)
