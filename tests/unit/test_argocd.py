"""ArgoCD's bootstrap: the commit is the input; an unreachable repository keeps what is applied;
nothing is ever deleted.
"""

import json
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import pytest

from components import settings
from components.argocd import ArgoCD, ArgoCDArgs, Revision
from components.cluster import Cluster
from components.host import Connection, Host

OLD, NEW = "a" * 40, "b" * 40
REPOSITORY = "https://github.com/example/gitops"


def declared(**rest: Any) -> settings.ArgoCD:
    return settings.ArgoCD.model_validate({"repository": REPOSITORY, **rest}, by_name=True)


@pytest.fixture
def revision(run_program, monkeypatch):
    def run(**answer: Any) -> Revision:
        facts = {"state": "resolved", "commit": NEW, "detail": "", "applied": {"commit": OLD}}
        monkeypatch.setattr(Connection, "answers", lambda *_: [{**facts, **answer}])
        seen: list[Revision | None] = []
        run_program(
            lambda: seen.append(
                Connection(settings.Host()).read(Revision.read(declared(), "factory"))
            )
        )
        assert seen[0]
        return seen[0]

    return run


def test_the_preview_shows_the_commit_it_moves_from_and_to(revision, caplog):
    caplog.set_level("INFO")
    assert revision() == Revision(NEW)
    assert f"main moves from {OLD} to {NEW}" in caplog.text


def test_nothing_is_said_when_nothing_moves(revision, caplog):
    caplog.set_level("INFO")
    assert revision(commit=OLD) == Revision(OLD)
    assert caplog.text == ""


@pytest.mark.parametrize("state", ["unreachable", "no-such-ref"])
def test_an_unreachable_repository_warns_and_keeps_what_is_applied(revision, caplog, state):
    assert revision(state=state, commit=None, detail="could not resolve host") == Revision(OLD)
    assert f"{REPOSITORY} at main: could not resolve host; commit {OLD} stays" in caplog.text


def test_a_repository_that_never_was_there_applies_nothing(revision, caplog):
    assert revision(state="unreachable", commit=None, applied=None) == Revision(None)
    assert "nothing is applied" in caplog.text


def register(run_program, commit: str | None, **rest: Any):
    def program() -> None:
        host = Host("p510", Connection(settings.Host()))
        identity = host.command("identity", ["k3d", "identity"], {}, opts=pulumi.ResourceOptions())
        provider = kubernetes.Provider("kubernetes")
        cluster = Cluster("factory", provider, identity, "/etc/k3d/kubeconfig", host, "0a1b2c3d-1")
        first = kubernetes.core.v1.Namespace("argocd")
        ArgoCD("factory", ArgoCDArgs(declared(**rest), Revision(commit), cluster, [first]))

    return run_program(program)


def test_the_commit_is_applied_on_the_host_and_never_deleted(run_program):
    bootstrap = register(run_program, NEW)["Command", "bootstrap"]
    assert json.loads(bootstrap.inputs["stdin"]) == {
        "cluster": "factory",
        "kubeconfig": "/etc/k3d/kubeconfig",
        "repository": REPOSITORY,
        "path": "bootstrap",
        "commit": NEW,
        "namespace": "argocd",
    }
    assert "delete" not in bootstrap.inputs
    assert bootstrap.inputs["triggers"] == ["0a1b2c3d-1"]
    assert ("Namespace", "argocd") in bootstrap.depends_on


def test_a_moved_ref_with_the_same_commit_changes_nothing(run_program):
    """A saved plan holds the commit: `ref` may move, the plan refuses any other commit than the one
    previewed.
    """
    main = register(run_program, NEW)["Command", "bootstrap"].inputs
    assert register(run_program, NEW, ref="v1.2.3")["Command", "bootstrap"].inputs == main


def test_without_a_commit_there_is_nothing_to_apply(run_program):
    resources = register(run_program, None)
    assert resources.names("Command") == ["hostctl", "identity"]
    assert resources["ArgoCD", "factory"].outputs == {
        "output": {"repository": REPOSITORY, "ref": "main", "commit": None, "url": None}
    }
