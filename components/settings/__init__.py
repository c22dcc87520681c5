"""The typed settings of a stack: frozen, complete, and refused as a whole when anything in them is
wrong.

:func:`load` reads those of the current stack and is the only reader of Pulumi's configuration.
``Settings.model_validate`` takes the same mapping without Pulumi. Either raises
:class:`SettingsError`, whose text names every refused key, its value unless that is a secret, what
is allowed, and the remedy.
"""

from components.settings.access import ClusterAccess, PolicyRule, Role
from components.settings.argocd import ApplicationSet, ArgoCD, MemberCluster
from components.settings.cluster import (
    Acceptance,
    Api,
    DockerNetwork,
    K3dCluster,
    KubeconfigFile,
    PublishedPort,
    StorageClass,
)
from components.settings.config import load
from components.settings.existing import ExistingCluster, KubeconfigSource, Node
from components.settings.fleet import read_file, stack_files
from components.settings.host import Host, K3d
from components.settings.k3s import JoinTokenSource, K3sCluster, K3sNode, Snapshots, VirtualIp
from components.settings.namespace import Namespace, NetworkPolicy, PodSecurity
from components.settings.network import (
    Acme,
    Attachment,
    Ipam,
    Lan,
    MetalLB,
    Multus,
    Network,
    Pool,
    Traefik,
)
from components.settings.problem import Problem, SettingsError
from components.settings.secrets import (
    DeclaredSecret,
    Secret,
    SecretCopy,
    SecretType,
    missing_keys,
)
from components.settings.stack import AnyCluster, Settings
from components.settings.storage import (
    AnyClass,
    Ceph,
    CephBlockClass,
    CephFilesystemClass,
    IscsiClass,
    IscsiVolume,
    LocalPathClass,
    Longhorn,
    LonghornClass,
    NfsClass,
    SecretReference,
    Storage,
)
from components.settings.tailscale import AuthKey, Operator, Tailscale, auth_key_problem
from components.settings.tunnel import (
    Access,
    Adopt,
    Cloudflare,
    ClusterConnector,
    ExternalConnector,
    HostConnector,
    Origin,
    Route,
    Tunnel,
    token_secret_name,
)
from components.settings.upkeep import (
    Backups,
    Cleaning,
    PostgresBackup,
    S3Target,
    VolumeBackup,
    Watching,
    Webhook,
)

__all__ = [
    "Acceptance",
    "Access",
    "Acme",
    "Adopt",
    "AnyClass",
    "AnyCluster",
    "Api",
    "ApplicationSet",
    "ArgoCD",
    "Attachment",
    "AuthKey",
    "Backups",
    "Ceph",
    "CephBlockClass",
    "CephFilesystemClass",
    "Cleaning",
    "Cloudflare",
    "ClusterAccess",
    "ClusterConnector",
    "DeclaredSecret",
    "DockerNetwork",
    "ExistingCluster",
    "ExternalConnector",
    "Host",
    "HostConnector",
    "Ipam",
    "IscsiClass",
    "IscsiVolume",
    "JoinTokenSource",
    "K3d",
    "K3dCluster",
    "K3sCluster",
    "K3sNode",
    "KubeconfigFile",
    "KubeconfigSource",
    "Lan",
    "LocalPathClass",
    "Longhorn",
    "LonghornClass",
    "MemberCluster",
    "MetalLB",
    "Multus",
    "Namespace",
    "Network",
    "NetworkPolicy",
    "NfsClass",
    "Node",
    "Operator",
    "Origin",
    "PodSecurity",
    "PolicyRule",
    "Pool",
    "PostgresBackup",
    "Problem",
    "PublishedPort",
    "Role",
    "Route",
    "S3Target",
    "Secret",
    "SecretCopy",
    "SecretReference",
    "SecretType",
    "Settings",
    "SettingsError",
    "Snapshots",
    "Storage",
    "StorageClass",
    "Tailscale",
    "Traefik",
    "Tunnel",
    "VirtualIp",
    "VolumeBackup",
    "Watching",
    "Webhook",
    "auth_key_problem",
    "load",
    "missing_keys",
    "read_file",
    "stack_files",
    "token_secret_name",
]
