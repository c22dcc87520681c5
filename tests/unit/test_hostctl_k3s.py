"""hostctl's k3s verbs on make-believe machines: install, join, heal, upgrade, remove."""

import base64
import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostctl import cli
from hostctl.k3s_node import k3s_token_digest
from hostctl.machine import Ran
from rehearsal.machine import RehearsalMachine, made_up_certificate

VERSION = "v1.33.5+k3s1"
TOKEN = "made-up-token-of-the-tower"
MASTER, WORKER = "10.89.97.201", "10.89.97.202"
CONFIG = "/etc/rancher/k3s/config.yaml"
UNIT = "/etc/systemd/system/k3s.service"


class Killed(BaseException):
    """Stands for kill -9: no handler of hostctl sees it."""


def install(version: str) -> dict[str, Any]:
    release = version.replace("+", "%2B")
    return {"url": f"https://github.com/k3s-io/k3s/releases/download/{release}/k3s", "sha256": None}


class Node:
    """A make-believe machine of the tower and what hostctl does on it."""

    def __init__(self, root: Path, address: str, name: str) -> None:
        self.machine = RehearsalMachine(root / "world" / "machines" / address)
        self.address, self.name = address, name
        self.calls: list[list[str]] = []
        self.said = self.out = ""
        self._run: Callable[..., Ran] = self.machine.run
        self.machine.run = self._record  # type: ignore[method-assign]
        self.dies_after: int | None = None
        for change in ("write_atomic", "publish", "rename", "remove"):
            setattr(self.machine, change, self._changing(getattr(self.machine, change)))

    def _record(self, argv: Sequence[str], **options: Any) -> Ran:
        self.calls.append(list(argv))
        self._live_on()
        return self._run(argv, **options)

    def _changing(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*words: Any, **options: Any) -> Any:
            self._live_on()
            return change(*words, **options)

        return changed

    def _live_on(self) -> None:
        """A kill comes before a program is run, or a file changed."""
        if self.dies_after is not None:
            if self.dies_after == 0:
                raise Killed
            self.dies_after -= 1

    def __call__(self, verb: str, spec: dict[str, Any], code: int = 0) -> Any:
        self.calls.clear()
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                ended = cli.main(verb.split(), io.StringIO(json.dumps(spec)), self.machine)
        finally:
            self.said, self.out = err.getvalue(), out.getvalue()
        answer = json.loads(self.out)
        assert ended == code, answer
        return answer if code == 0 else answer["error"]

    def inspect(self, spec: dict[str, Any], code: int = 0) -> Any:
        """As the stack does in a preview: without the token."""
        looked = {key: value for key, value in spec.items() if key not in ("token", "secretConfig")}
        secrets = {key: k3s_token_digest(one) for key, one in spec.get("secretConfig", {}).items()}
        looked |= {"tokenDigest": k3s_token_digest(spec["token"]), "secretConfigDigest": secrets}
        return self("k3s inspect", looked, code)

    def up(self, spec: dict[str, Any], code: int = 0) -> Any:
        """What `pulumi up` does: looks, and ensures with the generation that it was told."""
        generation = self.inspect(spec)["generation"]
        return self("k3s ensure", {**spec, "generation": generation}, code)

    def differs(self, spec: dict[str, Any]) -> dict[str, Any]:
        return {one["key"]: one for one in self.inspect(spec)["differences"]}

    def text(self, path: str) -> str:
        return self.machine.read(path).decode()


def mode(machine: RehearsalMachine, path: str) -> int:
    seen = machine.stat(path)
    assert seen
    return seen.mode


class Tower:
    """Servers and agents, as the settings of the stack tower declare them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.master = self.node(MASTER, "k3s-master")
        self.worker = self.node(WORKER, "k3s-worker-1")
        self.peers = ["k3s-master", "k3s-worker-1", "k3s-server-2", "k3s-server-3"]

    def node(self, address: str, name: str) -> Node:
        one = Node(self.root, address, name)
        one.machine.set("addresses.json", {})
        return one

    def server(self, **changes: Any) -> dict[str, Any]:
        spec = {
            "cluster": "tower",
            "node": "k3s-master",
            "role": "server",
            "version": VERSION,
            "datastore": "sqlite",
            "init": True,
            "server": None,
            "token": TOKEN,
            "config": {"node-ip": MASTER, "tls-san": ["tower.example.org"]},
            "install": install(changes.get("version", VERSION)),
            "peers": self.peers,
            "timeouts": {"readySeconds": 60, "drainSeconds": 60},
        }
        return spec | changes

    def agent(self, **changes: Any) -> dict[str, Any]:
        spec = self.server(node="k3s-worker-1", role="agent", datastore=None, init=False)
        spec |= {"server": f"https://{MASTER}:6443", "config": {"node-ip": WORKER}}
        spec["install"] = install(changes.get("version", VERSION))
        return spec | changes

    def joining(self, number: int, **changes: Any) -> dict[str, Any]:
        name, address = f"k3s-server-{number}", f"10.89.97.{202 + number}"
        config = {"node-ip": address, "tls-san": ["tower.example.org"]}
        own = {"node": name, "init": False, "server": f"https://{MASTER}:6443", "config": config}
        return self.server(**{"datastore": "etcd", **own, **changes})

    def up(self) -> None:
        self.master.up(self.server())
        self.worker.up(self.agent())

    @property
    def cluster(self) -> dict[str, Any]:
        cluster = self.master.machine.k3s.world.get("k3s/tower")
        assert cluster is not None
        return cluster


@pytest.fixture
def tower(tmp_path: Path) -> Tower:
    return Tower(tmp_path)


def test_a_machine_without_k3s_has_no_node_and_is_left_as_it_is(tower: Tower) -> None:
    seen = tower.master.inspect(tower.server())
    assert (seen["node"], seen["differences"]) == (None, [])
    assert (seen["generation"], seen["incarnation"]) == (1, 1)
    assert not tower.master.machine.names("/etc/rancher")


def test_a_server_and_an_agent_come_up_and_a_second_up_changes_nothing(tower: Tower) -> None:
    made = tower.master.up(tower.server())
    assert made["identity"]
    assert "started" in made["changed"]
    tower.worker.up(tower.agent())
    assert set(tower.cluster["members"]) == {"k3s-master", "k3s-worker-1"}
    for node, spec in ((tower.master, tower.server()), (tower.worker, tower.agent())):
        seen = node.inspect(spec)
        assert seen["node"]["state"] == "running"
        assert seen["node"]["version"] == VERSION
        assert seen["differences"] == []
        assert seen["generation"] == 1
        assert node.up(spec)["changed"] == []
    assert tower.master.inspect(tower.server())["node"]["identity"] == made["identity"]


def test_the_token_is_in_a_private_file_and_nowhere_else(tower: Tower) -> None:
    tower.up()
    machine = tower.worker.machine
    assert mode(machine, "/etc/rancher/k3s/homelab.token") == 0o600
    assert mode(machine, CONFIG) == 0o600
    assert TOKEN not in tower.worker.text(CONFIG)
    assert TOKEN not in tower.worker.said + tower.worker.out + str(tower.worker.calls)
    record = machine.read("/var/lib/homelab/clusters/tower.json").decode()
    assert TOKEN not in record


def test_what_is_declared_is_in_the_config_file(tower: Tower) -> None:
    policy = {"/etc/rancher/k3s/audit.yaml": "kind: Policy\n"}
    config = {"node-ip": MASTER, "disable": ["servicelb"], "write-kubeconfig-mode": "0600"}
    tower.master.up(tower.server(config=config, files=policy))
    lines = tower.master.text(CONFIG).splitlines()
    assert 'disable: ["servicelb"]' in lines
    assert 'node-name: "k3s-master"' in lines
    assert not any(line.startswith(("server:", "cluster-init:")) for line in lines)
    assert tower.master.text("/etc/rancher/k3s/audit.yaml") == "kind: Policy\n"
    changed = tower.master.up(tower.server(config=config))["changed"]
    assert "/etc/rancher/k3s/audit.yaml" in changed
    assert not tower.master.machine.exists("/etc/rancher/k3s/audit.yaml")


def test_a_manifest_is_applied_by_k3s_itself_without_a_restart(tower: Tower) -> None:
    path = "/var/lib/rancher/k3s/server/manifests/kube-vip.yaml"
    tower.master.up(tower.server(files={path: "kind: DaemonSet\n"}))
    assert tower.master.text(path) == "kind: DaemonSet\n"
    changed = tower.master.up(tower.server(files={path: "kind: List\n"}))["changed"]
    assert changed == [path]


def test_an_interface_that_is_not_there_is_a_difference_that_no_run_heals(tower: Tower) -> None:
    tower.master.machine.make_directory("/sys/class/net/eno1", 0o755)
    spec = tower.server(config={"node-ip": MASTER, "flannel-iface": "eth0"})
    (difference,) = tower.master.inspect(spec)["differences"]
    assert (difference["key"], difference["fixed"]) == ("config.flannel-iface", True)
    assert "eno1" in difference["why"]
    tower.master.up(tower.server())
    assert tower.master.differs(spec)["config.flannel-iface"]["declared"] == "eth0"
    assert "eno1" in str(tower.master("k3s ensure", spec, 3))


def test_a_changed_setting_is_seen_and_the_node_started_anew(tower: Tower) -> None:
    tower.up()
    spec = tower.server(config={"node-ip": MASTER, "disable": ["traefik"]})
    assert set(tower.master.differs(spec)) == {"config.disable", "config.tls-san"}
    assert tower.master.inspect(spec)["generation"] == 2
    assert tower.master.up(spec)["changed"] == [CONFIG, "started"]
    assert tower.master.inspect(spec)["generation"] == 2
    assert tower.master.differs(spec) == {}


def test_a_stopped_node_is_started(tower: Tower) -> None:
    tower.up()
    own = {"cluster": "tower", "node": "k3s-worker-1"}
    assert tower.worker("k3s stop", own)["stopped"]
    assert tower.worker.differs(tower.agent())["state"]["live"] == "stopped"
    assert tower.worker.up(tower.agent())["changed"] == ["started"]
    tower.worker("k3s stop", own)
    assert tower.worker("k3s start", own)["started"]
    assert not tower.worker("k3s start", own)["started"]


def test_by_hand_a_machine_knows_which_node_it_is(tower: Tower) -> None:
    nothing = {"not": "read"}
    refused = tower.worker("k3s start tower", nothing, 2)
    assert refused["cause"] == "this host has no record of a k3s of cluster tower"
    tower.up()
    assert tower.worker("k3s stop tower", nothing)["stopped"]
    assert tower.worker("k3s start tower", nothing)["started"]


def test_a_person_who_types_a_verb_without_a_spec_is_told_what_it_waits_for(
    tower: Tower, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert cli.main(["k3s", "forget"], Terminal(), tower.master.machine) == 2
    assert "until Ctrl-D; `hostctl k3s forget --help` shows one" in capsys.readouterr().err


def test_secrets_of_the_config_are_told_apart_and_not_shown(tower: Tower) -> None:
    one = {"etcd-s3-secret-key": "first-secret"}
    spec = tower.server(datastore="etcd", secretConfig=one)
    tower.master.up(spec)
    assert "first-secret" in tower.master.text(CONFIG)
    assert tower.master.differs(spec) == {}
    other = tower.server(datastore="etcd", secretConfig={"etcd-s3-secret-key": "second-secret"})
    assert set(tower.master.differs(other)) == {"secretConfig.etcd-s3-secret-key"}
    assert "first-secret" not in tower.master.out


def test_systemd_that_does_not_answer_is_no_absence(tower: Tower) -> None:
    tower.up()
    run = tower.master.machine.run

    def silent(argv: Sequence[str], **options: Any) -> Ran:
        if argv[0] == "systemctl":
            return Ran(1, b"", b"Failed to connect to bus")
        return run(argv, **options)

    tower.master.machine.run = silent  # type: ignore[method-assign]
    assert tower.master.inspect(tower.server(), 4)["code"] == "cannot-tell"


@pytest.mark.parametrize("init", ["none", "nixos"])
def test_without_a_systemd_of_its_own_it_is_refused_with_the_way(tower: Tower, init: str) -> None:
    tower.master.machine.set("init.json", init)
    error = tower.master("k3s ensure", tower.server(), 3)
    assert "systemd" in error["cause"] or "NixOS" in error["cause"]
    assert "services.k3s" in error["remedy"]
    assert not tower.master.machine.exists("/usr/local/bin/k3s")


# Preflight


def test_all_that_is_wrong_with_a_machine_comes_at_once_and_nothing_is_made(tower: Tower) -> None:
    machine = tower.master.machine
    machine.set("ports.json", [10250, "8472/udp", 2379])
    machine.set("addresses.json", {MASTER: None})
    machine.set("missing-tools.json", ["iscsiadm"])
    machine.make_directory("/sys/class/net/eno1", 0o755)
    needs = {"modules": ["iscsi_tcp"], "programs": ["iscsiadm"]}
    config = {"node-ip": MASTER, "flannel-iface": "tailscale0"}
    machine.make_directory("/lib/modules/6.12.0", 0o755)
    for kind in ("builtin", "dep"):
        machine.write_atomic(f"/lib/modules/6.12.0/modules.{kind}", b"", 0o644)
    spec = tower.server(datastore="etcd", config=config, requires=needs)
    error = tower.master("k3s ensure", spec, 3)
    for word in ("10250", "8472", "2379", "tailscale0", MASTER, "iscsi_tcp", "iscsiadm"):
        assert word in error["cause"]
    assert "open-iscsi" in error["remedy"]
    assert not machine.exists("/usr/local/bin/k3s")
    assert not machine.exists("/etc/rancher")
    warned = {one["what"] for one in tower.master.inspect(spec)["warnings"]}
    assert any("tailscale0" in one for one in warned)


def test_a_machine_without_the_memory_controller_is_refused(tower: Tower) -> None:
    machine = tower.master.machine
    machine.make_directory("/sys/fs/cgroup", 0o755)
    machine.write_atomic("/sys/fs/cgroup/cgroup.controllers", b"cpuset cpu io pids\n", 0o644)
    assert "memory" in tower.master("k3s ensure", tower.server(), 3)["cause"]


def test_swap_is_a_warning(tower: Tower) -> None:
    machine = tower.master.machine
    machine.make_directory("/proc", 0o755)
    machine.write_atomic("/proc/swaps", b"Filename Type\n/dev/sda2 partition\n", 0o644)
    warned = tower.master.inspect(tower.server())["warnings"]
    assert any("swap is on" in one["what"] for one in warned)
    tower.master.up(tower.server())


BAD = {
    "a datastore of an agent": ("agent", {"datastore": "etcd"}, "datastore"),
    "a first server that joins": ("server", {"server": "https://10.0.0.1:6443"}, "server"),
    "a joining server with SQLite": (
        "server",
        {"init": False, "server": "https://10.0.0.1:6443"},
        "exactly one server",
    ),
    "etcd snapshots with SQLite": (
        "server",
        {"config": {"etcd-snapshot-retention": 3}},
        "no etcd snapshots",
    ),
    "a name twice": ("server", {"peers": ["k3s-master", "k3s-master"]}, "peers"),
    "a name that is no peer": ("server", {"peers": ["other"]}, "peers"),
    "a secret beside the secrets": ("server", {"config": {"vpn-auth": "x"}}, "secretConfig"),
    "a key that has its own": ("server", {"config": {"data-dir": "/x"}}, "data-dir"),
    "a version of k3d's": ("server", {"version": "v1.33.5-k3s1"}, "v1.33.5+k3s1"),
    "a file elsewhere": ("server", {"files": {"/etc/passwd": "x"}}, "/etc/rancher/k3s/"),
    "a short token": ("server", {"token": "short"}, "token"),
    "no token": ("server", {"token": None}, "token: missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_spec_that_cannot_be_is_refused(tower: Tower, case: str) -> None:
    role, changes, said = BAD[case]
    spec = tower.server() if role == "server" else tower.agent()
    error = tower.master("k3s ensure", spec | changes, 2)
    assert said in error["cause"]
    assert "short" not in error["cause"] or case != "a short token"


# Installing


def test_a_binary_that_is_not_the_releases_is_refused(tower: Tower) -> None:
    spec = tower.server(install={**install(VERSION), "sha256": "0" * 64})
    tower.master.machine.set("downloads.json", {spec["install"]["url"]: "1" * 64})
    error = tower.master("k3s ensure", spec, 3)
    assert "1" * 64 in error["cause"]
    assert not tower.master.machine.exists("/usr/local/bin/k3s")
    assert tower.master.inspect(spec)["node"]["state"] == "half"


def test_a_binary_of_another_version_is_refused(tower: Tower) -> None:
    error = tower.master("k3s ensure", tower.server(install=install("v1.33.4+k3s1")), 3)
    assert "v1.33.4+k3s1" in error["cause"]
    assert not tower.master.machine.exists("/usr/local/bin/k3s")


def test_a_download_that_breaks_off_is_continued_by_the_next_run(tower: Tower) -> None:
    url = tower.server()["install"]["url"]
    tower.master.machine.set("downloads.json", {url: None})
    assert "cut off" in tower.master("k3s ensure", tower.server(), 5)["cause"]
    tower.master.machine.set("downloads.json", {})
    assert tower.master.up(tower.server())["version"] == VERSION


def test_kubectl_is_k3ss_own_where_there_is_none(tower: Tower) -> None:
    tower.master.machine.set("missing-tools.json", ["kubectl"])
    assert "kubectl" in tower.master.up(tower.server())["changed"]
    assert "kubectl" not in tower.worker.up(tower.agent())["changed"]


def test_k3ss_own_kubectl_goes_with_it_and_comes_again(tower: Tower) -> None:
    machine = tower.master.machine
    for _ in range(2):
        machine.set("missing-tools.json", ["kubectl"])
        assert "kubectl" in tower.master.up(tower.server())["changed"]
        tower.master("k3s remove", tower.server())
        assert "kubectl" not in machine.names("/usr/local/bin")
    # One that was left behind does not keep another from being made.
    machine.set("missing-tools.json", ["kubectl"])
    machine.run(["ln", "--symbolic", "/usr/local/bin/none", "/usr/local/bin/kubectl"])
    machine.set("missing-tools.json", ["kubectl"])
    assert "kubectl" in tower.master.up(tower.server())["changed"]


def test_an_agent_without_its_server_installs_nothing(tower: Tower) -> None:
    error = tower.worker("k3s ensure", tower.agent(), 4)
    assert MASTER in error["cause"]
    assert not tower.worker.machine.exists("/usr/local/bin/k3s")


def test_a_node_with_a_wrong_token_fails_with_its_log(tower: Tower) -> None:
    tower.master.up(tower.server())
    error = tower.worker("k3s ensure", tower.agent(token="another-token-altogether"), 5)
    assert "not authorized" in error["cause"]
    assert "another-token-altogether" not in str(error)
    assert tower.worker.up(tower.agent())["version"] == VERSION


def test_a_name_that_another_machine_has_is_told(tower: Tower) -> None:
    tower.up()
    twin = tower.node("10.89.97.209", "k3s-worker-1")
    spec = tower.agent(config={"node-ip": "10.89.97.209"})
    assert "duplicate hostname" in twin("k3s ensure", spec, 5)["cause"]


def test_a_run_that_is_killed_anywhere_is_continued_by_the_next(tmp_path: Path) -> None:
    for step in range(80):
        tower = Tower(tmp_path / str(step))
        tower.master.dies_after = step
        try:
            tower.master("k3s ensure", tower.server())
        except Killed:
            pass
        else:
            assert step > 15
            break
        tower.master.dies_after = None
        seen = tower.master.inspect(tower.server())
        assert seen["node"] is None or seen["differences"]
        tower.master.up(tower.server())
        assert tower.master.differs(tower.server()) == {}
        assert list(tower.cluster["members"]) == ["k3s-master"]
    else:
        pytest.fail("it never came to its end")


# Somebody else's k3s

SCRIPT_UNIT = """[Unit]
Description=Lightweight Kubernetes
[Service]
EnvironmentFile=-/etc/default/%N
EnvironmentFile=-/etc/systemd/system/k3s.service.env
ExecStart=/usr/local/bin/k3s \\
    server \\
        '--cluster-init' \\
"""


def by_script(tower: Tower) -> None:
    """Makes the master's k3s one of get.k3s.io."""
    tower.master.up(tower.server())
    machine = tower.master.machine
    machine.write_atomic(UNIT, SCRIPT_UNIT.encode(), 0o644)
    machine.write_atomic(f"{UNIT}.env", b"", 0o600)
    for path in (CONFIG, "/etc/rancher/k3s/homelab.token", "/var/lib/homelab/clusters/tower.json"):
        machine.remove(path)


def test_a_k3s_of_the_install_script_is_recognised_and_left_alone(tower: Tower) -> None:
    by_script(tower)
    seen = tower.master.inspect(tower.server())
    assert seen["node"]["installed"] == "get.k3s.io"
    assert seen["node"]["datastore"] == "sqlite"
    assert any(one["key"] == "installed" and one["fixed"] for one in seen["differences"])
    error = tower.master("k3s ensure", tower.server(), 3)
    assert "somebody else's" in error["cause"]
    assert "confirm" in error["remedy"]
    assert tower.master.text(UNIT) == SCRIPT_UNIT


def test_a_k3s_of_the_install_script_is_taken_over_when_confirmed(tower: Tower) -> None:
    by_script(tower)
    before = tower.cluster["ca"]
    spec = tower.server(confirm="tower")
    assert "adopted" in tower.master.up(spec)["changed"]
    assert tower.cluster["ca"] == before
    assert tower.master.text(f"{UNIT}.before-homelab") == SCRIPT_UNIT
    assert tower.master.differs(tower.server()) == {}


def test_what_comes_before_a_take_over_leaves_it_alone(tower: Tower) -> None:
    by_script(tower)
    member = {"cluster": "tower", "node": "k3s-master", "version": "v1.34.1+k3s1"}
    assert tower.master("k3s drain", member)["changed"] == []
    upgrade = {"cluster": "tower", "version": "v1.34.1+k3s1"}
    assert tower.master("k3s snapshot take", upgrade)["changed"] == []
    token = {"cluster": "tower", "new": "another-token-altogether"}
    assert tower.master("k3s token", token)["changed"] == []


def test_a_k3s_with_another_token_is_not_taken_over(tower: Tower) -> None:
    by_script(tower)
    spec = tower.server(confirm="tower", token="another-token-altogether")
    assert "token" in tower.master("k3s ensure", spec, 3)["cause"]
    assert tower.master.text(UNIT) == SCRIPT_UNIT


def test_another_clusters_node_is_not_touched(tower: Tower) -> None:
    tower.up()
    other = tower.server(cluster="other", confirm="other")
    assert tower.master.differs(other)["node"]["live"] == "tower/k3s-master"
    assert "somebody else's" in tower.master("k3s ensure", other, 3)["cause"]
    for verb in ("stop", "start", "remove"):
        own = {"cluster": "other", "node": "k3s-master"}
        assert tower.master(f"k3s {verb}", own, 3)["code"] == "refused"
    assert tower.cluster["members"]["k3s-master"]["running"]


def test_a_unit_of_unknown_origin_is_never_taken_over(tower: Tower) -> None:
    machine = tower.master.machine
    machine.make_directory("/etc/systemd/system", 0o755)
    machine.write_atomic(UNIT, b"[Service]\nExecStart=/opt/k3s server\n", 0o644)
    error = tower.master("k3s ensure", tower.server(confirm="tower"), 3)
    assert "unknown" in error["cause"]


# Upgrading


def upgraded(tower: Tower, node: Node, spec: dict[str, Any]) -> None:
    """What the stack does of a node whose version changes, in its order."""
    member = {"cluster": "tower", "node": node.name, "version": spec["version"]}
    tower.master("k3s drain", member)
    node.up(spec)
    tower.master("k3s uncordon", member)


def test_an_upgrade_goes_one_minor_version_servers_first(tower: Tower) -> None:
    tower.up()
    new = "v1.34.1+k3s1"
    assert (
        "upgrade the servers first"
        in tower.worker("k3s ensure", tower.agent(version=new), 3)["remedy"]
    )
    upgraded(tower, tower.master, tower.server(version=new))
    assert tower.worker.differs(tower.agent()) == {}
    upgraded(tower, tower.worker, tower.agent(version=new))
    assert {one["version"] for one in tower.cluster["members"].values()} == {new}
    assert (
        tower.master("k3s drain", {"cluster": "tower", "node": "k3s-master", "version": new})[
            "changed"
        ]
        == []
    )


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("v1.33.4+k3s1", "older"),
        ("v1.32.9+k3s1", "older"),
        ("v1.35.0+k3s1", "more than one minor"),
        ("v2.0.0+k3s1", "more than one minor"),
    ],
)
def test_a_downgrade_and_a_leap_are_refused(tower: Tower, version: str, said: str) -> None:
    tower.up()
    error = tower.master("k3s ensure", tower.server(version=version), 3)
    assert said in error["cause"]
    assert tower.cluster["members"]["k3s-master"]["version"] == VERSION


def test_a_version_that_does_not_run_is_told_with_its_log(tower: Tower) -> None:
    tower.up()
    tower.master.machine.set("k3s-broken.json", ["v1.33.6+k3s1"])
    error = tower.master("k3s ensure", tower.server(version="v1.33.6+k3s1"), 5)
    assert "does not run here" in error["cause"]
    tower.master.machine.set("k3s-broken.json", [])
    assert "started" in tower.master.up(tower.server(version="v1.33.6+k3s1"))["changed"]


def test_an_upgrade_that_is_killed_before_the_restart_restarts_in_the_next_run(
    tower: Tower,
) -> None:
    tower.up()
    spec = tower.server(version="v1.33.6+k3s1")

    def dies(unit: str, text: str) -> Any:
        raise Killed

    start = tower.master.machine.k3s.start
    tower.master.machine.k3s.start = dies
    with pytest.raises(Killed):
        tower.master("k3s ensure", spec)
    tower.master.machine.k3s.start = start
    assert tower.master.inspect(spec)["node"]["state"] == "half"
    assert "started" in tower.master.up(spec)["changed"]
    assert tower.cluster["members"]["k3s-master"]["version"] == "v1.33.6+k3s1"


def test_a_drain_that_a_budget_stops_is_bounded_and_says_so(tower: Tower) -> None:
    tower.up()
    tower.master.machine.set("undrainable.json", ["k3s-worker-1"])
    error = tower.master("k3s drain", {"cluster": "tower", "node": "k3s-worker-1"}, 7)
    assert "poddisruptionbudgets" in error["remedy"]


def test_drain_and_uncordon_do_nothing_where_no_k3s_is(tower: Tower) -> None:
    member = {"cluster": "tower", "node": "k3s-worker-1", "version": VERSION}
    for verb in ("drain", "uncordon", "forget"):
        assert tower.master(f"k3s {verb}", member)["changed"] == []
    tower.master.up(tower.server())
    for verb in ("drain", "uncordon", "forget"):
        assert tower.master(f"k3s {verb}", member)["changed"] == []


def test_a_verb_of_a_server_is_refused_on_an_agent(tower: Tower) -> None:
    tower.up()
    error = tower.worker("k3s drain", {"cluster": "tower", "node": "k3s-master"}, 3)
    assert "no server" in error["cause"]


# Removing


def test_a_node_is_taken_out_and_the_machine_joins_anew(tower: Tower) -> None:
    tower.up()
    member = {"cluster": "tower", "node": "k3s-worker-1"}
    assert tower.master("k3s forget", member)["changed"] == ["drained", "deleted"]
    assert tower.worker("k3s remove", tower.agent())["removed"]
    assert list(tower.cluster["members"]) == ["k3s-master"]
    machine = tower.worker.machine
    for path in ("/usr/local/bin/k3s", CONFIG, "/etc/rancher/k3s/homelab.token"):
        assert not machine.exists(path)
    assert not tower.worker("k3s remove", tower.agent())["removed"]
    assert tower.worker.inspect(tower.agent())["node"] is None
    tower.worker.up(tower.agent())
    assert set(tower.cluster["members"]) == {"k3s-master", "k3s-worker-1"}


def test_a_lost_machine_is_forgotten_without_a_drain(tower: Tower) -> None:
    tower.up()
    tower.worker.machine.k3s.stop()
    member = {"cluster": "tower", "node": "k3s-worker-1"}
    assert tower.master("k3s forget", member)["changed"] == ["deleted"]


def test_the_only_server_is_not_forgotten(tower: Tower) -> None:
    tower.up()
    error = tower.master("k3s forget", {"cluster": "tower", "node": "k3s-master"}, 3)
    assert "only server" in error["cause"]


def test_a_removed_servers_datastore_is_kept_aside(tower: Tower) -> None:
    tower.up()
    (aside,) = tower.master("k3s remove", tower.server())["aside"]
    assert tower.master.machine.exists(f"{aside}/db/state.db")
    seen = tower.master.inspect(tower.server())
    assert (seen["node"], seen["incarnation"]) == (None, 2)
    tower.master.up(tower.server())
    assert tower.master.inspect(tower.server())["incarnation"] == 2


def test_a_removal_that_is_killed_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    for step in range(40):
        tower = Tower(tmp_path / str(step))
        tower.up()
        tower.worker.dies_after = step
        try:
            tower.worker("k3s remove", tower.agent())
        except Killed:
            tower.worker.dies_after = None
            tower.worker("k3s remove", tower.agent())
        else:
            assert step > 8
            break
        assert tower.worker.inspect(tower.agent())["node"] is None
        assert not tower.worker.machine.exists("/usr/local/bin/k3s")
    else:
        pytest.fail("it never came to its end")


# Kubeconfig


def test_the_kubeconfig_leads_where_clients_reach_it(tower: Tower) -> None:
    tower.up()
    spec = {"cluster": "tower", "server": "https://tower.example.org:6443"}
    made = tower.master("k3s kubeconfig", spec)
    assert "server: https://tower.example.org:6443" in made["kubeconfig"]
    assert "k3s-tower" in made["kubeconfig"]
    assert made["identity"] == tower.master.inspect(tower.server())["node"]["identity"]
    seen = tower.worker("cluster inspect", {"name": "tower", "kubeconfig": made["kubeconfig"]})
    assert set(seen["nodes"]) == {"k3s-master", "k3s-worker-1"}


def test_an_address_that_the_certificate_does_not_name_is_refused(tower: Tower) -> None:
    tower.up()
    spec = {"cluster": "tower", "server": "https://10.89.97.200:6443"}
    error = tower.master("k3s kubeconfig", spec, 3)
    assert "10.89.97.200" in error["cause"]
    assert "tls-san" in error["remedy"]


def test_the_certificates_age_is_told(tower: Tower) -> None:
    tower.up()
    seen = tower.master.inspect(tower.server())
    assert seen["node"]["certificates"]["expires"].startswith("2120-")
    soon = made_up_certificate("ab" * 32, "20200101000000Z", "20200201000000Z")
    path = "/var/lib/rancher/k3s/server/tls/serving-kube-apiserver.crt"
    tower.master.machine.write_atomic(path, base64.b64decode(soon), 0o644)
    warned = tower.master.inspect(tower.server())["warnings"]
    assert any("certificate" in one["what"] and "ended" in one["what"] for one in warned)
