"""The SSH server of tests/cluster/test_ssh.py: from PATH, else Debian's in the cache."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from setup import cache, debian
from setup.cache import SetupError

_PACKAGES = ["openssh-server", "libwrap0"]


@dataclass(frozen=True)
class Server:
    """OpenSSH's server, and the directories of the libraries that came with it."""

    program: Path
    libraries: list[Path]


def server(may_install: bool = True) -> Server:
    """Where sshd is. Raises SetupError; without `may_install` also for what is absent."""
    if found := shutil.which("sshd", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"):
        return Server(Path(found), [])
    name = f"sshd-{platform.machine()}"
    if not (cache.root() / name).is_dir() and not may_install:
        raise SetupError("sshd is neither on PATH nor set up; run `python3 -m setup --cluster`")
    root = cache.install(name, _unpack) / "root"
    return Server(root / "usr/sbin/sshd", sorted({file.parent for file in root.rglob("*.so.*")}))


def _unpack(directory: Path) -> str:
    debian.unpack("SSH server", _PACKAGES, directory / "root")
    return "Debian packages"
