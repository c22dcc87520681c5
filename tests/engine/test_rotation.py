"""Rotations of docs/rotation.md that test_edits.py has not."""

import base64
import json
import subprocess

from hostctl.postgres import scram_verifier
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


def test_another_password_of_a_database_reaches_the_role_then_its_secret_then_who_uses_it(p510):
    workload, old, new = "factory/statefulset/skillai-db", "made-up-old-word", "made-up-new-word"
    p510.host.set("databases.json", {workload: {}})
    p510.host.set("roles.json", {workload: {"skillai": "as the image made it"}})
    with p510.edited() as settings:
        settings["secrets"]["factory"]["skillai-db"] = {
            "data": {"password": Secret(old)},
            "postgres": {"workload": "statefulset/skillai-db", "role": "skillai"},
        }
    first = p510.up()
    assert p510.host.setting("roles.json", {})[workload]["skillai"] == "as the image made it"

    def password() -> str:
        secret = json.loads((p510.objects / "factory/Secret/skillai-db.json").read_text())
        return base64.b64decode(secret["data"]["password"]).decode()

    with p510.edited() as settings:
        settings["secrets"]["factory"]["skillai-db"]["data"]["password"] = Secret(new)
    preview = p510.preview()
    assert planned(preview) == {
        "update Command password factory/skillai-db",
        "update Secret factory/skillai-db",
        "update Command rollout factory",
    }
    # A database that cannot be told leaves all with the old password.
    p510.host.set("roles.json", {workload: {}})
    failed = p510.up(check=False)
    assert failed.code != 0
    assert password() == old

    p510.host.set("roles.json", {workload: {"skillai": "as the image made it"}})
    second = p510.up()
    verifier = p510.host.setting("roles.json", {})[workload]["skillai"]
    salt = base64.b64decode(verifier.split(":")[1].split("$")[0])
    assert verifier == scram_verifier(new, salt)
    assert password() == new
    assert planned(p510.preview()) == set()
    shown = "".join(run.stdout + run.stderr for run in (first, preview, failed, second))
    state = p510.pulumi("stack", "export").stdout
    for secret in (old, new, verifier):
        assert secret not in shown + state
