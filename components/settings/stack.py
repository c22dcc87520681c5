"""The settings of a stack as a whole, and the rules between its sections."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Annotated, Any, TypeAlias

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    ValidationInfo,
    model_validator,
)

from components.settings.access import ClusterAccess
from components.settings.argocd import ArgoCD
from components.settings.cluster import K3dCluster, StorageClass
from components.settings.existing import ExistingCluster
from components.settings.host import Host
from components.settings.k3s import OIDC_PREFIX, K3sCluster
from components.settings.model import Model, Name, ObjectName, ObjectReference
from components.settings.namespace import (
    Namespace,
    OwnPod,
    PodSecurity,
    PodSecurityLevel,
    rollout_pods,
)
from components.settings.network import Network
from components.settings.problem import Path, Problem, key_path
from components.settings.secrets import DeclaredSecret, Secret
from components.settings.storage import LOCAL_PATH_NAMESPACE, Storage
from components.settings.tailscale import NAMESPACE as TAILSCALE_NAMESPACE
from components.settings.tailscale import Tailscale
from components.settings.tunnel import (
    CONNECTOR_RESOURCES,
    EDGE_PORT,
    KEEPALIVE_RESOURCES,
    Cloudflare,
    ClusterConnector,
    HostConnector,
    Route,
    Tunnel,
    token_secret_name,
)
from components.settings.upkeep import Backups, Cleaning, PostgresBackup, VolumeBackup, Watching
from components.settings.validation import validated

_BUILT_IN_NAMESPACES = frozenset({"default", "kube-node-lease", "kube-public", "kube-system"})


def _empty_is_none(section: Any) -> Any:
    # Pulumi.yaml's default for a section that a stack leaves out.
    return None if section == {} else section


def _k3d_by_default(cluster: Any) -> Any:
    return {"kind": "k3d", **cluster} if isinstance(cluster, dict) else cluster


AnyCluster: TypeAlias = K3dCluster | K3sCluster | ExistingCluster
"""The kinds of cluster, told apart by `kind`; last the one that needs least of this program."""


def _name_connectors(tunnels: dict[str, Tunnel]) -> dict[str, Tunnel]:
    named = dict(tunnels)
    for name, tunnel in tunnels.items():
        connector = tunnel.connector
        if isinstance(connector, HostConnector):
            update = {
                "token_file": connector.token_file.replace("<name>", name),
                "container": connector.container.replace("<name>", name),
            }
            named[name] = tunnel.model_copy(
                update={"connector": connector.model_copy(update=update)}
            )
    return named


class Settings(Model):
    """What a host shall be. Every key is `homelab:<key>` in the stack file."""

    host: Host = Field(
        default=Host(),
        description="The machine that carries the platform, and how commands reach it.",
    )
    cluster: Annotated[
        AnyCluster, Field(discriminator="kind"), BeforeValidator(_k3d_by_default)
    ] = Field(description="The Kubernetes cluster.")
    network: Network = Field(
        default=Network(), description="The LAN, and the addresses that the cluster takes of it."
    )
    storage: Storage = Field(
        default=Storage(), description="Classes of volumes, and which of them is the default."
    )
    namespaces: dict[Name, Namespace] = Field(
        default={},
        description="Namespaces by name, besides those that Secrets, tunnels and ArgoCD name.",
    )
    access: Annotated[ClusterAccess | None, BeforeValidator(_empty_is_none)] = Field(
        default=None, description="Who may do what in the cluster, besides its administrator."
    )
    secrets: dict[Name, dict[ObjectName, Secret]] = Field(
        default={}, description="Secrets by namespace and name."
    )
    argocd: Annotated[ArgoCD | None, BeforeValidator(_empty_is_none)] = Field(
        default=None, description="ArgoCD's bootstrap; none where left out."
    )
    cloudflare: Annotated[Cloudflare | None, BeforeValidator(_empty_is_none)] = Field(
        default=None, description="The Cloudflare account of the tunnels."
    )
    tunnels: Annotated[dict[Name, Tunnel], AfterValidator(_name_connectors)] = Field(
        default={}, description="Cloudflare tunnels by name."
    )
    tailscale: Annotated[Tailscale | None, BeforeValidator(_empty_is_none)] = Field(
        default=None, description="How the cluster joins the tailnet; not at all where left out."
    )
    handed_over: list[ObjectReference] = Field(
        default=[],
        description="Objects of this stack that another owner has from now on, such as ArgoCD: "
        "they are neither written nor deleted any more. Take a line out to take one back.",
    )
    cleaning: Cleaning = Field(
        default=Cleaning(), description="Removal of what nothing references, on the host."
    )
    backups: Backups = Field(default=Backups(), description="Scheduled backups, on the host.")
    watching: Watching = Field(
        default=Watching(), description="Scheduled look at all that must work, on the host."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(
        cls, data: Any, handler: ModelWrapValidatorHandler["Settings"], info: ValidationInfo
    ) -> "Settings":
        return validated(cls, data, handler, info.context or {})

    @property
    def has_cluster(self) -> bool:
        """Whether the cluster is to be there; one of others always is."""
        return not isinstance(self.cluster, K3dCluster) or self.cluster.enabled

    @property
    def has_units(self) -> bool:
        """Whether anything runs on the host without Pulumi. k3s starts by a unit of its own."""
        if isinstance(self.cluster, K3sCluster):
            return bool(self.backups.items) or self.watching.schedule != "never"
        return isinstance(self.cluster, K3dCluster) and self.cluster.enabled

    @property
    def in_force(self) -> "Settings":
        """The settings without what a cluster that is off would hold, its tunnels included: they
        are another stack's for as long, or nobody's."""
        if self.has_cluster:
            return self
        hosts = {
            name: tunnel
            for name, tunnel in self.tunnels.items()
            if isinstance(tunnel.connector, HostConnector)
        }
        left_out = ("network", "storage", "namespaces", "secrets", "argocd", "tailscale")
        fields = type(self).model_fields
        of_cluster = {
            key: fields[key].default
            for key in (*left_out, "handed_over", "cleaning", "backups", "watching")
        }
        return self.model_copy(update={**of_cluster, "tunnels": hosts})

    def declared_secrets(self) -> list[DeclaredSecret]:
        """All Secrets that the cluster shall hold: declared ones, their copies, and Tailscale's. Of
        one that is handed over the value is another's: no database and no workload is told of it.
        """
        untold = {"rollout": False, "postgres": None}
        return [
            replace(one, secret=one.secret.model_copy(update=untold))
            if f"Secret {one.namespace}/{one.name}" in self.handed_over
            else one
            for _, one in self._secrets_by_path()
        ]

    def declared_namespaces(self) -> dict[str, str]:
        """Owner, `pulumi` or `argocd`, of each namespace that is named; not Kubernetes' own."""
        named = [secret.namespace for secret in self.declared_secrets()]
        named += self.storage.namespaces
        if self.argocd is not None:
            named.append(self.argocd.namespace)
        if self.tailscale is not None:
            named.append(TAILSCALE_NAMESPACE)
        for tunnel in self.tunnels.values():
            if isinstance(tunnel.connector, ClusterConnector):
                named.append(tunnel.connector.namespace)
        owners = dict.fromkeys(named, "pulumi") | {
            name: namespace.owner for name, namespace in self.namespaces.items()
        }
        return {name: owners[name] for name in sorted(owners) if name not in _BUILT_IN_NAMESPACES}

    def own_namespaces(self) -> frozenset[str]:
        """The namespaces of tunnels' connectors that nothing else in the settings names: nobody
        else has pods there.
        """
        connectors = {
            tunnel.connector.namespace
            for tunnel in self.tunnels.values()
            if isinstance(tunnel.connector, ClusterConnector)
        }
        others = {*self.namespaces, *self.storage.namespaces, *_BUILT_IN_NAMESPACES}
        others |= {secret.namespace for secret in self.declared_secrets()}
        others |= {route.namespace for one in self.tunnels.values() for route in one.routes} - {
            None
        }
        others |= {
            item.namespace
            for item in self.backups.items.values()
            if isinstance(item, PostgresBackup | VolumeBackup)
        }
        if self.argocd is not None:
            others |= {self.argocd.namespace}
            others |= {one.namespace for one in self.argocd.application_sets.values()}
        if self.tailscale is not None:
            others.add(TAILSCALE_NAMESPACE)
        if self.access is not None:
            others |= {*self.access.service_accounts}
            others |= {one for each in self.access.bindings.values() for one in each.namespaces}
        return frozenset(connectors - others)

    def pod_security(self) -> dict[str, PodSecurity]:
        """The Pod Security Standard of a namespace for which none is declared: `restricted` where
        only the stack's own pods are, which satisfy it, `privileged` where those need it, and
        elsewhere none that refuses a pod.
        """
        own = self.own_namespaces()
        pods = self.own_pods()
        found: dict[str, PodSecurity] = {}
        for name in self.declared_namespaces():
            enforce: PodSecurityLevel | None = None
            if name in self.storage.namespaces or any(
                pod.needs == "privileged" for pod in pods.get(name, [])
            ):
                enforce = "privileged"
            elif name in own:
                enforce = "restricted"
            found[name] = PodSecurity(enforce=enforce)
        return found

    @property
    def node_names(self) -> list[str]:
        """The nodes that the settings name; none where they are containers."""
        return [] if isinstance(self.cluster, K3dCluster) else list(self.cluster.nodes)

    @property
    def storage_class(self) -> StorageClass | None:
        """The class of a k3d cluster's storageDir; other kinds name theirs alone."""
        return self.cluster.storage_class if isinstance(self.cluster, K3dCluster) else None

    @property
    def needs_docker(self) -> bool:
        """Whether anything of the stack lives in the host's Docker engine."""
        return (isinstance(self.cluster, K3dCluster) and self.cluster.enabled) or any(
            isinstance(tunnel.connector, HostConnector) for tunnel in self.tunnels.values()
        )

    @property
    def _limited_namespaces(self) -> set[str]:
        """Where there are NetworkPolicies: declared ones, and those of the stack's own pods."""
        found = {name for name, one in self.namespaces.items() if one.network_policy}
        found |= self.network.namespaces.keys()
        if self.storage.runs_local_path:
            found.add(LOCAL_PATH_NAMESPACE)
        if self.tailscale is not None and self.tailscale.operator is not None:
            found.add(TAILSCALE_NAMESPACE)
        connectors = [tunnel.connector for tunnel in self.tunnels.values()]
        return found | {one.namespace for one in connectors if isinstance(one, ClusterConnector)}

    @property
    def warnings(self) -> list[str]:
        """What is allowed and likely not meant, a sentence each."""
        found = [*self.cluster.warnings] if isinstance(self.cluster, K3sCluster) else []
        limited = sorted(self._limited_namespaces)
        if limited and isinstance(self.cluster, ExistingCluster):
            found.append(
                f"NetworkPolicies in namespace {', '.join(limited)} hold only where the cluster's"
                " network enforces them, which nothing tells: Calico, Cilium and k3s's own do,"
                " Flannel alone does not (docs/access.md)."
            )
        if self.cloudflare is None:
            return found
        if set(self.cloudflare.account_id) == {"0"} or any(
            set(zone) == {"0"} for zone in self.cloudflare.zones.values()
        ):
            found.append(
                "homelab:cloudflare still holds the example's ids (all zeros): replace accountId "
                "and zones"
                " before a real up."
            )
        for name, tunnel in self.tunnels.items():
            for index, route in enumerate(tunnel.routes):
                zone = self.cloudflare.zone(route.hostname)
                if "." in route.hostname.removesuffix(f".{zone}") != zone:
                    found.append(
                        f"{key_path(('tunnels', name, 'routes', index, 'hostname'))}: "
                        f"{route.hostname} lies two labels"
                        f" under {zone}, and Cloudflare's free certificate covers one: use a "
                        f"single label, or order an"
                        " advanced certificate."
                    )
        return found

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the settings; each field on its own is right."""
        yield from self.host.problems()
        yield from self.cluster.problems()
        yield from self.network.problems(self.cluster, self.host.address)
        yield from self.storage.problems(self.cluster, self.declared_secrets())
        for namespace, secrets in self.secrets.items():
            for name, secret in secrets.items():
                yield from secret.problems(("secrets", namespace, name))
        if self.tailscale is not None:
            yield from self.tailscale.problems()
        if self.argocd is not None:
            yield from self.argocd.problems()
        for name, tunnel in self.tunnels.items():
            yield from tunnel.problems(name)
        yield from self._reachability_problems()
        yield from self._service_problems()
        yield from self._namespace_problems()
        yield from self._limit_problems()
        if self.access is not None:
            yield from self.access.problems(self._known_namespaces, self._lacks_provider)
            yield from self._login_problems(self.access)
        yield from self._secret_problems()
        yield from self._connector_problems()
        yield from self._zone_problems()
        yield from self._hostname_problems()
        yield from self._access_problems()
        yield from self._route_namespace_problems()
        known = frozenset(self.declared_namespaces()) | _BUILT_IN_NAMESPACES
        yield from self.backups.problems(known)
        yield from self._upkeep_problems()
        yield from self.watching.problems(isinstance(self.cluster, K3dCluster | K3sCluster))

    def _secrets_by_path(self) -> Iterator[tuple[Path, DeclaredSecret]]:
        for namespace, secrets in self.secrets.items():
            for name, secret in secrets.items():
                path: Path = ("secrets", namespace, name)
                yield path, DeclaredSecret(namespace, name, secret)
                for index, copy in enumerate(secret.copies):
                    yield (
                        (*path, "copies", index),
                        DeclaredSecret(copy.namespace, copy.name, secret, (namespace, name)),
                    )
        if self.tailscale is not None:
            for index, declared in enumerate(self.tailscale.declared_secrets()):
                path = ("tailscale", "copies", index - 1) if index else ("tailscale", "authKey")
                yield path, declared

    @property
    def _lacks_provider(self) -> str | None:
        """How the API server gets to know an OpenID provider where it is known to have none."""
        cluster = self.cluster
        if isinstance(cluster, K3dCluster):
            if not any("=oidc-issuer-url=" in one for one in cluster.k3s_args):
                return (
                    "add --kube-apiserver-arg=oidc-issuer-url=... and oidc-client-id=... to "
                    "homelab:cluster.k3sArgs"
                )
        elif isinstance(cluster, K3sCluster) and cluster.api.oidc is None:
            return "set homelab:cluster.api.oidc"
        return None  # of a cluster that others made nobody here knows

    def _login_problems(self, access: ClusterAccess) -> Iterator[Problem]:
        """Names that no login of the declared provider can have."""
        if not isinstance(self.cluster, K3sCluster) or self.cluster.api.oidc is None:
            return
        for name, user in access.users.items():
            if user.kind == "oidc" and not name.startswith(OIDC_PREFIX):
                yield Problem(
                    ("access", "users", name),
                    None,
                    f"for a user of kind oidc, a name that begins with {OIDC_PREFIX}",
                    f"name the user {OIDC_PREFIX}{name}, here and in homelab:access.bindings",
                    "is nobody's name: the API server prefixes those of its provider",
                    [("cluster", "api", "oidc")],
                )

    def _upkeep_problems(self) -> Iterator[Problem]:
        """Cleaning is hostctl's on a host of k3d alone, and backups on a server of k3s as well."""
        if isinstance(self.cluster, K3dCluster):
            return
        if isinstance(self.cluster, K3sCluster):
            yield from self._k3s_upkeep_problems(self.cluster)
        remedies = {
            "cleaning": "remove it: each node's kubelet removes unused images when its disk fills "
            "(imageGCHighThresholdPercent)",
            "backups": "remove it, and save its datastore where it was made; a volume of Longhorn "
            "is kept by homelab:storage.longhorn.jobs with task backup (docs/storage.md)",
        }
        on_k3s = isinstance(self.cluster, K3sCluster)
        kinds = {"cleaning": "k3d alone", "backups": "k3d or k3s"}
        for key, remedy in remedies.items():
            if getattr(self, key).model_fields_set and not (on_k3s and key == "backups"):
                yield Problem(
                    (key,),
                    None,
                    f"this section with homelab:cluster.kind {kinds[key]}",
                    remedy,
                    f"does nothing with kind {self.cluster.kind}: the nodes' files and images are "
                    "not the host's",
                    [("cluster", "kind")],
                )

    def _k3s_upkeep_problems(self, cluster: K3sCluster) -> Iterator[Problem]:
        """Both run on the stack's host, of what a server has."""
        first = next(iter(cluster.names("server")), None)
        if first is None:
            return
        if self.has_units and cluster.login(first, self.host) is not self.host:
            yield Problem(
                ("backups", "items") if self.backups.items else ("watching", "schedule"),
                None if self.backups.items else self.watching.schedule,
                "backups and watching of homelab:cluster.kind k3s where homelab:host is its first"
                " server: they run there",
                f"give homelab:host the address of {first}, or remove them",
                "would run on a machine that is not the first server",
                [("host", "address"), ("cluster", "nodes")],
            )
        for name, item in self.backups.items.items():
            if item.kind == "datastore" and cluster.datastore == "etcd":
                yield Problem(
                    ("backups", "items", name, "kind"),
                    item.kind,
                    "volume, postgres or directory where the datastore is etcd: k3s takes its "
                    "snapshots itself, on every server",
                    "write homelab:cluster.snapshots with a directory, make that an item of kind "
                    "directory, and /var/lib/homelab/k3s-tokens another: a snapshot opens with "
                    "the token of its time (docs/tower.md)",
                    "is for SQLite",
                    [("cluster", "datastore"), ("cluster", "nodes")],
                )

    def _reachability_problems(self) -> Iterator[Problem]:
        if not isinstance(self.cluster, K3dCluster):
            return
        api = self.cluster.api
        server = api.server_name or api.bind
        if self.host.connection != "ssh" or not (_is_loopback(server) or _is_loopback(api.bind)):
            return
        at_fault = "bind" if _is_loopback(api.bind) else "serverName"
        yield Problem(
            ("cluster", "api", at_fault),
            api.bind if at_fault == "bind" else server,
            "with homelab:host.connection ssh, an address that this machine can reach",
            "run the stack on the host itself (homelab:host.connection: local), or bind the API "
            "to a reachable address of the"
            " host and name it in homelab:cluster.api.serverName",
            involves=[
                ("host", "connection"),
                ("cluster", "api", "serverName"),
                ("cluster", "api", "bind"),
            ],
        )

    def _service_problems(self) -> Iterator[Problem]:
        """The host's own services listen on all its addresses, and were there first."""
        if not isinstance(self.cluster, K3dCluster):
            return
        published: list[tuple[Path, int]] = [
            (("cluster", "api", "port"), self.cluster.api.port),
            *(
                (("cluster", "ports", index, "hostPort"), port.host_port)
                for index, port in enumerate(self.cluster.ports)
                if port.protocol == "tcp"
            ),
        ]
        owners = {port: name for name, port in self.host.services.items()}
        for path, port in published:
            if port in owners:
                yield Problem(
                    path,
                    port,
                    "a port that none of the host's own services has",
                    f"choose another port, such as {port + 8000 if port < 1024 else port + 1}, or "
                    "an address of MetalLB or Multus; where the service listens elsewhere, write "
                    "its port under homelab:host.services",
                    f"is the host's own: {owners[port]} (homelab:host.services)",
                    [("host", "services"), ("host", "init")],
                )

    def _namespace_problems(self) -> Iterator[Problem]:
        for name, namespace in self.namespaces.items():
            if name in _BUILT_IN_NAMESPACES and namespace.owner == "pulumi":
                yield Problem(
                    ("namespaces", name),
                    None,
                    "namespaces that Kubernetes does not make itself",
                    "remove it: it always exists and can be used without being declared",
                    "is Kubernetes' own",
                )

        declared = self.declared_namespaces()
        for name, owner in self.network.namespaces.items():
            if declared.get(name) == "pulumi":
                yield Problem(
                    ("namespaces", name),
                    None,
                    f"namespaces other than {name}, which {key_path(owner)} makes",
                    f"move what names it elsewhere, or write homelab:namespaces.{name} with owner"
                    " argocd, which only knows the name",
                    "has two owners",
                    [owner],
                )

    def own_pods(self) -> dict[str, list[OwnPod]]:
        """What the stack itself runs in namespaces that it makes, and what that needs there."""
        found: dict[str, list[OwnPod]] = defaultdict(list)
        for name, tunnel in self.tunnels.items():
            connector = tunnel.connector
            if not isinstance(connector, ClusterConnector):
                continue
            path: Path = ("tunnels", name)
            origins: dict[str, Path] = {
                route.namespace: (*path, "routes", index, "service")
                for index, route in enumerate(tunnel.routes)
                if route.namespace
            }
            found[connector.namespace].append(
                OwnPod(
                    f"the connector of tunnel {name}",
                    (*path, "connector"),
                    pods=rollout_pods(connector.replicas),
                    resources=CONNECTOR_RESOURCES,
                    internet=EDGE_PORT,
                    origins=origins,
                )
            )
            if any(route.keepalive for route in tunnel.routes):
                found[connector.namespace].append(
                    OwnPod(
                        f"the keepalive of tunnel {name}",
                        (*path, "connector"),
                        pods=rollout_pods(1),
                        resources=KEEPALIVE_RESOURCES,
                    )
                )
        if self.argocd is not None:
            # What runs there is in the repository: how much of it is not known.
            argocd = OwnPod("ArgoCD", ("argocd", "namespace"), internet=0)
            found[self.argocd.namespace].append(argocd)
        if self.tailscale is not None and self.tailscale.operator is not None:
            # Its proxies set up routes of the node.
            operator = OwnPod(
                "the Tailscale operator",
                ("tailscale", "operator"),
                needs="privileged",
                internet=0,
            )
            found[TAILSCALE_NAMESPACE].append(operator)
        return found

    def _limit_problems(self) -> Iterator[Problem]:
        known = self._known_namespaces
        pods = self.own_pods()
        secrets: dict[str, int] = defaultdict(int)
        for secret in self.declared_secrets():
            secrets[secret.namespace] += 1
        for tunnel in self.tunnels.values():
            if isinstance(tunnel.connector, ClusterConnector):
                secrets[tunnel.connector.namespace] += 1
        for name, namespace in self.namespaces.items():
            yield from namespace.problems(name, known, pods.get(name, []), secrets[name])
            policy = namespace.network_policy
            if policy is None:
                continue
            path: Path = ("namespaces", name, "networkPolicy")
            for connectors, own in pods.items():
                for pod in own:
                    if name in pod.origins and not policy.allows("ingress", connectors, name):
                        yield Problem(
                            (*path, "ingress"),
                            None,
                            f"a rule by which {pod.what}, in {connectors}, is let in",
                            f"add {{namespaces: [{connectors}]}}",
                            f"cuts {pod.what} from its origin",
                            [pod.origins[name]],
                        )

    @property
    def _known_namespaces(self) -> frozenset[str]:
        return (
            frozenset(self.declared_namespaces())
            | _BUILT_IN_NAMESPACES
            | frozenset(self.network.namespaces)
        )

    def _secret_problems(self) -> Iterator[Problem]:
        owners: dict[tuple[str, str], Path] = {}
        for name, tunnel in self.tunnels.items():
            if isinstance(tunnel.connector, ClusterConnector):
                owners[tunnel.connector.namespace, token_secret_name(name)] = ("tunnels", name)
        for path, declared in self._secrets_by_path():
            key = declared.namespace, declared.name
            if key in owners:
                yield Problem(
                    path,
                    None,
                    "each Secret once",
                    "remove one of the two declarations",
                    f"declares Secret {declared.namespace}/{declared.name} a second time, after "
                    f"{key_path(owners[key])}",
                    [owners[key], (*owners[key], "connector", "namespace")],
                )
            else:
                owners[key] = path

    def _connector_problems(self) -> Iterator[Problem]:
        if self.tunnels and self.cloudflare is None:
            yield Problem(
                ("cloudflare",),
                None,
                "accountId, apiToken and zones wherever tunnels are declared",
                "add homelab:cloudflare, or remove homelab:tunnels",
                "is missing",
                [("cloudflare",)],
            )
        owners: dict[tuple[str, ...], Path] = {}
        for name, tunnel in self.tunnels.items():
            connector = tunnel.connector
            path: Path = ("tunnels", name, "connector")
            claims: list[tuple[Path, str, str]] = []
            if isinstance(connector, HostConnector):
                claims = [
                    ((*path, "container"), "container", connector.container),
                    ((*path, "tokenFile"), "token file", connector.token_file),
                ]
            if tunnel.adopt is not None:
                claims.append((("tunnels", name, "adopt", "id"), "tunnel", tunnel.adopt.id))
            for claim_path, kind, value in claims:
                first = owners.setdefault((kind, value), claim_path)
                if first != claim_path:
                    yield Problem(
                        claim_path,
                        value,
                        f"a {kind} of the tunnel's own",
                        "choose another one for one of the two tunnels",
                        f"is used twice: {key_path(first)} has it too",
                        [first],
                    )

    def _zone_problems(self) -> Iterator[Problem]:
        if self.cloudflare is None:
            return
        zones = ", ".join(sorted(self.cloudflare.zones)[:5])
        for name, tunnel in self.tunnels.items():
            for index, route in enumerate(tunnel.routes):
                try:
                    self.cloudflare.zone(route.hostname)
                except LookupError:
                    yield Problem(
                        ("tunnels", name, "routes", index, "hostname"),
                        route.hostname,
                        f"a host name in one of the zones {zones}"
                        if zones
                        else "a host name in a declared zone",
                        "correct the host name, or add its zone to homelab:cloudflare.zones",
                        "lies outside every zone",
                        [("cloudflare", "zones")],
                    )

    def _hostname_problems(self) -> Iterator[Problem]:
        seen: dict[str, dict[str | None, tuple[str, Path]]] = defaultdict(dict)
        for name, tunnel in self.tunnels.items():
            for index, route in enumerate(tunnel.routes):
                path: Path = ("tunnels", name, "routes", index)
                hostname: Path = (*path, "hostname")
                others = seen[route.hostname]
                clash = others.get(route.path) or others.get(None)
                first = next(iter(others.values()), None)
                if first is not None and first[0] != name:
                    yield Problem(
                        hostname,
                        route.hostname,
                        "each host name in one tunnel: its DNS record can point to only one",
                        "keep the host name in one of the two tunnels",
                        f"is used twice: {key_path(first[1])} has it too",
                        [(*first[1], "hostname")],
                    )
                elif clash is not None:
                    yield Problem(
                        hostname,
                        route.hostname,
                        "each host name once, or with different paths, the one without a path last",
                        "remove one of the two routes, or give the earlier one a path",
                        f"is used twice: {key_path(clash[1])} already takes these requests",
                        [(*clash[1], "hostname"), (*clash[1], "path"), (*path, "path")],
                    )
                others.setdefault(route.path, (name, path))

    def _access_problems(self) -> Iterator[Problem]:
        for name, tunnel in self.tunnels.items():
            gates: dict[str, tuple[Path, Route]] = {}
            for index, route in enumerate(tunnel.routes):
                path: Path = ("tunnels", name, "routes", index)
                first, other = gates.setdefault(route.hostname, (path, route))
                if other.access != route.access:
                    yield Problem(
                        (*path, "access"),
                        None,
                        "one access for all routes of a host name: a login guards it as a whole",
                        "give them the same access, or move one to a host name of its own",
                        f"differs from {key_path((*first, 'access'))}",
                        [(*first, "access"), (*first, "hostname"), (*path, "hostname")],
                    )

    def _route_namespace_problems(self) -> Iterator[Problem]:
        known = self.declared_namespaces().keys() | _BUILT_IN_NAMESPACES
        for name, tunnel in self.tunnels.items():
            for index, route in enumerate(tunnel.routes):
                namespace = route.namespace
                if namespace is None or namespace in known:
                    continue
                yield Problem(
                    ("tunnels", name, "routes", index, "service"),
                    route.service,
                    "a Service in a namespace that is declared",
                    f"correct the namespace {namespace}, or declare it: "
                    f"homelab:namespaces.{namespace} (owner argocd if ArgoCD makes it)",
                    "names a namespace that is not declared",
                    [("namespaces", namespace), ("secrets", namespace), ("argocd", "namespace")],
                )


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
