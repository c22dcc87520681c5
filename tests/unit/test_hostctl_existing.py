"""hostctl on a cluster that is there already, and on MetalLB's webhook in it."""

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from hostctl.machine import Machine, Ran
from rehearsal import existing
from rehearsal.apiserver import ApiServer
from rehearsal.core import World
from rehearsal.providers.kubernetes import cluster_id
from tests.unit.test_hostctl import Host

CLUSTER = {
    "name": "metal",
    "kubeconfig": {
        "file": "/etc/kubernetes/admin.conf",
        "context": "kubernetes-admin@kubernetes",
    },
    "nodes": {
        "control-plane": {"address": "192.168.1.130"},
        "worker-1": {"address": "192.168.1.131"},
    },
}
FILE = "/etc/kubernetes/admin.conf"


class Metal(Host):
    """A host with the kubeconfig of a make-believe cluster, and what lives in that."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        existing.put(root / "world", CLUSTER)
        self.made = existing.made_up(CLUSTER)
        # The file's own current-context is another cluster's.
        config = yaml.safe_load(existing.kubeconfig(CLUSTER))
        config["clusters"] = [one for one in config["clusters"] if one["name"] == "kubernetes"]
        context = "kubernetes-admin@kubernetes"
        self.kubeconfig = yaml.safe_dump(config | {"current-context": context})
        self.machine.write_atomic(FILE, self.kubeconfig.encode(), 0o600)
        self.objects = World(root / "world" / "kubernetes")
        self.inside = ApiServer(self.objects, cluster_id(self.made["ca"]))

    def look(self, code: int = 0, kubeconfig: str | None = None) -> Any:
        spec = {"name": "metal", "kubeconfig": kubeconfig or self.kubeconfig}
        return self("cluster inspect", spec, code)

    def change_node(self, name: str, edit: Any) -> None:
        key = f"{self.inside.cluster}/_cluster/Node/{name}"
        node = self.objects.get(key)
        assert node
        edit(node)
        self.objects.put(key, node)

    def install_metallb(self) -> None:
        self.inside.create(
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "metallb-system"}},
            "test",
        )
        served = {"name": "v1beta1", "served": True, "storage": True, "schema": {}}
        self.inside.create(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {"name": "ipaddresspools.metallb.io"},
                "spec": {
                    "group": "metallb.io",
                    "names": {"kind": "IPAddressPool", "plural": "ipaddresspools"},
                    "scope": "Namespaced",
                    "versions": [served],
                },
            },
            "test",
        )

    def wait(self, code: int = 0, **changes: Any) -> Any:
        spec = {"kubeconfig": FILE, "namespace": "metallb-system", "seconds": 60, "chart": "0.16.1"}
        return self("metallb wait", spec | changes, code)


@pytest.fixture
def metal(tmp_path: Path) -> Metal:
    return Metal(tmp_path)


def test_a_cluster_that_answers_shows_its_nodes(metal: Metal) -> None:
    seen = metal.look()
    assert seen["state"] == "reachable"
    assert seen["nodes"] == {
        name: {
            "addresses": [node["address"]],
            "ready": True,
            "version": existing.VERSION,
            "excluded": False,
        }
        for name, node in CLUSTER["nodes"].items()
    }
    assert seen["servicelb"] == []


def test_a_lost_node_and_one_that_kubeadm_excludes_are_told(metal: Metal) -> None:
    def lose(node: Any) -> None:
        node["status"]["conditions"][0]["status"] = "Unknown"

    def label(node: Any) -> None:
        excluded = {"node.kubernetes.io/exclude-from-external-load-balancers": ""}
        node["metadata"]["labels"] = excluded

    metal.change_node("worker-1", lose)
    metal.change_node("control-plane", label)
    nodes = metal.look()["nodes"]
    assert (nodes["worker-1"]["ready"], nodes["control-plane"]["ready"]) == (False, True)
    assert nodes["control-plane"]["excluded"]


def test_a_cluster_that_does_not_answer_is_unreachable_and_not_absent(metal: Metal) -> None:
    metal.machine.world.put("existing/metal", metal.made | {"state": "stopped"})
    seen = metal.look()
    assert (seen["state"], seen["nodes"]) == ("unreachable", {})
    assert "192.168.1.130:6443" in seen["detail"]


def test_another_cluster_at_the_address_is_refused(metal: Metal) -> None:
    other = existing.made_up({**CLUSTER, "name": "other"})
    metal.machine.world.put("existing/metal", metal.made | {"ca": other["ca"]})
    error = metal.look(3)
    assert error["code"] == "refused"
    assert "another cluster" in error["cause"]


def test_without_kubectl_it_cannot_be_told(metal: Metal) -> None:
    metal.machine.set("missing-tools.json", ["kubectl"])
    assert metal.look(6)["code"] == "tool"


def test_k3ss_own_load_balancer_is_seen(metal: Metal) -> None:
    selector = {"app": "svclb"}
    metal.inside.create(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {
                "name": "svclb-traefik-0a1b2c3d",
                "namespace": "kube-system",
                "labels": {"svccontroller.k3s.cattle.io/svcname": "traefik"},
            },
            "spec": {
                "selector": {"matchLabels": selector},
                "template": {
                    "metadata": {"labels": selector},
                    "spec": {"containers": [{"name": "lb", "image": "rancher/klipper-lb:v0.4.9"}]},
                },
            },
        },
        "k3s",
    )
    assert metal.look()["servicelb"] == ["svclb-traefik-0a1b2c3d"]


def test_the_kubeconfig_is_in_no_argument_and_its_file_is_gone_afterwards(metal: Metal) -> None:
    metal.look()
    for key in ("certificate", "key"):
        assert metal.made[key] not in str(metal.calls) + metal.said
    assert not metal.machine.exists("/run/hostctl-private")


def test_a_private_file_of_a_real_machine_is_for_this_user_alone_and_goes() -> None:
    with Machine().private_file(b"canary") as path:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        for _ in range(2):
            assert subprocess.run(["cat", path], capture_output=True).stdout == b"canary"
        assert os.readlink(path).startswith("/memfd:")
    assert not os.path.exists(path)
    with pytest.raises(KeyError), Machine().private_file(b"canary") as path:
        raise KeyError
    assert not os.path.exists(path)


def test_owners_are_asked_for_with_the_kubeconfig_that_is_given(metal: Metal) -> None:
    metal.install_metallb()
    spec = {"cluster": "metal", "kinds": ["Namespace"], "kubeconfig": metal.kubeconfig}
    objects = metal("cluster owners", spec)["objects"]
    [one] = [one for one in objects if one["name"] == "metallb-system"]
    assert (one["owners"], one["maker"]) == ([], "test")
    assert not any(call[0] == "docker" for call in metal.calls)


def test_a_webhook_that_answers_is_not_waited_for_and_nothing_is_made(metal: Metal) -> None:
    metal.install_metallb()
    assert metal.wait()["waited"] == 0
    assert not list(metal.objects.root.rglob("IPAddressPool.metallb.io/*"))


def test_a_webhook_that_comes_later_than_its_pods_is_waited_for(metal: Metal) -> None:
    metal.install_metallb()
    metal.objects.put("webhooks", {"metallb": 3})
    assert metal.wait()["waited"] >= 15
    assert "failed calling webhook" in metal.said


def test_definitions_that_are_not_there_yet_are_waited_for_and_the_wait_is_bounded(
    metal: Metal,
) -> None:
    error = metal.wait(7)
    assert error["code"] == "timed-out"
    assert "no matches for kind" in error["cause"]


def test_a_webhook_that_never_answers_names_the_cause_and_the_remedy(metal: Metal) -> None:
    metal.install_metallb()
    metal.objects.put("webhooks", {"metallb": "never"})
    error = metal.wait(7)
    assert "connection refused" in error["cause"]
    assert "get pods" in error["remedy"]


def test_a_pool_that_the_webhook_refuses_is_an_answer(metal: Metal) -> None:
    metal.install_metallb()
    pool = {
        "apiVersion": "metallb.io/v1beta1",
        "kind": "IPAddressPool",
        "metadata": {"name": "documents", "namespace": "metallb-system"},
        "spec": {"addresses": ["192.0.2.0/30"]},
    }
    metal.inside.create(pool, "test")
    assert metal.wait()["waited"] == 0


def test_whoever_may_not_make_pools_is_told_at_once(metal: Metal, monkeypatch: Any) -> None:
    forbidden = b'Error from server (Forbidden): ipaddresspools.metallb.io is forbidden: User "x"\n'
    monkeypatch.setattr(metal.machine, "run", lambda *_, **__: Ran(1, b"", forbidden))
    assert "is forbidden" in metal.wait(5)["cause"]
