"""hostctl backup on a server of k3s, on the make-believe machines: the same items as of k3d, taken
of the machine itself. Targets, with a real restic: tests/cluster/test_k3s.py.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_hostctl_k3s import TOKEN, Tower

STORAGE = "/var/lib/rancher/k3s/storage"
DATA = f"{STORAGE}/pvc-1_default_notes"
BACKUPS = f"{STORAGE}-backups/tower"
SERVER = "/var/lib/rancher/k3s/server"
VOLUME = {"name": "notes", "kind": "volume", "namespace": "default", "claim": "notes"}
DATABASE = {
    "name": "shop",
    "kind": "postgres",
    "namespace": "default",
    "workload": "statefulset/shop-db",
    "database": "shop",
    "user": "shop",
}
STATE = {"name": "state", "kind": "directory", "path": "/var/lib/pulumi"}
DATASTORE = {"name": "cluster", "kind": "datastore"}


@pytest.fixture
def tower(tmp_path: Path) -> Tower:
    """A server and an agent, with a volume on the server and a database."""
    tower = Tower(tmp_path)
    tower.up()
    put(tower, "k3s-master")
    write(tower, f"{DATA}/a", "noted")
    write(tower, "/var/lib/pulumi/stacks", "of the stack")
    database = {"shop": {"content": "rows", "rows": "1/0/0"}}
    tower.master.machine.set("databases.json", {"default/statefulset/shop-db": database})
    return tower


def put(tower: Tower, node: str) -> None:
    api = tower.master.machine.k3s.api(tower.cluster)
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    volume = {
        "hostPath": {"path": DATA},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
    }
    for namespace, kind, name, spec in (
        ("default", "PersistentVolumeClaim", "notes", {"volumeName": "pvc-1"}),
        ("_cluster", "PersistentVolume", "pvc-1", volume),
    ):
        metadata = {"name": name, "namespace": namespace}
        obj = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec}
        api.world.put(f"{api.cluster}/{namespace}/{kind}/{name}", obj)


def write(tower: Tower, path: str, content: str) -> None:
    machine = tower.master.machine
    machine.make_directory(path.rpartition("/")[0], 0o755)
    machine.write_atomic(path, content.encode(), 0o644)


def run(tower: Tower, *items: dict[str, Any], code: int = 0) -> Any:
    tower.master.machine.sleep(1)
    return tower.master("backup run", {"cluster": "tower", "items": items}, code)


def test_all_kinds_of_items_are_taken_beside_the_storage_directory_and_listed(
    tower: Tower,
) -> None:
    taken = run(tower, VOLUME, DATABASE, STATE, DATASTORE)["items"]
    assert {name: one["file"].rpartition("/")[0] for name, one in taken.items()} == {
        name: f"{BACKUPS}/{name}" for name in ("notes", "shop", "state", "cluster")
    }
    assert tower.master.machine.read(taken["shop"]["file"]) == b"PGDMP rows END"
    listed = tower.master("backup list", {"name": "tower"})
    assert {name: one[0]["file"] for name, one in listed["items"].items()} == {
        name: one["file"] for name, one in taken.items()
    }
    calls = [call for call in tower.master.calls if "docker" in call]
    assert calls == []


def test_the_datastore_comes_back_with_the_token_into_a_directory_that_never_saw_it(
    tower: Tower,
) -> None:
    run(tower, DATASTORE)
    spec = {"cluster": "tower", "items": [DATASTORE], "item": "cluster", "into": "/mnt/new"}
    assert tower.master("backup restore", spec)["restored"] == "/mnt/new"
    read = tower.master.machine.read
    assert read("/mnt/new/db/state.db") == read(f"{SERVER}/db/state.db")
    assert read("/mnt/new/token") == read(f"{SERVER}/token")
    assert TOKEN not in tower.master.said + tower.master.out


def test_a_volume_comes_back_where_it_was(tower: Tower) -> None:
    run(tower, VOLUME)
    tower.master.machine.remove(f"{DATA}/a")
    spec = {"cluster": "tower", "items": [VOLUME], "item": "notes", "confirm": "tower"}
    assert tower.master("backup restore", spec)["restored"] == DATA
    assert tower.master.machine.read(f"{DATA}/a") == b"noted"


def test_a_volume_on_another_node_is_an_error_that_says_where_it_is(tower: Tower) -> None:
    put(tower, "k3s-worker-1")
    error = run(tower, VOLUME, STATE, code=3)
    assert "its data is on node k3s-worker-1" in error["cause"]
    assert tower.master.machine.names(f"{BACKUPS}/state")


def test_the_datastore_of_etcd_is_left_to_its_snapshots(tower: Tower) -> None:
    tower.master.up(tower.server(datastore="etcd", confirm="tower"))
    error = run(tower, DATASTORE, code=3)
    assert "its datastore is etcd" in error["cause"]
    assert "directory" in error["remedy"]


@pytest.mark.parametrize("verb", ["stop", "agent"])
def test_without_a_server_that_runs_here_nothing_is_taken(tower: Tower, verb: str) -> None:
    where = tower.worker if verb == "agent" else tower.master
    if verb == "stop":
        tower.master("k3s stop", {"cluster": "tower", "node": "k3s-master"})
    error = where("backup run", {"cluster": "tower", "items": [STATE]}, 3)
    assert "homelab:host" in error["remedy"]


def test_the_timers_are_installed_and_at_boot_only_what_a_power_cut_left_is_ended(
    tower: Tower,
) -> None:
    write(tower, "/var/lib/homelab/hostctl", "")
    spec = {
        "cluster": "tower",
        "hostctl": "/var/lib/homelab/hostctl",
        "init": "systemd",
        "storage_dir": None,
        "backup": "daily",
        "verify": "weekly",
        "items": [STATE],
        "targets": [{"name": "nas", "kind": "directory", "repository": "/mnt/nas"}],
    }
    installed = tower.master("units install", spec)
    names = [f"homelab-tower-{job}.{kind}" for job in ("backup", "verify")
             for kind in ("service", "timer")]  # fmt: skip
    names.append("homelab-tower.service")
    assert installed["units"] == names
    text = tower.master.text("/etc/systemd/system/homelab-tower.service")
    assert "After=k3s.service" in text
    assert re.findall("Exec.*", text) == ["ExecStart=/var/lib/homelab/hostctl backup recover tower"]
    text = tower.master.text("/etc/systemd/system/homelab-tower-backup.service")
    assert "After=homelab-tower.service" in text
    seen = tower.master("units status", spec)
    assert {name: one["installed"] for name, one in seen["units"].items()} == dict.fromkeys(
        names, "current"
    )
    assert seen["notes"] == [
        "the copy of state at nas was verified never, allowed are 10 days: hostctl backup verify "
        "tower"
    ]
    assert set(tower.master("units remove", {"cluster": "tower"})["removed"]) == set(names)
