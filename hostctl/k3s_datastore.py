"""A server's datastore: copied verified, made etcd of SQLite, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hostctl.certificates import DAY_SECONDS
from hostctl.cluster_backup import refuse_without_room, run_copy, time_stamp, utc
from hostctl.k3s_node import (
    K3S_DATA,
    K3S_DATABASE,
    K3S_SERVER_TOKEN,
    K3S_TOKEN,
    k3s_datastore,
    k3s_password,
    k3s_token_digest,
)
from hostctl.k3s_service import k3s_start_unit, k3s_stop_unit
from hostctl.machine import STATE_DIRECTORY, Machine
from hostctl.protocol import Failure, say
from hostctl.record import read_record, write_record

K3S_BACKUPS = f"{STATE_DIRECTORY}/k3s-backups"
_TOKENS = f"{STATE_DIRECTORY}/k3s-tokens"


def k3s_record(machine: Machine, cluster: str) -> dict[str, Any]:
    return read_record(machine, cluster).get("k3s") or {}


def write_k3s_record(machine: Machine, cluster: str, **changes: Any) -> None:
    """Changes parts of what is recorded of this machine's k3s; the caller holds the lock."""
    write_record(machine, cluster, k3s={**k3s_record(machine, cluster), **changes})


def back_up_k3s(machine: Machine, cluster: str) -> str:
    """Copies the stopped server's datastore, certificates and token, compares the copy with them,
    and returns its directory, which root alone reads. Refuses without the room."""
    step = f"backing up the datastore of {cluster}"
    target = f"{K3S_BACKUPS}/{cluster}-{time_stamp(machine)}"
    data = f"{K3S_DATA}/server"
    refuse_without_room(machine, STATE_DIRECTORY, machine.tree_bytes(data), step, cluster)
    machine.make_directory(K3S_BACKUPS, 0o700)
    machine.make_directory(target, 0o700)
    file = f"{target}/server.tar"
    pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", file]
    run_copy(machine, [*pack, "--directory", data, "."], step, target)
    compare = ["tar", "--compare", "--xattrs", "--acls", "--file", file, "--directory", data]
    run_copy(machine, compare, f"verifying the backup in {target}", target)
    line = f"{machine.checksum(file)}  server.tar\n"
    machine.write_atomic(f"{target}/SHA256SUMS", line.encode(), 0o600)
    return target


def copy_sqlite(machine: Machine, cluster: str) -> str:
    """Copies the SQLite of a running server as one moment has it, checks the copy, and returns its
    directory; beside it the token, without which the copy cannot be used."""
    step = f"copying the SQLite of {cluster}"
    source = f"{K3S_DATABASE}/state.db"
    target = f"{K3S_BACKUPS}/{cluster}-{time_stamp(machine)}"
    refuse_without_room(machine, STATE_DIRECTORY, machine.tree_bytes(K3S_DATABASE), step, cluster)
    machine.make_directory(K3S_BACKUPS, 0o700)
    machine.make_directory(target, 0o700)
    wrong = machine.copy_database(source, f"{target}/state.db")
    if wrong:
        raise Failure(
            "failed", step, wrong, f"sqlite3 {source} 'PRAGMA integrity_check'; the cluster runs on"
        )
    machine.write_atomic(f"{target}/token", machine.read(K3S_SERVER_TOKEN), 0o600)
    return target


def convert_k3s(machine: Machine, wanted: Mapping[str, Any], unit: str) -> None:
    """Before a server's SQLite is made etcd, or goes back: stops it, keeps a verified backup, and
    records the way. k3s itself moves the content when it starts with cluster-init; etcd it never
    makes SQLite of, so that way leads to the backup and loses what came after. It is over with
    `settle_k3s`, once the server is Ready; until then `unconvert_k3s` undoes it."""
    cluster, to = wanted["cluster"], wanted["datastore"]
    begun = k3s_record(machine, cluster).get("conversion")
    if begun is None and to == "sqlite":
        raise Failure(
            "refused",
            f"making SQLite of the etcd of {cluster}",
            "k3s has no way from etcd to SQLite, and this machine has no backup of before",
            "declare datastore etcd; one server may keep it, too",
        )
    k3s_stop_unit(machine, unit)
    if begun is None or begun.get("verified", True):
        try:
            former = back_up_k3s(machine, cluster)
        except Failure:
            k3s_start_unit(machine, unit)
            raise
        say(f"the backup in {former} is verified")
        kept = begun["backup"] if begun and to == "sqlite" else former
        begun = {"to": to, "backup": kept, "former": former, "verified": False}
        begun |= {"at": utc(machine.now()), "began": machine.now()}
        write_k3s_record(machine, cluster, conversion=begun)
    if to == "sqlite" and _is_not(machine, "sqlite"):
        return_to_backup(machine, cluster, begun["backup"])


def conversion_is_young(machine: Machine, cluster: str) -> bool:
    """Whether a conversion goes on that is undone when it fails. Of one that was begun long ago,
    what the server took in since then may be worth more."""
    begun = k3s_record(machine, cluster).get("conversion") or {}
    return not begun.get("verified", True) and machine.now() - begun["began"] < DAY_SECONDS


def unconvert_k3s(machine: Machine, cluster: str, unit: str) -> str:
    """Stops the server, puts back what was there before a conversion, unless it still is, and
    returns which datastore that is. Safe after a kill: what runs from then on is not undone."""
    begun = k3s_record(machine, cluster)["conversion"]
    former = "sqlite" if begun["to"] == "etcd" else "etcd"
    write_k3s_record(machine, cluster, conversion={**begun, "back": True})
    k3s_stop_unit(machine, unit)
    if _is_not(machine, former):
        return_to_backup(machine, cluster, begun["former"])
    return former


def settle_k3s(machine: Machine, cluster: str, datastore: str) -> None:
    """Ends a conversion, or its way back: this datastore is the one that serves."""
    begun = k3s_record(machine, cluster).get("conversion")
    if begun and not begun.get("verified", True):
        over = {"backup": begun["backup"], "at": begun["at"]} if datastore == "etcd" else None
        write_k3s_record(machine, cluster, conversion=over)


def _is_not(machine: Machine, datastore: str) -> bool:
    # An etcd that k3s began to fill lies beside its SQLite.
    begun = datastore == "sqlite" and machine.exists(f"{K3S_DATABASE}/etcd")
    return begun or k3s_datastore(machine) != datastore


def return_to_backup(machine: Machine, cluster: str, backup: str) -> None:
    """Puts a verified backup in the place of the stopped server's directory, which is set aside."""
    step = f"returning {cluster} to the backup {backup}"
    line = machine.read(f"{backup}/SHA256SUMS").decode("ascii", "replace").split()
    if not line or machine.checksum(f"{backup}/server.tar") != line[0]:
        raise Failure(
            "refused", step, "its checksum is another", "use another backup; nothing was changed"
        )
    data, aside = f"{K3S_DATA}/server", f"{K3S_DATA}/server.restoring"
    run_copy(machine, ["rm", "-r", "-f", aside], step, backup)
    machine.make_directory(aside, 0o700)
    archive = ["--xattrs", "--acls", "--numeric-owner", "--file", f"{backup}/server.tar"]
    extract = ["tar", "--extract", "--same-owner", "--same-permissions", *archive]
    run_copy(machine, [*extract, "--directory", aside], step, aside)
    if machine.exists(data):
        machine.rename(data, f"{data}.aside-{time_stamp(machine)}")
    machine.rename(aside, data)


# Tokens. What a datastore holds is sealed with the token of its time.


def keep_token(machine: Machine, token: str) -> None:
    """Keeps a token for snapshots of its time, for root alone."""
    machine.make_directory(_TOKENS, 0o700)
    path = f"{_TOKENS}/{k3s_token_digest(token)}"
    if not machine.exists(path):
        machine.write_atomic(path, k3s_password(token).encode() + b"\n", 0o600)


def kept_token(machine: Machine, digest: str) -> str | None:
    try:
        return machine.read(f"{_TOKENS}/{digest}").decode().strip()
    except FileNotFoundError:
        return None


def set_token(machine: Machine, token: str) -> None:
    """Makes it the one that this node is started with."""
    machine.write_atomic(K3S_TOKEN, token.encode() + b"\n", 0o600)
