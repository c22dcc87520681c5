"""The platform of one host on one screen: what is there, the cluster, what lives in it, outputs."""

import gc

# The providers' SDKs and all resources live to the end of this short run. Walking them again and
# again in search of garbage took a third of a preview's CPU time.
gc.disable()

import pulumi

import homelab
from components import debug, settings
from components.access import Access, AccessArgs
from components.argocd import ArgoCD, ArgoCDArgs, Revision
from components.cluster import kinds
from components.federation import Federation, FederationArgs, read_kubeconfigs
from components.host import Connection, Host, docker_engine, together
from components.namespaces import Namespaces, NamespacesArgs
from components.network.metallb import MetalLB, MetalLBArgs
from components.network.multus import Multus, MultusArgs
from components.network.traefik import Traefik, TraefikArgs
from components.ownership import Ownership
from components.permissions import Permissions
from components.secrets import Secrets, SecretsArgs, read_values
from components.storage.live import check_classes, check_nodes
from components.storage.tiers import Storage, StorageArgs
from components.tailscale import TailscaleOperator, TailscaleOperatorArgs, warn_of_sidecars

debug.keep_outputs_out_of_messages()
stack = settings.load()
name = stack.cluster.name

# All that can refuse comes before the first resource.
connection = Connection(stack.host)
permissions = Permissions.read(stack)
if stack.argocd:
    read_kubeconfigs(stack.argocd, pulumi.get_stack())
live, revision, values = connection.read(
    together(
        kinds.read(stack, connection),
        Revision.read(stack.argocd, name),
        read_values(stack.declared_secrets(), stack.host),
    )
)
ownership = Ownership(frozenset(stack.handed_over))
if live.answers:
    ownership, _ = connection.read(
        together(
            Ownership.read(stack, live.kubeconfig),
            check_classes(stack.storage, name, live.kubeconfig, stack.storage_class),
        )
    )
check_nodes(stack.storage, live.nodes, stack.node_names)
if permissions:
    permissions.check()
live.announce()
if stack.tailscale:
    warn_of_sidecars(stack.tailscale)
for warning in stack.warnings:
    pulumi.log.warn(warning)

ownership.guard()
host = Host(pulumi.get_stack(), connection, k3d=stack.host.k3d)
engine = docker_engine(stack.host, connection) if stack.needs_docker else None
declared = live.declare(host, engine)
cluster = declared.cluster
network = stack.network
namespaces = access = ingress = argocd = None
if cluster and declared.kubeconfig:
    owners = stack.declared_namespaces()
    security, own = stack.pod_security(), stack.own_namespaces()
    limits = NamespacesArgs(owners, cluster, stack.namespaces, security, own)
    namespaces = Namespaces(name, limits)
    if stack.access:
        grants = AccessArgs(stack.access, cluster, declared.kubeconfig, after=[namespaces])
        access = Access(name, grants)
    secrets = Secrets(name, SecretsArgs(values, namespaces, cluster))
    if stack.storage.classes or stack.storage.runs_local_path:
        Storage(name, StorageArgs(stack.storage, cluster, after=[namespaces, secrets]))
    if network.multus and network.lan and stack.cluster.kind == "k3d":
        lan = MultusArgs(network.multus, network.lan, stack.cluster.cni, cluster, [namespaces])
        Multus(name, lan)
    if network.metallb:
        metallb = MetalLB(name, MetalLBArgs(network.metallb, cluster))
        if network.traefik:
            ingress = Traefik(name, TraefikArgs(network.traefik, cluster, after=[metallb]))
    if stack.argocd and revision:
        bootstrap = ArgoCDArgs(stack.argocd, revision, cluster, after=[namespaces, secrets])
        argocd = ArgoCD(name, bootstrap)
        if stack.argocd.clusters:
            there = bool(revision.commit)
            Federation(name, FederationArgs(stack.argocd, cluster, [namespaces, argocd], there))
tunnels = {}
if stack.tunnels and stack.cloudflare:
    # Not above: Cloudflare's package costs seconds, and only who has a tunnel pays.
    from components.tunnel import CloudflareTunnel, CloudflareTunnelArgs, cloudflare_provider

    account = cloudflare_provider(stack.cloudflare)
    for key, tunnel in stack.tunnels.items():
        after = [namespaces] if namespaces else []
        args = CloudflareTunnelArgs(stack.cloudflare, tunnel, account, engine, cluster, after, host)
        tunnels[key] = CloudflareTunnel(key, args)
if namespaces and cluster and stack.tailscale and stack.tailscale.operator:
    operator = TailscaleOperatorArgs(stack.tailscale.operator, cluster, after=[namespaces])
    TailscaleOperator(name, operator)

ownership.settle()
homelab.export(
    cluster=declared.output,
    acceptance=declared.acceptance,
    kubeconfig=declared.kubeconfig,
    namespaces=namespaces.names if namespaces else [],
    service_accounts=access and access.kubeconfigs,
    ingress=ingress and ingress.address,
    argocd=argocd and argocd.output,
    tunnels={key: made.output for key, made in tunnels.items()},
    urls=pulumi.Output.all(*(made.urls for made in tunnels.values())).apply(
        lambda urls: {hostname: url for each in urls for hostname, url in each.items()}
    ),
    backups=declared.backups,
)
