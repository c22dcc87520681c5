"""The stand-in for k3s does what tests of hostctl rely on."""

import json
import time

import pytest

pytestmark = pytest.mark.cluster

POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"namespace": "kube-system"},
    "spec": {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "lookup",
                "image": "rancher/mirrored-library-busybox:1.36.1",
                "terminationMessagePolicy": "FallbackToLogsOnError",
            }
        ],
    },
}


def terminated(host, name, *command):
    """How a pod of one command ended, as its status has it."""
    pod = json.loads(json.dumps(POD))
    pod["metadata"]["name"] = name
    pod["spec"]["containers"][0]["command"] = list(command)
    host.kubectl("apply", "--filename=-", input=json.dumps(pod))
    path = "jsonpath={.status.containerStatuses[0].state.terminated}"
    for _ in range(100):
        found = host.kubectl("get", "pod", "--namespace=kube-system", name, f"--output={path}")
        if found:
            return json.loads(found)
        time.sleep(0.2)
    raise AssertionError(host.kubectl("describe", "pod", "--namespace=kube-system", name))


def test_a_pod_looks_names_up_through_the_declared_resolvers(host, spec, network):
    host.engine.resolver(spec["resolvers"], {"www.example.com": "192.0.2.77"})
    host.done("k3d", "ensure", spec=spec)
    # A moment after the API is ready, and no pod is accepted before.
    account = ["kubectl", "wait", "--for=create", "--namespace=kube-system", "sa/default"]
    host.engine.docker("exec", "k3d-factory-server-0", *account)

    assert terminated(host, "known", "nslookup", "www.example.com")["exitCode"] == 0
    inside = terminated(host, "inside", "nslookup", "kube-dns.kube-system.svc.cluster.local")
    assert inside["exitCode"] == 0
    unknown = terminated(host, "unknown", "nslookup", "nowhere.example.com")
    assert (unknown["exitCode"], unknown["reason"]) == (1, "Error")
    assert "NXDOMAIN" in unknown["message"]

    host.engine.kill_resolver()
    silent = terminated(host, "silent", "nslookup", "other.example.com")
    assert silent["exitCode"] == 1


def test_a_slow_datastore_is_read_and_a_stalled_one_is_not(host, spec, network):
    host.done("k3d", "ensure", spec=spec)
    node = "k3d-factory-server-0"

    def restarted(**opening):
        text = json.dumps(opening)
        host.engine.run(
            ["docker", "exec", "-i", node, "sh", "-c", "cat > /etc/rancher/k3s/opening.json"],
            input=text,
        )
        host.engine.docker("restart", "-t", "1", node)

    def read():
        pids = [word for word in host.engine.docker("top", node, "-eo", "pid").split()[1:]]
        files = [f"/proc/{pid}/io" for pid in pids]
        text = host.engine.run(["cat", *files], check=False).stdout
        return sum(int(line.split()[1]) for line in text.splitlines() if "rchar" in line)

    def after_seconds():
        time.sleep(2)
        before = read()
        time.sleep(3)
        return read() - before

    restarted(mib=400, mibPerSecond=20)
    assert after_seconds() > 20 * 2**20
    host.done("k3d", "start", spec={"name": "factory"})
    restarted(stalls=1)
    assert after_seconds() < 2**20
    host.engine.docker("restart", "-t", "1", node)
    host.done("k3d", "start", spec={"name": "factory"})


def test_an_argument_that_k3s_does_not_know_is_refused(docker):
    for words, said in (
        (["server", "--resolve-conf=/x"], "flag provided but not defined: -resolve-conf"),
        (["agent", "--disable=traefik", "--token=x"], "flag provided but not defined: -disable"),
        (["agent"], "--server and --token are required"),
    ):
        done = docker.run(
            ["docker", "run", "--rm", "rancher/k3s:v1.31.5-k3s1", *words], check=False
        )
        assert done.returncode == 1
        assert said in done.stderr
