"""Verbs on a k3s server: its nodes, its token, its kubeconfig."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from hostctl.cluster import kubeconfig_credentials, parse_json
from hostctl.files import render_kubeconfig
from hostctl.k3s_datastore import k3s_record, keep_token, set_token, write_k3s_record
from hostctl.k3s_node import (
    K3S_DATA,
    K3S_KUBECONFIG,
    K3S_SECRET,
    K3S_SERVER_TOKEN,
    K3sNode,
    k3s_identity,
    k3s_kubectl,
    k3s_look,
    k3s_member,
    k3s_password,
    k3s_ready,
    k3s_runs,
)
from hostctl.k3s_service import k3s_host_port
from hostctl.machine import PROGRESS_SECONDS, Machine
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock
from hostctl.spec import (
    CLUSTER_NAME,
    OBJECT_NAME,
    Value,
    checked,
    number_between,
    or_null,
    server_url,
    text_matching,
)

_VERSION_TEXT = or_null(text_matching(r"v\d+\.\d+\.\d+\+k3s\d+", "a release of k3s"))
_SERVER_ROLE = "node-role.kubernetes.io/control-plane"
MEMBER_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "node": Value(OBJECT_NAME),
    "drainSeconds": Value(number_between(1, 86400), 300),
    "readySeconds": Value(number_between(1, 86400), 600),
    # What the node is to become: a drain for it is none where it is that already.
    "version": Value(_VERSION_TEXT, None),
}


def k3s_server(
    machine: Machine, cluster: str, step: str, *, before_ensure: bool = False
) -> K3sNode | None:
    """This machine's server of the cluster, hostctl's own; None where no k3s is.
    ``before_ensure``: None too where it is one of get.k3s.io, which `ensure` is to take over."""
    record = k3s_record(machine, cluster)
    node = k3s_look(machine, cluster, bool(record.get("pending")))
    if node is None or not node.unit:
        return None
    if before_ensure and node.installed == "get.k3s.io":
        return None
    if node.role != "server" or node.cluster != cluster:
        raise Failure(
            "refused",
            step,
            f"this machine is no server of {cluster} that hostctl installed "
            f"({node.role}, installed by {node.installed})",
            "run it on a server of that cluster",
        )
    return node


def k3s_drain(machine: Machine, spec: dict[str, Any]) -> Result:
    """Cordons a node and moves its pods elsewhere, within their PodDisruptionBudgets. With
    `version` it does nothing where the node runs that version already, or is none yet."""
    wanted = checked(spec, MEMBER_SPEC, "k3s drain")
    step = f"draining {wanted['node']}"
    with cluster_lock(machine, wanted["cluster"]):
        before = wanted["version"] is not None
        if k3s_server(machine, wanted["cluster"], step, before_ensure=before) is None:
            return {"changed": []}
        member = k3s_member(machine, wanted["node"], step)
        if member is None or k3s_runs(member) == wanted["version"]:
            return {"changed": []}
        _drain(machine, wanted, step)
    return {"changed": ["drained"]}


def _drain(machine: Machine, wanted: Mapping[str, Any], step: str) -> None:
    seconds = wanted["drainSeconds"]
    arguments = ["drain", wanted["node"], "--ignore-daemonsets", "--delete-emptydir-data"]
    say(f"{step}: {seconds} s at most")
    ran = k3s_kubectl(
        machine,
        [*arguments, f"--timeout={seconds}s"],
        step,
        raw=True,
        timeout=seconds + 60.0,
        tick=lambda waited: say(f"{step}: {waited:.0f} s"),
    )
    if ran.code == 0:
        return
    said = ran.err.decode("utf-8", "replace")
    if "declare no controller" in said:
        remedy = "these pods would be lost: delete them, or give them a controller; then again"
    else:
        remedy = (
            "kubectl get poddisruptionbudgets --all-namespaces; with one replica none may go: add "
            "one, or a larger drainSeconds; the node stays cordoned (kubectl uncordon)"
        )
    timed_out = "timed out" in said or "timeout" in said
    raise Failure("timed-out" if timed_out else "failed", step, ran.complaint, remedy)


def k3s_uncordon(machine: Machine, spec: dict[str, Any]) -> Result:
    """Waits until a node is Ready and lets pods on it again."""
    wanted = checked(spec, MEMBER_SPEC, "k3s uncordon")
    step = f"uncordoning {wanted['node']}"
    with cluster_lock(machine, wanted["cluster"]):
        if k3s_server(machine, wanted["cluster"], step) is None:
            return {"changed": []}
        started = machine.now()
        while True:
            member = k3s_member(machine, wanted["node"], step)
            if member is None or not (member.get("spec") or {}).get("unschedulable"):
                return {"changed": []}
            waited = machine.now() - started
            if k3s_ready(member):
                break
            if waited >= wanted["readySeconds"]:
                raise Failure(
                    "timed-out",
                    step,
                    f"it is not Ready after {waited:.0f} s, and stays cordoned",
                    "journalctl --unit k3s (k3s-agent) on it; then run up again",
                )
            say(f"{step}: {waited:.0f} s; it is not Ready")
            machine.sleep(PROGRESS_SECONDS)
        k3s_kubectl(machine, ["uncordon", wanted["node"]], step)
    return {"changed": ["uncordoned"]}


def k3s_forget(machine: Machine, spec: dict[str, Any]) -> Result:
    """Takes a node out of the cluster: drains it if it answers, deletes its Node, and waits until
    k3s has removed it from etcd and lets the Node go. One that is none any more is fine."""
    wanted = checked(spec, MEMBER_SPEC, "k3s forget")
    step = f"forgetting {wanted['node']}"
    with cluster_lock(machine, wanted["cluster"]):
        server = k3s_server(machine, wanted["cluster"], step)
        if server is None:
            return {"changed": []}
        members = _members(machine, step)
        member = members.get(wanted["node"])
        if member is None:
            return {"changed": []}
        servers = [name for name, one in members.items() if _is_server(one)]
        if servers == [wanted["node"]]:
            raise Failure(
                "refused",
                step,
                "it is the only server: without it there is no cluster",
                "to end the cluster, remove its servers (k3s remove), or run destroy",
            )
        if server.node == wanted["node"]:
            raise Failure("refused", step, "it is this machine itself", "run it on another server")
        changed = []
        if k3s_ready(member):
            _drain(machine, wanted, step)
            changed.append("drained")
        else:
            say(f"{wanted['node']} does not answer: its pods are made anew elsewhere")
        k3s_kubectl(machine, ["delete", "node", wanted["node"]], step, timeout=120.0)
    return {"changed": [*changed, "deleted"]}


def _members(machine: Machine, step: str) -> dict[str, dict[str, Any]]:
    out = k3s_kubectl(machine, ["get", "nodes", "--output=json"], step).out
    return {one["metadata"]["name"]: one for one in parse_json(out, step)["items"]}


def _is_server(member: Mapping[str, Any]) -> bool:
    return _SERVER_ROLE in (member["metadata"].get("labels") or {})


def other_servers(machine: Machine, node: K3sNode, step: str) -> list[str]:
    """The URLs of the other servers, by their internal addresses."""
    return [
        f"https://{address['address']}:6443"
        for name, one in sorted(_members(machine, step).items())
        if _is_server(one) and name != node.node
        for address in (one.get("status") or {}).get("addresses") or []
        if address["type"] == "InternalIP"
    ]


def k3s_rotate_token(machine: Machine, spec: dict[str, Any]) -> Result:
    """Rotates the cluster's token, as `k3s token rotate` does; a restart does not. Each server and
    agent is then started with the new one by its `k3s ensure`. The old one is kept on this machine:
    snapshots of its time can be restored with it alone."""
    shape = {
        "cluster": Value(CLUSTER_NAME),
        "new": Value(K3S_SECRET, secret=True),
        "old": Value(or_null(K3S_SECRET), None, secret=True),
        # k3s answers on the API's port. Elsewhere only where a supervisor has one of its own.
        "supervisor": Value(server_url, "https://127.0.0.1:6443"),
    }
    wanted = checked(spec, shape, "k3s token")
    step = f"rotating the token of {wanted['cluster']}"
    with cluster_lock(machine, wanted["cluster"]):
        node = k3s_server(machine, wanted["cluster"], step, before_ensure=True)
        if node is None or not machine.exists(K3S_SERVER_TOKEN):
            return {"changed": []}
        live = machine.read(K3S_SERVER_TOKEN).decode().strip()
        new = k3s_password(wanted["new"])
        if k3s_password(live) == new:
            return {"changed": []}
        if wanted["old"] and k3s_password(wanted["old"]) != k3s_password(live):
            raise Failure(
                "refused",
                step,
                "the token in use is neither the old nor the new one",
                f"declare the one that is in {K3S_SERVER_TOKEN} on this machine",
            )
        if node.state == "stopped":
            raise Failure("refused", step, "k3s is stopped here", f"{_start(wanted)}, then again")
        keep_token(machine, live)
        ca = machine.read(f"{K3S_DATA}/server/tls/server-ca.crt").decode("ascii", "replace")
        body = json.dumps({"newToken": new}).encode()
        url = f"{wanted['supervisor']}/v1-k3s/token"
        try:
            # Not by `k3s token rotate`: it takes the new one as an argument, which all may read.
            status, said = machine.put(url, ("server", k3s_password(live)), body, ca)
        except OSError as error:
            raise Failure(
                "cannot-tell", step, f"{url}: {error}", f"{_start(wanted)}, then again"
            ) from None
        if status != 200:
            raise Failure(
                "failed",
                step,
                f"k3s answered {status}: {_without(said, new, k3s_password(live))}",
                "from v1.28.3 on k3s can rotate it; see the cause",
            )
        keep_token(machine, new)
        set_token(machine, new)
        # The next ensure starts k3s with it, also where it finds nothing else to do.
        write_k3s_record(machine, wanted["cluster"], pending=node.version)
    return {"changed": ["rotated"]}


def _start(wanted: Mapping[str, Any]) -> str:
    return f"on this machine: hostctl k3s start {wanted['cluster']}"


def _without(said: str, *secrets: str) -> str:
    for secret in secrets:
        said = said.replace(secret, "...")
    return said[:300]


def k3s_kubeconfig(machine: Machine, spec: dict[str, Any]) -> Result:
    """The administrator's kubeconfig with an address that clients reach; secret. Refuses an address
    that the server's certificate does not name (tls-san). Writes nothing."""
    shape = {"cluster": Value(CLUSTER_NAME), "server": Value(server_url)}
    wanted = checked(spec, shape, "k3s kubeconfig")
    step = f"reading the kubeconfig of {wanted['cluster']}"
    node = k3s_server(machine, wanted["cluster"], step)
    if node is None:
        raise Failure("refused", step, "there is no k3s here", "pulumi up installs it")
    credentials = k3s_credentials(machine)
    if credentials is None:
        raise Failure("cannot-tell", step, f"{K3S_KUBECONFIG} is not there yet", _start(wanted))
    host, _ = k3s_host_port(wanted["server"])
    ca = base64.b64decode(credentials["ca"]).decode("ascii", "replace")
    refused = machine.connect("127.0.0.1", 6443, ca, host)
    if refused and "certificate" in refused:
        raise Failure(
            "refused",
            step,
            f"the API's certificate does not name {host}: {refused}",
            "add it to config.tls-san of the servers and run up",
        )
    text = render_kubeconfig(wanted["cluster"], credentials, wanted["server"], "k3s")
    return {"kubeconfig": text, "identity": k3s_identity(machine)}


def k3s_credentials(machine: Machine) -> dict[str, str] | None:
    """What k3s' own kubeconfig holds, in base64; None before it is written."""
    try:
        text = machine.read(K3S_KUBECONFIG).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    return kubeconfig_credentials(text)
