"""A cluster of k3s on machines of its own: nodes reached over SSH, token, datastore, API."""

import re
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, ip_network
from typing import Annotated, Any, Literal

from pydantic import Field

from components import versions
from components.settings.audit import Audit
from components.settings.cluster import ClusterName
from components.settings.existing import Interface, IPv4, IPv4Range
from components.settings.host import Address, DownloadUrl, Host, Jump, Sha256
from components.settings.model import (
    AbsolutePath,
    Account,
    Cron,
    Model,
    Name,
    Number,
    ObjectName,
    OpaqueSecret,
    OperatorPath,
    Port,
    SecretFile,
    Text,
    is_host,
)
from components.settings.problem import HIDDEN, Path, Problem, key_path

VPN = IPv4Network("100.64.0.0/10")
"""What Tailscale gives addresses from (RFC 6598)."""

OIDC_PREFIX = "oidc:"

# A label's value (apimachinery's IsValidLabelValue), and a key with its domain (IsQualifiedName).
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_VALUE = rf"(?:{_NAME})?"
_QUALIFIED = rf"(?:[a-z0-9](?:[a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_NAME}"
# What the kubelet may not give itself (NodeRestriction).
_RESERVED_LABEL = re.compile(r"(?:.*\.)?(?:kubernetes|k8s)\.io/.*")


K3sVersion = Annotated[
    str,
    Text(
        "a release of k3s such as " + versions.K3S.partition(":")[2].replace("-", "+"),
        "write the release with its v and +k3s: without them another one, or none, is installed",
        versions.K3S.partition(":")[2].replace("-", "+"),
        r"v1\.[0-9]{1,3}\.[0-9]{1,3}\+k3s[1-9][0-9]?",
    ),
]
Label = Annotated[
    str,
    Text(
        "a label's key that a node may give itself, [prefix/]name, not of kubernetes.io or k8s.io",
        "choose a prefix of your own; a role is set with kubectl label",
        "example.org/disk",
        _QUALIFIED,
        lambda key: _RESERVED_LABEL.fullmatch(key) is None,
    ),
]
LabelValue = Annotated[
    str,
    Text("a label's value, at most 63 letters, digits, - _ .", "shorten it", "ssd", _VALUE),
]
Taint = Annotated[
    str,
    Text(
        "key=value:NoSchedule, :PreferNoSchedule or :NoExecute",
        "write key, value and effect",
        "example.org/storage=only:NoSchedule",
        rf"{_QUALIFIED}={_VALUE}:(?:NoSchedule|PreferNoSchedule|NoExecute)",
    ),
]
ApiName = Annotated[
    str,
    Text(
        "a host name or IP address that clients reach, without scheme or port, not loopback",
        "write the address for the kubeconfig (incident 14)",
        "10.0.0.10",
        r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?",
        lambda name: is_host(name) and not name.startswith("127.") and name != "localhost",
    ),
]
JoinToken = Annotated[
    OpaqueSecret,
    Text(
        "16 or more letters, digits, - and _, or a whole K10...::server:... of a cluster that is "
        "there",
        "make one: python3 -c 'import secrets; print(secrets.token_hex(32))'",
        "made-up-example-token",
        r"(?:K10[0-9a-f]{64}::server:)?[A-Za-z0-9_-]{16,256}",
    ),
]
Bucket = Annotated[
    str,
    Text("the name of a bucket", "write it as the store has it", "tower", r"[a-z0-9][a-z0-9.-]*"),
]
Endpoint = Annotated[
    str,
    Text(
        "host or host:port of an S3 store, without scheme",
        "write the address alone",
        "s3.example.org",
        r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?",
    ),
]
Issuer = Annotated[
    str,
    Text(
        "an https URL without query",
        "write the issuer as the provider's /.well-known/openid-configuration has it",
        "https://keycloak.example.org/realms/home",
        r"https://[A-Za-z0-9.-]+(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~/-]*)?",
    ),
]
Claim = Annotated[
    str,
    Text(
        "the name of a claim: letters, digits, - and _",
        "write it as the provider's tokens have it",
        "preferred_username",
        r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}",
    ),
]
ClientId = Annotated[
    str,
    Text(
        "a client's id, without blanks",
        "write it as the provider has it",
        "kubernetes",
        r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,252}",
    ),
]
Seconds = Annotated[
    int, Number("30 to 7200 seconds", "write a number in that range, without quotes", 600, 30, 7200)
]
Count = Annotated[
    int, Number("1 to 1000", "write a number in that range, without quotes", 5, 1, 1000)
]
Part = Literal["traefik", "servicelb", "local-storage", "metrics-server", "coredns"]


class Ssh(Model):
    """How a node is reached where that differs from `homelab:host`."""

    address: Address | None = Field(
        default=None, description="Name or address to log in at; the node's own by default."
    )
    user: Account | None = Field(default=None, description="Whom to log in as.")
    port: Port | None = Field(default=None, description="Port of its SSH server.")
    jump: Jump | None = Field(default=None, description="Jump host on the way.")
    known_hosts: OperatorPath | None = Field(
        default=None, description="File with the node's host key."
    )
    identity_file: OperatorPath | None = Field(default=None, description="Private key.")
    sudo: bool | None = Field(
        default=None, strict=True, description="Run its commands as root by `sudo -n`."
    )


class K3sNode(Model):
    """A machine of the cluster."""

    role: Literal["server", "agent"] = Field(
        description="`server` has the API and the datastore and runs workloads too; `agent` runs "
        "workloads."
    )
    address: IPv4 = Field(
        description="Its address for the other nodes (node-ip), in the LAN or in the VPN."
    )
    interface: Interface | None = Field(
        default=None,
        description="The interface that holds the address, for Flannel (flannel-iface). Required "
        "in a VPN: tailscale0.",
    )
    ssh: Ssh = Field(
        default=Ssh(), description="How it is reached, where that differs from homelab:host."
    )
    labels: dict[Label, LabelValue] = Field(
        default={}, description="Its labels when it joins; later kubectl label changes them."
    )
    taints: list[Taint] = Field(
        default=[], description="Its taints when it joins; later kubectl taint changes them."
    )


class JoinTokenSource(Model):
    """The secret that lets a machine join: `value` or `file`."""

    value: JoinToken | None = Field(
        default=None,
        description="Encrypted: pulumi config set --secret --path 'homelab:cluster.token.value'.",
    )
    file: SecretFile | None = Field(
        default=None, description="Decrypted file that holds it (agenix, sops-nix)."
    )
    read_on: Literal["host", "here"] = Field(
        default="host",
        description="Which machine has the file: the `host`, or the one that runs Pulumi (`here`).",
    )


class VirtualIp(Model):
    """An address that the servers hold in turn, by kube-vip over ARP."""

    address: IPv4 = Field(description="The address; nobody else in the LAN has it.")
    interface: Interface = Field(description="The servers' interface in the LAN.")


class Oidc(Model):
    """The OpenID provider whose word the API server takes for who somebody is.

    Names and groups get the prefix ``oidc:``: without it a provider could say system:masters.
    """

    issuer: Issuer = Field(description="The provider, as its tokens name it.")
    client_id: ClientId = Field(description="The client that its tokens are for.")
    username_claim: Claim = Field(
        default="sub", description="What of a token is the user's name, after oidc:."
    )
    groups_claim: Claim = Field(
        default="groups", description="What of a token are the user's groups, each after oidc:."
    )

    def arguments(self) -> dict[str, str]:
        """The API server's arguments."""
        return {
            "oidc-issuer-url": self.issuer,
            "oidc-client-id": self.client_id,
            "oidc-username-claim": self.username_claim,
            "oidc-username-prefix": OIDC_PREFIX,
            "oidc-groups-claim": self.groups_claim,
            "oidc-groups-prefix": OIDC_PREFIX,
        }


class K3sApi(Model):
    """The Kubernetes API as clients reach it."""

    server: ApiName | None = Field(
        default=None,
        description="Address in the kubeconfig; the virtual IP where there is one, else the first "
        "server's address.",
    )
    tls_san: list[ApiName] = Field(
        default=[],
        description="Names and addresses in the API's certificate besides each server's own. The "
        "virtual IP and homelab:cluster.api.server belong here.",
    )
    oidc: Oidc | None = Field(
        default=None, description="Logins by an OpenID provider; none where left out."
    )


class SnapshotStore(Model):
    """An S3 bucket for snapshots."""

    endpoint: Endpoint = Field(description="The store.")
    bucket: Bucket = Field(description="Its bucket.")
    folder: Name | None = Field(default=None, description="A folder in it.")
    region: Name | None = Field(default=None, description="Its region.")
    access_key: OpaqueSecret = Field(description="Its access key, encrypted.")
    secret_key: OpaqueSecret = Field(description="Its secret key, encrypted.")


class Snapshots(Model):
    """Snapshots of embedded etcd, made by every server on a schedule."""

    schedule: Cron = Field(default="0 */12 * * *", description="When, as cron writes it.")
    retention: Count = Field(default=5, description="How many each server keeps.")
    directory: AbsolutePath | None = Field(
        default=None,
        description="Where they are kept on the servers, for example a mounted NFS share; k3s's "
        "own directory by default.",
    )
    s3: SnapshotStore | None = Field(default=None, description="A bucket that has them as well.")


class K3sCluster(Model):
    """A cluster of k3s, installed on its nodes over SSH."""

    kind: Literal["k3s"] = Field(description="k3s on machines of its own, over SSH.")
    name: ClusterName = Field(description="Name of the cluster.")
    version: K3sVersion = Field(
        description="The release on every node. A newer patch, or the next minor."
    )
    url: DownloadUrl | None = Field(
        default=None, description="Where the file k3s is, in place of the release on github.com."
    )
    sha256: Sha256 | None = Field(
        default=None, description="Its sha256; by default that of the release's own list."
    )
    nodes: dict[Name, K3sNode] = Field(
        description="Its machines by node name. The first server makes the cluster, the others "
        "join one after another."
    )
    datastore: Literal["sqlite", "etcd"] = Field(
        default_factory=lambda seen: _datastore_of(seen),
        description="`sqlite` for one server, `etcd` (embedded) for an odd number. Default: by the "
        "number of servers.",
    )
    token: JoinTokenSource = Field(description="The secret with which machines join.")
    api: K3sApi = Field(default=K3sApi(), description="The API as clients reach it.")
    virtual_ip: VirtualIp | None = Field(
        default=None, description="An address that outlives a server; none where left out."
    )
    disable: list[Part] = Field(default=[], description="What k3s brings and shall not run.")
    pod_subnet: IPv4Range = Field(default="10.42.0.0/16", description="The range of its pods.")
    service_subnet: IPv4Range = Field(
        default="10.43.0.0/16", description="The range of its Services."
    )
    storage_class: ObjectName = Field(
        default="local-path",
        description="Its default storage class, for volumes that name none.",
    )
    secrets_encryption: bool = Field(
        default=False, strict=True, description="Encrypt Secrets in the datastore."
    )
    snapshots: Snapshots | None = Field(
        default=None, description="Scheduled snapshots of etcd; k3s's own schedule if left out."
    )
    audit: Audit | None = Field(default=None, description="Audit log; none where left out.")
    ready_seconds: Seconds = Field(
        default=600, description="How long a node may take until it is Ready."
    )
    drain_seconds: Seconds = Field(
        default=300, description="How long pods may take to leave a node."
    )
    confirm: ClusterName | None = Field(
        default=None,
        description="The cluster's name, typed, confirms what is not done in passing: that its "
        "datastore is converted to the declared one, and that a k3s which get.k3s.io installed is "
        "taken over.",
    )
    delete: ClusterName | None = Field(
        default=None,
        description="The cluster's name, typed, lets `pulumi destroy` uninstall it.",
    )

    def names(self, role: Literal["server", "agent"]) -> list[str]:
        """Its servers or its agents, in the order of the settings."""
        return [name for name, node in self.nodes.items() if node.role == role]

    @property
    def server(self) -> str:
        """The API's address for clients."""
        if self.api.server:
            return self.api.server
        if self.virtual_ip:
            return self.virtual_ip.address
        return self.nodes[self.names("server")[0]].address

    def login(self, name: str, host: Host) -> Host:
        """How a node is reached: as ``host`` is, at the node's own address, unless its `ssh` says
        otherwise. ``host`` itself where that is the same machine.
        """
        node = self.nodes[name]
        base = (
            {"user": host.user, "port": host.port, "jump": host.jump, "sudo": host.sudo}
            | {"known_hosts": host.known_hosts, "identity_file": host.identity_file}
            if host.connection == "ssh"
            else {}
        )
        own = {key: value for key, value in node.ssh.model_dump().items() if value is not None}
        login = Host.model_validate(
            {"address": node.address, **base, **own, "connection": "ssh", "hostctl": host.hostctl},
            by_name=True,
        )
        place = ("connection", "address", "port")
        same = all(getattr(login, key) == getattr(host, key) for key in place)
        return host if same else login

    @property
    def warnings(self) -> Iterator[str]:
        """What is allowed and likely not meant."""
        servers = [self.nodes[name] for name in self.names("server")]
        if len(servers) > 1 and any(IPv4Address(one.address) in VPN for one in servers):
            yield (
                "homelab:cluster.nodes: several servers across a VPN: etcd wants less than 10 ms "
                "between its members, above 50 it falters, above 100 it breaks, and k3s does not "
                "support it across sites: keep the servers at one site and agents elsewhere, or "
                "run a cluster a site (docs/tower.md)."
            )
        if len(servers) > 1 and self.server in {one.address for one in servers}:
            yield (
                f"homelab:cluster.api.server: {self.server} is one of {len(servers)} servers: when "
                "it is away, no client reaches the others: set homelab:cluster.virtualIp, or a "
                "name that leads to all."
            )

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        yield from self._server_problems()
        yield from self._token_problems()
        yield from self._api_problems()
        yield from self._address_problems()
        yield from self._vpn_problems()
        yield from self._snapshot_problems()
        if self.audit is not None:
            yield from self.audit.problems(("cluster", "audit"))
        for key in ("confirm", "delete"):
            typed = getattr(self, key)
            if typed is not None and typed != self.name:
                yield Problem(
                    ("cluster", key),
                    typed,
                    f"the cluster's name, {self.name}",
                    "type the name of the cluster that is meant, or remove it",
                    involves=[("cluster", "name")],
                )

    def _server_problems(self) -> Iterator[Problem]:
        servers = self.names("server")
        involves: list[Path] = [("cluster", "nodes"), ("cluster", "datastore")]
        if not servers:
            what = "has agents and no server" if self.nodes else "names no node"
            yield Problem(
                ("cluster", "nodes"),
                None,
                "one server, or an odd number of servers, and any number of agents",
                "give one node role server: an agent needs one to join",
                what,
                involves,
            )
        elif self.datastore == "etcd" and len(servers) % 2 == 0:
            yield Problem(
                ("cluster", "nodes"),
                None,
                "an odd number of servers (1, 3, 5, 7) with etcd",
                f"add or remove a server: {len(servers)} bear the loss of no more servers than "
                f"{len(servers) - 1}",
                f"has {len(servers)} servers",
                involves,
            )
        elif self.datastore == "sqlite" and len(servers) > 1:
            yield Problem(
                ("cluster", "datastore"),
                self.datastore,
                "etcd where there is more than one server: SQLite is a file of one",
                "set it to etcd, or make the others agents",
                f"cannot have {len(servers)} servers",
                involves,
            )

    def _token_problems(self) -> Iterator[Problem]:
        sources: list[Path] = [("cluster", "token", key) for key in ("value", "file")]
        given = [self.token.value, self.token.file]
        if all(given):
            yield Problem(
                sources[1],
                HIDDEN,
                "either value or file",
                "keep one of the two",
                "is one source too many",
                sources,
            )
        elif not any(given):
            yield Problem(
                ("cluster", "token"),
                None,
                "value or file",
                "name the decrypted file, or encrypt the token: pulumi config set --secret --path "
                "'homelab:cluster.token.value'",
                "has no source",
                sources,
            )

    def _api_problems(self) -> Iterator[Problem]:
        own = {self.nodes[name].address for name in self.names("server")}
        wanted: list[tuple[Path, str]] = []
        if self.virtual_ip:
            wanted.append((("cluster", "virtualIp", "address"), self.virtual_ip.address))
        if self.api.server and (not wanted or self.api.server != wanted[0][1]):
            wanted.append((("cluster", "api", "server"), self.api.server))
        for path, name in wanted:
            if name not in self.api.tls_san and (own and name not in own):
                yield Problem(
                    ("cluster", "api", "tlsSan"),
                    None,
                    f"a list with {name}, which {key_path(path)} makes clients use",
                    f"add {name}: without it no client trusts the API at that address",
                    f"lacks {name}",
                    [path, ("cluster", "nodes")],
                )
        if self.virtual_ip:
            known = {self.nodes[name].interface for name in self.names("server")} - {None}
            if known and self.virtual_ip.interface not in known:
                yield Problem(
                    ("cluster", "virtualIp", "interface"),
                    self.virtual_ip.interface,
                    f"an interface of a server ({', '.join(sorted(filter(None, known)))})",
                    "correct it, or the server's interface: on an interface that no server has, "
                    "nobody answers for the address",
                    "is no server's interface",
                    [("cluster", "nodes")],
                )

    def _address_problems(self) -> Iterator[Problem]:
        logins: dict[tuple[str, int | None], Path] = {}
        for name, node in self.nodes.items():
            path: Path = ("cluster", "nodes", name)
            login = (node.ssh.address or node.address, node.ssh.port)
            first = logins.setdefault(login, path)
            # A node's own address that is there twice is told by the network.
            if first != path and (node.ssh.address or self._ssh_address(first)):
                yield Problem(
                    (*path, "ssh", "address"),
                    login[0],
                    "a machine of the node's own",
                    "correct the address or port of one of the two",
                    f"is used twice: {key_path(first)} is reached there too",
                    [(*first, "ssh", "address")],
                )
        spans: list[tuple[Path, str, Any]] = [
            (("cluster", "podSubnet"), self.pod_subnet, ip_network(self.pod_subnet)),
            (("cluster", "serviceSubnet"), self.service_subnet, ip_network(self.service_subnet)),
        ]
        for name, node in self.nodes.items():
            address = node.address
            spans.append((("cluster", "nodes", name, "address"), address, ip_network(address)))
        if self.virtual_ip:
            address = self.virtual_ip.address
            spans.append((("cluster", "virtualIp", "address"), address, ip_network(address)))
        for index, (path, written, network) in enumerate(spans):
            for other, other_written, other_network in spans[:index]:
                if path[1] == "nodes" and other[1] == "nodes":
                    continue
                if network.overlaps(other_network):
                    yield Problem(
                        path,
                        written,
                        f"apart from {key_path(other)}, {other_written}",
                        "correct one of the two: nodes, pods and Services each have addresses of "
                        "their own",
                        f"overlaps {key_path(other)}",
                        [other],
                    )

    def _ssh_address(self, path: Path) -> str | None:
        return self.nodes[str(path[2])].ssh.address

    def _vpn_problems(self) -> Iterator[Problem]:
        inside = {name for name, one in self.nodes.items() if IPv4Address(one.address) in VPN}
        for name, node in self.nodes.items():
            path: Path = ("cluster", "nodes", name)
            if name in inside and node.interface is None:
                yield Problem(
                    (*path, "interface"),
                    None,
                    "the VPN's interface on every node of a VPN, servers and agents",
                    "add interface: tailscale0, or Flannel sends pods' traffic by the interface of "
                    "the default route",
                    "is missing",
                    [(*path, "address")],
                )
            elif inside and name not in inside:
                yield Problem(
                    (*path, "address"),
                    node.address,
                    f"an address in the VPN, {VPN}, as other nodes have",
                    "join the machine to the VPN and write its address there: nodes elsewhere "
                    "cannot reach this one",
                    "lies outside the VPN",
                    [("cluster", "nodes", one, "address") for one in sorted(inside)],
                )
        if inside and self.virtual_ip:
            yield Problem(
                ("cluster", "virtualIp"),
                None,
                "no virtual IP where nodes are in a VPN: ARP does not cross it",
                "remove it, and name a server or a DNS name in homelab:cluster.api.server",
                "reaches nobody",
                [("cluster", "nodes")],
            )

    def _snapshot_problems(self) -> Iterator[Problem]:
        if self.snapshots is not None and self.datastore == "sqlite":
            yield Problem(
                ("cluster", "snapshots"),
                None,
                "snapshots with datastore etcd alone: k3s makes none of SQLite",
                "remove it, or set homelab:cluster.datastore to etcd; an upgrade copies SQLite "
                "before it begins, whatever is written here",
                "has no effect",
                [("cluster", "datastore"), ("cluster", "nodes")],
            )


def _datastore_of(cluster: dict[str, Any]) -> Literal["sqlite", "etcd"]:
    nodes = cluster.get("nodes") or {}
    servers = [one for one in nodes.values() if one.role == "server"]
    return "etcd" if len(servers) > 1 else "sqlite"
