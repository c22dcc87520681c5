"""Debian packages, unpacked into the cache: nothing is installed and no script of one is run."""

import shutil
import subprocess
from pathlib import Path

from setup import cache
from setup.cache import SetupError


def unpack(step: str, packages: list[str], root: Path) -> None:
    """Put the packages' files below `root`. Raises SetupError, also where there is no apt-get."""
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise SetupError(f"{step}: not on PATH, and no {tool} to get Debian's by")
    archives = root.with_name("archives")
    archives.mkdir()
    archives.chmod(0o777)  # apt fetches as a user of its own
    archives.parent.chmod(0o755)
    try:
        cache.run(step, ["apt-get", "download", *packages], cwd=archives)
    except SetupError:
        cache.run(step, ["apt-get", "update"])
        cache.run(step, ["apt-get", "download", *packages], cwd=archives)
    for archive in sorted(archives.iterdir()):
        cache.run(step, ["dpkg", "--extract", str(archive), str(root)])
    shutil.rmtree(archives)


def needed(step: str, package: str) -> list[str]:
    """The names of a package and of all that it depends on. Raises SetupError."""
    ask = ["apt-cache", "depends", "--recurse", "--important", package]
    for _ in range(2):
        done = subprocess.run(ask, capture_output=True, text=True)
        names = sorted({line for line in done.stdout.splitlines() if line[:1].isalpha()})
        if names:
            return names
        cache.run(step, ["apt-get", "update"])
    raise SetupError(f"{step}: apt-cache knows no package {package}")
