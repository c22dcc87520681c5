"""p510 with one resource of each kind, and how two of its lives are compared."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from rehearsal.core import ASIDE
from tests.engine.conftest import P510, StackRehearsal

# What each life makes up anew: ids of Cloudflare, of Docker and of the cluster, tokens, and how
# often something was healed or written, which tells of the way and not of its end.
_MADE_UP = [
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "UUID"),
    (re.compile(r"[0-9a-f]{16,}"), "HEX"),
    (re.compile(r"[A-Za-z0-9+/]{60,}=*"), "BASE64"),
    (re.compile(r"(generation\W+)\d+"), r"\1N"),
]


class EveryKind(P510):
    """p510, but of each kind of resource just one or two: half the time."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self.edited() as settings:
            kept = ("factory-cli-creds", "minio-creds")
            secrets = settings["secrets"]["factory"]
            settings["secrets"] = {"factory": {name: secrets[name] for name in kept}}
            for tunnel in settings["tunnels"].values():
                tunnel["routes"] = tunnel["routes"][:2]
            del settings["tailscale"]


class Few(P510):
    """p510 with one Secret and one gated route to the host: what is found by a natural key."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self.edited() as settings:
            secrets = settings["secrets"]["factory"]
            settings["secrets"] = {"factory": {"minio-creds": secrets["minio-creds"]}}
            tunnel = settings["tunnels"]["p510"]
            settings["tunnels"] = {"p510": {**tunnel, "routes": [tunnel["routes"][1]]}}
            for section in ("tailscale", "argocd", "backups", "cleaning"):
                del settings[section]


def state(stack: StackRehearsal) -> dict[str, str]:
    """The inputs of all resources by URN, without what each life makes up anew."""
    exported = json.loads(stack.pulumi("stack", "export", "--show-secrets").stdout)["deployment"]
    assert not exported.get("pending_operations"), exported["pending_operations"]
    resources = exported.get("resources", [])
    # No two of a name, none that waits for its deletion.
    assert len({resource["urn"] for resource in resources}) == len(resources)
    return {r["urn"]: made_up(json.dumps(r.get("inputs"), sort_keys=True)) for r in resources}


def world(stack: StackRehearsal) -> Counter[str]:
    """All that exists, as often as it exists, without what each life makes up anew."""
    found = Counter[str]()
    for path in stack.world.rglob("*"):
        parts = path.relative_to(stack.world).parts
        of_the_way = ".ids" in parts or parts[:2] in _OF_THE_WAY or path.suffix == ASIDE
        if path.is_file() and not of_the_way:
            found[made_up("/".join(parts))] += 1
    return found


_OF_THE_WAY = {("machine", name) for name in ("locks", "nonces", "slept", "started")}


def made_up(text: str) -> str:
    """The text without what each life makes up anew."""
    for pattern, name in _MADE_UP:
        text = pattern.sub(name, text)
    return text


def kinds(stack: StackRehearsal) -> dict[str, dict[str, Any]]:
    """One of the resources of each kind in the state, by kind; of the host's commands all."""
    return {r["type"] if "Command" not in r["type"] else r["urn"]: r for r in stack.resources()}
