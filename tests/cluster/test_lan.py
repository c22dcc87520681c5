"""The second network of the nodes on real Docker: what k3s and Multus rely on."""

from collections.abc import Iterator

import pytest

from tests.cluster.host import Host

pytestmark = pytest.mark.cluster

NODE = "k3d-factory-server-0"
LAN = "k3d-factory-lan"


@pytest.fixture
def lan(host: Host) -> Iterator[str]:
    """The Docker network of the LAN as the stack makes it, on an interface of the test's own."""
    run = host.engine.run
    run(["ip", "link", "add", "br0", "type", "veth", "peer", "name", "switch"])
    for end in ("br0", "switch"):
        run(["ip", "link", "set", end, "up"])
    yield host.engine.docker(
        "network", "create", "--driver", "macvlan", "--opt", "parent=br0",
        "--subnet", "192.168.1.0/24", "--gateway", "192.168.1.1", "--ip-range", "192.168.1.232/29",
        LAN,
    )  # fmt: skip
    host.engine.clean()
    run(["ip", "link", "delete", "br0"])


def routes(host: Host) -> set[tuple[str, str]]:
    """Interface and destination of the node's routes; 00000000 is the default one's."""
    table = host.engine.docker("exec", NODE, "cat", "/proc/net/route").splitlines()[1:]
    return {(row.split()[0], row.split()[1]) for row in table}


def test_eth0_and_the_default_route_stay_the_clusters_whatever_is_restarted(
    host, spec, network, lan
):
    """k3s takes the node's address from the default route, and Multus the LAN from eth1."""
    wanted = {**spec, "lan_network": LAN, "lan_interface": "br0"}
    expected = {("eth0", "00000000"), ("eth0", "00001EAC"), ("eth1", "0001A8C0")}
    host.done("k3d", "ensure", spec=wanted)
    assert routes(host) == expected
    assert host.done("k3d", "inspect", spec=wanted)["cluster"]["differences"] == []

    host.engine.docker("restart", NODE)
    assert routes(host) == expected
    host.engine.restart()
    host.done("k3d", "ensure", spec=wanted)
    assert routes(host) == expected

    host.done("k3d", "ensure", spec=spec)
    assert routes(host) == {("eth0", "00000000"), ("eth0", "00001EAC")}
    assert host.done("k3d", "inspect", spec=spec)["cluster"]["differences"] == []
