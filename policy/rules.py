"""The guards that hold for every stack, whatever its settings say and whoever wrote the component.

The engine hands over each resource as it is about to be registered, in preview and up, but neither
its retainOnDelete and deletedWith nor which values are secret: those are for the components' tests.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

from pulumi_policy import (
    EnforcementLevel,
    ReportViolation,
    ResourceValidationArgs,
    ResourceValidationPolicy,
)

_CONTAINER = "docker:index/container:Container"
_REMOTE_IMAGE = "docker:index/remoteImage:RemoteImage"
_RELEASE = "kubernetes:helm.sh/v3:Release"
_PROVIDER = "pulumi:providers:kubernetes"

_NAMESPACE = "kubernetes:core/v1:Namespace"
_DAEMON_SET = "kubernetes:apps/v1:DaemonSet"

# Where the spec of the pods is, by kind.
_TEMPLATE = ("spec", "template", "spec")
_POD_SPECS: Mapping[str, tuple[str, ...]] = {
    "Pod": ("spec",),
    "PodTemplate": ("template", "spec"),
    "CronJob": ("spec", "jobTemplate", *_TEMPLATE),
} | dict.fromkeys(
    ("DaemonSet", "Deployment", "Job", "ReplicaSet", "ReplicationController", "StatefulSet"),
    _TEMPLATE,
)


@dataclass(frozen=True)
class Allowed:
    """What one resource may do although a guard says no. Patterns are those of fnmatch."""

    type: str
    name: str
    what: str
    reason: str


ALLOWED = (
    Allowed(
        _CONTAINER,
        "cloudflared-*",
        "the host's network",
        "the origins of a tunnel's host connector listen on the host's loopback",
    ),
    Allowed(
        _CONTAINER,
        "keepalive-*",
        "the host's network",
        "it asks the origins of a host connector, which listen on the host's loopback",
    ),
    *(
        Allowed(
            _DAEMON_SET,
            "multus",
            what,
            "it puts the CNI plug-in and its configuration on the node, and the plug-in's way to "
            "the API server; upstream's own manifest (thin) has the same",
        )
        for what in (
            "the host's network",
            "a directory of the host",
            "privilege",
            "privilege escalation",
            "root",
            "all capabilities",
            "no seccomp profile",
            "a writable root",
            "a service account's token",
        )
    ),
    *(
        Allowed(
            _DAEMON_SET,
            "cni-dhcp",
            what,
            "CNI's DHCP daemon enters the network namespaces of pods, from the node's own mounts",
        )
        for what in (
            "the host's network",
            "the host's processes",
            "privilege",
            "privilege escalation",
            "root",
            "all capabilities",
            "no seccomp profile",
            "a writable root",
        )
    ),
    Allowed(
        "kubernetes:apps/v1:Deployment",
        "local-path-provisioner",
        "a service account's token",
        "it makes PersistentVolumes and the pods that make their directories",
    ),
    *(
        Allowed(
            "kubernetes:core/v1:Pod",
            "helper-pod",
            what,
            "it makes and removes a volume's directory on the node, which belongs to root, with "
            "whatever its users left there; local-path-provisioner adds the hostPath",
        )
        for what in ("root", "capabilities")
    ),
    *(
        Allowed(
            _DAEMON_SET,
            "kube-vip",
            what,
            "it gives a server's interface the virtual IP and tells the LAN (ARP), and elects who "
            "does by a Lease",
        )
        for what in (
            "the host's network",
            "capabilities",
            "root",
            "a writable root",
            "a service account's token",
        )
    ),
    *(
        Allowed(_NAMESPACE, name, "privileged pods", reason)
        for name, reason in (
            ("metallb-system", "its speaker answers ARP: the host's network and NET_RAW"),
            ("csi-nfs", "its node plug-in mounts on the node"),
            ("longhorn-system", "its engine attaches disks on the node"),
            ("local-path-storage", "its helper pods make directories on the node"),
            ("rook-ceph", "its OSDs and node plug-in have the node's disks"),
            ("tailscale", "its operator's proxies set up routes of the node"),
            ("tigera-operator", "it must run before there is a pod network: in the host's"),
        )
    ),
)
"""Every exception there is, each with its reason. One that no stack, fixture or page needs fails a
test."""

Violations = Iterator[str]
Rule = Callable[[ResourceValidationArgs], Violations]

POLICIES: list[ResourceValidationPolicy] = []
"""All guards, in order of definition."""


def guard(
    description: str, level: EnforcementLevel = EnforcementLevel.MANDATORY
) -> Callable[[Rule], Rule]:
    """Makes a policy of a function that yields what is wrong with a resource.

    Its name is the function's, with hyphens.
    """

    def register(rule: Rule) -> Rule:
        def validate(args: ResourceValidationArgs, report: ReportViolation) -> None:
            for violation in rule(args):
                report(violation, None)

        POLICIES.append(
            ResourceValidationPolicy(rule.__name__.replace("_", "-"), description, validate, level)
        )
        return rule

    return register


@guard("Images and charts are pinned: an unpinned one changes under the stack (incident 9).")
def images_are_pinned(args: ResourceValidationArgs) -> Violations:
    """A tag other than latest, or a digest. A chart's version is whole, not a range."""
    images: list[tuple[str, str]] = []
    if args.resource_type == _CONTAINER:
        images = [("image", args.props.get("image") or "")]
    elif args.resource_type == _REMOTE_IMAGE:
        images = [("name", args.props.get("name") or "")]
    elif args.resource_type == _RELEASE:
        version = args.props.get("version") or ""
        if not re.fullmatch(r"v?\d+\.\d+\.\d+(?:[-+][\w.+-]+)?", version):
            yield f"chart version {version or '(none)'!r} is not pinned: write a whole one"
    else:
        images = [
            (f"container {container.get('name')}", container.get("image") or "")
            for container in _containers(_pods(args))
        ]
    for where, image in images:
        name, _, digest = image.partition("@")
        tag = name.rpartition("/")[2].partition(":")[2]
        if not (digest.startswith("sha256:") or name.startswith("sha256:")) and tag in (
            "",
            "latest",
        ):
            yield f"{where}: image {image or '(none)'!r} is not pinned: write its tag or digest"


@guard("Workloads have no more of the host than they need: no host namespaces, no privilege.")
def workloads_are_unprivileged(args: ResourceValidationArgs) -> Violations:
    """Pods and containers on the host alike; exceptions are in ALLOWED, with their reasons."""
    found: list[tuple[str, str]] = []
    if args.resource_type == _CONTAINER:
        props = args.props
        for key, what in (
            ("networkMode", "the host's network"),
            ("pidMode", "the host's processes"),
            ("ipcMode", "the host's IPC"),
            ("usernsMode", "the host's user namespace"),
        ):
            if props.get(key) == "host":
                found.append((what, f"{key} is host"))
        if props.get("privileged"):
            found.append(("privilege", "it is privileged"))
        found += [("capabilities", f"it adds {c}") for c in _added(props.get("capabilities"))]
        if "no-new-privileges:true" not in list(props.get("securityOpts") or ()):
            found.append(("privilege escalation", "securityOpts lack no-new-privileges:true"))
    pods = _pods(args)
    if pods is not None:
        for key, what in (
            ("hostNetwork", "the host's network"),
            ("hostPID", "the host's processes"),
            ("hostIPC", "the host's IPC"),
        ):
            if pods.get(key):
                found.append((what, f"{key} is true"))
        for volume in pods.get("volumes") or ():
            if "hostPath" in list(volume):
                found.append(("a directory of the host", f"volume {volume.get('name')} is one"))
        for container in _containers(pods):
            name, context = container.get("name"), container.get("securityContext") or {}
            if context.get("privileged"):
                found.append(("privilege", f"container {name} is privileged"))
            if context.get("allowPrivilegeEscalation") is not False:
                what = "privilege escalation"
                found.append((what, f"container {name} lacks allowPrivilegeEscalation: false"))
            added = _added(context.get("capabilities"))
            found += [("capabilities", f"container {name} adds {c}") for c in added]
    for what, violation in found:
        if not _is_allowed(args, what):
            yield f"{violation}. Allowed only with a reason, in policy/rules.py: {what}"


@guard("Containers do not run as root.")
def containers_do_not_run_as_root(args: ResourceValidationArgs) -> Violations:
    """Said by a number: neither Docker nor the kubelet can judge what an image calls itself."""
    what = "root"
    if _is_allowed(args, what):
        return
    if args.resource_type == _CONTAINER:
        user = str(args.props.get("user") or "")
        if not re.fullmatch(r"[1-9]\d*(?::[1-9]\d*)?", user):
            yield f"user {user or '(none)'!r} may be root: write the number of a user and group"
        return
    pods = _pods(args)
    outer = (pods or {}).get("securityContext") or {}
    for container in _containers(pods):
        context = container.get("securityContext") or {}
        non_root = context.get("runAsNonRoot", outer.get("runAsNonRoot"))
        user = context.get("runAsUser", outer.get("runAsUser"))
        if non_root is not True or not user:
            yield (
                f"container {container.get('name')} may run as root: set runAsNonRoot: true and"
                " runAsUser to a number other than 0"
            )


# Volumes that `restricted` takes.
_VOLUMES = frozenset(
    (
        *("name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
        *("persistentVolumeClaim", "projected", "secret"),
    )
)


@guard("Pods satisfy Pod Security `restricted`, and have neither a token nor a root to write to.")
def pods_are_restricted(args: ResourceValidationArgs) -> Violations:
    """What other guards do not say of it, and two of our own. The rules are those of
    kubernetes.io/docs/concepts/security/pod-security-standards; tests/cluster asks a real API
    server. Containers on the host drop all capabilities and cannot write either.
    """
    found: list[tuple[str, str]] = []
    if args.resource_type == _CONTAINER:
        if "ALL" not in ((args.props.get("capabilities") or {}).get("drops") or ()):
            found.append(("all capabilities", "capabilities drop not ALL"))
        if not args.props.get("readOnly"):
            found.append(("a writable root", "readOnly is not true"))
    pods = _pods(args)
    if pods is not None:
        if pods.get("automountServiceAccountToken") is not False:
            what = "a service account's token"
            found.append((what, "automountServiceAccountToken is not false"))
        for volume in pods.get("volumes") or ():
            if others := set(volume) - _VOLUMES - {"hostPath"}:
                found.append(("volumes", f"volume {volume.get('name')} is {', '.join(others)}"))
        outer = pods.get("securityContext") or {}
        for container in _containers(pods):
            name, context = container.get("name"), container.get("securityContext") or {}
            profile = context.get("seccompProfile") or outer.get("seccompProfile") or {}
            if profile.get("type") not in ("RuntimeDefault", "Localhost"):
                found.append(("no seccomp profile", f"container {name} has no seccompProfile"))
            if "ALL" not in ((context.get("capabilities") or {}).get("drop") or ()):
                found.append(("all capabilities", f"container {name} drops not ALL capabilities"))
            if context.get("readOnlyRootFilesystem") is not True:
                found.append(("a writable root", f"container {name} can write to its root"))
            for port in container.get("ports") or ():
                if port.get("hostPort"):
                    found.append(("ports of the host", f"container {name} has a hostPort"))
            for key in ("procMount", "seLinuxOptions", "windowsOptions"):
                if context.get(key) or outer.get(key):
                    found.append((key, f"container {name} has {key}"))
        if outer.get("sysctls"):
            found.append(("sysctls", "it sets sysctls"))
    for what, violation in found:
        if not _is_allowed(args, what):
            yield f"{violation}. Allowed only with a reason, in policy/rules.py: {what}"


# What names a secret in an environment or on a command line; a path or name of one is none.
_SECRET_NAME = re.compile(
    r"(?i)(?:.*[_-])?(?:token|secret|password|passwd|passphrase|api[_-]?key|access[_-]?key|"
    r"auth[_-]?key|private[_-]?key|credentials?)"
)
# Tailscale's keys, private keys, tokens in base64 of JSON (cloudflared's, JWT), GitHub's tokens.
_SECRET_VALUE = re.compile(
    r"tskey-[a-z]+-\w|-----BEGIN [A-Z ]*PRIVATE KEY|eyJ[\w-]{16}|gh[pousr]_\w{20}"
)
_URL_PASSWORD = re.compile(r"\w+://[^/\s:@]+:[^/\s@]+@")


@guard("Secrets come from Secrets or files: environments and arguments are shown to anyone.")
def secrets_are_not_in_the_clear(args: ResourceValidationArgs) -> Violations:
    """No literal value of a variable or option that names a secret, and none that looks like one.

    Values are not repeated.
    """
    environment: list[tuple[str, str, Any]] = []
    arguments: list[tuple[str, Sequence[Any]]] = []
    if args.resource_type == _CONTAINER:
        for variable in args.props.get("envs") or ():
            name, _, value = variable.partition("=")
            environment.append(("", name, value))
        arguments = [("", [*(args.props.get(k) or ())]) for k in ("entrypoints", "command")]
    for container in _containers(_pods(args)):
        where = f"container {container.get('name')}: "
        environment += [
            (where, variable.get("name") or "", variable.get("value"))
            for variable in container.get("env") or ()
        ]
        arguments += [(where, [*(container.get(key) or ())]) for key in ("command", "args")]
    for where, name, value in environment:
        if value and (_SECRET_NAME.fullmatch(name) or _looks_secret(value)):
            yield f"{where}variable {name} has a value in the clear: take it from a Secret or file"
    for where, words in arguments:
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            option, _, value = str(word).partition("=")
            given = value or (following if not str(following).startswith("-") else "")
            named = option.startswith("-") and _SECRET_NAME.fullmatch(option.lstrip("-"))
            if (named and given) or _looks_secret(word):
                yield f"{where}argument {option[:40]} holds a secret: name a file in its place"
    if args.resource_type == "kubernetes:core/v1:ConfigMap":
        for name, value in (args.props.get("data") or {}).items():
            if _looks_secret(value):
                yield f"key {name} holds a secret in the clear: keep it in a Secret"


@guard("What cannot be made again as it was is protected (incident 10).")
def what_lasts_is_protected(args: ResourceValidationArgs) -> Violations:
    """Cluster, its network, tunnels, and the drivers and pools of storage that go with all their
    volumes. `delete` in the settings takes the protection away: a stack
    that shall go is run without this pack.
    """
    parent = (args.opts.parent or "").rpartition("::")[0].rpartition("::")[2].rpartition("$")[2]
    what = {
        "cloudflare:index/zeroTrustTunnelCloudflared:ZeroTrustTunnelCloudflared": "tunnel",
        "docker:index/network:Network": "network",
    }.get(args.resource_type)
    if args.resource_type == "command:local:Command" and args.name == "cluster":
        what = "cluster" if parent == "homelab:index:K3dCluster" else None
    if what and not args.opts.protect:
        yield f"{what} {args.name} is not protected: remove its `delete` from the settings"
    holds_volumes = args.resource_type.startswith("kubernetes:ceph.rook.io/") or (
        args.resource_type == "kubernetes:helm.sh/v3:Release"
        and args.props.get("chart") in ("longhorn", "rook-ceph")
    )
    if holds_volumes and not args.opts.protect:
        yield f"{args.name} is not protected: every volume would go with it (docs/storage.md)"


@guard("A tunnel's records are proxied, with the only ttl that Cloudflare takes for them.")
def records_of_tunnels_are_proxied(args: ResourceValidationArgs) -> Violations:
    """Unproxied, the record names no host that exists, and the login in front is gone."""
    if args.resource_type != "cloudflare:index/dnsRecord:DnsRecord":
        return
    # The content last: it is not known while the tunnel is not made.
    wrong = [] if args.props.get("proxied") is True else ["proxied is not true"]
    if args.props.get("ttl") != 1:
        wrong.append("ttl is not 1 (automatic)")
    if wrong and str(args.props.get("content")).rstrip(".").endswith(".cfargotunnel.com"):
        yield f"record {args.name} points to a tunnel: {' and '.join(wrong)}"


@guard("A kubernetes Provider knows its cluster; no object takes an ambient kubeconfig.")
def objects_know_their_cluster(args: ResourceValidationArgs) -> Violations:
    """Without kubeconfig the provider takes ~/.kube/config, another cluster. Without
    clusterIdentifier another address of the same cluster replaces all objects.
    """
    if args.resource_type == _PROVIDER:
        given = list(args.props)
        for key in ("kubeconfig", "clusterIdentifier"):
            if key not in given:
                yield f"Provider {args.name} has no {key}"
    elif args.resource_type.startswith("kubernetes:"):
        provider = args.provider.name if args.provider else "default"
        if provider.startswith("default"):
            yield f"{args.name} has no provider of its own: give it the cluster's"


@guard("Nobody who has not logged in may do anything, and no role bypasses roles.")
def grants_are_to_someone(args: ResourceValidationArgs) -> Violations:
    """Bindings to those without a name, to every pod but for reading, and to system:masters."""
    if not re.fullmatch(r"kubernetes:rbac[^:]*:(?:Cluster)?RoleBinding", args.resource_type):
        return
    role = (args.props.get("roleRef") or {}).get("name")
    for subject in args.props.get("subjects") or ():
        name = subject.get("name")
        if name in ("system:anonymous", "system:unauthenticated", "system:masters"):
            yield f"{args.name} binds {role} to {name}: name users, groups or service accounts"
        elif name in ("system:authenticated", "system:serviceaccounts") and role != "view":
            yield f"{args.name} binds {role} to {name}, which every pod is: bind view alone"


@guard("Namespaces say which Pod Security Standard holds in them.", EnforcementLevel.ADVISORY)
def namespaces_have_pod_security(args: ResourceValidationArgs) -> Violations:
    """Enforced, or at least warned of. Advisory: in namespaces that ArgoCD fills it is not ours to
    choose.
    """
    if args.resource_type == _NAMESPACE:
        label = "pod-security.kubernetes.io"
        labels = (args.props.get("metadata") or {}).get("labels") or {}
        level = labels.get(f"{label}/enforce")
        if level is None and f"{label}/warn" not in labels:
            yield f"namespace {args.name} has neither label {label}/enforce nor {label}/warn"
        elif level == "privileged" and not _is_allowed(args, "privileged pods"):
            yield f"namespace {args.name} takes privileged pods. Allowed only with a reason"


def _pods(args: ResourceValidationArgs) -> Mapping[str, Any] | None:
    """The spec of a workload's pods; None of what is no workload."""
    package, _, kind = args.resource_type.rpartition(":")
    if not package.startswith("kubernetes:") or kind not in _POD_SPECS:
        return None
    spec: Any = args.props
    for key in _POD_SPECS[kind]:
        spec = spec.get(key) or {}
    return spec


def _containers(pods: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    for key in ("initContainers", "containers", "ephemeralContainers"):
        yield from (pods or {}).get(key) or ()


def _added(capabilities: Any) -> Iterable[str]:
    """Capabilities that are added, in Kubernetes' key or Docker's."""
    given = capabilities or {}
    return given.get("add") or given.get("adds") or ()


def _looks_secret(value: Any) -> bool:
    text = str(value)
    return bool(_SECRET_VALUE.search(text) or _URL_PASSWORD.search(text))


def _is_allowed(args: ResourceValidationArgs, what: str) -> bool:
    return any(
        (entry.type, entry.what) == (args.resource_type, what)
        and fnmatchcase(args.name, entry.name)
        for entry in ALLOWED
    )
