"""What previews say when the live world is not what p510's state holds, and how up heals it.

`preview` sees the cluster itself, `preview --refresh` every object. What cannot be told is refused
and changes nothing. After a heal nothing is left to do, in that run and in the ones after it.
"""

import json

import pytest

from components.ownership import NOT_SEEN
from tests.engine.conftest import P510, edited_file, errors, planned

pytestmark = pytest.mark.engine

NODE = "k3d-factory-server-0"
HEALED = {"update Command cluster", "update Command acceptance"}
"""What a preview shows of a cluster that up changes."""
ENGINES_OWN = {"pulumi:pulumi:Stack", "pulumi:providers:command"}
"""What a run registers before the program has said anything."""
SLEEPING = {"update kubernetes kubernetes"}
"""What only the preview of a stopped cluster shows: a provider that skips nothing out of reach."""

REPLACEMENT = ("create-replacement", "replace", "delete-replaced")


def assert_settled(p510: P510) -> None:
    """A live fact that were an input would show up again after the up that took it in."""
    assert planned(p510.up()) == set()
    assert planned(p510.preview()) == set()


# Stopped, not answering, out of reach


def test_a_stopped_cluster_is_seen_said_and_started(p510):
    p510.on_host("docker", "stop", "-t", "60", NODE)
    for preview in (p510.preview(), p510.preview("--refresh")):
        assert "cluster factory on this machine is stopped: up starts it" in preview.stdout
        assert [text for text in preview.diagnostics if NOT_SEEN in text and "stopped" in text]
        assert "not seen: namespaces and objects: the cluster is stopped" in preview.stdout
        assert planned(preview) == HEALED | SLEEPING
    assert planned(p510.up()) == HEALED
    assert json.loads(p510.cluster_file.read_text())["state"] == "running"
    assert_settled(p510)


def test_an_edit_of_what_lives_in_a_stopped_cluster_is_shown_and_made(p510):
    p510.on_host("docker", "stop", "-t", "60", NODE)
    with p510.edited() as settings:
        settings["tunnels"]["factory"]["connector"]["replicas"] = 3
    changes = {*HEALED, "update Deployment factory/cloudflared-factory"}
    assert planned(p510.preview()) == {*changes, *SLEEPING}
    assert planned(p510.up()) == changes
    deployment = p510.objects / "factory" / "Deployment.apps" / "cloudflared-factory.json"
    assert json.loads(deployment.read_text())["spec"]["replicas"] == 3
    assert planned(p510.preview()) == set()


def test_a_docker_that_does_not_answer_is_one_error_with_its_remedy(p510):
    """Incident 3: it does not say that there is no cluster."""
    (p510.world / "docker" / "unreachable").touch()
    for arguments in ((), ("--refresh", "--run-program")):
        preview = p510.preview(*arguments, check=False)
        assert preview.code != 0
        (error,) = errors(preview)
        assert "looking for cluster factory in Docker on this machine failed" in error
        assert "Cannot connect to the Docker daemon" in error
        assert "Remedy: systemctl status docker" in error
        assert planned(preview) == set()
    # Without --run-program the engine refreshes before it asks the program: the provider speaks.
    preview = p510.preview("--refresh", check=False)
    assert preview.code != 0
    assert planned(preview) == set()
    assert "failed to connect to any docker daemon" in preview.stdout


def test_a_host_out_of_reach_is_one_error_that_names_it_and_the_way_to_try(tmp_path):
    p510 = P510(tmp_path / "p510")
    with p510.edited() as settings:
        settings["host"] = {"connection": "ssh", "address": "p510.example.org", "user": "root"}
        settings["cluster"]["api"]["bind"] = "192.0.2.10"
    created = p510.preview()
    assert "cluster factory does not exist on host p510.example.org" in created.stdout
    assert set(created.changes) == {"create"}
    timed_out = "ssh: connect to host p510.example.org port 22: Connection timed out"
    p510.set_faults(
        [
            {
                "provider": "command",
                "method": "Invoke",
                "do": "fail",
                "message": f"exit status 255: running ssh:\n{timed_out}",
                "times": 100,
                "preview": True,
            }
        ]
    )
    preview = p510.preview(check=False)
    assert preview.code != 0
    (error,) = errors(preview)
    verbs = "k3d inspect, units status, argocd resolve, files read"
    assert f"hostctl {verbs} on host p510.example.org did not run" in error
    assert f"Cause: {timed_out}" in error
    assert "-- root@p510.example.org python3 --version` works without a question" in error
    assert {step.type for step in preview.steps} <= ENGINES_OWN


# Another cluster, or none


def replaced_with_the_cluster(p510: P510) -> set[str]:
    """What a preview shows when the cluster is gone or another one: all that was in it, anew."""
    anew = {"Command identity", "Command kubeconfig", "Command bootstrap"}
    anew |= {"Command seed factory/factory-cli-creds", "kubernetes kubernetes"}
    anew |= {f"Command rollout {namespace}" for namespace in p510.outputs()["namespaces"]}
    anew |= {
        f"{resource['type'].rpartition(':')[2]} {resource['urn'].rpartition('::')[2]}"
        for resource in p510.resources()
        if resource["type"].startswith("kubernetes:")
    }
    assert len(anew) == 44
    return HEALED | {f"{op} {name}" for op in REPLACEMENT for name in anew}


def objects(p510: P510) -> set[str]:
    """All objects in the cluster, as <namespace>/<Kind>/<name>."""
    return {str(path.relative_to(p510.objects)) for path in p510.objects.rglob("*.json")}


@pytest.fixture(params=["deleted", "made anew"])
def bereft(p510, request) -> P510:
    """p510 whose cluster was deleted behind Pulumi's back, and perhaps made anew."""
    p510.on_host("k3d", "cluster", "delete", "factory")
    if request.param == "made anew":
        # k3s opens no datastore of another cluster: whoever makes one by hand moves it away.
        data = p510.host_file("/mnt/img_pool/k3d/storage-server/server-0")
        data.rename(data.with_name("server-0.old"))
        config = "--config=/var/lib/homelab/clusters/factory/k3d.yaml"
        kubeconfig = ("--kubeconfig-update-default=false", "--kubeconfig-switch-context=false")
        p510.on_host("k3d", "cluster", "create", config, "--no-rollback", *kubeconfig)
    return p510


def test_a_lost_cluster_is_listed_with_all_it_held_and_one_up_restores_it(bereft):
    """Nothing of Cloudflare is touched, and the new cluster holds what the old one did."""
    before, identity = objects(bereft), bereft.objects.name
    expected = replaced_with_the_cluster(bereft)
    assert planned(bereft.preview()) == expected
    assert planned(bereft.up()) == expected
    assert bereft.objects.name != identity
    assert objects(bereft) == before
    assert_settled(bereft)


def test_a_confirmed_recreate_lists_all_it_replaces_and_makes_a_backup_first(p510):
    """Incident 10."""
    with p510.edited() as settings:
        # Two minor versions on: no swap of the node leads there.
        settings["cluster"]["image"] = "rancher/k3s:v1.33.1-k3s1"
        settings["cluster"]["recreate"] = "factory"
    before, identity = objects(p510), p510.objects.name
    expected = replaced_with_the_cluster(p510)
    preview = p510.preview()
    assert planned(preview) == expected
    assert (
        "image is rancher/k3s:v1.31.5-k3s1, declared rancher/k3s:v1.33.1-k3s1: up backs the cluster"
        " up, deletes it and makes it anew" in preview.stdout
    )
    p510.up()
    (backup,) = p510.host_file("/mnt/img_pool/k3d/storage-backups").iterdir()
    held = {file.name for file in backup.iterdir()}
    assert held == {"SHA256SUMS", "datastore.tar", "storage.tar"}
    assert p510.objects.name != identity
    assert objects(p510) == before
    assert_settled(p510)


def test_a_cluster_of_which_a_part_is_left_is_refused_and_nothing_is_made_on_it(p510):
    """Incident 3."""
    p510.cluster_file.unlink()
    error = refused(p510)
    assert "partial: it has no nodes, but left is volume k3d-factory-images" in error
    assert "Remedy: nothing was created, started or deleted. By hand: docker volume rm" in error


def test_a_node_without_its_network_is_refused(p510):
    """Incident 3, as it happened."""
    with edited_file(p510.cluster_file) as cluster:
        cluster["nodes"][0]["disconnected"] = True
    error = refused(p510)
    assert f"partial: node {NODE} has lost its endpoint on network k3d-factory" in error
    assert f"docker network connect k3d-factory {NODE}" in error


def test_a_cluster_that_someone_else_made_is_refused(p510):
    with edited_file(p510.cluster_file) as cluster:
        cluster["nodes"][0]["labels"]["k3d.cluster"] = "other"
    error = refused(p510)
    assert f"foreign: container {NODE} bears the name of a node" in error
    assert "belongs to cluster other" in error


def test_a_storage_directory_that_is_not_the_mounted_one_is_refused(p510):
    """Incident 6."""
    with edited_file(p510.cluster_file) as cluster:
        binds = cluster["nodes"][0]["binds"]
        binds[0] = binds[0].replace("/mnt/img_pool", "/mnt/media", 1)
    assert (
        "homelab:cluster.storageDir: declared /mnt/img_pool/k3d/storage,"
        " live /mnt/media/k3d/storage" in refused(p510)
    )


def refused(p510: P510) -> str:
    """The one error of a preview that plans nothing."""
    preview = p510.preview(check=False)
    assert preview.code != 0
    assert planned(preview) == set()
    (error,) = errors(preview)
    return error


# The host's own drift


def test_an_api_port_that_docker_did_not_publish_is_seen_and_healed(p510):
    """Incident 1."""
    with edited_file(p510.cluster_file) as cluster:
        cluster["nodes"][0]["published"] = False
    preview = p510.preview()
    assert planned(preview) == HEALED
    assert f"up restarts {NODE}, which publishes it" in preview.stdout
    p510.up()
    assert planned(p510.preview()) == set()


def test_a_kubeconfig_that_someone_changed_is_written_anew(p510):
    path = p510.host_file("/etc/k3d/kubeconfig")
    before = path.read_bytes()
    path.write_text("")
    assert "update Command kubeconfig" in planned(p510.preview())
    assert planned(p510.up()) == {"update Command kubeconfig"}
    assert path.read_bytes() == before
    assert planned(p510.preview()) == set()


# Hand edits of objects


def test_hand_edits_are_shown_by_a_refresh_alone_and_healed_by_it(p510):
    secret = p510.objects / "factory" / "Secret" / "minio-creds.json"
    deployment = p510.objects / "factory" / "Deployment.apps" / "cloudflared-factory.json"
    (record,) = (p510.world / "cloudflare").glob("record/*/plex.example.org/CNAME.json")
    data = json.loads(secret.read_text())["data"]
    with edited_file(secret) as live:
        live["data"] = {"value": "YnkgaGFuZA=="}
    with edited_file(deployment) as live:
        live["spec"]["replicas"] = 5
    (p510.objects / "factory" / "Secret" / "minio-kms.json").unlink()
    record.unlink()

    assert planned(p510.preview()) == set()
    exactly = {
        "update Secret factory/minio-creds",
        "update Deployment factory/cloudflared-factory",
        "create Secret factory/minio-kms",
        "create DnsRecord plex.example.org",
    }
    assert planned(p510.preview("--refresh")) == exactly
    assert planned(p510.up("--refresh")) == exactly
    assert json.loads(secret.read_text())["data"] == data
    assert json.loads(deployment.read_text())["spec"]["replicas"] == 2
    assert (p510.objects / "factory" / "Secret" / "minio-kms.json").exists()
    assert record.exists()
    assert planned(p510.preview("--refresh")) == set()
    assert_settled(p510)
