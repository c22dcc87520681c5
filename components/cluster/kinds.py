"""The kinds of cluster: how each is read before anything is registered, and what it declares."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import pulumi

import homelab
from components import settings
from components.cluster import Cluster
from components.cluster.existing import ExistingCluster, ExistingClusterArgs, LiveExisting
from components.cluster.k3s import K3sCluster, K3sClusterArgs, LiveK3s
from components.host import Connection, Host, Reading, together
from components.network.calico import Calico, CalicoArgs
from components.storage.local import LocalStorage, LocalStorageArgs
from components.units import LiveUnits, Units, UnitsArgs

if TYPE_CHECKING:
    import pulumi_docker as docker

    from components.cluster.k3d import LiveCluster


@dataclass(frozen=True)
class Declared:
    """A cluster, or none, its output for consumers, its kubeconfig as text, which is secret, how
    its acceptance went where its kind has one, and when its backups were proved.
    """

    cluster: Cluster | None = None
    output: pulumi.Output[homelab.Cluster] | None = None
    kubeconfig: pulumi.Output[str] | None = None
    acceptance: pulumi.Output[homelab.Acceptance] | None = None
    backups: Mapping[str, Mapping[str, homelab.VerifiedRestore]] | None = None


class Kind(Protocol):
    """A cluster as it was read. ``kubeconfig`` is the way in where the host has no node of it."""

    @property
    def answers(self) -> bool: ...

    @property
    def kubeconfig(self) -> str | None: ...

    @property
    def nodes(self) -> Mapping[str, Connection]:
        """Its nodes that can be looked at, by name."""
        ...

    def announce(self) -> None: ...

    def declare(self, host: Host, engine: "docker.Provider | None") -> Declared: ...


def read(stack: settings.Settings, connection: Connection) -> Reading[Kind]:
    """Asks for the live cluster. Raises HostError as its kind does."""
    if isinstance(stack.cluster, settings.ExistingCluster):
        existing = yield from LiveExisting.read(stack.cluster, stack.network, connection)
        return _Existing(stack.cluster, stack.host, existing, connection)
    if isinstance(stack.cluster, settings.K3sCluster):
        connections = connections_of(stack.cluster, stack.host, connection)
        k3s = yield from LiveK3s.read(stack.cluster, connection, connections)
        units = None
        if stack.has_units and k3s.nodes[stack.cluster.names("server")[0]].state != "unknown":
            units = yield from LiveUnits.read(stack)
        return _K3s(stack, stack.cluster, k3s, units, connection, connections)
    if not stack.has_cluster:
        return _Off(stack.cluster)
    # Not above: Docker's package costs time, and only who has a cluster in it pays.
    from components.cluster.k3d import LiveCluster

    live, units = yield from together(
        LiveCluster.read(stack.cluster, network=stack.network, installs_k3d=stack.host.k3d.install),
        LiveUnits.read(stack),
    )
    return _K3d(stack, stack.cluster, connection.name, live, units)


class _Off:
    """A cluster that the settings describe and do not want yet, or no longer."""

    answers = False
    kubeconfig = None
    nodes: Mapping[str, Connection] = MappingProxyType({})

    def __init__(self, cluster: settings.K3dCluster) -> None:
        self._name = cluster.name

    def announce(self) -> None:
        pulumi.log.info(
            f"cluster {self._name} is off (homelab:cluster.enabled): neither it nor what would live"
            " in it is declared"
        )

    def declare(self, host: Host, engine: "docker.Provider | None") -> Declared:
        return Declared()


class _K3d:
    kubeconfig = None

    def __init__(
        self,
        stack: settings.Settings,
        cluster: settings.K3dCluster,
        host: str,
        live: "LiveCluster",
        units: LiveUnits,
    ) -> None:
        self._stack, self._cluster, self._host = stack, cluster, host
        self._live, self._units = live, units

    @property
    def answers(self) -> bool:
        return self._live.state == "running"

    @property
    def nodes(self) -> Mapping[str, Connection]:
        # They are containers: what they lack is a matter of their image.
        return {}

    def announce(self) -> None:
        self._live.announce(self._cluster, self._host)
        self._units.announce(self._host)

    def declare(self, host: Host, engine: "docker.Provider | None") -> Declared:
        from components.cluster.k3d import K3dCluster, K3dClusterArgs
        from components.cluster.kubeconfig import Kubeconfig, KubeconfigArgs

        assert engine is not None
        name, live = self._cluster.name, self._live
        args = K3dClusterArgs(self._cluster, live, host, engine, self._stack.network)
        k3d = K3dCluster(name, args)
        kubeconfig = Kubeconfig(name, KubeconfigArgs(self._cluster, live, host, k3d))
        cluster = Cluster(
            name=name,
            provider=kubeconfig.provider,
            identity=k3d.identity,
            kubeconfig=kubeconfig.path,
            host=host,
            incarnation=live.incarnation,
            anew=live.anew,
        )
        pod_network = []
        if self._cluster.cni == "calico":
            pod_network.append(Calico(name, CalicoArgs(self._cluster.pod_subnet, cluster)))
        LocalStorage(name, LocalStorageArgs(self._cluster.storage_class, cluster))
        Units(name, UnitsArgs(self._stack, self._units, host, after=[k3d]))
        return Declared(
            cluster,
            k3d.output,
            kubeconfig.content,
            k3d.accept(pod_network),
            self._units.output or None,
        )


class _Existing:
    def __init__(
        self,
        cluster: settings.ExistingCluster,
        host: settings.Host,
        live: LiveExisting,
        connection: Connection,
    ) -> None:
        self._cluster, self._live = cluster, live
        self._nodes = {
            name: connection for name, node in cluster.nodes.items() if node.address == host.address
        }

    @property
    def answers(self) -> bool:
        return self._live.state == "reachable"

    @property
    def kubeconfig(self) -> str | None:
        return self._live.kubeconfig

    @property
    def nodes(self) -> Mapping[str, Connection]:
        return self._nodes

    def announce(self) -> None:
        self._live.announce(self._cluster)

    def declare(self, host: Host, engine: "docker.Provider | None") -> Declared:
        made = ExistingCluster(
            self._cluster.name, ExistingClusterArgs(self._cluster, self._live, host)
        )
        return Declared(made.cluster, made.output, made.kubeconfig)


def connections_of(
    cluster: settings.K3sCluster, host: settings.Host, connection: Connection
) -> dict[str, Connection]:
    """The way to each node; one that is the stack's host is reached as that."""
    logins = {name: cluster.login(name, host) for name in cluster.nodes}
    return {
        name: connection if login is host else Connection(login) for name, login in logins.items()
    }


class _K3s:
    def __init__(
        self,
        stack: settings.Settings,
        cluster: settings.K3sCluster,
        live: LiveK3s,
        units: LiveUnits | None,
        connection: Connection,
        connections: Mapping[str, Connection],
    ) -> None:
        self._stack, self._cluster, self._live, self._units = stack, cluster, live, units
        self._connection, self._connections = connection, connections

    @property
    def answers(self) -> bool:
        return self._live.kubeconfig is not None

    @property
    def kubeconfig(self) -> str | None:
        return self._live.kubeconfig

    @property
    def nodes(self) -> Mapping[str, Connection]:
        return {
            name: connection
            for name, connection in self._connections.items()
            if self._live.nodes[name].state != "unknown"
        }

    def announce(self) -> None:
        self._live.announce(self._cluster)
        if self._units:
            self._units.announce(self._connection.name)

    def declare(self, host: Host, engine: "docker.Provider | None") -> Declared:
        hosts = {
            name: host if connection is self._connection else Host(name, connection, node=name)
            for name, connection in self._connections.items()
        }
        args = K3sClusterArgs(self._cluster, self._live, host, hosts)
        made = K3sCluster(self._cluster.name, args)
        if self._stack.has_units:
            # Of a first server that does not answer nothing is known; an up is refused.
            units = self._units or LiveUnits("systemd", 0)
            Units(self._cluster.name, UnitsArgs(self._stack, units, host, after=[made]))
        backups = self._units.output if self._units else None
        return Declared(made.cluster, made.output, made.kubeconfig, backups=backups or None)
