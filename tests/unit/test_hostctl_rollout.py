"""`hostctl rollout` and the pods that it cannot roll."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_hostctl import Host

SPEC = {"kubeconfig": "/etc/k3d/kubeconfig", "namespace": "default"}
OLD, NEW = SPEC | {"secrets": {"db": "digest-1"}}, SPEC | {"secrets": {"db": "digest-2"}}


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    return host


def pod(name: str, secret: str = "db", **metadata: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", **metadata},
        "spec": {
            "containers": [{"name": "main", "image": "example.org/app:1"}],
            "volumes": [{"name": "v", "secret": {"secretName": secret}}],
        },
    }


def test_a_pod_without_a_controller_is_named_with_the_remedy_and_never_deleted(live: Host) -> None:
    live.api.create(pod("bare"), "test")
    live.api.create(pod("of-another", secret="other"), "test")
    assert live("rollout", OLD)["left"] == []
    before = live.api.get(pod("bare"))
    answer = live("rollout", NEW)
    assert answer["left"] == ["pod/bare"]
    assert answer["rolled"] == []
    assert "pod/bare in default keeps the old value" in live.said
    assert "delete it and apply it again" in live.said
    assert live.api.get(pod("bare")) == before


def test_a_pod_is_named_until_it_is_made_again(live: Host) -> None:
    live.api.create(pod("bare"), "test")
    live("rollout", OLD)
    assert live("rollout", NEW)["left"] == ["pod/bare"]
    assert live("rollout", NEW)["left"] == ["pod/bare"]
    live.api.delete(pod("bare"))
    live.api.create(pod("bare"), "test")
    assert live("rollout", NEW)["left"] == []


def test_a_pod_that_came_after_the_last_run_has_what_that_saw(live: Host) -> None:
    live("rollout", OLD)
    live.api.create(pod("bare"), "test")
    assert live("rollout", NEW)["left"] == ["pod/bare"]


def test_pods_that_a_controller_makes_again_or_that_have_ended_are_not_named(live: Host) -> None:
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "app", "uid": "u"}
    live.api.create(pod("app-1", ownerReferences=[{**owner, "controller": True}]), "test")
    live.api.create({**pod("done"), "status": {"phase": "Succeeded"}}, "test")
    live("rollout", OLD)
    assert live("rollout", NEW)["left"] == []
