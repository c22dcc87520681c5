"""Copies of backups elsewhere, by restic: its repositories, its keys, its snapshots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hostctl.cluster import parse_json
from hostctl.machine import STATE_DIRECTORY, Machine, Ran
from hostctl.protocol import Failure, say
from hostctl.record import cluster_lock, read_record, write_record
from hostctl.spec import DNS_LABEL, Value, number_between, one_of, or_null, text_matching
from hostctl.tools import attempt, run_tool, tool_remedy, tool_version

RESTIC_SECONDS = 24 * 3600.0
# restic itself tries an S3 that does not answer for 15 minutes.
REPOSITORY_SECONDS = 120.0
_PATH_OR_S3 = (
    r"(/(?!\.{1,2}(/|$))[A-Za-z0-9_@+=,.-]+)+|s3:https?://[A-Za-z0-9.:-]+(/[A-Za-z0-9._-]+)+"
)
TARGET_ITEM: dict[str, Any] = {
    "name": Value(DNS_LABEL),
    "kind": Value(one_of("directory", "nfs", "s3")),
    "repository": Value(text_matching(_PATH_OR_S3, "an absolute path or s3:https://HOST/BUCKET")),
    "region": Value(or_null(text_matching(r"[a-z0-9-]{1,63}", "a region of S3")), None),
    **{
        f"keep_{each}": Value(number_between(0, 10000), 0)
        for each in ("last", "daily", "weekly", "monthly")
    },
}


def restic(
    machine: Machine, name: str, target: Mapping[str, Any], arguments: Sequence[str], step: str
) -> Ran:
    """Runs restic on a target's repository. Its keys are in files that root alone reads, never in
    an argument or the environment."""
    return run_tool(
        machine,
        ["restic", *arguments],
        step,
        "failed",
        env=_environment(name, target),
        timeout=RESTIC_SECONDS,
        tick=lambda waited: say(f"{step}: {waited:.0f} s"),
        ends_with_us=True,
    )


def _environment(name: str, target: Mapping[str, Any]) -> dict[str, str]:
    keys = f"{STATE_DIRECTORY}/backups/{name}/{target['name']}"
    return {
        "RESTIC_REPOSITORY": target["repository"],
        "RESTIC_PASSWORD_FILE": f"{keys}.password",
        "RESTIC_CACHE_DIR": f"{STATE_DIRECTORY}/restic-cache",
        "AWS_SHARED_CREDENTIALS_FILE": f"{keys}.credentials",
        # Not those of whoever calls: restic asks the environment first.
        "AWS_PROFILE": "default",
        "AWS_ACCESS_KEY_ID": "",
        "AWS_SECRET_ACCESS_KEY": "",
        "AWS_DEFAULT_REGION": target["region"] or "",
    }


def open_repository(machine: Machine, name: str, target: Mapping[str, Any], make: bool) -> None:
    """Sees that a target's repository answers, and makes it where this host never saw one there. A
    repository that is gone is an error and not made anew: a disk may not be mounted."""
    step = f"opening the repository of target {target['name']}"
    where = target["repository"]
    tool_version(machine, "restic")
    if target["kind"] == "nfs":
        kind, _ = machine.file_system(where)
        if not kind.startswith("nfs"):
            cause = f"{where} is on {kind or 'an unknown file system'}, and not on NFS"
            raise Failure("refused", step, cause, f"mount the share, then `findmnt -T {where}`")
    known = (read_record(machine, name).get("repositories") or {}).get(where)
    found = _repository(machine, name, target, step)
    if found is None and known is None and make:
        say(f"making the repository {where}")
        restic(machine, name, target, ["init"], f"making the repository of {target['name']}")
        found = _repository(machine, name, target, step)
    if found is None or known not in (None, found):
        cause = f"{where} has no repository" if found is None else f"{where} is another repository"
        if known:
            cause += f"; backups went to {known[:8]}"
        remedy = "is it mounted, is it the bucket of before? A new place is another target"
        raise Failure("refused", step, cause, remedy)
    if known is None:
        with cluster_lock(machine, name):
            others = read_record(machine, name).get("repositories") or {}
            write_record(machine, name, repositories={**others, where: found})
    # Of those who were killed; the lock of one who lives stays.
    restic(machine, name, target, ["unlock"], step)


def _repository(machine: Machine, name: str, target: Mapping[str, Any], step: str) -> str | None:
    """The id of the repository; None when there is none. Any other answer is a failure."""
    argv = ["restic", "cat", "config", "--no-lock"]
    environment = _environment(name, target)
    ran = attempt(machine, argv, step, env=environment, timeout=REPOSITORY_SECONDS)
    if ran.code == 10:  # since 0.17: there is no repository
        return None
    if ran.code:
        raise Failure("cannot-tell", step, ran.complaint, tool_remedy("restic", ran))
    return parse_json(ran.out, step)["id"]


def copy_out(
    machine: Machine, name: str, target: Mapping[str, Any], taken: Mapping[str, str]
) -> None:
    """Copies verified backups, a path by item, and forgets the copies beyond the retention. What
    they held goes when the target is verified."""
    for item, path in taken.items():
        step = f"copying {item} to target {target['name']}"
        say(step)
        tags = ["--host", name, "--tag", "homelab", "--tag", f"item={item}"]
        restic(machine, name, target, ["backup", "--quiet", *tags, path, f"{path}.sha256"], step)
    keep = [
        f"--keep-{each}={target[f'keep_{each}']}"
        for each in ("last", "daily", "weekly", "monthly")
        if target[f"keep_{each}"]
    ]
    if keep:
        group = ["--host", name, "--tag", "homelab", "--group-by", "host,tags"]
        step = f"forgetting old copies at target {target['name']}"
        restic(machine, name, target, ["forget", "--quiet", *group, *keep], step)


def snapshots_of(
    machine: Machine, name: str, target: Mapping[str, Any], item: str
) -> list[dict[str, Any]]:
    """The copies of an item at a target, the newest first: `id`, `time`, `paths`."""
    step = f"listing the copies of {item} at target {target['name']}"
    tags = ["--host", name, "--tag", f"homelab,item={item}"]
    ran = restic(machine, name, target, ["snapshots", "--json", *tags], step)
    found = parse_json(ran.out, step, or_scalar=True) or []
    return sorted(found, key=lambda one: one["time"], reverse=True)


def fetch(
    machine: Machine, name: str, target: Mapping[str, Any], snapshot: Mapping[str, Any], to: str
) -> str:
    """Brings a copy back into a directory and compares its checksum with the one that was taken of
    the original. Returns the path of the backup. What a run that was cut off brought is kept."""
    step = f"restoring snapshot {snapshot['id'][:8]} of target {target['name']}"
    say(f"{step} to {to}")
    restic(machine, name, target, ["restore", snapshot["id"], "--target", to, "--quiet"], step)
    (inside,) = (path for path in snapshot["paths"] if not path.endswith(".sha256"))
    path = to + inside
    wanted = machine.read(f"{path}.sha256").split()[0].decode()
    if machine.checksum(path) != wanted:
        cause = f"the checksum of {path} is not the {wanted[:8]}... that was taken with the backup"
        remedy = f"restore an older one; `restic check --read-data` of {target['repository']}"
        raise Failure("failed", step, cause, remedy)
    return path
