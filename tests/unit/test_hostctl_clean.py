"""hostctl clean, on the make-believe machine: what nothing references goes, all else stays."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hostctl.machine import Ran
from tests.unit.test_hostctl import NODE, Host

ANONYMOUS = {"Labels": {"com.docker.volume.anonymous": ""}}
OLD, NEW, NAMED, SHARE, TAKEN = "a" * 64, "b" * 64, "media_config", "c" * 64, "d" * 64
DAY = 86400


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    return host


@pytest.fixture
def full(live: Host) -> Host:
    """A host with something of everything that `clean` looks at."""
    used = {"id": "sha256:1", "repoTags": ["pause:3.6"], "size": "700", "used": True}
    unused = {"id": "sha256:2", "repoTags": ["app:1"], "size": "5000", "used": False}
    live.edit(lambda cluster: cluster.update(images=[used, unused]))
    orphans: dict[str, Any] = {
        OLD: {},
        NEW: ANONYMOUS,
        NAMED: {"Labels": {"com.docker.compose.project": "media"}},
        SHARE: {"Options": {"type": "nfs"}},
    }
    live.machine.set("orphans.json", orphans)
    live.machine.set("volumes.json", [*live.machine.setting("volumes.json", []), *orphans, TAKEN])
    live.machine.set("dangling.json", {"sha256:9": 1000})
    live.machine.set("build-cache", "1.5GB")
    return live


def write(host: Host, path: str, content: str = "x") -> None:
    host.machine.make_directory(path.rpartition("/")[0], 0o755)
    host.machine.write_atomic(path, content.encode(), 0o644)


def names(items: list[dict[str, Any]]) -> list[str]:
    return [item["name"] for item in items]


def test_a_dry_run_shows_all_with_sizes_and_removes_nothing(full: Host) -> None:
    write(full, f"/var/lib/docker/volumes/{OLD}/_data/file", "x" * 300)
    before = {name: full.machine.setting(name, None) for name in ("volumes.json", "dangling.json")}
    shown = full("clean factory --dry-run")
    assert shown["nodes"] == {NODE: [{"name": "app:1", "bytes": 5000}]}
    assert shown["images"] == [{"name": "sha256:9", "bytes": 1000}]
    assert shown["volumes"] == [{"name": OLD, "bytes": 300}, {"name": NEW, "bytes": 0}]
    assert shown["build_cache"] == "1.5GB"
    assert f"would remove 2 orphaned volumes, 0.0 MiB\nhostctl:   {OLD}" in full.said
    assert len(full.cluster["images"]) == 2
    assert before == {name: full.machine.setting(name, None) for name in before}
    changing = [call for call in full.calls if {"rm", "rmi", "prune"} & set(call)]
    assert changing == []


def test_the_option_holds_for_a_spec_on_stdin_too(full: Host) -> None:
    assert full("clean --dry-run", {"name": "factory"})["dry_run"]
    assert full.machine.setting("build-cache", "") == "1.5GB"


def test_incident_11_what_nothing_references_goes_and_is_listed(full: Host) -> None:
    shown, removed = full("clean factory --dry-run"), full("clean factory")
    assert {**shown, "dry_run": False} == removed
    assert [image["id"] for image in full.cluster["images"]] == ["sha256:1"]
    assert full.machine.setting("dangling.json", None) == {}
    left = full.machine.setting("volumes.json", [])
    assert left == ["k3d-factory-images", NAMED, SHARE, TAKEN]
    again = full("clean factory")
    assert (again["nodes"], again["images"], again["volumes"]) == ({NODE: []}, [], [])


def test_an_orphan_is_told_on_a_docker_before_23_by_its_name(full: Host) -> None:
    """Which labels nothing, and whose `volume prune` takes named volumes too."""
    assert OLD in names(full("clean factory")["volumes"])
    assert not [call for call in full.calls if call[:3] == ["docker", "volume", "prune"]]


def test_a_datastore_that_lost_its_node_is_kept_for_30_days(full: Host) -> None:
    write(full, f"/var/lib/docker/volumes/{OLD}/_data/server/db/state.db")
    kept = full("clean factory")
    assert names(kept["kept"]) == [OLD]
    assert names(kept["volumes"]) == [NEW]
    full.machine.sleep(31 * DAY)
    assert names(full("clean factory")["volumes"]) == [OLD]


def test_nothing_of_a_stopped_node_is_touched(full: Host) -> None:
    full("k3d stop factory")
    cleaned = full("clean factory")
    assert (cleaned["skipped"], cleaned["nodes"]) == ([NODE], {})
    assert len(full.cluster["images"]) == 2
    assert not [call for call in full.calls if call[:2] == ["docker", "exec"]]
    # The host itself is cleaned, of what no stopped container references either.
    assert full.machine.setting("volumes.json", [])[0] == "k3d-factory-images"
    assert names(cleaned["volumes"]) == [OLD, NEW]


def test_a_dangling_image_of_a_stopped_container_stays(full: Host) -> None:
    full("k3d stop factory")
    (facts,) = full.machine._all_containers()
    full.machine.set("dangling.json", {facts["Image"]: 5, "sha256:9": 1})
    assert names(full("clean factory --dry-run")["images"]) == ["sha256:9"]
    assert names(full("clean factory")["images"]) == ["sha256:9"]


def test_an_image_that_went_away_since_and_a_line_that_is_no_image_are_passed_over(
    full: Host,
) -> None:
    run = full.machine.run

    def docker(argv: Sequence[str], **options: Any) -> Ran:
        ran = run(argv, **options)
        if list(argv[1:4]) == ["image", "ls", "--quiet"]:
            return ran._replace(out=ran.out + b"sha256:7\n")
        if "{{.Id}} {{.Size}}" in argv:
            return ran._replace(out=b"WARNING: deprecated\n" + ran.out)
        return ran

    full.machine.run = docker  # type: ignore[method-assign]
    assert names(full("clean factory --dry-run")["images"]) == ["sha256:9"]


def test_another_clusters_nodes_are_not_entered(full: Host) -> None:
    other = json.loads(json.dumps(full.cluster).replace("factory", "other"))
    full.machine.world.put("clusters/other", other)
    assert list(full("clean factory")["nodes"]) == [NODE]
    assert not any("k3d-other-server-0" in call for call in full.calls if "exec" in call)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda host: host("k3d delete factory --confirm factory"), 3),
        (lambda host: host.machine.world.delete("clusters/factory"), 4),
        (lambda host: host.edit_node(disconnected=True), 4),
        (lambda host: (host.machine.root / "docker-down").touch(), 4),
    ],
    ids=["absent", "nodes gone", "partial", "Docker down"],
)
def test_beside_a_cluster_that_is_not_whole_nothing_is_removed(
    full: Host, spoil: Any, code: int
) -> None:
    spoil(full)
    before = full.machine.setting("volumes.json", [])
    assert full("clean factory", code=code)["remedy"]
    assert full.machine.setting("volumes.json", []) == before
    assert full.machine.setting("build-cache", "") == "1.5GB"


def test_a_part_that_fails_does_not_keep_the_others_from_being_cleaned(full: Host) -> None:
    run = full.machine.run

    def failing(argv: Any, **options: Any) -> Ran:
        if "crictl" in argv:
            return Ran(1, b"", b"crictl: connection refused\n")
        return run(argv, **options)

    full.machine.run = failing  # type: ignore[method-assign]
    error = full("clean factory", code=5)
    assert f"removing unused images in {NODE}: crictl: connection refused" in error["cause"]
    assert full.machine.setting("dangling.json", None) == {}
    assert full.machine.setting("build-cache", "") == "0B"


def test_a_volume_that_came_into_use_meanwhile_stays_and_is_not_listed(full: Host) -> None:
    run = full.machine.run

    def taken(argv: Any, **options: Any) -> Ran:
        if list(argv[:3]) == ["docker", "volume", "rm"]:
            return Ran(1, b"", b"Error response from daemon: remove x: volume is in use - [1]\n")
        return run(argv, **options)

    full.machine.run = taken  # type: ignore[method-assign]
    assert full("clean factory")["volumes"] == []
