"""The cache: directories of installed tools, outside the checkout, each complete or absent.

`root()` is ${HOMELAB_CACHE}, else ${XDG_CACHE_HOME:-~/.cache}/homelab. A tool is made in a
temporary directory beside its final one and renamed when it is whole, so that an interrupted set-up
leaves nothing that could be taken for a tool; a lock lets two set-ups run at once.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRESS_SECONDS = 5


class SetupError(Exception):
    """A step that failed; the text names the step, the cause and the remedy."""


def root() -> Path:
    """The cache directory (it need not exist yet)."""
    if own := os.environ.get("HOMELAB_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "homelab"


def say(text: str) -> None:
    """One line for the person who waits, on stderr: stdout is for what a command gives."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Hold `path` alone; the kernel releases it when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"  waiting for another process that is at {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(name: str, make: Callable[[Path], str]) -> Path:
    """The cache's directory `name`; where it is absent, `make` fills it and returns its origin.

    That origin is kept in the directory (see `origin`). When `make` raises, nothing stays.
    """
    final = root() / name
    with lock(root() / f".{name}.lock", name):
        if final.is_dir():
            return final
        for left in root().glob(
            f".{name}-*.partial"
        ):  # of set-ups that were killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".partial", dir=root()))
        try:
            (partial / "origin").write_text(make(partial) + "\n")
            partial.chmod(0o755)
            partial.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def origin(directory: Path) -> str:
    """What `make` said of a directory that `install` made."""
    return (directory / "origin").read_text().strip()


def write(path: Path, content: bytes, mode: int) -> None:
    """Make `path` hold `content`, at once; does nothing where it does."""
    if path.exists() and path.read_bytes() == content:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.chmod(mode)
    partial.replace(path)


def run(step: str, command: list[str], **options) -> None:
    """Run a command that takes long: its last line and the elapsed seconds every few seconds.

    Its whole output is in <cache>/log/<step>.log. Raises SetupError with the last lines on failure.
    `options` go to subprocess.Popen.
    """
    log = root() / "log" / f"{step.replace(' ', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                **options,
            )
        except OSError as error:
            raise SetupError(f"{step}: {command[0]} cannot be run: {error}") from error
        try:
            while True:
                try:
                    code = process.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    say(f"  {step}: {time.monotonic() - started:.0f} s  {_tail(log, 1)[:80]}")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        raise SetupError(
            f"{step}: {command[0]} exited with code {code}:\n{_tail(log, 15)}\n(all: {log})"
        )


def _tail(log: Path, lines: int) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
