"""Verb: install a tool that the host lacks, verified."""

from __future__ import annotations

from typing import Any

from hostctl.machine import TOOLS_DIRECTORY, Machine
from hostctl.protocol import Failure, Result, say
from hostctl.spec import Value, checked, or_null, text_matching
from hostctl.tools import tool_version
from hostctl.waiting import size_text

# The checksums of the release (checksums.txt of github.com/k3d-io/k3d), by the architecture's name
# there. To move on, change all of them together.
K3D_VERSION = "5.8.3"
K3D_SHA256 = {
    "amd64": "dbaa79a76ace7f4ca230a1ff41dc7d8a5036a8ad0309e9c54f9bf3836dbe853e",
    "arm64": "0b8110f2229631af7402fb828259330985918b08fefd38b7f1b788a1c8687216",
}
INSTALL_SPEC: dict[str, Any] = {
    "version": Value(or_null(text_matching(r"\d+\.\d+\.\d+", "a version such as 5.8.3")), None),
    "sha256": Value(or_null(text_matching(r"[0-9a-f]{64}", "64 hex digits")), None),
    "url": Value(
        or_null(text_matching(r"https?://[!-~]+", "https://HOST/PATH of the program's file")), None
    ),
}


def install_k3d(machine: Machine, spec: dict[str, Any]) -> Result:
    """Installs the k3d that hostctl pins, or another version whose sha256 is given, for hostctl's
    own use: downloaded through the environment's proxy, verified, and put in place whole."""
    wanted = _release(machine, checked(spec, INSTALL_SPEC, "install k3d"))
    path = f"{TOOLS_DIRECTORY}/k3d"
    if machine.exists(path) and machine.checksum(path) == wanted["sha256"]:
        return {"path": path, "version": wanted["version"], "changed": False}
    step = f"installing k3d {wanted['version']}"
    say(f"downloading {wanted['url']}")

    def tick(size: int) -> None:
        say(f"{step}: {size_text(size)}")

    try:
        content = machine.download(wanted["url"], wanted["sha256"], tick)
    except ValueError as found:
        raise Failure(
            "refused",
            step,
            f"{wanted['url']} has the sha256 {found}, wanted is {wanted['sha256']}; nothing was "
            "installed",
            "is it the file of that version and architecture? See checksums.txt of the release",
        ) from None
    except OSError as error:
        raise Failure(
            "failed",
            step,
            f"{wanted['url']}: {error}; nothing was installed",
            "run it again; behind a proxy set https_proxy (sudo keeps it by `env_keep`), or name a "
            "mirror by url",
        ) from None
    machine.make_directory(TOOLS_DIRECTORY, 0o755)
    machine.write_atomic(path, content, 0o755)
    tool_version(machine, "k3d")
    return {"path": path, "version": wanted["version"], "changed": True}


def _release(machine: Machine, given: dict[str, Any]) -> dict[str, str]:
    """Version, url and sha256 of what to install. Raises Failure when its sha256 is not known."""
    _, kernel_name = machine.kernel()
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(kernel_name, kernel_name)
    version = given["version"] or K3D_VERSION
    sha256 = given["sha256"]
    if sha256 is None and version == K3D_VERSION:
        sha256 = K3D_SHA256.get(architecture)
    if sha256 is None:
        raise Failure(
            "refused",
            f"installing k3d {version}",
            f"its sha256 for {architecture} is not known here, and nothing is installed unverified",
            "give sha256 (homelab:host.k3d.sha256), from checksums.txt of the release, or leave "
            f"the version out for {K3D_VERSION}",
        )
    at = f"https://github.com/k3d-io/k3d/releases/download/v{version}/k3d-linux-{architecture}"
    return {"version": version, "sha256": sha256, "url": given["url"] or at}
