"""The runbooks: each command of each page runs on a host in the state that the page is about, and
prints what the page says.
"""

import contextlib
import io
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostctl import cli
from rehearsal.machine import made_up_certificate
from tests.unit.test_hostctl import Host
from tests.unit.test_hostctl_backup import DATA, DATABASE, STORAGE, VOLUME, hold_data, write
from tests.unit.test_hostctl_units import UNITS, install_hostctl
from tests.unit.test_hostctl_watch import WATCH

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
PAGES = sorted(page.stem for page in RUNBOOKS.glob("*.md") if page.stem != "README")
ELSEWHERE = {"server-lost": "tests/cluster/test_k3s_lost.py"}
"""Pages whose commands need more than a host of k3d, and the test that runs them."""
STATE = "/var/lib/pulumi"
ROUTE = "plex.example.org"


def stop(host: Host) -> None:
    host("k3d stop", {"name": "factory"})


def lose_docker(host: Host) -> None:
    stop(host)
    (host.machine.root / "docker-down").touch()


def close_tunnel(host: Host) -> None:
    host.machine.set("web.json", {f"https://{ROUTE}/": 530})


def expire(host: Host) -> None:
    yesterday = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(host.machine.now() - 86400))
    ended = made_up_certificate("ab" * 32, "20200101000000Z", yesterday)
    host.edit(lambda cluster: cluster.update(serving=ended))


def fill_disk(host: Host) -> None:
    host.machine.free_bytes = lambda path: 2**30  # type: ignore[method-assign]
    unused = {"id": "sha256:2", "repoTags": ["app:1"], "size": "5000", "used": False}
    host.edit(lambda cluster: cluster.update(images=[unused]))


def serve_database(host: Host) -> None:
    database = {"skillai": {"content": "rows", "rows": "10/0/0"}}
    host.machine.set("databases.json", {"factory/statefulset/skillai-db": database})


def take_backups(host: Host, *items: dict[str, Any]) -> None:
    hold_data(host)
    host("units install", {**UNITS, "items": list(items)})
    run(host, "hostctl backup run factory")


def lose_data(host: Host) -> None:
    take_backups(host, VOLUME, DATABASE)
    host.machine.remove(f"{STORAGE}/{DATA}/h2/keycloakdb.mv.db")


def lose_state(host: Host) -> None:
    write(host, f"{STATE}/.pulumi/stacks/homelab/p510.json", "{}")
    take_backups(host, {"name": "state", "kind": "directory", "path": STATE})
    shutil.rmtree(host.machine._file(STATE))


STATES: dict[str, Callable[[Host], None]] = {
    "cluster-stopped": stop,
    "docker-down": lose_docker,
    "tunnel-down": close_tunnel,
    "certificate-expired": expire,
    "disk-full": fill_disk,
    "backup-failed": serve_database,
    "data-lost": lose_data,
    "state-lost": lose_state,
}
"""The bad day of each page."""


def start_docker(host: Host) -> None:
    (host.machine.root / "docker-down").unlink()


def renew(host: Host) -> None:
    """What k3s does when it starts."""
    if not (host.machine.root / "docker-down").exists():
        host.edit(lambda cluster: cluster.pop("serving", None))


_PSQL = (
    "kubectl --namespace=factory exec statefulset/skillai-db -- psql --username=skillai --dbname="
)
OTHERS: dict[str, Callable[[Host], None]] = {
    "systemctl start docker": start_docker,
    "docker restart cloudflared-p510": lambda host: host.machine.set("web.json", {}),
    f"{_PSQL}skillai_restored --command='\\dt+'": lambda _: None,
    "kubectl --namespace=factory rollout restart deployment/cloudflared-factory": lambda _: None,
}
"""What commands of others do on that host."""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    install_hostctl(host, UNITS["hostctl"])
    watching = {**WATCH, "routes": [ROUTE], "metrics": None}
    more = {"watch": "hourly", "watching": watching, "items": [DATABASE]}
    host("units install", UNITS | more)
    return host


def run(host: Host, command: str) -> str:
    if command in OTHERS:
        OTHERS[command](host)
        return ""
    program, *words = command.split()
    assert program == "hostctl", command
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        cli.main(words, io.StringIO(""), host.machine)
    if words[:2] == ["k3d", "start"]:
        renew(host)
    return printed.getvalue()


def steps(page: str) -> list[tuple[str, str]]:
    """Each command of a page with what it prints."""
    text = (RUNBOOKS / f"{page}.md").read_text()
    blocks = re.findall(r"^ *```console\n(.*?)^ *```$", text, re.M | re.S)
    parts = re.split(r"^ *\$ ", "".join(blocks), flags=re.M)[1:]
    return [(command, printed) for command, _, printed in (one.partition("\n") for one in parts)]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE])
def test_each_command_of_a_runbook_prints_what_the_page_says(page: str, host: Host) -> None:
    STATES[page](host)
    assert steps(page)
    for command, shown in steps(page):
        printed = run(host, command)
        place = 0
        for line in shown.splitlines():
            for fragment in filter(None, map(str.strip, line.split("…"))):
                found = printed.find(fragment, place)
                assert found >= 0, f"{command} does not print {fragment!r} there: {printed}"
                place = found + len(fragment)


def test_each_page_and_each_test_that_the_index_names_is_there() -> None:
    index = (RUNBOOKS / "README.md").read_text()
    assert {f"{page}.md" for page in PAGES} <= set(re.findall(r"\]\(([^)]+)\)", index))
    for page, test in ELSEWHERE.items():
        assert re.search(rf"\({page}\.md\).*`{re.escape(test)}`", index)
    for path, name in re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", index):
        text = (RUNBOOKS.parents[1] / path).read_text()
        assert not name or f"def {name}(" in text
