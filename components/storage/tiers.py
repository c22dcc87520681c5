"""The tiers of the settings: StorageClasses, and the drivers that serve them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster
from components.network.policy import admit
from components.settings.storage import (
    CEPH_NAMESPACE,
    LOCAL_PATH_NAMESPACE,
    LONGHORN_NAMESPACE,
    NFS_NAMESPACE,
)
from components.versions import (
    BUSYBOX,
    CEPH,
    CSI_DRIVER_NFS,
    LOCAL_PATH_PROVISIONER,
    LONGHORN,
    ROOK_CEPH,
    Chart,
)

# Longer than slow nodes pull a dozen images each.
_INSTALL_SECONDS = 1200
LABELS = {"app.kubernetes.io/managed-by": "pulumi", "app.kubernetes.io/part-of": "homelab-storage"}
"""What tells this stack's classes and volumes from others in the live cluster."""
DEFAULT = "storageclass.kubernetes.io/is-default-class"
_WAIT_FOR_POD = "WaitForFirstConsumer"
_PROVISIONER_LABELS = {"app.kubernetes.io/name": "local-path-provisioner"}
_DATA_POOL = "data0"
_USER = 65532


@dataclass(frozen=True)
class StorageArgs:
    """``after`` is what must be there first: namespaces, and the Secrets that the settings name."""

    settings: settings.Storage
    cluster: Cluster
    after: Sequence[pulumi.Resource]


class Storage(pulumi.ComponentResource):
    """The StorageClasses, all in one shape, exactly one of them marked as the default, and the
    drivers that they need.

    A class holds no data: it may be replaced under its volumes, which keep what they were made
    with. What holds data is protected: Longhorn, and Ceph with its pools, whose removal would erase
    every volume. To remove one of these on purpose: docs/storage.md.
    """

    def __init__(
        self, name: str, args: StorageArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Storage", name, None, opts)
        self._storage = args.settings
        self._options = pulumi.ResourceOptions(
            parent=self,
            provider=args.cluster.provider,
            deleted_with=args.cluster.identity,
            depends_on=list(args.after),
        )
        kinds = args.settings.kinds
        drivers: dict[str, list[pulumi.Resource]] = {}
        if "longhorn" in kinds:
            drivers["longhorn"] = self._longhorn(args.settings.longhorn)
        if "nfs" in kinds:
            drivers["nfs"] = [
                self._release(
                    CSI_DRIVER_NFS,
                    NFS_NAMESPACE,
                    # Classes are this stack's, and snapshots those of the server's file system.
                    {"storageClass": {"create": False}, "externalSnapshotter": {"enabled": False}},
                )
            ]
        if args.settings.runs_local_path:
            drivers["local-path"] = self._local_path(args.settings.local_path.directory)
        if args.settings.uses_ceph and args.settings.ceph:
            drivers["ceph"] = self._ceph(args.settings.ceph)
        for key, declared in args.settings.classes.items():
            needs = drivers.get("ceph" if declared.kind.startswith("ceph") else declared.kind, [])
            self._class(key, declared, needs)
        self.register_outputs({})

    def _after(
        self, resources: Sequence[pulumi.Resource], *, protect: bool | None = None
    ) -> pulumi.ResourceOptions:
        return pulumi.ResourceOptions.merge(
            self._options, pulumi.ResourceOptions(depends_on=list(resources), protect=protect)
        )

    def _release(
        self, chart: Chart, namespace: str, values: dict[str, Any], *, protect: bool | None = None
    ) -> kubernetes.helm.v3.Release:
        return kubernetes.helm.v3.Release(
            chart.name,
            name=chart.name,
            namespace=namespace,
            chart=chart.name,
            version=chart.version,
            repository_opts={"repo": chart.repository},
            values=values,
            timeout=_INSTALL_SECONDS,
            opts=self._after([], protect=protect),
        )

    def _class(self, name: str, declared: settings.AnyClass, needs: list[pulumi.Resource]) -> None:
        shape = _SHAPES[declared.kind](name, declared)
        if isinstance(declared, settings.CephBlockClass | settings.CephFilesystemClass):
            needs = [*needs, self._pool(name, declared, needs)]
        made = kubernetes.storage.v1.StorageClass(
            name,
            metadata={
                "name": name,
                "labels": LABELS,
                "annotations": {
                    DEFAULT: str(name == self._storage.default).lower(),
                    **shape.annotations,
                },
            },
            provisioner=shape.provisioner,
            parameters=shape.parameters,
            reclaim_policy=getattr(declared, "reclaim_policy", "Retain"),
            allow_volume_expansion=getattr(declared, "allow_volume_expansion", False),
            volume_binding_mode=shape.binding,
            mount_options=list(declared.mount_options) or None,
            opts=pulumi.ResourceOptions.merge(
                self._after(needs),
                pulumi.ResourceOptions(
                    # The API server lets neither be changed, which the provider does not know of.
                    replace_on_changes=["reclaimPolicy", "volumeBindingMode"],
                    delete_before_replace=True,
                ),
            ),
        )
        if isinstance(declared, settings.IscsiClass):
            for key, volume in declared.volumes.items():
                self._lun(key, name, declared, volume, made)

    def _lun(
        self,
        name: str,
        of: str,
        declared: settings.IscsiClass,
        volume: settings.IscsiVolume,
        made: pulumi.Resource,
    ) -> None:
        portal = declared.portal if ":" in declared.portal else f"{declared.portal}:3260"
        iscsi: dict[str, Any] = {
            "target_portal": portal,
            "iqn": volume.iqn,
            "lun": volume.lun,
            "fs_type": declared.fs_type,
        }
        if volume.chap:
            iscsi["chap_auth_session"] = True
            iscsi["secret_ref"] = {"namespace": volume.chap.namespace, "name": volume.chap.name}
        spec: Any = {
            "capacity": {"storage": volume.size},
            # A file system of one node at a time.
            "access_modes": ["ReadWriteOnce"],
            "persistent_volume_reclaim_policy": "Retain",
            "storage_class_name": of,
            "iscsi": iscsi,
        }
        if declared.mount_options:
            spec["mount_options"] = list(declared.mount_options)
        if volume.claim:
            spec["claim_ref"] = {"namespace": volume.claim.namespace, "name": volume.claim.name}
        kubernetes.core.v1.PersistentVolume(
            name,
            metadata={"name": name, "labels": LABELS},
            spec=spec,
            opts=self._after([made]),
        )

    def _longhorn(self, longhorn: settings.Longhorn) -> list[pulumi.Resource]:
        backups = longhorn.backups
        values: dict[str, Any] = {
            # The chart makes a class `longhorn` in any case, by default the cluster's default one,
            # which deletes. Claims that ask for it get what the stack's own would give.
            "persistence": {
                "defaultClass": False,
                "defaultClassReplicaCount": min(
                    one.replicas
                    for one in self._storage.classes.values()
                    if isinstance(one, settings.LonghornClass)
                ),
                "reclaimPolicy": "Retain",
            },
            "defaultSettings": {"defaultDataPath": longhorn.data_path},
            # It has no login: nobody but who may forward a port reaches it.
            "service": {"ui": {"type": "ClusterIP"}},
        }
        if backups:
            values["defaultBackupStore"] = {"backupTarget": backups.target}
            if backups.credentials:
                name = backups.credentials.name
                values["defaultBackupStore"]["backupTargetCredentialSecret"] = name
        release = self._release(LONGHORN, LONGHORN_NAMESPACE, values, protect=True)
        for name, job in longhorn.jobs.items():
            self._custom(
                "longhorn.io/v1beta2",
                "RecurringJob",
                name,
                LONGHORN_NAMESPACE,
                {
                    "name": name,
                    "task": job.task,
                    "cron": job.cron,
                    "retain": job.retain,
                    # Of this group is every volume that names no other.
                    "groups": ["default"],
                    "concurrency": 1,
                },
                self._after([release]),
            )
        return [release]

    def _ceph(self, ceph: settings.Ceph) -> list[pulumi.Resource]:
        operator = self._release(ROOK_CEPH, CEPH_NAMESPACE, {}, protect=True)
        nodes = [
            {"name": node, "devices": [{"name": disk} for disk in disks]}
            for node, disks in ceph.nodes.items()
            if disks
        ]
        cluster = self._custom(
            "ceph.rook.io/v1",
            "CephCluster",
            CEPH_NAMESPACE,
            CEPH_NAMESPACE,
            {
                "cephVersion": {"image": CEPH},
                "dataDirHostPath": ceph.data_path,
                "mon": {"count": 3, "allowMultiplePerNode": False},
                "mgr": {"count": 2, "allowMultiplePerNode": False},
                "dashboard": {"enabled": True, "ssl": True},
                # Never a disk that is not named, however empty it looks.
                "storage": {"useAllNodes": False, "useAllDevices": False, "nodes": nodes},
            },
            self._after([operator], protect=True),
        )
        return [operator, cluster]

    def _pool(
        self,
        name: str,
        declared: settings.CephBlockClass | settings.CephFilesystemClass,
        after: Sequence[pulumi.Resource],
    ) -> pulumi.Resource:
        replicated = {"size": declared.replicas, "requireSafeReplicaSize": True}
        pool: dict[str, Any] = {"failureDomain": "host", "replicated": replicated}
        kind, spec = "CephBlockPool", pool
        if isinstance(declared, settings.CephFilesystemClass):
            kind = "CephFilesystem"
            spec = {
                "metadataPool": pool,
                "dataPools": [{"name": _DATA_POOL, **pool}],
                "preserveFilesystemOnDelete": True,
                "metadataServer": {"activeCount": 1, "activeStandby": True},
            }
        options = self._after(after, protect=True)
        return self._custom("ceph.rook.io/v1", kind, name, CEPH_NAMESPACE, spec, options)

    def _custom(
        self,
        version: str,
        kind: str,
        name: str,
        namespace: str,
        spec: dict[str, Any],
        options: pulumi.ResourceOptions,
    ) -> pulumi.Resource:
        return kubernetes.apiextensions.CustomResource(
            name,
            api_version=version,
            kind=kind,
            metadata={"name": name, "namespace": namespace},
            spec=spec,
            opts=options,
        )

    def _local_path(self, directory: str) -> list[pulumi.Resource]:
        """The provisioner as k3s has it, without its class: k3s marks that as default at each
        start.
        """
        name = "local-path-provisioner"
        # It asks the API server, and nobody asks it or its helper pods.
        policy = admit(name, LOCAL_PATH_NAMESPACE, None, self._options)
        metadata: Any = {"name": name, "namespace": LOCAL_PATH_NAMESPACE, "labels": LABELS}
        account = kubernetes.core.v1.ServiceAccount(name, metadata=metadata, opts=self._options)
        roles = [
            kubernetes.rbac.v1.ClusterRole(
                name,
                metadata={"name": name, "labels": LABELS},
                rules=[
                    _rule("", ["nodes", "persistentvolumeclaims", "configmaps"], _LOOK),
                    _rule("", ["pods", "pods/log"], _LOOK),
                    _rule("", ["persistentvolumes"], [*_LOOK, "create", "patch", *_CHANGE]),
                    _rule("", ["events"], ["create", "patch"]),
                    _rule("storage.k8s.io", ["storageclasses"], _LOOK),
                ],
                opts=self._options,
            ),
            kubernetes.rbac.v1.Role(
                name,
                metadata=metadata,
                # The pods that make and remove directories.
                rules=[_rule("", ["pods"], [*_LOOK, "create", "patch", *_CHANGE])],
                opts=self._options,
            ),
        ]
        subject: Any = {"kind": "ServiceAccount", "name": name, "namespace": LOCAL_PATH_NAMESPACE}
        group = "rbac.authorization.k8s.io"
        bound = [
            kubernetes.rbac.v1.ClusterRoleBinding(
                name,
                metadata={"name": name, "labels": LABELS},
                role_ref={"api_group": group, "kind": "ClusterRole", "name": name},
                subjects=[subject],
                opts=self._after(roles),
            ),
            kubernetes.rbac.v1.RoleBinding(
                name,
                metadata=metadata,
                role_ref={"api_group": group, "kind": "Role", "name": name},
                subjects=[subject],
                opts=self._after(roles),
            ),
        ]
        paths = [{"node": "DEFAULT_PATH_FOR_NON_LISTED_NODES", "paths": [directory]}]
        config = kubernetes.core.v1.ConfigMap(
            name,
            metadata=metadata,
            data={
                "config.json": json.dumps({"nodePathMap": paths}),
                "setup": '#!/bin/sh\nset -eu\nmkdir -m 0777 -p "$VOL_DIR"\n',
                "teardown": '#!/bin/sh\nset -eu\nrm -rf "$VOL_DIR"\n',
                "helperPod.yaml": json.dumps(_HELPER_POD),
            },
            opts=self._options,
        )
        container: Any = {
            "name": name,
            "image": LOCAL_PATH_PROVISIONER,
            "command": [name, "start", "--config", "/etc/config/config.json"],
            "volume_mounts": [{"name": "config", "mount_path": "/etc/config/"}],
            "security_context": {
                "allow_privilege_escalation": False,
                "read_only_root_filesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
            "env": [
                {
                    "name": "POD_NAMESPACE",
                    "value_from": {"field_ref": {"field_path": "metadata.namespace"}},
                },
                {"name": "CONFIG_MOUNT_PATH", "value": "/etc/config/"},
            ],
        }
        deployment = kubernetes.apps.v1.Deployment(
            name,
            metadata=metadata,
            spec={
                "replicas": 1,
                "selector": {"match_labels": _PROVISIONER_LABELS},
                "template": {
                    "metadata": {"labels": _PROVISIONER_LABELS},
                    "spec": {
                        "service_account_name": name,
                        # It talks to the API alone; directories are made by its helper pods.
                        "security_context": {
                            "run_as_non_root": True,
                            "run_as_user": _USER,
                            "run_as_group": _USER,
                            "seccomp_profile": {"type": "RuntimeDefault"},
                        },
                        "containers": [container],
                        "volumes": [{"name": "config", "config_map": {"name": name}}],
                    },
                },
            },
            opts=self._after([account, *bound, config, policy]),
        )
        return [deployment]


_LOOK = ["get", "list", "watch"]
_CHANGE = ["update", "delete"]
_HELPER_POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "helper-pod"},
    "spec": {
        "priorityClassName": "system-node-critical",
        "tolerations": [
            {"key": "node.kubernetes.io/disk-pressure", "operator": "Exists"},
            {"key": "node-role.kubernetes.io/control-plane", "operator": "Exists"},
        ],
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": "helper-pod",
                "image": BUSYBOX,
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    # Root's, to remove what other users have written and closed to all others.
                    "capabilities": {"drop": ["ALL"], "add": ["DAC_OVERRIDE", "FOWNER"]},
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }
        ],
    },
}


def _rule(group: str, resources: list[str], verbs: list[str]) -> Any:
    return {"api_groups": [group], "resources": resources, "verbs": verbs}


@dataclass(frozen=True)
class _Shape:
    """What of a StorageClass its kind decides."""

    provisioner: str
    parameters: Mapping[str, str] | None = None
    binding: str = "Immediate"
    annotations: Mapping[str, str] = field(default_factory=dict)


def _secret(role: str, namespace: str, name: str) -> dict[str, str]:
    prefix = f"csi.storage.k8s.io/{role}-secret"
    return {f"{prefix}-name": name, f"{prefix}-namespace": namespace}


def _longhorn_shape(name: str, declared: settings.LonghornClass) -> _Shape:
    parameters = {
        "numberOfReplicas": str(declared.replicas),
        # Minutes after which a replica that is lost is no longer waited for; Longhorn's own.
        "staleReplicaTimeout": "30",
        "dataLocality": declared.data_locality,
        "fsType": "ext4",
    }
    if secret := declared.encryption:
        parameters["encrypted"] = "true"
        for role in ("provisioner", "node-publish", "node-stage", "node-expand"):
            parameters |= _secret(role, secret.namespace, secret.name)
    return _Shape("driver.longhorn.io", parameters)


def _nfs_shape(name: str, declared: settings.NfsClass) -> _Shape:
    return _Shape(
        "nfs.csi.k8s.io",
        {
            "server": declared.server,
            "share": declared.share,
            "subDir": declared.sub_directory,
            "onDelete": "retain" if declared.reclaim_policy == "Retain" else "delete",
        },
    )


def _iscsi_shape(name: str, declared: settings.IscsiClass) -> _Shape:
    return _Shape("kubernetes.io/no-provisioner", binding=_WAIT_FOR_POD)


def _local_path_shape(name: str, declared: settings.LocalPathClass) -> _Shape:
    return _Shape(
        "rancher.io/local-path",
        {"pathPattern": declared.path_pattern},
        # The disk is that of the node where the pod runs.
        _WAIT_FOR_POD,
        # A `local` volume takes a pod's fsGroup, a hostPath does not (k3s-io/k3s#9872).
        {"defaultVolumeType": "local"},
    )


def _ceph_parameters(kind: str) -> dict[str, str]:
    found = {"clusterID": CEPH_NAMESPACE}
    for role in ("provisioner", "controller-expand", "controller-publish"):
        found |= _secret(role, CEPH_NAMESPACE, f"rook-csi-{kind}-provisioner")
    return found | _secret("node-stage", CEPH_NAMESPACE, f"rook-csi-{kind}-node")


def _ceph_block_shape(name: str, declared: settings.CephBlockClass) -> _Shape:
    parameters = _ceph_parameters("rbd") | {
        "pool": name,
        "imageFormat": "2",
        "imageFeatures": "layering",
        "csi.storage.k8s.io/fstype": "ext4",
    }
    return _Shape(f"{CEPH_NAMESPACE}.rbd.csi.ceph.com", parameters)


def _ceph_filesystem_shape(name: str, declared: settings.CephFilesystemClass) -> _Shape:
    parameters = _ceph_parameters("cephfs") | {"fsName": name, "pool": f"{name}-{_DATA_POOL}"}
    return _Shape(f"{CEPH_NAMESPACE}.cephfs.csi.ceph.com", parameters)


_SHAPES: dict[str, Callable[[str, Any], _Shape]] = {
    "longhorn": _longhorn_shape,
    "nfs": _nfs_shape,
    "iscsi": _iscsi_shape,
    "local-path": _local_path_shape,
    "ceph-block": _ceph_block_shape,
    "ceph-filesystem": _ceph_filesystem_shape,
}
