"""The life of stack p510: first preview, up, again, its outputs, its names, destroy.

Its URNs are pinned in urns.p510.txt: another URN is another resource, so a rename needs an alias,
or the next up of a real host deletes and creates. When a resource comes or goes on purpose:

    .venv/bin/python -m tests.engine.test_p510
"""

import json
import tempfile
from pathlib import Path

import pytest
import yaml

import homelab
from rehearsal.machine import RehearsalMachine
from rehearsal.run import Run
from tests.engine.conftest import P510, planned, urns

pytestmark = pytest.mark.engine

TOKEN = "/var/lib/homelab/tunnels/p510.token"
URNS = Path(__file__).with_name("urns.p510.txt")


def test_the_first_preview_of_a_host_without_a_cluster_says_so_and_creates_everything(tmp_path):
    stack = P510(tmp_path / "p510")
    preview = stack.preview()
    assert "cluster factory does not exist on this machine: up creates it" in preview.stdout
    assert "made up values for 22 files" in preview.stdout
    assert set(preview.changes) == {"create"}
    created = {step.urn for step in preview.steps if "::default_" not in step.urn}
    assert created == set(URNS.read_text().split("\n")[:-1])
    assert not (stack.world / "machine" / "files").exists()


def test_the_names_of_all_resources_are_the_pinned_ones(brought_up):
    assert urns(brought_up) == URNS.read_text().splitlines()


def test_once_up_nothing_is_left_to_do(p510):
    assert planned(p510.up()) == set()
    assert planned(p510.preview()) == set()
    assert planned(p510.preview("--refresh")) == set()


def test_the_outputs_are_the_contract(brought_up):
    hidden = brought_up.outputs(show_secrets=False)
    assert hidden["kubeconfig"] == "[secret]"
    outputs = brought_up.outputs()
    kubeconfig = yaml.safe_load(outputs.pop("kubeconfig"))
    (cluster,) = kubeconfig["clusters"]
    # Incident 14: never 0.0.0.0.
    assert cluster["cluster"]["server"] == "https://127.0.0.1:6443"
    assert outputs["cluster"].keys() == homelab.Cluster.__annotations__.keys()
    identity = outputs["cluster"].pop("identity")
    assert identity == f"factory-{brought_up.objects.name}"
    ids = {name: tunnel.pop("id") for name, tunnel in outputs["tunnels"].items()}
    for name, id in ids.items():
        (file,) = (brought_up.world / "cloudflare" / "tunnel").glob(f"*/{name}.json")
        assert json.loads(file.read_text())["id"] == id
    commit = outputs["argocd"].pop("commit")
    (root,) = brought_up.objects.glob("argocd/Application.argoproj.io/root.json")
    assert json.loads(root.read_text())["spec"]["source"]["targetRevision"] == commit
    hostnames = ("argocd", "aifactory", "pfactory", "tfactory", "cfactory")
    hostnames += ("plex", "sonarr", "radarr")
    assert outputs == {
        "version": homelab.CONTRACT_VERSION,
        "cluster": {
            "name": "factory",
            "endpoint": "https://127.0.0.1:6443",
            "context": "k3d-factory",
            "kubeconfigPath": "/etc/k3d/kubeconfig",
            "storageClass": "local-retain",
            "k3sVersion": "v1.31.5+k3s1",
        },
        "acceptance": {"state": "passed", "detail": "a pod resolves registry-1.docker.io"},
        "namespaces": ["argocd", "factory", "fides", "fides-reporter", "tailscale"],
        "argocd": {
            "repository": "https://github.com/olafkfreund/factory-gitops",
            "ref": "main",
            "url": "https://argocd.example.org",
        },
        "tunnels": {
            "factory": {
                "name": "factory",
                "connector": "cluster",
                "public": ["cfactory.example.org"],
            },
            "p510": {"name": "p510", "connector": "host", "public": ["plex.example.org"]},
        },
        "urls": {f"{name}.example.org": f"https://{name}.example.org" for name in hostnames},
    }


def test_the_kubeconfig_and_the_connectors_token_are_for_their_readers_alone(brought_up):
    host = RehearsalMachine(brought_up.world / "machine")
    modes = {
        "/etc/k3d": (0o750, "root", "wheel"),
        "/etc/k3d/kubeconfig": (0o640, "root", "wheel"),
        TOKEN: (0o600, "65532", "65532"),
    }
    for path, expected in modes.items():
        seen = host.stat(path)
        assert seen is not None
        assert (seen.mode, seen.owner, seen.group) == expected, path


def test_destroy_is_refused_whole_until_the_names_are_typed_and_then_leaves_no_orphan(p510):
    world, state = files(p510.world), urns(p510)
    # As a person runs it, whose preview comes first.
    refused = p510.pulumi("destroy", "--yes", check=False)
    assert refused.code != 0
    for protected in ("Command::cluster'", "Cloudflared::factory'", "Cloudflared::p510'"):
        assert f"{protected}`\n" in refused.stdout
    assert files(p510.world) == world
    assert urns(p510) == state

    objects = p510.objects
    with p510.edited() as settings:
        settings["cluster"]["delete"] = "factory"
        for name, tunnel in settings["tunnels"].items():
            tunnel["delete"] = name
    # The delete runs with what the state holds, so the confirmation is applied first.
    assert planned(p510.up()) == {"update Command cluster"}
    destroy = p510.destroy()

    assert p510.resources() == []
    left = {str(path) for path in files(p510.world) if ".ids" not in path.parts}
    assert {path for path in left if path.startswith("cloudflare/")} == set()
    # Images are kept: another stack may run on them.
    assert {path.split("/")[1] for path in left if path.startswith("docker/")} == {"image"}
    assert not p510.cluster_file.exists()
    assert json.loads((p510.world / "machine" / "volumes.json").read_text()) == []
    # Cloudflare refuses to delete a tunnel with live connectors.
    assert_order(destroy, "Command::stop factory/cloudflared-factory", "Cloudflared::factory")
    assert_order(destroy, "Container::cloudflared-p510", "Cloudflared::p510")
    connector = objects / "factory" / "Deployment.apps" / "cloudflared-factory.json"
    assert json.loads(connector.read_text())["spec"]["replicas"] == 0
    # What nobody needs any more and would let its reader in.
    assert not p510.host_file("/etc/k3d/kubeconfig").exists()
    assert not p510.host_file("/var/lib/homelab/tunnels/p510.token").exists()
    assert_order(destroy, "Container::cloudflared-p510", "Command::token " + TOKEN)
    # Incident 10, and what the host needs without Pulumi.
    storage = "/mnt/img_pool/k3d/storage"
    assert f"the data of cluster factory stays in {storage} and {storage}-server" in destroy.stdout
    assert p510.host_file("/mnt/img_pool/k3d/storage").is_dir()
    assert p510.host_file("/var/lib/homelab/hostctl").exists()
    assert list(p510.host_file("/etc/systemd/system").iterdir()) == []
    assert_order(destroy, "Command::units", "Command::cluster")

    p510.up()
    assert urns(p510) == state


def assert_order(run: Run, first: str, then: str) -> None:
    """The one resource's step has ended before the other's begins."""
    ends = [
        number
        for number, event in enumerate(run.events)
        if event.res_outputs_event and event.res_outputs_event.metadata.urn.endswith(first)
    ]
    begins = [
        number
        for number, event in enumerate(run.events)
        if event.resource_pre_event and event.resource_pre_event.metadata.urn.endswith(then)
    ]
    assert max(ends) < min(begins)


def files(directory: Path) -> dict[Path, bytes]:
    """The content of all files below, without locks and counters of reads."""
    return {
        path.relative_to(directory): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "locks" not in path.parts
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        stack = P510(Path(directory))
        stack.up()
        URNS.write_text("".join(f"{urn}\n" for urn in urns(stack)))
