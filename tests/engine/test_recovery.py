"""What exists and is not in the state: after a kill, a lost state, and from the incumbent.

By the commands that a person runs, `make recover` and `make adopt`, on a stack of one of each kind
of object that is found by a natural key.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.recovery import Engine, RecoveryError, adopt, recover
from rehearsal.run import CHECKOUT, Rehearsal, Secret
from setup import cache
from tests.engine.conftest import edited_file, planned, urns
from tests.engine.incumbent import ROTATED, TUNNELS, UNIT, Incumbent

pytestmark = pytest.mark.engine

ACCOUNT, ZONE = "a" * 32, "e" * 32
PASSWORD = "a password of the incumbent"


class Dev(Rehearsal):
    """A small stack: a cluster, a namespace and a Secret in it, a tunnel with a gated hostname and
    its container.
    """

    def __init__(self, directory: Path) -> None:
        self.said: list[str] = []
        tunnel = {
            "secret": Secret("dGhlIHNlY3JldCB0aGF0IHRoZSBpbmN1bWJlbnQgdXNlcy4u"),
            "connector": {"kind": "host", "image": "cloudflare/cloudflared:2025.4.0"},
            "routes": [
                {
                    "hostname": "app.example.org",
                    "service": "http://localhost:80",
                    "access": {"emails": ["someone@example.org"]},
                },
            ],
        }
        self.settings: dict[str, Any] = {
            "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
            "namespaces": {"apps": {}},
            "secrets": {"default": {"database": {"data": {"password": Secret("declared")}}}},
            "cloudflare": {
                "accountId": ACCOUNT,
                "apiToken": Secret("t" * 40),
                "zones": {"example.org": ZONE},
            },
            "tunnels": {"dev": tunnel},
        }
        super().__init__(directory, "dev", self.settings)

    @property
    def engine(self) -> Engine:
        """How `make` reaches it."""
        environment = self.process_environment()
        return Engine(self.directory / "project", "dev", environment, say=self.said.append)

    @property
    def world(self) -> dict[str, str]:
        """All objects that the stand-ins made, by file."""
        root = self.directory / "world"
        return {
            str(file.relative_to(root)): file.read_text()
            for file in root.rglob("*.json")
            if file.is_relative_to(root / "kubernetes")
            or file.is_relative_to(root / "docker")
            or file.is_relative_to(root / "cloudflare")
        }

    @property
    def locks(self) -> Path:
        return self.directory / "state/.pulumi/locks/organization/homelab/dev"

    def make(self, *goal: str) -> subprocess.CompletedProcess[str]:
        """`make`, as a user runs it in a checkout: the stack's project becomes one. Its environment
        has the rehearsal's backend and passphrase and nothing of the user's.
        """
        project = self.directory / "project"
        for name, target in (("Makefile", CHECKOUT / "Makefile"), (".venv", Path(sys.prefix))):
            if not (project / name).exists():
                (project / name).symlink_to(target)
        return subprocess.run(
            ["make", *goal],
            cwd=project,
            env={**self.process_environment(), "HOMELAB_CACHE": str(cache.root())},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    def lose_state(self) -> None:
        shutil.rmtree(self.directory / "state" / ".pulumi")

    def secret_file(self, name: str) -> Path:
        [file] = (self.directory / "world/kubernetes").glob(f"*/default/Secret/{name}.json")
        return file


def ids(stack: Dev) -> dict[str, str]:
    """The ids of what the state holds of the world."""
    made = ("kubernetes:", "docker:", "cloudflare:")
    return {r["urn"]: r["id"] for r in stack.resources() if r["type"].startswith(made)}


@contextlib.contextmanager
def cut_off(stack: Dev, fault: dict[str, Any], command: str = "up") -> Iterator[None]:
    """An up, or a destroy, whose engine is killed where the fault holds it."""
    stack.set_faults([{"method": "Create", "do": "hang", **fault}])
    taken = stack.directory / "faults"
    with stack.start(command, "--yes", "--skip-preview") as process:
        deadline = time.monotonic() + 120
        while not (taken.is_dir() and any(taken.iterdir())):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    stack.set_faults([])
    yield


@pytest.fixture(scope="module")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> Dev:
    stack = Dev(tmp_path_factory.mktemp("dev"))
    stack.up()
    return stack


@pytest.fixture
def dev(brought_up: Dev, tmp_path: Path) -> Dev:
    return brought_up.copy(tmp_path / "dev")


def test_a_killed_up_is_gone_on_with_and_makes_nothing_twice(brought_up: Dev, tmp_path: Path):
    stack = Dev(tmp_path / "dev")
    tunnel = {"provider": "cloudflare", "urn": "*Cloudflared::dev", "when": "after"}
    with cut_off(stack, tunnel):
        assert "currently locked" in stack.pulumi("refresh", "--yes", check=False).stderr
        recover(stack.engine)
    assert any(line.startswith("lock: ") for line in stack.said)
    assert "exists, taken into the state: ZeroTrustTunnelCloudflared dev" in stack.said
    assert urns(stack) == urns(brought_up)
    assert not stack.export()["deployment"].get("pending_operations")
    [tunnels] = (stack.directory / "world/cloudflare/tunnel").iterdir()
    assert len(list(tunnels.iterdir())) == 1
    assert stack.up("--expect-no-changes").changes == {}


def test_a_lock_is_left_alone_unless_its_run_is_dead_on_this_host(dev: Dev):
    dev.locks.mkdir(parents=True, exist_ok=True)
    lock = {"username": "someone", "timestamp": "2026-01-02T03:04:05Z"}
    file = dev.locks / "01234567.json"
    file.write_text(json.dumps({**lock, "hostname": "elsewhere", "pid": 1}))
    with pytest.raises(RecoveryError, match="run this on elsewhere"):
        recover(dev.engine)
    with dev.start("preview") as alive:
        here = {**lock, "hostname": os.uname().nodename, "pid": alive.pid}
        file.write_text(json.dumps(here))
        with pytest.raises(RecoveryError, match="that process is alive on this host"):
            recover(dev.engine)
        alive.kill()
    assert file.exists()


def test_make_recover_clears_the_lock_of_another_host_once_it_is_told_that_its_run_is_dead(
    dev: Dev,
):
    before = ids(dev), dev.world
    tunnels = {"provider": "cloudflare", "method": "Update", "urn": "*Config::dev"}
    dev.settings["tunnels"]["dev"]["routes"][0]["service"] = "http://localhost:81"
    dev.set_config(dev.settings)
    with cut_off(dev, tunnels):
        [lock] = dev.locks.glob("*.json")
        with edited_file(lock) as held:
            held["hostname"] = "elsewhere"
        refused = dev.make("recover", "STACK=dev")
    assert refused.returncode != 0
    assert "run this on elsewhere" in refused.stderr
    assert "run this again with UNLOCK=1" in refused.stderr
    assert lock.exists()
    assert (ids(dev), dev.world) == before

    done = dev.make("recover", "STACK=dev", "UNLOCK=1")
    assert done.returncode == 0, done.stdout + done.stderr
    holder = f"{held['username']}@elsewhere, pid {held['pid']}, since "
    assert f"lock: {holder}" in done.stdout
    assert ": that run is dead, its lock is cleared" in done.stdout
    assert "cut off while updating: ZeroTrustTunnelCloudflaredConfig dev" in done.stdout
    assert "Updating (dev)" in done.stdout
    assert not list(dev.locks.iterdir())
    assert ids(dev) == before[0]
    assert "localhost:81" in "".join(dev.world.values())
    assert not dev.export()["deployment"].get("pending_operations")


def test_make_recover_finishes_a_destroy_that_was_killed(dev: Dev):
    dev.settings["cluster"]["delete"] = "factory"
    dev.settings["tunnels"]["dev"]["delete"] = "dev"
    dev.set_config(dev.settings)
    dev.up()
    tunnel = {"provider": "cloudflare", "method": "Delete", "urn": "*Cloudflared::dev"}
    with cut_off(dev, {**tunnel, "when": "after"}, "destroy"):
        done = dev.make("recover", "STACK=dev", "DESTROY=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cut off while deleting: ZeroTrustTunnelCloudflared dev" in done.stdout
    assert ": that run is dead, its lock is cleared" in done.stdout
    assert "Destroying (dev)" in done.stdout
    assert "Updating (dev)" not in done.stdout
    assert not list(dev.locks.iterdir())
    assert "resources" not in dev.export()["deployment"]
    # The cluster went with all that was in it; images are no run's to delete.
    assert list((dev.directory / "world/machine/clusters").iterdir()) == []
    left = {file for file in dev.world if not file.startswith("kubernetes/")}
    assert left == {"docker/image/cloudflare/cloudflared:2025.4.0.json"}


def test_a_checkpoint_that_a_kill_cut_off_is_read_again(dev: Dev):
    held = urns(dev)
    checkpoint = dev.directory / "state/.pulumi/stacks/homelab/dev.json"
    checkpoint.with_name("dev.json.attrs").write_text("")
    checkpoint.write_text(checkpoint.read_text()[:1000])
    assert dev.pulumi("stack", "export", check=False).code != 0
    recover(dev.engine)
    assert urns(dev) == held


def test_a_lost_state_is_rebuilt_from_what_exists(dev: Dev):
    before, objects = ids(dev), dev.world
    dev.lose_state()
    adopt(dev.engine, take=True)
    assert any("0 of them differ, 0 do not exist" in line for line in dev.said)
    assert ids(dev) == before
    assert dev.world == objects


def test_others_labels_of_a_namespace_are_told_and_not_fought(dev: Dev):
    dev.lose_state()
    [file] = (dev.directory / "world/kubernetes").rglob("Namespace/apps.json")
    label = "pod-security.kubernetes.io"
    with edited_file(file) as namespace:
        labels = namespace["metadata"]["labels"]
        labels |= {"team": "a", f"{label}/enforce": "baseline", f"{label}/warn": "baseline"}
    objects = dev.world
    with pytest.raises(RecoveryError, match=f"Namespace apps: .*{label}/warn") as refused:
        adopt(dev.engine, take=True)
    # What the stack does not set is no matter of its.
    assert f"{label}/enforce" not in str(refused.value)
    assert "team" not in str(refused.value)
    assert dev.world == objects


def test_a_secret_of_the_incumbent_that_differs_is_named_and_never_overwritten(dev: Dev):
    dev.lose_state()
    with edited_file(dev.secret_file("database")) as database:
        database["data"]["password"] = "YSBwYXNzd29yZCBvZiB0aGUgaW5jdW1iZW50"
        by_hand = {**database, "metadata": {**database["metadata"], "name": "by-hand"}}
    dev.secret_file("database").with_name("by-hand.json").write_text(json.dumps(by_hand))
    objects = dev.world
    with pytest.raises(RecoveryError, match=r"Secret default/database: .*password"):
        adopt(dev.engine, take=True)
    assert "Secret in the cluster that is declared nowhere: default/by-hand" in dev.said
    assert "default/database" not in "".join(line for line in dev.said if "nowhere" in line)
    assert dev.world == objects
    assert PASSWORD not in "".join(dev.said)
    assert dev.pulumi("stack", "export", check=False).code != 0


def test_the_incumbents_whole_world_is_taken_over_and_nothing_of_it_is_made_anew_or_changed(
    tmp_path,
):
    """The cluster with k3d's load balancer, its 21 Secrets, namespaces, ArgoCD and the tailnet's
    keys by a client-side apply, both tunnels managed locally, their records and connectors.
    """
    p510 = Incumbent(tmp_path / "p510")
    said: list[str] = []

    def world() -> dict[str, str]:
        return {
            str(file.relative_to(p510.world)): file.read_text()
            for file in p510.world.rglob("*")
            if file.is_file() and "locks" not in file.parts
        }

    before = world()
    adopt(p510.engine(said))
    assert world() == before
    exist = len(p510.settings["secrets"]["factory"]) - 1 + 2  # one of them is seed-only
    exist += 3  # the tailnet's key and its copies
    exist += 5  # namespaces
    exist += 8  # DNS records
    exist += 1  # the Docker network
    # The StorageClass that keeps data, and of six routes the login in front.
    assert (
        f"{exist} exist, 0 of them differ, 13 do not exist; the host's commands run again" in said
    )
    assert not [line for line in said if line.startswith(("differs", "refused"))]
    assert "Secret in the cluster that is declared nowhere: factory/made-by-hand" in said
    assert len([line for line in said if "declared nowhere" in line]) == 1
    assert any("ArgoCD bootstrap: main moves from nothing to" in line for line in said)

    adopt(p510.engine(said), take=True)
    assert said[-1] == "taken over: a preview finds nothing to change"
    assert planned(p510.preview("--refresh")) == set()
    after = world()
    assert before.keys() <= after.keys()
    labelled = {"Secret": 0, "Namespace": 0}
    for file, text in before.items():
        if text == after[file]:
            continue
        # Nothing but our labels and, as ArgoCD's bootstrap is applied server-side now, the books of
        # the client-side apply.
        old, new = json.loads(text), json.loads(after[file])
        for one in (old, new):
            for of_the_write in ("managedFields", "resourceVersion"):
                del one["metadata"][of_the_write]
            if "/Secret/" not in file:
                one["metadata"].pop("annotations", None)
        labels, had = (one["metadata"].pop("labels", {}) for one in (new, old))
        assert new == old, file
        if labels != had:
            labelled[new["kind"]] += 1
            assert labels.items() > had.items()
            added = labels.keys() - had.keys()
            # A warning refuses no pod.
            assert new["kind"] == "Secret" or added == {
                f"pod-security.kubernetes.io/{mode}{of}"
                for mode in ("audit", "warn")
                for of in ("", "-version")
            }
    assert labelled == {"Secret": exist - 5 - 8 - 1, "Namespace": 5}
    rotated = p510.live("factory", "Secret", "factory-cli-creds")
    assert set(rotated["data"].values()) == {ROTATED}
    tunnels = (p510.world / "cloudflare" / "tunnel").rglob("*.json")
    assert {json.loads(file.read_text())["id"] for file in tunnels} == {*TUNNELS.values()}
    assert f"machine/files{UNIT}" in before
    state = json.dumps(p510.export())
    for value in p510.secrets():
        assert value not in state
        assert base64.b64decode(value).decode() not in state
