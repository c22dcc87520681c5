"""The life of stack truenas: a k3d cluster on a NAS, whose pods have addresses in the LAN.

Its URNs are pinned in urns.truenas.txt as p510's are. When a resource comes or goes on purpose:

    .venv/bin/python -m tests.engine.test_truenas
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from components.recovery import run_again
from tests.engine.conftest import (
    K3dRehearsal,
    assert_state_is_rebuilt,
    edited_file,
    errors,
    planned,
    urns,
)
from tests.engine.test_status import run, status

pytestmark = pytest.mark.engine

URNS = Path(__file__).with_name("urns.truenas.txt")
NODE = "k3d-truenas-server-0"
LAN = "k3d-truenas-lan"


class TrueNAS(K3dRehearsal):
    """A rehearsal of truenas."""

    name = "truenas"

    @property
    def node(self) -> dict[str, Any]:
        """The cluster's only node, as Docker would show it."""
        (node,) = json.loads(self.cluster_file.read_text())["nodes"]
        return node

    def attachment(self, name: str, namespace: str = "default") -> dict[str, Any]:
        """The CNI configuration of a NetworkAttachmentDefinition that is in the cluster."""
        kind = "NetworkAttachmentDefinition.k8s.cni.cncf.io"
        (file,) = self.objects.glob(f"{namespace}/{kind}/{name}.json")
        return json.loads(json.loads(file.read_text())["spec"]["config"])


@pytest.fixture
def fresh(tmp_path: Path) -> TrueNAS:
    """truenas before its first up."""
    return TrueNAS(tmp_path / "truenas")


@pytest.fixture(scope="module")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> TrueNAS:
    """truenas after its first up; not to be changed."""
    stack = TrueNAS(tmp_path_factory.mktemp("truenas"))
    stack.up()
    return stack


@pytest.fixture
def truenas(brought_up: TrueNAS, tmp_path: Path) -> TrueNAS:
    """truenas after its first up, to do anything with."""
    return brought_up.copy(tmp_path / "truenas")


def test_the_first_preview_creates_the_pinned_resources_and_touches_nothing(fresh):
    preview = fresh.preview()
    assert set(preview.changes) == {"create"}
    created = {step.urn for step in preview.steps if "::default_" not in step.urn}
    assert created == set(URNS.read_text().splitlines())
    assert not fresh.cluster_file.exists()


def test_once_up_nothing_is_left_to_do(truenas):
    assert urns(truenas) == URNS.read_text().splitlines()
    assert planned(truenas.up()) == set()
    assert planned(truenas.preview("--refresh")) == set()


def test_a_lost_state_is_rebuilt_from_what_exists(truenas):
    assert_state_is_rebuilt(truenas)


def test_the_node_has_the_plugins_and_an_interface_in_the_lan(truenas):
    assert "/mnt/tank/k3d/cni:/opt/cni/plugins:ro" in truenas.node["binds"]
    assert truenas.node["network"] == "k3d-truenas"
    assert truenas.node["attached"] == [LAN]
    (network,) = (truenas.world / "docker" / "network").glob(f"*{LAN}*")
    made = json.loads(network.read_text())
    assert (made["driver"], made["options"]["parent"]) == ("macvlan", "br0")


def test_the_networks_of_the_document_are_there_with_ranges_of_their_own(truenas):
    lan = truenas.attachment("lan")
    assert (lan["type"], lan["master"], lan["mode"]) == ("macvlan", "eth1", "bridge")
    assert lan["ipam"]["ranges"] == [
        [
            {
                "subnet": "192.168.1.0/24",
                "rangeStart": "192.168.1.208",
                "rangeEnd": "192.168.1.223",
            }
        ]
    ]
    assert truenas.attachment("lan-fixed")["capabilities"] == {"ips": True}
    assert truenas.attachment("lan-dhcp")["ipam"] == {"type": "dhcp"}
    assert truenas.attachment("internal")["type"] == "bridge"


def test_each_edit_is_previewed_exactly_and_applied(truenas):
    def edit(expected: set[str], change: Any) -> None:
        with truenas.edited() as settings:
            change(settings["network"])
        assert planned(truenas.preview()) == expected
        assert planned(truenas.up()) == expected
        assert planned(truenas.preview()) == set()

    edit(
        {"update NetworkAttachmentDefinition default/lan"},
        lambda network: network["multus"]["networks"][0]["ipam"].update(
            range="192.168.1.208-192.168.1.215"
        ),
    )
    assert truenas.attachment("lan")["ipam"]["ranges"][0][0]["rangeEnd"] == "192.168.1.215"
    edit(
        {"delete DaemonSet cni-dhcp", "delete NetworkAttachmentDefinition default/lan-dhcp"},
        lambda network: network["multus"]["networks"].pop(2),
    )


def test_without_multus_the_node_leaves_the_lan_and_with_it_comes_back(truenas):
    with truenas.edited() as settings:
        multus = settings["network"].pop("multus")
    assert "delete Network lan" in planned(truenas.up())
    assert truenas.node["attached"] == []
    assert planned(truenas.preview()) == set()
    with truenas.edited() as settings:
        settings["network"]["multus"] = multus
    truenas.up()
    assert truenas.node["attached"] == [LAN]
    assert urns(truenas) == URNS.read_text().splitlines()


def test_a_node_that_lost_the_lan_is_told_and_connected_again(truenas):
    truenas.on_host("docker", "network", "disconnect", LAN, NODE)
    preview = truenas.preview()
    assert any("lan is []" in text for text in preview.diagnostics)
    assert planned(preview) == {"update Command cluster", "update Command acceptance"}
    truenas.up()
    assert truenas.node["attached"] == [LAN]
    assert planned(truenas.preview()) == set()


def test_an_interface_that_the_host_lacks_is_refused_before_anything(fresh):
    fresh.host.set("interfaces.json", ["lo", "eno1", "docker0"])
    refused = fresh.preview(check=False)
    (error,) = errors(refused)
    assert "the host has no br0; it has docker0, eno1, lo" in error
    assert "homelab:network.multus.interface" in error


def test_what_the_host_itself_listens_on_keeps_the_cluster_from_being_made(fresh):
    """Even where the settings do not know of it: a service that was moved, another app."""
    fresh.host.set("ports.json", [6443])
    fresh.host.set("listeners.json", {"6443": "haproxy"})
    warned = fresh.preview()
    assert any("port 6443 on 192.168.1.100 is in use by haproxy" in d for d in warned.diagnostics)
    failed = fresh.up(check=False)
    assert failed.code != 0
    assert "in use by haproxy" in failed.stdout
    assert not fresh.cluster_file.exists()


def test_missing_cni_plugins_keep_the_cluster_from_being_made(fresh):
    fresh.host_file("/mnt/tank/k3d/cni/macvlan").unlink()
    failed = fresh.up(check=False)
    assert failed.code != 0
    assert "/mnt/tank/k3d/cni has no macvlan" in failed.stdout
    assert not fresh.cluster_file.exists()


def test_a_cluster_that_sleeps_shows_edits_and_is_not_touched(truenas):
    with edited_file(truenas.cluster_file) as cluster:
        cluster["state"] = "stopped"
    with truenas.edited() as settings:
        settings["network"]["multus"]["networks"][0]["ipam"]["range"] = "192.168.1.208/29"
    preview = truenas.preview()
    assert "update NetworkAttachmentDefinition default/lan" in planned(preview)
    assert json.loads(truenas.cluster_file.read_text())["state"] == "stopped"


def test_a_newer_k3s_leaves_the_node_in_the_lan(truenas):
    with truenas.edited() as settings:
        settings["cluster"]["image"] = "rancher/k3s:v1.32.3-k3s1"
    truenas.up()
    assert truenas.node["image"] == "rancher/k3s:v1.32.3-k3s1"
    assert truenas.node["attached"] == [LAN]
    assert planned(truenas.preview()) == set()


def test_calico_takes_the_place_of_flannel_with_one_pod_range_everywhere(fresh):
    with fresh.edited() as settings:
        settings["cluster"] |= {"cni": "calico", "podSubnet": "10.50.0.0/16"}
    fresh.up()
    assert planned(fresh.up()) == set()
    (server, *arguments) = fresh.node["cmd"]
    assert server == "server"
    assert "--flannel-backend=none" in arguments
    assert "--disable-network-policy" in arguments
    assert "--cluster-cidr=10.50.0.0/16" in arguments
    (release,) = fresh.objects.glob("tigera-operator/Release.helm.sh/calico.json")
    network = json.loads(release.read_text())["values"]["installation"]["calicoNetwork"]
    assert [pool["cidr"] for pool in network["ipPools"]] == ["10.50.0.0/16"]
    assert network["containerIPForwarding"] == "Enabled"


def test_another_pod_network_is_no_edit_of_a_cluster_that_is_there(truenas):
    with truenas.edited() as settings:
        settings["cluster"]["cni"] = "calico"
    refused = truenas.preview(check=False)
    (error,) = errors(refused)
    assert "fixed when it is created" in error
    assert "--flannel-backend=none" in error
    assert "homelab:cluster.recreate" in error


def test_what_an_update_of_the_nas_left_behind_is_made_again(truenas):
    """docs/host.md: the system's own directories are those of the new version."""
    state, said = truenas.host_file("/var/lib/homelab"), []
    before = sorted(path.name for path in state.iterdir())
    before_cluster = truenas.outputs()["cluster"]
    shutil.rmtree(state)
    run_again(truenas.engine(said), truenas.settings["host"]["address"])
    assert sorted(path.name for path in state.iterdir()) == before
    assert truenas.outputs()["cluster"] == before_cluster
    assert planned(truenas.up()) == set()


def test_destroy_takes_out_the_cluster_its_networks_and_nothing_else(truenas):
    with truenas.edited() as settings:
        settings["cluster"]["delete"] = "truenas"
    truenas.up()
    truenas.destroy()
    assert truenas.resources() == []
    assert not truenas.cluster_file.exists()
    assert truenas.host_file("/mnt/tank/k3d/cni/macvlan").exists()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        stack = TrueNAS(Path(directory))
        stack.up()
        URNS.write_text("".join(f"{urn}\n" for urn in urns(stack)))


def test_status_and_doctor_with_the_cluster_up_down_and_the_host_out_of_reach(truenas):
    ran = run(truenas)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "homelab truenas start" in ran.stdout
    assert status(truenas, "--doctor").code == 0
    truenas.on_host("docker", "stop", "-t", "60", NODE)
    seen = status(truenas)
    assert seen.code == 1
    assert ("cluster", "truenas") in seen.of("bad")
    assert ("host", "homelab truenas clean") in seen.of("fine")
    (truenas.world / "machine" / "down").touch()
    for arguments in ([], ["--doctor"]):
        seen = status(truenas, *arguments)
        assert seen.code == 2
        assert seen.of("unknown") == {("host", "host 192.168.1.100")}
