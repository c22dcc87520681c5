"""Commands reach a host over the real OpenSSH: client, servers, agent and jump host.

The servers listen on loopback and live in mount namespaces of their own, where /var/lib,
/run and the accounts are the test's: nothing of this machine is changed. Keys are thrown away.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components import host as host_module
from components import settings
from components.host import Connection, HostError, ask
from hostctl import program
from setup import ssh
from setup.cache import SetupError

_UNSHARE = ["unshare", "--mount", "--propagation", "private"]
_UNSHARE += ["--pid", "--fork", "--kill-child", "--mount-proc"]
_START = """
mount -t tmpfs tmpfs /var/lib && mkdir /var/lib/homelab && mount --bind "$1" /var/lib/homelab
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount --bind "$2" /etc/passwd
exec "$3" -D -e -f "$4"
"""


def refusal() -> str:
    """Why no server can be started here; empty when one can."""
    if os.geteuid() != 0:
        return "a mount namespace needs root"
    missing = [tool for tool in ("ssh", "ssh-agent", "unshare") if not shutil.which(tool)]
    if missing:
        return f"not on PATH: {', '.join(missing)}"
    try:
        ssh.server(may_install=False)
    except SetupError as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(refusal()), reason=refusal())


class Server:
    """A host: an sshd on loopback whose root is logged in to by key.

    `state` is its /var/lib/homelab, `bin` comes first on the PATH of its sessions.
    """

    def __init__(self, directory: Path, user_key: Path) -> None:
        self.directory = directory
        self.state, self.bin, self.key = directory / "state", directory / "bin", directory / "key"
        self.state.mkdir(parents=True)
        self.bin.mkdir()
        make_key(self.key)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        path = f"{self.bin}:{os.environ['PATH']}"
        settings = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self.key,
            "AuthorizedKeysFile": user_key.with_suffix(".pub"),
            "AuthenticationMethods": "publickey",
            "PermitRootLogin": "prohibit-password",
            "StrictModes": "no",
            "UsePAM": "no",
            "MaxAuthTries": 4,
            "PidFile": "none",
            "LogLevel": "VERBOSE",
            "SetEnv": f"PATH={path}",
        }
        config = directory / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        accounts = directory / "passwd"
        accounts.write_text(
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
        )
        server = ssh.server(may_install=False)
        values = (str(value) for value in (self.state, accounts, server.program, config))
        libraries = os.pathsep.join(map(str, server.libraries))
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_UNSHARE, "sh", "-ec", _START, "sh", *values],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **({"LD_LIBRARY_PATH": libraries} if libraries else {})},
            )
        until(lambda: "Server listening" in self.log.read_text(), self.log.read_text)

    def program(self, name: str, script: str) -> None:
        """Puts a program on the host."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}")
        (self.bin / name).chmod(0o755)

    def known(self, key: Path | None = None) -> str:
        """Its line of a known_hosts file, with another key if one is given."""
        public = (key or self.key).with_suffix(".pub").read_text()
        return f"[127.0.0.1]:{self.port} {public}"

    def stop(self) -> None:
        """Kills it and all that it runs; returns when nobody answers."""
        self._process.kill()
        self._process.wait()
        until(self._is_silent)

    def _is_silent(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) != 0


def make_key(path: Path) -> None:
    quiet = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(quiet, check=True)


def until(holds: Callable[[], bool], otherwise: Callable[[], str] = str) -> None:
    """Waits for what another process does."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Whoever has it may log in."""
    make_key(tmp_path / "id")
    return tmp_path / "id"


@pytest.fixture
def start(tmp_path: Path, key: Path) -> Iterator[Callable[[str], Server]]:
    with contextlib.ExitStack() as running:

        def started(name: str) -> Server:
            server = Server(tmp_path / name, key)
            running.callback(server.stop)
            return server

        yield started


@pytest.fixture
def server(start: Callable[[str], Server]) -> Server:
    return start("host")


@pytest.fixture
def connect(
    tmp_path: Path, key: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Connection]:
    """A connection to the server as settings declare it; `known` are lines of known_hosts."""

    def run(command: str, stdin: str, **_: Any) -> Any:
        # What the invoke command:local:run does.
        ran = shell(command, stdin)
        if ran.returncode:
            raise RuntimeError(f"exit status {ran.returncode}: {ran.stderr}")
        return SimpleNamespace(stdout=ran.stdout, stderr=ran.stderr)

    monkeypatch.setattr(host_module.local, "run", run)

    def connected(*, known: Sequence[str] | None = None, **changes: Any) -> Connection:
        known_hosts = tmp_path / "known_hosts"
        known_hosts.write_text("".join([server.known()] if known is None else known))
        declared = {
            "connection": "ssh",
            "address": "127.0.0.1",
            "user": "root",
            "port": server.port,
            "knownHosts": str(known_hosts),
            "identityFile": str(key),
            **changes,
        }
        given = {name: value for name, value in declared.items() if value is not None}
        return Connection(settings.Host.model_validate(given))

    return connected


def shell(line: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a line as the command provider does."""
    return subprocess.run(
        ["/bin/sh", "-c", line],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def install(connection: Connection) -> None:
    installed = shell(connection.install_line(), connection.program)
    assert installed.returncode == 0, installed.stderr


def change(connection: Connection, verb: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    ran = shell(connection.installed(verb.split()), json.dumps(spec))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return json.loads(ran.stdout)


def read(connection: Connection, path: Path) -> dict[str, Any]:
    request = {"path": str(path), "namespace": "factory", "name": "db"}
    reading = ask(["files", "read"], {"files": [request]})
    return connection.read(reading)["files"][str(path)]


def test_a_verb_reads_on_a_host_that_nothing_was_installed_on(tmp_path, server, connect):
    (tmp_path / "secret").write_text("made up")
    assert read(connect(), tmp_path / "secret")["content"] == "bWFkZSB1cA=="
    assert read(connect(), tmp_path / "none")["state"] == "absent"
    assert list(server.state.iterdir()) == []


def test_a_verb_changes_the_host_by_the_hostctl_that_was_installed_there(tmp_path, server, connect):
    install(connect())
    installed = server.state / "hostctl"
    assert installed.read_text() == program.text()
    assert installed.stat().st_mode & 0o777 == 0o755
    spec = {"path": str(tmp_path / "tokens" / "token"), "content": 'it\'s "quoted" $HOME\n'}
    assert change(connect(), "files write", spec)["changed"] is True
    assert (tmp_path / "tokens" / "token").read_text() == spec["content"]
    assert (tmp_path / "tokens" / "token").stat().st_mode & 0o777 == 0o600
    assert change(connect(), "files write", spec)["changed"] is False
    assert change(connect(), "files remove", spec)["removed"] is True


def test_a_refusal_of_the_host_comes_with_its_own_cause_and_remedy(connect):
    with pytest.raises(HostError, match=r"on host 127\.0\.0\.1 failed(.|\n)*Remedy: "):
        connect().read(ask(["files", "read"], {"files": [{"path": "relative"}]}))


def test_an_unknown_host_key_is_refused_without_a_question(tmp_path, connect):
    with pytest.raises(HostError, match="known host key") as refused:
        read(connect(known=[]), tmp_path)
    assert "Host key verification failed" in str(refused.value)
    assert (tmp_path / "known_hosts").read_text() == ""


def test_a_changed_host_key_is_refused(tmp_path, server, connect):
    make_key(tmp_path / "former")
    with pytest.raises(HostError, match="Host key verification failed"):
        read(connect(known=[server.known(tmp_path / "former")]), tmp_path)


def test_who_has_no_key_is_refused_without_a_question(tmp_path, connect):
    make_key(tmp_path / "stranger")
    with pytest.raises(HostError, match="Permission denied"):
        read(connect(identityFile=str(tmp_path / "stranger")), tmp_path)


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], None]]:
    """Adds a key to an agent of the test's own."""
    sock = tmp_path / "agent"
    running = subprocess.Popen(["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL)
    until(sock.exists)
    monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
    yield lambda key: subprocess.run(["ssh-add", "-q", str(key)], check=True) and None
    running.terminate()
    running.wait()


def test_the_agents_key_is_used(tmp_path, key, connect, agent):
    agent(key)
    assert read(connect(identityFile=None), tmp_path / "none")["state"] == "absent"


def test_a_key_of_the_settings_is_used_in_place_of_the_agents(tmp_path, connect, agent):
    """The server would have refused after as many wrong keys as the agent offers."""
    for number in range(6):
        make_key(tmp_path / f"other{number}")
        agent(tmp_path / f"other{number}")
    assert read(connect(), tmp_path / "none")["state"] == "absent"


def test_the_way_leads_through_the_jump_host(tmp_path, server, connect, start):
    gate = start("gate")
    known = [server.known(), gate.known()]
    through = connect(known=known, jump=f"root@127.0.0.1:{gate.port}")
    install(through)
    assert read(through, tmp_path / "none")["state"] == "absent"
    assert "Accepted publickey" in gate.log.read_text()

    with pytest.raises(HostError, match="known host key"):
        read(connect(known=[server.known()], jump=f"root@127.0.0.1:{gate.port}"), tmp_path)
    gate.stop()
    with pytest.raises(HostError, match="did not run"):
        read(connect(known=known, jump=f"root@127.0.0.1:{gate.port}"), tmp_path)


def test_a_host_that_does_not_answer_is_named_with_the_remedy(tmp_path, server, connect):
    server.stop()
    with pytest.raises(HostError, match=r"on host 127\.0\.0\.1 did not run") as refused:
        read(connect(), tmp_path)
    assert "Connection refused" in str(refused.value)
    assert "works without a question" in str(refused.value)


def test_a_verb_ends_its_work_when_the_connection_drops_and_another_run_has_none_left(
    tmp_path, server, connect
):
    """The file is written, the container is not restarted yet: there the line is cut."""
    asked, go, restarted = tmp_path / "asked", tmp_path / "go", tmp_path / "restarted"
    running = json.dumps([{"State": {"Status": "running", "StartedAt": "2026-01-01T00:00:00Z"}}])
    server.program(
        "docker",
        f"""case "$1" in
inspect) touch {asked}; until [ -e {go} ]; do sleep 0.1; done; echo '{running}';;
restart) echo once >> {restarted};;
esac
""",
    )
    install(connect())
    spec = {"path": str(tmp_path / "token"), "content": "made up", "restart_container": "tunnel"}
    line = connect().installed(["files", "write"])
    client = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {line}"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert client.stdin
    client.stdin.write(json.dumps(spec).encode())
    client.stdin.close()
    until(asked.exists, server.log.read_text)
    client.send_signal(signal.SIGKILL)
    client.wait()
    # By then sshd has closed the pipes that the verb writes to.
    until(lambda: "Closing connection" in server.log.read_text().rpartition("Accepted")[2])
    go.touch()
    until(restarted.exists, server.log.read_text)

    assert (tmp_path / "token").read_text() == "made up"
    running = json.dumps([{"State": {"Status": "running", "StartedAt": "2099-01-01T00:00:00Z"}}])
    server.program("docker", f"echo '{running}'")
    again = change(connect(), "files write", spec)
    assert (again["changed"], again["restarted"]) == (False, False)
    assert restarted.read_text() == "once\n"
