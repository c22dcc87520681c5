"""The command line of set-up."""

import argparse
import hashlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from setup import cache, cluster, ssh, tools
from setup.cache import SetupError, say
from setup.tools import CHECKOUT, Found


def main(arguments: list[str]) -> int:
    """Returns the exit code; with a command after `--`, becomes that command instead."""
    parser = argparse.ArgumentParser(
        prog="python3 -m setup",
        description="Sets up uv, Pulumi and the Python packages; runs COMMAND with them on PATH.",
    )
    parser.add_argument(
        "--env", action="store_true", help="only print the shell line that puts the tools on PATH"
    )
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="also what tests/cluster runs on, as far as this machine can have it",
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="given after --")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are stopped too
    started = time.monotonic()
    try:
        found = resolve(may_install=not options.env)
        if not options.env:
            for name, tool in found.items():
                say(f"{name}: {tool.why}")
            python_packages(found["uv"])
        if options.cluster:
            cluster_rig()
    except SetupError as error:
        say(f"set-up failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("set-up interrupted; the next run goes on from here")
        return 130
    if options.env:
        print(
            f'export PATH={shlex.quote(os.pathsep.join(missing(found)))}:"$PATH"'
            if missing(found)
            else ":"
        )
        return 0
    say(f"set up in {time.monotonic() - started:.1f} s")
    if options.command:
        os.environ["PATH"] = search_path(found)
        os.execvp(options.command[0], options.command)
    if missing(found):
        say(f'to use them in this shell: eval "$({Path(sys.executable).name} -m setup --env)"')
    return 0


def resolve(may_install: bool = True) -> dict[str, Found]:
    """Every tool by name. Raises SetupError; without `may_install` also for what is absent."""
    uv = tools.uv(may_install)
    engine = tools.pulumi(may_install)
    return {
        "uv": uv,
        "pulumi": engine,
        "pulumi-language-python": tools.language_host(engine, uv, may_install),
    }


def cluster_rig() -> None:
    """Set up what tests/cluster runs on; where that cannot be had its tests are skipped."""
    try:
        cluster.resolve()
        say("tests/cluster: its Docker engine, k3d and node are set up")
    except SetupError as error:
        say(f"tests/cluster cannot run here: {error}")
    try:
        say(f"sshd: {ssh.server().program}")
    except SetupError as error:
        say(f"tests/cluster/test_ssh.py cannot run here: {error}")


def missing(found: dict[str, Found]) -> list[str]:
    """The directories of tools that PATH does not hold yet."""
    present = os.environ.get("PATH", os.defpath).split(os.pathsep)
    directories = dict.fromkeys(str(tool.directory) for tool in found.values())
    return [directory for directory in directories if directory not in present]


def search_path(found: dict[str, Found]) -> str:
    """PATH with the missing directories in front."""
    return os.pathsep.join([*missing(found), os.environ.get("PATH", os.defpath)])


def python_packages(uv: Found) -> None:
    """Make .venv hold what uv.lock names; does nothing when it was made from this very lock."""
    stamp = CHECKOUT / ".venv" / ".homelab"
    locked = b"".join((CHECKOUT / name).read_bytes() for name in ("uv.lock", "pyproject.toml"))
    digest = hashlib.sha256(locked + str(CHECKOUT).encode()).hexdigest()
    if (CHECKOUT / ".venv/bin/python").exists() and stamp.exists() and stamp.read_text() == digest:
        say("python packages: as locked")
        return
    with cache.lock(CHECKOUT / ".venv.lock", "the Python packages"):
        sync = [str(uv.directory / "uv"), "sync", "--frozen"]
        if not (CHECKOUT / ".venv/bin/python").exists():
            sync += ["--python", sys.executable]
        cache.run("python packages", sync, cwd=CHECKOUT)
        stamp.write_text(digest)
    say("python packages: installed from uv.lock")
