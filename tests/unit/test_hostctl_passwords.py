"""hostctl postgres password, on the make-believe machine. With a real PostgreSQL:
tests/cluster/test_postgres.py.
"""

import base64
from typing import Any

import pytest

from hostctl.postgres import scram_verifier
from tests.unit.test_hostctl import KUBECONFIG, Host
from tests.unit.test_hostctl_backup import get, live, put

__all__ = ["live"]
WORKLOAD = "factory/statefulset/skillai-db"
SPEC = {
    "kubeconfig": KUBECONFIG["path"],
    "namespace": "factory",
    "workload": "statefulset/skillai-db",
    "user": "skillai",
    "role": "skillai",
}


@pytest.fixture
def database(live: Host) -> Host:
    live("kubeconfig", KUBECONFIG)
    live.machine.set("roles.json", {WORKLOAD: {"skillai": "of the image"}})
    return live


def give(host: Host, password: str, code: int = 0, **more: Any) -> Any:
    return host("postgres password", {**SPEC, "password": password, **more}, code)


def verifier(host: Host) -> str:
    return host.machine.setting("roles.json", {})[WORKLOAD]["skillai"]


def test_the_verifier_is_that_of_rfc_7677() -> None:
    salt = base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ==")
    assert scram_verifier("pencil", salt) == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"
        "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )


def starts(host: Host) -> None:
    database = {"replicas": 1, "template": {"spec": {}}}
    key = "factory/StatefulSet.apps/skillai-db"
    put(host, key, database)
    running = {**get(host, key), "status": {"readyReplicas": 1}}
    host.api.world.put(f"{host.api.cluster}/{key}", running)


def test_a_database_that_does_not_run_yet_is_made_with_its_first_password(database: Host) -> None:
    assert not give(database, "made-up old")["changed"]
    assert verifier(database) == "of the image"
    starts(database)
    assert not give(database, "made-up old")["changed"]
    assert verifier(database) == "of the image"


def test_one_that_runs_and_was_never_seen_is_told_since_it_may_have_another(
    database: Host,
) -> None:
    starts(database)
    assert give(database, "made-up new")["changed"]
    assert verifier(database).startswith("SCRAM-SHA-256$4096:")


def test_each_other_password_is_set_once_and_after_a_lost_record_too(database: Host) -> None:
    give(database, "made-up old")
    starts(database)
    assert give(database, "made-up new")["changed"]
    before = verifier(database)
    assert not give(database, "made-up new")["changed"]
    assert verifier(database) == before
    (ledger,) = database.machine._file("/var/lib/homelab/passwords").glob("*/*.json")
    ledger.unlink()
    assert give(database, "made-up newer")["changed"]
    assert verifier(database) != before
    assert not [call for call in database.calls if "made-up" in " ".join(call)]


def test_what_fails_is_named_without_the_password_and_is_tried_again(database: Host) -> None:
    give(database, "made-up old")
    database.machine.set("roles.json", {WORKLOAD: {}})
    error = give(database, "made-up new", code=5)
    assert error["cause"] == 'ERROR:  role "skillai" does not exist'
    database.machine.set("roles.json", {WORKLOAD: {"skillai": "of the image"}})
    assert give(database, "made-up new")["changed"]


@pytest.mark.parametrize("password", ["", "pässword", "two\nlines"])
def test_a_password_that_clients_do_not_send_alike_is_a_bad_spec(
    database: Host, password: str
) -> None:
    error = give(database, password, code=2)
    assert "printable ASCII" in error["cause"] + error["remedy"]
    assert not password or password not in str(error)
