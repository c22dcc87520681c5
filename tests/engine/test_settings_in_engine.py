"""Bad settings under the real engine: refused as a whole, before anything is registered."""

import pytest

from rehearsal.run import CHECKOUT, Rehearsal, Run, Secret
from tests.engine.conftest import errors

pytestmark = pytest.mark.engine

CLUSTER = {"image": "rancher/k3s:v1.31.5-k3s1"}
ZONES = {"accountId": "0" * 32, "zones": {"example.org": "0" * 32}}


@pytest.fixture
def preview(tmp_path):
    """A preview of a stack with these settings."""

    def run(config: dict, **environment: str) -> Run:
        directory = tmp_path / "rehearsal"
        stack = Rehearsal(directory, "dev", config=config, environment=environment)
        return stack.preview(check=False)

    return run


@pytest.fixture
def beside(tmp_path):
    """Puts the file of another stack beside the one that `preview` previews."""

    def put(stack: str, text: str) -> None:
        path = tmp_path / "rehearsal" / "project" / f"Pulumi.{stack}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return put


def refused(run: Run) -> str:
    """The one error of a run that was refused before anything was registered but the stack."""
    assert run.code != 0
    assert [step.type for step in run.steps] in ([], ["pulumi:pulumi:Stack"])
    (error,) = errors(run)
    assert "Traceback" not in run.stdout + run.stderr
    return error


def test_all_errors_of_a_stack_file_are_told_at_once_and_no_secret_value(preview):
    error = refused(
        preview(
            {
                "cluster": {"image": "rancher/k3s:latest", "servers": 2, "api": {"port": 70000}},
                "clutser": {"image": "rancher/k3s:latest"},
                "secrets": {"apps": {"login": {"data": {"key": Secret("hidden-0")}, "fils": {}}}},
                "cloudflare": {**ZONES, "apiToken": Secret("hidden-1 hidden-2")},
                "tunnels": {
                    "factory": {
                        "secret": Secret("hidden-3"),
                        "connector": {"kind": "cluster", "image": "cloudflare/cloudflared"},
                    }
                },
                "argocd": {"repository": "https://git.example.org/x", "ref": "--upload-pack=x"},
            }
        )
    )
    first, *problems = error.splitlines()
    assert first == "error: Pulumi.dev.yaml: 9 settings are refused; nothing was changed."
    assert {problem.partition(": ")[0] for problem in problems} == {
        "homelab:clutser",
        "homelab:cluster.image",
        "homelab:cluster.servers",
        "homelab:cluster.api.port",
        "homelab:secrets.apps.login.fils",
        "homelab:cloudflare.apiToken",
        "homelab:tunnels.factory.secret",
        "homelab:tunnels.factory.connector.image",
        "homelab:argocd.ref",
    }
    assert all("Allowed: " in problem and "Remedy: " in problem for problem in problems)
    assert "hidden" not in error


def test_each_secret_that_is_missing_comes_with_the_command_that_sets_it(preview):
    error = refused(
        preview(
            {
                "cluster": CLUSTER,
                "cloudflare": ZONES,
                "tunnels": {"factory": {"connector": {"kind": "external"}, "routes": []}},
                "tailscale": {"operator": {"version": "1.86.2"}},
            }
        )
    )
    for path in (
        "cloudflare.apiToken",
        "tunnels.factory.secret",
        "tailscale.operator.clientId",
        "tailscale.operator.clientSecret",
    ):
        assert f"pulumi config set --secret --path 'homelab:{path}'" in error


def test_the_command_of_a_missing_secret_mends_it(tmp_path):
    config = {"cluster": CLUSTER, "cloudflare": ZONES}
    stack = Rehearsal(tmp_path, "dev", config=config)
    assert "homelab:cloudflare.apiToken: is missing" in refused(stack.preview(check=False))
    stack.pulumi("config", "set", "--secret", "--path", "homelab:cloudflare.apiToken", "t" * 40)
    assert stack.preview().code == 0
    assert "t" * 40 not in (tmp_path / "project" / "Pulumi.dev.yaml").read_text()


def test_ssh_to_a_host_whose_api_listens_on_loopback_is_refused_with_both_ways_out(preview):
    host = {"connection": "ssh", "address": "p510.example.org", "user": "deploy"}
    error = refused(preview({"cluster": CLUSTER, "host": host}))
    assert "homelab:host.connection: local" in error
    assert "homelab:cluster.api.serverName" in error


def test_a_stack_file_without_a_cluster_is_refused_by_the_name_of_the_setting(preview):
    run = preview({})
    assert run.code != 0
    assert run.steps == []
    assert "Stack 'dev' is missing configuration value 'cluster'" in run.stderr


def test_a_stack_without_tunnels_neither_imports_nor_runs_cloudflares_package(tmp_path):
    """Nor is Cloudflare asked anything. Both are replaced by something that cannot be used."""
    package = tmp_path / "pulumi_cloudflare"
    package.mkdir()
    for module in ("__init__", "_inputs"):
        (package / f"{module}.py").write_text("raise ImportError('imported all the same')")
    plugin = tmp_path / "pulumi-resource-cloudflare"
    plugin.write_text(f"#!/bin/sh\necho started >{tmp_path}/started\nexit 1\n")
    plugin.chmod(0o755)
    stack = Rehearsal(tmp_path / "rehearsal", "dev", config={"cluster": CLUSTER})
    stack.environment = {
        "PYTHONPATH": f"{tmp_path}:{CHECKOUT}",
        "PATH": f"{tmp_path}:{stack.process_environment()['PATH']}",
    }
    stack.preview()
    stack.up()
    assert not (tmp_path / "started").exists()
    assert not (stack.directory / "asked.txt").exists()

    tunnel = {
        "secret": Secret("bWFkZS11cCBzZWNyZXQgb2YgdHVubmVsIGZhY3Rvcnk="),
        "connector": {"kind": "external"},
    }
    cloudflare = {**ZONES, "apiToken": Secret("t" * 40)}
    stack.set_config({"cluster": CLUSTER, "cloudflare": cloudflare, "tunnels": {"one": tunnel}})
    assert "imported all the same" in "".join(errors(stack.preview(check=False)))


def test_a_stack_that_collides_with_another_refuses_to_preview_and_names_both_files(
    preview, beside
):
    beside("nas", "config: {'homelab:host': {name: dev}, 'homelab:cluster': {image: a/b:1}}\n")
    beside("lab", "config: {'homelab:cluster': {image: a/b:1}}\n")
    error = refused(preview({"cluster": CLUSTER}))
    assert error.startswith("error: Pulumi.dev.yaml: 6 settings are refused; nothing was changed.")
    assert (
        "homelab:cluster.api.port: 6443 is also the port in Pulumi.nas.yaml,"
        " homelab:cluster.api.port. Allowed: each port once on host dev."
    ) in error
    assert "Pulumi.lab.yaml" not in error


def test_stacks_that_collide_with_each_other_do_not_stop_a_third(preview, beside):
    for stack in ("nas", "lab"):
        beside(stack, "config: {'homelab:host': {name: nas}, 'homelab:cluster': {image: a/b:1}}\n")
    beside("broken", "config: [\n")
    run = preview({"cluster": CLUSTER})
    assert run.code == 0
    (warning,) = (text for text in run.diagnostics if "broken" in text)
    assert warning.startswith(
        "warning: Pulumi.broken.yaml is compared without this: cannot be read:"
    )
