"""Verbs: scheduled backups of volumes, databases and the datastore."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hostctl.cluster import Cluster, parse_json
from hostctl.cluster_backup import (
    BACKUP_SECONDS,
    BACKUP_SPARE_BYTES,
    datastore_of,
    time_stamp,
    utc,
)
from hostctl.live import STORAGE_IN_NODE
from hostctl.machine import PROGRESS_SECONDS, Machine, Ran
from hostctl.postgres import (
    drop_leftovers,
    dump_database,
    finish_rename,
    measure_database,
)
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, record_run, write_record
from hostctl.restic import TARGET_ITEM, copy_out, open_repository
from hostctl.running import kubectl_in_node, running_cluster
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
            _dump(machine, cluster, item, part)
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


def _dump(machine: Machine, cluster: Cluster, item: Mapping[str, Any], part: str) -> None:
    step = f"backing up database {item['namespace']}/{item['database']}"
    size, written = measure_database(machine, cluster, item, part, step)
    _refuse_stale(machine, item, written, step)
    require_room(machine, part, size, step)
    dump_database(machine, cluster, item, part, step)
