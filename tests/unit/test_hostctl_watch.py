"""`hostctl watch`: what must work is looked at, told once when it turns bad and once when it is
good again, and kept as metrics and a page. Messages go to a real HTTP server on loopback.
"""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hostctl.machine import Machine
from hostctl.preflight import ROOM_BYTES
from hostctl.record import write_record
from rehearsal.kubectl import kustomization
from rehearsal.machine import made_up_certificate
from tests.unit.test_hostctl import SPEC, Host
from tests.unit.test_hostctl_k3s import MASTER, Tower

TOKEN = "tk-that-nobody-may-see"
WATCH: dict[str, Any] = {
    "cluster": "factory",
    "storage_dir": SPEC["storage_dir"],
    "dns": {"name": "registry-1.docker.io", "image": "rancher/mirrored-library-busybox:1.36.1"},
    "argocd": False,
    "routes": ["argocd.example.org"],
    "metrics": "/var/lib/node_exporter",
    "webhook": None,
    "webhook_file": None,
}
ROUTE = "https://argocd.example.org/"


class Hook:
    """A webhook: what was sent to it, and the status that it answers."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, dict[str, str], str]] = []
        self.status = 200
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                hook.sent.append((self.path, dict(self.headers), body))
                self.send_response(hook.status)
                if hook.status == 302:
                    self.send_header("Location", f"http://127.0.0.1:{hook.port}/elsewhere")
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *_: Any) -> None:
                """pytest's output is no log."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01])
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def messages(self) -> list[str]:
        bodies = [body for _, _, body in self.sent]
        self.sent.clear()
        return bodies


@pytest.fixture
def live(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.up()
    return host


@pytest.fixture
def hook(live: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    """A webhook on this machine that the host really calls; routes stay make-believe."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made_up = live.machine.visit

    def visit(url: str, *rest: Any) -> int:
        return made_up(url, *rest) if url == ROUTE else Machine.visit(live.machine, url, *rest)

    live.machine.visit = visit  # type: ignore[method-assign]
    server = Hook()
    live.machine.make_directory("/run/agenix", 0o755)
    url = f"http://127.0.0.1:{server.port}/{TOKEN}\n"
    live.machine.write_atomic("/run/agenix/hook", url.encode(), 0o600)
    yield server
    server.close()


def watch(host: Host, **changes: Any) -> dict[str, Any]:
    return host("watch run", WATCH | changes)


def told(host: Host, kind: str = "ntfy") -> dict[str, Any]:
    return watch(host, webhook=kind, webhook_file="/run/agenix/hook")


def states(report: dict[str, Any]) -> dict[str, str]:
    return {key: one["state"] for key, one in report["checks"].items()}


def bad(report: dict[str, Any]) -> set[str]:
    return {key for key, state in states(report).items() if state != "passed"}


def answer(host: Host, status: int | str) -> None:
    host.machine.set("web.json", {ROUTE: status})


def text(host: Host, path: str) -> str:
    return host.machine.read(path).decode()


def test_of_a_cluster_that_works_every_check_passes(live: Host) -> None:
    report = watch(live)
    assert set(states(report).values()) == {"passed"}
    assert list(report["checks"]) == [
        "api",
        "dns",
        "certificate serving",
        "certificate client",
        "route argocd.example.org",
        f"room {SPEC['storage_dir']}",
        "room /var/lib/homelab",
    ]


def test_a_stopped_cluster_fails_as_the_api_and_hides_nothing_else(live: Host) -> None:
    live("k3d stop", {"name": "factory"})
    report = watch(live, argocd=True)
    assert states(report)["api"] == "failed"
    assert states(report)["dns"] == states(report)["argocd"] == "cannot-tell"
    assert states(report)["route argocd.example.org"] == "passed"


def test_a_docker_that_is_down_is_told_and_the_rest_is_looked_at(live: Host) -> None:
    (live.machine.root / "docker-down").touch()
    report = watch(live)
    assert states(report)["api"] == "failed"
    assert "Docker" in report["checks"]["api"]["detail"]
    assert states(report)["room /var/lib/homelab"] == "passed"


def test_incident_05_a_pod_that_does_not_resolve_is_bad(live: Host) -> None:
    live.machine.set("pods.json", {"lookup": "fails"})
    assert bad(watch(live)) == {"dns"}


@pytest.mark.parametrize("status", [502, 530, "[Errno 111] Connection refused"])
def test_a_route_whose_tunnel_is_down_is_bad(live: Host, status: int | str) -> None:
    answer(live, status)
    assert bad(watch(live)) == {"route argocd.example.org"}


@pytest.mark.parametrize("status", [200, 302, 403, 404])
def test_a_route_that_asks_for_a_login_or_has_no_such_page_works(live: Host, status: int) -> None:
    answer(live, status)
    assert bad(watch(live)) == set()


def test_an_application_that_is_not_synced_is_bad_by_name(live: Host) -> None:
    for one in kustomization("https://example.org/gitops", "bootstrap", "0" * 40):
        live.api.apply(one, "kubectl", force=True)
    report = watch(live, argocd=True)
    assert bad(report) == {"argocd"}
    assert report["checks"]["argocd"]["detail"] == "root is Unknown, Unknown"
    healthy = {"sync": {"status": "Synced"}, "health": {"status": "Healthy"}}
    (key, root), *_ = live.api.world.list(f"{live.api.cluster}/argocd/Application.argoproj.io")
    live.api.world.put(key, {**root, "status": healthy})
    assert bad(watch(live, argocd=True)) == set()


def test_a_certificate_that_ends_within_a_month_is_bad(live: Host) -> None:
    in_ten_days = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(live.machine.now() + 10.5 * 86400))
    shown = made_up_certificate("ab" * 32, "20200101000000Z", in_ten_days)
    live.edit(lambda cluster: cluster.update(serving=shown))
    report = watch(live)
    assert bad(report) == {"certificate serving"}
    assert report["checks"]["certificate serving"]["detail"] == "it ends in 10 days"


def test_a_disk_that_is_full_is_bad(live: Host) -> None:
    live.machine.free_bytes = lambda path: ROOM_BYTES - 1  # type: ignore[method-assign]
    assert bad(watch(live)) == {f"room {SPEC['storage_dir']}", "room /var/lib/homelab"}


def record(host: Host, **changes: Any) -> None:
    write_record(host.machine, "factory", **changes)


def test_a_backup_or_its_verification_that_failed_is_bad(live: Host) -> None:
    failed = {"at": "2026-11-21T03:00:00Z", "ok": False, "cause": "skillai: no room"}
    record(live, runs={"backup": failed, "verify": {**failed, "ok": True, "cause": ""}})
    report = watch(live)
    assert bad(report) == {"backup"}
    assert report["checks"]["backup"]["detail"] == "skillai: no room"
    assert report["checks"]["verify"]["detail"] == "done at 2026-11-21T03:00:00Z"


def test_metrics_say_when_a_restore_was_last_verified(live: Host) -> None:
    record(live, verified={"nas": {"skillai": {"at": "2026-11-21T03:00:00Z", "seconds": 7}}})
    watch(live)
    labels = '{cluster="factory",target="nas",item="skillai"}'
    line = f"homelab_restore_verified_time_seconds{labels} 1795230000"
    assert line in text(live, "/var/lib/node_exporter/homelab-factory.prom").splitlines()


def test_what_turns_bad_is_told_once_and_once_more_when_it_is_good_again(
    live: Host, hook: Hook
) -> None:
    told(live)
    assert hook.messages() == []
    answer(live, 530)
    told(live)
    told(live)
    [(path, headers, body)] = hook.sent
    assert path == f"/{TOKEN}"
    assert headers["Title"] == "factory: 1 bad"
    assert headers["Priority"] == "high"
    assert body.startswith("bad: route argocd.example.org: HTTP 530. ")
    hook.sent.clear()
    answer(live, 200)
    told(live)
    told(live)
    assert hook.messages() == ["good again: route argocd.example.org"]


def test_what_cannot_be_told_is_neither_bad_nor_good(live: Host, hook: Hook) -> None:
    live.machine.set("pods.json", {"lookup": "fails"})
    told(live)
    assert len(hook.messages()) == 1
    live.machine.set("pods.json", {"lookup": "no-image"})
    assert states(told(live))["dns"] == "cannot-tell"
    assert hook.messages() == []
    live.machine.set("pods.json", {"lookup": "resolves"})
    told(live)
    assert hook.messages() == ["good again: dns"]


@pytest.mark.parametrize("status", [302, 404, 500])
def test_a_message_that_was_not_taken_is_sent_by_the_next_run(
    live: Host, hook: Hook, status: int
) -> None:
    answer(live, 530)
    hook.status = status
    report = told(live)
    assert report["checks"]["webhook"]["detail"] == f"the message was not taken: HTTP {status}"
    hook.messages()
    hook.status = 200
    assert states(told(live))["webhook"] == "passed"
    assert len(hook.messages()) == 1


def test_a_webhook_without_the_file_of_its_url_is_a_bad_spec(live: Host) -> None:
    error = live("watch run", {**WATCH, "webhook": "ntfy"}, 2)
    assert "webhook_file is missing" in error["cause"]


def test_a_webhook_that_does_not_answer_is_bad_and_its_url_is_shown_nowhere(
    live: Host, hook: Hook
) -> None:
    hook.close()
    answer(live, 530)
    report = told(live)
    assert states(report)["webhook"] == "failed"
    files = [
        file.read_text(errors="replace")
        for file in (live.machine.root / "files").rglob("*")
        if file.is_file() and file.name != "hook"
    ]
    seen = [json.dumps(report), live.said, *files, *(" ".join(call) for call in live.calls)]
    assert not any(TOKEN in one for one in seen)


@pytest.mark.parametrize("content", [b"", b"file:///etc/passwd", b"not a url", b"\xff"])
def test_a_file_that_holds_no_url_is_bad_and_not_shown(
    live: Host, hook: Hook, content: bytes
) -> None:
    live.machine.write_atomic("/run/agenix/hook", content, 0o600)
    answer(live, 530)
    assert told(live)["checks"]["webhook"]["detail"].startswith("the message was not sent: ")


def test_slack_and_a_generic_receiver_get_json(live: Host, hook: Hook) -> None:
    answer(live, 530)
    told(live, "slack")
    assert json.loads(hook.messages()[0])["text"].startswith("*factory: 1 bad*\nbad: route")
    answer(live, 200)
    told(live, "generic")
    message = json.loads(hook.messages()[0])
    assert message["good"] == ["route argocd.example.org"]
    assert message["bad"] == {}
    assert message["cluster"] == "factory"


def test_metrics_say_each_check_and_when_what_ends(live: Host) -> None:
    answer(live, 530)
    live.machine.set("pods.json", {"lookup": "no-image"})
    watch(live)
    lines = text(live, "/var/lib/node_exporter/homelab-factory.prom").splitlines()
    assert 'homelab_check{cluster="factory",check="api"} 1' in lines
    assert 'homelab_check{cluster="factory",check="route argocd.example.org"} 0' in lines
    assert 'homelab_check{cluster="factory",check="dns"} NaN' in lines
    assert f'homelab_watch_time_seconds{{cluster="factory"}} {live.machine.now():.0f}' in lines
    ends = [line for line in lines if 'use="serving"' in line]
    assert float(ends[0].rpartition(" ")[2]) > live.machine.now()
    # A type stands before its metric, once.
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert sorted(set(types)) == sorted(types)


def test_the_page_has_what_is_bad_since_when_and_its_remedy(live: Host) -> None:
    answer(live, "<script>")
    since = watch(live)["checks"]["route argocd.example.org"]["since"]
    live.machine.sleep(60)
    watch(live)
    page = text(live, "/var/lib/homelab/watch/factory.html")
    assert f"<td>failed</td><td>{since}</td><td>no answer: &lt;script&gt;</td>" in page


def look(host: Host) -> dict[str, Any]:
    spec = {"cluster": "factory", "containers": ["web"], "directories": ["/mnt"]}
    return host("watch inspect", spec)


def test_inspect_tells_the_last_report_and_what_is_there(live: Host) -> None:
    assert look(live)["report"] is None
    report = watch(live)
    seen = look(live)
    assert seen["report"]["at"] == report["at"]
    assert seen["containers"] == {"web": "absent"}
    assert seen["unseen"] == []


def test_inspect_says_what_it_could_not_see(live: Host) -> None:
    watch(live)
    (live.machine.root / "docker-down").touch()
    live("k3d stop", {"name": "factory"}, code=4)
    seen = look(live)
    assert seen["report"]
    assert seen["containers"] == {"web": None}
    assert [one.split(":")[0] for one in seen["unseen"]] == ["container web"]


# k3s, on its first server


@pytest.fixture
def tower(tmp_path: Path) -> Tower:
    tower = Tower(tmp_path)
    tower.up()
    return tower


def watch_tower(tower: Tower, **changes: Any) -> dict[str, Any]:
    spec = {**WATCH, "cluster": "tower", "storage_dir": None, "api": "tower.example.org"}
    return tower.master("watch run", {**spec, "routes": [], **changes})


def test_of_a_k3s_that_works_every_check_passes(tower: Tower) -> None:
    report = watch_tower(tower)
    assert states(report) == dict.fromkeys(
        (
            "api",
            "dns",
            "certificate serving",
            "certificate client",
            "nodes",
            "room /var/lib/rancher/k3s",
            "room /var/lib/homelab",
        ),
        "passed",
    )
    details = {key: one["detail"] for key, one in report["checks"].items()}
    assert details["api"] == "it answers at tower.example.org:6443"
    assert details["nodes"] == "all 2 are Ready"
    # Nothing of Docker is there, and nothing of it is asked.
    assert [call for call in tower.master.calls if call[0] == "docker"] == []


def test_a_k3s_that_is_stopped_fails_as_the_api_and_hides_nothing_else(tower: Tower) -> None:
    tower.master("k3s stop", {"cluster": "tower", "node": "k3s-master"})
    report = watch_tower(tower)
    assert bad(report) == {"api", "dns", "nodes"}
    assert "this server is stopped" in report["checks"]["api"]["detail"]
    assert {key for key, state in states(report).items() if state == "cannot-tell"} == {
        "dns",
        "nodes",
    }


def test_an_address_that_does_not_reach_the_api_of_k3s_is_bad(tower: Tower) -> None:
    """A virtual IP that no server has is what the agents and the kubeconfigs lose."""
    report = watch_tower(tower, api="10.89.97.200")
    assert bad(report) == {"api"}
    assert report["checks"]["api"]["detail"].startswith("10.89.97.200:6443 does not reach it: ")
    assert watch_tower(tower, api=MASTER)["checks"]["api"]["state"] == "passed"


def test_a_node_of_k3s_that_is_not_ready_is_bad_by_name(tower: Tower) -> None:
    tower.worker("k3s stop", {"cluster": "tower", "node": "k3s-worker-1"})
    report = watch_tower(tower)
    assert bad(report) == {"nodes"}
    assert report["checks"]["nodes"]["detail"] == "not Ready: k3s-worker-1"


def test_a_pod_of_k3s_that_does_not_resolve_is_bad_with_the_nodes_resolvers(tower: Tower) -> None:
    tower.master.machine.set("pods.json", {"lookup": "fails"})
    report = watch_tower(tower)
    assert bad(report) == {"dns"}
    remedy = report["checks"]["dns"]["remedy"]
    assert "/etc/resolv.conf of the nodes" in remedy
    assert "k3s kubectl" in remedy
