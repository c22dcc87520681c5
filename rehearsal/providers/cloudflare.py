"""Stand-in for the cloudflare provider: tunnels and their configuration, DNS records, Access.

World (`world/cloudflare/`), each an object's outputs: `tunnel/<account>/<name>`,
`configuration/<account>/<tunnel id>`, `record/<zone>/<name>/<type>`, `policy/<account>/<id>`,
`application/<account or zone>/<domain>`. A tunnel's `connections` lists its live connectors; with
one it cannot be deleted.

The plugin's part follows the recordings. The service's part is ours, since they were made against a
stand-in for Cloudflare's API: its rules hold when something is really made or changed, not in a
preview, as with the official plugin.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
import uuid
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any, ClassVar

from rehearsal.core import (
    UNKNOWN,
    Checked,
    Diff,
    Exists,
    Failure,
    Properties,
    Request,
    Secret,
    Unimplemented,
    compare,
    has_unknown,
    plain,
    reveal,
    serve,
)
from rehearsal.providers.bridged import Bridged, wording
from rehearsal.schemas import Schema

TUNNEL = "cloudflare:index/zeroTrustTunnelCloudflared:ZeroTrustTunnelCloudflared"
CONFIGURATION = "cloudflare:index/zeroTrustTunnelCloudflaredConfig:ZeroTrustTunnelCloudflaredConfig"
RECORD = "cloudflare:index/dnsRecord:DnsRecord"
POLICY = "cloudflare:index/zeroTrustAccessPolicy:ZeroTrustAccessPolicy"
APPLICATION = "cloudflare:index/zeroTrustAccessApplication:ZeroTrustAccessApplication"
TOKEN = "cloudflare:index/getZeroTrustTunnelCloudflaredToken:getZeroTrustTunnelCloudflaredToken"
_LISTS = {
    "cloudflare:index/getDnsRecords:getDnsRecords": ("record", "zoneId"),
    "cloudflare:index/getZeroTrustAccessApplications:getZeroTrustAccessApplications": (
        "application",
        "accountId",
    ),
    "cloudflare:index/getZeroTrustAccessPolicies:getZeroTrustAccessPolicies": (
        "policy",
        "accountId",
    ),
    "cloudflare:index/getZeroTrustTunnelCloudflareds:getZeroTrustTunnelCloudflareds": (
        "tunnel",
        "accountId",
    ),
}
"""By function that lists: the kind, and the argument that says where."""

_KINDS = {
    TUNNEL: "tunnel",
    CONFIGURATION: "configuration",
    RECORD: "record",
    POLICY: "policy",
    APPLICATION: "application",
}

_PATHS = {
    TUNNEL: "accounts/{accountId}/cfd_tunnel",
    CONFIGURATION: "accounts/{accountId}/cfd_tunnel/{tunnelId}/configurations",
    RECORD: "zones/{zoneId}/dns_records",
    POLICY: "accounts/{accountId}/access/policies",
    APPLICATION: "accounts/{accountId}/access/apps",
}
"""Where the API makes one."""

# Unknown in a preview of a creation, and of any change, unless it was given.
_COMPUTED = {
    TUNNEL: [
        "accountTag",
        "connections",
        "connsActiveAt",
        "connsInactiveAt",
        "createdAt",
        "deletedAt",
        "metadata",
        "remoteConfig",
        "status",
        "tunType",
    ],
    CONFIGURATION: ["createdAt", "source", "version"],
    RECORD: [
        "createdOn",
        "meta",
        "modifiedOn",
        "proxiable",
        "settings",
        "tags",
        "tagsModifiedOn",
    ],
    POLICY: [],
    APPLICATION: ["aud", "domain", "selfHostedDomains"],
}
_DEFAULTS: dict[str, Properties] = {
    TUNNEL: {"configSrc": "local"},
    CONFIGURATION: {},
    RECORD: {"proxied": False},
    POLICY: {"sessionDuration": "24h"},
    APPLICATION: {
        "appLauncherVisible": True,
        "httpOnlyCookieAttribute": True,
        "sessionDuration": "24h",
    },
}
_REPLACES = {
    TUNNEL: ["accountId", "configSrc"],
    CONFIGURATION: ["accountId", "tunnelId"],
    RECORD: ["zoneId"],
    POLICY: ["accountId"],
    APPLICATION: ["accountId", "zoneId"],
}
_SECRETS = {TUNNEL: ["tunnelSecret"]}


class Cloudflare(Bridged):
    """The cloudflare provider."""

    package = "cloudflare"
    schema = Schema("cloudflare")
    version = schema.version
    configuration: ClassVar[dict[str, bool]] = {
        "supportsPreview": True,
        "acceptResources": True,
        "supports_autonaming_configuration": True,
    }
    unimplemented = "{method} is not yet implemented"

    def check_config(self, request: Request) -> Checked:
        checked = super().check_config(request)
        token = reveal(request.news.get("apiToken"))
        if isinstance(token, str):
            if not re.search(r"[A-Za-z0-9_-]{40}", token):
                reason = (
                    "could not validate provider configuration: API tokens must be 40 characters "
                    "and only contain characters a-z, A-Z, 0-9, hyphens and underscores. "
                    f"Examine values at '{request.name}.apiToken'."
                )
                checked.failures.append(("", reason))
            checked.inputs = {**request.news, "apiToken": Secret(token)}
        return checked

    def configure(self, args: Properties) -> None:
        if not any(plain(args.get(key)) for key in ("apiToken", "apiKey", "apiUserServiceKey")):
            raise Failure('must provide one of "api_key", "api_token" or "api_user_service_key".')

    def check(self, request: Request) -> Checked:
        return Checked(self._marked(request.type, request.news), self.failures(request))

    def diff(self, request: Request) -> Diff:
        changed = []
        for name in self.schema.inputs(request.type):
            old, new = _pruned(request.olds.get(name)), _pruned(request.news.get(name))
            if new is None:
                default = _DEFAULTS[request.type].get(name)
                if name in _COMPUTED[request.type] or default == old:
                    continue
                new = default
            if name not in request.ignore_changes and compare({name: old}, {name: new}):
                changed.append(name)
        if not changed:
            return Diff(changes=False, has_detailed=False)
        computed = [name for name in _COMPUTED[request.type] if name not in request.news]
        return Diff(
            changes=True,
            has_detailed=False,
            diffs=sorted({*changed, *computed}),
            replaces=sorted(name for name in changed if name in _REPLACES[request.type]),
        )

    def create(self, request: Request) -> tuple[str, Properties]:
        if request.preview:
            return "", self._foretold(request, UNKNOWN)
        wanted = self._settled(request)
        self._permit(request.type, wanted)
        making: dict[str, Callable[[Properties], Properties]] = {
            TUNNEL: self._create_tunnel,
            CONFIGURATION: self._put_configuration,
            RECORD: self._create_record,
            POLICY: self._create_policy,
            APPLICATION: self._create_application,
        }
        thing = making[request.type](wanted)
        return thing["id"], self._marked(request.type, thing)

    def read(self, request: Request) -> tuple[str, Properties, Properties] | None:
        # An import's id names the account or zone first; a configuration has its tunnel's id.
        id = request.id.rpartition("/")[2]
        found = self.world.find(id, _KINDS[request.type])
        if found is None:
            return None
        _, thing = found
        for secret in _SECRETS.get(request.type, []):
            # The API never tells it: it is what the state says.
            thing.pop(secret, None)
            if secret in request.olds:
                thing[secret] = plain(request.olds[secret])
        properties = self._marked(request.type, thing)
        inputs = self._marked(request.type, self.refreshed(request, properties))
        return id, properties, inputs

    def update(self, request: Request) -> Properties:
        if request.preview:
            return self._foretold(request, request.id)
        wanted = self._settled(request)
        found = self.world.find(request.id, _KINDS[request.type])
        if found is None:
            raise _refused("PUT", f"{_KINDS[request.type]}s/{request.id}", 404, 1003, "not found")
        key, thing = found
        computed = _COMPUTED[request.type]
        kept = {name: thing[name] for name in ("id", *computed) if name in thing}
        wanted = {**kept, **wanted}
        if request.type == CONFIGURATION:
            return self._put_configuration(wanted)
        if request.type == TUNNEL:
            _check_secret(wanted)
            wanted.setdefault("tunnelSecret", thing["tunnelSecret"])
            self._move(key, f"tunnel/{wanted['accountId']}/{wanted['name']}", wanted, _name_taken)
            if "tunnelSecret" not in request.news:
                del wanted["tunnelSecret"]
        elif request.type == RECORD:
            self._check_record(wanted, key)
            wanted["modifiedOn"] = _now()
            self._move(key, _record_key(wanted), wanted, _host_taken)
        elif request.type == APPLICATION:
            self._check_policies(wanted)
            wanted.update(_application(wanted))
            self._move(key, _application_key(wanted), wanted, _application_taken)
        else:
            self.world.put(key, wanted)
        return self._marked(request.type, wanted)

    def delete(self, request: Request) -> None:
        if request.type == CONFIGURATION:
            return  # The API knows no deletion of a configuration.
        found = self.world.find(request.id, _KINDS[request.type])
        if found is None:
            # Other than most plugins, this one takes that for a failure.
            path = f"{_KINDS[request.type]}s/{request.id}"
            raise _refused("DELETE", path, 404, 1003, "not found")
        key, thing = found
        if request.type == TUNNEL:
            if thing.get("connections"):
                raise _refused(
                    "DELETE",
                    f"accounts/{thing['accountId']}/cfd_tunnel/{request.id}",
                    400,
                    1022,
                    "Cannot delete tunnel because it has active connections",
                )
            self.world.delete(f"configuration/{thing['accountId']}/{request.id}")
        self.world.delete(key)

    def invoke(self, token: str, args: Properties, preview: bool) -> Properties:
        if token != TOKEN and token not in _LISTS:
            raise Failure(f"unknown function {token}", "NOT_FOUND")
        problems = self.schema.check_function(token, args)
        if problems:
            reasons = "; ".join(wording(problem, "args") for problem in problems)
            raise Failure(reasons, "INVALID_ARGUMENT")
        if token in _LISTS:
            return {**args, "id": "a", "results": self._list(token, _pruned(plain(args)))}
        account, tunnel_id = plain(args.get("accountId")), plain(args.get("tunnelId"))
        found = self.world.find(str(tunnel_id), "tunnel")
        if found is None or found[1]["accountId"] != account:
            path = f"accounts/{account}/cfd_tunnel/{tunnel_id}/token"
            raise _refused("GET", path, 404, 1003, "Tunnel not found")
        return {**args, "token": connector_token(found[1])}

    def _list(self, token: str, args: Properties) -> list[Properties]:
        """The results of a function that lists. Filters that nobody uses are refused."""
        kind, where = _LISTS[token]
        unknown = args.keys() - {where, "maxItems", "type", "isDeleted"}
        if unknown:
            raise Unimplemented(f"the rehearsal does not know {token} by {', '.join(unknown)}")
        if where not in args:
            raise Failure(f"{token} needs {where}", "INVALID_ARGUMENT")
        found = [thing for _, thing in self.world.list(f"{kind}/{args[where]}")]
        if "type" in args:
            found = [thing for thing in found if thing["type"] == args["type"]]
        if "isDeleted" in args:
            found = [t for t in found if bool(t.get("deletedAt")) == args["isDeleted"]]
        told = [
            {name: value for name, value in thing.items() if name != "tunnelSecret"}
            for thing in found
        ]
        return told[: args.get("maxItems", 1000)]

    def _marked(self, token: str, properties: Properties) -> Properties:
        """The properties with the secret marks that the schema asks for."""
        marks = {
            name: Secret(reveal(properties[name]))
            for name in _SECRETS.get(token, [])
            if properties.get(name) is not None
        }
        return {**properties, **marks}

    def _settled(self, request: Request) -> Properties:
        """The inputs, with defaults, of what is really made. Their account and zone are checked."""
        if has_unknown(request.news):
            raise Failure("an input is unknown outside a preview")
        wanted = _pruned(plain({**_DEFAULTS[request.type], **request.news}))
        for kind in ("account", "zone"):
            id = wanted.get(kind + "Id")
            if id is not None and not re.fullmatch("[0-9a-f]{32}", id):
                path = f"{kind}s/{id}"
                message = (
                    f"Could not route to /client/v4/{path}, perhaps your object identifier is "
                    "invalid?"
                )
                raise _refused("GET", path, 400, 7003, message)
        return wanted

    def _permit(self, token: str, wanted: Properties) -> None:
        """Refuses to make what the made-up API token may not; unless said, it may make all."""
        from rehearsal.api import says  # Not above: a preview does without, and it loads a server.

        method = "PUT" if token == CONFIGURATION else "POST"
        path = _PATHS[token].format_map(defaultdict(str, wanted))
        if says(self.directory, method, path) == 403:
            raise _refused(method, path, 403, 10000, "Authentication error")

    def _foretold(self, request: Request, id: Any) -> Properties:
        computed = {name: UNKNOWN for name in _COMPUTED[request.type]}
        foretold = {**computed, **_DEFAULTS[request.type], **request.news, "id": id}
        return self._marked(request.type, foretold)

    def _move(
        self, key: str, new_key: str, thing: Properties, taken: Callable[[Properties], Failure]
    ) -> None:
        """Write an object that may have got another natural key."""
        if new_key == key:
            self.world.put(key, thing)
            return
        try:
            self.world.create(new_key, thing, thing["id"])
        except Exists:
            raise taken(thing) from None
        self.world.delete(key)

    def _create_tunnel(self, wanted: Properties) -> Properties:
        _check_secret(wanted)
        now = _now()
        thing = {
            **wanted,
            "id": str(uuid.uuid4()),
            "accountTag": wanted["accountId"],
            "connections": [],
            "connsInactiveAt": now,
            "createdAt": now,
            "metadata": "{}",
            "remoteConfig": wanted["configSrc"] == "cloudflare",
            "status": "inactive",
            "tunType": "cfd_tunnel",
        }
        # Cloudflare makes a secret up where none is given.
        secret = wanted.get("tunnelSecret") or base64.b64encode(secrets.token_bytes(32)).decode()
        kept = {**thing, "tunnelSecret": secret}
        try:
            self.world.create(f"tunnel/{wanted['accountId']}/{wanted['name']}", kept, thing["id"])
        except Exists:
            raise _name_taken(wanted) from None
        return thing

    def _put_configuration(self, wanted: Properties) -> Properties:
        account, tunnel_id = wanted["accountId"], wanted["tunnelId"]
        path = f"accounts/{account}/cfd_tunnel/{tunnel_id}/configurations"
        if self.world.find(tunnel_id, "tunnel") is None:
            raise _refused("PUT", path, 404, 1003, "Tunnel not found")
        problem = ingress_problem((wanted.get("config") or {}).get("ingresses") or [])
        if problem:
            raise _refused("PUT", path, 400, 1056, f"Bad Configuration: {problem}")
        key = f"configuration/{account}/{tunnel_id}"
        there = self.world.get(key) or {"createdAt": _now(), "version": 0}
        thing = {
            **wanted,
            "id": tunnel_id,
            "createdAt": there["createdAt"],
            "source": wanted.get("source", "cloudflare"),
            "version": there["version"] + 1,
        }
        self.world.put(key, thing)
        return thing

    def _create_record(self, wanted: Properties) -> Properties:
        self._check_record(wanted, "")
        now = _now()
        thing = {
            "settings": {"flattenCname": False, "ipv4Only": False, "ipv6Only": False},
            "tags": [],
            **wanted,
            "id": secrets.token_hex(16),
            "createdOn": now,
            "meta": "{}",
            "modifiedOn": now,
            "proxiable": wanted["type"] in ("A", "AAAA", "CNAME"),
        }
        try:
            self.world.create(_record_key(thing), thing, thing["id"])
        except Exists:
            raise _host_taken(wanted) from None
        return thing

    def _check_record(self, wanted: Properties, own_key: str) -> None:
        path = f"zones/{wanted['zoneId']}/dns_records"
        if wanted["proxied"] and wanted["ttl"] != 1:
            message = "ttl must be set to 1 when `proxied` is true"
            raise _refused("POST", path, 400, 9021, message)
        if wanted["ttl"] != 1 and not 60 <= wanted["ttl"] <= 86400:
            message = "Invalid TTL. Must be between 60 and 86400 seconds, or 1 for Automatic."
            raise _refused("POST", path, 400, 9021, message)
        if wanted["type"] not in ("A", "AAAA", "CNAME"):
            return
        host = f"record/{wanted['zoneId']}/{wanted['name']}"
        types = {thing["type"] for key, thing in self.world.list(host) if key != own_key}
        if wanted["type"] == "CNAME" and types & {"A", "AAAA", "CNAME"}:
            raise _host_taken(wanted)
        if wanted["type"] != "CNAME" and "CNAME" in types:
            message = "A CNAME record with that host already exists."
            raise _refused("POST", path, 400, 81054, message)

    def _create_policy(self, wanted: Properties) -> Properties:
        thing = {**wanted, "id": str(uuid.uuid4())}
        self.world.create(f"policy/{wanted['accountId']}/{thing['id']}", thing, thing["id"])
        return thing

    def _create_application(self, wanted: Properties) -> Properties:
        self._check_policies(wanted)
        thing = {**wanted, "id": str(uuid.uuid4()), **_application(wanted)}
        thing["aud"] = hashlib.sha256(thing["id"].encode()).hexdigest()
        try:
            self.world.create(_application_key(thing), thing, thing["id"])
        except Exists:
            raise _application_taken(wanted) from None
        return thing

    def _check_policies(self, wanted: Properties) -> None:
        for policy in wanted.get("policies") or []:
            if policy.get("id") and self.world.find(policy["id"], "policy") is None:
                path = f"accounts/{wanted.get('accountId')}/access/apps"
                message = f"access.api.error.invalid_request: policy {policy['id']} not found"
                raise _refused("POST", path, 400, 12130, message)


def connector_token(tunnel: Properties) -> str:
    """The token with which a connector runs a tunnel, as Cloudflare makes it."""
    parts = {"a": tunnel["accountId"], "t": tunnel["id"], "s": tunnel["tunnelSecret"]}
    return base64.b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode()


_SERVICE = re.compile(
    r"(https?|tcp|ssh|rdp|smb)://[^/\s]+\S*|unix(\+tls)?:/\S+|http_status:[1-9]\d\d"
    r"|hello_world|bastion|socks-proxy"
)


def ingress_problem(rules: list[Properties]) -> str:
    """Why cloudflared and Cloudflare refuse these ingress rules; "" if they do not.

    The wording is cloudflared's own (ingress/ingress.go).
    """
    if not rules:
        return "The last ingress rule must match all URLs"
    for number, rule in enumerate(rules, 1):
        hostname, path = rule.get("hostname") or "", rule.get("path") or ""
        if ":" in hostname:
            return "Hostname cannot contain a port"
        if "*" in hostname.removeprefix("*."):
            return (
                'Hostname patterns can have at most one wildcard character ("*") and it can only '
                'be used for subdomains, e.g. "*.example.com"'
            )
        catches_all = hostname in ("", "*") and not path
        if number == len(rules) and not catches_all:
            return (
                "The last ingress rule must match all URLs (i.e. it should not have a hostname or "
                "path filter)"
            )
        if number < len(rules) and catches_all:
            return (
                f"Rule #{number} is matching the hostname '{hostname}', but this will match every "
                "hostname, meaning the rules which follow it will never be triggered."
            )
        if not _SERVICE.fullmatch(rule.get("service") or ""):
            return f"Rule #{number} has an invalid service: {rule.get('service')}"
    return ""


def _check_secret(tunnel: Properties) -> None:
    secret = tunnel.get("tunnelSecret")
    if secret is None:
        return
    try:
        size = len(base64.b64decode(secret, validate=True))
    except binascii.Error:
        size = 0
    if size < 32:
        path = f"accounts/{tunnel['accountId']}/cfd_tunnel"
        message = "tunnel_secret must be at least 32 bytes, base64-encoded"
        raise _refused("POST", path, 400, 1002, message)


def _name_taken(tunnel: Properties) -> Failure:
    path = f"accounts/{tunnel['accountId']}/cfd_tunnel"
    message = "You already have a tunnel with this name. Please choose a different name."
    return _refused("POST", path, 409, 1013, message)


def _record_key(record: Properties) -> str:
    key = f"record/{record['zoneId']}/{record['name']}/{record['type']}"
    if record["type"] == "CNAME":
        return key
    content = json.dumps([record.get("content"), record.get("data")], sort_keys=True)
    return f"{key} {hashlib.sha256(content.encode()).hexdigest()[:8]}"


def _host_taken(record: Properties) -> Failure:
    path = f"zones/{record['zoneId']}/dns_records"
    if record["type"] == "CNAME":
        message = "An A, AAAA, or CNAME record with that host already exists."
        return _refused("POST", path, 400, 81053, message)
    return _refused("POST", path, 400, 81058, "An identical record already exists.")


def _application(wanted: Properties) -> Properties:
    """What the service computes of an application: its domain and all its domains."""
    destinations = wanted.get("destinations") or []
    domains = [d["uri"] for d in destinations if d.get("type", "public") == "public"]
    domain = wanted.get("domain") or (domains[0] if domains else None)
    if domain is None:
        return {}
    return {"domain": domain, "selfHostedDomains": domains or [domain]}


def _application_key(application: Properties) -> str:
    owner = application.get("accountId") or application.get("zoneId")
    return f"application/{owner}/{application.get('domain') or application['id']}"


def _application_taken(application: Properties) -> Failure:
    path = f"accounts/{application.get('accountId')}/access/apps"
    return _refused("POST", path, 409, 11010, "access.api.error.application_already_exists")


_STATUS = {400: "Bad Request", 403: "Forbidden", 404: "Not Found", 409: "Conflict"}


def _refused(method: str, path: str, status: int, code: int, message: str) -> Failure:
    """An error of the API as the plugin tells it."""
    body = {
        "success": False,
        "errors": [{"code": code, "message": message}],
        "messages": [],
        "result": None,
    }
    return Failure(
        f'failed to make http request: {method} "https://api.cloudflare.com/client/v4/{path}": '
        f"{status} {_STATUS[status]} {json.dumps(body)}"
    )


def _pruned(value: Any) -> Any:
    """The value without its nulls and marks: to the plugin framework, null is absence."""
    value = reveal(value)
    if isinstance(value, dict):
        kept = {name: _pruned(item) for name, item in value.items() if not name.startswith("__")}
        return {name: item for name, item in kept.items() if item is not None}
    if isinstance(value, list):
        return [_pruned(item) for item in value]
    return value


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


if __name__ == "__main__":
    serve(Cloudflare)
