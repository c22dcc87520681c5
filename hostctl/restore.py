"""Verbs: backups proved by restoring them, and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from hostctl.backups import (
    BACKUP_ITEM,
    as_failure,
    backups_beside,
    claim_directory,
    require_room,
    scaled_down,
    whole_backups,
)
from hostctl.cluster import Cluster, parse_json
from hostctl.cluster_backup import run_copy, seconds_of, time_stamp, utc
from hostctl.machine import Machine
from hostctl.postgres import (
    drop_leftovers,
    dump_stamp,
    finish_rename,
    put_in_place,
    restore_beside,
    restore_to_scratch,
    restored_before,
)
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, read_record, record_run, write_record
from hostctl.restic import TARGET_ITEM, fetch, open_repository, restic, snapshots_of
from hostctl.running import kubectl_in_node, running_cluster
from hostctl.spec import (
    CLUSTER_NAME,
    DNS_LABEL,
    Items,
    Value,
    absolute_path,
    boolean,
    checked,
    or_null,
    text_matching,
)
from hostctl.tools import run_tool

SCRATCH_DIRECTORY = "/var/lib/homelab/restored"
VERIFY_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "items": Items(BACKUP_ITEM),
    "targets": Items(TARGET_ITEM, []),
    "scratch": Value(absolute_path, SCRATCH_DIRECTORY),
}
RESTORE_SPEC: dict[str, Any] = {
    **VERIFY_SPEC,
    "item": Value(DNS_LABEL),
    "target": Value(or_null(DNS_LABEL), None),
    "snapshot": Value(
        or_null(text_matching(r"[0-9a-f]{8,64}|\d{8}T\d{6}\.\d{6}Z", "what a list shows")), None
    ),
    "into": Value(or_null(absolute_path), None),
    "in_place": Value(boolean, False),
    "confirm": Value(or_null(CLUSTER_NAME), None),
}


def backup_verify(machine: Machine, spec: dict[str, Any]) -> Result:
    """Restores the newest copy of each item from each target into a scratch place, and compares.

    A volume, directory or datastore is unpacked and compared with its archive, whose checksum is
    that of the original's; SQLite is asked for its integrity. A database is restored into a scratch
    one in the same PostgreSQL, which is dropped, by `backup recover` after a kill. When that was
    and how long it took is recorded, and previews tell it. Before that, what restic forgot is
    removed and the repository checked. One that fails does not keep the others from being verified.
    """
    wanted = checked(spec, VERIFY_SPEC, "backup verify")
    name = wanted["cluster"]
    verified: dict[str, dict[str, Any]] = {}
    failed: dict[str, Failure] = {}
    with machine.lock(f"backup-{name}"):
        drop_leftovers(machine, name)
        for target in wanted["targets"]:
            at = target["name"]
            try:
                open_repository(machine, name, target, make=False)
                restic(machine, name, target, ["prune", "--quiet"], f"pruning target {at}")
                restic(machine, name, target, ["check", "--quiet"], f"checking target {at}")
            except (Failure, OSError) as error:
                failed[f"target {at}"] = as_failure(error, f"target {at}")
                continue
            for item in wanted["items"]:
                try:
                    seen = _verify(machine, name, target, item, wanted["scratch"])
                except (Failure, OSError) as error:
                    what = f"{item['name']} at {at}"
                    failed[what] = failure = as_failure(error, what)
                    say(f"{failure.step}: {failure.cause}")
                else:
                    verified.setdefault(at, {})[item["name"]] = seen
                    with cluster_lock(machine, name):
                        before = read_record(machine, name).get("verified") or {}
                        of_target = {**before.get(at, {}), item["name"]: seen}
                        write_record(machine, name, verified={**before, at: of_target})
    causes = "; ".join(f"{what}: {failure.cause}" for what, failure in failed.items())
    with cluster_lock(machine, name):
        record_run(machine, name, "verify", utc(machine.now()), causes)
    if failed:
        first = next(iter(failed.values()))
        remedies = "; ".join(dict.fromkeys(failure.remedy for failure in failed.values()))
        step = f"verifying {', '.join(failed)} of cluster {name}"
        raise Failure(first.code, step, causes, f"{remedies}; then hostctl backup verify {name}")
    return {"verified": verified}


def verified_notes(
    machine: Machine, name: str, spec: Mapping[str, Any], verified: Mapping[str, Any]
) -> list[str]:
    """Which copies of which items were not restored lately enough, in words."""
    notes = []
    for target in spec["targets"]:
        at = target["name"]
        for item in spec["items"]:
            last = (verified.get(at) or {}).get(item["name"])
            days = (machine.now() - seconds_of(last["at"])) / 86400 if last else None
            if days is None or days > spec["verified_within_days"]:
                when = f"{days:.0f} days ago" if days is not None else "never"
                notes.append(
                    f"the copy of {item['name']} at {at} was verified {when}, allowed are "
                    f"{spec['verified_within_days']} days: hostctl backup verify {name}"
                )
    return notes


def _verify(
    machine: Machine, name: str, target: Mapping[str, Any], item: Mapping[str, Any], scratch: str
) -> dict[str, Any]:
    started = machine.now()
    directory = f"{scratch}/verify-{name}"
    step = f"verifying {item['name']} of target {target['name']}"
    _remove_tree(machine, directory, step)
    machine.make_directory(directory, 0o700)
    try:
        snapshot = _newest(machine, name, target, item["name"], None)
        path = _fetched(machine, name, target, snapshot, directory, step)
        if item["kind"] == "postgres":
            cluster = running_cluster(machine, name, f"verifying {item['name']} of")
            restore_to_scratch(machine, cluster, item, path, step)
        else:
            _unpack(machine, path, f"{directory}/tree", step)
            if item["kind"] == "datastore":
                there = f"{directory}/tree/db/state.db"
                wrong = machine.copy_database(there, f"{directory}/state.db")
                if wrong:
                    raise Failure("failed", step, wrong, "restore an older one")
        size = machine.file_bytes(path)
    finally:
        _remove_tree(machine, directory, step)
    now = machine.now()
    return {
        "at": utc(now),
        "taken": snapshot["time"],
        "snapshot": snapshot["id"][:8],
        "bytes": size,
        "recovery_seconds": round(now - started, 1),
    }


def backup_restore(machine: Machine, spec: dict[str, Any]) -> Result:
    """Restores an item from a target, or from the copies beside the storage directory, to where it
    was taken from. Run it again when it was cut off.

    A volume or directory is unpacked beside its place, compared, and swapped in while its workload
    rests; what was there is kept beside it. Files written later than the backup's newest are
    refused unless the cluster's name confirms it. A database is restored beside the one that is
    there, as DATABASE_restored, and with `in_place` takes its name, while what was there is kept as
    DATABASE_before_TIME; the same is refused where that was written to after the backup, or nobody
    knows. The datastore is restored only `into` a directory, as everything else may be.
    """
    wanted = checked(spec, RESTORE_SPEC, "backup restore")
    name, confirmed = wanted["cluster"], wanted["confirm"] == wanted["cluster"]
    step = f"restoring {wanted['item']} of cluster {name}"
    item = _one(wanted["items"], wanted["item"], "item", step)
    if wanted["into"] and wanted["in_place"]:
        cause = f"into {wanted['into']} and in_place are two places"
        raise Failure("bad-spec", step, cause, "name one of them")
    started = machine.now()
    with machine.lock(f"backup-{name}"):
        finish_swap(machine, name)
        ended = finish_rename(machine, name)
        if ended and ended["item"] == item["name"]:
            # All that this run was to do.
            return {key: ended[key] for key in ("restored", "from", "taken")} | {
                "restored": ended["database"],
                "seconds": round(machine.now() - started, 1),
            }
        if wanted["into"] is None and item["kind"] == "postgres":
            return _restore_postgres(machine, name, item, wanted, started, step)
        path, taken, done = _backup_of(machine, name, wanted, step)
        if wanted["into"]:
            to = _restore_into(machine, item, path, wanted["into"], step)
        elif item["kind"] == "datastore":
            remedy = "name an empty directory with --into; docs/host.md has the rest"
            raise Failure("refused", step, "a running server's datastore is not replaced", remedy)
        else:
            to = _restore_tree(machine, name, item, path, confirmed, step)
        if done:
            _remove_tree(machine, done, step)
    seconds = round(machine.now() - started, 1)
    return {"restored": to, "from": path, "taken": taken, "seconds": seconds}


def _one(all_: Any, name: str, what: str, step: str) -> dict[str, Any]:
    for one in all_:
        if one["name"] == name:
            return one
    known = ", ".join(one["name"] for one in all_) or "none"
    raise Failure("bad-spec", step, f"there is no {what} {name}", f"declared are: {known}")


def _backup_of(
    machine: Machine, name: str, wanted: Mapping[str, Any], step: str
) -> tuple[str, str, str | None]:
    """The path of the backup to restore, its time, and the directory to remove when that is
    done."""
    if wanted["target"]:
        target = _one(wanted["targets"], wanted["target"], "target", step)
        open_repository(machine, name, target, make=False)
        snapshot = _newest(machine, name, target, wanted["item"], wanted["snapshot"])
        # By its snapshot: a run that was cut off goes on with what it has.
        directory = f"{wanted['scratch']}/{name}-{snapshot['id'][:16]}"
        machine.make_directory(directory, 0o700)
        path = _fetched(machine, name, target, snapshot, directory, step)
        return path, snapshot["time"], directory
    parent = read_record(machine, name).get("backups")
    parent = parent or backups_beside(running_cluster(machine, name, "restoring a backup of"))
    found = whole_backups(machine, f"{parent}/{wanted['item']}")
    found = [one for one in found if wanted["snapshot"] in (None, one[0])]
    if not found:
        remedy = f"hostctl backup list {name}; or name a target"
        raise Failure("refused", step, f"no such backup in {parent}/{wanted['item']}", remedy)
    taken, path = found[0]
    if machine.checksum(path) != machine.read(f"{path}.sha256").split()[0].decode():
        cause = f"the checksum of {path} is not that of {path}.sha256"
        raise Failure("failed", step, cause, "name an older one, or a target")
    return path, taken, None


def _newest(
    machine: Machine, name: str, target: Mapping[str, Any], item: str, wanted: str | None
) -> dict[str, Any]:
    found = snapshots_of(machine, name, target, item)
    for snapshot in found:
        if snapshot["id"].startswith(wanted or ""):
            return snapshot
    there = ", ".join(f"{one['id'][:8]} of {one['time'][:19]}" for one in found[:5]) or "none"
    cause = f"target {target['name']} has no copy {wanted or ''} of {item}".replace("  ", " ")
    raise Failure("refused", f"looking for copies of {item}", cause, f"there are: {there}")


def _fetched(
    machine: Machine,
    name: str,
    target: Mapping[str, Any],
    snapshot: Mapping[str, Any],
    directory: str,
    step: str,
) -> str:
    # As an archive, and unpacked beside it.
    size = (snapshot.get("summary") or {}).get("total_bytes_processed", 0)
    require_room(machine, directory, 2 * size, step)
    return fetch(machine, name, target, snapshot, directory)


def _remove_tree(machine: Machine, path: str, step: str) -> None:
    run_tool(machine, ["rm", "-r", "-f", path], step, "failed")


def _unpack(machine: Machine, archive: str, to: str, step: str) -> None:
    """Unpacks an archive into a directory that is made anew, and compares the two."""
    _remove_tree(machine, to, step)
    machine.make_directory(to, 0o700)
    options = ["--xattrs", "--acls", "--numeric-owner", "--file", archive, "--directory", to]
    extract = ["tar", "--extract", "--same-owner", "--same-permissions", *options]
    run_copy(machine, extract, step, to)
    run_copy(machine, ["tar", "--compare", *options], step, to)


def _restore_into(
    machine: Machine, item: Mapping[str, Any], path: str, into: str, step: str
) -> str:
    """A directory that is not there yet, or empty, gets what the backup holds."""
    if machine.exists(into) and not machine.is_empty(into):
        raise Failure("refused", step, f"{into} is not empty", "name a directory that is not there")
    require_room(machine, into, machine.file_bytes(path), step)
    aside = f"{into}.restoring"
    if item["kind"] == "postgres":
        machine.make_directory(aside, 0o700)
        to = f"{aside}/{item['database']}.dump"
        run_copy(machine, ["cp", path, to], step, aside)
    else:
        _unpack(machine, path, aside, step)
    machine.rename(aside, into)
    return into


def _restore_tree(
    machine: Machine,
    name: str,
    item: Mapping[str, Any],
    path: str,
    confirmed: bool,
    step: str,
) -> str:
    with cluster_lock(machine, name):
        cluster = directory = None
        if item["path"]:
            directory = item["path"]
        else:
            cluster = running_cluster(machine, name, f"restoring {item['name']} of")
            directory = claim_directory(machine, cluster, item, step)
        aside = f"{directory}.restoring"
        require_room(machine, directory, machine.file_bytes(path), step)
        _unpack(machine, path, aside, step)
        rests = (
            scaled_down(machine, cluster, item, step) if cluster and item["scale_down"] else None
        )
        with rests or contextlib.nullcontext():
            if cluster:
                _refuse_in_use(machine, cluster, item, step)
            newest, theirs = machine.newest(directory), machine.newest(aside) or 0.0
            # tar keeps whole seconds.
            if newest and newest >= theirs + 1 and not confirmed:
                _remove_tree(machine, aside, step)
                raise Failure(
                    "refused",
                    step,
                    f"{directory} has files of {utc(newest)}, the backup's newest is of "
                    f"{utc(theirs)}",
                    f"to put the older ones in their place: --confirm {name}; what is there now is "
                    "kept beside them",
                )
            before = f"{directory}.before-{time_stamp(machine)}"
            write_record(machine, name, swapping={"directory": directory, "before": before})
            if machine.exists(directory):
                machine.rename(directory, before)
                say(f"what was in {directory} is kept in {before}")
            _swap_in(machine, name, directory)
    return directory


def finish_swap(machine: Machine, name: str) -> None:
    """Ends what a restore had begun that was killed between taking the old directory away and
    putting the new one in its place."""
    with cluster_lock(machine, name):
        swapping = read_record(machine, name).get("swapping")
        if swapping and machine.exists(swapping["before"]):
            _swap_in(machine, name, swapping["directory"])
        elif swapping:
            write_record(machine, name, swapping=None)


def _swap_in(machine: Machine, name: str, directory: str) -> None:
    if not machine.exists(directory):
        machine.rename(f"{directory}.restoring", directory)
    write_record(machine, name, swapping=None)


def _refuse_in_use(machine: Machine, cluster: Cluster, item: Mapping[str, Any], step: str) -> None:
    """A pod holds the directory that it was started with, whatever is put in its place."""
    arguments = ["get", "pods", f"--namespace={item['namespace']}", "--output=json"]
    pods = parse_json(kubectl_in_node(machine, cluster, arguments, step).out, step)["items"]
    users = sorted(
        pod["metadata"]["name"]
        for pod in pods
        if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        for volume in pod["spec"].get("volumes") or []
        if (volume.get("persistentVolumeClaim") or {}).get("claimName") == item["claim"]
    )
    if users:
        remedy = "name their workload in the item's scaleDown, or scale it to 0"
        raise Failure("refused", step, f"pods use it: {', '.join(users)}", remedy)


def _beside(item: Mapping[str, Any], items: Any, step: str) -> str:
    """The name of the database that a restore makes, at most 63 bytes: PostgreSQL would cut off
    what is longer, and take it for another one."""
    to = f"{item['database'][:54]}_restored"
    if to in [one["database"] for one in items if one["kind"] == "postgres"]:
        cause = f"{to}, where it would be restored, is itself declared as a database"
        raise Failure("refused", step, cause, "rename that database, or restore --into a directory")
    return to


def _restore_postgres(
    machine: Machine,
    name: str,
    item: Mapping[str, Any],
    wanted: Mapping[str, Any],
    started: float,
    step: str,
) -> Result:
    """Restores a database beside the one that is there, and lets it take its name if that is
    wanted: also one that an earlier run restored, and that somebody has looked at since."""
    confirmed = wanted["confirm"] == name
    to = _beside(item, wanted["items"], step)
    cluster = running_cluster(machine, name, f"restoring {item['name']} of")
    made = restored_before(machine, cluster, item, to, step)
    if not (wanted["in_place"] and made and made["whole"] and _is_wanted(made, wanted)):
        path, taken, done = _backup_of(machine, name, wanted, step)
        origin = {"target": wanted["target"], "snapshot": wanted["snapshot"]}
        origin |= {"from": path, "taken": taken}
        replace = confirmed or (made is not None and not made["whole"])
        made = restore_beside(machine, cluster, item, to, origin, replace, step)
        if done:
            _remove_tree(machine, done, step)
    if wanted["in_place"]:
        to = put_in_place(machine, cluster, item, to, made, confirmed, step)
    seconds = round(machine.now() - started, 1)
    return {"restored": to, "from": made["from"], "taken": made["taken"], "seconds": seconds}


def _is_wanted(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether it is of the backup that is asked for. Who names none means the one that is there,
    not one that was taken since."""
    named = (made["snapshot"], dump_stamp(made["from"]))
    return wanted["target"] in (None, made["target"]) and wanted["snapshot"] in (None, *named)
