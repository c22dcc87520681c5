"""Acceptance: whether the pods of a cluster that was changed can work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from hostctl.cluster import Cluster, look, parse_json
from hostctl.cluster_backup import utc
from hostctl.machine import PROGRESS_SECONDS, Machine, Ran, TookTooLong, ToolMissing
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, write_record
from hostctl.running import kubectl_line
from hostctl.spec import CLUSTER_NAME, EXTERNAL_NAME, IMAGE, Value, boolean, checked, number_between
from hostctl.waiting import present_cluster, ready

ACCEPT_SECONDS = 300.0
"""How long all of it may take: pulling the image into a new cluster, CoreDNS coming up."""
SETTLE_SECONDS = 90.0
"""For how long a name must not resolve before that is the answer: CoreDNS starts after the API."""
LOOK_SECONDS = 2.0
ACCEPT_SPEC: dict[str, Any] = {
    "name": Value(CLUSTER_NAME),
    "acceptance": {
        "name": Value(EXTERNAL_NAME, "registry-1.docker.io"),
        # k3s' own for the volumes of local-path, so that it is often there already.
        "image": Value(IMAGE, "rancher/mirrored-library-busybox:1.36.1"),
        "required": Value(boolean, False),
    },
    "generation": Value(number_between(0, 2**31), 0),
    # What is accepted, as `k3d ensure` was given it. It is not looked at: a change of it is what
    # makes the stack accept the cluster again.
    "of": Value(lambda value: value, None),
}
RESOLVED, UNRESOLVED = 0, 1
# nslookup of busybox ends with 0 for some answers that are none. "Name:" is before an address only.
_LOOKUP = (
    'said=$(nslookup -type=a "$0" 2>&1); code=$?; echo "$said"; '
    "[ $code = 127 ] && exit 127; case $said in *Name:*) exit 0;; esac; exit 1"
)
_LABELS = {"app.kubernetes.io/name": "acceptance", "app.kubernetes.io/managed-by": "homelab"}


class Answer(NamedTuple):
    """``state`` is passed, failed or cannot-tell."""

    state: str
    detail: str
    remedy: str


def k3d_accept(machine: Machine, spec: dict[str, Any]) -> Result:
    """Whether the cluster works for its pods: the API answers through its published port, and an
    external name is resolved from a pod (incident 5). Passed, failed or cannot-tell; the last two
    are errors when acceptance is required."""
    spec = checked(spec, ACCEPT_SPEC, "k3d accept")
    name, wanted = spec["name"], spec["acceptance"]
    cluster = present_cluster(machine, name, "accepting")
    # Not the cluster's own lock: a person may have to stop it meanwhile.
    with machine.lock(f"acceptance-{name}"):
        answer = _accepted(machine, cluster, wanted["name"], wanted["image"])
    say(f"acceptance of {name}: {answer.state}: {answer.detail}")
    with cluster_lock(machine, name):
        done = {"generation": spec["generation"], "asked": wanted, "at": utc(machine.now())}
        write_record(machine, name, acceptance={**answer._asdict(), **done})
    if wanted["required"] and answer.state != "passed":
        code = "failed" if answer.state == "failed" else "cannot-tell"
        raise Failure(code, f"accepting cluster {name}", answer.detail, answer.remedy)
    return {"acceptance": answer._asdict()}


def _accepted(machine: Machine, cluster: Cluster, host: str, image: str) -> Answer:
    started = machine.now()
    while True:
        credentials, why = ready(machine, cluster)
        if credentials:
            break
        waited = machine.now() - started
        if waited >= ACCEPT_SECONDS:
            return Answer("failed", why, f"hostctl k3d doctor {cluster.name}")
        say(f"waiting for the API of {cluster.name}: {waited:.0f} s; {why}")
        machine.sleep(LOOK_SECONDS)
        cluster = look(machine, cluster.name)
        if cluster.state == "absent":
            remedy = f"hostctl k3d doctor {cluster.name}"
            return Answer("cannot-tell", "the cluster was deleted meanwhile", remedy)
    return resolves(machine, cluster, host, image)


def resolves(machine: Machine, cluster: Cluster, host: str, image: str) -> Answer:
    """Whether a pod of a cluster that answers resolves a name (incident 5). Leaves no pod."""
    try:
        return _resolved(machine, cluster, host, image)
    finally:
        _remove_pods(machine, cluster)


def _resolved(machine: Machine, cluster: Cluster, host: str, image: str) -> Answer:
    """Lets one pod after another ask, until one resolves the name or the time is over."""
    until = machine.now() + ACCEPT_SECONDS
    failing, said = 0.0, ""
    kubectl = " ".join([*kubectl_line(cluster), "--namespace=kube-system"])
    resolvers = (
        "/etc/resolv.conf of the nodes"
        if cluster.on_machine
        else "homelab:cluster.resolvers, and is none in a Docker network (incident 5)"
    )
    while True:
        code, why = _ask(machine, cluster, _pod(host, image, machine.nonce()), until)
        now = machine.now()
        if code == RESOLVED:
            return Answer("passed", f"a pod resolves {host}", "")
        if code == UNRESOLVED:
            failing, said = failing or now, why
        if said and (now >= until or now - failing >= SETTLE_SECONDS):
            return Answer(
                "failed",
                f"a pod does not resolve {host}: {said}",
                f"can the host reach the DNS servers in {resolvers}? Then: {kubectl} logs "
                "deployment/coredns",
            )
        if now >= until:
            return Answer(
                "cannot-tell",
                f"no pod could ask for {host} in {ACCEPT_SECONDS:.0f} s: {why}",
                f"{kubectl} get events; where no registry is reached, name an image of the nodes "
                "in homelab:cluster.acceptance.image",
            )
        say(f"acceptance of {cluster.name}: {why}; asking again")
        machine.sleep(LOOK_SECONDS)


def _ask(
    machine: Machine, cluster: Cluster, pod: dict[str, Any], until: float
) -> tuple[int | None, str]:
    """Runs the pod to its end. Returns the exit status of its container, None where it has none,
    and what is said of it."""
    # What a killed run left goes first.
    _remove_pods(machine, cluster)
    argv = ["create", "--filename=-", "--field-manager=homelab", "--output=name"]
    made = _kubectl(machine, cluster, argv, json.dumps(pod).encode())
    if made.code:
        # In a cluster that was just made the namespace has no service account yet.
        return None, made.complaint
    told = started = machine.now()
    while True:
        gone, code, why = _end_of(machine, cluster, pod["metadata"]["name"])
        now = machine.now()
        if gone or now >= until:
            return code, why
        if now - told >= PROGRESS_SECONDS:
            told = now
            say(f"acceptance of {cluster.name}: its pod waits for {now - started:.0f} s: {why}")
        machine.sleep(LOOK_SECONDS)


def _pod(host: str, image: str, nonce: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"homelab-acceptance-{nonce}",
            "namespace": "kube-system",
            "labels": _LABELS,
        },
        "spec": {
            "restartPolicy": "Never",
            "activeDeadlineSeconds": int(ACCEPT_SECONDS),
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65534,
                "runAsGroup": 65534,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            # Where CoreDNS may run, this may.
            "tolerations": [
                {"key": "CriticalAddonsOnly", "operator": "Exists"},
                {
                    "key": "node-role.kubernetes.io/control-plane",
                    "operator": "Exists",
                    "effect": "NoSchedule",
                },
            ],
            "containers": [
                {
                    "name": "nslookup",
                    "image": image,
                    # The dot at the end: no search domain is tried.
                    "command": ["sh", "-c", _LOOKUP, f"{host}."],
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "resources": {
                        "requests": {"cpu": "10m", "memory": "16Mi"},
                        "limits": {"memory": "64Mi"},
                    },
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                }
            ],
        },
    }


def _end_of(machine: Machine, cluster: Cluster, pod: str) -> tuple[bool, int | None, str]:
    """Whether the pod is at its end, its container's exit status, and what is said of it."""
    argv = ["get", f"pod/{pod}", "--namespace=kube-system", "--output=json"]
    ran = _kubectl(machine, cluster, argv)
    if ran.code:
        return "NotFound" in ran.complaint, None, ran.complaint
    status = parse_json(ran.out, "looking at the pod").get("status") or {}
    for container in status.get("containerStatuses") or []:
        state = container.get("state") or {}
        ended, waiting = state.get("terminated"), state.get("waiting")
        if ended:
            why = " ".join((ended.get("message") or ended.get("reason") or "").split())
            return True, ended["exitCode"], why[-400:]
        if waiting and waiting.get("reason") != "ContainerCreating":
            return False, None, f"{waiting.get('reason')}: {waiting.get('message', '')}"[:400]
    if status.get("phase") == "Failed":
        # Evicted, or past its deadline, before its container began.
        return True, None, f"{status.get('reason')}: {status.get('message', '')}"[:400]
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") != "True":
            return False, None, f"not scheduled: {condition.get('message', '')}"[:400]
    return False, None, f"it is {status.get('phase', 'Pending')}"


def _remove_pods(machine: Machine, cluster: Cluster) -> None:
    """Removes every acceptance pod. One that cannot be removed ends by its own deadline, and goes
    with the next acceptance."""
    selector = ",".join(f"{key}={value}" for key, value in _LABELS.items())
    _kubectl(
        machine,
        cluster,
        ["delete", "pods", "--namespace=kube-system", f"--selector={selector}", "--wait=false"],
    )


def _kubectl(machine: Machine, cluster: Cluster, words: Sequence[str], input: bytes = b"") -> Ran:
    """kubectl of the first server; an answer that does not come is a failed one."""
    argv = [*kubectl_line(cluster, attached=True), *words]
    try:
        return machine.run(argv, input=input)
    except (TookTooLong, ToolMissing) as error:
        return Ran(1, b"", f"{error} did not answer".encode())
