"""Verbs: what is there already: a cluster, the webhook of its MetalLB, things in Docker."""

from __future__ import annotations

import json
import re
from typing import Any

from hostctl.cluster import container_facts, find_network, parse_json
from hostctl.machine import PROGRESS_SECONDS, Machine
from hostctl.protocol import Failure, Result, say
from hostctl.spec import (
    CLUSTER_NAME,
    DNS_LABEL,
    Items,
    Value,
    absolute_path,
    checked,
    number_between,
    text_matching,
)
from hostctl.tools import tool_version
from hostctl.workloads import KUBECONFIG, UNREACHABLE, kubeconfig_file, run_kubectl

INSPECT_SPEC: dict[str, Any] = {
    "name": Value(CLUSTER_NAME),
    "kubeconfig": Value(KUBECONFIG, secret=True),
}
_EXCLUDED = "node.kubernetes.io/exclude-from-external-load-balancers"
_SERVICELB = "svccontroller.k3s.cattle.io/svcname"
_REFUSED = re.compile(r"Unauthorized|\(Forbidden\)|must be logged in")


def cluster_inspect(machine: Machine, spec: dict[str, Any]) -> Result:
    """Says whether the cluster of a kubeconfig answers, and which nodes it has. ``state`` is
    reachable or unreachable; whatever else happens is a failure, never an absence.
    """
    wanted = checked(spec, INSPECT_SPEC, "cluster inspect")
    step = f"looking at cluster {wanted['name']}"
    tool_version(machine, "kubectl")
    with kubeconfig_file(machine, wanted["kubeconfig"]) as path:
        listed = run_kubectl(machine, path, ["get", "nodes", "--output=json"], step, raw=True)
        said = listed.err.decode("utf-8", "replace")
        if listed.code and "x509" in said:
            raise Failure(
                "refused",
                step,
                f"another cluster, or none of its CA, answers there: {listed.complaint}",
                "correct homelab:cluster.kubeconfig: file, context or server; the server's "
                "certificate must name the address",
            )
        if listed.code and UNREACHABLE.search(said):
            return {"state": "unreachable", "detail": listed.complaint, "nodes": {}}
        if listed.code:
            remedy = "see the cause; `kubectl get nodes` with this kubeconfig must answer"
            if _REFUSED.search(said):
                remedy = "renew the credentials: kubeadm's and k3s's certificates end after a year"
            raise Failure("cannot-tell", step, listed.complaint, remedy)
        arguments = ["get", "daemonsets.apps", "--namespace=kube-system", "--output=json"]
        balancers = run_kubectl(machine, path, arguments, step)
    if balancers.code:
        raise Failure("cannot-tell", step, balancers.complaint, "run it by hand")
    return {
        "state": "reachable",
        "detail": "",
        "nodes": {
            node["metadata"]["name"]: _node_facts(node)
            for node in parse_json(listed.out, step)["items"]
        },
        "servicelb": sorted(
            one["metadata"]["name"]
            for one in parse_json(balancers.out, step)["items"]
            if _SERVICELB in (one["metadata"].get("labels") or {})
        ),
    }


def _node_facts(node: dict[str, Any]) -> dict[str, Any]:
    status = node.get("status") or {}
    return {
        "addresses": [
            one["address"] for one in status.get("addresses") or [] if one["type"] == "InternalIP"
        ],
        "ready": any(
            one["type"] == "Ready" and one["status"] == "True"
            for one in status.get("conditions") or []
        ),
        "version": (status.get("nodeInfo") or {}).get("kubeletVersion", ""),
        "excluded": _EXCLUDED in (node["metadata"].get("labels") or {}),
    }


WEBHOOK_SPEC: dict[str, Any] = {
    "kubeconfig": Value(absolute_path),
    "namespace": Value(DNS_LABEL),
    "seconds": Value(number_between(1, 3600), 300),
    # Another chart restarts the controller, and with it the webhook.
    "chart": Value(text_matching(r"[0-9A-Za-z.+-]{1,64}", "the version of the chart"), ""),
}


def metallb_wait(machine: Machine, spec: dict[str, Any]) -> Result:
    """Waits until MetalLB's webhook answers, which is later than its pods are ready: until then
    every address pool is refused (metallb issues 1597 and 1669).

    Asks the API server to make a pool without making it (`--dry-run=server`), which calls the
    webhook as a real one does. A pool that the webhook itself refuses is an answer too.
    """
    wanted = checked(spec, WEBHOOK_SPEC, "metallb wait")
    step = "waiting for MetalLB's webhook"
    probe = {
        "apiVersion": "metallb.io/v1beta1",
        "kind": "IPAddressPool",
        "metadata": {"name": "homelab-probe", "namespace": wanted["namespace"]},
        # Of the range that is for documents alone (RFC 5737).
        "spec": {"addresses": ["192.0.2.1/32"], "autoAssign": False},
    }
    arguments = ["create", "--dry-run=server", "--filename=-", "--output=name"]
    started = machine.now()
    while True:
        asked = run_kubectl(
            machine,
            wanted["kubeconfig"],
            arguments,
            step,
            input=json.dumps(probe).encode(),
            raw=True,
        )
        said = asked.err.decode("utf-8", "replace")
        waited = machine.now() - started
        if asked.code == 0 or _DENIED.search(said):
            return {"waited": int(waited)}
        if not (_NO_ANSWER_YET.search(said) or UNREACHABLE.search(said)):
            raise Failure("failed", step, asked.complaint, "see the cause, then run up again")
        if waited >= wanted["seconds"]:
            raise Failure(
                "timed-out",
                step,
                f"it does not answer after {waited:.0f} s: {asked.complaint}",
                f"kubectl --namespace={wanted['namespace']} get pods,endpointslices; the API "
                "server must reach the controller's pod; then run up again",
            )
        say(f"{step}: {waited:.0f} s; {asked.complaint[:200]}")
        machine.sleep(PROGRESS_SECONDS)


_DENIED = re.compile(r"admission webhook \S+ denied the request")
_NO_ANSWER_YET = re.compile(
    r"failed calling webhook|failed to call webhook|no matches for kind"
    r"|the server could not find the requested resource"
)


_DOCKER_NAME = Value(text_matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*", "a name in Docker"))


def docker_find(machine: Machine, spec: dict[str, Any]) -> Result:
    """Says the ids of Docker's containers and networks by their names; null where there is none."""
    shape = {"containers": Items(_DOCKER_NAME, []), "networks": Items(_DOCKER_NAME, [])}
    wanted = checked(spec, shape, "docker find")

    def containers(name: str) -> str | None:
        # `docker inspect` finds by the beginning of an id, too.
        facts = container_facts(machine, name, f"looking for container {name}")
        return facts["Id"] if facts and facts["Name"].lstrip("/") == name else None

    def networks(name: str) -> str | None:
        facts = find_network(machine, name)
        return facts["Id"] if facts and facts["Name"] == name else None

    return {
        "containers": {name: containers(name) for name in wanted["containers"]},
        "networks": {name: networks(name) for name in wanted["networks"]},
    }
