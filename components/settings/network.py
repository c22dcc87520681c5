"""What a cluster takes of its LAN: address pools for MetalLB, and Traefik on one of the addresses.

An address has one owner: the router, its DHCP server, a node, another machine, or a pool. Whatever
overlaps is refused with both keys.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Literal

from pydantic import Field

from components.settings.cluster import K3dCluster
from components.settings.existing import ExistingCluster, Interface, IPv4, IPv4Range
from components.settings.k3s import VPN, K3sCluster
from components.settings.model import Model, Name, ObjectName, Text, is_ipv4
from components.settings.problem import Path, Problem, key_path

METALLB_NAMESPACE = "metallb-system"
TRAEFIK_NAMESPACE = "traefik"
# What k3s gives where nothing else is said, which no setting of a k3d cluster changes.
_K3S_SERVICES = "10.43.0.0/16"
# What no switch of the LAN is on: the host alone, Docker's and the pods' own interfaces.
_OF_THE_HOST_ALONE = re.compile(r"lo|docker0|cni0|br-[0-9a-f]{12}|(?:veth|flannel|cali|virbr).*")


def _is_range(text: str) -> bool:
    first, dash, last = text.partition("-")
    if dash:
        return is_ipv4(first) and is_ipv4(last) and IPv4Address(first) <= IPv4Address(last)
    try:
        IPv4Network(text)
    except ValueError:
        return False
    return True


AddressRange = Annotated[
    str,
    Text(
        "FIRST-LAST, two IPv4 addresses in order, or an IPv4 network, its host bits zero",
        "write the whole addresses at both ends",
        "192.168.1.240-192.168.1.245",
        r"[0-9.]{7,15}(?:-[0-9.]{7,15}|/[0-9]{1,2})",
        _is_range,
    ),
]
LanInterface = Annotated[
    str,
    Text(
        "the host's interface in the LAN, not lo, docker0, or one of Docker's and the pods' own",
        "write the one that `ip route get` shows for homelab:network.lan.gateway, run on the host; "
        "with a bridge over the card, the bridge",
        "br0",
        r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}",
        lambda name: not _OF_THE_HOST_ALONE.fullmatch(name),
    ),
]
Size = Annotated[
    str,
    Text(
        "a size such as 128Mi or 1Gi",
        "write a whole number with Mi or Gi",
        "128Mi",
        r"[1-9][0-9]{0,5}[MG]i",
    ),
]
Email = Annotated[
    str,
    Text(
        "an e-mail address",
        "write one that is read: Let's Encrypt warns there before a certificate ends",
        "someone@example.org",
        r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+",
    ),
]


@dataclass(frozen=True)
class Span:
    """Addresses from ``first`` to ``last``, both included."""

    first: IPv4Address
    last: IPv4Address

    @classmethod
    def of(cls, text: str) -> "Span":
        """Of FIRST-LAST, a network, or one address."""
        first, dash, last = text.partition("-")
        if dash:
            return cls(IPv4Address(first), IPv4Address(last))
        network = IPv4Network(text)
        return cls(network[0], network[-1])

    def overlaps(self, other: "Span") -> bool:
        return self.first <= other.last and other.first <= self.last

    def within(self, other: "Span") -> bool:
        return other.first <= self.first and self.last <= other.last

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class _Claim:
    """Addresses that have an owner. ``path`` is None where no setting says so."""

    span: Span
    owner: str
    path: Path | None = None

    def __str__(self) -> str:
        where = f" ({key_path(self.path)})" if self.path else ""
        return f"{self.span}, which belongs to {self.owner}{where}"

    @property
    def involves(self) -> list[Path]:
        return [self.path] if self.path else []


class Lan(Model):
    """The LAN as its router has it. Nothing here changes the router."""

    subnet: IPv4Range = Field(description="The LAN's range.")
    gateway: IPv4 = Field(description="The router's own address.")
    dhcp: AddressRange | None = Field(
        default=None,
        description="What the router's DHCP server hands out; none where it hands out nothing.",
    )
    reserved: dict[Name, IPv4] = Field(
        default={},
        description="Fixed addresses by who has them, which the router reserves where they lie in "
        "its DHCP range: other machines, and nodes inside that range.",
    )

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        lan = Span.of(self.subnet)
        inside: list[tuple[Path, str]] = [(("network", "lan", "gateway"), self.gateway)]
        if self.dhcp is not None:
            inside.append((("network", "lan", "dhcp"), self.dhcp))
            if Span.of(self.gateway).overlaps(Span.of(self.dhcp)):
                yield Problem(
                    ("network", "lan", "dhcp"),
                    self.dhcp,
                    f"a range without the router's own address, {self.gateway}",
                    "write the range as the router has it",
                    "holds homelab:network.lan.gateway",
                    [("network", "lan", "gateway")],
                )
        inside += [(("network", "lan", "reserved", k), v) for k, v in self.reserved.items()]
        for path, value in inside:
            if not Span.of(value).within(lan):
                yield Problem(
                    path,
                    value,
                    f"addresses in homelab:network.lan.subnet, {self.subnet}",
                    "correct it, or the subnet",
                    "lies outside homelab:network.lan.subnet",
                    [("network", "lan", "subnet")],
                )


class Pool(Model):
    """Addresses that MetalLB gives to Services."""

    name: ObjectName = Field(description="Name of the IPAddressPool.")
    addresses: AddressRange = Field(description="Its addresses; nobody else may use them.")
    auto_assign: bool = Field(
        default=True,
        strict=True,
        description="Whether a Service that asks for no address may get one of these.",
    )


class MetalLB(Model):
    """MetalLB in layer 2 mode: one node answers ARP for each address, another when it is lost."""

    pools: list[Pool] = Field(description="Address pools; all of them are announced.")
    interfaces: list[Interface] = Field(
        default=[],
        description="Announce on these interfaces of the nodes only; on all where left out.",
    )


class Acme(Model):
    """Certificates from Let's Encrypt, kept on Traefik's volume as acme.json."""

    email: Email = Field(description="Contact of the account.")
    challenge: Literal["tls", "http"] = Field(
        default="tls",
        description="How names are proved: on port 443 (`tls`) or 80 (`http`), reachable from the "
        "internet.",
    )


class Traefik(Model):
    """Traefik as the LAN's ingress, on a fixed address of a pool."""

    address: IPv4 = Field(description="Its address, out of a pool.")
    storage_class: ObjectName | None = Field(
        default=None,
        description="Storage class of its volume; the cluster's default where left out.",
    )
    volume_size: Size = Field(default="128Mi", description="Size of its volume, for acme.json.")
    acme: Acme | None = Field(default=None, description="Certificates; none where left out.")


class Ipam(Model):
    """Where the addresses of an attached interface come from."""

    type: Literal["host-local", "static", "dhcp"] = Field(
        description="`host-local`: one of the range, counted on the node; `static`: the one that "
        "the pod's annotation asks for; `dhcp`: the LAN's DHCP server."
    )
    range: AddressRange | None = Field(
        default=None,
        description="Addresses that nobody else uses; required with host-local and, so that "
        "nobody else takes them, with static.",
    )


class Attachment(Model):
    """A NetworkAttachmentDefinition: a network that a pod may have besides the cluster's."""

    name: ObjectName = Field(description="Its name, as a pod's annotation names it.")
    namespace: Name = Field(default="default", description="Its namespace.")
    type: Literal["macvlan", "bridge"] = Field(
        default="macvlan",
        description="`macvlan`: an interface in the LAN. `bridge`: a network between the pods of "
        "one node.",
    )
    subnet: IPv4Range | None = Field(
        default=None, description="Range of a `bridge`; that of a `macvlan` is the LAN's."
    )
    ipam: Ipam = Field(description="Its addresses.")


class Multus(Model):
    """Multus, and the networks that it attaches pods to (docs/truenas.md)."""

    interface: LanInterface = Field(
        description="The host's interface in the LAN: the nodes get a second one, eth1, on it."
    )
    nodes: IPv4Range = Field(
        description="Addresses for eth1 of the nodes, a network inside the LAN; nobody else may "
        "use them."
    )
    networks: list[Attachment] = Field(description="The NetworkAttachmentDefinitions.")


class Network(Model):
    """The LAN, and what the cluster takes of it."""

    lan: Lan | None = Field(default=None, description="The LAN that the nodes are in.")
    metallb: MetalLB | None = Field(
        default=None, description="Addresses for Services of type LoadBalancer; none without it."
    )
    traefik: Traefik | None = Field(default=None, description="The ingress; none without it.")
    multus: Multus | None = Field(
        default=None,
        description="More networks for pods of a k3d cluster, above all the LAN; none without it.",
    )

    @property
    def namespaces(self) -> dict[str, Path]:
        """The namespaces that come with a component, by what brings it."""
        found: dict[str, Path] = {}
        if self.metallb is not None:
            found[METALLB_NAMESPACE] = ("network", "metallb")
        if self.traefik is not None:
            found[TRAEFIK_NAMESPACE] = ("network", "traefik")
        return found

    def problems(
        self, cluster: K3dCluster | K3sCluster | ExistingCluster, host: str | None = None
    ) -> Iterator[Problem]:
        """What is wrong across the fields, and between them, the cluster and the host's address."""
        if self.lan is not None:
            yield from self.lan.problems()
            if isinstance(cluster, K3dCluster):
                yield from self._apart_problems(self.lan, cluster)
        if self.multus is not None:
            yield from self._multus_problems(self.multus, cluster, host)
        if not isinstance(cluster, K3dCluster):
            yield from self._node_problems(cluster)
        if self.metallb is not None:
            yield from self._pool_problems(self.metallb, cluster)
            yield from self._interface_problems(self.metallb, cluster)
            yield from _rival_problems("servicelb", "metallb", cluster)
        if self.traefik is not None:
            yield from self._traefik_problems(self.traefik)
            yield from _rival_problems("traefik", "traefik", cluster)

    def _node_problems(self, cluster: K3sCluster | ExistingCluster) -> Iterator[Problem]:
        lan = self.lan
        seen: dict[str, Path] = {}
        addresses: list[tuple[Path, str]] = [
            (("cluster", "nodes", name, "address"), node.address)
            for name, node in cluster.nodes.items()
        ]
        if isinstance(cluster, K3sCluster) and cluster.virtual_ip:
            addresses.append((("cluster", "virtualIp", "address"), cluster.virtual_ip.address))
        for path, address in addresses:
            first = seen.setdefault(address, path)
            if first != path and path[1] == "nodes":
                yield Problem(
                    path,
                    address,
                    "an address of the node's own",
                    "write the address that `kubectl get nodes -o wide` shows",
                    f"is used twice: {key_path(first)} has it too",
                    [first],
                )
            if lan is None or IPv4Address(address) in VPN:
                continue
            subnet: Path = ("network", "lan", "subnet")
            if not Span.of(address).within(Span.of(lan.subnet)):
                yield Problem(
                    path,
                    address,
                    f"an address in homelab:network.lan.subnet, {lan.subnet}",
                    "correct it, or the subnet",
                    "lies outside homelab:network.lan.subnet",
                    [subnet],
                )
            if address == lan.gateway:
                yield Problem(
                    path,
                    address,
                    "an address other than the router's",
                    "correct one of the two",
                    "is homelab:network.lan.gateway",
                    [("network", "lan", "gateway")],
                )
            if (
                lan.dhcp is not None
                and Span.of(address).overlaps(Span.of(lan.dhcp))
                and address not in lan.reserved.values()
            ):
                yield Problem(
                    path,
                    address,
                    f"an address outside homelab:network.lan.dhcp, {lan.dhcp}, or one that the "
                    "router reserves",
                    "reserve it in the router and write it under homelab:network.lan.reserved, or "
                    "give the node another address",
                    "lies in homelab:network.lan.dhcp",
                    [("network", "lan", "dhcp"), ("network", "lan", "reserved")],
                )
        for key in ("pod_subnet", "service_subnet"):
            written = getattr(cluster, key)
            yaml_key = {"pod_subnet": "podSubnet", "service_subnet": "serviceSubnet"}[key]
            if lan is not None and Span.of(written).overlaps(Span.of(lan.subnet)):
                yield Problem(
                    ("cluster", yaml_key),
                    written,
                    f"a range apart from homelab:network.lan.subnet, {lan.subnet}",
                    "correct one of the two: a cluster whose own range covers the LAN cannot reach "
                    "the LAN",
                    "overlaps homelab:network.lan.subnet",
                    [("network", "lan", "subnet")],
                )

    def _pool_problems(
        self, metallb: MetalLB, cluster: K3dCluster | K3sCluster | ExistingCluster
    ) -> Iterator[Problem]:
        if self.lan is None and not isinstance(cluster, K3dCluster):
            yield Problem(
                ("network", "lan"),
                None,
                "subnet, gateway and DHCP range of the LAN wherever MetalLB gives out addresses",
                "add homelab:network.lan: only against it can a pool be checked",
                "is missing",
                [("network", "lan")],
            )
        if not metallb.pools:
            yield Problem(
                ("network", "metallb", "pools"),
                None,
                "at least one pool",
                "add a pool of addresses that nobody else uses",
                "names no pool",
            )
        home = self._home(cluster)
        claims = list(self._claims(cluster))
        names: dict[str, Path] = {}
        for index, pool in enumerate(metallb.pools):
            path: Path = ("network", "metallb", "pools", index, "addresses")
            span = Span.of(pool.addresses)
            if home is not None and not span.within(home.span):
                yield Problem(
                    path,
                    pool.addresses,
                    f"addresses in {home.owner}, {home.span}: ARP reaches no further",
                    f"choose addresses there, or correct {key_path(home.path or ())}",
                    f"lies outside {key_path(home.path or ())}",
                    home.involves,
                )
            else:
                for claim in claims:
                    if span.overlaps(claim.span):
                        yield Problem(
                            path,
                            pool.addresses,
                            f"addresses apart from {claim}",
                            "choose other addresses for the pool, or shrink the other range where "
                            "it is configured and then here",
                            f"overlaps {key_path(claim.path) if claim.path else claim.owner}",
                            claim.involves,
                        )
            claims.append(_Claim(span, f"pool {pool.name}", path))
            named: Path = (*path[:-1], "name")
            first = names.setdefault(pool.name, named)
            if first != named:
                yield Problem(
                    named,
                    pool.name,
                    "each name once",
                    "rename one of the two pools",
                    f"is used twice: {key_path(first)} has it too",
                    [first],
                )

    def _home(self, cluster: K3dCluster | K3sCluster | ExistingCluster) -> _Claim | None:
        """The network in which the nodes answer ARP."""
        if isinstance(cluster, K3dCluster):
            # The nodes are containers: what they announce reaches Docker's bridge and no further.
            return _Claim(
                Span.of(cluster.network.subnet),
                "the Docker network of the nodes",
                ("cluster", "network", "subnet"),
            )
        if self.lan is None:
            return None
        return _Claim(Span.of(self.lan.subnet), "the LAN", ("network", "lan", "subnet"))

    def _claims(self, cluster: K3dCluster | K3sCluster | ExistingCluster) -> Iterator[_Claim]:
        home = self._home(cluster)
        if home is not None:
            ends = (home.span.first, "its network address"), (home.span.last, "broadcast")
            for address, what in ends:
                yield _Claim(Span(address, address), f"{home.owner} itself: {what}", home.path)
        if isinstance(cluster, K3dCluster):
            yield _Claim(Span.of(cluster.pod_subnet), "the pods of k3s", ("cluster", "podSubnet"))
            yield _Claim(Span.of(_K3S_SERVICES), "the Services of k3s")
            # Docker gives addresses from the bottom: gateway, nodes, k3d's helpers.
            bottom = Span.of(cluster.network.subnet).first
            nodes = 1 + cluster.servers + cluster.agents + 2
            yield _Claim(Span(bottom + 1, bottom + nodes), "Docker's gateway and the nodes")
        else:
            for key, owner in (("podSubnet", "the pods"), ("serviceSubnet", "the Services")):
                subnet = cluster.pod_subnet if key == "podSubnet" else cluster.service_subnet
                yield _Claim(Span.of(subnet), owner, ("cluster", key))
            for name, node in cluster.nodes.items():
                path: Path = ("cluster", "nodes", name, "address")
                yield _Claim(Span.of(node.address), f"node {name}", path)
            if isinstance(cluster, K3sCluster) and cluster.virtual_ip:
                path = ("cluster", "virtualIp", "address")
                yield _Claim(Span.of(cluster.virtual_ip.address), "the API's virtual IP", path)
        lan = self.lan
        if lan is not None:
            yield _Claim(Span.of(lan.gateway), "the router", ("network", "lan", "gateway"))
            if lan.dhcp is not None:
                yield _Claim(
                    Span.of(lan.dhcp), "the router's DHCP server", ("network", "lan", "dhcp")
                )
            nodes_own = (
                set()
                if isinstance(cluster, K3dCluster)
                else {node.address for node in cluster.nodes.values()}
            )
            for name, address in lan.reserved.items():
                if address not in nodes_own:
                    yield _Claim(Span.of(address), name, ("network", "lan", "reserved", name))

    def _apart_problems(self, lan: Lan, cluster: K3dCluster) -> Iterator[Problem]:
        ranges: dict[Path, str] = {
            ("cluster", "network", "subnet"): cluster.network.subnet,
            ("cluster", "podSubnet"): cluster.pod_subnet,
        }
        for path, text in ranges.items():
            if Span.of(text).overlaps(Span.of(lan.subnet)):
                yield Problem(
                    path,
                    text,
                    f"a range apart from homelab:network.lan.subnet, {lan.subnet}",
                    "choose another private range: what it covers of the LAN is out of reach for "
                    "the cluster (Calico's own default, 192.168.0.0/16, covers most home LANs)",
                    "overlaps homelab:network.lan.subnet",
                    [("network", "lan", "subnet")],
                )

    def _multus_problems(
        self, multus: Multus, cluster: K3dCluster | K3sCluster | ExistingCluster, host: str | None
    ) -> Iterator[Problem]:
        here: Path = ("network", "multus")
        if not isinstance(cluster, K3dCluster):
            yield Problem(
                here,
                None,
                "nothing for a cluster of another kind than k3d, whose nodes' files and "
                "interfaces are not the stack's",
                "remove it, and install Multus as that cluster's own documentation says",
                "cannot be set up",
                [("cluster", "kind")],
            )
            return
        if cluster.cni_plugins is None:
            yield Problem(
                ("cluster", "cniPlugins"),
                None,
                "the directory of the host with the CNI reference plugins wherever "
                "homelab:network.multus is set: k3s's image has no macvlan, static or dhcp",
                "unpack a release of github.com/containernetworking/plugins into a directory of "
                "the host and name it",
                "is missing",
                [here],
            )
        if not multus.networks:
            yield Problem(
                (*here, "networks"),
                None,
                "at least one network",
                "add one, or remove homelab:network.multus",
                "names no network",
            )
        if self.lan is None:
            yield Problem(
                ("network", "lan"),
                None,
                "subnet, gateway and DHCP range of the LAN wherever pods are attached to it",
                "add homelab:network.lan: only against it can their addresses be checked",
                "is missing",
                [("network", "lan")],
            )
            return
        yield from self._attached_problems(multus, self.lan, cluster, host)

    def _attached_problems(
        self, multus: Multus, lan: Lan, cluster: K3dCluster, host: str | None
    ) -> Iterator[Problem]:
        subnet: Path = ("network", "lan", "subnet")
        home = _Claim(Span.of(lan.subnet), "the LAN", subnet)
        claims = list(self._claims_in_lan(lan, cluster, host))
        nodes: Path = ("network", "multus", "nodes")
        count = cluster.servers + cluster.agents
        if IPv4Network(multus.nodes).num_addresses < count:
            yield Problem(
                nodes,
                multus.nodes,
                f"a network of at least {count} addresses, one a node",
                "choose a larger one",
                involves=[("cluster", "servers"), ("cluster", "agents")],
            )
        yield from _range_problems(nodes, multus.nodes, home, claims)
        claims.append(_Claim(Span.of(multus.nodes), "the nodes", nodes))
        names: dict[tuple[str, str], Path] = {}
        for index, network in enumerate(multus.networks):
            path: Path = ("network", "multus", "networks", index)
            first = names.setdefault((network.namespace, network.name), path)
            if first != path:
                yield Problem(
                    (*path, "name"),
                    network.name,
                    "each name once in a namespace",
                    "rename one of the two networks",
                    f"is used twice: {key_path(first)} has it too",
                    [first],
                )
            yield from _attachment_problems(path, network, lan, count)
            if network.type == "macvlan":
                within = home
            elif network.subnet is not None:
                within = _Claim(Span.of(network.subnet), "its subnet", (*path, "subnet"))
                yield from _subnet_problems(within, network.subnet, lan, cluster, claims)
                claims.append(within)
            else:
                continue
            if network.ipam.range is not None:
                span: Path = (*path, "ipam", "range")
                others = [claim for claim in claims if claim is not within]
                yield from _range_problems(span, network.ipam.range, within, others)
                claims.append(_Claim(Span.of(network.ipam.range), f"network {network.name}", span))

    def _claims_in_lan(self, lan: Lan, cluster: K3dCluster, host: str | None) -> Iterator[_Claim]:
        """Who has addresses of the LAN, besides the networks of Multus."""
        whole = Span.of(lan.subnet)
        for address, what in ((whole.first, "its network address"), (whole.last, "broadcast")):
            path: Path = ("network", "lan", "subnet")
            yield _Claim(Span(address, address), f"the LAN itself: {what}", path)
        yield _Claim(Span.of(lan.gateway), "the router", ("network", "lan", "gateway"))
        if lan.dhcp is not None:
            yield _Claim(Span.of(lan.dhcp), "the router's DHCP server", ("network", "lan", "dhcp"))
        for name, address in lan.reserved.items():
            yield _Claim(Span.of(address), name, ("network", "lan", "reserved", name))
        if host is not None and is_ipv4(host) and host not in lan.reserved.values():
            yield _Claim(Span.of(host), "the host", ("host", "address"))
        for index, resolver in enumerate(cluster.resolvers):
            if is_ipv4(resolver) and resolver != lan.gateway:
                path = ("cluster", "resolvers", index)
                yield _Claim(Span.of(resolver), "a DNS server", path)
        for index, pool in enumerate(self.metallb.pools if self.metallb else ()):
            path = ("network", "metallb", "pools", index, "addresses")
            yield _Claim(Span.of(pool.addresses), f"pool {pool.name}", path)

    def _interface_problems(
        self, metallb: MetalLB, cluster: K3dCluster | K3sCluster | ExistingCluster
    ) -> Iterator[Problem]:
        if isinstance(cluster, K3dCluster):
            # Docker names it so in every container.
            known, involves = {"eth0"}, []
        else:
            known = {node.interface for node in cluster.nodes.values() if node.interface}
            involves = [("cluster", "nodes", name, "interface") for name in cluster.nodes]
        for index, interface in enumerate(metallb.interfaces):
            if interface not in known:
                shown = ", ".join(sorted(known)) or "none: no node names its interface"
                yield Problem(
                    ("network", "metallb", "interfaces", index),
                    interface,
                    f"an interface of a node ({shown})",
                    "correct it, or write it under homelab:cluster.nodes.<node>.interface: an "
                    "interface that no node has announces nothing",
                    "is no node's interface",
                    involves,
                )

    def _traefik_problems(self, traefik: Traefik) -> Iterator[Problem]:
        path: Path = ("network", "traefik", "address")
        if self.metallb is None:
            yield Problem(
                ("network", "metallb"),
                None,
                "a pool that holds homelab:network.traefik.address",
                "add homelab:network.metallb: without it Traefik's Service gets no address",
                "is missing",
                [("network", "metallb")],
            )
            return
        pools = self.metallb.pools
        if not any(Span.of(traefik.address).within(Span.of(pool.addresses)) for pool in pools):
            yield Problem(
                path,
                traefik.address,
                "an address of a pool in homelab:network.metallb.pools",
                "choose one of a pool's, or widen a pool",
                "lies in no pool of homelab:network.metallb.pools",
                [("network", "metallb", "pools")],
            )


def _rival_problems(
    part: Literal["servicelb", "traefik"],
    setting: str,
    cluster: K3dCluster | K3sCluster | ExistingCluster,
) -> Iterator[Problem]:
    """k3s brings its own of both. Of an existing cluster the live one is asked."""
    if not isinstance(cluster, ExistingCluster) and part not in cluster.disable:
        yield Problem(
            ("cluster", "disable"),
            None,
            f"a list with {part} wherever homelab:network.{setting} is set: k3s's own {part} would "
            "answer for the same Services",
            f"add {part} to homelab:cluster.disable, or remove homelab:network.{setting}",
            f"lacks {part}",
            [("network", setting)],
        )


def _range_problems(
    path: Path, text: str, home: _Claim, claims: Iterable[_Claim]
) -> Iterator[Problem]:
    """A range that lies outside its home or has an address of someone else's."""
    span = Span.of(text)
    if not span.within(home.span):
        yield Problem(
            path,
            text,
            f"addresses in {home.owner}, {home.span}",
            f"choose addresses there, or correct {key_path(home.path or ())}",
            f"lies outside {key_path(home.path or ())}",
            home.involves,
        )
        return
    for claim in claims:
        if span.overlaps(claim.span):
            yield Problem(
                path,
                text,
                f"addresses apart from {claim}",
                "choose other addresses, or shrink the other range where it is configured and "
                "then here",
                f"overlaps {key_path(claim.path) if claim.path else claim.owner}",
                claim.involves,
            )


def _subnet_problems(
    subnet: _Claim, text: str, lan: Lan, cluster: K3dCluster, claims: Iterable[_Claim]
) -> Iterator[Problem]:
    """A bridge's own subnet, which everything else is routed around."""
    taken = [
        _Claim(Span.of(lan.subnet), "the LAN", ("network", "lan", "subnet")),
        _Claim(Span.of(cluster.pod_subnet), "the pods of k3s", ("cluster", "podSubnet")),
        _Claim(Span.of(_K3S_SERVICES), "the Services of k3s"),
        _Claim(
            Span.of(cluster.network.subnet),
            "the Docker network of the nodes",
            ("cluster", "network", "subnet"),
        ),
        *(claim for claim in claims if claim.owner == subnet.owner),
    ]
    assert subnet.path is not None
    yield from _range_problems(subnet.path, text, subnet, taken)


def _attachment_problems(
    path: Path, network: Attachment, lan: Lan, nodes: int
) -> Iterator[Problem]:
    """What does not go together in one network."""
    kind, ipam = network.type, network.ipam
    if (kind == "bridge") != (network.subnet is not None):
        yield Problem(
            (*path, "subnet"),
            network.subnet,
            "a subnet with type bridge, and none with macvlan, whose subnet is the LAN's",
            "add it" if kind == "bridge" else "remove it",
            "is missing" if kind == "bridge" else "has no effect",
            [(*path, "type")],
        )
    if (ipam.type == "dhcp") == (ipam.range is not None):
        dhcp = ipam.type == "dhcp"
        yield Problem(
            (*path, "ipam", "range"),
            ipam.range,
            "a range with host-local and static, which would otherwise hand out the router's, the "
            "DHCP server's and everybody's addresses; none with dhcp",
            "remove it" if dhcp else "write one that nobody else uses: FIRST-LAST",
            "has no effect" if dhcp else "is missing",
            [(*path, "ipam", "type")],
        )
    if ipam.type == "dhcp" and (kind == "bridge" or lan.dhcp is None):
        yield Problem(
            (*path, "ipam", "type"),
            ipam.type,
            "host-local or static where no DHCP server answers: on a bridge, and in a LAN without "
            "homelab:network.lan.dhcp",
            "choose one of those, or write the range that the LAN's DHCP server hands out",
            involves=[(*path, "type"), ("network", "lan", "dhcp")],
        )
    if ipam.type == "host-local" and kind == "macvlan" and nodes > 1:
        yield Problem(
            (*path, "ipam", "type"),
            ipam.type,
            "static or dhcp in a cluster of several nodes: host-local counts on each node for "
            "itself, and two nodes give out the same address",
            "choose one of those, or one server without agents",
            involves=[("cluster", "servers"), ("cluster", "agents")],
        )
