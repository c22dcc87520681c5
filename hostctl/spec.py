"""Specs: what a verb is given, checked whole before anything is touched."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from hostctl.protocol import Failure


class Value:
    """One value of a spec. ``test`` returns the value to use, or raises ValueError(the allowed)."""

    def __init__(self, test: Callable[[Any], Any], *default: Any, secret: bool = False) -> None:
        self.test, self.default, self.secret = test, default, secret


class Items:
    """A list of a spec, all of one shape."""

    def __init__(self, shape: Any, *default: Any) -> None:
        self.shape, self.default = shape, default


def checked(spec: Any, shape: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """The spec as the shape says, defaults filled in. All errors at once, each with key, value and
    what is allowed; a secret value is never shown."""
    errors: list[str] = []
    result = _check(spec, shape, "", errors)
    if errors:
        raise Failure(
            "bad-spec",
            f"spec of {verb}",
            "; ".join(errors),
            f"correct the spec; `hostctl {verb} --help` shows one",
        )
    return result


def _check(value: Any, shape: Any, path: str, errors: list[str]) -> Any:
    if isinstance(shape, Value):
        try:
            return shape.test(value)
        except ValueError as allowed:
            shown = "a value that is not shown" if shape.secret else _shown(value)
            errors.append(f"{path}: {shown} is not allowed; allowed is {allowed}")
            return None
    if isinstance(shape, Items):
        if not isinstance(value, list):
            errors.append(f"{path}: {_shown(value)} is not allowed; allowed is a list")
            return []
        return [_check(item, shape.shape, f"{path}[{n}]", errors) for n, item in enumerate(value)]
    if not isinstance(value, dict):
        errors.append(f"{path or 'spec'}: {_shown(value)} is not allowed; allowed is an object")
        return {}
    result = {}
    for key, inner in shape.items():
        where = f"{path}.{key}" if path else key
        default = getattr(inner, "default", ())
        if key in value:
            result[key] = _check(value[key], inner, where, errors)
        elif default:
            result[key] = default[0]
        else:
            errors.append(f"{where}: missing")
    for key in sorted(set(map(str, value)) - set(shape)):
        errors.append(f"{_shown(f'{path}.{key}' if path else key)}: unknown key")
    return result


def _shown(value: Any) -> str:
    kinds = {dict: "an object", list: "a list"}
    return kinds.get(type(value)) or json.dumps(
        str(value)[:80] if isinstance(value, str) else value
    )


def text_matching(pattern: str, allowed: str) -> Callable[[Any], str]:
    def test(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(allowed)
        return value

    return test


def number_between(low: int, high: int) -> Callable[[Any], int]:
    def test(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return test


def or_null(test: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def either(value: Any) -> Any:
        try:
            return None if value is None else test(value)
        except ValueError as allowed:
            raise ValueError(f"{allowed}, or null") from None

    return either


def one_of(*words: str) -> Callable[[Any], str]:
    def test(value: Any) -> str:
        if value not in words:
            raise ValueError("one of " + ", ".join(words))
        return value

    return test


def boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def absolute_path(value: Any) -> str:
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"/[^\x00-\x1f\x7f$]+", value)
        or os.path.normpath(value) != value
        or value.startswith("//")
    ):
        raise ValueError("an absolute path without '..', '$' or control characters")
    return value


def _mount_path(value: Any) -> str:
    if not isinstance(value, str) or ":" in value:
        raise ValueError("an absolute path without ':', which parts a mount of Docker")
    return absolute_path(value)


def file_mode(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('an octal mode such as "0640"')
    return int(value, 8)


def private_mode(value: Any) -> int:
    mode = file_mode(value)
    if mode & 0o007:
        raise ValueError('an octal mode that gives others nothing, such as "0640"')
    return mode


def _address(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Address(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("an IPv4 address (k3d takes no other)") from None


def _server_name(value: Any) -> str:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(value if isinstance(value, str) else "")
        return value
    return HOST(value)


def _resolver(value: Any) -> str:
    # Inside a node the loopback and Docker's own addresses lead nowhere (incident 5).
    try:
        address = ipaddress.ip_address(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("an IP address of a DNS server") from None
    if address.is_loopback or address.is_link_local or address.is_unspecified:
        raise ValueError("a DNS server that pods can reach, neither loopback nor link-local")
    return str(address)


def _subnet(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Network(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("an IPv4 subnet such as 172.30.0.0/16") from None


def base64_map(value: Any) -> dict[str, str]:
    allowed = "an object of key to base64 text"
    if not isinstance(value, dict):
        raise ValueError(allowed)
    for key, text in value.items():
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key) or not isinstance(text, str):
            raise ValueError(allowed)
        try:
            base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError(allowed) from None
    return value


def text_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("an object of key to text")
    return value


def _k3s_argument(value: Any) -> str:
    own = ("--disable", "--resolv-conf", "--secrets-encryption")
    k3ds = ("--cluster-init", "--data-dir", "--server")
    if not isinstance(value, str) or not re.fullmatch(r"--[a-z][^\x00-\x1f\x7f$]*", value):
        # k3d expands $NAME in its config file and has no way to write a plain $.
        raise ValueError("an argument of k3s such as --write-kubeconfig-mode=640, without '$'")
    if re.split("[= ]", value)[0] in own + k3ds:
        both = ", ".join(own + k3ds)
        raise ValueError(f"none of {both}, which have a setting of their own or none")
    if SECRET_ARGUMENT.match(value):
        raise ValueError(
            "one that carries no secret, which every process could read; k3s takes "
            "secrets from files, by arguments that end in -file"
        )
    return value


def _audit(value: Any) -> dict[str, Any]:
    allowed = "an object of policy, text, and arguments, each --kube-apiserver-arg=audit-...=..."
    if not isinstance(value, dict) or set(value) != {"policy", "arguments"}:
        raise ValueError(allowed)
    policy, arguments = value["policy"], value["arguments"]
    if not isinstance(policy, str) or not isinstance(arguments, list):
        raise ValueError(allowed)
    for argument in arguments:
        if not re.fullmatch(AUDIT_ARGUMENT + r"[a-z-]+=[A-Za-z0-9/._-]+", str(argument)):
            raise ValueError(allowed)
    return value


def git_repository(value: Any) -> str:
    if not isinstance(value, str) or not _REPOSITORY.fullmatch(value):
        raise ValueError(
            "https://HOST/PATH, ssh://[USER@]HOST[:PORT]/PATH or USER@HOST:PATH, without a password"
        )
    return value


def git_ref(value: Any) -> str:
    """git-check-ref-format(1), and nothing that looks like an option."""
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[^\x00-\x20\x7f~^:?*\[\\-][^\x00-\x20\x7f~^:?*\[\\]{0,250}", value)
        or any(bad in value for bad in ("..", "@{", "//", "/.", ".lock/"))
        or value.startswith((".", "/"))
        or value.endswith((".", "/", ".lock"))
        or value == "@"
    ):
        raise ValueError("a branch, tag or commit; nothing that looks like an option")
    return value


def path_in_repository(value: Any) -> str:
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[A-Za-z0-9._+@-]+(/[A-Za-z0-9._+@-]+)*", value)
        or value.startswith("-")
        or ".." in value.split("/")
    ):
        raise ValueError("a relative path inside the repository, without '..'")
    return value


_REPOSITORY = re.compile(
    r"https://[A-Za-z0-9.-]+(:\d{1,5})?(/[A-Za-z0-9._~+-]+)+"
    r"|ssh://([A-Za-z0-9._-]+@)?[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?(/[A-Za-z0-9._~+-]+)+"
    r"|[A-Za-z0-9_][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[A-Za-z0-9._~+][A-Za-z0-9._~+/-]*"
)
CLUSTER_NAME = text_matching(
    r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", "1 to 32 of a-z, 0-9 and '-' inside"
)
DNS_LABEL = text_matching(
    r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a DNS label of up to 63 characters"
)
OBJECT_NAME = text_matching(
    r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "the name of a Kubernetes object"
)
_SCALED = r"(deployment|statefulset)/[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
SCALED_WORKLOAD = text_matching(_SCALED, "deployment/NAME or statefulset/NAME")
POSTGRES_WORKLOAD = text_matching(
    rf"{_SCALED}|pod/[a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?",
    "deployment/NAME, statefulset/NAME or pod/NAME",
)
POSTGRES_NAME = text_matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}", "a name of PostgreSQL")
CONTAINER_NAME = text_matching(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}", "the name of a container")
ACCOUNT = text_matching(
    r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,63}", "the name or number of a user or group"
)
COMMIT = text_matching(r"[0-9a-f]{40}", "a commit of 40 hex digits")
IMAGE = text_matching(
    # Docker's grammar of references (github.com/distribution/reference); what is before the first
    # slash may be a registry's host and port. Then a tag, a digest, or both.
    r"(?!.*:latest(@|$))([a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?(:\d{1,5})?/)?[a-z0-9][a-z0-9._/-]*"
    r"(:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}(@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})",
    "an image with a tag that is not latest (incident 9), or with @sha256:...",
)
_SERVER = text_matching(
    r"https://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}", "https://HOST:PORT that clients reach"
)
INCARNATION = text_matching(r"[0-9a-f]{8}-[1-9]\d{0,8}", "what `k3d inspect` said")
EXTERNAL_NAME = text_matching(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)+",
    "a host name with a dot, in lower case",
)
KIND = text_matching(
    r"[A-Za-z][A-Za-z0-9]*(\.[a-z0-9.-]+)?", "a kind such as Secret or Deployment.apps"
)
_NETWORK_NAME = text_matching(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,66}", "the name of a Docker network")
HOST = text_matching(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", "a host name or IP address")
# Names of k3s arguments whose value is a secret. The one in --secrets-encryption is none.
AUDIT_ARGUMENT = "--kube-apiserver-arg=audit-"
SECRET_ARGUMENT = re.compile(
    r"--(?![^= ]*-file(?:[= ]|$))(?:[^= ]*(?:token|secret(?!s-encryption)|password|access-key)"
    r"|datastore-endpoint|vpn-auth)[^= ]*"
)
SECRET_TYPES = (
    "Opaque",
    "kubernetes.io/dockerconfigjson",
    "kubernetes.io/tls",
    "kubernetes.io/basic-auth",
    "kubernetes.io/ssh-auth",
    "kubernetes.io/iscsi-chap",
)


def server_url(value: Any) -> str:
    text = _SERVER(value)
    # Incident 14: k3d writes 0.0.0.0, which no client can dial.
    if text.startswith("https://0.0.0.0:"):
        raise ValueError("an address that clients can reach, not 0.0.0.0 (incident 14)")
    return text


CLUSTER_SPEC: dict[str, Any] = {
    "name": Value(CLUSTER_NAME),
    "image": Value(IMAGE),
    "servers": Value(number_between(1, 9), 1),
    "agents": Value(number_between(0, 99), 0),
    "disable": Items(Value(text_matching(r"[a-z0-9-]{1,63}", "a packaged component of k3s")), []),
    "api": {
        "bind": Value(_address),
        "port": Value(number_between(1, 65535)),
        "server_name": Value(or_null(_server_name), None),
    },
    "resolvers": Items(Value(_resolver)),
    "storage_dir": Value(_mount_path),
    "datastore_dir": Value(or_null(_mount_path), None),
    "network": {
        "name": Value(_NETWORK_NAME),
        "subnet": Value(_subnet),
    },
    "secrets_encryption": Value(boolean, False),
    # Directory with the CNI reference plugins; a second Docker network of the nodes and the
    # interface of the host that it is on.
    "cni_plugins": Value(or_null(_mount_path), None),
    "lan_network": Value(or_null(_NETWORK_NAME), None),
    "lan_interface": Value(
        or_null(text_matching(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,14}", "an interface of the host")),
        None,
    ),
    "k3s_args": Items(Value(_k3s_argument, secret=True), []),
    "audit": Value(or_null(_audit), None),
    "ports": Items(
        {
            "host_port": Value(number_between(1, 65535)),
            "container_port": Value(number_between(1, 65535)),
            "bind": Value(_address, "127.0.0.1"),
            "protocol": Value(one_of("tcp", "udp"), "tcp"),
        },
        [],
    ),
    "api_wait_seconds": Value(number_between(1, 86400), 1800),
    "generation": Value(or_null(number_between(0, 2**31)), None),
    "incarnation": Value(or_null(INCARNATION), None),
    "recreate": Value(or_null(CLUSTER_NAME), None),
    "confirm": Value(or_null(CLUSTER_NAME), None),
    "installs_k3d": Value(boolean, False),
    "moved_from": Value(or_null(DNS_LABEL), None),
}


def cluster_spec(spec: Any, verb: str) -> dict[str, Any]:
    """A ClusterSpec, checked together with what its values must not be to each other."""
    result = checked(spec, CLUSTER_SPEC, verb)
    wrong = []
    storage, datastore = result["storage_dir"], result["datastore_dir"] or ""
    if not datastore and storage:
        result["datastore_dir"] = f"{storage}-server"
    elif f"{storage}/".startswith(f"{datastore}/") or f"{datastore}/".startswith(f"{storage}/"):
        wrong.append("datastore_dir: inside storage_dir or around it; allowed is one beside it")
    if result["servers"] % 2 == 0:
        wrong.append("servers: an even number has no majority to lose; allowed is an odd number")
    if result["servers"] > 1 and result["network"]["name"] != f"k3d-{result['name']}":
        wrong.append(
            f"network.name: k3d makes that of several servers; allowed is k3d-{result['name']}"
        )
    if result["network"]["name"] in ("host", "bridge", "none"):
        wrong.append("network.name: one of Docker's own; allowed is a network of the cluster")
    subnet = ipaddress.ip_network(result["network"]["subnet"])
    for resolver in result["resolvers"]:
        if ipaddress.ip_address(resolver) in subnet:
            wrong.append(f"resolvers: {resolver} lies in the cluster's own Docker network {subnet}")
    if not result["resolvers"]:
        wrong.append("resolvers: empty; allowed is at least one DNS server (incident 5)")
    published = [(result["api"]["port"], "tcp", result["api"]["bind"])]
    for port in result["ports"]:
        published.append((port["host_port"], port["protocol"], port["bind"]))
    for (port, protocol, bind), (*other, its_bind) in itertools.combinations(published, 2):
        if [port, protocol] == other and (bind == its_bind or "0.0.0.0" in (bind, its_bind)):
            wrong.append(f"ports: {port}/{protocol} is used twice on {its_bind}")
    if wrong:
        raise Failure("bad-spec", f"spec of {verb}", "; ".join(wrong), "correct the settings")
    return result


NAME_SPEC = {"name": Value(CLUSTER_NAME)}
