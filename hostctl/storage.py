"""Verbs: what a node lacks for its volumes, and the classes and volumes that a cluster has."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from hostctl.cluster import parse_json
from hostctl.machine import Machine, TookTooLong, ToolMissing
from hostctl.preflight import Finding, module_findings
from hostctl.protocol import Failure, Result
from hostctl.spec import CLUSTER_NAME, Items, Value, absolute_path, checked, one_of
from hostctl.tools import for_system, run_tool
from hostctl.workloads import ASKED_KUBECONFIG, ask_cluster, is_silent

CHECK_SPEC: dict[str, Any] = {
    "needs": Items(Value(one_of("iscsi", "crypt", "nfs", "nfs-client", "ceph"))),
    "disks": Items(Value(absolute_path)),
}
_INITIATOR = "/etc/iscsi/initiatorname.iscsi"
_MULTIPATHD = "/run/multipathd.pid"
_MOUNT_NFS = ("/sbin/mount.nfs", "/usr/sbin/mount.nfs", "/run/current-system/sw/bin/mount.nfs")
_MODULES = {
    "crypt": (["dm_crypt"], "encrypted volumes"),
    "nfs": (["nfs"], "volumes of an NFS export"),
    "ceph": (["rbd", "ceph"], "volumes of Ceph"),
}
# What Ceph itself makes of a disk: its own, from an earlier run.
_OF_CEPH = "ceph_bluestore"


def storage_check(machine: Machine, spec: dict[str, Any]) -> Result:
    """All that this node lacks for the volumes that are declared, at once, each with its remedy.
    ``initiator`` is its iSCSI name, which no other node may have; null where it has none.
    """
    wanted = checked(spec, CHECK_SPEC, "storage check")
    initiator = None
    with contextlib.suppress(OSError):
        text = machine.read(_INITIATOR).decode("utf-8", "replace")
        named = re.search(r"^InitiatorName=(\S+)", text, re.MULTILINE)
        initiator = named.group(1) if named else None
    found = [*_client_findings(machine, wanted["needs"], initiator)]
    for disk in wanted["disks"]:
        found += _disk_findings(machine, disk)
    return {
        "findings": [
            {"severity": one.severity, "what": one.what, "remedy": one.remedy} for one in found
        ],
        "initiator": initiator,
    }


def _client_findings(
    machine: Machine, needs: list[str], initiator: str | None
) -> Iterator[Finding]:
    if "iscsi" in needs:
        remedy = for_system(
            machine,
            "services.openiscsi = { enable = true; name = ...; };",
            "run the volumes on other nodes: it is a target, and its initiator is not supported.",
            "apt install open-iscsi",
        )
        # It starts iscsid itself when it is first asked, so the daemon need not run yet.
        if not _has_tool(machine, ["iscsiadm", "--version"]):
            yield Finding("error", "iscsiadm is missing: no volume can be attached", remedy)
        elif initiator is None:
            yield Finding("error", f"{_INITIATOR} names no initiator", remedy)
        if machine.exists(_MULTIPATHD):
            yield Finding(
                "warning",
                "multipathd runs, and may take the volumes' devices before they are mounted "
                "(longhorn issue 1210)",
                'blacklist { devnode "^sd[a-z0-9]+" } in /etc/multipath.conf, or stop it',
            )
    if "crypt" in needs and not _has_tool(machine, ["cryptsetup", "--version"]):
        remedy = for_system(
            machine,
            "environment.systemPackages = [ pkgs.cryptsetup ];",
            "it comes with the system.",
            "apt install cryptsetup",
        )
        yield Finding("error", "cryptsetup is missing: encrypted volumes cannot be opened", remedy)
    if "nfs-client" in needs and not any(map(machine.exists, _MOUNT_NFS)):
        remedy = for_system(
            machine,
            'boot.supportedFilesystems = [ "nfs" ];',
            "it comes with the system.",
            "apt install nfs-common",
        )
        yield Finding(
            "warning", "mount.nfs is missing: volumes that many pods write to need it", remedy
        )
    for need, (modules, why) in _MODULES.items():
        for module in modules if need in needs else ():
            yield from module_findings(machine, module, "error", why)


def _has_tool(machine: Machine, argv: list[str]) -> bool:
    try:
        return machine.run(argv).code == 0
    except (ToolMissing, TookTooLong):
        return False


def _disk_findings(machine: Machine, disk: str) -> Iterator[Finding]:
    if not machine.exists(disk):
        yield Finding("error", f"there is no disk {disk}", "see `ls -l /dev/disk/by-id`")
        return
    step = f"looking at {disk}"
    argv = ["lsblk", "--json", "--output=TYPE,FSTYPE,MOUNTPOINTS", disk]
    (seen,) = parse_json(run_tool(machine, argv, step, "cannot-tell").out, step)["blockdevices"]
    parts = [one for one in seen.get("children") or [] if one.get("fstype") != _OF_CEPH]
    held = (
        f"a file system ({seen['fstype']})"
        if seen.get("fstype") not in (None, _OF_CEPH)
        else "partitions"
        if parts
        else "a mount"
        if any(seen.get("mountpoints") or [])
        else "no whole disk"
        if seen.get("type") != "disk"
        else ""
    )
    if held:
        yield Finding(
            "error",
            f"{disk} is not raw: it has {held}",
            "name another disk. If nothing on it is needed, wipe it by hand: wipefs --all",
        )


INSPECT_STORAGE_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "kubeconfig": ASKED_KUBECONFIG,
}
_DEFAULT_MARKS = (
    "storageclass.kubernetes.io/is-default-class",
    "storageclass.beta.kubernetes.io/is-default-class",
)


def storage_inspect(machine: Machine, spec: dict[str, Any]) -> Result:
    """The StorageClasses of a cluster, and its PersistentVolumes. ``state`` is known or unknown,
    where the API does not answer. Asked as `cluster owners` asks: in the node of a k3d cluster, or
    with the text of a kubeconfig.
    """
    wanted = checked(spec, INSPECT_STORAGE_SPEC, "storage inspect")
    step = f"looking at the volumes of cluster {wanted['cluster']}"
    arguments = ["get", "storageclasses.storage.k8s.io,persistentvolumes", "--output=json"]
    seen = ask_cluster(machine, wanted, arguments, step)
    if seen.code:
        if is_silent(seen):
            return {"state": "unknown", "detail": seen.complaint, "classes": {}, "volumes": {}}
        raise Failure("cannot-tell", step, seen.complaint, "run it by hand")
    classes, volumes = {}, {}
    for one in parse_json(seen.out, step)["items"]:
        metadata = one["metadata"]
        labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
        if one["kind"] == "StorageClass":
            classes[metadata["name"]] = {
                "default": any(annotations.get(mark) == "true" for mark in _DEFAULT_MARKS),
                "provisioner": one["provisioner"],
                "part_of": labels.get("app.kubernetes.io/part-of", ""),
                "created": metadata.get("creationTimestamp", ""),
            }
        else:
            spec_of = one.get("spec") or {}
            claim = spec_of.get("claimRef") or {}
            volumes[metadata["name"]] = {
                "class": spec_of.get("storageClassName", ""),
                "phase": (one.get("status") or {}).get("phase", ""),
                "claim": f"{claim['namespace']}/{claim['name']}" if claim else "",
                "part_of": labels.get("app.kubernetes.io/part-of", ""),
            }
    return {"state": "known", "detail": "", "classes": classes, "volumes": volumes}
