"""What tests/cluster runs on: a Docker engine, k3d, and the root file system of a stand-in node.

Taken from PATH where it is there in a suitable version, else as users have it, else from package
registries: Go modules pinned in setup/k3d, setup/backup and tests/cluster/node, and Debian
packages, which are unpacked into the cache and never installed, since a test changes nothing of the
system.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setup import cache, debian, download, tools
from setup.cache import SetupError, say
from setup.tools import CHECKOUT, HERE, Tool

K3D = Tool("k3d", "5.8.3", at_least=(5, 8), below=(6,))
NODE = CHECKOUT / "tests" / "cluster" / "node"
COMPONENTS = {
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "kine": "github.com/k3s-io/kine",
    "etcd": "go.etcd.io/etcd/server/v3",
    "kwok": "sigs.k8s.io/kwok/cmd/kwok",
    "coredns": "github.com/coredns/coredns",
}
BACKUP = {
    "restic": "github.com/restic/restic/cmd/restic",
    "versitygw": "github.com/versity/versitygw/cmd/versitygw",  # an S3 server
}
_IPTABLES = [
    "iptables",
    "libip4tc2",
    "libip6tc2",
    "libxtables12",
    "libmnl0",
    "libnftnl11",
    "libnfnetlink0",
    "libnetfilter-conntrack3",
]
_ENGINE_PACKAGES = ["docker.io", "containerd", "runc", "tini", *_IPTABLES]
# What PostgreSQL is run with, of all that Debian's would be installed with: no Perl, no compiler.
_POSTGRES_PACKAGES = re.compile(r"postgresql-(client-)?\d+|tzdata|zlib1g|lib(?!llvm|z3|.*perl).*")
_NODE_PACKAGES = ["busybox-static", "libc6", "libc-bin", *_IPTABLES]


@dataclass(frozen=True)
class Rig:
    """Directories that tests/cluster uses: `first` is to be on PATH before all others, `last` has
    what PATH lacks of a Docker engine."""

    first: list[Path]
    last: Path
    node_root: Path
    postgres: Path
    """The root file system of PostgreSQL's image."""


def refusal() -> str | None:
    """Why no Docker engine can be started on this machine at all; None when one can."""
    if platform.system() != "Linux":
        return f"Docker engines start on Linux, not on {platform.system()}"
    if os.geteuid() != 0:
        return "starting a Docker engine needs root"
    lacking = [name for name in ("unshare", "nsenter", "setpriv", "ip") if not shutil.which(name)]
    return f"not on PATH: {', '.join(lacking)} (util-linux, iproute2)" if lacking else None


def resolve() -> Rig:
    """Everything that tests/cluster needs, made where it is absent. Raises SetupError."""
    if reason := refusal():
        raise SetupError(reason)
    ways = {"release": _k3d_release, "Go module": _k3d_go}
    k3d = tools.resolve(K3D, "version", ways, may_install=True)
    engine = _engine()
    components = _go_programs(
        "node-components", NODE, COMPONENTS, ["go.mod", "go.sum"], "building them takes 10 minutes"
    )
    versioned = _go_programs(
        "versioned",
        NODE,
        {name: COMPONENTS[name] for name in ("kubectl", "kube-apiserver")},
        ["go.mod"],
        "those that say which version they are",
        _versioned(),
    )
    stand_in = _go_programs(
        "node-k3s", NODE, {"k3s": "./k3s"}, ["go.mod", "go.sum", "k3s"], "the stand-in for k3s"
    )
    backup = _go_programs(
        "backup-tools", HERE / "backup", BACKUP, ["go.mod", "go.sum"], "restic and an S3 server"
    )
    root = cache.install(
        f"node-root-{_debian()}-{_digest(stand_in.name)}",
        lambda directory: _node_root(directory, [components, versioned], stand_in),
    )
    postgres = cache.install(
        f"postgres-{_debian()}-{_digest(_POSTGRES_PACKAGES.pattern)}", _postgres_root
    )
    path = [k3d.directory, versioned / "bin", components / "bin", backup / "bin"]
    return Rig(path, engine / "bin", root / "root", postgres / "root")


def _k3d_release(directory: Path) -> str:
    _, processor = download.machine()
    processor = {"x86_64": "amd64", "aarch64": "arm64"}.get(processor, processor)
    base = f"https://github.com/k3d-io/k3d/releases/download/v{K3D.version}"
    url = f"{base}/k3d-linux-{processor}"
    download.program(url, f"{base}/checksums.txt", directory / "k3d")
    return f"official release ({url})"


def _k3d_go(directory: Path) -> str:
    module = "github.com/k3d-io/k3d/v5"
    flags = f"-X {module}/version.Version=v{K3D.version}"
    tools.go_build("k3d", HERE / "k3d", {directory / "k3d": module}, flags, static=True)
    return f"built from the Go module {module}"


def _versioned() -> str:
    """The linker's flags for programs that say which they are: hostctl refuses a kubectl, and an
    agent's API server, that does not."""
    pinned = (NODE / "go.mod").read_text().partition("k8s.io/kubernetes v")[2].split()[0]
    major, minor, _ = pinned.split(".")
    version = {"gitVersion": f"v{pinned}", "gitMajor": major, "gitMinor": minor}
    return " ".join(f"-X k8s.io/component-base/version.{key}={v}" for key, v in version.items())


def _go_programs(
    name: str,
    module: Path,
    programs: dict[str, str],
    sources: list[str],
    hint: str,
    flags: str = "",
) -> Path:
    """The cache's directory whose bin/ has programs built from a go.mod of the project's own."""
    files = [module / source for source in sources]
    content = b"".join(
        file.read_bytes()
        for path in files
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file()
    )

    def make(directory: Path) -> str:
        say(f"{name}: {hint}")
        wanted = {directory / "bin" / program: package for program, package in programs.items()}
        # Left for those that are built from the same modules next.
        tools.go_build(name, module, wanted, flags, static=True, keep=True)
        return f"built from {module.relative_to(CHECKOUT)}/go.mod"

    return cache.install(f"{name}-{_digest(content.decode())}", make)


def _engine() -> Path:
    """The cache's directory whose bin/ has dockerd and what it runs, as far as PATH lacks it."""
    if shutil.which("dockerd"):
        return cache.install("docker-engine-none", lambda directory: _nothing(directory))
    return cache.install(f"docker-engine-{_debian()}", _unpack_engine)


def _nothing(directory: Path) -> str:
    (directory / "bin").mkdir()
    return "dockerd is on PATH"


def _unpack_engine(directory: Path) -> str:
    root = directory / "root"
    debian.unpack("Docker engine", _ENGINE_PACKAGES, root)
    final = cache.root() / directory.name.lstrip(".").rpartition("-")[0] / "root"
    commands = directory / "bin"
    commands.mkdir()
    for folder in ("usr/sbin", "usr/bin", "sbin", "bin"):
        for program in sorted((root / folder).glob("*")):
            command = commands / program.name
            filters = program.name.startswith(("ip6tables", "iptables", "xtables"))
            if not filters and not command.is_symlink():
                command.symlink_to(final / folder / program.name)
    library = next(iter(sorted((root / "usr/lib").glob("*-linux-gnu*"))))
    libraries = final / library.relative_to(root)
    flavour = _iptables_flavour(root, library)
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            (commands / f"{name}{suffix}").write_text(
                f"#!/bin/sh\nexport LD_LIBRARY_PATH={libraries}\n"
                f"export XTABLES_LIBDIR={libraries}/xtables\n"
                f'exec {final}/usr/sbin/xtables-{flavour}-multi {name}{suffix} "$@"\n'
            )
            (commands / f"{name}{suffix}").chmod(0o755)
    return f"Debian packages, iptables by {flavour}"


def _iptables_flavour(root: Path, library: Path) -> str:
    """Which of the two ways into the kernel's packet filter works here."""
    libraries = dict(os.environ, LD_LIBRARY_PATH=str(library), XTABLES_LIBDIR=f"{library}/xtables")
    for flavour in ("nft", "legacy"):
        command = [str(root / f"usr/sbin/xtables-{flavour}-multi"), "iptables", "--table", "nat"]
        tried = subprocess.run(
            ["unshare", "--net", *command, "--append", "POSTROUTING", "--jump", "MASQUERADE"],
            env=libraries,
            capture_output=True,
            text=True,
        )
        if tried.returncode == 0:
            return flavour
    raise SetupError(f"the kernel's packet filter cannot be used: {tried.stderr.strip()}")


def _node_root(directory: Path, components: list[Path], stand_in: Path) -> str:
    """The root file system of the stand-in node: Debian's busybox, glibc and iptables, and ours."""
    root = directory / "root"
    debian.unpack("node", _NODE_PACKAGES, root)
    for folder in ("bin", "sbin", "usr/lib/k3s", "etc", "tmp", "var/log", "run", "proc", "sys"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("usr/share/doc", "usr/share/man", "usr/lib/locale"):
        shutil.rmtree(root / folder, ignore_errors=True)
    busybox = root / "bin" / "busybox"
    listed = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True)
    for applet in listed.stdout.split():
        if not any((root / place / applet).exists() for place in ("bin", "sbin", "usr/sbin")):
            (root / "bin" / applet).symlink_to("busybox")
    library = next(iter(sorted((root / "usr/lib").glob("*-linux-gnu*"))))
    flavour = _iptables_flavour(root, library)
    for name in ("iptables", "ip6tables"):
        for suffix in ("", "-save", "-restore"):
            link = root / "usr/sbin" / f"{name}{suffix}"
            link.unlink(missing_ok=True)
            link.symlink_to(f"xtables-{flavour}-multi")
    for place in components:
        for program in sorted((place / "bin").iterdir()):
            shutil.copy2(program, root / "usr/lib/k3s" / program.name)
    shutil.copy2(stand_in / "bin" / "k3s", root / "bin" / "k3s")
    for name in ("kubectl", "crictl", "ctr"):
        (root / "bin" / name).symlink_to("k3s")
    for name, content in {
        "passwd": "root:x:0:0:root:/root:/bin/sh\n",
        "group": "root:x:0:\n",
        "nsswitch.conf": "hosts: files dns\n",
    }.items():
        (root / "etc" / name).write_text(content)
    return "Debian packages and the project's Go modules"


def _postgres_root(directory: Path) -> str:
    """PostgreSQL's programs in /bin, a user who may run them, and busybox for a shell."""
    root = directory / "root"
    needed = debian.needed("PostgreSQL", "postgresql")
    packages = [name for name in needed if _POSTGRES_PACKAGES.fullmatch(name)]
    debian.unpack("PostgreSQL", [*packages, "busybox-static"], root)
    for folder in ("bin", "etc", "tmp", "dev", "proc", "run/postgresql", "var/lib/postgresql"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / folder, ignore_errors=True)
    for program in sorted(root.glob("usr/lib/postgresql/*/bin/*")):
        (root / "bin" / program.name).symlink_to(f"/{program.relative_to(root)}")
    for applet in ("sh", "su"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "var/run").symlink_to("/run")
    users = "root:x:0:0:root:/root:/bin/sh\npostgres:x:999:999::/var/lib/postgresql:/bin/sh\n"
    (root / "etc/passwd").write_text(users)
    (root / "etc/group").write_text("root:x:0:\npostgres:x:999:\n")
    return "Debian packages"


def _debian() -> str:
    """Names what packages would be had: "debian-12-amd64"."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    name = release.get("ID", "linux"), release.get("VERSION_ID", "0"), platform.machine()
    return "-".join(name)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
