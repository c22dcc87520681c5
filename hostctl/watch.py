"""Verbs: watching: whether all works, told as metrics, as a page and by a webhook."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hostctl.acceptance import ACCEPT_SPEC, Answer, resolves
from hostctl.certificates import DAY_SECONDS, EXPIRES_SOON_DAYS, certificates_of
from hostctl.cluster import (
    Cluster,
    container_facts,
    kubeconfig_credentials,
    look,
    parse_json,
)
from hostctl.cluster_backup import seconds_of, utc
from hostctl.k3s_node import K3S_API_PORT, K3S_DATA, K3S_KUBECONFIG, k3s_kubectl, k3s_ready
from hostctl.live import api_address, live_api
from hostctl.machine import STATE_DIRECTORY, Machine
from hostctl.preflight import ROOM_BYTES
from hostctl.protocol import Failure, Result, say
from hostctl.record import read_record
from hostctl.running import kubectl_line, running_cluster
from hostctl.spec import (
    CLUSTER_NAME,
    CONTAINER_NAME,
    EXTERNAL_NAME,
    HOST,
    Items,
    Value,
    absolute_path,
    boolean,
    checked,
    one_of,
    or_null,
)
from hostctl.tools import attempt
from hostctl.waiting import ready, size_text

WATCH_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    # null: the cluster is k3s, which keeps its data where it always does.
    "storage_dir": Value(or_null(absolute_path), None),
    # Of k3s: the address or name at which the others reach the API.
    "api": Value(or_null(HOST), None),
    "dns": {key: ACCEPT_SPEC["acceptance"][key] for key in ("name", "image")},
    "argocd": Value(boolean, False),
    # Public host names, asked for over HTTPS.
    "routes": Items(Value(EXTERNAL_NAME), []),
    # A directory that node_exporter's textfile collector reads.
    "metrics": Value(or_null(absolute_path), None),
    "webhook": Value(or_null(one_of("ntfy", "slack", "generic")), None),
    # The file that holds its URL, which is a secret.
    "webhook_file": Value(or_null(absolute_path), None),
}
LOOK_SPEC: dict[str, Any] = {
    "cluster": Value(CLUSTER_NAME),
    "containers": Items(Value(CONTAINER_NAME), []),
    "directories": Items(Value(absolute_path), []),
}


class _Api(NamedTuple):
    """An API that answers this machine, and whether it does where the others reach it."""

    cluster: Cluster
    credentials: Mapping[str, str]
    address: str
    port: int
    refused: str | None = None

    def answer(self) -> Answer:
        where = f"{self.address}:{self.port}"
        if self.refused is None:
            return Answer("passed", f"it answers at {where}", "")
        remedy = "which server has the address? ip addr; systemctl status k3s"
        return Answer("failed", f"{where} does not reach it: {self.refused}", remedy)


_UNSEEN = "the API does not answer, which is told on its own"


def watch_run(machine: Machine, spec: dict[str, Any]) -> Result:
    """Looks once at all that must work: the API through its published port, a name from a pod, each
    route from outside, ArgoCD's applications, certificates, room, backups. Keeps a report, a page
    and metrics, and sends one message when something turned bad or good again.

    What fails is a result and no failure of the verb. What cannot be told is neither bad nor good,
    and is told by nobody. A message that could not be sent is sent by the next run.
    """
    wanted = checked(spec, WATCH_SPEC, "watch run")
    name = wanted["cluster"]
    if wanted["webhook"] and not wanted["webhook_file"]:
        cause = f"webhook is {wanted['webhook']} and webhook_file is missing"
        raise Failure("bad-spec", "watch run", cause, "give the file that holds the URL")
    with machine.lock(f"watch-{name}"):
        former = _report(machine, name) or {"checks": {}, "told": []}
        numbers: dict[str, float] = {}
        answers = dict(_checks(machine, wanted, numbers))
        now = utc(machine.now())
        told, trouble = _tell_changes(machine, wanted, answers, set(former["told"]))
        if wanted["webhook"]:
            remedy = f"correct the URL in {wanted['webhook_file']} (homelab:watching.webhook)"
            answers["webhook"] = (
                Answer("failed", trouble, remedy) if trouble else Answer("passed", "", "")
            )
        checks = {}
        for key, answer in answers.items():
            before = former["checks"].get(key, {})
            since = before["since"] if before.get("state") == answer.state else now
            checks[key] = {**answer._asdict(), "since": since}
        report = {"at": now, "checks": checks, "told": sorted(told)}
        base = f"{STATE_DIRECTORY}/watch/{name}"
        machine.make_directory(os.path.dirname(base), 0o755)
        machine.write_atomic(f"{base}.json", json.dumps(report, indent=1).encode(), 0o644)
        machine.write_atomic(f"{base}.html", _page(name, report).encode(), 0o644)
        if wanted["metrics"]:
            machine.make_directory(wanted["metrics"], 0o755)
            path = f"{wanted['metrics']}/homelab-{name}.prom"
            numbers["watch_time_seconds"] = machine.now()
            machine.write_atomic(path, _metrics(name, checks, numbers).encode(), 0o644)
    for key, one in checks.items():
        say(f"{key}: {one['state']}: {one['detail']}")
    return report


def watch_inspect(machine: Machine, spec: dict[str, Any]) -> Result:
    """Says what was last seen by `watch run`, and what is there of containers (their states) and
    room (bytes by directory). null is what cannot be told."""
    wanted = checked(spec, LOOK_SPEC, "watch inspect")
    unseen: list[str] = []
    containers: dict[str, str | None] = {}
    for container in wanted["containers"]:
        containers[container] = None
        try:
            facts = container_facts(machine, container, f"looking at container {container}")
            containers[container] = facts["State"]["Status"] if facts else "absent"
        except Failure as failure:
            unseen.append(f"container {container}: {failure.cause}")
    room: dict[str, int | None] = {}
    for directory in wanted["directories"]:
        room[directory] = None
        try:
            room[directory] = machine.free_bytes(directory)
        except OSError as error:
            unseen.append(f"room of {directory}: {error.strerror or error}")
    report = _report(machine, wanted["cluster"])
    return {"report": report, "containers": containers, "room": room, "unseen": unseen}


def _report(machine: Machine, name: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(machine.read(f"{STATE_DIRECTORY}/watch/{name}.json"))
    return None


def _checks(
    machine: Machine, wanted: Mapping[str, Any], numbers: dict[str, float]
) -> Iterator[tuple[str, Answer]]:
    name, on_machine = wanted["cluster"], wanted["storage_dir"] is None
    try:
        api = _k3s_api(machine, wanted) if on_machine else _k3d_api(machine, name)
    except Failure as failure:
        api = Answer("failed", f"{failure.step}: {failure.cause}", failure.remedy)
    own = (["nodes"] if on_machine else []) + (["argocd"] if wanted["argocd"] else [])
    if isinstance(api, _Api):
        cluster, dns = api.cluster, wanted["dns"]
        yield "api", api.answer()
        with machine.lock(f"acceptance-{name}"):
            yield "dns", resolves(machine, cluster, dns["name"], dns["image"])
        yield from _certificates(machine, api, numbers)
        for key in own:
            yield key, {"nodes": _nodes, "argocd": _applications}[key](machine, cluster)
    else:
        yield "api", api
        for key in ("dns", *own):
            yield key, Answer("cannot-tell", _UNSEEN, api.remedy)
    for hostname in wanted["routes"]:
        yield f"route {hostname}", _route(machine, hostname)
    for directory in dict.fromkeys((wanted["storage_dir"] or K3S_DATA, STATE_DIRECTORY)):
        yield f"room {directory}", _room(machine, name, directory, numbers, on_machine)
    record = read_record(machine, name)
    for job in ("backup", "verify"):
        run = (record.get("runs") or {}).get(job)
        if run:
            again = f"hostctl backup {'run' if job == 'backup' else job} {name}"
            state = "passed" if run["ok"] else "failed"
            yield job, Answer(state, run["cause"] or f"done at {run['at']}", again)
    for target, items in (record.get("verified") or {}).items():
        for item, seen in items.items():
            labels = f'{{target="{target}",item="{item}"}}'
            numbers[f"restore_verified_time_seconds{labels}"] = seconds_of(seen["at"])


def _k3d_api(machine: Machine, name: str) -> _Api | Answer:
    remedy = f"hostctl k3d doctor {name}"
    cluster = look(machine, name)
    if cluster.state == "absent":
        return Answer("failed", "the cluster does not exist", remedy)
    credentials, why = ready(machine, cluster)
    if not credentials:
        return Answer("failed", why, remedy)
    return _Api(cluster, credentials, api_address(cluster), live_api(cluster)["port"])


def _k3s_api(machine: Machine, wanted: Mapping[str, Any]) -> _Api | Answer:
    """Of the server that this machine is, at the address at which the others reach it."""
    step, remedy = "watching", "systemctl status k3s; journalctl --unit k3s"
    cluster = running_cluster(machine, wanted["cluster"], step)
    ran = k3s_kubectl(machine, ["get", "--raw=/readyz"], step, raw=True)
    if ran.code:
        return Answer("failed", ran.complaint, remedy)
    try:
        text = machine.read(K3S_KUBECONFIG).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return Answer("cannot-tell", f"{K3S_KUBECONFIG}: {error}", remedy)
    credentials = kubeconfig_credentials(text)
    if credentials is None:
        return Answer("failed", f"{K3S_KUBECONFIG} holds no credentials", remedy)
    address = wanted["api"] or "127.0.0.1"
    ca = base64.b64decode(credentials["ca"]).decode("ascii", "replace")
    refused = machine.connect(address, K3S_API_PORT, ca)
    return _Api(cluster, credentials, address, K3S_API_PORT, refused)


def _nodes(machine: Machine, cluster: Cluster) -> Answer:
    step = "looking at the nodes"
    ran = attempt(machine, [*kubectl_line(cluster), "get", "nodes", "--output=json"], step)
    if ran.code:
        return Answer("cannot-tell", ran.complaint, "systemctl status k3s")
    nodes = parse_json(ran.out, step)["items"]
    bad = [node["metadata"]["name"] for node in nodes if not k3s_ready(node)]
    if bad:
        remedy = "on it: systemctl status k3s k3s-agent; one that is lost: docs/tower.md"
        return Answer("failed", f"not Ready: {', '.join(sorted(bad))}", remedy)
    return Answer("passed", f"all {len(nodes)} are Ready", "")


def _certificates(
    machine: Machine, api: _Api, numbers: dict[str, float]
) -> Iterator[tuple[str, Answer]]:
    name = api.cluster.name
    remedy = f"hostctl k3d stop {name}; hostctl k3d start {name}; pulumi up"
    if api.cluster.on_machine:
        remedy = "systemctl restart k3s, on one server after another; pulumi up"
    seen, _ = certificates_of(machine, (api.address, api.port), api.credentials)
    for use, valid in seen.items():
        if valid is None:
            continue
        numbers[f'certificate_ends_time_seconds{{use="{use}"}}'] = valid.ends
        days = (valid.ends - machine.now()) / DAY_SECONDS
        yield (
            f"certificate {use}",
            Answer(
                "passed" if days >= EXPIRES_SOON_DAYS else "failed",
                f"it ends in {days:.0f} days" if days > 0 else "it has ended",
                remedy,
            ),
        )


def _applications(machine: Machine, cluster: Cluster) -> Answer:
    argv = ["get", "applications.argoproj.io", "--all-namespaces", "--output=json"]
    step = "looking at ArgoCD's applications"
    ran = attempt(machine, [*kubectl_line(cluster), *argv], step)
    if ran.code:
        return Answer("cannot-tell", ran.complaint, "is ArgoCD there? pulumi up")
    bad, count = [], 0
    for application in parse_json(ran.out, step)["items"]:
        count += 1
        status = application.get("status") or {}
        states = [(status.get(key) or {}).get("status", "Unknown") for key in ("sync", "health")]
        # Unknown health is what an application has that nobody can judge.
        if states[0] != "Synced" or states[1] in ("Degraded", "Missing"):
            bad.append(f"{application['metadata']['name']} is {', '.join(states)}")
    if bad:
        return Answer("failed", "; ".join(bad), "argocd app get NAME says what is in the way")
    return Answer("passed", f"all {count} are synced", "")


def _route(machine: Machine, hostname: str) -> Answer:
    remedy = (
        "does its connector run? kubectl get pods --all-namespaces; docker ps --all; Cloudflare's"
    )
    remedy += " dashboard has the tunnel's state (docs/runbooks/tunnel-down.md)"
    try:
        status = machine.visit(f"https://{hostname}/")
    except OSError as error:
        return Answer("failed", f"no answer: {error}", remedy)
    # 5xx is what the edge says of a tunnel without connector, and a connector of its origin.
    return Answer("failed" if status >= 500 else "passed", f"HTTP {status}", remedy)


def _room(
    machine: Machine, name: str, directory: str, numbers: dict[str, float], on_machine: bool
) -> Answer:
    try:
        free = machine.free_bytes(directory)
    except OSError as error:
        return Answer("cannot-tell", str(error.strerror or error), "is the disk mounted?")
    numbers[f"free_bytes{{directory={_quoted(directory)}}}"] = free
    remedy = f"hostctl clean {name} --dry-run; docker system df"
    if on_machine:
        remedy = f"k3s crictl rmi --prune; du -xhd 2 {K3S_DATA}"
    return Answer("failed" if free < ROOM_BYTES else "passed", f"{size_text(free)} left", remedy)


# Telling


def _tell_changes(
    machine: Machine, wanted: Mapping[str, Any], answers: Mapping[str, Answer], told: set[str]
) -> tuple[set[str], str]:
    """Sends what turned bad or good since it was last told. Returns what is told to be bad now, and
    why nothing could be sent; the URL is in no message."""
    bad = {key for key, answer in answers.items() if answer.state == "failed"}
    # What is watched no longer is not bad any more.
    good = {key for key in told if key not in answers or answers[key].state == "passed"}
    new = bad - told
    if not wanted["webhook"] or not (new or good):
        return told, ""
    name = wanted["cluster"]
    title = f"{name}: " + ", ".join(
        f"{len(keys)} {what}" for keys, what in ((new, "bad"), (good, "good again")) if keys
    )
    lines = [f"bad: {key}: {answers[key].detail}. {answers[key].remedy}" for key in sorted(new)]
    lines += [f"good again: {key}" for key in sorted(good)]
    text = "\n".join(lines)
    headers = {"Content-Type": "application/json"}
    if wanted["webhook"] == "ntfy":
        headers = {"Title": title, "Priority": "high" if new else "default"}
        body = text
    elif wanted["webhook"] == "slack":
        body = json.dumps({"text": f"*{title}*\n{text}"})
    else:
        said = {key: answers[key]._asdict() for key in sorted(new)}
        facts = {"cluster": name, "bad": said, "good": sorted(good)}
        body = json.dumps({"title": title, "text": text, **facts})
    try:
        url = machine.read(wanted["webhook_file"]).decode("ascii").strip()
        status = machine.visit(url, body.encode(), headers)
    except (OSError, ValueError) as error:
        return told, f"the message was not sent: {type(error).__name__}"
    if status >= 300:
        return told, f"the message was not taken: HTTP {status}"
    return (told | new) - good, ""


def _metrics(
    name: str, checks: Mapping[str, Mapping[str, str]], numbers: Mapping[str, float]
) -> str:
    """The text of node_exporter's textfile collector."""
    values = {"passed": "1", "failed": "0", "cannot-tell": "NaN"}
    lines = [
        "# HELP homelab_check 1 where it passed, 0 where it failed, NaN where it cannot be told.",
        "# TYPE homelab_check gauge",
    ]
    for key, one in checks.items():
        what = f'{{cluster="{name}",check={_quoted(key)}}}'
        lines.append(f"homelab_check{what} {values[one['state']]}")
    typed = set()
    for key, number in sorted(numbers.items()):
        metric, _, labels = key.partition("{")
        if metric not in typed:
            lines.append(f"# TYPE homelab_{metric} gauge")
            typed.add(metric)
        more = f",{labels[:-1]}" if labels else ""
        lines.append(f'homelab_{metric}{{cluster="{name}"{more}}} {number:.0f}')
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    # The text format escapes these two and the end of a line, which no path of ours has.
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _page(name: str, report: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr class={one['state']}>"
        + "".join(
            f"<td>{html.escape(cell)}</td>"
            for cell in (key, one["state"], one["since"], one["detail"], one["remedy"])
        )
        for key, one in report["checks"].items()
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>td,th{{text-align:left;"
        "padding:.2em 1em;vertical-align:top}.failed{background:#fbb}.cannot-tell{background:#ddd}"
        f"</style><h1>{name}</h1><p>As seen at {report['at']}</p>"
        f"<table><tr><th>what<th>state<th>since<th>detail<th>remedy{rows}</table>\n"
    )
