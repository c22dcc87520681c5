"""The backup that comes before anything is deleted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from hostctl.cluster import Cluster
from hostctl.live import STORAGE_IN_NODE
from hostctl.machine import Machine, Ran
from hostctl.protocol import Failure, say
from hostctl.tools import run_tool
from hostctl.waiting import size_text

DATASTORE_IN_NODE = "/var/lib/rancher/k3s/server"
BACKUP_SPARE_BYTES = 256 * 1024 * 1024


def back_up(machine: Machine, cluster: Cluster) -> str:
    """Copies the stopped cluster's volumes and datastore next to the storage directory that is
    really mounted (incident 6), verifies both, and returns the directory. Refuses without room."""
    step = f"backing up cluster {cluster.name}"
    server = cluster.first
    storage = server.mount(STORAGE_IN_NODE)
    data = server.mount(os.path.dirname(DATASTORE_IN_NODE))
    if not storage or not data:
        raise Failure(
            "refused",
            step,
            f"{server.name} has no mount at {STORAGE_IN_NODE if not storage else data}",
            "copy its data by hand, then delete it: "
            f"docker cp {server.name}:{os.path.dirname(DATASTORE_IN_NODE)} .; "
            f"hostctl k3d delete {cluster.name} --confirm {cluster.name}",
        )
    if len(cluster.of("server", "agent")) > 1:
        raise Failure(
            "refused",
            step,
            "it has several nodes, and each may hold volumes",
            "copy each node's data by hand, then delete the cluster: "
            f"hostctl k3d delete {cluster.name} --confirm {cluster.name}",
        )
    target = f"{storage.rstrip('/')}-backups/{cluster.name}-{time_stamp(machine)}"
    needed = machine.tree_bytes(storage) + machine.tree_bytes(f"{data}/server")
    needed += needed // 10 + BACKUP_SPARE_BYTES
    free = machine.free_bytes(target)
    if free < needed:
        raise Failure(
            "refused",
            step,
            f"{target} has room for {size_text(free)}, needed are {size_text(needed)}",
            "make room there, or move old backups away; the cluster is stopped and unharmed "
            f"(hostctl k3d start {cluster.name})",
        )
    machine.make_directory(os.path.dirname(target), 0o700)
    machine.make_directory(target, 0o700)
    volumes, datastore = f"{target}/storage.tar", f"{target}/datastore.tar"
    say(f"backing up {size_text(needed)} to {target}")

    def run(argv: Sequence[str], step: str, **options: Any) -> Ran:
        def tick(waited: float) -> None:
            say(f"{step}: {waited:.0f} s, {size_text(machine.tree_bytes(target))} written")

        options.update(timeout=24 * 3600.0, tick=tick, ends_with_us=True)
        return run_tool(machine, argv, step, "failed", **options)

    pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", volumes]
    run([*pack, "--directory", storage, "."], step)
    copy = ["docker", "cp", f"{server.name}:{DATASTORE_IN_NODE}", "-"]
    run(copy, step, to_file=datastore)
    verify = f"verifying the backup of cluster {cluster.name}"
    compare = ["tar", "--compare", "--xattrs", "--acls", "--file", volumes, "--directory", storage]
    run(compare, verify)
    again = f"{target}/datastore-again.tar"
    run(copy, verify, to_file=again)
    say(f"{verify}: checksums")
    sums = {path: machine.checksum(path) for path in (volumes, datastore, again)}
    listed = run(["tar", "--list", "--file", datastore], verify)
    if sums[datastore] != sums[again] or "server/db/" not in listed.text:
        raise Failure(
            "failed",
            verify,
            "two copies of the datastore differ"
            if sums[datastore] != sums[again]
            else "no datastore",
            f"the cluster is stopped and unharmed; see {target}",
        )
    run_tool(machine, ["rm", again], verify, "failed")
    lines = "".join(f"{sums[path]}  {os.path.basename(path)}\n" for path in (volumes, datastore))
    machine.write_atomic(f"{target}/SHA256SUMS", lines.encode(), 0o600)
    return target


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def time_stamp(machine: Machine) -> str:
    return datetime.fromtimestamp(machine.now(), timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
