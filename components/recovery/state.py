"""Edits of an exported state, and what a preview says of it."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from components.recovery.engine import Engine, RecoveryError

Resource = dict[str, Any]


def take(deployment: dict[str, Any], taken: Iterable[tuple[Resource, str]]) -> None:
    """Puts resources with these ids into a deployment, each after what it needs.

    A resource that replaces one of the same name takes its place; the old one stays, to be deleted,
    as the engine itself would have it.
    """
    resources: list[Resource] = deployment.setdefault("resources", [])
    for resource, id in taken:
        for old in resources:
            if old["urn"] == resource["urn"]:
                old["delete"] = True
        known = {one["urn"] for one in resources}
        resources.append(
            {
                **resource,
                **({"id": id} if id else {}),
                # What refresh reads comes into the outputs; till then they are what is declared.
                "outputs": resource.get("inputs", {}),
                # Up writes the others again, once they are there.
                "dependencies": [u for u in resource.get("dependencies") or [] if u in known],
                "propertyDependencies": {
                    name: [urn for urn in urns or [] if urn in known]
                    for name, urns in (resource.get("propertyDependencies") or {}).items()
                },
            }
        )


def read_anew(engine: Engine, urns: Collection[str]) -> set[str]:
    """Has the providers read what was taken; those that are there stay in the state and are
    returned.

    A Kubernetes object stays with the field manager that made it: of another one its next change
    would be refused as a conflict (pulumi-kubernetes, provider.go, fieldManagerName).
    """
    engine.refresh(sorted(urns))
    state = engine.export()
    there = [one for one in state["deployment"]["resources"] if one["urn"] in urns]
    for resource in there:
        outputs = resource.get("outputs") or {}
        if "__fieldManager" not in outputs:
            continue
        managers = {
            entry["manager"]
            for entry in (outputs.get("metadata") or {}).get("managedFields") or []
            if entry["manager"].startswith("pulumi-kubernetes-") and not entry.get("subresource")
        }
        if len(managers) == 1:
            outputs["__fieldManager"] = managers.pop()
    engine.import_(state)
    return {resource["urn"] for resource in there}


@dataclass(frozen=True)
class Difference:
    """Where an object differs from what the program declares. ``paths`` name fields, never what is
    in them; ``overwrites`` unless all that is declared is only missing there.
    """

    urn: str
    operation: str
    paths: list[str]
    overwrites: bool

    def __str__(self) -> str:
        return f"{described(self.urn)}: {', '.join(self.paths) or 'it'} ({self.operation})"


def differences(engine: Engine, taken: Collection[str]) -> list[Difference]:
    """Where the resources of these URNs differ, by a preview."""
    steps = json.loads(engine.run("preview", "--json")).get("steps") or []
    return [
        difference(step)
        for step in steps
        if step["urn"] in taken and step["op"] not in ("same", "read", "refresh")
    ]


def difference(step: Mapping[str, Any]) -> Difference:
    """The difference that a step of a preview shows."""
    detailed = step.get("detailedDiff") or {}
    paths = sorted(detailed) or sorted(step.get("diffReasons") or [])
    kinds = {diff["kind"] for diff in detailed.values()}
    return Difference(step["urn"], step["op"], paths, step["op"] != "update" or kinds != {"add"})


def described(urn: str) -> str:
    """A resource in messages: its type and name."""
    type, _, name = urn.split("::", 2)[2].partition("::")
    return f"{type.rpartition('$')[2].rpartition(':')[2]} {name}"


def refuse_to_overwrite(conflicts: list[Difference]) -> None:
    """Raises RecoveryError if what was taken is not what is declared."""
    if conflicts:
        raise RecoveryError(
            "what exists is not what is declared, and up would overwrite it:\n"
            + "\n".join(f"  {conflict}" for conflict in conflicts)
            + "\n  Cause: someone else made or changed it\n  Remedy: declare it as it is; or, if"
            " what is declared shall hold, look at `pulumi preview --diff` and run `pulumi up`."
        )
