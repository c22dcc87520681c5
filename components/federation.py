"""Other clusters that this stack's ArgoCD deploys to."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pulumi
import pulumi_kubernetes as kubernetes
import yaml

import homelab
from components import settings
from components.cluster import Cluster
from components.host import HostError

_SECRET_TYPE = "argocd.argoproj.io/secret-type"


def read_kubeconfigs(argocd: settings.ArgoCD, stack: str) -> None:
    """Refuses what cannot be registered before the first resource, as far as it is known now: a
    kubeconfig of the settings that is of no use, and a stack that would register itself.

    Raises HostError with all of them.
    """
    problems: list[str] = []
    for name, member in argocd.clusters.items():
        if member.kubeconfig is not None:
            try:
                credentials(member.kubeconfig.get_secret_value(), member.server)
            except _Unusable as problem:
                problems.append(f"  homelab:argocd.clusters.{name}.{problem}")
        elif member.stack and member.stack.rpartition("/")[2] == stack:
            problems.append(
                f"  homelab:argocd.clusters.{name}.stack: {member.stack} is this stack itself."
                " Remedy: remove it; ArgoCD knows its own cluster as in-cluster."
            )
    if problems:
        raise HostError("ArgoCD cannot have these clusters:\n" + "\n".join(problems))


@dataclass(frozen=True)
class FederationArgs:
    settings: settings.ArgoCD
    cluster: Cluster
    after: Sequence[pulumi.Resource]
    """Namespace and bootstrap of ArgoCD."""
    bootstrapped: bool
    """Whether ArgoCD is there, which brings the kind ApplicationSet."""


class Federation(pulumi.ComponentResource):
    """A cluster Secret of ArgoCD for each other cluster, and ApplicationSets over them.

    What ArgoCD may do there is what the other stack gave the service account whose token is used.
    An ApplicationSet that goes leaves what it deployed where it is.
    """

    def __init__(
        self, name: str, args: FederationArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Federation", name, None, opts)
        self._args = args
        self._options = pulumi.ResourceOptions(
            parent=self,
            provider=args.cluster.provider,
            deleted_with=args.cluster.identity,
            depends_on=list(args.after),
        )
        members = [
            self._register(member, wanted) for member, wanted in args.settings.clusters.items()
        ]
        if args.bootstrapped:
            for each, wanted in args.settings.application_sets.items():
                self._applications(each, wanted, members)
        self.register_outputs({})

    def _register(self, name: str, member: settings.MemberCluster) -> pulumi.Resource:
        namespace = self._args.settings.namespace
        return kubernetes.core.v1.Secret(
            f"{namespace}/cluster-{name}",
            metadata={
                "name": f"cluster-{name}",
                "namespace": namespace,
                "labels": {
                    **member.labels,
                    _SECRET_TYPE: "cluster",
                    "app.kubernetes.io/managed-by": "pulumi",
                },
            },
            data=self._kubeconfig(name, member).apply(lambda text: _data(name, member, text)),
            opts=self._options,
        )

    def _kubeconfig(self, name: str, member: settings.MemberCluster) -> pulumi.Output[str]:
        if member.kubeconfig is not None:
            return pulumi.Output.secret(member.kubeconfig.get_secret_value())
        assert member.stack is not None
        platform = homelab.Platform(member.stack, pulumi.ResourceOptions(parent=self))
        account = member.service_account

        def found(accounts: Mapping[str, str]) -> str:
            if not accounts.get(account):
                namespace, _, short = account.partition("/")
                raise pulumi.RunError(
                    f"homelab:argocd.clusters.{name}: stack {member.stack} has no lasting token of"
                    f" service account {account}; it has {', '.join(sorted(accounts)) or 'none'}."
                    f" Remedy: declare homelab:access.serviceAccounts.{namespace}.{short} there"
                    " with token: secret, and bring it up (pulumi up)."
                )
            return accounts[account]

        return pulumi.Output.secret(platform.service_accounts.apply(found))

    def _applications(
        self, name: str, wanted: settings.ApplicationSet, members: Sequence[pulumi.Resource]
    ) -> None:
        argocd = self._args.settings
        kubernetes.apiextensions.CustomResource(
            f"{argocd.namespace}/{name}",
            api_version="argoproj.io/v1alpha1",
            kind="ApplicationSet",
            metadata={"name": name, "namespace": argocd.namespace},
            spec={
                "goTemplate": True,
                "goTemplateOptions": ["missingkey=error"],
                # The label leaves out the cluster that ArgoCD itself runs in, which has no Secret.
                "generators": [
                    {
                        "clusters": {
                            "selector": {"matchLabels": {**wanted.labels, _SECRET_TYPE: "cluster"}}
                        }
                    }
                ],
                "template": {
                    "metadata": {"name": f"{name}-{{{{.name}}}}"},
                    "spec": {
                        "project": wanted.project,
                        "source": {
                            "repoURL": wanted.repository or argocd.repository,
                            "path": wanted.path.replace("{cluster}", "{{.name}}"),
                            "targetRevision": wanted.ref,
                        },
                        "destination": {
                            "server": "{{.server}}",
                            "namespace": wanted.namespace,
                        },
                        "syncPolicy": {"automated": {"prune": wanted.prune, "selfHeal": True}},
                    },
                },
                "syncPolicy": {"preserveResourcesOnDeletion": True},
            },
            opts=pulumi.ResourceOptions.merge(
                self._options, pulumi.ResourceOptions(depends_on=list(members))
            ),
        )


class _Unusable(Exception):
    """A kubeconfig that ArgoCD cannot use. Its text names a key of the settings, and no content."""


def credentials(kubeconfig: str, server: str | None) -> tuple[str, dict[str, Any]]:
    """Address of the API, and `config` of a cluster Secret, from a kubeconfig's current context."""
    try:
        given = yaml.safe_load(kubeconfig)
        contexts = {one["name"]: one["context"] for one in given["contexts"]}
        context = contexts[given.get("current-context") or next(iter(contexts))]
        target = next(o["cluster"] for o in given["clusters"] if o["name"] == context["cluster"])
        user = next(one["user"] for one in given["users"] if one["name"] == context["user"])
        address, authority = server or target["server"], target["certificate-authority-data"]
        base64.b64decode(authority, validate=True)
    except (yaml.YAMLError, AttributeError, KeyError, StopIteration, TypeError, binascii.Error):
        raise _Unusable(
            "kubeconfig: it is no kubeconfig with certificate-authority-data. Remedy: kubectl"
            " config view --raw --minify --flatten --context=CONTEXT."
        ) from None
    host = urlsplit(address).hostname or ""
    if host in ("localhost", "0.0.0.0", "::1", "::") or host.startswith("127."):
        raise _Unusable(
            f"server: the API is at {address}, which inside ArgoCD's pods is the pod itself."
            " Remedy: bind the other cluster's API to an address that this cluster's pods reach"
            " (there: homelab:cluster.api.bind, with serverName for the certificate), such as the"
            " LAN's or the tailnet's, or write such an address here, for which the API's"
            " certificate must hold."
        )
    tls: dict[str, Any] = {"caData": authority}
    if "token" in user:
        return address, {"bearerToken": user["token"], "tlsClientConfig": tls}
    if {"client-certificate-data", "client-key-data"} <= user.keys():
        tls |= {"certData": user["client-certificate-data"], "keyData": user["client-key-data"]}
        return address, {"tlsClientConfig": tls}
    raise _Unusable(
        "kubeconfig: its user has neither a token nor client-certificate-data and client-key-data."
        " Remedy: use the kubeconfig of a service account; a plug-in for logging in (exec) does"
        " not run in ArgoCD."
    )


def _data(name: str, member: settings.MemberCluster, kubeconfig: str) -> dict[str, str]:
    try:
        address, config = credentials(kubeconfig, member.server)
    except _Unusable as problem:
        raise pulumi.RunError(f"homelab:argocd.clusters.{name}.{problem}") from None
    texts = {"name": name, "server": address, "config": json.dumps(config)}
    if member.namespaces:
        texts |= {"namespaces": ",".join(member.namespaces), "clusterResources": "false"}
    return {key: base64.b64encode(text.encode()).decode() for key, text in texts.items()}
