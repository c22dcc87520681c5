"""Preflight: all that is wrong with a host for its cluster, at once, each with its remedy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hostctl.certificates import certificate_warnings
from hostctl.cluster import Cluster, look, node_kubeconfig, parse_json, refuse_docker_resolvers
from hostctl.live import differences, live_facts, plain
from hostctl.machine import Machine, TookTooLong, ToolMissing
from hostctl.protocol import Failure, Result
from hostctl.record import read_record
from hostctl.spec import cluster_spec
from hostctl.tools import for_system, run_tool, tool_version
from hostctl.waiting import ready, size_text

ROOM_BYTES = 5 * 2**30
NODES_OPEN_FILES = {
    "fs.inotify.max_user_instances": (128, 512),
    "fs.inotify.max_user_watches": (65536, 524288),
}


class Finding(NamedTuple):
    """What is wrong. An ``error`` makes a create or the running cluster fail, a ``warning`` may,
    ``info`` is worth knowing; what could not be told is ``info`` too. ``code`` is that of the
    Failure when it keeps a cluster from being created."""

    severity: str
    what: str
    remedy: str
    code: str = "refused"


def k3d_doctor(machine: Machine, spec: dict[str, Any]) -> Result:
    """All that is wrong or missing on the host for this cluster, at once, each with its remedy.

    Without a spec, only what every cluster needs of the host is looked at."""
    if not spec:
        found = [*_tool_findings(machine, {}), *_host_findings(machine, {})]
    else:
        found = list(_cluster_findings(machine, cluster_spec(spec, "k3d doctor")))
    order = ("error", "warning", "info")
    found.sort(key=lambda one: order.index(one.severity))
    return {
        "findings": [
            {"severity": one.severity, "what": one.what, "remedy": one.remedy} for one in found
        ]
    }


def create_errors(
    machine: Machine, spec: Mapping[str, Any], former: Cluster | None = None
) -> list[Finding]:
    """What certainly makes a create fail, all at once. An address may still come, since a create
    waits for it; ``former`` is a cluster that goes first, with the ports that it holds."""
    found = [
        *_tool_findings(machine, spec),
        *_host_findings(machine, spec),
        *_directory_findings(machine, spec),
        *port_errors(machine, spec, former),
    ]
    return [one for one in found if one.severity == "error"]


def refuse_create(name: str, errors: Sequence[Finding]) -> None:
    """Raises a Failure that names all of them."""
    if errors:
        raise Failure(
            "tool" if all(one.code == "tool" for one in errors) else "refused",
            f"creating cluster {name}",
            "; ".join(one.what for one in errors),
            "; ".join(dict.fromkeys(one.remedy for one in errors)),
        )


def published_ports(spec: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Address, port and protocol of all that the cluster publishes on the host."""
    ports = [(spec["api"]["bind"], spec["api"]["port"], "tcp")]
    return ports + [(port["bind"], port["host_port"], port["protocol"]) for port in spec["ports"]]


def port_errors(
    machine: Machine, spec: Mapping[str, Any], former: Cluster | None = None
) -> Iterator[Finding]:
    """Ports that something else has, on the addresses that are there."""
    held = {
        (one.get("HostPort"), port.partition("/")[2])
        for node in (former.nodes if former else ())
        for port, bound in node.bindings.items()
        for one in bound
    }
    for bind, port, protocol in published_ports(spec):
        if (str(port), protocol) in held:
            continue
        if machine.has_address(bind) and not machine.port_is_free(bind, port, protocol):
            yield Finding(
                "error",
                f"{protocol} port {port} on {bind} is in use",
                f"see by what: ss --listening --{protocol} --processes 'sport = :{port}'; stop it "
                "or choose another port",
            )


def _cluster_findings(machine: Machine, spec: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _tool_findings(machine, spec)
    yield from _host_findings(machine, spec)
    yield from _directory_findings(machine, spec)
    cluster = None
    try:
        cluster = look(machine, spec["name"], spec["network"]["name"])
        refuse_docker_resolvers(machine, spec)
    except Failure as failure:
        yield Finding("error", f"{failure.step}: {failure.cause}", failure.remedy)
    for bind in dict.fromkeys(bind for bind, _, _ in published_ports(spec)):
        if not machine.has_address(bind):
            yield Finding(
                "warning",
                f"no interface has {bind}; creating and starting wait for it",
                "bring the interface up: ip address show",
            )
    if cluster is None:
        return
    if cluster.state == "absent":
        yield from port_errors(machine, spec)
        name = spec["network"]["name"]
        if spec["servers"] == 1 and cluster.network is None:
            yield Finding("info", f"Docker network {name} is missing", "pulumi up makes it")
        if _without_flannel(spec):
            yield Finding(
                "warning",
                "flannel is off (--flannel-backend=none): nodes stay NotReady, and pods Pending, "
                f"until a network plugin puts {', '.join(_PLUGINS)} into /opt/cni/bin of each node",
                "declare what installs it (Calico's operator, or Multus with the CNI plugins)",
            )
        return
    yield from _running_findings(machine, spec, cluster)


def _running_findings(
    machine: Machine, spec: Mapping[str, Any], cluster: Cluster
) -> Iterator[Finding]:
    live = live_facts(machine, cluster, [])
    for one in differences(machine, spec, cluster, live):
        what = f"{one['key']} is {plain(one['live'])}, declared {plain(one['declared'])}"
        yield Finding("error" if one["fixed"] else "warning", what, one["remedy"])
    credentials, why = ready(machine, cluster)
    if not credentials:
        yield Finding("error", why, f"docker logs --tail 50 {cluster.first.name}")
    if cluster.of("loadbalancer") and spec["servers"] == 1:
        yield Finding(
            "warning",
            "a load balancer stands before the only server; it can start before the bind address "
            "is there (incident 1)",
            "a recreate makes the cluster without one",
        )
    held = credentials
    with contextlib.suppress(Failure):
        held = held or node_kubeconfig(machine, cluster)
    for what, remedy in certificate_warnings(machine, cluster, held)[1]:
        yield Finding("warning", what, remedy)
    accepted = read_record(machine, cluster.name).get("acceptance") or {}
    if accepted.get("state", "passed") != "passed":
        what = f"the last acceptance of the cluster: {accepted['state']}: {accepted['detail']}"
        yield Finding("warning", what, f"hostctl k3d accept {cluster.name}")
    if _without_flannel(spec):
        yield from _plugin_findings(machine, cluster)


# What every cluster needs of the host


def _tool_findings(machine: Machine, spec: Mapping[str, Any]) -> Iterator[Finding]:
    used = read_record(machine, spec["name"]) if spec else {}
    for tool in ("docker", "k3d", "kubectl", "git"):
        try:
            tool_version(machine, tool)
        except Failure as failure:
            what = f"{failure.step}: {failure.cause}"
            if tool == "k3d" and spec.get("installs_k3d"):
                continue
            if tool in ("docker", "k3d"):
                yield Finding("error", what, failure.remedy, failure.code)
            elif used.get("argocd"):
                yield Finding("error", f"{what}; Argo CD's bootstrap needs it", failure.remedy)
            else:
                needs = {
                    "kubectl": "seeds, rollouts and Argo CD need it",
                    "git": "Argo CD needs it",
                }
                yield Finding("warning", f"{what}; {needs[tool]}", failure.remedy)


def _host_findings(machine: Machine, spec: Mapping[str, Any]) -> Iterator[Finding]:
    docker = _docker_info(machine)
    yield from _docker_findings(machine, docker)
    yield from _cgroup_findings(machine, docker)
    for module, severity, why in _needed_modules(spec):
        yield from module_findings(machine, module, severity, why)
    nodes = spec["servers"] + spec["agents"] if spec else 1
    for key, (least, several) in NODES_OPEN_FILES.items():
        wanted = least if nodes == 1 else several
        value = _number(machine, f"/proc/sys/{key.replace('.', '/')}")
        if value is not None and value < wanted:
            yield Finding(
                "warning",
                f"{key} is {value}; {nodes} node(s) with their pods need {wanted}, or watches fail "
                "with `too many open files`",
                _sysctl(machine, key, several),
            )
    if _number(machine, "/proc/sys/net/ipv4/ip_forward") == 0:
        yield Finding(
            "warning",
            "net.ipv4.ip_forward is 0: pods reach nothing outside the host",
            _sysctl(machine, "net.ipv4.ip_forward", 1),
        )
    if _output(machine, ["timedatectl", "show", "--property=NTPSynchronized", "--value"]) == "no":
        yield Finding(
            "warning",
            "the host's clock is not synchronised; certificates and tokens are judged by it",
            for_system(
                machine,
                "services.timesyncd.enable = true;",
                "System > General Settings > NTP Servers.",
                "apt install systemd-timesyncd; timedatectl set-ntp true",
            ),
        )


def _docker_info(machine: Machine) -> dict[str, Any]:
    """What Docker says of itself; empty when it does not answer, which its version says already."""
    step = "asking Docker about itself"
    try:
        argv = ["docker", "info", "--format", "{{json .}}"]
        return parse_json(run_tool(machine, argv, step, "cannot-tell").out, step)
    except Failure:
        return {}


def _docker_findings(machine: Machine, docker: Mapping[str, Any]) -> Iterator[Finding]:
    if "name=rootless" in (docker.get("SecurityOptions") or []):
        yield Finding(
            "warning",
            "Docker runs rootless: k3s needs the memory, cpu and pids controllers delegated to it",
            "run Docker as root, or see https://docs.k3s.io/advanced#known-issues-with-rootless-mode",
        )
    root = docker.get("DockerRootDir")
    if root:
        yield from _room_findings(machine, root, "images and the nodes' data")


def _cgroup_findings(machine: Machine, docker: Mapping[str, Any]) -> Iterator[Finding]:
    how = for_system(
        machine,
        'boot.kernelParams = [ "cgroup_enable=memory" ]; then reboot.',
        'midclt call system.advanced.update \'{"kernel_extra_options": "cgroup_enable=memory"}\'; '
        "then reboot.",
        "add cgroup_enable=memory to GRUB_CMDLINE_LINUX in /etc/default/grub (cmdline.txt on a "
        "Raspberry Pi), update-grub, reboot.",
    )
    controllers = _text(machine, "/sys/fs/cgroup/cgroup.controllers")
    if controllers is not None:
        missing = [one for one in ("cpu", "memory", "pids") if one not in controllers.split()]
        if missing:
            what = f"cgroup v2 has no controller {', '.join(missing)}; k3s does not start without"
            yield Finding("error", what, how)
        if docker.get("SecurityOptions") and "name=cgroupns" not in docker["SecurityOptions"]:
            yield Finding(
                "warning",
                "Docker gives containers no cgroup namespace of their own",
                'remove "default-cgroupns-mode" from /etc/docker/daemon.json, or newer Docker',
            )
        return
    table = _text(machine, "/proc/cgroups")
    if table is None:
        yield Finding(
            "info", "cannot tell which cgroup version the host has", "mount | grep cgroup"
        )
        return
    memory = re.search(r"^memory\s+\d+\s+\d+\s+(\d)", table, re.MULTILINE)
    if not memory or memory.group(1) == "0":
        yield Finding("error", "cgroup v1 without a memory controller; k3s does not start", how)
    yield Finding(
        "warning",
        "the host has cgroup v1, which Kubernetes 1.35 and newer refuse",
        for_system(
            machine,
            "systemd.enableUnifiedCgroupHierarchy = true; (the default), then reboot.",
            "update to 24.04 or newer.",
            "boot without systemd.unified_cgroup_hierarchy=0, or update the system.",
        ),
    )


def _needed_modules(spec: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Module, severity of its absence, what needs it."""
    yield "overlay", "error", "Docker and containerd keep images on it"
    yield "nf_conntrack", "warning", "Services are routed by it"
    yield "br_netfilter", "warning", "Services reach pods of their own node by it"
    backends = [
        argument.split("=", 1)[1]
        for argument in spec.get("k3s_args", ())
        if argument.startswith("--flannel-backend=")
    ]
    backend = backends[-1] if backends else "vxlan"
    if backend == "vxlan":
        # flannel makes its interface with one node, too, and k3s ends when it cannot.
        yield "vxlan", "error", "flannel's pod network is made of it"
    elif backend.startswith("wireguard"):
        yield "wireguard", "error", "flannel's pod network is made of it (--flannel-backend)"


def module_findings(machine: Machine, module: str, severity: str, why: str) -> Iterator[Finding]:
    has = _has_module(machine, module)
    if has is None:
        what = f"cannot tell whether the kernel has module {module}: {why}"
        yield Finding("info", what, f"modprobe {module}; lsmod | grep {module}")
    elif not has:
        yield Finding(
            severity,
            f"the kernel has no module {module}: {why}",
            for_system(
                machine,
                f'boot.kernelModules = [ "{module}" ];',
                f"System > Advanced > Init/Shutdown Scripts, Pre Init: modprobe {module}",
                f"modprobe {module}; echo {module} > /etc/modules-load.d/homelab-{module}.conf; "
                "where it is not on disk: apt install linux-modules-extra-$(uname -r)",
            ),
        )


def _has_module(machine: Machine, module: str) -> bool | None:
    """Whether the running kernel has the module loaded, built in or on disk, from where it is
    loaded when it is asked for; None when that cannot be told."""
    if machine.exists(f"/sys/module/{module}"):
        return True
    loaded = _text(machine, "/proc/modules")
    if loaded is not None and re.search(rf"^{module}\s", loaded, re.MULTILINE):
        return True
    if re.search(rf"\s{module}$", _text(machine, "/proc/filesystems") or "", re.MULTILINE):
        return True
    release, _ = machine.kernel()
    for root in ("/lib/modules", "/run/booted-system/kernel-modules/lib/modules"):
        lists = [_text(machine, f"{root}/{release}/modules.{kind}") for kind in ("builtin", "dep")]
        if any(
            re.search(rf"/{module}\.ko(\.\w+)?:?(\s|$)", text, re.MULTILINE)
            for text in lists
            if text is not None
        ):
            return True
        if loaded is not None and None not in lists:
            return False
    return None


def _sysctl(machine: Machine, key: str, value: int) -> str:
    return for_system(
        machine,
        f'boot.kernel.sysctl."{key}" = {value};',
        f"System > Advanced > Sysctl: {key} = {value}",
        f"echo '{key} = {value}' > /etc/sysctl.d/90-homelab-{key.rsplit('.', 1)[1]}.conf; "
        "sysctl --system",
    )


# What this cluster needs of the host


def _directory_findings(machine: Machine, spec: Mapping[str, Any]) -> Iterator[Finding]:
    # Volumes and datastore; the latter only where it is not in a volume of Docker's.
    directories = [spec[key] for key in ("storage_dir", "datastore_dir") if spec.get(key)]
    for directory in dict.fromkeys(directories):
        seen = None
        try:
            seen = machine.stat(directory)
            kind, writable = machine.file_system(directory)
        except OSError as error:
            what = f"{directory} cannot be looked at: {error.strerror or error}"
            yield Finding("info", what, "run hostctl as root")
            continue
        if seen and seen.kind != "directory":
            yield Finding("error", f"{directory} is no directory", "move it away")
            continue
        if not writable:
            yield Finding(
                "error",
                f"{directory} is on a {kind} file system that is mounted read-only",
                "mount it read-write, or name a directory on another disk",
            )
        if kind in _NO_OWNERS:
            yield Finding(
                "error",
                f"{directory} is on {kind}, which keeps no owners and modes; volumes need them",
                "name a directory on ext4, XFS, btrfs or ZFS",
            )
        elif kind in _UNSURE:
            yield Finding(
                "warning",
                f"{directory} is on {kind}: {_UNSURE[kind]}",
                "name a directory on a local ext4, XFS, btrfs or ZFS",
            )
        yield from _room_findings(machine, directory, "what is kept there")


def _room_findings(machine: Machine, directory: str, what: str) -> Iterator[Finding]:
    try:
        free = machine.free_bytes(directory)
    except OSError:
        return
    if free < ROOM_BYTES:
        yield Finding(
            "warning",
            f"{directory} has {size_text(free)} left for {what}",
            "make room there; docker system df shows what Docker takes",
        )


def _without_flannel(spec: Mapping[str, Any]) -> bool:
    return "--flannel-backend=none" in spec["k3s_args"]


def _plugin_findings(machine: Machine, cluster: Cluster) -> Iterator[Finding]:
    """Without flannel, containerd looks for plugins in /opt/cni/bin, where k3s puts none."""
    for node in cluster.of("server", "agent"):
        if not node.running:
            continue
        there = _output(machine, ["docker", "exec", node.name, "ls", "/opt/cni/bin"])
        missing = [one for one in _PLUGINS if one not in (there or "").split()]
        if missing:
            yield Finding(
                "warning",
                f"flannel is off and {node.name} has no {', '.join(missing)} in /opt/cni/bin",
                "let the network plugin install them there (Calico's calico-node does; Multus "
                "needs the CNI plugins beside it)",
            )


# Looking


def _text(machine: Machine, path: str) -> str | None:
    try:
        return machine.read(path, limit=8 * 1024 * 1024).decode("utf-8", "replace")
    except OSError:
        return None


def _number(machine: Machine, path: str) -> int | None:
    text = (_text(machine, path) or "").strip()
    return int(text) if text.isdigit() else None


def _output(machine: Machine, argv: Sequence[str]) -> str | None:
    """What a program says, or None when it is not there, fails or hangs."""
    try:
        ran = machine.run(argv)
    except (ToolMissing, TookTooLong):
        return None
    return ran.text.strip() if ran.code == 0 else None


_PLUGINS = ("bridge", "host-local", "loopback", "portmap")
_NO_OWNERS = ("exfat", "fuseblk", "msdos", "ntfs", "ntfs3", "vfat")
_UNSURE = {
    "tmpfs": "it is lost at the next boot",
    "ramfs": "it is lost at the next boot",
    "overlay": "it is lost with the container or live system that it belongs to",
    **dict.fromkeys(("nfs", "nfs4"), "databases in volumes need locks that NFS may not keep"),
    **dict.fromkeys(("cifs", "smb3", "9p", "virtiofs"), "a share keeps owners and locks unsurely"),
}
