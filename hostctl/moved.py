"""What a move to another host (incident 16) means for the verbs of a cluster on either host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hostctl.machine import STATE_DIRECTORY, Machine
from hostctl.protocol import Failure

MOVED_SECRETS = f"{STATE_DIRECTORY}/clusters/%s/move.json"
"""What a moved datastore opens with: root only, and never in the record, which all may read."""
MOVED_PASSWORD = f"{STATE_DIRECTORY}/clusters/%s/node-password"
PASSWORD_IN_NODE = "/etc/rancher/node/password"


def refuse_moved(name: str, record: Mapping[str, Any], doing: str) -> None:
    """Refuses to touch a cluster that was frozen here or handed back: two of one identity would
    both write, and both would serve."""
    move = record.get("move") or {}
    step = f"{doing} cluster {name}"
    if move.get("role") == "from":
        remedies = {
            "released": f"it lives on another host; `hostctl k3d delete {name} --confirm {name}`"
            " forgets that it was ever here",
            "frozen": f"finish the move, or go back: hostctl move back {name} --confirm {name}",
        }
        remedy = remedies.get(move["step"], f"run it again: hostctl move freeze {name}")
        cause = f"it is {move['step']} on this host since {move['at']}, to be moved to another"
        raise Failure("refused", step, cause, remedy)
    if move.get("role") == "to" and move["step"] not in ("imported", "up", "open"):
        withdrawn = move["step"] == "withdrawn"
        cause = "it was withdrawn from this host" if withdrawn else "its import was cut off"
        remedy = "move it here again" if withdrawn else "run the import again"
        raise Failure("refused", step, f"{cause} at {move['at']}", f"{remedy} (docs/move.md)")


def arriving(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The move of a cluster that was imported here and that no create has brought up yet."""
    move = record.get("move") or {}
    return move if move.get("role") == "to" and move["step"] == "imported" else None


def refuse_from_nothing(spec: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Refuses to make an empty cluster where another host's is awaited."""
    if spec["moved_from"] and not arriving(record):
        raise Failure(
            "refused",
            f"creating cluster {spec['name']}",
            f"it is to come from {spec['moved_from']}, and nothing was imported here",
            "move it first (docs/move.md), or take movedFrom out of the settings to begin with an "
            "empty cluster",
        )


def moved_secrets(machine: Machine, name: str) -> dict[str, Any]:
    """Token and node password of the cluster that was imported."""
    return json.loads(machine.read(MOVED_SECRETS % name))
