"""What names an object outside the state, so that it is found again: its natural key.

======================  ==================================================
Kubernetes object       apiVersion and kind (the resource's type), namespace, name
Helm release            namespace, name
Docker network          name
Docker container        name
Docker volume           name
Cloudflare tunnel       account, name
its configuration       the tunnel's id
DNS record              zone, type, FQDN
Access application      account, domain
Access policy           account, name
======================  ==================================================

A Command and an image have none and need none: each does its work again without harm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TUNNEL = "cloudflare:index/zeroTrustTunnelCloudflared:ZeroTrustTunnelCloudflared"
_CONFIGURATION = (
    "cloudflare:index/zeroTrustTunnelCloudflaredConfig:ZeroTrustTunnelCloudflaredConfig"
)
_RECORD = "cloudflare:index/dnsRecord:DnsRecord"
_POLICY = "cloudflare:index/zeroTrustAccessPolicy:ZeroTrustAccessPolicy"
_APPLICATION = "cloudflare:index/zeroTrustAccessApplication:ZeroTrustAccessApplication"
_RELEASE = "kubernetes:helm.sh/v3:Release"


@dataclass(frozen=True)
class Key:
    """A natural key. ``id`` is the provider's where it follows from the key; otherwise whoever has
    the object is asked for it: ``kind`` says what to ask, ``scope`` where.
    """

    kind: str
    scope: str
    name: str
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def natural_key(type: str, inputs: Mapping[str, Any]) -> Key | None:
    """The key of an object by its resource's type and inputs; None where it has none, or where the
    inputs do not tell it yet.
    """
    key = _key(type, inputs)
    if key is None or not all(
        isinstance(part, str) and part and not is_unknown(part)
        for part in (key.kind, key.scope, key.name)
    ):
        return None
    return key


def _key(type: str, inputs: Mapping[str, Any]) -> Key | None:
    name = inputs.get("name", "")
    if type == _RELEASE:
        return _object("Release", inputs.get("namespace"), name)
    if type.startswith("kubernetes:"):
        metadata = inputs.get("metadata") or {}
        kind = type.rpartition(":")[2]
        return _object(kind, metadata.get("namespace"), metadata.get("name", ""))
    if type == "docker:index/volume:Volume":
        return Key("volume", "docker", name, name)
    if type in ("docker:index/network:Network", "docker:index/container:Container"):
        return Key(type.rpartition(":")[2].lower(), "docker", name)
    account = inputs.get("accountId", "")
    if type == _TUNNEL:
        return Key("tunnel", account, name)
    if type == _CONFIGURATION:
        tunnel = inputs.get("tunnelId", "")
        return Key("tunnel configuration", account, tunnel, tunnel)
    if type == _RECORD:
        return Key(f"{inputs.get('type')} record", inputs.get("zoneId", ""), name)
    if type == _POLICY:
        return Key("Access policy", account, name)
    if type == _APPLICATION:
        destinations = inputs.get("destinations") or [{}]
        return Key("Access application", account, destinations[0].get("uri", ""))
    return None


def _object(kind: str, namespace: str | None, name: str) -> Key:
    id = f"{namespace}/{name}" if namespace else name
    return Key(kind, "kubernetes", id, id)


def is_unknown(value: Any) -> bool:
    """Whether a value of a plan is, or holds, one that is not known before up."""
    if isinstance(value, Mapping):
        return any(map(is_unknown, value.values()))
    if isinstance(value, list):
        return any(map(is_unknown, value))
    # sdk/go/common/resource/plugin/rpc.go of pulumi/pulumi: one for each kind of value.
    return isinstance(value, str) and value in _UNKNOWNS


_UNKNOWNS = frozenset(
    {
        "04da6b54-80e4-46f7-96ec-b56ff0331ba9",
        "1c4a061d-8072-4f0a-a4cb-0ff528b18fe7",
        "3eeb2bf0-c639-47a8-9e75-3b44932eb421",
        "6a19a0b0-7e62-4c92-b797-7f8e31da9cc2",
        "030794c1-ac77-496b-92df-f27374a8bd58",
        "e48ece36-62e2-4504-bad9-02848725956a",
        "dd056dcd-154b-4c76-9bd3-c8f88648b5ff",
    }
)
