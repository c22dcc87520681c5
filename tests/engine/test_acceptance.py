"""The acceptance of p510's cluster under the real engine: after every change of it, never without.

What did not pass is a warning, an output and something left to do; what is required is an error.
"""

import json

import pytest

from rehearsal.machine import made_up_certificate
from tests.engine.conftest import P510, errors, planned

pytestmark = pytest.mark.engine

NODE = "k3d-factory-server-0"
SAID = "a pod does not resolve registry-1.docker.io: ;; connection timed out"


def lookup(p510: P510, fate: str) -> None:
    """What becomes of the pods that ask for a name from now on."""
    (p510.world / "machine" / "pods.json").write_text(json.dumps({"lookup": fate}))


def acceptance(p510: P510) -> str:
    return p510.outputs()["acceptance"]["state"]


def test_incident_05_pods_that_do_not_resolve_are_a_warning_until_they_do(p510):
    p510.on_host("docker", "stop", "-t", "60", NODE)
    lookup(p510, "fails")
    up = p510.up()
    assert planned(up) == {"update Command cluster", "update Command acceptance"}
    assert SAID in up.stdout
    assert "homelab:cluster.resolvers" in up.stdout
    assert acceptance(p510) == "failed"

    preview = p510.preview()
    assert f"not accepted when it was last changed: {SAID}" in preview.stdout
    assert planned(preview) == {"update Command acceptance"}

    lookup(p510, "resolves")
    up = p510.up()
    assert planned(up) == {"update Command acceptance"}
    assert acceptance(p510) == "passed"
    for preview in (p510.preview(), p510.preview("--refresh")):
        assert planned(preview) == set()
        assert "not accepted" not in preview.stdout


def test_required_acceptance_that_is_not_passed_fails_the_up(p510):
    with p510.edited() as settings:
        settings["cluster"]["acceptance"] = {"required": True}
    assert planned(p510.preview()) == {"update Command acceptance"}
    lookup(p510, "no-image")
    up = p510.up(check=False)
    assert up.code != 0
    assert any("ImagePullBackOff" in error for error in errors(up))
    assert acceptance(p510) == "passed", "the last one that stands"
    lookup(p510, "resolves")
    assert planned(p510.up()) == {"update Command acceptance"}
    assert planned(p510.preview()) == set()


def test_an_old_certificate_is_a_warning_and_nothing_to_do(p510):
    cluster = json.loads(p510.cluster_file.read_text())
    ended = made_up_certificate("0123456789abcdef" * 4, "20200101000000Z", "20210101000000Z")
    p510.cluster_file.write_text(json.dumps({**cluster, "serving": ended}))
    preview = p510.preview()
    assert "the serving certificate of cluster factory ended on 2021-01-01" in preview.stdout
    assert "hostctl k3d stop factory; hostctl k3d start factory" in preview.stdout
    assert planned(preview) == set()


def test_k3d_that_is_missing_is_a_warning_unless_up_installs_it(tmp_path):
    p510 = P510(tmp_path / "p510")
    (p510.world / "machine").mkdir(parents=True, exist_ok=True)
    (p510.world / "machine" / "missing-tools.json").write_text('["k3d"]')
    assert "k3d is not on PATH" in p510.preview().stdout
    with p510.edited() as settings:
        settings["host"] = {"k3d": {"install": True}}
    preview = p510.preview()
    assert "k3d is not on PATH" not in preview.stdout
    assert "create Command k3d" in planned(preview)
    p510.up()
    assert planned(p510.preview()) == set()
