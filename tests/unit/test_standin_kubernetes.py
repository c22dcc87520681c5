"""The kubernetes stand-in where no recording reaches: clusters, conflicts, time-outs, Releases.

The rules are those of pulumi-kubernetes' source (provider/pkg) and of the API server; what the
official plugin was seen to answer is in test_golden.py. Invariants: nothing reaches another cluster
than the kubeconfig's, no error quotes a secret value, and a preview writes nothing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components import versions
from rehearsal.core import UNKNOWN, Failure, InitFailed, Request, Secret, Unimplemented, plain
from rehearsal.providers import kubernetes
from rehearsal.providers.kubernetes import Kubernetes

CA = base64.b64encode(b"the factory's authority").decode()
OTHER_CA = base64.b64encode(b"another authority").decode()
CHART = {"chart": "operator", "version": "1.2.3", "repositoryOpts": {"repo": "https://charts.test"}}


def kubeconfig(server: str = "https://127.0.0.1:6443", ca: str = CA, user: str = "admin") -> str:
    return yaml.safe_dump(
        {
            "clusters": [
                {"name": "k", "cluster": {"server": server, "certificate-authority-data": ca}}
            ],
            "users": [{"name": user, "user": {"token": "t"}}],
            "contexts": [{"name": "k", "context": {"cluster": "k", "user": user}}],
            "current-context": "k",
        }
    )


def request(kind: str, name: str = "thing", **fields: Any) -> Request:
    type_ = f"kubernetes:{kind}"
    return Request(f"urn:pulumi:test::homelab::{type_}::{name}", type_, name, **fields)


def obj(api_version: str, kind: str, name: str, **fields: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", **fields.pop("metadata", {})}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}


def config_map(data: dict[str, str], **metadata: Any) -> dict[str, Any]:
    return obj("v1", "ConfigMap", "thing", data=data, metadata=metadata)


def deployment(**spec: Any) -> dict[str, Any]:
    container = {"name": "app", "image": "example.org/app:1"}
    template = {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [container]}}
    full = {"selector": {"matchLabels": {"app": "a"}}, "template": template, **spec}
    return obj("apps/v1", "Deployment", "thing", spec=full)


def token(thing: dict[str, Any]) -> str:
    version = thing["apiVersion"]
    return f"{version if '/' in version else 'core/' + version}:{thing['kind']}"


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., None]:
    """Says what cluster runs on the make-believe machine."""

    def say(state: str = "running", ca: str = CA, name: str = "factory") -> None:
        file = tmp_path / "world" / "machine" / "clusters" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        cluster = {"state": state, "ca": ca, "server": "https://127.0.0.1:6443", "node": "k3d"}
        file.write_text(json.dumps(cluster))

    say()
    return say


@pytest.fixture
def logged() -> list[str]:
    """The lines that the engine was asked to show."""
    return []


@pytest.fixture
def configured(
    tmp_path: Path, machine: Callable[..., None], logged: list[str]
) -> Callable[..., Kubernetes]:
    """Starts a provider of the one rehearsal with a configuration."""

    def start(**args: Any) -> Kubernetes:
        provider = Kubernetes(
            tmp_path, lambda message, urn, severity, _: logged.append(f"{severity} {message}")
        )
        provider.configure({"kubeconfig": Secret(kubeconfig()), **args})
        return provider

    return start


@pytest.fixture
def provider(configured: Callable[..., Kubernetes]) -> Kubernetes:
    return configured()


def create(
    provider: Kubernetes, thing: dict[str, Any], **fields: Any
) -> tuple[str, dict[str, Any]]:
    return provider.create(request(token(thing), news=thing, **fields))


def update(
    provider: Kubernetes, made: tuple[str, dict[str, Any]], thing: dict[str, Any], **fields: Any
) -> dict[str, Any]:
    asked = request(token(thing), id=made[0], olds=made[1], news=thing, **fields)
    return provider.update(asked)


def differs(provider: Kubernetes, state: dict[str, Any], thing: dict[str, Any], **fields: Any):
    return provider.diff(request(token(thing), olds=state, news=thing, **fields))


def live_file(provider: Kubernetes, *parts: str) -> Path:
    cluster = kubernetes.cluster_id(CA)
    return provider.world.root.joinpath(cluster, *parts[:-1], parts[-1] + ".json")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    held = json.loads(file.read_text())
    change(held)
    file.write_text(json.dumps(held))


# Configuration: which cluster, and when it counts as another one


@pytest.mark.parametrize(
    ("olds", "news", "replaces"),
    [
        ({}, {"kubeconfig": kubeconfig("https://127.0.0.1:7443")}, ["kubeconfig"]),
        ({}, {"kubeconfig": kubeconfig(ca=OTHER_CA)}, ["kubeconfig"]),
        ({}, {"kubeconfig": kubeconfig(user="another")}, []),
        ({}, {"kubeconfig": UNKNOWN}, ["kubeconfig"]),
        ({"clusterIdentifier": "a"}, {"kubeconfig": UNKNOWN, "clusterIdentifier": "a"}, []),
        (
            {"clusterIdentifier": "a"},
            {"kubeconfig": kubeconfig(ca=OTHER_CA), "clusterIdentifier": "a"},
            [],
        ),
        ({"clusterIdentifier": "a"}, {"clusterIdentifier": "b"}, ["clusterIdentifier"]),
        ({"clusterIdentifier": "a"}, {"clusterIdentifier": UNKNOWN}, ["clusterIdentifier"]),
        # Adding an identifier, or taking it away, replaces nothing.
        ({}, {"clusterIdentifier": "a"}, []),
        ({"clusterIdentifier": "a"}, {}, []),
    ],
)
def test_the_identifier_decides_what_replaces_the_provider(
    provider: Kubernetes, olds: dict, news: dict, replaces: list[str]
):
    before = {"kubeconfig": kubeconfig(), **olds}
    after = {"kubeconfig": kubeconfig(), **news}
    assert provider.diff_config(request("provider", olds=before, news=after)).replaces == replaces


def test_an_empty_kubeconfig_is_refused_because_it_means_the_ambient_one(tmp_path: Path):
    with pytest.raises(Failure, match=r"kubeconfig is empty.*ambient"):
        Kubernetes(tmp_path).configure({"kubeconfig": ""})


@pytest.mark.parametrize(
    "setting", [{"enableServerSideApply": "false"}, {"renderYamlToDirectory": "x"}]
)
def test_ways_of_working_that_are_not_rehearsed_are_refused(
    tmp_path: Path, setting: dict[str, str]
):
    with pytest.raises(Failure, match="server-side apply only"):
        Kubernetes(tmp_path).configure({"kubeconfig": kubeconfig(), **setting})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("{clusters: []}", "no configuration has been provided"),
        ("{", "failed to parse kubeconfig data"),
        (kubeconfig("https://127.0.0.1:7443"), "127.0.0.1:7443: connect: connection refused"),
        (kubeconfig(ca=OTHER_CA), "certificate signed by unknown authority"),
    ],
)
def test_a_kubeconfig_that_fits_no_running_cluster_is_unreachable(
    configured: Callable[..., Kubernetes], config: str, why: str
):
    provider = configured(kubeconfig=config)
    with pytest.raises(Failure, match="configured Kubernetes cluster is unreachable") as failed:
        create(provider, config_map({}))
    assert why in str(failed.value)


def test_a_cluster_made_anew_is_empty(configured: Callable, machine: Callable):
    create(configured(), config_map({"key": "value"}))
    machine(ca=OTHER_CA)
    anew = configured(kubeconfig=kubeconfig(ca=OTHER_CA))
    assert anew.read(request("core/v1:ConfigMap", id="default/thing")) is None
    assert anew.read(request("core/v1:Namespace", id="kube-system")) is not None


# A cluster that is down


def test_with_the_cluster_stopped_a_preview_works_and_nothing_else(
    configured: Callable, machine: Callable
):
    made = create(configured(), config_map({"key": "one"}))
    machine("stopped")
    provider, thing = configured(enableConfigMapMutable="true"), config_map({"key": "two"})
    assert provider.check(request(token(thing), news=thing)).inputs == thing
    assert differs(provider, made[1], thing).detailed == {"data.key": "UPDATE"}
    assert create(provider, thing, preview=True) == ("", thing)
    assert update(provider, made, thing, preview=True) == thing
    with pytest.raises(Failure, match="configured Kubernetes cluster is unreachable"):
        update(provider, made, thing)
    asked = request(token(thing), id=made[0], olds=made[1])
    for method, text in (("read", "failed to read resource state"), ("delete", "unreachable. If")):
        with pytest.raises(Failure, match=text) as failed:
            getattr(provider, method)(asked)
        assert "PULUMI_K8S_DELETE_UNREACHABLE" in str(failed.value)


def test_delete_unreachable_lets_go_of_objects(
    configured: Callable, machine: Callable, logged: list[str]
):
    made = create(configured(), config_map({}))
    machine("stopped")
    provider = configured(deleteUnreachable="true")
    asked = request("core/v1:ConfigMap", id=made[0], olds=made[1])
    provider.delete(asked)
    assert provider.read(asked) is None
    assert any("Deleting the unreachable" in line for line in logged)


def test_skip_update_unreachable_keeps_what_was_known_and_says_so(
    configured: Callable, machine: Callable, logged: list[str]
):
    thing = config_map({"key": "one"})
    made = create(configured(), thing)
    machine("stopped")
    provider = configured(skipUpdateUnreachable="true")
    asked = request(token(thing), id=made[0], olds=made[1], old_inputs=thing)
    assert provider.read(asked) == (made[0], made[1], thing)
    checked = provider.check(request(token(thing), olds=thing, news=config_map({"key": "two"})))
    assert checked.inputs == thing
    assert "WARNING Cluster is unreachable" in "\n".join(logged)


# Check


@pytest.mark.parametrize(
    ("thing", "path"),
    [
        (config_map({}) | {"datum": {}}, "datum"),
        (deployment(replicas="2"), "spec.replicas"),
        (deployment(replica=2), "spec.replica"),
        (obj("apps/v1", "Deployment", "x", spec={"template": {}}), "spec"),
        (config_map({}, labels={"a": 1}), "metadata.labels.a"),
        (obj("v1", "Deployment", "x"), ""),
        (obj("v1", "Service", "x", spec={"ports": [{"port": True}]}), "spec.ports[0].port"),
        (obj("example.org/v1", "Thing", "x", metadata={"label": {}}), "metadata.label"),
    ],
)
def test_what_the_published_schema_does_not_allow_is_refused(
    provider: Kubernetes, thing: dict, path: str
):
    assert path in [
        where for where, _ in provider.check(request(token(thing), news=thing)).failures
    ]


def test_no_refusal_quotes_a_value(provider: Kubernetes):
    data = {"key": {"nested": "canary"}}
    secret = obj("v1", "Secret", "thing", stringData=Secret(data))
    failures = provider.check(request("core/v1:Secret", news=secret)).failures
    assert failures
    assert "canary" not in str(failures)


def test_an_unknown_value_fits_everywhere(provider: Kubernetes):
    secret = obj("v1", "Secret", "thing", stringData=Secret({"key": UNKNOWN}))
    checked = provider.check(request("core/v1:Secret", news=secret))
    assert not checked.failures
    assert plain(checked.inputs["stringData"]) == {"key": UNKNOWN}
    assert create(provider, secret, preview=True) == ("", secret)


def test_what_has_no_name_keeps_the_random_one_it_got(provider: Kubernetes):
    unnamed = {"apiVersion": "v1", "kind": "ConfigMap"}
    first = provider.check(request(token(unnamed), news=unnamed, seed=b"seed")).inputs
    assert first["metadata"]["name"].startswith("thing-")
    assert first["metadata"]["namespace"] == "default"
    assert first["metadata"]["annotations"] == {"pulumi.com/autonamed": "true"}
    again = provider.check(request(token(unnamed), news=unnamed, olds=first, seed=b"other")).inputs
    assert again == first
    named = provider.check(request(token(unnamed), news=config_map({}), olds=first)).inputs
    assert named == config_map({})


# Diff


@pytest.mark.parametrize(
    ("old", "new", "replaces"),
    [
        (deployment(), deployment(replicas=3), []),
        (
            deployment(),
            deployment(selector={"matchLabels": {"app": "a", "tier": "b"}}),
            ["spec.selector.matchLabels.tier"],
        ),
        (
            obj("v1", "Service", "thing", spec={"ports": [{"port": 1}]}),
            obj("v1", "Service", "thing", spec={"ports": [{"port": 1}], "clusterIP": "None"}),
            ["spec.clusterIP"],
        ),
        (
            obj("storage.k8s.io/v1", "StorageClass", "thing", provisioner="a"),
            obj("storage.k8s.io/v1", "StorageClass", "thing", provisioner="b"),
            ["provisioner"],
        ),
        (
            obj("v1", "PersistentVolumeClaim", "thing", spec={"storageClassName": "a"}),
            obj("v1", "PersistentVolumeClaim", "thing", spec={}),
            ["spec.storageClassName"],
        ),
        (config_map({"key": "a"}), config_map({"key": "a", "more": "b"}), ["data.more"]),
        (config_map({"key": "a"}), config_map({"key": "a"}, labels={"a.b/c": "d"}), []),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_the_fields_of_each_kind_that_replace_it(
    provider: Kubernetes, old: dict, new: dict, replaces: list[str]
):
    state = create(provider, old, preview=True)[1]
    answer = differs(provider, state, new)
    assert answer.changes
    assert answer.replaces == replaces
    # Its name is taken as long as the old one is there.
    assert answer.delete_before_replace == bool(replaces)


@pytest.mark.parametrize("immutable", [False, True])
def test_the_mutable_flags_do_not_hold_for_what_is_immutable(
    configured: Callable[..., Kubernetes], immutable: bool
):
    provider = configured(enableSecretMutable="true", enableConfigMapMutable="true")
    for kind, value in (("ConfigMap", "b"), ("Secret", "Yg==")):
        old = obj("v1", kind, "thing", immutable=immutable, data={"key": "YQ=="})
        new = old | {"data": {"key": value}}
        state = create(provider, old, preview=True)[1]
        assert bool(differs(provider, state, new).replaces) == immutable


def test_another_name_replaces_without_deleting_first(provider: Kubernetes):
    state = create(provider, config_map({}))[1]
    answer = differs(provider, state, config_map({}, name="renamed"))
    assert answer.replaces == ["metadata.name"]
    assert not answer.delete_before_replace


@pytest.mark.parametrize(
    "path", ["data.key", "data", 'metadata.annotations["a.b/c"]', "metadata.annotations.*"]
)
def test_ignored_changes_do_not_count(provider: Kubernetes, path: str):
    old = config_map({"key": "a"}, annotations={"a.b/c": "1"})
    data = {"key": "b"} if path.startswith("data") else old["data"]
    annotations = {"a.b/c": "1" if path.startswith("data") else "2"}
    new = config_map(data, annotations=annotations)
    state = create(provider, old)[1]
    assert differs(provider, state, new).changes
    assert not differs(provider, state, new, ignore_changes=(path,)).changes


text = st.text("abcxyz", min_size=1, max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    labels=st.dictionaries(text, text, max_size=3),
    old=st.dictionaries(text, text, max_size=4),
    new=st.dictionaries(text, text, max_size=4),
)
def test_after_an_update_nothing_is_left_to_do(provider: Kubernetes, labels, old, new):
    provider.world.delete(f"{kubernetes.cluster_id(CA)}/default/ConfigMap/thing")
    made = create(provider, config_map(old, labels=labels))
    wanted = config_map(new)
    foretold = plain(update(provider, made, wanted, preview=True))
    state = update(provider, made, wanted)
    assert not differs(provider, state, wanted).changes
    assert (state.get("data") or {}) == new
    # A preview keeps what the first update takes away: managers change only then (await.go).
    assert new.items() <= (foretold.get("data") or {}).items()


# The API server


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        ("Namespace", "a.b", "RFC 1123 label"),
        ("Service", "1a", "DNS-1035 label"),
        ("Secret", "a_b", "RFC 1123 subdomain"),
        ("ConfigMap", "a" * 254, "no more than 253"),
    ],
)
def test_each_kind_has_its_rule_for_names(provider: Kubernetes, kind: str, name: str, text: str):
    spec = {"spec": {"ports": [{"port": 1}]}} if kind == "Service" else {}
    with pytest.raises(Failure, match=text):
        create(provider, obj("v1", kind, name, **spec), preview=True)


@pytest.mark.parametrize(
    ("type_", "data", "text"),
    [
        ("kubernetes.io/tls", {"tls.crt": "YQ=="}, r"data\[tls.key\]: Required value"),
        ("kubernetes.io/ssh-auth", {}, r"data\[ssh-privatekey\]: Required value"),
        ("kubernetes.io/basic-auth", {"token": "YQ=="}, "Required value"),
        ("kubernetes.io/dockerconfigjson", {".dockerconfigjson": "Y2FuYXJ5"}, "not valid JSON"),
        ("Opaque", {"key": "canary!"}, "illegal base64 data"),
        ("Opaque", {"a/b": "YQ=="}, "a valid config key"),
        ("Opaque", {"key": "A" * 2_000_000}, "Too long"),
    ],
)
def test_a_secret_of_a_type_needs_its_keys(
    provider: Kubernetes, type_: str, data: dict[str, str], text: str
):
    secret = obj("v1", "Secret", "thing", type=type_, data=Secret(data))
    with pytest.raises(Failure, match=text) as failed:
        create(provider, secret, preview=True)
    assert "canary" not in str(failed.value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ({"selector": {"matchLabels": {"app": "b"}}}, "`selector` does not match"),
        (
            {"template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": []}}},
            "Required",
        ),
    ],
)
def test_a_workload_must_hang_together(provider: Kubernetes, spec: dict, text: str):
    with pytest.raises(Failure, match=text):
        create(provider, deployment(**spec))


def test_a_mount_needs_its_volume(provider: Kubernetes):
    thing = deployment()
    mount = {"name": "absent", "mountPath": "/x"}
    thing["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] = [mount]
    with pytest.raises(Failure, match=r'volumeMounts\[0\].name: Not found: "absent"'):
        create(provider, thing)


def test_an_object_needs_its_namespace(provider: Kubernetes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kubernetes, "RETRY_SECONDS", (0, 0))
    thing = config_map({}, namespace="absent")
    assert create(provider, thing, preview=True) == ("", thing)
    with pytest.raises(Failure, match='namespaces "absent" not found'):
        create(provider, thing)


def test_what_exists_is_taken_over_only_on_request(configured: Callable[..., Kubernetes]):
    create(configured(), config_map({"key": "theirs"}))
    thing = config_map({"key": "ours"})
    assert create(configured(), thing, preview=True) == ("", thing)
    with pytest.raises(Failure, match='"thing" already exists\n\nThe resource already'):
        create(configured(), thing)
    taker = configured(upsertExistingObjects="true", enablePatchForce="true")
    assert create(taker, thing)[1]["data"] == {"key": "ours"}


def test_a_preview_writes_nothing(provider: Kubernetes):
    def world() -> dict[str, str]:
        return {str(file): file.read_text() for file in provider.world.root.rglob("*.json")}

    made = create(provider, config_map({"key": "one"}))
    before = world()
    state = create(provider, config_map({}, name="other"), preview=True)[1]
    assert "status" not in state
    assert "resourceVersion" not in state["metadata"]
    update(provider, made, config_map({"key": "two"}), preview=True)
    assert world() == before


def test_a_custom_resource_needs_its_definition(
    provider: Kubernetes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kubernetes, "RETRY_SECONDS", (0, 0))
    thing = obj("example.org/v1", "Widget", "thing", spec={"size": 1})
    assert create(provider, thing, preview=True) == ("", thing)
    with pytest.raises(Failure, match='no matches for kind "Widget"'):
        create(provider, thing)
    schema = {"type": "object", "x_kubernetes_preserve_unknown_fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    spec = {
        "group": "example.org",
        "names": {"kind": "Widget", "plural": "widgets"},
        "scope": "Cluster",
        "versions": [version],
    }
    definition = obj(
        "apiextensions.k8s.io/v1", "CustomResourceDefinition", "widgets.example.org", spec=spec
    )
    checked = provider.check(request(token(definition), news=definition))
    assert not checked.failures
    state = create(provider, definition)[1]
    assert not differs(provider, state, definition).changes
    assert state["spec"]["versions"][0]["schema"]["openAPIV3Schema"] == schema
    id, made = create(provider, thing)
    assert id == "thing"
    assert not differs(provider, made, thing).changes


# Drift


def test_drift_shows_as_a_difference_from_what_was_declared(provider: Kubernetes):
    thing = config_map({"key": "one"})
    id, state = create(provider, thing)
    file = live_file(provider, "default", "ConfigMap", "thing")
    edit(file, lambda held: held["data"].update(key="edited", added="by hand"))
    asked = request(token(thing), id=id, olds=state, old_inputs=thing)
    found = provider.read(asked)
    assert found is not None
    assert found[2]["data"] == {"key": "edited"}
    assert differs(provider, found[1], thing).detailed == {"data.key": "UPDATE_REPLACE"}
    file.unlink()
    assert provider.read(asked) is None


def test_an_update_of_what_is_gone_fails(provider: Kubernetes):
    made = create(provider, config_map({"key": "one"}))
    live_file(provider, "default", "ConfigMap", "thing").unlink()
    with pytest.raises(Failure, match='failed: configmaps "thing" not found\nunable to get'):
        update(provider, made, config_map({"key": "two"}))


def test_secret_marks_survive_a_refresh(provider: Kubernetes):
    secret = obj("v1", "Secret", "thing", data=Secret({"key": "YQ=="}))
    id, state = create(provider, secret)
    found = provider.read(request("core/v1:Secret", id=id, olds=state, old_inputs=secret))
    assert found is not None
    _, refreshed, inputs = found
    for marked in (state["data"], state["__inputs"]["data"], refreshed["data"], inputs["data"]):
        assert isinstance(marked, Secret)


def test_what_a_client_side_apply_wrote_down_of_a_secret_is_secret(provider: Kubernetes):
    name = "kubectl.kubernetes.io/last-applied-configuration"
    written = {"metadata": {"annotations": {name: '{"data": {"key": "YQ=="}}'}}}
    secret = obj("v1", "Secret", "thing", data=Secret({"key": "YQ=="}))
    secret["metadata"] |= written["metadata"]
    id, state = create(provider, secret)
    found = provider.read(request("core/v1:Secret", id=id, olds=state, old_inputs=secret))
    assert found is not None
    for marked in (state, found[1]):
        assert isinstance(marked["metadata"]["annotations"][name], Secret)


def test_an_import_takes_the_live_object_as_its_inputs(provider: Kubernetes):
    create(provider, config_map({"key": "one"}, labels={"a": "b"}))
    found = provider.read(request("core/v1:ConfigMap", id="default/thing"))
    assert found is not None
    assert found[2] == config_map({"key": "one"}, labels={"a": "b"})


# Field managers


def _owned_by_another(provider: Kubernetes, operation: str = "Update") -> None:
    def take(held: dict[str, Any]) -> None:
        held["data"]["key"] = "theirs"
        held["metadata"]["managedFields"].append(
            {
                "manager": "argocd-controller",
                "operation": operation,
                "apiVersion": "v1",
                "time": "2026-01-02T03:04:05Z",
                "fieldsV1": {"f:data": {"f:key": {}}},
            }
        )

    edit(live_file(provider, "default", "ConfigMap", "thing"), take)


def test_a_field_of_another_manager_is_a_conflict_unless_forced(configured: Callable):
    provider = configured()
    made = create(provider, config_map({"key": "one", "other": "a"}))
    made = made[0], update(provider, made, config_map({"key": "one", "other": "b"}))
    _owned_by_another(provider)
    wanted = config_map({"key": "ours"})
    for preview in (True, False):
        with pytest.raises(InitFailed) as failed:
            update(provider, made, wanted, preview=preview)
        assert (
            'conflict with "argocd-controller" using v1 at 2026-01-02T03:04:05Z: .data.key'
            in str(failed.value)
        )
        assert failed.value.properties["data"]["key"] == "theirs"
    forced = config_map({"key": "ours"}, annotations={"pulumi.com/patchForce": "true"})
    assert update(provider, made, forced)["data"] == {"key": "ours"}


def test_an_ignored_field_stays_with_the_manager_that_owns_it(provider: Kubernetes):
    made = create(provider, config_map({"other": "a"}))
    _owned_by_another(provider, "Apply")
    wanted = config_map({"key": "ours", "other": "b"})
    state = update(provider, made, wanted, ignore_changes=("data.key",))
    assert state["data"] == {"key": "theirs", "other": "b"}


def test_an_update_leaves_what_others_added(provider: Kubernetes):
    made = create(provider, deployment())
    edit(
        live_file(provider, "default", "Deployment.apps", "thing"),
        lambda held: held["spec"]["template"]["spec"]["containers"].append(
            {"name": "injected", "image": "example.org/sidecar:1"}
        ),
    )
    state = update(provider, made, deployment(replicas=2))
    names = [c["name"] for c in state["spec"]["template"]["spec"]["containers"]]
    assert names == ["app", "injected"]
    assert state["metadata"]["generation"] == 2


def test_a_field_that_no_update_may_change_is_refused(provider: Kubernetes):
    old = obj("storage.k8s.io/v1", "StorageClass", "thing", provisioner="a", reclaimPolicy="Delete")
    made = create(provider, old)
    with pytest.raises(InitFailed, match="reclaimPolicy: Invalid value: field is immutable"):
        update(provider, made, old | {"reclaimPolicy": "Retain"}, preview=True)


# Await


def test_what_never_gets_ready_times_out_but_is_kept(provider: Kubernetes):
    provider.world.put("ready", {"Deployment/default/thing": "never"})
    with pytest.raises(InitFailed, match="'thing' timed out waiting to be Ready") as failed:
        create(provider, deployment(), timeout=0.01)
    assert failed.value.id == "default/thing"
    assert "Minimum number of live Pods was not attained" in failed.value.reasons
    read = request("apps/v1:Deployment", id=failed.value.id, olds=failed.value.properties)
    read.old_inputs = deployment()
    with pytest.raises(InitFailed, match="was created but failed to initialize"):
        provider.read(read)
    provider.world.put("ready", {"Deployment/default/thing": 0})
    assert provider.read(read) is not None


def test_skip_await_waits_for_nothing(provider: Kubernetes):
    provider.world.put("ready", {"Deployment/default/thing": "never"})
    thing = deployment()
    thing["metadata"]["annotations"] = {"pulumi.com/skipAwait": "true"}
    assert create(provider, thing, timeout=0.01)[0] == "default/thing"


def test_a_load_balancer_waits_for_an_address_that_nothing_assigns(provider: Kubernetes):
    spec = {"type": "LoadBalancer", "ports": [{"port": 80}]}
    with pytest.raises(InitFailed) as failed:
        create(provider, obj("v1", "Service", "thing", spec=spec), timeout=0.01)
    assert failed.value.reasons[-1].startswith("Service was not allocated an IP address")
    provider.world.put("ready", {"Service/default/other": 0})
    create(provider, obj("v1", "Service", "other", spec=spec), timeout=0.01)


def test_a_plain_service_is_ready_at_once(provider: Kubernetes):
    spec = {"selector": {"app": "a"}, "ports": [{"port": 80}]}
    assert create(provider, obj("v1", "Service", "thing", spec=spec))[1]["spec"]["clusterIP"]


# Delete


def test_with_a_namespace_goes_what_it_holds(provider: Kubernetes):
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "media"}}
    id, state = create(provider, namespace)
    create(provider, config_map({}, namespace="media"))
    provider.delete(request("core/v1:Namespace", id=id, olds=state))
    assert provider.read(request("core/v1:ConfigMap", id="media/thing")) is None
    assert provider.read(request("core/v1:Namespace", id=id)) is None
    # What is gone already is deleted.
    provider.delete(request("core/v1:Namespace", id=id, olds=state))


# helm.sh/v3:Release


def release(**properties: Any) -> dict[str, Any]:
    return {**CHART, "name": "operator", "namespace": "default", **properties}


@pytest.fixture
def charts(provider: Kubernetes) -> Kubernetes:
    """A provider whose world offers one chart."""
    provider.world.put("charts", {"https://charts.test/operator@1.2.3": "v9"})
    return provider


def helm(provider: Kubernetes, **properties: Any) -> dict[str, Any]:
    checked = provider.check(request("helm.sh/v3:Release", news=release(**properties)))
    assert not checked.failures
    return checked.inputs


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"version": "9.9.9"}, 'chart "operator" version "9.9.9" not found in https://charts.test'),
        ({"chart": "other"}, 'chart "other" version "1.2.3" not found'),
        ({"repositoryOpts": {"repo": "https://gone.test"}}, "lookup gone.test: no such host"),
        ({"repositoryOpts": {}}, 'failed to download "operator"'),
    ],
)
def test_a_release_needs_its_chart_already_in_a_preview(
    charts: Kubernetes, changed: dict, text: str
):
    failures = charts.check(request("helm.sh/v3:Release", news=release(**changed))).failures
    assert [path for path, _ in failures] == ["chart"]
    assert text in failures[0][1]
    assert "; check the chart name and repository configuration." in failures[0][1]


def test_a_release_of_unknown_values_is_not_fetched(provider: Kubernetes):
    inputs = helm(provider, values={"token": UNKNOWN})
    assert inputs["values"] == {"token": UNKNOWN}


def test_a_property_that_no_release_has_is_refused(charts: Kubernetes):
    asked = request("helm.sh/v3:Release", news=release(valuse={}))
    assert [path for path, _ in charts.check(asked).failures] == ["valuse"]


def test_the_life_of_a_release(charts: Kubernetes):
    inputs = helm(charts, values={"replicas": 1, "key": Secret("s")}, version="")
    assert inputs["version"] == "1.2.3"
    assert inputs["timeout"] == 300
    preview = charts.create(request("helm.sh/v3:Release", news=inputs, preview=True))[1]
    assert preview["status"] is UNKNOWN
    id, state = charts.create(request("helm.sh/v3:Release", news=inputs))
    assert id == "default/operator"
    assert state["status"]["status"] == "deployed"
    assert state["status"]["appVersion"] == "v9"
    assert isinstance(state["__inputs"], Secret)
    assert isinstance(state["values"]["key"], Secret)
    assert not charts.diff(request("helm.sh/v3:Release", olds=state, news=inputs)).changes
    with pytest.raises(Failure, match="cannot re-use a name that is still in use"):
        charts.create(request("helm.sh/v3:Release", news=inputs))

    wanted = helm(charts, values={"replicas": 2})
    answer = charts.diff(request("helm.sh/v3:Release", olds=state, news=wanted))
    assert answer.detailed == {"values.replicas": "UPDATE", "values.key": "DELETE"}
    assert not answer.replaces
    state = charts.update(request("helm.sh/v3:Release", id=id, olds=state, news=wanted))
    assert state["status"]["revision"] == 2

    found = charts.read(request("helm.sh/v3:Release", id=id, olds=state, old_inputs=wanted))
    assert found is not None
    assert not charts.diff(request("helm.sh/v3:Release", olds=found[1], news=wanted)).changes
    charts.delete(request("helm.sh/v3:Release", id=id, olds=state))
    assert charts.read(request("helm.sh/v3:Release", id=id, olds=state)) is None


def test_a_release_cannot_be_deleted_once_its_cluster_is_gone(
    configured: Callable, charts: Kubernetes, machine: Callable
):
    id, state = charts.create(request("helm.sh/v3:Release", news=helm(charts)))
    machine("stopped")
    provider = configured()
    with pytest.raises(Failure, match="can't delete Helm Release with unreachable cluster"):
        provider.delete(request("helm.sh/v3:Release", id=id, olds=state))
    assert not provider.check(request("helm.sh/v3:Release", news=release())).failures


def test_a_release_that_does_not_get_ready_is_kept_as_failed(charts: Kubernetes):
    charts.world.put("ready", {"Release/default/operator": "never"})
    inputs = helm(charts, timeout=0.01)
    with pytest.raises(InitFailed, match="was created, but failed to initialize") as failed:
        charts.create(request("helm.sh/v3:Release", news=inputs))
    assert failed.value.properties["status"]["status"] == "failed"


def test_a_release_needs_its_namespace_unless_it_makes_it(charts: Kubernetes):
    inputs = helm(charts, namespace="tailscale")
    with pytest.raises(Failure, match='namespaces "tailscale" not found'):
        charts.create(request("helm.sh/v3:Release", news=inputs))
    charts.create(request("helm.sh/v3:Release", news=inputs | {"createNamespace": True}))
    assert charts.read(request("core/v1:Namespace", id="tailscale")) is not None


def test_a_value_that_the_charts_schema_does_not_know_is_refused(charts: Kubernetes):
    chart = {"appVersion": "v9", "values": ["deployment", "service"]}
    charts.world.put("charts", {"https://charts.test/operator@1.2.3": chart})
    values = {"deployment": {"initContainers": []}, "initContainers": []}
    asked = request("helm.sh/v3:Release", news=release(values=values))
    ((path, text),) = charts.check(asked).failures
    assert path == "values"
    assert "Additional property initContainers is not allowed" in text


@pytest.mark.parametrize(
    ("chart", "values", "wrong"),
    [
        (versions.LONGHORN, {"persistence": {"defaultClas": False}}, "persistence: defaultClas"),
        (versions.LONGHORN, {"service": {"ui": {"typ": "x"}}}, "service.ui: typ"),
        (versions.CSI_DRIVER_NFS, {"storageClass": {"enabled": False}}, "storageClass: enabled"),
        (versions.ROOK_CEPH, {"operator": {}}, "(root): operator"),
        (versions.METALLB, {"speaker": {"toleratesMaster": True}}, "speaker: toleratesMaster"),
        (versions.METALLB, {"frr-k8s": {"enabled": False}}, "(root): frr-k8s"),
        (versions.TRAEFIK, {"service": {"enable": False}}, "service: enable"),
        (versions.TRAEFIK, {"initContainers": []}, "(root): initContainers"),
        (versions.CALICO, {"installation": {"flexVolume": "None"}}, "installation: flexVolume"),
        (versions.CALICO, {"whisker": False}, "(root): whisker"),
    ],
)
def test_a_mistyped_value_of_a_pinned_chart_is_refused(
    charts: Kubernetes, chart: versions.Chart, values: dict[str, Any], wrong: str
) -> None:
    wanted = {"chart": chart.name, "version": chart.version, "values": values}
    wanted |= {"repositoryOpts": {"repo": chart.repository}, "namespace": "default"}
    ((path, text),) = charts.check(request("helm.sh/v3:Release", news=wanted)).failures
    assert path == "values"
    where, _, key = wrong.partition(": ")
    assert text.endswith(f"- {where}: Additional property {key} is not allowed")


# MetalLB, as the API server's clients see it

SYSTEM = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "metallb-system"}}
CRDS = {"ipaddresspools.metallb.io/v1beta1": "IPAddressPool"}


@pytest.fixture
def metallb(charts: Kubernetes) -> Kubernetes:
    """A provider in whose cluster a chart has brought MetalLB's kinds."""
    chart = {"appVersion": "v9", "crds": CRDS}
    charts.world.put("charts", {"https://charts.test/operator@1.2.3": chart})
    create(charts, SYSTEM)
    charts.create(request("helm.sh/v3:Release", news=helm(charts)))
    return charts


def pool(name: str, addresses: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "metallb-system"}
    spec = {"addresses": [addresses], **spec}
    return {
        "apiVersion": "metallb.io/v1beta1",
        "kind": "IPAddressPool",
        "metadata": metadata,
        "spec": spec,
    }


def balancer(name: str, asked: str | None = None) -> dict[str, Any]:
    service = obj("v1", "Service", name, spec={"type": "LoadBalancer", "ports": [{"port": 80}]})
    if asked:
        service["metadata"]["annotations"] = {"metallb.io/loadBalancerIPs": asked}
    return service


def address(state: dict[str, Any]) -> str:
    return state["status"]["loadBalancer"]["ingress"][0]["ip"]


def test_a_load_balancer_gets_the_address_that_it_asks_for_or_a_free_one(metallb: Kubernetes):
    create(metallb, pool("main", "192.168.1.240-192.168.1.241"))
    create(metallb, pool("spare", "192.168.1.232/31", autoAssign=False))
    asks = create(metallb, balancer("asks", "192.168.1.240"), timeout=0.01)[1]
    assert address(asks) == "192.168.1.240"
    assert address(create(metallb, balancer("any"), timeout=0.01)[1]) == "192.168.1.241"
    spare = create(metallb, balancer("spare", "192.168.1.233"), timeout=0.01)[1]
    assert address(spare) == "192.168.1.233"
    # None is left, the asked one is taken, or in no pool.
    for name, asked in (("left", None), ("taken", "192.168.1.240"), ("outside", "192.168.1.9")):
        with pytest.raises(InitFailed, match="timed out waiting"):
            create(metallb, balancer(name, asked), timeout=0.01)


def test_a_load_balancer_without_an_address_gets_one_when_a_pool_comes(metallb: Kubernetes):
    with pytest.raises(InitFailed):
        create(metallb, balancer("early"), timeout=0.01)
    create(metallb, pool("main", "192.168.1.240/32"))
    found = metallb.read(request("core/v1:Service", id="default/early"))
    assert found is not None
    assert address(found[1]) == "192.168.1.240"


def test_metallbs_webhook_refuses_pools_that_overlap_and_may_be_silent(metallb: Kubernetes):
    create(metallb, pool("main", "192.168.1.240-192.168.1.245"))
    with pytest.raises(Failure, match=r"denied the request.*overlaps with already defined"):
        create(metallb, pool("more", "192.168.1.244/31"))
    metallb.world.put("webhooks", {"metallb": 1})
    with pytest.raises(Failure, match="failed calling webhook"):
        create(metallb, pool("other", "192.168.1.250/32"))
    create(metallb, pool("other", "192.168.1.250/32"))


def test_the_definitions_of_a_chart_come_and_go_with_its_release(metallb: Kubernetes):
    create(metallb, pool("main", "192.168.1.240/32"))
    state = metallb.read(
        request("helm.sh/v3:Release", id="default/operator", olds=helm(metallb), old_inputs={})
    )
    assert state is not None
    metallb.delete(request("helm.sh/v3:Release", id="default/operator", olds=state[1]))
    with pytest.raises(Failure, match="no matches for kind"):
        create(metallb, pool("main", "192.168.1.240/32"))
    assert not list(metallb.world.root.rglob("IPAddressPool.metallb.io/*.json"))


def test_what_would_fetch_at_every_preview_is_not_rehearsed(provider: Kubernetes):
    with pytest.raises(Unimplemented, match="kubernetes:helm:template"):
        provider.invoke("kubernetes:helm:template", {}, preview=True)
    with pytest.raises(Unimplemented, match="kustomize"):
        provider.construct(request("kustomize/v2:Directory"))
