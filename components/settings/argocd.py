"""ArgoCD, bootstrapped from a Git repository."""

import re
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from components.settings.access import AccountReference
from components.settings.existing import KubeconfigText, ServerUrl
from components.settings.model import Model, Name, ObjectName, Text
from components.settings.problem import HIDDEN, Path, Problem

_REPOSITORY_PATH = r"[A-Za-z0-9_~][A-Za-z0-9_.~+-]*(?:/[A-Za-z0-9_~][A-Za-z0-9_.~+-]*)*"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"


def _is_ref(ref: str) -> bool:
    """The rules of git-check-ref-format that the pattern leaves open."""
    return (
        not ref.endswith((".", "/"))
        and not re.search(r"\.\.|//|@\{", ref)
        and ref != "@"
        and not any(part.startswith(".") or part.endswith(".lock") for part in ref.split("/"))
    )


Repository = Annotated[
    str,
    Text(
        "a Git repository as https://host/path, ssh://[user@]host[:port]/path or user@host:path, "
        "without credentials and without a / at the end",
        "copy the clone URL of the repository; credentials belong into the host's Git "
        "configuration",
        "https://github.com/example/gitops",
        rf"https://{_NAME}(?::[0-9]{{1,5}})?/{_REPOSITORY_PATH}"
        rf"|ssh://(?:[a-z_][a-z0-9_-]*@)?{_NAME}(?::[0-9]{{1,5}})?/{_REPOSITORY_PATH}"
        rf"|[a-z_][a-z0-9_-]*@{_NAME}:{_REPOSITORY_PATH}",
        lambda url: ".." not in url,
    ),
]
RepositoryPath = Annotated[
    str,
    Text(
        "a relative path inside the repository, without `..`, or `.` for its root",
        "write the directory of the kustomization, for example bootstrap",
        "bootstrap",
        r"\.|[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*",
    ),
]
Ref = Annotated[
    str,
    Text(
        "a branch or tag as git-check-ref-format takes it, of letters, digits and _ . / + @ -, "
        "not beginning with `-`",
        "write the branch or tag, for example main",
        "main",
        r"[A-Za-z0-9_@+][A-Za-z0-9_./+@-]{0,199}",
        _is_ref,
    ),
]
Commit = Annotated[
    str,
    Text(
        "a whole commit id: 40 hexadecimal digits in lower case",
        "write the id that `git rev-parse` shows",
        "0123456789abcdef0123456789abcdef01234567",
        r"[0-9a-f]{40}",
    ),
]
WebUrl = Annotated[
    str,
    Text(
        "an http or https URL without credentials",
        "write the address under which people open ArgoCD",
        "https://argocd.example.org",
        rf"https?://{_NAME}(?::[0-9]{{1,5}})?(?:/[A-Za-z0-9_.~/+-]*)?",
    ),
]


StackName = Annotated[
    str,
    Text(
        "a stack of this program as organization/homelab/<stack>",
        "write it as `pulumi stack ls --all` shows it; organization is that very word where the "
        "state is in files",
        "organization/homelab/metal",
        r"[A-Za-z0-9_.][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_.][A-Za-z0-9_.-]*){2}",
    ),
]
LabelKey = Annotated[
    str,
    Text(
        "the key of a label such as site or example.org/site, not argocd.argoproj.io's own",
        "choose a key of that form",
        "site",
        r"(?!argocd\.argoproj\.io/)(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?"
        r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?",
    ),
]
LabelValue = Annotated[
    str,
    Text(
        "the value of a label: letters, digits, `-`, `_` and `.`, at most 63",
        "choose a value of that form",
        "home",
        r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?",
    ),
]
TemplatePath = Annotated[
    str,
    Text(
        "a relative path inside the repository, in which {cluster} stands for the cluster's name",
        "write the directory of the manifests, for example clusters/{cluster}",
        "clusters/{cluster}",
        r"(?:[A-Za-z0-9_{][A-Za-z0-9_.+{}-]*)(?:/[A-Za-z0-9_{][A-Za-z0-9_.+{}-]*)*",
        lambda path: re.search(r"[{}]", path.replace("{cluster}", "")) is None,
    ),
]


class MemberCluster(Model):
    """Another cluster that this ArgoCD deploys to, with a service account's rights."""

    stack: StackName | None = Field(
        default=None,
        description="The stack that has the cluster and declares the service account under "
        "homelab:access, with token secret.",
    )
    service_account: AccountReference = Field(
        default="kube-system/argocd-manager",
        description="That account as namespace/name. Its roles in that cluster are all that "
        "ArgoCD may do there.",
    )
    kubeconfig: KubeconfigText | None = Field(
        default=None,
        description="In place of a stack, a kubeconfig with a token or client certificate, "
        "encrypted: pulumi config set --secret --path "
        "'homelab:argocd.clusters.<name>.kubeconfig'.",
    )
    server: ServerUrl | None = Field(
        default=None,
        description="Where ArgoCD reaches the API, in place of the address in the kubeconfig.",
    )
    namespaces: list[Name] = Field(
        default=[],
        description="ArgoCD keeps to these namespaces there, and to nothing outside of them; "
        "without any it needs a role everywhere.",
    )
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, description="Labels by which ApplicationSets choose clusters."
    )


class ApplicationSet(Model):
    """One Application for each of the other clusters that the labels choose."""

    repository: Repository | None = Field(
        default=None, description="Repository of the manifests; the bootstrap's where left out."
    )
    path: TemplatePath = Field(
        description="Directory of the manifests; {cluster} stands for the cluster's name."
    )
    ref: Ref = Field(default="main", description="Branch or tag.")
    namespace: Name = Field(description="Namespace of each cluster that they go to.")
    project: Name = Field(default="default", description="Project in ArgoCD.")
    labels: dict[LabelKey, LabelValue] = Field(
        default={}, description="Clusters with all of these labels; every one without."
    )
    prune: bool = Field(
        default=False,
        strict=True,
        description="Whether what leaves the repository is deleted from the clusters.",
    )


class ArgoCD(Model):
    """What `kubectl apply -k repository//path?ref=...` bootstraps; ArgoCD does the rest."""

    repository: Repository = Field(
        description="Git repository of the bootstrap kustomization, as the host reaches it."
    )
    path: RepositoryPath = Field(
        default="bootstrap", description="Directory of the kustomization in it."
    )
    ref: Ref = Field(
        default="main", description="Branch or tag to apply; the preview shows its commit."
    )
    commit: Commit | None = Field(
        default=None, description="Apply exactly this commit, whatever the ref points to."
    )
    namespace: Name = Field(default="argocd", description="Namespace that ArgoCD runs in.")
    url: WebUrl | None = Field(
        default=None, description="Where people open ArgoCD; goes into the stack's outputs."
    )
    clusters: dict[Name, MemberCluster] = Field(
        default={}, description="Other clusters that it deploys to, by name."
    )
    application_sets: dict[ObjectName, ApplicationSet] = Field(
        default={}, description="ApplicationSets over those clusters, by name."
    )

    def problems(self) -> Iterator[Problem]:
        """What is wrong across the fields."""
        stacks: dict[str, Path] = {}
        for name, member in self.clusters.items():
            path: Path = ("argocd", "clusters", name)
            sources = [(*path, "stack"), (*path, "kubeconfig")]
            if name == "in-cluster":
                yield Problem(
                    path,
                    None,
                    "names other than in-cluster, ArgoCD's own for the cluster that it runs in",
                    "choose another name",
                    "is ArgoCD's own",
                )
            if member.stack is not None and member.kubeconfig is not None:
                yield Problem(
                    sources[1],
                    HIDDEN,
                    "either stack or kubeconfig",
                    "keep one of the two",
                    "is one source too many",
                    sources,
                )
            elif member.stack is None and member.kubeconfig is None:
                yield Problem(
                    path,
                    None,
                    "stack or kubeconfig",
                    "name the stack that has the cluster, or encrypt a kubeconfig for it",
                    "has no source",
                    sources,
                )
            if member.stack is not None:
                first = stacks.setdefault(member.stack, path)
                if first != path:
                    yield Problem(
                        sources[0],
                        member.stack,
                        "each cluster once: ArgoCD tells clusters apart by their address",
                        "remove one of the two",
                        "is registered twice",
                        [(*first, "stack")],
                    )
        for name, one in self.application_sets.items():
            path = ("argocd", "applicationSets", name)
            if not any(_chosen(one.labels, member.labels) for member in self.clusters.values()):
                yield Problem(
                    (*path, "labels") if one.labels else path,
                    None,
                    "labels that a cluster of homelab:argocd.clusters has",
                    "correct them, or declare the cluster",
                    "chooses no cluster",
                    [("argocd", "clusters")],
                )


def _chosen(wanted: dict[str, str], given: dict[str, str]) -> bool:
    return wanted.items() <= given.items()
