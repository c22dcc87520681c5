"""The incidents of the shell unit that this project replaces, really caused on a real Docker.

A test bears the number of its incident. After each one the cluster has the identity that it had,
and an object in it and a file in its storage directory are still there. `make mutants` shows that
each fails when hostctl lacks the safeguard it is about.

Time is scaled: a server counts as stalled after 8 s instead of 3 min, and reports come each second.
"""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.engine import Engine
from tests.cluster.host import Host

pytestmark = pytest.mark.cluster

NODE = "k3d-factory-server-0"
LATE = "203.0.113.7"
KUBECONFIG = {
    "cluster": "factory",
    "path": "/etc/k3d/kubeconfig",
    "owner": "root",
    "group": "root",
    "mode": "0640",
    "directory_mode": "0750",
    "server": "https://127.0.0.1:6443",
    "generation": 1,
}


class Factory:
    """A running cluster with something in it that can be lost."""

    def __init__(self, host: Host, spec: dict[str, Any]) -> None:
        self.host, self.spec = host, spec
        host.scale(STALL_SECONDS=8, PROGRESS_SECONDS=1)
        self.identity = self.ensure()["identity"]
        self.node = self.container()
        host.kubectl("create", "configmap", "marker", "--from-literal=kept=yes")
        self.file = f"{spec['storage_dir']}/marker"
        host.engine.run(["sh", "-c", f"echo kept > {self.file}"])

    def ensure(self, **changes: Any) -> dict[str, Any]:
        """The cluster that `k3d ensure` made or found."""
        return self.host.done("k3d", "ensure", spec={**self.spec, **changes})["cluster"]

    def refused(self, verb: str, **changes: Any) -> dict[str, Any]:
        """The error of a verb that must fail."""
        result = self.host("k3d", verb, spec={**self.spec, **changes})
        assert not result["ok"], result
        return result["error"]

    def container(self) -> str:
        return self.host.engine.docker("inspect", "--format", "{{.Id}}", NODE)

    def started(self) -> str:
        return self.host.engine.docker("inspect", "--format", "{{.State.StartedAt}}", NODE)

    def restart(self, **opening: Any) -> None:
        """Stops the node and starts it again; its datastore then opens as told."""
        engine = self.host.engine
        engine.docker("stop", "-t", "60", NODE)
        file = engine.root / "opening.json"
        file.write_text(json.dumps(opening))
        engine.docker("cp", str(file), f"{NODE}:/etc/rancher/k3s/opening.json")
        engine.docker("start", NODE)

    def assert_kept(self, node: str | None = None) -> None:
        """Heals the cluster and finds it the same, with all that was in it."""
        assert self.ensure()["identity"] == self.identity
        assert self.container() == (node or self.node)
        assert self.host.kubectl("get", "configmap", "marker", "-o=jsonpath={.data.kept}") == "yes"
        assert self.host.engine.run(["cat", self.file]).stdout == "kept\n"


@pytest.fixture
def factory(host: Host, spec: dict[str, Any], network: str) -> Factory:
    return Factory(host, spec)


@contextlib.contextmanager
def squatting(engine: Engine) -> Iterator[None]:
    """Something else listens on the API's port."""
    script = "import socket,time;s=socket.create_server(('127.0.0.1',6443));time.sleep(600)"
    squatter = engine.popen(["python3", "-c", script])
    try:
        yield
    finally:
        squatter.kill()
        squatter.wait()


# 1: a reboot


def test_incident_01_the_api_is_published_although_its_address_comes_up_after_docker(
    host: Host, spec: dict[str, Any], network: str
):
    """And nothing stands before the only server that could have missed the address."""
    engine = host.engine
    engine.add_address(LATE)
    api = {"bind": LATE, "port": 6443, "server_name": None}
    factory = Factory(host, {**spec, "api": api})
    assert engine.docker("ps", "-a", "--format", "{{.Names}}") == NODE
    engine.stop()
    engine.remove_address(LATE)
    engine.start()

    with host.begin("k3d", "ensure", spec=factory.spec) as ensuring:
        ensuring.says(f"waiting for an interface with {LATE}")
        engine.add_address(LATE)
        assert ensuring.result()["cluster"]["identity"] == factory.identity
    file = {**KUBECONFIG, "server": f"https://{LATE}:6443"}
    host.done("kubeconfig", spec=file)
    through = ["kubectl", "--kubeconfig=/etc/k3d/kubeconfig", "get", "--raw=/readyz"]
    assert engine.run(through).stdout == "ok"
    factory.assert_kept()


def test_incident_01_a_node_whose_port_is_taken_is_named_and_healed(
    host: Host, spec: dict[str, Any], network: str
):
    """Something else listens on the API's port when the node starts."""
    factory = Factory(host, spec)
    engine = host.engine
    engine.docker("stop", NODE)
    with squatting(engine):
        error = factory.refused("ensure")
        assert error["step"] == f"starting {NODE}"
        assert "6443" in error["cause"]
    factory.assert_kept()


# 2: a recovery that deleted


def test_incident_02_recovery_restarts_a_bounded_number_of_times_and_deletes_nothing(
    factory: Factory,
):
    factory.restart(stalls=9)
    error = factory.refused("ensure", api_wait_seconds=300)
    assert error["code"] == "failed"
    assert "stalled again after 2 restarts" in error["cause"]
    assert factory.container() == factory.node
    assert factory.host("k3d", "inspect", spec=factory.spec)["cluster"]["state"] == "running"
    factory.restart()
    factory.assert_kept()


@pytest.mark.parametrize("victim", ["hostctl", "k3d", "dockerd"])
@pytest.mark.parametrize("step", ["volume create", "container create", "container start"])
def test_incident_02_a_create_that_is_killed_is_continued_and_never_rolled_back(
    host: Host, spec: dict[str, Any], network: str, victim: str, step: str
):
    engine = host.engine
    host.scale(STALL_SECONDS=8, PROGRESS_SECONDS=1)
    with engine.events() as events, host.begin("k3d", "ensure", spec=spec) as ensuring:
        seen = events.until(step)
        if victim == "hostctl":
            ensuring.kill()
        elif victim == "k3d":
            engine.run(["pkill", "-KILL", "-x", "k3d"])
        else:
            engine.kill()
    engine.start()
    cluster = host.done("k3d", "ensure", spec=spec)["cluster"]
    assert cluster["nodes"] == [NODE]
    assert engine.clusters() == ["factory"]
    if step.startswith("container"):
        assert engine.docker("inspect", "--format", "{{.Id}}", NODE) == seen
    assert host.done("k3d", "ensure", spec=spec)["cluster"] == cluster


def test_incident_02_a_create_that_fails_is_kept_and_continued(
    host: Host, spec: dict[str, Any], network: str
):
    """Something takes the API's port while k3d is at work; k3d by itself would take all back."""
    engine = host.engine
    host.scale(STALL_SECONDS=8, PROGRESS_SECONDS=1)
    with engine.events() as events, host.begin("k3d", "ensure", spec=spec) as ensuring:
        events.until("volume create")
        with squatting(engine):
            made = events.until("container create")
            error = ensuring.result()["error"]
    assert error["step"] == "creating cluster factory"
    assert host.done("k3d", "ensure", spec=spec)["cluster"]["nodes"] == [NODE]
    assert engine.docker("inspect", "--format", "{{.Id}}", NODE) == made


def test_incident_02_two_ensures_at_once_make_one_cluster(
    host: Host, spec: dict[str, Any], network: str
):
    with (
        host.begin("k3d", "ensure", spec=spec) as first,
        host.begin("k3d", "ensure", spec=spec) as second,
    ):
        one, other = first.result(), second.result()
    assert one["ok"], one
    assert other["ok"], other
    assert one["cluster"] == other["cluster"]


# 3: a question that failed


def test_incident_03_a_cluster_whose_node_lost_its_network_is_not_absent(factory: Factory):
    engine = factory.host.engine
    network = factory.spec["network"]["name"]
    engine.docker("network", "disconnect", "--force", network, NODE)
    for verb in ("inspect", "ensure"):
        error = factory.refused(verb)
        assert error["code"] == "cannot-tell"
        assert f"node {NODE} has lost its endpoint on network {network}" in error["cause"]
    assert factory.container() == factory.node
    engine.docker("network", "connect", network, NODE)
    engine.docker("restart", NODE)
    factory.assert_kept()


def test_incident_03_a_docker_that_does_not_answer_is_not_an_absent_cluster(factory: Factory):
    factory.host.engine.stop()
    for verb in ("inspect", "ensure"):
        error = factory.refused(verb)
        assert error["code"] == "cannot-tell"
        assert "Cannot connect to the Docker daemon" in error["cause"]
    factory.host.engine.start()
    factory.assert_kept()


def test_incident_03_half_a_cluster_is_named_and_left_alone(
    host: Host, spec: dict[str, Any], network: str
):
    host.engine.docker("volume", "create", "--label", "k3d.cluster=factory", "k3d-factory-images")
    error = host("k3d", "ensure", spec=spec)["error"]
    assert error["code"] == "cannot-tell"
    assert "left is volume k3d-factory-images" in error["cause"]
    assert host.engine.docker("ps", "-aq") == ""
    assert host.engine.docker("volume", "ls", "-q") == "k3d-factory-images"


def test_incident_03_a_cluster_of_someone_else_with_this_name_is_left_alone(
    host: Host, spec: dict[str, Any], network: str
):
    made = host.engine.docker("create", "--name", NODE, spec["image"])
    error = host("k3d", "ensure", spec=spec)["error"]
    assert error["code"] == "refused"
    assert "foreign" in error["cause"]
    assert host.engine.docker("ps", "-aq", "--no-trunc") == made


# 4: a datastore that took long to open


def test_incident_04_a_server_that_reads_its_datastore_is_left_in_peace(factory: Factory):
    """It reads for five times as long as a stalled one is given."""
    factory.restart(mib=200, mibPerSecond=5)
    started = factory.started()
    factory.ensure()
    assert "MiB read" in factory.host.said
    assert factory.started() == started
    factory.assert_kept()


def test_incident_04_a_server_that_stalls_is_restarted(factory: Factory):
    factory.restart(stalls=1)
    started = factory.started()
    factory.ensure(api_wait_seconds=300)
    assert "restart 1" in factory.host.said
    assert factory.started() != started
    factory.assert_kept()


# 5, 6, 9, 10: what is fixed when a cluster is created


@pytest.mark.parametrize(
    ("key", "declared", "setting"),
    [
        pytest.param("resolvers", ["192.0.2.53"], "resolvers", id="incident-05-resolvers"),
        pytest.param("storage_dir", "/mnt/new/storage", "storageDir", id="incident-06-storage"),
    ],
)
def test_incident_06_an_edit_of_what_is_fixed_is_shown_and_refused(
    factory: Factory, key: str, declared: Any, setting: str
):
    seen = factory.host.done("k3d", "inspect", spec={**factory.spec, key: declared})["cluster"]
    (difference,) = seen["differences"]
    assert (difference["key"], difference["fixed"]) == (setting, True)
    assert difference["live"] == factory.spec[key]
    error = factory.refused("ensure", **{key: declared})
    assert error["code"] == "refused"
    assert "set cluster.recreate to factory" in error["remedy"]
    factory.assert_kept()


def test_incident_05_resolvers_inside_a_docker_network_are_refused(
    host: Host, spec: dict[str, Any], network: str
):
    for resolver in ("172.30.0.1", "172.17.0.1"):
        error = host("k3d", "ensure", spec={**spec, "resolvers": [resolver]})["error"]
        assert error["code"] in ("refused", "bad-spec")
        assert resolver in error["cause"]
    assert host.engine.clusters() == []


def test_incident_09_an_image_without_a_pin_is_refused(host: Host, spec: dict[str, Any]):
    for image in ("rancher/k3s", "rancher/k3s:latest"):
        error = host("k3d", "ensure", spec={**spec, "image": image})["error"]
        assert error["code"] == "bad-spec"
    assert host.engine.docker("ps", "-aq") == ""


def test_incident_10_a_recreate_needs_the_name_and_makes_a_backup_that_restores(
    factory: Factory, tmp_path: Path
):
    """The volumes are kept; the datastore's backup, put back, is the cluster that was."""
    engine, changed = factory.host.engine, {"resolvers": ["192.0.2.53"]}
    assert factory.refused("ensure", **changed)["code"] == "refused"
    assert factory.container() == factory.node
    anew = factory.ensure(**changed, recreate="factory")
    assert anew["identity"] != factory.identity
    assert engine.run(["cat", factory.file]).stdout == "kept\n"

    (backup,) = engine.run(
        ["sh", "-c", f"ls -d {factory.spec['storage_dir']}-backups/*"]
    ).stdout.split()
    engine.run(["sh", "-c", 'cd "$1" && sha256sum --check --strict SHA256SUMS', "sh", backup])
    engine.docker("stop", NODE)
    server = f"{factory.spec['datastore_dir']}/server-0"
    engine.run(["sh", "-c", 'rm -rf "$1"/*', "sh", server])
    restore = ["tar", "-xpf", f"{backup}/datastore.tar", "-C", server, "--strip-components=1"]
    engine.run(restore)
    engine.docker("start", NODE)
    restored = factory.ensure(**changed)
    assert restored["identity"] == factory.identity
    assert factory.host.kubectl("get", "configmap", "marker", "-o=jsonpath={.data.kept}") == "yes"


@pytest.fixture
def small_disk(host: Host, spec: dict[str, Any]) -> Iterator[str]:
    """The storage directory on a disk of 64 MiB."""
    disk = "/mnt/small"
    host.engine.run(["mkdir", "-p", disk])
    host.engine.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk])
    spec["storage_dir"] = f"{disk}/storage"
    yield disk
    host.engine.docker("rm", "-fv", NODE, check=False)
    host.engine.run(["umount", disk])


def test_incident_11_a_full_disk_refuses_a_recreate_and_harms_nothing(
    small_disk: str, factory: Factory
):
    fill = f"dd if=/dev/zero of={small_disk}/full bs=1M || true"
    factory.host.engine.run(["sh", "-c", fill])
    error = factory.refused("ensure", resolvers=["192.0.2.53"], recreate="factory")
    assert error["code"] == "refused"
    assert "has room for" in error["cause"]
    factory.assert_kept()


def test_incident_11_cleaning_takes_what_nothing_references_and_nothing_else(factory: Factory):
    host, engine = factory.host, factory.host.engine
    clean = {"name": "factory"}
    # Of another cluster that sleeps: its node with a volume, of an image that lost its tag.
    engine.build("worn", 'FROM node\nLABEL age="old"\nVOLUME /data')
    engine.docker(
        "create", "--name", "other", "--label", "k3d.cluster=other", "worn", "sleep", "300"
    )
    engine.build("worn", 'FROM node\nLABEL age="new"')
    engine.build("worn", 'FROM node\nLABEL age="newer"')
    named = engine.docker("volume", "create", "by-a-person")
    orphan = engine.docker("volume", "create")
    used = "docker.io/library/used:1"
    for image in (used, "docker.io/library/unused:1"):
        engine.build(image, "FROM node")
        host.pipe(
            ["docker", "save", image], ["docker", "exec", "-i", NODE, "ctr", "image", "import", "-"]
        )
    host.kubectl("run", "user", f"--image={used}", "--restart=Never")

    would = host.done("clean", spec={**clean, "dry_run": True})
    assert engine.docker("volume", "ls", "--quiet", "--filter", f"name={orphan}") == orphan
    did = host.done("clean", spec=clean)
    for found in (would, did):
        assert [one["name"] for one in found["volumes"]] == [orphan]
        assert [one["name"] for one in found["nodes"][NODE]] == ["docker.io/library/unused:1"]
        assert len(found["images"]) == 1
    volumes = engine.docker("volume", "ls", "--quiet").split()
    assert named in volumes
    assert orphan not in volumes
    assert engine.docker("start", "other") == "other"

    # A node that is stopped is left alone, with its volumes.
    engine.docker("stop", NODE)
    asleep = host.done("clean", spec=clean)
    assert (asleep["skipped"], asleep["volumes"]) == ([NODE], [])
    factory.assert_kept()


# 8, 14, 17: what lives in the cluster


def test_incident_08_a_secret_that_the_cluster_rotated_is_not_written_again(factory: Factory):
    host = factory.host
    host.done("kubeconfig", spec=KUBECONFIG)
    seed = {
        "kubeconfig": KUBECONFIG["path"],
        "namespace": "default",
        "name": "creds",
        "data": {"key": base64.b64encode(b"seed").decode()},
    }
    assert host.done("secret", "seed", spec=seed)["created"] is True
    rotated = base64.b64encode(b"rotated").decode()
    patch = json.dumps({"data": {"key": rotated}})
    host.kubectl("patch", "secret", "creds", "--patch", patch)
    for data in (seed["data"], {"key": base64.b64encode(b"another seed").decode()}):
        assert host.done("secret", "seed", spec={**seed, "data": data})["created"] is False
    assert host.kubectl("get", "secret", "creds", "-o=jsonpath={.data.key}") == rotated
    factory.assert_kept()


def test_incident_14_the_kubeconfig_names_a_server_that_clients_reach(
    host: Host, spec: dict[str, Any], network: str
):
    """The API is published on every address, and k3d writes 0.0.0.0 for that."""
    api = {"bind": "0.0.0.0", "port": 6443, "server_name": "192.0.2.10"}
    factory = Factory(host, {**spec, "api": api})
    host.done("kubeconfig", spec={**KUBECONFIG, "server": "https://192.0.2.10:6443"})
    content = host.engine.run(["cat", "/etc/k3d/kubeconfig"]).stdout
    assert "server: https://192.0.2.10:6443" in content
    assert "0.0.0.0" not in content
    through = ["kubectl", "--kubeconfig=/etc/k3d/kubeconfig", "get", "configmap", "marker"]
    assert "marker" in host.engine.run(through).stdout
    mode = host.engine.run(["stat", "--format=%a %U", "/etc/k3d/kubeconfig"]).stdout
    assert mode == "640 root\n"
    factory.assert_kept()


def test_incident_17_a_secret_that_cannot_be_applied_fails_the_run_and_names_the_remedy(
    factory: Factory,
):
    factory.host.done("kubeconfig", spec=KUBECONFIG)
    seed = {
        "kubeconfig": KUBECONFIG["path"],
        "namespace": "nowhere",
        "name": "creds",
        "data": {"key": base64.b64encode(b"hunter2hunter2").decode()},
    }
    result = factory.host("secret", "seed", spec=seed)
    assert result["error"]["code"] == "failed"
    assert result["error"]["step"] == "seeding Secret nowhere/creds"
    assert "declare namespace nowhere" in result["error"]["remedy"]
    assert "hunter2" not in json.dumps(result) + factory.host.said
    factory.assert_kept()
