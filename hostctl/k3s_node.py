"""A machine's own k3s: what it is told, where it keeps what, and what is there."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hostctl.cluster import parse_json
from hostctl.machine import Machine, Ran, TookTooLong, ToolMissing
from hostctl.protocol import Failure
from hostctl.spec import (
    CLUSTER_NAME,
    OBJECT_NAME,
    SECRET_ARGUMENT,
    Items,
    Value,
    absolute_path,
    boolean,
    checked,
    number_between,
    one_of,
    or_null,
    server_url,
    text_map,
    text_matching,
)
from hostctl.tools import attempt, for_system
from hostctl.workloads import UNREACHABLE

# Where get.k3s.io puts it, so that what it installed is found and can be taken over.
K3S_BINARY = "/usr/local/bin/k3s"
K3S_CONFIG = "/etc/rancher/k3s/config.yaml"
K3S_TOKEN = "/etc/rancher/k3s/homelab.token"
K3S_KUBECONFIG = "/etc/rancher/k3s/k3s.yaml"
K3S_DATA = "/var/lib/rancher/k3s"
K3S_API_PORT = 6443
K3S_DATABASE = f"{K3S_DATA}/server/db"
# k3s applies what lies there.
K3S_MANIFESTS = f"{K3S_DATA}/server/manifests"
K3S_SERVER_TOKEN = f"{K3S_DATA}/server/token"
K3S_UNITS = {"server": "k3s.service", "agent": "k3s-agent.service"}
K3S_UNIT_DIRECTORY = "/etc/systemd/system"
_AGENT_KUBECONFIG = f"{K3S_DATA}/agent/kubelet.kubeconfig"
_K3S_RUNS_SYSTEMD = "/run/systemd/system"
# Fixed when the cluster is made (docs.k3s.io/cli/server: critical configuration values).
K3S_FIXED = ("cluster-cidr", "service-cidr", "cluster-domain", "cluster-dns")
_OWN_KEYS = (
    "agent-token", "cluster-init", "cluster-reset", "cluster-reset-restore-path", "data-dir",
    "datastore-endpoint", "node-name", "server", "token", "token-file",
)  # fmt: skip


class K3sVersion(NamedTuple):
    """A release of k3s, ordered as releases are."""

    major: int
    minor: int
    patch: int
    build: int

    def __str__(self) -> str:
        return f"v{self.major}.{self.minor}.{self.patch}+k3s{self.build}"


def k3s_release(text: str) -> K3sVersion:
    """Raises ValueError for what is no release of k3s."""
    found = re.fullmatch(r"v(\d+)\.(\d+)\.(\d+)\+k3s(\d+)", text)
    if not found:
        raise ValueError("a release of k3s such as v1.33.5+k3s1")
    return K3sVersion(*map(int, found.groups()))


def _release_text(value: Any) -> str:
    k3s_release(value if isinstance(value, str) else "")
    return value


def _config(value: Any) -> dict[str, Any]:
    allowed = "an object of k3s' config keys to text, number, true, false or a list of texts"
    if not isinstance(value, dict):
        raise ValueError(allowed)
    for key, one in value.items():
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise ValueError(allowed)
        if key in _OWN_KEYS:
            raise ValueError(f"none of {', '.join(_OWN_KEYS)}, which have a key of their own")
        if SECRET_ARGUMENT.match(f"--{key}"):
            raise ValueError(f"one without {key}, which holds a secret: secretConfig takes it")
        texts = isinstance(one, list) and all(isinstance(item, str) for item in one)
        if not texts and not isinstance(one, (str, bool, int)):
            raise ValueError(allowed)
    return value


def _files(value: Any) -> dict[str, str]:
    for path in text_map(value):
        if not absolute_path(path).startswith(("/etc/rancher/k3s/", f"{K3S_MANIFESTS}/")):
            raise ValueError(f"files below /etc/rancher/k3s/ or {K3S_MANIFESTS}/")
        if path in (K3S_CONFIG, K3S_TOKEN, K3S_KUBECONFIG):
            raise ValueError(f"files other than {path}, which k3s and hostctl write")
    return value


K3S_DIGEST = text_matching(r"[0-9a-f]{16}", "16 hex digits")
K3S_SECRET = text_matching(
    r"(K10[0-9a-f]{64}::(server|node):)?[!-9;-~]{16,512}",
    "a token: 16 or more printable characters without ':', or K10<CA's sha256>::server:<password>",
)
_MODULE = text_matching(r"[a-z0-9_]{1,64}", "a module of the kernel")
_PROGRAM = text_matching(r"[A-Za-z0-9._+-]{1,64}", "the name of a program")
K3S_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "node": Value(OBJECT_NAME),
    "role": Value(one_of("server", "agent")),
    "version": Value(_release_text),
    "datastore": Value(or_null(one_of("sqlite", "etcd")), None),
    "init": Value(boolean, False),
    "server": Value(or_null(server_url), None),
    "rejoin": Items(Value(server_url), []),
    "token": Value(or_null(K3S_SECRET), None, secret=True),
    "tokenDigest": Value(or_null(K3S_DIGEST), None),
    "config": Value(_config, {}),
    "secretConfig": Value(text_map, {}, secret=True),
    "secretConfigDigest": Value(text_map, {}),
    "files": Value(_files, {}),
    "install": {
        "url": Value(text_matching(r"https?://[!-~]+", "https://HOST/PATH of the k3s binary")),
        "sha256": Value(or_null(text_matching(r"[0-9a-f]{64}", "64 hex digits")), None),
    },
    "peers": Items(Value(OBJECT_NAME)),
    "requires": Value(lambda value: _requires(value), {"modules": [], "programs": []}),
    "confirm": Value(or_null(CLUSTER_NAME), None),
    "timeouts": Value(lambda value: _timeouts(value), {"readySeconds": 600, "drainSeconds": 300}),
    "generation": Value(or_null(number_between(0, 2**31)), None),
}


def _requires(value: Any) -> dict[str, list[str]]:
    shape = {"modules": Items(Value(_MODULE), []), "programs": Items(Value(_PROGRAM), [])}
    return _inner(value, shape)


def _timeouts(value: Any) -> dict[str, int]:
    seconds = number_between(1, 86400)
    shape = {"readySeconds": Value(seconds, 600), "drainSeconds": Value(seconds, 300)}
    return _inner(value, shape)


def _inner(value: Any, shape: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return checked(value, shape, "k3s")
    except Failure as failure:
        raise ValueError(f"an object without this: {failure.cause}") from None


def k3s_spec(spec: Any, verb: str) -> dict[str, Any]:
    """The spec of a node, checked together with what its values must not be to each other."""
    wanted = checked(spec, K3S_SPEC, verb)
    wrong = []
    server = wanted["role"] == "server"
    if server and wanted["datastore"] is None:
        wrong.append("datastore: missing; allowed is sqlite or etcd")
    if not server and (wanted["datastore"] or wanted["init"]):
        wrong.append("datastore, init: an agent has neither; allowed is null and false")
    if wanted["init"] == bool(wanted["server"]):
        wrong.append("server: the first server (init) joins none, each other node joins one")
    if wanted["datastore"] == "sqlite":
        if server and not wanted["init"]:
            wrong.append("datastore: sqlite has exactly one server; allowed is etcd")
        keys = [*wanted["config"], *wanted["secretConfig"], *wanted["secretConfigDigest"]]
        etcd = sorted(key for key in keys if key.startswith("etcd-"))
        if etcd:
            wrong.append(f"config: {', '.join(etcd)} with SQLite, which has no etcd snapshots")
    if wanted["node"] not in wanted["peers"] or len(set(wanted["peers"])) < len(wanted["peers"]):
        wrong.append(f"peers: each node once, {wanted['node']} among them")
    if wanted["token"]:
        wanted["tokenDigest"] = k3s_token_digest(wanted["token"])
    if not wanted["tokenDigest"]:
        wrong.append("token: missing")
    if wrong:
        raise Failure("bad-spec", f"spec of {verb}", "; ".join(wrong), "correct the settings")
    return wanted


def k3s_password(token: str) -> str:
    """What of a token is secret: a short one whole, the end of a full one (k3s cli/token)."""
    return token.rpartition(":")[2] if token.startswith("K10") else token


def k3s_token_digest(token: str) -> str:
    return k3s_digest(k3s_password(token))


def k3s_digest(text: str) -> str:
    """16 hex digits that tell a secret from another, and nothing of it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# What is there


class K3sNode(NamedTuple):
    """The k3s of this machine. ``installed`` is hostctl, get.k3s.io or unknown; ``cluster`` and
    ``node`` are those that hostctl installed it for."""

    state: str
    role: str
    installed: str
    cluster: str | None
    node: str | None
    version: str | None
    datastore: str | None
    config: dict[str, Any]
    token_digest: str | None
    unit: str
    detail: str


_MARK = re.compile(r"^# homelab: cluster=(\S+) node=(\S+)$", re.MULTILINE)


def k3s_unit(wanted: Mapping[str, Any]) -> str:
    """The unit as get.k3s.io writes it; what k3s is told is in its config file."""
    kind = "notify" if wanted["role"] == "server" else "exec"
    return f"""# homelab: cluster={wanted["cluster"]} node={wanted["node"]}
[Unit]
Description=Lightweight Kubernetes
Documentation=https://k3s.io
Wants=network-online.target
After=network-online.target

[Install]
WantedBy=multi-user.target

[Service]
Type={kind}
EnvironmentFile=-/etc/default/%N
EnvironmentFile=-/etc/sysconfig/%N
KillMode=process
Delegate=yes
User=root
LimitNOFILE=1048576
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
TimeoutStartSec=0
Restart=always
RestartSec=5s
ExecStartPre=-/sbin/modprobe br_netfilter
ExecStartPre=-/sbin/modprobe overlay
ExecStart={K3S_BINARY} {wanted["role"]}
"""


def k3s_look(machine: Machine, cluster: str, pending: bool = False) -> K3sNode | None:
    """What k3s this machine has; None when it has none. Raises Failure when that cannot be told.

    ``pending``: hostctl has begun on it and did not get to the end.
    """
    step = f"looking for the k3s of {cluster}"
    units = [
        name
        for name in machine.names(K3S_UNIT_DIRECTORY)
        if re.fullmatch(r"k3s(-[\w.-]+)?\.service", name)
    ]
    if len(units) > 1:
        raise Failure(
            "cannot-tell",
            step,
            f"there are several: {', '.join(units)} in {K3S_UNIT_DIRECTORY}",
            "a machine is one node: remove the one that is not in use by its uninstall script",
        )
    if not units:
        return _half(machine, cluster) if pending else None
    (unit,) = units
    text = machine.read(f"{K3S_UNIT_DIRECTORY}/{unit}").decode("utf-8", "replace")
    mark = _MARK.search(text)
    theirs = f"EnvironmentFile=-{K3S_UNIT_DIRECTORY}/{unit}.env" in text
    role = "agent" if re.search(r"k3s\s+(\\\s*)?agent", text) else "server"
    shown = k3s_properties(machine, unit)
    running = shown.get("ActiveState") in ("active", "activating", "reloading")
    version = k3s_installed_version(machine, K3S_BINARY)
    config, missing = {}, []
    try:
        config = parse_k3s_config(machine.read(K3S_CONFIG).decode("utf-8", "replace"))
    except FileNotFoundError:
        missing = [K3S_CONFIG] if mark else []
    missing += [] if version else [K3S_BINARY]
    detail = f"{' and '.join(missing)} is missing" if missing else ""
    return K3sNode(
        "half" if missing or (mark and pending) else "running" if running else "stopped",
        role,
        "hostctl" if mark else "get.k3s.io" if theirs else "unknown",
        mark.group(1) if mark else None,
        mark.group(2) if mark else None,
        version,
        k3s_datastore(machine) if role == "server" else None,
        config,
        _live_token(machine, role, unit, bool(mark)),
        unit,
        detail or ("hostctl did not get to the end" if pending else ""),
    )


def _half(machine: Machine, cluster: str) -> K3sNode:
    """What hostctl had begun before it wrote the unit."""
    version = k3s_installed_version(machine, K3S_BINARY)
    detail = "hostctl did not get to the end"
    return K3sNode("half", "", "hostctl", cluster, None, version, None, {}, None, "", detail)


def _live_token(machine: Machine, role: str, unit: str, ours: bool) -> str | None:
    """The digest of the token in use; None when that cannot be seen."""
    paths = [K3S_TOKEN] if ours else []
    paths += [K3S_SERVER_TOKEN] if role == "server" else [f"{K3S_UNIT_DIRECTORY}/{unit}.env"]
    for path in paths:
        try:
            text = machine.read(path).decode("utf-8", "replace").strip()
        except OSError:
            continue
        if path.endswith(".env"):
            found = re.search(r"""^K3S_TOKEN=['"]?(\S+?)['"]?$""", text, re.MULTILINE)
            text = found.group(1) if found else ""
        if text:
            return k3s_token_digest(text)
    return None


def k3s_datastore(machine: Machine) -> str | None:
    """What a server keeps its cluster in; None before its first start."""
    if machine.exists(f"{K3S_DATABASE}/etcd/member"):
        return "etcd"
    return "sqlite" if machine.exists(f"{K3S_DATABASE}/state.db") else None


def k3s_installed_version(machine: Machine, binary: str) -> str | None:
    """What a k3s binary says of itself; None when it is not there or does not run."""
    try:
        ran = machine.run([binary, "--version"])
    except (ToolMissing, TookTooLong, PermissionError, OSError):
        return None
    found = re.search(r"k3s version (\S+)", ran.text)
    return found.group(1) if found else None


def k3s_properties(machine: Machine, unit: str) -> dict[str, str]:
    """What systemd says of a unit. Raises Failure when it does not answer."""
    asked = "Id,LoadState,ActiveState,SubState,Result,NRestarts"
    step = f"asking systemd about {unit}"
    ran = attempt(machine, ["systemctl", "show", f"--property={asked}", unit], step)
    if ran.code:
        raise Failure("cannot-tell", step, ran.complaint, f"systemctl status {unit}")
    pairs = (line.partition("=") for line in ran.text.splitlines())
    return {key: value for key, _, value in pairs if key}


def refuse_without_systemd(machine: Machine, step: str) -> None:
    """Only systemd starts k3s at boot here; NixOS' units are of its configuration alone."""
    if machine.exists("/etc/NIXOS"):
        raise Failure(
            "refused",
            step,
            "units and programs of NixOS come from its configuration",
            "declare it there: services.k3s = { enable = true; role = ...; tokenFile = ...; "
            "serverAddr = ...; }; and leave the node out of this stack, or use Debian/Ubuntu",
        )
    if not machine.exists(_K3S_RUNS_SYSTEMD):
        raise Failure(
            "refused",
            step,
            "this machine has no systemd, by which k3s is started at boot and kept running",
            for_system(
                machine,
                "services.k3s of its configuration.",
                "use k3d (cluster.kind: k3d).",
                "boot with systemd; on OpenRC install by https://get.k3s.io, and declare the "
                "cluster as cluster.kind: existing.",
            ),
        )


# Config file


def k3s_config_text(values: Mapping[str, Any]) -> str:
    """config.yaml: a line for each key, the value as JSON, which is YAML."""
    lines = "".join(f"{key}: {json.dumps(values[key])}\n" for key in sorted(values))
    return f"# Written by hostctl; what is changed here is changed back by the next up.\n{lines}"


def parse_k3s_config(text: str) -> dict[str, Any]:
    """The keys of a config.yaml: those that hostctl wrote, and of another one what is a value or a
    list of values, as docs.k3s.io/installation/configuration shows them."""
    found: dict[str, Any] = {}
    key = None
    for line in text.splitlines():
        item = re.match(r"\s*- +(.*?)\s*$", line)
        pair = re.match(r"([a-z][a-z0-9-]*)\+?:\s*(.*?)\s*$", line)
        if item and key is not None:
            before = found[key] if isinstance(found.get(key), list) else []
            found[key] = [*before, _scalar(item.group(1))]
        elif pair:
            key, value = pair.groups()
            found[key] = _scalar(value) if value else None
    return found


def _scalar(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.partition(" #")[0].strip().strip("'\"")


def k3s_config(wanted: Mapping[str, Any], joins: str | None) -> dict[str, Any]:
    """What k3s is told on this node, but for the secrets."""
    own: dict[str, Any] = {"node-name": wanted["node"], "token-file": K3S_TOKEN}
    if joins:
        own["server"] = joins
    elif wanted["datastore"] == "etcd":
        # It changes nothing once there is an etcd; with SQLite it would make one of it.
        own["cluster-init"] = True
    return {**wanted["config"], **own}


# Asking the cluster


def k3s_kubectl(
    machine: Machine, arguments: Sequence[str], step: str, *, raw: bool = False, **options: Any
) -> Ran:
    """Runs the kubectl in k3s as administrator on a server, as the node itself on an agent. ``raw``
    leaves a failure to the caller."""
    path = K3S_KUBECONFIG if machine.exists(K3S_KUBECONFIG) else _AGENT_KUBECONFIG
    argv = [K3S_BINARY, "kubectl", f"--kubeconfig={path}", "--request-timeout=30s", *arguments]
    ran = attempt(machine, argv, step, **{"timeout": 60.0, **options})
    if ran.code and not raw:
        said = ran.err.decode("utf-8", "replace")
        silent = UNREACHABLE.search(said) or "no such file" in said
        raise Failure(
            "cannot-tell" if silent else "failed",
            step,
            f"the API server does not answer: {ran.complaint}" if silent else ran.complaint,
            "systemctl status k3s; journalctl --unit k3s; systemctl start k3s",
        )
    return ran


def k3s_identity(machine: Machine) -> str | None:
    """What tells this cluster from every other: the uid of kube-system. None when the API does not
    answer."""
    arguments = ["get", "namespaces/kube-system", "--output=json"]
    try:
        ran = k3s_kubectl(machine, arguments, "identifying the cluster", raw=True)
        return json.loads(ran.out)["metadata"]["uid"] if ran.code == 0 else None
    except (Failure, ValueError, LookupError, TypeError):
        return None


def k3s_member(machine: Machine, node: str, step: str) -> dict[str, Any] | None:
    """The Node object, or None when the cluster has none of this name. Raises Failure when the API
    does not answer."""
    arguments = ["get", f"nodes/{node}", "--ignore-not-found", "--output=json"]
    out = k3s_kubectl(machine, arguments, step).out
    return parse_json(out, step) if out.strip() else None


def k3s_ready(member: Mapping[str, Any]) -> bool:
    conditions = (member.get("status") or {}).get("conditions") or []
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def k3s_runs(member: Mapping[str, Any]) -> str:
    """The version that a node's kubelet says."""
    return ((member.get("status") or {}).get("nodeInfo") or {}).get("kubeletVersion", "")
