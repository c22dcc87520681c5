"""Limits of namespaces, access and federation: what is registered, in which order, and what is
secret.
"""

import base64
import json
from collections.abc import Callable
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import pytest
import yaml

from components import settings
from components.access import Access, AccessArgs, account_kubeconfig
from components.cluster import Cluster
from components.federation import Federation, FederationArgs, read_kubeconfigs
from components.host import Connection, Host, HostError
from components.namespaces import Namespaces, NamespacesArgs
from tests.unit.conftest import Registered

TOKEN = base64.b64encode(b"a-token").decode()
ADMINISTRATOR = yaml.safe_dump(
    {
        "clusters": [
            {
                "name": "metal",
                "cluster": {
                    "server": "https://192.168.1.130:6443",
                    "certificate-authority-data": "Y2E=",
                },
            }
        ],
        "users": [{"name": "metal", "user": {"client-key-data": "of the administrator"}}],
        "contexts": [{"name": "metal", "context": {"cluster": "metal", "user": "metal"}}],
        "current-context": "metal",
    }
)


def a_cluster() -> Cluster:
    host = Host("metal", Connection(settings.Host()))
    provider = kubernetes.Provider("kubernetes", kubeconfig="{}")
    path = "/var/lib/homelab/kubeconfigs/metal"
    return Cluster("metal", provider, None, path, host, "metal-0123456789abcdef")


@pytest.fixture
def limited(run_program: Callable[..., Registered]) -> Callable[..., Registered]:
    def run(**namespace: Any) -> Registered:
        declared = {"factory": settings.Namespace.model_validate(namespace)}

        def program() -> None:
            owners = {"factory": "pulumi", "apps": "argocd"}
            Namespaces("metal", NamespacesArgs(owners, a_cluster(), declared))

        return run_program(program)

    return run


def access(run_program: Callable[..., Registered], **declared: Any) -> tuple[Registered, Any]:
    made: list[Access] = []

    def program() -> None:
        given = settings.ClusterAccess.model_validate(declared)
        args = AccessArgs(given, a_cluster(), pulumi.Output.secret(ADMINISTRATOR), after=[])
        made.append(Access("metal", args))
        pulumi.export("kubeconfigs", made[0].kubeconfigs)

    registered = run_program(program, outputs={"Secret": {"data": {"token": TOKEN}}})
    return registered, registered["Access", "metal"]


class TestLimits:
    def test_in_a_namespace_of_which_nothing_is_said_nothing_is_refused(self, limited: Any) -> None:
        """Others deploy there what an enforced standard may refuse: they are told."""
        registered = limited()
        assert registered["Namespace", "factory"].inputs["metadata"]["labels"] == {
            f"pod-security.kubernetes.io/{mode}{of}": value
            for mode in ("audit", "warn")
            for of, value in (("", "restricted"), ("-version", "latest"))
        }
        for kind in ("ResourceQuota", "LimitRange", "NetworkPolicy"):
            assert registered.names(kind) == []

    def test_limits_go_with_the_settings_and_the_namespace_stays(self, limited: Any) -> None:
        registered = limited(quota={"pods": "5"}, limits={"max": {"cpu": "1"}}, networkPolicy={})
        assert registered["Namespace", "factory"].retain_on_delete
        for kind in ("ResourceQuota", "LimitRange", "NetworkPolicy"):
            limit = registered[kind, "factory"]
            assert not limit.retain_on_delete
            assert ("Namespace", "factory") in limit.depends_on

    def test_the_pod_security_standard_is_said_in_all_three_ways(self, limited: Any) -> None:
        given = {"enforce": "baseline", "warn": "restricted", "version": "v1.31"}
        registered = limited(podSecurity=given)
        labels = registered["Namespace", "factory"].inputs["metadata"]["labels"]
        assert labels == {
            "pod-security.kubernetes.io/enforce": "baseline",
            "pod-security.kubernetes.io/audit": "baseline",
            "pod-security.kubernetes.io/warn": "restricted",
            **{
                f"pod-security.kubernetes.io/{mode}-version": "v1.31"
                for mode in ("enforce", "audit", "warn")
            },
        }

    def test_a_network_policy_denies_all_but_dns_and_what_is_declared(self, limited: Any) -> None:
        rules = {
            "within": False,
            "ingress": [{"namespaces": ["argocd"], "ports": [{"port": 8080}]}],
            "egress": [{"cidrs": ["192.168.1.0/24"]}],
        }
        spec = limited(networkPolicy=rules)["NetworkPolicy", "factory"].inputs["spec"]
        assert spec["podSelector"] == {}
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        (ingress,) = spec["ingress"]
        assert ingress["ports"] == [{"port": 8080, "protocol": "TCP"}]
        dns, lan = spec["egress"]
        assert [one["port"] for one in dns["ports"]] == [53, 53]
        assert lan == {"to": [{"ipBlock": {"cidr": "192.168.1.0/24"}}]}


class TestAccess:
    def test_a_lasting_token_is_a_secret_of_the_account_and_a_kubeconfig_without_administrator(
        self, run_program: Any
    ) -> None:
        accounts = {"factory": {"deployer": {"token": "secret"}, "reader": {}}}
        registered, _ = access(run_program, serviceAccounts=accounts)
        secret = registered["Secret", "factory/deployer-token"]
        assert secret.inputs["type"] == "kubernetes.io/service-account-token"
        assert "data" in secret.additional_secret_outputs
        assert ("ServiceAccount", "factory/deployer") in secret.depends_on
        assert registered.names("Secret") == ["factory/deployer-token"]
        assert (
            registered["ServiceAccount", "factory/reader"].inputs["automountServiceAccountToken"]
            is False
        )
        component = registered["Access", "metal"]
        assert component.outputs is not None
        text = component.outputs["kubeconfigs"]["factory/deployer"]
        assert "of the administrator" not in text
        config = yaml.safe_load(text)
        assert config["users"][0]["user"] == {"token": "a-token"}
        assert config["clusters"][0]["cluster"]["server"] == "https://192.168.1.130:6443"
        assert component.secret_outputs

    def test_a_token_that_is_not_there_is_an_error_by_name(self) -> None:
        with pytest.raises(pulumi.RunError, match="Secret factory/deployer-token holds no token"):
            account_kubeconfig(ADMINISTRATOR, "metal", "factory", "deployer", None)

    def test_a_binding_comes_after_its_role_and_is_made_anew_for_another(
        self, run_program: Any
    ) -> None:
        registered, _ = access(
            run_program,
            users={"alice": {"kind": "certificate"}},
            roles={"logs": {"namespace": "factory", "rules": [
                {"resources": ["pods/log"], "verbs": ["get"]}]}},
            bindings={
                "logs": {"role": "logs", "namespaces": ["factory"], "users": ["alice"]},
                "all": {"role": "view", "everywhere": True, "groups": ["operators"]},
            },
        )  # fmt: skip
        binding = registered["RoleBinding", "factory/logs"]
        assert ("Role", "factory/logs") in binding.depends_on
        assert binding.delete_before_replace
        assert binding.inputs["roleRef"]["kind"] == "Role"
        (rule,) = registered["Role", "factory/logs"].inputs["rules"]
        assert rule["apiGroups"] == [""]
        everywhere = registered["ClusterRoleBinding", "all"].inputs
        assert everywhere["roleRef"]["kind"] == "ClusterRole"
        assert everywhere["subjects"][0]["kind"] == "Group"


def member(server: str = "https://192.168.1.130:6443", **user: str) -> str:
    config = yaml.safe_load(ADMINISTRATOR)
    config["clusters"][0]["cluster"]["server"] = server
    config["users"][0]["user"] = user or {"token": "a-token"}
    return yaml.safe_dump(config)


def argocd(**clusters: Any) -> settings.ArgoCD:
    given = {"repository": "https://example.org/a/b", "clusters": clusters}
    return settings.ArgoCD.model_validate(given)


class TestFederation:
    def register(self, run_program: Any, declared: settings.ArgoCD, there: bool = True) -> Any:
        def program() -> None:
            Federation("metal", FederationArgs(declared, a_cluster(), [], there))

        return run_program(program)

    def test_a_cluster_is_a_labelled_secret_of_argocd(self, run_program: Any) -> None:
        cluster = {"kubeconfig": member(), "namespaces": ["apps"], "labels": {"site": "home"}}
        secret = self.register(run_program, argocd(tower=cluster))["Secret", "argocd/cluster-tower"]
        labels = secret.inputs["metadata"]["labels"]
        assert labels["argocd.argoproj.io/secret-type"] == "cluster"
        assert labels["site"] == "home"
        data = {k: base64.b64decode(v).decode() for k, v in secret.inputs["data"].items()}
        assert data["server"] == "https://192.168.1.130:6443"
        assert json.loads(data["config"]) == {
            "bearerToken": "a-token",
            "tlsClientConfig": {"caData": "Y2E="},
        }
        assert (data["namespaces"], data["clusterResources"]) == ("apps", "false")
        assert any(path.startswith("data") for path in secret.secrets)

    def test_application_sets_wait_for_argocd_and_leave_what_they_deployed(
        self, run_program: Any
    ) -> None:
        declared = argocd(tower={"kubeconfig": member()}).model_copy(
            update={
                "application_sets": {
                    "apps": settings.ApplicationSet.model_validate(
                        {"path": "apps/{cluster}", "namespace": "apps"}
                    )
                }
            }
        )
        assert self.register(run_program, declared, there=False).names("ApplicationSet") == []
        spec = self.register(run_program, declared)["ApplicationSet", "argocd/apps"].inputs["spec"]
        assert spec["syncPolicy"] == {"preserveResourcesOnDeletion": True}
        assert spec["template"]["spec"]["source"]["path"] == "apps/{{.name}}"
        (generator,) = spec["generators"]
        assert generator["clusters"]["selector"]["matchLabels"]

    @pytest.mark.parametrize(
        ("kubeconfig", "said"),
        [
            (member("https://127.0.0.1:6443"), "inside ArgoCD's pods is the pod itself"),
            (member("https://localhost:6443"), "homelab:cluster.api.bind"),
            (member("https://0.0.0.0:6443"), "the tailnet's"),
            (member(username="a"), "neither a token nor client-certificate-data"),
            ("canary: {", "it is no kubeconfig"),
        ],
    )
    def test_a_kubeconfig_that_argocd_cannot_use_is_refused_before_anything_is_made(
        self, kubeconfig: str, said: str
    ) -> None:
        with pytest.raises(HostError) as refusal:
            read_kubeconfigs(argocd(tower={"kubeconfig": kubeconfig}), "metal")
        assert "homelab:argocd.clusters.tower" in str(refusal.value)
        assert said in str(refusal.value)
        assert "canary" not in str(refusal.value)

    def test_another_address_takes_the_place_of_loopback(self) -> None:
        cluster = {"kubeconfig": member("https://127.0.0.1:6443")}
        reachable = {**cluster, "server": "https://192.168.1.9:6443"}
        read_kubeconfigs(argocd(tower=reachable), "metal")
