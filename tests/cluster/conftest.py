"""Fixtures of the tests that run hostctl on a real Docker: see README.md."""

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from setup import cluster
from setup.cache import SetupError
from tests.cluster.engine import CLUSTER_SPEC, Engine, engine
from tests.cluster.host import Host

REQUIRED = "HOMELAB_CLUSTER_TESTS_REQUIRED"
CHECKOUT = Path(__file__).resolve().parents[2]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in the last lines why these tests were not run."""
    skipped = [
        report.longrepr[2]
        for report in terminalreporter.stats.get("skipped", [])
        if report.nodeid.startswith("tests/cluster/") and isinstance(report.longrepr, tuple)
    ]
    for reason in dict.fromkeys(skipped):
        terminalreporter.write_line(f"tests/cluster was not run: {reason}")


@pytest.fixture(scope="session")
def session_engine() -> Iterator[Engine]:
    """One Docker engine for all tests of this process, with the stand-in's image."""
    try:
        rig = cluster.resolve()
    except SetupError as error:
        reason = f"no Docker engine can be started here: {error}"
        # Where it must be there, as in .ci/run, its absence is no reason to skip.
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(reason)
    with engine(rig) as one:
        yield one


@pytest.fixture
def docker(session_engine: Engine) -> Iterator[Engine]:
    """The engine, running and empty; what the test leaves there is removed."""
    session_engine.start()
    session_engine.clean()
    yield session_engine
    session_engine.start()
    session_engine.clean()


@pytest.fixture
def host(docker: Engine) -> Host:
    """An empty host with hostctl."""
    return Host(docker)


@pytest.fixture
def spec() -> dict[str, Any]:
    """A ClusterSpec: that of p510, whose storage directory may be a small disk's."""
    return copy.deepcopy(CLUSTER_SPEC)


@pytest.fixture
def network(docker: Engine, spec: dict[str, Any]) -> str:
    """The Docker network of a cluster of one server, which the stack makes before it."""
    return docker.docker(
        "network", "create", "--subnet", spec["network"]["subnet"], "--gateway", "172.30.0.1",
        spec["network"]["name"],
    )  # fmt: skip
