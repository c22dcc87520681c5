"""Finds the ids of objects by their natural keys: asks Cloudflare by its provider and Docker by
hostctl, and changes nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import pulumi
from pulumi import automation

from components import settings
from components.cluster import kinds
from components.host import Connection, ask
from components.recovery.engine import Engine, RecoveryError
from components.recovery.keys import Key

# Far above what an account or a zone holds; the providers' own limit is 1000 and silent.
_ALL = 100_000

_LOOK = "homelab:index:Look"


def look_up(engine: Engine, keys: Collection[Key]) -> dict[Key, str]:
    """The id of each object that exists. Raises RecoveryError when that cannot be told."""
    found = {key: key.id for key in keys if key.id is not None}
    asked = [key for key in keys if key.id is None]
    if asked:
        found |= _ask(engine, asked)
    return found


def undeclared_secrets(engine: Engine, declared: Collection[str]) -> list[str]:
    """The Secrets of the cluster, as `namespace/name`, that neither the settings nor ``declared``
    name: what a recreate of the cluster would lose (incident 7). None of a cluster that is off.
    """
    found: list[str] = []

    def program(stack: settings.Settings) -> None:
        connection = Connection(stack.host)
        live = connection.read(kinds.read(stack, connection))
        if not live.answers:
            return
        asked = {"cluster": stack.cluster.name, "kubeconfig": live.kubeconfig}
        seen = connection.read(ask(["secret", "list"], asked))["secrets"]
        known = {f"{one.namespace}/{one.name}" for one in stack.declared_secrets()} | {*declared}
        names = (f"{one['namespace']}/{one['name']}" for one in seen if one["kept"])
        found.extend(sorted(name for name in names if name not in known))

    _run(engine, program, "the Secrets of the cluster")
    return found


def _ask(engine: Engine, keys: Collection[Key]) -> dict[Key, str]:
    found: dict[Key, list[str]] = defaultdict(list)

    def program(stack: settings.Settings) -> None:
        in_docker = [key for key in keys if key.scope == "docker"]
        if in_docker:
            for key, id in _in_docker(stack, in_docker).items():
                found[key].append(id)
        at_cloudflare = [key for key in keys if key.scope != "docker"]
        if at_cloudflare:
            _at_cloudflare(stack, at_cloudflare, found)

    _run(engine, program, ", ".join(map(str, keys)))
    for key, ids in found.items():
        if len(ids) > 1:
            raise RecoveryError(
                f"{key} is there {len(ids)} times.\n  Cause: which of {', '.join(ids)} is meant"
                " cannot be told\n  Remedy: rename or delete those that are not; then run this"
                " again."
            )
    return {key: id for key, [id] in found.items()}


def _run(engine: Engine, program: Callable[[settings.Settings], None], what: str) -> None:
    """Runs a program that only asks, as a preview of the stack: the engine decrypts its settings
    and runs its providers, and neither the state nor any object is changed.
    """

    def declared() -> None:
        pulumi.ComponentResource(_LOOK, "look")
        program(settings.load(engine.directory))

    workspace = automation.LocalWorkspaceOptions(
        work_dir=str(engine.directory),
        program=declared,
        env_vars=dict(engine.environment) if engine.environment is not None else None,
    )
    try:
        stack = automation.select_stack(engine.stack, engine.project, declared, opts=workspace)
        # Nothing else is this preview's: what the state holds is not declared here, and stays.
        alone = f"urn:pulumi:{engine.stack}::{engine.project}::{_LOOK}::look"
        stack.preview(target=[alone])
    except automation.CommandError as error:
        raise RecoveryError(
            f"looking for {what} failed.\n  Cause: {error}\n  Remedy: see the cause; nothing was"
            " changed. Run this again once they can be asked."
        ) from None


def _in_docker(stack: settings.Settings, keys: Collection[Key]) -> dict[Key, str]:
    wanted = {
        f"{kind}s": [key.name for key in keys if key.kind == kind]
        for kind in ("container", "network")
    }
    seen = Connection(stack.host).read(ask(["docker", "find"], wanted))
    ids = {key: seen[f"{key.kind}s"][key.name] for key in keys}
    return {key: id for key, id in ids.items() if id}


def _at_cloudflare(
    stack: settings.Settings, keys: Collection[Key], found: dict[Key, list[str]]
) -> None:
    import pulumi_cloudflare as cloudflare

    from components.tunnel import cloudflare_provider

    if stack.cloudflare is None:
        raise pulumi.RunError("homelab:cloudflare is not set, but its objects are looked for")
    options = pulumi.InvokeOptions(provider=cloudflare_provider(stack.cloudflare))

    for kind, scope in sorted({(key.kind, key.scope) for key in keys}):
        field = "name"
        results: Any
        if kind == "tunnel":
            results = cloudflare.get_zero_trust_tunnel_cloudflareds(
                account_id=scope, is_deleted=False, max_items=_ALL, opts=options
            ).results
        elif kind == "Access policy":
            results = cloudflare.get_zero_trust_access_policies(
                account_id=scope, max_items=_ALL, opts=options
            ).results
        elif kind == "Access application":
            field = "domain"
            results = cloudflare.get_zero_trust_access_applications(
                account_id=scope, max_items=_ALL, opts=options
            ).results
        else:
            results = cloudflare.get_dns_records(
                zone_id=scope, type=kind.removesuffix(" record"), max_items=_ALL, opts=options
            ).results
        for one in results:
            key = Key(kind, scope, getattr(one, field) or "")
            if key in keys:
                found[key].append(one.id)
