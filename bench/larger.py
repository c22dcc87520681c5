"""Stacks of any size: p510 with Secrets and routes added to it."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from rehearsal.run import CHECKOUT, with_made_up_secrets

NAMESPACE = "factory"
TUNNEL = "factory"


def name(number: int) -> str:
    """The name of an added Secret, and the first label of an added route: `bench-00001`."""
    return f"bench-{number:05}"


def p510() -> dict[str, Any]:
    """The configuration in Pulumi.p510.yaml, with made-up secrets where it leaves them out."""
    stack_file = yaml.safe_load((CHECKOUT / "Pulumi.p510.yaml").read_text())
    return with_made_up_secrets(stack_file["config"])[0]


def larger(config: Mapping[str, Any], secrets: int = 0, routes: int = 0) -> dict[str, Any]:
    """A stack's configuration with that many Secrets and routes more; nothing else differs.

    All Secrets have the same value. A section may be JSON text, as a program is given it.
    """
    sections = {
        key: json.loads(config[key]) if isinstance(config[key], str) else config[key]
        for key in ("homelab:secrets", "homelab:tunnels")
    }
    tunnels = sections["homelab:tunnels"]
    added = [
        {
            "hostname": f"{name(number)}.example.org",
            "service": f"http://{name(number)}.{NAMESPACE}.svc.cluster.local:80",
        }
        for number in range(1, routes + 1)
    ]
    values = {name(number): {"data": {"value": "bench"}} for number in range(1, secrets + 1)}
    inside = sections["homelab:secrets"].get(NAMESPACE, {})
    return {
        **config,
        "homelab:secrets": {**sections["homelab:secrets"], NAMESPACE: {**inside, **values}},
        "homelab:tunnels": {
            **tunnels,
            TUNNEL: {**tunnels[TUNNEL], "routes": [*tunnels[TUNNEL]["routes"], *added]},
        },
    }
