"""Cloudflare tunnels: public hostnames for services of the cluster and of the host.

The only module that imports Cloudflare's resources, which is slow: a stack without tunnels must
not import it.

Taking over a tunnel that exists: ``adopt.id`` imports it instead of making one, so its id stays,
and with it every record that points to it. Pulumi's import demands that the inputs agree with the
live tunnel: the key under ``homelab:tunnels`` is the tunnel's name, ``adopt.configSrc`` what
Cloudflare says today. Cloudflare never tells the secret, so it is left alone while ``adopt`` is
there; ``secret`` must then be the ``TunnelSecret`` of the credentials file in use, since our
connector's token is made from it. After that up ``adopt`` can go; the tunnel's secret then becomes
the declared one, in place. Records and Access applications that exist are brought in by `make
adopt` (:mod:`components.recovery`): creating them fails.

With ``management: local`` the tunnel stays as it is: its ingress rules remain in the connector's
own file, and only records and Access are made here. With ``remote`` the declared routes are put at
Cloudflare, where connectors that run by a token read them; a local tunnel that is adopted is
thereby migrated and keeps its id.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_docker as docker
import pulumi_kubernetes as kubernetes

import homelab
from components import cloudflare, settings, versions
from components.cluster import Cluster
from components.host import Host
from components.network.policy import admit
from components.ownership import deployment_name
from components.settings.tunnel import CONNECTOR_RESOURCES, KEEPALIVE_RESOURCES

# User `nonroot` of cloudflared's image. A number, since runAsNonRoot cannot judge a name.
_USER = 65532

# cloudflared gives requests that are under way 30 s when it is told to stop.
_STOP_SECONDS = 45

_TOKEN_FILE = "/etc/cloudflared/token"

_KEEPALIVE_SECONDS = 120
_KEEPALIVE_LIMIT_SECONDS = 10

_POD_SECURITY: kubernetes.core.v1.PodSecurityContextArgsDict = {
    "run_as_non_root": True,
    "run_as_user": _USER,
    "run_as_group": _USER,
    "fs_group": _USER,
    "seccomp_profile": {"type": "RuntimeDefault"},
}

_CONTAINER_SECURITY: kubernetes.core.v1.SecurityContextArgsDict = {
    "allow_privilege_escalation": False,
    "read_only_root_filesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def cloudflare_provider(account: settings.Cloudflare) -> cloudflare.Provider:
    """The one Cloudflare provider of a stack. What its API token needs: components.permissions."""
    return cloudflare.Provider(
        "cloudflare", api_token=pulumi.Output.secret(account.api_token.get_secret_value())
    )


def connector_token(
    account_id: pulumi.Input[str], tunnel_id: pulumi.Input[str], secret: pulumi.Input[str]
) -> pulumi.Output[str]:
    """The token that a connector runs with: base64 of {"a": account, "t": tunnel id, "s": secret}.

    That is what cloudflared's `connection.TunnelToken` decodes (connection/connection.go).
    Derived, never fetched: an invoke would show the old token in the very preview that rotates the
    secret.
    """
    credentials = pulumi.Output.json_dumps({"a": account_id, "t": tunnel_id, "s": secret})
    return pulumi.Output.secret(credentials.apply(_base64))


@dataclass(frozen=True)
class CloudflareTunnelArgs:
    account: settings.Cloudflare
    settings: settings.Tunnel
    cloudflare: cloudflare.Provider
    docker: docker.Provider | None
    """Runs a connector of kind host."""
    cluster: Cluster | None
    """Runs a connector of kind cluster; None for a stack whose cluster is off."""
    after: Sequence[pulumi.Resource] = ()
    """What an in-cluster connector needs first: its namespace."""
    host: Host | None = None
    """Runs a connector of kind host; by default the cluster's."""


class CloudflareTunnel(pulumi.ComponentResource):
    """A tunnel with its routes and its connector.

    A route is one ingress rule and, shared by the routes of a hostname, one proxied CNAME and where
    declared one Access application with its policy; the record waits for the application, so that
    nothing is public before its gate is there. Children are named by hostname: adding or removing a
    route touches no other route's record.

    The tunnel is protected until ``homelab:tunnels.<name>.delete`` holds its name.
    """

    id: pulumi.Output[str]
    """UUID of the tunnel."""
    name: pulumi.Output[str]
    connector: pulumi.Output[str]
    """Who runs the tunnel: cluster, host or external."""
    cname: pulumi.Output[str]
    """What the records of all its hostnames point to."""
    urls: pulumi.Output[dict[str, str]]
    """URL by hostname."""
    public: pulumi.Output[list[str]]
    """Hostnames without an Access application: anyone on the internet reaches them."""
    output: pulumi.Output[homelab.Tunnel]
    """As consumers of the stack read it."""

    def __init__(
        self, name: str, args: CloudflareTunnelArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:CloudflareTunnel", name, None, opts)
        self._args = args
        self._options = pulumi.ResourceOptions(parent=self, provider=args.cloudflare)
        tunnel, account = args.settings, args.account
        secret = pulumi.Output.secret(tunnel.secret.get_secret_value())

        self._tunnel = self._register_tunnel(secret)
        self.cname = pulumi.Output.format("{0}.cfargotunnel.com", self._tunnel.id)
        if tunnel.management == "remote":
            cloudflare.ZeroTrustTunnelCloudflaredConfig(
                name,
                account_id=account.account_id,
                tunnel_id=self._tunnel.id,
                # The API takes the whole list at once, in order; the first rule that matches wins.
                config={
                    "ingresses": [
                        *map(_ingress, tunnel.routes),
                        {"service": "http_status:404"},
                    ]
                },
                opts=self._options,
            )
        for hostname, access in tunnel.access.items():
            self._publish(hostname, access)

        token = connector_token(account.account_id, self._tunnel.id, secret)
        connector = tunnel.connector
        kept_alive = [route for route in tunnel.routes if route.keepalive]
        if connector.kind == "cluster":
            self._connect_from_cluster(connector, token)
            if kept_alive:
                self._keep_alive_from_cluster(connector, kept_alive)
        elif connector.kind == "host":
            self._connect_from_host(connector, token)
            if kept_alive:
                self._keep_alive_from_host(kept_alive)

        self.id = self._tunnel.id
        self.name = self._tunnel.name
        self.connector = pulumi.Output.from_input(connector.kind)
        self.urls = pulumi.Output.from_input(
            {hostname: f"https://{hostname}" for hostname in tunnel.access}
        )
        self.public = pulumi.Output.from_input(
            [hostname for hostname, access in tunnel.access.items() if not access]
        )
        self.output = pulumi.Output.all(
            id=self.id, name=self.name, connector=self.connector, public=self.public
        ).apply(lambda seen: homelab.Tunnel(**seen))
        self.register_outputs(
            {
                "id": self.id,
                "name": self.name,
                "connector": self.connector,
                "cname": self.cname,
                "urls": self.urls,
                "public": self.public,
            }
        )

    def _register_tunnel(self, secret: pulumi.Output[str]) -> cloudflare.ZeroTrustTunnelCloudflared:
        tunnel, account = self._args.settings, self._args.account
        adopt = tunnel.adopt
        made_as = "cloudflare" if tunnel.management == "remote" else "local"
        return cloudflare.ZeroTrustTunnelCloudflared(
            self._name,
            account_id=account.account_id,
            name=self._name,
            config_src=adopt.config_src if adopt else made_as,
            tunnel_secret=secret,
            opts=pulumi.ResourceOptions.merge(
                self._options,
                pulumi.ResourceOptions(
                    protect=tunnel.delete != self._name,
                    import_=f"{account.account_id}/{adopt.id}" if adopt else None,
                    # configSrc: a change replaces the tunnel, and every connector and record with
                    # it; putting a configuration moves it to remote management without.
                    # tunnelSecret: Cloudflare never tells it, so an import with it fails.
                    ignore_changes=["configSrc", "tunnelSecret"] if adopt else ["configSrc"],
                ),
            ),
        )

    def _publish(self, hostname: str, access: settings.Access | None) -> None:
        account = self._args.account
        gate = [self._gate(hostname, access)] if access else []
        cloudflare.DnsRecord(
            hostname,
            zone_id=account.zones[account.zone(hostname)],
            name=hostname,
            type="CNAME",
            content=self.cname,
            proxied=True,
            ttl=1,  # "automatic", the only value that a proxied record takes
            opts=pulumi.ResourceOptions.merge(
                self._options, pulumi.ResourceOptions(depends_on=gate)
            ),
        )

    def _gate(
        self, hostname: str, access: settings.Access
    ) -> cloudflare.ZeroTrustAccessApplication:
        account_id = self._args.account.account_id
        policy = cloudflare.ZeroTrustAccessPolicy(
            hostname,
            account_id=account_id,
            name=hostname,
            decision=access.decision,
            includes=[
                *({"email": {"email": email}} for email in access.emails),
                *({"email_domain": {"domain": domain}} for domain in access.email_domains),
            ],
            session_duration=access.session_duration,
            opts=self._options,
        )
        return cloudflare.ZeroTrustAccessApplication(
            hostname,
            account_id=account_id,
            name=hostname,
            type="self_hosted",
            destinations=[{"type": "public", "uri": hostname}],
            policies=[{"id": policy.id, "precedence": 1}],
            session_duration=access.session_duration,
            opts=self._options,
        )

    @property
    def _cluster(self) -> Cluster:
        cluster = self._args.cluster
        if cluster is None:
            raise TypeError(f"tunnel {self._name} is connected from a cluster that is off")
        return cluster

    def _connect_from_cluster(
        self, connector: settings.ClusterConnector, token: pulumi.Output[str]
    ) -> None:
        """A Deployment to which nobody talks but who reads its metrics. What it talks to is not
        limited, since the services of its routes may be anywhere; a NetworkPolicy of its namespace
        that would cut it off is refused in the settings.
        """
        args, cluster = self._args, self._cluster
        name, namespace = deployment_name(self._name), connector.namespace
        secret_name = settings.token_secret_name(self._name)
        # Not app.kubernetes.io/instance, by which ArgoCD tells what belongs to an application.
        selector = {"app.kubernetes.io/name": name}
        labels = {**selector, "app.kubernetes.io/managed-by": "pulumi"}
        options = pulumi.ResourceOptions(
            parent=self,
            provider=cluster.provider,
            deleted_with=cluster.identity,
            depends_on=list(args.after),
        )
        # Cloudflare refuses to delete a tunnel with live connectors, and a destroy skips the
        # Deployment, which goes with the cluster. So the tunnel waits for this: it comes before the
        # tunnel and after the Deployment is gone or skipped.
        stop = cluster.host.command(
            f"stop {namespace}/{name}",
            ["connector", "status"],
            {"kubeconfig": cluster.kubeconfig, "namespace": namespace, "deployment": name},
            delete=["connector", "stop"],
            opts=pulumi.ResourceOptions(
                parent=self,
                depends_on=[self._tunnel, cluster.identity or cluster.provider],
            ),
        )
        secret = kubernetes.core.v1.Secret(
            f"{namespace}/{secret_name}",
            metadata={"name": secret_name, "namespace": namespace, "labels": labels},
            data={"token": token.apply(_base64)},
            opts=options,
        )
        policy = admit(name, namespace, selector, options, cluster=[connector.metrics_port])
        kubernetes.apps.v1.Deployment(
            f"{namespace}/{name}",
            metadata={"name": name, "namespace": namespace, "labels": labels},
            spec={
                "replicas": connector.replicas,
                "selector": {"match_labels": selector},
                "template": {
                    "metadata": {
                        "labels": labels,
                        # cloudflared reads its token once, so a new one must roll the pods.
                        "annotations": {"checksum/token": _digest(token)},
                    },
                    "spec": _pod(connector, secret_name, selector),
                },
            },
            opts=pulumi.ResourceOptions.merge(
                options, pulumi.ResourceOptions(depends_on=[secret, stop, policy])
            ),
        )
        kubernetes.core.v1.Service(
            f"{namespace}/{name}-metrics",
            metadata={
                "name": f"{name}-metrics",
                "namespace": namespace,
                "labels": labels,
                # A Service waits for ready pods otherwise; the Deployment waits for them already.
                "annotations": {"pulumi.com/skipAwait": "true"},
            },
            spec={
                "selector": selector,
                "ports": [{"name": "metrics", "port": connector.metrics_port}],
            },
            opts=options,
        )
        if connector.replicas > 1:
            kubernetes.policy.v1.PodDisruptionBudget(
                f"{namespace}/{name}",
                metadata={"name": name, "namespace": namespace, "labels": labels},
                spec={"max_unavailable": 1, "selector": {"match_labels": selector}},
                opts=options,
            )

    def _connect_from_host(
        self, connector: settings.HostConnector, token: pulumi.Output[str]
    ) -> None:
        """A container in the host's network, where the routes' http://localhost:port are.

        A new token updates the file, and hostctl restarts the container, which mounts the file
        anew: no replacement. The mount is of the file alone, since its directory holds the tokens
        of other tunnels.
        """
        args = self._args
        host = args.host or self._cluster.host
        file = host.command(
            # By its path: another path is another file, and the old one is removed.
            f"token {connector.token_file}",
            ["files", "write"],
            {
                "path": connector.token_file,
                "content": token,
                "mode": "0600",
                "owner": str(_USER),
                "group": str(_USER),
                "restart_container": connector.container,
            },
            secret=True,
            delete=["files", "remove"],
            opts=pulumi.ResourceOptions(parent=self),
        )
        options = pulumi.ResourceOptions(parent=self, provider=args.docker)
        image = docker.RemoteImage(
            connector.container, name=connector.image, keep_locally=True, opts=options
        )
        docker.Container(
            connector.container,
            **_confined(connector.container, connector.image),
            # Loopback and any free port: the image's own default is every address of the host.
            command=_arguments("127.0.0.1:0"),
            # A bind mount, not a volume: Docker would make a directory where the file is missing.
            mounts=[
                {
                    "type": "bind",
                    "source": connector.token_file,
                    "target": _TOKEN_FILE,
                    "read_only": True,
                }
            ],
            destroy_grace_seconds=_STOP_SECONDS,
            opts=pulumi.ResourceOptions.merge(
                options,
                pulumi.ResourceOptions(depends_on=[image, file], delete_before_replace=True),
            ),
        )

    def _keep_alive_from_cluster(
        self, connector: settings.ClusterConnector, routes: Sequence[settings.Route]
    ) -> None:
        """A Deployment without probes: an origin that does not answer is a line in its log and
        restarts nothing. Nobody talks to it.
        """
        args, cluster = self._args, self._cluster
        name, namespace = f"keepalive-{self._name}", connector.namespace
        selector = {"app.kubernetes.io/name": name}
        labels = {**selector, "app.kubernetes.io/managed-by": "pulumi"}
        options = pulumi.ResourceOptions(
            parent=self,
            provider=cluster.provider,
            deleted_with=cluster.identity,
            depends_on=list(args.after),
        )
        policy = admit(name, namespace, selector, options)
        kubernetes.apps.v1.Deployment(
            f"{namespace}/{name}",
            metadata={"name": name, "namespace": namespace, "labels": labels},
            spec={
                "replicas": 1,
                "selector": {"match_labels": selector},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "automount_service_account_token": False,
                        "enable_service_links": False,
                        # Nothing is lost when it is cut off, and a shell as PID 1 takes no SIGTERM.
                        "termination_grace_period_seconds": 1,
                        "security_context": _POD_SECURITY,
                        "containers": [
                            {
                                "name": "curl",
                                "image": versions.CURL,
                                "command": _keepalive(routes),
                                "resources": {
                                    "requests": KEEPALIVE_RESOURCES.requests,
                                    "limits": KEEPALIVE_RESOURCES.limits,
                                },
                                "security_context": _CONTAINER_SECURITY,
                            }
                        ],
                    },
                },
            },
            opts=pulumi.ResourceOptions.merge(options, pulumi.ResourceOptions(depends_on=[policy])),
        )

    def _keep_alive_from_host(self, routes: Sequence[settings.Route]) -> None:
        """A container beside the connector's. Another one, since cloudflared's image has no curl
        and an edit of what is kept alive must not cut the tunnel.
        """
        name = f"keepalive-{self._name}"
        options = pulumi.ResourceOptions(parent=self, provider=self._args.docker)
        image = docker.RemoteImage(name, name=versions.CURL, keep_locally=True, opts=options)
        docker.Container(
            name,
            **_confined(name, versions.CURL),
            entrypoints=_keepalive(routes),
            init=True,  # a shell as PID 1 takes no SIGTERM
            opts=pulumi.ResourceOptions.merge(
                options, pulumi.ResourceOptions(depends_on=[image], delete_before_replace=True)
            ),
        )


def _confined(name: str, image: str) -> dict[str, Any]:
    """Arguments of a container in the host's network without any privilege, with bounded logs."""
    return {
        "name": name,
        "image": image,
        "user": f"{_USER}:{_USER}",
        "network_mode": "host",
        "read_only": True,
        "capabilities": {"drops": ["ALL"]},
        "security_opts": ["no-new-privileges:true"],
        "log_driver": "json-file",
        "log_opts": {"max-size": "10m", "max-file": "3"},
        "restart": "unless-stopped",
        "must_run": True,
    }


def _keepalive(routes: Sequence[settings.Route]) -> list[str]:
    """The command that GETs the routes' origins, all at once and again and again.

    It logs a line a GET: hostname, URL, status (000 for none), and the error if there was one.
    """
    loop = f'while :; do curl --parallel "$@"; sleep {_KEEPALIVE_SECONDS}; done'
    gets = [argument for route in routes for argument in ("--next", *_get(route))][1:]
    return ["sh", "-c", loop, "keepalive", *gets]


def _get(route: settings.Route) -> list[str]:
    """curl's arguments for the GET that the connector would make for a visitor of the route."""
    origin = route.origin or settings.Origin()
    # A path is a regular expression: what it begins with literally, short of a repeated character.
    literal = re.match(r"\^?(/[A-Za-z0-9/._~-]*)(?![*?{])", route.path or "/")
    path = literal[1] if literal else "/"
    url = route.service.rstrip("/") + path
    options = ["--silent", "--globoff", "--max-time", str(_KEEPALIVE_LIMIT_SECONDS)]
    options += ["--header", f"Host: {origin.http_host_header or route.hostname}"]
    # curl has neither the CA's file nor another name to expect, and sends nothing worth guarding.
    if origin.no_tls_verify or origin.ca_pool or origin.origin_server_name:
        options.append("--insecure")
    shown = f"{route.hostname} %{{url}} %{{response_code}} %{{errormsg}}\\n"
    return [*options, "--output", "/dev/null", "--write-out", shown, url]


def _pod(
    connector: settings.ClusterConnector, secret_name: str, selector: Mapping[str, str]
) -> kubernetes.core.v1.PodSpecArgsDict:
    """cloudflared, which finds its token in the Secret. ``selector`` matches all of its pods."""
    return {
        "automount_service_account_token": False,
        "enable_service_links": False,
        "termination_grace_period_seconds": _STOP_SECONDS,
        "security_context": _POD_SECURITY,
        "topology_spread_constraints": [
            {
                "max_skew": 1,
                "topology_key": "kubernetes.io/hostname",
                "when_unsatisfiable": "ScheduleAnyway",
                "label_selector": {"match_labels": selector},
            }
        ],
        "containers": [
            {
                "name": "cloudflared",
                "image": connector.image,
                "args": _arguments(f"0.0.0.0:{connector.metrics_port}"),
                "ports": [{"name": "metrics", "container_port": connector.metrics_port}],
                # Ready while at least one connection to Cloudflare stands. A minute without any
                # restarts it, not the first failure: an outage of the line must not end in a
                # restart back-off.
                "readiness_probe": {
                    "http_get": {"path": "/ready", "port": "metrics"},
                    "period_seconds": 10,
                },
                "liveness_probe": {
                    "http_get": {"path": "/ready", "port": "metrics"},
                    "initial_delay_seconds": 10,
                    "period_seconds": 10,
                    "failure_threshold": 6,
                },
                "resources": {
                    "requests": CONNECTOR_RESOURCES.requests,
                    "limits": CONNECTOR_RESOURCES.limits,
                },
                "security_context": _CONTAINER_SECURITY,
                "volume_mounts": [
                    {
                        "name": "token",
                        "mount_path": _TOKEN_FILE.rpartition("/")[0],
                        "read_only": True,
                    }
                ],
            }
        ],
        "volumes": [
            {
                "name": "token",
                "secret": {"secret_name": secret_name, "default_mode": 0o440},
            }
        ],
    }


def _arguments(metrics: str) -> list[str]:
    """cloudflared with its token from a file, which neither `ps` nor an inspect of the container
    shows. Needs cloudflared 2025.4.0.
    """
    return ["tunnel", "--no-autoupdate", "--metrics", metrics, "run", "--token-file", _TOKEN_FILE]


def _digest(token: pulumi.Output[str]) -> pulumi.Output[str]:
    """Tells one token from another.

    Not secret, so that a preview shows why pods roll: 64 bits of a hash over 32 random bytes lead
    back to nothing.
    """
    return pulumi.Output.unsecret(token).apply(
        lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _ingress(
    route: settings.Route,
) -> cloudflare.ZeroTrustTunnelCloudflaredConfigConfigIngressArgs:
    return cloudflare.ZeroTrustTunnelCloudflaredConfigConfigIngressArgs(
        hostname=route.hostname,
        path=route.path,
        service=route.service,
        origin_request=(
            cloudflare.ZeroTrustTunnelCloudflaredConfigConfigIngressOriginRequestArgs(
                **route.origin.arguments()
            )
            if route.origin
            else None
        ),
    )
