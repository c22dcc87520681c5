"""A stand-in for systemd on a host of tests: what hostctl's k3s verbs ask of it, and no more.

`systemd.py boot` is the manager, which starts the units that are enabled; `systemd.py systemctl`
and `systemd.py journalctl` are the commands. What they do not know they refuse.

As systemd: a unit's file is read when the unit is loaded, and again by daemon-reload alone;
`enable` makes the link in multi-user.target.wants and loads it; reset-failed refuses a unit that is
not loaded; Type=notify is activating until READY=1; Restart=always starts anew after RestartSec,
which NRestarts counts; KillMode=process ends the main process alone; stop waits for its end.

Otherwise: no dependencies, no ExecStartPre (it loads modules of the kernel), no limits, no cgroups,
one line of ExecStart without quotes, one journal file a unit.
"""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

UNITS = Path("/etc/systemd/system")
WANTS = UNITS / "multi-user.target.wants"
RUN = Path("/run/systemd")
MANAGER = RUN / "private"
STOP_SECONDS = 90


class Service:
    """A loaded unit and its main process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.Condition()
        self._jobs = threading.Lock()
        self.active, self.sub, self.result = "inactive", "dead", "success"
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._thread: threading.Thread | None = None
        self.load()

    def load(self) -> None:
        file = UNITS / self.name
        text = file.read_text() if file.exists() else ""
        self.found = bool(text)
        self.settings: dict[str, list[str]] = {}
        for line in text.splitlines():
            if pair := re.match(r"(\w+)=(.*)$", line):
                self.settings.setdefault(pair.group(1), []).append(pair.group(2))

    def setting(self, name: str, default: str) -> str:
        return self.settings.get(name, [default])[-1]

    def show(self) -> dict[str, str]:
        return {
            "Id": self.name,
            "LoadState": "loaded" if self.found else "not-found",
            "ActiveState": self.active,
            "SubState": self.sub,
            "Result": self.result,
            "NRestarts": str(self.restarts),
        }

    def start(self, wait: bool) -> str:
        if not self.found:
            return f"Unit {self.name} not found."
        with self.lock:
            if not self._wanted:
                self.restarts = 0
                self._become("activating", "start")
                self._wanted = True
                self._thread = threading.Thread(target=self._supervise, daemon=True)
                self._thread.start()
            while wait and self.active == "activating" and self.sub == "start":
                self.lock.wait()
        return ""

    def restart(self) -> None:
        with self._jobs:
            self.stop()
            self.start(wait=False)

    def stopping(self) -> None:
        """What a job to stop it does at once."""
        with self.lock:
            if self._process:
                self._become("deactivating", "stop-sigterm")

    def stop(self) -> None:
        with self.lock:
            self._wanted = False
            self.lock.notify_all()
            thread, process = self._thread, self._process
            if process:
                self._become("deactivating", "stop-sigterm")
                process.send_signal(signal.SIGTERM)
        if process:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        if thread:
            thread.join()

    def _become(self, active: str, sub: str) -> None:
        self.active, self.sub = active, sub
        self.lock.notify_all()

    def _supervise(self) -> None:
        while True:
            code = self._run()
            with self.lock:
                self._process = None
                if not self._wanted:
                    self._become("inactive", "dead")
                    return
                self.result = "success" if code == 0 else "exit-code"
                if self.setting("Restart", "no") != "always":
                    self._become("failed" if code else "inactive", "dead")
                    self._wanted = False
                    return
                self._become("activating", "auto-restart")
                self.restarts += 1
                delay = float(self.setting("RestartSec", "0.1").removesuffix("s"))
                self.lock.wait_for(lambda: not self._wanted, delay)
                if not self._wanted:
                    self._become("inactive", "dead")
                    return
                self._become("activating", "start")

    def _run(self) -> int:
        """Runs the main process to its end."""
        notify = RUN / f"notify-{self.name}"
        notify.unlink(missing_ok=True)
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        for entry in self.settings.get("EnvironmentFile", []):
            file = Path(entry.removeprefix("-").replace("%N", self.name.removesuffix(".service")))
            lines = file.read_text().splitlines() if file.exists() else []
            environment |= dict(line.split("=", 1) for line in lines if "=" in line)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with listener, (RUN / f"journal-{self.name}").open("ab") as journal:
            listener.bind(str(notify))
            notifies = self.setting("Type", "simple") == "notify"
            if notifies:
                environment["NOTIFY_SOCKET"] = str(notify)
            with self.lock:
                if not self._wanted:
                    return 0
                try:
                    process = self._process = subprocess.Popen(
                        self.setting("ExecStart", "").split(),
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=journal,
                        stderr=journal,
                        cwd="/",
                        start_new_session=True,
                    )
                except OSError as error:
                    journal.write(f"{self.name}: Failed at step EXEC: {error}\n".encode())
                    return 203
                if not notifies:
                    self._become("active", "running")
            listener.settimeout(0.2)
            while process.poll() is None:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in listener.recv(4096):
                        with self.lock:
                            if self._wanted:
                                self._become("active", "running")
            return process.returncode


class Manager:
    def __init__(self) -> None:
        self.services: dict[str, Service] = {}

    def service(self, name: str) -> Service:
        """A unit, loaded now if it was not."""
        if name not in self.services:
            self.services[name] = Service(name)
        return self.services[name]

    def reload(self) -> None:
        for service in self.services.values():
            service.load()
        for link in WANTS.iterdir() if WANTS.is_dir() else ():
            self.service(link.name)

    def answer(self, verb: str, names: list[str], options: dict[str, str]) -> tuple[int, str, str]:
        """Exit status, output, complaint."""
        known = {"--no-block", "--property", "--now"}
        if unknown := set(options) - known:
            return 1, "", f"systemctl: unrecognized option '{unknown.pop()}'"
        if verb == "daemon-reload":
            self.reload()
            return 0, "", ""
        if len(names) != 1 or not names[0].endswith(".service"):
            return 1, "", f"one unit is wanted: {names}"
        (name,) = names
        match verb:
            case "show":
                wanted = options["--property"].split(",")
                shown = (self.services.get(name) or Service(name)).show()
                return 0, "".join(f"{key}={shown[key]}\n" for key in wanted), ""
            case "enable":
                if not (UNITS / name).exists():
                    return 1, "", f"Failed to enable unit: Unit file {name} does not exist."
                WANTS.mkdir(exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    (WANTS / name).symlink_to(UNITS / name)
                self.reload()
            case "disable":
                (WANTS / name).unlink(missing_ok=True)
                self.reload()
                if "--now" in options:
                    self.service(name).stop()
            case "reset-failed":
                if name not in self.services:
                    return 1, "", f"Failed to reset failed state of {name}: Unit not loaded."
                self.services[name].restarts = 0
            case "start" | "restart":
                service = self.service(name)
                if verb == "restart":
                    service.stop()
                complaint = service.start(wait="--no-block" not in options)
                return (5, "", complaint) if complaint else (0, "", "")
            case "stop":
                self.service(name).stop()
            case _:
                return 1, "", f"Unknown command verb {verb}."
        return 0, "", ""

    def serve(self) -> None:
        RUN.mkdir(parents=True, exist_ok=True)
        (RUN / "system").mkdir(exist_ok=True)
        MANAGER.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(MANAGER))
            listener.listen()
            self.reload()
            for link in sorted(WANTS.iterdir()) if WANTS.is_dir() else ():
                self.service(link.name).start(wait=False)
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, client.makefile("rw") as stream:
            asked = json.loads(stream.readline())
            if asked["verb"] == "restart" and "--no-block" in asked["options"]:
                # A job, which goes on when systemctl has ended.
                service = self.service(asked["names"][0])
                service.stopping()
                threading.Thread(target=service.restart, daemon=True).start()
                answer: Any = (0, "", "") if service.found else (5, "", "Unit not found.")
            else:
                answer = self.answer(**asked)
            with contextlib.suppress(BrokenPipeError):
                stream.write(json.dumps(answer))


def systemctl(arguments: list[str]) -> int:
    words = [one for one in arguments if not one.startswith("-")]
    pairs = (one.partition("=") for one in arguments if one.startswith("-"))
    options = {key: value for key, _, value in pairs}
    with socket.socket(socket.AF_UNIX) as manager:
        try:
            manager.connect(str(MANAGER))
        except OSError:
            print("Failed to connect to bus: No such file or directory", file=sys.stderr)
            return 1
        with manager.makefile("rw") as stream:
            asked = {"verb": words[0], "names": words[1:], "options": options}
            stream.write(json.dumps(asked) + "\n")
            stream.flush()
            code, out, complaint = json.loads(stream.read())
    sys.stdout.write(out)
    if complaint:
        print(complaint, file=sys.stderr)
    return code


def journalctl(arguments: list[str]) -> int:
    pairs = (one.lstrip("-").partition("=") for one in arguments)
    options = {key: value for key, _, value in pairs}
    journal = RUN / f"journal-{options.pop('unit')}"
    count = int(options.pop("lines"))
    if options != {"output": "cat", "no-pager": ""}:
        print(f"journalctl: unrecognized option: {options}", file=sys.stderr)
        return 1
    lines = journal.read_text(errors="replace").splitlines() if journal.exists() else []
    print("\n".join(lines[-count:]))
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "boot":
        Manager().serve()
    sys.exit({"systemctl": systemctl, "journalctl": journalctl}[name](rest))
