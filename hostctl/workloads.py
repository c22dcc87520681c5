"""Verbs: Secrets, rollouts and connectors in the cluster."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hostctl.cluster import parse_json
from hostctl.machine import STATE_DIRECTORY, Machine, Ran
from hostctl.protocol import Failure, Result, say
from hostctl.spec import (
    CLUSTER_NAME,
    DNS_LABEL,
    OBJECT_NAME,
    SECRET_TYPES,
    Value,
    absolute_path,
    base64_map,
    checked,
    one_of,
    or_null,
    text_map,
    text_matching,
)
from hostctl.tools import attempt

FIELD_MANAGER = "homelab"


def run_kubectl(
    machine: Machine,
    kubeconfig_path: str,
    arguments: Sequence[str],
    step: str,
    *,
    input: bytes = b"",
    timeout: float = 60.0,
    raw: bool = False,
) -> Ran:
    """Runs kubectl against the cluster of a kubeconfig, which must exist: kubectl would take
    another one without a word. ``raw`` leaves an API that does not answer to the caller."""
    if not machine.exists(kubeconfig_path):
        raise Failure(
            "cannot-tell",
            step,
            f"kubeconfig {kubeconfig_path} is not there",
            "`hostctl kubeconfig NAME`, or pulumi up, writes it",
        )
    argv = ["kubectl", f"--kubeconfig={kubeconfig_path}", "--request-timeout=30s", *arguments]
    ran = attempt(machine, argv, step, input=input, timeout=timeout)
    if ran.code and not raw and UNREACHABLE.search(ran.err.decode("utf-8", "replace")):
        raise Failure(
            "cannot-tell",
            step,
            f"the API server does not answer: {ran.complaint[:300]}",
            "hostctl k3d start NAME; hostctl k3d doctor NAME",
        )
    return ran


# A datastore of 11 GB (incident 4) lists slowly.
LIST_SECONDS = 120.0
UNREACHABLE = re.compile(
    r"Unable to connect to the server|connection refused|was refused - did you specify|i/o timeout"
    r"|context deadline exceeded|no route to host|TLS handshake timeout|ServiceUnavailable"
    r"|certificate signed by unknown authority|net/http: request canceled"
)
NO_NODE = re.compile(r"No such container|is not running")
SEED_SPEC: dict[str, Any] = {
    "kubeconfig": Value(absolute_path),
    "namespace": Value(DNS_LABEL),
    "name": Value(OBJECT_NAME),
    "type": Value(one_of(*SECRET_TYPES), "Opaque"),
    "data": Value(base64_map, secret=True),
    "labels": Value(text_map, {}),
}


def secret_seed(machine: Machine, spec: dict[str, Any]) -> Result:
    """Creates a Secret that is absent and never writes to one that exists (incident 8)."""
    wanted = checked(spec, SEED_SPEC, "secret seed")
    name, namespace = wanted["name"], wanted["namespace"]
    step = f"seeding Secret {namespace}/{name}"
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": wanted["labels"]},
        "type": wanted["type"],
        "data": wanted["data"],
    }
    # `create` and not `apply`: the API server itself refuses to write to one that exists.
    arguments = ["create", f"--field-manager={FIELD_MANAGER}", "--filename=-", "--output=name"]
    ran = run_kubectl(
        machine, wanted["kubeconfig"], arguments, step, input=json.dumps(manifest).encode()
    )
    if ran.code == 0:
        return {"created": True}
    said = ran.err.decode("utf-8", "replace")
    if "(AlreadyExists)" in said:
        return {"created": False}
    # Only the server's status: kubectl's other messages may quote what it was given.
    reason = re.search(r"Error from server \((\w+)\)", said)
    remedies = {"NotFound": f"declare namespace {namespace} under homelab:namespaces"}
    raise Failure(
        "failed",
        step,
        f"the API server answered {reason.group(1)}" if reason else "kubectl refused it",
        remedies.get(reason.group(1) if reason else "", "check the Secret's type and keys"),
    )


ROLLOUT_SPEC: dict[str, Any] = {
    "kubeconfig": Value(absolute_path),
    "namespace": Value(DNS_LABEL),
    "secrets": Value(text_map, secret=True),
}
_WORKLOADS = "deployments.apps,statefulsets.apps,daemonsets.apps,pods"


def rollout(machine: Machine, spec: dict[str, Any]) -> Result:
    """Restarts the workloads of a namespace that use a Secret whose digest is another than when
    they were last seen. One never seen has started with what the last run saw; the first run of
    all restarts nothing. A pod that nothing controls would not come back: it is only named.

    What was seen is kept on the host and not in annotations: whoever may read a workload could
    guess a short value from its digest.
    """
    wanted = checked(spec, ROLLOUT_SPEC, "rollout")
    namespace, path = wanted["namespace"], wanted["kubeconfig"]
    step = f"rolling out changed Secrets in namespace {namespace}"
    rolled, left = [], []
    arguments = ["get", _WORKLOADS, f"--namespace={namespace}", "--output=json"]
    listed = run_kubectl(machine, path, arguments, step)
    if listed.code:
        raise Failure("failed", step, listed.complaint, doctor_remedy())
    with machine.lock(f"rollout-{namespace}"):
        ledger = f"{STATE_DIRECTORY}/rollouts/{cluster_of(machine, path)}/{namespace}.json"
        key, last, seen = _read_ledger(machine, ledger)
        keyed = {
            name: hmac.new(key.encode(), digest.encode(), "sha256").hexdigest()
            for name, digest in wanted["secrets"].items()
        }
        for workload in parse_json(listed.out, step)["items"]:
            is_pod = workload["kind"] == "Pod"
            if is_pod and not _is_bare(workload):
                continue
            spec = workload["spec"]
            used = secrets_of(spec if is_pod else spec["template"]["spec"])
            digests = {name: digest for name, digest in keyed.items() if name in used}
            # The uid, since a workload made anew has read the new value.
            identity = workload["metadata"]["uid"]
            before = {**last, **seen.get(identity, {})}
            title = f"{workload['kind'].lower()}/{workload['metadata']['name']}"
            if any(before.get(name, digest) != digest for name, digest in digests.items()):
                if is_pod:
                    say(
                        f"WARNING: {title} in {namespace} keeps the old value of a changed Secret "
                        "and nothing would make it again: delete it and apply it again"
                    )
                    left.append(title)
                    digests = {name: before.get(name, digest) for name, digest in digests.items()}
                else:
                    say(f"{title} in {namespace} uses a changed Secret: restarting it")
                    restart = ["rollout", "restart", title, f"--namespace={namespace}"]
                    ran = run_kubectl(machine, path, restart, step)
                    if ran.code:
                        raise Failure("failed", step, ran.complaint, doctor_remedy())
                    rolled.append(title)
            if seen.get(identity, {}) != digests:
                seen[identity] = digests
                _write_ledger(machine, ledger, key, last, seen)
        if last != keyed:
            _write_ledger(machine, ledger, key, keyed, seen)
    return {"rolled": rolled, "left": left}


def _is_bare(pod: Mapping[str, Any]) -> bool:
    """Whether no controller would make the pod again, and it still runs."""
    owners = pod["metadata"].get("ownerReferences") or []
    ended = (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")
    return not ended and not any(owner.get("controller") for owner in owners)


def doctor_remedy() -> str:
    return "see the cause; hostctl k3d doctor NAME shows whether the cluster is well"


def secrets_of(pod: Mapping[str, Any]) -> set[str]:
    """The names of the Secrets whose values a pod reads: volumes and environment. Not those for
    pulling images, which a running pod has no more use for."""
    names = set()
    for volume in pod.get("volumes") or []:
        names.add((volume.get("secret") or {}).get("secretName"))
        for source in (volume.get("projected") or {}).get("sources") or []:
            names.add((source.get("secret") or {}).get("name"))
    for container in (pod.get("containers") or []) + (pod.get("initContainers") or []):
        for source in container.get("envFrom") or []:
            names.add((source.get("secretRef") or {}).get("name"))
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            names.add((source.get("secretKeyRef") or {}).get("name"))
    return {name for name in names if name}


def cluster_of(machine: Machine, kubeconfig_path: str) -> str:
    """16 hex digits that tell the kubeconfig's cluster from others."""
    text = machine.read(kubeconfig_path).decode("utf-8", "replace")
    found = re.search(r"certificate-authority-data:\s*(\S+)", text)
    return hashlib.sha256((found.group(1) if found else text).encode()).hexdigest()[:16]


def _read_ledger(
    machine: Machine, path: str
) -> tuple[str, dict[str, str], dict[str, dict[str, str]]]:
    """The key of the digests, those of the last whole run, and those that each workload has."""
    try:
        ledger = json.loads(machine.read(path))
        return ledger["key"], ledger["last"], ledger["seen"]
    except (FileNotFoundError, ValueError, KeyError):
        # Without what was seen, everything is seen for the first time.
        return machine.nonce() + machine.nonce(), {}, {}


def _write_ledger(
    machine: Machine, path: str, key: str, last: Mapping[str, str], seen: Mapping[str, Any]
) -> None:
    machine.make_directory(os.path.dirname(path), 0o700)
    content = json.dumps({"key": key, "last": last, "seen": seen}, sort_keys=True).encode()
    machine.write_atomic(path, content, 0o600)


KUBECONFIG = text_matching(
    r"(?s)/[^\n]+|.*\bserver:.{1,1000000}", "the text of a kubeconfig, or the path of one"
)
ASKED_KUBECONFIG = Value(or_null(KUBECONFIG), None, secret=True)


@contextlib.contextmanager
def kubeconfig_file(machine: Machine, given: str) -> Iterator[str]:
    """Where a kubeconfig is that was given as text or by its path."""
    if given.startswith("/"):
        yield given
    else:
        with machine.private_file(given.encode()) as path:
            yield path


def ask_cluster(
    machine: Machine, wanted: Mapping[str, Any], arguments: Sequence[str], step: str
) -> Ran:
    """Runs kubectl where it needs no kubeconfig on the host: in the node of a k3d cluster, or with
    one that is given, as text or by its path."""
    if wanted["kubeconfig"]:
        with kubeconfig_file(machine, wanted["kubeconfig"]) as path:
            return run_kubectl(machine, path, arguments, step, timeout=LIST_SECONDS, raw=True)
    server = f"k3d-{wanted['cluster']}-server-0"
    argv = ["docker", "exec", server, "kubectl", *arguments]
    return attempt(machine, argv, step, timeout=LIST_SECONDS)


def is_silent(ran: Ran) -> bool:
    """Whether the API did not answer, or its node was not there to be asked."""
    return bool(UNREACHABLE.search(ran.complaint) or NO_NODE.search(ran.complaint))


# What the cluster, or a tool in it, makes by itself.
_MADE_TYPES = (
    "kubernetes.io/service-account-token",
    "bootstrap.kubernetes.io/token",
    "helm.sh/release.v1",
)


def secret_list(machine: Machine, spec: dict[str, Any]) -> Result:
    """Names all Secrets. ``kept`` are those that nobody makes again: not the cluster itself, a
    controller, or an ArgoCD Application. Asked as `cluster owners` asks."""
    shape = {"cluster": Value(CLUSTER_NAME), "kubeconfig": ASKED_KUBECONFIG}
    wanted = checked(spec, shape, "secret list")
    step = f"listing the Secrets of cluster {wanted['cluster']}"
    arguments = ["get", "secrets", "--all-namespaces", "--output=json"]
    seen = ask_cluster(machine, wanted, arguments, step)
    if seen.code:
        raise Failure("cannot-tell", step, seen.complaint, doctor_remedy())
    return {
        "secrets": [
            {
                "namespace": one["metadata"]["namespace"],
                "name": one["metadata"]["name"],
                "kept": one.get("type") not in _MADE_TYPES
                and not one["metadata"]["namespace"].startswith("kube-")
                and not one["metadata"].get("ownerReferences")
                and "argocd.argoproj.io/tracking-id"
                not in (one["metadata"].get("annotations") or {}),
            }
            for one in parse_json(seen.out, step)["items"]
        ]
    }
