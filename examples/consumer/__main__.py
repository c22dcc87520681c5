"""Deploys into the cluster of a homelab stack, knowing it only by its outputs."""

import pulumi
import pulumi_kubernetes as kubernetes

from homelab import Platform

platform = Platform(pulumi.Config().require("platform"))
cluster = kubernetes.Provider(
    "cluster",
    kubeconfig=platform.kubeconfig,
    # Tied to the cluster's identity: a rotated certificate replaces nothing, another cluster
    # replaces everything.
    cluster_identifier=platform.cluster["identity"],
    # Without it every changed ConfigMap is replaced.
    enable_config_map_mutable=True,
)
options = pulumi.ResourceOptions(provider=cluster)

namespace = kubernetes.core.v1.Namespace("consumer", metadata={"name": "consumer"}, opts=options)
kubernetes.core.v1.ConfigMap(
    "platform",
    metadata={"name": "platform", "namespace": namespace.metadata.name},
    data={
        "cluster": platform.cluster["name"],
        "storageClass": platform.cluster["storageClass"],
        # Sorted, since a mapping that comes from another stack has no order of its own.
        "urls": pulumi.Output.json_dumps(platform.urls, sort_keys=True),
    },
    opts=options,
)

pulumi.export("cluster", platform.cluster["name"])
pulumi.export("urls", platform.urls)
