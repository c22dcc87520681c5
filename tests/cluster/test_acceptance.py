"""Preflight and acceptance on real Docker and k3d: pods that really ask for names."""

import subprocess

import pytest

pytestmark = pytest.mark.cluster

NAME = "www.example.com"
UNASKED = "other.example.com"
NAMES = {NAME: "192.0.2.77", UNASKED: "192.0.2.78"}
RESOLVERS = ["1.1.1.1", "9.9.9.9"]


@pytest.fixture
def wanted(spec):
    image = "rancher/mirrored-library-busybox:1.36.1"
    acceptance = {"name": NAME, "image": image, "required": False}
    return {"name": spec["name"], "acceptance": acceptance, "generation": 1}


def pods(host) -> str:
    selector = "--selector=app.kubernetes.io/name=acceptance"
    return host.kubectl("get", "pods", "--namespace=kube-system", "--output=name", selector)


def test_incident_05_pods_are_asked_and_not_the_node(host, spec, network, wanted):
    host.engine.resolver(RESOLVERS, NAMES)
    host.done("k3d", "ensure", spec={**spec, "generation": 1})
    seen = host.done("k3d", "accept", spec=wanted)["acceptance"]
    assert seen == {"state": "passed", "detail": f"a pod resolves {NAME}", "remedy": ""}
    assert pods(host) == ""

    # CoreDNS keeps what it was asked for, and would go on answering that.
    host.engine.kill_resolver()
    wanted["acceptance"]["name"] = UNASKED
    seen = host.done("k3d", "accept", spec=wanted)["acceptance"]
    assert seen["state"] == "failed"
    assert f"a pod does not resolve {UNASKED}: " in seen["detail"]
    assert pods(host) == ""
    inspected = host.done("k3d", "inspect", spec=spec)["cluster"]
    assert inspected["acceptance_generation"] == 2

    host.engine.resolver(RESOLVERS, NAMES)
    seen = host.done("k3d", "accept", spec={**wanted, "generation": 2})["acceptance"]
    assert seen["state"] == "passed"
    assert host.done("k3d", "inspect", spec=spec)["cluster"]["acceptance_generation"] == 2


def test_what_is_in_the_way_of_a_create_is_said_at_once_and_nothing_is_made(host, spec, network):
    port = {"host_port": 5353, "container_port": 53, "bind": "127.0.0.1", "protocol": "udp"}
    taken = {**spec, "ports": [port]}
    # The API's port may be that of a connection which has just ended (TIME_WAIT).
    listen = "import socket,time;" + "".join(
        f"s{kind}=socket.socket(type={kind});s{kind}.setsockopt(1,socket.SO_REUSEADDR,{kind % 2});"
        f"s{kind}.bind(('127.0.0.1',{number}));"
        for kind, number in ((1, spec["api"]["port"]), (2, 5353))
    )
    listen += "s1.listen();print(flush=True);time.sleep(600)"
    with host.engine.popen(["python3", "-c", listen], stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            error = host("k3d", "ensure", spec=taken)["error"]
            assert error["code"] == "refused"
            assert f"tcp port {spec['api']['port']} on 127.0.0.1 is in use" in error["cause"]
            assert "udp port 5353 on 127.0.0.1 is in use" in error["cause"]
            assert host.engine.clusters() == []
            said = [one["what"] for one in host.done("k3d", "doctor", spec=taken)["findings"]]
            assert any("udp port 5353" in what for what in said)
        finally:
            holder.kill()
    host.done("k3d", "ensure", spec={**taken, "generation": 1})


def test_the_certificates_of_a_live_api_are_seen(host, spec, network):
    host.done("k3d", "ensure", spec={**spec, "generation": 1})
    seen = host.done("k3d", "inspect", spec=spec)["cluster"]
    assert seen["live"]["serving_certificate_ends"]
    assert seen["live"]["client_certificate_ends"]
    assert seen["live"]["clock_skew_seconds"] in (-1, 0, 1)
    assert seen["warnings"] == []
