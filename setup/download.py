"""Releases that the vendors publish, verified against the checksums published beside them.

The archives are the ones that the vendors' install scripts (get.pulumi.com, astral.sh/uv) fetch.
Taking them directly runs no downloaded script, checks the SHA-256, and lets a machine that reaches
no download site find that out from one small file, within CONNECT_SECONDS.
The proxy settings of the environment (https_proxy, no_proxy) are respected.
"""

import hashlib
import platform
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from setup.cache import PROGRESS_SECONDS, SetupError, say

CONNECT_SECONDS = 8


def machine() -> tuple[str, str]:
    """(system, processor) as Python names them: ("linux", "x86_64"), ("darwin", "arm64")."""
    return platform.system().lower(), platform.machine().lower()


def unpack(url: str, checksums_url: str, directory: Path) -> None:
    """Fetch a .tar.gz, verify it, and unpack what is below its top directory into `directory`.

    Raises SetupError, with the cause, also when the machine's network reaches no such place.
    """
    archive = directory / url.rpartition("/")[2]
    _fetch(url, checksums_url, archive)
    with tarfile.open(archive) as tar:
        for member in tar:
            path = directory / Path(*Path(member.name).parts[1:])
            content = tar.extractfile(member) if member.isfile() else None
            if content and ".." not in path.parts:
                path.parent.mkdir(parents=True, exist_ok=True)
                with content, path.open("wb") as file:
                    shutil.copyfileobj(content, file)
                path.chmod(member.mode & 0o755)
    archive.unlink()


def program(url: str, checksums_url: str, path: Path) -> None:
    """Fetch a program, verify it, and make it executable. Raises SetupError."""
    _fetch(url, checksums_url, path)
    path.chmod(0o755)


def _fetch(url: str, checksums_url: str, path: Path) -> None:
    name = url.rpartition("/")[2]
    expected = _checksum(name, _fetch_small(checksums_url))
    digest = hashlib.sha256()
    started = said = time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
            while block := response.read(1 << 20):
                digest.update(block)
                file.write(block)
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    say(f"  {name}: {said - started:.0f} s  {file.tell() >> 20} MiB")
    except OSError as error:
        raise SetupError(f"{url}: {error}") from error
    if digest.hexdigest() != expected:
        raise SetupError(f"{url}: SHA-256 is {digest.hexdigest()}, published is {expected}")


def _fetch_small(url: str) -> str:
    # In a thread of its own: a resolver that does not answer ignores urlopen's timeout.
    answer: list[str | OSError] = [OSError(f"no answer within {CONNECT_SECONDS} s")]

    def fetch() -> None:
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response:
                answer[0] = response.read().decode()
        except urllib.error.HTTPError as error:
            error.close()
            answer[0] = error
        except urllib.error.URLError as error:
            answer[0] = OSError(error.reason)
        except OSError as error:
            answer[0] = error

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    if isinstance(answer[0], str):
        return answer[0]
    raise SetupError(f"{url}: {answer[0]}")


def _checksum(name: str, checksums: str) -> str:
    for line in checksums.splitlines():
        digest, _, file = line.partition(" ")
        if file.strip().lstrip("*").rpartition("/")[2] == name:
            return digest.lower()
    raise SetupError(f"{name} is not in the published checksums")
