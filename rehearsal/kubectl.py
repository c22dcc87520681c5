"""kubectl as hostctl uses it, on the make-believe API server of the kubernetes stand-in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hostctl.machine import Ran
from rehearsal.apiserver import ApiError, ApiServer, plural
from rehearsal.core import World
from rehearsal.providers.kubernetes import cluster_id

Object = dict[str, Any]

_LAST_APPLIED = "f:kubectl.kubernetes.io/last-applied-configuration"


class Kubectl:
    """A kubectl whose kubeconfig points at the cluster with this CA (base64).

    world: the rehearsal's `world`. now: the host's time, in seconds. pods: what becomes of a pod,
    `pods.json` of the machine's world.
    """

    def __init__(self, world: Path, authority: str, now: float, pods: Object) -> None:
        self.pods = pods
        self.cluster = cluster_id(authority)
        self.api = ApiServer(World(world / "kubernetes"), self.cluster)
        self.now = datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

    def run(self, words: list[str], input: bytes) -> Ran:
        options = [word for word in words if word.startswith("-")]
        operands = [word for word in words if not word.startswith("-")]
        flags = {}
        for word in options:
            flag, _, value = word.partition("=")
            flags[flag] = value
        try:
            match operands:
                case ["get"] if flags == {"--raw": "/readyz"}:
                    return Ran(0, b"ok", b"")
                case ["get", "namespaces"] if flags == {"--output": "name"}:
                    return self._lines(
                        f"namespace/{one['metadata']['name']}"
                        for one in self._objects("_cluster", "namespaces")
                    )
                case ["get", what] if flags.keys() <= _GET and flags.get("--output") == "json":
                    return self._get(what, flags)
                case ["api-resources"] if flags == {"--verbs": "list", "--no-headers": "true"}:
                    return self._lines(iter(sorted({row for row, _ in self._all()})))
                case ["get", what] if flags.keys() == _GET_METADATA and (
                    flags["--output"] == _METADATA
                ):
                    named = set(what.split(","))
                    return self._lines(
                        f"{obj['apiVersion']} {obj['kind']} {json.dumps(obj['metadata'])}"
                        for row, obj in self._all()
                        if _named(row) in named
                    )
                case ["create"] if flags == _CREATE:
                    return self._create(json.loads(input))
                case ["create"] if flags == _DRY_RUN:
                    obj = json.loads(input)
                    self.api.create(obj, "kubectl-create", dry_run=True)
                    return self._lines(iter([f"{obj['kind'].lower()}/{obj['metadata']['name']}"]))
                case ["delete", "pods"] if flags.keys() == _DELETE:
                    return self._delete("pods", flags["--namespace"], flags["--selector"])
                case ["scale", what] if flags.keys() == {"--namespace", "--replicas"}:
                    return self._scale(what, flags["--namespace"], int(flags["--replicas"]))
                case ["rollout", "restart", what] if flags.keys() == {"--namespace"}:
                    return self._restart(what, flags["--namespace"])
                case ["apply"] if flags.keys() == {*_APPLY, "--kustomize"}:
                    if {k: v for k, v in flags.items() if k != "--kustomize"} == _APPLY:
                        return self._apply(flags["--kustomize"])
                case ["wait", "customresourcedefinitions"] if "--for" in flags:
                    return Ran(0, b"", b"")
        except ApiError as error:
            reason = "" if error.reason == "NoMatch" else f" from server ({error.reason})"
            return Ran(1, b"", f"Error{reason}: {error}\n".encode())
        shown = " ".join(operands[:2])
        return Ran(
            2, b"", f"rehearsal: kubectl {shown}: not modelled with {sorted(flags)}\n".encode()
        )

    @staticmethod
    def _lines(lines: Iterator[str]) -> Ran:
        return Ran(0, "".join(f"{line}\n" for line in lines).encode(), b"")

    def _objects(self, namespace: str, resource: str) -> Iterator[Object]:
        """The objects of a kind, named as kubectl lets one: singular, plural, with its group."""
        word, _, group = resource.lower().partition(".")
        below = f"{self.cluster}/{namespace}" if namespace else self.cluster
        for key, obj in self.api.world.list(below):
            kind, _, of = key.split("/")[2].lower().partition(".")
            plural = kind[:-1] + "ies" if kind.endswith("y") else kind + "s"
            if kind.endswith("ss"):
                plural = kind + "es"
            if word in (kind, plural) and group in ("", of):
                yield obj

    def _all(self) -> Iterator[tuple[str, Object]]:
        """All objects, each with its kind's row of `kubectl api-resources`."""
        for _, obj in self.api.world.list(self.cluster):
            # Helm's releases are the world's own records.
            if "kind" not in obj:
                continue
            namespaced = str("namespace" in obj["metadata"]).lower()
            yield f"{plural(obj['kind'])}  {obj['apiVersion']}  {namespaced}  {obj['kind']}", obj

    def _one(self, what: str, namespace: str | None) -> Object:
        resource, _, name = what.partition("/")
        for obj in self._objects(namespace or "_cluster", resource):
            if obj["metadata"]["name"] == name:
                return obj
        raise ApiError("NotFound", f'{resource} "{name}" not found')

    def _get(self, what: str, flags: Object) -> Ran:
        namespace = flags.get("--namespace")
        if "/" in what:
            try:
                return Ran(0, json.dumps(self._one(what, namespace)).encode(), b"")
            except ApiError:
                if "--ignore-not-found" in flags:
                    return Ran(0, b"", b"")
                raise
        within = "" if "--all-namespaces" in flags else namespace or "_cluster"
        items = [obj for word in what.split(",") for obj in self._objects(within, word)]
        if "--selector" in flags:
            items = [obj for obj in items if _selected(obj, flags["--selector"])]
        return Ran(0, json.dumps({"kind": "List", "items": items}).encode(), b"")

    def _create(self, obj: Object) -> Ran:
        if obj["kind"] == "Pod":
            obj = {**obj, "status": self._pod_status(obj)}
        self.api.create(obj, _CREATE["--field-manager"])
        return self._lines(iter([f"{obj['kind'].lower()}/{obj['metadata']['name']}"]))

    def _pod_status(self, pod: Object) -> Object:
        """What the kubelet says in the end of a pod that asks for a name."""
        fate = self.pods.get("lookup", "resolves")
        (container,) = pod["spec"]["containers"]
        host, message = container["command"][-1], ""
        if fate == "unscheduled":
            what = "0/1 nodes are available: 1 node(s) had untolerated taint"
            scheduled = {"type": "PodScheduled", "status": "False", "message": what}
            return {"phase": "Pending", "conditions": [scheduled]}
        if fate == "no-image":
            waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
            return {"phase": "Pending", "containerStatuses": [{"state": {"waiting": waiting}}]}
        if fate == "fails":
            message = ";; connection timed out; no servers could be reached\n"
        elif fate != "resolves":
            raise ApiError("BadRequest", f"rehearsal: pods.json: {fate} is not modelled for {host}")
        ended = {"exitCode": 1 if message else 0, "message": message}
        return {
            "phase": "Failed" if message else "Succeeded",
            "containerStatuses": [{"state": {"terminated": ended}}],
        }

    def _delete(self, resource: str, namespace: str, selector: str) -> Ran:
        wanted = dict(pair.split("=") for pair in selector.split(","))
        gone = [
            obj
            for obj in self._objects(namespace, resource)
            if wanted.items() <= obj["metadata"].get("labels", {}).items()
        ]
        for obj in gone:
            self.api.delete(obj)
        return self._lines(f'pod "{obj["metadata"]["name"]}" deleted' for obj in gone)

    def _scale(self, what: str, namespace: str, replicas: int) -> Ran:
        obj = self._one(what, namespace)
        if not replicas:
            # What a workload would own exists where a test put it.
            labels = obj["spec"].get("selector", {}).get("matchLabels", {})
            for pod in list(self._objects(namespace, "pods")):
                if labels and labels.items() <= pod["metadata"].get("labels", {}).items():
                    name = pod["metadata"]["name"]
                    self.api.world.delete(f"{self.cluster}/{namespace}/Pod/{name}")
        obj["spec"]["replicas"] = replicas
        obj["metadata"]["generation"] = obj["metadata"].get("generation", 1) + 1
        obj["status"] = {"observedGeneration": obj["metadata"].get("generation", 1)}
        if replicas:
            obj["status"] |= {"replicas": replicas, "readyReplicas": replicas}
        self._put(obj)
        return self._lines(iter([f"{what} scaled"]))

    def _restart(self, what: str, namespace: str) -> Ran:
        obj = self._one(what, namespace)
        metadata = obj["spec"]["template"].setdefault("metadata", {})
        metadata.setdefault("annotations", {})["kubectl.kubernetes.io/restartedAt"] = self.now
        self._put(obj)
        return self._lines(iter([f"{what} restarted"]))

    def _put(self, obj: Object) -> None:
        metadata = obj["metadata"]
        group = obj["apiVersion"].rpartition("/")[0]
        kind = f"{obj['kind']}.{group}" if group else obj["kind"]
        namespace = metadata.get("namespace", "_cluster")
        self.api.world.put(f"{self.cluster}/{namespace}/{kind}/{metadata['name']}", obj)

    def _apply(self, target: str) -> Ran:
        """Applies a made-up kustomization: a namespace, Argo CD's kinds, an Application."""
        found = re.fullmatch(r"(.+)//([^?]+)\?ref=([0-9a-f]{40})&timeout=120s", target)
        if found is None:
            return Ran(1, b"", b"error: rehearsal: not REPOSITORY//PATH?ref=COMMIT&timeout=120s\n")
        repository, path, commit = found.groups()
        applied, missing = [], None
        try:
            # kubectl maps all kinds before it applies the first object.
            self.api.resource("argoproj.io/v1alpha1", "Application")
        except ApiError as error:
            missing = error
        for obj in kustomization(repository, path, commit):
            if missing and obj["kind"] == "Application":
                continue
            self.api.apply(obj, _APPLY["--field-manager"], force=True)
            self._migrate(obj)
            applied.append(f"{obj['kind'].lower()}/{obj['metadata']['name']}")
        if missing:
            return Ran(1, b"", f"error: {missing}\nensure CRDs are installed first\n".encode())
        return self._lines(iter(applied))

    def _migrate(self, obj: Object) -> None:
        """Takes over what a client-side apply owned (kubectl, migrateToSSAIfNecessary)."""
        former = {
            (entry["manager"], "Update")
            for entry in self.api.get(obj)["metadata"].get("managedFields", [])
            if entry["operation"] == "Update"
            and _LAST_APPLIED
            in entry.get("fieldsV1", {}).get("f:metadata", {}).get("f:annotations", {})
        }
        if former:
            self.api.take_over(obj, former, _APPLY["--field-manager"])
            self.api.apply(obj, _APPLY["--field-manager"], force=True)


_GET = {
    "--namespace",
    "--all-namespaces",
    "--output",
    "--ignore-not-found",
    "--show-managed-fields",
    "--selector",
}
_GET_METADATA = {"--all-namespaces", "--show-managed-fields", "--output"}
_METADATA = 'jsonpath={range .items[*]}{.apiVersion}{" "}{.kind}{" "}{.metadata}{"\\n"}{end}'
_DELETE = {"--namespace", "--selector", "--wait"}
_CREATE = {"--field-manager": "homelab", "--filename": "-", "--output": "name"}
_DRY_RUN = {"--dry-run": "server", "--filename": "-", "--output": "name"}
_APPLY = {
    "--server-side": "",
    "--force-conflicts": "",
    "--field-manager": "homelab",
    "--output": "name",
}


def _named(row: str) -> str:
    name, version, _, _ = row.split()
    group = version.rpartition("/")[0]
    return f"{name}.{group}" if group else name


def _selected(obj: Object, selector: str) -> bool:
    labels = obj["metadata"].get("labels", {})
    return all(
        labels.get(key) == value
        for key, _, value in (term.partition("=") for term in selector.split(","))
    )


def kustomization(repository: str, path: str, commit: str) -> list[Object]:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1alpha1", "served": True, "storage": True, "schema": schema}
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argocd"}},
        *(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": f"{kind.lower()}s.argoproj.io"},
                "spec": {
                    "group": "argoproj.io",
                    "names": {
                        "kind": kind,
                        "listKind": f"{kind}List",
                        "plural": f"{kind.lower()}s",
                        "singular": kind.lower(),
                    },
                    "scope": "Namespaced",
                    "versions": [version],
                },
            }
            for kind in ("Application", "ApplicationSet")
        ),
        {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Application",
            "metadata": {"name": "root", "namespace": "argocd"},
            "spec": {
                "project": "default",
                "source": {"repoURL": repository, "path": path, "targetRevision": commit},
                "destination": {"server": "https://kubernetes.default.svc"},
            },
        },
    ]
