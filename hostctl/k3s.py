"""Verbs: the k3s of a machine, which is a node of a cluster."""

from __future__ import annotations

import base64
import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hostctl.certificates import DAY_SECONDS, EXPIRES_SOON_DAYS, validity_of
from hostctl.cluster_backup import run_copy, time_stamp, utc
from hostctl.k3s_datastore import (
    conversion_is_young,
    convert_k3s,
    k3s_record,
    keep_token,
    set_token,
    settle_k3s,
    unconvert_k3s,
    write_k3s_record,
)
from hostctl.k3s_members import other_servers
from hostctl.k3s_node import (
    K3S_BINARY,
    K3S_CONFIG,
    K3S_DATA,
    K3S_DATABASE,
    K3S_FIXED,
    K3S_KUBECONFIG,
    K3S_MANIFESTS,
    K3S_SERVER_TOKEN,
    K3S_TOKEN,
    K3S_UNIT_DIRECTORY,
    K3S_UNITS,
    K3sNode,
    k3s_config,
    k3s_config_text,
    k3s_digest,
    k3s_identity,
    k3s_installed_version,
    k3s_kubectl,
    k3s_look,
    k3s_member,
    k3s_password,
    k3s_properties,
    k3s_release,
    k3s_spec,
    k3s_token_digest,
    k3s_unit,
    refuse_without_systemd,
)
from hostctl.k3s_service import (
    install_k3s_binary,
    k3s_host_port,
    k3s_start_unit,
    k3s_stop_unit,
    k3s_wait,
    link_kubectl,
    unlink_kubectl,
)
from hostctl.machine import Machine, TookTooLong, ToolMissing
from hostctl.preflight import Finding, cgroup_findings, module_findings, room_findings
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, next_generation
from hostctl.spec import CLUSTER_NAME, OBJECT_NAME, Value, checked, or_null
from hostctl.tools import for_system, run_tool

_LEAVES_SECONDS = 120
# By it k3s keeps a server's Node until the server is out of etcd. It is there soon after the Node.
_MEMBER_FINALIZER = "wrangler.cattle.io/managed-etcd-controller"
_HELD_SECONDS = 30
_CERTIFICATES = ("server/tls/serving-kube-apiserver.crt", "agent/serving-kubelet.crt")
_PROGRAM_REMEDIES = {
    "iscsiadm": (
        'services.openiscsi = { enable = true; name = "iqn.2020-08.org.linux-iscsi:host"; };',
        "Shares > iSCSI is for targets; Longhorn does not run there.",
        "apt install open-iscsi; systemctl enable --now iscsid",
    ),
    "mount.nfs": (
        'boot.supportedFilesystems = [ "nfs" ];',
        "it comes with the system.",
        "apt install nfs-common",
    ),
    "cryptsetup": (
        "environment.systemPackages = [ pkgs.cryptsetup ];",
        "it comes with the system.",
        "apt install cryptsetup",
    ),
}


# Looking


def k3s_inspect(machine: Machine, spec: dict[str, Any]) -> Result:
    """Looks at this machine's k3s and changes nothing: state, differences from the settings, what a
    person should know. `node` is null where there is none; what cannot be told is a failure."""
    wanted = k3s_spec(spec, "k3s inspect")
    record = k3s_record(machine, wanted["cluster"])
    node = k3s_look(machine, wanted["cluster"], bool(record.get("pending")))
    warnings: list[tuple[str, str]] = []
    found: list[dict[str, Any]] = []
    identity, facts = None, None
    if node is None:
        warnings = [(one.what, one.remedy) for one in _node_findings(machine, wanted)]
        found = _missing_interface(machine, wanted)
    else:
        if node.role == "server" and node.state != "stopped":
            identity = k3s_identity(machine)
        found = k3s_differences(machine, wanted, node)
        expires = _certificates_end(machine)
        warnings = [*_live_warnings(machine, wanted, node, expires)]
        facts = {
            "state": node.state,
            "detail": node.detail,
            "role": node.role,
            "version": node.version,
            "datastore": node.datastore,
            "config": {key: node.config[key] for key in node.config if key not in _hidden(wanted)},
            "tokenDigest": node.token_digest,
            "identity": identity,
            "certificates": {"expires": utc(expires) if expires else None},
            "installed": node.installed,
        }
    return {
        "node": facts,
        "differences": found,
        "warnings": [{"what": what, "remedy": remedy} for what, remedy in warnings],
        "generation": next_generation(record, node is not None and not found),
        "incarnation": _incarnation(record, node, identity),
    }


def _hidden(wanted: Mapping[str, Any]) -> set[str]:
    """Keys of the config whose values are not shown."""
    secret = {key for key in wanted["secretConfig"]} | set(wanted["secretConfigDigest"])
    return secret | {"token", "agent-token", "vpn-auth", "datastore-endpoint"}


def _incarnation(record: Mapping[str, Any], node: K3sNode | None, identity: str | None) -> int:
    """Counts how often the cluster was made here: one more when the recorded one is gone or another
    is in its place."""
    count, known = record.get("incarnation"), record.get("identity")
    if count is None:
        return 1
    gone = bool(known) and (node is None or (identity is not None and identity != known))
    return count + 1 if gone else count


def k3s_differences(
    machine: Machine, wanted: Mapping[str, Any], node: K3sNode
) -> list[dict[str, Any]]:
    """Where the machine is not what is declared. ``fixed``: decided when it was made, and changed
    only when the cluster's name is confirmed, or not at all. No secret is shown."""
    found: list[dict[str, Any]] = []

    def differ(key: str, declared: Any, live: Any, fixed: bool = False) -> None:
        if declared != live:
            found.append({"key": key, "declared": declared, "live": live, "fixed": fixed})

    differ("installed", "hostctl", node.installed, fixed=True)
    ours = (wanted["cluster"], wanted["node"])
    if node.installed == "hostctl" and node.unit:
        differ("node", "/".join(ours), f"{node.cluster}/{node.node}", fixed=True)
    differ("state", "running", node.state)
    if not node.unit:
        return found
    differ("role", wanted["role"], node.role, fixed=True)
    differ("version", wanted["version"], node.version)
    if node.datastore:
        differ("datastore", wanted["datastore"], node.datastore, fixed=True)
    differ("tokenDigest", wanted["tokenDigest"], node.token_digest)
    # Where another server was joined in place of making a second cluster, that one stays.
    declared = k3s_config(wanted, wanted["server"])
    if wanted["init"] and node.config.get("server") in wanted["rejoin"]:
        declared = k3s_config(wanted, node.config["server"])
    secrets = dict(wanted["secretConfigDigest"])
    secrets |= {key: k3s_digest(value) for key, value in wanted["secretConfig"].items()}
    for key in sorted({*declared, *node.config} - set(secrets)):
        fixed = key in K3S_FIXED and node.installed == "hostctl"
        if key in _hidden(wanted) and key in node.config:
            differ(f"config.{key}", None, "a value that is not shown")
        else:
            differ(f"config.{key}", declared.get(key), node.config.get(key), fixed)
    for key, digest in sorted(secrets.items()):
        live = node.config.get(key)
        differ(f"secretConfig.{key}", digest, None if live is None else k3s_digest(str(live)))
    found += _missing_interface(machine, wanted)
    for path, text in sorted(wanted["files"].items()):
        live = None
        with contextlib.suppress(OSError):
            live = k3s_digest(machine.read(path).decode("utf-8", "replace"))
        differ(f"files.{path}", k3s_digest(text), live)
    return found


def _missing_interface(machine: Machine, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A declared interface that this machine does not have, as a difference that nothing heals."""
    interface = wanted["config"].get("flannel-iface")
    there = machine.names("/sys/class/net")
    if not interface or not there or interface in there:
        return []
    key = "config.flannel-iface"
    why = f"this machine has no interface {interface}; it has {', '.join(there)}"
    return [{"key": key, "declared": interface, "live": there, "fixed": True, "why": why}]


def _certificates_end(machine: Machine) -> float | None:
    """When the first of the node's own certificates ends; None when they cannot be read. The
    authorities' own live ten years, and tell nothing."""
    ends = []
    for name in _CERTIFICATES:
        with contextlib.suppress(OSError, ValueError):
            text = machine.read(f"{K3S_DATA}/{name}").decode("ascii", "replace")
            ends.append(validity_of(_der_of(text)).ends)
    return min(ends, default=None)


def _der_of(pem: str) -> bytes:
    block = re.search(r"-----BEGIN CERTIFICATE-----(.*?)-----END", pem, re.DOTALL)
    return base64.b64decode(block.group(1)) if block else b""


def _live_warnings(
    machine: Machine, wanted: Mapping[str, Any], node: K3sNode, expires: float | None
) -> Iterator[tuple[str, str]]:
    if expires is not None and expires - machine.now() < EXPIRES_SOON_DAYS * DAY_SECONDS:
        ended = "ended" if expires <= machine.now() else "ends"
        yield (
            f"a certificate of {wanted['node']} {ended} on {utc(expires)}",
            f"hostctl k3s stop {wanted['cluster']}; hostctl k3s start {wanted['cluster']}: k3s "
            "renews at its start what has less than 90 days left (120 from v1.31.9, v1.32.5 and "
            "v1.33.1 on)",
        )
    if node.installed != "hostctl":
        yield (
            f"this k3s was installed by {node.installed}",
            f"set confirm to {wanted['cluster']} to take it over with its data, or remove it by "
            f"{K3S_BINARY.replace('k3s', 'k3s-uninstall.sh')}",
        )
    extra = machine.names(f"{K3S_CONFIG}.d")
    if extra:
        yield (
            f"{K3S_CONFIG}.d has {', '.join(extra)}, which k3s reads after what is declared",
            "move their keys to the settings and remove them",
        )
    yield from (
        (one.what, one.remedy)
        for one in _host_needs(machine, wanted)
        if one.severity in ("error", "warning")
    )


# Preflight


def _node_findings(machine: Machine, wanted: Mapping[str, Any]) -> Iterator[Finding]:
    """What keeps a machine from becoming this node, or may."""
    config = wanted["config"]
    backend = config.get("flannel-backend", "vxlan")
    ports = [(10250, "tcp")]
    if wanted["role"] == "server":
        ports.append((6443, "tcp"))
        if wanted["datastore"] == "etcd":
            ports += [(2379, "tcp"), (2380, "tcp")]
    if backend == "vxlan":
        ports.append((8472, "udp"))
    for port, protocol in ports:
        if not machine.port_is_free("0.0.0.0", port, protocol):
            yield Finding(
                "error",
                f"{protocol} port {port} is in use, which k3s needs",
                f"see by what: ss --listening --{protocol} --processes 'sport = :{port}'; stop it "
                "(a k3s that was started by hand?)",
            )
    yield from _network_findings(machine, config)
    yield from _host_needs(machine, wanted)
    if not machine.is_empty(K3S_DATABASE) and wanted["role"] == "server":
        yield Finding(
            "warning",
            f"{K3S_DATA}/server has the data of an earlier server, which would be started again",
            f"move it away if it is not this cluster's: mv {K3S_DATA}/server {K3S_DATA}/server.old",
        )


def _network_findings(machine: Machine, config: Mapping[str, Any]) -> Iterator[Finding]:
    for one in _missing_interface(machine, {"config": config}):
        yield Finding(
            "error",
            f"{one['key']}: {one['why']}",
            "correct the interface, or bring it up: ip link show",
        )
    for address in str(config.get("node-ip", "")).split(","):
        if address and not machine.has_address(address):
            yield Finding(
                "error",
                f"config.node-ip: no interface of this machine has {address}",
                "correct the address, or bring its interface up: ip address show",
            )


def _host_needs(machine: Machine, wanted: Mapping[str, Any]) -> Iterator[Finding]:
    """What k3s, and what is declared under `requires`, need of the operating system."""
    yield from cgroup_findings(machine, {})
    yield from room_findings(machine, K3S_DATA, "images, volumes and the datastore")
    backend = wanted["config"].get("flannel-backend", "vxlan")
    needed = [
        ("overlay", "error", "containerd keeps images on it"),
        ("br_netfilter", "warning", "Services reach pods of their own node by it"),
        ("nf_conntrack", "warning", "Services are routed by it"),
    ]
    if backend == "vxlan":
        needed.append(("vxlan", "error", "flannel's pod network is made of it"))
    elif str(backend).startswith("wireguard"):
        needed.append(("wireguard", "error", "flannel's pod network is made of it"))
    needed += [
        (module, "error", "declared under requires.modules")
        for module in wanted["requires"]["modules"]
    ]
    for module, severity, why in needed:
        yield from module_findings(machine, module, severity, why)
    for program in wanted["requires"]["programs"]:
        if not machine.has_program(program):
            ways = _PROGRAM_REMEDIES.get(program)
            yield Finding(
                "error",
                f"there is no program {program} (declared under requires.programs)",
                for_system(machine, *ways) if ways else f"install {program}",
            )
    with contextlib.suppress(OSError):
        swaps = machine.read("/proc/swaps").decode("ascii", "replace").splitlines()[1:]
        if swaps:
            yield Finding(
                "warning",
                "swap is on: the kubelet of k3s starts all the same, and memory limits of pods "
                "hold no longer as they read",
                "swapoff --all, and remove it from /etc/fstab (NixOS: swapDevices = [ ];)",
            )


# Making it be there


def k3s_ensure(machine: Machine, spec: dict[str, Any]) -> Result:
    """Makes this machine the node that is declared, running and Ready: installs, joins, upgrades,
    heals. Safe at any time and after a kill; touches no k3s of somebody else's."""
    wanted = k3s_spec(spec, "k3s ensure")
    step = f"ensuring node {wanted['node']} of {wanted['cluster']}"
    if not wanted["token"]:
        raise Failure("bad-spec", "spec of k3s ensure", "token: missing", "give it on stdin")
    with cluster_lock(machine, wanted["cluster"]):
        refuse_without_systemd(machine, step)
        record = k3s_record(machine, wanted["cluster"])
        if record.get("restoring"):
            name = record["restoring"]["name"]
            raise Failure(
                "refused",
                step,
                f"the restore of {name} was cut off; what starts now may be neither",
                f"run `hostctl k3s snapshot restore` of {name} again, with the same spec",
            )
        _end_conversion(machine, wanted, record, step)
        node = k3s_look(machine, wanted["cluster"], bool(record.get("pending")))
        incarnation = _incarnation(record, node, _known_identity(machine, node))
        changed: list[str] = []
        if node is None or not node.unit:
            _refuse_findings(step, machine, wanted)
        else:
            _refuse_fixed(machine, wanted, node, step)
        _refuse_version(machine, wanted, node, step)
        joins = _server_to_join(machine, wanted, node, step)
        converts = node and wanted["role"] == "server" and _converts(machine, wanted, node)
        write_k3s_record(machine, wanted["cluster"], pending=wanted["version"], node=wanted["node"])
        unit = K3S_UNITS[wanted["role"]]
        if node and node.installed == "get.k3s.io":
            _adopt(machine, wanted, node)
            changed.append("adopted")
        if converts:
            convert_k3s(machine, wanted, unit)
            changed.append("datastore")
        if install_k3s_binary(machine, wanted):
            changed.append("version")
        if link_kubectl(machine):
            changed.append("kubectl")
        changed += _write_files(machine, wanted, joins, record.get("files") or [])
        # k3s itself applies a manifest that is written while it runs.
        told = [one for one in changed if not one.startswith(K3S_MANIFESTS)]
        if told or node is None or node.state != "running":
            say(f"starting {unit} of {wanted['node']}")
            k3s_start_unit(machine, unit)
            changed.append("started")
        try:
            k3s_wait(machine, wanted, unit, fresh="started" in changed)
        except Failure as failure:
            if conversion_is_young(machine, wanted["cluster"]):
                raise _go_back(machine, wanted, record, step, failure.cause) from None
            raise
        settle_k3s(machine, wanted["cluster"], wanted["datastore"])
        identity = k3s_identity(machine)
        generation = wanted["generation"]
        keep_token(machine, wanted["token"])
        write_k3s_record(
            machine,
            wanted["cluster"],
            pending=None,
            files=sorted(wanted["files"]),
            tokens=_tokens(machine, record, wanted),
            identity=identity,
            incarnation=incarnation,
            **({} if generation is None else {"generation": generation}),
        )
        return {"identity": identity, "version": wanted["version"], "changed": changed}


def _known_identity(machine: Machine, node: K3sNode | None) -> str | None:
    running = node is not None and node.role == "server" and node.state == "running"
    return k3s_identity(machine) if running else None


def _tokens(
    machine: Machine, record: Mapping[str, Any], wanted: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Which token was in use from when on: a snapshot is sealed with the one of its time."""
    tokens = list(record.get("tokens") or [])
    if not tokens or tokens[-1]["digest"] != wanted["tokenDigest"]:
        tokens.append({"digest": wanted["tokenDigest"], "since": utc(machine.now())})
    return tokens


def _refuse_findings(step: str, machine: Machine, wanted: Mapping[str, Any]) -> None:
    errors = [one for one in _node_findings(machine, wanted) if one.severity == "error"]
    if errors:
        raise Failure(
            "refused",
            step,
            "; ".join(one.what for one in errors) + "; nothing was installed",
            "; ".join(dict.fromkeys(one.remedy for one in errors)),
        )


def _refuse_fixed(machine: Machine, wanted: Mapping[str, Any], node: K3sNode, step: str) -> None:
    """What no run may change by itself: somebody else's k3s, and what is fixed."""
    confirmed = wanted["confirm"] == wanted["cluster"]
    fixed = {one["key"]: one for one in k3s_differences(machine, wanted, node) if one["fixed"]}
    said = "; ".join(
        f"{key} is {one['live']}, declared {one['declared']}" for key, one in fixed.items()
    )
    foreign = node.installed == "unknown" or "node" in fixed
    if foreign or (node.installed == "get.k3s.io" and not confirmed):
        remedy = f"leave it alone, or remove it by hand and run up again: {node.unit}"
        if not foreign:
            remedy = f"set confirm to {wanted['cluster']} to take it over with its data"
        raise Failure("refused", step, f"this k3s is somebody else's: {said}", remedy)
    changeable = {"installed", "datastore"} if confirmed else set()
    if set(fixed) - changeable:
        raise Failure(
            "refused",
            step,
            f"fixed when it was made: {said}",
            f"declare the live values; a datastore is converted with confirm: {wanted['cluster']}; "
            "for the others remove the node (k3s remove) and let it be made anew",
        )
    rotated = node.token_digest in (None, wanted["tokenDigest"])
    if wanted["init"] and not rotated and _sealed_with(machine) != wanted["tokenDigest"]:
        raise Failure(
            "refused",
            step,
            "the token differs from the one that the datastore is sealed with; with another one "
            "k3s does not start",
            "`hostctl k3s token` rotates it first (--help shows its spec); a restart does not",
        )


def _sealed_with(machine: Machine) -> str | None:
    with contextlib.suppress(OSError):
        text = machine.read(K3S_SERVER_TOKEN).decode("utf-8", "replace").strip()
        return k3s_token_digest(text) if text else None
    return None


def _refuse_version(
    machine: Machine, wanted: Mapping[str, Any], node: K3sNode | None, step: str
) -> None:
    """Kubernetes goes up one minor version at a time, servers before agents, and never down."""
    declared = k3s_release(wanted["version"])
    if node and node.version and node.unit:
        try:
            live = k3s_release(node.version)
        except ValueError:
            raise Failure(
                "cannot-tell", step, f"{node.version} is installed", "declare it as it is"
            ) from None
        if declared < live:
            raise Failure(
                "refused",
                step,
                f"{declared} is older than {live}, which is installed; a datastore does not go "
                "back to an older Kubernetes",
                f"declare {live} or newer; the way back is a snapshot of before, restored",
            )
        if declared.major != live.major or declared.minor > live.minor + 1:
            raise Failure(
                "refused",
                step,
                f"from {live} to {declared} is more than one minor version",
                f"go to v{live.major}.{live.minor + 1} first, on all nodes",
            )
    servers = _servers_version(machine, wanted, node)
    if servers and (declared.major, declared.minor, declared.patch) > servers:
        raise Failure(
            "refused",
            step,
            f"this agent would be {declared}, newer than the servers' "
            f"v{'.'.join(map(str, servers))}",
            "upgrade the servers first",
        )


def _servers_version(
    machine: Machine, wanted: Mapping[str, Any], node: K3sNode | None
) -> tuple[int, ...] | None:
    """What the API server is, as a joined agent sees it; None when that cannot be seen."""
    if wanted["role"] != "agent" or node is None or node.state != "running":
        return None
    with contextlib.suppress(Failure):
        asked = k3s_kubectl(machine, ["get", "--raw=/version"], "asking for the servers' version")
        found = re.search(r'"gitVersion":\s*"v(\d+)\.(\d+)\.(\d+)', asked.text)
        return tuple(map(int, found.groups())) if found else None
    return None


def _server_to_join(
    machine: Machine, wanted: Mapping[str, Any], node: K3sNode | None, step: str
) -> str | None:
    """The server that this node joins; None for the one that makes the cluster."""
    joins = wanted["server"]
    has_data = machine.exists(K3S_DATABASE) and not machine.is_empty(K3S_DATABASE)
    if wanted["init"]:
        before = node.config.get("server") if node else None
        if before in wanted["rejoin"]:
            return before
        if has_data or wanted["datastore"] != "etcd":
            return None
        # An empty first server while others have the cluster: it joins them, or there would be two.
        there = (url for url in wanted["rejoin"] if machine.served(*k3s_host_port(url)))
        joins = next(there, None)
        if joins is None:
            return None
        say(f"{joins} has the cluster already: joining it")
    starts = node is None or node.state != "running"
    if starts and not has_data and machine.served(*k3s_host_port(joins)) is None:
        raise Failure(
            "cannot-tell",
            step,
            f"{joins}, which it is to join, does not answer; nothing was installed",
            "start that server first; 6443/tcp must be open to here",
        )
    return joins


def _adopt(machine: Machine, wanted: Mapping[str, Any], node: K3sNode) -> None:
    """Sets aside what get.k3s.io told its service beside the config file: the arguments are in the
    unit, which is written anew, and the token is the declared one."""
    if node.token_digest != wanted["tokenDigest"]:
        raise Failure(
            "refused",
            f"taking over {wanted['node']}",
            "its token is not the declared one",
            f"declare the token in {K3S_SERVER_TOKEN} of the first server",
        )
    for name in (f"{node.unit}.env", node.unit):
        path = f"{K3S_UNIT_DIRECTORY}/{name}"
        if machine.exists(path):
            kept = f"{path}.before-homelab"
            machine.write_atomic(kept, machine.read(path), 0o600)
    machine.remove(f"{K3S_UNIT_DIRECTORY}/{node.unit}.env")


def _converts(machine: Machine, wanted: Mapping[str, Any], node: K3sNode) -> bool:
    begun = k3s_record(machine, wanted["cluster"]).get("conversion")
    if node.datastore and node.datastore != wanted["datastore"]:
        if node.version != wanted["version"]:
            raise Failure(
                "refused",
                f"converting the datastore of {wanted['cluster']}",
                f"{wanted['node']} is {node.version}, declared {wanted['version']}: of two changes "
                "at once nobody could say which one failed; nothing was changed",
                "convert in the version that runs, then upgrade",
            )
        return True
    return bool(begun) and wanted["datastore"] == "sqlite"


def _end_conversion(
    machine: Machine, wanted: Mapping[str, Any], record: Mapping[str, Any], step: str
) -> None:
    """Finishes the way back of a conversion that was cut off on it, or is no longer declared."""
    begun = record.get("conversion") or {}
    if begun.get("verified", True):
        return
    if begun["to"] != wanted["datastore"]:
        _go_back(machine, wanted, record, step, "another datastore is declared")
    elif begun.get("back"):
        raise _go_back(machine, wanted, record, step, "it had failed, and its way back was cut off")


def _go_back(
    machine: Machine,
    wanted: Mapping[str, Any],
    record: Mapping[str, Any],
    step: str,
    why: str,
) -> Failure:
    """Undoes a conversion, waits until the server serves again, and returns what to say of it.
    Raises Failure when the server does not come up either."""
    cluster, unit = wanted["cluster"], K3S_UNITS[wanted["role"]]
    say(f"{why}: going back to the datastore of before")
    former = unconvert_k3s(machine, cluster, unit)
    version = k3s_installed_version(machine, K3S_BINARY)
    before = {**wanted, "datastore": former, "version": version}
    _write_files(machine, before, None, record.get("files") or [])
    k3s_start_unit(machine, unit)
    k3s_wait(machine, before, unit)
    settle_k3s(machine, cluster, former)
    write_k3s_record(machine, cluster, pending=None)
    return Failure(
        "failed",
        step,
        f"the conversion to {wanted['datastore']} failed and was undone: {why}; {wanted['node']} "
        f"serves its {former} again, as it was before",
        f"declare datastore {former}, or correct the cause and run up again; what was tried is in "
        f"{K3S_DATA}/server.aside-*",
    )


def _write_files(
    machine: Machine, wanted: Mapping[str, Any], joins: str | None, former: Sequence[str]
) -> list[str]:
    """Writes what differs of config, token, other files and unit. Returns what it wrote."""
    for directory, mode in (("/etc/rancher", 0o755), ("/etc/rancher/k3s", 0o755)):
        machine.make_directory(directory, mode)
    token = k3s_password(wanted["token"]) if joins is None else wanted["token"]
    config = {**k3s_config(wanted, joins), **wanted["secretConfig"]}
    # The unit last: where it is, all that it needs is.
    files = [(K3S_CONFIG, k3s_config_text(config), 0o600)]
    files += [(path, text, 0o600) for path, text in sorted(wanted["files"].items())]
    unit = f"{K3S_UNIT_DIRECTORY}/{K3S_UNITS[wanted['role']]}"
    files.append((unit, k3s_unit(wanted), 0o644))
    changed = []
    if _sealed(machine, K3S_TOKEN) != token:
        set_token(machine, token)
        changed.append("token")
    for path, text, mode in files:
        seen = machine.stat(path)
        if seen is None or seen.mode != mode or machine.read(path) != text.encode():
            machine.make_directory(os.path.dirname(path), 0o700)
            machine.write_atomic(path, text.encode(), mode)
            changed.append(path)
    for path in sorted(set(former) - set(wanted["files"])):
        if machine.remove(path):
            changed.append(path)
    return changed


def _sealed(machine: Machine, path: str) -> str | None:
    seen = machine.stat(path)
    if seen is None or seen.mode != 0o600:
        return None
    return machine.read(path).decode("utf-8", "replace").strip()


# Stopping, starting, removing

_NODE_SPEC = {"cluster": Value(CLUSTER_NAME), "node": Value(OBJECT_NAME)}


def _own_node(machine: Machine, cluster: str, step: str) -> K3sNode | None:
    """hostctl's own node of this cluster, or None; refuses another one."""
    record = k3s_record(machine, cluster)
    node = k3s_look(machine, cluster, bool(record.get("pending")))
    if node and (node.installed != "hostctl" or node.cluster != cluster):
        raise Failure(
            "refused",
            step,
            f"this k3s is somebody else's: installed by {node.installed}, cluster {node.cluster}",
            "nothing was changed: what installed it removes it (get.k3s.io's k3s-uninstall.sh)",
        )
    return node


def k3s_stop(machine: Machine, spec: dict[str, Any]) -> Result:
    """Stops this machine's k3s; its pods' processes go on. `k3s start` or the next up starts it."""
    wanted = checked(spec, _NODE_SPEC, "k3s stop")
    step = f"stopping {wanted['node']}"
    with cluster_lock(machine, wanted["cluster"]):
        node = _own_node(machine, wanted["cluster"], step)
        if node is None or not node.unit:
            raise Failure("refused", step, "there is no k3s here", "pulumi up installs it")
        k3s_stop_unit(machine, node.unit)
    return {"stopped": node.state == "running"}


def k3s_start(machine: Machine, spec: dict[str, Any]) -> Result:
    """Starts this machine's k3s and waits until its node is Ready."""
    wanted = checked(spec, _NODE_SPEC, "k3s start")
    step = f"starting {wanted['node']}"
    with cluster_lock(machine, wanted["cluster"]):
        node = _own_node(machine, wanted["cluster"], step)
        if node is None or not node.unit:
            raise Failure("refused", step, "there is no k3s here", "pulumi up installs it")
        if node.state != "running":
            k3s_start_unit(machine, node.unit)
        fresh = node.state != "running"
        k3s_wait(machine, _as_it_is(wanted, node), node.unit, fresh=fresh)
    return {"started": node.state != "running"}


def _as_it_is(wanted: Mapping[str, Any], node: K3sNode) -> dict[str, Any]:
    """What to wait for where nothing is declared: the node as it is."""
    return {
        "node": wanted["node"],
        "role": node.role,
        "version": node.version,
        "config": node.config,
        "server": node.config.get("server"),
        "timeouts": {"readySeconds": 600},
    }


def k3s_rejoin(machine: Machine, spec: dict[str, Any]) -> Result:
    """Lets a server join its cluster anew, as after a restore on another one: sets its datastore
    aside and starts it. Its node's name must be confirmed."""
    shape = {**_NODE_SPEC, "confirm": Value(or_null(OBJECT_NAME), None)}
    wanted = checked(spec, shape, "k3s rejoin")
    step = f"joining {wanted['node']} anew"
    with cluster_lock(machine, wanted["cluster"]):
        node = _own_node(machine, wanted["cluster"], step)
        if node is None or not node.unit or not node.config.get("server"):
            raise Failure(
                "refused",
                step,
                "this machine is no server that joined another one",
                "run it on the servers that were not restored",
            )
        if wanted["confirm"] != wanted["node"]:
            raise Failure(
                "refused",
                step,
                "its name is not confirmed",
                f"hostctl k3s rejoin {wanted['cluster']} --confirm {wanted['node']}",
            )
        k3s_stop_unit(machine, node.unit)
        aside = None
        if machine.exists(K3S_DATABASE):
            aside = f"{K3S_DATABASE}.aside-{time_stamp(machine)}"
            machine.rename(K3S_DATABASE, aside)
        k3s_start_unit(machine, node.unit)
        k3s_wait(machine, _as_it_is(wanted, node), node.unit)
    return {"aside": aside}


def k3s_remove(machine: Machine, spec: dict[str, Any]) -> Result:
    """Uninstalls this machine's k3s. A server's datastore and certificates are moved aside, not
    deleted, so that the machine can join anew; volumes in /var/lib/rancher/k3s/storage stay. One
    that is absent is fine; other keys of a node's spec are ignored."""
    given = {key: spec[key] for key in ("cluster", "node") if key in spec}
    wanted = checked(given, _NODE_SPEC, "k3s remove")
    step = f"removing {wanted['node']}"
    with cluster_lock(machine, wanted["cluster"]):
        record = k3s_record(machine, wanted["cluster"])
        node = _own_node(machine, wanted["cluster"], step)
        if node is None and not record.get("removing"):
            return {"removed": False, "aside": []}
        # From here on it is half removed, and a run after a kill goes on.
        write_k3s_record(machine, wanted["cluster"], removing=True)
        if node and node.role == "server" and node.state == "running":
            _leave(machine, node, step)
        for unit in K3S_UNITS.values():
            if machine.exists(f"{K3S_UNIT_DIRECTORY}/{unit}"):
                k3s_stop_unit(machine, unit)
                run_tool(machine, ["systemctl", "disable", "--now", unit], step, "failed")
        _end_pods(machine, step)
        aside = []
        for name in ("server", "agent"):
            path = f"{K3S_DATA}/{name}"
            if name == "server" and machine.exists(path):
                kept = f"{path}.aside-{time_stamp(machine)}"
                machine.rename(path, kept)
                aside.append(kept)
            elif machine.exists(path):
                run_copy(machine, ["rm", "-r", "-f", path], step, K3S_DATA)
        files = [K3S_CONFIG, K3S_TOKEN, K3S_KUBECONFIG, *(record.get("files") or [])]
        # The password by which its cluster knew this node; a new one joins with a new password.
        for path in [*files, "/etc/rancher/node/password", f"{K3S_BINARY}.new", K3S_BINARY]:
            machine.remove(path)
        unlink_kubectl(machine)
        for unit in K3S_UNITS.values():
            machine.remove(f"{K3S_UNIT_DIRECTORY}/{unit}")
        run_tool(machine, ["systemctl", "daemon-reload"], step, "failed", timeout=120.0)
        write_k3s_record(
            machine,
            wanted["cluster"],
            removing=None,
            pending=None,
            conversion=None,
            files=[],
            generation=None,
        )
    return {"removed": True, "aside": aside}


def _leave(machine: Machine, node: K3sNode, step: str) -> None:
    """Takes a server out of its cluster while it runs: k3s removes it from etcd with its Node, and
    stopped without that it would count in etcd's majority for good. After `k3s forget` systemd has
    started it anew, and it joins again (k3s issue 4023): it is in etcd before it is a Node."""
    if node.datastore == "sqlite":
        return
    name, deleted = node.node or "", False
    seen: float | None = None
    until = machine.now() + _LEAVES_SECONDS
    while machine.now() < until:
        try:
            member = k3s_member(machine, name, step)
            if not other_servers(machine, node, step):
                return
            if member is None and deleted:
                return
            if member and not deleted:
                seen = machine.now() if seen is None else seen
                held = _MEMBER_FINALIZER in (member["metadata"].get("finalizers") or [])
                if not held and machine.now() - seen < _HELD_SECONDS:
                    # Deleted now, the Node would go and its member stay in etcd for good.
                    machine.sleep(1)
                    continue
                say(f"{name} is a member of its cluster: it leaves first")
                # Gone it is when this etcd has lost its member, and with it the API asked here.
                k3s_kubectl(machine, ["delete", "node", name, "--wait=false"], step)
                deleted = True
        except Failure:
            state = k3s_properties(machine, node.unit).get("ActiveState")
            if deleted or state in ("inactive", "failed"):
                return
        machine.sleep(1)
    say(f"{name} has not left, or does not answer, after {_LEAVES_SECONDS} s: removed as it is")


def _end_pods(machine: Machine, step: str) -> None:
    """Ends what a stopped k3s leaves behind: the pods' processes, mounts and interfaces. Rules of
    iptables stay until the next boot."""
    for shim in _shims(machine):
        with contextlib.suppress(ToolMissing, TookTooLong):
            machine.run(["kill", "-KILL", str(shim)])
    kill = "/sys/fs/cgroup/kubepods/cgroup.kill"
    if machine.exists(kill):
        machine.write_value(kill, "1")
    for mount in _mounts(machine):
        run_tool(machine, ["umount", "--lazy", mount], step, "failed")
    for interface in ("cni0", "flannel.1", "flannel-v6.1", "flannel-wg", "flannel-wg-v6"):
        if machine.exists(f"/sys/class/net/{interface}"):
            run_tool(machine, ["ip", "link", "delete", interface], step, "failed")


def _shims(machine: Machine) -> list[int]:
    """The processes by which containerd holds its pods."""
    found = []
    for name in machine.names("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                program = machine.read(f"/proc/{name}/cmdline").split(b"\0")[0].decode()
                if re.match(rf"{K3S_DATA}/data/[^/]+/bin/containerd-shim", program):
                    found.append(int(name))
    return found


def _mounts(machine: Machine) -> list[str]:
    """What pods and containers have mounted, the innermost first."""
    places = ("/run/k3s/", "/var/lib/kubelet/pods/", "/var/lib/kubelet/plugins/", "/run/netns/cni-")
    with contextlib.suppress(OSError):
        lines = machine.read("/proc/self/mountinfo").decode("utf-8", "replace").splitlines()
        points = [line.split()[4].replace("\\040", " ") for line in lines]
        return sorted((one for one in points if one.startswith(places)), reverse=True)
    return []
