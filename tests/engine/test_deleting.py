"""Deleting: what is protected goes only by its name, a route takes its own with it and nothing
else, and a stack whose cluster is gone already goes clean.

The destroy of a whole stack, in two steps and in order, is in test_p510.py.
"""

import json

import pytest

from tests.engine.conftest import errors, planned
from tests.engine.every_kind import EveryKind, world

pytestmark = pytest.mark.engine

TUNNELS = ("factory", "p510")


@pytest.fixture(scope="module")
def once_up(tmp_path_factory) -> EveryKind:
    stack = EveryKind(tmp_path_factory.mktemp("once-up"))
    stack.up()
    return stack


@pytest.fixture
def stack(once_up, tmp_path) -> EveryKind:
    return once_up.copy(tmp_path / "stack")


def test_another_account_would_replace_the_tunnels_and_is_refused_by_their_names(stack):
    with stack.edited() as settings:
        settings["cloudflare"]["accountId"] = "1" * 32
    preview = stack.preview(check=False)
    assert preview.code != 0
    refusals = [e for e in errors(preview) if "unable to replace" in e]
    for name in TUNNELS:
        assert any(f'ZeroTrustTunnelCloudflared::{name}"' in refusal for refusal in refusals)


def test_a_tunnel_goes_with_its_section_only_once_its_name_was_typed(stack):
    """In two steps, as everything that is protected."""
    before, container = world(stack), "docker/container/cloudflared-p510.json"
    without = dict(stack.settings["tunnels"])
    del without["p510"]
    with stack.edited() as settings:
        held = settings["tunnels"]
        settings["tunnels"] = without
    # As a person runs it, whose preview comes first.
    refused = stack.pulumi("up", "--yes", check=False)
    assert refused.code != 0
    assert "ZeroTrustTunnelCloudflared::p510" in refused.stdout
    assert world(stack) == before

    with stack.edited() as settings:
        settings["tunnels"] = {**held, "p510": {**held["p510"], "delete": "p510"}}
    stack.up()
    with stack.edited() as settings:
        settings["tunnels"] = without
    stack.up()
    gone = before - world(stack)
    assert container in gone
    assert gone["cloudflare/tunnel/HEX/p510.json"] == 1
    assert not world(stack) - before
    assert {name for name in gone if name.startswith("kubernetes/")} == set()
    assert planned(stack.preview("--refresh")) == set()


def test_a_route_that_goes_takes_its_rule_its_record_and_its_gate_and_nothing_else(stack):
    before = world(stack)
    with stack.edited() as settings:
        [kept, _] = settings["tunnels"]["factory"]["routes"]
        settings["tunnels"]["factory"]["routes"] = [kept]
    stack.up()
    assert before - world(stack) == {
        "cloudflare/application/HEX/aifactory.example.org.json": 1,
        "cloudflare/policy/HEX/UUID.json": 1,
        "cloudflare/record/HEX/aifactory.example.org/CNAME.json": 1,
    }
    assert not world(stack) - before
    rules = {
        rule.get("hostname")
        for file in (stack.world / "cloudflare/configuration").rglob("*.json")
        for rule in json.loads(file.read_text())["config"]["ingresses"]
    }
    assert rules == {"argocd.example.org", "plex.example.org", "sonarr.example.org", None}


def test_a_stack_whose_cluster_is_gone_already_is_destroyed_clean(stack):
    stack.confirm_destroy()
    stack.on_host("k3d", "cluster", "delete", "factory")
    stack.destroy()
    assert stack.resources() == []
    left = world(stack)
    assert {name for name in left if name.startswith("cloudflare/")} == set()
    assert {name.split("/")[1] for name in left if name.startswith("docker/")} == {"image"}
    assert stack.host_file("/mnt/img_pool/k3d/storage").is_dir()
