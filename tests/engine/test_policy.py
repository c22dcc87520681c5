"""The policy pack under the real engine: what `pulumi preview --policy-pack policy` says."""

import pytest

from rehearsal.run import CHECKOUT, Rehearsal, Run
from tests.engine.conftest import planned

pytestmark = pytest.mark.engine

PACK = ("--policy-pack", str(CHECKOUT / "policy"))


def violations(run: Run) -> set[tuple[str, str, str]]:
    """(level, guard, name of the resource) of each."""
    events = [event.policy_event for event in run.events if event.policy_event]
    return {
        (event.enforcement_level, event.policy_name, (event.resource_urn or "").rpartition("::")[2])
        for event in events
    }


def test_p510_is_let_pass_without_a_word_before_and_after_its_first_up(tmp_path):
    p510 = Rehearsal(tmp_path, "p510")
    preview = p510.preview(*PACK)
    assert violations(preview) == set()
    assert "can't be known during preview" not in preview.stdout
    assert violations(p510.up(*PACK)) == set()


def test_a_namespace_that_takes_privileged_pods_is_advised_against(p510):
    with p510.edited() as settings:
        settings["namespaces"] = {"factory": {"podSecurity": {"enforce": "privileged"}}}
    preview = p510.preview(*PACK)
    assert violations(preview) == {("advisory", "namespaces-have-pod-security", "factory")}
    assert planned(preview) == {"update Namespace factory"}


def test_a_preview_fails_when_something_that_lasts_loses_its_protection(p510):
    with p510.edited() as settings:
        settings["tunnels"]["p510"]["delete"] = "p510"
    assert p510.preview().code == 0
    preview = p510.preview(*PACK, check=False)
    assert preview.code != 0
    assert violations(preview) == {("mandatory", "what-lasts-is-protected", "p510")}
    assert "tunnel p510 is not protected: remove its `delete` from the settings" in preview.stdout


def test_a_pack_that_does_not_start_fails_the_run_with_its_own_words(p510, tmp_path):
    pack = tmp_path / "pack"
    pack.mkdir()
    venv = CHECKOUT / ".venv"
    (pack / "PulumiPolicy.yaml").write_text(
        f"runtime: {{name: python, options: {{virtualenv: {venv}}}}}\n"
    )
    (pack / "__main__.py").write_text("raise SystemExit('this pack is broken')\n")
    run = p510.preview("--policy-pack", str(pack), check=False)
    assert run.code != 0
    assert "this pack is broken" in run.stdout + run.stderr
