"""The `pulumi` command on one stack, and the lock that a dead run left there."""

import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# How the engine tells of a lock, whatever the backend (pkg/backend/diy/lock.go).
_LOCK = re.compile(r"created by (?P<user>\S.*)@(?P<host>\S+) \(pid (?P<pid>\d+)\) at (?P<time>\S+)")


class RecoveryError(Exception):
    """Why nothing more was done: names the step, the cause and the remedy."""


@dataclass(frozen=True)
class Engine:
    """Runs `pulumi` in a project's directory on one of its stacks.

    ``environment`` is the whole environment of a run; this process's where left out. ``unlock``
    clears another host's lock too, whose process cannot be looked at from here. ``say`` is called
    with each line for the user.
    """

    directory: Path
    stack: str
    environment: Mapping[str, str] | None = None
    unlock: bool = False
    say: Callable[[str], None] = print

    def run(
        self, *arguments: str, input: str = "", shown: bool = False, on_stack: bool = True
    ) -> str:
        """What a command printed; ``shown`` says it line by line as well. Clears a dead run's lock
        on the way. Raises RecoveryError when it fails.
        """
        if on_stack:
            arguments = (*arguments, "--stack", self.stack)
        code, out, err = self._run(arguments, input, shown)
        if code and "currently locked by" in err:
            self._clear_locks(err)
            code, out, err = self._run(arguments, input, shown)
        if code:
            said = err if shown else _errors(out) or out + err
            raise RecoveryError(
                f"`pulumi {' '.join(arguments[:2])}` failed with exit code {code}.\n"
                f"  Cause: {said.strip() or 'see above'}\n"
                "  Remedy: see the cause; then run the same command again, which goes on from here."
            )
        return out

    @property
    def project(self) -> str:
        """The name of the stack's project."""
        return yaml.safe_load((self.directory / "Pulumi.yaml").read_text())["name"]

    def export(self) -> dict[str, Any]:
        """The state, with its secrets encrypted."""
        return json.loads(self.run("stack", "export"))

    def import_(self, state: Mapping[str, Any]) -> None:
        """Replaces the state."""
        self.run("stack", "import", input=json.dumps(state))

    def refresh(self, urns: Sequence[str]) -> None:
        """Reads these resources anew. What is gone leaves the state."""
        targets = [word for urn in urns for word in ("--target", urn)]
        self.run("refresh", "--yes", "--skip-preview", *targets)

    def _run(self, arguments: Sequence[str], input: str, shown: bool) -> tuple[int, str, str]:
        with subprocess.Popen(
            ["pulumi", *arguments, "--cwd", str(self.directory), "--non-interactive"],
            env=dict(self.environment) if self.environment is not None else None,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if shown else subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            if not shown:
                out, err = process.communicate(input)
                return process.returncode, out, err
            assert process.stdin
            assert process.stdout
            process.stdin.close()
            lines = []
            for line in process.stdout:
                lines.append(line)
                self.say(line.rstrip("\n"))
        text = "".join(lines)
        return process.returncode, text, text

    def _clear_locks(self, said: str) -> None:
        locks = [match.groupdict() for match in _LOCK.finditer(said)]
        held = [
            f"{lock['user']}@{lock['host']}, pid {lock['pid']}, since {lock['time']}"
            for lock in locks
        ]
        if not locks:
            raise RecoveryError(
                f"the stack is locked.\n  Cause: {said.strip()}\n  Remedy: see whether that run"
                " goes on; if not, `pulumi cancel` and run this again."
            )
        here = socket.gethostname()
        for lock, holder in zip(locks, held, strict=True):
            if lock["host"] == here and _alive(int(lock["pid"])):
                raise RecoveryError(
                    f"the stack is locked by {holder}.\n  Cause: that process is alive on this"
                    " host\n  Remedy: let it finish, or stop it with one Ctrl-C (SIGINT) and wait;"
                    " then run this again."
                )
            if lock["host"] != here and not self.unlock:
                raise RecoveryError(
                    f"the stack is locked by {holder}.\n  Cause: whether that process lives cannot"
                    f" be seen from {here}\n  Remedy: run this on {lock['host']}; or make sure"
                    f" there that no process {lock['pid']} lives, and run this again with UNLOCK=1."
                )
        for holder in held:
            self.say(f"lock: {holder}: that run is dead, its lock is cleared")
        code, out, err = self._run(["cancel", "--yes", self.stack], "", shown=False)
        if code:
            raise RecoveryError(f"`pulumi cancel` failed.\n  Cause: {out}{err}\n  Remedy: see it.")


def _errors(out: str) -> str:
    """The errors alone, where a command answered in JSON: the rest is the whole plan."""
    try:
        diagnostics = json.loads(out)["diagnostics"]
    except (ValueError, KeyError, TypeError):
        return ""
    return "".join(one["message"] for one in diagnostics if one["severity"] == "error")


def _alive(pid: int) -> bool:
    """Whether a process of this host runs. One that ended and that nobody has waited for does not;
    nor does one that got the number of a `pulumi` which ended.
    """
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        return rest.split()[0] not in ("Z", "X") and "pulumi" in name
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
