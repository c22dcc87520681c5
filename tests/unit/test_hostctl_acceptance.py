"""`hostctl k3d accept`: whether pods of a cluster that was changed can work. Passed, failed, or
cannot tell; it leaves no pod behind and moves nothing that stands.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hostctl.acceptance import ACCEPT_SECONDS, SETTLE_SECONDS
from hostctl.machine import Ran
from tests.unit.test_hostctl import NODE, SPEC, Host, Killed

WANTED = {
    "name": "factory",
    "acceptance": {
        "name": "registry-1.docker.io",
        "image": "rancher/mirrored-library-busybox:1.36.1",
        "required": False,
    },
    "generation": 1,
}
REQUIRED = {**WANTED, "acceptance": {**WANTED["acceptance"], "required": True}}


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    return host


def lookup(host: Host, fate: str) -> None:
    host.machine.set("pods.json", {"lookup": fate})


def pods(host: Host) -> list[Any]:
    return list(host.api.world.list(f"{host.api.cluster}/kube-system/Pod"))


def answer(host: Host) -> dict[str, str]:
    return host("k3d accept", WANTED)["acceptance"]


def created(host: Host) -> list[dict[str, Any]]:
    """The pods that hostctl asks for from now on."""
    seen: list[dict[str, Any]] = []
    recorded = host.machine.run

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if "create" in argv:
            seen.append(json.loads(options["input"]))
        return recorded(argv, **options)

    host.machine.run = run  # type: ignore[method-assign]
    return seen


def test_incident_05_a_cluster_whose_pods_resolve_is_accepted(live: Host) -> None:
    assert answer(live) == {
        "state": "passed",
        "detail": "a pod resolves registry-1.docker.io",
        "remedy": "",
    }
    assert pods(live) == []


def test_incident_05_a_cluster_whose_pods_do_not_resolve_fails_with_what_was_said(
    live: Host,
) -> None:
    lookup(live, "fails")
    seen = answer(live)
    assert seen["state"] == "failed"
    assert "does not resolve registry-1.docker.io: ;; connection timed out" in seen["detail"]
    assert "homelab:cluster.resolvers" in seen["remedy"]
    assert live.machine.setting("slept", 0) < SETTLE_SECONDS + 20
    assert pods(live) == []


@pytest.mark.parametrize(
    ("fate", "said"), [("no-image", "ImagePullBackOff"), ("unscheduled", "untolerated taint")]
)
def test_a_pod_that_never_runs_is_cannot_tell(live: Host, fate: str, said: str) -> None:
    lookup(live, fate)
    seen = answer(live)
    assert seen["state"] == "cannot-tell"
    assert said in seen["detail"]
    assert "homelab:cluster.acceptance.image" in seen["remedy"]
    # The make-believe time is the real one and what was slept.
    assert ACCEPT_SECONDS / 2 < live.machine.setting("slept", 0) < ACCEPT_SECONDS + 20
    assert said in live.said, "progress says what it waits for"
    assert pods(live) == []


def test_a_name_that_resolves_later_passes(live: Host) -> None:
    """CoreDNS comes up after the API of a new cluster."""
    lookup(live, "fails")
    sleep = live.machine.sleep

    def passing(seconds: float) -> None:
        sleep(seconds)
        if live.machine.setting("slept", 0) > SETTLE_SECONDS / 2:
            lookup(live, "resolves")

    live.machine.sleep = passing  # type: ignore[method-assign]
    assert answer(live)["state"] == "passed"


def test_a_namespace_without_a_service_account_is_asked_again(live: Host) -> None:
    recorded, refusals = live.machine.run, ["no service account"] * 3

    def run(argv: Sequence[str], **options: Any) -> Ran:
        if "create" in argv and refusals:
            return Ran(1, b"", refusals.pop().encode())
        return recorded(argv, **options)

    live.machine.run = run  # type: ignore[method-assign]
    assert answer(live)["state"] == "passed"


def test_an_api_that_is_not_published_fails(live: Host) -> None:
    live.edit_node(published=False)
    seen = answer(live)
    assert seen["state"] == "failed"
    assert "127.0.0.1:6443 does not reach it" in seen["detail"]
    assert not any("create" in call for call in live.calls)


def test_a_stopped_cluster_fails_and_an_absent_one_is_refused(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    assert f"{NODE} is not running" in answer(live)["detail"]
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    assert live("k3d accept", WANTED, code=3)["cause"] == "it does not exist"


@pytest.mark.parametrize(("fate", "code"), [("fails", 5), ("no-image", 4)])
def test_what_is_required_is_an_error(live: Host, fate: str, code: int) -> None:
    lookup(live, fate)
    error = live("k3d accept", REQUIRED, code=code)
    assert "registry-1.docker.io" in error["cause"]
    assert error["remedy"]
    assert live.inspect()["acceptance"]["state"] != "passed"


def test_the_pod_may_run_where_only_restricted_pods_may(live: Host) -> None:
    """Pod Security Standards, restricted; and it asks for exactly the name, by the image given."""
    seen = created(live)
    answer(live)
    (pod,) = seen
    assert pod["metadata"]["namespace"] == "kube-system"
    assert pod["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "homelab"
    spec = pod["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["restartPolicy"] == "Never"
    assert 0 < spec["activeDeadlineSeconds"] <= ACCEPT_SECONDS
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert container["command"][-1] == "registry-1.docker.io."
    assert container["image"] == "rancher/mirrored-library-busybox:1.36.1"


@pytest.mark.parametrize(
    ("said", "status", "expected"),
    [
        ("Name:\tregistry-1.docker.io\nAddress: 192.0.2.1", 0, 0),
        ("*** Can't find registry-1.docker.io.: No answer", 0, 1),
        ("** server can't find registry-1.docker.io.: NXDOMAIN", 0, 1),
        (";; connection timed out; no servers could be reached", 1, 1),
        ("sh: nslookup: not found", 127, 127),
    ],
)
def test_only_an_address_is_an_answer(
    live: Host, tmp_path: Path, said: str, status: int, expected: int
) -> None:
    """busybox's nslookup has ended with 0 for names that have none."""
    seen = created(live)
    answer(live)
    program = tmp_path / "bin" / "nslookup"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "{said}"\nexit {status}\n')
    program.chmod(0o755)
    ran = subprocess.run(
        seen[0]["spec"]["containers"][0]["command"],
        env={"PATH": f"{program.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout.strip()) == (expected, said)


def test_killed_anywhere_it_leaves_nothing_after_the_next_run(live: Host) -> None:
    recorded = live.machine.run
    for step in range(1, 20):
        count = 0

        def run(argv: Sequence[str], step: int = step, **options: Any) -> Ran:
            nonlocal count
            count += 1
            if count >= step:
                raise Killed
            return recorded(argv, **options)

        live.machine.run = run  # type: ignore[method-assign]
        try:
            answer(live)
        except Killed:
            live.machine.run = recorded  # type: ignore[method-assign]
            assert answer(live)["state"] == "passed"
            assert pods(live) == []
        else:
            assert step > 6, "killed too few times to mean anything"
            return
    raise AssertionError("it takes more steps than it should")


# With the stack


def test_what_passed_leaves_nothing_to_do_and_what_did_not_is_tried_again(live: Host) -> None:
    def accepted() -> int:
        generation = live.inspect()["acceptance_generation"]
        live("k3d accept", {**WANTED, "generation": generation})
        return generation

    assert [accepted(), accepted()] == [1, 1]
    lookup(live, "fails")
    assert accepted() == 1
    assert accepted() == 2, "the last one did not pass"
    lookup(live, "resolves")
    assert accepted() == 3
    assert [accepted(), accepted()] == [3, 3]


def test_one_that_passes_by_hand_is_seen_by_the_stack(live: Host) -> None:
    """Else the stack's output would go on saying that it failed."""
    lookup(live, "fails")
    answer(live)
    lookup(live, "resolves")
    assert live("k3d accept factory")["acceptance"]["state"] == "passed"
    assert live.inspect()["acceptance_generation"] == 2


def test_by_name_it_asks_what_was_asked_last(live: Host) -> None:
    other = {**WANTED["acceptance"], "name": "one.one.one.one"}
    live("k3d accept", {**WANTED, "acceptance": other})
    detail = live("k3d accept factory")["acceptance"]["detail"]
    assert detail == "a pod resolves one.one.one.one"


def test_doctor_says_that_the_last_one_did_not_pass(live: Host) -> None:
    lookup(live, "fails")
    answer(live)
    (finding,) = live("k3d doctor", SPEC)["findings"]
    assert finding["severity"] == "warning"
    assert "the last acceptance of the cluster: failed" in finding["what"]
    assert finding["remedy"] == "hostctl k3d accept factory"
