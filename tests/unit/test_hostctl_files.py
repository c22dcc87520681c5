"""Files with secrets that hostctl wrote go when nobody needs them any more."""

from pathlib import Path

import pytest

from hostctl.machine import Machine
from tests.unit.test_hostctl import KUBECONFIG, Host

TOKEN = {"path": "/var/lib/homelab/tunnels/p510.token", "content": "made up"}


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    return host


def test_a_written_file_is_removed_by_the_spec_that_wrote_it(live: Host) -> None:
    live("files write", TOKEN)
    assert live("files remove", TOKEN)["removed"] is True
    assert not live.machine.exists(TOKEN["path"])
    assert live("files remove", TOKEN)["removed"] is False


def test_the_kubeconfig_goes_with_its_cluster_and_stays_while_that_is_unconfirmed(
    live: Host,
) -> None:
    live("k3d delete", {"name": "factory"}, code=3)
    assert live.machine.exists(KUBECONFIG["path"])
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    assert not live.machine.exists(KUBECONFIG["path"])


def test_the_kubeconfig_of_a_cluster_that_is_gone_goes_too(live: Host) -> None:
    """As after a delete that was cut off between the two."""
    live.machine.world.delete("clusters/factory")
    assert live("k3d delete", {"name": "factory", "confirm": "factory"})["deleted"] is False
    assert not live.machine.exists(KUBECONFIG["path"])


def test_a_kubeconfig_of_another_cluster_in_its_place_stays(live: Host) -> None:
    live.machine.write_atomic(KUBECONFIG["path"], b"somebody else's", 0o600)
    live("k3d delete", {"name": "factory", "confirm": "factory"})
    assert live.machine.read(KUBECONFIG["path"]) == b"somebody else's"


def test_a_kubeconfig_that_moves_leaves_none_behind(live: Host) -> None:
    moved = KUBECONFIG | {"path": "/root/.kube/factory"}
    live("kubeconfig", moved)
    assert live.machine.exists(moved["path"])
    assert not live.machine.exists(KUBECONFIG["path"])
    live("kubeconfig", moved)
    assert live.machine.exists(moved["path"])


def test_a_rotated_kubeconfig_is_told_before_it_is_written(live: Host) -> None:
    spec = {"name": "factory", "server": KUBECONFIG["server"]}
    written = live.machine.read(KUBECONFIG["path"]).decode()
    assert live.inspect()["kubeconfig_behind"] is False
    assert live("k3d kubeconfig", spec)["kubeconfig"] == written
    live.edit(lambda cluster: cluster.update(certificate="cm90YXRlZA=="))
    seen = live.inspect()
    assert seen["kubeconfig_behind"] is True
    assert "cm90YXRlZA==" not in str(seen)
    told = live("k3d kubeconfig", spec)["kubeconfig"]
    assert live.machine.read(KUBECONFIG["path"]).decode() == written
    live.up()
    assert live.machine.read(KUBECONFIG["path"]).decode() == told
    assert live.inspect()["kubeconfig_behind"] is False


def test_a_rotated_kubeconfig_that_is_written_by_hand_reaches_the_stack_too(live: Host) -> None:
    before = live.inspect()["certificate_generation"]
    live("kubeconfig factory")
    assert live.inspect()["certificate_generation"] == before
    live.edit(lambda cluster: cluster.update(certificate="cm90YXRlZA=="))
    live("kubeconfig factory")
    assert live.inspect()["certificate_generation"] == before + 1
    live("kubeconfig factory")
    live.up()
    assert live.inspect()["certificate_generation"] == before + 1


def test_the_kubeconfig_of_a_cluster_that_somebody_made_anew_is_not_behind(live: Host) -> None:
    """Another cluster is no rotation: what lived in the old one is gone."""
    live.edit(lambda cluster: cluster.update(ca="YW5vdGhlcg=="))
    assert live.inspect()["kubeconfig_behind"] is False


def test_a_real_machine_removes_a_file_and_says_whether_there_was_one(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("made up")
    assert Machine().remove(str(file)) is True
    assert not file.exists()
    assert Machine().remove(str(file)) is False
    with pytest.raises(IsADirectoryError):
        Machine().remove(str(tmp_path))
