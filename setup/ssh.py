"""The SSH server of tests/cluster/test_ssh.py: from PATH, else Debian's, unpacked into the cache.

Nothing is installed and no script of a package is run: a test changes nothing of the system.
"""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from setup import cache
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
    for tool in ("apt-get", "dpkg"):
        if not shutil.which(tool):
            raise SetupError(f"no sshd on PATH, and no {tool} to get Debian's by")
    archives = directory / "archives"
    archives.mkdir()
    archives.chmod(0o777)  # apt fetches as a user of its own
    directory.chmod(0o755)
    step = "SSH server"
    try:
        cache.run(step, ["apt-get", "download", *_PACKAGES], cwd=archives)
    except SetupError:
        cache.run(step, ["apt-get", "update"])
        cache.run(step, ["apt-get", "download", *_PACKAGES], cwd=archives)
    for archive in sorted(archives.iterdir()):
        cache.run(step, ["dpkg", "--extract", str(archive), str(directory / "root")])
    shutil.rmtree(archives)
    return "Debian packages"
