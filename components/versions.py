"""Versions of all images and charts that the project names: nothing else may name another one.

Renovate updates them by the comment above each (renovate.json), and repeats an image's in the pages
that show it. A stack file may pin its own, and for its cluster must: a node image takes effect only
where a cluster is made anew, so it does not follow what is newest here.
"""

# renovate: datasource=docker depName=rancher/k3s
K3S = "rancher/k3s:v1.31.5-k3s1"

# renovate: datasource=docker depName=cloudflare/cloudflared
CLOUDFLARED = "cloudflare/cloudflared:2025.8.1"

# renovate: datasource=docker depName=curlimages/curl
CURL = (
    "curlimages/curl:8.11.1@sha256:c1fe1679c34d9784c1b0d1e5f62ac0a79fca01fb6377cdd33e90473c6f9f9a69"
)

# renovate: datasource=helm depName=tailscale-operator registryUrl=https://pkgs.tailscale.com/helmcharts
TAILSCALE_OPERATOR = "1.86.2"
