"""What stacks really run, under the guards: the exceptions are exactly those of policy/rules.py."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pulumi_policy import (
    PolicyCustomTimeouts,
    PolicyProviderResource,
    PolicyResourceOptions,
    ResourceValidationArgs,
)

from policy import rules
from tests.unit import test_docs, test_settings
from tests.unit.program import STACKS, Program

# What no stack file has: each connector with its keepalive, kube-vip, Calico, Tailscale's operator,
# every kind of volume.
EXAMPLES = {
    "docs/storage.md": test_docs.example("docs/storage.md"),
    **{
        name: test_settings.config_of(
            (test_settings.FIXTURES / "valid" / f"{name}.yaml").read_text()
        )
        for name in (
            "a-connector-alone-and-calico",
            "k3s-ha-with-a-virtual-ip",
            "limits-and-access",
            "tailscale-key-and-operator",
            "tunnels-of-each-kind",
        )
    },
}

Workload = tuple[str, str, dict[str, Any]]
"""Type token, name and inputs."""


@pytest.fixture(scope="module")
def declared(tmp_path_factory: pytest.TempPathFactory) -> list[Workload]:
    return everything(tmp_path_factory.mktemp("stacks"))


def everything(directory: Path) -> list[Workload]:
    """All that the stacks and the examples declare."""
    programs = [Program(directory / stack, stack) for stack in STACKS]
    for name, config in EXAMPLES.items():
        given = {f"homelab:{key}": value for key, value in config.items()}
        programs.append(Program(directory / name, "example", given))
    return [one for program in programs for one in of(program)]


def of(program: Program) -> Iterator[Workload]:
    """What a stack declares, and what it has others make: k3s, and local-path-provisioner."""
    for resource in program.registered().values():
        yield resource.type, resource.name, resource.inputs
        if resource.type == "command:local:Command" and resource.inputs["stdin"][:1] == "{":
            files = json.loads(resource.inputs["stdin"]).get("files")
            for text in files.values() if isinstance(files, dict) else ():
                for manifest in yaml.safe_load_all(text):
                    yield as_resource(manifest)
        if resource.type == "kubernetes:core/v1:ConfigMap":
            for text in resource.inputs["data"].values():
                if '"kind": "Pod"' in text:
                    yield as_resource(json.loads(text))


def as_resource(manifest: dict[str, Any]) -> Workload:
    version = manifest["apiVersion"]
    group = version if "/" in version else f"core/{version}"
    name = manifest.get("metadata", {}).get("name", "")
    return f"kubernetes:{group}:{manifest['kind']}", name, manifest


def judged(workload: Workload) -> ResourceValidationArgs:
    kind, name, props = workload
    options = PolicyResourceOptions(True, [], None, [], PolicyCustomTimeouts(0, 0, 0), [], "")
    provider = PolicyProviderResource(rules._PROVIDER, {}, "", "cluster")
    return ResourceValidationArgs(kind, props, f"urn::{name}", name, options, provider)


GUARDS = (
    rules.images_are_pinned,
    rules.workloads_are_unprivileged,
    rules.containers_do_not_run_as_root,
    rules.pods_are_restricted,
    rules.secrets_are_not_in_the_clear,
    rules.grants_are_to_someone,
)


def test_every_workload_of_every_stack_is_restricted_but_for_reasons(declared):
    workloads = [one for one in declared if rules._pods(judged(one)) is not None]
    assert {name for _, name, _ in workloads} >= {"multus", "helper-pod", "factory/keepalive-lab"}
    found = {
        f"{name}: {violation}"
        for kind, name, props in declared
        for guard in GUARDS
        for violation in guard(judged((kind, name, props)))
    }
    assert found == set()


def test_no_namespace_takes_privileged_pods_without_a_reason(declared):
    found = {
        violation
        for one in declared
        for violation in rules.namespaces_have_pod_security(judged(one))
        if "privileged" in violation
    }
    assert found == set()


def test_nobody_reaches_a_pod_of_the_stack_but_by_a_policy(declared):
    """Each is selected by a NetworkPolicy, but for those that no policy holds for: of the nodes'
    network.
    """
    policies = [
        one["metadata"]["namespace"] + json.dumps(one["spec"]["podSelector"], sort_keys=True)
        for kind, _, one in declared
        if kind.endswith(":NetworkPolicy") and "Ingress" in one["spec"]["policyTypes"]
    ]
    exposed = set()
    for kind, name, one in declared:
        pods = rules._pods(judged((kind, name, one)))
        if pods is None or pods.get("hostNetwork") or name == "helper-pod":
            continue
        by_labels = {"matchLabels": one["spec"]["selector"]["matchLabels"]}
        namespace = one["metadata"]["namespace"]
        selectors = (json.dumps(selector, sort_keys=True) for selector in (by_labels, {}))
        if not any(namespace + selector in policies for selector in selectors):
            exposed.add(name)
    assert exposed == set()


def test_a_policy_for_a_whole_namespace_is_declared_or_in_one_of_the_stacks_alone(declared):
    whole = {
        one["metadata"]["namespace"]
        for kind, _, one in declared
        if kind.endswith(":NetworkPolicy") and not one["spec"]["podSelector"]
    }
    of_limits_and_access = {"apps", "factory"}
    assert whole == {"edge", "local-path-storage", "traefik"} | of_limits_and_access


def test_pod_security_refuses_in_no_namespace_where_others_deploy(declared):
    """Nor any pod of the stack's own: where it enforces a level, that is declared, or what fits."""
    enforced = {
        (name, labels["pod-security.kubernetes.io/enforce"])
        for kind, name, one in declared
        if kind.endswith(":Namespace")
        and "pod-security.kubernetes.io/enforce" in (labels := one["metadata"]["labels"])
    }
    privileged = {one.name for one in rules.ALLOWED if one.what == "privileged pods"}
    assert {name for name, level in enforced if level == "privileged"} == privileged
    rest = {(name, level) for name, level in enforced if level != "privileged"}
    # One example declares it for factory, in another it is the connector's alone.
    factory = {("factory", "baseline"), ("factory", "restricted")}
    assert rest == {("edge", "restricted"), ("traefik", "baseline")} | factory


def test_every_exception_is_needed(declared, monkeypatch):
    def violations() -> set[tuple[str, str, str]]:
        return {
            (one[0], one[1], violation)
            for one in declared
            for guard in (*GUARDS, rules.namespaces_have_pod_security)
            for violation in guard(judged(one))
        }

    allowed, before = rules.ALLOWED, violations()
    unneeded = []
    for exception in allowed:
        rest = tuple(one for one in allowed if one is not exception)
        monkeypatch.setattr(rules, "ALLOWED", rest)
        if violations() == before:
            unneeded.append((exception.name, exception.what))
    assert unneeded == []
