"""The platform of one host on one screen: what is there, the cluster, what lives in it, outputs."""

import gc

# The providers' SDKs and all resources live to the end of this short run. Walking them again and
# again in search of garbage took a third of a preview's CPU time.
gc.disable()

import pulumi

import homelab
from components import debug, settings
from components.argocd import ArgoCD, ArgoCDArgs, Revision
from components.cluster import kinds
from components.host import Connection, Host, docker_engine, together
from components.namespaces import Namespaces, NamespacesArgs
from components.network.metallb import MetalLB, MetalLBArgs
from components.network.traefik import Traefik, TraefikArgs
from components.ownership import refuse_two_owners
from components.secrets import Secrets, SecretsArgs, read_values
from components.storage.live import check_classes, check_nodes
from components.storage.tiers import Storage, StorageArgs
from components.tailscale import TailscaleOperator, TailscaleOperatorArgs, warn_of_sidecars

debug.keep_outputs_out_of_messages()
stack = settings.load()
name = stack.cluster.name

# All that can refuse comes before the first resource.
connection = Connection(stack.host)
live, revision, values = connection.read(
    together(
        kinds.read(stack, connection),
        Revision.read(stack.argocd, name),
        read_values(stack.declared_secrets(), stack.host),
    )
)
if live.answers:
    connection.read(
        together(
            refuse_two_owners(stack.tunnels, name, live.kubeconfig),
            check_classes(stack.storage, name, live.kubeconfig),
        )
    )
check_nodes(stack.storage, live.nodes, stack.node_names)
live.announce()
if stack.tailscale:
    warn_of_sidecars(stack.tailscale)
for warning in stack.warnings:
    pulumi.log.warn(warning)

host = Host(pulumi.get_stack(), connection, k3d=stack.host.k3d)
engine = docker_engine(stack.host, connection) if stack.needs_docker else None
declared = live.declare(host, engine)
cluster = declared.cluster
namespaces = ingress = argocd = None
if cluster:
    owners = stack.declared_namespaces()
    namespaces = Namespaces(name, NamespacesArgs(owners, cluster, stack.storage.namespaces))
    secrets = Secrets(name, SecretsArgs(values, namespaces, cluster))
    if stack.storage.classes or stack.storage.runs_local_path:
        Storage(name, StorageArgs(stack.storage, cluster, after=[namespaces, secrets]))
    if stack.argocd and revision:
        bootstrap = ArgoCDArgs(stack.argocd, revision, cluster, after=[namespaces, secrets])
        argocd = ArgoCD(name, bootstrap)
if cluster and stack.network.metallb:
    metallb = MetalLB(name, MetalLBArgs(stack.network.metallb, cluster))
    if stack.network.traefik:
        ingress = Traefik(name, TraefikArgs(stack.network.traefik, cluster, after=[metallb]))
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

homelab.export(
    cluster=declared.output,
    acceptance=declared.acceptance,
    kubeconfig=declared.kubeconfig,
    namespaces=namespaces.names if namespaces else [],
    ingress=ingress and ingress.address,
    argocd=argocd and argocd.output,
    tunnels={key: made.output for key, made in tunnels.items()},
    urls=pulumi.Output.all(*(made.urls for made in tunnels.values())).apply(
        lambda urls: {hostname: url for each in urls for hostname, url in each.items()}
    ),
)
