"""Limits, access and federation: a stack that has all of it, whose ArgoCD deploys to metal too."""

import base64
import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from rehearsal.run import Rehearsal
from tests.engine.conftest import errors, planned
from tests.engine.test_metal import Metal

pytestmark = pytest.mark.engine

MANAGER = "kube-system/argocd-manager"
STACK = yaml.safe_load("""
cluster:
  name: hub
  image: rancher/k3s:v1.31.5-k3s1
  audit: {}
namespaces:
  apps:
    podSecurity: {enforce: baseline, warn: restricted}
    quota: {requests.cpu: "2", requests.memory: 2Gi, pods: "20", requests.storage: 50Gi}
    limits:
      default: {cpu: 500m, memory: 256Mi}
      defaultRequest: {cpu: 50m, memory: 64Mi}
      max: {memory: 1Gi}
      volumes: {max: 20Gi}
    networkPolicy:
      ingress: [{namespaces: [argocd], ports: [{port: 8080}]}]
      egress: [{cidrs: [192.168.1.0/24]}]
access:
  users:
    alice: {kind: certificate, groups: [operators]}
  serviceAccounts:
    apps: {deployer: {token: secret}, reader: {}}
  roles:
    rollouts:
      rules: [{apiGroups: [apps], resources: [deployments], verbs: [get, list, patch]}]
  bindings:
    operators: {role: view, everywhere: true, groups: [operators]}
    alice: {role: edit, namespaces: [apps], users: [alice]}
    deployer: {role: rollouts, namespaces: [apps], serviceAccounts: [apps/deployer]}
argocd:
  repository: https://github.com/example/gitops
  clusters:
    metal:
      stack: organization/homelab/metal
      namespaces: [apps]
      labels: {site: home}
  applicationSets:
    apps: {path: "apps/{cluster}", namespace: apps, labels: {site: home}}
""")


class Hub(Rehearsal):
    """The stack above in the backend of another, with settings that can be changed."""

    def __init__(self, directory: Path, beside: Rehearsal, name: str = "hub") -> None:
        self.settings = copy.deepcopy(STACK)
        backend = beside.process_environment()["PULUMI_BACKEND_URL"]
        environment = {"PULUMI_BACKEND_URL": backend}
        super().__init__(directory, name, self.settings, environment=environment)

    @contextlib.contextmanager
    def edited(self) -> Iterator[dict[str, Any]]:
        """The settings, to be changed within."""
        yield self.settings
        self.set_config(self.settings)

    @property
    def objects(self) -> Path:
        """What lives in the cluster: <namespace>/<Kind.group>/<name>.json."""
        return next((self.directory / "world" / "kubernetes").glob("????????????????"))

    def there(self) -> set[str]:
        """What the stack made besides the namespaces and ArgoCD."""
        return {
            path.relative_to(self.objects).with_suffix("").as_posix()
            for path in self.objects.rglob("*.json")
            if path.stem == "homelab"
            or path.parts[-2].endswith((".rbac.authorization.k8s.io", "ServiceAccount"))
            or path.stem.startswith(("cluster-", "deployer-"))
            or path.parts[-2] == "ApplicationSet.argoproj.io"
        }

    def registered(self) -> dict[str, str]:
        """The cluster Secret for metal."""
        secret = json.loads((self.objects / "argocd/Secret/cluster-metal.json").read_text())
        assert secret["metadata"]["labels"]["argocd.argoproj.io/secret-type"] == "cluster"
        return {key: base64.b64decode(text).decode() for key, text in secret["data"].items()}


@pytest.fixture(scope="module")
def metal(tmp_path_factory: pytest.TempPathFactory) -> Metal:
    """metal, which gives the hub's ArgoCD an account with rights in one namespace."""
    metal = Metal(tmp_path_factory.mktemp("member"))
    with metal.edited() as settings:
        settings["namespaces"] = {"apps": {}}
        settings["access"] = {
            "serviceAccounts": {"kube-system": {"argocd-manager": {"token": "secret"}}},
            "bindings": {
                "argocd": {"role": "admin", "namespaces": ["apps"], "serviceAccounts": [MANAGER]}
            },
        }
    metal.up()
    assert planned(metal.up()) == set()
    return metal


@pytest.fixture
def hub(metal: Metal, tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path / "hub", metal)
    yield hub
    hub.pulumi("stack", "rm", "--force", "--yes", "--preserve-config")


def test_a_stack_with_all_of_it_lives_is_edited_and_goes(hub, metal):
    hub.preview()
    hub.up()
    assert planned(hub.up()) == set()
    assert planned(hub.preview("--refresh")) == set()
    assert hub.there() == {
        "_cluster/ClusterRole.rbac.authorization.k8s.io/rollouts",
        "_cluster/ClusterRoleBinding.rbac.authorization.k8s.io/operators",
        "apps/LimitRange/homelab",
        "apps/NetworkPolicy.networking.k8s.io/homelab",
        "apps/ResourceQuota/homelab",
        "apps/RoleBinding.rbac.authorization.k8s.io/alice",
        "apps/RoleBinding.rbac.authorization.k8s.io/deployer",
        "apps/Secret/deployer-token",
        "apps/ServiceAccount/deployer",
        "apps/ServiceAccount/reader",
        "argocd/ApplicationSet.argoproj.io/apps",
        "argocd/Secret/cluster-metal",
    }

    # metal's own output is what ArgoCD logs in with: the account's token, at metal's address.
    account = yaml.safe_load(metal.outputs()["serviceAccounts"][MANAGER])
    secret = hub.registered()
    assert secret["server"] == account["clusters"][0]["cluster"]["server"]
    token = account["users"][0]["user"]["token"]
    assert json.loads(secret["config"])["bearerToken"] == token
    assert (secret["namespaces"], secret["clusterResources"]) == ("apps", "false")
    assert hub.outputs(show_secrets=False)["serviceAccounts"] == {"apps/deployer": "[secret]"}
    for stack in (hub, metal):
        assert token not in json.dumps(stack.export())
        assert token not in stack.preview("--diff").stdout

    def edit(expected: set[str], change: Callable[[dict[str, Any]], object]) -> None:
        with hub.edited() as settings:
            change(settings)
        assert planned(hub.preview()) == expected
        assert planned(hub.up()) == expected
        assert planned(hub.preview()) == set()

    apps = hub.settings["namespaces"]["apps"]
    edit({"update ResourceQuota apps"}, lambda _: apps["quota"].update(pods="30"))
    edit({"update LimitRange apps"}, lambda _: apps["limits"]["default"].update(cpu="250m"))
    edit(
        {"update NetworkPolicy apps"},
        lambda _: apps["networkPolicy"].update(egress=[{"cidrs": ["192.168.2.0/24"]}]),
    )
    edit({"update Namespace apps"}, lambda _: apps["podSecurity"].update(enforce="restricted"))
    bindings = hub.settings["access"]["bindings"]
    # Kubernetes keeps no binding whose role changes: it is made anew.
    edit(
        {
            "delete-replaced RoleBinding apps/alice",
            "replace RoleBinding apps/alice",
            "create-replacement RoleBinding apps/alice",
        },
        lambda _: bindings["alice"].update(role="admin"),
    )
    edit(
        {"update ClusterRole rollouts"},
        lambda s: s["access"]["roles"]["rollouts"]["rules"][0].update(verbs=["get"]),
    )
    edit(
        {"update ApplicationSet argocd/apps"},
        lambda s: s["argocd"]["applicationSets"]["apps"].update(prune=True),
    )
    # Without its token the account's way in is gone, and so is its kubeconfig.
    edit(
        {"delete Secret apps/deployer-token"},
        lambda s: s["access"]["serviceAccounts"]["apps"]["deployer"].clear(),
    )
    with hub.edited() as settings:
        del (
            settings["access"],
            settings["argocd"]["clusters"],
            settings["argocd"]["applicationSets"],
        )
        settings["namespaces"]["apps"] = {}
    hub.up()
    assert hub.there() == set()
    assert (hub.objects / "_cluster" / "Namespace" / "apps.json").exists()
    assert planned(hub.up()) == set()


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (
            {"stack": "organization/homelab/metal", "serviceAccount": "apps/nobody"},
            "homelab:argocd.clusters.metal: stack organization/homelab/metal has no lasting token"
            " of service account apps/nobody; it has kube-system/argocd-manager",
        ),
        (
            {"stack": "organization/homelab/absent"},
            'unknown stack "organization/homelab/absent"',
        ),
        ({"stack": "organization/homelab/hub"}, "organization/homelab/hub is this stack itself"),
    ],
)
def test_a_cluster_that_cannot_be_registered_fails_the_preview_by_name(hub, member, said):
    with hub.edited() as settings:
        settings["argocd"]["clusters"]["metal"] = {**member, "labels": {"site": "home"}}
    run = hub.preview(check=False)
    assert run.code != 0
    assert said in "\n".join(errors(run))


def test_a_cluster_on_loopback_fails_the_preview_with_the_ways_out(hub, metal, tmp_path):
    with hub.edited() as settings:
        del settings["argocd"], settings["namespaces"]["apps"]["networkPolicy"]
    hub.up()
    spoke = Hub(tmp_path / "spoke", metal, "spoke")
    with spoke.edited() as settings:
        settings["cluster"]["name"] = "spoke"
        settings["argocd"]["clusters"] = {
            "hub": {"stack": "organization/homelab/hub", "serviceAccount": "apps/deployer"}
        }
        settings["argocd"]["applicationSets"] = {}
    run = spoke.preview(check=False)
    (error,) = errors(run)
    assert "homelab:argocd.clusters.hub.server: the API is at https://127.0.0.1:6443" in error
    assert "homelab:cluster.api.bind" in error
