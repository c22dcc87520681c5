"""A Docker engine of the test's own, on a machine that a run makes and takes away.

Everything happens in namespaces of one process: network (bridges, published ports and addresses
disturb nothing, and a test adds and removes addresses), mounts (what is written to /etc, /mnt,
/var/lib and /run is gone in the end), and processes (when their first one ends, the kernel ends
dockerd, containerd and every container with it, whatever became of the test).
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from setup.cluster import Rig

NODE_IMAGE = "rancher/k3s:v1.31.5-k3s1"
"""The stand-in's name in the engine: the image that p510 declares."""
CLUSTER_SPEC: dict[str, Any] = {
    "name": "factory",
    "image": NODE_IMAGE,
    "servers": 1,
    "agents": 0,
    "disable": ["traefik", "servicelb"],
    "api": {"bind": "127.0.0.1", "port": 6443, "server_name": None},
    "resolvers": ["1.1.1.1", "9.9.9.9"],
    "storage_dir": "/mnt/img_pool/k3d/storage",
    "datastore_dir": "/mnt/img_pool/k3d/storage-server",
    "network": {"name": "k3d-factory", "subnet": "172.30.0.0/16"},
    "api_wait_seconds": 120,
}
"""p510's cluster as hostctl takes it; its storage directory may be a small disk's."""

# k3d's own images, which the stand-in also plays.
_HELPERS = {
    "ghcr.io/k3d-io/k3d-tools:5.8.3": "k3d-tools",
    "ghcr.io/k3d-io/k3d-proxy:5.8.3": "k3d-proxy",
}
# As the image of k3s is; the version is the one that its tag names.
_IMAGE = """FROM node
RUN echo -n {version} > /etc/k3s-version
VOLUME /var/lib/kubelet /var/lib/rancher/k3s /var/lib/cni /var/log
ENTRYPOINT ["/bin/k3s"]
CMD ["agent"]
"""
_CHANGED = ("/etc", "/mnt", "/var/lib", "/root", "/usr/local")
_PREFIX = "homelab-engine-"
_CGROUPS = Path("/sys/fs/cgroup")
_START_SECONDS = 60

# The first process. It ignores SIGCHLD, so that the kernel buries what others leave to it.
_INIT = """
set -e
trap '' CHLD
mount --make-rprivate /
if ! mkdir -p {root}/docker {root}/changes || ! touch {root}/changes/probe; then exit 1; fi
for directory in {changed}; do
    [ -d $directory ] || continue
    upper={root}/changes/upper$directory work={root}/changes/work$directory
    mkdir -p $upper $work
    mount -t overlay overlay -o lowerdir=$directory,upperdir=$upper,workdir=$work $directory
done
mount -t tmpfs tmpfs /run
ip link set lo up
ip link add lan0 type bridge
ip address add 192.0.2.10/24 dev lan0
ip link set lan0 up
ip route add default via 192.0.2.1
sysctl -q -w net.ipv4.ip_forward=1 || echo 1 > /proc/sys/net/ipv4/ip_forward
: > {root}/ready
exec sleep infinity
"""

# What runc is told, without the capability that this machine lacks.
_RUNC = """#!/bin/sh
bundle=. process=
for word; do
    case $previous in --bundle|-b) bundle=$word;; --process|-p) process=$word;; esac
    previous=$word
done
for file in "$bundle/config.json" "$process"; do
    if [ -f "$file" ]; then
        sed -i -e 's/,"CAP_SYS_RESOURCE"//g' -e 's/"CAP_SYS_RESOURCE",//g' "$file"
    fi
done
exec {runc} "$@"
"""


class Engine:
    """One Docker engine with the stand-in's image, and the host around it.

    `start` and `stop` are those of dockerd; the host and its containers' files live until `close`.
    """

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        _sweep()
        self.root = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self.name = self.root.name
        search = [*map(str, rig.first), os.environ["PATH"], "/usr/sbin", "/sbin", str(rig.last)]
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(search),
            "HOME": str(self.root / "home"),
        }
        for name in ("DOCKER_HOST", "DOCKER_CONTEXT", "KUBECONFIG"):
            self.environment.pop(name, None)
        self._files: list[IO[bytes]] = []
        fcntl.flock(self._log("lock"), fcntl.LOCK_EX)
        self._outer: subprocess.Popen[bytes] | None = None
        self._daemon: subprocess.Popen[bytes] | None = None
        self._resolver: subprocess.Popen[bytes] | None = None
        self.init = 0
        """The first process of the host, as this machine numbers it."""

    # The host

    def open(self) -> None:
        """Make the host. Raises RuntimeError with the cause."""
        (self.root / "home").mkdir()
        script = self.script()
        # The host ends with this process, even when that is killed.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid"]
        command += ["--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", script]
        log = self._log("host.log")
        self._outer = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        until = time.monotonic() + _START_SECONDS
        while not (self.root / "ready").exists():
            if self._outer.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the host did not start: {self.log('host.log')}")
            time.sleep(0.02)
        self.init = int(children.read_text().split()[0])
        self._write_runtime()

    def script(self) -> str:
        """What makes a host of the first process' namespaces."""
        return _INIT.format(root=self.root, changed=" ".join(_CHANGED))

    def close(self) -> None:
        """End everything and remove it. Does nothing for what was never begun."""
        if self._outer is not None:
            if self.init:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.init, signal.SIGKILL)
            self._outer.kill()
            self._outer.wait()
            self._outer = None
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None
        self.kill_resolver()
        for file in self._files:
            file.close()
        _remove(self.root)

    def add_address(self, address: str) -> None:
        """An interface of the host gets the address ("203.0.113.5")."""
        self.run(["ip", "address", "add", f"{address}/32", "dev", "lan0"])

    def remove_address(self, address: str) -> None:
        self.run(["ip", "address", "delete", f"{address}/32", "dev", "lan0"])

    def resolver(self, addresses: Sequence[str], names: Mapping[str, str]) -> None:
        """Runs a DNS server on addresses that the host gets, which knows these names; every other
        name does not exist. It runs until the host ends, or `kill_resolver`."""
        self.kill_resolver()
        for address in addresses:
            self.run(["ip", "address", "replace", f"{address}/32", "dev", "lan0"])
        zone = self.root / "zone"
        known = "".join(f"{name}. 60 IN A {address}\n" for name, address in names.items())
        zone.write_text(f". 60 IN SOA ns. admin. 1 60 60 60 60\n. 60 IN NS ns.\n{known}")
        file = self.root / "Corefile"
        file.write_text(f".:53 {{\n    bind {' '.join(addresses)}\n    file {zone} .\n}}\n")
        log = self._log("resolver.log")
        self._resolver = self.popen(["coredns", "-conf", str(file)], stdout=log, stderr=log)

    def kill_resolver(self) -> None:
        if self._resolver is not None:
            self._resolver.kill()
            self._resolver.wait()
            self._resolver = None

    # Programs on the host

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Starts a program on the host. Killing what this returns is a kill -9 of that program, and
        of no other that it started."""
        environment = {**self.environment, **options.pop("env", {})}
        command = [*self.enter(options.pop("cwd", None)), *argv]
        return subprocess.Popen[bytes](command, env=environment, **options)

    def enter(self, where: str | Path | None = None) -> list[str]:
        """The words before a command that run it on the host, in a directory."""
        enter = ["nsenter", f"--target={self.init}", "--mount", "--net", "--pid"]
        enter += [f"--wd={where}"] if where else []
        return [*enter, "--", "setpriv", "--pdeathsig", "KILL"]

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str = "",
        timeout: float = 300,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on the host. With `check` a failure is an AssertionError that shows what
        it said."""
        pipe = subprocess.PIPE
        child = self.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, env=env or {}, cwd=cwd)
        try:
            out, err = child.communicate(input.encode(), timeout)
        except BaseException:
            child.kill()
            child.communicate()
            raise
        done = subprocess.CompletedProcess(
            list(argv), child.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(argv)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def docker(self, *words: str, **options: Any) -> str:
        """What a docker command prints."""
        return self.run(["docker", *words], **options).stdout.strip()

    # dockerd

    def start(self) -> None:
        """Starts dockerd, as at a boot, and waits until it answers."""
        if self._daemon is not None and self._daemon.poll() is None:
            return
        log = self._log("dockerd.log")
        # A pid file of one that was killed may name another process now.
        self.run(["rm", "-f", "/run/docker.pid", "/run/docker/containerd/containerd.pid"])
        self._daemon = self.popen(
            [
                "dockerd",
                f"--data-root={self.root}/docker",
                "--exec-root=/run/docker",
                "--pidfile=/run/docker.pid",
                "--host=unix:///run/docker.sock",
                f"--cgroup-parent=/{self.name}",
                "--exec-opt=native.cgroupdriver=cgroupfs",
                "--oom-score-adjust=0",
                f"--add-runtime=capable={self.root}/runc",
                "--default-runtime=capable",
            ],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        until = time.monotonic() + _START_SECONDS
        while self.run(["docker", "version"], check=False).returncode:
            if self._daemon.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"dockerd did not start: {self.log('dockerd.log')}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Stops dockerd and its containers, as at a shutdown."""
        self._signal("TERM")

    def kill(self) -> None:
        """kill -9 of dockerd and its containerd; containers' processes go on, as they do."""
        self._signal("KILL")

    def restart(self) -> None:
        self.stop()
        self.start()

    def _signal(self, name: str) -> None:
        if self._daemon is None:
            return
        script = 'kill -$1 "$(cat /run/docker.pid)"; '
        if name == "KILL":
            script += 'kill -$1 "$(cat /run/docker/containerd/containerd.pid)" || true'
        self.run(["sh", "-c", script, "sh", name])
        self._daemon.wait(120)
        self._daemon = None

    def load_images(self) -> None:
        """The stand-in's image under the names of k3s and of k3d's helpers."""
        archive = self.popen(
            ["tar", "-C", str(self.rig.node_root), "-c", "."], stdout=subprocess.PIPE
        )
        load = self.popen(
            ["docker", "import", "--change", "ENV PATH=/bin:/sbin:/usr/bin:/usr/sbin", "-", "node"],
            stdin=archive.stdout, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        assert archive.stdout
        archive.stdout.close()
        if load.wait() or archive.wait():
            raise RuntimeError("the node's image could not be imported")
        version = NODE_IMAGE.rpartition(":")[2].replace("-", "+", 1)
        self.build(NODE_IMAGE, _IMAGE.format(version=version))
        for image, role in _HELPERS.items():
            self.build(image, f'FROM node\nENTRYPOINT ["/bin/k3s", "{role}"]\n')

    def build(self, tag: str, dockerfile: str) -> None:
        """Builds an image from the text of a Dockerfile."""
        environment = {"DOCKER_BUILDKIT": "0"}
        self.run(["docker", "build", "-t", tag, "-"], input=dockerfile, env=environment)

    def clusters(self) -> list[str]:
        """Names of the k3d clusters that are there."""
        listed = self.docker("ps", "-a", "--format", '{{.Label "k3d.cluster"}}')
        return sorted(set(listed.split()))

    @contextlib.contextmanager
    def events(self) -> Iterator["Events"]:
        """What dockerd does, from now on."""
        row = "{{.Type}} {{.Action}}\t{{.Actor.ID}}\t{{.Actor.Attributes.name}}"
        # Since now: what happens before the question has reached dockerd is told too.
        argv = ["docker", "events", f"--since={time.time():.9f}", "--format", row]
        following = self.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            yield Events(following)
        finally:
            following.kill()
            following.communicate()

    def clean(self) -> None:
        """Removes all containers, networks and volumes, what was written on the host, and the
        resolver."""
        self.kill_resolver()
        script = """
            docker ps -aq | xargs -r docker rm -fv >/dev/null
            docker network prune -f >/dev/null
            docker volume ls -q | xargs -r docker volume rm -f >/dev/null
            rm -rf /var/lib/homelab /mnt/* /etc/k3d
        """
        self.run(["sh", "-c", script])

    # Diagnosis

    def log(self, name: str) -> str:
        """The end of a log: host.log, dockerd.log, resolver.log."""
        path = self.root / name
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""

    def _log(self, name: str) -> IO[bytes]:
        file = (self.root / name).open("ab")
        self._files.append(file)
        return file

    def _write_runtime(self) -> None:
        """The runtime: runc, where this machine lacks a capability told to do without."""
        bounding = int(_status("CapBnd"), 16)
        runc = shutil.which("runc", path=self.environment["PATH"]) or "runc"
        text = f'#!/bin/sh\nexec {runc} "$@"\n'
        if not bounding >> 24 & 1:  # CAP_SYS_RESOURCE
            text = _RUNC.format(runc=runc)
        (self.root / "runc").write_text(text)
        (self.root / "runc").chmod(0o755)


class Events:
    """The events of a dockerd."""

    def __init__(self, following: subprocess.Popen[bytes]) -> None:
        self._following = following

    def until(self, step: str) -> str:
        """Waits for the next event such as "container start" and returns the id of what it is
        about. k3d's helper containers do not count."""
        assert self._following.stdout
        for line in self._following.stdout:
            action, subject, name = line.decode().rstrip("\n").split("\t")
            if action == step and not name.endswith("-tools"):
                return subject
        raise AssertionError(f"dockerd ended before {step}")


def _remove(root: Path) -> None:
    """Removes the files and cgroups of an engine whose processes were ended."""
    until = time.monotonic() + 10
    while True:
        tops = [*_CGROUPS.glob(f"*/{root.name}"), *_CGROUPS.glob(root.name)]
        for top in tops:
            below = sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True)
            for group in [*below, top]:
                with contextlib.suppress(OSError):
                    group.rmdir()
        shutil.rmtree(root, ignore_errors=True)
        if not root.exists() and not any(top.exists() for top in tops):
            return
        if time.monotonic() > until:
            raise RuntimeError(f"left behind: {root} {[str(top) for top in tops if top.exists()]}")
        time.sleep(0.1)  # the kernel is still ending the last processes of the namespace


def _sweep() -> None:
    """Removes what test processes that were killed have left: nobody holds the lock of theirs."""
    for root in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (root / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(root)


def _status(key: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.split()[1]
    raise LookupError(key)


@contextlib.contextmanager
def engine(rig: Rig) -> Iterator[Engine]:
    """A started engine with its images, gone in the end."""
    one = Engine(rig)
    try:
        one.open()
        one.start()
        one.load_images()
        yield one
    finally:
        one.close()
