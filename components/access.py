"""Who may do what in the cluster: service accounts, roles and bindings, and kubeconfigs for
programs that are elsewhere.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pulumi
import pulumi_kubernetes as kubernetes
import yaml

from components import settings
from components.cluster import Cluster
from components.settings.access import BUILT_IN_ROLES, Binding

_RBAC = "rbac.authorization.k8s.io"
_LABELS = {"app.kubernetes.io/managed-by": "pulumi"}
_SERVICE_ACCOUNT = "kubernetes.io/service-account.name"


@dataclass(frozen=True)
class AccessArgs:
    settings: settings.ClusterAccess
    cluster: Cluster
    kubeconfig: pulumi.Input[str]
    """The administrator's, of which the address and the CA are used."""
    after: Sequence[pulumi.Resource]
    """The namespaces."""


class Access(pulumi.ComponentResource):
    """Service accounts, roles and bindings. People need no object: RBAC knows them by their names.

    A service account with a lasting token has it in a Secret that the cluster fills in, and that is
    gone, with the token, when the account is taken out of the settings or no longer wants it.
    """

    kubeconfigs: dict[str, pulumi.Output[str]]
    """YAML text by namespace/name of each service account with a lasting token; secret."""

    def __init__(
        self, name: str, args: AccessArgs, opts: pulumi.ResourceOptions | None = None
    ) -> None:
        super().__init__("homelab:index:Access", name, None, opts)
        self._args = args
        self._options = pulumi.ResourceOptions(
            parent=self,
            provider=args.cluster.provider,
            deleted_with=args.cluster.identity,
            depends_on=list(args.after),
        )
        self.kubeconfigs = {}
        accounts: dict[str, pulumi.Resource] = {}
        for namespace, declared in args.settings.service_accounts.items():
            for account, wanted in declared.items():
                key = f"{namespace}/{account}"
                accounts[key] = made = kubernetes.core.v1.ServiceAccount(
                    key,
                    metadata={"name": account, "namespace": namespace, "labels": _LABELS},
                    automount_service_account_token=wanted.automount,
                    opts=self._options,
                )
                if wanted.token == "secret":
                    self.kubeconfigs[key] = self._kubeconfig(namespace, account, made)
        roles: dict[str, pulumi.Resource] = {
            role: self._role(role, wanted) for role, wanted in args.settings.roles.items()
        }
        for binding, wanted in args.settings.bindings.items():
            needs = [roles[wanted.role]] if wanted.role in roles else []
            needs += [accounts[key] for key in wanted.service_accounts if key in accounts]
            self._bind(binding, wanted, needs)
        self.register_outputs({"kubeconfigs": self.kubeconfigs})

    def _kubeconfig(
        self, namespace: str, account: str, made: kubernetes.core.v1.ServiceAccount
    ) -> pulumi.Output[str]:
        secret = kubernetes.core.v1.Secret(
            f"{namespace}/{account}-token",
            metadata={
                "name": f"{account}-token",
                "namespace": namespace,
                "labels": _LABELS,
                "annotations": {_SERVICE_ACCOUNT: account},
            },
            type="kubernetes.io/service-account-token",
            opts=pulumi.ResourceOptions.merge(
                self._options,
                pulumi.ResourceOptions(depends_on=[made], additional_secret_outputs=["data"]),
            ),
        )
        name = self._args.cluster.name
        return pulumi.Output.secret(
            pulumi.Output.all(self._args.kubeconfig, secret.data).apply(
                lambda known: account_kubeconfig(known[0], name, namespace, account, known[1])
            )
        )

    def _role(self, name: str, role: settings.Role) -> pulumi.Resource:
        rules: list[Any] = [_rule(rule) for rule in role.rules]
        if role.namespace is None:
            return kubernetes.rbac.v1.ClusterRole(
                name, metadata={"name": name, "labels": _LABELS}, rules=rules, opts=self._options
            )
        return kubernetes.rbac.v1.Role(
            f"{role.namespace}/{name}",
            metadata={"name": name, "namespace": role.namespace, "labels": _LABELS},
            rules=rules,
            opts=self._options,
        )

    def _bind(self, name: str, binding: Binding, needs: Sequence[pulumi.Resource]) -> None:
        role = self._args.settings.roles.get(binding.role)
        own = binding.role not in BUILT_IN_ROLES and role is not None and role.namespace
        role_ref: kubernetes.rbac.v1.RoleRefArgsDict = {
            "api_group": _RBAC,
            "kind": "Role" if own else "ClusterRole",
            "name": binding.role,
        }
        subjects: list[Any] = [_subject(key, subject) for key, subject in binding.subjects]
        # Another role is another binding to Kubernetes, under the same name.
        options = pulumi.ResourceOptions.merge(
            self._options,
            pulumi.ResourceOptions(depends_on=list(needs), delete_before_replace=True),
        )
        if binding.everywhere:
            kubernetes.rbac.v1.ClusterRoleBinding(
                name,
                metadata={"name": name, "labels": _LABELS},
                role_ref=role_ref,
                subjects=subjects,
                opts=options,
            )
        for namespace in binding.namespaces:
            kubernetes.rbac.v1.RoleBinding(
                f"{namespace}/{name}",
                metadata={"name": name, "namespace": namespace, "labels": _LABELS},
                role_ref=role_ref,
                subjects=subjects,
                opts=options,
            )


def account_kubeconfig(
    administrator: str, cluster: str, namespace: str, account: str, data: Any
) -> str:
    """A kubeconfig in which the token of a service account takes the administrator's place."""
    given = yaml.safe_load(administrator)
    token = base64.b64decode((data or {}).get("token", "")).decode()
    if not token:
        raise pulumi.RunError(
            f"Secret {namespace}/{account}-token holds no token yet. Remedy: pulumi up --refresh;"
            " if it stays empty, the cluster's token controller does not run."
        )
    user = f"{account}@{cluster}"
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": cluster, "cluster": given["clusters"][0]["cluster"]}],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [
            {"name": user, "context": {"cluster": cluster, "user": user, "namespace": namespace}}
        ],
        "current-context": user,
    }
    return yaml.safe_dump(made, sort_keys=False, width=1_000_000)


def _rule(rule: settings.PolicyRule) -> dict[str, Any]:
    if rule.non_resource_urls:
        return {"non_resource_urls": rule.non_resource_urls, "verbs": rule.verbs}
    names = {"resource_names": rule.resource_names} if rule.resource_names else {}
    groups = rule.api_groups or [""]
    return {"api_groups": groups, "resources": rule.resources, "verbs": rule.verbs, **names}


def _subject(key: str, name: str) -> dict[str, str]:
    if key == "serviceAccounts":
        namespace, _, account = name.partition("/")
        return {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    return {"kind": "User" if key == "users" else "Group", "name": name, "api_group": _RBAC}
