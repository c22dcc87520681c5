"""Where the commands of a stack run."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from components.settings.model import (
    AbsolutePath,
    Account,
    Model,
    Name,
    OperatorPath,
    Port,
    Text,
    camel_case,
    is_host,
)
from components.settings.problem import Problem

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|[0-9a-fA-F]*:[0-9a-fA-F:.]+"
_USER = "[a-z_][a-z0-9_-]{0,31}"
_PLACE = r"(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\])"
_PORT = ":[0-9]{1,5}"


def _is_place(text: str) -> bool:
    """Whether a URL's [user@]host[:port] has a possible host, in brackets if IPv6, and port."""
    try:
        url = urlsplit(f"//{text}")
        port = url.port  # above 65535: ValueError
    except ValueError:
        return False
    host = url.hostname or ""
    return port != 0 and is_host(host) and (":" in host) == ("[" in text)


Address = Annotated[
    str,
    Text(
        "a host name or an IP address, without user, port or scheme",
        "write the bare name or address; user and port are settings of their own",
        "p510.example.org",
        _HOST,
        is_host,
    ),
]
Jump = Annotated[
    str,
    Text(
        "[user@]host[:port], an IPv6 address in brackets",
        "name one jump host; for more, use an alias of ~/.ssh/config here",
        "admin@gate.example.org:22",
        rf"(?:{_USER}@)?(?!-){_PLACE}(?:{_PORT})?",
        _is_place,
    ),
]
DockerEndpoint = Annotated[
    str,
    Text(
        "unix:///path, ssh://[user@]host[:port] or tcp://host:port",
        "write the endpoint as `docker context inspect` shows it",
        "unix:///var/run/docker.sock",
        rf"unix://(?:/[A-Za-z0-9_@+=,.-]+)+|ssh://(?:{_USER}@)?{_PLACE}(?:{_PORT})?|tcp://{_PLACE}{_PORT}",
        lambda endpoint: endpoint.startswith("unix:") or _is_place(endpoint.partition("://")[2]),
    ),
]

ReleaseVersion = Annotated[
    str,
    Text(
        "three numbers such as 5.8.3, without a v",
        "write the version as k3d's releases name it",
        "5.8.3",
        r"[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}",
    ),
]
Sha256 = Annotated[
    str,
    Text(
        "64 hexadecimal digits in lower case",
        "copy it from checksums.txt of the release",
        "0123456789abcdef" * 4,
        r"[0-9a-f]{64}",
    ),
]
DownloadUrl = Annotated[
    str,
    Text(
        "http:// or https:// with host and path, without user or password",
        "write the address of the file itself; what is there is checked by its sha256",
        "https://mirror.example.org/k3d-linux-amd64",
        r"https?://[A-Za-z0-9.-]+(?::[0-9]{1,5})?(?:/(?:[A-Za-z0-9._~+-]|%[0-9A-Fa-f]{2})+)+",
    ),
]


def _docker_of(host: dict[str, Any]) -> str:
    if host.get("connection") != "ssh" or not host.get("address"):
        return "unix:///var/run/docker.sock"
    address = host["address"]
    user = f"{host['user']}@" if host.get("user") else ""
    return f"ssh://{user}{f'[{address}]' if ':' in address else address}:{host.get('port', 22)}"


# What TrueNAS SCALE listens on unless it is told otherwise.
_TRUENAS = {"ssh": 22, "web": 80, "rpcbind": 111, "web-tls": 443, "nfs": 2049, "iscsi": 3260}


def _services_of(host: dict[str, Any]) -> dict[str, int]:
    return dict(_TRUENAS) if host.get("init") == "truenas" else {}


class K3d(Model):
    """The k3d that the stack installs for its own use, below /var/lib/homelab/bin."""

    install: bool = Field(
        default=False,
        strict=True,
        description="Install k3d, verified by its sha256; with nothing else given, the release that"
        " hostctl pins.",
    )
    version: ReleaseVersion | None = Field(
        default=None, description="Another version, together with its sha256."
    )
    sha256: Sha256 | None = Field(
        default=None,
        description="The sha256 of that version's file for the host's architecture.",
    )
    url: DownloadUrl | None = Field(
        default=None, description="Where the file is, in place of k3d's releases on github.com."
    )

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        k3d = ("host", "k3d")
        if (self.version is None) != (self.sha256 is None):
            missing = "sha256" if self.sha256 is None else "version"
            yield Problem(
                (*k3d, missing),
                None,
                "version and sha256 together, or neither for the release that hostctl pins",
                "copy it from checksums.txt of the release: nothing is installed unverified",
                "is missing",
                [(*k3d, "version"), (*k3d, "sha256")],
            )
        if not self.install and any((self.version, self.sha256, self.url)):
            yield Problem(
                (*k3d, "install"),
                self.install,
                "true, where a version, sha256 or url is given",
                "set it to true, or remove them",
                "leaves them without effect",
                [(*k3d, "version"), (*k3d, "sha256"), (*k3d, "url")],
            )


class Host(Model):
    """The machine that carries the platform, and how commands reach it."""

    name: Name | None = Field(
        default=None,
        description="What the host is called: stacks whose host has the same name share its ports, "
        "Docker networks and directories. Default: its address; with `local`, the stack's name.",
    )
    connection: Literal["local", "ssh"] = Field(
        default="local",
        description="`local`: Pulumi runs on the host itself. `ssh`: over the OpenSSH client; "
        "host keys are always checked.",
    )
    address: Address | None = Field(
        default=None,
        description="Name or IP address of the host, or an alias of ~/.ssh/config (ssh only).",
    )
    user: Account | None = Field(
        default=None,
        description="Whom to log in as; by default what ~/.ssh/config says (ssh only).",
    )
    port: Port = Field(default=22, description="Port of the host's SSH server (ssh only).")
    jump: Jump | None = Field(
        default=None, description="Jump host on the way, as `ssh -J` takes it (ssh only)."
    )
    known_hosts: OperatorPath | None = Field(
        default=None,
        description="File with the host's key, in place of ~/.ssh/known_hosts (ssh only).",
    )
    identity_file: OperatorPath | None = Field(
        default=None, description="Private key to log in with, in place of the agent's (ssh only)."
    )
    sudo: bool = Field(
        default=False,
        strict=True,
        description="Run the host's commands as root by `sudo -n`, which must not ask for a "
        "password.",
    )
    docker: DockerEndpoint = Field(
        default_factory=_docker_of,
        description="Docker engine of the host as this machine reaches it. Default:"
        " unix:///var/run/docker.sock; with ssh, ssh://user@address:port.",
    )
    hostctl: AbsolutePath = Field(
        default="/var/lib/homelab/hostctl",
        description="Where hostctl, the program that runs on the host, is installed.",
    )
    k3d: K3d = Field(
        default=K3d(), description="Whether and which k3d the stack installs on the host."
    )
    init: Literal["auto", "systemd", "nixos", "truenas", "none"] = Field(
        default="auto",
        description="What starts the cluster at boot, cleans and backs up: units of `systemd`, a"
        " module to import on `nixos`, init script and cron jobs of `truenas`, or `none`. `auto`"
        " looks what the host has.",
    )
    services: dict[Name, Port] = Field(
        default_factory=_services_of,
        description="TCP ports of the host's own services, by service; nothing of the stack is "
        "published on them. Default with init `truenas`: {ssh: 22, web: 80, rpcbind: 111, "
        "web-tls: 443, nfs: 2049, iscsi: 3260}; else none. Write what differs as a whole.",
    )
    secret_files: Literal["host", "here"] = Field(
        default="host",
        description="Which machine reads the files of Secrets: the `host` (agenix, sops-nix), or"
        " the one that runs Pulumi (`here`). A Secret's readOn overrides it.",
    )

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        yield from self.k3d.problems()
        connection = ("host", "connection")
        if self.connection == "ssh":
            if self.address is None:
                yield Problem(
                    ("host", "address"),
                    None,
                    "a host name or an IP address",
                    "name the host to log in to, or set homelab:host.connection to local and run "
                    "Pulumi on the host",
                    "is missing",
                    [connection],
                )
            return
        for name in ("address", "user", "jump", "known_hosts", "identity_file"):
            value = getattr(self, name)
            if value is not None:
                yield Problem(
                    ("host", camel_case(name)),
                    value,
                    "nothing while homelab:host.connection is local",
                    "remove it, or set homelab:host.connection to ssh",
                    "has no effect",
                    [connection],
                )
