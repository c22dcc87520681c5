"""Tailscale.

Invariants: the operator's credentials are in a Secret that the chart reads, never in the release's
values; new ones roll the operator and replace nothing; the sidecar path is shown as deprecated
(incident 13).
"""

import base64
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pulumi_kubernetes as kubernetes
import pytest

from components import settings
from components.cluster import Cluster
from components.host import Connection, Host
from components.tailscale import TailscaleOperator, TailscaleOperatorArgs, warn_of_sidecars
from tests.unit.conftest import Registered

SECRET = ("Secret", "tailscale/operator-oauth")
RELEASE = ("Release", "tailscale-operator")

Register = Callable[..., Registered]


@pytest.fixture
def register(run_program: Callable[..., Registered]) -> Register:
    def run(**declared: Any) -> Registered:
        operator = {
            "clientId": "canary-id",
            "clientSecret": "canary-secret",
            "version": "1.90.6",
            **declared,
        }

        def program() -> None:
            host = Host("test", Connection(settings.Host.model_validate({})))
            provider = kubernetes.Provider("kubernetes", kubeconfig="{}")
            given = settings.Tailscale.model_validate({"operator": operator}).operator
            assert given
            TailscaleOperator(
                "tailscale",
                TailscaleOperatorArgs(
                    settings=given,
                    cluster=Cluster(
                        "factory", provider, host.hostctl, "/etc/k3d/kubeconfig", host, "0a1b2c3d-1"
                    ),
                    after=[kubernetes.core.v1.Namespace("tailscale")],
                ),
            )

        return run_program(program)

    return run


def test_the_operator_is_its_pinned_chart(register: Register) -> None:
    release = register()[RELEASE]
    assert release.inputs["chart"] == "tailscale-operator"
    assert release.inputs["version"] == "1.90.6"
    assert release.inputs["namespace"] == "tailscale"
    assert release.inputs["repositoryOpts"] == {"repo": "https://pkgs.tailscale.com/helmcharts"}


def test_credentials_are_in_the_secret_that_the_chart_reads(register: Register) -> None:
    registered = register()
    secret = registered[SECRET]
    kubernetes_validate.validate(secret.inputs, "1.31", strict=True)
    assert secret.inputs["metadata"]["name"] == "operator-oauth"
    assert {key: base64.b64decode(value) for key, value in secret.inputs["data"].items()} == {
        "client_id": b"canary-id",
        "client_secret": b"canary-secret",
    }
    assert "data" in secret.secrets
    assert "oauth" not in registered[RELEASE].inputs["values"]
    assert "canary" not in str(registered[RELEASE].inputs)
    assert SECRET in registered[RELEASE].depends_on


def test_the_operator_goes_with_the_cluster(register: Register) -> None:
    registered = register()
    for key in [SECRET, RELEASE]:
        assert registered[key].deleted_with == ("Command", "hostctl")
        assert registered[key].provider == "kubernetes"
        assert registered[key].parent == ("TailscaleOperator", "tailscale")
        assert ("Namespace", "tailscale") in registered[key].depends_on


def test_the_operator_takes_the_declared_name_on_the_tailnet(register: Register) -> None:
    named, unnamed = register(hostname="p510-k8s")[RELEASE], register()[RELEASE]
    assert named.inputs["values"]["operatorConfig"]["hostname"] == "p510-k8s"
    assert "hostname" not in unnamed.inputs["values"]["operatorConfig"]


def test_new_credentials_roll_the_operator_in_place(register: Register) -> None:
    before, after = register(), register(clientSecret="canary-rotated")
    assert {key for key in before if before[key].inputs != after[key].inputs} == {SECRET, RELEASE}
    old, new = before[RELEASE].inputs, after[RELEASE].inputs
    assert old["values"]["operatorConfig"].pop("podAnnotations") != new["values"][
        "operatorConfig"
    ].pop("podAnnotations")
    assert old == new


@pytest.mark.parametrize(
    ("declared", "warned"),
    [
        ({"authKey": {"value": "tskey-auth-canary"}}, True),
        ({"authKey": {"value": "tskey-auth-canary"}, "copies": []}, False),
        ({}, False),
    ],
)
def test_copies_of_the_auth_key_are_shown_as_deprecated(
    run_program: Callable[..., Registered],
    caplog: pytest.LogCaptureFixture,
    declared: dict[str, Any],
    warned: bool,
) -> None:
    run_program(lambda: warn_of_sidecars(settings.Tailscale.model_validate(declared)))
    assert ("argocd, factory: Tailscale sidecars are deprecated" in caplog.text) == warned
    assert "canary" not in caplog.text
