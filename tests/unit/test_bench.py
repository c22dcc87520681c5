"""The benchmarks judge rightly, see all processes, and seed what an `up` would have left."""

import json
import subprocess
import sys

import pytest

from bench.figure import Figure, table
from bench.growth import _slopes
from bench.larger import larger, name, p510
from bench.seed import Repeat
from bench.usage import Usage, measure
from components.settings import Settings


def test_a_figure_above_its_target_is_missed():
    assert Figure("a", 1.3, 1.3).met
    assert not Figure("a", 1.31, 1.3).met
    assert Figure("a", 99).met
    assert [line.split()[-1] for line in table([Figure("a", 2, 1)]).splitlines()[1:]] == ["MISSED"]


def test_processes_of_processes_are_measured():
    burn = "import time\nb = bytearray(40 << 20)\nwhile time.process_time() < 0.6: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])"
    usage = measure(lambda: subprocess.run([sys.executable, "-c", child], check=True), memory=True)
    assert usage.cpu >= 0.6
    assert usage.memory >= 40 << 20


def test_what_is_named_after_the_one_stands_once_for_each():
    state = {
        "resources": [
            {"urn": "stack", "dependencies": []},
            {"urn": "urn::bench-00001", "id": "f00d", "inputs": {"name": "bench-00001"}},
            {
                "urn": "urn::rollout",
                "inputs": {"stdin": json.dumps({"secrets": {"z": 1, "bench-00001": 2, "a": 3}})},
                "dependencies": ["urn::z", "urn::bench-00001", "urn::a"],
            },
        ]
    }
    stack, first, second, rollout = Repeat(2, ["f00d"]).inside(state)["resources"]
    assert stack == {"urn": "stack", "dependencies": []}
    assert first["id"] == "f00d"
    assert second["urn"] == "urn::bench-00002"
    assert second["inputs"] == {"name": "bench-00002"}
    assert second["id"] not in ("f00d", "bench-00002")
    assert rollout["dependencies"] == ["urn::z", "urn::bench-00001", "urn::bench-00002", "urn::a"]
    secrets = json.loads(rollout["inputs"]["stdin"])["secrets"]
    assert list(secrets.items()) == [("z", 1), ("bench-00001", 2), ("bench-00002", 2), ("a", 3)]


def test_a_larger_stack_has_exactly_so_much_more():
    def settings(**more: int) -> Settings:
        config = larger(p510(), **more)
        return Settings.model_validate({k.removeprefix("homelab:"): v for k, v in config.items()})

    small, large = settings(), settings(secrets=3, routes=4)
    added = {s.name for s in large.declared_secrets()} - {s.name for s in small.declared_secrets()}
    assert added == {name(number) for number in (1, 2, 3)}
    routes = [route.hostname for route in large.tunnels["factory"].routes]
    assert len(routes) - len(small.tunnels["factory"].routes) == 4
    assert routes[-1] == f"{name(4)}.example.org"


def test_the_cost_of_a_resource_is_the_difference_between_two_sizes():
    usages = {50: [Usage(0, 6)], 500: [Usage(0, 15)], 5000: [Usage(0, 195)]}
    slopes = _slopes(usages, lambda usage: usage.cpu)
    assert slopes == {(50, 500): pytest.approx(0.01), (500, 5000): pytest.approx(0.02)}
