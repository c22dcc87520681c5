"""MetalLB and Traefik: what of 001 would fail if copied, and what must come before what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi_kubernetes as kubernetes
import pytest

from components import settings, versions
from components.cluster import Cluster
from components.host import Connection, Host
from components.network.metallb import MetalLB, MetalLBArgs
from components.network.traefik import Traefik, TraefikArgs
from tests.unit.conftest import Registered

ROOT = Path(__file__).parents[2]
POOLS = [
    {"name": "main-pool", "addresses": "192.168.1.240-192.168.1.245"},
    {"name": "spare", "addresses": "192.168.1.232/29", "autoAssign": False},
]
INGRESS = {"status": {"loadBalancer": {"ingress": [{"ip": "192.168.1.240"}]}}}


@pytest.fixture
def register(run_program: Callable[..., Registered]) -> Callable[..., Registered]:
    def run(metallb: dict[str, Any] | None = None, **traefik: Any) -> Registered:
        def program() -> None:
            host = Host("metal", Connection(settings.Host()))
            provider = kubernetes.Provider("kubernetes", kubeconfig="{}")
            path = "/var/lib/homelab/kubeconfigs/metal"
            cluster = Cluster("metal", provider, None, path, host, "metal-0123456789abcdef")
            balancer = settings.MetalLB.model_validate({"pools": POOLS, **(metallb or {})})
            made = MetalLB("metal", MetalLBArgs(balancer, cluster))
            given = settings.Traefik.model_validate({"address": "192.168.1.240", **traefik})
            Traefik("metal", TraefikArgs(given, cluster, after=[made]))

        return run_program(program, outputs={"Service": INGRESS})

    return run


def values(registered: Registered, name: str) -> dict[str, Any]:
    return registered["Release", name].inputs["values"]


def test_both_parts_of_metallb_run_on_control_planes_and_each_toleration_is_there_once(
    register: Any,
) -> None:
    """X25: the speaker's are the chart's own, listed once more they would be double; the document
    forgets the controller's second."""
    given = values(register(), "metallb")
    assert given["controller"]["tolerations"] == [
        {"key": f"node-role.kubernetes.io/{role}", "operator": "Exists", "effect": "NoSchedule"}
        for role in ("control-plane", "master")
    ]
    assert given["speaker"] == {"tolerateMaster": True, "ignoreExcludeLB": True}
    assert given["frrk8s"] == {"enabled": False}


def test_the_speakers_namespace_lets_it_have_the_hosts_network(register: Any) -> None:
    labels = register()["Namespace", "metallb-system"].inputs["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "privileged"


def test_from_outside_only_what_has_callers_there_is_reached(register: Any) -> None:
    """MetalLB's controller by the API servers, whose address no setting tells, Traefik by all;
    metrics by pods alone."""
    registered = register()
    controller = registered["NetworkPolicy", "metallb-system/controller"].inputs["spec"]
    assert controller["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "controller"
    traefik = registered["NetworkPolicy", "traefik/traefik"].inputs["spec"]
    assert traefik["podSelector"] == {}
    for spec, outside, metrics in (
        (controller, [9443], [9120]),
        (traefik, ["web", "websecure"], ["metrics"]),
    ):
        assert spec["policyTypes"] == ["Ingress"]
        anyone, pods = spec["ingress"]
        assert [port["port"] for port in anyone["ports"]] == outside
        assert "from" not in anyone
        assert [port["port"] for port in pods["ports"]] == metrics
        assert pods["from"] == [{"namespaceSelector": {}}]
    for policy, release in (("metallb-system/controller", "metallb"), ("traefik/traefik",) * 2):
        name = release.rpartition("/")[2]
        assert ("NetworkPolicy", policy) in registered["Release", name].depends_on


def test_pools_come_after_the_webhook_and_the_webhook_after_the_release(register: Any) -> None:
    registered = register()
    webhook = "Command", "webhook"
    assert ("Release", "metallb") in registered[webhook].depends_on
    for pool in ("main-pool", "spare"):
        assert webhook in registered["IPAddressPool", pool].depends_on
        assert ("IPAddressPool", pool) in registered["L2Advertisement", "l2-adv"].depends_on
    spec = json.loads(registered[webhook].inputs["stdin"])
    assert spec["chart"].startswith(f"{versions.METALLB.version}-")


def test_pools_and_their_announcement_are_as_declared(register: Any) -> None:
    registered = register({"interfaces": ["enp1s0"]})
    assert registered["IPAddressPool", "main-pool"].inputs["spec"] == {
        "addresses": ["192.168.1.240-192.168.1.245"],
        "autoAssign": True,
    }
    assert registered["IPAddressPool", "spare"].inputs["spec"]["autoAssign"] is False
    assert registered["L2Advertisement", "l2-adv"].inputs["spec"] == {
        "ipAddressPools": ["main-pool", "spare"],
        "interfaces": ["enp1s0"],
    }
    assert "interfaces" not in register()["L2Advertisement", "l2-adv"].inputs["spec"]


def test_traefik_is_in_the_pods_network_on_any_node(register: Any) -> None:
    given = values(register(), "traefik")
    assert given["hostNetwork"] is False
    assert "nodeSelector" not in given


def test_a_rollout_never_starts_the_new_pod_before_the_old_one_has_let_go_of_the_volume(
    register: Any,
) -> None:
    """X27: with the chart's RollingUpdate the new one waits for ever (Multi-Attach error)."""
    given = values(register(storageClass="longhorn", volumeSize="1Gi"), "traefik")
    assert given["updateStrategy"] == {"type": "Recreate"}
    assert given["deployment"]["replicas"] == 1
    assert given["persistence"] == {
        "enabled": True,
        "name": "data",
        "accessMode": "ReadWriteOnce",
        "size": "1Gi",
        "path": "/data",
        "storageClass": "longhorn",
    }


def test_traefik_is_no_root_and_only_the_init_container_is(register: Any) -> None:
    """X26: where the chart looks for init containers. X28: a failed chown is not hidden, the image
    is pinned, and the pod's runAsNonRoot is lifted for it alone."""
    given = values(register(), "traefik")
    assert "initContainers" not in given
    pod = given["podSecurityContext"]
    assert (pod["runAsUser"], pod["runAsNonRoot"], pod["fsGroup"]) == (65532, True, 65532)
    (init,) = given["deployment"]["initContainers"]
    assert (init["securityContext"]["runAsUser"], init["securityContext"]["runAsNonRoot"]) == (
        0,
        False,
    )
    assert init["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert init["image"] == versions.BUSYBOX
    shell, flag, script = init["command"]
    assert (shell, flag) == ("sh", "-c")
    assert "||" not in script
    assert init["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]


def test_traefik_has_its_fixed_address_of_the_pools_and_says_which_it_got(register: Any) -> None:
    registered = register()
    service = registered["Service", "traefik"]
    assert service.inputs["spec"]["type"] == "LoadBalancer"
    annotations = service.inputs["metadata"]["annotations"]
    assert annotations == {"metallb.io/loadBalancerIPs": "192.168.1.240"}
    assert ("L2Advertisement", "l2-adv") in service.depends_on
    assert registered["Traefik", "metal"].outputs == {"address": "192.168.1.240"}
    selector = service.inputs["spec"]["selector"]
    label = values(registered, "traefik")["instanceLabelOverride"]
    assert selector["app.kubernetes.io/instance"] == label


@pytest.mark.parametrize(
    ("challenge", "proof"),
    [("tls", {"tlsChallenge": True}), ("http", {"httpChallenge": {"entryPoint": "web"}})],
)
def test_certificates_are_kept_on_the_volume(register: Any, challenge: str, proof: Any) -> None:
    acme = {"email": "someone@example.org", "challenge": challenge}
    (resolver,) = values(register(acme=acme), "traefik")["certificatesResolvers"].values()
    assert resolver["acme"] == {
        "email": "someone@example.org",
        "storage": "/data/acme.json",
        **proof,
    }
    assert "certificatesResolvers" not in values(register(), "traefik")


def test_a_rehearsal_can_fetch_what_a_real_run_fetches() -> None:
    offered = json.loads((ROOT / "rehearsal" / "charts.json").read_text())
    for chart in (versions.METALLB, versions.TRAEFIK):
        assert f"{chart.repository}/{chart.name}@{chart.version}" in offered
