"""The life of a stack of kind k3s on machines of its own: the engine, SSH, systemd's stand-in, k3s'
stand-in with its real API servers and etcd. From one server with SQLite to three with etcd and to
nothing; each step goes on where the one before it ended.

hostctl's verbs by themselves, killed at each step, are in test_k3s.py.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rehearsal.run import CHECKOUT, UNCHANGED, Rehearsal, Run, Secret
from tests.cluster.machines import Lan, Machine, network, shipped
from tests.cluster.test_k3s import AGENT, NEXT, SERVERS, TOKEN, VERSION
from tests.engine.conftest import errors, planned

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

NEW_TOKEN = "another-token-of-the-tower"
FIRST = SERVERS[0]
DATA = "/var/lib/rancher/k3s"
KEPT = "/var/lib/homelab"

# The stack's program, which ships the hostctl that lies beside it.
_PROGRAM = """
import runpy
from pathlib import Path

from hostctl import program

shipped = Path(__file__).with_name("hostctl").read_text()
program.packed = lambda: shipped
runpy.run_path({main!r}, run_name="__main__")
"""


class RealTower(Rehearsal):
    """The stack tower whose stand-ins act for real, in the network of its machines."""

    def __init__(self, lan: Lan, directory: Path) -> None:
        self.lan = lan
        self.machines: dict[str, Machine] = {}
        for name in (FIRST, AGENT):
            self.machine(name)
        self.machines[FIRST].write("/run/agenix/login", "made up\n", "600")
        self.settings: dict[str, Any] = {
            "host": {
                "connection": "ssh",
                "address": self.machines[FIRST].address,
                "user": "root",
                "knownHosts": str(lan.root / "known_hosts"),
                "identityFile": str(lan.key),
            },
            "cluster": {
                "kind": "k3s",
                "name": "tower",
                "version": VERSION,
                **lan.release(VERSION),
                "nodes": {
                    FIRST: self.node(FIRST),
                    AGENT: {**self.node(AGENT), "role": "agent"},
                },
                "token": {"value": Secret(TOKEN)},
                "disable": ["coredns"],
                "drainSeconds": 60,
            },
            "namespaces": {"apps": {"quota": {"pods": "5"}}},
            "secrets": {"apps": {"login": {"files": {"password": "/run/agenix/login"}}}},
        }
        program = directory / "program"
        program.mkdir()
        shutil.copy(CHECKOUT / "Pulumi.yaml", program)
        (program / "hostctl").write_text(shipped())
        (program / "__main__.py").write_text(_PROGRAM.format(main=str(CHECKOUT / "__main__.py")))
        super().__init__(
            directory / "rehearsal",
            "tower",
            self.settings,
            program=program,
            really=True,
            within=lan.enter(),
        )

    def machine(self, name: str) -> None:
        """One more machine, for the node of this name."""
        self.machines[name] = self.lan.machine(len(self.machines) + 1)

    def node(self, name: str) -> dict[str, Any]:
        """The settings of a server on its machine."""
        return {"role": "server", "address": self.machines[name].address, "interface": "eth0"}

    @contextmanager
    def edited(self) -> Iterator[dict[str, Any]]:
        """The settings of the cluster, to be changed within."""
        settings = copy.deepcopy(self.settings)
        yield settings["cluster"]
        self.set_config(settings)
        self.settings = settings

    # What is there

    def kubectl(self, *words: str) -> str:
        return self.machines[FIRST].run(["/usr/local/bin/k3s", "kubectl", *words]).stdout.strip()

    def marks(self) -> list[str]:
        """The names of what `mark` has made."""
        listed = self.kubectl("get", "configmap", "--namespace=apps", "-l=mark", "--output=name")
        return [line.partition("/")[2] for line in listed.splitlines()]

    def mark(self, name: str) -> None:
        """Puts something into the cluster, behind Pulumi's back."""
        self.kubectl("create", "configmap", name, "--namespace=apps")
        self.kubectl("label", "configmap", name, "--namespace=apps", "mark=")

    def nodes(self) -> dict[str, str]:
        """What each Node runs, of those that are Ready and take pods."""
        listed = json.loads(self.kubectl("get", "nodes", "--output=json"))["items"]
        return {
            one["metadata"]["name"]: one["status"]["nodeInfo"]["kubeletVersion"]
            for one in listed
            if not one["spec"].get("unschedulable")
            and any(
                c["type"] == "Ready" and c["status"] == "True" for c in one["status"]["conditions"]
            )
        }

    def result(self, command: str) -> dict[str, Any]:
        """What hostctl answered when this Command was last run, if it is no secret."""
        [one] = [r for r in self.resources() if r["urn"].endswith(f"Command::{command}")]
        return json.loads(one["outputs"]["stdout"])

    def record(self) -> dict[str, Any]:
        """What the first server's machine knows of its k3s."""
        return json.loads(self.machines[FIRST].read(f"{KEPT}/clusters/tower.json"))["k3s"]

    def assert_settled(self) -> None:
        """Nothing is left to do, by the state and by what is really there."""
        assert planned(self.preview("--refresh")) == set()


def order(run: Run) -> list[str]:
    """The names of what a run changed, in the order in which it began with them."""
    return [step.urn.rpartition("::")[2] for step in run.steps if step.op.value not in UNCHANGED]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealTower]:
    with network(tmp_path_factory.mktemp("lan")) as lan:
        yield RealTower(lan, tmp_path_factory.mktemp("tower"))


def a_server_and_an_agent_come_up_and_nothing_is_left_to_do(tower: RealTower) -> None:
    tower.up()
    assert tower.nodes() == {FIRST: VERSION, AGENT: VERSION}
    objects = tower.kubectl("get", "resourcequota,secret", "--namespace=apps", "--output=name")
    assert {"resourcequota/homelab", "secret/login"} <= set(objects.split())
    tower.mark("before")
    tower.assert_settled()


def sqlite_becomes_etcd_when_that_is_confirmed_and_goes_back(tower: RealTower) -> None:
    first = tower.machines[FIRST]
    with tower.edited() as cluster:
        cluster["datastore"] = "etcd"
    refused = tower.preview(check=False)
    assert any("datastore: declared etcd, live sqlite" in text for text in errors(refused))

    # An etcd that does not come up: what was there before serves again, without anybody's help.
    first.write("/etc/rancher/k3s/opening.json", json.dumps({"stalls": 1, "certificateDays": 365}))
    with tower.edited() as cluster:
        cluster.update(confirm="tower", readySeconds=30)
    failed = tower.up(check=False)
    told = "datastore is sqlite, declared etcd: up converts it, after a backup"
    assert any(told in text for text in failed.diagnostics)
    assert "the conversion to etcd failed and was undone" in failed.stdout
    first.run(["rm", "/etc/rancher/k3s/opening.json"])
    assert tower.marks() == ["before"]
    assert first.run(["ls", f"{DATA}/server/db"]).stdout.split()[0] == "state.db"

    with tower.edited() as cluster:
        del cluster["readySeconds"]
    tower.up()
    assert first.run(["ls", f"{DATA}/server/db/etcd"]).stdout.split() == ["member"]
    assert tower.marks() == ["before"]
    backup = tower.record()["conversion"]["backup"]
    first.run(["sh", "-ec", 'cd "$1"; sha256sum --check SHA256SUMS', "sh", backup])

    # The way back on purpose leads to the backup, and loses what came after.
    tower.mark("after")
    with tower.edited() as cluster:
        cluster["datastore"] = "sqlite"
    tower.up()
    assert tower.marks() == ["before"]
    assert tower.nodes() == {FIRST: VERSION, AGENT: VERSION}
    tower.assert_settled()


def one_server_becomes_three(tower: RealTower) -> None:
    for name in SERVERS[1:]:
        tower.machine(name)
    with tower.edited() as cluster:
        cluster["datastore"] = "etcd"
        cluster["nodes"] |= {name: tower.node(name) for name in SERVERS[1:]}
    tower.up()
    assert tower.nodes() == dict.fromkeys([*SERVERS, AGENT], VERSION)
    assert tower.marks() == ["before"]


def a_new_token_is_rotated_into_every_node_and_replaces_none(tower: RealTower) -> None:
    first = tower.machines[FIRST]
    asked = json.dumps({"cluster": "tower", "name": "sealed"})
    first.run([f"{KEPT}/hostctl", "k3s", "snapshot", "take"], input=asked)
    with tower.edited() as cluster:
        del cluster["confirm"]
        cluster["token"] = {"value": Secret(NEW_TOKEN)}
    everyone = [*SERVERS, AGENT]
    expected = {f"update Command {name}" for name in ("token", *everyone)}
    # No more than this: nothing was left to do.
    preview = tower.preview("--refresh", "--diff")
    assert planned(preview) == expected
    up = tower.up()
    assert planned(up) == expected
    assert order(up) == ["token", *everyone]
    for token in (TOKEN, NEW_TOKEN):
        assert all(token not in run.stdout + run.stderr for run in (preview, up))
    for name in everyone:
        held = tower.machines[name].read("/etc/rancher/k3s/homelab.token").strip()
        assert held.rpartition(":")[2] == NEW_TOKEN, name
    kept = first.run(["sh", "-c", f"cat {KEPT}/k3s-tokens/*"]).stdout.split()
    assert sorted(kept) == sorted([TOKEN, NEW_TOKEN])
    assert tower.nodes() == dict.fromkeys(everyone, VERSION)


def an_upgrade_goes_through_the_servers_first_one_drained_node_at_a_time(
    tower: RealTower,
) -> None:
    with tower.edited() as cluster:
        cluster.update(version=NEXT, **tower.lan.release(NEXT))
    everyone = [*SERVERS, AGENT]
    each = [what for name in everyone for what in (f"drain {name}", name, f"uncordon {name}")]
    preview = tower.preview("--refresh")
    assert planned(preview) == {f"update Command {name}" for name in ("snapshot", *each)}
    told = [text for text in preview.diagnostics if "up drains it, upgrades it to" in text]
    assert [name for name in everyone for text in told if f"node {name} " in text] == everyone
    up = tower.up()
    assert order(up) == ["snapshot", *each]
    snapshot = tower.result("snapshot")
    assert snapshot["changed"] == ["taken"]
    tower.machines[FIRST].run(["test", "-s", snapshot["location"].removeprefix("file://")])
    for name in everyone:
        assert tower.result(f"drain {name}")["changed"] == ["drained"]
        assert tower.result(f"uncordon {name}")["changed"] == ["uncordoned"]
    assert tower.nodes() == dict.fromkeys(everyone, NEXT)
    assert tower.marks() == ["before"]


def nodes_come_and_go_by_the_settings(tower: RealTower) -> None:
    gone = tower.machines[AGENT]
    with tower.edited() as cluster:
        del cluster["nodes"][AGENT]
    up = tower.up()
    # The servers' records of their peers, then the node, and nothing else.
    deleted = [f"uncordon {AGENT}", AGENT, f"hostctl {AGENT}", f"drain {AGENT}"]
    assert planned(up) == {
        *(f"update Command {name}" for name in SERVERS),
        *(f"delete Command {name}" for name in deleted),
        f"delete Host {AGENT}",
    }
    assert order(up)[:5] == [*SERVERS, *deleted[:2]]
    assert tower.nodes() == dict.fromkeys(SERVERS, NEXT)
    assert_without_k3s(gone)

    # Its machine is a server next, in place of another one: one server joins, one is forgotten.
    tower.machines["server-4"] = gone
    with tower.edited() as cluster:
        del cluster["nodes"]["server-3"]
        cluster["nodes"]["server-4"] = tower.node("server-4")
        cluster["delete"] = "tower"
    tower.up()
    assert tower.nodes() == dict.fromkeys([FIRST, "server-2", "server-4"], NEXT)
    assert_without_k3s(tower.machines["server-3"])
    assert tower.marks() == ["before"]
    tower.assert_settled()


def destroy_leaves_no_k3s(tower: RealTower) -> None:
    tower.destroy()
    assert tower.resources() == []
    for machine in tower.machines.values():
        assert_without_k3s(machine)


def assert_without_k3s(machine: Machine) -> None:
    """Neither program, link, unit, secret nor process; its datastore is set aside."""
    places = ["/usr/local/bin", "/etc/systemd/system", "/etc/rancher"]
    named = ["(", "-path", "*/k3s*", "-o", "-lname", "*/k3s*", ")"]
    assert machine.run(["find", *places, "!", "-type", "d", *named]).stdout == ""
    running = machine.run(["ps", "-A", "-o", "comm="]).stdout.split()
    assert not {"k3s", "k3s-server", "k3s-agent", "kube-apiserver", "etcd", "kwok"} & {*running}


def test_the_stack_of_a_cluster_follows_its_settings_from_one_server_to_none(
    tower: RealTower,
) -> None:
    """One cluster, which each step leaves to the next."""
    a_server_and_an_agent_come_up_and_nothing_is_left_to_do(tower)
    sqlite_becomes_etcd_when_that_is_confirmed_and_goes_back(tower)
    one_server_becomes_three(tower)
    a_new_token_is_rotated_into_every_node_and_replaces_none(tower)
    an_upgrade_goes_through_the_servers_first_one_drained_node_at_a_time(tower)
    nodes_come_and_go_by_the_settings(tower)
    destroy_leaves_no_k3s(tower)
