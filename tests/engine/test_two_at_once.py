"""Two at once: a second `up` of a stack is refused by the state's lock, a dead run's lock is
explained, and two stacks on one host do not disturb each other.
"""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from components.recovery import Engine, recover
from rehearsal.run import CHECKOUT, Rehearsal, Secret
from tests.engine.conftest import planned

pytestmark = pytest.mark.engine


def settings(name: str, port: int, subnet: str) -> dict[str, Any]:
    return {
        "cluster": {
            "name": name,
            "image": "rancher/k3s:v1.31.5-k3s1",
            "api": {"port": port},
            "storageDir": f"/srv/{name}/storage",
            "network": {"name": f"k3d-{name}", "subnet": subnet},
            "kubeconfig": {"path": f"/etc/{name}/kubeconfig"},
        },
        "secrets": {"apps": {"login": {"data": {"password": Secret(f"of {name}")}}}},
    }


def locks(stack: Rehearsal) -> list[Path]:
    return list((stack.directory / "state/.pulumi/locks").rglob("*.json"))


def test_a_second_up_is_refused_and_a_dead_runs_lock_is_removed_as_documented(tmp_path):
    stack = Rehearsal(tmp_path, "dev", settings("one", 6443, "172.30.0.0/16"))
    hang = {"provider": "command", "method": "Create", "urn": "*::hostctl", "do": "late"}
    stack.set_faults([{**hang, "seconds": 20}])
    first = stack.start("up", "--yes", "--skip-preview")
    while not (tmp_path / "faults").exists():
        assert first.poll() is None
        time.sleep(0.1)

    second = stack.up(check=False)
    assert second.code != 0
    said = second.stdout + second.stderr
    assert "the stack is currently locked by 1 lock(s)" in said
    assert re.search(rf"created by \S+ \(pid {first.pid}\)", said)
    first.kill()
    first.communicate()
    assert locks(stack)
    assert "the stack is currently locked by 1 lock(s)" in stack.up(check=False).stderr
    for document in ("README.md", "docs/state.md"):
        assert "the stack is currently locked" in (CHECKOUT / document).read_text()
    # As documented: `make recover`.
    environment = stack.process_environment()
    recover(Engine(tmp_path / "project", "dev", environment, say=lambda line: None))
    assert locks(stack) == []


def test_two_stacks_on_one_host_come_up_at_once_and_do_not_disturb_each_other(tmp_path):
    one = Rehearsal(tmp_path / "one", "one", settings("one", 6443, "172.30.0.0/16"))
    (tmp_path / "two").mkdir()
    (tmp_path / "two/world").symlink_to(tmp_path / "one/world")
    two = Rehearsal(tmp_path / "two", "two", settings("two", 6444, "172.31.0.0/16"))
    (tmp_path / "one/world").mkdir(exist_ok=True)
    runs = [stack.start("up", "--yes", "--skip-preview") for stack in (one, two)]
    for run in runs:
        stdout, stderr = run.communicate()
        assert run.returncode == 0, stdout + stderr
    for stack in (one, two):
        assert planned(stack.preview("--refresh")) == set()
    clusters = tmp_path / "one/world/machine/clusters"
    assert {file.stem for file in clusters.glob("*.json")} == {"one", "two"}

    with_delete = settings("one", 6443, "172.30.0.0/16")
    with_delete["cluster"]["delete"] = "one"
    one.set_config(with_delete)
    one.up()
    one.destroy()
    assert {file.stem for file in clusters.glob("*.json")} == {"two"}
    assert planned(two.preview("--refresh")) == set()
