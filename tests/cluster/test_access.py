"""Limits and access on a real API server: every object is accepted, and what it says holds."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from policy import rules
from tests.cluster.engine import Engine
from tests.cluster.p510 import RealP510
from tests.engine.conftest import planned
from tests.unit import test_least_privilege

pytestmark = [pytest.mark.cluster, pytest.mark.engine]

MEMBER = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [
        {
            "name": "tower",
            "cluster": {
                "server": "https://192.0.2.10:6443",
                "certificate-authority-data": "bWFkZS11cA==",
            },
        }
    ],
    "users": [{"name": "argocd", "user": {"token": "made-up"}}],
    "contexts": [{"name": "tower", "context": {"cluster": "tower", "user": "argocd"}}],
    "current-context": "tower",
}
MORE = yaml.safe_load("""
namespaces:
  factory:
    podSecurity: {enforce: restricted}
    quota: {requests.cpu: "1", requests.memory: 1Gi, limits.memory: 4Gi, pods: "8"}
    limits:
      default: {memory: 256Mi}
      defaultRequest: {cpu: 50m, memory: 64Mi}
      max: {memory: 1Gi}
      volumes: {max: 10Gi}
    networkPolicy:
      ingress: [{cidrs: [192.168.1.0/24], ports: [{port: 8080}]}]
      egress: [{cidrs: [0.0.0.0/0]}, {namespaces: [argocd]}]
access:
  users:
    alice: {kind: certificate, groups: [operators]}
  serviceAccounts:
    factory: {deployer: {token: secret}, reader: {}}
  roles:
    rollouts:
      rules: [{apiGroups: [apps], resources: [deployments], verbs: [get, list, patch]}]
    logs:
      namespace: factory
      rules: [{resources: [pods, pods/log], verbs: [get, list]}]
    health:
      rules: [{nonResourceUrls: [/readyz], verbs: [get]}]
  bindings:
    operators: {role: view, everywhere: true, groups: [operators]}
    alice: {role: edit, namespaces: [factory], users: [alice]}
    deployer: {role: rollouts, namespaces: [factory], serviceAccounts: [factory/deployer]}
    reader: {role: logs, namespaces: [factory], serviceAccounts: [factory/reader]}
    health: {role: health, everywhere: true, serviceAccounts: [factory/reader]}
""")


@pytest.fixture
def stack(docker: Engine, tmp_path: Path) -> Iterator[RealP510]:
    """p510 with limits in namespace factory, people and programs, and another cluster."""
    stack = RealP510(docker, tmp_path)
    stack.prepare()
    stack.settings |= MORE
    stack.settings["cluster"]["audit"] = {}
    stack.settings["argocd"] |= {
        "clusters": {"tower": {"kubeconfig": yaml.safe_dump(MEMBER), "labels": {"site": "home"}}},
        "applicationSets": {"apps": {"path": "apps/{cluster}", "namespace": "apps"}},
    }
    stack.set_config(stack.settings)
    yield stack
    docker.kill_resolver()


def kubectl(stack: RealP510, *arguments: str, input: str = "", kubeconfig: str = "") -> str:
    """What kubectl says, whether it succeeds or not."""
    path = kubeconfig or stack.settings["cluster"]["kubeconfig"]["path"]
    argv = ["kubectl", f"--kubeconfig={path}", *arguments]
    done = stack.engine.run(argv, input=input, check=False)
    return done.stdout + done.stderr


def pod(name: str, memory: str = "", **context: Any) -> str:
    security = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        **context,
    }
    container: dict[str, Any] = {
        "name": "one",
        "image": "example/app:1",
        "securityContext": security,
    }
    if memory:
        container["resources"] = {"requests": {"memory": memory}, "limits": {"memory": memory}}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": "factory"},
            "spec": {"containers": [container]},
        }
    )


def check_that_admission_refuses_what_has_an_exception(stack: RealP510, directory: Path) -> None:
    """The API server's own Pod Security agrees with policy/rules.py on every workload of every
    stack: those are refused of which it says why, and no others.
    """
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": "restricted", "labels": labels}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    account["metadata"]["namespace"] = "restricted"
    kubectl(stack, "create", "--filename=-", input=json.dumps(namespace))
    kubectl(stack, "create", "--filename=-", input=json.dumps(account))
    refused, seen = set(), set()
    for workload in test_least_privilege.everything(directory):
        judged = test_least_privilege.judged(workload)
        spec = rules._pods(judged)
        if spec is None or judged.name in seen:
            continue
        seen.add(judged.name)
        spec = {key: value for key, value in spec.items() if not key.startswith("serviceAccount")}
        meta = {"name": "pod", "namespace": "restricted"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": dict(spec)}
        said = kubectl(stack, "create", "--dry-run=server", "--filename=-", input=json.dumps(pod))
        assert "pod/pod created" in said or 'violates PodSecurity "restricted' in said, said
        if "created" not in said:
            refused.add(judged.name)
    ours = ("a service account's token", "a writable root")
    excepted = {one.name for one in rules.ALLOWED if one.what not in ours}
    assert refused == excepted & seen
    assert len(seen - refused) > 3


def test_every_object_is_accepted_and_limits_and_roles_really_bind(stack, tmp_path):
    stack.up()
    assert planned(stack.up()) == set()
    assert planned(stack.preview("--refresh")) == set()

    # The tunnel's connector runs within the limits.
    ready = ["get", "deployment", "--namespace=factory", "--output=jsonpath={..readyReplicas}"]
    assert kubectl(stack, *ready).split() == ["2"]

    # Limits: what says nothing gets the defaults, what asks for too much is refused.
    create = ["create", "--filename=-"]
    assert "pod/decent created" in kubectl(stack, *create, input=pod("decent"))
    given = kubectl(
        stack, "get", "pod", "decent", "--namespace=factory",
        "--output=jsonpath={.spec.containers[0].resources}",
    )  # fmt: skip
    assert json.loads(given) == {
        "limits": {"memory": "256Mi"},
        "requests": {"cpu": "50m", "memory": "64Mi"},
    }
    assert "exceeded quota: homelab" in kubectl(stack, *create, input=pod("much", "1000Mi"))
    too_large = kubectl(stack, *create, input=pod("large", "2Gi"))
    assert "maximum memory usage per Container is 1Gi" in too_large
    privileged = kubectl(stack, *create, input=pod("root", runAsNonRoot=False))
    assert 'violates PodSecurity "restricted' in privileged

    # Roles: people by name and group, programs by their own kubeconfig.
    def may(what: str, namespace: str, *who: str, **how: str) -> str:
        ask = ["auth", "can-i", *what.split(), f"--namespace={namespace}", *who]
        return kubectl(stack, *ask, **how).split()[0]

    alice = ["--as=alice", "--as-group=operators"]
    assert may("patch deployments.apps", "factory", *alice) == "yes"
    assert may("patch deployments.apps", "default", *alice) == "no"
    assert may("list pods", "default", *alice) == "yes"
    assert may("list secrets", "default", *alice) == "no"
    assert may("list pods", "default", "--as=mallory") == "no"
    reader = ["--as=system:serviceaccount:factory:reader"]
    assert may("get pods --subresource=log", "factory", *reader) == "yes"
    assert may("get pods --subresource=exec", "factory", *reader) == "no"
    assert may("get /readyz", "factory", *reader) == "yes"

    path = "/root/deployer"
    stack.write_file(path, stack.outputs()["serviceAccounts"]["factory/deployer"])
    assert may("patch deployments.apps", "factory", kubeconfig=path) == "yes"
    assert may("delete deployments.apps", "factory", kubeconfig=path) == "no"
    whoami = ["auth", "whoami", "--output=jsonpath={.status.userInfo.username}"]
    assert kubectl(stack, *whoami, kubeconfig=path) == "system:serviceaccount:factory:deployer"

    # ArgoCD's view of the other cluster.
    labelled = ["--selector=argocd.argoproj.io/secret-type=cluster", "--output=name"]
    assert kubectl(stack, "get", "secret", "--namespace=argocd", *labelled) == (
        "secret/cluster-tower\n"
    )
    assert "apps" in kubectl(stack, "get", "applicationset", "--namespace=argocd", "--output=name")

    # The audit log tells who read and wrote Secrets, and nothing of what is in them.
    canary = ["create", "secret", "generic", "canary", "--from-literal=a=canary-value"]
    kubectl(stack, *canary, "--namespace=factory")
    log = f"{stack.settings['cluster']['storageDir']}-server/server-0/logs/audit.log"
    lines = [json.loads(line) for line in stack.engine.run(["cat", log]).stdout.splitlines()]
    (written,) = (
        line
        for line in lines
        if line.get("objectRef", {}).get("name") == "canary" and line["verb"] == "create"
    )
    assert written["user"]["username"] == "system:admin"
    assert (written["level"], "requestObject" in written) == ("Metadata", False)
    # Who asks without a name, such as a probe, has none.
    who = {line["user"].get("username") for line in lines}
    assert "system:serviceaccount:factory:deployer" in who

    # Without its token the way in is gone, once the API server has forgotten it (10 s).
    del stack.settings["access"]["serviceAccounts"]["factory"]["deployer"]["token"]
    stack.set_config(stack.settings)
    assert planned(stack.up()) == {"delete Secret factory/deployer-token"}
    refused = ""
    for _ in range(30):
        refused = kubectl(stack, "get", "deployments", kubeconfig=path)
        if "Unauthorized" in refused or "logged in" in refused:
            break
        time.sleep(1)
    else:
        pytest.fail(f"the old token is still good: {refused}")

    check_that_admission_refuses_what_has_an_exception(stack, tmp_path)

    for section in ("namespaces", "access"):
        del stack.settings[section]
    del stack.settings["argocd"]["clusters"], stack.settings["argocd"]["applicationSets"]
    stack.set_config(stack.settings)
    stack.up()
    assert planned(stack.up()) == set()
    left = "resourcequota,limitrange,role,rolebinding"
    assert "No resources found" in kubectl(stack, "get", left, "--namespace=factory")
    policies = kubectl(stack, "get", "networkpolicy", "--namespace=factory", "--output=name")
    assert policies == "networkpolicy.networking.k8s.io/cloudflared-factory\n"

    # Of a namespace where others deploy nothing is refused, and they are told.
    told = kubectl(stack, *create, "--dry-run=server", input=pod("root", runAsNonRoot=False))
    assert 'would violate PodSecurity "restricted:latest"' in told
    assert "pod/root created (server dry run)" in told
