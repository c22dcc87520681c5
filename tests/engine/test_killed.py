"""Killed anywhere: engine, program or a provider dies by SIGKILL at a step, and `make recover` ends
where an undisturbed life does, with nothing made twice and nothing orphaned.

The stand-ins do the killing, since they know the step (`Faults` in rehearsal/core.py): before it,
once it has changed the world and before the engine is told, and once the engine has recorded it.
`make kill STACK=every-kind` kills at every step of up, of an edit and of destroy, of any stack; a
sample is tested. The same without make, and of one victim at one moment:

    .venv/bin/python -m tests.engine.test_killed every-kind
    .venv/bin/python -m tests.engine.test_killed metal engine after
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from components.recovery import Engine, RecoveryError, recover
from rehearsal.run import Secret
from tests.engine.conftest import P510, K3dRehearsal, StackRehearsal
from tests.engine.every_kind import EveryKind, Few, state, world
from tests.engine.test_metal import Metal
from tests.engine.test_tower import Tower
from tests.engine.test_truenas import TrueNAS

pytestmark = pytest.mark.engine

Fault = dict[str, Any]
Verb = Literal["up", "destroy"]

MOMENTS = ("before", "after", "recorded")
VICTIMS = ("engine", "provider", "program")


def outlive(stack: StackRehearsal, verb: Verb, faults: Sequence[Fault]) -> list[str]:
    """Runs the verb, which faults kill, and recovers until a run is not killed. Returns the kill
    points that were reached, as `<method> <URN>`. Raises RecoveryError where it fails unkilled.
    """
    stack.set_faults([{"do": "kill", **fault} for fault in faults])
    environment = stack.process_environment()
    engine = Engine(stack.directory / "project", stack.stack, environment, say=lambda line: None)
    reached = stack.directory / "faults"
    kills = len(list(reached.iterdir())) if reached.exists() else 0
    first = kills
    getattr(stack, verb)(check=False)
    while True:
        before, kills = kills, len(list(reached.iterdir()))
        try:
            recover(engine, verb)
            break
        except RecoveryError:
            # Killed once more, on the way or in the run that goes on.
            if len(list(reached.iterdir())) == kills == before:
                raise
    stack.set_faults([])
    files = sorted(reached.iterdir(), key=lambda file: file.stat().st_mtime_ns)
    return [file.read_text().strip() for file in files[first:]]


def edit(stack: StackRehearsal) -> None:
    """A Secret more, and of what there is one changed and one gone: steps of each method."""
    with StackRehearsal.edited(stack) as settings:
        secrets = settings.setdefault("secrets", {}).setdefault("factory", {})
        secrets["grafana"] = {"data": {"password": Secret("made up")}}
        if "tunnels" in settings:
            route = [*settings["tunnels"].values()][-1]["routes"][-1]
            route["hostname"] = "odin.example.org"
            route["service"] = route["service"].rpartition(":")[0] + ":9000"
        if "longhorn" in settings.get("storage", {}):
            jobs = settings["storage"]["longhorn"]["jobs"]
            del jobs["hourly"]
            jobs["nightly"]["retain"] = 2
        if "multus" in settings.get("network", {}):
            settings["network"]["multus"]["networks"].pop()
        if "traefik" in settings.get("network", {}):
            settings["network"]["traefik"]["address"] = "192.168.1.244"


def assert_same(stack: StackRehearsal, undisturbed: StackRehearsal) -> None:
    assert state(stack) == state(undisturbed)
    assert world(stack) == world(undisturbed)


def kill(whom: str, when: str, urn: str, method: str = "*") -> Fault:
    return {"whom": whom, "when": when, "urn": urn, "method": method}


UP = [
    kill("engine", "after", "*ZeroTrustTunnelCloudflared::p510", "Create"),
    kill("provider", "after", "*ZeroTrustAccessApplication::sonarr.example.org", "Create"),
    kill("program", "before", "*Command::cluster", "Create"),
    kill("engine", "recorded", "*Namespace::factory", "Create"),
]
EDIT = [
    kill("engine", "after", "*DnsRecord::odin.example.org", "Create"),
    kill("engine", "after", "*DnsRecord::sonarr.example.org", "Delete"),
]
DESTROY = [
    kill("engine", "after", "*Container::cloudflared-p510", "Delete"),
    kill("provider", "before", "*Command::cluster", "Delete"),
]


def test_a_life_that_is_killed_at_eight_points_ends_where_an_undisturbed_one_does(tmp_path):
    stack, undisturbed = Few(tmp_path / "killed"), Few(tmp_path / "undisturbed")
    undisturbed.up()
    edit(undisturbed)
    undisturbed.up()
    assert len(outlive(stack, "up", UP)) == len(UP)
    edit(stack)
    assert len(outlive(stack, "up", EDIT)) == len(EDIT)
    assert_same(stack, undisturbed)

    for life in (stack, undisturbed):
        life.confirm_destroy()
    undisturbed.destroy()
    assert len(outlive(stack, "destroy", DESTROY)) == len(DESTROY)
    assert_same(stack, undisturbed)


# Every step


def everywhere(
    make: Callable[[Path], StackRehearsal],
    directory: Path,
    victims: Sequence[str] = VICTIMS,
    moments: Sequence[str] = MOMENTS,
) -> int:
    """Kills each victim at each moment of each step, all steps of a victim and a moment in one
    life. Returns the number of kill points.
    """
    undisturbed = make(directory / "undisturbed")
    undisturbed.up()
    edit(undisturbed)
    undisturbed.up()
    gone = undisturbed.copy(directory / "gone")
    gone.confirm_destroy()
    gone.destroy()
    points = 0
    for victim in victims:
        for moment in moments:
            stack = make(directory / f"{victim}-{moment}")
            each = {"whom": victim, "when": moment, "each": True}
            faults = [{**each, "method": method} for method in ("Create", "Update", "Delete")]
            count = len(outlive(stack, "up", faults))
            edit(stack)
            count += len(outlive(stack, "up", faults))
            assert_same(stack, undisturbed)
            stack.confirm_destroy()
            # Of a destroy there is no program.
            whom = "engine" if victim == "program" else victim
            count += len(outlive(stack, "destroy", [{**fault, "whom": whom} for fault in faults]))
            assert_same(stack, gone)
            print(f"{victim} killed, {moment}: {count} points", flush=True)
            points += count
    return points


class P620(K3dRehearsal):
    """p620 with a cluster of its own: not as the one to which p510's moves."""

    name = "p620"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        with self.edited() as settings:
            settings["cluster"]["enabled"] = True
            del settings["cluster"]["movedFrom"]


def stack_named(name: str) -> Callable[[Path], StackRehearsal]:
    """A stack; `every-kind`, of p510's resources one or two of each kind; or `few` of them."""
    known: dict[str, Callable[[Path], StackRehearsal]] = {
        **{stack.name: stack for stack in (P510, P620, Metal, Tower, TrueNAS)},
        **{"every-kind": EveryKind, "few": Few},
    }
    if name not in known:
        sys.exit(f"no kill matrix of stack {name!r}; there are: {', '.join(known)}")
    return known[name]


if __name__ == "__main__":
    whose, *only = sys.argv[1:]
    with tempfile.TemporaryDirectory() as temporary:
        number = everywhere(
            stack_named(whose), Path(temporary), only[:1] or VICTIMS, only[1:2] or MOMENTS
        )
    print(f"killed at {number} points, recovered from each")
