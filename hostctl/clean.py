"""Verb: removal of images, volumes and build cache that nothing references."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from hostctl.cluster import Cluster, Node, parse_json
from hostctl.cluster_backup import utc
from hostctl.machine import Machine
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, record_run
from hostctl.spec import CLUSTER_NAME, Value, boolean, checked
from hostctl.tools import attempt, run_tool, tool_remedy
from hostctl.waiting import present_cluster, size_text

CLEAN_SECONDS = 3600.0
ORPHANED_DATASTORE_DAYS = 30
CLEAN_SPEC: dict[str, Any] = {"name": Value(CLUSTER_NAME), "dry_run": Value(boolean, False)}


def clean(machine: Machine, spec: dict[str, Any]) -> Result:
    """Removes images that no container of a running node uses, then dangling images, anonymous
    volumes that no container references, and unused build cache of the host's Docker (incident 11).

    Nothing of a node that is not running is touched, nor what any container references, running or
    stopped, of this cluster or not: Docker itself refuses that. A volume with a name that someone
    gave it stays, and so does the datastore of a k3s server written to in the last 30 days. A
    cluster that is absent or partial is refused: an orphaned volume may be all that is left of it.
    """
    wanted = checked(spec, CLEAN_SPEC, "clean")
    name, dry = wanted["name"], wanted["dry_run"]
    step = f"cleaning the host of cluster {name}"
    found: Result = {"dry_run": dry, "nodes": {}, "skipped": [], "images": [], "volumes": []}
    found |= {"kept": [], "build_cache": None}
    failed: list[Failure] = []

    def part(work: Callable[[], None]) -> None:
        try:
            work()
        except Failure as failure:
            say(f"{failure.step}: {failure.cause}")
            failed.append(failure)

    with cluster_lock(machine, name):
        cluster = present_cluster(machine, name, "cleaning the host of")
        for node in cluster.of("server", "agent"):
            if node.status == "running":
                part(lambda node=node: _clean_node(machine, node, found))
            else:
                say(f"{node.name} is {node.status}: nothing of it is touched")
                found["skipped"].append(node.name)
        part(lambda: _clean_images(machine, found))
        part(lambda: _clean_volumes(machine, cluster, found))
        part(lambda: _clean_build_cache(machine, found))
        if not dry:
            causes = "; ".join(f"{one.step}: {one.cause}" for one in failed)
            record_run(machine, name, "clean", utc(machine.now()), causes)
    if failed:
        raise Failure(
            failed[0].code,
            step,
            "; ".join(f"{one.step}: {one.cause}" for one in failed),
            f"{failed[0].remedy}; what could be cleaned is; run it again: hostctl clean {name}",
        )
    return found


def _tell(found: Mapping[str, Any], what: str, items: list[dict[str, Any]]) -> None:
    """Shows what is about to be removed."""
    total = sum(item["bytes"] or 0 for item in items)
    verb = "would remove" if found["dry_run"] else "removing"
    say(f"{verb} {len(items)} {what}, {size_text(total)}")
    for item in items:
        say(f"  {item['name']}  {size_text(item['bytes'])}")


def _clean_node(machine: Machine, node: Node, found: Result) -> None:
    step = f"removing unused images in {node.name}"
    crictl = ["docker", "exec", node.name, "crictl"]

    def images() -> dict[str, dict[str, Any]]:
        ran = run_tool(machine, [*crictl, "images", "--output=json"], step, "failed")
        return {one["id"]: one for one in parse_json(ran.out, step).get("images") or []}

    before = images()
    ran = run_tool(machine, [*crictl, "ps", "--all", "--output=json"], step, "failed")
    used: set[str] = set()
    for container in parse_json(ran.out, step).get("containers") or []:
        used |= {container.get("imageRef", ""), (container.get("image") or {}).get("image", "")}
    unused = {
        key: one
        for key, one in before.items()
        if not one.get("pinned")
        and not used & {key, *(one.get("repoTags") or []), *(one.get("repoDigests") or [])}
    }
    _tell(found, f"images in {node.name}", [_crictl_image(one) for one in unused.values()])
    if not found["dry_run"]:
        run_tool(machine, [*crictl, "rmi", "--prune"], step, "failed", timeout=CLEAN_SECONDS)
        left = images()
        unused = {key: one for key, one in before.items() if key not in left}
    found["nodes"][node.name] = [_crictl_image(one) for one in unused.values()]


def _crictl_image(image: Mapping[str, Any]) -> dict[str, Any]:
    names = [*(image.get("repoTags") or []), *(image.get("repoDigests") or []), image["id"]]
    return {"name": names[0], "bytes": int(image.get("size") or 0)}


def _clean_images(machine: Machine, found: Result) -> None:
    step = "removing dangling images"
    before = _dangling_images(machine, step)
    used = _images_of_containers(machine, step) if before else set()
    unused = {key: size for key, size in before.items() if key not in used}
    _tell(found, "dangling images", _sized(unused))
    if unused and not found["dry_run"]:
        argv = ["docker", "image", "prune", "--force"]
        run_tool(machine, argv, step, "failed", timeout=CLEAN_SECONDS)
        left = _dangling_images(machine, step)
        unused = {key: size for key, size in before.items() if key not in left}
    found["images"] = _sized(unused)


def _sized(sizes: Mapping[str, int | None]) -> list[dict[str, Any]]:
    return [{"name": name, "bytes": size} for name, size in sorted(sizes.items())]


def _dangling_images(machine: Machine, step: str) -> dict[str, int]:
    """The sizes of the images without a tag, by id."""
    argv = ["docker", "image", "ls", "--quiet", "--no-trunc", "--filter", "dangling=true"]
    ids = sorted(set(run_tool(machine, argv, step, "failed").text.split()))
    if not ids:
        return {}
    # One that went away since is told on stderr, the others are told all the same.
    form = "{{.Id}} {{.Size}}"
    ran = attempt(machine, ["docker", "image", "inspect", "--format", form, *ids], step)
    rows = re.findall(r"^(sha256:[0-9a-f]+) ([0-9]{1,18})$", ran.text, re.MULTILINE)
    return {key: int(size) for key, size in rows}


def _images_of_containers(machine: Machine, step: str) -> set[str]:
    argv = ["docker", "ps", "--all", "--no-trunc", "--format", "{{.ID}}"]
    ids = run_tool(machine, argv, step, "failed").text.split()
    if not ids:
        return set()
    argv = ["docker", "inspect", "--type", "container", *ids]
    return {facts.get("Image", "") for facts in parse_json(attempt(machine, argv, step).out, step)}


def _clean_volumes(machine: Machine, cluster: Cluster, found: Result) -> None:
    """Each by its name and never by `docker volume prune`: that takes named volumes too on Docker
    before 23, and leaves those that an older Docker made on later ones."""
    step = "removing orphaned volumes"
    orphans = []
    for facts in _unreferenced_volumes(machine, step):
        if not _is_anonymous(facts):
            continue
        kept = _datastore_in_use(machine, facts["Mountpoint"])
        if kept:
            say(f"keeping volume {facts['Name']}: {kept}")
            found["kept"].append({"name": facts["Name"], "why": kept})
        else:
            orphans.append({"name": facts["Name"], "bytes": _size(machine, facts["Mountpoint"])})
    _tell(found, "orphaned volumes", orphans)
    if found["dry_run"]:
        found["volumes"] = orphans
        return
    for orphan in orphans:
        argv = ["docker", "volume", "rm", orphan["name"]]
        ran = attempt(machine, argv, step, timeout=CLEAN_SECONDS)
        if ran.code == 0:
            found["volumes"].append(orphan)
        elif not re.search(r"in use|no such volume", ran.complaint, re.IGNORECASE):
            raise Failure("failed", step, ran.complaint, tool_remedy("docker", ran))


def _unreferenced_volumes(machine: Machine, step: str) -> list[dict[str, Any]]:
    argv = ["docker", "volume", "ls", "--quiet", "--filter", "dangling=true"]
    names = run_tool(machine, argv, step, "failed").text.split()
    if not names:
        return []
    seen = attempt(machine, ["docker", "volume", "inspect", *names], step)
    if seen.code and "no such volume" not in seen.complaint.lower():
        raise Failure("failed", step, seen.complaint, tool_remedy("docker", seen))
    return parse_json(seen.out, step)


def _is_anonymous(volume: Mapping[str, Any]) -> bool:
    """Whether Docker and not a person named it: by the label of Docker 23 and newer, or by the 64
    hex digits that every Docker gives. One with options may be a share of another machine."""
    labels = volume.get("Labels") or {}
    named = not re.fullmatch(r"[0-9a-f]{64}", volume["Name"])
    if volume.get("Driver") != "local" or volume.get("Options"):
        return False
    return "com.docker.volume.anonymous" in labels or not (named or labels)


def _datastore_in_use(machine: Machine, mountpoint: str) -> str | None:
    """Why a volume is kept. A server whose container was removed by hand leaves its datastore in an
    anonymous volume, which a person may still want back."""
    try:
        written = machine.newest(f"{mountpoint}/server/db")
    except OSError as error:
        return f"it cannot be looked into ({error.strerror or error})"
    if written is None:
        return None
    days = (machine.now() - written) / 86400
    if days >= ORPHANED_DATASTORE_DAYS:
        return None
    return f"the datastore of a k3s server, last written {days:.0f} days ago, is kept for 30"


def _size(machine: Machine, path: str) -> int | None:
    try:
        return machine.tree_bytes(path)
    except OSError:
        return None


def _clean_build_cache(machine: Machine, found: Result) -> None:
    step = "removing unused build cache"
    if found["dry_run"]:
        argv = ["docker", "system", "df", "--format", "{{.Type}}={{.Reclaimable}}"]
        ran = run_tool(machine, argv, step, "failed", timeout=CLEAN_SECONDS)
        size = re.search(r"^Build Cache=(\S+)", ran.text, re.MULTILINE)
    else:
        argv = ["docker", "builder", "prune", "--force"]
        ran = run_tool(machine, argv, step, "failed", timeout=CLEAN_SECONDS)
        # The words of Docker's own builder and of buildx.
        size = re.search(r"^Total(?: reclaimed space)?:\s*(\S+)", ran.text, re.MULTILINE)
    found["build_cache"] = size.group(1) if size else None
    say(f"build cache: {found['build_cache'] or 'unknown'}")


"""How long a server's datastore that nothing references stays, counted from its last write."""
