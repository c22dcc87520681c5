"""The audit policy of a k3d cluster's servers, on the make-believe machine."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.cluster.k3d import cluster_spec
from components.settings import Settings
from hostctl.record import read_record
from tests.unit.test_hostctl import SPEC, Host, Killed

IN_NODE = "/etc/rancher/k3s/audit.yaml"


def audit(**settings: Any) -> dict[str, Any]:
    """As the component gives it to hostctl."""
    cluster = {"image": SPEC["image"], "audit": settings}
    stack = Settings.model_validate({"cluster": cluster}, by_alias=True, by_name=False)
    return {"audit": cluster_spec(stack.cluster)["audit"]}  # pyright: ignore[reportArgumentType]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up(**audit())
    return host


def policy(host: Host) -> dict[str, Any]:
    """What the server read when it started."""
    (node,) = host.cluster["nodes"]
    source = next(bind for bind in node["binds"] if f":{IN_NODE}" in bind)
    return yaml.safe_load(host.machine.read(source.split(":")[0]))


def test_a_cluster_is_made_with_policy_and_log_together(host: Host) -> None:
    (node,) = host.cluster["nodes"]
    for argument in (f"audit-policy-file={IN_NODE}", "audit-log-maxage=30"):
        assert f"--kube-apiserver-arg={argument}" in node["cmd"]
    assert policy(host)["rules"][-1] == {"level": "Metadata"}
    assert host.inspect(**audit())["differences"] == []


def test_the_content_of_secrets_is_never_logged(host: Host) -> None:
    first = policy(host)["rules"][0]
    assert first["level"] == "Metadata"
    assert "secrets" in first["resources"][0]["resources"]


def test_changed_rules_restart_the_server_and_then_nothing_is_left_to_do(host: Host) -> None:
    changed = audit(level="Request")
    (difference,) = host.inspect(**changed)["differences"]
    assert (difference["key"], difference["fixed"]) == ("audit.rules", False)
    host.up(**changed)
    assert policy(host)["rules"][-1] == {"level": "Request"}
    assert host.inspect(**changed)["differences"] == []


def test_a_restart_that_was_cut_off_is_done_by_the_next_run(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = audit(level="Request")

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("hostctl.k3d.restart_container", killed)
        with pytest.raises(Killed):
            host.up(**changed)
    assert [one["key"] for one in host.inspect(**changed)["differences"]] == ["audit.rules"]
    before = read_record(host.machine, "factory")["audit"]
    host.up(**changed)
    assert read_record(host.machine, "factory")["audit"] != before
    assert host.inspect(**changed)["differences"] == []


@pytest.mark.parametrize("declared", [{}, audit(keepDays=7)])
def test_whether_there_is_a_log_and_for_how_long_is_fixed_at_creation(
    host: Host, declared: dict[str, Any]
) -> None:
    (difference,) = host.inspect(**declared)["differences"]
    assert (difference["key"], difference["fixed"]) == ("audit", True)
    assert "set cluster.recreate to factory" in difference["remedy"]
