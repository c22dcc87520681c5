"""Verbs: etcd snapshots of a k3s cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from hostctl.cluster_backup import utc
from hostctl.k3s_datastore import (
    back_up_k3s,
    copy_sqlite,
    k3s_record,
    keep_token,
    kept_token,
    set_token,
    write_k3s_record,
)
from hostctl.k3s_members import k3s_server, other_servers
from hostctl.k3s_node import (
    K3S_BINARY,
    K3S_DATABASE,
    K3S_SECRET,
    K3S_SERVER_TOKEN,
    K3S_TOKEN,
    K3sNode,
    k3s_config_text,
    k3s_identity,
    k3s_token_digest,
)
from hostctl.k3s_service import k3s_host_port, k3s_start_unit, k3s_stop_unit, k3s_wait
from hostctl.machine import Machine, Ran
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock
from hostctl.spec import (
    CLUSTER_NAME,
    Value,
    absolute_path,
    boolean,
    checked,
    number_between,
    or_null,
    text_matching,
)
from hostctl.tools import attempt, run_tool

_NAME = text_matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}", "the name of a snapshot")
_S3: dict[str, Any] = {
    "endpoint": Value(text_matching(r"[A-Za-z0-9.:/-]{1,255}", "HOST[:PORT] of the S3 service")),
    "bucket": Value(text_matching(r"[a-z0-9][a-z0-9.-]{1,62}", "the name of a bucket")),
    "region": Value(text_matching(r"[a-z0-9-]{1,63}", "a region"), "us-east-1"),
    "folder": Value(text_matching(r"[A-Za-z0-9._/-]{0,255}", "a folder in the bucket"), ""),
    "accessKey": Value(text_matching(r"[!-~]{1,255}", "an access key"), secret=True),
    "secretKey": Value(text_matching(r"[!-~]{1,255}", "a secret key"), secret=True),
    "insecure": Value(boolean, False),
}


def _target(value: Any) -> dict[str, Any] | None:
    """Where snapshots are: on this machine, in a directory (of NFS), in a bucket."""
    if value is None:
        return None
    if isinstance(value, dict) and set(value) == {"directory"}:
        return {"directory": absolute_path(value["directory"])}
    if isinstance(value, dict) and set(value) == {"s3"}:
        try:
            return {"s3": checked(value["s3"], _S3, "k3s snapshot")}
        except Failure as failure:
            raise ValueError(f"s3 without this: {failure.cause}") from None
    raise ValueError('null, {"directory": PATH} or {"s3": {...}}')


_SNAPSHOT_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "target": Value(_target, None, secret=True),
}


def k3s_snapshot_take(machine: Machine, spec: dict[str, Any]) -> Result:
    """Takes a snapshot of the cluster's etcd and keeps the newest `retention` of its name. With
    `version` it does nothing where that is installed already; then a server with SQLite gets a
    copy of its database, since etcd snapshots are of etcd alone."""
    shape = {
        **_SNAPSHOT_SPEC,
        "name": Value(_NAME, "on-demand"),
        "retention": Value(number_between(1, 1000), 5),
        "version": Value(or_null(text_matching(r"v\d+\.\d+\.\d+\+k3s\d+", "a release")), None),
    }
    wanted = checked(spec, shape, "k3s snapshot take")
    step = f"taking a snapshot of {wanted['cluster']}"
    with cluster_lock(machine, wanted["cluster"]):
        before = wanted["version"] is not None
        node = k3s_server(machine, wanted["cluster"], step, before_ensure=before)
        if wanted["version"] and (node is None or node.version == wanted["version"]):
            return {"changed": []}
        if node is not None and node.datastore == "sqlite" and wanted["version"]:
            copied = copy_sqlite(machine, wanted["cluster"])
            return {"changed": ["copied"], "location": copied}
        _refuse_without_etcd(node, step)
        options, secrets = _where(machine, wanted["target"], step)
        _etcd_snapshot(
            machine, ["save", f"--name={wanted['name']}", *options], secrets, step, timeout=1800.0
        )
        keep = [f"--snapshot-retention={wanted['retention']}", f"--name={wanted['name']}"]
        _etcd_snapshot(machine, ["prune", *keep, *options], secrets, step, timeout=600.0)
        keep_token(machine, machine.read(K3S_SERVER_TOKEN).decode().strip())
        taken = [
            one
            for one in _listed(machine, options, secrets, step)
            if one["name"].startswith(f"{wanted['name']}-")
        ]
        if not taken:
            raise Failure(
                "failed", step, "k3s reported success and lists none", "k3s etcd-snapshot ls"
            )
    return {"changed": ["taken"], **max(taken, key=lambda one: one["created"])}


def k3s_snapshot_list(machine: Machine, spec: dict[str, Any]) -> Result:
    """The snapshots of a cluster's etcd, oldest first: name, location, bytes, created. Those in a
    directory with k3s stopped, too, which then cannot tell of them itself."""
    wanted = checked(spec, _SNAPSHOT_SPEC, "k3s snapshot list")
    step = f"listing the snapshots of {wanted['cluster']}"
    _refuse_without_etcd(k3s_server(machine, wanted["cluster"], step), step)
    options, secrets = _where(machine, wanted["target"], step)
    try:
        listed = _listed(machine, options, secrets, step)
    except Failure as failure:
        if "s3" in (wanted["target"] or {}):
            raise
        say(f"{step}: {failure.cause}")
        listed = _on_disk(machine, options[0].partition("=")[2])
    return {"snapshots": sorted(listed, key=lambda one: one["created"])}


def _on_disk(machine: Machine, directory: str) -> list[dict[str, Any]]:
    found = []
    for name in machine.names(directory):
        path = f"{directory}/{name}"
        seen = machine.stat(path)
        if seen and seen.kind == "file":
            one = {"name": name, "location": f"file://{path}", "bytes": machine.file_bytes(path)}
            found.append({**one, "created": _created(machine, name, path)})
    return found


def k3s_snapshot_restore(machine: Machine, spec: dict[str, Any]) -> Result:
    """Puts a snapshot in the place of the cluster's etcd, on one server, whose cluster's name must
    be confirmed. The other servers are stopped before, and join anew after (`k3s rejoin`).

    The token is that of the snapshot's time, since k3s seals what it keeps with it: the one that
    this machine kept, or the one that is given."""
    shape = {
        **_SNAPSHOT_SPEC,
        "name": Value(_NAME),
        "token": Value(or_null(K3S_SECRET), None, secret=True),
        "confirm": Value(or_null(CLUSTER_NAME), None),
        "readySeconds": Value(number_between(1, 86400), 600),
    }
    wanted = checked(spec, shape, "k3s snapshot restore")
    cluster = wanted["cluster"]
    step = f"restoring {wanted['name']} on {cluster}"
    with cluster_lock(machine, cluster):
        node = k3s_server(machine, cluster, step)
        record = k3s_record(machine, cluster)
        begun = record.get("restoring")
        if begun is None:
            _refuse_without_etcd(node, step)
        assert node is not None
        if wanted["confirm"] != cluster:
            raise Failure(
                "refused",
                step,
                "all that came after the snapshot is lost, and the cluster's name is not confirmed",
                f'"confirm": "{cluster}" in the spec',
            )
        _refuse_other_servers(machine, node, step)
        options, secrets = _where(machine, wanted["target"], step)
        path = _path_of(machine, wanted, options, step)
        created = _created(machine, wanted["name"], path)
        token = _token_of(machine, record, wanted["token"], created, step)
        k3s_stop_unit(machine, node.unit)
        if begun is None:
            before = back_up_k3s(machine, cluster)
            begun = {"name": wanted["name"], "backup": before}
            write_k3s_record(machine, cluster, restoring=begun, pending=node.version)
        say(f"what is there is kept in {begun['backup']}")
        set_token(machine, token)
        ran = _reset(machine, node, path, options, secrets, step)
        if ran.code:
            raise Failure(
                "failed",
                step,
                ran.complaint,
                f"k3s is stopped; what was there is in {begun['backup']}: run the restore again, "
                "with another snapshot or the right token",
            )
        k3s_start_unit(machine, node.unit)
        live = {
            "node": node.node,
            "role": "server",
            "version": node.version,
            "config": node.config,
            "server": None,
            "timeouts": {"readySeconds": wanted["readySeconds"]},
        }
        k3s_wait(machine, live, node.unit)
        identity = k3s_identity(machine)
        digest = k3s_token_digest(token)
        since = {"digest": digest, "since": utc(machine.now())}
        write_k3s_record(
            machine,
            cluster,
            restoring=None,
            pending=None,
            identity=identity,
            tokens=[*(record.get("tokens") or []), since],
        )
    return {"restored": wanted["name"], "identity": identity, "tokenDigest": digest,
            "backup": begun["backup"]}  # fmt: skip


def _reset(
    machine: Machine,
    node: K3sNode,
    path: str,
    options: Sequence[str],
    secrets: Mapping[str, str],
    step: str,
) -> Ran:
    """Lets k3s make an etcd of one member of a snapshot, with the node's own config but for how it
    joins others."""
    told = {
        key: value for key, value in node.config.items() if key not in ("server", "cluster-init")
    }
    with machine.private_file(k3s_config_text(told).encode()) as config:
        reset = [K3S_BINARY, "server", "--cluster-reset", f"--config={config}"]
        s3 = [one for one in options if one.startswith("--etcd-s3")]
        return attempt(
            machine,
            [*reset, f"--cluster-reset-restore-path={path}", *s3],
            step,
            env=secrets,
            timeout=1800.0,
            tick=lambda waited: say(f"{step}: {waited:.0f} s"),
        )


def _path_of(machine: Machine, wanted: Mapping[str, Any], options: list[str], step: str) -> str:
    """A snapshot's file; its name where it is in a bucket, which k3s looks into itself. k3s lists
    them only while it runs, and one that does not is what a restore is for."""
    if "s3" in (wanted["target"] or {}):
        return wanted["name"]
    path = f"{options[0].partition('=')[2]}/{wanted['name']}"
    if not machine.exists(path):
        remedy = (
            f"hostctl k3s snapshot list {wanted['cluster']} shows those that k3s makes by itself"
        )
        raise Failure("refused", step, f"there is no snapshot {path}", remedy)
    return path


def _created(machine: Machine, name: str, path: str) -> str:
    """When a snapshot was taken: k3s ends its name with that, in seconds since 1970."""
    last = name.removesuffix(".zip").rpartition("-")[2]
    if last.isdigit():
        return utc(float(last))
    seen = machine.stat(path) if path.startswith("/") else None
    return utc(seen.modified if seen else machine.now())


def _refuse_without_etcd(node: K3sNode | None, step: str) -> None:
    if node is None:
        raise Failure("refused", step, "there is no k3s here", "run it on a server of the cluster")
    if node.datastore != "etcd":
        raise Failure(
            "refused",
            step,
            "this server keeps its cluster in SQLite, of which k3s takes no snapshots",
            "upgrades and conversions copy it first; for snapshots declare datastore etcd, and "
            "confirm the conversion",
        )


def _refuse_other_servers(machine: Machine, node: K3sNode, step: str) -> None:
    """A server that runs on would go on with what the restore takes back."""
    try:
        others = other_servers(machine, node, step)
    except Failure:
        # Without an API there is no majority that could go on either.
        return
    running = [url for url in others if machine.served(*k3s_host_port(url))]
    if running:
        raise Failure(
            "refused",
            step,
            f"other servers run: {', '.join(running)}",
            f"on each of them: hostctl k3s stop {node.cluster}; after the restore, there: hostctl "
            f"k3s rejoin {node.cluster} --confirm NODE",
        )


def _token_of(
    machine: Machine, record: Mapping[str, Any], given: str | None, created: str, step: str
) -> str:
    """The token that was in use when a snapshot was taken."""
    digest = None
    for one in record.get("tokens") or []:
        if digest is None or one["since"] <= created:
            digest = one["digest"]
    if given and digest in (None, k3s_token_digest(given)):
        return given
    if given:
        raise Failure(
            "refused",
            step,
            f"the token given is not that of the snapshot's time ({created})",
            "leave it out: this machine keeps the tokens of its time"
            if digest and kept_token(machine, digest)
            else "give the one that was declared at that time",
        )
    kept = kept_token(machine, digest) if digest else None
    if kept is None:
        with contextlib.suppress(OSError):
            live = machine.read(K3S_TOKEN).decode().strip()
            if digest in (None, k3s_token_digest(live)):
                kept = live
    if kept is None:
        raise Failure(
            "refused",
            step,
            f"the token of the snapshot's time ({created}) is not on this machine",
            "give the one that was declared at that time, as `token` in the spec on stdin",
        )
    return kept


def _where(
    machine: Machine, target: Mapping[str, Any] | None, step: str
) -> tuple[list[str], dict[str, str]]:
    """k3s' options for a target, and the environment that has its secrets."""
    if target is None:
        return [f"--etcd-snapshot-dir={K3S_DATABASE}/snapshots"], {}
    if "directory" in target:
        directory = target["directory"]
        seen = machine.stat(directory)
        if seen is None or seen.kind != "directory":
            raise Failure("refused", step, f"there is no directory {directory}", "mount or make it")
        return [f"--etcd-snapshot-dir={directory}"], {}
    s3 = target["s3"]
    options = ["--etcd-s3", f"--etcd-s3-endpoint={s3['endpoint']}"]
    options += [f"--etcd-s3-bucket={s3['bucket']}", f"--etcd-s3-region={s3['region']}"]
    options += [f"--etcd-s3-folder={s3['folder']}"] if s3["folder"] else []
    options += ["--etcd-s3-insecure"] if s3["insecure"] else []
    return options, {"AWS_ACCESS_KEY_ID": s3["accessKey"], "AWS_SECRET_ACCESS_KEY": s3["secretKey"]}


def _etcd_snapshot(
    machine: Machine, words: list[str], secrets: Mapping[str, str], step: str, **options: Any
) -> Ran:
    argv = [K3S_BINARY, "etcd-snapshot", *words]
    return run_tool(machine, argv, step, "failed", env=secrets, **options)


def _listed(
    machine: Machine, options: list[str], secrets: Mapping[str, str], step: str
) -> list[dict[str, Any]]:
    """What `k3s etcd-snapshot ls` shows: a table of name, location, size and time."""
    ran = _etcd_snapshot(machine, ["ls", *options], secrets, step, timeout=300.0)
    rows = [line.split() for line in ran.text.splitlines()]
    return [
        {"name": row[0], "location": row[1], "bytes": int(row[2]), "created": row[3]}
        for row in rows
        if len(row) >= 4 and row[2].isdigit()
    ]
