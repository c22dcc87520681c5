"""hostctl's k3s verbs on several servers: etcd, its conversion, snapshots, the token."""

import shutil
from typing import Any

import pytest

from tests.unit.test_hostctl_k3s import (
    MASTER,
    TOKEN,
    VERSION,
    Killed,
    Node,
    Tower,
    install,
    mode,
)

DATABASE = "/var/lib/rancher/k3s/server/db"
NEW_TOKEN = "another-token-of-the-tower"


class HighlyAvailable(Tower):
    """Three servers with etcd."""

    def __init__(self, root: Any) -> None:
        super().__init__(root)
        self.second = self.node("10.89.97.204", "k3s-server-2")
        self.third = self.node("10.89.97.205", "k3s-server-3")

    def first(self, **changes: Any) -> dict[str, Any]:
        others = ["https://10.89.97.204:6443", "https://10.89.97.205:6443"]
        return self.server(**{"datastore": "etcd", "rejoin": others, **changes})

    def up(self) -> None:
        self.master.up(self.first())
        self.second.up(self.joining(2))
        self.third.up(self.joining(3))

    def everything(self, **changes: Any) -> list[tuple[Node, dict[str, Any]]]:
        return [
            (self.master, self.first(**changes)),
            (self.second, self.joining(2, **changes)),
            (self.third, self.joining(3, **changes)),
        ]

    def namespace(self, name: str) -> None:
        cluster = self.cluster
        api = self.master.machine.k3s.api(cluster)
        api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}, "test")

    def namespaces(self) -> set[str]:
        api = self.master.machine.k3s.api(self.cluster)
        keys = [key for key, _ in api.world.list(f"{api.cluster}/_cluster")]
        return {key.rpartition("/")[2] for key in keys if "/Namespace/" in key}

    def snapshot(self, **changes: Any) -> Any:
        return self.master("k3s snapshot take", {"cluster": "tower", **changes})

    def restore(self, name: str, code: int = 0, **changes: Any) -> Any:
        spec = {"cluster": "tower", "name": name, "confirm": "tower"}
        return self.master("k3s snapshot restore", {**spec, **changes}, code)


@pytest.fixture
def ha(tmp_path: Any) -> HighlyAvailable:
    made = HighlyAvailable(tmp_path)
    made.up()
    return made


@pytest.fixture
def tower(tmp_path: Any) -> Tower:
    made = Tower(tmp_path)
    made.master.up(made.server())
    return made


def test_three_servers_join_one_cluster_and_a_second_up_changes_nothing(
    ha: HighlyAvailable,
) -> None:
    assert set(ha.cluster["members"]) == {"k3s-master", "k3s-server-2", "k3s-server-3"}
    assert 'server: "https://10.89.97.201:6443"' in ha.second.text("/etc/rancher/k3s/config.yaml")
    assert "cluster-init: true" in ha.master.text("/etc/rancher/k3s/config.yaml")
    for node, spec in ha.everything():
        assert node.differs(spec) == {}
        assert node.up(spec)["changed"] == []


def test_a_server_that_was_lost_returns_with_what_it_had(ha: HighlyAvailable) -> None:
    own = {"cluster": "tower", "node": "k3s-server-3"}
    ha.third("k3s stop", own)
    assert ha.master.inspect(ha.first())["node"]["identity"]
    ha.second("k3s stop", own | {"node": "k3s-server-2"})
    assert ha.master.inspect(ha.first())["node"]["identity"] is None
    assert "majority" in ha.master("k3s ensure", ha.first(), 7)["remedy"]
    ha.second("k3s start", own | {"node": "k3s-server-2"})
    for node, spec in ha.everything():
        node.up(spec)
    assert ha.master.inspect(ha.first())["node"]["identity"]


def test_an_emptied_first_server_joins_the_others_and_makes_no_second_cluster(
    ha: HighlyAvailable,
) -> None:
    before = ha.cluster["ca"]
    ha.master.machine.k3s.stop()
    member = {"cluster": "tower", "node": "k3s-master"}
    assert ha.second("k3s forget", member)["changed"] == ["deleted"]
    ha.master("k3s remove", ha.first())
    ha.master.up(ha.first())
    assert ha.cluster["ca"] == before
    assert len(ha.cluster["members"]) == 3
    assert ha.master.differs(ha.first()) == {}
    assert ha.master.up(ha.first())["changed"] == []


def test_an_upgrade_of_each_server_in_turn_keeps_the_cluster(ha: HighlyAvailable) -> None:
    new = "v1.34.1+k3s1"
    identity = ha.master.inspect(ha.first())["node"]["identity"]
    taken = ha.snapshot(version=new)
    assert taken["changed"] == ["taken"]
    for node, spec in ha.everything(version=new, install=install(new)):
        # Another server drains it, since its own API goes.
        other = ha.second if node is ha.master else ha.master
        member = {"cluster": "tower", "node": spec["node"], "version": new}
        other("k3s drain", member)
        node.up(spec)
        assert other("k3s uncordon", member)["changed"] == ["uncordoned"]
    assert {one["version"] for one in ha.cluster["members"].values()} == {new}
    assert ha.master.inspect(ha.first(version=new))["node"]["identity"] == identity
    assert ha.snapshot(version=new)["changed"] == []


# Conversion


def test_a_datastore_is_fixed_until_its_conversion_is_confirmed(tower: Tower) -> None:
    spec = tower.server(datastore="etcd")
    assert tower.master.differs(spec)["datastore"]["fixed"]
    error = tower.master("k3s ensure", spec, 3)
    assert "confirm: tower" in error["remedy"]
    assert tower.master.machine.exists(f"{DATABASE}/state.db")


def test_sqlite_becomes_etcd_with_a_verified_backup(tower: Tower) -> None:
    identity = tower.master.inspect(tower.server())["node"]["identity"]
    made = tower.master.up(tower.server(datastore="etcd", confirm="tower"))
    assert "datastore" in made["changed"]
    assert made["identity"] == identity
    assert tower.master.differs(tower.server(datastore="etcd")) == {}
    (backup,) = tower.master.machine.names("/var/lib/homelab/k3s-backups")
    assert tower.master.machine.exists(f"/var/lib/homelab/k3s-backups/{backup}/SHA256SUMS")
    assert not tower.master.up(tower.server(datastore="etcd"))["changed"]


def test_a_conversion_goes_back_to_its_backup_when_that_is_confirmed(tower: Tower) -> None:
    tower.master.up(tower.server(datastore="etcd", confirm="tower"))
    assert tower.master.differs(tower.server())["datastore"]["fixed"]
    tower.master("k3s ensure", tower.server(), 3)
    tower.master.up(tower.server(confirm="tower"))
    seen = tower.master.inspect(tower.server())
    assert (seen["node"]["datastore"], seen["differences"]) == ("sqlite", [])


def test_etcd_without_a_backup_of_before_has_no_way_to_sqlite(tmp_path: Any) -> None:
    tower = Tower(tmp_path)
    tower.master.up(tower.server(datastore="etcd"))
    error = tower.master("k3s ensure", tower.server(confirm="tower"), 3)
    assert "no way from etcd" in error["cause"]
    assert tower.cluster["members"]["k3s-master"]["running"]


def test_without_room_for_a_backup_nothing_is_converted(tower: Tower) -> None:
    tower.master.machine.set("free", 1)
    tower.master("k3s ensure", tower.server(datastore="etcd", confirm="tower"), 3)
    assert tower.master.machine.exists(f"{DATABASE}/state.db")
    assert tower.cluster["members"]["k3s-master"]["running"]
    tower.master.machine.set("free", 2**40)
    tower.master.up(tower.server())
    assert tower.master.differs(tower.server()) == {}


def test_a_conversion_that_is_killed_anywhere_is_continued_or_goes_back(tmp_path: Any) -> None:
    for back in (False, True):
        for step in range(80):
            tower = Tower(tmp_path / f"{back}-{step}")
            identity = tower.master.up(tower.server())["identity"]
            wanted = tower.server(datastore="etcd", confirm="tower")
            tower.master.dies_after = step
            try:
                tower.master("k3s ensure", wanted)
            except Killed:
                tower.master.dies_after = None
                then = tower.server(confirm="tower") if back else wanted
                assert tower.master.up(then)["identity"] == identity
                assert tower.master.differs(then) == {}
            else:
                assert step > 15
                break
        else:
            pytest.fail("it never came to its end")


def test_an_etcd_that_does_not_start_is_undone_and_sqlite_serves_again(tower: Tower) -> None:
    identity = tower.master.inspect(tower.server())["node"]["identity"]
    tower.master.machine.set("k3s-broken.json", ["etcd"])
    wanted = tower.server(datastore="etcd", confirm="tower")
    error = tower.master("k3s ensure", wanted, 5)
    assert "failed to start etcd" in error["cause"]
    assert "k3s-master serves its sqlite again" in error["cause"]
    seen = tower.master.inspect(tower.server())
    assert (seen["node"]["state"], seen["node"]["datastore"]) == ("running", "sqlite")
    assert (seen["node"]["identity"], seen["differences"]) == (identity, [])
    assert "cluster-init" not in tower.master.text("/etc/rancher/k3s/config.yaml")
    # The next run tries anew.
    tower.master.machine.set("k3s-broken.json", [])
    assert "datastore" in tower.master.up(wanted)["changed"]
    assert tower.master.differs(wanted) == {}


def test_a_sqlite_that_does_not_start_is_undone_and_etcd_keeps_what_came_after(
    tower: Tower,
) -> None:
    tower.master.up(tower.server(datastore="etcd", confirm="tower"))
    content = f"{DATABASE}/etcd/member/db"
    tower.master.machine.write_atomic(content, tower.master.machine.read(content) + b"more", 0o600)
    tower.master.machine.set("k3s-broken.json", ["sqlite"])
    error = tower.master("k3s ensure", tower.server(confirm="tower"), 5)
    assert "k3s-master serves its etcd again" in error["cause"]
    assert tower.master.machine.read(content).endswith(b"more")
    assert tower.master.differs(tower.server(datastore="etcd")) == {}
    # And the backup of before is still known.
    tower.master.machine.set("k3s-broken.json", [])
    tower.master.up(tower.server(confirm="tower"))
    assert tower.master.differs(tower.server()) == {}


def test_a_conversion_that_was_verified_is_never_undone_by_a_later_failure(tower: Tower) -> None:
    wanted = tower.server(datastore="etcd", confirm="tower")
    tower.master.up(wanted)
    tower.master.machine.set("k3s-broken.json", ["etcd"])
    tower.master("k3s stop", {"cluster": "tower", "node": "k3s-master"})
    assert "undone" not in tower.master("k3s ensure", wanted, 5)["cause"]
    assert tower.master.machine.exists(f"{DATABASE}/etcd/member/db")


def test_a_conversion_and_an_upgrade_are_two_steps(tower: Tower) -> None:
    new = "v1.34.1+k3s1"
    spec = tower.server(datastore="etcd", confirm="tower", version=new, install=install(new))
    assert "convert in the version that runs" in tower.master("k3s ensure", spec, 3)["remedy"]
    assert tower.master.inspect(tower.server())["node"]["state"] == "running"


@pytest.mark.parametrize("to", ["etcd", "sqlite"])
def test_a_way_back_that_is_killed_anywhere_ends_at_what_was_there_before(
    tmp_path: Any, to: str
) -> None:
    made = Tower(tmp_path / "made")
    before, after = made.server(confirm="tower"), made.server(confirm="tower")
    (before if to == "sqlite" else after)["datastore"] = "etcd"
    identity = made.master.up(made.server())["identity"]
    if to == "sqlite":
        made.master.up(before)
    made.master.machine.set("k3s-broken.json", [to])
    for step in range(120):
        shutil.copytree(made.root, tmp_path / str(step))
        tower = Tower(tmp_path / str(step))
        tower.master.dies_after = step
        try:
            tower.master("k3s ensure", after, 5)
        except Killed:
            tower.master.dies_after = None
            # The next run goes on with it, wherever it was cut off.
            assert "was undone" in tower.master("k3s ensure", after, 5)["cause"]
        else:
            assert step > 30
            break
        finally:
            tower.master.dies_after = None
        seen = tower.master.inspect(before)
        assert seen["node"]["state"] == "running"
        assert seen["node"]["datastore"] == before["datastore"]
        assert seen["node"]["identity"] == identity
        assert seen["differences"] == []
    else:
        pytest.fail("it never came to its end")


# Snapshots


def test_a_snapshot_of_sqlite_is_refused_with_the_reason(tower: Tower) -> None:
    for verb in ("take", "list"):
        error = tower.master(f"k3s snapshot {verb}", {"cluster": "tower"}, 3)
        assert "SQLite" in error["cause"]
        assert "datastore etcd" in error["remedy"]


def test_before_an_upgrade_sqlite_is_copied(tower: Tower) -> None:
    taken = tower.master("k3s snapshot take", {"cluster": "tower", "version": "v1.34.1+k3s1"})
    assert taken["changed"] == ["copied"]
    machine = tower.master.machine
    assert machine.read(f"{taken['location']}/state.db") == machine.read(f"{DATABASE}/state.db")
    assert mode(machine, f"{taken['location']}/token") == 0o600
    again = tower.master("k3s snapshot take", {"cluster": "tower", "version": VERSION})
    assert again["changed"] == []


def test_snapshots_are_listed_and_the_oldest_of_a_name_go(ha: HighlyAvailable) -> None:
    names = [ha.snapshot(retention=2)["name"] for _ in range(3)]
    other = ha.snapshot(name="before-work")["name"]
    listed = ha.master("k3s snapshot list", {"cluster": "tower"})["snapshots"]
    assert [one["name"] for one in listed] == [*names[1:], other]
    assert ha.master("k3s snapshot list tower", {})["snapshots"] == listed


def test_snapshots_go_to_a_directory_or_a_bucket(ha: HighlyAvailable) -> None:
    error = ha.master(
        "k3s snapshot take", {"cluster": "tower", "target": {"directory": "/mnt/nfs"}}, 3
    )
    assert "/mnt/nfs" in error["cause"]
    ha.master.machine.make_directory("/mnt/nfs", 0o700)
    there = ha.snapshot(target={"directory": "/mnt/nfs"})
    assert there["location"].startswith("file:///mnt/nfs/")
    assert ha.master("k3s snapshot list tower", {})["snapshots"] == []
    own = ha.first()
    ha.master.up(own | {"config": {**own["config"], "etcd-snapshot-dir": "/mnt/nfs"}})
    (listed,) = ha.master("k3s snapshot list tower", {})["snapshots"]
    assert listed["name"] == there["name"]
    s3 = {
        "endpoint": "10.89.97.20:9000",
        "bucket": "k3s-snapshots",
        "accessKey": "access-canary",
        "secretKey": "secret-canary",
    }
    assert ha.snapshot(target={"s3": s3})["changed"] == ["taken"]
    assert "secret-canary" not in str(ha.master.calls) + ha.master.said + ha.master.out


def test_a_snapshot_is_restored_on_one_server_and_the_others_join_anew(
    ha: HighlyAvailable,
) -> None:
    ha.namespace("before")
    name = ha.snapshot()["name"]
    ha.namespace("after")
    assert "other servers run" in ha.restore(name, 3)["cause"]
    for number, node in ((2, ha.second), (3, ha.third)):
        node("k3s stop", {"cluster": "tower", "node": f"k3s-server-{number}"})
    assert "not confirmed" in ha.restore(name, 3, confirm=None)["cause"]
    restored = ha.restore(name)
    assert restored["restored"] == name
    assert "before" in ha.namespaces()
    assert "after" not in ha.namespaces()
    for number, node in ((2, ha.second), (3, ha.third)):
        remedy = node("k3s rejoin tower", {}, 3)["remedy"]
        assert remedy == f"hostctl k3s rejoin tower --confirm k3s-server-{number}"
        assert node(remedy.removeprefix("hostctl "), {})["aside"]
    assert len(ha.cluster["members"]) == 3
    for node, spec in ha.everything():
        assert node.differs(spec) == {}


def test_a_snapshot_that_is_not_there_is_refused(tmp_path: Any) -> None:
    tower = HighlyAvailable(tmp_path)
    tower.master.up(tower.first())
    assert "no snapshot" in tower.restore("on-demand-none-1", 3)["cause"]
    assert tower.cluster["members"]["k3s-master"]["running"]


def test_a_restore_that_is_killed_anywhere_is_finished_by_the_next(tmp_path: Any) -> None:
    for step in range(80):
        tower = HighlyAvailable(tmp_path / str(step))
        tower.master.up(tower.first())
        tower.namespace("before")
        name = tower.snapshot()["name"]
        tower.namespace("after")
        tower.master.dies_after = step
        try:
            tower.restore(name)
        except Killed:
            tower.master.dies_after = None
            tower.restore(name)
            assert "after" not in tower.namespaces()
            assert tower.master.up(tower.first())["identity"]
        else:
            assert step > 15
            break
    else:
        pytest.fail("it never came to its end")


def test_an_up_does_not_start_what_a_cut_off_restore_left(tmp_path: Any) -> None:
    tower = HighlyAvailable(tmp_path)
    tower.master.up(tower.first())
    name = tower.snapshot()["name"]

    def dies(*_: Any) -> Any:
        raise Killed

    reset = tower.master.machine.k3s._reset
    tower.master.machine.k3s._reset = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        tower.restore(name)
    tower.master.machine.k3s._reset = reset  # type: ignore[method-assign]
    assert "restore" in tower.master("k3s ensure", tower.first(), 3)["cause"]
    tower.restore(name)
    assert tower.master.differs(tower.first()) == {}


# Token


def rotated(ha: HighlyAvailable) -> None:
    assert ha.master("k3s token", {"cluster": "tower", "new": NEW_TOKEN})["changed"] == ["rotated"]
    for node, spec in ha.everything(token=NEW_TOKEN):
        node.up(spec)


def test_a_token_is_rotated_and_each_node_started_with_it(ha: HighlyAvailable) -> None:
    rotated(ha)
    assert ha.cluster["token"] == NEW_TOKEN
    for node, spec in ha.everything(token=NEW_TOKEN):
        assert node.differs(spec) == {}
    again = ha.master("k3s token", {"cluster": "tower", "new": NEW_TOKEN})
    assert again["changed"] == []
    for secret in (TOKEN, NEW_TOKEN):
        assert secret not in ha.master.said + ha.master.out + str(ha.master.calls)


def test_another_token_without_a_rotation_is_refused(ha: HighlyAvailable) -> None:
    error = ha.master("k3s ensure", ha.first(token=NEW_TOKEN), 3)
    assert "hostctl k3s token" in error["remedy"]
    assert ha.master.differs(ha.first()) == {}


def test_a_token_of_a_machine_without_k3s_has_nothing_to_rotate(tmp_path: Any) -> None:
    tower = Tower(tmp_path)
    spec = {"cluster": "tower", "new": NEW_TOKEN}
    assert tower.master("k3s token", spec)["changed"] == []


def test_a_snapshot_is_restored_with_the_token_of_its_time(ha: HighlyAvailable) -> None:
    ha.namespace("before")
    name = ha.snapshot()["name"]
    rotated(ha)
    for number, node in ((2, ha.second), (3, ha.third)):
        node("k3s stop", {"cluster": "tower", "node": f"k3s-server-{number}"})
    assert "snapshot's time" in ha.restore(name, 3, token=NEW_TOKEN)["cause"]
    restored = ha.restore(name)
    assert "before" in ha.namespaces()
    # The cluster has the old token again, until it is rotated anew.
    assert restored["tokenDigest"] == ha.master.inspect(ha.first())["node"]["tokenDigest"]
    assert ha.master.differs(ha.first()) == {}
    assert set(ha.master.differs(ha.first(token=NEW_TOKEN))) == {"tokenDigest"}
    ha.master("k3s token", {"cluster": "tower", "new": NEW_TOKEN})
    ha.master.up(ha.first(token=NEW_TOKEN))
    assert ha.master.differs(ha.first(token=NEW_TOKEN)) == {}


def test_the_kept_tokens_are_roots_alone(ha: HighlyAvailable) -> None:
    rotated(ha)
    machine = ha.master.machine
    kept = machine.names("/var/lib/homelab/k3s-tokens")
    assert len(kept) == 2
    for name in kept:
        assert mode(machine, f"/var/lib/homelab/k3s-tokens/{name}") == 0o600
    assert MASTER not in str(kept)


def test_a_server_that_joined_again_after_it_was_forgotten_leaves_before_it_is_removed(
    ha: HighlyAvailable,
) -> None:
    assert ha.master("k3s forget", {"cluster": "tower", "node": "k3s-server-3"})["changed"]
    # The run was cut off here, and systemd has started it again (k3s issue 4023).
    ha.third.machine.run(["systemctl", "restart", "--no-block", "k3s.service"])
    assert "k3s-server-3" in ha.cluster["members"]
    assert ha.third("k3s remove", ha.joining(3))["removed"]
    assert sorted(ha.cluster["members"]) == ["k3s-master", "k3s-server-2"]
    ran = [call for call in ha.third.calls if "delete" in call or "stop" in call]
    assert ("delete" in ran[0], "stop" in ran[1]) == (True, True)


def test_a_server_whose_node_k3s_does_not_hold_yet_stays_in_etcd_for_no_removal(
    ha: HighlyAvailable,
) -> None:
    assert ha.master("k3s forget", {"cluster": "tower", "node": "k3s-server-3"})["changed"]
    machine = ha.third.machine
    machine.set("k3s-holds.json", machine.now() + 5)
    machine.run(["systemctl", "restart", "--no-block", "k3s.service"])
    assert ha.third("k3s remove", ha.joining(3))["removed"]
    assert sorted(ha.cluster["members"]) == ["k3s-master", "k3s-server-2"]
