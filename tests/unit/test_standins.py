"""The stand-in providers: what the recordings in tests/golden do not show."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib import request as web
from urllib.error import HTTPError

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rehearsal import api, core, schemas
from rehearsal.core import UNKNOWN, Exists, Failure, Request, Secret, World
from rehearsal.providers import cloudflare, command, docker
from rehearsal.providers.cloudflare import Cloudflare
from rehearsal.providers.docker import Docker
from rehearsal.schemas import __main__ as derivation

ROOT = Path(__file__).parents[2]
PLUGINS = sorted((ROOT / "rehearsal" / "plugins").iterdir())
ACCOUNT, ZONE = "f" * 32, "e" * 32
SECRET = base64.b64encode(b"s" * 32).decode()


def asked(type: str, name: str, **fields: Any) -> Request:
    return Request(f"urn:pulumi:s::p::{type}::{name}", type, name, **fields)


def make(provider: core.Provider, type: str, name: str, inputs: dict[str, Any]) -> Any:
    """Check and create, as the engine does; returns the id and outputs."""
    checked = provider.check(asked(type, name, news=inputs))
    assert checked.failures == []
    return provider.create(asked(type, name, news=checked.inputs))


# Values

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.text()
    | st.just(UNKNOWN)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
        | inner.map(Secret)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_values_survive_the_wire(properties: dict[str, Any]):
    assert core.unmarshal(core.marshal(properties)) == properties


def test_assets_references_and_outputs_come_as_the_protocol_says():
    signature = "4dabf18193072939515e22adb298388d"
    asset = {signature: "c44067f5952c0a294b673a41bacd8c17", "text": "x"}
    reference = {signature: "5cf8f73096256a8f31e491e813e4eb8e", "urn": "u", "id": "i"}
    output = {signature: "d0e6a833031e9bbcd3f4e8bde6ca49a4", "value": "v", "secret": True}
    not_known = {signature: "d0e6a833031e9bbcd3f4e8bde6ca49a4"}
    wire = core.marshal({"a": asset, "r": reference, "o": output, "n": not_known})
    expected = {"a": asset, "r": "i", "o": Secret("v"), "n": UNKNOWN}
    assert core.unmarshal(wire) == expected


def test_a_secret_shows_nowhere_in_a_repr():
    assert "canary" not in repr(asked("t", "n", news={"a": [Secret("canary")]}))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, {}),
        ({"a": Secret(1)}, {"a": 1}, {}),
        ({"a": True}, {"a": 1}, {"a": "UPDATE"}),
        ({"a": 1}, {}, {"a": "DELETE"}),
        ({}, {"a": None}, {"a": "ADD"}),
        ({"a": {"b.c": 1}}, {"a": {"b.c": UNKNOWN}}, {'a["b.c"]': "UPDATE"}),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}, 4]}, {"a[1].b": "UPDATE", "a[2]": "ADD"}),
        ({"__a": 1}, {}, {}),
    ],
)
def test_compare(old: Any, new: Any, expected: dict[str, str]):
    assert core.compare(old, new) == expected


# World


def test_a_natural_key_is_taken_once_even_in_a_race(tmp_path: Path):
    world = World(tmp_path)

    def create(number: int) -> bool:
        try:
            world.create("network/k3d-factory", {"id": str(number)}, str(number))
        except Exists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(create, range(32)))
    assert made.count(True) == 1
    assert world.find(str(made.index(True)), "network") == (
        "network/k3d-factory",
        {"id": str(made.index(True))},
    )


def test_the_world_is_plain_files(tmp_path: Path):
    world = World(tmp_path)
    world.create("a/../b", {"id": "1"}, "1")
    assert not (tmp_path / "b.json").exists()
    world.create("image/ghcr.io/k3d:v1", {"id": "2"}, "2")
    path = tmp_path / "image" / "ghcr.io" / "k3d:v1.json"
    path.write_text('{"id": "2", "drift": true}')
    assert world.get("image/ghcr.io/k3d:v1") == {"id": "2", "drift": True}
    path.unlink()
    assert world.find("2", "image") is None
    path.with_name("by hand.json").write_text('{"id": "3"}')
    assert world.find("3", "image") == ("image/ghcr.io/by hand", {"id": "3"})
    assert [key for key, _ in world.list("image")] == ["image/ghcr.io/by hand"]
    assert world.delete("image/ghcr.io/by hand")
    assert not world.delete("image/ghcr.io/by hand")


def test_a_file_that_is_not_json_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(Failure, match=r"a\.json is not JSON"):
        World(tmp_path).get("a")


# Processes

Plugin = tuple[subprocess.Popen[str], Any]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Plugin]]:
    """Starts a plugin as the engine does; returns the process and a stub of its service."""
    started: list[tuple[subprocess.Popen[str], grpc.Channel]] = []

    def run(package: str) -> Plugin:
        process = subprocess.Popen(
            [ROOT / "rehearsal" / "plugins" / f"pulumi-resource-{package}"],
            env={
                **os.environ,
                core.MARKER: str(tmp_path),
                "HOMELAB_REHEARSAL_PYTHON": sys.executable,
            },
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        channel = grpc.insecure_channel(f"127.0.0.1:{int(process.stdout.readline())}")
        started.append((process, channel))
        return process, core.provider_pb2_grpc.ResourceProviderStub(channel)

    yield run
    for process, channel in started:
        channel.close()
        process.kill()
        process.communicate()


def network(stub: Any, name: str = "k3d-factory") -> Any:
    return stub.Create(
        core.provider_pb2.CreateRequest(
            urn=f"urn:pulumi:s::p::{docker.NETWORK}::{name}",
            properties=core.marshal({"name": name, "ipamDriver": "default", "__defaults": []}),
        )
    )


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_no_stand_in_starts_outside_a_rehearsal(plugin: Path):
    outside = {name: value for name, value in os.environ.items() if name != core.MARKER}
    outside["HOMELAB_REHEARSAL_PYTHON"] = sys.executable
    for environment in (outside, {**outside, core.MARKER: "/no/such/directory"}):
        ran = subprocess.run(
            [plugin, "127.0.0.1:1"], env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode != 0
        assert ran.stdout == ""
        assert len(ran.stderr.splitlines()) == 1
        assert core.MARKER in ran.stderr


@pytest.mark.parametrize("plugin", PLUGINS, ids=lambda path: path.name)
def test_a_stand_in_starts_without_the_sdk(plugin: Path, start: Callable[[str], Plugin]):
    package = plugin.name.removeprefix("pulumi-resource-")
    _, stub = start(package)
    assert stub.GetPluginInfo(core.empty_pb2.Empty()).version
    # pulumi_cloudflare alone costs 2 s to import.
    code = (
        f"import sys, rehearsal.providers.{package}\n"
        "print([m for m in sys.modules if m.startswith('pulumi')])"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert listed.stdout.strip() == "[]"


def test_a_method_that_is_not_served_says_so(start: Callable[[str], Plugin]):
    _, stub = start("docker")
    with pytest.raises(grpc.RpcError) as refused:
        stub.GetSchema(core.provider_pb2.GetSchemaRequest())
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_the_world_survives_a_kill_between_creating_and_answering(
    tmp_path: Path, start: Callable[[str], Plugin]
):
    fault = {"provider": "docker", "method": "Create", "when": "after", "do": "kill"}
    (tmp_path / "faults.json").write_text(json.dumps([fault]))
    process, stub = start("docker")
    with pytest.raises(grpc.RpcError):
        network(stub)
    assert process.wait(timeout=5) == -signal.SIGKILL
    _, stub = start("docker")
    with pytest.raises(grpc.RpcError, match="network with name k3d-factory already exists"):
        network(stub)


def test_a_kill_before_creating_leaves_nothing(tmp_path: Path, start: Callable[[str], Plugin]):
    fault = {"provider": "docker", "method": "Create", "do": "kill"}
    (tmp_path / "faults.json").write_text(json.dumps([fault]))
    _, stub = start("docker")
    with pytest.raises(grpc.RpcError):
        network(stub)
    _, stub = start("docker")
    assert network(stub).id


def test_faults_are_counted_across_processes(tmp_path: Path, start: Callable[[str], Plugin]):
    fault = {"provider": "docker", "urn": "*::k3d-*", "do": "fail", "message": "full", "times": 2}
    (tmp_path / "faults.json").write_text(json.dumps([fault]))
    assert network(start("docker")[1], "other").id
    for _ in range(2):
        with pytest.raises(grpc.RpcError, match="full"):
            network(start("docker")[1])
    assert network(start("docker")[1]).id


def test_a_late_answer_and_one_that_hangs(tmp_path: Path, start: Callable[[str], Plugin]):
    late = {"provider": "docker", "urn": "*::late", "do": "late", "seconds": 0.3}
    hang = {"provider": "docker", "urn": "*::hang", "do": "hang"}
    (tmp_path / "faults.json").write_text(json.dumps([late, hang]))
    _, stub = start("docker")
    began = time.monotonic()
    network(stub, "late")
    assert time.monotonic() - began >= 0.3
    ended: list[grpc.RpcError] = []

    def wait() -> None:
        try:
            network(stub, "hang")
        except grpc.RpcError as error:
            ended.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    stub.Cancel(core.empty_pb2.Empty())
    waiting.join(5)
    assert [error.code() for error in ended] == [grpc.StatusCode.CANCELLED]


ENGINE = """
import subprocess, sys
plugin = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True)
print(plugin.stdout.readline(), flush=True)
sys.stdin.read()
"""


def test_a_stand_in_ends_with_its_engine_even_in_a_call_that_hangs(tmp_path: Path):
    (tmp_path / "faults.json").write_text('[{"provider": "docker", "do": "hang"}]')
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE, ROOT / "rehearsal" / "plugins" / "pulumi-resource-docker"],
        env={
            **os.environ,
            core.MARKER: str(tmp_path),
            "HOMELAB_REHEARSAL_PYTHON": sys.executable,
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert engine.stdout is not None
    port = int(engine.stdout.readline())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = core.provider_pb2_grpc.ResourceProviderStub(channel)
        request = core.provider_pb2.CreateRequest(urn=f"urn:pulumi:s::p::{docker.NETWORK}::n")
        hanging = stub.Create.future(request)
        deadline = time.monotonic() + 5
        while not (tmp_path / "faults").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        engine.communicate()
        with pytest.raises(grpc.RpcError) as ended:
            hanging.result(timeout=5)
    assert ended.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_preview_is_spared_unless_the_fault_says_so(tmp_path: Path):
    fault = {"provider": "docker", "do": "fail", "times": 2}
    faults = core.Faults(tmp_path, "docker")
    (tmp_path / "faults.json").write_text(json.dumps([fault]))
    faults.strike("before", "Create", "urn", preview=True)
    with pytest.raises(Failure, match="Create failed"):
        faults.strike("before", "Create", "urn", preview=False)
    time.sleep(0.01)
    (tmp_path / "faults.json").write_text(json.dumps([{**fault, "preview": True}]))
    with pytest.raises(Failure, match="Create failed"):
        faults.strike("before", "Create", "urn", preview=True)


@pytest.mark.parametrize(("text", "reason"), [("[", "not JSON"), ('[{"do": "stop"}]', "allowed")])
def test_a_fault_that_cannot_be_read_is_told(tmp_path: Path, text: str, reason: str):
    (tmp_path / "faults.json").write_text(text)
    with pytest.raises(Failure, match=rf"faults\.json.*{reason}"):
        core.Faults(tmp_path, "docker").strike("before", "Create", "urn", preview=False)


def test_an_object_that_did_not_get_ready_reaches_the_engine(tmp_path: Path):
    class Slow(core.Provider):
        package = "slow"

        def create(self, request: Request) -> tuple[str, core.Properties]:
            reasons = ["no address"]
            raise core.InitFailed("not ready", "the-id", {"a": Secret(1)}, {"a": 1}, reasons)

    server, port = core.listen(Slow(tmp_path))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = core.provider_pb2_grpc.ResourceProviderStub(channel)
        with pytest.raises(grpc.RpcError, match="not ready") as failed:
            stub.Create(core.provider_pb2.CreateRequest(urn="urn:pulumi:s::p::slow:i:T::n"))
    server.stop(grace=None)
    metadata: Any = failed.value.trailing_metadata()
    status = core.status_pb2.Status.FromString(dict(metadata)["grpc-status-details-bin"])
    detail = core.provider_pb2.ErrorResourceInitFailed()
    assert status.details[0].Unpack(detail)
    assert (detail.id, list(detail.reasons)) == ("the-id", ["no address"])
    assert core.unmarshal(detail.properties) == {"a": Secret(1)}


# Schemas


@pytest.mark.parametrize("package", derivation.IN_USE)
def test_a_schema_is_what_the_installed_sdk_says(package: str):
    current = derivation.text(package)
    assert (schemas.DIRECTORY / f"{package}.json").read_text() == current


CONFIG = {"accountId": ACCOUNT, "tunnelId": "t"}
INGRESS = "config.ingresses[0]"


@pytest.mark.parametrize(
    ("provider", "type", "inputs", "reasons"),
    [
        (
            Docker,
            docker.CONTAINER,
            {"imgae": "x"},
            [
                "Missing required property 'image'",
                "Invalid or unknown key. Examine values at 'n.imgae'.",
            ],
        ),
        (
            Docker,
            docker.CONTAINER,
            {"image": "x", "ports": [{"internal": "80"}]},
            ['Unexpected type at field "ports[0].internal": expected integer type, got str'],
        ),
        (
            Docker,
            docker.CONTAINER,
            {"image": "x", "mustRun": 1, "envs": {"A": "1"}},
            [
                'Unexpected type at field "mustRun": expected boolean type, got int',
                'Unexpected type at field "envs": expected array type, got dict',
            ],
        ),
        (
            Cloudflare,
            cloudflare.CONFIGURATION,
            {**CONFIG, "config": {"ingresses": [{"hostname": "a.example.org"}]}},
            [f"Missing required property '{INGRESS}.service'"],
        ),
        (
            Cloudflare,
            cloudflare.CONFIGURATION,
            {
                **CONFIG,
                "config": {"ingresses": [{"service": "x", "originRequest": {"noTLSVerify": True}}]},
            },
            [f"Invalid or unknown key. Examine values at 'n.{INGRESS}.originRequest.noTLSVerify'."],
        ),
        (
            command.Command,
            "command:local:Command",
            {"crate": "x", "logging": "all", "environment": {"A": 1}},
            [
                "Unrecognized field 'crate' on 'Command'",
                "Field 'logging' on 'Command' must be a ''stdout' or 'stderr' or "
                "'stdoutAndStderr' or 'none''; got 'str' instead",
                "Field 'environment.A' on 'Command' must be a 'string'; got 'int' instead",
            ],
        ),
    ],
)
def test_inputs_are_checked_by_the_sdks_own_types(
    tmp_path: Path, provider: Any, type: str, inputs: dict[str, Any], reasons: list[str]
):
    checked = provider(tmp_path).check(asked(type, "n", news=inputs))
    assert [reason for _, reason in checked.failures] == reasons


def test_unknown_inputs_pass_the_check(tmp_path: Path):
    inputs = {"accountId": UNKNOWN, "tunnelId": Secret(UNKNOWN), "config": UNKNOWN}
    request = asked(cloudflare.CONFIGURATION, "n", news=inputs)
    assert Cloudflare(tmp_path).check(request).failures == []


@pytest.mark.parametrize(("provider", "package"), [(Docker, "docker"), (Cloudflare, "cloudflare")])
def test_unknown_provider_configuration_is_refused(tmp_path: Path, provider: Any, package: str):
    request = asked(f"pulumi:providers:{package}", "p", news={"hots": "x", "version": "1"})
    (failure,) = provider(tmp_path).check_config(request).failures
    assert "Examine values at 'p.hots'" in failure[1]


# docker


@pytest.fixture
def engine(tmp_path: Path) -> Docker:
    return Docker(tmp_path)


NET = {"name": "k3d-factory", "ipamConfigs": [{"subnet": "172.30.0.0/16"}]}
BOX = {"name": "cloudflared", "image": "cloudflare/cloudflared:1", "networkMode": "bridge"}


def test_an_unreachable_daemon_fails_configure(tmp_path: Path, engine: Docker):
    engine.configure({"host": "unix:///var/run/docker.sock"})
    engine.world.root.mkdir(parents=True)
    (engine.world.root / "unreachable").touch()
    with pytest.raises(Failure, match="failed to connect to any docker daemon"):
        engine.configure({"host": "unix:///var/run/docker.sock"})


def test_names_are_taken(engine: Docker):
    make(engine, docker.NETWORK, "a", NET)
    other = {"name": "k3d-factory", "ipamConfigs": [{"subnet": "172.31.0.0/16"}]}
    with pytest.raises(Failure, match="network with name k3d-factory already exists"):
        make(engine, docker.NETWORK, "b", other)
    make(engine, docker.CONTAINER, "a", BOX)
    with pytest.raises(Failure, match='container name "/cloudflared" is already in use'):
        make(engine, docker.CONTAINER, "b", BOX)


def test_subnets_do_not_overlap(engine: Docker):
    make(engine, docker.NETWORK, "a", NET)
    overlapping = {"name": "b", "ipamConfigs": [{"subnet": "172.30.128.0/24"}]}
    with pytest.raises(Failure, match="Pool overlaps with other one on this address space"):
        make(engine, docker.NETWORK, "b", overlapping)
    _, outputs = make(engine, docker.NETWORK, "c", {"name": "c"})
    assert outputs["ipamConfigs"][0]["subnet"] == "172.18.0.0/16"


def test_a_network_with_endpoints_stays(engine: Docker):
    id, outputs = make(engine, docker.NETWORK, "a", NET)
    deletion = asked(docker.NETWORK, "a", id=id, olds=outputs)
    thing = engine.world.get("network/k3d-factory")
    assert thing is not None
    engine.world.put("network/k3d-factory", {**thing, "endpoints": ["k3d-factory-server-0"]})
    with pytest.raises(Failure, match=r"has active endpoints \(k3d-factory-server-0\)"):
        engine.delete(deletion)
    engine.world.put("network/k3d-factory", thing)
    make(engine, docker.CONTAINER, "b", {**BOX, "networkMode": "k3d-factory"})
    with pytest.raises(Failure, match=r"has active endpoints \(cloudflared\)"):
        engine.delete(deletion)
    engine.world.delete("container/cloudflared")
    engine.delete(deletion)
    assert engine.read(asked(docker.NETWORK, "a", id=id)) is None


def test_a_container_needs_its_network(engine: Docker):
    with pytest.raises(Failure, match="network k3d-factory not found"):
        make(engine, docker.CONTAINER, "a", {**BOX, "networkMode": "k3d-factory"})


def test_a_volume_that_exists_is_taken_as_it_is(engine: Docker):
    make(engine, docker.VOLUME, "a", {"name": "data"})
    id, _ = make(engine, docker.VOLUME, "b", {"name": "data"})
    assert id == "data"
    with pytest.raises(Failure, match="volume name must be unique"):
        make(engine, docker.VOLUME, "c", {"name": "data", "driver": "nfs"})


def test_an_image_is_kept_locally_or_removed_unless_it_runs(engine: Docker):
    id, outputs = make(engine, docker.IMAGE, "a", {"name": BOX["image"], "keepLocally": True})
    assert outputs["repoDigest"].startswith("cloudflare/cloudflared@sha256:")
    engine.delete(asked(docker.IMAGE, "a", id=id, olds=outputs))
    assert engine.world.get(f"image/{BOX['image']}") is not None
    make(engine, docker.CONTAINER, "b", BOX)
    unkept = {**outputs, "keepLocally": None}
    with pytest.raises(Failure, match=r"container [0-9a-f]{12} is using its referenced image"):
        engine.delete(asked(docker.IMAGE, "a", id=id, olds=unkept))
    engine.world.delete("container/cloudflared")
    engine.delete(asked(docker.IMAGE, "a", id=id, olds=unkept))
    assert engine.world.get(f"image/{BOX['image']}") is None


def test_drift_is_read_and_healed(engine: Docker):
    id, outputs = make(engine, docker.CONTAINER, "a", BOX)
    inputs = engine.check(asked(docker.CONTAINER, "a", news=BOX)).inputs
    refresh = asked(docker.CONTAINER, "a", id=id, olds=outputs, old_inputs=inputs)
    thing = engine.world.get("container/cloudflared")
    assert thing is not None
    engine.world.put("container/cloudflared", {**thing, "image": "cloudflare/cloudflared:2"})
    found = engine.read(refresh)
    assert found is not None
    _, live, live_inputs = found
    assert live_inputs == {**inputs, "image": "cloudflare/cloudflared:2"}
    difference = engine.diff(asked(docker.CONTAINER, "a", id=id, olds=live, news=inputs))
    assert difference.replaces == ["image"]
    assert difference.delete_before_replace


def test_what_an_update_changes_in_place(engine: Docker):
    id, outputs = make(engine, docker.CONTAINER, "a", BOX)
    news = engine.check(asked(docker.CONTAINER, "a", news={**BOX, "memory": 64})).inputs
    change = asked(docker.CONTAINER, "a", id=id, olds=outputs, news=news)
    difference = engine.diff(change)
    assert (difference.diffs, difference.replaces) == (["memory"], [])
    updated = engine.update(change)
    assert {**outputs, "memory": 64} == updated
    found = engine.read(asked(docker.CONTAINER, "a", id=id, olds=updated))
    assert found is not None
    assert found[1]["memory"] == 64


def test_a_network_mode_that_is_not_given_shows_a_difference_for_ever(engine: Docker):
    given_none = {"name": "a", "image": "a:1"}
    _, outputs = make(engine, docker.CONTAINER, "a", given_none)
    news = engine.check(asked(docker.CONTAINER, "a", news=given_none)).inputs
    difference = engine.diff(asked(docker.CONTAINER, "a", olds=outputs, news=news))
    assert difference.detailed == {"networkMode": "DELETE_REPLACE"}


def test_the_order_of_a_set_means_nothing(engine: Docker):
    box = {**BOX, "envs": ["A=1", "B=2"], "command": ["x", "y"]}
    _, outputs = make(engine, docker.CONTAINER, "a", box)
    turned = engine.check(
        asked(docker.CONTAINER, "a", news={**box, "envs": ["B=2", "A=1"], "command": ["y", "x"]})
    ).inputs
    assert engine.diff(asked(docker.CONTAINER, "a", olds=outputs, news=turned)).diffs == ["command"]


def test_a_name_is_made_once(engine: Docker):
    first = engine.check(asked(docker.NETWORK, "net", news={}, seed=b"1")).inputs
    assert first["__defaults"] == ["ipamDriver", "name"]
    again = engine.check(asked(docker.NETWORK, "net", news={}, olds=first, seed=b"2")).inputs
    assert again["name"] == first["name"]
    assert first["name"].startswith("net-")


# cloudflare


@pytest.fixture
def service(tmp_path: Path) -> Cloudflare:
    return Cloudflare(tmp_path)


TUN = {"accountId": ACCOUNT, "name": "factory", "configSrc": "cloudflare", "tunnelSecret": SECRET}
DNS = {
    "zoneId": ZONE,
    "name": "argocd.example.org",
    "type": "CNAME",
    "content": "t.cfargotunnel.com",
    "proxied": True,
    "ttl": 1,
}
ROUTE = {"hostname": "argocd.example.org", "service": "http://argocd:80"}
CATCH_ALL = {"service": "http_status:404"}


@pytest.mark.parametrize(
    ("rules", "problem"),
    [
        ([ROUTE, CATCH_ALL], ""),
        ([{**ROUTE, "hostname": "*.example.org"}, CATCH_ALL], ""),
        ([{**ROUTE, "service": "unix:/run/x.sock"}, {**ROUTE, "path": "/a"}, CATCH_ALL], ""),
        ([], "last ingress rule must match all URLs"),
        ([ROUTE], "last ingress rule must match all URLs"),
        ([ROUTE, {**CATCH_ALL, "path": "/x"}], "last ingress rule must match all URLs"),
        ([CATCH_ALL, CATCH_ALL], "Rule #1 is matching the hostname ''"),
        ([CATCH_ALL, ROUTE, CATCH_ALL], "Rule #1 is matching the hostname ''"),
        ([{**ROUTE, "hostname": "a.*.org"}, CATCH_ALL], "at most one wildcard"),
        ([{**ROUTE, "hostname": "a.org:80"}, CATCH_ALL], "Hostname cannot contain a port"),
        ([{**ROUTE, "service": "argocd:80"}, CATCH_ALL], "Rule #1 has an invalid service"),
        ([{**ROUTE, "service": "http_status:9"}, CATCH_ALL], "Rule #1 has an invalid service"),
    ],
)
def test_ingress_rules(service: Cloudflare, rules: list[dict[str, Any]], problem: str):
    tunnel, _ = make(service, cloudflare.TUNNEL, "t", TUN)
    inputs = {"accountId": ACCOUNT, "tunnelId": tunnel, "config": {"ingresses": rules}}
    if not problem:
        id, outputs = make(service, cloudflare.CONFIGURATION, "t", inputs)
        assert (id, outputs["version"]) == (tunnel, 1)
        return
    with pytest.raises(Failure) as refused:
        make(service, cloudflare.CONFIGURATION, "t", inputs)
    assert problem in str(refused.value)


def test_a_configuration_needs_its_tunnel(service: Cloudflare):
    with pytest.raises(Failure, match="404 Not Found"):
        make(service, cloudflare.CONFIGURATION, "t", {**CONFIG, "config": {}})


@pytest.mark.parametrize(
    ("record", "code"),
    [
        ({**DNS, "ttl": 300}, 9021),
        ({**DNS, "proxied": False, "ttl": 5}, 9021),
        ({**DNS, "zoneId": "example.org"}, 7003),
        (DNS, 81053),
        ({**DNS, "content": "other.cfargotunnel.com"}, 81053),
        ({**DNS, "type": "A", "content": "192.0.2.1"}, 81054),
    ],
)
def test_records_that_are_refused(service: Cloudflare, record: dict[str, Any], code: int):
    make(service, cloudflare.RECORD, "there", DNS)
    with pytest.raises(Failure, match=f'"code": {code}'):
        make(service, cloudflare.RECORD, "new", record)


def test_addresses_of_one_name_may_be_many_but_not_the_same(service: Cloudflare):
    address = {**DNS, "type": "A", "content": "192.0.2.1"}
    make(service, cloudflare.RECORD, "a", address)
    make(service, cloudflare.RECORD, "b", {**address, "content": "192.0.2.2"})
    with pytest.raises(Failure, match='"code": 81058'):
        make(service, cloudflare.RECORD, "c", address)
    with pytest.raises(Failure, match='"code": 81053'):
        make(service, cloudflare.RECORD, "d", DNS)


def test_a_record_that_is_renamed_keeps_its_id_and_frees_its_name(service: Cloudflare):
    id, outputs = make(service, cloudflare.RECORD, "a", DNS)
    news = {**DNS, "name": "grafana.example.org"}
    service.update(asked(cloudflare.RECORD, "a", id=id, olds=outputs, news=news))
    found = service.read(asked(cloudflare.RECORD, "a", id=id))
    assert found is not None
    assert found[1]["name"] == "grafana.example.org"
    make(service, cloudflare.RECORD, "b", DNS)


def test_a_tunnels_name_is_taken(service: Cloudflare):
    make(service, cloudflare.TUNNEL, "a", TUN)
    with pytest.raises(Failure, match=r'409 Conflict .*"code": 1013'):
        make(service, cloudflare.TUNNEL, "b", TUN)


@pytest.mark.parametrize("secret", ["not base64!", base64.b64encode(b"short").decode()])
def test_a_tunnels_secret_is_32_bytes(service: Cloudflare, secret: str):
    with pytest.raises(Failure, match="at least 32 bytes"):
        make(service, cloudflare.TUNNEL, "a", {**TUN, "tunnelSecret": secret})


def test_a_tunnel_with_live_connectors_stays(service: Cloudflare):
    id, outputs = make(service, cloudflare.TUNNEL, "a", TUN)
    key = f"tunnel/{ACCOUNT}/factory"
    thing = service.world.get(key)
    assert thing is not None
    service.world.put(key, {**thing, "connections": [{"coloName": "fra01"}]})
    with pytest.raises(Failure, match='"code": 1022'):
        service.delete(asked(cloudflare.TUNNEL, "a", id=id, olds=outputs))
    service.world.put(key, thing)
    service.delete(asked(cloudflare.TUNNEL, "a", id=id, olds=outputs))
    assert service.read(asked(cloudflare.TUNNEL, "a", id=id)) is None


def test_a_tunnels_token_holds_its_secret(service: Cloudflare):
    id, _ = make(service, cloudflare.TUNNEL, "a", TUN)
    args = {"accountId": ACCOUNT, "tunnelId": id}
    token = service.invoke(cloudflare.TOKEN, args, preview=False)["token"]
    assert json.loads(base64.b64decode(token)) == {"a": ACCOUNT, "t": id, "s": SECRET}
    with pytest.raises(Failure, match="404 Not Found"):
        service.invoke(cloudflare.TOKEN, {**args, "tunnelId": "other"}, preview=False)


@pytest.mark.parametrize(
    ("change", "replaces"),
    [
        ({"tunnelSecret": base64.b64encode(b"n" * 32).decode()}, []),
        ({"name": "other"}, []),
        ({"configSrc": "local"}, ["configSrc"]),
        ({"configSrc": None}, ["configSrc"]),
        ({"accountId": "a" * 32}, ["accountId"]),
    ],
)
def test_what_replaces_a_tunnel(service: Cloudflare, change: dict[str, Any], replaces: list[str]):
    id, outputs = make(service, cloudflare.TUNNEL, "a", TUN)
    difference = service.diff(
        asked(cloudflare.TUNNEL, "a", id=id, olds=outputs, news={**TUN, **change})
    )
    assert difference.changes
    assert difference.replaces == replaces


def test_an_existing_tunnel_is_imported_by_account_and_id(service: Cloudflare):
    without_secret = {key: value for key, value in TUN.items() if key != "tunnelSecret"}
    id, _ = make(service, cloudflare.TUNNEL, "a", {**without_secret, "configSrc": "local"})
    found = service.read(asked(cloudflare.TUNNEL, "a", id=f"{ACCOUNT}/{id}"))
    assert found is not None
    assert found[0] == id
    assert "tunnelSecret" not in found[1]
    news = {**without_secret, "configSrc": "local"}
    difference = service.diff(asked(cloudflare.TUNNEL, "a", id=id, olds=found[1], news=news))
    assert difference.changes is False


def test_other_imports(service: Cloudflare):
    record, _ = make(service, cloudflare.RECORD, "r", DNS)
    policy, _ = make(
        service,
        cloudflare.POLICY,
        "p",
        {
            "accountId": ACCOUNT,
            "name": "admins",
            "decision": "allow",
            "includes": [{"email": {"email": "me@example.org"}}],
        },
    )
    for type, id, import_id in (
        (cloudflare.RECORD, record, f"{ZONE}/{record}"),
        (cloudflare.POLICY, policy, f"{ACCOUNT}/{policy}"),
    ):
        found = service.read(asked(type, "i", id=import_id))
        assert found is not None
        assert found[0] == id


def test_an_application_needs_its_policies_and_its_domain(service: Cloudflare):
    inputs = {
        "accountId": ACCOUNT,
        "name": "argocd",
        "type": "self_hosted",
        "destinations": [{"type": "public", "uri": "argocd.example.org"}],
    }
    with pytest.raises(Failure, match="policy nowhere not found"):
        make(
            service,
            cloudflare.APPLICATION,
            "a",
            {**inputs, "policies": [{"id": "nowhere", "precedence": 1}]},
        )
    id, outputs = make(service, cloudflare.APPLICATION, "a", inputs)
    assert outputs["domain"] == "argocd.example.org"
    with pytest.raises(Failure, match="application_already_exists"):
        make(service, cloudflare.APPLICATION, "b", inputs)
    found = service.read(asked(cloudflare.APPLICATION, "a", id=f"accounts/{ACCOUNT}/{id}"))
    assert found is not None
    assert found[0] == id


@pytest.mark.parametrize(("token", "refused"), [("short", True), ("a" * 40, False)])
def test_an_api_token_has_40_characters(service: Cloudflare, token: str, refused: bool):
    request = asked("pulumi:providers:cloudflare", "cf", news={"apiToken": token})
    checked = service.check_config(request)
    assert bool(checked.failures) == refused
    assert checked.inputs == {"apiToken": Secret(token)}


def test_credentials_are_needed(service: Cloudflare):
    with pytest.raises(Failure, match="must provide one of"):
        service.configure({})


@pytest.mark.parametrize(
    ("token", "inputs", "request_"),
    [
        (cloudflare.TUNNEL, TUN, f"POST accounts/{ACCOUNT}/cfd_tunnel"),
        (cloudflare.RECORD, DNS, f"POST zones/{ZONE}/dns_records"),
    ],
)
def test_what_the_api_token_may_not_make_is_refused(
    service: Cloudflare, token: str, inputs: dict[str, Any], request_: str
):
    (service.directory / "token.json").write_text(json.dumps({request_: 403}))
    with pytest.raises(Failure, match=r'403 Forbidden .*"code": 10000'):
        make(service, token, "a", inputs)
    (service.directory / "token.json").write_text("{}")
    make(service, token, "a", inputs)


@pytest.fixture
def get(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """GETs from the stand-in of Cloudflare's API, for a stack of one tunnel and one record."""
    route = {"hostname": "a.example.org", "service": "http://localhost"}
    account = {"accountId": ACCOUNT, "zones": {"example.org": ZONE, "lab.example.org": "d" * 32}}
    tunnels = {"media": {"routes": [route]}}
    config = {"homelab:cloudflare": account, "homelab:tunnels": tunnels}
    (tmp_path / "project").mkdir()
    (tmp_path / "project/Pulumi.dev.yaml").write_text(json.dumps({"config": config}))

    def get(path: str, bearer: str = "Bearer " + "t" * 40) -> tuple[int, dict[str, Any]]:
        asked = web.Request(
            f"{api.address(tmp_path, 'dev')}/{path}", headers={"Authorization": bearer}
        )
        try:
            with web.urlopen(asked) as answer:
                return answer.status, json.load(answer)
        except HTTPError as refusal:
            with refusal:
                return refusal.code, json.load(refusal)

    return get


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (f"accounts/{ACCOUNT}/cfd_tunnel?per_page=1", 200, None),
        (f"zones/{ZONE}/dns_records", 200, None),
        (f"zones/{'d' * 32}/dns_records", 403, 10000),
        (f"accounts/{ACCOUNT}/access/apps", 403, 10000),
        (f"accounts/{ACCOUNT}/members", 403, 10000),
        ("user/tokens", 403, 10000),
        ("zones", 403, 0),
        (f"accounts/{ACCOUNT}/members?per_page=1", 400, 7003),
        ("zones?per_page=51", 400, 7003),
        ("zones/example.org/dns_records", 400, 7003),
        ("zones?name=example.org", 404, 7000),
        ("accounts", 404, 7000),
    ],
)
def test_what_a_token_with_just_what_is_needed_can_read(
    get: Callable[..., Any], path: str, status: int, code: int | None
):
    found, body = get(path)
    assert found == status
    assert body["success"] == (code is None)
    assert [error["code"] for error in body["errors"]] == ([] if code is None else [code])


def test_who_brings_no_token_reads_nothing(get: Callable[..., Any]):
    for bearer in ("", "t" * 40, "Bearer short"):
        assert get(f"zones/{ZONE}/dns_records", bearer)[0] == 401


TUNNELS = "cloudflare:index/getZeroTrustTunnelCloudflareds:getZeroTrustTunnelCloudflareds"


def test_what_an_account_has_is_listed_without_its_secrets(service: Cloudflare):
    there = {"id": "1", "name": "factory", "accountId": "a", "tunnelSecret": "canary"}
    service.world.put("tunnel/a/factory", there)
    service.world.put("tunnel/b/other", {**there, "accountId": "b"})
    service.world.put("tunnel/a/gone", {**there, "name": "gone", "deletedAt": "2026-01-01"})
    asked_for = {"accountId": "a", "isDeleted": False}
    listed = service.invoke(TUNNELS, asked_for, preview=True)["results"]
    assert listed == [{"id": "1", "name": "factory", "accountId": "a"}]
    with pytest.raises(Failure, match="needs accountId"):
        service.invoke(TUNNELS, {}, preview=True)
    with pytest.raises(Failure, match="does not know"):
        service.invoke(TUNNELS, {**asked_for, "name": "factory"}, preview=True)


# command

BOOT = "import io,json,sys;r=json.load(sys.stdin)"
SSH = "ssh -o BatchMode=yes -o StrictHostKeyChecking=yes -p 22 me@host --"
HOSTCTL = "/var/lib/homelab/hostctl"


@pytest.mark.parametrize(
    ("line", "call"),
    [
        (
            f"{HOSTCTL} k3d ensure",
            command.Call("installed", path=HOSTCTL, arguments=("k3d", "ensure")),
        ),
        (
            f"{SSH} sudo -n {HOSTCTL} k3d ensure",
            command.Call("installed", HOSTCTL, ("k3d", "ensure"), address="host"),
        ),
        (
            f"python3 -c '{BOOT}'",
            command.Call("shipped"),
        ),
        (
            f"{SSH} 'python3 -c '\"'\"'{BOOT}'\"'\"''",
            command.Call("shipped", address="host"),
        ),
        (
            f"{SSH.removesuffix('me@host --')} -- me@host {HOSTCTL} k3d ensure",
            command.Call("installed", HOSTCTL, ("k3d", "ensure"), address="host"),
        ),
        (f"sudo -n python3 -c 'import sys' {HOSTCTL}", command.Call("install", path=HOSTCTL)),
    ],
)
def test_calls_of_hostctl_are_understood(line: str, call: command.Call):
    assert command.parse(line) == call


@pytest.mark.parametrize(
    ("line", "first"),
    [
        ("rm -rf /", "rm"),
        (f"{HOSTCTL} k3d ensure; rm -rf /", HOSTCTL),
        (f"{HOSTCTL} k3d ensure && true", HOSTCTL),
        (f"cat x | {HOSTCTL} k3d ensure", "cat"),
        (f"{HOSTCTL}", HOSTCTL),
        (f"sudo {HOSTCTL} k3d ensure", "sudo"),
        (f"python3 -c '{BOOT}' files read", "python3"),
        ("python3 x.py", "python3"),
        (f"ssh me@host -- {HOSTCTL} k3d ensure", "ssh"),
        (f"ssh -o BatchMode=yes me@host -- {HOSTCTL} k3d ensure", "ssh"),
        (SSH.replace("--", HOSTCTL), "ssh"),
        (f"{SSH.replace('-p 22', '-A')} {HOSTCTL} k3d ensure", "ssh"),
        (f"{SSH} rm -rf /", "rm"),
        ("echo 'open", "echo"),
        ("", "an empty line"),
    ],
)
def test_every_other_command_is_refused(line: str, first: str):
    with pytest.raises(Failure) as refused:
        command.parse(line)
    assert str(refused.value).startswith(f"a rehearsal runs no host command: {first}")


class Machine:
    """Stands for the make-believe host: files and nothing else."""

    def __init__(self, world: Path) -> None:
        self.world = world

    def exists(self, path: str) -> bool:
        return (self.world / path.lstrip("/")).exists()

    def make_directory(self, path: str, mode: int) -> None:
        (self.world / path.lstrip("/")).mkdir(parents=True)

    def write_atomic(self, path: str, content: bytes, mode: int) -> None:
        (self.world / path.lstrip("/")).write_bytes(content)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts a hostctl in place that echoes, and returns its program's text."""
    text = "# hostctl\n"
    program = types.ModuleType("hostctl.program")
    program.__dict__["text"] = lambda: text
    program.__dict__["packed"] = lambda: text
    cli = types.ModuleType("hostctl.cli")

    def main(argv: list[str], stdin: Any, machine: Machine) -> int:
        spec = json.load(stdin)
        print("progress", file=sys.stderr)
        print(json.dumps({"argv": argv, "spec": spec}))
        return spec.get("code", 0)

    cli.__dict__["main"] = main
    package = types.ModuleType("hostctl")
    package.__dict__.update(cli=cli, program=program)
    machine = types.ModuleType("rehearsal.machine")
    machine.__dict__["RehearsalMachine"] = Machine
    monkeypatch.setitem(sys.modules, "hostctl", package)
    monkeypatch.setitem(sys.modules, "hostctl.cli", cli)
    monkeypatch.setitem(sys.modules, "hostctl.program", program)
    monkeypatch.setitem(sys.modules, "rehearsal.machine", machine)
    monkeypatch.delenv("HOMELAB_REHEARSAL_RUN", raising=False)
    return text


def run(provider: command.Command, line: str, stdin: str, **inputs: Any) -> dict[str, Any]:
    given = {"create": line, "stdin": stdin, **inputs}
    _, outputs = provider.create(asked("command:local:Command", "c", news=given))
    return outputs


def test_a_rehearsal_installs_and_runs_hostctl_in_process(tmp_path: Path, host: str):
    provider = command.Command(tmp_path)
    with pytest.raises(Failure, match=r"exit status 127: .*\n.*hostctl: not found"):
        run(provider, f"{HOSTCTL} k3d ensure", "{}")
    installing = f"python3 -c 'import sys' {HOSTCTL}"
    with pytest.raises(Failure, match="not this checkout's hostctl"):
        run(provider, installing, "another program")
    run(provider, installing, host)
    outputs = run(provider, f"{HOSTCTL} k3d ensure", '{"name": "factory"}')
    assert json.loads(outputs["stdout"]) == {
        "argv": ["k3d", "ensure"],
        "spec": {"name": "factory"},
    }
    assert outputs["stderr"] == "progress"


def test_a_rehearsal_runs_what_is_shipped(tmp_path: Path, host: str):
    provider = command.Command(tmp_path)
    line = f"python3 -c '{BOOT}'"
    questions = [(["files", "read"], {"files": []}), (["k3d", "inspect"], {"name": "factory"})]
    args = {"command": line, "stdin": json.dumps({"program": host, "questions": questions})}
    returned = provider.invoke("command:local:run", args, preview=True)
    assert [json.loads(line) for line in returned["stdout"].splitlines()] == [
        {"argv": [*verb, "--exit-zero"], "spec": spec} for verb, spec in questions
    ]
    args["stdin"] = json.dumps({"program": "other", "questions": []})
    with pytest.raises(Failure, match="not this checkout's hostctl"):
        provider.invoke("command:local:run", args, preview=True)


def test_a_command_that_fails_tells_its_line_and_what_it_wrote(tmp_path: Path, host: str):
    provider = command.Command(tmp_path)
    run(provider, f"python3 -c 'import sys' {HOSTCTL}", host)
    with pytest.raises(Failure) as failed:
        run(provider, f"{HOSTCTL} k3d ensure", '{"code": 3}')
    assert str(failed.value) == (
        f'exit status 3: running "{HOSTCTL} k3d ensure":\n'
        'progress\n{"argv": ["k3d", "ensure"], "spec": {"code": 3}}\n'
    )


@pytest.mark.parametrize(
    ("logging", "lines"),
    [(None, ["out", "err"]), ("stdout", ["out"]), ("stderr", ["err"]), ("none", [])],
)
def test_logging_shows_the_streams_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logging: str | None, lines: list[str]
):
    monkeypatch.setenv("HOMELAB_REHEARSAL_RUN", "1")
    logged: list[tuple[str, bool]] = []
    provider = command.Command(
        tmp_path, lambda message, urn, severity, ephemeral: logged.append((message, ephemeral))
    )
    inputs = {} if logging is None else {"logging": logging}
    run(provider, "echo out; echo err >&2", "", **inputs)
    assert logged == [(line, True) for line in lines]


@pytest.mark.parametrize(
    ("extra", "written"), [({}, "before"), ({"addPreviousOutputInEnv": False}, "")]
)
def test_an_update_gets_what_the_run_before_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], written: str
):
    monkeypatch.setenv("HOMELAB_REHEARSAL_RUN", "1")
    news = {"create": "false", "update": 'echo "$PULUMI_COMMAND_STDOUT"', **extra}
    olds = {"create": "false", "stdout": "before", "stderr": ""}
    update = asked("command:local:Command", "c", olds=olds, news=news)
    assert command.Command(tmp_path).update(update)["stdout"] == written


def test_a_deletion_runs_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOMELAB_REHEARSAL_RUN", "1")
    mark = tmp_path / "mark"
    stored = {
        "delete": 'cat > "$MARK"',
        "environment": Secret({"MARK": str(mark)}),
        "stdin": Secret("stored"),
    }
    deletion = asked("command:local:Command", "c", olds=stored, old_inputs={"delete": "false"})
    command.Command(tmp_path).delete(deletion)
    assert mark.read_text() == "stored"


def test_a_rehearsal_takes_no_interpreter(tmp_path: Path, host: str):
    with pytest.raises(Failure, match="runs no command with interpreter"):
        run(command.Command(tmp_path), f"{HOSTCTL} k3d ensure", "{}", interpreter=["bash"])


def test_a_function_needs_its_arguments(tmp_path: Path):
    with pytest.raises(Failure, match="Missing required field 'command' on 'Run'"):
        command.Command(tmp_path).invoke("command:local:run", {}, preview=False)
