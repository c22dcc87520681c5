"""The units of a host: what is asked of hostctl, and what a person is told."""

import json
from typing import Any

import pulumi
import pytest

from components import settings
from components.host import Connection, Host
from components.units import LiveUnits, Units, UnitsArgs, units_spec

STACK: dict[str, Any] = {
    "host": {"hostctl": "/mnt/tank/hostctl", "init": "truenas"},
    "cluster": {"image": "rancher/k3s:v1.31.5-k3s1", "name": "lab", "apiWaitSeconds": 60},
    "cleaning": {"schedule": "never"},
    "backups": {
        "schedule": "Sun 04:30",
        "keep": 3,
        "items": {"notes": {"kind": "volume", "namespace": "default", "claim": "notes"}},
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
    }


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
