"""Incident 16 on two real Docker engines: a cluster moves from one host to the other, is cut off by
kill -9 at every step and goes on, and goes back."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from components.move import MoveError, back, bring
from components.settings import K3dCluster
from setup import cluster as rig
from tests.cluster.engine import NODE_IMAGE, Engine, engine
from tests.cluster.host import Host

pytestmark = pytest.mark.cluster

CONNECTOR = {"namespace": "default", "deployment": "cloudflared-factory"}
BIND, STORAGE = "192.0.2.62", "/mnt/p620/k3d/storage"
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": CONNECTOR["deployment"]},
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "cloudflared"}},
        "template": {
            "metadata": {"labels": {"app": "cloudflared"}},
            "spec": {"containers": [{"name": "cloudflared", "image": "cloudflared:1"}]},
        },
    },
}


class Place:
    """A host as the operator's machine reaches it."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self.engine, self.host = name, engine, Host(engine)

    def line(self, *argv: str) -> str:
        path = f"PATH={self.engine.environment['PATH']}"
        home = f"HOME={self.engine.environment['HOME']}"
        return shlex.join(["env", path, home, *self.engine.enter(), *argv])

    def installed(self, verb: Sequence[str]) -> str:
        return self.line(*self.host.argv(*verb))

    def record(self) -> dict[str, Any]:
        path = Path(f"/proc/{self.engine.init}/root/var/lib/homelab/clusters/factory.json")
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text()).get("move") or {}
        return {}


@pytest.fixture(scope="module")
def second_engine(session_engine: Engine) -> Iterator[Engine]:
    """The other host, with a Docker of its own."""
    with engine(rig.resolve()) as one:
        yield one


@pytest.fixture
def old(docker: Engine, spec, network) -> Place:
    """p510 with a cluster that serves."""
    place = Place("p510", docker)
    host = place.host
    host.done("k3d", "ensure", spec=spec)
    host.kubectl("create", "configmap", "marker", "--from-literal=a=b")
    host.kubectl("create", "-f", "-", input=json.dumps(DEPLOYMENT))
    docker.run(["tee", f"{spec['storage_dir']}/marker"], input="of a volume")
    docker.run(["chown", "4242:4343", f"{spec['storage_dir']}/marker"])
    return place


@pytest.fixture
def new(second_engine: Engine, spec) -> Iterator[Place]:
    """p620 with nothing but the Docker network that its stack makes."""
    second_engine.start()
    second_engine.clean()
    second_engine.run(["ip", "address", "replace", f"{BIND}/32", "dev", "lan0"])
    second_engine.docker(
        "network", "create", "--subnet", spec["network"]["subnet"], "--gateway", "172.30.0.1",
        spec["network"]["name"],
    )  # fmt: skip
    yield Place("p620", second_engine)
    second_engine.clean()


@pytest.fixture
def there(spec) -> dict[str, Any]:
    """The cluster as p620 declares it."""
    return {
        **spec,
        "api": {"bind": BIND, "port": 6443, "server_name": None},
        "storage_dir": STORAGE,
        "datastore_dir": f"{STORAGE}-server",
        "moved_from": "p510",
    }


SETTINGS = K3dCluster(kind="k3d", name="factory", image=NODE_IMAGE, storage_dir=STORAGE)


def move(old: Place, new: Place) -> str:
    return bring(old, new, SETTINGS, [CONNECTOR])


def replicas(place: Place) -> str:
    path = "--output=jsonpath={.spec.replicas}"
    return place.host.kubectl("get", "deployment", CONNECTOR["deployment"], path)


def identity_of(place: Place) -> str:
    return place.host.done("k3d", "identity", spec={"name": "factory"})["identity"]


def assert_serves(new: Place, there: dict[str, Any], identity: str) -> None:
    seen = new.host.done("k3d", "inspect", spec=there)["cluster"]
    assert (seen["state"], seen["identity"], seen["differences"]) == ("running", identity, [])
    assert new.host.kubectl("get", "configmap", "marker", "--output=jsonpath={.data.a}") == "b"
    marker = ["stat", "--format=%u:%g", f"{STORAGE}/marker"]
    assert new.engine.run(marker).stdout == "4242:4343\n"
    assert new.engine.run(["cat", f"{STORAGE}/marker"]).stdout == "of a volume"


def test_incident_16_a_cluster_moves_is_cut_over_and_goes_back(old, new, spec, there):
    identity = identity_of(old)
    assert move(old, new) == identity
    assert "frozen" in old.host("k3d", "ensure", spec=spec)["error"]["cause"]
    new.host.done("k3d", "ensure", spec=there)
    # Verified before it serves.
    assert replicas(new) == "0"
    verified = new.host.done("move", "verify", spec={"name": "factory"})
    assert (verified["identity"], verified["nodes"]) == (identity, ["k3d-factory-server-0"])
    new.host.done("move", "cutover", spec={"name": "factory"})
    assert replicas(new) == "2"
    assert_serves(new, there, identity)
    # It is one that Docker and k3d stop and start as any other.
    new.engine.restart()
    new.host.done("k3d", "ensure", spec=there)
    assert_serves(new, there, identity)

    new.engine.run(["tee", f"{STORAGE}/later"], input="written on p620")
    (volumes, _) = back(old, new, "factory")
    assert new.engine.run(["cat", f"{volumes}/later"]).stdout == "written on p620"
    assert new.engine.clusters() == []
    assert identity_of(old) == identity
    assert replicas(old) == "2"
    assert old.host.done("k3d", "inspect", spec=spec)["cluster"]["differences"] == []
    # And once more, to stay.
    move(old, new)
    new.host.done("k3d", "ensure", spec=there)
    new.host.done("move", "cutover", spec={"name": "factory"})
    old.host.done("move", "release", spec={"name": "factory", "confirm": "factory"})
    assert old.engine.clusters() == []
    assert_serves(new, there, identity)
    with pytest.raises(MoveError, match="released"):
        back(old, Place("nobody", old.engine), "factory")


def killed_at(place: Place, step: str, line: str) -> None:
    """Runs a command line and kills hostctl -9 as soon as the host records the step; what hostctl
    started has a session of its own and goes on."""
    process = subprocess.Popen(
        line,
        shell=True,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    until = time.monotonic() + 120
    while place.record().get("step") != step and process.poll() is None:
        assert time.monotonic() < until, step
        time.sleep(0.005)
    assert process.poll() is None, f"it ended before {step}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(120)
    assert place.record()["step"] == step


@pytest.mark.parametrize("step", ["connectors", "stopping", "packing"])
def test_a_freeze_that_is_killed_at_a_step_is_finished_by_the_next_run(old, new, there, step):
    identity = identity_of(old)
    frozen = json.dumps({"name": "factory", "connectors": [CONNECTOR]})
    line = f"printf %s {shlex.quote(frozen)} | {old.installed(['move', 'freeze'])} >&2"
    killed_at(old, step, line)
    assert move(old, new) == identity
    new.host.done("k3d", "ensure", spec=there)
    new.host.done("move", "cutover", spec={"name": "factory"})
    assert replicas(new) == "2"
    assert_serves(new, there, identity)


@pytest.mark.parametrize("step", ["volumes", "datastore"])
def test_an_import_that_is_killed_at_a_step_is_finished_by_the_next_run(old, new, there, step):
    identity = identity_of(old)
    packed = old.host.done("move", "freeze", spec={"name": "factory", "connectors": [CONNECTOR]})
    request = {
        "name": "factory",
        "nonce": packed["nonce"],
        "storage_dir": STORAGE,
        "files": packed["files"],
    }
    directory = new.host.done("move", "receive", spec=request)["directory"]
    for number, file in enumerate(packed["files"]):
        # The first is cut off in the middle: the rest of it follows.
        count = file["bytes"] // 2 if number == 0 else file["bytes"]
        read = old.line("head", "-c", str(count), f"{packed['directory']}/{file['name']}")
        write = new.line("sh", "-c", 'cat > "$1"', "sh", f"{directory}/{file['name']}")
        subprocess.run(f"{read} | {write}", shell=True, check=True)
    first = packed["files"][0]
    have = new.host.done("move", "receive", spec=request)["have"]
    assert have[first["name"]] == first["bytes"] // 2
    assert "not what was packed" in new.host("move", "import", spec=request)["error"]["cause"]
    read = old.line(
        "tail", "-c", f"+{first['bytes'] // 2 + 1}", f"{packed['directory']}/{first['name']}"
    )
    write = new.line("sh", "-c", 'cat >> "$1"', "sh", f"{directory}/{first['name']}")
    subprocess.run(f"{read} | {write}", shell=True, check=True)
    line = f"printf %s {shlex.quote(json.dumps(request))} | {new.installed(['move', 'import'])} >&2"
    killed_at(new, step, line)
    assert "cut off" in new.host("k3d", "ensure", spec=there)["error"]["cause"]
    assert new.engine.clusters() == []
    assert move(old, new) == identity
    new.host.done("k3d", "ensure", spec=there)
    assert_serves(new, there, identity)


def test_an_import_writes_over_nothing_that_is_newer(old, new):
    new.engine.run(["mkdir", "-p", STORAGE])
    new.engine.run(["tee", f"{STORAGE}/newer"], input="newer")
    with pytest.raises(MoveError, match="is not empty"):
        move(old, new)
    assert new.engine.run(["cat", f"{STORAGE}/newer"]).stdout == "newer"
