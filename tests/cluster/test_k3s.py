"""k3s on machines of its own, over the real OpenSSH: what `hostctl k3s` does to three servers and
an agent, killed with kill -9 before every change that it makes, and run again.

The stack's own Connection carries hostctl and its specs. The machines are namespaces, their systemd
and their k3s stand-ins; API servers, etcd, SSH and the download are real.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from components import host as host_module
from components import settings
from components.cluster.k3s import node_spec
from components.host import Connection, Unreachable
from hostctl.k3s_node import k3s_token_digest
from tests.cluster.machines import Lan, Machine, network, shipped

pytestmark = pytest.mark.cluster

VERSION, NEXT = "v1.33.5+k3s1", "v1.34.1+k3s1"
TOKEN = "made-up-token-of-the-tower"
SERVERS = ["server-1", "server-2", "server-3"]
AGENT = "agent-1"
KILLS = "/run/homelab-kills"

# While the file is there, hostctl is killed before each change to the machine that it was not
# killed before yet, and once while a tool that takes long is at work.
_KILLED = f'''
def _dies(step, after=0.0):
    step = re.sub(r"=/proc/\\d+/", "=/proc/*/", step)
    step = re.sub(r"[0-9]{{4}}[-0-9TZ:.]{{6,}}|[0-9a-f]{{12,}}|hostctl-\\w+|\\d{{9,}}", "*", step)
    try:
        with open("{KILLS}", "r+") as file:
            if step + "\\n" in file.readlines():
                return
            file.write(step + "\\n")
    except FileNotFoundError:
        return
    threading.Timer(after, os.kill, (os.getpid(), 9)).start()
    if not after:
        time.sleep(60)


def _dying(name, step_of):
    change = getattr(Machine, name)

    def changed(self, *words, **options):
        step = step_of(*words)
        if step:
            _dies(f"{{name}} {{step}}")
        if step and re.search(r"^tar --create|--cluster-reset|etcd-snapshot save", step):
            _dies(f"during {{step}}", 0.3)
        return change(self, *words, **options)

    setattr(Machine, name, changed)


_LOOKS = re.compile(
    r"systemctl show|journalctl|.* --version$|.*/k3s kubectl \\S+ \\S+ get |"
    r"tar --compare|.*etcd-snapshot ls"
)
_dying("run", lambda argv: None if _LOOKS.match(" ".join(argv)) else " ".join(argv))
_dying("write_atomic", lambda path, content, *_: path + (
    " " + re.sub(r"\\s+", "", content.decode()) if path.endswith(".json") else ""))
_dying("rename", lambda path, to: path)
_dying("publish", lambda written, path: path)
_dying("remove", lambda path: path if os.path.exists(path) else None)
_dying("put", lambda url, *_: url)
'''


class Node:
    """A machine of the cluster and the stack's way to it."""

    def __init__(self, tower: "Tower", name: str, machine: Machine) -> None:
        self.tower, self.name, self.machine = tower, name, machine
        declared = {
            "connection": "ssh",
            "address": machine.address,
            "user": "root",
            "knownHosts": str(tower.lan.root / "known_hosts"),
            "identityFile": str(tower.lan.key),
        }
        self.connection = Connection(settings.Host.model_validate(declared))
        self.killed: list[str] = []

    def install(self) -> None:
        ran = self.tower.lan.shell(self.connection.install_line(), self.connection.program)
        assert ran.returncode == 0, ran.stderr

    def look(self, verb: str, spec: dict[str, Any]) -> dict[str, Any]:
        return self.connection.look(verb.split(), spec)

    def run(self, verb: str, spec: dict[str, Any]) -> dict[str, Any] | None:
        """The result of a verb of the installed hostctl; None when it was killed."""
        ran = self.tower.lan.shell(self.connection.installed(verb.split()), json.dumps(spec))
        assert TOKEN not in ran.stdout + ran.stderr
        if ran.returncode in (-9, 137, 255) and not ran.stdout:
            return None
        try:
            return json.loads(ran.stdout)
        except ValueError:
            raise AssertionError(f"{verb}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}") from None

    def do(self, verb: str, spec: dict[str, Any]) -> dict[str, Any]:
        """The result of a verb that must succeed."""
        result = self.run(verb, spec)
        assert result, verb
        assert result["ok"], result["error"]
        return result

    def refused(self, verb: str, spec: dict[str, Any]) -> str:
        """The cause of a refusal."""
        result = self.run(verb, spec)
        assert result, verb
        assert not result["ok"], result
        return result["error"]["cause"]

    def killed_everywhere(self, verb: str, spec: dict[str, Any]) -> dict[str, Any]:
        """Runs a verb until it is done, killed each time before a change that it was not killed
        before yet; `killed` has them. Returns the result of the run that was left alone."""
        self.machine.write(KILLS, "")
        for _ in range(60):
            if (result := self.run(verb, spec)) is not None:
                break
        else:
            raise AssertionError(self.machine.read(KILLS))
        self.killed = self.machine.read(KILLS).splitlines()
        self.machine.run(["rm", KILLS])
        assert result["ok"], result["error"]
        return result

    def was_killed_before(self, *steps: str) -> None:
        """These were among the changes, in this order."""
        remaining = iter(self.killed)
        for step in steps:
            assert any(re.search(step, one) for one in remaining), (step, self.killed)

    # What is there

    def kubectl(self, *words: str) -> str:
        return self.machine.run(["/usr/local/bin/k3s", "kubectl", *words]).stdout

    def silent(self, name: str) -> None:
        """Waits until the cluster knows that a node is lost."""
        unknown = "--for=jsonpath={.status.conditions[?(@.type=='Ready')].status}=Unknown"
        self.kubectl("wait", unknown, f"node/{name}", "--timeout=90s")

    def members(self) -> list[str]:
        """Names of etcd's members, as this one has them."""
        answer = self.machine.run(["python3", "-c", _MEMBERS]).stdout
        return sorted(one.get("name", "") for one in json.loads(answer)["members"])


_MEMBERS = """
import http.client, ssl
tls = "/var/lib/rancher/k3s/server/tls/etcd/"
trust = ssl.create_default_context(cafile=tls + "server-ca.crt")
trust.check_hostname = False
trust.load_cert_chain(tls + "server-client.crt", tls + "server-client.key")
etcd = http.client.HTTPSConnection("127.0.0.1", 2379, context=trust, timeout=10)
etcd.request("POST", "/v3/cluster/member/list", "{}")
print(etcd.getresponse().read().decode())
"""


class Tower:
    """The cluster as its stack declares it, and what `pulumi up` does to it."""

    def __init__(self, lan: Lan, names: Sequence[str]) -> None:
        self.lan = lan
        self.version = VERSION
        self.identity = ""
        self.nodes = {
            name: Node(self, name, lan.machine(number)) for number, name in enumerate(names, 1)
        }

    @property
    def first(self) -> Node:
        return self.nodes[SERVERS[0]]

    def spec(self, name: str) -> dict[str, Any]:
        """A node's, as the stack makes it of its settings; the release comes from the LAN."""
        nodes = {
            one: {"role": "agent" if one == AGENT else "server", "address": node.machine.address}
            for one, node in self.nodes.items()
        }
        declared = settings.K3sCluster.model_validate(
            {
                "kind": "k3s",
                "name": "tower",
                "version": self.version,
                "nodes": nodes,
                "token": {"value": TOKEN},
                "disable": ["coredns"],
                "readySeconds": 300,
            }
        )
        spec = copy.deepcopy(node_spec(declared, name))
        spec["config"] |= {"flannel-iface": "eth0"}
        if spec["role"] == "server":
            spec["config"]["kube-controller-manager-arg"] = ["node-monitor-grace-period=20s"]
        spec["install"] = self.lan.release(self.version)
        return spec

    def inspect(self, name: str) -> dict[str, Any]:
        question = {**self.spec(name), "tokenDigest": k3s_token_digest(TOKEN)}
        return self.nodes[name].look("k3s inspect", question)

    def ensured(self, name: str) -> dict[str, Any]:
        """The spec of `k3s ensure`, with the generation that a preview learns."""
        generation = self.inspect(name)["generation"]
        return {**self.spec(name), "token": TOKEN, "generation": generation}

    def place(self, name: str) -> dict[str, Any]:
        return {
            "cluster": "tower",
            "node": name,
            "version": self.version,
            "drainSeconds": 60,
            "readySeconds": 120,
        }

    def assert_whole(self, nodes: Sequence[str] = (*SERVERS, AGENT)) -> None:
        """Every node is as declared, they are one cluster, and the marker is there."""
        for name in nodes:
            seen = self.inspect(name)
            assert (seen["node"]["state"], seen["differences"]) == ("running", []), name
            if name != AGENT:
                assert seen["node"]["identity"] == self.identity
                assert self.nodes[name].kubectl("get", "configmap", "marker", "-o", "name")
                assert self.nodes[name].members() == sorted(set(nodes) - {AGENT})
        listed = json.loads(self.first.kubectl("get", "nodes", "--output=json"))["items"]
        assert sorted(one["metadata"]["name"] for one in listed) == sorted(nodes)
        versions = {one["status"]["nodeInfo"]["kubeletVersion"] for one in listed}
        assert versions == {self.version}

    def mark(self, name: str) -> None:
        self.first.kubectl("create", "configmap", name)


@contextmanager
def machines(directory: Path, names: Sequence[str], more: str = "") -> Iterator[Tower]:
    """A machine for each of these nodes, with hostctl and `more` in it, and no k3s yet."""
    hostctl = shipped(more)
    with network(directory) as lan, pytest.MonkeyPatch.context() as patch:

        def run(command: str, stdin: str, **_: Any) -> Any:
            # What the invoke command:local:run does.
            return lan.shell(command, stdin)

        patch.setattr(host_module.local, "run", run)
        patch.setattr(host_module.program, "packed", lambda: hostctl)
        tower = Tower(lan, names)
        for node in tower.nodes.values():
            node.install()
        yield tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tower]:
    """A cluster of three servers and an agent, whose first server was killed at every step of its
    installation, and whose last one at every step of joining."""
    with machines(tmp_path_factory.mktemp("lan"), [*SERVERS, AGENT], _KILLED) as tower:
        first = tower.first
        assert tower.inspect(first.name)["node"] is None
        made = first.killed_everywhere("k3s ensure", tower.ensured(first.name))
        tower.identity = made["identity"]
        tower.mark("marker")
        tower.nodes[SERVERS[1]].do("k3s ensure", tower.ensured(SERVERS[1]))
        tower.nodes[SERVERS[2]].killed_everywhere("k3s ensure", tower.ensured(SERVERS[2]))
        tower.nodes[AGENT].do("k3s ensure", tower.ensured(AGENT))
        yield tower


def test_a_cluster_comes_up_although_its_installation_is_killed_at_every_step(tower: Tower) -> None:
    for name in (SERVERS[0], SERVERS[2]):
        tower.nodes[name].was_killed_before(
            r"tower.json .*pending",
            "k3s.new",
            "publish /usr/local/bin/k3s",
            "homelab.token",
            "config.yaml",
            "k3s.service",
            "systemctl daemon-reload",
            "systemctl enable",
            "systemctl restart",
            "k3s-tokens",
            r"tower.json .*generation",
        )
    tower.assert_whole()


def test_snapshots_and_tokens_are_copied_by_restic_and_proved_by_restoring(tower: Tower) -> None:
    first = tower.first
    restic = shutil.which("restic", path=os.pathsep.join(map(str, tower.lan.rig.first)))
    assert restic
    first.machine.run(["ln", "--symbolic", "--force", restic, "/usr/local/bin/restic"])
    key = {"path": "/var/lib/homelab/backups/tower/nas.password", "content": "made-up-password"}
    first.do("files write", {**key, "mode": "0600", "owner": "root", "group": "root"})
    first.do("k3s snapshot take", {"cluster": "tower"})
    snapshots = "/var/lib/rancher/k3s/server/db/snapshots"
    places = {"snapshots": snapshots, "tokens": "/var/lib/homelab/k3s-tokens"}
    spec = {
        "cluster": "tower",
        "items": [
            {"name": name, "kind": "directory", "path": path} for name, path in places.items()
        ],
        "targets": [
            {
                "name": "nas",
                "kind": "directory",
                "repository": "/var/lib/nas",
                "keep_daily": 14,
            }
        ],
    }
    first.do("backup run", spec)
    verified = first.do("backup verify", spec)["verified"]["nas"]
    assert set(verified) == set(places)
    assert all(one["bytes"] for one in verified.values())
    for name, path in places.items():
        into = f"/var/lib/new/{name}"
        first.do("backup restore", {**spec, "item": name, "target": "nas", "into": into})
        first.machine.run(["diff", "--recursive", into, path])
    assert first.machine.run(["ls", "/var/lib/new/snapshots"]).stdout.startswith("on-demand-")


def test_a_member_that_was_lost_comes_back(tower: Tower) -> None:
    lost = tower.nodes[SERVERS[2]]
    lost.machine.lose()
    with pytest.raises(Unreachable, match="did not run"):
        tower.inspect(lost.name)
    tower.mark("meanwhile")
    lost.machine.boot()
    lost.do("k3s ensure", tower.ensured(lost.name))
    assert lost.kubectl("get", "configmap", "meanwhile", "-o", "name")
    tower.assert_whole()


def test_a_first_server_that_lost_its_disk_joins_the_others(tower: Tower) -> None:
    first, helper = tower.first, tower.nodes[SERVERS[1]]
    first.machine.lose()
    first.machine.run(["sh", "-c", "rm -rf /var/lib/rancher /var/lib/homelab /etc/rancher"])
    first.machine.run(["sh", "-c", "rm -rf /usr/local/bin/k3s /etc/systemd/system/*"])
    helper.silent(first.name)
    forgotten = helper.killed_everywhere("k3s forget", tower.place(first.name))
    helper.was_killed_before(f"delete node {first.name}")
    assert forgotten["changed"] == ["deleted"]
    assert helper.members() == SERVERS[1:]
    first.machine.boot()
    first.install()
    assert first.do("k3s ensure", tower.ensured(first.name))["identity"] == tower.identity
    tower.assert_whole()


def test_an_upgrade_that_is_killed_at_every_step_loses_nothing(tower: Tower) -> None:
    tower.version = NEXT
    first, second = tower.first, tower.nodes[SERVERS[1]]
    place = {"cluster": "tower", "name": "before-upgrade", "retention": 2, "version": NEXT}
    first.killed_everywhere("k3s snapshot take", place)
    first.was_killed_before("k3s etcd-snapshot save", "etcd-snapshot prune")
    assert second.killed_everywhere("k3s drain", tower.place(first.name))["changed"] == ["drained"]
    second.was_killed_before(f"drain {first.name}")
    first.killed_everywhere("k3s ensure", tower.ensured(first.name))
    first.was_killed_before(
        "pending", "k3s.new", "publish", "daemon-reload", "restart", "tower.json"
    )
    second.killed_everywhere("k3s uncordon", tower.place(first.name))
    second.was_killed_before(f"uncordon {first.name}")
    for name in (*SERVERS[1:], AGENT):
        first.do("k3s drain", tower.place(name))
        tower.nodes[name].do("k3s ensure", tower.ensured(name))
        first.do("k3s uncordon", tower.place(name))
    tower.assert_whole()
    tower.version = VERSION
    older = {**tower.spec(second.name), "token": TOKEN}
    assert "is older than" in second.refused("k3s ensure", older)
    tower.version = NEXT


def test_a_snapshot_is_restored_although_it_is_killed_at_every_step(tower: Tower) -> None:
    first, others = tower.first, [tower.nodes[name] for name in SERVERS[1:]]
    target = {"cluster": "tower", "target": None}
    taken = first.killed_everywhere("k3s snapshot take", {**target, "name": "nightly"})
    assert taken["name"] in [
        one["name"] for one in first.look("k3s snapshot list", target)["snapshots"]
    ]
    tower.mark("later")
    asked = {**target, "name": taken["name"], "confirm": "tower", "readySeconds": 120}
    assert "other servers run" in first.refused("k3s snapshot restore", asked)
    for node in others:
        node.killed_everywhere("k3s stop", {"cluster": "tower", "node": node.name})
        node.was_killed_before("systemctl stop k3s.service")
    restored = first.killed_everywhere("k3s snapshot restore", asked)
    first.was_killed_before(
        "systemctl stop", "tar --create", "during tar --create", "SHA256SUMS", "restoring",
        "k3s server --cluster-reset", "during .* --cluster-reset", "restart", "tower.json",
    )  # fmt: skip
    assert restored["identity"] == tower.identity
    for node in others:
        node.killed_everywhere(
            "k3s rejoin", {"cluster": "tower", "node": node.name, "confirm": node.name}
        )
        node.was_killed_before("systemctl stop", "server/db", "systemctl restart")
    assert first.kubectl("get", "configmap", "later", "--ignore-not-found", "-o", "name") == ""
    tower.assert_whole()


def test_a_server_is_removed_and_joins_anew_although_it_is_killed_at_every_step(
    tower: Tower,
) -> None:
    helper, gone = tower.first, tower.nodes[SERVERS[2]]
    helper.killed_everywhere("k3s forget", tower.place(gone.name))
    helper.was_killed_before(f"drain {gone.name}", f"delete node {gone.name}")
    # The run was cut off here; systemd starts it again, and it joins again.
    helper.kubectl("wait", "--for=create", f"node/{gone.name}", "--timeout=90s")
    gone.killed_everywhere("k3s remove", {**tower.spec(gone.name), "token": TOKEN})
    gone.was_killed_before(
        "removing", "delete node", "stop k3s", "disable", "k3s/server", "k3s.service", "tower.json"
    )
    assert tower.inspect(gone.name)["node"] is None
    tower.assert_whole([*SERVERS[:2], AGENT])
    gone.do("k3s ensure", tower.ensured(gone.name))
    tower.assert_whole()
