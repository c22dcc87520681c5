"""A cluster of one k3s server whose machine is lost comes back on a new one from a copy of its
datastore, by the steps of docs/runbooks/server-lost.md. Machines as in test_k3s.py.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostctl import program
from tests.cluster.test_k3s import AGENT, SERVERS, Tower, machines
from tests.unit.test_runbooks import RUNBOOKS, steps

pytestmark = pytest.mark.cluster

SERVER = SERVERS[0]
DATASTORE = "/var/lib/rancher/k3s/server"
PASSWORD = {
    "path": "/var/lib/homelab/backups/tower/nas.password",
    "content": "made-up-password",
    "mode": "0600",
    "owner": "root",
    "group": "root",
}


@pytest.fixture
def tower(tmp_path: Path) -> Iterator[Tower]:
    """One server with SQLite, and an agent."""
    with machines(tmp_path, [SERVER, AGENT]) as tower:
        tower.identity = tower.first.do("k3s ensure", tower.ensured(SERVER))["identity"]
        tower.nodes[AGENT].do("k3s ensure", tower.ensured(AGENT))
        yield tower


def test_a_lost_single_server_comes_back_as_it_was_with_its_agents(tower: Tower) -> None:
    """What each command of the page prints is what the page says."""
    first = tower.first
    restic = shutil.which("restic", path=os.pathsep.join(map(str, tower.lan.rig.first)))
    assert restic
    restored, seen_again = steps("server-lost")
    (spec,) = re.findall(r"```json\n(.*?)```", (RUNBOOKS / "server-lost.md").read_text(), re.S)
    first.machine.run(["ln", "--symbolic", "--force", restic, "/usr/local/bin/restic"])
    first.machine.run(["mkdir", "--parents", "/mnt/nas"])
    tower.mark("marker")
    first.do("files write", PASSWORD)
    first.do("backup run", json.loads(spec))
    tower.mark("later")

    first.machine.lose()
    # But for the disk of the target.
    gone = "/var/lib/rancher /var/lib/homelab /etc/rancher /usr/local/bin/k3s /etc/systemd/system/*"
    first.machine.run(["sh", "-c", f"rm -rf {gone}"])
    first.machine.boot()
    first.machine.write("/usr/local/bin/hostctl", program.text(), "755")
    first.machine.write(PASSWORD["path"], f"{PASSWORD['content']}\n", "600")
    first.machine.write("/root/tower.json", spec)
    assert_prints(tower, *restored)

    # What the next `pulumi up` does.
    first.install()
    assert tower.inspect(SERVER)["node"] is None
    made = first.do("k3s ensure", tower.ensured(SERVER))
    assert made["identity"] == tower.identity
    assert_prints(tower, *seen_again)
    assert first.kubectl("get", "configmap", "marker", "--output=name")
    assert first.kubectl("get", "configmap", "later", "--ignore-not-found", "--output=name") == ""
    for name in (SERVER, AGENT):
        seen = tower.inspect(name)
        assert (seen["node"]["state"], seen["differences"]) == ("running", []), name
    # A datastore in use is written over by nothing.
    again = tower.lan.shell(first.connection.line("sh", "-c", restored[0]))
    assert f"{DATASTORE} is not empty" in again.stdout
    tower.mark("since")


def assert_prints(tower: Tower, command: str, shown: str) -> None:
    ran = tower.lan.shell(tower.first.connection.line("sh", "-c", f"{command} 2>&1"))
    fragments = [one.strip() for line in shown.splitlines() for one in line.split("…")]
    pattern = ".*".join(map(re.escape, filter(None, fragments)))
    assert re.search(pattern, ran.stdout, re.S), (command, ran.stdout, ran.stderr)


def test_watching_sees_the_api_the_nodes_and_the_certificates_and_what_is_lost(
    tower: Tower,
) -> None:
    address = tower.first.machine.address
    # These machines serve no DNS to a pod (test_acceptance.py has nodes that do); one of an image
    # that is no busybox is made and ends well.
    dns = {"name": "kubernetes.default.svc.cluster.local", "image": "example.org/none:1.0.0"}
    watched = {"cluster": "tower", "api": address, "dns": dns}
    seen = tower.first.do("watch run", watched)["checks"]
    assert {key: one["state"] for key, one in seen.items() if not key.startswith("room")} == {
        "api": "passed",
        "dns": "passed",
        "certificate serving": "passed",
        "certificate client": "passed",
        "nodes": "passed",
    }
    assert seen["api"]["detail"] == f"it answers at {address}:6443"
    assert seen["nodes"]["detail"] == "all 2 are Ready"

    # An address that no server has, as a virtual one when its holder is gone.
    elsewhere = tower.first.do("watch run", {**watched, "api": "192.0.2.1"})["checks"]
    failed = {key for key, one in elsewhere.items() if one["state"] == "failed"}
    assert failed == {"api"}
    tower.first.do("k3s stop", {"cluster": "tower", "node": SERVER})
    stopped = tower.first.do("watch run", watched)["checks"]
    assert stopped["api"]["state"] == "failed"
    assert stopped["nodes"]["state"] == "cannot-tell"
