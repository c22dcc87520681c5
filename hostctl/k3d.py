"""Verbs: the cluster made with k3d."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hostctl.certificates import certificate_warnings
from hostctl.cluster import (
    Cluster,
    find_network,
    identity_of,
    look,
    network_of,
    node_containers,
    node_kubeconfig,
    parse_json,
    partial_failure,
    refuse_docker_resolvers,
    refuse_foreign,
)
from hostctl.cluster_backup import back_up, utc
from hostctl.files import next_certificate_generation, remove_kubeconfig, render_kubeconfig
from hostctl.live import (
    AUDIT_IN_NODE,
    CNI_PLUGINS_IN_NODE,
    DATASTORE_IN_NODE,
    RESOLVERS_IN_NODE,
    STORAGE_IN_NODE,
    audit_digest,
    differences,
    how_to_recreate,
    lan_changes,
    live_api,
    live_facts,
    may_recreate,
    next_incarnation,
    plain,
    subnet_of,
)
from hostctl.machine import STATE_DIRECTORY, Machine, Ran, TookTooLong, ToolMissing
from hostctl.moved import (
    MOVED_PASSWORD,
    PASSWORD_IN_NODE,
    arriving,
    moved_secrets,
    refuse_from_nothing,
    refuse_moved,
)
from hostctl.preflight import (
    create_errors,
    port_errors,
    published_ports,
    refuse_create,
    refuse_unknown_interface,
)
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, next_generation, read_record, write_record
from hostctl.spec import (
    CLUSTER_NAME,
    CLUSTER_SPEC,
    NAME_SPEC,
    Value,
    checked,
    cluster_spec,
    or_null,
    server_url,
)
from hostctl.swap import continue_swap, have_image, set_aside, swap_node
from hostctl.tools import attempt, run_tool, tool_version
from hostctl.waiting import (
    asked_version,
    present_cluster,
    restart_container,
    stop,
    wait_for_address,
    wait_ready,
)

CREATE_LABEL = "homelab.create"


def create(machine: Machine, spec: Mapping[str, Any]) -> None:
    """Makes the cluster that is absent. The caller holds the lock and waits for it to be ready.

    The record says that a create began, with the nonce that the nodes carry as a label: a run after
    a kill goes on with exactly those (see `resume`); nothing is ever rolled back (incident 2).
    """
    name = spec["name"]
    move = arriving(read_record(machine, name))
    if move:
        _refuse_elsewhere(spec, move)
    refuse_create(name, create_errors(machine, spec))
    _refuse_listed(machine, name)
    _refuse_wrong_network(machine, spec)
    have_image(machine, spec["image"], f"creating cluster {name}")
    for bind in dict.fromkeys(bind for bind, _, _ in published_ports(spec)):
        wait_for_address(machine, bind)
    # On the addresses that came meanwhile, too.
    refuse_create(name, list(port_errors(machine, spec)))
    directory = f"{STATE_DIRECTORY}/clusters/{name}"
    machine.make_directory(directory, 0o755)
    machine.make_directory(spec["storage_dir"], 0o755, "root", "root")
    machine.make_directory(spec["datastore_dir"], 0o700, "root", "root")
    for number in range(spec["servers"]):
        data = f"{spec['datastore_dir']}/server-{number}"
        if not move:
            set_aside(machine, data)
        machine.make_directory(data, 0o700, "root", "root")
    resolvers = "".join(f"nameserver {address}\n" for address in spec["resolvers"])
    machine.write_atomic(f"{directory}/resolv.conf", resolvers.encode(), 0o644)
    nonce = machine.nonce()
    if spec["audit"]:
        _write_audit_policy(machine, spec)
    config = f"{directory}/k3d.yaml"
    content = k3d_config(spec, nonce)
    if move:
        # What its datastore opens with: k3s takes neither another token nor another password of a
        # node that it knows.
        opens = moved_secrets(machine, name)
        content["token"] = opens["token"]
        if opens["password"]:
            password = f"{MOVED_PASSWORD % name}:{PASSWORD_IN_NODE}:ro"
            content["volumes"].append({"volume": password, "nodeFilters": ["server:0"]})
    machine.write_atomic(config, json.dumps(content, indent=1).encode(), 0o600)
    audit = audit_digest(spec["audit"]["policy"]) if spec["audit"] else None
    write_record(machine, name, creating={"nonce": nonce, "at": utc(machine.now())}, audit=audit)
    say(f"creating cluster {name} from {spec['image']}")
    argv = ["k3d", "cluster", "create", "--config", config, "--no-rollback"]
    argv += ["--kubeconfig-update-default=false", "--kubeconfig-switch-context=false"]
    _k3d(machine, argv, f"creating cluster {name}", spec["api_wait_seconds"])


def _write_audit_policy(machine: Machine, spec: Mapping[str, Any]) -> None:
    path = f"{STATE_DIRECTORY}/clusters/{spec['name']}/audit.yaml"
    machine.write_atomic(path, spec["audit"]["policy"].encode(), 0o644)


def renew_audit_policy(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> None:
    """Gives the servers another audit policy, which they read when they start. The record says it
    only once all have: what was cut off is done again.
    """
    _write_audit_policy(machine, spec)
    for server in cluster.of("server"):
        say(f"restarting {server.name} with another audit policy")
        restart_container(machine, server.name)
        wait_ready(machine, spec, look(machine, cluster.name, spec["network"]["name"]))
    write_record(machine, cluster.name, audit=audit_digest(spec["audit"]["policy"]))


def _refuse_elsewhere(spec: Mapping[str, Any], move: Mapping[str, Any]) -> None:
    """A cluster that was imported comes up with what was imported, or not at all."""
    declared = {
        "storageDir": (spec["storage_dir"], move["storage_dir"]),
        "datastoreDir": (f"{spec['datastore_dir']}/server-0", move["data"]),
        "image": (spec["image"], move["image"]),
        "servers and agents": (spec["servers"] + spec["agents"], 1),
    }
    wrong = [
        f"{key} is {one}, imported {there}"
        for key, (one, there) in declared.items()
        if one != there
    ]
    if wrong:
        raise Failure(
            "refused",
            f"creating cluster {spec['name']}",
            "; ".join(wrong),
            "declare what was imported; another image is taken afterwards (docs/upgrade.md)",
        )


def _refuse_listed(machine: Machine, name: str) -> None:
    """k3d must agree that the cluster is absent; a failed listing is no agreement (incident 3)."""
    step = f"asking k3d whether cluster {name} exists"
    ran = run_tool(machine, ["k3d", "cluster", "list", "--output", "json"], step, "cannot-tell")
    listed = parse_json(ran.out or b"[]", step, or_scalar=True) or []
    if any(one.get("name") == name for one in listed):
        raise Failure(
            "cannot-tell",
            step,
            "k3d lists it and Docker shows no node of it",
            "do docker and k3d ask the same Docker (DOCKER_HOST)? compare `docker ps --all` and "
            "`k3d cluster list`",
        )


def _refuse_wrong_network(machine: Machine, spec: Mapping[str, Any]) -> None:
    name, subnet = spec["network"]["name"], spec["network"]["subnet"]
    there = find_network(machine, name)
    step = f"creating cluster {spec['name']}"
    if spec["servers"] > 1:
        # k3d gives nodes fixed addresses, which etcd needs, only on a network of its own making.
        if there:
            remedy = f"docker network rm {name}, if nothing uses it"
            raise Failure("refused", step, f"Docker network {name} is there already", remedy)
        return
    gateway = str(ipaddress.ip_network(subnet)[1])
    by_hand = f"docker network create --subnet {subnet} --gateway {gateway} {name}"
    if there is None:
        raise Failure(
            "refused",
            step,
            f"Docker network {name} is not there",
            f"pulumi up --refresh makes it; by hand: {by_hand}",
        )
    if subnet_of(there) != subnet:
        raise Failure(
            "refused",
            step,
            f"Docker network {name} has subnet {subnet_of(there)}, declared is {subnet}",
            f"declare that subnet, or with nothing connected: docker network rm {name}; {by_hand}",
        )


def k3d_config(spec: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """The config file of k3d (k3d.io/v1alpha5). One server publishes its own ports: without a load
    balancer there is one thing less that can start too early (incident 1)."""
    single = spec["servers"] == 1
    nodes = ["server:*"] + (["agent:*"] if spec["agents"] else [])
    resolvers = f"{STATE_DIRECTORY}/clusters/{spec['name']}/resolv.conf"
    mounts = [f"{spec['storage_dir']}:{STORAGE_IN_NODE}", f"{resolvers}:{RESOLVERS_IN_NODE}:ro"]
    if spec["cni_plugins"]:
        mounts.append(f"{spec['cni_plugins']}:{CNI_PLUGINS_IN_NODE}:ro")
    audit = f"{STATE_DIRECTORY}/clusters/{spec['name']}/audit.yaml:{AUDIT_IN_NODE}:ro"
    api = {"hostIP": spec["api"]["bind"], "hostPort": str(spec["api"]["port"])}
    if spec["api"]["server_name"]:
        api["host"] = spec["api"]["server_name"]
    arguments = [
        {"arg": f"--resolv-conf={RESOLVERS_IN_NODE}", "nodeFilters": nodes},
        *(
            {"arg": argument, "nodeFilters": ["server:*"]}
            for argument in [
                *(f"--disable={part}" for part in spec["disable"]),
                *(["--secrets-encryption"] if spec["secrets_encryption"] else []),
                *spec["k3s_args"],
                *(spec["audit"]["arguments"] if spec["audit"] else []),
            ]
        ),
    ]
    return {
        "apiVersion": "k3d.io/v1alpha5",
        "kind": "Simple",
        "metadata": {"name": spec["name"]},
        "servers": spec["servers"],
        "agents": spec["agents"],
        "image": spec["image"],
        **(
            {"network": spec["network"]["name"]}
            if single
            else {"subnet": spec["network"]["subnet"]}
        ),
        "kubeAPI": api,
        "volumes": [
            *({"volume": mount, "nodeFilters": nodes} for mount in mounts),
            *([{"volume": audit, "nodeFilters": ["server:*"]}] if spec["audit"] else []),
            *(
                {
                    "volume": f"{spec['datastore_dir']}/server-{number}:{DATASTORE_IN_NODE}",
                    "nodeFilters": [f"server:{number}"],
                }
                for number in range(spec["servers"])
            ),
        ],
        "ports": [
            {
                "port": "{bind}:{host_port}:{container_port}/{protocol}".format(**port),
                "nodeFilters": ["server:0:direct" if single else "loadbalancer"],
            }
            for port in spec["ports"]
        ],
        "options": {
            "k3d": {"wait": True, "disableLoadbalancer": single},
            "k3s": {"extraArgs": arguments},
            "runtime": {
                "labels": [{"label": f"{CREATE_LABEL}={nonce}", "nodeFilters": nodes}],
            },
        },
    }


def _k3d(machine: Machine, argv: Sequence[str], step: str, seconds: float) -> None:
    def tick(waited: float) -> None:
        say(f"{step}: {waited:.0f} s")

    ran = attempt(machine, argv, step, timeout=float(seconds), tick=tick)
    if ran.code:
        # k3d logs to stdout and stderr alike.
        said = Ran(ran.code, b"", ran.err or ran.out)
        remedy = "see the cause and run up again: what was begun is kept and continued"
        raise Failure("failed", step, _without_colour(said.complaint), remedy)


def _without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def resume(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> Cluster:
    """Goes on with a create that was cut off, told by the nonce that the record and its nodes have.

    Nodes that were created and never started lack what k3d writes into them before the first start,
    so k3d starts them. Nothing is deleted except k3d's helper container, which holds no data and
    keeps k3d from creating. A create of several nodes that was cut off before all were made cannot
    be completed by k3d: that is reported as partial.
    """
    name = cluster.name
    begun = read_record(machine, name).get("creating")
    if not begun:
        return cluster
    # k3d makes one of its own and fails on one that is there.
    helper = f"k3d-{name}-tools"
    if any(facts["Name"].lstrip("/") == helper for facts in node_containers(machine, name)):
        step = f"removing k3d's helper {helper} of a create that was cut off"
        run_tool(machine, ["docker", "rm", "--force", helper], step, "failed", timeout=120.0)
    if cluster.state == "absent":
        return cluster
    ours = [node for node in cluster.nodes if node.labels.get(CREATE_LABEL) == begun["nonce"]]
    if not ours:
        return cluster
    wanted = spec["servers"] + spec["agents"]
    made = len(cluster.of("server", "agent"))
    if made < wanted:
        raise partial_failure(
            name,
            f"its create of {begun['at']} was cut off after {made} of {wanted} nodes; it was never "
            "ready",
            f"k3d cluster delete {name}; then run up again",
        )
    if any(node.status == "created" for node in cluster.nodes):
        say(f"continuing the create of {name} that began at {begun['at']}")
        argv = ["k3d", "cluster", "start", name]
        _k3d(machine, argv, f"starting cluster {name}", spec["api_wait_seconds"])
    return look(machine, name, spec["network"]["name"])


def heal(machine: Machine, cluster: Cluster) -> bool:
    """Starts what is stopped, servers first, and restarts the node whose API port is not published.
    Returns whether there was anything to do."""
    api = live_api(cluster)
    down = [node.name for node in cluster.nodes if not node.running]
    if down or not api["published"]:
        wait_for_address(machine, api["bind"])
    for name in down:
        say(f"starting {name}")
        run_tool(machine, ["docker", "start", name], f"starting {name}", "failed", timeout=300.0)
    if not down and not api["published"]:
        say(f"{cluster.api.name} does not publish the API: restarting it")
        restart_container(machine, cluster.api.name)
    return bool(down) or not api["published"]


def attach(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> bool:
    """Connects the nodes to their second network, in the LAN, or disconnects them where none is
    declared. Docker keeps it over restarts; only a node that was made anew lacks it. Returns
    whether there was anything to do.

    The network's name begins with the first one's, so that eth0 and the default route stay with
    that: Docker goes by the order of names (moby/libnetwork issues 1141 and 2093).
    """
    lacking, spare = lan_changes(spec, cluster)
    for node in lacking:
        argv = ["docker", "network", "connect", spec["lan_network"], node]
        step = f"connecting {node} to {spec['lan_network']}"
        say(step)
        run_tool(machine, argv, step, "failed", timeout=120.0)
    for network, node in spare:
        argv = ["docker", "network", "disconnect", network, node]
        step = f"disconnecting {node} from {network}"
        say(step)
        run_tool(machine, argv, step, "failed", timeout=120.0)
    return bool(lacking or spare)


def delete(machine: Machine, name: str) -> None:
    """Deletes a cluster that its caller has confirmed. The storage directory stays."""
    tool_version(machine, "k3d")
    say(f"deleting cluster {name}")
    _k3d(machine, ["k3d", "cluster", "delete", name], f"deleting cluster {name}", 600)
    left = node_containers(machine, name)
    if left:
        names = " ".join(facts["Name"].lstrip("/") for facts in left)
        raise Failure(
            "failed", f"deleting cluster {name}", f"{names} is left", f"docker rm --force {names}"
        )
    write_record(machine, name, creating=None, swap=None, swap_failed=None)


def k3d_inspect(machine: Machine, spec: dict[str, Any]) -> Result:
    """Looks at a cluster and changes nothing: state, live facts, differences from the settings."""
    spec = cluster_spec(spec, "k3d inspect")
    record = read_record(machine, spec["name"])
    refuse_moved(spec["name"], record, "looking at")
    cluster = look(machine, spec["name"], spec["network"]["name"])
    if cluster.state == "absent":
        refuse_from_nothing(spec, record)
        move = arriving(record)
        if move:
            _refuse_elsewhere(spec, move)
    refuse_docker_resolvers(machine, spec)
    refuse_unknown_interface(machine, spec)
    return {"cluster": inspected(machine, spec, cluster)}


def inspected(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> Result:
    """The result of `k3d inspect` about a cluster that was looked at."""
    record = read_record(machine, spec["name"])
    unseen: list[str] = []
    live: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    warnings: list[tuple[str, str]] = []
    credentials, identity, namespaces = None, None, None
    move = arriving(record)
    if cluster.state == "absent":
        warnings = [(one.what, one.remedy) for one in create_errors(machine, spec)]
        identity = move["identity"] if move else None
        why = "was imported and is not up yet" if move else "does not exist"
        unseen.append(f"namespaces and objects: the cluster {why}")
    else:
        live = live_facts(machine, cluster, unseen)
        found = differences(machine, spec, cluster, live)
        credentials = node_kubeconfig(machine, cluster)
        if credentials:
            identity = identity_of(spec["name"], credentials)
        else:
            # One that a swap has just started has the datastore, and with it the CA, of the old.
            identity = (record.get("swap") or {}).get("identity")
            unseen.append("identity: the node has written no kubeconfig yet")
        aging, warnings = certificate_warnings(machine, cluster, credentials)
        live.update(aging)
        namespaces = _namespaces(machine, cluster, unseen)
    fixed = [difference for difference in found if difference["fixed"]]
    # A create that was cut off is not what was declared, however it looks.
    agrees = cluster.state == "running" and not found and not record.get("creating")
    renew = bool(fixed) and may_recreate(spec, fixed)
    incarnation = next_incarnation(machine, record, cluster.state, identity, renew)
    certificate = next_certificate_generation(machine, record, cluster, credentials)
    written = record.get("kubeconfig") or {}
    return {
        "state": "imported" if move and cluster.state == "absent" else cluster.state,
        "detail": cluster.detail,
        "identity": identity,
        "generation": next_generation(record, agrees),
        "incarnation": incarnation,
        "certificate_generation": certificate,
        "kubeconfig_behind": incarnation == record.get("incarnation")
        and certificate != written.get("generation", certificate),
        "differences": found,
        "live": live,
        "namespaces": namespaces,
        "unseen": unseen,
        "warnings": [{"what": what, "remedy": remedy} for what, remedy in warnings],
        **_acceptance(record),
    }


def _acceptance(record: Mapping[str, Any]) -> dict[str, Any]:
    """The last acceptance, and the generation for the next: it moves on until one is passed."""
    last = record.get("acceptance")
    passed = bool(last) and last["state"] == "passed"
    return {
        "acceptance": last and {key: last[key] for key in ("state", "detail", "remedy")},
        "acceptance_generation": next_generation(last or {}, passed),
    }


def _namespaces(machine: Machine, cluster: Cluster, unseen: list[str]) -> list[str] | None:
    if cluster.state != "running":
        unseen.append("namespaces and objects: the cluster is stopped")
        return None
    argv = ["docker", "exec", cluster.first.name, "kubectl", "get", "namespaces", "--output=name"]
    try:
        ran = machine.run(argv)
    except (ToolMissing, TookTooLong):
        ran = Ran(1, b"", b"no answer in time")
    if ran.code:
        unseen.append(f"namespaces and objects: the API does not answer ({ran.complaint[:200]})")
        return None
    return sorted(line.split("/", 1)[1] for line in ran.text.split() if "/" in line)


def k3d_ensure(machine: Machine, spec: dict[str, Any]) -> Result:
    """Makes the cluster be there, running and reachable: creates, starts or heals it. Safe at any
    time, twice at once and after a kill; deletes nothing, except for a confirmed recreate."""
    spec = cluster_spec(spec, "k3d ensure")
    name = spec["name"]
    with cluster_lock(machine, name):
        refuse_moved(name, read_record(machine, name), "ensuring")
        continue_swap(machine, spec)
        cluster = look(machine, name, spec["network"]["name"])
        cluster = resume(machine, spec, cluster)
        found = _differences(machine, spec, cluster)
        fixed = [one for one in found if one["fixed"]]
        if fixed and not may_recreate(spec, fixed):
            raise Failure(
                "refused",
                f"ensuring cluster {name}",
                "fixed when it was created: "
                + "; ".join(
                    f"{one['key']} is {plain(one['live'])}, declared {plain(one['declared'])}"
                    for one in fixed
                ),
                f"declare the live values to keep the cluster; or {how_to_recreate(name, fixed)}",
            )
        if fixed or cluster.state == "absent":
            refuse_docker_resolvers(machine, spec)
        if fixed:
            # Nothing of the cluster is touched when what takes its place cannot be made.
            refuse_create(name, create_errors(machine, spec, cluster))
            have_image(machine, spec["image"], f"recreating cluster {name}")
            stop(machine, cluster)
            backup = back_up(machine, cluster)
            say(f"the backup in {backup} is verified")
            write_record(machine, name, backup=backup)
            delete(machine, name)
            cluster = look(machine, name, spec["network"]["name"])
        if cluster.state == "absent":
            if not fixed:
                refuse_from_nothing(spec, read_record(machine, name))
            create(machine, spec)
            changed = True
        elif any(one["key"] == "image" for one in found):
            swap_node(machine, spec, cluster)
            changed = True
        else:
            changed = heal(machine, cluster)
        if any(one["key"] == "audit.rules" for one in found) and not fixed:
            renew_audit_policy(machine, spec, look(machine, name, spec["network"]["name"]))
            changed = True
        if changed:
            cluster = look(machine, name, spec["network"]["name"])
        if attach(machine, spec, cluster):
            cluster = look(machine, name, spec["network"]["name"])
        if cluster.state == "absent":
            raise Failure(
                "failed",
                f"ensuring cluster {name}",
                "k3d reported success and Docker shows no node of it",
                "do k3d and docker ask the same Docker (DOCKER_HOST)? was it deleted meanwhile?",
            )
        return {"cluster": _settle(machine, spec, cluster)}


def _differences(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster
) -> list[dict[str, Any]]:
    if cluster.state == "absent":
        return []
    return differences(machine, spec, cluster, live_facts(machine, cluster, []))


def _settle(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> Result:
    """Waits for the cluster, records what was done, and returns what is known of it."""
    name = spec["name"]
    cluster, credentials = wait_ready(machine, spec, cluster)
    live = live_facts(machine, cluster, [])
    if not live["api"]["published"]:
        raise Failure(
            "failed",
            f"ensuring cluster {name}",
            f"{cluster.api.name} runs and does not publish its API port",
            f"docker port {cluster.api.name}; docker restart {cluster.api.name}",
        )
    identity = identity_of(name, credentials)
    given = {key: spec[key] for key in ("generation", "incarnation") if spec[key] is not None}
    applied = {
        key: spec[key]
        for key in CLUSTER_SPEC
        if key not in ("generation", "incarnation", "recreate", "confirm", "installs_k3d")
    }
    record = read_record(machine, name)
    move = arriving(record)
    if move and identity != move["identity"]:
        raise Failure(
            "failed",
            f"ensuring cluster {name}",
            f"its identity is {identity}, and that of the imported one is {move['identity']}",
            f"it is another cluster: hostctl move withdraw {name}, and move it again",
        )
    bootstrapped = record.get("argocd") if record.get("identity") == identity else None
    changes = {
        **given,
        "identity": identity,
        "applied": applied,
        "creating": None,
        "argocd": bootstrapped,
        **({"move": {**move, "step": "up", "at": utc(machine.now())}} if move else {}),
    }
    if any(record.get(key) != value for key, value in changes.items()):
        write_record(machine, name, **changes)
    version = live["k3s_version"] or asked_version(machine, cluster)
    return {
        "name": name,
        "identity": identity,
        "k3s_version": version,
        "created_at": live["created_at"],
        "endpoint": f"https://{live['api']['bind']}:{live['api']['port']}",
        "image": live["image"],
        "network": live["network"],
        "storage_dir": live["storage_dir"],
        "nodes": sorted(live["nodes"]),
    }


def k3d_start(machine: Machine, spec: dict[str, Any]) -> Result:
    """Starts a stopped cluster and waits for its API."""
    name = checked(spec, NAME_SPEC, "k3d start")["name"]
    with cluster_lock(machine, name):
        refuse_moved(name, read_record(machine, name), "starting")
        cluster = present_cluster(machine, name, "starting")
        applied = read_record(machine, name).get("applied") or {}
        seconds = applied.get("api_wait_seconds", 1800)
        network = {"name": network_of(cluster.nodes)}
        wanted = {"name": name, "api_wait_seconds": seconds, "network": network}
        continue_swap(machine, wanted)
        cluster = present_cluster(machine, name, "starting")
        started = heal(machine, cluster)
        wait_ready(machine, wanted, look(machine, name) if started else cluster)
    return {"started": started}


def k3d_stop(machine: Machine, spec: dict[str, Any]) -> Result:
    """Stops a cluster. Nothing is lost; `k3d start` or the next up starts it."""
    name = checked(spec, NAME_SPEC, "k3d stop")["name"]
    with cluster_lock(machine, name):
        cluster = present_cluster(machine, name, "stopping")
        stop(machine, cluster)
    return {"stopped": any(node.running for node in cluster.nodes)}


def k3d_delete(machine: Machine, spec: dict[str, Any]) -> Result:
    """Deletes the cluster whose name is confirmed, and its kubeconfig file. One that is absent is
    fine; the storage directory stays (incident 10)."""
    # The spec is the one of a stored ensure, perhaps of another version: only two keys count.
    wanted = {key: spec[key] for key in ("name", "confirm") if key in spec}
    shape = {"name": Value(CLUSTER_NAME), "confirm": Value(or_null(CLUSTER_NAME), None)}
    given = checked(wanted, shape, "k3d delete")
    name = given["name"]
    with cluster_lock(machine, name):
        present = bool(node_containers(machine, name))
        if present and given["confirm"] != name:
            raise Failure(
                "refused",
                f"deleting cluster {name}",
                "its name is not confirmed",
                f"set cluster.delete to {name} and run up, then destroy; by hand: "
                f"hostctl k3d delete {name} --confirm {name}",
            )
        if present:
            refuse_foreign(name, node_containers(machine, name))
            delete(machine, name)
        if given["confirm"] == name and read_record(machine, name).get("move"):
            write_record(machine, name, move=None)
        kept = [str(spec[key]) for key in ("storage_dir", "datastore_dir") if spec.get(key)]
        if kept:
            say(f"the data of cluster {name} stays in {' and '.join(kept)}")
        written = read_record(machine, name).get("kubeconfig")
        if written and given["confirm"] == name:
            remove_kubeconfig(machine, written)
    return {"deleted": present}


def k3d_identity(machine: Machine, spec: dict[str, Any]) -> Result:
    """The identity of a cluster: its name and a digest of its CA certificate."""
    name = checked(spec, NAME_SPEC, "k3d identity")["name"]
    cluster = present_cluster(machine, name, "identifying")
    return {"identity": identity_of(name, _credentials(machine, cluster))}


def k3d_kubeconfig(machine: Machine, spec: dict[str, Any]) -> Result:
    """The kubeconfig as `hostctl kubeconfig` would write it now; writes nothing."""
    shape = {"name": Value(CLUSTER_NAME), "server": Value(server_url)}
    wanted = checked(spec, shape, "k3d kubeconfig")
    name = wanted["name"]
    cluster = present_cluster(machine, name, "reading the kubeconfig of")
    return {"kubeconfig": render_kubeconfig(name, _credentials(machine, cluster), wanted["server"])}


def _credentials(machine: Machine, cluster: Cluster) -> dict[str, str]:
    credentials = node_kubeconfig(machine, cluster)
    if credentials is None:
        raise Failure(
            "cannot-tell",
            f"identifying cluster {cluster.name}",
            f"{cluster.first.name} has written no kubeconfig yet",
            f"hostctl k3d start {cluster.name}",
        )
    return credentials
