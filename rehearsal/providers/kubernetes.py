"""The stand-in of pulumi-kubernetes 4.34.2: any plain kind and `helm.sh/v3:Release`.

It asks a :class:`rehearsal.apiserver.Api` what the official provider asks the API server: the
make-believe one, or with HOMELAB_REHEARSAL_RUN=1 the real one that the kubeconfig names.
Rules and texts come from the provider's source (github.com/pulumi/pulumi-kubernetes, provider/pkg)
and from the recordings that tests/unit/test_golden.py replays.

World of the make-believe one, below `<rehearsal>/world/kubernetes/`:
  <cluster>/<namespace or _cluster>/<Kind.group>/<name>.json
      one live object; edit it to make drift
  ready.json
      {"<Kind>/<namespace>/<name>": seconds or "never"}: when an object becomes ready. What is not
      named is ready at once, but an Ingress never, and a LoadBalancer Service when a pool of
      MetalLB has the address that it asks for, or a free one.
  charts.json
      {"<repository>/<chart>@<version>": "<appVersion>"}: the Helm charts that can be fetched, on
      top of rehearsal/charts.json. In place of the version {"appVersion", "values": the keys that
      its schema or values.yaml knows, those below others as "service.enabled", where all that the
      stacks set is and anything else is refused, "crds": {"<plural>.<group>/<version>": "<Kind>"}}
  webhooks.json
      see ApiServer
<cluster> is `sha256(CA certificate)[:16]`, so a cluster made anew is empty. A kubeconfig reaches
the cluster of `world/machine/clusters/<name>.json` that is running and has its port and CA.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from rehearsal.apiserver import (
    CLUSTER_SCOPED,
    KUBERNETES,
    MISSING,
    Api,
    ApiError,
    ApiServer,
    FieldPath,
    Object,
    copied,
    encoded,
    headless,
    is_secret,
    kinds,
    known_versions,
    paths,
    remove_at,
    schema_faults,
    schema_of,
    value_at,
    words,
)
from rehearsal.core import (
    REALLY,
    UNKNOWN,
    Checked,
    Diff,
    DiffKind,
    Exists,
    Failure,
    InitFailed,
    Properties,
    Provider,
    Request,
    Secret,
    Unimplemented,
    World,
    has_secret,
    has_unknown,
    plain,
    property_path,
    reveal,
    serve,
)

RETRY_SECONDS = (1, 2, 4, 8, 16)
"""Waits between attempts to create what lacks its namespace or CRD (provider/pkg/retry)."""

# Objects between Pulumi and Kubernetes

_READ_ONLY_METADATA = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "resourceVersion",
    "uid",
)
_DASHED = {
    f"x_kubernetes_{name}": f"x-kubernetes-{name.replace('_', '-')}"
    for name in (
        "embedded_resource",
        "int_or_string",
        "list_map_keys",
        "list_type",
        "map_type",
        "preserve_unknown_fields",
        "validations",
    )
}
_UNDERSCORED = {dashed: name for name, dashed in _DASHED.items()}


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {names.get(key, key): _renamed(item, names) for key, item in value.items()}
    return [_renamed(item, names) for item in value] if isinstance(value, list) else value


def _is_crd(obj: Object) -> bool:
    return obj.get("kind") == "CustomResourceDefinition" and str(obj.get("apiVersion")).startswith(
        "apiextensions.k8s.io/"
    )


def _object(properties: Properties) -> Object:
    """The Kubernetes object that a property map stands for: no secret marks, dashed schema keys."""
    obj = plain(properties)
    return _renamed(obj, _DASHED) if _is_crd(obj) else obj


def _normalized(obj: Object) -> Object:
    """The object in the form in which it is compared (provider.go, normalizeInputs). In place."""
    if not has_unknown(obj):
        encoded(obj)
        if _is_crd(obj):
            obj.pop("status", None)
            if obj.get("spec", {}).get("preserveUnknownFields") is False:
                del obj["spec"]["preserveUnknownFields"]
    metadata = obj.get("metadata")
    if isinstance(metadata, dict):
        for key in _READ_ONLY_METADATA:
            metadata.pop(key, None)
    return obj


def _marked(out: Properties, like: Properties) -> Properties:
    """Lay the secret marks of one property map on another (provider.go, annotateSecrets). In place.

    A Secret's data is always secret; elsewhere the value of a key that holds a secret becomes one
    as a whole, except that maps are gone into.
    """
    if out.get("kind") == "Secret":
        for key in ("data", "stringData"):
            if key in out and not isinstance(out[key], Secret):
                out[key] = Secret(out[key])
        return out
    for key, value in like.items():
        held = out.get(key, MISSING)
        if held is MISSING:
            continue
        if isinstance(held, dict) and isinstance(value, dict):
            _marked(held, value)
        elif not isinstance(held, Secret) and has_secret(value):
            out[key] = Secret(held)
    return out


_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def _checkpoint(inputs: Object, live: Object, like: Properties, manager: str) -> Properties:
    """The state that the engine keeps: the live object, and in `__inputs` what made it."""
    inputs, live = copied(inputs), copied(live)
    if _is_crd(live):
        inputs, live = _renamed(inputs, _UNDERSCORED), _renamed(live, _UNDERSCORED)
    state = _marked(live, like)
    annotations = live["metadata"].get("annotations") or {}
    if _LAST_APPLIED in annotations and has_secret(like):
        # What a client-side apply wrote down is the whole object.
        annotations[_LAST_APPLIED] = Secret(annotations[_LAST_APPLIED])
    state["__inputs"] = _marked(inputs, like)
    state["__initialApiVersion"] = live["apiVersion"]
    state["__fieldManager"] = manager
    return state


def _parsed(state: Properties) -> tuple[Object, Object]:
    """Inputs and live object of a checkpoint."""
    live = {key: value for key, value in state.items() if not key.startswith("__")}
    return _object(reveal(state.get("__inputs")) or {}), _object(live)


def _pruned(source: Any, shape: Any) -> Any:
    """What of the source has a place in the shape (util.go, pruneMap)."""
    if isinstance(source, dict) and isinstance(shape, dict):
        return {k: _pruned(source[k], shape[k]) for k in source if k in shape}
    if isinstance(source, list) and isinstance(shape, list):
        return [_pruned(a, b) for a, b in zip(source, shape, strict=False)]
    return source


def _full_name(obj: Object) -> str:
    namespace = obj["metadata"].get("namespace")
    return f"{namespace}/{obj['metadata']['name']}" if namespace else obj["metadata"]["name"]


def _annotation(obj: Object, name: str) -> str:
    metadata = obj.get("metadata")
    annotations = metadata.get("annotations") if isinstance(metadata, dict) else None
    value = annotations.get(f"pulumi.com/{name}") if isinstance(annotations, dict) else None
    return value if isinstance(value, str) else ""


# Differences (provider.go, convertPatchToDiff; diff.go)

_FORCE_NEW: dict[str, Object] = yaml.safe_load("""
apps/v1:
  DaemonSet: [spec.selector]
  Deployment: [spec.selector]
  StatefulSet:
    - spec.podManagementPolicy
    - spec.revisionHistoryLimit
    - spec.selector
    - spec.serviceName
    - spec.volumeClaimTemplates
batch/v1:
  Job: [spec.completions, spec.parallelism, spec.selector, spec.template]
rbac.authorization.k8s.io/v1:
  ClusterRoleBinding: [roleRef]
  RoleBinding: [roleRef]
storage.k8s.io/v1:
  StorageClass: [parameters, provisioner]
v1:
  PersistentVolume:
    [spec.csi, spec.fc, spec.flexVolume, spec.hostPath, spec.iscsi, spec.local, spec.nfs, spec.rbd]
  PersistentVolumeClaim: [spec.accessModes, spec.selector, spec.storageClassName, spec.volumeName]
  ResourceQuota: [spec.scopes]
  Secret: [type]
  Service: [spec.clusterIP]
""")
_IDENTITY = ("metadata.name", "metadata.namespace")


Path_ = tuple[str | int, ...]


def _changes(old: Any, new: Any, path: Path_ = ()) -> Iterator[tuple[Path_, DiffKind, Any]]:
    """Where new inputs differ from the pruned live object: (path, kind, new value)."""
    if new is UNKNOWN:
        yield path, "ADD" if old is MISSING else "UPDATE", None
    elif new is MISSING:
        yield path, "DELETE", None
    elif old is MISSING:
        yield path, "ADD", new
    elif isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _changes(old.get(key, MISSING), new.get(key, MISSING), (*path, key))
    elif isinstance(old, list) and isinstance(new, list):
        for index in range(max(len(old), len(new))):
            before = old[index] if index < len(old) else MISSING
            after = new[index] if index < len(new) else MISSING
            yield from _changes(before, after, (*path, index))
    elif old != new or isinstance(old, bool) != isinstance(new, bool):
        yield path, "DELETE" if new is None else "UPDATE", new


def _forces(path: Path_, value: Any, field: str) -> bool:
    """Whether a change at the path, to this value, reaches a field such as `spec.selector`."""
    steps = tuple(field.split("."))
    if path[: len(steps)] != steps[: len(path)]:
        return False
    for step in steps[len(path) :]:
        if not isinstance(value, dict) or step not in value:
            return False
        value = value[step]
    return True


def _detailed(
    changes: Iterable[tuple[Path_, DiffKind, Any]], forced: Iterable[str]
) -> dict[Path_, DiffKind]:
    replacing: dict[DiffKind, DiffKind] = {
        "ADD": "ADD_REPLACE",
        "DELETE": "DELETE_REPLACE",
        "UPDATE": "UPDATE_REPLACE",
    }
    return {
        path: replacing[kind] if any(_forces(path, value, field) for field in forced) else kind
        for path, kind, value in changes
    }


def _written(path: Path_) -> str:
    return functools.reduce(property_path, path, "")


def _read_path(text: str) -> Path_:
    """A property path of ignoreChanges: `a.b[0]["x.y"].*`."""
    steps = re.findall(r'\["((?:[^"\\]|\\.)*)"\]|\[(\d+|\*)\]|([^.\[\]]+)', text)
    return tuple(
        int(index) if index.isdigit() else (quoted or index or name)
        for quoted, index, name in steps
    )


def _covers(ignored: Path_, path: Path_) -> bool:
    return len(ignored) <= len(path) and all(
        a in ("*", b) for a, b in zip(ignored, path, strict=False)
    )


# The provider

_RELEASE = "kubernetes:helm.sh/v3:Release"
_CHARTS = Path(__file__).parents[1] / "charts.json"
_UPSERT_HELP = """

The resource already exists in the cluster. This can happen when:

  - Renaming a Pulumi resource: use an alias to preserve the identity,
    or use deleteBeforeReplace if the resource needs replacement.
  - Managing an existing resource: use a Patch resource (e.g. NamespacePatch)
    to manage specific fields without owning the resource lifecycle.
  - Adopting a resource into Pulumi: use `pulumi import`. Note that
    protected resources (e.g. kube-system) cannot be deleted on destroy.
  - Intentional upsert: set upsertExistingObjects on the provider to allow
    server-side apply to update existing objects on create."""
_CONFLICT_HELP = (
    "server-side apply field conflict detected, see https://www.pulumi.com/registry/packages/"
    "kubernetes/how-to-guides/managing-resources-with-server-side-apply/"
    "#handle-field-conflicts-on-existing-resources for troubleshooting help"
)
_NO_MATCH = (
    "apiVersion for this resource does not exist. Verify that any required CRDs have been created: "
)
_UNREACHABLE_HELP = (
    "If the cluster was deleted, you can remove this resource from Pulumi state by rerunning the "
    'operation with the PULUMI_K8S_DELETE_UNREACHABLE environment variable set to "true"'
)

# Managers whose fields the provider takes over before an update (await.go, fixCSAFieldManagers).
_CLIENT_SIDE = {
    ("kubectl", "Apply"),
    ("kubectl", "Update"),
    ("before-first-apply", "Update"),
    ("pulumi-kubernetes", "Update"),
    ("pulumi-kubernetes.exe", "Update"),
    ("pulumi-resource-kubernetes", "Update"),
}
_AWAITED = words(
    """DaemonSet Deployment Ingress Job PersistentVolume PersistentVolumeClaim Pod ResourceQuota
    Secret Service StatefulSet"""
)
_AWAITED_ON_READ = _AWAITED - {"PersistentVolume", "PersistentVolumeClaim"}
_TIMEOUT_SECONDS = 600.0


_NO_CHART = "the stand-in installs no chart in a real cluster: leave out the Release"
_NO_CLUSTER = (
    "unable to load Kubernetes client configuration from kubeconfig file. Make sure you have: \n\n"
    " \t • set up the provider as per "
    "https://www.pulumi.com/registry/packages/kubernetes/installation-configuration/ \n\n "
    "invalid configuration: no configuration has been provided, try setting KUBERNETES_MASTER "
    "environment variable"
)


def _kubeconfig(value: Any) -> Object:
    """A parsed kubeconfig; an empty one is empty. Raises ValueError."""
    if value is None or value == "":
        return {}
    try:
        config = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"yaml: {error}") from None
    if not isinstance(config, dict):
        raise ValueError("couldn't get version/kind; json parse error: not a kubeconfig")
    return config


def _context(config: Object, overrides: Properties) -> Object | None:
    current = overrides.get("context") or config.get("current-context")
    return next(
        (c.get("context") or {} for c in config.get("contexts") or () if c.get("name") == current),
        None,
    )


def _active_cluster(config: Object, overrides: Properties) -> Object | None:
    """The cluster entry that a kubeconfig points at (util.go, getActiveClusterFromConfig)."""
    context = _context(config, overrides)
    if context is None:
        return None
    wanted = overrides.get("cluster") or context.get("cluster")
    return next(
        (c.get("cluster") or {} for c in config.get("clusters") or () if c.get("name") == wanted),
        None,
    )


def _active_user(config: Object, context: Object) -> Object:
    """The user entry that a kubeconfig's context names; one without is nobody."""
    wanted = context.get("user")
    users = config.get("users") or ()
    return next((u.get("user") or {} for u in users if u.get("name") == wanted), {})


def cluster_id(authority: str) -> str:
    """The world's name of the cluster with this CA certificate (base64, as a kubeconfig has it)."""
    return hashlib.sha256(base64.b64decode(authority)).hexdigest()[:16]


class Kubernetes(Provider):
    """The provider: checks, differences and state as the official one, on an :class:`Api`."""

    package = "kubernetes"
    version = "4.34.2"
    configuration = {  # noqa: RUF012 - declared ClassVar by Provider
        "acceptSecrets": True,
        "supportsPreview": True,
        "supports_autonaming_configuration": True,
    }

    api: Api | None = None
    """The cluster; None while it is unreachable."""
    unreachable = "the provider is not configured"
    default_namespace = "default"
    secret_mutable = config_map_mutable = patch_force = upsert = False
    delete_unreachable = skip_update_unreachable = False

    # Configuration

    def check_config(self, request: Request) -> Checked:
        news = request.news
        failures = []
        if str(plain(news.get("strictMode"))).lower() == "true":
            if request.name.startswith("default"):
                failures.append(("", "strict mode prohibits default provider"))
            failures += [
                (key, f'strict mode requires Provider "{key}" argument')
                for key in ("kubeconfig", "context")
                if not plain(news.get(key))
            ]
        return Checked(news, failures)

    def diff_config(self, request: Request) -> Diff:
        olds, news = plain(request.olds), plain(request.news)
        changed = sorted(
            k for k in {**olds, **news} if olds.get(k, MISSING) != news.get(k, MISSING)
        )
        if not changed:
            return Diff(changes=False, has_detailed=False)
        identifier = "clusterIdentifier"
        kept = identifier not in changed and bool(news.get(identifier))
        replaces = (
            [identifier] if identifier in changed and {*olds} & {*news} & {identifier} else []
        )
        unknown = [key for key in ("kubeconfig", "context", "cluster") if news.get(key) is UNKNOWN]
        if unknown:
            # Whether it changed cannot be told, so it counts as changed.
            diffs, replaces = unknown[:1], replaces + unknown[:1]
        else:
            diffs = changed
            replaces += [key for key in changed if key == "renderYamlToDirectory"]
            try:
                before = _active_cluster(_kubeconfig(olds.get("kubeconfig")), olds)
                after = _active_cluster(_kubeconfig(news.get("kubeconfig")), news)
            except ValueError as error:
                raise Failure(f"failed to parse kubeconfig: {error}") from None
            if before is not None and after is not None and before != after:
                replaces += [k for k in ("kubeconfig", "context", "cluster") if k in changed]
        return Diff(
            changes=True, has_detailed=False, diffs=diffs, replaces=[] if kept else replaces
        )

    def configure(self, args: Properties) -> None:
        args = plain(args)

        def flag(name: str, default: bool = False) -> bool:
            variable = "PULUMI_K8S_" + re.sub("(?=[A-Z])", "_", name).upper()
            variable = variable.replace("CONFIG_MAP", "CONFIGMAP")
            return str(args.get(name, os.environ.get(variable, default))).lower() == "true"

        if not flag("enableServerSideApply", default=True) or args.get("renderYamlToDirectory"):
            raise Failure(
                "the rehearsal knows server-side apply only: leave out enableServerSideApply=false "
                "and renderYamlToDirectory"
            )
        if not args.get("kubeconfig"):
            raise Failure(
                "kubeconfig is empty, which means the ambient ~/.kube/config: a rehearsal reaches "
                "no real cluster; give the Provider a kubeconfig"
            )
        self.secret_mutable = flag("enableSecretMutable")
        self.config_map_mutable = flag("enableConfigMapMutable")
        self.patch_force = flag("enablePatchForce")
        self.upsert = flag("upsertExistingObjects")
        self.delete_unreachable = flag("deleteUnreachable")
        self.skip_update_unreachable = flag("skipUpdateUnreachable")
        try:
            config = _kubeconfig(args["kubeconfig"])
        except ValueError as error:
            self.unreachable = (
                f"failed to parse kubeconfig data in `kubernetes:config:kubeconfig`- {error}"
            )
            return
        context = _context(config, args) or {}
        self.default_namespace = args.get("namespace") or context.get("namespace") or "default"
        entry = _active_cluster(config, args)
        if entry is None or not entry.get("server"):
            self.unreachable = _NO_CLUSTER
        elif os.environ.get(REALLY) == "1":
            self._really_reach(entry, _active_user(config, context))
        elif (cluster := self._reached(entry)) is not None:
            self.api = ApiServer(self.world, cluster, lambda: bool(self._reached(entry)))
            self.unreachable = ""

    def _really_reach(self, entry: Object, user: Object) -> None:
        from rehearsal.real.apiserver import RealApiServer, Unreachable

        try:
            self.api, self.unreachable = RealApiServer(entry, user), ""
        except Unreachable as error:
            self._explain_unreachable(str(error))

    def _reached(self, entry: Object) -> str | None:
        """The world's cluster that a kubeconfig's cluster entry reaches; None says why not."""
        server = entry["server"]
        recorded = entry.get("insecure-skip-tls-verify") and server == "https://127.0.0.1:16443"
        if recorded or os.environ.get("HOMELAB_REHEARSAL_CLUSTER") == "any":
            return "default"
        address = urlsplit(server)
        port = address.port or 443
        reason = f"dial tcp {address.hostname}:{port}: connect: connection refused"
        machine = self.directory / "world/machine"
        for file in sorted([*machine.glob("clusters/*.json"), *machine.glob("existing/*.json")]):
            cluster = json.loads(file.read_text())
            served = cluster["server"]
            served = [served] if isinstance(served, str) else served
            if cluster["state"] != "running" or port not in {urlsplit(s).port for s in served}:
                continue
            if cluster["ca"] == entry.get("certificate-authority-data"):
                return cluster_id(cluster["ca"])
            reason = (
                "tls: failed to verify certificate: x509: certificate signed by unknown authority"
            )
        for _, cluster in World(self.directory / "world").list("k3s"):
            servers = [one for one in cluster["members"].values() if one["role"] == "server"]
            running = [one for one in servers if one["running"]]
            names = {name for one in running for name in (one["address"], *one["names"])}
            if len(running) * 2 <= len(servers) or address.hostname not in names or port != 6443:
                continue
            if cluster["ca"] == entry.get("certificate-authority-data"):
                return cluster_id(cluster["ca"])
        self._explain_unreachable(f'Get "{server}/openapi/v2?timeout=32s": {reason}')
        return None

    def _explain_unreachable(self, reason: str) -> None:
        text = "unable to load schema information from the API server: "
        self.unreachable = text + reason

    def _server(self) -> Api:
        if self.api is None:
            raise Failure(f"configured Kubernetes cluster is unreachable: {self.unreachable}")
        return self.api

    # Check

    def check(self, request: Request) -> Checked:
        if self.api is None and self.skip_update_unreachable:
            self.log(
                "Cluster is unreachable but skipUpdateUnreachable flag is set to true, skipping...",
                request.urn,
                "WARNING",
            )
            return Checked(request.olds)
        if request.type == _RELEASE:
            if os.environ.get(REALLY) == "1":
                raise Failure(_NO_CHART)
            return self._check_release(request)
        token = request.type.rsplit(":", 1)[-1]
        new = _object(request.news)
        if token != new.get("kind") and token.endswith("Patch"):
            raise Failure(f"the rehearsal knows no Patch resources: {request.type}")
        if new.get("kind", "").endswith("List") and new.get("apiVersion") in known_versions():
            raise Failure(
                "list resources exist for compatibility with YAML manifests and Helm charts, and "
                "cannot be created directly. Use the underlying resource type instead"
            )
        known = (new.get("apiVersion", ""), new.get("kind", "")) in kinds()
        failures = list(schema_faults(new, schema_of(new)))
        if not known and new.get("apiVersion") in known_versions():
            failures.append(
                ("", f"Kubernetes {KUBERNETES} has no {new.get('kind')} in that version")
            )
        if failures:
            return Checked(request.news, failures)
        new = _normalized(new)
        self._name(request, new)
        metadata = new.setdefault("metadata", {})
        if metadata is not UNKNOWN and not metadata.get("namespace") and self._namespaced(new):
            metadata["namespace"] = self.default_namespace
        return Checked(_marked(new, request.news))

    def _name(self, request: Request, new: Object) -> None:
        """Name what the program did not: as before, or at random, and marked as such."""
        metadata = new.setdefault("metadata", {})
        if metadata is UNKNOWN or metadata.get("name"):
            return
        if metadata.get("generateName"):
            raise Failure(
                "the `.metadata.generateName` field is not supported in Server-Side Apply mode"
            )
        old = plain(request.olds).get("metadata") or {}
        if request.olds:
            if _annotation({"metadata": old}, "autonamed") != "true":
                return
            metadata["name"] = old["name"]
        else:
            digits = hashlib.sha256(request.seed or secrets.token_bytes(8)).hexdigest()[:8]
            metadata["name"] = f"{request.name}-{digits}"
        metadata["annotations"] = {
            **metadata.get("annotations", {}),
            "pulumi.com/autonamed": "true",
        }

    def _namespaced(self, obj: Object) -> bool:
        if (obj["apiVersion"], obj["kind"]) in kinds():
            return obj["kind"] not in CLUSTER_SCOPED
        try:
            return self._server().resource(obj["apiVersion"], obj["kind"]).namespaced
        except (ApiError, Failure):
            # Perhaps a custom resource before its definition.
            return True

    # Diff

    def diff(self, request: Request) -> Diff:
        if request.type == _RELEASE:
            return self._diff_release(request)
        inputs, live = _parsed(request.olds)
        new, inputs = _normalized(_object(request.news)), _normalized(inputs)
        old = _pruned(live, inputs)
        old_metadata = old.setdefault("metadata", {})
        metadata = new.setdefault("metadata", {})
        if metadata is not UNKNOWN:
            for part in (old_metadata, metadata):
                if self._namespaced(new):
                    part["namespace"] = part.get("namespace") or "default"
                else:
                    part.pop("namespace", None)
            if metadata.get("name"):
                old_metadata["name"] = live["metadata"]["name"]
        old_metadata.pop("resourceVersion", None)
        ignored = [_read_path(text) for text in request.ignore_changes]
        detailed = _detailed(
            (
                change
                for change in _changes(old, new)
                if not any(_covers(path, change[0]) for path in ignored)
            ),
            self._force_new(new),
        )
        replaces = [
            _written(path)
            for path, kind in detailed.items()
            if kind.endswith("REPLACE") or (kind == "DELETE" and path == ("metadata",))
        ]
        named_as_before = metadata is not UNKNOWN and (
            metadata.get("name") == live["metadata"]["name"]
            and metadata.get("namespace", "") == live["metadata"].get("namespace", "")
        )
        return Diff(
            changes=bool(detailed),
            detailed={_written(path): kind for path, kind in detailed.items()},
            replaces=replaces,
            delete_before_replace=bool(replaces)
            and named_as_before
            and _annotation(new, "autonamed") != "true",
        )

    def _force_new(self, obj: Object) -> tuple[str, ...]:
        version, kind = obj.get("apiVersion", ""), obj.get("kind", "")
        immutable = obj.get("immutable") is True
        if is_secret(obj) and (not self.secret_mutable or immutable):
            return (*_IDENTITY, "type", "stringData", "data")
        if (version, kind) == ("v1", "ConfigMap") and (not self.config_map_mutable or immutable):
            return (*_IDENTITY, "binaryData", "data")
        return (*_IDENTITY, *_FORCE_NEW.get(version, {}).get(kind, ()))

    # Create, update

    def _manager(self, state: Properties, inputs: Object) -> str:
        """The field manager: as annotated, as before, or at random."""
        return (
            _annotation(inputs, "patchFieldManager")
            or reveal(state.get("__fieldManager"))
            or f"pulumi-kubernetes-{secrets.token_hex(4)}"
        )

    def _served(self, obj: Object) -> bool:
        try:
            self._server().resource(obj["apiVersion"], obj["kind"])
        except (ApiError, Failure):
            return False
        return True

    def create(self, request: Request) -> tuple[str, Properties]:
        if request.type == _RELEASE:
            return self._create_release(request)
        new = _object(request.news)
        if request.preview and (has_unknown(new) or not self._served(new)):
            return "", request.news
        api = self._server()
        manager = self._manager({}, new)
        try:
            live = self._make(api, request, new, manager)
        except ApiError as error:
            if request.preview and (
                error.reason in ("AlreadyExists", "Forbidden") or error.resource == "namespaces"
            ):
                return "", request.news
            if error.reason == "NoMatch":
                raise Failure(
                    f'creation of resource "{request.urn}" with kind {new["apiVersion"]}/'
                    f"{new['kind']} failed because the Kubernetes API server reported that the "
                    f"{_NO_MATCH}{error}"
                ) from None
            help_ = _UPSERT_HELP if error.reason == "AlreadyExists" else ""
            raise Failure(
                f'resource "{request.urn}" was not successfully created by the Kubernetes API '
                f"server: {_explained(error, manager)}{help_}"
            ) from None
        if request.preview:
            live.pop("status", None)
            return "", _checkpoint(new, live, request.news, manager)
        id = _full_name(live)
        reasons = self._wait(new, live, request.timeout)
        if reasons:
            message = (
                f'resource "{request.urn}" was successfully created, but the Kubernetes API server '
                f"reported that it failed to fully initialize or become live: {reasons[0]}"
            )
            state = _checkpoint(new, live, request.news, manager)
            raise InitFailed(message, id, state, {}, [message, *reasons[1:]])
        return id, _checkpoint(new, api.get(live), request.news, manager)

    def _make(self, api: Api, request: Request, new: Object, manager: str) -> Object:
        """Create the object; its namespace or definition may come while this tries again."""
        waits = iter(RETRY_SECONDS)
        while True:
            try:
                if self.upsert:
                    forced = self._forced(new, None, request.preview)
                    return api.apply(new, manager, forced, request.preview)
                # A static name, so that the first update takes the fields over (await.go).
                return api.create(new, "pulumi-kubernetes", request.preview)
            except ApiError as error:
                hopeless = request.preview or error.reason not in ("NotFound", "NoMatch")
                wait = None if hopeless else next(waits, None)
                if wait is None:
                    raise
                text = f"creation failed, trying again in {wait} s: {error}"
                self.log(text, request.urn, ephemeral=True)
                time.sleep(wait)

    def _forced(self, new: Object, live: Object | None, preview: bool) -> bool:
        """Whether a conflict is overwritten (await.go, patchForce)."""
        if _annotation(new, "patchForce") == "true" or self.patch_force:
            return True
        managers = (live or {}).get("metadata", {}).get("managedFields") or []
        if live is None or not managers:
            return preview or live is not None
        return preview and any(
            entry["operation"] == "Update" and entry["manager"].startswith("pulumi-")
            for entry in managers
            if (entry["manager"], entry["operation"]) in _CLIENT_SIDE
        )

    def update(self, request: Request) -> Properties:
        if request.type == _RELEASE:
            return self._update_release(request)
        new = _normalized(_object(request.news))
        if request.preview and (has_unknown(new) or not self._served(new)):
            return request.news
        api = self._server()
        _, old = _parsed(request.olds)
        manager = self._manager(request.olds, new)
        try:
            live = self._change(api, request, old, new, manager)
        except ApiError as error:
            if error.reason == "NoMatch":
                raise Failure(
                    f'update of resource "{request.urn}" failed because the Kubernetes API server '
                    f"reported that the {_NO_MATCH}{error}"
                ) from None
            try:
                live = api.get(old)
            except ApiError as gone:
                raise Failure(
                    f'update of resource "{request.urn}" failed: {error}\n'
                    f"unable to get cluster state: {gone}"
                ) from None
            reasons = [_explained(error, manager)]
        else:
            reasons = [] if request.preview else self._wait(new, live, request.timeout)
            if not request.preview and not reasons:
                live = api.get(live)
        state = _checkpoint(new, live, request.news, manager)
        if reasons:
            message = (
                f'the Kubernetes API server reported that "{_full_name(live)}" failed to fully '
                f"initialize or become live: {reasons[0]}"
            )
            raise InitFailed(message, _full_name(live), state, {}, [message, *reasons[1:]])
        return state

    def _change(self, api: Api, request: Request, old: Object, new: Object, manager: str) -> Object:
        live = api.get(old)
        if _is_crd(new):
            return api.replace(new, manager, request.preview)
        if not request.preview:
            api.take_over(live, _CLIENT_SIDE, manager)
            live = api.get(live)
        new = _without_ignored(new, live, request.ignore_changes, manager)
        forced = self._forced(new, live, request.preview)
        return api.apply(new, manager, forced, request.preview)

    # Await

    def _wait(self, new: Object, live: Object, timeout: float) -> list[str]:
        """Wait until the object is ready. Returns why it is not, the time-out's own text first."""
        if live["kind"] not in _AWAITED or live["apiVersion"] not in known_versions():
            return []
        if _annotation(new, "skipAwait") == "true":
            return []
        annotated = _annotation(new, "timeoutSeconds")
        if not timeout:
            timeout = float(annotated) if annotated.isdigit() else _TIMEOUT_SECONDS
        began = time.monotonic()
        while not self._server().ready(live, time.monotonic() - began):
            if time.monotonic() - began >= timeout:
                if live["kind"] in ("DaemonSet", "PersistentVolume", "PersistentVolumeClaim"):
                    return ["timed out waiting for the condition"]
                text = f"'{live['metadata']['name']}' timed out waiting to be Ready"
                return [text, *_unready_reasons(live)]
            time.sleep(min(0.2, timeout))
        return []

    # Read, delete

    def read(self, request: Request) -> tuple[str, Properties, Properties] | None:
        if self.api is None:
            self._say_unreachable(request)
            if self.delete_unreachable:
                return None
            if self.skip_update_unreachable:
                self.log(
                    "configured Kubernetes cluster is unreachable and the `skipUnreachable` option "
                    "is enabled. Returned data could not reflect the actual cluster configuration.",
                    request.urn,
                )
                return request.id, request.olds, request.old_inputs
            raise Failure(
                "failed to read resource state due to unreachable cluster. " + _UNREACHABLE_HELP
            )
        if request.type == _RELEASE:
            return self._read_release(request)
        namespace, _, name = request.id.rpartition("/")
        inputs = _normalized(_object(request.old_inputs))
        imported = not inputs.get("kind")
        if imported:
            _, version, kind = request.type.split(":")
            inputs = {"apiVersion": version.removeprefix("core/"), "kind": kind, "metadata": {}}
        inputs.setdefault("metadata", {}).setdefault("name", name)
        if namespace:
            inputs["metadata"].setdefault("namespace", namespace)
        try:
            live = self.api.get(inputs)
        except ApiError as error:
            if error.reason not in ("NotFound", "NoMatch"):
                raise Failure(str(error)) from None
            return None
        if imported:
            inputs = _normalized(copied({k: v for k, v in live.items() if k != "status"}))
        else:
            inputs = _pruned(live, inputs)
        manager = self._manager(request.olds, inputs)
        state = _checkpoint(inputs, live, request.old_inputs, manager)
        live_inputs = _marked(copied(inputs), request.old_inputs)
        if (
            not imported
            and live["kind"] in _AWAITED_ON_READ
            and _annotation(inputs, "skipAwait") != "true"
            and not self.api.ready(live, _TIMEOUT_SECONDS)
        ):
            text = f"Resource '{name}' was created but failed to initialize"
            reasons = [text, *_unready_reasons(live)]
            raise InitFailed(text, request.id, state, live_inputs, reasons)
        return request.id, state, live_inputs

    def _say_unreachable(self, request: Request) -> None:
        text = f"configured Kubernetes cluster is unreachable: {self.unreachable}"
        self.log(text, request.urn, "WARNING")
        if self.delete_unreachable:
            self.log(
                "configured Kubernetes cluster is unreachable and the `deleteUnreachable` option "
                "is enabled. Deleting the unreachable resource from Pulumi state",
                request.urn,
            )

    def delete(self, request: Request) -> None:
        if request.type == _RELEASE:
            self._delete_release(request)
        elif self.api is None:
            self._say_unreachable(request)
            if not self.delete_unreachable:
                raise Failure("configured Kubernetes cluster is unreachable. " + _UNREACHABLE_HELP)
        else:
            _, live = _parsed(request.olds)
            live["metadata"]["name"] = request.id.rpartition("/")[2]
            try:
                self.api.delete(live)
            except ApiError as error:
                # A custom resource whose definition is gone is gone too.
                if error.reason != "NoMatch":
                    raise Failure(str(error)) from None

    def invoke(self, token: str, args: Properties, preview: bool) -> Properties:
        raise Unimplemented(f"the rehearsal does not know the function {token}")

    def construct(self, request: Any) -> Any:
        raise Unimplemented(
            f"the rehearsal does not know the remote component {request.type}: it would fetch at "
            "every preview; declare its objects or a helm.sh/v3:Release"
        )

    # helm.sh/v3:Release (helm_release.go)

    def _chart(self, release: Properties) -> tuple[str, Object]:
        """Version and facts of the release's chart. Raises ValueError with Helm's words."""
        charts: dict[str, Any] = json.loads(_CHARTS.read_text())
        charts |= self.world.get("charts") or {}
        charts = {k: {"appVersion": v} if isinstance(v, str) else v for k, v in charts.items()}
        repository = ((release.get("repositoryOpts") or {}).get("repo") or "").rstrip("/")
        name, version = release.get("chart", ""), release.get("version") or ""
        prefix = f"{repository}/{name}@" if repository else f"{name}@"
        offered = {k.removeprefix(prefix): v for k, v in charts.items() if k.startswith(prefix)}
        if not version and offered:
            version = max(offered, key=_version_order)
        if version in offered:
            return version, offered[version]
        if repository and any(key.startswith(f"{repository}/") for key in charts):
            wanted = f' version "{version}"' if version else ""
            raise ValueError(f'chart "{name}"{wanted} not found in {repository} repository')
        if repository:
            host = urlsplit(repository).hostname
            raise ValueError(
                f'looks like "{repository}" is not a valid chart repository or cannot be reached: '
                f'Get "{repository}/index.yaml": dial tcp: lookup {host}: no such host'
            )
        raise ValueError(
            f'failed to download "{name}"' + (f' at version "{version}"' if version else "")
        )

    def _check_release(self, request: Request) -> Checked:
        news = dict(request.news)
        failures = [
            (key, f'unknown property "{key}" of a Release')
            for key in news
            if key not in _RELEASE_DEFAULTS and key not in _RELEASE_OBJECTS
        ]
        if news.get("valueYamlFiles"):
            failures.append(
                ("valueYamlFiles", "the rehearsal reads no files of values: use values")
            )
        if failures:
            return Checked(request.news, failures)
        if not plain(news.get("name")):
            old = plain(request.olds.get("name"))
            news["name"] = old or f"{request.name}-{secrets.token_hex(4)}"
        if not plain(news.get("namespace")):
            news["namespace"] = self.default_namespace
        if not plain(news.get("skipAwait")):
            news.setdefault("timeout", 300)
        filled = dict(_RELEASE_DEFAULTS)
        filled |= {k: v for k, v in news.items() if v is not None}
        for key in ("compat", "resourceNames", "valueYamlFiles"):
            filled.pop(key, None)
        if not has_unknown(news):
            try:
                filled["version"], chart = self._chart(plain(filled))
                values = plain(filled).get("values") if "values" in chart else None
                failures += [
                    (
                        "values",
                        "values don't meet the specifications of the schema(s) in the following "
                        f"chart(s):\n{plain(filled)['chart']}:\n"
                        f"- {where or '(root)'}: Additional property {key} is not allowed",
                    )
                    for where, key in _unknown_values(values or {}, chart.get("values", []))
                ]
            except ValueError as error:
                reason = f"{error}; check the chart name and repository configuration."
                failures.append(("chart", f"{reason} A rehearsal knows rehearsal/charts.json."))
        return Checked(filled, failures)

    def _diff_release(self, request: Request) -> Diff:
        olds, news = dict(plain(request.olds)), plain(request.news)
        inputs = olds.pop("__inputs", {})
        inputs = {k: v for k, v in inputs.items() if k not in ("checksum", "resourceNames")}
        if "version" in request.ignore_changes:
            news["version"] = olds.get("version")
        shape = _united(inputs, news)
        detailed = _detailed(_changes(_pruned(olds, shape), news), ("name", "namespace"))
        return Diff(
            changes=bool(detailed),
            detailed={_written(path): kind for path, kind in detailed.items()},
            has_detailed=bool(detailed),
            diffs=list(dict.fromkeys(str(path[0]) for path in detailed)),
            replaces=[_written(p) for p, kind in detailed.items() if kind.endswith("REPLACE")],
        )

    def _release_key(self, api: Api, release: Properties) -> str:
        if not isinstance(api, ApiServer):
            raise Failure(_NO_CHART)
        return f"{api.cluster}/{release['namespace']}/Release.helm.sh/{release['name']}"

    def _create_release(self, request: Request) -> tuple[str, Properties]:
        release = plain(request.news)
        if request.preview:
            return "", _release_state(request.news, release, preview=True)
        if self.api is None:
            raise Failure(f"can't create Helm Release with unreachable cluster: {self.unreachable}")
        namespace = {"name": release["namespace"]}
        namespace_object = {"apiVersion": "v1", "kind": "Namespace", "metadata": namespace}
        try:
            self.api.get(namespace_object)
        except ApiError as error:
            if not release.get("createNamespace"):
                raise Failure(f"create: failed to create: {error}") from None
            self.api.create(namespace_object, "helm")
        record = self._installed(release, revision=1)
        try:
            self.world.create(self._release_key(self.api, release), record)
        except Exists:
            raise Failure("cannot re-use a name that is still in use") from None
        self._put_definitions(self.api, release)
        id = f"{release['namespace']}/{release['name']}"
        return id, self._awaited_release(request, release, record, "was created, but failed")

    def _definitions(self, release: Properties) -> Iterator[Object]:
        """The CustomResourceDefinitions that the chart's templates hold."""
        for name, kind in self._chart(release)[1].get("crds", {}).items():
            full, _, version = name.partition("/")
            plural, _, group = full.partition(".")
            preserve = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
            schema = {"openAPIV3Schema": preserve}
            served = {"name": version, "served": True, "storage": True, "schema": schema}
            yield {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": full},
                "spec": {
                    "group": group,
                    "names": {"kind": kind, "plural": plural},
                    "scope": "Namespaced",
                    "versions": [served],
                },
            }

    def _put_definitions(self, api: Api, release: Properties) -> None:
        for definition in self._definitions(release):
            try:
                api.create(definition, "helm")
            except ApiError as error:
                if error.reason != "AlreadyExists":
                    raise Failure(str(error)) from None

    def _installed(self, release: Properties, revision: int) -> Object:
        """The record that an installed release leaves in the cluster."""
        try:
            version, chart = self._chart(release)
        except ValueError as error:
            raise Failure(str(error)) from None
        return {
            "values": release.get("values") or {},
            "version": version,
            "status": {
                "appVersion": chart["appVersion"],
                "chart": release["chart"].rstrip("/").rsplit("/", 1)[-1],
                "name": release["name"],
                "namespace": release["namespace"],
                "revision": revision,
                "status": "deployed",
                "version": version,
            },
        }

    def _awaited_release(
        self, request: Request, release: Properties, record: Object, failed: str
    ) -> Properties:
        key = f"Release/{release['namespace']}/{release['name']}"
        timeout = release.get("timeout") or 300
        began = time.monotonic()
        while not release.get("skipAwait"):
            stated = (self.world.get("ready") or {}).get(key, 0)
            waited = time.monotonic() - began
            if stated != "never" and waited >= stated:
                break
            if waited >= timeout:
                record["status"]["status"] = "failed"
                if self.api is not None:
                    self.world.put(self._release_key(self.api, release), record)
                id = f"{release['namespace']}/{release['name']}"
                message = (
                    f'Helm release "{id}" {failed} to initialize completely. Use Helm CLI to '
                    "investigate: failed to become available within allocated timeout. Error: Helm "
                    f"Release {id}: context deadline exceeded"
                )
                state = _release_state(request.news, {**release, **record})
                raise InitFailed(message, id, state, {}, [message])
            time.sleep(min(0.2, timeout))
        return _release_state(request.news, {**release, **record})

    def _read_release(self, request: Request) -> tuple[str, Properties, Properties] | None:
        state = plain(request.olds)
        inputs = reveal(request.olds.get("__inputs")) or {}
        if not state:
            raise Failure("the rehearsal imports no Release")
        record = self.world.get(self._release_key(self._server(), state))
        if record is None:
            return None
        return request.id, _release_state(inputs, {**state, **record}), inputs

    def _update_release(self, request: Request) -> Properties:
        release = plain(request.news)
        if request.preview:
            return _release_state(request.news, release, preview=True)
        if self.api is None:
            raise Failure(f"can't update Helm Release with unreachable cluster: {self.unreachable}")
        key = self._release_key(self.api, release)
        before = self.world.get(key)
        if before is None:
            raise Failure(f'"{release["name"]}" has no deployed releases')
        record = self._installed(release, before["status"]["revision"] + 1)
        self.world.put(key, record)
        self._put_definitions(self.api, release)
        return self._awaited_release(request, release, record, "failed")

    def _delete_release(self, request: Request) -> None:
        if self.api is None:
            raise Failure(
                "can't delete Helm Release with unreachable cluster. Reason: "
                f"{json.dumps(self.unreachable, ensure_ascii=False)}"
            )
        release = plain(request.olds)
        key = self._release_key(self.api, release)
        if not self.world.delete(key):
            raise Failure(f"uninstall: Release not loaded: {release['name']}: release: not found")
        for definition in self._definitions(release):
            spec = definition["spec"]
            suffix = f"{spec['names']['kind']}.{spec['group']}"
            # With a definition go all of its kind.
            for one, _ in list(self.world.list(key.partition("/")[0])):
                if one.split("/")[2] == suffix:
                    self.world.delete(one)
            self.api.delete(definition)


_RELEASE_OBJECTS = words("compat maxHistory repositoryOpts resourceNames valueYamlFiles values")
_RELEASE_FLAGS = words(
    """allowNullValues atomic cleanupOnFail createNamespace dependencyUpdate devel disableCRDHooks
    disableOpenapiValidation disableWebhooks forceUpdate lint recreatePods renderSubchartNotes
    replace resetValues reuseValues skipAwait skipCrds verify waitForJobs"""
)
_RELEASE_TEXTS = words("chart description keyring name namespace postrender version")
_RELEASE_DEFAULTS: Properties = {
    **dict.fromkeys(sorted(_RELEASE_FLAGS), False),
    **dict.fromkeys(sorted(_RELEASE_TEXTS), ""),
    "timeout": 0,
    "values": {},
}
"""What the provider writes for each property that is not given."""


def _release_state(inputs: Properties, release: Properties, preview: bool = False) -> Properties:
    """A Release's checkpoint: its inputs are secret as a whole."""
    computed: Properties = {"resourceNames": UNKNOWN, "status": UNKNOWN} if preview else {}
    state = {k: v for k, v in release.items() if k != "__inputs"} | computed
    state = _marked(copied(state), inputs)
    state["__inputs"] = Secret(inputs)
    return state


def _united(first: Any, second: Any) -> Any:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = {**first, **second}
        return {
            k: _united(first[k], second[k]) if k in first and k in second else keys[k] for k in keys
        }
    return second


def _unknown_values(values: Object, known: list[str], where: str = "") -> Iterator[tuple[str, str]]:
    """Where in a chart's values a key is that it does not know, and the key."""
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if path in known:
            continue
        if isinstance(value, dict) and any(one.startswith(f"{path}.") for one in known):
            yield from _unknown_values(value, known, path)
        else:
            yield where, key


def _version_order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def _explained(error: ApiError, manager: str) -> str:
    """An API error as the provider words it (await.go, handleSSAErr)."""
    if error.reason != "Conflict":
        return str(error)
    return (
        f'{_CONFLICT_HELP}\nThe resource managed by field manager "{manager}" had an apply '
        f"conflict: {error}"
    )


def _unready_reasons(live: Object) -> list[str]:
    """What the awaiter of a kind says of an object that does not get ready."""
    kind, spec = live["kind"], live.get("spec", {})
    if kind == "Deployment":
        return ["Minimum number of live Pods was not attained"]
    if kind == "StatefulSet":
        return [f"0 out of {spec.get('replicas', 1)} replicas succeeded readiness checks"]
    if kind == "Ingress":
        return [
            "Ingress .status.loadBalancer field was not updated with a hostname/IP address. "
            "\n    for more information about this error, see https://pulumi.io/xdv72s"
        ]
    if kind == "Service" and not headless(live) and spec.get("type") != "ExternalName":
        reasons = [
            "Service does not target any Pods. Selected Pods may not be ready, or field "
            "'.spec.selector' may not match labels on any Pods"
        ]
        if spec.get("type") == "LoadBalancer":
            reasons = [
                "Service was not allocated an IP address; does your cloud provider support this?"
            ]
        return reasons
    return []


def _without_ignored(new: Object, live: Object, ignored: Iterable[str], manager: str) -> Object:
    """The inputs to apply under ignoreChanges (await.go, handleSSAIgnoreFields).

    An ignored field that only others own is left out, so that they keep it; else it stays as it is.
    """
    new = copied(new)
    ours: set[FieldPath] = set()
    theirs: set[FieldPath] = set()
    for entry in live["metadata"].get("managedFields", []):
        held = ours if entry["manager"] == manager else theirs
        for path in paths(entry.get("fieldsV1", {})):
            held.update(path[: length + 1] for length in range(len(path)))
    for text in ignored:
        path = tuple(f"f:{step}" for step in _read_path(text))
        holder = value_at(new, path[:-1])
        current = value_at(live, path)
        if path in theirs and path not in ours:
            remove_at(new, path)
        elif current is not MISSING and isinstance(holder, dict):
            holder[path[-1][2:]] = current
    return new


if __name__ == "__main__":
    serve(Kubernetes)
