"""What is looked at: the state of the stack by Pulumi's CLI, all else by hostctl on the hosts.

Nothing is changed and no value of a Secret leaves its host. A host that does not answer, a Docker
that is down, and a state that cannot be read are told as that, and all else is looked at all the
same.
"""

import json
import operator
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
from components.host import Connection, HostError, Question, Unreachable, kubeconfig_path
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
_K3S_DATA = "/var/lib/rancher/k3s"


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
    connection, cluster = Connection(stack.host), stack.cluster
    if isinstance(cluster, settings.K3sCluster):
        yield from _k3s(cluster, stack.host, connection)
    yield from _common(stack, connection)


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
    kubeconfig = None if k3d else kubeconfig_path(cluster)
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
        remedy = f"pulumi up, or hostctl k3d start {cluster}" if k3d else ""
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
    if isinstance(cluster, settings.K3dCluster):
        from components.cluster.k3d import cluster_spec

        spec = cluster_spec(cluster, stack.network) if stack.has_cluster else {}
        try:
            [answer] = connection.results([(["k3d", "doctor"], spec)])
        except Unreachable as unreachable:
            yield _silent(connection.name, unreachable)
        else:
            yield from _findings(connection.name, "k3d doctor", answer)
        return
    needs = needs_of(stack.storage)
    lacks: Question = (["storage", "check"], {"needs": needs, "disks": []})
    if isinstance(cluster, settings.K3sCluster):
        yield from _k3s(cluster, stack.host, connection, lacks)
        return
    # Of the machines of a cluster that others made, only the host is reached.
    own = [name for name, node in cluster.nodes.items() if node.address == stack.host.address]
    try:
        asked = [_nodes_question(cluster), *[lacks for _ in own]]
        answer, *findings = connection.results(asked)
    except Unreachable as unreachable:
        yield _silent(connection.name, unreachable)
        return
    yield from _nodes(cluster, answer)
    for name, found in zip(own, findings, strict=True):
        yield from _findings(f"node {name}", "storage check", found)
    for name in [name for name in cluster.nodes if needs and name not in own]:
        now = "not reached by this stack"
        remedy = f"see by hand what a node must have ({', '.join(needs)}): docs/storage.md"
        yield Row("host", f"node {name}", "nothing to mend", now, "unknown", remedy)


def _findings(name: str, what: str, answer: Answer) -> Rows:
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


def _common(stack: settings.Settings, connection: Connection) -> Rows:
    """What a stack of any kind has on its host and in its cluster: all in one call."""
    cluster = stack.cluster
    on_k3d = isinstance(cluster, settings.K3dCluster)
    kubeconfig = cluster.kubeconfig.path if on_k3d else kubeconfig_path(cluster.name)
    declared: dict[str, list[str]] = {}
    for secret in stack.declared_secrets():
        names = declared.setdefault(secret.namespace, [])
        # One that is optional may be left out (components/secrets.py).
        names += [] if secret.secret.optional else [secret.name]
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
    room = [cluster.storage_dir] if on_k3d and stack.has_cluster else []
    look = {"cluster": cluster.name, "containers": list(hosts.values()), "directories": room}
    # In its node, where the kubeconfig on the host may be missing.
    way_in = {"cluster": cluster.name, "kubeconfig": None if on_k3d else kubeconfig}
    own = _own_questions(stack)
    asked: list[Question] = [
        *own,
        (["watch", "inspect"], look),
        *[(["secret", "list"], way_in) for _ in declared and [1]],
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
        answers = iter(connection.results(asked))
    except Unreachable as unreachable:
        yield _silent(connection.name, unreachable)
        return
    yield Row("host", connection.name, "reachable", "answers", "fine")
    live, *upkeep = (next(answers) for _ in own)
    if not isinstance(cluster, settings.K3dCluster):
        yield from _nodes(cluster, live)
    elif stack.has_cluster:
        yield from _k3d(cluster.name, live)
    else:
        yield _off(cluster, live)
    if upkeep:
        yield from _upkeep(stack, *upkeep)
    seen = next(answers)
    if declared:
        yield from _secrets(declared, next(answers))
    for key, answer in zip(inside, answers, strict=True):
        yield _connector(key, inside[key], answer)
    if not seen["ok"]:
        yield _refused("host", "watch inspect", seen)
        return
    for key, container in hosts.items():
        state = seen["containers"][container]
        verdict = "unknown" if state is None else "fine" if state == "running" else "bad"
        remedy = "pulumi up" if state == "absent" else f"docker logs {container}"
        yield Row("tunnels", key, "running", state or "cannot tell", verdict, remedy)
    for directory, free in seen["room"].items():
        yield _room(directory, free, f"hostctl clean {cluster.name}")
    yield from _watching(stack, seen["report"])
    for one in seen["unseen"]:
        yield Row("host", "not seen", "", one, "unknown")


def _own_questions(stack: settings.Settings) -> list[Question]:
    """What the host is asked about a cluster of this kind."""
    cluster = stack.cluster
    backups: list[Question] = (
        [
            (["units", "status"], units_spec(stack)),
            (["backup", "list"], {"name": cluster.name}),
        ]
        if stack.has_units
        else []
    )
    if not isinstance(cluster, settings.K3dCluster):
        return [_nodes_question(cluster), *backups]
    # Not above: Docker's package costs time, and only who has a cluster in it pays.
    from components.cluster.k3d import cluster_spec

    spec = cluster_spec(cluster, stack.network)
    if not stack.has_cluster:
        # Where from is no matter while it is not wanted here.
        return [(["k3d", "inspect"], {**spec, "moved_from": None})]
    return [(["k3d", "inspect"], spec), *backups]


def _nodes_question(cluster: settings.K3sCluster | settings.ExistingCluster) -> Question:
    return ["cluster", "inspect"], {
        "name": cluster.name,
        "kubeconfig": kubeconfig_path(cluster.name),
    }


def _nodes(cluster: settings.K3sCluster | settings.ExistingCluster, answer: Answer) -> Rows:
    """What the API tells of the nodes, and whether it answers."""
    if not answer["ok"]:
        yield _refused("cluster", cluster.name, answer)
        return
    if answer["state"] != "reachable":
        remedy = (
            "systemctl status k3s on the servers (docs/tower.md)"
            if isinstance(cluster, settings.K3sCluster)
            else "bring its API up: docs/metal.md"
        )
        now = f"does not answer: {answer['detail']}"
        yield Row("cluster", cluster.name, "answers", now, "bad", remedy)
        return
    yield Row("cluster", cluster.name, "answers", "answers", "fine")
    for name in [*cluster.nodes, *sorted(answer["nodes"].keys() - cluster.nodes.keys())]:
        node = answer["nodes"].get(name)
        if node is None:
            now, verdict, remedy = "no such node", "bad", "let it join, or remove it from "
            remedy += "homelab:cluster.nodes"
        elif name not in cluster.nodes:
            now, verdict = "not declared", "bad"
            remedy = f"write its address under homelab:cluster.nodes.{name}"
        else:
            now = f"{'Ready' if node['ready'] else 'not Ready'} {node['version']}".rstrip()
            verdict = "fine" if node["ready"] else "bad"
            remedy = f"kubectl describe node {name}"
        yield Row("cluster", f"node {name}", "Ready", now, verdict, remedy)


def _off(cluster: settings.K3dCluster, answer: Answer) -> Row:
    """A cluster that the settings describe and do not want, or not yet."""
    if not answer["ok"]:
        error = answer["error"]
        if error["code"] == "refused":
            # That of one that moved away, among others.
            return Row("cluster", cluster.name, "off", error["cause"], "fine")
        return _refused("cluster", cluster.name, answer)
    state = answer["cluster"]["state"]
    verdict = "bad" if state == "running" else "fine"
    remedy = "homelab:cluster.enabled is false: docs/move.md says when which host has it"
    return Row("cluster", cluster.name, "off", state, verdict, remedy)


def _room(what: str, free: int | None, remedy: str) -> Row:
    now = "cannot tell" if free is None else f"{free / _GIB:.1f} GiB left"
    verdict = "unknown" if free is None else "fine" if free >= 5 * _GIB else "bad"
    return Row("host", what, "5 GiB of room", now, verdict, remedy)


def _k3d(name: str, inspect: Answer) -> Rows:
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


def _upkeep(stack: settings.Settings, units: Answer, backups: Answer) -> Rows:
    """What runs on the host on a schedule, and what came of it."""
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


def _snapshots_of(cluster: settings.K3sCluster) -> dict[str, Any]:
    directory = cluster.snapshots.directory if cluster.snapshots else None
    target = {"directory": directory} if directory else None
    return {"cluster": cluster.name, "target": target}


def _snapshots(cluster: settings.K3sCluster, node: str, answer: Answer) -> Rows:
    """The snapshots of etcd that a server keeps. k3s names those that it takes on the schedule
    etcd-snapshot-NODE-SECONDS; one by hand is none of them.
    """
    declared = cluster.snapshots or settings.Snapshots()
    what, schedule = f"etcd of {node}", declared.schedule
    if not answer["ok"]:
        yield _refused("backups", what, answer)
        return
    ours = [one for one in answer["snapshots"] if one["name"].startswith("etcd-snapshot-")]
    places = {
        "disk": [one for one in ours if not one["location"].startswith("s3:")],
        "s3": [one for one in ours if one["location"].startswith("s3:")],
    }
    remedy = (
        f"on {node}: journalctl --unit k3s --grep snapshot; by hand `hostctl k3s snapshot take` "
        "(docs/tower.md)"
    )
    yield _newest(what, schedule, places["disk"], remedy)
    if declared.s3 and not places["s3"]:
        # The bucket's keys are not read here; k3s, which has them, told of none.
        now = "not seen: k3s on the server lists none there, or is stopped"
        remedy = "hostctl k3s snapshot list with the bucket as target (docs/tower.md)"
        yield Row("backups", f"{what} in {declared.s3.bucket}", schedule, now, "unknown", remedy)
    elif declared.s3:
        yield _newest(f"{what} in {declared.s3.bucket}", schedule, places["s3"], remedy)


def _newest(what: str, schedule: str, taken: Sequence[Answer], remedy: str) -> Row:
    if not taken:
        return Row("backups", what, schedule, "none yet", "bad", remedy)
    newest = max(taken, key=lambda one: one["created"])
    when = datetime.fromisoformat(newest["created"].replace("Z", "+00:00"))
    late = datetime.now(timezone.utc) - when > 2 * _longest_gap(schedule)
    now = f"{len(taken)}, newest {when:%Y-%m-%d %H:%M} UTC, {newest['location'].rpartition('/')[0]}"
    return Row("backups", what, schedule, now, "bad" if late else "fine", remedy)


def _longest_gap(cron: str) -> timedelta:
    """The longest time between two runs of a schedule of cron, as of any four years."""
    minute, hour, day, month, weekday = cron.split()
    times = [
        timedelta(hours=one, minutes=other)
        for one in sorted(_values(hour, 0, 23))
        for other in sorted(_values(minute, 0, 59))
    ]
    days, months = _values(day, 1, 31), _values(month, 1, 12)
    weekdays = {one % 7 for one in _values(weekday, 0, 6)}
    # crontab(5): where both are given, one of them is enough.
    either = day[0] != "*" != weekday[0]
    dates = []
    for one in (datetime(2024, 1, 1) + timedelta(days=n) for n in range(4 * 365 + 1)):
        fits = (one.day in days, one.isoweekday() % 7 in weekdays)
        if one.month in months and (any(fits) if either else all(fits)):
            dates.append(one)
    gaps = [*map(operator.sub, times[1:], times)]
    gaps += [gap - times[-1] + times[0] for gap in map(operator.sub, dates[1:], dates)]
    return max(gaps) if len(dates) > 1 else timedelta(days=4 * 365)


def _values(field: str, least: int, most: int) -> set[int]:
    """The numbers that a field of cron names."""
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        first, _, last = (f"{least}-{most}" if span == "*" else span).partition("-")
        last = last or (str(most) if step else first)
        found.update(range(int(first), int(last) + 1, max(1, int(step or 1))))
    return found


def _secrets(declared: Mapping[str, Sequence[str]], answer: Answer) -> Rows:
    if not answer["ok"]:
        yield _refused("secrets", "all", answer)
        return
    there = {(one["namespace"], one["name"]) for one in answer["secrets"]}
    for namespace, names in sorted(declared.items()):
        count = str(len(names))
        missing = sorted(name for name in names if (namespace, name) not in there)
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


def _k3s(
    cluster: settings.K3sCluster,
    host: settings.Host,
    connection: Connection,
    *more: Question,
) -> Rows:
    """Each node on its own machine, one call each; ``more`` are asked for findings."""
    for name, way in connections_of(cluster, host, connection).items():
        spec = {**node_spec(cluster, name), "tokenDigest": _NO_DIGEST}
        look = {"cluster": cluster.name, "directories": [_K3S_DATA]}
        # Snapshots are no finding of the doctor's.
        takes = not more and cluster.datastore == "etcd" and cluster.nodes[name].role == "server"
        listed: list[Question] = [(["k3s", "snapshot", "list"], _snapshots_of(cluster))]
        try:
            asked: list[Question] = [(["k3s", "inspect"], spec), (["watch", "inspect"], look)]
            answer, seen, *found = way.results([*asked, *(listed if takes else more)])
        except Unreachable as unreachable:
            yield _silent(f"node {name}", unreachable)
            continue
        if not answer["ok"]:
            yield _refused("host", f"k3s on {name}", answer)
            continue
        node = answer["node"] or {"state": "absent", "version": None}
        verdict = "fine" if node["state"] == "running" else "bad"
        version = f" {node['version']}" if node["version"] else ""
        declared, now = f"running {cluster.version}", node["state"] + version
        yield Row("host", f"k3s on {name}", declared, now, verdict, "pulumi up")
        for one in answer["differences"] if answer["node"] else []:
            # Secrets are not compared: this reader has none.
            if one["key"] in ("state", "tokenDigest") or one["key"].startswith("config.etcd-s3-"):
                continue
            yield _difference(f"{name}: {one['key']}", one, "pulumi up")
        for one in answer["warnings"]:
            yield Row("host", f"k3s on {name}", "", one["what"], "bad", one["remedy"])
        if seen["ok"]:
            remedy = f"on {name}: k3s crictl rmi --prune (docs/runbooks/disk-full.md)"
            yield _room(f"{name}:{_K3S_DATA}", seen["room"][_K3S_DATA], remedy)
        if takes:
            yield from _snapshots(cluster, name, found[0])
            continue
        for (verb, _), findings in zip(more, found, strict=True):
            yield from _findings(f"node {name}", " ".join(verb), findings)
