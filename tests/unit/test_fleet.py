"""Stacks side by side.

- Every two settings that two stacks cannot both have are found, with both files and both keys, from
  either side; what they can both have is not.
- A stack file is compared by its plain values, whatever else is wrong with it.
"""

from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from components.settings import Settings
from components.settings.__main__ import main
from components.settings.fleet import Addresses, Directory, HostPort, Stack, collisions
from components.settings.problem import key_path

ROOT = Path(__file__).parents[2]
IMAGE = "rancher/k3s:v1.31.5-k3s1"
SECRET = "bWFkZS11cC1leGFtcGxlLW1hZGUtdXAtZXhhbXBsZS0="
ACCOUNT = "0123456789abcdef0123456789abcdef"
OPERATOR = {"clientId": "made-up", "clientSecret": "made-up", "version": "1.86.2"}


def stack(name: str, **config: Any) -> Stack:
    config["cluster"] = {"image": IMAGE, **config.get("cluster", {})}
    if "tunnels" in config:
        cloudflare = {
            "accountId": ACCOUNT,
            "apiToken": "a" * 40,
            "zones": {"example.org": "0" * 32},
        }
        config["cloudflare"] = {**cloudflare, **config.get("cloudflare", {})}
    return Stack.of(name, Settings.model_validate(config, by_alias=True, by_name=False))


def tunnel(*hostnames: str, **more: Any) -> dict[str, Any]:
    connector = {"kind": "cluster", "image": "cloudflare/cloudflared:2025.8.1"}
    routes = [{"hostname": name, "service": "http_status:404"} for name in hostnames]
    return {"secret": SECRET, "connector": connector, "routes": routes, **more}


def on_host(**more: Any) -> dict[str, Any]:
    image = "cloudflare/cloudflared:2025.8.1"
    return tunnel(connector={"kind": "host", "image": image, **more})


def on_lan(name: str, node: int, pool: int, **lan: Any) -> Stack:
    """A cluster that is there already, with one node and two addresses for Services in the LAN."""
    router = {"gateway": "192.168.1.1", "dhcp": "192.168.1.99-192.168.1.121"}
    lan = {"subnet": "192.168.1.0/24", **router, "reserved": {"nas": "192.168.1.100"}, **lan}
    pools = [{"name": "pool", "addresses": f"192.168.1.{pool}-192.168.1.{pool + 1}"}]
    cluster = {
        "kind": "existing",
        "name": name,
        "kubeconfig": {"file": "/etc/kubeconfig", "context": "admin"},
        "nodes": {"one": {"address": f"192.168.1.{node}"}},
        "podSubnet": "10.244.0.0/16",
        "serviceSubnet": "10.96.0.0/12",
        "storageClass": "longhorn",
    }
    network = {"lan": lan, "metallb": {"pools": pools}}
    config = {"cluster": cluster, "network": network, "host": {"name": name}}
    # Compared, and not judged by itself: that is for the tests of its settings.
    context = {"left_out": []}
    settings = Settings.model_validate(config, by_alias=True, by_name=False, context=context)
    return Stack.of(name, settings)


def keys(mine: Stack, other: Stack) -> list[str]:
    """The refused keys of the first, which must be as many as those of the second."""
    found = [key_path(problem.path) for problem in collisions(mine, other)]
    assert len(found) == len(list(collisions(other, mine)))
    return found


# What a cluster on the same host must change to live beside another.
APART: dict[str, Any] = {
    "name": "other",
    "network": {"subnet": "172.31.0.0/16"},
    "storageDir": "/mnt/other/storage",
    "kubeconfig": {"path": "/etc/other/kubeconfig"},
    "api": {"port": 6444},
}


def on_k3s(name: str, *servers: int, virtual_ip: int | None = None) -> Stack:
    nodes = {
        f"server-{n}": {"role": "server", "address": f"192.168.1.{n}", "interface": "eth0"}
        for n in servers
    }
    cluster: dict[str, Any] = {
        **{"kind": "k3s", "name": name, "version": "v1.33.5+k3s1", "nodes": nodes},
        "token": {"file": "/run/agenix/k3s-token"},
    }
    if virtual_ip:
        address = f"192.168.1.{virtual_ip}"
        cluster["virtualIp"] = {"address": address, "interface": "eth0"}
        cluster["api"] = {"tlsSan": [address]}
    config = {"cluster": cluster, "host": {"name": name}}
    return Stack.of(name, Settings.model_validate(config, by_alias=True, by_name=False))


class TestCollisions:
    def test_nodes_and_virtual_ips_of_k3s_are_a_stacks_own(self) -> None:
        tower = on_k3s("tower", 201, 202, 203, virtual_ip=200)
        assert keys(tower, on_k3s("other", 204)) == []
        assert keys(tower, on_k3s("other", 203)) == ["homelab:cluster.nodes.server-203.address"]
        assert keys(tower, on_k3s("other", 200)) == ["homelab:cluster.virtualIp.address"]
        assert keys(tower, on_lan("metal", 130, 199)) == ["homelab:cluster.virtualIp.address"]
        assert keys(tower, on_lan("metal", 130, 240)) == []
        assert keys(on_k3s("tower", 110), on_lan("metal", 130, 240)) == [
            "homelab:cluster.nodes.server-110.address"
        ]

    def test_two_clusters_by_default_settings_share_nothing_on_two_hosts(self) -> None:
        assert keys(stack("a"), stack("b")) == []

    def test_on_one_host_they_share_all_that_has_a_default(self) -> None:
        host = {"host": {"name": "nas"}}
        assert keys(stack("a", **host), stack("b", **host)) == [
            "homelab:cluster.name",
            "homelab:cluster.network.subnet",
            "homelab:cluster.network.name",
            "homelab:cluster.api.port",
            "homelab:cluster.storageDir",
            "homelab:cluster.kubeconfig.path",
        ]

    def test_two_clusters_on_one_host_can_be_told_apart(self) -> None:
        host = {"host": {"name": "nas"}}
        assert keys(stack("a", **host), stack("b", **host, cluster=APART)) == []

    @pytest.mark.parametrize(
        ("mine", "theirs"),
        [
            ({"name": "nas"}, {"name": "nas"}),
            ({"name": "nas"}, {"connection": "ssh", "address": "10.0.0.1", "name": "nas"}),
            (
                {"connection": "ssh", "address": "nas.lan"},
                {"connection": "ssh", "address": "NAS.lan"},
            ),
            ({"connection": "ssh", "address": "b"}, {}),  # `b` is the other stack's name
        ],
    )
    def test_a_host_is_known_by_its_name_its_address_or_its_stacks_name(
        self, mine: dict[str, Any], theirs: dict[str, Any]
    ) -> None:
        cluster = {"api": {"bind": "10.0.0.1"}}
        assert keys(
            stack("a", host=mine, cluster=cluster), stack("b", host=theirs, cluster=cluster)
        )

    def test_two_ports_of_one_gateway_lead_to_two_hosts(self) -> None:
        cluster = {"api": {"bind": "10.0.0.1"}}
        host = {"connection": "ssh", "address": "gate.lan"}
        other = stack("b", host={**host, "port": 2222}, cluster=cluster)
        assert keys(stack("a", host=host, cluster=cluster), other) == []

    @pytest.mark.parametrize(
        ("mine", "expected"),
        [
            (
                {"ports": [{"hostPort": 6444, "containerPort": 80, "bind": "0.0.0.0"}]},
                ["ports[0].hostPort"],
            ),
            ({"ports": [{"hostPort": 6444, "containerPort": 80, "bind": "10.0.0.1"}]}, []),
            ({"ports": [{"hostPort": 6444, "containerPort": 80, "protocol": "udp"}]}, []),
            ({"storageDir": "/mnt/other"}, ["storageDir"]),
            ({"storageDir": "/mnt/other/storage/mine"}, ["storageDir"]),
            ({"storageDir": "/mnt/other/storages"}, []),
            ({"network": {"subnet": "172.31.128.0/24"}}, ["network.subnet"]),
            # Incident 5: a resolver behind any bridge of the host.
            ({"resolvers": ["172.31.0.1"]}, ["resolvers[0]"]),
        ],
    )  # fmt: skip
    def test_what_a_host_has_once_is_found(self, mine: dict[str, Any], expected: list[str]) -> None:
        host = {"host": {"name": "nas"}}
        found = keys(stack("a", **host, cluster=mine), stack("b", **host, cluster=APART))
        assert found == [f"homelab:cluster.{key}" for key in expected]

    def test_connectors_of_one_host_need_containers_and_files_of_their_own(self) -> None:
        host = {"host": {"name": "nas"}}
        mine = stack("a", **host, tunnels={"one": on_host(container="c", tokenFile="/run/t")})
        theirs = on_host(container="c", tokenFile="/run/t")
        other = stack("b", **host, cluster=APART, tunnels={"two": theirs})
        assert keys(mine, other) == [
            "homelab:tunnels.one.connector.container",
            "homelab:tunnels.one.connector.tokenFile",
        ]

    def test_a_tunnels_name_is_one_in_its_account(self) -> None:
        mine = stack("a", tunnels={"factory": tunnel()})
        assert keys(mine, stack("b", tunnels={"factory": tunnel()})) == ["homelab:tunnels.factory"]
        elsewhere = {"accountId": "f" * 32}
        other = stack("b", tunnels={"factory": tunnel()}, cloudflare=elsewhere)
        assert keys(mine, other) == []

    def test_a_hostname_and_an_adopted_tunnel_are_one_over_all_stacks(self) -> None:
        adopt = {"id": "01234567-89ab-cdef-0123-456789abcdef"}
        mine = stack("a", tunnels={"one": tunnel("x.example.org", "y.example.org", adopt=adopt)})
        other = stack("b", tunnels={"two": tunnel("y.example.org", adopt=adopt)})
        assert keys(mine, other) == [
            "homelab:tunnels.one.adopt.id",
            "homelab:tunnels.one.routes[1].hostname",
        ]

    def test_a_hostname_of_several_routes_is_told_once(self) -> None:
        route = {"hostname": "x.example.org", "service": "http_status:404"}
        mine = stack("a", tunnels={"one": tunnel(routes=[{**route, "path": "^/api/"}, route])})
        assert len(keys(mine, stack("b", tunnels={"two": tunnel("x.example.org")}))) == 1

    def test_operators_need_names_of_their_own_in_the_tailnet(self) -> None:
        mine = stack("a", tailscale={"operator": OPERATOR})
        assert keys(mine, stack("b", tailscale={"operator": OPERATOR}))
        named = {"operator": {**OPERATOR, "hostname": "tailscale-operator"}}
        assert keys(mine, stack("b", tailscale=named))
        named = {"operator": {**OPERATOR, "hostname": "b-operator"}}
        assert keys(mine, stack("b", tailscale=named)) == []

    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("172.30.0.7", ["homelab:cluster.network.subnet"]),
            ("10.42.3.3", ["homelab:cluster.podSubnet"]),
            ("10.43.3.3", ["homelab:cluster.k3sArgs[0]"]),
            ("10.44.3.3", []),
        ],
    )
    def test_a_host_behind_a_network_of_another_cluster_is_out_of_its_reach(
        self, address: str, expected: list[str]
    ) -> None:
        host = {"connection": "ssh", "address": address}
        cluster = {"k3sArgs": ["--service-cidr=10.43.0.0/17,fd00::/108"]}
        other = stack("b", host=host, cluster={"api": {"bind": "10.0.0.1"}})
        assert keys(stack("a", cluster=cluster), other) == expected

    def test_two_clusters_of_one_host_cannot_both_have_dockers_network_in_the_lan(self) -> None:
        def attached(name: str, host: str, first: int) -> Stack:
            span = {"type": "static", "range": f"192.168.1.{first}-192.168.1.{first + 3}"}
            multus = {
                "interface": "br0",
                "nodes": f"192.168.1.{first + 8}/29",
                "networks": [{"name": "lan", "ipam": span}],
            }
            lan = {"subnet": "192.168.1.0/24", "gateway": "192.168.1.1"}
            cluster = {
                "name": name,
                "cniPlugins": "/mnt/cni",
                "storageDir": f"/mnt/{name}",
                "network": {"subnet": f"10.{first + 100}.0.0/16"},
                "podSubnet": f"10.{first}.0.0/16",
                "kubeconfig": {"path": f"/etc/{name}"},
                "api": {"port": 7000 + first},
            }
            network = {"lan": lan, "multus": multus}
            return stack(name, host={"name": host}, cluster=cluster, network=network)

        mine = attached("a", "nas", 16)
        assert keys(mine, attached("b", "nas", 64)) == ["homelab:network.multus"]
        assert keys(mine, attached("b", "other", 64)) == []

    @pytest.mark.parametrize(
        ("node", "pool", "expected"),
        [
            (10, 240, []),
            (10, 215, ["homelab:network.multus.networks[0].ipam.range"]),
            (209, 240, ["homelab:network.multus.networks[0].ipam.range"]),
            (233, 240, ["homelab:network.multus.nodes"]),
            (10, 238, ["homelab:network.multus.nodes"]),
        ],
    )
    def test_what_multus_takes_of_the_lan_is_nobody_elses(
        self, node: int, pool: int, expected: list[str]
    ) -> None:
        lan = {"subnet": "192.168.1.0/24", "gateway": "192.168.1.1"}
        network = {"name": "lan", "ipam": {"type": "static", "range": "192.168.1.208/28"}}
        multus = {"interface": "br0", "nodes": "192.168.1.232/29", "networks": [network]}
        mine = stack(
            "a", cluster={"cniPlugins": "/mnt/cni"}, network={"lan": lan, "multus": multus}
        )
        assert keys(mine, on_lan("b", node, pool)) == expected

    def test_stacks_of_one_lan_share_its_router_and_dhcp_range_and_what_is_reserved(self) -> None:
        assert keys(on_lan("a", 10, 240), on_lan("b", 20, 230)) == []

    @pytest.mark.parametrize(
        ("node", "pool", "lan", "expected"),
        [
            (20, 241, {}, ["network.metallb.pools[0].addresses"]),
            (10, 230, {}, ["cluster.nodes.one.address"]),
            (240, 230, {}, ["network.metallb.pools[0].addresses"]),
            # A host inside another's DHCP range, unless the router reserves its address (X2).
            (120, 230, {"dhcp": None}, ["network.lan.dhcp"]),
            (100, 230, {"dhcp": None}, []),
            (20, 120, {"dhcp": None}, ["network.lan.dhcp"]),
        ],
    )
    def test_addresses_of_one_lan_have_one_owner(
        self, node: int, pool: int, lan: dict[str, Any], expected: list[str]
    ) -> None:
        found = keys(on_lan("a", 10, 240), on_lan("b", node, pool, **lan))
        assert found == [f"homelab:{key}" for key in expected]

    def test_a_docker_network_over_the_lan_of_another_stack_is_refused(self) -> None:
        mine = stack("a", cluster={"network": {"subnet": "192.168.0.0/16"}})
        assert set(keys(mine, on_lan("b", 10, 240))) == {"homelab:cluster.network.subnet"}

    def test_a_pool_in_front_of_k3d_is_known_on_its_own_host_alone(self) -> None:
        pools = [{"name": "pool", "addresses": "172.30.255.0/28"}]
        cluster = {"network": {"subnet": "172.30.0.0/16"}}
        network = {"metallb": {"pools": pools}}
        assert keys(stack("a", cluster=cluster, network=network), stack("b")) == []

    def test_a_collision_is_told_with_both_files_both_keys_both_values_and_the_remedy(self) -> None:
        mine = stack("a", host={"name": "nas"})
        other = stack(
            "b", host={"name": "nas"}, cluster=APART | {"network": {"subnet": "172.30.1.0/24"}}
        )
        (problem,) = collisions(mine, other)
        assert str(problem) == (
            'homelab:cluster.network.subnet: "172.30.0.0/16" overlaps the Docker network in'
            " Pulumi.b.yaml, homelab:cluster.network.subnet. Allowed: a Docker network that"
            " overlaps no other on host nas. Remedy: change it in one of the two files"
            ' (Pulumi.b.yaml has "172.30.1.0/24"), or, if these are two hosts, give each a name in'
            " homelab:host.name."
        )


ipv4 = st.integers(0, 2**32 - 1).map(IPv4Address)
ranges = st.tuples(ipv4, ipv4).map(sorted).map(lambda ends: Addresses(*ends))


class TestExtents:
    @given(ranges, ranges, ipv4)
    def test_ranges_meet_where_an_address_is_in_both(
        self, one: Addresses, other: Addresses, address: IPv4Address
    ) -> None:
        inside = [r.meets(Addresses(address, address)) for r in (one, other)]
        assert inside == [int(r.first) <= int(address) <= int(r.last) for r in (one, other)]
        assert one.meets(other) or not all(inside)
        common = max(int(one.first), int(other.first)) <= min(int(one.last), int(other.last))
        assert one.meets(other) == other.meets(one) == common

    @pytest.mark.parametrize(
        ("text", "first", "last"),
        [
            ("192.168.1.240-192.168.1.245", "192.168.1.240", "192.168.1.245"),
            ("192.168.1.240 - 192.168.1.245", "192.168.1.240", "192.168.1.245"),
            ("192.168.1.0/24", "192.168.1.0", "192.168.1.255"),
            ("192.168.1.7", "192.168.1.7", "192.168.1.7"),
            ("fd00::/126", "fd00::", "fd00::3"),
        ],
    )
    def test_addresses_are_written_as_range_network_or_address(
        self, text: str, first: str, last: str
    ) -> None:
        found = Addresses.of(text)
        assert (str(found.first), str(found.last)) == (first, last)

    def test_ipv4_and_ipv6_never_meet(self) -> None:
        assert not Addresses.of("0.0.0.0/0").meets(Addresses.of("::/0"))

    @given(st.integers(1, 65535), st.sampled_from(["tcp", "udp"]), ipv4.map(str))
    def test_an_unspecified_address_takes_the_port_of_each(
        self, port: int, protocol: str, bind: str
    ) -> None:
        everywhere = HostPort(protocol, port, "0.0.0.0")
        assert everywhere.meets(HostPort(protocol, port, bind))
        assert HostPort(protocol, port, bind).meets(everywhere)

    def test_a_directory_meets_what_is_in_it_and_what_it_is_in(self) -> None:
        assert Directory("/a").meets(Directory("/a/b"))
        assert Directory("/a/b").meets(Directory("/a"))
        assert not Directory("/a").meets(Directory("/ab"))


class TestFiles:
    @pytest.fixture
    def write(self, tmp_path: Path) -> Any:
        def write(stack: str, **config: Any) -> Path:
            path = tmp_path / f"Pulumi.{stack}.yaml"
            ours = {f"homelab:{key}": value for key, value in config.items()}
            path.write_text(yaml.safe_dump({"config": ours, "encryptionsalt": "v1:a"}))
            return path

        return write

    def test_encrypted_and_missing_secrets_hide_nothing_else(self, write: Any) -> None:
        cloudflare = {"accountId": ACCOUNT, "zones": {"example.org": "0" * 32}}
        read = Stack.read(
            write(
                "a",
                cluster={"image": IMAGE},
                secrets={
                    "apps": {
                        "login": {
                            "type": "kubernetes.io/basic-auth",
                            "data": {
                                "username": {"secure": "v1:x"},
                                "password": {"secure": "v1:x"},
                            },
                        }
                    }
                },
                cloudflare={**cloudflare, "apiToken": {"secure": "v1:x"}},
                tunnels={"factory": {**tunnel("x.example.org"), "secret": None}},
                tailscale={"operator": {**OPERATOR, "clientSecret": {"secure": "v1:x"}}},
            )
        )
        assert read.problems == ()
        assert set(read.claims) == set(
            stack(
                "a",
                cloudflare=cloudflare,
                tunnels={"factory": tunnel("x.example.org")},
                tailscale={"operator": OPERATOR},
            ).claims
        )

    def test_a_plain_value_that_was_encrypted_is_named_and_claims_nothing(self, write: Any) -> None:
        cluster = {"image": IMAGE, "storageDir": {"secure": "v1:x"}, "name": "Bad Name"}
        read = Stack.read(write("a", cluster=cluster))
        assert [text.partition(": ")[0] for text in read.problems] == [
            "homelab:cluster.name",
            "homelab:cluster.storageDir",
        ]
        claimed = {key_path(claim.path) for claim in read.claims}
        assert "homelab:cluster.api.port" in claimed
        assert not {"homelab:cluster.name", "homelab:cluster.storageDir"} & claimed

    def test_on_a_host_that_cannot_be_known_nothing_is_compared(self, write: Any) -> None:
        host = {"connection": "ssh", "address": {"secure": "v1:x"}}
        tunnels = {"one": tunnel("x.example.org", secret={"secure": "v1:x"})}
        cloudflare = {"accountId": {"secure": "v1:x"}, "zones": {"example.org": "0" * 32}}
        cluster = {"image": IMAGE, "api": {"bind": "10.0.0.1"}}
        config = {"host": host, "cluster": cluster, "tunnels": tunnels, "cloudflare": cloudflare}
        read = Stack.read(write("a", **config))
        assert [claim.what for claim in read.claims] == ["hostname"]

    @pytest.mark.parametrize(
        "content", ["config: [", "- a", "config: 1", "", "\x00", "config: {1: 2}"]
    )
    def test_a_file_that_is_no_stack_file_is_named_and_stops_no_other(
        self, write: Any, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "Pulumi.broken.yaml").write_text(content)
        for name in ("a", "b"):
            write(name, host={"name": "nas"}, cluster={"image": IMAGE})
        assert main(tmp_path) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0].startswith("Pulumi.broken.yaml: ")
        assert sum(line.startswith("Pulumi.a.yaml: homelab:cluster.") for line in lines) == 6
        assert not any(line.startswith("Pulumi.b.yaml: ") for line in lines)

    @pytest.mark.parametrize("named", ["gone", "b"])
    def test_a_cluster_is_moved_from_another_stack_of_the_project(
        self, write: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write("a", host={"name": "old"}, cluster={"image": IMAGE, "enabled": False})
        write("b", host={"name": "new"}, cluster={"image": IMAGE, "movedFrom": "a"})
        assert main(tmp_path) == 0, capsys.readouterr().err
        write("b", host={"name": "new"}, cluster={"image": IMAGE, "movedFrom": named})
        assert main(tmp_path) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'Pulumi.b.yaml: homelab:cluster.movedFrom: "{named}" is no other')
        assert "Pulumi.a.yaml" in line

    def test_the_stacks_of_this_project_live_side_by_side(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(ROOT) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("mine", "theirs", "collide"),
    [([], [], True), (["a"], [], True), (["a"], ["a", "b"], True), (["a"], ["b"], False)],
)
def test_a_cluster_or_a_namespace_of_it_has_one_argocd(
    mine: list[str], theirs: list[str], collide: bool
) -> None:
    def hub(name: str, subnet: str, namespaces: list[str]) -> Stack:
        member = {"stack": "organization/homelab/metal", "namespaces": namespaces}
        argocd = {"repository": "https://example.org/a/b", "clusters": {"metal": member}}
        cluster = {"network": {"subnet": subnet}}
        return stack(name, argocd=argocd, cluster=cluster, host={"name": name})

    pair = hub("one", "172.30.0.0/16", mine), hub("two", "172.31.0.0/16", theirs)
    found = list(collisions(*pair))
    assert bool(found) == collide
    assert {key_path(problem.path) for problem in found} <= {"homelab:argocd.clusters.metal"}


def test_a_cluster_that_is_off_takes_nothing_and_its_host_tunnels_stay():
    """Incident 16: while a cluster moves, both its stacks describe it."""
    routes = {"inside": tunnel("a.example.org"), "host": on_host()}
    routes["host"]["routes"] = [{"hostname": "b.example.org", "service": "http://localhost:80"}]
    on = stack("old", tunnels=routes)
    off = stack("new", cluster={"enabled": False}, tunnels={"inside": tunnel("a.example.org")})
    assert list(collisions(off, on)) == []
    host = stack("new", cluster={"enabled": False}, tunnels=routes)
    assert {problem.path[1] for problem in collisions(host, on)} == {"host"}
