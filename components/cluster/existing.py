"""A cluster that is there already: its kubeconfig, checked and cut down to one context, and the
live facts that a run is held against.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import pulumi
import yaml

import homelab
from components import settings
from components.cluster import Cluster, kubernetes_provider
from components.host import (
    Connection,
    Host,
    HostError,
    Reading,
    ask,
    kubeconfig_path,
    this_machine,
)
from components.ownership import NOT_SEEN
from components.settings.network import Span


@dataclass(frozen=True)
class LiveExisting:
    """What the kubeconfig says, and what its cluster answers now.

    ``state`` is reachable or unreachable; on all else :meth:`read` raises. ``identity`` is what the
    CA says: a renewed credential or another address of the API is the same cluster.
    """

    state: str
    detail: str
    identity: str
    server: str
    kubeconfig: str = field(repr=False)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        cluster: settings.ExistingCluster,
        network: settings.Network,
        connection: Connection,
    ) -> "Reading[LiveExisting]":
        """Raises HostError when the kubeconfig cannot be had or used, when it leads to another
        cluster than the declared one, when it cannot be told whether the cluster answers, when the
        live nodes contradict the settings, and in an up when the cluster does not answer.
        """
        text, server, ca = _cut_down(cluster, (yield from _source(cluster, connection)))
        identity = f"{cluster.name}-{hashlib.sha256(ca).hexdigest()[:16]}"
        if cluster.identity not in (None, identity):
            raise HostError(
                f"homelab:cluster.identity: declared {cluster.identity}, but the kubeconfig's"
                f" cluster is {identity}: another one. Nothing was changed.\n  Remedy: correct"
                " homelab:cluster.kubeconfig. If the cluster was made anew, what the stack knows of"
                " the former one is forgotten by `pulumi state delete --target-dependents"
                " <URN of the provider kubernetes>`; then write the new identity."
            )
        seen = yield from ask(["cluster", "inspect"], {"name": cluster.name, "kubeconfig": text})
        live = cls(seen["state"], seen["detail"], identity, server, text, seen["nodes"])
        if live.state == "unreachable" and not pulumi.runtime.is_dry_run():
            raise HostError(
                f"cluster {cluster.name} does not answer at {server}: {live.detail}. Nothing was"
                f" changed.\n  Remedy: bring its API up; this machine and {connection.name} must"
                " reach it."
            )
        problems = [*live._contradictions(cluster, network)]
        if network.metallb and seen.get("servicelb"):
            problems.append(
                "homelab:network.metallb: k3s's ServiceLB serves this cluster already"
                f" (DaemonSet kube-system/{', '.join(seen['servicelb'])}), and both would answer"
                " for the same Services: restart its servers with --disable=servicelb"
            )
        if problems:
            raise HostError(
                f"cluster {cluster.name} is not as the settings say:\n"
                + "\n".join(f"  {problem}" for problem in problems)
            )
        return live

    def _contradictions(
        self, cluster: settings.ExistingCluster, network: settings.Network
    ) -> Iterator[str]:
        pools = network.metallb.pools if network.metallb else []
        for name, node in self.nodes.items():
            declared = cluster.nodes.get(name)
            if declared and node["addresses"] and declared.address not in node["addresses"]:
                yield (
                    f"homelab:cluster.nodes.{name}.address: declared {declared.address}, live"
                    f" {', '.join(node['addresses'])}: write the live address, which pools are"
                    " checked against"
                )
            for index, pool in enumerate(pools):
                for address in node["addresses"]:
                    if ip_address(address).version == 4 and Span.of(address).within(
                        Span.of(pool.addresses)
                    ):
                        yield (
                            f"homelab:network.metallb.pools[{index}].addresses: {pool.addresses}"
                            f" holds {address}, which node {name} has: choose other addresses"
                        )

    def announce(self, cluster: settings.ExistingCluster) -> None:
        """Says in the preview what is missing, and what follows from it."""
        if self.state == "unreachable":
            pulumi.log.warn(
                f"cluster {cluster.name} does not answer at {self.server}: {self.detail}. This"
                f" preview holds the settings against what was last known, and {NOT_SEEN}; up is"
                " refused until it answers"
            )
            return
        if cluster.identity is None:
            pulumi.log.warn(
                f"homelab:cluster.identity is not set: write {self.identity}, and a kubeconfig of"
                " another cluster is refused"
            )
        for name in sorted(cluster.nodes.keys() - self.nodes.keys()):
            pulumi.log.warn(
                f"cluster {cluster.name}: it has no node {name}, which homelab:cluster.nodes names"
            )
        for name, node in self.nodes.items():
            if name not in cluster.nodes:
                pulumi.log.warn(
                    f"cluster {cluster.name}: node {name} is not declared: write its address under"
                    f" homelab:cluster.nodes.{name}"
                )
            if not node["ready"]:
                pulumi.log.warn(
                    f"cluster {cluster.name}: node {name} is not ready. Another node announces its"
                    " addresses within seconds; a ReadWriteOnce volume stays attached to it until"
                    " it is back or declared lost (docs/metal.md)"
                )


def _source(cluster: settings.ExistingCluster, connection: Connection) -> Reading[str]:
    """The kubeconfig as it was given."""
    source = cluster.kubeconfig
    if source.content is not None:
        return source.content.get_secret_value()
    path = str(source.file)
    request = {"path": path, "as": "value", "namespace": "kube-system", "name": "kubeconfig"}
    # An optional one, so that a rehearsal does not make up a value for it.
    reading = ask(["files", "read"], {"files": [{**request, "optional": True}]})
    reader = connection if source.read_on == "host" else this_machine()
    seen = (yield from reading) if reader is connection else reader.read(reading)
    found = seen["files"][path]
    if found["state"] != "present":
        raise HostError(
            f"homelab:cluster.kubeconfig.file: {path} on {reader.name} is {found['state']}:"
            f" {found['detail']}.\n  Remedy: correct the path or homelab:cluster.kubeconfig.readOn;"
            " a file that only root reads needs homelab:host.sudo."
        )
    return base64.b64decode(found["content"]).decode("utf-8", "replace")


def _cut_down(cluster: settings.ExistingCluster, text: str) -> tuple[str, str, bytes]:
    """The kubeconfig with the one context alone, the API's address in it, and the CA certificate.

    An empty kubeconfig or context would silently mean the ambient ~/.kube/config, another cluster.
    Nothing of the content is quoted in an error.
    """
    source = cluster.kubeconfig
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict) or not given.get("clusters"):
        raise _unusable("it holds no cluster", "give the whole kubeconfig")
    contexts = _named(given, "contexts", "context")
    if source.context not in contexts:
        known = ", ".join(sorted(contexts)) or "none"
        raise _unusable(
            f"it has no context {source.context}; it has {known}",
            "correct homelab:cluster.kubeconfig.context",
        )
    context = contexts[source.context]
    target = _named(given, "clusters", "cluster").get(str(context.get("cluster")), {})
    user = _named(given, "users", "user").get(str(context.get("user")), {})
    flatten = (
        "flatten it: kubectl config view --raw --minify --flatten"
        f" --context={source.context}, which puts files in as data"
    )
    authority = target.get("certificate-authority-data")
    if not authority or target.get("insecure-skip-tls-verify"):
        raise _unusable("its cluster has no certificate-authority-data", flatten)
    certificate = {"client-certificate-data", "client-key-data"} <= user.keys()
    if not certificate and "token" not in user:
        raise _unusable(
            "its user has neither client-certificate-data and client-key-data nor a token",
            f"{flatten}; a plug-in for logging in (exec) does not run unattended",
        )
    try:
        ca = base64.b64decode(authority, validate=True)
    except (binascii.Error, ValueError):
        raise _unusable("certificate-authority-data is not base64", flatten) from None
    server = source.server or str(target.get("server", ""))
    host = server.removeprefix("https://")
    if not server.startswith("https://") or host.startswith(("127.", "0.0.0.0", "localhost")):
        raise _unusable(
            f"its API is at {server or 'no address'}, where only the server itself finds it",
            "write the address that this machine and the host reach into"
            " homelab:cluster.kubeconfig.server (incident 14)",
        )
    keys = ("client-certificate-data", "client-key-data") if certificate else ("token",)
    name = cluster.name
    cut = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {"name": name, "cluster": {"certificate-authority-data": authority, "server": server}}
        ],
        "users": [{"name": name, "user": {key: user[key] for key in keys}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    return yaml.safe_dump(cut, sort_keys=False, width=1_000_000), server, ca


def _named(kubeconfig: dict[str, Any], entries: str, entry: str) -> dict[str, dict[str, Any]]:
    return {
        one["name"]: one.get(entry) or {}
        for one in kubeconfig.get(entries) or []
        if isinstance(one, dict) and "name" in one
    }


def _unusable(why: str, remedy: str) -> HostError:
    return HostError(f"homelab:cluster.kubeconfig: {why}.\n  Remedy: {remedy}.")


@dataclass(frozen=True)
class ExistingClusterArgs:
    settings: settings.ExistingCluster
    live: LiveExisting
    host: Host


class ExistingCluster(pulumi.ComponentResource):
    """A cluster that others made. The stack keeps a kubeconfig on the host, for what hostctl does
    there, and makes the Provider; `destroy` takes out of the cluster what the stack put in.

    The Provider is tied to the cluster's identity: renewed credentials or another address update
    it in place, another cluster replaces it and all it holds.
    """

    cluster: Cluster
    output: pulumi.Output[homelab.Cluster]
    """As consumers of the stack read it."""
    kubeconfig: pulumi.Output[str]
    """As YAML text; secret."""

    def __init__(
        self, name: str, args: ExistingClusterArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:ExistingCluster", name, None, opts)
        declared, live = args.settings, args.live
        self.kubeconfig = pulumi.Output.secret(live.kubeconfig)
        path = kubeconfig_path(declared.name)
        file = args.host.command(
            "kubeconfig",
            ["files", "write"],
            {"path": path, "content": live.kubeconfig, "mode": "0600"},
            secret=True,
            delete=["files", "remove"],
            opts=pulumi.ResourceOptions(parent=self),
        )
        provider = kubernetes_provider(
            self.kubeconfig,
            live.identity,
            sleeping=live.state == "unreachable",
            opts=pulumi.ResourceOptions(parent=self, depends_on=[file]),
        )
        self.cluster = Cluster(
            name=declared.name,
            provider=provider,
            # It outlives the stack: what the stack put in is deleted one by one.
            identity=None,
            kubeconfig=path,
            host=args.host,
            incarnation=live.identity,
        )
        versions = sorted({node["version"] for node in live.nodes.values()})
        self.output = pulumi.Output.from_input(
            homelab.Cluster(
                name=declared.name,
                identity=live.identity,
                endpoint=live.server,
                context=declared.name,
                kubeconfigPath=path,
                storageClass=declared.storage_class,
                # The oldest: what every node understands.
                k3sVersion=versions[0] if versions else "",
            )
        )
        self.register_outputs({"output": self.output})
