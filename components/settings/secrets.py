"""The Secrets of a stack."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, SecretStr

from components.settings.model import Model, Name, ObjectName, SecretFile, Text
from components.settings.postgres import Role, Workload
from components.settings.problem import HIDDEN, Path, Problem

SecretType = Literal[
    "Opaque",
    "kubernetes.io/dockerconfigjson",
    "kubernetes.io/tls",
    "kubernetes.io/basic-auth",
    "kubernetes.io/ssh-auth",
    "kubernetes.io/iscsi-chap",
]

# What the API server demands of a type: all keys of one of these sets.
_REQUIRED_KEYS: dict[str, tuple[frozenset[str], ...]] = {
    "kubernetes.io/dockerconfigjson": (frozenset({".dockerconfigjson"}),),
    "kubernetes.io/tls": (frozenset({"tls.crt", "tls.key"}),),
    "kubernetes.io/basic-auth": (frozenset({"username"}), frozenset({"password"})),
    "kubernetes.io/ssh-auth": (frozenset({"ssh-privatekey"}),),
}

DataKey = Annotated[
    str,
    Text(
        "a key of a Secret: letters, digits, `-`, `_` and `.`, at most 253",
        "choose a key of that form",
        "password",
        r"[A-Za-z0-9._-]{1,253}",
        lambda key: not key.startswith("..") and key != ".",
    ),
]
DataValue = Annotated[
    SecretStr,
    Text(
        "a value that is not a placeholder",
        "give it the real value",
        "made-up-example",
        r"(?s:.*)",
    ),
]


def missing_keys(secret_type: str, keys: Collection[str]) -> str:
    """What the API server demands of a type and ``keys`` lacks, in words; empty if nothing."""
    choices = _REQUIRED_KEYS.get(secret_type, ())
    if not choices or any(choice <= set(keys) for choice in choices):
        return ""
    return " or ".join(" and ".join(sorted(choice - set(keys))) for choice in choices)


class SecretCopy(Model):
    """Where a Secret is repeated, value and type the same."""

    namespace: Name = Field(description="Namespace of the copy.")
    name: ObjectName = Field(description="Name of the copy.")


class RolePassword(Model):
    """A role of PostgreSQL whose password a Secret holds: changed in the database when the value
    changes, before the Secret is.
    """

    workload: Workload = Field(description="Whose first ready pod runs PostgreSQL.")
    container: Name | None = Field(
        default=None, description="Container of the pod; its first one where left out."
    )
    role: Role = Field(description="The role.")
    user: Role | None = Field(
        default=None,
        description="Role that may change it, over the pod's local socket without a password; the"
        " role itself where left out.",
    )
    database: Role = Field(default="postgres", description="A database to connect to.")
    key: Annotated[
        str,
        Text(
            "a key of the Secret",
            "name the key that holds the password",
            "password",
            r"[A-Za-z0-9._][A-Za-z0-9._-]{0,252}",
        ),
    ] = Field(default="password", description="Key of the Secret that holds the password.")


class Secret(Model):
    """A Kubernetes Secret and where its value comes from: `data` and `files`, or one `manifest`."""

    type: SecretType = Field(
        default="Opaque", description="Type of the Secret; its required keys are checked."
    )
    data: dict[DataKey, DataValue] = Field(
        default={},
        description="Values by key, encrypted: pulumi config set --secret --path"
        " 'homelab:secrets.<namespace>.<name>.data.<key>'.",
    )
    files: dict[DataKey, SecretFile] = Field(
        default={},
        description="Decrypted files by key; a file holds one value. A last line end is taken off.",
    )
    manifest: SecretFile | None = Field(
        default=None,
        description="Decrypted file that holds the whole Secret; its namespace, name and type "
        "must agree with this entry.",
    )
    seed_only: bool = Field(
        default=False,
        strict=True,
        description="Create it when absent and never write it again, for a Secret that the "
        "cluster rotates itself (incident 8).",
    )
    optional: bool = Field(
        default=False,
        strict=True,
        description="Leave it out with a warning while its file does not exist.",
    )
    copies: list[SecretCopy] = Field(default=[], description="Where else the same Secret is kept.")
    read_on: Literal["host", "here"] | None = Field(
        default=None,
        description="Which machine reads its files, in place of homelab:host.secretFiles.",
    )
    rollout: bool = Field(
        default=True,
        strict=True,
        description="Restart the workloads that use it when its value changes.",
    )
    postgres: RolePassword | None = Field(
        default=None,
        description="The role of PostgreSQL whose password it holds.",
    )

    def problems(self, path: Path) -> Iterator[Problem]:
        """What is wrong across the fields of the Secret at ``path``."""
        sources = [(*path, key) for key in ("data", "files", "manifest")]
        if self.manifest and (self.data or self.files):
            yield Problem(
                (*path, "manifest"),
                HIDDEN,
                "either manifest, or data and files",
                "keep one source: a manifest holds the whole Secret",
                "is one source too many",
                sources,
            )
        elif not (self.manifest or self.data or self.files):
            yield Problem(
                path,
                None,
                "data, files or manifest",
                f"name the decrypted file ({'manifest: /run/agenix/' + str(path[-1])}) or "
                f"encrypt its values under data",
                "has no source",
                sources,
            )
        if self.postgres and self.seed_only:
            yield Problem(
                (*path, "postgres"),
                None,
                "a Secret that is not seedOnly",
                "remove one of the two: what the cluster rotates itself, the stack does not",
                "is declared beside seedOnly",
                [(*path, "seedOnly")],
            )
        if self.postgres and not self.manifest:
            key = self.postgres.key
            if key not in self.data.keys() | self.files.keys():
                yield Problem(
                    (*path, "postgres", "key"),
                    key,
                    "a key under data or files",
                    "name the key that holds the password",
                    "names a key that the Secret does not have",
                    sources,
                )
        for key in self.data.keys() & self.files.keys():
            yield Problem(
                (*path, "files", key),
                HIDDEN,
                "each key once, under data or under files",
                "remove one of the two",
                "is declared twice",
            )
        missing = missing_keys(self.type, self.data.keys() | self.files.keys())
        if missing and not self.manifest and (self.data or self.files):
            yield Problem(
                (*path, "type"),
                self.type,
                f"this type together with {missing}",
                f"add {missing} under data or files, or correct the type",
                "lacks a required key",
                sources,
            )


@dataclass(frozen=True)
class DeclaredSecret:
    """A Secret as the cluster shall hold it; ``copy_of`` is the (namespace, name) it repeats."""

    namespace: str
    name: str
    secret: Secret
    copy_of: tuple[str, str] | None = None
