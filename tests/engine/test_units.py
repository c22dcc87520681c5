"""What the host runs without Pulumi: previews tell how it went, up puts it right, destroy takes it
away.
"""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.conftest import P510, planned

pytestmark = pytest.mark.engine

BOOT = "homelab-factory.service"
UNITS = "/etc/systemd/system"


@contextlib.contextmanager
def systemd(p510: P510) -> Iterator[dict[str, Any]]:
    """What systemd knows of its units, to be changed within."""
    file = p510.world / "machine" / "systemd.json"
    units = json.loads(file.read_text())
    yield units
    file.write_text(json.dumps(units))


def test_a_failed_boot_is_a_warning_with_its_remedy_in_each_preview_until_it_is_mended(p510):
    """Incidents 2 and 17: nobody reads the log of a unit."""
    with systemd(p510) as units:
        units[BOOT] |= {"ActiveState": "failed", "Result": "timeout"}
    for run in (p510.preview(), p510.up(), p510.preview()):
        assert f"warning: {BOOT} on this machine has failed: timeout" in run.stdout
        assert f"Remedy: journalctl --unit {BOOT}; when mended: systemctl restart" in run.stdout
        assert planned(run) == set()
    p510.on_host("systemctl", "reset-failed", BOOT)
    p510.on_host("systemctl", "restart", BOOT)
    assert "has failed" not in p510.preview().stdout


def test_a_failed_backup_is_a_warning_too(p510):
    unit = "homelab-factory-backup.service"
    with systemd(p510) as units:
        units[unit] |= {"ActiveState": "failed", "Result": "exit-code"}
    assert f"warning: {unit} on this machine has failed: exit-code" in p510.preview().stdout


def test_a_timer_that_someone_removed_comes_back_and_then_nothing_is_left_to_do(p510):
    timer = p510.host_file(f"{UNITS}/homelab-factory-clean.timer")
    content = timer.read_text()
    timer.unlink()
    assert planned(p510.preview()) == {"update Command units"}
    assert planned(p510.up()) == {"update Command units"}
    assert timer.read_text() == content
    assert planned(p510.preview()) == set()


def test_another_schedule_or_item_updates_the_units_alone(p510):
    with p510.edited() as settings:
        settings["cleaning"] = {"schedule": "never"}
        settings["backups"]["items"]["skillai"]["staleAfterHours"] = 48
    assert planned(p510.preview()) == {"update Command units"}
    p510.up()
    assert not p510.host_file(f"{UNITS}/homelab-factory-clean.timer").exists()
    assert p510.host_file(f"{UNITS}/homelab-factory-backup.timer").exists()
    assert planned(p510.preview()) == set()


def test_a_host_whose_systemd_does_not_answer_says_so_and_plans_nothing(p510):
    (p510.world / "machine" / "missing-tools.json").write_text('["systemctl"]')
    preview = p510.preview()
    assert "not seen on this machine: units: asking systemd" in preview.stdout
    assert planned(preview) == set()


def test_on_nixos_the_preview_names_what_is_to_be_imported(tmp_path):
    p510 = P510(tmp_path / "p510")
    (p510.world / "machine").mkdir(parents=True, exist_ok=True)
    (p510.world / "machine" / "init.json").write_text('"nixos"')
    p510.up()
    module = "/var/lib/homelab/nixos/factory.nix"
    assert p510.host_file(module).exists()
    preview = p510.preview()
    assert f"import {module} in the host's NixOS configuration" in preview.stdout
    assert planned(preview) == set()
