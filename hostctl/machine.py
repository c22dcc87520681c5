"""The machine that hostctl runs on: its only contact with processes, files, ports and time."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import grp
import hashlib
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from hostctl.protocol import Failure, say

STATE_DIRECTORY = "/var/lib/homelab"
TOOLS_DIRECTORY = "/var/lib/homelab/bin"
QUERY_SECONDS = 30.0
"""How long a question to a tool may take before the answer is: cannot tell."""
PROGRESS_SECONDS = 5.0
LOCK_SECONDS = 3600.0
FILE_BYTES = 1024 * 1024
"""The largest file that is read; the API server takes no Secret above 1 MiB."""
ANSWER_BYTES = 32 * 1024 * 1024
DOWNLOAD_BYTES = 200 * 1024 * 1024


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


class Served(NamedTuple):
    """What a TLS server shows of itself: its certificate (DER), and the time that it answered, in
    seconds since 1970; None where it gave none."""

    certificate: bytes
    date: float | None


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
        from_file: str | None = None,
        to_file: str | None = None,
        limit: int = 32 * 1024 * 1024,
        ends_with_us: bool = False,
    ) -> Ran:
        """Runs a program without a shell; ``tick`` is told every few seconds for how long it runs.
        What hostctl installed comes before what else is on PATH.

        ``from_file`` is its stdin in place of ``input``; ``to_file`` receives stdout whole. Raises
        ToolMissing or TookTooLong. The child has its own session, so that an interrupt here does
        not cut it off half-way, and inherits the host's locks, so that nobody else starts while a
        child of a killed hostctl still works. ``ends_with_us`` is for one that only copies: it and
        its children end when hostctl is told to end, and give the locks back.
        """
        source = open(from_file, "rb") if from_file else None  # noqa: SIM115
        sink = open(to_file, "xb", opener=_private) if to_file else None  # noqa: SIM115
        try:
            child = subprocess.Popen(
                list(argv),
                stdin=source or subprocess.PIPE,
                stdout=sink or subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "LC_ALL": "C", "PATH": _path(), **(env or {})},
                start_new_session=True,
                pass_fds=self._locks,
            )
        except FileNotFoundError:
            raise ToolMissing(argv[0]) from None
        finally:
            for file in filter(None, (source, sink)):
                file.close()
        kept = {"out": bytearray(), "err": bytearray()}

        def drain(name: str, stream: Any) -> None:
            with stream:
                for piece in iter(lambda: stream.read1(65536), b""):
                    kept[name] += piece[: max(0, limit - len(kept[name]))]

        def feed(stream: Any) -> None:
            with contextlib.suppress(BrokenPipeError), stream:
                stream.write(input)

        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [(drain, ("err", child.stderr))]
        if child.stdin:
            work.append((feed, (child.stdin,)))
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
        """Writes a file whole or not at all, never readable by more than in the end. What a write
        that is killed leaves, the next one takes over and :meth:`remove` removes."""
        aside = _aside(path)
        descriptor = _new_file(aside)
        with os.fdopen(descriptor, "wb") as file:
            try:
                file.write(content)
                file.flush()
                os.fchown(descriptor, *self._ids(owner, group))
                os.fchmod(descriptor, mode)
                os.fsync(descriptor)
                os.replace(aside, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(aside)
                raise
        _sync(os.path.dirname(path))

    def publish(self, written: str, path: str) -> None:
        """Gives a file that was written aside its name, when all of it is on the disk."""
        _sync(written)
        os.replace(written, path)
        _sync(os.path.dirname(path))

    def remove(self, path: str) -> bool:
        """Removes a file; False when there is none. Raises OSError."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(_aside(path))
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        _sync(os.path.dirname(path))
        return True

    @contextlib.contextmanager
    def private_file(self, content: bytes) -> Iterator[str]:
        """The path of a file with this content, which none but this user reads, which is on no
        disk, and which is gone afterwards, also when hostctl is killed. For a tool that takes a
        secret from a file alone: a kubectl that is a wrapper reads its stdin twice, and then takes
        the ambient kubeconfig.
        """
        with os.fdopen(os.memfd_create("hostctl"), "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            file.flush()
            yield f"/proc/{os.getpid()}/fd/{file.fileno()}"

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
        aside = _aside(path)
        with contextlib.suppress(FileExistsError):
            os.mkdir(aside, 0o700)
        try:
            self.set_access(aside, mode, owner, group)
            os.rename(aside, path)
        except BaseException as failure:
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(aside)
            if not (isinstance(failure, OSError) and os.path.isdir(path)):
                raise

    def rename(self, path: str, to: str) -> None:
        """Gives a file or directory another name in one step. Raises OSError, also for a directory
        that is there and not empty."""
        os.rename(path, to)
        for directory in {os.path.dirname(path), os.path.dirname(to)}:
            held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(held)
            finally:
                os.close(held)

    def write_value(self, path: str, value: str) -> None:
        """Writes to a file of the kernel's (cgroup, sysctl), which is there. Raises OSError."""
        with open(path, "w", encoding="ascii") as file:
            file.write(value)

    def copy_database(self, path: str, to: str) -> str | None:
        """Copies an SQLite database that may be in use, as one moment has it, to a new file that
        root alone reads. Returns what is wrong with the copy, or None."""
        try:
            import sqlite3
        except ImportError:
            return "this python3 has no sqlite3"
        os.close(os.open(to, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            with (
                contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
                contextlib.closing(sqlite3.connect(to)) as copy,
            ):
                source.backup(copy)
                (found,) = copy.execute("PRAGMA integrity_check").fetchone()
        except sqlite3.Error as error:
            return f"{path}: {error}"
        _sync(to)
        return None if found == "ok" else f"the copy of {path} is damaged: {found}"

    def has_program(self, name: str) -> bool:
        """Whether a program is on PATH, or where administrators' programs are."""
        return shutil.which(name, path=f"{_path()}:/usr/local/sbin:/usr/sbin:/sbin") is not None

    def is_empty(self, path: str) -> bool:
        """Whether there is no such directory, or nothing in it."""
        with contextlib.suppress(FileNotFoundError):
            return not os.listdir(path)
        return True

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

    def file_system(self, path: str) -> tuple[str, bool]:
        """Type of the file system that holds the path or its nearest existing parent, and whether
        it can be written. Raises OSError when that cannot be seen."""
        while not os.path.exists(path):
            path = os.path.dirname(path)
        path = os.path.realpath(path)
        kind, longest, read_only = "", -1, False
        for line in self.read("/proc/self/mountinfo").decode("utf-8", "replace").splitlines():
            # proc_pid_mountinfo(5); blanks in a path are \040.
            mount, _, source = line.partition(" - ")
            point = mount.split()[4].replace("\\040", " ")
            inside = point == "/" or path == point or path.startswith(point + "/")
            if inside and len(point) >= longest:
                kind, longest = source.split()[0], len(point)
                read_only = "ro" in mount.split()[5].split(",")
        return kind, not read_only

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

    def file_bytes(self, path: str) -> int:
        """The size of a file; 0 for one that is not there yet."""
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return 0

    def newest(self, path: str) -> float | None:
        """When the file below a directory that was written last was written; None without files.
        Raises OSError for what cannot be read."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        found = []
        for directory, _, names in os.walk(path, onerror=fail):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found.append(os.lstat(os.path.join(directory, name)).st_mtime)
        return max(found, default=None)

    def names(self, path: str) -> list[str]:
        """What a directory holds, sorted; nothing for one that is not there. Raises OSError."""
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

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

    def kernel(self) -> tuple[str, str]:
        """The release of the running kernel, and the architecture in the words of uname(1)."""
        seen = os.uname()
        return seen.release, seen.machine

    # Network

    def has_address(self, address: str) -> bool:
        """Whether a port can be bound to the address now."""
        with contextlib.closing(_socket(address)) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                return False
        return True

    def interfaces(self) -> list[str]:
        """Names of the interfaces of this network, sorted."""
        return sorted(name for _, name in socket.if_nameindex())

    def port_is_free(self, address: str, port: int, protocol: str = "tcp") -> bool:
        with contextlib.closing(_socket(address, protocol)) as probe:
            if protocol == "tcp":
                # A connection that is closing is none; with UDP it would let two share a port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
        return True

    def connect(self, address: str, port: int, ca: str, name: str | None = None) -> str | None:
        """Why no TLS connection to a server of this CA (PEM) is had; None when it is. With a name
        its certificate must be of that host name or address, too."""
        context = _context(ca)
        context.check_hostname = name is not None
        try:
            with (
                socket.create_connection((address, port), 5) as plain,
                context.wrap_socket(plain, server_hostname=name),
            ):
                return None
        except OSError as error:
            return str(error)

    def post(self, socket_path: str, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Asks a service that listens on a socket file, in JSON. Returns status and answer; raises
        OSError."""
        headers = {"Content-Type": "application/json"}
        with contextlib.closing(_at_socket(socket_path, 300)) as service:
            return _exchange(service, "POST", path, json.dumps(body).encode(), headers)

    def ask_docker(self, path: str) -> Any:
        """What Docker's daemon answers to GET of a path of its API: Docker's client takes longer to
        start than the daemon to answer. None where it gives no plain answer, or where the client
        would ask another daemon: then the client is to be asked, whose words about a failure are
        known.
        """
        socket_path = _docker_socket()
        if socket_path is None:
            return None
        try:
            with contextlib.closing(_at_socket(socket_path, 5)) as service:
                status, answer = _exchange(service, "GET", path)
            return json.loads(answer) if status == 200 else None
        except (OSError, ValueError):
            return None

    def put(self, url: str, login: tuple[str, str], body: bytes, ca: str) -> tuple[int, str]:
        """PUT of JSON to a server of this CA (PEM), as a user with a password. Returns status and
        answer; raises OSError."""
        basic = base64.b64encode(":".join(login).encode()).decode("ascii")
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {basic}"}
        return _https("PUT", url, _context(ca), QUERY_SECONDS, body, headers)

    def get(self, url: str, chain: bytes, ca: str) -> tuple[int, str]:
        """GET from a server of this CA (PEM), as whom the certificate and key of `chain` (PEM)
        name. Returns status and answer; raises OSError."""
        context = _context(ca)
        # OpenSSL reads a key from a file only: this one is in no file system.
        descriptor = os.memfd_create("chain")
        try:
            os.write(descriptor, chain)
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
        return _https("GET", url, context, 5)

    def served(self, address: str, port: int) -> Served | None:
        """What a TLS server shows of itself, trusted or not: one whose certificate has expired is
        no longer. None when it does not answer."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        try:
            with (
                socket.create_connection((address, port), 5) as plain,
                context.wrap_socket(plain) as secure,
            ):
                certificate = secure.getpeercert(binary_form=True)
                secure.sendall(b"HEAD / HTTP/1.0\r\nHost: localhost\r\n\r\n")
                # It answers a stranger with 401, and says when.
                head = secure.recv(65536).decode("latin-1")
        except OSError:
            return None
        from email.utils import parsedate_to_datetime  # Few verbs need it, and it loads slowly.

        said = re.search(r"^date: *(.+?)\s*$", head, re.IGNORECASE | re.MULTILINE)
        date = parsedate_to_datetime(said.group(1)).timestamp() if said else None
        return Served(certificate or b"", date)

    def download(self, url: str, sha256: str, tick: Callable[[int], None]) -> bytes:
        """What is at the URL, which may be reached through the environment's proxy. Raises OSError
        when it cannot be had whole, ValueError when it is not what the sha256 says."""
        content = bytearray()
        told = time.monotonic()
        with _opened(url) as answer:
            for piece in iter(lambda: answer.read(256 * 1024), b""):
                content += piece
                if len(content) > DOWNLOAD_BYTES:
                    raise OSError(f"larger than {DOWNLOAD_BYTES} bytes")
                if time.monotonic() - told >= PROGRESS_SECONDS:
                    told = time.monotonic()
                    tick(len(content))
            expected = answer.headers.get("Content-Length")
        if expected is not None and len(content) != int(expected):
            raise OSError(f"cut off after {len(content)} of {expected} bytes")
        found = hashlib.sha256(content).hexdigest()
        if found != sha256:
            raise ValueError(found)
        return bytes(content)

    def read_url(self, url: str) -> bytes:
        """A short text at a URL, which may be reached through the environment's proxy. Raises
        OSError."""
        with _opened(url) as answer:
            return answer.read(FILE_BYTES)

    def visit(
        self, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        """The HTTP status of a URL, which may be reached through the environment's proxy; a
        redirection is one. POST where there is a body. Raises OSError without an answer."""
        if not url.startswith(("https://", "http://")):
            raise OSError("no http(s) URL")
        try:
            with _opened(url, body, headers, follow=False) as answer:
                return answer.status
        except ValueError as error:
            raise OSError(type(error).__name__) from None

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


def _path() -> str:
    return f"{TOOLS_DIRECTORY}:{os.environ.get('PATH', os.defpath)}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _aside(path: str) -> str:
    """Where a file or directory is until it is whole: one place for each, so that what a hostctl
    that is killed leaves there is found again."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name}.hostctl")


def _new_file(path: str) -> int:
    """The descriptor of a new file, locked, that none but this user reads. One that a killed writer
    left is removed first; a living writer's is waited for."""
    while True:
        try:
            held, new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), True
        except FileExistsError:
            try:
                held, new = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), False
            except FileNotFoundError:
                continue
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(held)):
                    if new:
                        return os.dup(held)
                    os.unlink(path)
        finally:
            os.close(held)


def _sync(path: str) -> None:
    """Waits until a file's content, or a directory's names, are on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


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


def _context(ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=ca)
    context.check_hostname = False
    # Python 3.13 demands extensions that the certificates of k3s do not have.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _https(
    method: str,
    url: str,
    context: ssl.SSLContext,
    seconds: float,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    parts = urlsplit(url)
    address = parts.hostname or ""
    with contextlib.closing(_socket(address)) as plain:
        plain.settimeout(seconds)
        plain.connect((address, parts.port or 443))
        with context.wrap_socket(plain) as secure:
            return _exchange(secure, method, parts.path, body, headers)


def _exchange(
    service: socket.socket,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> tuple[int, str]:
    """Status and answer of a request in HTTP/1.0, whose answer ends with the connection; raises
    OSError. http.client takes longer to load than a healthy cluster to be looked at."""
    lines = {"Host": "localhost", "Content-Length": len(body), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    service.sendall(f"{method} {path} HTTP/1.0\r\n{head}\r\n".encode() + body)
    answer = bytearray()
    for piece in iter(lambda: service.recv(65536), b""):
        answer += piece
        if len(answer) > ANSWER_BYTES:
            raise OSError(f"an answer larger than {ANSWER_BYTES} bytes")
    said, end, content = bytes(answer).partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", said)
    if not status or not end:
        raise OSError("no answer in HTTP")
    length = re.search(rb"\r\ncontent-length: *(\d{1,18})(?:\r|$)", said, re.IGNORECASE)
    if length and len(content) < int(length.group(1)):
        raise OSError("an answer that was cut off")
    return int(status.group(1)), content.decode("utf-8", "replace")


@contextlib.contextmanager
def _opened(
    url: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    follow: bool = True,
) -> Iterator[Any]:
    """The answer of a URL, which may be reached through the environment's proxy. Raises OSError.
    Without ``follow`` a redirection is an answer, and an error's status too."""
    # Loaded where it is used: few verbs do, and it takes longer than most of them.
    import http.client
    import urllib.request as web

    if follow:
        opener = web.build_opener()
    else:
        opener = web.OpenerDirector()
        for handler in (web.ProxyHandler(), web.HTTPHandler(), web.HTTPSHandler()):
            opener.add_handler(handler)
    try:
        request = web.Request(url, body, dict(headers or {}))
        with opener.open(request, timeout=QUERY_SECONDS) as answer:
            yield answer
    except http.client.HTTPException as error:
        raise OSError(str(error) or type(error).__name__) from None


def _at_socket(path: str, seconds: float) -> socket.socket:
    """A connection to a service that listens on a socket file. Raises OSError."""
    service = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    service.settimeout(seconds)
    try:
        service.connect(path)
    except OSError:
        service.close()
        raise
    return service


def _docker_socket() -> str | None:
    """The socket file at which Docker's client finds its daemon; None where it finds it elsewhere
    (docs.docker.com/engine/manage-resources/contexts)."""
    host = os.environ.get("DOCKER_HOST")
    if host:
        return host[len("unix://") :] if host.startswith("unix://") else None
    context = os.environ.get("DOCKER_CONTEXT")
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    try:
        with open(f"{directory}/config.json", encoding="utf-8") as file:
            context = context or json.load(file).get("currentContext")
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError):
        return None
    return "/var/run/docker.sock" if context in (None, "", "default") else None


def _socket(address: str, protocol: str = "tcp") -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)


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
