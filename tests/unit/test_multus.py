"""Multus and Calico: what of 000 would fail if copied, and what must come before what."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi_kubernetes as kubernetes
import pytest

from components import settings, versions
from components.cluster import Cluster
from components.host import Connection, Host
from components.network.calico import Calico, CalicoArgs
from components.network.multus import Multus, MultusArgs
from tests.unit.conftest import Registered, Registration

ROOT = Path(__file__).parents[2]
LAN = {"subnet": "192.168.1.0/24", "gateway": "192.168.1.1", "dhcp": "192.168.1.2-192.168.1.120"}
HOST_LOCAL = {"name": "lan", "ipam": {"type": "host-local", "range": "192.168.1.208/28"}}


def cluster() -> Cluster:
    host = Host("truenas", Connection(settings.Host()))
    provider = kubernetes.Provider("kubernetes", kubeconfig="{}")
    return Cluster("truenas", provider, None, "/etc/k3d/kubeconfig", host, "ab12cd34-1")


@pytest.fixture
def register(run_program: Callable[..., Registered]) -> Callable[..., Registered]:
    def run(*networks: dict[str, Any], cni: str = "flannel") -> Registered:
        def program() -> None:
            given = {"interface": "br0", "nodes": "192.168.1.232/29", "networks": networks}
            declared = settings.Multus.model_validate({**given, "networks": list(networks)})
            lan = settings.Lan.model_validate(LAN)
            Multus("truenas", MultusArgs(declared, lan, cni, cluster()))

        return run_program(program)

    return run


def config(registered: Registered, name: str) -> dict[str, Any]:
    network = registered["NetworkAttachmentDefinition", name]
    return json.loads(network.inputs["spec"]["config"])


def pod(registered: Registered, name: str) -> dict[str, Any]:
    return registered["DaemonSet", name].inputs["spec"]["template"]["spec"]


def paths(daemon: Registration) -> dict[str, str]:
    volumes = daemon.inputs["spec"]["template"]["spec"]["volumes"]
    return {volume["name"]: volume["hostPath"]["path"] for volume in volumes}


@pytest.mark.parametrize(
    ("cni", "programs", "configs"),
    [
        ("flannel", "/var/lib/rancher/k3s/data/cni", "/var/lib/rancher/k3s/agent/etc/cni/net.d"),
        ("calico", "/opt/cni/bin", "/etc/cni/net.d"),
    ],
)
def test_multus_lies_where_containerd_looks(
    register: Any, cni: str, programs: str, configs: str
) -> None:
    """X18: k3s with flannel does not look into /opt/cni/bin."""
    registered = register(HOST_LOCAL, cni=cni)
    assert paths(registered["DaemonSet", "multus"]) == {"programs": programs, "configs": configs}
    (container,) = pod(registered, "multus")["containers"]
    kubeconfig = f"--multus-kubeconfig-file-host={configs}/multus.d/multus.kubeconfig"
    assert kubeconfig in container["args"]
    assert "--additional-bin-dir=/opt/cni/plugins" in container["args"]


def test_multus_is_the_thin_one_of_one_pinned_version_without_shared_mounts(register: Any) -> None:
    """X22: the document has thin and thick, both of branch master. The thick one needs mounts that
    propagate, which a k3d node has not."""
    spec = pod(register(HOST_LOCAL), "multus")
    containers = [*spec["initContainers"], *spec["containers"]]
    assert {container["image"] for container in containers} == {versions.MULTUS}
    assert re.fullmatch(r".+:v\d+\.\d+\.\d+", versions.MULTUS)
    mounts = [mount for container in containers for mount in container["volumeMounts"]]
    assert not any("mountPropagation" in mount for mount in mounts)


def test_an_interface_in_the_lan_is_made_on_the_nodes_second_one(register: Any) -> None:
    """X19: eth0 of a k3d node is Docker's bridge. X3: a range is counted, not the whole LAN."""
    made = config(register(HOST_LOCAL), "default/lan")
    assert made == {
        "cniVersion": "0.3.1",
        "name": "lan",
        "type": "macvlan",
        "master": "eth1",
        "mode": "bridge",
        "ipam": {
            "type": "host-local",
            "ranges": [
                [
                    {
                        "subnet": "192.168.1.0/24",
                        "rangeStart": "192.168.1.208",
                        "rangeEnd": "192.168.1.223",
                    }
                ]
            ],
        },
    }


def test_a_pods_default_route_stays_with_the_cluster(register: Any) -> None:
    static = {"name": "fixed", "ipam": {"type": "static", "range": "192.168.1.224/29"}}
    registered = register(HOST_LOCAL, static)
    for name in ("default/lan", "default/fixed"):
        assert "routes" not in config(registered, name)["ipam"]
        assert "gateway" not in json.dumps(config(registered, name))


def test_a_static_address_comes_with_the_pod(register: Any) -> None:
    static = {"name": "fixed", "ipam": {"type": "static", "range": "192.168.1.224/29"}}
    made = config(register(static), "default/fixed")
    assert made["capabilities"] == {"ips": True}
    assert made["ipam"] == {"type": "static"}


def test_bridges_of_two_networks_are_two_bridges_with_names_that_the_kernel_takes(
    register: Any,
) -> None:
    ipam = {"type": "host-local", "range": "10.60.0.10-10.60.0.20"}
    bridge = {"name": "a-network-of-a-long-name", "type": "bridge", "subnet": "10.60.0.0/24"}
    other = {**bridge, "namespace": "media", "subnet": "10.61.0.0/24"}
    registered = register(
        {**bridge, "ipam": ipam},
        {**other, "ipam": {**ipam, "range": "10.61.0.10-10.61.0.20"}},
    )
    names = {
        config(registered, f"{namespace}/a-network-of-a-long-name")["bridge"]
        for namespace in ("default", "media")
    }
    assert len(names) == 2
    assert all(len(name) <= 15 for name in names)


def test_leases_have_a_daemon_in_the_nodes_own_namespaces_only_where_they_are_used(
    register: Any,
) -> None:
    assert ("DaemonSet", "cni-dhcp") not in register(HOST_LOCAL)
    registered = register({"name": "lan", "ipam": {"type": "dhcp"}})
    spec = pod(registered, "cni-dhcp")
    assert spec["hostPID"]
    assert spec["hostNetwork"]
    (container,) = spec["containers"]
    assert container["command"][:4] == ["nsenter", "--target=1", "--mount", "--net"]
    assert "/opt/cni/plugins/dhcp daemon" in container["command"][-1]
    network = registered["NetworkAttachmentDefinition", "default/lan"]
    assert ("DaemonSet", "cni-dhcp") in network.depends_on


def test_networks_come_after_multus_and_multus_after_their_kind(register: Any) -> None:
    registered = register(HOST_LOCAL)
    network = registered["NetworkAttachmentDefinition", "default/lan"]
    assert ("DaemonSet", "multus") in network.depends_on
    kind = "CustomResourceDefinition", "network-attachment-definitions"
    assert kind in registered["DaemonSet", "multus"].depends_on


def test_multus_may_not_change_networks(register: Any) -> None:
    rules = register(HOST_LOCAL)["ClusterRole", "multus"].inputs["rules"]
    (networks,) = (rule for rule in rules if "k8s.cni.cncf.io" in rule["apiGroups"])
    assert set(networks["verbs"]) == {"get", "list", "watch"}


def test_calico_has_the_pod_range_of_k3s_and_nothing_that_k3d_cannot_carry(
    run_program: Callable[..., Registered],
) -> None:
    """X20: Calico's own range swallows the LAN, and k3s needs forwarding in pods."""
    registered = run_program(lambda: Calico("truenas", CalicoArgs("10.50.0.0/16", cluster())))
    release = registered["Release", "calico"]
    values = release.inputs["values"]
    network = values["installation"]["calicoNetwork"]
    assert [pool["cidr"] for pool in network["ipPools"]] == ["10.50.0.0/16"]
    assert network["containerIPForwarding"] == "Enabled"
    assert values["kubeletVolumePluginPath"] == "None"
    assert release.inputs["version"] == versions.CALICO.version
    assert ("Namespace", "tigera-operator") in release.depends_on


def test_a_rehearsal_can_fetch_what_a_real_run_fetches() -> None:
    offered = json.loads((ROOT / "rehearsal" / "charts.json").read_text())
    chart = versions.CALICO
    assert f"{chart.repository}/{chart.name}@{chart.version}" in offered
