"""A new node image without losing the cluster, on real Docker and k3d."""

import contextlib
import json
import time
from collections.abc import Callable

import pytest

from tests.cluster.engine import NODE_IMAGE

pytestmark = pytest.mark.cluster

NEW = "rancher/k3s:v1.32.3-k3s1"
NODE = "k3d-factory-server-0"
DATASTORE = "/mnt/img_pool/k3d/storage-server/server-0"


def build(host, tag: str, *lines: str) -> None:
    version = "RUN printf v1.32.3+k3s1 > /etc/k3s-version"
    host.engine.build(tag, "\n".join([f"FROM {NODE_IMAGE}", version, *lines]) + "\n")


def ours(host, spec) -> None:
    host.done("k3d", "ensure", spec=spec)


def incumbents(host, spec) -> None:
    """As k3d's command line makes it, with the datastore in the node's own volume."""
    engine = host.engine
    engine.run(["mkdir", "-p", "/etc/k3d", spec["storage_dir"]])
    resolvers = "".join(f"nameserver {address}\n" for address in spec["resolvers"])
    engine.run(["tee", "/etc/k3d/resolv.conf"], input=resolvers)
    arguments = ["--disable=traefik", "--disable=servicelb"]
    arguments.append("--resolv-conf=/etc/rancher/k3s/resolv.conf")
    argv = ["k3d", "cluster", "create", "factory", "--image", spec["image"], "--no-lb"]
    argv += ["--network", "k3d-factory", "--api-port", "127.0.0.1:6443"]
    argv += [word for one in arguments for word in ("--k3s-arg", f"{one}@server:0")]
    argv += ["--volume", "/etc/k3d/resolv.conf:/etc/rancher/k3s/resolv.conf@server:0"]
    argv += ["--volume", f"{spec['storage_dir']}:/var/lib/rancher/k3s/storage@server:0"]
    engine.run([*argv, "--kubeconfig-update-default=false"])
    host.done("k3d", "ensure", spec=spec)


@pytest.fixture(params=[ours, incumbents])
def live(request, host, spec, network) -> str:
    """A cluster with a marker in it and one in its storage directory; its identity."""
    request.param(host, spec)
    host.kubectl("create", "configmap", "marker", "--from-literal=a=b")
    host.engine.run(["tee", f"{spec['storage_dir']}/marker"], input="of a volume")
    return host.done("k3d", "identity", spec={"name": "factory"})["identity"]


def definition(host) -> dict:
    """What the node was made with, but for its image and what the swap is for."""
    (facts,) = json.loads(host.engine.docker("inspect", NODE))
    labels = {k: v for k, v in facts["Config"]["Labels"].items() if k != "homelab.swap"}
    binds = [one for one in facts["HostConfig"]["Binds"] if not one.endswith("/k3s/server")]
    networks = facts["NetworkSettings"]["Networks"]
    return {
        "config": {**facts["Config"], "Labels": labels, "Image": "", "Volumes": None},
        "host": {**facts["HostConfig"], "Binds": binds},
        "networks": sorted(networks),
    }


def assert_kept(host, spec, identity: str, image: str) -> None:
    seen = host.done("k3d", "inspect", spec={**spec, "image": image})["cluster"]
    assert (seen["state"], seen["identity"], seen["differences"]) == ("running", identity, [])
    assert host.kubectl("get", "configmap", "marker", "--output=jsonpath={.data.a}") == "b"
    assert host.engine.run(["cat", f"{spec['storage_dir']}/marker"]).stdout == "of a volume"
    names = host.engine.docker("ps", "--all", "--format", "{{.Names}}").split()
    assert names == [NODE]
    assert "factory" in host.engine.run(["k3d", "cluster", "list"]).stdout


def test_a_swap_keeps_the_cluster_and_what_its_node_was_made_with(host, spec, live):
    build(host, NEW)
    before = definition(host)
    made = host.done("k3d", "ensure", spec={**spec, "image": NEW})["cluster"]
    assert made["k3s_version"] == "v1.32.3+k3s1"
    assert_kept(host, spec, live, NEW)
    assert definition(host) == before
    mode = host.engine.run(["stat", "--format=%a %U", DATASTORE.rpartition("/")[0]]).stdout
    assert mode.split() == ["700", "root"]
    # It is one that k3d and Docker stop and start as any other.
    host.done("k3d", "stop", spec={"name": "factory"})
    host.done("k3d", "start", spec={"name": "factory"})
    host.engine.restart()
    host.done("k3d", "ensure", spec={**spec, "image": NEW})
    assert_kept(host, spec, live, NEW)


def test_a_node_that_does_not_come_up_is_taken_back(host, spec, live):
    build(host, NEW, "RUN mv /bin/k3s /bin/k3s-old && printf '#!/bin/sh\\nexit 1\\n' > /bin/k3s")
    before = definition(host)
    result = host("k3d", "ensure", spec={**spec, "image": NEW, "api_wait_seconds": 60})
    assert f"The cluster is back on {NODE_IMAGE}" in result["error"]["cause"]
    assert_kept(host, spec, live, NODE_IMAGE)
    assert definition(host) == before
    (difference,) = host.done("k3d", "inspect", spec={**spec, "image": NEW})["cluster"][
        "differences"
    ]
    assert "hostctl k3d retry factory" in difference["why"]


def killed_when(host, spec, seen: Callable[[], bool]) -> None:
    process = host.engine.popen(
        host.argv("k3d", "ensure"), stdin=-1, stdout=-3, stderr=-3, text=True
    )
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps({**spec, "image": NEW}))
        process.stdin.close()
    until = time.monotonic() + 120
    while not seen() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before that step"
    process.kill()
    process.wait()


STEPS = [
    *((made, step) for made in (ours, incumbents) for step in ("backup", "replace", "start")),
    (incumbents, "copy"),
]


@pytest.mark.parametrize(("live", "step"), STEPS, indirect=["live"])
def test_killed_at_a_step_and_run_again(host, spec, live, step):
    build(host, NEW)
    record = f"/proc/{host.engine.init}/root/var/lib/homelab/clusters/factory.json"

    def reached() -> bool:
        with contextlib.suppress(OSError, ValueError), open(record) as file:
            return (json.load(file).get("swap") or {}).get("step") == step
        return False

    killed_when(host, spec, reached)
    seen = host.done("k3d", "inspect", spec={**spec, "image": NEW})["cluster"]
    assert seen["identity"] == live
    assert seen["differences"][0]["key"] == "swap"
    host.done("k3d", "ensure", spec={**spec, "image": NEW})
    assert_kept(host, spec, live, NEW)
