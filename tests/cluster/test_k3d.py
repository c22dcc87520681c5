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
