"""Verbs: scheduled backups of volumes, databases and the datastore."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hostctl.cluster import Cluster, Node, look, parse_json
from hostctl.cluster_backup import BACKUP_SPARE_BYTES, datastore_of, time_stamp, utc
from hostctl.k3s_datastore import k3s_record
from hostctl.k3s_node import K3S_BINARY, K3S_KUBECONFIG, k3s_look
from hostctl.live import DATASTORE_IN_NODE, STORAGE_IN_NODE
from hostctl.machine import PROGRESS_SECONDS, Machine, Ran
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, record_run, write_record
from hostctl.restic import TARGET_ITEM, copy_out, open_repository
from hostctl.spec import (
    CLUSTER_NAME,
    DNS_LABEL,
    NAME_SPEC,
    OBJECT_NAME,
    POSTGRES_NAME,
    POSTGRES_WORKLOAD,
    SCALED_WORKLOAD,
    Items,
    Value,
    absolute_path,
    checked,
    number_between,
    one_of,
    or_null,
)
from hostctl.tools import run_tool
from hostctl.waiting import size_text

BACKUP_SECONDS = 24 * 3600.0
SCALE_SECONDS = 600.0
BACKUP_ITEM: dict[str, Any] = {
    "name": Value(DNS_LABEL),
    "kind": Value(one_of("volume", "postgres", "directory", "datastore")),
    "namespace": Value(or_null(DNS_LABEL), None),
    "stale_after_hours": Value(or_null(number_between(1, 87600)), None),
    "claim": Value(or_null(OBJECT_NAME), None),
    "path": Value(or_null(absolute_path), None),
    "scale_down": Value(or_null(SCALED_WORKLOAD), None),
    "workload": Value(or_null(POSTGRES_WORKLOAD), None),
    "container": Value(or_null(DNS_LABEL), None),
    "database": Value(or_null(POSTGRES_NAME), None),
    "user": Value(or_null(POSTGRES_NAME), None),
}
BACKUP_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "keep": Value(number_between(1, 10000), 14),
    "items": Items(BACKUP_ITEM),
    "targets": Items(TARGET_ITEM, []),
}
_NEEDED = {
    "volume": ("namespace", "claim"),
    "postgres": ("namespace", "workload", "database", "user"),
    "directory": ("path",),
}
_TAKEN = re.compile(r"(\d{8}T\d{6}\.\d{6}Z)\.(tar|dump)(\.sha256)?")


def incomplete_items(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the items of a backup lack or have twice, in words."""
    wrong = [
        f"items[{n}].{key}: missing for kind {item['kind']}"
        for n, item in enumerate(items)
        for key in _NEEDED.get(item["kind"], ())
        if item[key] is None
    ]
    names = [item["name"] for item in items]
    twice = sorted({name for name in names if names.count(name) > 1 and name})
    return wrong + [f"items: {name} is there twice" for name in twice]


def backup_run(machine: Machine, spec: dict[str, Any]) -> Result:
    """Takes a backup of each item next to the live storage directory (incident 6), verifies it, and
    removes those beyond the newest `keep`; then copies each to every target by restic.

    A volume is copied from the directory that is mounted now, while the workload that writes to it
    is scaled to 0 if `scale_down` names one; a database is dumped in its own pod, with the rights
    that the pod's local socket gives. A backup is there when its .sha256 is, which is written last.
    A source that nobody has written to for `stale_after_hours` is an error and no backup. One item
    that fails does not keep the others from being taken; the verb then fails and names each.
    """
    wanted = checked(spec, BACKUP_SPEC, "backup run")
    name = wanted["cluster"]
    wrong = incomplete_items(wanted["items"])
    if wrong:
        raise Failure("bad-spec", "spec of backup run", "; ".join(wrong), "correct the settings")
    taken: dict[str, Any] = {}
    failed: dict[str, Failure] = {}
    backup_recover(machine, {"name": name})
    with machine.lock(f"backup-{name}"):
        for item in wanted["items"]:
            try:
                # One lock an item: whoever wants to change the cluster waits for the item alone.
                with cluster_lock(machine, name):
                    taken[item["name"]] = _take(machine, name, item, wanted["keep"])
            except (Failure, OSError) as error:
                failed[item["name"]] = failure = as_failure(error, item["name"])
                say(f"{failure.step}: {failure.cause}")
        files = {item: one["file"] for item, one in taken.items()}
        for target in wanted["targets"] if files else []:
            try:
                open_repository(machine, name, target, make=True)
                copy_out(machine, name, target, files)
            except (Failure, OSError) as error:
                what = f"target {target['name']}"
                failed[what] = failure = as_failure(error, what)
                say(f"{failure.step}: {failure.cause}")
    causes = "; ".join(f"{item}: {failure.cause}" for item, failure in failed.items())
    with cluster_lock(machine, name):
        record_run(machine, name, "backup", utc(machine.now()), causes)
    if failed:
        first = next(iter(failed.values()))
        raise Failure(
            first.code,
            f"backing up {', '.join(failed)} of cluster {name}",
            causes,
            "; ".join(dict.fromkeys(failure.remedy for failure in failed.values()))
            + f"; then hostctl backup run {name}",
        )
    return {"items": taken}


def as_failure(error: Exception, item: str) -> Failure:
    if isinstance(error, Failure):
        return error
    cause = f"{type(error).__name__}: {error}"
    return Failure("failed", f"backing up {item}", cause, "run it as root; is the disk full?")


def backup_list(machine: Machine, spec: dict[str, Any]) -> Result:
    """Lists the backups of a cluster, also of one that is gone: by item, time, file and size."""
    name = checked(spec, NAME_SPEC, "backup list")["name"]
    directory = read_record(machine, name).get("backups")
    if not directory:
        directory = backups_beside(running_cluster(machine, name, "listing the backups of"))
    items: dict[str, Any] = {}
    for item in machine.names(directory):
        items[item] = [
            {"time": stem, "file": path, "bytes": machine.file_bytes(path)}
            for stem, path in whole_backups(machine, f"{directory}/{item}")
        ]
    return {"directory": directory, "items": items}


def backup_recover(machine: Machine, spec: dict[str, Any]) -> Result:
    """Scales back what a backup had scaled to 0 when it was cut off, to the number it had before,
    drops the scratch databases of a verification that was, and ends a restore's renaming of
    databases. Runs before every backup and after the cluster's start at boot."""
    name = checked(spec, NAME_SPEC, "backup recover")["name"]
    recovered = []
    with cluster_lock(machine, name):
        scaled = read_record(machine, name).get("scaled")
        if scaled:
            cluster = running_cluster(machine, name, "scaling back workloads of")
            _scale_back(machine, cluster, scaled)
            recovered.append(f"{scaled['namespace']}/{scaled['workload']}")
    record = read_record(machine, name)
    if record.get("scratch") or record.get("renaming"):
        with machine.lock(f"backup-{name}"):
            recovered += drop_leftovers(machine, name)
            try:
                renamed = finish_rename(machine, name)
                recovered += [f"{renamed['namespace']}/{renamed['database']}"] if renamed else []
            except Failure as failure:
                # No reason to have no backup until then.
                say(f"{failure.step}: {failure.cause}")
    return {"recovered": recovered}


def running_cluster(machine: Machine, name: str, doing: str) -> Cluster:
    """The cluster, which runs: in Docker, or as k3s whose server is this machine."""
    if k3s_record(machine, name):
        return _own_server(machine, name, doing)
    cluster = look(machine, name)
    if cluster.state != "running":
        remedy = "hostctl k3d ensure" if cluster.state == "absent" else "hostctl k3d start"
        raise Failure(
            "refused", f"{doing} cluster {name}", f"it is {cluster.state}", f"{remedy} {name}"
        )
    return cluster


def _own_server(machine: Machine, name: str, doing: str) -> Cluster:
    node = k3s_look(machine, name)
    if node is None or node.role != "server" or node.state != "running":
        state = "there is no k3s here" if node is None else f"this {node.role} is {node.state}"
        raise Failure(
            "refused",
            f"{doing} cluster {name}",
            state,
            "run it on the server that is the stack's host (homelab:host); systemctl start k3s",
        )
    # What k3s has at a path is there for the machine, too.
    places = ("/", STORAGE_IN_NODE, DATASTORE_IN_NODE)
    facts = {"Mounts": [{"Destination": one, "Source": one} for one in places]}
    own = Node(node.node or "", "server", "running", facts)
    return Cluster(name, "running", "", [own], None, on_machine=True)


def backups_beside(cluster: Cluster) -> str:
    storage = cluster.first.mount(STORAGE_IN_NODE)
    if not storage:
        raise Failure(
            "refused",
            f"looking for the backups of cluster {cluster.name}",
            f"{cluster.first.name} has no mount at {STORAGE_IN_NODE}",
            f"set homelab:cluster.recreate to {cluster.name}, which makes it with one",
        )
    return f"{storage.rstrip('/')}-backups/{cluster.name}"


def _take(machine: Machine, name: str, item: Mapping[str, Any], keep: int) -> dict[str, Any]:
    """Takes one backup and returns what it made. The caller holds the cluster's lock."""
    cluster = running_cluster(machine, name, f"backing up {item['name']} of")
    parent = backups_beside(cluster)
    directory = f"{parent}/{item['name']}"
    for path in (parent.rpartition("/")[0], parent, directory):
        machine.make_directory(path, 0o700)
    if read_record(machine, name).get("backups") != parent:
        write_record(machine, name, backups=parent)
    _remove_unfinished(machine, directory)
    started = machine.now()
    kind = "dump" if item["kind"] == "postgres" else "tar"
    path = f"{directory}/{time_stamp(machine)}.{kind}"
    part = f"{path}.part"
    say(f"backing up {item['name']} to {path}")
    try:
        if item["kind"] == "postgres":
            _dump_database(machine, cluster, item, part)
        elif item["kind"] == "datastore":
            _copy_datastore(machine, cluster, part)
        else:
            _copy_tree(machine, cluster, item, part)
        sum_ = machine.checksum(part)
        machine.publish(part, path)
    except BaseException:
        machine.remove(part)
        raise
    line = f"{sum_}  {path.rpartition('/')[2]}\n"
    machine.write_atomic(f"{path}.sha256", line.encode(), 0o600)
    removed = _remove_old(machine, directory, keep)
    return {
        "file": path,
        "bytes": machine.file_bytes(path),
        "seconds": round(machine.now() - started),
        "removed": removed,
    }


def whole_backups(machine: Machine, directory: str) -> list[tuple[str, str]]:
    """Time and path of each whole backup in a directory, the newest first."""
    names = set(machine.names(directory))
    found = [_TAKEN.fullmatch(name) for name in names]
    return sorted(
        (
            (match.group(1), f"{directory}/{match.group(1)}.{match.group(2)}")
            for match in found
            if match and match.group(3) and match.group(0)[: -len(".sha256")] in names
        ),
        reverse=True,
    )


def _remove_unfinished(machine: Machine, directory: str) -> None:
    """What a run left that was killed before its backup was whole."""
    whole = {path for _, path in whole_backups(machine, directory)}
    for name in machine.names(directory):
        path = f"{directory}/{name}"
        if name.endswith(".part") or (_TAKEN.fullmatch(name) and not whole & {path, path[:-7]}):
            say(f"removing {path}, which an earlier run did not finish")
            machine.remove(path)


def _remove_old(machine: Machine, directory: str, keep: int) -> list[str]:
    """Removes all but the newest whole backups; one was just made, so the last is never removed."""
    old = [path for _, path in whole_backups(machine, directory)[keep:]]
    for path in old:
        machine.remove(f"{path}.sha256")
        machine.remove(path)
    return old


def require_room(machine: Machine, path: str, size: int, step: str) -> None:
    needed = size + size // 10 + BACKUP_SPARE_BYTES
    free = machine.free_bytes(path)
    if free < needed:
        cause = f"{path} has room for {size_text(free)}, needed are {size_text(needed)}"
        raise Failure("refused", step, cause, "make room there, or keep fewer backups")


def _refuse_stale(machine: Machine, item: Mapping[str, Any], written: float, step: str) -> None:
    hours = (machine.now() - written) / 3600
    if item["stale_after_hours"] and hours > item["stale_after_hours"]:
        raise Failure(
            "refused",
            step,
            f"nobody has written to it for {hours:.0f} h, allowed are {item['stale_after_hours']}",
            "see whether this is still what the workload writes to (incident 6); if it rests for "
            "good, correct the item's staleAfterHours or remove it",
        )


# Volumes and directories


def _copy_tree(machine: Machine, cluster: Cluster, item: Mapping[str, Any], part: str) -> None:
    what = item["path"] or f"volume {item['namespace']}/{item['claim']}"
    step = f"backing up {what}"
    source = item["path"] or claim_directory(machine, cluster, item, step)
    newest = machine.newest(source)
    if newest is None:
        raise Failure(
            "refused",
            step,
            f"{source} holds no file",
            f"correct homelab:backups.items.{item['name']}",
        )
    _refuse_stale(machine, item, newest, step)
    require_room(machine, part, machine.tree_bytes(source), step)

    def run(argv: Sequence[str], doing: str) -> Ran:
        def tick(waited: float) -> None:
            say(f"{doing}: {waited:.0f} s, {size_text(machine.file_bytes(part))}")

        return run_tool(
            machine, argv, doing, "failed", timeout=BACKUP_SECONDS, tick=tick, ends_with_us=True
        )

    pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", part]
    compare = ["tar", "--compare", "--xattrs", "--acls", "--file", part, "--directory", source]
    resting = scaled_down(machine, cluster, item, step) if item["scale_down"] else None
    with resting or contextlib.nullcontext():
        try:
            run([*pack, "--directory", source, "."], step)
            run(compare, f"verifying the backup of {what}")
        except Failure as failure:
            if item["scale_down"] or failure.code != "failed":
                raise
            remedy = "if it changed while it was copied, name who writes to it in scaleDown"
            raise Failure(failure.code, failure.step, failure.cause, remedy) from None
    machine.set_access(part, 0o600, None, None)


def claim_directory(machine: Machine, cluster: Cluster, item: Mapping[str, Any], step: str) -> str:
    """The directory of the host that holds the claim's data: what the live PersistentVolume names,
    seen through what is mounted into its node now, never through the settings (incident 6)."""
    claim = _get(
        machine, cluster, f"persistentvolumeclaims/{item['claim']}", item["namespace"], step
    )
    bound = claim["spec"].get("volumeName")
    if not bound:
        remedy = f"correct homelab:backups.items.{item['name']}, or let a pod use the claim"
        raise Failure("refused", step, "the claim is bound to no volume", remedy)
    volume = _get(machine, cluster, f"persistentvolumes/{bound}", None, step)["spec"]
    path = (volume.get("hostPath") or volume.get("local") or {}).get("path")
    if not path or ".." in path.split("/"):
        raise Failure(
            "refused",
            step,
            f"PersistentVolume {bound} is no directory of a node",
            "only volumes of the local-path and local kinds are copied; back this one up where it "
            "is stored",
        )
    holders = _nodes_of(volume)
    if cluster.on_machine and holders and cluster.first.name not in holders:
        raise Failure(
            "refused",
            step,
            f"its data is on node {', '.join(sorted(holders))}, and this machine is "
            f"{cluster.first.name}",
            "let its workload run here (nodeSelector), or keep it on a class with backups of its "
            "own, such as Longhorn's (docs/storage.md)",
        )
    node = next((one for one in cluster.nodes if one.name in holders), cluster.first)
    mounts = [
        (mount["Destination"].rstrip("/"), mount["Source"])
        for mount in node.facts.get("Mounts") or []
        if f"{path}/".startswith(mount["Destination"].rstrip("/") + "/")
    ]
    if not mounts:
        raise Failure(
            "refused",
            step,
            f"{path} in {node.name} is on no mount of the host",
            "its data goes with the container: move it to a volume of storage class local-path",
        )
    inside, outside = max(mounts, key=lambda mount: len(mount[0]))
    directory = outside.rstrip("/") + path[len(inside) :]
    seen = machine.stat(directory)
    if seen is None or seen.kind != "directory":
        raise Failure(
            "failed",
            step,
            f"{directory}, which {node.name} shows at {path}, is not there",
            f"see what is mounted: docker inspect --format '{{{{json .Mounts}}}}' {node.name}",
        )
    return directory


def _nodes_of(volume: Mapping[str, Any]) -> set[str]:
    required = (volume.get("nodeAffinity") or {}).get("required") or {}
    return {
        value
        for term in required.get("nodeSelectorTerms") or []
        for expression in term.get("matchExpressions") or []
        if expression.get("key") == "kubernetes.io/hostname"
        for value in expression.get("values") or []
    }


@contextlib.contextmanager
def scaled_down(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], step: str
) -> Iterator[None]:
    """Holds the workload at 0 pods. Its number goes into the record first, so that `backup recover`
    scales it back even after a kill."""
    workload, namespace = item["scale_down"], item["namespace"]
    before = _get(machine, cluster, workload, namespace, step)
    replicas = before["spec"].get("replicas", 1)
    pods = _pods_of(before)
    if replicas:
        scaled = {"namespace": namespace, "workload": workload, "replicas": replicas}
        write_record(machine, cluster.name, scaled=scaled)
        try:
            say(f"scaling {workload} from {replicas} to 0")
            _scale(machine, cluster, scaled, 0, step)
            rested = _wait_for_no_pods(machine, cluster, item, pods, step)
            yield
            _refuse_disturbed(machine, cluster, item, pods, rested, step)
        finally:
            _scale_back(machine, cluster, scaled)
    else:
        rested = _wait_for_no_pods(machine, cluster, item, pods, step)
        yield
        _refuse_disturbed(machine, cluster, item, pods, rested, step)


def _scale(
    machine: Machine, cluster: Cluster, scaled: Mapping[str, Any], replicas: int, step: str
) -> None:
    arguments = ["scale", scaled["workload"], f"--namespace={scaled['namespace']}"]
    kubectl_in_node(machine, cluster, [*arguments, f"--replicas={replicas}"], step)


def _scale_back(machine: Machine, cluster: Cluster, scaled: Mapping[str, Any]) -> None:
    workload, replicas = scaled["workload"], scaled["replicas"]
    step = f"scaling {scaled['namespace']}/{workload} back to {replicas}"
    say(step)
    try:
        now = _get(machine, cluster, workload, scaled["namespace"], step)
        if now["spec"].get("replicas", 1) == 0:
            _scale(machine, cluster, scaled, replicas, step)
    except Failure as failure:
        if "(NotFound)" not in failure.cause:
            remedy = f"it is still scaled down: hostctl backup recover {cluster.name}"
            raise Failure("failed", step, failure.cause, remedy) from None
        say(f"{workload} is gone")
    write_record(machine, cluster.name, scaled=None)


def _pods_of(workload: Mapping[str, Any]) -> str:
    labels = (workload["spec"].get("selector") or {}).get("matchLabels") or {}
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def _wait_for_no_pods(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], pods: str, step: str
) -> int | None:
    """Waits until the last pod has ended; a Deployment's own count leaves out those that are
    ending. Returns the generation of the workload's spec."""
    waited = 0.0
    while _pods(machine, cluster, item, pods, step):
        if waited >= SCALE_SECONDS:
            cause = f"pods of {item['scale_down']} have not ended after {waited:.0f} s"
            remedy = f"kubectl get pods --namespace={item['namespace']} --selector={pods}"
            raise Failure("timed-out", step, cause, remedy)
        say(f"waiting for the pods of {item['scale_down']} to end: {waited:.0f} s")
        machine.sleep(PROGRESS_SECONDS)
        waited += PROGRESS_SECONDS
    now = _get(machine, cluster, item["scale_down"], item["namespace"], step)
    return now["metadata"].get("generation")


def _refuse_disturbed(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    pods: str,
    rested: int | None,
    step: str,
) -> None:
    now = _get(machine, cluster, item["scale_down"], item["namespace"], step)
    up = now["spec"].get("replicas", 1) or now["metadata"].get("generation") != rested
    if up or _pods(machine, cluster, item, pods, step):
        raise Failure(
            "failed",
            step,
            f"someone scaled {item['scale_down']} up while it was copied",
            "if ArgoCD heals it by itself, let it ignore the difference at /spec/replicas of this "
            "workload (ignoreDifferences with RespectIgnoreDifferences=true)",
        )


def _pods(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], pods: str, step: str
) -> list[Any]:
    arguments = ["get", "pods", f"--namespace={item['namespace']}", f"--selector={pods}"]
    ran = kubectl_in_node(machine, cluster, [*arguments, "--output=json"], step)
    return [
        pod
        for pod in parse_json(ran.out, step)["items"]
        if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
    ]


def _get(
    machine: Machine, cluster: Cluster, what: str, namespace: str | None, step: str
) -> dict[str, Any]:
    where = [f"--namespace={namespace}"] if namespace else []
    ran = kubectl_in_node(machine, cluster, ["get", what, *where, "--output=json"], step)
    return parse_json(ran.out, step)


def kubectl_in_node(
    machine: Machine, cluster: Cluster, arguments: Sequence[str], step: str, **options: Any
) -> Ran:
    """Runs kubectl in the first server: it needs nothing of the host, and asks this cluster."""
    attach = ["--interactive"] if "from_file" in options else []
    argv = ["docker", "exec", *attach, cluster.first.name, "kubectl", *arguments]
    if cluster.on_machine:
        argv = [K3S_BINARY, "kubectl", f"--kubeconfig={K3S_KUBECONFIG}", *arguments]
    return run_tool(machine, argv, step, "failed", **options)


# The cluster's datastore


def _copy_datastore(machine: Machine, cluster: Cluster, part: str) -> None:
    """The server's directory, with token and certificates, and in it SQLite as one moment has it:
    what a running server has open is never copied as a file."""
    step = f"backing up the datastore of cluster {cluster.name}"
    data = datastore_of(cluster.first) or ""
    database = f"{data}/{_SQLITE}"
    if not machine.exists(database):
        cause = f"{database} is not there: its datastore is etcd"
        remedy = "remove the item; k3s makes snapshots of its etcd, and a directory is an item, too"
        raise Failure("refused", step, cause, remedy)
    require_room(machine, part, 2 * machine.tree_bytes(data), step)
    aside = f"{part}.aside"
    run_tool(machine, ["rm", "-r", "-f", aside], step, "failed")
    try:
        machine.make_directory(f"{aside}/{_SQLITE.rpartition('/')[0]}", 0o700)
        wrong = machine.copy_database(database, f"{aside}/{_SQLITE}")
        if wrong:
            raise Failure("failed", step, wrong, "is the server still starting? try again")
        options: dict[str, Any] = {"timeout": BACKUP_SECONDS, "ends_with_us": True}
        pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", part]
        without = ["--exclude=./db", "--exclude=*.sock", "--directory", data, "."]
        run_tool(machine, [*pack, *without], step, "failed", **options)
        add = ["tar", "--append", "--file", part, "--directory", aside, "./db"]
        run_tool(machine, add, step, "failed", **options)
    finally:
        run_tool(machine, ["rm", "-r", "-f", aside], step, "failed")
    machine.set_access(part, 0o600, None, None)


_SQLITE = "db/state.db"


# Databases


def _dump_database(machine: Machine, cluster: Cluster, item: Mapping[str, Any], part: str) -> None:
    """pg_dump and pg_restore of the pod itself: always those of the server's version, over its
    local socket, with no password anywhere."""
    step = f"backing up database {item['namespace']}/{item['database']}"
    first = os.path.basename(part).partition(".dump")[0]
    size = _measure(machine, cluster, item, first, step)
    require_room(machine, part, size, step)

    def tick(waited: float) -> None:
        say(f"{step}: {waited:.0f} s, {size_text(machine.file_bytes(part))}")

    options: dict[str, Any] = {"timeout": BACKUP_SECONDS, "tick": tick, "ends_with_us": True}
    dump = ["pg_dump", "--format=custom", *_login(item)]
    in_pod(machine, cluster, item, dump, step, to_file=part, **options)
    verify = f"verifying the backup of database {item['namespace']}/{item['database']}"
    # Not --list, which reads the beginning alone and is content with a dump that was cut off.
    restore = ["pg_restore", "--file=/dev/null"]
    in_pod(machine, cluster, item, restore, verify, from_file=part, **options)


def _measure(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], first: str, step: str
) -> int:
    """The size of the database. Refuses one whose counters of written rows have not moved for too
    long; what they were, and the first backup that holds that, is kept in the cluster's record."""
    query = (
        f"select pg_database_size(datname), {_WRITTEN} "
        "from pg_stat_database where datname = current_database()"
    )
    text = _psql(machine, cluster, item, item["database"], [query], step)
    size, bar, mark = text.strip().partition("|")
    if not bar or not size.isdigit():
        raise Failure("failed", step, f"psql printed {text[:80]!r}", "run psql by hand")
    written = read_record(machine, cluster.name).get("written") or {}
    if (written.get(item["name"]) or {}).get("mark") != mark:
        one = {"mark": mark, "since": machine.now(), "first": first}
        write_record(machine, cluster.name, written={**written, item["name"]: one})
        written = {item["name"]: one}
    _refuse_stale(machine, item, written[item["name"]]["since"], step)
    return int(size)


def _login(item: Mapping[str, Any]) -> list[str]:
    return ["--no-password", f"--username={item['user']}", f"--dbname={item['database']}"]


@contextlib.contextmanager
def scratch_database(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], step: str
) -> Iterator[str]:
    """The name of a database in the item's PostgreSQL that nobody else has, and which is dropped in
    the end. It is in the record before it is made, so that `backup recover` drops it even after a
    kill."""
    database = f"homelab_verify_{machine.nonce()}"
    scratch = {key: item[key] for key in ("namespace", "workload", "container", "user")}
    scratch["database"] = database
    # That dropdb knows no --force, before PostgreSQL 13, shows before there is anything to drop.
    drop_database(machine, cluster, item, database, step)
    with cluster_lock(machine, cluster.name):
        known = read_record(machine, cluster.name).get("scratch") or []
        write_record(machine, cluster.name, scratch=[*known, scratch])
    try:
        yield database
    finally:
        drop_scratch(machine, cluster, scratch, step)


def drop_leftovers(machine: Machine, name: str) -> list[str]:
    """Drops the scratch databases of verifications that were killed, and returns their names. The
    caller holds the lock of backups. One that cannot be dropped now is tried again next time: it is
    no reason to have no backup until then."""
    dropped = []
    for scratch in read_record(machine, name).get("scratch") or []:
        step = f"dropping scratch database {scratch['namespace']}/{scratch['database']}"
        try:
            cluster = running_cluster(machine, name, f"{step} of")
            drop_scratch(machine, cluster, scratch, step)
        except Failure as failure:
            say(f"{step}: {failure.cause}")
        else:
            dropped.append(f"{scratch['namespace']}/{scratch['database']}")
    return dropped


# The rows that PostgreSQL counted as written in a database, its own catalogs' too; the same text
# whatever the time zone of who asks.
_WRITTEN = (
    "concat_ws('/', datid, extract(epoch from stats_reset), tup_inserted, tup_updated, tup_deleted)"
)
_LOOK = f"""select json_build_object(
    'superuser', (select rolsuper from pg_roles where rolname = current_user),
    'databases', coalesce(json_object_agg(datname, json_build_object(
        'oid', oid::bigint,
        'written', (select {_WRITTEN} from pg_stat_database where datid = oid),
        'encoding', pg_encoding_to_char(encoding),
        'collate', datcollate,
        'ctype', datctype,
        'provider', coalesce(to_jsonb(d)->>'datlocprovider', 'c'),
        'locale', coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale')
    )), '{{}}'))
from pg_database d where datname in (%s)"""
_END_CONNECTIONS = """do $$ begin
    for n in 1..300 loop
        perform pg_stat_clear_snapshot();
        perform pg_terminate_backend(pid) from pg_stat_activity where datname in (%(names)s);
        exit when not found;
        perform pg_sleep(0.1);
    end loop;
end $$"""
# What belongs to the database itself and is in no dump of its content. Values of the settings that
# are lists of names are text of SQL already, which pg_dump's own code treats apart, too.
_TAKE_NAME = """do $$
declare
    was pg_database;
    owner text;
    one record;
    what text;
begin
    select * into was from pg_database where datname = '%(database)s';
    if found then
        owner := pg_get_userbyid(was.datdba);
        execute format('alter database %%I owner to %%I', '%(restored)s', owner);
        execute format('alter database %%I connection limit %%s', '%(restored)s', was.datconnlimit);
        if was.datacl is not null then
            execute format('revoke all on database %%I from public, %%I', '%(restored)s', owner);
        end if;
        for one in select * from aclexplode(was.datacl) loop
            execute format(
                'grant %%s on database %%I to %%s%%s', one.privilege_type, '%(restored)s',
                case one.grantee when 0 then 'public'
                    else quote_ident(pg_get_userbyid(one.grantee)) end,
                case when one.is_grantable then ' with grant option' else '' end);
        end loop;
        for one in
            select setrole, split_part(pair, '=', 1) as name,
                substr(pair, strpos(pair, '=') + 1) as value
            from pg_db_role_setting, unnest(setconfig) pair where setdatabase = was.oid
        loop
            what := case one.setrole when 0 then format('alter database %%I', '%(restored)s')
                else format('alter role %%I in database %%I', pg_get_userbyid(one.setrole),
                    '%(restored)s') end;
            if one.name in ('search_path', 'temp_tablespaces', 'local_preload_libraries',
                'session_preload_libraries') then
                perform set_config(one.name, one.value, true);
                execute format('%%s set %%I from current', what, one.name);
            else
                execute format('%%s set %%I to %%L', what, one.name, one.value);
            end if;
        end loop;
        execute format('alter database %%I rename to %%I', '%(database)s', '%(before)s');
        execute format('alter database %%I allow_connections true', '%(before)s');
    end if;
    execute format('alter database %%I rename to %%I', '%(restored)s', '%(database)s');
    execute format('alter database %%I allow_connections true', '%(database)s');
    if was.oid is not null then
        execute format('comment on database %%I is %%L', '%(database)s',
            shobj_description(was.oid, 'pg_database'));
    end if;
end $$"""


def look_at_databases(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], names: Sequence[str], step: str
) -> dict[str, Any]:
    """`databases`: what PostgreSQL knows of each that is there; `superuser`: whether the item's
    role is one."""
    query = _LOOK % ", ".join(f"'{name}'" for name in names)
    return json.loads(_psql(machine, cluster, item, _elsewhere(item), [query], step))


def take_name(machine: Machine, name: str, renaming: Mapping[str, Any], step: str) -> None:
    """Lets a restored database take the name of the one that it was made from, which is kept under
    another. PostgreSQL renames none that somebody is connected to: connections are refused and
    ended first; then both are renamed in one transaction.

    What was begun is in the record, so that `finish_rename` ends it after a kill. The caller holds
    the lock of backups."""
    with cluster_lock(machine, name):
        write_record(machine, name, renaming=dict(renaming))
    cluster = running_cluster(machine, name, f"{step} of")
    names = [renaming[key] for key in ("database", "restored")]
    there = look_at_databases(machine, cluster, renaming, names, step)["databases"]
    try:
        # By its number, which no other has: a name may be given to another.
        if (there.get(renaming["restored"]) or {}).get("oid") == renaming["oid"]:
            _rename(machine, cluster, renaming, there, step)
    except BaseException:
        _connections(machine, cluster, renaming, there, "true", step)
        with cluster_lock(machine, name):
            write_record(machine, name, renaming=None)
        raise
    before = renaming["before"]
    if look_at_databases(machine, cluster, renaming, [before], step)["databases"]:
        words = _exec(renaming, ["dropdb", f"--username={renaming['user']}", before])
        say(f"what was in {renaming['database']} is kept in database {before}; once it is of no "
            f"use: kubectl {' '.join(words)}")  # fmt: skip
    with cluster_lock(machine, name):
        known = read_record(machine, name).get("restored") or {}
        left = {item: one for item, one in known.items() if one["oid"] != renaming["oid"]}
        write_record(machine, name, renaming=None, restored=left)


def _rename(
    machine: Machine,
    cluster: Cluster,
    renaming: Mapping[str, Any],
    there: Mapping[str, Any],
    step: str,
) -> None:
    _connections(machine, cluster, renaming, there, "false", step)
    end = _END_CONNECTIONS % {"names": ", ".join(f"'{one}'" for one in there)}
    _psql(machine, cluster, renaming, _elsewhere(renaming), [end], step)
    # Who was connected has now told what it wrote.
    now = look_at_databases(machine, cluster, renaming, list(there), step)["databases"]
    refuse_written(machine, cluster.name, renaming, now, step)
    _psql(machine, cluster, renaming, _elsewhere(renaming), [_TAKE_NAME % renaming], step)


def finish_rename(machine: Machine, name: str) -> dict[str, Any] | None:
    """Ends what a restore had begun that was killed while it gave a database its name, and returns
    what that was. The caller holds the lock of backups."""
    renaming = read_record(machine, name).get("renaming")
    if renaming:
        step = f"giving {renaming['restored']} the name {renaming['database']}"
        take_name(machine, name, renaming, step)
    return renaming


def refuse_written(
    machine: Machine,
    name: str,
    renaming: Mapping[str, Any],
    there: Mapping[str, Any],
    step: str,
) -> None:
    """Refuses to replace a database that somebody wrote to after the backup, or of which that
    cannot be told, unless that is confirmed."""
    now = there.get(renaming["database"])
    if now is None or renaming["confirmed"]:
        return
    last = (read_record(machine, name).get("written") or {}).get(renaming["item"]) or {}
    same = last.get("mark") == now["written"] and "first" in last
    if same and renaming["taken"] >= last["first"]:
        return
    known = "first" in last
    cause = (
        f"{renaming['database']} was written to after the backup of {renaming['taken']}: its "
        "counters of rows are no longer those of then"
        if known
        else f"whether {renaming['database']} was written to after the backup of "
        f"{renaming['taken']} cannot be told: this host's record has no counters of rows of then"
    )
    remedy = (
        f"to put the older one in its place: --in-place --confirm {name}; what is there now is "
        "kept beside it, under another name"
    )
    raise Failure("refused", step, cause, remedy)


def _connections(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    there: Mapping[str, Any],
    allow: str,
    step: str,
) -> None:
    alter = [f'alter database "{one}" allow_connections {allow}' for one in there]
    _psql(machine, cluster, item, _elsewhere(item), alter, step)


def _elsewhere(item: Mapping[str, Any]) -> str:
    """The database to be connected to while the item's is renamed, as dropdb chooses it."""
    return "template1" if item["database"] == "postgres" else "postgres"


def _psql(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    database: str,
    statements: Sequence[str],
    step: str,
) -> str:
    """Runs statements, each in a transaction of its own, and returns what the last one shows."""
    options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1"]
    login = ["--no-password", f"--username={item['user']}", f"--dbname={database}"]
    commands = [f"--command={one}" for one in statements]
    return in_pod(machine, cluster, item, ["psql", *options, *login, *commands], step).text


def drop_scratch(machine: Machine, cluster: Cluster, scratch: Mapping[str, Any], step: str) -> None:
    drop_database(machine, cluster, scratch, scratch["database"], step)
    with cluster_lock(machine, cluster.name):
        known = read_record(machine, cluster.name).get("scratch") or []
        write_record(machine, cluster.name, scratch=[one for one in known if one != scratch])


def drop_database(
    machine: Machine, cluster: Cluster, item: Mapping[str, Any], database: str, step: str
) -> None:
    # By force: a pg_restore that outlived the hostctl that began it may still be connected.
    user = [f"--username={item['user']}", "--no-password"]
    in_pod(machine, cluster, item, ["dropdb", "--if-exists", "--force", *user, database], step)


def in_pod(
    machine: Machine,
    cluster: Cluster,
    item: Mapping[str, Any],
    argv: Sequence[str],
    step: str,
    **options: Any,
) -> Ran:
    attach = ["--stdin"] if "from_file" in options else []
    return kubectl_in_node(machine, cluster, _exec(item, argv, attach), step, **options)


def _exec(item: Mapping[str, Any], argv: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    container = [f"--container={item['container']}"] if item["container"] else []
    where = [item["workload"], f"--namespace={item['namespace']}", *container]
    return ["exec", *options, *where, "--", *argv]
