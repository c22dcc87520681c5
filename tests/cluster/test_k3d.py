"""hostctl on real Docker and k3d: a cluster's life, from absent to deleted."""

import pytest

pytestmark = pytest.mark.cluster


def test_a_cluster_is_created_seen_kept_stopped_started_and_deleted(host, spec, network):
    absent = host.done("k3d", "inspect", spec=spec)["cluster"]
    assert absent["state"] == "absent"

    made = host.done("k3d", "ensure", spec={**spec, "generation": 1})["cluster"]
    assert made["nodes"] == ["k3d-factory-server-0"]
    assert made["storage_dir"] == spec["storage_dir"]
    assert made["k3s_version"] == "v1.31.5+k3s1"

    seen = host.done("k3d", "inspect", spec=spec)["cluster"]
    assert (seen["state"], seen["differences"]) == ("running", [])
    assert seen["identity"] == made["identity"]
    assert seen["live"]["resolvers"] == spec["resolvers"]
    assert seen["live"]["api"] == {**spec["api"], "published": True}

    host.kubectl("create", "configmap", "marker", "--from-literal=a=b")
    before = host.engine.docker("inspect", "--format", "{{.State.StartedAt}}", made["nodes"][0])
    assert host.done("k3d", "ensure", spec={**spec, "generation": 1})["cluster"] == made
    after = host.engine.docker("inspect", "--format", "{{.State.StartedAt}}", made["nodes"][0])
    assert after == before

    assert host.done("k3d", "stop", spec={"name": "factory"})["stopped"] is True
    assert host.done("k3d", "inspect", spec=spec)["cluster"]["state"] == "stopped"
    assert host.done("k3d", "start", spec={"name": "factory"})["started"] is True
    again = host.done("k3d", "inspect", spec=spec)["cluster"]
    assert (again["state"], again["identity"]) == ("running", made["identity"])
    assert host.kubectl("get", "configmap", "marker", "--output=jsonpath={.data.a}") == "b"

    refused = host("k3d", "delete", spec={"name": "factory"})
    assert refused["error"]["code"] == "refused"
    assert host.done("k3d", "delete", spec={"name": "factory", "confirm": "factory"})["deleted"]
    assert host.engine.clusters() == []
    assert host.done("k3d", "inspect", spec=spec)["cluster"]["state"] == "absent"


def test_three_servers_keep_their_data_when_they_are_restarted_in_another_order(host, spec):
    several = {**spec, "servers": 3}
    made = host.done("k3d", "ensure", spec=several)["cluster"]
    assert made["nodes"] == [
        *(f"k3d-factory-server-{number}" for number in range(3)),
        "k3d-factory-serverlb",
    ]
    assert host.done("k3d", "inspect", spec=several)["cluster"]["differences"] == []
    host.kubectl("create", "configmap", "marker", "--from-literal=a=b")

    host.done("k3d", "stop", spec={"name": "factory"})
    for number in (2, 0, 1):
        host.engine.docker("start", f"k3d-factory-server-{number}")
    again = host.done("k3d", "ensure", spec=several)["cluster"]
    assert again["identity"] == made["identity"]
    assert host.kubectl("get", "configmap", "marker", "--output=jsonpath={.data.a}") == "b"


def test_secrets_are_encrypted_in_the_datastore_and_images_come_from_a_file(host, spec, network):
    encrypted = {**spec, "secrets_encryption": True}
    host.done("k3d", "ensure", spec=encrypted)
    assert host.done("k3d", "inspect", spec=encrypted)["cluster"]["differences"] == []
    host.kubectl("create", "configmap", "readable", "--from-literal=a=seen-in-the-datastore")
    host.kubectl("create", "secret", "generic", "hidden", "--from-literal=a=never-in-the-datastore")
    host.done("k3d", "stop", spec={"name": "factory"})
    files = "k3d-factory-server-0:/var/lib/rancher/k3s/server/db"
    datastore = host.engine.docker("cp", files, "-")
    assert "seen-in-the-datastore" in datastore
    assert "never-in-the-datastore" not in datastore
    host.done("k3d", "ensure", spec=encrypted)
    assert host.kubectl("get", "secret", "hidden", "--output=jsonpath={.metadata.name}") == "hidden"

    archive = host.engine.root / "images.tar"
    host.engine.docker("tag", spec["image"], "carried:1")
    host.engine.docker("save", "--output", str(archive), "carried:1")
    [file] = host.done("images", "digest", spec={"files": [str(archive)]})["files"]
    wanted = {"cluster": "factory", "files": [file]}
    imported = host.done("images", "import", spec=wanted)["imported"]
    assert imported == [{"path": str(archive), "node": "k3d-factory-server-0"}]
    images = host.engine.docker("exec", "k3d-factory-server-0", "ctr", "images", "ls", "-q")
    assert "docker.io/library/carried:1" in images.split()
    assert host.done("images", "import", spec=wanted)["imported"] == []
    host.engine.docker("rmi", "carried:1")
