"""What runs on the host on a schedule: cleaning and backups."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from components.settings.model import Model, Name, Number, ObjectName, Text
from components.settings.problem import Path, Problem, key_path

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
Workload = Annotated[
    str,
    Text(
        "deployment/NAME, statefulset/NAME or pod/NAME",
        "name the workload whose pod runs PostgreSQL",
        "statefulset/postgres",
        rf"(?:deployment|statefulset|pod)/{_OBJECT}",
    ),
]
Role = Annotated[
    str,
    Text(
        "a name of PostgreSQL: letters, digits, _ . and -, at most 63",
        "write the name as psql shows it",
        "skillai",
        r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}",
    ),
]
Hours = Annotated[
    int,
    Number("1 to 87600 hours", "write a number in that range, without quotes", 48, 1, 87600),
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


BackupItem = Annotated[VolumeBackup | PostgresBackup, Field(discriminator="kind")]


class Backups(Model):
    """Backups next to the live storage directory, each verified when it is taken."""

    schedule: Schedule = Field(
        default="daily", description="When; `never`: only by hand, hostctl backup run NAME."
    )
    keep: Annotated[
        int,
        Number("1 to 1000 backups", "write a number in that range, without quotes", 14, 1, 1000),
    ] = Field(default=14, description="How many of each item are kept, the newest.")
    items: dict[Name, BackupItem] = Field(default={}, description="What is backed up, by name.")

    def problems(self, namespaces: frozenset[str]) -> Iterator[Problem]:
        """What is wrong across the fields; ``namespaces`` are those that exist or are declared."""
        for name, item in self.items.items():
            if item.namespace not in namespaces:
                path: Path = ("backups", "items", name, "namespace")
                yield Problem(
                    path,
                    item.namespace,
                    "a namespace that is declared",
                    f"correct it, or declare {key_path(('namespaces', item.namespace))} (owner"
                    " argocd if ArgoCD makes it)",
                    "names a namespace that is not declared",
                    [("namespaces", item.namespace), ("secrets", item.namespace)],
                )
