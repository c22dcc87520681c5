"""hostctl on what a node brings for volumes, and on the classes and volumes of a cluster."""

from pathlib import Path
from typing import Any

import pytest

from rehearsal.apiserver import ApiServer
from tests.unit.test_hostctl import Host
from tests.unit.test_hostctl_existing import Metal

DISK = "/dev/disk/by-id/ata-EXAMPLE_1"
ALL = ["iscsi", "crypt", "nfs", "nfs-client", "ceph"]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def check(host: Host, *needs: str, disks: tuple[str, ...] = ()) -> dict[str, Any]:
    return host("storage check", {"needs": list(needs), "disks": list(disks)})


def whats(seen: dict[str, Any], severity: str = "error") -> list[str]:
    return [one["what"] for one in seen["findings"] if one["severity"] == severity]


def test_a_node_that_lacks_nothing_is_fit_and_says_its_iscsi_name(host: Host) -> None:
    seen = check(host, *ALL, disks=(DISK,))
    assert seen["findings"] == []
    assert seen["initiator"].startswith("iqn.")


@pytest.mark.parametrize(
    ("need", "tool", "severity", "package"),
    [
        ("iscsi", "iscsiadm", "error", "open-iscsi"),
        ("crypt", "cryptsetup", "error", "cryptsetup"),
        ("nfs-client", "mount.nfs", "warning", "nfs-common"),
    ],
)
def test_a_missing_program_is_named_with_its_package(
    host: Host, need: str, tool: str, severity: str, package: str
) -> None:
    host.machine.set("missing-tools.json", [tool])
    (finding,) = check(host, need)["findings"]
    assert finding["severity"] == severity
    assert f"{tool} is missing" in finding["what"]
    assert package in finding["remedy"]


def test_what_no_class_needs_is_not_asked_for(host: Host) -> None:
    host.machine.set("missing-tools.json", ["iscsiadm", "cryptsetup", "mount.nfs"])
    assert check(host, "nfs")["findings"] == []


def test_an_initiator_without_a_name_is_refused(host: Host) -> None:
    file = host.machine.root / "files" / "etc" / "iscsi" / "initiatorname.iscsi"
    file.parent.mkdir(parents=True)
    file.write_text("## none yet\n")
    seen = check(host, "iscsi")
    assert whats(seen) == ["/etc/iscsi/initiatorname.iscsi names no initiator"]
    assert seen["initiator"] is None


def test_a_multipathd_that_would_take_the_devices_is_warned_of(host: Host) -> None:
    host.machine.write_atomic("/run/multipathd.pid", b"1\n", 0o644)
    assert "multipathd runs" in whats(check(host, "iscsi"), "warning")[0]


@pytest.mark.parametrize(
    ("need", "module"),
    [("crypt", "dm_crypt"), ("nfs", "nfs"), ("ceph", "rbd"), ("ceph", "ceph")],
)
def test_a_module_that_the_kernel_lacks_is_named(host: Host, need: str, module: str) -> None:
    there = {"nfs", "rbd", "ceph", "dm_crypt"} - {module}
    loaded = "".join(f"{name} 1 0 - Live 0x0\n" for name in there)
    (host.machine.root / "files" / "proc").mkdir(parents=True, exist_ok=True)
    (host.machine.root / "files" / "proc" / "modules").write_text(loaded)
    lists = host.machine.root / "files" / "lib" / "modules" / host.machine.kernel()[1]
    for release in (lists, lists.with_name(host.machine.kernel()[0])):
        release.mkdir(parents=True, exist_ok=True)
        (release / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
        (release / "modules.dep").write_text("kernel/net/tls/tls.ko.xz: \n")
    (what,) = whats(check(host, need))
    assert f"the kernel has no module {module}" in what


@pytest.mark.parametrize(
    ("seen", "what"),
    [
        ({"fstype": "ext4"}, "it has a file system (ext4)"),
        ({"children": [{"type": "part", "fstype": None}]}, "it has partitions"),
        ({"mountpoints": ["/srv"]}, "it has a mount"),
        ({"type": "part"}, "it has no whole disk"),
    ],
)
def test_a_disk_that_is_not_raw_is_refused_and_nothing_wipes_it(
    host: Host, seen: dict[str, Any], what: str
) -> None:
    host.machine.set("disks.json", {DISK: seen})
    (finding,) = check(host, "ceph", disks=(DISK,))["findings"]
    assert what in finding["what"]
    assert "by hand" in finding["remedy"]
    assert [call[0] for call in host.calls] == ["lsblk"]


def test_a_disk_that_is_not_there_is_refused(host: Host) -> None:
    host.machine.set("disks.json", {DISK: None})
    assert whats(check(host, "ceph", disks=(DISK,))) == [f"there is no disk {DISK}"]


def test_a_disk_that_ceph_has_already_is_its_own(host: Host) -> None:
    host.machine.set("disks.json", {DISK: {"fstype": "ceph_bluestore"}})
    assert check(host, "ceph", disks=(DISK,))["findings"] == []


@pytest.fixture
def metal(tmp_path: Path) -> Metal:
    return Metal(tmp_path)


def inspect(metal: Metal) -> dict[str, Any]:
    return metal("storage inspect", {"cluster": "metal", "kubeconfig": metal.kubeconfig})


def add(api: ApiServer, kind: str, name: str, **more: Any) -> None:
    group = {"StorageClass": "storage.k8s.io/v1"}.get(kind, "v1")
    metadata = {"name": name, **more.pop("metadata", {})}
    api.create({"apiVersion": group, "kind": kind, "metadata": metadata, **more}, "test")


def test_classes_and_volumes_are_told_with_marks_and_claims(metal: Metal) -> None:
    mark = {"storageclass.kubernetes.io/is-default-class": "true"}
    label = {"app.kubernetes.io/part-of": "homelab-storage"}
    add(metal.inside, "StorageClass", "foreign", provisioner="x", metadata={"annotations": mark})
    add(metal.inside, "StorageClass", "ours", provisioner="y", metadata={"labels": label})
    spec = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "ours",
        "hostPath": {"path": "/x"},
        "claimRef": {"namespace": "media", "name": "library"},
    }
    add(metal.inside, "PersistentVolume", "pvc-1", spec=spec)
    seen = inspect(metal)
    assert seen["state"] == "known"
    assert all(one.pop("created").endswith("Z") for one in seen["classes"].values())
    assert seen["classes"] == {
        "foreign": {"default": True, "provisioner": "x", "part_of": ""},
        "ours": {"default": False, "provisioner": "y", "part_of": "homelab-storage"},
    }
    assert seen["volumes"]["pvc-1"]["class"] == "ours"
    assert seen["volumes"]["pvc-1"]["claim"] == "media/library"


def test_a_cluster_that_does_not_answer_is_unknown_and_not_empty(metal: Metal) -> None:
    file = metal.root / "world" / "machine" / "existing" / "metal.json"
    file.write_text(file.read_text().replace('"running"', '"stopped"'))
    assert inspect(metal)["state"] == "unknown"
