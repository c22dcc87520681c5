"""How a PostgreSQL in a pod of the cluster is named."""

from typing import Annotated

from components.settings.model import Text

_OBJECT = r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?"

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
