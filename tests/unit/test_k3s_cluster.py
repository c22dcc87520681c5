"""k3s on machines of its own: what up does to each node, in which order, and what it refuses."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi
import pytest
import yaml

from components import settings
from components.cluster import kinds
from components.cluster.k3s import node_spec
from components.host import Connection, Host, HostError
from tests.unit.conftest import Registered

ROOT = Path(__file__).parents[2]
TOKEN = "made-up-token-0123456789"
TOWER = {
    key.removeprefix("homelab:"): value
    for key, value in yaml.safe_load((ROOT / "Pulumi.tower.yaml").read_text())["config"].items()
}
TOWER["cluster"]["token"] = {"value": TOKEN}
VERSION = TOWER["cluster"]["version"]
RUNNING = {
    "node": {"state": "running", "version": VERSION, "identity": None},
    "differences": [],
    "warnings": [],
    "generation": 1,
    "incarnation": 1,
}
ABSENT = {**RUNNING, "node": None}
SERVER = {**RUNNING, "node": {**RUNNING["node"], "identity": "uid-1"}}
MASTER, WORKER = "10.89.97.201", "10.89.97.202"
KUBECONFIG = "clusters: [{name: tower}]"


def stack(*, three_servers: bool = False, **cluster: Any) -> settings.Settings:
    config = copy.deepcopy(TOWER)
    if three_servers:
        for node in config["cluster"]["nodes"].values():
            node.update(role="server", interface="eth0")
        config["cluster"]["virtualIp"] = {"address": "10.89.97.200", "interface": "eth0"}
        config["cluster"]["api"] = {"tlsSan": ["10.89.97.200"]}
    config["cluster"] |= cluster
    return settings.Settings.model_validate(config, by_alias=True, by_name=False)


def other(what: Any, **changes: Any) -> dict[str, Any]:
    return {**what, "node": {**what["node"], **changes}}


def differs(key: str, *, fixed: bool = False, live: Any = "live") -> dict[str, Any]:
    return {"key": key, "declared": "declared", "live": live, "fixed": fixed}


@pytest.fixture
def run(run_program: Callable[..., Registered]) -> Callable[..., Any]:
    """Reads the nodes and registers the cluster; ``nodes`` answers by address, None is silence."""

    def run(
        declared: settings.Settings | None = None,
        nodes: dict[str, Any] | None = None,
        *,
        preview: bool = True,
    ) -> tuple[Registered, list[dict[str, Any]]]:
        asked: list[dict[str, Any]] = []
        whole = declared or stack()

        def called(args: Any) -> dict[str, Any]:
            line = args.args["command"]
            [[verb, given]] = json.loads(args.args["stdin"])["questions"]
            (address,) = re.findall(r"@([0-9.]+) ", line)
            asked.append({"verb": verb[1], "address": address, "line": line, "spec": given})
            if verb[1] == "kubeconfig":
                answer = {"ok": True, "kubeconfig": KUBECONFIG, "identity": "uid-1"}
            else:
                answer = (nodes or {}).get(address, ABSENT)
                if answer is None:
                    assert line.endswith(" || true"), "a failed invoke ends the run"
                    return {
                        "stdout": "",
                        "stderr": f"ssh: connect to host {address}: No route to host",
                    }
                answer = {"ok": True, **answer}
            return {"stdout": json.dumps(answer), "stderr": ""}

        def program() -> None:
            connection = Connection(whole.host)
            kind = connection.read(kinds.read(whole, connection))
            assert TOKEN not in repr(vars(kind))
            kind.announce()
            made = kind.declare(Host("tower", connection), None)
            pulumi.export("cluster", made.output)

        made_up = json.dumps({"kubeconfig": KUBECONFIG, "identity": "uid-1"})
        outputs = {"Command": {} if preview else {"stdout": made_up}}
        registered = run_program(
            program, calls={"command:local:run": called}, outputs=outputs, preview=preview
        )
        return registered, asked

    return run


LIVE = {MASTER: SERVER, WORKER: RUNNING, "10.89.97.203": RUNNING}


def spec_of(registered: Registered, command: str) -> dict[str, Any]:
    return json.loads(registered["Command", command].inputs["stdin"])


def before(registered: Registered, command: str) -> set[str]:
    """The Commands that are done before this one, near and far."""
    found: set[str] = set()
    waiting = [("Command", command)]
    while waiting:
        for key in registered[waiting.pop()].depends_on:
            if key[0] == "Command" and key[1] not in found:
                found.add(key[1])
                waiting.append(key)
    return found


def test_nodes_are_made_one_after_another_servers_first(run: Any) -> None:
    registered, _ = run(stack(three_servers=True))
    made = [name for name in registered.names("Command") if ("k3s-" in name and " " not in name)]
    assert made == ["k3s-master", "k3s-worker-1", "k3s-worker-2"]
    for index, node in enumerate(made):
        earlier = before(registered, f"drain {node}")
        assert {f"uncordon {one}" for one in made[:index]} <= earlier
        assert not {f"uncordon {one}" for one in made[index:]} & earlier
        assert {"snapshot", "token"} <= earlier
        assert f"drain {node}" in before(registered, node)
        assert node in before(registered, f"uncordon {node}")
    agents = stack(nodes={**dict(reversed(TOWER["cluster"]["nodes"].items()))})
    registered, _ = run(agents)
    assert "uncordon k3s-master" in before(registered, "k3s-worker-2")


def test_each_machine_is_reached_at_its_own_address_with_its_host_key_checked(run: Any) -> None:
    registered, asked = run()
    for node, address in (("k3s-master", MASTER), ("k3s-worker-1", WORKER)):
        line = registered["Command", node].inputs["create"]
        assert f"root@{address}" in line
        assert "StrictHostKeyChecking=yes" in line
    assert {one["address"] for one in asked} == {MASTER, WORKER, "10.89.97.203"}
    # The stack's host is the first server, and gets hostctl once.
    installed = {name for name in registered.names("Command") if name.startswith("hostctl")}
    assert installed == {"hostctl", "hostctl k3s-worker-1", "hostctl k3s-worker-2"}


def test_a_node_with_a_way_of_its_own_is_reached_by_it(run: Any) -> None:
    nodes = copy.deepcopy(TOWER["cluster"]["nodes"])
    nodes["k3s-worker-1"]["ssh"] = {"user": "admin", "port": 2222, "jump": "gate.lan", "sudo": True}
    registered, _ = run(stack(nodes=nodes))
    line = registered["Command", "k3s-worker-1"].inputs["create"]
    assert "-p 2222" in line
    assert "ssh://gate.lan" in line
    assert f"admin@{WORKER}" in line
    assert "sudo -n" in line
    assert "sudo" not in registered["Command", "k3s-master"].inputs["create"]


def test_the_token_is_secret_where_it_goes_and_stays_away_where_it_is_only_looked(run: Any) -> None:
    registered, asked = run(nodes=LIVE)
    holders = {
        name
        for name in registered.names("Command")
        if TOKEN in registered["Command", name].inputs["stdin"]
    }
    assert holders == {"token", "k3s-master", "k3s-worker-1", "k3s-worker-2"}
    for name in holders:
        command = registered["Command", name]
        assert "stdin" in command.secrets
        assert command.inputs["logging"] == "none"
        assert set(command.additional_secret_outputs) == {"stdout", "stderr"}
    assert not any(TOKEN in json.dumps(one["spec"]) + one["line"] for one in asked)


def test_a_whole_token_and_its_secret_part_are_the_same_token(run: Any) -> None:
    def digest(token: str) -> str:
        return run(stack(token={"value": token}))[1][0]["spec"]["tokenDigest"]

    assert digest(f"K10{'0' * 64}::server:{TOKEN}") == digest(TOKEN)


def test_keys_of_the_snapshot_store_are_no_part_of_what_is_shown(run: Any) -> None:
    s3 = {"endpoint": "s3.lan", "bucket": "tower", "accessKey": "hidden-1", "secretKey": "hidden-2"}
    registered, asked = run(stack(three_servers=True, snapshots={"s3": s3}))
    spec = spec_of(registered, "k3s-worker-1")
    assert spec["secretConfig"] == {
        "etcd-s3-access-key": "hidden-1",
        "etcd-s3-secret-key": "hidden-2",
    }
    assert spec["config"]["etcd-s3-bucket"] == "tower"
    assert not any("hidden-" in json.dumps(one["spec"]) for one in asked)


def test_one_server_makes_the_cluster_and_agents_are_told_of_it_alone(run: Any) -> None:
    registered, _ = run()
    server, agent = spec_of(registered, "k3s-master"), spec_of(registered, "k3s-worker-1")
    assert (server["init"], server["server"], server["datastore"]) == (True, None, "sqlite")
    assert (agent["init"], agent["server"]) == (False, f"https://{MASTER}:6443")
    assert agent["config"] == {"node-ip": WORKER}
    assert (agent["files"], agent["datastore"], agent["rejoin"]) == ({}, None, [])
    assert server["install"]["url"].endswith("/v1.33.5%2Bk3s1/k3s")


def test_servers_share_what_k3s_wants_the_same_on_all(run: Any) -> None:
    declared = stack(
        three_servers=True, disable=["traefik", "local-storage"], secretsEncryption=True
    )
    assert isinstance(declared.cluster, settings.K3sCluster)
    specs = [node_spec(declared.cluster, name) for name in declared.cluster.nodes]
    own = {"node-ip", "advertise-address"}
    shared = [{k: v for k, v in one["config"].items() if k not in own} for one in specs]
    assert shared[0] == shared[1] == shared[2]
    assert shared[0]["tls-san"] == ["10.89.97.200"]
    assert [one["datastore"] for one in specs] == ["etcd"] * 3
    assert [one["server"] for one in specs] == [None, *["https://10.89.97.200:6443"] * 2]
    # A first server that lost its data must not make a second cluster.
    assert specs[0]["rejoin"] == [f"https://{WORKER}:6443", "https://10.89.97.203:6443"]


def test_every_node_of_a_vpn_is_told_its_interface(run: Any) -> None:
    nodes = {
        "home": {"role": "server", "address": "100.64.1.1", "interface": "tailscale0"},
        "cloud": {"role": "agent", "address": "100.64.1.2", "interface": "tailscale0"},
    }
    registered, _ = run(stack(nodes=nodes))
    home, cloud = spec_of(registered, "home")["config"], spec_of(registered, "cloud")["config"]
    assert home["advertise-address"] == home["node-ip"] == "100.64.1.1"
    assert cloud == {"node-ip": "100.64.1.2", "flannel-iface": "tailscale0"}


def test_servers_apart_by_a_vpn_are_warned_of(run: Any) -> None:
    declared = stack(three_servers=False)
    assert declared.warnings == []
    nodes = {
        f"server-{n}": {"role": "server", "address": f"100.64.1.{n}", "interface": "tailscale0"}
        for n in (1, 2, 3)
    }
    far, single = stack(nodes=nodes).warnings
    assert "less than 10 ms" in far
    assert "one of 3 servers" in single


def test_the_virtual_ip_is_answered_for_before_the_second_server_joins(run: Any) -> None:
    registered, _ = run(stack(three_servers=True))
    files = spec_of(registered, "k3s-master")["files"]
    (manifest,) = (text for path, text in files.items() if "/server/manifests/" in path)
    kinds_of = {one["kind"]: one for one in yaml.safe_load_all(manifest)}
    pod = kinds_of["DaemonSet"]["spec"]["template"]["spec"]
    environment = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert environment["address"] == "10.89.97.200"
    assert environment["vip_interface"] == "eth0"
    assert environment["svc_enable"] == "false"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    verbs = kinds_of["ClusterRole"]["rules"]
    assert not any("*" in rule["verbs"] or "*" in rule["resources"] for rule in verbs)


def test_an_audit_log_has_its_policy_or_it_would_stay_empty(run: Any) -> None:
    registered, _ = run(stack(audit={"level": "Request"}))
    spec = spec_of(registered, "k3s-master")
    arguments = dict(one.split("=", 1) for one in spec["config"]["kube-apiserver-arg"])
    policy = yaml.safe_load(spec["files"][arguments["audit-policy-file"]])
    assert policy["rules"][-1] == {"level": "Request"}
    assert arguments["audit-log-path"]
    assert "kube-apiserver-arg" not in spec_of(registered, "k3s-worker-1")["config"]


def test_a_node_is_drained_from_a_server_that_stays(run: Any) -> None:
    registered, _ = run(stack(three_servers=True))
    for node, from_where in (("k3s-master", WORKER), ("k3s-worker-1", MASTER)):
        for verb in ("drain", "uncordon"):
            assert f"root@{from_where}" in registered["Command", f"{verb} {node}"].inputs["create"]
    alone, _ = run()
    assert f"root@{MASTER}" in alone["Command", "drain k3s-master"].inputs["create"]


def test_a_node_taken_out_is_forgotten_before_it_is_uninstalled(run: Any) -> None:
    registered, _ = run()
    forget = registered["Command", "uncordon k3s-worker-1"]
    assert forget.inputs["delete"].endswith("hostctl k3s forget'")
    assert spec_of(registered, "uncordon k3s-worker-1")["node"] == "k3s-worker-1"
    # Deletes go against the order of dependence.
    assert ("Command", "k3s-worker-1") in forget.depends_on
    assert registered["Command", "k3s-worker-1"].inputs["delete"].endswith("hostctl k3s remove'")
    assert "delete" not in registered["Command", "uncordon k3s-master"].inputs


def test_nodes_are_uninstalled_only_where_the_clusters_name_was_typed(run: Any) -> None:
    registered, _ = run()
    guard = registered["Command", "kubeconfig file"]
    assert guard.protect
    # A destroy goes against the order of dependence: it meets the guard before any node.
    behind, found = [guard], set()
    while behind:
        new = behind.pop().depends_on - found
        found |= new
        behind += [registered[key] for key in new]
    assert found >= {("Command", name) for name in ("k3s-master", "k3s-worker-1")}
    # A single agent may be taken out of the settings.
    assert not registered["Command", "k3s-worker-1"].protect
    registered, _ = run(stack(delete="tower"))
    assert not registered["Command", "kubeconfig file"].protect
    assert not registered["Command", "k3s-master"].protect


def test_logins_by_openid_are_the_servers_arguments_with_a_prefix(run: Any) -> None:
    provider = {"issuer": "https://keycloak.example.org/realms/home", "clientId": "kubernetes"}
    registered, _ = run(stack(api={"oidc": provider}))
    arguments = spec_of(registered, "k3s-master")["config"]["kube-apiserver-arg"]
    assert [one for one in arguments if one.startswith("oidc-")] == [
        "oidc-issuer-url=https://keycloak.example.org/realms/home",
        "oidc-client-id=kubernetes",
        "oidc-username-claim=sub",
        "oidc-username-prefix=oidc:",
        "oidc-groups-claim=groups",
        "oidc-groups-prefix=oidc:",
    ]
    assert "kube-apiserver-arg" not in spec_of(registered, "k3s-worker-1")["config"]


def test_an_upgrade_copies_the_datastore_first_and_changes_every_node(run: Any) -> None:
    now, _ = run(nodes=LIVE)
    newer, _ = run(stack(version="v1.34.1+k3s1"), nodes=LIVE)
    changed = {
        name
        for name in now.names("Command")
        if now["Command", name].inputs != newer["Command", name].inputs
    }
    nodes = TOWER["cluster"]["nodes"]
    assert changed == {
        "snapshot",
        *nodes,
        *(f"{v} {n}" for n in nodes for v in ("drain", "uncordon")),
    }


@pytest.mark.parametrize("version", ["v1.35.0+k3s1", "v1.33.4+k3s1", "v1.32.9+k3s1"])
def test_a_version_that_is_older_or_skips_a_minor_is_refused_with_the_node(
    run: Any, version: str
) -> None:
    with pytest.raises(HostError, match=rf"(?s){re.escape(version)} is older .* k3s-master runs"):
        run(stack(version=version), nodes=LIVE)


@pytest.mark.parametrize("version", [VERSION, "v1.33.5+k3s2", "v1.33.10+k3s1", "v1.34.0+k3s1"])
def test_a_newer_patch_build_or_next_minor_is_taken(run: Any, version: str) -> None:
    run(stack(version=version), nodes=LIVE)


def test_the_preview_says_of_each_node_what_up_will_do(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    nodes = {
        MASTER: other(SERVER, version="v1.32.7+k3s1"),
        WORKER: other(RUNNING, state="stopped"),
    }
    run(nodes=nodes)
    assert f"k3s-master runs v1.32.7+k3s1: up drains it, upgrades it to {VERSION}" in caplog.text
    assert "k3s-worker-1 is stopped: up starts it" in caplog.text
    assert f"up installs k3s {VERSION} on k3s-worker-2, an agent, which joins" in caplog.text


def test_a_difference_is_told_and_one_that_is_fixed_refused_until_confirmed(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    edited = {**SERVER, "differences": [differs("config.tls-san")], "generation": 2}
    registered, _ = run(nodes={**LIVE, MASTER: edited})
    assert "k3s-master: config.tls-san is live, declared declared: up changes it" in caplog.text
    assert spec_of(registered, "k3s-master")["generation"] == 2

    for key in ("datastore", "installed"):
        fixed = {**LIVE, MASTER: {**SERVER, "differences": [differs(key, fixed=True)]}}
        with pytest.raises(HostError, match=rf"(?s)k3s-master: {key}: .*cluster.confirm: tower"):
            run(nodes=fixed)
        registered, _ = run(stack(confirm="tower"), nodes=fixed)
        assert spec_of(registered, "k3s-master")["confirm"] == "tower"

    ranges = {
        **LIVE,
        MASTER: {**SERVER, "differences": [differs("config.cluster-cidr", fixed=True)]},
    }
    with pytest.raises(HostError, match=r"cluster-cidr"):
        run(stack(confirm="tower"), nodes=ranges)


def test_another_token_is_rotated_before_any_server_is_given_it(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    old = {**SERVER, "differences": [differs("tokenDigest", fixed=True)]}
    registered, _ = run(nodes={**LIVE, MASTER: old})
    assert "k3s-master has another token: up rotates it" in caplog.text
    assert "token" in before(registered, "k3s-master")


def test_servers_of_two_clusters_are_refused(run: Any) -> None:
    two = {MASTER: SERVER, WORKER: other(SERVER, identity="uid-2")}
    with pytest.raises(HostError, match=r"different clusters: k3s-master of uid-1, k3s-worker-1"):
        run(stack(three_servers=True), nodes=two)


def test_a_node_that_does_not_answer_is_neither_absent_nor_changed(
    run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    silent = {**LIVE, WORKER: None}
    for preview in (True, False):
        registered, _ = run(nodes=silent, preview=preview)
        assert registered["Command", "k3s-worker-1"].ignore_changes == ["stdin"]
        assert registered["Command", "k3s-worker-2"].ignore_changes == []
    assert "k3s-worker-1 does not answer, so it cannot be told what is there" in caplog.text
    assert "No route to host" in caplog.text
    assert "up installs" not in caplog.text


def test_an_upgrade_waits_for_every_node_and_everything_for_the_first_server(run: Any) -> None:
    newer = stack(version="v1.34.1+k3s1")
    silent = {**LIVE, WORKER: None}
    run(newer, nodes=silent)
    with pytest.raises(HostError, match=r"k3s-worker-1 does not answer, and k3s-master, k3s-wo"):
        run(newer, nodes=silent, preview=False)
    lost = {**LIVE, MASTER: None}
    run(nodes=lost)
    with pytest.raises(HostError, match=r"first server does not answer.* Nothing was changed"):
        run(nodes=lost, preview=False)


def test_the_way_in_has_the_declared_address_and_hangs_on_the_cluster_alone(run: Any) -> None:
    registered, asked = run(stack(three_servers=True), nodes={MASTER: SERVER})
    (question,) = (one for one in asked if one["verb"] == "kubeconfig")
    assert question["spec"]["server"] == "https://10.89.97.200:6443"
    provider = registered["kubernetes", "kubernetes"]
    assert provider.inputs["clusterIdentifier"] == "tower-uid-1"
    assert provider.secrets == {"kubeconfig"}
    file = registered["Command", "kubeconfig file"]
    assert json.loads(file.inputs["stdin"])["mode"] == "0600"
    # Of one that is not there yet the Command tells it.
    first, asked = run(preview=False)
    assert not [one for one in asked if one["verb"] == "kubeconfig"]
    assert first["kubernetes", "kubernetes"].inputs["clusterIdentifier"] == "tower-uid-1"
    assert first["kubernetes", "kubernetes"].inputs["kubeconfig"] == KUBECONFIG


def test_a_token_file_that_is_missing_or_holds_none_names_the_setting(run_program: Any) -> None:
    def read(**seen: Any) -> None:
        file = {"state": "present", "content": "c2hvcnQ=", "detail": "", **seen}
        answer = {"ok": True, "files": {"/run/agenix/k3s-token": file}, "made_up": []}
        declared = stack(token={"file": "/run/agenix/k3s-token"})
        connection = Connection(declared.host)
        run_program(
            lambda: connection.read(kinds.read(declared, connection)),
            calls={"command:local:run": {"stdout": json.dumps(answer), "stderr": ""}},
        )

    with pytest.raises(
        HostError, match=r"cluster\.token\.file: /run/agenix/k3s-token on host .* a"
    ):
        read(state="absent", detail="there is no such file")
    with pytest.raises(HostError, match=r"holds no token") as refused:
        read()
    assert "short" not in str(refused.value)
