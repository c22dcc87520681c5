"""The life of stack metal: MetalLB and Traefik in a cluster that was there before.

Its URNs are pinned in urns.metal.txt as p510's are. When a resource comes or goes on purpose:

    .venv/bin/python -m tests.engine.test_metal
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.ownership import NOT_SEEN
from rehearsal import existing
from rehearsal.providers.kubernetes import cluster_id
from tests.engine.conftest import (
    StackRehearsal,
    assert_state_is_rebuilt,
    edited_file,
    errors,
    planned,
    urns,
)
from tests.engine.test_status import run, status

pytestmark = pytest.mark.engine

URNS = Path(__file__).with_name("urns.metal.txt")


class Metal(StackRehearsal):
    """A rehearsal of metal."""

    name = "metal"

    @property
    def identity(self) -> str:
        ca = existing.made_up(self.settings["cluster"])["ca"]
        return f"metal-{cluster_id(ca)}"

    @property
    def objects(self) -> Path:
        """What lives in the cluster: <namespace>/<Kind.group>/<name>.json."""
        return self.world / "kubernetes" / self.identity.removeprefix("metal-")

    @property
    def cluster_file(self) -> Path:
        return self.world / "machine" / "existing" / "metal.json"

    def address(self) -> str | None:
        service = json.loads((self.objects / "traefik" / "Service" / "traefik.json").read_text())
        ingress = service["status"]["loadBalancer"].get("ingress") or [{}]
        return ingress[0].get("ip")

    def silence_webhook(self, calls: int | str) -> None:
        (self.world / "kubernetes" / "webhooks.json").write_text(json.dumps({"metallb": calls}))

    def there(self) -> set[str]:
        """All objects in the cluster but those that every cluster has."""
        return {
            "/".join(path.relative_to(self.objects).parts)
            for path in self.objects.rglob("*.json")
            if path.parts[-2] not in ("Node", "Namespace") or path.stem in ("traefik", _METALLB)
        }


_METALLB = "metallb-system"


@pytest.fixture
def fresh(tmp_path: Path) -> Metal:
    """metal before its first up."""
    return Metal(tmp_path / "metal")


@pytest.fixture(scope="module")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> Metal:
    """metal after its first up; not to be changed."""
    stack = Metal(tmp_path_factory.mktemp("metal"))
    stack.up()
    return stack


@pytest.fixture
def metal(brought_up: Metal, tmp_path: Path) -> Metal:
    """metal after its first up, to do anything with."""
    return brought_up.copy(tmp_path / "metal")


def test_the_first_preview_creates_the_pinned_resources_and_touches_nothing(fresh):
    before = fresh.there()
    preview = fresh.preview()
    assert set(preview.changes) == {"create"}
    created = {step.urn for step in preview.steps if "::default_" not in step.urn}
    assert created == set(URNS.read_text().split("\n")[:-1])
    assert f"write {fresh.identity}, and a kubeconfig of another" in preview.stdout
    assert fresh.there() == before


def test_once_up_nothing_is_left_to_do_and_the_ingress_has_its_address(metal):
    assert urns(metal) == URNS.read_text().splitlines()
    assert planned(metal.up()) == set()
    assert planned(metal.preview("--refresh")) == set()
    assert metal.address() == "192.168.1.240"
    hidden = metal.outputs(show_secrets=False)
    assert hidden["kubeconfig"] == "[secret]"
    outputs = metal.outputs()
    assert outputs["ingress"] == "192.168.1.240"
    assert outputs["cluster"] == {
        "name": "metal",
        "identity": metal.identity,
        "endpoint": "https://192.168.1.130:6443",
        "context": "metal",
        "kubeconfigPath": "/var/lib/homelab/kubeconfigs/metal",
        "storageClass": "longhorn",
        "k3sVersion": existing.VERSION,
    }
    host = metal.host
    seen = host.stat("/var/lib/homelab/kubeconfigs/metal")
    assert seen is not None
    assert (seen.mode, seen.owner) == (0o600, "root")


def test_a_lost_state_is_rebuilt_from_what_exists(metal):
    assert_state_is_rebuilt(metal)


def test_no_credential_is_in_the_state_in_clear_or_in_any_output_of_a_run(metal):
    made = existing.made_up(metal.settings["cluster"])
    shown = json.dumps(metal.export()) + metal.preview("--diff").stdout
    for key in ("certificate", "key"):
        assert made[key] not in shown


def test_each_edit_is_previewed_exactly_and_applied(metal):
    def edit(expected: set[str], change: Any) -> None:
        with metal.edited() as settings:
            change(settings["network"])
        assert planned(metal.preview()) == expected
        assert planned(metal.up()) == expected
        assert planned(metal.preview()) == set()

    edit(
        {"update Service traefik"},
        lambda network: network["traefik"].update(address="192.168.1.243"),
    )
    assert metal.address() == metal.outputs()["ingress"] == "192.168.1.243"
    wider = {"name": "main-pool", "addresses": "192.168.1.236-192.168.1.245"}
    edit(
        {"update IPAddressPool main-pool"},
        lambda network: network["metallb"].update(pools=[wider]),
    )
    spare = {"name": "spare", "addresses": "192.168.1.230-192.168.1.231", "autoAssign": False}
    edit(
        {"create IPAddressPool spare", "update L2Advertisement l2-adv"},
        lambda network: network["metallb"].update(pools=[wider, spare]),
    )
    edit(
        {"update Release traefik"},
        lambda network: network["traefik"]["acme"].update(email="another@example.org"),
    )
    edit(
        {
            "delete Command webhook",
            "delete IPAddressPool main-pool",
            "delete IPAddressPool spare",
            "delete L2Advertisement l2-adv",
            "delete MetalLB metal",
            "delete Namespace metallb-system",
            "delete Namespace traefik",
            "delete NetworkPolicy metallb-system/controller",
            "delete NetworkPolicy traefik/traefik",
            "delete Release metallb",
            "delete Release traefik",
            "delete Service traefik",
            "delete Traefik metal",
        },
        lambda network: [network.pop("metallb"), network.pop("traefik")],
    )
    assert metal.there() == set()


def test_a_pool_is_made_only_once_the_webhook_answers(fresh):
    fresh.silence_webhook(4)
    up = fresh.up()
    assert "waiting for MetalLB's webhook" in up.stdout
    assert errors(up) == []
    assert fresh.address() == "192.168.1.240"


def test_a_webhook_that_never_answers_fails_by_name_and_the_next_up_goes_on(fresh):
    fresh.silence_webhook("never")
    failed = fresh.up(check=False)
    assert failed.code != 0
    assert "failed calling webhook" in failed.stdout + failed.stderr
    assert not list(fresh.objects.rglob("IPAddressPool.metallb.io/*"))
    fresh.silence_webhook(0)
    fresh.up()
    assert fresh.address() == "192.168.1.240"
    assert planned(fresh.preview()) == set()


def test_a_lost_node_is_told_and_changes_nothing(metal):
    node = metal.objects / "_cluster" / "Node" / "worker-1.json"
    with edited_file(node) as worker:
        worker["status"]["conditions"][0]["status"] = "Unknown"
    preview = metal.preview()
    assert planned(preview) == set()
    assert any("node worker-1 is not ready" in text for text in preview.diagnostics)
    assert planned(metal.up()) == set()
    assert metal.address() == "192.168.1.240"
    node.unlink()
    gone = metal.preview()
    assert planned(gone) == set()
    assert any("it has no node worker-1" in text for text in gone.diagnostics)


def test_a_rollout_of_traefik_leaves_its_address_and_its_volume_alone(metal):
    before = (metal.objects / "traefik" / "Service" / "traefik.json").read_text()
    with metal.edited() as settings:
        settings["network"]["traefik"]["acme"]["challenge"] = "http"
    assert planned(metal.up()) == {"update Release traefik"}
    assert (metal.objects / "traefik" / "Service" / "traefik.json").read_text() == before
    (release,) = metal.objects.glob("traefik/Release.helm.sh/traefik.json")
    values = json.loads(release.read_text())["values"]
    assert values["updateStrategy"] == {"type": "Recreate"}


def test_renewed_credentials_replace_nothing(metal):
    host = metal.host
    config = yaml.safe_load(existing.kubeconfig(metal.settings["cluster"]))
    config["users"][0]["user"]["client-certificate-data"] = "cmVuZXdlZA=="
    host.write_atomic("/etc/kubernetes/admin.conf", yaml.safe_dump(config).encode(), 0o600)
    assert planned(metal.preview()) == {"update Command kubeconfig", "update kubernetes kubernetes"}
    metal.up()
    assert planned(metal.preview()) == set()


def test_a_cluster_that_sleeps_shows_edits_and_is_not_touched(metal):
    with edited_file(metal.cluster_file) as cluster:
        cluster["state"] = "stopped"
    with metal.edited() as settings:
        settings["network"]["traefik"]["address"] = "192.168.1.244"
    preview = metal.preview()
    [told] = [d for d in preview.diagnostics if "answer at https://192.168.1.130:6443" in d]
    assert NOT_SEEN in told
    # The provider's update is that of a preview alone: it must not skip what is unreachable.
    assert planned(preview) == {"update Service traefik", "update kubernetes kubernetes"}
    state = {r["urn"]: r["modified"] for r in metal.resources() if r["custom"]}
    refused = metal.up(check=False)
    assert refused.code != 0
    assert any("does not answer" in text and "Nothing was" in text for text in errors(refused))
    assert {r["urn"]: r["modified"] for r in metal.resources() if r["custom"]} == state


def test_another_cluster_is_refused_and_a_lost_one_forgotten_on_purpose(metal):
    with metal.edited() as settings:
        settings["cluster"]["identity"] = metal.identity
    assert planned(metal.up()) == set()
    former = metal.there()

    # The cluster is set up anew: another CA at the same address.
    other = {**metal.settings["cluster"], "name": "anew"}
    made = {**existing.made_up(other), "name": "metal"}
    metal.cluster_file.write_text(json.dumps(made))
    host = metal.host
    host.write_atomic("/etc/kubernetes/admin.conf", existing.kubeconfig(other).encode(), 0o600)
    refused = metal.preview(check=False)
    (error,) = errors(refused)
    anew = f"metal-{cluster_id(made['ca'])}"
    assert f"declared {metal.identity}" in error
    assert anew in error

    provider = next(urn for urn in urns(metal) if "pulumi:providers:kubernetes" in urn)
    metal.pulumi("state", "delete", "--target-dependents", "--yes", provider)
    with metal.edited() as settings:
        settings["cluster"]["identity"] = anew
    metal.up()
    assert urns(metal) == URNS.read_text().splitlines()
    assert metal.there() == former


def test_destroy_takes_out_what_the_stack_put_in_and_leaves_the_cluster(metal):
    nodes = sorted((metal.objects / "_cluster" / "Node").iterdir())
    metal.destroy()
    assert metal.resources() == []
    assert metal.there() == set()
    assert sorted((metal.objects / "_cluster" / "Node").iterdir()) == nodes
    assert json.loads(metal.cluster_file.read_text())["state"] == "running"
    host = metal.host
    assert host.exists("/etc/kubernetes/admin.conf")
    assert not host.exists("/var/lib/homelab/kubeconfigs/metal")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        stack = Metal(Path(directory))
        stack.up()
        URNS.write_text("".join(f"{urn}\n" for urn in urns(stack)))


def test_status_tells_of_the_nodes_and_of_an_api_that_does_not_answer(metal):
    ran = run(metal)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "cluster  node worker-2       Ready      Ready v1.31.5" in ran.stdout
    node = metal.objects / "_cluster" / "Node"
    with edited_file(node / "worker-1.json") as worker:
        worker["status"]["conditions"][0]["status"] = "Unknown"
    (node / "worker-2.json").rename(node / "worker-3.json")
    with edited_file(node / "worker-3.json") as worker:
        worker["metadata"]["name"] = "worker-3"
    seen = status(metal)
    assert seen.code == 1
    assert {place: seen[place]["now"] for place in seen.of("bad")} == {
        ("cluster", "node worker-1"): "not Ready v1.31.5",
        ("cluster", "node worker-2"): "no such node",
        ("cluster", "node worker-3"): "not declared",
    }
    with edited_file(metal.cluster_file) as cluster:
        cluster["state"] = "stopped"
    for arguments in ([], ["--doctor"]):
        seen = status(metal, *arguments)
        assert seen.code == 1
        assert seen.of("bad") == {("cluster", "metal")}
        assert "i/o timeout" in seen["cluster", "metal"]["now"]


def test_status_and_doctor_of_a_host_that_does_not_answer_end_with_2(metal):
    (metal.world / "machine" / "down").touch()
    for arguments in ([], ["--doctor"]):
        seen = status(metal, *arguments)
        assert seen.code == 2
        assert seen.of("unknown") == {("host", "host 192.168.1.130")}


def test_before_the_first_up_status_says_what_is_not_there_yet(fresh):
    seen = status(fresh)
    assert seen.code == 1
    assert seen["state", "resources"]["now"] == "none"
    assert seen["cluster", "metal"]["verdict"] == "unknown"
    assert "pulumi up" in seen["cluster", "metal"]["remedy"]
