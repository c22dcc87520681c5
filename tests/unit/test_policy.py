"""The guards of the policy pack, each both ways: what it lets pass and what it refuses.

A resource is given as the engine hands it over: inputs in the provider's spelling, unknown values
as they are in a preview.
"""

import base64
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from pulumi_policy import (
    EnforcementLevel,
    PolicyCustomTimeouts,
    PolicyProviderResource,
    PolicyResourceOptions,
    ResourceValidationArgs,
)
from pulumi_policy.proxy import UNKNOWN_STRING_VALUE, UnknownValueError, unknown_checking_proxy

from policy import rules

CONTAINER = "docker:index/container:Container"
IMAGE = "docker:index/remoteImage:RemoteImage"
RELEASE = "kubernetes:helm.sh/v3:Release"
RECORD = "cloudflare:index/dnsRecord:DnsRecord"
TUNNEL = "cloudflare:index/zeroTrustTunnelCloudflared:ZeroTrustTunnelCloudflared"
PROVIDER = "pulumi:providers:kubernetes"
DIGEST = "sha256:" + "0" * 64

Props = dict[str, Any]


def resource(
    kind: str,
    props: Props,
    name: str = "example",
    protect: bool = False,
    parent: str = "homelab:index:K3dCluster",
    provider: str = "kubernetes",
) -> ResourceValidationArgs:
    urn = f"urn:pulumi:p510::homelab::{parent}"
    timeouts = PolicyCustomTimeouts(0, 0, 0)
    options = PolicyResourceOptions(protect, [], None, [], timeouts, [], f"{urn}::factory")
    given = PolicyProviderResource(PROVIDER, {}, f"{urn}${PROVIDER}::{provider}", provider)
    checked = unknown_checking_proxy(props)
    return ResourceValidationArgs(kind, checked, f"{urn}${kind}::{name}", name, options, given)


def violations(rule: rules.Rule, *args: Any, **more: Any) -> list[str]:
    return list(rule(resource(*args, **more)))


def container(**more: Any) -> Props:
    context = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    return {"name": "app", "image": "example/app:1.2.3", "securityContext": context, **more}


def pod(*containers: Props, **more: Any) -> Props:
    context = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    given = {"securityContext": context, "automountServiceAccountToken": False}
    return {**given, "containers": [*(containers or [container()])], **more}


def deployment(*containers: Props, **more: Any) -> Props:
    return {"spec": {"template": {"spec": pod(*containers, **more)}}}


def on_docker(**more: Any) -> Props:
    return {
        "image": "example/app:1.2.3",
        "user": "65532:65532",
        "securityOpts": ["no-new-privileges:true"],
        **more,
    }


DEPLOYMENT = "kubernetes:apps/v1:Deployment"

KINDS: list[tuple[str, Callable[[Props], Props]]] = [
    ("kubernetes:core/v1:Pod", lambda spec: {"spec": spec}),
    ("kubernetes:core/v1:PodTemplate", lambda spec: {"template": {"spec": spec}}),
    ("kubernetes:batch/v1:Job", lambda spec: {"spec": {"template": {"spec": spec}}}),
    (
        "kubernetes:batch/v1:CronJob",
        lambda spec: {"spec": {"jobTemplate": {"spec": {"template": {"spec": spec}}}}},
    ),
    *(
        (f"kubernetes:apps/v1:{kind}", lambda spec: {"spec": {"template": {"spec": spec}}})
        for kind in ("DaemonSet", "Deployment", "ReplicaSet", "StatefulSet")
    ),
]


@pytest.mark.parametrize(("kind", "of"), KINDS, ids=[kind for kind, _ in KINDS])
class TestEveryWorkload:
    @pytest.mark.parametrize("rule", rules.POLICIES, ids=lambda policy: policy.name)
    def test_a_decent_pod_passes(self, kind: str, of: Callable, rule: Any) -> None:
        found: list[str] = []
        rule.validate(resource(kind, of(pod())), lambda text, urn: found.append(text))
        assert found == []

    def test_a_bad_pod_is_refused(self, kind: str, of: Callable) -> None:
        bad = container(
            image="example/app:latest",
            env=[{"name": "TOKEN", "value": "x"}],
            securityContext={"privileged": True},
        )
        props = of({"hostNetwork": True, "containers": [bad], "initContainers": [bad]})
        assert len(violations(rules.images_are_pinned, kind, props)) == 2
        assert len(violations(rules.workloads_are_unprivileged, kind, props)) == 1 + 2 * 2
        assert len(violations(rules.containers_do_not_run_as_root, kind, props)) == 2
        assert len(violations(rules.pods_are_restricted, kind, props)) == 1 + 2 * 3
        assert len(violations(rules.secrets_are_not_in_the_clear, kind, props)) == 2


class TestPinned:
    @pytest.mark.parametrize(
        "image",
        ["a/b:1", f"a/b@{DIGEST}", f"a/b:latest@{DIGEST}", "mirror.lan:5000/a/b:1.2.3", DIGEST],
    )
    def test_a_tag_or_a_digest_passes(self, image: str) -> None:
        assert violations(rules.images_are_pinned, CONTAINER, {"image": image}) == []

    @pytest.mark.parametrize(
        "image", ["", "a/b", "a/b:latest", "mirror.lan:5000/a/b", "a/b:", "a/b@latest"]
    )
    def test_anything_else_is_refused(self, image: str) -> None:
        props = deployment(container(image=image))
        assert len(violations(rules.images_are_pinned, DEPLOYMENT, props)) == 1
        assert len(violations(rules.images_are_pinned, CONTAINER, {"image": image})) == 1
        assert len(violations(rules.images_are_pinned, IMAGE, {"name": image})) == 1

    @pytest.mark.parametrize(
        ("version", "wrong"),
        [("1.86.2", 0), ("v0.15.3-rc.1", 0), ("", 1), ("1.86", 1), ("^1.86.2", 1), (">=1.0.0", 1)],
    )
    def test_a_chart_has_a_whole_version(self, version: str, wrong: int) -> None:
        found = violations(rules.images_are_pinned, RELEASE, {"version": version})
        assert len(found) == wrong


class TestPrivilege:
    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"hostNetwork": True}, "hostNetwork"),
            ({"hostPID": True}, "hostPID"),
            ({"hostIPC": True}, "hostIPC"),
            ({"volumes": [{"name": "root", "hostPath": {"path": "/"}}]}, "volume root"),
        ],
    )
    def test_a_pod_stays_off_its_host(self, more: Props, said: str) -> None:
        (found,) = violations(rules.workloads_are_unprivileged, DEPLOYMENT, deployment(**more))
        assert said in found

    @pytest.mark.parametrize(
        ("context", "said"),
        [
            ({"allowPrivilegeEscalation": False, "privileged": True}, "privileged"),
            ({}, "allowPrivilegeEscalation"),
            ({"allowPrivilegeEscalation": True}, "allowPrivilegeEscalation"),
            (
                {"allowPrivilegeEscalation": False, "capabilities": {"add": ["NET_ADMIN"]}},
                "NET_ADMIN",
            ),
        ],
    )
    def test_a_container_has_no_privilege(self, context: Props, said: str) -> None:
        props = deployment(container(securityContext=context))
        (found,) = violations(rules.workloads_are_unprivileged, DEPLOYMENT, props)
        assert said in found

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"networkMode": "host"}, "networkMode"),
            ({"pidMode": "host"}, "pidMode"),
            ({"ipcMode": "host"}, "ipcMode"),
            ({"usernsMode": "host"}, "usernsMode"),
            ({"privileged": True}, "privileged"),
            ({"capabilities": {"adds": ["NET_ADMIN"]}}, "NET_ADMIN"),
            ({"securityOpts": []}, "no-new-privileges"),
        ],
    )
    def test_a_docker_container_has_none_either(self, more: Props, said: str) -> None:
        assert violations(rules.workloads_are_unprivileged, CONTAINER, on_docker()) == []
        (found,) = violations(rules.workloads_are_unprivileged, CONTAINER, on_docker(**more))
        assert said in found

    def test_an_exception_is_for_its_resource_and_its_privilege_alone(self) -> None:
        rule, props = rules.workloads_are_unprivileged, on_docker(networkMode="host")
        for name in ("cloudflared-p510", "keepalive-p510"):
            assert violations(rule, CONTAINER, props, name=name) == []
        assert violations(rule, CONTAINER, props, name="traefik")
        more = {**props, "privileged": True}
        assert len(violations(rule, CONTAINER, more, name="cloudflared-p510")) == 1

    def test_every_exception_has_a_reason(self) -> None:
        assert all(len(entry.reason.split()) > 3 for entry in rules.ALLOWED)


class TestRoot:
    @pytest.mark.parametrize(
        ("outer", "inner", "wrong"),
        [
            ({"runAsNonRoot": True, "runAsUser": 1000}, {}, 0),
            ({}, {"runAsNonRoot": True, "runAsUser": 1000}, 0),
            ({"runAsNonRoot": True, "runAsUser": 0}, {"runAsUser": 1000}, 0),
            ({}, {}, 1),
            ({"runAsNonRoot": True}, {}, 1),
            ({"runAsUser": 1000}, {}, 1),
            ({"runAsNonRoot": True, "runAsUser": 1000}, {"runAsUser": 0}, 1),
            ({"runAsNonRoot": True, "runAsUser": 1000}, {"runAsNonRoot": False}, 1),
        ],
    )
    def test_the_containers_word_goes_before_the_pods(
        self, outer: Props, inner: Props, wrong: int
    ) -> None:
        props = deployment(container(securityContext=inner), securityContext=outer)
        assert len(violations(rules.containers_do_not_run_as_root, DEPLOYMENT, props)) == wrong

    @pytest.mark.parametrize(
        ("user", "wrong"),
        [("65532:65532", 0), ("1000", 0), (None, 1), ("0", 1), ("root", 1), ("app", 1), ("1:0", 1)],
    )
    def test_a_docker_containers_user_is_a_number(self, user: str | None, wrong: int) -> None:
        found = violations(rules.containers_do_not_run_as_root, CONTAINER, on_docker(user=user))
        assert len(found) == wrong


CONNECTOR_TOKEN = base64.b64encode(json.dumps({"a": "0" * 32, "t": "1"}).encode()).decode()


class TestSecrets:
    @pytest.mark.parametrize(
        "variable",
        [
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}},
            {"name": "TOKEN_FILE", "value": "/etc/token"},
            {"name": "SECRET_NAME", "value": "login"},
            {"name": "PASSWORD", "value": ""},
            {"name": "AUTHOR", "value": "someone"},
            {"name": "URL", "value": "https://example.org/a@b"},
        ],
    )
    def test_a_reference_or_a_name_passes(self, variable: Props) -> None:
        props = deployment(container(env=[variable]))
        assert violations(rules.secrets_are_not_in_the_clear, DEPLOYMENT, props) == []

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("TUNNEL_TOKEN", "canary"),
            ("TS_AUTHKEY", "canary"),
            ("postgres-password", "canary"),
            ("API_KEY", "canary"),
            ("INNOCENT", "tskey-auth-canary"),
            ("INNOCENT", CONNECTOR_TOKEN),
            ("INNOCENT", "-----BEGIN OPENSSH PRIVATE KEY-----\ncanary"),
            ("DATABASE", "postgres://app:canary@db/app"),
        ],
    )
    def test_a_value_is_refused_and_not_repeated(self, name: str, value: str) -> None:
        rule = rules.secrets_are_not_in_the_clear
        env = [{"name": name, "value": value}]
        found = violations(rule, DEPLOYMENT, deployment(container(env=env)))
        found += violations(rule, CONTAINER, on_docker(envs=[f"{name}={value}"]))
        assert len(found) == 2
        assert "canary" not in "".join(found)

    @pytest.mark.parametrize(
        ("words", "wrong"),
        [
            (["tunnel", "run", "--token-file", "/etc/token"], 0),
            (["tunnel", "run", "--token", "--verbose"], 0),
            (["tunnel", "run", "--token", "canary"], 1),
            (["tunnel", "run", "--token=canary"], 1),
            (["tunnel", "run", CONNECTOR_TOKEN], 1),
            ([], 0),
        ],
    )
    def test_an_argument_holds_none(self, words: list[str], wrong: int) -> None:
        rule = rules.secrets_are_not_in_the_clear
        found = violations(rule, DEPLOYMENT, deployment(container(args=words)))
        assert len(found) == wrong
        assert len(violations(rule, CONTAINER, on_docker(command=words))) == wrong
        assert "canary" not in "".join(found)

    def test_a_config_map_holds_none(self) -> None:
        rule, kind = rules.secrets_are_not_in_the_clear, "kubernetes:core/v1:ConfigMap"
        assert violations(rule, kind, {"data": {"host": "db.lan"}}) == []
        assert len(violations(rule, kind, {"data": {"url": "redis://u:canary@db.lan"}})) == 1


class TestProtected:
    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            ("command:local:Command", "cluster"),
            ("docker:index/network:Network", "network"),
            (TUNNEL, "factory"),
        ],
    )
    def test_what_lasts_is_protected(self, kind: str, name: str) -> None:
        rule = rules.what_lasts_is_protected
        assert violations(rule, kind, {}, name=name, protect=True) == []
        assert len(violations(rule, kind, {}, name=name)) == 1

    @pytest.mark.parametrize(
        ("kind", "props"),
        [
            ("kubernetes:helm.sh/v3:Release", {"chart": "longhorn"}),
            ("kubernetes:helm.sh/v3:Release", {"chart": "rook-ceph"}),
            ("kubernetes:ceph.rook.io/v1:CephCluster", {}),
            ("kubernetes:ceph.rook.io/v1:CephBlockPool", {}),
        ],
    )
    def test_what_every_volume_goes_with_is_protected(self, kind: str, props: Props) -> None:
        rule = rules.what_lasts_is_protected
        assert violations(rule, kind, props, protect=True) == []
        assert len(violations(rule, kind, props)) == 1

    def test_a_driver_that_holds_no_data_needs_no_protection(self) -> None:
        props = {"chart": "csi-driver-nfs"}
        rule = rules.what_lasts_is_protected
        assert violations(rule, "kubernetes:helm.sh/v3:Release", props) == []

    def test_other_commands_need_no_protection(self) -> None:
        rule, kind = rules.what_lasts_is_protected, "command:local:Command"
        assert violations(rule, kind, {}, name="identity") == []
        assert violations(rule, kind, {}, name="cluster", parent="homelab:index:Other") == []


class TestRecords:
    @pytest.mark.parametrize(
        ("more", "wrong"),
        [({}, 0), ({"proxied": False}, 1), ({"ttl": 300}, 1), ({"proxied": None, "ttl": None}, 1)],
    )
    def test_a_tunnels_record_is_proxied(self, more: Props, wrong: int) -> None:
        content = "01234567-89ab-cdef-0123-456789abcdef.cfargotunnel.com"
        props = {"type": "CNAME", "content": content, "proxied": True, "ttl": 1, **more}
        assert len(violations(rules.records_of_tunnels_are_proxied, RECORD, props)) == wrong

    def test_other_records_are_as_they_like(self) -> None:
        props = {"type": "TXT", "content": "v=spf1 -all", "proxied": False, "ttl": 300}
        assert violations(rules.records_of_tunnels_are_proxied, RECORD, props) == []

    def test_a_record_of_a_tunnel_that_is_not_made_yet_is_judged_where_it_can_be(self) -> None:
        props = {"content": UNKNOWN_STRING_VALUE, "proxied": True, "ttl": 1}
        assert violations(rules.records_of_tunnels_are_proxied, RECORD, props) == []
        with pytest.raises(UnknownValueError):  # told by the engine as "can't be known yet"
            violations(rules.records_of_tunnels_are_proxied, RECORD, {**props, "ttl": 300})


class TestProvider:
    def test_a_provider_has_both_even_where_a_preview_knows_neither(self) -> None:
        rule = rules.objects_know_their_cluster
        both = {"kubeconfig": UNKNOWN_STRING_VALUE, "clusterIdentifier": UNKNOWN_STRING_VALUE}
        assert violations(rule, PROVIDER, both) == []
        (found,) = violations(rule, PROVIDER, {"kubeconfig": "x"})
        assert "clusterIdentifier" in found
        assert len(violations(rule, PROVIDER, {})) == 2

    def test_an_object_has_a_provider_of_its_own(self) -> None:
        rule, kind = rules.objects_know_their_cluster, "kubernetes:core/v1:Secret"
        assert violations(rule, kind, {}) == []
        assert len(violations(rule, kind, {}, provider="default_4_34_2")) == 1


def test_a_namespace_says_its_pod_security_and_that_is_only_advice() -> None:
    rule, kind = rules.namespaces_have_pod_security, "kubernetes:core/v1:Namespace"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    assert violations(rule, kind, {"metadata": {"name": "a", "labels": labels}}) == []
    assert len(violations(rule, kind, {"metadata": {"name": "a"}})) == 1
    labels = {"pod-security.kubernetes.io/warn": "restricted"}
    assert violations(rule, kind, {"metadata": {"name": "a", "labels": labels}}) == []
    advisory = [p.name for p in rules.POLICIES if p.enforcement_level != EnforcementLevel.MANDATORY]
    assert advisory == ["namespaces-have-pod-security"]


def test_every_guard_is_in_the_pack_under_a_name_of_its_own() -> None:
    names = [policy.name for policy in rules.POLICIES]
    assert len(set(names)) == len(names) == 10
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)+", name) for name in names)


class TestGrants:
    @pytest.mark.parametrize("kind", ["RoleBinding", "ClusterRoleBinding"])
    @pytest.mark.parametrize(
        ("role", "subject", "count"),
        [
            ("cluster-admin", "system:unauthenticated", 1),
            ("view", "system:anonymous", 1),
            ("view", "system:masters", 1),
            ("edit", "system:serviceaccounts", 1),
            ("view", "system:authenticated", 0),
            ("cluster-admin", "operators", 0),
        ],
    )
    def test_a_role_is_given_to_someone_who_has_logged_in(
        self, kind: str, role: str, subject: str, count: int
    ) -> None:
        props = {"roleRef": {"name": role}, "subjects": [{"kind": "Group", "name": subject}]}
        of = f"kubernetes:rbac.authorization.k8s.io/v1:{kind}"
        assert len(violations(rules.grants_are_to_someone, of, props)) == count
