"""The Docker daemon that the docker stand-in asks: what both kinds of it answer, and the
make-believe one.

World (`world/docker/`): `network/<name>`, `volume/<name>`, `container/<name>`, `image/<name>`, each
an object's outputs. A network's `endpoints` lists what else is attached to it, by name, as k3d's
nodes are; with an endpoint it cannot be removed. A file `unreachable` there stands for a daemon
that does not answer.
"""

from __future__ import annotations

import hashlib
import secrets
from ipaddress import ip_network
from typing import Protocol

from rehearsal.core import Exists, Failure, Properties, World

NETWORK = "docker:index/network:Network"
VOLUME = "docker:index/volume:Volume"
CONTAINER = "docker:index/container:Container"
IMAGE = "docker:index/remoteImage:RemoteImage"


def names(text: str) -> frozenset[str]:
    """The words of a text, for tables of properties."""
    return frozenset(text.split())


class Daemon(Protocol):
    """A Docker engine. Each method raises :class:`Failure` with the words of the daemon."""

    def ping(self) -> None:
        """Raises when no daemon answers."""
        ...

    def find(self, token: str, id: str, state: Properties) -> Properties | None:
        """The outputs of the object with this id, `id` among them; None when it is gone.

        By name too, which is what one imports. `state` holds the stored outputs.
        """
        ...

    def create(self, token: str, outputs: Properties) -> tuple[str, Properties]:
        """Make an object: its id, and the outputs with what the daemon decided."""
        ...

    def update(self, token: str, id: str, olds: Properties, outputs: Properties) -> None:
        """Change an object in place from the stored outputs to these."""
        ...

    def delete(self, token: str, id: str, state: Properties) -> None:
        """Remove an object; one that is gone is no error. `state` holds the stored outputs."""
        ...


def failed(message: str) -> Failure:
    """An error as the bridge words it."""
    return Failure(f"1 error occurred:\n\t* {message}\n\n")


NO_DAEMON = Failure(
    "docker native provider returned an unexpected error from Configure: "
    "failed to connect to any docker daemon"
)

_KINDS = {NETWORK: "network", VOLUME: "volume", CONTAINER: "container", IMAGE: "image"}
_BUILT_IN_MODES = ("bridge", "host", "none", "default")


class MakeBelieveDaemon:
    """The rules of the Docker engine over the files of a world."""

    def __init__(self, world: World) -> None:
        self.world = world

    def ping(self) -> None:
        if (self.world.root / "unreachable").exists():
            raise NO_DAEMON

    def find(self, token: str, id: str, state: Properties) -> Properties | None:
        found = self._find(token, id)
        return found and found[1]

    def create(self, token: str, outputs: Properties) -> tuple[str, Properties]:
        name = outputs["name"]
        make = {
            NETWORK: self._create_network,
            VOLUME: self._create_volume,
            CONTAINER: self._create_container,
            IMAGE: self._create_image,
        }[token]
        try:
            outputs = make(outputs, name)
        except Exists:
            raise self._conflict(token, name) from None
        return outputs["id"], outputs

    def update(self, token: str, id: str, olds: Properties, outputs: Properties) -> None:
        found = self._find(token, id)
        if found is None:
            raise failed(f"Error response from daemon: No such {_KINDS[token]}: {id}")
        key, thing = found
        self.world.put(key, {**thing, **outputs})

    def delete(self, token: str, id: str, state: Properties) -> None:
        found = self._find(token, id)
        if found is None:
            return
        key, thing = found
        if token == NETWORK:
            attached = [*thing.get("endpoints", []), *self._containers_on(thing["name"])]
            if attached:
                raise failed(
                    f"Unable to remove network: Error response from daemon: error while removing "
                    f"network: network {thing['name']} id {thing['id']} has active endpoints "
                    f"({', '.join(attached)})"
                )
        elif token == VOLUME:
            users = [c["name"] for _, c in self.world.list("container") if _mounts(c, key)]
            if users:
                raise failed(
                    f"Error response from daemon: remove {thing['name']}: volume is in use - "
                    f"[{', '.join(users)}]"
                )
        elif token == IMAGE:
            if state.get("keepLocally"):
                return
            users = [c for _, c in self.world.list("container") if c["image"] == thing["name"]]
            if users and not state.get("forceRemove"):
                raise failed(
                    f"Unable to remove Docker image: Error response from daemon: conflict: unable "
                    f'to remove repository reference "{thing["name"]}" (must force) - container '
                    f"{users[0]['id'][:12]} is using its referenced image"
                )
        self.world.delete(key)

    def _create_network(self, outputs: Properties, name: str) -> Properties:
        outputs = {**outputs, "id": secrets.token_hex(32)}
        networks = [network for _, network in self.world.list("network")]
        if not outputs["ipamConfigs"]:
            outputs["ipamConfigs"] = [_free_subnet(networks)]
        for config in outputs["ipamConfigs"]:
            for other in networks:
                if other["name"] != name and _overlaps(config, other["ipamConfigs"]):
                    raise failed(
                        "Unable to create network: Error response from daemon: Pool overlaps with "
                        "other one on this address space"
                    )
        self.world.create(f"network/{name}", {**outputs, "endpoints": []}, outputs["id"])
        return outputs

    def _create_volume(self, outputs: Properties, name: str) -> Properties:
        outputs = {**outputs, "id": name, "mountpoint": f"/var/lib/docker/volumes/{name}/_data"}
        there = self.world.get(f"volume/{name}")
        # The daemon answers a request for a volume that exists with that volume.
        if there is None:
            self.world.create(f"volume/{name}", outputs, name)
        elif there["driver"] != outputs["driver"]:
            raise self._conflict(VOLUME, name)
        return outputs

    def _create_container(self, outputs: Properties, name: str) -> Properties:
        id = secrets.token_hex(32)
        outputs = {**outputs, "id": id, "hostname": outputs["hostname"] or id[:12]}
        names = [network["name"] for network in outputs["networksAdvanced"]]
        mode = outputs["networkMode"]
        if mode not in _BUILT_IN_MODES and not mode.startswith("container:"):
            names.append(mode)
        for network in names:
            if self.world.get(f"network/{network}") is None:
                raise failed(
                    f"Unable to create container: Error response from daemon: network {network} "
                    f"not found"
                )
        outputs["networkDatas"] = _addresses(mode)
        self.world.create(f"container/{name}", outputs, id)
        return outputs

    def _create_image(self, outputs: Properties, name: str) -> Properties:
        digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
        repository, _, pinned = name.partition("@")
        outputs = {
            **outputs,
            "id": digest + name,
            "imageId": digest,
            "repoDigest": f"{repository.rpartition(':')[0] or repository}@{pinned or digest}",
        }
        key = f"image/{name}"
        # To pull an image that is there is no error.
        if self.world.get(key) is None:
            self.world.create(key, outputs, outputs["id"])
        return outputs

    def _find(self, token: str, id: str) -> tuple[str, Properties] | None:
        kind = _KINDS[token]
        found = self.world.find(id, kind)
        if found is None and token != CONTAINER:
            thing = self.world.get(f"{kind}/{id}")
            found = None if thing is None else (f"{kind}/{id}", thing)
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
            return failed(
                f"Unable to create network: Error response from daemon: network with name {name} "
                f"already exists"
            )
        if token == CONTAINER:
            there = self.world.get(f"container/{name}") or {"id": ""}
            return failed(
                f"Unable to create container: Error response from daemon: Conflict. The container "
                f'name "/{name}" is already in use by container "{there["id"]}". You have to '
                f"remove (or rename) that container to be able to reuse that name."
            )
        return failed(
            f"Unable to create volume: Error response from daemon: create {name}: conflict: volume "
            f"name must be unique"
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
    raise failed(
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
