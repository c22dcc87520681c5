"""Images from files, on the make-believe machine."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from hostctl.machine import Machine
from tests.unit.test_hostctl import SPEC, Host

ARCHIVE = "/var/lib/homelab/images/airgap.tar"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up(agents=1)
    host.machine.make_directory("/var/lib/homelab/images", 0o755)
    host.machine.write_atomic(ARCHIVE, b"layers", 0o644)
    return host


def imported(host: Host) -> list[dict[str, str]]:
    files = host("images digest", {"files": [ARCHIVE]})["files"]
    return host("images import", {"cluster": "factory", "files": files})["imported"]


def test_an_archive_is_imported_once_into_each_node(host: Host) -> None:
    nodes = ["k3d-factory-server-0", "k3d-factory-agent-0"]
    assert [one["node"] for one in imported(host)] == nodes
    digest = hashlib.sha256(b"layers").hexdigest()
    servers_and_agents = [node for node in host.cluster["nodes"] if node["role"] != "loadbalancer"]
    assert [node["images"] for node in servers_and_agents] == [[digest], [digest]]
    assert imported(host) == []
    assert not any("ctr" in call for call in host.calls)


def test_another_file_is_imported_again(host: Host) -> None:
    imported(host)
    host.machine.write_atomic(ARCHIVE, b"other layers", 0o644)
    assert len(imported(host)) == 2


@pytest.mark.parametrize("change", [{"image": "rancher/k3s:v1.32.0-k3s1"}, {"recreate": "factory"}])
def test_a_node_that_was_made_anew_gets_them_again(tmp_path: Path, change: dict[str, Any]) -> None:
    host = Host(tmp_path)
    host.up()
    host.machine.write_atomic("/images.tar", b"layers", 0o644)
    file = {"path": "/images.tar", "sha256": hashlib.sha256(b"layers").hexdigest()}
    spec = {"cluster": "factory", "files": [file]}
    assert len(host("images import", spec)["imported"]) == 1
    host("k3d ensure", SPEC | change | ({} if "image" in change else {"disable": []}))
    assert len(host("images import", spec)["imported"]) == 1
    assert host("images import", spec)["imported"] == []


def test_a_file_that_is_missing_or_changed_since_the_preview_is_refused(host: Host) -> None:
    error = host("images digest", {"files": ["/absent.tar"]}, code=3)
    assert "cluster.imageFiles" in error["remedy"]
    spec = {"cluster": "factory", "files": [{"path": ARCHIVE, "sha256": "0" * 64}]}
    error = host("images import", spec, code=3)
    assert "another file than the preview saw" in error["cause"]


def test_real_machine_feeds_a_file_of_any_size(tmp_path: Path) -> None:
    file = tmp_path / "large"
    with file.open("wb") as sink:
        sink.truncate(64 * 1024 * 1024)
    ran = Machine().run(["wc", "--bytes"], from_file=str(file))
    assert ran.text.strip() == str(64 * 1024 * 1024)
