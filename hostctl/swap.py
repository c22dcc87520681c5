"""Verbs: a new image for the node of a cluster of one server, without losing the cluster."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from hostctl.cluster import (
    SWAP_LABEL,
    Cluster,
    container_facts,
    identity_of,
    look,
    network_of,
    node_kubeconfig,
    parse_json,
)
from hostctl.cluster_backup import (
    back_up_datastore,
    backup_directory,
    datastore_of,
    refuse_without_room,
    restore_datastore,
    run_copy,
    time_stamp,
    utc,
)
from hostctl.live import DATASTORE_IN_NODE, k3s_version, live_api
from hostctl.machine import Machine
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.spec import NAME_SPEC, checked
from hostctl.tools import attempt, run_tool
from hostctl.waiting import asked_version, stop, wait_for_address, wait_ready

PULL_SECONDS = 3600.0


def swap_node(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> None:
    """Replaces the only node of a cluster by one of the declared image, which has the datastore,
    token, ports, mounts and arguments of the old one. The caller holds the lock.

    The old container is kept, renamed, until the new one is verified. What was begun is in the
    record, so that a run after a kill goes on with it (see `continue_swap`).
    """
    name, node = spec["name"], cluster.first
    step = f"swapping the node of cluster {name}"
    networks = node.facts["NetworkSettings"].get("Networks") or {}
    source, credentials = datastore_of(node), node_kubeconfig(machine, cluster)
    own = network_of([node]) or ""
    # A second one, in the LAN, is connected again afterwards.
    alone = networks.keys() - {f"{own}-lan"} == {own}
    if not alone or not source or not credentials:
        lacks = "credentials yet" if source else f"mount at {os.path.dirname(DATASTORE_IN_NODE)}"
        connected = f"is connected to {', '.join(networks) or 'no network'}"
        raise Failure(
            "refused",
            step,
            f"{node.name} {connected if not alone else f'has no {lacks}'}",
            f"see `hostctl k3d doctor {name}`; the node must be one that k3d made and that was "
            "ready once",
        )
    have_image(machine, spec["image"], step)
    bound = node.mount(DATASTORE_IN_NODE)
    data = bound or f"{spec['datastore_dir']}/server-0"
    backup = backup_directory(machine, cluster)
    # Twice: the backup and the copy that verifies it; then the backup and the new node's data.
    size = 2 * machine.tree_bytes(source)
    refuse_without_room(machine, backup, size, step, name)
    refuse_without_room(machine, data, size, step, name)
    machine.make_directory(os.path.dirname(data), 0o700, "root", "root")
    if not bound:
        set_aside(machine, data)
    write_record(
        machine,
        name,
        swap={
            "step": "backup",
            "nonce": machine.nonce(),
            "at": utc(machine.now()),
            "image": spec["image"],
            "old_image": node.facts["Config"]["Image"],
            "old": node.facts["Id"],
            "node": node.name,
            "identity": identity_of(name, credentials),
            "data": data,
            "copied": not bound,
            "started": False,
            "backup": backup,
            "cause": None,
        },
    )
    continue_swap(machine, spec)


def continue_swap(machine: Machine, spec: Mapping[str, Any]) -> None:
    """Finishes the swap that the record tells of, or goes back: each step can be run again.

    Raises Failure "failed" when it went back because the new node did not come up. When Docker
    cannot tell, it stays where it is, for the next run. ``spec`` may be without an image.
    """
    name = spec["name"]
    swap = read_record(machine, name).get("swap")
    if swap and swap["step"] in _FORWARD and spec.get("image") not in (None, swap["image"]):
        say(f"{swap['image']} is no longer asked for: going back to {swap['old_image']}")
        _next(machine, name, swap, "back")
    while swap:
        say(f"swapping the node of {name}: {swap['step']}")
        run = _FORWARD.get(swap["step"]) or _OTHER[swap["step"]]
        try:
            after = run(machine, spec, swap)
        except Failure as failure:
            if swap["step"] not in _FORWARD or failure.code in ("cannot-tell", "tool"):
                raise
            say(f"{failure}; going back to {swap['old_image']}")
            swap["cause"], after = str(failure), "back"
        if after is None:
            return
        _next(machine, name, swap, after)


def _next(machine: Machine, name: str, swap: dict[str, Any], step: str) -> None:
    swap.update(step=step, started=swap["started"] or step == "start")
    write_record(machine, name, swap=swap)


def _back_up_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
    name, target = spec["name"], swap["backup"]
    stop(machine, look(machine, name))
    # What a run before this one left is not verified.
    run_copy(machine, ["rm", "-r", "-f", target], "removing half a backup", target)
    machine.make_directory(os.path.dirname(target), 0o700)
    machine.make_directory(target, 0o700)
    back_up_datastore(machine, name, swap["old"], target)
    return "copy" if swap["copied"] else "replace"


def _copy_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
    if machine.is_empty(swap["data"]):
        restore_datastore(machine, spec["name"], swap["backup"], swap["data"], swap["nonce"])
    return "replace"


def _replace_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
    step, node = f"making {swap['node']} from {swap['image']}", swap["node"]
    old = container_facts(machine, swap["old"], step)
    if old is None:
        raise Failure("cannot-tell", step, f"{node} is gone", "see docker ps --all; run up again")
    if old["Name"] == f"/{node}":
        run_tool(machine, ["docker", "rename", swap["old"], _kept(swap)], step, "failed")
    # One that a run before this one made may lack files; it was never started.
    _remove_new(machine, swap, step)
    _create(machine, swap, old, step)
    files = _node_files(machine, swap, step)
    argv = ["docker", "cp", "--archive", "-", f"{node}:/"]
    run_tool(machine, argv, f"writing files of {node}", "failed", input=files, timeout=300.0)
    return "start"


def _start_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
    name, node = spec["name"], swap["node"]
    cluster, credentials = _start_all(machine, spec)
    step = f"verifying the new node of cluster {name}"
    identity = identity_of(name, credentials)
    if identity != swap["identity"]:
        cause = f"its identity is {identity}, and was {swap['identity']}"
        raise Failure("failed", step, cause, f"see `hostctl k3d inspect {name}`")
    wanted, version = k3s_version(swap["image"]), asked_version(machine, cluster)
    if wanted and version != wanted:
        remedy = f"{swap['image']} holds another k3s than its tag says: declare another image"
        raise Failure("failed", step, f"{node} runs k3s {version}, not {wanted}", remedy)
    return "clean"


def _clean_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> None:
    name, step = spec["name"], f"removing the old node of cluster {spec['name']}"
    run_tool(machine, ["sync"], "writing the datastore to the disk", "failed", timeout=3600.0)
    if container_facts(machine, swap["old"], step):
        # Its volumes too (incident 11): what they held is in the backup and in use.
        argv = ["docker", "rm", "--volumes", swap["old"]]
        run_tool(machine, argv, step, "failed", timeout=600.0)
    write_record(machine, name, swap=None, swap_failed=None, backup=swap["backup"])
    say(f"the node of {name} runs {swap['image']}; the backup is {swap['backup']}")


def _back_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> str:
    step, data = f"going back to {swap['old_image']}", swap["data"]
    _remove_new(machine, swap, step)
    failed = f"{data}.failed-{swap['nonce']}"
    touched = swap["copied"] or swap["started"]
    if touched and not machine.exists(failed) and not machine.is_empty(data):
        # What the new node made of it, for whoever wants to know why.
        machine.rename(data, failed)
    if not swap["copied"] and machine.is_empty(data):
        restore_datastore(machine, spec["name"], swap["backup"], data, swap["nonce"])
    return "return"


def _return_step(machine: Machine, spec: Mapping[str, Any], swap: Mapping[str, Any]) -> None:
    name, step = spec["name"], f"going back to {swap['old_image']}"
    old = container_facts(machine, swap["old"], step)
    if old and old["Name"] != f"/{swap['node']}":
        run_tool(machine, ["docker", "rename", swap["old"], swap["node"]], step, "failed")
    _start_all(machine, spec)
    if swap["cause"] is None:
        write_record(machine, name, swap=None)
        return
    failed = {key: swap[key] for key in ("image", "cause", "backup")}
    write_record(machine, name, swap=None, swap_failed={**failed, "at": utc(machine.now())})
    raise Failure(
        "failed",
        f"swapping the node of cluster {name} for {swap['image']}",
        f"{swap['cause']}. The cluster is back on {swap['old_image']}",
        f"see the new node's last words in {swap['backup']}/node.log; declare "
        f"{swap['old_image']} to stay, or try again: hostctl k3d retry {name}, then up",
    )


_FORWARD = {
    "backup": _back_up_step,
    "copy": _copy_step,
    "replace": _replace_step,
    "start": _start_step,
}
_OTHER = {"clean": _clean_step, "back": _back_step, "return": _return_step}


def _start_all(machine: Machine, spec: Mapping[str, Any]) -> tuple[Cluster, dict[str, str]]:
    cluster = look(machine, spec["name"])
    wait_for_address(machine, live_api(cluster)["bind"])
    for node in cluster.nodes:
        if not node.running:
            say(f"starting {node.name}")
            argv = ["docker", "start", node.name]
            run_tool(machine, argv, f"starting {node.name}", "failed", timeout=300.0)
    return wait_ready(machine, spec, look(machine, spec["name"]))


def _kept(swap: Mapping[str, Any]) -> str:
    """The old container's name meanwhile, as k3d itself renames one that it replaces."""
    return f"{swap['node']}-{swap['nonce']}"


def _remove_new(machine: Machine, swap: Mapping[str, Any], step: str) -> None:
    facts = container_facts(machine, swap["node"], step)
    if facts is None or facts["Id"] == swap["old"]:
        return
    if (facts["Config"].get("Labels") or {}).get(SWAP_LABEL) != swap["nonce"]:
        raise Failure(
            "cannot-tell",
            step,
            f"{swap['node']} is another container than the one that this swap made",
            f"rename it (docker rename {swap['node']} ...) and run up again",
        )
    if swap["started"]:
        argv = ["docker", "logs", "--tail", "500", swap["node"]]
        ran = attempt(machine, argv, step, timeout=300.0)
        machine.write_atomic(f"{swap['backup']}/node.log", ran.out + ran.err, 0o600)
    # Its datastore is not in its volumes.
    argv = ["docker", "rm", "--force", "--volumes", facts["Id"]]
    run_tool(machine, argv, step, "failed", timeout=600.0)


def _create(machine: Machine, swap: Mapping[str, Any], old: Mapping[str, Any], step: str) -> None:
    """Makes the new container as the old one was made, by Docker's API: its command line could not
    say all of it, and would show the cluster's token in the process list."""
    asked = ["docker", "context", "inspect", "--format", "{{.Endpoints.docker.Host}}"]
    endpoint = run_tool(machine, asked, step, "cannot-tell").text.strip()
    asked = ["docker", "version", "--format", "{{.Client.APIVersion}}"]
    version = run_tool(machine, asked, step, "cannot-tell").text.strip()
    if not endpoint.startswith("unix://"):
        raise Failure(
            "refused",
            step,
            f"Docker is reached at {endpoint}",
            "run hostctl on Docker's own host, where it listens on a socket file (DOCKER_HOST)",
        )
    argv = ["docker", "image", "inspect", "--format", "{{json .Config}}", old["Image"]]
    image = parse_json(run_tool(machine, argv, step, "cannot-tell").out, step)
    config = _without_defaults(old["Config"], image)
    config["Image"] = swap["image"]
    config["Labels"] = {**config.get("Labels", {}), SWAP_LABEL: swap["nonce"]}
    host = dict(old["HostConfig"])
    if swap["copied"]:
        host["Binds"] = [*(host.get("Binds") or []), f"{swap['data']}:{DATASTORE_IN_NODE}"]
    # Docker before API 1.44 takes one network at a create.
    network = old["Config"]["Labels"]["k3d.cluster.network"]
    endpoint_now = old["NetworkSettings"]["Networks"][network]
    # Docker itself adds the container's short id.
    aliases = [one for one in endpoint_now.get("Aliases") or [] if one != old["Id"][:12]]
    settings = {"Aliases": aliases, "IPAMConfig": endpoint_now.get("IPAMConfig")}
    body = {
        **config,
        "HostConfig": host,
        "NetworkingConfig": {"EndpointsConfig": {network: settings}},
    }
    path = f"/v{version}/containers/create?name={quote(swap['node'])}"
    try:
        status, answer = machine.post(endpoint[len("unix://") :], path, body)
    except OSError as error:
        raise Failure(
            "cannot-tell", step, f"{endpoint}: {error}", "systemctl status docker"
        ) from None
    if status != 201:
        raise Failure("failed", step, answer.strip()[:600], "see the cause and run up again")


def _without_defaults(config: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """A container's configuration without what it has from its image."""
    own: dict[str, Any] = {}
    for key, value in config.items():
        default = image.get(key)
        if isinstance(value, dict):
            given = list((default or {}).items())
            own[key] = dict(pair for pair in value.items() if pair not in given)
        elif key == "Env":
            own[key] = [one for one in value or [] if one not in (default or [])]
        elif value != default:
            own[key] = value
    return own


def _node_files(machine: Machine, swap: Mapping[str, Any], step: str) -> bytes:
    """What is in the old node's own layer and must be in the new one's: the entrypoint that k3d
    writes, and from /etc/rancher the node's password, without which k3s refuses a node of a name
    that it knows, and the registries."""
    listed = run_tool(machine, ["docker", "diff", swap["old"]], step, "failed", timeout=300.0)
    added = [line[2:] for line in listed.text.splitlines() if line[:1] in "AC"]
    wanted = [path for path in added if os.path.dirname(path) == "/bin" and "/k3d-" in path]
    wanted += [path for path in added if path in _RANCHER_FILES]
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as files:
        for path in wanted:
            argv = ["docker", "cp", f"{swap['old']}:{path}", "-"]
            ran = run_tool(machine, argv, f"reading {path} of the old node", "failed")
            with tarfile.open(fileobj=io.BytesIO(ran.out)) as archive:
                member = archive.getmembers()[0]
                content = archive.extractfile(member)
                member.name = path.lstrip("/")
                files.addfile(member, content)
    return held.getvalue()


_RANCHER_FILES = ("/etc/rancher/node/password", "/etc/rancher/k3s/registries.yaml")


def set_aside(machine: Machine, data: str) -> None:
    """Renames the datastore of an earlier cluster: another one's token would not open it, and it
    may be the only copy."""
    if not machine.is_empty(data):
        kept = f"{data}.{time_stamp(machine)}"
        say(f"{data} holds an earlier cluster's datastore: it is now {kept}")
        machine.rename(data, kept)


def have_image(machine: Machine, image: str, step: str) -> None:
    """Pulls an image that is not here, before anything that needs it is stopped."""
    asked = ["docker", "image", "inspect", "--format", "{{.Id}}", image]
    if attempt(machine, asked, step).code == 0:
        return

    def tick(waited: float) -> None:
        say(f"pulling {image}: {waited:.0f} s")

    say(f"pulling {image}")
    argv = ["docker", "pull", "--quiet", image]
    ran = attempt(machine, argv, f"pulling {image}", timeout=PULL_SECONDS, tick=tick)
    if ran.code:
        raise Failure(
            "failed",
            f"pulling {image}",
            ran.complaint,
            "is the name right, and the registry reachable from the host? Without a registry: "
            "docker load --input FILE, on the host",
        )


def k3d_retry(machine: Machine, spec: dict[str, Any]) -> Result:
    """Forgets that a swap of the node failed, so that the next up tries it again."""
    name = checked(spec, NAME_SPEC, "k3d retry")["name"]
    with cluster_lock(machine, name):
        failed = read_record(machine, name).get("swap_failed")
        if failed:
            write_record(machine, name, swap_failed=None)
    return {"forgotten": failed["image"] if failed else None}
