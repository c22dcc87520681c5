"""hostctl under hostile specs, and on a host whose tools print anything at all.

Whatever comes in, each verb ends with one line of JSON: a result, or a failure with a code, step,
cause and remedy. `make test` runs a sample, `make fuzz` tens of thousands.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from components.settings.config import NAMESPACE
from hostctl import cli
from hostctl.k3s_node import k3s_token_digest
from hostctl.machine import Machine, Ran, TookTooLong, ToolMissing
from hostctl.protocol import EXIT_CODES
from rehearsal import existing
from rehearsal.machine import RehearsalMachine
from rehearsal.run import CHECKOUT
from tests.fuzz.hostile import ANY_TEXT, ANYTHING, TEXTS, examples, mutated, places
from tests.unit import test_hostctl, test_hostctl_k3s

METAL = yaml.safe_load((CHECKOUT / "Pulumi.metal.yaml").read_text())["config"][
    f"{NAMESPACE}cluster"
]
CONTEXT = "kubernetes-admin@kubernetes"
FILE = {"name": "storage.tar", "bytes": 10240, "sha256": "0" * 64}


class World:
    """A host with a k3d cluster, a k3s server, and the kubeconfig of a cluster of others; each verb
    runs on a copy of it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        host = test_hostctl.Host(root / "first")
        seen = host.up()
        tower = test_hostctl_k3s.Tower(root / "first")
        tower.master.up(tower.server(datastore="etcd"))
        existing.put(root / "first" / "world", METAL)
        self.specs = {verb: dict(one.example) for verb, one in cli.VERBS.items()}
        facts = {key: seen[key] for key in ("generation", "incarnation")}
        for verb in ("inspect", "doctor", "ensure"):
            self.specs["k3d", verb] |= test_hostctl.SPEC
        self.specs["k3d", "ensure"] |= facts
        self.specs["kubeconfig",] |= test_hostctl.KUBECONFIG
        self.specs["images", "import"] |= {"incarnation": seen["incarnation"]}
        kubeconfig = existing.kubeconfig(METAL).replace("text: elsewhere", f"text: {CONTEXT}")
        self.specs["cluster", "inspect"]["kubeconfig"] = kubeconfig
        self.specs["secret", "seed"] |= {"namespace": "default", "data": {"a": "bWFkZS11cA=="}}
        for verb in ("receive", "import"):
            self.specs["move", verb]["files"] = [FILE]
        server = tower.server(datastore="etcd", generation=1)
        self.specs["k3s", "ensure"] = server
        digest = {"tokenDigest": k3s_token_digest(server["token"])}
        self.specs["k3s", "inspect"] = {k: v for k, v in server.items() if k != "token"} | digest
        self.specs["k3s", "token"]["new"] = "made-up-token-that-is-new"
        for verb in ("take", "list"):
            self.specs["k3s", "snapshot", verb]["target"] = None
        for verb in ("stop", "start", "rejoin", "remove", "drain", "uncordon", "forget"):
            self.specs["k3s", verb] |= {"node": "k3s-master"}
        self._copies = 0

    def machine(self, verb: Sequence[str]) -> RehearsalMachine:
        """The machine that a verb is for, as it was in the beginning."""
        copy = self._root / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self._root / "first", copy)
        address = test_hostctl_k3s.MASTER
        of_k3s = Path("machines") / address if verb[0] == "k3s" else Path("machine")
        return RehearsalMachine(copy / "world" / of_k3s)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="homelab-fuzz-", dir=memory) as directory:
        yield World(Path(directory))


def check(
    verb: Sequence[str], stdin: str, machine: Machine, known: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    """Runs a verb, whose result is one line of JSON. Returns it.

    The cause may be a line of hostctl only where a tool printed JSON that is not ``known``.
    """
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(io.StringIO()):
        code = cli.main(list(verb), io.StringIO(stdin), machine)
    (line,) = out.getvalue().splitlines()
    answer = json.loads(line)
    assert answer["ok"] == (code == 0)
    if code:
        error = answer["error"]
        assert EXIT_CODES[error["code"]] == code
        assert all(error[key].strip() for key in ("step", "cause", "remedy")), error
        assert not (known() and "defect of hostctl" in error["remedy"]), error
        assert len(error["cause"]) < 20_000, error
    return answer


def shells(argv: Sequence[str]) -> list[str]:
    """The scripts among the words of a command."""
    return [b for a, b in pairwise(argv) if a in ("-c", "-ec")]


def heard(machine: RehearsalMachine) -> list[Sequence[str]]:
    """All commands that run on a machine from now on."""
    calls: list[Sequence[str]] = []
    run: Callable[..., Ran] = machine.run

    def listening(argv: Sequence[str], **options: Any) -> Ran:
        calls.append(argv)
        return run(argv, **options)

    machine.run = listening  # type: ignore[method-assign]
    return calls


VERBS = st.sampled_from(sorted(cli.VERBS))


@examples(400)
@given(data=st.data())
def test_no_spec_ends_in_a_traceback_or_in_a_script(world: World, data: st.DataObject) -> None:
    verb = data.draw(VERBS)
    spec = data.draw(mutated(world.specs[verb], list(places(world.specs[verb]))) | ANYTHING)
    machine = world.machine(verb)
    calls = heard(machine)
    try:
        stdin = json.dumps(spec)
    except ValueError:
        return
    check(verb, stdin, machine)
    for argv in calls:
        assert all(isinstance(word, str) and "\0" not in word for word in argv), argv
        assert not [script for script in shells(argv) if "touch /tmp/hostile" in script]
        # Where a program takes options, no value of a spec is one.
        assert not [
            word for word in argv if word in ("--help", "-oProxyCommand=touch /tmp/hostile")
        ]


@examples(50)
@given(verb=VERBS, text=ANY_TEXT | st.binary(max_size=40).map(lambda b: b.decode("latin-1")))
def test_stdin_that_is_no_spec_is_refused(world: World, verb: Any, text: str) -> None:
    check(verb, text, world.machine(verb))


@st.composite
def garbled(draw: st.DrawFn, ran: Ran) -> Ran:
    """What a program might print and return in the place of what it did."""
    how = draw(st.sampled_from(["json", "json", "lines", "cut", "else", "code", "noise"]))
    out = ran.out
    if how == "json":
        try:
            parsed = json.loads(ran.text)
        except ValueError:
            how = "lines"
        else:
            found = list(places(parsed))
            other = draw(mutated(parsed, found) if found else ANYTHING)
            try:
                out = json.dumps(other).encode()
            except ValueError:
                out = b"nonsense"
    if how == "lines":
        lines = ran.text.splitlines() or [""]
        lines[draw(st.integers(0, len(lines) - 1))] = draw(ANY_TEXT)
        out = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif how == "cut":
        out = out[: draw(st.integers(0, len(out)))]
    elif how == "else":
        texts = st.sampled_from(TEXTS).map(lambda text: text.encode("utf-8", "surrogatepass"))
        out = draw(texts | st.binary(max_size=60) | st.sampled_from([b"null", b"[]", b"{}", b"1"]))
    elif how == "noise":
        out = b"WARNING: an upgrade is available\n" + out
    if how == "code":
        said = draw(ANY_TEXT).encode("utf-8", "surrogatepass")
        return Ran(draw(st.sampled_from([1, 2, 125, 126, 127, 137, -9, 0])), out, said)
    return ran._replace(out=out)


def is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict | list)
    except ValueError:
        return False


@examples(400)
@given(data=st.data())
def test_whatever_tools_print_ends_in_a_result_or_a_failure(
    world: World, data: st.DataObject
) -> None:
    verb = data.draw(VERBS)
    machine = world.machine(verb)
    run: Callable[..., Ran] = machine.run
    first = data.draw(st.integers(0, 12))
    often = data.draw(st.booleans())
    count, known = 0, True

    def hostile(argv: Sequence[str], **options: Any) -> Ran:
        nonlocal count, known
        count += 1
        if count <= first or (not often and count > first + 1) or count > first + 30:
            return run(argv, **options)
        fails = data.draw(st.sampled_from([None, None, None, None, None, ToolMissing, TookTooLong]))
        if fails:
            raise fails(argv[0])
        to_file = options.pop("to_file", None)
        ran = data.draw(garbled(run(argv, **options)))
        known = known and not is_json(ran.out)
        if to_file:
            machine.write_atomic(to_file, ran.out, 0o600)
            ran = ran._replace(out=b"")
        return ran

    machine.run = hostile  # type: ignore[method-assign]
    check(verb, json.dumps(world.specs[verb]), machine, lambda: known)


def test_most_verbs_do_their_work_in_the_world_that_is_fuzzed(world: World) -> None:
    done = [
        verb
        for verb, spec in world.specs.items()
        if check(verb, json.dumps(spec), world.machine(verb))["ok"]
    ]
    assert len(done) > len(cli.VERBS) / 2, done
