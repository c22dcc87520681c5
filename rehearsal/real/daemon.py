"""A real Docker engine, through the Docker SDK, in the eyes of terraform-provider-docker.

What the provider reads of an object and what it leaves as its state has it follow the sources of
terraform-provider-docker, internal/provider/resource_docker_*_funcs.go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import docker
from docker.errors import APIError, DockerException, NotFound
from docker.types import IPAMConfig, IPAMPool
from requests.exceptions import RequestException

from rehearsal.core import Failure, Properties
from rehearsal.daemon import CONTAINER, IMAGE, NETWORK, NO_DAEMON, VOLUME, failed, names

_MEBIBYTE = 1024 * 1024
_DETACH_SECONDS = 30.0
"""How long the removal of a network waits for its endpoints (resource_docker_network_funcs.go)."""

# What a container can be made with here.
_KNOWN = names(
    """capabilities command containerReadRefreshTimeoutMilliseconds destroyGraceSeconds dns dnsOpts
    dnsSearches domainname entrypoints envs groupAdds hostname image init ipcMode labels logDriver
    logOpts maxRetryCount memory memorySwap mounts mustRun name networkMode networksAdvanced ports
    privileged publishAllPorts readOnly removeVolumes restart rm runtime securityOpts shmSize start
    stdinOpen stopSignal stopTimeout sysctls tmpfs tty user usernsMode waitTimeout workingDir"""
)
_COMPUTED = names("bridge containerLogs exitCode healthcheck id networkDatas platform")


class RealDaemon:
    """The engine at the provider's `host`."""

    def __init__(self, configuration: Properties) -> None:
        host = configuration.get("host") or "unix:///var/run/docker.sock"
        if not host.startswith(("unix://", "tcp://")):
            raise Failure(f"the stand-in reaches a Docker engine by unix:// or tcp://, not {host}")
        self._host = host
        self._client: docker.APIClient | None = None

    @property
    def _api(self) -> docker.APIClient:
        if self._client is None:
            # Tells the newest version that both know; a daemon must answer for it.
            self._client = docker.APIClient(self._host, version="auto", timeout=120)
        return self._client

    def ping(self) -> None:
        try:
            self._api.ping()
        except (DockerException, RequestException):
            raise NO_DAEMON from None

    @contextmanager
    def _asking(self, step: str) -> Iterator[None]:
        """Words what goes wrong as the provider does: `<step>: Error response from daemon: ...`."""
        try:
            yield
        except APIError as error:
            said = f"Error response from daemon: {error.explanation or error}"
        except (DockerException, RequestException):
            said = f"Cannot connect to the Docker daemon at {self._host}."
            said += " Is the docker daemon running?"
        else:
            return
        raise failed(f"{step}: {said}" if step else said)

    def find(self, token: str, id: str, state: Properties) -> Properties | None:
        look: Callable[[], Properties] = {
            NETWORK: lambda: _network(self._api.inspect_network(id)),
            VOLUME: lambda: _volume(self._api.inspect_volume(id)),
            CONTAINER: lambda: _container(self._api.inspect_container(id), state),
            IMAGE: lambda: self._image(state.get("name") or id),
        }[token]
        with self._asking(""):
            try:
                return {**state, **look()}
            except NotFound:
                return None
        raise AssertionError

    def create(self, token: str, outputs: Properties) -> tuple[str, Properties]:
        make = {
            NETWORK: self._create_network,
            VOLUME: self._create_volume,
            CONTAINER: self._create_container,
            IMAGE: self._pull,
        }[token]
        id = make(outputs)
        found = self.find(token, id, outputs)
        if found is None:
            raise failed(f"{outputs['name']} was made and is gone")
        return found["id"], found

    def _create_network(self, outputs: Properties) -> str:
        pools = [
            IPAMPool(
                subnet=config["subnet"] or None,
                iprange=config["ipRange"] or None,
                gateway=config["gateway"] or None,
                aux_addresses=config["auxAddress"],
            )
            for config in outputs["ipamConfigs"] or []
        ]
        with self._asking("Unable to create network"):
            made = self._api.create_network(
                outputs["name"],
                driver=outputs["driver"],
                options=outputs["options"] or None,
                ipam=IPAMConfig(outputs["ipamDriver"], pools, outputs["ipamOptions"]),
                internal=outputs["internal"],
                labels=_labels(outputs["labels"]),
                enable_ipv6=outputs["ipv6"],
                check_duplicate=True,
                attachable=outputs["attachable"],
                ingress=outputs["ingress"],
            )
        return made["Id"]

    def _create_volume(self, outputs: Properties) -> str:
        with self._asking("Unable to create volume"):
            self._api.create_volume(
                outputs["name"],
                driver=outputs["driver"],
                driver_opts=outputs["driverOpts"],
                labels=_labels(outputs["labels"]),
            )
        return outputs["name"]

    def _create_container(self, outputs: Properties) -> str:
        unknown = [n for n, v in outputs.items() if v and n not in _KNOWN and n not in _COMPUTED]
        if unknown:
            raise Failure(f"the stand-in makes no real container with {', '.join(sorted(unknown))}")
        name, image = outputs["name"], outputs["image"]
        self._provide(image, f"Unable to create container with image {image}")
        with self._asking("Unable to create container"):
            made = self._api.create_container_from_config(_configuration(outputs), name)
        id = made["Id"]
        for network in outputs["networksAdvanced"] or []:
            with self._asking(f"Unable to connect to network '{network['name']}'"):
                if "bridge" in self._api.inspect_container(id)["NetworkSettings"]["Networks"]:
                    self._api.disconnect_container_from_network(id, "bridge")
                self._api.connect_container_to_network(
                    id,
                    network["name"],
                    aliases=network["aliases"] or None,
                    ipv4_address=network["ipv4Address"] or None,
                    ipv6_address=network["ipv6Address"] or None,
                )
        if outputs["start"]:
            with self._asking("Unable to start container"):
                self._api.start(id)
        return id

    def _pull(self, outputs: Properties) -> str:
        if outputs["build"]:
            raise Failure("the stand-in builds no image")
        self._provide(outputs["name"], "Unable to read Docker image into resource")
        return outputs["name"]

    def _provide(self, image: str, step: str) -> None:
        """Have an image here: one that is, is not pulled (findImage)."""
        with self._asking(f"{step}: unable to pull image {image}: error pulling image {image}"):
            try:
                self._api.inspect_image(image)
                return
            except NotFound:
                pass
            for line in self._api.pull(image, stream=True, decode=True):
                if "error" in line:
                    raise failed(f"{step}: unable to pull image {image}: {line['error']}")
            try:
                self._api.inspect_image(image)
            except NotFound:
                raise failed(f"{step}: unable to find or pull image {image}") from None

    def _image(self, name: str) -> Properties:
        seen = self._api.inspect_image(name)
        digests = seen.get("RepoDigests") or []
        repository = name.partition(":")[0]
        digest = next((d for d in digests if d.startswith(repository)), (digests or [""])[0])
        return {"id": seen["Id"] + name, "imageId": seen["Id"], "repoDigest": digest}

    def update(self, token: str, id: str, olds: Properties, outputs: Properties) -> None:
        if token == IMAGE:
            self._provide(outputs["name"], "Unable to read Docker image into resource")
        if token != CONTAINER:
            return
        if outputs["mustRun"] and not olds.get("mustRun") and outputs["start"]:
            with self._asking("Unable to start container"):
                self._api.start(id)
        adjustable = ("restart", "maxRetryCount", "cpuShares", "memory", "memorySwap", "cpuSet")
        if any((olds.get(name) or None) != (outputs.get(name) or None) for name in adjustable):
            with self._asking("Unable to update a container"):
                self._api.update_container(
                    id,
                    cpu_shares=outputs["cpuShares"] or None,
                    cpuset_cpus=outputs["cpuSet"] or None,
                    mem_limit=_bytes(outputs["memory"]) or None,
                    memswap_limit=_bytes(outputs["memorySwap"]) or None,
                    restart_policy={
                        "Name": outputs["restart"],
                        "MaximumRetryCount": outputs["maxRetryCount"] or 0,
                    },
                )

    def delete(self, token: str, id: str, state: Properties) -> None:
        remove = {
            NETWORK: self._delete_network,
            VOLUME: self._delete_volume,
            CONTAINER: self._delete_container,
            IMAGE: self._delete_image,
        }[token]
        remove(id, state)

    def _delete_network(self, id: str, state: Properties) -> None:
        until = time.monotonic() + _DETACH_SECONDS
        with self._asking("Unable to remove network"):
            while True:
                try:
                    self._api.remove_network(id)
                    return
                except NotFound:
                    return
                except APIError as error:
                    attached = "has active endpoints" in str(error.explanation)
                    if not attached or time.monotonic() >= until:
                        raise
                time.sleep(2)

    def _delete_volume(self, id: str, state: Properties) -> None:
        with self._asking(""):
            try:
                self._api.remove_volume(id)
            except NotFound:
                return

    def _delete_container(self, id: str, state: Properties) -> None:
        with self._asking(f"Error deleting container {id}"):
            try:
                self._api.stop(id, timeout=state.get("destroyGraceSeconds") or 0)
                self._api.remove_container(id, v=bool(state.get("removeVolumes")), force=True)
            except NotFound:
                return

    def _delete_image(self, id: str, state: Properties) -> None:
        if state.get("keepLocally"):
            return
        with self._asking("Unable to remove Docker image"):
            try:
                self._api.remove_image(state["name"], force=bool(state.get("forceRemove")))
            except NotFound:
                return


def _labels(labels: list[Properties] | None) -> dict[str, str]:
    return {label["label"]: label["value"] for label in labels or []}


def _listed(labels: dict[str, str] | None) -> list[Properties]:
    return [{"label": label, "value": value} for label, value in (labels or {}).items()]


def _bytes(mebibytes: int | None) -> int:
    """-1, no limit, stays what it is."""
    return mebibytes * _MEBIBYTE if mebibytes and mebibytes > 0 else mebibytes or 0


def _mebibytes(size: int) -> int:
    return size // _MEBIBYTE if size > 0 else size


def _configuration(outputs: Properties) -> Properties:
    """The body of POST /containers/create."""
    host: Properties = {
        "AutoRemove": outputs["rm"],
        "CapAdd": (outputs["capabilities"] or {}).get("adds") or [],
        "CapDrop": (outputs["capabilities"] or {}).get("drops") or [],
        "Dns": outputs["dns"] or [],
        "DnsOptions": outputs["dnsOpts"] or [],
        "DnsSearch": outputs["dnsSearches"] or [],
        "GroupAdd": outputs["groupAdds"] or [],
        "Init": bool(outputs["init"]),
        "LogConfig": {"Type": outputs["logDriver"], "Config": outputs["logOpts"] or {}},
        "Memory": _bytes(outputs["memory"]),
        "MemorySwap": _bytes(outputs["memorySwap"]),
        "Mounts": [_mount(mount) for mount in outputs["mounts"] or []],
        "PortBindings": _bindings(outputs["ports"]),
        "Privileged": outputs["privileged"],
        "PublishAllPorts": outputs["publishAllPorts"],
        "ReadonlyRootfs": outputs["readOnly"],
        "RestartPolicy": {
            "Name": outputs["restart"],
            "MaximumRetryCount": outputs["maxRetryCount"] or 0,
        },
        "SecurityOpt": outputs["securityOpts"] or [],
        "ShmSize": _bytes(outputs["shmSize"]),
        "Sysctls": outputs["sysctls"] or {},
        "Tmpfs": outputs["tmpfs"] or {},
    }
    # Without one the daemon decides.
    named = {"IpcMode": "ipcMode", "NetworkMode": "networkMode", "UsernsMode": "usernsMode"}
    host |= {key: outputs[name] for key, name in named.items() if outputs[name]}
    container: Properties = {
        "Cmd": outputs["command"],
        "Domainname": outputs["domainname"],
        "Entrypoint": outputs["entrypoints"] or None,
        "Env": outputs["envs"] or [],
        "ExposedPorts": {port: {} for port in host["PortBindings"]},
        "HostConfig": host,
        "Hostname": outputs["hostname"] or "",
        "Image": outputs["image"],
        "Labels": _labels(outputs["labels"]),
        "OpenStdin": outputs["stdinOpen"],
        "StopSignal": outputs["stopSignal"] or "",
        "Tty": outputs["tty"],
        "User": outputs["user"],
        "WorkingDir": outputs["workingDir"],
    }
    return container | ({"StopTimeout": t} if (t := outputs["stopTimeout"]) else {})


def _mount(mount: Properties) -> Properties:
    if any(mount.get(f"{kind}Options") for kind in ("bind", "tmpfs", "volume")):
        raise Failure("the stand-in makes no real container with options of a mount")
    return {
        "Type": mount["type"],
        "Source": mount["source"],
        "Target": mount["target"],
        "ReadOnly": bool(mount["readOnly"]),
    }


def _bindings(ports: list[Properties] | None) -> dict[str, list[Properties]]:
    bindings: dict[str, list[Properties]] = {}
    for port in ports or []:
        external = str(port["external"]) if port["external"] else ""
        bindings.setdefault(f"{port['internal']}/{port['protocol']}", []).append(
            {"HostIp": port["ip"], "HostPort": external}
        )
    return bindings


# What the provider reads


def _network(seen: Properties) -> Properties:
    pools = (seen["IPAM"] or {}).get("Config") or []
    return {
        "id": seen["Id"],
        "name": seen["Name"],
        "attachable": seen["Attachable"],
        "driver": seen["Driver"],
        "ingress": seen["Ingress"],
        "internal": seen["Internal"],
        "ipamConfigs": [
            {
                "auxAddress": pool.get("AuxiliaryAddresses") or None,
                "gateway": pool.get("Gateway") or "",
                "ipRange": pool.get("IPRange") or "",
                "subnet": pool.get("Subnet") or "",
            }
            for pool in pools
        ],
        "ipamDriver": seen["IPAM"]["Driver"],
        "ipamOptions": seen["IPAM"]["Options"] or None,
        "ipv6": seen["EnableIPv6"],
        "labels": _listed(seen["Labels"]),
        "options": seen["Options"] or {},
        "scope": seen["Scope"],
    }


def _volume(seen: Properties) -> Properties:
    return {
        "id": seen["Name"],
        "name": seen["Name"],
        "driver": seen["Driver"],
        "driverOpts": seen["Options"] or None,
        "labels": _listed(seen["Labels"]),
        "mountpoint": seen["Mountpoint"],
    }


def _container(seen: Properties, state: Properties) -> Properties:
    """Environment and labels are not read: they come from the image too."""
    config, host, settings = seen["Config"], seen["HostConfig"], seen["NetworkSettings"]
    running = seen["State"]["Running"]
    by_digest = str(state.get("image")).startswith("sha256:")
    read: Properties = {
        "id": seen["Id"],
        "name": seen["Name"].lstrip("/"),
        "bridge": settings["Bridge"],
        "command": config["Cmd"],
        "cpuSet": host["CpusetCpus"],
        "cpuShares": host["CpuShares"],
        "dns": host["Dns"] or None,
        "dnsOpts": host["DnsOptions"] or None,
        "dnsSearches": host["DnsSearch"] or None,
        "domainname": config["Domainname"],
        "entrypoints": config["Entrypoint"] or [],
        "groupAdds": host["GroupAdd"] or None,
        "hostname": config["Hostname"],
        "image": seen["Image"] if by_digest else config["Image"],
        "init": bool(host["Init"]),
        "ipcMode": host["IpcMode"],
        "logDriver": host["LogConfig"]["Type"],
        "logOpts": host["LogConfig"]["Config"] or None if state.get("logOpts") else None,
        "maxRetryCount": host["RestartPolicy"]["MaximumRetryCount"],
        "memory": _mebibytes(host["Memory"]),
        "memorySwap": _mebibytes(host["MemorySwap"]),
        "mounts": [_mounted(mount) for mount in host.get("Mounts") or []],
        "networkDatas": [
            {
                "gateway": network["Gateway"],
                "globalIpv6Address": network["GlobalIPv6Address"],
                "globalIpv6PrefixLength": network["GlobalIPv6PrefixLen"],
                "ipAddress": network["IPAddress"],
                "ipPrefixLength": network["IPPrefixLen"],
                "ipv6Gateway": network["IPv6Gateway"],
                "macAddress": network["MacAddress"],
                "networkName": name,
            }
            for name, network in (settings["Networks"] or {}).items()
        ],
        "networkMode": host["NetworkMode"],
        "platform": seen["Platform"],
        "privileged": host["Privileged"],
        "publishAllPorts": host["PublishAllPorts"],
        "readOnly": host["ReadonlyRootfs"],
        "restart": host["RestartPolicy"]["Name"],
        "rm": host["AutoRemove"],
        "runtime": host["Runtime"],
        "securityOpts": host["SecurityOpt"] or [],
        "shmSize": host["ShmSize"] // _MEBIBYTE,
        "stdinOpen": config["OpenStdin"],
        "stopSignal": config.get("StopSignal") or "",
        "stopTimeout": config.get("StopTimeout") or 0,
        "sysctls": host.get("Sysctls") or None,
        "tmpfs": host.get("Tmpfs") or None,
        "tty": config["Tty"],
        "user": config["User"],
        "usernsMode": host["UsernsMode"],
        "workingDir": config["WorkingDir"],
    }
    if host["CapAdd"] or host["CapDrop"]:
        read["capabilities"] = {"adds": host["CapAdd"] or [], "drops": host["CapDrop"] or []}
    if state.get("ports") and (running or state.get("mustRun")):
        read["ports"] = [
            {
                "external": int(binding["HostPort"]),
                "internal": int(port.partition("/")[0]),
                "ip": binding["HostIp"],
                "protocol": port.partition("/")[2],
            }
            for port, bindings in sorted((settings["Ports"] or {}).items())
            for binding in bindings or []
        ]
    if not running:
        read["exitCode"] = seen["State"]["ExitCode"]
        if state.get("mustRun"):
            # Seen as drift, so that an update starts it.
            read["mustRun"] = False
    return read


def _mounted(mount: Properties) -> Properties:
    return {
        "bindOptions": None,
        "readOnly": mount.get("ReadOnly", False),
        "source": mount.get("Source", ""),
        "target": mount["Target"],
        "tmpfsOptions": None,
        "type": mount["Type"],
        "volumeOptions": None,
    }
