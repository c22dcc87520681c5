"""`make recover`: goes on after a run that died, wherever it died."""

import re
from typing import Any, Literal

from components.recovery.adopt import adopt
from components.recovery.backend import mend
from components.recovery.engine import Engine, RecoveryError
from components.recovery.keys import Key, natural_key
from components.recovery.look import look_up
from components.recovery.state import (
    described,
    differences,
    read_anew,
    refuse_to_overwrite,
    take,
)


def recover(engine: Engine, then: Literal["up", "destroy"] = "up") -> None:
    """Clears the lock that a dead run left, asks what became of each operation that it began and
    did not record, takes what it made into the state, and runs ``then``.

    Raises RecoveryError when that cannot be told, when the lock's process is alive or on another
    host, or when what was made is not what the run was making.
    """
    try:
        state = engine.export()
    except RecoveryError:
        mend(engine)
        state = engine.export()
    begun = _pending(state)
    if not begun:
        engine.say("no operation was cut off; perhaps an answer was lost")
        if then == "up":
            _refresh(engine, set())
            # A create whose provider died, or whose answer was lost, is forgotten by the engine.
            adopt(engine, take=True)
        else:
            # What is gone already, some plugins refuse to delete.
            engine.run(then, "--yes", "--skip-preview", "--refresh", shown=True)
        return
    for operation in begun:
        engine.say(f"cut off while {operation['type']}: {described(operation['resource']['urn'])}")
    if begun:
        _settle(engine, begun)
    engine.run(then, "--yes", "--skip-preview", shown=True)


def run_again(engine: Engine, address: str) -> None:
    """Runs again what the state knows as done on a machine, which was lost and has a new one in its
    place. Every command of hostctl looks first, so what is there stays.

    Nothing else tells the engine: the commands that it declares are those of before. So an input
    that none has is put into the state of each, which is an update of it. They run by themselves:
    all else hangs on the cluster's identity, which one of them prints, and as long as that is
    unknown a preview would replace each object.

    Raises RecoveryError where the state has no command on a machine of that address.
    """
    state = engine.export()
    there = f" -- (\\S+@)?{re.escape(address)} "
    commands = [
        one
        for one in state["deployment"].get("resources") or []
        if one["type"] == "command:local:Command"
        and re.search(there, str(one["inputs"].get("create")))
    ]
    if not commands:
        raise RecoveryError(
            f"the state has nothing that was done on {address}.\n  Cause: no command of it goes"
            " there over SSH\n  Remedy: give the address as the settings have it"
        )
    for command in commands:
        for part in ("inputs", "outputs"):
            command[part]["environment"] = {"HOMELAB_MACHINE": "lost"}
        engine.say(f"runs again: {described(command['urn'])}")
    engine.import_(state)
    targets = [word for one in commands for word in ("--target", one["urn"])]
    engine.run("up", "--yes", "--skip-preview", *targets, shown=True)
    engine.say("done on the new machine; for all else: pulumi preview, then pulumi up")


def _pending(state: dict[str, Any]) -> list[dict[str, Any]]:
    return state["deployment"].get("pending_operations") or []


def _refresh(engine: Engine, urns: set[str]) -> None:
    """Reads these resources anew, of those that the state holds. It takes the lock, and with it the
    certainty that nobody else is at the state.
    """
    held = {r["urn"] for r in engine.export()["deployment"].get("resources") or []}
    stack = {urn for urn in held if "::pulumi:pulumi:Stack::" in urn}
    engine.refresh(sorted(urns & held | stack))


def _settle(engine: Engine, begun: list[dict[str, Any]]) -> None:
    # It reads what the cut-off updates and deletes came to, and forgets that they were begun.
    _refresh(engine, {op["resource"]["urn"] for op in begun if op["type"] != "creating"})

    state = engine.export()
    creates = [op["resource"] for op in _pending(state) if op["type"] == "creating"]
    keys: dict[str, Key] = {}
    for resource in creates:
        key = natural_key(resource["type"], resource.get("inputs") or {})
        if key:
            keys[resource["urn"]] = key
    ids = look_up(engine, set(keys.values()))
    made = [(r, ids[keys[r["urn"]]]) for r in creates if keys.get(r["urn"]) in ids]
    take(state["deployment"], made)
    state["deployment"]["pending_operations"] = []
    engine.import_(state)
    if not made:
        return
    # Drops those that are not there after all: their create was cut off before it began.
    taken = read_anew(engine, {resource["urn"] for resource, _ in made})
    for urn in sorted(taken):
        engine.say(f"exists, taken into the state: {described(urn)}")
    refuse_to_overwrite([d for d in differences(engine, taken) if d.overwrites] if taken else [])
