"""Who owns an object, derived from what real clusters write on it; and what a second one means."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import pytest

from components import settings
from components.ownership import KINDS, Key, Ownership, declared_key, other_owners, reference
from hostctl.machine import Ran, TookTooLong
from hostctl.owners import maker_of, owners_of, writers_of
from tests.unit.conftest import Registered
from tests.unit.program import STACKS, Program
from tests.unit.test_hostctl import Host, _deployment

MADE, LATER = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
TRACKING = "argocd.argoproj.io/tracking-id"


def entry(manager: str, time: str = MADE, operation: str = "Update", **more: Any) -> dict[str, Any]:
    fields = {"f:metadata": {"f:labels": {}}}
    return {"manager": manager, "operation": operation, "time": time, "fieldsV1": fields, **more}


def metadata(name: str, *entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "creationTimestamp": MADE, "managedFields": list(entries), **more}


COREDNS = metadata(
    "coredns",
    entry("deploy@k3d-factory-server-0", operation="Update"),
    entry("k3s", LATER, subresource="status"),
    namespace="kube-system",
    annotations={
        "objectset.rio.cattle.io/applied": "H4sIAAAAAAAA/...",
        "objectset.rio.cattle.io/id": "",
        "objectset.rio.cattle.io/owner-gvk": "k3s.cattle.io/v1, Kind=Addon",
        "objectset.rio.cattle.io/owner-name": "coredns",
        "objectset.rio.cattle.io/owner-namespace": "kube-system",
    },
    labels={"objectset.rio.cattle.io/hash": "bce283298811743a0386ab510f2f67ef74240c57"},
)
TRAEFIK = metadata(
    "traefik",
    entry("helm"),
    namespace="kube-system",
    annotations={
        "meta.helm.sh/release-name": "traefik",
        "meta.helm.sh/release-namespace": "kube-system",
    },
    labels={"app.kubernetes.io/managed-by": "Helm", "app.kubernetes.io/instance": "traefik"},
)
SYNCED = metadata(
    "cloudflared",
    entry("argocd-controller"),
    namespace="factory",
    annotations={TRACKING: "infra:apps/Deployment:factory/cloudflared"},
)
COPIED = metadata(
    "cloudflared-6d5f",
    entry("kube-controller-manager"),
    namespace="factory",
    annotations=SYNCED["annotations"],
)
LABELLED = metadata(
    "app",
    entry("argocd-application-controller", operation="Apply"),
    labels={"app.kubernetes.io/instance": "apps"},
)
SYNCED_SECRET = metadata(
    "db",
    entry("externalsecrets.external-secrets.io/db"),
    ownerReferences=[{"kind": "ExternalSecret", "name": "db", "controller": True, "uid": "u"}],
)
HISTORY = metadata(
    "sh.helm.release.v1.metallb.v1",
    entry("Helm"),
    namespace="metallb-system",
    labels={"name": "metallb", "owner": "helm", "status": "deployed", "version": "1"},
)


@pytest.mark.parametrize(
    ("kind", "one", "owners"),
    [
        ("Deployment.apps", COREDNS, ["k3s add-on coredns"]),
        ("Deployment.apps", TRAEFIK, ["Helm release kube-system/traefik of HelmChart x/traefik"]),
        ("Deployment.apps", SYNCED, ["ArgoCD application infra"]),
        ("ReplicaSet.apps", COPIED, []),
        ("ConfigMap", LABELLED, ["ArgoCD application apps"]),
        ("ConfigMap", {**LABELLED, "managedFields": [entry("kubectl-create")]}, []),
        ("Secret", SYNCED_SECRET, ["ExternalSecret db"]),
        ("Secret", HISTORY, ["Helm release metallb-system/metallb"]),
        (
            "Secret",
            metadata("a", entry("pulumi-kubernetes-5c7e2a90", operation="Apply")),
            ["Pulumi"],
        ),
        ("Secret", metadata("a", entry("homelab")), ["hostctl"]),
        ("Secret", metadata("a", entry("kubectl-create")), []),
        ("Secret", {"name": "a"}, []),
    ],
)
def test_an_owner_is_who_has_left_a_mark(kind: str, one: dict[str, Any], owners: list[str]) -> None:
    assert owners_of(kind, one, {"traefik": "HelmChart x/traefik"}) == owners


@pytest.mark.parametrize(
    ("one", "maker"),
    [
        (metadata("a", entry("kubectl-edit", LATER), entry("kubectl-create")), "kubectl-create"),
        (metadata("kube-root-ca.crt", entry("kube-controller-manager")), "Kubernetes"),
        (metadata("default", entry("k3s")), "Kubernetes"),
        ({"name": "a"}, "Kubernetes"),
    ],
)
def test_who_made_an_object_without_a_mark(one: dict[str, Any], maker: str) -> None:
    assert maker_of(one) == maker


def test_what_rotates_a_secret_has_written_its_data_since_it_was_made() -> None:
    data: dict[str, Any] = {"fieldsV1": {"f:data": {"f:password": {}}}}
    made = entry("pulumi-kubernetes-5c7e2a90", operation="Apply", **data)
    rotated = entry("OpenAPI-Generator", LATER, **data)
    assert writers_of("Secret", metadata("a", made, rotated)) == ["OpenAPI-Generator"]
    assert writers_of("Deployment.apps", metadata("a", made, rotated)) == []
    maker = entry("OpenAPI-Generator", **data)
    by_hand, labels = entry("kubectl-edit", LATER, **data), entry("keycloak", LATER)
    token = entry("kube-controller-manager", LATER, **data)
    # k3d puts the host's names into the manifest of CoreDNS, and k3s applies it anew.
    names = entry("deploy@k3d-factory-server-0", LATER, operation="Apply", **data)
    assert writers_of("Secret", metadata("a", maker, by_hand, labels, token, names)) == []


# What the cluster is asked


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    return host


def test_owners_are_listed_by_kind_and_no_value_is_in_the_answer(live: Host) -> None:
    deployment = _deployment("cloudflared")
    deployment["metadata"]["annotations"] = {TRACKING: "infra:apps/Deployment:default/cloudflared"}
    live.api.create(deployment, "argocd-controller")
    secret: dict[str, Any] = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "db"}}
    # As kubectl applies one: the annotation holds all of it.
    secret["data"] = {"password": "Y2FuYXJ5"}
    applied = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(secret)}
    secret["metadata"] = {"name": "db", "annotations": applied}
    live.api.create(secret, "kubectl-client-side-apply")
    spec = {"cluster": "factory", "kinds": ["Deployment.apps"]}
    answer = live("cluster owners", spec)
    assert (answer["state"], answer["unseen"], answer["whole"]) == ("known", [], True)
    [one] = answer["objects"]
    assert (one["kind"], one["namespace"], one["name"]) == (
        "Deployment.apps",
        "default",
        "cloudflared",
    )
    assert one["owners"] == ["ArgoCD application infra"]
    everything = live("cluster owners", {"cluster": "factory"})["objects"]
    assert {"Deployment.apps", "Secret", "Namespace"} <= {one["kind"] for one in everything}
    assert "Y2FuYXJ5" not in json.dumps(everything)


def test_owners_of_a_cluster_that_is_stopped_cannot_be_told(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    answer = live("cluster owners", {"cluster": "factory"})
    assert answer["state"] == "unknown"
    assert answer["detail"]
    assert answer["objects"] == []


@pytest.mark.parametrize("verb", ["api-resources", "get"])
def test_a_list_that_takes_too_long_is_one_that_cannot_be_told(live: Host, verb: str) -> None:
    """A datastore of 11 GB (incident 4): no preview ends for it, and Docker is well."""
    run = live.machine.run
    waits = []

    def slow(argv: Any, **options: Any) -> Any:
        if "kubectl" in argv and verb in argv:
            waits.append(options["timeout"])
            raise TookTooLong(argv[0])
        return run(argv, **options)

    live.machine.run = slow  # type: ignore[method-assign]
    answer = live("cluster owners", {"cluster": "factory"})
    assert (answer["state"], answer["whole"], answer["objects"]) == ("unknown", False, [])
    assert waits == [120]


@pytest.mark.parametrize(
    ("cut", "code", "whole"), [(40, 0, False), (0, 1, False), (0, 0, True)]
)  # fmt: skip
def test_a_list_that_is_not_whole_says_so(live: Host, cut: int, code: int, whole: bool) -> None:
    live.api.create(_deployment("cloudflared"), "test")
    run = live.machine.run

    def listed(argv: Any, **options: Any) -> Any:
        ran = run(argv, **options)
        if "kubectl" not in argv or "get" not in argv:
            return ran
        said = b"Error from server (Forbidden): deployments.apps is forbidden" if code else b""
        return Ran(code, ran.out[: len(ran.out) - cut], said)

    live.machine.run = listed  # type: ignore[method-assign]
    answer = live("cluster owners", {"cluster": "factory"})
    assert (answer["state"], answer["whole"]) == ("known", whole)
    assert len(answer["unseen"]) == (not whole)
    assert answer["objects"]


def test_a_kind_that_is_not_served_has_no_objects(live: Host) -> None:
    answer = live("cluster owners", {"cluster": "factory", "kinds": ["Application.argoproj.io"]})
    assert (answer["state"], answer["objects"]) == ("known", [])


# What the program declares


@pytest.mark.parametrize("stack", STACKS)
def test_every_object_that_a_stack_declares_is_looked_at(
    stack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose name is not told in time, or whose kind KINDS lacks, would have its other owner in
    secret."""
    looked: list[Ownership] = []
    monkeypatch.setattr(Ownership, "settle", lambda self: looked.append(self))
    registered = Program(tmp_path, stack).registered().values()
    objects = [
        (one.name, declared_key(one.type, one.inputs))
        for one in registered
        if one.type.startswith("kubernetes:")
    ]
    assert all(key for _, key in objects)
    assert {key: name for name, key in objects} == looked[0]._declared
    assert {key[0] for key in looked[0]._declared} - {"Release.helm.sh"} <= set(KINDS)


def seen(key: Key, *owners: str, writers: tuple[str, ...] = ()) -> dict[Key, dict[str, Any]]:
    return {key: {"owners": list(owners), "maker": "", "writers": list(writers)}}


DB: Key = ("Secret", "factory", "db")


def test_marks_of_this_stack_and_of_nobody_are_no_second_owner() -> None:
    assert other_owners(DB, {}) == []
    assert other_owners(DB, seen(DB, "Pulumi", "hostctl")) == []
    assert other_owners(DB, seen(DB, writers=("keycloak",))) == [], "it is seeded only"


def test_each_other_owner_has_its_own_way_out() -> None:
    remedies = {
        "ArgoCD application infra": "docs/owners.md",
        "k3s add-on coredns": "--disable=coredns",
        "Helm release factory/db": "helm.sh/resource-policy: keep",
        "ExternalSecret db": "let ExternalSecret db go of it",
    }
    for name, remedy in remedies.items():
        [owner] = other_owners(DB, seen(DB, "Pulumi", name))
        assert owner.name == name
        assert remedy in owner.release
    [writer] = other_owners(DB, seen(DB, "Pulumi", writers=("keycloak",)), writes=True)
    assert writer.name.startswith("keycloak, which has written its data")
    assert "seedOnly" in writer.release


def test_a_chart_of_this_stack_that_another_installs_too_has_two_owners() -> None:
    chart: Key = ("Release.helm.sh", "kube-system", "traefik")
    service: Key = ("Service", "kube-system", "traefik")
    mine = "Helm release kube-system/traefik"
    assert other_owners(chart, seen(service, mine)) == []
    assert other_owners(chart, seen(service, mine + "2", "ArgoCD application x")) == []
    for another in (f"{mine} of HelmChart kube-system/traefik", "ArgoCD application traefik"):
        [owner] = other_owners(chart, seen(service, mine, another))
        assert owner.name == f"{another} (it has Service kube-system/traefik, too)"


def register(*objects: tuple[str, str], live: dict[Key, Any] | None = None) -> None:
    """Declares ConfigMaps, each with its resource's name and its own, under a guard."""
    ownership = Ownership(
        frozenset({"ConfigMap default/handed", "Secret default/gone"}), live or {}
    )
    ownership.guard()
    for resource, name in objects:
        kubernetes.core.v1.ConfigMap(resource, metadata={"name": name, "namespace": "default"})
    ownership.settle()


def test_two_resources_that_declare_one_object_are_refused(
    run_program: Callable[..., Registered],
) -> None:
    refusal = r"ConfigMap default/a is declared twice, as one and as two"
    with pytest.raises(pulumi.RunError, match=refusal):
        run_program(lambda: register(("one", "a"), ("two", "a")), preview=True)


def test_a_preview_names_all_objects_with_two_owners(
    run_program: Callable[..., Registered],
) -> None:
    live = {
        ("ConfigMap", "default", name): {"owners": [f"k3s add-on {name}"], "writers": []}
        for name in ("a", "b", "handed")
    }
    with pytest.raises(pulumi.RunError) as refusal:
        run_program(
            lambda: register(("x", "a"), ("y", "b"), ("z", "handed"), live=live), preview=True
        )
    assert re.findall(r"ConfigMap default/(\w+) is declared here", str(refusal.value)) == ["a", "b"]


def test_what_is_handed_over_is_neither_written_nor_deleted(
    run_program: Callable[..., Registered], caplog: pytest.LogCaptureFixture
) -> None:
    registered = run_program(lambda: register(("x", "a"), ("z", "handed")))
    handed, own = registered["ConfigMap", "z"], registered["ConfigMap", "x"]
    assert (handed.ignore_changes, handed.retain_on_delete) == (["*"], True)
    assert (own.ignore_changes, own.retain_on_delete) == ([], False)
    assert "Secret default/gone is not declared any more" in caplog.text


def test_an_object_is_named_as_in_the_settings() -> None:
    assert reference(("Deployment.apps", "factory", "a")) == "Deployment factory/a"
    assert reference(("ClusterRole.rbac.authorization.k8s.io", "", "a")) == "ClusterRole a"


# What is refused before anything is declared


FOUND = {"state": "known", "detail": "", "unseen": [], "whole": True, "objects": []}


def found(name: str, *owners: str, namespace: str = "factory") -> dict[str, Any]:
    one = {"kind": "Deployment.apps", "namespace": namespace, "name": name, "owners": list(owners)}
    return {**FOUND, "objects": [{**one, "maker": "x", "writers": []}]}


def read(answer: dict[str, Any], **connector: Any) -> Ownership:
    """What a stack with one tunnel, by default connected from its cluster, makes of an answer."""
    image = {"image": "rancher/k3s:v1.31.5-k3s1", "name": "factory"}
    zone = "0" * 31 + "1"
    route = {"hostname": "a.example.org", "service": "http://a.web.svc.cluster.local:80"}
    tunnel = {
        "secret": "bWFkZS11cC1zZWNyZXQtb2YtMzItYnl0ZXMtYW5kLTE=",
        "connector": connector or {"kind": "cluster", "namespace": "factory"},
        "routes": [route],
    }
    stack = settings.Settings.model_validate(
        {
            "cluster": image,
            "namespaces": {"web": {}},
            "cloudflare": {
                "accountId": zone, "apiToken": "made-up-" * 5, "zones": {"example.org": zone}
            },
            "tunnels": {"factory": tunnel},
        },
        by_alias=True,
        by_name=False,
    )  # fmt: skip
    reading = Ownership.read(stack)
    next(reading)
    try:
        reading.send([answer])
    except StopIteration as read:
        return read.value
    raise AssertionError("it asks for more")


def test_the_incumbents_connector_of_argocd_is_refused_with_both_ways_out() -> None:
    with pytest.raises(pulumi.RunError, match="factory/cloudflared belongs to ArgoCD") as refusal:
        read(found("cloudflared", "ArgoCD application infra"))
    for part in ("homelab:tunnels.factory.connector", "Prune=false", "kind: external"):
        assert part in str(refusal.value)
    assert read(found("cloudflared")).seen
    assert read(found("cloudflared", "ArgoCD application infra"), kind="external").seen


@pytest.mark.parametrize("state", ["known", "unknown"])
def test_what_cannot_be_told_is_not_taken_for_absent(
    state: str, caplog: pytest.LogCaptureFixture, run_program: Callable[..., Registered]
) -> None:
    """Incident 3: with a connector of the stack's in the cluster, nothing is done on it."""
    unseen = {**FOUND, "state": state, "whole": False, "unseen": ["deployments.apps is forbidden"]}
    with pytest.raises(pulumi.RunError, match=r"cannot tell whether ArgoCD owns .* is forbidden"):
        read(unseen)
    run_program(lambda: read(unseen, kind="external"))
    assert "cannot be seen, so that no second owner is refused" in caplog.text


def test_what_others_run_in_a_connectors_own_namespace_is_warned_of(
    caplog: pytest.LogCaptureFixture, run_program: Callable[..., Registered]
) -> None:
    run_program(lambda: read(found("web")))
    assert "Deployment factory/web is not of this stack" in caplog.text
    assert "name factory under homelab:namespaces" in caplog.text
    caplog.clear()
    run_program(lambda: read(found("cloudflared-factory", "Pulumi")))
    run_program(lambda: read(found("web", namespace="web")))
    assert not caplog.text
