"""The audit log of a cluster's API server: who asked what of it, and when.

One model for every kind of cluster whose API server this program starts. The kind puts
:meth:`Audit.policy` into a file of each server and gives :meth:`Audit.arguments` to it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from components.settings.model import Model, Name, Number, Text
from components.settings.problem import Path, Problem

Level = Literal["None", "Metadata", "Request", "RequestResponse"]

POLICY_FILE = "/etc/rancher/k3s/audit.yaml"
LOG_FILE = "/var/lib/rancher/k3s/server/logs/audit.log"
"""On each server, where k3s's own guide has them; the API server makes the log's directory."""

# Whose bodies hold credentials. Logged by name alone, whatever a stack file says.
_SENSITIVE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("secrets", "configmaps", "serviceaccounts/token")),
    ("authentication.k8s.io", ("tokenreviews",)),
)
_FIRST: list[dict[str, Any]] = [
    {
        "level": "Metadata",
        "resources": [{"group": group, "resources": list(names)} for group, names in _SENSITIVE],
    },
    # What a cluster does all day by itself.
    {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/version"]},
    {
        "level": "None",
        "resources": [
            {"group": "", "resources": ["events"]},
            {"group": "events.k8s.io", "resources": ["events"]},
            {"group": "coordination.k8s.io", "resources": ["leases"]},
        ],
    },
    {"level": "None", "userGroups": ["system:nodes"], "verbs": ["get", "list", "watch"]},
    {
        "level": "None",
        "users": [
            "system:apiserver",
            "system:kube-controller-manager",
            "system:kube-proxy",
            "system:kube-scheduler",
        ],
        "verbs": ["get", "list", "watch"],
    },
]

ApiGroup = Annotated[
    str,
    Text(
        'an API group such as apps or cert-manager.io, "" for the core one',
        "write it as `kubectl api-resources` shows it, without the version",
        "apps",
        r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*)?",
    ),
]
Resource = Annotated[
    str,
    Text(
        "a resource in its plural such as pods, or a part of it such as pods/exec",
        "write it as `kubectl api-resources` shows it",
        "pods",
        r"[a-z][a-z0-9-]*(?:/[a-z][a-z0-9-]*)?",
    ),
]
UserName = Annotated[
    str,
    Text(
        "a user or group as the API server sees it, at most 253 printable characters without "
        "blanks",
        "write it as `kubectl auth whoami` shows it",
        "system:serviceaccount:factory:deployer",
        r"[A-Za-z0-9][A-Za-z0-9:_.@/+=-]{0,252}",
    ),
]


class AuditResources(Model):
    """Resources of one API group."""

    group: ApiGroup = Field(default="", description='Their API group; "" is the core one.')
    resources: list[Resource] = Field(
        default=[], description="Resources in their plural; all of the group where left out."
    )


class AuditRule(Model):
    """What is logged of the requests that match; of several rules the first that matches."""

    level: Level = Field(
        description="None, who and what (`Metadata`), the request's body too (`Request`), and the "
        "answer's (`RequestResponse`)."
    )
    users: list[UserName] = Field(default=[], description="Of these users; of all without.")
    user_groups: list[UserName] = Field(default=[], description="Of these groups; of all without.")
    verbs: list[
        Literal[
            "get", "list", "watch", "create", "update", "patch", "delete", "deletecollection",
            "proxy", "connect",
        ]
    ] = Field(default=[], description="These verbs; all without.")  # fmt: skip
    resources: list[AuditResources] = Field(default=[], description="On these; on all without.")
    namespaces: list[Name] = Field(default=[], description="In these namespaces; in all without.")

    def document(self) -> dict[str, Any]:
        """As audit.k8s.io/v1 has it."""
        return self.model_dump(by_alias=True, exclude_defaults=True, mode="json") | (
            {
                "resources": [
                    {
                        "group": one.group,
                        **({"resources": names} if (names := one.resources) else {}),
                    }
                    for one in self.resources
                ]
            }
            if self.resources
            else {}
        )


class Audit(Model):
    """The audit log of the API server. Requests for Secrets, ConfigMaps and tokens are always
    logged, and never with their content.
    """

    level: Level = Field(
        default="Metadata", description="What is logged of requests that no rule matches."
    )
    rules: list[AuditRule] = Field(default=[], description="What is logged otherwise, in order.")
    keep_days: Annotated[
        int, Number("1 to 3650", "write days in that range, without quotes", 30, 1, 3650)
    ] = Field(default=30, description="Files older than this many days are removed.")
    keep_files: Annotated[
        int, Number("1 to 1000", "write a number in that range, without quotes", 10, 1, 1000)
    ] = Field(default=10, description="How many files are kept besides the one being written.")
    file_megabytes: Annotated[
        int, Number("1 to 10000", "write MB in that range, without quotes", 100, 1, 10000)
    ] = Field(default=100, description="Size in MB at which another file is begun.")

    def policy(self) -> str:
        """The policy file, YAML of audit.k8s.io/v1. Not secret."""
        policy = {
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            # One line a request, written when it is answered.
            "omitStages": ["RequestReceived"],
            "rules": [*_FIRST, *(rule.document() for rule in self.rules), {"level": self.level}],
        }
        return yaml.safe_dump(policy, sort_keys=False)

    def arguments(self, policy: str = POLICY_FILE, log: str = LOG_FILE) -> dict[str, str]:
        """Arguments of kube-apiserver by name. Without the policy it would log nothing (003 names
        the log's path alone).
        """
        return {
            "audit-policy-file": policy,
            "audit-log-path": log,
            "audit-log-maxage": str(self.keep_days),
            "audit-log-maxbackup": str(self.keep_files),
            "audit-log-maxsize": str(self.file_megabytes),
        }

    def problems(self, path: Path) -> Iterator[Problem]:
        """What is wrong across the fields of the audit at ``path``."""
        if self.level == "None" and all(rule.level == "None" for rule in self.rules):
            yield Problem(
                (*path, "level"),
                self.level,
                "Metadata, or a rule of another level",
                "remove level, or remove the whole audit",
                "logs nothing besides requests for Secrets",
                [(*path, "rules")],
            )
        for index, rule in enumerate(self.rules):
            here: Path = (*path, "rules", index)
            unconditional = not (
                rule.users or rule.user_groups or rule.verbs or rule.resources or rule.namespaces
            )
            if unconditional:
                yield Problem(
                    here,
                    None,
                    "a rule with users, userGroups, verbs, resources or namespaces",
                    f"write level: {rule.level} beside rules: that is what no rule matches",
                    "matches every request",
                )
            for position, resources in enumerate(rule.resources):
                for name in sorted(set(resources.resources) & _sensitive(resources.group)):
                    yield Problem(
                        (*here, "resources", position, "resources"),
                        name,
                        "resources other than secrets, configmaps, serviceaccounts/token and "
                        "tokenreviews, which are always logged at Metadata",
                        "remove it: their content would lie readable in the log",
                    )


def _sensitive(group: str) -> frozenset[str]:
    return frozenset(name for of, names in _SENSITIVE if of == group for name in names)


def argument_problems(path: Path, arguments: Sequence[str]) -> Iterator[Problem]:
    """What of k3s's arguments at ``path`` concerns the audit and has been written by hand."""
    for index, argument in enumerate(arguments):
        if re.match(r"--kube-apiserver-arg=-{0,2}audit-(?!webhook)", argument):
            yield Problem(
                (*path, index),
                argument,
                "arguments other than those of the audit log",
                "write homelab:cluster.audit, which gives policy and log together: with a path and "
                "without a policy the API server logs nothing",
                "has a setting of its own",
            )
