"""The make-believe host under hostctl: the real hostctl runs on it, and no command is ever run.

:class:`RehearsalMachine` answers what hostctl asks of a machine from files of the world, so that
drift is made by editing them. `docker`, `k3d`, `kubectl`, `git` and `tar` are modelled at the level
of their arguments, as strictly as hostctl uses them: another subcommand or flag is answered with
exit status 2 and a line that begins `rehearsal:`.

World, below `<rehearsal>/world/machine/`:
  files/...                 the host's files; access/<quoted path>.json has mode, owner, group, time
  clusters/<name>.json      a k3d cluster. `state` running or stopped, `ca` (base64 PEM), `server`
                            (URL of its API), `nodes` as created; edit a mount, a port, the state,
                            the CA; remove the file, and someone has deleted the cluster. A node's
                            `layer` has the files of its own container; its datastore is
                            `db/state.db` where it is mounted from, below files/. `opening`,
                            when added, is {"seconds", "bytes_per_second", "stalls"}: how long a
                            start of the server takes, what it reads meanwhile, how many starts
                            read nothing. `images`, when added, are those in its nodes, as `crictl
                            images` shows them, each with `used`
                            read nothing
  existing/<name>.json      a cluster that others made (rehearsal/existing.py): `state` running or
                            not, `ca`, `server`
  containers/<name>.json    any other container, in the form of `docker inspect`
  volumes.json              names of volumes; one that is in orphans.json too has lost its container
  orphans.json              {"<volume>": what `docker volume inspect` shows beside its name}
  dangling.json             {"<image id>": bytes}, images without a tag; build-cache: its size
  databases.json            {"<namespace>/<workload>": {"<database>": {"content", "rows"}}}
  roles.json                {"<namespace>/<workload>": {"<role>": "<verifier of its password>"}}
  init.json, systemd.json, middleware.json  see rehearsal/init.py
  git.json                  {"<repository>": {"unreachable": bool, "refs": {"refs/heads/main":
                            "<commit>"}}}; a repository that is not listed has every branch, at a
                            made-up commit
  addresses.json            {"<address>": seconds until an interface has it, or null for never}
  interfaces.json           names of the host's interfaces
  ports.json                ports that others listen on, as 8080 or "8080/udp"; listeners.json:
                            {"8080": the program that does}, as `ss` tells it; free: bytes of free
                            disk; file-system.json: [type, whether it can be written]
  pods.json                 {"lookup": what becomes of a pod that asks for a name: "resolves",
                            "fails", "no-image" or "unscheduled"}
  clock-skew                seconds that the API server's clock is ahead of the host's
  downloads.json            {"<url>": sha256 of what is there, or null when it is cut off}; any
                            other has what is asked for
  accounts.json             users and groups that the host lacks
  docker-down               Docker does not answer (as does world/docker/unreachable)
  missing-tools.json        programs that are not on PATH
  disks.json                {"/dev/disk/by-id/...": what lsblk says, or null: no such disk}
  images.json               images that were pulled; no-pull.json: those that no registry has
  broken-images.json        node images whose k3s ends as soon as it starts
  seed                      another seed gives another machine id and other CAs
Networks, images and containers of the docker stand-in are those of `world/docker/`, besides
Docker's own network bridge; objects in a cluster are those of `world/kubernetes/`.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from hostctl.k3s_node import K3S_BINARY
from hostctl.live import k3s_version
from hostctl.machine import TOOLS_DIRECTORY, Machine, Ran, Served, Stat, ToolMissing
from rehearsal.core import World
from rehearsal.init import Usage as _Usage
from rehearsal.init import is_mark, midclt, systemctl
from rehearsal.k3s import K3s, kubeconfig

Object = dict[str, Any]

_VERSIONS = {
    ("docker", "version", "--format", "{{.Server.Version}}"): "28.2.2\n",
    ("docker", "version", "--format", "{{.Client.APIVersion}}"): "1.50\n",
    ("k3d", "version"): "k3d version v5.8.3\nk3s version v1.31.5-k3s1 (default)\n",
    (
        "kubectl",
        "version",
        "--client",
        "--output=json",
    ): '{"clientVersion":{"gitVersion":"v1.31.5"}}',
    ("git", "--version"): "git version 2.47.0\n",
}
_DOCKER_DOWN = (
    "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. "
    "Is the docker daemon running?"
)
_K3S = "/var/lib/rancher/k3s"
_DATASTORE = f"{_K3S}/server"
_INITIATOR = "/etc/iscsi/initiatorname.iscsi"
_ENTRYPOINT = "/bin/k3d-entrypoint.sh"
_PASSWORD = "/etc/rancher/node/password"
_IMAGE_CONFIG: Object = {
    "Env": ["PATH=/var/lib/rancher/k3s/data/cni:/bin", "CRI_CONFIG_FILE=/var/lib/crictl.yaml"],
    "Entrypoint": ["/bin/k3s"],
    "Cmd": ["agent"],
    "Volumes": {"/var/lib/rancher/k3s": {}, "/var/lib/kubelet": {}},
    "WorkingDir": "",
}

_INFO: Object = {
    "CgroupVersion": "2",
    "DockerRootDir": "/var/lib/docker",
    "SecurityOptions": ["name=seccomp,profile=builtin", "name=cgroupns"],
}
# Of a host that lacks nothing. What is in the world's files takes their place.
_KERNEL_FILES = {
    "/proc/modules": "".join(
        f"{name} 16384 1 - Live 0x0000000000000000\n"
        for name in (
            *("overlay", "br_netfilter", "nf_conntrack", "vxlan"),
            *("nfs", "rbd", "ceph", "dm_crypt"),
        )
    ),
    "/proc/sys/fs/inotify/max_user_instances": "512\n",
    "/proc/sys/fs/inotify/max_user_watches": "524288\n",
    "/proc/sys/net/ipv4/ip_forward": "1\n",
    "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
}


def _options(
    words: Sequence[str], flags: Iterable[str] = (), values: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Options and operands of an argument list; `values` are the options that take one."""
    found: dict[str, str] = {}
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            operands += rest
            break
        if not word.startswith("-") or word == "-":
            operands.append(word)
        elif name in values:
            if not equals and not rest:
                raise _Usage(f"{name} needs a value")
            found[name] = value if equals else rest.pop(0)
        elif word in flags:
            found[word] = ""
        else:
            raise _Usage(f"unknown flag {word}")
    return found, operands


def _done(text: str | bytes = "") -> Ran:
    return Ran(0, text.encode() if isinstance(text, str) else text, b"")


def _failed(text: str, code: int = 1) -> Ran:
    return Ran(code, b"", text.encode() + b"\n")


class RehearsalMachine(Machine):
    """A machine kept in `root`, which is `<rehearsal>/world/machine`; one of several is
    `<rehearsal>/world/machines/<address>`."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.above = root.parent.parent if root.parent.name == "machines" else root.parent
        self.world = World(root)
        self.docker_world = World(root.parent / "docker")
        self.k3s = K3s(self)
        root.mkdir(parents=True, exist_ok=True)

    def beside(self, name: str) -> RehearsalMachine:
        """Another machine of this world."""
        return self if name == self.root.name else RehearsalMachine(self.root.parent / name)

    def clusters(self) -> list[Object]:
        """Every k3d cluster of the host."""
        return [cluster for _, cluster in self.world.list("clusters")]

    def setting(self, name: str, default: Any) -> Any:
        """What a file of the world says: JSON, or `default` where there is none."""
        try:
            return json.loads((self.root / name).read_text())
        except FileNotFoundError:
            return default

    def set(self, name: str, value: Any) -> None:
        (self.root / name).write_text(json.dumps(value))

    # Processes

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        tick: Callable[[float], None] | None = None,
        from_file: str | None = None,
        to_file: str | None = None,
        limit: int = 0,
        ends_with_us: bool = False,
    ) -> Ran:
        installed = self._file(f"{TOOLS_DIRECTORY}/{argv[0]}").exists()
        if argv[0] in self.setting("missing-tools.json", []) and not installed:
            raise ToolMissing(argv[0])
        models: dict[str, Callable[[list[str], bytes, Mapping[str, str]], Ran]] = {
            "docker": self._docker,
            "k3d": self._k3d,
            "kubectl": self._host_kubectl,
            "git": self._git,
            "tar": self._tar,
            "rm": self._rm,
            "sync": lambda words, input, env: _done(),
            "ln": lambda words, *_: self._link(words),
            "umount": lambda words, *_: _done(),
            "ip": lambda words, *_: _done(),
            "kill": lambda words, *_: _done(),
            "journalctl": lambda words, *_: self._journal(words),
            "systemctl": lambda words, *_: systemctl(self, words),
            "midclt": lambda words, *_: midclt(self, words),
            "iscsiadm": lambda words, *_: _done("iscsiadm version 2.1.9\n"),
            "cryptsetup": lambda words, *_: _done("cryptsetup 2.7.5\n"),
            "lsblk": lambda words, *_: self._lsblk(words),
            "ss": lambda words, *_: self._ss(words),
        }
        for binary in (K3S_BINARY, f"{K3S_BINARY}.new"):
            models[binary] = lambda words, *given: self.k3s.run(argv[0], words, *given)
        if argv[0] not in models:
            raise ToolMissing(argv[0])
        if tuple(argv) in _VERSIONS and not (argv[0] == "docker" and self._docker_is_down()):
            return _done(_VERSIONS[tuple(argv)])
        if from_file:
            input = self.read(from_file)
        try:
            ran = models[argv[0]](list(argv[1:]), input, env or {})
        except _Usage as unknown:
            return _failed(f"rehearsal: {' '.join(argv[:3])}: {unknown}", 2)
        except FileNotFoundError:
            if argv[0].startswith(K3S_BINARY):
                raise ToolMissing(argv[0]) from None
            raise
        if to_file:
            self.write_atomic(to_file, ran.out, 0o600)
            return ran._replace(out=b"")
        return ran

    def _ss(self, words: list[str]) -> Ran:
        *flags, wanted = words
        if flags[:4] != ["--no-header", "--listening", "--numeric", "--processes"]:
            raise _Usage("ss without its options")
        program = self.setting("listeners.json", {}).get(wanted.rpartition(":")[2])
        shown = f'LISTEN 0 511 0.0.0.0:0 0.0.0.0:* users:(("{program}",pid=1,fd=6))\n'
        return _done(shown if program else "")

    # Files

    def _file(self, path: str) -> Path:
        return self.root / "files" / path.lstrip("/")

    def _access(self, path: str) -> Path:
        return self.root / "access" / (quote(path, safe="") + ".json")

    def _lsblk(self, words: list[str]) -> Ran:
        """A disk is raw unless disks.json says what is on it."""
        seen = {"type": "disk", "fstype": None, "mountpoints": [None]}
        seen |= self.setting("disks.json", {}).get(words[-1], {})
        return _done(json.dumps({"blockdevices": [seen]}))

    def read(self, path: str, limit: int = 1024 * 1024) -> bytes:
        if path == _INITIATOR and not self._file(path).exists():
            # Each machine's own.
            digest = hashlib.sha256(self.root.name.encode()).hexdigest()[:12]
            return f"InitiatorName=iqn.1993-08.org.debian:01:{digest}\n".encode()
        if path in _KERNEL_FILES and not self._file(path).exists():
            return _KERNEL_FILES[path].encode()
        return self._file(path).read_bytes()

    def write_atomic(
        self,
        path: str,
        content: bytes,
        mode: int,
        owner: str | None = None,
        group: str | None = None,
    ) -> None:
        target = self._file(path)
        # The host's own directories are there; hostctl makes what is below them.
        if path.count("/") == 2 or target.parent == self._file("/etc/systemd/system"):
            target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.hostctl")
        aside.write_bytes(content)
        self.set_access(path, mode, owner, group, written=True)
        aside.replace(target)

    def remove(self, path: str) -> bool:
        file = self._file(path)
        for gone in (self._access(path), file.with_name(f".{file.name}.hostctl")):
            gone.unlink(missing_ok=True)
        there = file.exists()
        file.unlink(missing_ok=True)
        return there

    @contextlib.contextmanager
    def private_file(self, content: bytes) -> Iterator[str]:
        # One hostctl at a time: see rehearsal/providers/command.py.
        path = "/run/hostctl-private"
        self.write_atomic(path, content, 0o600)
        try:
            yield path
        finally:
            self._file(path).unlink()
            self._access(path).unlink()

    def set_access(
        self,
        path: str,
        mode: int,
        owner: str | None = None,
        group: str | None = None,
        *,
        written: bool = False,
    ) -> None:
        access = self._access(path)
        access.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(access.read_text()) if access.exists() else {}
        after = {
            "mode": f"{mode:04o}",
            "owner": owner or before.get("owner", "root"),
            "group": group or before.get("group", "root"),
            "modified": self.now() if written else before.get("modified", self.now()),
        }
        access.write_text(json.dumps(after))

    def make_directory(
        self, path: str, mode: int, owner: str | None = None, group: str | None = None
    ) -> None:
        if self._file(path).is_dir():
            return
        self._file(path).mkdir(parents=True)
        self.set_access(path, mode, owner, group, written=True)

    def rename(self, path: str, to: str) -> None:
        self._file(path).rename(self._file(to))

    def is_empty(self, path: str) -> bool:
        directory = self._file(path)
        return not directory.is_dir() or not any(directory.iterdir())

    def stat(self, path: str) -> Stat | None:
        file = self._file(path)
        if not file.exists():
            if path.startswith("/dev/disk/by-id/"):
                lacking = self.setting("disks.json", {}).get(path, {}) is None
                return None if lacking else Stat("other", 0o660, "root", "disk", 0)
            if path == "/sbin/mount.nfs":
                lacking = "mount.nfs" in self.setting("missing-tools.json", [])
                return None if lacking else Stat("file", 0o4755, "root", "root", 0)
            return Stat("directory", 0o755, "root", "root", 0) if is_mark(self, path) else None
        access = self._access(path)
        seen = json.loads(access.read_text()) if access.exists() else {}
        kind = "directory" if file.is_dir() else "file"
        mode = int(seen.get("mode", "0755" if file.is_dir() else "0644"), 8)
        modified = seen.get("modified", file.stat().st_mtime)
        return Stat(kind, mode, seen.get("owner", "root"), seen.get("group", "root"), modified)

    def missing_account(self, owner: str | None, group: str | None) -> str | None:
        lacking = self.setting("accounts.json", {})
        if owner in lacking.get("users", []):
            return f"user {owner}"
        return f"group {group}" if group in lacking.get("groups", []) else None

    def free_bytes(self, path: str) -> int:
        return self.setting("free", 2**40)

    def tree_bytes(self, path: str) -> int:
        return sum(len(content) for _, content in self._tree(path))

    def file_bytes(self, path: str) -> int:
        return self._file(path).stat().st_size if self._file(path).exists() else 0

    def newest(self, path: str) -> float | None:
        files = (file for file in self._file(path).rglob("*") if file.is_file())
        return max((self._written(file) for file in files), default=None)

    def _written(self, file: Path) -> float:
        seen = self.stat("/" + str(file.relative_to(self.root / "files")))
        assert seen is not None
        return seen.modified

    def names(self, path: str) -> list[str]:
        top = self._file(path)
        return sorted(file.name for file in top.iterdir()) if top.is_dir() else []

    def publish(self, written: str, path: str) -> None:
        self._file(written).replace(self._file(path))
        if self._access(written).exists():
            self._access(written).replace(self._access(path))

    def checksum(self, path: str) -> str:
        content = self.read(path)
        downloaded = content.partition(_DOWNLOADED)[2]
        return downloaded[:64].decode() or hashlib.sha256(content).hexdigest()

    def write_value(self, path: str, value: str) -> None:
        self._file(path).write_text(value)

    def copy_database(self, path: str, to: str) -> str | None:
        self.write_atomic(to, self.read(path), 0o600)
        return None

    def has_program(self, name: str) -> bool:
        return name not in self.setting("missing-tools.json", [])

    def file_system(self, path: str) -> tuple[str, bool]:
        kind, writable = self.setting("file-system.json", ["ext4", True])
        return kind, writable

    def _tree(self, path: str) -> list[tuple[str, bytes]]:
        top = self._file(path)
        files = (file for file in sorted(top.rglob("*")) if file.is_file())
        return [(str(file.relative_to(top)), file.read_bytes()) for file in files]

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        (self.root / "locks").mkdir(exist_ok=True)
        with (self.root / "locks" / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"rehearsal: waiting for lock {name}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # Time and identity

    def now(self) -> float:
        """The real time, and what was slept on top of it."""
        return time.time() + self.setting("slept", 0.0)

    def sleep(self, seconds: float) -> None:
        """Passes in no time."""
        self.set("slept", self.setting("slept", 0.0) + seconds)

    def nonce(self) -> str:
        count = self.setting("nonces", 0) + 1
        self.set("nonces", count)
        return self._random(f"nonce {count}")[:16]

    def machine_id(self) -> str:
        return self._random("machine id")[:32]

    def _random(self, what: str) -> str:
        """64 hex digits, always the same for this world."""
        seed = self.setting("seed", "a rehearsal")
        return hashlib.sha256(f"{seed}/{what}".encode()).hexdigest()

    def kernel(self) -> tuple[str, str]:
        return "6.12.0", "x86_64"

    # Network

    def has_address(self, address: str) -> bool:
        after = self.setting("addresses.json", {}).get(address, 0)
        return after is not None and self.setting("slept", 0.0) >= after

    def interfaces(self) -> list[str]:
        return sorted(self.setting("interfaces.json", ["br0", "docker0", "eno1", "lo"]))

    def port_is_free(self, address: str, port: int, protocol: str = "tcp") -> bool:
        taken = self.setting("ports.json", [])
        if port in (6443, 2379, 2380) and self.k3s.own():
            return False
        if protocol == "udp":
            return f"{port}/udp" not in taken
        return port not in taken and not any(
            self._publishes(cluster, port) for cluster in self.clusters()
        )

    def served(self, address: str, port: int) -> Served | None:
        in_docker = (
            cluster
            for cluster in self.clusters()
            if self._publishes(cluster, port) and self._is_open(cluster)
        )
        cluster = next(in_docker, None) or self.k3s.at(address, port)
        if cluster is None:
            return None
        shown = base64.b64decode(cluster.get("serving", cluster["certificate"])).decode()
        return Served(
            base64.b64decode("".join(shown.splitlines()[1:-1])),
            float(int(self.now() + self.setting("clock-skew", 0))),
        )

    def put(self, url: str, login: tuple[str, str], body: bytes, ca: str) -> tuple[int, str]:
        if url != "https://127.0.0.1:6443/v1-k3s/token":
            raise _Usage(f"PUT {url}")
        return self.k3s.rotate(login, body)

    def read_url(self, url: str) -> bytes:
        """The checksums of a release; what they say is made up, and `download` agrees."""
        names = ("k3s", "k3s-arm64")
        directory = url.rpartition("/")[0]
        sums = {name: self._random(f"{directory}/{name}") for name in names}
        return "".join(f"{sums[name]}  {name}\n" for name in names).encode()

    def download(self, url: str, sha256: str, tick: Callable[[int], None]) -> bytes:
        there = self.setting("downloads.json", {}).get(url, sha256)
        if there is None:
            raise OSError("cut off after 4096 of 25000000 bytes")
        if there != sha256:
            raise ValueError(there)
        return _DOWNLOADED + f"{sha256} from {url}".encode()

    def connect(self, address: str, port: int, ca: str, name: str | None = None) -> str | None:
        own = self.k3s.own() if (address, port) == ("127.0.0.1", 6443) else None
        if own:
            members = [one for one in own["members"].values() if one["role"] == "server"]
            if name is None or any(name in (one["address"], *one["names"]) for one in members):
                return None
            return f"certificate is not valid for '{name}'"
        for cluster in self.clusters():
            if self._publishes(cluster, port) and self._is_open(cluster):
                return self._verified(cluster, ca)
        k3s = self.k3s.at(address, port)
        return self._verified(k3s, ca) if k3s else "[Errno 111] Connection refused"

    def _verified(self, cluster: Object, ca: str) -> str | None:
        if base64.b64decode(cluster["ca"]).decode() == ca:
            return None
        return "certificate verify failed: self-signed certificate in certificate chain"

    def get(self, url: str, chain: bytes, ca: str) -> tuple[int, str]:
        """Of an API server only whether it is ready is asked so."""
        parts = urlsplit(url)
        if parts.path != "/readyz":
            raise _Usage(f"GET {url}")
        refused = self.connect(parts.hostname or "", parts.port or 443, ca)
        if refused:
            raise ConnectionError(refused)
        return 200, "ok"

    def post(self, socket_path: str, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """Docker's API, of which only the making of a node is known."""
        found = re.fullmatch(r"/v1\.50/containers/create\?name=([a-z0-9-]+)", path)
        if socket_path != "/var/run/docker.sock" or not found:
            raise _Usage(f"{path} on {socket_path}")
        if self._docker_is_down():
            raise ConnectionRefusedError(111, "Connection refused")
        return self._create_container(found.group(1), body)

    def ask_docker(self, path: str) -> Any:
        """Docker is its client here."""
        return None

    def visit(
        self, url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> int:
        """Nothing leaves the machine: web.json says what is answered, and visited.json what was
        sent."""
        sent = [url, (body or b"").decode(), dict(headers or {})]
        self.set("visited.json", [*self.setting("visited.json", []), sent])
        status = self.setting("web.json", {}).get(url, 200)
        if isinstance(status, str):
            raise OSError(status)
        return status

    def bytes_read(self, pids: Iterable[int]) -> int | None:
        total = 0
        for cluster in self.clusters():
            if self._pid(cluster) in pids:
                total += self._has_read(cluster)
        return total

    # What a rehearsal makes up

    def missing_file(self, request: Mapping[str, Any]) -> bytes | None:
        """Content for a Secret file, valid for the Secret's type, marked, always the same.

        None for an optional one, which may be missing.
        """
        if request["optional"]:
            return None
        kind, path = request["type"], request["path"]
        keys = request["keys"] or _KEYS.get(kind, ["value"])
        values = {key: self._made_up(kind, path, key) for key in keys}
        if request["as"] == "value":
            return values[keys[0]].encode() + b"\n"
        # JSON is YAML.
        manifest = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"namespace": request["namespace"], "name": request["name"]},
            "type": kind,
            "stringData": values,
        }
        return json.dumps(manifest, indent=1).encode() + b"\n"

    def _made_up(self, kind: str, path: str, key: str) -> str:
        value = f"made-up-{self._random(f'{path} {key}')[:24]}"
        if key == ".dockerconfigjson":
            auth = base64.b64encode(f"made-up:{value}".encode()).decode()
            return json.dumps({"auths": {"registry.example.org": {"auth": auth}}})
        if key == "TS_AUTHKEY" or "tailscale" in path:
            return f"tskey-auth-{value}"
        if kind == "kubernetes.io/tls":
            return _pem("PRIVATE KEY" if key.endswith("key") else "CERTIFICATE", value.encode())
        if kind == "kubernetes.io/ssh-auth":
            return _pem("OPENSSH PRIVATE KEY", value.encode())
        return value

    # Docker

    def _docker_is_down(self) -> bool:
        return (self.root / "docker-down").exists() or (
            self.docker_world.root / "unreachable"
        ).exists()

    def _docker(self, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        if self._docker_is_down():
            return _failed(_DOCKER_DOWN)
        kinds = ("network", "volume", "image", "context", "system", "builder")
        if words[0] in kinds and len(words) > 1:
            verb, rest = f"{words[0]}_{words[1]}", words[2:]
        else:
            verb, rest = words[0], words[1:]
        model = getattr(self, f"_docker_{verb}", None)
        if model is None:
            raise _Usage("unknown command")
        return model(rest, input) if verb in ("exec", "cp") else model(rest)

    def _docker_ps(self, words: list[str]) -> Ran:
        options, operands = _options(words, ["--all", "--no-trunc"], ["--format"])
        if operands or {"--all", "--no-trunc", "--format"} - options.keys():
            raise _Usage("docker ps without --all, --no-trunc or --format")
        rows = []
        for facts in self._all_containers():
            labels = facts["Config"].get("Labels") or {}
            fields = {".ID": facts["Id"], ".Names": facts["Name"].lstrip("/")}

            def filled(
                match: re.Match[str], fields: Object = fields, labels: Object = labels
            ) -> str:
                label = re.fullmatch(r'\.Label "([^"]+)"', match.group(1))
                if label is None and match.group(1) not in fields:
                    raise _Usage(f"format {match.group(0)}")
                return labels.get(label.group(1), "") if label else fields[match.group(1)]

            rows.append(re.sub(r"\{\{(.*?)\}\}", filled, options["--format"]) + "\n")
        return _done("".join(rows))

    def _docker_inspect(self, words: list[str]) -> Ran:
        options, names = _options(words, (), ["--type"])
        if options.get("--type") != "container" or not names:
            raise _Usage("docker inspect without --type container or a name")
        found = []
        for name in names:
            facts = self._container(name)
            if facts is None:
                return _failed(f"Error response from daemon: No such container: {name}")
            found.append(facts)
        return _done(json.dumps(found))

    def _networks(self) -> list[Object]:
        """Docker's own bridge, and the networks of the docker stand-in."""
        bridge = {"subnet": "172.17.0.0/16", "gateway": "172.17.0.1"}
        own = {"name": "bridge", "id": self._random("network bridge"), "ipamConfigs": [bridge]}
        return [own, *(network for _, network in self.docker_world.list("network"))]

    def _docker_network_ls(self, words: list[str]) -> Ran:
        options, operands = _options(words, ["--quiet", "--no-trunc"])
        if operands or {"--quiet", "--no-trunc"} - options.keys():
            raise _Usage("docker network ls without --quiet or --no-trunc")
        return _done("".join(f"{network['id']}\n" for network in self._networks()))

    def _docker_network_inspect(self, words: list[str]) -> Ran:
        _, wanted = _options(words)
        if not wanted:
            raise _Usage("docker network inspect without a name")
        found = []
        for name in wanted:
            network = next(
                (one for one in self._networks() if name in (one["name"], one["id"])), None
            )
            if network is None:
                return _failed(f"Error response from daemon: network {name} not found")
            found.append(self._network_facts(network))
        return _done(json.dumps(found))

    def _docker_network_connect(self, words: list[str]) -> Ran:
        return self._attach(words, connect=True)

    def _docker_network_disconnect(self, words: list[str]) -> Ran:
        return self._attach(words, connect=False)

    def _attach(self, words: list[str], *, connect: bool) -> Ran:
        """A second network of a node; Docker keeps it while the container is there."""
        _, (network, name) = _options(words)
        there, found = self.docker_world.get(f"network/{network}"), self._node(name)
        if there is None:
            return _failed(f"Error response from daemon: network {network} not found")
        if found is None:
            return _failed(f"Error response from daemon: No such container: {name}")
        cluster, node = found
        attached = node.setdefault("attached", [])
        if connect == (network in attached):
            what = "already exists in" if connect else "is not connected to"
            return _failed(f"Error response from daemon: endpoint {name} {what} network {network}")
        endpoints = set(there.get("endpoints", []))
        if connect:
            attached.append(network)
            endpoints.add(name)
        else:
            attached.remove(network)
            endpoints.discard(name)
        self.docker_world.put(f"network/{network}", {**there, "endpoints": sorted(endpoints)})
        self._save(cluster)
        return _done("")

    @staticmethod
    def _network_facts(network: Object) -> Object:
        """A network as `docker network inspect` shows it."""
        labels = {item["label"]: item["value"] for item in network.get("labels") or []}
        config = [
            {"Subnet": one.get("subnet"), "Gateway": one.get("gateway")}
            for one in network.get("ipamConfigs") or []
        ]
        return {
            "Name": network["name"],
            "Id": network["id"],
            "Driver": network.get("driver", "bridge"),
            "IPAM": {"Driver": "default", "Config": config},
            "Labels": labels,
        }

    def _docker_volume_ls(self, words: list[str]) -> Ran:
        options, operands = _options(words, ["--quiet"], ["--filter"])
        key, _, pattern = options["--filter"].partition("=")
        if operands or key not in ("name", "dangling"):
            raise _Usage("docker volume ls without --filter name= or dangling=")
        names = self.setting("volumes.json", [])
        if key == "dangling":
            orphans = self.setting("orphans.json", {})
            names = [name for name in names if name in orphans]
        else:
            names = [name for name in names if re.search(pattern, name)]
        return _done("".join(f"{name}\n" for name in names))

    def _docker_volume_inspect(self, words: list[str]) -> Ran:
        facts = {"Driver": "local", "Labels": None, "Options": None}
        orphans = self.setting("orphans.json", {})
        return _done(
            json.dumps(
                [
                    {
                        "Name": name,
                        "Mountpoint": f"/var/lib/docker/volumes/{name}/_data",
                        **facts,
                        **orphans.get(name, {}),
                    }
                    for name in words
                ]
            )
        )

    def _docker_volume_rm(self, words: list[str]) -> Ran:
        _, (name,) = _options(words)
        if name not in self.setting("orphans.json", {}):
            return _failed(f"Error response from daemon: remove {name}: volume is in use - [0a1b]")
        self.set("volumes.json", [one for one in self.setting("volumes.json", []) if one != name])
        return _done(f"{name}\n")

    def _docker_image_ls(self, words: list[str]) -> Ran:
        if words != ["--quiet", "--no-trunc", "--filter", "dangling=true"]:
            raise _Usage("docker image ls of other than dangling images")
        return _done("".join(f"{image}\n" for image in self.setting("dangling.json", {})))

    def _docker_image_prune(self, words: list[str]) -> Ran:
        if words != ["--force"]:
            raise _Usage("docker image prune with more than --force")
        used = {facts.get("Image") for facts in self._all_containers()}
        images = self.setting("dangling.json", {})
        self.set("dangling.json", {key: size for key, size in images.items() if key in used})
        return _done("Total reclaimed space: 1kB\n")

    def _docker_system_df(self, words: list[str]) -> Ran:
        if words != ["--format", "{{.Type}}={{.Reclaimable}}"]:
            raise _Usage("docker system df with another format")
        return _done(f"Images=1GB (50%)\nBuild Cache={self.setting('build-cache', '0B')}\n")

    def _docker_builder_prune(self, words: list[str]) -> Ran:
        if words != ["--force"]:
            raise _Usage("docker builder prune with more than --force")
        size = self.setting("build-cache", "0B")
        self.set("build-cache", "0B")
        return _done(f"ID\tRECLAIMABLE\nTotal:\t{size}\n")

    def _docker_image_inspect(self, words: list[str]) -> Ran:
        options, wanteds = _options(words, (), ["--format"])
        if options.get("--format") == "{{.Id}} {{.Size}}":
            sizes = self.setting("dangling.json", {})
            out = "".join(f"{one} {sizes[one]}\n" for one in wanteds if one in sizes)
            gone = [
                f"Error response from daemon: No such image: {one}\n"
                for one in wanteds
                if one not in sizes
            ]
            return Ran(int(bool(gone)), out.encode(), "".join(gone).encode())
        (wanted,) = wanteds
        if options.get("--format") in ("{{.Id}}", "{{json .Config}}"):
            known = {image.get("name") for _, image in self.docker_world.list("image")}
            known |= {*self.setting("images.json", []), *self._node_images()}
            if wanted not in known | {_image_id(image) for image in known if image}:
                return _failed(f"Error response from daemon: No such image: {wanted}")
            if options["--format"] == "{{.Id}}":
                return _done(f"{_image_id(wanted)}\n")
            return _done(json.dumps(_IMAGE_CONFIG))
        if options.get("--format") != "{{json .RepoDigests}}":
            raise _Usage("docker image inspect with another format")
        for _, image in self.docker_world.list("image"):
            if wanted in (image.get("imageId"), image.get("name")):
                return _done(json.dumps([image.get("repoDigest")]))
        return _failed(f"Error response from daemon: No such image: {wanted}")

    def _docker_cp(self, words: list[str], input: bytes) -> Ran:
        _, operands = _options(words, ["--archive"])
        if len(operands) != 2 or "-" not in operands:
            raise _Usage("docker cp with neither stdin nor stdout")
        container, _, path = operands[operands[0] == "-"].partition(":")
        found = self._node(container)
        if found is None:
            return _failed(f"Error: No such container:path: {container}:{path}")
        cluster, node = found
        if operands[0] == "-":
            with tarfile.open(fileobj=io.BytesIO(input)) as archive:
                for member in archive:
                    held = archive.extractfile(member)
                    node["layer"][f"{path}{member.name}"] = held.read().decode() if held else ""
            self._save(cluster)
            return _done()
        files = {
            place: [(os.path.basename(place), text.encode())]
            for place, text in node.get("layer", {}).items()
        }
        bound = self._bound_file(node, path)
        if bound is not None:
            files[path] = [(os.path.basename(path), bound.encode())]
        if node["role"] == "server" and self._file(self._data(node)).is_dir():
            tree = self._tree(self._data(node))
            files[_DATASTORE] = [(f"server/{name}", content) for name, content in tree]
        if "ca" in cluster and node["role"] == "server" and node.get("starts"):
            text = kubeconfig(cluster).encode()
            files["/output/kubeconfig.yaml"] = [("kubeconfig.yaml", text)]
        if path not in files:
            return _failed(
                f"Error response from daemon: Could not find the file {path} in container "
                f"{container}"
            )
        return _done(_archive(files[path]))

    def _docker_info(self, words: list[str]) -> Ran:
        if words != ["--format", "{{json .}}"]:
            raise _Usage("docker info without --format '{{json .}}'")
        return _done(json.dumps(_INFO | self.setting("docker-info.json", {})))

    def _docker_exec(self, words: list[str], input: bytes) -> Ran:
        interactive = words[0] == "--interactive"
        container, *argv = words[1:] if interactive else words
        found = self._node(container)
        if found is None:
            return _failed(f"Error response from daemon: No such container: {container}")
        cluster, node = found
        if self._status(cluster, node) != "running":
            return _failed(f"Error response from daemon: container {container} is not running")
        if argv == ["k3s", "--version"]:
            return _done(f"k3s version {k3s_version(node['image']) or 'v1.31.5+k3s1'} (00000000)\n")
        if argv == ["ctr", "--namespace", "k8s.io", "images", "import", "-"] and interactive:
            node["images"] = [*node.get("images", []), hashlib.sha256(input).hexdigest()]
            self._save(cluster)
            return _done()
        if argv == ["ls", "/opt/cni/bin"]:
            plugins = node.get("plugins", [])
            return _done("\n".join(plugins)) if plugins else _failed(f"ls: {argv[1]}: No such file")
        if argv[0] == "crictl":
            return self._crictl(argv[1:], cluster)
        if argv[0] != "kubectl":
            raise _Usage(f"docker exec of {argv[0]}")
        if not self._is_open(cluster):
            return _failed("The connection to the server 127.0.0.1:6443 was refused - did you ...?")
        given = input if interactive else b""
        if argv[1] == "exec":
            return self.in_pod(argv[2:], given)
        # Without --interactive, docker exec gives the program no stdin.
        return self._kubectl(argv[1:], given, cluster)

    def _crictl(self, words: list[str], cluster: Object) -> Ran:
        images = cluster.get("images", [])
        match words:
            case ["images", "--output=json"]:
                shown = [{k: v for k, v in one.items() if k != "used"} for one in images]
                return _done(json.dumps({"images": shown}))
            case ["ps", "--all", "--output=json"]:
                used = [{"imageRef": one["id"], "image": {}} for one in images if one["used"]]
                return _done(json.dumps({"containers": used}))
            case ["rmi", "--prune"]:
                cluster["images"] = [one for one in images if one["used"]]
                self.world.put(f"clusters/{cluster['name']}", cluster)
                return _done()
        raise _Usage(f"crictl {words}")

    def in_pod(self, words: list[str], input: bytes) -> Ran:
        """PostgreSQL's tools in a pod. A dump is its content between two marks."""
        there, _, argv = (words[: words.index("--")], 0, words[words.index("--") + 1 :])
        options, (workload,) = _options(there, ["--stdin"], ["--namespace", "--container"])
        databases = self.setting("databases.json", {})
        pod = databases.get(f"{options['--namespace']}/{workload}")
        if pod is None:
            kind, _, name = workload.partition("/")
            return _failed(f'Error from server (NotFound): {kind}s.apps "{name}" not found')
        values = ["--username", "--dbname", "--command", "--format", "--file", "--template"]
        values += ["--set", "--encoding", "--lc-collate", "--lc-ctype"]
        flags = ["--quiet", "--no-password", "--no-psqlrc", "--tuples-only", "--no-align"]
        flags += ["--if-exists", "--force", "--exit-on-error", "--no-owner"]
        given, operands = _options(argv[1:], flags, values)
        if argv[0] == "createdb":
            if operands[0] in pod:
                return _failed(f'createdb: error: database "{operands[0]}" already exists')
            pod[operands[0]] = {"content": "", "rows": "0/0/0"}
            self.set("databases.json", databases)
            return _done()
        if argv[0] == "dropdb" and "--if-exists" in given:
            pod.pop(operands[0], None)
            self.set("databases.json", databases)
            return _done()
        if argv[0] == "pg_restore":
            if not (input.startswith(b"PGDMP ") and input.endswith(b" END")):
                return _failed("pg_restore: error: could not read from input file")
            if "--dbname" in given:
                pod[given["--dbname"]]["content"] = input[6:-4].decode()
                self.set("databases.json", databases)
            return _done()
        altered = re.fullmatch(r"""ALTER ROLE "(.+)" PASSWORD '(.+)';\n""", input.decode())
        if argv[0] == "psql" and altered:
            role, verifier = altered.groups()
            roles = self.setting("roles.json", {})
            key = f"{options['--namespace']}/{workload}"
            if role not in roles.get(key, {}):
                return _failed(f'ERROR:  role "{role}" does not exist')
            self.set("roles.json", {**roles, key: {**roles[key], role: verifier}})
            return _done()
        for database in pod.values():
            database.setdefault("oid", 1 + max(one.get("oid", 16384) for one in pod.values()))
        self.set("databases.json", databases)
        if argv[0] == "psql" and given["--dbname"] in ("postgres", "template1"):
            return self._psql(argv, pod, databases)
        database = pod.get(given["--dbname"])
        if database is None:
            return _failed(f'FATAL:  database "{given["--dbname"]}" does not exist')
        if database.get("closed"):
            return _failed(
                f'FATAL:  database "{given["--dbname"]}" is not currently accepting connections'
            )
        if argv[0] == "psql":
            size = len(database["content"])
            return _done(f"{size}|{database['oid']}/{database['rows']}\n")
        if argv[0] == "pg_dump" and given["--format"] == "custom":
            end = "" if database.get("cut_off") else " END"
            return _done(f"PGDMP {database['content']}{end}")
        raise _Usage(f"kubectl exec of {argv[0]}")

    def _psql(self, argv: Sequence[str], pod: Object, databases: Object) -> Ran:
        """What a restore asks and does from another database, by the words of hostctl's own SQL:
        this is no PostgreSQL. tests/cluster/test_postgres.py has a real one."""
        shown = ""
        for sql in (word.partition("=")[2] for word in argv if word.startswith("--command=")):
            altered = re.fullmatch('alter database "(.+)" allow_connections (true|false)', sql)
            renamed = re.findall(
                r"alter database %I rename to %I', '([\w.-]+)', '([\w.-]+)'\);", sql
            )
            if altered and altered[1] in pod:
                pod[altered[1]]["closed"] = altered[2] == "false"
            elif sql.startswith("select json_build_object("):
                names = re.findall("'([^']+)'", sql.rpartition("where datname in ")[2])
                like = dict(encoding="UTF8", collate="C.UTF-8", ctype="C.UTF-8", provider="c")
                found = {
                    name: {"oid": one["oid"], "written": f"{one['oid']}/{one['rows']}", **like}
                    | {"locale": None}
                    for name, one in pod.items()
                    if name in names
                }
                shown += json.dumps({"superuser": True, "databases": found}) + "\n"
            elif "pg_terminate_backend(pid)" in sql:
                for one in pod.values():
                    one["rows"] = one.pop("writing", one["rows"])
            elif len(renamed) == 2:
                (first, aside), (second, name) = renamed
                open_ = [one for one in {first, second} & set(pod) if not pod[one].get("closed")]
                if first in pod and aside in pod:
                    return _failed(f'ERROR:  database "{aside}" already exists')
                if open_ or second not in pod:
                    return _failed(f'ERROR:  database "{second}" is being accessed by other users')
                if first in pod:
                    pod[aside] = {**pod.pop(first), "closed": False}
                pod[name] = {**pod.pop(second), "closed": False}
            else:
                raise _Usage(f"psql of {sql}")
        self.set("databases.json", databases)
        return _done(shown)

    def _docker_top(self, words: list[str]) -> Ran:
        container, *options = words
        found = self._node(container)
        if found is None or options != ["-eo", "pid"]:
            raise _Usage("docker top of no node, or with other options than -eo pid")
        return _done(f"PID\n{self._pid(found[0])}\n")

    def _docker_start(self, words: list[str]) -> Ran:
        _, (container,) = _options(words)
        found = self._node(container)
        if found is None:
            return _failed(f"Error response from daemon: No such container: {container}")
        cluster, node = found
        if _ENTRYPOINT not in node.get("layer", {_ENTRYPOINT: ""}):
            # k3d writes its entrypoint into a node before it starts it.
            return _failed(
                f"Error response from daemon: failed to create task for container {container}: "
                'exec: "/bin/k3d-entrypoint.sh": stat /bin/k3d-entrypoint.sh: no such file'
            )
        self._start(cluster, node)
        return _done(f"{container}\n")

    def _docker_stop(self, words: list[str]) -> Ran:
        _, (container,) = _options(words, (), ["-t"])
        found = self._node(container)
        if found is None:
            return _failed(f"Error response from daemon: No such container: {container}")
        cluster, node = found
        self._freeze(cluster)
        node["status"] = "exited"
        self._save(cluster)
        return _done(f"{container}\n")

    def _docker_restart(self, words: list[str]) -> Ran:
        _, (container,) = _options(words, (), ["-t"])
        found = self._node(container)
        if found:
            self._start(*found)
            return _done(f"{container}\n")
        facts = self._container(container)
        if facts is None:
            return _failed(f"Error response from daemon: No such container: {container}")
        (self.root / "started").mkdir(exist_ok=True)
        self.set(f"started/{container}", self.now())
        return _done(f"{container}\n")

    def _docker_rm(self, words: list[str]) -> Ran:
        options, (container,) = _options(words, ["--force", "--volumes"])
        found = self._node(container)
        if found and "--volumes" in options:
            return self._remove_node(*found, force="--force" in options)
        file = self.root / "containers" / f"{container}.json"
        if not file.exists() or "--force" not in options:
            raise _Usage("docker rm of a node, or without --force")
        file.unlink()
        return _done(f"{container}\n")

    def _remove_node(self, cluster: Object, node: Object, *, force: bool) -> Ran:
        status = self._status(cluster, node)
        if status in ("running", "restarting") and not force:
            return _failed(
                f"Error response from daemon: cannot remove container {node['name']!r}: container "
                "is running: stop the container before removing or force remove"
            )
        self._freeze(cluster)
        cluster["nodes"].remove(node)
        volume = self._file(os.path.dirname(self._volume(node)))
        shutil.rmtree(volume, ignore_errors=True)
        self._save(cluster)
        return _done(f"{node['name']}\n")

    def _docker_rename(self, words: list[str]) -> Ran:
        _, (container, name) = _options(words)
        found = self._node(container)
        if found is None:
            return _failed(f"Error response from daemon: No such container: {container}")
        if self._container(name):
            return _failed(f"Error response from daemon: Conflict. The name {name} is in use")
        cluster, node = found
        node.setdefault("id", self._facts(cluster, node)["Id"])
        node["name"] = name
        self._save(cluster)
        return _done()

    def _docker_diff(self, words: list[str]) -> Ran:
        _, (container,) = _options(words)
        found = self._node(container)
        if found is None:
            return _failed(f"Error response from daemon: No such container: {container}")
        layer = found[1].get("layer", {})
        places = {os.path.dirname(path) for path in layer}
        lines = [f"C {place}" for place in places] + [f"A {path}" for path in layer]
        return _done("".join(f"{line}\n" for line in sorted(lines)))

    def _docker_logs(self, words: list[str]) -> Ran:
        options, (container,) = _options(words, (), ["--tail"])
        found = self._node(container)
        if found is None or "--tail" not in options:
            raise _Usage("docker logs of no node, or without --tail")
        return _done(found[1].get("log", ""))

    def _docker_pull(self, words: list[str]) -> Ran:
        _, (image,) = _options(words, ["--quiet"])
        if image in self.setting("no-pull.json", []):
            return _failed(f"Error response from daemon: manifest for {image} not found")
        self.set("images.json", sorted({*self.setting("images.json", []), image}))
        return _done(f"{image}\n")

    def _docker_context_inspect(self, words: list[str]) -> Ran:
        if words != ["--format", "{{.Endpoints.docker.Host}}"]:
            raise _Usage("docker context inspect with another format")
        return _done("unix:///var/run/docker.sock\n")

    def _create_container(self, name: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """A container as Docker's API makes it of what `docker inspect` showed of another."""
        if self._container(name):
            return 409, f"Conflict. The container name /{name} is already in use"
        if body["Image"] not in {*self.setting("images.json", []), *self._node_images()}:
            return 404, f"No such image: {body['Image']}"
        labels, host = body["Labels"], body["HostConfig"]
        cluster = self.world.get(f"clusters/{labels['k3d.cluster']}")
        ((network, endpoint),) = body["NetworkingConfig"]["EndpointsConfig"].items()
        if cluster is None or endpoint.keys() - {"Aliases", "IPAMConfig"}:
            raise _Usage("a container of no cluster, or an endpoint with what Docker decides")
        lacking = {"Entrypoint", "Hostname", "Env"} - body.keys()
        if lacking or any(one in _IMAGE_CONFIG["Env"] for one in body["Env"]):
            raise _Usage(f"a node without {lacking or 'an environment of its own image'}")
        number = self.setting("containers-made", 0) + 1
        self.set("containers-made", number)
        node = {
            "id": self._random(f"container {number}"),
            "name": name,
            "role": labels["k3d.role"],
            "image": body["Image"],
            "labels": labels,
            "cmd": body["Cmd"],
            "env": body["Env"],
            "binds": host["Binds"],
            "ports": host["PortBindings"],
            "network": network,
            "address": "172.30.0.9",
            "status": "created",
            "layer": {},
        }
        self._freeze(cluster)
        cluster["nodes"].insert(0, node)
        self._save(cluster)
        return 201, json.dumps({"Id": node["id"], "Warnings": []})

    # Containers

    def _node_images(self) -> set[str]:
        return {node["image"] for cluster in self.clusters() for node in cluster["nodes"]}

    def _volume(self, node: Object) -> str:
        """Where Docker keeps the node's own volume of /var/lib/rancher/k3s."""
        return f"/var/lib/docker/volumes/{self._random(node.get('id', node['name']))}/_data"

    def _data(self, node: Object) -> str:
        """Where the server's datastore is on the host."""
        for bind in node["binds"]:
            source, destination = bind.split(":")[:2]
            if destination == _DATASTORE:
                return source
        return f"{self._volume(node)}/server"

    def _bound_file(self, node: Object, path: str) -> str | None:
        """The text of a host's file that is mounted there."""
        for bind in node["binds"]:
            source, destination = bind.split(":")[:2]
            if destination == path and self._file(source).is_file():
                return self.read(source).decode()
        return None

    def _all_containers(self) -> list[Object]:
        found = [
            self._facts(cluster, node) for cluster in self.clusters() for node in cluster["nodes"]
        ]
        for file in sorted((self.root / "containers").glob("*.json")):
            found.append(json.loads(file.read_text()))
        for _, container in self.docker_world.list("container"):
            found.append(self._other_facts(container))
        return found

    def _container(self, name: str) -> Object | None:
        return next(
            (one for one in self._all_containers() if name in (one["Id"], one["Name"].lstrip("/"))),
            None,
        )

    def _other_facts(self, container: Object) -> Object:
        """A container that the docker stand-in made; it runs from when its file was written."""
        name = container["name"]
        file = self.docker_world.root / "container" / f"{name}.json"
        started = self.setting(f"started/{name}", file.stat().st_mtime + self.setting("slept", 0.0))
        labels = {item["label"]: item["value"] for item in container.get("labels") or []}
        running = container.get("mustRun") is not False
        return {
            "Id": container["id"],
            "Name": f"/{name}",
            "Created": _utc(started),
            "State": {"Status": "running" if running else "exited", "StartedAt": _utc(started)},
            "Config": {"Image": container.get("image"), "Cmd": [], "Labels": labels},
            "HostConfig": {"PortBindings": {}},
            "Mounts": [],
            "NetworkSettings": {"Ports": {}, "Networks": {}},
        }

    def _facts(self, cluster: Object, node: Object) -> Object:
        """A node as `docker inspect` shows it."""
        status = self._status(cluster, node)
        running = status == "running"
        mounts = [
            {"Type": "bind", "Source": source, "Destination": destination.split(":")[0]}
            for source, destination in (bind.split(":", 1) for bind in node["binds"])
        ]
        mounts.append({"Type": "volume", "Source": self._volume(node), "Destination": _K3S})
        published = running and node.get("published", True)
        ports: Object = {}
        for port, bound in node["ports"].items():
            # k3d names the API's port without a protocol, and Docker shows it as it was given.
            full = port if "/" in port else f"{port}/tcp"
            ports[full] = ports.get(full, []) + bound if published else None
        endpoint = {
            "IPAddress": node["address"] if running else "",
            "NetworkID": "0",
            "Aliases": [node["name"]],
            "IPAMConfig": None,
        }
        networks = {} if node.get("disconnected") else {node["network"]: endpoint}
        networks |= {name: {**endpoint, "IPAddress": ""} for name in node.get("attached", [])}
        return {
            "Id": node.get("id") or self._random(f"{node['name']} {cluster['created']}"),
            "Name": f"/{node['name']}",
            "Created": cluster["created"],
            "Image": _image_id(node["image"]),
            "State": {
                "Status": status,
                "Running": running,
                "StartedAt": _utc(node.get("started", 0)),
            },
            "Config": {
                **_IMAGE_CONFIG,
                "Hostname": f"k3d-{cluster['name']}-server-0",
                "Entrypoint": [_ENTRYPOINT],
                "Env": [*node.get("env", []), *_IMAGE_CONFIG["Env"]],
                "Image": node["image"],
                "Cmd": node["cmd"],
                "Labels": node["labels"],
            },
            "HostConfig": {
                "Binds": node["binds"],
                "PortBindings": node["ports"],
                "Privileged": True,
                "RestartPolicy": {"Name": "unless-stopped", "MaximumRetryCount": 0},
            },
            "Mounts": mounts,
            "NetworkSettings": {"Ports": ports if running else {}, "Networks": networks},
        }

    def _node(self, name: str) -> tuple[Object, Object] | None:
        for cluster in self.clusters():
            for node in cluster["nodes"]:
                if name in (node["name"], self._facts(cluster, node)["Id"]):
                    return cluster, node
        return None

    @staticmethod
    def _status(cluster: Object, node: Object) -> str:
        if cluster["state"] == "stopped" and node["status"] == "running":
            return "exited"
        return node["status"]

    def _freeze(self, cluster: Object) -> None:
        """Write down what each node's state is before one of them changes."""
        for node in cluster["nodes"]:
            node["status"] = self._status(cluster, node)

    def _start(self, cluster: Object, node: Object) -> None:
        self._freeze(cluster)
        node["starts"] = node.get("starts", 0) + 1
        node["started"] = self.now()
        node.pop("published", None)
        ended = self._open_datastore(cluster, node)
        node["status"] = "restarting" if ended else "running"
        node["log"] = f"level=fatal msg={ended!r}\n" if ended else ""
        self._save(cluster)

    def _open_datastore(self, cluster: Object, node: Object) -> str | None:
        """What k3s does with its datastore at a start; why it ends at once."""
        if not node["name"].endswith("-server-0"):
            return None
        layer = node.setdefault("layer", {_ENTRYPOINT: ""})
        given = self._bound_file(node, _PASSWORD)
        password = given or layer.setdefault(
            _PASSWORD, self._random(f"password of {self._volume(node)}")
        )
        release = [int(part) for part in re.findall(r"\d+", k3s_version(node["image"]) or "")]
        tokens = [one for one in node.get("env", []) if one.startswith("K3S_TOKEN=")]
        opened = {"ca": cluster["ca"], "tokens": tokens, "password": password, "release": release}
        path = f"{self._data(node)}/db/state.db"
        if self.stat(path):
            held = json.loads(self.read(path))
            if held["tokens"] != tokens:
                return "bootstrap data already found and encrypted with different token"
            if held["password"] != password:
                return "Node password rejected, duplicate hostname"
            if held["release"] > release:
                return "the datastore was migrated by a newer release"
            if node["starts"] == 1:
                cluster["ca"] = held["ca"]
            opened["ca"] = cluster["ca"]
        self.make_directory(os.path.dirname(path), 0o700)
        # A release that fails has migrated its datastore before.
        self.write_atomic(path, json.dumps(opened).encode(), 0o600)
        if node["image"] in self.setting("broken-images.json", []):
            return "starting kubernetes: preparing server: exit status 1"
        return None

    def _save(self, cluster: Object) -> None:
        standing = [node for node in cluster["nodes"] if _NODE_NAME.search(node["name"])]
        up = any(node["status"] == "running" for node in standing)
        cluster["state"] = "running" if up else "stopped"
        self.world.put(f"clusters/{cluster['name']}", cluster)

    def _is_open(self, cluster: Object) -> bool:
        """Whether the API server of a running cluster has opened its datastore."""
        opening = cluster.get("opening")
        server = cluster["nodes"][0]
        if self._status(cluster, server) != "running":
            return False
        if not opening:
            return True
        if server.get("starts", 0) <= opening.get("stalls", 0):
            return False
        return self.now() - server["started"] >= opening["seconds"]

    def _has_read(self, cluster: Object) -> int:
        opening = cluster.get("opening") or {}
        server = cluster["nodes"][0]
        if server.get("starts", 0) <= opening.get("stalls", 0):
            return 0
        return int((self.now() - server["started"]) * opening.get("bytes_per_second", 0))

    def _publishes(self, cluster: Object, port: int) -> bool:
        return any(
            self._status(cluster, node) == "running"
            and node.get("published", True)
            and any(
                int(one["HostPort"]) == port for bound in node["ports"].values() for one in bound
            )
            for node in cluster["nodes"]
        )

    def _pid(self, cluster: Object) -> int:
        return 1000 + int(hashlib.sha256(cluster["name"].encode()).hexdigest()[:4], 16)

    # k3d

    def _k3d(self, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        if self._docker_is_down():
            return _failed(f"FATA[0000] runtime failed to list nodes: {_DOCKER_DOWN}")
        model = {
            ("cluster", "list"): self._k3d_list,
            ("cluster", "create"): self._k3d_create,
            ("cluster", "start"): self._k3d_start,
            ("cluster", "delete"): self._k3d_delete,
        }.get((words[0], words[1]) if len(words) > 1 else ("", ""))
        if model is None:
            raise _Usage("unknown command")
        return model(words[2:])

    def _k3d_list(self, words: list[str]) -> Ran:
        options, operands = _options(words, (), ["--output"])
        if operands or options.get("--output") != "json":
            raise _Usage("k3d cluster list with operands or without --output json")
        clusters = self.clusters()
        for cluster in clusters:
            for node in cluster["nodes"]:
                if node.get("disconnected") and self._status(cluster, node) == "running":
                    return _failed(
                        f"FATA[0000] failed to parse IP '' for container '{node['name']}'"
                    )
        return _done(json.dumps([{"name": cluster["name"]} for cluster in clusters]))

    def _k3d_create(self, words: list[str]) -> Ran:
        flags = ["--no-rollback", "--kubeconfig-update-default=false"]
        flags.append("--kubeconfig-switch-context=false")
        options, operands = _options(words, flags, ["--config"])
        if operands or set(flags) - options.keys():
            raise _Usage("k3d cluster create with operands or without its safeguards")
        config = json.loads(self.read(options["--config"]))
        _check_config(config)
        name = config["metadata"]["name"]
        if self._begun(name):
            return _failed(
                f"FATA[0000] Failed to create cluster '{name}' because a cluster with that name "
                "already exists"
            )
        self.create_cluster(config)
        return _done("INFO[0000] Cluster created successfully!\n")

    def _begun(self, name: str) -> bool:
        return any(
            (facts["Config"].get("Labels") or {}).get("k3d.cluster") == name
            for facts in self._all_containers()
        )

    def create_cluster(self, config: Object, *, cut_off: bool = False) -> Object:
        """What `k3d cluster create` makes of its config; `cut_off` before it starts the nodes."""
        name = config["metadata"]["name"]
        network = config.get("network") or f"k3d-{name}"
        volumes = self.setting("volumes.json", [])
        if f"k3d-{name}-images" not in volumes:
            self.set("volumes.json", [*volumes, f"k3d-{name}-images"])
        there = self.docker_world.get(f"network/{network}")
        if there is None:
            there = {
                "name": network,
                "id": self._random(f"network {network}"),
                "driver": "bridge",
                "ipamConfigs": [{"subnet": config["subnet"]}] if "subnet" in config else [],
                "labels": [{"label": "app", "value": "k3d"}],
            }
        made = self.setting("clusters-made", 0) + 1
        self.set("clusters-made", made)
        token = config.get("token") or self._random(f"token {name} {made}")
        labels = {
            "k3d.cluster.token": token,
            "app": "k3d",
            "k3d.cluster": name,
            "k3d.cluster.network": network,
            "k3d.cluster.imageVolume": f"k3d-{name}-images",
            "k3d.server.api.host": config["kubeAPI"].get("host", config["kubeAPI"]["hostIP"]),
            "k3d.server.api.hostIP": config["kubeAPI"]["hostIP"],
            "k3d.server.api.port": config["kubeAPI"]["hostPort"],
        }
        for item in config["options"]["runtime"]["labels"]:
            key, _, value = item["label"].partition("=")
            labels[key] = value
        balanced = not config["options"]["k3d"]["disableLoadbalancer"]
        roles = [("server", n) for n in range(config["servers"])]
        roles += [("agent", n) for n in range(config["agents"])]
        nodes = [self._new_node(config, labels, network, *role) for role in roles]
        front = nodes[0]
        if balanced:
            front = {
                **nodes[0],
                "name": f"k3d-{name}-serverlb",
                "role": "loadbalancer",
                "labels": {**labels, "k3d.role": "loadbalancer"},
                "binds": [],
                "cmd": [],
                "ports": {},
            }
            nodes.append(front)
        api = {"HostIp": config["kubeAPI"]["hostIP"], "HostPort": config["kubeAPI"]["hostPort"]}
        front["ports"]["6443"] = [api]
        for item in config["ports"]:
            bind, host_port, inside = item["port"].split(":")
            bound = {"HostIp": bind, "HostPort": host_port}
            front["ports"].setdefault(inside, []).append(bound)
        for number, node in enumerate(nodes):
            node["address"] = f"172.30.0.{number + 2}"
            node["status"] = "created"
            node["env"] = [f"K3S_TOKEN={token}"]
            node["layer"] = {}
            node["id"] = self._random(f"{node['name']} {made}")
        endpoints = {*there.get("endpoints", []), *(node["name"] for node in nodes)}
        self.docker_world.put(f"network/{network}", {**there, "endpoints": sorted(endpoints)})
        host = config["kubeAPI"]["hostIP"].replace("0.0.0.0", "127.0.0.1")
        cluster = {
            "name": name,
            "state": "stopped",
            "ca": self._certificate(f"CA {name} {made}"),
            "certificate": self._certificate(f"client certificate {name} {made}"),
            "key": self._certificate(f"client key {name} {made}"),
            "server": f"https://{host}:{config['kubeAPI']['hostPort']}",
            "image": config["image"],
            "created": _utc(self.now()),
            "nodes": nodes,
        }
        self.world.put(f"clusters/{name}", cluster)
        for node in [] if cut_off else nodes:
            self._k3d_starts(cluster, node)
        return cluster

    def _k3d_starts(self, cluster: Object, node: Object) -> None:
        node["layer"] = {_ENTRYPOINT: "#!/bin/sh\n", **node.get("layer", {})}
        self._start(cluster, node)

    def certificate(self, what: str) -> str:
        """A made-up certificate or key, base64 of PEM."""
        return self._certificate(what)

    def _certificate(self, what: str) -> str:
        if "key" in what:
            return base64.b64encode(
                _pem("EC PRIVATE KEY", self._random(what).encode()).encode()
            ).decode()
        # Of no rehearsal's age, so that it never ends in one.
        return made_up_certificate(self._random(what), "20200101000000Z", "21200101000000Z")

    def _new_node(
        self, config: Object, labels: Object, network: str, role: str, number: int
    ) -> Object:
        def wanted(item: Object) -> bool:
            filters = item["nodeFilters"]
            return f"{role}:*" in filters or f"{role}:{number}" in filters

        arguments = [i["arg"] for i in config["options"]["k3s"]["extraArgs"] if wanted(i)]
        if role == "server":
            if config["servers"] > 1 and number == 0:
                arguments.append("--cluster-init")
            arguments += ["--tls-san", labels["k3d.server.api.host"]]
        return {
            "name": f"k3d-{config['metadata']['name']}-{role}-{number}",
            "role": role,
            "image": config["image"],
            "labels": {**labels, "k3d.role": role},
            "cmd": [role, *arguments],
            "binds": [item["volume"] for item in config["volumes"] if wanted(item)],
            "ports": {},
            "network": network,
        }

    def _k3d_start(self, words: list[str]) -> Ran:
        _, (name,) = _options(words)
        cluster = self.world.get(f"clusters/{name}")
        if cluster is None:
            return _failed("FATA[0000] No nodes found for given cluster")
        for node in cluster["nodes"]:
            if self._status(cluster, node) != "running":
                self._k3d_starts(cluster, node)
        return _done(f"INFO[0000] Started cluster '{name}'\n")

    def _k3d_delete(self, words: list[str]) -> Ran:
        _, (name,) = _options(words)
        cluster = self.world.get(f"clusters/{name}")
        nodes = (cluster or {}).get("nodes", [])
        for node, one in [
            (n, one) for n in nodes for one in (n["network"], *n.get("attached", []))
        ]:
            key = f"network/{one}"
            network = self.docker_world.get(key)
            if network:
                left = [one for one in network.get("endpoints", []) if one != node["name"]]
                own = {"label": "app", "value": "k3d"} in (network.get("labels") or [])
                if own and not left:
                    self.docker_world.delete(key)
                else:
                    self.docker_world.put(key, {**network, "endpoints": left})
        volumes = self.setting("volumes.json", [])
        self.set("volumes.json", [one for one in volumes if one != f"k3d-{name}-images"])
        self.world.delete(f"clusters/{name}")
        return _done(f"INFO[0000] Successfully deleted cluster {name}!\n")

    # git

    def _git(self, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        if words[:2] != ["ls-remote", "--"] or env.get("GIT_TERMINAL_PROMPT") != "0":
            raise _Usage("not ls-remote --, or with a terminal prompt")
        repository, *patterns = words[2:]
        known = self.setting("git.json", {}).get(repository)
        if known is None:
            branch = next((one for one in patterns if one.startswith("refs/heads/")), patterns[0])
            commit = hashlib.sha1(f"{repository} {branch}".encode()).hexdigest()
            print(f"rehearsal: made up commit {commit} of {repository} {branch}", file=sys.stderr)
            return _done(f"{commit}\t{branch}\n")
        if known.get("unreachable"):
            host = urlsplit(repository).hostname or repository
            return _failed(f"fatal: unable to access: Could not resolve host: {host}", 128)
        refs = known.get("refs", {})
        return _done("".join(f"{refs[one]}\t{one}\n" for one in patterns if one in refs))

    # tar and rm

    def _tar(self, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        flags = ["--create", "--compare", "--list", "--xattrs", "--acls", "--numeric-owner"]
        flags += ["--extract", "--same-owner", "--same-permissions", "--append"]
        left_out = ("--exclude=./db", "--exclude=*.sock")
        without = [word for word in words if word in left_out]
        words = [word for word in words if word not in left_out]
        options, operands = _options(words, flags, ["--file", "--directory"])
        file = options.get("--file", "")
        if "--create" in options and operands == ["."]:
            tree = self._tree(options["--directory"])
            if without:
                tree = [one for one in tree if not one[0].startswith("db/")]
            self.write_atomic(file, _archive(tree), 0o600)
            return _done()
        if "--append" in options and operands == ["./db"]:
            with tarfile.open(fileobj=io.BytesIO(self.read(file))) as archive:
                held = ((one, archive.extractfile(one)) for one in archive.getmembers())
                tree = [(one.name, data.read()) for one, data in held if data]
            tree += self._tree(options["--directory"])
            self.write_atomic(file, _archive(sorted(tree)), 0o600)
            return _done()
        if "--compare" in options and not operands:
            same = self.read(file) == _archive(self._tree(options["--directory"]))
            return _done() if same else _failed("tar: contents differ")
        if {"--extract", "--directory", "--same-owner"} <= options.keys() and not operands:
            with tarfile.open(fileobj=io.BytesIO(self.read(file))) as archive:
                for member in archive:
                    held = archive.extractfile(member)
                    path = f"{options['--directory']}/{member.name}"
                    self.make_directory(os.path.dirname(path), 0o700)
                    self.write_atomic(path, held.read() if held else b"", 0o600)
            return _done()
        if "--list" in options and not operands:
            with tarfile.open(fileobj=io.BytesIO(self.read(file))) as archive:
                return _done("".join(f"{name}\n" for name in archive.getnames()))
        raise _Usage("neither --create with ., nor --compare, --extract or --list")

    def _rm(self, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        options, (path,) = _options(words, ["-r", "-f"])
        if "-r" in options and "-f" in options:
            shutil.rmtree(self._file(path), ignore_errors=True)
        else:
            self._file(path).unlink()
        return _done()

    def _link(self, words: list[str]) -> Ran:
        options, (target, path) = _options(words, ["--symbolic", "--force"])
        self.make_directory(os.path.dirname(path), 0o755)
        if "--force" in options:
            self._file(path).unlink(missing_ok=True)
        self._file(path).symlink_to(self._file(target))
        tools = self.setting("missing-tools.json", [])
        self.set("missing-tools.json", [one for one in tools if one != os.path.basename(path)])
        return _done()

    def _journal(self, words: list[str]) -> Ran:
        values = ["--unit", "--lines", "--output"]
        options, _ = _options(words, ["--no-pager"], values)
        return _done(self.setting("journal.json", {}).get(options["--unit"], ""))

    # kubectl

    def _host_kubectl(self, words: list[str], input: bytes, env: Mapping[str, str]) -> Ran:
        match words:
            case [kubeconfig, "--request-timeout=30s", *rest] if kubeconfig.startswith(
                "--kubeconfig="
            ):
                text = self.read(kubeconfig.partition("=")[2]).decode()
            case _:
                raise _Usage("kubectl without --kubeconfig and --request-timeout")
        server = re.search(r"server: (\S+)", text)
        ca = re.search(r"certificate-authority-data: (\S+)", text)
        port = urlsplit(server.group(1)).port if server else None
        for cluster in self.clusters():
            if port and self._publishes(cluster, port) and self._is_open(cluster):
                if ca and ca.group(1) == cluster["ca"]:
                    return self._kubectl(rest, input, cluster)
                return _failed(
                    "Unable to connect to the server: tls: failed to verify certificate: "
                    "x509: certificate signed by unknown authority"
                )
        if server:
            parts = urlsplit(server.group(1))
            k3s = self.k3s.at(parts.hostname or "", parts.port or 6443)
            if parts.hostname == "127.0.0.1":
                k3s = self.k3s.own()
            if k3s and self.k3s.answers(k3s) and ca and ca.group(1) == k3s["ca"]:
                return self.k3s.kubectl(k3s, rest, input)
        for _, cluster in self.world.list("existing"):
            if server is None or server.group(1) != cluster["server"]:
                continue
            address = urlsplit(cluster["server"]).netloc
            if cluster["state"] != "running":
                return _failed(f"Unable to connect to the server: dial tcp {address}: i/o timeout")
            if ca and ca.group(1) == cluster["ca"]:
                return self._kubectl(rest, input, cluster)
            return _failed(
                "Unable to connect to the server: tls: failed to verify certificate: "
                "x509: certificate signed by unknown authority"
            )
        return _failed(
            f"The connection to the server 127.0.0.1:{port} was refused - did you specify the "
            "right host or port?"
        )

    def _kubectl(self, words: list[str], input: bytes, cluster: Object) -> Ran:
        return self.kubectl_of(cluster["ca"], words, input)

    def kubectl_of(self, ca: str, words: list[str], input: bytes) -> Ran:
        """kubectl on the cluster of a CA (base64)."""
        if words[0] == "exec":
            return self.in_pod(words[1:], input)
        # Only what reaches a cluster needs its API server, which is slow to load.
        from rehearsal.kubectl import Kubectl

        return Kubectl(self.above, ca, self.now(), self.setting("pods.json", {})).run(words, input)


_NODE_NAME = re.compile(r"-(server-\d+|agent-\d+|serverlb)$")


def _image_id(image: str) -> str:
    return "sha256:" + hashlib.sha256(image.encode()).hexdigest()


_KEYS = {
    "kubernetes.io/dockerconfigjson": [".dockerconfigjson"],
    "kubernetes.io/tls": ["tls.crt", "tls.key"],
    "kubernetes.io/basic-auth": ["username", "password"],
    "kubernetes.io/ssh-auth": ["ssh-privatekey"],
}
_CONFIG_KEYS: Object = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "servers": int,
    "agents": int,
    "image": str,
    "network": str,
    "subnet": str,
    "token": str,
    "kubeAPI": {"host": str, "hostIP": str, "hostPort": str},
    "volumes": [{"volume": str, "nodeFilters": [str]}],
    "ports": [{"port": str, "nodeFilters": [str]}],
    "options": {
        "k3d": {"wait": bool, "disableLoadbalancer": bool},
        "k3s": {"extraArgs": [{"arg": str, "nodeFilters": [str]}]},
        "runtime": {"labels": [{"label": str, "nodeFilters": [str]}]},
    },
}
"""The part of k3d's config schema (pkg/config/v1alpha5/schema.json) that hostctl uses."""


def _check_config(config: Object) -> None:
    """Refuses what `k3d cluster create` 5.8 refuses."""
    _check_keys(config, _CONFIG_KEYS, "config")
    if "$" in json.dumps(config):
        raise _Usage("config: k3d expands $ in its config file")
    if config.get("apiVersion") != "k3d.io/v1alpha5" or config.get("kind") != "Simple":
        raise _Usage("config: another apiVersion or kind")
    if "network" in config and "subnet" in config:
        raise _Usage("cannot specify subnet for exiting network")
    single = config["options"]["k3d"]["disableLoadbalancer"]
    for port in config["ports"]:
        if single and not all(one.endswith(":direct") for one in port["nodeFilters"]):
            raise _Usage("port-mapping of type 'proxy' specified, but loadbalancer is disabled")
    for item in [*config["volumes"], *config["options"]["k3s"]["extraArgs"]]:
        if any(one.startswith("agent") for one in item["nodeFilters"]) and not config["agents"]:
            raise _Usage("node filter for agents in a cluster without any")


def _check_keys(value: Any, shape: Any, path: str) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, dict) or set(value) - set(shape):
            raise _Usage(f"{path}: keys {sorted(set(value) - set(shape))} are not allowed")
        for key, inner in value.items():
            _check_keys(inner, shape[key], f"{path}.{key}")
    elif isinstance(shape, list):
        for item in value:
            _check_keys(item, shape[0], path)
    elif not isinstance(value, shape):
        raise _Usage(f"{path}: not {shape.__name__}")


_DOWNLOADED = b"made-up download with the sha256 "


def made_up_certificate(subject: str, begins: str, ends: str) -> str:
    """What a kubeconfig holds of a certificate: base64 of PEM. Only its validity can be read.

    begins, ends: GeneralizedTime (YYYYMMDDHHMMSSZ).
    """
    serial, name = _der(0x02, bytes.fromhex(subject[:16])), _der(0x0C, subject.encode())
    version, algorithm = _der(0xA0, _der(0x02, b"\x02")), _der(0x30, b"")
    times = _der(0x18, begins.encode()) + _der(0x18, ends.encode())
    body = version + serial + algorithm + _der(0x30, name) + _der(0x30, times)
    signed = _der(0x30, _der(0x30, body) + algorithm)
    return base64.b64encode(_pem("CERTIFICATE", signed).encode()).decode()


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else b"\x82" + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def _pem(kind: str, content: bytes) -> str:
    """A PEM block that parses; what is in it is made up."""
    body = base64.b64encode(content).decode()
    return f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n"


def _archive(files: Iterable[tuple[str, bytes]]) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return held.getvalue()


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
