"""Killed anywhere: engine, program or a provider dies by SIGKILL at a step, and `make recover`, as
often as it takes, ends where an undisturbed life does, with nothing made twice and nothing orphaned.

The stand-ins do the killing, since they know the step (`Faults` in rehearsal/core.py): before it,
once it has changed the world and before the engine is told, and once the engine has recorded it.
`make kill STACK=p510` kills at every step of up, of an edit and of destroy; a sample is tested:

    .venv/bin/python -m tests.engine.test_killed p510
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from components.recovery import Engine, RecoveryError, recover
from rehearsal.run import Secret
from tests.engine.conftest import P510, K3dRehearsal, StackRehearsal, planned
from tests.engine.every_kind import EveryKind, state, world

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
    """A route and a Secret more, a route less: steps of each method."""
    with stack.edited() as settings:
        routes = settings["tunnels"]["factory"]["routes"]
        routes[0] = {**routes[0], "hostname": "odin.example.org"}
        settings["secrets"]["factory"]["grafana"] = {"data": {"password": Secret("made up")}}
        settings["tunnels"]["factory"]["connector"]["replicas"] = 3


def assert_same(stack: K3dRehearsal, undisturbed: K3dRehearsal) -> None:
    assert state(stack) == state(undisturbed)
    assert world(stack) == world(undisturbed)


@pytest.fixture(scope="module")
def edited(tmp_path_factory) -> EveryKind:
    """A life of an up and an edit in which nothing died; not to be changed."""
    stack = EveryKind(tmp_path_factory.mktemp("edited"))
    stack.up()
    edit(stack)
    stack.up()
    return stack


def kill(whom: str, when: str, urn: str, method: str = "*") -> Fault:
    return {"whom": whom, "when": when, "urn": urn, "method": method}


UP = [
    kill("engine", "after", "*ZeroTrustTunnelCloudflared::factory", "Create"),
    kill("provider", "after", "*ZeroTrustAccessApplication::argocd.example.org", "Create"),
    kill("program", "before", "*Command::cluster", "Create"),
    kill("engine", "after", "*Namespace::factory", "Create"),
    kill("engine", "recorded", "*Deployment::factory/cloudflared-factory", "Create"),
]
EDIT = [
    kill("engine", "after", "*DnsRecord::odin.example.org", "Create"),
    kill("engine", "after", "*DnsRecord::argocd.example.org", "Delete"),
]
DESTROY = [
    kill("engine", "after", "*Container::cloudflared-p510", "Delete"),
    kill("provider", "before", "*ZeroTrustTunnelCloudflared::factory", "Delete"),
    kill("engine", "recorded", "*Command::cluster", "Delete"),
]


def test_a_life_that_is_killed_at_ten_points_ends_where_an_undisturbed_one_does(tmp_path, edited):
    stack = EveryKind(tmp_path / "killed")
    assert len(outlive(stack, "up", UP)) == len(UP)
    edit(stack)
    assert len(outlive(stack, "up", EDIT)) == len(EDIT)
    assert_same(stack, edited)
    assert planned(stack.preview("--refresh")) == set()

    undisturbed = edited.copy(tmp_path / "undisturbed")
    for life in (stack, undisturbed):
        life.confirm_destroy()
    undisturbed.destroy()
    assert len(outlive(stack, "destroy", DESTROY)) == len(DESTROY)
    assert_same(stack, undisturbed)


# Every step


def everywhere(make: Callable[[Path], P510], directory: Path) -> int:
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
    for victim in VICTIMS:
        for moment in MOMENTS:
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


def stack_named(name: str) -> Callable[[Path], P510]:
    """p510, or `every-kind`: p510 with just one or two resources of each kind."""
    known: dict[str, Callable[[Path], P510]] = {"p510": P510, "every-kind": EveryKind}
    if name not in known:
        sys.exit(f"no kill matrix of stack {name!r}; there are: {', '.join(known)}")
    return known[name]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        number = everywhere(stack_named(sys.argv[1]), Path(temporary))
    print(f"killed at {number} points, recovered from each")
