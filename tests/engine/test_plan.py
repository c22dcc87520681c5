"""`preview --save-plan` and `up --plan`: what is applied is the commit that was previewed, or none.

The engine holds an update to its plan and tells the program nothing of it. So the plan refuses a
commit other than the one previewed, and `homelab:argocd.commit` is how that one is still applied
when the branch has moved on.
"""

import json
from pathlib import Path

import pytest

from rehearsal.run import Rehearsal, Run

pytestmark = pytest.mark.engine

REPOSITORY = "https://git.example.org/gitops"
FIRST, SECOND, THIRD = "1" * 40, "2" * 40, "3" * 40


class Platform:
    """A stack with ArgoCD, the branch that it follows, and a plan."""

    def __init__(self, directory: Path) -> None:
        self.git = directory / "world" / "machine" / "git.json"
        self.plan = str(directory / "plan.json")
        self.rehearsal = Rehearsal(directory, "dev", config=self.config())

    def config(self, **argocd: str) -> dict[str, dict[str, str]]:
        return {
            "cluster": {"image": "rancher/k3s:v1.31.5-k3s1"},
            "argocd": {"repository": REPOSITORY, **argocd},
        }

    def pin(self, commit: str) -> None:
        self.rehearsal.set_config(self.config(commit=commit))

    def push(self, commit: str) -> None:
        self.git.parent.mkdir(parents=True, exist_ok=True)
        self.git.write_text(json.dumps({REPOSITORY: {"refs": {"refs/heads/main": commit}}}))

    def preview(self) -> Run:
        return self.rehearsal.preview("--save-plan", self.plan)

    def up(self, *, check: bool = True) -> Run:
        return self.rehearsal.up("--plan", self.plan, check=check)

    def applied(self) -> str:
        """The commit that the host last applied, and the stack's output says."""
        output = self.rehearsal.outputs()["argocd"]["commit"]
        bootstrap = next(
            resource
            for resource in self.rehearsal.resources()
            if resource["urn"].endswith("::bootstrap")
        )
        assert json.loads(bootstrap["outputs"]["stdout"])["commit"] == output
        return output


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    """Brought up at the first commit, by a plan that was made while there was nothing."""
    platform = Platform(tmp_path_factory.mktemp("plan"))
    platform.push(FIRST)
    platform.preview()
    platform.up()
    return platform


def test_a_plan_made_before_there_was_anything_brings_the_stack_up(platform):
    assert platform.applied() == FIRST
    assert platform.rehearsal.up("--expect-no-changes").changes == {}


def test_a_plan_applies_the_commit_that_was_previewed_or_none(platform):
    platform.push(SECOND)
    preview = platform.preview()
    assert f"main moves from {FIRST} to {SECOND}" in preview.stdout
    assert preview.changes == {"update": 1}

    # The branch moves on between preview and up.
    platform.push(THIRD)
    refused = platform.up(check=False)
    assert refused.code != 0
    assert refused.changes == {}
    violated = next(text for text in refused.diagnostics if "violates plan" in text)
    assert SECOND in violated
    assert THIRD in violated
    assert platform.applied() == FIRST

    # The plan still stands; the settings name the commit that it was made for.
    platform.pin(SECOND)
    applied = platform.up()
    assert applied.changes == {"update": 1}
    assert platform.applied() == SECOND
    assert platform.rehearsal.up("--expect-no-changes").changes == {}

    # A plan for one commit lets no other pass that the settings name either.
    platform.pin(FIRST)
    platform.preview()
    platform.pin(THIRD)
    assert platform.up(check=False).code != 0
    assert platform.applied() == SECOND


def test_a_plan_applies_the_previewed_commit_of_a_branch_that_stood_still(platform):
    platform.rehearsal.set_config(platform.config())
    platform.push("4" * 40)
    platform.preview()
    assert platform.up().changes == {"update": 1}
    assert platform.applied() == "4" * 40


def test_a_first_plan_of_a_whole_host_brings_it_up(tmp_path):
    """No input may be foretold by a provider that makes it up anew in the run that follows."""
    rehearsal = Rehearsal(tmp_path, "p510")
    plan = str(tmp_path / "plan.json")
    rehearsal.preview("--save-plan", plan)
    rehearsal.up("--plan", plan)
    assert rehearsal.up("--expect-no-changes").changes == {}
