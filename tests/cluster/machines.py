"""Machines of a LAN of their own, which are reached by OpenSSH alone and have a k3s of their own.

Each is a host as `engine.py` makes one: namespaces of network, mounts and processes, where what a
node changes (`/etc`, `/usr/local`, `/var/lib`, `/run`) is its own. They hang on one bridge in a
network namespace without a way out; in it, as on an operator's machine, run the client of OpenSSH
and the server of k3s' releases. systemd is played by `systemd.py`.
"""

import base64
import bz2
import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hostctl import program
from setup import cluster, ssh
from setup.cluster import Rig
from tests.cluster.engine import Engine
from tests.cluster.mutants import mutated

_NETWORK = "192.0.2"
_RELEASES = f"http://{_NETWORK}.1:8000"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SYSTEMD = Path(__file__).with_name("systemd.py")

# The first process of a machine. /sys is that of its own network, without this machine's cgroups.
_INIT = """
set -e
trap '' CHLD
mount --make-rprivate /
for directory in /etc /mnt /root /usr/lib /usr/local /var/lib; do
    upper={root}/changes/upper$directory work={root}/changes/work$directory
    mkdir -p $upper $work
    mount -t overlay overlay -o lowerdir=$directory,upperdir=$upper,workdir=$work $directory
done
mkdir -p /usr/lib/k3s
mount --bind {components} /usr/lib/k3s
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
ip link set lo up
: > {root}/ready
exec sleep infinity
"""


class Lan:
    """The network, its releases of k3s and whoever logs in from it; their files are in `root`."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig, self.root = rig, root
        self.key = self.root / "id"
        self._machines: list[Machine] = []
        self._held = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"]
        )
        self._server: subprocess.Popen[bytes] | None = None

    def open(self) -> None:
        until(lambda: os.readlink(f"/proc/{self._held.pid}/ns/net") != _own_network())
        self.ip("link", "set", "lo", "up")
        self.ip("link", "add", "lan0", "type", "bridge")
        self.ip("address", "add", f"{_NETWORK}.1/24", "dev", "lan0")
        self.ip("link", "set", "lan0", "up")
        _make_key(self.key)
        (self.root / "known_hosts").touch()
        (self.root / "releases").mkdir()
        self._serve_releases()

    def close(self) -> None:
        for machine in self._machines:
            machine.close()
        for process in filter(None, (self._server, self._held)):
            process.kill()
            process.wait()
        shutil.rmtree(self.root / "releases")

    def enter(self) -> list[str]:
        """The words before a command that run it in the network."""
        return ["nsenter", f"--net=/proc/{self._held.pid}/ns/net", "--"]

    def ip(self, *words: str) -> None:
        subprocess.run([*self.enter(), "ip", *words], check=True)

    def shell(self, line: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Runs a line as the command provider does on a machine of this network."""
        return subprocess.run(
            [*self.enter(), "/bin/sh", "-c", line],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def machine(self, number: int) -> "Machine":
        """One more machine, booted, whose host key the operator knows."""
        one = Machine(self.rig, self, number)
        self._machines.append(one)
        one.open()
        self.ip("link", "add", one.link, "type", "veth", "peer", "name", "eth0",
                "netns", str(one.init))  # fmt: skip
        self.ip("link", "set", one.link, "master", "lan0", "up")
        one.run(["ip", "address", "add", f"{one.address}/24", "dev", "eth0"])
        one.run(["ip", "link", "set", "eth0", "up"])
        with (self.root / "known_hosts").open("a") as known:
            known.write(f"{one.address} {one.key.with_suffix('.pub').read_text()}")
        one.boot()
        return one

    def release(self, version: str) -> dict[str, str]:
        """Publishes a release of the stand-in; its `install` for hostctl: url and sha256."""
        directory = self.root / "releases" / version
        if not directory.exists():
            directory.mkdir()
            binary = (self.rig.node_root / "bin" / "k3s").read_bytes()
            binary += f"K3S_VERSION={version}\n".encode()
            (directory / "k3s").write_bytes(binary)
            line = f"{hashlib.sha256(binary).hexdigest()}  k3s\n"
            (directory / "sha256sum-amd64.txt").write_text(line)
        sha256 = (directory / "sha256sum-amd64.txt").read_text().split()[0]
        return {"url": f"{_RELEASES}/{version.replace('+', '%2B')}/k3s", "sha256": sha256}

    def _serve_releases(self) -> None:
        serve = [sys.executable, "-m", "http.server", "8000", "--bind", f"{_NETWORK}.1"]
        self._server = subprocess.Popen(
            [*self.enter(), "setpriv", "--pdeathsig", "KILL", *serve],
            cwd=self.root / "releases",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ask = f"import urllib.request as r; r.urlopen('{_RELEASES}')"
        until(lambda: self.shell(shlex.join([sys.executable, "-c", ask])).returncode == 0)


@contextlib.contextmanager
def network(root: Path) -> Iterator[Lan]:
    """A network without machines yet, whose files are in a directory."""
    lan = Lan(cluster.resolve(), root)
    try:
        lan.open()
        yield lan
    finally:
        lan.close()


class Machine(Engine):
    """A machine with sshd and systemd, off until `boot`."""

    def __init__(self, rig: Rig, lan: Lan, number: int) -> None:
        super().__init__(rig)
        self.lan = lan
        self.link = f"machine{number}"
        self.address = f"{_NETWORK}.{200 + number}"
        self.key = self.root / "key"
        _make_key(self.key)
        self.environment = {"PATH": _PATH, "HOME": "/root"}
        self._parts: list[subprocess.Popen[bytes]] = []

    def script(self) -> str:
        components = shlex.quote(str(self.rig.node_root / "usr/lib/k3s"))
        return _INIT.format(root=self.root, components=components)

    def close(self) -> None:
        super().close()
        for part in self._parts:
            part.wait()

    def open(self) -> None:
        super().open()
        accounts = "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        self.write("/etc/passwd", accounts)
        self.write("/etc/ssh/sshd_config", self._sshd_config())
        python = os.path.realpath(sys.executable)
        for name in ("systemctl", "journalctl"):
            text = f'#!/bin/sh\nexec {python} -I -S {_SYSTEMD} {name} "$@"\n'
            self.write(f"/usr/local/bin/{name}", text, "755")
        self.run(["ln", "--symbolic", "--force", python, "/usr/local/bin/python3"])
        # The stand-in makes no pod network: this kernel may lack what k3s makes it of.
        lists = f"/usr/lib/modules/{os.uname().release}"
        has = f"mkdir -p {lists}; echo kernel/drivers/net/vxlan.ko >> {lists}/modules.builtin"
        self.run(["sh", "-ec", has])
        # A new machine has no kubectl.
        none = 'while it=$(command -v kubectl); do mount --bind /dev/null "$it"; done'
        self.run(["sh", "-ec", none])

    def _sshd_config(self) -> str:
        settings = {
            "ListenAddress": self.address,
            "HostKey": self.key,
            "AuthorizedKeysFile": self.lan.key.with_suffix(".pub"),
            "AuthenticationMethods": "publickey",
            "PermitRootLogin": "prohibit-password",
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
            "SetEnv": f"PATH={_PATH}",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def boot(self) -> None:
        """Starts systemd, with it the units that are enabled, and sshd."""
        self.run(["sh", "-c", "umount /run; mount -t tmpfs tmpfs /run && mkdir /run/sshd"])
        python = os.path.realpath(sys.executable)
        log = self._log("systemd.log")
        self._parts = [
            self.popen([python, "-I", "-S", str(_SYSTEMD), "boot"], stdout=log, stderr=log)
        ]
        server = ssh.server(may_install=False)
        libraries = os.pathsep.join(map(str, server.libraries))
        self._parts.append(
            self.popen(
                [str(server.program), "-D", "-e", "-f", "/etc/ssh/sshd_config"],
                stdout=log,
                stderr=log,
                env={"LD_LIBRARY_PATH": libraries} if libraries else {},
            )
        )
        until(lambda: "Server listening" in self.log("systemd.log"))

    def lose(self) -> None:
        """Pulls the plug: every process ends, but for the first, which holds the namespaces."""
        ours = os.readlink(f"/proc/{self.init}/ns/pid")
        while pids := [pid for pid in _processes(ours) if pid != self.init]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for part in self._parts:
            part.wait()
        (self.root / "systemd.log").write_text("")

    def write(self, path: str, text: str, mode: str = "644") -> None:
        script = 'mkdir -p "$(dirname "$1")"; cat > "$1"; chmod "$2" "$1"'
        self.run(["sh", "-ec", script, "sh", path, mode], input=text)

    def read(self, path: str) -> str:
        return self.run(["cat", path]).stdout


def shipped(more: str = "") -> str:
    """hostctl as the stack ships it, packed, which asks more often, and k3s for its token at the
    stand-in's port; `more` is defined before it begins."""
    text = mutated(program.text())
    for pattern, replacement in (
        (r"^PROGRESS_SECONDS = .*$", "PROGRESS_SECONDS = 0.5"),
        (r"(?<=Value\(server_url, \"https://127\.0\.0\.1:)6443", "9345"),
    ):
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert found == 1, pattern
    body, guard, end = text.partition('\nif __name__ == "__main__":')
    return base64.b64encode(bz2.compress(f"{body}\n{more}\n{guard}{end}".encode())).decode()


def _processes(namespace: str) -> list[int]:
    """The processes of a namespace that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "ns/pid") == namespace:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                found += [int(entry.name)] if state not in "ZX" else []
    return found


def _own_network() -> str:
    return os.readlink("/proc/self/ns/net")


def _make_key(path: Path) -> None:
    quiet = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(quiet, check=True)


def until(holds: Callable[[], bool]) -> None:
    """Waits for what another process does."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
