"""A cluster of k3s on machines of its own: each node by hostctl on it, one after another."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi
import yaml
from pulumi_command import local
from pydantic import TypeAdapter, ValidationError

import homelab
from components import settings, versions
from components.cluster import Cluster, kubernetes_provider
from components.host import (
    Connection,
    Host,
    HostError,
    Reading,
    Unreachable,
    ask,
    kubeconfig_path,
    result,
    this_machine,
)
from components.ownership import NOT_SEEN
from components.settings.audit import POLICY_FILE
from components.settings.k3s import JoinToken

API_PORT = 6443
# k3s applies what lies there, so that the address is up before the second server joins.
_KUBE_VIP = "/var/lib/rancher/k3s/server/manifests/kube-vip.yaml"
_RELEASES = "https://github.com/k3s-io/k3s/releases/download"
# A download, a snapshot, or a datastore that opens slowly may take this much longer.
_SLACK_SECONDS = 900


def join_token(source: settings.JoinTokenSource, connection: Connection) -> Reading[str]:
    """The token with which machines join; its content is in no error. Raises HostError."""
    if source.value is not None:
        return source.value.get_secret_value()
    path = str(source.file)
    request = {"path": path, "as": "value", "namespace": "kube-system", "name": "token"}
    reading = ask(["files", "read"], {"files": [{**request, "keys": ["token"]}]})
    reader = connection if source.read_on == "host" else this_machine()
    seen = (yield from reading) if reader is connection else reader.read(reading)
    found = seen["files"][path]
    if found["state"] != "present":
        raise HostError(
            f"homelab:cluster.token.file: {path} on {reader.name} is {found['state']}:"
            f" {found['detail']}.\n  Remedy: let agenix or sops decrypt it there, or correct the"
            " path or homelab:cluster.token.readOn."
        )
    token = base64.b64decode(found["content"]).decode("utf-8", "replace").strip()
    try:
        TypeAdapter(JoinToken).validate_python(token)
    except ValidationError:
        raise HostError(
            f"homelab:cluster.token.file: {path} on {reader.name} holds no token.\n  Remedy: write"
            " 16 or more letters, digits, - and _ in one line, or the whole K10...::server:... of a"
            " cluster that is there."
        ) from None
    return token


@dataclass(frozen=True)
class LiveNode:
    """A node as `hostctl k3s inspect` saw it on its machine.

    ``state`` is running, stopped, half, absent or, where its machine does not answer, unknown; then
    ``detail`` says why. ``generation`` stands still while the node agrees with the settings.
    """

    state: str
    detail: str = ""
    generation: int = 1
    incarnation: int = 1
    version: str | None = None
    identity: str | None = None
    differences: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def read(cls, spec: Mapping[str, Any], connection: Connection) -> "LiveNode":
        """Raises HostError when the machine refuses; one that does not answer is unknown."""
        try:
            seen = connection.look(["k3s", "inspect"], spec)
        except Unreachable as unreachable:
            return cls("unknown", str(unreachable))
        node = seen["node"] or {"state": "absent"}
        return cls(
            state=node["state"],
            generation=seen["generation"],
            incarnation=seen.get("incarnation") or 1,
            version=node.get("version"),
            identity=node.get("identity"),
            differences=seen["differences"],
            warnings=seen["warnings"],
        )


@dataclass(frozen=True)
class LiveK3s:
    """The nodes as they are now, the cluster's identity and, where it answers, the way in."""

    nodes: dict[str, LiveNode]
    token: str = field(repr=False)
    kubeconfig: str | None = field(default=None, repr=False)

    @classmethod
    def read(
        cls,
        cluster: settings.K3sCluster,
        connection: Connection,
        connections: Mapping[str, Connection],
    ) -> "Reading[LiveK3s]":
        """Asks each node. Raises HostError when one refuses, when a difference is fixed and not
        confirmed, when the servers are not of one cluster, and in an up when the first server, or
        before an upgrade any node, does not answer.
        """
        token = yield from join_token(cluster.token, connection)
        nodes = {
            name: LiveNode.read(_question(cluster, name, token), connections[name])
            for name in cluster.nodes
        }
        live = cls(nodes, token)
        first = cluster.names("server")[0]
        live._refuse_versions(cluster)
        live._refuse_differences(cluster)
        live._refuse_two_clusters(cluster)
        if not pulumi.runtime.is_dry_run():
            live._refuse_blind(cluster, first)
        if nodes[first].state != "running":
            return live
        [seen] = connections[first].answers([(["k3s", "kubeconfig"], _way_in(cluster))])
        return cls(nodes, token, seen["kubeconfig"])

    @property
    def identity(self) -> str | None:
        """The uid that all its servers tell; None where there is no cluster or none answers."""
        return next((one.identity for one in self.nodes.values() if one.identity), None)

    def _refuse_versions(self, cluster: settings.K3sCluster) -> None:
        """Kubernetes goes up one minor at a time on all nodes, and its datastore never back."""
        declared = _release(cluster.version)
        wrong = [
            f"  node {name} runs {node.version}"
            for name, node in self.nodes.items()
            if node.version
            and not _release(node.version) <= declared < _next_but_one(_release(node.version))
        ]
        if wrong:
            raise HostError(
                f"homelab:cluster.version: {cluster.version} is older than what runs, or more than"
                " one minor newer:\n"
                + "\n".join(wrong)
                + "\n  Remedy: go up one minor at a time, each with `pulumi up`; the way back to an"
                " older one is a snapshot of that time (docs/tower.md)."
            )

    def _refuse_differences(self, cluster: settings.K3sCluster) -> None:
        fixed = [
            (name, one)
            for name, node in self.nodes.items()
            for one in node.differences
            if one["fixed"] and not _is_foreseen(one["key"], cluster)
        ]
        if fixed:
            raise HostError(
                f"cluster {cluster.name}: {len(fixed)} setting(s) differ from the live nodes and"
                " are not changed in passing:\n"
                + "\n".join(
                    f"  node {name}: {one['key']}: declared {one['declared']}, live {one['live']}"
                    + (f"; {one['why']}" if one.get("why") else "")
                    for name, one in fixed
                )
                + "\n  Remedy: write the live value into the stack file; convert a datastore with"
                f" homelab:cluster.confirm: {cluster.name}; for the rest see docs/tower.md."
            )

    def _refuse_two_clusters(self, cluster: settings.K3sCluster) -> None:
        told = {name: one.identity for name, one in self.nodes.items() if one.identity}
        if len(set(told.values())) > 1:
            raise HostError(
                f"cluster {cluster.name}: its servers are of different clusters: "
                + ", ".join(f"{name} of {uid}" for name, uid in told.items())
                + ". Nothing was changed.\n  Remedy: take the one that does not belong out of"
                " homelab:cluster.nodes, or remove its k3s, on it: `hostctl k3s remove` (--help"
                " shows its spec)."
            )

    def _refuse_blind(self, cluster: settings.K3sCluster, first: str) -> None:
        silent = [name for name, one in self.nodes.items() if one.state == "unknown"]
        if first in silent:
            raise HostError(
                f"cluster {cluster.name}: its first server does not answer, so it cannot be told"
                f" whether there is a cluster. Nothing was changed.\n{self.nodes[first].detail}\n"
                f"  If {first} is lost for good: docs/tower.md."
            )
        upgraded = [
            name for name, one in self.nodes.items() if one.version not in (None, cluster.version)
        ]
        if silent and upgraded:
            raise HostError(
                f"cluster {cluster.name}: {', '.join(silent)} does not answer, and"
                f" {', '.join(upgraded)} would be upgraded. Nothing was changed.\n  Remedy: bring"
                " it back, or take it out of homelab:cluster.nodes first (docs/tower.md):\n"
                f"{self.nodes[silent[0]].detail}"
            )

    def announce(self, cluster: settings.K3sCluster) -> None:
        """Says in the preview what up will do to each node, and which could not be asked."""
        for name, node in self.nodes.items():
            for text in _plans(name, node, cluster):
                pulumi.log.warn(f"cluster {cluster.name}: {text}")
            for warning in node.warnings:
                pulumi.log.warn(f"node {name}: {warning['what']}. Remedy: {warning['remedy']}")
            if node.state == "absent":
                where = "" if self.identity is None else ", which joins the cluster"
                pulumi.log.info(
                    f"cluster {cluster.name}: up installs k3s {cluster.version} on {name},"
                    f" {'a server' if cluster.nodes[name].role == 'server' else 'an agent'}{where}"
                )


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.replace("k3s", ""))))


def _next_but_one(release: tuple[int, ...]) -> tuple[int, ...]:
    return release[0], release[1] + 2


def _is_foreseen(key: str, cluster: settings.K3sCluster) -> bool:
    """Whether up has a way for a difference that no restart of k3s mends."""
    return key == "tokenDigest" or (
        key in ("datastore", "installed") and cluster.confirm == cluster.name
    )


def _plans(name: str, node: LiveNode, cluster: settings.K3sCluster) -> Iterator[str]:
    # The way into the cluster is the first server's to tell.
    unseen = f"; until then {NOT_SEEN}" if name == cluster.names("server")[0] else ""
    if node.state == "unknown":
        yield (
            f"node {name} does not answer, so it cannot be told what is there; it is left as it is"
            f" known{unseen}: {' '.join(node.detail.split())}"
        )
        return
    if node.state == "stopped":
        yield f"node {name} is stopped: up starts it{unseen}"
    elif node.state == "half":
        yield f"node {name} is half installed: up finishes it{unseen}"
    if node.version not in (None, cluster.version):
        yield (
            f"node {name} runs {node.version}: up drains it, upgrades it to {cluster.version} and"
            " lets pods back"
        )
    for one in node.differences:
        if one["key"] == "version":
            continue
        if one["key"] == "installed":
            yield f"node {name} was installed by {one['live']}: up takes it over, with its data"
            continue
        if one["key"] == "tokenDigest":
            yield f"node {name} has another token: up rotates it, and restarts the nodes in turn"
            continue
        what = "converts it, after a backup" if one["key"] == "datastore" else "changes it"
        yield f"node {name}: {one['key']} is {one['live']}, declared {one['declared']}: up {what}"


def node_spec(cluster: settings.K3sCluster, name: str) -> dict[str, Any]:
    """What `hostctl k3s inspect` and `ensure` have in common: all but the secrets."""
    node = cluster.nodes[name]
    servers = cluster.names("server")
    first = servers[0]
    release = cluster.version.replace("+", "%2B")
    join = cluster.virtual_ip.address if cluster.virtual_ip else cluster.nodes[first].address
    return {
        "cluster": cluster.name,
        "node": name,
        "role": node.role,
        "version": cluster.version,
        "datastore": cluster.datastore if node.role == "server" else None,
        "init": name == first,
        "server": None if name == first else f"https://{join}:{API_PORT}",
        "config": _config(cluster, node),
        "files": _files(cluster) if node.role == "server" else {},
        "install": {
            "url": cluster.url or f"{_RELEASES}/{release}/k3s",
            "sha256": cluster.sha256,
        },
        "peers": list(cluster.nodes),
        # A first server that has lost its data joins these, in place of making another cluster.
        "rejoin": [f"https://{cluster.nodes[other].address}:{API_PORT}" for other in servers[1:]]
        if name == first
        else [],
        "confirm": cluster.confirm,
        "timeouts": {
            "readySeconds": cluster.ready_seconds,
            "drainSeconds": cluster.drain_seconds,
        },
    }


def _config(cluster: settings.K3sCluster, node: settings.K3sNode) -> dict[str, Any]:
    """Of /etc/rancher/k3s/config.yaml. Every server has the same of what all must share (k3s
    refuses one that differs).
    """
    config: dict[str, Any] = {"node-ip": node.address}
    if node.interface:
        config["flannel-iface"] = node.interface
    if node.labels:
        config["node-label"] = [f"{key}={value}" for key, value in node.labels.items()]
    if node.taints:
        config["node-taint"] = list(node.taints)
    if node.role == "agent":
        return config
    config |= {
        "advertise-address": node.address,
        "tls-san": list(cluster.api.tls_san),
        "disable": list(cluster.disable),
        "cluster-cidr": cluster.pod_subnet,
        "service-cidr": cluster.service_subnet,
        "secrets-encryption": cluster.secrets_encryption,
        "write-kubeconfig-mode": "0600",
    }
    arguments = cluster.audit.arguments() if cluster.audit else {}
    arguments |= cluster.api.oidc.arguments() if cluster.api.oidc else {}
    if arguments:
        config["kube-apiserver-arg"] = [f"{key}={value}" for key, value in arguments.items()]
    if snapshots := cluster.snapshots:
        config["etcd-snapshot-schedule-cron"] = snapshots.schedule
        config["etcd-snapshot-retention"] = snapshots.retention
        if snapshots.directory:
            config["etcd-snapshot-dir"] = snapshots.directory
        if s3 := snapshots.s3:
            config |= {"etcd-s3": True, "etcd-s3-endpoint": s3.endpoint}
            config["etcd-s3-bucket"] = s3.bucket
            if s3.folder:
                config["etcd-s3-folder"] = s3.folder
            if s3.region:
                config["etcd-s3-region"] = s3.region
    return config


def _secret_config(cluster: settings.K3sCluster, name: str) -> dict[str, str]:
    snapshots = cluster.snapshots
    if cluster.nodes[name].role == "agent" or snapshots is None or snapshots.s3 is None:
        return {}
    return {
        "etcd-s3-access-key": snapshots.s3.access_key.get_secret_value(),
        "etcd-s3-secret-key": snapshots.s3.secret_key.get_secret_value(),
    }


def _question(cluster: settings.K3sCluster, name: str, token: str) -> dict[str, Any]:
    """What inspect is asked: no secret travels to look."""
    secret = _secret_config(cluster, name)
    return {
        **node_spec(cluster, name),
        "tokenDigest": _digest(token),
        "secretConfigDigest": {key: _digest(value) for key, value in secret.items()},
    }


def _digest(secret: str) -> str:
    """Of a token what is secret alone: K10<CA's hash>::server:<password> and <password> are one."""
    password = secret.rpartition(":")[2] if secret.startswith("K10") else secret
    return hashlib.sha256(password.encode()).hexdigest()[:16]


def _files(cluster: settings.K3sCluster) -> dict[str, str]:
    files: dict[str, str] = {}
    if cluster.audit:
        files[POLICY_FILE] = cluster.audit.policy()
    if cluster.virtual_ip:
        files[_KUBE_VIP] = yaml.safe_dump_all(_kube_vip(cluster.virtual_ip), sort_keys=False)
    return files


def _kube_vip(virtual_ip: settings.VirtualIp) -> list[dict[str, Any]]:
    """kube-vip for the control plane alone: Services are MetalLB's or k3s's own (ServiceLB)."""
    name, namespace = "kube-vip", "kube-system"
    meta = {"name": name, "namespace": namespace}
    environment = {
        "vip_arp": "true",
        "vip_interface": virtual_ip.interface,
        "address": virtual_ip.address,
        "port": str(API_PORT),
        "vip_subnet": "32",
        "cp_enable": "true",
        "cp_namespace": namespace,
        "svc_enable": "false",
        "vip_leaderelection": "true",
        "vip_leaseduration": "5",
        "vip_renewdeadline": "3",
        "vip_retryperiod": "1",
    }
    container = {
        "name": name,
        "image": versions.KUBE_VIP,
        "args": ["manager"],
        "env": [{"name": key, "value": value} for key, value in environment.items()]
        + [
            {
                "name": "vip_nodename",
                "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}},
            }
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    pod = {
        "serviceAccountName": name,
        "hostNetwork": True,
        "nodeSelector": {"node-role.kubernetes.io/control-plane": "true"},
        # It is what leads to the API: no taint may keep it from a server.
        "tolerations": [{"operator": "Exists"}],
        "priorityClassName": "system-node-critical",
        "containers": [container],
    }
    rules = [
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "get", "watch"]},
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "verbs": ["list", "get", "watch", "update", "create"],
        },
    ]
    rbac = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRole",
            "metadata": {"name": name},
            "rules": rules,
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": name},
            "roleRef": {"apiGroup": rbac, "kind": "ClusterRole", "name": name},
            "subjects": [{"kind": "ServiceAccount", **meta}],
        },
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": meta,
            "spec": {
                "selector": {"matchLabels": {"app.kubernetes.io/name": name}},
                "template": {
                    "metadata": {"labels": {"app.kubernetes.io/name": name}},
                    "spec": pod,
                },
            },
        },
    ]


def _way_in(cluster: settings.K3sCluster) -> dict[str, str]:
    return {"cluster": cluster.name, "server": f"https://{cluster.server}:{API_PORT}"}


@dataclass(frozen=True)
class K3sClusterArgs:
    settings: settings.K3sCluster
    live: LiveK3s
    host: Host
    """The stack's, which keeps a kubeconfig for what hostctl does in the cluster."""
    hosts: Mapping[str, Host]
    """Of each node."""


class K3sCluster(pulumi.ComponentResource):
    """k3s on each node, servers first and one after another, and the way in.

    A change goes through the nodes in that order: another version drains a node, from a server that
    stays, upgrades it, waits until it is Ready and lets pods back, before the next one begins. A
    node that is taken out of the settings is drained and deleted from the cluster, then k3s is
    uninstalled there. What is in the cluster is deleted with it, and the Provider hangs on its
    identity.
    """

    cluster: Cluster
    output: pulumi.Output[homelab.Cluster]
    """As consumers of the stack read it."""
    kubeconfig: pulumi.Output[str]
    """As YAML text; secret."""

    def __init__(
        self, name: str, args: K3sClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:K3sCluster", name, None, opts)
        declared, live = args.settings, args.live
        servers = declared.names("server")
        first = servers[0]
        self._args = args

        # Nothing is done before there is a cluster, nor while it runs the version already.
        snapshot = args.hosts[first].command(
            "snapshot",
            ["k3s", "snapshot", "take"],
            {
                "cluster": declared.name,
                "name": "before-upgrade",
                "retention": 5,
                "version": declared.version,
            },
            opts=self._options([], _SLACK_SECONDS),
        )
        token = args.hosts[first].command(
            "token",
            ["k3s", "token"],
            {"cluster": declared.name, "new": live.token},
            secret=True,
            opts=self._options([snapshot], _SLACK_SECONDS),
        )
        ready: local.Command = token
        for node in [*servers, *declared.names("agent")]:
            ready = self._node(node, after=ready)

        incarnation = str(live.nodes[first].incarnation)
        way_in = args.hosts[first].command(
            "kubeconfig",
            ["k3s", "kubeconfig"],
            _way_in(declared),
            secret=True,
            triggers=[incarnation],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[ready]),
        )
        # Of a cluster that answers, both are known: a renewed certificate shows in the preview and
        # replaces nothing.
        made = result(way_in)
        self.kubeconfig = pulumi.Output.secret(
            live.kubeconfig or made.apply(lambda seen: seen["kubeconfig"])
        )
        identity = (
            pulumi.Output.from_input(f"{declared.name}-{live.identity}")
            if live.identity
            else pulumi.Output.unsecret(
                made.apply(lambda seen: f"{declared.name}-{seen['identity']}")
            )
        )
        path = kubeconfig_path(declared.name)
        file = args.host.command(
            "kubeconfig file",
            ["files", "write"],
            {"path": path, "content": self.kubeconfig, "mode": "0600"},
            secret=True,
            delete=["files", "remove"],
            # A destroy comes to it before it comes to any node, and goes no further. Nodes are not
            # protected one by one: who takes one out of the settings means it.
            opts=pulumi.ResourceOptions(
                parent=self, depends_on=[way_in], protect=declared.delete != declared.name
            ),
        )
        provider = kubernetes_provider(
            self.kubeconfig,
            identity,
            sleeping=live.kubeconfig is None and live.nodes[first].state != "absent",
            opts=pulumi.ResourceOptions(parent=self, depends_on=[file]),
        )
        self.cluster = Cluster(
            name=declared.name,
            provider=provider,
            identity=way_in,
            kubeconfig=path,
            host=args.host,
            incarnation=incarnation,
            anew=live.nodes[first].state == "absent" and live.identity is None,
        )
        self.output = pulumi.Output.all(
            name=declared.name,
            identity=identity,
            endpoint=_way_in(declared)["server"],
            context=declared.name,
            kubeconfigPath=path,
            storageClass=declared.storage_class,
            k3sVersion=declared.version,
        ).apply(lambda seen: homelab.Cluster(**seen))
        self.register_outputs({"output": self.output})

    def _node(self, name: str, after: local.Command) -> local.Command:
        """The Commands of a node; the last of them is done when pods may run there."""
        cluster, live = self._args.settings, self._args.live.nodes[name]
        others = [server for server in cluster.names("server") if server != name]
        helper = self._args.hosts[others[0] if others else name]
        place = {
            "cluster": cluster.name,
            "node": name,
            "version": cluster.version,
            "drainSeconds": cluster.drain_seconds,
            "readySeconds": cluster.ready_seconds,
        }
        drain = helper.command(
            f"drain {name}",
            ["k3s", "drain"],
            place,
            opts=self._options([after], cluster.drain_seconds),
        )
        seconds = cluster.ready_seconds + _SLACK_SECONDS
        options = self._options([drain], seconds)
        if live.state == "unknown":
            # What cannot be asked is not changed either.
            options.ignore_changes = ["stdin"]
        if name == cluster.names("server")[0]:
            options.protect = cluster.delete != cluster.name
        ensure = self._args.hosts[name].command(
            name,
            ["k3s", "ensure"],
            {
                **node_spec(cluster, name),
                "token": self._args.live.token,
                "secretConfig": _secret_config(cluster, name),
                "generation": live.generation,
            },
            secret=True,
            delete=["k3s", "remove"],
            opts=options,
        )
        return helper.command(
            f"uncordon {name}",
            ["k3s", "uncordon"],
            place,
            # Before the node is uninstalled; the last server has nobody to forget it.
            delete=["k3s", "forget"] if others else None,
            opts=self._options([ensure], cluster.ready_seconds),
        )

    def _options(self, after: list[pulumi.Resource], seconds: int) -> pulumi.ResourceOptions:
        wait = f"{seconds + 60}s"
        return pulumi.ResourceOptions(
            parent=self,
            depends_on=after,
            custom_timeouts=pulumi.CustomTimeouts(create=wait, update=wait, delete=wait),
        )
