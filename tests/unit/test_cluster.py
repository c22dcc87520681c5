"""The cluster: what is fixed at creation is refused, the rest healed; identity, not content, ties
what lives in it to it.
"""

import json
import re
from typing import Any

import pulumi
import pulumi_docker as docker
import pulumi_kubernetes as kubernetes
import pytest

from components import settings
from components.cluster import Cluster
from components.cluster.k3d import K3dCluster, K3dClusterArgs, LiveCluster, server_url
from components.cluster.kubeconfig import Kubeconfig, KubeconfigArgs
from components.host import Connection, Host, HostError
from components.storage.local import LocalStorage, LocalStorageArgs
from tests.unit.conftest import UNKNOWN

IMAGE = "rancher/k3s:v1.31.5-k3s1"
KUBECONFIG = (
    "apiVersion: v1\nclusters: [{name: k3d-factory, cluster: {server: 'https://127.0.0.1:6443'}}]\n"
)


def cluster(**rest: Any) -> settings.K3dCluster:
    return settings.K3dCluster.model_validate({"image": IMAGE, **rest}, by_name=True)


def live(**rest: Any) -> LiveCluster:
    facts = {
        "state": "running",
        "identity": "factory-0123456789abcdef",
        "generation": 3,
        "incarnation": "ab12cd34-1",
        "certificate_generation": 2,
    }
    return LiveCluster(**{**facts, **rest})


def answers(args: Any) -> dict[str, Any]:
    verb = args.inputs["create"].partition("hostctl ")[2]
    result: dict[str, Any] = {"ok": True}
    if verb == "k3d ensure":
        result["cluster"] = {"k3s_version": "v1.31.5+k3s1"}
    elif verb == "k3d accept":
        result["acceptance"] = {"state": "passed", "detail": "a pod resolves it", "remedy": ""}
    elif verb == "k3d identity":
        result["identity"] = "factory-0123456789abcdef"
    elif verb == "kubeconfig":
        result["kubeconfig"] = KUBECONFIG
    return {"stdout": json.dumps(result)}


@pytest.fixture
def register(run_program):
    def run(declared: settings.K3dCluster, seen: LiveCluster, **mocks: Any):
        def program() -> None:
            host = Host("p510", Connection(settings.Host()))
            engine = docker.Provider("docker", host="unix:///var/run/docker.sock")
            made = K3dCluster("factory", K3dClusterArgs(declared, seen, host, engine))
            Kubeconfig("factory", KubeconfigArgs(declared, seen, host, made))
            made.accept()

        return run_program(program, **{"outputs": {"Command": answers}, **mocks})

    return run


def test_the_network_comes_before_the_cluster(register):
    resources = register(cluster(), live())
    network = resources["Network", "network"]
    assert network.inputs["name"] == "k3d-factory"
    assert network.inputs["ipamConfigs"] == [{"subnet": "172.30.0.0/16", "gateway": "172.30.0.1"}]
    assert network.protect
    assert ("Network", "network") in resources["Command", "cluster"].depends_on


def test_with_several_servers_k3d_makes_the_network_itself(register):
    assert register(cluster(servers=3), live()).names("Network") == []


def test_the_cluster_is_protected_until_its_name_is_typed(register):
    assert register(cluster(), live())["Command", "cluster"].protect
    deletable = register(cluster(delete="factory"), live())
    assert not deletable["Command", "cluster"].protect
    assert not deletable["Network", "network"].protect
    assert json.loads(deletable["Command", "cluster"].inputs["stdin"])["confirm"] == "factory"


def test_every_setting_of_the_cluster_reaches_the_host(register):
    declared = cluster(
        agents=2,
        disable=["traefik"],
        api={"bind": "100.64.0.1", "port": 7443},
        resolvers=["9.9.9.9"],
        storage_dir="/data/k3d",
        datastore_dir="/ssd/k3d",
        secrets_encryption=True,
        cni="calico",
        pod_subnet="10.50.0.0/16",
        cni_plugins="/data/cni",
        k3s_args=["--kubelet-arg=max-pods=200"],
        ports=[{"host_port": 8080, "container_port": 80}],
        api_wait_seconds=60,
    )
    spec = json.loads(register(declared, live())["Command", "cluster"].inputs["stdin"])
    assert spec == {
        "name": "factory",
        "image": IMAGE,
        "servers": 1,
        "agents": 2,
        "disable": ["traefik"],
        "api": {"bind": "100.64.0.1", "port": 7443, "server_name": None},
        "resolvers": ["9.9.9.9"],
        "storage_dir": "/data/k3d",
        "datastore_dir": "/ssd/k3d",
        "secrets_encryption": True,
        "network": {"name": "k3d-factory", "subnet": "172.30.0.0/16"},
        "cni_plugins": "/data/cni",
        "lan_network": None,
        "lan_interface": None,
        "k3s_args": [
            "--flannel-backend=none",
            "--disable-network-policy",
            "--cluster-cidr=10.50.0.0/16",
            "--kubelet-arg=max-pods=200",
        ],
        "audit": None,
        "ports": [
            {"host_port": 8080, "container_port": 80, "bind": "127.0.0.1", "protocol": "tcp"}
        ],
        "api_wait_seconds": 60,
        "recreate": None,
        "confirm": None,
        "generation": 3,
        "incarnation": "ab12cd34-1",
    }


def seconds(timeout: str) -> int:
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(count) * units[unit] for count, unit in re.findall(r"([0-9]+)([hms])", timeout))


def test_incident_04_the_engine_waits_longer_than_hostctl(register):
    """Otherwise the engine ends hostctl while it waits, which may be twice: for k3d and the API."""
    for wait in (60, 1800):
        timeouts = register(cluster(api_wait_seconds=wait), live())["Command", "cluster"].timeouts
        assert min(map(seconds, (timeouts["create"], timeouts["update"]))) > 2 * wait


def test_a_recreate_has_the_time_for_its_backup(register):
    declared = cluster(recreate="factory")
    timeouts = register(declared, live())["Command", "cluster"].timeouts
    assert seconds(timeouts["update"]) > 24 * 3600


def test_only_the_incarnation_replaces_the_identity(register):
    def inputs(seen: LiveCluster, **declared: Any) -> dict[str, Any]:
        return register(cluster(**declared), seen)["Command", "identity"].inputs

    same = inputs(live())
    assert inputs(live(state="stopped", generation=4, certificate_generation=9)) == same
    assert inputs(live(), api_wait_seconds=60, recreate="factory") == same
    assert inputs(live(incarnation="ab12cd34-2"))["triggers"] == ["ab12cd34-2"]
    assert same["triggers"] == ["ab12cd34-1"]


def test_no_edit_of_the_cluster_touches_the_kubeconfig(register):
    def inputs(seen: LiveCluster, **declared: Any) -> dict[str, Any]:
        return register(cluster(**declared), seen)["Command", "kubeconfig"].inputs

    same = inputs(live())
    assert inputs(live(state="stopped", generation=4), api_wait_seconds=60) == same
    rotated = inputs(live(certificate_generation=3))
    assert rotated["triggers"] == same["triggers"] == ["ab12cd34-1"]
    assert rotated["stdin"] != same["stdin"]


def test_the_kubeconfig_is_secret_and_its_file_private(register):
    resources = register(cluster(), live())
    command = resources["Command", "kubeconfig"]
    spec = json.loads(command.inputs["stdin"])
    assert (spec["path"], spec["mode"]) == ("/etc/k3d/kubeconfig", "0640")
    assert (spec["owner"], spec["group"], spec["directory_mode"]) == ("root", "wheel", "0750")
    assert command.additional_secret_outputs == ["stdout", "stderr"]
    assert command.inputs["logging"] == "none"
    assert resources["Kubeconfig", "factory"].secret_outputs == {"content"}


def test_the_provider_hangs_on_the_identity_and_forgets_nothing(register):
    provider = register(cluster(), live())["kubernetes", "kubernetes"]
    assert provider.inputs["clusterIdentifier"] == "factory-0123456789abcdef"
    assert provider.inputs["kubeconfig"] == KUBECONFIG
    assert "kubeconfig" in provider.secrets
    assert provider.inputs["enableSecretMutable"] == "true"
    assert provider.inputs["enablePatchForce"] == "true"
    assert provider.inputs["deleteUnreachable"] == "false"


@pytest.mark.parametrize(
    ("state", "preview", "skips"),
    [
        ("running", True, "true"),
        ("running", False, "true"),
        ("stopped", True, "false"),
        ("stopped", False, "true"),
    ],
)
def test_only_the_preview_of_a_stopped_cluster_shows_edits_without_it(
    register, state, preview, skips
):
    """A provider that skips hides edits in Check; without skipping a refresh fails in Read."""
    resources = register(cluster(), live(state=state), preview=preview)
    assert resources["kubernetes", "kubernetes"].inputs["skipUpdateUnreachable"] == skips


def test_an_edit_of_how_the_host_is_reached_does_not_touch_the_identity(register):
    """The identity's command is another then, and its result unknown in the preview."""

    def identifier(seen: LiveCluster) -> Any:
        resources = register(cluster(recreate="factory"), seen, outputs={}, preview=True)
        return resources["kubernetes", "kubernetes"].inputs["clusterIdentifier"]

    assert identifier(live()) == "factory-0123456789abcdef"
    assert identifier(live(state="absent", identity=None)) == UNKNOWN
    assert identifier(live(differences=[{**MOVED, "key": "image"}])) == UNKNOWN
    swapped = live(differences=[{**MOVED, "key": "image", "fixed": False}])
    assert identifier(swapped) == "factory-0123456789abcdef"


def test_a_swap_of_the_node_has_time_for_its_backup(register):
    swapped = live(differences=[{**MOVED, "key": "image", "fixed": False}])
    timeouts = register(cluster(), swapped)["Command", "cluster"].timeouts
    assert int(timeouts["update"][:-1]) > 24 * 3600
    usual = register(cluster(), live())["Command", "cluster"].timeouts
    assert int(usual["update"][:-1]) < 2 * 3600


def test_images_of_files_are_imported_after_the_cluster_and_only_then(register):
    assert ("Command", "images") not in register(cluster(), live())
    files = [{"path": "/srv/a.tar", "sha256": "0" * 64}]
    made = register(cluster(), live(image_files=files))["Command", "images"]
    assert json.loads(made.inputs["stdin"]) == {
        "cluster": "factory",
        "files": files,
        "incarnation": "ab12cd34-1",
        "image": IMAGE,
    }
    assert ("Command", "cluster") in made.depends_on


def test_the_storage_class_keeps_volumes_at_a_path_that_a_new_cluster_finds(run_program):
    """local-path-provisioner refuses a pattern without the slash at its end (CVE-2025-62878)."""

    def program() -> None:
        provider = kubernetes.Provider("kubernetes", kubeconfig=KUBECONFIG)
        host = Host("p510", Connection(settings.Host()))
        identity = kubernetes.core.v1.Namespace("identity")
        inside = Cluster("factory", provider, identity, "/etc/k3d/kubeconfig", host, "1")
        LocalStorage("factory", LocalStorageArgs(cluster().storage_class, inside))

    made = run_program(program)["StorageClass", "local-retain"]
    assert made.inputs["parameters"] == {"pathPattern": "{{ .PVC.Namespace }}/{{ .PVC.Name }}/"}
    assert made.inputs["provisioner"] == "rancher.io/local-path"
    assert made.inputs["reclaimPolicy"] == "Retain"
    assert made.inputs["volumeBindingMode"] == "WaitForFirstConsumer"
    annotations = made.inputs["metadata"]["annotations"]
    assert annotations["storageclass.kubernetes.io/is-default-class"] == "true"
    assert made.parent == ("LocalStorage", "factory")
    assert made.deleted_with == ("Namespace", "identity")


def test_the_preview_of_a_rotated_certificate_knows_the_kubeconfig(register):
    rotated = f"{KUBECONFIG}\n# rotated"
    seen = live(kubeconfig=rotated)
    resources = register(cluster(), seen, outputs={}, preview=True)
    provider = resources["kubernetes", "kubernetes"]
    assert provider.inputs["kubeconfig"] == rotated
    assert "kubeconfig" in provider.secrets
    assert ("Command", "kubeconfig") in provider.depends_on
    assert resources["Kubeconfig", "factory"].secret_outputs == {"content"}
    assert rotated not in repr(seen)


@pytest.mark.parametrize(
    ("preview", "changes", "asked"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"kubeconfig_behind": False}, False),
        (True, {"state": "stopped"}, False),
    ],
)
def test_the_administrators_key_travels_only_for_the_preview_of_a_rotation(
    monkeypatch, preview, changes, asked
):
    verbs = []

    def answers(_: Connection, questions: list[tuple[list[str], object]]) -> list[dict[str, Any]]:
        verbs.extend(verb for verb, _ in questions)
        facts = {"differences": [], "unseen": [], "kubeconfig_behind": True, "state": "running"}
        fixed = {"identity": "i", "generation": 1, "incarnation": "m-1"}
        accepted = {"acceptance": None, "acceptance_generation": 1, "warnings": []}
        answer = {**facts, **fixed, **accepted, "certificate_generation": 2, **changes}
        return [{"cluster": answer, "kubeconfig": KUBECONFIG}]

    monkeypatch.setattr(Connection, "answers", answers)
    monkeypatch.setattr(pulumi.runtime, "is_dry_run", lambda: preview)
    seen = Connection(settings.Host()).read(LiveCluster.read(cluster()))
    assert (["k3d", "kubeconfig"] in verbs) == asked
    assert seen.kubeconfig == (KUBECONFIG if asked else None)


def test_an_empty_kubeconfig_never_reaches_the_provider(register):
    """The provider would take the ambient ~/.kube/config and deploy to another cluster."""

    def empty(args: Any) -> dict[str, Any]:
        found = json.loads(answers(args)["stdout"])
        return {"stdout": json.dumps({**found, "kubeconfig": "apiVersion: v1\nclusters: []\n"})}

    with pytest.raises(Exception, match="without a cluster"):
        register(cluster(), live(), outputs={"Command": empty})


@pytest.mark.parametrize(
    ("api", "url"),
    [
        ({}, "https://127.0.0.1:6443"),
        ({"bind": "100.64.0.1", "port": 7443}, "https://100.64.0.1:7443"),
        ({"bind": "0.0.0.0", "server_name": "p510.example.org"}, "https://p510.example.org:6443"),
        ({"server_name": "fd00::1"}, "https://[fd00::1]:6443"),
    ],
)
def test_incident_14_the_server_is_an_address_that_clients_reach(api, url):
    assert server_url(cluster(api=api)) == url


MOVED = {
    "key": "storageDir",
    "declared": "/new",
    "live": "/old",
    "fixed": True,
    "remedy": "",
}


def test_incident_06_what_is_fixed_at_creation_is_refused_with_both_ways_out():
    seen = live(differences=[MOVED, {**MOVED, "key": "image", "declared": "b", "live": "a"}])
    with pytest.raises(HostError) as refusal:
        seen.refuse_fixed_differences(cluster())
    text = str(refusal.value)
    assert "homelab:cluster.storageDir: declared /new, live /old" in text
    assert "homelab:cluster.image: declared b, live a" in text
    assert "homelab:cluster.recreate: factory" in text
    assert "write the live value" in text


@pytest.mark.parametrize("key", ["network.name", "network.subnet", "servers"])
def test_a_recreate_is_not_offered_for_what_it_cannot_change(key):
    seen = live(differences=[{**MOVED, "key": key}])
    with pytest.raises(HostError) as refusal:
        seen.refuse_fixed_differences(cluster(recreate="factory"))
    assert "homelab:cluster.recreate" not in str(refusal.value)
    assert "homelab:cluster.delete" in str(refusal.value)


def test_a_recreate_needs_the_name_typed():
    seen = live(differences=[MOVED])
    seen.refuse_fixed_differences(cluster(recreate="factory"))
    seen = live(differences=[{**MOVED, "fixed": False}])
    seen.refuse_fixed_differences(cluster())


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (live(state="absent"), "does not exist on p510: up creates it"),
        (live(state="stopped"), "is stopped: up starts it"),
        (live(unseen=["namespaces: the API does not answer"]), "not seen: namespaces"),
    ],
)
def test_the_preview_says_what_up_will_do_and_what_it_could_not_see(
    run_program, caplog, seen, said
):
    caplog.set_level("INFO")
    run_program(lambda: seen.announce(cluster(), "p510"))
    assert said in caplog.text
