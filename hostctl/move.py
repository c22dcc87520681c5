"""Verbs: a cluster of one server moves to another host, and back until it is released there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from hostctl.cluster import (
    Cluster,
    container_facts,
    identity_of,
    look,
    network_of,
    node_kubeconfig,
    parse_json,
    read_tar,
)
from hostctl.cluster_backup import (
    back_up,
    datastore_of,
    refuse_without_room,
    restore_datastore,
    run_copy,
    utc,
)
from hostctl.k3d import delete, heal
from hostctl.live import STORAGE_IN_NODE
from hostctl.machine import PROGRESS_SECONDS, STATE_DIRECTORY, Machine
from hostctl.moved import MOVED_PASSWORD, MOVED_SECRETS, PASSWORD_IN_NODE
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.spec import (
    CLUSTER_NAME,
    DNS_LABEL,
    NAME_SPEC,
    OBJECT_NAME,
    Items,
    Value,
    absolute_path,
    checked,
    number_between,
    or_null,
    text_matching,
)
from hostctl.tools import attempt, run_tool
from hostctl.waiting import present_cluster, stop, wait_ready

_NONCE = text_matching(r"[0-9a-f]{16}", "what `move freeze` said")
_CONNECTORS = Items({"namespace": Value(DNS_LABEL), "deployment": Value(OBJECT_NAME)}, [])
_FILES = ("storage.tar", "datastore.tar", "cluster.json")
FREEZE_SPEC: dict[str, Any] = {"name": Value(CLUSTER_NAME), "connectors": _CONNECTORS}
RECEIVE_SPEC: dict[str, Any] = {
    "name": Value(CLUSTER_NAME),
    "nonce": Value(_NONCE),
    "storage_dir": Value(absolute_path),
    "files": Items(
        {
            "name": Value(text_matching("|".join(_FILES), "one of " + ", ".join(_FILES))),
            "bytes": Value(number_between(0, 2**62)),
            "sha256": Value(text_matching(r"[0-9a-f]{64}", "a sha256 in hex")),
        }
    ),
}
IMPORT_MOVE_SPEC: dict[str, Any] = {
    **RECEIVE_SPEC,
    "datastore_dir": Value(or_null(absolute_path), None),
}
_CONFIRM_SPEC = {**NAME_SPEC, "confirm": Value(or_null(CLUSTER_NAME), None)}


def move_status(machine: Machine, spec: dict[str, Any]) -> Result:
    """How far the move of a cluster is on this host; null where there is none."""
    name = checked(spec, NAME_SPEC, "move status")["name"]
    return {"move": read_record(machine, name).get("move")}


# On the host that it leaves


def move_freeze(machine: Machine, spec: dict[str, Any]) -> Result:
    """Stops the cluster for its move and packs it: connectors first, then the nodes, then volumes,
    datastore and what opens it, with checksums. From then on nothing starts it here but
    `move back`."""
    wanted = checked(spec, FREEZE_SPEC, "move freeze")
    name, step = wanted["name"], f"freezing cluster {wanted['name']}"
    with cluster_lock(machine, name):
        move = read_record(machine, name).get("move")
        if move and move["role"] == "from" and move["step"] == "released":
            raise Failure("refused", step, "it was released", "it lives on another host")
        if not move or move["role"] != "from":
            move = _begin(machine, name, move, step)
        if move["step"] == "connectors":
            move["connectors"] = _stop_connectors(machine, name, move, wanted["connectors"], step)
            _advance(machine, name, move, "stopping")
        if move["step"] == "stopping":
            stop(machine, look(machine, name))
            _advance(machine, name, move, "packing")
        if move["step"] == "packing":
            move["files"] = _pack(machine, name, move)
            _advance(machine, name, move, "frozen")
        return {key: move[key] for key in ("nonce", "identity", "directory", "files")}


def _begin(
    machine: Machine, name: str, before: Mapping[str, Any] | None, step: str
) -> dict[str, Any]:
    """Checks all that can be known, before anything is stopped."""
    cluster = present_cluster(machine, name, "freezing")
    if before and before["step"] not in ("open", "withdrawn"):
        raise Failure(
            "refused", step, f"its own move here is at step {before['step']}",
            f"finish that first: hostctl move cutover {name}",
        )  # fmt: skip
    unfinished = next(
        (key for key in ("creating", "swap") if read_record(machine, name).get(key)), None
    )
    credentials, source = node_kubeconfig(machine, cluster), datastore_of(cluster.first)
    storage = cluster.first.mount(STORAGE_IN_NODE)
    several = len(cluster.of("server", "agent")) > 1
    if unfinished or several or not credentials or not source or not storage:
        cause = "it has several nodes" if several else f"{cluster.first.name} was never ready"
        cause = f"its {unfinished} is not finished" if unfinished else cause
        raise Failure(
            "refused", step, cause,
            f"a cluster of one server moves that `hostctl k3d ensure {name}` has brought up",
        )  # fmt: skip
    nonce = machine.nonce()
    directory = f"{storage.rstrip('/')}-backups/{name}-move-{nonce}"
    size = machine.tree_bytes(storage) + 2 * machine.tree_bytes(source)
    refuse_without_room(machine, directory, size, step, name)
    move = {
        "role": "from",
        "step": "connectors",
        "at": utc(machine.now()),
        "nonce": nonce,
        "identity": identity_of(name, credentials),
        "directory": directory,
        "connectors": None,
        "files": None,
    }
    write_record(machine, name, move=move)
    return move


def _advance(machine: Machine, name: str, move: dict[str, Any], step: str) -> None:
    move.update(step=step, at=utc(machine.now()))
    write_record(machine, name, move=move)
    say(f"the move of {name}: {step}")


def _stop_connectors(
    machine: Machine, name: str, move: dict[str, Any], wanted: list[dict[str, str]], step: str
) -> list[dict[str, Any]]:
    """Takes the cluster off its tunnels, so that the moved one is verified before it serves. How
    many pods each had is recorded before the first is scaled."""
    cluster = _brought_up(machine, name)
    held = move["connectors"]
    if held is None:
        held = []
        for one in wanted:
            found = _connector_of(machine, cluster, one, step)
            if found:
                held.append({**one, "replicas": found["spec"].get("replicas", 1)})
        write_record(machine, name, move={**move, "connectors": held})
    for one in held:
        _scale_connector(machine, cluster, one, 0, step)
    return held


def _brought_up(machine: Machine, name: str) -> Cluster:
    """The cluster, started where it is stopped and answering."""
    cluster = present_cluster(machine, name, "moving")
    applied = read_record(machine, name).get("applied") or {}
    spec = {
        "name": name,
        "api_wait_seconds": applied.get("api_wait_seconds", 1800),
        "network": {"name": network_of(cluster.nodes)},
    }
    heal(machine, cluster)
    return wait_ready(machine, spec, look(machine, name))[0]


def _in_node(cluster: Cluster, *words: str) -> list[str]:
    return ["docker", "exec", cluster.first.name, "kubectl", *words]


def _connector_of(
    machine: Machine, cluster: Cluster, one: Mapping[str, Any], step: str
) -> dict[str, Any]:
    title = f"deployments.apps/{one['deployment']}"
    argv = _in_node(cluster, "get", title, f"--namespace={one['namespace']}")
    seen = run_tool(machine, [*argv, "--ignore-not-found", "--output=json"], step, "cannot-tell")
    return parse_json(seen.out, step) if seen.out.strip() else {}


def _scale_connector(
    machine: Machine, cluster: Cluster, one: Mapping[str, Any], replicas: int, step: str
) -> None:
    """Gives a connector so many pods, and waits until it has them, ready."""
    title = f"deployments.apps/{one['deployment']}"
    argv = _in_node(cluster, "scale", title, f"--namespace={one['namespace']}")
    run_tool(machine, [*argv, f"--replicas={replicas}"], step, "failed")
    counted = "readyReplicas" if replicas else "replicas"
    for _ in range(60):
        status = _connector_of(machine, cluster, one, step).get("status") or {}
        if status.get(counted, 0) == replicas:
            return
        say(f"{step}: waiting for {one['namespace']}/{one['deployment']} to have {replicas} pod(s)")
        machine.sleep(PROGRESS_SECONDS)
    raise Failure(
        "timed-out", step, f"{title} in {one['namespace']} has not come to {replicas} pod(s)",
        f"kubectl --namespace={one['namespace']} describe {title}; then run it again",
    )  # fmt: skip


def _pack(machine: Machine, name: str, move: Mapping[str, Any]) -> list[dict[str, Any]]:
    step, directory = f"packing cluster {name}", move["directory"]
    cluster = present_cluster(machine, name, "packing")
    if cluster.state != "stopped":
        raise Failure("cannot-tell", step, "it runs again", f"docker stop {cluster.first.name}")
    # What a run before this one left is not verified.
    run_copy(machine, ["rm", "-r", "-f", directory], "removing half a copy", directory)
    back_up(machine, cluster, directory)
    record = read_record(machine, name)
    facts = container_facts(machine, cluster.first.facts["Id"], step) or {}
    environment = (facts.get("Config") or {}).get("Env") or []
    tokens = [one.partition("=")[2] for one in environment if one.startswith("K3S_TOKEN=")]
    if len(tokens) != 1:
        cause = f"{cluster.first.name} has no token of k3s"
        raise Failure("refused", step, cause, f"hostctl move back {name} --confirm {name}")
    content = {
        "name": name,
        "nonce": move["nonce"],
        "identity": move["identity"],
        "image": cluster.first.facts["Config"]["Image"],
        "connectors": move["connectors"],
        "incarnation": record.get("incarnation"),
        "argocd": record.get("argocd"),
        "token": tokens[0],
        "password": _password_of(machine, cluster, step),
    }
    machine.write_atomic(f"{directory}/cluster.json", json.dumps(content).encode(), 0o600)
    return [
        {
            "name": file,
            "bytes": machine.file_bytes(f"{directory}/{file}"),
            "sha256": machine.checksum(f"{directory}/{file}"),
        }
        for file in _FILES
    ]


def _password_of(machine: Machine, cluster: Cluster, step: str) -> str | None:
    """What k3s knows the node by; None for one that has none."""
    argv = ["docker", "cp", f"{cluster.first.name}:{PASSWORD_IN_NODE}", "-"]
    ran = attempt(machine, argv, step)
    if ran.code and "Could not find the file" not in ran.complaint:
        raise Failure("cannot-tell", step, ran.complaint, "run it again")
    return read_tar(ran.out) or None


def move_back(machine: Machine, spec: dict[str, Any]) -> Result:
    """The way back, on the host that it left: starts the frozen cluster and its connectors. To be
    confirmed by name: the other host's must have been withdrawn."""
    wanted = checked(spec, _CONFIRM_SPEC, "move back")
    name, step = wanted["name"], f"taking cluster {wanted['name']} back"
    with cluster_lock(machine, name):
        move = read_record(machine, name).get("move")
        if not move or move["role"] != "from":
            return {"back": False}
        if move["step"] == "released":
            remedy = "move it back as it was moved here: freeze it on the other host"
            raise Failure("refused", step, "this host was released", remedy)
        if wanted["confirm"] != name:
            raise Failure(
                "refused", step, "its name is not confirmed",
                f"on the other host `hostctl move withdraw {name}`, then here `hostctl move back "
                f"{name} --confirm {name}`; what was written there since is not here",
            )  # fmt: skip
        cluster = _brought_up(machine, name)
        for one in move["connectors"] or []:
            _scale_connector(machine, cluster, one, one["replicas"], step)
        write_record(machine, name, move=None)
    return {"back": True}


def move_release(machine: Machine, spec: dict[str, Any]) -> Result:
    """Ends the way back: removes the frozen cluster's containers from the host that it left, whose
    name is confirmed. Its directories and the packed copy stay."""
    wanted = checked(spec, _CONFIRM_SPEC, "move release")
    name, step = wanted["name"], f"releasing cluster {wanted['name']}"
    with cluster_lock(machine, name):
        move = read_record(machine, name).get("move") or {}
        if move.get("role") != "from" or move["step"] not in ("frozen", "released"):
            cause = "it is not frozen on this host"
            raise Failure("refused", step, cause, f"hostctl move status {name}")
        if wanted["confirm"] != name:
            remedy = f"when it serves elsewhere: hostctl move release {name} --confirm {name}"
            raise Failure("refused", step, "its name is not confirmed", remedy)
        _advance(machine, name, move, "released")
        if look(machine, name).state != "absent":
            delete(machine, name)
    return {"kept": move["directory"]}


# On the host that it comes to


def move_receive(machine: Machine, spec: dict[str, Any]) -> Result:
    """Where the packed files are to be put, and how many bytes of each are there already; one that
    is whole and wrong is removed."""
    wanted = checked(spec, RECEIVE_SPEC, "move receive")
    name = wanted["name"]
    step = f"receiving cluster {name}"
    with cluster_lock(machine, name):
        _refuse_other(machine, wanted, step)
        directory = _received(wanted)
        total = sum(file["bytes"] for file in wanted["files"])
        there = sum(machine.file_bytes(f"{directory}/{file['name']}") for file in wanted["files"])
        # Packed, and unpacked beside it.
        refuse_without_room(machine, directory, max(0, 2 * total - there), step, name)
        machine.make_directory(os.path.dirname(directory), 0o700)
        machine.make_directory(directory, 0o700)
        have = {}
        for file in wanted["files"]:
            path = f"{directory}/{file['name']}"
            have[file["name"]] = machine.file_bytes(path)
            whole = have[file["name"]] >= file["bytes"]
            if whole and machine.exists(path) and machine.checksum(path) != file["sha256"]:
                say(f"{path} is not what was packed: it is copied anew")
                machine.remove(path)
                have[file["name"]] = 0
    return {"directory": directory, "have": have}


def _received(wanted: Mapping[str, Any]) -> str:
    return f"{wanted['storage_dir'].rstrip('/')}-backups/{wanted['name']}-move-{wanted['nonce']}"


def _refuse_other(machine: Machine, wanted: Mapping[str, Any], step: str) -> None:
    """Refuses what would be written over: a cluster, or a move of another packing."""
    name = wanted["name"]
    move = read_record(machine, name).get("move") or {}
    ours = move.get("role") == "to" and move.get("nonce") == wanted["nonce"]
    if ours and move["step"] != "withdrawn":
        return
    if move.get("role") == "from" and move["step"] != "released":
        cause, remedy = f"it is {move['step']} on this very host", f"hostctl move status {name}"
        raise Failure("refused", step, cause, remedy)
    if ours:
        cause = "this packing was withdrawn, and the cluster went on where it came from"
        raise Failure("refused", step, cause, "freeze it there anew")
    if look(machine, name).state != "absent":
        raise Failure(
            "refused", step, "there is a cluster of this name on this host, with data of its own",
            f"is it the right host? otherwise hostctl k3d delete {name} --confirm {name}",
        )  # fmt: skip


def move_import(machine: Machine, spec: dict[str, Any]) -> Result:
    """Unpacks a cluster that was received, when each file has its checksum, into directories that
    are empty. The next `k3d ensure` brings it up; nothing is ever written over."""
    wanted = checked(spec, IMPORT_MOVE_SPEC, "move import")
    name, step = wanted["name"], f"importing cluster {wanted['name']}"
    storage = wanted["storage_dir"]
    data = f"{wanted['datastore_dir'] or f'{storage}-server'}/server-0"
    directory = _received(wanted)
    with cluster_lock(machine, name):
        _refuse_other(machine, wanted, step)
        record = read_record(machine, name)
        move = record.get("move") or {}
        if move.get("nonce") != wanted["nonce"]:
            _refuse_damaged(machine, wanted["files"], directory, step)
            content = json.loads(machine.read(f"{directory}/cluster.json"))
            if (content["name"], content["nonce"]) != (name, wanted["nonce"]):
                cause = f"{directory}/cluster.json is of another packing"
                raise Failure("refused", step, cause, "copy it anew")
            for path in (storage, data):
                if not machine.is_empty(path):
                    raise Failure(
                        "refused", step, f"{path} is not empty",
                        f"look what it holds, then move it away: mv {path} {path}.old",
                    )  # fmt: skip
            move = {
                "role": "to",
                "step": "volumes",
                "at": utc(machine.now()),
                **{key: content[key] for key in ("nonce", "identity", "image", "connectors")},
                "directory": directory,
                "storage_dir": storage,
                "data": data,
            }
            write_record(machine, name, move=move)
        if move["step"] == "volumes":
            _unpack_volumes(machine, move, step)
            _advance(machine, name, move, "datastore")
        if move["step"] == "datastore":
            machine.make_directory(os.path.dirname(data), 0o700, "root", "root")
            if machine.is_empty(data):
                restore_datastore(machine, name, directory, data, move["nonce"])
            _keep_secrets(machine, name, directory)
            content = json.loads(machine.read(f"{directory}/cluster.json"))
            kept = {key: content[key] for key in ("identity", "incarnation", "argocd")}
            write_record(machine, name, **kept)
            _advance(machine, name, move, "imported")
    return {"step": move["step"], "identity": move["identity"]}


def _refuse_damaged(
    machine: Machine, files: list[dict[str, Any]], directory: str, step: str
) -> None:
    named = {file["name"]: file["sha256"] for file in files}
    wrong = [
        file
        for file in _FILES
        if not machine.exists(f"{directory}/{file}")
        or machine.checksum(f"{directory}/{file}") != named.get(file)
    ]
    if wrong:
        cause = f"{', '.join(wrong)} in {directory} are not what was packed"
        raise Failure("refused", step, cause, "copy again; nothing was unpacked")


def _unpack_volumes(machine: Machine, move: Mapping[str, Any], step: str) -> None:
    """Beside their place first: they are whole there, or not there."""
    storage, aside = move["storage_dir"], f"{move['storage_dir']}.{move['nonce']}"
    archive = [
        "--xattrs",
        "--acls",
        "--numeric-owner",
        "--file",
        f"{move['directory']}/storage.tar",
    ]
    compare = ["tar", "--compare", *archive, "--directory"]
    if not machine.is_empty(storage):
        # A run before this one was cut off after the last line here.
        run_copy(machine, [*compare, storage], step, storage)
        return
    machine.make_directory(os.path.dirname(storage), 0o755)
    run_copy(machine, ["rm", "-r", "-f", aside], step, aside)
    machine.make_directory(aside, 0o755, "root", "root")
    extract = ["tar", "--extract", "--same-owner", "--same-permissions", *archive]
    run_copy(machine, [*extract, "--directory", aside], step, aside)
    run_copy(machine, [*compare, aside], step, aside)
    machine.rename(aside, storage)


def _keep_secrets(machine: Machine, name: str, directory: str) -> None:
    content = json.loads(machine.read(f"{directory}/cluster.json"))
    machine.make_directory(f"{STATE_DIRECTORY}/clusters/{name}", 0o755)
    opens = json.dumps({key: content[key] for key in ("token", "password")})
    machine.write_atomic(MOVED_SECRETS % name, opens.encode(), 0o600)
    if content["password"]:
        machine.write_atomic(MOVED_PASSWORD % name, content["password"].encode(), 0o600)


def move_verify(machine: Machine, spec: dict[str, Any]) -> Result:
    """Whether the moved cluster is up, is the one that was frozen, and has all its nodes ready and
    its volumes bound. Changes nothing."""
    name = checked(spec, NAME_SPEC, "move verify")["name"]
    move = _arrived(machine, name, f"verifying cluster {name}")
    return _verified(machine, name, move)


def _arrived(machine: Machine, name: str, step: str) -> dict[str, Any]:
    move = read_record(machine, name).get("move") or {}
    if move.get("role") != "to" or move["step"] not in ("up", "open"):
        at = move["step"] if move else "not begun"
        cause = f"its move to this host is {at}"
        raise Failure("refused", step, cause, "import it, then pulumi up (docs/move.md)")
    return move


def _verified(machine: Machine, name: str, move: Mapping[str, Any]) -> Result:
    step = f"verifying cluster {name}"
    cluster = present_cluster(machine, name, "verifying")
    if cluster.state != "running":
        raise Failure("failed", step, cluster.detail, f"hostctl k3d start {name}")
    credentials = node_kubeconfig(machine, cluster)
    identity = identity_of(name, credentials) if credentials else None
    if identity != move["identity"]:
        cause = f"its identity is {identity}, and was {move['identity']}"
        raise Failure("failed", step, cause, f"hostctl move withdraw {name}; then move back")
    asked = {"nodes": "Ready", "persistentvolumeclaims": "bound"}
    found: dict[str, list[str]] = {}
    for kind, well in asked.items():
        every = ["--all-namespaces"] if kind != "nodes" else []
        argv = _in_node(cluster, "get", kind, *every, "--output=json")
        seen = run_tool(machine, argv, step, "cannot-tell")
        items = parse_json(seen.out, step)["items"]
        wrong = [one["metadata"]["name"] for one in items if not _is_well(kind, one)]
        found[kind] = sorted(one["metadata"]["name"] for one in items)
        if wrong:
            raise Failure(
                "failed", step, f"{kind} not {well}: {', '.join(wrong)}",
                "give it a minute and verify again; kubectl describe says why",
            )  # fmt: skip
    return {
        "identity": identity,
        "nodes": found["nodes"],
        "claims": found["persistentvolumeclaims"],
    }


def _is_well(kind: str, one: Mapping[str, Any]) -> bool:
    status = one.get("status") or {}
    if kind != "nodes":
        # One that waits for its first pod was never bound.
        return status.get("phase") != "Lost"
    conditions = {each["type"]: each["status"] for each in status.get("conditions") or []}
    return conditions.get("Ready") == "True"


def move_cutover(machine: Machine, spec: dict[str, Any]) -> Result:
    """The one step from which on this host serves: verifies the moved cluster, then gives the
    tunnels' connectors the pods that they had. Records point to the tunnel and stay."""
    name = checked(spec, NAME_SPEC, "move cutover")["name"]
    step = f"cutting over to cluster {name}"
    with cluster_lock(machine, name):
        move = _arrived(machine, name, step)
        result = _verified(machine, name, move)
        cluster = look(machine, name)
        for one in move["connectors"] or []:
            _scale_connector(machine, cluster, one, one["replicas"], step)
        if move["step"] != "open":
            _advance(machine, name, move, "open")
    return result


def move_withdraw(machine: Machine, spec: dict[str, Any]) -> Result:
    """Takes the moved cluster from the host that it came to, for the way back: its containers go,
    what was written there since is set aside."""
    name = checked(spec, NAME_SPEC, "move withdraw")["name"]
    kept = []
    with cluster_lock(machine, name):
        move = read_record(machine, name).get("move") or {}
        if move.get("role") != "to":
            return {"withdrawn": False, "kept": []}
        if move["step"] != "withdrawn":
            _advance(machine, name, move, "withdrawing")
            cluster = look(machine, name)
            if cluster.state != "absent":
                stop(machine, cluster)
                delete(machine, name)
            for path in (move["storage_dir"], move["data"]):
                aside = f"{path}.withdrawn-{move['nonce']}"
                if not machine.is_empty(path):
                    machine.rename(path, aside)
            for path in (MOVED_SECRETS % name, MOVED_PASSWORD % name):
                machine.remove(path)
            # The next to come here is another making, whatever its identity.
            write_record(machine, name, identity=None, argocd=None)
            _advance(machine, name, move, "withdrawn")
        for path in (move["storage_dir"], move["data"]):
            aside = f"{path}.withdrawn-{move['nonce']}"
            kept += [aside] if machine.exists(aside) else []
    return {"withdrawn": True, "kept": kept}
