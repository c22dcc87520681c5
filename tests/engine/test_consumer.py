"""examples/consumer: another project that deploys into p510's cluster, knowing only its outputs."""

import base64
import json
from pathlib import Path

import pytest
import yaml

from rehearsal.run import CHECKOUT, Rehearsal
from tests.engine.conftest import edited_file, errors, planned

pytestmark = pytest.mark.engine

PROGRAM = CHECKOUT / "examples" / "consumer"

EXPORTER = """
import json, pulumi
for name, value in json.loads(pulumi.Config().require("outputs")).items():
    pulumi.export(name, value)
"""


def beside(platform: Rehearsal, directory: Path, **environment: str) -> Rehearsal:
    """The consumer as a stack in the backend and the world of another."""
    environment |= {
        "PULUMI_BACKEND_URL": platform.process_environment()["PULUMI_BACKEND_URL"],
        "HOMELAB_REHEARSAL": str(platform.directory),
    }
    return Rehearsal(directory, "dev", config={}, program=PROGRAM, environment=environment)


@pytest.fixture
def consumer(p510, tmp_path):
    consumer = beside(p510, tmp_path / "consumer")
    consumer.up()
    return consumer


def test_the_consumer_deploys_what_the_platform_exports_into_its_cluster(p510, consumer):
    outputs = p510.outputs()
    held = json.loads((p510.objects / "consumer" / "ConfigMap" / "platform.json").read_text())[
        "data"
    ]
    assert held["cluster"] == outputs["cluster"]["name"]
    assert held["storageClass"] == outputs["cluster"]["storageClass"]
    assert json.loads(held["urls"]) == outputs["urls"]
    assert consumer.outputs() == {"cluster": "factory", "urls": outputs["urls"]}
    assert planned(consumer.up()) == set()

    key = yaml.safe_load(outputs["kubeconfig"])["users"][0]["user"]["client-key-data"]
    assert key in consumer.pulumi("stack", "export", "--show-secrets").stdout
    for path in (consumer.directory / "events", p510.directory / "state"):
        assert not [file for file in path.rglob("*.json*") if key in file.read_text()]


def test_a_rotated_certificate_of_the_platform_replaces_nothing_of_the_consumer(p510, consumer):
    with edited_file(p510.cluster_file) as cluster:
        cluster["certificate"] = base64.b64encode(b"another certificate").decode()
        cluster["key"] = base64.b64encode(b"another key").decode()
    before = p510.outputs()["kubeconfig"]
    p510.up()
    assert p510.outputs()["kubeconfig"] != before

    assert planned(consumer.preview()) == {"update kubernetes cluster"}
    assert planned(consumer.up()) == {"update kubernetes cluster"}
    assert planned(consumer.up()) == set()


@pytest.mark.parametrize(
    ("stack", "outputs", "error"),
    [
        ("absent", None, 'unknown stack "organization/homelab/absent"'),
        ("new", {}, "stack organization/homelab/new exports no version"),
        (
            "newer",
            {"version": 2, "cluster": {}, "kubeconfig": "x"},
            "stack organization/homelab/newer exports outputs of contract version 2; this program"
            " reads version 1",
        ),
        (
            "partial",
            {
                "version": 1,
                "cluster": {"identity": "x", "name": "x", "storageClass": "local-path"},
                "urls": {},
            },
            "stack organization/homelab/partial exports no kubeconfig",
        ),
    ],
)
def test_a_platform_that_cannot_be_read_fails_the_consumer_by_name(tmp_path, stack, outputs, error):
    program = tmp_path / "program"
    program.mkdir()
    (program / "Pulumi.yaml").write_text("name: homelab\nruntime: python\n")
    (program / "__main__.py").write_text(EXPORTER)
    config = {"outputs": json.dumps(outputs)}
    platform = Rehearsal(tmp_path / "platform", stack, config=config, program=program)
    if outputs is None:
        platform.pulumi("stack", "rm", "--yes", "--preserve-config")
    else:
        platform.up()
    consumer = beside(platform, tmp_path / "consumer")
    consumer.set_config({"platform": f"organization/homelab/{stack}"})
    run = consumer.preview(check=False)
    assert run.code != 0
    assert error in errors(run)[0]
    assert "Traceback" not in run.stdout + run.stderr


def test_another_passphrase_is_an_error_and_never_the_ambient_cluster(p510, tmp_path):
    stranger = beside(p510, tmp_path / "consumer", PULUMI_CONFIG_PASSPHRASE="another")
    (error,) = errors(stranger.preview(check=False))
    assert "the kubeconfig of stack organization/homelab/p510 cannot be decrypted" in error
