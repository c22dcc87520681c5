"""Verbs: what runs on the host without Pulumi: start at boot, cleaning, backups, watching."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hostctl.backups import BACKUP_ITEM, incomplete_items
from hostctl.cluster import parse_json
from hostctl.k3s_node import K3S_UNITS
from hostctl.machine import STATE_DIRECTORY, Machine
from hostctl.protocol import Failure, Result, say
from hostctl.record import cluster_lock, next_generation, read_record, write_record
from hostctl.restic import TARGET_ITEM
from hostctl.restore import SCRATCH_DIRECTORY, verified_notes
from hostctl.spec import (
    CLUSTER_NAME,
    Items,
    Value,
    checked,
    number_between,
    one_of,
    or_null,
    text_matching,
)
from hostctl.tools import attempt, run_tool
from hostctl.watch import WATCH_SPEC

START_TRIES = 3
START_PAUSE_SECONDS = 60
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_SCHEDULE = text_matching(
    rf"hourly|daily|weekly|(({'|'.join(_DAYS)}) )?([01]\d|2[0-3]):[0-5]\d",
    "hourly, daily, weekly, HH:MM or Mon HH:MM",
)
# Neither quotes nor specifiers, so that it means the same in a unit, in Nix and in a shell.
_UNIT_PATH = text_matching(
    r"(/(?!\.{1,2}(/|$))[A-Za-z0-9_@+=,.-]+)+",
    "an absolute path of letters, digits and _@+=,.- without '..'",
)


def _watching(value: Any) -> dict[str, Any]:
    try:
        return checked(value, WATCH_SPEC, "watch run")
    except Failure as failure:
        raise ValueError(f"what watch run takes: {failure.cause}") from None


UNITS_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "hostctl": Value(_UNIT_PATH),
    "init": Value(one_of("auto", "systemd", "nixos", "truenas", "none"), "auto"),
    # null: the cluster is k3s, which has a unit of its own and needs no start.
    "storage_dir": Value(or_null(_UNIT_PATH), None),
    "start_seconds": Value(number_between(1, 200000), 2700),
    "clean": Value(or_null(_SCHEDULE), None),
    "backup": Value(or_null(_SCHEDULE), None),
    "keep": Value(number_between(1, 10000), 14),
    "items": Items(BACKUP_ITEM, []),
    "targets": Items(TARGET_ITEM, []),
    "verify": Value(or_null(_SCHEDULE), None),
    "verified_within_days": Value(number_between(1, 3650), 10),
    "scratch": Value(_UNIT_PATH, SCRATCH_DIRECTORY),
    "watch": Value(or_null(_SCHEDULE), None),
    "watching": Value(or_null(_watching), None),
    "generation": Value(or_null(number_between(0, 2**31)), None),
}
_SYSTEMD = "/etc/systemd/system"
_PATH = (
    "/run/wrappers/bin:/run/current-system/sw/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:"
    "/usr/bin:/sbin:/bin:/snap/bin"
)
_PROPERTIES = "Id,LoadState,ActiveState,SubState,UnitFileState,Result,ExecMainExitTimestamp"


def units_spec(spec: Any, verb: str) -> dict[str, Any]:
    """A spec of the units, checked together with what its backups need."""
    result = checked(spec, UNITS_SPEC, verb)
    wrong = incomplete_items(result["items"])
    if wrong:
        raise Failure("bad-spec", f"spec of {verb}", "; ".join(wrong), "correct the settings")
    return result


def units_install(machine: Machine, spec: dict[str, Any]) -> Result:
    """Installs what starts and heals the cluster at boot, cleans, backs up and watches on a
    schedule, in the way of the host's init, and runs the start once to see that it works. Records
    what `backup run NAME` and `watch run NAME` read.

    systemd: units in /etc/systemd/system. NixOS: a module to import, as /etc is not ours. TrueNAS
    SCALE: an init script and cron jobs of its middleware, as an update leaves /etc behind.
    """
    wanted = units_spec(spec, "units install")
    name = wanted["cluster"]
    step = f"installing the units of cluster {name}"
    init = _init(machine, wanted["init"])
    paste = None
    with cluster_lock(machine, name):
        recorded = read_record(machine, name).get("units") or {}
        if recorded.get("init") not in (None, init):
            _remove(machine, name, recorded["init"])
        generation = wanted["generation"]
        if generation is None:
            generation = recorded.get("generation", 0)
        kept = {key: value for key, value in wanted.items() if key != "generation"}
        entry = {"init": init, "generation": generation, "spec": kept}
        write_record(machine, name, units=entry)
        texts = _unit_texts(wanted)
        if init == "systemd":
            _write_units(machine, name, texts, step)
        elif init == "nixos":
            path = _nix_path(name)
            machine.make_directory(path.rpartition("/")[0], 0o755)
            _write_changed(machine, path, _nix_module(name, texts))
            paste = f"imports = [ {path} ];"
            say(f"paste into the host's configuration, then nixos-rebuild switch: {paste}")
        elif init == "truenas":
            for service, key, entries in _middleware_entries(wanted):
                _sync_middleware(machine, service, key, name, entries, step)
    if init == "systemd":
        # Outside the lock, which what it runs takes.
        _start_units(machine, name, texts, wanted["start_seconds"], step)
    installed = [] if init == "none" else sorted(texts)
    return {"init": init, "units": installed, "paste": paste}


def units_status(machine: Machine, spec: dict[str, Any]) -> Result:
    """Looks at the units: whether each is installed as declared, how it last ended, which failed.

    `generation` goes up by one while `units install` has something to do. What could not be seen is
    in `unseen`, and then the generation stands still.
    """
    wanted = units_spec(spec, "units status")
    name = wanted["cluster"]
    init = _init(machine, wanted["init"])
    record = read_record(machine, name)
    recorded = record.get("units") or {}
    seen: dict[str, Any] = {}
    failed: list[dict[str, str]] = []
    unseen: list[str] = []
    notes: list[str] = []
    kept = {key: value for key, value in wanted.items() if key != "generation"}
    agrees = recorded.get("init") == init and recorded.get("spec") == kept
    texts = _unit_texts(wanted)
    try:
        if init in ("systemd", "nixos"):
            shown = _show(machine, sorted(texts))
            for unit, text in sorted(texts.items()):
                seen[unit] = _seen_unit(machine, unit, text, shown.get(unit, {}))
                failed += _failure_of(unit, shown.get(unit, {}))
        if init == "systemd":
            agrees = agrees and all(one["installed"] == "current" for one in seen.values())
            stale = [one for one in _stale(name, texts) if machine.exists(f"{_SYSTEMD}/{one}")]
            agrees = agrees and not stale
        elif init == "nixos":
            path = _nix_path(name)
            module = machine.read(path).decode() if machine.exists(path) else None
            agrees = agrees and module == _nix_module(name, texts)
            missing = [unit for unit, one in seen.items() if one["installed"] != "current"]
            if missing:
                notes.append(
                    f"{', '.join(missing)} not active as declared: import {path} in the host's "
                    "NixOS configuration and run nixos-rebuild switch"
                )
        elif init == "truenas":
            unit = f"homelab-{name}.service"
            failed += _failure_of(unit, _show(machine, [unit]).get(unit, {}))
            for service, key, entries in _middleware_entries(wanted):
                same = _compare_middleware(machine, service, key, name, entries)
                seen.update({mark: {"installed": state} for mark, state in same.items()})
            agrees = agrees and all(one["installed"] == "current" for one in seen.values())
            failed += _failed_runs(name, record.get("runs") or {})
            if not wanted["hostctl"].startswith("/mnt/"):
                notes.append(
                    f"an update of TrueNAS leaves {wanted['hostctl']} behind: set "
                    "homelab:host.hostctl to a path on a dataset, below /mnt"
                )
    except (Failure, OSError) as error:
        step = f"{error.step}: {error.cause}" if isinstance(error, Failure) else str(error)
        unseen.append(f"units: {step}")
        agrees = bool(recorded)
    verified = record.get("verified") or {}
    notes += verified_notes(machine, name, wanted, verified)
    return {
        "init": init,
        "generation": next_generation(recorded, agrees),
        "units": seen,
        "verified": {
            target["name"]: verified[target["name"]]
            for target in wanted["targets"]
            if target["name"] in verified
        },
        "failed": failed,
        "notes": notes,
        "unseen": unseen,
    }


def units_remove(machine: Machine, spec: dict[str, Any]) -> Result:
    """Removes what `units install` installed. None there is fine; backups that were taken stay."""
    # The spec is that of a stored install, perhaps of another version: one key counts.
    given = {key: spec[key] for key in ("cluster",) if key in spec}
    name = checked(given, {"cluster": Value(CLUSTER_NAME)}, "units remove")["cluster"]
    with cluster_lock(machine, name):
        recorded = read_record(machine, name).get("units")
        removed = _remove(machine, name, recorded["init"]) if recorded else []
        if recorded:
            write_record(machine, name, units=None)
    return {"removed": removed}


def _init(machine: Machine, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    for init, mark in (
        ("nixos", "/etc/NIXOS"),
        ("truenas", "/usr/bin/midclt"),
        ("systemd", "/run/systemd/system"),
    ):
        if machine.exists(mark):
            return init
    raise Failure(
        "refused",
        "looking for the host's init",
        "it is neither systemd nor NixOS nor TrueNAS SCALE",
        "set homelab:host.init to none, and have the host run `hostctl k3d start NAME` at boot by "
        "its own means",
    )


# What is installed


def _unit_texts(spec: Mapping[str, Any]) -> dict[str, str]:
    """The units by name; the one without a job's name runs at boot. It is `k3d start` and not
    `ensure`: it heals what is there and makes nothing where a disk that was not mounted hides the
    cluster. k3s starts by a unit of its own."""
    name, program = spec["cluster"], spec["hostctl"]
    boot = f"homelab-{name}.service"
    seconds = spec["start_seconds"]
    recover = f"{program} backup recover {name}\n"
    texts = {}
    if spec["storage_dir"]:
        texts[boot] = (
            _head(f"Start and heal cluster {name}") + "Wants=network-online.target docker.service\n"
            "After=network-online.target docker.service\n"
            # A Docker that is started again may publish no port (incident 1).
            "PartOf=docker.service\n"
            f"RequiresMountsFor={spec['storage_dir']}\n"
            + _at_boot(
                f"ExecStart={program} k3d start {name}\n"
                + (f"ExecStartPost=-{recover}" if spec["items"] else ""),
                seconds,
                "multi-user.target docker.service",
            )
        )
    elif spec["items"]:
        # A power cut runs no ExecStopPost, and the timer's next run may be a week away.
        texts[boot] = (
            _head(f"End what a backup of cluster {name} began")
            + f"After={K3S_UNITS['server']}\n"
            + _at_boot(f"ExecStart={recover}", seconds, "multi-user.target")
        )
    job = (
        f"After={boot if boot in texts else K3S_UNITS['server']}\n\n"
        "[Service]\n"
        "Type=oneshot\n"
        f"Environment=PATH={_PATH}\n"
        "UMask=0077\n"
        "KillMode=mixed\n"
        "Nice=10\n"
        "IOSchedulingClass=idle\n"
    )
    if spec["clean"]:
        texts[f"homelab-{name}-clean.service"] = (
            _head(f"Clean the host of cluster {name}")
            + job
            + f"ExecStart={program} clean {name}\nTimeoutStartSec=6h\n"
        )
        texts[f"homelab-{name}-clean.timer"] = _timer(
            f"Clean the host of cluster {name}", spec["clean"]
        )
    if spec["backup"] and spec["items"]:
        texts[f"homelab-{name}-backup.service"] = (
            _head(f"Back up what cluster {name} keeps")
            + job
            + f"ExecStart={program} backup run {name}\n"
            # Also after a kill: what was scaled down comes up again.
            f"ExecStopPost={program} backup recover {name}\n"
            "TimeoutStartSec=24h\n"
            "TimeoutStopSec=15min\n"
        )
        texts[f"homelab-{name}-backup.timer"] = _timer(
            f"Back up what cluster {name} keeps", spec["backup"]
        )
    if spec["verify"] and spec["items"] and spec["targets"]:
        what = f"Restore the backups of cluster {name} into a scratch place"
        run = f"ExecStart={program} backup verify {name}\nTimeoutStartSec=24h\n"
        texts[f"homelab-{name}-verify.service"] = _head(what) + job + run
        texts[f"homelab-{name}-verify.timer"] = _timer(what, spec["verify"])
    if spec["watch"] and spec["watching"]:
        texts[f"homelab-{name}-watch.service"] = (
            _head(f"Watch cluster {name}")
            + job
            + f"ExecStart={program} watch run {name}\nTimeoutStartSec=1h\n"
        )
        texts[f"homelab-{name}-watch.timer"] = _timer(f"Watch cluster {name}", spec["watch"])
    return texts


def _at_boot(commands: str, seconds: int, wanted_by: str) -> str:
    """The rest of a unit that runs once and is tried again. All tries lie within one interval, so
    that their number is a bound (incident 2)."""
    interval = (START_TRIES + 1) * (seconds + START_PAUSE_SECONDS)
    return (
        f"StartLimitBurst={START_TRIES}\n"
        f"StartLimitIntervalSec={interval}\n\n"
        "[Service]\n"
        "Type=oneshot\n"
        "RemainAfterExit=yes\n"
        f"Environment=PATH={_PATH}\n"
        f"{commands}"
        f"TimeoutStartSec={seconds}\n"
        "Restart=on-failure\n"
        f"RestartSec={START_PAUSE_SECONDS}\n\n"
        "[Install]\n"
        f"WantedBy={wanted_by}\n"
    )


def _head(description: str) -> str:
    return (
        "# Written by hostctl; an edit here is lost at the next pulumi up.\n"
        f"[Unit]\nDescription={description}\n"
    )


def _timer(description: str, schedule: str) -> str:
    return (
        _head(description)
        + f"\n[Timer]\nOnCalendar={_calendar(schedule)}\nPersistent=true\n\n"
        + "[Install]\nWantedBy=timers.target\n"
    )


def _calendar(schedule: str) -> str:
    """The schedule in the words of systemd.time(7)."""
    if schedule in ("hourly", "daily", "weekly"):
        return schedule
    day, _, clock = schedule.rpartition(" ")
    return f"{day} *-*-* {clock}:00".strip()


def _cron(schedule: str) -> dict[str, str]:
    """The schedule in the words of TrueNAS' middleware."""
    minute, hour, day = "0", "0", "*"
    if schedule == "hourly":
        hour = "*"
    elif schedule == "weekly":
        day = "1"
    elif schedule != "daily":
        name, _, clock = schedule.rpartition(" ")
        hour, minute = (str(int(part)) for part in clock.split(":"))
        day = str(_DAYS.index(name) + 1) if name else "*"
    return {"minute": minute, "hour": hour, "dom": "*", "month": "*", "dow": day}


def _stale(name: str, texts: Mapping[str, str]) -> list[str]:
    return [unit for unit in _all_units(name) if unit not in texts]


def _all_units(name: str) -> list[str]:
    jobs = [f"homelab-{name}-{job}.{kind}" for job in _JOBS for kind in _KINDS]
    return [*jobs, f"homelab-{name}.service"]


_JOBS = ("clean", "backup", "verify", "watch")
_KINDS = ("timer", "service")


def _write_changed(machine: Machine, path: str, text: str) -> bool:
    if machine.exists(path) and machine.read(path) == text.encode():
        return False
    machine.write_atomic(path, text.encode(), 0o644, "root", "root")
    return True


# systemd


def _systemctl(machine: Machine, arguments: Sequence[str], step: str, **options: Any) -> None:
    run_tool(machine, ["systemctl", *arguments], step, "failed", **options)


def _write_units(machine: Machine, name: str, texts: Mapping[str, str], step: str) -> None:
    changed = [
        unit for unit, text in texts.items() if _write_changed(machine, f"{_SYSTEMD}/{unit}", text)
    ]
    removed = _remove_units(machine, name, _stale(name, texts))
    if changed or removed:
        _systemctl(machine, ["daemon-reload"], step)


def _start_units(
    machine: Machine, name: str, texts: Mapping[str, str], seconds: int, step: str
) -> None:
    boot = f"homelab-{name}.service"
    timers = sorted(unit for unit in texts if unit.endswith(".timer"))
    enabled = [unit for unit in (boot, *timers) if unit in texts]
    if enabled:
        _systemctl(machine, ["enable", *enabled], step)
    if timers:
        _systemctl(machine, ["restart", *timers], step)
    if boot not in texts:
        return
    # It refuses a unit that was tried too often, until this.
    attempt(machine, ["systemctl", "reset-failed", boot], step)

    def tick(waited: float) -> None:
        say(f"starting {boot}: {waited:.0f} s")

    argv = ["systemctl", "restart", boot]
    ran = attempt(machine, argv, step, timeout=float(seconds), tick=tick)
    if ran.code:
        remedy = f"journalctl --unit {boot} --since -1h; then systemctl restart {boot}"
        raise Failure("failed", f"starting {boot}", ran.complaint, remedy)


def _remove_units(machine: Machine, name: str, units: Sequence[str]) -> list[str]:
    """Disarms and removes those that are there. A job that runs ends by itself: a backup is not cut
    off."""
    there = [unit for unit in units if machine.exists(f"{_SYSTEMD}/{unit}")]
    boot = f"homelab-{name}.service"
    enabled = [unit for unit in there if unit == boot or unit.endswith(".timer")]
    if enabled:
        _systemctl(machine, ["disable", "--now", *enabled], f"disabling {', '.join(enabled)}")
    for unit in there:
        machine.remove(f"{_SYSTEMD}/{unit}")
    return there


def _show(machine: Machine, units: Sequence[str]) -> dict[str, dict[str, str]]:
    """What systemd knows of the units, by name."""
    if not units:
        return {}
    argv = ["systemctl", "show", *units, f"--property={_PROPERTIES}"]
    ran = run_tool(machine, argv, "asking systemd", "cannot-tell", env={"TZ": "UTC"})
    shown = {}
    for block in ran.text.strip().split("\n\n"):
        pairs = (line.partition("=") for line in block.splitlines())
        facts = {key: value for key, _, value in pairs}
        shown[facts.get("Id", "")] = facts
    return shown


def _seen_unit(
    machine: Machine, unit: str, text: str, facts: Mapping[str, str]
) -> dict[str, str | None]:
    path = f"{_SYSTEMD}/{unit}"
    installed = "absent"
    if machine.exists(path):
        same = machine.read(path).decode("utf-8", "replace").strip() == text.strip()
        armed = not unit.endswith(".timer") or facts.get("ActiveState") == "active"
        enabled = "[Install]" not in text or facts.get("UnitFileState") != "disabled"
        installed = "current" if same and armed and enabled else "changed"
    return {
        "installed": installed,
        "active": facts.get("ActiveState"),
        "result": facts.get("Result"),
        "ended": facts.get("ExecMainExitTimestamp") or None,
    }


def _failure_of(unit: str, facts: Mapping[str, str]) -> list[dict[str, str]]:
    if facts.get("ActiveState") != "failed" and facts.get("SubState") != "auto-restart":
        return []
    ended = facts.get("ExecMainExitTimestamp") or "at an unknown time"
    return [
        {
            "unit": unit,
            "result": f"{facts.get('Result')}, {ended}",
            "remedy": f"journalctl --unit {unit}; when mended: systemctl restart {unit}",
        }
    ]


def _remove(machine: Machine, name: str, init: str) -> list[str]:
    step = f"removing the units of cluster {name}"
    if init == "systemd":
        removed = _remove_units(machine, name, _all_units(name))
        if removed:
            _systemctl(machine, ["daemon-reload"], step)
            attempt(machine, ["systemctl", "reset-failed", *removed], step)
        return removed
    if init == "nixos":
        there = machine.exists(_nix_path(name))
        machine.remove(_nix_path(name))
        return [_nix_path(name)] if there else []
    if init == "truenas":
        return [
            mark
            for service, key in (_INIT_SCRIPTS, _CRON_JOBS)
            for mark in _sync_middleware(machine, service, key, name, {}, step)
        ]
    return []


# NixOS


def _nix_path(name: str) -> str:
    return f"{STATE_DIRECTORY}/nixos/{name}.nix"


def _nix_module(name: str, texts: Mapping[str, str]) -> str:
    """A NixOS module with the same units. Their texts hold nothing that Nix would expand."""
    parts = []
    for unit, text in sorted(texts.items()):
        found = re.search(r"^WantedBy=(.*)$", text, re.MULTILINE)
        targets = " ".join(f'"{one}"' for one in found.group(1).split()) if found else ""
        lines = "".join(f"      {line}".rstrip() + "\n" for line in text.splitlines())
        parts.append(
            f'  systemd.units."{unit}" = {{\n    wantedBy = [ {targets} ];\n'.replace("[  ]", "[ ]")
            + f"    text = ''\n{lines}    '';\n  }};\n"
        )
    head = f"# The units of cluster {name}, written by hostctl; an edit here is lost.\n"
    return head + "{ ... }:\n{\n" + "\n".join(parts) + "}\n"


# TrueNAS SCALE

_INIT_SCRIPTS = ("initshutdownscript", "comment")
_CRON_JOBS = ("cronjob", "description")


def _middleware_entries(
    spec: Mapping[str, Any],
) -> list[tuple[str, str, dict[str, dict[str, Any]]]]:
    """What the middleware shall hold: service, the key that holds our mark, entries by mark.

    The start is a transient unit: bounded, tried again when Docker is late, and seen in `systemctl
    status` and the journal. Cron jobs cannot tell how they ended; the cluster's record can.
    """
    name, program, seconds = spec["cluster"], spec["hostctl"], spec["start_seconds"]
    properties = {
        "Type": "oneshot",
        "RemainAfterExit": "yes",
        "TimeoutStartSec": str(seconds),
        "Restart": "on-failure",
        "RestartSec": str(START_PAUSE_SECONDS),
        "StartLimitBurst": str(START_TRIES),
        "StartLimitIntervalSec": str((START_TRIES + 1) * (seconds + START_PAUSE_SECONDS)),
    }
    start = ["systemd-run", "--no-block", f"--unit=homelab-{name}", f"--setenv=PATH={_PATH}"]
    start += [f"--property={key}={value}" for key, value in properties.items()]
    boot = {
        "type": "COMMAND",
        "command": " ".join([*start, program, "k3d", "start", name]),
        "when": "POSTINIT",
        "enabled": True,
        "timeout": 60,
    }
    jobs = {}
    if spec["clean"]:
        jobs[f"homelab {name} clean"] = _cron_job(f"{program} clean {name}", spec["clean"])
    if spec["backup"] and spec["items"]:
        command = f"{program} backup run {name}; {program} backup recover {name}"
        jobs[f"homelab {name} backup"] = _cron_job(command, spec["backup"])
    if spec["verify"] and spec["items"] and spec["targets"]:
        entry = _cron_job(f"{program} backup verify {name}", spec["verify"])
        jobs[f"homelab {name} verify"] = entry
    if spec["watch"] and spec["watching"]:
        jobs[f"homelab {name} watch"] = _cron_job(f"{program} watch run {name}", spec["watch"])
    return [
        (*_INIT_SCRIPTS, {f"homelab {name} start": boot}),
        (*_CRON_JOBS, jobs),
    ]


def _cron_job(command: str, schedule: str) -> dict[str, Any]:
    # True keeps the output from being mailed at each run.
    entry = {"user": "root", "command": command, "enabled": True, "stdout": True, "stderr": True}
    return {**entry, "schedule": _cron(schedule)}


def _middleware(machine: Machine, step: str, code: str, method: str, *arguments: Any) -> Any:
    argv = ["midclt", "call", method, *(json.dumps(one) for one in arguments)]
    return parse_json(run_tool(machine, argv, step, code).out, step, or_scalar=True)


def _ours(
    machine: Machine, service: str, key: str, name: str, step: str, code: str
) -> list[dict[str, Any]]:
    entries = _middleware(machine, step, code, f"{service}.query")
    return [one for one in entries if str(one.get(key, "")).startswith(f"homelab {name} ")]


def _compare_middleware(
    machine: Machine, service: str, key: str, name: str, wanted: Mapping[str, Any]
) -> dict[str, str]:
    states = dict.fromkeys(wanted, "absent")
    for entry in _ours(machine, service, key, name, "asking TrueNAS' middleware", "cannot-tell"):
        mark = entry[key]
        same = mark in wanted and states[mark] == "absent" and _has(entry, wanted[mark])
        states[mark] = "current" if same else "changed"
    return states


def _has(entry: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether an entry has all that is wanted; TrueNAS adds keys and writes 00 for 0."""

    def plain_number(value: Any) -> Any:
        return str(int(value)) if isinstance(value, str) and value.isdigit() else value

    return all(
        _has(entry.get(key) or {}, value)
        if isinstance(value, dict)
        else plain_number(entry.get(key)) == plain_number(value)
        for key, value in wanted.items()
    )


def _sync_middleware(
    machine: Machine,
    service: str,
    key: str,
    name: str,
    wanted: Mapping[str, Any],
    step: str,
) -> list[str]:
    """Makes the middleware hold exactly these entries of ours. Returns the marks of those that were
    removed."""
    removed = []
    left = dict(wanted)
    for entry in _ours(machine, service, key, name, step, "failed"):
        mark = entry[key]
        content = left.pop(mark, None)
        if content is None:
            _middleware(machine, step, "failed", f"{service}.delete", entry["id"])
            removed.append(mark)
        elif not _has(entry, content):
            _middleware(machine, step, "failed", f"{service}.update", entry["id"], content)
    for mark, content in left.items():
        _middleware(machine, step, "failed", f"{service}.create", {**content, key: mark})
    return removed


def _failed_runs(name: str, runs: Mapping[str, Any]) -> list[dict[str, str]]:
    verbs = {
        "clean": f"hostctl clean {name}",
        "backup": f"hostctl backup run {name}",
        "verify": f"hostctl backup verify {name}",
    }
    return [
        {
            "unit": f"homelab {name} {what}",
            "result": f"{run['cause']}, {run['at']}",
            "remedy": f"mend it and run it by hand: {verbs[what]}",
        }
        for what, run in sorted(runs.items())
        if not run["ok"]
    ]
