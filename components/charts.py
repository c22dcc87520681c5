"""Helm charts and images that components bring along: each version is written here and nowhere
else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """A chart of a Helm repository, at one version."""

    name: str
    repository: str
    version: str


METALLB = Chart("metallb", "https://metallb.github.io/metallb", "0.16.1")
TRAEFIK = Chart("traefik", "https://traefik.github.io/charts", "41.3.0")
BUSYBOX = "docker.io/library/busybox:1.37.0"
# curl's own image; its entry point is not used.
CURL = (
    "curlimages/curl:8.11.1@sha256:c1fe1679c34d9784c1b0d1e5f62ac0a79fca01fb6377cdd33e90473c6f9f9a69"
)
