"""A new image for a cluster's node, on the make-believe machine: k3s there refuses a datastore with
another token, another node password, or one that a newer release migrated."""

import contextlib
import io
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from hostctl import cli
from hostctl.k3d import k3d_config
from hostctl.machine import Machine
from hostctl.record import read_record
from hostctl.spec import cluster_spec
from tests.unit.test_hostctl import NODE, SPEC, Host, Killed

OLD, NEW = SPEC["image"], "rancher/k3s:v1.32.3-k3s1"
DATA = "/mnt/img_pool/k3d/storage-server/server-0"
TOKEN = "K3S_TOKEN="


def incumbent(root: Path) -> Host:
    """A cluster that was made without hostctl: its datastore is in the node's own volume."""
    host = Host(root)
    config = k3d_config(cluster_spec(SPEC, "test"), "none")
    del config["volumes"][2]
    host.machine.make_directory("/var/lib/homelab/clusters/factory", 0o755)
    resolvers = b"nameserver 1.1.1.1\nnameserver 9.9.9.9\n"
    host.machine.write_atomic("/var/lib/homelab/clusters/factory/resolv.conf", resolvers, 0o644)
    host.machine.make_directory(SPEC["storage_dir"], 0o755)
    host.machine.create_cluster(config)
    host.up()
    return host


def ours(root: Path) -> Host:
    host = Host(root)
    host.up()
    return host


def with_markers(host: Host) -> Host:
    (node,) = host.cluster["nodes"]
    host.machine.write_atomic(f"{host.machine._data(node)}/marker", b"of the datastore", 0o600)
    host.machine.write_atomic(f"{SPEC['storage_dir']}/marker", b"of a volume", 0o600)
    return host


def datastore(host: Host) -> dict[str, Any]:
    (node,) = host.cluster["nodes"]
    data = host.machine._data(node)
    assert host.machine.read(f"{data}/marker") == b"of the datastore"
    assert host.machine.read(f"{SPEC['storage_dir']}/marker") == b"of a volume"
    return json.loads(host.machine.read(f"{data}/db/state.db"))


@pytest.fixture(params=[incumbent, ours])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return with_markers(request.param(tmp_path))


def give_another_identity(host: Host) -> None:
    """Makes the new node be another cluster, which is seen as soon as it is up."""
    ca, true_open = host.cluster["ca"], host.machine._open_datastore

    def another(cluster: Any, node: Any) -> str | None:
        ended = true_open(cluster, node)
        cluster["ca"] = "YW5vdGhlciBDQQ==" if node["image"] == NEW else ca
        return ended

    host.machine._open_datastore = another  # type: ignore[method-assign]


def definition(host: Host) -> dict[str, Any]:
    """What a node was made with, but for its image and what the swap is for."""
    (node,) = host.cluster["nodes"]
    facts = host.machine._facts(host.cluster, node)
    labels = {key: value for key, value in node["labels"].items() if key != "homelab.swap"}
    binds = [bind for bind in node["binds"] if not bind.endswith("/k3s/server")]
    config = {**facts["Config"], "Labels": labels, "Image": ""}
    return {"config": config, "host": {**facts["HostConfig"], "Binds": binds}}


def test_a_swap_is_foretold_and_keeps_the_cluster(live: Host) -> None:
    before, made = live.inspect(), definition(live)
    seen = live.inspect(image=NEW)
    (difference,) = seen["differences"]
    assert (difference["key"], difference["fixed"]) == ("image", False)
    assert "backed up" in difference["remedy"]
    assert "comes back by itself" in difference["remedy"]
    assert seen["incarnation"] == before["incarnation"]
    live.up(image=NEW)
    after = live.inspect(image=NEW)
    assert after["differences"] == []
    assert [after[key] for key in ("state", "identity", "incarnation", "generation")] == [
        *(before[key] for key in ("state", "identity", "incarnation")),
        before["generation"] + 1,
    ]
    assert after["live"]["image"] == NEW
    assert after["live"]["datastore_dir"] == os.path.dirname(DATA)
    assert definition(live) == made
    assert datastore(live)["release"] == [1, 32, 3, 3, 1]
    stat = live.machine.stat(os.path.dirname(DATA))
    assert stat
    assert (stat.mode, stat.owner) == (0o700, "root")
    live.up(image=NEW)
    assert live.changed == []


def test_a_swap_leaves_a_verified_backup_and_no_container_or_volume(live: Host) -> None:
    live.up(image=NEW)
    record = read_record(live.machine, "factory")
    sums = live.machine.read(f"{record['backup']}/SHA256SUMS").decode()
    assert live.machine.checksum(f"{record['backup']}/datastore.tar") in sums
    assert record["swap"] is None
    assert [node["name"] for node in live.cluster["nodes"]] == [NODE]
    volumes = live.machine._file("/var/lib/docker/volumes")
    assert not volumes.exists() or list(volumes.iterdir()) == []
    assert live.machine.stat(f"{record['backup']}").mode == 0o700  # type: ignore[union-attr]


def test_the_clusters_token_is_in_no_argument_message_or_record(live: Host) -> None:
    (token,) = (one[len(TOKEN) :] for one in live.cluster["nodes"][0]["env"])
    live("k3d ensure", SPEC | {"image": NEW})
    assert token not in json.dumps(live.calls)
    assert token not in live.said
    assert token not in live.machine.read("/var/lib/homelab/clusters/factory.json").decode()


def test_a_second_swap_works_as_the_first(live: Host) -> None:
    live.up(image=NEW)
    identity = live.inspect(image=NEW)["identity"]
    third = "rancher/k3s:v1.33.1-k3s1"
    live.up(image=third)
    assert live.inspect(image=third)["identity"] == identity
    assert datastore(live)["release"] == [1, 33, 1, 3, 1]


def test_a_stopped_cluster_can_be_swapped(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    live.up(image=NEW)
    assert live.inspect(image=NEW)["differences"] == []


@pytest.mark.parametrize("image", ["v1.31.5-k3s2", "v1.31.14-k3s1", "v1.32.0-k3s1", NEW[12:]])
def test_patches_and_the_next_minor_are_allowed(live: Host, image: str) -> None:
    (difference,) = live.inspect(image=f"rancher/k3s:{image}")["differences"]
    assert difference["fixed"] is False


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"image": "rancher/k3s:v1.31.4-k3s1"}, "does not go back to an older version"),
        ({"image": "rancher/k3s:v1.30.9-k3s1"}, "does not go back to an older version"),
        ({"image": "rancher/k3s:v1.33.0-k3s1"}, "one minor version at a time"),
        ({"image": "rancher/k3s:v2.0.0-k3s1"}, "one minor version at a time"),
        ({"image": "rancher/k3s:stable"}, "must name a release of k3s"),
    ],
)
def test_other_images_are_refused_with_what_is_allowed(
    live: Host, change: dict[str, Any], why: str
) -> None:
    (difference,) = live.inspect(**change)["differences"]
    assert difference["fixed"] is True
    assert why in difference["remedy"]
    assert "set cluster.recreate" in difference["remedy"]
    live("k3d ensure", SPEC | change, code=3)
    assert live.changed == []


def test_what_is_allowed_is_named(live: Host) -> None:
    (difference,) = live.inspect(image="rancher/k3s:v1.33.0-k3s1")["differences"]
    assert "v1.31.5 or newer of v1.31, or any v1.32" in difference["why"]


def test_nodes_of_a_cluster_with_several_are_not_swapped(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.up(agents=1)
    (difference,) = host.inspect(agents=1, image=NEW)["differences"]
    assert difference["fixed"] is True
    assert "only the node of a cluster that has one" in difference["remedy"]


def test_a_fixed_difference_beside_the_image_is_refused_before_anything(live: Host) -> None:
    live("k3d ensure", SPEC | {"image": NEW, "disable": ["traefik"]}, code=3)
    assert live.changed == []


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (("free", 2**20), "has room for"),
        (("no-pull.json", [NEW]), "docker load --input"),
    ],
)
def test_what_can_be_known_before_is_refused_before_the_node_is_stopped(
    live: Host, world: tuple[str, Any], words: str
) -> None:
    live.machine.set(*world)
    error = live("k3d ensure", SPEC | {"image": NEW}, code=5 if "pull" in world[0] else 3)
    assert words in error["cause"] + error["remedy"]
    assert live.changed == []
    assert live.inspect()["differences"] == []


def test_an_image_that_was_loaded_is_not_pulled(live: Host) -> None:
    live.machine.set("no-pull.json", [NEW])
    live.machine.set("images.json", [NEW])
    live.up(image=NEW)
    assert live.inspect(image=NEW)["differences"] == []


def steady(seen: dict[str, Any]) -> dict[str, Any]:
    """What was seen, without how far two clocks are apart at the moment."""
    live = {key: value for key, value in seen["live"].items() if key != "clock_skew_seconds"}
    return {**seen, "live": live}


def test_a_node_that_does_not_come_up_is_taken_back_and_not_tried_again(live: Host) -> None:
    before, made = live.inspect(), definition(live)
    live.machine.set("broken-images.json", [NEW])
    error = live("k3d ensure", SPEC | {"image": NEW}, code=5)
    assert f"The cluster is back on {OLD}" in error["cause"]
    assert "hostctl k3d retry factory" in error["remedy"]
    assert steady(live.inspect()) == steady(before)
    assert definition(live) == made
    # The new node had migrated it.
    assert datastore(live)["release"] == [1, 31, 5, 3, 1]
    failed = read_record(live.machine, "factory")["swap_failed"]
    assert b"preparing server" in live.machine.read(f"{failed['backup']}/node.log")
    (kept,) = live.machine._file(os.path.dirname(DATA)).glob("server-0.failed-*")
    assert json.loads((kept / "db/state.db").read_text())["release"] == [1, 32, 3, 3, 1]

    (difference,) = live.inspect(image=NEW)["differences"]
    assert difference["fixed"] is True
    assert "failed: " in difference["why"]
    live("k3d ensure", SPEC | {"image": NEW}, code=3)
    assert live.changed == []

    live.machine.set("broken-images.json", [])
    assert live("k3d retry", {"name": "factory"})["forgotten"] == NEW
    live.up(image=NEW)
    assert live.inspect(image=NEW)["identity"] == before["identity"]
    assert datastore(live)["release"] == [1, 32, 3, 3, 1]


def test_a_swap_that_failed_does_not_stand_in_the_way_of_another_image(live: Host) -> None:
    live.machine.set("broken-images.json", [NEW])
    live("k3d ensure", SPEC | {"image": NEW}, code=5)
    other = "rancher/k3s:v1.32.4-k3s1"
    live.up(image=other)
    assert live.inspect(image=other)["differences"] == []
    assert read_record(live.machine, "factory")["swap_failed"] is None


def test_a_node_with_another_identity_is_taken_back(live: Host) -> None:
    """As when the datastore that it was given is not the old one."""
    give_another_identity(live)
    error = live("k3d ensure", SPEC | {"image": NEW}, code=5)
    assert "its identity is" in error["cause"]
    assert live.inspect()["differences"] == []


def test_docker_that_stops_answering_is_waited_for_by_the_next_run(live: Host) -> None:
    identity, true_run = live.inspect()["identity"], live._run

    def run(argv: Any, **options: Any) -> Any:
        if list(argv[:2]) == ["docker", "rename"]:
            (live.machine.root / "docker-down").touch()
        return true_run(argv, **options)

    live._run = run
    # A rename that Docker does not answer is a failed step; what follows cannot tell.
    live("k3d ensure", SPEC | {"image": NEW}, code=4)
    live._run = true_run
    (live.machine.root / "docker-down").unlink()
    with contextlib.suppress(AssertionError):
        live("k3d ensure", SPEC | {"image": NEW})
    assert live.inspect()["identity"] == identity
    assert datastore(live)


def test_a_stranger_in_the_nodes_place_is_left_alone(live: Host) -> None:
    killed(live, {"image": NEW}, after=["docker", "rename"])
    stranger = {"Id": "x" * 64, "Name": f"/{NODE}", "Config": {"Image": "a", "Labels": {}}}
    live.machine.world.put(f"containers/{NODE}", stranger)
    error = live("k3d ensure", SPEC | {"image": NEW}, code=4)
    assert "another container than the one" in error["cause"]
    assert live.machine.world.get(f"containers/{NODE}") == stranger


def killed(host: Host, change: dict[str, Any], *, number: int = 0, after: Any = None) -> bool:
    """Runs ensure, killed before its `number`-th contact with the machine, or after a command."""
    count, true_run = 0, host._run

    class Trap:
        def __getattr__(self, name: str) -> Any:
            attribute = getattr(host.machine, name)
            if not callable(attribute):
                return attribute

            def touched(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    raise Killed
                return attribute(*arguments, **options)

            return touched

    def run(argv: Any, **options: Any) -> Any:
        ran = true_run(argv, **options)
        if after and list(argv[: len(after)]) == after:
            raise Killed
        return ran

    host._run = run
    silent = io.StringIO()
    trap: Any = Trap()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            cli.main(["k3d", "ensure"], io.StringIO(json.dumps(SPEC | change)), trap)
    except Killed:
        return True
    finally:
        host._run = true_run
    return False


@pytest.mark.parametrize(
    ("made", "works"), [(incumbent, True), (ours, False)], ids=["works", "fails"]
)
def test_killed_before_any_contact_with_the_machine_and_run_again(
    tmp_path: Path, made: Any, works: bool
) -> None:
    number, ended = 0, set()
    while True:
        number += 1
        host = with_markers(made(tmp_path / str(number)))
        identity = host.inspect()["identity"]
        if not works:
            give_another_identity(host)
        cut_off = killed(host, {"image": NEW}, number=number)
        # Looking never fails on what a kill has left.
        seen = host.inspect(image=NEW)
        assert seen["identity"] == identity or not works
        if read_record(host.machine, "factory").get("swap"):
            assert "up continues it" in seen["differences"][0]["remedy"]
        with contextlib.suppress(AssertionError):
            host("k3d ensure", SPEC | {"image": NEW})
        last = host.inspect(image=NEW if works else OLD)
        assert (last["state"], last["identity"], last["differences"]) == ("running", identity, [])
        release = datastore(host)["release"]
        ended.add(json.dumps([release, [node["name"] for node in host.cluster["nodes"]]]))
        failed = read_record(host.machine, "factory").get("swap_failed") or {}
        assert failed.get("image") == (None if works else NEW)
        if not cut_off:
            break
    assert number > 50
    assert len(ended) == 1


STEPS = [
    ["docker", "stop"],
    ["tar", "--list"],
    ["docker", "rename"],
    ["docker", "cp", "--archive"],
    ["docker", "start"],
]


@pytest.mark.parametrize("after", STEPS, ids=" ".join)
def test_settings_taken_back_half_way_bring_the_old_node_back(live: Host, after: Any) -> None:
    before = live.inspect()
    assert killed(live, {"image": NEW}, after=after)
    live.up()
    assert live.inspect()["identity"] == before["identity"]
    assert live.inspect()["differences"] == []
    assert live.inspect()["live"]["image"] == OLD
    assert datastore(live)["release"] == [1, 31, 5, 3, 1]
    assert read_record(live.machine, "factory").get("swap_failed") is None


@pytest.mark.parametrize("after", STEPS, ids=" ".join)
def test_start_finishes_a_swap_after_a_power_cut(live: Host, after: Any) -> None:
    identity = live.inspect()["identity"]
    assert killed(live, {"image": NEW}, after=after)
    live("k3d start", {"name": "factory"})
    seen = live.inspect(image=NEW)
    assert (seen["identity"], seen["differences"]) == (identity, [])
    assert datastore(live)["release"] == [1, 32, 3, 3, 1]


def test_a_delete_takes_the_kept_node_too_and_no_swap_is_left(live: Host) -> None:
    killed(live, {"image": NEW}, after=["docker", "rename"])
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    live.up(image=NEW)
    assert live.inspect(image=NEW)["differences"] == []


def test_a_new_cluster_never_starts_on_the_datastore_of_an_earlier_one(tmp_path: Path) -> None:
    host = with_markers(ours(tmp_path))
    host("k3d delete", {"name": "factory", "confirm": "factory"})
    host.up()
    assert host.inspect()["incarnation"].endswith("-2")
    (kept,) = host.machine._file(os.path.dirname(DATA)).glob("server-0.*")
    assert (kept / "marker").read_bytes() == b"of the datastore"


def test_each_server_has_its_own_directory(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.machine.docker_world.delete("network/k3d-factory")
    host.up(servers=3)
    held = [host.machine._data(node) for node in host.cluster["nodes"] if node["role"] == "server"]
    assert held == [f"{os.path.dirname(DATA)}/server-{number}" for number in range(3)]


@pytest.mark.parametrize("path", ["/mnt/img_pool/k3d", "/mnt/img_pool/k3d/storage/server"])
def test_volumes_and_datastore_are_not_inside_each_other(tmp_path: Path, path: str) -> None:
    error = Host(tmp_path)("k3d ensure", SPEC | {"datastore_dir": path}, code=2)
    assert "datastore_dir: inside storage_dir or around it" in error["cause"]


def test_secrets_encryption_is_an_argument_of_the_servers(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.up(secrets_encryption=True)
    assert "--secrets-encryption" in host.cluster["nodes"][0]["cmd"]
    assert host.inspect(secrets_encryption=True)["differences"] == []
    (difference,) = host.inspect()["differences"]
    assert (difference["key"], difference["live"]) == ("secretsEncryption", True)


def test_real_machine_asks_a_service_on_a_socket_file(tmp_path: Path) -> None:
    heard: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as service:
        service.bind(str(tmp_path / "docker.sock"))
        service.listen(1)

        def answer() -> None:
            asked, _ = service.accept()
            with asked:
                while b'"token"' not in b"".join(heard):
                    heard.append(asked.recv(65536))
                asked.sendall(b'HTTP/1.1 201 Created\r\nContent-Length: 11\r\n\r\n{"Id": "1"}')

        thread = threading.Thread(target=answer)
        thread.start()
        given = {"Env": ["token"]}
        made = Machine().post(str(tmp_path / "docker.sock"), "/v1.41/containers/create", given)
        thread.join(10)
    assert made == (201, '{"Id": "1"}')
    assert b"POST /v1.41/containers/create HTTP/1.0" in heard[0]
    with pytest.raises(OSError, match="No such file"):
        Machine().post(str(tmp_path / "absent.sock"), "/", {})


def test_real_machine_renames_directories_and_never_over_one_with_content(tmp_path: Path) -> None:
    machine, one, other = Machine(), tmp_path / "one", tmp_path / "other"
    one.mkdir()
    (one / "file").touch()
    other.mkdir()
    assert machine.is_empty(str(other))
    assert machine.is_empty(str(tmp_path / "absent"))
    machine.rename(str(one), str(other))
    assert not machine.is_empty(str(other))
    one.mkdir()
    with pytest.raises(OSError, match="not empty"):
        machine.rename(str(one), str(other))
