"""The life of stack tower: k3s on three machines, one after another.

Its URNs are pinned in urns.tower.txt as p510's are. When a resource comes or goes on purpose:

    .venv/bin/python -m tests.engine.test_tower
"""

import contextlib
import copy
import io
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.ownership import NOT_SEEN
from components.recovery import RecoveryError, run_again
from hostctl import cli
from rehearsal.machine import RehearsalMachine
from rehearsal.providers.kubernetes import cluster_id
from rehearsal.run import CHECKOUT, UNCHANGED, Run
from tests.engine.conftest import (
    StackRehearsal,
    assert_state_is_rebuilt,
    edited_file,
    errors,
    planned,
)
from tests.engine.test_status import status

pytestmark = pytest.mark.engine

URNS = Path(__file__).with_name("urns.tower.txt")
MASTER, WORKER, SECOND = "10.89.97.201", "10.89.97.202", "10.89.97.203"
NODES = ("k3s-master", "k3s-worker-1", "k3s-worker-2")
NEXT = "v1.34.1+k3s1"


class Tower(StackRehearsal):
    """A rehearsal of tower whose settings and machines can be changed."""

    name = "tower"

    def __init__(self, directory: Path, *, three_servers: bool = False) -> None:
        super().__init__(directory)
        if three_servers:
            make_three_servers(self.settings["cluster"])
            self.set_config(self.settings)

    @contextlib.contextmanager
    def edited(self) -> Iterator[dict[str, Any]]:
        """The settings of the cluster, to be changed within."""
        with super().edited() as settings:
            yield settings["cluster"]

    @property
    def cluster_file(self) -> Path:
        """The make-believe cluster with its members."""
        return self.world / "k3s" / "tower.json"

    @property
    def members(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.cluster_file.read_text())["members"]

    @property
    def objects(self) -> Path:
        """What lives in the cluster: <namespace>/<Kind.group>/<name>.json."""
        ca = json.loads(self.cluster_file.read_text())["ca"]
        return self.world / "kubernetes" / cluster_id(ca)

    def machine(self, address: str) -> RehearsalMachine:
        return RehearsalMachine(self.world / "machines" / address)

    def silence(self, address: str, silent: bool = True) -> None:
        """Whether a machine cannot be reached."""
        down = self.world / "machines" / address / "down"
        down.touch() if silent else down.unlink()

    def lose(self, node: str) -> None:
        """A machine goes dark, and the cluster sees it."""
        address = self.members[node]["address"]
        self.machine(address).run(["systemctl", "stop", "k3s.service"])
        self.silence(address)

    def cordoned(self) -> list[str]:
        nodes = (self.objects / "_cluster" / "Node").glob("*.json")
        return [
            path.stem
            for path in nodes
            if (json.loads(path.read_text()).get("spec") or {}).get("unschedulable")
        ]


def make_three_servers(cluster: dict[str, Any]) -> None:
    """The HA form of docs/tower.md: an odd number of servers and an address that outlives one."""
    for node in cluster["nodes"].values():
        node.update(role="server", interface="eth0")
    cluster["virtualIp"] = {"address": "10.89.97.200", "interface": "eth0"}
    cluster["api"] = {"tlsSan": ["10.89.97.200"]}


def urns(stack: Tower) -> list[str]:
    resources = stack.export()["deployment"]["resources"]
    return sorted(r["urn"] for r in resources if "::default_" not in r["urn"])


def order(run: Run) -> list[str]:
    """The names of what a run changed, in the order in which it began with them."""
    return [step.urn.rpartition("::")[2] for step in run.steps if step.op.value not in UNCHANGED]


@pytest.fixture
def fresh(tmp_path: Path) -> Tower:
    """tower before its first up."""
    return Tower(tmp_path / "tower")


@pytest.fixture(scope="module")
def brought_up(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    """tower after its first up; not to be changed."""
    stack = Tower(tmp_path_factory.mktemp("tower"))
    stack.up()
    return stack


@pytest.fixture
def tower(brought_up: Tower, tmp_path: Path) -> Tower:
    """tower after its first up, to do anything with."""
    return brought_up.copy(tmp_path / "tower")


@pytest.fixture(scope="module")
def with_three_servers(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    """tower with three servers after its first up; not to be changed."""
    stack = Tower(tmp_path_factory.mktemp("three"), three_servers=True)
    stack.up()
    return stack


@pytest.fixture
def three(with_three_servers: Tower, tmp_path: Path) -> Tower:
    """tower with three servers after its first up, to do anything with."""
    return with_three_servers.copy(tmp_path / "three")


def test_the_first_preview_creates_the_pinned_resources_and_touches_nothing(fresh):
    preview = fresh.preview()
    assert set(preview.changes) == {"create"}
    created = {step.urn for step in preview.steps if "::default_" not in step.urn}
    assert created == set(URNS.read_text().split("\n")[:-1])
    assert "up installs k3s v1.33.5+k3s1 on k3s-master, a server" in preview.stdout
    assert "up installs k3s v1.33.5+k3s1 on k3s-worker-1, an agent" in preview.stdout
    assert not fresh.cluster_file.exists()
    assert not fresh.machine(MASTER).exists("/usr/local/bin/k3s")


def test_once_up_nothing_is_left_to_do_and_the_kubeconfig_is_reachable(tower):
    assert urns(tower) == URNS.read_text().splitlines()
    assert planned(tower.up()) == set()
    assert planned(tower.preview("--refresh")) == set()
    roles = {name: one["role"] for name, one in tower.members.items()}
    assert roles == {"k3s-master": "server", "k3s-worker-1": "agent", "k3s-worker-2": "agent"}
    assert tower.outputs(show_secrets=False)["kubeconfig"] == "[secret]"
    outputs = tower.outputs()
    kubeconfig = yaml.safe_load(outputs["kubeconfig"])
    assert kubeconfig["clusters"][0]["cluster"]["server"] == "https://10.89.97.201:6443"
    assert outputs["cluster"]["endpoint"] == "https://10.89.97.201:6443"
    assert outputs["cluster"]["k3sVersion"] == "v1.33.5+k3s1"
    assert outputs["cluster"]["storageClass"] == "longhorn-ssd"
    seen = tower.machine(MASTER).stat("/var/lib/homelab/kubeconfigs/tower")
    assert seen is not None
    assert (seen.mode, seen.owner) == (0o600, "root")


def test_a_lost_state_is_rebuilt_from_what_exists(tower):
    assert_state_is_rebuilt(tower)


def test_status_tells_of_each_node_and_of_one_that_does_not_answer(tower):
    seen = status(tower)
    assert seen.code == 0
    for node in NODES:
        assert seen["host", f"k3s on {node}"]["now"] == "running v1.33.5+k3s1"
        assert seen["cluster", f"node {node}"]["now"] == "Ready v1.33.5+k3s1"
        assert "GiB left" in seen["host", f"{node}:/var/lib/rancher/k3s"]["now"]
    tower.silence(SECOND)
    seen = status(tower)
    assert seen["host", "node k3s-worker-2"]["now"].startswith("does not answer: ssh: ")
    assert seen["host", "k3s on k3s-worker-1"]["verdict"] == "fine"
    assert seen.of("unknown") == {("host", "node k3s-worker-2")}
    tower.silence(SECOND, False)
    tower.machine(WORKER).run(["systemctl", "stop", "k3s-agent.service"])
    seen = status(tower)
    assert seen.code == 1
    assert ("host", "k3s on k3s-worker-1") in seen.of("bad")


def test_status_and_doctor_without_an_api_and_without_the_host(tower):
    assert status(tower, "--doctor").code == 0
    tower.machine(MASTER).run(["systemctl", "stop", "k3s.service"])
    seen = status(tower)
    assert seen.code == 1
    assert seen.of("bad") == {("host", "k3s on k3s-master"), ("cluster", "tower")}
    assert seen["cluster", "tower"]["now"].startswith("does not answer: ")
    tower.silence(MASTER)
    for arguments in ([], ["--doctor"]):
        seen = status(tower, *arguments)
        assert seen.code == 2
        assert ("host", "node k3s-master") in seen.of("unknown")
        assert ("host", "k3s on k3s-worker-2") in seen.of("fine")


def test_backups_run_on_timers_of_the_first_server_and_its_preview_tells_what_is_unproved(tower):
    with StackRehearsal.edited(tower) as settings:
        settings["backups"] = {
            "items": {"cluster": {"kind": "datastore"}},
            "targets": {"nas": {"kind": "directory", "path": "/mnt/nas", "password": "made-up-1"}},
        }
    made = {"create Units tower", "create Command units", "create Command nas.password"}
    assert planned(tower.up()) == made
    preview = tower.preview()
    assert planned(preview) == set()
    assert "the copy of cluster at nas was verified never, allowed are 10 days" in preview.stdout
    timer = tower.machine(MASTER).read("/etc/systemd/system/homelab-tower-verify.timer")
    assert b"OnCalendar=weekly" in timer
    seen = status(tower)
    assert seen["host", "homelab-tower-backup.timer"]["verdict"] == "fine"
    assert seen["backups", "cluster"]["now"] == "none yet"
    restored = {"at": "2026-01-01T00:00:00Z", "taken": "2026-01-01T00:00:00Z"}
    record = tower.machine(MASTER)._file("/var/lib/homelab/clusters/tower.json")
    with edited_file(record) as recorded:
        recorded["verified"] = {"nas": {"cluster": {**restored, "recovery_seconds": 1.5}}}
    tower.up()
    assert tower.outputs()["backups"]["nas"]["cluster"]["recoverySeconds"] == 1.5
    with StackRehearsal.edited(tower) as settings:
        del settings["backups"]
    tower.up()
    assert tower.machine(MASTER).names("/etc/systemd/system") == ["k3s.service"]


def test_watching_runs_on_a_timer_of_the_first_server_and_status_tells_what_it_saw(tower):
    with StackRehearsal.edited(tower) as settings:
        settings["watching"] = {"schedule": "hourly"}
    assert planned(tower.up()) == {"create Units tower", "create Command units"}
    assert planned(tower.preview()) == set()
    machine = tower.machine(MASTER)
    installed = {f"homelab-tower-watch.{kind}" for kind in ("service", "timer")}
    assert installed < set(machine.names("/etc/systemd/system"))
    seen = status(tower)
    assert seen["watching", "report"]["now"] == "none yet"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        # As the timer does.
        assert cli.main(["watch", "run", "tower"], io.StringIO(), machine) == 0
    seen = status(tower)
    for check, detail in (
        ("api", f"it answers at {MASTER}:6443"),
        ("nodes", "all 3 are Ready"),
        ("dns", "a pod resolves registry-1.docker.io"),
    ):
        assert seen["watching", check]["verdict"] == "fine"
        assert seen["watching", check]["now"].endswith(detail)


def test_no_credential_is_in_the_state_in_clear_or_in_any_output_of_a_run(tower):
    token = tower.machine(MASTER).read("/var/lib/rancher/k3s/server/token").decode().strip()
    password = token.rpartition(":")[2]
    with tower.edited() as cluster:
        cluster["version"] = NEXT
    runs = [tower.preview("--diff"), tower.up("--diff")]
    shown = json.dumps(tower.export()) + "".join(run.stdout + run.stderr for run in runs)
    assert len(password) >= 16
    assert password not in shown
    assert json.loads(tower.cluster_file.read_text())["key"] not in shown


def test_an_upgrade_goes_servers_first_one_drained_node_at_a_time(tower):
    with tower.edited() as cluster:
        cluster["version"] = NEXT
    preview = tower.preview()
    told = [text for text in preview.diagnostics if "up drains it, upgrades it to" in text]
    assert [node for node in NODES for text in told if f"node {node} " in text] == list(NODES)
    each = [what for node in NODES for what in (f"drain {node}", node, f"uncordon {node}")]
    assert planned(preview) == {f"update Command {one}" for one in ["snapshot", *each]}
    assert order(tower.up()) == ["snapshot", *each]
    assert {one["version"] for one in tower.members.values()} == {NEXT}
    assert tower.cordoned() == []
    assert planned(tower.preview()) == set()
    assert tower.outputs()["cluster"]["k3sVersion"] == NEXT


@pytest.mark.parametrize("version", ["v1.35.0+k3s1", "v1.32.9+k3s1"])
def test_a_skipped_minor_and_a_way_back_are_refused_before_anything(tower, version):
    with tower.edited() as cluster:
        cluster["version"] = version
    refused = tower.up(check=False)
    assert refused.code != 0
    assert f"{version} is older than what runs, or more than one minor newer" in errors(refused)[0]
    assert {one["version"] for one in tower.members.values()} == {"v1.33.5+k3s1"}


def test_an_upgrade_that_fails_on_a_node_stops_there_and_goes_on_in_the_next_up(tower):
    broken = tower.world / "machines" / WORKER / "k3s-broken.json"
    broken.write_text(json.dumps([NEXT]))
    with tower.edited() as cluster:
        cluster["version"] = NEXT
    failed = tower.up(check=False)
    assert failed.code != 0
    versions = {name: one["version"] for name, one in tower.members.items()}
    assert versions["k3s-master"] == NEXT
    assert versions["k3s-worker-2"] == "v1.33.5+k3s1"
    broken.unlink()
    tower.up()
    assert {one["version"] for one in tower.members.values()} == {NEXT}
    assert tower.cordoned() == []
    assert planned(tower.preview()) == set()


def test_each_edit_touches_the_nodes_that_it_concerns(tower):
    with tower.edited() as cluster:
        cluster["api"] = {"tlsSan": ["tower.example.org"]}
    assert planned(tower.preview()) == {"update Command k3s-master"}
    tower.up()
    assert tower.members["k3s-master"]["names"] == ["tower.example.org"]
    assert planned(tower.preview()) == set()
    # The name is in the certificate now, and can be what clients use.
    with tower.edited() as cluster:
        cluster["api"]["server"] = "tower.example.org"
    assert "update Command kubeconfig" in planned(tower.up())
    server = yaml.safe_load(tower.outputs()["kubeconfig"])["clusters"][0]["cluster"]["server"]
    assert server == "https://tower.example.org:6443"
    assert planned(tower.preview()) == set()


def test_a_node_is_added_without_a_touch_of_the_others(tower):
    with tower.edited() as cluster:
        cluster["nodes"]["k3s-worker-3"] = {"role": "agent", "address": "10.89.97.204"}
    preview = tower.preview()
    assert "up installs k3s v1.33.5+k3s1 on k3s-worker-3, an agent, which joins" in preview.stdout
    new = "k3s-worker-3"
    created = {
        f"create Command {one}"
        for one in (f"drain {new}", new, f"uncordon {new}", f"hostctl {new}")
    } | {f"create Host {new}"}
    assert created <= planned(preview)
    before = tower.members
    tower.up()
    assert tower.members == {**before, new: tower.members[new]}
    assert tower.members[new]["role"] == "agent"
    assert planned(tower.preview()) == set()


def test_a_node_that_is_taken_out_is_drained_forgotten_and_uninstalled(tower):
    with tower.edited() as cluster:
        del cluster["nodes"]["k3s-worker-1"]
    preview = tower.preview()
    assert "delete Command k3s-worker-1" in planned(preview)
    assert not any(one.startswith("delete") and "worker-2" in one for one in planned(preview))
    gone = [name for name in order(tower.up()) if name.endswith("k3s-worker-1")]
    assert gone.index("uncordon k3s-worker-1") < gone.index("k3s-worker-1")
    assert sorted(tower.members) == ["k3s-master", "k3s-worker-2"]
    assert not tower.machine(WORKER).exists("/etc/systemd/system/k3s-agent.service")
    assert planned(tower.preview()) == set()


def test_a_node_that_was_stopped_by_hand_is_told_and_started(tower):
    tower.machine(WORKER).run(["systemctl", "stop", "k3s-agent.service"])
    preview = tower.preview()
    assert any("node k3s-worker-1 is stopped: up starts it" in d for d in preview.diagnostics)
    assert planned(preview) == {"update Command k3s-worker-1"}
    tower.up()
    assert tower.members["k3s-worker-1"]["running"]
    assert planned(tower.preview()) == set()


def test_a_silent_node_is_left_as_it_is_and_the_others_go_on(tower):
    tower.silence(WORKER)
    preview = tower.preview()
    assert planned(preview) == set()
    assert any(
        "k3s-worker-1 does not answer, so it cannot be told" in d for d in preview.diagnostics
    )
    with tower.edited() as cluster:
        cluster["api"] = {"tlsSan": ["tower.example.org"]}
    assert planned(tower.up()) == {"update Command k3s-master"}

    with tower.edited() as cluster:
        cluster["version"] = NEXT
    refused = tower.up(check=False)
    assert any("k3s-worker-1 does not answer, and" in text for text in errors(refused))
    assert tower.members["k3s-master"]["version"] == "v1.33.5+k3s1"
    tower.silence(WORKER, False)
    tower.up()
    assert {one["version"] for one in tower.members.values()} == {NEXT}


def test_nothing_is_done_while_the_first_server_is_silent(tower):
    tower.silence(MASTER)
    # The token's file is on it; with the token in the settings, the nodes themselves are asked.
    refused = tower.up(check=False)
    assert refused.code != 0
    with tower.edited() as cluster:
        cluster["token"] = {"value": "made-up-token-0123456789"}
    preview = tower.preview(check=False)
    [told] = [text for text in preview.diagnostics if "k3s-master does not answer" in text]
    assert NOT_SEEN in told
    refused = tower.up(check=False)
    assert any("first server does not answer" in text for text in errors(refused))


def test_a_new_token_is_rotated_and_every_node_has_it(tower):
    with tower.edited() as cluster:
        cluster["token"] = {"value": "another-made-up-token-9876"}
    preview = tower.preview()
    assert any("k3s-master has another token: up rotates it" in d for d in preview.diagnostics)
    changed = order(tower.up())
    assert changed[0] == "token"
    assert json.loads(tower.cluster_file.read_text())["token"] == "another-made-up-token-9876"
    assert all(one["running"] for one in tower.members.values())
    assert planned(tower.preview()) == set()
    # Who joins now needs the new one.
    with tower.edited() as cluster:
        cluster["nodes"]["k3s-worker-3"] = {"role": "agent", "address": "10.89.97.204"}
    tower.up()
    assert "k3s-worker-3" in tower.members


def test_a_lost_only_server_is_installed_on_its_restored_datastore_and_no_object_is_touched(
    tower, tmp_path
):
    """docs/runbooks/server-lost.md, from its step 4 on."""

    def uids() -> dict[str, str]:
        contents = {one: json.loads(one.read_text()) for one in tower.objects.rglob("*.json")}
        return {
            one.stem: content["metadata"]["uid"]
            for one, content in contents.items()
            if "uid" in (content.get("metadata") or {})
        }

    machine, before, there = tower.machine(MASTER), tower.outputs()["cluster"], uids()
    machine.run(["systemctl", "stop", "k3s.service"])
    server = machine._file("/var/lib/rancher/k3s/server")
    shutil.copytree(server, tmp_path / "copy", symlinks=True)
    for path in ("/var/lib/rancher", "/var/lib/homelab", "/etc/rancher", "/etc/systemd/system"):
        shutil.rmtree(machine._file(path))
    machine.remove("/usr/local/bin/k3s")
    machine.set("k3s.json", {})
    shutil.copytree(tmp_path / "copy", server, symlinks=True)
    # The state knows it as done, so up alone does nothing.
    assert planned(tower.preview()) == set()
    said: list[str] = []
    run_again(tower.engine(said), MASTER)
    assert "runs again: Command hostctl" in said
    assert "runs again: Command k3s-worker-1" not in said
    assert tower.members["k3s-master"]["running"]
    assert planned(tower.up()) == set()
    assert uids() == there != {}
    assert tower.outputs()["cluster"] == before
    assert all(one["running"] for one in tower.members.values())
    assert planned(tower.preview()) == set()
    with pytest.raises(RecoveryError, match=r"nothing that was done on 10\.89\.97\.20\b"):
        run_again(tower.engine(said), "10.89.97.20")


def test_three_servers_join_one_after_another_and_clients_use_the_virtual_ip(three):
    assert planned(three.preview()) == set()
    assert {one["role"] for one in three.members.values()} == {"server"}
    assert json.loads(three.cluster_file.read_text())["datastore"] == "etcd"
    assert three.outputs()["cluster"]["endpoint"] == "https://10.89.97.200:6443"
    for address in (MASTER, WORKER, SECOND):
        machine = three.machine(address)
        assert machine.exists("/var/lib/rancher/k3s/server/manifests/kube-vip.yaml")


def test_status_tells_how_old_each_servers_newest_snapshot_of_etcd_is_with_k3s_stopped_too(three):
    """And where it is, and that a bucket's were not seen."""
    directory = "/var/lib/rancher/k3s/server/db/snapshots"

    def take(address: str, hours: float, name: str = "etcd-snapshot") -> None:
        machine = three.machine(address)
        machine.make_directory(directory, 0o700)
        path = f"{directory}/{name}-{address}-{int(time.time() - hours * 3600)}"
        machine.write_atomic(path, b"{}", 0o600)

    take(MASTER, 3)
    take(MASTER, 15)
    take(WORKER, 25)
    take(WORKER, 1, "before-work")
    take(SECOND, 1, "before-work")
    for stopped in (False, True):
        if stopped:
            for address in (MASTER, WORKER, SECOND):
                three.machine(address).run(["systemctl", "stop", "k3s.service"])
        seen = status(three)
        master, worker, second = (seen["backups", f"etcd of {node}"] for node in NODES)
        assert {one["declared"] for one in (master, worker, second)} == {"0 */12 * * *"}
        assert master["now"].startswith("2, newest 2")
        assert master["now"].endswith(f" UTC, file://{directory}")
        assert (master["verdict"], worker["verdict"]) == ("fine", "bad")
        assert worker["now"].startswith("1, newest 2")
        assert (second["now"], second["verdict"]) == ("none yet", "bad")
        assert "k3s snapshot take" in second["remedy"]
    s3 = {"endpoint": "10.89.97.20:9000", "bucket": "etcd", "accessKey": "a", "secretKey": "b"}
    with three.edited() as cluster:
        cluster["snapshots"] = {"schedule": "0 * * * *", "s3": s3}
    seen = status(three)
    assert seen["backups", "etcd of k3s-master"]["verdict"] == "bad"
    assert ("backups", "etcd of k3s-master in etcd") in seen.of("unknown")


def test_a_lost_server_of_three_stops_nothing_and_returns(three):
    three.lose("k3s-worker-2")
    preview = three.preview()
    assert planned(preview) == set()
    assert any("k3s-worker-2 does not answer" in text for text in preview.diagnostics)
    with three.edited() as cluster:
        cluster["nodes"]["agent"] = {"role": "agent", "address": "10.89.97.206"}
    three.up()
    assert three.members["agent"]["running"]
    three.silence(SECOND, False)
    back = three.preview()
    assert any("k3s-worker-2 is stopped: up starts it" in text for text in back.diagnostics)
    three.up()
    assert three.members["k3s-worker-2"]["running"]
    assert planned(three.preview()) == set()


def run_the_line(stack: Tower, command: str, node: str) -> None:
    """Runs a line of docs/tower.md, "A node does not answer", for this node."""
    page = (CHECKOUT / "docs/tower.md").read_text().partition("## A node does not answer")[2]
    lines = page.partition("\n## ")[0].splitlines()
    (line,) = (one[2:] for one in lines if one.startswith(f"$ {command}"))
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", re.sub(r"(?<=:Command::)[\w-]+", node, line)],
        cwd=stack.directory / "project",
        env={**stack.process_environment(), "PULUMI_STACK": stack.stack},
        check=True,
        capture_output=True,
    )


def forget(stack: Tower, address: str, node: str) -> None:
    """`hostctl k3s forget` on the machine of this address."""
    spec = io.StringIO(json.dumps({"cluster": "tower", "node": node}))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert cli.main(["k3s", "forget"], spec, stack.machine(address)) == 0
    assert json.loads(printed.getvalue())["changed"] == ["deleted"]


def assert_the_lost_one_goes_and_nothing_else(stack: Tower, node: str) -> None:
    """From the first up without it in the settings, which ends at the machine that is gone."""
    objects = {r["urn"] for r in stack.resources() if r["type"].startswith("kubernetes:")}
    refused = errors(stack.up(check=False))
    assert any("k3s remove" in text and "ssh: connect to host" in text for text in refused)
    run_the_line(stack, "pulumi state delete", node)
    assert all(step.startswith("delete ") for step in planned(stack.up()))
    assert planned(stack.preview()) == set()
    left = {r["urn"] for r in stack.resources() if r["type"].startswith("kubernetes:")}
    assert left == objects != set()
    assert sorted(stack.members) == sorted(stack.settings["cluster"]["nodes"])
    assert all(one["running"] for one in stack.members.values())


def test_an_agent_that_is_lost_for_good_is_taken_out_and_no_object_with_it(tower):
    tower.lose("k3s-worker-1")
    forget(tower, MASTER, "k3s-worker-1")
    with tower.edited() as cluster:
        del cluster["nodes"]["k3s-worker-1"]
    assert_the_lost_one_goes_and_nothing_else(tower, "k3s-worker-1")


def test_a_first_server_that_is_lost_for_good_is_taken_out_and_another_is_the_first(three):
    three.lose("k3s-master")
    forget(three, WORKER, "k3s-master")
    with StackRehearsal.edited(three) as settings:
        settings["host"]["address"] = WORKER
        nodes = settings["cluster"]["nodes"]
        del nodes["k3s-master"]
        nodes["k3s-worker-3"] = {"role": "server", "address": "10.89.97.206", "interface": "eth0"}
    assert any("protected" in text for text in errors(three.preview(check=False)))
    run_the_line(three, "pulumi state unprotect", "k3s-master")
    assert_the_lost_one_goes_and_nothing_else(three, "k3s-master")


def test_a_new_machine_in_the_place_of_a_lost_server_joins_the_others(three):
    three.lose("k3s-worker-2")
    forget(three, MASTER, "k3s-worker-2")
    machine = three.machine(SECOND)
    for path in ("/var/lib/rancher", "/var/lib/homelab", "/etc/rancher", "/etc/systemd/system"):
        shutil.rmtree(machine._file(path))
    machine.remove("/usr/local/bin/k3s")
    machine.set("k3s.json", {})
    three.silence(SECOND, False)
    run_again(three.engine([]), SECOND)
    assert three.members["k3s-worker-2"]["running"]
    assert planned(three.up()) == set()
    assert planned(three.preview()) == set()


def test_three_servers_are_upgraded_from_each_other(three):
    with three.edited() as cluster:
        cluster["version"] = NEXT
    changed = order(three.up())
    assert changed[0] == "snapshot"
    assert [name for name in changed if name in NODES] == list(NODES)
    assert {one["version"] for one in three.members.values()} == {NEXT}
    assert three.cordoned() == []
    assert planned(three.preview()) == set()


def test_one_server_becomes_three_only_when_its_conversion_is_confirmed(tower):
    with tower.edited() as cluster:
        for index, address in enumerate(("10.89.97.204", "10.89.97.205"), 2):
            cluster["nodes"][f"server-{index}"] = {"role": "server", "address": address}
    refused = tower.preview(check=False)
    assert any("datastore: declared etcd, live sqlite" in text for text in errors(refused))
    with tower.edited() as cluster:
        cluster["confirm"] = "tower"
    preview = tower.preview()
    assert any(
        "datastore is sqlite, declared etcd: up converts it" in d for d in preview.diagnostics
    )
    tower.up()
    assert json.loads(tower.cluster_file.read_text())["datastore"] == "etcd"
    assert sum(one["role"] == "server" for one in tower.members.values()) == 3
    with tower.edited() as cluster:
        del cluster["confirm"]
    tower.up()
    assert planned(tower.preview()) == set()


def test_secrets_of_the_stack_are_in_the_cluster(tower):
    settings = copy.deepcopy(tower.settings)
    settings["secrets"] = {"apps": {"login": {"files": {"password": "/run/agenix/login"}}}}
    tower.set_config(settings)
    assert "create Secret apps/login" in planned(tower.up())
    assert (tower.objects / "apps" / "Secret" / "login.json").exists()
    assert planned(tower.preview()) == set()


def test_destroy_needs_the_typed_name_and_then_leaves_no_k3s(tower):
    # Its preview is what refuses as a whole, as README.md says.
    refused = tower.pulumi("destroy", "--yes", check=False)
    assert refused.code != 0
    assert "protect" in refused.stdout + refused.stderr
    assert sorted(tower.members) == sorted(NODES)
    with tower.edited() as cluster:
        cluster["delete"] = "tower"
    tower.up()
    longhorn = next(r["urn"] for r in tower.resources() if r["urn"].endswith("Release::longhorn"))
    tower.pulumi("state", "unprotect", "--yes", longhorn)
    tower.destroy()
    assert tower.resources() == []
    for address in (MASTER, WORKER, SECOND):
        machine = tower.machine(address)
        assert not machine.exists("/usr/local/bin/k3s")
        assert not [n for n in machine.names("/etc/systemd/system") if n.startswith("k3s")]


def test_a_destroy_without_its_preview_stops_before_any_node(tower):
    longhorn = next(r["urn"] for r in tower.resources() if r["urn"].endswith("Release::longhorn"))
    tower.pulumi("state", "unprotect", "--yes", longhorn)
    refused = tower.destroy(check=False)
    assert refused.code != 0
    assert "kubeconfig file" in refused.stdout + refused.stderr
    assert [name for name, one in tower.members.items() if one["running"]] == list(NODES)
    for address in (MASTER, WORKER, SECOND):
        assert tower.machine(address).exists("/usr/local/bin/k3s")
    kept = {r["urn"].rpartition("::")[2] for r in tower.resources()}
    assert kept >= {name for node in NODES for name in (node, f"uncordon {node}")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        stack = Tower(Path(directory))
        stack.up()
        URNS.write_text("".join(f"{urn}\n" for urn in urns(stack)))
