"""Who owns an object, as a real API server and real controllers leave their marks on it.

No ArgoCD, Helm or operator runs here: what they write is written by kubectl as they write it, with
their field managers. What Pulumi, hostctl, Kubernetes' own controllers and the node's add-ons
write, they write themselves.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.engine import Engine
from tests.cluster.host import Host
from tests.cluster.p510 import RealP510
from tests.engine.conftest import errors, planned

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

CONNECTOR = "Deployment factory/cloudflared-factory"
SECRETS = {
    "cloudflared-factory": "ArgoCD application infra",
    "minio-kms": "Helm release factory/minio",
    "observe-root": "k3s add-on observe",
    "otel-otlp-auth": "ExternalSecret otel",
    "skillai-db": "OpenAPI-Generator, which has written its data since it was made",
}
"""By name, who else will own it."""
TRACKING = "argocd.argoproj.io/tracking-id"
HELM = {"app.kubernetes.io/managed-by": "Helm"}
HISTORY = {"owner": "helm", "name": "traefik", "status": "deployed", "version": "1"}


def manifest(kind: str, name: str, namespace: str = "", **more: Any) -> dict[str, Any]:
    """An object of a kind such as `apps/v1 Deployment`."""
    version, _, kind = kind.rpartition(" ")
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    metadata |= more.pop("metadata", {})
    return {"apiVersion": version or "v1", "kind": kind, "metadata": metadata, **more}


def definition(group: str, kind: str) -> dict[str, Any]:
    """A kind of an operator, whose objects may hold anything."""
    plural = f"{kind.lower()}s"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"kind": kind, "plural": plural}
    spec = {"group": group, "names": names, "scope": "Namespaced", "versions": [version]}
    name = f"{plural}.{group}"
    return manifest("apiextensions.k8s.io/v1 CustomResourceDefinition", name, spec=spec)


class Factory(RealP510):
    """Of p510 the cluster, some Secrets and the connector in it."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        super().__init__(engine, directory)
        self.prepare()
        for name in ("argocd", "tailscale", "backups", "cleaning", "watching"):
            del self.settings[name]
        secrets = self.settings["secrets"]["factory"]
        kept = {name: secrets[name] for name in (*SECRETS, "minio-creds", "factory-cli-creds")}
        self.settings["secrets"] = {"factory": kept}
        tunnel = self.settings["tunnels"]["factory"]
        self.settings["tunnels"] = {"factory": {**tunnel, "routes": []}}
        self.set_config(self.settings)

    def hand_over(self, *titles: str) -> None:
        self.settings["handedOver"] = list(titles)
        self.set_config(self.settings)

    def live(self, title: str) -> dict[str, Any]:
        kind, _, place = title.partition(" ")
        namespace, _, name = place.rpartition("/")
        where = [f"--namespace={namespace}"] if namespace else []
        return json.loads(self.kubectl("get", kind, name, *where, "--output=json"))

    def apply(self, manager: str, *objects: Mapping[str, Any], server_side: bool = True) -> None:
        """As another program applies what it has, whoever has the fields."""
        how = ["--server-side", "--force-conflicts"] if server_side else []
        text = yaml.safe_dump_all(objects)
        self.kubectl("apply", f"--field-manager={manager}", *how, "--filename=-", input=text)

    def patch(self, manager: str, title: str, change: Mapping[str, Any]) -> None:
        kind, _, place = title.partition(" ")
        namespace, _, name = place.rpartition("/")
        what = [f"--namespace={namespace}", f"--field-manager={manager}", "--type=merge"]
        self.kubectl("patch", kind, name, *what, f"--patch={json.dumps(change)}")

    def owners(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """The exit status of `make owners`, and its rows by object."""
        command = [sys.executable, "-m", "status", "--owners", "--json", "--project"]
        project = str(self.directory / "project")
        ran = self.engine.run(
            [*command, project, self.stack], env=self.process_environment(), check=False
        )
        assert ran.stdout, ran.stderr
        return ran.returncode, {row["what"]: row for row in json.loads(ran.stdout)}


@pytest.fixture(scope="module")
def factory(session_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Factory]:
    session_engine.start()
    session_engine.clean()
    stack = Factory(session_engine, tmp_path_factory.mktemp("factory"))
    stack.up()
    yield stack
    session_engine.start()
    session_engine.clean()


def test_owners_are_what_real_objects_say_of_themselves(factory: Factory):
    chart = manifest("helm.cattle.io/v1 HelmChart", "traefik", "kube-system", spec={})
    release = {
        "meta.helm.sh/release-name": "traefik",
        "meta.helm.sh/release-namespace": "kube-system",
    }
    port = {"ports": [{"port": 80}]}
    synced = {TRACKING: "web:/Service:default/web"}
    copied = {TRACKING: "web:/Service:default/another"}
    factory.apply("k3s", definition("helm.cattle.io", "HelmChart"))
    factory.kubectl("wait", "customresourcedefinition", "--all", "--for=condition=Established")
    factory.apply("k3s", chart)
    factory.apply(
        "helm",
        manifest(
            "Service",
            "traefik",
            "kube-system",
            spec=port,
            metadata={"annotations": release, "labels": HELM},
        ),
        manifest(
            "Secret",
            "sh.helm.release.v1.traefik.v1",
            "kube-system",
            type="helm.sh/release.v1",
            metadata={"labels": HISTORY},
        ),
    )
    labelled = {"labels": {"app.kubernetes.io/instance": "apps"}}
    factory.apply(
        "argocd-controller",
        manifest("Service", "web", "default", spec=port, metadata={"annotations": synced}),
        manifest("Service", "copy", "default", spec=port, metadata={"annotations": copied}),
    )
    factory.apply(
        "argocd-controller",
        manifest("ConfigMap", "web", "default", metadata=labelled),
        server_side=False,
    )
    factory.kubectl("create", "configmap", "by-hand", "--namespace=default", "--from-literal=a=b")

    code, rows = factory.owners()
    assert code == 0, rows
    now = {what: row["now"] for what, row in rows.items()}
    traefik = "Helm release kube-system/traefik of HelmChart kube-system/traefik"
    expected = {
        "ConfigMap default/by-hand": "kubectl-create",
        "ConfigMap default/kube-root-ca.crt": "Kubernetes",
        "ConfigMap default/web": "ArgoCD application apps",
        "ConfigMap kube-system/coredns": "k3s add-on coredns",
        "HelmChart kube-system/traefik": "Kubernetes",
        "Namespace factory": "Pulumi",
        "Namespace kube-system": "Kubernetes",
        CONNECTOR: "Pulumi",
        "Secret factory/factory-cli-creds": "hostctl",
        "Secret factory/minio-creds": "Pulumi",
        "Secret kube-system/sh.helm.release.v1.traefik.v1": traefik,
        "Service default/copy": "argocd-controller",
        "Service default/kubernetes": "Kubernetes",
        "Service default/web": "ArgoCD application web",
        "Service kube-system/kube-dns": "k3s add-on coredns",
        "Service kube-system/traefik": traefik,
        "ServiceAccount factory/default": "Kubernetes",
        "StorageClass local-path": "k3s add-on local-storage",
    }
    assert {what: now.get(what) for what in expected} == expected

    # What a controller makes is the object's that has it made, though it copies the annotations.
    kinds = ["ReplicaSet.apps", "Pod", "EndpointSlice.discovery.k8s.io"]
    spec = {"cluster": "factory", "kinds": kinds}
    made = Host(factory.engine).done("cluster", "owners", spec=spec)["objects"]
    owners = {
        (one["kind"], owner.split(" ")[0], one["namespace"])
        for one in made
        for owner in one["owners"]
    }
    assert owners >= {
        ("ReplicaSet.apps", "Deployment", "factory"),
        ("Pod", "ReplicaSet", "factory"),
        ("EndpointSlice.discovery.k8s.io", "Service", "kube-system"),
    }


def test_two_owners_are_refused_and_what_is_handed_over_comes_back_the_same(factory: Factory):
    secrets = [f"Secret factory/{name}" for name in SECRETS]
    objects = [CONNECTOR, *secrets]
    uids = {title: factory.live(title)["metadata"]["uid"] for title in objects}

    def same() -> bool:
        return uids == {title: factory.live(title)["metadata"]["uid"] for title in objects}

    # ArgoCD syncs the connector by server-side apply, a Secret as kubectl does by default.
    infra = {"annotations": {TRACKING: "infra:apps/Deployment:factory/cloudflared-factory"}}
    synced = repository_copy(factory.live(CONNECTOR), infra)
    synced["spec"]["replicas"] = 3
    factory.apply("argocd-controller", synced)
    synced_secret = "Secret factory/cloudflared-factory"
    mark = {"annotations": {TRACKING: "infra:/Secret:factory/cloudflared-factory"}}
    declared = factory.live(synced_secret)["data"]
    other = repository_copy(factory.live(synced_secret), mark)
    other["data"] = dict.fromkeys(declared, "YW5vdGhlcg==")
    factory.apply("argocd-controller", other, server_side=False)
    # A chart takes ownership, as `helm upgrade --take-ownership` does.
    release = {"meta.helm.sh/release-name": "minio", "meta.helm.sh/release-namespace": "factory"}
    taken = {"metadata": {"labels": HELM, "annotations": release}}
    factory.patch("helm", "Secret factory/minio-kms", taken)
    # Somebody puts a manifest where k3s applies what it finds.
    addon = yaml.safe_dump(manifest("Secret", "observe-root", "factory"))
    at = "/var/lib/rancher/k3s/server/manifests/observe.yaml"
    write = ["exec", "-i", "k3d-factory-server-0", "sh", "-c", f"cat > {at}"]
    factory.engine.docker(*write, input=addon)
    # An operator comes to control one, and a service rotates one.
    factory.apply("kubectl", definition("external-secrets.io", "ExternalSecret"))
    wait = ["--for=condition=Established", "--timeout=60s"]
    factory.kubectl("wait", "customresourcedefinition", "--all", *wait)
    factory.apply("kubectl", manifest("external-secrets.io/v1 ExternalSecret", "otel", "factory"))
    of = factory.live("ExternalSecret factory/otel")
    by = {key: of[key] for key in ("apiVersion", "kind")} | {"name": "otel", "controller": True}
    by["uid"] = of["metadata"]["uid"]
    controlled = {"metadata": {"ownerReferences": [by]}}
    factory.patch("external-secrets", "Secret factory/otel-otlp-auth", controlled)
    rotated = {"data": {"password": "cm90YXRlZA=="}}
    factory.patch("OpenAPI-Generator", "Secret factory/skillai-db", rotated)
    until = time.monotonic() + 60
    while "objectset.rio.cattle.io/owner-name" not in annotations(factory, "observe-root"):
        assert time.monotonic() < until, "the node does not apply the manifest"
        time.sleep(1)

    [error] = errors(factory.preview(check=False))
    assert f"{len(objects)} object(s) would have two owners; nothing was changed" in error
    others = {CONNECTOR: "ArgoCD application infra"} | dict(
        zip(secrets, SECRETS.values(), strict=True)
    )
    for title, owner in others.items():
        assert f"{title} is declared here and belongs to {owner}" in error
        assert f'add "{title}" to homelab:handedOver' in error
    code, rows = factory.owners()
    assert code == 1
    assert {what for what, row in rows.items() if row["verdict"] == "bad"} == set(objects)
    assert same()

    # Handed over: neither written nor deleted, whatever the settings say.
    connector = factory.settings["tunnels"]["factory"]["connector"]
    connector["replicas"] = 4
    factory.hand_over(*objects)
    operations = planned(factory.up())
    assert {one for one in operations if not one.startswith("update Command")} == set()
    assert factory.live(CONNECTOR)["spec"]["replicas"] == 3
    assert factory.live(synced_secret)["data"] == other["data"]
    code, rows = factory.owners()
    assert code == 0
    assert {what for what, row in rows.items() if row["declared"] == "handed over"} == set(objects)
    assert rows[CONNECTOR]["now"] == "ArgoCD application infra"
    assert same()

    # Declared no more, one stays with its new owner.
    del factory.settings["secrets"]["factory"]["minio-kms"]
    # Taken back: ArgoCD lets go of two, and they are as declared. So is what a person has edited.
    for title in (CONNECTOR, synced_secret):
        factory.patch("kubectl-annotate", title, {"metadata": {"annotations": {TRACKING: None}}})
    edited = "Secret factory/minio-creds"
    before = factory.live(edited)
    by_hand = dict.fromkeys(before["data"], "YW5vdGhlcg==")
    factory.patch("kubectl-edit", edited, {"data": by_hand})
    factory.hand_over(*(title for title in objects if title not in (CONNECTOR, synced_secret)))
    factory.up("--refresh")
    assert factory.live(CONNECTOR)["spec"]["replicas"] == 4
    assert factory.live(synced_secret)["data"] == declared
    assert factory.live(edited)["data"] == before["data"]
    assert factory.live(edited)["metadata"]["uid"] == before["metadata"]["uid"]
    assert planned(factory.preview("--refresh")) == set()
    code, rows = factory.owners()
    assert code == 0
    assert (rows[CONNECTOR]["declared"], rows[CONNECTOR]["now"]) == ("this stack", "Pulumi")
    assert same()


def repository_copy(live: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An object as a GitOps repository has it."""
    kept = {key: live["metadata"][key] for key in ("name", "namespace", "labels")}
    return {
        **{key: value for key, value in live.items() if key != "status"},
        "metadata": {**kept, **metadata},
    }


def annotations(factory: Factory, name: str) -> Mapping[str, str]:
    return factory.live(f"Secret factory/{name}")["metadata"].get("annotations") or {}
