"""Verb: who owns the objects of a cluster, as the objects themselves say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hostctl.machine import Machine
from hostctl.protocol import Failure, Result
from hostctl.spec import CLUSTER_NAME, KIND, Items, Value, checked
from hostctl.workloads import ASKED_KUBECONFIG, ask_cluster, is_silent

OWNERS_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "kinds": Items(Value(KIND), []),
    "kubeconfig": ASKED_KUBECONFIG,
}
# Metadata alone, which of a Secret that kubectl applied hold its values too, in an annotation.
# The answer has none of it.
_METADATA = 'jsonpath={range .items[*]}{.apiVersion}{" "}{.kind}{" "}{.metadata}{"\\n"}{end}'
# What the cluster makes by the thousand for other objects, whose owner is theirs.
_PASSING = frozenset(
    {
        *("ComponentStatus", "ControllerRevision.apps", "Endpoints", "Event"),
        *("EndpointSlice.discovery.k8s.io", "Event.events.k8s.io", "IPAddress.networking.k8s.io"),
        *("Lease.coordination.k8s.io", "NodeMetrics.metrics.k8s.io", "Pod"),
        *("PodMetrics.metrics.k8s.io", "ReplicaSet.apps"),
    }
)


def cluster_owners(machine: Machine, spec: dict[str, Any]) -> Result:
    """The owners of the objects of some kinds, such as `Deployment.apps`; with no ``kinds``, of all
    that last.
    ``state`` is unknown where the API does not answer in time; ``unseen`` says what could not be
    asked for, and ``whole`` whether each kind that is served could be listed.

    Two calls of kubectl, however many objects there are. Asked in the node of a k3d cluster: the
    kubeconfig on the host may be missing, or that of a cluster that is gone, and the run that asks
    is the one that writes it anew. Another cluster is asked with the kubeconfig that is given.
    """
    wanted = checked(spec, OWNERS_SPEC, "cluster owners")
    step = f"looking who owns the objects of cluster {wanted['cluster']}"
    unseen: list[str] = []

    def ask(*arguments: str) -> str:
        try:
            ran = ask_cluster(machine, wanted, arguments, step)
        except Failure as failure:
            if failure.code not in ("cannot-tell", "timed-out"):
                raise
            raise _Silent(failure.cause) from None
        if ran.code:
            if is_silent(ran):
                raise _Silent(ran.complaint)
            # Of an API of others that is down, such as metrics: the rest is printed.
            if not ran.out.strip():
                raise _cannot_tell(step, ran.complaint)
            unseen.append(ran.complaint)
        return ran.text

    try:
        served = ask("api-resources", "--verbs=list", "--no-headers=true")
        resources = ",".join(sorted(_resources(served, wanted["kinds"])))
        options = ("--all-namespaces", "--show-managed-fields", f"--output={_METADATA}")
        before = len(unseen)
        seen = ask("get", resources, *options) if resources else ""
    except _Silent as silent:
        unknown = {"state": "unknown", "detail": str(silent), "unseen": [], "whole": False}
        return {**unknown, "objects": []}
    if seen and not seen.endswith("\n"):
        unseen.append(f"more than {len(seen) // 2**20} MiB of objects")
    whole = len(unseen) == before
    objects = []
    for line in seen.split("\n")[:-1]:
        try:
            version, kind, metadata = line.split(" ", 2)
            group = version.rpartition("/")[0]
            objects.append((f"{kind}.{group}" if group else kind, json.loads(metadata)))
        except ValueError:
            raise _cannot_tell(step, f"not an object's metadata: {line[:80]!r}") from None
    charts = {
        one["name"]: f"HelmChart {one.get('namespace')}/{one['name']}"
        for kind, one in objects
        if kind == "HelmChart.helm.cattle.io"
    }
    return {
        "state": "known",
        "detail": "",
        "unseen": unseen,
        "whole": whole,
        "objects": [
            {
                "kind": kind,
                "namespace": metadata.get("namespace"),
                "name": metadata["name"],
                "owners": owners_of(kind, metadata, charts),
                "maker": maker_of(metadata),
                "writers": writers_of(kind, metadata),
            }
            for kind, metadata in objects
        ],
    }


class _Silent(Exception):
    """The API does not answer."""


def _cannot_tell(step: str, cause: str) -> Failure:
    return Failure("cannot-tell", step, cause, "run it by hand: kubectl api-resources, kubectl get")


def _resources(table: str, kinds: Sequence[str]) -> Iterator[str]:
    """The resources of a table of `kubectl api-resources`: NAME, SHORTNAMES, which may be empty,
    APIVERSION, NAMESPACED, KIND."""
    for row in (line.split() for line in table.splitlines()):
        if len(row) < 4:
            continue
        group = row[-3].rpartition("/")[0]
        suffix = f".{group}" if group else ""
        kind = row[-1] + suffix
        if kind in kinds or (not kinds and kind not in _PASSING):
            yield row[0] + suffix


def owners_of(
    kind: str, metadata: Mapping[str, Any], charts: Mapping[str, str] | None = None
) -> list[str]:
    """Who makes an object and would make it again, each by its own marks: the object that controls
    it, an ArgoCD Application, a Helm release, k3s (its add-ons, its ``charts``: HelmChart by
    release), Pulumi, hostctl. None where there is no mark.
    """
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    managers = [
        entry["manager"]
        for entry in metadata.get("managedFields") or []
        if entry.get("manager") and not entry.get("subresource")
    ]
    owners = [
        f"{reference['kind']} {reference['name']}"
        for reference in metadata.get("ownerReferences") or []
        if reference.get("controller")
    ]
    application = _application(kind, metadata, managers)
    if application:
        owners.append(f"ArgoCD application {application}")
    release, of = annotations.get("meta.helm.sh/release-name"), metadata.get("namespace")
    of = annotations.get("meta.helm.sh/release-namespace", of)
    if kind == "Secret" and labels.get("owner") == "helm" and labels.get("name"):
        # In which Helm keeps what it installed.
        release, of = labels["name"], metadata.get("namespace")
    if release:
        by = (charts or {}).get(release)
        owners.append(f"Helm release {of}/{release}" + (f" of {by}" if by else ""))
    # Of wrangler, by which k3s applies what it brings (rancher/wrangler, pkg/apply).
    gvk, name = (annotations.get(f"objectset.rio.cattle.io/owner-{key}") for key in ("gvk", "name"))
    if gvk and name:
        maker = gvk.rpartition("Kind=")[2]
        namespace = annotations.get("objectset.rio.cattle.io/owner-namespace")
        owners.append(f"k3s add-on {name}" if maker == "Addon" else f"{maker} {namespace}/{name}")
    if any(manager.startswith("pulumi-kubernetes") for manager in managers):
        owners.append("Pulumi")
    elif "homelab" in managers:
        owners.append("hostctl")
    return owners


def maker_of(metadata: Mapping[str, Any]) -> str:
    """The field manager that came first: who made an object that bears no owner's mark."""
    first = sorted(
        (entry.get("time", ""), entry["manager"])
        for entry in metadata.get("managedFields") or []
        if entry.get("manager")
    )
    manager = first[0][1] if first else ""
    return "Kubernetes" if not manager or manager.startswith(("kube-", "k3s")) else manager


def _application(kind: str, metadata: Mapping[str, Any], managers: Sequence[str]) -> str | None:
    """The ArgoCD Application that tracks an object. As ArgoCD does, an id that names another object
    is taken for a copy (argoproj/argo-cd, util/argo/resource_tracking.go)."""
    tracking = (metadata.get("annotations") or {}).get("argocd.argoproj.io/tracking-id", "")
    application, _, place = tracking.partition(":")
    if application:
        name, _, group = kind.partition(".")
        whole, _, called = place.partition(":")
        if whole == f"{group}/{name}" and called.rpartition("/")[2] == metadata["name"]:
            return application
        return None
    if any(manager.startswith("argocd") for manager in managers):
        # The older way of tracking, by a label that others use too.
        return (metadata.get("labels") or {}).get("app.kubernetes.io/instance")
    return None


# People, and those whose writing is an owner's. k3s fills in the tokens of service accounts; its
# deploy@<node> applies an add-on anew, as when k3d has put the host's names into CoreDNS'.
_NO_WRITERS = (
    *("kubectl", "pulumi-kubernetes", "homelab", "helm", "Helm", "argocd", "kube-", "k3s"),
    "deploy@",
)


def writers_of(kind: str, metadata: Mapping[str, Any]) -> list[str]:
    """Who has written the data of a Secret or ConfigMap after it was made: what rotates it."""
    if kind not in ("Secret", "ConfigMap"):
        return []
    made = metadata.get("creationTimestamp") or ""
    return sorted(
        {
            entry["manager"]
            for entry in metadata.get("managedFields") or []
            if "f:data" in (entry.get("fieldsV1") or {})
            and entry.get("time", "") > made
            and not entry.get("manager", "").startswith(_NO_WRITERS)
        }
    )
