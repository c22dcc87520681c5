"""Volumes on the disk of a k3d cluster's host that outlive their cluster."""

from dataclasses import dataclass

import pulumi
import pulumi_kubernetes as kubernetes

from components import settings
from components.cluster import Cluster


@dataclass(frozen=True)
class LocalStorageArgs:
    """``settings`` name the class."""

    settings: settings.StorageClass
    cluster: Cluster


class LocalStorage(pulumi.ComponentResource):
    """A StorageClass of k3s' own provisioner whose volumes a cluster that is made anew finds again
    (incident 10): a claim of the same namespace and name gets the same directory of storageDir.
    """

    storage_class: pulumi.Output[str]
    """Its name."""

    def __init__(
        self, name: str, args: LocalStorageArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:LocalStorage", name, None, opts)
        made = kubernetes.storage.v1.StorageClass(
            args.settings.name,
            metadata={
                "name": args.settings.name,
                "annotations": {
                    "storageclass.kubernetes.io/is-default-class": str(
                        args.settings.default
                    ).lower(),
                    # As k3s' own class: a `local` volume takes a pod's fsGroup, a hostPath does not
                    # (k3s-io/k3s#9872).
                    "defaultVolumeType": "local",
                },
            },
            provisioner="rancher.io/local-path",
            # Newer provisioners refuse a path that does not begin with exactly this, slash included
            # (CVE-2025-62878).
            parameters={"pathPattern": "{{ .PVC.Namespace }}/{{ .PVC.Name }}/"},
            reclaim_policy="Retain",
            volume_binding_mode="WaitForFirstConsumer",
            opts=pulumi.ResourceOptions(
                parent=self,
                provider=args.cluster.provider,
                deleted_with=args.cluster.identity,
            ),
        )
        self.storage_class = made.metadata.name
        self.register_outputs({"storageClass": self.storage_class})
