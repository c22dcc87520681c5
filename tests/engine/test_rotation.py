"""Rotations of docs/rotation.md that test_edits.py has not."""

import json
import subprocess

from rehearsal.run import Secret
from tests.engine.conftest import planned


def test_another_passphrase_of_the_stack_changes_nothing_and_the_old_one_opens_nothing(p510):
    rotate = ["pulumi", "stack", "change-secrets-provider", "passphrase", "--stack", p510.stack]
    old = p510.process_environment()
    subprocess.run(
        rotate,
        cwd=p510.directory / "project",
        env=old,
        input="made-up-new\nmade-up-new\n",
        text=True,
        capture_output=True,
        check=True,
    )
    refused = p510.preview(check=False)
    assert refused.code != 0
    assert "incorrect passphrase" in refused.stdout + refused.stderr
    p510.environment["PULUMI_CONFIG_PASSPHRASE"] = "made-up-new"
    assert planned(p510.preview()) == set()
    assert planned(p510.up()) == set()
    state = json.loads(p510.pulumi("stack", "export").stdout)
    assert state["deployment"]["secrets_providers"]["type"] == "passphrase"


def test_another_key_of_a_backups_target_is_one_file_of_the_host_and_shown_nowhere(p510):
    with p510.edited() as settings:
        settings["backups"]["targets"] = {
            "offsite": {
                "kind": "s3",
                "endpoint": "s3.example.org",
                "bucket": "backups",
                "accessKey": Secret("made-up-id"),
                "secretKey": Secret("made-up-old-key"),
                "password": Secret("made-up-restic-password"),
            }
        }
    first = p510.up()
    file = "/var/lib/homelab/backups/factory/offsite"
    assert "made-up-restic-password" in p510.host_file(f"{file}.password").read_text()
    with p510.edited() as settings:
        settings["backups"]["targets"]["offsite"]["secretKey"] = Secret("made-up-new-key")
    preview = p510.preview()
    assert planned(preview) == {"update Command offsite.credentials"}
    never = "the copy of keycloak at offsite was verified never, allowed are 10 days"
    assert any(never in text for text in preview.diagnostics)
    second = p510.up()
    assert (
        "aws_secret_access_key = made-up-new-key"
        in p510.host_file(f"{file}.credentials").read_text()
    )
    shown = "".join(run.stdout + run.stderr for run in (first, preview, second))
    state = p510.pulumi("stack", "export").stdout
    for secret in ("made-up-old-key", "made-up-new-key", "made-up-restic-password"):
        assert secret not in shown + state
    with p510.edited() as settings:
        settings["backups"]["targets"] = {}
    p510.up()
    assert not p510.host_file(f"{file}.password").exists()
