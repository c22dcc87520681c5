"""The units of a host: what is asked of hostctl, and what a person is told."""

import base64
import json
from typing import Any

import pulumi
import pytest

from components import settings
from components.host import Connection, Host
from components.units import LiveUnits, Units, UnitsArgs, units_spec

URL = "https://ntfy.example.org/a-topic-that-nobody-knows"
STACK: dict[str, Any] = {
    "host": {"hostctl": "/mnt/tank/hostctl", "init": "truenas"},
    "cluster": {"image": "rancher/k3s:v1.31.5-k3s1", "name": "lab", "apiWaitSeconds": 60},
    "cleaning": {"schedule": "never"},
    "backups": {
        "schedule": "Sun 04:30",
        "keep": 3,
        "items": {"notes": {"kind": "volume", "namespace": "default", "claim": "notes"}},
        "targets": {
            "offsite": {
                "kind": "s3",
                "endpoint": "s3.example.org",
                "bucket": "backups",
                "folder": "lab",
                "accessKey": "made-up-id",
                "secretKey": "made-up-key",
                "password": "made-up-password",
                "retention": {"last": 2},
            }
        },
        "verify": {"schedule": "Sun 05:00", "withinDays": 8, "directory": "/mnt/tank/restored"},
    },
    "watching": {
        "schedule": "hourly",
        "metrics": "/var/lib/node_exporter",
        "webhook": {"kind": "ntfy", "url": URL},
    },
    "cloudflare": {
        "accountId": "0" * 31 + "1",
        "apiToken": "a" * 40,
        "zones": {"example.org": "0" * 31 + "2"},
    },
    "tunnels": {
        "lab": {
            "secret": base64.b64encode(b"made up for this test, 32 bytes.").decode(),
            "connector": {"kind": "external"},
            "routes": [
                {"hostname": "web.example.org", "service": "http://localhost:80"},
                {"hostname": "ssh.example.org", "service": "ssh://localhost:22"},
            ],
        }
    },
}


def stack(**changes: Any) -> settings.Settings:
    return settings.Settings.model_validate(STACK | changes, by_alias=True, by_name=False)


def answer(args: Any) -> dict[str, Any]:
    return {"stdout": json.dumps({"ok": True, "units": ["homelab-lab.service"]})}


def test_every_setting_of_the_units_reaches_the_host():
    assert units_spec(stack()) == {
        "cluster": "lab",
        "hostctl": "/mnt/tank/hostctl",
        "init": "truenas",
        "storage_dir": "/mnt/img_pool/k3d/storage",
        "start_seconds": 960,
        "clean": None,
        "backup": "Sun 04:30",
        "keep": 3,
        "items": [
            {
                "name": "notes",
                "kind": "volume",
                "namespace": "default",
                "claim": "notes",
                "scale_down": None,
                "stale_after_hours": None,
            }
        ],
        "targets": [
            {
                "name": "offsite",
                "kind": "s3",
                "repository": "s3:https://s3.example.org/backups/lab",
                "region": None,
                "keep_last": 2,
                "keep_daily": 14,
                "keep_weekly": 8,
                "keep_monthly": 12,
            }
        ],
        "verify": "Sun 05:00",
        "verified_within_days": 8,
        "scratch": "/mnt/tank/restored",
        "watch": "hourly",
        "watching": {
            "cluster": "lab",
            "storage_dir": "/mnt/img_pool/k3d/storage",
            "api": None,
            "dns": {
                "name": "registry-1.docker.io",
                "image": "rancher/mirrored-library-busybox:1.36.1",
            },
            "argocd": False,
            "routes": ["web.example.org"],
            "metrics": "/var/lib/node_exporter",
            "webhook": "ntfy",
            "webhook_file": "/var/lib/homelab/watch/lab.webhook",
        },
    }


def test_the_webhooks_url_is_in_a_file_of_root_and_in_no_plain_input(run_program):
    def program() -> None:
        host = Host("p510", Connection(settings.Host()))
        Units("lab", UnitsArgs(stack(), LiveUnits("systemd", 4), host, []))

    resources = run_program(program, outputs={"Command": answer})
    command = resources["Command", "lab.webhook"]
    assert json.loads(command.inputs["stdin"]) == {
        "path": "/var/lib/homelab/watch/lab.webhook",
        "content": URL,
        "mode": "0600",
    }
    assert command.secrets == {"stdin"}
    assert command.inputs["delete"].endswith("hostctl files remove")
    # The first look finds it.
    assert ("Command", "lab.webhook") in resources["Command", "units"].depends_on
    others = [one.inputs for key, one in resources.items() if key != ("Command", "lab.webhook")]
    assert URL not in json.dumps(others)


def test_the_units_are_one_command_that_destroy_undoes(run_program):
    def program() -> None:
        host = Host("p510", Connection(settings.Host()))
        cluster = pulumi.ComponentResource("homelab:index:K3dCluster", "lab")
        host.command("cluster", ["k3d", "ensure"], {}, opts=pulumi.ResourceOptions(parent=cluster))
        Units("lab", UnitsArgs(stack(), LiveUnits("systemd", 4), host, [cluster]))

    resources = run_program(program, outputs={"Command": answer})
    command = resources["Command", "units"]
    assert command.parent == ("Units", "lab")
    assert command.inputs["create"].endswith("hostctl units install")
    assert command.inputs["delete"].endswith("hostctl units remove")
    assert json.loads(command.inputs["stdin"]) == {**units_spec(stack()), "generation": 4}
    # The start at boot is tried when all that it starts is there.
    assert ("Command", "cluster") in command.depends_on
    assert not command.protect
    assert resources["Units", "lab"].outputs == {"installed": ["homelab-lab.service"]}


def test_the_keys_of_a_target_reach_the_host_as_private_files_and_are_secret(run_program):
    def program() -> None:
        host = Host("p510", Connection(settings.Host()))
        Units("lab", UnitsArgs(stack(), LiveUnits("systemd", 4), host, []))

    resources = run_program(program, outputs={"Command": answer})
    units = resources["Command", "units"].inputs
    assert "made-up" not in json.dumps(units)
    for name, held in (("password", "made-up-password"), ("credentials", "made-up-key")):
        command = resources["Command", f"offsite.{name}"]
        assert command.inputs["delete"].endswith("hostctl files remove")
        assert command.inputs["logging"] == "none"
        assert held not in command.inputs["create"]
        spec = json.loads(command.inputs["stdin"])
        assert spec["path"] == f"/var/lib/homelab/backups/lab/offsite.{name}"
        assert spec["mode"] == "0600"
        assert held in spec["content"]
        assert "stdin" in command.secrets


def test_the_last_verified_restore_is_an_output():
    seen = {"at": "2026-11-21T03:00:00Z", "taken": "2026-11-21T00:00:01Z", "recovery_seconds": 7.5}
    live = LiveUnits("systemd", 0, verified={"offsite": {"notes": {**seen, "bytes": 1}}})
    assert live.output == {
        "offsite": {
            "notes": {"at": seen["at"], "taken": seen["taken"], "recoverySeconds": 7.5},
        }
    }


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        (
            {"failed": [{"unit": "x.service", "result": "timeout, Mon", "remedy": "journalctl"}]},
            "x.service on p510 has failed: timeout, Mon. Remedy: journalctl",
        ),
        ({"notes": ["import it"]}, "units on p510: import it"),
        ({"unseen": ["units: no answer"]}, "not seen on p510: units: no answer"),
    ],
)
def test_what_a_person_must_know_is_a_warning(run_program, caplog, seen, told):
    run_program(lambda: LiveUnits("systemd", 0, **seen).announce("p510"))
    assert [(r.levelname, r.message) for r in caplog.records if r.name == "pulumi"] == [
        ("WARNING", told)
    ]
