"""Backups: verified before anything of the original is touched."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from hostctl.cluster import Cluster, Node
from hostctl.live import DATASTORE_IN_NODE, STORAGE_IN_NODE
from hostctl.machine import Machine, Ran
from hostctl.protocol import Failure, say
from hostctl.tools import run_tool
from hostctl.waiting import size_text

BACKUP_SECONDS = 24 * 3600.0
BACKUP_SPARE_BYTES = 256 * 1024 * 1024


def back_up(machine: Machine, cluster: Cluster, target: str | None = None) -> str:
    """Copies the stopped cluster's volumes and datastore into ``target``, by default one next to
    the storage directory that is really mounted (incident 6), verifies both, and returns the
    directory. Refuses without room."""
    step = f"backing up cluster {cluster.name}"
    server = cluster.first
    storage = server.mount(STORAGE_IN_NODE)
    data = datastore_of(server)
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
    target = target or backup_directory(machine, cluster)
    size = machine.tree_bytes(data)
    # The datastore is copied twice, and the copies compared.
    refuse_without_room(machine, target, machine.tree_bytes(storage) + 2 * size, step, cluster.name)
    machine.make_directory(os.path.dirname(target), 0o700)
    machine.make_directory(target, 0o700)
    volumes = f"{target}/storage.tar"
    pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", volumes]
    run_copy(machine, [*pack, "--directory", storage, "."], step, target)
    verify = f"verifying the backup of cluster {cluster.name}"
    compare = ["tar", "--compare", "--xattrs", "--acls", "--file", volumes, "--directory", storage]
    run_copy(machine, compare, verify, target)
    sums = {volumes: machine.checksum(volumes)}
    sums |= back_up_datastore(machine, cluster.name, server.name, target)
    _write_sums(machine, target, sums)
    return target


def back_up_datastore(machine: Machine, name: str, container: str, target: str) -> dict[str, str]:
    """Copies the datastore of a stopped server into `datastore.tar` of a directory that is there,
    twice, and compares the copies. Returns the checksum by path."""
    step = f"backing up the datastore of cluster {name}"
    verify = f"verifying the backup of cluster {name}"
    datastore, again = f"{target}/datastore.tar", f"{target}/datastore-again.tar"
    copy = ["docker", "cp", f"{container}:{DATASTORE_IN_NODE}", "-"]
    run_copy(machine, copy, step, target, to_file=datastore)
    run_copy(machine, copy, verify, target, to_file=again)
    say(f"{verify}: checksums")
    sums = {path: machine.checksum(path) for path in (datastore, again)}
    listed = run_copy(machine, ["tar", "--list", "--file", datastore], verify, target)
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
    lines = {datastore: sums[datastore]}
    _write_sums(machine, target, lines)
    return lines


def restore_datastore(machine: Machine, name: str, backup: str, data: str, nonce: str) -> None:
    """Unpacks a verified backup's datastore as the directory `data`, which is not there; it is
    whole or absent."""
    step = f"copying the datastore of cluster {name} to {data}"
    aside = f"{data}.{nonce}"
    run_copy(machine, ["rm", "-r", "-f", aside], step, backup)
    machine.make_directory(aside, 0o700)
    archive = ["--xattrs", "--acls", "--numeric-owner", "--file", f"{backup}/datastore.tar"]
    extract = ["tar", "--extract", "--same-owner", "--same-permissions", *archive]
    run_copy(machine, [*extract, "--directory", aside], step, aside)
    run_copy(machine, ["tar", "--compare", *archive, "--directory", aside], step, aside)
    machine.rename(f"{aside}/{os.path.basename(DATASTORE_IN_NODE)}", data)
    run_copy(machine, ["rm", "-r", "-f", aside], step, backup)


def datastore_of(server: Node) -> str | None:
    """Where on the host the server's datastore is: in a mount of its own, or in k3s' volume."""
    volume = server.mount(os.path.dirname(DATASTORE_IN_NODE))
    inside = f"{volume}/{os.path.basename(DATASTORE_IN_NODE)}" if volume else None
    return server.mount(DATASTORE_IN_NODE) or inside


def backup_directory(machine: Machine, cluster: Cluster) -> str:
    storage = cluster.first.mount(STORAGE_IN_NODE) or ""
    return f"{storage.rstrip('/')}-backups/{cluster.name}-{time_stamp(machine)}"


def refuse_without_room(machine: Machine, target: str, needed: int, step: str, name: str) -> None:
    needed += needed // 10 + BACKUP_SPARE_BYTES
    free = machine.free_bytes(target)
    if free < needed:
        raise Failure(
            "refused",
            step,
            f"{target} has room for {size_text(free)}, needed are {size_text(needed)}",
            f"make room there, or move old backups away; nothing is harmed (hostctl k3d start "
            f"{name} if it is stopped)",
        )


def run_copy(machine: Machine, argv: Sequence[str], step: str, target: str, **options: Any) -> Ran:
    """Runs a tool that may copy for hours, and says how far it is."""

    def tick(waited: float) -> None:
        say(f"{step}: {waited:.0f} s, {size_text(machine.tree_bytes(target))} written")

    options.update(timeout=BACKUP_SECONDS, tick=tick, ends_with_us=True)
    return run_tool(machine, argv, step, "failed", **options)


def _write_sums(machine: Machine, target: str, sums: dict[str, str]) -> None:
    lines = "".join(f"{digest}  {os.path.basename(path)}\n" for path, digest in sums.items())
    machine.write_atomic(f"{target}/SHA256SUMS", lines.encode(), 0o600)


def utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime(_UTC)


def seconds_of(utc_text: str) -> float:
    return datetime.strptime(utc_text, _UTC).replace(tzinfo=timezone.utc).timestamp()


_UTC = "%Y-%m-%dT%H:%M:%SZ"


def time_stamp(machine: Machine) -> str:
    return datetime.fromtimestamp(machine.now(), timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
