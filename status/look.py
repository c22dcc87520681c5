"""What is looked at: the state of the stack by Pulumi's CLI, all else by hostctl on the hosts.

Nothing is changed and no secret travels. A host that does not answer, a Docker that is down, and a
state that cannot be read are told as that, and all else is looked at all the same.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

from pulumi import automation

from components import settings
from components.cluster.k3s import node_spec
from components.cluster.kinds import connections_of
from components.host import Connection, HostError, Question, Unreachable
from components.ownership import declared_key, deployment_name, other_owners, reference
from components.storage.live import needs_of
from components.units import units_spec

Verdict = Literal["fine", "bad", "unknown"]
Rows = Iterator["Row"]
Answer = Mapping[str, Any]

# hostctl compares a token by a digest; this reader has no passphrase, so that of none is given and
# the answer to it is left out.
_NO_DIGEST = "0" * 16
_GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One thing that was looked at: ``part`` is host, cluster, secrets, tunnels, backups, watching,
    owners or state. ``unknown`` is what could not be seen.
    """

    part: str
    what: str
    declared: str
    now: str
    verdict: Verdict
    remedy: str = ""


class _NoState(Exception):
    """Why the state could not be read."""


def _exported(name: str, project: Path) -> dict[str, Any]:
    """The state's deployment. Needs Pulumi's backend, and no passphrase."""
    argv = ["pulumi", "stack", "export", "--stack", name, "--cwd", str(project)]
    ran = subprocess.run(
        [*argv, "--non-interactive"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if ran.returncode:
        why = (ran.stderr.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
        raise _NoState(why)
    return json.loads(ran.stdout)["deployment"]


def _no_state(name: str, why: _NoState) -> Row:
    remedy = "pulumi login, and PULUMI_BACKEND_URL, name where the state is (docs/state.md)"
    return Row("state", "stack", name, str(why), "unknown", remedy)


def state_of(name: str, project: Path) -> list[Row]:
    """What Pulumi recorded of its last run."""
    try:
        state = _exported(name, project)
    except _NoState as why:
        return [_no_state(name, why)]
    resources = state.get("resources") or []
    if len(resources) < 2:
        return [Row("state", "resources", "some", "none", "bad", "pulumi up")]
    when = (state.get("manifest") or {}).get("time", "")[:19].replace("T", " ")
    rows = [Row("state", "resources", "some", f"{len(resources)}, last changed {when}", "fine")]
    for pending in state.get("pending_operations") or []:
        urn = pending["resource"]["urn"].rpartition("::")[2]
        remedy = "pulumi up takes it up again; docs/state.md"
        rows.append(Row("state", urn, "done", f"cut off while {pending['type']}", "bad", remedy))
    return rows


def through_engine(look: Callable[[], Rows]) -> list[Row]:
    """Runs a look as a Pulumi program, which is how hosts are reached. It has a stack and a state
    of its own, which go with it.
    """
    rows: list[Row] = []

    def program() -> None:
        rows.extend(look())

    with tempfile.TemporaryDirectory(prefix="homelab-status-") as directory:
        automation.create_or_select_stack(
            "status",
            project_name="homelab-status",
            program=program,
            opts=automation.LocalWorkspaceOptions(
                work_dir=directory,
                env_vars={
                    "PULUMI_BACKEND_URL": f"file://{directory}",
                    "PULUMI_CONFIG_PASSPHRASE": "it holds no secret",
                },
            ),
        ).preview()
    return rows


def status(stack: settings.Settings) -> Rows:
    """Looks at all that the settings declare on hosts."""
    connection = Connection(stack.host)
    cluster = stack.cluster
    if isinstance(cluster, settings.K3sCluster):
        yield from _k3s(cluster, stack.host, connection)
    if not isinstance(cluster, settings.K3dCluster):
        yield from _common(stack, connection, f"/var/lib/homelab/kubeconfigs/{cluster.name}", [])
    elif not stack.has_cluster:
        yield Row("cluster", cluster.name, "off", "not looked at", "fine")
        yield from _common(stack, connection, cluster.kubeconfig.path, [])
    else:
        # Not above: Docker's package costs time, and only who has a cluster in it pays.
        from components.cluster.k3d import cluster_spec

        questions: list[Question] = [
            (["k3d", "inspect"], cluster_spec(cluster, stack.network)),
            (["units", "status"], units_spec(stack)),
            (["backup", "list"], {"name": cluster.name}),
        ]
        yield from _common(stack, connection, cluster.kubeconfig.path, questions)


def owners(stack: settings.Settings, name: str, project: Path) -> Rows:
    """Who owns each object of the cluster: what the objects say, and what the state holds."""
    try:
        resources = _exported(name, project).get("resources") or []
    except _NoState as why:
        resources = []
        yield _no_state(name, why)
    declared: dict[tuple[str, str, str], Answer] = {}
    for one in resources:
        inputs = one.get("inputs") or {}
        key = declared_key(one["type"], inputs)
        if key and not one.get("external") and not one.get("delete"):
            declared[key] = inputs
    cluster, connection = stack.cluster.name, Connection(stack.host)
    k3d = isinstance(stack.cluster, settings.K3dCluster)
    kubeconfig = None if k3d else f"/var/lib/homelab/kubeconfigs/{cluster}"
    spec = {"cluster": cluster, "kinds": [], "kubeconfig": kubeconfig}
    try:
        [answer] = connection.results([(["cluster", "owners"], spec)])
    except Unreachable as unreachable:
        yield _silent(connection.name, unreachable)
        return
    if not answer["ok"]:
        yield _refused("owners", cluster, answer)
        return
    if answer["state"] != "known":
        remedy = "pulumi up, or hostctl k3d start" if k3d else ""
        yield Row("owners", cluster, "answers", answer["detail"], "unknown", remedy)
        return
    for detail in answer["unseen"]:
        yield Row("owners", "not seen", "", detail, "unknown")
    live = {(one["kind"], one["namespace"] or "", one["name"]): one for one in answer["objects"]}
    rows = []
    for key, one in live.items():
        title = reference(key)
        inputs = declared.get(key)
        handed = title in stack.handed_over
        names = [owner for owner in one["owners"] if not (handed and owner == "Pulumi")]
        now = ", ".join(names or [one["maker"]])
        now += "".join(f", data written by {writer}" for writer in one["writers"])
        ours = "" if inputs is None else "handed over" if handed else "this stack"
        others = []
        if ours == "this stack" and inputs is not None:
            writes = any(inputs.get(word) is not None for word in ("data", "stringData"))
            others = other_owners(key, live, writes=writes)
        remedy = "; or ".join(
            [f'add "{title}" to homelab:handedOver', *(other.release for other in others)]
        )
        rows.append(Row("owners", title, ours, now, "bad" if others else "fine", remedy))
    yield from sorted(rows, key=lambda row: (row.now, row.what))


def doctor(stack: settings.Settings) -> Rows:
    """Looks at what each host of the stack lacks, each finding with its remedy."""
    connection, cluster = Connection(stack.host), stack.cluster
    nodes = {connection.name: connection}
    if isinstance(cluster, settings.K3sCluster):
        yield from _k3s(cluster, stack.host, connection)
        nodes = connections_of(cluster, stack.host, connection)
    elif isinstance(cluster, settings.K3dCluster):
        from components.cluster.k3d import cluster_spec

        spec = cluster_spec(cluster, stack.network) if stack.has_cluster else {}
        yield from _findings(connection.name, connection, ["k3d", "doctor"], spec)
    needs = needs_of(stack.storage)
    if needs and not isinstance(cluster, settings.K3dCluster):
        for name, node in nodes.items():
            question = {"needs": needs, "disks": []}
            yield from _findings(name, node, ["storage", "check"], question)


def _findings(name: str, connection: Connection, verb: Sequence[str], spec: Answer) -> Rows:
    what = " ".join(verb)
    try:
        [answer] = connection.results([(verb, spec)])
    except Unreachable as unreachable:
        yield _silent(name, unreachable)
        return
    if not answer["ok"]:
        yield _refused("host", what, answer)
        return
    for one in answer["findings"]:
        verdict = "fine" if one["severity"] == "info" else "bad"
        yield Row("host", name, one["severity"], one["what"], verdict, one["remedy"])
    if not answer["findings"]:
        yield Row("host", name, "nothing to mend", "nothing found", "fine")


def _silent(name: str, unreachable: HostError) -> Row:
    _, cause, remedy = (*str(unreachable).split("\n  "), "", "")[:3]
    cause, remedy = cause.removeprefix("Cause: "), remedy.removeprefix("Remedy: ")
    return Row("host", name, "reachable", f"does not answer: {cause}", "unknown", remedy)


def _refused(part: str, what: str, answer: Answer) -> Row:
    error = answer["error"]
    verdict = "unknown" if error["code"] == "cannot-tell" else "bad"
    now = f"{error['step']}: {error['cause']}"
    return Row(part, what, "", now, verdict, error["remedy"])


def _common(
    stack: settings.Settings,
    connection: Connection,
    kubeconfig: str,
    questions: Sequence[Question],
) -> Rows:
    """What a stack of any kind has on its host, and what ``questions`` ask of a k3d one: all in one
    call.
    """
    name = stack.cluster.name
    declared: dict[str, list[str]] = {}
    for secret in stack.declared_secrets():
        declared.setdefault(secret.namespace, []).append(secret.name)
    hosts = {
        key: tunnel.connector.container
        for key, tunnel in stack.tunnels.items()
        if isinstance(tunnel.connector, settings.HostConnector)
    }
    inside = {
        key: tunnel.connector
        for key, tunnel in stack.tunnels.items()
        if isinstance(tunnel.connector, settings.ClusterConnector)
    }
    k3d = stack.cluster if isinstance(stack.cluster, settings.K3dCluster) else None
    look = {
        "cluster": name,
        "kubeconfig": kubeconfig,
        "namespaces": sorted(declared),
        "containers": list(hosts.values()),
        "directories": [k3d.storage_dir] if k3d and questions else [],
    }
    asked = [
        *questions,
        (["watch", "inspect"], look),
        *(
            (
                ["connector", "status"],
                {
                    "kubeconfig": kubeconfig,
                    "namespace": connector.namespace,
                    "deployment": deployment_name(key),
                },
            )
            for key, connector in inside.items()
        ),
    ]
    try:
        answers = connection.results(asked)
    except Unreachable as unreachable:
        yield _silent(connection.name, unreachable)
        return
    yield Row("host", connection.name, "reachable", "answers", "fine")
    own, seen, connectors = (
        answers[: len(questions)],
        answers[len(questions)],
        answers[len(questions) + 1 :],
    )
    if questions:
        yield from _k3d(stack, own)
    if not seen["ok"]:
        yield _refused("host", "watch inspect", seen)
        return
    yield from _secrets(declared, seen)
    for key, answer in zip(inside, connectors, strict=True):
        yield _connector(key, inside[key], answer)
    for key, container in hosts.items():
        state = seen["containers"][container]
        verdict = "unknown" if state is None else "fine" if state == "running" else "bad"
        remedy = "pulumi up" if state == "absent" else f"docker logs {container}"
        yield Row("tunnels", key, "running", state or "cannot tell", verdict, remedy)
    for directory, free in seen["room"].items():
        now = "cannot tell" if free is None else f"{free / _GIB:.1f} GiB left"
        verdict = "unknown" if free is None else "fine" if free >= 5 * _GIB else "bad"
        yield Row("host", directory, "5 GiB of room", now, verdict, f"hostctl clean {name}")
    yield from _watching(stack, seen["report"])
    for one in seen["unseen"]:
        yield Row("host", "not seen", "", one, "unknown")


def _k3d(stack: settings.Settings, answers: Sequence[Answer]) -> Rows:
    inspect, units, backups = answers
    name = stack.cluster.name
    if not inspect["ok"]:
        yield _refused("cluster", name, inspect)
    else:
        live = inspect["cluster"]
        verdict = "fine" if live["state"] == "running" else "bad"
        yield Row("cluster", name, "running", live["detail"] or live["state"], verdict, "pulumi up")
        for one in live["differences"]:
            if one["key"] != "state":
                yield _difference(one["key"], one, one["remedy"])
        accepted = live["acceptance"]
        if accepted:
            passed = accepted["state"] == "passed"
            verdict = "fine" if passed else "bad"
            now = accepted["detail"] if not passed else "passed"
            yield Row("cluster", "acceptance", "passed", now, verdict, accepted["remedy"])
        for one in live["warnings"]:
            yield Row("cluster", "warning", "", one["what"], "bad", one["remedy"])
        for one in live["unseen"]:
            yield Row("cluster", "not seen", "", one, "unknown")
    if not units["ok"]:
        yield _refused("host", "units", units)
    else:
        for unit, one in units["units"].items():
            verdict = "fine" if one["installed"] == "current" else "bad"
            yield Row("host", unit, "installed", str(one["installed"]), verdict, "pulumi up")
        for one in units["failed"]:
            yield Row("host", one["unit"], "done", one["result"], "bad", one["remedy"])
        for one in units["notes"]:
            yield Row("host", "units", "", one, "bad")
        for one in units["unseen"]:
            yield Row("host", "not seen", "", one, "unknown")
    yield from _backups(stack, backups)


def _difference(what: str, one: Answer, remedy: str) -> Row:
    return Row("cluster", what, _shown(one["declared"]), _shown(one["live"]), "bad", remedy)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_PERIODS = {"hourly": timedelta(hours=1), "weekly": timedelta(days=7)}


def _backups(stack: settings.Settings, answer: Answer) -> Rows:
    if not stack.backups.items:
        return
    if not answer["ok"]:
        yield _refused("backups", "list", answer)
        return
    schedule = stack.backups.schedule
    day = schedule[:3] in ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    period = timedelta(days=7) if day else _PERIODS.get(schedule, timedelta(days=1))
    for name in stack.backups.items:
        taken = answer["items"].get(name) or []
        remedy = f"hostctl backup run {stack.cluster.name}"
        if not taken:
            verdict = "fine" if schedule == "never" else "bad"
            yield Row("backups", name, schedule, "none yet", verdict, remedy)
            continue
        newest = max(one["time"] for one in taken)
        when = datetime.strptime(newest, "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=timezone.utc)
        late = schedule != "never" and datetime.now(timezone.utc) - when > 2 * period
        now = f"{len(taken)}, newest {when:%Y-%m-%d %H:%M} UTC"
        yield Row("backups", name, schedule, now, "bad" if late else "fine", remedy)


def _secrets(declared: Mapping[str, Sequence[str]], seen: Answer) -> Rows:
    for namespace, names in sorted(declared.items()):
        there = seen["secrets"].get(namespace)
        count = str(len(names))
        if there is None:
            yield Row("secrets", namespace, count, "cannot tell", "unknown")
            continue
        missing = sorted(set(names) - set(there))
        now = f"without {', '.join(missing)}" if missing else count
        yield Row("secrets", namespace, count, now, "bad" if missing else "fine", "pulumi up")


def _connector(key: str, connector: settings.ClusterConnector, answer: Answer) -> Row:
    if not answer["ok"]:
        return _refused("tunnels", key, answer)
    ready, wanted = answer["ready"], connector.replicas
    verdict = "fine" if ready >= wanted else "bad"
    deployment = f"deployment/{deployment_name(key)}"
    remedy = f"kubectl --namespace={connector.namespace} describe {deployment}"
    now = f"{ready} ready" + (f": {answer['detail']}" if answer["detail"] else "")
    return Row("tunnels", key, f"{wanted} ready", now, verdict, remedy)


def _watching(stack: settings.Settings, report: Answer | None) -> Rows:
    schedule = stack.watching.schedule
    if report is None:
        if schedule != "never":
            remedy = f"hostctl watch run {stack.cluster.name}"
            yield Row("watching", "report", schedule, "none yet", "bad", remedy)
        return
    verdicts: dict[str, Verdict] = {"passed": "fine", "failed": "bad", "cannot-tell": "unknown"}
    for check, one in report["checks"].items():
        now = f"{one['state']} since {one['since']}"
        now += f": {one['detail']}" if one["detail"] else ""
        yield Row("watching", check, "passed", now, verdicts[one["state"]], one["remedy"])


def _k3s(cluster: settings.K3sCluster, host: settings.Host, connection: Connection) -> Rows:
    """Each node on its own machine, one call each."""
    for name, way in connections_of(cluster, host, connection).items():
        spec = {**node_spec(cluster, name), "tokenDigest": _NO_DIGEST}
        try:
            [answer] = way.results([(["k3s", "inspect"], spec)])
        except Unreachable as unreachable:
            yield _silent(f"node {name}", unreachable)
            continue
        if not answer["ok"]:
            yield _refused("cluster", f"node {name}", answer)
            continue
        node = answer["node"] or {"state": "absent", "version": None}
        verdict = "fine" if node["state"] == "running" else "bad"
        version = f" {node['version']}" if node["version"] else ""
        declared = f"running {cluster.version}"
        yield Row(
            "cluster", f"node {name}", declared, node["state"] + version, verdict, "pulumi up"
        )
        for one in answer["differences"] if answer["node"] else []:
            # Secrets are not compared: this reader has none.
            if one["key"] in ("state", "tokenDigest") or one["key"].startswith("config.etcd-s3-"):
                continue
            yield _difference(f"{name}: {one['key']}", one, "pulumi up")
        for one in answer["warnings"]:
            yield Row("cluster", f"node {name}", "", one["what"], "bad", one["remedy"])
