"""One owner of each object: ArgoCD gets some of a stack's and gives one back; none is deleted."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rehearsal.apiserver import ApiServer
from rehearsal.core import World
from rehearsal.run import Rehearsal, Secret
from tests.engine.conftest import edited_file, errors, planned

pytestmark = pytest.mark.engine

CONNECTOR = "Deployment factory/cloudflared-dev"
DATABASE = "Secret factory/database"
NAMESPACE = "Namespace factory"
TRACKING = "argocd.argoproj.io/tracking-id"


class Dev(Rehearsal):
    """A small stack: a cluster, a Secret and a connector in it."""

    def __init__(self, directory: Path) -> None:
        self.settings: dict[str, Any] = {
            "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
            "secrets": {
                "factory": {"database": {"data": {"password": Secret("a password of the stack")}}}
            },
            "cloudflare": {
                "accountId": "a" * 32,
                "apiToken": Secret("t" * 40),
                "zones": {"example.org": "e" * 32},
            },
            "tunnels": {
                "dev": {
                    "secret": Secret("dGhlIHNlY3JldCB0aGF0IHRoZSBpbmN1bWJlbnQgdXNlcy4u"),
                    "connector": {"kind": "cluster", "namespace": "factory", "replicas": 2},
                    "routes": [],
                }
            },
        }
        super().__init__(directory, "dev", self.settings)

    def hand_over(self, *titles: str) -> None:
        self.settings["handedOver"] = list(titles)
        self.set_config(self.settings)

    def file(self, title: str) -> Path:
        """An object of the world."""
        kind, _, place = title.partition(" ")
        kind = "Deployment.apps" if kind == "Deployment" else kind
        place = place if "/" in place else f"_cluster/{place}"
        namespace, _, name = place.partition("/")
        pattern = f"world/kubernetes/*/{namespace}/{kind}/{name}.json"
        [file] = self.directory.glob(pattern)
        return file

    def live(self, title: str) -> dict[str, Any]:
        return json.loads(self.file(title).read_text())

    def sync(self, title: str, id: str, **spec: Any) -> None:
        """ArgoCD syncs an object, by server-side apply: its mark and its fields are ArgoCD's."""
        file, live = self.file(title), self.live(title)
        metadata = {key: live["metadata"][key] for key in ("name", "namespace", "labels")}
        wanted = {**live, "metadata": {**metadata, "annotations": {TRACKING: id}}}
        wanted.pop("status", None)
        if spec:
            wanted["spec"] = {**live["spec"], **spec}
        world = World(self.directory / "world/kubernetes")
        ApiServer(world, file.parents[2].name).apply(wanted, "argocd-controller", force=True)

    def owners(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """The exit status of `make owners`, and its rows by object."""
        command = [sys.executable, "-m", "status", "--owners", "--json"]
        ran = subprocess.run(
            [*command, "--project", str(self.directory / "project"), self.stack],
            env=self.process_environment(),
            capture_output=True,
            text=True,
        )
        assert ran.stdout, ran.stderr
        return ran.returncode, {row["what"]: row for row in json.loads(ran.stdout)}


@pytest.fixture(scope="module")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> Dev:
    stack = Dev(tmp_path_factory.mktemp("dev"))
    stack.up()
    return stack


@pytest.fixture
def dev(brought_up: Dev, tmp_path: Path) -> Dev:
    return brought_up.copy(tmp_path / "dev")


def test_objects_go_to_argocd_and_come_back_and_are_the_same_all_the_while(dev: Dev) -> None:
    before = {title: dev.live(title)["metadata"]["uid"] for title in (CONNECTOR, DATABASE)}
    dev.sync(CONNECTOR, "infra:apps/Deployment:factory/cloudflared-dev", replicas=3)
    dev.sync(DATABASE, "infra:/Secret:factory/database")

    [error] = errors(dev.preview(check=False))
    assert "2 object(s) would have two owners; nothing was changed" in error
    for title in (CONNECTOR, DATABASE):
        assert f"{title} is declared here and belongs to ArgoCD application infra" in error
        assert f'add "{title}" to homelab:handedOver' in error
    code, rows = dev.owners()
    assert code == 1
    assert {what for what, row in rows.items() if row["verdict"] == "bad"} == {CONNECTOR, DATABASE}
    assert rows[NAMESPACE]["now"] == "Pulumi"

    dev.hand_over(CONNECTOR, DATABASE)
    # No workload is told of a value that is another's.
    assert planned(dev.up("--refresh", "--run-program")) == {"delete Command rollout factory"}
    dev.settings["tunnels"]["dev"]["connector"]["replicas"] = 1
    dev.hand_over(CONNECTOR, DATABASE)
    dev.up()
    assert dev.live(CONNECTOR)["spec"]["replicas"] == 3, "a change of it is ArgoCD's to make"
    code, rows = dev.owners()
    assert (code, rows[CONNECTOR]["declared"]) == (0, "handed over")
    assert rows[CONNECTOR]["now"] == "ArgoCD application infra"

    with edited_file(dev.file(CONNECTOR)) as live:
        del live["metadata"]["annotations"][TRACKING]
    dev.hand_over(DATABASE)
    dev.up()
    assert dev.live(CONNECTOR)["spec"]["replicas"] == 1
    assert not planned(dev.preview())
    assert before == {title: dev.live(title)["metadata"]["uid"] for title in before}


def test_what_is_handed_over_stays_when_it_is_declared_no_more(dev: Dev) -> None:
    dev.sync(DATABASE, "infra:/Secret:factory/database")
    dev.hand_over(DATABASE)
    dev.up()
    before = dev.live(DATABASE)
    dev.settings["secrets"] = {}
    dev.hand_over(DATABASE)
    run = dev.up()
    assert dev.live(DATABASE) == before
    assert any(f"{DATABASE} is not declared any more" in text for text in run.diagnostics)


def test_an_up_without_a_preview_does_not_touch_what_another_owns(dev: Dev) -> None:
    dev.sync(CONNECTOR, "infra:apps/Deployment:factory/cloudflared-dev")
    before = dev.live(CONNECTOR)
    dev.settings["tunnels"]["dev"]["connector"]["replicas"] = 1
    dev.set_config(dev.settings)
    [error] = errors(dev.up("--skip-preview", check=False))
    assert "belongs to ArgoCD application infra" in error
    assert dev.live(CONNECTOR) == before
