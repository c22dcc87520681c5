"""Every Kubernetes object of every stack is one that a real API server accepts.

p510's are made for real by test_p510.py; here are those of the other stacks, as a preview of each
declares them, in a dry run of server-side apply. What is not asked is listed by name.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml

from components import settings as settings_of
from components.cluster.k3s import _kube_vip
from tests.cluster.host import Host
from tests.engine.conftest import StackRehearsal
from tests.engine.test_metal import Metal
from tests.engine.test_storage import CHAP, TIERS
from tests.engine.test_tower import Tower
from tests.engine.test_truenas import TrueNAS

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

HELM = "Helm renders it, with a chart from a repository that tests do not reach"
CUSTOM = "its definition comes with its maker's chart"
NOT_ASKED = {
    "Release": HELM,
    "IPAddressPool": CUSTOM,
    "L2Advertisement": CUSTOM,
    "RecurringJob": CUSTOM,
    "CephCluster": CUSTOM,
    "CephBlockPool": CUSTOM,
    "CephFilesystem": CUSTOM,
}
"""The kinds that no API server is asked for, and why. Multus' definition is the stack's own."""

MADE_UP = {
    "kubernetes.io/dockerconfigjson": {".dockerconfigjson": "e30="},
    "kubernetes.io/ssh-auth": {"ssh-privatekey": "c2VjcmV0"},
}
"""What the API server demands of a Secret by its type."""


class P620(StackRehearsal):
    """p620 once the cluster is its own."""

    name = "p620"


def take_over(settings: dict[str, Any]) -> None:
    settings["cluster"]["enabled"] = True
    del settings["cluster"]["movedFrom"]


def add_tiers(settings: dict[str, Any]) -> None:
    """The kinds of storage that tower's own file does without."""
    storage = settings["storage"]
    storage["classes"] |= {
        "nas-block": TIERS["classes"]["nas-block"],
        "ceph-ssd": {"kind": "ceph-block"},
        "ceph-shared": {"kind": "ceph-filesystem"},
    }
    storage["ceph"] = {
        "nodes": {
            node: ["/dev/disk/by-id/wwn-0x5000c500a1b2c3d4"]
            for node in settings["cluster"]["nodes"]
        }
    }
    settings["secrets"] = {"media": {"nas-chap": CHAP}}


STACKS: dict[type[StackRehearsal], Callable[[dict[str, Any]], None]] = {
    Metal: lambda settings: None,
    P620: take_over,
    Tower: add_tiers,
    TrueNAS: lambda settings: None,
}


def declared(stack: StackRehearsal) -> Iterator[dict[str, Any]]:
    """The Kubernetes objects that a first preview would create, releases of charts too."""
    for step in stack.preview().steps:
        package, _, kind = step.type.partition(":")
        if package != "kubernetes" or not step.new:
            continue
        inputs = step.new.inputs or {}
        group, kind = kind.rsplit(":", 1)
        if kind == "Release":
            yield {"kind": kind, "metadata": {"name": inputs["chart"]}}
            continue
        one = {"apiVersion": group.removeprefix("core/"), "kind": kind, **inputs}
        if kind == "Secret":
            # No preview shows one, and test_p510.py makes those of p510, which are p620's too.
            one = {key: value for key, value in one.items() if key not in ("data", "stringData")}
            one["data"] = MADE_UP.get(one.get("type", ""), {})
        yield one


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """All that each stack declares."""

    def objects(kind: type[StackRehearsal]) -> tuple[str, list[dict[str, Any]]]:
        stack = kind(tmp_path_factory.mktemp(kind.name))
        with StackRehearsal.edited(stack) as settings:
            STACKS[kind](settings)
        made = list(declared(stack))
        if kind is Tower:
            # Of three servers with a virtual IP; k3s itself applies these.
            made += _kube_vip(settings_of.VirtualIp(address="10.89.97.200", interface="eth0"))
        return kind.name, made

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(objects, STACKS))


def test_a_real_api_server_accepts_every_object_of_every_stack(
    host: Host, spec: dict[str, Any], network: str, stacks: dict[str, list[dict[str, Any]]]
) -> None:
    def refused(objects: list[dict[str, Any]], *options: str) -> str:
        """What a real API server says against the objects."""
        argv = ["apply", "--server-side", "--force-conflicts", "--filename=-", *options]
        command = ["docker", "exec", "-i", "k3d-factory-server-0", "kubectl", *argv]
        return host.engine.run(command, input=yaml.safe_dump_all(objects), check=False).stderr

    everything = [one for objects in stacks.values() for one in objects]
    assert {one["kind"] for one in everything} >= NOT_ASKED.keys()
    assert len(everything) > 60

    host.done("k3d", "ensure", spec=spec)
    # k3s's own, whose parameters are another class's.
    host.kubectl("delete", "storageclass", "local-path")
    first = [one for one in everything if one["kind"] in ("CustomResourceDefinition", "Namespace")]
    assert refused(first) == ""
    host.kubectl("wait", "customresourcedefinition", "--all", "--for=condition=Established")

    for name, objects in stacks.items():
        asked = [one for one in objects if one["kind"] not in NOT_ASKED]
        assert refused(asked, "--dry-run=server") == "", name
    # It does refuse: a field that no schema has.
    wrong = json.loads(json.dumps(next(o for o in everything if o["kind"] == "StorageClass")))
    wrong["provisoner"] = wrong["provisioner"]
    assert "provisoner" in refused([wrong], "--dry-run=server")
