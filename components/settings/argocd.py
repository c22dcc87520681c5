"""ArgoCD, bootstrapped from a Git repository."""

import re
from typing import Annotated

from pydantic import Field

from components.settings.model import Model, Name, Text

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
