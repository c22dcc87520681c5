"""Tiers of storage: one default among them, what each class is, and what keeps data from harm."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import pytest
import yaml

from components import settings, versions
from components.cluster import Cluster
from components.host import Connection, Host, HostError, Question
from components.namespaces import Namespaces, NamespacesArgs
from components.settings.fleet import Stack, collisions
from components.settings.problem import key_path
from components.storage import live
from components.storage.tiers import DEFAULT, Storage, StorageArgs
from policy import rules
from tests.unit.conftest import Registered
from tests.unit.test_policy import violations

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "storage.md").read_text()
EXAMPLE: dict[str, Any] = {
    key.removeprefix("homelab:"): value
    for key, value in yaml.safe_load(
        "".join(re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S))
    ).items()
}


def stack(**storage: Any) -> settings.Settings:
    """The page's example, which has a class of each kind, with another section `storage`."""
    changed = {**EXAMPLE, "storage": {**EXAMPLE["storage"], **storage}}
    return settings.Settings.model_validate(changed, by_alias=True, by_name=False)


@pytest.fixture
def registered(run_program: Callable[..., Registered]) -> Registered:
    def program() -> None:
        declared = stack()
        host = Host("tower", Connection(settings.Host()))
        provider = kubernetes.Provider("kubernetes", kubeconfig="{}")
        cluster = Cluster("tower", provider, None, "/kubeconfig", host, "tower-0123456789abcdef")
        owners = declared.declared_namespaces()
        security = declared.pod_security()
        namespaces = Namespaces("tower", NamespacesArgs(owners, cluster, security=security))
        Storage("tower", StorageArgs(declared.storage, cluster, after=[namespaces]))

    return run_program(program)


def test_exactly_one_class_bears_the_mark_and_it_is_the_one_that_is_named(
    registered: Registered,
) -> None:
    marks = {
        name: registered["StorageClass", name].inputs["metadata"]["annotations"][DEFAULT]
        for name in registered.names("StorageClass")
    }
    assert marks == {name: str(name == "longhorn-ssd").lower() for name in stack().storage.classes}


def test_longhorns_own_class_is_no_default_and_keeps_what_it_made(registered: Registered) -> None:
    """X38: the chart's class has 3 replicas, deletes, and makes itself the default."""
    values = registered["Release", "longhorn"].inputs["values"]
    assert values["persistence"] == {
        "defaultClass": False,
        "defaultClassReplicaCount": 2,
        "reclaimPolicy": "Retain",
    }


def test_longhorns_page_has_no_port_on_the_nodes(registered: Registered) -> None:
    """X10: it has no login."""
    assert registered["Release", "longhorn"].inputs["values"]["service"]["ui"] == {
        "type": "ClusterIP"
    }


def test_each_class_has_the_parameters_that_its_driver_reads(registered: Registered) -> None:
    def parameters(name: str) -> dict[str, str]:
        return registered["StorageClass", name].inputs["parameters"]

    longhorn = registered["StorageClass", "longhorn-ssd"].inputs
    assert longhorn["provisioner"] == "driver.longhorn.io"
    assert longhorn["allowVolumeExpansion"] is True
    assert longhorn["mountOptions"] == ["noatime"]
    assert longhorn["parameters"]["numberOfReplicas"] == "2"
    assert longhorn["parameters"]["dataLocality"] == "best-effort"
    assert longhorn["parameters"]["encrypted"] == "true"
    for role in ("provisioner", "node-publish", "node-stage"):
        key = f"csi.storage.k8s.io/{role}-secret"
        assert longhorn["parameters"][f"{key}-name"] == "volume-key"
        assert longhorn["parameters"][f"{key}-namespace"] == "longhorn-system"
    assert registered["StorageClass", "nfs-bulk"].inputs["provisioner"] == "nfs.csi.k8s.io"
    assert parameters("nfs-bulk") == {
        "server": "10.89.97.101",
        "share": "/vault/k8s-volumes",
        "subDir": "${pvc.metadata.namespace}/${pvc.metadata.name}",
        "onDelete": "retain",
    }
    assert parameters("scratch") == {"pathPattern": "{{ .PVC.Namespace }}/{{ .PVC.Name }}/"}
    assert registered["StorageClass", "ceph-rbd"].inputs["provisioner"] == (
        "rook-ceph.rbd.csi.ceph.com"
    )
    assert parameters("ceph-rbd")["pool"] == "ceph-rbd"
    assert parameters("cephfs")["fsName"] == "cephfs"
    assert parameters("cephfs")["pool"] == "cephfs-data0"


def test_a_deleted_claim_leaves_its_volume_unless_the_class_says_otherwise(
    registered: Registered,
) -> None:
    """X42: Kubernetes' own default erases the data."""
    policies = {
        name: registered["StorageClass", name].inputs["reclaimPolicy"]
        for name in registered.names("StorageClass")
    }
    assert policies.pop("scratch") == "Delete"
    assert set(policies.values()) == {"Retain"}


def test_a_disk_of_one_node_is_chosen_where_the_pod_runs(registered: Registered) -> None:
    """X39: without it the volume is made on a node where the pod may not run."""
    for name in ("scratch", "nas-block"):
        binding = registered["StorageClass", name].inputs["volumeBindingMode"]
        assert binding == "WaitForFirstConsumer"


def test_what_the_api_server_lets_nobody_change_is_made_anew(registered: Registered) -> None:
    made = registered["StorageClass", "longhorn-ssd"]
    assert made.delete_before_replace
    assert not made.protect


def test_what_holds_data_is_protected_and_what_does_not_is_free(registered: Registered) -> None:
    protected = {key for key in registered if registered[key].protect}
    assert protected == {
        ("Release", "longhorn"),
        ("Release", "rook-ceph"),
        ("CephCluster", "rook-ceph"),
        ("CephBlockPool", "ceph-rbd"),
        ("CephFilesystem", "cephfs"),
    }


def test_drivers_come_before_their_classes_and_custom_resources_after_their_kinds(
    registered: Registered,
) -> None:
    needs = {
        ("StorageClass", "longhorn-ssd"): ("Release", "longhorn"),
        ("RecurringJob", "nightly"): ("Release", "longhorn"),
        ("StorageClass", "nfs-bulk"): ("Release", "csi-driver-nfs"),
        ("StorageClass", "scratch"): ("Deployment", "local-path-provisioner"),
        ("CephCluster", "rook-ceph"): ("Release", "rook-ceph"),
        ("CephBlockPool", "ceph-rbd"): ("CephCluster", "rook-ceph"),
        ("StorageClass", "ceph-rbd"): ("CephBlockPool", "ceph-rbd"),
        ("StorageClass", "cephfs"): ("CephFilesystem", "cephfs"),
        ("PersistentVolume", "postgres"): ("StorageClass", "nas-block"),
    }
    for key, first in needs.items():
        assert first in registered[key].depends_on, key


def test_a_lun_is_a_volume_that_stays_with_its_login_in_a_secret(registered: Registered) -> None:
    spec = registered["PersistentVolume", "postgres"].inputs["spec"]
    assert spec["iscsi"] == {
        "targetPortal": "10.89.97.101:3260",
        "iqn": "iqn.2005-10.org.freenas.ctl:k8s-postgres",
        "lun": 0,
        "fsType": "ext4",
        "chapAuthSession": True,
        "secretRef": {"namespace": "media", "name": "nas-chap"},
    }
    assert spec["persistentVolumeReclaimPolicy"] == "Retain"
    assert spec["accessModes"] == ["ReadWriteOnce"]
    assert spec["claimRef"] == {"namespace": "media", "name": "postgres-data"}
    nas = registered["StorageClass", "nas-block"].inputs
    assert nas["provisioner"] == "kubernetes.io/no-provisioner"
    assert nas["allowVolumeExpansion"] is False


def test_backups_name_their_target_and_their_secret_and_hold_no_key(registered: Registered) -> None:
    store = registered["Release", "longhorn"].inputs["values"]["defaultBackupStore"]
    assert store == {
        "backupTarget": "s3://tower-backups@us-east-1/",
        "backupTargetCredentialSecret": "backup-keys",
    }
    job = registered["RecurringJob", "nightly"].inputs["spec"]
    assert (job["task"], job["cron"], job["retain"]) == ("backup", "0 3 * * *", 7)
    assert job["groups"] == ["default"]


def test_ceph_takes_the_named_disks_and_no_other(registered: Registered) -> None:
    storage = registered["CephCluster", "rook-ceph"].inputs["spec"]["storage"]
    assert storage["useAllNodes"] is storage["useAllDevices"] is False
    assert [node["name"] for node in storage["nodes"]] == [
        "k3s-master", "k3s-worker-1", "k3s-worker-2",
    ]  # fmt: skip
    pool = registered["CephBlockPool", "ceph-rbd"].inputs["spec"]
    assert pool["failureDomain"] == "host"
    assert pool["replicated"] == {"size": 3, "requireSafeReplicaSize": True}


def test_drivers_run_in_namespaces_that_let_them_near_the_node(registered: Registered) -> None:
    for name in ("longhorn-system", "csi-nfs", "rook-ceph", "local-path-storage"):
        labels = registered["Namespace", name].inputs["metadata"]["labels"]
        assert labels["pod-security.kubernetes.io/enforce"] == "privileged"
    labels = registered["Namespace", "media"].inputs["metadata"]["labels"]
    assert "pod-security.kubernetes.io/enforce" not in labels


def test_the_stacks_own_provisioner_has_neither_root_nor_privilege(registered: Registered) -> None:
    deployment = registered["Deployment", "local-path-provisioner"].inputs
    for rule in (rules.workloads_are_unprivileged, rules.containers_do_not_run_as_root):
        assert violations(rule, "kubernetes:apps/v1:Deployment", deployment) == []


def test_charts_are_those_that_are_pinned(registered: Registered) -> None:
    for chart in (versions.LONGHORN, versions.CSI_DRIVER_NFS, versions.ROOK_CEPH):
        release = registered["Release", chart.name].inputs
        assert (release["chart"], release["version"]) == (chart.name, chart.version)
        assert release["repositoryOpts"] == {"repo": chart.repository}


class Answers(Connection):
    """A host whose hostctl answers what a test says."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(settings.Host())
        self.answer = answer
        self.asked: list[dict[str, Any]] = []

    def answers(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        self.asked.extend(dict(spec) for _, spec in questions)
        return [self.answer for _ in questions]


def node(initiator: str, *findings: tuple[str, str]) -> Answers:
    found = [{"severity": s, "what": what, "remedy": "mend it"} for s, what in findings]
    return Answers({"findings": found, "initiator": initiator})


def test_nodes_are_refused_with_all_that_they_lack_at_once() -> None:
    nodes = {
        "k3s-master": node("iqn.a", ("error", "iscsiadm is missing")),
        "k3s-worker-1": node("iqn.b", ("error", "the kernel has no module nfs")),
        "k3s-worker-2": node("iqn.c"),
    }
    with pytest.raises(HostError) as refusal:
        live.check_nodes(stack().storage, nodes, list(nodes))
    assert "node k3s-master: iscsiadm is missing" in str(refusal.value)
    assert "node k3s-worker-1: the kernel has no module nfs" in str(refusal.value)
    assert "nothing was changed" in str(refusal.value)
    (asked,) = nodes["k3s-worker-2"].asked
    assert asked["disks"] == ["/dev/disk/by-id/ata-EXAMPLE_3"]
    assert set(asked["needs"]) == {"iscsi", "nfs-client", "crypt", "nfs", "ceph"}


def test_copied_machines_with_one_iscsi_name_are_refused() -> None:
    nodes = {"k3s-master": node("iqn.same"), "k3s-worker-1": node("iqn.same")}
    with pytest.raises(HostError, match="k3s-master, k3s-worker-1 have the same iSCSI name"):
        live.check_nodes(stack().storage, nodes, list(nodes))


def test_nodes_that_nobody_can_log_in_to_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "warn", said.append)
    live.check_nodes(
        stack().storage,
        {"k3s-master": node("iqn.a", ("warning", "multipathd runs"))},
        ["k3s-master", "k3s-worker-1"],
    )
    assert any("multipathd runs" in text for text in said)
    assert any("k3s-worker-1 cannot be looked at" in text for text in said)


class Lost(Answers):
    """A node that does not answer."""

    def answers(self, questions: Any) -> list[dict[str, Any]]:
        raise HostError("host 10.89.97.202 does not answer")


def test_a_lost_node_is_named_and_keeps_nobody_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(pulumi.log, "warn", said.append)
    nodes = {"k3s-master": node("iqn.a"), "k3s-worker-1": Lost({})}
    live.check_nodes(stack().storage, nodes, list(nodes))
    (warning,) = said
    assert "k3s-worker-1: host 10.89.97.202 does not answer" in warning


def test_a_tier_of_local_paths_asks_nothing_of_a_node() -> None:
    classes = {"scratch": {"kind": "local-path"}}
    cluster = {**EXAMPLE["cluster"], "storageClass": "scratch"}
    storage = {"default": "scratch", "classes": classes}
    declared = settings.Settings.model_validate({"cluster": cluster, "storage": storage})
    asked = node("iqn.a", ("error", "never looked at"))
    live.check_nodes(declared.storage, {"k3s-master": asked}, ["k3s-master"])
    assert asked.asked == []


OURS = "homelab-storage"


def inspected(classes: dict[str, Any], volumes: dict[str, Any] | None = None) -> Answers:
    return Answers({"state": "known", "detail": "", "classes": classes, "volumes": volumes or {}})


def existing(default: bool = False, part_of: str = OURS, provisioner: str = "x") -> dict[str, Any]:
    return {"default": default, "provisioner": provisioner, "part_of": part_of}


def bound(of: str, claim: str, phase: str = "Bound", part_of: str = "") -> dict[str, Any]:
    return {"class": of, "phase": phase, "claim": claim, "part_of": part_of}


def test_a_class_of_somebody_else_that_is_marked_as_default_is_refused() -> None:
    live_classes = {
        "longhorn-ssd": existing(default=True),
        "local-path": existing(True, "", "rancher.io/local-path"),
    }
    with pytest.raises(HostError) as refusal:
        inspected(live_classes).read(live.check_classes(stack().storage, "tower", "text"))
    assert "local-path (rancher.io/local-path)" in str(refusal.value)
    assert "--disable=local-storage" in str(refusal.value)


@pytest.mark.parametrize(
    ("others", "own", "refused"),
    [
        ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", False),
        ("2026-01-03T00:00:00Z", "2026-01-02T00:00:00Z", True),
        # Of the same second the first by name.
        ("2026-01-02T00:00:00Z", "2026-01-02T00:00:00Z", True),
    ],
)
def test_without_tiers_the_class_of_the_stack_is_the_one_that_claims_get(
    others: str, own: str, refused: bool
) -> None:
    classes = {
        "local-path": {**existing(True, ""), "created": others},
        # Its mark is not there yet, and will be.
        "local-retain": {**existing(False, ""), "created": own},
    }
    p510 = settings.Settings.model_validate({"cluster": {"image": versions.K3S}})
    asked = live.check_classes(p510.storage, "factory", None, p510.storage_class)
    if not refused:
        return inspected(classes).read(asked)
    with pytest.raises(HostError) as refusal:
        inspected(classes).read(asked)
    assert "get local-path, which is newer than local-retain" in str(refusal.value)
    assert "kubectl delete storageclass local-retain" in str(refusal.value)


def test_a_class_that_is_to_be_made_will_be_the_newest() -> None:
    p510 = settings.Settings.model_validate({"cluster": {"image": versions.K3S}})
    there = {"local-path": {**existing(True, ""), "created": "2026-01-01T00:00:00Z"}}
    inspected(there).read(live.check_classes(p510.storage, "f", None, p510.storage_class))


def test_the_default_may_move_from_one_of_our_classes_to_another() -> None:
    live_classes = {"longhorn-ssd": existing(), "nfs-bulk": existing(default=True)}
    inspected(live_classes).read(live.check_classes(stack().storage, "tower", "text"))


def test_a_class_that_claims_hold_cannot_be_taken_out() -> None:
    seen = inspected(
        {"old": existing(), "foreign": existing(part_of="")},
        {
            "pvc-1": bound("old", "media/library"),
            "pvc-2": bound("old", "media/gone", phase="Released"),
            "pvc-3": bound("foreign", "media/other"),
        },
    )
    with pytest.raises(HostError) as refusal:
        seen.read(live.check_classes(stack().storage, "tower", "text"))
    assert "class old is not declared any more" in str(refusal.value)
    assert "1 claim(s) have volumes of it: media/library." in str(refusal.value)
    assert "foreign" not in str(refusal.value)


def test_a_class_that_no_claim_holds_can() -> None:
    seen = inspected({"old": existing()}, {"pvc-2": bound("old", "media/gone", phase="Released")})
    seen.read(live.check_classes(stack().storage, "tower", "text"))


def test_a_lun_that_a_claim_holds_cannot_be_taken_out() -> None:
    seen = inspected({}, {"former": bound("nas-block", "media/db", part_of=OURS)})
    with pytest.raises(HostError, match="volume former is not declared any more, but claim media"):
        seen.read(live.check_classes(stack().storage, "tower", "text"))


def test_two_stacks_cannot_have_the_same_lun_or_the_same_nfs_directory() -> None:
    one, other = Stack.of("one", stack()), Stack.of("other", stack())
    found = {key_path(problem.path): str(problem) for problem in collisions(one, other)}
    lun = "homelab:storage.classes.nas-block.volumes.postgres"
    share = "homelab:storage.classes.nfs-bulk.share"
    assert f"is also the iSCSI LUN in Pulumi.other.yaml, {lun}" in found[lun]
    assert f"is also the NFS directory in Pulumi.other.yaml, {share}" in found[share]


def test_two_stacks_may_share_an_export_whose_directories_have_the_volumes_names() -> None:
    classes = {"nfs": {**EXAMPLE["storage"]["classes"]["nfs-bulk"]}}
    classes["nfs"]["subDirectory"] = "${pv.metadata.name}"
    cluster = {**EXAMPLE["cluster"], "storageClass": "nfs"}
    storage = {"default": "nfs", "classes": classes}
    config = {"cluster": cluster, "storage": storage}
    both = [Stack.of(name, settings.Settings.model_validate(config)) for name in ("one", "other")]
    assert not [p for p in collisions(*both) if p.path[0] == "storage"]
