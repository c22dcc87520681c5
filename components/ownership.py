"""One owner (design rule 5): what others run, this stack does not.

Who owns an object is what the cluster says of it (hostctl/owners.py). What this stack declares is
seen as it is registered; so there is no list of either.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pulumi

from components import settings
from components.host import Reading, ask

KINDS = (
    *("ConfigMap", "LimitRange", "Namespace", "PersistentVolume", "ResourceQuota", "Secret"),
    *("Service", "ServiceAccount", "DaemonSet.apps", "Deployment.apps", "HelmChart.helm.cattle.io"),
    *("PodDisruptionBudget.policy", "NetworkPolicy.networking.k8s.io"),
    *(f"{kind}.rbac.authorization.k8s.io" for kind in ("Role", "RoleBinding")),
    *(f"{kind}.rbac.authorization.k8s.io" for kind in ("ClusterRole", "ClusterRoleBinding")),
    *("StorageClass.storage.k8s.io", "CustomResourceDefinition.apiextensions.k8s.io"),
    *("Application.argoproj.io", "ApplicationSet.argoproj.io", "RecurringJob.longhorn.io"),
    *("IPAddressPool.metallb.io", "L2Advertisement.metallb.io", "BGPAdvertisement.metallb.io"),
    *("BGPPeer.metallb.io", "NetworkAttachmentDefinition.k8s.cni.cncf.io"),
    *(f"{kind}.ceph.rook.io" for kind in ("CephCluster", "CephBlockPool", "CephFilesystem")),
)
"""All that a preview asks for: the kinds that stacks declare, and k3s's own charts."""

NOT_SEEN = "who owns its objects cannot be seen, so that no second owner is refused"
"""What a preview says of a cluster that it cannot look into."""

Key = tuple[str, str, str]
"""An object: `Deployment.apps`, its namespace or nothing, its name."""


def deployment_name(tunnel: str) -> str:
    """The Deployment of an in-cluster connector.

    The incumbent's is called `cloudflared` and belongs to ArgoCD; with another name both can run
    while one hands over to the other.
    """
    return f"cloudflared-{tunnel}"


def reference(key: Key) -> str:
    """An object as people and `homelab:handedOver` name it: `Deployment factory/cloudflared`."""
    kind, namespace, name = key
    return f"{kind.partition('.')[0]} {f'{namespace}/' if namespace else ''}{name}"


def declared_key(type: str, inputs: Mapping[str, Any]) -> Key | None:
    """The object that a resource declares; None for one of no cluster, for one that patches another
    owner's, and where its name is not known yet."""
    package, _, rest = type.partition(":")
    version, _, kind = rest.partition(":")
    if package != "kubernetes" or not kind or kind.endswith(("Patch", "List")):
        return None
    group = version.rpartition("/")[0]
    of = inputs if kind == "Release" else inputs.get("metadata") or {}
    get = of.get if isinstance(of, Mapping) else lambda name: getattr(of, name, None)
    namespace, name = get("namespace") or "", get("name")
    if not isinstance(name, str) or not isinstance(namespace, str):
        return None
    return (kind if group in ("", "core") else f"{kind}.{group}", namespace, name)


@dataclass(frozen=True)
class Owner:
    """Another owner of an object, and how it comes to let go of it."""

    name: str
    release: str


def other_owners(
    key: Key, seen: Mapping[Key, Mapping[str, Any]], *, writes: bool = False
) -> list[Owner]:
    """Who else owns an object that this stack declares, by the answer of `hostctl cluster owners`.
    ``writes``: the stack declares its data, so that who rewrites them is one, too.
    """
    kind, namespace, name = key
    if kind == "Release.helm.sh":
        mine = f"Helm release {namespace}/{name}"
        return [
            _owner(owner, f" (it has {reference(one)}, too)")
            for one, live in seen.items()
            if mine in (owner.partition(" of ")[0] for owner in live["owners"])
            for owner in live["owners"]
            if owner.startswith("ArgoCD ") or owner.startswith(f"{mine} of ")
        ][:1]
    live = seen.get(key) or {"owners": [], "writers": []}
    owners = [_owner(one) for one in live["owners"] if one not in ("Pulumi", "hostctl")]
    if writes:
        owners += [
            Owner(
                f"{writer}, which has written its data since it was made",
                "let it write elsewhere, or seed the Secret only (seedOnly: true); where that was a"
                " person, delete the object, and pulumi up --refresh makes it as declared",
            )
            for writer in live["writers"]
        ]
    return owners


def _owner(name: str, also: str = "") -> Owner:
    if name.startswith("ArgoCD "):
        release = "take it back from there (docs/owners.md)"
    elif name.startswith("k3s add-on "):
        release = f"start k3s without it (--disable={name.rpartition(' ')[2]})"
    elif name.startswith("Helm release "):
        release = "take it out of the chart, with helm.sh/resource-policy: keep on it"
    else:
        release = f"let {name} go of it"
    return Owner(name + also, release)


@dataclass
class Ownership:
    """Who owns what in the cluster, and what of it this stack declares."""

    handed_over: frozenset[str]
    seen: Mapping[Key, Mapping[str, Any]] = field(default_factory=dict)
    _declared: dict[Key, str] = field(default_factory=dict)
    _problems: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, stack: settings.Settings, kubeconfig: str | None = None) -> "Reading[Ownership]":
        """Looks at the cluster, which runs. ``kubeconfig`` is the text of the way in, where it is
        none of k3d's.

        Raises RunError where ArgoCD runs the connector of a tunnel that the stack is to run in the
        cluster, or where that cannot be told (incident 3: what is not seen is not absent). Without
        such a connector it only warns that owners could not be seen.
        """
        cluster = stack.cluster.name
        spec = {"cluster": cluster, "kinds": KINDS, "kubeconfig": kubeconfig}
        answer = yield from ask(["cluster", "owners"], spec)
        if not answer["whole"]:
            _refuse_unseen(stack.tunnels, cluster, "; ".join([answer["detail"], *answer["unseen"]]))
        if answer["state"] != "known":
            pulumi.log.warn(f"cluster {cluster}: {NOT_SEEN}: {answer['detail']}")
        for detail in answer["unseen"]:
            pulumi.log.warn(f"cluster {cluster}: of some, {NOT_SEEN}: {detail}")
        seen = {
            (one["kind"], one["namespace"] or "", one["name"]): one for one in answer["objects"]
        }
        _refuse_incumbent(stack.tunnels, seen)
        _warn_of_tenants(stack.own_namespaces(), seen)
        return cls(frozenset(stack.handed_over), seen)

    def guard(self) -> None:
        """Looks at each object as it is registered from here on, and refuses what another owner
        has. What is handed over stays in the state, and is neither written nor deleted any more.
        """
        pulumi.runtime.register_stack_transformation(self._look)

    def settle(self) -> None:
        """Refuses all that :meth:`guard` found in a preview, once all is declared."""
        if self._problems:
            unchanged = "; nothing was changed" if pulumi.runtime.is_dry_run() else ""
            raise pulumi.RunError(
                f"{len(self._problems)} object(s) would have two owners{unchanged}:\n"
                + "\n".join(f"  {problem}" for problem in self._problems)
            )
        unknown = self.handed_over - {reference(key) for key in self._declared}
        for name in sorted(unknown):
            pulumi.log.warn(f"homelab:handedOver: {name} is not declared any more: remove the line")

    def _look(
        self, args: pulumi.ResourceTransformationArgs
    ) -> pulumi.ResourceTransformationResult | None:
        key = declared_key(args.type_, args.props)
        if key is None or (args.opts.id is not None):
            return None
        title = reference(key)
        if key in self._declared:
            self._refuse(
                f"{title} is declared twice, as {self._declared[key]} and as {args.name}.\n"
                "    Remedy: rename or remove one of them"
            )
        self._declared[key] = args.name
        if title in self.handed_over:
            # The inputs stay as they are in the state: nothing is compared, nothing is written.
            kept = pulumi.ResourceOptions(ignore_changes=["*"], retain_on_delete=True)
            return pulumi.ResourceTransformationResult(
                args.props, pulumi.ResourceOptions.merge(args.opts, kept)
            )
        writes = any(args.props.get(name) is not None for name in ("data", "string_data"))
        for owner in other_owners(key, self.seen, writes=writes):
            self._refuse(
                f"{title} is declared here and belongs to {owner.name}.\n    Remedy: hand it over:"
                f' add "{title}" to homelab:handedOver, or where this stack never made it leave it'
                f" out of the settings; or {owner.release}"
            )
        return None

    def _refuse(self, problem: str) -> None:
        self._problems.append(problem)
        if not pulumi.runtime.is_dry_run():
            # Nothing of it is sent to the engine.
            self.settle()


def _refuse_unseen(tunnels: Mapping[str, settings.Tunnel], cluster: str, detail: str) -> None:
    for name, tunnel in tunnels.items():
        if tunnel.connector.kind == "cluster":
            raise pulumi.RunError(
                f"homelab:tunnels.{name}.connector: cannot tell whether ArgoCD owns Deployment"
                f" {tunnel.connector.namespace}/cloudflared: {detail}.\n  Remedy: run"
                f" `hostctl k3d ensure {cluster}` on the host until the API answers, or leave"
                " the connector to ArgoCD with connector.kind: external."
            )


def _warn_of_tenants(namespaces: frozenset[str], seen: Mapping[Key, Mapping[str, Any]]) -> None:
    """Of what others run where the stack lets nobody in but to its connectors."""
    for kind, namespace, name in sorted(seen):
        runs = kind in ("Deployment.apps", "DaemonSet.apps")
        if (
            namespace in namespaces
            and runs
            and "Pulumi" not in seen[kind, namespace, name]["owners"]
        ):
            pulumi.log.warn(
                f"{reference((kind, namespace, name))} is not of this stack, whose connectors have"
                f" namespace {namespace} for themselves: nobody reaches its pods, and new ones must"
                f" be restricted. Remedy: name {namespace} under homelab:namespaces."
            )


def _refuse_incumbent(
    tunnels: Mapping[str, settings.Tunnel], seen: Mapping[Key, Mapping[str, Any]]
) -> None:
    """An in-cluster connector beside the incumbent's, which has another name and the same task."""
    for name, tunnel in tunnels.items():
        if tunnel.connector.kind != "cluster":
            continue
        key = ("Deployment.apps", tunnel.connector.namespace, "cloudflared")
        for owner in other_owners(key, seen):
            if owner.name.startswith("ArgoCD "):
                raise pulumi.RunError(
                    f"homelab:tunnels.{name}.connector: kind cluster, but {reference(key)} belongs"
                    f" to {owner.name}.\n  Remedy: hand it over (annotate it"
                    " argocd.argoproj.io/sync-options: Prune=false, take it out of the GitOps"
                    " repository, sync, remove its argocd.argoproj.io/tracking-id annotation and"
                    " app.kubernetes.io/instance label, and delete it after up), or leave it to"
                    " ArgoCD with connector.kind: external."
                )
