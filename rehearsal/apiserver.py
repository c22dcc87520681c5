"""The API server that the kubernetes stand-in asks, and a make-believe one over files.

Schemas, defaulting, validation, server-side apply and its field managers, for the kinds that the
stacks declare. :class:`ApiServer` is the door, :class:`Api` what it has in common with a real one.
Rules and texts are those of Kubernetes.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import importlib.util
import ipaddress
import itertools
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import yaml

from rehearsal.core import (
    UNKNOWN,
    Exists,
    Failure,
    World,
    property_path,
)

KUBERNETES = "1.31"
"""The Kubernetes release whose schemas hold."""

Object = dict[str, Any]
Schema = dict[str, Any]

MISSING = object()
"""What stands for a value that is not there, where None is a value."""


def words(text: str) -> frozenset[str]:
    """The words of a text, for tables of names."""
    return frozenset(text.split())


# Schemas


@functools.cache
def _definitions() -> dict[str, Schema]:
    """The published definitions, strict, of the package kubernetes-validate.

    Only its data is used: jsonschema takes longer to compile one kind than the walk below takes for
    a thousand objects, and knows no unknown values.
    """
    package = importlib.util.find_spec("kubernetes_validate")
    if package is None or package.origin is None:
        raise Failure("the rehearsal needs the package kubernetes-validate: install the dev group")
    published = Path(package.origin).parent / "kubernetes-json-schema"
    file = published / f"v{KUBERNETES}.0-local-strict" / "_definitions.json"
    return json.loads(file.read_text())["$defs"]


@functools.cache
def kinds() -> dict[tuple[str, str], Schema]:
    """Every built-in kind's schema by (apiVersion, kind)."""
    found = {}
    for schema in _definitions().values():
        for gvk in schema.get("x-kubernetes-group-version-kind", ()):
            if "metadata" in schema.get("properties", {}):
                version = f"{gvk['group']}/{gvk['version']}" if gvk["group"] else gvk["version"]
                found[version, gvk["kind"]] = schema
    return found


@functools.cache
def known_versions() -> frozenset[str]:
    return frozenset(version for version, _ in kinds())


def _custom_schema() -> Schema:
    """What holds for a custom resource, whose own schema is not consulted: its metadata."""
    return {
        "type": "object",
        "properties": {"metadata": {"$ref": "/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"}},
    }


def schema_of(obj: Object) -> Schema:
    return kinds().get((obj.get("apiVersion", ""), obj.get("kind", "")), _custom_schema())


def _resolved(schema: Schema) -> Schema:
    reference = schema.get("$ref")
    return _definitions()[reference.rsplit("/", 1)[-1]] if reference else schema


def _child(schema: Schema, key: str) -> Schema:
    sub = schema.get("properties", {}).get(key)
    if sub is None:
        sub = schema.get("additionalProperties")
    return sub if isinstance(sub, dict) else {}


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


def _is_of(value: Any, names: Iterable[str]) -> bool:
    return any(
        isinstance(value, _TYPES[name]) and (not isinstance(value, bool) or name == "boolean")
        for name in names
    )


def schema_faults(value: Any, schema: Schema, path: str = "") -> Iterator[tuple[str, str]]:
    """Where a value breaks its schema, as (property path, reason).

    An unknown fits everywhere. No value is quoted, since it may be a secret.
    """
    if value is UNKNOWN:
        return
    schema = _resolved(schema)
    if "oneOf" in schema:
        names = [name for option in schema["oneOf"] for name in _names(option)]
    else:
        names = _names(schema)
    if names and not _is_of(value, names):
        wanted = " or ".join(sorted(set(names) - {"null"}))
        yield path, f"expected {wanted}, got {type(value).__name__}"
        return
    if value is not None and "enum" in schema and value not in schema["enum"]:
        yield path, f"expected one of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, dict):
        for key in schema.get("required", ()):
            if key not in value:
                yield path, f'missing required field "{key}"'
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for key, item in value.items():
            if key in properties:
                yield from schema_faults(item, properties[key], property_path(path, key))
            elif isinstance(others, dict):
                yield from schema_faults(item, others, property_path(path, key))
            elif not others:
                yield property_path(path, key), f'unknown field "{key}"'
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from schema_faults(item, schema.get("items", {}), property_path(path, index))


def _names(schema: Schema) -> list[str]:
    names = schema.get("type", [])
    return [names] if isinstance(names, str) else names


# Field ownership: managedFields, server-side apply
# (kubernetes/enhancements 555; sigs.k8s.io/structured-merge-diff)

FieldPath = tuple[str, ...]

# Go structs that are always there, so that an Update records only what is in them.
_VALUE_STRUCTS = frozenset({"metadata", "spec", "strategy", "updateStrategy", "resources"})
_OWNABLE_METADATA = frozenset({"labels", "annotations", "finalizers", "ownerReferences"})


def _item_key(item: Object, schema: Schema) -> str | None:
    """How an element of an associative list is named, `k:{"port":80,"protocol":"TCP"}`."""
    keys = schema.get("x-kubernetes-list-map-keys")
    if not keys or not isinstance(item, dict):
        return None
    # The one key that the published schemas default.
    named = {key: item.get(key, "TCP" if key == "protocol" else None) for key in sorted(keys)}
    if any(value is None for value in named.values()):
        return None
    return "k:" + json.dumps(named, separators=(",", ":"))


def _fields(value: Any, schema: Schema, update: bool, itself: bool) -> Object:
    """The FieldsV1 of a value. `update`: as an Update records it, which also names maps (`.`)."""
    schema = _resolved(schema)
    found: Object = {}
    if isinstance(value, dict) and schema.get("x-kubernetes-map-type") != "atomic":
        plainly = {*schema.get("required", ()), *_VALUE_STRUCTS}
        for key, item in value.items():
            below = _child(schema, key)
            found[f"f:{key}"] = _fields(item, below, update, update and key not in plainly)
    elif isinstance(value, list):
        for item in value:
            if (key := _item_key(item, schema)) is not None:
                items = schema.get("items", {})
                found[key] = {".": {}, **_fields(item, items, update, itself=False)}
            elif schema.get("x-kubernetes-list-type") == "set":
                found["v:" + json.dumps(item)] = {}
    if found and itself:
        found["."] = {}
    return found


def _owned_fields(obj: Object, update: bool) -> Object:
    """The FieldsV1 of what whoever writes this object owns."""
    ownable = {k: v for k, v in obj.items() if k not in {"apiVersion", "kind", "status"}}
    ownable["metadata"] = {
        key: value for key, value in obj["metadata"].items() if key in _OWNABLE_METADATA
    }
    if obj["kind"] == "Namespace":
        ownable.pop("spec", None)
    fields = _fields(ownable, schema_of(obj), update, itself=False)
    if not fields["f:metadata"]:
        del fields["f:metadata"]
    return fields


def paths(fields: Object, at: FieldPath = ()) -> Iterator[FieldPath]:
    for key, below in fields.items():
        if key == ".":
            yield at
        elif below:
            yield from paths(below, (*at, key))
        else:
            yield (*at, key)


def _trie(owned: set[FieldPath]) -> Object:
    root: Object = {}
    members = []
    for path in sorted(owned):
        node = root
        for step in path:
            node = node.setdefault(step, {})
        members.append(node)
    for node in members:
        if node:
            node["."] = {}
    return root


def _position(items: Any, step: str) -> int | None:
    kind, _, named = step.partition(":")
    wanted = json.loads(named)
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if kind == "v" and item == wanted:
            return index
        if kind == "k" and isinstance(item, dict):
            held = {key: item.get(key, "TCP" if key == "protocol" else None) for key in wanted}
            if held == wanted:
                return index
    return None


def value_at(value: Any, path: FieldPath) -> Any:
    for step in path:
        if step.startswith("f:"):
            value = value.get(step[2:], MISSING) if isinstance(value, dict) else MISSING
        else:
            index = _position(value, step)
            value = MISSING if index is None else value[index]
        if value is MISSING:
            return MISSING
    return value


def remove_at(obj: Object, path: FieldPath) -> None:
    holder, step = value_at(obj, path[:-1]), path[-1]
    if step.startswith("f:"):
        if isinstance(holder, dict):
            holder.pop(step[2:], None)
    elif (index := _position(holder, step)) is not None:
        del holder[index]


def _merged(live: Any, config: Any, schema: Schema) -> Any:
    """The configuration laid over what is live, as server-side apply merges."""
    schema = _resolved(schema)
    if isinstance(live, dict) and isinstance(config, dict):
        if schema.get("x-kubernetes-map-type") == "atomic":
            return config
        laid = {k: _merged(live.get(k), v, _child(schema, k)) for k, v in config.items()}
        return {**live, **laid}
    if isinstance(live, list) and isinstance(config, list):
        if schema.get("x-kubernetes-list-type") == "set":
            return live + [item for item in config if item not in live]
        if schema.get("x-kubernetes-list-map-keys"):
            items = {_item_key(item, schema): item for item in live}
            for item in config:
                key = _item_key(item, schema)
                items[key] = _merged(items.get(key), item, schema.get("items", {}))
            return list(items.values())
    return config


def _printed(path: FieldPath) -> str:
    """A field path as the API server prints it: `.spec.ports[port=80].name`."""
    text = ""
    for step in path:
        kind, _, name = step.partition(":")
        if kind == "f":
            text += f".{name}"
        elif kind == "k":
            keys = (f"{k}={json.dumps(v)}" for k, v in json.loads(name).items())
            text += f"[{','.join(keys)}]"
        else:
            text += f"[={name}]"
    return text


def _holder(entry: Object) -> str:
    """A field manager as a conflict names it."""
    named = f'"{entry["manager"]}"'
    if subresource := entry.get("subresource"):
        named += f' with subresource "{subresource}"'
    if entry.get("operation") == "Update":
        named += f" using {entry.get('apiVersion')}"
        named += f" at {entry['time']}" if entry.get("time") else ""
    return named


def _conflict_text(conflicts: list[tuple[Object, FieldPath]]) -> str:
    if len(conflicts) == 1:
        entry, path = conflicts[0]
        return f"Apply failed with 1 conflict: conflict with {_holder(entry)}: {_printed(path)}"
    lines = []
    for holder in sorted({_holder(entry) for entry, _ in conflicts}):
        lines.append(f"conflicts with {holder}:")
        lines += [f"- {_printed(path)}" for entry, path in conflicts if _holder(entry) == holder]
    return f"Apply failed with {len(conflicts)} conflicts: " + "\n".join(lines)


def taken_over(live: Object, managers: set[tuple[str, str]], manager: str) -> list[Object] | None:
    """The managedFields in which an Apply manager owns what the (manager, operation) pairs did;
    None where they own nothing (k8s.io/client-go/util/csaupgrade).
    """
    taken: set[FieldPath] = set()
    rest = []
    for entry in live["metadata"].get("managedFields", []):
        name = entry["manager"], entry["operation"]
        if (name in managers or name == (manager, "Apply")) and not entry.get("subresource"):
            taken |= set(paths(entry.get("fieldsV1", {})))
        else:
            rest.append(entry)
    return [_entry(live, manager, "Apply", _trie(taken)), *rest] if taken else None


# The API server


class ApiError(Exception):
    """An error status of the API server; `reason` is a metav1.StatusReason or `NoMatch`."""

    def __init__(self, reason: str, message: str, resource: str = "") -> None:
        super().__init__(message)
        self.reason, self.resource = reason, resource


@dataclass(frozen=True, slots=True)
class Resource:
    """How the API serves a kind."""

    group: str
    kind: str
    plural: str
    namespaced: bool

    @property
    def named(self) -> str:
        """`deployments.apps`, as errors and conflicts name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def kind_group(self) -> str:
        """`Deployment.apps`."""
        return f"{self.kind}.{self.group}" if self.group else self.kind


CLUSTER_SCOPED = words(
    """APIService CertificateSigningRequest ClusterRole ClusterRoleBinding ClusterTrustBundle
    ComponentStatus CSIDriver CSINode CustomResourceDefinition DeviceClass FlowSchema IngressClass
    IPAddress MutatingWebhookConfiguration Namespace Node PersistentVolume PriorityClass
    PriorityLevelConfiguration RuntimeClass SelfSubjectReview ServiceCIDR StorageClass
    StorageVersion StorageVersionMigration TokenReview ValidatingAdmissionPolicy
    ValidatingAdmissionPolicyBinding ValidatingWebhookConfiguration VolumeAttachment
    VolumeAttributesClass"""
)
_WITH_GENERATION = words(
    """CronJob CustomResourceDefinition DaemonSet Deployment Ingress IngressClass Job NetworkPolicy
    PodDisruptionBudget ReplicaSet StatefulSet"""
)
_CRD = "CustomResourceDefinition.apiextensions.k8s.io"


def _group(api_version: str) -> str:
    return api_version.rpartition("/")[0]


def plural(kind: str) -> str:
    """The name of a kind in URLs, as Kubernetes names its own."""
    name = kind.lower()
    if name.endswith(("s", "x", "ch")):
        return name if name == "endpoints" else name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


# The objects that every cluster has (kubernetes/pkg/controlplane/controller/systemnamespaces).
_SYSTEM_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


class Api(Protocol):
    """A cluster's API server. Objects are dicts in Kubernetes' own form; a method raises
    :class:`ApiError`, for a kind that is not served with the reason `NoMatch`.
    """

    def resource(self, api_version: str, kind: str) -> Resource:
        """How a kind is served."""
        ...

    def get(self, obj: Object) -> Object:
        """The live object with this one's kind, namespace and name. Raises NotFound."""
        ...

    def create(self, obj: Object, manager: str, dry_run: bool = False) -> Object:
        """POST. Raises NotFound (no namespace), Invalid, AlreadyExists."""
        ...

    def apply(self, obj: Object, manager: str, force: bool, dry_run: bool = False) -> Object:
        """Server-side apply, which makes an absent object. Raises Conflict, Invalid, NotFound."""
        ...

    def replace(self, obj: Object, manager: str, dry_run: bool = False) -> Object:
        """PUT, which takes the place of the live object as a whole."""
        ...

    def take_over(self, obj: Object, managers: set[tuple[str, str]], manager: str) -> None:
        """Give an Apply manager what the (manager, operation) pairs own."""
        ...

    def delete(self, obj: Object) -> bool:
        """DELETE, until it is gone. Returns whether it was there."""
        ...

    def ready(self, obj: Object, waited: float) -> bool:
        """Whether an object that was made so many seconds ago is what its kind calls ready."""
        ...


class ApiServer:
    """A cluster's make-believe API server over the files of its world.

    Objects are dicts in Kubernetes' own form. Admission, validation and defaulting cover what the
    stacks of this project use; a schema that does not fit is refused before it comes here.
    """

    def __init__(
        self, world: World, cluster: str, answers: Callable[[], bool] = lambda: True
    ) -> None:
        """``answers`` tells whether the cluster still runs."""
        self.world, self.cluster, self._answers = world, cluster, answers
        if world.get(self._file("Namespace", "", "default")) is None:
            for name in _SYSTEM_NAMESPACES:
                namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
                try:
                    self.create(namespace, "kube-apiserver")
                except ApiError as error:
                    # Another provider of the same stack was faster.
                    if error.reason != "AlreadyExists":
                        raise

    def _file(self, kind_group: str, namespace: str, name: str) -> str:
        return f"{self.cluster}/{namespace or '_cluster'}/{kind_group}/{name}"

    def _key(self, obj: Object) -> str:
        if not self._answers():
            raise ApiError("Unreachable", "the API server: connect: connection refused")
        resource = self.resource(obj["apiVersion"], obj["kind"])
        metadata = obj["metadata"]
        namespace = (metadata.get("namespace") or "default") if resource.namespaced else ""
        return self._file(resource.kind_group, namespace, metadata["name"])

    def resource(self, api_version: str, kind: str) -> Resource:
        """How a kind is served. Raises NoMatch for one that is not."""
        group = _group(api_version)
        if (api_version, kind) in kinds():
            return Resource(group, kind, plural(kind), kind not in CLUSTER_SCOPED)
        for _, crd in self.world.list(f"{self.cluster}/_cluster/{_CRD}"):
            spec = crd["spec"]
            served = {f"{group}/{v['name']}" for v in spec["versions"] if v.get("served")}
            if spec["group"] == group and spec["names"]["kind"] == kind and api_version in served:
                namespaced = spec.get("scope") == "Namespaced"
                return Resource(group, kind, spec["names"]["plural"], namespaced)
        message = f'no matches for kind "{kind}" in version "{api_version}"'
        raise ApiError("NoMatch", message)

    def get(self, obj: Object) -> Object:
        """The live object with this one's kind, namespace and name. Raises NotFound."""
        live = self.world.get(self._key(obj))
        if live is None:
            resource = self.resource(obj["apiVersion"], obj["kind"])
            self._not_found(resource.named, obj["metadata"]["name"])
        return live

    def _not_found(self, resource: str, name: str) -> NoReturn:
        raise ApiError("NotFound", f'{resource} "{name}" not found', resource)

    def create(self, obj: Object, manager: str, dry_run: bool = False) -> Object:
        """POST. Raises NotFound (no namespace), Invalid, AlreadyExists."""
        obj = self._admitted(obj)
        key, resource = self._key(obj), self.resource(obj["apiVersion"], obj["kind"])
        self._refuse_in_terminating(obj, resource)
        entry = _entry(obj, manager, "Update", _owned_fields(obj, update=True))
        obj["metadata"]["managedFields"] = [entry] if entry["fieldsV1"] else []
        self._stamp(obj)
        taken = ApiError(
            "AlreadyExists", f'{resource.named} "{obj["metadata"]["name"]}" already exists'
        )
        if dry_run:
            del obj["metadata"]["resourceVersion"]
            if self.world.get(key) is not None:
                raise taken
            return obj
        self._fill_in_token(obj)
        try:
            self.world.create(key, obj)
        except Exists:
            raise taken from None
        self._assign_addresses(obj)
        return obj

    def apply(self, obj: Object, manager: str, force: bool, dry_run: bool = False) -> Object:
        """Server-side apply, which makes an absent object. Raises Conflict, Invalid, NotFound."""
        live = self.world.get(self._key(obj))
        if live is None:
            live = {"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": {}}
        entries = live["metadata"].get("managedFields", [])
        before: set[FieldPath] = set()
        others: list[tuple[Object, set[FieldPath]]] = []
        for entry in entries:
            held = set(paths(entry.get("fieldsV1", {})))
            if entry["manager"] == manager and entry["operation"] == "Apply":
                before |= held
            else:
                others.append((entry, held))
        fields = _owned_fields(obj, update=False)
        mine = set(paths(fields))
        conflicts = [
            (entry, path)
            for path in sorted(mine)
            for entry, held in others
            if path in held and path[-1][0] == "f" and value_at(live, path) != value_at(obj, path)
        ]
        if conflicts and not force:
            raise ApiError("Conflict", _conflict_text(conflicts))
        lost = {path for _, path in conflicts}
        kept = mine.union(*(held for _, held in others))
        merged = _merged(live, obj, schema_of(obj))
        merged["metadata"] = dict(merged["metadata"])
        for path in sorted(before - mine, key=len, reverse=True):
            if not any(other[: len(path)] == path for other in kept):
                remove_at(merged, path)
        managed = [{**e, "fieldsV1": _trie(held - lost)} for e, held in others if held - lost]
        managed.append(_entry(obj, manager, "Apply", fields))
        managed.sort(key=lambda entry: (entry["operation"], entry.get("time", "")))
        merged["metadata"]["managedFields"] = managed
        return self._write(merged, live, dry_run)

    def replace(self, obj: Object, manager: str, dry_run: bool = False) -> Object:
        """PUT, which takes the place of the live object as a whole."""
        live = self.get(obj)
        fields = _owned_fields(obj, update=True)
        carried = {k: live["metadata"][k] for k in ("uid", "creationTimestamp", "generation")}
        metadata = {
            **obj["metadata"],
            **carried,
            "managedFields": [_entry(obj, manager, "Update", fields)],
        }
        return self._write({**obj, "metadata": metadata}, live, dry_run)

    def take_over(self, obj: Object, managers: set[tuple[str, str]], manager: str) -> None:
        """Give an Apply manager what the (manager, operation) pairs own."""
        live = self.get(obj)
        managed = taken_over(live, managers, manager)
        if managed is not None:
            live["metadata"]["managedFields"] = managed
            self.world.put(self._key(live), live)

    def delete(self, obj: Object) -> bool:
        """DELETE; with a Namespace goes all that it holds. Returns whether it was there."""
        if obj["kind"] == "Namespace":
            for key, _ in list(self.world.list(f"{self.cluster}/{obj['metadata']['name']}")):
                self.world.delete(key)
        return self.world.delete(self._key(obj))

    def ready(self, obj: Object, waited: float) -> bool:
        """At once, or when `ready.json` says; what waits for an address, when it has one."""
        kind, metadata = obj["kind"], obj["metadata"]
        key = f"{kind}/{metadata.get('namespace', '')}/{metadata['name']}"
        addressed = kind == "Ingress" or obj.get("spec", {}).get("type") == "LoadBalancer"
        if addressed:
            status = self.get(obj).get("status") or {}
            addressed = not (status.get("loadBalancer") or {}).get("ingress")
        stated = (self.world.get("ready") or {}).get(key, "never" if addressed else 0)
        return stated != "never" and waited >= stated

    def _write(self, obj: Object, live: Object, dry_run: bool) -> Object:
        made = "uid" not in live["metadata"]
        obj = self._admitted(obj)
        if not made and (faults := list(_immutable_faults(live, obj))):
            self._invalid(obj, faults)
        if obj.get("spec") != live.get("spec") and "generation" in live["metadata"]:
            obj["metadata"]["generation"] = live["metadata"]["generation"] + 1
        version = live["metadata"].get("resourceVersion")
        self._stamp(obj)
        if dry_run:
            obj["metadata"].pop("resourceVersion")
            if version is not None:
                obj["metadata"]["resourceVersion"] = version
        else:
            self._fill_in_token(obj)
            self.world.put(self._key(obj), obj)
            self._assign_addresses(obj)
        return obj

    def _fill_in_token(self, obj: Object) -> None:
        """Give a service account's Secret its token, as the controller manager does. In place."""
        if obj.get("type") != "kubernetes.io/service-account-token" or not is_secret(obj):
            return
        metadata = obj["metadata"]
        name = metadata["annotations"][_ACCOUNT]
        account = self.world.get(self._file("ServiceAccount", metadata["namespace"], name))
        if account is None or (obj.get("data") or {}).get("token"):
            return
        metadata["annotations"]["kubernetes.io/service-account.uid"] = account["metadata"]["uid"]
        token = hashlib.sha256(f"{account['metadata']['uid']} {metadata['uid']}".encode())
        texts = {
            "ca.crt": self.cluster,
            "namespace": metadata["namespace"],
            "token": f"made-up.{token.hexdigest()}",
        }
        obj["data"] = {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}

    def _admitted(self, obj: Object) -> Object:
        """A copy of the object in its namespace, defaulted and valid."""
        resource = self.resource(obj["apiVersion"], obj["kind"])
        obj = _with_defaults(encoded(copied(obj)))
        metadata = obj["metadata"]
        if resource.namespaced:
            namespace = metadata.setdefault("namespace", "default")
            if self.world.get(self._file("Namespace", "", namespace)) is None:
                self._not_found("namespaces", namespace)
        else:
            metadata.pop("namespace", None)
        if faults := list(_object_faults(obj)):
            self._invalid(obj, faults)
        if _group(obj["apiVersion"]) == "metallb.io":
            self._ask_metallb(obj)
        return obj

    def _refuse_in_terminating(self, obj: Object, resource: Resource) -> None:
        """What the admission plugin NamespaceLifecycle says of a namespace that is going."""
        name, namespace = obj["metadata"]["name"], obj["metadata"].get("namespace", "")
        held = self.world.get(self._file("Namespace", "", namespace)) if namespace else None
        if held and held["metadata"].get("deletionTimestamp"):
            why = f"unable to create new content in namespace {namespace} because it is being"
            raise ApiError("Forbidden", f'{resource.named} "{name}" is forbidden: {why} terminated')

    # MetalLB, once its chart is in the cluster

    def _pools(self) -> list[Object]:
        return [
            obj
            for key, obj in self.world.list(f"{self.cluster}/metallb-system")
            if key.split("/")[2] == "IPAddressPool.metallb.io"
        ]

    def _ask_metallb(self, obj: Object) -> None:
        """What its webhook does with an object. `webhooks.json` says how many calls get no answer:
        {"metallb": 3}, or "never".
        """
        kind = obj["kind"].lower()
        webhook = f"{kind}validationwebhook.metallb.io"
        silent = (self.world.get("webhooks") or {}).get("metallb", 0)
        if silent:
            if silent != "never":
                self.world.put("webhooks", {"metallb": silent - 1})
            raise ApiError(
                "InternalError",
                f'Internal error occurred: failed calling webhook "{webhook}": failed to call '
                'webhook: Post "https://metallb-webhook-service.metallb-system.svc:443/validate-'
                f'metallb-io-v1beta1-{kind}?timeout=10s": dial tcp 10.43.0.50:443: connect: '
                "connection refused",
            )
        if obj["kind"] != "IPAddressPool":
            return
        for other in self._pools():
            if other["metadata"]["name"] == obj["metadata"]["name"]:
                continue
            if not _addresses(obj).isdisjoint(_addresses(other)):
                raise ApiError(
                    "Forbidden",
                    f'admission webhook "{webhook}" denied the request: CIDR of pool '
                    f'"{obj["metadata"]["name"]}" overlaps with already defined CIDR of pool '
                    f'"{other["metadata"]["name"]}"',
                )

    def _assign_addresses(self, cause: Object) -> None:
        """Give each LoadBalancer Service an address of a pool, as MetalLB's controller does."""
        if cause["kind"] not in ("Service", "IPAddressPool"):
            return
        pools = self._pools()
        services = {
            key: obj
            for key, obj in self.world.list(self.cluster)
            if key.split("/")[2] == "Service" and obj["spec"]["type"] == "LoadBalancer"
        }
        for key, service in services.items():
            taken = {_assigned(other) for k, other in services.items() if k != key}
            annotations = service["metadata"].get("annotations") or {}
            asked = annotations.get("metallb.io/loadBalancerIPs")
            offered = [
                address
                for pool in pools
                if asked or pool["spec"].get("autoAssign", True)
                for address in sorted(_addresses(pool))
                if str(address) not in taken and asked in (None, str(address))
            ]
            held = _assigned(service)
            if held and (held == asked or not asked):
                continue
            ingress = [{"ip": str(offered[0]), "ipMode": "VIP"}] if offered else []
            service["status"] = {"loadBalancer": {"ingress": ingress} if ingress else {}}
            self.world.put(key, service)

    def _invalid(self, obj: Object, faults: list[str]) -> NoReturn:
        named = self.resource(obj["apiVersion"], obj["kind"]).kind_group
        listed = faults[0] if len(faults) == 1 else f"[{', '.join(faults)}]"
        message = f'{named} "{obj["metadata"]["name"]}" is invalid: {listed}'
        raise ApiError("Invalid", message)

    def _stamp(self, obj: Object) -> None:
        """Fill in what only the API server sets."""
        metadata = obj["metadata"]
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", _now())
        if obj["kind"] in _WITH_GENERATION or obj["apiVersion"] not in known_versions():
            metadata.setdefault("generation", 1)
        metadata["resourceVersion"] = str(time.time_ns() // 1000)
        if obj["kind"] == "Namespace" and obj["apiVersion"] == "v1":
            obj.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        elif obj["kind"] == "Service" and obj["apiVersion"] == "v1":
            self._allocate(obj)
        if (status := _FIRST_STATUS.get(obj["kind"])) is not None:
            obj.setdefault("status", dict(status))

    def _allocate(self, service: Object) -> None:
        spec = service["spec"]
        if spec["type"] == "ExternalName":
            return
        high, low = hashlib.sha256(service["metadata"]["uid"].encode()).digest()[:2]
        address = spec.setdefault("clusterIP", f"10.43.{high}.{max(low, 1)}")
        spec.setdefault("clusterIPs", [address])
        spec.setdefault("ipFamilies", ["IPv4"])
        spec.setdefault("ipFamilyPolicy", "SingleStack")


_ACCOUNT = "kubernetes.io/service-account.name"


def _addresses(pool: Object) -> set[ipaddress.IPv4Address]:
    """All addresses of an IPAddressPool."""
    found: set[ipaddress.IPv4Address] = set()
    for text in pool["spec"]["addresses"]:
        first, dash, last = text.partition("-")
        if not dash:
            found.update(ipaddress.IPv4Network(text))
            continue
        low, high = ipaddress.IPv4Address(first), ipaddress.IPv4Address(last)
        found.update(low + step for step in range(int(high) - int(low) + 1))
    return found


def _assigned(service: Object) -> str | None:
    """The address of a LoadBalancer Service; None while it has none."""
    ingress = (service.get("status") or {}).get("loadBalancer", {}).get("ingress") or [{}]
    return ingress[0].get("ip")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def _entry(obj: Object, manager: str, operation: str, fields: Object) -> Object:
    return {
        "apiVersion": obj["apiVersion"],
        "fieldsType": "FieldsV1",
        "fieldsV1": fields,
        "manager": manager,
        "operation": operation,
        "time": _now(),
    }


def is_secret(obj: Object) -> bool:
    return obj.get("kind") == "Secret" and obj.get("apiVersion") == "v1"


def encoded(obj: Object) -> Object:
    """A Secret with its stringData as data, as the API server stores it. In place."""
    if is_secret(obj) and obj.get("stringData"):
        data = dict(obj.get("data") or {})
        for key, text in obj.pop("stringData").items():
            data[key] = base64.b64encode(text.encode()).decode()
        obj["data"] = data
    return obj


# Defaulting (kubernetes/pkg/apis/*/v1/defaults.go), for what the stacks declare

_FIRST_STATUS: dict[str, Object] = yaml.safe_load("""
Namespace: {phase: Active}
Deployment: {}
StatefulSet: {}
DaemonSet: {}
Job: {}
CronJob: {}
Service: {loadBalancer: {}}
Ingress: {loadBalancer: {}}
PersistentVolumeClaim: {phase: Pending}
""")
_DEFAULTS: dict[str, Object] = yaml.safe_load("""
Secret: {type: Opaque}
Service: {spec: {type: ClusterIP, sessionAffinity: None}}
Deployment:
  spec:
    progressDeadlineSeconds: 600
    replicas: 1
    revisionHistoryLimit: 10
    strategy: {type: RollingUpdate}
StatefulSet:
  spec:
    podManagementPolicy: OrderedReady
    replicas: 1
    revisionHistoryLimit: 10
    updateStrategy: {type: RollingUpdate}
DaemonSet: {spec: {revisionHistoryLimit: 10, updateStrategy: {type: RollingUpdate}}}
Job:
  spec:
    backoffLimit: 6
    completionMode: NonIndexed
    completions: 1
    parallelism: 1
    suspend: false
CronJob:
  spec:
    concurrencyPolicy: Allow
    failedJobsHistoryLimit: 1
    successfulJobsHistoryLimit: 3
    suspend: false
PersistentVolumeClaim: {spec: {volumeMode: Filesystem}}
NetworkPolicy: {spec: {policyTypes: [Ingress]}}
StorageClass: {reclaimPolicy: Delete, volumeBindingMode: Immediate}
""")
_POD_DEFAULTS: Object = {
    "dnsPolicy": "ClusterFirst",
    "restartPolicy": "Always",
    "schedulerName": "default-scheduler",
    "securityContext": {},
    "terminationGracePeriodSeconds": 30,
}
_CONTAINER_DEFAULTS: Object = {
    "resources": {},
    "terminationMessagePath": "/dev/termination-log",
    "terminationMessagePolicy": "File",
}
_POD_SPECS: dict[str, tuple[str, ...]] = {
    "CronJob": ("spec", "jobTemplate", "spec", "template", "spec"),
    "DaemonSet": ("spec", "template", "spec"),
    "Deployment": ("spec", "template", "spec"),
    "Job": ("spec", "template", "spec"),
    "Pod": ("spec",),
    "ReplicaSet": ("spec", "template", "spec"),
    "StatefulSet": ("spec", "template", "spec"),
}


def _fill(obj: Object, defaults: Object) -> None:
    for key, value in defaults.items():
        if isinstance(value, dict) and isinstance(obj.get(key), dict):
            _fill(obj[key], value)
        else:
            obj.setdefault(key, copied(value))


def _pod_spec(obj: Object) -> Object | None:
    spec: Any = obj
    for key in _POD_SPECS.get(obj["kind"], ("",)):
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec if isinstance(spec, dict) else None


def _with_defaults(obj: Object) -> Object:
    if obj["apiVersion"] not in known_versions():
        return obj
    kind = obj["kind"]
    _fill(obj, _DEFAULTS.get(kind, {}))
    spec = obj.get("spec", {})
    if kind == "Namespace":
        name = {"kubernetes.io/metadata.name": obj["metadata"]["name"]}
        obj["metadata"]["labels"] = {**obj["metadata"].get("labels", {}), **name}
    elif kind == "Deployment" and spec["strategy"]["type"] == "RollingUpdate":
        rolling = {"maxSurge": "25%", "maxUnavailable": "25%"}
        _fill(spec["strategy"], {"rollingUpdate": rolling})
    elif kind == "Service":
        if spec["type"] != "ExternalName":
            spec.setdefault("internalTrafficPolicy", "Cluster")
        for port in spec.get("ports", ()):
            _fill(port, {"protocol": "TCP", "targetPort": port.get("port")})
    pod = _pod_spec(obj)
    if pod is not None:
        _fill(pod, _POD_DEFAULTS)
        for container in itertools.chain(
            pod.get("initContainers") or (), pod.get("containers") or ()
        ):
            _default_container(container)
    return obj


def _default_container(container: Object) -> None:
    _fill(container, _CONTAINER_DEFAULTS)
    image = container.get("image", "").split("@")[0].rsplit("/", 1)[-1]
    floating = "@" not in container.get("image", "") and image.partition(":")[2] in ("", "latest")
    container.setdefault("imagePullPolicy", "Always" if floating else "IfNotPresent")
    for port in container.get("ports") or ():
        port.setdefault("protocol", "TCP")


# Validation (kubernetes/pkg/apis/*/validation), for what the stacks declare

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAMES: dict[str, tuple[str, int, str]] = {
    "subdomain": (
        rf"{_LABEL}(\.{_LABEL})*",
        253,
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' "
        "or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex "
        f"used for validation is '{_LABEL}(\\.{_LABEL})*')",
    ),
    "label": (
        _LABEL,
        63,
        "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and "
        "must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex "
        f"used for validation is '{_LABEL}')",
    ),
    "dns-1035": (
        "[a-z]([-a-z0-9]*[a-z0-9])?",
        63,
        "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an "
        "alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or "
        "'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')",
    ),
    "path": (r"(?!\.{1,2}$)[^/%]+", 253, "may not be '.' or '..' and may not contain '/' or '%'"),
}
_NAME_RULES = {
    "Namespace": "label",
    "Service": "dns-1035",
    **dict.fromkeys(("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"), "path"),
}
_LABEL_VALUE = re.compile("(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?")
_DATA_KEY = re.compile("[-._a-zA-Z0-9]+")
_SECRET_KEYS: dict[str, tuple[str, ...]] = {
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}
_DATA_BYTES = 1024 * 1024


def _name_faults(name: str, rule: str, path: str) -> Iterator[str]:
    pattern, length, reason = _NAMES[rule]
    if not re.fullmatch(pattern, name):
        yield f'{path}: Invalid value: "{name}": {reason}'
    if len(name) > length:
        yield f'{path}: Invalid value: "{name}": must be no more than {length} characters'


def _object_faults(obj: Object) -> Iterator[str]:
    """Why the API server calls an object invalid. Secret values are never quoted."""
    metadata, kind = obj["metadata"], obj["kind"]
    yield from _name_faults(
        metadata.get("name", ""), _NAME_RULES.get(kind, "subdomain"), "metadata.name"
    )
    yield from _label_faults(metadata.get("labels"), "metadata.labels")
    if obj["apiVersion"] not in known_versions():
        return
    if kind in ("Secret", "ConfigMap"):
        yield from _data_faults(obj)
    elif kind == "Service":
        spec = obj.get("spec", {})
        if not (spec.get("ports") or spec["type"] == "ExternalName" or headless(obj)):
            yield "spec.ports: Required value"
    elif kind == "CustomResourceDefinition":
        spec = obj["spec"]
        wanted = f"{spec['names']['plural']}.{spec['group']}"
        if metadata["name"] != wanted:
            yield (
                f'metadata.name: Invalid value: "{metadata["name"]}": must be spec.names.plural+"."'
                "+spec.group"
            )
    pod = _pod_spec(obj)
    if pod is not None:
        yield from _pod_faults(pod, ".".join(_POD_SPECS[kind]))
        if kind in ("Job", "CronJob") and pod["restartPolicy"] not in ("OnFailure", "Never"):
            path = ".".join(_POD_SPECS[kind])
            yield f'{path}.restartPolicy: Required value: valid values: "OnFailure", "Never"'
    if kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
        labels = obj["spec"]["template"].get("metadata", {}).get("labels") or {}
        yield from _label_faults(labels, "spec.template.metadata.labels")
        selected = (obj["spec"].get("selector") or {}).get("matchLabels") or {}
        if not selected.items() <= labels.items():
            yield (
                f"spec.template.metadata.labels: Invalid value: {json.dumps(labels)}: `selector` "
                "does not match template `labels`"
            )


def _label_faults(labels: Object | None, path: str) -> Iterator[str]:
    for value in (labels or {}).values():
        if len(value) > 63:
            yield f'{path}: Invalid value: "{value}": must be no more than 63 characters'
        elif not _LABEL_VALUE.fullmatch(value):
            yield (
                f'{path}: Invalid value: "{value}": a valid label must be an empty string or '
                "consist of alphanumeric characters, '-', '_' or '.', and must start and end with "
                "an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex "
                f"used for validation is '{_LABEL_VALUE.pattern}')"
            )


def _data_faults(obj: Object) -> Iterator[str]:
    total = 0
    values: dict[str, bytes] = {}
    encoded = obj.get("data" if obj["kind"] == "Secret" else "binaryData") or {}
    for key, text in encoded.items():
        try:
            values[key] = base64.b64decode(text, validate=True)
        except binascii.Error:
            named = obj["kind"]
            message = f'{named} in version "v1" cannot be handled as a {named}: '
            raise ApiError("BadRequest", f"{message}illegal base64 data in data.{key}") from None
    if obj["kind"] == "ConfigMap":
        values |= {key: text.encode() for key, text in (obj.get("data") or {}).items()}
    for key, value in values.items():
        total += len(value)
        if not _DATA_KEY.fullmatch(key) or key in (".", ".."):
            yield (
                f'data[{key}]: Invalid value: "{key}": a valid config key must consist of '
                "alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or "
                f"'key-name', regex used for validation is '{_DATA_KEY.pattern}')"
            )
    if total > _DATA_BYTES:
        yield f"data: Too long: may not be more than {_DATA_BYTES} bytes"
    of = obj.get("type", "")
    for key in _SECRET_KEYS.get(of, ()):
        if key not in values:
            yield f"data[{key}]: Required value"
        elif of.startswith("kubernetes.io/dockerc") and not _is_json(values[key]):
            yield f'data[{key}]: Invalid value: "<secret contents redacted>": not valid JSON'
    if of == "kubernetes.io/service-account-token" and not (
        obj["metadata"].get("annotations") or {}
    ).get(_ACCOUNT):
        yield f"metadata.annotations[{_ACCOUNT}]: Required value"
    if of == "kubernetes.io/basic-auth" and not values.keys() & {"username", "password"}:
        yield "data[username]: Required value, data[password]: Required value"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _pod_faults(pod: Object, path: str) -> Iterator[str]:
    if not pod.get("containers"):
        yield f"{path}.containers: Required value"
    volumes = {volume.get("name") for volume in pod.get("volumes") or ()}
    seen: set[str] = set()
    for index, container in enumerate(pod.get("containers") or ()):
        at, name = f"{path}.containers[{index}]", container.get("name", "")
        yield from _name_faults(name, "label", f"{at}.name")
        if name in seen:
            yield f'{at}.name: Duplicate value: "{name}"'
        seen.add(name)
        if not container.get("image"):
            yield f"{at}.image: Required value"
        for number, port in enumerate(container.get("ports") or ()):
            if not 1 <= port["containerPort"] <= 65535:
                value = f"Invalid value: {port['containerPort']}"
                yield f"{at}.ports[{number}].containerPort: {value}: must be between 1 and 65535"
        for number, mount in enumerate(container.get("volumeMounts") or ()):
            if mount.get("name") not in volumes:
                yield f'{at}.volumeMounts[{number}].name: Not found: "{mount.get("name")}"'


_STATEFUL_ADJUSTABLE = {
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
}
_FORBIDDEN_STATEFUL = (
    "spec: Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', "
    "'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' "
    "and 'minReadySeconds' are forbidden"
)
_FORBIDDEN_CLAIM = (
    "spec: Forbidden: spec is immutable after creation except resources.requests and "
    "volumeAttributesClassName for bound claims"
)
# Field by kind: what no update may change.
_FIXED: dict[str, tuple[tuple[str, ...], ...]] = {
    "Secret": (("type",),),
    "Deployment": (("spec", "selector"),),
    "DaemonSet": (("spec", "selector"),),
    "ReplicaSet": (("spec", "selector"),),
    "Job": (("spec", "selector"), ("spec", "template"), ("spec", "completions")),
    "Service": (("spec", "clusterIP"),),
    "RoleBinding": (("roleRef",),),
    "ClusterRoleBinding": (("roleRef",),),
    "StorageClass": (("provisioner",), ("parameters",), ("reclaimPolicy",), ("volumeBindingMode",)),
}


def headless(service: Object) -> bool:
    return service.get("spec", {}).get("clusterIP") == "None"


def _immutable_faults(old: Object, new: Object) -> Iterator[str]:
    kind = new["kind"]
    if new["apiVersion"] not in known_versions():
        return
    for path in _FIXED.get(kind, ()):
        steps = tuple(f"f:{step}" for step in path)
        if value_at(old, steps) != value_at(new, steps):
            yield f"{'.'.join(path)}: Invalid value: field is immutable"
    if old.get("immutable") and old.get("data") != new.get("data"):
        yield "data: Forbidden: field is immutable when `immutable` is set"
    before, after = dict(old.get("spec") or {}), dict(new.get("spec") or {})
    if kind == "StatefulSet":
        for adjustable in _STATEFUL_ADJUSTABLE:
            before.pop(adjustable, None)
            after.pop(adjustable, None)
        if before != after:
            yield _FORBIDDEN_STATEFUL
    elif kind == "PersistentVolumeClaim":
        for spec in (before, after):
            spec.pop("resources", None)
            spec.pop("volumeAttributesClassName", None)
        if before != after:
            yield _FORBIDDEN_CLAIM
