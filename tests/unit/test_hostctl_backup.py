"""hostctl backup, on the make-believe machine: what is taken is whole, consistent and kept; what is
not is an error that names it.
"""

import hashlib
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from hostctl.machine import Machine, Ran
from tests.unit.test_hostctl import NODE, SPEC, Host, Killed

DATA = "pvc-1_factory_keycloak-data"
STORAGE = SPEC["storage_dir"]
BACKUPS = f"{STORAGE}-backups/factory"
VOLUME = {
    "name": "keycloak",
    "kind": "volume",
    "namespace": "factory",
    "claim": "keycloak-data",
    "scale_down": "deployment/keycloak",
}
DATABASE = {
    "name": "skillai",
    "kind": "postgres",
    "namespace": "factory",
    "workload": "statefulset/skillai-db",
    "database": "skillai",
    "user": "skillai",
}
HOUR = 3600


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    hold_data(host)
    return host


def hold_data(host: Host) -> None:
    """A cluster gets Keycloak's claim, volume and Deployment, and a database."""
    labels = {"app": "keycloak"}
    claim = {"volumeName": "pvc-1"}
    node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [NODE]}
    volume = {
        "hostPath": {"path": f"/var/lib/rancher/k3s/storage/{DATA}"},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [node]}]}},
    }
    put(host, "factory/PersistentVolumeClaim/keycloak-data", claim)
    put(host, "_cluster/PersistentVolume/pvc-1", volume)
    put(
        host,
        "factory/Deployment.apps/keycloak",
        {"replicas": 2, "selector": {"matchLabels": labels}},
    )
    put(host, "factory/Pod/keycloak-1", {}, labels)
    write(host, f"{STORAGE}/{DATA}/h2/keycloakdb.mv.db", "H2")
    database = {"skillai": {"content": "rows", "rows": "10/0/0"}}
    host.machine.set("databases.json", {"factory/statefulset/skillai-db": database})


def put(host: Host, key: str, spec: dict[str, Any], labels: dict[str, str] | None = None) -> None:
    namespace, kind, name = key.split("/")
    metadata = {"name": name, "namespace": namespace, "labels": labels or {}}
    kind, _, group = kind.partition(".")
    version = f"{group}/v1" if group else "v1"
    obj = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
    host.api.world.put(f"{host.api.cluster}/{key}", obj)


def get(host: Host, key: str) -> dict[str, Any]:
    found = host.api.world.get(f"{host.api.cluster}/{key}")
    assert found is not None
    return found


def write(host: Host, path: str, content: str) -> None:
    host.machine.make_directory(path.rpartition("/")[0], 0o755)
    host.machine.write_atomic(path, content.encode(), 0o644)


def run(host: Host, *items: dict[str, Any], code: int = 0, keep: int = 14) -> Any:
    # Two backups in one second have two names.
    host.machine.sleep(1)
    return host("backup run", {"cluster": "factory", "keep": keep, "items": items}, code)


def replicas(host: Host) -> int:
    return get(host, "factory/Deployment.apps/keycloak")["spec"]["replicas"]


def kept(host: Host, item: str) -> list[str]:
    return host.machine.names(f"{BACKUPS}/{item}")


# What is taken


def test_a_volume_is_copied_while_nobody_writes_to_it_and_its_checksum_is_beside_it(
    live: Host,
) -> None:
    seen: list[int] = []
    original = live.machine.run

    def watching(argv: Any, **options: Any) -> Ran:
        if argv[0] == "tar":
            seen.append(replicas(live))
        return original(argv, **options)

    live.machine.run = watching  # type: ignore[method-assign]
    taken = run(live, VOLUME)["items"]["keycloak"]
    assert seen == [0, 0]
    assert replicas(live) == 2
    content = live.machine.read(taken["file"])
    name = taken["file"].rpartition("/")[2]
    sums = live.machine.read(f"{taken['file']}.sha256").decode()
    assert sums == f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    with tarfile.open(live.machine._file(taken["file"])) as archive:
        member = archive.extractfile("h2/keycloakdb.mv.db")
        assert member is not None
        assert member.read() == b"H2"
    for path, mode in ((BACKUPS, 0o700), (f"{BACKUPS}/keycloak", 0o700), (taken["file"], 0o600)):
        facts = live.machine.stat(path)
        assert facts is not None
        assert facts.mode == mode, path


def test_a_database_is_dumped_in_its_own_pod_without_a_password_anywhere(live: Host) -> None:
    taken = run(live, {**DATABASE, "container": "postgres"})["items"]["skillai"]
    assert live.machine.read(taken["file"]) == b"PGDMP rows END"
    (dump,) = (call for call in live.calls if "pg_dump" in call)
    at = dump.index("kubectl")
    assert dump[:at] == ["docker", "exec", NODE]
    assert dump[at + 1 :] == [
        "exec",
        "statefulset/skillai-db",
        "--namespace=factory",
        "--container=postgres",
        "--",
        "pg_dump",
        "--format=custom",
        "--no-password",
        "--username=skillai",
        "--dbname=skillai",
    ]


def test_incident_06_the_live_directory_is_copied_whatever_the_settings_say(live: Host) -> None:
    binds = live.cluster["nodes"][0]["binds"]
    moved = [bind.replace(STORAGE, "/mnt/new/storage") for bind in binds]
    live.edit_node(binds=moved)
    write(live, f"/mnt/new/storage/{DATA}/h2/keycloakdb.mv.db", "the live one")
    taken = run(live, VOLUME)["items"]["keycloak"]
    assert taken["file"].startswith("/mnt/new/storage-backups/factory/keycloak/")
    assert b"the live one" in live.machine.read(taken["file"])


def test_a_wider_mount_gives_way_to_a_narrower_one(live: Host) -> None:
    binds = [*live.cluster["nodes"][0]["binds"], "/mnt/data:/var/lib/rancher"]
    live.edit_node(binds=binds)
    assert b"H2" in live.machine.read(run(live, VOLUME)["items"]["keycloak"]["file"])


# What is kept


def test_the_newest_are_kept_and_listed(live: Host) -> None:
    for _ in range(3):
        run(live, DATABASE, keep=2)
    last = run(live, DATABASE, keep=2)["items"]["skillai"]
    assert len(last["removed"]) == 1
    listed = live("backup list factory")
    assert listed["directory"] == BACKUPS
    (newest, before) = listed["items"]["skillai"]
    assert newest["file"] == last["file"]
    assert newest["time"] > before["time"]
    assert kept(live, "skillai") == sorted(
        path.rpartition("/")[2] + end
        for path in (newest["file"], before["file"])
        for end in ("", ".sha256")
    )


def test_the_list_outlives_the_cluster(live: Host) -> None:
    run(live, DATABASE)
    live("k3d delete factory --confirm factory")
    assert len(live("backup list factory")["items"]["skillai"]) == 1


def test_a_failed_backup_removes_no_good_one_and_leaves_nothing_behind(live: Host) -> None:
    good = run(live, DATABASE, keep=1)["items"]["skillai"]["file"]
    database = {"skillai": {"content": "rows", "rows": "1", "cut_off": True}}
    live.machine.set("databases.json", {"factory/statefulset/skillai-db": database})
    error = run(live, DATABASE, keep=1, code=5)
    assert error["cause"] == "skillai: pg_restore: error: could not read from input file"
    assert kept(live, "skillai") == [Path(good).name, f"{Path(good).name}.sha256"]


def test_what_a_killed_run_left_is_no_backup_and_goes(live: Host) -> None:
    original = live.machine.write_atomic

    def killed(path: str, *arguments: Any, **options: Any) -> None:
        if path.endswith(".sha256"):
            raise Killed
        original(path, *arguments, **options)

    live.machine.write_atomic = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        run(live, DATABASE)
    live.machine.write_atomic = original  # type: ignore[method-assign]
    assert live("backup list factory")["items"]["skillai"] == []
    write(live, f"{BACKUPS}/skillai/20260101T000000.000000Z.dump.part", "half")
    taken = run(live, DATABASE)["items"]["skillai"]["file"]
    assert kept(live, "skillai") == [Path(taken).name, f"{Path(taken).name}.sha256"]


# What fails


def test_one_item_that_fails_does_not_stop_the_others_and_all_are_named(live: Host) -> None:
    wrong = [{**VOLUME, "name": "typo", "claim": "keycloak"}, {**DATABASE, "database": "gone"}]
    error = run(live, *wrong, VOLUME, code=5)
    assert error["step"] == "backing up typo, skillai of cluster factory"
    assert (
        'typo: Error from server (NotFound): persistentvolumeclaims "keycloak" not found'
        in (error["cause"])
    )
    assert 'skillai: FATAL:  database "gone" does not exist' in error["cause"]
    assert len(kept(live, "keycloak")) == 2


def test_incident_06_a_volume_that_nobody_writes_to_is_an_error_and_no_backup(live: Host) -> None:
    item = {**VOLUME, "stale_after_hours": 48}
    run(live, item)
    live.machine.sleep(49 * HOUR)
    error = run(live, item, code=3)
    assert "nobody has written to it for 49 h, allowed are 48" in error["cause"]
    assert len(kept(live, "keycloak")) == 2
    write(live, f"{STORAGE}/{DATA}/h2/keycloakdb.mv.db", "new")
    run(live, item)


def test_a_database_that_nobody_writes_to_is_an_error_and_no_backup(live: Host) -> None:
    item = {**DATABASE, "stale_after_hours": 24}
    run(live, item)
    live.machine.sleep(25 * HOUR)
    assert "nobody has written to it" in run(live, item, code=3)["cause"]
    database = {"skillai": {"content": "rows", "rows": "11/0/0"}}
    live.machine.set("databases.json", {"factory/statefulset/skillai-db": database})
    run(live, item)


def test_an_empty_volume_is_an_error(live: Host) -> None:
    live.machine.remove(f"{STORAGE}/{DATA}/h2/keycloakdb.mv.db")
    assert "holds no file" in run(live, VOLUME, code=3)["cause"]


def test_without_the_room_nothing_is_written_and_nothing_is_scaled(live: Host) -> None:
    live.machine.set("free", 2**20)
    error = run(live, VOLUME, DATABASE, code=3)
    assert error["cause"].count("has room for 1.0 MiB") == 2
    assert (kept(live, "keycloak"), kept(live, "skillai")) == ([], [])
    assert not [call for call in live.calls if "scale" in call]


def test_a_volume_that_changes_while_it_is_copied_is_no_backup(live: Host) -> None:
    original = live.machine.run

    def writing(argv: Any, **options: Any) -> Ran:
        ran = original(argv, **options)
        if "--create" in argv:
            write(live, f"{STORAGE}/{DATA}/h2/keycloakdb.mv.db", "changed")
        return ran

    live.machine.run = writing  # type: ignore[method-assign]
    error = run(live, {**VOLUME, "scale_down": None}, code=5)
    assert error["cause"] == "keycloak: tar: contents differ"
    assert "scaleDown" in error["remedy"]
    assert kept(live, "keycloak") == []


def test_a_volume_on_no_mount_of_the_host_is_refused(live: Host) -> None:
    volume = get(live, "_cluster/PersistentVolume/pvc-1")
    volume["spec"]["hostPath"]["path"] = "/opt/data"
    live.api.world.put(f"{live.api.cluster}/_cluster/PersistentVolume/pvc-1", volume)
    assert "is on no mount of the host" in run(live, VOLUME, code=3)["cause"]


def test_a_stopped_cluster_is_an_error_for_each_item(live: Host) -> None:
    live("k3d stop factory")
    error = run(live, VOLUME, DATABASE, code=3)
    assert error["cause"] == "keycloak: it is stopped; skillai: it is stopped"
    assert "hostctl k3d start factory" in error["remedy"]


def test_an_item_without_what_its_kind_needs_is_a_bad_spec(live: Host) -> None:
    items = [{**VOLUME, "claim": None}, {**DATABASE, "user": None}, DATABASE]
    error = run(live, *items, code=2)
    assert "items[0].claim: missing for kind volume" in error["cause"]
    assert "items[1].user: missing for kind postgres" in error["cause"]
    assert "skillai is there twice" in error["cause"]


# Scaling down and back


def failing_tar(live: Host, failure: BaseException | Ran) -> None:
    original = live.machine.run

    def fail(argv: Any, **options: Any) -> Ran:
        if argv[0] == "tar":
            live.machine.run = original  # type: ignore[method-assign]
            if isinstance(failure, BaseException):
                raise failure
            return failure
        return original(argv, **options)

    live.machine.run = fail  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "failure", [Ran(2, b"", b"tar: disk error\n"), KeyboardInterrupt()], ids=["fails", "is ended"]
)
def test_the_workload_is_scaled_back_when_the_copy(live: Host, failure: Any) -> None:
    failing_tar(live, failure)
    run(live, VOLUME, code=5)
    assert replicas(live) == 2
    assert kept(live, "keycloak") == []


def test_after_a_kill_recover_scales_back_to_the_number_of_before(live: Host) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    failing_tar(live, Killed())
    # A killed process runs no `finally`.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hostctl.backups._scale_back", kill)
        with pytest.raises(Killed):
            run(live, VOLUME)
    assert replicas(live) == 0
    assert live("backup recover factory")["recovered"] == ["factory/deployment/keycloak"]
    assert replicas(live) == 2
    assert live("backup recover factory")["recovered"] == []


def test_recover_leaves_a_number_that_someone_has_set_meanwhile(live: Host) -> None:
    record = "/var/lib/homelab/clusters/factory.json"
    scaled = {"namespace": "factory", "workload": "deployment/keycloak", "replicas": 5}
    content = {**json.loads(live.machine.read(record)), "scaled": scaled}
    live.machine.write_atomic(record, json.dumps(content).encode(), 0o644)
    live("backup recover factory")
    assert replicas(live) == 2


def test_a_workload_that_is_healed_up_while_it_is_copied_makes_no_backup(live: Host) -> None:
    """As ArgoCD does with selfHeal."""
    original = live.machine.run

    def healing(argv: Any, **options: Any) -> Ran:
        if "--compare" in argv:
            deployment = get(live, "factory/Deployment.apps/keycloak")
            put(live, "factory/Deployment.apps/keycloak", {**deployment["spec"], "replicas": 2})
        return original(argv, **options)

    live.machine.run = healing  # type: ignore[method-assign]
    error = run(live, VOLUME, code=5)
    assert "someone scaled deployment/keycloak up while it was copied" in error["cause"]
    assert "ignoreDifferences" in error["remedy"]
    assert (replicas(live), kept(live, "keycloak")) == (2, [])


def test_pods_that_do_not_end_are_a_time_out_and_no_copy(live: Host) -> None:
    original = live.machine.run

    def lingering(argv: Any, **options: Any) -> Ran:
        ran = original(argv, **options)
        if "scale" in argv:
            put(live, "factory/Pod/keycloak-1", {}, {"app": "keycloak"})
        return ran

    live.machine.run = lingering  # type: ignore[method-assign]
    error = run(live, VOLUME, code=7)
    assert "pods of deployment/keycloak have not ended after 600 s" in error["cause"]
    assert not [call for call in live.calls if call[0] == "tar"]
    assert replicas(live) == 2


def test_a_workload_that_rests_already_stays_at_rest(live: Host) -> None:
    deployment = get(live, "factory/Deployment.apps/keycloak")
    put(live, "factory/Deployment.apps/keycloak", {**deployment["spec"], "replicas": 0})
    live.api.world.delete(f"{live.api.cluster}/factory/Pod/keycloak-1")
    run(live, VOLUME)
    assert replicas(live) == 0


def test_each_item_lets_others_at_the_cluster_when_it_is_done(live: Host) -> None:
    held: list[str] = []
    original = live.machine.lock

    def lock(name: str) -> Any:
        held.append(name)
        return original(name)

    live.machine.lock = lock  # type: ignore[method-assign]
    run(live, VOLUME, DATABASE)
    # Recover, two items, and the note of how it went.
    assert [one for one in held if one == "cluster-factory"] == held[:1] + held[2:]
    assert (len(held), held[1]) == (5, "backup-factory")


def test_how_a_run_ended_is_in_the_clusters_record(live: Host) -> None:
    run(live, {**DATABASE, "database": "gone"}, code=5)
    record = json.loads(live.machine.read("/var/lib/homelab/clusters/factory.json"))
    assert not record["runs"]["backup"]["ok"]
    assert "gone" in record["runs"]["backup"]["cause"]
    run(live, DATABASE)
    record = json.loads(live.machine.read("/var/lib/homelab/clusters/factory.json"))
    assert record["runs"]["backup"]["ok"]


# The real machine


def test_a_program_reads_a_file_and_an_archive_is_verified_by_the_real_tar(tmp_path: Path) -> None:
    machine = Machine()
    source, part = tmp_path / "source", str(tmp_path / "x.tar.part")
    source.mkdir()
    (source / "h2.db").write_text("H2")
    pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", part]
    compare = ["tar", "--compare", "--xattrs", "--acls", "--file", part, "--directory", str(source)]
    assert machine.run([*pack, "--directory", str(source), "."]).code == 0
    assert machine.run(compare).code == 0
    listed = machine.run(["tar", "--list"], from_file=part)
    assert (listed.code, listed.text.split()) == (0, ["./", "./h2.db"])
    (source / "h2.db").write_text("H3")
    assert machine.run(compare).code == 1
    machine.publish(part, str(tmp_path / "x.tar"))
    assert machine.names(str(tmp_path)) == ["source", "x.tar"]
    assert machine.file_bytes(str(tmp_path / "x.tar")) == (tmp_path / "x.tar").stat().st_size
    for _ in range(2):
        machine.remove(str(tmp_path / "x.tar"))
    assert machine.names(str(tmp_path)) == ["source"]


def test_what_is_not_there_holds_nothing_and_was_never_written(tmp_path: Path) -> None:
    machine, nowhere = Machine(), str(tmp_path / "nowhere")
    assert machine.names(nowhere) == []
    assert machine.newest(nowhere) is None
    assert machine.newest(str(tmp_path)) is None
    assert machine.file_bytes(nowhere) == 0


def test_the_newest_file_counts_wherever_it_is_and_no_directory(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, written in (("old", 1000.0), ("a/b/new", 2000.0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (written, written))
    assert Machine().newest(str(tmp_path)) == 2000.0
