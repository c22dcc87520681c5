"""`python -m components.move p510 p620`: freezes the cluster of one stack, copies it to the host of
another and imports it there; with ``--back`` goes the way back. Run it again whenever it was cut
off: both hosts record how far they are, and what was copied is not copied twice.

The bytes go from host to host through this machine, over the stacks' own connections. What comes
before and after, with Pulumi: docs/move.md.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from components.settings import K3dCluster, Settings, SettingsError
from components.settings.fleet import NAMESPACE

# A copy that ends short of its file is begun again so often; what is wrong then is not the line.
_ROUNDS = 3
_APPEND = 'umask 077 && cat >> "$1"'


class MoveError(Exception):
    """A step that did not do what it should: names the step, the cause and the remedy."""


class Place(Protocol):
    """A host as :class:`components.host.Connection` reaches it."""

    @property
    def name(self) -> str: ...

    def line(self, *argv: str) -> str: ...

    def installed(self, verb: Sequence[str]) -> str: ...


def bring(
    old: Place, new: Place, cluster: K3dCluster, connectors: Sequence[Mapping[str, str]]
) -> str:
    """Freezes the cluster on its old host, copies it, and imports it as ``cluster`` declares it for
    the new one. Returns its identity. Raises MoveError.
    """
    frozen = {"name": cluster.name, "connectors": list(connectors)}
    packed = _hostctl(old, "freeze", frozen)
    request = {
        "name": cluster.name,
        "nonce": packed["nonce"],
        "storage_dir": cluster.storage_dir,
        "files": packed["files"],
    }
    for _ in range(_ROUNDS):
        received = _hostctl(new, "receive", request)
        short = [one for one in packed["files"] if received["have"][one["name"]] < one["bytes"]]
        for file in short:
            have = received["have"][file["name"]]
            print(f"copying {file['name']}: {file['bytes'] - have} bytes", file=sys.stderr)
            _append(
                old.line("tail", "-c", f"+{have + 1}", f"{packed['directory']}/{file['name']}"),
                new.line("sh", "-c", _APPEND, "sh", f"{received['directory']}/{file['name']}"),
            )
        if not short:
            break
    placed = {**request, "datastore_dir": cluster.datastore_dir}
    return _hostctl(new, "import", placed)["identity"]


def back(old: Place, new: Place, name: str) -> list[str]:
    """Withdraws the cluster from its new host, then starts it on the old one. Returns where what
    was written on the new one is kept. Raises MoveError, and then starts nothing.
    """
    kept = _hostctl(new, "withdraw", {"name": name})["kept"]
    _hostctl(old, "back", {"name": name, "confirm": name})
    return kept


def _hostctl(place: Place, verb: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    step = f"hostctl move {verb} on {place.name}"
    done = subprocess.run(
        place.installed(["move", verb]),
        shell=True,
        input=json.dumps(spec),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        result = json.loads(done.stdout)
    except ValueError:
        raise MoveError(
            f"{step} printed no result (exit code {done.returncode}).\n  Remedy: bring both stacks"
            " up once with this release, which installs hostctl, and run this again."
        ) from None
    if not result["ok"]:
        error = result["error"]
        raise MoveError(
            f"{error['step']} on {place.name}.\n  Cause: {error['cause']}\n"
            f"  Remedy: {error['remedy']}"
        )
    return result


def _append(read: str, write: str) -> None:
    reader = subprocess.Popen(read, shell=True, stdout=subprocess.PIPE)
    assert reader.stdout
    with reader.stdout:
        # What did not arrive is seen by the next look at the other end.
        subprocess.run(write, shell=True, stdin=reader.stdout)
    reader.wait()


def _stack(name: str) -> tuple[Settings, K3dCluster]:
    """A stack's settings without its encrypted values, of which a move needs none."""
    file = Path(__file__).parents[1] / f"Pulumi.{name}.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))["config"]
        ours = {key.removeprefix(NAMESPACE): config[key] for key in config if NAMESPACE in key}
        context: dict[str, Any] = {"source": file.name, "left_out": []}
        stack = Settings.model_validate(ours, by_alias=True, by_name=False, context=context)
    except (OSError, KeyError, TypeError, yaml.YAMLError, SettingsError) as error:
        raise MoveError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(stack.cluster, K3dCluster):
        raise MoveError(f"{file.name}: cluster {stack.cluster.name} is not k3d's: it cannot move")
    return stack, stack.cluster


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m components.move", description=__doc__)
    parser.add_argument("old", help="the stack whose cluster moves")
    parser.add_argument("new", help="the stack that it moves to; its cluster has movedFrom: OLD")
    parser.add_argument("--back", action="store_true", help="go back, until OLD is released")
    options = parser.parse_args()
    # Not above: Pulumi's packages cost seconds, and --help needs none.
    from components.host import Connection
    from components.ownership import deployment_name

    try:
        (old, leaves), (new, comes) = _stack(options.old), _stack(options.new)
        if comes.moved_from != options.old or comes.name != leaves.name:
            raise MoveError(
                f"homelab:cluster of {options.new} does not await {leaves.name} of {options.old}."
                f"\n  Remedy: write name: {leaves.name} and movedFrom: {options.old} there."
            )
        places = Connection(old.host), Connection(new.host)
        if options.back:
            kept = back(*places, leaves.name)
            print(f"{leaves.name} is back on {places[0].name}; kept on the other: {kept}")
            return 0
        connectors = [
            {"namespace": tunnel.connector.namespace, "deployment": deployment_name(name)}
            for name, tunnel in {**new.tunnels, **old.tunnels}.items()
            if tunnel.connector.kind == "cluster"
        ]
        identity = bring(*places, comes, connectors)
        print(f"{identity} is imported on {places[1].name}; next: docs/move.md, step 4")
    except MoveError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
