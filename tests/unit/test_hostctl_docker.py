"""What hostctl asks Docker's daemon at its socket, and when it asks Docker's client instead."""

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostctl.cluster import find_network, node_containers
from hostctl.machine import Machine, Ran
from hostctl.protocol import Failure

NODE = {"Id": "a1", "Names": ["/k3d-factory-server-0"], "Labels": {"k3d.cluster": "factory"}}
NAMED = {"Id": "b2", "Names": ["/k3d-factory-tools"], "Labels": None}
OTHER = {"Id": "c3", "Names": ["/k3d-other-server-0"], "Labels": {"k3d.cluster": "other"}}


class Daemon(socketserver.ThreadingUnixStreamServer):
    """Answers GETs of Docker's API with what `answers` has: a status and a body by path."""

    daemon_threads = True

    def __init__(self, path: Path) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.cut_off = 0
        super().__init__(str(path), _Request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may hang up in the middle."""


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Daemon)
        status, body = self.server.answers.get(self.path, (404, {"message": "No such thing"}))
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) - self.server.cut_off])

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Host(Machine):
    """A machine on which Docker's client says that it cannot reach its daemon."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[list[str]] = []

    def run(self, argv: Any, **_: Any) -> Ran:
        self.ran.append(list(argv))
        return Ran(1, b"", b"Cannot connect to the Docker daemon at unix:///x. Is it running?")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with Daemon(tmp_path / "docker.sock") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_nodes_of_a_cluster_are_had_from_the_daemon_alone(daemon: Daemon) -> None:
    daemon.answers["/containers/json?all=true"] = 200, [NODE, NAMED, OTHER]
    for one in ("a1", "b2", "c3"):
        daemon.answers[f"/containers/{one}/json"] = 200, {"Id": one}
    daemon.answers["/networks/k3d-factory"] = 200, {"Name": "k3d-factory"}
    host = Host()
    assert node_containers(host, "factory") == [{"Id": "a1"}, {"Id": "b2"}]
    assert node_containers(host, "neither") == []
    assert find_network(host, "k3d-factory") == {"Name": "k3d-factory"}
    assert host.ran == []


@pytest.mark.parametrize(
    "answer", [(404, {"message": "No such container"}), (500, {}), (200, b'{"cut'), (200, b"")]
)
def test_what_the_daemon_does_not_answer_plainly_the_client_is_asked(
    daemon: Daemon, answer: tuple[int, Any]
) -> None:
    daemon.answers["/containers/json?all=true"] = 200, [NODE]
    daemon.answers["/containers/a1/json"] = answer
    daemon.answers["/networks/k3d-factory"] = answer
    host = Host()
    for look in (
        lambda: node_containers(host, "factory"),
        lambda: find_network(host, "k3d-factory"),
    ):
        with pytest.raises(Failure, match="Cannot connect"):
            look()
    assert [argv[:2] for argv in host.ran] == [["docker", "ps"], ["docker", "network"]]


def test_a_daemon_that_is_not_there_is_the_clients_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    with pytest.raises(Failure, match="Cannot connect"):
        node_containers(Host(), "factory")


@pytest.mark.parametrize(
    ("environment", "config"),
    [
        ({"DOCKER_HOST": "tcp://192.0.2.1:2375"}, None),
        ({"DOCKER_HOST": "ssh://nas"}, None),
        ({"DOCKER_CONTEXT": "nas"}, None),
        ({}, {"currentContext": "rootless"}),
        ({}, ["no object"]),
    ],
)
def test_another_daemon_of_the_clients_is_left_to_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    config: Any,
) -> None:
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("hostctl.machine._at_socket", pytest.fail)
    assert Machine().ask_docker("/version") is None


def test_an_answer_that_was_cut_off_is_none(daemon: Daemon) -> None:
    # What is left of it would be JSON, too.
    daemon.answers["/networks/k3d-factory"] = 200, b'{"Name": "k3d-factory"} '
    assert Host().ask_docker("/networks/k3d-factory")
    daemon.cut_off = 1
    assert Host().ask_docker("/networks/k3d-factory") is None
