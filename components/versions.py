"""Versions of all images and charts that the project names: nothing else may name another one.

Renovate updates them (renovate.json), here and in the pages that show them. A stack file may pin
its own, and for its cluster must: a node image takes effect only where a cluster is made anew, so
it does not follow what is newest here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """A chart of a Helm repository, at one version."""

    name: str
    repository: str
    version: str


K3S = "rancher/k3s:v1.31.5-k3s1"
CLOUDFLARED = (
    "cloudflare/cloudflared:2025.8.1"
    "@sha256:b77d84e8704db38db22c22661cf7e56468c526e3a6a5fe9c8b7c151452fa1472"
)
CURL = (
    "curlimages/curl:8.11.1@sha256:c1fe1679c34d9784c1b0d1e5f62ac0a79fca01fb6377cdd33e90473c6f9f9a69"
)
# The image that k3s itself brings for its volumes.
LOOKUP = "rancher/mirrored-library-busybox:1.36.1"
BUSYBOX = (
    "docker.io/library/busybox:1.37.0"
    "@sha256:bdf57e528e45e4433820e045b29b4597825a1c9e38353532d90a01445013f82e"
)
KUBE_VIP = "ghcr.io/kube-vip/kube-vip:v0.9.2"

CEPH = "quay.io/ceph/ceph:v19.2.3"
LOCAL_PATH_PROVISIONER = "rancher/local-path-provisioner:v0.0.35"
# The thin plugin: the thick one needs mounts shared with the host, which k3d's nodes have not.
MULTUS = "ghcr.io/k8snetworkplumbingwg/multus-cni:v4.2.4"

CALICO = Chart("tigera-operator", "https://docs.tigera.io/calico/charts", "v3.30.3")
CSI_DRIVER_NFS = Chart(
    "csi-driver-nfs",
    "https://raw.githubusercontent.com/kubernetes-csi/csi-driver-nfs/master/charts",
    "4.13.4",
)
LONGHORN = Chart("longhorn", "https://charts.longhorn.io", "1.11.2")
METALLB = Chart("metallb", "https://metallb.github.io/metallb", "0.16.1")
ROOK_CEPH = Chart("rook-ceph", "https://charts.rook.io/release", "v1.19.6")
TAILSCALE_OPERATOR = Chart("tailscale-operator", "https://pkgs.tailscale.com/helmcharts", "1.86.2")
TRAEFIK = Chart("traefik", "https://traefik.github.io/charts", "41.3.0")
