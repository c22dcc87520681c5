"""A namespace: who makes it, and what is allowed and granted in it.

Limits are checked against each other and against the pods that the stack itself runs there: what
the API server would refuse is refused here, before anything is changed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from ipaddress import ip_address, ip_network
from itertools import pairwise
from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field

from components.settings.model import Model, Name, Port, Text
from components.settings.problem import Path, Problem

PodSecurityLevel = Literal["privileged", "baseline", "restricted"]
_STRICTNESS = ("privileged", "baseline", "restricted")

PodSecurityVersion = Annotated[
    str,
    Text(
        "latest, or a minor version of Kubernetes such as v1.31",
        "write the minor of homelab:cluster's release, or leave it out",
        "v1.31",
        r"latest|v1\.[0-9]{1,3}",
    ),
]

_FACTORS = {
    "m": Decimal("0.001"),
    "": Decimal(1),
    "k": Decimal(10) ** 3,
    **{letter: Decimal(10) ** (3 * power) for power, letter in enumerate("MGTPE", 2)},
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
}


def amount(quantity: str) -> Decimal:
    """The number that a Kubernetes quantity stands for: cores, bytes or pieces."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity)
    assert found is not None, quantity
    return Decimal(found[1]) * _FACTORS[found[2]]


_NUMBER = r"(?:0|[1-9][0-9]{0,11})"
Cpu = Annotated[
    str,
    Text(
        'cores in quotes such as "2" or "0.5", or thousandths such as 500m',
        "write whole cores in quotes, or thousandths with m",
        "500m",
        rf"{_NUMBER}(?:m|\.[0-9]{{1,3}})?",
    ),
]
Bytes = Annotated[
    str,
    Text(
        "a size such as 256Mi or 2Gi; M and G are powers of ten, m would be thousandths of a byte",
        "write a number with Ki, Mi, Gi or Ti",
        "256Mi",
        rf"{_NUMBER}(?:\.[0-9]{{1,3}})?(?:[kMGTPE]|[KMGTPE]i)",
    ),
]
# What of each kind a quota may count; the API server takes more spellings of the same.
_QUOTA_RESOURCE = (
    r"(?:requests|limits)\.(?:cpu|memory|ephemeral-storage)|requests\.storage"
    r"|persistentvolumeclaims|pods|services|services\.(?:loadbalancers|nodeports)|secrets"
    r"|configmaps|count/[a-z][a-z0-9-]*(?:\.[a-z0-9.-]*[a-z0-9])?"
    r"|[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\.storageclass\.storage\.k8s\.io/"
    r"(?:requests\.storage|persistentvolumeclaims)"
)
QuotaResource = Annotated[
    str,
    Text(
        "a resource that a ResourceQuota counts: requests.cpu, requests.memory, limits.cpu, "
        "limits.memory, requests.storage, persistentvolumeclaims, pods, services, secrets, "
        "count/<resource>.<group>, <class>.storageclass.storage.k8s.io/requests.storage",
        "write it in full: cpu and memory are requests.cpu and requests.memory",
        "requests.memory",
        _QUOTA_RESOURCE,
    ),
]
Quantity = Annotated[
    str,
    Text(
        'a Kubernetes quantity in quotes such as "10", 500m or 20Gi',
        "write a number, with Ki, Mi, Gi or Ti for sizes and m for thousandths of a core",
        "10",
        rf"{_NUMBER}(?:\.[0-9]{{1,3}})?(?:m|[kMGTPE]|[KMGTPE]i)?",
    ),
]
Cidr = Annotated[
    str,
    Text(
        "a network such as 192.168.1.0/24 or 0.0.0.0/0, its host bits zero",
        "write the network; a single address ends in /32",
        "0.0.0.0/0",
        r"[0-9a-fA-F.:]+/[0-9]{1,3}",
        lambda text: _is_network(text),
    ),
]


def _is_network(text: str) -> bool:
    try:
        ip_network(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class Resources:
    """What a container asks for and what it may have at most, by resource."""

    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OwnPod:
    """Pods of one kind that the stack itself runs in a namespace.

    ``pods`` counts those of a rollout too. They satisfy `restricted` unless ``needs`` says less.
    """

    what: str
    path: Path
    pods: int = 0
    resources: Resources = Resources()
    needs: PodSecurityLevel = "restricted"
    internet: int | None = None
    """The port at which it must reach the internet; 0 is any."""
    origins: Mapping[str, Path] = field(default_factory=dict)
    """The namespaces whose Services it must reach, with the setting that says so."""


def rollout_pods(replicas: int) -> int:
    """How many pods there are while a Deployment rolls (maxSurge 25 %, rounded up)."""
    return replicas + ceil(replicas / 4)


class PodSecurity(Model):
    """The Pod Security Standard of the namespace. With nothing set no pod is refused, and who
    applies one that `restricted` would refuse is told so.
    """

    enforce: PodSecurityLevel | None = Field(
        default=None, description="Pods that violate it are refused; none is where left out."
    )
    audit: PodSecurityLevel | None = Field(
        default=None,
        description="Pods that violate it are noted in the audit log; by default enforce's level, "
        "without one restricted.",
    )
    warn: PodSecurityLevel | None = Field(
        default=None,
        description="Who applies a pod that violates it is warned; by default enforce's level, "
        "without one restricted.",
    )
    version: PodSecurityVersion = Field(
        default="latest",
        description="Of which Kubernetes the standard is: `latest`, the cluster's own, or a minor "
        "such as v1.31, so that an upgrade refuses nothing new.",
    )

    @property
    def labels(self) -> dict[str, str]:
        """As the admission plug-in reads them from the namespace. Without enforce it has no label
        of its own: what the cluster enforces by default stays.
        """
        levels = {
            "enforce": self.enforce,
            "audit": self.audit or self.enforce or "restricted",
            "warn": self.warn or self.enforce or "restricted",
        }
        found: dict[str, str] = {}
        for mode, level in levels.items():
            if level:
                label = f"pod-security.kubernetes.io/{mode}"
                found |= {label: level, f"{label}-version": self.version}
        return found

    def problems(self, path: Path, pods: Sequence[OwnPod]) -> Iterator[Problem]:
        """What is wrong, among itself and with the stack's own pods."""
        if self.enforce is None:
            return
        for mode in ("audit", "warn"):
            level = getattr(self, mode)
            if level and _STRICTNESS.index(level) < _STRICTNESS.index(self.enforce):
                yield Problem(
                    (*path, mode),
                    level,
                    f"{self.enforce} or stricter",
                    "leave it out, or write the level that enforce shall have one day",
                    f"says nothing that enforce, {self.enforce}, has not refused",
                    [(*path, "enforce")],
                )
        for pod in pods:
            if _STRICTNESS.index(pod.needs) < _STRICTNESS.index(self.enforce):
                yield Problem(
                    (*path, "enforce"),
                    self.enforce,
                    f"{pod.needs}, which {pod.what} needs",
                    f"write enforce: {pod.needs}, with a stricter audit and warn",
                    f"refuses the pods of {pod.what}",
                    [pod.path],
                )


class Amounts(Model):
    """Cores and bytes of a container."""

    cpu: Cpu | None = Field(default=None, description="Cores.")
    memory: Bytes | None = Field(default=None, description="Memory in bytes.")

    def given(self) -> dict[str, str]:
        return {key: value for key in ("cpu", "memory") if (value := getattr(self, key))}


class VolumeSizes(Model):
    """Sizes of PersistentVolumeClaims."""

    min: Bytes | None = Field(default=None, description="The smallest that may be asked for.")
    max: Bytes | None = Field(default=None, description="The largest that may be asked for.")

    def given(self) -> dict[str, str]:
        return {key: value for key in ("min", "max") if (value := getattr(self, key))}


class Limits(Model):
    """The LimitRange: what a container may have, and what one gets that says nothing."""

    default: Amounts = Field(default=Amounts(), description="Limit of a container without one.")
    default_request: Amounts = Field(
        default=Amounts(), description="Request of a container without one."
    )
    min: Amounts = Field(default=Amounts(), description="The least that may be requested.")
    max: Amounts = Field(default=Amounts(), description="The highest limit.")
    volumes: VolumeSizes = Field(default=VolumeSizes(), description="Bounds of volumes' sizes.")

    def effective(self, kind: str, resource: str) -> str | None:
        """What a container gets that says nothing: kind `limits` or `requests`, as the API server
        fills them in (default from max, defaultRequest from default or min).
        """
        limit = getattr(self.default, resource) or getattr(self.max, resource)
        if kind == "limits":
            return limit
        return getattr(self.default_request, resource) or limit or getattr(self.min, resource)

    def items(self) -> list[dict[str, Any]]:
        """`limits` of the LimitRange."""
        container = {
            key: amounts
            for key, amounts in {
                "default": self.default.given(),
                "default_request": self.default_request.given(),
                "min": self.min.given(),
                "max": self.max.given(),
            }.items()
            if amounts
        }
        volumes = {key: {"storage": size} for key, size in self.volumes.given().items()}
        return [
            {"type": kind, **item}
            for kind, item in (("Container", container), ("PersistentVolumeClaim", volumes))
            if item
        ]

    def problems(self, path: Path, pods: Sequence[OwnPod]) -> Iterator[Problem]:
        """What is wrong, among itself and with the stack's own pods."""
        order = (
            ("min", self.min), ("defaultRequest", self.default_request),
            ("default", self.default), ("max", self.max),
        )  # fmt: skip
        for resource in ("cpu", "memory"):
            given = [(key, value) for key, of in order if (value := getattr(of, resource))]
            for (low, least), (high, most) in pairwise(given):
                if amount(least) > amount(most):
                    yield Problem(
                        (*path, low, resource),
                        least,
                        f"at most {high}, {most}: min <= defaultRequest <= default <= max",
                        "lower it, or raise the other",
                        f"is above {high}",
                        [(*path, high, resource)],
                    )
        sizes = self.volumes
        if sizes.min and sizes.max and amount(sizes.min) > amount(sizes.max):
            yield Problem(
                (*path, "volumes", "min"),
                sizes.min,
                f"at most max, {sizes.max}",
                "lower it, or raise max",
                "is above max",
                [(*path, "volumes", "max")],
            )
        for pod in pods:
            yield from self._pod_problems(path, pod)

    def _pod_problems(self, path: Path, pod: OwnPod) -> Iterator[Problem]:
        requests, limits = pod.resources.requests, pod.resources.limits
        for resource, request in requests.items():
            least, most = getattr(self.min, resource), getattr(self.max, resource)
            limit = limits.get(resource) or self.effective("limits", resource)
            if least and amount(request) < amount(least):
                yield Problem(
                    (*path, "min", resource),
                    least,
                    f"at most {request}, which {pod.what} requests",
                    "lower it",
                    f"refuses the pods of {pod.what}",
                    [pod.path],
                )
            if most and limit and amount(limit) > amount(most):
                yield Problem(
                    (*path, "max", resource),
                    most,
                    f"at least {limit}, the limit of {pod.what}",
                    "raise it",
                    f"refuses the pods of {pod.what}",
                    [pod.path],
                )
            if limit and amount(request) > amount(limit):
                yield Problem(
                    (*path, "default", resource),
                    limit,
                    f"at least {request}, which {pod.what} requests",
                    "raise it",
                    f"refuses the pods of {pod.what}",
                    [pod.path],
                )


class PolicyPort(Model):
    """A port of pods, which may differ from that of their Service."""

    port: Port = Field(description="Port of the pod: a Service's targetPort.")
    protocol: Literal["TCP", "UDP", "SCTP"] = Field(default="TCP", description="Protocol.")


class Peers(Model):
    """Who may be talked with: pods of namespaces, and addresses."""

    namespaces: list[Name] = Field(default=[], description="All pods of these namespaces.")
    cidrs: list[Cidr] = Field(default=[], description="Addresses outside the cluster.")
    ports: list[PolicyPort] = Field(default=[], description="These ports only; all without.")

    def rule(self, side: str) -> Any:
        """A rule of a NetworkPolicy; ``side`` is `from_` or `to`."""
        peers: list[dict[str, Any]] = [
            {"namespace_selector": {"match_labels": {"kubernetes.io/metadata.name": namespace}}}
            for namespace in self.namespaces
        ]
        peers += [{"ip_block": {"cidr": cidr}} for cidr in self.cidrs]
        ports = [{"port": one.port, "protocol": one.protocol} for one in self.ports]
        return {side: peers, **({"ports": ports} if ports else {})}


class NetworkPolicy(Model):
    """What the pods of a namespace may talk with. Everything else is denied; DNS never is."""

    within: bool = Field(
        default=True,
        strict=True,
        description="Whether pods of the namespace may talk with each other.",
    )
    ingress: list[Peers] = Field(default=[], description="Who may talk to its pods.")
    egress: list[Peers] = Field(default=[], description="What its pods may talk to.")

    def reaches(self, host: str, port: int | None = None) -> bool:
        """Whether an address outside the cluster, or all of the internet for a name, is allowed."""
        try:
            wanted = ip_network(str(ip_address(host)))
        except ValueError:
            wanted = ip_network("0.0.0.0/0")
        return any(
            wanted.version == (allowed := ip_network(cidr)).version
            and int(allowed.network_address) <= int(wanted.network_address)
            and int(wanted.broadcast_address) <= int(allowed.broadcast_address)
            for peers in self.egress
            if port is None or not peers.ports or port in {one.port for one in peers.ports}
            for cidr in peers.cidrs
        )

    def allows(self, side: Literal["ingress", "egress"], namespace: str, own: str) -> bool:
        """Whether pods of the namespace may talk to those of ``own``, or these to them."""
        return (self.within and namespace == own) or any(
            namespace in peers.namespaces for peers in getattr(self, side)
        )

    def pod_problems(self, path: Path, own: str, pods: Sequence[OwnPod]) -> Iterator[Problem]:
        """What it would cut the stack's own pods in namespace ``own`` from."""
        for pod in pods:
            if pod.internet is not None and not self.reaches("internet", pod.internet or None):
                ports = f", ports: [{{port: {pod.internet}}}]" if pod.internet else ""
                yield Problem(
                    (*path, "egress"),
                    None,
                    f"a rule by which {pod.what} reaches the internet",
                    f"add {{cidrs: [0.0.0.0/0]{ports}}}",
                    f"cuts {pod.what} off",
                    [pod.path],
                )
            for origin, route in pod.origins.items():
                if not self.allows("egress", origin, own):
                    yield Problem(
                        (*path, "egress"),
                        None,
                        f"a rule by which {pod.what} reaches namespace {origin}",
                        f"add {{namespaces: [{origin}]}}",
                        f"cuts {pod.what} from its origin in {origin}",
                        [route],
                    )

    def problems(self, path: Path, known: frozenset[str]) -> Iterator[Problem]:
        """What is wrong within the rules."""
        for side, rules in (("ingress", self.ingress), ("egress", self.egress)):
            for index, peers in enumerate(rules):
                here: Path = (*path, side, index)
                if not (peers.namespaces or peers.cidrs):
                    yield Problem(
                        here,
                        None,
                        "namespaces or cidrs",
                        "name them: a rule without peers would allow everyone; if that is meant, "
                        "cidrs: [0.0.0.0/0] and the namespaces",
                        "names nobody",
                    )
                for position, namespace in enumerate(peers.namespaces):
                    if namespace not in known:
                        yield Problem(
                            (*here, "namespaces", position),
                            namespace,
                            "a namespace that is declared",
                            f"correct it, or declare it: homelab:namespaces.{namespace} (owner "
                            "argocd if ArgoCD makes it)",
                            "is not declared",
                            [("namespaces", namespace), ("secrets", namespace)],
                        )


class Namespace(Model):
    """A namespace of the cluster."""

    owner: Literal["pulumi", "argocd"] = Field(
        default="pulumi",
        description="Who makes it. `argocd`: it exists or ArgoCD makes it, and this stack only "
        "knows its name.",
    )
    pod_security: PodSecurity | None = Field(
        default=None,
        description="Pod Security Standard. Left out: `restricted` where only a tunnel's connector "
        "runs, `privileged` where the stack's own pods need it, else audit and warn alone.",
    )
    quota: dict[QuotaResource, Quantity] = Field(
        default={}, description="ResourceQuota: what all of its pods and volumes have together."
    )
    limits: Limits | None = Field(
        default=None, description="LimitRange: bounds and defaults of each container and volume."
    )
    network_policy: NetworkPolicy | None = Field(
        default=None, description="What its pods may talk with; everything where left out."
    )

    def problems(
        self, name: str, known: frozenset[str], pods: Sequence[OwnPod], secrets: int
    ) -> Iterator[Problem]:
        """What is wrong, among itself and with what the stack runs there: ``pods``, and
        ``secrets`` in number.
        """
        path: Path = ("namespaces", name)
        if self.owner != "pulumi":
            for key in ("podSecurity", "quota", "limits", "networkPolicy"):
                if getattr(self, _ATTRIBUTES[key]):
                    yield Problem(
                        (*path, key),
                        None,
                        "this key only in namespaces with owner pulumi",
                        "set it where the namespace is made, or let the stack own it",
                        "is in a namespace that others make",
                        [(*path, "owner")],
                    )
            return
        if self.pod_security is not None:
            yield from self.pod_security.problems((*path, "podSecurity"), pods)
        if self.limits is not None:
            yield from self.limits.problems((*path, "limits"), pods)
        if self.network_policy is not None:
            yield from self.network_policy.problems((*path, "networkPolicy"), known)
            yield from self.network_policy.pod_problems((*path, "networkPolicy"), name, pods)
        yield from self._quota_problems((*path, "quota"), pods, secrets)

    def _quota_problems(
        self, path: Path, pods: Sequence[OwnPod], secrets: int
    ) -> Iterator[Problem]:
        limits = self.limits or Limits()
        for resource, hard in self.quota.items():
            here: Path = (*path, resource)
            kind, _, of = resource.partition(".")
            unit_is_right = (
                re.fullmatch(r".*m|[0-9.]+", hard)
                if of == "cpu"
                else not hard.endswith("m")
                and (_counts_bytes(resource) or re.fullmatch(r"[0-9]+", hard))
            )
            if not unit_is_right:
                yield Problem(
                    here,
                    hard,
                    "cores" if of == "cpu" else "a size" if _counts_bytes(resource) else "a number",
                    "cores are whole or in thousandths (m), sizes in Mi or Gi, objects in pieces",
                )
                continue
            used = _pieces(resource, pods, secrets)
            if kind in ("requests", "limits") and of in ("cpu", "memory"):
                effective = limits.effective(kind, of)
                key = "default" if kind == "limits" else "defaultRequest"
                default: Path = (*path[:-1], "limits", key, of)
                if effective is None:
                    yield Problem(
                        here,
                        hard,
                        f"this together with limits.{key}.{of}",
                        f"add limits.{key}.{of}: with this quota a pod that says nothing of {of} "
                        "is refused, and its Deployment waits without a word",
                        "is a quota that containers without their own are refused by",
                        [(*path[:-1], "limits")],
                    )
                elif amount(effective) > amount(hard):
                    yield Problem(
                        default,
                        effective,
                        f"at most the quota's {resource}, {hard}",
                        "lower it, or raise the quota: no pod that says nothing would fit",
                        f"is above homelab:namespaces.{path[1]}.quota",
                        [here],
                    )
                    continue
                used = sum(
                    (
                        pod.pods * amount(getattr(pod.resources, kind).get(of) or effective or "0")
                        for pod in pods
                    ),
                    Decimal(0),
                )
            smallest = limits.volumes.min
            if of == "storage" and smallest and amount(smallest) > amount(hard):
                yield Problem(
                    (*path[:-1], "limits", "volumes", "min"),
                    smallest,
                    f"at most the quota's {resource}, {hard}",
                    "lower it, or raise the quota: no volume would fit",
                    f"is above homelab:namespaces.{path[1]}.quota",
                    [here],
                )
            if used > amount(hard):
                what = " and ".join(dict.fromkeys(pod.what for pod in pods)) or "its Secrets"
                yield Problem(
                    here,
                    hard,
                    f"at least {_shown(used, resource)}, which the stack itself needs there "
                    f"({what}; while it rolls, a pod more)",
                    "raise it, with room for what else runs there",
                    "has no room for the stack's own pods",
                    [pod.path for pod in pods],
                )


_ATTRIBUTES = {
    "podSecurity": "pod_security",
    "quota": "quota",
    "limits": "limits",
    "networkPolicy": "network_policy",
}


def _counts_bytes(resource: str) -> bool:
    return resource.endswith((".memory", ".storage", "ephemeral-storage"))


def _pieces(resource: str, pods: Sequence[OwnPod], secrets: int) -> Decimal:
    """How many objects of a kind the stack itself has in the namespace."""
    if resource in ("pods", "count/pods"):
        return Decimal(sum(pod.pods for pod in pods))
    if resource == "count/deployments.apps":
        return Decimal(sum(1 for pod in pods if pod.pods))
    if resource in ("secrets", "count/secrets"):
        return Decimal(secrets)
    return Decimal(0)


def _shown(number: Decimal, resource: str) -> str:
    if resource.endswith(".cpu"):
        return f"{ceil(number * 1000)}m"
    if _counts_bytes(resource):
        return f"{ceil(number / 1024**2)}Mi"
    return str(number)
