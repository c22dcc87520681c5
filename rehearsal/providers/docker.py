"""Stand-in for the docker provider: Network, Volume, Container and RemoteImage.

World (`world/docker/`): `network/<name>`, `volume/<name>`, `container/<name>`, `image/<name>`, each
an object's outputs. A network's `endpoints` lists what else is attached to it, by name, as k3d's
nodes are; with an endpoint it cannot be removed. A file `unreachable` there stands for a daemon
that does not answer.

The rules are those of the Docker engine and of terraform-provider-docker 3, as far as the
recordings show them and, for RemoteImage and for what goes wrong, as their sources tell.
"""

from __future__ import annotations

import hashlib
import secrets
from ipaddress import ip_network
from typing import Any, ClassVar

from rehearsal.core import (
    UNKNOWN,
    Checked,
    Diff,
    DiffKind,
    Exists,
    Failure,
    Properties,
    Request,
    compare,
    has_unknown,
    plain,
    serve,
)
from rehearsal.providers.bridged import Bridged, normal, present
from rehearsal.schemas import Schema

NETWORK = "docker:index/network:Network"
VOLUME = "docker:index/volume:Volume"
CONTAINER = "docker:index/container:Container"
IMAGE = "docker:index/remoteImage:RemoteImage"

_KINDS = {NETWORK: "network", VOLUME: "volume", CONTAINER: "container", IMAGE: "image"}

# Defaults that the bridge puts into the inputs. It leaves out defaults that are null or zero.
_DEFAULTS: dict[str, Properties] = {
    NETWORK: {"ipamDriver": "default"},
    VOLUME: {},
    CONTAINER: {
        "containerReadRefreshTimeoutMilliseconds": 15000,
        "mustRun": True,
        "removeVolumes": True,
        "restart": "no",
        "start": True,
        "waitTimeout": 60,
    },
    IMAGE: {},
}
_NESTED_DEFAULTS: dict[str, Properties] = {
    "ContainerPort": {"ip": "0.0.0.0", "protocol": "tcp"},
    "ContainerHealthcheck": {"interval": "0s", "startPeriod": "0s", "timeout": "0s"},
    "ContainerDevice": {"permissions": "rwm"},
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a change of which replaces: the `stables` of the recordings.
_REPLACES: dict[str, frozenset[str]] = {
    NETWORK: _names(
        "attachable driver ingress internal ipamConfigs ipamDriver ipamOptions ipv6 labels name "
        "options"
    ),
    VOLUME: _names("driver driverOpts labels name"),
    CONTAINER: _names(
        "capabilities cgroupParent cgroupnsMode command cpus deviceRequests devices dns dnsOpts "
        "dnsSearches domainname entrypoints envs gpus groupAdds hostname hosts image ipcMode "
        "labels logDriver logOpts mounts name networkMode networksAdvanced pidMode platform ports "
        "privileged publishAllPorts readOnly runtime securityOpts shmSize stdinOpen stopSignal "
        "stopTimeout storageOpts sysctls tty ulimits uploads user usernsMode volumes workingDir"
    ),
    IMAGE: _names("build name platform pullTriggers triggers"),
}

# Terraform's sets: their order means nothing.
_SETS = _names(
    "capabilities devices dns dnsOpts dnsSearches envs groupAdds hosts labels mounts "
    "networksAdvanced pullTriggers securityOpts ulimits uploads volumes ipamConfigs"
)

# What the daemon decides where nothing is asked for: unknown in a preview, then this.
_COMPUTED: dict[str, Properties] = {
    NETWORK: {"driver": "bridge", "internal": False, "options": {}, "scope": "local"},
    VOLUME: {"driver": "local", "mountpoint": None},
    CONTAINER: {
        "bridge": "",
        "containerLogs": None,
        "entrypoints": [],
        "exitCode": None,
        "healthcheck": None,
        "hostname": None,
        "init": False,
        "ipcMode": "private",
        "labels": [],
        "logDriver": "json-file",
        "networkDatas": None,
        "platform": "linux",
        "runtime": "runc",
        "securityOpts": [],
        "shmSize": 64,
        "stopSignal": "",
        "stopTimeout": 0,
    },
    IMAGE: {"imageId": None, "repoDigest": None},
}

# What is absent in a preview and read back as zero.
_READ: dict[str, Properties] = {
    NETWORK: {"attachable": False, "ingress": False, "ipv6": False},
    VOLUME: {},
    CONTAINER: {
        "cpuSet": "",
        "cpuShares": 0,
        "domainname": "",
        "maxRetryCount": 0,
        "memory": 0,
        "memorySwap": 0,
        "networkMode": "bridge",
        "privileged": False,
        "publishAllPorts": False,
        "user": "",
        "usernsMode": "",
        "workingDir": "",
    },
    IMAGE: {},
}

# Defaults of the Terraform schema that are zero: in the outputs, not in the inputs.
_ZERO: dict[str, Properties] = {
    NETWORK: {},
    VOLUME: {},
    CONTAINER: {
        "attach": False,
        "logs": False,
        "memoryReservation": 0,
        "readOnly": False,
        "rm": False,
        "stdinOpen": False,
        "tty": False,
        "wait": False,
    },
    IMAGE: {},
}

_REPLACING: dict[DiffKind, DiffKind] = {
    "ADD": "ADD_REPLACE",
    "DELETE": "DELETE_REPLACE",
    "UPDATE": "UPDATE_REPLACE",
}

_BUILT_IN_MODES = ("bridge", "host", "none", "default")


class Docker(Bridged):
    """The docker provider."""

    package = "docker"
    schema = Schema("docker")
    version = schema.version
    configuration: ClassVar[dict[str, bool]] = {
        "supportsPreview": True,
        "supports_autonaming_configuration": True,
    }

    def configure(self, args: Properties) -> None:
        if (self.world.root / "unreachable").exists() and (
            plain(args.get("disableDockerDaemonCheck")) not in (True, "true")
        ):
            raise Failure(
                "docker native provider returned an unexpected error from Configure: "
                "failed to connect to any docker daemon"
            )

    def check(self, request: Request) -> Checked:
        inputs = self._defaulted(
            self.schema.inputs(request.type), request.news, _DEFAULTS[request.type]
        )
        names = self.schema.resources[request.type]["requiredInputs"]
        if "name" not in inputs and "name" not in names:
            inputs["name"] = _automatic_name(request)
            inputs["__defaults"] = sorted([*inputs["__defaults"], "name"])
        return Checked(inputs, self.failures(request))

    def _defaulted(
        self, specs: dict[str, Properties], value: Properties, defaults: Properties
    ) -> Properties:
        """The value with defaults and, at every level, the names of those that were added."""
        added = {name: default for name, default in defaults.items() if name not in value}
        filled = {
            name: self._defaulted_value(specs.get(name, {}), item) for name, item in value.items()
        }
        return {**filled, **added, "__defaults": sorted(added)}

    def _defaulted_value(self, spec: Properties, value: Any) -> Any:
        if isinstance(value, list):
            return [self._defaulted_value(spec.get("items", {}), item) for item in value]
        if isinstance(value, dict) and "$ref" in spec:
            name = spec["$ref"].removeprefix("#/types/")
            properties = self.schema.types[name]["properties"]
            return self._defaulted(properties, value, _NESTED_DEFAULTS.get(name, {}))
        return value

    def diff(self, request: Request) -> Diff:
        replacing = _REPLACES[request.type]
        computed = _COMPUTED[request.type]
        detailed: dict[str, DiffKind] = {}
        changed = []
        for name in self.schema.inputs(request.type):
            if name in request.ignore_changes:
                continue
            old, new = request.olds.get(name), request.news.get(name)
            if new is None and name in computed:
                continue
            found = _differences(name, old, new)
            if not found:
                continue
            changed.append(name)
            detailed.update(
                {path: _REPLACING[kind] for path, kind in found.items()}
                if name in replacing
                else found
            )
        replaces = sorted(name for name in changed if name in replacing)
        named = "name" not in request.news.get("__defaults", [])
        return Diff(
            changes=bool(changed),
            detailed=detailed,
            diffs=sorted(changed),
            replaces=replaces,
            stables=sorted(replacing - set(changed)),
            # A name that stays would be taken: nameRequiresDeleteBeforeReplace of the bridge.
            delete_before_replace=bool(replaces)
            and request.type != IMAGE
            and named
            and "name" not in changed,
        )

    def create(self, request: Request) -> tuple[str, Properties]:
        if request.preview:
            return "", self._outputs(request, "")
        if has_unknown(request.news):
            raise Failure("an input is unknown outside a preview")
        request.news = plain(request.news)
        name = request.news["name"]
        try:
            if request.type == NETWORK:
                return self._create_network(request, name)
            if request.type == VOLUME:
                return self._create_volume(request, name)
            if request.type == CONTAINER:
                return self._create_container(request, name)
            return self._create_image(request, name)
        except Exists:
            raise self._conflict(request.type, name) from None

    def read(self, request: Request) -> tuple[str, Properties, Properties] | None:
        found = self._find(request)
        if found is None:
            return None
        _, thing = found
        properties = self._as_read(request.type, thing)
        # What only the provider keeps, the daemon does not know.
        for name in self._kept_by_the_provider(request.type):
            if name in request.olds:
                properties[name] = request.olds[name]
        return thing["id"], properties, self.refreshed(request, properties)

    def update(self, request: Request) -> Properties:
        outputs = {**self._outputs(request, request.id), "id": request.id}
        outputs = {
            name: request.olds.get(name, value)
            if name in _COMPUTED[request.type] and name not in request.news
            else value
            for name, value in outputs.items()
        }
        if request.preview:
            return outputs
        found = self._find(request)
        if found is None:
            kind = _KINDS[request.type]
            raise _failed(f"Error response from daemon: No such {kind}: {request.id}")
        key, thing = found
        self.world.put(key, {**thing, **plain(outputs)})
        return outputs

    def delete(self, request: Request) -> None:
        found = self._find(request)
        if found is None:
            return
        key, thing = found
        if request.type == NETWORK:
            attached = [*thing.get("endpoints", []), *self._containers_on(thing["name"])]
            if attached:
                raise _failed(
                    f"Unable to remove network: Error response from daemon: error while removing "
                    f"network: network {thing['name']} id {thing['id']} has active endpoints "
                    f"({', '.join(attached)})"
                )
        elif request.type == VOLUME:
            users = [c["name"] for _, c in self.world.list("container") if _mounts(c, key)]
            if users:
                raise _failed(
                    f"Error response from daemon: remove {thing['name']}: volume is in use - "
                    f"[{', '.join(users)}]"
                )
        elif request.type == IMAGE:
            if plain(request.olds.get("keepLocally")):
                return
            users = [c for _, c in self.world.list("container") if c["image"] == thing["name"]]
            if users and not plain(request.olds.get("forceRemove")):
                raise _failed(
                    f"Unable to remove Docker image: Error response from daemon: conflict: unable "
                    f'to remove repository reference "{thing["name"]}" (must force) - container '
                    f"{users[0]['id'][:12]} is using its referenced image"
                )
        self.world.delete(key)

    def _create_network(self, request: Request, name: str) -> tuple[str, Properties]:
        id = secrets.token_hex(32)
        outputs = self._outputs(request, id)
        networks = [network for _, network in self.world.list("network")]
        if not outputs["ipamConfigs"]:
            outputs["ipamConfigs"] = [_free_subnet(networks)]
        for config in outputs["ipamConfigs"]:
            for other in networks:
                if other["name"] != name and _overlaps(config, other["ipamConfigs"]):
                    raise _failed(
                        "Unable to create network: Error response from daemon: Pool overlaps with "
                        "other one on this address space"
                    )
        self.world.create(f"network/{name}", {**outputs, "endpoints": []}, id)
        return id, outputs

    def _create_volume(self, request: Request, name: str) -> tuple[str, Properties]:
        outputs = self._outputs(request, name)
        outputs["mountpoint"] = f"/var/lib/docker/volumes/{name}/_data"
        there = self.world.get(f"volume/{name}")
        # The daemon answers a request for a volume that exists with that volume.
        if there is None:
            self.world.create(f"volume/{name}", outputs, name)
        elif there["driver"] != outputs["driver"]:
            raise self._conflict(VOLUME, name)
        return name, outputs

    def _create_container(self, request: Request, name: str) -> tuple[str, Properties]:
        id = secrets.token_hex(32)
        outputs = self._outputs(request, id)
        outputs["hostname"] = outputs["hostname"] or id[:12]
        names = [network["name"] for network in outputs["networksAdvanced"]]
        mode = outputs["networkMode"]
        if mode not in _BUILT_IN_MODES and not mode.startswith("container:"):
            names.append(mode)
        for network in names:
            if self.world.get(f"network/{network}") is None:
                raise _failed(
                    f"Unable to create container: Error response from daemon: network {network} "
                    f"not found"
                )
        outputs["networkDatas"] = _addresses(mode)
        self.world.create(f"container/{name}", outputs, id)
        return id, outputs

    def _create_image(self, request: Request, name: str) -> tuple[str, Properties]:
        digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
        repository, _, pinned = name.partition("@")
        outputs = self._outputs(request, digest + name)
        outputs["imageId"] = digest
        outputs["repoDigest"] = f"{repository.rpartition(':')[0] or repository}@{pinned or digest}"
        key = f"image/{name}"
        # To pull an image that is there is no error.
        if self.world.get(key) is None:
            self.world.create(key, outputs, digest + name)
        return digest + name, outputs

    def _outputs(self, request: Request, id: str) -> Properties:
        """The outputs that inputs make: in a preview what is computed is unknown."""
        specs, computed = self.schema.inputs(request.type), _COMPUTED[request.type]
        read = {} if request.preview else _READ[request.type]
        outputs: Properties = {"id": id or UNKNOWN}
        for name in self.schema.outputs(request.type):
            given = request.news.get(name)
            if given is not None:
                outputs[name] = self._filled(specs[name], given)
            elif name in computed:
                outputs[name] = UNKNOWN if request.preview else computed[name]
            elif name in _ZERO[request.type]:
                outputs[name] = _ZERO[request.type][name]
            elif name in read:
                outputs[name] = read[name]
            else:
                blocks = "$ref" in specs.get(name, {}).get("items", {})
                outputs[name] = [] if blocks else None
        return outputs

    def _filled(self, spec: Properties, value: Any) -> Any:
        """A value as Terraform's state holds it: every property of a block is there."""
        if isinstance(value, list):
            return [self._filled(spec.get("items", {}), item) for item in value]
        if isinstance(value, dict) and "$ref" in spec:
            properties = self.schema.types[spec["$ref"].removeprefix("#/types/")]["properties"]
            return {
                name: self._filled(inner, value[name]) if name in value else _zero(inner)
                for name, inner in properties.items()
            }
        return value

    def _as_read(self, token: str, thing: Properties) -> Properties:
        """The outputs of an object that was read: empty collections instead of null."""
        specs = self.schema.inputs(token)
        names = {"id", *self.schema.outputs(token)}
        return {
            name: self._collected(specs.get(name, {}), value)
            for name, value in thing.items()
            if name in names
        }

    def _collected(self, spec: Properties, value: Any) -> Any:
        if value is None:
            return {"array": [], "object": {}}.get(spec.get("type", ""))
        if isinstance(value, list):
            return [self._collected(spec.get("items", {}), item) for item in value]
        if isinstance(value, dict) and "$ref" in spec:
            properties = self.schema.types[spec["$ref"].removeprefix("#/types/")]["properties"]
            return {n: self._collected(properties.get(n, {}), item) for n, item in value.items()}
        return value

    def _kept_by_the_provider(self, token: str) -> tuple[str, ...]:
        if token == IMAGE:
            return ("forceRemove", "keepLocally", "pullTriggers", "triggers")
        return ()

    def _find(self, request: Request) -> tuple[str, Properties] | None:
        """The object with this id; by name too, which is what one imports."""
        kind = _KINDS[request.type]
        found = self.world.find(request.id, kind)
        if found is None and request.type != CONTAINER:
            thing = self.world.get(f"{kind}/{request.id}")
            found = None if thing is None else (f"{kind}/{request.id}", thing)
        return found

    def _containers_on(self, network: str) -> list[str]:
        return [
            container["name"]
            for _, container in self.world.list("container")
            if container["networkMode"] == network
            or any(joined["name"] == network for joined in container["networksAdvanced"])
        ]

    def _conflict(self, token: str, name: str) -> Failure:
        if token == NETWORK:
            return _failed(
                f"Unable to create network: Error response from daemon: network with name {name} "
                f"already exists"
            )
        if token == CONTAINER:
            there = self.world.get(f"container/{name}") or {"id": ""}
            return _failed(
                f"Unable to create container: Error response from daemon: Conflict. The container "
                f'name "/{name}" is already in use by container "{there["id"]}". You have to '
                f"remove (or rename) that container to be able to reuse that name."
            )
        return _failed(
            f"Unable to create volume: Error response from daemon: create {name}: conflict: volume "
            f"name must be unique"
        )


def _failed(message: str) -> Failure:
    return Failure(f"1 error occurred:\n\t* {message}\n\n")


def _automatic_name(request: Request) -> str:
    if "name" in request.olds.get("__defaults", []) and "name" in request.olds:
        return request.olds["name"]
    return f"{request.name}-{hashlib.sha256(request.seed).hexdigest()[:7]}"


def _differences(name: str, old: Any, new: Any) -> dict[str, DiffKind]:
    """Where the state and the input of one property differ, in Terraform's eyes."""
    old, new = normal(old), normal(new)
    if not present(old) and not present(new):
        return {}
    if not present(new):
        return {name: "DELETE"}
    if not present(old):
        return {name: "ADD"}
    if name in _SETS and isinstance(old, list) and isinstance(new, list):
        old, new = sorted(old, key=repr), sorted(new, key=repr)
    return compare(old, new, name)


def _zero(spec: Properties) -> Any:
    return {"string": "", "boolean": False, "integer": 0, "number": 0, "array": []}.get(
        spec.get("type", "")
    )


def _overlaps(config: Properties, others: list[Properties]) -> bool:
    if not config.get("subnet"):
        return False
    subnet = ip_network(config["subnet"])
    return any(subnet.overlaps(ip_network(o["subnet"])) for o in others if o.get("subnet"))


def _free_subnet(networks: list[Properties]) -> Properties:
    for second in range(18, 32):
        config = {
            "auxAddress": None,
            "gateway": f"172.{second}.0.1",
            "ipRange": "",
            "subnet": f"172.{second}.0.0/16",
        }
        if not any(_overlaps(config, network["ipamConfigs"]) for network in networks):
            return config
    raise _failed(
        "Unable to create network: Error response from daemon: could not find an available, "
        "non-overlapping IPv4 address pool among the defaults to assign to the network"
    )


def _addresses(mode: str) -> list[Properties]:
    if mode not in ("bridge", "default"):
        return []
    return [
        {
            "gateway": "172.17.0.1",
            "globalIpv6Address": "",
            "globalIpv6PrefixLength": 0,
            "ipAddress": "172.17.0.2",
            "ipPrefixLength": 16,
            "ipv6Gateway": "",
            "macAddress": "02:42:ac:11:00:02",
            "networkName": "bridge",
        }
    ]


def _mounts(container: Properties, key: str) -> bool:
    volume = key.removeprefix("volume/")
    return any(
        mounted.get("volumeName") == volume for mounted in container.get("volumes") or []
    ) or any(mount.get("source") == volume for mount in container.get("mounts") or [])


if __name__ == "__main__":
    serve(Docker)
