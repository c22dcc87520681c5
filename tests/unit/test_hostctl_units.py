"""hostctl units, on the make-believe machine: what each kind of init is given, and what is told of
how it went. The unit files are verified by systemd's own program where the machine has it.
"""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hostctl.cluster_backup import utc
from hostctl.machine import Ran
from hostctl.units import _calendar, _cron
from tests.unit.test_hostctl import SPEC, Host
from tests.unit.test_hostctl_backup import DATABASE

UNITS: dict[str, Any] = {
    "cluster": "factory",
    "hostctl": "/var/lib/homelab/hostctl",
    "init": "auto",
    "storage_dir": SPEC["storage_dir"],
    "start_seconds": 2700,
    "clean": "weekly",
    "backup": "03:30",
    "keep": 14,
    "items": [DATABASE],
}
WATCHING: dict[str, Any] = {
    "cluster": "factory",
    "storage_dir": SPEC["storage_dir"],
    "dns": {"name": "registry-1.docker.io", "image": "rancher/mirrored-library-busybox:1.36.1"},
}
BOOT = "homelab-factory.service"
ALL = [
    "homelab-factory-backup.service",
    "homelab-factory-backup.timer",
    "homelab-factory-clean.service",
    "homelab-factory-clean.timer",
    BOOT,
]
SYSTEMD = "/etc/systemd/system"


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    install_hostctl(host, UNITS["hostctl"])
    return host


def install_hostctl(host: Host, path: str) -> None:
    host.machine.make_directory(path.rpartition("/")[0], 0o755)
    host.machine.write_atomic(path, b"#!/usr/bin/env python3\n", 0o755)


def up(host: Host, **changes: Any) -> Any:
    """What `pulumi up` does: the generation that status says goes into install."""
    spec = UNITS | changes
    generation = host("units status", spec)["generation"]
    return host("units install", spec | {"generation": generation})


def status(host: Host, **changes: Any) -> Any:
    return host("units status", UNITS | changes)


def text(host: Host, unit: str) -> str:
    return host.machine.read(f"{SYSTEMD}/{unit}").decode()


def told(host: Host, unit: str, **facts: str) -> None:
    """Changes what systemd knows of a unit."""
    units = host.machine.setting("systemd.json", {})
    units[unit] |= facts
    host.machine.set("systemd.json", units)


def states(seen: Any) -> dict[str, str]:
    return {name: unit["installed"] for name, unit in seen["units"].items()}


TARGET = {"name": "nas", "kind": "directory", "repository": "/mnt/nas/restic", "keep_daily": 7}
COPIES: dict[str, Any] = {"targets": [TARGET], "verify": "Sun 05:00", "verified_within_days": 8}


def test_copies_are_verified_on_a_schedule_and_a_preview_says_when_they_were_not(
    live: Host,
) -> None:
    up(live, **COPIES)
    assert "ExecStart=/var/lib/homelab/hostctl backup verify factory" in text(
        live, "homelab-factory-verify.service"
    )
    assert "OnCalendar=Sun *-*-* 05:00:00" in text(live, "homelab-factory-verify.timer")
    never = "the copy of skillai at nas was verified never, allowed are 8 days"
    assert status(live, **COPIES)["notes"] == [f"{never}: hostctl backup verify factory"]

    record = "/var/lib/homelab/clusters/factory.json"
    seen = {"at": utc(live.machine.now()), "taken": "2026-11-21T00:00:01Z", "recovery_seconds": 7}
    content = {**json.loads(live.machine.read(record)), "verified": {"nas": {"skillai": seen}}}
    live.machine.write_atomic(record, json.dumps(content).encode(), 0o644)
    seen_now = status(live, **COPIES)
    assert (seen_now["notes"], seen_now["verified"]) == ([], {"nas": {"skillai": seen}})
    live.machine.sleep(9 * 86400)
    (note,) = status(live, **COPIES)["notes"]
    assert "the copy of skillai at nas was verified 9 days ago, allowed are 8 days" in note

    up(live)
    assert not live.machine.exists(f"{SYSTEMD}/homelab-factory-verify.timer")


# systemd


def test_systemd_gets_plain_units_enabled_and_then_nothing_is_left_to_do(live: Host) -> None:
    before = status(live)
    assert states(before) == dict.fromkeys(ALL, "absent")
    assert up(live) == {"hostctl": "1.0.0", "ok": True, "init": "systemd", "units": ALL} | {
        "paste": None
    }
    after = status(live)
    assert states(after) == dict.fromkeys(ALL, "current")
    assert (after["generation"], after["failed"], after["unseen"]) == (before["generation"], [], [])
    known = live.machine.setting("systemd.json", {})
    assert {name for name in ALL if known[name]["UnitFileState"] == "enabled"} == {
        BOOT,
        "homelab-factory-backup.timer",
        "homelab-factory-clean.timer",
    }
    live("units install", UNITS | {"generation": after["generation"]})
    assert ["systemctl", "daemon-reload"] not in live.calls


def test_the_boot_unit_starts_what_is_there_and_never_makes_or_deletes(live: Host) -> None:
    up(live)
    starts = re.findall("^Exec.*=(.*)$", text(live, BOOT), re.M)
    assert starts == [
        "/var/lib/homelab/hostctl k3d start factory",
        "-/var/lib/homelab/hostctl backup recover factory",
    ]


def test_incident_02_the_tries_at_boot_are_bounded_within_one_interval(live: Host) -> None:
    up(live)
    facts = dict(re.findall(r"^(\w+)=(\d+)$", text(live, BOOT), re.M))
    tries, interval = int(facts["StartLimitBurst"]), int(facts["StartLimitIntervalSec"])
    one = int(facts["TimeoutStartSec"]) + int(facts["RestartSec"])
    assert tries * one < interval
    assert "Restart=on-failure\n" in text(live, BOOT)


def test_incident_01_a_docker_that_is_started_again_has_the_cluster_healed(live: Host) -> None:
    up(live)
    unit = text(live, BOOT)
    assert "PartOf=docker.service\n" in unit
    assert "WantedBy=multi-user.target docker.service\n" in unit
    assert f"RequiresMountsFor={SPEC['storage_dir']}\n" in unit


def test_the_start_at_boot_is_tried_when_it_is_installed(live: Host) -> None:
    live("k3d stop factory")
    up(live)
    assert live.cluster["state"] == "running"
    assert live.machine.setting("systemd.json", {})[BOOT]["ActiveState"] == "active"


def test_a_start_that_fails_when_it_is_tried_fails_the_install(live: Host) -> None:
    live.machine.remove(UNITS["hostctl"])
    error = live("units install", UNITS, code=5)
    assert error["step"] == f"starting {BOOT}"
    assert f"journalctl --unit {BOOT}" in error["remedy"]


@pytest.mark.parametrize(
    ("unit", "facts"),
    [
        (BOOT, {"ActiveState": "failed", "Result": "timeout"}),
        (
            "homelab-factory-backup.service",
            {"ActiveState": "activating", "SubState": "auto-restart", "Result": "exit-code"},
        ),
    ],
)
def test_incident_02_a_failure_stays_visible_with_its_remedy(
    live: Host, unit: str, facts: dict[str, str]
) -> None:
    up(live)
    generation = status(live)["generation"]
    told(live, unit, **facts, ExecMainExitTimestamp="Mon 2026-11-23 00:01:02 UTC")
    seen = status(live)
    (failed,) = seen["failed"]
    assert failed["unit"] == unit
    assert failed["result"] == f"{facts['Result']}, Mon 2026-11-23 00:01:02 UTC"
    assert failed["remedy"].startswith(f"journalctl --unit {unit}")
    # A failure is for a person to look at; no up makes it vanish.
    assert seen["generation"] == generation


@pytest.mark.parametrize(
    "spoil",
    [
        lambda host: host.machine.remove(f"{SYSTEMD}/homelab-factory-clean.timer"),
        lambda host: host.machine.write_atomic(f"{SYSTEMD}/{BOOT}", b"edited", 0o644),
        lambda host: told(host, "homelab-factory-backup.timer", ActiveState="inactive"),
        lambda host: told(host, BOOT, UnitFileState="disabled"),
        lambda host: host.machine.remove("/var/lib/homelab/clusters/factory.json"),
    ],
    ids=["removed", "edited", "timer stopped", "disabled", "record lost"],
)
def test_what_someone_changed_is_seen_healed_once_and_then_stands_still(
    live: Host, spoil: Any
) -> None:
    up(live)
    before = status(live)["generation"]
    spoil(live)
    seen = status(live)
    assert seen["generation"] == before + 1 or not live.machine.exists(
        "/var/lib/homelab/clusters/factory.json"
    )
    live("units install", UNITS | {"generation": seen["generation"]})
    after = status(live)
    assert states(after) == dict.fromkeys(ALL, "current")
    assert after["generation"] == seen["generation"]


def test_a_schedule_that_is_turned_off_takes_its_units_along(live: Host) -> None:
    up(live)
    up(live, clean=None)
    assert live.machine.names(SYSTEMD) == [name for name in ALL if "clean" not in name]
    disabled = [call for call in live.calls if call[:2] == ["systemctl", "disable"]]
    assert disabled == [["systemctl", "disable", "--now", "homelab-factory-clean.timer"]]
    after = status(live, clean=None)
    assert (states(after), after["failed"]) == (
        {name: "current" for name in ALL if "clean" not in name},
        [],
    )


def test_a_unit_that_is_declared_no_more_and_came_back_is_removed_again(live: Host) -> None:
    up(live, clean=None)
    before = status(live, clean=None)["generation"]
    timer = f"{SYSTEMD}/homelab-factory-clean.timer"
    live.machine.write_atomic(timer, b"[Timer]\nOnCalendar=daily\n", 0o644)
    live.machine.run(["systemctl", "daemon-reload"])
    assert status(live, clean=None)["generation"] == before + 1
    up(live, clean=None)
    assert not live.machine.exists(timer)


def test_an_install_starts_a_unit_that_was_tried_too_often(live: Host) -> None:
    up(live)
    told(live, BOOT, ActiveState="failed", Result="start-limit-hit")
    live("units install factory")
    assert status(live)["failed"] == []


def test_without_items_there_is_no_backup_to_run(live: Host) -> None:
    assert up(live, items=[])["units"] == [name for name in ALL if "backup" not in name]


def test_remove_takes_all_of_this_cluster_and_nothing_else(live: Host) -> None:
    up(live)
    other = f"{SYSTEMD}/homelab-factory2.service"
    live.machine.write_atomic(other, b"[Unit]\n", 0o644)
    assert sorted(live("units remove", UNITS)["removed"]) == ALL
    assert live.machine.names(SYSTEMD) == ["homelab-factory2.service"]
    assert set(live.machine.setting("systemd.json", {})) == {"homelab-factory2.service"}
    assert live("units remove factory")["removed"] == []


def test_a_systemd_that_does_not_answer_is_not_seen_and_changes_nothing(live: Host) -> None:
    up(live)
    generation = status(live)["generation"]
    run = live.machine.run

    def silent(argv: Any, **options: Any) -> Ran:
        if argv[0] == "systemctl":
            return Ran(1, b"", b"Failed to connect to bus\n")
        return run(argv, **options)

    live.machine.run = silent  # type: ignore[method-assign]
    seen = status(live)
    assert seen["unseen"] == [
        "units: asking systemd: systemctl does not answer: Failed to connect to bus"
    ]
    assert seen["generation"] == generation


def test_looking_asks_systemd_once_and_changes_nothing(live: Host) -> None:
    up(live)
    status(live)
    assert [call[:2] for call in live.calls] == [["systemctl", "show"]]


def test_backup_run_by_name_takes_the_items_that_were_installed(live: Host) -> None:
    up(live)
    database = {"skillai": {"content": "rows", "rows": "1"}}
    live.machine.set("databases.json", {"factory/statefulset/skillai-db": database})
    assert list(live("backup run factory")["items"]) == ["skillai"]


def test_a_host_without_a_known_init_is_refused_with_the_way_out(live: Host) -> None:
    live.machine.set("init.json", "none")
    error = live("units status", UNITS, code=3)
    assert "homelab:host.init to none" in error["remedy"]
    assert up(live, init="none")["units"] == []
    assert status(live, init="none")["unseen"] == []


def test_a_change_to_none_removes_what_was_installed(live: Host) -> None:
    up(live)
    up(live, init="none")
    assert live.machine.names(SYSTEMD) == []


@pytest.mark.parametrize("path", ["/opt/my hostctl", "/opt/%h/hostctl", "/opt/../x", "/a;b", "x"])
def test_a_path_that_a_unit_would_read_otherwise_is_refused(live: Host, path: str) -> None:
    live("units install", UNITS | {"hostctl": path}, code=2)


# systemd's own word


@pytest.fixture
def analyze() -> str:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze (Debian: systemd) is not on PATH")
    return program


def test_systemd_takes_the_units_without_a_word(live: Host, analyze: str, tmp_path: Path) -> None:
    up(live)
    hostctl = tmp_path / "hostctl"
    hostctl.touch(0o755)
    units = tmp_path / "units"
    units.mkdir()
    # What the units name beside each other; the program must be executable for `verify`.
    for unit in ("docker.service", "network-online.target", "multi-user.target", "timers.target"):
        kind = "[Service]\nExecStart=/bin/true\n" if unit.endswith("service") else ""
        (units / unit).write_text(f"[Unit]\nDescription=a stand-in\n{kind}")
    for unit in ALL:
        (units / unit).write_text(text(live, unit).replace(UNITS["hostctl"], str(hostctl)))
    command = [analyze, "verify", "--man=no", "--recursive-errors=no"]
    ran = subprocess.run(
        [*command, *(str(units / unit) for unit in ALL)],
        env={"SYSTEMD_UNIT_PATH": f"{units}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in ran.stderr.splitlines() if "homelab-" in line]
    assert (ran.returncode, said) == (0, [])


@pytest.mark.parametrize(
    ("schedule", "normal", "cron"),
    [
        ("hourly", "*-*-* *:00:00", "0 * *"),
        ("daily", "*-*-* 00:00:00", "0 0 *"),
        ("weekly", "Mon *-*-* 00:00:00", "0 0 1"),
        ("03:05", "*-*-* 03:05:00", "5 3 *"),
        ("Sun 23:59", "Sun *-*-* 23:59:00", "59 23 7"),
    ],
)
def test_a_schedule_means_the_same_to_systemd_and_to_cron(
    schedule: str, normal: str, cron: str, analyze: str
) -> None:
    ran = subprocess.run(
        [analyze, "calendar", _calendar(schedule)], capture_output=True, text=True, check=True
    )
    assert f"Normalized form: {normal}\n" in ran.stdout
    entry = _cron(schedule)
    assert f"{entry['minute']} {entry['hour']} {entry['dow']}" == cron


# NixOS


@pytest.fixture
def nixos(live: Host) -> Host:
    live.machine.set("init.json", "nixos")
    return live


def test_nixos_gets_a_module_to_paste_and_is_warned_until_it_is_active(nixos: Host) -> None:
    installed = up(nixos)
    path = "/var/lib/homelab/nixos/factory.nix"
    assert installed["paste"] == f"imports = [ {path} ];"
    assert nixos.machine.names(SYSTEMD) == []
    seen = status(nixos)
    assert len(seen["notes"]) == 1
    assert f"import {path}" in seen["notes"][0]
    # No up can heal it, so none is asked for.
    assert seen["generation"] == 1
    assert nixos("units status", UNITS)["generation"] == 1

    nixos.machine.make_directory(SYSTEMD, 0o755)
    for unit, content in activated(nixos.machine.read(path).decode()).items():
        nixos.machine.write_atomic(f"{SYSTEMD}/{unit}", content.encode(), 0o644)
    nixos.machine.run(["systemctl", "daemon-reload"])
    nixos.machine.run(["systemctl", "enable", BOOT])
    nixos.machine.run(["systemctl", "restart", *(name for name in ALL if "timer" in name)])
    for unit in ALL:
        told(nixos, unit, UnitFileState="linked")
    assert status(nixos)["notes"] == []
    assert states(status(nixos)) == dict.fromkeys(ALL, "current")


def activated(module: str) -> dict[str, str]:
    """The units that NixOS makes of the module: indented strings lose the least indentation."""
    found = {}
    for unit, wanted, lines in re.findall(
        r'  systemd\.units\."([^"]+)" = \{\n'
        r"    wantedBy = \[ (.*?)\];\n    text = ''\n(.*?)    '';\n  \};\n",
        module,
        re.S,
    ):
        content = re.sub(r"^ {6}", "", lines, flags=re.M)
        found[unit] = content
        listed = re.search(r"^WantedBy=(.*)$", content, re.M)
        assert wanted.replace('"', "").split() == (listed.group(1).split() if listed else [])
    assert sorted(found) == ALL
    # Nothing that Nix would read as an escape or expand.
    assert not any(bad in content for content in found.values() for bad in ("''", "${"))
    return found


def test_a_module_that_someone_edited_is_written_again(nixos: Host) -> None:
    up(nixos)
    nixos.machine.write_atomic("/var/lib/homelab/nixos/factory.nix", b"edited", 0o644)
    assert status(nixos)["generation"] == 2
    up(nixos)
    assert status(nixos)["generation"] == 2


def test_a_failed_unit_of_nixos_is_told_too(nixos: Host) -> None:
    up(nixos)
    nixos.machine.set("systemd.json", {BOOT: {"ActiveState": "failed", "Result": "exit-code"}})
    assert [one["unit"] for one in status(nixos)["failed"]] == [BOOT]


def test_nixos_forgets_the_module_when_it_is_removed(nixos: Host) -> None:
    up(nixos)
    assert nixos("units remove factory")["removed"] == ["/var/lib/homelab/nixos/factory.nix"]
    assert nixos.machine.names("/var/lib/homelab/nixos") == []


# TrueNAS SCALE

ON_DATASET = "/mnt/tank/homelab/hostctl"


@pytest.fixture
def truenas(live: Host) -> Host:
    live.machine.set("init.json", "truenas")
    return live


def middleware(host: Host) -> dict[str, list[dict[str, Any]]]:
    return host.machine.setting("middleware.json", {})


def test_truenas_gets_an_init_script_and_cron_jobs_and_no_units(truenas: Host) -> None:
    up(truenas, hostctl=ON_DATASET)
    assert truenas.machine.names(SYSTEMD) == []
    (start,) = middleware(truenas)["initshutdownscript"]
    assert (start["type"], start["when"], start["enabled"]) == ("COMMAND", "POSTINIT", True)
    assert start["comment"] == "homelab factory start"
    assert start["command"].startswith("systemd-run --no-block --unit=homelab-factory ")
    assert start["command"].endswith(f" {ON_DATASET} k3d start factory")
    jobs = {job["description"]: job for job in middleware(truenas)["cronjob"]}
    assert sorted(jobs) == ["homelab factory backup", "homelab factory clean"]
    assert jobs["homelab factory clean"]["command"] == f"{ON_DATASET} clean factory"
    assert jobs["homelab factory backup"]["schedule"] == _cron("03:30")
    seen = status(truenas, hostctl=ON_DATASET)
    assert (set(states(seen).values()), seen["generation"]) == ({"current"}, 1)
    assert seen["notes"] == []


def test_truenas_entries_are_changed_in_place_and_others_are_left_alone(truenas: Host) -> None:
    theirs = {"id": 7, "description": "scrub", "command": "zpool scrub tank"}
    truenas.machine.set("middleware.json", {"cronjob": [theirs]})
    up(truenas)
    numbers = [job["id"] for job in middleware(truenas)["cronjob"]]
    up(truenas, backup="Sun 05:00")
    up(truenas, backup="Sun 05:00")
    assert [job["id"] for job in middleware(truenas)["cronjob"]] == numbers
    (backup,) = (j for j in middleware(truenas)["cronjob"] if "backup" in j["description"])
    assert backup["schedule"]["dow"] == "7"
    assert len(truenas("units remove factory")["removed"]) == 3
    assert middleware(truenas) == {"initshutdownscript": [], "cronjob": [theirs]}


def test_truenas_adds_keys_and_zeros_that_are_no_difference(truenas: Host) -> None:
    up(truenas)
    store = middleware(truenas)
    for job in store["cronjob"]:
        job["schedule"] = {k: "00" if v == "0" else v for k, v in job["schedule"].items()}
    truenas.machine.set("middleware.json", store)
    before = status(truenas)
    assert set(states(before).values()) == {"current"}
    store["cronjob"][0]["enabled"] = False
    truenas.machine.set("middleware.json", store)
    assert status(truenas)["generation"] == before["generation"] + 1


def test_a_failed_backup_on_truenas_is_told_by_the_clusters_record(truenas: Host) -> None:
    up(truenas)
    assert truenas("backup run factory", code=5)
    (failed,) = status(truenas)["failed"]
    assert failed["unit"] == "homelab factory backup"
    assert "NotFound" in failed["result"]
    assert "hostctl backup run factory" in failed["remedy"]


def test_truenas_is_warned_of_a_hostctl_that_an_update_leaves_behind(truenas: Host) -> None:
    up(truenas)
    (note,) = status(truenas)["notes"]
    assert "below /mnt" in note


def test_an_init_that_is_named_is_not_looked_for(live: Host) -> None:
    live.machine.set("init.json", "truenas")
    assert up(live, init="nixos")["init"] == "nixos"
    assert json.loads(live.machine.read("/var/lib/homelab/clusters/factory.json"))["units"][
        "init"
    ] == ("nixos")


# Watching


def test_a_watched_cluster_has_a_timer_whose_service_takes_the_recorded_spec(live: Host) -> None:
    up(live, watch="hourly", watching=WATCHING)
    assert live.machine.read(f"{SYSTEMD}/homelab-factory-watch.timer").count(b"OnCalendar=hourly")
    service = live.machine.read(f"{SYSTEMD}/homelab-factory-watch.service").decode()
    assert "ExecStart=/var/lib/homelab/hostctl watch run factory\n" in service
    assert live("watch run factory")["checks"]["api"]["state"] == "passed"
    up(live)
    assert not live.machine.exists(f"{SYSTEMD}/homelab-factory-watch.timer")


def test_on_truenas_a_watched_cluster_has_a_cron_job(truenas: Host) -> None:
    up(truenas, watch="hourly", watching=WATCHING)
    (job,) = [one for one in middleware(truenas)["cronjob"] if "watch" in one["description"]]
    assert job["command"] == f"{UNITS['hostctl']} watch run factory"
    seen = status(truenas, watch="hourly", watching=WATCHING)
    assert seen["units"]["homelab factory watch"] == {"installed": "current"}


def test_what_is_watched_is_checked_before_anything_is_installed(live: Host) -> None:
    refused = live("units install", UNITS | {"watch": "hourly", "watching": {"routes": ["a b"]}}, 2)
    assert "watching: " in refused["cause"]
    assert "routes[0]" in refused["cause"]
