"""The command line of a move: what it refuses, before a host is touched and by a host's word."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from components import host, move

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What each hostctl verb answers, by verb; `asked` lists the verbs and their hosts."""
    answers: dict[str, Any] = {"asked": []}

    def run(line: str, **options: Any) -> Any:
        name, _, verb = line.partition(" ")
        answers["asked"].append((verb, name, json.loads(options["input"])))
        text = answers[verb] if isinstance(answers[verb], str) else json.dumps(answers[verb])
        return type("Done", (), {"stdout": text, "returncode": 3})()

    class Place:
        def __init__(self, settings: Any) -> None:
            self.name = settings.address or settings.name or "this machine"

        def installed(self, verb: Any) -> str:
            return f"{self.name.replace(' ', '-')} {verb[-1]}"

    monkeypatch.setattr(host, "Connection", Place)
    monkeypatch.setattr(move.subprocess, "run", run)
    return answers


def moved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: str
) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["move", *argv])
    code = move.main()
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["p510", "gone"], "Pulumi.gone.yaml cannot be read"),
        (["p510", "tower"], "cluster tower is not k3d's: it cannot move"),
        (["metal", "p620"], "cluster metal is not k3d's: it cannot move"),
        (["p620", "p510"], "write name: factory and movedFrom: p620 there"),
        (["truenas", "p620"], "write name: truenas and movedFrom: truenas there"),
        (["p510", "p510"], "write name: factory and movedFrom: p510 there"),
    ],
)
def test_a_move_that_the_settings_do_not_await_reaches_no_host(
    hosts: Any, capsys: Any, monkeypatch: Any, argv: list[str], said: str
) -> None:
    code, told = moved(capsys, monkeypatch, *argv)
    assert code == 1
    assert said in told
    assert hosts["asked"] == []


def test_without_both_stacks_the_usage_is_told(hosts: Any, capsys: Any, monkeypatch: Any) -> None:
    with pytest.raises(SystemExit) as refused:
        moved(capsys, monkeypatch, "p510")
    assert refused.value.code == 2
    assert "new" in capsys.readouterr().err
    assert hosts["asked"] == []


@pytest.mark.parametrize("argv", [["p510", "p620"], ["p510", "p620", "--back"]])
def test_what_a_host_refuses_ends_the_move_with_its_cause_and_remedy(
    hosts: Any, capsys: Any, monkeypatch: Any, argv: list[str]
) -> None:
    first = "withdraw" if "--back" in argv else "freeze"
    error = {"step": "withdrawing factory", "cause": "its API answers", "remedy": "stop it"}
    hosts[first] = {"ok": False, "error": error}
    code, told = moved(capsys, monkeypatch, *argv)
    assert code == 1
    for text in error.values():
        assert text in told
    # What would start the cluster on the other host is not asked for.
    assert [verb for verb, *_ in hosts["asked"]] == [first]


def test_a_host_without_this_hostctl_is_told_how_it_gets_it(
    hosts: Any, capsys: Any, monkeypatch: Any
) -> None:
    hosts["freeze"] = "sh: hostctl: not found\n"
    code, told = moved(capsys, monkeypatch, "p510", "p620")
    assert code == 1
    assert "exit code 3" in told
    assert "bring both stacks up once" in told


def test_the_connectors_of_both_stacks_are_stopped_with_the_cluster(
    hosts: Any, capsys: Any, monkeypatch: Any
) -> None:
    files: list[Any] = []
    hosts["freeze"] = {"ok": True, "nonce": "n", "files": files, "directory": "/mnt/x"}
    hosts["receive"] = {"ok": True, "have": {}, "directory": "/mnt/y"}
    hosts["import"] = {"ok": True, "identity": "factory-0123456789abcdef"}
    code, told = moved(capsys, monkeypatch, "p510", "p620")
    assert code == 0
    assert "factory-0123456789abcdef is imported" in told
    freeze = hosts["asked"][0][2]
    assert freeze["name"] == "factory"
    connector = {"namespace": "factory", "deployment": "cloudflared-factory"}
    assert freeze["connectors"] == [connector]
    assert [verb for verb, *_ in hosts["asked"]] == ["freeze", "receive", "import"]


def test_the_way_back_says_where_the_new_hosts_data_is_kept(
    hosts: Any, capsys: Any, monkeypatch: Any
) -> None:
    hosts["withdraw"] = {"ok": True, "kept": ["/mnt/p620/kept"]}
    hosts["back"] = {"ok": True}
    code, told = moved(capsys, monkeypatch, "p510", "p620", "--back")
    assert code == 0
    assert "/mnt/p620/kept" in told
    assert hosts["asked"][1][2] == {"name": "factory", "confirm": "factory"}
