"""The second network of the nodes, in the LAN: connected, kept, mended and taken away."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_hostctl import NODE, SPEC, Host

LAN = "k3d-factory-lan"
WANTED = SPEC | {"lan_network": LAN, "lan_interface": "br0"}


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    ipam = [{"subnet": "192.168.1.0/24", "gateway": "192.168.1.1"}]
    network = {"name": LAN, "id": "n2", "driver": "macvlan", "ipamConfigs": ipam, "labels": []}
    host.machine.docker_world.put(f"network/{LAN}", network)
    return host


def lan(host: Host) -> list[str]:
    return host("k3d inspect", SPEC)["cluster"]["live"]["lan"]


def connects(host: Host) -> list[list[str]]:
    return [call for call in host.calls if "connect" in call or "disconnect" in call]


def difference(host: Host, spec: dict[str, Any]) -> list[str]:
    return [one["key"] for one in host("k3d inspect", spec)["cluster"]["differences"]]


def test_a_new_cluster_is_in_the_lan_and_stays_as_it_is(host: Host) -> None:
    host("k3d ensure", WANTED)
    assert connects(host) == [["docker", "network", "connect", LAN, NODE]]
    assert lan(host) == [LAN]
    host("k3d ensure", WANTED)
    assert connects(host) == []
    assert difference(host, WANTED) == []


def test_every_node_is_connected_and_the_load_balancer_is_not(host: Host) -> None:
    host("k3d ensure", WANTED | {"agents": 2})
    nodes = {call[-1] for call in connects(host)}
    assert nodes == {NODE, "k3d-factory-agent-0", "k3d-factory-agent-1"}


def test_a_cluster_that_is_there_joins_and_leaves_the_lan_without_a_recreate(host: Host) -> None:
    host("k3d ensure", SPEC)
    assert difference(host, WANTED) == ["lan"]
    host("k3d ensure", WANTED)
    assert lan(host) == [LAN]
    assert difference(host, SPEC) == ["lan"]
    host("k3d ensure", SPEC)
    assert connects(host) == [["docker", "network", "disconnect", LAN, NODE]]
    assert lan(host) == []


def test_a_network_that_someone_else_connected_is_left_alone(host: Host) -> None:
    other = {"name": "monitoring", "id": "n3", "ipamConfigs": [], "labels": []}
    host.machine.docker_world.put("network/monitoring", other)
    host("k3d ensure", SPEC)
    host.machine.run(["docker", "network", "connect", "monitoring", NODE])
    assert difference(host, SPEC) == []
    host("k3d ensure", SPEC)
    assert connects(host) == []


def test_a_lan_network_that_is_not_there_fails_by_name_and_the_next_run_goes_on(
    host: Host,
) -> None:
    network = host.machine.docker_world.get(f"network/{LAN}") or {}
    host.machine.docker_world.delete(f"network/{LAN}")
    error = host("k3d ensure", WANTED, code=5)
    assert f"connecting {NODE} to {LAN}" in error["step"]
    host.machine.docker_world.put(f"network/{LAN}", network)
    host("k3d ensure", WANTED)
    assert lan(host) == [LAN]


def test_a_router_in_the_lan_may_be_the_resolver(host: Host) -> None:
    """The subnet of a macvlan network is the LAN's own, and no network of Docker's (incident 5)."""
    host("k3d ensure", WANTED | {"resolvers": ["192.168.1.1"]})
