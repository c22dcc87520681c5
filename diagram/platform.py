"""What of a stack's settings is in its picture: names, routes, nodes, namespaces and stores; no
secret is among what is read.
"""

from collections.abc import Iterator
from urllib.parse import urlsplit

from components import settings
from diagram.boxes import Box, Line, Picture

_CLOUDFLARE, _LAN, _HOST, _CLUSTER = "#c0703a", "#3c7d5a", "#54708f", "#326ce5"
_NAMESPACE, _STORE = "#6a5aa0", "#7d6a3c"


def picture(name: str, stack: settings.Settings) -> Picture:
    """The platform: the way in from outside, the host with its cluster, what is kept where."""
    outside = [*_cloudflare(stack), *_lan(stack.network)]
    curves = [
        (f"{tunnel}/{route.hostname}{route.path or ''}", f"{tunnel}>{route.service}")
        for tunnel, one in stack.tunnels.items()
        for route in one.routes
    ]
    if stack.network.traefik:
        curves.append(("lan/ingress", "ingress"))
    columns = [outside, [_host(name, stack)], [*_stores(stack)]]
    return Picture(f"{name}: the declared platform", [one for one in columns if one], curves)


def _cloudflare(stack: settings.Settings) -> Iterator[Box]:
    for name, tunnel in stack.tunnels.items():
        lines = [
            Line(
                f"{route.hostname}{route.path or ''}",
                "login" if route.access else "public",
                f"{name}/{route.hostname}{route.path or ''}",
            )
            for route in tunnel.routes
        ]
        yield Box(f"Cloudflare: DNS and tunnel {name}", lines, color=_CLOUDFLARE)


def _lan(network: settings.Network) -> Iterator[Box]:
    if network.lan is None:
        return
    lan = network.lan
    lines = [Line("router", lan.gateway)]
    if lan.dhcp:
        lines.append(Line("DHCP", lan.dhcp))
    lines += [Line(name, address) for name, address in lan.reserved.items()]
    if network.traefik:
        lines.append(Line("ingress", network.traefik.address, "lan/ingress"))
    if network.multus:
        lines += [
            Line(f"pods in {one.name}", one.ipam.range or one.ipam.type)
            for one in network.multus.networks
            if one.type == "macvlan"
        ]
    yield Box(f"LAN {lan.subnet}", lines, color=_LAN)


def _host(name: str, stack: settings.Settings) -> Box:
    cluster = stack.cluster
    inside = [_cluster(stack)]
    lines = []
    for key, tunnel in stack.tunnels.items():
        if not isinstance(tunnel.connector, settings.HostConnector):
            continue
        lines.append(Line(tunnel.connector.container, "container"))
        lines += [Line(_place(one.service), "", f"{key}>{one.service}") for one in tunnel.routes]
    if lines:
        inside.append(Box("On the host", lines, color=_HOST))
    if isinstance(cluster, settings.K3dCluster):
        host = stack.host.name or stack.host.address or name
        return Box(f"Host {host}: Docker", (), inside, _HOST)
    nodes = [Line(key, _node(node)) for key, node in cluster.nodes.items()]
    return Box(f"{len(nodes)} machines", nodes, inside, _HOST)


def _node(node: settings.K3sNode | settings.Node) -> str:
    role = f"{node.role}, " if isinstance(node, settings.K3sNode) else ""
    return f"{role}{node.address}"


def _cluster(stack: settings.Settings) -> Box:
    cluster, network = stack.cluster, stack.network
    if isinstance(cluster, settings.K3dCluster):
        title = f"k3d cluster {cluster.name}" + ("" if cluster.enabled else " (off)")
        nodes = f"{cluster.servers} server(s), {cluster.agents} agent(s)"
        lines = [
            Line(cluster.image.partition("@")[0], nodes),
            Line("API", f"{cluster.api.bind}:{cluster.api.port}"),
        ]
        if cluster.network.subnet:
            lines.append(Line("Docker network", cluster.network.subnet))
    elif isinstance(cluster, settings.K3sCluster):
        title = f"k3s cluster {cluster.name}"
        lines = [Line(f"k3s {cluster.version}", cluster.datastore)]
        if cluster.virtual_ip:
            lines.append(Line("API", cluster.virtual_ip.address))
    else:
        title = f"cluster {cluster.name}, made by others"
        lines = [
            Line("pods", str(cluster.pod_subnet)),
            Line("Services", str(cluster.service_subnet)),
        ]
    if network.traefik:
        lines.append(Line("Traefik", "ingress", "ingress"))
    if network.metallb:
        lines.append(Line("MetalLB", ", ".join(one.addresses for one in network.metallb.pools)))
    if network.multus:
        lines.append(Line("Multus", f"on {network.multus.interface}"))
    return Box(title, lines, list(_namespaces(stack)), _CLUSTER)


def _namespaces(stack: settings.Settings) -> Iterator[Box]:
    secrets: dict[str, int] = {}
    for secret in stack.declared_secrets():
        secrets[secret.namespace] = secrets.get(secret.namespace, 0) + 1
    lines: dict[str, list[Line]] = {name: [] for name in stack.declared_namespaces()}
    for name, tunnel in stack.tunnels.items():
        connector = tunnel.connector
        if isinstance(connector, settings.HostConnector):
            continue
        if isinstance(connector, settings.ClusterConnector):
            lines[connector.namespace].append(
                Line("cloudflared", f"tunnel {name}, {connector.replicas} pod(s)", f"pods/{name}")
            )
        for route in tunnel.routes:
            # One whose origin is no Service is reached through the connector's own pod.
            home = route.namespace or getattr(connector, "namespace", None)
            key = f"{name}>{route.service}"
            where = lines.setdefault(home or "default", [])
            if all(line.key != key for line in where):
                where.append(Line(_place(route.service), "", key))
    if stack.argocd:
        source = urlsplit(stack.argocd.repository).path.strip("/").removesuffix(".git")
        lines.setdefault(stack.argocd.namespace, []).append(Line("ArgoCD", f"from {source}"))
    for namespace, found in sorted(lines.items(), key=lambda one: (not _is_target(one[1]), one[0])):
        count = secrets.get(namespace, 0)
        if count:
            found = [*found, Line(f"{count} Secret{'s' if count > 1 else ''}", "", f"#{namespace}")]
        yield Box(namespace, found, color=_NAMESPACE)


def _is_target(lines: list[Line]) -> bool:
    return any(">" in line.key for line in lines)


def _place(service: str) -> str:
    """The origin in short: the Service's name and port, for one of the cluster."""
    parts = urlsplit(service)
    host = (parts.hostname or service).removesuffix(".svc.cluster.local").partition(".")[0]
    return f"{host}:{parts.port}" if parts.port else host


def _stores(stack: settings.Settings) -> Iterator[Box]:
    cluster, storage = stack.cluster, stack.storage
    lines = []
    if isinstance(cluster, settings.K3dCluster):
        lines.append(Line("volumes", cluster.storage_dir))
        if cluster.datastore_dir:
            lines.append(Line("datastore", cluster.datastore_dir))
        lines.append(Line("kubeconfig", cluster.kubeconfig.path))
    if lines:
        yield Box("On the host's disks", lines, color=_STORE)
    classes = [
        Line(name, one.kind + (", default" if name == storage.default else ""), f"class/{name}")
        for name, one in storage.classes.items()
    ]
    if storage.default and storage.default not in storage.classes:
        classes.insert(0, Line(storage.default, "default"))
    if classes:
        yield Box("Storage classes", classes, color=_STORE)
    elsewhere = [
        Line(one.server, str(one.share), f"nfs/{name}")
        for name, one in storage.classes.items()
        if isinstance(one, settings.NfsClass)
    ]
    if storage.longhorn and storage.longhorn.backups:
        elsewhere.append(Line("Longhorn's backups", storage.longhorn.backups.target))
    if elsewhere:
        yield Box("Shares", elsewhere, color=_STORE)
    backups = [
        Line(name, f"{item.kind}, {stack.backups.schedule}", f"backup/{name}")
        for name, item in stack.backups.items.items()
    ]
    if backups:
        yield Box("Backups", backups, color=_STORE)
