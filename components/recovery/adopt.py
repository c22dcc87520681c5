"""`make adopt`: takes over what the incumbent made, or what a lost state held."""

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from components.cluster.k3d import ADOPTING
from components.recovery.engine import Engine, RecoveryError
from components.recovery.keys import Key, is_unknown, natural_key
from components.recovery.look import look_up, undeclared_secrets
from components.recovery.state import (
    Difference,
    Resource,
    described,
    difference,
    read_anew,
    refuse_to_overwrite,
    take,
)


@dataclass
class _Found:
    """What a program declares, as far as it exists and the state does not hold it."""

    taken: list[str] = field(default_factory=list)
    asked: set[str] = field(default_factory=set)
    differences: list[Difference] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """What up creates; Commands run again and are not among them."""
    told: list[str] = field(default_factory=list)
    """What the program said of it, such as the commit that ArgoCD's bootstrap moves to."""


def adopt(engine: Engine, take: bool = False) -> None:
    """Says what exists of all that the program declares and the state does not hold, and where it
    differs. With ``take`` puts it into the state and runs up, which makes what is missing.

    All is tried on a state of its own first, so that nothing is changed before it is known to be
    whole. Raises RecoveryError when something cannot be told, and with ``take`` when up would
    overwrite anything.
    """
    known = _state(engine)
    if known and known["deployment"].get("pending_operations"):
        raise RecoveryError(
            "the state holds operations that were cut off.\n  Cause: a run died\n  Remedy: `make"
            f" recover STACK={engine.stack}` first."
        )
    with _aside(engine, known) as aside:
        found = _find(aside)
        state = aside.export()
        secrets = {
            resource["id"]
            for resource in state["deployment"]["resources"]
            if resource["type"] == "kubernetes:core/v1:Secret"
        }
        undeclared = undeclared_secrets(aside, secrets)
    _report(engine, found)
    for name in undeclared:
        engine.say(f"Secret in the cluster that is declared nowhere: {name}")
    conflicts = [one for one in found.differences if one.overwrites]
    if not take:
        if conflicts:
            engine.say("refused as long as these differ: declare them as they are")
        return
    refuse_to_overwrite(conflicts)
    if known is None:
        engine.run("stack", "init", engine.stack, on_stack=False)
    engine.import_(state)
    engine.run("up", "--yes", "--skip-preview", shown=True)
    engine.run("preview", "--expect-no-changes")
    engine.say("taken over: a preview finds nothing to change")


def _state(engine: Engine) -> dict[str, Any] | None:
    """The state; None where the backend knows no such stack."""
    try:
        return engine.export()
    except RecoveryError as error:
        if "no stack named" not in str(error):
            raise
        return None


@contextlib.contextmanager
def _aside(engine: Engine, known: Mapping[str, Any] | None) -> Iterator[Engine]:
    """The same stack with a copy of its state in a backend of its own."""
    file = engine.directory / f"Pulumi.{engine.stack}.yaml"
    settings = yaml.safe_load(file.read_text())
    if not settings.keys() & {"encryptionsalt", "secretsprovider"}:
        raise RecoveryError(
            f"{file.name} has neither encryptionsalt nor secretsprovider.\n  Cause: its secrets are"
            " encrypted by the backend, or there are none yet\n  Remedy: `pulumi stack init`, or"
            " `pulumi stack change-secrets-provider passphrase`; then run this again."
        )
    with tempfile.TemporaryDirectory(prefix="homelab-adopt-") as directory:
        environment = {
            **(engine.environment if engine.environment is not None else os.environ),
            "PULUMI_BACKEND_URL": f"file://{directory}",
            ADOPTING: "1",
        }
        aside = replace(engine, environment=environment)
        aside.run("stack", "init", engine.stack, on_stack=False)
        if known:
            aside.import_(known)
        yield aside


def _find(aside: Engine) -> _Found:
    """Takes round by round what exists: the id of one is often an input of the next."""
    found = _Found()
    while True:
        plan, steps, found.told = _planned(aside)
        state = aside.export()
        resources = state["deployment"].get("resources") or []
        candidates = _candidates(plan, resources, found.asked, whole=True)
        if not candidates:
            # What is still not known depends on what up runs. It is not compared.
            candidates = _candidates(plan, resources, found.asked, whole=False)
        if not candidates:
            break
        ids = look_up(aside, {key for _, key in candidates})
        entries = [(goal, ids[key]) for goal, key in candidates if key in ids]
        found.asked |= {goal["urn"] for goal, _ in candidates}
        if entries:
            take(state["deployment"], _with_owners(plan, resources, entries))
            aside.import_(state)
            found.taken += sorted(read_anew(aside, {goal["urn"] for goal, _ in entries}))
    doomed = sorted({step["urn"] for step in steps if step["op"] in ("delete", "delete-replaced")})
    if doomed:
        # What is gone already, some plugins refuse to delete.
        aside.refresh(doomed)
    for step in steps:
        if step["urn"] in found.taken and step["op"] not in ("same", "read", "refresh"):
            found.differences.append(difference(step))
    found.missing = [
        urn
        for urn, resource in plan.items()
        if natural_key(resource["type"], resource["inputs"]) and urn not in found.taken
    ]
    return found


def _planned(engine: Engine) -> tuple[dict[str, Resource], list[dict[str, Any]], list[str]]:
    """What a preview would create, as resources of a state without ids, all of its steps, and what
    it told.
    """
    with tempfile.TemporaryDirectory(prefix="homelab-adopt-") as directory:
        file = Path(directory) / "plan.json"
        preview = json.loads(engine.run("preview", "--json", "--save-plan", str(file)))
        plans = json.loads(file.read_text())["resourcePlans"]
    created = {
        urn: _resource(urn, plan["goal"])
        for urn, plan in plans.items()
        if "create" in (plan.get("steps") or [])
    }
    told = [one["message"].strip() for one in preview.get("diagnostics") or []]
    return created, preview["steps"], list(dict.fromkeys(told))


def _resource(urn: str, goal: Mapping[str, Any]) -> Resource:
    """The resource that a goal of a plan describes (sdk/go/common/apitype, GoalV1)."""
    kept = ("type", "custom", "parent", "provider", "dependencies", "propertyDependencies")
    options = ("protect", "additionalSecretOutputs")
    return {
        "urn": urn,
        **{name: goal[name] for name in kept if goal.get(name) is not None},
        **{name: goal[name] for name in options if goal.get(name)},
        "inputs": goal["inputDiff"].get("adds") or {},
    }


def _candidates(
    plan: Mapping[str, Resource], resources: list[Resource], asked: set[str], *, whole: bool
) -> list[tuple[Resource, Key]]:
    """What is to be looked for: declared, named, not asked for yet, and of a provider that can be
    asked. ``whole``: with inputs that are all known.
    """
    usable = {one["urn"] for one in resources} | {
        urn for urn, resource in plan.items() if not is_unknown(resource["inputs"])
    }
    candidates = []
    for urn, resource in plan.items():
        key = natural_key(resource["type"], resource["inputs"])
        provider = resource.get("provider", "").rpartition("::")[0]
        if key is None or urn in asked or provider not in usable:
            continue
        if is_unknown(resource["inputs"]):
            if whole:
                continue
            resource = {**resource, "inputs": _known(resource["inputs"])}
        candidates.append((resource, key))
    return candidates


def _known(inputs: Any) -> Any:
    """The inputs without what is unknown."""
    if isinstance(inputs, dict):
        return {name: _known(value) for name, value in inputs.items() if not is_unknown(value)}
    return inputs


def _with_owners(
    plan: Mapping[str, Resource], resources: list[Resource], entries: list[tuple[Resource, str]]
) -> Iterator[tuple[Resource, str]]:
    """The entries, each after its parents and its provider, which the state may not hold yet."""
    ids = {one["urn"]: one.get("id", "") for one in resources}
    wanted = {resource["urn"]: (resource, id) for resource, id in entries}

    def add(urn: str) -> Iterator[tuple[Resource, str]]:
        if not urn or urn in ids:
            return
        resource, id = wanted.get(urn) or (plan[urn], "")
        if urn not in wanted and resource["custom"]:
            id = str(uuid.uuid4())  # a provider: the engine makes its id up as well
        yield from add(resource.get("parent", ""))
        provider = resource.get("provider", "").rpartition("::")[0]
        if provider:
            yield from add(provider)
            resource = {**resource, "provider": f"{provider}::{ids[provider]}"}
        ids[urn] = id
        yield resource, id

    for urn in wanted:
        yield from add(urn)


def _report(engine: Engine, found: _Found) -> None:
    for message in found.told:
        engine.say(message)
    differing = {one.urn: one for one in found.differences}
    for urn in sorted(found.taken, key=described):
        if urn not in differing:
            engine.say(f"exists as declared: {described(urn)}")
    for one in sorted(found.differences, key=str):
        said = "differs" if one.overwrites else "exists, declared in addition"
        engine.say(f"{said}: {one}")
    for urn in sorted(found.missing, key=described):
        engine.say(f"does not exist, up creates it: {described(urn)}")
    engine.say(
        f"{len(found.taken)} exist, {sum(one.overwrites for one in found.differences)} of them"
        f" differ, {len(found.missing)} do not exist; the host's commands run again"
    )
