#!/usr/bin/env python3
"""hostctl: what a host does for its stack, one idempotent verb at a time.

A verb takes a JSON spec (stdin, ``--spec FILE``, or from the host's own record when a cluster is
NAMEd), prints one JSON result on stdout and what it is doing on stderr. Exit codes: 0 done, 2 bad
spec or usage, 3 refused, 4 cannot tell, 5 a step failed, 6 a tool is missing or too old, 7 timed
out.

Rules that hold everywhere; numbers are the incidents that they come from:

* Three answers: present, absent, cannot tell. Nothing is created or deleted on the third (3).
* Recovery starts, restarts and waits; it never deletes and it is bounded (1, 2, 4).
* A failure names the step, the cause in the lower layer's words, and the remedy (17).
* A secret value is never an argument of a process, in progress or in an error.

Standard library only, Python 3.9 and newer, one file: it is installed and shipped as this text.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import grp
import hashlib
import hmac
import io
import ipaddress
import itertools
import json
import os
import pwd
import re
import secrets
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple, NoReturn, TextIO

HOSTCTL_VERSION = "1.0.0"

STATE_DIRECTORY = "/var/lib/homelab"
STORAGE_IN_NODE = "/var/lib/rancher/k3s/storage"
DATASTORE_IN_NODE = "/var/lib/rancher/k3s/server"
RESOLVERS_IN_NODE = "/etc/rancher/k3s/resolv.conf"
KUBECONFIG_IN_NODE = "/output/kubeconfig.yaml"
API_PORT_IN_NODE = "6443/tcp"
CREATE_LABEL = "homelab.create"
FIELD_MANAGER = "homelab"

QUERY_SECONDS = 30.0
"""How long a question to a tool may take before the answer is: cannot tell."""
PROGRESS_SECONDS = 5.0
BIND_WAIT_SECONDS = 300.0
STALL_SECONDS = 180.0
STALL_BYTES = 1024 * 1024
"""A server that reads less than this in STALL_SECONDS does not open its datastore any more (4)."""
STALL_RESTARTS = 2
LOCK_SECONDS = 3600.0
BACKUP_SPARE_BYTES = 256 * 1024 * 1024
FILE_BYTES = 1024 * 1024
"""The largest file that is read; the API server takes no Secret above 1 MiB."""

EXIT_CODES = {
    "bad-spec": 2,
    "refused": 3,
    "cannot-tell": 4,
    "failed": 5,
    "tool": 6,
    "timed-out": 7,
}


class Failure(Exception):
    """A verb that did not do what it should. ``code`` is a key of EXIT_CODES."""

    def __init__(self, code: str, step: str, cause: str, remedy: str) -> None:
        super().__init__(f"{step}: {cause}")
        self.code, self.step, self.cause, self.remedy = code, step, cause, remedy


def say(line: str) -> None:
    """Reports progress, for a person who waits."""
    print(f"hostctl: {line}", file=sys.stderr, flush=True)


# The machine


class Ran(NamedTuple):
    """A finished process: its exit status and what it wrote, cut at a limit."""

    code: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode("utf-8", "replace")

    @property
    def complaint(self) -> str:
        """What a person needs of the error output: its last lines, bounded."""
        lines = self.err.decode("utf-8", "replace").strip().splitlines()
        said = " / ".join(line.strip() for line in lines[-4:])
        return said[-600:] or f"exit status {self.code} and no message"


class Stat(NamedTuple):
    """Facts of a file. ``owner`` and ``group`` are names, or numbers that have none."""

    kind: str
    mode: int
    owner: str
    group: str
    modified: float


class ToolMissing(Exception):
    """The program is not on PATH."""


class TookTooLong(Exception):
    """The process was ended at its time limit."""


class Machine:
    """All contact with the host. A rehearsal puts a make-believe one in its place."""

    def __init__(self) -> None:
        self._locks: list[int] = []

    # Processes

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        env: Mapping[str, str] | None = None,
        timeout: float = QUERY_SECONDS,
        tick: Callable[[float], None] | None = None,
        to_file: str | None = None,
        limit: int = 32 * 1024 * 1024,
        ends_with_us: bool = False,
    ) -> Ran:
        """Runs a program without a shell; ``tick`` is told every few seconds for how long it runs.

        ``to_file`` receives stdout whole. Raises ToolMissing or TookTooLong. The child has its own
        session, so that an interrupt here does not cut it off half-way, and inherits the host's
        locks, so that nobody else starts while a child of a killed hostctl still works.
        ``ends_with_us`` is for one that only copies: it and its children end when hostctl is told
        to end, and give the locks back.
        """
        sink = open(to_file, "xb", opener=_private) if to_file else None  # noqa: SIM115
        try:
            child = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=sink or subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C", **(env or {})},
                start_new_session=True,
                pass_fds=self._locks,
            )
        except FileNotFoundError:
            raise ToolMissing(argv[0]) from None
        finally:
            if sink:
                sink.close()
        kept = {"out": bytearray(), "err": bytearray()}

        def drain(name: str, stream: Any) -> None:
            with stream:
                for piece in iter(lambda: stream.read1(65536), b""):
                    kept[name] += piece[: max(0, limit - len(kept[name]))]

        def feed(stream: Any) -> None:
            with contextlib.suppress(BrokenPipeError), stream:
                stream.write(input)

        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            (feed, (child.stdin,)),
            (drain, ("err", child.stderr)),
        ]
        if child.stdout:
            work.append((drain, ("out", child.stdout)))
        workers = [threading.Thread(target=do, args=given, daemon=True) for do, given in work]
        try:
            for worker in workers:
                worker.start()
            started = time.monotonic()
            while not _ended(child, workers, min(PROGRESS_SECONDS, timeout)):
                waited = time.monotonic() - started
                if waited >= timeout:
                    raise TookTooLong(argv[0])
                if tick:
                    tick(waited)
        except BaseException as ending:
            if ends_with_us or isinstance(ending, TookTooLong):
                _kill(child)
            raise
        return Ran(child.returncode, bytes(kept["out"]), bytes(kept["err"]))

    # Files

    def read(self, path: str, limit: int = FILE_BYTES) -> bytes:
        """The content of a regular file. Raises OSError, also for one above the limit."""
        with open(path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError("not a regular file")
            content = file.read(limit + 1)
        if len(content) > limit:
            raise OSError(f"larger than {limit} bytes")
        return content

    def write_atomic(
        self,
        path: str,
        content: bytes,
        mode: int,
        owner: str | None = None,
        group: str | None = None,
    ) -> None:
        """Writes a file whole or not at all, never readable by more than in the end."""
        directory = os.path.dirname(path)
        descriptor, aside = tempfile.mkstemp(dir=directory, prefix=".hostctl-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fchown(file.fileno(), *self._ids(owner, group))
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise
        held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(held)
        finally:
            os.close(held)

    def set_access(self, path: str, mode: int, owner: str | None, group: str | None) -> None:
        """Gives a file or directory its mode and owner. Raises OSError, also for a link: one may
        have been put there since the path was looked at."""
        # Without waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            os.fchown(descriptor, *self._ids(owner, group))
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)

    def make_directory(
        self, path: str, mode: int, owner: str | None = None, group: str | None = None
    ) -> None:
        """Makes a directory and its parents (0755). One that exists is left as it is; one that is
        made has its mode and owner before its name."""
        if os.path.isdir(path):
            return
        parent = os.path.dirname(path)
        self.make_directory(parent, 0o755)
        aside = tempfile.mkdtemp(dir=parent, prefix=".hostctl-")
        try:
            self.set_access(aside, mode, owner, group)
            os.rename(aside, path)
        except BaseException as failure:
            os.rmdir(aside)
            if not (isinstance(failure, OSError) and os.path.isdir(path)):
                raise

    def exists(self, path: str) -> bool:
        return self.stat(path) is not None

    def stat(self, path: str) -> Stat | None:
        """Facts of a file, links followed; None when there is none. Raises OSError."""
        try:
            seen = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kind = "directory" if stat.S_ISDIR(seen.st_mode) else "file"
        owner, group = str(seen.st_uid), str(seen.st_gid)
        with contextlib.suppress(KeyError):
            owner = pwd.getpwuid(seen.st_uid).pw_name
        with contextlib.suppress(KeyError):
            group = grp.getgrgid(seen.st_gid).gr_name
        return Stat(kind, stat.S_IMODE(seen.st_mode), owner, group, seen.st_mtime)

    def missing_account(self, owner: str | None, group: str | None) -> str | None:
        """The user or group that this host does not have, in words."""
        try:
            self._ids(owner, group)
        except LookupError as missing:
            return str(missing.args[0])
        return None

    def _ids(self, owner: str | None, group: str | None) -> tuple[int, int]:
        user, members = -1, -1
        try:
            if owner is not None:
                user = int(owner) if owner.isdigit() else pwd.getpwnam(owner).pw_uid
        except KeyError:
            raise LookupError(f"user {owner}") from None
        try:
            if group is not None:
                members = int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
        except KeyError:
            raise LookupError(f"group {group}") from None
        return user, members

    def free_bytes(self, path: str) -> int:
        """Room for root on the file system that holds the path or its nearest existing parent."""
        while not os.path.exists(path):
            path = os.path.dirname(path)
        seen = os.statvfs(path)
        return seen.f_bavail * seen.f_frsize

    def tree_bytes(self, path: str) -> int:
        """The sizes of all files below a directory. Raises OSError for what cannot be read."""

        def fail(error: OSError) -> NoReturn:
            raise error

        total = 0
        for directory, _, names in os.walk(path, onerror=fail):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(directory, name)).st_size
        return total

    def checksum(self, path: str) -> str:
        """The sha256 of a file of any size."""
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1024 * 1024), b""):
                digest.update(piece)
        return digest.hexdigest()

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Holds a lock of the host. Two hostctl on one thing take turns."""
        directory = f"{STATE_DIRECTORY}/locks"
        self.make_directory(directory, 0o755)
        descriptor = os.open(
            f"{directory}/{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            _take_lock(self, descriptor, name)
            self._locks.append(descriptor)
            try:
                yield
            finally:
                self._locks.remove(descriptor)
        finally:
            os.close(descriptor)

    # Time and identity

    def now(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def nonce(self) -> str:
        """16 hex digits that no other call gave."""
        return secrets.token_hex(8)

    def machine_id(self) -> str:
        """What tells this installation of an operating system from every other (machine-id(5))."""
        for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
            with contextlib.suppress(OSError):
                content = self.read(path).decode("ascii", "replace").strip()
                if content:
                    return content
        return socket.gethostname()

    # Network

    def has_address(self, address: str) -> bool:
        """Whether a port can be bound to the address now."""
        with contextlib.closing(_socket(address)) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                return False
        return True

    def port_is_free(self, address: str, port: int) -> bool:
        with contextlib.closing(_socket(address)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
        return True

    def connect(self, address: str, port: int, ca: str) -> str | None:
        """Why no TLS connection to a server of this CA (PEM) is had; None when it is."""
        context = ssl.create_default_context(cadata=ca)
        context.check_hostname = False
        # Python 3.13 demands extensions that the certificates of k3s do not have.
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        try:
            with socket.create_connection((address, port), 5) as plain, context.wrap_socket(plain):
                return None
        except OSError as error:
            return str(error)

    def bytes_read(self, pids: Iterable[int]) -> int | None:
        """What the processes and their threads have read so far; None when that cannot be seen."""
        total, seen = 0, False
        for pid in pids:
            with contextlib.suppress(OSError, ValueError):
                content = self.read(f"/proc/{pid}/io").decode("ascii")
                total += int(content.split("rchar:")[1].split()[0])
                seen = True
        return total if seen else None

    def missing_file(self, request: Mapping[str, Any]) -> bytes | None:
        """Made-up content for a Secret file that is not here. A real machine makes nothing up."""
        return None


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _kill(child: Any) -> None:
    """Ends a process and those that it started, and waits until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _ended(child: Any, workers: Sequence[threading.Thread], seconds: float) -> bool:
    """Whether the child is done after at most so many seconds. The end of its output tells, since a
    wait for the process itself would poll; a daemon that it left behind may keep that open."""
    until = time.monotonic() + seconds
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(max(0.0, until - time.monotonic()))
        return True
    return False


def _socket(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM)


def _take_lock(machine: Machine, descriptor: int, name: str) -> None:
    waited = 0.0
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if waited >= LOCK_SECONDS:
            raise Failure(
                "timed-out",
                f"lock {name}",
                f"another hostctl holds it for more than {LOCK_SECONDS:.0f} s",
                f"see what it does: fuser -v {STATE_DIRECTORY}/locks/{name}.lock",
            )
        if waited % 15 == 0:
            say(f"another hostctl is at work on {name}: waiting for its lock, {waited:.0f} s")
        machine.sleep(1)
        waited += 1


# Specs


class Value:
    """One value of a spec. ``test`` returns the value to use, or raises ValueError(the allowed)."""

    def __init__(self, test: Callable[[Any], Any], *default: Any, secret: bool = False) -> None:
        self.test, self.default, self.secret = test, default, secret


class Items:
    """A list of a spec, all of one shape."""

    def __init__(self, shape: Any, *default: Any) -> None:
        self.shape, self.default = shape, default


def checked(spec: Any, shape: Mapping[str, Any], verb: str) -> dict[str, Any]:
    """The spec as the shape says, defaults filled in. All errors at once, each with key, value and
    what is allowed; a secret value is never shown."""
    errors: list[str] = []
    result = _check(spec, shape, "", errors)
    if errors:
        raise Failure(
            "bad-spec",
            f"spec of {verb}",
            "; ".join(errors),
            f"correct the spec; `hostctl {verb} --help` shows one",
        )
    return result


def _check(value: Any, shape: Any, path: str, errors: list[str]) -> Any:
    if isinstance(shape, Value):
        try:
            return shape.test(value)
        except ValueError as allowed:
            shown = "a value that is not shown" if shape.secret else _shown(value)
            errors.append(f"{path}: {shown} is not allowed; allowed is {allowed}")
            return None
    if isinstance(shape, Items):
        if not isinstance(value, list):
            errors.append(f"{path}: {_shown(value)} is not allowed; allowed is a list")
            return []
        return [_check(item, shape.shape, f"{path}[{n}]", errors) for n, item in enumerate(value)]
    if not isinstance(value, dict):
        errors.append(f"{path or 'spec'}: {_shown(value)} is not allowed; allowed is an object")
        return {}
    result = {}
    for key, inner in shape.items():
        where = f"{path}.{key}" if path else key
        default = getattr(inner, "default", ())
        if key in value:
            result[key] = _check(value[key], inner, where, errors)
        elif default:
            result[key] = default[0]
        else:
            errors.append(f"{where}: missing")
    for key in sorted(set(map(str, value)) - set(shape)):
        errors.append(f"{_shown(f'{path}.{key}' if path else key)}: unknown key")
    return result


def _shown(value: Any) -> str:
    kinds = {dict: "an object", list: "a list"}
    return kinds.get(type(value)) or json.dumps(
        str(value)[:80] if isinstance(value, str) else value
    )


def _text(pattern: str, allowed: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern)

    def test(value: Any) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise ValueError(allowed)
        return value

    return test


def _number(low: int, high: int) -> Callable[[Any], int]:
    def test(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return test


def _or_null(test: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def either(value: Any) -> Any:
        try:
            return None if value is None else test(value)
        except ValueError as allowed:
            raise ValueError(f"{allowed}, or null") from None

    return either


def _one_of(*words: str) -> Callable[[Any], str]:
    def test(value: Any) -> str:
        if value not in words:
            raise ValueError("one of " + ", ".join(words))
        return value

    return test


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _path(value: Any) -> str:
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"/[^\x00-\x1f\x7f$]+", value)
        or os.path.normpath(value) != value
        or value.startswith("//")
    ):
        raise ValueError("an absolute path without '..', '$' or control characters")
    return value


def _mount_path(value: Any) -> str:
    if not isinstance(value, str) or ":" in value:
        raise ValueError("an absolute path without ':', which parts a mount of Docker")
    return _path(value)


def _mode(value: Any) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
        raise ValueError('an octal mode such as "0640"')
    return int(value, 8)


def _private_mode(value: Any) -> int:
    mode = _mode(value)
    if mode & 0o007:
        raise ValueError('an octal mode that gives others nothing, such as "0640"')
    return mode


def _address(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Address(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("an IPv4 address (k3d takes no other)") from None


def _server_name(value: Any) -> str:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(value if isinstance(value, str) else "")
        return value
    return _HOST(value)


def _resolver(value: Any) -> str:
    # Inside a node the loopback and Docker's own addresses lead nowhere (incident 5).
    try:
        address = ipaddress.ip_address(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("an IP address of a DNS server") from None
    if address.is_loopback or address.is_link_local or address.is_unspecified:
        raise ValueError("a DNS server that pods can reach, neither loopback nor link-local")
    return str(address)


def _subnet(value: Any) -> str:
    try:
        return str(ipaddress.IPv4Network(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("an IPv4 subnet such as 172.30.0.0/16") from None


def _base64_map(value: Any) -> dict[str, str]:
    allowed = "an object of key to base64 text"
    if not isinstance(value, dict):
        raise ValueError(allowed)
    for key, text in value.items():
        if not re.fullmatch(r"[-._a-zA-Z0-9]{1,253}", key) or not isinstance(text, str):
            raise ValueError(allowed)
        try:
            base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError(allowed) from None
    return value


def _text_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError("an object of key to text")
    return value


def _k3s_argument(value: Any) -> str:
    own = ("--disable", "--resolv-conf", "--cluster-init", "--data-dir", "--server")
    if not isinstance(value, str) or not re.fullmatch(r"--[a-z][^\x00-\x1f\x7f$]*", value):
        # k3d expands $NAME in its config file and has no way to write a plain $.
        raise ValueError("an argument of k3s such as --write-kubeconfig-mode=640, without '$'")
    if re.split("[= ]", value)[0] in own:
        raise ValueError(f"none of {', '.join(own)}, which have a setting of their own or none")
    if _SECRET_ARGUMENT.match(value):
        raise ValueError(
            "one that carries no secret, which every process could read; k3s takes "
            "secrets from files, by arguments that end in -file"
        )
    return value


def _repository(value: Any) -> str:
    if not isinstance(value, str) or not _REPOSITORY.fullmatch(value):
        raise ValueError(
            "https://HOST/PATH, ssh://[USER@]HOST[:PORT]/PATH or USER@HOST:PATH, without a password"
        )
    return value


def _ref(value: Any) -> str:
    """git-check-ref-format(1), and nothing that looks like an option."""
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[^\x00-\x20\x7f~^:?*\[\\-][^\x00-\x20\x7f~^:?*\[\\]{0,250}", value)
        or any(bad in value for bad in ("..", "@{", "//", "/.", ".lock/"))
        or value.startswith((".", "/"))
        or value.endswith((".", "/", ".lock"))
        or value == "@"
    ):
        raise ValueError("a branch, tag or commit; nothing that looks like an option")
    return value


def _path_in_repository(value: Any) -> str:
    if (
        not isinstance(value, str)
        or not re.fullmatch(r"[A-Za-z0-9._+@-]+(/[A-Za-z0-9._+@-]+)*", value)
        or value.startswith("-")
        or ".." in value.split("/")
    ):
        raise ValueError("a relative path inside the repository, without '..'")
    return value


_REPOSITORY = re.compile(
    r"https://[A-Za-z0-9.-]+(:\d{1,5})?(/[A-Za-z0-9._~+-]+)+"
    r"|ssh://([A-Za-z0-9._-]+@)?[A-Za-z0-9][A-Za-z0-9.-]*(:\d{1,5})?(/[A-Za-z0-9._~+-]+)+"
    r"|[A-Za-z0-9_][A-Za-z0-9._-]*@[A-Za-z0-9][A-Za-z0-9.-]*:[A-Za-z0-9._~+][A-Za-z0-9._~+/-]*"
)
_NAME = _text(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", "1 to 32 of a-z, 0-9 and '-' inside")
_LABEL = _text(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "a DNS label of up to 63 characters")
_OBJECT = _text(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "the name of a Kubernetes object")
_CONTAINER = _text(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}", "the name of a container")
_ACCOUNT = _text(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,63}", "the name or number of a user or group")
_COMMIT = _text(r"[0-9a-f]{40}", "a commit of 40 hex digits")
_IMAGE = _text(
    # Docker's grammar of references (github.com/distribution/reference); what is before the first
    # slash may be a registry's host and port. Then a tag, a digest, or both.
    r"(?!.*:latest(@|$))([a-zA-Z0-9]([a-zA-Z0-9.-]*[a-zA-Z0-9])?(:\d{1,5})?/)?[a-z0-9][a-z0-9._/-]*"
    r"(:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}(@sha256:[0-9a-f]{64})?|@sha256:[0-9a-f]{64})",
    "an image with a tag that is not latest (incident 9), or with @sha256:...",
)
_SERVER = _text(
    r"https://([A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\]):\d{1,5}", "https://HOST:PORT that clients reach"
)
_INCARNATION = _text(r"[0-9a-f]{8}-[1-9]\d{0,8}", "what `k3d inspect` said")
_KIND = _text(r"[A-Za-z]+(\.[a-z0-9.-]+)?", "a kind such as Deployment or deployments.apps")
_HOST = _text(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?", "a host name or IP address")
# Names of k3s arguments whose value is a secret. The one in --secrets-encryption is none.
_SECRET_ARGUMENT = re.compile(
    r"--(?![^= ]*-file(?:[= ]|$))(?:[^= ]*(?:token|secret(?!s-encryption)|password|access-key)"
    r"|datastore-endpoint|vpn-auth)[^= ]*"
)
_TYPES = (
    "Opaque",
    "kubernetes.io/dockerconfigjson",
    "kubernetes.io/tls",
    "kubernetes.io/basic-auth",
    "kubernetes.io/ssh-auth",
)


def _server_url(value: Any) -> str:
    text = _SERVER(value)
    # Incident 14: k3d writes 0.0.0.0, which no client can dial.
    if text.startswith("https://0.0.0.0:"):
        raise ValueError("an address that clients can reach, not 0.0.0.0 (incident 14)")
    return text


CLUSTER_SPEC: dict[str, Any] = {
    "name": Value(_NAME),
    "image": Value(_IMAGE),
    "servers": Value(_number(1, 9), 1),
    "agents": Value(_number(0, 99), 0),
    "disable": Items(Value(_text(r"[a-z0-9-]{1,63}", "a packaged component of k3s")), []),
    "api": {
        "bind": Value(_address),
        "port": Value(_number(1, 65535)),
        "server_name": Value(_or_null(_server_name), None),
    },
    "resolvers": Items(Value(_resolver)),
    "storage_dir": Value(_mount_path),
    "network": {
        "name": Value(_text(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}", "the name of a Docker network")),
        "subnet": Value(_subnet),
    },
    "k3s_args": Items(Value(_k3s_argument, secret=True), []),
    "ports": Items(
        {
            "host_port": Value(_number(1, 65535)),
            "container_port": Value(_number(1, 65535)),
            "bind": Value(_address, "127.0.0.1"),
            "protocol": Value(_one_of("tcp", "udp"), "tcp"),
        },
        [],
    ),
    "api_wait_seconds": Value(_number(1, 86400), 1800),
    "generation": Value(_or_null(_number(0, 2**31)), None),
    "incarnation": Value(_or_null(_INCARNATION), None),
    "recreate": Value(_or_null(_NAME), None),
    "confirm": Value(_or_null(_NAME), None),
}


def cluster_spec(spec: Any, verb: str) -> dict[str, Any]:
    """A ClusterSpec, checked together with what its values must not be to each other."""
    result = checked(spec, CLUSTER_SPEC, verb)
    wrong = []
    if result["servers"] % 2 == 0:
        wrong.append("servers: an even number has no majority to lose; allowed is an odd number")
    if result["servers"] > 1 and result["network"]["name"] != f"k3d-{result['name']}":
        wrong.append(
            f"network.name: k3d makes that of several servers; allowed is k3d-{result['name']}"
        )
    if result["network"]["name"] in ("host", "bridge", "none"):
        wrong.append("network.name: one of Docker's own; allowed is a network of the cluster")
    subnet = ipaddress.ip_network(result["network"]["subnet"])
    for resolver in result["resolvers"]:
        if ipaddress.ip_address(resolver) in subnet:
            wrong.append(f"resolvers: {resolver} lies in the cluster's own Docker network {subnet}")
    if not result["resolvers"]:
        wrong.append("resolvers: empty; allowed is at least one DNS server (incident 5)")
    published = [(result["api"]["port"], "tcp", result["api"]["bind"])]
    for port in result["ports"]:
        published.append((port["host_port"], port["protocol"], port["bind"]))
    for (port, protocol, bind), (*other, its_bind) in itertools.combinations(published, 2):
        if [port, protocol] == other and (bind == its_bind or "0.0.0.0" in (bind, its_bind)):
            wrong.append(f"ports: {port}/{protocol} is used twice on {its_bind}")
    if wrong:
        raise Failure("bad-spec", f"spec of {verb}", "; ".join(wrong), "correct the settings")
    return result


# Tools


class Tool(NamedTuple):
    """A program that the host must have: the least version, how to ask for it, how to get it."""

    least: tuple[int, int]
    ask: tuple[str, ...]
    nixos: str
    truenas: str
    debian: str

    def remedy(self, name: str) -> str:
        return (
            f"install {name} {'.'.join(map(str, self.least))} or newer. NixOS: {self.nixos} "
            f"TrueNAS SCALE: {self.truenas} Debian/Ubuntu: {self.debian}"
        )


TOOLS = {
    "docker": Tool(
        (20, 10),
        ("docker", "version", "--format", "{{.Server.Version}}"),
        "virtualisation.docker.enable = true;",
        "Docker comes with 24.10 and newer: Apps > Settings > Choose Pool.",
        "https://docs.docker.com/engine/install/",
    ),
    "k3d": Tool(
        (5, 6),
        ("k3d", "version"),
        "environment.systemPackages = [ pkgs.k3d ];",
        "put the release binary of github.com/k3d-io/k3d on a dataset and its directory on PATH.",
        "the release binary of github.com/k3d-io/k3d into /usr/local/bin.",
    ),
    # By 1.29 `apply --server-side` migrates a client-side apply to any field manager.
    "kubectl": Tool(
        (1, 29),
        ("kubectl", "version", "--client", "--output=json"),
        "environment.systemPackages = [ pkgs.kubectl ];",
        "put the binary of dl.k8s.io on a dataset and its directory on PATH.",
        "https://kubernetes.io/docs/tasks/tools/install-kubectl-linux/",
    ),
    "git": Tool(
        (2, 20),
        ("git", "--version"),
        "environment.systemPackages = [ pkgs.git ];",
        "git comes with the system.",
        "apt install git",
    ),
}


def tool_version(machine: Machine, name: str) -> tuple[int, int]:
    """The version of a tool. Raises Failure when it is missing, does not run or is too old."""
    tool = TOOLS[name]
    ran = _run(machine, tool.ask, f"{name} version", "cannot-tell")
    found = re.search(r"(\d+)\.(\d+)", ran.text)
    if not found:
        raise Failure("tool", f"{name} version", f"printed {ran.text[:80]!r}", tool.remedy(name))
    version = (int(found.group(1)), int(found.group(2)))
    if version < tool.least:
        cause = f"{found.group(0)} is too old"
        raise Failure("tool", f"{name} version", cause, tool.remedy(name))
    return version


def _run(machine: Machine, argv: Sequence[str], step: str, code: str, **options: Any) -> Ran:
    """Runs a tool and insists on exit status 0. ``code`` is that of the Failure otherwise."""
    ran = _try(machine, argv, step, **options)
    if ran.code:
        query = code == "cannot-tell"
        cause = f"{argv[0]} does not answer: {ran.complaint}" if query else ran.complaint
        raise Failure(code, step, cause, _remedy_for(argv[0], ran))
    return ran


def _try(machine: Machine, argv: Sequence[str], step: str, **options: Any) -> Ran:
    """Runs a tool whatever its exit status."""
    name = argv[0]
    try:
        return machine.run(argv, **options)
    except ToolMissing:
        remedy = TOOLS[name].remedy(name) if name in TOOLS else f"install {name}"
        raise Failure("tool", step, f"{name} is not on PATH", remedy) from None
    except TookTooLong:
        seconds = options.get("timeout", QUERY_SECONDS)
        query = seconds == QUERY_SECONDS
        raise Failure(
            "cannot-tell" if query else "timed-out",
            step,
            f"{name} did not answer in {seconds:.0f} s",
            _DOCKER_REMEDY
            if name in ("docker", "k3d")
            else "run it by hand and see what it waits for",
        ) from None


_DOCKER_REMEDY = "systemctl status docker; `docker info` must answer for this user (or with sudo)"


def _remedy_for(name: str, ran: Ran) -> str:
    said = ran.err.decode("utf-8", "replace")
    if name in ("docker", "k3d") and ("daemon" in said or "docker.sock" in said):
        return _DOCKER_REMEDY
    return "see the cause; `hostctl k3d doctor NAME` lists what is wrong with the host"


# What is there


class Node(NamedTuple):
    """A container of a cluster, as `docker inspect` shows it."""

    name: str
    role: str
    status: str
    facts: dict[str, Any]

    @property
    def running(self) -> bool:
        return self.status in ("running", "restarting", "paused")

    @property
    def labels(self) -> dict[str, str]:
        return self.facts["Config"].get("Labels") or {}

    @property
    def bindings(self) -> dict[str, list[dict[str, str]]]:
        """Ports that it was created to publish."""
        return {
            port: bound or []
            for port, bound in (self.facts["HostConfig"].get("PortBindings") or {}).items()
        }

    @property
    def published(self) -> dict[str, Any]:
        """Ports that Docker publishes for it now."""
        return self.facts["NetworkSettings"].get("Ports") or {}

    def mount(self, destination: str) -> str | None:
        """What of the host is mounted there."""
        for mount in self.facts.get("Mounts") or []:
            if mount.get("Destination") == destination:
                return mount.get("Source")
        return None


class Cluster(NamedTuple):
    """A cluster as Docker shows it. ``state`` is absent, running or stopped."""

    name: str
    state: str
    detail: str
    nodes: list[Node]
    network: dict[str, Any] | None

    def of(self, *roles: str) -> list[Node]:
        return [node for node in self.nodes if node.role in roles]

    @property
    def first(self) -> Node:
        """server-0, which the others join and which holds the kubeconfig."""
        return self.of("server")[0]

    @property
    def api(self) -> Node:
        """The node that publishes the API: the load balancer where there is one."""
        return next(iter(self.of("loadbalancer")), self.first)


def look(machine: Machine, name: str, network: str | None = None) -> Cluster:
    """What there is of a cluster, read from Docker; a failed listing is no absence (incident 3).

    ``network`` is the declared one. Raises Failure "cannot-tell" when Docker does not answer or
    when the cluster is partial, "refused" when someone else made what bears its name.
    """
    found = _containers(machine, name)
    _refuse_foreign(name, found)
    nodes = sorted((_node(facts) for facts in found), key=_start_order)
    nodes = [node for node in nodes if node.role != "helper"]
    attached = _network_of(nodes) or network or f"k3d-{name}"
    cluster = Cluster(name, "absent", "", nodes, _network(machine, attached))
    if not nodes:
        _refuse_remains(machine, cluster, found)
        return cluster
    _refuse_partial(cluster, attached)
    down = [node.name for node in nodes if not node.running]
    if down:
        return cluster._replace(state="stopped", detail=f"not running: {', '.join(down)}")
    return cluster._replace(state="running", detail=f"{len(nodes)} node(s) running")


def _containers(machine: Machine, name: str) -> list[dict[str, Any]]:
    """All containers, running or not, that bear the cluster's label or the names of its nodes."""
    row = '{{.ID}}\t{{.Names}}\t{{.Label "k3d.cluster"}}'
    step = f"looking for cluster {name} in Docker"
    for attempt in range(3):
        listed = _run(
            machine, ["docker", "ps", "--all", "--no-trunc", "--format", row], step, "cannot-tell"
        )
        ids = []
        for line in listed.text.splitlines():
            identifier, names, label = (*line.split("\t"), "", "")[:3]
            if label == name or any(_is_node_name(name, one) for one in names.split(",")):
                ids.append(identifier)
        if not ids:
            return []
        seen = _try(machine, ["docker", "inspect", "--type", "container", *ids], step)
        if seen.code == 0:
            return _json(seen.out, step)
        if "No such" not in seen.complaint or attempt == 2:
            raise Failure("cannot-tell", step, seen.complaint, _remedy_for("docker", seen))
    raise AssertionError("unreachable")


def _is_node_name(cluster: str, container: str) -> bool:
    return bool(
        re.fullmatch(rf"k3d-{re.escape(cluster)}-(server-\d+|agent-\d+|serverlb|tools)", container)
    )


def _json(content: bytes, step: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        shown = content[:80].decode("utf-8", "replace")
        raise Failure("cannot-tell", step, f"not JSON: {shown!r}", "run it by hand") from None


def _node(facts: dict[str, Any]) -> Node:
    labels = facts["Config"].get("Labels") or {}
    role = labels.get("k3d.role", "")
    if role not in ("server", "agent", "loadbalancer"):
        role = "helper"
    return Node(facts["Name"].lstrip("/"), role, facts["State"]["Status"], facts)


def _start_order(node: Node) -> tuple[int, int, str]:
    role = ("server", "agent", "loadbalancer", "helper").index(node.role)
    number = re.search(r"-(\d+)$", node.name)
    return role, int(number.group(1)) if number else 0, node.name


def _network_of(nodes: Sequence[Node]) -> str | None:
    return next((node.labels.get("k3d.cluster.network") for node in nodes), None)


def _network(machine: Machine, name: str) -> dict[str, Any] | None:
    step = f"looking for Docker network {name}"
    seen = _try(machine, ["docker", "network", "inspect", name], step)
    if seen.code == 0:
        return _json(seen.out, step)[0]
    if "not found" in seen.complaint or "No such" in seen.complaint:
        return None
    raise Failure("cannot-tell", step, seen.complaint, _remedy_for("docker", seen))


def _networks(machine: Machine) -> list[dict[str, Any]]:
    """All Docker networks of the host."""
    step = "looking at the host's Docker networks"
    for attempt in range(3):
        listed = _run(
            machine, ["docker", "network", "ls", "--quiet", "--no-trunc"], step, "cannot-tell"
        )
        seen = _try(machine, ["docker", "network", "inspect", *listed.text.split()], step)
        if seen.code == 0:
            return _json(seen.out, step)
        # One that went away since it was listed.
        if not ("not found" in seen.complaint or "No such" in seen.complaint) or attempt == 2:
            raise Failure("cannot-tell", step, seen.complaint, _remedy_for("docker", seen))
    raise AssertionError("unreachable")


def refuse_docker_resolvers(machine: Machine, spec: Mapping[str, Any]) -> None:
    """Refuses a DNS server inside a Docker network: its address moves when Docker makes its
    networks anew, and the pods are without DNS (incident 5). The subnet of a macvlan or ipvlan
    network is the LAN's own, where the router answers."""
    for network in _networks(machine):
        if network.get("Driver") in ("macvlan", "ipvlan"):
            continue
        for config in (network.get("IPAM") or {}).get("Config") or []:
            subnet = config.get("Subnet")
            for resolver in spec["resolvers"] if subnet else ():
                if ipaddress.ip_address(resolver) in ipaddress.ip_network(subnet, strict=False):
                    raise Failure(
                        "refused",
                        f"checking the resolvers of cluster {spec['name']}",
                        f"resolver {resolver} lies in Docker network {network['Name']}, {subnet}",
                        "name a public or LAN DNS server in cluster.resolvers, outside every "
                        "Docker network (incident 5)",
                    )


def _refuse_foreign(name: str, found: Iterable[Mapping[str, Any]]) -> None:
    for facts in found:
        labels = facts["Config"].get("Labels") or {}
        if labels.get("app") == "k3d" and labels.get("k3d.cluster") == name:
            continue
        other = labels.get("k3d.cluster")
        maker = f"belongs to cluster {other}" if other else "was not made by k3d"
        container = facts["Name"].lstrip("/")
        raise Failure(
            "refused",
            f"looking for cluster {name} in Docker",
            f"foreign: container {container} bears the name of a node of it but {maker}",
            f"rename or remove that container (docker rename {container} ...), or choose another "
            "cluster name",
        )


def _refuse_remains(machine: Machine, cluster: Cluster, found: Sequence[Any]) -> None:
    """Half a cluster without nodes: what is left may be data, so nothing is made on it."""
    name = cluster.name
    left = [f"container {facts['Name'].lstrip('/')}" for facts in found]
    remove = [f"docker rm --force {facts['Name'].lstrip('/')}" for facts in found]
    volume = f"k3d-{name}-images"
    step = f"looking for volumes of cluster {name}"
    argv = ["docker", "volume", "ls", "--quiet", "--filter", f"name=^{volume}$"]
    if _run(machine, argv, step, "cannot-tell").text.strip():
        left.append(f"volume {volume}")
        remove.append(f"docker volume rm {volume}")
    labels = (cluster.network or {}).get("Labels") or {}
    if labels.get("app") == "k3d" and cluster.network:
        left.append(f"network {cluster.network['Name']}")
        remove.append(f"docker network rm {cluster.network['Name']}")
    if left and not _begun(machine, name):
        raise _partial(name, f"it has no nodes, but left is {', '.join(left)}", "; ".join(remove))


def _begun(machine: Machine, name: str) -> bool:
    """Whether a create of ours began and no cluster has been seen ready since."""
    return bool(read_record(machine, name).get("creating"))


def _refuse_partial(cluster: Cluster, network: str) -> None:
    name = cluster.name
    servers = cluster.of("server")
    if not servers or servers[0].name != f"k3d-{name}-server-0":
        there = ", ".join(node.name for node in cluster.nodes)
        raise _partial(
            name,
            f"k3d-{name}-server-0 is missing; there is {there}",
            f"restore it from a backup, or give the cluster up: k3d cluster delete {name}",
        )
    if cluster.network is None and network != "host":
        raise _partial(
            name,
            f"its Docker network {network} is gone",
            "pulumi up --refresh makes it again; then connect each node: docker network connect "
            f"{network} {servers[0].name}",
        )
    for node in cluster.nodes:
        endpoints = node.facts["NetworkSettings"].get("Networks") or {}
        endpoint = endpoints.get(network)
        lost = endpoint is None or (node.status == "running" and not endpoint.get("IPAddress"))
        if lost and network != "host":
            # This is what made `k3d cluster list` fail in incident 3.
            raise _partial(
                name,
                f"node {node.name} has lost its endpoint on network {network}",
                f"docker network disconnect --force {network} {node.name}; "
                f"docker network connect {network} {node.name}; docker restart {node.name}",
            )


def _partial(name: str, cause: str, remedy: str) -> Failure:
    return Failure(
        "cannot-tell",
        f"looking at cluster {name}",
        f"partial: {cause}",
        f"nothing was created, started or deleted. By hand: {remedy}",
    )


def node_kubeconfig(machine: Machine, cluster: Cluster) -> dict[str, str] | None:
    """The credentials that server-0 holds, base64 as k3s writes them: ca, certificate, key.

    Read by `docker cp`, which works for a stopped node too. None before its first start.
    """
    step = f"reading the kubeconfig of {cluster.first.name}"
    argv = ["docker", "cp", f"{cluster.first.name}:{KUBECONFIG_IN_NODE}", "-"]
    ran = _try(machine, argv, step)
    if ran.code:
        if "Could not find the file" in ran.complaint or "No such" in ran.complaint:
            return None
        raise Failure("cannot-tell", step, ran.complaint, _remedy_for("docker", ran))
    try:
        with tarfile.open(fileobj=io.BytesIO(ran.out)) as archive:
            member = archive.next()
            file = archive.extractfile(member) if member else None
            text = file.read().decode("utf-8") if file else ""
    except (tarfile.TarError, UnicodeDecodeError):
        text = ""
    fields = {
        "ca": "certificate-authority-data",
        "certificate": "client-certificate-data",
        "key": "client-key-data",
    }
    found = {
        key: re.search(rf"^\s*{name}:\s*([A-Za-z0-9+/=]+)\s*$", text, re.MULTILINE)
        for key, name in fields.items()
    }
    if not all(found.values()):
        # Being written, or of a server that died in its first start.
        return None
    return {key: match.group(1) for key, match in found.items() if match}


def identity_of(name: str, credentials: Mapping[str, str]) -> str:
    """Another CA certificate is another cluster, whatever its name (design rule 4)."""
    return f"{name}-{hashlib.sha256(base64.b64decode(credentials['ca'])).hexdigest()[:16]}"


def live_facts(machine: Machine, cluster: Cluster, unseen: list[str]) -> dict[str, Any]:
    """What the cluster was created with, in the words of a ClusterSpec, and what it is now."""
    server = cluster.first
    labels = server.labels
    arguments = _arguments(server)
    storage = server.mount(STORAGE_IN_NODE)
    return {
        "image": server.facts["Config"]["Image"],
        "image_id": server.facts.get("Image", ""),
        "servers": len(cluster.of("server")),
        "agents": len(cluster.of("agent")),
        "disable": sorted(
            part
            for argument in arguments
            if argument.startswith("--disable=")
            for part in argument.split("=", 1)[1].split(",")
        ),
        "k3s_args": [
            _without_secret(argument)
            for argument in arguments
            if argument.split("=")[0] not in ("--disable", "--resolv-conf", "--cluster-init")
        ],
        "api": _live_api(cluster),
        "resolvers": _live_resolvers(machine, server, unseen),
        "storage_dir": storage,
        "network": {
            "name": labels.get("k3d.cluster.network"),
            "subnet": _subnet_of(cluster.network),
        },
        "ports": _live_ports(cluster),
        "load_balancer": bool(cluster.of("loadbalancer")),
        "created_at": server.facts.get("Created"),
        "k3s_version": k3s_version(server.facts["Config"]["Image"]),
        "nodes": {node.name: node.status for node in cluster.nodes},
    }


def k3s_version(image: str) -> str | None:
    """The version that a k3s image's tag names: v1.31.5-k3s1 is v1.31.5+k3s1."""
    found = re.search(r":(v\d+\.\d+\.\d+)[-+](k3s\d+)", image)
    return f"{found.group(1)}+{found.group(2)}" if found else None


def _arguments(node: Node) -> list[str]:
    """Arguments of k3s as --flag=value, without what k3d adds on its own."""
    words = list(node.facts["Config"].get("Cmd") or [])[1:]
    joined: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--") and "=" not in word and words and not words[0].startswith("-"):
            word = f"{word}={words.pop(0)}"
        joined.append(word)
    for label in ("k3d.server.api.host", "k3d.server.loadbalancer"):
        own = f"--tls-san={node.labels.get(label)}"
        if own in joined:
            # k3d puts its own last; an equal one of the user's stays.
            del joined[len(joined) - 1 - joined[::-1].index(own)]
    return joined


def _without_secret(argument: str) -> str:
    name = _SECRET_ARGUMENT.match(argument)
    return f"{name.group(0)}=(not shown)" if name else argument


def _live_api(cluster: Cluster) -> dict[str, Any]:
    node = cluster.api
    bound = node.bindings.get(API_PORT_IN_NODE) or [{}]
    name = cluster.first.labels.get("k3d.server.api.host")
    bind = bound[0].get("HostIp") or "0.0.0.0"
    return {
        "bind": bind,
        "port": int(bound[0].get("HostPort") or 0),
        "server_name": name if name != bind else None,
        "published": bool(node.published.get(API_PORT_IN_NODE)),
    }


def _live_resolvers(machine: Machine, server: Node, unseen: list[str]) -> list[str] | None:
    source = server.mount(RESOLVERS_IN_NODE)
    if source is None:
        return []
    try:
        text = machine.read(source).decode("utf-8", "replace")
    except OSError as error:
        unseen.append(f"resolvers: {source} cannot be read ({error.strerror or error})")
        return None
    return re.findall(r"^\s*nameserver\s+(\S+)", text, re.MULTILINE)


def _subnet_of(network: Mapping[str, Any] | None) -> str | None:
    config = ((network or {}).get("IPAM") or {}).get("Config") or [{}]
    return config[0].get("Subnet")


def _live_ports(cluster: Cluster) -> list[dict[str, Any]]:
    ports = []
    for node in cluster.nodes:
        for port, bound in node.bindings.items():
            number, _, protocol = port.partition("/")
            if port == API_PORT_IN_NODE and node is cluster.api:
                bound = bound[1:]
            for binding in bound:
                ports.append(
                    {
                        "host_port": int(binding.get("HostPort") or 0),
                        "container_port": int(number),
                        "bind": binding.get("HostIp") or "0.0.0.0",
                        "protocol": protocol or "tcp",
                    }
                )
    return ports


def differences(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster, live: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Every difference of the live cluster from the spec: key (that of the setting), declared,
    live, fixed (at creation, incident 6), remedy."""
    name = spec["name"]
    found: list[dict[str, Any]] = []

    def compare(key: str, declared: Any, actual: Any) -> None:
        if declared != actual:
            one = {"key": key, "declared": declared, "live": actual, "fixed": True}
            one["remedy"] = f"keep the cluster: declare {_plain(actual)}; or {_anew(name, [one])}"
            found.append(one)

    if not _same_image(machine, spec["image"], live):
        compare("image", spec["image"], live["image"])
    for key in ("servers", "agents"):
        compare(key, spec[key], live[key])
    compare("disable", sorted(set(spec["disable"])), sorted(set(live["disable"])))
    compare("k3sArgs", _joined(spec["k3s_args"]), live["k3s_args"])
    compare("api.bind", spec["api"]["bind"], live["api"]["bind"])
    compare("api.port", spec["api"]["port"], live["api"]["port"])
    if spec["api"]["server_name"]:
        # It is in the API server's certificate.
        compare("api.serverName", spec["api"]["server_name"], live["api"]["server_name"])
    if live["resolvers"] is not None:
        compare("resolvers", spec["resolvers"], live["resolvers"])
    compare("storageDir", spec["storage_dir"], live["storage_dir"])
    compare("network.name", spec["network"]["name"], live["network"]["name"])
    compare("network.subnet", spec["network"]["subnet"], live["network"]["subnet"])
    compare("ports", _sorted_ports(spec["ports"]), _sorted_ports(live["ports"]))
    if cluster.state == "stopped":
        found.append(_adjustable("state", "running", cluster.detail, "up starts it"))
    elif not live["api"]["published"]:
        remedy = f"up restarts {cluster.api.name}, which publishes it"
        found.append(_adjustable("api.published", True, False, remedy))
    return found


_BEYOND_RECREATE = ("network.name", "network.subnet", "servers")
"""What a recreate cannot change: the network is a resource of its own, not made by hostctl, and
whether k3d makes it instead goes by the number of servers."""


def may_recreate(spec: Mapping[str, Any], fixed: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a recreate is confirmed and brings what is declared."""
    return spec["recreate"] == spec["name"] and not _beyond_recreate(fixed)


def _beyond_recreate(fixed: Iterable[Mapping[str, Any]]) -> bool:
    return any(one["key"] in _BEYOND_RECREATE for one in fixed)


def _anew(name: str, fixed: Iterable[Mapping[str, Any]]) -> str:
    """The way to a new cluster without these differences."""
    if _beyond_recreate(fixed):
        return (
            f"delete the cluster first (cluster.delete set to {name}, up, destroy) and bring it up "
            f"anew, since a recreate changes none of {', '.join(_BEYOND_RECREATE)}"
        )
    return f"make it anew: set cluster.recreate to {name} (it is backed up first)"


def _adjustable(key: str, declared: Any, live: Any, remedy: str) -> dict[str, Any]:
    return {"key": key, "declared": declared, "live": live, "fixed": False, "remedy": remedy}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _joined(arguments: Sequence[str]) -> list[str]:
    return [
        argument.replace(" ", "=", 1) if " " in argument else argument for argument in arguments
    ]


def _sorted_ports(ports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return sorted((dict(port) for port in ports), key=lambda port: json.dumps(port, sort_keys=True))


def _same_image(machine: Machine, declared: str, live: Mapping[str, Any]) -> bool:
    def familiar(reference: str) -> str:
        for prefix in ("docker.io/library/", "docker.io/"):
            if reference.startswith(prefix):
                return reference[len(prefix) :]
        return reference

    if familiar(declared) == familiar(live["image"]):
        return True
    tagged, _, digest = familiar(declared).partition("@")
    live_tagged, _, live_digest = familiar(live["image"]).partition("@")
    (name, tag), (live_name, live_tag) = map(_split_tag, (tagged, live_tagged))
    if name != live_name or (tag and live_tag and tag != live_tag):
        return False
    if digest and live_digest:
        return digest == live_digest
    if not digest:
        return tag == live_tag
    # Created by tag, declared by digest: the same if the image that it runs has that digest.
    argv = ["docker", "image", "inspect", "--format", "{{json .RepoDigests}}", live["image_id"]]
    ran = _try(machine, argv, "reading the node image's digest")
    return ran.code == 0 and digest in ran.text


def _split_tag(reference: str) -> tuple[str, str]:
    """Name and tag; a colon before a slash is that of a registry's port."""
    name, colon, tag = reference.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (reference, "")


# The record


def read_record(machine: Machine, name: str) -> dict[str, Any]:
    """What was last done for the cluster; empty when nothing is recorded."""
    path = f"{STATE_DIRECTORY}/clusters/{name}.json"
    try:
        record = json.loads(machine.read(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Failure(
            "cannot-tell",
            f"reading the record of cluster {name}",
            f"{path}: {error}",
            "read it as root; a damaged one may be moved away: the next up records anew",
        ) from None
    return record if isinstance(record, dict) else {}


def write_record(machine: Machine, name: str, **changes: Any) -> dict[str, Any]:
    """Changes parts of the record; the caller holds the cluster's lock."""
    record = {**read_record(machine, name), **changes}
    path = f"{STATE_DIRECTORY}/clusters/{name}.json"
    machine.make_directory(os.path.dirname(path), 0o755)
    content = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
    # It holds no secret, and a preview without sudo reads it.
    machine.write_atomic(path, content, 0o644)
    return record


def cluster_lock(machine: Machine, name: str) -> contextlib.AbstractContextManager[None]:
    return machine.lock(f"cluster-{name}")


def next_generation(record: Mapping[str, Any], agrees: bool) -> int:
    """The generation for `ensure`: the recorded one while live agrees with declared, one more while
    it does not, so that healing once leaves nothing to do (design rule 3)."""
    recorded = record.get("generation")
    if recorded is None:
        return 0 if agrees else 1
    return recorded if agrees else recorded + 1


def next_incarnation(
    machine: Machine, record: Mapping[str, Any], state: str, identity: str | None, renew: bool
) -> str:
    """The incarnation: which making of the cluster this is. It moves on when the recorded cluster
    is gone, has another CA, or is about to be made anew (design rule 4)."""
    here = hashlib.sha256(machine.machine_id().encode()).hexdigest()[:8]
    recorded = record.get("incarnation")
    if not recorded:
        return f"{here}-1"
    known = record.get("identity")
    gone = state == "absent" and known is not None
    other = identity is not None and known is not None and identity != known
    if gone or other or renew:
        return f"{here}-{int(recorded.split('-')[1]) + 1}"
    return recorded


def next_certificate_generation(
    machine: Machine,
    record: Mapping[str, Any],
    cluster: Cluster,
    credentials: Mapping[str, str] | None,
) -> int:
    """Like the generation, for the kubeconfig file against what the node holds now."""
    written = record.get("kubeconfig")
    if not written:
        return 1 if cluster.state == "absent" else 0
    generation = written["generation"]
    if cluster.state == "absent":
        return generation + 1
    if credentials is None:
        return generation
    wanted = render_kubeconfig(cluster.name, credentials, written["server"]).encode()
    if hashlib.sha256(wanted).hexdigest() != written["sha256"]:
        return generation + 1
    return generation if _is_in_place(machine, written, wanted) else generation + 1


def _is_in_place(machine: Machine, file: Mapping[str, Any], content: bytes) -> bool:
    """Whether the file holds the content with its mode, owner and group. A file that may not be
    read counts as in place: on cannot tell the last answer is kept."""
    try:
        seen = machine.stat(file["path"])
        if seen is None:
            return False
        wanted = (_mode(file["mode"]), file["owner"], file["group"])
        return (seen.mode, seen.owner, seen.group) == wanted and machine.read(
            file["path"]
        ) == content
    except OSError:
        return True


# Waiting


def wait_ready(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster
) -> tuple[Cluster, dict[str, str]]:
    """Waits until the API answers in the node and through its published port (incident 1). Returns
    the cluster as it then is, and its credentials.

    Follows what the servers read (incident 4): while they read it waits, up to api_wait_seconds; a
    server that reads nothing for STALL_SECONDS is restarted, STALL_RESTARTS times, and never
    deleted (incident 2).
    """
    name = spec["name"]
    started = moved = machine.now()
    read, restarts = 0, 0
    while True:
        credentials, why = ready(machine, cluster)
        if credentials:
            return cluster, credentials
        now = machine.now()
        waited = now - started
        if waited >= spec["api_wait_seconds"]:
            raise Failure(
                "timed-out",
                f"waiting for the API of cluster {name}",
                f"not ready after {waited:.0f} s: {why}",
                f"docker logs --tail 50 {cluster.first.name}; a datastore that is still being read "
                "needs a larger cluster.apiWaitSeconds",
            )
        total = _bytes_read(machine, cluster)
        if total is None or total - read >= STALL_BYTES or total < read:
            read, moved = total or 0, now
        elif now - moved >= STALL_SECONDS:
            if restarts == STALL_RESTARTS:
                raise Failure(
                    "failed",
                    f"waiting for the API of cluster {name}",
                    f"stalled again after {restarts} restarts: {why}",
                    f"docker logs --tail 50 {cluster.first.name}",
                )
            restarts += 1
            say(f"{cluster.first.name} reads nothing since {now - moved:.0f} s: restart {restarts}")
            _restart(machine, cluster.first.name)
            read, moved = 0, machine.now()
        say(f"waiting for the API of {name}: {waited:.0f} s, {_size(total)} read; {why}")
        machine.sleep(PROGRESS_SECONDS)
        cluster = look(machine, name, spec["network"]["name"])
        if cluster.state == "absent":
            raise Failure(
                "failed",
                f"waiting for cluster {name}",
                "it was deleted while it was waited for",
                "run up again",
            )


def ready(machine: Machine, cluster: Cluster) -> tuple[dict[str, str] | None, str]:
    """The credentials of a cluster whose API can be used, or None and why it cannot."""
    server = cluster.first.name
    down = [node.name for node in cluster.nodes if node.status != "running"]
    if down:
        return None, f"{', '.join(down)} is not running"
    argv = ["docker", "exec", server, "kubectl", "get", "--raw=/readyz"]
    try:
        ran = machine.run(argv, timeout=QUERY_SECONDS)
    except TookTooLong:
        return None, "the API does not answer"
    except ToolMissing:
        return None, "docker is not on PATH"
    if ran.code or ran.text.strip() != "ok":
        said = ran.complaint if ran.code else ran.text[:100]
        return None, f"the API in the node is not ready: {said}"
    api = _live_api(cluster)
    address = "127.0.0.1" if api["bind"] == "0.0.0.0" else api["bind"]
    credentials = node_kubeconfig(machine, cluster)
    if credentials is None:
        return None, "the node has written no kubeconfig yet"
    ca = base64.b64decode(credentials["ca"]).decode("ascii", "replace")
    refused = machine.connect(address, api["port"], ca)
    if refused:
        return None, f"{address}:{api['port']} does not reach it: {refused}"
    return credentials, ""


def _bytes_read(machine: Machine, cluster: Cluster) -> int | None:
    """What all processes of the servers have read; None when it cannot be seen."""
    pids: list[int] = []
    for node in cluster.of("server"):
        with contextlib.suppress(ToolMissing, TookTooLong):
            ran = machine.run(["docker", "top", node.name, "-eo", "pid"])
            pids += [int(word) for word in ran.text.split() if word.isdigit()]
    return machine.bytes_read(pids)


def _size(count: int | None) -> str:
    if count is None:
        return "an unknown number of bytes"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def wait_for_address(machine: Machine, address: str) -> None:
    """Waits for the bind address: an interface such as tailscale0 comes up after Docker, and a
    container started before it never publishes its port (incident 1)."""
    waited = 0.0
    while not machine.has_address(address):
        if waited >= BIND_WAIT_SECONDS:
            raise Failure(
                "timed-out",
                f"waiting for the bind address {address}",
                f"no interface of this host has it after {waited:.0f} s",
                "bring the interface up (ip address show), or correct cluster.api.bind",
            )
        say(f"waiting for an interface with {address}: {waited:.0f} s")
        machine.sleep(PROGRESS_SECONDS)
        waited += PROGRESS_SECONDS


# Changing


def create(machine: Machine, spec: Mapping[str, Any]) -> None:
    """Makes the cluster that is absent. The caller holds the lock and waits for it to be ready.

    The record says that a create began, with the nonce that the nodes carry as a label: a run after
    a kill goes on with exactly those (see `resume`); nothing is ever rolled back (incident 2).
    """
    name = spec["name"]
    tool_version(machine, "k3d")
    _refuse_listed(machine, name)
    _refuse_wrong_network(machine, spec)
    wait_for_address(machine, spec["api"]["bind"])
    for bind, port in _published_ports(spec):
        if not machine.port_is_free(bind, port):
            raise Failure(
                "refused",
                f"creating cluster {name}",
                f"port {port} on {bind} is in use",
                f"see by what: ss --listening --tcp --processes 'sport = :{port}'; stop it or "
                "choose another port",
            )
    directory = f"{STATE_DIRECTORY}/clusters/{name}"
    machine.make_directory(directory, 0o755)
    machine.make_directory(spec["storage_dir"], 0o755, "root", "root")
    resolvers = "".join(f"nameserver {address}\n" for address in spec["resolvers"])
    machine.write_atomic(f"{directory}/resolv.conf", resolvers.encode(), 0o644)
    nonce = machine.nonce()
    config = f"{directory}/k3d.yaml"
    machine.write_atomic(config, json.dumps(k3d_config(spec, nonce), indent=1).encode(), 0o600)
    write_record(machine, name, creating={"nonce": nonce, "at": _utc(machine.now())})
    say(f"creating cluster {name} from {spec['image']}")
    argv = ["k3d", "cluster", "create", "--config", config, "--no-rollback"]
    argv += ["--kubeconfig-update-default=false", "--kubeconfig-switch-context=false"]
    _k3d(machine, argv, f"creating cluster {name}", spec["api_wait_seconds"])


def _refuse_listed(machine: Machine, name: str) -> None:
    """k3d must agree that the cluster is absent; a failed listing is no agreement (incident 3)."""
    step = f"asking k3d whether cluster {name} exists"
    ran = _run(machine, ["k3d", "cluster", "list", "--output", "json"], step, "cannot-tell")
    if any(one.get("name") == name for one in _json(ran.out or b"[]", step) or []):
        raise Failure(
            "cannot-tell",
            step,
            "k3d lists it and Docker shows no node of it",
            "do docker and k3d ask the same Docker (DOCKER_HOST)? compare `docker ps --all` and "
            "`k3d cluster list`",
        )


def _refuse_wrong_network(machine: Machine, spec: Mapping[str, Any]) -> None:
    name, subnet = spec["network"]["name"], spec["network"]["subnet"]
    there = _network(machine, name)
    step = f"creating cluster {spec['name']}"
    if spec["servers"] > 1:
        # k3d gives nodes fixed addresses, which etcd needs, only on a network of its own making.
        if there:
            remedy = f"docker network rm {name}, if nothing uses it"
            raise Failure("refused", step, f"Docker network {name} is there already", remedy)
        return
    gateway = str(ipaddress.ip_network(subnet)[1])
    by_hand = f"docker network create --subnet {subnet} --gateway {gateway} {name}"
    if there is None:
        raise Failure(
            "refused",
            step,
            f"Docker network {name} is not there",
            f"pulumi up --refresh makes it; by hand: {by_hand}",
        )
    if _subnet_of(there) != subnet:
        raise Failure(
            "refused",
            step,
            f"Docker network {name} has subnet {_subnet_of(there)}, declared is {subnet}",
            f"declare that subnet, or with nothing connected: docker network rm {name}; {by_hand}",
        )


def _published_ports(spec: Mapping[str, Any]) -> list[tuple[str, int]]:
    ports = [(spec["api"]["bind"], spec["api"]["port"])]
    ports += [
        (port["bind"], port["host_port"]) for port in spec["ports"] if port["protocol"] == "tcp"
    ]
    return ports


def k3d_config(spec: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """The config file of k3d (k3d.io/v1alpha5). One server publishes its own ports: without a load
    balancer there is one thing less that can start too early (incident 1)."""
    single = spec["servers"] == 1
    nodes = ["server:*"] + (["agent:*"] if spec["agents"] else [])
    resolvers = f"{STATE_DIRECTORY}/clusters/{spec['name']}/resolv.conf"
    mounts = [f"{spec['storage_dir']}:{STORAGE_IN_NODE}", f"{resolvers}:{RESOLVERS_IN_NODE}:ro"]
    api = {"hostIP": spec["api"]["bind"], "hostPort": str(spec["api"]["port"])}
    if spec["api"]["server_name"]:
        api["host"] = spec["api"]["server_name"]
    arguments = [
        {"arg": f"--resolv-conf={RESOLVERS_IN_NODE}", "nodeFilters": nodes},
        *(
            {"arg": argument, "nodeFilters": ["server:*"]}
            for argument in [f"--disable={part}" for part in spec["disable"]] + spec["k3s_args"]
        ),
    ]
    return {
        "apiVersion": "k3d.io/v1alpha5",
        "kind": "Simple",
        "metadata": {"name": spec["name"]},
        "servers": spec["servers"],
        "agents": spec["agents"],
        "image": spec["image"],
        **(
            {"network": spec["network"]["name"]}
            if single
            else {"subnet": spec["network"]["subnet"]}
        ),
        "kubeAPI": api,
        "volumes": [{"volume": mount, "nodeFilters": nodes} for mount in mounts],
        "ports": [
            {
                "port": "{bind}:{host_port}:{container_port}/{protocol}".format(**port),
                "nodeFilters": ["server:0:direct" if single else "loadbalancer"],
            }
            for port in spec["ports"]
        ],
        "options": {
            "k3d": {"wait": True, "disableLoadbalancer": single},
            "k3s": {"extraArgs": arguments},
            "runtime": {
                "labels": [{"label": f"{CREATE_LABEL}={nonce}", "nodeFilters": nodes}],
            },
        },
    }


def _k3d(machine: Machine, argv: Sequence[str], step: str, seconds: float) -> None:
    def tick(waited: float) -> None:
        say(f"{step}: {waited:.0f} s")

    ran = _try(machine, argv, step, timeout=float(seconds), tick=tick)
    if ran.code:
        # k3d logs to stdout and stderr alike.
        said = Ran(ran.code, b"", ran.err or ran.out)
        remedy = "see the cause and run up again: what was begun is kept and continued"
        raise Failure("failed", step, _without_colour(said.complaint), remedy)


def _without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def resume(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> Cluster:
    """Goes on with a create that was cut off, told by the nonce that the record and its nodes have.

    Nodes that were created and never started lack what k3d writes into them before the first start,
    so k3d starts them. Nothing is deleted except k3d's helper container, which holds no data and
    keeps k3d from creating. A create of several nodes that was cut off before all were made cannot
    be completed by k3d: that is reported as partial.
    """
    name = cluster.name
    begun = read_record(machine, name).get("creating")
    if not begun:
        return cluster
    if cluster.state == "absent":
        helper = f"k3d-{name}-tools"
        if any(facts["Name"].lstrip("/") == helper for facts in _containers(machine, name)):
            step = f"removing k3d's helper {helper} of a create that was cut off"
            _run(machine, ["docker", "rm", "--force", helper], step, "failed", timeout=120.0)
        return cluster
    ours = [node for node in cluster.nodes if node.labels.get(CREATE_LABEL) == begun["nonce"]]
    if not ours:
        return cluster
    wanted = spec["servers"] + spec["agents"]
    made = len(cluster.of("server", "agent"))
    if made < wanted:
        raise _partial(
            name,
            f"its create of {begun['at']} was cut off after {made} of {wanted} nodes; it was never "
            "ready",
            f"k3d cluster delete {name}; then run up again",
        )
    if any(node.status == "created" for node in cluster.nodes):
        say(f"continuing the create of {name} that began at {begun['at']}")
        argv = ["k3d", "cluster", "start", name]
        _k3d(machine, argv, f"starting cluster {name}", spec["api_wait_seconds"])
    return look(machine, name, spec["network"]["name"])


def heal(machine: Machine, cluster: Cluster) -> bool:
    """Starts what is stopped, servers first, and restarts the node whose API port is not published.
    Returns whether there was anything to do."""
    api = _live_api(cluster)
    down = [node.name for node in cluster.nodes if not node.running]
    if down or not api["published"]:
        wait_for_address(machine, api["bind"])
    for name in down:
        say(f"starting {name}")
        _run(machine, ["docker", "start", name], f"starting {name}", "failed", timeout=300.0)
    if not down and not api["published"]:
        say(f"{cluster.api.name} does not publish the API: restarting it")
        _restart(machine, cluster.api.name)
    return bool(down) or not api["published"]


def _restart(machine: Machine, container: str) -> None:
    argv = ["docker", "restart", "-t", "60", container]
    _run(machine, argv, f"restarting {container}", "failed", timeout=300.0)


def stop(machine: Machine, cluster: Cluster) -> None:
    """Stops all nodes, those that others need last."""
    for node in reversed(cluster.nodes):
        if node.running:
            say(f"stopping {node.name}")
            argv = ["docker", "stop", "-t", "60", node.name]
            _run(machine, argv, f"stopping {node.name}", "failed", timeout=300.0)


def back_up(machine: Machine, cluster: Cluster) -> str:
    """Copies the stopped cluster's volumes and datastore next to the storage directory that is
    really mounted (incident 6), verifies both, and returns the directory. Refuses without room."""
    step = f"backing up cluster {cluster.name}"
    server = cluster.first
    storage = server.mount(STORAGE_IN_NODE)
    data = server.mount(os.path.dirname(DATASTORE_IN_NODE))
    if not storage or not data:
        raise Failure(
            "refused",
            step,
            f"{server.name} has no mount at {STORAGE_IN_NODE if not storage else data}",
            "copy its data by hand, then delete it: "
            f"docker cp {server.name}:{os.path.dirname(DATASTORE_IN_NODE)} .; "
            f"hostctl k3d delete {cluster.name} --confirm {cluster.name}",
        )
    if len(cluster.of("server", "agent")) > 1:
        raise Failure(
            "refused",
            step,
            "it has several nodes, and each may hold volumes",
            "copy each node's data by hand, then delete the cluster: "
            f"hostctl k3d delete {cluster.name} --confirm {cluster.name}",
        )
    target = f"{storage.rstrip('/')}-backups/{cluster.name}-{_stamp(machine)}"
    needed = machine.tree_bytes(storage) + machine.tree_bytes(f"{data}/server")
    needed += needed // 10 + BACKUP_SPARE_BYTES
    free = machine.free_bytes(target)
    if free < needed:
        raise Failure(
            "refused",
            step,
            f"{target} has room for {_size(free)}, needed are {_size(needed)}",
            "make room there, or move old backups away; the cluster is stopped and unharmed "
            f"(hostctl k3d start {cluster.name})",
        )
    machine.make_directory(os.path.dirname(target), 0o700)
    machine.make_directory(target, 0o700)
    volumes, datastore = f"{target}/storage.tar", f"{target}/datastore.tar"
    say(f"backing up {_size(needed)} to {target}")

    def run(argv: Sequence[str], step: str, **options: Any) -> Ran:
        def tick(waited: float) -> None:
            say(f"{step}: {waited:.0f} s, {_size(machine.tree_bytes(target))} written")

        options.update(timeout=24 * 3600.0, tick=tick, ends_with_us=True)
        return _run(machine, argv, step, "failed", **options)

    pack = ["tar", "--create", "--xattrs", "--acls", "--numeric-owner", "--file", volumes]
    run([*pack, "--directory", storage, "."], step)
    copy = ["docker", "cp", f"{server.name}:{DATASTORE_IN_NODE}", "-"]
    run(copy, step, to_file=datastore)
    verify = f"verifying the backup of cluster {cluster.name}"
    compare = ["tar", "--compare", "--xattrs", "--acls", "--file", volumes, "--directory", storage]
    run(compare, verify)
    again = f"{target}/datastore-again.tar"
    run(copy, verify, to_file=again)
    say(f"{verify}: checksums")
    sums = {path: machine.checksum(path) for path in (volumes, datastore, again)}
    listed = run(["tar", "--list", "--file", datastore], verify)
    if sums[datastore] != sums[again] or "server/db/" not in listed.text:
        raise Failure(
            "failed",
            verify,
            "two copies of the datastore differ"
            if sums[datastore] != sums[again]
            else "no datastore",
            f"the cluster is stopped and unharmed; see {target}",
        )
    _run(machine, ["rm", again], verify, "failed")
    lines = "".join(f"{sums[path]}  {os.path.basename(path)}\n" for path in (volumes, datastore))
    machine.write_atomic(f"{target}/SHA256SUMS", lines.encode(), 0o600)
    return target


def delete(machine: Machine, name: str) -> None:
    """Deletes a cluster that its caller has confirmed. The storage directory stays."""
    tool_version(machine, "k3d")
    say(f"deleting cluster {name}")
    _k3d(machine, ["k3d", "cluster", "delete", name], f"deleting cluster {name}", 600)
    left = _containers(machine, name)
    if left:
        names = " ".join(facts["Name"].lstrip("/") for facts in left)
        raise Failure(
            "failed", f"deleting cluster {name}", f"{names} is left", f"docker rm --force {names}"
        )
    write_record(machine, name, creating=None)


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _stamp(machine: Machine) -> str:
    return datetime.fromtimestamp(machine.now(), timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")


# Verbs: the cluster

Result = dict[str, Any]


def k3d_inspect(machine: Machine, spec: dict[str, Any]) -> Result:
    """Looks at a cluster and changes nothing: state, live facts, differences from the settings."""
    spec = cluster_spec(spec, "k3d inspect")
    cluster = look(machine, spec["name"], spec["network"]["name"])
    refuse_docker_resolvers(machine, spec)
    return {"cluster": inspected(machine, spec, cluster)}


def inspected(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> Result:
    """The result of `k3d inspect` about a cluster that was looked at."""
    record = read_record(machine, spec["name"])
    unseen: list[str] = []
    live: dict[str, Any] = {}
    found: list[dict[str, Any]] = []
    credentials, identity, namespaces = None, None, None
    if cluster.state == "absent":
        tool_version(machine, "k3d")
        unseen.append("namespaces and objects: the cluster does not exist")
    else:
        live = live_facts(machine, cluster, unseen)
        found = differences(machine, spec, cluster, live)
        credentials = node_kubeconfig(machine, cluster)
        if credentials:
            identity = identity_of(spec["name"], credentials)
        else:
            unseen.append("identity: the node has written no kubeconfig yet")
        namespaces = _namespaces(machine, cluster, unseen)
    fixed = [difference for difference in found if difference["fixed"]]
    # A create that was cut off is not what was declared, however it looks.
    agrees = cluster.state == "running" and not found and not record.get("creating")
    renew = bool(fixed) and may_recreate(spec, fixed)
    return {
        "state": cluster.state,
        "detail": cluster.detail,
        "identity": identity,
        "generation": next_generation(record, agrees),
        "incarnation": next_incarnation(machine, record, cluster.state, identity, renew),
        "certificate_generation": next_certificate_generation(
            machine, record, cluster, credentials
        ),
        "differences": found,
        "live": live,
        "namespaces": namespaces,
        "unseen": unseen,
    }


def _namespaces(machine: Machine, cluster: Cluster, unseen: list[str]) -> list[str] | None:
    if cluster.state != "running":
        unseen.append("namespaces and objects: the cluster is stopped")
        return None
    argv = ["docker", "exec", cluster.first.name, "kubectl", "get", "namespaces", "--output=name"]
    try:
        ran = machine.run(argv)
    except (ToolMissing, TookTooLong):
        ran = Ran(1, b"", b"no answer in time")
    if ran.code:
        unseen.append(f"namespaces and objects: the API does not answer ({ran.complaint[:200]})")
        return None
    return sorted(line.split("/", 1)[1] for line in ran.text.split() if "/" in line)


def k3d_ensure(machine: Machine, spec: dict[str, Any]) -> Result:
    """Makes the cluster be there, running and reachable: creates, starts or heals it. Safe at any
    time, twice at once and after a kill; deletes nothing, except for a confirmed recreate."""
    spec = cluster_spec(spec, "k3d ensure")
    name = spec["name"]
    with cluster_lock(machine, name):
        cluster = look(machine, name, spec["network"]["name"])
        cluster = resume(machine, spec, cluster)
        fixed = _fixed_differences(machine, spec, cluster)
        if fixed and not may_recreate(spec, fixed):
            raise Failure(
                "refused",
                f"ensuring cluster {name}",
                "fixed when it was created: "
                + "; ".join(
                    f"{one['key']} is {_plain(one['live'])}, declared {_plain(one['declared'])}"
                    for one in fixed
                ),
                f"declare the live values to keep the cluster; or {_anew(name, fixed)}",
            )
        if fixed or cluster.state == "absent":
            refuse_docker_resolvers(machine, spec)
        if fixed:
            stop(machine, cluster)
            backup = back_up(machine, cluster)
            say(f"the backup in {backup} is verified")
            write_record(machine, name, backup=backup)
            delete(machine, name)
            cluster = look(machine, name, spec["network"]["name"])
        if cluster.state == "absent":
            create(machine, spec)
            changed = True
        else:
            changed = heal(machine, cluster)
        if changed:
            cluster = look(machine, name, spec["network"]["name"])
        if cluster.state == "absent":
            raise Failure(
                "failed",
                f"ensuring cluster {name}",
                "k3d reported success and Docker shows no node of it",
                "do k3d and docker ask the same Docker (DOCKER_HOST)? was it deleted meanwhile?",
            )
        return {"cluster": _settle(machine, spec, cluster)}


def _fixed_differences(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster
) -> list[dict[str, Any]]:
    if cluster.state == "absent":
        return []
    live = live_facts(machine, cluster, [])
    return [one for one in differences(machine, spec, cluster, live) if one["fixed"]]


def _settle(machine: Machine, spec: Mapping[str, Any], cluster: Cluster) -> Result:
    """Waits for the cluster, records what was done, and returns what is known of it."""
    name = spec["name"]
    cluster, credentials = wait_ready(machine, spec, cluster)
    live = live_facts(machine, cluster, [])
    if not live["api"]["published"]:
        raise Failure(
            "failed",
            f"ensuring cluster {name}",
            f"{cluster.api.name} runs and does not publish its API port",
            f"docker port {cluster.api.name}; docker restart {cluster.api.name}",
        )
    identity = identity_of(name, credentials)
    given = {key: spec[key] for key in ("generation", "incarnation") if spec[key] is not None}
    applied = {
        key: spec[key]
        for key in CLUSTER_SPEC
        if key not in ("generation", "incarnation", "recreate", "confirm")
    }
    record = read_record(machine, name)
    bootstrapped = record.get("argocd") if record.get("identity") == identity else None
    changes = {
        **given,
        "identity": identity,
        "applied": applied,
        "creating": None,
        "argocd": bootstrapped,
    }
    if any(record.get(key) != value for key, value in changes.items()):
        write_record(machine, name, **changes)
    version = live["k3s_version"] or _asked_version(machine, cluster)
    return {
        "name": name,
        "identity": identity,
        "k3s_version": version,
        "created_at": live["created_at"],
        "endpoint": f"https://{live['api']['bind']}:{live['api']['port']}",
        "image": live["image"],
        "network": live["network"],
        "storage_dir": live["storage_dir"],
        "nodes": sorted(live["nodes"]),
    }


def _asked_version(machine: Machine, cluster: Cluster) -> str | None:
    argv = ["docker", "exec", cluster.first.name, "k3s", "--version"]
    ran = _try(machine, argv, "asking k3s for its version")
    found = re.search(r"v\d+\.\d+\.\d+\S*", ran.text)
    return found.group(0) if found else None


NAME_SPEC = {"name": Value(_NAME)}


def k3d_start(machine: Machine, spec: dict[str, Any]) -> Result:
    """Starts a stopped cluster and waits for its API."""
    name = checked(spec, NAME_SPEC, "k3d start")["name"]
    with cluster_lock(machine, name):
        cluster = _present(machine, name, "starting")
        started = heal(machine, cluster)
        applied = read_record(machine, name).get("applied") or {}
        seconds = applied.get("api_wait_seconds", 1800)
        network = {"name": _network_of(cluster.nodes)}
        wanted = {"name": name, "api_wait_seconds": seconds, "network": network}
        wait_ready(machine, wanted, look(machine, name) if started else cluster)
    return {"started": started}


def k3d_stop(machine: Machine, spec: dict[str, Any]) -> Result:
    """Stops a cluster. Nothing is lost; `k3d start` or the next up starts it."""
    name = checked(spec, NAME_SPEC, "k3d stop")["name"]
    with cluster_lock(machine, name):
        cluster = _present(machine, name, "stopping")
        stop(machine, cluster)
    return {"stopped": any(node.running for node in cluster.nodes)}


def _present(machine: Machine, name: str, doing: str) -> Cluster:
    cluster = look(machine, name)
    if cluster.state == "absent":
        raise Failure(
            "refused",
            f"{doing} cluster {name}",
            "it does not exist",
            f"hostctl k3d ensure {name}, or pulumi up, creates it",
        )
    return cluster


def k3d_delete(machine: Machine, spec: dict[str, Any]) -> Result:
    """Deletes the cluster whose name is confirmed. One that is absent is fine; the storage
    directory stays (incident 10)."""
    # The spec is the one of a stored ensure, perhaps of another version: only two keys count.
    wanted = {key: spec[key] for key in ("name", "confirm") if key in spec}
    shape = {"name": Value(_NAME), "confirm": Value(_or_null(_NAME), None)}
    given = checked(wanted, shape, "k3d delete")
    name = given["name"]
    with cluster_lock(machine, name):
        if not _containers(machine, name):
            return {"deleted": False}
        if given["confirm"] != name:
            raise Failure(
                "refused",
                f"deleting cluster {name}",
                "its name is not confirmed",
                f"set cluster.delete to {name} and run up, then destroy; by hand: "
                f"hostctl k3d delete {name} --confirm {name}",
            )
        _refuse_foreign(name, _containers(machine, name))
        delete(machine, name)
    return {"deleted": True}


def k3d_identity(machine: Machine, spec: dict[str, Any]) -> Result:
    """The identity of a cluster: its name and a digest of its CA certificate."""
    name = checked(spec, NAME_SPEC, "k3d identity")["name"]
    cluster = _present(machine, name, "identifying")
    credentials = node_kubeconfig(machine, cluster)
    if credentials is None:
        raise Failure(
            "cannot-tell",
            f"identifying cluster {name}",
            f"{cluster.first.name} has written no kubeconfig yet",
            f"hostctl k3d start {name}",
        )
    return {"identity": identity_of(name, credentials)}


def k3d_doctor(machine: Machine, spec: dict[str, Any]) -> Result:
    """All that is wrong or missing on the host for this cluster, at once, each with its remedy."""
    spec = cluster_spec(spec, "k3d doctor")
    findings: list[dict[str, str]] = []

    def find(severity: str, what: str, remedy: str) -> None:
        findings.append({"severity": severity, "what": what, "remedy": remedy})

    for tool in TOOLS:
        try:
            tool_version(machine, tool)
        except Failure as failure:
            find("error", f"{failure.step}: {failure.cause}", failure.remedy)
    cluster = None
    try:
        cluster = look(machine, spec["name"], spec["network"]["name"])
    except Failure as failure:
        find("error", f"{failure.step}: {failure.cause}", failure.remedy)
    try:
        refuse_docker_resolvers(machine, spec)
    except Failure as failure:
        if failure.code == "refused":
            find("error", failure.cause, failure.remedy)
    bind = spec["api"]["bind"]
    if not machine.has_address(bind):
        find("error", f"no interface has {bind}", "bring it up: ip address show")
    storage = machine.stat(spec["storage_dir"])
    if storage and storage.kind != "directory":
        find("error", f"{spec['storage_dir']} is no directory", "move it away")
    elif machine.free_bytes(spec["storage_dir"]) < 5 * 2**30:
        room = _size(machine.free_bytes(spec["storage_dir"]))
        find("warning", f"{spec['storage_dir']} has {room} left", "make room there")
    if cluster and cluster.state == "absent":
        for address, port in _published_ports(spec):
            if machine.has_address(address) and not machine.port_is_free(address, port):
                find("error", f"port {port} on {address} is in use", "stop what listens there")
        if spec["servers"] == 1 and cluster.network is None:
            find(
                "info", f"Docker network {spec['network']['name']} is missing", "pulumi up makes it"
            )
    elif cluster:
        for one in inspected(machine, spec, cluster)["differences"]:
            severity = "error" if one["fixed"] else "warning"
            what = f"{one['key']} is {_plain(one['live'])}, declared {_plain(one['declared'])}"
            find(severity, what, one["remedy"])
        credentials, why = ready(machine, cluster)
        if not credentials:
            find("error", why, f"docker logs --tail 50 {cluster.first.name}")
        if cluster.of("loadbalancer") and spec["servers"] == 1:
            find(
                "warning",
                "a load balancer stands before the only server; it can start before the bind "
                "address is there (incident 1)",
                "a recreate makes the cluster without one",
            )
    return {"findings": findings}


# Verbs: the kubeconfig and other files

KUBECONFIG_SPEC: dict[str, Any] = {
    "cluster": Value(_NAME),
    "path": Value(_path),
    "owner": Value(_ACCOUNT, "root"),
    "group": Value(_ACCOUNT, "wheel"),
    "mode": Value(lambda value: f"{_private_mode(value):04o}", "0640"),
    "directory_mode": Value(lambda value: f"{_private_mode(value):04o}", "0750"),
    "server": Value(_server_url),
    "generation": Value(_or_null(_number(0, 2**31)), None),
}


def render_kubeconfig(name: str, credentials: Mapping[str, str], server: str) -> str:
    """The kubeconfig for clients, with the names that k3d gives. Equal input, equal text."""
    return (
        "apiVersion: v1\n"
        "clusters:\n"
        "- cluster:\n"
        f"    certificate-authority-data: {credentials['ca']}\n"
        f"    server: {server}\n"
        f"  name: k3d-{name}\n"
        "contexts:\n"
        "- context:\n"
        f"    cluster: k3d-{name}\n"
        f"    user: admin@k3d-{name}\n"
        f"  name: k3d-{name}\n"
        f"current-context: k3d-{name}\n"
        "kind: Config\n"
        "preferences: {}\n"
        "users:\n"
        f"- name: admin@k3d-{name}\n"
        "  user:\n"
        f"    client-certificate-data: {credentials['certificate']}\n"
        f"    client-key-data: {credentials['key']}\n"
    )


def kubeconfig(machine: Machine, spec: dict[str, Any]) -> Result:
    """Reads the kubeconfig out of the cluster, writes it for the host's people, and returns it.

    The server address is the one given (incident 14). The file appears whole, with its final mode
    and owner; its directory is made if there is none and left as it is if there is one.
    """
    wanted = checked(spec, KUBECONFIG_SPEC, "kubeconfig")
    name, path = wanted["cluster"], wanted["path"]
    step = f"writing the kubeconfig of cluster {name}"
    _refuse_missing_account(machine, step, wanted["owner"], wanted["group"])
    with cluster_lock(machine, name):
        cluster = _present(machine, name, "reading the kubeconfig of")
        credentials = node_kubeconfig(machine, cluster)
        if credentials is None:
            raise Failure(
                "failed",
                step,
                f"{cluster.first.name} has written no kubeconfig yet",
                f"hostctl k3d start {name}",
            )
        text = render_kubeconfig(name, credentials, wanted["server"])
        file = {key: wanted[key] for key in ("path", "owner", "group", "mode", "server")}
        if not _is_in_place(machine, file, text.encode()):
            account = (wanted["owner"], wanted["group"])
            directory_mode = int(wanted["directory_mode"], 8)
            machine.make_directory(os.path.dirname(path), directory_mode, *account)
            machine.write_atomic(path, text.encode(), int(wanted["mode"], 8), *account)
        recorded = read_record(machine, name).get("kubeconfig") or {}
        generation = wanted["generation"]
        if generation is None:
            generation = recorded.get("generation", 0)
        digest = hashlib.sha256(text.encode()).hexdigest()
        entry = {**file, "sha256": digest, "generation": generation}
        entry["directory_mode"] = wanted["directory_mode"]
        if entry != recorded:
            write_record(machine, name, kubeconfig=entry)
    return {"kubeconfig": text, "path": path, "context": f"k3d-{name}"}


def _refuse_missing_account(machine: Machine, step: str, owner: str, group: str) -> None:
    missing = machine.missing_account(owner, group)
    if missing:
        raise Failure(
            "refused",
            step,
            f"this host has no {missing}",
            "make it, or name another one in the settings (Debian's administrators are the group "
            "sudo, those of NixOS and TrueNAS SCALE wheel and builtin_administrators)",
        )


FILES_SPEC: dict[str, Any] = {
    "files": Items(
        {
            "path": Value(_path),
            "as": Value(_one_of("value", "manifest"), "value"),
            "namespace": Value(_LABEL),
            "name": Value(_OBJECT),
            "type": Value(_one_of(*_TYPES), "Opaque"),
            "keys": Items(Value(_text(r"[-._a-zA-Z0-9]{1,253}", "a key of a Secret")), []),
            "optional": Value(_bool, False),
        }
    )
}


def files_read(machine: Machine, spec: dict[str, Any]) -> Result:
    """Reads files that another tool has decrypted (agenix, sops): each is present, absent or
    unreadable."""
    files: dict[str, Any] = {}
    made_up = []
    for request in checked(spec, FILES_SPEC, "files read")["files"]:
        path = request["path"]
        try:
            content: bytes | None = machine.read(path)
        except FileNotFoundError:
            content = machine.missing_file(request)
            if content is not None:
                made_up.append(path)
        except OSError as error:
            detail = f"cannot be read: {error.strerror or error}"
            files[path] = {"state": "unreadable", "content": None, "detail": detail}
            continue
        if content is None:
            files[path] = {"state": "absent", "content": None, "detail": "there is no such file"}
        else:
            text = base64.b64encode(content).decode()
            detail = "made up" if path in made_up else f"{len(content)} bytes"
            files[path] = {"state": "present", "content": text, "detail": detail}
    return {"files": files, "made_up": made_up}


WRITE_SPEC: dict[str, Any] = {
    "path": Value(_path),
    "content": Value(_text(r"(?s).{0,1000000}", "text of up to 1,000,000 characters"), secret=True),
    "mode": Value(_private_mode, 0o600),
    "owner": Value(_ACCOUNT, "root"),
    "group": Value(_ACCOUNT, "root"),
    "restart_container": Value(_or_null(_CONTAINER), None),
}


def files_write(machine: Machine, spec: dict[str, Any]) -> Result:
    """Writes a file with its final mode, and restarts a container that read an older one."""
    wanted = checked(spec, WRITE_SPEC, "files write")
    path, content = wanted["path"], wanted["content"].encode()
    step = f"writing {path}"
    account = (wanted["owner"], wanted["group"])
    _refuse_missing_account(machine, step, *account)
    with machine.lock("file-" + hashlib.sha256(path.encode()).hexdigest()[:16]):
        seen = machine.stat(path)
        changed = seen is None or machine.read(path) != content
        if changed:
            machine.make_directory(os.path.dirname(path), 0o755)
            machine.write_atomic(path, content, wanted["mode"], *account)
        elif seen and (seen.mode, seen.owner, seen.group) != (wanted["mode"], *account):
            machine.set_access(path, wanted["mode"], *account)
        container = wanted["restart_container"]
        restarted = bool(container) and _restart_older(machine, container, path, step)
    return {"changed": changed, "restarted": restarted}


def _restart_older(machine: Machine, container: str, path: str, step: str) -> bool:
    """Restarts the container if it runs since before the file was written. By the clock and not by
    what this run did: a run that is killed before the restart leaves it to the next."""
    argv = ["docker", "inspect", "--type", "container", container]
    seen = _try(machine, argv, step)
    if seen.code:
        if "No such" in seen.complaint:
            return False
        raise Failure("cannot-tell", step, seen.complaint, _remedy_for("docker", seen))
    state = _json(seen.out, step)[0]["State"]
    written = machine.stat(path)
    if state["Status"] != "running" or written is None:
        return False
    # Docker writes up to nanoseconds, strptime reads up to microseconds.
    text = f"{state['StartedAt'].rstrip('Z')[:26]}+0000"
    form = "%Y-%m-%dT%H:%M:%S.%f%z" if "." in text else "%Y-%m-%dT%H:%M:%S%z"
    if datetime.strptime(text, form).timestamp() > written.modified:
        return False
    say(f"restarting {container}, which reads {path}")
    _restart(machine, container)
    return True


# Verbs: what lives in the cluster


def _kubectl(
    machine: Machine,
    kubeconfig_path: str,
    arguments: Sequence[str],
    step: str,
    *,
    input: bytes = b"",
    timeout: float = 60.0,
) -> Ran:
    """Runs kubectl against the cluster of a kubeconfig, which must exist: kubectl would take
    another one without a word."""
    if not machine.exists(kubeconfig_path):
        raise Failure(
            "cannot-tell",
            step,
            f"kubeconfig {kubeconfig_path} is not there",
            "`hostctl kubeconfig NAME`, or pulumi up, writes it",
        )
    argv = ["kubectl", f"--kubeconfig={kubeconfig_path}", "--request-timeout=30s", *arguments]
    ran = _try(machine, argv, step, input=input, timeout=timeout)
    if ran.code and _UNREACHABLE.search(ran.err.decode("utf-8", "replace")):
        raise Failure(
            "cannot-tell",
            step,
            f"the API server does not answer: {ran.complaint[:300]}",
            "hostctl k3d start NAME; hostctl k3d doctor NAME",
        )
    return ran


_UNREACHABLE = re.compile(
    r"Unable to connect to the server|connection refused|was refused - did you specify|i/o timeout"
    r"|context deadline exceeded|no route to host|TLS handshake timeout|ServiceUnavailable"
    r"|certificate signed by unknown authority|net/http: request canceled"
)
_NO_NODE = re.compile(r"No such container|is not running")

SEED_SPEC: dict[str, Any] = {
    "kubeconfig": Value(_path),
    "namespace": Value(_LABEL),
    "name": Value(_OBJECT),
    "type": Value(_one_of(*_TYPES), "Opaque"),
    "data": Value(_base64_map, secret=True),
    "labels": Value(_text_map, {}),
}


def secret_seed(machine: Machine, spec: dict[str, Any]) -> Result:
    """Creates a Secret that is absent and never writes to one that exists (incident 8)."""
    wanted = checked(spec, SEED_SPEC, "secret seed")
    name, namespace = wanted["name"], wanted["namespace"]
    step = f"seeding Secret {namespace}/{name}"
    manifest = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace, "labels": wanted["labels"]},
        "type": wanted["type"],
        "data": wanted["data"],
    }
    # `create` and not `apply`: the API server itself refuses to write to one that exists.
    arguments = ["create", f"--field-manager={FIELD_MANAGER}", "--filename=-", "--output=name"]
    ran = _kubectl(
        machine, wanted["kubeconfig"], arguments, step, input=json.dumps(manifest).encode()
    )
    if ran.code == 0:
        return {"created": True}
    said = ran.err.decode("utf-8", "replace")
    if "(AlreadyExists)" in said:
        return {"created": False}
    # Only the server's status: kubectl's other messages may quote what it was given.
    reason = re.search(r"Error from server \((\w+)\)", said)
    remedies = {"NotFound": f"declare namespace {namespace} under homelab:namespaces"}
    raise Failure(
        "failed",
        step,
        f"the API server answered {reason.group(1)}" if reason else "kubectl refused it",
        remedies.get(reason.group(1) if reason else "", "check the Secret's type and keys"),
    )


ROLLOUT_SPEC: dict[str, Any] = {
    "kubeconfig": Value(_path),
    "namespace": Value(_LABEL),
    "secrets": Value(_text_map, secret=True),
}
_WORKLOADS = "deployments.apps,statefulsets.apps,daemonsets.apps"


def rollout(machine: Machine, spec: dict[str, Any]) -> Result:
    """Restarts the workloads of a namespace that use a Secret whose digest is another than when
    they were last seen. One never seen has started with what the last run saw; the first run of
    all restarts nothing.

    What was seen is kept on the host and not in annotations: whoever may read a workload could
    guess a short value from its digest.
    """
    wanted = checked(spec, ROLLOUT_SPEC, "rollout")
    namespace, path = wanted["namespace"], wanted["kubeconfig"]
    step = f"rolling out changed Secrets in namespace {namespace}"
    rolled = []
    arguments = ["get", _WORKLOADS, f"--namespace={namespace}", "--output=json"]
    listed = _kubectl(machine, path, arguments, step)
    if listed.code:
        raise Failure("failed", step, listed.complaint, _doctor_remedy())
    with machine.lock(f"rollout-{namespace}"):
        ledger = f"{STATE_DIRECTORY}/rollouts/{_cluster_of(machine, path)}/{namespace}.json"
        key, last, seen = _read_ledger(machine, ledger)
        keyed = {
            name: hmac.new(key.encode(), digest.encode(), "sha256").hexdigest()
            for name, digest in wanted["secrets"].items()
        }
        for workload in _json(listed.out, step)["items"]:
            used = secrets_of(workload["spec"]["template"]["spec"])
            digests = {name: digest for name, digest in keyed.items() if name in used}
            # The uid, since a workload made anew has read the new value.
            identity = workload["metadata"]["uid"]
            before = {**last, **seen.get(identity, {})}
            title = f"{workload['kind'].lower()}/{workload['metadata']['name']}"
            if any(before.get(name, digest) != digest for name, digest in digests.items()):
                say(f"{title} in {namespace} uses a changed Secret: restarting it")
                restart = ["rollout", "restart", title, f"--namespace={namespace}"]
                ran = _kubectl(machine, path, restart, step)
                if ran.code:
                    raise Failure("failed", step, ran.complaint, _doctor_remedy())
                rolled.append(title)
            if seen.get(identity, {}) != digests:
                seen[identity] = digests
                _write_ledger(machine, ledger, key, last, seen)
        if last != keyed:
            _write_ledger(machine, ledger, key, keyed, seen)
    return {"rolled": rolled}


def _doctor_remedy() -> str:
    return "see the cause; hostctl k3d doctor NAME shows whether the cluster is well"


def secrets_of(pod: Mapping[str, Any]) -> set[str]:
    """The names of the Secrets whose values a pod reads: volumes and environment. Not those for
    pulling images, which a running pod has no more use for."""
    names = set()
    for volume in pod.get("volumes") or []:
        names.add((volume.get("secret") or {}).get("secretName"))
        for source in (volume.get("projected") or {}).get("sources") or []:
            names.add((source.get("secret") or {}).get("name"))
    for container in (pod.get("containers") or []) + (pod.get("initContainers") or []):
        for source in container.get("envFrom") or []:
            names.add((source.get("secretRef") or {}).get("name"))
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {}
            names.add((source.get("secretKeyRef") or {}).get("name"))
    return {name for name in names if name}


def _cluster_of(machine: Machine, kubeconfig_path: str) -> str:
    """16 hex digits that tell the kubeconfig's cluster from others."""
    text = machine.read(kubeconfig_path).decode("utf-8", "replace")
    found = re.search(r"certificate-authority-data:\s*(\S+)", text)
    return hashlib.sha256((found.group(1) if found else text).encode()).hexdigest()[:16]


def _read_ledger(
    machine: Machine, path: str
) -> tuple[str, dict[str, str], dict[str, dict[str, str]]]:
    """The key of the digests, those of the last whole run, and those that each workload has."""
    try:
        ledger = json.loads(machine.read(path))
        return ledger["key"], ledger["last"], ledger["seen"]
    except (FileNotFoundError, ValueError, KeyError):
        # Without what was seen, everything is seen for the first time.
        return machine.nonce() + machine.nonce(), {}, {}


def _write_ledger(
    machine: Machine, path: str, key: str, last: Mapping[str, str], seen: Mapping[str, Any]
) -> None:
    machine.make_directory(os.path.dirname(path), 0o700)
    content = json.dumps({"key": key, "last": last, "seen": seen}, sort_keys=True).encode()
    machine.write_atomic(path, content, 0o600)


RESOLVE_SPEC: dict[str, Any] = {
    "cluster": Value(_NAME),
    "repository": Value(_repository),
    "ref": Value(_ref, "main"),
    "path": Value(_path_in_repository, "bootstrap"),
    "commit": Value(_or_null(_COMMIT), None),
}


def argocd_resolve(machine: Machine, spec: dict[str, Any]) -> Result:
    """The commit that a ref names now, and the commit that was applied last. A repository that
    cannot be reached and a ref that it does not have are two answers; neither is an error."""
    wanted = checked(spec, RESOLVE_SPEC, "argocd resolve")
    for tool in ("git", "kubectl"):
        # `argocd apply` needs both; here they are missed before anything is changed.
        tool_version(machine, tool)
    record = read_record(machine, wanted["cluster"])
    result = {"state": "resolved", "commit": None, "detail": "", "applied": record.get("argocd")}
    ref = wanted["ref"]
    pinned = wanted["commit"] or (ref if re.fullmatch("[0-9a-f]{40}", ref) else None)
    if pinned:
        return {**result, "commit": pinned, "detail": "the settings name the commit"}
    # Tags before branches, as `git fetch` resolves a short name; ^{} is the commit of a tag object.
    names = [ref, f"{ref}^{{}}"]
    if not ref.startswith("refs/"):
        names = [f"refs/{kind}/{ref}{peel}" for kind in ("tags", "heads") for peel in ("", "^{}")]
    ran = _git(machine, ["ls-remote", "--", wanted["repository"], *names])
    if isinstance(ran, str) or ran.code:
        detail = ran if isinstance(ran, str) else ran.complaint
        return {**result, "state": "unreachable", "detail": detail}
    rows = (line.split("\t", 1) for line in ran.text.splitlines() if "\t" in line)
    found = {name: commit for commit, name in rows}
    for name in sorted(names, key=lambda name: (name.startswith("refs/heads/"), "^" not in name)):
        if re.fullmatch("[0-9a-f]{40}", found.get(name, "")):
            return {**result, "commit": found[name], "detail": name.replace("^{}", "")}
    detail = f"the repository has no branch or tag {ref}"
    return {**result, "state": "no-such-ref", "detail": detail}


def _git(machine: Machine, arguments: Sequence[str]) -> Ran | str:
    """Runs git so that it neither asks nor waits; a string says why it got no answer."""
    env = {
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ALLOW_PROTOCOL": "https:ssh",
        "GIT_SSH_COMMAND": "ssh -o BatchMode=yes -o ConnectTimeout=10",
    }
    try:
        return machine.run(["git", *arguments], env=env, timeout=20.0)
    except TookTooLong:
        return "no answer in 20 s"


APPLY_SPEC: dict[str, Any] = {
    "cluster": Value(_NAME),
    "kubeconfig": Value(_path),
    "repository": Value(_repository),
    "path": Value(_path_in_repository, "bootstrap"),
    "commit": Value(_COMMIT),
    "namespace": Value(_LABEL, "argocd"),
}
_APPLY_TRIES = 6
_NOT_YET = re.compile(r"no matches for kind|ensure CRDs are installed first|failed calling webhook")


def argocd_apply(machine: Machine, spec: dict[str, Any]) -> Result:
    """Applies the bootstrap kustomization at a commit, server-side; deletes nothing that an earlier
    commit applied.

    Conflicts are forced: the other owner of a field is the client-side apply that this replaces, or
    ArgoCD, which reads the same repository (Argo CD's own manual installs it so). kubectl then
    moves what a client-side apply owned to our field manager, so that a field that leaves the
    repository leaves the cluster (kubernetes/kubernetes#99003). CRDs of 256 KiB and more need
    server-side apply anyway.
    """
    wanted = checked(spec, APPLY_SPEC, "argocd apply")
    path, commit = wanted["kubeconfig"], wanted["commit"]
    ran = Ran(1, b"", b"")
    for tool in ("git", "kubectl"):
        tool_version(machine, tool)
    step = f"applying {wanted['repository']}//{wanted['path']} at {commit}"
    target = f"{wanted['repository']}//{wanted['path']}?ref={commit}&timeout=120s"
    arguments = ["apply", f"--kustomize={target}", "--server-side", "--force-conflicts"]
    arguments += [f"--field-manager={FIELD_MANAGER}", "--output=name"]
    for attempt in range(1, _APPLY_TRIES + 1):
        ran = _kubectl(machine, path, arguments, step, timeout=600.0)
        if ran.code == 0:
            break
        complaint = ran.err.decode("utf-8", "replace")
        if not _NOT_YET.search(complaint) or attempt == _APPLY_TRIES:
            raise Failure("failed", step, ran.complaint, _apply_remedy(complaint, wanted))
        say(f"{step}: not all kinds are served yet, try {attempt} of {_APPLY_TRIES}")
        wait = ["wait", "--for=condition=Established", "customresourcedefinitions", "--all"]
        _kubectl(machine, path, [*wait, "--timeout=60s"], step, timeout=90.0)
        machine.sleep(PROGRESS_SECONDS)
    with cluster_lock(machine, wanted["cluster"]):
        applied = {key: wanted[key] for key in ("repository", "path", "commit")}
        write_record(machine, wanted["cluster"], argocd=applied)
    return {"commit": commit, "objects": len(ran.text.split())}


def _apply_remedy(complaint: str, wanted: Mapping[str, Any]) -> str:
    missing = re.search(r'namespaces "([^"]+)" not found', complaint)
    if missing:
        return (
            f"declare namespace {missing.group(1)} under homelab:namespaces, or in the repository"
        )
    if "git" in complaint or "accumulating" in complaint:
        return (
            f"check that {wanted['path']} at {wanted['commit']} holds a kustomization and that "
            "root on this host may read the repository"
        )
    return "mend the manifest in the repository, or the cluster, and run up again"


CONNECTOR_SPEC: dict[str, Any] = {
    "kubeconfig": Value(_path),
    "namespace": Value(_LABEL),
    "deployment": Value(_OBJECT),
}


def connector_status(machine: Machine, spec: dict[str, Any]) -> Result:
    """Says how many pods of a tunnel's connector are ready; what is absent has none."""
    wanted = checked(spec, CONNECTOR_SPEC, "connector status")
    found, detail = _connector(machine, wanted, f"looking at {_connector_name(wanted)}")
    return {"ready": (found.get("status") or {}).get("readyReplicas", 0), "detail": detail}


def connector_stop(machine: Machine, spec: dict[str, Any]) -> Result:
    """Stops a tunnel's connectors before the tunnel is deleted, which fails while one is connected.
    An absent cluster or Deployment has none."""
    wanted = checked(spec, CONNECTOR_SPEC, "connector stop")
    step, path = f"stopping {_connector_name(wanted)}", wanted["kubeconfig"]
    found, detail = _connector(machine, wanted, step)
    if not found:
        return {"stopped": False, "detail": detail}
    title = f"deployments.apps/{wanted['deployment']}"
    namespace = f"--namespace={wanted['namespace']}"
    scaled = _kubectl(machine, path, ["scale", title, namespace, "--replicas=0"], step)
    if scaled.code:
        raise Failure("failed", step, scaled.complaint, _doctor_remedy())
    for _ in range(24):
        found, _detail = _connector(machine, wanted, step)
        if not (found.get("status") or {}).get("replicas"):
            return {"stopped": True, "detail": "scaled to 0"}
        say(f"{step}: waiting for its pods to end")
        machine.sleep(PROGRESS_SECONDS)
    raise Failure("timed-out", step, "its pods have not ended in 120 s", "kubectl get pods")


def _connector_name(wanted: Mapping[str, Any]) -> str:
    return f"{wanted['namespace']}/{wanted['deployment']}"


def _connector(
    machine: Machine, wanted: Mapping[str, Any], step: str
) -> tuple[dict[str, Any], str]:
    """The connector's Deployment, empty where there is none, and why."""
    title = f"deployments.apps/{wanted['deployment']}"
    get = ["get", title, f"--namespace={wanted['namespace']}", "--ignore-not-found"]
    try:
        seen = _kubectl(machine, wanted["kubeconfig"], [*get, "--output=json"], step)
    except Failure as failure:
        if failure.code != "cannot-tell":
            raise
        # Whoever cannot be reached here holds no connection to Cloudflare from here either.
        return {}, failure.cause
    if seen.code and "(NotFound)" not in seen.complaint:
        raise Failure("failed", step, seen.complaint, _doctor_remedy())
    if seen.code or not seen.out.strip():
        return {}, "there is no such Deployment"
    return _json(seen.out, step), "it exists"


OWNER_SPEC: dict[str, Any] = {
    "cluster": Value(_NAME),
    "namespace": Value(_or_null(_LABEL), None),
    "kind": Value(_KIND),
    "name": Value(_OBJECT),
}


def cluster_owner(machine: Machine, spec: dict[str, Any]) -> Result:
    """Who owns an object: its field managers, and the ArgoCD Application that tracks it (one-owner
    rule). ``exists`` is null when it cannot be told.

    Asked in the node: the kubeconfig on the host may be missing, or that of a cluster that is gone,
    and the run that asks is the one that writes it anew.
    """
    wanted = checked(spec, OWNER_SPEC, "cluster owner")
    step = f"looking for {wanted['kind']} {wanted['name']}"
    arguments = ["get", f"{wanted['kind']}/{wanted['name']}", "--ignore-not-found"]
    arguments += ["--show-managed-fields", "--output=json"]
    if wanted["namespace"]:
        arguments.append(f"--namespace={wanted['namespace']}")
    nobody: Result = {"managers": [], "argocd": None}
    server = f"k3d-{wanted['cluster']}-server-0"
    seen = _try(machine, ["docker", "exec", server, "kubectl", *arguments], step)
    if seen.code:
        if _UNREACHABLE.search(seen.complaint) or _NO_NODE.search(seen.complaint):
            return {"exists": None, **nobody, "detail": seen.complaint}
        if "the server doesn't have a resource type" in seen.complaint:
            return {"exists": False, **nobody, "detail": f"no kind {wanted['kind']} in the cluster"}
        raise Failure("cannot-tell", step, seen.complaint, _doctor_remedy())
    if not seen.out.strip():
        return {"exists": False, **nobody, "detail": "there is no such object"}
    metadata = _json(seen.out, step)["metadata"]
    managers = sorted({entry["manager"] for entry in metadata.get("managedFields") or []})
    tracking = (metadata.get("annotations") or {}).get("argocd.argoproj.io/tracking-id", "")
    application = tracking.split(":")[0] or None
    if application is None and any(manager.startswith("argocd") for manager in managers):
        # The older way of tracking, by a label that others use too.
        application = (metadata.get("labels") or {}).get("app.kubernetes.io/instance")
    return {"exists": True, "managers": managers, "argocd": application, "detail": ""}


# The command line


class Verb(NamedTuple):
    """A verb: what runs, an example of its spec, and how the record gives the spec of a NAME."""

    run: Callable[[Machine, dict[str, Any]], Result]
    example: Mapping[str, Any]
    recorded: Callable[[Machine, str], dict[str, Any]] | None = None


def _recorded_cluster(machine: Machine, name: str) -> dict[str, Any]:
    applied = read_record(machine, name).get("applied")
    if not applied:
        raise _nothing_recorded(name, "a cluster")
    return applied


def _recorded_kubeconfig(machine: Machine, name: str) -> dict[str, Any]:
    written = read_record(machine, name).get("kubeconfig")
    if not written:
        raise _nothing_recorded(name, "a kubeconfig")
    keys = ("path", "owner", "group", "mode", "directory_mode", "server", "generation")
    return {"cluster": name, **{key: written[key] for key in keys}}


def _nothing_recorded(name: str, what: str) -> Failure:
    return Failure(
        "bad-spec",
        f"reading the record of {name}",
        f"this host has no record of {what} {name}",
        "run pulumi up once, or give the whole spec on stdin or with --spec FILE",
    )


_CLUSTER_EXAMPLE = {
    "name": "factory",
    "image": "rancher/k3s:v1.31.5-k3s1",
    "servers": 1,
    "agents": 0,
    "disable": ["traefik", "servicelb"],
    "api": {"bind": "127.0.0.1", "port": 6443},
    "resolvers": ["1.1.1.1", "9.9.9.9"],
    "storage_dir": "/mnt/img_pool/k3d/storage",
    "network": {"name": "k3d-factory", "subnet": "172.30.0.0/16"},
    "k3s_args": [],
    "ports": [],
    "api_wait_seconds": 1800,
}
_KUBECONFIG_EXAMPLE = "/etc/k3d/kubeconfig"
_REPOSITORY_EXAMPLE = {"repository": "https://github.com/example/gitops", "path": "bootstrap"}


def _by_name(machine: Machine, name: str) -> dict[str, Any]:
    return {"name": name}


VERBS: dict[tuple[str, ...], Verb] = {
    ("k3d", "inspect"): Verb(k3d_inspect, _CLUSTER_EXAMPLE, _recorded_cluster),
    ("k3d", "ensure"): Verb(
        k3d_ensure,
        {**_CLUSTER_EXAMPLE, "generation": 1, "incarnation": "0a1b2c3d-1", "recreate": None},
        _recorded_cluster,
    ),
    ("k3d", "start"): Verb(k3d_start, {"name": "factory"}, _by_name),
    ("k3d", "stop"): Verb(k3d_stop, {"name": "factory"}, _by_name),
    ("k3d", "delete"): Verb(k3d_delete, {"name": "factory", "confirm": "factory"}, _by_name),
    ("k3d", "doctor"): Verb(k3d_doctor, _CLUSTER_EXAMPLE, _recorded_cluster),
    ("k3d", "identity"): Verb(k3d_identity, {"name": "factory"}, _by_name),
    ("kubeconfig",): Verb(
        kubeconfig,
        {
            "cluster": "factory",
            "path": _KUBECONFIG_EXAMPLE,
            "owner": "root",
            "group": "wheel",
            "mode": "0640",
            "directory_mode": "0750",
            "server": "https://127.0.0.1:6443",
            "generation": 1,
        },
        _recorded_kubeconfig,
    ),
    ("files", "read"): Verb(
        files_read,
        {
            "files": [
                {
                    "path": "/run/agenix/minio-creds",
                    "as": "manifest",
                    "namespace": "factory",
                    "name": "minio-creds",
                    "type": "Opaque",
                    "keys": [],
                    "optional": False,
                }
            ]
        },
    ),
    ("files", "write"): Verb(
        files_write,
        {
            "path": "/var/lib/homelab/tunnels/p510.token",
            "content": "(the text)",
            "mode": "0600",
            "owner": "root",
            "group": "root",
            "restart_container": "cloudflared-p510",
        },
    ),
    ("secret", "seed"): Verb(
        secret_seed,
        {
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            "namespace": "factory",
            "name": "factory-cli-creds",
            "type": "Opaque",
            "data": {"token": "(base64)"},
            "labels": {},
        },
    ),
    ("rollout",): Verb(
        rollout,
        {
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            "namespace": "factory",
            "secrets": {"minio-creds": "(a digest of its data)"},
        },
    ),
    ("argocd", "resolve"): Verb(
        argocd_resolve,
        {"cluster": "factory", **_REPOSITORY_EXAMPLE, "ref": "main", "commit": None},
    ),
    ("argocd", "apply"): Verb(
        argocd_apply,
        {
            "cluster": "factory",
            "kubeconfig": _KUBECONFIG_EXAMPLE,
            **_REPOSITORY_EXAMPLE,
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "namespace": "argocd",
        },
    ),
    ("connector", "status"): Verb(
        connector_status,
        {"kubeconfig": _KUBECONFIG_EXAMPLE, "namespace": "factory", "deployment": "cloudflared"},
    ),
    ("connector", "stop"): Verb(
        connector_stop,
        {"kubeconfig": _KUBECONFIG_EXAMPLE, "namespace": "factory", "deployment": "cloudflared"},
    ),
    ("cluster", "owner"): Verb(
        cluster_owner,
        {
            "cluster": "factory",
            "namespace": "factory",
            "kind": "Deployment",
            "name": "cloudflared",
        },
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are results like all others."""

    def error(self, message: str) -> NoReturn:
        remedy = f"`{self.prog} --help` shows what it takes"
        raise Failure("bad-spec", "reading the command line", message, remedy)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="hostctl",
        formatter_class=plain,
        description=__doc__,
        epilog="On a broken night: hostctl k3d doctor NAME; hostctl k3d ensure NAME; "
        "hostctl kubeconfig NAME.",
    )
    parser.add_argument("--version", action="version", version=f"hostctl {HOSTCTL_VERSION}")
    top = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    groups: dict[str, Any] = {}
    for words, verb in VERBS.items():
        summary = " ".join((verb.run.__doc__ or "").split("\n\n")[0].split())
        text = " ".join(words)
        parent = top
        if len(words) == 2:
            if words[0] not in groups:
                group = top.add_parser(words[0], help=f"hostctl {words[0]} --help")
                groups[words[0]] = group.add_subparsers(
                    metavar="VERB", required=True, parser_class=_Parser
                )
            parent = groups[words[0]]
        example = json.dumps(verb.example, indent=1)
        one = parent.add_parser(
            words[-1],
            formatter_class=plain,
            help=summary,
            description=_filled(verb.run.__doc__ or ""),
            epilog=f"example:\n  hostctl {text} <<'EOF'\n{example}\nEOF\n"
            + (
                f"or, as recorded on this host:\n  hostctl {text} factory\n"
                if verb.recorded
                else ""
            ),
        )
        one.set_defaults(words=words)
        if verb.recorded:
            one.add_argument("name", nargs="?", help="a cluster of this host, instead of a spec")
        one.add_argument("--spec", metavar="FILE", help="read the spec from a file, not from stdin")
        one.add_argument(
            "--exit-zero", action="store_true", help="exit 0 whenever a JSON result was printed"
        )
        if words == ("k3d", "delete"):
            one.add_argument("--confirm", metavar="NAME", help="the cluster's name once more")
    return parser


def _filled(docstring: str) -> str:
    return "\n".join(line.strip() for line in docstring.strip().splitlines())


def _spec(
    machine: Machine, verb: Verb, options: argparse.Namespace, stdin: TextIO
) -> dict[str, Any]:
    name = getattr(options, "name", None)
    step = f"reading the spec of {' '.join(options.words)}"
    if name is not None:
        assert verb.recorded
        spec = verb.recorded(
            machine, checked({"name": name}, NAME_SPEC, "a cluster's name")["name"]
        )
        confirm = getattr(options, "confirm", None)
        return {**spec, "confirm": confirm} if confirm else spec
    try:
        text = machine.read(options.spec).decode() if options.spec else stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(
            "bad-spec", step, f"{options.spec}: {error}", "give a readable file"
        ) from None
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError):
        # The text is not shown: it may hold a secret.
        remedy = f"`hostctl {' '.join(options.words)} --help` shows a spec"
        raise Failure("bad-spec", step, "it is not JSON", remedy) from None
    if not isinstance(spec, dict):
        raise Failure("bad-spec", step, "it is not a JSON object", "give an object")
    return spec


def main(
    argv: Sequence[str] | None = None,
    stdin: TextIO | None = None,
    machine: Machine | None = None,
) -> int:
    """Runs a verb and prints its result. Returns the exit code; raises nothing but SystemExit for
    --help and --version."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    step = "hostctl " + " ".join(word for word in arguments if not word.startswith("-"))
    try:
        options = _parser().parse_args(arguments)
        verb = VERBS[options.words]
        here = machine or Machine()
        if machine is None and threading.current_thread() is threading.main_thread():
            # To be told to end is to be interrupted: children and locks are seen to.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        result = verb.run(here, _spec(here, verb, options, stdin or sys.stdin))
        answer: dict[str, Any] = {"hostctl": HOSTCTL_VERSION, "ok": True, **result}
        code = 0
    except Failure as failure:
        answer, code = _refusal(failure), EXIT_CODES[failure.code]
    except OSError as error:
        remedy = "run it as root (homelab:host.sudo); is the disk full or read-only?"
        where = f"{error.filename}: " if error.filename else ""
        failure = Failure(
            "failed", step, f"{where}{error.strerror or type(error).__name__}", remedy
        )
        answer, code = _refusal(failure), EXIT_CODES["failed"]
    except KeyboardInterrupt:
        remedy = "run it again: what was begun is continued"
        failure = Failure("failed", step, "interrupted", remedy)
        answer, code = _refusal(failure), EXIT_CODES["failed"]
    except Exception as error:
        # Named by place and type: the message may hold a value of the spec.
        place = error.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        line = place.tb_lineno if place else 0
        cause = f"{type(error).__name__} in line {line} of hostctl {HOSTCTL_VERSION}"
        failure = Failure("failed", step, cause, "this is a defect of hostctl; report this line")
        answer, code = _refusal(failure), EXIT_CODES["failed"]
    print(json.dumps(answer), flush=True)
    return 0 if "--exit-zero" in arguments else code


def _refusal(failure: Failure) -> dict[str, Any]:
    error = {
        "step": failure.step,
        "cause": failure.cause,
        "remedy": failure.remedy,
        "code": failure.code,
    }
    return {"hostctl": HOSTCTL_VERSION, "ok": False, "error": error}


if __name__ == "__main__":
    sys.exit(main())
