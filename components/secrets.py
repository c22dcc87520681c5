"""The Secrets of a stack: their values from encrypted config or decrypted files, and the objects in
the cluster.
"""

import base64
import binascii
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import yaml

from components import settings
from components.cluster import Cluster
from components.host import HostError, Reading, ask, result, this_machine
from components.namespaces import Namespaces

# The key under which Tailscale's containers look; what is in the file may be something else (004:
# the file kept its name).
_AUTH_KEY = "TS_AUTHKEY"
_LABELS = {"app.kubernetes.io/managed-by": "pulumi"}


@dataclass(frozen=True)
class SecretValue:
    """A declared Secret together with its value.

    ``data`` maps keys to base64 text as Kubernetes stores it. Never shown: the repr leaves it out.
    """

    namespace: str
    name: str
    type: str
    data: Mapping[str, str] = field(repr=False)
    seed_only: bool = False
    rollout: bool = True
    postgres: settings.RolePassword | None = None
    """The role whose password it holds; of a copy none, as the original has it."""

    @property
    def digest(self) -> str:
        """Changes exactly when the value does. Kept secret all the same: a short value could be
        guessed from it.
        """
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()


def read_values(
    declared: Sequence[settings.DeclaredSecret],
    host: settings.Host,
) -> Reading[list[SecretValue]]:
    """The values of all declared Secrets, read on the machine that the settings name.

    An optional Secret whose file is missing is left out with a warning. Raises HostError with all
    problems at once: a file that is missing, unreadable, or not what the declaration says it is.
    Files are named, their content never (incidents 7 and 17).
    """
    contents: dict[tuple[str, str], dict[str, Any]] = {}
    for machine in ("host", "here"):
        requests = [
            request
            for secret in declared
            if (secret.secret.read_on or host.secret_files) == machine
            for request in _requests(secret)
        ]
        if requests:
            contents |= yield from _read_files(requests, machine)

    values: list[SecretValue] = []
    problems: list[str] = []
    for secret in declared:
        machine = secret.secret.read_on or host.secret_files
        paths = [request["path"] for request in _requests(secret)]
        missing = [path for path in paths if contents[machine, path]["state"] == "absent"]
        if missing and secret.secret.optional:
            pulumi.log.warn(
                f"Secret {secret.namespace}/{secret.name} is optional and left out:"
                f" {', '.join(missing)} does not exist"
            )
            continue
        try:
            values.append(_value(secret, {path: contents[machine, path] for path in paths}))
        except _Unusable as problem:
            problems.append(f"  Secret {secret.namespace}/{secret.name}: {problem}")
    if problems:
        raise HostError(
            f"{len(problems)} Secret(s) cannot be read:\n"
            + "\n".join(dict.fromkeys(problems))
            + "\n  Remedy: let agenix or sops decrypt the file there, correct the path under"
            " homelab:secrets, or mark the Secret `optional: true`."
        )
    return values


class _Unusable(Exception):
    """A source that does not give the declared Secret. Its text holds no content."""


def _requests(secret: settings.DeclaredSecret) -> list[dict[str, Any]]:
    source = secret.secret
    common = {
        "namespace": secret.namespace,
        "name": secret.name,
        "type": source.type,
        "optional": source.optional,
    }
    if source.manifest:
        declared_as = secret.copy_of or (secret.namespace, secret.name)
        common |= {"namespace": declared_as[0], "name": declared_as[1]}
        return [{"path": source.manifest, "as": "manifest", "keys": [], **common}]
    return [
        {"path": path, "as": "value", "keys": [key], **common} for key, path in source.files.items()
    ]


def _read_files(
    requests: list[dict[str, Any]], machine: str
) -> Reading[dict[tuple[str, str], dict[str, Any]]]:
    unique = {request["path"]: request for request in requests}
    reading = ask(["files", "read"], {"files": list(unique.values())})
    answer = (yield from reading) if machine == "host" else this_machine().read(reading)
    if answer["made_up"]:
        owner = "the host" if machine == "host" else "this machine"
        pulumi.log.warn(
            f"rehearsal: made up values for {len(answer['made_up'])} files that {owner}"
            " does not have"
        )
    return {(machine, path): seen for path, seen in answer["files"].items()}


def _value(secret: settings.DeclaredSecret, files: Mapping[str, dict[str, Any]]) -> SecretValue:
    source = secret.secret
    for path, seen in files.items():
        if seen["state"] != "present":
            raise _Unusable(f"{path} is {seen['state']}: {seen['detail']}")
    if source.manifest:
        content = base64.b64decode(files[source.manifest]["content"])
        data = _manifest_data(secret, source.manifest, content)
    else:
        data = {key: _encoded(value.get_secret_value()) for key, value in source.data.items()}
        for key, path in source.files.items():
            content = base64.b64decode(files[path]["content"])
            data[key] = base64.b64encode(content.removesuffix(b"\n")).decode()
    _require_keys(source.type, data)
    if _AUTH_KEY in data and (
        problem := settings.auth_key_problem(base64.b64decode(data[_AUTH_KEY]).decode("latin-1"))
    ):
        raise _Unusable(f"{source.files.get(_AUTH_KEY, _AUTH_KEY)}: {problem}")
    role = None if secret.copy_of else source.postgres
    if role:
        _require_password(role, data)
    return SecretValue(
        namespace=secret.namespace,
        name=secret.name,
        type=source.type,
        data=data,
        seed_only=source.seed_only,
        rollout=source.rollout,
        postgres=role,
    )


def _warn_of_bare_pods(namespace: str, pods: Sequence[str]) -> None:
    if pods:
        pulumi.log.warn(
            f"{', '.join(pods)} in namespace {namespace} kept the old value when a Secret last "
            "changed, and no controller would make it again. Remedy, if that was not done since: "
            "kubectl delete it and apply it again."
        )


def _manifest_data(secret: settings.DeclaredSecret, path: str, content: bytes) -> dict[str, str]:
    """The data of a file that holds a whole Secret; it must be the Secret that is declared."""
    try:
        documents = [document for document in yaml.safe_load_all(content) if document]
    except (yaml.YAMLError, UnicodeDecodeError):
        raise _Unusable(f"{path} is not YAML") from None
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise _Unusable(f"{path} holds {len(documents)} documents; one Secret is allowed")
    manifest = documents[0]
    metadata = manifest.get("metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    namespace, name = secret.copy_of or (secret.namespace, secret.name)
    expected = {
        "kind": ("Secret", manifest.get("kind")),
        "metadata.name": (name, metadata.get("name")),
        "metadata.namespace": (namespace, metadata.get("namespace")),
        "type": (secret.secret.type, manifest.get("type", "Opaque")),
    }
    for key, (wanted, found) in expected.items():
        if found != wanted:
            raise _Unusable(f"{path} has {key} {found!r}, declared is {wanted!r}")
    data: dict[str, str] = {}
    for key, text in (manifest.get("data") or {}).items():
        try:
            base64.b64decode(str(text), validate=True)
        except (binascii.Error, ValueError):
            raise _Unusable(f"{path}: data.{key} is not base64") from None
        data[str(key)] = str(text)
    for key, text in (manifest.get("stringData") or {}).items():
        if not isinstance(text, str):
            raise _Unusable(f"{path}: stringData.{key} is not a string; quote it")
        data[str(key)] = _encoded(text)
    if not data:
        raise _Unusable(f"{path} has neither data nor stringData")
    return data


def _require_keys(secret_type: str, data: Mapping[str, str]) -> None:
    """The keys that the API server demands of a type, refused here by name instead of there,
    half-way through.
    """
    missing = settings.missing_keys(secret_type, data)
    if missing:
        raise _Unusable(f"type {secret_type} needs {missing}")
    if secret_type == "kubernetes.io/dockerconfigjson":
        try:
            json.loads(base64.b64decode(data[".dockerconfigjson"]))
        except ValueError:
            raise _Unusable(".dockerconfigjson is not JSON") from None


def _require_password(role: settings.RolePassword, data: Mapping[str, str]) -> None:
    if role.key not in data:
        raise _Unusable(f"it has no key {role.key}, which holds the password of role {role.role}")
    if not re.fullmatch(rb"[ -~]{1,1000}", base64.b64decode(data[role.key])):
        raise _Unusable(
            f"{role.key}, the password of role {role.role}, must be printable ASCII: others reach"
            " PostgreSQL in another form from each client"
        )


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@dataclass(frozen=True)
class SecretsArgs:
    values: Sequence[SecretValue]
    namespaces: Namespaces
    cluster: Cluster


class Secrets(pulumi.ComponentResource):
    """All Secrets of a stack.

    A seed-only Secret is created when absent and never written again, not even on a changed seed
    (incident 8); a kubernetes Secret cannot do that (Create fails where it exists, upsert
    overwrites), so hostctl does. Workloads that use a changed Secret are rolled.
    """

    def __init__(
        self, name: str, args: SecretsArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Secrets", name, None, opts)
        self._namespaces = args.namespaces.namespaces
        self._cluster = args.cluster
        managed: dict[str, list[tuple[SecretValue, kubernetes.core.v1.Secret]]] = defaultdict(list)
        for value in args.values:
            if value.seed_only:
                self._seed(value)
            else:
                # The database first: one that cannot be told leaves all with the old password.
                after = [self._password(value, value.postgres)] if value.postgres else []
                managed[value.namespace].append((value, self._secret(value, after)))
        for namespace, secrets in managed.items():
            self._rollout(namespace, secrets)
        self.register_outputs({})

    def _secret(
        self, value: SecretValue, after: Sequence[pulumi.Resource]
    ) -> kubernetes.core.v1.Secret:
        return kubernetes.core.v1.Secret(
            f"{value.namespace}/{value.name}",
            metadata={
                "name": value.name,
                "namespace": value.namespace,
                "labels": _LABELS,
            },
            type=value.type,
            data=pulumi.Output.secret(dict(value.data)),
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=self._cluster.provider,
                deleted_with=self._cluster.identity,
                depends_on=[*self._namespace(value.namespace), *after],
            ),
        )

    def _password(self, value: SecretValue, role: settings.RolePassword) -> pulumi.Resource:
        return self._cluster.host.command(
            f"password {value.namespace}/{value.name}",
            ["postgres", "password"],
            {
                "kubeconfig": self._cluster.kubeconfig,
                "namespace": value.namespace,
                **role.model_dump(mode="json", exclude={"key"}),
                "user": role.user or role.role,
                "password": base64.b64decode(value.data[role.key]).decode("ascii"),
            },
            secret=True,
            # In another cluster nothing has been seen yet.
            triggers=[self._cluster.incarnation],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[self._cluster.provider]),
        )

    def _seed(self, value: SecretValue) -> None:
        namespace = self._namespace(value.namespace)
        self._cluster.host.command(
            f"seed {value.namespace}/{value.name}",
            ["secret", "seed"],
            {
                "kubeconfig": self._cluster.kubeconfig,
                "namespace": value.namespace,
                "name": value.name,
                "type": value.type,
                "data": dict(value.data),
                "labels": _LABELS,
            },
            secret=True,
            # In a namespace that was made anew there is no seed.
            triggers=[self._cluster.incarnation, *(made.metadata.uid for made in namespace)],
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[self._cluster.provider, *namespace],
                # A changed seed is no change: what the cluster holds is newer (incident 8). A
                # cluster that is made anew gets the seed of now.
                ignore_changes=[] if self._cluster.anew else ["stdin"],
            ),
        )

    def _rollout(
        self, namespace: str, secrets: Iterable[tuple[SecretValue, kubernetes.core.v1.Secret]]
    ) -> None:
        watched = [(value, secret) for value, secret in secrets if value.rollout]
        if not watched:
            return
        rollout = self._cluster.host.command(
            f"rollout {namespace}",
            ["rollout"],
            {
                "kubeconfig": self._cluster.kubeconfig,
                "namespace": namespace,
                "secrets": {value.name: value.digest for value, _ in watched},
            },
            secret=True,
            # In another cluster nothing has been seen yet.
            triggers=[self._cluster.incarnation],
            opts=pulumi.ResourceOptions(parent=self, depends_on=[secret for _, secret in watched]),
        )
        # Nothing of the command is logged; what it names is no secret.
        pulumi.Output.unsecret(result(rollout)).apply(
            lambda seen: _warn_of_bare_pods(namespace, seen.get("left") or [])
        )

    def _namespace(self, name: str) -> list[kubernetes.core.v1.Namespace]:
        namespace = self._namespaces.get(name)
        return [namespace] if namespace else []
