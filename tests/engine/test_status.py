"""`make status` and `make doctor`: what is there now against what is declared, and what could not
be seen. 0 where all is as declared, 1 where something is not, 2 where it cannot be told.
"""

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hostctl import cli
from rehearsal.run import Rehearsal
from tests.engine.conftest import P510, edited_file

pytestmark = pytest.mark.engine

CONNECTOR = "factory/Deployment.apps/cloudflared-factory.json"
BACKUPS = "/mnt/img_pool/k3d/storage-backups/factory"


class Seen:
    """What a run told: its exit status, and its rows by part and what they are of."""

    def __init__(self, ran: subprocess.CompletedProcess[str]) -> None:
        assert ran.stdout, ran.stderr
        self.code = ran.returncode
        self.rows: list[dict[str, Any]] = json.loads(ran.stdout)

    def __getitem__(self, place: tuple[str, str]) -> dict[str, Any]:
        [row] = [row for row in self.rows if (row["part"], row["what"]) == place]
        return row

    def of(self, verdict: str) -> set[tuple[str, str]]:
        return {(row["part"], row["what"]) for row in self.rows if row["verdict"] == verdict}


def run(stack: Rehearsal, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    project = str(stack.directory / "project")
    return subprocess.run(
        [sys.executable, "-m", "status", *arguments, "--project", project, stack.stack],
        env={**stack.process_environment(), **environment},
        capture_output=True,
        text=True,
    )


def status(stack: Rehearsal, *arguments: str, **environment: str) -> Seen:
    """What `make status JSON=1`, or with --doctor `make doctor`, tells of a stack of any kind."""
    return Seen(run(stack, "--json", *arguments, **environment))


def hostctl(p510: P510, *words: str) -> None:
    assert cli.main(list(words), io.StringIO(""), p510.host) == 0


@pytest.fixture
def sound(p510: P510, capsys: pytest.CaptureFixture[str]) -> P510:
    """p510 in its second hour: connected, backed up, watched."""
    with edited_file(p510.objects / CONNECTOR) as deployment:
        deployment["status"] = {"readyReplicas": 2}
    taken = time.strftime("%Y%m%dT%H%M%S.000000Z", time.gmtime(p510.host.now()))
    for item, kind in (("keycloak", "tar"), ("skillai", "dump"), ("state", "tar")):
        for suffix in ("", ".sha256"):
            p510.write_file(f"{BACKUPS}/{item}/{taken}.{kind}{suffix}", "content")
    with edited_file(p510.host_file("/var/lib/homelab/clusters/factory.json")) as record:
        record["backups"] = BACKUPS
    healthy = {"sync": {"status": "Synced"}, "health": {"status": "Healthy"}}
    with edited_file(p510.objects / "argocd/Application.argoproj.io/root.json") as root:
        root["status"] = healthy
    hostctl(p510, "watch", "run", "factory")
    capsys.readouterr()
    return p510


def test_a_stack_that_is_as_declared_ends_with_0(sound: P510) -> None:
    ran = run(sound)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[-1].endswith("looked at, 0 not as they should be, 0 could not be seen")
    parts = {line.split()[0] for line in lines[:-1]}
    assert parts == {"state", "host", "cluster", "secrets", "tunnels", "backups", "watching"}


def test_what_is_not_as_declared_is_told_with_its_remedy_and_ends_with_1(sound: P510) -> None:
    (sound.objects / "fides/Secret/fides-secrets.json").unlink()
    (sound.world / "docker/container/cloudflared-p510.json").unlink()
    sound.host_file("/etc/systemd/system/homelab-factory-clean.timer").unlink()
    with edited_file(sound.objects / CONNECTOR) as deployment:
        deployment["status"] = {"readyReplicas": 1}
    with edited_file(sound.cluster_file) as cluster:
        cluster["nodes"][0]["image"] = "rancher/k3s:v1.31.4-k3s1"
    seen = status(sound)
    assert seen.code == 1
    assert seen.of("bad") == {
        ("secrets", "fides"),
        ("tunnels", "factory"),
        ("tunnels", "p510"),
        ("host", "homelab-factory-clean.timer"),
        ("cluster", "image"),
    }
    assert seen["secrets", "fides"]["now"] == "without fides-secrets"
    assert seen["cluster", "image"]["now"] == "rancher/k3s:v1.31.4-k3s1"
    assert all(row["remedy"] for row in seen.rows if row["verdict"] == "bad")


def test_with_the_cluster_stopped_all_else_is_told(sound: P510) -> None:
    sound.on_host("docker", "stop", "-t", "60", "k3d-factory-server-0")
    seen = status(sound)
    assert seen.code == 1
    assert ("cluster", "factory") in seen.of("bad")
    assert ("secrets", "all") in seen.of("unknown")
    assert {("backups", "keycloak"), ("tunnels", "p510")} <= seen.of("fine")


def test_with_docker_down_it_says_what_it_could_not_see_and_ends_with_2(sound: P510) -> None:
    (sound.world / "machine" / "docker-down").touch()
    seen = status(sound)
    assert seen.code == 2
    assert seen.of("bad") == set()
    assert "Cannot connect to the Docker daemon" in seen["cluster", "factory"]["now"]
    assert "systemctl status docker" in seen["cluster", "factory"]["remedy"]
    assert ("host", "homelab-factory.service") in seen.of("fine")


def test_of_a_host_that_does_not_answer_the_state_is_told_and_the_other_way_round(
    sound: P510,
) -> None:
    (sound.world / "machine" / "down").touch()
    seen = status(sound)
    assert seen.code == 2
    assert seen["state", "resources"]["verdict"] == "fine"
    assert seen["host", "this machine"]["now"].startswith("does not answer: ")
    (sound.world / "machine" / "down").unlink()
    seen = status(sound, PULUMI_BACKEND_URL="file:///nowhere/at/all")
    assert seen.code == 2
    assert seen.of("unknown") == {("state", "stack")}


def test_the_doctor_names_what_the_host_lacks_with_its_remedy(p510: P510) -> None:
    assert status(p510, "--doctor").code == 0
    (p510.world / "machine" / "missing-tools.json").write_text('["git"]')
    seen = status(p510, "--doctor")
    assert seen.code == 1
    [row] = [row for row in seen.rows if row["verdict"] == "bad"]
    assert "git" in row["now"]
    assert row["remedy"]


def test_a_stack_without_a_file_or_with_wrong_settings_is_refused(p510: P510) -> None:
    missing = subprocess.run(
        [sys.executable, "-m", "status", "--project", str(p510.directory), "p510"],
        env=p510.process_environment(),
        capture_output=True,
        text=True,
    )
    assert missing.returncode == 2
    assert "Pulumi.p510.yaml" in missing.stderr
    file = Path(p510.directory, "project/Pulumi.p510.yaml")
    file.write_text(file.read_text().replace("kind: k3d", "kind: k4d"))
    wrong = run(p510)
    assert wrong.returncode == 2
    assert "homelab:cluster" in wrong.stderr
