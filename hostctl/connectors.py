"""Verbs: the in-cluster connectors of tunnels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hostctl.cluster import parse_json
from hostctl.machine import PROGRESS_SECONDS, Machine
from hostctl.owners import owners_of
from hostctl.protocol import Failure, Result, say
from hostctl.spec import DNS_LABEL, OBJECT_NAME, Value, absolute_path, checked
from hostctl.workloads import doctor_remedy, run_kubectl

CONNECTOR_SPEC: dict[str, Any] = {
    "kubeconfig": Value(absolute_path),
    "namespace": Value(DNS_LABEL),
    "deployment": Value(OBJECT_NAME),
}


def connector_status(machine: Machine, spec: dict[str, Any]) -> Result:
    """Says how many pods of a tunnel's connector are ready; what is absent has none."""
    wanted = checked(spec, CONNECTOR_SPEC, "connector status")
    found, detail = _connector(machine, wanted, f"looking at {_connector_name(wanted)}")
    return {"ready": (found.get("status") or {}).get("readyReplicas", 0), "detail": detail}


def connector_stop(machine: Machine, spec: dict[str, Any]) -> Result:
    """Stops a tunnel's connectors before the tunnel is deleted, which fails while one is connected.
    An absent cluster or Deployment has none; one that another owner has, such as ArgoCD, goes on.
    """
    wanted = checked(spec, CONNECTOR_SPEC, "connector stop")
    step, path = f"stopping {_connector_name(wanted)}", wanted["kubeconfig"]
    found, detail = _connector(machine, wanted, step)
    if not found:
        return {"stopped": False, "detail": detail}
    others = set(owners_of("Deployment.apps", found["metadata"])) - {"Pulumi", "hostctl"}
    if others:
        return {"stopped": False, "detail": f"it belongs to {', '.join(sorted(others))}"}
    title = f"deployments.apps/{wanted['deployment']}"
    namespace = f"--namespace={wanted['namespace']}"
    scaled = run_kubectl(machine, path, ["scale", title, namespace, "--replicas=0"], step)
    if scaled.code:
        raise Failure("failed", step, scaled.complaint, doctor_remedy())
    for _ in range(24):
        found, _detail = _connector(machine, wanted, step)
        if not (found.get("status") or {}).get("replicas"):
            return {"stopped": True, "detail": "scaled to 0"}
        say(f"{step}: waiting for its pods to end")
        machine.sleep(PROGRESS_SECONDS)
    remedy = f"see what holds them: kubectl {namespace} describe pods; then again"
    raise Failure("timed-out", step, "its pods have not ended in 120 s", remedy)


def _connector_name(wanted: Mapping[str, Any]) -> str:
    return f"{wanted['namespace']}/{wanted['deployment']}"


def _connector(
    machine: Machine, wanted: Mapping[str, Any], step: str
) -> tuple[dict[str, Any], str]:
    """The connector's Deployment, empty where there is none, and why."""
    title = f"deployments.apps/{wanted['deployment']}"
    get = ["get", title, f"--namespace={wanted['namespace']}", "--ignore-not-found"]
    get.append("--show-managed-fields")
    try:
        seen = run_kubectl(machine, wanted["kubeconfig"], [*get, "--output=json"], step)
    except Failure as failure:
        if failure.code != "cannot-tell":
            raise
        # Whoever cannot be reached here holds no connection to Cloudflare from here either.
        return {}, failure.cause
    if seen.code and "(NotFound)" not in seen.complaint:
        raise Failure("failed", step, seen.complaint, doctor_remedy())
    if seen.code or not seen.out.strip():
        return {}, "there is no such Deployment"
    return parse_json(seen.out, step), "it exists"
