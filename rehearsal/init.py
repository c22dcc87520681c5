"""The init of the make-believe host: `systemctl`, and the middleware of TrueNAS SCALE (`midclt`).

World, below `<rehearsal>/world/machine/`:
  init.json      systemd (where the file is missing), nixos, truenas or none
  systemd.json   by unit what systemd knows: `text` as of the last daemon-reload, and the properties
                 that `systemctl show` prints; edit ActiveState and Result, and a unit has failed
  middleware.json  {"initshutdownscript": [...], "cronjob": [...]}, TrueNAS' entries
A service that is started runs its hostctl, the real one, on this machine; that of k3s runs the
make-believe one (rehearsal/k3s.py).
"""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

from hostctl.machine import Machine, Ran
from hostctl.protocol import Failure

Object = dict[str, Any]

_SYSTEMD = "/etc/systemd/system"
_MARKS = {
    "nixos": ("/etc/NIXOS", "/run/systemd/system"),
    "truenas": ("/usr/bin/midclt", "/run/systemd/system"),
    "systemd": ("/run/systemd/system",),
    "none": (),
}


class Usage(Exception):
    """A call that the model does not know."""


def is_mark(machine: Any, path: str) -> bool:
    """Whether the host's init is told by this path."""
    return path in _MARKS[machine.setting("init.json", "systemd")]


def systemctl(machine: Any, words: list[str]) -> Ran:
    units: dict[str, Object] = machine.setting("systemd.json", {})
    command, *rest = words
    options = [word for word in rest if word.startswith("-")]
    names = [word for word in rest if not word.startswith("-")]
    if machine.setting("init.json", "systemd") == "none":
        return _failed("System has not been booted with systemd as init system (PID 1).")
    match command, options:
        case "show", [properties] if properties.startswith("--property="):
            asked = properties.partition("=")[2].split(",")
            return Ran(0, "\n".join(_shown(units, name, asked) for name in names).encode(), b"")
        case "daemon-reload", []:
            _load(machine, units)
        case "enable", []:
            for name in names:
                if not machine.exists(f"{_SYSTEMD}/{name}"):
                    return _failed(f"Failed to enable unit: Unit file {name} does not exist.")
                units[name]["UnitFileState"] = "enabled"
        case "disable", ["--now"]:
            for name in names:
                if name in units:
                    units[name] |= {"UnitFileState": "disabled", "ActiveState": "inactive"}
        case "reset-failed", []:
            for name in names:
                if units.get(name, {}).get("ActiveState") == "failed":
                    units[name] |= {"ActiveState": "inactive", "Result": "success"}
        case "stop", []:
            for name in names:
                if name.startswith("k3s"):
                    machine.k3s.stop()
                if name in units:
                    units[name] |= {"ActiveState": "inactive", "SubState": "dead"}
        case "restart", [] | ["--no-block"]:
            for name in names:
                if name not in units:
                    return _failed(f"Failed to restart {name}: Unit {name} not found.", 5)
                if units[name].get("Result") == "start-limit-hit":
                    return _failed(f"{name}: Start request repeated too quickly.")
                machine.set("systemd.json", units)
                if name.startswith("k3s"):
                    units[name] |= machine.k3s.start(name, units[name]["text"])
                else:
                    units[name] |= _started(machine, name, units[name]["text"])
                machine.set("systemd.json", units)
                if units[name]["ActiveState"] == "failed":
                    said = "failed because the control process exited with error code."
                    return _failed(f"Job for {name} {said}")
        case _:
            raise Usage(f"systemctl {command} with {options}")
    machine.set("systemd.json", units)
    return Ran(0, b"", b"")


def _failed(text: str, code: int = 1) -> Ran:
    return Ran(code, b"", text.encode() + b"\n")


def _load(machine: Any, units: dict[str, Object]) -> None:
    there = [name for name in machine.names(_SYSTEMD) if name.endswith((".service", ".timer"))]
    for name in set(units) - set(there):
        del units[name]
    for name in there:
        units.setdefault(name, {"UnitFileState": "disabled", "ActiveState": "inactive"})
        units[name]["text"] = machine.read(f"{_SYSTEMD}/{name}").decode()


def _shown(units: dict[str, Object], name: str, asked: list[str]) -> str:
    known = units.get(name)
    facts = {"Id": name, "LoadState": "loaded" if known else "not-found", "Result": "success"}
    facts |= {"ActiveState": "inactive", **(known or {})}
    return "".join(f"{key}={facts.get(key, '')}\n" for key in asked)


def _started(machine: Machine, name: str, text: str) -> Object:
    if name.endswith(".timer"):
        return {"ActiveState": "active", "SubState": "waiting"}
    result = "success"
    for line in re.findall(r"^ExecStart(?:Post)?=(.*)$", text, re.MULTILINE):
        if not _run(machine, line.lstrip("-")) and not line.startswith("-"):
            result = "exit-code"
    now = datetime.fromtimestamp(machine.now(), timezone.utc).strftime("%a %Y-%m-%d %H:%M:%S UTC")
    stays = "RemainAfterExit=yes" in text
    active = "failed" if result != "success" else "active" if stays else "inactive"
    return {"ActiveState": active, "Result": result, "ExecMainExitTimestamp": now}


def _run(machine: Machine, line: str) -> bool:
    """Runs a verb of hostctl as a unit's line calls it."""
    from hostctl.cli import VERBS

    program, *words, name = line.split()
    verb = VERBS.get(tuple(words))
    if not program.endswith("hostctl") or verb is None or verb.recorded is None:
        raise Usage(f"a unit that runs {line}")
    if not machine.exists(program):
        return False
    try:
        verb.run(machine, verb.recorded(machine, name))
    except Failure:
        return False
    return True


def midclt(machine: Any, words: list[str]) -> Ran:
    if machine.setting("init.json", "systemd") != "truenas" or words[:1] != ["call"]:
        raise Usage("midclt elsewhere than on TrueNAS, or without call")
    service, _, method = words[1].partition(".")
    arguments = [json.loads(word) for word in words[2:]]
    store: dict[str, list[Object]] = machine.setting("middleware.json", {})
    entries = store.setdefault(service, [])
    answer: Any = None
    match method, arguments:
        case "query", []:
            return Ran(0, json.dumps(entries).encode(), b"")
        case "create", [content]:
            _check_entry(service, content)
            number = 1 + max((entry["id"] for entry in entries), default=0)
            answer = {"id": number, "script": "", **content}
            entries.append(answer)
        case "update", [number, content]:
            (answer,) = (entry for entry in entries if entry["id"] == number)
            _check_entry(service, {**answer, **content}, partial=True)
            answer |= content
        case "delete", [number]:
            store[service] = [entry for entry in entries if entry["id"] != number]
            answer = True
        case _:
            raise Usage(f"midclt call {words[1]}")
    machine.set("middleware.json", store)
    return Ran(0, json.dumps(answer).encode(), b"")


_ENTRIES = {
    "initshutdownscript": {"type", "command", "when", "enabled", "timeout", "comment", "script"},
    "cronjob": {"user", "command", "description", "enabled", "stdout", "stderr", "schedule"},
}


def _check_entry(service: str, content: Object, *, partial: bool = False) -> None:
    """Refuses what the middleware's schema (api.truenas.com, v24.10) refuses."""
    unknown = set(content) - _ENTRIES[service] - ({"id", "script"} if partial else set())
    if unknown:
        raise Usage(f"{service}: {sorted(unknown)} is not allowed")
    if service == "initshutdownscript":
        good = content["type"] == "COMMAND" and content["when"] == "POSTINIT" and content["command"]
        if not good or len(content["comment"]) > 255:
            raise Usage(f"initshutdownscript: {content}")
    elif set(content["schedule"]) != {"minute", "hour", "dom", "month", "dow"}:
        raise Usage(f"cronjob: {content}")
