"""Who may do what in the cluster: people, service accounts, roles, and who has which.

Kubernetes authenticates people from outside: by client certificates that its CA signed, or by an
OpenID provider. A stack only gives their names something to do.
"""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from components.settings.audit import UserName
from components.settings.model import Model, Name, ObjectName, Text
from components.settings.problem import Path, Problem, key_path

BUILT_IN_ROLES = ("view", "edit", "admin", "cluster-admin")

# Who has not said who they are. Whatever is granted to them is granted to everyone who reaches the
# API server.
_ANYONE = frozenset({"system:anonymous", "system:unauthenticated"})
# Every pod, or whoever has any credentials at all.
_EVERYONE = frozenset({"system:authenticated", "system:serviceaccounts"})

_WILDCARD = r"\*"
RuleGroup = Annotated[
    str,
    Text(
        'an API group such as apps, "" for the core one, or * for all',
        "write it as `kubectl api-resources` shows it, without the version",
        "apps",
        rf"{_WILDCARD}|(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*)?",
    ),
]
RuleResource = Annotated[
    str,
    Text(
        "a resource in its plural such as pods, a part of it such as pods/log, or * for all",
        "write it as `kubectl api-resources` shows it",
        "pods",
        rf"{_WILDCARD}(?:/[a-z]+)?|[a-z][a-z0-9-]*(?:/(?:[a-z][a-z0-9-]*|{_WILDCARD}))?",
    ),
]
RuleVerb = Annotated[
    str,
    Text(
        "a verb such as get, list, watch, create, update, patch, delete, or * for all",
        "write it in lower case",
        "get",
        rf"{_WILDCARD}|[a-z]+",
    ),
]
RuleUrl = Annotated[
    str,
    Text(
        "a path of the API server such as /healthz or /metrics, perhaps with /* at its end",
        "write it from / on",
        "/healthz",
        r"/[A-Za-z0-9._/-]*\*?|\*",
    ),
]
AccountReference = Annotated[
    str,
    Text(
        "a service account as namespace/name",
        "write both, parted by one /",
        "factory/deployer",
        r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?/[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?",
    ),
]
BoundRole = Annotated[
    str,
    Text(
        "view, edit, admin, cluster-admin, or a role of homelab:access.roles",
        "write one of them",
        "view",
        r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?",
    ),
]


class User(Model):
    """A person as the API server sees them. Nothing is made for them: RBAC knows only the name."""

    kind: Literal["certificate", "oidc"] = Field(
        description="How they log in: by a client certificate whose common name is theirs "
        "(`certificate`, docs/access.md), or by the API server's OpenID provider (`oidc`)."
    )
    groups: list[UserName] = Field(
        default=[],
        description="Groups that the certificate's organizations, or the provider, say.",
    )


class ServiceAccount(Model):
    """An account for a program, in or outside the cluster."""

    token: Literal["short", "secret"] = Field(
        default="short",
        description="`short`: tokens that end, by `kubectl create token` or mounted into its pods. "
        "`secret`: one that lasts, in a Secret of its own and as a kubeconfig in the stack's "
        "outputs, for a program elsewhere.",
    )
    automount: bool = Field(
        default=False,
        strict=True,
        description="Whether pods that run as it get a token without asking.",
    )


class PolicyRule(Model):
    """What may be done with which resources."""

    api_groups: list[RuleGroup] = Field(
        default=[], description='API groups; "" is the core one, and what is meant without any.'
    )
    resources: list[RuleResource] = Field(default=[], description="Resources in their plural.")
    resource_names: list[ObjectName] = Field(
        default=[], description="Only objects of these names; all without."
    )
    non_resource_urls: list[RuleUrl] = Field(
        default=[], description="Paths of the API server in place of resources; cluster-wide only."
    )
    verbs: list[RuleVerb] = Field(description="What may be done.")
    wildcard: bool = Field(
        default=False,
        strict=True,
        description="Says that a * in this rule is meant: it also grants what is added later.",
    )

    @property
    def wild(self) -> bool:
        parts = [*self.api_groups, *self.resources, *self.verbs, *self.non_resource_urls]
        return any("*" in part for part in parts)

    def problems(self, path: Path, namespace: str | None) -> Iterator[Problem]:
        """What is wrong across the fields of a rule, in a role of ``namespace``."""
        if self.wild != self.wildcard:
            yield Problem(
                path if self.wild else (*path, "wildcard"),
                None if self.wild else True,
                "a rule that names what it grants, or a * together with wildcard: true",
                "name groups, resources and verbs, or say that all are meant with wildcard: true"
                if self.wild
                else "remove it",
                "holds a wildcard and does not say so" if self.wild else "is said of no wildcard",
            )
        if not self.verbs or bool(self.resources) == bool(self.non_resource_urls):
            yield Problem(
                path,
                None,
                "verbs, with either resources or nonResourceUrls",
                "write what may be done, and with what",
                "grants nothing, or two things at once",
            )
        if self.non_resource_urls and namespace:
            yield Problem(
                (*path, "nonResourceUrls"),
                None,
                "this key in a role without a namespace",
                "remove the role's namespace: paths of the API server lie in none",
                "lies in no namespace",
                [(*path[:-2], "namespace")],
            )
        if self.resource_names and {"create", "list", "watch", "deletecollection"} & set(
            self.verbs
        ):
            yield Problem(
                (*path, "resourceNames"),
                None,
                "names with verbs that name an object: get, update, patch, delete",
                "give the other verbs a rule of their own",
                "does not hold for create, list, watch and deletecollection",
                [(*path, "verbs")],
            )


class Role(Model):
    """A Role of one namespace, or a ClusterRole."""

    namespace: Name | None = Field(
        default=None, description="Its namespace; without it a ClusterRole, to be bound anywhere."
    )
    rules: list[PolicyRule] = Field(description="What it allows.")


class Binding(Model):
    """Who has a role, and where."""

    role: BoundRole = Field(
        description="view, edit, admin, cluster-admin, or one of homelab:access.roles."
    )
    namespaces: list[Name] = Field(
        default=[], description="Where: a RoleBinding in each of these namespaces."
    )
    everywhere: bool = Field(
        default=False,
        strict=True,
        description="A ClusterRoleBinding in their place: in all namespaces, and in none.",
    )
    users: list[UserName] = Field(default=[], description="People of homelab:access.users.")
    groups: list[UserName] = Field(default=[], description="Groups of people.")
    service_accounts: list[AccountReference] = Field(
        default=[], description="Service accounts, as namespace/name."
    )

    @property
    def subjects(self) -> list[tuple[str, str]]:
        """Key in the stack file and name of each."""
        return [
            *(("users", name) for name in self.users),
            *(("groups", name) for name in self.groups),
            *(("serviceAccounts", name) for name in self.service_accounts),
        ]

    @property
    def places(self) -> list[str | None]:
        """Namespaces, or None for everywhere."""
        return [None] if self.everywhere else list(self.namespaces)


class ClusterAccess(Model):
    """Who may do what in the cluster, besides its administrator."""

    users: dict[UserName, User] = Field(default={}, description="People by name.")
    service_accounts: dict[Name, dict[ObjectName, ServiceAccount]] = Field(
        default={}, description="Service accounts by namespace and name."
    )
    roles: dict[ObjectName, Role] = Field(default={}, description="Roles by name.")
    bindings: dict[ObjectName, Binding] = Field(
        default={}, description="Who has which role, by a name of its own."
    )

    def problems(self, known: frozenset[str], provider: str | None) -> Iterator[Problem]:
        """What is wrong across the fields. ``known`` are the namespaces; ``provider`` says how the
        API server gets to know an OpenID provider, None where it may know one.
        """
        yield from self._user_problems(provider)
        for namespace, accounts in self.service_accounts.items():
            yield from _unknown_namespace(
                ("access", "serviceAccounts", namespace), namespace, known
            )
            if "default" in accounts:
                yield Problem(
                    ("access", "serviceAccounts", namespace, "default"),
                    None,
                    "accounts other than default, which each pod has that names none",
                    "make one for the program that needs rights",
                    "is Kubernetes' own",
                )
        for name, role in self.roles.items():
            path: Path = ("access", "roles", name)
            if name in BUILT_IN_ROLES:
                yield Problem(
                    path,
                    None,
                    f"names other than {', '.join(BUILT_IN_ROLES)}",
                    "choose another name",
                    "is Kubernetes' own",
                )
            if role.namespace is not None:
                yield from _unknown_namespace((*path, "namespace"), role.namespace, known)
            if not role.rules:
                yield Problem(
                    path, None, "at least one rule", "say what it allows", "allows nothing"
                )
            for index, rule in enumerate(role.rules):
                yield from rule.problems((*path, "rules", index), role.namespace)
        yield from self._binding_problems(known)

    def _user_problems(self, provider: str | None) -> Iterator[Problem]:
        for name, user in self.users.items():
            path: Path = ("access", "users", name)
            reserved = [
                (path, name),
                *(((*path, "groups", i), g) for i, g in enumerate(user.groups)),
            ]
            for where, text in reserved:
                if text.startswith("system:"):
                    yield Problem(
                        where,
                        None,
                        "names that do not begin with system:, which are Kubernetes' own",
                        "choose another name; system:masters bypasses every role, and a "
                        "certificate cannot be taken back",
                        "is Kubernetes' own",
                    )
            if user.kind == "oidc" and provider:
                yield Problem(
                    (*path, "kind"),
                    user.kind,
                    "certificate, or oidc where the API server knows a provider",
                    f"{provider} (docs/access.md)",
                    "is how nobody can log in",
                    [("cluster", "k3sArgs"), ("cluster", "api", "oidc")],
                )

    def _binding_problems(self, known: frozenset[str]) -> Iterator[Problem]:
        granted: dict[tuple[str, str | None, str, str], Path] = {}
        for name, binding in self.bindings.items():
            path: Path = ("access", "bindings", name)
            if not binding.subjects:
                yield Problem(
                    path,
                    None,
                    "users, groups or serviceAccounts",
                    "say who has the role",
                    "binds nobody",
                )
            if binding.everywhere == bool(binding.namespaces):
                yield Problem(
                    path,
                    None,
                    "either namespaces, or everywhere: true",
                    "name the namespaces; everywhere also holds in those that come later",
                    "does not say where, or says it twice",
                )
            for index, namespace in enumerate(binding.namespaces):
                yield from _unknown_namespace((*path, "namespaces", index), namespace, known)
            yield from self._role_problems(path, binding)
            if binding.everywhere and name in BUILT_IN_ROLES:
                yield Problem(
                    path,
                    None,
                    f"names other than {', '.join(BUILT_IN_ROLES)}",
                    "choose another name: Kubernetes has a ClusterRoleBinding cluster-admin",
                    "is Kubernetes' own",
                )
            for key, subject in binding.subjects:
                yield from self._subject_problems(path, binding, key, subject, known)
                for place in binding.places:
                    grant = (binding.role, place, key, subject)
                    if grant not in granted:
                        granted[grant] = path
                        continue
                    first = granted[grant]
                    yield Problem(
                        (*path, key),
                        subject,
                        "each role of a subject once in a place",
                        "remove one of the two",
                        f"has {binding.role} already, by {key_path(first)}",
                        [first],
                    )
                    break

    def _role_problems(self, path: Path, binding: Binding) -> Iterator[Problem]:
        if binding.role in BUILT_IN_ROLES:
            return
        role = self.roles.get(binding.role)
        involves: list[Path] = [("access", "roles", binding.role)]
        if role is None:
            yield Problem(
                (*path, "role"),
                binding.role,
                f"{', '.join(BUILT_IN_ROLES)}, or a role of homelab:access.roles",
                "correct it, or declare the role",
                "is no role",
                involves,
            )
        elif role.namespace is not None and binding.places != [role.namespace]:
            yield Problem(
                (*path, "role"),
                binding.role,
                f"a role without a namespace, or this one in {role.namespace} alone",
                f"remove homelab:access.roles.{binding.role}.namespace, or bind it there",
                f"is a role of namespace {role.namespace}",
                involves,
            )

    def _subject_problems(
        self, path: Path, binding: Binding, key: str, subject: str, known: frozenset[str]
    ) -> Iterator[Problem]:
        where: Path = (*path, key)
        if subject in _ANYONE:
            yield Problem(
                where,
                subject,
                "subjects who have logged in",
                "name users, groups or service accounts",
                f"would give {binding.role} to everyone who reaches the API server",
            )
        elif subject in _EVERYONE and binding.role != "view":
            yield Problem(
                where,
                subject,
                "this group with no role but view",
                "name users, groups or service accounts",
                f"would give {binding.role} to every pod",
            )
        elif subject == "system:masters":
            yield Problem(
                where,
                subject,
                "other groups",
                "remove it: system:masters may do everything without any role",
                "needs no role",
            )
        elif key == "users" and not subject.startswith("system:") and subject not in self.users:
            yield Problem(
                where,
                subject,
                "a user of homelab:access.users",
                "correct it, or declare the user",
                "is not declared",
                [("access", "users", subject)],
            )
        elif key == "serviceAccounts":
            yield from _unknown_namespace(where, subject.partition("/")[0], known)


def _unknown_namespace(path: Path, namespace: str, known: frozenset[str]) -> Iterator[Problem]:
    if namespace not in known:
        yield Problem(
            path,
            namespace,
            "a namespace that is declared",
            f"correct it, or declare it: homelab:namespaces.{namespace} (owner argocd if ArgoCD "
            "makes it)",
            "is not declared",
            [("namespaces", namespace), ("secrets", namespace)],
        )
