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
