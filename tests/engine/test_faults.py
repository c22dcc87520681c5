"""Failing anywhere: each fault has an error that names step and cause, and once it is gone one `up`
(with --refresh where things vanished) ends where an undisturbed life does.

The remedies are in README.md, "When a step fails", and docs/state.md.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rehearsal.run import CHECKOUT, Rehearsal, Run, Secret
from tests.engine.conftest import edited_file, planned, urns
from tests.engine.every_kind import EveryKind, kinds, state, world

pytestmark = pytest.mark.engine

NODE = "k3d-factory-server-0"
ZONE = "e" * 32
RATE_LIMITED = (
    'POST "https://api.cloudflare.com/client/v4/zones/…/dns_records": 429 Too Many Requests '
    '{"code":971,"message":"Please wait and consider throttling your request speed"}'
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> EveryKind:
    """A life in which nothing went wrong; not to be changed."""
    stack = EveryKind(tmp_path_factory.mktemp("undisturbed"))
    stack.up()
    return stack


@pytest.fixture
def stack(undisturbed, tmp_path) -> EveryKind:
    """The same, to do anything with."""
    return undisturbed.copy(tmp_path / "stack")


def assert_same(stack: EveryKind, undisturbed: EveryKind) -> None:
    assert state(stack) == state(undisturbed)
    assert world(stack) == world(undisturbed)


def said(run: Run) -> str:
    """All that a run that failed told of it."""
    assert run.code != 0
    return run.stdout + run.stderr


def mentioned(name: str, text: str) -> None:
    """The text is in the document for whoever searches what they were told."""
    assert text in (CHECKOUT / name).read_text()


# Each kind of step


def test_a_step_of_each_kind_fails_or_hangs_and_the_last_up_ends_undisturbed(tmp_path, undisturbed):
    """The host's commands hang past their time limit, of which each has one; the others fail."""
    steps = [r["urn"] for r in kinds(undisturbed).values() if r.get("id")]
    hanging = {urn for urn in steps if "command:local" in urn}
    assert len(steps) == 26
    assert len(hanging) == 11
    stack = EveryKind(tmp_path)
    stack.set_faults(
        [
            {"urn": urn, "method": "Create", "do": "hang"}
            if urn in hanging
            else {"urn": urn, "method": "Create", "do": "fail", "message": f"no luck with {urn}"}
            for urn in steps
        ]
    )
    told: set[tuple[str, str]] = set()
    # Each run gets past one at least; how many more depends on what the engine began with.
    for _ in steps:
        run = stack.up("--continue-on-error", check=False)
        told |= {
            (d.urn or "", d.message.strip())
            for event in run.events
            if (d := event.diagnostic_event) and d.severity == "error"
        }
        if not run.code:
            break
    else:
        pytest.fail(f"not up after {len(steps)} runs")
    for urn in steps:
        cause = "signal: killed" if urn in hanging else f"no luck with {urn}"
        assert any(step == urn and cause in text for step, text in told), urn
    mentioned("README.md", "signal: killed")
    assert_same(stack, undisturbed)


def test_every_step_that_answers_late_is_waited_for(tmp_path, undisturbed):
    stack = EveryKind(tmp_path)
    stack.set_faults([{"method": "Create", "do": "late", "seconds": 0.2, "each": True}])
    stack.up()
    assert_same(stack, undisturbed)


# Cloudflare


class Published(Rehearsal):
    """A stack with a tunnel of four routes, whose connector somebody else runs."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "dev", self.settings("a", "b", "c", "d"))

    def settings(self, *names: str) -> dict[str, Any]:
        routes = [{"hostname": f"{n}.example.org", "service": "http://localhost"} for n in names]
        tunnel = {
            "secret": Secret("dGhlIHNlY3JldCB0aGF0IHRoZSBpbmN1bWJlbnQgdXNlcy4u"),
            "connector": {"kind": "external"},
            "routes": routes,
        }
        return {
            "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
            "cloudflare": {
                "accountId": "a" * 32,
                "apiToken": Secret("t" * 40),
                "zones": {"example.org": ZONE},
            },
            "tunnels": {"media": tunnel},
        }

    def made(self, kind: str) -> list[dict[str, Any]]:
        """What Cloudflare has of a kind."""
        files = sorted((self.directory / "world/cloudflare" / kind).rglob("*.json"))
        return [json.loads(file.read_text()) for file in files]


def test_half_a_batch_that_cloudflare_refuses_is_named_and_the_next_up_makes_that_half(tmp_path):
    stack = Published(tmp_path)
    records = [f"*DnsRecord::{name}.example.org" for name in ("a", "b")]
    refused = {urn: RATE_LIMITED for urn in records} | {"*Config::media": "503 Unavailable"}
    fault = {"method": "Create", "do": "fail"}
    stack.set_faults([{**fault, "urn": u, "message": why} for u, why in refused.items()])
    text = said(stack.up("--continue-on-error", check=False))
    for name in ("a.example.org", "b.example.org"):
        assert re.search(rf"DnsRecord \({name}\):\s+error: .*429 Too Many Requests", text)
    assert re.search(r"TunnelCloudflaredConfig \(media\):\s+error: .*503 Unavailable", text)
    mentioned("README.md", "429 Too Many Requests")
    assert {record["name"] for record in stack.made("record")} == {"c.example.org", "d.example.org"}

    assert planned(stack.up()) == {
        "create DnsRecord a.example.org",
        "create DnsRecord b.example.org",
        "create ZeroTrustTunnelCloudflaredConfig media",
    }
    assert len(stack.made("record")) == 4
    assert planned(stack.preview("--refresh")) == set()


def test_a_record_of_somebody_else_stops_only_itself_and_is_never_overwritten(tmp_path):
    stack = Published(tmp_path)
    theirs = tmp_path / f"world/cloudflare/record/{ZONE}/a.example.org/CNAME.json"
    theirs.parent.mkdir(parents=True)
    record = {"id": "f" * 32, "zoneId": ZONE, "name": "a.example.org", "type": "CNAME"}
    theirs.write_text(json.dumps({**record, "content": "b.example.net", "proxied": True, "ttl": 1}))
    before = theirs.read_bytes()
    text = said(stack.up("--continue-on-error", check=False))
    assert re.search(r"DnsRecord \(a.example.org\):\s+error: .*already exists", text)
    assert theirs.read_bytes() == before
    assert len(stack.made("record")) == 4

    theirs.unlink()
    assert planned(stack.up()) == {"create DnsRecord a.example.org"}
    assert planned(stack.preview("--refresh")) == set()


def test_a_tunnel_deleted_behind_our_back_is_named_and_a_refresh_makes_it_anew(tmp_path):
    stack = Published(tmp_path)
    stack.up()
    [lost] = stack.made("tunnel")
    for kind in ("tunnel", "configuration"):
        shutil.rmtree(tmp_path / "world/cloudflare" / kind)
    stack.set_config(stack.settings("a", "b", "c", "d", "e"))
    text = said(stack.up("--continue-on-error", check=False))
    assert re.search(r"TunnelCloudflaredConfig \(media\):\s+error: .*404 Not Found", text)
    mentioned("README.md", "404 Not Found")

    stack.up("--refresh")
    [tunnel] = stack.made("tunnel")
    assert tunnel["id"] != lost["id"]
    records = stack.made("record")
    assert len(records) == 5
    assert {record["content"] for record in records} == {f"{tunnel['id']}.cfargotunnel.com"}
    assert planned(stack.preview("--refresh")) == set()


# The cluster


def test_a_namespace_stuck_terminating_is_named_and_is_made_anew_once_it_is_gone(
    stack, undisturbed
):
    before = stack.settings
    namespace = stack.objects / "_cluster/Namespace/factory.json"
    with edited_file(namespace) as live:
        live["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    with stack.edited() as settings:
        settings["secrets"]["factory"]["grafana"] = {"data": {"password": Secret("made up")}}
    why = "unable to create new content in namespace factory because it is being terminated"
    assert why in said(stack.up(check=False))
    mentioned("README.md", "because it is being terminated")

    namespace.unlink()
    shutil.rmtree(stack.objects / "factory")
    stack.set_config(before)
    stack.up("--refresh")
    assert_same(stack, undisturbed)
    assert planned(stack.preview("--refresh")) == set()


def test_an_api_server_that_goes_in_the_middle_is_named_and_the_next_up_starts_it(
    tmp_path, undisturbed
):
    stack = EveryKind(tmp_path)
    stack.set_faults([{"method": "Create", "urn": "*Namespace::*", "do": "late", "seconds": 5}])

    def stop_it() -> None:
        while not (tmp_path / "faults").exists():
            time.sleep(0.1)
        stack.on_host("docker", "stop", "-t", "60", NODE)

    stopping = threading.Thread(target=stop_it)
    stopping.start()
    text = said(stack.up(check=False))
    stopping.join()
    assert re.search(r"core/v1:Namespace \(\w+\):\s+error: .*connection refused", text)
    mentioned("README.md", "connection refused")

    assert f"{NODE}" in json.dumps(json.loads(stack.cluster_file.read_text()))
    stack.up()
    assert_same(stack, undisturbed)


# The state


SMALL = {
    "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
    "secrets": {"apps": {"login": {"data": {"password": Secret("made up")}}}},
}


def test_a_wrong_passphrase_is_named_and_a_truncated_state_is_restored_as_documented(tmp_path):
    stack = Rehearsal(tmp_path, "p510", SMALL)
    stack.up()
    before = urns(stack)

    stack.environment = {"PULUMI_CONFIG_PASSPHRASE": "not the passphrase"}
    for run in (stack.preview(check=False), stack.up(check=False)):
        assert "incorrect passphrase" in said(run)
    mentioned("README.md", "incorrect passphrase")
    stack.environment = {}

    file = tmp_path / "state/.pulumi/stacks/homelab/p510.json"
    os.truncate(file, file.stat().st_size // 2)
    assert "failed to load checkpoint" in said(stack.preview(check=False))
    mentioned("README.md", "failed to load checkpoint")
    page = (CHECKOUT / "docs/state.md").read_text().partition("## It is damaged")[2]
    block = page.partition("```console\n")[2].partition("```")[0]
    lines = [line[2:] for line in block.splitlines() if line.startswith("$ ")]
    *restore, last = lines
    assert last == "pulumi up --refresh"
    script = "\n".join(restore).replace("/var/lib/pulumi", str(tmp_path / "state"))
    subprocess.run(["bash", "-euc", script], check=True, capture_output=True)
    assert planned(stack.up("--refresh")) == set()
    assert urns(stack) == before
