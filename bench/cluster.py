"""What a healthy cluster costs to look at, to make, and to keep as declared: on a real Docker, a
real k3d and a real API server (tests/cluster), each against what one would do without this project.

- `hostctl k3d ensure` with nothing to do, against `k3d cluster list` alone;
- `hostctl k3d ensure` that creates, against `k3d cluster create` with the same image;
- `pulumi up --refresh` of p510 with nothing to do, against the incumbent's unit, same cluster.

The two sides run in turn; the ratio is taken pair by pair.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from bench.figure import Figure, say
from hostctl import program
from setup import cluster as rig
from setup.cache import SetupError
from tests.cluster.engine import CLUSTER_SPEC, NODE_IMAGE, Engine, engine
from tests.cluster.p510 import RealP510

LIST_TARGET = 3.0
CREATE_TARGET = 1.15
UNIT_TARGET = 0.5

_NETWORK = ["docker", "network", "create", "--subnet", "172.30.0.0/16", "--gateway", "172.30.0.1"]
_SPEC = {**CLUSTER_SPEC, "api_wait_seconds": 600}
# The same cluster, as a person would make it; k3d returns when the server says that it is up.
_PLAIN = [
    "k3d", "cluster", "create", "factory", "--image", NODE_IMAGE, "--no-lb",
    "--network", "k3d-factory", "--api-port", "127.0.0.1:6443",
    "--k3s-arg", "--disable=traefik@server:*", "--k3s-arg", "--disable=servicelb@server:*",
    "--volume", "/mnt/img_pool/k3d/storage:/var/lib/rancher/k3s/storage@server:*",
    "--kubeconfig-update-default=false", "--kubeconfig-switch-context=false",
]  # fmt: skip


def figures(directory: Path, rounds: int) -> list[Figure]:
    """Medians of that many rounds of each comparison. Needs root; works in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    try:
        found = rig.resolve()
    except SetupError as error:
        say(f"cluster: not measured, no Docker engine can be started here: {error}")
        return []
    with engine(found) as host:
        figures = _ensure(host, rounds)
        host.clean()
        return [*figures, *_unit(host, directory, rounds)]


def _ensure(host: Engine, rounds: int) -> list[Figure]:
    hostctl = host.root / "hostctl"
    hostctl.write_text(program.text())
    hostctl.chmod(0o755)
    ensure = [str(hostctl), "k3d", "ensure"]
    spec = json.dumps(_SPEC)

    def anew(make: Callable[[], object]) -> float:
        host.clean()
        host.run([*_NETWORK, "k3d-factory"])
        return _seconds(make)

    creating = _pairs(
        "ensure that creates against k3d cluster create",
        rounds,
        lambda: anew(lambda: host.run(_PLAIN)),
        lambda: anew(lambda: host.run(ensure, input=spec)),
    )
    looking = _pairs(
        "ensure of a healthy cluster against k3d cluster list",
        3 * rounds,
        lambda: _seconds(lambda: host.run(["k3d", "cluster", "list"])),
        lambda: _seconds(lambda: host.run(ensure, input=spec)),
    )
    return [
        *_compared(looking, "k3d cluster list", "ensure, healthy", LIST_TARGET),
        *_compared(creating, "k3d cluster create", "ensure, creating", CREATE_TARGET),
    ]


def _unit(host: Engine, directory: Path, rounds: int) -> list[Figure]:
    stack = RealP510(host, directory / "p510")
    stack.prepare()
    say("cluster: up of p510")
    stack.up()
    unit = directory / "unit.sh"
    unit.write_text(_incumbent(stack))
    pairs = _pairs(
        "up --refresh of p510 against the incumbent's unit",
        rounds,
        lambda: _seconds(lambda: host.run(["sh", str(unit)], env=stack.environment)),
        lambda: _seconds(lambda: stack.pulumi("up", "--refresh", "--yes", "--skip-preview")),
    )
    return _compared(pairs, "incumbent's unit", "up --refresh of p510", UNIT_TARGET)


def _incumbent(stack: RealP510) -> str:
    """The incumbent's unit on a cluster that is there and healthy: its calls, one after another.

    What it does between them (jq, grep, chmod) costs nothing beside them and is left out. Its
    kubeconfig and all objects are the stack's own, applied by the client as the unit does.
    """
    settings = stack.settings
    kubeconfig = "/run/incumbent"
    create = "kubectl create namespace {0} --dry-run=client -o yaml | kubectl apply -f -"
    # The value that the stack declares too: with another one, its up would meet a conflict.
    key = settings["tailscale"]["authKey"]["file"]
    token = f'--from-literal=TS_AUTHKEY="$(cat {key})" --dry-run=client -o yaml'
    lines = [
        "set -e",
        "k3d cluster list -o json",
        "k3d cluster start factory || true",
        "docker exec k3d-factory-server-0 sh -c 'cat /proc/[0-9]*/io' || true",
        f"k3d kubeconfig get factory > {kubeconfig}",
        f"export KUBECONFIG={kubeconfig}",
        "kubectl get --raw=/readyz",
        f"k3d kubeconfig get factory > {kubeconfig}",
        "kubectl get --raw=/readyz",
        f"k3d kubeconfig get factory > {kubeconfig}",
        "kubectl get nodes",
        "kubectl get nodes",
        create.format("tailscale"),
        f"kubectl -n tailscale create secret generic auth-key {token} | kubectl apply -f -",
    ]
    for namespace in settings["tailscale"]["copies"]:
        lines += [
            create.format(namespace),
            f"kubectl -n {namespace} create secret generic tailscale-auth-key {token}"
            " | kubectl apply -f -",
        ]
    for namespace, secrets in settings["secrets"].items():
        for name, secret in secrets.items():
            if namespace != "factory":
                lines.append(create.format(namespace))
            if secret.get("seedOnly"):
                lines.append(f"kubectl -n {namespace} get secret {name}")
            else:
                lines.append(f"kubectl apply -n {namespace} -f {secret['manifest']}")
    argocd = settings["argocd"]
    path, ref = argocd.get("path", "bootstrap"), argocd.get("ref", "main")
    pod = "--rm -i --restart=Never --quiet --image=busybox:1.36 --command --timeout=90s"
    lines += [
        f"kubectl apply -k '{argocd['repository']}//{path}?ref={ref}' || true",
        f"kubectl run dns-smoke {pod} -- nslookup {_known(stack)} || true",
        "",
    ]
    return "\n".join(lines)


def _known(stack: RealP510) -> str:
    return stack.settings["cluster"].get("acceptance", {}).get("name", "kubernetes.default")


def _pairs(
    what: str, rounds: int, theirs: Callable[[], float], ours: Callable[[], float]
) -> list[tuple[float, float]]:
    theirs()
    ours()
    pairs = []
    for number in range(1, rounds + 1):
        pairs.append((theirs(), ours()))
        say(f"cluster {number}/{rounds}: {what}: {pairs[-1][0]:.2f} s, {pairs[-1][1]:.2f} s")
    return pairs


def _seconds(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def _compared(
    pairs: list[tuple[float, float]], theirs: str, ours: str, target: float
) -> list[Figure]:
    ratios = [our / their for their, our in pairs]
    return [
        Figure(f"{theirs} [s]", statistics.median(their for their, _ in pairs)),
        Figure(f"{ours} [s]", statistics.median(our for _, our in pairs)),
        Figure(
            f"{ours} / {theirs}",
            statistics.median(ratios),
            target,
            f"{len(ratios)} pairs, {min(ratios):.2f} to {max(ratios):.2f}",
        ),
    ]
