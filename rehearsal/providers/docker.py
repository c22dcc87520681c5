"""Stand-in for the docker provider: Network, Volume, Container and RemoteImage.

The rules are those of terraform-provider-docker 3, as far as the recordings show them and, for
RemoteImage and for what goes wrong, as its sources tell. What is there, a daemon holds, by default
a make-believe one: see :mod:`rehearsal.daemon`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, ClassVar

from rehearsal.core import (
    REALLY,
    UNKNOWN,
    Checked,
    Diff,
    DiffKind,
    Failure,
    Log,
    Properties,
    Request,
    compare,
    has_unknown,
    plain,
    serve,
)
from rehearsal.daemon import CONTAINER, IMAGE, NETWORK, VOLUME, Daemon, MakeBelieveDaemon, names
from rehearsal.providers.bridged import Bridged, normal, present
from rehearsal.schemas import Schema

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


# What a change of which replaces: the `stables` of the recordings.
_REPLACES: dict[str, frozenset[str]] = {
    NETWORK: names(
        "attachable driver ingress internal ipamConfigs ipamDriver ipamOptions ipv6 labels name "
        "options"
    ),
    VOLUME: names("driver driverOpts labels name"),
    CONTAINER: names(
        "capabilities cgroupParent cgroupnsMode command cpus deviceRequests devices dns dnsOpts "
        "dnsSearches domainname entrypoints envs gpus groupAdds hostname hosts image ipcMode "
        "labels logDriver logOpts mounts name networkMode networksAdvanced pidMode platform ports "
        "privileged publishAllPorts readOnly runtime securityOpts shmSize stdinOpen stopSignal "
        "stopTimeout storageOpts sysctls tty ulimits uploads user usernsMode volumes workingDir"
    ),
    IMAGE: names("build name platform pullTriggers triggers"),
}

# Terraform's sets: their order means nothing.
_SETS = names(
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


class Docker(Bridged):
    """The docker provider."""

    package = "docker"
    schema = Schema("docker")
    version = schema.version
    configuration: ClassVar[dict[str, bool]] = {
        "supportsPreview": True,
        "supports_autonaming_configuration": True,
    }

    def __init__(self, directory: Path, log: Log | None = None) -> None:
        super().__init__(directory, log)
        self.daemon: Daemon = MakeBelieveDaemon(self.world)

    def configure(self, args: Properties) -> None:
        args = plain(args)
        if os.environ.get(REALLY) == "1":
            from rehearsal.real.daemon import RealDaemon

            self.daemon = RealDaemon(args)
        if args.get("disableDockerDaemonCheck") not in (True, "true"):
            self.daemon.ping()

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
        return self.daemon.create(request.type, self._outputs(request, ""))

    def read(self, request: Request) -> tuple[str, Properties, Properties] | None:
        thing = self.daemon.find(request.type, request.id, plain(request.olds))
        if thing is None:
            return None
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
        self.daemon.update(request.type, request.id, plain(request.olds), plain(outputs))
        return outputs

    def delete(self, request: Request) -> None:
        self.daemon.delete(request.type, request.id, plain(request.olds))

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


if __name__ == "__main__":
    serve(Docker)
