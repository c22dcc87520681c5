"""The platform of one host on one screen: what is there, the cluster, what lives in it, outputs."""

import gc

# The providers' SDKs and all resources live to the end of this short run. Walking them again and
# again in search of garbage took a third of a preview's CPU time.
gc.disable()

import pulumi
import pulumi_docker as docker

import homelab
from components import debug, settings
from components.argocd import ArgoCD, ArgoCDArgs, Revision
from components.cluster import Cluster
from components.cluster.k3d import K3dCluster, K3dClusterArgs, LiveCluster
from components.cluster.kubeconfig import Kubeconfig, KubeconfigArgs
from components.host import Connection, Host
from components.namespaces import Namespaces, NamespacesArgs
from components.ownership import refuse_two_owners
from components.secrets import Secrets, SecretsArgs, read_values
from components.storage import LocalStorage, LocalStorageArgs
from components.tailscale import TailscaleOperator, TailscaleOperatorArgs, warn_of_sidecars
from components.units import LiveUnits, Units, UnitsArgs

debug.keep_outputs_out_of_messages()
stack = settings.load()
name = stack.cluster.name

# All that can refuse comes before the first resource.
connection = Connection(stack.host)
live = LiveCluster.read(stack.cluster, connection, installs_k3d=stack.host.k3d.install)
units = LiveUnits.read(stack, connection)
revision = stack.argocd and Revision.read(stack.argocd, name, connection)
values = read_values(stack.declared_secrets(), stack.host, connection)
if live.state == "running":
    refuse_two_owners(stack.tunnels, name, connection)
live.announce(stack.cluster, connection.name)
units.announce(connection.name)
if stack.tailscale:
    warn_of_sidecars(stack.tailscale)
for warning in stack.warnings:
    pulumi.log.warn(warning)

host = Host(pulumi.get_stack(), connection, k3d=stack.host.k3d)
engine = docker.Provider("docker", host=stack.host.docker, ssh_opts=connection.ssh_options or None)
k3d = K3dCluster(name, K3dClusterArgs(stack.cluster, live, host, engine))
kubeconfig = Kubeconfig(name, KubeconfigArgs(stack.cluster, live, host, k3d))
cluster = Cluster(
    name=name,
    provider=kubeconfig.provider,
    identity=k3d.identity,
    kubeconfig=kubeconfig.path,
    host=host,
    incarnation=live.incarnation,
    anew=live.anew,
)
LocalStorage(name, LocalStorageArgs(stack.cluster.storage_class, cluster))
Units(name, UnitsArgs(stack, units, host, after=[k3d]))
namespaces = Namespaces(name, NamespacesArgs(stack.declared_namespaces(), cluster))
secrets = Secrets(name, SecretsArgs(values, namespaces, cluster))
argocd = None
if stack.argocd and revision:
    argocd = ArgoCD(name, ArgoCDArgs(stack.argocd, revision, cluster, after=[namespaces, secrets]))
tunnels = {}
if stack.tunnels and stack.cloudflare:
    # Not above: Cloudflare's package costs seconds, and only who has a tunnel pays.
    from components.tunnel import CloudflareTunnel, CloudflareTunnelArgs, cloudflare_provider

    account = cloudflare_provider(stack.cloudflare)
    for key, tunnel in stack.tunnels.items():
        args = CloudflareTunnelArgs(
            stack.cloudflare, tunnel, account, engine, cluster, [namespaces]
        )
        tunnels[key] = CloudflareTunnel(key, args)
if stack.tailscale and stack.tailscale.operator:
    operator = TailscaleOperatorArgs(stack.tailscale.operator, cluster, after=[namespaces])
    TailscaleOperator(name, operator)

homelab.export(
    cluster=k3d.output,
    acceptance=k3d.acceptance,
    kubeconfig=kubeconfig.content,
    namespaces=namespaces.names,
    argocd=argocd and argocd.output,
    tunnels={key: made.output for key, made in tunnels.items()},
    urls=pulumi.Output.all(*(made.urls for made in tunnels.values())).apply(
        lambda urls: {hostname: url for each in urls for hostname, url in each.items()}
    ),
)
