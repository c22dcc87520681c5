"""`hostctl install k3d`: nothing unverified is ever installed, and what is installed is used."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hostctl import install, program
from hostctl.machine import Machine
from tests.unit.test_hostctl import SPEC, Host

K3D = b"#!/bin/sh\necho 'k3d version v5.8.3'\n"
SHA256 = hashlib.sha256(K3D).hexdigest()
PROGRAM = "/var/lib/homelab/bin/k3d"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.machine.set("missing-tools.json", ["k3d"])
    return host


def test_the_pinned_release_is_installed_once_and_used(host: Host) -> None:
    made = host("install k3d", {})
    assert made == made | {"path": PROGRAM, "version": "5.8.3", "changed": True}
    access = host.machine.stat(PROGRAM)
    assert access is not None
    assert access.mode == 0o755
    host("k3d ensure", SPEC)
    assert host("install k3d", {})["changed"] is False


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_the_pinned_release_is_verified_for_each_architecture(
    host: Host, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    kernel = {"amd64": "x86_64", "arm64": "aarch64"}[arch]
    monkeypatch.setattr(host.machine, "kernel", lambda: ("6.12.0", kernel))
    asked = []

    def download(url: str, sha256: str, tick: Callable[[int], None]) -> bytes:
        asked.append((url, sha256))
        return K3D

    monkeypatch.setattr(host.machine, "download", download)
    host("install k3d", {})
    url = f"https://github.com/k3d-io/k3d/releases/download/v5.8.3/k3d-linux-{arch}"
    assert asked == [(url, install.K3D_SHA256[arch])]


@pytest.mark.parametrize("version", ["5.8.1", "5.8.3"])
def test_without_a_known_sha256_nothing_is_installed(
    host: Host, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    if version == "5.8.3":
        monkeypatch.setattr(host.machine, "kernel", lambda: ("6.12.0", "riscv64"))
    error = host("install k3d", {"version": version}, code=3)
    assert "nothing is installed unverified" in error["cause"]
    assert "homelab:host.k3d.sha256" in error["remedy"]
    assert not host.machine.exists(PROGRAM)


def test_a_preview_does_not_miss_the_k3d_that_up_installs(host: Host) -> None:
    assert host.inspect(installs_k3d=True)["warnings"] == []
    assert len(host.inspect()["warnings"]) == 1


@pytest.mark.parametrize(
    "spec", [{"url": "file:///etc/shadow"}, {"sha256": "abc"}, {"version": "v5"}, {"path": "/x"}]
)
def test_malformed_specs_are_refused(host: Host, spec: dict[str, str]) -> None:
    host("install k3d", spec, code=2)


# A real machine, from a server on the loopback


class Server(ThreadingHTTPServer):
    """Serves one file. `says` is the length that it claims, `seen` what it was asked for."""

    says = len(K3D)

    def __init__(self) -> None:
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/k3d-linux-amd64"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.seen.append(self.path)
        self.send_response(200 if "k3d-linux" in self.path else 404)
        self.send_header("Content-Length", str(self.server.says))
        self.end_headers()
        self.wfile.write(K3D)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def told(size: int) -> None:
    raise AssertionError("a small file needs no progress")


def test_real_machine_downloads_what_the_sha256_says(server: Server) -> None:
    assert Machine().download(server.url, SHA256, told) == K3D


def test_real_machine_refuses_another_file(server: Server) -> None:
    with pytest.raises(ValueError, match=SHA256):
        Machine().download(server.url, "0" * 64, told)


def test_real_machine_refuses_a_file_that_is_cut_off(server: Server) -> None:
    server.says = len(K3D) + 100
    with pytest.raises(OSError, match=f"cut off after {len(K3D)} of {len(K3D) + 100} bytes"):
        Machine().download(server.url, SHA256, told)


def test_real_machine_names_what_a_server_answers(server: Server) -> None:
    with pytest.raises(OSError, match="404"):
        Machine().download(server.url.replace("k3d-linux", "other"), SHA256, told)


def test_real_machine_goes_by_the_proxy_of_the_environment(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    url = "http://k3d.invalid/k3d-linux-amd64"
    assert Machine().download(url, SHA256, told) == K3D
    assert server.seen == [url]


@pytest.fixture
def shipped(tmp_path: Path) -> Callable[..., tuple[int, dict[str, object]]]:
    """Runs the shipped program, whose directory on the host is one of the test's."""
    file = tmp_path / "hostctl"
    file.write_text(program.text().replace("/var/lib/homelab", str(tmp_path / "homelab")))

    def run(**spec: object) -> tuple[int, dict[str, object]]:
        ran = subprocess.run(
            [sys.executable, file, "install", "k3d"],
            input=json.dumps(spec),
            capture_output=True,
            text=True,
            check=False,
        )
        return ran.returncode, json.loads(ran.stdout)

    return run


def test_the_shipped_program_installs_and_finds_it(
    server: Server, shipped: Callable[..., tuple[int, dict[str, object]]], tmp_path: Path
) -> None:
    spec = {"version": "5.8.3", "sha256": SHA256, "url": server.url}
    code, result = shipped(**spec)
    assert (code, result["changed"]) == (0, True)
    installed = tmp_path / "homelab/bin/k3d"
    assert installed.read_bytes() == K3D
    assert installed.stat().st_mode & 0o777 == 0o755
    assert shipped(**spec)[1]["changed"] is False
    assert len(server.seen) == 1


@pytest.mark.parametrize("wrong", ["checksum", "cut off", "gone"])
def test_the_shipped_program_leaves_nothing_of_a_download_that_is_wrong(
    server: Server,
    shipped: Callable[..., tuple[int, dict[str, object]]],
    tmp_path: Path,
    wrong: str,
) -> None:
    sha256 = "0" * 64 if wrong == "checksum" else SHA256
    if wrong == "cut off":
        server.says += 1
    url = server.url.replace("k3d-linux", "other") if wrong == "gone" else server.url
    code, result = shipped(version="5.8.3", sha256=sha256, url=url)
    assert code == (3 if wrong == "checksum" else 5), result
    assert "nothing was installed" in json.dumps(result["error"])
    assert list(tmp_path.glob("homelab/**/*")) == []
