"""What hostctl says of a host before and while it carries a cluster: all at once, each with the
remedy of the system that it is.
"""

import io
import json
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from hostctl import cli, program
from hostctl.certificates import validity_of
from hostctl.machine import Machine
from rehearsal.machine import made_up_certificate
from tests.unit.test_hostctl import NODE, SPEC, Host

NIXOS = 'NAME=NixOS\nID=nixos\nVERSION_ID="25.05"\n'
UBUNTU = 'NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n'
DAY = 86400


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def live(host: Host) -> Host:
    host.up()
    return host


def put(host: Host, path: str, text: str) -> None:
    """A file of the host, which also stands for one of its kernel."""
    file = host.root / "world/machine/files" / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def found(host: Host, severity: str, **changes: Any) -> list[dict[str, str]]:
    findings = host("k3d doctor", SPEC | changes)["findings"]
    return [one for one in findings if one["severity"] == severity]


def only(host: Host, severity: str, **changes: Any) -> dict[str, str]:
    (finding,) = found(host, severity, **changes)
    return finding


def test_nothing_is_found_on_a_host_that_lacks_nothing(live: Host) -> None:
    assert live("k3d doctor", SPEC)["findings"] == []
    assert live("k3d doctor factory")["findings"] == []


def test_everything_that_is_wrong_is_found_at_once_worst_first(host: Host) -> None:
    host.machine.set("missing-tools.json", ["k3d", "git"])
    host.machine.set("ports.json", [6443, "5353/udp"])
    host.machine.set("addresses.json", {"100.64.0.1": None})
    host.machine.set("file-system.json", ["tmpfs", True])
    host.machine.set("free", 2**30)
    put(host, "/sys/fs/cgroup/cgroup.controllers", "cpu io pids\n")
    put(host, "/proc/sys/net/ipv4/ip_forward", "0\n")
    ports = [
        {"host_port": 5353, "container_port": 53, "bind": "127.0.0.1", "protocol": "udp"},
        {"host_port": 80, "container_port": 80, "bind": "100.64.0.1", "protocol": "tcp"},
    ]
    findings = host("k3d doctor", SPEC | {"ports": ports})["findings"]
    assert [one["severity"] for one in findings] == ["error"] * 4 + ["warning"] * 8
    said = "\n".join(one["what"] for one in findings)
    for what in (
        "k3d is not on PATH",
        "no controller memory",
        "tcp port 6443 on 127.0.0.1 is in use",
        "udp port 5353 on 127.0.0.1 is in use",
        "git is not on PATH",
        "net.ipv4.ip_forward is 0",
        "/var/lib/docker has 1.00 GiB left for images",
        "storage is on tmpfs: it is lost at the next boot",
        "storage-server is on tmpfs: it is lost at the next boot",
        "storage has 1.00 GiB left for what is kept there",
        "storage-server has 1.00 GiB left for what is kept there",
        "no interface has 100.64.0.1; creating and starting wait for it",
    ):
        assert what in said
    assert all(one["remedy"] for one in findings)


@pytest.mark.parametrize(
    ("release", "remedy"),
    [
        (NIXOS, 'NixOS: boot.kernel.sysctl."net.ipv4.ip_forward" = 1;'),
        (UBUNTU, "Debian/Ubuntu: echo 'net.ipv4.ip_forward = 1' > /etc/sysctl.d/"),
        ("ID=debian\n", "TrueNAS SCALE: System > Advanced > Sysctl: net.ipv4.ip_forward = 1"),
    ],
)
def test_a_remedy_is_that_of_the_system_and_no_other(host: Host, release: str, remedy: str) -> None:
    put(host, "/etc/os-release", release)
    if remedy.startswith("TrueNAS"):
        put(host, "/usr/bin/midclt", "")
    put(host, "/proc/sys/net/ipv4/ip_forward", "0\n")
    told = only(host, "warning")["remedy"]
    assert told.startswith(remedy)
    assert sum(name in told for name in ("NixOS", "TrueNAS", "Debian")) == 1


def test_an_unknown_system_gets_all_remedies(host: Host) -> None:
    put(host, "/etc/os-release", "NAME=Alpine\nID=alpine\n")
    host.machine.set("missing-tools.json", ["docker"])
    remedy = host("k3d inspect", SPEC, code=6)["remedy"]
    assert all(name in remedy for name in ("NixOS", "TrueNAS", "Debian"))


@pytest.mark.parametrize(
    ("backend", "modules", "missing"),
    [
        ([], "overlay br_netfilter nf_conntrack", "vxlan"),
        (["--flannel-backend=wireguard-native"], "overlay br_netfilter nf_conntrack", "wireguard"),
        (["--flannel-backend=host-gw"], "br_netfilter nf_conntrack vxlan", "overlay"),
    ],
)
def test_a_kernel_without_a_module_that_the_network_needs_is_an_error(
    host: Host, backend: list[str], modules: str, missing: str
) -> None:
    put(host, "/etc/os-release", NIXOS)
    loaded = "".join(f"{name} 16384 0 - Live 0x0\n" for name in modules.split())
    put(host, "/proc/modules", loaded)
    put(host, "/lib/modules/6.12.0/modules.builtin", "kernel/fs/ext4/ext4.ko\n")
    put(host, "/lib/modules/6.12.0/modules.dep", "kernel/net/tls/tls.ko.xz: \n")
    finding = only(host, "error", k3s_args=backend)
    assert f"the kernel has no module {missing}" in finding["what"]
    assert finding["remedy"] == f'NixOS: boot.kernelModules = [ "{missing}" ];'


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/lib/modules/6.12.0/modules.builtin", "kernel/drivers/net/vxlan.ko\n"),
        ("/lib/modules/6.12.0/modules.dep", "kernel/drivers/net/vxlan/vxlan.ko.zst: a/udp.ko\n"),
        (
            "/run/booted-system/kernel-modules/lib/modules/6.12.0/modules.dep",
            "kernel/drivers/net/vxlan/vxlan.ko.xz:\n",
        ),
        ("/sys/module/vxlan/version", "1\n"),
    ],
)
def test_a_module_that_is_built_in_or_loads_when_asked_for_is_there(
    host: Host, path: str, text: str
) -> None:
    put(host, "/proc/modules", "overlay 1 0 -\nbr_netfilter 1 0 -\nnf_conntrack 1 0 -\n")
    put(host, path, text)
    assert host("k3d doctor", SPEC)["findings"][1:] == []


def test_modules_that_nobody_lists_cannot_be_told(host: Host) -> None:
    put(host, "/proc/modules", "overlay 1 0 -\nbr_netfilter 1 0 -\nnf_conntrack 1 0 -\n")
    assert any("cannot tell" in one["what"] for one in found(host, "info"))
    assert found(host, "error") == []


def test_cgroup_v1_is_a_warning_and_no_memory_controller_an_error(host: Host) -> None:
    gone = host.machine.read

    def read(path: str, limit: int = 0) -> bytes:
        if path == "/sys/fs/cgroup/cgroup.controllers":
            raise FileNotFoundError(path)
        return gone(path)

    host.machine.read = read  # type: ignore[method-assign]
    assert any("which cgroup version" in one["what"] for one in found(host, "info"))
    head = "#subsys_name\thierarchy\tnum_cgroups\tenabled\n"
    put(host, "/proc/cgroups", head + "cpu\t1\t1\t1\nmemory\t0\t1\t0\n")
    assert "without a memory controller" in only(host, "error")["what"]
    put(host, "/proc/cgroups", head + "memory\t4\t1\t1\n")
    assert found(host, "error") == []
    assert "cgroup v1" in only(host, "warning")["what"]


def test_docker_without_a_cgroup_namespace_or_without_root_is_a_warning(host: Host) -> None:
    host.machine.set("docker-info.json", {"SecurityOptions": ["name=rootless"]})
    said = [one["what"] for one in found(host, "warning")]
    assert any("rootless" in what for what in said)
    assert any("no cgroup namespace" in what for what in said)


@pytest.mark.parametrize(("agents", "severities"), [(0, []), (2, ["warning"])])
def test_several_nodes_need_more_watches(host: Host, agents: int, severities: list[str]) -> None:
    put(host, "/proc/sys/fs/inotify/max_user_instances", "128\n")
    findings = [
        one
        for one in host("k3d doctor", SPEC | {"agents": agents})["findings"]
        if "inotify" in one["what"]
    ]
    assert [one["severity"] for one in findings] == severities


@pytest.mark.parametrize(
    ("kind", "writable", "severity"),
    [
        ("ext4", True, None),
        ("zfs", True, None),
        ("exfat", True, "error"),
        ("ntfs3", True, "error"),
        ("xfs", False, "error"),
        ("nfs4", True, "warning"),
        ("overlay", True, "warning"),
    ],
)
def test_volumes_and_datastore_need_a_local_file_system_with_owners(
    host: Host, kind: str, writable: bool, severity: str | None
) -> None:
    host.machine.set("file-system.json", [kind, writable])
    findings = [one for one in host("k3d doctor", SPEC)["findings"] if kind in one["what"]]
    assert [one["severity"] for one in findings] == ([severity] * 2 if severity else [])


def test_without_flannel_the_plugins_that_a_node_lacks_are_named(host: Host) -> None:
    arguments = ["--flannel-backend=none"]
    before = [one["what"] for one in found(host, "warning", k3s_args=arguments)]
    assert any("bridge, host-local, loopback, portmap into /opt/cni/bin" in one for one in before)
    host.up(k3s_args=arguments)
    host.edit_node(plugins=["calico", "host-local", "loopback", "portmap"])
    assert f"{NODE} has no bridge in" in only(host, "warning", k3s_args=arguments)["what"]
    host.edit_node(plugins=["bridge", "host-local", "loopback", "portmap"])
    assert found(host, "warning", k3s_args=arguments) == []


def test_the_cni_plugins_that_the_mounted_directory_lacks_are_named(host: Host) -> None:
    for name in ("bridge", "host-local", "static"):
        put(host, f"/mnt/tank/cni/{name}", "")
    said = only(host, "error", cni_plugins="/mnt/tank/cni")["what"]
    assert "/mnt/tank/cni has no dhcp, macvlan" in said
    error = host("k3d ensure", SPEC | {"cni_plugins": "/mnt/tank/cni"}, code=3)
    assert "has no dhcp, macvlan" in error["cause"]
    for name in ("dhcp", "macvlan"):
        put(host, f"/mnt/tank/cni/{name}", "")
    assert found(host, "error", cni_plugins="/mnt/tank/cni") == []


@pytest.mark.parametrize(
    ("port", "service"),
    [
        (22, "SSH"),
        (80, "web interface"),
        (111, "rpcbind"),
        (443, "web interface"),
        (2049, "NFS"),
        (3260, "iSCSI"),
    ],
)
def test_a_port_of_the_hosts_own_services_is_named_with_the_service(
    host: Host, port: int, service: str
) -> None:
    host.machine.set("ports.json", [port])
    ports = [{"host_port": port, "container_port": 80, "bind": "0.0.0.0", "protocol": "tcp"}]
    said = only(host, "error", ports=ports)["what"]
    assert said.startswith(f"tcp port {port} on 0.0.0.0 is in use: {port} is the port of ")
    assert service in said
    host.machine.set("listeners.json", {str(port): "someone"})
    assert f"is in use by someone: {port}" in only(host, "error", ports=ports)["what"]


def test_an_interface_that_the_host_lacks_is_refused_with_those_that_it_has(host: Host) -> None:
    lan = {"lan_network": "k3d-factory-lan", "lan_interface": "br7"}
    assert "the host has no br7; it has br0" in only(host, "error", **lan)["what"]
    assert host("k3d inspect", SPEC | lan, code=3)["code"] == "refused"
    host.machine.set("interfaces.json", ["lo", "br7"])
    assert found(host, "error", **lan) == []


def test_real_machine_sees_its_interfaces() -> None:
    assert "lo" in Machine().interfaces()


# Without a spec, and before a create


def test_doctor_without_a_name_checks_the_host_alone(host: Host) -> None:
    host.machine.set("missing-tools.json", ["k3d"])
    host.machine.set("ports.json", [6443])
    out = run(host, ["k3d", "doctor"], "")
    assert [one["what"] for one in out["findings"]] == ["k3d version: k3d is not on PATH"]


def run(host: Host, words: list[str], text: str) -> Any:
    held, sys.stdout = sys.stdout, io.StringIO()
    try:
        cli.main(words, io.StringIO(text), host.machine)
        return json.loads(sys.stdout.getvalue())
    finally:
        sys.stdout = held


def test_a_create_that_would_fail_is_refused_with_all_reasons_and_makes_nothing(
    host: Host,
) -> None:
    host.machine.set("ports.json", [6443])
    put(host, "/sys/fs/cgroup/cgroup.controllers", "cpu pids\n")
    (one, other) = host.inspect()["warnings"]
    error = host("k3d ensure", SPEC, code=3)
    for warning in (one, other):
        assert warning["what"] in error["cause"]
        assert warning["remedy"] in error["remedy"]
    assert host.machine.clusters() == []
    assert not any("create" in call for call in host.calls)


def test_incident_10_a_recreate_that_would_fail_touches_nothing(live: Host) -> None:
    api = {"bind": "127.0.0.1", "port": 7443}
    live.machine.set("ports.json", [7443])
    port = {"host_port": 6443, "container_port": 80, "bind": "127.0.0.1", "protocol": "tcp"}
    # Its own former port is free by then.
    anew = SPEC | {"api": api, "ports": [port], "recreate": "factory"}
    error = live("k3d ensure", anew, code=3)
    assert error["cause"] == "tcp port 7443 on 127.0.0.1 is in use"
    assert live.inspect()["state"] == "running"
    live.machine.set("ports.json", [])
    live("k3d ensure", anew)


def test_a_udp_port_in_use_is_refused_before_a_create(host: Host) -> None:
    host.machine.set("ports.json", ["53/udp"])
    port = {"host_port": 53, "container_port": 53, "bind": "127.0.0.1", "protocol": "udp"}
    error = host("k3d ensure", SPEC | {"ports": [port]}, code=3)
    assert "udp port 53 on 127.0.0.1 is in use" in error["cause"]
    host("k3d ensure", SPEC | {"ports": [{**port, "protocol": "tcp"}]})


def test_incident_01_every_address_that_is_published_on_is_waited_for(host: Host) -> None:
    host.machine.set("addresses.json", {"100.64.0.1": 20})
    port = {"host_port": 80, "container_port": 80, "bind": "100.64.0.1", "protocol": "tcp"}
    host("k3d ensure", SPEC | {"ports": [port]})
    assert "waiting for an interface with 100.64.0.1" in host.said


def test_a_port_that_is_taken_while_its_address_comes_is_refused(host: Host) -> None:
    host.machine.set("addresses.json", {"100.64.0.1": 20})
    host.machine.set("ports.json", [6443])
    error = host("k3d ensure", SPEC | {"api": {"bind": "100.64.0.1", "port": 6443}}, code=3)
    assert "tcp port 6443 on 100.64.0.1 is in use" in error["cause"]


def test_what_a_create_needs_does_not_keep_a_cluster_from_being_healed(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    live.machine.set("missing-tools.json", ["k3d"])
    put(live, "/sys/fs/cgroup/cgroup.controllers", "cpu pids\n")
    live("k3d ensure", SPEC)
    assert live.inspect()["state"] == "running"


# Certificates and clocks


def certificate(host: Host, begins: float, ends: float) -> str:
    """One that is valid from so many to so many days from now."""

    def at(days: float) -> str:
        moment = datetime.fromtimestamp(host.machine.now() + days * DAY, timezone.utc)
        return moment.strftime("%Y%m%d%H%M%SZ")

    return made_up_certificate("0123456789abcdef" * 4, at(begins), at(ends))


@pytest.mark.parametrize("which", ["serving", "certificate"])
@pytest.mark.parametrize(
    ("begins", "ends", "said"),
    [(-335, 31, None), (-336, 29, "ends on"), (-366, -1, "ended on"), (1, 366, "is valid from")],
)
def test_a_certificate_near_its_end_and_a_clock_before_its_begin_are_warned_of(
    live: Host, which: str, begins: float, ends: float, said: str | None
) -> None:
    shown = certificate(live, -1, 364)
    live.edit(lambda cluster: cluster.update(serving=shown, certificate=shown))
    aged = certificate(live, begins, ends)
    live.edit(lambda cluster: cluster.update({which: aged}))
    seen = live.inspect()
    use = "client" if which == "certificate" else which
    if said is None:
        assert seen["warnings"] == []
        return
    (warning,) = seen["warnings"]
    assert f"the {use} certificate of cluster factory {said}" in warning["what"]
    expected = "set the host's clock" if begins > 0 else "hostctl k3d stop factory; hostctl k3d"
    assert warning["remedy"].startswith(expected)
    assert found(live, "warning")[0]["what"] == warning["what"]


@pytest.mark.parametrize(
    ("skew", "said"), [(4, None), (-4, None), (8, "ahead of"), (-400, "behind")]
)
def test_a_clock_that_is_off_is_warned_of(live: Host, skew: int, said: str | None) -> None:
    live.machine.set("clock-skew", skew)
    warnings = live.inspect()["warnings"]
    assert [f"{said} the host's" in one["what"] for one in warnings] == ([True] if said else [])


def test_neither_age_nor_skew_makes_up_do_anything(live: Host) -> None:
    before = live.inspect()
    live.machine.set("clock-skew", 100)
    aged = certificate(live, -360, 5)
    live.edit(lambda cluster: cluster.update(serving=aged))
    after = live.inspect()
    assert len(after["warnings"]) == 2
    for key in ("generation", "incarnation", "certificate_generation", "acceptance_generation"):
        assert after[key] == before[key]
    assert after["differences"] == []


@pytest.mark.parametrize("days", [30, 365 * 60])
def test_real_machine_reads_the_validity_of_a_real_certificate(tmp_path: Path, days: int) -> None:
    """What openssl makes: UTCTime up to 2049, GeneralizedTime after it."""
    der = self_signed(tmp_path, days)
    validity = validity_of(der.read_bytes())
    told = subprocess.run(
        ["openssl", "x509", "-inform", "der", "-in", der, "-noout", "-dates"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    dates = [ssl.cert_time_to_seconds(line.partition("=")[2]) for line in told]
    assert list(validity) == dates


@pytest.mark.parametrize("content", [b"", b"\x30", b"\x30\x03abc", b"\x30\x84\xff\xff\xff\xff"])
def test_what_is_no_certificate_cannot_be_told(content: bytes) -> None:
    with pytest.raises(ValueError, match="certificate"):
        validity_of(content)


def self_signed(directory: Path, days: int) -> Path:
    key, pem, der = (directory / name for name in ("key.pem", "cert.pem", "cert.der"))
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += [
        "-nodes",
        "-keyout",
        str(key),
        "-out",
        str(pem),
        "-days",
        str(days),
        "-subj",
        "/CN=k3s",
    ]
    subprocess.run(make, check=True, capture_output=True)
    convert = ["openssl", "x509", "-in", str(pem), "-outform", "der", "-out", str(der)]
    subprocess.run(convert, check=True)
    return der


@pytest.fixture
def api(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """A TLS server that answers a stranger with 401 and a date, and its certificate."""
    der = self_signed(tmp_path, 30).read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        plain, _ = listener.accept()
        with plain, context.wrap_socket(plain, server_side=True) as secure:
            secure.recv(4096)
            date = b"Date: Sat, 01 Jan 2022 00:00:00 GMT\r\n"
            secure.sendall(b"HTTP/1.0 401 Unauthorized\r\n" + date + b"\r\n")

    server = threading.Thread(target=serve)
    server.start()
    yield listener.getsockname()[1], der
    server.join()
    listener.close()


def test_real_machine_sees_a_servers_certificate_and_clock(api: tuple[int, bytes]) -> None:
    port, der = api
    seen = Machine().served("127.0.0.1", port)
    assert seen is not None
    assert (seen.certificate, seen.date) == (der, 1640995200.0)


def test_real_machine_sees_nothing_of_a_server_that_is_not_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert Machine().served("127.0.0.1", port) is None


def test_real_machine_sees_udp_ports_and_file_systems(tmp_path: Path) -> None:
    machine = Machine()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        assert not machine.port_is_free("127.0.0.1", port, "udp")
    assert machine.port_is_free("127.0.0.1", port, "udp")
    assert machine.file_system("/proc/self") == ("proc", True)
    kind, writable = machine.file_system(str(tmp_path / "not" / "there"))
    stat = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True)
    assert kind.startswith(stat.stdout.strip().split("/")[0][:3])
    assert writable


def test_an_older_python_is_told_which_one_is_needed(tmp_path: Path) -> None:
    """By the shipped program itself, before anything that such a Python does not know."""
    shipped = program.text().replace("sys.version_info < (3, 9)", "sys.version_info < (9, 9)")
    file = tmp_path / "hostctl"
    file.write_text(shipped)
    for words, code in ((["k3d", "doctor"], 6), (["k3d", "doctor", "--exit-zero"], 0)):
        ran = subprocess.run([sys.executable, file, *words], capture_output=True, text=True)
        error = json.loads(ran.stdout)["error"]
        assert (ran.returncode, error["code"]) == (code, "tool")
        assert "3.9 or newer" in error["remedy"]
        assert "pkgs.python3" in error["remedy"]
