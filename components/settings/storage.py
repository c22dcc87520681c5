"""Tiers of storage: a StorageClass each, what provides it, and which of them is the default.

All that is here is held against the cluster: its nodes, and the class that it brings itself.
"""

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from components.settings.cluster import K3dCluster
from components.settings.existing import ExistingCluster
from components.settings.k3s import K3sCluster
from components.settings.model import (
    AbsolutePath,
    Cron,
    Model,
    Name,
    Number,
    ObjectName,
    Text,
    is_clean_path,
    is_host,
    is_ipv4,
)
from components.settings.network import Size
from components.settings.problem import Path, Problem, key_path
from components.settings.secrets import DeclaredSecret

LONGHORN_NAMESPACE = "longhorn-system"
CEPH_NAMESPACE = "rook-ceph"
NFS_NAMESPACE = "csi-nfs"
LOCAL_PATH_NAMESPACE = "local-path-storage"
LOCAL_PATH = "local-path"
"""The class that k3s makes, and marks as default at each start."""
_MADE_BY_LONGHORN = frozenset({"longhorn", "longhorn-static"})
_CEPH_NODES = 3
_CHAP_KEYS = frozenset({"node.session.auth.username", "node.session.auth.password"})
_S3_KEYS = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"})
_CRYPTO_KEYS = frozenset({"CRYPTO_KEY_VALUE"})

_Cluster: TypeAlias = K3dCluster | K3sCluster | ExistingCluster


def _is_server(text: str) -> bool:
    if is_ipv4(text):
        address = ip_address(text)
        return not (address.is_loopback or address.is_unspecified or address.is_multicast)
    return is_host(text) and text != "localhost" and not text.endswith(".localhost")


def _is_portal(text: str) -> bool:
    host, colon, port = text.partition(":")
    return _is_server(host) and (not colon or 0 < int(port) <= 65535)


def _is_pattern(text: str) -> bool:
    return ".." not in text


Server = Annotated[
    str,
    Text(
        "an IPv4 address or a host name that every node can reach, without export, port or scheme",
        "write the bare address; the exported directory belongs into share. IPv6 needs a host name",
        "192.168.1.10",
        r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?",
        _is_server,
    ),
]
Share = Annotated[
    str,
    Text(
        "the absolute path of an export, of letters, digits and _ @ + = , . - without `..`",
        "write it as `showmount --exports SERVER` shows it",
        "/vault/k8s-volumes",
        r"/|(?:/[A-Za-z0-9_@+=,.-]+)+",
        is_clean_path,
    ),
]
SubDirectory = Annotated[
    str,
    Text(
        "a relative path in which ${pvc.metadata.namespace}, ${pvc.metadata.name} and "
        "${pv.metadata.name} stand for themselves, and which holds the claim's or the volume's "
        "name",
        "write one that is another for each volume, or two volumes share their files",
        "${pvc.metadata.namespace}/${pvc.metadata.name}",
        r"(?:[A-Za-z0-9_@+=,./-]|\$\{pvc?\.metadata\.(?:name|namespace)\})+",
        lambda path: (
            ".." not in path
            and not path.startswith("/")
            and ("${pv.metadata.name}" in path or "${pvc.metadata.name}" in path)
        ),
    ),
]
PathPattern = Annotated[
    str,
    Text(
        "{{ .PVC.Namespace }}/{{ .PVC.Name }}/ with nothing before it, and perhaps more behind it",
        "begin with exactly this, slash included: newer provisioners refuse all else "
        "(CVE-2025-62878)",
        "{{ .PVC.Namespace }}/{{ .PVC.Name }}/",
        r"\{\{ \.PVC\.Namespace \}\}/\{\{ \.PVC\.Name \}\}/[A-Za-z0-9_@+=,./-]*",
        _is_pattern,
    ),
]
MountOption = Annotated[
    str,
    Text(
        "one mount option such as nfsvers=4.1 or noatime, without blanks and commas",
        "write each option as an entry of its own",
        "noatime",
        r"[A-Za-z][A-Za-z0-9_.:/=-]{0,127}",
    ),
]
Portal = Annotated[
    str,
    Text(
        "the IPv4 address or host name of an iSCSI portal, with its port where it is not 3260",
        "write it as `iscsiadm --mode discovery` shows it, without the group after the comma",
        "192.168.1.10:3260",
        r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?(?::[0-9]{1,5})?",
        _is_portal,
    ),
]
Iqn = Annotated[
    str,
    Text(
        "an iSCSI name: iqn.YEAR-MONTH.REVERSED.DOMAIN:NAME, in lower case, or eui. and 16 "
        "hexadecimal digits",
        "copy the target's name from the NAS; TrueNAS puts its base name before it",
        "iqn.2005-10.org.freenas.ctl:k8s-postgres",
        r"iqn\.[0-9]{4}-(?:0[1-9]|1[0-2])(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)+"
        r"(?::[a-z0-9.:_-]{1,180})?|eui\.[0-9A-F]{16}",
        lambda iqn: len(iqn) <= 223,
    ),
]
Replicas = Annotated[
    int, Number("1 to 10 replicas", "write a number in that range, without quotes", 2, 1, 10)
]
SafeReplicas = Annotated[
    int,
    Number("2 to 10 replicas", "write a number in that range: one loses data", 3, 2, 10),
]
Lun = Annotated[
    int, Number("a LUN from 0 to 255", "write a number in that range, without quotes", 0, 0, 255)
]
Retained = Annotated[
    int, Number("1 to 250 copies", "write a number in that range, without quotes", 7, 1, 250)
]
BackupTarget = Annotated[
    str,
    Text(
        "s3://BUCKET@REGION/ or nfs://SERVER:/EXPORT, without credentials",
        "write it in that form; the keys of S3 belong into a Secret, named under credentials",
        "nfs://192.168.1.10:/vault/longhorn-backups",
        r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]@[a-z0-9-]+/(?:[A-Za-z0-9_.-]+/)*"
        r"|nfs://[A-Za-z0-9][A-Za-z0-9.-]*:(?:/[A-Za-z0-9_.-]+)+",
        lambda target: ".." not in target,
    ),
]
Disk = Annotated[
    str,
    Text(
        "a whole disk under /dev/disk/by-id/",
        "write the link that `ls -l /dev/disk/by-id` shows: /dev/sdb may be another disk after a "
        "reboot",
        "/dev/disk/by-id/ata-EXAMPLE_1",
        r"/dev/disk/by-id/(?!.*-part[0-9]+$)[A-Za-z0-9_.:+-]+",
    ),
]


class SecretReference(Model):
    """A Secret that `homelab:secrets` declares: no value stands here."""

    namespace: Name = Field(description="Its namespace.")
    name: ObjectName = Field(description="Its name.")


class _Class(Model):
    mount_options: list[MountOption] = Field(
        default=[], description="Options with which volumes are mounted."
    )


class _Provisioned(_Class):
    """A class whose volumes are made and, where that is wished, deleted with their claims."""

    reclaim_policy: Literal["Retain", "Delete"] = Field(
        default="Retain",
        description="What becomes of a volume whose claim is deleted. Kubernetes' own default, "
        "`Delete`, erases the data.",
    )


class LonghornClass(_Provisioned):
    """Blocks on the nodes' own disks, on several nodes at once."""

    kind: Literal["longhorn"] = Field(description="By Longhorn.")
    replicas: Replicas = Field(default=2, description="On how many nodes each volume lies.")
    allow_volume_expansion: bool = Field(
        default=True, strict=True, description="Whether a claim may grow."
    )
    data_locality: Literal["disabled", "best-effort"] = Field(
        default="disabled",
        description="`best-effort` keeps one replica on the node of the pod.",
    )
    encryption: SecretReference | None = Field(
        default=None,
        description="Secret with CRYPTO_KEY_VALUE: volumes are encrypted (LUKS, dm_crypt).",
    )


class NfsClass(_Provisioned):
    """A directory of an NFS export for each volume; many pods may write to it."""

    kind: Literal["nfs"] = Field(description="By csi-driver-nfs.")
    server: Server = Field(description="Address of the NFS server.")
    share: Share = Field(description="What it exports; it must exist.")
    sub_directory: SubDirectory = Field(
        default="${pvc.metadata.namespace}/${pvc.metadata.name}",
        description="Directory of a volume in the share. By default a claim of the same namespace "
        "and name finds its files again.",
    )
    allow_volume_expansion: bool = Field(
        default=True,
        strict=True,
        description="Whether a claim may grow. NFS holds no volume to its size: a quota of the "
        "dataset does.",
    )
    mount_options: list[MountOption] = Field(
        default=["nfsvers=4.1", "hard", "noatime"],
        description="Options of the mount. `hard` waits for a server that is away; `soft` loses "
        "writes.",
    )


class IscsiVolume(Model):
    """A LUN that the NAS has. Nothing here makes or erases it."""

    iqn: Iqn = Field(description="Name of its target.")
    lun: Lun = Field(default=0, description="Its number at the target.")
    size: Size = Field(description="Its size, as on the NAS.")
    claim: SecretReference | None = Field(
        default=None,
        description="The one claim that may have it; any claim that fits where left out.",
    )
    chap: SecretReference | None = Field(
        default=None,
        description="Secret of type kubernetes.io/iscsi-chap with node.session.auth.username and "
        "node.session.auth.password.",
    )


class IscsiClass(_Class):
    """Block devices of a NAS, each declared: for one node at a time, without a provisioner."""

    kind: Literal["iscsi"] = Field(description="By the nodes' own iSCSI initiator.")
    portal: Portal = Field(description="Where the NAS answers.")
    fs_type: Literal["ext4", "xfs"] = Field(
        default="ext4", description="File system that an empty LUN gets."
    )
    volumes: dict[ObjectName, IscsiVolume] = Field(description="Its volumes, by name.")


class LocalPathClass(_Provisioned):
    """A directory of one node's disk: the fastest, and lost with the node."""

    kind: Literal["local-path"] = Field(description="By local-path-provisioner.")
    path_pattern: PathPattern = Field(
        default="{{ .PVC.Namespace }}/{{ .PVC.Name }}/",
        description="Directory of a volume. A claim of the same namespace and name finds its files "
        "again.",
    )


class CephBlockClass(_Provisioned):
    """Blocks of a Ceph pool of its own, for one node at a time."""

    kind: Literal["ceph-block"] = Field(description="By Rook-Ceph, RBD.")
    replicas: SafeReplicas = Field(default=3, description="On how many nodes each object lies.")
    allow_volume_expansion: bool = Field(
        default=True, strict=True, description="Whether a claim may grow."
    )


class CephFilesystemClass(_Provisioned):
    """Directories of a Ceph file system of its own; many pods may write to them."""

    kind: Literal["ceph-filesystem"] = Field(description="By Rook-Ceph, CephFS.")
    replicas: SafeReplicas = Field(default=3, description="On how many nodes each object lies.")
    allow_volume_expansion: bool = Field(
        default=True, strict=True, description="Whether a claim may grow."
    )


_REPLICATED = (LonghornClass, CephBlockClass, CephFilesystemClass)
AnyClass: TypeAlias = Annotated[
    LonghornClass | NfsClass | IscsiClass | CephBlockClass | CephFilesystemClass | LocalPathClass,
    Field(discriminator="kind"),
]


class RecurringJob(Model):
    """What Longhorn does with every volume on a schedule."""

    task: Literal["snapshot", "backup"] = Field(
        description="`snapshot` stays on the same disks; `backup` goes to the target."
    )
    cron: Cron = Field(description="When, in the time of the cluster, usually UTC.")
    retain: Retained = Field(default=7, description="How many are kept of each volume.")


class LonghornBackups(Model):
    """Where Longhorn puts backups: on another machine."""

    target: BackupTarget = Field(description="Bucket or export.")
    credentials: SecretReference | None = Field(
        default=None,
        description="Secret in longhorn-system with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, "
        "for another S3 than Amazon's, AWS_ENDPOINTS.",
    )


class Longhorn(Model):
    """Longhorn itself."""

    data_path: AbsolutePath = Field(
        default="/var/lib/longhorn", description="Directory of each node that holds the replicas."
    )
    backups: LonghornBackups | None = Field(
        default=None, description="Backups to S3 or NFS; none where left out."
    )
    jobs: dict[Name, RecurringJob] = Field(
        default={}, description="Scheduled snapshots and backups of all volumes, by name."
    )


class LocalPath(Model):
    """What serves the classes of kind local-path."""

    provisioner: Literal["cluster", "stack"] = Field(
        default="cluster",
        description="`cluster`: the one that k3s brings, with its own class local-path. `stack`: "
        "this stack runs it, and the cluster's is disabled.",
    )
    directory: AbsolutePath = Field(
        default="/var/lib/rancher/k3s/storage",
        description="Directory of each node that holds the volumes; k3s' own by default. Only with "
        "provisioner stack.",
    )


class Ceph(Model):
    """A Ceph cluster on disks of the nodes that nothing else has."""

    nodes: dict[ObjectName, list[Disk]] = Field(
        description="Raw disks by node. They are erased for Ceph."
    )
    data_path: AbsolutePath = Field(
        default="/var/lib/rook", description="Directory of each node for the monitors."
    )


class Storage(Model):
    """The classes from which claims choose."""

    default: ObjectName | None = Field(
        default=None,
        description="The class of claims that name none: one of these or one that the cluster "
        "brings. Required where classes are declared.",
    )
    classes: dict[ObjectName, AnyClass] = Field(default={}, description="StorageClasses by name.")
    longhorn: Longhorn = Field(
        default=Longhorn(), description="Longhorn, where a class is of that kind."
    )
    local_path: LocalPath = Field(
        default=LocalPath(), description="Who serves them, where a class is of kind local-path."
    )
    ceph: Ceph | None = Field(default=None, description="Ceph, where a class is of its kinds.")

    @property
    def declared(self) -> bool:
        """Whether the stack says anything about storage."""
        return bool(self.classes) or self.default is not None

    @property
    def kinds(self) -> set[str]:
        return {one.kind for one in self.classes.values()}

    @property
    def uses_ceph(self) -> bool:
        return bool(self.kinds & {"ceph-block", "ceph-filesystem"})

    @property
    def runs_local_path(self) -> bool:
        return self.local_path.provisioner == "stack"

    @property
    def namespaces(self) -> dict[str, Path]:
        """The namespaces that come with a tier, by what brings it."""
        found: dict[str, Path] = {}
        for name, one in self.classes.items():
            namespace = {
                "longhorn": LONGHORN_NAMESPACE,
                "nfs": NFS_NAMESPACE,
                "ceph-block": CEPH_NAMESPACE,
                "ceph-filesystem": CEPH_NAMESPACE,
            }.get(one.kind)
            if namespace:
                found.setdefault(namespace, ("storage", "classes", name))
        if self.runs_local_path:
            found[LOCAL_PATH_NAMESPACE] = ("storage", "localPath", "provisioner")
        return found

    def problems(self, cluster: _Cluster, secrets: list[DeclaredSecret]) -> Iterator[Problem]:
        """What is wrong across the fields, and between them and the cluster."""
        yield from self._local_path_problems(cluster)
        if not self.declared:
            return
        yield from self._default_problems(cluster)
        yield from self._name_problems(cluster)
        yield from self._node_problems(cluster)
        yield from self._ceph_problems(cluster)
        yield from self._nfs_problems()
        yield from self._iscsi_problems()
        yield from self._longhorn_problems()
        yield from self._secret_problems(secrets)

    def _brought(self, cluster: _Cluster) -> dict[str, Path]:
        """The classes that are there without this section, by the setting that says so."""
        if isinstance(cluster, ExistingCluster):
            return {cluster.storage_class: ("cluster", "storageClass")}
        brought: dict[str, Path] = {}
        if not _disables_local_storage(cluster):
            brought[LOCAL_PATH] = ("cluster", "disable")
        if isinstance(cluster, K3dCluster):
            brought[cluster.storage_class.name] = ("cluster", "storageClass", "name")
        return brought

    def _local_path_problems(self, cluster: _Cluster) -> Iterator[Problem]:
        disable: Path = ("cluster", "disable")
        path: Path = ("storage", "localPath", "provisioner")
        disabled = _disables_local_storage(cluster)
        if self.runs_local_path and disabled is False:
            yield Problem(
                path,
                "stack",
                "stack only where homelab:cluster.disable has local-storage: two provisioners "
                "would serve each claim",
                "add local-storage to homelab:cluster.disable, or leave the provisioner to the "
                "cluster",
                "would run beside k3s' own",
                [disable],
            )
        elif (
            disabled
            and not self.runs_local_path
            and ("local-path" in self.kinds or isinstance(cluster, K3dCluster))
        ):
            yield Problem(
                (*disable, getattr(cluster, "disable", []).index("local-storage")),
                "local-storage",
                "parts other than local-storage, which serves storage class local-path, unless "
                "this stack runs the provisioner in its place",
                "remove it: without it storageDir would hold no volumes; or set "
                "homelab:storage.localPath.provisioner: stack",
                involves=[path],
            )

    def _default_problems(self, cluster: _Cluster) -> Iterator[Problem]:
        path: Path = ("storage", "default")
        brought = self._brought(cluster)
        known = ", ".join(sorted({*self.classes, *brought}))
        if self.default is None:
            yield Problem(
                path,
                None,
                f"one class for claims that name none: {known}",
                "write its name: of no default or two, Kubernetes leaves a claim pending or takes "
                "the newest",
                "is missing",
                [("storage", "classes")],
            )
            return
        involves = [("storage", "classes", self.default), *brought.values()]
        if self.default not in {*self.classes, *brought}:
            yield Problem(
                path,
                self.default,
                f"a class that is declared or that the cluster brings: {known}",
                "correct the name, or declare it under homelab:storage.classes",
                "is no class of this cluster",
                [*involves, ("storage", "classes")],
            )
            return
        own = cluster.storage_class
        if isinstance(own, str):
            if self.default != own:
                yield Problem(
                    path,
                    self.default,
                    f"homelab:cluster.storageClass, {own}: one default",
                    "write the same class in both",
                    "is a second default",
                    [*involves, ("cluster", "storageClass")],
                )
                return
        else:
            if own.default != (own.name == self.default):
                yield Problem(
                    path,
                    self.default,
                    f"one default: homelab:cluster.storageClass ({own.name}) has default: "
                    f"{str(own.default).lower()}",
                    f"name {own.name} here, or set homelab:cluster.storageClass.default: false"
                    if own.default
                    else "set homelab:cluster.storageClass.default: true",
                    "is a second default" if own.default else "bears no mark",
                    [*involves, ("cluster", "storageClass", "default")],
                )
        if LOCAL_PATH in brought and self.default != LOCAL_PATH and not self.runs_local_path:
            yield Problem(
                path,
                self.default,
                "local-path while k3s runs its own: it marks that as default at each start, and "
                "two would bear the mark",
                "add local-storage to homelab:cluster.disable and set "
                "homelab:storage.localPath.provisioner: stack, or write default: local-path",
                "is a second default beside k3s' own local-path",
                [*involves, ("storage", "localPath", "provisioner")],
            )

    def _name_problems(self, cluster: _Cluster) -> Iterator[Problem]:
        brought = self._brought(cluster)
        for name in self.classes:
            path: Path = ("storage", "classes", name)
            if name in _MADE_BY_LONGHORN:
                yield Problem(
                    path,
                    None,
                    "names other than longhorn and longhorn-static, which Longhorn makes itself",
                    "choose another name, such as longhorn-ssd",
                    "has a name that is taken",
                )
            elif name in brought and not isinstance(cluster, ExistingCluster):
                yield Problem(
                    path,
                    None,
                    f"names other than {', '.join(sorted(brought))}",
                    "remove it: the class is there already; or choose another name",
                    f"has a name that is taken: {key_path(brought[name])} brings that class",
                    [brought[name]],
                )

    def _node_problems(self, cluster: _Cluster) -> Iterator[Problem]:
        if isinstance(cluster, K3dCluster):
            count, where = cluster.servers + cluster.agents, ("cluster", "agents")
        else:
            count, where = len(cluster.nodes), ("cluster", "nodes")
        for name, one in self.classes.items():
            path: Path = ("storage", "classes", name)
            if isinstance(cluster, K3dCluster) and one.kind not in ("nfs", "local-path"):
                yield from _k3d_problems((*path, "kind"), one.kind, cluster)
            elif isinstance(one, _REPLICATED) and one.replicas > count:
                yield Problem(
                    (*path, "replicas"),
                    one.replicas,
                    f"at most {count}, the number of nodes: no node holds two replicas of a volume",
                    "lower it, or add nodes",
                    "is more than there are nodes",
                    [where],
                )

    def _ceph_problems(self, cluster: _Cluster) -> Iterator[Problem]:
        path: Path = ("storage", "ceph")
        if not self.uses_ceph:
            if self.ceph is not None:
                yield Problem(
                    path,
                    None,
                    "disks only where a class is of kind ceph-block or ceph-filesystem",
                    "declare such a class, or remove homelab:storage.ceph",
                    "serves no class",
                    [("storage", "classes")],
                )
            return
        if isinstance(cluster, K3dCluster):
            return
        if self.ceph is None:
            yield Problem(
                path,
                None,
                f"raw disks of at least {_CEPH_NODES} nodes",
                "write them under homelab:storage.ceph.nodes",
                "is missing",
                [path],
            )
            return
        nodes: Path = (*path, "nodes")
        holding = [name for name, disks in self.ceph.nodes.items() if disks]
        if len(holding) < _CEPH_NODES:
            yield Problem(
                nodes,
                None,
                f"at least {_CEPH_NODES} nodes with a raw disk each: monitors need a majority",
                "add nodes with disks, or take Longhorn, which is enough for most homes",
                f"names {len(holding)}",
            )
        for name, disks in self.ceph.nodes.items():
            if name not in cluster.nodes:
                yield Problem(
                    (*nodes, name),
                    None,
                    f"nodes of homelab:cluster.nodes: {', '.join(sorted(cluster.nodes))}",
                    "correct the name",
                    "is no node of the cluster",
                    [("cluster", "nodes")],
                )
            for index, disk in enumerate(disks):
                if disk in disks[:index]:
                    yield Problem(
                        (*nodes, name, index),
                        disk,
                        "each disk once",
                        "remove it",
                        "is there twice",
                    )
        for name, one in self.classes.items():
            if isinstance(one, CephBlockClass | CephFilesystemClass) and (
                len(holding) >= _CEPH_NODES and one.replicas > len(holding)
            ):
                yield Problem(
                    ("storage", "classes", name, "replicas"),
                    one.replicas,
                    f"at most {len(holding)}, the number of nodes with disks",
                    "lower it, or add disks on other nodes",
                    "is more than there are nodes with disks",
                    [nodes, ("cluster", "nodes")],
                )

    def _nfs_problems(self) -> Iterator[Problem]:
        directories: dict[tuple[str, str, str], Path] = {}
        for name, one in self.classes.items():
            if isinstance(one, NfsClass):
                path: Path = ("storage", "classes", name)
                key = (one.server, one.share, one.sub_directory)
                first = directories.setdefault(key, path)
                if first != path:
                    yield Problem(
                        path,
                        None,
                        "one class for a directory: two names hide that they share its files",
                        "remove one of the two, or give it another subDirectory",
                        f"is the same directory as {key_path(first)}",
                        [first],
                    )

    def _iscsi_problems(self) -> Iterator[Problem]:
        luns: dict[tuple[str, str, int], Path] = {}
        names: dict[str, Path] = {}
        for name, one in self.classes.items():
            if not isinstance(one, IscsiClass):
                continue
            if not one.volumes:
                yield Problem(
                    ("storage", "classes", name, "volumes"),
                    None,
                    "at least one volume: nothing makes LUNs on demand",
                    "declare the LUNs of the NAS, or remove the class",
                    "names no volume",
                )
            for volume, declared in one.volumes.items():
                path: Path = ("storage", "classes", name, "volumes", volume)
                portal = one.portal if ":" in one.portal else f"{one.portal}:3260"
                key = (portal, declared.iqn, declared.lun)
                first = luns.setdefault(key, path)
                if first != path:
                    yield Problem(
                        path,
                        None,
                        "each LUN once: a file system that two mount is destroyed",
                        "give one of the two another target or LUN",
                        f"is the same LUN as {key_path(first)}",
                        [first],
                    )
                named = names.setdefault(volume, path)
                if named != path:
                    yield Problem(
                        path,
                        None,
                        "each name once over all classes: a PersistentVolume has no namespace",
                        "rename one of the two",
                        f"has the name of {key_path(named)}",
                        [named],
                    )

    def _longhorn_problems(self) -> Iterator[Problem]:
        path: Path = ("storage", "longhorn")
        longhorn = self.longhorn
        if "longhorn" not in self.kinds:
            if longhorn != Longhorn():
                yield Problem(
                    path,
                    None,
                    "these only where a class is of kind longhorn",
                    "declare such a class, or remove homelab:storage.longhorn",
                    "serves no class",
                    [("storage", "classes")],
                )
            return
        for name, job in longhorn.jobs.items():
            if job.task == "backup" and longhorn.backups is None:
                yield Problem(
                    (*path, "jobs", name, "task"),
                    job.task,
                    "backup only with homelab:storage.longhorn.backups",
                    "name a target, or take snapshots alone",
                    "has nowhere to go",
                    [(*path, "backups")],
                )
        backups = longhorn.backups
        if backups and backups.target.startswith("s3://") and backups.credentials is None:
            yield Problem(
                (*path, "backups", "credentials"),
                None,
                "the Secret with the keys of the bucket",
                f"declare one under homelab:secrets.{LONGHORN_NAMESPACE} and name it here",
                "is missing",
                [(*path, "backups", "target")],
            )
        credentials = backups.credentials if backups else None
        if credentials and credentials.namespace != LONGHORN_NAMESPACE:
            yield Problem(
                (*path, "backups", "credentials", "namespace"),
                credentials.namespace,
                f"{LONGHORN_NAMESPACE}: Longhorn reads its credentials nowhere else",
                "declare the Secret there",
                "is out of Longhorn's reach",
            )

    def _secret_problems(self, secrets: list[DeclaredSecret]) -> Iterator[Problem]:
        declared = {(one.namespace, one.name): one.secret for one in secrets}
        for path, reference, kind, keys in self._references():
            secret = declared.get((reference.namespace, reference.name))
            if secret is None:
                yield Problem(
                    path,
                    None,
                    "a Secret of homelab:secrets",
                    f"declare homelab:secrets.{reference.namespace}.{reference.name}, its values "
                    "encrypted or from decrypted files",
                    f"names Secret {reference.namespace}/{reference.name}, which is not declared",
                    [("secrets", reference.namespace)],
                )
                continue
            of: Path = ("secrets", reference.namespace, reference.name)
            if secret.type != kind:
                yield Problem(
                    (*of, "type"),
                    secret.type,
                    f"{kind}, as {key_path(path)} needs it",
                    f"write type: {kind}",
                    "is of no use there",
                    [path],
                )
            missing = keys - (secret.data.keys() | secret.files.keys())
            if missing and not secret.manifest:
                yield Problem(
                    of,
                    None,
                    f"also {', '.join(sorted(missing))}, which {key_path(path)} needs",
                    "add them under data or files",
                    "lacks a key",
                    [path, (*of, "data"), (*of, "files")],
                )

    def _references(self) -> Iterator[tuple[Path, SecretReference, str, frozenset[str]]]:
        """Each Secret that is named: where, which, its type, and the keys that it needs."""
        for name, one in self.classes.items():
            path: Path = ("storage", "classes", name)
            if isinstance(one, LonghornClass) and one.encryption:
                yield (*path, "encryption"), one.encryption, "Opaque", _CRYPTO_KEYS
            if isinstance(one, IscsiClass):
                for volume, declared in one.volumes.items():
                    if declared.chap:
                        yield (
                            (*path, "volumes", volume, "chap"),
                            declared.chap,
                            "kubernetes.io/iscsi-chap",
                            _CHAP_KEYS,
                        )
        backups = self.longhorn.backups
        if backups and backups.credentials and backups.target.startswith("s3://"):
            where: Path = ("storage", "longhorn", "backups", "credentials")
            yield where, backups.credentials, "Opaque", _S3_KEYS


def _disables_local_storage(cluster: _Cluster) -> bool | None:
    """Whether k3s was told to leave its provisioner out; None where that is not this stack's."""
    if isinstance(cluster, ExistingCluster):
        return None
    return "local-storage" in cluster.disable


def _k3d_problems(path: Path, kind: str, cluster: K3dCluster) -> Iterator[Problem]:
    """Nodes in containers have no initiator and no disks of their own. An image that is not k3s's
    own may bring an initiator.
    """
    stock = cluster.image.partition("@")[0].rpartition(":")[0].endswith("rancher/k3s")
    ceph = kind.startswith("ceph")
    if not (stock or ceph):
        return
    reason = (
        "its nodes are containers without disks of their own"
        if ceph
        else "k3s' image has no open-iscsi (k3d issue 719)"
    )
    ways = "take kind nfs or local-path, or native k3s (kind: k3s)"
    if not ceph:
        ways += ", or a node image of your own with open-iscsi under homelab:cluster.image"
    yield Problem(
        path,
        kind,
        f"nfs or local-path on kind k3d: {reason}",
        ways,
        "does not work on k3d's nodes",
        [("cluster", "image"), ("cluster", "kind")],
    )
