"""Done, and the answer never came: each step succeeds and the engine is told that it failed, for
each kind of resource that the stacks declare. `make recover` ends where an undisturbed life does,
with nothing made twice, nothing deleted twice and nothing orphaned.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from components.recovery import RecoveryError, recover
from tests.engine.conftest import StackRehearsal
from tests.engine.every_kind import EveryKind, state, world
from tests.engine.test_edits import write_manifest
from tests.engine.test_faults import mentioned
from tests.engine.test_metal import Metal
from tests.engine.test_p510 import URNS as P510_URNS
from tests.engine.test_tower import Tower
from tests.engine.test_truenas import URNS as TRUENAS_URNS
from tests.engine.test_truenas import TrueNAS

pytestmark = pytest.mark.engine

LOST = "connection reset by peer"


def go_through(
    stack: StackRehearsal, verb: Literal["up", "destroy"], faults: Iterable[dict[str, Any]]
) -> set[str]:
    """Runs the verb, which loses answers, until it loses none, each time as documented. Returns
    the steps that lost theirs, as `<method> <URN>`.
    """
    stack.set_faults([{"do": "fail", "when": "after", "message": LOST, **one} for one in faults])
    directory = stack.directory / "faults"

    def lost() -> set[str]:
        files = directory.iterdir() if directory.exists() else ()
        return {file.read_text().strip() for file in files}

    first = lost()
    while True:
        before = lost()
        run = getattr(stack, verb)("--continue-on-error", check=False)
        if not run.code:
            break
        new = lost() - before
        said: list[str] = []
        try:
            # Another up only says that they exist, but would make a second policy.
            if not new or any("AccessPolicy" in step for step in new):
                recover(stack.engine(said), verb)
                break
        except RecoveryError:
            assert lost() - before, run.stdout
        finally:
            for step in lost() - before:
                assert told(step, "\n".join([run.stdout, *said])), step
    stack.set_faults([])
    return lost() - first


def told(step: str, text: str) -> bool:
    """Whether the run named the step and why it failed."""
    name = re.escape(step.rpartition("::")[2])
    return bool(re.search(rf"\({name}\):(\s+warning: .*)*\s+error: .*{LOST}", text))


def assert_same(stack: StackRehearsal, undisturbed: StackRehearsal) -> None:
    assert state(stack) == state(undisturbed)
    assert world(stack) == world(undisturbed)


def kind(urn: str) -> str:
    """The kind of a resource; of a command what it is for, on whichever node."""
    _, _, types, name = urn.split("::")
    of = types.rpartition("$")[2]
    return re.sub(r" ?k3s-\w+(-\d)?", "", f"{of} {name}") if "Command" in of else of


def kinds(lost: set[str]) -> set[str]:
    """The kinds of the steps that lost their answers, by their short names."""
    return {kind(step.partition(" ")[2]).rpartition(":")[2] for step in lost}


KINDS_OF_P510 = {kind(urn) for urn in P510_URNS.read_text().splitlines()}
KINDS_OF_TRUENAS = {kind(urn) for urn in TRUENAS_URNS.read_text().splitlines()}


@pytest.mark.parametrize(
    ("make", "known", "number"),
    [
        (EveryKind, set(), 26),
        (TrueNAS, KINDS_OF_P510, 14),
        (Tower, KINDS_OF_P510 | KINDS_OF_TRUENAS, 7),
    ],
)
def test_what_was_made_unheard_is_found_and_nothing_is_made_twice(
    make: Callable[[Path], StackRehearsal], known: set[str], number: int, tmp_path: Path
) -> None:
    undisturbed, stack = make(tmp_path / "undisturbed"), make(tmp_path / "stack")
    undisturbed.up()
    urns = [one["urn"] for one in undisturbed.resources() if one.get("id")]
    steps = {kind(urn): urn for urn in urns if kind(urn) not in known}.values()
    lost = go_through(stack, "up", [{"method": "Create", "urn": urn} for urn in steps])
    mentioned("README.md", LOST.partition(" by")[0])
    assert lost == {f"Create {urn}" for urn in steps}
    assert len(steps) == number, sorted(map(kind, steps))
    assert_same(stack, undisturbed)


def change(stack: EveryKind) -> None:
    """Changes one at least of each kind that is updated and not replaced."""
    write_manifest(stack, "minio-creds", "rotated")
    with stack.edited() as settings:
        namespaces = settings.setdefault("namespaces", {})
        namespaces["factory"] = {
            **namespaces.get("factory", {}),
            "podSecurity": {"warn": "baseline"},
        }
        factory = settings["tunnels"]["factory"]
        factory["connector"]["replicas"] = 3
        for route in factory["routes"]:
            access = {"emails": ["another@example.org"], "sessionDuration": "1h"}
            route.update(service="http://other.factory.svc.cluster.local:80", access=access)


def take_away(stack: EveryKind) -> None:
    """Takes one at least of each kind away that a stack that lives may lose."""
    with stack.edited() as settings:
        factory, p510 = settings["tunnels"]["factory"], settings["tunnels"]["p510"]
        factory["connector"] = p510["connector"] = {"kind": "external"}
        p510["routes"].pop()
        del settings["secrets"]["factory"]["minio-creds"]
        del settings["argocd"]


GATE = {"DnsRecord", "ZeroTrustAccessApplication", "ZeroTrustAccessPolicy"}
CONNECTOR = {"Deployment", "NetworkPolicy", "PodDisruptionBudget", "Secret", "Service"}
UPDATED = {"Deployment", "Namespace", "Secret", "ZeroTrustAccessPolicy"}
DELETED = {"Container", "RemoteImage", *GATE, *CONNECTOR}
IN_THE_CLUSTER = {"IPAddressPool", "L2Advertisement", "NetworkPolicy", "Release", "Service"}


def test_what_was_changed_or_deleted_unheard_is_not_deleted_twice(tmp_path: Path) -> None:
    undisturbed = EveryKind(tmp_path / "undisturbed")
    undisturbed.up()
    stack = undisturbed.copy(tmp_path / "stack")
    for edit, method, least in ((change, "Update", UPDATED), (take_away, "Delete", DELETED)):
        for life in (undisturbed, stack):
            edit(life)
        undisturbed.up()
        lost = go_through(stack, "up", [{"method": method, "each": True}])
        assert_same(stack, undisturbed)
        assert kinds(lost) >= least


def test_a_destroy_that_hears_nothing_of_what_it_deleted_is_gone_through_with(
    tmp_path: Path,
) -> None:
    undisturbed = Metal(tmp_path / "undisturbed")
    undisturbed.up()
    undisturbed.confirm_destroy()
    stack = undisturbed.copy(tmp_path / "stack")
    undisturbed.destroy()
    lost = go_through(stack, "destroy", [{"method": "Delete", "each": True}])
    assert_same(stack, undisturbed)
    assert kinds(lost) >= IN_THE_CLUSTER
