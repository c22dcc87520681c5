"""Cloudflare: the account, its tunnels, and the routes through them."""

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr

from components import versions
from components.settings.model import (
    AbsolutePath,
    HexId,
    Hostname,
    Image,
    Model,
    Name,
    Number,
    Text,
)
from components.settings.namespace import Resources
from components.settings.problem import Path, Problem

# Year and month of Cloudflare's own image by its tag; a digest alone tells no version.
_CLOUDFLARED = re.compile(
    r"(?:.*/)?cloudflare/cloudflared:([0-9]{4})\.([0-9]{1,2})(?:[.@-].*)?", re.ASCII
)


def _is_tunnel_secret(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) >= 32
    except (binascii.Error, ValueError):
        return False


def _is_service(service: str) -> bool:
    match = re.match(r"[a-z]+://(\[[^]]*\]|[^/:]*)(?::([0-9]+))?", service)
    if match is None:
        return True
    host, port = match.groups()
    if port is not None and not 1 <= int(port) <= 65535:
        return False
    return host.startswith("[") or (len(host) <= 253 and ".." not in host)


TunnelSecret = Annotated[
    SecretStr,
    Text(
        "base64 of at least 32 random bytes",
        "generate it with `openssl rand -base64 32`",
        "bWFkZS11cC1leGFtcGxlLW1hZGUtdXAtZXhhbXBsZS0=",
        r"[A-Za-z0-9+/]+={0,2}",
        _is_tunnel_secret,
    ),
]
ApiToken = Annotated[
    SecretStr,
    Text(
        "an API token of Cloudflare: 40 or more letters, digits, `-` and `_`",
        "make one under My Profile, API Tokens, and encrypt it",
        "made-up-made-up-made-up-made-up-made-up-",
        r"[A-Za-z0-9_-]{40,}",
    ),
]
TunnelId = Annotated[
    str,
    Text(
        "a tunnel's id: a UUID in lower case",
        "copy it from `cloudflared tunnel list`",
        "01234567-89ab-cdef-0123-456789abcdef",
        r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    ),
]
Service = Annotated[
    str,
    Text(
        "http://, https://, tcp://, ssh:// or rdp:// with host[:port] and no path, unix:/path, "
        "or http_status:<code>",
        "write the origin as the connector reaches it, for example "
        "http://app.factory.svc.cluster.local:80",
        "http_status:404",
        r"(?:https?|tcp|ssh|rdp)://(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-fA-F:.]+\])(?::[0-9]{1,5})?"
        r"|unix:(?:/[A-Za-z0-9_@+=,.-]+)+|http_status:[1-5][0-9]{2}",
        _is_service,
    ),
]
RoutePath = Annotated[
    str,
    Text(
        "a regular expression for the URL's path that begins with / or ^/, in ASCII without blanks",
        "write for example ^/api/",
        "^/api/",
        r"\^?/[!-~]{0,255}",
    ),
]
Duration = Annotated[
    str,
    Text(
        "a duration in hours, minutes and seconds such as 24h, 1h30m or 30s, in quotes",
        "write a number with its unit",
        "30s",
        r"(?=.)(?:[0-9]{1,6}h)?(?:[0-9]{1,6}m)?(?:[0-9]{1,6}s)?",
    ),
]
HostHeader = Annotated[
    str,
    Text(
        "a host name, with a port where the origin wants one",
        "write the name that the origin expects in its Host header",
        "app.internal",
        r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?(?::[0-9]{1,5})?",
    ),
]
Email = Annotated[
    str,
    Text(
        "an e-mail address",
        "write one address an entry",
        "someone@example.org",
        r"[A-Za-z0-9._+-]+@[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?\.[a-z]{2,}",
    ),
]
ContainerName = Annotated[
    str,
    Text(
        "a name of a Docker container: letters, digits, `_`, `.` and `-`",
        "leave it out for cloudflared-<tunnel's name>",
        "cloudflared-example",
        r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}",
    ),
]
Connections = Annotated[
    int, Number("0 to 10000", "write a number in that range, without quotes", 100, 0, 10000)
]


def seconds(duration: str) -> int:
    """The length of a duration such as ``1h30m``."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(int(count) * units[unit] for count, unit in re.findall(r"([0-9]+)([hms])", duration))


class Cloudflare(Model):
    """The account that holds the tunnels and the zones of their hostnames."""

    account_id: HexId = Field(description="Id of the account.")
    api_token: ApiToken = Field(
        description="API token, encrypted. Permissions: account Cloudflare Tunnel Edit, Access "
        "Apps and Policies Edit; zone DNS Edit."
    )
    zones: dict[Hostname, HexId] = Field(
        description="Ids of the zones by name; every hostname lies in one of them."
    )

    def zone(self, hostname: str) -> str:
        """Name of the zone that holds ``hostname``, of several the longest.

        Raises LookupError for one outside every zone; a stack's settings have no such route.
        """
        labels = hostname.split(".")
        for start in range(len(labels) - 1):
            name = ".".join(labels[start:])
            if name in self.zones:
                return name
        raise LookupError(hostname)


class Origin(Model):
    """How the connector talks to an origin, in Cloudflare's terms."""

    no_tls_verify: bool | None = Field(
        default=None, strict=True, description="Accept any certificate of the origin."
    )
    http_host_header: HostHeader | None = Field(
        default=None, description="Host header sent to the origin."
    )
    origin_server_name: HostHeader | None = Field(
        default=None, description="Name expected in the origin's certificate."
    )
    ca_pool: AbsolutePath | None = Field(
        default=None,
        description="File with the CA of the origin's certificate, as the connector sees it.",
    )
    http2_origin: bool | None = Field(
        default=None, strict=True, description="Speak HTTP/2 to the origin, which must be https."
    )
    connect_timeout: Duration | None = Field(
        default=None, description='Limit for a new TCP connection; Cloudflare\'s default is "30s".'
    )
    tls_timeout: Duration | None = Field(
        default=None, description='Limit for a TLS handshake; Cloudflare\'s default is "10s".'
    )
    tcp_keep_alive: Duration | None = Field(
        default=None, description="Time between TCP keep-alive packets."
    )
    keep_alive_timeout: Duration | None = Field(
        default=None, description="When an idle connection is dropped."
    )
    keep_alive_connections: Connections | None = Field(
        default=None, description="Idle connections kept, at most."
    )
    no_happy_eyeballs: bool | None = Field(
        default=None, strict=True, description="No fallback between IPv4 and IPv6."
    )
    disable_chunked_encoding: bool | None = Field(
        default=None, strict=True, description="No chunked transfer encoding, for WSGI servers."
    )

    def arguments(self) -> dict[str, Any]:
        """What is set, by the provider's argument names; durations in seconds."""
        durations = {"connect_timeout", "tls_timeout", "tcp_keep_alive", "keep_alive_timeout"}
        return {
            name: seconds(value) if name in durations else value
            for name, value in self.model_dump(exclude_none=True).items()
        }


class Access(Model):
    """Who may open a route: an Access application with one policy."""

    emails: list[Email] = Field(default=[], description="Addresses that may log in.")
    email_domains: list[Hostname] = Field(
        default=[], description="Domains whose addresses may log in."
    )
    session_duration: Duration = Field(
        default="24h", description="How long a login lasts, in quotes."
    )
    decision: Literal["allow"] = Field(
        default="allow", description="What the policy does with those named."
    )


class Route(Model):
    """One public hostname: its ingress rule, its DNS record and its access gate."""

    hostname: Hostname = Field(
        description="Public host name, inside one of homelab:cloudflare.zones."
    )
    path: RoutePath | None = Field(
        default=None,
        description="Regular expression for the URL's path; without it the route takes all paths.",
    )
    service: Service = Field(description="Origin as the connector reaches it.")
    origin: Origin | None = Field(
        default=None, description="How the connector talks to the origin."
    )
    keepalive: bool = Field(
        default=False,
        strict=True,
        description="GET the origin every 2 min (limit 10 s), so that it stays awake; http:// and "
        "https:// only.",
    )
    access: Access | None = Field(
        default=None,
        description="Who may open it. Without it the service is public on the internet.",
    )

    @property
    def service_host(self) -> str | None:
        """The host in ``service``; None for unix: and http_status:."""
        match = re.match(r"[a-z]+://(\[[^]]*\]|[^/:]*)", self.service)
        return match and match[1]

    @property
    def namespace(self) -> str | None:
        """Namespace of the Kubernetes Service behind the route; None where it is none."""
        parts = (self.service_host or "").removesuffix(".cluster.local").split(".")
        return parts[1] if len(parts) == 3 and parts[2] == "svc" else None


CONNECTOR_RESOURCES = Resources({"cpu": "10m", "memory": "64Mi"}, {"memory": "256Mi"})
KEEPALIVE_RESOURCES = Resources({"cpu": "1m", "memory": "8Mi"}, {"memory": "64Mi"})
"""Of a connector's pods, and of those that keep its origins awake."""
EDGE_PORT = 7844
"""Where a connector reaches Cloudflare."""


class ClusterConnector(Model):
    """cloudflared as a Deployment in the cluster."""

    kind: Literal["cluster"] = Field(description="A Deployment in the cluster.")
    namespace: Name = Field(default="factory", description="Namespace of the Deployment.")
    image: Image = Field(default=versions.CLOUDFLARED, description="Image of cloudflared, pinned.")
    replicas: Annotated[
        int,
        Number(
            "1 to 25 (Cloudflare's limit of a tunnel)",
            "write a number in that range, without quotes",
            1,
            1,
            25,
        ),
    ] = Field(default=1, description="Number of pods.")
    metrics_port: Annotated[
        int,
        Number(
            "1024 to 65535: the container runs without privilege",
            "write a port in that range, without quotes",
            2000,
            1024,
            65535,
        ),
    ] = Field(default=2000, description="Port of metrics and readiness.")


class HostConnector(Model):
    """cloudflared as a Docker container in the host's network: it reaches localhost's origins."""

    kind: Literal["host"] = Field(description="A Docker container on the host.")
    image: Image = Field(default=versions.CLOUDFLARED, description="Image of cloudflared, pinned.")
    token_file: AbsolutePath = Field(
        default="/var/lib/homelab/tunnels/<name>.token",
        description="File on the host (0600) that holds the tunnel's token; <name> is the "
        "tunnel's.",
    )
    container: ContainerName = Field(
        default="cloudflared-<name>", description="Name of the container; <name> is the tunnel's."
    )


class ExternalConnector(Model):
    """cloudflared runs under another owner, for example ArgoCD; this stack leaves it alone."""

    kind: Literal["external"] = Field(description="Another owner runs it.")


Connector = Annotated[
    ClusterConnector | HostConnector | ExternalConnector, Field(discriminator="kind")
]


class Adopt(Model):
    """A tunnel that exists already and keeps its id."""

    id: TunnelId = Field(description="Id of the tunnel.")
    config_src: Literal["local", "cloudflare"] = Field(
        default="local",
        description="Where the existing tunnel has its ingress rules now, in Cloudflare's word.",
    )


class Tunnel(Model):
    """A Cloudflare tunnel with its connector and routes."""

    secret: TunnelSecret = Field(
        description="The tunnel's secret, encrypted; its token is derived from it, so rotating "
        "it is this one value."
    )
    adopt: Adopt | None = Field(
        default=None, description="Take over an existing tunnel instead of making one."
    )
    management: Literal["remote", "local"] = Field(
        default="remote",
        description="`remote`: this stack owns the ingress rules. `local`: they stay in the "
        "connector's own file, and only DNS"
        " records and Access are made here.",
    )
    connector: Connector = Field(description="What runs cloudflared.")
    routes: list[Route] = Field(
        default=[],
        description="Public hostnames in order; the first that matches wins. The 404 at the end "
        "is added.",
    )
    delete: Name | None = Field(
        default=None,
        description="The tunnel's name, typed: lets `pulumi destroy`, or its removal from here "
        "after an `up`, delete the tunnel.",
    )

    @property
    def access(self) -> dict[str, Access | None]:
        """Who may open each hostname.

        A route's path is a regular expression that need not match at the start, an Access
        application knows prefixes. So a gate is before the whole hostname, and a stack's settings
        agree on it between the routes that share one: anything less leaves a way around.
        """
        return {route.hostname: route.access for route in self.routes}

    def problems(self, name: str) -> Iterator[Problem]:
        """What is wrong across the fields of the tunnel called ``name``."""
        path: Path = ("tunnels", name)
        if self.delete not in (None, name):
            yield Problem(
                (*path, "delete"),
                self.delete,
                f"the tunnel's name, {name}, or nothing",
                f"type {name} to confirm, or remove the key",
            )
        yield from self._connector_problems((*path, "connector"))
        yield from self._management_problems(path)
        for index, route in enumerate(self.routes):
            yield from self._route_problems((*path, "routes", index), route)

    def _connector_problems(self, path: Path) -> Iterator[Problem]:
        if isinstance(self.connector, ExternalConnector):
            return
        image = self.connector.image
        version = _CLOUDFLARED.fullmatch(image)
        if version and (int(version[1]), int(version[2])) < (2025, 4):
            yield Problem(
                (*path, "image"),
                image,
                "cloudflared 2025.4.0 or newer, the first that takes its token from a file",
                f"pin a newer version, for example {versions.CLOUDFLARED}",
                "is too old",
            )

    def _management_problems(self, path: Path) -> Iterator[Problem]:
        if self.management == "remote":
            return
        management, connector, adopt = (
            (*path, key) for key in ("management", "connector", "adopt")
        )
        if self.connector.kind != "external":
            yield Problem(
                management,
                "local",
                "remote, or local together with connector.kind external",
                "set management to remote, or leave the connector to its owner: a "
                "locally-managed tunnel's rules live in its"
                " connector's own file, and a connector started with a token ignores such a file",
                involves=[connector],
            )
        if self.adopt is None:
            yield Problem(
                management,
                "local",
                "local together with adopt",
                "name the existing tunnel under adopt.id: a tunnel made here has no connector "
                "with rules of its own",
                involves=[adopt],
            )
        elif self.adopt.config_src == "cloudflare":
            yield Problem(
                (*adopt, "configSrc"),
                "cloudflare",
                "local while management is local",
                "set management to remote, or correct configSrc: a tunnel never goes back from "
                "cloudflare to local",
                involves=[management],
            )

    def _route_problems(self, path: Path, route: Route) -> Iterator[Problem]:
        service: Path = (*path, "service")
        kind = (*path[:2], "connector")
        host = route.service_host
        if host is not None:
            inside = host.endswith((".svc", ".svc.cluster.local")) or host == "svc.cluster.local"
            if inside and route.namespace is None:
                yield Problem(
                    service,
                    route.service,
                    "a Kubernetes Service as <service>.<namespace>.svc.cluster.local",
                    "write the Service's name and its namespace",
                )
            if inside and self.connector.kind == "host":
                yield Problem(
                    service,
                    route.service,
                    "an origin that the host can reach; names of Services resolve in the cluster "
                    "alone",
                    "move the route to a tunnel whose connector runs in the cluster",
                    involves=[kind],
                )
            if (
                host == "localhost" or host.startswith("127.") or host == "[::1]"
            ) and self.connector.kind == "cluster":
                yield Problem(
                    service,
                    route.service,
                    "an origin that a pod can reach; there localhost is the connector itself",
                    "name the Service, or move the route to a tunnel whose connector runs on the "
                    "host",
                    involves=[kind],
                )
        if route.origin is not None and self.management == "local":
            yield Problem(
                (*path, "origin"),
                None,
                "nothing while management is local",
                "write it into the connector's own file, which holds the ingress rules",
                "has no effect",
                [(*path[:2], "management")],
            )
        if route.keepalive and not route.service.startswith(("http://", "https://")):
            yield Problem(
                (*path, "keepalive"),
                True,
                "true only for an http:// or https:// service",
                "remove it: only HTTP has a GET",
                involves=[service],
            )
        if route.keepalive and self.connector.kind == "external":
            yield Problem(
                (*path, "keepalive"),
                True,
                "nothing while connector.kind is external",
                "let who runs the connector call the origin, or set connector.kind to cluster or "
                "host",
                "has no effect",
                [(*kind, "kind")],
            )
        if (
            route.origin is not None
            and route.origin.http2_origin
            and not route.service.startswith("https://")
        ):
            yield Problem(
                (*path, "origin", "http2Origin"),
                True,
                "true only for an https:// service",
                "remove it, or reach the origin by https",
                involves=[service],
            )
        if route.access is not None and not (route.access.emails or route.access.email_domains):
            yield Problem(
                (*path, "access"),
                None,
                "at least one of emails and emailDomains",
                "name who may log in, or remove access to make the route public",
                "lets nobody in",
                [(*path, "access", "emails"), (*path, "access", "emailDomains")],
            )


def token_secret_name(tunnel: str) -> str:
    """Name of the Secret that holds the token of an in-cluster connector."""
    return f"cloudflared-{tunnel}-token"
