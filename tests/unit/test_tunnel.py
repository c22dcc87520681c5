"""Cloudflare tunnels.

Invariants: one route entry makes ingress rule, record and gate (incident 12); another route's
record is never touched; the tunnel is protected and keeps its id through adoption and every edit; a
rotated secret replaces nothing and touches no record (incident 15); the secret and the token made
from it are marked secret wherever they go.
"""

import base64
import contextlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes_validate
import pulumi
import pulumi_docker as docker
import pulumi_kubernetes as kubernetes
import pytest

from components import settings
from components.cluster import Cluster
from components.host import Connection, Host
from components.tunnel import (
    CloudflareTunnel,
    CloudflareTunnelArgs,
    cloudflare_provider,
    connector_token,
)
from tests.unit.conftest import UNKNOWN, Registered, Registration

ACCOUNT = "a" * 32
TUNNEL_ID = "c1744f8b-faa1-48a4-9e5c-02ac921467fa"
SECRET = base64.b64encode(b"canary of a tunnel, 32 bytes long").decode()
ROTATED = base64.b64encode(b"another canary that is quite long").decode()
IMAGE = "cloudflare/cloudflared:2026.1.0"
CLUSTER = {"kind": "cluster", "namespace": "factory", "image": IMAGE}
HOST = {
    "kind": "host",
    "image": IMAGE,
    "tokenFile": "/var/lib/homelab/tunnels/p510.token",
    "container": "cloudflared-p510",
}
ARGOCD = {
    "hostname": "argocd.example.org",
    "service": "http://argocd-server.argocd.svc.cluster.local:80",
}
GRAFANA = {
    "hostname": "grafana.example.org",
    "service": "http://grafana.factory.svc.cluster.local:80",
}
GATED = {**ARGOCD, "access": {"emails": ["me@example.org"], "emailDomains": ["example.com"]}}

# The name of the kind of each Cloudflare resource, for short.
TUNNEL = "ZeroTrustTunnelCloudflared"
CONFIG = "ZeroTrustTunnelCloudflaredConfig"
POLICY = "ZeroTrustAccessPolicy"
APPLICATION = "ZeroTrustAccessApplication"

Register = Callable[..., Registered]


@pytest.fixture
def register(run_program: Callable[..., Registered]) -> Register:
    """Registers tunnel `factory` as keywords of the stack file declare it."""

    def run(*, tunnel_id: str = TUNNEL_ID, preview: bool = False, **declared: Any) -> Registered:
        given = {"secret": SECRET, "connector": {"kind": "external"}, "routes": [], **declared}

        def program() -> None:
            account = settings.Cloudflare.model_validate(
                {
                    "accountId": ACCOUNT,
                    "apiToken": "canary-api-token-of-at-least-forty-characters",
                    "zones": {"example.org": "e" * 32, "lab.example.org": "f" * 32},
                }
            )
            host = Host("test", Connection(settings.Host.model_validate({})))
            identity = host.command(
                "identity", ["k3d", "identity"], {}, opts=pulumi.ResourceOptions()
            )
            provider = kubernetes.Provider("kubernetes", kubeconfig="{}")
            namespace = kubernetes.core.v1.Namespace(
                "factory", opts=pulumi.ResourceOptions(provider=provider)
            )
            CloudflareTunnel(
                "factory",
                CloudflareTunnelArgs(
                    settings=settings.Tunnel.model_validate(given),
                    account=account,
                    cloudflare=cloudflare_provider(account),
                    docker=docker.Provider("docker"),
                    cluster=Cluster(
                        "factory", provider, identity, "/etc/k3d/kubeconfig", host, "0a1b2c3d-1"
                    ),
                    after=[namespace],
                ),
            )

        return run_program(program, outputs={TUNNEL: {"id": tunnel_id}}, preview=preview)

    return run


def token(secret: str = SECRET) -> str:
    credentials = {"a": ACCOUNT, "t": TUNNEL_ID, "s": secret}
    return base64.b64encode(json.dumps(credentials).encode()).decode()


def edits(before: Registered, after: Registered) -> dict[str, set[Any]]:
    """What a preview would show: keys that were added, removed, and those whose inputs differ."""
    return {
        "added": set(after) - set(before),
        "removed": set(before) - set(after),
        "changed": {
            key for key in set(before) & set(after) if before[key].inputs != after[key].inputs
        },
    }


def bare(found: Any, text: str, path: str = "") -> list[str]:
    """The paths of all values that hold a text."""
    if isinstance(found, dict):
        inner = [(value, f"{path}.{key}" if path else key) for key, value in found.items()]
    elif isinstance(found, list):
        inner = [(value, f"{path}[{index}]") for index, value in enumerate(found)]
    else:
        return [path] if text in str(found) else []
    return [hit for value, where in inner for hit in bare(value, text, where)]


def pod(registered: Registered) -> dict[str, Any]:
    return registered["Deployment", "factory/cloudflared-factory"].inputs["spec"]["template"]


# The tunnel


def test_the_tunnel_is_protected_and_remotely_managed(register: Register) -> None:
    tunnel = register()[TUNNEL, "factory"]
    assert tunnel.protect
    assert tunnel.inputs == {
        "accountId": ACCOUNT,
        "name": "factory",
        "configSrc": "cloudflare",
        "tunnelSecret": SECRET,
    }
    assert tunnel.import_id == ""


def test_the_source_of_the_configuration_never_replaces_the_tunnel(register: Register) -> None:
    assert register()[TUNNEL, "factory"].ignore_changes == ["configSrc"]


def test_a_locally_managed_tunnel_has_records_and_gates_but_no_configuration(
    register: Register,
) -> None:
    registered = register(management="local", routes=[GATED])
    assert registered[TUNNEL, "factory"].inputs["configSrc"] == "local"
    assert registered.names(CONFIG) == []
    assert registered.names("DnsRecord") == ["argocd.example.org"]
    assert registered.names(APPLICATION) == ["argocd.example.org"]


@pytest.mark.parametrize("source", ["local", "cloudflare"])
def test_an_adopted_tunnel_is_imported_as_it_is(register: Register, source: str) -> None:
    tunnel = register(adopt={"id": TUNNEL_ID, "configSrc": source})[TUNNEL, "factory"]
    assert tunnel.import_id == f"{ACCOUNT}/{TUNNEL_ID}"
    assert tunnel.inputs["configSrc"] == source
    assert tunnel.ignore_changes == ["configSrc", "tunnelSecret"]
    assert tunnel.protect


def test_a_migrated_tunnel_keeps_every_resource_it_had_as_a_local_one(register: Register) -> None:
    adopted = {"id": TUNNEL_ID, "configSrc": "local"}
    local = register(adopt=adopted, management="local", routes=[ARGOCD])
    migrated = register(adopt=adopted, routes=[ARGOCD])
    assert edits(local, migrated) == {
        "added": {(CONFIG, "factory")},
        "removed": set(),
        "changed": set(),
    }


def test_children_belong_to_the_component_and_use_the_one_provider(register: Register) -> None:
    registered = register(routes=[GATED])
    for key in [
        (TUNNEL, "factory"),
        (CONFIG, "factory"),
        ("DnsRecord", "argocd.example.org"),
        (POLICY, "argocd.example.org"),
        (APPLICATION, "argocd.example.org"),
    ]:
        assert registered[key].parent == ("CloudflareTunnel", "factory")
        assert registered[key].provider == "cloudflare"
    assert registered["CloudflareTunnel", "factory"].type == "homelab:index:CloudflareTunnel"


def test_the_api_token_of_the_provider_is_secret(register: Register) -> None:
    assert register()["cloudflare", "cloudflare"].secrets == {"apiToken"}


# Routes


def test_routes_are_ingress_rules_in_their_order_and_the_catch_all_is_last(
    register: Register,
) -> None:
    routes = [GRAFANA, {**ARGOCD, "path": "/api"}, ARGOCD]
    config = register(routes=routes)[CONFIG, "factory"].inputs
    assert config["tunnelId"] == TUNNEL_ID
    assert config["config"]["ingresses"] == [
        {"hostname": "grafana.example.org", "service": GRAFANA["service"]},
        {"hostname": "argocd.example.org", "service": ARGOCD["service"], "path": "/api"},
        {"hostname": "argocd.example.org", "service": ARGOCD["service"]},
        {"service": "http_status:404"},
    ]


def test_a_tunnel_without_routes_answers_404_and_has_no_record(register: Register) -> None:
    registered = register()
    assert registered[CONFIG, "factory"].inputs["config"] == {
        "ingresses": [{"service": "http_status:404"}]
    }
    assert registered.names("DnsRecord") == []


def test_origin_settings_have_the_names_of_the_api_and_count_seconds(register: Register) -> None:
    origin = {
        "noTlsVerify": True,
        "httpHostHeader": "argocd.internal",
        "connectTimeout": "1m30s",
        "originServerName": "argocd.internal",
        "caPool": "/etc/ssl/ca.pem",
        "http2Origin": True,
        "keepAliveTimeout": "90s",
        "disableChunkedEncoding": True,
    }
    config = register(routes=[{**ARGOCD, "origin": origin}])[CONFIG, "factory"].inputs["config"]
    assert config["ingresses"][0]["originRequest"] == {
        **origin,
        "connectTimeout": 90,
        "keepAliveTimeout": 90,
    }


def test_a_hostname_has_one_proxied_record_to_the_tunnel(register: Register) -> None:
    registered = register(routes=[{**ARGOCD, "path": "/api"}, ARGOCD])
    assert registered.names("DnsRecord") == ["argocd.example.org"]
    assert registered["DnsRecord", "argocd.example.org"].inputs == {
        "zoneId": "e" * 32,
        "name": "argocd.example.org",
        "type": "CNAME",
        "content": f"{TUNNEL_ID}.cfargotunnel.com",
        "proxied": True,
        "ttl": 1,
    }


@pytest.mark.parametrize(
    ("hostname", "zone"),
    [
        ("example.org", "e"),
        ("a.example.org", "e"),
        ("lab.example.org", "f"),
        ("a.lab.example.org", "f"),
        ("notlab.example.org", "e"),
    ],
)
def test_a_record_lies_in_the_longest_zone(register: Register, hostname: str, zone: str) -> None:
    registered = register(routes=[{**ARGOCD, "hostname": hostname}])
    assert registered["DnsRecord", hostname].inputs["zoneId"] == zone * 32


@pytest.mark.parametrize("position", [0, 1])
def test_a_new_route_touches_the_configuration_and_no_other_record(
    register: Register, position: int
) -> None:
    routes = [GATED]
    routes.insert(position, GRAFANA)
    before, after = register(routes=[GATED]), register(routes=routes)
    new = {("DnsRecord", "grafana.example.org")}
    component = ("CloudflareTunnel", "factory")
    assert edits(before, after) == {
        "added": new,
        "removed": set(),
        "changed": {(CONFIG, "factory")},
    }
    assert edits(after, before)["removed"] == new
    assert before[component].outputs != after[component].outputs


# Access


def test_a_gate_lets_the_declared_people_in(register: Register) -> None:
    registered = register(routes=[GATED])
    name = "argocd.example.org"
    assert registered[POLICY, name].inputs == {
        "accountId": ACCOUNT,
        "name": name,
        "decision": "allow",
        "includes": [
            {"email": {"email": "me@example.org"}},
            {"emailDomain": {"domain": "example.com"}},
        ],
        "sessionDuration": "24h",
    }
    assert registered[APPLICATION, name].inputs == {
        "accountId": ACCOUNT,
        "name": name,
        "type": "self_hosted",
        "destinations": [{"type": "public", "uri": name}],
        "policies": [{"id": f"{name}-id", "precedence": 1}],
        "sessionDuration": "24h",
    }


def test_no_hostname_is_published_before_its_gate_exists(register: Register) -> None:
    registered = register(routes=[GATED, GRAFANA])
    gate = (APPLICATION, "argocd.example.org")
    assert gate in registered["DnsRecord", "argocd.example.org"].depends_on
    assert gate not in registered["DnsRecord", "grafana.example.org"].depends_on


def test_a_gate_is_before_all_paths_of_its_hostname(register: Register) -> None:
    registered = register(routes=[{**GATED, "path": "^/api/"}, GATED])
    assert registered.names(APPLICATION) == ["argocd.example.org"]
    assert registered[APPLICATION, "argocd.example.org"].inputs["destinations"] == [
        {"type": "public", "uri": "argocd.example.org"}
    ]


def test_hostnames_without_a_gate_are_listed_as_public(register: Register) -> None:
    outputs = register(routes=[GATED, GRAFANA])["CloudflareTunnel", "factory"].outputs
    assert outputs == {
        "id": TUNNEL_ID,
        "name": "factory",
        "connector": "external",
        "cname": f"{TUNNEL_ID}.cfargotunnel.com",
        "urls": {
            "argocd.example.org": "https://argocd.example.org",
            "grafana.example.org": "https://grafana.example.org",
        },
        "public": ["grafana.example.org"],
    }


# Secrets


def test_the_token_is_what_cloudflared_decodes(run_program: Callable[..., Registered]) -> None:
    seen: list[tuple[str, bool]] = []

    def program() -> pulumi.Output[None]:
        made = connector_token(ACCOUNT, pulumi.Output.from_input(TUNNEL_ID), SECRET)
        return pulumi.Output.all(made, made.is_secret()).apply(
            lambda both: seen.append((both[0], both[1]))
        )

    run_program(program)
    [(made, secret)] = seen
    assert json.loads(base64.b64decode(made)) == {"a": ACCOUNT, "t": TUNNEL_ID, "s": SECRET}
    assert secret


@pytest.mark.parametrize("connector", [CLUSTER, HOST, {"kind": "external"}])
def test_secrets_are_marked_wherever_they_go(register: Register, connector: dict) -> None:
    registered = register(connector=connector, routes=[GATED])
    stored_token = base64.b64encode(token().encode()).decode()
    found = 0
    for canary in [SECRET, token(), stored_token, "canary"]:
        for registration in registered.values():
            for path in bare(registration.inputs, canary):
                found += 1
                assert any(
                    path == mark or path.startswith(f"{mark}.") for mark in registration.secrets
                )
            assert bare(registration.outputs or {}, canary) == []
    assert found >= 2  # the tunnel's secret and the API token at least


# The connector in the cluster


def test_the_connector_in_the_cluster_goes_with_the_cluster(register: Register) -> None:
    registered = register(connector={**CLUSTER, "replicas": 2})
    for key in [
        ("Secret", "factory/cloudflared-factory-token"),
        ("Deployment", "factory/cloudflared-factory"),
        ("Service", "factory/cloudflared-factory-metrics"),
        ("PodDisruptionBudget", "factory/cloudflared-factory"),
    ]:
        child = registered[key]
        assert child.deleted_with == ("Command", "identity")
        assert child.parent == ("CloudflareTunnel", "factory")
        assert child.provider == "kubernetes"
        assert ("Namespace", "factory") in child.depends_on
        assert child.inputs["metadata"]["namespace"] == "factory"


def test_the_objects_in_the_cluster_are_valid(register: Register) -> None:
    registered = register(connector={**CLUSTER, "replicas": 2})
    kinds = ["Secret", "Deployment", "Service", "PodDisruptionBudget"]
    manifests = [r.inputs for (kind, _), r in registered.items() if kind in kinds]
    assert len(manifests) == 4
    for manifest in manifests:
        kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_connector_has_no_privilege(register: Register) -> None:
    spec = pod(register(connector=CLUSTER))["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "fsGroup": 65532,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    [container] = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not spec.get("hostNetwork")
    assert container["image"] == IMAGE


def test_the_connector_reads_its_token_from_the_secret_as_a_file(register: Register) -> None:
    registered = register(connector=CLUSTER)
    spec = pod(registered)["spec"]
    [container] = spec["containers"]
    [mount] = container["volumeMounts"]
    [volume] = spec["volumes"]
    assert container["args"][-2:] == ["--token-file", f"{mount['mountPath']}/token"]
    assert "env" not in container
    assert mount["name"] == volume["name"]
    secret = registered["Secret", "factory/cloudflared-factory-token"].inputs
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert base64.b64decode(secret["data"]["token"]).decode() == token()
    deployment = registered["Deployment", "factory/cloudflared-factory"]
    assert ("Secret", "factory/cloudflared-factory-token") in deployment.depends_on


def test_probes_and_metrics_are_on_the_declared_port(register: Register) -> None:
    registered = register(connector={**CLUSTER, "metricsPort": 2345})
    [container] = pod(registered)["spec"]["containers"]
    [port] = container["ports"]
    assert port == {"name": "metrics", "containerPort": 2345}
    assert "0.0.0.0:2345" in container["args"]
    for probe in ["readinessProbe", "livenessProbe"]:
        assert container[probe]["httpGet"] == {"path": "/ready", "port": "metrics"}
    service = registered["Service", "factory/cloudflared-factory-metrics"].inputs
    assert service["spec"]["ports"] == [{"name": "metrics", "port": 2345}]
    assert service["spec"]["selector"].items() <= pod(registered)["metadata"]["labels"].items()
    assert service["metadata"]["annotations"] == {"pulumi.com/skipAwait": "true"}


def test_nobody_talks_to_the_connector_but_who_reads_its_metrics(register: Register) -> None:
    """By its labels alone: other pods of the namespace are others'. What it talks to is free."""
    kept_alive = [{**GRAFANA, "keepalive": True}]
    registered = register(connector={**CLUSTER, "metricsPort": 2345}, routes=kept_alive)
    for name in ("cloudflared-factory", "keepalive-factory"):
        policy = registered["NetworkPolicy", f"factory/{name}"]
        kubernetes_validate.validate(policy.inputs, "1.31", strict=True)
        deployment = registered["Deployment", f"factory/{name}"]
        assert ("NetworkPolicy", f"factory/{name}") in deployment.depends_on
        assert policy.deleted_with == ("Command", "identity")
        spec = policy.inputs["spec"]
        selected = deployment.inputs["spec"]["selector"]["matchLabels"]
        assert spec["podSelector"] == {"matchLabels": selected}
        assert spec["policyTypes"] == ["Ingress"]
    connector = registered["NetworkPolicy", "factory/cloudflared-factory"].inputs["spec"]
    assert connector["ingress"] == [
        {"from": [{"namespaceSelector": {}}], "ports": [{"port": 2345, "protocol": "TCP"}]}
    ]
    assert not registered["NetworkPolicy", "factory/keepalive-factory"].inputs["spec"]["ingress"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_replicas_spread_and_are_not_evicted_together(register: Register, replicas: int) -> None:
    registered = register(connector={**CLUSTER, "replicas": replicas})
    spec = registered["Deployment", "factory/cloudflared-factory"].inputs["spec"]
    assert spec["replicas"] == replicas
    [spread] = spec["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"] == spec["selector"]
    assert len(registered.names("PodDisruptionBudget")) == replicas - 1


def test_connectors_are_stopped_between_the_deployment_and_the_tunnel(register: Register) -> None:
    registered = register(connector=CLUSTER)
    key = ("Command", "stop factory/cloudflared-factory")
    stop = registered[key]
    assert stop.inputs["delete"].endswith("connector stop")
    # Making it or an edit of it must not stop what runs, and a replacement would.
    for verb in ["create", "update"]:
        assert stop.inputs[verb].endswith("connector status")
    assert "triggers" not in stop.inputs
    assert json.loads(stop.inputs["stdin"]) == {
        "kubeconfig": "/etc/k3d/kubeconfig",
        "namespace": "factory",
        "deployment": "cloudflared-factory",
    }
    assert {(TUNNEL, "factory"), ("Command", "identity")} <= stop.depends_on
    assert stop.deleted_with is None
    assert key in registered["Deployment", "factory/cloudflared-factory"].depends_on


def test_a_rotated_secret_rolls_the_pods_and_replaces_nothing(register: Register) -> None:
    routes = [GATED, GRAFANA]
    before = register(connector=CLUSTER, routes=routes)
    after = register(connector=CLUSTER, routes=routes, secret=ROTATED)
    deployment = ("Deployment", "factory/cloudflared-factory")
    assert edits(before, after) == {
        "added": set(),
        "removed": set(),
        "changed": {
            (TUNNEL, "factory"),
            ("Secret", "factory/cloudflared-factory-token"),
            deployment,
        },
    }
    old, new = pod(before), pod(after)
    assert old["metadata"].pop("annotations") != new["metadata"].pop("annotations")
    assert before[deployment].inputs == after[deployment].inputs


def test_what_tells_tokens_apart_is_short_and_plain(register: Register) -> None:
    registered = register(connector=CLUSTER)
    [digest] = pod(registered)["metadata"]["annotations"].values()
    assert len(digest) == 16
    assert registered["Deployment", "factory/cloudflared-factory"].secrets == set()


def test_a_first_preview_does_not_know_the_token(register: Register) -> None:
    registered = register(connector=CLUSTER, routes=[ARGOCD], tunnel_id="", preview=True)
    assert registered["DnsRecord", "argocd.example.org"].inputs["content"] == UNKNOWN
    secret = registered["Secret", "factory/cloudflared-factory-token"]
    assert secret.inputs["data"] == UNKNOWN


# The connector on the host


def container(registered: Registered) -> Registration:
    return registered["Container", "cloudflared-p510"]


def test_the_container_on_the_host_has_no_privilege(register: Register) -> None:
    registered = register(connector=HOST)
    assert container(registered).inputs == {
        "name": "cloudflared-p510",
        "image": IMAGE,
        "command": [
            *["tunnel", "--no-autoupdate", "--metrics", "127.0.0.1:0"],
            *["run", "--token-file", "/etc/cloudflared/token"],
        ],
        "user": "65532:65532",
        "networkMode": "host",
        "mounts": [
            {
                "type": "bind",
                "source": "/var/lib/homelab/tunnels/p510.token",
                "target": "/etc/cloudflared/token",
                "readOnly": True,
            }
        ],
        "readOnly": True,
        "capabilities": {"drops": ["ALL"]},
        "securityOpts": ["no-new-privileges:true"],
        "logDriver": "json-file",
        "logOpts": {"max-size": "10m", "max-file": "3"},
        "restart": "unless-stopped",
        "mustRun": True,
        "destroyGraceSeconds": 45,
    }
    assert container(registered).provider == "docker"
    assert container(registered).delete_before_replace
    image = registered["RemoteImage", "cloudflared-p510"]
    assert image.inputs == {"name": IMAGE, "keepLocally": True}


def test_the_token_is_written_for_the_container_before_it_starts(register: Register) -> None:
    registered = register(connector=HOST)
    key = ("Command", "token /var/lib/homelab/tunnels/p510.token")
    file = registered[key]
    assert file.inputs["create"].endswith("files write")
    assert file.inputs["delete"].endswith("files remove")
    # A delete that runs for a replacement would take what that has just written.
    assert "triggers" not in file.inputs
    assert json.loads(file.inputs["stdin"]) == {
        "path": "/var/lib/homelab/tunnels/p510.token",
        "content": token(),
        "mode": "0600",
        "owner": "65532",
        "group": "65532",
        "restart_container": "cloudflared-p510",
    }
    assert "stdin" in file.secrets
    assert file.inputs["logging"] == "none"
    assert file.parent == ("CloudflareTunnel", "factory")
    assert {key, ("RemoteImage", "cloudflared-p510")} <= container(registered).depends_on


def test_a_rotated_secret_rewrites_the_file_and_leaves_the_container(register: Register) -> None:
    before = register(connector=HOST, routes=[ARGOCD])
    after = register(connector=HOST, routes=[ARGOCD], secret=ROTATED)
    assert edits(before, after) == {
        "added": set(),
        "removed": set(),
        "changed": {(TUNNEL, "factory"), ("Command", "token /var/lib/homelab/tunnels/p510.token")},
    }


# Keepalive


PLEX = {"hostname": "plex.example.org", "service": "http://localhost:32400", "keepalive": True}


def gets(command: list[str]) -> list[list[str]]:
    """curl's arguments of each GET."""
    assert command[:2] == ["sh", "-c"]
    assert command[2] == 'while :; do curl --parallel "$@"; sleep 120; done'
    found: list[list[str]] = [[]]
    for argument in command[4:]:
        if argument == "--next":
            found.append([])
        else:
            found[-1].append(argument)
    return found


@pytest.mark.parametrize("connector", [CLUSTER, HOST])
def test_without_keepalive_nothing_calls_an_origin(register: Register, connector: dict) -> None:
    registered = register(connector=connector, routes=[GRAFANA])
    assert not any("keepalive" in name for _, name in registered)


def test_a_container_on_the_host_keeps_origins_alive_without_privilege(register: Register) -> None:
    registered = register(connector=HOST, routes=[PLEX])
    kept = registered["Container", "keepalive-factory"]
    given = dict(kept.inputs)
    assert "curlimages/curl:" in given["image"]
    assert "@sha256:" in given["image"]
    assert gets(given.pop("entrypoints")) != []
    confined = {key: container(registered).inputs[key] for key in given if key != "init"}
    assert given == {**confined, "name": given["name"], "image": given["image"], "init": True}
    assert kept.provider == "docker"
    assert kept.parent == ("CloudflareTunnel", "factory")
    assert ("RemoteImage", "keepalive-factory") in kept.depends_on
    assert registered["RemoteImage", "keepalive-factory"].inputs["name"] == given["image"]


def test_a_deployment_in_the_cluster_keeps_origins_alive_without_privilege(
    register: Register,
) -> None:
    registered = register(connector=CLUSTER, routes=[{**GRAFANA, "keepalive": True}])
    kept = registered["Deployment", "factory/keepalive-factory"]
    kubernetes_validate.validate(kept.inputs, "1.31", strict=True)
    spec = kept.inputs["spec"]["template"]["spec"]
    connector = pod(registered)["spec"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"] == connector["securityContext"]
    [curl] = spec["containers"]
    assert curl["securityContext"] == connector["containers"][0]["securityContext"]
    assert "@sha256:" in curl["image"]
    # What restarts a pod when an origin fails would be a probe.
    assert not any("Probe" in key for key in curl)
    assert gets(curl["command"])[0][-1] == "http://grafana.factory.svc.cluster.local:80/"
    assert kept.deleted_with == ("Command", "identity")
    assert ("Namespace", "factory") in kept.depends_on


@pytest.mark.parametrize("connector", [CLUSTER, HOST])
def test_keeping_a_route_alive_touches_nothing_else(register: Register, connector: dict) -> None:
    before = register(connector=connector, routes=[GATED, GRAFANA])
    after = register(connector=connector, routes=[GATED, {**GRAFANA, "keepalive": True}])
    changes = edits(before, after)
    assert {name.rpartition("/")[2] for _, name in changes.pop("added")} == {"keepalive-factory"}
    assert changes == {"removed": set(), "changed": set()}


def test_only_routes_that_ask_for_it_are_kept_alive(register: Register) -> None:
    routes = [PLEX, GRAFANA, {**PLEX, "hostname": "nas.example.org"}]
    kept = register(connector=HOST, routes=routes)["Container", "keepalive-factory"]
    shown = [
        get[get.index("--write-out") + 1].split()[0] for get in gets(kept.inputs["entrypoints"])
    ]
    assert shown == ["plex.example.org", "nas.example.org"]


@pytest.mark.parametrize(
    ("origin", "host", "insecure"),
    [
        ({}, "plex.example.org", False),
        ({"noTlsVerify": True}, "plex.example.org", True),
        ({"httpHostHeader": "plex.internal:1"}, "plex.internal:1", False),
        ({"caPool": "/etc/ssl/ca.pem"}, "plex.example.org", True),
    ],
)
def test_a_get_is_what_the_connector_would_send(
    register: Register, origin: dict, host: str, insecure: bool
) -> None:
    routes = [{**PLEX, "service": "https://localhost:8443", "origin": origin}]
    kept = register(connector=HOST, routes=routes)["Container", "keepalive-factory"]
    [get] = gets(kept.inputs["entrypoints"])
    assert get[get.index("--header") + 1] == f"Host: {host}"
    assert ("--insecure" in get) == insecure
    assert get[get.index("--max-time") + 1] == "10"
    assert get[-1] == "https://localhost:8443/"


@pytest.mark.parametrize(
    ("path", "called"),
    [
        (None, "/"),
        ("^/api/", "/api/"),
        ("/api/v1.0/.*", "/api/v1.0/"),
        ("/users?", "/user"),
        ("/(a|b)", "/"),
        ("/?", "/"),
    ],
)
def test_a_get_goes_to_what_a_path_begins_with(
    register: Register, path: str | None, called: str
) -> None:
    routes = [{**PLEX, **({"path": path} if path else {})}]
    kept = register(connector=HOST, routes=routes)["Container", "keepalive-factory"]
    [get] = gets(kept.inputs["entrypoints"])
    assert get[-1] == f"http://localhost:32400{called}"


@pytest.mark.skipif(shutil.which("curl") is None, reason="runs the command, and curl is missing")
def test_a_dead_origin_is_a_line_in_the_log_and_keeps_no_other_from_being_called(
    register: Register,
) -> None:
    """The command itself, once round its loop, against a server of the test's own."""
    with closed_port() as dead, origin_server() as (alive, seen):
        routes = [
            {**PLEX, "service": f"http://127.0.0.1:{dead}"},
            {**PLEX, "hostname": "nas.example.org", "service": f"http://127.0.0.1:{alive}"},
        ]
        kept = register(connector=HOST, routes=routes)["Container", "keepalive-factory"]
        command = kept.inputs["entrypoints"]
        command[2] = command[2].replace("sleep 120", "exit")
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    failed, answered = sorted(ran.stdout.splitlines(), reverse=True)
    assert failed.startswith(f"plex.example.org http://127.0.0.1:{dead}/ 000 Failed to connect")
    assert answered.strip() == f"nas.example.org http://127.0.0.1:{alive}/ 401"
    assert seen == ["nas.example.org"]


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port of this machine on which nobody answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextlib.contextmanager
def origin_server() -> Iterator[tuple[int, list[str]]]:
    """An origin that asks everyone to log in: its port, and the Host headers that it saw."""
    seen: list[str] = []

    class Origin(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Host"])
            self.send_error(401)

        def log_message(self, format: str, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Origin) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, seen
        server.shutdown()
        thread.join()


# Another owner


def test_an_external_connector_is_nobody_of_ours(register: Register) -> None:
    registered = register(connector={"kind": "external"})
    assert {kind for kind, _ in registered} == {
        *["CloudflareTunnel", TUNNEL, CONFIG],
        *["Host", "Command", "Namespace", "cloudflare", "kubernetes", "docker"],
    }
    assert registered.names("Command") == ["hostctl", "identity"]
