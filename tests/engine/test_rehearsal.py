"""A rehearsal is never taken for a real run, leaves no trace outside, and fails where one would."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rehearsal.run import CHECKOUT, PLUGINS, Rehearsal, Secret
from setup import cache
from tests.engine.conftest import errors, planned

pytestmark = pytest.mark.engine

CONFIG = {
    "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
    "secrets": {"apps": {"login": {"data": {"password": Secret("made up")}}}},
}

SWINGING = """
import time, pulumi_docker as docker
provider = docker.Provider("docker", host="unix:///var/run/docker.sock")
image = f"example/never:the-same-{time.time_ns()}"
docker.RemoteImage("image", name=image, opts=pulumi.ResourceOptions(provider=provider))
"""


# A stand-in never serves a real run.


@pytest.mark.parametrize("marker", [None, "", "/nowhere"])
@pytest.mark.parametrize("plugin", sorted(path.name for path in PLUGINS.iterdir()))
def test_a_stand_in_without_the_marker_of_a_rehearsal_refuses_to_start(plugin, marker):
    environment = {"PATH": os.environ["PATH"], "HOMELAB_REHEARSAL_PYTHON": sys.executable}
    if marker is not None:
        environment["HOMELAB_REHEARSAL"] = marker
    ran = subprocess.run(
        [PLUGINS / plugin, "127.0.0.1:1"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert re.fullmatch(rf"{plugin}: this is the stand-in of a rehearsal.*\n", ran.stderr)


def test_there_is_a_stand_in_for_each_provider_of_the_platform():
    names = {path.name.removeprefix("pulumi-resource-") for path in PLUGINS.iterdir()}
    assert names == {"command", "docker", "kubernetes", "cloudflare"}


@pytest.mark.parametrize("command", ["preview", "up"])
def test_a_real_run_that_finds_the_stand_ins_on_path_fails_and_makes_nothing(tmp_path, command):
    leaked = Rehearsal(tmp_path, "dev", config=CONFIG, environment={"HOMELAB_REHEARSAL": ""})
    run = getattr(leaked, command)(check=False)
    assert run.code != 0
    assert "for a real run take rehearsal/plugins off PATH" in run.stdout
    assert not (tmp_path / "world").exists()
    assert leaked.resources() == []


# The command of `make rehearse`.


@pytest.fixture
def checkout(tmp_path):
    """The checkout once more, as Git would clone it with what is not committed yet."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    files = subprocess.check_output(listed, cwd=CHECKOUT, text=True).split("\0")
    for name in filter(None, files):
        if (CHECKOUT / name).is_file():
            target = tmp_path / "checkout" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, target)
    return tmp_path / "checkout"


def rehearse(checkout: Path, stack: str) -> subprocess.CompletedProcess[str]:
    """What `make rehearse` runs once set-up is done, by a user without anything at home."""
    beside = checkout.parent
    for name in ("home", "tmp"):
        (beside / name).mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(beside / "home"),
        "TMPDIR": str(beside / "tmp"),
        "HOMELAB_CACHE": str(cache.root()),
    }
    return subprocess.run(
        [sys.executable, "-m", "rehearsal", stack, "--directory", beside / "rehearsal"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
    )


def files(directory: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_rehearsal_of_p510_ends_with_one_line_and_touches_nothing_outside(checkout):
    before = files(checkout)
    ran = rehearse(checkout, "p510")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0] == "REHEARSAL of p510: stand-in providers, nothing real is touched"
    assert re.fullmatch(r"rehearsed p510: \d+ resources, second run 0 changes, \d+ s", lines[-1])
    for heading in ("Previewing update (p510):", "Updating (p510):", "Current stack outputs"):
        assert any(line.startswith(heading) for line in lines)
    assert files(checkout) == before
    assert files(checkout.parent / "home") == {}
    assert files(checkout.parent / "tmp") == {}


def test_a_rehearsal_whose_second_up_changes_something_fails(checkout):
    (checkout / "__main__.py").write_text("import pulumi" + SWINGING)
    (checkout / "Pulumi.swinging.yaml").write_text("config: {homelab:cluster: {}}\n")
    ran = rehearse(checkout, "swinging")
    assert ran.returncode == 1
    assert "rehearsed swinging" not in ran.stdout
    assert "pulumi up --yes --skip-preview --expect-no-changes` exited" in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_a_stack_that_is_not_there_is_named_with_those_that_are(checkout):
    ran = rehearse(checkout, "p511")
    assert ran.returncode == 1
    assert "Pulumi.p511.yaml; there are the stacks: metal, p510" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_make_rehearse_takes_the_stack_by_name_and_p510_by_default():
    def command(*arguments: str) -> str:
        return subprocess.check_output(
            ["make", "-n", "rehearse", *arguments],
            cwd=CHECKOUT,
            text=True,
            # Of a make that runs the tests nothing is inherited, such as its lines on directories.
            env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        )

    assert command().rstrip().endswith("-m rehearsal p510")
    assert command("STACK=tower").rstrip().endswith("-m rehearsal tower")


# Faults. That every step survives each of them is proved elsewhere; here, that they happen.


@pytest.fixture
def stack(tmp_path):
    return Rehearsal(tmp_path / "rehearsal", "dev", config=CONFIG)


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    """The inputs of all resources after an up that nothing went wrong in."""
    stack = Rehearsal(tmp_path_factory.mktemp("unharmed"), "dev", config=CONFIG)
    stack.up()
    return inputs(stack)


def inputs(stack: Rehearsal) -> dict[str, str]:
    """By URN. Generations count what was healed: they tell of the way and not of its end."""
    state = json.loads(stack.pulumi("stack", "export", "--show-secrets").stdout)
    return {
        resource["urn"]: re.sub(r"(generation\W+)\d+", r"\1N", json.dumps(resource.get("inputs")))
        for resource in state["deployment"]["resources"]
    }


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            {"provider": "kubernetes", "urn": "*::apps/login", "do": "fail", "message": "no space"},
            "no space",
        ),
        ({"provider": "command", "urn": "*::cluster", "do": "kill"}, "EOF"),
        ({"provider": "command", "urn": "*::cluster", "when": "after", "do": "kill"}, "EOF"),
    ],
    ids=["fails", "is killed before", "is killed after"],
)
def test_after_a_step_that_went_wrong_the_next_up_ends_where_it_would_have(
    stack, unharmed, fault, said
):
    stack.set_faults([{"method": "Create", **fault}])
    broken = stack.up(check=False)
    assert broken.code != 0
    assert said in "".join(errors(broken))
    stack.up()
    assert inputs(stack) == unharmed
    assert planned(stack.up()) == set()


def test_a_step_that_answers_late_is_waited_for(stack, unharmed):
    late = {"provider": "docker", "method": "Create", "urn": "*::network", "do": "late"}
    stack.set_faults([{**late, "seconds": 2}])
    assert stack.up().seconds > 2
    assert inputs(stack) == unharmed


def test_a_step_that_hangs_ends_when_the_run_is_interrupted(stack, unharmed):
    hang = {"provider": "kubernetes", "method": "Create", "urn": "*::apps/login", "do": "hang"}
    stack.set_faults([hang])
    engine = stack.start("up", "--yes", "--skip-preview")
    wait_for((stack.directory / "faults").exists)
    engine.send_signal(signal.SIGINT)
    stdout, _ = engine.communicate(timeout=60)
    assert engine.returncode != 0
    assert "apps/login" in stdout
    stack.up()
    assert inputs(stack) == unharmed


@pytest.mark.parametrize(
    ("provider", "name", "error"),
    [
        ("kubernetes", "apps/login", 'secrets "login" already exists'),
        ("docker", "network", "network with name k3d-factory already exists"),
    ],
)
def test_what_was_made_before_the_provider_was_killed_is_reported_by_name(
    stack, provider, name, error
):
    fault = {"provider": provider, "method": "Create", "urn": f"*::{name}"}
    stack.set_faults([{**fault, "when": "after", "do": "kill"}])
    assert stack.up(check=False).code != 0
    again = stack.up(check=False)
    assert again.code != 0
    assert error in "".join(errors(again))


def wait_for(seen: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, "not seen in time"
        time.sleep(0.1)


def test_another_program_can_run_pulumi_in_a_rehearsal_that_was_prepared_for_it(tmp_path):
    directory = tmp_path / "p510"
    prepare = [sys.executable, "-m", "rehearsal", "p510", "--directory", directory, "--environment"]
    printed = subprocess.run(prepare, cwd=CHECKOUT, check=True, capture_output=True, text=True)
    environment = dict(line.split("=", 1) for line in printed.stdout.splitlines())
    preview = subprocess.run(
        ["pulumi", "preview", "--stack", "p510", "--non-interactive"],
        cwd=directory / "project",
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert preview.returncode == 0, preview.stdout + preview.stderr
    assert "rehearsal: made up values for 22 files" in preview.stdout
