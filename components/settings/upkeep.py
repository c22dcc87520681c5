"""What runs on the host on a schedule: cleaning, backups and watching."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, SecretStr

from components.settings.k3s import Bucket, Endpoint
from components.settings.model import (
    AbsolutePath,
    Model,
    Name,
    Number,
    ObjectName,
    OpaqueSecret,
    SecretFile,
    Text,
)
from components.settings.postgres import Role, Workload
from components.settings.problem import HIDDEN, Path, Problem, key_path

_OBJECT = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?"

Schedule = Annotated[
    str,
    Text(
        "hourly, daily, weekly, HH:MM, a day and HH:MM such as Sun 04:30, or never",
        "write one of those; daily and weekly are at midnight, weekly on Monday",
        "daily",
        r"hourly|daily|weekly|never"
        r"|(?:(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) )?(?:[01][0-9]|2[0-3]):[0-5][0-9]",
    ),
]
Scaled = Annotated[
    str,
    Text(
        "deployment/NAME or statefulset/NAME",
        "name the workload that writes to the volume",
        "deployment/keycloak",
        rf"(?:deployment|statefulset)/{_OBJECT}",
    ),
]
Hours = Annotated[
    int,
    Number("1 to 87600 hours", "write a number in that range, without quotes", 48, 1, 87600),
]

WebhookUrl = Annotated[
    SecretStr,
    Text(
        "an http(s) URL, encrypted",
        "copy it from the receiver: whoever knows it can write there",
        "https://ntfy.example.org/made-up-topic",
        r"https?://[!-~]+",
    ),
]


class Cleaning(Model):
    """Removal of what nothing references: images in the nodes, and dangling images, anonymous
    volumes and build cache of the host's Docker (incident 11)."""

    schedule: Schedule = Field(
        default="weekly", description="When; `never`: only by hand, hostctl clean NAME."
    )


class VolumeBackup(Model):
    """The directory of a PersistentVolumeClaim, as a tar file."""

    kind: Literal["volume"] = Field(description="A volume of storage class local-path.")
    namespace: Name = Field(description="Namespace of the claim.")
    claim: ObjectName = Field(description="Name of the PersistentVolumeClaim.")
    scale_down: Scaled | None = Field(
        default=None,
        description="Workload that writes to it, scaled to 0 while it is copied and back"
        " afterwards: what a database in a file, such as Keycloak's H2, needs.",
    )
    stale_after_hours: Hours | None = Field(
        default=None,
        description="Nobody has written to it for longer: an error and no backup (incident 6).",
    )


class PostgresBackup(Model):
    """A PostgreSQL database, by `pg_dump -Fc` in its own pod."""

    kind: Literal["postgres"] = Field(description="A database of PostgreSQL.")
    namespace: Name = Field(description="Namespace of the workload.")
    workload: Workload = Field(description="Whose first ready pod runs PostgreSQL.")
    container: Name | None = Field(
        default=None, description="Container of the pod; its first one where left out."
    )
    database: Role = Field(description="Name of the database.")
    user: Role = Field(
        description="Role that may read all of it over the pod's local socket without a password."
    )
    stale_after_hours: Hours | None = Field(
        default=None,
        description="No row was written for longer: an error and no backup.",
    )


class DirectoryBackup(Model):
    """A directory of the host, as a tar file: what the stack itself keeps there."""

    kind: Literal["directory"] = Field(
        description="A directory of the host, such as that of Pulumi's file backend."
    )
    path: AbsolutePath = Field(description="The directory.")
    stale_after_hours: Hours | None = Field(
        default=None, description="Nobody has written to it for longer: an error and no backup."
    )


class DatastoreBackup(Model):
    """The datastore of a cluster of one server, as one moment has it, with the server's token and
    certificates: who has it has the cluster."""

    kind: Literal["datastore"] = Field(description="What k3s itself keeps: SQLite, token, keys.")


BackupItem = Annotated[
    VolumeBackup | PostgresBackup | DirectoryBackup | DatastoreBackup, Field(discriminator="kind")
]
Copies = Annotated[
    int, Number("0 to 1000 copies", "write a number in that range, without quotes", 7, 0, 1000)
]


class Retention(Model):
    """Which copies of each item restic keeps; the others go when the target is verified."""

    last: Copies = Field(default=0, description="How many, the newest, whatever their age.")
    daily: Copies = Field(default=14, description="For how many days the last one of the day.")
    weekly: Copies = Field(default=8, description="For how many weeks the last one of the week.")
    monthly: Copies = Field(default=12, description="For how many months the last of the month.")

    @property
    def is_empty(self) -> bool:
        return not (self.last or self.daily or self.weekly or self.monthly)


class _Target(Model):
    password: OpaqueSecret = Field(
        description="What restic encrypts the repository with, encrypted. Keep it elsewhere as"
        " well: nothing opens the copies without it."
    )
    retention: Retention = Field(default=Retention(), description="Which copies are kept.")


class DirectoryTarget(_Target):
    """A directory of the host: of a disk of its own, or of a share, which is mounted there."""

    kind: Literal["directory", "nfs"] = Field(
        description="A directory; with nfs, refused while no NFS share is mounted there."
    )
    path: AbsolutePath = Field(description="The repository's directory.")

    @property
    def repository(self) -> str:
        """As restic names it."""
        return self.path


class S3Target(_Target):
    """A bucket of S3, of whatever maker."""

    kind: Literal["s3"] = Field(description="A bucket of S3.")
    endpoint: Endpoint = Field(description="Host, or host:port.")
    tls: bool = Field(
        default=True,
        strict=True,
        description="Whether it speaks HTTPS; the content is encrypted either way.",
    )
    bucket: Bucket = Field(description="Its bucket, which is there already.")
    folder: Name | None = Field(default=None, description="A folder in the bucket.")
    region: Name | None = Field(default=None, description="Its region, where it has several.")
    access_key: OpaqueSecret = Field(description="Its access key, encrypted.")
    secret_key: OpaqueSecret = Field(description="Its secret key, encrypted.")

    @property
    def repository(self) -> str:
        """As restic names it."""
        place = f"/{self.folder}" if self.folder else ""
        return f"s3:{'https' if self.tls else 'http'}://{self.endpoint}/{self.bucket}{place}"


BackupTarget = Annotated[DirectoryTarget | S3Target, Field(discriminator="kind")]


class Verification(Model):
    """Restores of the newest copy of each item from each target, into a scratch place."""

    schedule: Schedule = Field(
        default="weekly", description="When; `never`: only by hand, hostctl backup verify NAME."
    )
    within_days: Annotated[
        int, Number("1 to 3650 days", "write a number in that range, without quotes", 10, 1, 3650)
    ] = Field(
        default=10,
        description="A preview warns of a copy whose last verified restore is older.",
    )
    directory: AbsolutePath = Field(
        default="/var/lib/homelab/restored",
        description="Where: it needs twice the room of the largest item.",
    )


class Backups(Model):
    """Backups next to the live storage directory, each verified when it is taken, and copies of
    them elsewhere."""

    schedule: Schedule = Field(
        default="daily", description="When; `never`: only by hand, hostctl backup run NAME."
    )
    keep: Annotated[
        int,
        Number("1 to 1000 backups", "write a number in that range, without quotes", 14, 1, 1000),
    ] = Field(default=14, description="How many of each item are kept, the newest.")
    items: dict[Name, BackupItem] = Field(default={}, description="What is backed up, by name.")
    targets: dict[Name, BackupTarget] = Field(
        default={}, description="Where else each backup goes, by name: restic repositories."
    )
    verify: Verification = Field(
        default=Verification(), description="How the copies at the targets are proved."
    )

    def problems(self, namespaces: frozenset[str]) -> Iterator[Problem]:
        """What is wrong across the fields; ``namespaces`` are those that exist or are declared."""
        by_repository: dict[str, str] = {}
        for name, target in self.targets.items():
            path: Path = ("backups", "targets", name)
            if target.retention.is_empty:
                yield Problem(
                    (*path, "retention"),
                    None,
                    "at least one of last, daily, weekly and monthly above 0",
                    "say how many are kept",
                    "keeps no copy",
                )
            other = by_repository.setdefault(target.repository, name)
            if other != name:
                yield Problem(
                    path,
                    target.repository,
                    "a repository of its own for each target",
                    f"remove one of {other} and {name}",
                    "is that of another target",
                    [("backups", "targets", other)],
                )
        for name, item in self.items.items():
            if not isinstance(item, VolumeBackup | PostgresBackup):
                continue
            if item.namespace not in namespaces:
                path = ("backups", "items", name, "namespace")
                yield Problem(
                    path,
                    item.namespace,
                    "a namespace that is declared",
                    f"correct it, or declare {key_path(('namespaces', item.namespace))} (owner"
                    " argocd if ArgoCD makes it)",
                    "names a namespace that is not declared",
                    [("namespaces", item.namespace), ("secrets", item.namespace)],
                )


class Webhook(Model):
    """Who is told when something turns bad, and when it is good again: `url` or `file`."""

    kind: Literal["ntfy", "slack", "generic"] = Field(
        description="How it is told: `ntfy` plain text with Title and Priority, `slack` JSON with"
        " text, `generic` JSON with title, text, cluster, bad and good."
    )
    url: WebhookUrl | None = Field(
        default=None,
        description="Where it is sent, encrypted: pulumi config set --secret --path"
        " 'homelab:watching.webhook.url'. Kept on the host in a file that only root reads.",
    )
    file: SecretFile | None = Field(
        default=None, description="Decrypted file on the host that holds it (agenix, sops-nix)."
    )


class Watching(Model):
    """A look at all that must work: the API, a name from a pod, each route from outside, ArgoCD's
    applications, certificates, room, backups; of k3s its nodes. Runs on the stack's host."""

    schedule: Schedule = Field(
        default="never", description="When; `never`: only by hand, hostctl watch run NAME."
    )
    metrics: AbsolutePath | None = Field(
        default=None,
        description="Directory of node_exporter's textfile collector; no metrics where left out.",
    )
    webhook: Webhook | None = Field(
        default=None, description="Who is told of a change; nobody where left out."
    )

    def problems(self, has_host: bool) -> Iterator[Problem]:
        """What is wrong across the fields; ``has_host`` where there is a host to watch from."""
        if self.schedule != "never" and not has_host:
            yield Problem(
                ("watching", "schedule"),
                self.schedule,
                "never, where the cluster's kind is existing",
                "leave it out; `make status` looks at a cluster of any kind",
                "has no effect",
                [("cluster", "kind")],
            )
        if self.webhook is None:
            return
        sources: list[Path] = [("watching", "webhook", key) for key in ("url", "file")]
        if self.webhook.url is not None and self.webhook.file is not None:
            yield Problem(
                sources[0],
                HIDDEN,
                "either url or file",
                "keep one of the two",
                "is one source too many",
                sources,
            )
        elif self.webhook.url is None and self.webhook.file is None:
            yield Problem(
                sources[1],
                None,
                "url or file",
                "name the decrypted file on the host, or encrypt the URL: pulumi config set"
                " --secret --path 'homelab:watching.webhook.url'",
                "is missing",
                sources,
            )
