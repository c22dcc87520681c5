"""Hostile settings: refused as settings, or taken and never part of what a shell reads.

Each stack file, each page of the documentation that shows settings, and each valid fixture is
changed place by place. `make test` runs a sample, `make fuzz` tens of thousands.
"""

import copy
import io
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pulumi
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.settings import Settings, SettingsError
from components.settings.fleet import Stack, collisions
from components.settings.model import Number, Text
from components.settings.problem import key_path
from components.settings.validation import _Node
from hostctl import cli
from rehearsal.providers.command import parse
from tests.fuzz.hostile import Place, at, examples, mutated, places
from tests.unit import test_docs, test_settings
from tests.unit.program import STACKS, Program

SOURCES: dict[str, Any] = {
    **{path.name: test_settings.complete(path) for path in test_settings.STACK_FILES},
    **{page: test_docs.example(page) for page in test_docs.PAGES},
    **{
        file.stem: test_settings.config_of(file.read_text())
        for file in sorted((test_settings.FIXTURES / "valid").glob("*.yaml"))
    },
}
PLACES = {name: list(places(config)) for name, config in SOURCES.items()}


def node_at(config: Any, path: Place) -> _Node | None:
    """What the model says of a place of a stack file."""
    node: _Node | None = _Node(Settings)
    for depth, key in enumerate(path):
        node = node.child(key) if node else None
        if node and node.is_choice:
            value = at(config, path[: depth + 1])
            node = node.child(value.get("kind", "k3d")) if isinstance(value, dict) else None
    return node


@cache
def well_formed(name: str) -> list[tuple[Place, st.SearchStrategy[Any]]]:
    """The places of a source whose rule is known, each with all that the rule takes."""
    found: list[tuple[Place, st.SearchStrategy[Any]]] = []
    for path in PLACES[name]:
        node = node_at(SOURCES[name], path)
        rule = node.rule if node else None
        if isinstance(rule, Text):
            found.append((path, st.from_regex(rule.pattern, fullmatch=True)))
        elif isinstance(rule, Number):
            ends = st.sampled_from([rule.low, rule.low + 1, rule.high])
            found.append((path, ends | st.integers(rule.low, rule.high)))
    return found


def refusal(config: Any) -> SettingsError | None:
    """Why settings are refused; None of those that are taken, after all that is made of them
    without a host."""
    try:
        stack = Settings.model_validate(config, by_alias=True, by_name=False)
    except SettingsError as error:
        return error
    force = stack.in_force
    assert all(isinstance(warning, str) for warning in stack.warnings)
    assert force.declared_namespaces().keys() >= {s.namespace for s in force.declared_secrets()} - {
        *("default", "kube-system", "kube-public", "kube-node-lease")
    }
    assert stack.host.docker
    assert repr(stack)
    collisions(Stack.of("one", stack), Stack.of("two", stack))
    return None


def check(config: Any) -> None:
    """Whatever the settings, only a SettingsError comes out, and a terminal can show it."""
    error = refusal(config)
    if error is None:
        return
    assert error.problems
    lines = str(error).splitlines()
    assert len(lines) == 1 + len(error.problems)
    assert all(line.isprintable() and len(line) < 2000 for line in lines), lines
    str(error).encode()
    for problem in error.problems:
        # What a person pastes into a shell is that command and no other.
        if problem.remedy.startswith("pulumi config set "):
            words = shlex.shlex(problem.remedy, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            path = key_path(problem.path)
            command = [word for word, _ in zip(words, range(6), strict=False)]
            assert command[command.index("--path") + 1] == path, problem.remedy


@examples(1500)
@given(data=st.data())
def test_no_settings_end_in_anything_but_their_own_refusal(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SOURCES)))
    check(data.draw(mutated(SOURCES[name], PLACES[name])))


@examples(400)
@given(data=st.data())
def test_whatever_each_rule_takes_is_taken_or_refused_as_a_whole(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SOURCES)))
    config = copy.deepcopy(SOURCES[name])
    for path, values in data.draw(
        st.lists(st.sampled_from(well_formed(name)), min_size=1, max_size=4)
    ):
        at(config, path[:-1])[path[-1]] = data.draw(values)
    check(config)


def test_every_setting_is_fuzzed() -> None:
    reached = {str(key) for paths in PLACES.values() for path in paths for key in path}
    # In the place of another, in a comment of a page.
    missing = {key for _, key in test_docs.fields(Settings)} - reached - {"value", "content"}
    assert missing == set()


# The whole program


@pytest.fixture(scope="module")
def programs() -> Iterator[list[tuple[Program, set[str]]]]:
    """Each stack's program, and the scripts that it has as it is."""
    with tempfile.TemporaryDirectory(prefix="homelab-fuzz-") as directory:
        found = [Program(Path(directory) / stack, stack) for stack in STACKS]
        yield [(program, check_lines(program)) for program in found if program.registered()]


def scripts(value: Any) -> set[str]:
    """What shells are given to run: the word after -c, in any list of words."""
    if isinstance(value, dict):
        return set().union(*map(scripts, value.values()))
    if not isinstance(value, list):
        return set()
    here = {str(b) for a, b in pairwise(value) if a in ("-c", "-ec", "-lc")}
    return here.union(*map(scripts, value))


def check_lines(program: Program) -> set[str]:
    """Each command line is one that calls hostctl and names nothing of the settings but how to get
    there. Returns the scripts that containers are given."""
    found: set[str] = set()
    for (kind, _), resource in program.seen.items():
        if kind == "Command":
            for key in ("create", "update", "delete"):
                if line := resource.inputs.get(key):
                    call = parse(line)
                    assert call.how == "install" or call.arguments in cli.VERBS, line
        else:
            found |= scripts(resource.inputs)
    return found


def run(program: Program, config: Any) -> bool:
    """Whether the program takes a config; one that it refuses registers nothing."""
    refused = ""
    try:
        with redirect_stderr(io.StringIO()):
            program.registered(config)
    except pulumi.RunError as error:
        refused = str(error)
    assert "Traceback" not in refused
    assert not (refused and program.seen), f"{list(program.seen)[:3]} came before: {refused}"
    return not refused


@examples(25)
@given(data=st.data())
def test_no_accepted_setting_is_read_by_a_shell(
    programs: list[tuple[Program, set[str]]], data: st.DataObject
) -> None:
    program, known = data.draw(st.sampled_from(programs))
    config = {key.removeprefix("homelab:"): value for key, value in program.given.items()}
    if data.draw(st.booleans()):
        config = data.draw(mutated(config, list(places(config))))
    else:
        path, values = data.draw(st.sampled_from(well_formed(f"Pulumi.{program.stack}.yaml")))
        config = copy.deepcopy(config)
        at(config, path[:-1])[path[-1]] = data.draw(values)
    if run(program, {f"homelab:{key}": value for key, value in config.items()}):
        assert check_lines(program) <= known
