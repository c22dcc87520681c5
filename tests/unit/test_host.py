"""Host commands: how they reach the host, what they may show, and how a host that does not answer
is told.
"""

import json
import shlex
import subprocess
from typing import Any

import grpc
import pulumi
import pytest

from components import settings
from components.host import Connection, Host, HostError, ask, together
from hostctl import program


def connection(**host: Any) -> Connection:
    return Connection(settings.Host.model_validate(host, by_name=True))


SSH = {"connection": "ssh", "address": "p510.lan", "user": "root"}


def test_a_local_command_is_the_verb_of_the_installed_hostctl():
    assert connection().installed(["k3d", "ensure"]) == "/var/lib/homelab/hostctl k3d ensure"
    assert connection(sudo=True).installed(["k3d", "start"]).startswith("sudo -n /var/lib/")


def test_ssh_checks_host_keys_and_never_asks():
    words = shlex.split(connection(**SSH, port=2222, jump="me@bastion").installed(["k3d", "stop"]))
    assert words[0] == "ssh"
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} <= set(words)
    hop = shlex.split(next(word for word in words if word.startswith("ProxyCommand=")))
    assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} <= set(hop)
    assert hop[-3:] == ["[%h]:%p", "--", "ssh://me@bastion"]
    assert words[words.index("-p") + 1] == "2222"
    assert words[-3:] == ["--", "root@p510.lan", "/var/lib/homelab/hostctl k3d stop"]


def test_no_input_of_a_command_names_the_checkout(run_program, tmp_path, monkeypatch):
    """Two operators with two checkouts see no difference, and a stored delete goes on working."""

    def inputs() -> list[dict[str, Any]]:
        def program() -> None:
            host = Host("p510", connection())
            host.command(
                "cluster",
                ["k3d", "ensure"],
                {"name": "factory"},
                delete=["k3d", "delete"],
                opts=pulumi.ResourceOptions(),
            )

        return [resource.inputs for resource in run_program(program).values()]

    here = inputs()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("USER", "someone-else")
    assert inputs() == here
    assert str(settings.__file__).rpartition("/components")[0] not in json.dumps(here)


@pytest.mark.parametrize("secret", [False, True])
def test_a_command_updates_in_place_and_a_secret_one_logs_nothing(run_program, secret):
    def program() -> None:
        host = Host("p510", connection())
        host.command("c", ["rollout"], {"k": "v"}, secret=secret, opts=pulumi.ResourceOptions())

    command = run_program(program)["Command", "c"]
    assert command.inputs["create"] == command.inputs["update"]
    assert json.loads(command.inputs["stdin"]) == {"k": "v"}
    assert command.inputs["addPreviousOutputInEnv"] is False
    assert "triggers" not in command.inputs
    assert command.inputs["logging"] == ("none" if secret else "stderr")
    assert ("stdin" in command.secrets) == secret
    assert command.additional_secret_outputs == (["stdout", "stderr"] if secret else [])
    assert ("Command", "hostctl") in command.depends_on


def test_two_installs_at_once_after_one_that_was_killed_leave_one_whole_program(tmp_path):
    link = connection(hostctl=str(tmp_path / "hostctl"))
    (tmp_path / "hostctl.new").write_text("half of " * 100_000)
    installs = [
        subprocess.Popen(["sh", "-c", link.install_line()], stdin=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for install in installs:
        install.communicate(link.program)
    assert [install.returncode for install in installs] == [0, 0, 0, 0]
    assert (tmp_path / "hostctl").read_text() == program.text()
    assert [entry.name for entry in tmp_path.iterdir()] == ["hostctl"]


def test_the_install_line_writes_the_program_atomically(tmp_path):
    path = tmp_path / "new directory" / "hostctl"
    link = connection(hostctl=str(path).replace(" ", "_"))
    subprocess.run(["sh", "-c", link.install_line()], input=link.program, text=True, check=True)
    installed = tmp_path / "new_directory" / "hostctl"
    assert installed.stat().st_mode & 0o777 == 0o755
    assert installed.read_text() == program.text()
    assert [entry.name for entry in installed.parent.iterdir()] == ["hostctl"]


def test_the_installed_program_runs_from_anywhere_and_keeps_its_bytecode(tmp_path):
    link = connection(hostctl=str(tmp_path / "bin" / "hostctl"))
    subprocess.run(["sh", "-c", link.install_line()], input=link.program, text=True, check=True)
    # In a directory of somebody else's: nothing there is taken for Python's own.
    (tmp_path / "json.py").write_text("raise SystemExit('not the json that was meant')")
    for _ in range(2):
        ran = subprocess.run(
            ["bin/hostctl", "k3d", "inspect"],
            input="{",
            cwd=tmp_path,
            text=True,
            capture_output=True,
            check=False,
        )
        assert ran.returncode == 2, ran.stderr
        assert "not JSON" in json.loads(ran.stdout)["error"]["cause"]
    [kept] = (tmp_path / "bin" / "__pycache__").iterdir()
    assert kept.suffix == ".pyc"


def test_the_shipped_program_runs_a_verb_without_being_installed():
    """The very command line and stdin that a preview hands to the invoke, run for real."""
    link = connection()
    line = link.line("python3", "-c", _boot(link))
    spec = {"files": [{"path": "/nonexistent/a", "as": "value", "namespace": "n", "name": "s"}]}
    answer = subprocess.run(
        ["sh", "-c", line],
        input=json.dumps({"program": link.program, "questions": [(["files", "read"], spec)] * 2}),
        text=True,
        capture_output=True,
        check=True,
    )
    for line in answer.stdout.splitlines():
        result = json.loads(line)
        assert result["ok"]
        assert result["files"]["/nonexistent/a"]["state"] == "absent"
    assert answer.stdout.count("\n") == 2


def _boot(link: Connection) -> str:
    from components import host

    assert link.program
    return host._BOOT


def read(run_program, answer: Any, **host: Any) -> list[Any]:
    seen: list[Any] = []
    run_program(
        lambda: seen.append(connection(**host).read(ask(["k3d", "inspect"], {"name": "factory"}))),
        calls={"command:local:run": answer},
    )
    return seen


def test_a_result_is_read(run_program):
    assert read(run_program, {"stdout": '{"ok": true, "x": 1}', "stderr": ""}) == [
        {"ok": True, "x": 1}
    ]


def test_a_refusal_names_step_host_cause_and_remedy(run_program):
    error = {
        "step": "ask Docker",
        "cause": "Cannot connect to the Docker daemon",
        "remedy": "start docker.service",
        "code": "cannot-tell",
    }
    answer = {"stdout": json.dumps({"ok": False, "error": error}), "stderr": ""}
    with pytest.raises(HostError) as refusal:
        read(run_program, answer, **SSH)
    text = str(refusal.value)
    for part in ("ask Docker", "host p510.lan", "Cannot connect", "start docker.service"):
        assert part in text


def test_an_unreachable_host_is_one_error_with_the_way_to_check_it(run_program):
    class Refusal(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNKNOWN

        def details(self) -> str:
            return "ssh: connect to host p510.lan port 22: No route to host"

    def refuse(_: Any) -> dict[str, Any]:
        raise Refusal

    with pytest.raises(HostError) as refusal:
        read(run_program, refuse, **SSH)
    assert "No route to host" in str(refusal.value)
    assert "root@p510.lan python3 --version" in str(refusal.value)


def test_output_that_is_no_result_is_told_as_such(run_program):
    with pytest.raises(HostError, match="no JSON result"):
        read(run_program, {"stdout": "Welcome to p510!", "stderr": ""})


def test_readings_ask_the_host_once_a_round_and_get_their_own_results(monkeypatch):
    rounds = []

    def answers(_: Connection, questions: list[tuple[list[str], int]]) -> list[dict[str, Any]]:
        rounds.append([verb for verb, _ in questions])
        return [{"seen": spec} for _, spec in questions]

    def twice() -> Any:
        first = yield from ask(["first"], {"of": "twice"})
        second = yield from ask(["second"], {"of": "twice"})
        return [first["seen"], second["seen"]]

    def nothing() -> Any:
        return None
        yield

    def both() -> Any:
        return (yield [(["a"], {"of": "both"}), (["b"], {"of": "both"})])

    monkeypatch.setattr(Connection, "answers", answers)
    read = connection().read(
        together(twice(), nothing(), together(both(), ask(["c"], {"of": "c"})))
    )
    assert read == (
        [{"of": "twice"}, {"of": "twice"}],
        None,
        ([{"seen": {"of": "both"}}, {"seen": {"of": "both"}}], {"seen": {"of": "c"}}),
    )
    assert rounds == [[["first"], ["a"], ["b"], ["c"]], [["second"]]]


def test_all_that_refuse_are_named_at_once_and_the_same_once(run_program):
    def refusal(step: str) -> str:
        error = {"step": step, "cause": "no route", "remedy": "a way", "code": "cannot-tell"}
        return json.dumps({"ok": False, "error": error})

    lines = [refusal("ask Docker"), refusal("ask Docker"), json.dumps({"ok": True}), refusal("git")]
    with pytest.raises(HostError) as raised:
        run_program(
            lambda: connection().answers([(["k3d", "inspect"], {})] * 4),
            calls={"command:local:run": {"stdout": "\n".join(lines), "stderr": ""}},
        )
    assert str(raised.value).count("ask Docker on this machine failed") == 1
    assert "git on this machine failed" in str(raised.value)
