"""A cluster moves to another host (incident 16), on two make-believe machines. k3s there refuses a
datastore with another token or another node password."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostctl.record import read_record
from rehearsal.apiserver import ApiServer
from tests.unit.test_hostctl import SPEC, Host, Killed

CONNECTOR = {"namespace": "factory", "deployment": "cloudflared-factory"}
STORAGE = "/srv/k3d/storage"
THERE = SPEC | {
    "storage_dir": STORAGE,
    "api": {"bind": "127.0.0.1", "port": 6444},
    "moved_from": "p510",
}


class Pair:
    """p510 with a cluster that serves, and p620 with nothing."""

    def __init__(self, root: Path, of: "Pair | None" = None) -> None:
        """``of`` is copied, as it is now."""
        self.root = root
        if of:
            shutil.copytree(of.root, root, symlinks=True)
            (root / "p620/world/kubernetes").unlink()
        self.old, self.new = Host(root / "p510"), Host(root / "p620")
        self.packed: dict[str, Any] = of.packed if of else {}
        if of:
            (root / "p620/world/kubernetes").symlink_to(root / "p510/world/kubernetes")
            return
        self.new.machine.set("seed", "p620")
        self.old.up()
        self.old.machine.write_atomic(f"{SPEC['storage_dir']}/marker", b"of a volume", 0o600)
        (root / "p620/world/kubernetes").symlink_to(root / "p510/world/kubernetes")
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "factory"}}
        self.api.create(namespace, "pulumi")
        self.api.create(
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": CONNECTOR["deployment"], "namespace": "factory"},
                "spec": {
                    "replicas": 2,
                    "selector": {"matchLabels": {"a": "b"}},
                    "template": {
                        "metadata": {"labels": {"a": "b"}},
                        "spec": {"containers": [{"name": "c", "image": "c:1"}]},
                    },
                },
            },
            "pulumi",
        )

    @property
    def api(self) -> ApiServer:
        return self.old.api

    @property
    def serving(self) -> int:
        """How many connectors the cluster is to have, wherever it runs."""
        metadata = {"name": CONNECTOR["deployment"], "namespace": "factory"}
        found = self.api.get({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata})
        return found["spec"]["replicas"]

    def request(self) -> dict[str, Any]:
        return {
            "name": "factory",
            "nonce": self.packed["nonce"],
            "storage_dir": STORAGE,
            "files": self.packed["files"],
        }

    def freeze(self) -> None:
        self.packed = self.old("move freeze", {"name": "factory", "connectors": [CONNECTOR]})

    def copy(self) -> None:
        received = self.new("move receive", self.request())
        for file in self.packed["files"]:
            source = self.old.machine._file(f"{self.packed['directory']}/{file['name']}")
            shutil.copy(source, self.new.machine._file(received["directory"]))

    def bring(self) -> None:
        """All that goes before the new host's up."""
        self.freeze()
        self.copy()
        self.new("move import", self.request())

    def up(self) -> dict[str, Any]:
        seen = self.new("k3d inspect", THERE)["cluster"]
        facts = {key: seen[key] for key in ("generation", "incarnation")}
        return self.new("k3d ensure", THERE | facts)["cluster"]


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def test_incident_16_a_cluster_moves_with_its_identity_its_volumes_and_its_routes(
    pair: Pair,
) -> None:
    before = pair.old.inspect()
    pair.bring()
    assert pair.serving == 0
    foretold = pair.new("k3d inspect", THERE)["cluster"]
    assert [foretold[key] for key in ("state", "identity", "incarnation")] == [
        "imported",
        before["identity"],
        before["incarnation"],
    ]
    made = pair.up()
    assert (made["identity"], made["storage_dir"]) == (before["identity"], STORAGE)
    assert pair.new.machine.read(f"{STORAGE}/marker") == b"of a volume"
    after = pair.new("k3d inspect", THERE)["cluster"]
    assert (after["state"], after["differences"]) == ("running", [])
    assert after["incarnation"] == before["incarnation"]
    assert pair.new("move verify", {"name": "factory"})["identity"] == before["identity"]
    assert pair.serving == 0
    pair.new("move cutover", {"name": "factory"})
    assert pair.serving == 2


def test_what_is_frozen_starts_by_no_other_verb_than_back(pair: Pair) -> None:
    pair.freeze()
    for verb, spec in (
        ("k3d start", {"name": "factory"}),
        ("k3d ensure", SPEC),
        ("k3d inspect", SPEC),
    ):
        error = pair.old(verb, spec, code=3)
        assert "frozen on this host" in error["cause"]
        assert "hostctl move back factory --confirm factory" in error["remedy"]
        assert pair.old.changed == []


def test_going_back_is_confirmed_and_serves_as_before(pair: Pair) -> None:
    identity = pair.old.inspect()["identity"]
    pair.bring()
    pair.up()
    pair.new("move cutover", {"name": "factory"})
    pair.new.machine.write_atomic(f"{STORAGE}/later", b"written on p620", 0o600)
    error = pair.old("move back", {"name": "factory"}, code=3)
    assert "hostctl move withdraw factory" in error["remedy"]
    kept = pair.new("move withdraw", {"name": "factory"})["kept"]
    assert pair.new.machine.clusters() == []
    assert pair.new.machine.read(f"{kept[0]}/later") == b"written on p620"
    pair.old("move back", {"name": "factory", "confirm": "factory"})
    assert pair.serving == 2
    assert pair.old.inspect()["identity"] == identity
    assert pair.old.inspect()["differences"] == []
    # What is withdrawn stays away, until it is moved once more.
    assert "withdrawn" in pair.new("k3d ensure", THERE, code=3)["cause"]
    assert "withdrawn" in pair.new("move receive", pair.request(), code=3)["cause"]
    pair.bring()
    assert pair.up()["identity"] == identity


def test_a_release_ends_the_way_back_and_keeps_all_data(pair: Pair) -> None:
    pair.bring()
    pair.up()
    pair.new("move cutover", {"name": "factory"})
    assert "not confirmed" in pair.old("move release", {"name": "factory"}, code=3)["cause"]
    pair.old("move release", {"name": "factory", "confirm": "factory"})
    assert pair.old.machine.clusters() == []
    assert pair.old.machine.read(f"{SPEC['storage_dir']}/marker") == b"of a volume"
    assert pair.old("move back", {"name": "factory", "confirm": "factory"}, code=3)
    # What the stack's destroy runs finds nothing left.
    assert pair.old("k3d delete", {"name": "factory"})["deleted"] is False


def test_a_cluster_that_is_awaited_is_never_made_empty(pair: Pair) -> None:
    for verb in ("k3d inspect", "k3d ensure"):
        error = pair.new(verb, THERE, code=3)
        assert "it is to come from p510, and nothing was imported" in error["cause"]
    assert pair.new.machine.clusters() == []


def test_an_import_refuses_what_is_not_as_packed(pair: Pair) -> None:
    pair.freeze()
    pair.copy()
    received = pair.new("move receive", pair.request())
    path = f"{received['directory']}/storage.tar"
    pair.new.machine.write_atomic(path, b"half of it", 0o600)
    error = pair.new("move import", pair.request(), code=3)
    assert "storage.tar" in error["cause"]
    assert "nothing was unpacked" in error["remedy"]
    assert pair.new.machine.is_empty(STORAGE)
    assert pair.new("move receive", pair.request())["have"]["storage.tar"] == 10


def test_a_whole_file_that_is_wrong_is_received_anew(pair: Pair) -> None:
    pair.freeze()
    pair.copy()
    received = pair.new("move receive", pair.request())
    path = f"{received['directory']}/storage.tar"
    size = pair.new.machine.file_bytes(path)
    assert received["have"]["storage.tar"] == size
    pair.new.machine.write_atomic(path, b"x" * size, 0o600)
    assert pair.new("move receive", pair.request())["have"]["storage.tar"] == 0


@pytest.mark.parametrize("path", [STORAGE, f"{STORAGE}-server/server-0"])
def test_an_import_writes_over_nothing(pair: Pair, path: str) -> None:
    pair.freeze()
    pair.copy()
    pair.new.machine.make_directory(path, 0o755)
    pair.new.machine.write_atomic(f"{path}/newer", b"newer", 0o600)
    error = pair.new("move import", pair.request(), code=3)
    assert f"{path} is not empty" in error["cause"]
    assert pair.new.machine.read(f"{path}/newer") == b"newer"


def test_an_import_beside_a_cluster_of_that_name_is_refused(pair: Pair) -> None:
    pair.freeze()
    pair.new.up()
    error = pair.new("move receive", pair.request(), code=3)
    assert "there is a cluster of this name on this host" in error["cause"]


def test_a_stale_cluster_is_not_cut_over_to(pair: Pair) -> None:
    pair.bring()
    error = pair.new("move cutover", {"name": "factory"}, code=3)
    assert "its move to this host is imported" in error["cause"]
    assert pair.serving == 0


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"storage_dir": "/srv/other"}, "storageDir"),
        ({"image": "rancher/k3s:v1.32.3-k3s1"}, "image"),
    ],
)
def test_settings_that_are_not_what_was_imported_are_refused(
    pair: Pair, change: dict[str, Any], word: str
) -> None:
    pair.bring()
    for verb in ("k3d inspect", "k3d ensure"):
        assert word in pair.new(verb, THERE | change, code=3)["cause"]
    assert pair.new.machine.clusters() == []


def test_what_can_be_known_is_refused_before_anything_is_stopped(pair: Pair) -> None:
    pair.old.machine.set("free", 2**20)
    error = pair.old("move freeze", {"name": "factory", "connectors": [CONNECTOR]}, code=3)
    assert "has room for" in error["cause"]
    assert pair.serving == 2
    assert pair.old.inspect()["state"] == "running"


def test_several_nodes_do_not_move(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.up(agents=1)
    assert "several nodes" in host("move freeze", {"name": "factory"}, code=3)["cause"]
    assert host.changed == []


def test_docker_not_answering_is_cannot_tell(pair: Pair) -> None:
    (pair.old.machine.root / "docker-down").touch()
    pair.old("move freeze", {"name": "factory"}, code=4)
    assert read_record(pair.old.machine, "factory").get("move") is None


def test_token_and_password_are_in_no_argument_message_or_record(pair: Pair) -> None:
    node = pair.old.cluster["nodes"][0]
    held = [node["env"][0].partition("=")[2], node["layer"]["/etc/rancher/node/password"]]
    said = []
    pair.freeze()
    said += [pair.old.said, json.dumps(pair.old.calls), json.dumps(pair.packed)]
    pair.copy()
    said.append(json.dumps(pair.new("move import", pair.request())))
    pair.up()
    said += [pair.new.said, json.dumps(pair.new.calls)]
    for host in (pair.old, pair.new):
        said.append(host.machine.read("/var/lib/homelab/clusters/factory.json").decode())
    for secret in held:
        assert all(secret not in one for one in said)
    for path in ("move.json", "node-password"):
        seen = pair.new.machine.stat(f"/var/lib/homelab/clusters/factory/{path}")
        assert seen
        assert seen.mode == 0o600


def killed_at_call(host: Host, number: int, act: Callable[[], object]) -> bool:
    """Runs something and kills hostctl before the host's numbered contact; whether it came so
    far."""
    true_run, true_write = host.machine.run, host.machine.write_atomic
    count = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return true_run(*arguments, **options)

    def written(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            raise Killed
        return true_write(*arguments, **options)

    host.machine.run, host.machine.write_atomic = counted, written  # type: ignore[method-assign]
    try:
        act()
    except Killed:
        return True
    finally:
        host.machine.run = true_run  # type: ignore[method-assign]
        host.machine.write_atomic = true_write  # type: ignore[method-assign]
    return False


def test_a_move_that_is_killed_anywhere_is_finished_by_running_it_again(tmp_path: Path) -> None:
    steps: list[tuple[str, Callable[[Pair], Host], Callable[[Pair], object]]] = [
        ("freeze", lambda pair: pair.old, lambda pair: pair.freeze()),
        ("receive", lambda pair: pair.new, lambda pair: pair.copy()),
        ("import", lambda pair: pair.new, lambda pair: pair.new("move import", pair.request())),
        ("up", lambda pair: pair.new, lambda pair: pair.up()),
        (
            "cutover",
            lambda pair: pair.new,
            lambda pair: pair.new("move cutover", {"name": "factory"}),
        ),
    ]
    kills, before = 0, Pair(tmp_path / "pair")
    identity = before.old.inspect()["identity"]
    for place, (name, host, act) in enumerate(steps):
        number = 1
        while True:
            pair = Pair(tmp_path / f"{name}-{number}", before)
            killed = killed_at_call(host(pair), number, lambda act=act, pair=pair: act(pair))
            for _, _, again in steps[place if killed else place + 1 :]:
                again(pair)
            assert pair.serving == 2, (name, number)
            seen = pair.new("k3d inspect", THERE)["cluster"]
            assert (seen["identity"], seen["differences"]) == (identity, []), (name, number)
            assert pair.new.machine.read(f"{STORAGE}/marker") == b"of a volume"
            assert pair.old.cluster["state"] == "stopped"
            shutil.rmtree(tmp_path / f"{name}-{number}")
            if not killed:
                break
            number += 1
            kills += 1
        act(before)
    assert kills > 40


def test_a_way_back_that_is_killed_anywhere_is_finished_by_running_it_again(
    tmp_path: Path,
) -> None:
    before = Pair(tmp_path / "pair")
    before.bring()
    before.up()
    before.new("move cutover", {"name": "factory"})
    for verb in ("withdraw", "back"):
        number = 1
        while True:
            pair = Pair(tmp_path / f"{verb}-{number}", before)
            host = pair.new if verb == "withdraw" else pair.old
            spec = {"name": "factory", **({"confirm": "factory"} if verb == "back" else {})}
            killed = killed_at_call(
                host, number, lambda host=host, spec=spec, verb=verb: host(f"move {verb}", spec)
            )
            if killed:
                host(f"move {verb}", spec)
            if verb == "withdraw":
                pair.old("move back", {"name": "factory", "confirm": "factory"})
            assert pair.new.machine.clusters() == []
            assert pair.serving == 2
            assert pair.old.inspect()["differences"] == []
            shutil.rmtree(tmp_path / f"{verb}-{number}")
            if not killed:
                break
            number += 1
        before.new("move withdraw", {"name": "factory"})
