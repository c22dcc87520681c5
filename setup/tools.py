"""Where each tool comes from: PATH in a suitable version, the vendor's release, a registry.

The last is what a machine has that reaches package registries and no download site: uv is on PyPI,
the engine is a Go module (setup/go/go.mod pins it), and the language host, in no registry, is the
small one of this directory. A tool once installed in the cache is used from there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setup import cache, download
from setup.cache import SetupError, say

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent


@dataclass(frozen=True)
class Tool:
    """A program of a pinned version, and which other versions of it on PATH will do."""

    name: str
    version: str  # installed when there is no suitable one
    at_least: tuple[int, ...]
    below: tuple[int, ...]

    def suits(self, version: str) -> bool:
        """Whether a version as the program prints it ("v3.260.1", "uv 0.9.2 (...)") will do."""
        numbers = re.search(r"\d+(?:\.\d+)+", version)
        found = tuple(map(int, numbers[0].split("."))) if numbers else ()
        return self.at_least <= found < self.below

    @property
    def directory(self) -> str:
        """Its directory in the cache."""
        return f"{self.name}-{self.version}"


UV = Tool("uv", "0.13.8", at_least=(0, 8), below=(1,))
PULUMI = Tool("pulumi", "3.259.0", at_least=(3, 259), below=(4,))

OURS = b"# homelab's language host, for an engine that came without one"


@dataclass(frozen=True)
class Found:
    """A directory to have on PATH, which holds a tool, and why it was taken."""

    directory: Path
    why: str


def uv(may_install: bool = True) -> Found:
    """The directory of a suitable uv. Raises SetupError."""
    return resolve(UV, "--version", {"release": _uv_release, "PyPI": _uv_pypi}, may_install)


def pulumi(may_install: bool = True) -> Found:
    """The directory of a suitable engine, the command `pulumi`. Raises SetupError."""
    ways = {"release": _pulumi_release, "Go module": _pulumi_go}
    return resolve(PULUMI, "version", ways, may_install)


def language_host(engine: Found, uv: Found, may_install: bool = True) -> Found:
    """The directory of `pulumi-language-python`: the one that goes with the engine, else ours."""
    name = "pulumi-language-python"
    beside = engine.directory / name
    if beside.is_file() and OURS not in beside.read_bytes()[:200]:
        return Found(engine.directory, "beside the engine")
    if (path := shutil.which(name)) and OURS not in Path(path).read_bytes()[:200]:
        return Found(Path(path).parent, f"on PATH ({path})")
    source = (HERE / name).read_bytes()
    digest = hashlib.sha256(source + PULUMI.version.encode()).hexdigest()[:12]

    def make(directory: Path) -> str:
        python = directory / "python"
        uv_command = str(uv.directory / "uv")
        cache.run("language host", [uv_command, "venv", "--python", sys.executable, str(python)])
        install = [uv_command, "pip", "install", "--python", str(python / "bin" / "python")]
        cache.run("language host", [*install, f"pulumi=={PULUMI.version}"])
        (directory / "host.py").write_bytes(source)
        (directory / "bin").mkdir()
        return "the project's own, as the engine came without one"

    host = _cached(f"{name}-{digest}", make, may_install, name)
    # An engine of our cache gets it beside itself: it warns of a host that it finds on PATH.
    built = engine.directory.is_relative_to(cache.root())
    directory = engine.directory if built else host / "bin"
    command = b"#!/bin/sh\n%b\nexec '%b/python/bin/python' '%b/host.py' \"$@\"\n"
    cache.write(directory / name, command % (OURS, bytes(host), bytes(host)), mode=0o755)
    return Found(directory, cache.origin(host))


def _cached(name: str, make: Callable[[Path], str], may_install: bool, what: str) -> Path:
    directory = cache.root() / name
    if not directory.is_dir() and not may_install:
        raise SetupError(f"{what} is not set up yet; run `make setup`")
    return cache.install(name, make)


def resolve(
    tool: Tool, ask: str, ways: dict[str, Callable[[Path], str]], may_install: bool
) -> Found:
    """The directory of a suitable tool: on PATH, else installed in one of these ways, in order."""
    found = shutil.which(tool.name)
    version = _version(found, ask) if found else ""
    if found and tool.suits(version):
        # A shim or a link is run as it stands on PATH; it knows its own way.
        return Found(Path(found).parent, f"{version} on PATH ({found})")

    def make(directory: Path) -> str:
        unsuited = f"{version or 'one that does not run'} at {found}" if found else "not on PATH"
        say(f"{tool.name} {tool.version}: {unsuited}")
        failures = []
        for way, install in ways.items():
            work = directory / "bin"
            work.mkdir()
            try:
                said = install(work)
                if not tool.suits(_version(str(work / tool.name), ask)):
                    raise SetupError(f"what it gave does not run as {tool.name} {tool.version}")
                return said
            except SetupError as error:
                say(f"  {way}: {error}")
                failures.append(f"  {way}: {error}")
                shutil.rmtree(work)
        raise SetupError(
            f"{tool.name} could not be had. Either put {tool.name} >= {_dotted(tool.at_least)}, "
            f"< {_dotted(tool.below)} on PATH yourself, or mend one of:\n" + "\n".join(failures)
        )

    directory = _cached(tool.directory, make, may_install, tool.name)
    return Found(directory / "bin", f"{tool.version}, {cache.origin(directory)}")


def _version(command: str, ask: str) -> str:
    quiet = dict(os.environ, PULUMI_SKIP_UPDATE_CHECK="true")
    try:
        done = subprocess.run([command, ask], capture_output=True, text=True, timeout=30, env=quiet)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _uv_release(directory: Path) -> str:
    # The static one runs on NixOS, too.
    system, processor = download.machine()
    vendor = {"linux": "unknown-linux-musl", "darwin": "apple-darwin"}.get(system)
    processor = {"amd64": "x86_64", "arm64": "aarch64"}.get(processor, processor)
    name = f"uv-{processor}-{vendor}.tar.gz"
    url = f"https://github.com/astral-sh/uv/releases/download/{UV.version}/{name}"
    download.unpack(url, f"{url}.sha256", directory)
    return f"official release ({url})"


def _uv_pypi(directory: Path) -> str:
    # The wheel holds one self-contained program: it outlives the environment that it came by.
    venv = directory.with_name("venv")
    try:
        cache.run("uv", [sys.executable, "-m", "venv", str(venv)])
    except SetupError as error:
        raise SetupError(f"{error}\n(Debian: apt-get install python3-venv)") from error
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--only-binary", ":all:"]
    cache.run("uv", [*pip, f"uv=={UV.version}"])
    shutil.copy2(venv / "bin" / "uv", directory / "uv")
    shutil.rmtree(venv)
    return "from PyPI"


def _pulumi_release(directory: Path) -> str:
    system, processor = download.machine()
    processor = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(processor, processor)
    base = f"https://github.com/pulumi/pulumi/releases/download/v{PULUMI.version}"
    url = f"{base}/pulumi-v{PULUMI.version}-{system}-{processor}.tar.gz"
    download.unpack(url, f"{base}/pulumi-{PULUMI.version}-checksums.txt", directory)
    return f"official release ({url})"


def _pulumi_go(directory: Path) -> str:
    say("  building it takes about 3 minutes on two cores")
    module = "github.com/pulumi/pulumi"
    flags = f"-X {module}/sdk/v3/go/common/version.Version=v{PULUMI.version}"
    package = f"{module}/pkg/v3/cmd/pulumi"
    go_build("pulumi", HERE / "go", {directory / "pulumi": package}, flags)
    return f"built from the Go module {module}/pkg/v3"


def go() -> str:
    """The Go on PATH. Raises SetupError where there is none."""
    if found := shutil.which("go"):
        return found
    raise SetupError("go is not on PATH (any from 1.21 will do; it gets the one that it needs)")


def go_build(
    step: str,
    module: Path,
    programs: Mapping[Path, str],
    flags: str = "",
    *,
    static: bool = False,
    keep: bool = False,
) -> None:
    """Build programs from the packages that a go.mod pins; `static` ones need no libraries.

    Go's caches are kept until it succeeds, and after that with `keep`. Raises SetupError.
    """
    work = cache.root() / "go" / module.name  # an interrupted build goes on where it was
    build = [go(), "build", "-v", "-trimpath", "-mod=readonly", "-modcacherw", "-buildvcs=false"]
    caches = {"GOMODCACHE": str(work / "mod"), "GOCACHE": str(work / "build"), "GOWORK": "off"}
    environment = {**os.environ, **caches, **({"CGO_ENABLED": "0"} if static else {})}
    for target, package in programs.items():
        name = step if len(programs) == 1 else f"{step} {target.name}"
        command = [*build, "-ldflags", f"-s -w {flags}", "-o", str(target), package]
        cache.run(name, command, cwd=module, env=environment)
    if not keep:
        shutil.rmtree(work, ignore_errors=True)
