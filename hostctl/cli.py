"""The command line: verbs, their help and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TextIO

from hostctl.acceptance import k3d_accept
from hostctl.argocd import argocd_apply, argocd_resolve
from hostctl.backups import backup_list, backup_recover, backup_run
from hostctl.clean import clean
from hostctl.connectors import connector_status, connector_stop
from hostctl.existing import cluster_inspect, docker_find, metallb_wait
from hostctl.files import files_read, files_remove, files_write, kubeconfig
from hostctl.images import images_digest, images_import
from hostctl.install import install_k3d
from hostctl.k3d import (
    k3d_delete,
    k3d_ensure,
    k3d_identity,
    k3d_inspect,
    k3d_kubeconfig,
    k3d_start,
    k3d_stop,
)
from hostctl.k3s import k3s_ensure, k3s_inspect, k3s_rejoin, k3s_remove, k3s_start, k3s_stop
from hostctl.k3s_datastore import k3s_record
from hostctl.k3s_members import (
    k3s_drain,
    k3s_forget,
    k3s_kubeconfig,
    k3s_rotate_token,
    k3s_uncordon,
)
from hostctl.k3s_node import k3s_look
from hostctl.k3s_snapshots import k3s_snapshot_list, k3s_snapshot_restore, k3s_snapshot_take
from hostctl.machine import Machine
from hostctl.move import (
    move_back,
    move_cutover,
    move_freeze,
    move_import,
    move_receive,
    move_release,
    move_status,
    move_verify,
    move_withdraw,
)
from hostctl.owners import cluster_owners
from hostctl.postgres import postgres_password
from hostctl.preflight import k3d_doctor
from hostctl.protocol import EXIT_CODES, HOSTCTL_VERSION, Failure, Result, say
from hostctl.record import next_generation, read_record
from hostctl.restore import backup_restore, backup_verify
from hostctl.spec import NAME_SPEC, checked
from hostctl.storage import storage_check, storage_inspect
from hostctl.swap import k3d_retry
from hostctl.units import units_install, units_remove, units_status
from hostctl.watch import watch_inspect, watch_run
from hostctl.workloads import (
    rollout,
    secret_list,
    secret_seed,
)


class Verb(NamedTuple):
    """A verb: what runs, an example of its spec, how the record gives the spec of a NAME, and
    whether it runs without a spec, too."""

    run: Callable[[Machine, dict[str, Any]], Result]
    example: Mapping[str, Any]
    recorded: Callable[[Machine, str], dict[str, Any]] | None = None
    bare: bool = False


def _recorded_cluster(machine: Machine, name: str) -> dict[str, Any]:
    applied = read_record(machine, name).get("applied")
    if not applied:
        raise _nothing_recorded(name, "a cluster")
    return applied


def _recorded_kubeconfig(machine: Machine, name: str) -> dict[str, Any]:
    written = read_record(machine, name).get("kubeconfig")
    if not written:
        raise _nothing_recorded(name, "a kubeconfig")
    keys = ("path", "owner", "group", "mode", "directory_mode", "server")
    return {"cluster": name, **{key: written[key] for key in keys}}


def _recorded_acceptance(machine: Machine, name: str) -> dict[str, Any]:
    last = read_record(machine, name).get("acceptance") or {}
    # What the stack holds of one that did not pass must not stand when this one does.
    generation = next_generation(last, last.get("state") == "passed")
    return {"name": name, "acceptance": last.get("asked", {}), "generation": generation}


def _recorded_units(machine: Machine, name: str) -> dict[str, Any]:
    units = read_record(machine, name).get("units")
    if not units:
        raise _nothing_recorded(name, "units of cluster")
    return units["spec"]


def _recorded_backup(machine: Machine, name: str) -> dict[str, Any]:
    spec = _recorded_units(machine, name)
    return {key: spec[key] for key in ("cluster", "keep", "items", "targets") if key in spec}


def _recorded_copies(machine: Machine, name: str) -> dict[str, Any]:
    spec = _recorded_units(machine, name)
    return {key: spec[key] for key in ("cluster", "items", "targets", "scratch") if key in spec}


def _recorded_watch(machine: Machine, name: str) -> dict[str, Any]:
    watch = _recorded_units(machine, name).get("watching")
    if not watch:
        raise _nothing_recorded(name, "the watching of cluster")
    return watch


def _recorded_node(machine: Machine, name: str) -> dict[str, Any]:
    node = k3s_record(machine, name).get("node")
    if not node:
        raise _nothing_recorded(name, "a k3s of cluster")
    return {"cluster": name, "node": node}


def _recorded_snapshots(machine: Machine, name: str) -> dict[str, Any]:
    """Where this server's k3s puts them by itself."""
    node = k3s_look(machine, name)
    directory = node.config.get("etcd-snapshot-dir") if node else None
    return {"cluster": name, "target": {"directory": directory} if directory else None}


def _nothing_recorded(name: str, what: str) -> Failure:
    return Failure(
        "bad-spec",
        f"reading the record of {name}",
        f"this host has no record of {what} {name}",
        "run pulumi up once, or give the whole spec on stdin or with --spec FILE",
    )


_CLUSTER_EXAMPLE = {
    "name": "factory",
    "image": "rancher/k3s:v1.31.5-k3s1",
    "servers": 1,
    "agents": 0,
    "disable": ["traefik", "servicelb"],
    "api": {"bind": "127.0.0.1", "port": 6443},
    "resolvers": ["1.1.1.1", "9.9.9.9"],
    "storage_dir": "/mnt/img_pool/k3d/storage",
    "datastore_dir": "/mnt/img_pool/k3d/storage-server",
    "secrets_encryption": False,
    "network": {"name": "k3d-factory", "subnet": "172.30.0.0/16"},
    "k3s_args": [],
    "audit": None,
    "ports": [],
    "api_wait_seconds": 1800,
}
_ARCHIVE_EXAMPLE = "/var/lib/homelab/images/airgap.tar"
_KUBECONFIG_EXAMPLE = "/etc/k3d/kubeconfig"
_REPOSITORY_EXAMPLE = {"repository": "https://github.com/example/gitops", "path": "bootstrap"}


_MOVE_EXAMPLE = {
    "name": "factory",
    "nonce": "0123456789abcdef",
    "storage_dir": "/srv/k3d/storage",
    "files": [{"name": "storage.tar", "bytes": 10240, "sha256": "(64 hex digits)"}],
}
_ITEM_EXAMPLES = [
    {
        "name": "keycloak",
        "kind": "volume",
        "namespace": "factory",
        "claim": "keycloak-data",
        "scale_down": "deployment/keycloak",
        "stale_after_hours": 48,
    },
    {
        "name": "skillai",
        "kind": "postgres",
        "namespace": "factory",
        "workload": "statefulset/skillai-db",
        "container": None,
        "database": "skillai",
        "user": "skillai",
        "stale_after_hours": None,
    },
]
_TARGET_EXAMPLES = [
    {
        "name": "offsite",
        "kind": "s3",
        "repository": "s3:https://s3.example.org/backups/factory",
        "region": None,
        "keep_last": 0,
        "keep_daily": 14,
        "keep_weekly": 8,
        "keep_monthly": 12,
    }
]
_COPIES_EXAMPLE = {
    "cluster": "factory",
    "items": _ITEM_EXAMPLES,
    "targets": _TARGET_EXAMPLES,
    "scratch": "/var/lib/homelab/restored",
}
_WATCH_EXAMPLE = {
    "cluster": "factory",
    "storage_dir": "/mnt/img_pool/k3d/storage",
    "dns": {
        "name": "registry-1.docker.io",
        "image": "rancher/mirrored-library-busybox:1.36.1",
    },
    "argocd": True,
    "routes": ["argocd.example.org"],
    "metrics": "/var/lib/node_exporter",
    "webhook": "ntfy",
    "webhook_file": "/run/agenix/ntfy",
}
_UNITS_EXAMPLE = {
    "cluster": "factory",
    "hostctl": "/var/lib/homelab/hostctl",
    "init": "auto",
    "storage_dir": "/mnt/img_pool/k3d/storage",
    "start_seconds": 2700,
    "clean": "weekly",
    "backup": "daily",
    "keep": 14,
    "items": _ITEM_EXAMPLES,
    "targets": _TARGET_EXAMPLES,
    "verify": "weekly",
    "verified_within_days": 10,
    "scratch": "/var/lib/homelab/restored",
    "watch": "hourly",
    "watching": _WATCH_EXAMPLE,
    "generation": 0,
}


_NODE_EXAMPLE = {
    "cluster": "tower",
    "node": "k3s-master",
    "role": "server",
    "version": "v1.33.5+k3s1",
    "datastore": "sqlite",
    "init": True,
    "server": None,
    "rejoin": [],
    "config": {"node-ip": "10.89.97.201", "flannel-iface": "eth0", "tls-san": ["10.89.97.201"]},
    "secretConfig": {},
    "files": {},
    "install": {
        "url": "https://github.com/k3s-io/k3s/releases/download/v1.33.5%2Bk3s1/k3s",
        "sha256": None,
    },
    "peers": ["k3s-master", "k3s-worker-1"],
    "requires": {"modules": ["iscsi_tcp"], "programs": ["iscsiadm"]},
    "confirm": None,
    "timeouts": {"readySeconds": 600, "drainSeconds": 300},
}
_OWN_NODE_EXAMPLE = {"cluster": "tower", "node": "k3s-worker-2"}
_MEMBER_EXAMPLE = {**_OWN_NODE_EXAMPLE, "drainSeconds": 300, "readySeconds": 600, "version": None}
_S3_EXAMPLE = {
    "s3": {
        "endpoint": "10.89.97.20:9000",
        "bucket": "k3s-snapshots",
        "accessKey": "(the text)",
        "secretKey": "(the text)",
    }
}


def _by_name(machine: Machine, name: str) -> dict[str, Any]:
    return {"name": name}


VERBS: dict[tuple[str, ...], Verb] = {
    ("k3d", "inspect"): Verb(k3d_inspect, _CLUSTER_EXAMPLE, _recorded_cluster),
    ("k3d", "ensure"): Verb(
        k3d_ensure,
        {**_CLUSTER_EXAMPLE, "generation": 1, "incarnation": "0a1b2c3d-1", "recreate": None},
        _recorded_cluster,
    ),
    ("k3d", "start"): Verb(k3d_start, {"name": "factory"}, _by_name),
    ("k3d", "stop"): Verb(k3d_stop, {"name": "factory"}, _by_name),
    ("k3d", "delete"): Verb(k3d_delete, {"name": "factory", "confirm": "factory"}, _by_name),
    ("k3d", "retry"): Verb(k3d_retry, {"name": "factory"}, _by_name),
    ("k3d", "doctor"): Verb(k3d_doctor, _CLUSTER_EXAMPLE, _recorded_cluster, bare=True),
    ("k3d", "accept"): Verb(
        k3d_accept,
        {
            "name": "factory",
            "acceptance": {
                "name": "registry-1.docker.io",
                "image": "rancher/mirrored-library-busybox:1.36.1",
                "required": False,
            },
            "generation": 1,
        },
        _recorded_acceptance,
    ),
    ("k3d", "identity"): Verb(k3d_identity, {"name": "factory"}, _by_name),
    ("k3d", "kubeconfig"): Verb(
        k3d_kubeconfig, {"name": "factory", "server": "https://127.0.0.1:6443"}
    ),
    ("move", "status"): Verb(move_status, {"name": "factory"}, _by_name),
    ("move", "freeze"): Verb(
        move_freeze,
        {
            "name": "factory",
            "connectors": [{"namespace": "factory", "deployment": "cloudflared-factory"}],
        },
        _by_name,
    ),
    ("move", "receive"): Verb(move_receive, _MOVE_EXAMPLE),
    ("move", "import"): Verb(
        move_import, {**_MOVE_EXAMPLE, "datastore_dir": "/srv/k3d/storage-server"}
    ),
    ("move", "verify"): Verb(move_verify, {"name": "factory"}, _by_name),
    ("move", "cutover"): Verb(move_cutover, {"name": "factory"}, _by_name),
    ("move", "withdraw"): Verb(move_withdraw, {"name": "factory"}, _by_name),
    ("move", "back"): Verb(move_back, {"name": "factory", "confirm": "factory"}, _by_name),
    ("move", "release"): Verb(move_release, {"name": "factory", "confirm": "factory"}, _by_name),
    ("images", "digest"): Verb(images_digest, {"files": [_ARCHIVE_EXAMPLE]}),
    ("images", "import"): Verb(
        images_import,
        {
            "cluster": "factory",
            "files": [{"path": _ARCHIVE_EXAMPLE, "sha256": "(64 hex digits)"}],
            "incarnation": "0a1b2c3d-1",
            "image": "rancher/k3s:v1.31.5-k3s1",
        },
    ),
    ("install", "k3d"): Verb(
        install_k3d, {"version": None, "sha256": None, "url": None}, bare=True
    ),
    ("kubeconfig",): Verb(
        kubeconfig,
        {
            "cluster": "factory",
            "path": _KUBECONFIG_EXAMPLE,
            "owner": "root",
            "group": "wheel",
            "mode": "0640",
            "directory_mode": "0750",
            "server": "https://127.0.0.1:6443",
            "generation": 1,
        },
        _recorded_kubeconfig,
    ),
    ("files", "read"): Verb(
        files_read,
        {
            "files": [
                {
                    "path": "/run/agenix/minio-creds",
                    "as": "manifest",
                    "namespace": "factory",
                    "name": "minio-creds",
                    "type": "Opaque",
                    "keys": [],
                    "optional": False,
                }
            ]
        },
    ),
    ("files", "write"): Verb(
        files_write,
        {
            "path": "/var/lib/homelab/tunnels/p510.token",
            "content": "(the text)",
            "mode": "0600",
            "owner": "root",
            "group": "root",
            "restart_container": "cloudflared-p510",
        },
    ),
    ("files", "remove"): Verb(files_remove, {"path": "/var/lib/homelab/tunnels/p510.token"}),
    ("secret", "seed"): Verb(
        secret_seed,
        {
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            "namespace": "factory",
            "name": "factory-cli-creds",
            "type": "Opaque",
            "data": {"token": "(base64)"},
            "labels": {},
        },
    ),
    ("rollout",): Verb(
        rollout,
        {
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            "namespace": "factory",
            "secrets": {"minio-creds": "(a digest of its data)"},
        },
    ),
    ("postgres", "password"): Verb(
        postgres_password,
        {
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            "namespace": "factory",
            "workload": "statefulset/skillai-db",
            "container": None,
            "database": "postgres",
            "user": "skillai",
            "role": "skillai",
            "password": "(the text)",
        },
    ),
    ("argocd", "resolve"): Verb(
        argocd_resolve,
        {"cluster": "factory", **_REPOSITORY_EXAMPLE, "ref": "main", "commit": None},
    ),
    ("argocd", "apply"): Verb(
        argocd_apply,
        {
            "cluster": "factory",
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            **_REPOSITORY_EXAMPLE,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "namespace": "argocd",
        },
    ),
    ("connector", "status"): Verb(
        connector_status,
        {"kubeconfig": _KUBECONFIG_EXAMPLE, "namespace": "factory", "deployment": "cloudflared"},
    ),
    ("connector", "stop"): Verb(
        connector_stop,
        {"kubeconfig": _KUBECONFIG_EXAMPLE, "namespace": "factory", "deployment": "cloudflared"},
    ),
    ("cluster", "inspect"): Verb(
        cluster_inspect, {"name": "metal", "kubeconfig": "(the text of a kubeconfig)"}
    ),
    ("metallb", "wait"): Verb(
        metallb_wait,
        {
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            "namespace": "metallb-system",
            "seconds": 300,
            "chart": "0.16.1",
        },
    ),
    ("storage", "check"): Verb(
        storage_check,
        {"needs": ["iscsi", "crypt", "nfs"], "disks": ["/dev/disk/by-id/ata-EXAMPLE_1"]},
    ),
    ("storage", "inspect"): Verb(storage_inspect, {"cluster": "factory", "kubeconfig": None}),
    ("cluster", "owners"): Verb(
        cluster_owners,
        {"cluster": "factory", "kinds": ["Secret", "Deployment.apps"], "kubeconfig": None},
    ),
    ("k3s", "inspect"): Verb(k3s_inspect, {**_NODE_EXAMPLE, "tokenDigest": "(16 hex digits)"}),
    ("k3s", "ensure"): Verb(k3s_ensure, {**_NODE_EXAMPLE, "token": "(the text)", "generation": 1}),
    ("k3s", "stop"): Verb(k3s_stop, _OWN_NODE_EXAMPLE, _recorded_node),
    ("k3s", "start"): Verb(k3s_start, _OWN_NODE_EXAMPLE, _recorded_node),
    ("k3s", "rejoin"): Verb(
        k3s_rejoin, {**_OWN_NODE_EXAMPLE, "confirm": "k3s-worker-2"}, _recorded_node
    ),
    ("k3s", "remove"): Verb(k3s_remove, _OWN_NODE_EXAMPLE),
    ("k3s", "drain"): Verb(k3s_drain, _MEMBER_EXAMPLE),
    ("k3s", "uncordon"): Verb(k3s_uncordon, _MEMBER_EXAMPLE),
    ("k3s", "forget"): Verb(k3s_forget, _MEMBER_EXAMPLE),
    ("k3s", "token"): Verb(k3s_rotate_token, {"cluster": "tower", "new": "(the text)"}),
    ("k3s", "kubeconfig"): Verb(
        k3s_kubeconfig, {"cluster": "tower", "server": "https://10.89.97.201:6443"}
    ),
    ("k3s", "snapshot", "take"): Verb(
        k3s_snapshot_take,
        {
            "cluster": "tower",
            "name": "on-demand",
            "target": _S3_EXAMPLE,
            "retention": 5,
            "version": None,
        },
    ),
    ("k3s", "snapshot", "list"): Verb(
        k3s_snapshot_list,
        {"cluster": "tower", "target": {"directory": "/mnt/nfs/k3s"}},
        _recorded_snapshots,
    ),
    ("k3s", "snapshot", "restore"): Verb(
        k3s_snapshot_restore,
        {
            "cluster": "tower",
            "name": "on-demand-k3s-master-1763730000",
            "target": None,
            "token": None,
            "confirm": "tower",
        },
    ),
    ("docker", "find"): Verb(
        docker_find, {"containers": ["cloudflared-p510"], "networks": ["k3d-factory"]}
    ),
    ("secret", "list"): Verb(secret_list, {"cluster": "factory"}),
    ("units", "install"): Verb(units_install, _UNITS_EXAMPLE, _recorded_units),
    ("units", "status"): Verb(units_status, _UNITS_EXAMPLE, _recorded_units),
    ("units", "remove"): Verb(
        units_remove, {"cluster": "factory"}, lambda machine, name: {"cluster": name}
    ),
    ("clean",): Verb(clean, {"name": "factory", "dry_run": True}, _by_name),
    ("backup", "run"): Verb(
        backup_run,
        {
            "cluster": "factory",
            "keep": 14,
            "items": _ITEM_EXAMPLES,
            "targets": _TARGET_EXAMPLES,
        },
        _recorded_backup,
    ),
    ("backup", "verify"): Verb(backup_verify, _COPIES_EXAMPLE, _recorded_copies),
    ("backup", "restore"): Verb(
        backup_restore,
        {**_COPIES_EXAMPLE, "item": "keycloak", "target": "offsite", "confirm": None},
        _recorded_copies,
    ),
    ("backup", "list"): Verb(backup_list, {"name": "factory"}, _by_name),
    ("watch", "run"): Verb(watch_run, _WATCH_EXAMPLE, _recorded_watch),
    ("watch", "inspect"): Verb(
        watch_inspect,
        {
            "cluster": "factory",
            "containers": ["cloudflared-p510"],
            "directories": ["/mnt/img_pool/k3d/storage"],
        },
    ),
    ("backup", "recover"): Verb(backup_recover, {"name": "factory"}, _by_name),
}


_CONFIRMED: dict[tuple[str, ...], str] = {
    ("k3d", "delete"): "the cluster's name once more",
    ("k3s", "rejoin"): "the node's name",
    ("move", "back"): "the cluster's name once more",
    ("move", "release"): "the cluster's name once more",
    ("backup", "restore"): "the cluster's name once more",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are results like all others."""

    def error(self, message: str) -> NoReturn:
        remedy = f"`{self.prog} --help` shows what it takes"
        raise Failure("bad-spec", "reading the command line", message, remedy)


def _parser(verbs: Iterable[tuple[str, ...]]) -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="hostctl",
        formatter_class=plain,
        description=__doc__,
        epilog="On a broken night: hostctl k3d doctor NAME; hostctl k3d ensure NAME; "
        "hostctl kubeconfig NAME.",
    )
    parser.add_argument("--version", action="version", version=f"hostctl {HOSTCTL_VERSION}")
    top = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    groups: dict[tuple[str, ...], Any] = {(): top}
    for words in verbs:
        verb = VERBS[words]
        summary = " ".join((verb.run.__doc__ or "").split("\n\n")[0].split())
        text = " ".join(words)
        for depth in range(1, len(words)):
            inner = words[:depth]
            if inner not in groups:
                group = groups[inner[:-1]].add_parser(
                    inner[-1], help=f"hostctl {' '.join(inner)} --help"
                )
                groups[inner] = group.add_subparsers(
                    metavar="VERB", required=True, parser_class=_Parser
                )
        parent = groups[words[:-1]]
        example = json.dumps(verb.example, indent=1)
        cluster = "tower" if words[0] == "k3s" else "factory"
        one = parent.add_parser(
            words[-1],
            formatter_class=plain,
            help=summary,
            description=_filled(verb.run.__doc__ or ""),
            epilog=f"example:\n  hostctl {text} <<'EOF'\n{example}\nEOF\n"
            + (
                f"or, as recorded on this host:\n  hostctl {text} {cluster}\n"
                if verb.recorded
                else ""
            )
            + (f"or, without a spec:\n  hostctl {text}\n" if verb.bare else ""),
        )
        one.set_defaults(words=words)
        if verb.recorded:
            one.add_argument("name", nargs="?", help="a cluster of this host, instead of a spec")
        one.add_argument("--spec", metavar="FILE", help="read the spec from a file, not from stdin")
        one.add_argument(
            "--exit-zero", action="store_true", help="exit 0 whenever a JSON result was printed"
        )
        if words == ("backup", "restore"):
            one.add_argument("--item", metavar="ITEM", help="what to restore")
            one.add_argument("--target", metavar="TARGET", help="where from; else beside the data")
            one.add_argument("--snapshot", metavar="ID", help="which; else the newest")
            one.add_argument("--into", metavar="DIRECTORY", help="not to its place, but there")
            one.add_argument(
                "--in-place", action="store_true", help="a database: under its own name, too"
            )
        if words in _CONFIRMED:
            one.add_argument("--confirm", metavar="NAME", help=_CONFIRMED[words])
        if words == ("clean",):
            one.add_argument("--dry-run", action="store_true", help="show what it would remove")
    return parser


def _filled(docstring: str) -> str:
    return "\n".join(line.strip() for line in docstring.strip().splitlines())


def _spec(
    machine: Machine, verb: Verb, options: argparse.Namespace, stdin: TextIO
) -> dict[str, Any]:
    name = getattr(options, "name", None)
    own = ("confirm", "dry_run", "item", "target", "snapshot", "into", "in_place")
    flags = {key: getattr(options, key, None) for key in own}
    flags = {key: value for key, value in flags.items() if value}
    step = f"reading the spec of {' '.join(options.words)}"
    if name is not None:
        assert verb.recorded
        spec = verb.recorded(
            machine, checked({"name": name}, NAME_SPEC, "a cluster's name")["name"]
        )
        return {**spec, **flags}
    try:
        if options.spec:
            text = machine.read(options.spec).decode()
        else:
            text = "" if verb.bare and stdin.isatty() else _typed(stdin, options.words)
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(
            "bad-spec", step, f"{options.spec}: {error}", "give a readable file"
        ) from None
    if verb.bare and not text.strip():
        return {}
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        # The text is not shown: it may hold a secret.
        remedy = f"`hostctl {' '.join(options.words)} --help` shows a spec"
        raise Failure("bad-spec", step, "it is not JSON", remedy) from None
    if not isinstance(spec, dict):
        raise Failure("bad-spec", step, "it is not a JSON object", "give an object")
    return {**spec, **flags}


def _typed(stdin: TextIO, words: Sequence[str]) -> str:
    if stdin.isatty():
        say(f"reads the spec from here until Ctrl-D; `hostctl {' '.join(words)} --help` shows one")
    return stdin.read()


def main(
    argv: Sequence[str] | None = None,
    stdin: TextIO | None = None,
    machine: Machine | None = None,
) -> int:
    """Runs a verb and prints its result. Returns the exit code; raises nothing but SystemExit for
    --help and --version."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    step = "hostctl " + " ".join(word for word in arguments if not word.startswith("-"))
    try:
        # Help for all of them takes longer to write than most verbs do.
        asked = [words for words in VERBS if tuple(arguments[: len(words)]) == words] or VERBS
        options = _parser(asked).parse_args(arguments)
        verb = VERBS[options.words]
        here = machine or Machine()
        if machine is None and threading.current_thread() is threading.main_thread():
            # To be told to end is to be interrupted: children and locks are seen to.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        result = verb.run(here, _spec(here, verb, options, stdin or sys.stdin))
        answer: dict[str, Any] = {"hostctl": HOSTCTL_VERSION, "ok": True, **result}
        code = 0
    except Failure as failure:
        answer, code = _refusal(failure), EXIT_CODES[failure.code]
    except OSError as error:
        remedy = "run it as root (homelab:host.sudo); is the disk full or read-only?"
        where = f"{error.filename}: " if error.filename else ""
        failure = Failure(
            "failed", step, f"{where}{error.strerror or type(error).__name__}", remedy
        )
        answer, code = _refusal(failure), EXIT_CODES["failed"]
    except KeyboardInterrupt:
        remedy = "run it again: what was begun is continued"
        failure = Failure("failed", step, "interrupted", remedy)
        answer, code = _refusal(failure), EXIT_CODES["failed"]
    except Exception as error:
        # Named by place and type: the message may hold a value of the spec.
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        line = place.tb_lineno if place else 0
        cause = f"{type(error).__name__} in line {line} of hostctl {HOSTCTL_VERSION}"
        remedy = "report this line: a tool printed what hostctl does not know (`hostctl k3d doctor`"
        remedy += " shows which versions there are), or it is a defect of hostctl"
        failure = Failure("failed", step, cause, remedy)
        answer, code = _refusal(failure), EXIT_CODES["failed"]
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)
    return 0 if "--exit-zero" in arguments else code


def _refusal(failure: Failure) -> dict[str, Any]:
    error = {
        "step": failure.step,
        "cause": failure.cause,
        "remedy": failure.remedy,
        "code": failure.code,
    }
    return {"hostctl": HOSTCTL_VERSION, "ok": False, "error": error}
