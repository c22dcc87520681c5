"""hostctl backup restore, on the make-believe machine, from the backups beside the storage
directory. Targets, with a real restic: tests/cluster/test_backups.py.
"""

import json
from typing import Any

import pytest

from tests.unit.test_hostctl import Host, Killed
from tests.unit.test_hostctl_backup import (
    BACKUPS,
    DATA,
    DATABASE,
    STORAGE,
    VOLUME,
    get,
    kept,
    live,
    put,
    replicas,
    run,
    write,
)

__all__ = ["live"]
WORKLOAD = "factory/statefulset/skillai-db"
H2 = f"{STORAGE}/{DATA}/h2/keycloakdb.mv.db"


def restore(host: Host, item: dict[str, Any], code: int = 0, **more: Any) -> Any:
    spec = {"cluster": "factory", "items": [VOLUME, DATABASE], "item": item["name"]}
    return host("backup restore", spec | more, code)


def databases(host: Host) -> Any:
    return host.machine.setting("databases.json", {})["factory/statefulset/skillai-db"]


def lost(live: Host) -> None:
    """Someone deleted the file, and nothing wrote since."""
    live.machine.remove(H2)


def test_a_volume_comes_back_while_its_workload_rests_and_what_was_there_is_kept(
    live: Host,
) -> None:
    run(live, VOLUME)
    lost(live)
    write(live, f"{STORAGE}/{DATA}/left", "over")
    done = restore(live, VOLUME, confirm="factory")
    assert done["restored"] == f"{STORAGE}/{DATA}"
    assert live.machine.read(H2) == b"H2"
    assert replicas(live) == 2
    (before,) = [name for name in live.machine.names(STORAGE) if ".before-" in name]
    assert live.machine.read(f"{STORAGE}/{before}/left") == b"over"
    scaled = [call for call in live.calls if "scale" in call]
    assert [call[-1] for call in scaled[-2:]] == ["--replicas=0", "--replicas=2"]


def test_files_that_are_newer_than_the_backups_are_not_overwritten_unless_it_is_told(
    live: Host,
) -> None:
    run(live, VOLUME)
    live.machine.sleep(60)
    write(live, H2, "newer")
    # Unpacked files bear the time of their original, which the make-believe tar does not keep.
    original = live.machine.newest
    live.machine.newest = lambda path: (  # type: ignore[method-assign]
        0.0 if path.endswith(".restoring") else original(path)
    )
    error = restore(live, VOLUME, code=3)
    assert "--confirm factory" in error["remedy"]
    assert live.machine.read(H2) == b"newer"
    assert live.machine.names(f"{STORAGE}/{DATA}.restoring") == []
    assert replicas(live) == 2
    restore(live, VOLUME, confirm="factory")
    assert live.machine.read(H2) == b"H2"


def test_a_volume_that_a_pod_uses_is_not_swapped(live: Host) -> None:
    run(live, VOLUME)
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "keycloak-data"}}]
    put(live, "factory/Pod/job-1", {"volumes": volumes})
    error = restore(live, VOLUME, code=3, confirm="factory")
    assert error["cause"] == "pods use it: job-1"
    assert get(live, "factory/Pod/job-1")


def test_a_damaged_backup_is_not_restored(live: Host) -> None:
    file = run(live, VOLUME)["items"]["keycloak"]["file"]
    live.machine.write_atomic(file, b"damaged", 0o600)
    error = restore(live, VOLUME, code=5, confirm="factory")
    assert "the checksum of" in error["cause"]
    assert live.machine.read(H2) == b"H2"


def test_a_database_is_restored_beside_the_one_that_is_there_and_over_no_other(live: Host) -> None:
    run(live, DATABASE)
    assert restore(live, DATABASE)["restored"] == "skillai_restored"
    assert databases(live)["skillai_restored"]["content"] == "rows"
    error = restore(live, DATABASE, code=5)
    assert 'database "skillai_restored" already exists' in error["cause"]
    restore(live, DATABASE, confirm="factory")
    assert databases(live)["skillai"]["content"] == "rows"


def alter(host: Host, **changes: Any) -> None:
    """Somebody writes to the database."""
    there = databases(host)
    there["skillai"].update(changes)
    host.machine.set("databases.json", {WORKLOAD: there})


def content(host: Host, database: str) -> str:
    return databases(host)[database]["content"]


def kept_aside(host: Host) -> str:
    (before,) = (name for name in databases(host) if "_before_" in name)
    return before


def test_a_restored_database_takes_the_originals_name_which_is_kept_under_another(
    live: Host,
) -> None:
    run(live, DATABASE)
    alter(live, content="damaged by what counts no rows")
    assert restore(live, DATABASE, in_place=True)["restored"] == "skillai"
    before = kept_aside(live)
    assert set(databases(live)) == {"skillai", before}
    assert databases(live)["skillai"]["content"] == "rows"
    assert databases(live)[before]["content"] == "damaged by what counts no rows"
    assert not any(one["closed"] for one in databases(live).values())
    drop = "kubectl exec statefulset/skillai-db --namespace=factory -- dropdb --username=skillai"
    assert f"is kept in database {before}; once it is of no use: {drop} {before}" in live.said


@pytest.mark.parametrize("when", ["before", "until its connections end"])
def test_a_database_that_was_written_to_after_the_backup_keeps_its_name_unless_it_is_told(
    live: Host, when: str
) -> None:
    run(live, DATABASE)
    alter(live, content="newer", **{"rows" if when == "before" else "writing": "11/0/0"})
    error = restore(live, DATABASE, code=3, in_place=True)
    assert "skillai was written to after the backup of" in error["cause"]
    assert "--in-place --confirm factory" in error["remedy"]
    assert databases(live)["skillai"]["content"] == "newer"
    assert not any(one.get("closed") for one in databases(live).values())
    restore(live, DATABASE, in_place=True, confirm="factory")
    assert databases(live)["skillai"]["content"] == "rows"
    assert databases(live)[kept_aside(live)]["content"] == "newer"


def test_without_the_counters_of_then_nobody_knows_and_it_must_be_told(live: Host) -> None:
    run(live, DATABASE)
    record = "/var/lib/homelab/clusters/factory.json"
    content = json.loads(live.machine.read(record)) | {"written": None}
    live.machine.write_atomic(record, json.dumps(content).encode(), 0o644)
    error = restore(live, DATABASE, code=3, in_place=True)
    assert "written to after the backup" in error["cause"]
    assert "cannot be told" in error["cause"]
    restore(live, DATABASE, in_place=True, confirm="factory")
    assert kept_aside(live)


def test_what_was_looked_at_takes_the_name_and_not_a_backup_that_was_taken_since(
    live: Host,
) -> None:
    run(live, DATABASE)
    first = restore(live, DATABASE)
    alter(live, content="damaged", rows="11/0/0")
    run(live, DATABASE)
    done = restore(live, DATABASE, in_place=True, confirm="factory")
    assert (done["from"], done["taken"]) == (first["from"], first["taken"])
    assert databases(live)["skillai"]["content"] == "rows"
    # Once: the next one is of the newest backup again.
    assert restore(live, DATABASE)["taken"] > first["taken"]


def test_a_database_is_not_restored_to_two_places_at_once(live: Host) -> None:
    run(live, DATABASE)
    error = restore(live, DATABASE, code=2, in_place=True, into="/mnt/new")
    assert error["cause"] == "into /mnt/new and in_place are two places"
    assert set(databases(live)) == {"skillai"}


def test_a_database_that_is_gone_comes_back_under_its_name(live: Host) -> None:
    run(live, DATABASE)
    live.machine.set("databases.json", {WORKLOAD: {"other": {"content": "", "rows": ""}}})
    restore(live, DATABASE, in_place=True)
    assert set(databases(live)) == {"skillai", "other"}


@pytest.mark.parametrize("before", ["pg_restore", "pg_terminate_backend", "rename to"])
def test_what_a_killed_restore_was_told_need_not_be_told_again(live: Host, before: str) -> None:
    run(live, DATABASE)
    newer = before != "pg_restore"
    if newer:
        alter(live, content="newer", rows="11/0/0")
    original = live.machine.run

    def dying(argv: Any, **options: Any) -> Any:
        if any(before in word for word in argv):
            live.machine.run = dead  # type: ignore[method-assign]
            raise Killed
        return original(argv, **options)

    def dead(*_: Any, **__: Any) -> Any:
        raise Killed

    live.machine.run = dying  # type: ignore[method-assign]
    with pytest.raises(Killed):
        restore(live, DATABASE, in_place=True, confirm="factory" if newer else None)
    live.machine.run = original  # type: ignore[method-assign]
    assert restore(live, DATABASE, in_place=True)["restored"] == "skillai"
    assert content(live, "skillai") == "rows"
    assert content(live, kept_aside(live)) == ("newer" if newer else "rows")
    assert len(databases(live)) == 2


@pytest.mark.parametrize("again", ["backup restore", "backup recover"])
def test_killed_at_any_point_it_is_ended_by_the_next_run(live: Host, again: str) -> None:
    """Dead from then on, in its handlers, too."""
    run(live, DATABASE)
    original, died_at, shut, left = live.machine.run, 0, 0, 0

    def dying(argv: Any, **options: Any) -> Any:
        nonlocal left
        # What it asks of Docker is no place to die that differs.
        left -= "statefulset/skillai-db" in argv
        if left < 0:
            raise Killed
        return original(argv, **options)

    spec = {"cluster": "factory", "items": [DATABASE], "item": "skillai", "in_place": True}
    ended = False
    while not ended:
        left = died_at
        died_at += 1
        newer = f"newer {died_at}"
        alter(live, content=newer, rows=f"{died_at}/0/0")
        live.machine.run = dying  # type: ignore[method-assign]
        try:
            live("backup restore", {**spec, "confirm": "factory"})
            ended = True
        except Killed:
            pass
        live.machine.run = original  # type: ignore[method-assign]
        shut += any(one.get("closed") for one in databases(live).values())
        live.machine.sleep(1)
        if again == "backup recover":
            live("backup recover factory")
        if not ended and (again == "backup restore" or "rows" not in content(live, "skillai")):
            live("backup restore", {**spec, "confirm": "factory"})
        live.machine.sleep(1)
        there = databases(live)
        assert content(live, "skillai") == "rows"
        assert [one["content"] for one in there.values()].count(newer) == 1
        assert not any(one.get("closed") for one in there.values())
        assert "skillai_restored" not in there
    assert shut == 3


def test_an_older_backup_is_chosen_by_its_time(live: Host) -> None:
    older = run(live, DATABASE)["items"]["skillai"]["file"]
    databases_now = {"skillai": {"content": "later", "rows": "11/0/0"}}
    live.machine.set("databases.json", {"factory/statefulset/skillai-db": databases_now})
    run(live, DATABASE)
    time = older.rpartition("/")[2].removesuffix(".dump")
    assert restore(live, DATABASE, snapshot=time)["from"] == older
    assert databases(live)["skillai_restored"]["content"] == "rows"


@pytest.mark.parametrize(
    ("wanted", "cause"),
    [
        ({"name": "typo"}, "there is no item typo"),
        ({"name": "keycloak", "target": "nas"}, "there is no target nas"),
    ],
)
def test_what_is_not_declared_is_named_with_what_is(
    live: Host, wanted: dict[str, Any], cause: str
) -> None:
    run(live, VOLUME)
    error = restore(live, wanted, code=2, target=wanted.get("target"))
    assert error["cause"] == cause
    assert "declared are: " in error["remedy"]


def test_nothing_to_restore_is_said_with_where_it_was_looked_for(live: Host) -> None:
    run(live, VOLUME)
    error = restore(live, DATABASE, code=3)
    assert f"no such backup in {BACKUPS}/skillai" in error["cause"]
    assert kept(live, "keycloak")


def test_without_restic_on_the_host_the_remedy_says_where_to_get_it(live: Host) -> None:
    live.machine.set("missing-tools.json", ["restic"])
    target = {"name": "nas", "kind": "directory", "repository": "/mnt/nas/restic", "keep_last": 1}
    spec = {"cluster": "factory", "keep": 3, "items": [VOLUME], "targets": [target]}
    error = live("backup run", spec, 6)
    assert "target nas: restic is not on PATH" in error["cause"]
    assert "install restic 0.17 or newer" in error["remedy"]
    assert len(kept(live, "keycloak")) == 2


def test_a_database_is_restored_over_no_other_that_is_declared(live: Host) -> None:
    """Also where PostgreSQL would cut a name off at 63 bytes, and take it for that one."""
    run(live, DATABASE)
    other = {**DATABASE, "name": "other", "database": "skillai_restored"}
    error = restore(live, DATABASE, code=3, confirm="factory", items=[DATABASE, other])
    assert "skillai_restored, where it would be restored, is itself declared" in error["cause"]
    long = {**DATABASE, "database": "x" * 54 + "_restored"}
    live.machine.set("databases.json", {WORKLOAD: {long["database"]: {"content": "", "rows": ""}}})
    run(live, long)
    error = restore(live, long, code=3, confirm="factory", items=[long])
    assert long["database"] in databases(live)
    assert "is itself declared" in error["cause"]


def test_a_scratch_database_that_was_left_goes_with_the_next_run_and_stops_none(live: Host) -> None:
    keys = ("namespace", "workload", "container", "user")
    left = {**{key: DATABASE.get(key) for key in keys}, "database": "homelab_verify_left"}
    gone = {**left, "workload": "statefulset/gone"}
    record = "/var/lib/homelab/clusters/factory.json"
    content = json.loads(live.machine.read(record)) | {"scratch": [gone, left]}
    live.machine.write_atomic(record, json.dumps(content).encode(), 0o644)
    there = {**databases(live), "homelab_verify_left": {"content": "", "rows": "0"}}
    live.machine.set("databases.json", {WORKLOAD: there})
    run(live, DATABASE)
    assert set(databases(live)) == {"skillai"}
    assert "dropping scratch database factory/homelab_verify_left: " in live.said
    assert json.loads(live.machine.read(record))["scratch"] == [gone]
