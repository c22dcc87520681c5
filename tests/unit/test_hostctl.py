"""hostctl, the real one, on the make-believe machine of a rehearsal.

A test that begins `test_incident_NN` replays that incident of the platform that this one replaces.
"""

import ast
import atexit
import base64
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostctl import cli, program
from hostctl import machine as machine_module
from hostctl.k3d import k3d_config
from hostctl.machine import Machine, Ran, TookTooLong, ToolMissing
from hostctl.protocol import Failure
from hostctl.record import read_record
from hostctl.spec import cluster_spec
from rehearsal.apiserver import ApiServer
from rehearsal.core import World
from rehearsal.machine import RehearsalMachine
from rehearsal.providers.kubernetes import cluster_id

SPEC: dict[str, Any] = {
    "name": "factory",
    "image": "rancher/k3s:v1.31.5-k3s1",
    "servers": 1,
    "agents": 0,
    "disable": ["traefik", "servicelb"],
    "api": {"bind": "127.0.0.1", "port": 6443},
    "resolvers": ["1.1.1.1", "9.9.9.9"],
    "storage_dir": "/mnt/img_pool/k3d/storage",
    "network": {"name": "k3d-factory", "subnet": "172.30.0.0/16"},
    "k3s_args": [],
    "ports": [],
    "api_wait_seconds": 1800,
}
KUBECONFIG = {
    "cluster": "factory",
    "path": "/etc/k3d/kubeconfig",
    "owner": "root",
    "group": "wheel",
    "mode": "0640",
    "directory_mode": "0750",
    "server": "https://127.0.0.1:6443",
    "generation": 1,
}
NODE = "k3d-factory-server-0"
ROOT = Path(cli.__file__).parent.parent


class Killed(BaseException):
    """Stands for kill -9: no handler of hostctl sees it."""


class Host:
    """A make-believe host with the cluster's Docker network, and what hostctl did on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = RehearsalMachine(root / "world" / "machine")
        self.calls: list[list[str]] = []
        self.said = ""
        self._run: Callable[..., Ran] = self.machine.run
        self.machine.run = self._record  # type: ignore[method-assign]
        self.add_network()

    def add_network(self, **changes: Any) -> None:
        ipam = [{"subnet": "172.30.0.0/16", "gateway": "172.30.0.1"}]
        network = {"name": "k3d-factory", "id": "n1", "ipamConfigs": ipam, "labels": []}
        self.machine.docker_world.put("network/k3d-factory", network | changes)

    def _record(self, argv: Sequence[str], **options: Any) -> Ran:
        self.calls.append(list(argv))
        return self._run(argv, **options)

    def __call__(self, verb: str, spec: dict[str, Any] | None = None, code: int = 0) -> Any:
        """Runs a verb and returns its result, or its error if another exit code is expected."""
        self.calls.clear()
        out, err = io.StringIO(), io.StringIO()
        given_in = io.StringIO(json.dumps(spec or {}))
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                ended = cli.main(verb.split(), given_in, self.machine)
        finally:
            self.said = err.getvalue()
        answer = json.loads(out.getvalue())
        assert ended == code, answer
        assert answer["ok"] == (code == 0)
        return answer if code == 0 else answer["error"]

    def inspect(self, **changes: Any) -> dict[str, Any]:
        return self("k3d inspect", SPEC | changes)["cluster"]

    def up(self, **changes: Any) -> dict[str, Any]:
        """What `pulumi up` does of hostctl's verbs, in its order. Returns what was inspected."""
        seen = self.inspect(**changes)
        facts = {key: seen[key] for key in ("generation", "incarnation")}
        self("k3d ensure", SPEC | changes | facts)
        self("kubeconfig", KUBECONFIG | {"generation": seen["certificate_generation"]})
        return seen

    @property
    def cluster(self) -> dict[str, Any]:
        cluster = self.machine.world.get("clusters/factory")
        assert cluster is not None
        return cluster

    def edit(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Changes the live cluster behind everyone's back."""
        cluster = self.cluster
        change(cluster)
        self.machine.world.put("clusters/factory", cluster)

    def edit_node(self, **changes: Any) -> None:
        self.edit(lambda cluster: cluster["nodes"][0].update(changes))

    @property
    def api(self) -> ApiServer:
        return ApiServer(World(self.root / "world/kubernetes"), cluster_id(self.cluster["ca"]))

    @property
    def changed(self) -> list[str]:
        """The calls of the last verb that change containers."""
        changing = re.compile(
            r"docker (start|stop|restart|rm|network (?!inspect|ls))|k3d cluster [^l]"
        )
        return [" ".join(call) for call in self.calls if changing.match(" ".join(call))]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def live(host: Host) -> Host:
    host.up()
    return host


def facts(seen: dict[str, Any]) -> tuple[int, str, int]:
    return seen["generation"], seen["incarnation"], seen["certificate_generation"]


# Three answers


def test_absent_cluster_is_created_and_then_nothing_is_left_to_do(host: Host) -> None:
    before = host.inspect()
    assert before["state"] == "absent"
    assert not host.changed
    host.up()
    after = host.inspect()
    assert after["state"] == "running"
    assert after["differences"] == []
    assert facts(after) == facts(before)
    host("k3d ensure", SPEC | {"generation": after["generation"]})
    assert host.changed == []


def test_ensure_on_a_healthy_cluster_asks_few_questions(live: Host) -> None:
    live("k3d ensure", SPEC)
    assert len(live.calls) <= 5, live.calls


def test_stopped_cluster_is_started_and_stays_the_same(live: Host) -> None:
    identity = live.inspect()["identity"]
    live("k3d stop", {"name": "factory"})
    seen = live.inspect()
    assert (seen["state"], seen["identity"], seen["namespaces"]) == ("stopped", identity, None)
    assert seen["unseen"] == ["namespaces and objects: the cluster is stopped"]
    assert [one["key"] for one in seen["differences"] if not one["fixed"]] == ["state"]
    live.up()
    assert live.inspect()["identity"] == identity


@pytest.mark.parametrize(
    "break_docker",
    [
        lambda host: (host.machine.root / "docker-down").touch(),
        lambda host: (host.machine.docker_world.root / "unreachable").touch(),
    ],
)
@pytest.mark.parametrize("verb", ["inspect", "ensure", "identity", "start", "stop", "delete"])
def test_docker_not_answering_is_cannot_tell(
    live: Host, verb: str, break_docker: Callable[[Host], None]
) -> None:
    break_docker(live)
    wanted = SPEC if verb in ("inspect", "ensure") else {"name": "factory"}
    if verb == "delete":
        wanted = {"name": "factory", "confirm": "factory"}
    error = live(f"k3d {verb}", wanted, code=4)
    assert "docker does not answer: Cannot connect to the Docker daemon" in error["cause"]
    assert "systemctl status docker" in error["remedy"]
    assert live.changed == []


def test_missing_docker_names_version_and_snippets(host: Host) -> None:
    host.machine.set("missing-tools.json", ["docker"])
    error = host("k3d inspect", SPEC, code=6)
    for word in ("20.10", "virtualisation.docker.enable", "TrueNAS SCALE", "Debian"):
        assert word in error["remedy"]


def test_missing_k3d_is_told_before_a_create(host: Host) -> None:
    host.machine.set("missing-tools.json", ["k3d"])
    (warning,) = host.inspect()["warnings"]
    assert "k3d is not on PATH" in warning["what"]
    assert "pkgs.k3d" in warning["remedy"]
    error = host("k3d ensure", SPEC, code=6)
    assert "pkgs.k3d" in error["remedy"]
    assert host.machine.clusters() == []


def test_foreign_container_with_the_name_of_a_node_is_refused(host: Host) -> None:
    facts = {
        "Id": "f1",
        "Name": f"/{NODE}",
        "State": {"Status": "running"},
        "Config": {"Labels": {"com.docker.compose.project": "other"}},
    }
    (host.machine.root / "containers").mkdir()
    host.machine.set(f"containers/{NODE}.json", facts)
    for verb in ("inspect", "ensure", "doctor"):
        if verb == "doctor":
            findings = host("k3d doctor", SPEC)["findings"]
            assert any("foreign" in finding["what"] for finding in findings)
        else:
            error = host(f"k3d {verb}", SPEC, code=3)
            assert error["cause"].startswith(f"foreign: container {NODE}")
        assert host.changed == []
    host("k3d delete", {"name": "factory", "confirm": "factory"}, code=3)
    assert host.changed == []


def test_container_of_another_cluster_is_foreign(live: Host) -> None:
    live.edit_node(labels=live.cluster["nodes"][0]["labels"] | {"k3d.cluster": "other"})
    error = live("k3d ensure", SPEC, code=3)
    assert "belongs to cluster other" in error["cause"]


def test_cluster_whose_name_begins_alike_is_another(live: Host) -> None:
    other = SPEC | {"name": "factory-two", "api": {"bind": "127.0.0.1", "port": 6444}}
    assert live("k3d inspect", other)["cluster"]["state"] == "absent"


@pytest.mark.parametrize(
    ("leave", "named"),
    [
        (lambda host: host.machine.set("volumes.json", ["k3d-factory-images"]), "volume"),
        (
            lambda host: host.add_network(labels=[{"label": "app", "value": "k3d"}]),
            "network k3d-factory",
        ),
    ],
)
def test_remains_without_nodes_are_partial(
    host: Host, leave: Callable[[Host], None], named: str
) -> None:
    leave(host)
    for verb in ("inspect", "ensure"):
        error = host(f"k3d {verb}", SPEC, code=4)
        assert error["cause"].startswith("partial: it has no nodes")
        assert named in error["cause"]
        assert "docker" in error["remedy"]
        assert host.changed == []


def test_missing_first_server_is_partial(live: Host) -> None:
    live.edit_node(name="k3d-factory-server-1")
    error = live("k3d ensure", SPEC, code=4)
    assert f"partial: {NODE} is missing" in error["cause"]
    assert live.changed == []


def test_stopped_cluster_whose_network_is_gone_is_partial(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    live.machine.docker_world.delete("network/k3d-factory")
    error = live("k3d ensure", SPEC, code=4)
    assert "its Docker network k3d-factory is gone" in error["cause"]
    assert live.changed == []


def test_k3d_that_lists_what_docker_does_not_show_is_cannot_tell(host: Host) -> None:
    true_run = host._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if list(argv[:3]) == ["k3d", "cluster", "list"]:
            return Ran(0, b'[{"name": "factory"}]', b"")
        return true_run(argv, **options)

    host._run = run
    host("k3d ensure", SPEC, code=4)
    assert host.changed == []


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"ipamConfigs": [{"subnet": "172.18.0.0/16"}]}, "has subnet 172.18.0.0/16"),
        (None, "is not there"),
    ],
)
def test_network_must_be_there_with_its_subnet(
    host: Host, change: dict[str, Any] | None, cause: str
) -> None:
    if change is None:
        host.machine.docker_world.delete("network/k3d-factory")
    else:
        host.add_network(**change)
    error = host("k3d ensure", SPEC, code=3)
    assert cause in error["cause"]
    assert "docker network create --subnet 172.30.0.0/16" in error["remedy"]


# The incidents


def test_incident_01_no_load_balancer_before_one_server(live: Host) -> None:
    assert [node["name"] for node in live.cluster["nodes"]] == [NODE]
    assert live.cluster["nodes"][0]["ports"]["6443"] == [
        {"HostIp": "127.0.0.1", "HostPort": "6443"}
    ]


def test_incident_01_waits_for_the_bind_address(host: Host) -> None:
    host.machine.set("addresses.json", {"100.64.0.7": 40})
    host("k3d ensure", SPEC | {"api": {"bind": "100.64.0.7", "port": 6443}})
    assert "waiting for an interface with 100.64.0.7" in host.said
    assert host.cluster["state"] == "running"


def test_incident_01_bind_address_that_never_comes_is_bounded(host: Host) -> None:
    host.machine.set("addresses.json", {"100.64.0.7": None})
    error = host("k3d ensure", SPEC | {"api": {"bind": "100.64.0.7", "port": 6443}}, code=7)
    assert "100.64.0.7" in error["step"]
    assert host.changed == []


def test_incident_01_unpublished_api_port_is_healed(live: Host) -> None:
    live.edit_node(published=False)
    seen = live.inspect()
    assert [one["key"] for one in seen["differences"]] == ["api.published"]
    live("k3d ensure", SPEC)
    assert live.changed == [f"docker restart -t 60 {NODE}"]
    assert "does not publish the API" in live.said
    assert "waiting" not in live.said
    assert live.inspect()["differences"] == []


def test_incident_01_ready_means_through_the_published_port(
    live: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.machine, "connect", lambda *_: "[Errno 111] Connection refused")
    error = live("k3d ensure", SPEC | {"api_wait_seconds": 30}, code=7)
    assert "127.0.0.1:6443 does not reach it: [Errno 111]" in error["cause"]


def test_incident_02_a_failing_create_is_not_rolled_back(host: Host) -> None:
    true_run = host._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if list(argv[:3]) != ["k3d", "cluster", "create"]:
            return true_run(argv, **options)
        assert "--no-rollback" in argv
        config = json.loads(host.machine.read(argv[argv.index("--config") + 1]))
        host.machine.create_cluster(config, cut_off=True)
        return Ran(1, b"", b"\x1b[31mFATA\x1b[0m[0042] Failed Cluster Start: no space left\n")

    host._run = run
    error = host("k3d ensure", SPEC, code=5)
    assert error["cause"] == "FATA[0042] Failed Cluster Start: no space left"
    ca = host.cluster["ca"]
    host._run = true_run
    host("k3d ensure", SPEC)
    assert host.changed == ["k3d cluster start factory"]
    assert host.cluster["ca"] == ca


def test_incident_02_recovery_never_deletes(live: Host) -> None:
    """Whatever is broken of a live cluster, no verb but a confirmed delete removes anything."""
    breakages: list[Callable[[dict[str, Any]], object]] = [
        lambda cluster: cluster.update(state="stopped"),
        lambda cluster: cluster["nodes"][0].update(published=False),
        lambda cluster: cluster["nodes"][0].update(status="exited"),
        lambda cluster: cluster["nodes"][0].update(disconnected=True),
        lambda cluster: cluster.update(opening={"seconds": 10**6, "stalls": 99}),
        lambda cluster: cluster["nodes"][0].update(image="rancher/k3s:v1.32.0-k3s1"),
    ]
    for breakage in breakages:
        whole = live.cluster
        live.edit(breakage)
        for verb in ("ensure", "start"):
            with contextlib.suppress(AssertionError):
                live(f"k3d {verb}", SPEC if verb == "ensure" else {"name": "factory"})
            assert not any("delete" in call or "docker rm" in call for call in live.changed)
            assert live.cluster["ca"] == whole["ca"]
        live.machine.world.put("clusters/factory", whole)


def test_incident_03_listing_failed_is_not_absent(live: Host) -> None:
    live.edit_node(disconnected=True)
    listed = live.machine.run(["k3d", "cluster", "list", "--output", "json"])
    assert listed.code == 1  # This is what the incumbent read as "no cluster".
    for verb in ("inspect", "ensure"):
        error = live(f"k3d {verb}", SPEC, code=4)
        assert f"{NODE} has lost its endpoint" in error["cause"]
        assert "docker network connect" in error["remedy"]
        assert live.changed == []


def test_incident_03_k3d_failing_to_list_creates_nothing(host: Host, tmp_path: Path) -> None:
    host.up()
    host("k3d stop", {"name": "factory"})
    host.edit(lambda cluster: cluster.update(state="running"))
    host.edit_node(disconnected=True, status="running")
    other = SPEC | {
        "name": "other",
        "api": {"bind": "127.0.0.1", "port": 6444},
        "network": {"name": "k3d-other", "subnet": "172.31.0.0/16"},
    }
    error = host("k3d ensure", other, code=4)
    assert "k3d does not answer" in error["cause"]
    assert host.changed == []


def test_incident_04_a_server_that_reads_is_left_in_peace(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    # 11 GB in 17 minutes.
    opening = {"seconds": 17 * 60, "bytes_per_second": 11_000_000}
    live.edit(lambda cluster: cluster.update(opening=opening))
    live("k3d start", {"name": "factory"})
    assert live.changed == [f"docker start {NODE}"]
    assert "GiB read" in live.said
    assert len(live.said.splitlines()) > 100


def test_incident_04_a_stalled_server_is_restarted(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    starts = live.cluster["nodes"][0]["starts"]
    opening = {"seconds": 60, "bytes_per_second": 10**7, "stalls": starts + 1}
    live.edit(lambda cluster: cluster.update(opening=opening))
    live("k3d start", {"name": "factory"})
    assert live.changed == [f"docker start {NODE}", f"docker restart -t 60 {NODE}"]


def test_incident_04_restarts_are_bounded(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    live.edit(lambda cluster: cluster.update(opening={"seconds": 60, "stalls": 99}))
    error = live("k3d start", {"name": "factory"}, code=5)
    assert "stalled again after 2 restarts" in error["cause"]
    assert live.changed.count(f"docker restart -t 60 {NODE}") == 2


def test_incident_04_the_ceiling_is_the_settings(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    opening = {"seconds": 10**6, "bytes_per_second": 10**7}
    live.edit(lambda cluster: cluster.update(opening=opening))
    error = live("k3d ensure", SPEC | {"api_wait_seconds": 60}, code=7)
    assert "not ready after 60 s" in error["cause"]
    assert live.changed == [f"docker start {NODE}"]


@pytest.mark.parametrize(
    "resolver", ["127.0.0.1", "127.0.0.11", "::1", "169.254.1.1", "172.30.0.1", "0.0.0.0", "dns"]
)
def test_incident_05_resolvers_that_pods_cannot_reach_are_refused(
    host: Host, resolver: str
) -> None:
    error = host("k3d ensure", SPEC | {"resolvers": [resolver]}, code=2)
    assert "resolvers" in error["cause"]
    assert resolver in error["cause"]


@pytest.mark.parametrize(
    ("resolver", "network"),
    [("172.17.0.1", "bridge, 172.17.0.0/16"), ("10.9.0.53", "pihole, 10.9.0.0/24")],
)
def test_incident_05_resolvers_in_a_docker_network_are_refused(
    host: Host, resolver: str, network: str
) -> None:
    pihole = {"name": "pihole", "id": "n2", "ipamConfigs": [{"subnet": "10.9.0.0/24"}]}
    host.machine.docker_world.put("network/pihole", pihole)
    wrong = SPEC | {"resolvers": ["1.1.1.1", resolver]}
    for verb in ("inspect", "ensure"):
        error = host(f"k3d {verb}", wrong, code=3)
        assert error["cause"] == f"resolver {resolver} lies in Docker network {network}"
        assert "public or LAN DNS server" in error["remedy"]
        assert host.changed == []
    assert any(resolver in one["what"] for one in host("k3d doctor", wrong)["findings"])
    # Also before a recreate takes anything away.
    host.up()
    host("k3d ensure", wrong | {"recreate": "factory"}, code=3)
    assert host.changed == []


def test_incident_05_the_subnet_of_a_macvlan_network_is_the_lan(host: Host) -> None:
    lan = {"name": "lan", "id": "n2", "ipamConfigs": [{"subnet": "192.168.1.0/24"}]}
    host.machine.docker_world.put("network/lan", lan | {"driver": "macvlan"})
    assert host.inspect(resolvers=["192.168.1.1"])["state"] == "absent"


def test_incident_05_a_network_that_goes_away_meanwhile_is_looked_for_again(host: Host) -> None:
    true_run, gone = host._run, {"name": "gone", "id": "n2"}
    host.machine.docker_world.put("network/gone", gone)

    def run(argv: Sequence[str], **options: Any) -> Ran:
        ran = true_run(argv, **options)
        if list(argv[:3]) == ["docker", "network", "ls"]:
            host.machine.docker_world.delete("network/gone")
        return ran

    host._run = run
    assert host.inspect()["state"] == "absent"


def test_incident_05_resolvers_are_mounted_into_every_node(host: Host) -> None:
    host.up(agents=2)
    for node in host.cluster["nodes"]:
        source = next(bind for bind in node["binds"] if "/etc/rancher/k3s/resolv.conf" in bind)
        assert (
            host.machine.read(source.split(":")[0]) == b"nameserver 1.1.1.1\nnameserver 9.9.9.9\n"
        )
        assert "--resolv-conf=/etc/rancher/k3s/resolv.conf" in node["cmd"]


@pytest.mark.parametrize(
    ("declared", "key"),
    [
        (
            {
                "storage_dir": "/mnt/other/storage",
                "datastore_dir": "/mnt/img_pool/k3d/storage-server",
            },
            "storageDir",
        ),
        ({"datastore_dir": "/mnt/other/server"}, "datastoreDir"),
        ({"secrets_encryption": True}, "secretsEncryption"),
        ({"image": "rancher/k3s:v1.33.0-k3s1"}, "image"),
        ({"image": "rancher/k3s:v1.31.4-k3s1"}, "image"),
        ({"image": "rancher/k3s:stable"}, "image"),
        ({"resolvers": ["8.8.8.8"]}, "resolvers"),
        ({"disable": ["traefik"]}, "disable"),
        ({"servers": 3}, "servers"),
        ({"agents": 1}, "agents"),
        ({"api": {"bind": "127.0.0.1", "port": 6444}}, "api.port"),
        ({"api": {"bind": "10.0.0.5", "port": 6443}}, "api.bind"),
        (
            {"api": {"bind": "127.0.0.1", "port": 6443, "server_name": "p510.example.org"}},
            "api.serverName",
        ),
        ({"k3s_args": ["--write-kubeconfig-mode=640"]}, "k3sArgs"),
        ({"network": {"name": "k3d-factory", "subnet": "172.29.0.0/16"}}, "network.subnet"),
        (
            {"ports": [{"host_port": 80, "container_port": 80, "bind": "0.0.0.0"}]},
            "ports",
        ),
    ],
)
def test_incident_06_what_is_fixed_at_creation_is_shown_and_refused(
    live: Host, declared: dict[str, Any], key: str
) -> None:
    seen = live.inspect(**declared)
    (difference,) = seen["differences"]
    assert (difference["key"], difference["fixed"]) == (key, True)
    assert difference["declared"] != difference["live"]
    beyond = key in ("network.subnet", "servers")
    way = "cluster.delete set to factory" if beyond else "set cluster.recreate to factory"
    assert way in difference["remedy"]
    error = live("k3d ensure", SPEC | declared, code=3)
    assert key in error["cause"]
    assert way in error["remedy"]
    assert live.changed == []
    if beyond:
        confirmed = declared | {"recreate": "factory", "image": "rancher/k3s:v1.33.0-k3s1"}
        assert live.inspect(**confirmed)["incarnation"] == seen["incarnation"]
        error = live("k3d ensure", SPEC | confirmed, code=3)
        assert "set cluster.recreate" not in error["remedy"]
        assert live.changed == []


def test_incident_06_a_moved_mount_is_seen(live: Host) -> None:
    binds = [
        bind.replace("/mnt/img_pool/k3d/storage:", "/mnt/old/k3d/storage:")
        for bind in live.cluster["nodes"][0]["binds"]
    ]
    live.edit_node(binds=binds)
    (difference,) = live.inspect()["differences"]
    assert difference["live"] == "/mnt/old/k3d/storage"


def test_incident_07_a_seed_is_created_when_absent(live: Host) -> None:
    seed = {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "default",
        "name": "factory-cli-creds",
        "type": "Opaque",
        "data": {"token": base64.b64encode(b"first").decode()},
        "labels": {"app.kubernetes.io/managed-by": "pulumi"},
    }
    assert live("secret seed", seed)["created"] is True


def test_incident_08_a_seed_never_overwrites(live: Host) -> None:
    seed = {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "default",
        "name": "factory-cli-creds",
        "data": {"token": base64.b64encode(b"first").decode()},
    }
    live("secret seed", seed)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "factory-cli-creds"}}
    before = live.api.get(secret)
    newer = seed | {"data": {"token": base64.b64encode(b"second").decode()}}
    assert live("secret seed", newer)["created"] is False
    assert live.api.get(secret) == before


def test_incident_08_no_value_of_a_seed_is_an_argument_or_in_an_error(live: Host) -> None:
    value = base64.b64encode(b"canary-7f3a").decode()
    seed = {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "absent",
        "name": "s",
        "data": {"token": value},
    }
    error = live("secret seed", seed, code=5)
    shown = json.dumps(error) + live.said + json.dumps(live.calls)
    assert "homelab:namespaces" in error["remedy"]
    assert value not in shown
    assert "canary" not in shown


@pytest.mark.parametrize(
    "image", ["rancher/k3s", "rancher/k3s:latest", f"rancher/k3s:latest@sha256:{'0' * 64}"]
)
def test_incident_09_unpinned_images_are_refused(host: Host, image: str) -> None:
    error = host("k3d ensure", SPEC | {"image": image}, code=2)
    assert "image" in error["cause"]


def test_incident_10_a_delete_needs_the_name(live: Host) -> None:
    stored = SPEC | {"generation": 1, "incarnation": "00000000-1", "confirm": None, "new": 1}
    live("k3d delete", stored, code=3)
    assert live.changed == []
    assert live("k3d delete", stored | {"confirm": "factory"})["deleted"] is True
    assert live("k3d delete", stored)["deleted"] is False
    assert live.machine.exists(SPEC["storage_dir"])


def test_incident_10_a_recreate_backs_up_first(live: Host) -> None:
    live.machine.write_atomic("/mnt/img_pool/k3d/storage/pvc-1", b"data of a volume", 0o600)
    before = live.inspect()
    declared = {"disable": ["traefik"], "recreate": "factory"}
    seen = live.up(**declared)
    assert seen["incarnation"].endswith("-2")
    after = live.inspect(**declared)
    assert after["identity"] != before["identity"]
    assert after["differences"] == []
    assert facts(after)[:2] == facts(seen)[:2]
    backup = read_record(live.machine, "factory")["backup"]
    assert backup.startswith("/mnt/img_pool/k3d/storage-backups/factory-")
    with tarfile.open(fileobj=io.BytesIO(live.machine.read(f"{backup}/storage.tar"))) as archive:
        assert archive.getnames() == ["pvc-1"]
    with tarfile.open(fileobj=io.BytesIO(live.machine.read(f"{backup}/datastore.tar"))) as archive:
        assert archive.getnames() == ["server/db/state.db"]
    sums = live.machine.read(f"{backup}/SHA256SUMS").decode()
    assert live.machine.checksum(f"{backup}/storage.tar") in sums
    # The name left in the settings makes nothing anew by itself.
    live("k3d ensure", SPEC | declared)
    assert live.changed == []


def test_incident_10_no_recreate_without_room_for_the_backup(live: Host) -> None:
    live.machine.set("free", 1024)
    declared = {"disable": ["traefik"], "recreate": "factory"}
    error = live("k3d ensure", SPEC | declared, code=3)
    assert "has room for" in error["cause"]
    assert not any("delete" in call for call in live.changed)


def test_incident_10_no_recreate_when_the_backup_does_not_verify(live: Host) -> None:
    true_run = live._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if list(argv[:2]) == ["tar", "--compare"]:
            return Ran(1, b"", b"tar: contents differ")
        return true_run(argv, **options)

    live._run = run
    declared = {"disable": ["traefik"], "recreate": "factory"}
    error = live("k3d ensure", SPEC | declared, code=5)
    assert "verifying the backup" in error["step"]
    assert not any("delete" in call for call in live.changed)


def test_a_backup_says_how_far_it_is(live: Host) -> None:
    live.machine.write_atomic("/mnt/img_pool/k3d/storage/pvc-1", b"x" * 3 * 2**20, 0o600)
    true_run = live._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        ran = true_run(argv, **options)
        if options.get("ends_with_us"):
            options["tick"](5.0)
        return ran

    live._run = run
    declared = {"disable": ["traefik"], "recreate": "factory"}
    live("k3d ensure", SPEC | declared)
    told = [line for line in live.said.splitlines() if "5 s, 3.0 MiB written" in line]
    assert any("backing up cluster factory" in line for line in told)
    assert any("backing up the datastore of cluster factory" in line for line in told)
    assert any("verifying the backup of cluster factory" in line for line in told)


def test_incident_14_the_kubeconfig_has_a_reachable_address(live: Host) -> None:
    given_address = KUBECONFIG | {"server": "https://p510.example.org:6443"}
    text = live("kubeconfig", given_address)["kubeconfig"]
    assert "    server: https://p510.example.org:6443\n" in text
    assert "0.0.0.0" not in text
    error = live("kubeconfig", KUBECONFIG | {"server": "https://0.0.0.0:6443"}, code=2)
    assert "incident 14" in error["cause"]


def test_incident_17_a_failed_step_fails_and_names_remedy(live: Host) -> None:
    (live.machine.root / "docker-down").touch()
    error = live("kubeconfig", KUBECONFIG, code=4)
    assert all(error[key] for key in ("step", "cause", "remedy", "code"))


# Generation and incarnation


def test_healing_once_leaves_nothing_to_do(live: Host) -> None:
    for _ in range(3):
        steady = facts(live.inspect())
        live("k3d stop", {"name": "factory"})
        drifted = live.up()
        assert facts(drifted) == (steady[0] + 1, steady[1], steady[2])
        assert facts(live.inspect()) == facts(drifted)


def test_drift_that_heals_by_itself_is_no_change(live: Host) -> None:
    steady = facts(live.inspect())
    live("k3d stop", {"name": "factory"})
    live("k3d start", {"name": "factory"})
    assert facts(live.inspect()) == steady


def test_deleted_by_hand_is_another_incarnation(live: Host) -> None:
    before = live.inspect()
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    gone = live.inspect()
    assert facts(gone) == (
        before["generation"] + 1,
        before["incarnation"][:-1] + "2",
        before["certificate_generation"] + 1,
    )
    live.up()
    after = live.inspect()
    assert facts(after) == facts(gone)
    assert after["identity"] != before["identity"]


def test_create_that_was_cut_off_after_a_delete_is_still_to_be_done(live: Host) -> None:
    steady = live.inspect()
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    true_run = live._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        ran = true_run(argv, **options)
        if list(argv[:3]) == ["k3d", "cluster", "create"]:
            raise Killed
        return ran

    live._run = run
    with pytest.raises(Killed):
        live("k3d ensure", SPEC)
    live._run = true_run
    assert live.inspect()["generation"] == steady["generation"] + 1


def test_what_argocd_applied_is_forgotten_with_the_cluster(live: Host) -> None:
    apply = {key: RESOLVE[key] for key in ("cluster", "repository", "path")}
    live("argocd apply", apply | {"kubeconfig": "/etc/k3d/kubeconfig", "commit": COMMIT})
    live("k3d stop", {"name": "factory"})
    live.up()
    assert live("argocd resolve", RESOLVE)["applied"]["commit"] == COMMIT
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    live.up()
    assert live("argocd resolve", RESOLVE)["applied"] is None


def test_recreated_by_hand_is_another_incarnation(live: Host) -> None:
    before = live.inspect()
    config = json.loads(live.machine.read("/var/lib/homelab/clusters/factory/k3d.yaml"))
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    live.machine.rename("/mnt/img_pool/k3d/storage-server/server-0", "/mnt/img_pool/k3d/kept")
    live.machine.create_cluster(config)
    seen = live.inspect()
    assert seen["incarnation"] == before["incarnation"][:-1] + "2"
    assert seen["certificate_generation"] == before["certificate_generation"] + 1
    live.up()
    assert facts(live.inspect()) == facts(seen)


def test_changed_ca_is_another_identity(live: Host) -> None:
    before = live("k3d identity", {"name": "factory"})["identity"]
    live.edit(lambda cluster: cluster.update(ca=base64.b64encode(b"another CA").decode()))
    assert live("k3d identity", {"name": "factory"})["identity"] != before
    assert live.inspect()["incarnation"].endswith("-2")


def test_lost_record_is_recorded_anew_once(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    live.up()
    live.machine._file("/var/lib/homelab/clusters/factory.json").unlink()
    seen = live.inspect()
    assert facts(seen)[::2] == (0, 0)
    live.up()
    assert facts(live.inspect()) == facts(seen)


def cluster_of_the_incumbent(machine: RehearsalMachine) -> dict[str, Any]:
    """As its script made it: with k3d's load balancer in front, other forms of arguments, no
    datastore outside of the node, and no label of ours.
    """
    config = k3d_config(cluster_spec(SPEC, "test"), "none")
    machine.make_directory("/etc/k3d", 0o755)
    resolvers = b"nameserver 1.1.1.1\nnameserver 9.9.9.9\n"
    machine.write_atomic("/etc/k3d/resolv.conf", resolvers, 0o644)
    config["options"]["k3d"]["disableLoadbalancer"] = False
    config["options"]["runtime"]["labels"] = []
    config["volumes"][1]["volume"] = "/etc/k3d/resolv.conf:/etc/rancher/k3s/resolv.conf"
    del config["volumes"][2]
    machine.create_cluster(config)
    cluster = machine.world.get("clusters/factory")
    assert cluster is not None
    arguments = ["--disable", "servicelb,traefik", "--resolv-conf", "/etc/rancher/k3s/resolv.conf"]
    cluster["nodes"][0]["cmd"] = ["server", *arguments, "--tls-san", "127.0.0.1"]
    machine.world.put("clusters/factory", cluster)
    return cluster


def test_cluster_of_the_incumbent_is_adopted(host: Host) -> None:
    made = cluster_of_the_incumbent(host.machine)
    seen = host.inspect()
    assert (seen["state"], seen["differences"]) == ("running", [])
    assert facts(seen)[::2] == (0, 0)
    assert seen["live"]["load_balancer"] is True
    host.up()
    assert host.cluster["ca"] == made["ca"]
    assert host.changed == []
    findings = host("k3d doctor", SPEC)["findings"]
    assert [finding["severity"] for finding in findings] == ["warning"]


def test_damaged_record_is_named(live: Host) -> None:
    live.machine.write_atomic("/var/lib/homelab/clusters/factory.json", b"{", 0o600)
    error = live("k3d inspect", SPEC, code=4)
    assert "/var/lib/homelab/clusters/factory.json" in error["cause"]


# The kubeconfig


def test_kubeconfig_file_has_mode_owner_and_directory(live: Host) -> None:
    file = live.machine.stat("/etc/k3d/kubeconfig")
    directory = live.machine.stat("/etc/k3d")
    assert file
    assert directory
    assert (file.mode, file.owner, file.group) == (0o640, "root", "wheel")
    assert (directory.mode, directory.group) == (0o750, "wheel")


def test_kubeconfig_drift_is_another_certificate_generation(live: Host) -> None:
    steady = live.inspect()["certificate_generation"]
    live.machine.set_access("/etc/k3d/kubeconfig", 0o644)
    assert live.inspect()["certificate_generation"] == steady + 1
    live.up()
    assert live.inspect()["certificate_generation"] == steady + 1
    live.edit(lambda cluster: cluster.update(certificate=base64.b64encode(b"renewed").decode()))
    assert live.inspect()["certificate_generation"] == steady + 2
    live.up()
    seen = live.inspect()
    assert seen["certificate_generation"] == steady + 2
    assert seen["incarnation"].endswith("-1")


def test_kubeconfig_group_that_is_missing_is_named(live: Host) -> None:
    live.machine.set("accounts.json", {"groups": ["wheel"]})
    error = live("kubeconfig", KUBECONFIG, code=3)
    assert "group wheel" in error["cause"]


def test_kubeconfig_readable_by_others_is_refused(live: Host) -> None:
    error = live("kubeconfig", KUBECONFIG | {"mode": "0644"}, code=2)
    assert "mode" in error["cause"]


def test_kubeconfig_by_name_takes_what_is_recorded(live: Host) -> None:
    live.machine._file("/etc/k3d/kubeconfig").unlink()
    live("kubeconfig factory")
    assert live.machine.exists("/etc/k3d/kubeconfig")


# Killed at any point, and twice at once


def _killed_at(host: Host, number: int) -> bool:
    """Runs ensure and the kubeconfig, killed before their `number`-th contact with the machine."""
    count = 0

    class Trap:
        def __getattr__(self, name: str) -> Any:
            attribute = getattr(host.machine, name)
            if not callable(attribute):
                return attribute

            def touched(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    raise Killed
                return attribute(*arguments, **options)

            return touched

    silent = io.StringIO()
    spec = SPEC | {"generation": 1, "incarnation": "0a0a0a0a-1"}
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            for verb, given_in in (("k3d ensure", spec), ("kubeconfig", KUBECONFIG)):
                trap: Any = Trap()
                cli.main(verb.split(), io.StringIO(json.dumps(given_in)), trap)
    except Killed:
        return True
    return False


@pytest.mark.parametrize("start", ["absent", "stopped", "unpublished"])
def test_killed_before_any_contact_with_the_machine_and_run_again(
    tmp_path: Path, start: str
) -> None:
    number, ended = 0, set()
    while True:
        number += 1
        host = Host(tmp_path / str(number))
        ca = None
        if start != "absent":
            host("k3d ensure", SPEC | {"generation": 0, "incarnation": "0a0a0a0a-1"})
            ca = host.cluster["ca"]
        if start == "stopped":
            host("k3d stop", {"name": "factory"})
        elif start == "unpublished":
            host.edit_node(published=False)
        killed = _killed_at(host, number)
        host("k3d ensure", SPEC | {"generation": 1, "incarnation": "0a0a0a0a-1"})
        host("kubeconfig", KUBECONFIG)
        assert ca in (None, host.cluster["ca"])
        seen = host.inspect()
        ended.add(json.dumps([seen["state"], facts(seen), seen["differences"], seen["identity"]]))
        if not killed:
            break
    assert number > 20
    assert len(ended) == 1


@pytest.mark.parametrize("cut_off", ["volume", "helper", "created", "started"])
def test_create_cut_off_inside_k3d_is_continued(host: Host, cut_off: str) -> None:
    true_run = host._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if list(argv[:3]) != ["k3d", "cluster", "create"]:
            return true_run(argv, **options)
        config = json.loads(host.machine.read(argv[argv.index("--config") + 1]))
        host.machine.set("volumes.json", ["k3d-factory-images"])
        if cut_off == "helper":
            labels = {"app": "k3d", "k3d.cluster": "factory", "k3d.role": "noRole"}
            helper = {
                "Id": "h1",
                "Name": "/k3d-factory-tools",
                "State": {"Status": "running"},
                "Config": {"Labels": labels},
                "NetworkSettings": {},
            }
            (host.machine.root / "containers").mkdir()
            host.machine.set("containers/k3d-factory-tools.json", helper)
        elif cut_off != "volume":
            host.machine.create_cluster(config, cut_off=cut_off == "created")
        raise Killed

    host._run = run
    with pytest.raises(Killed):
        host("k3d ensure", SPEC)
    host._run = true_run
    seen = host.inspect()
    assert seen["state"] in ("absent", "stopped", "running")
    host("k3d ensure", SPEC | {key: seen[key] for key in ("generation", "incarnation")})
    assert facts(host.inspect())[:2] == facts(seen)[:2]
    assert host.inspect()["differences"] == []


def test_create_of_several_nodes_cut_off_half_way_is_partial_with_the_command(host: Host) -> None:
    wanted = SPEC | {"agents": 2}
    true_run = host._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if list(argv[:3]) != ["k3d", "cluster", "create"]:
            return true_run(argv, **options)
        config = json.loads(host.machine.read(argv[argv.index("--config") + 1]))
        host.machine.create_cluster(config, cut_off=True)
        host.edit(lambda cluster: cluster["nodes"].pop())
        raise Killed

    host._run = run
    with pytest.raises(Killed):
        host("k3d ensure", wanted)
    host._run = true_run
    error = host("k3d ensure", wanted, code=4)
    assert "cut off after 2 of 3 nodes; it was never ready" in error["cause"]
    assert "k3d cluster delete factory" in error["remedy"]
    assert host.changed == []


def test_two_ensures_at_once_make_one_cluster(tmp_path: Path) -> None:
    hosts = [Host(tmp_path), Host(tmp_path)]
    codes = []

    def ensure(host: Host) -> None:
        given_in = io.StringIO(json.dumps(SPEC))
        codes.append(cli.main(["k3d", "ensure"], given_in, host.machine))

    threads = [threading.Thread(target=ensure, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    creates = [
        call for host in hosts for call in host.calls if call[:3] == ["k3d", "cluster", "create"]
    ]
    assert len(creates) == 1


# Several servers


def test_several_servers_let_k3d_make_the_network(host: Host) -> None:
    host.machine.docker_world.delete("network/k3d-factory")
    host.up(servers=3)
    config = json.loads(host.machine.read("/var/lib/homelab/clusters/factory/k3d.yaml"))
    assert config["subnet"] == "172.30.0.0/16"
    assert "network" not in config
    seen = host.inspect(servers=3)
    assert seen["differences"] == []
    assert seen["live"]["load_balancer"] is True


@pytest.mark.parametrize("servers", [2, 4])
def test_even_numbers_of_servers_are_refused(host: Host, servers: int) -> None:
    assert "odd" in host("k3d ensure", SPEC | {"servers": servers}, code=2)["cause"]


# What lives in the cluster


def _deployment(name: str, **pod: Any) -> dict[str, Any]:
    labels = {"app": name}
    container = {"name": "main", "image": "example.org/app:1", **pod.pop("container", {})}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], **pod},
            },
        },
    }


def test_rollout_restarts_who_uses_a_changed_secret(live: Host) -> None:
    volume = {"name": "v", "secret": {"secretName": "db"}}
    variable = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "db", "key": "x"}}}
    source = {"projected": {"sources": [{"secret": {"name": "db"}}]}, "name": "p"}
    for deployment in (
        _deployment("by-volume", volumes=[volume]),
        _deployment("by-env", container={"env": [variable]}),
        _deployment("by-env-from", container={"envFrom": [{"secretRef": {"name": "db"}}]}),
        _deployment("by-projection", volumes=[source]),
        _deployment("by-pull", imagePullSecrets=[{"name": "db"}]),
        _deployment("of-another", volumes=[{"name": "v", "secret": {"secretName": "other"}}]),
    ):
        live.api.create(deployment, "test")
    users = ["by-env", "by-env-from", "by-projection", "by-volume"]
    spec = {"kubeconfig": "/etc/k3d/kubeconfig", "namespace": "default"}
    first = spec | {"secrets": {"db": "digest-1", "other": "digest-1"}}
    assert live("rollout", first)["rolled"] == []
    assert live("rollout", first)["rolled"] == []
    second = spec | {"secrets": {"db": "digest-2", "other": "digest-1"}}
    assert sorted(live("rollout", second)["rolled"]) == [f"deployment/{name}" for name in users]
    assert live("rollout", second)["rolled"] == []
    annotations = live.api.get(_deployment("by-env"))["spec"]["template"]["metadata"]["annotations"]
    assert annotations.keys() == {"kubectl.kubernetes.io/restartedAt"}
    live.api.create(_deployment("newcomer", volumes=[volume]), "test")
    assert live("rollout", second)["rolled"] == []


def test_rollout_restarts_a_workload_that_came_after_the_last_run(live: Host) -> None:
    """ArgoCD brings the workloads after the first up, which saw none of them."""
    spec = {"kubeconfig": "/etc/k3d/kubeconfig", "namespace": "default"}
    assert live("rollout", spec | {"secrets": {"db": "digest-1"}})["rolled"] == []
    volume = {"name": "v", "secret": {"secretName": "db"}}
    live.api.create(_deployment("app", volumes=[volume]), "test")
    assert live("rollout", spec | {"secrets": {"db": "digest-2"}})["rolled"] == ["deployment/app"]


def test_rollout_keeps_no_digest_that_could_be_guessed_from(live: Host) -> None:
    volume = {"name": "v", "secret": {"secretName": "db"}}
    live.api.create(_deployment("app", volumes=[volume]), "test")
    spec = {"kubeconfig": "/etc/k3d/kubeconfig", "namespace": "default"}
    live("rollout", spec | {"secrets": {"db": "digest-of-the-value"}})
    (ledger,) = (live.machine.root / "files/var/lib/homelab/rollouts").rglob("*.json")
    assert "digest-of-the-value" not in ledger.read_text()
    path = "/" + str(ledger.relative_to(live.machine.root / "files"))
    seen = live.machine.stat(path)
    assert seen
    assert seen.mode == 0o600


RESOLVE = {
    "cluster": "factory",
    "repository": "https://github.com/example/gitops",
    "ref": "main",
    "path": "bootstrap",
    "commit": None,
}
COMMIT = "a" * 40


def test_argocd_moves_from_commit_to_commit(live: Host) -> None:
    refs = {"refs/heads/main": COMMIT}
    live.machine.set("git.json", {RESOLVE["repository"]: {"refs": refs}})
    first = live("argocd resolve", RESOLVE)
    assert (first["state"], first["commit"], first["applied"]) == ("resolved", COMMIT, None)
    apply = {key: RESOLVE[key] for key in ("cluster", "repository", "path")} | {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "commit": COMMIT,
        "namespace": "argocd",
    }
    assert live("argocd apply", apply)["objects"] == 4
    assert "not all kinds are served yet" in live.said
    refs["refs/heads/main"] = "b" * 40
    live.machine.set("git.json", {RESOLVE["repository"]: {"refs": refs}})
    second = live("argocd resolve", RESOLVE)
    assert second["commit"] == "b" * 40
    assert second["applied"]["commit"] == COMMIT
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "argocd"}}
    managers = {e["manager"] for e in live.api.get(namespace)["metadata"]["managedFields"]}
    assert managers == {"homelab"}


def test_argocd_apply_takes_over_a_client_side_apply(live: Host) -> None:
    last_applied = {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": "argocd", "labels": {"gone": "1"}, "annotations": last_applied},
    }
    live.api.create(namespace, "kubectl-client-side-apply")
    apply = {key: RESOLVE[key] for key in ("cluster", "repository", "path")} | {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "commit": COMMIT,
        "namespace": "argocd",
    }
    live("argocd apply", apply)
    metadata = live.api.get(namespace)["metadata"]
    assert {entry["manager"] for entry in metadata["managedFields"]} == {"homelab"}
    assert not metadata.get("labels", {}).get("gone")


@pytest.mark.parametrize(
    ("known", "state", "commit"),
    [
        ({"unreachable": True}, "unreachable", None),
        ({"refs": {"refs/heads/x/refs/heads/main": COMMIT}}, "no-such-ref", None),
        ({"refs": {"refs/heads/main": COMMIT}}, "resolved", COMMIT),
        (
            {"refs": {"refs/tags/main": "b" * 40, "refs/tags/main^{}": COMMIT}},
            "resolved",
            COMMIT,
        ),
    ],
)
def test_argocd_resolve_has_three_answers(
    host: Host, known: dict[str, Any], state: str, commit: str | None
) -> None:
    host.machine.set("git.json", {RESOLVE["repository"]: known})
    seen = host("argocd resolve", RESOLVE)
    assert (seen["state"], seen["commit"]) == (state, commit)


def test_argocd_commit_of_the_settings_needs_no_repository(host: Host) -> None:
    host.machine.set("git.json", {RESOLVE["repository"]: {"unreachable": True}})
    assert host("argocd resolve", RESOLVE | {"commit": COMMIT})["commit"] == COMMIT
    assert host("argocd resolve", RESOLVE | {"ref": COMMIT})["commit"] == COMMIT


@pytest.mark.parametrize(
    "repository",
    [
        "https://github.com/o/r",
        "https://git.example.org:8443/group/sub/r.git",
        "ssh://git@example.org:2222/o/r.git",
        "git@github.com:o/r.git",
    ],
)
def test_repository_forms(host: Host, repository: str) -> None:
    host("argocd resolve", RESOLVE | {"repository": repository})
    call = next(call for call in host.calls if "ls-remote" in call)
    assert call[:4] == ["git", "ls-remote", "--", repository]


@pytest.mark.parametrize(
    "change",
    [
        {"repository": "--upload-pack=touch /tmp/x"},
        {"repository": "ext::sh -c whoami"},
        {"repository": "https://user:password@example.org/o/r"},
        {"repository": "file:///etc"},
        {"repository": "-oProxyCommand=x@host:path"},
        {"repository": "https://example.org/o/r?ref=x&a=b"},
        {"repository": "https://example.org/o/r/"},
        {"repository": ""},
        {"ref": "--all"},
        {"ref": "a..b"},
        {"ref": "a b"},
        {"ref": "main;id"},
        {"path": "../../etc"},
        {"path": "/etc"},
        {"path": "a?ref=x"},
        {"commit": "main"},
    ],
)
def test_hostile_git_values_are_refused(host: Host, change: dict[str, str]) -> None:
    # A shell's ';' is a legal part of a ref, and harmless: no shell is ever run.
    code = 0 if change == {"ref": "main;id"} else 2
    host("argocd resolve", RESOLVE | change, code=code)


@pytest.mark.parametrize("tool", ["git", "kubectl"])
def test_argocd_needs_its_tools_before_anything_else(host: Host, tool: str) -> None:
    host.machine.set("missing-tools.json", [tool])
    error = host("argocd resolve", RESOLVE, code=6)
    assert f"pkgs.{tool}" in error["remedy"]


def test_connector_is_stopped_and_its_absence_is_fine(live: Host) -> None:
    spec = {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "default",
        "deployment": "cloudflared",
    }
    assert live("connector stop", spec)["stopped"] is False
    live.api.create(_deployment("cloudflared"), "test")
    assert live("connector stop", spec)["stopped"] is True
    assert live.api.get(_deployment("cloudflared"))["spec"]["replicas"] == 0
    live("k3d stop", {"name": "factory"})
    assert live("connector stop", spec)["stopped"] is False
    assert live("connector stop", spec | {"kubeconfig": "/etc/none"})["stopped"] is False


def test_a_connector_that_argocd_has_by_now_goes_on(live: Host) -> None:
    spec = {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "default",
        "deployment": "cloudflared",
    }
    deployment = _deployment("cloudflared")
    tracking = "infra:apps/Deployment:default/cloudflared"
    deployment["metadata"]["annotations"] = {"argocd.argoproj.io/tracking-id": tracking}
    live.api.create(deployment, "test")
    left = live("connector stop", spec)
    assert (left["stopped"], left["detail"]) == (False, "it belongs to ArgoCD application infra")
    assert live.api.get(_deployment("cloudflared"))["spec"]["replicas"]


def test_connector_status_counts_ready_pods(live: Host) -> None:
    spec = {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "default",
        "deployment": "cloudflared",
    }
    assert live("connector status", spec)["ready"] == 0
    deployment = live.api.create(_deployment("cloudflared"), "test")
    deployment["status"] = {"replicas": 2, "readyReplicas": 2}
    key = f"{live.api.cluster}/default/Deployment.apps/cloudflared"
    live.api.world.put(key, deployment)
    assert live("connector status", spec)["ready"] == 2


# Files


def test_files_are_present_absent_or_unreadable(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RehearsalMachine, "missing_file", Machine.missing_file)
    host.machine.make_directory("/run/agenix", 0o755)
    host.machine.write_atomic("/run/agenix/there", b"value\n", 0o400)
    request = {"as": "value", "namespace": "factory", "name": "s", "type": "Opaque", "keys": ["k"]}
    paths = ["/run/agenix/there", "/run/agenix/missing", "/run/agenix"]
    result = host("files read", {"files": [request | {"path": path} for path in paths]})
    states = [result["files"][path]["state"] for path in paths]
    assert states == ["present", "absent", "unreadable"]
    assert base64.b64decode(result["files"][paths[0]]["content"]) == b"value\n"
    assert result["made_up"] == []


def test_token_file_restarts_its_connector_once(host: Host) -> None:
    container = {"name": "cloudflared-p510", "id": "c1", "image": "x", "mustRun": True}
    host.machine.docker_world.put("container/cloudflared-p510", container)
    write = {
        "path": "/var/lib/homelab/tunnels/p510.token",
        "content": "token-1",
        "restart_container": "cloudflared-p510",
    }
    first = host("files write", write)
    assert (first["changed"], first["restarted"]) == (True, True)
    again = host("files write", write)
    assert (again["changed"], again["restarted"]) == (False, False)
    changed = host("files write", write | {"content": "token-2"})
    assert (changed["changed"], changed["restarted"]) == (True, True)
    seen = host.machine.stat(write["path"])
    assert seen
    assert seen.mode == 0o600
    other_mode = host("files write", write | {"content": "token-2", "mode": "0640"})
    assert (other_mode["changed"], other_mode["restarted"]) == (False, False)


def test_token_written_and_killed_before_the_restart_is_restarted_next_time(host: Host) -> None:
    container = {"name": "cloudflared-p510", "id": "c1", "image": "x", "mustRun": True}
    host.machine.docker_world.put("container/cloudflared-p510", container)
    write = {
        "path": "/var/lib/homelab/tunnels/p510.token",
        "content": "token-1",
        "restart_container": "cloudflared-p510",
    }
    true_run = host._run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if argv[1] == "restart":
            raise Killed
        return true_run(argv, **options)

    host._run = run
    with pytest.raises(Killed):
        host("files write", write)
    host._run = true_run
    result = host("files write", write)
    assert (result["changed"], result["restarted"]) == (False, True)


def test_container_that_is_absent_is_not_restarted(host: Host) -> None:
    write = {"path": "/var/lib/homelab/t", "content": "x", "restart_container": "none"}
    assert host("files write", write)["restarted"] is False


# Specs


def test_all_errors_of_a_spec_come_at_once(host: Host) -> None:
    wrong = SPEC | {"name": "A_B", "api": {"bind": "::1", "port": 0}, "colour": "red"}
    error = host(
        "k3d ensure", {**wrong, "ports": [{"host_port": 70000, "container_port": "x"}]}, code=2
    )
    for part in ("name:", "api.bind:", "api.port:", "colour", "ports[0].host_port", "70000"):
        assert part in error["cause"]
    assert host.calls == []


def test_secret_values_are_never_in_errors(host: Host) -> None:
    seed = {"kubeconfig": "/k", "namespace": "n", "name": "s", "data": {"k": "canary not base64"}}
    error = host("secret seed", seed, code=2)
    assert "canary" not in json.dumps(error)
    error = host("files write", {"path": "/a/b", "content": ["canary"]}, code=2)
    assert "canary" not in json.dumps(error)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "--config=x"},
        {"name": "../x"},
        {"name": "a" * 33},
        {"image": "-v:1"},
        {"storage_dir": "relative"},
        {"storage_dir": "/a:/b"},
        {"storage_dir": "/a/../b"},
        {"storage_dir": "/a\n"},
        {"storage_dir": "/$HOME/b"},
        {"k3s_args": ["--data-dir=/x"]},
        {"k3s_args": ["--cluster-init"]},
        {"k3s_args": ["server"]},
        {"k3s_args": ["--x=$(id)"]},
        {"network": {"name": "host", "subnet": "172.30.0.0/16"}},
        {"network": {"name": "--x", "subnet": "172.30.0.0/16"}},
        {"network": {"name": "n", "subnet": "172.30.0.1/16"}},
        {"resolvers": []},
        {"ports": [{"host_port": 6443, "container_port": 80}]},
        {"ports": [{"host_port": 80, "container_port": port} for port in (80, 81)]},
        {"servers": True},
    ],
)
def test_hostile_cluster_values_are_refused(host: Host, change: dict[str, Any]) -> None:
    host("k3d ensure", SPEC | change, code=2)
    assert host.calls == []


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "change",
    [
        {"image": f"rancher/k3s@{DIGEST}"},
        {"image": f"REGISTRY.lan:5000/rancher/k3s:v1.31.5-k3s1@{DIGEST}"},
        {"api": {"bind": "127.0.0.1", "port": 6443, "server_name": "fd00::1"}},
        {"storage_dir": "/mnt/a@b,c"},
        {"secrets_encryption": True},
        {"k3s_args": ["--token-file=/var/lib/rancher/k3s/t"]},
        {
            "ports": [
                {"host_port": 6443, "container_port": 80, "bind": "10.0.0.5"},
                {"host_port": 80, "container_port": 80},
                {"host_port": 80, "container_port": 80, "bind": "10.0.0.5"},
            ]
        },
    ],
)
def test_what_docker_and_k3s_take_is_made_as_declared(host: Host, change: dict[str, Any]) -> None:
    host.up(**change)
    assert host.inspect(**change)["differences"] == []


def test_an_image_declared_by_the_digest_that_runs_is_the_same(live: Host) -> None:
    image = {
        "name": SPEC["image"],
        "imageId": live.inspect()["live"]["image_id"],
        "repoDigest": f"rancher/k3s@{DIGEST}",
    }
    live.machine.docker_world.put("image/k3s", image)
    assert live.inspect(image=f"rancher/k3s@{DIGEST}")["differences"] == []
    other = live.inspect(image=f"rancher/k3s@{DIGEST[:-1]}1")["differences"]
    assert [difference["key"] for difference in other] == ["image"]


@pytest.mark.parametrize(
    "name",
    [
        "--token",
        "--agent-token",
        "--etcd-s3-access-key",
        "--etcd-s3-secret-key",
        "--etcd-s3-session-token",
        "--some-password",
        "--datastore-endpoint",
        "--vpn-auth",
    ],
)
@pytest.mark.parametrize("parting", ["=", " "])
def test_arguments_that_carry_a_secret_are_refused_and_never_shown(
    live: Host, name: str, parting: str
) -> None:
    error = live("k3d ensure", SPEC | {"k3s_args": [f"{name}{parting}canary"]}, code=2)
    assert "k3s_args[0]" in error["cause"]
    assert "canary" not in json.dumps(error)
    # A cluster that someone else made may have one.
    live.edit_node(cmd=[*live.cluster["nodes"][0]["cmd"], name, "canary"])
    seen = live.inspect()
    assert [difference["key"] for difference in seen["differences"]] == ["k3sArgs"]
    assert "canary" not in json.dumps(seen)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    verb=st.sampled_from([" ".join(words) for words in cli.VERBS]),
    replaced=st.dictionaries(st.sampled_from([*sorted(SPEC), "path", "data", "files"]), _JSON),
    cut=st.integers(0, 12),
)
@settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
def test_no_spec_makes_a_traceback(
    host: Host, verb: str, replaced: dict[str, Any], cut: int
) -> None:
    words = tuple(verb.split())
    example = dict(cli.VERBS[words].example)
    spec = {key: example[key] for key in list(example)[:cut]} | replaced
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(list(words), io.StringIO(json.dumps(spec)), host.machine)
    answer = json.loads(out.getvalue())
    assert answer["ok"] == (code == 0)
    if code:
        assert "defect of hostctl" not in answer["error"]["remedy"], answer
        assert answer["error"]["remedy"]


@given(text=st.text(max_size=60))
def test_text_that_is_no_json_is_a_bad_spec(text: str) -> None:
    try:
        json.loads(text)
    except ValueError:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert cli.main(["k3d", "inspect"], io.StringIO(text), Machine()) == 2
        assert json.loads(out.getvalue())["error"]["code"] == "bad-spec"


# The file itself


@functools.cache
def _shipped() -> Path:
    path = Path(tempfile.mkdtemp(prefix="hostctl-")) / "hostctl"
    atexit.register(shutil.rmtree, path.parent)
    path.write_text(program.text())
    return path


def _execute(
    *arguments: str,
    stdin: str = "",
    path: str | None = None,
    argv: Sequence[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": path} if path else dict(os.environ)
    return subprocess.run(
        [sys.executable, *(argv or [str(_shipped())]), *arguments],
        input=stdin,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_shipped_program_is_one_file_of_python_3_9_and_its_library() -> None:
    text = program.text()
    assert text.startswith("#!/bin/sh\n")
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported <= sys.stdlib_module_names
    defined = [
        name
        for node in tree.body
        for name in (
            [node.name]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            else [target.id for target in node.targets if isinstance(target, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
    ]
    assert sorted(defined) == sorted(set(defined))
    modules = {path.stem for path in (ROOT / "hostctl").glob("[a-z]*.py")}
    assert modules - {"program"} == set(program.MODULES)


@pytest.mark.parametrize("verb", [(), *cli.VERBS], ids=" ".join)
def test_help_of_every_verb(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: hostctl {' '.join(verb)}".strip() in text
    if verb:
        assert "example:" in text


def test_run_as_a_program_with_a_docker_that_fails(tmp_path: Path) -> None:
    fake = tmp_path / "docker"
    fake.write_text(
        "#!/bin/sh\necho 'Cannot connect to the Docker daemon at unix://' >&2\nexit 1\n"
    )
    fake.chmod(0o755)
    ran = _execute("k3d", "inspect", stdin=json.dumps(SPEC), path=f"{tmp_path}:/bin")
    assert ran.returncode == 4
    assert json.loads(ran.stdout)["error"]["code"] == "cannot-tell"
    assert "Traceback" not in ran.stderr
    ran = _execute("k3d", "inspect", "--exit-zero", stdin=json.dumps(SPEC), path=f"{tmp_path}:/bin")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["ok"] is False


def test_run_as_a_program_without_docker(tmp_path: Path) -> None:
    ran = _execute("k3d", "inspect", stdin=json.dumps(SPEC), path=str(tmp_path))
    assert ran.returncode == 6
    assert json.loads(ran.stdout)["error"]["code"] == "tool"


def test_shipped_text_runs_without_being_a_file(tmp_path: Path) -> None:
    boot = (
        'import io,json,sys;r=json.load(sys.stdin);g={"__name__":"hostctl"};'
        'exec(compile(r["program"],"hostctl","exec"),g);'
        'sys.exit(g["main"](sys.argv[1:],io.StringIO(json.dumps(r["spec"]))))'
    )
    file = tmp_path / "value"
    file.write_text("v")
    request = {"path": str(file), "as": "value", "namespace": "n", "name": "s"}
    payload = {"program": program.text(), "spec": {"files": [request]}}
    ran = _execute("files", "read", "--exit-zero", stdin=json.dumps(payload), argv=["-c", boot])
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["files"][str(file)]["state"] == "present"
    ran = _execute("--help", stdin=json.dumps(payload), argv=["-c", boot])
    assert "broken night" in ran.stdout


@pytest.mark.parametrize("arguments", [["fly"], ["k3d"], ["k3d", "inspect", "--no-such"], []])
def test_usage_errors_are_results_too(arguments: list[str]) -> None:
    ran = _execute(*arguments)
    assert ran.returncode == 2
    assert json.loads(ran.stdout)["error"]["code"] == "bad-spec"


# The real machine


def test_real_machine_bounds_and_ends_processes(tmp_path: Path) -> None:
    machine = Machine()
    ran = machine.run(["/bin/sh", "-c", "yes | head -c 1000000; echo no >&2; exit 3"], limit=1000)
    assert (ran.code, len(ran.out), ran.complaint) == (3, 1000, "no")
    assert machine.run(["/bin/cat"], input=b"x" * 10**6).out == b"x" * 10**6
    with pytest.raises(TookTooLong):
        machine.run(["/bin/sh", "-c", "sleep 60"], timeout=0.2)
    with pytest.raises(ToolMissing):
        machine.run(["no-such-program"])
    machine.run(["/bin/echo", "out"], to_file=str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "out\n"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_real_machine_writes_atomically_with_final_mode(tmp_path: Path) -> None:
    machine = Machine()
    path = str(tmp_path / "deep" / "er" / "file")
    machine.make_directory(os.path.dirname(path), 0o750)
    machine.write_atomic(path, b"one", 0o640)
    seen = machine.stat(path)
    assert seen
    assert seen.mode == 0o640
    directory = machine.stat(os.path.dirname(path))
    assert directory
    assert directory.mode == 0o750
    with pytest.raises(LookupError, match="no-such-group"):
        machine.write_atomic(path, b"two", 0o600, None, "no-such-group")
    assert machine.read(path) == b"one"
    assert os.listdir(os.path.dirname(path)) == ["file"]
    assert machine.missing_account("root", "no-such-group") == "group no-such-group"
    with pytest.raises(OSError, match="larger"):
        machine.read(path, limit=2)
    with pytest.raises(OSError, match="Is a directory"):
        machine.read(os.path.dirname(path))


def test_what_a_killed_write_leaves_is_taken_over_and_a_living_one_is_waited_for(
    tmp_path: Path,
) -> None:
    """A hostctl that is killed ends no `finally`: what it had written aside, a token perhaps, would
    stay for ever."""
    machine, path = Machine(), str(tmp_path / "token")
    name = tmp_path / "names"

    def killed_at(call: str, then: Callable[[], object]) -> None:
        child = os.fork()
        if not child:
            setattr(os, call, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            then()
        assert os.waitpid(child, 0)[1] == signal.SIGKILL

    for call in ("fsync", "replace"):
        killed_at(call, lambda: machine.write_atomic(path, b"longer than the next", 0o644))
        assert os.listdir(tmp_path) == [".token.hostctl"]
    machine.write_atomic(path, b"next", 0o600)
    assert os.listdir(tmp_path) == ["token"]
    killed_at("replace", lambda: machine.write_atomic(path, b"another", 0o600))
    assert len(os.listdir(tmp_path)) == 2
    machine.remove(path)
    assert os.listdir(tmp_path) == []

    killed_at("rename", lambda: machine.make_directory(str(name), 0o750))
    machine.make_directory(str(name), 0o750)
    assert os.listdir(tmp_path) == ["names"]

    contents = [bytes([65 + one]) * 70_000 for one in range(8)]
    writers = [
        threading.Thread(target=machine.write_atomic, args=(path, content, 0o600))
        for content in contents
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            assert machine.read(path) in contents
    assert machine.read(path) in contents
    assert sorted(os.listdir(tmp_path)) == ["names", "token"]


def test_real_machine_changes_no_access_through_a_link(tmp_path: Path) -> None:
    machine = Machine()
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("x")
    file.chmod(0o644)
    link.symlink_to(file)
    with pytest.raises(OSError, match="symbolic links"):
        machine.set_access(str(link), 0o600, None, None)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    for path, mode in ((file, 0o600), (tmp_path, 0o710)):
        machine.set_access(str(path), mode, None, None)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_real_machine_makes_a_directory_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine()
    with pytest.raises(LookupError, match="no-such-group"):
        machine.make_directory(str(tmp_path / "new"), 0o750, None, "no-such-group")
    assert list(tmp_path.iterdir()) == []
    # Another hostctl may make it at the same time.
    (tmp_path / "new" / "file").parent.mkdir()
    (tmp_path / "new" / "file").touch()
    seen = iter([False, True])
    monkeypatch.setattr(os.path, "isdir", lambda path: next(seen, True))
    machine.make_directory(str(tmp_path / "new"), 0o750)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("told", [signal.SIGTERM, signal.SIGINT])
def test_real_machine_ends_a_copy_when_it_is_told_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: signal.Signals
) -> None:
    program = (
        "import io,signal,sys; sys.path.insert(0, sys.argv[1])\n"
        # A shell's background job ignores it, and so would this.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from hostctl import cli, machine as h\n"
        "h.STATE_DIRECTORY = sys.argv[2]\n"
        "h.PROGRESS_SECONDS = 0.1\n"
        "def copy(machine, spec):\n"
        "    with machine.lock('x'):\n"
        "        argv = ['/bin/sh', '-c', 'sleep 60; true']\n"
        "        machine.run(argv, tick=lambda _: h.say('works'), timeout=99, ends_with_us=True)\n"
        "cli.VERBS['k3d', 'stop'] = cli.Verb(copy, {})\n"
        "sys.exit(cli.main(['k3d', 'stop'], io.StringIO('{}')))\n"
    )
    argv = [sys.executable, "-c", program, str(ROOT), str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stderr
        assert b"works" in running.stderr.readline()
        running.send_signal(told)
        out, _ = running.communicate(timeout=20)
    assert running.returncode == 5
    assert json.loads(out)["error"]["cause"] == "interrupted"
    monkeypatch.setattr(machine_module, "STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(machine_module, "LOCK_SECONDS", 0)
    with Machine().lock("x"):
        pass


def test_real_machine_lock_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(machine_module, "LOCK_SECONDS", 2)
    with Machine().lock("x"):
        waiting = Machine()
        monkeypatch.setattr(waiting, "sleep", lambda seconds: None)
        with pytest.raises(Failure) as refused, waiting.lock("x"):
            pass
        assert refused.value.code == "timed-out"
    with Machine().lock("x"):
        pass


def test_real_machine_lock_outlives_a_killed_hostctl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A k3d that goes on after hostctl was killed keeps the next hostctl waiting."""
    program = (
        "import os,sys; sys.path.insert(0, sys.argv[1])\n"
        "from hostctl import cli, machine as h\n"
        "h.STATE_DIRECTORY = sys.argv[2]\n"
        "m = h.Machine()\n"
        "with m.lock('x'):\n"
        "    m.run(['/bin/sh', '-c', 'kill -9 $PPID; sleep 3'])\n"
    )
    root = str(ROOT)
    subprocess.run([sys.executable, "-c", program, root, str(tmp_path)], check=False)
    monkeypatch.setattr(machine_module, "STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(machine_module, "LOCK_SECONDS", 0)
    with pytest.raises(Failure), Machine().lock("x"):
        pass


def test_real_machine_sees_addresses_and_ports() -> None:
    machine = Machine()
    assert machine.has_address("127.0.0.1")
    assert not machine.has_address("192.0.2.77")
    with contextlib.closing(machine_module._socket("127.0.0.1")) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        assert not machine.port_is_free("127.0.0.1", port)
    assert machine.port_is_free("127.0.0.1", port)
    read = machine.bytes_read([os.getpid()])
    assert read is not None
    assert read > 0
    assert machine.bytes_read([]) is None
