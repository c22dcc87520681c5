"""The docker stand-in on a real engine: what the daemon says of each rule."""

from pathlib import Path
from typing import Any

import pytest

from rehearsal import core
from rehearsal.core import Failure, Properties, Request
from rehearsal.daemon import CONTAINER, IMAGE, NETWORK
from rehearsal.providers.docker import Docker
from tests.cluster.engine import Engine

pytestmark = pytest.mark.cluster

NET = {"name": "n", "ipamConfigs": [{"subnet": "172.30.0.0/16", "gateway": "172.30.0.1"}]}
BOX = {
    "name": "box",
    "image": "box:1",
    "command": ["sleep", "1000"],
    "user": "65532:65532",
    "networkMode": "host",
    "mounts": [{"type": "bind", "source": "/mnt", "target": "/data", "readOnly": True}],
    "readOnly": True,
    "capabilities": {"drops": ["ALL"]},
    "securityOpts": ["no-new-privileges:true"],
    "logDriver": "json-file",
    "logOpts": {"max-size": "10m"},
    "restart": "unless-stopped",
    "mustRun": True,
    "destroyGraceSeconds": 1,
}


@pytest.fixture
def provider(docker: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    """The stand-in, acting on the engine."""
    docker.build("box:1", "FROM node\nENTRYPOINT []\n")
    monkeypatch.setenv(core.REALLY, "1")
    provider = Docker(tmp_path)
    # The socket is a file of the other machine's mounts, which the kernel shows us here.
    provider.configure({"host": f"unix:///proc/{docker.init}/root/run/docker.sock"})
    return provider


def asked(type: str, **fields: Any) -> Request:
    return Request(f"urn:pulumi:s::p::{type}::x", type, "x", seed=b"s", **fields)


def make(provider: Docker, type: str, given: Properties) -> tuple[str, Properties, Properties]:
    """Id, outputs and checked inputs of an object that is made as the engine does it."""
    checked = provider.check(asked(type, news=given))
    assert checked.failures == []
    return *provider.create(asked(type, news=checked.inputs)), checked.inputs


@pytest.mark.parametrize(
    ("type", "given"), [(NETWORK, NET), (IMAGE, {"name": "box:1"}), (CONTAINER, BOX)]
)
def test_what_was_made_is_read_without_a_difference(provider: Docker, type: str, given: Properties):
    id, outputs, inputs = make(provider, type, given)
    found = provider.read(asked(type, id=id, olds=outputs, old_inputs=inputs))
    assert found is not None
    assert (found[0], found[2]) == (id, inputs)
    for state in (outputs, found[1]):
        assert not provider.diff(asked(type, id=id, olds=state, news=inputs)).changes


def test_the_daemon_refuses_what_the_make_believe_one_refuses(provider: Docker):
    make(provider, NETWORK, NET)
    with pytest.raises(Failure, match="Pool overlaps with other one on this address space"):
        make(provider, NETWORK, {**NET, "name": "other"})
    image, outputs, _ = make(provider, IMAGE, {"name": "box:1"})
    id, _, _ = make(provider, CONTAINER, BOX)
    with pytest.raises(Failure, match=f'"/box" is already in use by container "{id}"'):
        make(provider, CONTAINER, BOX)
    with pytest.raises(Failure, match=f"container {id[:12]} is using its referenced image"):
        provider.delete(asked(IMAGE, id=image, olds=outputs))


def test_an_image_that_cannot_be_pulled_fails_by_name(provider: Docker):
    # A registry on a port of the host's loopback where nothing listens.
    name = "127.0.0.1:9/nothing:1"
    with pytest.raises(Failure, match=f"Docker image into resource: unable to pull image {name}: "):
        make(provider, IMAGE, {"name": name})
    with pytest.raises(Failure, match=f"Unable to create container with image {name}: "):
        make(provider, CONTAINER, {**BOX, "image": name})


def test_a_stopped_container_is_drift_that_an_update_mends(provider: Docker, docker: Engine):
    id, outputs, inputs = make(provider, CONTAINER, BOX)
    docker.docker("stop", "--time=0", "box")
    found = provider.read(asked(CONTAINER, id=id, olds=outputs, old_inputs=inputs))
    assert found is not None
    change = asked(CONTAINER, id=id, olds=found[1], news=inputs)
    difference = provider.diff(change)
    assert (difference.diffs, difference.replaces) == (["mustRun"], [])
    provider.update(change)
    assert docker.docker("ps", "--format={{.Names}}") == "box"
    provider.delete(change)
    assert provider.read(change) is None


def test_a_daemon_that_does_not_answer_fails_configure(provider: Docker, docker: Engine):
    docker.stop()
    with pytest.raises(Failure, match="failed to connect to any docker daemon"):
        provider.configure({"host": f"unix:///proc/{docker.init}/root/run/docker.sock"})
