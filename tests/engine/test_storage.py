"""Tiers of storage in the engine: made, edited, and taken out only where no claim holds them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rehearsal.apiserver import ApiServer
from rehearsal.core import World
from tests.engine.conftest import edited_file, errors, planned
from tests.engine.test_metal import Metal

pytestmark = pytest.mark.engine

TIERS: dict[str, Any] = {
    "default": "longhorn-ssd",
    "classes": {
        "longhorn-ssd": {"kind": "longhorn", "replicas": 2},
        "nfs-bulk": {"kind": "nfs", "server": "192.168.1.10", "share": "/vault/k8s-volumes"},
        "nas-block": {
            "kind": "iscsi",
            "portal": "192.168.1.10",
            "volumes": {
                "postgres": {
                    "iqn": "iqn.2005-10.org.freenas.ctl:postgres",
                    "size": "20Gi",
                    "chap": {"namespace": "media", "name": "nas-chap"},
                }
            },
        },
        "scratch": {"kind": "local-path", "reclaimPolicy": "Delete"},
    },
    "longhorn": {
        "backups": {"target": "nfs://192.168.1.10:/vault/longhorn-backups"},
        "jobs": {"nightly": {"task": "backup", "cron": "0 3 * * *"}},
    },
    "localPath": {"provisioner": "stack"},
}
CHAP = {
    "type": "kubernetes.io/iscsi-chap",
    "files": {
        "node.session.auth.username": "/run/agenix/chap-user",
        "node.session.auth.password": "/run/agenix/chap-password",
    },
}


class Tiers(Metal):
    """metal with tiers in place of the Longhorn that was there."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self.edited() as settings:
            settings["cluster"]["storageClass"] = TIERS["default"]
            settings["network"].pop("traefik")
            settings["network"].pop("metallb")
            settings["storage"] = TIERS
            settings["secrets"] = {"media": {"nas-chap": CHAP}}

    @property
    def api(self) -> ApiServer:
        return ApiServer(World(self.world / "kubernetes"), self.objects.name)

    def marked(self) -> set[str]:
        """The classes that are marked as default."""
        classes = self.objects.glob("_cluster/StorageClass.storage.k8s.io/*.json")
        read = {file.stem: json.loads(file.read_text())["metadata"] for file in classes}
        mark = "storageclass.kubernetes.io/is-default-class"
        return {n for n, one in read.items() if one.get("annotations", {}).get(mark) == "true"}

    def bind(self, name: str, of: str, claim: str) -> Path:
        """A volume of a class that a claim has, as a driver makes it."""
        namespace, _, of_claim = claim.partition("/")
        self.api.create(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "storageClassName": of,
                    "claimRef": {"namespace": namespace, "name": of_claim},
                    "hostPath": {"path": "/made-up"},
                },
            },
            "driver",
        )
        file = self.objects / "_cluster" / "PersistentVolume" / f"{name}.json"
        with edited_file(file) as volume:
            volume["status"] = {"phase": "Bound"}
        return file


@pytest.fixture(scope="module")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> Tiers:
    stack = Tiers(tmp_path_factory.mktemp("tiers"))
    stack.up()
    return stack


@pytest.fixture
def tiers(brought_up: Tiers, tmp_path: Path) -> Any:
    return brought_up.copy(tmp_path / "tiers")


def test_once_up_nothing_is_left_to_do_and_one_class_is_the_default(tiers: Any) -> None:
    assert planned(tiers.up()) == set()
    assert planned(tiers.preview("--refresh")) == set()
    assert tiers.marked() == {"longhorn-ssd"}
    there = tiers.there()
    assert {
        "longhorn-system/Release.helm.sh/longhorn.json",
        "longhorn-system/RecurringJob.longhorn.io/nightly.json",
        "csi-nfs/Release.helm.sh/csi-driver-nfs.json",
        "local-path-storage/Deployment.apps/local-path-provisioner.json",
        "media/Secret/nas-chap.json",
        "_cluster/PersistentVolume/postgres.json",
    } <= there
    chap = json.loads((tiers.objects / "media" / "Secret" / "nas-chap.json").read_text())
    assert chap["type"] == "kubernetes.io/iscsi-chap"


def test_edits_change_classes_and_never_a_volume(tiers: Any) -> None:
    volume = tiers.bind("pvc-1", "longhorn-ssd", "media/db")
    before = volume.read_text()

    def edit(expected: set[str], change: Any) -> None:
        with tiers.edited() as settings:
            change(settings["storage"]["classes"], settings)
        assert planned(tiers.preview()) == expected
        tiers.up()
        assert planned(tiers.preview()) == set()
        assert volume.read_text() == before

    edit(
        {"update StorageClass longhorn-ssd", "update StorageClass nfs-bulk"},
        lambda classes, settings: (
            settings["cluster"].update(storageClass="nfs-bulk"),
            settings["storage"].update(default="nfs-bulk"),
        ),
    )
    assert tiers.marked() == {"nfs-bulk"}
    edit(
        {
            *replaced("longhorn-ssd"),
            *replaced("nfs-bulk"),
            "update Release longhorn",
            "update StorageClass nas-block",
            "update PersistentVolume postgres",
        },
        lambda classes, settings: (
            classes["longhorn-ssd"].update(replicas=3),
            classes["nfs-bulk"].update(reclaimPolicy="Delete"),
            classes["nas-block"].update(mountOptions=["noatime"]),
        ),
    )


def replaced(name: str) -> set[str]:
    return {
        f"{step} StorageClass {name}"
        for step in ("delete-replaced", "replace", "create-replacement")
    }


def test_a_class_that_a_claim_holds_stays_until_its_volume_is_gone(tiers: Any) -> None:
    volume = tiers.bind("pvc-2", "nfs-bulk", "media/library")
    with tiers.edited() as settings:
        settings["storage"]["classes"].pop("nfs-bulk")
    before, state = tiers.there(), tiers.resources()
    for run in (tiers.preview, tiers.up):
        refused = run(check=False)
        assert refused.code != 0
        (error,) = errors(refused)
        assert "class nfs-bulk is not declared any more, but 1 claim(s)" in error
        assert "media/library" in error
    assert tiers.there() == before
    assert [r["urn"] for r in tiers.resources()] == [r["urn"] for r in state]

    volume.unlink()
    assert {"delete Release csi-driver-nfs", "delete StorageClass nfs-bulk"} <= planned(tiers.up())


def test_longhorn_is_not_taken_out_before_it_is_let_go_by_name(tiers: Any) -> None:
    with tiers.edited() as settings:
        settings["cluster"]["storageClass"] = "nfs-bulk"
        settings["storage"]["default"] = "nfs-bulk"
        settings["storage"]["classes"].pop("longhorn-ssd")
        settings["storage"].pop("longhorn")
    refused = tiers.preview(check=False)
    assert refused.code != 0
    assert "protect" in refused.stdout + refused.stderr
    release = next(r["urn"] for r in tiers.resources() if r["urn"].endswith("Release::longhorn"))
    tiers.pulumi("state", "unprotect", "--yes", release)
    tiers.up()
    assert "longhorn-system/Release.helm.sh/longhorn.json" not in tiers.there()
    assert tiers.marked() == {"nfs-bulk"}


def test_a_second_default_of_the_live_cluster_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    fresh = Tiers(tmp_path / "fresh")
    fresh.api.create(
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": "local-path",
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "provisioner": "rancher.io/local-path",
        },
        "k3s",
    )
    for run in (fresh.preview, fresh.up):
        refused = run(check=False)
        assert refused.code != 0
        (error,) = errors(refused)
        assert "local-path (rancher.io/local-path)" in error
        assert "--disable=local-storage" in error
    assert fresh.resources() == []


def test_a_node_without_an_initiator_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    fresh = Tiers(tmp_path / "fresh")
    (fresh.world / "machine" / "missing-tools.json").write_text('["iscsiadm"]')
    refused = fresh.preview(check=False)
    assert refused.code != 0
    (error,) = errors(refused)
    assert "node control-plane: iscsiadm is missing" in error
    (fresh.world / "machine" / "missing-tools.json").unlink()
    preview = fresh.preview()
    assert any("worker-1, worker-2 cannot be looked at" in text for text in preview.diagnostics)


def test_a_cluster_that_sleeps_shows_edits_of_its_tiers(tiers: Any) -> None:
    with edited_file(tiers.cluster_file) as cluster:
        cluster["state"] = "stopped"
    with tiers.edited() as settings:
        settings["storage"]["classes"]["nfs-bulk"]["mountOptions"] = ["nfsvers=4.2"]
    preview = tiers.preview()
    # The provider's update is that of a preview alone: it must not skip what is unreachable.
    assert planned(preview) == {"update StorageClass nfs-bulk", "update kubernetes kubernetes"}
