"""The life of stack p510 on a real Docker engine and a real API server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.engine import Engine
from tests.cluster.p510 import RealP510
from tests.engine.conftest import planned
from tests.engine.test_p510 import URNS, urns

pytestmark = [pytest.mark.cluster, pytest.mark.engine]


@pytest.fixture
def stack(docker: Engine, tmp_path: Path) -> Iterator[RealP510]:
    """p510 on a host that has nothing of it yet."""
    stack = RealP510(docker, tmp_path)
    stack.prepare()
    yield stack
    docker.kill_resolver()


def test_the_whole_stack_lives_heals_and_goes_on_a_real_engine_and_api_server(stack):
    engine = stack.engine
    storage = stack.settings["cluster"]["storageDir"]
    stack.up()
    assert urns(stack) == URNS.read_text().splitlines()
    identity = stack.outputs()["cluster"]["identity"]
    # Everything really is where it is said to be.
    names = engine.docker("ps", "--format", "{{.Names}}").split()
    assert sorted(names) == ["cloudflared-p510", "k3d-factory-server-0"]
    applied = stack.kubectl("get", "application", "--namespace=argocd", "--output=name")
    assert applied == "application.argoproj.io/root\n"

    assert planned(stack.up()) == set()
    assert planned(stack.preview("--refresh")) == set()

    stack.kubectl("create", "configmap", "marker", "--namespace=factory", "--from-literal=a=b")
    stack.write_file(f"{storage}/marker", "kept")

    # Docker's containers end with it, and with it come those that are to be restarted.
    engine.restart()
    stack.up("--refresh")
    assert planned(stack.up()) == set()
    stack.wait_until_available()
    assert planned(stack.preview("--refresh")) == set()
    assert stack.outputs()["cluster"]["identity"] == identity
    assert_markers(stack, storage)

    # A cluster that someone stopped: seen, said and healed.
    engine.run(["k3d", "cluster", "stop", "factory"])
    engine.docker("stop", "cloudflared-p510")
    preview = stack.preview("--refresh")
    assert "cluster factory on this machine is stopped: up starts it" in preview.stdout
    assert "update Container cloudflared-p510" in planned(preview)
    stack.up("--refresh")
    assert planned(stack.up()) == set()
    stack.wait_until_available()
    assert planned(stack.preview("--refresh")) == set()
    assert stack.outputs()["cluster"]["identity"] == identity
    assert_markers(stack, storage)

    # Step one of the documented two types the names.
    stack.settings["cluster"]["delete"] = "factory"
    for name, tunnel in stack.settings["tunnels"].items():
        tunnel["delete"] = name
    stack.set_config(stack.settings)
    assert planned(stack.up()) == {"update Command cluster"}
    stack.destroy()
    assert stack.resources() == []
    assert engine.docker("ps", "--all", "--quiet") == ""
    assert engine.docker("volume", "ls", "--quiet") == ""
    networks = engine.docker("network", "ls", "--format", "{{.Name}}").split()
    assert sorted(networks) == ["bridge", "host", "none"]
    assert engine.run(["cat", f"{storage}/marker"]).stdout == "kept"


def assert_markers(stack: RealP510, storage: str) -> None:
    """What was put into the cluster and its storage directory is there."""
    kept = stack.kubectl(
        "get", "configmap", "marker", "--namespace=factory", "-o=jsonpath={.data.a}"
    )
    assert kept == "b"
    assert stack.engine.run(["cat", f"{storage}/marker"]).stdout == "kept"
