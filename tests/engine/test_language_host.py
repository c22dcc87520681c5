"""Programs under the real engine: what the language host (the official one or ours) owes them."""

import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest

from rehearsal.run import Rehearsal, RehearsalError, Secret

pytestmark = pytest.mark.engine

PROJECT = "name: tiny\nruntime: {name: python, options: {toolchain: uv, virtualenv: .venv}}\n"


@pytest.fixture
def rehearse(tmp_path):
    """A rehearsal of a program given as text."""

    def made(program: str, **config) -> Rehearsal:
        directory = tmp_path / "program"
        directory.mkdir()
        (directory / "Pulumi.yaml").write_text(PROJECT)
        (directory / "__main__.py").write_text("import pulumi\n" + textwrap.dedent(program))
        return Rehearsal(tmp_path / "rehearsal", "dev", config=config, program=directory)

    return made


def test_the_program_runs_in_its_directory_under_the_python_of_its_environment(rehearse):
    rehearsal = rehearse(
        """
        import os, sys
        pulumi.export("where", [os.getcwd(), sys.prefix, os.environ["VIRTUAL_ENV"]])
        names = [pulumi.get_project(), pulumi.get_stack(), pulumi.get_organization()]
        pulumi.export("names", names)
        """
    )
    rehearsal.up()
    assert rehearsal.outputs() == {
        "where": [str(rehearsal.program), sys.prefix, sys.prefix],
        "names": ["tiny", "dev", "organization"],
    }


def test_configuration_and_its_secrets_arrive(rehearse):
    rehearsal = rehearse(
        """
        config = pulumi.Config()
        pulumi.export("token", config.require_secret("token"))
        pulumi.export("cluster", config.require_secret_object("cluster"))
        """,
        token=Secret("t=0\np"),
        cluster={"name": "factory", "keys": [1, {".dockerconfigjson": Secret('{"a": 1}')}]},
    )
    rehearsal.up()
    expected = {
        "token": "t=0\np",
        "cluster": {"name": "factory", "keys": [1, {".dockerconfigjson": '{"a": 1}'}]},
    }
    assert rehearsal.outputs() == expected
    assert rehearsal.outputs(show_secrets=False) == {"token": "[secret]", "cluster": "[secret]"}
    stack_file = (rehearsal.directory / "project" / "Pulumi.dev.yaml").read_text()
    assert "t=0" not in stack_file
    assert stack_file.count("secure:") == 2


def test_a_preview_is_one_and_the_second_up_changes_nothing(rehearse):
    rehearsal = rehearse(
        """
        class Part(pulumi.ComponentResource):
            def __init__(self):
                super().__init__("tiny:index:Part", "part")
                self.register_outputs({})

        Part()
        print("preview" if pulumi.runtime.is_dry_run() else "for real", flush=True)
        """
    )
    preview = rehearsal.preview()
    assert preview.changes == {"create": 2}
    assert "preview" in preview.stdout
    assert rehearsal.resources() == []
    up = rehearsal.up()
    assert up.changes == {"create": 2}
    assert "for real" in up.stdout
    assert [resource["type"] for resource in rehearsal.resources()] == ["tiny:index:Part"]
    assert rehearsal.up("--expect-no-changes").changes == {}
    state = rehearsal.export()
    assert rehearsal.destroy().changes == {"delete": 2}
    rehearsal.import_(state)
    assert len(rehearsal.resources()) == 1


def test_an_unhandled_exception_is_shown_once_from_the_program_on(rehearse):
    rehearsal = rehearse(
        """
        def broken():
            raise ValueError("no such thing")

        broken()
        """
    )
    with pytest.raises(RehearsalError) as raised:
        rehearsal.preview()
    (problem,) = raised.value.run.diagnostics
    assert problem.startswith("error: Program failed with an unhandled exception:\nTraceback")
    assert problem.endswith("ValueError: no such thing")
    assert problem.count("File ") == 2


def test_an_error_of_the_run_is_shown_without_a_traceback(rehearse):
    run = rehearse('raise pulumi.RunError("settings: 2 errors")').preview(check=False)
    assert run.code != 0
    assert run.diagnostics[0] == "error: settings: 2 errors"
    assert "Traceback" not in run.stdout


def test_an_exit_of_the_program_itself_is_an_error(rehearse):
    run = rehearse("import sys; sys.exit(3)").preview(check=False)
    assert run.code != 0
    assert "program exited with non-zero exit code: 3" in run.stdout


def test_a_rehearsal_inherits_nothing_of_the_users_access(rehearse, monkeypatch):
    for name in ("KUBECONFIG", "DOCKER_HOST", "CLOUDFLARE_API_TOKEN", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "the user's")
    monkeypatch.setenv("PULUMI_BACKEND_URL", "file:///nowhere")
    rehearsal = rehearse(
        """
        import os
        pulumi.export("theirs", [name for name in os.environ if os.environ[name] == "the user's"])
        pulumi.export("rehearsal", os.environ["HOMELAB_REHEARSAL"])
        """
    )
    rehearsal.up()
    assert rehearsal.outputs() == {"theirs": [], "rehearsal": str(rehearsal.directory)}


def test_the_program_directory_is_left_as_it_was(rehearse):
    rehearsal = rehearse("pulumi.export('a', 1)", token=Secret("x"))
    rehearsal.up()
    left = {path.name for path in rehearsal.program.iterdir()} - {"__pycache__"}
    assert left == {"Pulumi.yaml", "__main__.py"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_engine(rehearse, tmp_path, how):
    rehearsal = rehearse(
        f"""
        import os, time
        with open({str(tmp_path / "pids")!r}, "w") as file:
            file.write(f"{{os.getpid()}} {{os.getppid()}}")
        pulumi.ComponentResource("tiny:index:Part", "part")
        time.sleep(3)
        """
    )
    engine = rehearsal.start("up", "--yes", "--skip-preview")
    pids = wait_for(
        lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split()
    )
    engine.send_signal(how)
    engine.communicate(timeout=60)
    wait_for(lambda: not any(Path("/proc", pid).exists() for pid in pids) or None)


def wait_for(seen, seconds=30):
    end = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < end, "not seen in time"
        time.sleep(0.1)
    return found
